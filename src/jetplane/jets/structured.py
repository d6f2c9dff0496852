"""Tangents that have a structure: materialized only where an operator cannot use them as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from ..errors import DTypeError, ShapeError


class Tangents:  # no ABC, of which each isinstance() takes five times as long: an evaluation asks a hundred times
    """K tangents of one tensor, of shape (K, *S) when materialized; abstract.

    Attributes:
        shape: (K, *S).
        dtype: of the materialized tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def materialized(self) -> Tensor:
        """The tensor (K, *S), in fresh memory."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Tangents:
        """The same in another dtype."""
        raise NotImplementedError

    def __getitem__(self, directions: slice) -> Tensor | Tangents:
        """A run of the K."""
        raise NotImplementedError


@final
class Deferred(Tangents):
    """Tangents that are drawn each time an operator asks for them, and freed after it.

    Args:
        draw: gives the directions of a slice, as a tensor (their number, *S).
        like: a tensor of shape S.
        k: number of tangents there are.
        run: which of them these are.
    """

    def __init__(
        self,
        draw: Callable[[slice], Tensor],
        like: Tensor,
        k: int,
        dtype: torch.dtype | None = None,
        run: slice = slice(None),
    ) -> None:
        self._draw, self._like, self._k, self._run = draw, like, k, run
        self.shape = torch.Size((len(range(k)[run]), *like.shape))
        self.dtype, self.device = dtype or like.dtype, like.device

    def materialized(self) -> Tensor:
        """The tensor (K, *S), drawn."""
        return self._draw(self._run).to(self.dtype)

    def to(self, dtype: torch.dtype) -> Deferred:
        """The same in another dtype."""
        return Deferred(self._draw, self._like, self._k, dtype, self._run)

    def __getitem__(self, directions: slice) -> Deferred:
        """A run of them, drawn when it is asked for."""
        some = range(self._k)[self._run][directions]
        return Deferred(self._draw, self._like, self._k, self.dtype, slice(some.start, some.stop))


@final
class LowRank(Tangents):
    """K tangents of low rank: ``v_k = sum_r left[k, r] right[k, r]^T``, read as a matrix (S[0], everything else).

    `torch.nn.functional.linear`, matrix products, convolutions and embeddings use the factors alone: a product
    with ``v_k`` is one with ``right`` and one with ``left``, so its cost does not grow with the size of the
    weight. Other operators form the tensor.

    Args:
        left: shape (K, r, S[0]).
        right: shape (K, r, columns), ``columns`` being the product of S[1:].
        shape: S, the shape of the parameter: two dimensions or more.

    Raises:
        ShapeError, DTypeError: factors that do not belong together or to the shape.

    >>> import torch, jetplane as jp
    >>> w, x = torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0])
    >>> v = jp.LowRank(torch.ones(1, 1, 2), torch.ones(1, 1, 3), w.shape)
    >>> jp.evaluate(lambda: (w @ x).square().sum(), [w], [v]).slope
    tensor([144.])
    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
        shape = torch.Size(shape)
        if len(shape) < 2:
            raise ShapeError(
                f"low-rank tangents need a parameter with two dimensions or more, got shape {tuple(shape)}"
            )
        rows, columns = shape[0], math.prod(shape[1:])
        k, r = left.shape[:2] if left.dim() == 3 else (-1, -1)
        if left.shape != (k, r, rows) or right.shape != (k, r, columns):
            raise ShapeError(
                f"low-rank tangents of a parameter {tuple(shape)}: expected factors (K, r, {rows}) and "
                f"(K, r, {columns}), got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        if left.dtype != right.dtype:
            raise DTypeError(f"low-rank factors must be of one dtype, got {left.dtype} and {right.dtype}")
        self.left, self.right = left, right
        self.shape, self.dtype, self.device = torch.Size((k, *shape)), left.dtype, left.device

    def materialized(self) -> Tensor:
        """The tensor (K, *S)."""
        return torch.bmm(self.left.mT, self.right).reshape(self.shape)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same in another dtype."""
        return LowRank(self.left.to(dtype), self.right.to(dtype), self.shape[1:])

    def weighted(self, weights: Tensor) -> Tensor:
        """``sum_k weights[k] v_k``, of shape S, in the dtype of the weights."""
        left = self.left.to(weights.dtype) * weights[:, None, None]
        return (left.flatten(0, 1).mT @ self.right.to(weights.dtype).flatten(0, 1)).reshape(self.shape[1:])

    def transposed(self) -> LowRank:
        """The tangents of the transposed parameter, which must be a matrix."""
        return LowRank(self.right, self.left, self.shape[:0:-1])

    def __getitem__(self, directions: slice) -> LowRank:
        """Some of the K."""
        return LowRank(self.left[directions], self.right[directions], self.shape[1:])


@final
class Stacked(Tangents):
    """Tangents of several kinds, one behind the other: given ones beside low-rank ones, say.

    Args:
        parts: tensors (K_n, *S) or `Tangents`; at least one.
    """

    def __init__(self, parts: Sequence[Tensor | Tangents]) -> None:
        self.parts = list(parts)
        one = self.parts[0]
        k = sum(part.shape[0] for part in self.parts)
        self.shape, self.dtype, self.device = torch.Size((k, *one.shape[1:])), one.dtype, one.device

    def materialized(self) -> Tensor:
        """The tensor (K, *S)."""
        return torch.cat([part.materialized() if isinstance(part, Tangents) else part for part in self.parts])

    def to(self, dtype: torch.dtype) -> Stacked:
        """The same in another dtype."""
        return Stacked([part.to(dtype) for part in self.parts])

    def __getitem__(self, directions: slice) -> Tensor | Tangents:
        """A run of them, of those parts that it reaches into."""
        wanted, found, start = range(self.shape[0])[directions], [], 0
        for part in self.parts:
            first, last = max(wanted.start - start, 0), min(wanted.stop - start, part.shape[0])
            if first < last:
                found.append(part[first:last])
            start += part.shape[0]
        return found[0] if len(found) == 1 else Stacked(found)


@final
class Axes(Tangents):
    """K coordinate directions of points (points, D), the same for all of them: products with a matrix pick its columns.

    Args:
        numbers: which coordinates, K of them.
        like: the points.

    >>> import torch
    >>> Axes([2, 0], torch.ones(1, 3)).materialized()
    tensor([[[0., 0., 1.]],
    <BLANKLINE>
            [[1., 0., 0.]]])
    """

    def __init__(self, numbers: Sequence[int], like: Tensor) -> None:
        self.numbers, self.shape = list(numbers), torch.Size((len(numbers), *like.shape))
        self.dtype, self.device = like.dtype, like.device

    def materialized(self) -> Tensor:
        """The tensor (K, points, D), expanded over the points."""
        k, points, d = self.shape
        stack = torch.zeros(k, d, dtype=self.dtype, device=self.device)
        stack[range(k), self.numbers] = 1
        return stack.unsqueeze(1).expand(k, points, d)

    def times(self, weight: Tensor) -> Tensor:
        """Products with the transpose of a matrix (outputs, D), (K, points, outputs), expanded over the points."""
        columns = weight[:, torch.tensor(self.numbers, device=weight.device)].t().to(self.dtype).contiguous()
        return columns.unsqueeze(1).expand(-1, self.shape[1], -1)

    def to(self, dtype: torch.dtype) -> Axes:
        """The same in another dtype."""
        found = self[:]
        found.dtype = dtype
        return found

    def __getitem__(self, directions: slice) -> Axes:
        """A run of the K."""
        found = Axes(self.numbers[directions], torch.empty((), dtype=self.dtype, device=self.device))
        found.shape = torch.Size((len(found.numbers), *self.shape[1:]))
        return found


@final
class Partial(Tangents):
    """K tangents of which only some are there; the others are zero and cost nothing.

    Args:
        k: number of tangents.
        rows: which of them are there, ascending.
        tangents: those, a tensor (len(rows), *S) or `Tangents`.

    Raises:
        ShapeError: the rows are not as many as the tangents, not ascending, or not below k.

    >>> import torch
    >>> Partial(3, (1,), torch.ones(1, 2)).materialized()
    tensor([[0., 0.],
            [1., 1.],
            [0., 0.]])
    """

    def __init__(self, k: int, rows: Sequence[int], tangents: Tensor | Tangents) -> None:
        rows = tuple(rows)
        if len(rows) != tangents.shape[0] or list(rows) != sorted(set(rows)) or not all(0 <= r < k for r in rows):
            raise ShapeError(
                f"partial tangents: expected ascending rows below k = {k}, one for each of {tangents.shape[0]} "
                f"tangents, got {rows}"
            )
        self.rows, self.tangents = rows, tangents
        self.shape, self.dtype, self.device = torch.Size((k, *tangents.shape[1:])), tangents.dtype, tangents.device

    def materialized(self) -> Tensor:
        """The tensor (K, *S), with its zeros."""
        held = self.tangents.materialized() if isinstance(self.tangents, Tangents) else self.tangents
        whole = held.new_zeros(self.shape)
        whole[torch.tensor(self.rows, dtype=torch.long, device=held.device)] = held
        return whole

    def to(self, dtype: torch.dtype) -> Partial:
        """The same in another dtype."""
        return Partial(self.shape[0], self.rows, self.tangents.to(dtype))

    def __getitem__(self, directions: slice) -> Partial:
        """A run of the K."""
        wanted = range(self.shape[0])[directions]
        places = [n for n, row in enumerate(self.rows) if row in wanted]
        run = slice(places[0], places[-1] + 1) if places else slice(0, 0)
        return Partial(len(wanted), [self.rows[n] - wanted.start for n in places], self.tangents[run])
