"""How far to step along what a descent proposes.

The rate itself is the parameter group's ``lr``, so that torch's schedulers drive it; a search scales the step besides,
or solves the plane anew with damping. A search is a generator: it yields a `Trial` where it wants to know the loss
after a step, receives its `Outcome`, and returns a `Decision`. What it must remember from step to step is its *state*,
a frozen record that goes in and comes out.

>>> import torch, jetplane as jp
>>> slope, curvature = torch.tensor([2.0]), torch.tensor([[0.5]])
>>> proposal = Proposal.of(1.0, slope, curvature, jp.descent.Newton())  # at (1 + a)^2 the step is 4 times too long
>>> decided(Backtracking(), proposal, NoState(), lambda trial: Outcome((1 - 4 * trial.rate) ** 2)).rate
0.25
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, RescueWarning, warn_user
from .descent import Solution, Spectral

_HOLDS = 0.75  # of the promised decrease: below it a plane's model does not hold where a step leads
_ATTEMPTS = 5  # with more damping each
_FIRST_DAMPING, _MOST_DAMPING = 1e-3, 1e6  # in parts of the largest curvature


@dataclass(frozen=True)
class Proposal:
    """A step that a descent proposes along a plane of K directions.

    Attributes:
        value: the loss before the step.
        slope: F, shape (K,).
        curvature: H, shape (K, K).
        descent: the rule that solves for the step.
        solution: its solution: see `jetplane.subspace.descent.Solution`.
        squared_norms: ``|v_k|^2`` of the directions over all parameters, (K,) in float64.
        covariance: C, the covariance of the slope of a random batch, (K, K) in float64; None if it is not known.
            See `jetplane.evaluation.plane.SlopeMoments`.
        rounding: the rounding error of the loss.
        count: the number of examples in the batch; None if their parts of the slope are not known.
    """

    value: float
    slope: Tensor
    curvature: Tensor
    descent: Spectral
    solution: Solution
    squared_norms: Tensor
    covariance: Tensor | None = None
    rounding: float = 0.0
    count: int | None = None

    @staticmethod
    def of(
        value: float, slope: Tensor, curvature: Tensor, descent: Spectral, squared_norms: Tensor | None = None,
        covariance: Tensor | None = None, rounding: float = 0.0, count: int | None = None,
    ) -> Proposal:  # fmt: skip
        """What a descent proposes; directions are of norm one unless their squared norms are given."""
        norms = (
            torch.ones(len(slope), dtype=torch.float64, device=slope.device) if squared_norms is None else squared_norms
        )
        solution, norms = descent.solve(slope, curvature), norms.to(slope.device)
        return Proposal(value, slope, curvature, descent, solution, norms, covariance, rounding, count)

    def damped(self, damping: float) -> Proposal:
        """The plane solved with ``damping * |v_k|^2`` added to each direction's curvature (Levenberg, Marquardt).

        Negative curvature counts by its absolute value: less of it would make the step longer.
        """
        if not damping:
            return self
        curvature, values = self.curvature, self.solution.values
        rounding = 10 * len(values) * torch.finfo(curvature.dtype).eps * values.abs().max()
        if bool((values < -rounding).any()):
            back = torch.linalg.inv(self.solution.basis)
            curvature = back.mT * values.abs() @ back
        curvature = (curvature + damping * self.squared_norms.diag()).to(self.curvature.dtype)
        return replace(self, solution=self.descent.solve(self.slope, curvature))

    @property
    def largest_curvature(self) -> float:
        """The largest curvature of a direction over its squared norm: ``max_k |H_kk| / |v_k|^2``."""
        return (self.curvature.diagonal() / self.squared_norms).abs().max().item()

    @property
    def kappa(self) -> Tensor:
        """The coefficients that the descent proposes."""
        return self.solution.kappa

    @property
    def signal(self) -> float:
        """``F^T M F``: how fast the loss falls along the step, twice the decrease that a quadratic model predicts."""
        return (self.solution.weights @ self.solution.slope.square()).item()

    @property
    def noise(self) -> float | None:
        """``tr(M C)``, C the covariance of the slope: the mean of `signal` if the true gradient were zero.

        One example has no spread: all of its slope may be noise.
        """
        if self.covariance is None:
            return self.signal if self.count == 1 else None
        basis = self.solution.basis
        return (self.solution.weights * ((self.covariance @ basis) * basis).sum(0)).sum().item()

    def decrease(self, kappa: Tensor, rate: float = 1.0) -> float:
        """By how much the loss falls in the quadratic model after so much of the step with these coefficients."""
        kappa = rate * kappa
        return -(self.slope.double() @ kappa + 0.5 * kappa @ self.curvature.double() @ kappa).item()


@dataclass(frozen=True)
class Trial:
    """A request for the loss after ``rate`` times the step with these coefficients."""

    kappa: Tensor
    rate: float


@dataclass(frozen=True)
class Outcome:
    """The result of a `Trial`.

    Attributes:
        loss: the loss after the step.
        scale: length of the step in units of ``rate * sum_k kappa_k v_k``; the rates of parameter groups and clipping
            may make it less than 1.
    """

    loss: float
    scale: float = 1.0


@dataclass(frozen=True)
class NoState:
    """The state of a search that remembers nothing."""


@dataclass(frozen=True)
class Decision:
    """The decision of a search.

    Attributes:
        kappa: coefficients of the step.
        rate: the fraction of the step to take; 0: do not move.
        state: state of the search for the next step.
    """

    kappa: Tensor
    rate: float
    state: Any


Trials = Generator[Trial, Outcome, Decision]


def advance(trials: Trials, outcome: Outcome | None) -> Trial | Decision:
    """What a search asks next, told the outcome of its last trial (None: there is none yet), or its decision."""
    try:
        return next(trials) if outcome is None else trials.send(outcome)
    except StopIteration as end:
        return end.value


def decided(search: Search, proposal: Proposal, state: Any, outcome: Callable[[Trial], Outcome]) -> Decision:
    """The decision of a search whose trials have these outcomes."""
    trials = search.decide(proposal, state)
    asked = advance(trials, None)
    while isinstance(asked, Trial):
        asked = advance(trials, outcome(asked))
    return asked


class Search(ABC):
    """A rule that decides how much of a proposed step is taken.

    Attributes:
        examples: whether the search uses the covariance of the slope, computed from the examples' parts.
        start: the state before the first step, a frozen dataclass of numbers.
    """

    examples: bool = False
    start: Any = NoState()

    @abstractmethod
    def decide(self, proposal: Proposal, state: Any) -> Trials:
        """Yield the trials whose losses are needed, and return the decision."""


@dataclass(frozen=True)
class FullStep(Search):
    """Take the whole step, without trials; only the learning rate sets its length."""

    def decide(self, proposal: Proposal, state: Any) -> Trials:
        """See `Search`."""
        yield from ()
        return Decision(proposal.kappa, 1.0, state)


@dataclass(frozen=True)
class Backtracking(Search):
    """Halve the step until the loss falls by a fraction of the decrease that its slope predicts (Armijo).

    The loss never rises: if no length satisfies the condition, the step is not taken. For losses without noise.

    Attributes:
        part: the fraction in ``L(rate) <= L(0) - part * rate * signal``.
        halvings: the largest number of halvings.
    """

    part: float = 1e-4
    halvings: int = 40

    def __post_init__(self) -> None:
        if not 0 < self.part < 1 or self.halvings < 0:
            raise ArgumentError(f"expected 0 < part < 1 and halvings >= 0, got {self.part} and {self.halvings}")

    def decide(self, proposal: Proposal, state: Any) -> Trials:
        """See `Search`."""
        rate = yield from self.shortened(proposal, proposal.kappa, 1.0)
        return Decision(proposal.kappa, rate, state)

    def shortened(self, proposal: Proposal, kappa: Tensor, rate: float) -> Generator[Trial, Outcome, float]:
        """The first of ``rate``, a half, a fourth of it, … for which the loss falls; 0 if there is none."""
        slope = (proposal.slope.double() @ kappa).item()
        for n in range(self.halvings + 1):
            part = rate / 2**n
            outcome = yield Trial(kappa, part)
            if outcome.loss <= proposal.value + self.part * part * outcome.scale * slope:
                return part
        return 0.0


@dataclass(frozen=True)
class ExactLine(Search):
    """Minimize the loss along the step by parabolas and golden sections, in a few passes.

    The first pass is at the whole step. While the loss falls, the next pass is twice as far. After that it is at the
    minimum of the parabola through the best point and its neighbours (the first parabola uses the known slope in place
    of a third value). If there is no such minimum, or it moves by less than a hundredth, a golden section is used. The
    loss never rises: if no lower point is found, the step is not taken. For losses without noise.

    Attributes:
        passes: the number of points to evaluate.

    >>> import torch, jetplane as jp
    >>> proposal = Proposal.of(1.6, torch.tensor([2.0]), torch.tensor([[1.0]]), jp.descent.Newton())
    >>> found = decided(ExactLine(3), proposal, NoState(), lambda t: Outcome(1 + (1 - t.rate / 0.3) ** 2 * 0.6))
    >>> round(found.rate, 6)
    0.3

    Source: Brent, Algorithms for Minimization without Derivatives, 1973, chapter 5.
    """

    passes: int = 6

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ArgumentError(f"passes must be at least 1, got {self.passes}")

    def decide(self, proposal: Proposal, state: Any) -> Trials:
        """See `Search`."""
        kappa = proposal.kappa
        slope = (proposal.slope.double() @ kappa).item()
        below, best, above = None, (0.0, proposal.value), None  # neighbours and best of what is known, by rate
        rate = 1.0
        for _ in range(self.passes):
            outcome = yield Trial(kappa, rate)
            value = outcome.loss if math.isfinite(outcome.loss) else math.inf
            point, beyond = (rate, value), rate > best[0]
            if value < best[1]:
                below, above = (best, above) if beyond else (below, best)
                best = point
            else:
                below, above = (below, point) if beyond else (point, above)
            if above is None:
                rate = 2 * best[0]
            elif below is None:  # nothing is lower yet
                rate = _least_by_slope(above, proposal.value, outcome.scale * slope)
            else:
                rate = _least_between(below, best, above)
        return Decision(kappa, best[0], state)


def _least_by_slope(point: tuple[float, float], value: float, slope: float) -> float:
    """Of the parabola with this value and slope at 0 through a point that is not lower; a tenth of the way at least."""
    rate, found = point
    bend = found - value - slope * rate
    return max(-slope * rate**2 / (2 * bend), 0.1 * rate) if bend > 0 else 0.1 * rate


def _least_between(below: tuple[float, float], best: tuple[float, float], above: tuple[float, float]) -> float:
    """Of the parabola through three points of which the middle one is the lowest, or a golden section."""
    (a, fa), (b, fb), (c, fc) = below, best, above
    left, right = (b - a) * (fc - fb), (c - b) * (fa - fb)  # neither is negative
    if 0 < left + right < math.inf:
        move = 0.5 * ((c - b) * right - (b - a) * left) / (left + right)  # at most half of the way to a neighbour
        if abs(move) > 0.01 * (c - a):
            return b + move
    golden = (3 - math.sqrt(5)) / 2
    return b + golden * (c - b) if c - b > b - a else b - golden * (b - a)


@dataclass(frozen=True)
class NoiseState:
    """The state of `NoiseAware`.

    Attributes:
        noise: running average of ``tr(M C)``.
        signal: running average of ``F^T M F``.
        damping: the number added to the curvature of a direction of norm one.
        after: the loss of the last step's batch after that step; None if it is not known.
    """

    noise: float = 0.0
    signal: float = 0.0
    damping: float = 0.0
    after: float | None = None


@dataclass(frozen=True)
class NoiseAware(Search):
    """Shrink the step by its share of noise, to the rate ``1 - tr(M C) / (F^T M F)``, both averaged over steps.

    Let G be the true slope and ``F = G + noise``, with noise of covariance C. On average, the loss of a quadratic model
    after ``rate`` times the step ``-M F`` falls most at this rate: in ``E[F^T M F] = G^T M G + tr(M C)`` only the first
    term is signal. C comes from the examples' parts of the slope, at no cost. It is unbiased if the directions do not
    depend on the batch: see `jetplane.gradients.perturbation`.

    A batch whose loss is what the last step left is that step's batch again. It is then all of the data, its slope
    has no noise, and the rate is 1. Losses in half precision do not tell.

    The spread of N examples has rank N - 1 at most, so that of no more examples than directions misses noise. The
    floor is then 1e-3, and a `RescueWarning` says so. For a single example C is not known: all may be noise.

    The model of the plane may be wrong at the end of the step, above all after a long step along directions that are
    mostly noise and so hardly curve. If the loss of the same batch falls by less than three quarters of the decrease
    that the model predicts, the plane is solved again with ``damping`` times the squared length of the step added to
    it (Levenberg, Marquardt), ten times as much for each attempt, up to a million times the largest curvature. The
    damping that was needed is kept, and reduced to a third after each good step. If damping does not help, the step is
    halved until the loss falls.

    Attributes:
        memory: the fraction of the averages that is kept from step to step.
        floor: the smallest rate, unless the loss rises.
        otherwise: a search without a state, for losses whose examples' parts are not known.

    >>> import torch, jetplane as jp
    >>> slope, curvature = torch.tensor([4.0]), torch.tensor([[1.0]])
    >>> noise = torch.tensor([[4.0]]).double()  # beside a signal of 16
    >>> proposal = Proposal.of(100.0, slope, curvature, jp.descent.Newton(), covariance=noise)
    >>> decided(NoiseAware(), proposal, NoiseState(), lambda trial: Outcome(100 - 8 * trial.rate)).rate
    0.75
    """

    memory: float = 0.95
    floor: float = 1e-3
    otherwise: Search = Backtracking()
    examples = True
    start = NoiseState()

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1 or not 0 <= self.floor <= 1:
            raise ArgumentError(f"expected 0 <= memory < 1 and 0 <= floor <= 1, got {self.memory} and {self.floor}")

    def decide(self, proposal: Proposal, state: NoiseState) -> Trials:
        """See `Search`."""
        if proposal.noise is None:
            return (yield from self.otherwise.decide(proposal, state))
        largest = proposal.largest_curvature
        damping = min(state.damping, _MOST_DAMPING * largest)
        kappa, rate, now = proposal.kappa, 0.0, state
        for attempt in range(_ATTEMPTS):
            if attempt:
                damping = min(max(10 * damping, _FIRST_DAMPING * largest), _MOST_DAMPING * largest)
            tried = proposal.damped(damping)
            kappa, (rate, now) = tried.kappa, self._shrunk(tried, state)
            now = replace(now, damping=damping, after=None)
            if rate == 0:
                return Decision(kappa, rate, now)
            outcome = yield Trial(kappa, rate)
            now = replace(now, after=outcome.loss)
            promised = proposal.decrease(kappa, rate * outcome.scale)
            if proposal.value - outcome.loss >= _HOLDS * max(promised, 0.0) - proposal.rounding:
                if attempt == 0:
                    now = replace(now, damping=damping / 3 if damping > 0.1 * _FIRST_DAMPING * largest else 0.0)
                return Decision(kappa, rate, now)
        rate = yield from Backtracking().shortened(proposal, kappa, rate)
        return Decision(kappa, rate, replace(now, after=None))

    def _shrunk(self, proposal: Proposal, state: NoiseState) -> tuple[float, NoiseState]:
        """What part of a step is not noise, and the averages with this step's noise and signal in them."""
        assert proposal.noise is not None
        noise = self.memory * state.noise + (1 - self.memory) * proposal.noise
        signal = self.memory * state.signal + (1 - self.memory) * proposal.signal
        if signal <= 0:
            rate = 0.0
        elif _is_again(proposal, state):
            rate = 1.0
        else:
            rate = max(1 - noise / signal, self._floor(proposal, state))
        return rate, replace(state, noise=noise, signal=signal)

    def _floor(self, proposal: Proposal, state: NoiseState) -> float:
        """The smallest rate; less where the examples are too few to tell the noise along all directions."""
        directions, least = len(proposal.slope), min(self.floor, NoiseAware.floor)
        few = proposal.count is not None and proposal.count <= directions
        if not few or (self.floor == least and proposal.count != 1):
            return self.floor
        if state.after is not None:
            single = "; put the outputs for single examples together, with torch.cat, before the loss function"
            warn_user(
                f"the spread of {proposal.count} examples does not tell the noise along {directions} directions, so "
                f"that steps have no smallest rate but {least}: take batches of more than {directions} examples"
                + (single if proposal.count == 1 else ""),
                RescueWarning,
            )
        return least


def _is_again(proposal: Proposal, state: NoiseState) -> bool:
    """Whether the batch is that of the last step: its loss is what that step has left."""
    if state.after is None:
        return False
    # Rounding differs a little between a plain pass and one with derivatives; in half precision little else differs.
    return abs(proposal.value - state.after) <= min(8 * proposal.rounding, 1e-5 * abs(proposal.value))


def clipped(steps: Sequence[Tensor], limit: float, norm: Tensor | None = None) -> list[Tensor]:
    """Steps scaled down together so that their joint Euclidean norm is at most ``limit``.

    Args:
        steps: one for each parameter.
        limit: their joint norm at most.
        norm: theirs now, where what is given is a part of them.

    >>> import torch
    >>> clipped([torch.tensor([3.0, 4.0])], 1.0)
    [tensor([0.6000, 0.8000])]
    """
    total = (torch.stack([s.double().norm() for s in steps]).norm() if norm is None else norm).item()
    return list(steps) if total <= limit else [s * (limit / total) for s in steps]
