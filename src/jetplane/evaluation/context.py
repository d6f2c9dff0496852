"""The context of an evaluation in its thread: the space of its jets, its nesting depth, torch's dispatch keys."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .._torch import symbolically_traced
from ..errors import DerivativeError
from ..jets import PairStructure, Space, keep_freed
from ..rules import grad_mode
from . import compilers, leaving


class _Evaluations(threading.local):
    """Those that are under way in this thread: how many, and whether the innermost, if it is traced, is recorded."""

    def __init__(
        self,
    ) -> None:  # not defaults of the class: compiled code would be made anew once the thread has its own
        self.depth, self.recorded = 0, False


_evaluations = _Evaluations()


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

    Raises:
        DerivativeError: operators are traced into a graph, which would hold results as constants.
    """
    if symbolically_traced():
        raise DerivativeError(
            "make_fx and exporters do not see the operators of jets: their graph would hold this result as a constant "
            "that does not depend on the inputs. Use jetplane.export"
        )
    keep_freed()
    with compilers.eager():
        depth = nested() + 1
        space = Space(structure, order, depth, gauss_newton, examples, recorded=recorded)
        try:
            with at_depth(depth), grad_mode.evaluation(space):
                yield space
        finally:
            leaving.release(space)
            space.finish()


def nested() -> int:
    """How many evaluations are under way in this thread."""
    return _evaluations.depth


def recorded() -> bool:
    """Whether the evaluation around, which a compiler traces, records a graph for reverse mode."""
    return _evaluations.recorded


@contextlib.contextmanager
def at_depth(depth: int, recording: bool = False) -> Iterator[None]:
    """Let evaluations inside be nested in so many others.

    Args:
        depth: how many.
        recording: see `recorded`.
    """
    before = nested(), recorded()
    _evaluations.depth, _evaluations.recorded = depth, recording
    try:
        yield
    finally:
        _evaluations.depth, _evaluations.recorded = before
