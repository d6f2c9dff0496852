"""Jetplane: forward-only, second-order training of PyTorch models."""

from .errors import (
    ArgumentError,
    DerivativeError,
    JetplaneError,
    LossError,
    MissingRuleError,
    NonFiniteError,
    ShapeError,
    UnusedParametersError,
)
from .functions import hessian, hvp, jet, laplacian, quadratic_form
from .plane import PlaneModel, evaluate
from .rules import strict
