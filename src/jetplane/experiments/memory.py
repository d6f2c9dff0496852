"""Resident memory of this process: what it holds now, and at most so far."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's names for its settings, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_SMALL = 1 << 16


def peak() -> int:
    """Peak resident memory in bytes."""
    if sys.platform == "linux":
        return _status("VmHWM:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> int:
    """Reset the peak where the system allows it; returns the resident memory in bytes at this moment."""
    if sys.platform != "linux":
        return peak()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS:")


def give_back() -> None:
    """Give free memory back to the system, and from now on each freed block above 64 KiB at once.

    Otherwise what one part of a program has used and freed hides what the next one uses. It does nothing without glibc.
    """
    gc.collect()
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _SMALL)
        library.mallopt(_TRIM_THRESHOLD, _SMALL)
        library.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
