"""The context of an evaluation in its thread: the space of its jets, its nesting depth, torch's dispatch keys."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..jets.jet import Space, forget_promoted
from .specification import Pairs, PlaneSpec

_evaluations = threading.local()  # depth: how many evaluations are under way in this thread


@contextlib.contextmanager
def expansion(spec: PlaneSpec) -> Iterator[Space]:
    """The space of one evaluation; evaluations inside of it, in the same thread, get a higher level."""
    depth = getattr(_evaluations, "depth", 0) + 1
    space = Space(spec.k, spec.block, spec.order, depth, spec.gauss_newton, spec.examples)
    # A dispatch mode around the evaluation is off while it handles a call, and so must its key be.
    include = torch._C._dispatch_tls_local_include_set().remove(torch._C.DispatchKey.Python)
    include = include.remove(torch._C.DispatchKey.PythonTLSSnapshot)
    space.keys = include, torch._C._dispatch_tls_local_exclude_set()
    try:
        with at_depth(depth):
            yield space
    finally:
        forget_promoted(space)
        space.finish()


@contextlib.contextmanager
def at_depth(depth: int) -> Iterator[None]:
    """Let evaluations inside be nested in so many others."""
    before = getattr(_evaluations, "depth", 0)
    _evaluations.depth = depth
    try:
        yield
    finally:
        _evaluations.depth = before


def curvature_of(second: Tensor, space: Space, pairs: Pairs) -> Tensor:
    """Second coefficients (pairs, *S) as (k, *S), (k, k, *S) or (planes, b, b, *S)."""
    if pairs == "diagonal":
        return second
    b = space.block
    i = torch.arange(b, device=second.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    index = low * (2 * b - 1 - low) // 2 + high  # where the pair is among those of a plane
    full = second.reshape(space.planes, space.plane_pairs, *second.shape[1:])[:, index]
    return full[0] if pairs == "all" else full
