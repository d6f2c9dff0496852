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

WORTH = 2  # rows are kept where they are at most K over this: the bookkeeping and merging are paid by then


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


@final
class Sparse(Tangents):
    """K first coefficients of shape S, of which element e has ``rows[r, e]`` along direction ``directions[r, e]``.

    Where an element has two rows for one direction, one of them is zero.

    Args:
        rows: (R, *S).
        directions: integers from 0 to K - 1 on the CPU, of a shape that broadcasts to that of the rows.
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
        return Sparse(one.expand(like.shape)[None], numbers.clamp(0, k - 1)[None], k)

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
        whole = rows.new_zeros(self.k, *shape[1:]).scatter_add(0, directions, rows)
        return whole.expand(self.shape)

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
        return Sparse(rows, directions, self.k)

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
        for m in range(len(theirs)):
            for n in range(len(ours)):
                equal = of_a[n] == of_b[m]
                if bool(equal.any()):
                    shared = equal.to(b.device)
                    ours[n], theirs[m] = ours[n] + theirs[m] * shared, theirs[m] * ~shared
        shape = torch.broadcast_shapes(a.shape[1:], b.shape[1:])
        numbers = torch.broadcast_shapes(of_a.shape[1:], of_b.shape[1:])
        rows = torch.stack([row.expand(shape) for row in (*ours, *theirs)])
        directions = torch.cat([of.expand(len(of), *numbers) for of in (of_a, of_b)])
        return Sparse(rows, directions, self.k)

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
            new = torch.ones_like(ordered, dtype=torch.bool)
            new[1:] = ordered[1:] != ordered[:-1]
            place = new.cumsum(0) - 1
            count = int(place.max()) + 1
            if count * WORTH > self.k:
                return None
            union = torch.full((count, *ordered.shape[1:]), -1, dtype=ordered.dtype)
            union.scatter_(0, place, ordered)
            union = union.unsqueeze(d if d < -1 else union.dim())
            rows = []
            for wanted in union.unbind():
                terms = [row * (of == wanted).to(row.device) for row, of in zip(found.rows, directions, strict=True)]
                rows.append(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
            found = Sparse(torch.stack(rows), union.clamp(min=0), self.k)
        return found

    def summed(self, dims: Sequence[int]) -> Tensor | Sparse:
        """The sum over some axes of the value (negative numbers), which stay with size one."""
        within = self.gathered(dims)
        if within is not None:
            return within.with_rows(within.rows.sum(list(dims), keepdim=True))
        directions = _aligned(self.directions, self.rows.dim() - 1)
        positive = sorted(d % (self.rows.dim() - 1) for d in dims)
        if any(directions.shape[d + 1] > 1 for d in range(self.rows.dim() - 1) if d not in positive):
            return self.materialized().sum(list(dims), keepdim=True)
        kept = [1 if d in positive else n for d, n in enumerate(self.rows.shape[1:])]
        total = self.rows.new_zeros(self.k, *kept)
        last = range(1, len(positive) + 1)
        for row, of in zip(self.rows, directions, strict=True):
            of = of.expand([n if d in positive else 1 for d, n in enumerate(row.shape)]).flatten().to(row.device)
            along = row.movedim(positive, [n - 1 for n in last]).flatten(0, len(positive) - 1)
            total = total.index_add(0, of, along.reshape(-1, *kept))
        return total

    def inner(self, other: Sparse) -> Tensor | None:
        """``sum_k a_k b_k`` at each element, (1, *S); None where the directions differ."""
        if not self.same(other):
            return None
        ndim = max(self.rows.dim(), other.rows.dim()) - 1
        a, b = _aligned(self.rows, ndim), _aligned(other.rows, ndim)
        total = a[:1] * b[:1]
        for n in range(1, len(a)):
            total = torch.addcmul(total, a[n : n + 1], b[n : n + 1])
        return total

    @staticmethod
    def joined(parts: Sequence[Sparse], dim: int) -> Sparse | None:
        """Values side by side along an axis (a negative number); None where that has too many rows to pay."""
        k, count = parts[0].k, max(len(part.rows) for part in parts)
        if count * WORTH > k:
            return None
        stacks = []
        for part in parts:
            missing = count - len(part.rows)
            directions = _aligned(part.directions, part.rows.dim() - 1)
            pad = (0, 0) * (part.rows.dim() - 1) + (0, missing)
            rows = torch.nn.functional.pad(part.rows, pad) if missing else part.rows
            stacks.append((rows, torch.cat([directions, directions[:1].expand(missing, *directions.shape[1:])])))
        outer = torch.broadcast_shapes(
            *(of.movedim(dim, -1)[..., :1].movedim(-1, dim).shape[1:] for _, of in stacks)
        )
        numbers = []
        for rows, of in stacks:
            shape = [*outer]
            shape[dim] = rows.shape[dim]
            numbers.append(of.expand(count, *shape))
        return Sparse(torch.cat([rows for rows, _ in stacks], dim), torch.cat(numbers, dim), k)


