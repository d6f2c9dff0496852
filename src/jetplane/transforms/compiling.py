"""Functions that torch.compile leaves as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

WHY = "jetplane's derivatives of functions run uncompiled; compile the function that they are given"


def uncompiled(f: Callable[P, R]) -> Callable[P, R]:
    """Have a function run as it is inside `torch.compile`, which breaks the graph there, or says so with ``fullgraph``.

    Programs that compile nothing do not import the compiler.
    """
    apart: list[Any] = []

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return f(*args, **kwargs)
        if not apart:
            apart.append(torch.compiler.disable(f, reason=WHY))
        return apart[0](*args, **kwargs)

    return call
