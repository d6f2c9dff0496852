"""The least violation of a program's constraints: what the interior point solves where its line search fails.

    minimize  |e|² / 2ε + ζ/2 |d (y - y₀)|²   such that   lower <= y <= upper,  g(y) - e = right or within its bounds

Every constraint has an elastic variable e, so that any y within its bounds has an e that satisfies all of them: this
program has a solution even where the given one has none. ε is the violation at y₀, with which multipliers, e/ε, are of
size 1; d are the inverse sizes of y₀, and ζ is small. Elastic variables of defects and path constraints take part as
controls of their nodes, those of integrals and ends as integrals do, so that the KKT systems keep their bands. Sums of
squares in place of IPOPT's absolute values (Wächter, Biegler 2006, section 3.3) are smooth, and need no bounds.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .nlp import Place
from .scaled import Scaled

PROXIMITY = 1e-6  # ζ


class Elastic:
    """A program with an elastic variable for each constraint; the interface is that of `Scaled`.

    Args:
        program: the given one.
        y: where the violation is to be reduced from (variables, problems).
        violation: ε (problems,), positive.

    Attributes:
        own, elastic: columns of the given program's variables, and of the elastic ones by constraints.
    """

    factor = 1.0

    def __init__(self, program: Scaled, y: Tensor, violation: Tensor) -> None:
        self.program = program
        self._lay_out(program)
        self.device, self.m = program.device, program.m
        self.n = program.n + program.m
        self.meshes, self.end_rows = program.meshes, program.end_rows
        self.slack, self.right, self.path = program.slack, program.right, program.path
        self.sizes, self.rows = torch.ones(self.n, 1).to(y), torch.ones_like(program.rows)
        own, elastic = self.own.cpu().numpy(), self.elastic.cpu().numpy()
        rows, columns = program.jacobian_structure
        every = np.arange(self.m)
        self.jacobian_structure = np.concatenate([rows, every]), np.concatenate([own[columns], elastic])
        rows, columns = program.hessian_structure
        self._diagonal = np.flatnonzero(rows == columns)
        self._missing = np.setdiff1d(np.arange(program.n), rows[self._diagonal])
        self._on_diagonal = rows[self._diagonal]
        added = np.concatenate([own[self._missing], elastic])
        # Variables keep their order, so that the lower triangle stays one.
        self.hessian_structure = np.concatenate([own[rows], added]), np.concatenate([own[columns], added])
        self.center, self.violation = y, violation
        self._near = PROXIMITY / y.abs().clamp_min(1).square()

    def _lay_out(self, program: Scaled) -> None:
        own, elastic = np.zeros(program.n, int), np.zeros(program.m, int)
        self.places: dict[str, Place] = {}
        n = 0

        def take(columns: slice, *rows: slice) -> slice:
            """Columns for variables of the program, and after them for elastic ones of constraints."""
            nonlocal n
            start = n
            for target, parts in ((own, (columns,)), (elastic, rows)):
                for part in parts:
                    target[part] = n + np.arange(part.stop - part.start)
                    n += part.stop - part.start
            return slice(start, n)

        def time(column: int | None) -> int | None:
            return None if column is None else take(slice(column, column + 1)).start

        last = list(program.places)[-1]
        for name, place in program.places.items():
            states, controls = take(place.states), take(place.controls, place.defects, place.path)
            t0, tf = time(place.t0), time(place.tf)
            ends = (program.end_rows,) if name == last else ()
            integrals = take(place.integrals, place.integral_rows, *ends)
            self.places[name] = replace(place, states=states, controls=controls, t0=t0, tf=tf, integrals=integrals)
        self.parameters = take(program.parameters)
        self.own, self.elastic = program.tensor(own), program.tensor(elastic)

    def variable_name(self, column: int) -> str:
        """What a variable is, for messages."""
        places = (self.own == column).nonzero()
        return self.program.variable_name(int(places[0])) if len(places) else "an elastic variable"

    def select(self, chosen: Tensor) -> Elastic:
        """For some of the problems, given by their numbers."""
        made = copy.copy(self)
        made.program = self.program.select(chosen)
        made.center, made.violation = self.center[:, chosen], self.violation[chosen]
        made._near = self._near[:, chosen]
        return made

    @property
    def seconds(self) -> float:
        """Processor time spent in functions and derivatives."""
        return self.program.seconds

    def joined(self, y: Tensor, e: Tensor) -> Tensor:
        """Variables of the program and elastic ones as those of this program."""
        z = y.new_empty(self.n, y.shape[1])
        z[self.own], z[self.elastic] = y, e
        return z

    def cost(self, z: Tensor) -> Tensor:
        """The given program's cost in its own units (problems,)."""
        return self.program.cost(z[self.own])

    def objective(self, z: Tensor) -> Tensor:
        """The violation (problems,), with the distance from the start."""
        y, e = z[self.own], z[self.elastic]
        return 0.5 * (e.square().sum(0) / self.violation + (self._near * (y - self.center).square()).sum(0))

    def gradient(self, z: Tensor) -> Tensor:
        """Its gradient."""
        return self.joined(self._near * (z[self.own] - self.center), z[self.elastic] / self.violation)

    def constraints(self, z: Tensor) -> Tensor:
        """The constraints less the elastic variables."""
        return self.program.constraints(z[self.own]) - z[self.elastic]

    def jacobian(self, z: Tensor) -> Tensor:
        """Nonzeros of the Jacobian of the constraints."""
        jacobian = self.program.jacobian(z[self.own])
        return torch.cat([jacobian, jacobian.new_full((self.m, jacobian.shape[1]), -1.0)])

    def hessian(self, z: Tensor, multipliers: Tensor) -> Tensor:
        """Nonzeros of the Hessian of the Lagrangian, without the program's cost."""
        curvature = self.program.hessian(z[self.own], multipliers, cost=0.0)
        curvature[self._diagonal] += self._near[self._on_diagonal]
        return torch.cat([curvature, self._near[self._missing], (1 / self.violation).expand(self.m, -1)])
