"""Custom autograd functions: `torch.autograd.Function.apply` on jets.

Left alone, the forward of such a function would run on the jets as they are, and the derivative that its ``backward``
defines would be replaced in silence by that of its ``forward``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import DerivativeError
from ..jets.jet import Jet

REGISTERED: dict[type, Callable[..., Any]] = {}  # what the user said of a function

_original_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


def register_function(function: type, composed: Callable[..., Any] | None) -> None:
    """Say how jets pass through an autograd function: as ``composed``, or, where that is None, as constants."""
    REGISTERED[function] = _constant(function) if composed is None else composed


def differentiate_forward(function: type) -> None:
    """Say of an autograd function that its forward pass, run on jets, has the derivatives that it defines."""
    REGISTERED[function] = functools.partial(_original_apply, function)


def _constant(function: type) -> Callable[..., Any]:
    def composed(*args: Any) -> Any:
        return _original_apply(function, *[_innermost(a) for a in args])

    return composed


def _innermost(x: Any) -> Any:
    while isinstance(x, Jet):
        x = x.primal
    return x


def _carries(x: Any) -> bool:
    """Whether x is a jet, or the wrapper of one that `jetplane.evaluation.sharded` makes."""
    return isinstance(x, Jet) or isinstance(getattr(x, "_local_tensor", None), Jet)


def _on_jets(function: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = REGISTERED.get(function)
    if rule is None:
        raise DerivativeError(
            f"the custom autograd function {function.__qualname__} defines its own derivatives, which forward "
            "jets cannot see. Register the same function in torch operators: "
            f"jetplane.register_rule({function.__qualname__}, composed=...)"
        )
    return rule(*args, **kwargs)


# --- interception -------------------------------------------------------------------------------------------


class _Stack(threading.local):
    """What makes jets of parameters in this thread, one for each evaluation under way, the outermost first."""

    def __init__(self) -> None:
        self.seeded: tuple[Callable[[Any], Any], ...] = ()


_stack = _Stack()


def _replacing(before: Any) -> Any:
    """A class method ``apply`` that takes calls with jets, in threads that evaluate, and passes others on."""

    def apply(function: type, *args: Any, **kwargs: Any) -> Any:
        for seeded in reversed(_stack.seeded):
            args, kwargs = tuple(seeded(a) for a in args), {name: seeded(a) for name, a in kwargs.items()}
        if any(map(_carries, (*args, *kwargs.values()))):
            return _on_jets(function, args, kwargs)
        return before.__func__(function, *args, **kwargs)

    return classmethod(apply)


class _Replacement:
    """``torch.autograd.Function.apply`` replaced while any thread evaluates, and put back when none does.

    All threads share it, counted under a lock: each putting back what it had found would, where evaluations end in
    another order than they began, take away another's or leave its own for good. Which thread's calls are
    intercepted is up to that thread's own `_Stack`. Torch is as it was between evaluations, which a replacement
    made once at import would not give.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours: Any = None
        self._before: Any = None  # unbound, as subclasses inherit it

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            found = vars(torch.autograd.Function)["apply"]
            if found is not self._ours:  # over somebody else's too, who may have put back what was before ours
                self._before, self._ours = found, _replacing(found)
                torch.autograd.Function.apply = self._ours

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if vars(torch.autograd.Function)["apply"] is self._ours:
                torch.autograd.Function.apply = self._before
            # else somebody else's is over ours, theirs to put back; ours passes calls on
            self._ours = self._before = None


_replacement = _Replacement()


@contextlib.contextmanager
def intercept_functions(seeded: Callable[[Any], Any]) -> Iterator[None]:
    """In this thread, custom autograd functions that jets reach go to `_on_jets`, not to their forward.

    Args:
        seeded: replaces parameters of the evaluation by their jets, in one argument of a call.
    """
    before = _stack.seeded
    _replacement.acquire()
    _stack.seeded = (*before, seeded)
    try:
        yield
    finally:
        _stack.seeded = before
        _replacement.release()
