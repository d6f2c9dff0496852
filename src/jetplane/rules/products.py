"""Bilinear operators: matrix products and convolutions, where nearly all of the time goes.

    y_i  = f(a_i, b) + f(a, b_i)
    y_ij = f(a_ij, b) + f(a, b_ij) + f(a_i, b_j) + f(a_j, b_i)

`bilinear` knows this formula; an operator brings a `Form`, its product of two tensors (`jetplane.rules.forms`).

Tangents of low rank, ``b_i = left_i right_i^T``, cost no product at all: ``f(a, b_i)`` is the product of a
with the few rows of ``right_i``, spread by ``left_i`` (see `_low_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..jets import (
    Axes,
    Coefficients,
    LowRank,
    PairStructure,
    Space,
    Stacked,
    Tangents,
    absent,
    aligned,
    carried,
    is_jet,
    make,
    mirrored,
    parts,
    plain,
    precise,
    primal,
    reflected,
    reshape,
    writable,
)
from .forms import BATCHED, ROWS, Convolution, Form, InPlace
from .registry import register

Rows = tuple[int, ...] | None  # which directions are there; None for all


def bilinear(space: Space, form: Form, a: Any, b: Any, y: Tensor | None = None) -> Tensor:
    """The jet of ``form(a, b)``; ``y`` is its primal where that is known already."""
    pa, a1, a2 = parts(a, space)
    pb, b1, b2 = parts(b, space)
    y = form(pa, pb) if y is None else y
    half = y.dtype != carried(y.dtype)
    pa, pb = precise(pa), precise(pb)
    structured = b1.structured if form.by_rows else None
    if (held := mirrored(pa, a1)) is not None and plain(pb):
        y2 = _left(space, form, a2, pb)
        cross = None if held.cross is None else form.chosen(held.cross, pb).left(space, held.cross, pb)
        y1 = reflected(space, held, y, y2, cross)
        if y1 is not None:
            return make(y, y1, y2, space)
    if isinstance(a1.held, Axes) and form is ROWS and plain(pb) and not (a2 or b1 or b2):
        return make(y, Coefficients(space, 1, a1.held.times(pb), a1.rows), absent(space, 2), space)
    form = form.chosen(pa, pb, *(c.tensor for c in (a1, a2, b2) if c), b1.held)
    if isinstance(structured, LowRank):
        y1, y2 = _low_rank(space, form, pa, a1, pb, structured, b1.rows)
    elif isinstance(structured, Stacked) and space.order == 1:
        y1, y2 = _stacked(space, form, pa, a1, pb, structured, b1.rows), absent(space, 2)
    elif a1 and b1:
        y1, y2 = _crossed(space, form, pa, a1, pb, b1, y, half)
    else:
        y1, y2 = _left(space, form, a1, pb) + _right(space, form, pa, b1), absent(space, 2)
    y2 = _onto_second(space, form, y2, a2, pb)
    y2 += _right(space, form, pa, b2)
    return make(y, y1, y2, space)


def _onto_second(space: Space, form: Form, y: Coefficients, a: Coefficients, b: Tensor) -> Coefficients:
    """``y_ij + f(a_ij, b)``, added up where y is, which is this operator's own."""
    if isinstance(form, InPlace) and y and a and y.owned and y.rows == a.rows and writable(y.tensor, a.tensor, b):
        for out, one in zip(y.tensor, a.tensor, strict=True):
            form.into(out, one, b, True)
        return y
    return y.add(_left(space, form, a, b))


def _left(space: Space, form: Form, a: Coefficients, b: Tensor) -> Coefficients:
    if (
        form.by_rows
        and a
        and a.tensor.dim() == 3
        and plain(a.tensor)
        and a.tensor.stride(1) == 0 < a.tensor.shape[1] - 1
    ):
        # Rows that are the same are multiplied once: coordinate directions of all points, say.
        rows = a.tensor.shape[1]
        return a.map(lambda c: form.left(space, c[:, :1], b).expand(-1, rows, -1))
    return a.map(lambda c: form.left(space, c, b), True)


def _right(space: Space, form: Form, a: Tensor, b: Coefficients) -> Coefficients:
    return b.map(lambda c: form.right(space, a, c), True)


def _crossed(
    space: Space, form: Form, pa: Tensor, a1: Coefficients, pb: Tensor, b1: Coefficients, y: Tensor, half: bool
) -> tuple[Coefficients, Coefficients]:
    """``f(a_i, b) + f(a, b_i)``, and ``f(a_i, b_j) + f(a_j, b_i)`` where second coefficients are made."""
    rows, fa, fb = aligned(a1, b1)
    structure, kept = space.structure, rows
    if rows is not None and space.order == 2:
        found = space.structure.restricted(rows)
        structure, kept = found or (None, None)
    if space.order == 1 or structure is None:
        if a1.rows == b1.rows:
            return Coefficients(space, 1, form.both(space, pa, fa, pb, fb), rows, True), absent(space, 2)
        return _left(space, form, a1, pb) + _right(space, form, pa, b1), absent(space, 2)
    interpolate = form.pays(pa, pb) and not half  # y in half precision is too coarse to be taken off a product
    first, second = form.crossed(space, structure, pa, fa, pb, fb, y if not half else precise(y), interpolate)
    return Coefficients(space, 1, first, rows, True), Coefficients(space, 2, second, kept, True)


def _low_rank(
    space: Space, form: Form, pa: Tensor, a1: Coefficients, pb: Tensor, tangents: LowRank, rows: Rows
) -> tuple[Coefficients, Coefficients]:
    """Coefficients of a product with a parameter whose tangents are of low rank.

    y_i  = f(a_i, b) + f(a, right_i) left_i
    y_ij = f(a_i, right_j) left_j + f(a_j, right_i) left_i
    """
    if a1 and a1.rows != rows:  # factors take part as zeros where the other has directions of its own
        zeros = Coefficients(space, 1, tangents.left, rows), Coefficients(space, 1, tangents.right, rows)
        rows, fa, left, right = aligned(a1, *zeros)
        a1, tangents = Coefficients(space, 1, fa, rows), LowRank(left, right, tangents.shape[1:])
    onto = _left(space, form, a1, pb)
    first = Coefficients(space, 1, _along(space, form, pa, tangents, onto.tensor if onto else None), rows, True)
    if not a1 or space.order == 1:
        return first, absent(space, 2)
    structure, kept = space.structure, rows
    if rows is not None:
        found = space.structure.restricted(rows)
        if found is None:
            return first, absent(space, 2)
        structure, kept = found
    second = _crossed_factors(space, structure, form, a1.tensor, _rows(tangents), tangents.left)
    return first, Coefficients(space, 2, second, kept, True)


def _rows(tangents: LowRank) -> Tensor:
    """The right factors as the rows of one weight."""
    return tangents.right.reshape(-1, *tangents.shape[2:])


def _along(space: Space, form: Form, a: Tensor, tangents: LowRank, onto: Tensor | None) -> Tensor:
    """``onto + f(a, right_i) left_i`` for each direction."""
    inner = form(a, _rows(tangents)).unflatten(1, tangents.left.shape[:2]).movedim(1, 0)
    return form.spread(space, onto, inner, tangents.left)


def _stacked(
    space: Space, form: Form, pa: Tensor, a1: Coefficients, pb: Tensor, tangents: Stacked, rows: Rows
) -> Coefficients:
    """First coefficients of a product with a parameter whose tangents are of several kinds."""
    onto = _left(space, form, a1, pb)
    apart = bool(onto) and onto.rows != rows
    sizes = [part.shape[0] for part in tangents.parts]
    own: list[Tensor] = []
    totals = onto.tensor.split(sizes) if onto and not apart else [None] * len(sizes)
    for total, part in zip(totals, tangents.parts, strict=True):
        if isinstance(part, LowRank):
            own.append(_along(space, form, pa, part, total))
        else:
            product = form.right(space, pa, part.materialized() if isinstance(part, Tangents) else part)
            own.append(product if total is None else total + product)
    found = Coefficients(space, 1, torch.cat(own), rows, True)
    return onto + found if apart else found


def _crossed_factors(
    space: Space, structure: PairStructure, form: Form, fa: Tensor, rows: Tensor, left: Tensor
) -> Tensor:
    """``f(a_i, right_j) left_j + f(a_j, right_i) left_i`` for each second coefficient."""
    r, terms = left.shape[1], structure.terms()
    inner, outer = [], []
    for block in structure.blocks:  # these directions meet each other alone
        own = [t for t in terms if block.start <= t.i < block.stop]
        i, j = (torch.tensor([index - block.start for index in side], device=fa.device)
                for side in ([t.i for t in own], [t.j for t in own]))  # fmt: skip
        b, factors = block.stop - block.start, left[block]
        cross = form.left(space, fa[block], rows[block.start * r : block.stop * r]).unflatten(2, (b, r)).movedim(2, 1)
        inner.append(torch.cat([cross[i, j], cross[j, i]], 2))
        outer.append(torch.cat([factors[j], factors[i]], 1))
    products, factors = torch.cat(inner), torch.cat(outer)
    if structure.single:
        return form.spread(space, None, products, factors)
    sums = []
    weights = torch.tensor([t.weight for t in terms], dtype=left.dtype, device=left.device)
    factors = factors * weights[:, None, None]
    for n in range(structure.count):  # the terms of a sum are channels of one product
        which = torch.tensor([m for m, t in enumerate(terms) if t.n == n], device=left.device)
        channels = products[which].transpose(0, 1).flatten(1, 2)[None]
        sums.append(form.spread(space, None, channels, factors[which].flatten(0, 1)[None]))
    return torch.cat(sums)


# --- matrix products -------------------------------------------------------------------------


@register("linear")
def _(space: Space, x: Any, weight: Any, bias: Any = None) -> Tensor:
    if weight.dim() == 1:
        y = torch.mv(x, weight) if x.dim() == 2 else torch.matmul(x, weight)
        return y if bias is None else torch.add(y, bias)
    _, x1, x2 = parts(x, space)
    by_pieces = x1.is_joined or x2.is_joined or x1.gathered(-1)
    if by_pieces and not (is_jet(weight, space) or is_jet(bias, space)):
        return _of_pieces(space, x, weight, F.linear(primal(x, space), weight, bias))
    lead = x.shape[:-1]
    rows = x if x.dim() == 2 else reshape(space, x, (lead.numel(), x.shape[-1]))
    y = F.linear(primal(rows, space), primal(weight, space), primal(bias, space))
    data = bias is None or not (is_jet(weight, space) or is_jet(bias, space))
    product = bilinear(space, ROWS, rows, weight, y) if data else _biased(space, rows, weight, bias, y)
    return product if x.dim() == 2 else reshape(space, product, (*lead, weight.shape[0]))


def _of_pieces(space: Space, x: Any, weight: Tensor, y: Tensor) -> Tensor:
    """The product with a constant weight, each piece of x with its own columns."""

    def product(c: Tensor, place: slice) -> Tensor:
        w = precise(weight)[:, place]
        found = ROWS.chosen(c, w).left(space, c.reshape(c.shape[0], -1, c.shape[-1]), w)
        return found.view(*c.shape[:-1], w.shape[0])

    _, x1, x2 = parts(x, space)
    return make(y, x1.map_pieces(product), x2.map_pieces(product), space)


def _biased(space: Space, rows: Any, weight: Any, bias: Any, y: Tensor) -> Tensor:
    unbiased = y
    _, w1, _ = parts(weight, space)
    if parts(rows, space)[1] and w1 and not isinstance(w1.structured, LowRank) and space.order == 2:
        unbiased = y - primal(bias, space)  # interpolation needs the product itself
    return _onto(space, bilinear(space, ROWS, rows, weight, unbiased), bias, y)


def _onto(space: Space, product: Any, bias: Any, y: Tensor) -> Tensor:
    """The product with a bias of one number for each channel, in place of the product, which is the rule's own.

    ``y`` is the primal result.
    """
    _, y1, y2 = parts(product, space)
    _, b1, b2 = parts(bias, space)

    def channels(c: Tensor) -> Tensor:
        return c.reshape(c.shape[0], 1, -1, *[1] * (y.dim() - 2))

    y1, y2 = (c.own().add(of_bias.map(channels)) for c, of_bias in ((y1, b1), (y2, b2)))
    return make(y, y1, y2, space)


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
        if parts(a, space)[1].gathered(-1) and not is_jet(b, space):
            return F.linear(a, b.t())
        rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
        return torch.mm(rows, b) if a.dim() == 2 else torch.mm(rows, b).reshape(*a.shape[:-1], b.shape[1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return bilinear(space, BATCHED, a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]))


# --- convolutions -----------------------------------------------------------------------------


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
    form = Convolution(full[0], full[1], full[2], transposed, full[3], groups)
    product = bilinear(space, form, x, weight)
    if bias is None or x.dim() != weight.dim():
        return product if bias is None else torch.add(product, bias.reshape(-1, *([1] * n)))
    y = torch.add(primal(product, space), primal(bias, space).reshape(-1, *[1] * n))
    return _onto(space, product, bias, y)


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
