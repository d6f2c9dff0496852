"""A function in a process of its own, so that its memory is its own, with its progress and its errors passed on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any

from .. import errors

Observe = Callable[..., None]


def call_apart(work: Callable[..., Any], *args: Any, observe: Observe = lambda *progress: None) -> Any:
    """``work(*args, observe)`` in a new process.

    Args:
        work: a function of a module, called with what ``args`` are after pickling, and with a function that takes its
            progress. Tensors are shared with the new process, which must not write to them.
        args: its arguments.
        observe: is called here with what ``work`` reports.

    Returns:
        What ``work`` returns, pickled and read again.

    Raises:
        JetplaneError: of the type and with the message that ``work`` raised, or because the process has died.
    """
    from torch.multiprocessing import get_context  # here, so that what imports this module starts without torch

    context = get_context("spawn")
    messages: Any = context.Queue()
    process = context.Process(target=_work, args=(work, args, messages), daemon=True)
    process.start()
    try:
        while True:
            try:
                kind, *content = messages.get(timeout=0.5)
            except queue.Empty:
                if process.is_alive():
                    continue
                name = getattr(work, "__name__", "work")
                raise errors.JetplaneError(f"the process of {name} ended with exit code {process.exitcode}") from None
            if kind == "progress":
                observe(*content)
            elif kind == "error":
                name, message = content
                raise getattr(errors, name, errors.JetplaneError)(message)
            else:
                process.join(timeout=5)
                return pickle.loads(content[0])
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _work(work: Callable[..., Any], args: tuple[Any, ...], messages: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
    try:
        done = work(*args, lambda *progress: messages.put(("progress", *progress)))
        messages.put(("done", pickle.dumps(done)))  # by value: tensors that are shared would go with this process
    except errors.JetplaneError as error:
        messages.put(("error", type(error).__name__, str(error)))
    except Exception as error:  # noqa: BLE001 - it crosses a process boundary as a message
        messages.put(("error", "", f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """End this process where its parent is killed, which has then no time to end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
