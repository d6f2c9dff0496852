"""Threads that a closure hands work to take part in its evaluation; in any other, its parameters refuse to be used.

What intercepts functions and operators is local to a thread. A thread that is started inside an evaluation, and a
function that is submitted to a `ThreadPoolExecutor` there, run under the same interceptions. A thread that gets its
work in another way, say from a queue of the user's, is not known to do so; but a parameter that is being evaluated
knows it: its class is replaced by one that sees every torch function of every thread.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._torch import DisableTorchFunctionSubclass, tree_leaves
from ..errors import DerivativeError
from .leaving import HARMLESS

if TYPE_CHECKING:
    from .interception import Interception


class _Here(threading.local):
    interceptions: tuple[Interception, ...] = ()  # under way in this thread, the outermost first
    submitting = False  # whether an executor is being given a function: threads it starts serve others later


_here = _Here()


@contextlib.contextmanager
def under_way(interception: Interception) -> Iterator[None]:
    """Let threads that are started inside take part in an evaluation."""
    _install()
    before = _here.interceptions
    _here.interceptions = (*before, interception)
    try:
        yield
    finally:
        _here.interceptions = before


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Let what runs inside, in this thread, take no part in the evaluations that are under way in it."""
    interceptions = [one for one in _here.interceptions if not one.ended]
    for one in interceptions:
        one.ended = True
    try:
        yield
    finally:
        for one in interceptions:
            one.ended = False


def taking_part(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs, in any thread, under the interceptions of the thread that calls this."""
    interceptions = _here.interceptions
    contexts = [interception.in_worker() for interception in interceptions]

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _here.interceptions or interceptions[-1].ended:
            return run(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return run(*args, **kwargs)

    return wrapped


@functools.cache
def _install() -> None:
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    @functools.wraps(start)
    def start_in_evaluation(self: threading.Thread) -> None:
        if _here.interceptions and not _here.submitting:
            self.run = taking_part(self.run)  # type: ignore[method-assign]
        start(self)

    @functools.wraps(submit)
    def submit_in_evaluation(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not _here.interceptions:
            return submit(self, fn, *args, **kwargs)
        _here.submitting = True
        try:
            return submit(self, taking_part(fn), *args, **kwargs)
        finally:
            _here.submitting = False

    threading.Thread.start = start_in_evaluation  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_in_evaluation  # type: ignore[method-assign,assignment]


# --- parameters that refuse ---------------------------------------------------------------------------------------

# Questions about a tensor itself, which have no derivative and which its jet would answer no differently.
QUERIES = {
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
}
# Numbers for people to read.
SHOWING = {torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.__reduce_ex__}
# What gives no derivative, in this thread or in another. What looks into the memory is not among it.
_LOOKING = {
    torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.__dlpack__,
    torch.Tensor.untyped_storage, torch.Tensor.storage,
}  # fmt: skip
_WITHOUT_DERIVATIVE = HARMLESS - _LOOKING


class _Refusing:
    """Mixed into the class of a parameter while it is evaluated."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _here.interceptions and torch.is_grad_enabled() and func not in _WITHOUT_DERIVATIVE:
            _refuse(func, tree_leaves((args, kwargs)))
        if func in SHOWING:  # as what it is to the user
            with DisableTorchFunctionSubclass():
                args = args[0].detach().requires_grad_(args[0].requires_grad), *args[1:]
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _RefusingTensor(_Refusing, Tensor):
    pass


class _RefusingParameter(_Refusing, nn.Parameter):
    pass


_CLASSES = {Tensor: _RefusingTensor, nn.Parameter: _RefusingParameter}
_ORIGINAL = {refusing: plain for plain, refusing in _CLASSES.items()}


def own_class(param: Tensor) -> type:
    """The class of a parameter where it is not evaluated."""
    return _ORIGINAL.get(type(param), type(param))


_evaluated: dict[int, list[Interception]] = {}  # the evaluations of each parameter
_lock = threading.Lock()


@contextlib.contextmanager
def refusing(params: Sequence[Tensor], interception: Interception) -> Iterator[None]:
    """Let parameters raise where they are used, with gradients enabled, by a thread that takes part in no evaluation.

    That is for the types `Tensor` and `torch.nn.Parameter`; others may give their class a meaning. Where there is no
    other thread at the start, all that come later are started inside, and nothing has to be done.
    """
    if threading.active_count() == 1:
        yield
        return
    held = [p for p in params if type(p) in _CLASSES or type(p) in _ORIGINAL]
    with _lock:
        for p in held:
            _evaluated.setdefault(id(p), []).append(interception)
            p.__class__ = _CLASSES.get(type(p), type(p))
    try:
        yield
    finally:
        with _lock:
            for p in held:
                _evaluated[id(p)].remove(interception)
                if not _evaluated[id(p)]:
                    del _evaluated[id(p)]
                    p.__class__ = _ORIGINAL[type(p)]


def _refuse(func: Any, values: Sequence[Any]) -> None:
    with _lock:
        found = [(x, one) for x in values if id(x) in _evaluated for one in _evaluated[id(x)]]
    if not found:
        return
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back
    message = (
        f"{getattr(func, '__name__', func)} in thread {threading.current_thread().name!r} used a parameter of shape "
        f"{tuple(found[0][0].shape)} while another thread evaluates a closure on it: the derivative would be lost. "
        "Start the thread inside the closure or give it its work by ThreadPoolExecutor.submit, detach() the "
        "parameter, or use torch.no_grad() if the value alone is wanted\n"
        f"  at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    )
    for _, interception in found:
        interception.refused.append(message)
    raise DerivativeError(message)
