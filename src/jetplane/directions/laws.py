"""Random numbers as a function of where they stand: laws over a counter-based generator.

A generator with a state cannot be traced, split over machines or asked for one direction alone.
Here the number at a place is computed from the place, in plain tensor operations on int64:

* A *lane* is 64 random bits. Lane ``i`` of a stream with the key ``(start, twist)`` is the i-th output
  of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014;
  finalizer by Stafford), begun at ``start``, with ``twist`` xored in between its two multiplications.
  The twist tells directions apart; the work before it is shared by all of them.
* A *law* turns each lane into a few numbers of mean zero and variance one.

The n numbers of a stream fill a grid of ``lanes`` columns, one a lane, row by row; so any range of lanes
can be drawn alone, and every result is written to contiguous memory. Numbers are float32; they are the
same on every device up to the rounding of log, sin, cos and sqrt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._sharding import Runs


def _signed(word: int) -> int:
    """The 64 low bits of `word`, read as a two's complement number."""
    return ((word + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_HALF_TURN = math.pi * 2.0**-31

# Lanes that one operation handles: its few buffers stay in a processor's cache, while the cost of
# starting an operation is spread thin. An accelerator wants long vectors instead.
_CHUNK_CPU = 1 << 17
_CHUNK_OTHER = 1 << 24


# A word is an int, for keys, or an int64 tensor, which wraps around by itself: both take the same functions.


def _wrapped(word: Any) -> Any:
    return word if isinstance(word, Tensor) else _signed(word)


def _shift_xor(word: Any, bits: int) -> Any:
    """``word ^ (word >>> bits)``: shifts are arithmetic, so the signs that come in are masked away."""
    shifted = word >> bits
    shifted &= (1 << (64 - bits)) - 1
    shifted ^= word
    return shifted


def _times(word: Any, factor: int) -> Any:
    word *= factor
    return _wrapped(word)


def _begin(word: Any) -> Any:
    return _times(_shift_xor(word, 30), _FIRST)


def _finish(word: Any, twist: Any) -> Any:
    return _shift_xor(_times(_shift_xor(word ^ twist, 27), _SECOND), 31)


def _mix(word: Any) -> Any:
    """SplitMix64's finalizer."""
    return _finish(_begin(word), 0)


def key(*words: int | Tensor) -> int | Tensor:
    """Fold integers (a seed, a step, an index, ...) into one 64-bit key; the order counts.

    A word may be an int64 tensor without dimensions: then so is the key, and a traced program need not be
    traced anew when the word changes.
    """
    folded: int | Tensor = 0
    for word in words:
        folded = _mix(_wrapped((folded ^ _wrapped(word)) + _GOLDEN))
    return folded


# ---------------------------------------------------------------------------------------------------
# Laws. Each takes lanes (m, c) and yields (first row, values (m, rows, c)) in the order of the rows.

Rows = Iterator[tuple[int, Tensor]]


def _low(lanes: Tensor) -> Tensor:
    """The low 32 bits of each lane, as a float in [-2³¹, 2³¹]."""
    return lanes.to(torch.int32).to(torch.float32)


def _high(lanes: Tensor) -> Tensor:
    """The high 32 bits of each lane, as a float in [-2³¹, 2³¹]."""
    return (lanes >> 32).to(torch.float32)


def _fraction(lanes: Tensor) -> Tensor:
    """Each lane as a float in (0, 1], dense near 0, led by its high bits."""
    return lanes.to(torch.float32).abs_().clamp_min_(1.0).mul_(2.0**-63)


def _gaussian(lanes: Tensor) -> Rows:
    # Box and Muller: the high bits of a lane set the radius, its low half the angle.
    radius = _fraction(lanes).log_().mul_(-2.0).sqrt_()
    angle = _low(lanes).mul_(_HALF_TURN)
    yield 0, torch.cos(angle).mul_(radius).unsqueeze(1)
    yield 1, angle.sin_().mul_(radius).unsqueeze(1)


def _rademacher(lanes: Tensor) -> Rows:
    # One bit a number: bit j of a half is shifted up to the sign, which -1 | 1 and 0 | 1 turn into a factor.
    together = max(1, _chunk(lanes.device) // lanes.numel())
    for half in (0, 1):
        bits = (lanes >> 32 if half else lanes).to(torch.int32).unsqueeze(1)
        for row in range(0, 32, together):
            shift = torch.arange(31 - row, max(31 - row - together, -1), -1, dtype=torch.int32, device=lanes.device)
            signs = (bits << shift.unsqueeze(1)).bitwise_right_shift_(31).bitwise_or_(1)
            yield 32 * half + row, signs.to(torch.float32)


def _uniform(lanes: Tensor) -> Rows:
    for row, half in enumerate((_low, _high)):
        yield row, half(lanes).add_(0.5).mul_(math.sqrt(3.0) * 2.0**-31).unsqueeze(1)


def _laplace(lanes: Tensor) -> Rows:
    for row, half in enumerate((_low, _high)):
        side = half(lanes).add_(0.5)
        size = side.abs().mul_(2.0**-31).log_().mul_(-math.sqrt(0.5))
        yield row, size.copysign_(side).unsqueeze(1)


def _semicircle(lanes: Tensor) -> Rows:
    # One coordinate of a point spread evenly over the disc of radius 2.
    radius = _fraction(lanes).sqrt_().mul_(2.0)
    yield 0, _low(lanes).mul_(_HALF_TURN).cos_().mul_(radius).unsqueeze(1)


@dataclass(frozen=True)
class Law:
    """A distribution of mean zero and variance one.

    Attributes:
        rows: how many numbers one lane gives.
        draw: lanes to numbers.
        kurtosis: the fourth moment of one number.
    """

    rows: int
    draw: Callable[[Tensor], Rows]
    kurtosis: float


LAWS: dict[str, Law] = {
    "gaussian": Law(2, _gaussian, 3.0),
    "rademacher": Law(64, _rademacher, 1.0),
    "uniform": Law(2, _uniform, 9.0 / 5.0),
    "laplace": Law(2, _laplace, 6.0),
    "semicircle": Law(1, _semicircle, 2.0),
}


# ---------------------------------------------------------------------------------------------------


def _chunk(device: torch.device) -> int:
    if torch.compiler.is_compiling():
        return 1 << 62  # a compiler blocks its loops itself
    return _CHUNK_CPU if device.type == "cpu" else _CHUNK_OTHER


def _outputs(places: range, device: torch.device) -> Tensor:
    """How far SplitMix64's state has moved when it gives the outputs at these places, from 0."""
    first, last, by = places.start + 1, places.stop + 1, places.step
    # A compiler that sees numbers in sequence takes them for indices and multiplies those in its own
    # arithmetic, which overflows (torch 2.13 on CPU then writes out of bounds): xor hides the sequence.
    return torch.arange(first, last, by, device=device).bitwise_xor_(0).mul_(_GOLDEN)


def twists(start: int | Tensor, streams: range, device: torch.device) -> Tensor:
    """What tells the streams of one key apart: int64, one a stream."""
    return _mix(_outputs(streams, device) + start)


def pieces(law: Law, start: int | Tensor, twists: Tensor, size: int, run: slice | None = None) -> Runs:
    """Draw `size` numbers for each of the streams ``(start, twists[k])``, or a run of them, a piece at a time.

    Yields:
        (which streams, which of the numbers, their values (streams, numbers) in float32). A piece is
        scratch of the size of a cache: use it before asking for the next.
    """
    device, streams = twists.device, twists.numel()
    lanes = -(-size // law.rows)
    run = slice(0, size) if run is None else run
    for needed in _lanes(lanes, run):
        width = min(_chunk(device), len(needed))
        height = max(1, _chunk(device) // width)
        steps = _outputs(range(width), device)
        for left in needed[::width]:
            begun = _begin(steps[: needed.stop - left] + _moved(start, left))
            for top in range(0, streams, height):
                block = slice(top, min(top + height, streams))
                for row, values in law.draw(_finish(begun, twists[block].unsqueeze(1))):
                    if row * lanes + left >= run.stop:
                        break
                    # Rows that hold all their lanes lie one behind the other; others are written one by one.
                    group = [values.flatten(1)] if values.shape[2] == lanes else values.unbind(1)
                    for i, piece in enumerate(group):
                        place = (row + i) * lanes + left
                        first, last = max(place, run.start), min(place + piece.shape[1], run.stop)
                        if first < last:
                            yield block, slice(first, last), piece[:, first - place : last - place]


def windows(law: Law, start: int | Tensor, twists: Tensor, size: int, period: int, window: slice) -> Runs | None:
    """Draw those of `size` numbers that lie in a window of every `period` of them, one window behind the other.

    Returns:
        As `pieces`; places are those among what is drawn. None where the rows of the grid do not hold whole periods.
    """
    lanes = -(-size // law.rows)
    if size == 0 or size % period or lanes % period:
        return None
    return _windows(law, start, twists, size // period, period, window, lanes // period)


def _windows(
    law: Law, start: int | Tensor, twists: Tensor, count: int, period: int, window: slice, in_row: int
) -> Runs:
    device, streams, width = twists.device, twists.numel(), window.stop - window.start
    if width == 0:
        return
    together = max(1, _chunk(device) // width)
    steps = _outputs(range(window.start, window.stop), device) + start
    for first in range(0, in_row, together):
        last = min(first + together, in_row)
        shifts = _outputs(range(first * period - 1, last * period - 1, period), device)
        begun = _begin((shifts.unsqueeze(1) + steps).flatten())
        height = max(1, _chunk(device) // begun.numel())
        for top in range(0, streams, height):
            block = slice(top, min(top + height, streams))
            for row, values in law.draw(_finish(begun, twists[block].unsqueeze(1))):
                if row * in_row + first >= count:
                    break
                for i, piece in enumerate(values.unbind(1)):
                    place = ((row + i) * in_row + first) * width
                    stop = min(place + piece.shape[1], count * width)
                    if place < stop:
                        yield block, slice(place, stop), piece[:, : stop - place]


def _lanes(lanes: int, run: slice) -> list[range]:
    """Which lanes of the grid a run of its numbers lies in."""
    if run.start >= run.stop:
        return []
    above, left = divmod(run.start, lanes)
    below, right = divmod(run.stop - 1, lanes)
    if above == below:
        return [range(left, right + 1)]
    return [range(right + 1), range(left, lanes)] if below == above + 1 and right < left else [range(lanes)]


def coins(start: int | Tensor, twists: Tensor, places: slice, chance: float) -> Tensor:
    """For each of the streams, and each of its numbers at these places, True with the given chance."""
    begun = _begin(_outputs(range(places.start, places.stop), twists.device) + start)
    return _finish(begun, twists.unsqueeze(1)) < int((chance - 0.5) * 2**64 * (1 - 2**-52))


def _moved(start: int | Tensor, lanes: int) -> int | Tensor:
    """The state of SplitMix64, begun at `start`, after that many outputs."""
    return _wrapped(start + _signed(lanes * _GOLDEN))
