"""Kinds of tensors and code that a closure may hold, each as a small program: carried, told or refused.

A part of `python -m benchmarks.coverage`; alone by `python -m benchmarks.coverage --kinds`, which renews that part of
docs/coverage.md. A program is its closure, its parameters and, where reverse mode takes another way or none, a
reference. Slopes are compared with reverse mode, curvatures with reverse over reverse, or with central differences
where torch has no second derivative or a wrong one.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

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
from jetplane.rules.rounding import Rounding
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
    tolerance: float = 1e-6  # of slopes, relative; curvatures have ten times that


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


# --- models in few bits ------------------------------------------------------------------------------------------


class Calibrated(nn.Module):
    """A layer between a norm, whose parameters move in double precision, and a smooth loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.x = layer, torch.randn(16, 64)
        self.gain, self.shift = (torch.rand(64).double() for _ in range(2))

    def forward(self, layer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        entering = (self.gain * self.x + self.shift).tanh().float()
        return ((layer or self.layer)(entering).double().sin() + 1).log1p().sum()


def _of_few_bits(
    name: str,
    change: Callable[[nn.Linear], Any],
    derivative: Rounding | None = None,
    weight: Callable[[Any], Tensor] = lambda layer: layer.weight.dequantize(),
) -> None:
    """A linear layer after ``change``, beside its dequantized ``weight`` in reverse mode."""

    @program(name)
    def _() -> Program:
        plain = nn.Linear(64, 16)
        bias = plain.bias.detach()
        layer = change(copy.deepcopy(plain)) or plain
        case = Calibrated(layer)

        def reference() -> Tensor:
            def dequantized(x: Tensor) -> Tensor:
                y = F.linear(x, weight(layer).float(), bias)
                if derivative == "exact":  # what the range multiplies
                    extent, y = x.amax().clamp_min(0) - x.amin().clamp_max(0), layer(x.detach())
                    return bias + (y - bias) * (extent / extent.detach())
                return y + (layer(x.detach()) - y).detach()

            return case(dequantized)

        def closure() -> Tensor:
            with contextlib.nullcontext() if derivative is None else jp.quantization(derivative):
                return case()

        return Program(closure, [case.gain, case.shift], reference, 1e-3)


def _dynamic(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    def change(layer: nn.Linear) -> nn.Module:
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype)
        return quantized[0]

    return change


def _torchao(name: str, **options: str) -> Callable[[nn.Linear], nn.Module]:
    def change(layer: nn.Linear) -> nn.Module:
        quantization = import_module("torchao.quantization")

        chosen = {n: getattr(torch, value) for n, value in options.items()}
        model = nn.Sequential(layer)
        quantization.quantize_(model, getattr(quantization, name)(**chosen))
        return model[0]

    return change


class Packed(nn.Module):
    """The operators that a compiler puts in the place of weight-only layers."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        w, most = layer.weight.detach(), 2 ** (bits - 1) - 1
        self.bits, self.bias = bits, layer.bias.detach()
        self.scale = w.abs().amax(1) / most
        n = (w / self.scale[:, None]).round().clamp(-most, most)
        self.weight = n * self.scale[:, None]
        if bits == 8:
            self.packed = n.to(torch.int8)
        else:
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((n + 8).to(torch.int32), 1)
            pairs = torch.stack([self.scale, torch.zeros_like(self.scale)], -1)
            self.pairs = pairs.expand(w.shape[1] // 32, *pairs.shape).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, self.packed, self.scale) + self.bias
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, 32, self.pairs) + self.bias


class Gguf(nn.Module):
    """A layer whose weight is dequantized in each forward pass, from the blocks of a GGUF file."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        gguf = import_module("gguf")
        self.dequantize = gguf.dequantize
        self.kind, self.bias = gguf.GGMLQuantizationType.Q8_0, layer.bias.detach()
        self.blocks = gguf.quantize(layer.weight.detach().numpy(), self.kind)

    @property
    def weight(self) -> Tensor:
        return torch.from_numpy(self.dequantize(self.blocks, self.kind))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _as_it_is(layer: Any) -> Tensor:
    return layer.weight


def _unpacked(layer: Any) -> Tensor:
    return layer.weight().dequantize()


DYNAMIC = "`quantize_dynamic`, int8 weights and activations"
_of_few_bits(f"{DYNAMIC}: nothing chosen", _dynamic(torch.qint8), weight=_unpacked)
_of_few_bits(f"{DYNAMIC}: straight through", _dynamic(torch.qint8), "straight-through", _unpacked)
_of_few_bits(f"{DYNAMIC}: exact", _dynamic(torch.qint8), "exact", _unpacked)
_of_few_bits("`quantize_dynamic`, float16 weights", _dynamic(torch.float16), weight=_unpacked)
_of_few_bits("`torch._weight_int8pack_mm`", lambda layer: Packed(layer, 8), weight=_as_it_is)
_of_few_bits("`torch._weight_int4pack_mm_for_cpu`", lambda layer: Packed(layer, 4), weight=_as_it_is)
_of_few_bits("torchao `Int8WeightOnlyConfig`", _torchao("Int8WeightOnlyConfig"))
_of_few_bits("torchao `IntxWeightOnlyConfig`, int4", _torchao("IntxWeightOnlyConfig", weight_dtype="int4"))
TORCHAO = "Int8DynamicActivationInt8WeightConfig"
_of_few_bits(f"torchao `{TORCHAO}`: nothing chosen", _torchao(TORCHAO))
_of_few_bits(f"torchao `{TORCHAO}`: straight through", _torchao(TORCHAO), "straight-through")
_of_few_bits(f"torchao `{TORCHAO}`: exact", _torchao(TORCHAO), "exact")
_of_few_bits("GGUF blocks, dequantized in the forward pass", Gguf, weight=_as_it_is)


def _rounded(name: str, derivative: Rounding | None, quantize: Callable[[Tensor], Tensor]) -> None:
    """A function that rounds to multiples of a half, from -4 to 3.5."""

    @program(name)
    def _() -> Program:
        w, x = torch.rand(64).double(), 3 * _random(16, 64)

        def passed(v: Tensor) -> Tensor:
            v = v * ((v / 0.5).round().clamp(-8, 7) == (v / 0.5).round())  # what is clamped stops
            return v + ((x * w / 0.5).round().clamp(-8, 7) * 0.5 - v).detach()

        def closure() -> Tensor:
            with contextlib.nullcontext() if derivative is None else jp.quantization(derivative):
                return (quantize(x * w).sin() * w).sum()

        def reference() -> Tensor:
            y = passed(x * w)
            return ((y if derivative == "straight-through" else y.detach()).sin() * w).sum()

        return Program(closure, [w], reference)


def _fake(v: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(v, 0.5, 0, -8, 7)


_rounded("`fake_quantize`: nothing chosen", None, _fake)
_rounded("`fake_quantize`: straight through", "straight-through", _fake)
_rounded("`fake_quantize`: exact", "exact", _fake)
ROUND = "`torch.round` and `clamp`"
_rounded(f"{ROUND}: straight through", "straight-through", lambda v: (v / 0.5).round().clamp(-8, 7) * 0.5)
_rounded(f"{ROUND}: nothing chosen, zero as in reverse mode", None, lambda v: (v / 0.5).round().clamp(-8, 7) * 0.5)


def _cast(v: Tensor) -> Tensor:
    """Rounded by integers alone: a cast rounds towards zero."""
    return (((v / 0.5).clamp(-8, 7) + 8.5).to(torch.uint8) - 8.0) * 0.5


_rounded("a cast to 8-bit integers: nothing chosen", None, _cast)
_rounded("a cast to 8-bit integers: straight through", "straight-through", _cast)
_rounded("a cast to 8-bit integers: exact", "exact", _cast)


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
        if not _right(found, reference, params, tangents, curvature, case.tolerance):
            return "WRONG", ""
    return ("told", said[0]) if said else ("carried", "")


def _right(
    found: jp.PlaneModel, reference: Closure, params: list[Tensor], v: list[Tensor], curvature: str, tolerance: float
) -> bool:
    for p in params:
        p.requires_grad_()
    gradient = torch.autograd.grad(reference(), params)
    slope = torch.stack([(g.conj() * t).real.flatten(1).sum(1) for g, t in zip(gradient, v, strict=True)]).sum(0)
    if not torch.allclose(found.slope, slope, rtol=tolerance, atol=tolerance / 100):
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
    return any(torch.allclose(found.curvature, c, rtol=10 * tolerance, atol=10 * tolerance) for c in candidates)  # type: ignore[arg-type]


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
