"""Simulations: of a solution, to check it by other means, and of a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp

from ..errors import ArgumentError, NonFiniteError
from .guessing import middle, phase_guess
from .model import dynamics_parts
from .problem import Layout, Parts, Phase, numbers
from .radau import Mesh
from .solution import PhaseSolution, Solution


@dataclass
class Simulation:
    """A solution, simulated.

    Attributes:
        t, x: of each phase by name, at the solution's own times.
        difference: of each phase, the largest difference of a state to the solution, relative to 1 + its largest value.
    """

    t: dict[str, np.ndarray]
    x: dict[str, Parts]
    difference: dict[str, float]

    def __repr__(self) -> str:
        return "Simulation(" + ", ".join(f"{n}: differs by {d:.1e}" for n, d in self.difference.items()) + ")"


def rates(ph: Phase, parameters: Parts) -> Callable[[float, np.ndarray, np.ndarray], np.ndarray]:
    """The dynamics as a function of (t, x, u) at one time, by the user's own functions."""
    tensor = Parts(torch.as_tensor(np.asarray(parameters.all, float)), parameters._layout)

    def f(t: float, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            value = ph.dynamics(  # type: ignore[misc]
                Parts(torch.from_numpy(np.ascontiguousarray(x[None])), ph.states),
                Parts(torch.from_numpy(np.ascontiguousarray(u[None])), ph.controls),
                torch.tensor([[t]], dtype=torch.float64),
                tensor,
            )
        parts = []
        for _, part, size in dynamics_parts(ph, value):
            part = torch.as_tensor(part, dtype=torch.float64)
            parts.append(part.reshape(-1).expand(size or 1) if part.numel() == 1 else part.reshape(-1))
        return torch.cat(parts).numpy()

    return f


def simulate(solution: Solution, rtol: float) -> Simulation:
    """Integrate each phase from its own start with its controls, interval by interval, by DOP853."""
    if solution.problem is None:
        raise ArgumentError("the solution was pickled without its functions: set its .problem before you simulate")
    t, x, difference = {}, {}, {}
    for name, ph in solution.phases.items():
        found = _phase(solution.problem.phases[name], ph, solution.p, rtol)
        scale = 1 + np.abs(ph.x.all).max(0)
        t[name], x[name] = ph.t, Parts(found, ph.x._layout)
        difference[name] = float((np.abs(found - ph.x.all) / scale).max())
    return Simulation(t, x, difference)


def _phase(ph: Phase, found: PhaseSolution, p: Parts, rtol: float) -> np.ndarray:
    f = rates(ph, p)
    mesh, controls = found.mesh, found.u.all[:-1]
    edges = found.t[0] + (found.t[-1] - found.t[0]) * mesh.edges
    result = np.empty_like(found.x.all)
    result[0] = state = found.x.all[0]
    for e, n in enumerate(mesh.degrees):
        first = mesh.starts[e]
        alone = Mesh((1.0,), (n,))
        a, b = edges[e], edges[e + 1]

        def slope(t, x, alone=alone, a=a, b=b, first=first, n=n):
            u = alone.evaluate(controls[first : first + n], np.array([(t - a) / (b - a)]))[0]
            return f(t, x, u)

        times = found.t[first : first + n + 1].clip(a, b)
        run = solve_ivp(slope, (a, b), state, "DOP853", t_eval=times, rtol=rtol, atol=rtol * 1e-2)
        if not run.success or run.y.shape[1] != n + 1:
            result[first + 1 :] = np.nan
            return result
        result[first : first + n + 1] = run.y.T
        state = run.y[:, -1]
    return result


def simulate_guess(ph: Phase, tf: float | None, steps: int, controls: Mapping[str, Any]) -> None:
    """Guess a phase's states by simulation from its start."""
    if ph.dynamics is None:
        raise ArgumentError(f"phase {ph.name!r} has no dynamics, so it cannot be simulated")
    if tf is not None:
        ph.guess(tf=tf)
    ph.guess(**controls)
    mesh = Mesh.uniform(steps, 2)
    t0, tf, _, _ = phase_guess(ph, mesh)
    low, high = ph.at_start
    state = np.where(low == high, low, middle(low, high))
    times = np.linspace(t0, tf, steps + 1)

    def control(t: float) -> np.ndarray:
        u = middle(ph.controls.lower, ph.controls.upper)
        for name, part in ph.controls.parts.items():
            value = ph.guesses.get(name)
            if callable(value):
                u[part] = np.ravel(numbers(f"control {name!r} of {ph.name!r}", value(np.array([t]))))
            elif value is not None:
                array = numbers(f"control {name!r} of {ph.name!r}", value)
                if array.ndim == 2:
                    grid = np.linspace(t0, tf, len(array))
                    array = np.array([np.interp(t, grid, column) for column in array.T])
                u[part] = array
        return u

    f = rates(ph, Parts(np.zeros(0), Layout("parameters")))
    run = solve_ivp(lambda t, x: f(t, x, control(t)), (t0, tf), state, t_eval=times, rtol=1e-6, atol=1e-8)
    if not run.success or not np.isfinite(run.y).all() or run.y.shape[1] != steps + 1:
        raise NonFiniteError(
            f"the simulation of phase {ph.name!r} ends at t = {run.t[-1] if len(run.t) else t0:g}: {run.message}"
        )
    for name, part in ph.states.parts.items():
        ph.guesses[name] = run.y[part].T
