"""Imports go down only, and the core needs torch alone."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import jetplane

PACKAGE = Path(__file__).parent.parent / "src" / "jetplane"

# From the bottom to the top; rooms of one line may not import each other.
LAYERS = [
    {"errors"},
    {"_torch", "llvm"},
    {"_sharding", "jets"},
    {"directions", "rules"},
    {"evaluation"},
    {"transforms", "subspace", "testing", "native"},
    {"gradients", "parallel"},
    {"optim", "monitor", "exporting", "adaptation"},
    {"control"},
    {""},  # the package itself
    {"experiments", "callbacks"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: n for n, names in enumerate(LAYERS) for name in names}
# llvm takes llvmlite, native pypcode and cffi, control NumPy and SciPy, when they are called.
OUTSIDE_CORE = {"llvm", "native", "control", "callbacks", "experiments", "cli", "__main__"}
MODULES = sorted(PACKAGE.rglob("*.py"))
STANDARD = set(__import__("sys").stdlib_module_names)


def unit(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path):
    """(unit of this package or None, top-level name of another package)."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [module] if node.module else [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            yield (name[1] if len(name) > 1 else "", None) if name[0] == "jetplane" else (None, name[0])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    own = unit(path)
    for inner, outer in imports(path):
        if inner is not None and inner != own:
            assert LEVEL[inner] < LEVEL[own], f"{own} imports {inner}"
        if outer is not None and own not in OUTSIDE_CORE:
            assert outer in STANDARD | {"torch"}, f"{own} imports {outer}"


def test_every_module_has_a_layer():
    assert {unit(p) for p in MODULES} <= set(LEVEL)


def test_public_names_are_found():
    declared = set()
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.If):  # what type checkers read
            declared |= {alias.asname or alias.name for item in node.body for alias in getattr(item, "names", ())}
    assert declared == set(jetplane.__all__)
    for name in jetplane.__all__:
        assert getattr(jetplane, name) is not None
    assert set(jetplane.__all__) <= set(dir(jetplane))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jetplane.nothing  # noqa: B018


def test_the_version_is_that_of_the_package():
    version = importlib.metadata.version("jetplane")
    assert jetplane.__version__ == version
    shown = subprocess.run([sys.executable, "-m", "jetplane", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"jetplane {version}\n"


def test_help_needs_no_torch():
    """Help of the command line comes at once."""
    asked = "import sys; sys.argv = ['jetplane', 'train', '--help']; from jetplane.__main__ import main\n"
    asked += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    slow = {"torch", "numpy", "matplotlib", "optuna", "plotly", "sklearn"}
    done = subprocess.run(
        [sys.executable, "-c", asked + f"print('imported', sorted({slow!r} & set(sys.modules)))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--method" in done.stdout and done.stdout.strip().endswith("imported []"), done.stdout[-200:]
