"""What all sources of directions have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .._sharding import local
from ..errors import ShapeError
from ..jets import Deferred, Tangents


class AbstractDirections(ABC):
    """K directions in the space of all parameters, which span a plane.

    For a parameter that is a `DTensor`, directions hold the part of this rank: wherever shapes or elements are meant,
    "parameter" stands for "this rank's part of the parameter".

    Attributes:
        k: number of directions.
        isotropic: whether ``E[v v^T] = I`` for each of them: forward gradients ``mean_k (F_k v_k)`` are then unbiased.
            With `SpannedDirections` this holds in a subspace.
        cacheable: whether drawing them again costs more than keeping them.
    """

    k: int
    isotropic: bool = False
    cacheable: bool = True

    @abstractmethod
    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""

    @abstractmethod
    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""

    def prepare(  # noqa: B027 (most have nothing to prepare)
        self, params: Sequence[Tensor], places: Sequence[int] | None = None
    ) -> None:
        """Called before one step's draws with all its parameters, and their indices if not 0, 1, 2, ..."""

    def forget(self) -> None:  # noqa: B027 (most keep nothing)
        """Discard the tangents drawn so far."""

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """The same as `draw`, but in structured form where possible, not yet materialized.

        `jetplane.jets.structured.Partial` says which of the directions move the parameter; None: none of them does.
        """
        return Deferred(lambda run: self.draw(index, param, run), local(param), self.k)

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """The squared Euclidean norm of each direction over all parameters, (K,) in float64."""
        total = torch.zeros(self.k, dtype=torch.float64, device="cpu")
        for index, param in zip(places or range(len(params)), params, strict=True):
            total += self.draw(index, param).double().square().reshape(self.k, -1).sum(1).cpu()
        return total

    def tangents(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The tangents of all parameters: one tensor (K, *param.shape) for each."""
        self.prepare(params)
        return [self.draw(index, param) for index, param in enumerate(params)]


def as_real(param: Tensor) -> Tensor:
    """A complex parameter as the real one (*shape, 2) of its real and imaginary parts; others as they are."""
    return torch.view_as_real(param) if param.is_complex() else param


def weighted_sum(weights: Tensor, tensors: Tensor) -> Tensor:
    """``sum_k weights[k] tensors[k]``, summed in single precision at least, without a copy of them all."""
    work = working_dtype(tensors)
    weights = weights.to(tensors.device, work)
    if work == tensors.dtype:
        return torch.tensordot(weights, tensors, 1)
    total = torch.zeros(tensors.shape[1:], dtype=work, device=tensors.device)
    for weight, tensor in zip(weights, tensors, strict=True):
        total.addcmul_(tensor, weight)
    return total.to(tensors.dtype)


def working_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which tangents of a parameter are summed: single precision at least."""
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def checked(kappa: Tensor, k: int) -> Tensor:
    """Coefficients of K directions.

    Raises:
        ShapeError: there are not as many.
    """
    if kappa.shape != (k,):
        raise ShapeError(f"kappa: expected shape {(k,)}, got {tuple(kappa.shape)}")
    return kappa
