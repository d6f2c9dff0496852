"""Jetplane: forward-only, second-order training of PyTorch models."""

from . import errors, optim, testing
from .directions import Directions, step_scale
from .errors import (
    ArgumentError,
    AuditError,
    AuditWarning,
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
    RandomClosureError,
    RanksDifferError,
    RemoteError,
    RescueWarning,
    ShapeError,
    SingularPlaneError,
    UnusedParametersError,
)
from .evaluation.api import evaluate
from .evaluation.audit import AuditReport, audit
from .evaluation.plane import PlaneModel
from .jets.structured import LowRank
from .parallel import ranks as distributed
from .rules import loss, register_rule, strict
from .subspace import descent
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
    "AuditError",
    "AuditReport",
    "AuditWarning",
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
    "RandomClosureError",
    "RanksDifferError",
    "RemoteError",
    "RescueWarning",
    "ShapeError",
    "SingularPlaneError",
    "UnusedParametersError",
    "audit",
    "descent",
    "distributed",
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
