"""Evaluating a plane a part of its directions at a time: which parts, how large, and putting them together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError
from .leaving import plain_run
from .side_effects import rehearsal

Part = list[slice]  # runs of directions that are carried together


def parts_of(k: int, size: int, crossed: bool) -> list[Part]:
    """Parts of K directions, each of at most ``size``.

    Where ``crossed``, every two directions must meet in a part: parts are then any two blocks of half the size.

    >>> parts_of(5, 2, crossed=False)
    [[slice(0, 2, None)], [slice(2, 4, None)], [slice(4, 5, None)]]
    >>> len(parts_of(6, 4, crossed=True))
    3
    """
    step = size // 2 if crossed else size
    blocks = [slice(start, min(start + step, k)) for start in range(0, k, step)]
    if not crossed:
        return [[block] for block in blocks]
    return [[a, b] for i, a in enumerate(blocks) for b in blocks[i + 1 :]]


def joined(k: int, parts: Sequence[Part], pieces: Sequence[Tensor], square: bool) -> Tensor:
    """What was found for each part, by direction: (K, ...), or (K, K) from the squares of parts."""
    where = [torch.cat([torch.arange(k)[run] for run in part]).to(pieces[0].device) for part in parts]
    whole = pieces[0].new_empty((k, k) if square else (k, *pieces[0].shape[1:]))
    for index, piece in zip(where, pieces, strict=True):
        if square:
            whole[index[:, None], index] = piece
        else:
            whole[index] = piece
    return whole


def checked(size: int, k: int, block: int, crossed: bool) -> int:
    """A chunk that a user named.

    Raises:
        ArgumentError: it cannot be evaluated.
    """
    least = 2 if crossed else block
    if isinstance(size, bool) or not isinstance(size, int) or size < min(least, k):
        raise ArgumentError(f"chunk must be 'auto' or an integer of at least {min(least, k)} here, got {size!r}")
    if not crossed and size < k and size % block:
        raise ArgumentError(f"chunk must be a multiple of the {block} directions of a plane, got {size}")
    return min(size, k)


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
    """Bytes that nobody uses on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Alive(TorchDispatchMode):
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
                    weakref.finalize(t, self._gone, t.nbytes)
            self.peak = max(self.peak, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def activations(closure: Callable[[], Any], params: Sequence[Tensor]) -> int:
    """Bytes that a plain run of the closure keeps alive at once; the run leaves no trace."""
    with plain_run(params), rehearsal(), _Alive() as alive:
        closure()
    return alive.peak
