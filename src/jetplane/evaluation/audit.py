"""An audit of a closure: the slope of one evaluation held against differences of plain runs.

Interception sees what passes through torch in the threads of a closure. No list of what it does not see is complete, so
the slope along one direction that moves all parameters is measured as well:

    D(h) = (L(theta + h v) - L(theta - h v)) / (2 h)

A difference D that stays the same over a range of steps h, that is not the slope, and that rounding does not explain,
convicts the evaluation: first at the parameters, then at two places nearby, where whatever kink there was is gone.
Bisection over the parameters then tells which of them are concerned. In doubt there is no error.

What the closure stops derivatives at by its own will (`detach()`, `item()`, `torch.no_grad()`) is held at its value of
the undisplaced run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import CodeType, MethodType
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from .. import _sharding
from ..directions import CachedDirections, StoredDirections
from ..errors import ArgumentError, AuditError, AuditWarning, RandomClosureError, UnusedParametersError
from .checks import check_loss, checked_arguments
from .eager import evaluate_at_once
from .leaving import plain_run
from .plane import PlaneModel
from .reached import unreached
from .repeats import ADVICE, tolerance
from .side_effects import RandomState, UndoLog, setting_back, without_side_effects
from .specification import PlaneSpec
from .stops import Stops, memory

Closure = Callable[[], Any]
Verdict = Literal["agrees", "differs", "unclear"]
Auditing = Literal["first", "always", "never"]

CLOSE = 1e-2  # relative difference of slope and D(h) up to which they agree
FIRST = 0.1  # part of the slope up to which rounding may explain what the first difference lacks
START = 4e-2  # part of the slope that rounding may make up in the first step of a longer search
FAR = 1e-2  # relative difference from which on they may be held to differ
STEADY = 0.1  # of their difference from the slope: how much D(h) may vary over the steps to be believed
REDRAWN = 2  # directions that may take the place of one along which the loss is level
AGAIN = 2  # runs at the same place that tell a closure which gives different losses
ROUGH = 0.3  # part of a difference that rounding may make up if it is to say anything
LADDER = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1, 4, 16)  # steps, in parts of the best one for smooth losses
LONGEST = 0.5  # step, relative to the parameters
ROUNDINGS = 2  # of the loss, by which a run may be off
MOST_RUNS = 200  # of the closure, to tell which parameters are concerned


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    Attributes:
        verdict: "agrees" if the slope is that of the loss; "differs" if not; "random" if runs at the same parameters
            give different losses; "unclear" if rounding, kinks or discontinuities prevent a verdict.
        slope: slope of the evaluation along the direction of the audit.
        difference: symmetric difference of the loss along it, at the step of the closest agreement.
        losses: losses of two runs at the same parameters, or of the evaluation alone if the first difference agrees.
        parameters: names of the parameters whose part of the slope is not that of the loss.
        suspicious: whether an unclear audit was close to "differs".
        reason: why the verdict is unclear.
        runs: number of runs of the closure.
        cut_off: places of the parameters that are used and that no derivative of the loss reaches, by detach() and the
            like. They are looked for only where the closure stops derivatives, at a forward pass or more. Those that
            are used under `torch.no_grad()` alone, or not at all, are never moved.
    """

    verdict: Literal["agrees", "differs", "random", "unclear"]
    slope: float
    difference: float
    losses: tuple[float, float]
    parameters: tuple[str, ...] = ()
    suspicious: bool = False
    reason: str = ""
    runs: int = 0
    cut_off: tuple[int, ...] = ()

    def __str__(self) -> str:
        numbers = f"slope {self.slope:.6g}, measured {self.difference:.6g} along a random direction"
        if self.verdict == "agrees":
            return f"agrees: {numbers} ({self.runs} runs)"
        if self.verdict == "random":
            return f"random: two runs at the same place gave the losses {self.losses[0]:.9g} and {self.losses[1]:.9g}"
        if self.verdict == "unclear":
            return f"unclear, {self.reason}: {numbers} ({self.runs} runs)"
        return f"differs: {numbers}, because of {', '.join(self.parameters)} ({self.runs} runs)"

    def check(self) -> None:
        """Raise an error or warn if the evaluation cannot be trusted.

        Raises:
            AuditError: the slope is not that of the loss.
            RandomClosureError: the closure gives different losses at the same parameters.
        """
        if self.verdict == "random":
            raise RandomClosureError(f"{str(self).removeprefix('random: ')}. {ADVICE}")
        if self.verdict == "differs":
            raise AuditError(
                f"the slope of this closure is not that of its loss: along a random direction it is {self.slope:.6g}, "
                f"and the loss changes by {self.difference:.6g}. Some use of {', '.join(self.parameters)} is missed: "
                "it may leave torch (NumPy, data_ptr in an extension, another thread) or go through copies of "
                "the parameter made outside the closure. Use the parameters only in torch functions inside "
                "the closure; if the closure is correct, audit='never' switches this check off",
                self.parameters,
            )
        if self.suspicious:
            warnings.warn(
                f"the slope of this closure may not be that of its loss: {self}. jetplane.audit in double precision "
                "can decide",
                AuditWarning,
                stacklevel=2,
            )


def audit(
    closure: Closure,
    params: Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    generators: Sequence[Any] = (),
    seed: int = 0,
) -> AuditReport:
    """Compare the slope of a closure, along a direction that moves all parameters, with differences of its loss.

    The optimizers do so before their first step; see their ``audit``. It usually costs one evaluation of a slope
    along a dense direction and two plain runs: 5 to 9 forward passes on an MLP, a CNN and a GPT. If rounding,
    kinks or stopped derivatives leave doubt, it costs a few more. If the slope is wrong, it takes some dozens of
    runs to find the parameters concerned. The audit holds two copies of the parameters.

    Args:
        closure: as in `jetplane.evaluate`.
        params: the parameters. They are restored afterwards, even if an error is raised; so are buffers and random
            states.
        names: names of the parameters for the report; by default their indices and shapes.
        generators: as in `jetplane.evaluate`.
        seed: seed of the direction.

    Returns:
        An `AuditReport`. Print it, or call its `check` to raise an error.

    Raises:
        ArgumentError: parameters are sharded.
        As `jetplane.evaluate`: what the evaluation of the slope raises.

    >>> import torch, jetplane as jp
    >>> w = torch.ones(3)
    >>> copy = w.numpy()  # shares the memory of w, and leaves torch
    >>> print(jp.audit(lambda: (w**2).sum(), [w]).verdict)
    agrees
    >>> print(jp.audit(lambda: (w**2).sum() + float(copy.sum()), [w], names=["w"]).parameters)
    ('w',)
    """
    params = checked_arguments(closure, params)
    if any(_sharding.is_sharded(p) for p in params):
        raise ArgumentError(
            "sharded parameters cannot be audited: audit the closure in one process, with a small model"
        )
    named = [f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(params)] if names is None else names
    if len(named) != len(params):
        raise ArgumentError(f"expected a name for each of {len(params)} parameters, got {len(named)}")
    with setting_back(generators), torch.no_grad():
        run = _Audit(closure, params, list(named), seed)
        report = run.report()
        return replace(report, cut_off=tuple(run.cut_off()), runs=run.runs) if run.stopping else report


@dataclass
class _Measured:
    """A comparison at one place, along one direction."""

    verdict: Verdict
    slope: float
    difference: float
    losses: tuple[float, float]
    reason: str = ""


class _Difference(NamedTuple):
    """Of the loss along a direction, for one step.

    Attributes:
        value: the symmetric difference.
        jump: by how much the difference ahead exceeds the one behind: in proportion to the step where it is smooth.
        noise: what rounding may change of the value.
        changed: whether the loss has changed at all.
    """

    value: float
    jump: float
    noise: float
    changed: bool

    def within(self, slope: float, most: float) -> bool:
        """Whether it is the slope, within 1 %, or within rounding where that makes up no more than a part of it."""
        size = max(abs(self.value), abs(slope))
        return abs(self.value - slope) <= max(CLOSE * size, min(self.noise, most * size))


@final
class _Audit:
    """The runs of one audit."""

    def __init__(self, closure: Closure, params: list[Tensor], names: list[str], seed: int) -> None:
        self.closure, self.params, self.names = closure, params, names
        self.runs = 0
        self.begin = RandomState()
        self.written: list[Tensor] = []  # by the last plain run: buffers
        self.generator = torch.Generator("cpu").manual_seed(seed)
        sizes = [_size(p) for p in params]
        whole = math.sqrt(sum(s**2 * p.numel() for s, p in zip(sizes, params, strict=True)) / _count(params))
        self.scales = [max(s, 0.1 * whole) if whole > 0 else 1.0 for s in sizes]
        self.eps = max(torch.finfo(p.dtype).eps for p in params)
        self.memories = frozenset(map(memory, params))
        self.stopping = False  # whether the closure stops derivatives somewhere

    def report(self) -> AuditReport:
        found = self.compare(self.direction(range(len(self.params))), REDRAWN)
        agreed = tolerance(found.losses, [p.dtype for p in self.params])
        if found.verdict != "agrees" or abs(found.losses[0] - found.losses[1]) > agreed:
            for _ in range(AGAIN):  # two runs may agree by chance
                again = self.loss(Stops(self.memories))
                if again is None or abs(again - found.losses[1]) > agreed:
                    losses = found.losses if again is None else (found.losses[1], again)
                    return self._report("random", found, losses=losses)
        if found.verdict != "differs":
            return self._report(found.verdict, found, reason=found.reason)
        verdicts = []
        for _ in range(2):
            with self.displaced(self.direction(range(len(self.params))), 4 * self.best_step()):
                direction = self.direction(range(len(self.params)))
                nearby = self.compare(direction)
                verdicts.append(nearby.verdict)
                if verdicts == ["differs", "differs"]:
                    concerned = self.bisect(direction, abs(nearby.difference - nearby.slope))
                    return self._report("differs", nearby, parameters=tuple(self.names[i] for i in concerned))
        reason = "it differs at this place and not at others nearby"
        return self._report("unclear", found, reason=reason, suspicious="agrees" not in verdicts)

    def _report(self, verdict: Any, found: _Measured, **more: Any) -> AuditReport:
        fields: dict[str, Any] = {"losses": found.losses} | more
        return AuditReport(verdict, found.slope, found.difference, runs=self.runs, **fields)

    def cut_off(self) -> list[int]:
        """The places of the parameters that are used and that no derivative reaches.

        Autograd tells at once which may be concerned. It does not know all operators, so that evaluations decide.
        """
        self.runs += 1
        return self.without_slope(unreached(self.closure, self.params))

    def without_slope(self, places: list[int]) -> list[int]:
        """Those of some parameters that are used, and along which the loss has no slope, not even one of zero."""
        if not places:
            return []
        plane, used = self.evaluated(self.direction(places))
        if plane is None:
            return used
        half = len(places) // 2
        return self.without_slope(places[:half]) + self.without_slope(places[half:]) if half else []

    def bisect(self, direction: dict[int, Tensor], whole: float) -> list[int]:
        """The parameters, among those that a direction moves, that account for the difference ``whole``."""
        places = list(direction)
        if len(places) == 1 or self.runs > MOST_RUNS:
            return places
        concerned: list[int] = []
        for half in (places[: len(places) // 2], places[len(places) // 2 :]):
            part = {i: direction[i] for i in half}
            found = self.compare(part)
            if found.verdict == "differs" and abs(found.difference - found.slope) > FAR * whole:
                concerned += self.bisect(part, whole)
        return concerned or places

    def direction(self, places: Sequence[int]) -> dict[int, Tensor]:
        """Random tangents of some parameters, each as long in proportion to its size."""
        return {
            i: (_normal(p, self.generator) * self.scales[i]).to(p) for i, p in ((i, self.params[i]) for i in places)
        }

    def best_step(self) -> float:
        """The step, relative to the parameters, at which truncation and rounding of a smooth loss are about equal."""
        return min(self.eps ** (1 / 3), 0.2)

    def compare(self, direction: dict[int, Tensor], redrawn: int = 0) -> _Measured:
        """The slope along a direction, against differences.

        Args:
            direction: tangents of parameters, by their places.
            redrawn: how often another direction may be drawn in its place, where the loss is so level along it that a
                difference shows its rounding alone.
        """
        stops, h = Stops(self.memories), self.best_step() / 4
        ahead = self.loss(stops, direction, h)
        self.stopping = self.stopping or bool(stops.values) or stops.under_no_grad or stops.to_integers
        slope, value = self.slope(direction)
        if ahead is not None and not stops.values:  # nothing has to be held at its value of an undisplaced run
            behind = self.loss(stops, direction, -h)
            first = None if behind is None else self.difference(ahead, behind, value, h)
            if first is not None and first.within(slope, FIRST):
                return _Measured("agrees", slope, first.value, (value, value))
            if redrawn and first is not None and first.noise > FIRST * max(abs(first.value), abs(slope)):
                return self.compare(self.direction(list(direction)), redrawn - 1)
        stops = Stops(self.memories)
        base = self.loss(stops)
        if base is None or not math.isfinite(base):
            return _Measured("unclear", slope, math.nan, (value, value), "a plain run gives no finite loss")
        found = self._along(direction, slope, base, stops)
        if found.verdict != "agrees" and stops.custom and stops.under_no_grad:  # what custom functions compute is, too
            moving = Stops(self.memories, no_grad=False)
            self.loss(moving)
            again = self._along(direction, slope, base, moving)
            found = again if again.verdict == "agrees" else found
        if found.verdict == "differs" and stops.in_doubt:
            return _Measured("unclear", slope, found.difference, (value, base), stops.in_doubt)
        return _Measured(found.verdict, slope, found.difference, (value, base), found.reason)

    def _along(self, direction: dict[int, Tensor], slope: float, base: float, stops: Stops) -> _Measured:
        self.eps = max(self.eps, stops.eps)
        rounding = self.rounding(base)
        found: dict[float, _Difference] = {}
        for h in self.steps(rounding, slope):
            ahead, behind = self.loss(stops.held(), direction, h), self.loss(stops.held(), direction, -h)
            if ahead is None or behind is None or not math.isfinite(ahead - behind):
                continue
            found[h] = now = self.difference(ahead, behind, base, h)
            if now.within(slope, ROUGH):
                return _Measured("agrees", slope, now.value, (base, base))
            steady = _steady([found[h] for h in sorted(found) if found[h].changed], slope)
            if steady is not None:
                return _Measured("differs", slope, steady, (base, base))
        if not found:
            return _Measured("unclear", slope, math.nan, (base, base), "the loss is not finite nearby")
        if not any(d.changed for d in found.values()):  # if only long steps change it, something larger has rounded it
            steady = _steady([found[h] for h in sorted(found)], slope)
            if steady is not None:
                return _Measured("differs", slope, steady, (base, base))
        nearest = min((d.value for d in found.values()), key=lambda d: abs(d - slope))
        return _Measured("unclear", slope, nearest, (base, base), "the loss is rough or rounded near this place")

    def difference(self, ahead: float, behind: float, base: float, h: float) -> _Difference:
        """The difference of two runs, whose loss between them is ``base``.

        A loss that does not change at all may be rounded against numbers of size one, as the logarithm of a softmax is
        where that rounds to one.
        """
        changed = not ahead == behind == base
        rounding = self.rounding(base if changed else max(1.0, abs(base)))
        return _Difference((ahead - behind) / (2 * h), (ahead - 2 * base + behind) / h, rounding / h, changed)

    def rounding(self, base: float) -> float:
        """By how much a run's loss may be off."""
        return ROUNDINGS * self.eps * abs(base)

    def steps(self, rounding: float, slope: float) -> list[float]:
        """Steps to try: the shortest that rounding lets tell, then its neighbours, and theirs."""
        ladder = sorted({min(part * self.best_step(), LONGEST) for part in LADDER})
        start = next((n for n, h in enumerate(ladder) if rounding / h <= START * abs(slope)), len(ladder) - 1)
        return sorted(ladder, key=lambda h: abs(ladder.index(h) - start))

    def slope(self, direction: dict[int, Tensor]) -> tuple[float, float]:
        """The slope of an evaluation along a direction, and its loss."""
        plane, _ = self.evaluated(direction)
        return (0.0, math.nan) if plane is None else (plane.slope.item(), plane.value.item())

    def evaluated(self, direction: dict[int, Tensor]) -> tuple[PlaneModel | None, list[int]]:
        """The loss and its slope along a direction; None where the loss depends on none of its parameters.

        Returns:
            The plane, and the places of the parameters that were used where derivatives do not stop.

        Raises:
            UnusedParametersError: it depends on no parameter at all.
        """
        places = list(direction)
        params = [self.params[i] for i in places]
        tangents = CachedDirections(StoredDirections([direction[i].unsqueeze(0) for i in places]), params)
        self.runs += 1
        plane = None
        with self._set_back():
            try:
                plane = evaluate_at_once(self.closure, params, tangents, PlaneSpec(1, "none"))
            except UnusedParametersError:
                if len(places) == len(self.params):
                    raise
        return plane, [places[i] for i in sorted(tangents.used)]

    @contextlib.contextmanager
    def _set_back(self) -> Iterator[None]:
        """`without_side_effects` by what a plain run has written to: its mode would show operators to interception."""
        log, now = UndoLog(), RandomState()
        for t in self.written:
            log.save(t, moves=True)
        self.begin.restore()
        try:
            yield
        finally:
            now.restore()
            log.restore()

    def loss(self, stops: Stops, direction: dict[int, Tensor] | None = None, h: float = 0.0) -> float | None:
        """The loss of a plain run, displaced along a direction; None where it cannot be run."""
        self.runs += 1
        with self.displaced(direction or {}, h), without_side_effects(self.begin) as log:
            try:
                with plain_run(self.params, again=self.runs > 1), stops.running():
                    loss = self.closure()
                check_loss(loss)
                stops.rounds(loss.dtype)
                value = loss.item()
            except (RuntimeError, ValueError, ArithmeticError):
                if h == 0:
                    raise
                return None
            self.written = [t for t, *_ in log.saved.values()]
            if not self.memories.isdisjoint(map(memory, self.written)):
                stops.in_doubt = "the closure writes to its parameters"
        return value

    @contextlib.contextmanager
    def displaced(self, direction: dict[int, Tensor], h: float) -> Iterator[None]:
        before = {i: self.params[i].detach().clone() for i in direction} if h else {}
        try:
            for i in before:
                self.params[i].detach().add_(direction[i], alpha=h)
            yield
        finally:
            for i, values in before.items():
                self.params[i].detach().copy_(values)


def still_cut_off(closure: Closure, params: Sequence[Tensor], places: Sequence[int], seed: int = 0) -> bool:
    """Whether derivatives reach none of the parameters at some places, as an earlier audit found (`AuditReport`).

    This takes one evaluation of a slope. Nothing is left of the run but what it returns.
    """
    with torch.no_grad(), without_side_effects():
        run = _Audit(closure, list(params), [], seed)
        return run.evaluated(run.direction(places))[0] is None


# --- which closure was audited --------------------------------------------------------------------------------------


def identity(closure: Closure, params: Sequence[Tensor], model: nn.Module | None = None) -> Any:
    """What an audit holds for: the closure's code, the parameters that move, and which modules are in training mode.

    Modules are those that the closure's code refers to by a variable of its own or of its module, and ``model``.
    """
    function = inspect.unwrap(closure)
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", type(function))
    variables = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    if isinstance(code, CodeType):
        known = getattr(function, "__globals__", {})
        variables += [known[name] for name in code.co_names if name in known]
    modules = [m for m in (model, getattr(closure, "__self__", None), *variables) if isinstance(m, nn.Module)]
    training = tuple(part.training for m in modules for part in m.modules())
    return code, frozenset(id(p) for p in params), training


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return None


def _steady(found: Sequence[_Difference], slope: float) -> float | None:
    """A difference that three steps in a row agree on, beyond rounding and kinks, and that is not the slope.

    Args:
        found: by steps, the shortest first.
        slope: of the evaluation.
    """
    for three in zip(found, found[1:], found[2:], strict=False):
        values, gap = [d.value for d in three], min(abs(d.value - slope) for d in three)
        doubt = max(max(values) - min(values), abs(three[0].jump) / 4, *(d.noise for d in three))
        if doubt <= STEADY * gap and gap > FAR * max(abs(v) for v in (*values, slope)):
            return values[1]
    return None


def _normal(p: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.complex64 if p.is_complex() else torch.float32
    return torch.randn(p.shape, generator=generator, dtype=dtype, device="cpu")


def _size(p: Tensor) -> float:
    """The root mean square of a parameter's entries."""
    return p.detach().abs().double().square().mean().sqrt().item() if p.numel() else 0.0


def _count(params: Sequence[Tensor]) -> int:
    return max(1, sum(p.numel() for p in params))
