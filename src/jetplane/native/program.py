"""A function of machine code and all that it calls, as one module of LLVM; compiled, and run in the arena."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import NativeCodeError
from ..llvm import compiler
from . import decode, library, mathematics, system
from .coefficients import Layout
from .lifting import Lifter
from .memory import (
    END,
    EXIT,
    FREE,
    FULL,
    HEAP,
    MEMORY,
    METADATA,
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
    functions,
)
from .process import Maps, described, read
from .process import Module as Library
from .registers import DOUBLES, INTEGERS, MASK, PRESERVED, RETURNED, touched

WORDS = 16  # integers at the head of what a call is handed
SAVED = 1 << 24  # bytes of a library's own data up to which they are set back where a run is not finished
ROUNDS = 200  # how often a program is lifted again for what running has found


@dataclass
class Profile:
    """Registers that a function takes, returns, and leaves changed."""

    arguments: tuple[str, ...]
    returns: tuple[str, ...]
    clobbers: tuple[str, ...]


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


@dataclass
class Program:
    """What is known of the code, whatever coefficients it carries.

    Attributes:
        entry: where it begins.
        constants: names of functions that are called as they are.
        custom: rules of the user's by name.
    """

    entry: int
    constants: tuple[str, ...] = ()
    custom: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoder = decode.Decoder()
        self.rules = library.table(self.decoder.maps)
        self.functions: dict[int, decode.Function] = {}
        self.profiles: dict[int, Profile] = {}
        self.known: dict[int, list[int]] = {}
        self.opened = {self.entry}
        self.used: set[str] = set()
        self.followed: set[tuple[int, int]] = set()
        self._own: dict[int, library.Rule | None] = {}

    # --- what an address is -------------------------------------------------------------------------------

    def resolved(self, address: int) -> int:
        """Where a stub of a procedure linkage table leads."""
        for _ in range(4):
            if address in self.rules:
                return address
            region = self.decoder.maps.at(address)
            if region is None or "x" not in region.rights:
                return address
            code = read(address, min(16, region.end - address))
            skip = 4 if code[:4] == b"\xf3\x0f\x1e\xfa" else 0
            skip += code[skip : skip + 1] == b"\xf2"
            if code[skip : skip + 2] != b"\xff\x25":
                return address
            slot = address + skip + 6 + int.from_bytes(code[skip + 2 : skip + 6], "little", signed=True)
            address = int.from_bytes(read(slot, 8), "little")
        return address

    def rule(self, address: int) -> library.Rule | None:
        """The rule of a function, if it has one."""
        found = self.rules.get(self.resolved(address))
        if found is None and (self.constants or self.custom):
            target = self.resolved(address)
            if target not in self._own:
                self._own[target] = self._users(target)
            found = self._own[target]
        return found

    def _users(self, target: int) -> library.Rule | None:
        module = self.decoder.maps.module(target)
        names = {s.name for s in module.symbols if s.start == target} if module else set()
        names |= {n for n in (*self.constants, *self.custom) if library.external(n) == target}
        for name in names & set(self.custom):
            return library.Rule(name, mathematics.users(name, target, *self.custom[name]))
        for name in names & set(self.constants):
            return library.Rule(name, system.constant(name, target))
        return None

    def closed(self, target: int, site: int) -> str | None:
        """Why a function is not lifted; "" where running has to find it first, None where it is lifted."""
        maps = self.decoder.maps
        if not maps.executable(target):
            return f"calls {target:#x}, where there is no code"
        module, own = maps.module(target), maps.module(site)
        symbol = module.symbol(target) if module else None
        if symbol is not None and (kind := library.LEAVING.match(symbol.name)):
            what = "C++ exceptions" if kind[1] else "jumps out of functions"
            return f"calls {symbol.name}: {what}, which are not carried"
        if symbol is not None and symbol.start == target and library.ENDING.match(symbol.name):
            return f"calls {symbol.name}, which ends the program"
        if module is not None and library.SYSTEM.match(module.name):
            name = symbol.name if symbol else f"{target - module.base:#x}"
            if module.name.startswith("libc.") and (name in library.LIFTED or module is own and symbol is None):
                return None
            return (
                f"calls {name} of {module.name}, which has no rule. If its result does not depend on what carries "
                f"derivatives: constant=[{name!r}]. If it is a function of one double, give its first and second "
                f"derivative: rules={{{name!r}: (f1, f2)}}"
            )
        return None if module is own or target in self.opened else ""

    def jumps(self, site: int) -> tuple[int, ...]:
        """Where an indirect call or jump is known to lead."""
        return tuple(self.known.get(site, ()))

    def elsewhere(self, entry: int, target: int) -> bool:
        """Whether a jump leaves a function, as a call at its end does."""
        if target in self.functions and target != entry:
            return True
        resolved = self.resolved(target)
        if resolved != target or resolved in self.rules:
            return True
        maps = self.decoder.maps
        module = maps.module(target)
        if module is not maps.module(entry):
            return True
        if module is None:
            return False
        symbol, own = module.symbol(target), module.symbol(entry)
        return (
            symbol is not None
            and own is not None
            and symbol.start == target
            and symbol.start != own.start
            and ".cold" not in symbol.name
        )

    def learn(self, site: int, target: int) -> bool:
        """Note what running has found; whether it is new."""
        target = target & MASK
        new = target not in self.opened or target not in self.known.get(site, ())
        instruction = self.decoder.at(site)
        self.opened.add(self.resolved(target))
        self.opened.add(target)
        if instruction.flow == "call":
            return new
        row = self.known.setdefault(site, [])
        for t in [target, *(self._jump_table(site, target) if instruction.flow == "indirect jump" else ())]:
            if t not in row:
                row.append(t)
        return new

    def follow(self, address: int) -> bool:
        """Give the mapping that an address lies in a shadow, if it has none. It is memory from before the call."""
        region = Maps().at(address)
        if region is None or "w" not in region.rights or region.end - region.start > 1 << 32:
            return False
        place = region.start, region.end
        if place in self.followed:
            return False
        self.followed = {(a, b) for a, b in self.followed if b <= place[0] or place[1] <= a} | {place}
        return True

    def _jump_table(self, site: int, target: int) -> list[int]:
        """Further targets of a switch: the table that holds this one, whose address the function computes."""
        owner = next((f for f in self.functions.values() if any(i.address == site for i in f.instructions)), None)
        if owner is None:
            return []
        low = min(i.address for i in owner.instructions)
        module = self.decoder.maps.module(site)
        symbol = module.symbol(site) if module else None
        high = symbol.start + symbol.size if symbol and symbol.size else max(i.end for i in owner.instructions) + 4096
        bases = {v.offset for i in owner.instructions for o in i.ops for v in o.inputs if v.space.name == "const"}
        maps, found = self.decoder.maps, []
        for base in sorted(bases):
            if not maps.constant(base, 4) or maps.executable(base):
                continue
            row = []
            for n in range(1024):
                if not maps.constant(base + 4 * n, 4):
                    break
                t = base + int.from_bytes(read(base + 4 * n, 4), "little", signed=True)
                if not low <= t < high:
                    break
                row.append(t)
            if target in row:
                found += row
        return found

    # --- the functions ------------------------------------------------------------------------------------

    def discover(self) -> None:
        """Follow the code from the entry, and from what running has found."""
        self.functions = {}
        todo = [self.entry]
        while todo:
            entry = todo.pop()
            if entry in self.functions:
                continue
            if entry == self.entry and self.rule(entry) is not None:
                self.functions[entry] = decode.stub(entry)
                continue
            made = decode.function(
                self.decoder, entry, lambda t, e=entry: self.elsewhere(e, t), lambda site: self.jumps(site)
            )
            self.functions[entry] = made
            todo += [t for t in self._callees(made) if t not in self.functions]
        self._profile()

    def _callees(self, f: decode.Function) -> list[int]:
        found = []
        for i in f.instructions:
            targets: tuple[int, ...] = ()
            if i.flow == "call" or i.flow in ("jump", "branch") and i.target and self.elsewhere(f.entry, i.target):
                targets = (i.target,) if i.target is not None else ()
            elif i.flow == "indirect call":
                targets = self.jumps(i.address)
                v = i.ops[-1].inputs[0]
                if v.space.name == "ram" and self.decoder.maps.constant(v.offset, 8):
                    targets = (int.from_bytes(read(v.offset, 8), "little"),)
            elif i.flow == "indirect jump":
                targets = tuple(t for t in self.jumps(i.address) if self.elsewhere(f.entry, t))
            for t in targets:
                rule = self.rule(t)
                if rule is not None:
                    if rule.name == "GOMP_parallel":
                        found += list(self.jumps(i.address))
                    continue
                t = self.resolved(t)
                if self.closed(t, i.address) is None:
                    found.append(t)
        return found

    def _profile(self) -> None:
        reads, writes, calls = {}, {}, {}
        for entry, f in self.functions.items():
            reads[entry], writes[entry] = touched(f)
            writes[entry] |= {"rax", "rdx", "x0.0"} if any(i.flow != "next" for i in f.instructions) else set()
            calls[entry] = [t for t in self._callees(f) if t in self.functions]
        changed = True
        while changed:
            changed = False
            for entry, called in calls.items():
                for t in called:
                    for own, other in ((reads, reads[t]), (writes, writes[t])):
                        if not other <= own[entry]:
                            own[entry] |= other
                            changed = True
        for entry in self.functions:
            # What rules read of the caller's registers may come from its own caller.
            args = reads[entry] | {"rdi", "rsi", "rdx", "rsp", "x0.0", "x1.0", "x2.0"}
            self.profiles[entry] = Profile(
                tuple(k for k in (*INTEGERS, *DOUBLES) if k in args),
                tuple(k for k in RETURNED if k in writes[entry]),
                tuple(sorted(writes[entry] - PRESERVED - set(RETURNED))),
            )

    def describe(self, why: str, address: int, name: str) -> NativeCodeError:
        """An error at an instruction."""
        where, line = described(self.decoder.maps, address)
        instruction = str(self.decoder.at(address))
        text = f"{name} {why}\n  at {where}: {instruction}" + (f"\n  {line}" if line else "")
        text += (
            "\n  Hand its derivatives over in another way: jetplane.register_native(f, signature, jvp=…), jets in its "
            "source (jetplane.native.include()), or, by differences, jetplane.blackbox"
        )
        return NativeCodeError(text, where, instruction, line)


class Module:
    """The functions of a program with coefficients of one layout, as LLVM assembly."""

    def __init__(self, program: Program, layout: Layout, size: int) -> None:
        self.program, self.layout, self.size = program, layout, size
        self.decoder = program.decoder
        self.sites: list[tuple[int, str]] = []
        self._site_numbers: dict[tuple[int, str], int] = {}
        self.externals: dict[str, tuple[str, int]] = {}
        self.libraries: list[Library] = []
        self._names: dict[int, str] = {}
        self._spelled: dict[str, int] = {}
        self.found: list[tuple[int, int]] = []
        self.movable = True
        self._polygamma = False

    def site(self, address: int, why: str) -> int:
        """The number of an instruction and what is wrong with it."""
        key = address, why
        if key not in self._site_numbers:
            self._site_numbers[key] = len(self.sites)
            self.sites.append(key)
        return self._site_numbers[key]

    def certain(self, site: int, target: int) -> bool:
        """Whether a call by address, whose target is known while it is written, can be written as one to it."""
        t = self.program.resolved(target)
        if self.program.rule(t) is None and self.program.closed(t, site) is None and t not in self.program.functions:
            self.found.append((site, target))
            return False
        return True

    def name(self, entry: int) -> str:
        """What a function is called in the assembly."""
        return self._names.setdefault(entry, f"f{len(self._names)}")

    def profile(self, entry: int) -> Profile:
        """Registers of a function."""
        return self.program.profiles[entry]

    def elsewhere(self, entry: int, target: int) -> bool:
        """Whether a jump leaves a function."""
        return self.program.elsewhere(entry, target)

    def result_type(self, returns: Sequence[str]) -> str:
        """The type of what a function returns."""
        types = []
        for _ in returns:
            types += ["i64", *self.layout.types]
        return "{ " + ", ".join(types) + " }" if types else "{ i64 }"

    def spelled(self, value: int) -> str:
        """A constant; an address of a library as its distance from where the library is."""
        if value >> 40:
            module = self.decoder.maps.module(value)
            if module is not None:
                if module not in self.libraries:
                    self.libraries.append(module)
                base = f"@jp_base_{self.libraries.index(module)}"
                text = f"add (i64 ptrtoint (ptr {base} to i64), i64 {value - module.base})"
                self._spelled[text] = value
                return text
            if self.decoder.maps.at(value) is not None:
                self.movable = False  # code without a file, or that points into memory of this run
        return str(value - (1 << 64) if value >> 63 else value)

    def known(self, text: str) -> int | None:
        """The number that a constant is."""
        return int(text) & MASK if text.lstrip("-").isdigit() else self._spelled.get(text)

    def constant(self, address: int, size: int) -> bool:
        """Whether memory cannot change."""
        return self.decoder.maps.constant(address, size)

    def pointer(self, address: int) -> int | None:
        """The pointer at an address, if it cannot change."""
        return int.from_bytes(read(address, 8), "little") if self.constant(address, 8) else None

    def external(self, name: str, doubles: int | None = None, address: int | None = None) -> str:
        """A function of the system; ``doubles``: it is pure, and takes so many of them."""
        symbol = f"jp.{name}"
        if symbol not in self.externals:
            at = address or library.external(name)
            kinds = ", ".join(["double"] * (doubles or 0))
            text = f"@{symbol} = external global i8"
            if doubles is not None:
                text = f"declare double @{symbol}({kinds}) memory(none) nounwind willreturn"
            self.externals[symbol] = text, at
        return f"@{symbol}"

    def polygamma(self) -> None:
        """Digamma and trigamma are used."""
        self._polygamma = True
        for name in ("log", "sin", "cos"):
            self.external(name, 1)

    def text(self) -> str:
        """The whole module."""
        bodies = []
        for entry in self.program.functions:
            bodies.append(Lifter(self, self.program.functions[entry]).text())
        parts = [functions(self.layout, self.size), self._run(), *bodies]
        if self._polygamma:
            parts.append(mathematics.polygamma())
        parts += [text for text, _ in self.externals.values()]
        parts += [f"@jp_base_{n} = external global i8" for n in range(len(self.libraries))]
        return "\n".join([*parts, METADATA])

    def _run(self) -> str:
        """``run(words)``: registers from memory, the function, its results to memory."""
        profile, lines = self.profile(self.program.entry), []
        given: list[str] = []
        each = 1 + self.layout.stride

        def at(offset: int, kind: str, name: str) -> str:
            lines.append(f"  %p.{name} = getelementptr i64, ptr %w, i64 {offset}")
            lines.append(f"  %{name} = load {kind}, ptr %p.{name}, align 8")
            return f"{kind} %{name}"

        for key in profile.arguments:
            zeros = ["0.0" if w == 1 else "zeroinitializer" for w in self.layout.widths]
            constant = [f"{t} {z}" for t, z in zip(self.layout.types, zeros, strict=True)]
            if key in INTEGERS:
                given += [at(INTEGERS.index(key), "i64", key), *(constant if key != "rsp" else [])]
                continue
            n, lane = int(key[1 : key.index(".")]), key[key.index(".") + 1 :]
            if lane != "0":
                given += ["i64 0", *constant]
                continue
            given.append(at(WORDS + n * each, "i64", f"x{n}"))
            for g, (t, o) in enumerate(zip(self.layout.types, self.layout.offsets, strict=True)):
                given.append(at(WORDS + n * each + 1 + o, t, f"x{n}.{g}"))
        kind = self.result_type(profile.returns)
        lines.append(f"  %r = call {kind} @{self.name(self.program.entry)}({', '.join(given)})")
        n = 0
        for key in profile.returns:
            place = 0 if key == "rax" else 1 if key == "rdx" else WORDS if key == "x0.0" else None
            types = ["i64", *self.layout.types]
            offsets = [0, *(1 + o for o in self.layout.offsets)]
            for t, o in zip(types, offsets, strict=True):
                if place is not None and (o == 0 or key not in INTEGERS):
                    lines.append(f"  %out{n} = extractvalue {kind} %r, {n}")
                    lines.append(f"  %to{n} = getelementptr i64, ptr %w, i64 {place + o}")
                    lines.append(f"  store {t} %out{n}, ptr %to{n}, align 8")
                n += 1
        return "\n".join(["define void @run(ptr %w) nounwind {", *lines, "  ret void", "}"])


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
