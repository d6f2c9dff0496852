"""Programs in the units of a solver, as tensors of many problems at once.

    minimize f(y)  such that  lower <= y <= upper,  constraint_lower <= g(y) <= constraint_upper

Variables are divided by their typical sizes; constraints and the cost are multiplied by factors.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ipopt import Scaling
from .nlp import NLP


class Scaled:
    """A program for the interior point; vectors have shape (size, problems).

    Args:
        nlp: structure, functions, bounds of constraints.
        scaling: factors for variables, constraints and the cost.
        problems: how many.
        device: of the results; functions are computed on the CPU.

    Attributes:
        sizes, rows, factor: of variables (variables, 1), of constraints (constraints, 1), of the cost.
        slack: rows of inequalities, which get slacks.
        right: right-hand sides of equations (constraints, 1).
        path: which constraints are those of the path (constraints, 1).
        fixable: which variables a bound may fix: all but states within a phase (variables, 1).
    """

    def __init__(self, nlp: NLP, scaling: Scaling | None, problems: int, device: torch.device) -> None:
        self.nlp, self.device = nlp, device
        self.n, self.m = nlp.n, nlp.m
        self.places, self.meshes = nlp.places, nlp.meshes
        self.parameters, self.end_rows, self.variable_name = nlp.parameters, nlp.end_rows, nlp.variable_name
        self.jacobian_structure, self.hessian_structure = nlp.jacobian_structure, nlp.hessian_structure
        scaling = scaling or Scaling(np.ones(nlp.n), np.ones(nlp.m), 1.0)
        self._sizes, self._rows, self.factor = (
            1 / scaling.variables[:, None],
            scaling.constraints[:, None],
            scaling.objective,
        )
        self.sizes, self.rows = self.tensor(self._sizes), self.tensor(self._rows)
        rows, columns = (self.tensor(a) for a in nlp.jacobian_structure)
        self._jacobian_scale = self.rows[rows] * self.sizes[columns]
        rows, columns = (self.tensor(a) for a in nlp.hessian_structure)
        self._hessian_scale = self.sizes[rows] * self.sizes[columns]
        equal = nlp.constraint_lower == nlp.constraint_upper
        self.slack = self.tensor(np.flatnonzero(~equal))
        self.constraint_lower, self.constraint_upper = (
            self.tensor(a)[:, None] * self.rows for a in (nlp.constraint_lower, nlp.constraint_upper)
        )
        self.right = torch.where(self.tensor(equal)[:, None], self.constraint_lower, 0.0)
        self.path = torch.zeros(nlp.m, 1, dtype=torch.bool, device=device)
        self.fixable = torch.ones(nlp.n, 1, dtype=torch.bool, device=device)
        for name, place in nlp.places.items():
            self.path[place.path] = True
            self.fixable[place.states].view(-1, nlp.meshes[name].nodes + 1)[:, 1:-1] = False
        self._spent = [0.0]  # shared by all that are selected from this one
        self._batch = nlp.batch(problems)

    def tensor(self, a: np.ndarray) -> Tensor:
        """On the device."""
        return torch.from_numpy(np.ascontiguousarray(a)).to(self.device)

    def select(self, chosen: Tensor) -> Scaled:
        """For some of the problems, given by their numbers."""
        made = copy.copy(self)
        made._batch = self.nlp.batch(len(chosen))
        return made

    @property
    def seconds(self) -> float:
        """Processor time spent in functions and derivatives."""
        return self._spent[0]

    def _call(self, function: str, y: Tensor, *arguments: Any) -> Tensor:
        began = time.process_time()
        with np.errstate(all="ignore"):
            value = getattr(self._batch, function)(y.cpu().numpy() * self._sizes, *arguments)
        self._spent[0] += time.process_time() - began
        return self.tensor(value)

    def cost(self, y: Tensor) -> Tensor:
        """The cost in its own units (problems,)."""
        return self._call("objective", y)

    def objective(self, y: Tensor) -> Tensor:
        """F (problems,)."""
        return self.cost(y) * self.factor

    def gradient(self, y: Tensor) -> Tensor:
        """The gradient of f."""
        return self._call("gradient", y) * (self.sizes * self.factor)

    def constraints(self, y: Tensor) -> Tensor:
        """G."""
        return self._call("constraints", y) * self.rows

    def jacobian(self, y: Tensor) -> Tensor:
        """Nonzeros of the Jacobian of g."""
        return self._call("jacobian", y) * self._jacobian_scale

    def hessian(self, y: Tensor, multipliers: Tensor, cost: float = 1.0) -> Tensor:
        """Nonzeros of the lower triangle of the Hessian of ``cost * f + multipliers @ g``."""
        rows = multipliers.cpu().numpy() * self._rows
        return self._call("hessian", y, rows, cost * self.factor) * self._hessian_scale
