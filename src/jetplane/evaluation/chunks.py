"""Evaluating a plane some of its directions at a time: which ones together, how many, and putting the runs together."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _sharding
from .._torch import TorchDispatchMode, tree_leaves
from ..directions import AbstractDirections, SelectedDirections
from .eager import evaluate_at_once
from .entrance import Entrance, LastEntrance
from .leaving import plain_run
from .plane import PlaneModel
from .repeats import RepeatedClosure
from .side_effects import without_side_effects
from .specification import PlaneSpec

Runs = list[slice]  # consecutive directions, several times: those of one run of the closure


def evaluate_in_chunks(
    closure: Callable[[], Tensor], params: Sequence[Tensor], directions: AbstractDirections, spec: PlaneSpec
) -> PlaneModel:
    """The plane by several runs of the closure, each with at most ``spec.chunk`` directions.

    All runs but the last are without side effects. Where every two directions have a second derivative, they must
    meet in a run: then each two blocks of half a chunk are one. Gauss-Newton planes of parameters that are not
    sharded need no such runs: see `jetplane.evaluation.entrance`.

    Raises:
        As `jetplane.evaluate`, and `RandomClosureError` where the runs give different losses.
    """
    crossed, block = spec.crossed, spec.block
    one_by_one = crossed and spec.gauss_newton and not any(_sharding.is_sharded(p) for p in params)
    if one_by_one:
        crossed, block = False, 1
    if isinstance(spec.chunk, int):
        size = min(spec.chunk, spec.k)
    else:
        room = free_memory(params[0].device) // 2 if spec.memory is None else spec.memory
        size = affordable(spec.k, block, spec.order == 2, crossed, activations(closure, params), room)
    closure = RepeatedClosure.of(closure, params)
    whole = spec.at_once()
    if size >= spec.k:
        return evaluate_at_once(closure, params, directions, whole)
    if one_by_one:
        model = _gauss_newton(closure, params, directions, whole, size)
        if model is not None:
            return model
        crossed = True
    return _assembled(closure, params, directions, whole, chunks_of(spec.k, max(size, 2) if crossed else size, crossed))


def _gauss_newton(
    closure: Callable[[], Tensor], params: Sequence[Tensor], directions: AbstractDirections, spec: PlaneSpec, size: int
) -> PlaneModel | None:
    """A Gauss-Newton plane, put together where the model's outputs enter losses; None where that cannot be."""
    runs = [run for (run,) in chunks_of(spec.k, size, crossed=False)]
    kept = []
    for run in runs[:-1]:
        entrance = Entrance()
        chosen = SelectedDirections(directions, [run])
        with without_side_effects():
            evaluate_at_once(closure, params, chosen, PlaneSpec(chosen.k, "ggn"), entrance)
        if entrance.barred:
            return None
        kept.append(entrance.kept)
    return evaluate_at_once(closure, params, directions, spec, LastEntrance(kept, runs[-1]))


def _assembled(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    directions: AbstractDirections,
    spec: PlaneSpec,
    chunks: list[Runs],
) -> PlaneModel:
    """A plane from the planes of its chunks."""
    models: list[PlaneModel] = []
    for chunk in chunks:
        chosen = SelectedDirections(directions, chunk)
        last = len(models) + 1 == len(chunks)
        with contextlib.nullcontext() if last else without_side_effects():
            models.append(evaluate_at_once(closure, params, chosen, spec.restricted(chosen.k)))

    def joined(pieces: list[Tensor | None], square: bool = False) -> Tensor | None:
        known = [piece for piece in pieces if piece is not None]
        return by_direction(spec.k, chunks, known, square) if len(known) == len(pieces) else None

    slope = joined([m.slope for m in models])
    assert slope is not None
    if isinstance(spec.pairs, int):
        planes = [m.curvature for m in models if m.curvature is not None]
        curvature = torch.cat(planes) if planes else None
    else:
        curvature = joined([m.curvature for m in models], spec.crossed)
    examples = joined([None if m.examples is None else m.examples.T for m in models])
    materialized = sum((Counter(m.materialized) for m in models), Counter())
    return PlaneModel(models[-1].value, slope, curvature, None if examples is None else examples.T, materialized)


def chunks_of(k: int, size: int, crossed: bool) -> list[Runs]:
    """K directions in chunks of at most ``size``.

    Where ``crossed``, every two directions must meet in one: chunks are then any two blocks of half the size.

    >>> chunks_of(5, 2, crossed=False)
    [[slice(0, 2, None)], [slice(2, 4, None)], [slice(4, 5, None)]]
    >>> len(chunks_of(6, 4, crossed=True))
    3
    """
    step = size // 2 if crossed else size
    blocks = [slice(start, min(start + step, k)) for start in range(0, k, step)]
    if not crossed:
        return [[block] for block in blocks]
    return [[a, b] for i, a in enumerate(blocks) for b in blocks[i + 1 :]]


def by_direction(k: int, chunks: Sequence[Runs], pieces: Sequence[Tensor], square: bool) -> Tensor:
    """Numbers of all directions from those of each chunk: (K, ...), or (K, K, ...) from square pieces."""
    where = [torch.cat([torch.arange(k)[run] for run in runs]).to(pieces[0].device) for runs in chunks]
    whole = pieces[0].new_empty((k, k, *pieces[0].shape[2:]) if square else (k, *pieces[0].shape[1:]))
    for index, piece in zip(where, pieces, strict=True):
        if square:
            whole[index[:, None], index] = piece
        else:
            whole[index] = piece
    return whole


def affordable(k: int, block: int, second: bool, crossed: bool, activations: int, memory: int) -> int:
    """The largest chunk whose coefficients fit into ``memory`` bytes, or the smallest that there is.

    A plain run keeps ``activations`` bytes alive at once, and each coefficient needs as many; ``second`` says
    whether there are second ones.
    """
    step = 2 if crossed else block

    def coefficients(c: int) -> int:
        return c + (c * ((c if crossed else block) + 1) // 2 if second else 0)

    size = step
    while size < k and coefficients(size + step) * activations <= memory:
        size += step
    return min(size, k)


def free_memory(device: torch.device) -> int:
    """Bytes of a device that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _LiveBytes(TorchDispatchMode):
    """Adds up the tensors that operators made and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            for t in tree_leaves(result):
                if isinstance(t, Tensor):
                    self.now += t.nbytes
                    weakref.finalize(t, self._freed, t.nbytes)
            self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def activations(closure: Callable[[], Any], params: Sequence[Tensor]) -> int:
    """The most bytes that a plain run of the closure keeps alive at once; the run is without side effects."""
    with plain_run(params), without_side_effects(), _LiveBytes() as live:
        closure()
    return live.peak
