"""What an evaluation gives: the loss on a plane to second order, and how far its slope is noise."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SlopeMoments:
    """Moments of a slope over examples: with ``e_n`` the part of example n, sums over n of ``e_n`` and ``e_n e_n^T``.

    The moments of shards of a batch add up to those of the whole.

    Attributes:
        count: number of examples.
        total: ``sum_n e_n``, the slope, shape (K,), in float64.
        products: ``sum_n e_n e_n^T``, shape (K, K), in float64.

    >>> import torch
    >>> SlopeMoments.of(torch.tensor([[1.0], [3.0]])).covariance  # two examples: N times their variance 2
    tensor([[4.]], dtype=torch.float64)
    """

    count: int
    total: Tensor
    products: Tensor

    @staticmethod
    def of(examples: Tensor) -> SlopeMoments:
        """The moments of the examples' parts (N, K)."""
        apart = examples.double()
        return SlopeMoments(len(apart), apart.sum(0), apart.mT @ apart)

    @property
    def covariance(self) -> Tensor | None:
        """The covariance (K, K) of the slope, a sum over examples drawn at random; None for fewer than two of them."""
        if self.count < 2:
            return None
        apart = self.products - self.total.outer(self.total) / self.count
        return apart * (self.count / (self.count - 1))


@dataclass(frozen=True)
class PlaneModel:
    """The loss on a plane to second order: ``L(a) = value + slope . a + a^T curvature a / 2``.

    Attributes:
        value: the loss, shape ().
        slope: directional derivatives, shape (K,).
        curvature: (K, K), or (K,) for the diagonal alone, or (planes, b, b) for independent planes
            of b directions; None if it was not requested.
        examples: each example's part of the slope, (N, K); the parts sum to the slope. None if they were not
            requested or are not known.
        materialized: operators that materialized low-rank tangents for want of a rule for factors, and how often.
        pooled: moments of the slope over the examples of all ranks, if several ranks evaluated shards of a batch.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor | None
    examples: Tensor | None = None
    materialized: dict[str, int] = field(default_factory=dict)
    pooled: SlopeMoments | None = None

    @property
    def moments(self) -> SlopeMoments | None:
        """The moments of the slope over the examples, of this process or of all ranks; None if they are not known."""
        return self.pooled if self.examples is None else SlopeMoments.of(self.examples)
