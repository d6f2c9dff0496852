"""From a problem to a solution: trace, transcribe, solve, estimate the error, refine."""

from __future__ import annotations

import operator
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError, CoarseMeshWarning, NonFiniteError, ShapeError
from . import interior_point, ipopt, trust
from .guessing import require_finite, require_same, set_integrals, start, trajectory
from .model import Model
from .nlp import NLP
from .problem import INFINITY, Parts, Problem, is_whole, numbers, vector
from .radau import Mesh, as_mesh
from .refinement import errors, refined
from .solution import PhaseSolution, Solution, phase_solution
from .status import Iteration, Outcome, Status

FIRST_MESH = (8, 4)
SECOND_START = (Status.INFEASIBLE, Status.RESTORATION_FAILED, Status.STALLED, Status.ITERATION_LIMIT)
COARSE = 0.05  # relative error of states from which a solution is not to be trusted


def meshes_of(problem: Problem, mesh: Any) -> dict[str, Mesh]:
    """A mesh for each phase, from one for all or a dict by name."""
    if isinstance(mesh, dict):
        unknown = set(mesh) ^ set(problem.phases)
        if unknown:
            raise ArgumentError(f"expected a mesh for each of the phases {sorted(problem.phases)}, got {sorted(mesh)}")
        return {name: as_mesh(mesh[name]) for name in problem.phases}
    return {name: as_mesh(mesh) for name in problem.phases}


def solve(
    problem: Problem,
    *,
    mesh: Any = "refine",
    tol: float = 1e-8,
    accuracy: float = 1e-6,
    refinements: int = 10,
    guess: Solution | None = None,
    solver: str = "ipopt",
    max_iterations: int = 3000,
    time_limit: float | None = None,
    scaling: Any = "auto",
    progress: bool = False,
    backend: str = "auto",
    options: dict[str, Any] | None = None,
) -> Solution:
    """Solve an optimal control problem.

    Args:
        problem: what to solve.
        mesh: "refine", where a coarse mesh is refined until the error is below `accuracy`; or one mesh: a `Mesh`,
            (intervals, points in each), or a dict by phases.
        tol: tolerance of the solver: the largest scaled error of optimality and feasibility.
        accuracy: relative error of the states, estimated, below which refinement ends.
        refinements: how often at most a mesh is refined.
        guess: a solution to start from, of the same states and controls; on the same mesh its multipliers are used too.
        solver: "ipopt"; "banded", the interior point of `jetplane.control.interior_point`, whose linear systems are
            solved interval by interval, in torch, faster than IPOPT's from some 3,000 variables on; the path of a
            libipopt; or "trust-constr" (SciPy).
        max_iterations: of the solver, for each mesh.
        time_limit: in seconds, for all meshes together.
        scaling: "auto", by bounds and guess; "none"; or a dict of typical magnitudes of states, controls and
            parameters.
        progress: write a line to stderr, which is overwritten, with each iteration's numbers.
        backend: "auto", "llvm" or "torch".
        options: handed on to IPOPT.

    Returns:
        a `Solution`, also where the solver has failed: see its status.

    Warns:
        CoarseMeshWarning: the states are off by more than 5 % of their size between nodes of the (last) mesh.

    Raises:
        ArgumentError, ShapeError, TraceError: the problem as it stands cannot be solved; the message names the place.
        NonFiniteError: a function is not finite at the guess.
        MissingPackageError: there is no IPOPT.
    """
    _require_limits(max_iterations, time_limit, tol=tol, accuracy=accuracy)
    if not is_whole(refinements, 0):
        raise ArgumentError(f"refinements must be a whole number of at least 0, got {refinements!r}")
    if not isinstance(solver, str):
        raise ArgumentError(f"solver must be a name or a path, as a string, got {solver!r}")
    own = solver in ("banded", "trust-constr")
    path = None if own or solver == "ipopt" else solver
    if own and options:
        raise ArgumentError(f"options are IPOPT's; solver={solver!r} takes none, got {sorted(options)}")
    if path is not None and path.isidentifier():
        raise ArgumentError(
            f"solver must be 'ipopt', 'banded', 'trust-constr' or the path of a libipopt, got {solver!r}"
        )
    if not own:
        ipopt.library(path)  # that there is none is said before anything is computed
    began, clock = time.monotonic(), time.process_time()
    model = Model(problem, backend)
    refine = isinstance(mesh, str) and mesh == "refine"
    meshes = _first_meshes(model, guess) if refine else meshes_of(problem, mesh)
    seconds = {"setup": time.process_time() - clock, "derivatives": 0.0, "solver": 0.0}
    history: list[tuple[int, float, int]] = []
    current, total = guess, 0
    line = _Line(progress)
    while True:
        clock = time.process_time()
        nlp = NLP(model, meshes)
        first = start(nlp, current)
        seconds["setup"] += time.process_time() - clock
        left = None if time_limit is None else max(time_limit - (time.monotonic() - began), 1e-3)
        clock = time.process_time()
        limits = {"max_iterations": max_iterations, "tol": tol, "time_limit": left}
        if solver == "trust-constr":
            outcome = trust.solve(nlp, first, options=limits, on_iteration=line.of(nlp))
        elif solver == "banded":
            outcome = interior_point.solve(
                nlp,
                first,
                options=limits,
                scaling=scaling_of(nlp, first.y, scaling),
                warm=first.multipliers is not None,
                on_iteration=line.of(nlp),
            )
        else:
            given: dict[str, Any] = {"tol": tol, "max_iter": max_iterations}
            if left is not None:
                given["max_wall_time"] = left
            outcome = ipopt.solve(
                nlp,
                first,
                options={**given, **(options or {})},
                scaling=scaling_of(nlp, first.y, scaling),
                warm=first.multipliers is not None,
                on_iteration=line.of(nlp),
                path=path,
            )
        seconds["derivatives"] += outcome.callback_seconds
        seconds["solver"] += time.process_time() - clock - outcome.callback_seconds
        total += outcome.iterations
        current = _solution(problem, nlp, outcome, seconds, history, total)
        if not outcome.status.success or not refine or len(history) > refinements:
            break
        worst = {name: ph.error for name, ph in current.phases.items()}
        if all(float(e.max()) <= accuracy for e in worst.values()):
            break
        meshes = {name: refined(meshes[name], error, accuracy) for name, error in worst.items()}
    line.close()
    _warn_of_coarse_mesh(current)
    return current


def _require_limits(max_iterations: Any, time_limit: Any, **tolerances: Any) -> None:
    """Raise an ArgumentError unless limits and tolerances are numbers that a solver can end by."""
    for name, value in tolerances.items():
        if not isinstance(value, Real) or not float(value) > 0:
            raise ArgumentError(f"{name} must be a positive number, got {value!r}")
    if not is_whole(max_iterations, 0):
        raise ArgumentError(f"max_iterations must be a whole number of at least 0, got {max_iterations!r}")
    if time_limit is not None and not (isinstance(time_limit, Real) and float(time_limit) >= 0):
        raise ArgumentError(f"time_limit must be seconds or None, got {time_limit!r}")


def _warn_of_coarse_mesh(solution: Solution) -> None:
    name, ph = max(solution.phases.items(), key=lambda item: float(item[1].error.max()))
    error = float(ph.error.max())
    if solution.success and error > COARSE:
        warnings.warn(
            f"the states of phase {name!r} are off by {error:.2g} of their size in interval {int(ph.error.argmax())}: "
            f"the mesh is too coarse, and its optimum may be false; use mesh='refine' or more intervals",
            CoarseMeshWarning,
            stacklevel=4,  # at the line that calls ocp.solve
        )


def _warn_of_coarse_meshes(batch: Batch) -> None:
    solved = np.flatnonzero(batch.success).tolist()
    error = np.array([max(float(ph.error.max()) for ph in batch[k].phases.values()) for k in solved])
    if (error > COARSE).any():
        worst = int(error.argmax())
        warnings.warn(
            f"the states of {int((error > COARSE).sum())} of {len(solved)} solutions are off by more than {COARSE:.0%} "
            f"of their size, those of problem {solved[worst]} by {error[worst]:.2g}: the mesh is too coarse, optima "
            f"may be false; use more intervals",
            CoarseMeshWarning,
            stacklevel=3,  # at the line that calls solve_batch
        )


@dataclass
class Batch:
    """Solutions of one problem for many values of its parameters; ``batch[i]`` is a `Solution`.

    Attributes:
        status: of each problem.
        objective, iterations: arrays (problems,).
        starts: how often each was started, once or twice (problems,); iterations are those of all starts.
        seconds: processor time of all of them together: set-up, derivatives and the rest of the solver.
    """

    problem: Problem
    status: list[Status]
    objective: np.ndarray
    iterations: np.ndarray
    starts: np.ndarray
    seconds: dict[str, float]
    nlp: NLP = field(repr=False)
    outcomes: list[Outcome] = field(repr=False)

    @property
    def success(self) -> np.ndarray:
        """Which problems have a solution (problems,)."""
        return np.array([status.success for status in self.status])

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, number: int) -> Solution:
        outcome = self.outcomes[operator.index(number)]
        return _solution(self.problem, self.nlp, outcome, self.seconds, [], outcome.iterations)


def solve_batch(
    problem: Problem,
    parameters: dict[str, Any],
    *,
    mesh: Any = (20, 3),
    tol: float = 1e-8,
    guess: Solution | None = None,
    max_iterations: int = 3000,
    time_limit: float | None = None,
    scaling: Any = "auto",
    progress: bool = False,
    backend: str = "auto",
    device: Any = "cpu",
    chunk: int | None = None,
) -> Batch:
    """Solve a problem for many values of its static parameters at once.

    Each value makes a problem of its own, where these parameters are fixed; others stay free. All of them go through
    the iterations of `jetplane.control.interior_point` together, on one mesh: functions, derivatives and linear algebra
    are computed for all at once, and a problem leaves when it has ended. Problems that end infeasible, stalled or at
    the limit of iterations are started once more, each from the solution of the problem with the nearest parameters.

    Args:
        problem: what to solve.
        parameters: by name: values (problems,), or (problems, size) of a parameter with several entries.
        mesh: for all problems, as for `solve`.
        tol: as for `solve`.
        guess: a solution whose trajectory all problems start from.
        max_iterations: as for `solve`, of each start.
        time_limit: in seconds, for all problems together.
        scaling: as for `solve`, from the first problem whose functions are finite at the guess.
        progress: as for `solve`, of the problem with the largest error.
        backend: as for `solve`.
        device: of the linear algebra, for example "cuda"; functions are computed on the CPU.
        chunk: how many problems at most go through the iterations together: 100 on the CPU, where more would not fit
            its caches; all of them on other devices.

    Returns:
        a `Batch`, also where problems have failed: see its `status`.

    Warns:
        CoarseMeshWarning: as for `solve`, once, with the number of such solutions.

    Raises:
        ArgumentError: no parameters, unknown ones, values outside of their bounds; a device that is not there.
        ShapeError: values of a wrong shape.
        NonFiniteError: in every problem, a function is not finite at the guess; a problem where it is so while it is
            finite in another one has the status NOT_A_NUMBER.

    Example:
        >>> import jetplane as jp
        >>> ocp = jp.control.Problem()
        >>> ocp.parameter("distance", 1, 0.1, 10.0)
        >>> ph = ocp.phase("cart", states={"x": 1, "v": 1}, controls={"a": (1, -1.0, 1.0)}, t0=0.0, tf=(0.1, 20.0))
        >>> ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
        >>> ph.start(x=0.0, v=0.0); ph.end(v=0.0)
        >>> ocp.boundary["there"] = (lambda e: e.cart.xf.x - e.p.distance, 0.0, 0.0)
        >>> ocp.minimize(final=lambda e: e.cart.tf)
        >>> batch = jp.control.solve_batch(ocp, {"distance": [1.0, 4.0]}, mesh=(10, 2))
        >>> batch.objective.round(6).tolist(), batch.success.all().item()
        ([2.0, 4.0], True)
    """
    _require_limits(max_iterations, time_limit, tol=tol)
    if chunk is not None and not is_whole(chunk, 1):
        raise ArgumentError(f"chunk must be a whole number of at least 1, got {chunk!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if isinstance(mesh, str):
        raise ArgumentError(f"solve_batch takes one mesh for all problems, as (intervals, points), got {mesh!r}")
    began, clock = time.monotonic(), time.process_time()
    model = Model(problem, backend)
    nlp = NLP(model, meshes_of(problem, mesh))
    values, places = _values(problem, parameters)
    columns = nlp.parameters.start + places
    y, lower, upper = (
        np.repeat(a[:, None], values.shape[1], 1) for a in (trajectory(nlp, guess), nlp.lower, nlp.upper)
    )
    for target in (y, lower, upper):
        target[columns] = values
    sound = _with_integrals(nlp, y)
    setup = time.process_time() - clock
    clock = time.process_time()
    line = _Line(progress)
    factors = scaling_of(nlp, y[:, sound], scaling)
    size = chunk or (100 if torch.device(device).type == "cpu" else y.shape[1])
    stop = threading.Event()
    derivatives = 0.0

    def solved(numbers: np.ndarray, y: np.ndarray) -> list[Outcome]:
        """Outcomes of some problems from first iterates of theirs, chunk by chunk."""
        nonlocal derivatives
        found: list[Outcome] = []
        for first_problem in range(0, len(numbers), size):
            part = slice(first_problem, first_problem + size)
            left = None if time_limit is None else max(time_limit - (time.monotonic() - began), 1e-3)
            found += interior_point.solve_batch(
                nlp,
                y[:, part],
                lower[:, numbers[part]],
                upper[:, numbers[part]],
                options={"tol": tol, "max_iterations": max_iterations, "time_limit": left},
                scaling=factors,
                on_iteration=line.of(nlp),
                device=device,
                stop=stop,
            )
        derivatives += sum(o.callback_seconds for o in found)
        return found

    with ipopt.interrupts(stop):  # Ctrl-C ends those that wait, too
        outcomes = solved(np.arange(y.shape[1]), y)
        again, nearest = _second_starts(values, outcomes)
        starts = np.ones(len(outcomes), int)
        if len(again) and not stop.is_set():
            y = np.stack([outcomes[number].y for number in nearest], 1)
            y[columns] = values[:, again]
            starts[again] = 2
            for number, second in zip(again.tolist(), solved(again, y), strict=True):
                iterations = outcomes[number].iterations + second.iterations
                better = second if second.status.success else outcomes[number]
                outcomes[number] = replace(better, iterations=iterations)
    line.close()
    seconds = {"setup": setup, "derivatives": derivatives, "solver": time.process_time() - clock - derivatives}
    batch = Batch(
        problem,
        [o.status for o in outcomes],
        np.array([o.objective for o in outcomes]),
        np.array([o.iterations for o in outcomes]),
        starts,
        seconds,
        nlp,
        outcomes,
    )
    _warn_of_coarse_meshes(batch)
    return batch


def _second_starts(values: np.ndarray, outcomes: list[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Problems that ended without a solution, and for each of them the solved one with the nearest parameters."""
    solved = np.flatnonzero([o.status.success for o in outcomes])
    failed = np.flatnonzero([o.status in SECOND_START for o in outcomes])
    if not len(solved) or not len(failed):
        return failed[:0], failed[:0]
    spans = np.ptp(values, axis=1, keepdims=True)
    scaled = values / np.where(spans > 0, spans, 1.0)
    distances = np.square(scaled[:, failed, None] - scaled[:, None, solved]).sum(0)
    return failed, solved[distances.argmin(1)]


def _with_integrals(nlp: NLP, y: np.ndarray) -> int:
    """Write integrals into the first iterates (variables, problems); the number of the first one that is finite."""
    sound, failure = None, None
    for number in range(y.shape[1]):
        first = y[:, number].copy()
        try:
            require_finite(nlp, first)
        except NonFiniteError as error:
            failure = failure or error
            continue
        set_integrals(nlp, first)
        y[:, number] = first
        sound = number if sound is None else sound
    if sound is None:
        assert failure is not None
        raise failure
    return sound


def _values(problem: Problem, parameters: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Values of parameters (entries, problems) and their places among all parameters."""
    if not isinstance(parameters, dict):
        raise ArgumentError(
            f"parameters must be a dict of values by the names of parameters, got {type(parameters).__name__}"
        )
    if not parameters:
        raise ArgumentError("solve_batch needs values of at least one parameter, got none")
    layout = problem.parameters
    rows, places = [], []
    for name, given in parameters.items():
        part = layout.part(name)
        size = part.stop - part.start
        array = numbers(f"values of {name!r}, (problems, {size})", given)
        array = array[:, None] if array.ndim == 1 and size == 1 else array
        if array.ndim != 2 or array.shape[1] != size or not len(array):
            raise ShapeError(f"values of {name!r} must have shape (problems, {size}), got {array.shape}")
        if rows and len(array) != rows[0].shape[1]:
            raise ShapeError(f"{name!r} has {len(array)} values, other parameters have {rows[0].shape[1]}")
        bad = ~((array >= layout.lower[part]) & (array <= layout.upper[part]))
        if bad.any():
            number, entry = map(int, np.argwhere(bad)[0])
            raise ArgumentError(
                f"{layout.entry(part.start + entry)} = {array[number, entry]:g} of problem {number} is outside its "
                f"bounds [{layout.lower[part][entry]:g}, {layout.upper[part][entry]:g}]"
            )
        rows.append(array.T)
        places.append(np.arange(part.start, part.stop))
    return np.concatenate(rows), np.concatenate(places)


def _first_meshes(model: Model, guess: Solution | None) -> dict[str, Mesh]:
    if guess is not None:
        require_same(model, guess)
        return {name: ph.mesh for name, ph in guess.phases.items()}
    return {name: Mesh.uniform(*FIRST_MESH) for name in model.phases}


def _solution(problem, nlp: NLP, outcome: Outcome, seconds, history, total: int) -> Solution:
    p = outcome.y[nlp.parameters].copy()
    phases: dict[str, PhaseSolution] = {}
    for name, model in nlp.model.phases.items():
        phases[name] = phase_solution(nlp, name, outcome)
        phases[name].error = errors(model, phases[name], p)
    worst = max(float(ph.error.max()) for ph in phases.values())
    history.append((sum(m.nodes for m in nlp.meshes.values()), worst, outcome.iterations))
    return Solution(
        problem,
        outcome.status,
        outcome.objective,
        phases,
        Parts(p, problem.parameters),
        total,
        seconds,
        history,
        outcome,
    )


def _magnitude(lower: np.ndarray, upper: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Typical sizes of variables (n,): of two bounds, else of the guess (n, points); 1 where it is zero."""
    both = (np.abs(lower) < INFINITY) & (np.abs(upper) < INFINITY) & (lower < upper)
    bound = np.maximum(np.abs(np.where(both, lower, 0.0)), np.abs(np.where(both, upper, 0.0)))
    guess = np.abs(values).max(1, initial=0.0)
    size = np.where(both, bound, guess)
    return np.where((size > 1e-8) & np.isfinite(size), size, 1.0)


def scaling_of(nlp: NLP, y: np.ndarray, scaling: Any) -> ipopt.Scaling | None:
    """Factors for the solver: each variable by its typical size, defects as their states, other rows by their slopes.

    Raises:
        ArgumentError: an unknown way, or a magnitude that is not positive.
    """
    if isinstance(scaling, str) and scaling == "none":
        return None
    if not isinstance(scaling, dict) and scaling != "auto":
        raise ArgumentError(f"scaling must be 'auto', 'none' or a dict of magnitudes, got {scaling!r}")
    given = scaling if isinstance(scaling, dict) else {}
    sizes = np.ones(nlp.n)
    rows = np.ones(nlp.m)
    used: set[str] = set()

    def with_given(layout, values: np.ndarray) -> np.ndarray:
        for name, part in layout.parts.items():
            if name in given:
                used.add(name)
                values[part] = vector(f"scaling of {name!r}", part.stop - part.start, given[name])
        if not (values > 0).all():
            raise ArgumentError(f"{layout.what}: magnitudes for scaling must be positive")
        return values

    for name, model in nlp.model.phases.items():
        place, nodes, ph = nlp.places[name], nlp.meshes[name].nodes, model.phase
        x = y[place.states].reshape(-1, nodes + 1)
        u = y[place.controls].reshape(-1, nodes)
        states = with_given(ph.states, _magnitude(ph.states.lower, ph.states.upper, x))
        controls = with_given(ph.controls, _magnitude(ph.controls.lower, ph.controls.upper, u))
        sizes[place.states], sizes[place.controls] = np.repeat(states, nodes + 1), np.repeat(controls, nodes)
        rows[place.defects] = 1 / np.repeat(states, nodes)
        length = max(abs(nlp.phases[name].length), 1e-8)
        for column in (place.t0, place.tf):
            if column is not None:
                sizes[column] = length
        integrals = np.abs(y[place.integrals])
        sizes[place.integrals] = np.where(integrals > 1e-8, integrals, 1.0)
        rows[place.integral_rows] = 1 / sizes[place.integrals]
    parameters = with_given(
        nlp.model.parameters,
        _magnitude(nlp.model.parameters.lower, nlp.model.parameters.upper, y[nlp.parameters][:, None]),
    )
    sizes[nlp.parameters] = parameters
    unknown = sorted(set(given) - used)
    if unknown:
        raise ArgumentError(f"scaling names {unknown}, which are not states, controls or parameters of the problem")
    # Path and boundary rows: slopes of the scaled variables of at most 1.
    slopes = np.zeros(nlp.m)
    row, column = nlp.jacobian_structure
    np.maximum.at(slopes, row, np.abs(nlp.jacobian(y)) * sizes[column])
    others = np.ones(nlp.m, bool)
    for place in nlp.places.values():
        others[place.defects] = others[place.integral_rows] = False
    rows[others] = 1 / np.clip(slopes[others], 1.0, 1e8)
    slope = float(np.max(np.abs(nlp.gradient(y)) * sizes, initial=0.0))
    return ipopt.Scaling(1 / sizes, rows, 1 / max(slope, 1.0) if np.isfinite(slope) else 1.0)


class _Line:
    """A line of progress, overwritten by the next one."""

    def __init__(self, shown: bool) -> None:
        self._shown, self._last, self._began = shown, 0.0, time.monotonic()

    def of(self, nlp: NLP):
        if not self._shown:
            return None

        def write(it: Iteration) -> None:
            now = time.monotonic()
            if now - self._last > 0.1 or it.number == 0:
                self._last = now
                sys.stderr.write(
                    f"\r\033[K{nlp.n} variables, iteration {it.number}: cost {it.objective:.8g}, infeasibility "
                    f"{it.infeasibility:.1e}, optimality {it.dual_infeasibility:.1e}, {now - self._began:.1f} s"
                )
                sys.stderr.flush()

        return write

    def close(self) -> None:
        if self._shown:
            sys.stderr.write("\n")
