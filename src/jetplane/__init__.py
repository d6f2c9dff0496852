"""Jetplane: forward-only, second-order training of PyTorch models."""

from . import errors, optim, testing
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
from .transforms.forward import divergence, jacobian, jet, jvp, linearize, quadratic_form
from .transforms.hessians import hessian, hessian_diagonal, hvp, vhv
from .transforms.laplacians import (
    ValueAndLaplacian,
    bilaplacian,
    laplacian,
    value_and_laplacian,
    weighted_laplacian,
)

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
    "weighted_laplacian",
    "value_and_laplacian",
    "bilaplacian",
    "ValueAndLaplacian",
    "vhv",
    "hessian_diagonal",
    "linearize",
    "jvp",
    "jacobian",
    "divergence",
]
