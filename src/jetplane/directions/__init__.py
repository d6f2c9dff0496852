"""What a plane is spanned by: laws, drawn directions, and directions made of others."""

from .base import AbstractDirections, as_real, weighted_sum
from .compositions import (
    CachedDirections,
    ConcatenatedDirections,
    SelectedDirections,
    SpannedDirections,
    StoredDirections,
)
from .random import KURTOSIS, Directions, Structure, step_scale
from .unit import Term, UnitDirections

__all__ = [
    "KURTOSIS",
    "AbstractDirections",
    "CachedDirections",
    "ConcatenatedDirections",
    "Directions",
    "SelectedDirections",
    "SpannedDirections",
    "StoredDirections",
    "Structure",
    "Term",
    "UnitDirections",
    "as_real",
    "step_scale",
    "weighted_sum",
]
