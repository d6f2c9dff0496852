"""Internal: what a plane is spanned by. Laws, drawn directions, and directions made of others."""

from .base import AbstractDirections, weighted_sum
from .compositions import (
    CachedDirections,
    ConcatenatedDirections,
    OrthogonalDirections,
    ScaledDirections,
    SelectedDirections,
    StoredDirections,
)
from .random import KURTOSIS, Directions, Structure, step_scale

__all__ = [
    "KURTOSIS",
    "AbstractDirections",
    "SelectedDirections",
    "Directions",
    "CachedDirections",
    "ConcatenatedDirections",
    "OrthogonalDirections",
    "ScaledDirections",
    "StoredDirections",
    "Structure",
    "step_scale",
    "weighted_sum",
]
