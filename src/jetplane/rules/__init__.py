"""How jets pass through operators: tables of rules, and the ladder for operators without one."""

from . import (
    attention,
    collectives,
    constants,
    cumulative,
    elementwise,
    factorizations,
    linalg,
    losses,
    normalization,
    products,
    quantized,
    recurrent,
    selection,
    structure,
)
from .custom import register_rule
from .differences import blackbox
from .dispatch import dispatch, loss
from .fallback import strict
from .registry import RULES
from .rounding import quantization

__all__ = [
    "RULES",
    "attention",
    "blackbox",
    "collectives",
    "constants",
    "cumulative",
    "dispatch",
    "elementwise",
    "factorizations",
    "linalg",
    "loss",
    "losses",
    "normalization",
    "products",
    "quantization",
    "quantized",
    "recurrent",
    "register_rule",
    "selection",
    "strict",
    "structure",
]
