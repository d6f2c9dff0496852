"""Internal: where parameters are among the points of a plane's sources, and how they move in steps without a plane.

A source has points of its own (`jetplane.sources.Source.points`), as fast weights z and their average. A plane's step
leads to ``theta = sum_j w_j z_j + rest``. The share of a source is the sum of its w_j. In a step without a plane
parameters go on with the source's last point by that share. A batch that no plane was fitted to judges whether they
go to one of the points altogether.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

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
    loss: Callable[[Changes], float], known: tuple[Sequence[Tensor], float] | None,
) -> tuple[Changes, Sequence[float]]:  # fmt: skip
    """What leads to the point at which a batch has a lower loss than where the parameters are.

    Args:
        sources: those that have points.
        contexts: what each of them sees.
        rates: learning rate of each parameter, the part of the way to a point that it goes.
        shares: of the sources, now.
        loss: the batch's loss after changes.
        known: a point, and the loss there.

    Returns:
        The changes, none where the parameters are best, and the shares after them.
    """
    params, (least, found) = contexts[0].params, (loss([]), (Changes(), shares))
    for j, (source, context) in enumerate(zip(sources, contexts, strict=True)):
        for point in source.points(context):
            changes = [
                (i, rate * (there - p)) for i, (p, there, rate) in enumerate(zip(params, point, rates, strict=True))
            ]
            if not any(change.any() for _, change in changes):
                continue
            is_known = known is not None and point[0] is known[0][0] and all(rate == 1 for rate in rates)
            value = known[1] if known is not None and is_known else loss(changes)
            if value < least or not math.isfinite(least):
                least, found = value, (changes, [float(i == j) for i in range(len(contexts))])
    return found


def reach(sources: Sequence[Source], contexts: Sequence[Context]) -> float:
    """The distance from the parameters to the farthest point; infinite where there is none but where they are.

    No step in a plane is longer. Parameters move on with the points between two planes, so that the way to some of
    them is short, and of any direction. A plane of few examples would go tens of times as far along it.
    """
    pairs = zip(sources, contexts, strict=True)
    lengths = [_distance(point, context.params) for source, context in pairs for point in source.points(context)]
    return max((length for length in lengths if 0 < length < math.inf), default=math.inf)


def shares(
    sources: Sequence[Source], contexts: Sequence[Context], weights: Sequence[Tensor], before: Sequence[float]
) -> list[float]:
    """The shares of the sources after a plane's step.

    A step by ``w_j (z_j - theta)`` leads to ``sum_j w_j z_j + (1 - sum_j w_j) theta``, and theta had parts before.
    Where a step goes past the points, or away from them, the shares stay within [0, 1]: parameters do not move on by
    more than the points do.

    Args:
        sources: of the plane's directions.
        contexts: what each of them has seen.
        weights: the coefficients of each source's directions, which have unit length.
        before: the shares before the step.
    """
    steps = []
    for source, context, of in zip(sources, contexts, weights, strict=True):
        lengths = [length for point in source.points(context) if (length := _distance(point, context.params)) > 0]
        pairs = zip(of.tolist(), lengths, strict=True) if len(of) == len(lengths) else ()
        steps.append(sum(weight / length for weight, length in pairs))
    left = 1 - sum(steps)
    parts = zip(steps, before or [0.0] * len(steps), strict=True)
    return [min(max(step + left * old, 0.0), 1.0) for step, old in parts]


def follow(
    sources: Sequence[Source], contexts: Sequence[Context], remembered: Sequence[Sequence[State]],
    rates: Sequence[float], shares: Sequence[float],
) -> None:  # fmt: skip
    """Move the parameters on with the last point of each source, by its share and their learning rates."""
    for source, context, states, share in zip(sources, contexts, remembered, shares, strict=False):
        before, after = source.points(context), source.points(replace(context, state=states))
        if share and before and after:
            for p, a, b, rate in zip(context.params, before[-1], after[-1], rates, strict=True):
                p.add_(b - a, alpha=rate * share)


def _distance(point: Sequence[Tensor], params: Sequence[Tensor]) -> float:
    return torch.stack([(a - p).double().norm() for a, p in zip(point, params, strict=True)]).norm().item()
