"""Jetplane: forward-only, second-order training of PyTorch models."""

from . import errors
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

__all__ = [
    "ArgumentError",
    "DTypeError",
    "DerivativeError",
    "DeviceError",
    "FallbackWarning",
    "JetplaneError",
    "JetplaneWarning",
    "LossError",
    "MissingRuleError",
    "NonFiniteError",
    "PlaneModel",
    "RescueWarning",
    "ShapeError",
    "SingularPlaneError",
    "UnusedParametersError",
    "errors",
    "evaluate",
    "hessian",
    "hvp",
    "jet",
    "laplacian",
    "loss",
    "quadratic_form",
    "register_rule",
    "strict",
]
