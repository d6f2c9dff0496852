"""How a closure runs: without autograd, and with the user's own ``torch.no_grad()`` heeded.

A closure runs below torch's autograd, so that composite operators arrive whole at jets and no graph is recorded. It
does not run under ``torch.inference_mode()``: what it makes are ordinary tensors, with version counters, which reverse
mode can use afterwards.

Grad mode means nothing below autograd. It is switched on where an evaluation begins, so that a jet which meets an
operator while it is off knows that the user's own code has switched it off: ``torch.no_grad()``,
``torch.set_grad_enabled(False)`` or ``torch.inference_mode()`` inside of the closure. Derivatives stop there, as in
reverse mode. Around the whole evaluation, as in optimizers' steps, these change nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import below_autograd, made_without_grad, tracking_views, tree_map, user_keys
from ..errors import DerivativeError
from ..jets import WRITTEN, Jet, Space, innermost, saving

_running = threading.local()  # spaces: those of the evaluations that are under way in this thread


@contextlib.contextmanager
def forward_only() -> Iterator[None]:
    """Run code without autograd: operators arrive whole, nothing is recorded, and tensors are ordinary ones."""
    with below_autograd(), torch.enable_grad():
        yield


@contextlib.contextmanager
def autograd(enabled: bool = True) -> Iterator[None]:
    """Run code with autograd inside of `forward_only`: for rules that ask it for the derivatives of one operator.

    Args:
        enabled: the grad mode.
    """
    # Leaving inference mode gives back autograd's dispatch keys.
    with torch.inference_mode(False), torch.set_grad_enabled(enabled), tracking_views():
        yield


def in_graph(x: Tensor, params: Collection[int] = ()) -> bool:
    """Whether a tensor starts or continues a graph of a closure's own, which parameters and their views do not.

    Args:
        x: the tensor.
        params: identities of tensors that are parameters beside those of modules.
    """
    if not x.requires_grad or isinstance(x, nn.Parameter):
        return False
    owner = x._base if x._is_view() else x
    return not isinstance(owner, nn.Parameter) and id(owner) not in params


@contextlib.contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """Run a function of the user's with `autograd`, which keeps its results for the way back.

    Args:
        enabled: the grad mode.
    """
    with saving(), autograd(enabled):
        yield


def evaluating() -> bool:
    """Whether an evaluation is under way in this thread."""
    return bool(getattr(_running, "spaces", []))


@contextlib.contextmanager
def evaluation(space: Space) -> Iterator[None]:
    """One evaluation, on the jets of this space. Where it begins while grad mode is off, outer derivatives stop."""
    outer: list[Space] = getattr(_running, "spaces", [])
    stopping = [] if torch.is_grad_enabled() else [s for s in outer if not s.stopped]
    for s in stopping:
        s.stopped = True
    for s in outer:
        s.graph_lost = s.graph_lost or "a function of jetplane's"
    _running.spaces = [*outer, space]
    space.made = deque()
    try:
        with contextlib.nullcontext() if space.recorded else forward_only():
            space.keys = user_keys(space.recorded)
            yield
    finally:
        _running.spaces = outer
        for s in stopping:
            s.stopped = False


def stopped(space: Space) -> bool:
    """Whether derivatives of an evaluation stop here: the user has switched grad mode off."""
    return space.stopped or not torch.is_grad_enabled()


def unmoved(param: Tensor, space: Space) -> Jet:
    """A parameter where derivatives stop: no directions move it, and it may not be written to."""
    jet = Jet(param.detach(), None, None, space)
    jet.is_seed = True
    return jet


def on_primals(func: Any, args: Any, kwargs: dict[str, Any], original: Any) -> Any:
    """An operator where derivatives stop: of values alone.

    What it writes to in place keeps the derivatives that it had, as in reverse mode.

    Args:
        func: the operator.
        args: with jets for plain tensors that jets were written into.
        kwargs: likewise.
        original: the arguments as they came.

    Raises:
        DerivativeError: it writes to a parameter.
    """
    named = zip(func._schema.arguments, args, strict=False)
    written = {a.name: x for a, x in named if a.alias_info is not None and a.alias_info.is_write}
    outs = {a.name: kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs}
    for target in (*written.values(), *outs.values()):
        if isinstance(target, Jet) and (target.root().is_seed or target.root().is_argument):
            raise DerivativeError(WRITTEN)
    result = func(*tree_map(innermost, args), **tree_map(innermost, kwargs))
    if not func._schema.returns or not func._schema.is_mutable:
        return result
    if outs:
        return next(iter(outs.values())) if len(outs) == 1 else tuple(outs.values())
    return original[0] if written else result


def check_view(target: Tensor) -> None:
    """A plain tensor into which a jet is about to be written.

    Raises:
        DerivativeError: it looks into the memory of a jet, and was made where derivatives stop.
    """
    if not (target._is_view() and isinstance(target._base, Jet)):
        return
    if made_without_grad(target):
        raise DerivativeError(
            "a view that was made under torch.no_grad() of a tensor with derivatives is written to with grad mode on: "
            "derivatives would not reach that tensor, and reverse mode raises too. Make the view outside of no_grad()"
        )
