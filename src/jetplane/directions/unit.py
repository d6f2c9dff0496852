"""Directions of norm one, made on demand of tensors that are held elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from .._sharding import local
from ..jets import Deferred, Partial, Tangents
from .base import AbstractDirections, checked, working_dtype

_SHORTEST = torch.finfo(torch.float32).tiny  # vector: a shorter one cannot be scaled to norm one


@dataclass(frozen=True)
class Term:
    """What a direction is at one parameter: ``weight * (tensor - origin) / sqrt(square)``.

    Attributes:
        tensor: of the parameter's shape.
        weight: a number.
        square: of the same shape, positive or zero; None to divide by nothing. Where it is zero the direction is zero.
        origin: of the same shape, or None for zero. The difference, in its dtype, is made when it is asked for, so that
            it takes no memory; the origin must not change before.
    """

    tensor: Tensor
    weight: float = 1.0
    square: Tensor | None = None
    origin: Tensor | None = None

    def materialized(self) -> Tensor:
        """The tensor that this stands for."""
        if self.square is None:
            return self.weight * self._vector()
        return self._scale(self.square).mul_(self._vector()).mul_(self.weight)

    def added_to(self, total: Tensor, factor: float) -> None:
        """Add this times a factor in place."""
        if self.square is None:
            total.add_(self._vector(), alpha=factor * self.weight)
        else:
            total.addcmul_(self._scale(self.square), self._vector(), value=factor * self.weight)

    def _vector(self) -> Tensor:
        return self.tensor if self.origin is None else (self.tensor - self.origin).to(self.origin.dtype)

    @staticmethod
    def _scale(square: Tensor) -> Tensor:
        # Zeros become infinite, whose inverse root is zero: three times as fast as torch.where.
        return F.threshold(square, 0, torch.inf).rsqrt_()


def joint_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together, in double precision; zero of none."""
    norms = [t.double().norm() for t in tensors]
    return torch.stack(norms).norm().item() if norms else 0.0


@final
class UnitDirections(AbstractDirections):
    """K directions of Euclidean norm one over all parameters, which hold no memory of their own.

    `UnitDirections.of` makes them of vectors of any length: for each its `Term` at every parameter that it moves, by
    the parameter's index. Vectors that are zero, or shorter than the smallest number that single precision holds in
    full, are left out; where all are, it returns None.

    >>> import torch
    >>> w = torch.zeros(2)
    >>> found = UnitDirections.of([{0: Term(torch.tensor([3.0, 4.0]))}, {0: Term(torch.zeros(2))}])
    >>> found.k, found.draw(0, w)
    (1, tensor([[0.6000, 0.8000]]))
    """

    cacheable = False

    def __init__(self, vectors: Sequence[Mapping[int, Term]]) -> None:
        self.k = len(vectors)
        self._terms: dict[int, dict[int, Term]] = {}
        for row, vector in enumerate(vectors):
            for index, term in vector.items():
                self._terms.setdefault(index, {})[row] = term

    @staticmethod
    def of(vectors: Sequence[Mapping[int, Term]]) -> UnitDirections | None:
        """The directions of these vectors that have a length."""
        kept = []
        for vector in vectors:
            norm = joint_norm(term.materialized() for term in vector.values())
            if norm >= _SHORTEST:
                kept.append({i: replace(term, weight=term.weight / norm) for i, term in vector.items()})
        return UnitDirections(kept) if kept else None

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """Ones."""
        return torch.ones(self.k, dtype=torch.float64, device="cpu")

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        run, terms, here = range(self.k)[directions or slice(None)], self._terms.get(index, {}), local(param)
        drawn = torch.zeros(len(run), *here.shape, dtype=here.dtype, device=here.device)
        for n, row in enumerate(run):
            if row in terms:
                drawn[n] = terms[row].materialized()
        return drawn

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """To be made when an operator asks for them; those that move the parameter alone."""
        terms, here = self._terms.get(index, {}), local(param)
        if not terms:
            return None
        rows = sorted(terms)

        def made(run: slice) -> Tensor:
            chosen = [terms[row].materialized() for row in rows[run]]
            return torch.stack(chosen) if chosen else here.new_zeros(0, *here.shape)

        deferred = Deferred(made, here, len(rows))
        return deferred if len(rows) == self.k else Partial(self.k, rows, deferred)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        here = local(param)
        total, weights = torch.zeros_like(here, dtype=working_dtype(here)), checked(kappa, self.k).tolist()
        for row, term in self._terms.get(index, {}).items():
            term.added_to(total, weights[row])
        return total.to(here.dtype)
