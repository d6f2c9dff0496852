"""Memory for large stacks of coefficients: fresh pages cost several times what writing to them does."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 1 << 23  # bytes from which on the C library asks the system for pages each time
WASTE = 1.5  # a block may be so much larger than what is put into it


class Memory:
    """Large tensors, in blocks that are used again as soon as no tensor looks into them.

    Blocks in use and kept ones together are never more than were in use at once. On Linux they are of huge pages
    where the system has them.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.UntypedStorage] = []
        self._most = 0
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized contiguous tensor of this shape, with dtype and device of another."""
        size = math.prod(shape) * like.element_size()
        if size < LARGE or like.device.type != "cpu":
            return like.new_empty(shape)
        with self._lock:  # until the tensor looks into it, a block seems to be free
            return torch.empty(0, dtype=like.dtype).set_(self._block(size), 0, torch.Size(shape))

    def _block(self, size: int) -> torch.UntypedStorage:
        free = [b for b in self._blocks if torch._C._storage_Use_Count(b._cdata) == 1]
        fitting = [b for b in free if size <= b.nbytes() <= WASTE * size]
        if fitting:
            return min(fitting, key=torch.UntypedStorage.nbytes)
        held = size + sum(b.nbytes() for b in self._blocks)
        self._most = max(self._most, held - sum(b.nbytes() for b in free))
        for block in free:  # the oldest first
            if held <= self._most:
                break
            self._blocks.remove(block)
            held -= block.nbytes()
        block = _pages(size)
        self._blocks.append(block)
        return block


def _pages(size: int) -> torch.UntypedStorage:
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # another system, or one without huge pages
        return torch.UntypedStorage(size)
    return torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
