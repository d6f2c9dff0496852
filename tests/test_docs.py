"""The examples in README, docs and docstrings run as they stand."""

import doctest
import importlib
import pkgutil
import re
import tomllib
import types
from pathlib import Path

import pytest
import torch

import jetplane

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    m.name for m in pkgutil.walk_packages(jetplane.__path__, "jetplane.") if not m.name.endswith(("cli", "__main__"))
]


def require_extras(name: str) -> None:
    """Skip what needs optional packages that are not there."""
    if "control" in name:
        pytest.importorskip("casadi", reason="optimal control's examples need IPOPT, which comes with casadi")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")
def test_page(page: Path, monkeypatch, tmp_path):
    require_extras(page.name)
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
    require_extras(name)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_name_has_a_place_in_the_reference():
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs/reference").glob("*.md")))
    shown = {name: pkgutil.resolve_name(name) for name in re.findall(r"^::: (jetplane\S*)", pages, re.M)}
    modules = {name for name, it in shown.items() if isinstance(it, types.ModuleType)}  # shown with all they define

    def missing(module: types.ModuleType, prefix: str) -> list[str]:
        return [
            f"{prefix}.{name}" for name in module.__all__
            if not any(getattr(module, name) is it for it in shown.values())
            and f"jetplane.{getattr(getattr(module, name), '__module__', '').split('.')[-1]}" not in modules
        ]  # fmt: skip

    shown_apart = ("control", "directions", "gradients", "optim")  # name by name
    packages = {name: getattr(jetplane, name) for name in shown_apart}
    at_top = [name for name in missing(jetplane, "jetplane") if name.split(".")[-1] not in packages]
    assert not at_top, f"add to a page of docs/reference: {at_top}"
    for name, package in packages.items():
        assert not missing(package, f"jetplane.{name}"), "add to a page of docs/reference"


def test_the_version_is_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version  # type: ignore
    assert f'version: "{version}"' in (ROOT / "packaging/conda/recipe.yaml").read_text()
    assert re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version  # type: ignore
