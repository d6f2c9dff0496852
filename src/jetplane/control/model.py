"""A problem, traced: one program for the nodes of each phase, and one for the ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import count
from typing import Any

import numpy as np

from ..errors import ArgumentError, ShapeError
from .problem import Constraint, End, Ends, Layout, Parts, Phase, Problem, bounds
from .program import Program, trace


@dataclass
class PhaseModel:
    """A phase's program: variables are states, controls, time, parameters; outputs dynamics, integrals, running, path.

    Attributes:
        names: of each output.
        timed: how many outputs are rates: dynamics, integrals and the running cost.
        lower, upper: bounds of the path's outputs.
        integral_lower, integral_upper: bounds of the integrals.
    """

    phase: Phase
    program: Program
    names: list[str]
    running: bool
    timed: int
    lower: np.ndarray
    upper: np.ndarray
    integral_lower: np.ndarray
    integral_upper: np.ndarray
    integrals: Layout

    @property
    def sizes(self) -> tuple[int, int, int]:
        """States, controls, integrals."""
        return self.phase.states.size, self.phase.controls.size, self.integrals.size


class Model:
    """Programs of all phases and of the ends.

    Args:
        problem: as it is now; later changes do not reach the model.
        backend: "auto", "llvm" or "torch".

    Raises:
        ArgumentError: no phases, no cost, states that no dynamics define, constraints that no variable enters, phases
            that
            nothing links.
        ShapeError: a function returned a wrong shape.
        TraceError: a function reads values or combines nodes.
    """

    def __init__(self, problem: Problem, backend: str = "auto") -> None:
        if not problem.phases:
            raise ArgumentError("the problem has no phases")
        if problem.final is None and not problem.running:
            raise ArgumentError("the problem has no cost: call ocp.minimize(final=..., running=...)")
        self.problem = problem
        self.parameters = problem.parameters
        self.phases = {name: self._phase(ph, backend) for name, ph in problem.phases.items()}
        self._ends(backend)
        self._linked()

    def _phase(self, ph: Phase, backend: str) -> PhaseModel:
        if ph.dynamics is None:
            raise ArgumentError(
                f"phase {ph.name!r} has no dynamics: states {', '.join(ph.states.parts)} are not defined"
            )
        nx, nu = ph.states.size, ph.controls.size
        running = self.problem.running.get(ph.name)

        def run(z: Any, p: Any) -> list[tuple[str, Any, int | None]]:
            arguments = (
                Parts(z[:, :nx], ph.states),
                Parts(z[:, nx : nx + nu], ph.controls),
                z[:, nx + nu :],
                Parts(p, self.parameters),
            )

            def value(what: str, function: Any, size: int | None) -> tuple[str, Any, int | None]:
                what = f"{what} of phase {ph.name!r}"
                return what, called(what, function, "x, u, t, p", *arguments), size

            made = dynamics_parts(ph, value("dynamics", ph.dynamics, None)[1])
            made += [value(f"integral {name!r}", c.function, 1) for name, c in ph.integral.items()]
            if running:
                made.append(value("the running cost", running, 1))
            return made + [value(f"path constraint {name!r}", c.function, None) for name, c in ph.path.items()]

        sizes = {part.stop - part.start for layout in (ph.states, ph.controls) for part in layout.parts.values()}
        # A number of nodes that no part has, so that shapes cannot be mistaken for one another.
        lanes = next(n for n in count(2) if n not in sizes | {nx, nu, self.parameters.size})
        graph, variables, results = trace(run, nx + nu + 1, self.parameters.size, lanes)
        parts = len(results) - len(ph.path)
        names = [f"rate of {ph.states.entry(i)}" for i in range(nx)]
        names += [f"integral {n}" for n in ph.integral] + (["running cost"] if running else [])
        lower, upper = [], []
        for (name, constraint), nodes in zip(ph.path.items(), results[parts:], strict=True):
            low, high = bounds(
                f"path constraint {name!r} of {ph.name!r}", len(nodes), constraint.lower, constraint.upper
            )
            lower.append(low)
            upper.append(high)
            names += [f"{name}[{i}]" if len(nodes) > 1 else name for i in range(len(nodes))]
        integrals = Layout(f"integrals of {ph.name!r}")
        for name, constraint in ph.integral.items():
            integrals.add(name, (1, constraint.lower, constraint.upper))
        program = Program(graph, variables, [n for part in results for n in part], backend)
        self._used(f"of phase {ph.name!r}", names, program, range(len(names) - sum(map(len, lower)), len(names)))
        return PhaseModel(
            ph,
            program,
            names,
            running is not None,
            nx + len(ph.integral) + (running is not None),
            np.concatenate([*lower, np.zeros(0)]),
            np.concatenate([*upper, np.zeros(0)]),
            integrals.lower,
            integrals.upper,
            integrals,
        )

    def _used(self, where: str, names: list[str], program: Program, rows: Any) -> None:
        used = {row for row, _ in program.jacobian_keys}
        for row in rows:
            if row not in used:
                raise ArgumentError(f"constraint {names[row]!r} {where} does not depend on any variable")

    def _ends(self, backend: str) -> None:
        problem = self.problem
        self.end_slices: dict[str, dict[str, slice]] = {}
        start = 0
        for name, model in self.phases.items():
            nx, _, nq = model.sizes
            self.end_slices[name] = {}
            for part, size in (("x0", nx), ("xf", nx), ("t0", 1), ("tf", 1), ("integral", nq)):
                self.end_slices[name][part] = slice(start, start + size)
                start += size

        def run(_: Any, z: Any) -> list[tuple[str, Any, int | None]]:
            phases = {}
            for name, model in self.phases.items():
                s = self.end_slices[name]
                states = model.phase.states
                phases[name] = End(
                    Parts(z[s["x0"]], states),
                    Parts(z[s["xf"]], states),
                    z[s["t0"]],
                    z[s["tf"]],
                    Parts(z[s["integral"]], model.integrals),
                )
            e = Ends(phases, Parts(z[start:], self.parameters))
            made: list[tuple[str, Any, int | None]] = []
            if problem.final is not None:
                cost = called("the final cost", problem.final, "e", e)
                if getattr(cost, "numel", lambda: 1)() != 1:
                    raise ShapeError(f"the final cost must be one number, got shape {tuple(cost.shape)}")
                made.append(("the final cost", cost.reshape(1, 1) if hasattr(cost, "reshape") else cost, 1))
            for name, constraint in constraints.items():
                value = called(f"boundary constraint {name!r}", constraint.function, "e", e)
                made.append(
                    (
                        f"boundary constraint {name!r}",
                        value.reshape(1, -1) if hasattr(value, "reshape") else value,
                        None,
                    )
                )
            return made

        constraints = {
            f"length of {name}": Constraint(partial(_length, name), 0.0, None)
            for name, model in self.phases.items()
            if model.phase.t0[1] > model.phase.tf[0]  # its bounds would let it run backwards
        }
        constraints.update(problem.boundary)
        graph, variables, results = trace(run, 0, start + self.parameters.size, 0)
        self.has_final = problem.final is not None
        lower, upper, names = [], [], ["final cost"] * self.has_final
        for (name, constraint), nodes in zip(constraints.items(), results[self.has_final :], strict=True):
            low, high = bounds(f"boundary constraint {name!r}", len(nodes), constraint.lower, constraint.upper)
            lower.append(low)
            upper.append(high)
            names += [f"{name}[{i}]" if len(nodes) > 1 else name for i in range(len(nodes))]
        self.end_names = names
        self.lower, self.upper = np.concatenate([*lower, np.zeros(0)]), np.concatenate([*upper, np.zeros(0)])
        self.ends = Program(graph, variables, [n for part in results for n in part], backend)
        self._used("of the ends", names, self.ends, range(self.has_final, len(names)))

    def _linked(self) -> None:
        """Every phase meets the others, in a constraint of ends or by a parameter."""
        if len(self.phases) < 2:
            return
        groups: list[set[str]] = []
        owners = {}
        for name, slices in self.end_slices.items():
            owners.update({i: name for s in slices.values() for i in range(s.start, s.stop)})
        for row in range(self.has_final, len(self.end_names)):
            groups.append({owners.get(i, "") for r, i in self.ends.jacobian_keys if r == row})
        for name, model in self.phases.items():
            first = sum(model.sizes[:2]) + 1
            if any(i >= first for _, i in model.program.jacobian_keys):
                groups.append({name, ""})
        reached = {next(iter(self.phases))}
        while True:
            more = set().union(*(g for g in groups if g & reached)) - reached
            if not more:
                break
            reached |= more
        apart = [name for name in self.phases if name not in reached]
        if apart:
            raise ArgumentError(
                f"nothing links phase {apart[0]!r} to the others: call ocp.link(before, after), or add a boundary "
                f"constraint on both"
            )


def _length(name: str, e: Ends) -> Any:
    phase = getattr(e, name)
    return phase.tf - phase.t0


def called(what: str, function: Any, names: str, *arguments: Any) -> Any:
    """A function of the user's at its arguments.

    Raises:
        ArgumentError: it takes others.
    """
    try:
        signature(function).bind(*arguments)
    except TypeError as error:
        raise ArgumentError(f"{what} must be a function of ({names}): {error}") from error
    except ValueError:  # of a builtin, which has no signature
        pass
    return function(*arguments)


def dynamics_parts(ph: Phase, value: Any) -> list[tuple[str, Any, int | None]]:
    """What a phase's dynamics returned, in the order of its states."""
    what = f"dynamics of phase {ph.name!r}"
    if isinstance(value, (tuple, list)):
        raise ShapeError(
            f"{what} must return a dict by names of states, or one tensor (nodes, {ph.states.size}) as torch.stack or "
            f"torch.cat makes, got a {type(value).__name__}"
        )
    if not isinstance(value, dict):
        return [(what, value, ph.states.size)]
    missing, unknown = sorted(set(ph.states.parts) - set(value)), sorted(set(value) - set(ph.states.parts))
    if missing:
        raise ArgumentError(f"{what} do not define {', '.join(missing)}")
    if unknown:
        raise ArgumentError(
            f"{what} define {', '.join(unknown)}, which are not states; the states are {', '.join(ph.states.parts)}"
        )
    return [
        (f"rate of {name!r} in phase {ph.name!r}", value[name], part.stop - part.start)
        for name, part in ph.states.parts.items()
    ]
