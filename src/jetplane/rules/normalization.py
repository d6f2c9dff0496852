"""Softmax and the normalizations, with their reductions written out at the coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from ..jets import (
    Coefficients,
    Space,
    absent,
    chain,
    innermost,
    is_jet,
    linear,
    make,
    multiply,
    outer,
    parts,
    precise,
    primal,
    symmetric,
    writable,
)
from .registry import aten, register
from .structure import up

# --- softmax: with y the result and a_i = x_i - sum(y x_i) ------------------------------------


def _minus_mean(c: Coefficients, y: Tensor, dim: int) -> Coefficients:
    """``c - sum(y c)`` along a dimension of the stack, in place where c is the rule's own."""
    mean = (c * y).map(lambda s: s.sum(dim, keepdim=True), True)
    return c.add(mean, -1)


@register("softmax.int", "_softmax", "special_softmax")
def _(space: Space, x: Any, dim: int, dtype: Any = None) -> Tensor:
    if isinstance(dtype, torch.dtype):
        x = x.to(dtype)
    p, x1, x2 = parts(x, space)
    if p.dim() == 0:
        return torch.ones_like(p)
    y, d = torch.softmax(precise(p), dim), up(dim)
    if space.order == 1 and not x2:

        def kernel(c: Tensor, out: Tensor) -> Any:
            # The Jacobian is symmetric, so that what reverse mode multiplies by serves forward mode.
            return aten._softmax_backward_data.out(c, y, dim, y.dtype, grad_input=out)

        y1 = x1.each(y.shape, kernel, lambda c: y * (c - (c * y).sum(d, keepdim=True)), y)
        return make(y.to(p.dtype), y1, absent(space, 2), space)
    a = _minus_mean(x1, y, d)
    t = outer(a, a)
    t += x2
    t = _minus_mean(t, y, d)
    t *= y
    return make(y.to(p.dtype), a * y, t, space)


@register("log_softmax.int", "_log_softmax", "special_log_softmax")
def _(space: Space, x: Any, dim: int, dtype: Any = None) -> Tensor:
    if isinstance(dtype, torch.dtype):
        x = x.to(dtype)
    p, x1, x2 = parts(x, space)
    if p.dim() == 0:
        return torch.zeros_like(p)
    z = torch.log_softmax(precise(p), dim)
    y, d = torch.exp(z), up(dim)

    def total(c: Tensor) -> Tensor:
        return c.sum(d, keepdim=True)

    a = _minus_mean(x1, y, d)
    mean = (x2 * y).map(total) + outer(a * y, a).map(total)
    return make(z.to(p.dtype), a, x2 - mean, space)


@register("logsumexp", "special_logsumexp")
def _(space: Space, x: Any, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    p, x1, x2 = parts(x, space)
    if p.dim() == 0:
        return x
    dims: list[int] = [dim] if isinstance(dim, int) else list(dim) or list(range(p.dim()))
    over = [up(d) for d in dims]
    z = torch.logsumexp(precise(p), dims, keepdim=True)
    y = torch.exp(precise(p) - torch.where(z.isinf(), 0, z))

    def total(c: Tensor) -> Tensor:
        return c.sum(over, keepdim=True)

    mean = (x1 * y).map(total)
    a = x1 - mean
    second = (x2 * y).map(total) + outer(a * y, a).map(total)
    jet = make(z.to(p.dtype), mean, second, space)
    return jet if keepdim else jet.squeeze(tuple(dims))


@register("logcumsumexp")
def _(space: Space, x: Any, dim: int) -> Tensor:
    p = primal(x, space)
    if p.numel() == 0 or p.dim() == 0:
        return x
    if p.is_complex():
        return NotImplemented
    sums = list(x.unbind(dim))
    for i in range(1, len(sums)):
        sums[i] = torch.logaddexp(sums[i - 1], sums[i])
    _, first, second = parts(torch.stack(sums, dim), space)
    return make(torch.logcumsumexp(p, dim), first, second, space)


# --- normalization by mean and variance -------------------------------------------------------


def standardize(space: Space, x: Any, dims: Sequence[int], eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over the given dimensions, variance without correction."""
    p, x1, x2 = parts(x, space)
    dtype, p = p.dtype, precise(p)
    over = list(dims)  # negative, so that they serve tensors and stacks alike
    if over == list(range(-len(over), 0)) and writable(p):
        shape = p.shape[over[0] :]
        if space.order == 1 and not x2:
            return _layer_norm(space, x, shape, None, None, eps)
        y, _, r = torch.native_layer_norm(p, shape, None, None, eps)  # of which torch keeps no gradient of r
    else:
        y, r = _standardized(p, over, eps)

    def mean(c: Tensor) -> Tensor:
        return c.mean(over, keepdim=True)

    c1, c2 = (c.map(lambda s: s - mean(s), True) for c in (x1, x2))
    # with u = y r: v_i / 2 = mean(c0 c_i), r_i / r = -mean(u c_i)
    u = y * r
    m1, m2 = (c1 * u).map(mean, True), (c2 * u).map(mean, True)
    m2 += outer(c1, c1).map(mean, True) * (r * r) + outer(m1 * -3, m1)  # -r_ij / r
    y1 = c1 * r
    y2 = (c2 * r).add(symmetric(y1, m1), -1).add_product(y, m2, -1)
    return make(y.to(dtype), y1.add_product(y, m1, -1), y2, space)


def _layer_norm(space: Space, x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Tensor:
    """First coefficients of a layer norm, each direction from beginning to end in the cache."""
    p, x1, _ = parts(x, space)
    dtype, p = p.dtype, precise(p)
    over = list(range(-len(shape), 0))
    if writable(p):
        y, mean, r = torch.native_layer_norm(p, shape, None, None, eps)
    else:
        (y, r), mean = _standardized(p, over, eps), p
    pw, w1, _ = parts(weight, space)
    pb, b1, _ = parts(bias, space)

    def kernel(c: Tensor, out: Tensor) -> None:
        # The Jacobian is symmetric, as that of softmax.
        c = aten.native_layer_norm_backward(c, p, shape, mean, r, None, None, [True, False, False])[0]
        out.copy_(c) if pw is None else torch.mul(c, pw, out=out)

    def otherwise(c: Tensor) -> Tensor:
        c = c - c.mean(over, keepdim=True)
        c = (c - y * (c * y).mean(over, keepdim=True)) * r
        return c if pw is None else c * pw

    y1 = x1.each(p.shape, kernel, otherwise, p, pw).add_product(y, w1)
    y1 += b1
    y = y.to(dtype)
    y = y if pw is None else torch.mul(y, pw)
    return make(y if pb is None else torch.add(y, pb), y1, absent(space, 2), space)


def _standardized(p: Tensor, over: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """The standardized tensor, and the reciprocal of its standard deviation."""
    centred = p - p.mean(over, keepdim=True)
    r = torch.rsqrt((centred * centred).mean(over, keepdim=True) + eps)
    return centred * r, r


def _affine(space: Space, y: Any, weight: Any, bias: Any) -> Any:
    if weight is not None:
        y = multiply(space, y, weight)
    if bias is None or not is_jet(y, space):
        return y if bias is None else torch.add(y, bias)
    p, y1, y2 = parts(y, space)  # what was made here may be added to
    pb, b1, b2 = parts(bias, space)
    return make(torch.add(p, pb), y1.own().add(b1), y2.own().add(b2), space)


@register("layer_norm")
def _(
    space: Space,
    x: Any,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    seconds = [parts(t, space)[2] for t in (x, weight, bias)]
    if space.order == 1 and parts(x, space)[1] and not any(seconds):
        return _layer_norm(space, x, shape, weight, bias, eps)
    return _affine(space, standardize(space, x, range(-len(shape), 0), eps), weight, bias)


@register("native_layer_norm")
def _(space: Space, x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    dims = list(range(-len(shape), 0))
    y = torch.layer_norm(x, list(shape), weight, bias, eps)
    mean = x.mean(dims, keepdim=True)
    return y, mean, torch.rsqrt(torch.square(x - mean).mean(dims, keepdim=True) + eps)


@register("rms_norm")
def _(space: Space, x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    dims = list(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = torch.mul(x, torch.rsqrt(torch.add(torch.square(x).mean(dims, keepdim=True), eps)))
    return y if weight is None else torch.mul(y, weight)


def _channels(c: Any, rank: int) -> Any:
    return None if c is None else c.reshape(-1, *([1] * (rank - 2)))


def _update_running(p: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> None:
    """BatchNorm's running statistics, by the primal alone; the variance unbiased, as torch keeps it."""
    dims, p = [0, *range(2, p.dim())], p.detach()
    if mean is not None:
        mean.mul_(1 - momentum).add_(p.mean(dims), alpha=momentum)
    if var is not None:
        var.mul_(1 - momentum).add_(p.var(dims, correction=1), alpha=momentum)


def _by_running(x: Any, mean: Any, var: Any, eps: float) -> Any:
    """``(x - mean) / sqrt(var + eps)`` of each channel, as in eval mode."""
    inverse = torch.rsqrt(torch.add(var, eps))
    return torch.mul(torch.sub(x, _channels(mean, x.dim())), _channels(inverse, x.dim()))


@register("batch_norm")
def _(
    space: Space,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    rank = x.dim()
    if training or running_mean is None:
        if space.points:
            raise DerivativeError(
                "batch normalization in training mixes points, whose derivatives are carried apart (batch_dim=); call "
                "eval() on the model, or give batch_dim=None for derivatives by all points together"
            )
        y = standardize(space, x, [-rank, *range(2 - rank, 0)], eps)
        if training and running_mean is not None:
            _update_running(innermost(x), running_mean, running_var, momentum)
    else:
        y = _by_running(x, running_mean, running_var, eps)
    return _affine(space, y, _channels(weight, rank), _channels(bias, rank))


@register("native_batch_norm", "_native_batch_norm_legit")
def _native_batch_norm(
    space: Space,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    y = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, False)
    if not training:
        return y, y.new_empty(0), y.new_empty(0)
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims)
    centred = torch.sub(x, _channels(mean, x.dim()))
    return y, mean, torch.rsqrt(torch.add(torch.square(centred).mean(dims), eps))


# What is left of batch and group normalization where a compiler has broken them up.


@register("_native_batch_norm_legit.no_stats")
def _(space: Space, x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Any:
    return _native_batch_norm(space, x, weight, bias, None, None, training, momentum, eps)


@register("_native_batch_norm_legit_no_training")
def _(space: Space, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return _native_batch_norm(space, x, weight, bias, mean, var, False, momentum, eps)


@register("native_group_norm")
def _(space: Space, x: Any, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float) -> Any:
    y = torch.group_norm(x, groups, weight, bias, eps)
    grouped = x.reshape(n, groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = torch.square(torch.sub(grouped, mean)).mean(-1)
    return y, mean.squeeze(-1), torch.rsqrt(torch.add(variance, eps))


@register("instance_norm")
def _(
    space: Space,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    rank = x.dim()
    if use_input_stats:
        y = standardize(space, x, range(2 - rank, 0), eps)
        if running_mean is not None:
            p = innermost(x).detach()
            dims = list(range(2, rank))
            running_mean.mul_(1 - momentum).add_(p.mean(dims).mean(0), alpha=momentum)
            running_var.mul_(1 - momentum).add_(p.var(dims, correction=1).mean(0), alpha=momentum)
    else:
        y = _by_running(x, running_mean, running_var, eps)
    return _affine(space, y, _channels(weight, rank), _channels(bias, rank))


@register("group_norm")
def _(
    space: Space,
    x: Any,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    grouped = x.reshape(x.shape[0], groups, x.shape[1:].numel() // groups)
    y = standardize(space, grouped, [-1], eps).reshape(x.shape)
    return _affine(space, y, _channels(weight, x.dim()), _channels(bias, x.dim()))


@register("_weight_norm_interface")
def _(space: Space, v: Any, g: Any, dim: int = 0) -> Any:
    # torch's own second derivative of this operator is wrong (2.13), so its decomposition is not used either
    dims = list(range(v.dim())) if dim == -1 else [d for d in range(v.dim()) if d != dim % v.dim()]
    norm = torch.sqrt(torch.square(v).sum(dims, keepdim=True))
    return torch.mul(v, torch.div(g, norm)), norm


@register("_weight_norm")
def _(space: Space, v: Any, g: Any, dim: int = 0) -> Any:
    return aten._weight_norm_interface(v, g, dim)[0]


@register("linalg_vector_norm")
def _(space: Space, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x = x if dtype is None else x.to(dtype)
    dims = _dims(x, dim)
    size = torch.abs(x)
    if not dims:
        return size if ord != 0 else torch.ne(primal(x, space), 0).to(size.dtype)
    if ord == 0:
        return torch.ne(primal(x, space), 0).to(size.dtype).sum(dims, keepdim=keepdim)
    if ord in (math.inf, -math.inf):
        return (torch.amax if ord > 0 else torch.amin)(size, dims, keepdim)
    if ord == 1:
        return size.sum(dims, keepdim=keepdim)
    if ord == 2:
        real = torch.square(size) if x.is_complex() else torch.square(x)
        return _root(space, real.sum(dims, keepdim=keepdim), 0.5)
    return _root(space, torch.pow(size, ord).sum(dims, keepdim=keepdim), 1 / ord)


def _root(space: Space, x: Any, power: float) -> Any:
    """``x ** power`` with both derivatives zero at zero: what torch takes for norms and standard deviations."""
    p = precise(primal(x, space))
    y = torch.sqrt(p) if power == 0.5 else torch.pow(p, power)
    d1 = torch.where(p == 0, 0, 0.5 / y if power == 0.5 else power * p ** (power - 1))
    return chain(space, x, y.to(x.dtype), d1, (power - 1) * d1 / torch.where(p == 0, 1, p))


def _distance(space: Space, difference: Any, p: float) -> Any:
    """The p-norm along the last dimension, with the derivatives that torch's distances have.

    Zero at equal points; for the largest difference, each that is as large counts in full.
    """
    if p != math.inf:
        return torch.linalg.vector_norm(difference, p, -1)
    size = torch.abs(difference)
    y = torch.amax(primal(size, space), -1)
    hit = primal(size, space) == y.unsqueeze(-1)
    return linear(space, size, lambda _: y, lambda c: torch.where(hit, c, 0).sum(-1))


@register("_cdist_forward")
def _(space: Space, a: Any, b: Any, p: float, compute_mode: Any = None) -> Any:
    y = aten._cdist_forward(primal(a, space), primal(b, space), p, compute_mode)
    return make(y, *parts(_distance(space, a.unsqueeze(-2) - b.unsqueeze(-3), p), space)[1:], space)


@register("_euclidean_dist")
def _(space: Space, a: Any, b: Any) -> Any:
    y = aten._euclidean_dist(primal(a, space), primal(b, space))
    return make(y, *parts(_distance(space, a.unsqueeze(-2) - b.unsqueeze(-3), 2), space)[1:], space)


@register("_pdist_forward")
def _(space: Space, x: Any, p: float = 2) -> Any:
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    y = aten._pdist_forward(primal(x, space), p)
    return make(y, *parts(_distance(space, x[i] - x[j], p), space)[1:], space)


# --- variance and norms ------------------------------------------------------------------------


def _dims(x: Any, dim: Any) -> list[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(x.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


@register("var.correction")
def _(space: Space, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    dims = _dims(x, dim)
    centred = x - x.mean(dims, keepdim=True) if dims else x - x
    n = 1
    for d in dims:
        n *= x.shape[d]
    degrees = max(n - (1 if correction is None else correction), 0)
    total = torch.square(centred).sum(dims, keepdim=keepdim) if dims else torch.square(centred)
    return torch.div(total, degrees)


@register("std.correction")
def _(space: Space, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    var = torch.var(x, dim, correction=1 if correction is None else correction, keepdim=keepdim)
    return _root(space, var, 0.5)


@register("var_mean.correction")
def _(space: Space, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    var = aten.var.correction(x, dim, correction=correction, keepdim=keepdim)
    return var, x.mean(_dims(x, dim), keepdim=keepdim)


@register("std_mean.correction")
def _(space: Space, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    std = aten.std.correction(x, dim, correction=correction, keepdim=keepdim)
    return std, x.mean(_dims(x, dim), keepdim=keepdim)
