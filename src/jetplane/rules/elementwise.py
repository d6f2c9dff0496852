"""Elementwise operators: ``y_i = f' x_i`` and ``y_ij = f' x_ij + f'' x_i x_j``.

A line of `DERIVATIVES` gives, from the primal x and the result y, the pair (f', f''); None is a
derivative that is zero everywhere. Functions of several tensors give their gradient and Hessian.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..jets import (
    Derivatives,
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
from .registry import Rule, aten, declare, enter, operator, register

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)
LN2, LN10 = math.log(2), math.log(10)


def _fading(x: Tensor, d: Tensor) -> Tensor:
    """``x * d`` for d that vanishes where x is infinite."""
    return torch.where(d == 0, 0, x * d)


def _tan(x: Tensor, y: Tensor) -> Derivatives:
    d = 1 + y * y
    return d, 2 * y * d


def _tanh(x: Tensor, y: Tensor) -> Derivatives:
    d = 1 - y * y
    return d, -2 * y * d


def _sigmoid(x: Tensor, y: Tensor) -> Derivatives:
    d = y * (1 - y)
    return d, d * (1 - 2 * y)


def _log_sigmoid(x: Tensor, y: Tensor) -> Derivatives:
    s = torch.sigmoid(-x)
    return s, s * (s - 1)


def _silu(x: Tensor, y: Tensor) -> Derivatives:
    s = torch.sigmoid(x)
    d = s * (1 - s)
    return s + x * d, d * (2 + x * (1 - 2 * s))


def _mish(x: Tensor, y: Tensor) -> Derivatives:
    s, t = torch.sigmoid(x), torch.tanh(torch.nn.functional.softplus(x))
    u = 1 - t * t  # dt/dx = u s
    return t + x * s * u, 2 * s * u + x * u * s * (1 - s - 2 * t * s)


def _erf(x: Tensor, y: Tensor) -> Derivatives:
    d = TWO_OVER_SQRT_PI * torch.exp(-x * x)
    return d, -2 * _fading(x, d)


def _erfinv(x: Tensor, y: Tensor) -> Derivatives:
    d = torch.exp(y * y) / TWO_OVER_SQRT_PI
    return d, 2 * y * d * d


def _erfcx(x: Tensor, y: Tensor) -> Derivatives:
    d = 2 * x * y - TWO_OVER_SQRT_PI
    return d, 2 * y + 2 * x * d


def _asin(x: Tensor, y: Tensor) -> Derivatives:
    d = torch.rsqrt(1 - x * x)
    return d, x * d * d * d


def _acos(x: Tensor, y: Tensor) -> Derivatives:
    d, dd = _asin(x, y)
    assert d is not None and dd is not None
    return -d, -dd


def _atan(x: Tensor, y: Tensor) -> Derivatives:
    d = 1 / (1 + x * x)
    return d, -2 * _fading(x, d * d)


def _asinh(x: Tensor, y: Tensor) -> Derivatives:
    d = torch.rsqrt(1 + x * x)
    return d, -x * d * d * d


def _acosh(x: Tensor, y: Tensor) -> Derivatives:
    d = torch.rsqrt(x - 1) * torch.rsqrt(x + 1)
    return d, -x * d * d * d


def _atanh(x: Tensor, y: Tensor) -> Derivatives:
    d = 1 / (1 - x * x)
    return d, 2 * x * d * d


def _reciprocal(x: Tensor, y: Tensor) -> Derivatives:
    d = -y * y
    return d, -2 * y * d


def _sqrt(x: Tensor, y: Tensor) -> Derivatives:
    d = 0.5 / y
    return d, -0.5 * d / x


def _rsqrt(x: Tensor, y: Tensor) -> Derivatives:
    d = -0.5 * y / x
    return d, -1.5 * d / x


def _log(x: Tensor, y: Tensor) -> Derivatives:
    d = 1 / x
    return d, -d * d


def _log1p(x: Tensor, y: Tensor) -> Derivatives:
    d = 1 / (1 + x)
    return d, -d * d


def _scaled_log(base: float) -> Callable[[Tensor, Tensor], Derivatives]:
    def derivatives(x: Tensor, y: Tensor) -> Derivatives:
        d = 1 / (x * base)
        return d, -d / x

    return derivatives


def _exp2(x: Tensor, y: Tensor) -> Derivatives:
    return y * LN2, y * (LN2 * LN2)


def _logit(x: Tensor, y: Tensor, eps: float | None = None) -> Derivatives:
    d = 1 / (x * (1 - x))
    dd = d * d * (2 * x - 1)
    if eps is None:
        return d, dd
    inside = (x >= eps) & (x <= 1 - eps)
    return torch.where(inside, d, 0), torch.where(inside, dd, 0)


def _ndtr(x: Tensor, y: Tensor) -> Derivatives:
    d = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return d, -_fading(x, d)


def _ndtri(x: Tensor, y: Tensor) -> Derivatives:
    d = math.sqrt(2 * math.pi) * torch.exp(0.5 * y * y)
    return d, y * d * d


def _log_ndtr(x: Tensor, y: Tensor) -> Derivatives:
    d = TWO_OVER_SQRT_PI / math.sqrt(2) / torch.special.erfcx(-x / math.sqrt(2))
    return d, -_fading(x + d, d)


def _entr(x: Tensor, y: Tensor) -> Derivatives:
    return -torch.log(x) - 1, -1 / x


def _lgamma(x: Tensor, y: Tensor) -> Derivatives:
    return torch.digamma(x), torch.polygamma(1, x)


def _digamma(x: Tensor, y: Tensor) -> Derivatives:
    return torch.polygamma(1, x), torch.polygamma(2, x)


def _bessel(n: int, x: Tensor, y: Tensor, scaled: bool = False) -> Tensor:
    """``I_n(x) / x`` for n = 1 or 2 and y the numerator; near zero a power series, which can be differentiated there.

    ``I_n(x) = sum_k (x/2)^(2k + n) / (k! (k + n)!)``; after seven terms nothing is left at 0.1. ``scaled`` ones have
    the factor ``exp(-|x|)``.
    """
    near = x.abs() < 0.1
    small = torch.where(near, x, 0)
    series: Any = 0.0
    for k in reversed(range(7)):
        series = series * (small * small / 4) + 1 / (math.factorial(k) * math.factorial(k + n))
    series = series * (0.5 if n == 1 else small / 4)
    return torch.where(near, series * torch.exp(-small.abs()) if scaled else series, y / torch.where(near, 1, x))


def _i0(x: Tensor, y: Tensor) -> Derivatives:
    d = torch.special.i1(x)
    return d, y - _bessel(1, x, d)


def _i0e(x: Tensor, y: Tensor) -> Derivatives:
    i1e, sign = torch.special.i1e(x), torch.sgn(x)
    d = i1e - sign * y
    return d, y - _bessel(1, x, i1e, True) - sign * (i1e + d)


def _i1(x: Tensor, y: Tensor) -> Derivatives:
    ratio = _bessel(1, x, y)
    d = torch.special.i0(x) - ratio
    return d, y - _bessel(2, x, d - ratio)


def _i1e(x: Tensor, y: Tensor) -> Derivatives:
    ratio, sign = _bessel(1, x, y, True), torch.sgn(x)
    grown = torch.special.i0e(x) - ratio  # exp(-|x|) I_1'
    return grown - sign * y, 2 * y - _bessel(2, x, grown - ratio, True) - 2 * sign * grown


def _sinc(x: Tensor, y: Tensor) -> Derivatives:
    u = math.pi * x
    near = u.abs() < 1e-2  # the closed forms cancel there; the series are exact to 1e-16
    safe = torch.where(near, 1.0, u)
    d = torch.where(near, -u / 3 + u**3 / 30 - u**5 / 840, (safe.cos() - safe.sin() / safe) / safe)
    dd = torch.where(
        near,
        -1 / 3 + u**2 / 10 - u**4 / 168,
        -safe.sin() / safe - 2 * (safe.cos() - safe.sin() / safe) / safe**2,
    )
    return math.pi * d, math.pi**2 * dd


def _gelu(x: Tensor, y: Tensor, approximate: str = "none") -> Derivatives:
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, density * (2 - x * x)
    square = x * x
    t = torch.tanh(SQRT_2_OVER_PI * x * (1 + 0.044715 * square))
    u1 = SQRT_2_OVER_PI * (1 + 0.134145 * square)  # derivative of tanh's argument
    slope = u1 * (1 - t * t)
    curve = (1 - t * t) * (SQRT_2_OVER_PI * 0.26829 * x) - 2 * t * u1 * slope
    return 0.5 * (1 + t + x * slope), slope + 0.5 * x * curve


def _elu(x: Tensor, y: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Derivatives:
    e = (alpha * scale * input_scale) * torch.exp(x * input_scale)
    return torch.where(x > 0, scale, e).to(x.dtype), torch.where(x > 0, 0, e * input_scale).to(x.dtype)


def _celu(x: Tensor, y: Tensor, alpha: Any = 1.0) -> Derivatives:
    return _elu(x, y, alpha, 1, 1 / alpha)


def _selu(x: Tensor, y: Tensor) -> Derivatives:
    return _elu(x, y, 1.6732632423543772, 1.0507009873554805)


def _softplus(x: Tensor, y: Tensor, beta: Any = 1, threshold: Any = 20) -> Derivatives:
    s = torch.sigmoid(x * beta)
    linear_part = x * beta > threshold
    return torch.where(linear_part, 1, s).to(x.dtype), torch.where(linear_part, 0, beta * s * (1 - s)).to(x.dtype)


def _mask(condition: Tensor, x: Tensor) -> Derivatives:
    """A derivative that is one or zero: coefficients are selected, not multiplied."""
    return condition, None


def _leaky_relu(x: Tensor, y: Tensor, negative_slope: Any = 0.01) -> Derivatives:
    return torch.where(x > 0, 1.0, negative_slope).to(x.dtype), None


def _hardtanh(x: Tensor, y: Tensor, low: Any = -1, high: Any = 1) -> Derivatives:
    return _mask((x > low) & (x < high), x)


def _clamp(x: Tensor, y: Tensor, low: Any = None, high: Any = None) -> Derivatives:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    return _mask(inside, x)


def _hardswish(x: Tensor, y: Tensor) -> Derivatives:
    inside = (x > -3) & (x < 3)
    d = torch.where(inside, x / 3 + 0.5, (x >= 3).to(x.dtype))
    return d, torch.where(inside, 1 / 3, 0.0).to(x.dtype)


def _power(x: Tensor, y: Tensor, exponent: Any) -> Derivatives:
    if exponent == 0:
        return None, None
    if exponent == 1:
        return torch.ones_like(x), None
    if exponent == 2:
        return 2 * x, torch.full_like(x, 2)
    return exponent * x ** (exponent - 1), (exponent * (exponent - 1)) * x ** (exponent - 2)


def _exponential(x: Tensor, y: Tensor, base: Any) -> Derivatives:
    """Base to the power x."""
    log = torch.log(torch.as_tensor(base, dtype=y.dtype, device=y.device))
    log = torch.where(log.isinf(), 0, log) if not y.is_complex() else log
    return y * log, y * log * log


def _threshold(x: Tensor, y: Tensor, threshold: Any, value: Any) -> Derivatives:
    return _mask(x > threshold, x)


def _zeros(x: Tensor, y: Tensor, *args: Any) -> Derivatives:
    return None, None


def _round(x: Tensor, y: Tensor) -> Derivatives:
    return (torch.ones_like(x) if rounding.chosen() == "straight-through" else None), None


DERIVATIVES: dict[str, Callable[..., Derivatives]] = {
    "neg": lambda x, y: (torch.full_like(x, -1), None),
    "abs": lambda x, y: (torch.sgn(x), None),
    "exp": lambda x, y: (y, y),
    "exp2": _exp2,
    "expm1": lambda x, y: (y + 1, y + 1),
    "log": _log,
    "log1p": _log1p,
    "log2": _scaled_log(LN2),
    "log10": _scaled_log(LN10),
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "square": lambda x, y: (2 * x, torch.full_like(x, 2)),
    "sin": lambda x, y: (torch.cos(x), -y),
    "cos": lambda x, y: (-torch.sin(x), -y),
    "tan": _tan,
    "sinh": lambda x, y: (torch.cosh(x), y),
    "cosh": lambda x, y: (torch.sinh(x), y),
    "tanh": _tanh,
    "asin": _asin,
    "acos": _acos,
    "atan": _atan,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "sinc": _sinc,
    "sigmoid": _sigmoid,
    "log_sigmoid": _log_sigmoid,
    "logit": _logit,
    "erf": _erf,
    "erfc": lambda x, y: tuple(-d for d in _erf(x, y)),  # type: ignore[operator,return-value]
    "erfinv": _erfinv,
    "special_erfcx": _erfcx,
    "special_ndtri": _ndtri,
    "special_log_ndtr": _log_ndtr,
    "special_entr": _entr,
    "special_ndtr": _ndtr,
    "lgamma": _lgamma,
    "digamma": _digamma,
    "i0": _i0,
    "special_i0e": _i0e,
    "special_i1": _i1,
    "special_i1e": _i1e,
    "relu6": lambda x, y: _mask((x > 0) & (x < 6), x),
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "clamp": _clamp,
    "clamp_min": lambda x, y, low: _clamp(x, y, low),
    "clamp_max": lambda x, y, high: _clamp(x, y, None, high),
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "softplus": _softplus,
    "silu": _silu,
    "mish": _mish,
    "gelu": _gelu,
    "hardswish": _hardswish,
    "hardsigmoid": lambda x, y: (torch.where((x > -3) & (x < 3), 1 / 6, 0.0).to(x.dtype), None),
    "hardshrink": lambda x, y, lambd=0.5: _mask((x < -lambd) | (x > lambd), x),
    "softshrink": lambda x, y, lambd=0.5: _mask((x < -lambd) | (x > lambd), x),
    "pow.Tensor_Scalar": _power,
    "deg2rad": lambda x, y: (torch.full_like(x, math.pi / 180), None),
    "rad2deg": lambda x, y: (torch.full_like(x, 180 / math.pi), None),
    "frac": lambda x, y: (torch.ones_like(x), None),
    "fmod.Scalar": lambda x, y, other: (torch.ones_like(x), None),
    "remainder.Scalar": lambda x, y, other: (torch.ones_like(x), None),
    "nan_to_num": lambda x, y, *a: _mask(torch.isfinite(x), x),
    # flat almost everywhere
    "floor": _round,
    "ceil": _round,
    "round": _round,
    "round.decimals": lambda x, y, decimals=0: _round(x, y),
    "trunc": _round,
    "sign": _zeros,
    "heaviside": _zeros,
}

# The product c f'(x) in one pass, by torch's kernels for reverse mode: where there are first coefficients alone. For
# real c, x and y of one shape.
SLOPES: dict[str, Callable[..., Tensor]] = {
    "tanh": lambda c, x, y: aten.tanh_backward(c, y),
    "sigmoid": lambda c, x, y: aten.sigmoid_backward(c, y),
    "silu": lambda c, x, y: aten.silu_backward(c, x),
    "gelu": lambda c, x, y, approximate="none": aten.gelu_backward(c, x, approximate=approximate),
    "elu": lambda c, x, y, alpha=1, scale=1, input_scale=1: aten.elu_backward(c, alpha, scale, input_scale, False, x),
    "softplus": lambda c, x, y, beta=1, threshold=20: aten.softplus_backward(c, x, beta, threshold),
}

# Functions whose derivatives are infinite or undefined somewhere, at infinity too.
SINGULAR = {
    "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "square", "pow.Tensor_Scalar",
    "tan", "asin", "acos", "atan", "asinh", "acosh", "atanh", "sinc", "logit", "erf", "erfc", "erfinv",
    "special_erfcx", "special_entr", "special_ndtr", "special_ndtri", "special_log_ndtr",
    "lgamma", "digamma", "i0", "special_i0e", "special_i1", "special_i1e",
}  # fmt: skip


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
        return chain(space, x, torch.relu(p), *_mask(p > 0, p))

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
    return chain(space, x, y, *_exponential(p, y, base))


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
