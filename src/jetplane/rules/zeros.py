"""The chain rule where derivatives may be infinite: what does not move contributes nothing.

A mask in front of a function stops reverse mode: ``relu(x).sqrt()`` has the derivative zero at x < 0, although that
of ``sqrt`` at zero is infinite. In forward mode the mask has made the coefficient zero before, and ``0 * inf`` would
be NaN. Here zero times anything is zero, in each direction apart; what does move where a derivative is infinite gets
an infinite coefficient, as in reverse mode. A mask behind a function selects instead of multiplying, so that what is
not finite before it is forgotten.

The usual formulas serve wherever the derivatives are finite, which is seen from their sums.

First derivatives follow reverse mode wherever that is finite. Where the second derivative does not exist:

- at a kink it is that of the piece whose first derivative is returned: 0 for relu, abs, clamp and their like, 1 within
  and 0 from ``delta`` on for huber_loss, w for prelu at zero;
- maxima, minima, medians and sorts have that of the chosen elements, and of the mean of those that tie;
- norms, deviations and distances have 0 at zero, as their first derivative, and so has atan2 at the origin;
- binary_cross_entropy takes ``p (1 - p)`` to be at least 1e-12;
- functions with a limit at infinity have 0 there;
- where it grows without bound (sqrt, and powers between 1 and 2, at zero) it is infinite along what moves, and an
  evaluation that asks for it raises `NonFiniteError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..jets import jet
from ..jets.jet import Space, add, broadcast, make, outer, parts, plain


def finite(*derivatives: Tensor | None) -> bool:
    """Whether all are known to be finite. On an accelerator this waits for the sum of each; a compiler cannot know."""
    return all(d is None or (plain(d) and bool(torch.isfinite(d.sum()))) for d in derivatives)


def product(d: Tensor | None, c: Tensor | None) -> Tensor | None:
    """``d * c`` for a derivative and a stack of coefficients, 0 for zero times infinity; None is zero."""
    return None if d is None or c is None else _cleared((d == 0) | (c == 0), d * c)


def _cleared(still: Tensor, y: Tensor) -> Tensor:
    """Zero where nothing moves and y is not finite. Of nested jets a finite zero may move with the outer ones."""
    return torch.where(still & ~torch.isfinite(y), 0, y)


def strong_outer(space: Space, a: Tensor, b: Tensor) -> Tensor:
    """``a_i * b_j`` for each pair i <= j, 0 for zero times infinity."""
    moves = outer(space, (a != 0).to(a.dtype), (b != 0).to(b.dtype))
    return _cleared(moves == 0, outer(space, a, b))


def select(condition: Tensor, c: Tensor | None) -> Tensor | None:
    """Coefficients where a condition holds, zero elsewhere, whatever they are there."""
    return None if c is None else torch.where(condition, c, 0)


def select_into(c: Tensor, condition: Tensor, out: Tensor) -> Tensor:
    """The same, written to memory that is given."""
    return torch.where(condition, c, c.new_zeros(()), out=out)


def chain(space: Space, x: Any, y: Tensor, d1: Tensor | None, d2: Tensor | None, singular: bool = True) -> Tensor:
    """As `jetplane.jets.jet.chain`; a boolean first derivative selects.

    Args:
        space: of the evaluation.
        x: the argument.
        y: the value.
        d1: the first derivative, f'(x).
        d2: the second.
        singular: whether the derivatives may be infinite or NaN where x does not move.
    """
    if d1 is not None and d1.dtype == torch.bool:
        _, first, second = parts(x, space)
        return make(y, select(d1, first), select(d1, second), space)
    if not singular or finite(d1, d2):
        return jet.chain(space, x, y, d1, d2)
    return chain_many(space, (x,), y, (d1,), {} if d2 is None else {(0, 0): d2})


def chain_many(
    space: Space,
    xs: Sequence[Any],
    y: Tensor,
    gradient: Sequence[Tensor | None],
    hessian: dict[tuple[int, int], Tensor],
) -> Tensor:
    """As `jetplane.jets.jet.chain_many`, for derivatives that may be infinite."""
    if finite(*gradient, *hessian.values()):
        return jet.chain_many(space, xs, y, gradient, hessian)
    every = [parts(x, space) for x in xs]
    firsts = [broadcast(first, y.shape) for _, first, _ in every]
    y1 = y2 = None
    for d, first, (_, _, second) in zip(gradient, firsts, every, strict=True):
        y1 = add(y1, product(d, first))
        y2 = add(y2, product(d, broadcast(second, y.shape)))
    if space.order == 2:
        for (a, b), d in hessian.items():
            fa, fb = firsts[a], firsts[b]
            if fa is None or fb is None:
                continue
            bent = product(d, fa)
            assert bent is not None
            y2 = add(y2, strong_outer(space, bent, fb))
            if a != b:
                y2 = add(y2, strong_outer(space, fb, bent))
    return make(y, y1, y2, space)
