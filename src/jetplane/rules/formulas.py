"""Derivatives of elementwise functions of one variable, by the names of torch's operators.

A line of `DERIVATIVES` gives, from the primal x and the result y, the pair (f', f''); None is a derivative that is zero
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..jets import Derivatives
from . import rounding
from .registry import aten

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


def selected(condition: Tensor, x: Tensor) -> Derivatives:
    """A derivative that is one or zero: coefficients are selected, not multiplied."""
    return condition, None


def _leaky_relu(x: Tensor, y: Tensor, negative_slope: Any = 0.01) -> Derivatives:
    return torch.where(x > 0, 1.0, negative_slope).to(x.dtype), None


def _hardtanh(x: Tensor, y: Tensor, low: Any = -1, high: Any = 1) -> Derivatives:
    return selected((x > low) & (x < high), x)


def _clamp(x: Tensor, y: Tensor, low: Any = None, high: Any = None) -> Derivatives:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    return selected(inside, x)


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


def exponential(x: Tensor, y: Tensor, base: Any) -> Derivatives:
    """Base to the power x."""
    log = torch.log(torch.as_tensor(base, dtype=y.dtype, device=y.device))
    log = torch.where(log.isinf(), 0, log) if not y.is_complex() else log
    return y * log, y * log * log


def _threshold(x: Tensor, y: Tensor, threshold: Any, value: Any) -> Derivatives:
    return selected(x > threshold, x)


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
    "relu6": lambda x, y: selected((x > 0) & (x < 6), x),
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
    "hardshrink": lambda x, y, lambd=0.5: selected((x < -lambd) | (x > lambd), x),
    "softshrink": lambda x, y, lambd=0.5: selected((x < -lambd) | (x > lambd), x),
    "pow.Tensor_Scalar": _power,
    "deg2rad": lambda x, y: (torch.full_like(x, math.pi / 180), None),
    "rad2deg": lambda x, y: (torch.full_like(x, 180 / math.pi), None),
    "frac": lambda x, y: (torch.ones_like(x), None),
    "fmod.Scalar": lambda x, y, other: (torch.ones_like(x), None),
    "remainder.Scalar": lambda x, y, other: (torch.ones_like(x), None),
    "nan_to_num": lambda x, y, *a: selected(torch.isfinite(x), x),
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
