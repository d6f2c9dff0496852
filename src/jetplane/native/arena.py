"""The arena: memory that lifted code writes, the state that it shares with this process, and shadows of both.

What code may write (arguments, heap, stack) lies in one arena. The coefficients of the double at ``arena + 8 i`` are
at ``shadow + 8 stride i``.
"""

from __future__ import annotations

import ctypes
import functools
import mmap

from .coefficients import Layout

NORESERVE = 0x4000
SIZE = 1 << 30
STACK = 1 << 26

# The words of the state that lifted code and this process share.
HEAP, EXIT, SITE, TARGET, TRAP, END, THREAD, REGIONS, FREE, TABLE = 0, 1, 2, 3, 4, 5, 6, 7, 8, 80
MOST_REGIONS = 64
UNKNOWN, REFUSED, FULL, MEMORY = 1, 2, 3, 4  # why lifted code was left: values of EXIT


class Arena:
    """Memory that lifted code writes: [arguments and heap, growing up | stack, growing down]."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._map, self.base = _mapped(size)
        self._shadows: dict[int, tuple[mmap.mmap, int]] = {}
        self.state = (ctypes.c_uint64 * (TABLE + 3 * MOST_REGIONS))()
        self._filled: dict[tuple[int, int], int] = {}

    def shadow(self, layout: Layout) -> int:
        """Where coefficients of this layout are."""
        if layout.stride not in self._shadows:
            self._shadows[layout.stride] = _mapped((self.size + 64) * layout.stride)
        return self._shadows[layout.stride][1]

    @property
    def stack(self) -> int:
        """The top of the stack, a multiple of 64."""
        return self.base + self.size - 8192


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


@functools.cache
def arena() -> Arena:
    """The arena of this process."""
    return Arena()
