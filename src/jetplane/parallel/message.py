"""How the numbers of a plane lie in what ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..evaluation.plane import PlaneModel, SlopeMoments
from ..evaluation.specification import PlaneSpec


@dataclass(frozen=True)
class PlaneMessage:
    """A plane as one vector: the loss, the slope (K,), and the distinct entries of the curvature.

    Moments of the slope over examples are another vector of that length: the number of examples, their sum (K,),
    and the distinct entries of the sum of their products.

    Attributes:
        spec: of the plane.

    Raises:
        ArgumentError: moments are wanted, but not all pairs of a curvature.

    >>> PlaneMessage(PlaneSpec(3)).length
    10
    """

    spec: PlaneSpec

    def __post_init__(self) -> None:
        if self.spec.examples and not self.spec.crossed:
            raise ArgumentError(f"moments over examples need the curvature of all pairs, got {self.spec}")

    @property
    def length(self) -> int:
        """How many numbers a plane has."""
        entries = self.spec.entries()
        return 1 + self.spec.k + (len(entries[0]) if entries else 0)

    def check(self, plane: PlaneModel, k: int) -> None:
        """Check that a plane of k of the directions has the numbers that are sent, and no others.

        Raises:
            ShapeError: its shapes are others.
            ArgumentError: it has the examples' parts of the slope, whose moments are not sent.
        """
        expected = self.spec.restricted(k).curvature_shape
        got = None if plane.curvature is None else tuple(plane.curvature.shape)
        if plane.slope.shape != (k,) or got != expected:
            raise ShapeError(
                f"for {self.spec} on {k} directions: expected curvature {expected}, got slope "
                f"{tuple(plane.slope.shape)} and curvature {got}"
            )
        if plane.examples is not None and not self.spec.examples:
            raise ArgumentError(f"the examples' parts of the slope were computed, which {self.spec} does not send")

    def plane(self, numbers: Tensor, dtype: torch.dtype, device: torch.device) -> PlaneModel:
        """The plane with these numbers."""
        k = self.spec.k
        value, slope, entries = numbers.to(dtype).split([1, k, len(numbers) - 1 - k])
        curvature = self._symmetric(entries)
        return PlaneModel(value[0].to(device), slope.to(device), None if curvature is None else curvature.to(device))

    def moments(self, numbers: Tensor, device: torch.device) -> SlopeMoments | None:
        """The moments with these numbers; None where they were not wanted, or are not known of all shards."""
        k = self.spec.k
        if not self.spec.examples or bool(numbers[0].isnan()):
            return None
        products = self._symmetric(numbers[1 + k :])
        assert products is not None
        return SlopeMoments(round(numbers[0].item()), numbers[1 : 1 + k].to(device), products.to(device))

    def _symmetric(self, sent: Tensor) -> Tensor | None:
        """The whole matrix, of the curvature's shape, whose distinct entries were sent."""
        shape, entries = self.spec.curvature_shape, self.spec.entries()
        if shape is None:
            return None
        whole = sent.new_empty(shape)
        whole[entries] = sent
        if len(entries) > 1:
            whole[(*entries[:-2], entries[-1], entries[-2])] = sent
        return whole
