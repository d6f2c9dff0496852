"""Functions that are defined by equations: jets of the solution, by Newton's method from the solution at the primal.

For G(x, y) = 0 with the solution y0 at the primal of x, the chord iteration

    y  <-  y - (dG/dy)(x0, y0)^-1 G(x, y)

gains one order of the directions in each step, since its matrix errs by the first one. Two steps from y0 give first
and second coefficients exactly, in whatever pair structure, and the steps are ordinary operators on jets: they nest,
and reverse mode records them. A step costs a few products, as the equation does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..jets import Space, make, parts


def chord(space: Space, y: Sequence[Tensor], step: Callable[..., Sequence[Any]]) -> tuple[Any, ...]:
    """Jets of the solution of equations.

    Args:
        space: of the evaluation.
        y: the solution at the primal.
        step: one step from jets (or, at first, from y), by a matrix at the primal.
    """
    jets: Sequence[Any] = y
    for _ in range(space.order):
        jets = [make(p, *parts(new, space)[1:], space) for p, new in zip(y, step(*jets), strict=True)]
    return tuple(jets)
