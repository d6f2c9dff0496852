"""From slope and curvature of a plane to the coefficients of a step in it.

A descent is a pure function: slope (K,), or (planes, K) for independent planes, and the curvature that
belongs to it, to coefficients kappa of the slope's shape. The step is ``sum_k kappa_k v_k``: the minus
sign is in kappa, and planes are averaged. All of it is done in double precision.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, RescueWarning, ShapeError, SingularPlaneError


class Descent(ABC):
    """What turns a plane model into a step.

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
            raise SingularPlaneError("a line has no curvature, and eps is 0")
        return -slope.double() / h / slope.numel()


@dataclass(frozen=True)
class Solution:
    """A plane solved in coordinates in which its curvature is diagonal: ``kappa = basis @ step``.

    Attributes:
        basis: B with ``B^T H B = diag(values)``; its columns are directions' coefficients: (K, K) or (planes, K, K).
        values: the curvature of each coordinate: (K,) or (planes, K), and so are all below.
        slope: f, the slope along each coordinate, ``B^T F``.
        weights: m, what stands for the inverse of the values.
        step: the coordinates of the step: ``-m f``, and where `Cubic` leaves a saddle point, a way out of it besides.
    """

    basis: Tensor
    values: Tensor
    slope: Tensor
    weights: Tensor
    step: Tensor

    @property
    def inverse(self) -> Tensor:
        """M, what stands for the inverse of the curvature: ``B diag(m) B^T``, in float64."""
        return self.basis * self.weights.unsqueeze(-2) @ self.basis.mT

    def kappa(self, step: Tensor) -> Tensor:
        """The coefficients of a step with these coordinates."""
        return (self.basis @ step.unsqueeze(-1)).squeeze(-1)


class Spectral(Descent):
    """Newton-like steps in the eigenvectors of each plane's curvature: ``kappa = -M F``."""

    def __call__(self, slope: Tensor, curvature: Tensor | None) -> Tensor:
        """See `Descent`; the curvature is (K, K), or (planes, K, K).

        Raises:
            SingularPlaneError: a plane has no curvature at all, and the step needs some.
        """
        solution = self.solve(slope, curvature)
        return solution.kappa(solution.step) / (1 if slope.dim() == 1 else slope.shape[0])

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
        weights, step = self._solved(values, f, curvature.dtype)
        return Solution(basis, values, f, weights, step)

    def _scale(self, h: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What to multiply directions by before anything else; None for nothing."""
        return None

    @abstractmethod
    def _solved(self, values: Tensor, slope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights and the step's coordinates, from eigenvalues and the slope along their eigenvectors."""


class Weighted(Spectral):
    """A `Spectral` descent whose M follows from the curvature alone."""

    def _solved(self, values: Tensor, slope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        largest = values.abs().amax(-1, keepdim=True)
        if not bool((largest > 0).all()):
            raise SingularPlaneError(
                f"the curvature of a plane of {values.shape[-1]} directions is zero: no length of a step "
                "follows from it"
            )
        weights = self._inverse(values, largest, dtype)
        return weights, -weights * slope

    @abstractmethod
    def _inverse(self, values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """What each eigenvalue is divided by, inverted."""


@dataclass(frozen=True)
class Newton(Weighted):
    """``kappa = -H^-1 F``: FoMoH-KD as the paper has it, Newton's method where K is the number of parameters.

    A singular plane is rescued: eigenvectors whose eigenvalue is rounding, below ``tolerance`` times the
    largest, are left out of the step. An indefinite plane is not changed: the step goes to its saddle point,
    uphill along negative curvature. Both are announced by a `RescueWarning`; `SaddleFree` never goes uphill.

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
            warnings.warn(
                f"singular plane: {int(lost.sum())} of {lost.numel()} eigenvalues are below {tolerance:.1e} "
                "times the largest; the step leaves their directions out",
                RescueWarning,
                stacklevel=6,
            )
        if bool(((values < 0) & ~lost).any()):
            warnings.warn(
                f"indefinite plane: the Newton step goes uphill along {int(((values < 0) & ~lost).sum())} of "
                f"{lost.numel()} directions; descent='saddle-free' does not",
                RescueWarning,
                stacklevel=6,
            )
        return torch.where(lost, 0, 1 / torch.where(lost, 1, values))


@dataclass(frozen=True)
class SaddleFree(Weighted):
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
class Damped(Weighted):
    """``kappa = -(H + damping * |H|_max I)^-1 F`` (Levenberg, Marquardt); negative eigenvalues count as zero.

    Attributes:
        damping: relative to the largest eigenvalue.
        scaled: first scale the directions to unit curvature each, so that their lengths do not matter: for
            planes of unlike directions.

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


@dataclass(frozen=True)
class Truncated(Weighted):
    """``kappa = -sum_i (f_i / |lambda_i|) e_i`` over the eigenvectors e_i of large curvature; the others are left out.

    Where `Damped` goes slowly along what the plane hardly curves in, this does not go there at all: the truncated
    pseudo-inverse of ill-posed least squares. Eigenvalues go by their absolute value, so that it never goes uphill.

    Attributes:
        tolerance: relative to the largest eigenvalue; what is below it is left out.
        rank: how many eigenvectors to keep at most; None for all above the tolerance.

    >>> import torch
    >>> Truncated(tolerance=0.1)(torch.tensor([2.0, 4.0]), torch.tensor([[2.0, 0.0], [0.0, 0.1]]))
    tensor([-1.,  0.], dtype=torch.float64)

    Source: Hansen, Rank-Deficient and Discrete Ill-Posed Problems, SIAM 1998, section 3.2.
    """

    tolerance: float = 1e-3
    rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ArgumentError(f"tolerance must be in [0, 1), got {self.tolerance}")
        if self.rank is not None and self.rank < 1:
            raise ArgumentError(f"rank must be at least 1 or None, got {self.rank}")

    def _inverse(self, values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        size = values.abs()
        kept = size > self.tolerance * largest
        if self.rank is not None:
            place = size.argsort(-1, descending=True).argsort(-1)
            kept &= place < self.rank
        return torch.where(kept, 1 / torch.where(kept, size, 1), 0)


@dataclass(frozen=True)
class Cubic(Spectral):
    """The least of ``F . kappa + kappa^T H kappa / 2 + sigma |kappa|^3 / 3``: cubic regularization.

        kappa = -(H + sigma r I)^-1 F,    r = |kappa|

    The damping ``sigma r`` fades as steps get short, so that the last steps are Newton's, and an indefinite
    plane is no obstacle: it is the global minimum of the model, also from a saddle point, where F is zero and the step
    goes along the eigenvector of the lowest curvature (the "hard case"). r is found between bounds by Newton's
    method on ``1 / |kappa(r)| = 1 / r``.

    Attributes:
        sigma: of the loss' third derivative along directions of the given lengths: with a Lipschitz constant of the
            Hessian the loss falls at every step. `jetplane.subspace.search.AdaptiveCubic` finds it.
        scaled: first scale the directions to unit curvature each; see `Damped`.

    >>> import torch
    >>> Cubic(sigma=1.0)(torch.tensor([2.0]), torch.tensor([[1.0]]))  # kappa + kappa |kappa| = -2
    tensor([-1.], dtype=torch.float64)
    >>> Cubic(sigma=1.0)(torch.tensor([0.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, -2.0]])).abs()  # a saddle point
    tensor([0., 2.], dtype=torch.float64)

    Source: Nesterov and Polyak, Mathematical Programming 108 (2006); Cartis, Gould and Toint, ibid. 127 (2011).
    """

    sigma: float = 1.0
    scaled: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ArgumentError(f"sigma must be positive and finite, got {self.sigma}")

    def _solved(self, values: Tensor, slope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return cubic_step(values, slope, self.sigma)

    def _scale(self, h: Tensor, dtype: torch.dtype) -> Tensor | None:
        return _to_unit_curvature(h, dtype) if self.scaled else None


def cubic_step(values: Tensor, slope: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """`Cubic` in coordinates of curvature ``values`` and slope ``slope``, (K,) or (planes, K).

    Returns:
        The weights m and the coordinates of the step, ``-m slope`` but for the hard case.
    """
    lowest = values.amin(-1, keepdim=True).clamp_max(0)
    shift, gaps = -lowest / sigma, values - lowest  # r = shift + d, so that no digits are lost in values + sigma r
    largest = values.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(torch.float64).eps
    unmoved = slope.abs() <= rounding * slope.abs().amax(-1, keepdim=True)
    bottom = (gaps <= rounding * largest) & (lowest < 0)
    f = torch.where(bottom & unmoved, 0, slope)

    def coordinates(d: Tensor) -> Tensor:
        return torch.where(f == 0, 0, -f / (gaps + sigma * d))

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    # |kappa(r)| falls with r: the root lies between d = 0 and where the lowest curvature alone would put it.
    low = torch.zeros_like(shift)
    high = torch.sqrt(norm(f) / sigma) + low
    d = high
    for _ in range(200):
        y = coordinates(d)
        long = norm(y) > shift + d
        low, high = torch.where(long, d, low), torch.where(long, high, d)
        if bool((high - low <= 4 * rounding * high).all()):
            break
        length, r = norm(y), shift + d
        bend = sigma * (y.square() / (gaps + sigma * d)).nan_to_num().sum(-1, keepdim=True)  # minus |y| d|y|/dr
        newton = d - (1 / length - 1 / r) / (bend / length**3 + 1 / r**2)
        d = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    r = shift + high
    y = coordinates(high)
    # The hard case: too short even at the least r. What is missing lies along one eigenvector of the lowest curvature.
    missing = (r.square() - norm(y).square()).clamp_min(0).sqrt()
    first = bottom & (bottom.cumsum(-1) == 1)
    y = torch.where(first & (f == 0), missing, y)
    weights = 1 / (gaps + sigma * high).clamp_min(torch.finfo(torch.float64).tiny)
    return weights, y


def _to_unit_curvature(h: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the root of each direction's curvature; 1 where that is rounding, which must not be blown up.

    Along a direction without effect, such as a bias before a BatchNorm, outputs move by rounding, and the curvature is
    its square.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1).abs()
    least = (16 * torch.finfo(dtype).eps) ** 2 * diagonal.amax(-1, keepdim=True)
    return torch.where(diagonal > least, diagonal, 1).rsqrt()


NAMED: dict[str, type[Descent]] = {
    "newton": Newton, "saddle-free": SaddleFree, "damped": Damped, "truncated": Truncated, "cubic": Cubic,
}  # fmt: skip


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
