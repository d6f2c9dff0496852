"""Functions in the graphs of `torch.compile`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from ..evaluation.context import nested

P = ParamSpec("P")
R = TypeVar("R")

WHY = (
    "derivatives that have a graph for reverse mode are computed by jetplane uncompiled; where they need none, call "
    "it under torch.no_grad()"
)


def traceable(f: Callable[P, R]) -> Callable[P, R]:
    """Have `torch.compile` take a function into its graph, or leave it as it is where that cannot be.

    With grad mode on results have a graph, which a compiler cannot record through jets: it breaks its own there, or
    says so with ``fullgraph``. Inside of an evaluation it is the other way round: grad mode is on, and switching it off
    stops the outer derivatives. Programs that compile nothing do not import the compiler.
    """
    apart: list[Any] = []

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() and torch.is_grad_enabled() == (nested() > 0):
            return f(*args, **kwargs)
        if "torch._dynamo" not in sys.modules:
            return f(*args, **kwargs)
        if not apart:
            apart.append(torch.compiler.disable(f, reason=WHY))
        return apart[0](*args, **kwargs)

    return call
