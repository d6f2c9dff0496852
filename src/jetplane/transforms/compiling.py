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
    "derivatives of jetplane inside a function that is itself differentiated, under torch.no_grad(): the outer ones "
    "stop there, which a compiler does not follow. Take no_grad() away and detach() the result"
)


def traceable(f: Callable[P, R]) -> Callable[P, R]:
    """Have `torch.compile` take a function into its graph, or leave it as it is where that cannot be.

    Inside of an evaluation grad mode is on, and switching it off stops the outer derivatives: the compiler breaks its
    graph there, or says so with ``fullgraph``. Programs that compile nothing do not import the compiler.
    """
    apart: list[Any] = []

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() or not nested():
                return f(*args, **kwargs)
            torch._dynamo.graph_break(msg=WHY)
        if "torch._dynamo" not in sys.modules:
            return f(*args, **kwargs)
        if not apart:
            apart.append(torch.compiler.disable(f, reason=WHY))
        return apart[0](*args, **kwargs)

    return call
