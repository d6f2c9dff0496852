"""Linear operators that move, pick, sum or spread elements.

A line of `LINEAR` says how the operator acts on a stack of n tensors, that is on coefficients of
shape (n, *S): mostly the operator itself with its dimensions shifted past the direction axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DerivativeError
from ..jets import (
    Coefficients,
    Jet,
    LowRank,
    Space,
    absent,
    carried,
    expand,
    innermost,
    joined,
    jointly,
    lift,
    linear,
    make,
    mark_view,
    parts,
    plain,
    primal,
    reshape,
)
from . import rounding
from .registry import Rule, aten, declare, register


def up(dim: int) -> int:
    """A dimension of the tensor as one of the stack."""
    return dim + 1 if dim >= 0 else dim


def ups(dims: Sequence[int] | int | None, c: Tensor) -> list[int]:
    """Dimensions of the tensor as those of the stack; none given means all of them."""
    if c.dim() == 1:
        return []
    if dims is None:
        return list(range(1, c.dim()))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [up(d) for d in dims] if dims else list(range(1, c.dim()))


def fold(op: Callable[[Tensor], Tensor], batched_rank: int) -> Callable[[Tensor], Tensor]:
    """Act on a stack through the operator's own batch axis.

    ``batched_rank`` is the rank of a batched argument; a tensor of smaller rank has no batch axis.
    """

    def on_stack(c: Tensor) -> Tensor:
        if c.dim() == batched_rank:  # an unbatched tensor: the stack is the batch
            return op(c)
        y = op(c.flatten(0, 1))
        return y.reshape(c.shape[0], c.shape[1], *y.shape[1:])

    return on_stack


def each(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Act on a stack one tensor after the other."""
    return lambda c: torch.stack([op(t) for t in c.unbind(0)])


def _expand(c: Tensor, size: Sequence[int], implicit: bool = False) -> Tensor:
    return lift(c, len(size)).expand(c.shape[0], *size)


def _sum(c: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims = ups(dim, c)
    return c.sum(dims, keepdim, dtype=dtype) if dims else c.to(dtype or c.dtype)


def _mean(c: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims = ups(dim, c)
    return c.mean(dims, keepdim, dtype=dtype) if dims else c.to(dtype or c.dtype)


def _squeeze(c: Tensor, dim: Any = None) -> Tensor:
    if c.dim() == 1:
        return c
    dims = range(1, c.dim()) if dim is None else [up(d) for d in ([dim] if isinstance(dim, int) else dim)]
    return c.squeeze([d for d in dims if c.shape[d] == 1])  # type: ignore[call-overload]


def _diagonal(c: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    return c.diagonal(offset, up(dim1), up(dim2))


def _flip(c: Tensor, dims: Sequence[int]) -> Tensor:
    return c.flip([up(d) for d in dims]) if len(dims) and c.dim() > 1 else c


def _roll(c: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    if dims is None or len(dims) == 0:
        return c.flatten(1).roll(shifts, 1).reshape(c.shape)
    return c.roll(shifts, [up(d) for d in dims])


def _cumsum(c: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return c.to(dtype or c.dtype) if c.dim() == 1 else c.cumsum(up(dim), dtype=dtype)


def _gather(c: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    if c.dim() == 1:
        return c.expand(c.shape[0]) if index.dim() == 0 else c[:, None].gather(1, index.expand(c.shape[0], -1))
    if index.dim() == 0:
        index = index[None]
    return c.gather(up(dim), index.expand(c.shape[0], *index.shape))


def _index(c: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    y = aten.index.Tensor(c, [None, *indices])
    used = [i for i, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):  # separated indices put their axes in front of ours
        rank = max(_index_rank(indices[i]) for i in used)
        y = y.movedim(rank, 0)
    return y


def _index_rank(index: Any) -> int:
    return 1 if index.dtype in (torch.bool, torch.uint8) else index.dim()


def _constant_pad(c: Tensor, pad: Sequence[int], value: Any = 0) -> Tensor:
    return F.pad(c, list(pad))


def _permute(c: Tensor, dims: Sequence[int]) -> Tensor:
    return c.permute(0, *[d % (c.dim() - 1) + 1 for d in dims])


def _repeat(c: Tensor, repeats: Sequence[int]) -> Tensor:
    return lift(c, len(repeats)).repeat(1, *repeats)


def _transposed(c: Tensor) -> Tensor:
    return c.permute(0, *range(c.dim() - 1, 0, -1))


def _unfold(c: Tensor, dim: int, size: int, step: int) -> Tensor:
    return c[:, None].unfold(1, size, step)[:, 0] if c.dim() == 1 else c.unfold(up(dim), size, step)


def _index_select(c: Tensor, dim: int, index: Tensor) -> Tensor:
    return c if c.dim() == 1 else c.index_select(up(dim), index)


def _take(c: Tensor, index: Tensor) -> Tensor:
    return c.reshape(c.shape[0], -1)[:, index.flatten()].reshape(c.shape[0], *index.shape)


def _trace(c: Tensor) -> Tensor:
    return c.diagonal(0, 1, 2).sum(-1)


def _fft(c: Tensor, dims: Sequence[int], *args: Any, op: Any) -> Tensor:
    return op(c, [up(d) for d in dims], *args)


def _as_real(c: Tensor) -> Tensor:
    return torch.view_as_real(c.resolve_conj())


def _view(c: Tensor, size: Any) -> Tensor:
    return c.reshape(c.shape[0], *size)


# operator -> how it acts on a stack of coefficients, with the operator's own further arguments
LINEAR: dict[str, Callable[..., Any]] = {
    # views and copies
    "view": _view,
    "_unsafe_view": _view,
    "view_as": lambda c, other: _view(c, other.shape),
    "reshape_as": lambda c, other: _view(c, other.shape),
    "expand": lambda c, size, implicit=False, *, shape=None: _expand(c, size),
    "clone": lambda c, memory_format=None: c,
    "contiguous": lambda c, memory_format=None: c,
    "alias": lambda c: c,
    "transpose.int": lambda c, a, b: c if c.dim() == 1 else c.transpose(up(a), up(b)),
    "permute": _permute,
    "numpy_T": _transposed,
    "unsqueeze": lambda c, dim: c.unsqueeze(up(dim)),
    "squeeze": _squeeze,
    "squeeze.dim": _squeeze,
    "squeeze.dims": _squeeze,
    "select.int": lambda c, dim, index: c.select(up(dim), index),
    "slice.Tensor": lambda c, dim=0, start=None, end=None, step=1: aten.slice.Tensor(c, up(dim), start, end, step),
    "narrow": lambda c, dim, start, length: c.narrow(up(dim), start, length),
    "diagonal": _diagonal,
    "unfold": _unfold,
    "flip": _flip,
    "roll": _roll,
    "rot90": lambda c, k=1, dims=(0, 1): torch.rot90(c, k, [up(d) for d in dims]),
    "repeat": _repeat,
    "tril": lambda c, diagonal=0: c.tril(diagonal),
    "triu": lambda c, diagonal=0: c.triu(diagonal),
    "diag_embed": lambda c, offset=0, dim1=-2, dim2=-1: torch.diag_embed(
        c, offset, dim1 if dim1 < 0 else dim1 + 1, dim2 if dim2 < 0 else dim2 + 1
    ),
    "trace": _trace,
    "view_as_complex": torch.view_as_complex,
    "real": torch.real,
    "imag": torch.imag,
    "conj": torch.conj,
    "_conj": torch.conj,
    "_conj_physical": torch.conj_physical,
    "conj_physical": torch.conj_physical,
    "resolve_conj": torch.resolve_conj,
    "resolve_neg": torch.resolve_neg,
    "_neg_view": torch.neg,
    "cumsum": _cumsum,
    # picking
    "gather": _gather,
    "index.Tensor": _index,
    "_unsafe_index.Tensor": _index,
    "index_select": _index_select,
    "take": _take,
    "constant_pad_nd": _constant_pad,
    # Fourier
    "_fft_r2c": lambda c, dim, *rest: _fft(c, dim, *rest, op=aten._fft_r2c),
    "_fft_c2c": lambda c, dim, *rest: _fft(c, dim, *rest, op=aten._fft_c2c),
    "_fft_c2r": lambda c, dim, *rest: _fft(c, dim, *rest, op=aten._fft_c2r),
}

# operators that act on images: rank of a batched argument
FOLDED: dict[str, int] = {
    "reflection_pad1d": 3,
    "reflection_pad2d": 4,
    "reflection_pad3d": 5,
    "replication_pad1d": 3,
    "replication_pad2d": 4,
    "replication_pad3d": 5,
    "avg_pool1d": 3,
    "avg_pool2d": 4,
    "avg_pool3d": 5,
    "adaptive_avg_pool1d": 3,
    "adaptive_avg_pool2d": 4,
    "adaptive_avg_pool3d": 5,
    "_adaptive_avg_pool2d": 4,
    "_adaptive_avg_pool3d": 5,
    "upsample_nearest1d": 3,
    "upsample_nearest2d": 4,
    "upsample_nearest3d": 5,
    "_upsample_nearest_exact1d": 3,
    "_upsample_nearest_exact2d": 4,
    "_upsample_nearest_exact3d": 5,
    "upsample_linear1d": 3,
    "upsample_bilinear2d": 4,
    "upsample_trilinear3d": 5,
    "upsample_bicubic2d": 4,
    "_upsample_bilinear2d_aa": 4,
    "_upsample_bicubic2d_aa": 4,
    "im2col": 4,
    "col2im": 3,
    "channel_shuffle": 4,
    "pixel_shuffle": 4,
    "pixel_unshuffle": 4,
}


# those that move, repeat and pick elements
MOVES = set(
    "view _unsafe_view view_as reshape_as expand clone contiguous alias transpose.int permute numpy_T unsqueeze "
    "squeeze squeeze.dim squeeze.dims select.int slice.Tensor narrow diagonal unfold flip roll rot90 repeat gather "
    "index.Tensor _unsafe_index.Tensor index_select take".split()
)


def _linear(name: str, op: Any, on_stack: Callable[..., Any]) -> Rule:
    moves = name in MOVES

    def rule(space: Space, x: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(primal(a, space) for a in args)
        return linear(space, x, lambda p: op(p, *args, **kwargs), lambda c: on_stack(c, *args, **kwargs), moves)

    return rule


def _summing(op: Any, on_stack: Callable[..., Any]) -> Rule:
    def rule(space: Space, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        p, x1, x2 = parts(x, space)
        y = op(p, dim, keepdim, dtype=dtype)

        def on_stacks(c: Tensor) -> Tensor:
            return on_stack(c, dim, keepdim, dtype=dtype)

        if x1.sparse is None:
            return linear(space, x, lambda _: y, on_stacks)
        share = y.numel() / max(p.numel(), 1) if on_stack is _mean else 1
        dims = [d - 1 if d > 0 else d for d in ups(dim, p[None])]
        return make(y, x1.summed(on_stacks, dims, keepdim, share), x2.map(on_stacks), space)

    return rule


def _folded(op: Any, rank: int) -> Rule:
    def rule(space: Space, x: Any, *args: Any, **kwargs: Any) -> Any:
        def act(c: Tensor) -> Tensor:
            return op(c, *args, **kwargs)

        if op._schema.name.startswith("aten::pixel"):  # any number of leading axes
            return linear(space, x, act, act)
        return linear(space, x, act, fold(act, rank))

    return rule


for _name, _on_stack in LINEAR.items():
    declare(_name, lambda op, name=_name, on_stack=_on_stack: _linear(name, op, on_stack))
for _name, _on_stack in {"sum.dim_IntList": _sum, "mean.dim": _mean}.items():
    declare(_name, lambda op, on_stack=_on_stack: _summing(op, on_stack))
for _name, _rank in FOLDED.items():
    declare(_name, lambda op, rank=_rank: _folded(op, rank))


@register("reshape")
def _(space: Space, x: Any, shape: Sequence[int]) -> Any:
    return reshape(space, x, shape)


# --- sums over everything ---------------------------------------------------------------------


def _total(on_stack: Callable[..., Tensor]) -> Callable[[Any], Rule]:
    def of(op: Any) -> Rule:
        def rule(space: Space, x: Any, *, dtype: Any = None) -> Any:
            p, x1, x2 = parts(x, space)
            share = 1 / max(p.numel(), 1) if on_stack is _mean else 1
            y1 = x1.summed(lambda c: on_stack(c, dtype=dtype), range(p.dim()), False, share)
            # Products are summed up without one tensor for each pair.
            y2 = x2.total() * share if x2.is_product else x2.map(lambda c: on_stack(c, dtype=dtype), True)
            return make(op(p, dtype=dtype), y1, y2, space)

        return rule

    return of


declare("sum", _total(_sum))
declare("mean", _total(_mean))


# --- what leaves low-rank tangents as they are ----------------------------------------------


@register("t")
def _(space: Space, x: Any) -> Any:
    p, x1, x2 = parts(x, space)
    low = x1.structured
    if isinstance(low, LowRank):
        return make(p.t(), Coefficients(space, 1, low.transposed(), x1.rows), x2, space)
    return linear(space, x, aten.t, lambda c: c.transpose(-1, -2) if c.dim() == 3 else c)


@register("embedding")
def _(
    space: Space, weight: Any, index: Tensor, padding: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    if scale_grad_by_freq:
        raise DerivativeError("embedding with scale_grad_by_freq has a gradient that is not its derivative")
    kept = None if padding < 0 else (index != padding).unsqueeze(-1)  # torch keeps that row out of training

    def trained(c: Tensor) -> Tensor:
        return c if kept is None else c * kept

    def looked_up(table: Tensor) -> Tensor:
        return aten.embedding(table, index, padding)

    table, w1, _ = parts(weight, space)
    low = w1.structured
    if isinstance(low, LowRank):
        picked = low.left[:, :, index.flatten()]  # (K, r, n): what each row's factor is
        first = (picked.mT @ low.right).unflatten(1, index.shape)
        return make(looked_up(table), Coefficients(space, 1, trained(first), w1.rows), absent(space, 2), space)
    return linear(space, weight, looked_up, lambda c: trained(c[:, index]))


# --- dtype and device ---------------------------------------------------------------------


def _cast(space: Space, x: Any, y: Tensor) -> Any:
    """X as y, its primal in another dtype or on another device."""
    p, x1, x2 = parts(x, space)
    if not (y.dtype.is_floating_point or y.dtype.is_complex):
        rounding.to_integers("a cast", y.dtype)
        return y
    device = None if y.device == p.device else y.device
    return make(y, x1.to(carried(y.dtype), device), x2.to(carried(y.dtype), device), space)


def _casting(op: Any) -> Rule:
    def rule(space: Space, x: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(primal(a, space) for a in args)
        return _cast(space, x, op(primal(x, space), *args, **kwargs))

    return rule


declare("to.dtype to.device to.other to.dtype_layout _to_copy type_as", _casting)


# --- several tensors at once ----------------------------------------------------------------


@register("cat")
def _(space: Space, tensors: Sequence[Any], dim: int = 0) -> Any:
    tensors = [t for t in tensors if not (t.dim() == 1 and t.shape[0] == 0)] or list(tensors)
    y = torch.cat([primal(t, space) for t in tensors], dim)
    dim = dim % y.dim() - y.dim()
    return _joined(space, [parts(t, space)[1:] for t in tensors], [t.shape[dim] for t in tensors], y, dim)


@register("stack")
def _(space: Space, tensors: Sequence[Any], dim: int = 0) -> Any:
    y = torch.stack([primal(t, space) for t in tensors], dim)
    dim = dim % y.dim() - y.dim()
    every = [[c.moved(lambda stack: stack.unsqueeze(dim)) for c in parts(t, space)[1:]] for t in tensors]
    return _joined(space, every, [1] * len(tensors), y, dim)


def _joined(space: Space, every: Sequence[Sequence[Coefficients]], sizes: Sequence[int], y: Tensor, dim: int) -> Tensor:
    first, second = (
        joined(space, [of[n] for of in every], sizes, y.shape, dim, carried(y.dtype), y.device) for n in (0, 1)
    )
    return make(y, first, second, space)


def _several(space: Space, x: Any, cut: Callable[[Tensor, bool], Sequence[Tensor]]) -> list[Any]:
    """The parts that a tensor is cut into, as views: ``cut`` acts on the primal, or (True) on a stack."""
    p, x1, x2 = parts(x, space)
    ys = cut(p, False)
    firsts, seconds = (c.cut(lambda stack: cut(stack, True), len(ys)) for c in (x1, x2))
    return [mark_view(make(y, f, s, space), x) for y, f, s in zip(ys, firsts, seconds, strict=True)]


def _splitting(op: Any) -> Rule:
    def rule(space: Space, x: Any, sizes: Any, dim: int = 0) -> Any:
        return _several(space, x, lambda t, stack: op(t, sizes, up(dim) if stack else dim))

    return rule


declare("split.Tensor split_with_sizes chunk unsafe_split.Tensor unsafe_split_with_sizes unsafe_chunk", _splitting)


@register("unbind.int")
def _(space: Space, x: Any, dim: int = 0) -> Any:
    return _several(space, x, lambda t, stack: t.unbind(up(dim) if stack else dim))


@register("view_as_real")
def _(space: Space, x: Any) -> Any:
    """Under vmap the jet does not know that its primal is a conjugate view, of which there is no real view."""
    return linear(space, x, _as_real, _as_real)


@register("as_strided")
def _(space: Space, x: Any, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    p, x1, x2 = parts(x, space)
    y = p.as_strided(size, stride, offset)
    base = x.root()
    if not plain(p):
        raise DerivativeError(
            "as_strided inside of derivatives of derivatives, or in compiled code; use slices, unfold or reshape"
        )
    view = Jet(y, None, None, space, base)
    if not (x1 or x2):
        return y
    view.version = base.version - 1  # read the coefficients through the base's layout
    parts(view, space)
    return view


def _stacked_index(index: Tensor, n: int) -> Tensor:
    return index.expand(n, *index.shape)


def _scattering(op: Any) -> Rule:
    adds, sets = "add" in op._schema.name, op._overloadname == "value"

    def rule(space: Space, x: Any, dim: int, index: Tensor, src: Any) -> Any:
        y = op(primal(x, space), dim, index, primal(src, space))

        def on_stacks(cx: Tensor, cs: Tensor) -> Tensor:
            if cx.dim() == 1:
                cx = cx[:, None]
                cs = cs.reshape(cs.shape[0], 1) if cs.dim() == 1 else cs
                i = _stacked_index(index.reshape(1), cx.shape[0])
                return (cx.scatter_add if adds else cx.scatter)(1, i, cs.expand(i.shape)).squeeze(1)
            i = _stacked_index(index, cx.shape[0])
            if sets:
                return cx.scatter(up(dim), i, 0)
            return aten.scatter_add(cx, up(dim), i, cs) if adds else aten.scatter.src(cx, up(dim), i, cs)

        return jointly(space, (x,), y, lambda c: on_stacks(c, c)) if sets else jointly(space, (x, src), y, on_stacks)

    return rule


declare("scatter.src scatter_add scatter.value", _scattering)


@register("index_add")
def _(space: Space, x: Any, dim: int, index: Tensor, source: Any, *, alpha: Any = 1) -> Any:
    y = torch.index_add(primal(x, space), dim, index, primal(source, space), alpha=alpha)
    if y.dim() == 0:
        return NotImplemented
    return jointly(space, (x, source), y, lambda cx, cs: torch.index_add(cx, up(dim), index, cs, alpha=alpha))


@register("index_copy")
def _(space: Space, x: Any, dim: int, index: Tensor, source: Any) -> Any:
    y = torch.index_copy(primal(x, space), dim, index, primal(source, space))
    if y.dim() == 0:
        return NotImplemented
    return jointly(space, (x, source), y, lambda cx, cs: torch.index_copy(cx, up(dim), index, cs))


@register("index_fill.int_Scalar")
def _(space: Space, x: Any, dim: int, index: Tensor, value: Any) -> Any:
    y = torch.index_fill(primal(x, space), dim, index, value)
    if y.dim() == 0:
        return y
    return jointly(space, (x,), y, lambda c: torch.index_fill(c, up(dim), index, 0))


@register("index_put", "_unsafe_index_put")
def _(space: Space, x: Any, indices: Sequence[Tensor | None], values: Any, accumulate: bool = False) -> Any:
    indices = [None if i is None else primal(i, space) for i in indices]
    y = aten.index_put(primal(x, space), indices, primal(values, space), accumulate)
    target = aten.index.Tensor(primal(x, space), indices).shape

    def on_stacks(cx: Tensor, cv: Tensor) -> Tensor:
        pairs = zip(cx, expand(cv, target), strict=True)
        return torch.stack([aten.index_put(a, indices, b, accumulate) for a, b in pairs])

    return jointly(space, (x, values), y, on_stacks)


@register("put")
def _(space: Space, x: Any, index: Tensor, source: Any, accumulate: bool = False) -> Any:
    flat = torch.index_put(x.reshape(-1), (index.reshape(-1),), source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


@register("masked_scatter")
def _(space: Space, x: Any, mask: Tensor, source: Any) -> Any:
    y = torch.masked_scatter(primal(x, space), mask, primal(source, space))

    def on_stacks(cx: Tensor, cs: Tensor) -> Tensor:
        return torch.stack([a.expand(y.shape).masked_scatter(mask, b) for a, b in zip(cx, cs, strict=True)])

    return jointly(space, (x, source), y, on_stacks)


@register("masked_select")
def _(space: Space, x: Any, mask: Tensor) -> Any:
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    mask = mask.expand(shape)

    def on_stack(c: Tensor) -> Tensor:
        full = expand(c, shape)
        return full[:, mask] if shape else full.reshape(-1, 1)[:, mask.reshape(1)]

    return linear(space, x, lambda p: torch.masked_select(p, mask), on_stack)


def _distinct(space: Space, x: Any) -> Tensor:
    """The primal of what a part is scattered into, its elements checked to lie in memory of their own.

    Raises:
        DerivativeError: they share some. Torch then writes to several elements at once, and its own gradient is wrong.
    """
    p = primal(x, space)
    inner = innermost(p)
    axes = sorted((stride, size) for stride, size in zip(inner.stride(), inner.shape, strict=True) if size > 1)
    extent = 1
    for stride, size in axes:
        if 0 < stride < extent and axes[0][0]:  # of an expanded one torch makes a copy that is not
            raise DerivativeError(
                "select_scatter, slice_scatter or diagonal_scatter of a tensor whose elements share memory (unfold, "
                "as_strided), where torch writes to several elements at once; call contiguous() on it first"
            )
        extent += stride * (size - 1)
    return p


@register("slice_scatter")
def _(space: Space, x: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    y = aten.slice_scatter(_distinct(space, x), primal(src, space), dim, start, end, step)
    return jointly(space, (x, src), y, lambda a, b: aten.slice_scatter(a, b, up(dim), start, end, step))


@register("select_scatter")
def _(space: Space, x: Any, src: Any, dim: int, index: int) -> Any:
    y = aten.select_scatter(_distinct(space, x), primal(src, space), dim, index)
    return jointly(space, (x, src), y, lambda a, b: aten.select_scatter(a, b, up(dim), index))


@register("diagonal_scatter")
def _(space: Space, x: Any, src: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    y = aten.diagonal_scatter(_distinct(space, x), primal(src, space), offset, dim1, dim2)
    return jointly(space, (x, src), y, lambda a, b: aten.diagonal_scatter(a, b, offset, up(dim1), up(dim2)))


@register("repeat_interleave.self_int", "repeat_interleave.self_Tensor")
def _(space: Space, x: Any, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Any:
    def on_stack(c: Tensor) -> Tensor:
        if dim is None:
            return torch.repeat_interleave(c.reshape(c.shape[0], -1), repeats, 1)
        if c.dim() == 1:
            return torch.repeat_interleave(c[:, None], repeats, 1)
        return torch.repeat_interleave(c, repeats, up(dim))

    return linear(space, x, lambda p: torch.repeat_interleave(p, repeats, dim), on_stack, moves=True)


@register("copy")
def _(space: Space, x: Any, source: Any, non_blocking: bool = False) -> Any:
    """What x holds after x.copy_(source)."""
    target = primal(x, space)
    return _cast(space, source, primal(source, space).to(target.device, target.dtype).expand(target.shape))


@register("fill.Tensor")
def _(space: Space, x: Any, value: Any) -> Any:
    target = primal(x, space)
    v, v1, v2 = parts(value, space)
    return make(v.to(target.dtype).expand(target.shape), v1, v2, space)


@register("fill.Scalar")
def _(space: Space, x: Any, value: Any) -> Any:
    return torch.full_like(primal(x, space), value)


@register("zero")
def _(space: Space, x: Any) -> Any:
    return torch.zeros_like(primal(x, space))


@register("_embedding_bag", "_embedding_bag_forward_only")
def _(
    space: Space,
    weight: Any,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    if scale_grad_by_freq:
        raise DerivativeError("embedding_bag with scale_grad_by_freq has a gradient that is not its derivative")
    if mode == 2:
        return NotImplemented
    starts = offsets[:-1] if include_last_offset else offsets
    bag = torch.bucketize(torch.arange(indices.numel(), device=indices.device), starts, right=True) - 1
    kept = (indices != padding_idx) if padding_idx >= 0 else torch.ones_like(indices, dtype=torch.bool)
    rows = torch.mul(weight[indices], kept.unsqueeze(1))
    if per_sample_weights is not None:
        rows = torch.mul(rows, per_sample_weights.unsqueeze(1))
    bags = torch.zeros(starts.numel(), rows.shape[1], dtype=rows.dtype, device=rows.device).index_add(0, bag, rows)
    count = torch.zeros_like(starts).index_add(0, bag, kept.to(starts.dtype))
    if mode == 1:
        bags = torch.div(bags, count.clamp(min=1).unsqueeze(1))
    return bags, bag, count, starts
