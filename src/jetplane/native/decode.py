"""Machine code to instructions, and to the blocks of a function. The decoder is Ghidra's SLEIGH, by pypcode."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import MissingPackageError
from .process import Maps, read


@functools.cache
def _context() -> Any:
    try:
        import pypcode  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            "jp.compiled needs pypcode and llvmlite, which are not installed: pip install 'jetplane[native]'"
        ) from error
    return pypcode.Context("x86:LE:64:default")


# --- operands, read from the text of an instruction -------------------------------------------------------

_SIZES = {8: "RAX RCX RDX RBX RSP RBP RSI RDI", 4: "EAX ECX EDX EBX ESP EBP ESI EDI", 2: "AX CX DX BX SP BP SI DI",
          1: "AL CL DL BL SPL BPL SIL DIL"}  # fmt: skip
GENERAL: dict[str, tuple[str, int]] = {}  # name -> (the whole register, bytes)
for _size, _names in _SIZES.items():
    for _n, _name in enumerate(_names.split()):
        GENERAL[_name] = (_SIZES[8].split()[_n].lower(), _size)
for _n in range(8, 16):
    for _suffix, _size in (("", 8), ("D", 4), ("W", 2), ("B", 1)):
        GENERAL[f"R{_n}{_suffix}"] = (f"r{_n}", _size)


@dataclass(frozen=True)
class Register:
    """A general register, or a part of one."""

    name: str
    size: int


@dataclass(frozen=True)
class Vector:
    """A vector register, of 16 or 32 bytes."""

    number: int
    size: int


@dataclass(frozen=True)
class Immediate:
    """A constant."""

    value: int


@dataclass(frozen=True)
class Memory:
    """``base + index * scale + displacement``."""

    base: str | None
    index: str | None
    scale: int
    displacement: int
    size: int


Operand = Register | Vector | Immediate | Memory
_MEMORY_SIZES = {"byte": 1, "word": 2, "dword": 4, "qword": 8, "xmmword": 16, "ymmword": 32, "float": 4, "double": 8}


def operands(body: str) -> tuple[Operand, ...] | None:
    """The operands of an instruction; None where one is of a kind that is not carried."""
    found: list[Operand] = []
    for text in [t.strip() for t in body.split(",")] if body.strip() else []:
        if text in GENERAL:
            found.append(Register(*GENERAL[text]))
        elif match := re.fullmatch(r"([XY])MM(\d+)", text):
            if int(match[2]) > 15:
                return None
            found.append(Vector(int(match[2]), 16 if match[1] == "X" else 32))
        elif match := re.fullmatch(r"(-?)0x([0-9a-fA-F]+)", text):
            found.append(Immediate(-int(match[2], 16) if match[1] else int(match[2], 16)))
        elif match := re.fullmatch(r"(?:(\w+) ptr )?\[(.*)\]", text):
            memory = _memory(match[2], _MEMORY_SIZES.get(match[1] or "", 0))
            if memory is None:
                return None
            found.append(memory)
        else:
            return None
    return tuple(found)


def _memory(text: str, size: int) -> Memory | None:
    base = index = None
    scale, displacement = 1, 0
    for part in text.split(" + "):
        part = part.strip()
        if match := re.fullmatch(r"(-?)0x([0-9a-fA-F]+)", part):
            displacement += (-1 if match[1] else 1) * int(match[2], 16)
            continue
        name, _, times = part.partition("*")
        if name.strip() not in GENERAL or GENERAL[name.strip()][1] != 8:
            return None
        register = GENERAL[name.strip()][0]
        if times or base is not None:
            if index is not None:
                return None
            index, scale = register, int(times, 16) if times else 1
        else:
            base = register
    return Memory(base, index, scale, displacement, size)


# --- instructions ------------------------------------------------------------------------------------------


@dataclass
class Instruction:
    """One instruction of machine code.

    Attributes:
        ops: its P-code.
        flow: how it goes on: "next", "jump" (to a target), "branch" (to a target or on), "call", "indirect call",
            "indirect jump", "return", "stop" (an instruction that ends the program).
        target: of a jump, branch or call that is known.
        error: why it could not be decoded.
    """

    address: int
    length: int
    name: str
    body: str
    ops: list[Any]
    flow: str = "next"
    target: int | None = None
    error: str | None = None

    @functools.cached_property
    def operands(self) -> tuple[Operand, ...] | None:
        """What it works on."""
        return operands(self.body)

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.address + self.length

    def __str__(self) -> str:
        return f"{self.name} {self.body}".strip().lower()


class Decoder:
    """Instructions of this process by address, each decoded once."""

    def __init__(self) -> None:
        self.maps = Maps()
        self._known: dict[int, Instruction] = {}

    def at(self, address: int) -> Instruction:
        """The instruction at an address."""
        found = self._known.get(address)
        if found is None:
            found = self._known[address] = self._decoded(address)
        return found

    def _decoded(self, address: int) -> Instruction:
        region = self.maps.at(address)
        if region is None or "x" not in region.rights:
            return Instruction(address, 1, "", "", [], "stop", error="there is no code here")
        code = read(address, min(16, region.end - address))
        context = _context()
        try:
            ops = context.translate(code, base_address=address, max_instructions=1).ops
            text = context.disassemble(code, base_address=address, max_instructions=1).instructions[0]
        except Exception:  # pypcode raises several kinds, some of its own
            what = "AVX-512" if code[:1] == b"\x62" else "an instruction that the decoder does not know"
            return Instruction(address, 1, "", "", [], "stop", error=f"uses {what} ({code[:8].hex(' ')})")
        made = Instruction(address, text.length, text.mnem, text.body, [o for o in ops if o.opcode.name != "IMARK"])
        self._flow(made)
        return made

    @staticmethod
    def _flow(i: Instruction) -> None:
        name = i.name
        if name.startswith("CALL"):
            last = i.ops[-1] if i.ops else None
            if last is not None and last.opcode.name in ("CALL", "BRANCH"):
                i.flow, i.target = "call", last.inputs[0].offset
            else:
                i.flow = "indirect call"
        elif name.startswith("RET"):
            i.flow = "return"
        elif name in ("HLT", "UD2", "INT3", "SYSCALL"):
            i.flow = "stop"
        elif name.startswith("JMP"):
            last = i.ops[-1]
            if last.opcode.name == "BRANCH":
                i.flow, i.target = "jump", last.inputs[0].offset
            else:
                i.flow = "indirect jump"
        elif name.startswith("J") and i.ops and i.ops[-1].opcode.name == "CBRANCH":
            i.flow, i.target = "branch", i.ops[-1].inputs[0].offset


@dataclass
class Block:
    """Instructions that follow each other."""

    start: int
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Function:
    """The blocks that are reached from an entry."""

    entry: int
    blocks: dict[int, Block]

    @property
    def instructions(self) -> list[Instruction]:
        """All of them."""
        return [i for b in self.blocks.values() for i in b.instructions]


def function(
    decoder: Decoder, entry: int, elsewhere: Callable[[int], bool], jumps: Callable[[int], tuple[int, ...]]
) -> Function:
    """Follow the code from an entry.

    Args:
        decoder: of this process.
        entry: where it begins.
        elsewhere: whether a jump to an address leaves the function, as a tail call.
        jumps: where an indirect jump is known to lead.
    """
    starts, seen, todo = {entry}, {}, [entry]
    while todo:
        address = todo.pop()
        while address not in seen:
            i = seen[address] = decoder.at(address)
            if i.error or i.flow in ("return", "stop"):
                break
            targets: tuple[int, ...] = ()
            if i.flow in ("jump", "branch"):
                assert i.target is not None
                targets = () if elsewhere(i.target) else (i.target,)
            elif i.flow == "indirect jump":
                targets = tuple(t for t in jumps(address) if not elsewhere(t))
            starts.update(targets)
            todo.extend(targets)
            if i.flow == "branch":
                starts.add(i.end)
            if i.flow in ("jump", "indirect jump"):
                break
            address = i.end
    blocks = {}
    for start in sorted(starts):
        if start not in seen:
            continue
        block = blocks[start] = Block(start)
        address = start
        while address in seen:
            i = seen[address]
            block.instructions.append(i)
            address = i.end
            if i.error or i.flow in ("return", "stop", "jump", "branch", "indirect jump") or address in starts:
                break
    return Function(entry, blocks)


def stub(entry: int) -> Function:
    """A function that calls one which is not lifted, but has a rule."""
    jump = Instruction(entry, 1, "JMP", "", [], "jump", entry)
    return Function(entry, {entry: Block(entry, [jump])})
