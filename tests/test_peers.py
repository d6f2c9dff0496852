"""Cases of other projects' own tests: jet-for-pytorch's to order 4, curvlinops' matrices, torch's functional ones.

    JET_SRC=… CURVLINOPS_SRC=… TORCH_SRC=… scripts/test -m peers

The first two variables name an unpacked source distribution (``pip download --no-deps --no-binary :all: NAME``), whose
tests hold the cases; the packages are to be installed beside. The third names a tree of torch's repository at the
version that is installed, of which ``test/autograd/test_functional.py`` suffices. Nothing of them is copied. What is
expected is reverse mode in double precision, curvlinops' own matrices, and what `torch.autograd.functional` gives.
"""

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional
from torch.utils._pytree import tree_leaves, tree_map

import jetplane as jp

pytestmark = pytest.mark.peers
close = torch.testing.assert_close


def module(variable: str, package: str, name: str) -> Any:
    """A module of a project's tests; None where the project is not there. Both call their folder ``test``."""
    source = os.environ.get(variable)
    if not source or not Path(source).is_dir() or importlib.util.find_spec(package) is None:
        return None
    mine = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == "test"}
    sys.path.insert(0, source)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(source)
        for key in [key for key in sys.modules if key.split(".")[0] == "test"]:
            del sys.modules[key]
        sys.modules.update(mine)


def cases(found: Any, *names: str) -> list[Any]:
    """Cases by their names; one that skips, where there are none."""
    if found is None:
        reason = "JET_SRC or CURVLINOPS_SRC names no source tree, or its package is not installed"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    listed = [case for name in names for case in getattr(found, name)]
    return [pytest.param(case, id=str(case.get("id", n))) for n, case in enumerate(listed)]


# --- jet-for-pytorch ---------------------------------------------------------------------------------------------

UTILS = module("JET_SRC", "jet", "test.utils")
COMPOSITIONS = module("JET_SRC", "jet", "test.test_composition")
PRIMITIVES = module("JET_SRC", "jet", "test.test_primitives")


def weighed(result: Any) -> Tensor:
    """One number of a tree of results, each entry with a weight of its own."""
    return sum(
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() for y in tree_leaves(result)
    )


def by_reverse(f: Any, args: Any, v: Any, order: int) -> list[Tensor]:
    """Derivatives of ``f(x + t v)`` at t = 0, one after the other."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    moved = tree_map(lambda x, u: x + t * u, args, v)
    found = [weighed(f(*moved))]
    for _ in range(order):
        last = found[-1]
        more = torch.autograd.grad(last, t, create_graph=True, allow_unused=True)[0] if last.requires_grad else None
        found.append(torch.zeros_like(last) if more is None else more)
    return [y.detach() for y in found[1:]]


def to_order_four(f: Any, args: Any, v: Any) -> list[Tensor]:
    """The same by a jet of a jet."""
    along = tree_map(lambda u: u[None], v)

    def second(*xs: Any) -> Any:
        return jp.jet(f, xs, along, pairs="diagonal")[1:]

    (one, two), (_, three), (_, four) = jp.jet(second, args, along, pairs="diagonal")
    taken = lambda part, axes: weighed(tree_map(lambda y: y.reshape(y.shape[axes:]), part))  # noqa: E731
    return [taken(one, 1), taken(two, 1), taken(three, 2), taken(four, 2)]


@pytest.mark.parametrize(
    "case",
    cases(UTILS, "SCALAR_OUTPUT_CASES")
    + cases(COMPOSITIONS, "COMPOSITION_CASES")
    + cases(PRIMITIVES, "PRIMITIVE_CASES"),
)
@pytest.mark.filterwarnings("ignore")
def test_derivatives_to_order_four(case):
    f, args = UTILS.setup_case(case)
    args = tree_map(lambda x: x.double(), args)
    torch.manual_seed(2)
    v = tree_map(torch.randn_like, args)
    with torch.no_grad():
        found = to_order_four(f, tuple(args), tuple(v))
    for a, b in zip(found, by_reverse(f, args, v, 4), strict=True):
        close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", cases(UTILS, "SCALAR_OUTPUT_CASES"))
def test_laplacians(case):
    f, args = UTILS.setup_case(case)
    x = args[0].double()
    h = torch.func.hessian(f)(x).flatten(-2) if x.dim() > 1 else torch.func.hessian(f)(x)
    close(jp.laplacian(f, x), h.diagonal(dim1=-2, dim2=-1).sum(-1))
    inner = lambda z: torch.func.hessian(f)(z).diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    close(jp.bilaplacian(f, x), torch.func.hessian(inner)(x).diagonal(dim1=-2, dim2=-1).sum(-1))


# --- curvlinops --------------------------------------------------------------------------------------------------

CURVLINOPS = module("CURVLINOPS_SRC", "curvlinops", "test.cases")
MOST = 400  # parameters of an exact Hessian by all pairs
CLOSURES = {"Hessian": ("HessianLinearOperator", "hessian"), "Gauss-Newton": ("GGNLinearOperator", "ggn")}


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("case", cases(CURVLINOPS, "CASES", "CNN_CASES"))
@pytest.mark.filterwarnings("ignore")
def test_curvature(case, kind, chunk):
    import curvlinops

    operator, curvature = CLOSURES[kind]
    torch.manual_seed(case["seed"])
    model, loss = case["model_func"]().double(), case["loss_func"]().double()
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    batch = lambda x: {k: wide(t) for k, t in x.items()} if hasattr(x, "items") else wide(x)  # noqa: E731
    data = [(batch(x), wide(y)) for x, y in case["data"]()]
    size = lambda y: y.shape[0]  # noqa: E731
    params = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"check_deterministic": False}
    if not isinstance(data[0][0], Tensor):
        options["batch_size_fn"] = lambda x: x["x"].shape[0]
    d = sum(p.numel() for p in params)
    if kind == "Hessian" and d > MOST:
        pytest.skip(
            f"{d} parameters: the coefficients of all their pairs do not fit into memory, or take hours in chunks"
        )
    matrix = getattr(curvlinops, operator)(model, loss, params, data, **options) @ torch.eye(d, dtype=torch.float64)
    total = sum(size(y) for _, y in data)

    def closure() -> Tensor:
        parts = [loss(model(x), y) * (size(y) / total if loss.reduction == "mean" else 1) for x, y in data]
        return torch.stack(parts).sum()

    axes = torch.eye(d, dtype=torch.float64).split([p.numel() for p in params], 1)
    tangents = [e.reshape(d, *p.shape) for e, p in zip(axes, params, strict=True)]
    found = jp.evaluate(closure, params, tangents, curvature, chunk=chunk).curvature
    close(found, matrix, rtol=1e-7, atol=1e-9)


# --- torch ---------------------------------------------------------------------------------------------------------


def torch_tests() -> tuple[Any, list[Any]]:
    """Torch's tests of `torch.autograd.functional`, and the names of those on ordinary tensors."""
    file = Path(os.environ.get("TORCH_SRC", "nowhere"), "test/autograd/test_functional.py")
    if not file.is_file():
        return None, [pytest.param("", marks=pytest.mark.skip(reason="TORCH_SRC names no tree of torch's repository"))]
    spec = importlib.util.spec_from_file_location("torch_test_functional", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    names = [n for n in dir(found.TestAutogradFunctional) if n.startswith("test_") and n.endswith("base_tensor")]
    return found, [n for n in names if "vjp_" not in n and "basis" not in n]


FUNCTIONAL, NAMES = torch_tests()


def one(inputs: Any, v: Any) -> Any:
    """The vector, which torch takes to be one where a function of a single number is given none."""
    return torch.ones_like(inputs) if v is None and isinstance(inputs, Tensor) and inputs.numel() == 1 else v


def product(f: Any, inputs: Any, v: Any = None) -> tuple[Any, Any]:
    """The value and ``H v``, which is ``v^T H``."""
    found = jp.hvp(f, inputs, one(inputs, v))
    return f(*inputs) if isinstance(inputs, tuple) else f(inputs), found


OURS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, inputs, v=None: jp.jvp(f, inputs, one(inputs, v)),
    "hvp": product,
    "vhp": product,
    "jacobian": jp.jacobian,
    "hessian": jp.hessian,
}


def beside(name: str) -> Callable[..., Any]:
    """A function of torch's that is compared with ours at each call, and gives ours where it has a graph."""
    theirs, ours = getattr(functional, name), OURS[name]

    def call(f: Any, inputs: Any, *args: Any, strict: bool = False, **options: Any) -> Any:
        try:
            expected = theirs(f, inputs, *args, strict=strict, **options)
        except (RuntimeError, TypeError) as error:
            several = name == "hessian" and "single" in str(error)  # numbers, which torch.func.hessian takes
            if not (strict or several):  # "strict" is not an option of ours
                with pytest.raises(jp.errors.JetplaneError):
                    ours(f, inputs, *args)
            raise
        found = ours(f, inputs, *args)
        for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            # Of a result of shape (1, 1), and of mixed dtypes, ours are as torch.func's.
            close(a.reshape(b.shape).to(b.dtype), b, rtol=1e-5, atol=1e-6)
        return found if options.get("create_graph") and torch.is_grad_enabled() else expected

    return call


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_autograd_functional(name, monkeypatch):
    """Torch's own numbers, gradients through them, and list of misuse."""
    others = {n: getattr(functional, n) for n in ("vjp", "_construct_standard_basis_for")}
    monkeypatch.setattr(FUNCTIONAL, "autogradF", types.SimpleNamespace(**{n: beside(n) for n in OURS}, **others))
    getattr(FUNCTIONAL.TestAutogradFunctional(name), name)()
