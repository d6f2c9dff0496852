"""Jetplane: forward-only, second-order training of PyTorch models."""

from . import descent, errors, optim, testing
from .directions import Directions, step_scale
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
from .estimators import (
    DiagonalEstimate,
    HessianEstimate,
    NewtonSolution,
    estimate_diagonal,
    estimate_hessian,
    solve_newton,
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
    "DiagonalEstimate",
    "Directions",
    "FallbackWarning",
    "HessianEstimate",
    "JetplaneError",
    "JetplaneWarning",
    "LossError",
    "LowRank",
    "MissingRuleError",
    "NewtonSolution",
    "NonFiniteError",
    "PlaneModel",
    "RescueWarning",
    "ShapeError",
    "SingularPlaneError",
    "UnusedParametersError",
    "descent",
    "errors",
    "estimate_diagonal",
    "estimate_hessian",
    "evaluate",
    "hessian",
    "hvp",
    "jet",
    "laplacian",
    "loss",
    "optim",
    "quadratic_form",
    "register_rule",
    "solve_newton",
    "step_scale",
    "strict",
    "testing",
]
