"""A problem and the known facts about its solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jetplane as jp


@dataclass
class Case:
    """A problem of optimal control.

    Attributes:
        problem: the problem.
        optimum: the cost that is known, or None.
        tolerance: to which it is known, or reached by `options`.
        source: of the problem and the optimum.
        options: of `Problem.solve`.
    """

    problem: jp.control.Problem
    optimum: float | None
    tolerance: float
    source: str
    options: dict[str, Any] = field(default_factory=dict)
