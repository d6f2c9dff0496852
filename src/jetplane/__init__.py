"""Jetplane: forward-only, second-order training of PyTorch models."""

from . import descent, errors, optim, testing
from .directions import Directions
from .errors import (
    ArgumentError,
    DerivativeError,
    DeviceError,
    DTypeError,
    FallbackWarning,
    JetplaneError,
    JetplaneWarning,
    LossError,
    MissingRuleError,
    NonFiniteError,
    RescueWarning,
    ShapeError,
    SingularPlaneError,
    UnusedParametersError,
)
from .functions import hessian, hvp, jet, laplacian, quadratic_form
from .plane import PlaneModel, evaluate
from .rules import loss, register_rule, strict
from .tangents import LowRank

__all__ = [
    "ArgumentError",
    "DTypeError",
    "DerivativeError",
    "DeviceError",
    "Directions",
    "FallbackWarning",
    "JetplaneError",
    "JetplaneWarning",
    "LossError",
    "LowRank",
    "MissingRuleError",
    "NonFiniteError",
    "PlaneModel",
    "RescueWarning",
    "ShapeError",
    "SingularPlaneError",
    "UnusedParametersError",
    "descent",
    "errors",
    "evaluate",
    "hessian",
    "hvp",
    "jet",
    "laplacian",
    "loss",
    "optim",
    "quadratic_form",
    "register_rule",
    "strict",
    "testing",
]
