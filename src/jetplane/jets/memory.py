"""Memory of coefficients: fresh pages cost several times what writing to them does."""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

LARGE, LARGEST = 1 << 23, 1 << 25  # bytes from which on the C library may, and does, ask for fresh pages each time
FEW = 3  # directions up to which little memory matters more than little time
FREED = 1 << 24  # bytes of a block that is freed once: see `keep_freed`


@functools.cache
def keep_freed() -> None:
    """Have the C library keep up to 32 MiB of freed memory for the next evaluation, which would otherwise map it anew.

    At the end of its heap glibc keeps free memory up to twice the size of the largest block that it has mapped and
    freed so far. Here it frees such a block, which nobody has written to. Thresholds that the user has set
    (``MALLOC_TRIM_THRESHOLD_``, ``mallopt``) stay as they are; for other C libraries nothing changes.
    """
    torch.empty(FREED, dtype=torch.uint8, device="cpu")


class Memory:
    """A region of addresses in which large tensors take the place of those that nobody looks into any more.

    Only what was written to takes memory, in huge pages where the system has them. Where there are no such regions,
    each tensor has memory of its own.

    Args:
        k: number of directions.
    """

    def __init__(self, k: int) -> None:
        self._least = LARGE if k > FEW else LARGEST
        self._taken: list[tuple[int, int, StorageWeakRef]] = []  # from, to, by whom; in order
        self._lock = threading.Lock()

    @functools.cached_property
    def _region(self) -> mmap.mmap | None:
        try:  # as many addresses as there is memory
            size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            region.madvise(mmap.MADV_HUGEPAGE)
        except (AttributeError, OSError, ValueError):
            return None
        return region

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized contiguous tensor of this shape, with dtype and device of another."""
        size = math.prod(shape) * like.element_size()
        if size < self._least or like.device.type != "cpu":
            return like.new_empty(shape)
        with self._lock:
            region = self._region
            if region is None:
                return like.new_empty(shape)
            for n, (start, end) in enumerate(self._gaps(region)):
                if start + size <= end:
                    flat = torch.frombuffer(region, dtype=like.dtype, count=math.prod(shape), offset=start)
                    end = start + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
                    self._taken.insert(n, (start, end, StorageWeakRef(flat.untyped_storage())))
                    return flat.view(shape)
        return like.new_empty(shape)

    def trim(self) -> None:
        """Give back what nobody looks into."""
        with self._lock:
            region = self._region if self._taken else None
            if region is not None:
                for start, end in self._gaps(region):
                    if start < end:
                        region.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _gaps(self, region: mmap.mmap) -> list[tuple[int, int]]:
        """What is free, from and to, before each place that is taken and behind all of them."""
        self._taken = [place for place in self._taken if not place[2].expired()]
        starts = [0, *(end for _, end, _ in self._taken)]
        return list(zip(starts, [*(start for start, _, _ in self._taken), len(region)], strict=True))
