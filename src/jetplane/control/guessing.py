"""Where a solver starts: what the engineer gave, an earlier solution, or straight lines."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, NonFiniteError, ShapeError
from .nlp import NLP
from .problem import INFINITY, Layout, Phase
from .radau import Mesh
from .solution import Solution
from .status import Outcome, Status


def middle(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """A point within bounds: the middle of two, the nearest to zero of one."""
    both = (np.abs(lower) < INFINITY) & (np.abs(upper) < INFINITY)
    return np.where(both, (np.where(both, lower, 0) + np.where(both, upper, 0)) / 2, np.clip(0.0, lower, upper))


def _sampled(what: str, value: Any, tau: np.ndarray, times: np.ndarray, size: int) -> np.ndarray:
    """A guess at nodes (len(tau), size)."""
    if callable(value):
        made = np.asarray(value(times), float)
        made = made[:, None] if made.ndim == 1 else made
        if made.shape not in ((len(tau), size), (len(tau), 1)):
            raise ShapeError(f"{what}: the function must give shape ({len(tau)}, {size}), got {made.shape}")
        return np.broadcast_to(made, (len(tau), size))
    array = np.asarray(value, float)
    if array.ndim <= 1 and array.shape in ((), (1,), (size,)):
        return np.broadcast_to(array, (len(tau), size))
    if array.ndim == 1 and size == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != size or len(array) < 2:
        raise ShapeError(f"{what}: expected a number, {size} of them, or an array (points, {size}); got shape {array.shape}")
    grid = np.linspace(0, 1, len(array))
    return np.stack([np.interp(tau, grid, column) for column in array.T], 1)


def _times(ph: Phase) -> tuple[float, float]:
    found = {}
    for which, (low, high) in (("t0", ph.t0), ("tf", ph.tf)):
        value = ph.guesses.get(which)
        found[which] = float(middle(np.array([low]), np.array([high]))[0]) if value is None else float(value)
    return found["t0"], found["tf"]


def phase_guess(ph: Phase, mesh: Mesh) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Times, states (nodes + 1, nx) and controls (nodes, nu)."""
    t0, tf = _times(ph)
    if not tf > t0:
        tf = t0 + 1.0 if ph.tf[1] > t0 + 1.0 else ph.tf[1]
    tau = mesh.times
    times = t0 + (tf - t0) * tau
    free = [np.where(high > low, middle(low, high), low) for low, high in (ph.at_start, ph.at_end)]
    known = [low == high for low, high in (ph.at_start, ph.at_end)]
    first = np.where(known[0], free[0], np.where(known[1], free[1], free[0]))
    last = np.where(known[1], free[1], np.where(known[0], free[0], free[1]))
    x = first + (last - first) * tau[:, None]
    u = np.broadcast_to(middle(ph.controls.lower, ph.controls.upper), (mesh.nodes, ph.controls.size)).copy()
    for target, layout, at in ((x, ph.states, len(tau)), (u, ph.controls, mesh.nodes)):
        _fill(target, layout, ph, tau[:at], times[:at])
    return t0, tf, x, u


def _fill(target: np.ndarray, layout: Layout, ph: Phase, tau: np.ndarray, times: np.ndarray) -> None:
    for name, part in layout.parts.items():
        if name in ph.guesses:
            target[:, part] = _sampled(f"guess of {name!r} in {ph.name!r}", ph.guesses[name], tau, times, part.stop - part.start)


def start(nlp: NLP, guess: Solution | None) -> tuple[Outcome, bool]:
    """The first iterate, and whether its multipliers are those of a solution on the same mesh.

    Raises:
        ArgumentError: the solution given is of another problem.
        NonFiniteError: a function is not finite at the guess: which, at which node, and the line of code.
    """
    y = np.zeros(nlp.n)
    same = False
    if guess is not None:
        if set(guess.phases) != set(nlp.model.phases):
            raise ArgumentError(f"the guess has phases {sorted(guess.phases)}, the problem {sorted(nlp.model.phases)}")
        same = guess.outcome.multipliers is not None and all(
            guess[n].mesh == mesh for n, mesh in nlp.meshes.items()
        ) and len(guess.outcome.y) == nlp.n and len(guess.outcome.multipliers) == nlp.m and guess.success
    for name, model in nlp.model.phases.items():
        ph, place, mesh = model.phase, nlp.places[name], nlp.meshes[name]
        if guess is None:
            t0, tf, x, u = phase_guess(ph, mesh)
        else:
            old = guess[name]
            if old.x.all.shape[1] != ph.states.size or old.u.all.shape[1] != ph.controls.size:
                raise ArgumentError(f"the guess has other states or controls in phase {name!r}")
            t0, tf = old.t[0], old.t[-1]
            x, u = old.mesh.evaluate(old.x.all, mesh.times), old.mesh.evaluate(old.u.all[:-1], mesh.times[:-1])
        y[place.states], y[place.controls] = x.T.ravel(), u.T.ravel()
        if place.t0 is not None:
            y[place.t0] = t0
        if place.tf is not None:
            y[place.tf] = tf
    for name, part in nlp.model.parameters.parts.items():
        lower, upper = nlp.model.parameters.lower[part], nlp.model.parameters.upper[part]
        value = nlp.model.problem.parameter_guess.get(name)
        y[nlp.parameters][part] = middle(lower, upper) if value is None else value
    if guess is not None and guess.p.all.size == nlp.model.parameters.size:
        y[nlp.parameters] = guess.p.all
    y = np.clip(y, nlp.lower, nlp.upper)
    require_finite(nlp, y)
    for name, model in nlp.model.phases.items():
        place, arrays = nlp.places[name], nlp.phases[name]
        nx, _, nq = model.sizes
        values = arrays.length * (arrays.nodes.values()[nx : nx + nq] @ arrays.weight)
        for n, key in enumerate(model.phase.integral):
            values[n] = model.phase.guesses.get(key, values[n])
        y[place.integrals] = values
    y = np.clip(y, nlp.lower, nlp.upper)
    if guess is not None and same:
        old = guess.outcome
        return Outcome(Status.STOPPED, y, np.nan, 0, old.multipliers, old.lower_multipliers, old.upper_multipliers), True
    return Outcome(Status.STOPPED, y), False


def require_finite(nlp: NLP, y: np.ndarray) -> None:
    """Raise where a function of a phase or of the ends is not finite."""
    nlp.constraints(y)
    for name, arrays in nlp.phases.items():
        bad = arrays.nodes.first_bad()
        if bad is not None:
            node, output, line = bad
            values = arrays.nodes.variables[:, node]
            ph = arrays.model.phase
            entries = [ph.states.entry(i) for i in range(ph.states.size)] + [
                ph.controls.entry(i) for i in range(ph.controls.size)
            ]
            shown = ", ".join(f"{n} = {v:.6g}" for n, v in zip([*entries, "t"], values, strict=False))
            raise NonFiniteError(
                f"at the guess, {arrays.model.names[output]} of phase {name!r} is not finite at node {node} ({shown}); give "
                f"another guess: ocp.phases[{name!r}].guess(...)" + (f"\n  first at {line}" if line else "")
            )
    bad = nlp._ends.first_bad()
    if bad is not None:
        _, output, line = bad
        raise NonFiniteError(
            f"at the guess, {nlp.model.end_names[output]} is not finite" + (f"\n  first at {line}" if line else "")
        )
