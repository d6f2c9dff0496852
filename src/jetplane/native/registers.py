"""Registers: their names, and which of them a function reads, writes and needs, before it is translated."""

from __future__ import annotations

from typing import Any

from .decode import Block, Function, Instruction, Register, Vector

INTEGERS = "rdi rsi rdx rcx r8 r9 rax r10 rsp".split()
DOUBLES = [f"x{n}.{i}" for n in range(8) for i in range(4)]
RETURNED = ["rax", "rdx", "x0.0", "x0.1", "x0.2", "x0.3", "x1.0", "x1.1"]
PRESERVED = {"rbx", "rbp", "r12", "r13", "r14", "r15", "rsp"}
_GENERAL = {0x0: "rax", 0x8: "rcx", 0x10: "rdx", 0x18: "rbx", 0x20: "rsp", 0x28: "rbp", 0x30: "rsi", 0x38: "rdi",
            **{0x80 + 8 * n: f"r{8 + n}" for n in range(8)}}  # fmt: skip
FLAGS = {0x200: "cf", 0x202: "pf", 0x204: "af", 0x206: "zf", 0x207: "sf", 0x20A: "df", 0x20B: "of"}
MASK = (1 << 64) - 1
_MOVES = {"COPY", "LOAD", "SUBPIECE", "INT_AND", "INT_OR", "INT_XOR"}


def general(space: str, offset: int) -> tuple[str, int] | None:
    """The general register at an offset of the decoder's register space, and the byte in it."""
    if space == "register" and (offset < 0x40 or 0x80 <= offset < 0xC0):
        return _GENERAL[offset & ~7], offset & 7
    return None


def flag_of(varnode: Any) -> str | None:
    """The flag that an operand of P-code is."""
    return FLAGS.get(varnode.offset) if varnode.space.name == "register" else None


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


def carrying(function: Function) -> set[str]:
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


def _uses(i: Instruction) -> tuple[list[set[str]], list[str | None]]:
    return (
        [{f for v in o.inputs if (f := flag_of(v))} for o in i.ops],
        [flag_of(o.output) if o.output is not None else None for o in i.ops],
    )


def live_flags(function: Function) -> dict[int, set[str]]:
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
                killed |= set(FLAGS.values())
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


def needed(block: Block, live: set[str]) -> dict[int, set[int]]:
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
