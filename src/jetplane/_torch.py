"""Everything private that is taken from torch, in one place, each piece checked at import.

Jets need more of torch than its public interface has: dispatch keys, decomposition tables, schemas of operators, the
identity of memory. A torch that lacks a piece is told here, with the versions that work, and not by an attribute error
in the middle of a step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import TorchVersionError

SUPPORTED = "2.11 to 2.13"
F = TypeVar("F", bound=Callable[..., Any])
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
disabled_torch_dispatch: Any = _taken("torch", "_C._disabled_torch_dispatch_impl")
DisableTorchFunction: Any = _taken("torch", "_C.DisableTorchFunction")
DisableTorchFunctionSubclass: Any = _taken("torch", "_C.DisableTorchFunctionSubclass")
EnableTorchFunction: Any = _taken("torch", "_C._EnableTorchFunction")
TorchDispatchMode: Any = _taken("torch.utils._python_dispatch", "TorchDispatchMode")
innermost_mode: Any = _taken("torch.utils._python_dispatch", "_get_current_dispatch_mode")
disable_current_modes: Any = _taken("torch.utils._python_dispatch", "_disable_current_modes")
no_dispatch: Any = _taken("torch.utils._mode_utils", "no_dispatch")
make_wrapper_subclass: Any = _taken("torch", "Tensor._make_wrapper_subclass")

_included: Any = _taken("torch", "_C._dispatch_tls_local_include_set")
_excluded: Any = _taken("torch", "_C._dispatch_tls_local_exclude_set")
_force_keys: Any = _taken("torch", "_C._ForceDispatchKeyGuard")
_python: Any = _taken("torch", "_C.DispatchKey.Python")
_python_snapshot: Any = _taken("torch", "_C.DispatchKey.PythonTLSSnapshot")
_composite: Any = _taken("torch", "_C.DispatchKey.CompositeImplicitAutograd")
_autograd: Any = _taken("torch", "_C.DispatchKey.AutogradFunctionality")
_is_excluded: Any = _taken("torch", "_C._dispatch_tls_is_dispatch_key_excluded")
_view_tracking: Any = _taken("torch", "_C.DispatchKey.ADInplaceOrView")

_recording: Any = [
    _autograd,
    _view_tracking,
    _taken("torch", "_C.DispatchKey.AutogradNestedTensor"),
    *(_taken("torch", f"_C.DispatchKey.{name}") for name in ("Conjugate", "Negative", "ZeroTensor")),
]

below_autograd: Any = _taken("torch", "_C._AutoDispatchBelowAutograd")
swap_tensors: Any = _taken("torch", "_C._swap_tensor_impl")
_creation_meta: Any = _taken("torch", "_C._autograd._get_creation_meta")
_no_grad_mode: Any = _taken("torch", "_C._autograd.CreationMeta.NO_GRAD_MODE")

Keys = tuple[Any, Any]  # dispatch keys that are on and off in this thread


def user_keys(tracked: bool = False) -> Keys:
    """The dispatch keys for rules: as they are for user code, but for two kinds.

    A dispatch mode around the evaluation is off while it handles a call, and so must its key be. Rules run below view
    tracking too, unless it is wanted (``tracked``): torch itself marks what a view operator of the user's returns.
    """
    off = _excluded() if tracked else _excluded().add(_view_tracking)
    return _included().remove(_python).remove(_python_snapshot), off


def recording_keys() -> Keys:
    """The dispatch keys with which a rule that a compiler traces is recorded by autograd."""
    off = _excluded()
    for key in _recording:
        off = off.remove(key)
    return _included(), off


def records() -> bool:
    """Whether autograd records what is computed here."""
    by_mode = getattr(innermost_mode(), "records", False)
    return torch.is_grad_enabled() and (by_mode or not _is_excluded(_autograd))


def symbolically_traced() -> bool:
    """Whether operators are written into a graph, by make_fx or an exporter, instead of running."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def under(keys: Keys | None) -> contextlib.AbstractContextManager[Any]:
    """Run under these dispatch keys; None leaves them as they are."""
    return contextlib.nullcontext() if keys is None else _force_keys(*keys)


def below_view_tracking() -> contextlib.AbstractContextManager[Any]:
    """Run without view tracking, where what an operator returns may have been tracked already."""
    return _force_keys(_included(), _excluded().add(_view_tracking))


@contextlib.contextmanager
def tracking_views() -> Iterator[None]:
    """Run with view tracking and counted versions, below which rules run."""
    with _force_keys(_included(), _excluded().remove(_view_tracking)):
        yield


def made_without_grad(view: Tensor) -> bool:
    """Whether a view was made while grad mode was off."""
    return _creation_meta(view) == _no_grad_mode


# --- transforms of torch.func -------------------------------------------------------------------------------

_innermost_transform: Any = _taken("torch", "_C._functorch.peek_interpreter_stack")


def transform_around() -> str | None:
    """The name of the innermost transform of torch.func that the code runs in; None outside of all."""
    found = _innermost_transform()
    return None if found == None else found.key().name  # noqa: E711  (a compiler finds "is None" false)


# --- operators ----------------------------------------------------------------------------------------------

Operator: Any = _taken("torch", "_ops.OpOverload")
OperatorPacket: Any = _taken("torch", "_ops.OpOverloadPacket")
HigherOrderOperator: Any = _taken("torch", "_ops.HigherOrderOperator")
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


# What ``torch.autograd.Function.apply`` calls in turn is the attribute of this base, looked up at each call.
FunctionBase: Any = _taken("torch.autograd.function", "_SingleLevelFunction")
custom_function_call: Any = _taken("torch.autograd.function", "custom_function_call")  # inside torch.func transforms


saved_tensors_hooks: Any = _taken("torch", "_C._autograd._top_saved_tensors_default_hooks")  # innermost, None without
graph_task: Any = _taken("torch", "_C._current_graph_task_id")  # of the backward pass that this thread runs, -1 without


# --- derivatives of other kinds --------------------------------------------------------------------------------

transform_level: Any = _taken("torch", "_C._functorch.maybe_current_level")  # of torch.func, None outside
in_transform: Any = _taken("torch", "_C._functorch.is_functorch_wrapped_tensor")  # whether a transform made a tensor
make_dual: Any = _taken("torch", "_VF._make_dual")  # forward mode of torch's own
TRANSFORMS = "torch._functorch.eager_transforms"  # a module that calls torch.autograd.grad
_taken(TRANSFORMS, "grad_impl")
nested_values: Any = _taken("torch", "ops.aten._nested_get_values.default")
_taken("torch.nested._internal.nested_tensor", "NestedTensor.values")


# --- compilers ----------------------------------------------------------------------------------------------

set_eval_frame: Any = _taken("torch", "_C._dynamo.eval_frame.set_eval_frame")
_taken("torch._subclasses", "FakeTensor")


script_optimizes: Any = _taken("torch", "_C._get_graph_executor_optimize")  # of TorchScript, in this thread
set_script_optimizes: Any = _taken("torch", "_C._set_graph_executor_optimize")


def compiler_pieces() -> tuple[Any, Any]:
    """AOTAutograd as a backend, and what lets the compiler forget a function; the compiler is imported here alone.

    Raises:
        TorchVersionError: this torch lacks one of them.
    """
    return (
        _taken("torch._dynamo.backends.common", "aot_autograd"),
        _taken("torch._dynamo.eval_frame", "remove_from_cache"),
    )


def constant_in_graphs(f: F) -> F:
    """Mark a function that traced code is to run as it is: `torch.compiler.assume_constant_result`, not imported."""
    f._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return f


@constant_in_graphs
def private_functions_offered() -> bool:
    """Have the compiler offer torch's private functions, such as ``torch._weight_norm``, to function modes too.

    Eager code does; a compiler that does not would pass parameters by interception. To be called in traced code, where
    it runs as it is.
    """
    offered = _taken("torch._dynamo.variables.torch", "get_overridable_functions")()
    offered.update(
        f for name in dir(_functions) if name[:1] == "_" != name[1:2] and callable(f := getattr(torch, name))
    )
    return True


def functions_watched(cls: type, message: str) -> bool:
    """Have the compiler refuse custom autograd functions of tensors of a class, and break its graph there.

    It traces their forward pass with grad mode off, and asks no function mode.

    Args:
        cls: of tensors.
        message: what is said then.
    """
    if cls in _watched:
        return True
    _watched.add(cls)
    variable = _taken("torch._dynamo.variables.misc", "AutogradFunctionVariable")
    unimplemented = _taken("torch._dynamo.exc", "unimplemented")
    apply = variable.call_apply

    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if any(x.is_tensor() and issubclass(x.python_type(), cls) for x in (*args, *kwargs.values())):
            unimplemented(gb_type="Jetplane", context=str(self.fn_cls), explanation=message, hints=[])
        return apply(self, tx, args, kwargs)

    variable.call_apply = call_apply
    return True


_watched: set[type] = set()


_functions: Any = _taken("torch", "_C._VariableFunctions")


def compiler_imported() -> bool:
    """Whether torch's compiler is imported, which takes seconds and happens at its first use."""
    return "torch._dynamo" in sys.modules


def is_stand_in(cls: type) -> bool:
    """Whether a class of tensors is one that a compiler traces with in place of others."""
    return cls.__module__.startswith("torch._subclasses")


def flex_attention() -> Any:
    """Torch's own composition of ``flex_attention``. Not checked at import, as it imports the compiler."""
    return _taken("torch._higher_order_ops.flex_attention", "math_attention")


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
