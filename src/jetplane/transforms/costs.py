"""What derivatives cost: how many directions at a time, which mode, and errors before memory runs out."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch

from ..errors import ArgumentError
from ..evaluation.chunks import activations, free_memory
from ..evaluation.side_effects import without_side_effects
from .arguments import Call

R = TypeVar("R")
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


def chosen_mode(mode: Mode, call: Call, channels: int, products: int) -> Mode:
    """The mode to be used; what "auto" chose is said in the log of ``jetplane.transforms``.

    Args:
        mode: as the caller gave it.
        call: what is differentiated.
        channels: coefficients that forward mode carries.
        products: Hessian-vector products that the other one takes.

    Raises:
        ArgumentError: there is no such mode, or reverse mode inside an evaluation.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "auto":
        reverse = REVERSE_COST * products
        if torch.compiler.is_compiling():
            return "forward"
        mode = "forward" if call.nested or channels <= reverse else "forward-over-reverse"
        _log.info("%s: mode=%r, for %d channels beside %d evaluations", call.name, mode, channels, reverse)
    if mode == "forward-over-reverse" and torch.compiler.is_compiling():
        raise ArgumentError(f"{call.name}: mode='forward-over-reverse' cannot be compiled; use mode='forward'")
    if mode == "forward-over-reverse" and call.nested:
        raise ArgumentError(
            f"{call.name}: mode='forward-over-reverse' inside an evaluation, where no graph is allowed; use "
            "mode='forward'"
        )
    return mode


def check_memory(call: Call, size: int, remedy: str) -> None:
    """Check that memory of the given size is free.

    Raises:
        ArgumentError: it is not.
    """
    free = None if torch.compiler.is_compiling() else free_memory(call.leaves[0].device)
    if free is not None and size > free:
        raise ArgumentError(
            f"{call.name}: D = {call.size:,}: {amount(size)}, of which {amount(free)} are free; use {remedy}"
        )


def check_chunk(chunk: Chunk) -> None:
    """Check how many directions a caller wants carried at a time.

    Raises:
        ArgumentError: a number below 1, or an unknown word.
    """
    if chunk is None or chunk == "auto":
        return
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ArgumentError(f"chunk must be None, 'auto' or an integer of at least 1, got {chunk!r}")


def directions_at_a_time(call: Call, chunk: Chunk, k: int, remedy: str = "chunk=", width: int = 1) -> int:
    """How many of k directions are carried together.

    With "auto" all of them are where coefficients are sure to fit into half of what is free: those of the primals are
    counted, those of activations taken to be at most 64 times as large. Else one plain run of f, the first time that it
    is given with these shapes, tells how large its activations are. A graph keeps the memory of all chunks.

    Args:
        call: what is differentiated.
        chunk: as the caller gave it.
        k: directions in all.
        remedy: what the caller may do instead, for errors.
        width: coefficients that each direction brings.

    Raises:
        ArgumentError: a chunk below 1; directions that do not fit, or take too many runs.
    """
    check_chunk(chunk)
    if torch.compiler.is_compiling():
        if isinstance(chunk, int) and chunk < k:
            raise ArgumentError(f"{call.name}: chunk= cannot be compiled; expected None or 'auto', got {chunk}")
        return k
    item, device = call.leaves[0].element_size(), call.leaves[0].device
    if chunk is None:
        check_memory(call, k * call.size * item * width, remedy)
        return k
    if chunk != "auto":
        return min(chunk, k)
    room = free_memory(device) // 2
    if call.nested or SPREAD * k * call.bytes * width <= room:
        return k
    each = 2 * max(_activations(call), call.bytes) * width
    size = max(1, min(k, room // each - 2))
    runs = -(-k // size)
    if runs > MOST_RUNS:
        raise ArgumentError(
            f"{call.name}: D = {call.size:,}: {amount(k * each)} for all {k:,} directions at once, or {runs:,} runs of "
            f"f with {size:,} at a time; use {remedy}, or give chunk={size} if these runs are meant"
        )
    return size


_known: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()


def _activations(call: Call) -> int:
    """Bytes that a plain run of f keeps alive at once, measured once for each function, its shapes and dtypes."""
    try:
        known = _known.setdefault(call.f, {})
    except TypeError:  # no weak references to f, or no hash
        known = {}
    key = tuple((x.shape, x.dtype) for x in call.leaves)
    if key not in known:
        known[key] = activations(lambda: call.at([x.detach() for x in call.leaves]), ())
    return known[key]


def products_at_a_time(call: Call, chunk: Chunk, k: int, remedy: str) -> int:
    """How many of k Hessian-vector products are computed together by reverse mode.

    Raises:
        ArgumentError: as `directions_at_a_time`.
    """
    size = directions_at_a_time(call, chunk, REVERSE_COST * k, remedy)
    return max(1, size // REVERSE_COST) if chunk in ("auto", None) else size


def runs_of(k: int, size: int) -> list[slice]:
    """Runs of at most ``size`` of k directions.

    >>> runs_of(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, k)) for start in range(0, k, size)]


def in_turn(runs: Sequence[R], once: Callable[[R], T]) -> Iterator[T]:
    """What ``once`` gives for each run; all but the last are without side effects."""
    for n, run in enumerate(runs):
        with contextlib.nullcontext() if n + 1 == len(runs) else without_side_effects():
            found = once(run)
        yield found
