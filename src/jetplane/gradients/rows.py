"""Internal: slopes of a loss's parts along changes of layers' outputs, and whose parts they are.

A loss tells its examples apart as parts, whose slopes add up to its own. The rows of a layer's output have parts of
their own in their order, or share them, or nothing of the kind is known:

- "own": as many parts for each row, in the order of rows; several where a row is a sequence of positions.
- "runs": a run of rows has one part, as where rows are positions and parts are sequences.
- "turns": rows have the parts in turn, as where a trunk runs once and what comes after it over micro-batches of one
  size: their losses are added up part by part.
- "unknown": none of these, as where rows are reordered or compared with each other. The slope of the whole loss is
  then each row's.

No count tells which it is. A pass does, in which each row's tangent is multiplied by a random number that is the same
for all rows of a part: the slope of each part is then as many times what it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..directions.laws import key
from ..evaluation.context import expansion
from ..evaluation.interception import Interception
from ..evaluation.side_effects import without_side_effects
from ..jets import MODEL, Coefficients, Diagonal, Jet, parts, promoted
from ..rules.examples import known
from .noise import signs
from .passes import Closure, hooked

Order = Literal["own", "runs", "turns", "unknown"]
Tangents = Callable[[nn.Module, int, Tensor, Tensor], Tensor]  # of a module's call, with its input and output
Rows = Callable[[torch.Size], int]  # how many rows an output of this shape has

_DRAWS = 8  # passes, at most, that tell whether parts depend on rows of their own more than by chance
_SIGNIFICANT = 4.0  # standard deviations


class Slopes(NamedTuple):
    """Slopes of the loss's parts along a layer's tangents.

    Attributes:
        values: (parts, calls, samples), with ``calls`` those of the layer's plan. One part if the loss does not tell
            its examples apart.
        rows: of the output of each call.
    """

    values: Tensor
    rows: tuple[int, ...]

    def of(self, call: int) -> Tensor:
        """Those of a call, (parts, samples): of the loss's parts that its rows have, or of their sum."""
        apart = self.values.shape[1]
        own = self.values[:, call % apart]
        if apart == 1:
            return own
        # Outputs that are put side by side before the loss have their parts of it one after another.
        before, side_by_side = sum(self.rows[:call]), sum(self.rows)
        times = len(own) // side_by_side
        begin, end = before * times, (before + self.rows[call]) * times
        if times * side_by_side == len(own) and not bool(own[:begin].any() or own[end:].any()):
            return own[begin:end]
        # The losses of micro-batches are added up where they are equally long: see `jetplane.rules.examples`.
        start = every = 0
        for i, rows in enumerate(self.rows):
            added = every in (0, rows) or 1 in (every, rows)
            start = (0 if added else every) if i == call else start
            every = max(every, rows) if added else every + rows
        times = max(1, len(own) // every)
        begin, end = start * times, (start + self.rows[call]) * times
        fits = len(own) == times * every and not bool(own[:begin].any() or own[end:].any())
        return own[begin:end] if fits else own.sum(0, keepdim=True)

    def whole(self) -> Tensor:
        """Those of all calls side by side, (parts of all calls, samples)."""
        return torch.cat([self.of(call) for call in range(len(self.rows))]) if self.values.shape[1] > 1 else self.of(0)


def slopes_along(
    closure: Closure, modules: Collection[nn.Module], tangents: Tangents, rows: Rows, calls: int, samples: int
) -> Slopes | None:
    """Slopes along tangents of modules that move together, in one pass; None if the loss does not depend on them.

    Args:
        closure: returns the loss.
        modules: those that move.
        tangents: changes of an output, (samples, *its shape).
        rows: see `Rows`.
        calls: of a module in a pass, that have directions of their own; 1 if all share theirs.
        samples: how many tangents there are.
    """
    met: dict[nn.Module, list[int]] = {}
    with without_side_effects(), expansion(Diagonal(calls * samples), 1, examples=True) as space:

        def after(module: nn.Module, call: int, x: object, y: object) -> Jet:
            at, first, _ = parts(y, space)
            met.setdefault(module, []).append(rows(at.shape))
            moved = tangents(module, call, parts(x, space)[0], at)
            begin = call % calls * samples
            own = None if calls == 1 else tuple(range(begin, begin + samples))
            return Jet(at, first + Coefficients(space, 1, moved, own), None, space, kind=MODEL)

        with hooked(after, modules, space=space), Interception(space).running():
            loss = closure()
        jet = promoted(loss)
        loss = loss if jet is None else jet
        coefficients = parts(loss, space)[1]
        if not coefficients:
            return None
        slope = coefficients.full((), coefficients.tensor.dtype, coefficients.tensor.device).reshape(-1)
        found = known(loss, slope)
        values = (slope if found is None else found).reshape(-1, calls, samples)
        return Slopes(values, tuple(next(iter(met.values()), ())))


def grouped(slopes: Tensor, n: int, order: Order) -> Tensor:
    """Slopes of parts (parts, K) by the rows that have them, (n, K).

    >>> grouped(torch.tensor([[1.0], [2.0]]), 4, "turns").T
    tensor([[1., 2., 1., 2.]])
    >>> grouped(torch.tensor([[1.0], [2.0]]), 4, "own").T  # parts were as many as rows, and are fewer now
    tensor([[3., 3., 3., 3.]])
    """
    count = len(slopes)
    if count == n and order != "unknown":
        return slopes
    if order == "own" and n and count % n == 0:
        return slopes.reshape(n, count // n, -1).sum(1)
    if order in ("runs", "turns") and count and n % count == 0:
        return slopes.repeat_interleave(n // count, 0) if order == "runs" else slopes.repeat(n // count, 1)
    return slopes.sum(0).expand(n, -1)


class Told(NamedTuple):
    """What a loss tells of layers.

    Attributes:
        order: whose its parts are.
        parts: how many it has, in all calls; 0 if it does not depend on the layers.
    """

    order: Order
    parts: int


def told(closure: Closure, modules: Sequence[nn.Module], rows: Rows, calls: int, roughly: bool) -> list[Told]:
    """Whose parts a loss has, for layers with as many rows each.

    Two or three passes tell, if it is the same for all of them; else each has passes of its own.

    Args:
        closure: returns the loss.
        modules: the layers.
        rows: see `Rows`.
        calls: see `slopes_along`.
        roughly: whether parts may depend on other rows too, which biases estimates, if they depend on their own more
            than by chance: as behind a normalization by means of a batch.
    """
    found = _told(closure, modules, rows, calls, roughly)
    if found.order == "unknown" and found.parts > 1 and len(modules) > 1:
        return [_told(closure, [module], rows, calls, False) for module in modules]
    return [found] * len(modules)


def _told(closure: Closure, modules: Sequence[nn.Module], rows: Rows, calls: int, roughly: bool) -> Told:
    number = {module: i for i, module in enumerate(modules)}

    def slopes(order: Order = "own", weights: Sequence[Tensor] = ()) -> Slopes | None:
        def tangents(module: nn.Module, call: int, x: Tensor, y: Tensor) -> Tensor:
            noise, n = signs(key(number[module], call), range(1), y.shape, y), rows(y.shape)
            if not weights:
                return noise
            weight = grouped(weights[call % calls].to(noise), n, order)
            return (noise.reshape(n, -1) * weight).reshape(noise.shape)

        return slopes_along(closure, modules, tangents, rows, calls, 1)

    plain = slopes()
    if plain is None:
        return Told("unknown", 0)
    own, sizes = [plain.of(call) for call in range(calls)], plain.rows[:calls]
    before, count, n = torch.cat(own), sum(map(len, own)), len(own[0])
    if n == sizes[0] == 1:
        return Told("own", count)
    if n <= 1 or sizes[0] < 1 or not bool(before.any()):
        return Told("unknown", count)
    candidates: tuple[Order, ...] = ("own",) if n % sizes[0] == 0 else ("turns", "runs") if sizes[0] % n == 0 else ()
    generator = torch.Generator("cpu").manual_seed(0)
    for strictly in (True, False):
        for order in candidates if strictly or roughly else ():
            found = []
            for _ in range(1 if strictly else _DRAWS):
                units = [min(len(s), size) for s, size in zip(own, sizes, strict=True)]
                drawn = [2 * torch.rand(unit, 1, generator=generator, device="cpu") - 1 for unit in units]
                moved = slopes(order, drawn)
                weights = [w.to(s).repeat_interleave(len(s) // len(w), 0) for s, w in zip(own, drawn, strict=True)]
                if moved is not None:
                    after = torch.cat([moved.of(call) for call in range(calls)])
                    found.append((after, before * torch.cat(weights)))
                if (_alike if strictly else _related)(found, before):
                    return Told(order, count)
    return Told("unknown", count)


Pairs = Sequence[tuple[Tensor, Tensor]]  # parts' slopes along weighed tangents, and what they would be


def _alike(pairs: Pairs, before: Tensor) -> bool:
    rounding = torch.finfo(before.dtype).eps ** 0.5 * before.abs().max()
    return bool(pairs) and all(a.shape == b.shape and bool(((a - b).abs() <= rounding).all()) for a, b in pairs)


def _related(pairs: Pairs, before: Tensor) -> bool:
    products = [(a * b).double() for a, b in pairs if a.shape == b.shape]
    if not products:
        return False
    every = torch.cat(products)
    return bool(every.sum() > _SIGNIFICANT * every.square().sum().sqrt())
