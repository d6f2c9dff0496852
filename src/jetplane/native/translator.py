"""The state of a function that is being translated: registers and memory as LLVM values, doubles with coefficients.

A register of 64 bits, or 64 bits of a vector register, is a *lane*: its bits, and the coefficients of the double in
it, or none where it holds a constant by structure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .arena import EXIT, REFUSED, THREAD
from .assembly import Assembly
from .coefficients import Calculus, Jet
from .decode import Function, Immediate, Instruction, Memory, Operand, Register, Vector
from .process import read
from .registers import MASK, carrying

if TYPE_CHECKING:
    from .module import Module

PIECES = "copies parts of values that carry derivatives, or to where they are not followed"
FILLS = "fills memory that is followed in part"


class Refused(Exception):
    """An instruction that is not carried: while it runs, the program is left where it is reached."""


class Lane:
    """64 bits, and the coefficients of the double that they may be."""

    __slots__ = ("bits", "double", "jet")

    def __init__(self, bits: str | None, jet: Jet = None, double: str | None = None) -> None:
        self.bits, self.jet, self.double = bits, jet, double


class Number:
    """An integer of some bytes; one of 8 bytes may carry coefficients."""

    __slots__ = ("jet", "size", "text")

    def __init__(self, text: str, size: int, jet: Jet = None) -> None:
        self.text, self.size, self.jet = text, size, jet

    @property
    def type(self) -> str:
        """The LLVM type."""
        return f"i{8 * self.size}"


class Translator(ABC):
    """Writes the instructions of one function. Where its jumps and calls lead is for who has the whole function."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.a = Assembly()
        self.c = Calculus(module.layout, self.a)
        self.slots: dict[str, list[str]] = {}
        self.regs: dict[str, Lane] = {}
        self.flags: dict[str, str] = {}
        self.dirty: set[str] = set()
        self.unique: dict[tuple[int, int], Number] = {}
        self.instruction: Instruction
        self.result: str  # LLVM's type of what the function returns
        self.carrying = carrying(function)
        self.only_flags = False

    @abstractmethod
    def by_address(self, target: str, stack: str) -> None:
        """Call the function at an address that is a value, with the stack pointer that it begins with."""

    # --- lanes --------------------------------------------------------------------------------------------

    def lane(self, key: str) -> Lane:
        """What a register holds."""
        found = self.regs.get(key)
        if found is None:
            slots = self._slot(key)
            bits = self.a.op(f"load i64, ptr {slots[0]}")
            jet = tuple(
                self.a.op(f"load {t}, ptr {s}") for t, s in zip(self.module.layout.types, slots[1:], strict=False)
            )
            found = self.regs[key] = Lane(bits, jet or None)
        return found

    def put(self, key: str, lane: Lane) -> None:
        """Set a register."""
        if lane.jet is not None and not key.startswith("x") and key not in self.carrying:
            self.guard(lane.jet, "moves a value that carries derivatives to an integer register")
            lane = Lane(self.bits(lane))
        self.regs[key] = lane
        self.dirty.add(key)

    def bits(self, lane: Lane) -> str:
        """As an integer (i64)."""
        if lane.bits is None:
            lane.bits = self.a.op(f"bitcast double {lane.double} to i64")
        return lane.bits

    def double(self, lane: Lane) -> str:
        """As a double."""
        if lane.double is None:
            lane.double = self.a.op(f"bitcast i64 {lane.bits} to double")
        return lane.double

    def flag(self, name: str) -> str:
        """A flag (i8)."""
        if name not in self.flags:
            self.flags[name] = self.a.op(f"load i8, ptr {self._slot(name)[0]}")
        return self.flags[name]

    def set_flag(self, name: str, value: str) -> None:
        """Set a flag."""
        self.flags[name] = value
        self.dirty.add(name)

    def site(self, why: str) -> int:
        """A number for this instruction in a message of this kind."""
        return self.module.site(self.instruction.address, why)

    def guard(self, jet: Jet, why: str, part: int = 255) -> None:
        """An error where coefficients are not zero; ``part`` is the set of bytes that are used, as bits."""
        if jet is not None:
            self.a.do(f"call void @jp_guard(i64 {self.site(why)}, i64 {part}, {self.c.arguments(jet)})")

    def inactive(self, lane: Lane, why: str = "computes with the bits of a value that carries derivatives") -> str:
        """The bits of a lane that may not be active."""
        self.guard(lane.jet, why)
        return self.bits(lane)

    def _slot(self, key: str) -> list[str]:
        if key not in self.slots:
            parts = 1 + len(self.module.layout.types) if key.startswith("x") or key in self.carrying else 1
            self.slots[key] = [f"%s.{key}.{n}" for n in range(parts)]
        return self.slots[key]

    # --- memory -------------------------------------------------------------------------------------------

    def constant(self, value: int) -> str:
        """A constant of 64 bits; addresses of libraries are relative to where they are."""
        return self.module.spelled(value & MASK)

    def address(self, m: Memory) -> str:
        """The address of a memory operand."""
        total = self.bits(self.lane(m.base)) if m.base else None
        if m.index:
            part = self.bits(self.lane(m.index))
            if m.scale != 1:
                part = self.a.op(f"mul i64 {part}, {m.scale}")
            total = part if total is None else self.a.op(f"add i64 {total}, {part}")
        if total is None:
            return self.constant(m.displacement)
        return self.a.op(f"add i64 {total}, {m.displacement}") if m.displacement else total

    def further(self, address: str, by: int) -> str:
        """An address some bytes on."""
        known = self.module.known(address)
        if known is not None:
            return self.constant(known + by)
        return self.a.op(f"add i64 {address}, {by}") if by else address

    def load(self, address: str) -> Lane:
        """64 bits of memory."""
        known = self.module.known(address)
        if known is not None and self.module.constant(known, 8):
            return Lane(self.constant(int.from_bytes(read(known, 8), "little")))
        p = self.a.op(f"inttoptr i64 {address} to ptr")
        bits = self.a.op(f"load i64, ptr {p}, align 1, !tbaa !2")
        if known is not None and self.module.decoder.maps.constant(known, 8):
            return Lane(bits)
        q = self.a.op(f"call ptr @jp_shadow_of(i64 {address})")
        parts = []
        for t, o in zip(self.module.layout.types, self.module.layout.offsets, strict=True):
            r = self.a.op(f"getelementptr i8, ptr {q}, i64 {8 * o}")
            parts.append(self.a.op(f"load {t}, ptr {r}, align 8, !tbaa !3"))
        return Lane(bits, tuple(parts))

    def store(self, address: str, lane: Lane) -> None:
        """64 bits to memory."""
        p = self.a.op(f"inttoptr i64 {address} to ptr")
        self.a.do(f"store i64 {self.bits(lane)}, ptr {p}, align 1, !tbaa !2")
        site = (
            self.site("stores a value that carries derivatives outside of the memory that is followed")
            if lane.jet
            else 0
        )
        self.a.do(f"call void @jp_store(i64 {address}, i64 {site}, {self.c.arguments(lane.jet)})")

    def load_bytes(self, address: str, size: int) -> str:
        """Fewer bits, as an integer."""
        known = self.module.known(address)
        if known is not None and self.module.constant(known, size):
            return str(int.from_bytes(read(known, size), "little"))
        p = self.a.op(f"inttoptr i64 {address} to ptr")
        value = self.a.op(f"load i{8 * size}, ptr {p}, align 1, !tbaa !2")
        site = self.site("reads a part of a value that carries derivatives")
        self.a.do(f"call void @jp_check(i64 {address}, i64 {size}, i64 {site})")
        return value

    def store_bytes(self, address: str, value: str, size: int) -> None:
        """Fewer bits to memory."""
        p = self.a.op(f"inttoptr i64 {address} to ptr")
        self.a.do(f"store i{8 * size} {value}, ptr {p}, align 1, !tbaa !2")
        self.a.do(f"call void @jp_mark(i64 {address}, i64 {size})")

    # --- operands -----------------------------------------------------------------------------------------

    def lanes(self, operand: Operand, n: int) -> list[Lane]:
        """The first n lanes of a vector register or of memory."""
        if isinstance(operand, Vector):
            return [self.lane(f"x{operand.number}.{i}") for i in range(n)]
        if isinstance(operand, Memory):
            at = self.address(operand)
            return [self.load(self.further(at, 8 * i)) for i in range(n)]
        if isinstance(operand, Register) and n == 1 and operand.size == 8:
            return [self.lane(operand.name)]
        raise Refused(f"no rule for the operands of {self.instruction}")

    def low(self, operand: Operand) -> Lane:
        """The first lane."""
        return self.lanes(operand, 1)[0]

    def set_lanes(self, operand: Operand, lanes: Iterable[Lane]) -> None:
        """Set lanes of a vector register or of memory. Instructions named V… set the rest of the register to zero."""
        lanes = list(lanes)
        if isinstance(operand, Memory):
            at = self.address(operand)
            for i, lane in enumerate(lanes):
                self.store(self.further(at, 8 * i), lane)
        elif isinstance(operand, Vector):
            for i, lane in enumerate(lanes):
                self.put(f"x{operand.number}.{i}", lane)
            if self.instruction.name.startswith("V"):
                for i in range(len(lanes), 4):
                    self.put(f"x{operand.number}.{i}", Lane("0"))
        elif isinstance(operand, Register) and operand.size == 8 and len(lanes) == 1:
            self.put(operand.name, lanes[0])
        else:
            raise Refused(f"no rule for the operands of {self.instruction}")

    def integer(self, operand: Operand) -> Number:
        """A general register, memory or a constant, as an integer."""
        if isinstance(operand, Register):
            lane = self.lane(operand.name)
            if operand.size == 8:
                return Number(self.inactive(lane), 8)
            return Number(self.a.op(f"trunc i64 {self.inactive(lane)} to i{8 * operand.size}"), operand.size)
        if isinstance(operand, Memory):
            at = self.address(operand)
            if operand.size == 8:
                return Number(self.inactive(self.load(at)), 8)
            return Number(self.load_bytes(at, operand.size), operand.size)
        if isinstance(operand, Immediate):
            return Number(str(operand.value), 8)
        raise Refused(f"no rule for the operands of {self.instruction}")

    def set_integer(self, operand: Operand, value: str, size: int) -> None:
        """Set a general register, with zeros above, or memory, to an integer of so many bytes."""
        if isinstance(operand, Register) and size >= 4:
            self.put(operand.name, Lane(value if size == 8 else self.a.op(f"zext i{8 * size} {value} to i64")))
        elif isinstance(operand, Memory):
            if size == 8:
                self.store(self.address(operand), Lane(value))
            else:
                self.store_bytes(self.address(operand), value, size)
        else:
            raise Refused(f"no rule for the operands of {self.instruction}")

    # --- ways out -----------------------------------------------------------------------------------------

    def trap_if(self, condition: str, why: str) -> None:
        """Note an error where a condition holds (i1), and go on."""
        bad, on = self.a.label("bad"), self.a.label("good")
        self.a.fork(condition, bad, on, rare=True)
        self.a.begin(bad)
        self.a.do(f"call void @jp_trap(i64 {self.site(why)})")
        self.a.go(on)
        self.a.begin(on)

    def leave_if(self, condition: str, why: str) -> None:
        """Leave the program where a condition holds (i1), since what comes cannot be carried."""
        bad, on = self.a.label("bad"), self.a.label("good")
        self.a.fork(condition, bad, on, rare=True)
        self.a.begin(bad)
        self.leave(why)
        self.a.begin(on)

    def leave(self, why: str, reason: int = REFUSED, target: str = "0") -> None:
        """Leave the program here."""
        self.a.do(f"call void @jp_leave(i64 {reason}, i64 {self.site(why)}, i64 {target})")
        self.a.end(f"ret {self.result} zeroinitializer")

    def leave_if_left(self) -> None:
        """Return where what was called has left the program."""
        p = self.a.op(f"getelementptr i8, ptr @jp_state, i64 {8 * EXIT}")
        left = self.a.op(f"load i64, ptr {p}")
        yes = self.a.op(f"icmp ne i64 {left}, 0")
        out, on = self.a.label("left"), self.a.label("on")
        self.a.fork(yes, out, on, rare=True)
        self.a.begin(out)
        self.a.end(f"ret {self.result} zeroinitializer")
        self.a.begin(on)

    def thread(self) -> str:
        """Where the memory of this thread is."""
        p = self.a.op(f"getelementptr i8, ptr @jp_state, i64 {8 * THREAD}")
        return self.a.op(f"load i64, ptr {p}")
