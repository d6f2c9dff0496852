"""Which parameters derivatives of a loss reach, told by a run of the closure with autograd, without its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from . import compilers
from .side_effects import without_side_effects


class _Asked(RuntimeError):
    """The closure itself goes back through its graph, which then needs what it saves."""


def unreached(closure: Callable[[], Any], params: Sequence[Tensor]) -> list[int]:
    """The places of the parameters that reverse mode would give no gradient.

    The closure runs once, without side effects. Autograd records which tensor was made of which, and nothing is saved
    for the way back unless the closure goes that way itself. Where autograd cannot run the closure, nothing is known,
    and all places are given.

    Args:
        closure: returns the loss.
        params: tensors; those that do not require gradients count as reached.

    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> unreached(lambda: (a * b.detach()).sum(), [a, b])
    [1]
    """
    for saving in (False, True):
        try:
            nodes = _nodes(_run(closure, saving))
        except _Asked:
            continue
        except (RuntimeError, TypeError, ValueError):
            break
        found = {id(node.variable) for node in nodes if hasattr(node, "variable")}
        return [i for i, p in enumerate(params) if p.requires_grad and id(p) not in found]
    return list(range(len(params)))


def _run(closure: Callable[[], Any], saving: bool) -> Any:
    def asked(nothing: None) -> Tensor:
        raise _Asked

    with compilers.eager(), without_side_effects(), torch.enable_grad():
        if saving:
            return closure()
        with saved_tensors_hooks(lambda t: None, asked):
            return closure()


def _nodes(loss: Tensor) -> set[Any]:
    """All nodes of the graph that a tensor was made by."""
    found: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions]
    return found
