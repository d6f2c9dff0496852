"""Hooks on gradients do not run, since no gradients are computed backwards: whoever has some is told, once."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook, RemovableHandle

from ..errors import JetplaneWarning
from ..jets import Jet
from .leaving import WeakTensors

REGISTERING = {
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.retain_grad,
}
# Where torch asks on behalf of a module's hooks: for full ones whether tensors require gradients, else for their node.
ASKED_FOR_HOOKS = {
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
}
_ASKING = {BackwardHook._apply_on_tensors.__code__, nn.Module._call_impl.__code__}

_told = WeakTensors()
_told_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def announce(params: Sequence[Tensor]) -> None:
    """Warn of parameters that have hooks on their gradients, of each once."""
    hooked = [p for p in params if _of_user(p._backward_hooks) or _of_user(_accumulated(p))]
    new = [p for p in hooked if p not in _told]
    if not new:
        return
    for p in new:
        _told.add(p)
    shapes = ", ".join(str(tuple(p.shape)) for p in new[:3]) + (", ..." if len(new) > 3 else "")
    warnings.warn(
        f"gradient hooks do not run in forward mode, and {len(new)} parameter(s) have some, of shape {shapes}. Where a "
        "hook changes the gradient, do so in the closure: w * mask + w.detach() * (1 - mask) freezes entries",
        JetplaneWarning,
        stacklevel=2,
    )


def announce_module() -> None:
    """Called where torch asks a tensor one of `ASKED_FOR_HOOKS`: warn if it is for a module's backward hooks."""
    frame = sys._getframe(3)  # of whoever asks
    if frame.f_code not in _ASKING:
        return
    owner = frame.f_locals["self"]
    module = owner.module if isinstance(owner, BackwardHook) else owner
    if module not in _told_modules:
        _told_modules.add(module)
        warnings.warn(
            f"backward hooks do not run in forward mode, and {type(module).__name__} has some",
            JetplaneWarning,
            stacklevel=2,
        )


def registered(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A call of one of `REGISTERING` inside of an evaluation."""
    if not isinstance(args[0], Jet):
        return func(*args, **kwargs)
    warnings.warn(
        f"{func.__name__}() on a tensor that depends on the parameters has no effect: forward mode computes no "
        "gradient of it",
        JetplaneWarning,
        stacklevel=4 if func is torch.Tensor.retain_grad else 6,  # the others are written in Python
    )
    return None if func is torch.Tensor.retain_grad else RemovableHandle(OrderedDict())


def _accumulated(p: Tensor) -> Any:
    return getattr(p, "_post_accumulate_grad_hooks", None)


def _of_user(hooks: dict[int, Any] | None) -> bool:
    return bool(hooks) and not all(_by_torch(h) for h in hooks.values())


def _by_torch(hook: Any) -> bool:
    """Whether torch has put the hook there itself, for its own bookkeeping."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"
