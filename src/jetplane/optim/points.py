"""Internal: where parameters are among the points of a plane's sources, and how they move in steps without a plane.

A source has points of its own (`jetplane.sources.Source.points`), as fast weights z and their average. A plane's step
leads to ``theta = sum_j w_j z_j + rest``. The share of a source is the sum of its w_j. In a step without a plane
parameters go on with the source's last point by that share. A batch that no plane was fitted to judges whether they
go to one of the points altogether.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..directions.unit import joint_norm
from ..errors import ArgumentError
from ..subspace.sources import Context, Source, State

EARLY = {1, 4}  # steps after which a batch judges, besides those after a plane

Changes = list[tuple[int, Tensor]]  # what is added to parameters, by their place among those that move


def is_judged(step: int, every: int) -> bool:
    """Whether a step's batch judges where the parameters are.

    Args:
        step: number of steps before.
        every: steps from one plane to the next.
    """
    return step in EARLY or (step > 0 and step % every == 0)


def judged(
    sources: Sequence[Source], contexts: Sequence[Context], rates: Sequence[float], shares: Sequence[float],
    loss: Callable[[Changes], float], known: tuple[Sequence[Tensor], float] | None, limit: float = math.inf,
) -> tuple[Changes, Sequence[float]]:  # fmt: skip
    """What leads to the point at which a batch has a lower loss than where the parameters are.

    Args:
        sources: those that have points.
        contexts: what each of them sees.
        rates: learning rate of each parameter, the part of the way to a point that it goes.
        shares: of the sources, now.
        loss: the batch's loss after changes.
        known: a point, and the loss there.
        limit: the largest norm of the changes.

    Returns:
        The changes of the parameters that move, none where they are best, and the shares after them.
    """
    params, (least, found) = contexts[0].params, (loss([]), (Changes(), shares))
    for j, (source, context) in enumerate(zip(sources, contexts, strict=True)):
        for point in points_of(source, context):
            changes = [
                (i, rate * (there - p)) for i, (p, there, rate) in enumerate(zip(params, point, rates, strict=True))
            ]
            if not any(change.any() for _, change in changes):
                continue
            is_whole, is_known = all(rate == 1 for rate in rates), False
            if limit < math.inf:
                part = min(1.0, limit / joint_norm(change for _, change in changes))
                changes, is_whole = [(i, part * change) for i, change in changes], is_whole and part == 1
            if known is not None and is_whole:
                is_known = all(there is other for there, other in zip(point, known[0], strict=True))
            value = known[1] if known is not None and is_known else loss(changes)
            if value < least or (math.isfinite(value) and not math.isfinite(least)):
                least, found = value, (changes, [float(i == j) for i in range(len(contexts))])
    changes, shares = found
    return [(i, change) for i, change in changes if change.any()], shares


def reach(sources: Sequence[Source], contexts: Sequence[Context]) -> float:
    """The distance from the parameters to the farthest point; infinite where there is none but where they are.

    No step in a plane is longer. Parameters move on with the points between two planes, so that the way to some of
    them is short, and of any direction. A plane of few examples would go tens of times as far along it.
    """
    pairs = zip(sources, contexts, strict=True)
    lengths = [_distance(point, context.params) for source, context in pairs for point in points_of(source, context)]
    return max((length for length in lengths if 0 < length < math.inf), default=math.inf)


def shares(
    sources: Sequence[Source], contexts: Sequence[Context], weights: Sequence[Tensor], before: Sequence[float]
) -> list[float]:
    """The shares of the sources after a plane's step.

    A step by ``w_j (z_j - theta)`` leads to ``sum_j w_j z_j + (1 - sum_j w_j) theta``, and theta had parts before.
    Where a step goes past the points, or away from them, the shares and their sum stay within [0, 1]: parameters do not
    move on by more than the points do.

    Args:
        sources: of the plane's directions.
        contexts: what each of them has seen.
        weights: the coefficients of each source's directions, which have unit length; of the first ones, where there
            was no room for others.
        before: the shares before the step.
    """
    steps = []
    for source, context, of in zip(sources, contexts, weights, strict=True):
        lengths = [length for point in points_of(source, context) if (length := _distance(point, context.params)) > 0]
        pairs = zip(of.tolist(), lengths, strict=False) if len(of) <= len(lengths) else ()
        steps.append(sum(weight / length for weight, length in pairs))
    left = 1 - sum(steps)
    parts = [min(max(step + left * old, 0.0), 1.0) for step, old in zip(steps, before, strict=True)]
    return [part / max(sum(parts), 1.0) for part in parts]


def advance(source: Source, context: Context, states: Sequence[State]) -> Sequence[Tensor]:
    """By how much the last point of a source moves with its new states, for each parameter; empty if it has none."""
    before, after = points_of(source, context), points_of(source, replace(context, state=states))
    return [b - a for a, b in zip(before[-1], after[-1], strict=True)] if before and after else []


@final
@dataclass(frozen=True)
class Following:
    """How parameters move on with the last points of sources.

    Attributes:
        advances: of each parameter, for each source by how much its last point moves, or None.
        shares: of the sources.
    """

    advances: list[Sequence[Tensor | None]]
    shares: Sequence[float]

    def move(self, params: Sequence[Tensor], rates: Sequence[float], limit: float = math.inf) -> None:
        """Move the parameters, each by its learning rate, and by no more than a limit altogether."""
        part = 1.0
        if limit < math.inf:
            moves = [[alpha * change for change, alpha in self._of(i, rate)] for i, rate in enumerate(rates)]
            whole = joint_norm(sum(changes, torch.zeros(())) for changes in moves)
            part = min(1.0, limit / whole) if whole > 0 else 1.0
        for i, (p, rate) in enumerate(zip(params, rates, strict=True)):
            for change, alpha in self._of(i, rate):
                p.add_(change, alpha=part * alpha)

    def _of(self, i: int, rate: float) -> Iterator[tuple[Tensor, float]]:
        """What a parameter moves by, and times what."""
        for change, share in zip(self.advances[i], self.shares, strict=True):
            if change is not None:
                yield change, rate * share


def points_of(source: Source, context: Context) -> Sequence[Sequence[Tensor]]:
    """The points of a source, of the parameters' shapes.

    Raises:
        ArgumentError: they are not.
    """
    points = source.points(context)
    if not isinstance(points, (list, tuple)):
        raise ArgumentError(f"points of {type(source).__name__} must be a list, got {type(points).__name__}")
    for point in points:
        check_point(source, "points", point, context.params)
    return points


def check_point(source: Source, name: str, point: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Check that a source has given one tensor for each parameter, of its shape.

    Raises:
        ArgumentError: it has not.
    """
    is_list = isinstance(point, (list, tuple)) and all(isinstance(t, Tensor) for t in point)
    if not is_list or [t.shape for t in point] != [p.shape for p in params]:
        got = [tuple(t.shape) for t in point] if is_list else type(point).__name__
        raise ArgumentError(
            f"{name} of {type(source).__name__} must have a tensor for each parameter that may move, of shapes "
            f"{[tuple(p.shape) for p in params]}, got {got}"
        )


def _distance(point: Sequence[Tensor], params: Sequence[Tensor]) -> float:
    return joint_norm(a - p for a, p in zip(point, params, strict=True))
