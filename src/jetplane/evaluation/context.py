"""The context of an evaluation in its thread: the space of its jets, its nesting depth, torch's dispatch keys."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from .._torch import user_keys
from ..jets import PairStructure, Space, forget_promoted

_evaluations = threading.local()  # depth: how many evaluations are under way in this thread


def recording() -> bool:
    """Whether code that runs here records a graph for reverse mode."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@contextlib.contextmanager
def expansion(
    structure: PairStructure,
    order: int = 2,
    gauss_newton: bool = False,
    examples: bool = False,
    recorded: bool = False,
) -> Iterator[Space]:
    """The space of one evaluation; evaluations inside of it, in the same thread, get a higher level.

    Args:
        structure: which second coefficients its jets carry.
        order: see `Space`, as all others.
        gauss_newton: whether loss functions alone make second coefficients.
        examples: whether each example's part of the slope is kept.
        recorded: whether rules record a graph for reverse mode.
    """
    depth = getattr(_evaluations, "depth", 0) + 1
    space = Space(structure, order, depth, gauss_newton, examples, recorded=recorded, keys=user_keys())
    _evaluations.depth = depth
    try:
        yield space
    finally:
        _evaluations.depth = depth - 1
        forget_promoted(space)
        space.finish()
