"""The functions of a program with coefficients of one layout, as one module of LLVM assembly."""

from __future__ import annotations

from collections.abc import Sequence

from . import library, mathematics
from .coefficients import Layout
from .lifting import Lifter
from .memory import METADATA, functions
from .process import Module as Library
from .process import read
from .program import Profile, Program
from .registers import INTEGERS, MASK

WORDS = 16  # integers at the head of what a call is handed


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
