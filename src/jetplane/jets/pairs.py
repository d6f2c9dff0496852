"""Which second coefficients are kept: structures of pairs of directions.

A structure of K directions has ``count`` second coefficients. Coefficient n is a sum over pairs of directions,

    x_n = sum over (i, j, w) in term n of  w x_ij,

mostly of one pair alone. What enters it from first coefficients is therefore ``sum w a_i b_j`` (`outer`), or
``sum w (a_i b_j + a_j b_i)`` (`symmetric`). Operators are written in these two and know no structure by name.

| structure | second coefficients | for |
|---|---|---|
| `AllPairs` | ``x_ij``, i <= j | planes, Hessians |
| `Diagonal` | ``x_ii`` | curvature along lines |
| `Planes` | ``x_ij`` within blocks of directions | independent planes |
| `Star` | ``x_iv`` with the last direction v | products with a Hessian |
| `Sums` | ``sum_i w_i x_ii`` for each group of directions | Laplacians: collapsed Taylor mode, arXiv 2505.13644 |
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements of sums of products that are held at a time: they fit into the cache
FEW = 8  # directions in a block below which they are added one by one


class Term(NamedTuple):
    """One pair of directions in a second coefficient: coefficient n has ``weight * x_ij`` in it."""

    n: int
    i: int
    j: int
    weight: float


class PairStructure(ABC):
    """Which second coefficients of K directions are kept.

    Attributes:
        k: number of directions.
        count: number of second coefficients.
    """

    k: int
    on_diagonal = False  # whether every pair is of a direction with itself
    is_trace = False  # whether there is one coefficient, the sum of all pairs of a direction with itself
    single = True  # whether every coefficient is one pair, of weight one

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of second coefficients."""

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Plain numbers from which `structure_of` makes an equal structure: what a compiler may hold."""

    @abstractmethod
    def terms(self) -> Sequence[Term]:
        """All pairs of all coefficients, in the order of coefficients."""

    @property
    def blocks(self) -> list[slice]:
        """Runs of directions that meet each other alone."""
        return [slice(i, i + 1) for i in range(self.k)] if self.on_diagonal else [slice(0, self.k)]

    @abstractmethod
    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """``sum w a_i b_j`` for each coefficient: (K, *S) and (K, *S), up to broadcasting, to (count, *S)."""

    @abstractmethod
    def add_outer(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        """Add `outer` to ``into`` in place."""

    @abstractmethod
    def write_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Write `outer` to ``out``."""

    def symmetric(self, a: Tensor, b: Tensor) -> Tensor:
        """``sum w (a_i b_j + a_j b_i)`` for each coefficient."""
        return self.outer(a, b) + self.outer(b, a)

    @abstractmethod
    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        """`outer` summed over all elements, (count,): for a and b of shape (K, n) with ``a_i . b_j = a_j . b_i``."""

    @abstractmethod
    def restricted(self, rows: Sequence[int]) -> tuple[PairStructure, tuple[int, ...]] | None:
        """The structure of some of the directions, and which of the coefficients it has; None if it has none."""

    @abstractmethod
    def matrix(self, second: Tensor) -> Tensor:
        """Second coefficients (count, *S) as the caller of an evaluation gets them."""


class _Pairs(PairStructure):
    """Structures whose coefficients are single pairs, in rows: one direction with a run of others."""

    @functools.cached_property
    def rows(self) -> list[tuple[int, slice, slice]]:
        """Direction i, a run of directions j, and where the pairs of i with them are."""
        raise NotImplementedError

    def terms(self) -> Sequence[Term]:
        return [
            Term(n, i, j, 1.0)
            for i, others, place in self.rows
            for n, j in zip(range(place.start, place.stop), range(others.start, others.stop), strict=True)
        ]

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[i : i + 1] * b[others] for i, others, _ in self.rows])

    def write_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        for i, others, place in self.rows:
            torch.mul(a[i : i + 1], b[others], out=out[place])

    def add_outer(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        for i, others, place in self.rows:
            into[place].addcmul_(a[i : i + 1], b[others])

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        products = a @ b.mT
        return torch.cat([products[i, others] for i, others, _ in self.rows])

    def restricted(self, rows: Sequence[int]) -> tuple[PairStructure, tuple[int, ...]] | None:
        place = {direction: n for n, direction in enumerate(rows)}
        kept = [t for t in self.terms() if t.i in place and t.j in place]
        if not kept:
            return None
        return Listed(len(rows), tuple((place[t.i], place[t.j]) for t in kept)), tuple(t.n for t in kept)


@dataclass(frozen=True)
class AllPairs(_Pairs):
    """``x_ij`` for all i <= j.

    >>> import torch
    >>> a = torch.tensor([[1.0], [2.0]])
    >>> AllPairs(2).outer(a, a).flatten()
    tensor([1., 2., 4.])
    """

    k: int

    @property
    def count(self) -> int:
        return self.k * (self.k + 1) // 2

    @property
    def key(self) -> tuple[Any, ...]:
        return "all", self.k

    @functools.cached_property
    def rows(self) -> list[tuple[int, slice, slice]]:
        starts = [i * self.k - i * (i - 1) // 2 for i in range(self.k + 1)]
        return [(i, slice(i, self.k), slice(starts[i], starts[i + 1])) for i in range(self.k)]

    def restricted(self, rows: Sequence[int]) -> tuple[PairStructure, tuple[int, ...]] | None:
        starts = [i * self.k - i * (i - 1) // 2 - i for i in range(self.k)]
        return AllPairs(len(rows)), tuple(starts[i] + j for n, i in enumerate(rows) for j in rows[n:])

    def matrix(self, second: Tensor) -> Tensor:
        """The symmetric matrix (K, K, *S)."""
        i = torch.arange(self.k, device=second.device)
        low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
        return second[low * (2 * self.k - 1 - low) // 2 + high]


@dataclass(frozen=True)
class Listed(_Pairs):
    """Any list of pairs: what is left of other structures where only some directions are there."""

    k: int
    pairs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return len(self.pairs)

    @property
    def key(self) -> tuple[Any, ...]:
        return "listed", self.k, self.pairs

    @functools.cached_property
    def rows(self) -> list[tuple[int, slice, slice]]:
        return [(i, slice(j, j + 1), slice(n, n + 1)) for n, (i, j) in enumerate(self.pairs)]

    def matrix(self, second: Tensor) -> Tensor:
        """One entry for each pair, as they are listed."""
        return second


@dataclass(frozen=True)
class Star(_Pairs):
    """``x_iv`` for all directions i before the last one, v: K - 1 second coefficients.

    >>> import torch
    >>> a = torch.tensor([[1.0], [2.0], [10.0]])
    >>> Star(3).outer(a, a).flatten()
    tensor([10., 20.])
    """

    k: int

    @property
    def count(self) -> int:
        return self.k - 1

    @property
    def key(self) -> tuple[Any, ...]:
        return "star", self.k

    @functools.cached_property
    def rows(self) -> list[tuple[int, slice, slice]]:
        return [(self.k - 1, slice(0, self.k - 1), slice(0, self.k - 1))]

    def restricted(self, rows: Sequence[int]) -> tuple[PairStructure, tuple[int, ...]] | None:
        return (Star(len(rows)), tuple(rows[:-1])) if len(rows) > 1 and rows[-1] == self.k - 1 else None

    def matrix(self, second: Tensor) -> Tensor:
        """(K - 1, *S): the pairs in the order of their directions."""
        return second


@dataclass(frozen=True)
class Planes(_Pairs):
    """``x_ij``, i <= j, within each of the consecutive blocks of ``size`` directions."""

    k: int
    size: int

    @property
    def count(self) -> int:
        return self.k // self.size * self._plane.count

    @property
    def key(self) -> tuple[Any, ...]:
        return "planes", self.k, self.size

    @property
    def _plane(self) -> AllPairs:
        return AllPairs(self.size)

    @functools.cached_property
    def rows(self) -> list[tuple[int, slice, slice]]:
        inner, count = self._plane.rows, self._plane.count
        return [
            (b + i, slice(b + others.start, b + others.stop), slice(n + place.start, n + place.stop))
            for b, n in zip(range(0, self.k, self.size), range(0, self.k * count, count), strict=False)
            for i, others, place in inner
        ]

    @property
    def blocks(self) -> list[slice]:
        return [slice(b, b + self.size) for b in range(0, self.k, self.size)]

    def _apart(self, c: Tensor) -> Tensor:
        """Directions or pairs of each plane along the second axis."""
        return c.unflatten(0, (self.k // self.size, -1))

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self._apart(a), self._apart(b)
        return torch.cat([a[:, i : i + 1] * b[:, others] for i, others, _ in self._plane.rows], 1).flatten(0, 1)

    def write_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out, a, b = self._apart(out), self._apart(a), self._apart(b)
        for i, others, place in self._plane.rows:
            torch.mul(a[:, i : i + 1], b[:, others], out=out[:, place])

    def add_outer(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        into, a, b = self._apart(into), self._apart(a), self._apart(b)
        for i, others, place in self._plane.rows:
            into[:, place].addcmul_(a[:, i : i + 1], b[:, others])

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        products = self._apart(a) @ self._apart(b).mT
        return torch.cat([products[:, i, others] for i, others, _ in self._plane.rows], 1).flatten()

    def matrix(self, second: Tensor) -> Tensor:
        """A symmetric matrix for each plane, (planes, size, size, *S)."""
        return self._plane.matrix(self._apart(second).transpose(0, 1)).movedim(2, 0)


@dataclass(frozen=True)
class Diagonal(PairStructure):
    """``x_ii`` for each direction."""

    k: int

    on_diagonal = True

    @property
    def count(self) -> int:
        return self.k

    @property
    def key(self) -> tuple[Any, ...]:
        return "diagonal", self.k

    def terms(self) -> Sequence[Term]:
        return [Term(i, i, i, 1.0) for i in range(self.k)]

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def write_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        torch.mul(a, b, out=out)

    def add_outer(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        into.addcmul_(a, b)

    def symmetric(self, a: Tensor, b: Tensor) -> Tensor:
        return 2 * (a * b)

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)

    def restricted(self, rows: Sequence[int]) -> tuple[PairStructure, tuple[int, ...]] | None:
        return Diagonal(len(rows)), tuple(rows)

    def matrix(self, second: Tensor) -> Tensor:
        """(K, *S)."""
        return second


@dataclass(frozen=True)
class Sums(PairStructure):
    """``sum_i w_i x_ii`` over each group of directions, as one second coefficient for a group.

    Attributes:
        groups: for each group its directions and their weights.

    >>> import torch
    >>> a = torch.tensor([[1.0], [2.0], [3.0]])
    >>> Sums.trace(3).outer(a, a)
    tensor([[14.]])
    """

    k: int
    groups: tuple[tuple[tuple[int, float], ...], ...]

    on_diagonal = True
    single = False

    @staticmethod
    def trace(k: int, weights: Sequence[float] | None = None) -> Sums:
        """One group of all directions: a Laplacian, with weights one by default."""
        return Sums(k, (tuple((i, 1.0 if weights is None else float(weights[i])) for i in range(k)),))

    @property
    def count(self) -> int:
        return len(self.groups)

    @property
    def key(self) -> tuple[Any, ...]:
        return "sums", self.k, self.groups

    def terms(self) -> Sequence[Term]:
        return self._terms

    @functools.cached_property
    def _terms(self) -> list[Term]:
        return [Term(n, i, i, w) for n, group in enumerate(self.groups) for i, w in group]

    def _weights(self, like: Tensor) -> Tensor:
        weights = torch.zeros(self.count, self.k, dtype=like.dtype, device=like.device)
        for n, i, _, w in self.terms():
            weights[n, i] = w
        return weights

    @functools.cached_property
    def is_trace(self) -> bool:  # type: ignore[override]
        """Whether there is one group, of all directions with weight one."""
        return self.groups == (tuple((i, 1.0) for i in range(self.k)),)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        products = a * b
        return products.sum(0, keepdim=True) if self.is_trace else torch.tensordot(self._weights(products), products, 1)

    def write_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        self.add_outer(out.zero_(), a, b)

    def add_outer(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        size = into[:1].numel()
        if size * self.k <= BLOCK:  # so small that calls would cost more than memory
            into.add_(self.outer(a, b))
        elif self.is_trace and size * FEW <= BLOCK and len(a) == len(b) == self.k:
            step = BLOCK // size
            for start in range(0, self.k, step):
                run = slice(start, start + step)
                into.add_((a[run] * b[run]).sum(0, keepdim=True))
        elif size > BLOCK and all(c.is_contiguous() and c.shape[1:] == into.shape[1:] for c in (into, a, b)):
            into, a, b = into.view(-1, size), a.view(-1, size), b.view(-1, size)
            for start in range(0, size, BLOCK):
                self._add(*(c[:, start : start + BLOCK] for c in (into, a, b)))
        else:
            self._add(into, a, b)

    def _add(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        for n, i, _, w in self.terms():
            into[n].addcmul_(a[i if len(a) > 1 else 0], b[i if len(b) > 1 else 0], value=w)

    def symmetric(self, a: Tensor, b: Tensor) -> Tensor:
        return 2 * self.outer(a, b)

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        return self._weights(a) @ (a * b).sum(1)

    def restricted(self, rows: Sequence[int]) -> tuple[PairStructure, tuple[int, ...]] | None:
        place = {direction: n for n, direction in enumerate(rows)}
        groups = [tuple((place[i], w) for i, w in group if i in place) for group in self.groups]
        kept = tuple(n for n, group in enumerate(groups) if group)
        return (Sums(len(rows), tuple(groups[n] for n in kept)), kept) if kept else None

    def matrix(self, second: Tensor) -> Tensor:
        """(groups, *S)."""
        return second


_KINDS: dict[str, Callable[..., PairStructure]] = {
    "all": AllPairs, "diagonal": Diagonal, "planes": Planes, "star": Star, "sums": Sums, "listed": Listed,
}  # fmt: skip


def structure_of(key: tuple[Any, ...]) -> PairStructure:
    """The structure with this `PairStructure.key`."""
    return _KINDS[key[0]](*key[1:])
