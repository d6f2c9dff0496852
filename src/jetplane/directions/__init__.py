"""Internal: what a plane is spanned by. Laws, drawn directions, and directions made of others."""

from .base import AbstractDirections, as_real, weighted_sum
from .compositions import (
    ChosenDirections,
    HeldDirections,
    MixedDirections,
    OrthogonalDirections,
    ScaledDirections,
    StoredDirections,
)
from .random import KURTOSIS, Directions, Structure, step_scale

__all__ = [
    "KURTOSIS",
    "AbstractDirections",
    "ChosenDirections",
    "Directions",
    "HeldDirections",
    "MixedDirections",
    "OrthogonalDirections",
    "ScaledDirections",
    "StoredDirections",
    "Structure",
    "as_real",
    "step_scale",
    "weighted_sum",
]
