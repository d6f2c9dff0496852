"""Errors of a solution between its nodes, and meshes that have less of them.

The estimate and the choice between more points and shorter intervals follow Patterson, Hager, Rao, *A ph mesh
refinement method for optimal control*, Optimal Control Applications and Methods 36 (2015).
"""

from __future__ import annotations

import math

import numpy as np

from .model import PhaseModel
from .radau import Mesh, radau
from .solution import PhaseSolution

LOWEST, HIGHEST = 3, 12  # points of an interval


def errors(model: PhaseModel, solution: PhaseSolution, p: np.ndarray) -> np.ndarray:
    """The relative error of the states in each interval.

    States are integrated from the start of the interval along the solution on one point more than the interval has, and
    compared with the solution there, relative to 1 + the state's largest value.
    """
    mesh = solution.mesh
    finer = Mesh(mesh.fractions, tuple(n + 1 for n in mesh.degrees))
    tau = finer.times
    nx, nu, _ = model.sizes
    x = mesh.evaluate(solution.x.all, tau)
    u = mesh.evaluate(solution.u.all[:-1], tau[:-1])
    length = solution.t[-1] - solution.t[0]
    nodes = model.program.at(finer.nodes)
    z = nodes.variables
    z[:nx], z[nx : nx + nu] = x[:-1].T, u.T
    z[nx + nu] = solution.t[0] + length * tau[:-1]
    z[nx + nu + 1 :] = p[:, None]
    nodes.changed()
    rates = nodes.values()[:nx].T
    scale = 1 + np.abs(solution.x.all).max(0)
    found = np.zeros(len(mesh.degrees))
    for e, n in enumerate(finer.degrees):
        start = finer.starts[e]
        # D X = h f on points and end; with X at the first point known, the rest follows.
        matrix = radau(n)[2]
        step = length * mesh.fractions[e] / 2 * rates[start : start + n]
        integrated = x[start] + np.linalg.solve(matrix[:, 1:], step)
        found[e] = np.max(np.abs(integrated - x[start + 1 : start + n + 1]) / scale)
    return np.where(np.isfinite(found), found, np.inf)


def refined(mesh: Mesh, error: np.ndarray, accuracy: float) -> Mesh:
    """More points where the error is too large, or shorter intervals where they would be too many."""
    fractions, degrees = [], []
    for length, n, e in zip(mesh.fractions, mesh.degrees, error, strict=True):
        if e <= accuracy:
            fractions.append(length)
            degrees.append(n)
            continue
        # A margin: a mesh that just misses would cost another round.
        more = math.ceil(math.log(min(e, 1e6) / (accuracy / 5)) / math.log(n))
        if n + more <= HIGHEST:
            fractions.append(length)
            degrees.append(n + max(more, 1))
        else:
            parts = min(max(2, math.ceil((n + more) / LOWEST)), 6)
            fractions += [length / parts] * parts
            degrees += [LOWEST] * parts
    total = sum(fractions)
    return Mesh(tuple(f / total for f in fractions), tuple(degrees))
