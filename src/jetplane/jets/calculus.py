"""The chain rule and the product rule: every operator's rule is one of these, or a composition of them.

For first coefficients x_i and second ones x_ij:

    linear f:       y_i = f(x_i),             y_ij = f(x_ij)
    elementwise f:  y_i = f' x_i,             y_ij = f' x_ij + f'' x_i x_j
    product:        y_i = a_i b + a b_i,      y_ij = a_ij b + a b_ij + a_i b_j + a_j b_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import infinite
from .coefficients import Coefficients, absent, condensed, outer, plain, reshaped, symmetric, writable
from .coefficients import jointly as jointly_coefficients
from .jet import Jet, carried, innermost, is_jet, make, parts, precise
from .mirrored import curved, mirrored, reflected, squared
from .pairs import Sums
from .recorded import TraceChain
from .space import Space

Derivatives = tuple[Tensor | None, Tensor | None]  # f' and f''; None is zero everywhere

BLOCK = 1 << 16  # elements at a time: a few tensors of them fit into the cache


def linear(
    space: Space, x: Any, f: Callable[[Any], Tensor], on_stack: Callable[[Tensor], Tensor], moves: bool = False
) -> Tensor:
    """A linear f: applied to the primal, and to stacks of coefficients (n, *S) by ``on_stack``.

    Args:
        space: of the evaluation.
        x: the argument.
        f: acts on the primal.
        on_stack: acts on stacks.
        moves: whether f moves, repeats and picks elements, and does nothing else.
    """
    p, x1, x2 = parts(x, space)
    y, y2 = f(p), x2.map(on_stack)
    if (held := mirrored(p, x1)) is not None:
        y1 = reflected(space, held, y, y2, None if held.cross is None else on_stack(held.cross))
        if y1 is not None:
            return make(y, y1, y2, space)
    return make(y, x1.moved(on_stack) if moves else x1.map(on_stack), y2, space)


def reshape(space: Space, x: Any, shape: Sequence[int]) -> Tensor:
    """Reshaped; where that takes copies of coefficients, they are in the memory of the evaluation."""
    y = parts(x, space)[0].reshape(shape)
    return linear(space, x, lambda _: y, lambda c: reshaped(space, c, (c.shape[0], *y.shape)), moves=True)


def jointly(space: Space, xs: Sequence[Any], y: Tensor, on_stacks: Callable[..., Tensor]) -> Tensor:
    """A function that is linear in several tensors together, with the result y.

    ``on_stacks`` takes a stack (n, *S) for each of them.
    """
    every = [parts(x, space) for x in xs]
    shapes = [p.shape if isinstance(p, Tensor) else () for p, _, _ in every]
    dtype = carried(y.dtype)
    y1, y2 = (
        jointly_coefficients(space, on_stacks, [of[order] for of in every], shapes, dtype, y.device) for order in (1, 2)
    )
    return make(y, y1, y2, space)


def chain(space: Space, x: Any, y: Tensor, d1: Tensor | None, d2: Tensor | None, singular: bool = True) -> Tensor:
    """Elementwise y = f(x): ``y_i = f' x_i`` and ``y_ij = f' x_ij + f'' x_i x_j``.

    Args:
        space: of the evaluation.
        x: the argument.
        y: the value.
        d1: the first derivative, f'; None is zero, and a boolean one selects.
        d2: the second.
        singular: whether derivatives may be infinite or NaN where x does not move: see `jetplane.jets.infinite`.
    """
    p, x1, x2 = parts(x, space)
    if d1 is not None and d1.dtype == torch.bool:
        return make(y, infinite.selected(d1, x1), infinite.selected(d1, x2), space)
    if singular and not infinite.finite(d1, d2):
        return chain_many(space, (x,), y, (d1,), {} if d2 is None else {(0, 0): d2})
    traced = space.order == 2 and space.structure.is_trace and not y.is_complex()
    if traced and d1 is not None and d2 is not None and x1 and x1.sparse is None:
        held = x1.tensor, x2.tensor if x2 else None, d1, d2
        if x1.rows is None and plain(*held) and not writable(*held) and d1.shape == d2.shape == p.shape:
            y1, y2 = TraceChain.apply(condensed(held[0]), *held[1:])  # type: ignore[misc]
            return make(y, Coefficients(space, 1, y1), Coefficients(space, 2, y2), space)
    y1, y2 = (absent(space, 1), absent(space, 2)) if d1 is None else (x1 * d1, x2 * d1)
    if d2 is not None and x1 and space.order == 2:
        if space.structure.single:
            y2 += outer(x1 * d2, x1)
        else:  # a few sums of many products: f'' is a factor of the sums
            x1 = x1.condensed()
            y2 = y2.add_product(d2, outer(x1, x1).formed())
    return make(y, y1, y2, space)


def elementwise(
    space: Space,
    x: Any,
    y: Tensor,
    derivatives: Callable[[Tensor, Tensor], Derivatives],
    slope: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    blocks: bool = True,
    singular: bool = True,
) -> Tensor:
    """`chain` with derivatives that are computed from primal and result, a cache's size at a time.

    Args:
        space: of the evaluation.
        x: the argument.
        y: the primal result.
        derivatives: gives f' and f'' for elements of the primal and of the result, in the dtype of coefficients.
        slope: ``c f'`` in one pass, from c, primal and result: where only first coefficients are wanted.
        blocks: whether f' at an element depends on that element alone.
        singular: see `chain`.
    """
    p, x1, x2 = parts(x, space)

    def of(p: Tensor, y: Tensor) -> Derivatives:
        d1, d2 = derivatives(precise(p if p.dtype == y.dtype else p.to(y.dtype)), precise(y))
        return d1, d2 if space.order == 2 else None

    if slope is not None and space.order == 1 and writable(p) and p.dtype == y.dtype and not y.is_complex():
        quick = slope

        def of(p: Tensor, y: Tensor) -> Derivatives:
            return quick(torch.ones_like(y, dtype=carried(y.dtype)), precise(p), precise(y)), None

        if space.k == 1 and x1 and not x2 and writable(x1.tensor):
            y1 = x1.map(lambda c: quick(c[0].contiguous(), precise(p), precise(y))[None])
            return make(y, y1, absent(space, 2), space)
    if (held := mirrored(p, x1)) is not None and blocks and not singular:
        d1, d2 = of(p, y)
        if d1 is None or d2 is None or d1.dtype == torch.bool:
            return chain(space, x, y, d1, d2, singular)
        y2 = (x2 * d1).plus(Coefficients(space, 2, squared(held)) * d2)
        y1 = reflected(space, held, y, y2, curved(held, innermost(d1), innermost(d2)))
        return chain(space, x, y, d1, d2, singular) if y1 is None else make(y, y1, y2, space)
    if held is None and blocks and p.numel() > BLOCK and not y.is_complex():
        result = _in_blocks(space, p, x1, x2, y, of, singular)
        if result is not NotImplemented:
            return result
    return chain(space, x, y, *of(p, y), singular)


def _in_blocks(
    space: Space,
    p: Tensor,
    x1: Coefficients,
    x2: Coefficients,
    y: Tensor,
    of: Callable[..., Derivatives],
    singular: bool,
) -> Any:
    """`chain`, some elements at a time: the derivatives stay in the cache and take no memory of the result's size."""
    structure, sparse = space.structure, x1.sparse
    if sparse is not None and space.order == 2:
        if not structure.is_trace:
            return NotImplemented
        structure = Sums.trace(len(sparse.rows))
    if not x1 or (x2 and (x1.rows is not None or x2.rows is not None)):
        return NotImplemented
    first, second = condensed(x1.tensor if sparse is None else sparse.rows), x2.tensor if x2 else None
    shared = first.dim() > 1 and first.shape[1] < p.shape[0] and first.shape[2:] == p.shape[1:]  # by all points
    held = [t for t in (p, y, first, second) if t is not None]
    if not writable(*held) or not all(t.is_contiguous() for t in held) or not (shared or first.shape[1:] == p.shape):
        return NotImplemented
    d1, d2 = of(p.flatten()[:1], y.flatten()[:1])
    if d1 is None or (second is None and d2 is not None and (structure.single or x1.rows is not None)):
        return NotImplemented  # products that may never be formed are `chain`'s
    weigh = infinite.select_into if d1.dtype == torch.bool else torch.mul
    rows, inner = (p.shape[0], p.numel() // p.shape[0]) if shared else (p.numel(), 1)
    p, flat = p.view(rows, inner), y.view(rows, inner)
    first = first.view(first.shape[0], -1, inner)
    y1 = space.memory.empty((first.shape[0], rows, inner), first)
    y2 = None if second is None and d2 is None else space.memory.empty((structure.count, rows, inner), first)
    second = None if second is None else second.view(structure.count, rows, inner)
    sums = structure.outer(first, first) if shared and not structure.single else None
    step = max(1, BLOCK // inner)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        d1, d2 = of(p[part], flat[part])
        assert d1 is not None
        if singular and not infinite.finite(d1, d2):
            return NotImplemented
        c = first if shared else first[:, part]
        weigh(c, d1, out=y1[:, part])
        if y2 is None:
            continue
        new = y2[:, part]
        new.zero_() if second is None else weigh(second[:, part], d1, out=new)
        if d2 is None:
            continue
        if structure.single:
            structure.add_outer(new, d2 * c, c)
        else:  # a few sums of many products: f'' is a factor of the sums
            products = sums
            if products is None:
                products = torch.zeros_like(new)
                structure.add_outer(products, c, c)
            new.addcmul_(products, d2)
    y1 = y1.view(first.shape[0], *y.shape)
    if sparse is not None:
        y1 = sparse.with_rows(y1)
    y2 = None if y2 is None else y2.view(structure.count, *y.shape)
    return make(y, Coefficients(space, 1, y1, x1.rows), Coefficients(space, 2, y2), space)


def chain_many(
    space: Space,
    xs: Sequence[Any],
    y: Tensor,
    gradient: Sequence[Tensor | None],
    hessian: dict[tuple[int, int], Tensor],
) -> Tensor:
    """Elementwise y = f(x_0, x_1, …) by its partial derivatives, with broadcasting.

    ``hessian[a, b]`` with a <= b holds the mixed second derivative; None and an absent one are zero.
    """
    every = [[c.expanded(y.shape) for c in parts(x, space)[1:]] for x in xs]
    times, crossed = _times, outer
    if not infinite.finite(*gradient, *hessian.values()):
        times, crossed = infinite.product, infinite.outer
    y1, y2 = absent(space, 1), absent(space, 2)
    for g, (x1, x2) in zip(gradient, every, strict=True):
        if g is not None:
            y1 += times(g, x1)
            y2 += times(g, x2)
    if space.order == 2:
        for (a, b), h in hessian.items():
            left, right = times(h, every[a][0]), every[b][0]
            y2 += crossed(left, right)
            if a != b:
                y2 += crossed(right, left)
    return make(y, y1, y2, space)


def _times(d: Tensor, c: Coefficients) -> Coefficients:
    return c * d


def multiply(space: Space, a: Any, b: Any) -> Tensor:
    """The elementwise product, with broadcasting."""
    if a is b and is_jet(a, space):
        p = precise(a.primal)
        return chain(space, a, torch.mul(a.primal, a.primal), 2 * p, p.new_full((), 2))
    pa, a1, a2 = parts(a, space)
    pb, b1, b2 = parts(b, space)
    y = torch.mul(pa, pb)
    y1 = (a1 * pb).add_product(pa, b1)
    y2 = (a2 * pb).add_product(pa, b2)
    if a1 and b1:
        ndim = y.dim()
        y2 += symmetric(a1.lifted(ndim), b1.lifted(ndim))
    return make(y, y1, y2, space)


def add_jets(space: Space, a: Any, b: Any, y: Tensor, alpha: Any = 1) -> Tensor:
    """``a + alpha * b`` with broadcasting; y is the primal result."""
    _, a1, a2 = parts(a, space)
    _, b1, b2 = parts(b, space)
    return make(y, a1.plus(b1, alpha), a2.plus(b2, alpha), space)


def as_jet(x: Any, space: Space) -> Jet:
    """A jet of this space: x itself, or a constant as a jet without coefficients."""
    return x if is_jet(x, space) else Jet(x, None, None, space)
