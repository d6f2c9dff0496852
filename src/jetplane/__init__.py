"""Jetplane: forward-only, second-order training of PyTorch models.

Each name is imported when it is first used, so that a program which only asks for help does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from . import control, directions, errors, gradients, optim, testing
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
        UnknownLossError,
        UnusedParametersError,
    )
    from .evaluation.api import evaluate
    from .evaluation.audit import AuditReport, audit
    from .evaluation.plane import PlaneModel
    from .exporting import export
    from .jets import LowRank
    from .monitor import CurvatureMonitor, CurvatureReading
    from .native import In, Out, compiled, register_native
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

# Where each name is: a module of its own, or a module and the names that are taken from it.
_MODULES = {
    "control": "control",
    "descent": "subspace.descent",
    "directions": "directions",
    "distributed": "parallel.ranks",
    "errors": "errors",
    "gradients": "gradients",
    "optim": "optim",
    "search": "subspace.search",
    "sources": "subspace.sources",
    "testing": "testing",
}
_NAMES = {
    "adaptation": ("Adapter",),
    "directions": ("Directions", "step_scale"),
    "evaluation.api": ("evaluate",),
    "evaluation.audit": ("AuditReport", "audit"),
    "evaluation.plane": ("PlaneModel",),
    "exporting": ("export",),
    "jets": ("LowRank",),
    "monitor": ("CurvatureMonitor", "CurvatureReading"),
    "native": ("In", "Out", "compiled", "register_native"),
    "rules": ("blackbox", "loss", "quantization", "register_rule", "strict"),
    "transforms.estimators": (
        "DiagonalEstimate",
        "HessianEstimate",
        "NewtonSolution",
        "estimate_diagonal",
        "estimate_hessian",
        "solve_newton",
    ),
    "transforms.forward": ("divergence", "jacobian", "jet", "jvp", "linearize"),
    "transforms.hessians": ("hessian", "hessian_diagonal", "hvp", "quadratic_form", "vhv"),
    "transforms.laplacians": (
        "ValueAndLaplacian",
        "bilaplacian",
        "laplacian",
        "value_and_laplacian",
        "weighted_laplacian",
    ),
    "transforms.models": ("functional",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        value = import_module(f".{_MODULES[name]}", __name__)
    elif name in __all__:
        value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    "UnknownLossError",
    "UnusedParametersError",
    "ValueAndLaplacian",
    "audit",
    "bilaplacian",
    "blackbox",
    "compiled",
    "control",
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
