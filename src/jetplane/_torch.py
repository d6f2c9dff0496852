"""Everything private that is taken from torch, in one place, each piece checked at import.

Jets need more of torch than its public interface has: dispatch keys, decomposition tables, schemas of operators, the
identity of memory. A torch that lacks a piece is told here, with the versions that work, and not by an attribute error
in the middle of a step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .errors import TorchVersionError

SUPPORTED = "2.11 to 2.13"
CHECKED = (2, 13)  # the newest version whose operators' names were checked
VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _taken(module: str, path: str) -> Any:
    """A piece of torch by module and attributes.

    Raises:
        TorchVersionError: this torch lacks it.
    """
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise TorchVersionError(
            f"torch {torch.__version__} lacks {module}.{path}, which Jetplane needs; it works with torch {SUPPORTED}"
        ) from error
    return found


# --- dispatch -----------------------------------------------------------------------------------------------

disabled_torch_function: Any = _taken("torch", "_C._disabled_torch_function_impl")
DisableTorchFunction: Any = _taken("torch", "_C.DisableTorchFunction")
DisableTorchFunctionSubclass: Any = _taken("torch", "_C.DisableTorchFunctionSubclass")
EnableTorchFunction: Any = _taken("torch", "_C._EnableTorchFunction")
TorchDispatchMode: Any = _taken("torch.utils._python_dispatch", "TorchDispatchMode")
disable_current_modes: Any = _taken("torch.utils._python_dispatch", "_disable_current_modes")
no_dispatch: Any = _taken("torch.utils._mode_utils", "no_dispatch")
make_wrapper_subclass: Any = _taken("torch", "Tensor._make_wrapper_subclass")

_included: Any = _taken("torch", "_C._dispatch_tls_local_include_set")
_excluded: Any = _taken("torch", "_C._dispatch_tls_local_exclude_set")
_force_keys: Any = _taken("torch", "_C._ForceDispatchKeyGuard")
_python: Any = _taken("torch", "_C.DispatchKey.Python")
_python_snapshot: Any = _taken("torch", "_C.DispatchKey.PythonTLSSnapshot")
_composite: Any = _taken("torch", "_C.DispatchKey.CompositeImplicitAutograd")

Keys = tuple[Any, Any]  # dispatch keys that are on and off in this thread


def user_keys() -> Keys:
    """The dispatch keys as they are for user code, without those of a dispatch mode around the evaluation.

    That mode is off while it handles a call, and so must its key be.
    """
    return _included().remove(_python).remove(_python_snapshot), _excluded()


def under(keys: Keys | None) -> contextlib.AbstractContextManager[Any]:
    """Run under these dispatch keys; None leaves them as they are."""
    return contextlib.nullcontext() if keys is None else _force_keys(*keys)


# --- transforms of torch.func -------------------------------------------------------------------------------

_innermost_transform: Any = _taken("torch", "_C._functorch.peek_interpreter_stack")


def transform_around() -> str | None:
    """The name of the innermost transform of torch.func that the code runs in; None outside of all."""
    found = _innermost_transform()
    return None if found is None else found.key().name


# --- operators ----------------------------------------------------------------------------------------------

Operator: Any = _taken("torch", "_ops.OpOverload")
OperatorPacket: Any = _taken("torch", "_ops.OpOverloadPacket")
_schemas: Any = _taken("torch", "_C._jit_get_all_schemas")
_taken("torch._decomp", "decomposition_table")


@functools.cache
def is_composite(operator: Any) -> bool:
    """Whether an operator is made of others, so that it can be broken up by ``operator.decompose``."""
    return operator.has_kernel_for_dispatch_key(_composite)


@functools.cache
def decompositions() -> dict[Any, Any]:
    """Torch's decomposition tables; the first call imports more than torch itself does."""
    return _taken("torch._decomp", "decomposition_table")


def operator_names(namespace: str) -> set[str]:
    """Names of all operators of a namespace, without it."""
    return {s.name.partition("::")[2] for s in _schemas() if s.name.startswith(f"{namespace}::")}


# --- trees and memory ---------------------------------------------------------------------------------------

tree_flatten: Any = _taken("torch.utils._pytree", "tree_flatten")
tree_unflatten: Any = _taken("torch.utils._pytree", "tree_unflatten")
tree_leaves: Any = _taken("torch.utils._pytree", "tree_leaves")
tree_map: Any = _taken("torch.utils._pytree", "tree_map")

_taken("torch", "UntypedStorage._cdata")


def memory_of(x: Tensor) -> int:
    """What is the same for tensors that look into one memory."""
    with DisableTorchFunction():  # a question of ours, which an evaluation around must not answer for its jets
        return x.untyped_storage()._cdata
