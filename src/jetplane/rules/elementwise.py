"""Elementwise operators: ``y_i = f' x_i`` and ``y_ij = f' x_ij + f'' x_i x_j``.

Of one variable by `formulas`; functions of several tensors give their gradient and Hessian.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..jets import (
    Space,
    add_jets,
    carried,
    chain,
    chain_many,
    elementwise,
    expand,
    jointly,
    linear,
    make,
    multiply,
    parts,
    primal,
)
from . import rounding
from .formulas import DERIVATIVES, LN2, SINGULAR, SLOPES, exponential, selected
from .registry import Rule, aten, declare, enter, operator, register


def _unary(name: str) -> Rule:
    derivatives, slope, packet = DERIVATIVES[name], SLOPES.get(name), name.partition(".")[0]
    op: Any = operator(name)
    singular = name in SINGULAR

    def rule(space: Space, x: Any, *args: Any, **kwargs: Any) -> Any:
        p = primal(x, space)
        args = tuple(primal(a, space) for a in args)
        if packet == "abs" and p.is_complex():  # which is not holomorphic: the chain rule does not hold
            return torch.linalg.vector_norm(torch.view_as_real(x.resolve_conj()), dim=-1)
        return elementwise(
            space,
            x,
            op(p, *args, **kwargs),
            lambda p, y: derivatives(p, y, *args, **kwargs),
            None if slope is None else functools.partial(_slope, slope, args, kwargs),
            blocks=not any(isinstance(a, Tensor) for a in args),
            singular=singular,
        )

    return rule


def _slope(slope: Callable[..., Tensor], args: Any, kwargs: Any, c: Tensor, p: Tensor, y: Tensor) -> Tensor:
    return slope(c, p, y, *args, **kwargs)


for _name in DERIVATIVES:
    declare(_name, lambda op, name=_name: _unary(name))


@register("angle")
def _(space: Space, z: Any) -> Tensor:
    """Of a real number zero or pi, which does not move."""
    p = primal(z, space)
    return torch.atan2(z.imag, z.real) if p.is_complex() else torch.angle(p)


@register("relu")
def _(space: Space, x: Any) -> Tensor:
    p, x1, x2 = parts(x, space)
    if p.dtype != carried(p.dtype) or x1.sparse is not None:
        return chain(space, x, torch.relu(p), *selected(p > 0, p))

    def kernel(c: Tensor, out: Tensor) -> Tensor:  # one pass, no mask in memory
        return aten.threshold_backward.grad_input(c, p, 0, grad_input=out)

    def otherwise(c: Tensor) -> Tensor:
        return aten.threshold_backward(c, p, 0)

    y1, y2 = (c.written(p.shape, kernel, otherwise, p) for c in (x1, x2))
    return make(torch.relu(p), y1, y2, space)


@register("pow.Scalar")
def _(space: Space, base: Any, x: Any) -> Tensor:
    p = primal(x, space)
    y = torch.pow(base, p)
    return chain(space, x, y, *exponential(p, y, base))


@register("polygamma")
def _(space: Space, n: int, x: Any) -> Tensor:
    p = primal(x, space)
    return chain(space, x, torch.polygamma(n, p), torch.polygamma(n + 1, p), torch.polygamma(n + 2, p))


@register("special_polygamma")
def _(space: Space, n: int, x: Any) -> Tensor:
    return torch.polygamma(n, x)


# --- sums and products --------------------------------------------------------------------


@register("add.Tensor", "add.Scalar")
def _(space: Space, a: Any, b: Any, *scalar_alpha: Any, alpha: Any = 1) -> Tensor:
    alpha = scalar_alpha[0] if scalar_alpha else alpha
    y = torch.add(primal(a, space), primal(b, space), alpha=alpha)
    return add_jets(space, a, b, y, alpha)


@register("sub.Tensor", "sub.Scalar")
def _(space: Space, a: Any, b: Any, *scalar_alpha: Any, alpha: Any = 1) -> Tensor:
    alpha = scalar_alpha[0] if scalar_alpha else alpha
    y = torch.sub(primal(a, space), primal(b, space), alpha=alpha)
    return add_jets(space, a, b, y, -alpha)


@register("rsub.Tensor", "rsub.Scalar")
def _(space: Space, a: Any, b: Any, *scalar_alpha: Any, alpha: Any = 1) -> Tensor:
    alpha = scalar_alpha[0] if scalar_alpha else alpha
    return aten.add.Tensor(aten.mul.Scalar(a, -alpha), b) if alpha != 1 else aten.add.Tensor(aten.neg(a), b)


@register("mul.Tensor", "mul.Scalar")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return multiply(space, a, b)


@register("div.Tensor", "div.Scalar")
def _(space: Space, a: Any, b: Any) -> Tensor:
    y = torch.div(primal(a, space), primal(b, space))
    divisor, b1, b2 = parts(b, space)
    if b1 or b2:
        return make(y, *parts(multiply(space, a, torch.reciprocal(b)), space)[1:], space)
    _, a1, a2 = parts(a, space)
    return make(y, a1 / divisor, a2 / divisor, space)


@register("div.Tensor_mode", "div.Scalar_mode")
def _(space: Space, a: Any, b: Any, *, rounding_mode: str | None) -> Tensor:
    if rounding_mode is None:
        return torch.div(a, b)
    return _rounded(space, torch.div(primal(a, space), primal(b, space), rounding_mode=rounding_mode), a, b)


@register("floor_divide", "floor_divide.Scalar")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return _rounded(space, torch.floor_divide(primal(a, space), primal(b, space)), a, b)


def _rounded(space: Space, y: Tensor, a: Any, b: Any) -> Tensor:
    """A quotient that has been rounded to y."""
    if rounding.chosen() != "straight-through":
        return y
    _, first, second = parts(torch.div(a, b), space)
    return make(y, first, second, space)


@register("addcmul")
def _(space: Space, x: Any, a: Any, b: Any, *, value: Any = 1) -> Tensor:
    return torch.add(x, torch.mul(a, b), alpha=value)


@register("addcdiv")
def _(space: Space, x: Any, a: Any, b: Any, *, value: Any = 1) -> Tensor:
    return torch.add(x, torch.div(a, b), alpha=value)


@register("lerp.Scalar", "lerp.Tensor")
def _(space: Space, start: Any, end: Any, weight: Any) -> Tensor:
    return torch.add(start, torch.mul(torch.sub(end, start), weight))


@register("complex")
def _(space: Space, real: Any, imag: Any) -> Tensor:
    pr, r1, r2 = parts(real, space)
    pi, i1, i2 = parts(imag, space)
    y = torch.complex(pr, pi)
    first, second = (re.to(y.dtype) + im * 1j for re, im in ((r1, i1), (r2, i2)))
    return make(y, first, second, space)


@register("polar")
def _(space: Space, magnitude: Any, angle: Any) -> Tensor:
    return torch.complex(torch.mul(magnitude, torch.cos(angle)), torch.mul(magnitude, torch.sin(angle)))


@register("nextafter")
def _(space: Space, a: Any, b: Any) -> Tensor:
    y, a1, a2 = torch.nextafter(primal(a, space), primal(b, space)), *parts(a, space)[1:]
    apart = primal(a, space) != primal(b, space)  # where they are equal, torch's derivative is zero

    def kept(c: Tensor) -> Tensor:
        return torch.where(apart, expand(c, y.shape), 0)

    return make(y, a1.map(kept), a2.map(kept), space)


# --- functions of two tensors --------------------------------------------------------------


@register("pow.Tensor_Tensor")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, e = primal(a, space), primal(b, space)
    y = torch.pow(x, e)
    log = torch.where((x == 0) & (e >= 0), 0, torch.log(x)) if not y.is_complex() else torch.log(x)
    x1 = torch.where(e == 0, 0, e * torch.pow(x, torch.where(e == 0, 1, e) - 1))  # one branch must not spoil a graph
    flat = (e == 0) | (e == 1)
    xx = torch.where(flat, 0, e * (e - 1) * torch.pow(x, torch.where(flat, 2, e) - 2))
    mixed = torch.where(e == 0, torch.reciprocal(x), torch.pow(x, e - 1) * (1 + e * log))
    return chain_many(space, (a, b), y, (x1, y * log), {(0, 0): xx, (0, 1): mixed, (1, 1): y * log * log})


@register("atan2")
def _(space: Space, a: Any, b: Any) -> Tensor:
    y, x = primal(a, space), primal(b, space)
    n = y * y + x * x
    n = torch.where(n == 0, torch.inf, n)  # as torch: no derivatives at the origin
    u, v = x / n, y / n
    hessian = {(0, 0): -2 * u * v, (0, 1): v * v - u * u, (1, 1): 2 * u * v}
    return chain_many(space, (a, b), torch.atan2(y, x), (u, -v), hessian)


@register("hypot")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    r = torch.hypot(x, y)
    u, v = x / r, y / r
    hessian = {(0, 0): v * v / r, (0, 1): -u * v / r, (1, 1): u * u / r}
    return chain_many(space, (a, b), r, (u, v), hessian)


@register("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    dtype = torch.result_type(x, y)
    x, y = (t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=dtype) for t in (x, y))
    masked = (x == 0) & (y <= 0)  # autograd's convention: 0 log 0 stays 0 under derivatives
    gradient = torch.where(masked, 0, torch.log(y)), x / y
    return chain_many(space, (a, b), torch.xlogy(x, y), gradient, {(0, 1): 1 / y, (1, 1): -x / (y * y)})


@register("special_xlog1py", "special_xlog1py.other_scalar", "special_xlog1py.self_scalar")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    dtype = torch.result_type(x, y)
    x, y = (t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=dtype) for t in (x, y))
    d = 1 / (1 + y)
    masked = (x == 0) & (y <= -1)
    gradient = torch.where(masked, 0, torch.log1p(y)), x * d
    return chain_many(space, (a, b), torch.special.xlog1py(x, y), gradient, {(0, 1): d, (1, 1): -x * d * d})


@register("logaddexp")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    z = torch.logaddexp(x, y)
    p, q = torch.sigmoid(x - y), torch.sigmoid(y - x)  # x - z would round the logarithm of p away
    pq = p * q
    return chain_many(space, (a, b), z, (p, q), {(0, 0): pq, (0, 1): -pq, (1, 1): pq})


@register("logaddexp2")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    z = torch.logaddexp2(x, y)
    p, q = torch.sigmoid(LN2 * (x - y)), torch.sigmoid(LN2 * (y - x))
    pq = LN2 * p * q
    return chain_many(space, (a, b), z, (p, q), {(0, 0): pq, (0, 1): -pq, (1, 1): pq})


def _modulo(op: Any, rounding: str) -> None:

    def rule(space: Space, a: Any, b: Any) -> Tensor:
        x, y = primal(a, space), primal(b, space)
        return chain_many(space, (a, b), op(x, y), (torch.ones_like(x), -torch.div(x, y, rounding_mode=rounding)), {})

    enter(op, rule)


_modulo(aten.fmod.Tensor, "trunc")
_modulo(aten.remainder.Tensor, "floor")


@register("frexp.Tensor")
def _(space: Space, a: Any) -> Any:
    mantissa, exponent = torch.frexp(primal(a, space))
    return linear(space, a, lambda _: mantissa, lambda c: torch.ldexp(c, -exponent)), exponent


@register("copysign.Tensor", "copysign.Scalar")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, a1, a2 = parts(a, space)
    y = torch.copysign(x, primal(b, space))
    ratio = torch.where(x == 0, 0, y / x)
    return make(y, a1 * ratio, a2 * ratio, space)


def _sharing(space: Space, a: Any, b: Any, y: Tensor, ahead: Tensor, ties: Tensor) -> Tensor:
    """The first where it is ahead, the second elsewhere, and the mean where there are ties."""
    left = torch.where(ties, 0.5, ahead.to(carried(y.dtype)))
    return chain_many(space, (a, b), y, (left, 1 - left), {})


@register("maximum")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    return _sharing(space, a, b, torch.maximum(x, y), x > y, x == y)


@register("minimum")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    return _sharing(space, a, b, torch.minimum(x, y), x < y, x == y)


@register("fmax")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    jets = torch.where((x >= y) | y.isnan(), a, b)  # of what is not a number nothing is kept
    return make(torch.fmax(x, y), *parts(jets, space)[1:], space)


@register("fmin")
def _(space: Space, a: Any, b: Any) -> Tensor:
    x, y = primal(a, space), primal(b, space)
    jets = torch.where((x <= y) | y.isnan(), a, b)
    return make(torch.fmin(x, y), *parts(jets, space)[1:], space)


@register("clamp.Tensor", "clamp_min.Tensor")
def _(space: Space, x: Any, low: Any = None, high: Any = None) -> Tensor:
    return _clamped(space, x, low, high)


@register("clamp_max.Tensor")
def _(space: Space, x: Any, high: Any) -> Tensor:
    return _clamped(space, x, None, high)


def _clamped(space: Space, x: Any, low: Any, high: Any) -> Tensor:
    p = primal(x, space)
    y = torch.clamp(p, primal(low, space), primal(high, space))
    bounds = [(b, primal(b, space)) for b in (low, high)]
    below = torch.zeros_like(y, dtype=torch.bool) if low is None else p < bounds[0][1]
    above = torch.zeros_like(y, dtype=torch.bool) if high is None else p > bounds[1][1]
    inside = ~(below | above)
    if low is not None and high is not None:  # as torch: bounds in the wrong order give the upper one,
        above = above | (bounds[0][1] > bounds[1][1])
        below = below & (bounds[0][1] < bounds[1][1])  # and equal ones no derivative below them
        inside = inside & ~above
    xs, gradient = [x], [inside.to(y.dtype)]
    for bound, hit in ((low, below), (high, above)):
        if bound is not None:
            xs.append(bound)
            gradient.append(hit.to(y.dtype))
    return chain_many(space, xs, y, gradient, {})


@register("prelu", "_prelu_kernel")
def _(space: Space, x: Any, weight: Any) -> Tensor:
    p = primal(x, space)
    shape = [1] * p.dim()
    if p.dim() > 1 and weight.dim() == 1:
        shape[1] = -1
        weight = weight.reshape(shape)
    elif p.dim() == weight.dim() + 1:
        weight = weight.reshape(shape)
    positive = p > 0
    return torch.where(positive, x, torch.mul(x, weight))


@register("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _(space: Space, condition: Tensor, a: Any, b: Any) -> Tensor:
    condition = primal(condition, space)
    y = torch.where(condition, primal(a, space), primal(b, space))
    if any(parts(t, space)[1].sparse is not None for t in (a, b)):
        from_a = condition.expand(y.shape)
        return add_jets(space, chain(space, a, y, from_a, None), chain(space, b, y, ~from_a, None), y)

    def chosen(ca: Tensor, cb: Tensor) -> Tensor:
        return torch.where(condition, expand(ca, y.shape), expand(cb, y.shape))

    return jointly(space, (a, b), y, chosen)


@register("masked_fill.Scalar", "masked_fill.Tensor")
def _(space: Space, x: Any, mask: Tensor, value: Any) -> Tensor:
    return torch.where(primal(mask, space), value, x)


@register("glu")
def _(space: Space, x: Any, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return torch.mul(a, torch.sigmoid(b))


@register("rrelu")
def _(
    space: Space,
    x: Any,
    lower: Any = 1 / 8,
    upper: Any = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    p = primal(x, space)
    noise = torch.empty_like(p)
    y = aten.rrelu_with_noise(p, noise, lower, upper, training, generator)
    leak = noise if training else (lower + upper) / 2
    return chain(space, x, y, torch.where(p > 0, 1.0, leak).to(p.dtype), None, singular=False)
