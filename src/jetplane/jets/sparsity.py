"""First coefficients of which each element has few that are not zero: those of the coordinates that it depends on.

A feature of one particle depends on that particle's coordinates, one of a pair on those of two. Of K coordinate
directions such a feature needs R rows, and integers that say, element for element, which directions they are. The
integers follow from the operators and the shapes alone: structure is exact, never guessed from numbers.

    x of shape (N, d):      R = 1,  directions[0, n, c] = n d + c,  rows = 1
    a layer on x:           R = d,  directions[r, n, 0] = n d + r
    x[:, None] - x[None]:   R = 2,  and R = 2 d behind a layer

Source: the sparse forward Laplacian of folx (Gao, Köhler and Foster, 2023) and LapNet (Li et al., arXiv 2307.08214).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from .structured import Tangents

WORTH = 3  # rows are kept where they are at most K over this: the bookkeeping and merging are paid by then


def _aligned(c: Tensor, ndim: int) -> Tensor:
    """A stack (R, *S) with leading axes of size one, so that S has ``ndim`` axes."""
    missing = ndim + 1 - c.dim()
    return c if missing <= 0 else c.reshape(c.shape[0], *[1] * missing, *c.shape[1:])


def _constant(c: Tensor) -> Tensor:
    """With size one along the axes of the value along which it was expanded."""
    for d in range(1, c.dim()):
        if c.stride(d) == 0 and c.shape[d] > 1:
            c = c.narrow(d, 0, 1)
    return c


def _shared(directions: Tensor) -> Tensor:
    """With size one along axes along which all numbers are the same: a copy is not seen to be expanded."""
    for d in range(1, directions.dim()):
        if directions.shape[d] > 1 and bool((directions == (one := directions.narrow(d, 0, 1))).all()):
            directions = one
    return directions


@final
class Sparse(Tangents):
    """K first coefficients of shape S, of which element e has ``rows[r, e]`` along direction ``directions[r, e]``.

    Args:
        rows: (R, *S).
        directions: integers on the CPU, of a shape that broadcasts to that of the rows: those of an element differ,
            from 0 to K - 1, or are K where the row is zero.
        k: K.

    >>> import torch
    >>> Sparse(torch.tensor([[5.0, 6.0]]), torch.tensor([[0, 2]]), 3).materialized()
    tensor([[5., 0.],
            [0., 0.],
            [0., 6.]])
    """

    def __init__(self, rows: Tensor, directions: Tensor, k: int) -> None:
        self.rows, self.directions = rows, _constant(directions)
        self.shape, self.dtype, self.device = torch.Size((k, *rows.shape[1:])), rows.dtype, rows.device

    @staticmethod
    def axes(like: Tensor, numbers: Tensor, k: int) -> Sparse:
        """The coordinate directions of a tensor.

        Args:
            like: the tensor.
            numbers: which direction each of its elements is, below 0 or from k on for none; broadcasts to its shape.
            k: how many directions there are.
        """
        there = (numbers >= 0) & (numbers < k)
        one = like.new_ones(()) if bool(there.all()) else there.to(like.device, like.dtype)
        return Sparse(one.expand(like.shape)[None], numbers.where((numbers >= 0) & (numbers < k), k)[None], k)

    @property
    def k(self) -> int:
        """How many directions there are."""
        return self.shape[0]

    def with_rows(self, rows: Tensor) -> Sparse:
        """Other rows along the same directions."""
        return Sparse(rows, self.directions, self.k)

    def materialized(self) -> Tensor:
        """The tensor (K, *S); expanded along axes along which nothing changes."""
        rows = _constant(self.rows)
        directions = _aligned(self.directions, rows.dim() - 1).to(rows.device)
        shape = torch.broadcast_shapes(rows.shape, directions.shape)
        rows, directions = rows.expand(shape), directions.expand(shape)
        whole = rows.new_zeros(self.k + 1, *shape[1:]).scatter(0, directions, rows)
        return whole[: self.k].expand(self.shape)

    def to(self, dtype: torch.dtype) -> Sparse:
        """The same in another dtype."""
        return self.with_rows(self.rows.to(dtype))

    def __getitem__(self, directions: slice) -> Tensor:
        """A run of the K, as a tensor."""
        return self.materialized()[directions]

    # --- functions of elements ----------------------------------------------------------------------------

    def moved(self, on_stack: Callable[[Tensor], Tensor]) -> Sparse:
        """A function that moves, repeats and picks elements of a stack (n, *S)."""
        rows = on_stack(self.rows)
        directions = on_stack(_aligned(self.directions, self.rows.dim() - 1).expand(self.rows.shape))
        return Sparse(rows, _shared(_constant(directions)), self.k)

    def same(self, other: Sparse) -> bool:
        """Whether both have the same directions in the same rows."""
        a, b = self.directions, other.directions
        if a is b:
            return True
        ndim = max(a.dim(), b.dim()) - 1
        return torch.equal(_aligned(a, ndim), _aligned(b, ndim))

    def plus(self, other: Sparse, alpha: float = 1) -> Sparse | None:
        """``self + alpha other``; None where that has too many rows to pay."""
        ndim = max(self.rows.dim(), other.rows.dim()) - 1
        a, b = _aligned(self.rows, ndim), _aligned(other.rows, ndim)
        of_a, of_b = _aligned(self.directions, ndim), _aligned(other.directions, ndim)
        if self.same(other):
            return Sparse(torch.add(a, b, alpha=alpha), of_a, self.k)
        if (len(a) + len(b)) * WORTH > self.k:
            return None
        ours, theirs = list(a.unbind()), list((b * alpha if alpha != 1 else b).unbind())
        of_b = of_b.expand(len(of_b), *torch.broadcast_shapes(of_a.shape[1:], of_b.shape[1:])).clone()
        for m in range(len(theirs)):
            for n in range(len(ours)):
                equal = (of_a[n] == of_b[m]) & (of_b[m] < self.k)
                if bool(equal.any()):
                    shared = equal.to(b.device)
                    ours[n], theirs[m] = ours[n] + theirs[m] * shared, theirs[m] * ~shared
                    of_b[m][equal] = self.k
        shape = torch.broadcast_shapes(a.shape[1:], b.shape[1:])
        rows = torch.stack([row.expand(shape) for row in (*ours, *theirs)])
        return Sparse(rows, torch.cat([of_a.expand(len(of_a), *of_b.shape[1:]), of_b]), self.k)

    # --- functions that mix elements ----------------------------------------------------------------------

    def gathered(self, dims: Sequence[int]) -> Sparse | None:
        """With the same directions along some axes of the value, so that these can be mixed; None where too many are.

        Args:
            dims: negative numbers, counted from the last axis of the value.
        """
        found = self
        for d in dims:
            directions = _aligned(found.directions, found.rows.dim() - 1)
            if directions.shape[d] == 1:
                continue
            candidates = directions.movedim(d, 1).flatten(0, 1)  # (R m, *others), those along the axis
            ordered = candidates.sort(0).values
            new = ordered < self.k
            new[1:] &= ordered[1:] != ordered[:-1]
            count = max(int(new.sum(0).max()), 1) if new.numel() else 1
            if count * WORTH > self.k:
                return None
            place = (new.cumsum(0) - 1).where(ordered < self.k, count)  # of each direction among those of its element
            union = torch.full((count + 1, *ordered.shape[1:]), self.k).scatter(0, place, ordered)[:count]
            union = union.unsqueeze(d if d < -1 else union.dim())
            rows = []
            for wanted in union.unbind():
                there = zip(found.rows, (directions == wanted) & (wanted < self.k), strict=True)
                terms = [row * is_this.to(row.device) for row, is_this in there]
                rows.append(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
            found = Sparse(torch.stack(rows), union, self.k)
        return found

    def summed(self, dims: Sequence[int]) -> Tensor | Sparse:
        """The sum over some axes of the value (negative numbers), which stay with size one."""
        within = self.gathered(dims)
        if within is not None:
            return within.with_rows(within.rows.sum(list(dims), keepdim=True))
        ndim = self.rows.dim() - 1
        axes = sorted(d % ndim + 1 for d in dims)
        directions = _aligned(self.directions, ndim)
        sizes = zip(self.rows.shape, directions.shape, strict=True)
        directions = directions.expand([n if d in axes else m for d, (n, m) in enumerate(sizes)])

        def terms(c: Tensor) -> Tensor:  # of one sum, one behind the other
            moved = c.movedim(axes, list(range(1, len(axes) + 1))).flatten(0, len(axes))
            return moved.reshape(len(moved), *(1 if d + 1 in axes else n for d, n in enumerate(c.shape[1:])))

        rows = terms(self.rows)
        numbers = terms(directions).to(rows.device).expand(rows.shape)
        return rows.new_zeros(self.k + 1, *rows.shape[1:]).scatter_add(0, numbers, rows)[: self.k]

    def inner(self, other: Sparse) -> Tensor:
        """``sum_k a_k b_k`` at each element, (1, *S)."""
        ndim = max(self.rows.dim(), other.rows.dim()) - 1
        a, b = _aligned(self.rows, ndim), _aligned(other.rows, ndim)
        total: Tensor | None = None
        if self.same(other):
            total = a[:1] * b[:1]
            for n in range(1, len(a)):
                total = torch.addcmul(total, a[n : n + 1], b[n : n + 1])
            return total
        of_a, of_b = _aligned(self.directions, ndim), _aligned(other.directions, ndim)
        for n in range(len(a)):
            for m in range(len(b)):
                equal = (of_a[n : n + 1] == of_b[m : m + 1]) & (of_a[n : n + 1] < self.k)
                if bool(equal.any()):
                    term = a[n : n + 1] * b[m : m + 1] * equal.to(a.device)
                    total = term if total is None else total + term
        shape = torch.broadcast_shapes(a[:1].shape, b[:1].shape)
        return a.new_zeros(()).expand(shape) if total is None else total.expand(shape)

    @staticmethod
    def joined(parts: Sequence[Sparse | int], shape: Sequence[int], dim: int = -1) -> Sparse | None:
        """Values side by side along an axis; None where that has too many rows to pay.

        Args:
            parts: of each value, or its size along the axis where it has none.
            shape: of the result.
            dim: the axis, counted from the last one: a negative number.
        """
        some = [part for part in parts if isinstance(part, Sparse)]
        k, count, one = some[0].k, max(len(part.rows) for part in some), some[0].rows
        if count * WORTH > k:
            return None
        axis = len(shape) + dim
        none = torch.full([1] * one.dim(), k)
        rows, numbers = [], []
        for part in parts:
            if isinstance(part, int):
                part = Sparse(one.new_zeros(()).expand(1, *shape[:axis], part, *shape[axis + 1 :]), none, k)
            missing = count - len(part.rows)
            of = _aligned(part.directions, len(shape))
            rows.append(torch.cat([part.rows, part.rows.new_zeros(()).expand(missing, *part.rows.shape[1:])]))
            numbers.append(torch.cat([of, none.expand(missing, *of.shape[1:])]))
        lead = list(torch.broadcast_shapes(*((*of.shape[:dim], 1, *of.shape[axis + 2 :]) for of in numbers)))
        for n, row in enumerate(rows):
            lead[dim] = row.shape[dim]
            numbers[n] = numbers[n].expand(lead)
        return Sparse(torch.cat(rows, dim), _shared(torch.cat(numbers, dim)), k)
