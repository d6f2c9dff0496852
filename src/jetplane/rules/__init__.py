"""How jets pass through operators: tables of rules, and the ladder for operators without one."""

from . import attention, elementwise, losses, normalization, products, recurrent, selection, structure
from .dispatch import dispatch
from .fallback import strict
from .registry import RULES

__all__ = [
    "RULES",
    "attention",
    "dispatch",
    "elementwise",
    "losses",
    "normalization",
    "products",
    "recurrent",
    "selection",
    "strict",
    "structure",
]
