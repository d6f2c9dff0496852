"""Instructions on doubles in vector registers: SSE2 to AVX2 and FMA, and the moves that compilers put between."""

from __future__ import annotations

import re

from .coefficients import Jet, number
from .decode import Memory, Operand, Register, Vector
from .instructions import RELATIONS, Table, count, immediate, three
from .translator import Lane, Refused, Translator

SIGN, REST = 1 << 63, (1 << 63) - 1
RULES = Table()
declare = RULES.declare


def of(t: Translator, value: str, jet: Jet = None) -> Lane:
    """A lane that holds a double."""
    return Lane(None, jet, value)


# --- arithmetic on doubles -------------------------------------------------------------------------------------


def arithmetic(t: Translator, op: str, x: Lane, y: Lane) -> Lane:
    """One operation on two doubles."""
    u, v = t.double(x), t.double(y)
    if op == "ADD":
        return of(t, t.a.op(f"fadd double {u}, {v}"), t.c.add(x.jet, y.jet))
    if op == "SUB":
        return of(t, t.a.op(f"fsub double {u}, {v}"), t.c.subtract(x.jet, y.jet))
    if op == "MUL":
        return of(t, t.a.op(f"fmul double {u}, {v}"), t.c.multiply(u, x.jet, v, y.jet))
    if op == "DIV":
        z = t.a.op(f"fdiv double {u}, {v}")
        return of(t, z, t.c.divide(z, v, x.jet, y.jet))
    c = t.a.op(f"fcmp {'ogt' if op == 'MAX' else 'olt'} double {u}, {v}")
    return of(t, t.a.op(f"select i1 {c}, double {u}, double {v}"), t.c.select(c, x.jet, y.jet))


@declare("ADDPD SUBPD MULPD DIVPD MAXPD MINPD")
def _packed(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = count(to)
    t.set_lanes(to, [arithmetic(t, name[:3], p, q) for p, q in zip(t.lanes(x, n), t.lanes(y, n), strict=True)])


@declare("ADDSD SUBSD MULSD DIVSD MAXSD MINSD")
def _scalar(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    first, second = t.lanes(x, 2)
    t.set_lanes(to, [arithmetic(t, name[:3], first, t.low(y)), second])


def root(t: Translator, x: Lane) -> Lane:
    """The square root."""
    z = t.a.op(f"call double @llvm.sqrt.f64(double {t.double(x)})")
    return of(t, z, t.c.sqrt(z, x.jet))


@declare("SQRTPD")
def _roots(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    t.set_lanes(ops[0], [root(t, x) for x in t.lanes(ops[1], count(ops[0]))])


@declare("SQRTSD")
def _root(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    upper = t.lanes(x, 2)[1]
    t.set_lanes(to, [root(t, t.low(y)), upper])


def _rounded(t: Translator, x: Lane, mode: int) -> Lane:
    """To an integer: constant by pieces."""
    name = "rint" if mode & 4 else ("rint", "floor", "ceil", "trunc")[mode & 3]
    return of(t, t.a.op(f"call double @llvm.{name}.f64(double {t.double(x)})"))


@declare("ROUNDSD")
def _round(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops[:-1])
    upper = t.lanes(x, 2)[1]
    t.set_lanes(to, [_rounded(t, t.low(y), immediate(ops[-1])), upper])


@declare("ROUNDPD")
def _rounds(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    t.set_lanes(ops[0], [_rounded(t, x, immediate(ops[2])) for x in t.lanes(ops[1], count(ops[0]))])


@declare("HADDPD HSUBPD")
def _horizontal(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = count(to)
    u, v = t.lanes(x, n), t.lanes(y, n)
    out = []
    for i in range(0, n, 2):
        out += [arithmetic(t, name[1:4], w[i], w[i + 1]) for w in (u, v)]
    t.set_lanes(to, out)


@declare("ADDSUBPD")
def _alternating(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    pairs = zip(t.lanes(x, count(to)), t.lanes(y, count(to)), strict=True)
    t.set_lanes(to, [arithmetic(t, ("SUB", "ADD")[i % 2], p, q) for i, (p, q) in enumerate(pairs)])


def fused(t: Translator, x: Lane, y: Lane, z: Lane, negative: bool, minus: bool) -> Lane:
    """``± x y ± z`` with one rounding."""
    u, v, w = t.double(x), t.double(y), t.double(z)
    a = t.a.op(f"fneg double {u}") if negative else u
    c = t.a.op(f"fneg double {w}") if minus else w
    value = t.a.op(f"call double @llvm.fma.f64(double {a}, double {v}, double {c})")
    product = t.c.multiply(u, x.jet, v, y.jet)
    if negative:
        product = t.c.negate(product)
    return of(t, value, t.c.subtract(product, z.jet) if minus else t.c.add(product, z.jet))


def _fma(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    kind, order, width = _FMA.fullmatch(name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    to, second, third = ops
    n = 1 if width == "SD" else count(to)
    args = [t.lanes(o, n) for o in (to, second, third)]
    x, y, z = (args[int(c) - 1] for c in order)
    out = []
    for i in range(n):
        minus = {"ADD": False, "SUB": True, "ADDSUB": i % 2 == 0, "SUBADD": i % 2 == 1}[kind.removeprefix("N")[1:]]
        out.append(fused(t, x[i], y[i], z[i], kind.startswith("N"), minus))
    if n == 1:
        out.append(t.lanes(to, 2)[1])
    t.set_lanes(to, out)


# A rule's name has lost its V: FMADD231SD. The three digits say which operand is x, y and z of x y + z.
_FMA = re.compile(r"F(N?M(?:ADD|SUB|ADDSUB|SUBADD))(132|213|231)(PD|SD)")
for _sum in ("MADD", "MSUB", "NMADD", "NMSUB", "MADDSUB", "MSUBADD"):
    for _order in ("132", "213", "231"):
        for _width in ("PD", "SD"):
            if _width == "PD" or _sum not in ("MADDSUB", "MSUBADD"):
                declare(f"F{_sum}{_order}{_width}")(_fma)


# --- comparisons -------------------------------------------------------------------------------------------------


def _compared(t: Translator, x: Lane, y: Lane) -> Lane:
    name = t.instruction.name.removeprefix("V")
    relation = RELATIONS[name[3:-2]]
    c = t.a.op(f"fcmp {relation} double {t.double(x)}, {t.double(y)}")
    return Lane(t.a.op(f"sext i1 {c} to i64"))


@declare("CMP.PD")
def _compare(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = count(to)
    t.set_lanes(to, [_compared(t, p, q) for p, q in zip(t.lanes(x, n), t.lanes(y, n), strict=True)])


@declare("CMP.SD")
def _compare_one(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    first, second = t.lanes(x, 2)
    t.set_lanes(to, [_compared(t, first, t.low(y)), second])


def set_flags(t: Translator, kind: str, u: str, v: str) -> None:
    """Flags of a comparison of two numbers of a type of LLVM's."""
    for flag, relation in (("zf", "ueq"), ("pf", "uno"), ("cf", "ult")):
        t.set_flag(flag, t.a.op(f"zext i1 {t.a.op(f'fcmp {relation} {kind} {u}, {v}')} to i8"))
    for flag in ("sf", "of", "af"):
        t.set_flag(flag, "0")


@declare("UCOMISD COMISD")
def _flags(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    set_flags(t, "double", t.double(t.low(ops[0])), t.double(t.low(ops[1])))


@declare("MOVMSKPD")
def _signs(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    total = "0"
    assert isinstance(ops[1], Vector)
    for i, lane in enumerate(t.lanes(ops[1], count(ops[1]))):
        bit = t.a.op(f"lshr i64 {t.bits(lane)}, 63")
        total = t.a.op(f"or i64 {total}, {t.a.op(f'shl i64 {bit}, {i}')}")
    t.set_integer(ops[0], total, 8)


@declare("TESTPD PTEST")
def _test(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    n, mask = count(ops[0]), SIGN if name == "TESTPD" else (1 << 64) - 1
    both = other = "0"
    for x, y in zip(t.lanes(ops[0], n), t.lanes(ops[1], n), strict=True):
        u, v = t.bits(x), t.bits(y)
        both = t.a.op(f"or i64 {both}, {t.a.op(f'and i64 {u}, {v}')}")
        rest = t.a.op(f"xor i64 {u}, -1")
        other = t.a.op(f"or i64 {other}, {t.a.op(f'and i64 {rest}, {v}')}")
    for flag, value in (("zf", both), ("cf", other)):
        c = t.a.op(f"icmp eq i64 {t.a.op(f'and i64 {value}, {mask}')}, 0")
        t.set_flag(flag, t.a.op(f"zext i1 {c} to i8"))
    for flag in ("sf", "of", "af", "pf"):
        t.set_flag(flag, "0")


# --- bits of doubles: masks and signs -------------------------------------------------------------------------------


def bitwise(t: Translator, op: str, x: Lane, y: Lane) -> Lane:
    """And, or, xor of two lanes, one of which may carry derivatives while the other one is a mask."""
    a = t.a
    value = a.op(f"{op} i64 {t.bits(x)}, {t.bits(y)}")
    if x.jet is None and y.jet is None:
        return Lane(value)
    if y.jet is None:
        return Lane(value, masked(t, op, x, t.bits(y)))
    if x.jet is None:
        return Lane(value, masked(t, op, y, t.bits(x)))
    # Which one is the mask turns out while it runs. What a mask has blanked out has coefficients of zero.
    first = t.c.active(x.jet)
    both = a.op(f"and i1 {first}, {t.c.active(y.jet)}")
    t.trap_if(both, f"takes '{op}' of the bits of two values that carry derivatives")
    return Lane(value, t.c.select(first, masked(t, op, x, t.bits(y)), masked(t, op, y, t.bits(x))))


def masked(t: Translator, op: str, x: Lane, mask: str) -> Jet:
    """Coefficients of ``x op mask``: kept, negated by a mask of the sign, or zero; other masks are errors."""
    a, jet = t.a, x.jet
    assert jet is not None

    def equal(value: int) -> str:
        return a.op(f"icmp eq i64 {mask}, {value}")

    def signed(when_negative: Jet, otherwise: Jet) -> Jet:
        negative = a.op(f"icmp slt i64 {t.bits(x)}, 0")
        return t.c.select(negative, when_negative, otherwise)

    known = int(mask) & (1 << 64) - 1 if mask.lstrip("-").isdigit() else None
    if op == "and":
        if known is not None:
            if known | 0xFFFFFFFF == (1 << 64) - 1:
                return jet  # all, or all but low bits: a rounding
            if known == REST:
                return signed(t.c.negate(jet), jet)
            if known & REST == 0:
                return None  # the sign, which is constant by pieces
        low = a.op(f"or i64 {mask}, 4294967295")
        whole = a.op(f"icmp eq i64 {low}, -1")
        none = a.op(f"icmp eq i64 {a.op(f'and i64 {mask}, {REST}')}, 0")
        absolute = equal(REST)
        out = t.c.select(whole, jet, t.c.select(absolute, signed(t.c.negate(jet), jet), None))
        fine = a.op(f"or i1 {a.op(f'or i1 {whole}, {none}')}, {absolute}")
    else:
        flipped = t.c.negate(jet) if op == "xor" else signed(jet, t.c.negate(jet))
        if known == 0:
            return jet
        if known == SIGN:
            return flipped
        zero, sign = equal(0), equal(-SIGN)
        out = t.c.select(zero, jet, t.c.select(sign, flipped, None))
        fine = a.op(f"or i1 {zero}, {sign}")
    strange = a.op(f"xor i1 {fine}, true")
    bad = a.op(f"and i1 {strange}, {t.c.active(jet)}")
    t.trap_if(bad, "changes bits of a value that carries derivatives, by a mask that is not of its sign")
    return out


@declare("ANDPD ANDPS PAND ORPD ORPS POR XORPD XORPS PXOR ANDNPD ANDNPS PANDN")
def _bits(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = count(to)
    op = re.sub(r"^P?(AND|OR|XOR|ANDN)(PD|PS)?$", r"\1", name).lower()
    if x == y and op in ("xor", "andn"):
        t.set_lanes(to, [Lane("0") for _ in range(n)])
        return
    u, v = t.lanes(x, n), t.lanes(y, n)
    if x == y:
        t.set_lanes(to, u)
        return
    if op == "andn":
        u = [Lane(t.a.op(f"xor i64 {t.inactive(w)}, -1")) for w in u]
        op = "and"
    t.set_lanes(to, [bitwise(t, op, p, q) for p, q in zip(u, v, strict=True)])


def _chosen(t: Translator, condition: str, x: Lane, y: Lane) -> Lane:
    bits = t.a.op(f"select i1 {condition}, i64 {t.bits(x)}, i64 {t.bits(y)}")
    return Lane(bits, t.c.select(condition, x.jet, y.jet))


@declare("BLENDVPD PBLENDVB")
def _blended(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    mask = ops[-1] if t.instruction.name.startswith("V") else Vector(0, 16)
    n, out = count(to), []
    for u, v, m in zip(t.lanes(x, n), t.lanes(y, n), t.lanes(mask, n), strict=True):
        if name == "PBLENDVB":  # by bytes: whole lanes alone
            bits = t.inactive(m)
            whole = t.a.op(f"icmp eq i64 {bits}, -1")
            none = t.a.op(f"icmp eq i64 {bits}, 0")
            odd = t.a.op(f"xor i1 {t.a.op(f'or i1 {whole}, {none}')}, true")
            t.leave_if(odd, "blends parts of 64 bits")
            out.append(_chosen(t, whole, v, u))
        else:
            out.append(_chosen(t, t.a.op(f"icmp slt i64 {t.bits(m)}, 0"), v, u))
    t.set_lanes(to, out)


# --- moves ----------------------------------------------------------------------------------------------------------


@declare("MOVAPD MOVAPS MOVUPD MOVUPS MOVDQA MOVDQU LDDQU MOVNTPD MOVNTPS MOVNTDQ")
def _move(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    size = next(o.size for o in ops if isinstance(o, Vector))
    t.set_lanes(ops[0], t.lanes(ops[1], size // 8))


@declare("MOVSD")
def _move_double(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    if len(ops) == 3:
        t.set_lanes(ops[0], [t.low(ops[2]), t.lanes(ops[1], 2)[1]])
    elif isinstance(ops[1], Memory):
        t.set_lanes(ops[0], [t.low(ops[1]), Lane("0")])
    elif isinstance(ops[0], Memory):
        t.set_lanes(ops[0], [t.low(ops[1])])
    else:
        t.set_lanes(ops[0], [t.low(ops[1]), t.lanes(ops[0], 2)[1]])


@declare("MOVQ")
def _move_word(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    lane = t.low(ops[1])
    t.set_lanes(ops[0], [lane, Lane("0")] if isinstance(ops[0], Vector) else [lane])


@declare("MOVD")
def _move_half(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    if isinstance(ops[0], Register) and ops[0].size == 8 or isinstance(ops[1], Register) and ops[1].size == 8:
        return _move_word(t, name, ops)
    if isinstance(ops[0], Vector):
        x = t.integer(ops[1])
        t.set_lanes(ops[0], [Lane(t.a.op(f"zext i32 {x.text} to i64")), Lane("0")])
    else:
        bits = t.a.op(f"trunc i64 {t.inactive(t.low(ops[1]))} to i32")
        t.set_integer(ops[0], bits, 4)
    return None


@declare("MOVHPD MOVHPS MOVLPD MOVLPS")
def _move_part(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    high = name[3] == "H"
    if isinstance(ops[0], Memory):
        t.set_lanes(ops[0], [t.lanes(ops[1], 2)[high]])
        return
    to, x, y = three(t, ops)
    first, second = t.lanes(x, 2)
    new = t.low(y)
    t.set_lanes(to, [first, new] if high else [new, second])


@declare("MOVHLPS MOVLHPS UNPCKLPD UNPCKHPD PUNPCKLQDQ PUNPCKHQDQ")
def _interleaved(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    if name in ("MOVHLPS", "MOVLHPS"):
        u, v = t.lanes(x, 2), t.lanes(y, 2)
        t.set_lanes(to, [v[1], u[1]] if name == "MOVHLPS" else [u[0], v[0]])
        return
    n, high = count(to), "H" in name.removeprefix("P")
    u, v = t.lanes(x, n), t.lanes(y, n)
    t.set_lanes(to, [w[i + high] for i in range(0, n, 2) for w in (u, v)])


@declare("MOVDDUP")
def _doubled(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    n = count(ops[0])
    if n == 2:
        x = t.low(ops[1])
        t.set_lanes(ops[0], [x, x])
    else:
        u = t.lanes(ops[1], n)
        t.set_lanes(ops[0], [u[0], u[0], u[2], u[2]])


@declare("SHUFPD")
def _shuffled(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops[:-1])
    bits, n = immediate(ops[-1]), count(to)
    u, v = t.lanes(x, n), t.lanes(y, n)
    t.set_lanes(to, [(v if i % 2 else u)[i - i % 2 + (bits >> i & 1)] for i in range(n)])


@declare("BLENDPD")
def _picked(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops[:-1])
    bits, n = immediate(ops[-1]), count(to)
    u, v = t.lanes(x, n), t.lanes(y, n)
    t.set_lanes(to, [(v if bits >> i & 1 else u)[i] for i in range(n)])


@declare("PERMILPD")
def _permuted(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    bits, n = immediate(ops[2]), count(ops[0])
    u = t.lanes(ops[1], n)
    t.set_lanes(ops[0], [u[i - i % 2 + (bits >> i & 1)] for i in range(n)])


@declare("PERMPD PERMQ")
def _crossed(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    bits, u = immediate(ops[2]), t.lanes(ops[1], 4)
    t.set_lanes(ops[0], [u[bits >> 2 * i & 3] for i in range(4)])


@declare("PERM2F128 PERM2I128")
def _halves(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    bits, out = immediate(ops[3]), []
    u = [*t.lanes(ops[1], 4), *t.lanes(ops[2], 4)]
    for part in (bits & 15, bits >> 4):
        out += [Lane("0"), Lane("0")] if part & 8 else u[2 * (part & 3) : 2 * (part & 3) + 2]
    t.set_lanes(ops[0], out)


@declare("BROADCASTSD PBROADCASTQ")
def _broadcast(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    x = t.low(ops[1])
    t.set_lanes(ops[0], [x] * count(ops[0]))


@declare("BROADCASTF128 BROADCASTI128")
def _broadcast_half(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    t.set_lanes(ops[0], t.lanes(ops[1], 2) * 2)


@declare("INSERTF128 INSERTI128")
def _inserted(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    u, v = t.lanes(ops[1], 4), t.lanes(ops[2], 2)
    t.set_lanes(ops[0], [*u[:2], *v] if immediate(ops[3]) & 1 else [*v, *u[2:]])


@declare("EXTRACTF128 EXTRACTI128")
def _extracted(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    at = 2 * (immediate(ops[2]) & 1)
    t.set_lanes(ops[0], t.lanes(ops[1], 4)[at : at + 2])


@declare("PEXTRQ")
def _extract_word(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    t.set_lanes(ops[0], [t.lanes(ops[1], 2)[immediate(ops[2]) & 1]])


@declare("PINSRQ")
def _insert_word(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops[:-1])
    lanes = t.lanes(x, 2)
    lanes[immediate(ops[-1]) & 1] = t.low(y)
    t.set_lanes(to, lanes)


@declare("PALIGNR PSRLDQ PSLLDQ")
def _shifted(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    by = immediate(ops[-1])
    if name == "PALIGNR":
        to, x, y = three(t, ops[:-1])
    else:
        to, x = ops[0], ops[1] if t.instruction.name.startswith("V") else ops[0]
        y = x
    n, zero = count(to), Lane("0")
    if by % 8:
        integers = [Lane(t.inactive(w)) for w in t.lanes(x, n)]
        if name == "PALIGNR" or n != 2:
            raise Refused(f"no rule for the instruction {t.instruction}")
        t.set_lanes(to, _by_bytes(t, integers, by, name == "PSRLDQ"))
        return
    out, u, v = [], t.lanes(x, n), t.lanes(y, n)
    for half in range(0, n, 2):
        if name == "PALIGNR":
            row = [*v[half : half + 2], *u[half : half + 2], zero, zero]
        elif name == "PSRLDQ":
            row = [*u[half : half + 2], zero, zero]
        else:
            row = [*[zero] * (by // 8), *u[half : half + 2]]
            by_left = 0
            out += row[by_left : by_left + 2]
            continue
        start = min(by // 8, len(row) - 2)
        out += row[start : start + 2]
    t.set_lanes(to, out)


def _by_bytes(t: Translator, lanes: list[Lane], by: int, right: bool) -> list[Lane]:
    whole = joined(t, lanes, "i128")
    moved = t.a.op(f"{'lshr' if right else 'shl'} i128 {whole}, {min(by, 16) * 8 if by < 16 else 0}")
    return apart(t, moved if by < 16 else "0", "i128", 2)


def joined(t: Translator, lanes: list[Lane], kind: str) -> str:
    """Lanes that carry nothing as one value of a type of LLVM's."""
    n = len(lanes)
    whole = "poison"
    for i, lane in enumerate(lanes):
        whole = t.a.op(f"insertelement <{n} x i64> {whole}, i64 {t.inactive(lane)}, i32 {i}")
    return t.a.op(f"bitcast <{n} x i64> {whole} to {kind}")


def apart(t: Translator, x: str, kind: str, n: int) -> list[Lane]:
    """One value as n lanes."""
    whole = t.a.op(f"bitcast {kind} {x} to <{n} x i64>")
    return [Lane(t.a.op(f"extractelement <{n} x i64> {whole}, i32 {i}")) for i in range(n)]


# --- conversions ---------------------------------------------------------------------------------------------------


@declare("CVTSI2SD")
def _from_integer(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = t.integer(y)
    t.set_lanes(to, [of(t, t.a.op(f"sitofp {n.type} {n.text} to double")), t.lanes(x, 2)[1]])


@declare("CVTTSD2SI CVTSD2SI")
def _to_integer(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    assert isinstance(ops[0], Register)
    x = t.double(t.low(ops[1]))
    if name == "CVTSD2SI":
        x = t.a.op(f"call double @llvm.rint.f64(double {x})")
    t.set_integer(ops[0], _truncated(t, x, ops[0].size), ops[0].size)


def _truncated(t: Translator, x: str, size: int) -> str:
    """As the processor does it: what does not fit is the smallest integer."""
    kind, limit = f"i{8 * size}", float(1 << 8 * size - 1)
    a = t.a
    below = f"fcmp ogt double {x}, {number(-limit - 1)}" if size == 4 else f"fcmp oge double {x}, {number(-limit)}"
    fits = a.op(f"and i1 {a.op(below)}, {a.op(f'fcmp olt double {x}, {number(limit)}')}")
    safe = a.op(f"select i1 {fits}, double {x}, double 0.0")
    return a.op(f"select i1 {fits}, {kind} {a.op(f'fptosi double {safe} to {kind}')}, {kind} {-(1 << 8 * size - 1)}")


@declare("CVTDQ2PD")
def _from_integers(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    n = count(ops[0])
    words = [t.inactive(w) for w in t.lanes(ops[1], n // 2)]
    out = []
    for i in range(n):
        half = t.a.op(f"lshr i64 {words[i // 2]}, {32 * (i % 2)}")
        out.append(of(t, t.a.op(f"sitofp i32 {t.a.op(f'trunc i64 {half} to i32')} to double")))
    t.set_lanes(ops[0], out)


@declare("CVTTPD2DQ CVTPD2DQ")
def _to_integers(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    size = ops[1].size if isinstance(ops[1], Vector | Memory) else 0
    halves = []
    for lane in t.lanes(ops[1], size // 8):
        x = t.double(lane)
        if name == "CVTPD2DQ":
            x = t.a.op(f"call double @llvm.rint.f64(double {x})")
        halves.append(t.a.op(f"zext i32 {_truncated(t, x, 4)} to i64"))
    out = [
        Lane(t.a.op(f"or i64 {a}, {t.a.op(f'shl i64 {b}, 32')}"))
        for a, b in zip(halves[::2], halves[1::2], strict=True)
    ]
    t.set_lanes(ops[0], [*out, *[Lane("0")] * (2 - len(out))])
