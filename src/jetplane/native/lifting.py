"""One function of machine code as one LLVM function: its blocks, jumps and calls.

Instructions on vector registers are given in `jetplane.native.vectors` and `packed`; others by the decoder's P-code,
in `integers`. Calls follow the System V convention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import instructions, integers, packed, vectors
from .arena import UNKNOWN
from .decode import Block, Function, Instruction
from .registers import FLAGS, MASK, live_flags, needed
from .translator import Lane, Refused, Translator

if TYPE_CHECKING:
    from .module import Module

RULES = vectors.RULES | packed.RULES


class Lifter(Translator):
    """Writes one function."""

    def __init__(self, module: Module, function: Function) -> None:
        super().__init__(module, function)
        self.labels: dict[int, str] = {}

    # --- the whole function -------------------------------------------------------------------------------

    def text(self) -> str:
        """The function as LLVM assembly."""
        a, m = self.a, self.module
        profile = m.profile(self.function.entry)
        names, types = [], []
        live = live_flags(self.function)
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
            kinds = ["i8"] if key in FLAGS.values() else ["i64", *m.layout.types][: len(slots)]
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
        wanted = needed(block, live)
        for i in block.instructions:
            self.instruction = i
            try:
                if i.error:
                    raise Refused(i.error)
                self._instruction(i, wanted[i.address], live)
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
        self.leave(why)

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

    # --- instructions -------------------------------------------------------------------------------------

    def _instruction(self, i: Instruction, wanted: set[int], live: set[str]) -> None:
        self.unique = {}
        if i.flow == "next":
            if instructions.translate(self, i, RULES):
                return
            integers.translate(self, i, wanted)
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
                self.by_address(target, below)
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
            integers.translate(self, i, wanted)
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
        self.leave("goes to an address that is found by running", UNKNOWN, target)

    def by_address(self, target: str, stack: str) -> None:
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
            self.leave("calls a function of another library", UNKNOWN, self.constant(target))
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
