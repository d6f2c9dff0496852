"""What derivatives cost: how many directions at a time, which mode, and errors before memory runs out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from ..errors import ArgumentError
from ..evaluation.chunks import activations, free_memory
from ..evaluation.side_effects import without_side_effects
from .arguments import Point

T = TypeVar("T")
Chunk = int | Literal["auto"] | None
Mode = Literal["forward", "forward-over-reverse", "auto"]

MODES = "forward", "forward-over-reverse", "auto"
SPREAD = 64  # a function's activations are taken to be at most so many times its input without a look at them
MOST_RUNS = 64  # with chunk="auto"; each fills half of the free memory
REVERSE_COST = 4  # of a Hessian-vector product by reverse mode, in evaluations: measured 3 to 5

_log = logging.getLogger("jetplane.transforms")


def amount(size: float) -> str:
    """Bytes in words.

    >>> amount(4e12)
    '4 TB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def check_mode(mode: Mode) -> None:
    """Check a mode's name.

    Raises:
        ArgumentError: there is no such mode.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")


def chosen_mode(mode: Mode, where: Point, what: str, channels: int, products: int) -> Mode:
    """The mode to be used; what "auto" chose is said in the log of ``jetplane.transforms``.

    Args:
        mode: as the caller gave it.
        where: the point.
        what: the function's name.
        channels: coefficients that forward mode carries.
        products: Hessian-vector products that the other one takes.

    Raises:
        ArgumentError: there is no such mode, or reverse mode inside an evaluation.
    """
    check_mode(mode)
    if mode == "auto":
        reverse = REVERSE_COST * products
        mode = "forward" if where.nested or channels <= reverse else "forward-over-reverse"
        _log.info("%s: mode=%r, for %d channels beside %d evaluations", what, mode, channels, reverse)
    if mode == "forward-over-reverse" and where.nested:
        raise ArgumentError(
            f"{what}: mode='forward-over-reverse' inside an evaluation, where no graph is allowed; use mode='forward'"
        )
    return mode


def check_memory(what: str, where: Point, size: int, remedy: str) -> None:
    """Check that memory of the given size is free.

    Raises:
        ArgumentError: it is not.
    """
    free = free_memory(where.leaves[0].device)
    if size > free:
        raise ArgumentError(f"{what}: D = {where.size:,}: {amount(size)}, of which {amount(free)} are free; {remedy}")


def directions_at_a_time(
    chunk: Chunk, what: str, where: Point, k: int, f: Callable[..., Any], remedy: str = "chunk="
) -> int:
    """How many of k directions are carried together.

    With "auto" all of them are where coefficients are sure to fit into half of what is free: those of the primals are
    counted, those of activations taken to be at most 64 times as large. Else one plain run of f tells how large its
    activations are. A graph keeps the memory of all chunks.

    Raises:
        ArgumentError: a chunk below 1; directions that do not fit, or take too many runs.
    """
    item, device = where.leaves[0].element_size(), where.leaves[0].device
    if chunk is None:
        check_memory(what, where, k * where.size * item, f"use {remedy}")
        return k
    if chunk != "auto":
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ArgumentError(f"chunk must be None, 'auto' or an integer of at least 1, got {chunk!r}")
        return min(chunk, k)
    room = free_memory(device) // 2
    if where.nested or SPREAD * k * where.bytes <= room:
        return k
    each = 2 * max(activations(lambda: where.call(f, [x.detach() for x in where.leaves]), ()), where.bytes)
    size = max(1, min(k, room // each - 2))
    runs = -(-k // size)
    if runs > MOST_RUNS:
        raise ArgumentError(
            f"{what}: D = {where.size:,}: {amount(k * each)} for all {k:,} directions at once, or {runs:,} runs of f "
            f"with {size:,} at a time; use {remedy}, or give chunk={size} if these runs are meant"
        )
    return size


def in_runs(k: int, size: int, once: Callable[[slice], T]) -> Iterator[T]:
    """What ``once`` gives for consecutive runs of k directions; all runs but the last are without side effects.

    >>> list(in_runs(5, 2, lambda run: (run.start, run.stop)))
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, k, size):
        run = slice(start, min(start + size, k))
        with contextlib.nullcontext() if run.stop == k else without_side_effects():
            found = once(run)
        yield found
