"""What is evaluated on a plane: how many directions, which second derivatives, and how many directions at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..jets import AllPairs, Diagonal, PairStructure, Planes

Curvature = Literal["hessian", "ggn", "none"]
Pairs = Literal["all", "diagonal"] | int
Chunk = int | Literal["auto"] | None


@dataclass(frozen=True)
class PlaneSpec:
    """The specification of a plane: what `jetplane.evaluate` computes, apart from where and on which directions.

    Attributes:
        k: number of directions.
        curvature: "hessian", "ggn" or "none".
        pairs: "all" pairs of directions, the "diagonal", or an int b for independent planes of b consecutive
            directions each.
        examples: whether each example's part of the slope is computed as well.
        chunk: directions carried at a time; None for all of them, "auto" for as many as ``memory`` allows.
        memory: bytes for "auto"; None for half of what is free.
        penalties: whether "ggn" has the curvature of functions of the parameters alone, too.

    Raises:
        ArgumentError: k < 1, pairs that do not divide k, a chunk that cannot be evaluated, an unknown word.

    >>> PlaneSpec(6, pairs=3).curvature_shape
    (2, 3, 3)
    """

    k: int
    curvature: Curvature = "hessian"
    pairs: Pairs = "all"
    examples: bool = False
    chunk: Chunk = None
    memory: int | None = None
    penalties: bool = True

    def __post_init__(self) -> None:
        k, pairs, chunk = self.k, self.pairs, self.chunk
        if self.curvature not in ("hessian", "ggn", "none"):
            raise ArgumentError(f"curvature must be 'hessian', 'ggn' or 'none', got {self.curvature!r}")
        if k < 1:
            raise ArgumentError(f"k must be at least 1: a plane has at least one direction, got {k}")
        whole = isinstance(pairs, int) and not isinstance(pairs, bool)
        if pairs not in ("all", "diagonal") and not (whole and pairs >= 1 and k % pairs == 0):  # type: ignore[operator]
            raise ArgumentError(f"pairs must be 'all', 'diagonal' or a divisor of k = {k}, got {pairs!r}")
        if self.memory is not None and (type(self.memory) is not int or self.memory < 1):
            raise ArgumentError(f"memory must be a number of bytes or None, got {self.memory!r}")
        if chunk is None or chunk == "auto":
            return
        crossed = self.crossed and not self.gauss_newton
        block = 1 if self.crossed else self.block
        least = min(2 if crossed else block, k)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < least:
            raise ArgumentError(f"chunk must be 'auto' or an integer of at least {least} here, got {chunk!r}")
        if not crossed and chunk < k and chunk % block:
            raise ArgumentError(f"chunk must be a multiple of the {block} directions of a plane, got {chunk}")

    @property
    def order(self) -> int:
        """The order up to which every operator is differentiated: 2 for exact curvature, else 1."""
        return 2 if self.curvature == "hessian" else 1

    @property
    def gauss_newton(self) -> bool:
        """Whether loss functions alone are differentiated twice."""
        return self.curvature == "ggn"

    @property
    def crossed(self) -> bool:
        """Whether there is a second derivative for every two directions."""
        return self.curvature != "none" and self.pairs == "all"

    @property
    def block(self) -> int:
        """How many consecutive directions have second derivatives with each other: k, b, or 1."""
        if self.curvature == "none" or self.pairs == "diagonal":
            return 1
        return self.k if self.pairs == "all" else self.pairs

    @property
    def structure(self) -> PairStructure:
        """Which second coefficients jets carry."""
        if self.curvature == "none" or self.pairs == "diagonal":
            return Diagonal(self.k)
        return AllPairs(self.k) if self.pairs == "all" else Planes(self.k, self.pairs)

    @property
    def curvature_shape(self) -> tuple[int, ...] | None:
        """The shape of the curvature: (k, k), (k,) for the diagonal, (k / b, b, b) for planes of b; None without."""
        if self.curvature == "none":
            return None
        if self.pairs == "diagonal":
            return (self.k,)
        return (self.k, self.k) if self.pairs == "all" else (self.k // self.pairs, self.pairs, self.pairs)

    def entries(self) -> tuple[Tensor, ...]:
        """Indices of the curvature's distinct entries: of a symmetric matrix, those of its upper triangle."""
        shape = self.curvature_shape
        if shape is None:
            return ()
        if len(shape) == 1:
            return (torch.arange(self.k),)
        rows, columns = torch.triu_indices(shape[-1], shape[-1])
        if len(shape) == 2:
            return rows, columns
        planes = torch.arange(shape[0]).repeat_interleave(len(rows))
        return planes, rows.repeat(shape[0]), columns.repeat(shape[0])

    def restricted(self, k: int) -> PlaneSpec:
        """The same for k of the directions."""
        return self if k == self.k else replace(self, k=k)

    def at_once(self) -> PlaneSpec:
        """The same with all directions carried together."""
        return self if self.chunk is None else replace(self, chunk=None, memory=None)
