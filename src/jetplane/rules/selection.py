"""Operators that choose elements by value: maxima, sorting, pooling, dropout.

The choice is the primal's; coefficients are gathered with the same indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch import decompositions
from ..jets import Space, is_jet, linear, make, mark_view, parts, primal
from .registry import Rule, aten, declare, operator, register
from .structure import up


def _gathered(space: Space, x: Any, y: Tensor, index: Tensor, dim: int, keepdim: bool = True) -> Tensor:
    """The jet of elements of x picked along a dimension."""
    _, x1, x2 = parts(x, space)

    def pick(c: Tensor) -> Tensor:
        if c.dim() == 1:
            return c
        at = index if keepdim else index.unsqueeze(dim)
        picked = c.gather(up(dim), at.expand(c.shape[0], *at.shape))
        return picked if keepdim else picked.squeeze(up(dim))

    return make(y, x1.moved(pick), x2.moved(pick), space)


def _by_index(op: Any) -> Rule:
    """Operators that return (values, indices) along a dimension and may drop it."""
    names = [a.name for a in op._schema.arguments[1:]]

    def rule(space: Space, x: Any, *args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(names, args, strict=False)) | kwargs
        values, index = op(primal(x, space), *args, **kwargs)
        keepdim = bound.get("keepdim", "keepdim" not in names)
        return _gathered(space, x, values, index, bound.get("dim", -1), keepdim), index

    return rule


declare("max.dim min.dim sort sort.stable topk kthvalue median.dim nanmedian.dim mode cummax cummin", _by_index)


def _extremum(op: Any) -> Rule:
    """Maxima that share the derivative equally among ties, as autograd does."""
    extreme = torch.amax if "max" in op._schema.name else torch.amin

    def rule(space: Space, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
        p = primal(x, space)
        if p.dim() == 0:
            return x
        dims = [dim] if isinstance(dim, int) else list(dim) or list(range(p.dim()))
        y = extreme(p, dims, True)
        hit = (p == y) | (p.isnan() & y.isnan())
        count = hit.sum(dims, keepdim=keepdim)
        over = [up(d) for d in dims]
        value = y if keepdim else y.squeeze(dims)  # type: ignore[arg-type]
        return linear(space, x, lambda _: value, lambda c: torch.where(hit, c, 0).sum(over, keepdim=keepdim) / count)

    return rule


declare("amax amin max min", _extremum)


@register("aminmax")
def _(space: Space, x: Any, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = [] if dim is None else [dim]
    return torch.amin(x, dims, keepdim), torch.amax(x, dims, keepdim)


def _middle(op: Any) -> Rule:
    """Medians of all elements, which share the derivative equally among ties too."""

    def rule(space: Space, x: Any) -> Any:
        p = primal(x, space)
        y = op(p)
        hit = (p == y) | (p.isnan() & y.isnan())
        over = list(range(1, p.dim() + 1))

        def on_stack(c: Tensor) -> Tensor:
            return torch.where(hit, c, 0).sum(over) / hit.sum() if over else c

        return linear(space, x, lambda _: y, on_stack)

    return rule


declare("median nanmedian", _middle)


# --- reductions by index -----------------------------------------------------------------------------


@register("scatter_reduce.two")
def _(
    space: Space, x: Any, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True
) -> Any:  # fmt: skip
    if reduce == "prod":
        return NotImplemented
    if not x.dim():
        line, src = x.reshape(1), src.reshape(-1)
        return torch.scatter_reduce(line, 0, index.reshape(-1), src, reduce, include_self=include_self).reshape(())
    p, src = primal(x, space), src[tuple(slice(n) for n in index.shape)]
    s = primal(src, space)
    kept = torch.ones_like(p) if include_self else torch.ones_like(p).scatter(dim, index, 0)
    if reduce in ("sum", "mean"):
        total = (x if include_self else x.scatter(dim, index, 0)).scatter_add(dim, index, src)
        return total if reduce == "sum" else total / kept.scatter_add(dim, index, torch.ones_like(s))
    y = torch.scatter_reduce(p, dim, index, s, reduce, include_self=include_self)
    own, won = p == y, s == y.gather(dim, index)
    # ties share the derivative, as in autograd: with what is left out too
    count = own.to(y.dtype).scatter_add(dim, index, won.to(y.dtype))
    found = torch.where(own & (kept != 0), x, 0).scatter_add(dim, index, torch.where(won, src, 0)) / count
    return make(y, *parts(found, space)[1:], space)


@register("index_reduce")
def _(
    space: Space, x: Any, dim: int, index: Tensor, source: Any, reduce: str, *, include_self: bool = True
) -> Any:  # fmt: skip
    shape = [1] * x.dim()
    if shape:
        shape[dim] = -1
    at = index.reshape(shape).expand(source.shape)
    return torch.scatter_reduce(x, dim, at, source, reduce, include_self=include_self)


# --- pooling ----------------------------------------------------------------------------------------


def _pooled(space: Space, x: Any, y: Tensor, index: Tensor, spatial: int) -> Tensor:
    """Gather the chosen pixels; indices count within the flattened spatial axes."""
    chosen = index.flatten(-spatial)

    def gather(c: Tensor, **options: Any) -> Tensor:
        at = chosen.expand(c.shape[0], *chosen.shape)
        return (
            c.flatten(-spatial).gather(-1, at) if not options else torch.gather(c.flatten(-spatial), -1, at, **options)
        )

    _, x1, x2 = parts(x, space)
    y1, y2 = (
        c.written(chosen.shape, lambda c, out: gather(c, out=out), gather).map(
            lambda c: c.reshape(c.shape[0], *y.shape)
        )
        for c in (x1, x2)
    )
    return make(y, y1, y2, space)


def _max_pool(with_indices: str, spatial: int, returns_indices: bool) -> Callable[[Any], Rule]:
    def of(op: Any) -> Rule:
        indexed = operator(with_indices)

        def rule(space: Space, x: Any, *args: Any, **kwargs: Any) -> Any:
            y, index = indexed(primal(x, space), *args, **kwargs)
            jet = _pooled(space, x, y, index, spatial)
            return (jet, index) if returns_indices else jet

        return rule

    return of


for _n in (2, 3):
    declare(f"max_pool{_n}d", _max_pool(f"max_pool{_n}d_with_indices", _n, False))
    for _name in (f"max_pool{_n}d_with_indices", f"fractional_max_pool{_n}d"):
        declare(_name, _max_pool(_name, _n, True))
for _n in (1, 2, 3):
    declare(f"adaptive_max_pool{_n}d", _max_pool(f"adaptive_max_pool{_n}d", _n, True))


@register("max_pool1d")
def _(
    space: Space,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    return max_pool1d(x, kernel, stride, padding, dilation, ceil_mode)[0]


@register("max_pool1d_with_indices")
def _(
    space: Space,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    return max_pool1d(x, kernel, stride, padding, dilation, ceil_mode)


def max_pool1d(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> tuple[Any, Tensor]:
    """Pooling of a line as that of an image of height one."""
    k, s, p, d = (v[0] if isinstance(v, Sequence) and len(v) else v for v in (kernel, stride, padding, dilation))
    s = k if isinstance(s, Sequence) else s
    y, index = aten.max_pool2d_with_indices(x.unsqueeze(-2), [1, k], [1, s], [0, p], [1, d], ceil_mode)
    return y.squeeze(-2), index.squeeze(-2)


def _max_unpool(op: Any) -> Rule:
    spatial = 3 if "3d" in op._schema.name else 2

    def rule(space: Space, x: Any, index: Tensor, size: Any, *rest: Any) -> Any:
        y = op(primal(x, space), index, size, *rest)

        def on_stack(c: Tensor) -> Tensor:
            at = index.flatten(-spatial).expand(c.shape[0], *index.shape[:-spatial], -1)
            out = c.new_zeros(c.shape[0], *y.flatten(-spatial).shape)
            return out.scatter(-1, at, c.flatten(-spatial)).reshape(c.shape[0], *y.shape)

        return linear(space, x, lambda _: y, on_stack)

    return rule


declare("max_unpool2d max_unpool3d", _max_unpool)


# --- sampling between pixels ---------------------------------------------------------------------------


@register("grid_sampler_2d")
def _(space: Space, x: Any, grid: Any, mode: int, padding: int, align: bool) -> Any:
    """Torch's decomposition, but flat on the border where coordinates are kept inside, as torch's kernels are."""
    if is_jet(grid, space) and mode == 0 and padding != 0:
        moves = _inside(primal(grid, space), (x.shape[3], x.shape[2]), padding, align)
        grid = torch.where(moves, grid, primal(grid, space))
    return decompositions()[aten.grid_sampler_2d.default](x, grid, mode, padding, align)


def _inside(grid: Tensor, sizes: tuple[int, int], padding: int, align: bool) -> Tensor:
    """Which coordinates lie strictly inside of an image, reflected into it (padding 2) or not (1)."""
    size = torch.tensor(sizes, dtype=grid.dtype, device=grid.device)
    at = (grid + 1) / 2 * (size - 1) if align else ((grid + 1) * size - 1) / 2
    if padding == 2:
        low, span = (0.0, size - 1) if align else (-0.5, size)
        turns, rest = torch.floor((at - low).abs() / span), torch.fmod((at - low).abs(), span)
        at = torch.where(turns % 2 == 0, rest, span - rest) + low
    return (at > 0) & (at < size - 1)


# --- dropout: one mask for the primal and all directions ---------------------------------------------


@register("dropout")
def _(space: Space, x: Any, p: float, train: bool) -> Any:
    if not train or p == 0:
        return mark_view(x.alias(primal(x, space)), x)
    mask = F.dropout(torch.ones_like(primal(x, space)), p, True)
    return torch.mul(x, mask)


@register("feature_dropout")
def _(space: Space, x: Any, p: float, train: bool) -> Any:
    if not train or p == 0:
        return mark_view(x.alias(primal(x, space)), x)
    shape = [*x.shape[:2], *([1] * (x.dim() - 2))]
    mask = F.dropout(torch.ones(shape, dtype=x.dtype, device=x.device), p, True)
    return torch.mul(x, mask)


@register("native_dropout")
def _(space: Space, x: Any, p: float, train: bool | None) -> Any:
    y, mask = torch.native_dropout(torch.ones_like(primal(x, space)), p, train)
    return torch.mul(x, y), mask
