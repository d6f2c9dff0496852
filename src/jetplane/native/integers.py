"""Instructions on general registers, by the decoder's P-code. No double passes through them but as a whole."""

from __future__ import annotations

import re
from typing import Any

from .decode import Instruction, Register, Vector
from .registers import flag_of, general
from .translator import FILLS, PIECES, Lane, Number, Refused, Translator
from .vectors import bitwise

_NOTHING = re.compile(r"NOP.*|ENDBR64|PAUSE|[MSL]FENCE|PREFETCH.*|DATA16.*")
_ARITHMETIC = {"INT_ADD": "add", "INT_SUB": "sub", "INT_MULT": "mul"}
_BITWISE = {"INT_AND": "and", "INT_OR": "or", "INT_XOR": "xor"}
_SHIFTS = {"INT_LEFT": "shl", "INT_RIGHT": "lshr", "INT_SRIGHT": "ashr"}
_DIVISIONS = {"INT_DIV": "udiv", "INT_SDIV": "sdiv", "INT_REM": "urem", "INT_SREM": "srem"}
_COMPARISONS = {
    "INT_EQUAL": "eq", "INT_NOTEQUAL": "ne", "INT_LESS": "ult", "INT_LESSEQUAL": "ule", "INT_SLESS": "slt",
    "INT_SLESSEQUAL": "sle",
}  # fmt: skip
_LOGIC = {"BOOL_AND": "and", "BOOL_OR": "or", "BOOL_XOR": "xor"}


def translate(t: Translator, i: Instruction, needed: set[int]) -> None:
    """One instruction."""
    if _NOTHING.fullmatch(i.name):
        return
    if by_hand := _BY_HAND.get(i.name.split(".")[0]):
        if by_hand(t, i):
            return
    if any(isinstance(o, Vector) for o in i.operands or ()) or any(_outside(v) for o in i.ops for v in _all(o)):
        raise Refused(f"no rule for the instruction {i}")
    t.only_flags = i.name in ("CMP", "TEST", "BT")
    _run(t, i, 0, needed)


def _all(o: Any) -> list[Any]:
    return [*o.inputs, *([o.output] if o.output is not None else [])]


def _outside(v: Any) -> bool:
    """Whether an operand is of the floating-point unit or of vectors."""
    return v.space.name == "register" and 0x1000 <= v.offset


def _run(t: Translator, i: Instruction, start: int, needed: set[int]) -> None:
    for n in range(start, len(i.ops)):
        if n not in needed:
            continue
        o = i.ops[n]
        name = o.opcode.name
        if name == "CBRANCH":
            to = o.inputs[0]
            if i.flow == "branch" and n == len(i.ops) - 1:
                return  # `condition` reads it
            if to.space.name == "const" or to.offset != i.end:
                raise Refused(f"no rule for the instruction {i}")
            _conditionally(t, i, n, needed)
            return
        if name in ("BRANCH", "BRANCHIND", "CALL", "CALLIND", "RETURN"):
            if i.flow == "next":
                raise Refused(f"no rule for the instruction {i}")
            return
        if name == "CALLOTHER":
            if "LOCK" in i.name or i.name.startswith("XCHG"):  # there is one thread
                continue
            raise Refused(f"no rule for the instruction {i}")
        result = _value(t, i, o)
        if o.output is not None:
            assert result is not None
            write(t, o.output, result)


def _conditionally(t: Translator, i: Instruction, n: int, needed: set[int]) -> None:
    """What comes behind a jump over the rest of an instruction (cmov): both are computed, one is chosen."""
    rest = [i.ops[m] for m in range(n + 1, len(i.ops))]
    if any(o.opcode.name in ("LOAD", "STORE", "CBRANCH", "BRANCH", "CALLOTHER") for o in rest):
        raise Refused(f"no rule for the instruction {i}")
    skip = t.a.op(f"icmp ne i8 {read(t, i.ops[n].inputs[1]).text}, 0")
    keys = {found[0] for o in rest if o.output is not None and (found := general(o.output.space.name, o.output.offset))}
    flags = {f for o in rest if o.output is not None and (f := flag_of(o.output))}
    before = {k: t.lane(k) for k in keys}
    old = {f: t.flag(f) for f in flags}
    _run(t, i, n + 1, needed)
    for k, lane in before.items():
        new = t.lane(k)
        bits = t.a.op(f"select i1 {skip}, i64 {t.bits(lane)}, i64 {t.bits(new)}")
        t.put(k, Lane(bits, t.c.select(skip, lane.jet, new.jet)))
    for f, value in old.items():
        t.set_flag(f, t.a.op(f"select i1 {skip}, i8 {value}, i8 {t.flag(f)}"))


def condition(t: Translator, i: Instruction) -> str:
    """Whether a branch is taken (i1)."""
    return t.a.op(f"icmp ne i8 {read(t, i.ops[-1].inputs[1]).text}, 0")


def target(t: Translator, i: Instruction) -> str:
    """Where an indirect call or jump goes."""
    last = i.ops[-1]
    kept = set(range(len(i.ops) - 1))
    # What a call does to the stack pointer and stores there is known.
    kept -= {n for n, o in enumerate(i.ops) if o.opcode.name == "STORE" or _is_stack(o)} if "call" in i.flow else set()
    t.unique = {}
    _run(t, i, 0, kept)
    v = last.inputs[0]
    if v.space.name == "ram":
        known = t.module.pointer(v.offset)
        if known is not None:
            return t.constant(known)
        return t.bits(t.load(t.constant(v.offset)))
    return read(t, v).text


def _is_stack(o: Any) -> bool:
    return o.output is not None and general(o.output.space.name, o.output.offset) == ("rsp", 0)


# --- operands ------------------------------------------------------------------------------------------------


def read(t: Translator, v: Any) -> Number:
    """An operand of P-code."""
    space, n = v.space.name, v.size
    if space == "const":
        return Number(t.constant(v.offset) if n == 8 else str(v.offset & ((1 << 8 * n) - 1)), n)
    if space == "ram":
        return _load(t, t.constant(v.offset), n)
    if space == "unique":
        found = t.unique.get((v.offset, n))
        if found is not None:
            return found
        for (offset, size), whole in t.unique.items():
            if offset <= v.offset and v.offset + n <= offset + size:
                return _part(t, whole, v.offset - offset, n)
        raise Refused(f"no rule for the instruction {t.instruction}")
    if name := flag_of(v):
        return Number(t.flag(name), 1)
    if v.offset == 0x110:
        return Number(t.thread(), 8)
    register = general(space, v.offset)
    if register is None or register[1] + n > 8:
        raise Refused(f"no rule for the instruction {t.instruction}")
    lane = t.lane(register[0])
    return _part(t, Number(t.bits(lane), 8, lane.jet), register[1], n)


def _part(t: Translator, whole: Number, offset: int, n: int) -> Number:
    if n == whole.size:
        return whole
    text = _bits(t, whole, ((1 << n) - 1) << offset)
    if offset:
        text = t.a.op(f"lshr {whole.type} {text}, {8 * offset}")
    return Number(t.a.op(f"trunc {whole.type} {text} to i{8 * n}"), n)


def write(t: Translator, v: Any, x: Number) -> None:
    """Set an operand of P-code."""
    if x.size != v.size:
        raise Refused(f"no rule for the instruction {t.instruction}")
    if v.space.name == "unique":
        for key in [k for k in t.unique if k[0] < v.offset + v.size and v.offset < k[0] + k[1]]:
            del t.unique[key]
        t.unique[v.offset, v.size] = x
    elif v.space.name == "ram":
        _store(t, t.constant(v.offset), x)
    elif name := flag_of(v):
        t.set_flag(name, x.text)
    elif (register := general(v.space.name, v.offset)) is not None:
        if v.size == 8:
            t.put(register[0], Lane(x.text, x.jet))
            return
        shift = 8 * register[1]
        mask = ((1 << 8 * v.size) - 1) << shift
        old = t.a.op(f"and i64 {t.bits(t.lane(register[0]))}, {~mask & (1 << 64) - 1}")
        new = t.a.op(f"zext {x.type} {x.text} to i64")
        if shift:
            new = t.a.op(f"shl i64 {new}, {shift}")
        t.put(register[0], Lane(t.a.op(f"or i64 {old}, {new}")))
    elif v.offset != 0x288:  # the instruction pointer
        raise Refused(f"no rule for the instruction {t.instruction}")


def _load(t: Translator, address: str, n: int) -> Number:
    if n == 8:
        lane = t.load(address)
        return Number(t.bits(lane), 8, lane.jet)
    if n > 8:
        raise Refused(f"no rule for the instruction {t.instruction}")
    return Number(t.load_bytes(address, n), n)


def _store(t: Translator, address: str, x: Number) -> None:
    if x.size == 8:
        t.store(address, Lane(x.text, x.jet))
    elif x.size < 8:
        t.store_bytes(address, x.text, x.size)
    else:
        raise Refused(f"no rule for the instruction {t.instruction}")


def _bits(t: Translator, x: Number, part: int = 255) -> str:
    """An integer, of which the bytes that are used (a set) may not be those of an active double."""
    if x.jet is not None and not t.only_flags:
        t.guard(x.jet, "computes with the bits of a value that carries derivatives", part)
    return x.text


# --- operations ------------------------------------------------------------------------------------------------


def _value(t: Translator, i: Instruction, o: Any) -> Number | None:
    a, name = t.a, o.opcode.name
    if name == "STORE":
        _store(t, read(t, o.inputs[1]).text, read(t, o.inputs[2]))
        return None
    n = o.output.size
    if name == "LOAD":
        return _load(t, read(t, o.inputs[1]).text, n)
    x = read(t, o.inputs[0])
    if name == "COPY":
        return x
    if name == "SUBPIECE":
        offset = o.inputs[1].offset
        return _part(t, x, offset, n) if offset + n <= x.size else _fail(i)
    y = read(t, o.inputs[1]) if len(o.inputs) > 1 else None
    kind = f"i{8 * n}"
    if name in ("INT_ZEXT", "INT_SEXT"):
        return Number(a.op(f"{'zext' if name == 'INT_ZEXT' else 'sext'} {x.type} {_bits(t, x)} to {kind}"), n)
    if name in _BITWISE:
        assert y is not None
        if _same(o) and name != "INT_XOR":
            return x
        if _same(o):
            return Number("0", n)
        if n == 8 and (x.jet or y.jet) and not t.only_flags:
            lane = bitwise(t, _BITWISE[name], Lane(x.text, x.jet), Lane(y.text, y.jet))
            return Number(t.bits(lane), 8, lane.jet)
        return Number(a.op(f"{_BITWISE[name]} {kind} {x.text}, {y.text}"), n)
    if name in _ARITHMETIC:
        assert y is not None
        return Number(a.op(f"{_ARITHMETIC[name]} {kind} {_bits(t, x)}, {_bits(t, y)}"), n)
    if name in _SHIFTS:
        assert y is not None
        return _shifted(t, name, x, y)
    if name in _COMPARISONS:  # constant by pieces, whatever is compared
        assert y is not None
        c = a.op(f"icmp {_COMPARISONS[name]} {x.type} {x.text}, {y.text}")
        return Number(a.op(f"zext i1 {c} to i8"), 1)
    if name in ("INT_CARRY", "INT_SCARRY", "INT_SBORROW"):
        assert y is not None
        return _overflow(t, name, x, y)
    if name == "INT_NEGATE":
        return Number(a.op(f"xor {kind} {_bits(t, x)}, -1"), n)
    if name == "INT_2COMP":
        return Number(a.op(f"sub {kind} 0, {_bits(t, x)}"), n)
    if name in _DIVISIONS:
        assert y is not None
        if n > 8:
            return _fail(i)
        return Number(a.op(f"{_DIVISIONS[name]} {kind} {_bits(t, x)}, {_bits(t, y)}"), n)
    if name == "POPCOUNT":
        c = a.op(f"call {x.type} @llvm.ctpop.{x.type}({x.type} {_bits(t, x)})")
        if x.size == n:
            return Number(c, n)
        return Number(a.op(f"{'trunc' if x.size > n else 'zext'} {x.type} {c} to {kind}"), n)
    if name == "BOOL_NEGATE":
        return Number(a.op(f"xor i8 {x.text}, 1"), 1)
    if name in _LOGIC:
        assert y is not None
        return Number(a.op(f"{_LOGIC[name]} i8 {x.text}, {y.text}"), 1)
    return _fail(i)


def _fail(i: Instruction) -> Number:
    raise Refused(f"no rule for the instruction {i}")


def _same(o: Any) -> bool:
    u, v = o.inputs
    return (u.space.name, u.offset, u.size) == (v.space.name, v.offset, v.size) and u.space.name != "const"


def _shifted(t: Translator, name: str, x: Number, y: Number) -> Number:
    a, width = t.a, 8 * x.size
    # Shifts that leave nothing but sign and exponent are constant by pieces.
    free = name != "INT_LEFT" and y.text.isdigit() and int(y.text) >= 52 and x.size == 8
    value = x.text if free else _bits(t, x)
    if y.size == x.size:
        by = y.text
    else:
        by = a.op(f"{'zext' if y.size < x.size else 'trunc'} {y.type} {y.text} to {x.type}")
    if y.text.isdigit() and int(y.text) < width:
        return Number(a.op(f"{_SHIFTS[name]} {x.type} {value}, {y.text}"), x.size)
    large = a.op(f"icmp uge {x.type} {by}, {width}")
    safe = a.op(f"select i1 {large}, {x.type} {width - 1 if name == 'INT_SRIGHT' else 0}, {x.type} {by}")
    r = a.op(f"{_SHIFTS[name]} {x.type} {value}, {safe}")
    if name != "INT_SRIGHT":
        r = a.op(f"select i1 {large}, {x.type} 0, {x.type} {r}")
    return Number(r, x.size)


def _overflow(t: Translator, name: str, x: Number, y: Number) -> Number:
    a, kind, u, v = t.a, x.type, x.text, y.text
    if name == "INT_CARRY":
        c = a.op(f"icmp ult {kind} {a.op(f'add {kind} {u}, {v}')}, {u}")
    else:
        r = a.op(f"{'add' if name == 'INT_SCARRY' else 'sub'} {kind} {u}, {v}")
        p = a.op(f"xor {kind} {u}, {r if name == 'INT_SCARRY' else v}")
        q = a.op(f"xor {kind} {v if name == 'INT_SCARRY' else u}, {r}")
        c = a.op(f"icmp slt {kind} {a.op(f'and {kind} {p}, {q}')}, 0")
    return Number(a.op(f"zext i1 {c} to i8"), 1)


# --- instructions whose P-code is a loop, or wider than 64 bits -----------------------------------------------


def _counted(t: Translator, i: Instruction) -> bool:
    """Bit scans and counts of zeros."""
    if i.operands is None or len(i.operands) != 2 or not isinstance(i.operands[0], Register):
        return False
    x = t.integer(i.operands[1])
    name = "llvm.cttz" if i.name in ("TZCNT", "BSF") else "llvm.ctlz"
    scan = i.name in ("BSF", "BSR")
    r = t.a.op(f"call {x.type} @{name}.{x.type}({x.type} {x.text}, i1 false)")
    zero = t.a.op(f"icmp eq {x.type} {x.text}, 0")
    if i.name == "BSR":
        r = t.a.op(f"sub {x.type} {8 * x.size - 1}, {r}")
    if scan:  # of zero: the destination stays
        r = t.a.op(f"select i1 {zero}, {x.type} {t.integer(i.operands[0]).text}, {x.type} {r}")
        t.set_flag("zf", t.a.op(f"zext i1 {zero} to i8"))
    else:
        t.set_flag("cf", t.a.op(f"zext i1 {zero} to i8"))
        none = t.a.op(f"icmp eq {x.type} {r}, 0")
        t.set_flag("zf", t.a.op(f"zext i1 {none} to i8"))
    t.set_integer(i.operands[0], r, x.size)
    return True


def _divided(t: Translator, i: Instruction) -> bool:
    """A quotient of 128 bits by 64 whose upper half is the sign, or zero: what compilers make of ``/`` and ``%``."""
    if i.operands is None or len(i.operands) != 1:
        return False
    y = t.integer(i.operands[0])
    if y.size != 8:
        return False
    low, high = t.inactive(t.lane("rax")), t.inactive(t.lane("rdx"))
    signed = i.name == "IDIV"
    expected = t.a.op(f"ashr i64 {low}, 63") if signed else "0"
    wide = t.a.op(f"icmp ne i64 {high}, {expected}")
    t.leave_if(wide, "divides an integer of 128 bits")
    s = "s" if signed else "u"
    t.put("rax", Lane(t.a.op(f"{s}div i64 {low}, {y.text}")))
    t.put("rdx", Lane(t.a.op(f"{s}rem i64 {low}, {y.text}")))
    return True


def _string(t: Translator, i: Instruction) -> bool:
    """``rep stos`` and ``rep movs``, forward."""
    kind, _, rep = i.name.partition(".")
    if rep != "REP":
        return False
    size = {"B": 1, "W": 2, "D": 4, "Q": 8}[kind[-1]]
    count, to = t.bits(t.lane("rcx")), t.bits(t.lane("rdi"))
    n = t.a.op(f"mul i64 {count}, {size}")
    if kind.startswith("MOVS"):
        source = t.bits(t.lane("rsi"))
        t.a.do(f"call void @jp_copy(i64 {to}, i64 {source}, i64 {n}, i64 {t.site(PIECES)})")
        t.put("rsi", Lane(t.a.op(f"add i64 {source}, {n}")))
    else:
        value = t.inactive(t.lane("rax"))
        a, head, body, end = t.a, t.a.label("fill"), t.a.label("fills"), t.a.label("filled")
        before = a.block
        a.go(head)
        a.begin(head)
        at = f"%fill.{head}"
        a.lines.append(f"  {at} = phi i64 [0, %{before}], [{at}.next, %{body}]")
        more = a.op(f"icmp ult i64 {at}, {n}")
        a.fork(more, body, end)
        a.begin(body)
        here = a.op(f"inttoptr i64 {a.op(f'add i64 {to}, {at}')} to ptr")
        part = value if size == 8 else a.op(f"trunc i64 {value} to i{8 * size}")
        a.do(f"store i{8 * size} {part}, ptr {here}, align 1, !tbaa !2")
        a.lines.append(f"  {at}.next = add i64 {at}, {size}")
        a.go(head)
        a.begin(end)
        a.do(f"call void @jp_clear(i64 {to}, i64 {n}, i64 {t.site(FILLS)})")
    t.put("rdi", Lane(t.a.op(f"add i64 {to}, {n}")))
    t.put("rcx", Lane("0"))
    return True


_BY_HAND = {
    **dict.fromkeys("TZCNT LZCNT BSF BSR".split(), _counted),
    **dict.fromkeys(("DIV", "IDIV"), _divided),
    **dict.fromkeys([f"{s}{k}" for s in ("STOS", "MOVS") for k in "BWDQ"], _string),
}
