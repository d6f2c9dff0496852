"""Other projects beside ours: cases of jet-for-pytorch, curvlinops and torch, and steps of zeroth-order optimizers.

    JET_SRC=… CURVLINOPS_SRC=… TORCH_SRC=… MEZO_SRC=… FZOO_SRC=… HIZOO_SRC=… LOZO_SRC=… scripts/test -m peers

The first two variables name an unpacked source distribution (``pip download --no-deps --no-binary :all: NAME``), whose
tests hold the cases; the packages are to be installed beside. The third names a tree of torch's repository at the
version that is installed, of which ``test/autograd/test_functional.py`` suffices. What is expected is reverse mode in
double precision, curvlinops' own matrices, and what `torch.autograd.functional` gives. The others name a checkout of
princeton-nlp/MeZO (552cb1b), DKmiyan/FZOO (d4f8a8b), Yanjun-Zhao/HiZOO (4f99055) and optsuite/LOZO (5d1ade5): from
equal directions, equal steps. Nothing of them is copied.
"""

import ast
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional
from torch.utils._pytree import tree_leaves, tree_map

import jetplane as jp
from jetplane.directions.laws import key
from jetplane.experiments.zeroth_order import FZOO, LOZO, HiZOO, MeZO, ZerothOrder

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
KRONECKER = module("CURVLINOPS_SRC", "curvlinops", "test.kfac_cases")
MOST = 400  # parameters of an exact Hessian by all pairs; of more it is made of products, by reverse mode
COLUMNS = 64  # of a matrix of curvlinops' at a time
CLOSURES = {"Hessian": ("HessianLinearOperator", "hessian"), "Gauss-Newton": ("GGNLinearOperator", "ggn")}


def curvature_cases() -> list[Any]:
    """Each case of curvlinops once: with what it sets of weight sharing, and in each of its blocks of parameters.

    Its list of inverses is a part of the first one.
    """
    if CURVLINOPS is None or KRONECKER is None:
        (skipped,) = cases(None)
        return [pytest.param(None, None, None, marks=skipped.marks)]
    listed = [
        (name, n, case)
        for found in (CURVLINOPS, KRONECKER)
        for name in sorted(vars(found))
        if name.endswith("CASES") and name not in ("INV_CASES", "ADJOINT_CASES")
        for n, case in enumerate(getattr(found, name))
    ]
    every = []
    for name, n, case in listed:
        for setting in ("expand", "reduce") if "WEIGHT_SHARING" in name else (None,):
            for blocks in CURVLINOPS.BLOCK_SIZES_FNS if name in ("CASES", "CNN_CASES") else ("full",):
                words = [name.removesuffix("_CASES").lower(), str(n), setting, None if blocks == "full" else blocks]
                every.append(pytest.param(case, setting, blocks, id="-".join(w for w in words if w)))
    return every


def of_curvlinops(case: Any, setting: str | None) -> tuple[torch.nn.Module, torch.nn.Module, list[Any]]:
    """Model, loss and batches of a case in double precision.

    In evaluation mode: dropout draws anew in each run, and curvlinops refuses buffers that batch norm writes to.
    """
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    batch = lambda x: {k: wide(t) for k, t in x.items()} if hasattr(x, "items") else wide(x)  # noqa: E731
    torch.manual_seed(case["seed"])
    model = case["model_func"]()
    if setting is not None:
        model.setting = setting
    data = case["data"]() if setting is None else case["data"]()[setting]
    return model.double().eval(), case["loss_func"]().double(), [(batch(x), wide(y)) for x, y in data]


def by_products(model: torch.nn.Module, closure: Callable[..., Tensor], names: list[str], params: Any) -> Tensor:
    """The Hessian of a closure in some parameters of a model, made of Hessian-vector products by reverse mode."""
    f, _ = jp.functional(model)

    def of(*ps: Tensor) -> Tensor:
        return closure(lambda x: f(dict(zip(names, ps, strict=True)), x))

    rows = jp.hessian(of, tuple(params), mode="forward-over-reverse")
    flat = [[h.reshape(p.numel(), -1) for h in row] for row, p in zip(rows, params, strict=True)]
    return torch.cat([torch.cat(row, 1) for row in flat])


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize(("case", "setting", "blocks"), curvature_cases())
@pytest.mark.filterwarnings("ignore")
def test_curvature(case, setting, blocks, kind, chunk):
    import curvlinops

    operator, curvature = CLOSURES[kind]
    model, loss, data = of_curvlinops(case, setting)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"check_deterministic": False}
    if not isinstance(data[0][0], Tensor):
        options["batch_size_fn"] = lambda x: x["x"].shape[0]
    size = lambda y: y.shape[0]  # noqa: E731
    total = sum(size(y) for _, y in data)

    def closure(run: Callable[[Any], Tensor] = model) -> Tensor:
        parts = [loss(run(x), y) * (size(y) / total if loss.reduction == "mean" else 1) for x, y in data]
        return torch.stack(parts).sum()

    done = 0
    for count in CURVLINOPS.BLOCK_SIZES_FNS[blocks](params) or [len(params)]:
        moving, own = params[done : done + count], names[done : done + count]
        d, done = sum(p.numel() for p in moving), done + count
        eye = torch.eye(d, dtype=torch.float64)
        theirs = getattr(curvlinops, operator)(model, loss, moving, data, **options)
        matrix = torch.cat([theirs @ columns for columns in eye.split(COLUMNS, 1)], 1)
        if kind == "Hessian" and d > MOST:
            if chunk is not None:
                pytest.skip(f"{d} parameters: products with a Hessian have no pairs, and no chunks of them")
            found = by_products(model, closure, own, moving)
        else:
            axes = eye.split([p.numel() for p in moving], 1)
            tangents = [e.reshape(d, *p.shape) for e, p in zip(axes, moving, strict=True)]
            found = jp.evaluate(closure, moving, tangents, curvature, chunk=chunk).curvature
        close(found, matrix, rtol=1e-7, atol=1e-9)


# --- zeroth-order optimizers ---------------------------------------------------------------------------------------
# Each project's trainer is one for an old `transformers`. The methods that take its step are compiled from its source
# and run as they are, on a stand-in that holds parameters and evaluates the loss.

EPS, RATE = 1e-2, 3e-2


class Quadratic:
    """A matrix and a vector, the loss ``theta^T H theta / 2 + b^T theta``, and the method's own arguments."""

    def __init__(self, variable: str, file: str, methods: tuple[str, ...], **arguments: Any) -> None:
        draw = torch.Generator().manual_seed(1)
        shapes = {"matrix": (4, 3), "vector": (5,)}
        self.own = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}
        root = torch.randn(17, 17, generator=draw, dtype=torch.float64)
        self.h, self.b = root @ root.T / 17, torch.randn(17, generator=draw, dtype=torch.float64)
        self.peer = torch.nn.Module()
        for name, start in self.own.items():
            self.peer.register_parameter(name, torch.nn.Parameter(start.clone()))
            self.own[name] = start.clone().requires_grad_()
        self.seeds: list[int] = []
        self.seen: list[list[Tensor]] = []  # where the peer evaluates the loss
        quiet = SimpleNamespace(step=lambda: None, info=lambda text: None)
        space = {"torch": torch, "logger": quiet, "np": SimpleNamespace(random=SimpleNamespace(randint=self.seed))}
        found = trainer_methods(Path(os.environ[variable]) / file, methods)
        exec(compile(found, file, "exec"), space)  # noqa: S102
        settings = SimpleNamespace(zo_eps=EPS, weight_decay=0.0, gradient_accumulation_steps=1, **arguments)
        names = {name: MethodType(space[name], self) for name in methods}
        everything = names | {"args": settings, "lr_scheduler": quiet, "_get_learning_rate": lambda: RATE}
        vars(self).update(everything, current_lr=RATE, N=settings.N if "N" in arguments else 0, losses=None)

    def seed(self, most: int) -> int:
        return self.seeds.pop(0)

    def at(self, params: Any) -> Tensor:
        theta = torch.cat([p.detach().flatten() for p in params])
        return theta @ self.h @ theta / 2 + self.b @ theta

    def zo_forward(self, model: Any, inputs: Any) -> Tensor:
        self.seen.append([p.detach().clone() for p in self.peer.parameters()])
        return self.at(self.peer.parameters())

    def own_step(self, opt: ZerothOrder) -> None:
        opt.step(lambda: self.at(self.own.values()))

    def compare(self, **tolerance: float) -> None:
        for mine, theirs in zip(self.own.values(), self.peer.parameters(), strict=True):
            close(mine.detach(), theirs.detach(), **tolerance)


def trainer_methods(path: Path, names: tuple[str, ...]) -> ast.Module:
    """Methods of a file's class of trainers, as functions."""
    (trainer,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and "Trainer" in n.name]
    kept = [n for n in trainer.body if isinstance(n, ast.FunctionDef) and n.name in names]
    for function in kept:
        function.returns = None
        for argument in function.args.args:
            argument.annotation = None
    assert {n.name for n in kept} == set(names)
    return ast.Module(kept, [])


def needs(variable: str) -> Any:
    there = Path(os.environ.get(variable, "")).is_dir() and variable in os.environ
    return pytest.mark.skipif(not there, reason=f"{variable} names no source tree")


def seeds_of(opt: ZerothOrder, samples: int = 1) -> list[int]:
    """With which the optimizer's next step draws."""
    return [int(key(opt.seed, opt.steps, sample)) % (1 << 63) for sample in range(samples)]


@needs("MEZO_SRC")
def test_mezos_steps_are_those_of_its_public_code():
    peer = Quadratic("MEZO_SRC", "large_models/trainer.py", ("zo_perturb_parameters", "zo_step", "zo_update"))
    opt = MeZO(peer.own.values(), lr=RATE, eps=EPS, seed=3)
    for _ in range(3):
        peer.seeds = seeds_of(opt)
        peer.zo_step(peer.peer, None)
        peer.zo_update(peer.peer)
        peer.own_step(opt)
        peer.compare(rtol=1e-9, atol=1e-11)


@needs("FZOO_SRC")
def test_fzoos_steps_are_those_of_its_public_code():
    methods = ("zo_perturb_parameters", "zo_step", "zo_update")
    peer = Quadratic("FZOO_SRC", "trainer.py", methods, N=6)
    opt = FZOO(peer.own.values(), lr=RATE, eps=EPS, seed=3, samples=6)
    for _ in range(3):
        peer.seeds = seeds_of(opt, 6)
        peer.zo_step(peer.peer, None)
        peer.zo_update(peer.peer)
        peer.own_step(opt)
        peer.compare(rtol=1e-4, atol=1e-5)  # it keeps the losses in single precision


@needs("HIZOO_SRC")
def test_hizoos_steps_are_those_of_its_public_code():
    peer = Quadratic(
        "HIZOO_SRC", "trainer.py", ("efficient_Hessian_perturb_parameters", "zo_Hessian_step_update")
    )  # fmt: skip
    peer.Hessian_matrix = {name: torch.ones_like(p.data) for name, p in peer.peer.named_parameters()}
    opt = HiZOO(peer.own.values(), lr=RATE, eps=EPS, seed=3, smooth=0.2)
    for _ in range(3):
        peer.seeds = seeds_of(opt)
        peer.zo_Hessian_step_update(peer.peer, None, RATE, 0.2)
        peer.own_step(opt)
        peer.compare(rtol=1e-7, atol=1e-9)


@needs("LOZO_SRC")
def test_lozos_steps_are_those_of_its_public_code(monkeypatch):
    """Along its directions, as it draws U and V otherwise.

    In the first step of an interval the public code draws V from the same numbers as U, and for the update U alone:
    it moves along another U than the one whose slope it has. That step is left out of the comparison.
    """
    methods = ("lowrank_zo_perturb_parameters", "lowrank_zo_step", "lowrank_zo_update", "random_gaussian_matrix")
    peer = Quadratic("LOZO_SRC", "large_models/LOZOtrainer.py", methods, step_interval=3, rank_r=2)
    opt = LOZO(peer.own.values(), lr=RATE, eps=EPS, rank=2, interval=3)
    right = []
    for n in range(6):
        for mine, theirs in zip(peer.own.values(), peer.peer.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        peer.seeds, peer.seen, before = [n + 5], [], [p.detach().clone() for p in peer.peer.parameters()]
        peer.lowrank_zo_step(peer.peer, None)
        peer.lowrank_zo_update()
        drawn = [(above - p) / EPS for above, p in zip(peer.seen[0], before, strict=True)]
        monkeypatch.setattr(opt, "_draw", lambda i, p, generator, drawn=drawn: drawn[i])
        peer.own_step(opt)
        right.append(torch.linalg.svd(drawn[0])[2][:2])
        if n % 3:
            peer.compare(rtol=1e-7, atol=1e-9)
            close(right[-1].T @ right[-1], right[-2].T @ right[-2])  # V stays, as ours does: see test_zeroth_order.py


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
