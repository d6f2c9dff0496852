"""Robust losses of residuals: what a least-squares problem counts in place of squares.

With residuals r and a soft margin C the cost is ``sum_i C^2 rho((r_i / C)^2) / 2``. For a step it stands as a sum of
squares again, of residuals and rows of the Jacobian that are scaled one by one: iteratively reweighted least squares.

Source: Holland and Welsch, Robust regression using iteratively reweighted least-squares, Communications in Statistics
A6 (1977); names and conventions are those of `scipy.optimize.least_squares`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError

Rho = Callable[[Tensor], Tensor]


def linear(z: Tensor) -> Tensor:
    """``rho(z) = z``: squares; rho, rho' and rho'', (3, *z.shape), as of all others here."""
    return torch.stack([z, torch.ones_like(z), torch.zeros_like(z)])


def soft_l1(z: Tensor) -> Tensor:
    """``rho(z) = 2 (sqrt(1 + z) - 1)``: absolute values, smooth at zero."""
    t = 1 + z
    return torch.stack([2 * z / (t.sqrt() + 1), t**-0.5, -0.5 * t**-1.5])


def huber(z: Tensor) -> Tensor:
    """``rho(z) = z`` up to 1, and ``2 sqrt(z) - 1`` beyond."""
    t = z.clamp_min(1)
    outside = torch.stack([2 * t.sqrt() - 1, t**-0.5, -0.5 * t**-1.5])
    return torch.where(z <= 1, linear(z), outside)


def cauchy(z: Tensor) -> Tensor:
    """``rho(z) = ln(1 + z)``: outliers hardly count."""
    t = 1 + z
    return torch.stack([z.log1p(), 1 / t, -1 / t.square()])


def arctan(z: Tensor) -> Tensor:
    """Outliers count at most pi / 2: rho is the arc tangent."""
    t = 1 + z.square()
    return torch.stack([z.atan(), 1 / t, -2 * z / t.square()])


NAMED: dict[str, Rho] = {
    "linear": linear, "soft_l1": soft_l1, "huber": huber, "cauchy": cauchy, "arctan": arctan
}  # fmt: skip


@dataclass(frozen=True)
class RobustLoss:
    """A loss of residuals with its soft margin.

    Attributes:
        rho: a function of ``z >= 0`` that gives rho, rho' and rho'', (3, *z.shape).
        margin: C: inliers are below it.

    >>> import torch
    >>> loss = RobustLoss(huber, 1.0)
    >>> loss(torch.tensor([0.5, 3.0]))[0]  # 0.5^2 and 2 * 3 - 1
    tensor([0.2500, 5.0000])
    """

    rho: Rho
    margin: float

    @staticmethod
    def named(loss: str | Rho, margin: float) -> RobustLoss | None:
        """A loss by its name; None for squares.

        Raises:
            ArgumentError: an unknown name, or a margin that is not positive.
        """
        if not (isinstance(margin, (int, float)) and 0 < margin < math.inf):
            raise ArgumentError(f"f_scale must be a positive number, got {margin!r}")
        if loss == "linear":
            return None
        if isinstance(loss, str) and loss not in NAMED:
            raise ArgumentError(f"loss must be one of {', '.join(map(repr, NAMED))}, or a function, got {loss!r}")
        return RobustLoss(NAMED[loss] if isinstance(loss, str) else loss, float(margin))

    def __call__(self, r: Tensor) -> Tensor:
        """``C^2 rho``, ``rho'`` and ``rho'' / C^2`` at ``(r / C)^2``, (3, *r.shape).

        With these the cost is half the sum of the first, its derivative by r is ``rho' r``, and the second one
        ``rho' + 2 rho'' r^2``.

        Raises:
            ShapeError: a function of the user's own that gives something else than (3, *z.shape).
        """
        found = self.rho((r / self.margin).square())
        if not isinstance(found, Tensor) or found.shape != (3, *r.shape):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"loss: expected rho, rho' and rho'' of shape {(3, *r.shape)}, got {got}")
        square = self.margin**2
        return found * found.new_tensor([square, 1, 1 / square]).reshape(-1, *(1 for _ in r.shape))

    @staticmethod
    def scaled(rho: Tensor, r: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (m,) and rows (m, n): half their squares have the gradient of the cost, and no less curvature.

        Where rho'' is negative the curvature is that of weighted squares, ``rho'``. The exact one is negative for
        outliers; without it a start at which all residuals are outliers leaves nothing to measure a step by.
        """
        curvature = rho[1] + (2 * rho[2] * r.square()).clamp_min(0)
        weight = curvature.clamp_min(torch.finfo(r.dtype).eps).sqrt()
        return r * rho[1] / weight, j * weight.unsqueeze(1)
