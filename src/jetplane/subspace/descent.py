"""From slope and curvature of a plane to the coefficients of a step in it.

A descent is a pure function: slope (K,), or (planes, K) for independent planes, and the curvature that
belongs to it, to coefficients kappa of the slope's shape. The step is ``sum_k kappa_k v_k``: the minus
sign is in kappa, and planes are averaged. All of it is done in double precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, RescueWarning, ShapeError, SingularPlaneError, warn_user


class Descent(ABC):
    """A rule that turns a plane model into a step.

    Attributes:
        needs: the curvature to evaluate: "none", "diagonal" or "all".
    """

    needs: str = "all"

    @abstractmethod
    def __call__(self, slope: Tensor, curvature: Tensor | None) -> Tensor:
        """Coefficients kappa, in float64 and of the slope's shape."""


@dataclass(frozen=True)
class ForwardGradient(Descent):
    """``kappa_k = -F_k / K``: the forward gradient, mean of ``F_k v_k`` (Baydin et al., arXiv 2202.08587).

    >>> import torch
    >>> ForwardGradient()(torch.tensor([2.0, 4.0]), None)
    tensor([-1., -2.], dtype=torch.float64)
    """

    needs = "none"

    def __call__(self, slope: Tensor, curvature: Tensor | None) -> Tensor:
        """See `Descent`."""
        return -slope.double() / slope.numel()


@dataclass(frozen=True)
class CurvatureScaled(Descent):
    """``kappa_k = -F_k / ((|H_kk| + eps) K)``: FoMoH, each direction on its own line (arXiv 2408.10419).

    >>> import torch
    >>> CurvatureScaled(eps=0.0)(torch.tensor([2.0, 4.0]), torch.tensor([1.0, -2.0]))
    tensor([-1., -1.], dtype=torch.float64)
    """

    eps: float = 1e-5
    needs = "diagonal"

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ArgumentError(f"eps must be at least 0, got {self.eps}")

    def __call__(self, slope: Tensor, curvature: Tensor | None) -> Tensor:
        """See `Descent`; the curvature is the diagonal, of the slope's shape.

        Raises:
            SingularPlaneError: a curvature is zero and eps too.
        """
        h = _matching(slope, curvature, slope.shape).abs() + self.eps
        if not bool((h > 0).all()):
            raise SingularPlaneError("the curvature along a direction is zero, and so is eps; expected eps > 0")
        return -slope.double() / h / slope.numel()


@dataclass(frozen=True)
class Solution:
    """A plane solved in coordinates in which its curvature is diagonal: ``kappa = basis @ step``.

    Attributes:
        basis: B with ``B^T H B = diag(values)``; its columns are directions' coefficients: (K, K) or (planes, K, K).
        values: the curvature of each coordinate: (K,) or (planes, K), and so are all below.
        slope: f, the slope along each coordinate, ``B^T F``.
        weights: m, the regularized inverse of the values.
    """

    basis: Tensor
    values: Tensor
    slope: Tensor
    weights: Tensor

    @property
    def kappa(self) -> Tensor:
        """The step's coefficients, ``-B (m f)``."""
        return (self.basis @ (-self.weights * self.slope).unsqueeze(-1)).squeeze(-1)

    @property
    def inverse(self) -> Tensor:
        """M, the regularized inverse of the curvature: ``B diag(m) B^T``, in float64."""
        return self.basis * self.weights.unsqueeze(-2) @ self.basis.mT


class Spectral(Descent):
    """Newton-like steps in the eigenvectors of each plane's curvature: ``kappa = -M F``."""

    def __call__(self, slope: Tensor, curvature: Tensor | None) -> Tensor:
        """See `Descent`; the curvature is (K, K), or (planes, K, K). Without slope and curvature the step is zero.

        Raises:
            SingularPlaneError: a plane has a slope and no curvature at all.
        """
        return self.solve(slope, curvature).kappa / (1 if slope.dim() == 1 else slope.shape[0])

    def solve(self, slope: Tensor, curvature: Tensor | None) -> Solution:
        """The same with all that the step is made of; planes are not averaged.

        Raises:
            SingularPlaneError: as above.
        """
        h = _matching(slope, curvature, (*slope.shape, slope.shape[-1]))
        assert curvature is not None
        scale = self._scale(h, curvature.dtype)
        values, basis = torch.linalg.eigh(h if scale is None else scale.unsqueeze(-1) * h * scale.unsqueeze(-2))
        basis = basis if scale is None else scale.unsqueeze(-1) * basis
        f = (basis.mT @ slope.double().unsqueeze(-1)).squeeze(-1)
        largest = values.abs().amax(-1, keepdim=True)
        flat = largest == 0
        if bool((flat & (f != 0)).any()):
            raise SingularPlaneError(
                f"the curvature of a plane of {values.shape[-1]} directions is zero and its slope is not, which leaves "
                "the length of a step undetermined"
            )
        weights = self._inverse(torch.where(flat, 1, values), torch.where(flat, 1, largest), curvature.dtype)
        return Solution(basis, values, f, torch.where(flat, 0, weights))

    def _scale(self, h: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What to multiply directions by before anything else; None for nothing."""
        return None

    @abstractmethod
    def _inverse(self, values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """What stands for the inverse of each eigenvalue, given them and the largest absolute one of each plane."""


@dataclass(frozen=True)
class Newton(Spectral):
    """``kappa = -H^-1 F``: FoMoH-KD as in the paper; Newton's method if K is the number of parameters.

    In a singular plane, eigenvectors whose eigenvalue is a rounding error (below ``tolerance`` times the largest)
    are left out of the step. An indefinite plane is not changed: the step goes to its saddle point, uphill along
    negative curvature. Both cases issue a `RescueWarning`. `SaddleFree` never goes uphill.

    Attributes:
        tolerance: None takes 10 K times the rounding of the curvature's dtype.

    >>> import torch
    >>> Newton()(torch.tensor([2.0, 4.0]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([-1., -4.], dtype=torch.float64)
    """

    tolerance: float | None = None

    def _inverse(self, values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        k = values.shape[-1]
        tolerance = 10 * k * torch.finfo(dtype).eps if self.tolerance is None else self.tolerance
        lost = values.abs() <= tolerance * largest
        if bool(lost.any()):
            warn_user(
                f"singular plane: {int(lost.sum())} of {lost.numel()} eigenvalues are below {tolerance:.1e} "
                "times the largest; the step leaves their directions out",
                RescueWarning,
            )
        uphill = (values < 0) & ~lost
        if bool(uphill.any()):
            warn_user(
                f"indefinite plane: the Newton step goes uphill along {int(uphill.sum())} of "
                f"{uphill.numel()} directions; descent='saddle-free' does not",
                RescueWarning,
            )
        return torch.where(lost, 0, 1 / values)


@dataclass(frozen=True)
class SaddleFree(Spectral):
    """``kappa = -|H|^-1 F``, eigenvalues by absolute value and at least ``floor`` times the largest.

    Source: Dauphin et al., arXiv 1406.2572, in a plane.

    Attributes:
        floor: None takes K times the rounding of the curvature's dtype, for functions without noise.

    >>> import torch
    >>> SaddleFree()(torch.tensor([2.0, 4.0]), torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    tensor([-1., -4.], dtype=torch.float64)
    """

    floor: float | None = 1e-3

    def __post_init__(self) -> None:
        if self.floor is not None and not 0 < self.floor <= 1:
            raise ArgumentError(f"floor must be in (0, 1], got {self.floor}")

    def _inverse(self, values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        floor = values.shape[-1] * torch.finfo(dtype).eps if self.floor is None else self.floor
        return 1 / torch.maximum(values.abs(), floor * largest)


@dataclass(frozen=True)
class Damped(Spectral):
    """``kappa = -(H + damping * |H|_max I)^-1 F`` (Levenberg, Marquardt); negative eigenvalues count as zero.

    Attributes:
        damping: relative to the largest eigenvalue.
        scaled: first scale each direction to unit curvature, so that lengths do not matter: for planes of
            directions of different kinds.

    >>> import torch
    >>> Damped(damping=1.0)(torch.tensor([2.0, 4.0]), torch.eye(2))
    tensor([-1., -2.], dtype=torch.float64)
    >>> Damped(damping=1.0, scaled=True)(torch.tensor([2.0, 400.0]), torch.tensor([[1.0, 0.0], [0.0, 1e4]]))
    tensor([-1.0000, -0.0200], dtype=torch.float64)
    """

    damping: float = 1e-2
    scaled: bool = False

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ArgumentError(f"damping must be positive, got {self.damping}")

    def _inverse(self, values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        return 1 / (values.clamp_min(0) + self.damping * largest)

    def _scale(self, h: Tensor, dtype: torch.dtype) -> Tensor | None:
        return _to_unit_curvature(h, dtype) if self.scaled else None


def _to_unit_curvature(h: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the root of each direction's curvature; 1 where that is rounding, which must not be blown up.

    Along a direction without effect, such as a bias before a BatchNorm, outputs move by rounding, and the curvature is
    its square.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1).abs()
    least = (16 * torch.finfo(dtype).eps) ** 2 * diagonal.amax(-1, keepdim=True)
    return torch.where(diagonal > least, diagonal, 1).rsqrt()


NAMED: dict[str, type[Descent]] = {"newton": Newton, "saddle-free": SaddleFree, "damped": Damped}


def named(descent: str | Descent) -> Descent:
    """A descent by its name, with default settings; a `Descent` is passed through.

    Raises:
        ArgumentError: the name is unknown.
    """
    if isinstance(descent, Descent):
        return descent
    if descent not in NAMED:
        raise ArgumentError(f"unknown descent {descent!r}; expected one of {', '.join(NAMED)}, or a Descent")
    return NAMED[descent]()


def _matching(slope: Tensor, curvature: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if curvature is None or tuple(curvature.shape) != tuple(shape):
        got = None if curvature is None else tuple(curvature.shape)
        raise ShapeError(f"for a slope of shape {tuple(slope.shape)}: expected curvature {tuple(shape)}, got {got}")
    return curvature.double()
