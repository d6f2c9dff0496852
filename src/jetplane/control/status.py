"""How a solver ended, and what that means."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np


class Status(Enum):
    """How a solver ended; the value says what it means."""

    SOLVED = "a local optimum within the tolerance"
    ACCEPTABLE = (
        "nearly a local optimum: the tolerance was not reached, but looser ones were; rounding or scaling may be why"
    )
    INFEASIBLE = (
        "no feasible point near: the constraints contradict each other there; try another guess, or relax bounds"
    )
    STALLED = (
        "steps became too small to make progress: check derivatives and scaling (ocp.check()), or try another guess"
    )
    DIVERGED = "variables grow without bound: the cost may have no minimum; give bounds"
    STOPPED = "stopped by Ctrl-C; the best iterate so far"
    ITERATION_LIMIT = "the limit of iterations was reached (max_iterations=)"
    TIME_LIMIT = "the limit of time was reached (time_limit=)"
    RESTORATION_FAILED = "no way back to feasibility was found: try another guess, or relax bounds"
    OVERDETERMINED = (
        "more equations than free variables: too many states are fixed at the ends, or a constraint is double"
    )
    BAD_PROBLEM = "the solver refuses the problem as it is defined"
    BAD_OPTION = "the solver refuses an option"
    NOT_A_NUMBER = (
        "a function or derivative is not a number and no shorter step helps: give bounds that keep states in its domain"
    )
    FAILED = "the solver failed for another reason"

    @property
    def success(self) -> bool:
        """Whether the result is a solution."""
        return self in (Status.SOLVED, Status.ACCEPTABLE)


class Iteration(NamedTuple):
    """One iteration of a solver: infeasibility of constraints and of optimality are largest entries."""

    number: int
    objective: float
    infeasibility: float
    dual_infeasibility: float
    barrier: float


@dataclass
class Outcome:
    """What a solver returns; as a start, `y` and perhaps multipliers.

    Multipliers follow ``f + multipliers @ g - lower_multipliers @ y + upper_multipliers @ y``. `callback_seconds` is
    the processor time spent in functions and derivatives.
    """

    status: Status
    y: np.ndarray
    objective: float = np.nan
    iterations: int = 0
    multipliers: np.ndarray | None = None
    lower_multipliers: np.ndarray | None = None
    upper_multipliers: np.ndarray | None = None
    callback_seconds: float = 0.0
