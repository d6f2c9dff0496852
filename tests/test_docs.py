"""The examples in README, docs and docstrings run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import jetplane

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    m.name for m in pkgutil.walk_packages(jetplane.__path__, "jetplane.") if not m.name.endswith(("cli", "__main__"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")
def test_page(page: Path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    dtype = torch.get_default_dtype()
    try:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            exec(compile(block, page.name, "exec"), scope)  # noqa: S102
    finally:
        torch.set_default_dtype(dtype)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and GitLab make them: letters, digits, hyphens, and hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", page.read_text())):
        if "://" in target:
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::jetplane.FallbackWarning")
@pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's dependencies
def test_docstrings(name: str):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
