"""Compiled models inside a closure: their own eager code runs on jets while an evaluation is under way.

``torch.compile`` would trace the closure's model anew for jets, with guards on everything that they hold; that takes
minutes, and gives no speed where each evaluation has new tangents. Compiled code that is there stays for other calls.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .._torch import compiler_imported, script_optimizes, set_eval_frame, set_script_optimizes


class _Stance:
    """``torch.compiler.set_stance``, which is one for all threads, set while any thread evaluates.

    Evaluations of several threads are counted under a lock, since each that ends would set back what it had found. A
    thread that trains a compiled model by other means meanwhile runs its eager code too. Where no compiler is imported
    yet, which takes seconds, the stance is set by the first call of ``torch.compile`` inside the closure: those of
    ``torch.cond`` and ``flex_attention``, too.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._undo = contextlib.ExitStack()
        self._set = False

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1 and compiler_imported():
                self._force()
            elif self._users == 1:
                compiler = torch.compile

                @functools.wraps(compiler)
                def compile(*args: Any, **kwargs: Any) -> Any:
                    with self._lock:
                        if self._users and not self._set:
                            self._force()
                    return compiler(*args, **kwargs)

                torch.compile = compile
                self._undo.callback(setattr, torch, "compile", compiler)

    def _force(self) -> None:
        self._undo.enter_context(torch.compiler.set_stance("force_eager"))
        self._set = True

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()
                self._set = False


_stance = _Stance()


@contextlib.contextmanager
def scripts_as_written() -> Iterator[None]:
    """Let TorchScript, in this thread, not be optimized: what it differentiates by itself runs on detached tensors."""
    before = script_optimizes()
    set_script_optimizes(False)
    try:
        yield
    finally:
        set_script_optimizes(before)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """What ``torch.compile`` was applied to runs its eager code inside."""
    if torch.compiler.is_compiling():  # as a part of a graph, in which nothing is to be compiled apart
        yield
        return
    # Code of a compiled function that torch could not trace, and runs as it is, may be what called.
    around = set_eval_frame(None) if compiler_imported() else None
    _stance.acquire()
    try:
        with scripts_as_written():
            yield
    finally:
        _stance.release()
        if around is not None:
            set_eval_frame(around)
