"""Jetplane: forward-only, second-order training of PyTorch models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import directions, errors, gradients, optim, testing
from .adaptation import Adapter
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
    TraceError,
    UnusedParametersError,
)
from .evaluation.api import evaluate
from .evaluation.audit import AuditReport, audit
from .evaluation.plane import PlaneModel
from .exporting import export
from .jets import LowRank
from .monitor import CurvatureMonitor, CurvatureReading
from .parallel import ranks as distributed
from .rules import blackbox, loss, quantization, register_rule, strict
from .subspace import descent, search, sources
from .transforms.estimators import (
    DiagonalEstimate,
    HessianEstimate,
    NewtonSolution,
    estimate_diagonal,
    estimate_hessian,
    solve_newton,
)
from .transforms.forward import divergence, jacobian, jet, jvp, linearize
from .transforms.hessians import hessian, hessian_diagonal, hvp, quadratic_form, vhv
from .transforms.laplacians import (
    ValueAndLaplacian,
    bilaplacian,
    laplacian,
    value_and_laplacian,
    weighted_laplacian,
)
from .transforms.models import functional

if TYPE_CHECKING:
    from .native import In, Out, compiled, register_native


def __getattr__(name: str) -> Any:
    """Rooms that need more than torch are imported when they are used."""
    if name == "control":
        return import_module(".control", __name__)
    if name in ("In", "Out", "compiled", "register_native"):
        return getattr(import_module(".native", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Adapter",
    "ArgumentError",
    "AuditError",
    "AuditReport",
    "AuditWarning",
    "CurvatureMonitor",
    "CurvatureReading",
    "DTypeError",
    "DerivativeError",
    "DeviceError",
    "DiagonalEstimate",
    "Directions",
    "DistributedError",
    "FallbackWarning",
    "HandshakeError",
    "HessianEstimate",
    "In",
    "JetplaneError",
    "JetplaneWarning",
    "LossError",
    "LostRankError",
    "LowRank",
    "MissingPackageError",
    "MissingRuleError",
    "NativeCodeError",
    "NewtonSolution",
    "NonFiniteError",
    "Out",
    "PlaneModel",
    "RandomClosureError",
    "RanksDifferError",
    "RemoteError",
    "RescueWarning",
    "ShapeError",
    "SingularPlaneError",
    "TraceError",
    "UnusedParametersError",
    "ValueAndLaplacian",
    "audit",
    "bilaplacian",
    "blackbox",
    "compiled",
    "descent",
    "directions",
    "distributed",
    "divergence",
    "errors",
    "estimate_diagonal",
    "estimate_hessian",
    "evaluate",
    "export",
    "functional",
    "gradients",
    "hessian",
    "hessian_diagonal",
    "hvp",
    "jacobian",
    "jet",
    "jvp",
    "laplacian",
    "linearize",
    "loss",
    "optim",
    "quadratic_form",
    "quantization",
    "register_native",
    "register_rule",
    "search",
    "solve_newton",
    "sources",
    "step_scale",
    "strict",
    "testing",
    "value_and_laplacian",
    "vhv",
    "weighted_laplacian",
]
