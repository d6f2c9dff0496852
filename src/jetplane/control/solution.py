"""What was found: trajectories, costates, errors, as values that can be saved, drawn and started from."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, CheckpointError
from .nlp import NLP
from .problem import Layout, Parts, Problem
from .radau import Mesh, radau
from .status import Outcome, Status

SCHEMA = "jetplane.control.solution/1"


@dataclass
class PhaseSolution:
    """A phase's trajectory.

    Attributes:
        t: times of the nodes and of the end (points,).
        x, u: states and controls by name, (points, size) each; the control of the last point is extrapolated.
        costates: derivatives of the optimal cost by the states, as x; their sign is that of a cost to be minimized.
        integral: values of integrals by name.
        error: relative error of the states in each interval of the mesh, estimated by integrating the dynamics along
            the
            trajectory on a finer set of points.
        duals: multipliers of path constraints and bounds by unit of time, for warm starts on other meshes.
    """

    name: str
    mesh: Mesh
    t: np.ndarray
    x: Parts
    u: Parts
    costates: Parts
    integral: Parts
    error: np.ndarray
    duals: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def at(self, times: Any) -> tuple[Parts, Parts]:
        """States and controls at any times within the phase, by the polynomials of the transcription."""
        times = np.atleast_1d(np.asarray(times, float))
        tau = (times - self.t[0]) / (self.t[-1] - self.t[0])
        if (tau < -1e-9).any() or (tau > 1 + 1e-9).any():
            raise ArgumentError(f"times must be within [{self.t[0]:g}, {self.t[-1]:g}] of phase {self.name!r}")
        return (
            Parts(self.mesh.evaluate(self.x.all, tau), self.x._layout),
            Parts(self.mesh.evaluate(self.u.all[:-1], tau), self.u._layout),
        )


@dataclass
class Solution:
    """A solution of a problem.

    Of a problem with one phase, `t`, `x`, `u`, `costates`, `integral` and `error` are that phase's.

    Attributes:
        problem: what was solved; None after pickling where its functions are lambdas. Set it, to simulate.
        status: how the solver ended; ``status.value`` says what it means, ``status.success`` whether it is a solution.
        objective: the cost.
        phases: by name; ``sol["descent"]`` too.
        p: parameters by name.
        iterations: of the solver, of all meshes together.
        seconds: processor time of set-up, derivatives and the rest of the solver.
        history: of each mesh (nodes, largest error, iterations).
        outcome: the solver's own result on the last mesh, for warm starts.
    """

    problem: Problem
    status: Status
    objective: float
    phases: dict[str, PhaseSolution]
    p: Parts
    iterations: int
    seconds: dict[str, float]
    history: list[tuple[int, float, int]]
    outcome: Outcome

    @property
    def success(self) -> bool:
        """Whether the solver found an optimum."""
        return self.status.success

    def __getitem__(self, name: str) -> PhaseSolution:
        return self.phases[name]

    def __getattr__(self, name: str) -> Any:
        if name in ("t", "x", "u", "costates", "integral", "error", "mesh", "at"):
            if len(self.phases) == 1:
                return getattr(next(iter(self.phases.values())), name)
            raise AttributeError(
                f"there are {len(self.phases)} phases: use sol[name].{name} with one of {', '.join(self.phases)}"
            )
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: the problem becomes None where its functions cannot be pickled, as lambdas cannot."""
        try:
            pickle.dumps(self.problem)
        except (pickle.PicklingError, AttributeError, TypeError):
            return {**self.__dict__, "problem": None}
        return self.__dict__

    def __copy__(self) -> Solution:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Solution:
        return replace(self, **{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in fields(self)})

    def __repr__(self) -> str:
        nodes = sum(p.mesh.nodes for p in self.phases.values())
        error = max((float(p.error.max()) for p in self.phases.values()), default=0.0)
        return (
            f"Solution({self.status.name}: {self.status.value}; objective {self.objective:.9g}, {self.iterations} "
            f"iterations, "
            f"{nodes} nodes, error {error:.1e})"
        )

    def simulate(self, rtol: float = 1e-10) -> Any:
        """Integrate the dynamics with the controls found (SciPy, DOP853); see `jetplane.control.Simulation`."""
        from .simulation import simulate

        return simulate(self, rtol)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw states, controls, costates and errors: a matplotlib figure, saved where a path is given."""
        from .plotting import plot

        return plot(self, path)

    def save(self, path: str | Path) -> None:
        """Write an npz file: arrays, and a description as JSON with the name of its schema."""
        arrays: dict[str, np.ndarray] = {"p": self.p.all, "y": self.outcome.y}
        for key in ("multipliers", "lower_multipliers", "upper_multipliers"):
            value = getattr(self.outcome, key)
            if value is not None:
                arrays[key] = value
        description: dict[str, Any] = {
            "schema": SCHEMA,
            "status": self.status.name,
            "objective": self.objective,
            "iterations": self.iterations,
            "seconds": self.seconds,
            "history": self.history,
            "parameters": _described(self.p),
            "phases": {},
        }
        for name, ph in self.phases.items():
            description["phases"][name] = {
                key: _described(getattr(ph, key)) for key in ("x", "u", "costates", "integral")
            }
            for key in ("x", "u", "costates", "integral"):
                arrays[f"{name}.{key}"] = getattr(ph, key).all
            for key, values in ph.duals.items():
                arrays[f"{name}.duals.{key}"] = values
            arrays[f"{name}.t"], arrays[f"{name}.error"] = ph.t, ph.error
            arrays[f"{name}.fractions"], arrays[f"{name}.degrees"] = (
                np.array(ph.mesh.fractions),
                np.array(ph.mesh.degrees),
            )
        with open(path, "wb") as file:
            np.savez_compressed(file, description=np.array(json.dumps(description)), **arrays)  # type: ignore[arg-type]


def _described(parts: Parts) -> dict[str, int]:
    return {name: part.stop - part.start for name, part in parts._layout.parts.items()}


def load(path: str | Path, problem: Problem) -> Solution:
    """Read a solution that `Solution.save` wrote, of this problem.

    Raises:
        CheckpointError: no such file, another schema, or other states, controls or phases than the problem has.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
        description = json.loads(str(data["description"]))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a solution: {error}") from error
    if description.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has schema {description.get('schema')!r}, expected {SCHEMA!r}")

    def layout(what: str, sizes: dict[str, int]) -> Layout:
        made = Layout(what)
        for name, size in sizes.items():
            made.add(name, size)
        return made

    expected = {
        name: {"x": _sizes(ph.states), "u": _sizes(ph.controls), "integral": dict.fromkeys(ph.integral, 1)}
        for name, ph in problem.phases.items()
    }
    found = {name: {k: v for k, v in ph.items() if k != "costates"} for name, ph in description["phases"].items()}
    if expected != found or _sizes(problem.parameters) != description["parameters"]:
        raise CheckpointError(f"{path} belongs to another problem: it has {found}, this problem has {expected}")
    phases = {}
    for name, parts in description["phases"].items():
        duals = f"{name}.duals."
        made = {key: Parts(data[f"{name}.{key}"], layout(f"{key} of {name!r}", sizes)) for key, sizes in parts.items()}
        mesh = Mesh(tuple(data[f"{name}.fractions"].tolist()), tuple(data[f"{name}.degrees"].tolist()))
        phases[name] = PhaseSolution(
            name,
            mesh,
            data[f"{name}.t"],
            made["x"],
            made["u"],
            made["costates"],
            made["integral"],
            data[f"{name}.error"],
            {key.removeprefix(duals): values for key, values in data.items() if key.startswith(duals)},
        )
    status = Status[description["status"]]
    outcome = Outcome(
        status,
        data["y"],
        description["objective"],
        description["iterations"],
        data.get("multipliers"),
        data.get("lower_multipliers"),
        data.get("upper_multipliers"),
    )
    return Solution(
        problem,
        status,
        description["objective"],
        phases,
        Parts(data["p"], problem.parameters),
        description["iterations"],
        description["seconds"],
        [tuple(h) for h in description["history"]],
        outcome,
    )


def _sizes(layout: Layout) -> dict[str, int]:
    return {name: part.stop - part.start for name, part in layout.parts.items()}


def phase_solution(nlp: NLP, name: str, outcome: Outcome) -> PhaseSolution:
    """A phase of a solver's result, without its errors."""
    arrays, mesh, place = nlp.phases[name], nlp.meshes[name], nlp.places[name]
    ph = arrays.model.phase
    (nx, nu, _), nodes = arrays.model.sizes, mesh.nodes
    arrays.set(outcome.y)
    t0 = ph.t0[0] if place.t0 is None else outcome.y[place.t0]
    x = arrays.states.T.copy()
    u = outcome.y[place.controls].reshape(nu, nodes).T
    u = np.concatenate([u, mesh.evaluate(u, np.array([1.0]))])
    costates = np.full((nodes + 1, nx), np.nan)
    duals = {}
    if (
        outcome.lower_multipliers is not None
        and outcome.upper_multipliers is not None
        and outcome.multipliers is not None
    ):
        density = np.append(mesh.weights, 1.0)
        duals["integral"] = outcome.multipliers[place.integral_rows]
        duals["path"] = outcome.multipliers[place.path].reshape(-1, nodes).T / density[:-1, None]
        for side in ("lower", "upper"):
            values = getattr(outcome, f"{side}_multipliers")
            duals[f"{side} x"] = values[place.states].reshape(nx, nodes + 1).T / density[:, None]
            duals[f"{side} u"] = values[place.controls].reshape(nu, nodes).T / density[:-1, None]
    if outcome.multipliers is not None:
        # Defects are differences of local derivatives: multipliers are costates times quadrature weights.
        multipliers = outcome.multipliers[place.defects].reshape(nx, nodes).T
        weights = np.concatenate([radau(n)[1] for n in mesh.degrees])
        costates[:-1] = -multipliers / weights[:, None]
        last = mesh.degrees[-1]
        costates[-1] = -radau(last)[2][:, -1] @ multipliers[-last:]
    return PhaseSolution(
        name,
        mesh,
        t0 + arrays.length * mesh.times,
        Parts(x, ph.states),
        Parts(u, ph.controls),
        Parts(costates, ph.states),
        Parts(outcome.y[place.integrals].copy(), arrays.model.integrals),
        np.zeros(0),
        duals,
    )
