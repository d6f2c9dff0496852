"""What the engineer says: phases with named states and controls, constraints, costs."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from .check import CheckReport
    from .nlp import NLP
    from .solution import Solution

Function = Callable[[Any, Any, Any, Any], Any]
INFINITY = 1e20  # what is beyond is no bound
RESERVED = {
    "all": "the whole vector",
    "t0": "the initial time",
    "tf": "the final time",
}


@dataclass
class Layout:
    """Names of parts of a vector, with bounds of each entry."""

    what: str
    parts: dict[str, slice] = field(default_factory=dict)
    lower: np.ndarray = field(default_factory=lambda: np.zeros(0))
    upper: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def size(self) -> int:
        """Entries of all parts."""
        return len(self.lower)

    def add(self, name: str, spec: Any) -> None:
        """A part: its size, or (size, lower, upper)."""
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ArgumentError(f"a name in {self.what} must be a Python identifier, got {name!r}")
        if name in RESERVED:
            raise ArgumentError(f"{self.what}: the name {name!r} is reserved for {RESERVED[name]}; choose another")
        if name.startswith("_"):
            raise ArgumentError(f"{self.what}: names that begin with '_' are Python's own, got {name!r}")
        if name in self.parts:
            raise ArgumentError(f"{self.what} have two parts called {name!r}")
        given: Any
        given, low, high = spec if isinstance(spec, (tuple, list)) and len(spec) == 3 else (spec, None, None)
        if not is_whole(given, 1):
            raise ArgumentError(f"{self.what}: {name!r} must be a size or (size, lower, upper), got {spec!r}")
        size = operator.index(given)
        lower, upper = bounds(f"{self.what}: {name!r}", size, low, high)
        self.parts[name] = slice(self.size, self.size + size)
        self.lower, self.upper = np.append(self.lower, lower), np.append(self.upper, upper)

    def entry(self, number: int) -> str:
        """The name of an entry: ``v[2]``."""
        for name, part in self.parts.items():
            if part.start <= number < part.stop:
                return name if part.stop - part.start == 1 else f"{name}[{number - part.start}]"
        raise IndexError(number)

    def part(self, name: str) -> slice:
        """Where a part lies.

        Raises:
            ArgumentError: there is none of this name.
        """
        if name not in self.parts:
            raise ArgumentError(f"{self.what} have no {name!r}; they are {', '.join(self.parts) or 'none'}")
        return self.parts[name]


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least so much, Python's or NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def bounds(what: str, size: int, lower: Any, upper: Any) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (size,) of bounds; None is no bound.

    Raises:
        ArgumentError: they cross, or are NaN.
    """
    low = vector(f"{what}, lower bound", size, -np.inf if lower is None else lower)
    high = vector(f"{what}, upper bound", size, np.inf if upper is None else upper)
    if (low > high).any():
        n = int(np.argmax(low > high))
        raise ArgumentError(f"{what}: bounds cross in entry {n}: lower {low[n]:g} is above upper {high[n]:g}")
    return low, high


def numbers(what: str, value: Any) -> np.ndarray:
    """Real numbers, in lists, arrays or tensors of any dtype, as an array in double precision.

    Raises:
        ArgumentError: they are complex, or no numbers.
    """
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value if value.is_complex() else value.double()).numpy()
        array = np.asarray(value)
        return array.astype(float, casting="same_kind" if array.dtype.kind == "c" else "unsafe")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{what}: expected real numbers, got {value!r}: {error}") from error


def vector(what: str, size: int, value: Any) -> np.ndarray:
    """A number or `size` of them as an array."""
    array = numbers(what, value)
    if array.shape not in ((), (1,), (size,)):
        raise ShapeError(f"{what}: expected a number or {size} of them, got shape {array.shape}")
    if np.isnan(array).any():
        raise ArgumentError(f"{what}: expected numbers, got NaN")
    return np.broadcast_to(array, (size,)).copy()


class Parts:
    """Named parts of the last dimension of a tensor or an array: ``x.v``, ``x["v"]``; `all` is the whole.

    In a traced function a part has shape (nodes, size); in a function of ends, (size,).
    """

    def __init__(self, all: Any, layout: Layout) -> None:
        self.all, self._layout = all, layout

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Any:
        return self.all[..., self._layout.part(name)]

    def __iter__(self):
        return iter(self._layout.parts)

    def __dir__(self):
        return [*super().__dir__(), *self._layout.parts]

    def __repr__(self) -> str:
        return f"Parts({', '.join(self._layout.parts)}; {tuple(self.all.shape)})"


@dataclass
class Constraint:
    """A function with bounds."""

    function: Callable[..., Any]
    lower: Any
    upper: Any


class Constraints(dict[str, Any]):
    """Constraints by name: ``constraints["tilt"] = (function, lower, upper)``; None is no bound."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, Constraint):
            value = (value.function, value.lower, value.upper)
        if not (isinstance(value, (tuple, list)) and len(value) == 3 and callable(value[0])):
            raise ArgumentError(f"{self._what} {name!r} must be (function, lower, upper), got {value!r}")
        if not isinstance(name, str) or not name.isidentifier():
            raise ArgumentError(f"a name of {self._what} must be a Python identifier, got {name!r}")
        super().__setitem__(name, Constraint(*value))

    # A dict's own would not look at values.

    def update(self, *given: Any, **named: Any) -> None:
        """Set constraints from a dict."""
        for name, value in dict(*given, **named).items():
            self[name] = value

    def setdefault(self, name: str, value: Any = None) -> Constraint:
        """Set a constraint where there is none of that name."""
        if name not in self:
            self[name] = value
        return self[name]

    def __ior__(self, other: Any) -> Constraints:  # type: ignore[override, misc]
        self.update(other)
        return self


class _Constrained:
    """What has constraints; a dict that is assigned to them takes their place."""

    def __setattr__(self, name: str, value: Any) -> None:
        mine = self.__dict__.get(name)
        if isinstance(mine, Constraints) and value is not mine:
            if not isinstance(value, Mapping):
                raise ArgumentError(f"{name} must be a dict of (function, lower, upper), got {type(value).__name__}")
            given, value = value, Constraints(mine._what)
            value.update(given)
        super().__setattr__(name, value)


class Phase(_Constrained):
    """A part of the trajectory with one set of states, controls and dynamics; made by `Problem.phase`.

    Attributes:
        dynamics: ``f(x, u, t, p)``, the derivatives of the states by name, or as one tensor (nodes, all states).
        path: constraints at every node, by name: ``path["tilt"] = (function of (x, u, t, p), lower, upper)``.
        integral: integrals over the phase with bounds, by name, in the same form. Functions of ends see their values.
    """

    def __init__(self, name: str, states: Mapping, controls: Mapping, t0: Any, tf: Any) -> None:
        self.name = name
        self.states, self.controls = Layout(f"states of {name!r}"), Layout(f"controls of {name!r}")
        for layout, given in ((self.states, states), (self.controls, controls)):
            for part, spec in given.items():
                layout.add(part, spec)
        if not self.states.size:
            raise ArgumentError(f"phase {name!r} has no states")
        shared = set(self.states.parts) & set(self.controls.parts)
        if shared:
            raise ArgumentError(f"phase {name!r}: {sorted(shared)} are both states and controls; rename one of them")
        self.t0, self.tf = (self._time(which, value) for which, value in (("t0", t0), ("tf", tf)))
        if self.t0[0] > self.tf[1]:
            raise ArgumentError(f"phase {name!r} ends before it starts: t0 in {self.t0}, tf in {self.tf}")
        self.dynamics: Function | None = None
        self.path = Constraints(f"path constraint of {name!r}")
        self.integral = Constraints(f"integral of {name!r}")
        self.at_start = (self.states.lower.copy(), self.states.upper.copy())
        self.at_end = (self.states.lower.copy(), self.states.upper.copy())
        self.guesses: dict[str, Any] = {}

    def _time(self, which: str, value: Any) -> tuple[float, float]:
        what = f"phase {self.name!r}, {which}"
        # Bounds may be None, which no array of numbers holds.
        pair = value if isinstance(value, (tuple, list)) else np.atleast_1d(numbers(what, value))
        low, high = pair if len(pair) == 2 else (value, value)
        lower, upper = bounds(what, 1, low, high)
        return float(lower[0]), float(upper[0])

    def start(self, /, **values: Any) -> None:
        """States at the start: a number, a list or tensor of numbers; or bounds, as a tuple (lower, upper).

        Raises:
            ArgumentError: no such state; bounds that cross, or lie outside of the state's; a tuple of two numbers for a
                state with two entries, which may be either.
        """
        self._fix("start", self.at_start, values)

    def end(self, /, **values: Any) -> None:
        """States at the end, as for `start`."""
        self._fix("end", self.at_end, values)

    def _fix(self, which: str, target: tuple[np.ndarray, np.ndarray], values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            part = self.states.part(name)
            low, high = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
            what = f"{which} of {self.name!r}: {name!r}"
            size = part.stop - part.start
            if size == 2 and isinstance(value, tuple) and len(value) == 2 and all(np.ndim(v) == 0 for v in value):
                if None not in value and value[0] != value[1]:
                    raise ArgumentError(
                        f"{what} has two entries, so {value!r} may be their values or their bounds: write "
                        f"[{value[0]}, {value[1]}] for values, ([{value[0]}] * 2, [{value[1]}] * 2) for bounds"
                    )
            lower, upper = bounds(what, size, low, high)
            outside = (upper < self.states.lower[part]) | (lower > self.states.upper[part])
            if outside.any():
                n = part.start + int(np.argmax(outside))
                raise ArgumentError(
                    f"{what}: {self.states.entry(n)} must be in [{lower[n - part.start]:g}, "
                    f"{upper[n - part.start]:g}], "
                    f"which is outside its bounds [{self.states.lower[n]:g}, {self.states.upper[n]:g}]"
                )
            target[0][part], target[1][part] = (
                np.maximum(lower, self.states.lower[part]),
                np.minimum(upper, self.states.upper[part]),
            )

    def guess(self, /, **values: Any) -> None:
        """What the solver starts from: ``t0``, ``tf``, states, controls and integrals by name.

        A state or control is a number or one for each entry, an array (points, size) at equal distances over the phase,
        or a function of times (points,) that gives such an array. Where nothing is said, states go straight from the
        start to the end, and controls are in the middle of their bounds.
        """
        known = {"t0", "tf", *self.states.parts, *self.controls.parts, *self.integral}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ArgumentError(f"phase {self.name!r} has no {unknown}; it has {sorted(known)}")
        for name in set(values) & set(self.integral) & {*self.states.parts, *self.controls.parts}:
            raise ArgumentError(f"guess of phase {self.name!r}: {name!r} is an integral, and a state or control, too")
        self.guesses.update(values)

    def guess_by_simulation(self, tf: float | None = None, steps: int = 200, **controls: Any) -> None:
        """Take the states of a simulation as the guess; controls are numbers or functions of time.

        Raises:
            NonFiniteError: the simulation leaves the numbers.
        """
        from .simulation import simulate_guess

        simulate_guess(self, tf, steps, controls)


class Ends:
    """What a function of ends sees: ``e.descent.xf.m``; x0, xf, t0, tf and integral of each phase, and ``e.p``."""

    def __init__(self, phases: Mapping[str, Any], p: Parts) -> None:
        self.__dict__.update(phases)
        self.p = p

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = [n for n in self.__dict__ if n != "p"]
        raise ArgumentError(f"there is no phase {name!r}; there are {', '.join(known)}, with ends like e.{known[0]}.tf")


@dataclass
class End:
    """The ends of one phase: states (size,) each, times (1,), integrals."""

    x0: Parts
    xf: Parts
    t0: Any
    tf: Any
    integral: Parts


class Problem(_Constrained):
    """An optimal control problem: phases, static parameters, constraints between ends, and a cost.

    minimize  final(ends) + sum over phases of ∫ running(x, u, t, p) dt
    such that  dx/dt = dynamics(x, u, t, p),  bounds, path, integral and boundary constraints.

    Functions are ordinary torch functions. Those of a phase take tensors whose first dimension is that of nodes:
    ``x.v`` has shape (nodes, size of v), ``u.T`` likewise, ``t`` (nodes, 1), ``p.k`` (size of k,). Those of ends take
    ``e``, see `Ends`.

    Example:
        >>> import torch, jetplane as jp
        >>> ocp = jp.control.Problem()
        >>> ph = ocp.phase("cart", states={"x": 1, "v": 1}, controls={"a": (1, -1.0, 1.0)}, t0=0.0, tf=(0.1, 10.0))
        >>> ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
        >>> ph.start(x=0.0, v=0.0); ph.end(x=1.0, v=0.0)
        >>> ocp.minimize(final=lambda e: e.cart.tf)
        >>> sol = ocp.solve(mesh=(20, 2))
        >>> round(sol.objective, 6)
        2.0
    """

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.parameters = Layout("parameters")
        self.parameter_guess: dict[str, Any] = {}
        self.boundary = Constraints("boundary constraint")
        self.final: Callable[[Any], Any] | None = None
        self.running: dict[str, Function] = {}

    def phase(self, name: str, *, states: Mapping, controls: Mapping | None = None, t0: Any, tf: Any) -> Phase:
        """A new phase.

        Args:
            name: of the phase, an identifier.
            states: by name: the size, or (size, lower, upper).
            controls: likewise.
            t0: initial time: a number, or bounds (lower, upper).
            tf: final time, likewise. No phase ends before it starts: where the bounds leave that open, it is a
                constraint.

        Raises:
            ArgumentError: bounds that cross, names that are taken or no identifiers.
        """
        if not name.isidentifier() or name in self.phases or name == "p":
            raise ArgumentError(f"a phase's name must be a new identifier other than 'p', got {name!r}")
        self.phases[name] = Phase(name, states, controls or {}, t0, tf)
        return self.phases[name]

    def parameter(self, name: str, size: int = 1, lower: Any = None, upper: Any = None, guess: Any = None) -> None:
        """A static parameter, which is optimized: ``p.name`` in all functions."""
        self.parameters.add(name, (size, lower, upper))
        if guess is not None:
            self.parameter_guess[name] = vector(f"guess of {name!r}", size, guess)

    def minimize(self, *, final: Callable[[Any], Any] | None = None, running: Any = None) -> None:
        """The cost: `final` of the ends, `running` of (x, u, t, p); a dict by phases if there are several."""
        if final is None and running is None:
            raise ArgumentError("minimize needs final=, running= or both, got neither")
        if callable(running):
            if len(self.phases) != 1:
                raise ArgumentError(
                    f"there are {len(self.phases)} phases ({', '.join(self.phases)}): give running= as a dict by "
                    f"their names"
                )
            running = {next(iter(self.phases)): running}
        if not (final is None or callable(final)) or not (running is None or isinstance(running, Mapping)):
            raise ArgumentError(
                "minimize takes functions, final=f(e) and running=f(x, u, t, p) or a dict of these by phases, got "
                f"{', '.join(type(f).__name__ for f in (final, running) if f is not None)}"
            )
        for name in running or {}:
            self._phase(name)
        self.final, self.running = final, dict(running or {})

    def _phase(self, name: str | Phase) -> Phase:
        name = name.name if isinstance(name, Phase) else name
        if name not in self.phases:
            raise ArgumentError(f"there is no phase {name!r}; there are {', '.join(self.phases) or 'none'}")
        return self.phases[name]

    def link(self, before: str | Phase, after: str | Phase, states: Any = None) -> None:
        """Let a phase begin where another ends: in time and in the states of the same names, or those named."""
        first, second = self._phase(before), self._phase(after)
        before, after = first.name, second.name
        if states is None:
            states = [n for n in first.states.parts if n in second.states.parts]
        names = [states] if isinstance(states, str) else list(states)
        for name in names:
            a, b = first.states.part(name), second.states.part(name)
            if a.stop - a.start != b.stop - b.start:
                raise ShapeError(
                    f"{name!r} has {a.stop - a.start} entries in {before!r} and {b.stop - b.start} in {after!r}"
                )

        end, start = first.tf, second.t0
        if end[1] < start[0] or start[1] < end[0]:
            raise ArgumentError(f"{before!r} ends in {end} and {after!r} starts in {start}: they cannot be linked")

        def gap(e: Any) -> Any:
            import torch

            one, two = getattr(e, before), getattr(e, after)
            return torch.cat([two.t0 - one.tf, *(two.x0[n] - one.xf[n] for n in names)])

        self.boundary[f"link_{before}_{after}"] = (gap, 0.0, 0.0)

    def solve(self, **options: Any) -> Solution:
        """Solve the problem; see `jetplane.control.solve`."""
        from .solving import solve

        return solve(self, **options)

    def check(self, guess: Any = None, mesh: Any = (5, 3)) -> CheckReport:
        """Look at the problem before it is solved: derivatives against differences, structure, scaling, bounds."""
        from .check import check

        return check(self, guess, mesh)

    def nlp(self, mesh: Any = (10, 4), backend: str = "auto") -> NLP:
        """The nonlinear program: values, sparse Jacobian and Hessian of the Lagrangian, for any other solver."""
        from .model import Model
        from .nlp import NLP
        from .solving import meshes_of

        model = Model(self, backend)
        return NLP(model, meshes_of(self, mesh))
