"""This process: what is mapped where, the symbols of its libraries, and lines of their source."""

from __future__ import annotations

import bisect
import ctypes
import functools
import hashlib
import mmap
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Region(NamedTuple):
    """A mapping of memory."""

    start: int
    end: int
    rights: str
    path: str


class Maps:
    """The mappings of this process at one moment."""

    def __init__(self) -> None:
        self.regions = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            start, end = (int(x, 16) for x in words[0].split("-"))
            self.regions.append(Region(start, end, words[1], words[5] if len(words) > 5 else ""))
        self._starts = [r.start for r in self.regions]
        self._bases: dict[str, int] = {}
        for r in self.regions:
            if r.path.startswith("/"):
                self._bases.setdefault(r.path, r.start)

    def at(self, address: int) -> Region | None:
        """The mapping that an address lies in."""
        n = bisect.bisect_right(self._starts, address) - 1
        return self.regions[n] if n >= 0 and address < self.regions[n].end else None

    def executable(self, address: int) -> bool:
        """Whether there is code at an address."""
        region = self.at(address)
        return region is not None and "x" in region.rights and "r" in region.rights

    def constant(self, address: int, size: int) -> bool:
        """Whether memory can be read and not written to."""
        region = self.at(address)
        return region is not None and "r" in region.rights and "w" not in region.rights and address + size <= region.end

    def module(self, address: int) -> Module | None:
        """The library that an address belongs to."""
        region = self.at(address)
        if region is None:
            return None
        path = region.path
        if not path:  # zeroed data behind a library's file
            n = self.regions.index(region)
            path = self.regions[n - 1].path if n and self.regions[n - 1].end == region.start else ""
            if "x" in region.rights:
                return None
        if not path.startswith("/") or path not in self._bases:
            return None
        return _module(path, self._bases[path])

    def writable(self, module: Module) -> list[tuple[int, int]]:
        """The memory of a library that its code may write to: (start, end)."""
        found, last = [], None
        for r in self.regions:
            behind = last is not None and not r.path and r.start == last.end and last.path == module.path
            # Memory of others may lie next to it, and may be given back at any time.
            end = min(r.end, module.end)
            if (r.path == module.path or behind) and "w" in r.rights and r.start < end:
                found.append((r.start, end))
            last = r
        return found


class Symbol(NamedTuple):
    """A function of a library."""

    start: int
    size: int
    name: str


@dataclass(frozen=True, eq=False)
class Module:
    """A library that is mapped here."""

    path: str
    base: int

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.path).name

    @functools.cached_property
    def identity(self) -> str | None:
        """A hash of the file; None where it is not there any more."""
        if not Path(self.path).exists():
            return None
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:24]

    @functools.cached_property
    def end(self) -> int:
        """Where its memory ends, with its zeroed data: by the file, since other mappings may follow without a gap."""
        try:
            return self.base + _extent(Path(self.path).read_bytes())
        except (OSError, struct.error):
            return self.base

    @functools.cached_property
    def symbols(self) -> list[Symbol]:
        """Functions by address."""
        try:
            return sorted(set(_functions(Path(self.path).read_bytes(), self.base)))
        except (OSError, struct.error, IndexError):
            return []

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [s.start for s in self.symbols]

    def symbol(self, address: int) -> Symbol | None:
        """The function that an address lies in."""
        n = bisect.bisect_right(self._starts, address) - 1
        while n >= 0:
            s = self.symbols[n]
            same = [t for t in self.symbols[max(0, n - 8) : n + 1] if t.start == s.start]
            s = min(
                same, key=lambda t: (t.size == 0, t.name.startswith("_"), "f64" in t.name or "f32x" in t.name, t.name)
            )
            if address == s.start or s.start <= address < s.start + s.size:
                return s
            if address - s.start > 1 << 22 or s.size:
                return None
            n -= 1
        return None

    def line(self, address: int) -> str | None:
        """``file:line`` of an instruction, if the library has debug information and binutils are installed."""
        tool = shutil.which("addr2line")
        if tool is None:
            return None
        try:
            found = subprocess.run(
                [tool, "-e", self.path, hex(address - self.base)],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
        found = re.sub(r" \(discriminator \d+\)", "", found)
        return None if not found or found.startswith("??") or found.endswith((":?", ":0")) else found


@functools.cache
def _module(path: str, base: int) -> Module:
    return Module(path, base)


def _extent(data: bytes) -> int:
    """How far the segments of an ELF file reach in memory, in whole pages."""
    (offset,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + n * size) for n in range(count)]
    last = max((h[3] + h[6] for h in headers if h[0] == 1), default=0)  # PT_LOAD: virtual address and size in memory
    return -(-last // mmap.PAGESIZE) * mmap.PAGESIZE


def _functions(data: bytes, base: int) -> list[Symbol]:
    """Symbols of type FUNC and IFUNC in the tables of an ELF file."""
    if data[:5] != b"\x7fELF\x02":
        return []
    (offset,), (size, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + n * size) for n in range(count)]
    found = []
    for kind in (2, 11):  # SHT_SYMTAB, SHT_DYNSYM
        for section in sections:
            if section[1] != kind:
                continue
            names = sections[section[6]]
            strings = data[names[4] : names[4] + names[5]]
            for at in range(section[4], section[4] + section[5], 24):
                name, info, _, index, value, length = struct.unpack_from("<IBBHQQ", data, at)
                if info & 15 in (2, 10) and index and value:
                    text = strings[name : strings.index(b"\0", name)].decode(errors="replace")
                    found.append(Symbol(base + value, length, text))
    return found


def read(address: int, size: int) -> bytes:
    """Bytes of this process."""
    return ctypes.string_at(address, size)


def described(maps: Maps, address: int) -> tuple[str, str | None]:
    """How to name an address in a message, and its line of source: ``("step+0x1c of libburgers.so", "step.c:12")``."""
    module = maps.module(address)
    if module is None:
        return f"code at {address:#x}", None
    symbol = module.symbol(address)
    inside = f"{symbol.name}+{address - symbol.start:#x}" if symbol else f"{address - module.base:#x}"
    return f"{inside} of {module.name}", module.line(address)
