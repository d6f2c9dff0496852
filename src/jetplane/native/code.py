"""A program compiled for one layout of coefficients, kept on disk, and run in the arena."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import NativeCodeError
from ..llvm import compiler
from . import library
from .arena import (
    END,
    EXIT,
    FREE,
    FULL,
    HEAP,
    MEMORY,
    MOST_REGIONS,
    NORESERVE,
    REGIONS,
    SITE,
    STACK,
    TABLE,
    TARGET,
    THREAD,
    TRAP,
    UNKNOWN,
    Arena,
    arena,
)
from .coefficients import Layout
from .module import WORDS, Module
from .process import Module as Library
from .process import read
from .program import Program
from .registers import INTEGERS

SAVED = 1 << 24  # bytes of a library's own data up to which they are set back where a run is not finished
ROUNDS = 200  # how often a program is lifted again for what running has found


@dataclass
class Report:
    """What was lifted for one layout of coefficients.

    Attributes:
        instructions, functions: how many.
        libraries: those that were entered.
        rules: functions with a rule of their own that are called.
        refused: what is not carried, and was not reached.
        lift_s, compile_s: seconds.
        cached: whether the code came from disk.
        rounds: how often it was lifted for calls and jumps that running found.
    """

    instructions: int = 0
    functions: int = 0
    libraries: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    lift_s: float = 0.0
    compile_s: float = 0.0
    cached: bool = False
    rounds: int = 1


class Unknown(Exception):
    """Lifted code has come to a place that was not known; now it is."""


class Code:
    """A program with coefficients of one layout, compiled; ``quick``: in less time, to code that takes more."""

    def __init__(self, program: Program, layout: Layout, name: str, *, quick: bool = False, build: bool = True) -> None:
        self.program, self.layout, self.name, self.quick = program, layout, name, quick
        self.arena = arena()
        self.report = Report()
        self._words = (ctypes.c_uint64 * (WORDS + 8 * (1 + layout.stride)))()
        self._shadows: list[tuple[int, int, mmap.mmap]] = []
        self._own: list[tuple[int, int]] = []  # the data of libraries that were lifted
        self.sites: list[tuple[int, str]] = []
        self._entered: set[Library] = set()
        if build:
            self._build()

    @classmethod
    def kept(cls, program: Program, layout: Layout, name: str) -> Code | None:
        """From disk, if it is there."""
        code = cls(program, layout, name, build=False)
        return code if code._recalled() else None

    # --- made ---------------------------------------------------------------------------------------------

    def _build(self) -> None:
        start = time.perf_counter()
        program = self.program
        program.discover()
        module = Module(program, self.layout, self.arena.size)
        text = module.text()
        while any([program.learn(*each) for each in module.found]):  # all of them
            program.discover()
            module = Module(program, self.layout, self.arena.size)
            text = module.text()
        lifted = time.perf_counter()
        code = compiler.compiled(text, slp=self.layout.stride == 1, level=0 if self.quick else 2)
        self.sites, self.assembly = module.sites, text
        report = self.report
        report.instructions = sum(len(f.instructions) for f in program.functions.values())
        report.functions = len(program.functions)
        report.rules = tuple(sorted(program.used))
        report.lift_s, report.compile_s, report.cached = lifted - start, time.perf_counter() - lifted, False
        libraries = {program.decoder.maps.module(e) for e in program.functions}
        self._entered = {m for m in libraries if m is not None}
        report.libraries = tuple(sorted(m.name for m in self._entered))
        report.refused = tuple(
            sorted(
                {why.split(". Give")[0] for _, why in module.sites if why.startswith(("no rule", "calls", "an instr"))}
            )
        )
        self._link(code, module.libraries, {n: at for n, (_, at) in module.externals.items()})
        if module.movable and None not in libraries and not self.quick:
            self._keep(code, module)

    def _link(self, code: bytes, libraries: Sequence[Library], externals: dict[str, int]) -> None:
        symbols = {
            "jp_arena": self.arena.base,
            "jp_shadow": self.arena.shadow(self.layout),
            "jp_state": ctypes.addressof(self.arena.state),
            **{f"jp_base_{n}": m.base for n, m in enumerate(libraries)},
            **externals,
        }
        self._engine = compiler.linked(code, symbols)
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address("run"))
        self._follow()

    def _follow(self) -> None:
        """Shadows of the data of the libraries whose code was lifted, and of what running has found."""
        self._shadows = []
        self._own = []
        for module in self._entered:
            if not library.SYSTEM.match(module.name):
                self._own += self.program.decoder.maps.writable(module)
        for start, end in _joined([*self._own, *self.program.followed])[:MOST_REGIONS]:
            size = (end - start) * self.layout.stride + 64
            shadow = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
            self._shadows.append((start, end, shadow))

    # --- kept on disk -------------------------------------------------------------------------------------

    def _key(self) -> str | None:
        module = self.program.decoder.maps.module(self.program.entry)
        if module is None or module.identity is None:
            return None
        return compiler.hashed(
            _version(), module.identity, str(self.program.entry - module.base), repr(self.layout), str(self.arena.size),
            repr(self.program.constants), repr(sorted(self.program.custom)),
        )  # fmt: skip

    def _keep(self, code: bytes, module: Module) -> None:
        key = self._key()
        if key is None:
            return
        maps = self.program.decoder.maps

        def place(address: int) -> list[object]:
            owner = maps.module(address)
            return [owner.path, address - owner.base] if owner else [None, address]

        self_report = {k: v for k, v in vars(self.report).items() if k not in ("lift_s", "compile_s", "cached")}
        head = {
            "libraries": [[m.path, m.identity] for m in module.libraries],
            "entered": [[m.path, m.identity] for m in {maps.module(f) for f in self.program.functions} if m],
            "externals": {n: at and n for n, (_, at) in module.externals.items()},
            "sites": [[*place(a), why] for a, why in module.sites],
            "known": [[*place(a), [place(t) for t in row]] for a, row in self.program.known.items()],
            "opened": [place(a) for a in self.program.opened],
            "report": self_report,
        }
        text = json.dumps(head).encode()
        compiler.keep(key, len(text).to_bytes(8, "little") + text + code)

    def _recalled(self) -> bool:
        start = time.perf_counter()
        key = self._key()
        data = compiler.recall(key) if key else None
        if data is None or self.program.custom or self.program.constants:
            return False
        n = int.from_bytes(data[:8], "little")
        head, code = json.loads(data[8 : 8 + n]), data[8 + n :]
        maps = self.program.decoder.maps
        by_path: dict[str, Library] = {}
        for path, identity in [*head["libraries"], *head["entered"]]:
            base = maps._bases.get(path)
            found = maps.module(base) if base else None
            if found is None or found.identity != identity:
                return False
            by_path[path] = found

        def place(path: str | None, offset: int) -> int:
            return by_path[path].base + offset if path in by_path else -1

        externals = {n: library.external(n.removeprefix("jp.")) for n in head["externals"]}
        if not all(externals.values()):
            return False
        for path, offset, row in head["known"]:
            self.program.known[place(path, offset)] = [place(*t) for t in row]
        self.program.opened |= {place(*t) for t in head["opened"]}
        self.sites = [(place(path, offset), why) for path, offset, why in head["sites"]]
        self._entered = {by_path[path] for path, _ in head["entered"]}
        libraries = [by_path[path] for path, _ in head["libraries"]]
        for name, value in head["report"].items():
            setattr(self.report, name, tuple(value) if isinstance(value, list) else value)
        self._link(code, libraries, externals)
        self.report.cached, self.report.lift_s = True, 0.0
        self.report.compile_s = time.perf_counter() - start
        return True

    # --- run ----------------------------------------------------------------------------------------------

    def run(self, prepare: Callable[[Arena], tuple[int, int]]) -> None:
        """Run it.

        Args:
            prepare: fills `words` and the arena; gives the first free address of the heap, and the stack pointer.

        Raises:
            NativeCodeError: it does something that is not carried.
            Unknown: it came to a place that was not known. Quick code is then made again until it comes to its end.
        """
        for _ in range(ROUNDS):
            heap, stack = prepare(self.arena)
            self._reset(heap)
            self._words[INTEGERS.index("rsp")] = stack
            before = [(start, read(start, end - start)) for start, end in self._own if end - start <= SAVED]
            self._run(ctypes.addressof(self._words))
            state = self.arena.state
            if not state[EXIT]:
                break
            # Half a run must not leave half a state. Only of libraries that were lifted: others are used meanwhile.
            for start, data in before:
                ctypes.memmove(start, data, len(data))
            self._left(int(state[EXIT]), int(state[SITE]), int(state[TARGET]))
            if state[EXIT] == MEMORY:
                continue
            if not self.quick:
                raise Unknown
            rounds = self.report.rounds
            self._build()
            self.report.rounds = rounds + 1
        else:
            raise NativeCodeError(f"{self.name} jumps to more than {ROUNDS} addresses that are known only at run time")
        if self.arena.state[TRAP]:
            address, why = self.sites[self.arena.state[TRAP] - 1]
            raise self.program.describe(why, address, self.name)

    @property
    def words(self) -> ctypes.Array[ctypes.c_uint64]:
        """What it is handed, and what it returns: `WORDS` integers, then 8 doubles with their coefficients."""
        return self._words

    def _reset(self, heap: int) -> None:
        state = self.arena.state
        for n in range(FREE, TABLE):
            state[n] = 0
        state[HEAP], state[END] = (heap + 63) // 64 * 64, self.arena.base + self.arena.size - STACK
        state[EXIT] = state[TRAP] = 0
        state[THREAD] = _thread()
        state[REGIONS] = len(self._shadows)
        for n, (start, end, shadow) in enumerate(self._shadows):
            shadow.madvise(mmap.MADV_DONTNEED)
            at = ctypes.addressof(ctypes.c_char.from_buffer(shadow))
            state[TABLE + 3 * n], state[TABLE + 3 * n + 1], state[TABLE + 3 * n + 2] = start, end - start, at

    def _left(self, why: int, site: int, target: int) -> None:
        if why == FULL:
            raise NativeCodeError(
                f"{self.name} asks for {target} bytes, more than is left of {self.arena.size >> 20} MiB of the arena"
            )
        address, text = self.sites[site]
        if why == MEMORY and self.program.follow(target):
            self._follow()
            return
        if why != UNKNOWN:
            raise self.program.describe(text, address, self.name)
        if not self.program.learn(address, target):
            raise self.program.describe(f"goes to {target:#x}, which cannot be followed", address, self.name)


def _joined(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of addresses, those that touch made one: an array of a library may lie in several mappings."""
    made: list[tuple[int, int]] = []
    for start, end in sorted(set(places)):
        if made and start <= made[-1][1]:
            made[-1] = made[-1][0], max(end, made[-1][1])
        else:
            made.append((start, end))
    return made


@functools.cache
def _version() -> str:
    """A hash of what makes code: another version of it does not run what this one kept."""
    rows = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in rows)).hexdigest()


def _thread() -> int:
    f = ctypes.CDLL(None).pthread_self
    f.restype = ctypes.c_uint64
    return f()
