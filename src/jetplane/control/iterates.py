"""Iterates of an interior point, of many problems at once, and what functions are there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .elastic import Elastic
from .scaled import Scaled

EPSILON = float(np.finfo(float).eps)
DAMPING = 1e-5  # κ_d
GAMMA_THETA, GAMMA_PHI = 1e-5, 1e-8

Program = Scaled | Elastic


@dataclass
class State:
    """Iterates of all problems; every tensor's last dimension is that of problems."""

    number: Tensor  # of the problem in the batch
    w: Tensor  # variables and slacks
    multipliers: Tensor
    at_lower: Tensor  # multipliers of bounds
    at_upper: Tensor
    lower: Tensor
    upper: Tensor
    fixed: Tensor
    mu: Tensor
    last_delta: Tensor  # the latest multiple of the identity
    theta_least: Tensor  # infeasibility below which steps may lower the cost alone
    theta_most: Tensor
    filter_theta: Tensor
    filter_phi: Tensor
    acceptable: Tensor  # iterations in a row
    iterations: Tensor
    short: Tensor  # steps in a row of hardly any length
    resets: Tensor  # of the filter, for these

    def select(self, chosen: Tensor) -> State:
        """Some of the problems, given by their numbers."""
        return State(**{f.name: getattr(self, f.name)[..., chosen] for f in fields(self)})

    def distances(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """To the bounds; infinite where there is none, never zero."""
        least = EPSILON * w.abs().clamp_min(1)
        return torch.maximum(w - self.lower, least), torch.maximum(self.upper - w, least)

    def barrier(self, w: Tensor, objective: Tensor) -> Tensor:
        """The cost with logarithms of the distances to bounds."""
        below, above = self.distances(w)
        # Variables with one bound get a small linear term, which keeps them from growing without end.
        logarithms = torch.where(below.isfinite(), below.log(), 0.0) + torch.where(above.isfinite(), above.log(), 0.0)
        single = below.isfinite() ^ above.isfinite()
        linear = torch.where(single, torch.minimum(below, above), 0.0)
        return objective + self.mu * (DAMPING * linear - logarithms).sum(0)

    def add_to_filter(self, point: Point, which: Tensor) -> None:
        """What is no better than a point in both cost and feasibility is refused from now on."""
        theta = torch.where(which, (1 - GAMMA_THETA) * point.theta, torch.inf)
        phi = torch.where(which, point.phi - GAMMA_PHI * point.theta, torch.inf)
        self.filter_theta = torch.cat([self.filter_theta, theta[None]])
        self.filter_phi = torch.cat([self.filter_phi, phi[None]])

    def empty_filter(self, which: Tensor) -> None:
        """Forget what the filter has."""
        self.filter_theta = torch.where(which, torch.inf, self.filter_theta)
        self.filter_phi = torch.where(which, torch.inf, self.filter_phi)
        keep = self.filter_theta.isfinite().any(1)
        self.filter_theta, self.filter_phi = self.filter_theta[keep], self.filter_phi[keep]


@dataclass
class Point:
    """Functions at an iterate, scaled."""

    objective: Tensor
    constraints: Tensor  # (constraints, problems), less slacks and right-hand sides
    theta: Tensor  # infeasibility
    phi: Tensor  # cost with barrier
    finite: Tensor


def evaluate(program: Program, s: State, w: Tensor) -> Point:
    """Cost and constraints at w, with the barrier of `s`."""
    y = w[: program.n]
    objective = program.objective(y)
    c = program.constraints(y) - program.right
    c[program.slack] -= w[program.n :]
    theta, phi = c.abs().sum(0), s.barrier(w, objective)
    return Point(objective, c, theta, phi, theta.isfinite() & phi.isfinite())
