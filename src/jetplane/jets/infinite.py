"""Derivatives that may be infinite: what does not move contributes nothing.

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

import torch
from torch import Tensor

from .coefficients import Coefficients, absent, aligned, expand, lift, plain


def finite(*derivatives: Tensor | None) -> bool:
    """Whether all are known to be finite. On an accelerator this waits for the sum of each; a compiler cannot know."""
    return all(d is None or (plain(d) and bool(torch.isfinite(d.detach().sum()))) for d in derivatives)


def product(d: Tensor | None, c: Coefficients) -> Coefficients:
    """``d * c`` for a derivative and coefficients, 0 for zero times infinity; None is zero."""
    if d is None:
        return absent(c.space, c.order)
    return c.map(lambda t: _times(d, lift(t, d.dim())), True)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product, 0 for zero times infinity. Of nested jets a finite zero may move with the outer ones."""
    y = a * b
    return torch.where(((a == 0) | (b == 0)) & ~torch.isfinite(y), 0, y)


def selected(condition: Tensor, c: Coefficients) -> Coefficients:
    """Coefficients where a condition holds, zero elsewhere, whatever they are there."""
    return c.local(lambda t: torch.where(condition, expand(t, condition.shape), 0))


def select_into(c: Tensor, condition: Tensor, out: Tensor) -> Tensor:
    """A stack where a condition holds, zero elsewhere, written to memory that is given."""
    return torch.where(condition, c, c.new_zeros(()), out=out)


def outer(a: Coefficients, b: Coefficients) -> Coefficients:
    """As `jetplane.jets.coefficients.outer`, with 0 for zero times infinity."""
    space = a.space
    if not a or not b or space.order == 1:
        return absent(space, 2)
    rows, ta, tb = aligned(a, b)
    found = (space.structure, rows) if rows is None else space.structure.restricted(rows)
    if found is None:
        return absent(space, 2)
    structure, kept = found
    sums: list[Tensor | int] = [0] * structure.count
    for n, i, j, weight in structure.terms():
        sums[n] = sums[n] + weight * _times(ta[i], tb[j])
    return Coefficients(space, 2, torch.stack(sums), kept, True)  # type: ignore[arg-type]
