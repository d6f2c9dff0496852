"""Tangents that have a structure: formed only where an operator cannot use them as they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from .errors import DTypeError, ShapeError


class Tangents(ABC):
    """K tangents of one tensor, of shape (K, *S) when formed.

    Attributes:
        shape: (K, *S).
        dtype: of the tensor formed.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def formed(self) -> Tensor:
        """The tensor (K, *S), in fresh memory."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Tangents:
        """The same in another dtype."""


@final
class Deferred(Tangents):
    """Tangents that are drawn each time an operator asks for them, and freed after it.

    Args:
        draw: gives the tensor (K, *S).
        like: a tensor of shape S.
        k: number of tangents.
    """

    def __init__(self, draw: Callable[[], Tensor], like: Tensor, k: int, dtype: torch.dtype | None = None) -> None:
        self._draw, self._like = draw, like
        self.shape, self.dtype, self.device = torch.Size((k, *like.shape)), dtype or like.dtype, like.device

    def formed(self) -> Tensor:
        """The tensor (K, *S), drawn."""
        return self._draw().to(self.dtype)

    def to(self, dtype: torch.dtype) -> Deferred:
        """The same in another dtype."""
        return Deferred(self._draw, self._like, self.shape[0], dtype)


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
            raise ShapeError(f"low-rank tangents are of parameters with two dimensions or more, got {tuple(shape)}")
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

    def formed(self) -> Tensor:
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

    def formed(self) -> Tensor:
        """The tensor (K, *S)."""
        return torch.cat([part.formed() if isinstance(part, Tangents) else part for part in self.parts])

    def to(self, dtype: torch.dtype) -> Stacked:
        """The same in another dtype."""
        return Stacked([part.to(dtype) for part in self.parts])
