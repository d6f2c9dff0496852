"""Whether and how far to step along what a descent proposes, and along what of it.

The rate itself is the parameter group's ``lr``, so that torch's schedulers drive it; a search scales the step
besides, or changes its coefficients. It is a value without a state: what it must remember from step to step, its
*record*, is a dictionary of numbers and lists of them that goes in and comes out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ArgumentError
from .descent import Solution, cubic_step

Record = dict[str, Any]
Chosen = tuple[Tensor, float, Record]  # coefficients kappa, how much of them to go, and the new record

_HOLDS = 0.75  # of the promised decrease: below it a plane's model does not hold where a step leads
_TRIES = 5  # with more damping each


@dataclass(frozen=True)
class Line:
    """A step that may be taken in part.

    Attributes:
        loss_at: the loss after so much of it, by a pass of its own.
        length: its Euclidean norm over all parameters.
    """

    loss_at: Callable[[float], float]
    length: Callable[[], float]


@dataclass(frozen=True)
class Proposal:
    """A step that a descent proposes along a plane of K directions.

    Attributes:
        value: the loss before it.
        slope: F, shape (K,).
        solution: the plane in coordinates of its own, and the step in them: see `jetplane.subspace.descent.Solution`.
        covariance: C, that of the slope as one of a random batch, (K, K) in float64, or None where it is not known;
            see `jetplane.evaluation.plane.SlopeMoments`.
        line: the line along coefficients kappa. Searches that know no other go along ``proposal.kappa``.
        factor: the rate by which lines are shorter than their coefficients say.
        damped: the plane solved anew with so much added to the curvature of each direction for every unit of its
            squared length, or None where there is no such thing.
        stiffest: the largest curvature of a direction for its squared length.
        rounding: the error of the loss as a number.
    """

    value: float
    slope: Tensor
    solution: Solution
    covariance: Tensor | None
    line: Callable[[Tensor], Line]
    factor: float = 1.0
    damped: Callable[[float], Solution] | None = None
    stiffest: float = 1.0
    rounding: float = 0.0

    @property
    def kappa(self) -> Tensor:
        """The coefficients that the descent proposes."""
        return self.solution.kappa(self.solution.step)

    @property
    def signal(self) -> float:
        """``F^T M F``: how fast the loss falls along the step, twice what a quadratic model promises."""
        return -(self.solution.slope @ self.solution.step).item()

    @property
    def noise(self) -> float | None:
        """``tr(M C)``, C the covariance of the slope: what `signal` would be on average without a gradient."""
        return None if self.covariance is None else (self.solution.weights * self.noises()).sum().item()

    def noises(self) -> Tensor:
        """The variance of the slope along each coordinate, ``diag(B^T C B)``."""
        assert self.covariance is not None
        return ((self.covariance @ self.solution.basis) * self.solution.basis).sum(0)

    def decrease(self, step: Tensor, rate: float = 1.0) -> float:
        """By how much the loss falls in the quadratic model after so much of the step with these coordinates."""
        rate = rate * self.factor
        solution = self.solution
        return -(rate * solution.slope @ step + 0.5 * rate**2 * solution.values @ step.square()).item()


class Search(ABC):
    """What decides how much of a proposed step is taken.

    Attributes:
        examples: whether it makes use of the slope's covariance, by the examples' parts of it.
    """

    examples: bool = False

    @abstractmethod
    def __call__(self, proposal: Proposal, record: Record) -> Chosen:
        """Coefficients, how much of them to go (0: stay), and the record to come with next time ({} at first)."""


@dataclass(frozen=True)
class Whole(Search):
    """The whole step: its length is the rate's business."""

    def __call__(self, proposal: Proposal, record: Record) -> Chosen:
        """See `Search`."""
        return proposal.kappa, 1.0, record


@dataclass(frozen=True)
class Backtracking(Search):
    """Halve the step until the loss falls by a part of what its slope promises (Armijo), by passes of their own.

    The loss never rises: where no length will do, the step is not taken. For losses without noise.

    Attributes:
        part: the part, ``L(rate) <= L(0) - part * rate * signal``.
        halvings: how often at most.

    >>> import torch, jetplane as jp
    >>> slope, plane = torch.tensor([2.0]), jp.descent.Newton().solve(torch.tensor([2.0]), torch.tensor([[0.5]]))
    >>> line = Line(lambda rate: (1 - 4 * rate) ** 2, lambda: 4.0)
    >>> Backtracking()(Proposal(1.0, slope, plane, None, lambda kappa: line), {})[1:]
    (0.25, {})
    """

    part: float = 1e-4
    halvings: int = 40

    def __post_init__(self) -> None:
        if not 0 < self.part < 1 or self.halvings < 0:
            raise ArgumentError(f"expected 0 < part < 1 and halvings >= 0, got {self.part} and {self.halvings}")

    def __call__(self, proposal: Proposal, record: Record) -> Chosen:
        """See `Search`."""
        kappa = proposal.kappa
        return kappa, self.shortened(proposal, kappa, 1.0), record

    def shortened(self, proposal: Proposal, kappa: Tensor, rate: float) -> float:
        """The first of ``rate``, a half, a fourth of it, … for which the loss falls; 0 if there is none."""
        line, slope = proposal.line(kappa), (proposal.slope.double() @ kappa).item()
        for n in range(self.halvings + 1):
            if line.loss_at(rate / 2**n) <= proposal.value + self.part * rate / 2**n * slope:
                return rate / 2**n
        return 0.0


@dataclass(frozen=True)
class ExactLine(Search):
    """The least loss along the step, by parabolas and golden sections through what a few passes have found.

    The first pass is at the whole step. While the loss falls the next is twice as far; then it is the least point of
    the parabola through the best point and its neighbours (the first one has the known slope in place of a third
    value), and where that lies outside of them or moves by less than a hundredth, a golden section. The loss never
    rises: without a lower point the step is not taken. For losses without noise.

    Attributes:
        passes: how many points of the line are looked at.

    >>> import torch, jetplane as jp
    >>> slope, plane = torch.tensor([2.0]), jp.descent.Newton().solve(torch.tensor([2.0]), torch.tensor([[1.0]]))
    >>> line = Line(lambda rate: 1 + (1 - rate / 0.3) ** 2 * 0.6, lambda: 2.0)
    >>> round(ExactLine(passes=3)(Proposal(1.6, slope, plane, None, lambda kappa: line), {})[1], 6)
    0.3

    Source: Brent, Algorithms for Minimization without Derivatives, 1973, chapter 5.
    """

    passes: int = 6

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ArgumentError(f"passes must be at least 1, got {self.passes}")

    def __call__(self, proposal: Proposal, record: Record) -> Chosen:
        """See `Search`."""
        kappa = proposal.kappa
        line, slope = proposal.line(kappa), proposal.factor * (proposal.slope.double() @ kappa).item()
        below, best, above = None, (0.0, proposal.value), None  # neighbours and best of what is known, by rate
        rate = 1.0
        for _ in range(self.passes):
            value = line.loss_at(rate)
            value = value if math.isfinite(value) else math.inf
            point, beyond = (rate, value), rate > best[0]
            if value < best[1]:
                below, above = (best, above) if beyond else (below, best)
                best = point
            else:
                below, above = (below, point) if beyond else (point, above)
            if above is None:
                rate = 2 * best[0]
            elif below is None:  # nothing is lower yet
                rate = _least_by_slope(above, proposal.value, slope)
            else:
                rate = _least_between(below, best, above)
        return kappa, best[0], record


def _least_by_slope(point: tuple[float, float], value: float, slope: float) -> float:
    rate, found = point
    bend = found - value - slope * rate
    inside = -slope * rate**2 / (2 * bend) if math.isfinite(bend) and bend > 0 else 0.0
    return min(max(inside, 0.1 * rate), 0.5 * rate)


def _least_between(below: tuple[float, float], best: tuple[float, float], above: tuple[float, float]) -> float:
    (a, fa), (b, fb), (c, fc) = below, best, above
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if math.isfinite(left - right) and left != right:
        least = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
        if a < least < c and abs(least - b) > 0.01 * (c - a):
            return least
    golden = (3 - math.sqrt(5)) / 2
    return b + golden * (c - b) if c - b > b - a else b - golden * (b - a)


class RatioTest(Search):
    """Searches that compare how much the loss falls with how much the plane's model promised.

    A try is taken if the loss falls by at least a ten-thousandth of that. Below a quarter the next is more careful,
    above three quarters bolder. For losses without noise.

    Attributes:
        tries: how many in a step; if the loss does not fall in any, the step is refused. What the tries
            have taught is remembered all the same.
    """

    tries: int

    def __call__(self, proposal: Proposal, record: Record) -> Chosen:
        """See `Search`."""
        kappa = proposal.kappa
        for _ in range(self.tries):
            kappa, rate, promised, line = self._attempt(proposal, record)
            fallen = proposal.value - line.loss_at(rate)
            ratio = fallen / promised if promised > 0 and math.isfinite(fallen) else -math.inf
            record = self._learned(record, ratio, rate, line, proposal)
            if ratio >= 1e-4:
                return kappa, rate, record
        return kappa, 0.0, record

    @abstractmethod
    def _attempt(self, proposal: Proposal, record: Record) -> tuple[Tensor, float, float, Line]:
        """Coefficients, how much of them, by how much the loss should fall then, and their line."""

    @abstractmethod
    def _learned(self, record: Record, ratio: float, rate: float, line: Line, proposal: Proposal) -> Record:
        """The record after a try."""


@dataclass(frozen=True)
class TrustRegion(RatioTest):
    """Steps no longer than a radius within which the plane's model has held: it grows and shrinks by the ratio test.

    A step that is too long is scaled back to the radius. The radius is halved twice after a poor try, doubled after a
    good one that reached it.

    Attributes:
        radius: at first; None for the length of the first step.
        metric: what lengths are: "euclidean", over all parameters, or "plane", ``sqrt(F^T M F)``, in which long
            directions and short ones weigh the same.
        tries: see `RatioTest`.

    >>> import torch, jetplane as jp
    >>> slope, plane = torch.tensor([2.0]), jp.descent.Newton().solve(torch.tensor([2.0]), torch.tensor([[1.0]]))
    >>> line = Line(lambda rate: 2 - 4 * rate + 2 * rate**2, lambda: 2.0)
    >>> TrustRegion(radius=0.5)(Proposal(2.0, slope, plane, None, lambda kappa: line), {})[1:]
    (0.25, {'radius': 1.0})

    Source: Conn, Gould and Toint, Trust-Region Methods, SIAM 2000, chapter 6.
    """

    radius: float | None = None
    metric: Literal["euclidean", "plane"] = "euclidean"
    tries: int = 5

    def __post_init__(self) -> None:
        if self.radius is not None and not self.radius > 0:
            raise ArgumentError(f"radius must be positive or None, got {self.radius}")
        if self.metric not in ("euclidean", "plane"):
            raise ArgumentError(f"metric must be 'euclidean' or 'plane', got {self.metric!r}")
        if self.tries < 1:
            raise ArgumentError(f"tries must be at least 1, got {self.tries}")

    def _length(self, proposal: Proposal, line: Line) -> float:
        return line.length() if self.metric == "euclidean" else math.sqrt(max(proposal.signal, 0.0))

    def _attempt(self, proposal: Proposal, record: Record) -> tuple[Tensor, float, float, Line]:
        kappa = proposal.kappa
        line = proposal.line(kappa)
        length = self._length(proposal, line)
        radius = record.get("radius", self.radius or length)
        rate = min(1.0, radius / length) if length > 0 else 0.0
        return kappa, rate, proposal.decrease(proposal.solution.step, rate), line

    def _learned(self, record: Record, ratio: float, rate: float, line: Line, proposal: Proposal) -> Record:
        taken = rate * self._length(proposal, line)
        radius = record.get("radius", self.radius or taken)
        if ratio < 0.25:
            radius = 0.25 * taken
        elif ratio > 0.75 and taken >= 0.99 * radius:
            radius = 2 * radius
        return record | {"radius": radius} if radius > 0 else record


@dataclass(frozen=True)
class AdaptiveCubic(RatioTest):
    """`jetplane.subspace.descent.Cubic` with a sigma that the ratio test finds, whatever descent the optimizer has.

    The descent says in which coordinates the step is short (scaled or not). Sigma is four times as large after
    a poor try, a third after a good one.

    Attributes:
        sigma: at first; None for ``|H| / |newton step|`` of the first plane, for which the damping is as large as the
            curvature where the step would be a whole one.
        tries: see `RatioTest`.

    >>> import torch, jetplane as jp
    >>> slope, plane = torch.tensor([2.0]), jp.descent.Newton().solve(torch.tensor([2.0]), torch.tensor([[1.0]]))
    >>> line = Line(lambda rate: 2 - 2 * rate + 0.5 * rate**2, lambda: 1.0)
    >>> AdaptiveCubic(sigma=1.0)(Proposal(2.0, slope, plane, None, lambda kappa: line), {})[1:]
    (1.0, {'sigma': 0.3333333333333333})

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), algorithm ARC.
    """

    sigma: float | None = None
    tries: int = 8

    def __post_init__(self) -> None:
        if self.sigma is not None and not self.sigma > 0:
            raise ArgumentError(f"sigma must be positive or None, got {self.sigma}")
        if self.tries < 1:
            raise ArgumentError(f"tries must be at least 1, got {self.tries}")

    def _sigma(self, proposal: Proposal, record: Record) -> float:
        found = proposal.solution
        largest = found.values.abs().max().item()
        scale = 0.0 if found.slope.norm() == 0 else largest * largest / found.slope.norm().item()
        return record.get("sigma", self.sigma or scale or 1.0)

    def _attempt(self, proposal: Proposal, record: Record) -> tuple[Tensor, float, float, Line]:
        _, step = cubic_step(proposal.solution.values, proposal.solution.slope, self._sigma(proposal, record))
        kappa = proposal.solution.kappa(step)
        return kappa, 1.0, proposal.decrease(step), proposal.line(kappa)

    def _learned(self, record: Record, ratio: float, rate: float, line: Line, proposal: Proposal) -> Record:
        sigma = self._sigma(proposal, record)
        sigma = 4 * sigma if ratio < 0.25 else sigma / 3 if ratio > 0.75 else sigma
        return record | {"sigma": min(max(sigma, 1e-100), 1e100)}


@dataclass(frozen=True)
class NoiseAware(Search):
    """Shrink the step by what of it is noise: ``1 - tr(M C) / (F^T M F)``, both averaged over steps.

    With the true slope G, ``F = G + noise`` and noise of covariance C, the loss of a quadratic model after ``rate``
    times the step ``-M F`` falls most, on average, for this rate: ``E[F^T M F] = G^T M G + tr(M C)``, of which the
    first term is worth going for. C comes from the examples' parts of the slope, at no cost. It is unbiased where
    the directions do not depend on the batch: see `jetplane.gradients.perturbation`.

    The model of the plane may be wrong where the step leads, above all where directions that are mostly noise, and so
    hardly curve, are gone far along. If the loss of the same batch falls by less than three quarters of what the model
    promises, the plane is solved again with ``damping`` times the squared length of the step added to it (Levenberg,
    Marquardt), ten times as much for each try. What was needed is remembered, and a third of it after each good step.
    If nothing helps the step is halved until the loss falls.

    With ``each`` every coordinate of the plane, an eigenvector of its curvature as the descent scales it, is shrunk
    for itself, ``max(floor, 1 - c_i / f_i^2)`` with f_i the slope along it and c_i the variance of that: one noisy
    direction does not slow the good ones down. As eigenvectors turn from step to step, the averages are those of the
    i-th lowest eigenvalue, of ``m_i f_i^2`` and ``m_i c_i``; they begin anew where the plane gets more directions.

    Attributes:
        memory: how much of the averages is kept from step to step.
        floor: the least that is taken of a step, unless the loss rises.
        each: whether coordinates are shrunk one by one.
        otherwise: what decides where the loss does not tell its examples apart.
        guard: whether to look at the loss after the step, by a pass of its own. Else nothing is damped or halved.

    >>> import torch, jetplane as jp
    >>> slope, plane = torch.tensor([4.0]), jp.descent.Newton().solve(torch.tensor([4.0]), torch.tensor([[1.0]]))
    >>> line = Line(lambda rate: 100 - 8 * rate, lambda: 4.0)
    >>> noise = torch.tensor([[4.0]]).double()  # beside a signal of 16
    >>> NoiseAware()(Proposal(100.0, slope, plane, noise, lambda kappa: line), {})[1]
    0.75
    """

    memory: float = 0.95
    floor: float = 1e-3
    guard: bool = True
    each: bool = False
    otherwise: Search = Backtracking()
    examples = True

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1 or not 0 <= self.floor <= 1:
            raise ArgumentError(f"expected 0 <= memory < 1 and 0 <= floor <= 1, got {self.memory} and {self.floor}")

    def __call__(self, proposal: Proposal, record: Record) -> Chosen:
        """See `Search`."""
        if proposal.covariance is None:
            return self.otherwise(proposal, record)
        if not self.guard:
            return self._shrunk(proposal, record)
        damping = record.get("damping", 0.0)
        for n in range(_TRIES):
            if n:
                damping = max(10 * damping, 1e-3 * proposal.stiffest)
            tried = proposal
            if damping and proposal.damped is not None:
                tried = replace(proposal, solution=proposal.damped(damping))
            kappa, rate, told = self._shrunk(tried, record)
            if rate == 0 or proposal.damped is None:
                break
            promised = proposal.decrease(torch.linalg.solve(proposal.solution.basis, kappa), rate)
            fallen = proposal.value - proposal.line(kappa).loss_at(rate)
            if fallen >= _HOLDS * max(promised, 0.0) - proposal.rounding:
                if n == 0:
                    damping = damping / 3 if damping > 1e-4 * proposal.stiffest else 0.0
                return kappa, rate, told | {"damping": damping}
        if rate > 0:
            rate = Backtracking().shortened(proposal, kappa, rate)
        return kappa, rate, told | {"damping": damping}

    def _shrunk(self, proposal: Proposal, record: Record) -> Chosen:
        """What of a step is not noise."""
        kappa, solution = proposal.kappa, proposal.solution
        noise, signal = solution.weights * proposal.noises(), -solution.slope * solution.step
        if not self.each:
            noise, signal = noise.sum(0, keepdim=True), signal.sum(0, keepdim=True)
        mixed = {}
        for name, value in (("noise", noise), ("signal", signal)):
            old = torch.tensor(record.get(name, 0.0), dtype=value.dtype).to(value.device)
            old = old if old.numel() == value.numel() else torch.zeros_like(value)
            mixed[name] = self.memory * old.reshape(-1) + (1 - self.memory) * value
        kept = torch.where(mixed["signal"] > 0, 1 - mixed["noise"] / mixed["signal"], 0).nan_to_num(0.0)
        kept = torch.where(mixed["signal"] > 0, kept.clamp_min(self.floor), 0)
        record = {name: value.tolist() if self.each else value.item() for name, value in mixed.items()}
        rate = 1.0
        if self.each:
            kappa = solution.kappa(kept * solution.step)
        else:
            rate = kept.item()
        if not bool(kept.any()):
            return kappa, 0.0, record
        return kappa, rate, record


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
