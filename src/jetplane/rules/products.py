"""Bilinear operators: matrix products and convolutions, where nearly all of the time goes.

    y_i  = f(a_i, b) + f(a, b_i)
    y_ij = f(a_ij, b) + f(a, b_ij) + f(a_i, b_j) + f(a_j, b_i)

`bilinear` knows this formula and which products to batch; an operator brings a `Form`, its product
of two plain tensors. Where both sides have first coefficients the cross terms and the first-order
terms are interpolated from products of sums (see `_interpolated`): 1 + K + K(K+1)/2 products
instead of 1 + 2K + K², the number of coefficients that the result has.

Tangents of low rank, ``b_i = left_i right_i^T``, cost no product at all: ``f(a, b_i)`` is the product of a
with the few rows of ``right_i``, spread by ``left_i`` (see `_low_rank`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..jets.jet import (
    Jet,
    Space,
    apply,
    broadcast,
    carried,
    is_jet,
    linear,
    low_rank,
    make,
    parts,
    plain,
    precise,
    primal,
    reshaped,
)
from ..jets.structured import LowRank, Stacked, Tangents
from .registry import aten, register

BLOCK = 1 << 17  # elements of a sum of weights that are held at a time
IMAGES = 1 << 21  # elements of images that are convolved at a time
NARROW = 96  # rows or columns below which reading a factor costs as much as multiplying it


class Form(ABC):
    """A bilinear map of two plain tensors, and how stacks of n tensors pass through it."""

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The product."""

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """Products of each tensor of the stack a with the tensor b."""
        return torch.stack([self(t, b) for t in a.unbind(0)])

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """Products of the tensor a with each tensor of the stack b."""
        return torch.stack([self(a, t) for t in b.unbind(0)])

    def both(self, space: Space, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        """``f(a_i, b) + f(a, b_i)`` for each direction."""
        return _plus(self.left(space, da, b), self.right(space, a, db))

    def into(self, out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
        """Write the product to ``out``, or add it to what is there."""
        y = self(a, b)
        if keep:
            out.add_(y)
        else:
            out.copy_(y)

    def of_sums(self, out: Tensor, a: Tensor, da: Tensor, b: Tensor, db: Tensor, scale: float, work: Work) -> None:
        """Write ``f(a + scale da, b + scale db)``."""
        left = torch.add(a, da, alpha=scale, out=work("left", a))
        right = torch.add(b, db, alpha=scale, out=work("right", b))
        self.into(out, left, right, False)

    def pays(self, a: Tensor, b: Tensor) -> bool:
        """Whether a product costs so much more than sums of its factors that interpolation pays."""
        return False

    by_rows = False  # whether each row of b, along its first axis, makes a channel of its own: the second axis of y

    def spread(self, space: Space, onto: Tensor | None, inner: Tensor, left: Tensor) -> Tensor:
        """``onto[n] + sum_m inner[n, :, m] left[n, m]``: channels m spread to those of the result.

        Args:
            space: of the evaluation.
            onto: a stack of results (n, N, channels, ...), which may be overwritten, or None.
            inner: (n, N, m, ...).
            left: (n, m, channels).
        """
        if not plain(onto, inner, left):
            y = torch.einsum("nbm...,nmc->nbc...", inner, left)
            return y if onto is None else onto + y
        left = left.reshape(*left.shape[:2], 1, left.shape[2], *[1] * (inner.dim() - 3))
        if onto is None:
            onto = apply(space, torch.mul, inner[:, :, :1], left[:, 0])
            inner, left = inner[:, :, 1:], left[:, 1:]
        for m in range(left.shape[1]):
            onto.addcmul_(inner[:, :, m : m + 1], left[:, m])
        return onto


class Work:
    """Buffers that the products of one operator share: fresh memory costs as much as the sums."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """The buffer of this name, shaped as a tensor."""
        held = self._held.get(name)
        if held is None or held.shape != like.shape:
            held = self._held[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return held


def bilinear(space: Space, form: Form, a: Any, b: Any, y: Tensor | None = None) -> Tensor:
    """The jet of ``form(a, b)``; ``y`` is its primal where that is known already."""
    if form.by_rows and is_jet(b, space):
        if isinstance(b.first, LowRank):
            return _low_rank(space, form, a, b.primal, b.first, y)
        if isinstance(b.first, Stacked) and space.order == 1:
            return _stacked(space, form, a, b.primal, b.first, y)
    pa, fa, sa = parts(a, space)
    pb, fb, sb = parts(b, space)
    y = form(pa, pb) if y is None else y
    half = y.dtype != carried(y.dtype)
    pa, pb = precise(pa), precise(pb)
    if fa is not None and fb is not None and space.order == 2:
        way = _direct
        if form.pays(pa, pb) and not half:  # y in half precision is too coarse to be taken off a product
            way = _interpolated if plain(pa, fa, pb, fb) else _interpolated_apart
        first, second = way(space, form, pa, fa, pb, fb, y)
    else:
        first, second = None, None
        if fa is not None:
            first = form.left(space, fa, pb) if fb is None else form.both(space, pa, fa, pb, fb)
        elif fb is not None:
            first = form.right(space, pa, fb)
    if sa is not None:
        second = _plus(second, form.left(space, sa, pb))
    if sb is not None:
        second = _plus(second, form.right(space, pa, sb))
    return make(y, first, second, space)


def _low_rank(space: Space, form: Form, a: Any, pb: Tensor, tangents: LowRank, y: Tensor | None) -> Tensor:
    """The jet of a product with a parameter whose tangents are of low rank.

    y_i  = f(a_i, b) + f(a, right_i) left_i
    y_ij = f(a_ij, b) + f(a_i, right_j) left_j + f(a_j, right_i) left_i
    """
    pa, fa, sa = parts(a, space)
    y = form(pa, pb) if y is None else y
    pa, pb = precise(pa), precise(pb)
    first = _along(space, form, pa, tangents, None if fa is None else form.left(space, fa, pb))
    second = None if sa is None else form.left(space, sa, pb)
    if fa is not None and space.order == 2:
        second = form.spread(space, second, *_crossed(space, form, fa, _rows(tangents), tangents.left))
    return make(y, first, second, space)


def _rows(tangents: LowRank) -> Tensor:
    """The right factors as the rows of one weight."""
    return tangents.right.reshape(-1, *tangents.shape[2:])


def _along(space: Space, form: Form, a: Tensor, tangents: LowRank, onto: Tensor | None) -> Tensor:
    """``onto + f(a, right_i) left_i`` for each direction."""
    inner = form(a, _rows(tangents)).unflatten(1, tangents.left.shape[:2]).movedim(1, 0)
    return form.spread(space, onto, inner, tangents.left)


def _stacked(space: Space, form: Form, a: Any, pb: Tensor, tangents: Stacked, y: Tensor | None) -> Tensor:
    """First coefficients of a product with a parameter whose tangents are of several kinds."""
    pa, fa, sa = parts(a, space)
    y = form(pa, pb) if y is None else y
    pa, pb = precise(pa), precise(pb)
    first = [None] * len(tangents.parts)
    if fa is not None:
        first = form.left(space, fa, pb).split([part.shape[0] for part in tangents.parts])
    own = []
    for onto, part in zip(first, tangents.parts, strict=True):
        if isinstance(part, LowRank):
            own.append(_along(space, form, pa, part, onto))
        else:
            product = form.right(space, pa, part.formed() if isinstance(part, Tangents) else part)
            own.append(product if onto is None else onto + product)
    return make(y, torch.cat(own), None if sa is None else form.left(space, sa, pb), space)


def _crossed(space: Space, form: Form, fa: Tensor, rows: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """``f(a_i, right_j)`` and ``f(a_j, right_i)`` for each pair, (pairs, N, 2r, ...), and what spreads them."""
    b, r = space.block, left.shape[1]
    upper = torch.triu_indices(b, b, device=fa.device)
    i, j = upper[0], upper[1]
    inner, outer = [], []
    for n in range(0, space.k, b):  # each plane's directions meet each other alone
        cross = form.left(space, fa[n : n + b], rows[n * r : (n + b) * r]).unflatten(2, (b, r)).movedim(2, 1)
        inner.append(torch.cat([cross[i, j], cross[j, i]], 2))
        own = left[n : n + b]
        outer.append(torch.cat([own[j], own[i]], 1))
    return torch.cat(inner), torch.cat(outer)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    if total is None:
        return term
    return total.add_(term) if plain(total, term) else total + term


def _direct(
    space: Space, form: Form, pa: Tensor, fa: Tensor, pb: Tensor, fb: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """First and second coefficients, product by product."""
    if not plain(pa, fa, pb, fb):
        first = form.left(space, fa, pb) + form.right(space, pa, fb)
        return first, torch.stack([form(fa[i], fb[j]) + form(fa[j], fb[i]) for i, j in space.indices()])
    first = form.left(space, fa, pb)
    for i in range(space.k):
        form.into(first[i], pa, fb[i], True)
    second = space.memory.empty((space.pairs, *y.shape), first)
    for n, (i, j) in enumerate(space.indices()):
        form.into(second[n], fa[i], fb[j], False)
        if i == j:
            second[n].mul_(2)
        else:
            form.into(second[n], fa[j], fb[i], True)
    return first, second


def _interpolated(
    space: Space, form: Form, pa: Tensor, fa: Tensor, pb: Tensor, fb: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """First and second coefficients from products of sums, as Karatsuba multiplies polynomials.

    With directions scaled by s_i so that all products are of one size (which keeps cancellation at
    the rounding error of the terms themselves) and D_i = s_i² f(a_i, b_i):

        y_ii           = 2 D_i / s_i²
        s_i y_i        = f(a + s_i a_i, b + s_i b_i) - f(a, b) - D_i
        s_i s_j y_ij   = f(s_i a_i + s_j a_j, s_i b_i + s_j b_j) - D_i - D_j
    """
    s = _scales(pa, fa, pb, fb)
    first, second = (space.memory.empty((n, *y.shape), y) for n in (space.k, space.pairs))
    where = {pair: n for n, pair in enumerate(space.indices())}
    work = Work()
    for i in range(space.k):
        own = second[where[i, i]]
        form.into(own, fa[i], fb[i], False)
        form.of_sums(first[i], pa, fa[i], pb, fb[i], s[i], work)
        first[i].sub_(y).div_(s[i]).sub_(own, alpha=s[i])
    for (i, j), n in where.items():
        if i != j:
            ratio = s[j] / s[i]
            form.of_sums(second[n], fa[i], fa[j], fb[i], fb[j], ratio, work)
            second[n].sub_(second[where[i, i]]).div_(ratio).sub_(second[where[j, j]], alpha=ratio)
    for i in range(space.k):
        second[where[i, i]].mul_(2)
    return first, second


def _interpolated_apart(
    space: Space, form: Form, pa: Tensor, fa: Tensor, pb: Tensor, fb: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The same without writing in place: for jets of jets, and for compilers, which fuse the sums."""
    s = _sizes(pa, fa, pb, fb)
    own = [form(fa[i], fb[i]) for i in range(space.k)]
    first, second = [], []
    for i in range(space.k):
        whole = form(pa + s[i] * fa[i], pb + s[i] * fb[i])
        first.append((whole - y) / s[i] - s[i] * own[i])
    for i, j in space.indices():
        if i == j:
            second.append(2 * own[i])
        else:
            ratio = s[j] / s[i]
            both = form(fa[i] + ratio * fa[j], fb[i] + ratio * fb[j])
            second.append((both - own[i]) / ratio - ratio * own[j])
    return torch.stack(first), torch.stack(second)


def _scales(pa: Tensor, fa: Tensor, pb: Tensor, fb: Tensor) -> list[float]:
    return _sizes(pa, fa, pb, fb).tolist()


def _sizes(pa: Tensor, fa: Tensor, pb: Tensor, fb: Tensor) -> Tensor:
    """s_i with ``|a_i| |b_i| s_i² = |a| |b|``; constants for outer levels, whose values do not matter."""
    pa, fa, pb, fb = (_innermost(t) for t in (pa, fa, pb, fb))
    ratio = torch.sqrt(_norms(pa[None]) * _norms(pb[None]) / (_norms(fa) * _norms(fb)))
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1)  # a zero factor needs no scale


def _innermost(x: Tensor) -> Tensor:
    while isinstance(x, Jet):
        x = x.primal
    return x


def _norms(c: Tensor) -> Tensor:
    """Norms of a stack, in single precision at least: half precision would overflow."""
    return torch.linalg.vector_norm(c.flatten(1), dim=1, dtype=torch.promote_types(c.dtype, torch.float32))


# --- matrix products -------------------------------------------------------------------------


class _Rows(Form):
    """``x @ w.T`` for a matrix x of n rows and a weight w as `torch.nn.Linear` keeps it."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self._columns(a, b).t().contiguous() if 1 < b.shape[0] < NARROW else a @ b.t()

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if 1 < b.shape[0] < NARROW or not plain(a, b):
            return self(a.flatten(0, 1), b).view(*a.shape[:-1], b.shape[0])
        out = space.memory.empty((*a.shape[:-1], b.shape[0]), a)
        torch.mm(a.flatten(0, 1), b.t(), out=out.flatten(0, 1))
        return out

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if b.shape[1] < NARROW:  # one product reads a once
            return self._columns(a, b.flatten(0, 1)).unflatten(0, b.shape[:2]).mT.contiguous()
        if not plain(a, b):
            return torch.matmul(a, b.transpose(1, 2))
        out = space.memory.empty((b.shape[0], a.shape[0], b.shape[1]), a)
        for i in range(b.shape[0]):
            torch.mm(a, b[i].t(), out=out[i])
        return out

    def both(self, space: Space, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        if not plain(a, da, b, db) or db.shape[1] < NARROW:
            return super().both(space, a, da, b, db)
        total = self.left(space, da, b)
        for out, weight in zip(total, db, strict=True):
            out.addmm_(a, weight.t())
        return total

    def into(self, out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
        if keep:
            out.addmm_(a, b.t())
        else:
            torch.mm(a, b.t(), out=out)

    def of_sums(self, out: Tensor, a: Tensor, da: Tensor, b: Tensor, db: Tensor, scale: float, work: Work) -> None:
        left = torch.add(a, da, alpha=scale, out=work("left", a))
        step = max(1, BLOCK // max(b.shape[1], 1))
        for start in range(0, b.shape[0], step):  # weights in blocks that stay in the cache
            rows = slice(start, start + step)
            right = torch.add(b[rows], db[rows], alpha=scale, out=work("right", b[rows]))
            torch.mm(left, right.t(), out=out[:, rows])

    def _columns(self, a: Tensor, b: Tensor) -> Tensor:
        """The product transposed: rows of 10 or 30 numbers cost twice as much to make as columns."""
        return b @ a.t()

    def pays(self, a: Tensor, b: Tensor) -> bool:
        return a.shape[0] >= NARROW and b.shape[0] >= NARROW

    by_rows = True

    def spread(self, space: Space, onto: Tensor | None, inner: Tensor, left: Tensor) -> Tensor:
        if not plain(onto, inner, left):
            return torch.matmul(inner, left) if onto is None else onto + torch.matmul(inner, left)
        if onto is None:
            return torch.bmm(inner, left, out=space.memory.empty((*inner.shape[:2], left.shape[2]), left))
        return onto.baddbmm_(inner, left)


class _Batched(Form):
    """``a @ b`` for batches of matrices, (*batch, r, s) and (*batch, s, t): each direction apart, in the cache."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if not plain(a, b):
            return torch.matmul(a, b)
        out = space.memory.empty((*a.shape[:-1], b.shape[-1]), a)
        b = _matrices(b)
        for y, factor in zip(out, a, strict=True):
            torch.bmm(_matrices(factor), b, out=_matrices(y))
        return out

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if not plain(a, b):
            return torch.matmul(a, b)
        out = space.memory.empty((*b.shape[:-2], a.shape[-2], b.shape[-1]), b)
        a = _matrices(a)
        for y, factor in zip(out, b, strict=True):
            torch.bmm(a, _matrices(factor), out=_matrices(y))
        return out

    def both(self, space: Space, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        if not plain(a, da, b, db):
            return super().both(space, a, da, b, db)
        out = space.memory.empty((*da.shape[:-1], b.shape[-1]), da)
        a, b = _matrices(a), _matrices(b)
        for y, left, right in zip(out, da, db, strict=True):
            torch.bmm(_matrices(left), b, out=_matrices(y)).baddbmm_(a, _matrices(right))
        return out

    def into(self, out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
        out, a, b = _matrices(out), _matrices(a), _matrices(b)
        if keep:
            out.baddbmm_(a, b)
        else:
            torch.bmm(a, b, out=out)


def _matrices(x: Tensor) -> Tensor:
    """The batch as one dimension; transposed matrices stay so."""
    if x.dim() == 3:
        return x
    return x.mT.flatten(0, -3).mT if x.stride(-2) == 1 else x.flatten(0, -3)


ROWS, BATCHED = _Rows(), _Batched()


@register("linear")
def _(space: Space, x: Any, weight: Any, bias: Any = None) -> Tensor:
    if weight.dim() == 1:
        y = torch.mv(x, weight) if x.dim() == 2 else torch.matmul(x, weight)
        return y if bias is None else torch.add(y, bias)
    lead = x.shape[:-1]
    rows = x if x.dim() == 2 else _shaped(space, x, (lead.numel(), x.shape[-1]))
    y = F.linear(primal(rows, space), primal(weight, space), primal(bias, space))
    product = bilinear(space, ROWS, rows, weight, y) if bias is None else _biased(space, rows, weight, bias, y)
    return product if x.dim() == 2 else _shaped(space, product, (*lead, weight.shape[0]))


def _shaped(space: Space, x: Any, shape: Sequence[int]) -> Tensor:
    """Reshaped; nobody writes to what a rule makes for itself, so that it need not be known for a view."""
    return linear(space, x, lambda p: p.reshape(shape), lambda c: reshaped(space, c, (c.shape[0], *shape)))


def _biased(space: Space, rows: Any, weight: Any, bias: Any, y: Tensor) -> Tensor:
    unbiased = y
    pb, fb, sb = parts(bias, space)
    if is_jet(rows, space) and is_jet(weight, space) and not low_rank(weight, space) and space.order == 2:
        unbiased = y - pb  # interpolation needs the product itself
    product = bilinear(space, ROWS, rows, weight, unbiased)
    _, first, second = parts(product, space)
    return make(y, _onto(first, fb, y), _onto(second, sb, y), space)


def _onto(c: Tensor | None, bias: Tensor | None, y: Tensor) -> Tensor | None:
    """Coefficients of the product plus those of the bias, of one channel each, in place: the product's are ours."""
    if bias is None:
        return c
    bias = bias.reshape(bias.shape[0], -1, *[1] * (y.dim() - 2))
    if c is None:
        return broadcast(bias, y.shape)
    b = bias[:, None]
    return c.add_(b) if plain(c, b) else c + b


@register("mm")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return bilinear(space, ROWS, a, b.t())


@register("addmm")
def _(space: Space, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _affine(c, torch.mm(a, b), beta, alpha)


@register("bmm")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return bilinear(space, BATCHED, a, b)


@register("baddbmm")
def _(space: Space, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _affine(c, torch.bmm(a, b), beta, alpha)


@register("addbmm")
def _(space: Space, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _affine(c, torch.bmm(a, b).sum(0), beta, alpha)


@register("mv")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return torch.mm(a, b.unsqueeze(1)).squeeze(1)


@register("addmv")
def _(space: Space, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _affine(c, torch.mv(a, b), beta, alpha)


@register("addr")
def _(space: Space, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _affine(c, torch.mul(a.unsqueeze(1), b.unsqueeze(0)), beta, alpha)


@register("dot")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return torch.mul(a, b).sum()


@register("vdot")
def _(space: Space, a: Any, b: Any) -> Tensor:
    return torch.mul(a.conj(), b).sum()


def _affine(c: Any, product: Any, beta: Any, alpha: Any) -> Any:
    if alpha != 1:
        product = torch.mul(product, alpha)
    if beta == 0:
        return product
    return torch.add(product, c if beta == 1 else torch.mul(c, beta))


@register("matmul")
def _(space: Space, a: Any, b: Any) -> Tensor:
    if b.dim() == 1:
        return torch.dot(a, b) if a.dim() == 1 else torch.matmul(a, b.unsqueeze(1)).squeeze(-1)
    if a.dim() == 1:
        return torch.matmul(a.unsqueeze(0), b).squeeze(-2)
    if b.dim() == 2:
        rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
        return torch.mm(rows, b) if a.dim() == 2 else torch.mm(rows, b).reshape(*a.shape[:-1], b.shape[1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return bilinear(space, BATCHED, a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]))


# --- convolutions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Convolution(Form):
    """A convolution of batched images with a kernel, with the settings of ``aten.convolution``."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(
            a,
            b,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        # So many tensors of the stack at a time that the library's own copies of them stay in the cache.
        step = max(1, IMAGES // max(a[0].numel(), 1))
        if step >= len(a) or not plain(a, b):
            return self._images(a, b)
        out = None
        for start in range(0, len(a), step):
            y = self._images(a[start : start + step], b)
            out = space.memory.empty((len(a), *y.shape[1:]), y) if out is None else out
            out[start : start + step].copy_(y)
        assert out is not None
        return out

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if self.groups > 1 or self.transposed:
            return super().right(space, a, b)
        y = self(a, b.flatten(0, 1))  # one convolution with n times the output channels
        return y.unflatten(1, b.shape[:2]).movedim(1, 0)

    def _images(self, a: Tensor, b: Tensor) -> Tensor:
        """A stack of images as one batch."""
        y = self(a.flatten(0, 1), b)
        return y.reshape(*a.shape[:2], *y.shape[1:])

    def pays(self, a: Tensor, b: Tensor) -> bool:
        return True

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.groups == 1 and not self.transposed


@register("convolution")
def _(
    space: Space,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    n = weight.dim() - 2
    full = [list(v) * n if len(v) == 1 else list(v) for v in (stride, padding, dilation, output_padding)]
    form = _Convolution(full[0], full[1], full[2], transposed, full[3], groups)
    product = bilinear(space, form, x, weight)
    if bias is None or x.dim() != weight.dim():
        return product if bias is None else torch.add(product, bias.reshape(-1, *([1] * n)))
    y, first, second = parts(product, space)
    pb, fb, sb = parts(bias, space)
    y = torch.add(y, pb.reshape(-1, *[1] * n))
    return make(y, _onto(first, fb, y), _onto(second, sb, y), space)


@register("_trilinear")
def _(
    space: Space,
    a: Any,
    b: Any,
    c: Any,
    ea: Sequence[int],
    eb: Sequence[int],
    ec: Sequence[int],
    summed: Sequence[int],
    unroll: int = 1,
) -> Tensor:
    for d in ea:
        a = a.unsqueeze(d)
    for d in eb:
        b = b.unsqueeze(d)
    for d in ec:
        c = c.unsqueeze(d)
    return torch.mul(torch.mul(a, b), c).sum(list(summed))
