"""One function of machine code as one LLVM function: registers become values, doubles carry coefficients.

A register of 64 bits, or 64 bits of a vector register, is a *lane*: its bits, and the coefficients of the double in
it, or none where it holds a constant by structure. Instructions on vector registers are given in
`jetplane.native.vectors`; others by the decoder's P-code. Calls follow the System V convention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .assembly import Assembly
from .coefficients import Calculus, Jet
from .decode import Block, Function, Immediate, Instruction, Memory, Operand, Register, Vector
from .memory import EXIT, REFUSED, THREAD, UNKNOWN
from .process import read

if TYPE_CHECKING:
    from .program import Module

INTEGERS = "rdi rsi rdx rcx r8 r9 rax r10 rsp".split()
DOUBLES = [f"x{n}.{i}" for n in range(8) for i in range(4)]
RETURNED = ["rax", "rdx", "x0.0", "x0.1", "x0.2", "x0.3", "x1.0", "x1.1"]
PRESERVED = {"rbx", "rbp", "r12", "r13", "r14", "r15", "rsp"}
_GENERAL = {0x0: "rax", 0x8: "rcx", 0x10: "rdx", 0x18: "rbx", 0x20: "rsp", 0x28: "rbp", 0x30: "rsi", 0x38: "rdi",
            **{0x80 + 8 * n: f"r{8 + n}" for n in range(8)}}  # fmt: skip
_FLAGS = {0x200: "cf", 0x202: "pf", 0x204: "af", 0x206: "zf", 0x207: "sf", 0x20A: "df", 0x20B: "of"}
_THREAD = 0x110  # the decoder's name for where FS points
_MOVES = {"COPY", "LOAD", "SUBPIECE", "INT_AND", "INT_OR", "INT_XOR"}
MASK = (1 << 64) - 1


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


def general(space: str, offset: int) -> tuple[str, int] | None:
    """The general register at an offset of the decoder's register space, and the byte in it."""
    if space == "register" and (offset < 0x40 or 0x80 <= offset < 0xC0):
        return _GENERAL[offset & ~7], offset & 7
    return None


class Translator:
    """Writes one function."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.a = Assembly()
        self.c = Calculus(module.layout, self.a)
        self.slots: dict[str, list[str]] = {}
        self.regs: dict[str, Lane] = {}
        self.flags: dict[str, str] = {}
        self.dirty: set[str] = set()
        self.labels: dict[int, str] = {}
        self.unique: dict[tuple[int, int], Number] = {}
        self.instruction: Instruction
        self.carrying = _carrying(function)
        self.only_flags = False

    # --- the whole function -------------------------------------------------------------------------------

    def text(self) -> str:
        """The function as LLVM assembly."""
        a, m = self.a, self.module
        profile = m.profile(self.function.entry)
        names, types = [], []
        live = _live_flags(self.function)
        self.returned = profile.returns
        self.result = m.result_type(self.returned)
        body_start = a.label("start")
        for key in profile.arguments:
            parts = ["i64"] if key == "rsp" else ["i64", *m.layout.types]
            these = [f"%a.{key}.{n}" for n in range(len(parts))]
            names += these
            types += [f"{t} {n}" for t, n in zip(parts, these, strict=True)]
            self.regs[key] = Lane(these[0], tuple(these[1:]) or None)
            self.dirty.add(key)
        a.begin(body_start)
        self._flush(set())
        a.go(self.label(self.function.entry))
        for start, block in self.function.blocks.items():
            self._block(block, live[start])
        head = [
            f"define internal {self.result} @{m.name(self.function.entry)}({', '.join(types)}) nounwind {{",
            "entry:",
        ]
        for key, slots in self.slots.items():
            kinds = ["i8"] if key in _FLAGS.values() else ["i64", *m.layout.types][: len(slots)]
            for slot, kind in zip(slots, kinds, strict=True):
                zero = "zeroinitializer" if kind.startswith("<") else "0.0" if kind == "double" else "0"
                head += [f"  {slot} = alloca {kind}", f"  store {kind} {zero}, ptr {slot}"]
        head.append(f"  br label %{body_start}")
        return "\n".join([*head, *a.lines, "}"])

    def label(self, address: int) -> str:
        """The block at an address."""
        if address not in self.labels:
            self.labels[address] = f"at.{address - self.function.entry & MASK:x}"
        return self.labels[address]

    def _block(self, block: Block, live: set[str]) -> None:
        a = self.a
        a.begin(self.label(block.start))
        self.regs, self.flags, self.dirty = {}, {}, set()
        needed = _needed(block, live)
        for i in block.instructions:
            self.instruction = i
            try:
                if i.error:
                    raise Refused(i.error)
                self._instruction(i, needed[i.address], live)
            except Refused as why:
                self._leave(str(why))
                return
            if a.closed:
                return
        self._flush(live)
        a.go(self.label(block.instructions[-1].end))

    def _leave(self, why: str) -> None:
        """Leave the program here, since what comes cannot be carried."""
        if self.a.closed:
            self.a.begin(self.a.label("refused"))
        site = self.module.site(self.instruction.address, why)
        self.a.do(f"call void @jp_leave(i64 {REFUSED}, i64 {site}, i64 0)")
        self.a.end(f"ret {self.result} zeroinitializer")

    def _flush(self, live: set[str]) -> None:
        """Registers to their slots, at the end of a block."""
        for key in self.dirty:
            if key in self.flags:
                if key in live:
                    self.a.do(f"store i8 {self.flags[key]}, ptr {self._slot(key)[0]}")
                continue
            lane = self.regs[key]
            slots = self._slot(key)
            self.a.do(f"store i64 {self.bits(lane)}, ptr {slots[0]}")
            if len(slots) > 1:
                for t, slot, part in zip(self.module.layout.types, slots[1:], lane.jet or self.c.zero, strict=True):
                    self.a.do(f"store {t} {part}, ptr {slot}")
        self.dirty = set()

    def _slot(self, key: str) -> list[str]:
        if key not in self.slots:
            parts = 1 + len(self.module.layout.types) if key.startswith("x") or key in self.carrying else 1
            self.slots[key] = [f"%s.{key}.{n}" for n in range(parts)]
        return self.slots[key]

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

    # --- instructions -------------------------------------------------------------------------------------

    def _instruction(self, i: Instruction, needed: set[int], live: set[str]) -> None:
        from . import integers, vectors

        self.unique = {}
        if i.flow == "next":
            if vectors.translate(self, i):
                return
            integers.translate(self, i, needed)
        elif i.flow == "return":
            self._return()
        elif i.flow == "stop":
            raise Refused(f"the instruction {i.name.lower()}, which ends a program or enters the system, was reached")
        elif i.flow in ("call", "indirect call"):
            below = self.a.op(f"sub i64 {self.bits(self.lane('rsp'))}, 8")
            if i.flow == "call":
                assert i.target is not None
                self.call(i.target, below)
            else:
                target = integers.target(self, i)
                self._by_address(target, below)
        elif i.flow == "jump":
            assert i.target is not None
            if self.module.elsewhere(self.function.entry, i.target):
                self.call(i.target, self.bits(self.lane("rsp")))
                if not self.a.closed:
                    self._return()
            else:
                self._flush(live)
                self.a.go(self.label(i.target))
        elif i.flow == "branch":
            assert i.target is not None
            integers.translate(self, i, needed)
            condition = integers.condition(self, i)
            self._flush(live)
            away = self.module.elsewhere(self.function.entry, i.target)
            yes = self.a.label("tail") if away else self.label(i.target)
            self.a.fork(condition, yes, self.label(i.end))
            if away:
                self.a.begin(yes)
                self._attempt(i.target, self.bits(self.lane("rsp")))
                if not self.a.closed:
                    self._return()
        elif i.flow == "indirect jump":
            self._jump(integers.target(self, i), live)

    def _return(self) -> None:
        values, types = [], []
        for key in self.returned:
            lane = self.lane(key)
            values += [self.bits(lane), *(lane.jet or self.c.zero)]
            types += ["i64", *self.module.layout.types]
        last = "poison"
        for n, (t, v) in enumerate(zip(types, values, strict=True)):
            last = self.a.op(f"insertvalue {self.result} {last}, {t} {v}, {n}")
        self.a.end(f"ret {self.result} {last if values else 'zeroinitializer'}")

    def _jump(self, target: str, live: set[str]) -> None:
        """To one of the places that this jump is known to lead to."""
        self._flush(live)
        known = self.module.program.jumps(self.instruction.address)
        miss = self.a.label("unknown")
        cases, tails = [], []
        for t in known:
            if self.module.elsewhere(self.function.entry, t):
                tails.append((t, self.a.label("tail")))
                cases.append((t, tails[-1][1]))
            else:
                cases.append((t, self.label(t)))
        self._switch(target, miss, cases)
        self._missed(miss, target)
        for t, label in tails:
            self.a.begin(label)
            self.regs, self.flags = {}, {}
            self._attempt(t, self.bits(self.lane("rsp")))
            if not self.a.closed:
                self._return()

    def _attempt(self, target: int, stack: str) -> None:
        try:
            self.call(target, stack)
        except Refused as why:
            self._leave(str(why))

    def _switch(self, target: str, miss: str, cases: list[tuple[int, str]]) -> None:
        """Compare with each: addresses of libraries are not known to a compiler, which a switch would need."""
        for t, label in cases:
            same = self.a.op(f"icmp eq i64 {target}, {self.constant(t)}")
            go_on = self.a.label("next")
            self.a.fork(same, label, go_on)
            self.a.begin(go_on)
        self.a.go(miss)

    def _missed(self, label: str, target: str) -> None:
        self.a.begin(label)
        site = self.site("goes to an address that is found by running")
        self.a.do(f"call void @jp_leave(i64 {UNKNOWN}, i64 {site}, i64 {target})")
        self.a.end(f"ret {self.result} zeroinitializer")

    def _by_address(self, target: str, stack: str) -> None:
        """Call one of the functions that this call is known to lead to."""
        known_now = self.module.known(target)
        if known_now is not None and self.module.certain(self.instruction.address, known_now):
            self.call(known_now, stack)
            return
        known = self.module.program.jumps(self.instruction.address)
        self._flush(set())
        miss, end = self.a.label("unknown"), self.a.label("called")
        cases = [(t, self.a.label("callee")) for t in known]
        self._switch(target, miss, cases)
        self._missed(miss, target)
        for t, label in cases:
            self.a.begin(label)
            self.regs, self.flags, self.dirty = {}, {}, set()
            self._attempt(t, stack)
            if not self.a.closed:
                self._flush(set())
                self.a.go(end)
        if not cases:
            return
        self.a.begin(end)
        self.regs, self.flags = {}, {}

    def call(self, target: int, stack: str) -> None:
        """Call the function at an address, with the stack pointer that it begins with."""
        m = self.module
        rule = m.program.rule(target)
        if rule is not None:
            m.program.used.add(rule.name)
            rule.emit(self)
            return
        target = m.program.resolved(target)
        why = m.program.closed(target, self.instruction.address)
        if why == "":
            site = self.site("calls a function of another library")
            self.a.do(f"call void @jp_leave(i64 {UNKNOWN}, i64 {site}, i64 {self.constant(target)})")
            self.a.end(f"ret {self.result} zeroinitializer")
            return
        if why is not None:
            raise Refused(why)
        profile = m.profile(target)
        given = []
        for key in profile.arguments:
            if key == "rsp":
                given.append(f"i64 {stack}")
            else:
                lane = self.lane(key)
                given.append(f"i64 {self.bits(lane)}")
                given.append(self.c.arguments(lane.jet))
        kind = m.result_type(profile.returns)
        result = self.a.op(f"call {kind} @{m.name(target)}({', '.join(given)})")
        self.leave_if_left()
        for key in profile.clobbers:
            self.put(key, Lane("0"))
        n = 0
        for key in profile.returns:
            parts = []
            for _ in range(1 + len(m.layout.types)):
                parts.append(self.a.op(f"extractvalue {kind} {result}, {n}"))
                n += 1
            self.put(key, Lane(parts[0], tuple(parts[1:]) or None))

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


# --- what can be said of a function before it is written -------------------------------------------------------


def touched(function: Function) -> tuple[set[str], set[str]]:
    """Registers that the instructions of a function read and write."""
    reads, writes = set(), set()
    for i in function.instructions:
        for o in i.ops:
            for v in o.inputs:
                if found := general(v.space.name, v.offset):
                    reads.add(found[0])
            if o.output is not None and (found := general(o.output.space.name, o.output.offset)):
                writes.add(found[0])
        for operand in i.operands or ():
            if isinstance(operand, Vector):
                keys = {f"x{operand.number}.{lane}" for lane in range(4 if i.name.startswith("V") else 2)}
                reads |= keys
                writes |= keys
        if i.name.startswith("VZERO"):
            writes |= {f"x{n}.{lane}" for n in range(16) for lane in (2, 3)}
        if "BLENDV" in i.name:
            reads.add("x0.0")
            reads.add("x0.1")
    return reads, writes


def _carrying(function: Function) -> set[str]:
    """General registers that may hold a double: arguments, results of calls, and where one is moved to."""
    found: set[str] = {str(r) for r in INTEGERS if r != "rsp"}
    found |= {"rdx"} if any("call" in i.flow for i in function.instructions) else set()
    for i in function.instructions:
        for o in i.ops:
            out = o.output
            if out is None or out.size != 8 or o.opcode.name not in _MOVES:
                continue
            register = general(out.space.name, out.offset)
            if register and register[0] != "rsp" and o.inputs[0].space.name != "const":
                found.add(register[0])
        if i.name in ("MOVQ", "VMOVQ", "PEXTRQ", "VPEXTRQ") and i.operands and isinstance(i.operands[0], Register):
            found.add(i.operands[0].name)
    return found


def flag_of(varnode: Any) -> str | None:
    """The flag that an operand of P-code is."""
    return _FLAGS.get(varnode.offset) if varnode.space.name == "register" else None


def _uses(i: Instruction) -> tuple[list[set[str]], list[str | None]]:
    return (
        [{f for v in o.inputs if (f := flag_of(v))} for o in i.ops],
        [flag_of(o.output) if o.output is not None else None for o in i.ops],
    )


def _live_flags(function: Function) -> dict[int, set[str]]:
    """Flags that are read after each block."""
    order = list(function.blocks.values())
    use: dict[int, set[str]] = {}
    kill: dict[int, set[str]] = {}
    for b in order:
        used, killed = set(), set()
        for i in b.instructions:
            for reads, writes in zip(*_uses(i), strict=True):
                used |= reads - killed
                if writes:
                    killed.add(writes)
            if "call" in i.flow:
                killed |= set(_FLAGS.values())
        use[b.start], kill[b.start] = used, killed
    after: dict[int, list[int]] = {}
    everything = set(function.blocks)
    for b in order:
        last = b.instructions[-1]
        following = [t for t in (last.target, last.end) if t in everything and last.flow in ("branch", "next")]
        if "call" in last.flow:
            following = [last.end]
        if last.flow == "jump":
            following = [last.target] if last.target in everything else []
        after[b.start] = [t for t in following if t is not None and t in everything]
    live: dict[int, set[str]] = {b.start: set() for b in order}
    changed = True
    while changed:
        changed = False
        for b in reversed(order):
            out = set().union(*((use[t] | (live[t] - kill[t])) for t in after[b.start])) if after[b.start] else set()
            if out != live[b.start]:
                live[b.start], changed = out, True
    return live


def _needed(block: Block, live: set[str]) -> dict[int, set[int]]:
    """For each instruction, which of its P-code is needed: flags that nothing reads are not computed."""
    wanted, found = set(live), {}
    for i in reversed(block.instructions):
        kept, uniques = set(), set()
        jumps = any(o.opcode.name == "CBRANCH" for o in i.ops) and i.flow == "next"
        for n in range(len(i.ops) - 1, -1, -1):
            o = i.ops[n]
            out = o.output
            if out is not None and not jumps:
                if out.space.name == "unique":
                    if not any(out.offset < at + size and at < out.offset + out.size for at, size in uniques):
                        continue
                elif (name := flag_of(out)) is not None:
                    if name not in wanted:
                        continue
                    wanted.discard(name)
            kept.add(n)
            for v in o.inputs:
                if v.space.name == "unique":
                    uniques.add((v.offset, v.size))
                elif (name := flag_of(v)) is not None:
                    wanted.add(name)
        if "call" in i.flow:
            wanted = set()
        found[i.address] = kept
    return found
