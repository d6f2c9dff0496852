"""Where a solver starts: what the engineer gave, an earlier solution, or straight lines."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, NonFiniteError, ShapeError
from .model import Model
from .nlp import NLP
from .problem import INFINITY, Layout, Phase, numbers, vector
from .radau import Mesh, radau
from .solution import Solution
from .status import Outcome, Status


def middle(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """A point within bounds: the middle of two, the nearest to zero of one."""
    both = (np.abs(lower) < INFINITY) & (np.abs(upper) < INFINITY)
    return np.where(both, (np.where(both, lower, 0) + np.where(both, upper, 0)) / 2, np.clip(0.0, lower, upper))


def _sampled(what: str, value: Any, tau: np.ndarray, times: np.ndarray, size: int) -> np.ndarray:
    """A guess at nodes (len(tau), size)."""
    if callable(value):
        made = numbers(what, value(times))
        made = made[:, None] if made.ndim == 1 else made
        if made.shape not in ((len(tau), size), (len(tau), 1)):
            raise ShapeError(f"{what}: the function must give shape ({len(tau)}, {size}), got {made.shape}")
        return np.broadcast_to(made, (len(tau), size))
    array = numbers(what, value)
    if array.ndim <= 1 and array.shape in ((), (1,), (size,)):
        return np.broadcast_to(array, (len(tau), size))
    if array.ndim == 1 and size == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != size or len(array) < 2:
        raise ShapeError(
            f"{what}: expected a number, {size} of them, or an array (points, {size}); got shape {array.shape}"
        )
    grid = np.linspace(0, 1, len(array))
    return np.stack([np.interp(tau, grid, column) for column in array.T], 1)


def _times(ph: Phase) -> tuple[float, float]:
    found = {}
    for which, (low, high) in (("t0", ph.t0), ("tf", ph.tf)):
        value = ph.guesses.get(which)
        if value is None:
            value = middle(np.array([low]), np.array([high]))
        found[which] = float(vector(f"guess of {which!r} in {ph.name!r}", 1, value)[0])
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
            target[:, part] = _sampled(
                f"guess of {name!r} in {ph.name!r}", ph.guesses[name], tau, times, part.stop - part.start
            )


def start(nlp: NLP, guess: Solution | None) -> Outcome:
    """The first iterate; with multipliers where the guess is a solution, interpolated if its mesh is another one.

    Raises:
        ArgumentError: the solution given is of another problem.
        NonFiniteError: a function is not finite at the guess: which, at which node, and the line of code.
    """
    y = trajectory(nlp, guess)
    require_finite(nlp, y)
    set_integrals(nlp, y)
    first = Outcome(Status.STOPPED, y)
    if guess is not None and guess.success and guess.outcome.lower_multipliers is not None:
        _multipliers(nlp, guess, first)
    return first


def trajectory(nlp: NLP, guess: Solution | None) -> np.ndarray:
    """Variables at the guess, but for integrals.

    Raises:
        ArgumentError: the solution given is of another problem.
    """
    y = np.zeros(nlp.n)
    if guess is not None:
        require_same(nlp.model, guess)
    for name, model in nlp.model.phases.items():
        ph, place, mesh = model.phase, nlp.places[name], nlp.meshes[name]
        if guess is None:
            t0, tf, x, u = phase_guess(ph, mesh)
        else:
            old = guess[name]
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
    if guess is not None:
        y[nlp.parameters] = guess.p.all
    return np.clip(y, nlp.lower, nlp.upper)


def set_integrals(nlp: NLP, y: np.ndarray) -> None:
    """Write into variables what their integrals are, or the engineer's guess of them."""
    nlp.constraints(y)
    for name, model in nlp.model.phases.items():
        place, arrays = nlp.places[name], nlp.phases[name]
        nx, _, nq = model.sizes
        values = arrays.length * (arrays.nodes.values()[nx : nx + nq] @ arrays.weight)
        for n, key in enumerate(model.phase.integral):
            if key in model.phase.guesses:
                values[n] = vector(f"guess of {key!r} in {name!r}", 1, model.phase.guesses[key])[0]
        y[place.integrals] = np.clip(values, nlp.lower[place.integrals], nlp.upper[place.integrals])


def require_same(model: Model, guess: Solution) -> None:
    """Raise an ArgumentError unless the guess is a solution with the phases, states and controls of the model."""
    if not isinstance(guess, Solution):
        raise ArgumentError(
            f"guess must be a Solution, of solve or jp.control.load, got {type(guess).__name__}; numbers, arrays and "
            "functions of time go to ocp.phases[name].guess(...)"
        )
    if set(guess.phases) != set(model.phases):
        raise ArgumentError(f"the guess has phases {sorted(guess.phases)}, but the problem has {sorted(model.phases)}")
    for name, traced in model.phases.items():
        old, ph = guess[name], traced.phase
        if old.x.all.shape[1] != ph.states.size or old.u.all.shape[1] != ph.controls.size:
            raise ArgumentError(f"in phase {name!r}, the guess has other states or controls than the problem")
    if guess.p.all.size != model.parameters.size:
        raise ArgumentError(f"the guess has {guess.p.all.size} parameters, but the problem has {model.parameters.size}")


def _multipliers(nlp: NLP, guess: Solution, first: Outcome) -> None:
    """Multipliers of a solution: its own on the same meshes, else interpolated in time as densities."""
    old = guess.outcome
    assert old.multipliers is not None
    if all(guess[n].mesh == mesh for n, mesh in nlp.meshes.items()):
        if len(old.y) == nlp.n and len(old.multipliers) == nlp.m:
            first.multipliers = old.multipliers
            first.lower_multipliers, first.upper_multipliers = old.lower_multipliers, old.upper_multipliers
        return
    multipliers, lower, upper = np.zeros(nlp.m), np.full(nlp.n, 1e-6), np.full(nlp.n, 1e-6)
    for name, mesh in nlp.meshes.items():
        ph, place, nodes = guess[name], nlp.places[name], mesh.nodes
        if not ph.duals or ph.duals["path"].shape[1] * nodes != place.path.stop - place.path.start:
            return
        tau, before = mesh.times, ph.mesh.times

        def at(values: np.ndarray, times: np.ndarray, before: np.ndarray = before) -> np.ndarray:
            return np.array([np.interp(times, before[: len(values)], column) for column in values.T]).reshape(
                -1, len(times)
            )

        local = np.concatenate([radau(n)[1] for n in mesh.degrees])
        density = np.append(mesh.weights, 1.0)
        multipliers[place.defects] = (-local * at(ph.costates.all, tau[:-1])).ravel()
        multipliers[place.path] = (density[:-1] * at(ph.duals["path"], tau[:-1])).ravel()
        for target, side in ((lower, "lower"), (upper, "upper")):
            states = density * at(ph.duals[f"{side} x"][:-1], tau)
            states[:, -1] = ph.duals[f"{side} x"][-1]
            target[place.states] = states.ravel()
            target[place.controls] = (density[:-1] * at(ph.duals[f"{side} u"], tau[:-1])).ravel()
    # Rows of the ends and of integrals are the last ones of both programs, phase by phase.
    for name, place in nlp.places.items():
        there = guess[name].duals.get("integral")
        if there is not None:
            multipliers[place.integral_rows] = there
    ends = nlp.end_rows.stop - nlp.end_rows.start
    if ends:
        multipliers[nlp.end_rows] = old.multipliers[len(old.multipliers) - ends :]
    first.multipliers, first.lower_multipliers, first.upper_multipliers = multipliers, lower, upper


def require_finite(nlp: NLP, y: np.ndarray) -> None:
    """Raise where a function of a phase or of the ends is not finite, or a first derivative."""
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
                f"at the guess, {arrays.model.names[output]} of phase {name!r} is not finite at node {node} "
                f"({shown}); give "
                f"another guess: ocp.phases[{name!r}].guess(...)" + (f"\n  first at {line}" if line else "")
            )
    bad = nlp._ends.first_bad()
    if bad is not None:
        _, output, line = bad
        raise NonFiniteError(
            f"at the guess, {nlp.model.end_names[output]} is not finite" + (f"\n  first at {line}" if line else "")
        )
    # Solvers start within the bounds, where a square root, say, may have the derivative that it lacks at its bound.
    width = np.minimum(1.0, nlp.upper - nlp.lower)
    inside = np.clip(y, nlp.lower + 0.01 * width, nlp.upper - 0.01 * width)
    moves = nlp.lower < nlp.upper
    rows, columns = nlp.jacobian_structure
    bad = np.flatnonzero(~np.isfinite(nlp.jacobian(inside)) & moves[columns])
    if len(bad):
        what, column = nlp.constraint_name(int(rows[bad[0]])), int(columns[bad[0]])
    else:
        bad = np.flatnonzero(~np.isfinite(nlp.gradient(inside)) & moves)
        if not len(bad):
            return
        what, column = "the cost", int(bad[0])
    raise NonFiniteError(
        f"at the guess, the derivative of {what} by {nlp.variable_name(column)} (= {inside[column]:.6g}) is not "
        "finite, as that of a square root at 0; give another guess, or a function that has a derivative there"
    )
