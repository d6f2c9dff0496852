"""TorchScript: what it has optimized for gradients it differentiates by itself, on inputs that it detaches.

Scripts that an evaluation runs first are not optimized (`jetplane.evaluation.compilers`). A script that was trained by
reverse mode before keeps its optimized code. Its detaching of inputs looks like a call of ``detach()`` by the author,
but for its not coming from Python.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import DerivativeError, JetplaneWarning

_told = False


def detaches_by_itself() -> bool:
    """Whether ``aten.detach``, which no Python code calls, is TorchScript's own doing.

    Raises:
        DerivativeError: it may be either.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    calls_module = frame.f_code is nn.Module._call_impl.__code__
    if not calls_module and frame.f_globals.get("__name__", "").startswith("torch."):
        return False  # Python code of torch's own
    found = [frame.f_locals["self"]] if calls_module else list(_functions(frame))
    scripts = [x for x in found if isinstance(x, (torch.jit.ScriptModule, torch.jit.ScriptFunction))]
    if any(map(_detaches, scripts)):
        raise DerivativeError(
            "a scripted module or function calls detach() itself, and TorchScript detaches inputs of code that it has "
            "optimized for gradients: they cannot be told apart. Use the module or function itself, not scripted, or "
            "take detach() out of the script"
        )
    if not scripts:
        _tell()
    return True


def _functions(frame: FrameType) -> Iterator[Any]:
    """What the code of a frame may call by a variable."""
    for name in frame.f_code.co_names:
        yield frame.f_globals.get(name)
    yield from frame.f_locals.values()  # variables of enclosing functions, too


# torch's own tests wrap the calling of scripts.
_BETWEEN = (
    "jetplane.", "torch._ops", "torch.overrides", "torch.utils._python_dispatch", "torch.jit.",
    "torch.testing._internal",
)  # fmt: skip


def _detaches(script: Any) -> bool:
    return "aten::detach" in str(script.inlined_graph)


def _tell() -> None:
    global _told
    if not _told:
        _told = True
        warnings.warn(
            "code that is not Python detaches a tensor that depends on the parameters. It is taken for TorchScript, "
            "which detaches inputs of functions that it has optimized for gradients, and derivatives go on; where a "
            "scripted function calls detach() itself, call it outside of the script",
            JetplaneWarning,
            stacklevel=2,
        )
