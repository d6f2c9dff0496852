"""Which rank evaluates which directions of a plane.

Ranks that evaluate one batch together deal out its directions: blocks of them that hold every pair where the curvature
of all pairs is wanted. Nothing here communicates; `jetplane.parallel.ranks` does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..directions import AbstractDirections, SelectedDirections
from ..evaluation.specification import Curvature, PlaneSpec


@dataclass(frozen=True)
class WorkItem:
    """One evaluation of a rank: on which directions, and which of its numbers count.

    Attributes:
        directions: their indices, ascending.
        slope: for each of them whether its slope counts, and where pairs are not given, its curvature.
        pairs: (k, k), for each pair of all directions whether its curvature counts.
    """

    directions: list[int]
    slope: Tensor
    pairs: Tensor | None = None

    def chosen(self, directions: AbstractDirections) -> AbstractDirections:
        """These of all directions."""
        if len(self.directions) == directions.k:
            return directions
        runs: list[slice] = []
        for i in self.directions:
            runs[-1:] = [slice(runs[-1].start, i + 1)] if runs and runs[-1].stop == i else [*runs[-1:], slice(i, i + 1)]
        return SelectedDirections(directions, runs)

    def add(self, total: Tensor, part: Tensor, index: Tensor) -> None:
        """Add what counts of the curvature of these directions, ``part``, to that of all."""
        if self.pairs is not None:
            rows = index[:, None]
            total[rows, index] += torch.where(self.pairs[rows, index], part, 0)
        elif total.dim() == 3:  # whole planes
            size = total.shape[-1]
            total[index[::size] // size] += part * self.slope[::size, None, None]
        else:
            total[index] += part * self.slope


@functools.cache
def plan(spec: PlaneSpec, ranks: int) -> list[list[WorkItem]]:
    """The work items of each of so many ranks that evaluate one batch; together they give every number once.

    Lines and independent planes are dealt out. A plane with all its pairs is covered by blocks: each pair of
    directions is in one of them at least. The busiest of two ranks then does 0.76 of the work on the exact curvature
    of 64 directions, of three 0.46, of eight 0.21, of 64 0.04. A Gauss-Newton plane costs most in its directions,
    not in its pairs: two ranks gain nothing, three do 0.67 of the work, 64 do 0.19.

    >>> [[item.directions for item in items] for items in plan(PlaneSpec(6), 3)]
    [[[0, 1, 2, 3]], [[0, 1, 4, 5]], [[2, 3, 4, 5]]]
    """
    k, unit = spec.k, 1 if spec.crossed else spec.block
    if not spec.crossed:
        shares = [share.tolist() for share in torch.arange(k).reshape(-1, unit).tensor_split(ranks)]
        blocks = [[sum(share, [])] if share else [] for share in shares]
        items = [[WorkItem(b, torch.ones(len(b), dtype=torch.bool)) for b in own] for own in blocks]
    else:
        blocks = _cheapest_cover(k, ranks, spec.curvature)
        items = [[] for _ in range(ranks)]
        done = torch.zeros(k, k, dtype=torch.bool)
        for n, block in enumerate(blocks):
            inside = torch.zeros(k, k, dtype=torch.bool)
            inside[torch.tensor(block)[:, None], torch.tensor(block)] = True
            slope = ~done.diagonal()[block]
            items[n % ranks].append(WorkItem(block, slope, inside & ~done))
            done |= inside
    # A rank without work evaluates along one direction all the same: its closure draws random numbers and moves
    # buffers as that of the others does.
    nothing = torch.zeros(k, k, dtype=torch.bool)
    idle = WorkItem(list(range(unit)), nothing[0, :unit], nothing if spec.crossed else None)
    return [own or [idle] for own in items]


GROUPS = 13  # into which directions are divided at most: enough for the projective plane of 13 blocks


def _cheapest_cover(k: int, ranks: int, curvature: Curvature) -> list[list[int]]:
    """Blocks of directions that hold every pair, at least work for the busiest rank."""

    def cost(size: int, each: int) -> int:  # in forward products of a layer: see docs/how_it_works.md
        return each * ((size + 1) ** 2 if curvature == "hessian" else 1 + 2 * size)

    best, best_cost = [list(range(k))], cost(k, 1)
    for each in (1, 2) if ranks > 1 else ():
        for count in range(3, min(k, GROUPS) + 1):
            groups = torch.arange(k).tensor_split(count)
            for size in range(2, count):
                if cost(size * (k // count), each) >= best_cost:
                    break
                blocks = [torch.cat([groups[g] for g in b]).tolist() for b in _cover(count, size, ranks * each)]
                worst = cost(max(map(len, blocks)), each) if blocks else best_cost
                if worst < best_cost:
                    best, best_cost = blocks, worst
    return best


def _cover(k: int, size: int, count: int) -> list[list[int]]:
    """At most `count` blocks of `size` of k that hold every pair, by a greedy search; none if it does not find them."""
    if count * size * (size - 1) < k * (k - 1):
        return []
    blocks: list[list[int]] = []
    left = ~torch.eye(k, dtype=torch.bool)
    while bool(left.any()):
        if len(blocks) == count:
            return []
        chosen: list[int] = []
        for _ in range(size):
            gain = left[chosen].sum(0) * k + left.sum(0)
            gain[chosen] = -1
            chosen.append(int(gain.argmax()))
        chosen.sort()
        left[torch.tensor(chosen)[:, None], torch.tensor(chosen)] = False
        blocks.append(chosen)
    return blocks
