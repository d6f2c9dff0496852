"""Typed errors and warnings: what was expected, what came, and where.

Every error derives from `JetplaneError` and, where one fits, from the built-in exception that a
caller would expect, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from types import FrameType


class JetplaneError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(JetplaneError, ValueError):
    """An argument is outside its domain: k < 1, a negative rate, no parameters, an unknown name."""


class ShapeError(JetplaneError, ValueError):
    """A tensor has the wrong shape."""


class DTypeError(JetplaneError, TypeError):
    """A tensor has a dtype that cannot be differentiated, or that differs from the dtype it must match."""


class DeviceError(JetplaneError, ValueError):
    """Tensors that must be on the same device are on different devices, or a device is not supported."""


class DerivativeError(JetplaneError, RuntimeError):
    """A derivative would be lost, or does not exist."""


class LossError(JetplaneError, ValueError):
    """The closure returned something that is not a scalar floating-point tensor."""


class UnknownLossError(LossError, DerivativeError):
    """Gauss-Newton curvature needs the loss function of a closure, which cannot be told from the model."""


class RandomClosureError(LossError):
    """Runs of a closure at the same place gave different losses."""


class NonFiniteError(JetplaneError, ArithmeticError):
    """The loss, slope or curvature holds NaN or infinity."""


class UnusedParametersError(JetplaneError, RuntimeError):
    """The loss depends on none of the parameters."""


class AuditError(DerivativeError):
    """The slope of a closure is not the slope of its loss: the evaluation misses some use of a parameter.

    Attributes:
        parameters: the names of the parameters concerned.
    """

    def __init__(self, message: str, parameters: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.parameters = parameters


class MissingRuleError(DerivativeError, NotImplementedError):
    """An operator has no rule for jets."""


class NativeCodeError(DerivativeError):
    """Compiled code does something that `jetplane.compiled` cannot differentiate.

    Attributes:
        where: the function and the library.
        instruction: the machine instruction, if it is one.
        line: ``file:line`` of the source, where debug information has it.
    """

    def __init__(
        self, message: str, where: str | None = None, instruction: str | None = None, line: str | None = None
    ) -> None:
        super().__init__(message)
        self.where, self.instruction, self.line = where, instruction, line


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that called torch or this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame) in ("torch", "jetplane"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def located(error: DerivativeError) -> None:
    """Add the line of the user's code, and the module, in which an error arose to its message."""
    if getattr(error, "_located", False):
        return
    error._located = True  # type: ignore[attr-defined]
    line, module = None, None
    for frame, lineno in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if _package(frame) not in ("torch", "jetplane"):
            line = f"{frame.f_code.co_filename}:{lineno} in {frame.f_code.co_name}"
        if frame.f_code.co_name == "_call_impl" and owner is not None:
            module = type(owner).__name__
    where = [f"at {line}"] if line else []
    where += [f"inside module {module}"] if module else []
    if where and error.args:
        error.args = (f"{error.args[0]}\n  {', '.join(where)}", *error.args[1:])


class TraceError(JetplaneError, RuntimeError):
    """A function of nodes cannot be traced into a graph of scalars: it reads values, or combines nodes."""


class SingularPlaneError(JetplaneError, ArithmeticError):
    """The curvature of a plane is so singular that no step can be computed from it."""


class CheckpointError(JetplaneError, RuntimeError):
    """A checkpoint is damaged, or belongs to another model or configuration."""


class DataError(JetplaneError, RuntimeError):
    """A data file is missing or damaged, or does not match its checksum."""


class RunFolderError(JetplaneError, OSError):
    """A run folder already exists, is missing, holds no complete run, or cannot be written."""


class TorchVersionError(JetplaneError, ImportError):
    """This torch lacks something that Jetplane needs, or has an operator under another name."""


class MissingPackageError(JetplaneError, ImportError):
    """An optional package or library is not installed; the message says how to get it."""


class DistributedError(JetplaneError, RuntimeError):
    """Base of the errors between processes that train together.

    Attributes:
        ranks: the ranks that the message is about, where they are known.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class HandshakeError(DistributedError):
    """Ranks of a process group do not run the same training."""


class RanksDifferError(DistributedError):
    """Parameters, rates or the shared batch, which must be the same on all ranks, differ."""


class LostRankError(DistributedError):
    """A rank does not answer."""


class RemoteError(DistributedError):
    """Another rank raised an error that is not a `JetplaneError`."""


class JetplaneWarning(UserWarning):
    """Base of every warning that this package issues."""


class FallbackWarning(JetplaneWarning):
    """An operator without a rule is differentiated by reverse over reverse: local to the operator, and slow."""


class AuditWarning(JetplaneWarning):
    """The slope of a closure may not be the slope of its loss; because of rounding, the audit cannot decide."""


class CoarseMeshWarning(JetplaneWarning):
    """The states of an optimal control problem's solution are far off between nodes: its optimum may be false."""


class RescueWarning(JetplaneWarning):
    """A plane determines no good step as it is; the message says what was done instead, and by how much."""
