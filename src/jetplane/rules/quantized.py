"""Models in few bits: layers with quantized weights, and operators that quantize values.

Weights in int8 or int4 beside values in floating point are constants: a layer is linear in its input, exactly, and
bilinear in its input and its scales. Operators that round values which depend on the parameters have the derivative
that the user chose (`jetplane.rules.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DerivativeError
from ..jets import Jet, Space, is_jet, linear, make, parts, primal
from . import rounding
from .forms import Form
from .products import bilinear
from .registry import Rule, declare, enter

# --- weights in few bits, values in floating point ----------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Packed(Form):
    """``x @ W^T`` for weights ``W = scales * n``, with the integers n packed as an operator wants them.

    It is bilinear in x and the scales: for int4, in x and the pairs of scale and zero.
    """

    op: Any
    arguments: tuple[Any, ...]  # between x and the scales

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.op(a.contiguous(), *self.arguments, b.to(a.dtype))

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """All rows in one product."""
        return self(a.flatten(0, 1), b).unflatten(0, a.shape[:2])


def _packed(op: Any) -> Rule:
    def rule(space: Space, x: Any, *args: Any) -> Tensor:
        *integers, scales = args
        return bilinear(space, _Packed(op, tuple(integers)), x, scales)

    return rule


declare("_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu", _packed)


# --- layers that quantize what enters them ----------------------------------------------------------------------------


def _dynamic(name: str, unpack: Callable[[Any], tuple[Tensor, Tensor | None]], rounds: bool) -> Rule:
    """A layer of `torch.ao.quantization.quantize_dynamic`: ``q(x) @ W^T + b`` with q made of the range of x."""
    op = getattr(torch.ops.quantized, name).default

    def rule(space: Space, x: Any, packed: Any, *args: Any) -> Tensor:
        def layer(p: Tensor) -> Tensor:
            return op(p, packed, *args)

        weight, bias = unpack(packed)
        if not rounds or rounding.straight_through(op):
            return linear(space, x, layer, lambda c: F.linear(c, weight.to(c.dtype)))
        return _as_range(space, layer(primal(x, space)), bias, x)

    return rule


def _as_range(space: Space, y: Tensor, bias: Tensor | None, x: Any) -> Tensor:
    """The layer's value y, whose product moves in proportion to the range of x: the integers stay."""
    extent = torch.sub(x.amax().clamp_min(0), x.amin().clamp_max(0))  # times 1/255 or 1/127 the scale of x
    product = y if bias is None else y - bias
    _, first, second = parts(torch.mul(product, torch.div(extent, primal(extent, space))), space)
    return make(y, first, second, space)


def _with_relu(rule: Rule) -> Rule:
    return lambda space, *args: torch.relu(rule(space, *args))


def _unpacked(packed: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = torch.ops.quantized.linear_unpack(packed)
    return weight.dequantize(), bias


def _enter_dynamic(suffix: str, unpack: Callable[[Any], tuple[Tensor, Tensor | None]], rounds: bool) -> None:
    if hasattr(torch.ops.quantized, f"linear_{suffix}"):  # torch means to leave them to torchao
        rule = _dynamic(f"linear_{suffix}", unpack, rounds)
        enter(getattr(torch.ops.quantized, f"linear_{suffix}").default, rule)
        enter(getattr(torch.ops.quantized, f"linear_relu_{suffix}").default, _with_relu(rule))


_enter_dynamic("dynamic", _unpacked, True)
_enter_dynamic("dynamic_fp16", lambda packed: torch.ops.quantized.linear_unpack_fp16(packed), False)


# --- torchao: weights that are tensors of a class of their own -----------------------------------------------------

# What says of a weight that its layer quantizes what enters it.
ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")


def quantizes_input(func: Any, args: Sequence[Any]) -> bool:
    """Whether a torch function takes a tensor that depends on the parameters, and a weight that has it quantized."""
    if len(args) < 2 or not isinstance(args[0], Jet) or type(args[1]) is Tensor or not isinstance(args[1], Tensor):
        return False
    return any(getattr(args[1], name, None) for name in ACTIVATIONS)


def layer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Such a layer: the weight's class computes the value, and derivatives pass straight through.

    Raises:
        DerivativeError: something else is chosen, or nothing, or it is another function than a linear layer.
    """
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    kind = type(weight).__name__
    if func is not F.linear:
        raise DerivativeError(
            f"{func.__name__} with a weight of class {kind}, which quantizes its input: linear layers alone are carried"
        )
    if not rounding.straight_through(f"linear with a weight of class {kind}"):
        raise DerivativeError(
            f"linear with a weight of class {kind}, which takes the range of its input under torch.no_grad(): carried "
            "with jetplane.quantization('straight-through') alone"
        )
    y = linear(x.space, x, lambda p: func(p, weight), lambda c: F.linear(c, weight.dequantize().to(c.dtype)))
    return y if bias is None else torch.add(y, bias)


# --- fake quantization ---------------------------------------------------------------------------------------------


def _quantized(
    space: Space, op: Any, y: Tensor, x: Any, scale: Any, zero: Any, low: int, high: int, axis: int | None = None
) -> Tensor:
    """``q(x)`` of `jetplane.quantization`, with the value y that an operator gave."""
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    if rounding.straight_through(op):
        zero = torch.round(zero) if isinstance(zero, Tensor) else zero
        integer = torch.clamp(torch.add(torch.round(torch.div(x, scale)), zero), low, high)
        found = torch.mul(torch.sub(integer, zero), scale)
    elif is_jet(scale, space):
        found = torch.mul(torch.div(y, primal(scale, space)), scale)
    else:
        return y
    _, first, second = parts(found, space)
    return make(y, first, second, space)


def _fake(op: Any) -> Rule:
    """Fake quantization; arguments are taken by their names, of which operators have several sets."""
    names = [argument.name for argument in op._schema.arguments]

    def rule(space: Space, *args: Any, **kwargs: Any) -> Any:
        given = {a.name: a.default_value for a in op._schema.arguments} | dict(zip(names, args, strict=False)) | kwargs
        x, scale, zero = (given[name] for name in ("self", "scale", "zero_point"))
        rounding.straight_through(op)  # before anything is written
        result = op(**{name: primal(value, space) for name, value in given.items()})
        if any(bool(given.get(name, 1) == 0) for name in ("fake_quant_on", "fake_quant_enabled")):
            y = x
        else:
            if "grad_factor" in given:
                scale, zero = (_weighted(space, t, given["grad_factor"]) for t in (scale, zero))
            axis = given["ch_axis"] if given.get("per_row_fake_quant") else given.get("axis")
            y = result[0] if isinstance(result, tuple) else result
            y = _quantized(space, op, y, x, scale, zero, given["quant_min"], given["quant_max"], axis)
        return (y, *result[1:]) if isinstance(result, tuple) else y

    return rule


def _weighted(space: Space, x: Any, factor: float) -> Any:
    """X with its derivatives times a factor, as torch does it for a learnable scale."""
    return linear(space, x, lambda p: p, lambda c: factor * c) if is_jet(x, space) and factor != 1 else x


declare(
    "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine.tensor_qparams fake_quantize_per_channel_affine "
    "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
    "_fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine "
    "fused_moving_avg_obs_fake_quant _fused_moving_avg_obs_fq_helper",
    _fake,
)
