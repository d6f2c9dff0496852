"""Kinds of tensors and code that a closure may hold, each as a small program: carried, told or refused.

A part of `python -m benchmarks.coverage`; alone by `python -m benchmarks.coverage --kinds`, which renews that part of
docs/coverage.md. A program is its closure, its parameters and, where reverse mode takes another way or none, a
reference. Slopes are compared with reverse mode, curvatures with reverse over reverse, or with central differences
where torch has no second derivative or a wrong one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import jetplane as jp
from jetplane.evaluation.specification import Curvature
from jetplane.rules import fallback
from jetplane.testing import central_differences, grad_of_grad

Closure = Callable[[], Tensor]
OUTCOMES = {
    "carried": "the numbers of reverse mode",
    "told": "the same, and a warning that says how",
    "refused": "a typed error that names the remedy",
    "WRONG": "other numbers, without a word",
    "crash": "an error that is not one of Jetplane's",
}


@dataclass(frozen=True)
class Program:
    """A closure in double precision, the tensors that move, and the same in another way for reverse mode."""

    closure: Closure
    params: list[Tensor]
    reference: Closure | None = None


PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(name: str) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    """Enter a program under the words of the table."""

    def enter(make: Callable[[], Program]) -> Callable[[], Program]:
        PROGRAMS[name] = make
        return make

    return enter


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _mlp() -> tuple[nn.Sequential, list[Tensor], Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return model, list(model.parameters()), _random(16, 4), _random(16, 2)


# --- custom autograd functions -------------------------------------------------------------------------------


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * x)
        return g * (s + 1.702 * x * s * (1 - s))


class Intermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * (s + x * s * (1 - s))


class Once(Gelu):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Gelu.backward(ctx, g)


class Jvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_forward(x, s)
        ctx.save_for_backward(x)
        return x * s

    @staticmethod
    def jvp(ctx, t):
        x, s = ctx.saved_tensors
        return t * (s + x * s * (1 - s))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.1, 0.1)


def _function(name: str, function: type, reference: Callable[[Tensor], Tensor] | None = None) -> None:
    @program(f"custom `autograd.Function`: {name}")
    def _() -> Program:
        w = _random(5)

        def closure(f: Callable[[Tensor], Tensor]) -> Tensor:
            return (f(w.sin()) * w).sum()

        def other() -> Tensor:
            return closure(reference or function.apply)  # type: ignore[attr-defined]

        return Program(lambda: closure(function.apply), [w], other)  # type: ignore[attr-defined]


_function("with `jvp`", Jvp)
_function("with a `backward` of torch functions", Gelu)
_function("straight-through, by `backward`", Rounded)
_function("`once_differentiable`", Once, lambda x: Gelu.apply(x))  # type: ignore[arg-type, return-value]
_function("that saves results of its own", Intermediate, F.silu)
_function("whose `backward` is not linear", Clipped)


@program("reentrant checkpoint")
def _() -> Program:
    model, params, x, y = _mlp()
    return Program(
        lambda: F.mse_loss(checkpoint(model, x + 0 * params[1].sum(), use_reentrant=True), y),  # type: ignore[arg-type]
        params, lambda: F.mse_loss(model(x), y),
    )  # fmt: skip


# --- kinds of tensors ----------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@program("data of a tensor subclass (`__torch_function__`)")
def _() -> Program:
    model, params, x, y = _mlp()
    return Program(lambda: F.mse_loss(model(x.as_subclass(Tagged)), y), params, lambda: F.mse_loss(model(x), y))


@program("data of a wrapper subclass (`__torch_dispatch__`)")
def _() -> Program:
    from torch.testing._internal.two_tensor import TwoTensor

    model, params, x, y = _mlp()
    return Program(lambda: F.mse_loss(model(TwoTensor(x, x)).a, y), params, lambda: F.mse_loss(model(x), y))


@program("data of a wrapper subclass that takes no other: `MaskedTensor`")
def _() -> Program:
    from torch.masked import masked_tensor

    w, x = _random(5), _random(5)
    masked = masked_tensor(x, x > 0)
    return Program(lambda: (w.sum() * masked).sum().get_data(), [w], lambda: (w.sum() * x)[x > 0].sum())  # type: ignore[attr-defined]


def _sparse(layout: str, make: Callable[[Tensor], Tensor]) -> None:
    @program(f"constant sparse matrix times dense: {layout}")
    def _() -> Program:
        model, params, x, y = _mlp()
        dense = (torch.rand(16, 16) < 0.3).double()
        s = make(dense)
        return Program(lambda: F.mse_loss(s @ model(s @ x), y), params, lambda: F.mse_loss(dense @ model(dense @ x), y))


_sparse("COO", lambda s: s.to_sparse())
_sparse("CSR", lambda s: s.to_sparse_csr())
_sparse("CSC", lambda s: s.to_sparse_csc())
_sparse("BSR", lambda s: s.to_sparse_bsr((2, 2)))


@program("sparse matrix whose values depend on parameters")
def _() -> Program:
    w, x, place = _random(2), _random(2, 2), torch.tensor([[0, 1], [1, 0]])
    make = lambda: torch.sparse_coo_tensor(place, w, (2, 2))  # noqa: E731
    return Program(lambda: (make() @ x).sum(), [w], lambda: (w * x.sum(1).flip(0)).sum())


@program("sparse elementwise product with a dense tensor")
def _() -> Program:
    w, s = _random(3, 3), torch.eye(3).double()
    return Program(lambda: (s.to_sparse() * w).to_dense().sum(), [w], lambda: (s * w).sum())


@program("sparse parameter")
def _() -> Program:
    w = torch.eye(3).double().to_sparse()
    dense = torch.eye(3).double()
    return Program(lambda: (w @ torch.ones(3, 1).double()).sum(), [w], lambda: dense.sum())


@program("complex parameter, real loss")
def _() -> Program:
    w, x = torch.randn(3, dtype=torch.complex128), _random(16)
    return Program(lambda: torch.fft.irfft(torch.fft.rfft(x)[:3] * w, n=16).exp().sum(), [w])


# --- kinds of code ---------------------------------------------------------------------------------------------


@program("`torch.compile`d module")
def _() -> Program:
    model, params, x, y = _mlp()
    compiled = torch.compile(model, backend="eager")
    return Program(lambda: F.mse_loss(compiled(x), y), params, lambda: F.mse_loss(model(x), y))


@program("`flex_attention`, score_mod with a parameter")
def _() -> Program:
    q, k, v, bias = (_random(*s) for s in ((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4), (2, 10)))
    i = torch.arange(5)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 5, 5, device="cpu", BLOCK_SIZE=5)

    def closure() -> Tensor:
        out = flex_attention(q.sin(), k, v, lambda s, b, h, i, j: s + bias[h, i - j + 5], mask)
        return out.square().sum()  # type: ignore[union-attr]

    def reference() -> Tensor:
        s = q.sin() @ k.mT / 2 + bias[:, i[:, None] - i + 5]
        return (s.masked_fill(i[:, None] < i, -torch.inf).softmax(-1) @ v).square().sum()

    return Program(closure, [q, bias], reference)


@program("`torch.cond`")
def _() -> Program:
    w = _random(3)
    branches = (lambda x: x.sin(), lambda x: x.cos())
    return Program(lambda: torch.cond(w.sum() > -100, *branches, (w * w,)).sum(), [w], lambda: (w * w).sin().sum())


@program("another higher-order operator: `map`")
def _() -> Program:
    from torch._higher_order_ops.map import map as mapped

    w, x = _random(3), _random(3)
    return Program(lambda: mapped(lambda y, *_: y * w, x).sum(), [w], lambda: x.sum() * w.sum())


def _reparametrized(name: str, change: Callable[[nn.Sequential], object]) -> None:
    @program(name)
    def _() -> Program:
        model, _, x, y = _mlp()
        change(model)
        return Program(lambda: F.mse_loss(model(x), y), [p for p in model.parameters() if p.requires_grad])


_reparametrized("pruned layers", lambda m: prune.l1_unstructured(m[0], "weight", 0.5))
_reparametrized("`weight_norm`, parametrization", lambda m: parametrizations.weight_norm(m[0]))
_reparametrized("`weight_norm`, old", lambda m: nn.utils.weight_norm(m[0]))
_reparametrized("`spectral_norm`, eval mode", lambda m: parametrizations.spectral_norm(m[0]).eval())
_reparametrized("`orthogonal`", lambda m: parametrizations.orthogonal(m[2]))


@program("NumPy on a tensor that depends on parameters")
def _() -> Program:
    w = _random(3)
    return Program(lambda: torch.from_numpy(w.sin().numpy()).sum(), [w], lambda: w.sin().sum())


@program("NumPy in `jetplane.blackbox`")
def _() -> Program:
    import numpy

    w, box = _random(3), jp.blackbox(numpy.sin, numpy=True, scale=1.0)
    return Program(lambda: (box(w) ** 2).sum(), [w], lambda: (w.sin() ** 2).sum())


# --- outcomes ----------------------------------------------------------------------------------------------------


def outcome(make: Callable[[], Program], curvature: Curvature) -> tuple[str, str]:
    """What becomes of a program, and why: the slope alone ("none") or the plane ("hessian")."""
    torch.manual_seed(0)
    fallback._announced.clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        case = make()
        params, reference = case.params, case.reference or case.closure
        tangents = [torch.randn(2, *p.shape, dtype=p.dtype) for p in params]
        try:
            found = jp.evaluate(case.closure, params, tangents, curvature)
        except jp.JetplaneError as error:
            return "refused", str(error).partition("\n")[0]
        except Exception as error:  # any: that is what is to be seen
            return "crash", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        said = [str(w.message) for w in heard if issubclass(w.category, jp.JetplaneWarning)]
        if not _right(found, reference, params, tangents, curvature):
            return "WRONG", ""
    return ("told", said[0]) if said else ("carried", "")


def _right(found: jp.PlaneModel, reference: Closure, params: list[Tensor], v: list[Tensor], curvature: str) -> bool:
    for p in params:
        p.requires_grad_()
    gradient = torch.autograd.grad(reference(), params)
    slope = torch.stack([(g.conj() * t).real.flatten(1).sum(1) for g, t in zip(gradient, v, strict=True)]).sum(0)
    if not torch.allclose(found.slope, slope, rtol=1e-6, atol=1e-8):
        return False
    if curvature == "none":
        return True
    candidates = []
    if not any(p.is_complex() for p in params):
        try:
            candidates.append(grad_of_grad(reference, params, v).curvature)
        except RuntimeError:  # torch has no second derivative
            pass
    candidates.append(central_differences(reference, params, v).curvature)
    return any(torch.allclose(found.curvature, c, rtol=1e-5, atol=1e-5) for c in candidates)  # type: ignore[arg-type]


def section() -> str:
    """The part of docs/coverage.md."""
    lines = ["| program | slope | exact curvature | remark |", "|---|---|---|---|"]
    for name, make in PROGRAMS.items():
        (slope, why), (curvature, why_not) = outcome(make, "none"), outcome(make, "hessian")
        remark = (why_not or why).replace("|", "\\|").replace("<", "&lt;")[:400]
        lines.append(f"| {name} | {slope} | {curvature} | {remark} |")
    meanings = "\n".join(f"- **{name}**: {meaning}." for name, meaning in OUTCOMES.items())
    return (
        "## Kinds of tensors and code\n\n"
        "What else a closure may hold, each a small program of `benchmarks/kinds.py` in double precision; by "
        "`python -m benchmarks.coverage --kinds`.\n\n" + meanings + "\n\n" + "\n".join(lines) + "\n"
    )
