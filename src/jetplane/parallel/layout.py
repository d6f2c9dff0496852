"""Which numbers a plane has, how they lie in a message, and which rank finds which of them.

Ranks that evaluate one batch together deal out its directions: blocks of them that hold every pair where the curvature
of all pairs is wanted. Nothing here communicates; `jetplane.parallel.ranks` does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..directions import AbstractDirections, SelectedDirections
from ..errors import ArgumentError, ShapeError
from ..evaluation.plane import Curvature, Pairs, PlaneModel, SlopeMoments


@dataclass(frozen=True)
class Layout:
    """The plane that ranks evaluate together, in the words of `jetplane.evaluate`.

    Attributes:
        k: number of directions.
        curvature: "hessian", "ggn" or "none".
        pairs: "all", "diagonal", or the number of directions of one of several independent planes.
        examples: whether the moments of the slope over examples come out as well; for all pairs of a curvature.

    Raises:
        ArgumentError: moments are wanted, but not all pairs.
    """

    k: int
    curvature: Curvature
    pairs: Pairs
    examples: bool = False

    def __post_init__(self) -> None:
        if self.examples and (self.pairs != "all" or self.curvature == "none"):
            raise ArgumentError(f"moments over examples come with a curvature of all pairs only, got {self}")

    def shape(self, k: int) -> tuple[int, ...] | None:
        """Of the curvature of k of the directions."""
        if self.curvature == "none":
            return None
        if isinstance(self.pairs, int):
            return (k // self.pairs, self.pairs, self.pairs)
        return (k,) if self.pairs == "diagonal" else (k, k)

    def entries(self) -> tuple[Tensor, ...]:
        """Indices of the curvature's entries that are sent: of a symmetric matrix, the upper triangle."""
        shape = self.shape(self.k)
        if shape is None:
            return ()
        if len(shape) == 1:
            return (torch.arange(self.k),)
        rows, columns = torch.triu_indices(shape[-1], shape[-1])
        if len(shape) == 2:
            return rows, columns
        planes = torch.arange(shape[0]).repeat_interleave(len(rows))
        return planes, rows.repeat(shape[0]), columns.repeat(shape[0])

    @property
    def length(self) -> int:
        """How many numbers a plane has: the loss, the slope, and the curvature's entries."""
        entries = self.entries()
        return 1 + self.k + (len(entries[0]) if entries else 0)

    def check(self, plane: PlaneModel, k: int) -> None:
        """Raise where numbers came that would not be sent, or not those that are expected of k directions.

        Raises:
            ShapeError: the plane's numbers are others.
            ArgumentError: it has the examples' parts of the slope, whose moments this layout does not send.
        """
        got = None if plane.curvature is None else tuple(plane.curvature.shape)
        if plane.slope.shape != (k,) or got != self.shape(k):
            raise ShapeError(
                f"for {self} on {k} directions: expected curvature {self.shape(k)}, got slope "
                f"{tuple(plane.slope.shape)} and curvature {got}"
            )
        if plane.examples is not None and not self.examples:
            raise ArgumentError(f"the examples' parts of the slope were found, which {self} does not send")

    def plane(self, body: Tensor, dtype: torch.dtype, device: torch.device) -> PlaneModel:
        """The plane of as many numbers."""
        value, slope, entries = body.to(dtype).split([1, self.k, len(body) - 1 - self.k])
        curvature = self._mirrored(entries)
        return PlaneModel(value[0].to(device), slope.to(device), None if curvature is None else curvature.to(device))

    def moments(self, body: Tensor, device: torch.device) -> SlopeMoments | None:
        """The moments of as many numbers; None where they were not wanted, or are not known of all shards."""
        if not self.examples or bool(body[0].isnan()):
            return None
        products = self._mirrored(body[1 + self.k :])
        assert products is not None
        return SlopeMoments(round(body[0].item()), body[1 : 1 + self.k].to(device), products.to(device))

    def _mirrored(self, sent: Tensor) -> Tensor | None:
        """The whole of a matrix like the curvature whose `entries` were sent."""
        shape, entries = self.shape(self.k), self.entries()
        if shape is None:
            return None
        whole = sent.new_empty(shape)
        whole[entries] = sent
        if len(entries) > 1:
            whole[(*entries[:-2], entries[-1], entries[-2])] = sent
        return whole


@dataclass(frozen=True)
class Task:
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
def plan(layout: Layout, parts: int) -> list[list[Task]]:
    """The tasks of each of so many ranks that evaluate one batch; together they give every number once.

    Lines and independent planes are dealt out. A plane with all its pairs is covered by blocks: each pair of
    directions is in one of them at least. The busiest of two ranks then does 0.76 of the work on the exact curvature
    of 64 directions, of three 0.46, of eight 0.21, of 64 0.04. A Gauss-Newton plane costs most in its directions,
    not in its pairs: two ranks gain nothing, three do 0.67 of the work, 64 do 0.19.

    >>> [[task.directions for task in tasks] for tasks in plan(Layout(6, "hessian", "all"), 3)]
    [[[0, 1, 2, 3]], [[0, 1, 4, 5]], [[2, 3, 4, 5]]]
    """
    k = layout.k
    if layout.curvature == "none" or layout.pairs != "all":
        unit = layout.pairs if isinstance(layout.pairs, int) else 1
        shares = [share.tolist() for share in torch.arange(k).reshape(-1, unit).tensor_split(parts)]
        blocks = [[sum(share, [])] if share else [] for share in shares]
        tasks = [[Task(b, torch.ones(len(b), dtype=torch.bool)) for b in own] for own in blocks]
    else:
        blocks = _cheapest_cover(k, parts, layout.curvature)
        tasks = [[] for _ in range(parts)]
        done = torch.zeros(k, k, dtype=torch.bool)
        for n, block in enumerate(blocks):
            inside = torch.zeros(k, k, dtype=torch.bool)
            inside[torch.tensor(block)[:, None], torch.tensor(block)] = True
            slope = ~done.diagonal()[block]
            tasks[n % parts].append(Task(block, slope, inside & ~done))
            done |= inside
    # A rank without work evaluates along one direction all the same: its closure draws random numbers and moves
    # buffers as that of the others does.
    unit = layout.pairs if isinstance(layout.pairs, int) else 1
    nothing = torch.zeros(k, k, dtype=torch.bool)
    idle = Task(list(range(unit)), nothing[0, :unit], nothing if layout.pairs == "all" else None)
    return [own or [idle] for own in tasks]


GROUPS = 13  # as many as directions are dealt into at most: enough for the projective plane of 13 blocks


def _cheapest_cover(k: int, parts: int, curvature: Curvature) -> list[list[int]]:
    """Blocks of directions that hold every pair, at least work for the busiest rank."""

    def cost(size: int, each: int) -> int:  # in forward products of a layer: see docs/how_it_works.md
        return each * ((size + 1) ** 2 if curvature == "hessian" else 1 + 2 * size)

    best, best_cost = [list(range(k))], cost(k, 1)
    for each in (1, 2) if parts > 1 else ():
        for count in range(3, min(k, GROUPS) + 1):
            groups = torch.arange(k).tensor_split(count)
            for size in range(2, count):
                if cost(size * (k // count), each) >= best_cost:
                    break
                blocks = [torch.cat([groups[g] for g in b]).tolist() for b in _cover(count, size, parts * each)]
                worst = cost(max(map(len, blocks)), each) if blocks else best_cost
                if worst < best_cost:
                    best, best_cost = blocks, worst
    return best


def _cover(k: int, size: int, count: int) -> list[list[int]]:
    """At most `count` blocks of `size` of k that hold every pair, or none if this greedy way does not find them."""
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
