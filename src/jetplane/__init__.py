"""Jetplane: forward-only, second-order training of PyTorch models."""

from . import directions, errors, gradients, optim, testing
from .directions import Directions, step_scale
from .errors import (
    ArgumentError,
    DerivativeError,
    DeviceError,
    DistributedError,
    DTypeError,
    FallbackWarning,
    HandshakeError,
    JetplaneError,
    JetplaneWarning,
    LossError,
    LostRankError,
    MissingRuleError,
    NonFiniteError,
    RanksDifferError,
    RemoteError,
    RescueWarning,
    ShapeError,
    SingularPlaneError,
    UnusedParametersError,
)
from .evaluation.api import evaluate
from .evaluation.plane import PlaneModel
from .jets import LowRank
from .parallel import ranks as distributed
from .rules import blackbox, loss, register_rule, strict
from .subspace import descent, search, sources
from .transforms.estimators import (
    DiagonalEstimate,
    HessianEstimate,
    NewtonSolution,
    estimate_diagonal,
    estimate_hessian,
    solve_newton,
)
from .transforms.functions import hessian, hvp, jet, laplacian, quadratic_form

__all__ = [
    "ArgumentError",
    "DTypeError",
    "DerivativeError",
    "DeviceError",
    "DiagonalEstimate",
    "Directions",
    "DistributedError",
    "FallbackWarning",
    "HandshakeError",
    "HessianEstimate",
    "JetplaneError",
    "JetplaneWarning",
    "LossError",
    "LostRankError",
    "LowRank",
    "MissingRuleError",
    "NewtonSolution",
    "NonFiniteError",
    "PlaneModel",
    "RanksDifferError",
    "RemoteError",
    "RescueWarning",
    "ShapeError",
    "SingularPlaneError",
    "UnusedParametersError",
    "blackbox",
    "descent",
    "directions",
    "distributed",
    "errors",
    "estimate_diagonal",
    "estimate_hessian",
    "evaluate",
    "gradients",
    "hessian",
    "hvp",
    "jet",
    "laplacian",
    "loss",
    "optim",
    "quadratic_form",
    "register_rule",
    "search",
    "solve_newton",
    "sources",
    "step_scale",
    "strict",
    "testing",
]
