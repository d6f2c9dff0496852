"""Derivatives that may be infinite: what does not move contributes nothing.

A mask in front of a function stops reverse mode: ``relu(x).sqrt()`` has the derivative zero at x < 0, although that
of ``sqrt`` at zero is infinite. In forward mode the mask has made the coefficient zero before, and ``0 * inf`` would
be NaN. Here zero times anything is zero, in each direction apart; what does move where a derivative is infinite gets
an infinite coefficient, as in reverse mode. A mask behind a function selects instead of multiplying, so that what is
not finite before it is forgotten.

The usual formulas serve wherever the derivatives are finite, which is seen from their sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import Coefficients, absent, aligned, expand, lift, writable


def finite(*derivatives: Tensor | None) -> bool:
    """Whether all are known to be finite; it is not asked where that would make an accelerator wait."""
    return all(
        d is None or (writable(d) and d.device.type == "cpu" and bool(torch.isfinite(d.sum()))) for d in derivatives
    )


def product(d: Tensor | None, c: Coefficients) -> Coefficients:
    """``d * c`` for a derivative and coefficients, zero where one of them is; None is zero."""
    if d is None:
        return absent(c.space, c.order)
    return c.map(lambda t: _times(d, lift(t, d.dim())), True)


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) | (b == 0), 0, a * b)


def selected(condition: Tensor, c: Coefficients) -> Coefficients:
    """Coefficients where a condition holds, zero elsewhere, whatever they are there."""
    return c.map(lambda t: torch.where(condition, expand(t, condition.shape), 0), True)


def outer(a: Coefficients, b: Coefficients) -> Coefficients:
    """As `jetplane.jets.coefficients.outer`, with each product zero where one of its factors is."""
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
