"""Jetplane: forward-only, second-order training of PyTorch models."""

from typing import TYPE_CHECKING, Any

from . import directions, errors, gradients, optim, testing
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
    MissingPackageError,
    MissingRuleError,
    NativeCodeError,
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
from .transforms.forward import divergence, jacobian, jet, jvp, linearize, quadratic_form
from .transforms.hessians import hessian, hessian_diagonal, hvp, vhv
from .transforms.laplacians import (
    ValueAndLaplacian,
    bilaplacian,
    laplacian,
    value_and_laplacian,
    weighted_laplacian,
)

if TYPE_CHECKING:
    from .native import In, Out, compiled, register_native


def __getattr__(name: str) -> Any:
    if name in ("In", "Out", "compiled", "register_native"):  # imported when they are asked for
        from . import native

        return getattr(native, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "In",
    "NativeCodeError",
    "Out",
    "compiled",
    "register_native",
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
    "MissingPackageError",
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
