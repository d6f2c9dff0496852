"""Single precision and integers in vector registers: carried where nothing active reaches them, errors elsewhere."""

from __future__ import annotations

from .decode import Memory, Operand, Vector
from .instructions import Table, count, immediate, three
from .translator import Lane, Translator
from .vectors import apart, joined, of, set_flags

RULES = Table()
declare = RULES.declare


# --- single precision, where nothing is active -----------------------------------------------------------------------


def _single(t: Translator, o: Operand) -> str:
    """The number in the low 32 bits."""
    if isinstance(o, Memory):
        bits = t.load_bytes(t.address(o), 4)
    else:
        bits = t.a.op(f"trunc i64 {t.inactive(t.low(o), 'computes in single precision')} to i32")
    return t.a.op(f"bitcast i32 {bits} to float")


def _set_single(t: Translator, to: Vector, rest: Lane, x: str) -> Lane:
    bits = t.a.op(f"zext i32 {t.a.op(f'bitcast float {x} to i32')} to i64")
    high = t.a.op(f"and i64 {t.inactive(rest, 'computes in single precision')}, {0xFFFFFFFF << 32}")
    return Lane(t.a.op(f"or i64 {high}, {bits}"))


@declare("ADDSS SUBSS MULSS DIVSS MAXSS MINSS SQRTSS")
def _in_single(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    v = _single(t, y)
    if name == "SQRTSS":
        r = t.a.op(f"call float @llvm.sqrt.f32(float {v})")
    elif name[:3] in ("MAX", "MIN"):
        u = _single(t, x)
        c = t.a.op(f"fcmp {'ogt' if name[:3] == 'MAX' else 'olt'} float {u}, {v}")
        r = t.a.op(f"select i1 {c}, float {u}, float {v}")
    else:
        r = t.a.op(f"f{name[:3].lower()} float {_single(t, x)}, {v}")
    first, second = t.lanes(x, 2)
    t.set_lanes(to, [_set_single(t, to, first, r), second])


@declare("MOVSS")
def _move_single(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    if isinstance(ops[0], Memory):
        t.store_bytes(t.address(ops[0]), t.a.op(f"bitcast float {_single(t, ops[1])} to i32"), 4)
    elif isinstance(ops[1], Memory):
        t.set_lanes(ops[0], [_set_single(t, ops[0], Lane("0"), _single(t, ops[1])), Lane("0")])  # type: ignore[arg-type]
    else:
        to, x, y = three(t, ops)
        first, second = t.lanes(x, 2)
        t.set_lanes(to, [_set_single(t, to, first, _single(t, y)), second])


@declare("UCOMISS COMISS")
def _single_flags(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    set_flags(t, "float", _single(t, ops[0]), _single(t, ops[1]))


@declare("CVTSS2SD")
def _to_double(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    t.set_lanes(to, [of(t, t.a.op(f"fpext float {_single(t, y)} to double")), t.lanes(x, 2)[1]])


@declare("CVTSD2SS")
def _to_single(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    lane = t.low(y)
    t.guard(lane.jet, "is rounded to single precision, which carries no derivatives")
    first, second = t.lanes(x, 2)
    t.set_lanes(to, [_set_single(t, to, first, t.a.op(f"fptrunc double {t.double(lane)} to float")), second])


@declare("CVTSI2SS")
def _single_from_integer(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = t.integer(y)
    first, second = t.lanes(x, 2)
    t.set_lanes(to, [_set_single(t, to, first, t.a.op(f"sitofp {n.type} {n.text} to float")), second])


# --- integers in vector registers, where nothing is active ------------------------------------------------------------


def _kind(width: str, n: int) -> str:
    bits = {"B": 8, "W": 16, "D": 32, "Q": 64}[width]
    return f"<{64 * n // bits} x i{bits}>"


@declare(
    "PADDB PADDW PADDD PADDQ PSUBB PSUBW PSUBD PSUBQ PMULLW PMULLD PCMPEQB PCMPEQW PCMPEQD PCMPEQQ PCMPGTB PCMPGTW "
    "PCMPGTD PCMPGTQ PMAXSD PMINSD PMAXUD PMINUD"
)
def _integers(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = count(to)
    kind = _kind(name[-1], n)
    if name.startswith("PCMPEQ") and x == y:  # all ones
        t.set_lanes(to, [Lane("-1") for _ in range(n)])
        return
    u, v = joined(t, t.lanes(x, n), kind), joined(t, t.lanes(y, n), kind)
    if name.startswith("PCMP"):
        c = t.a.op(f"icmp {'eq' if name[4:6] == 'EQ' else 'sgt'} {kind} {u}, {v}")
        r = t.a.op(f"sext <{kind[1:].split()[0]} x i1> {c} to {kind}")
    elif name.startswith(("PMAX", "PMIN")):
        op = f"@llvm.{name[4].lower()}{name[1:4].lower()}.v{kind[1:].replace(' x ', '')[:-1]}"
        r = t.a.op(f"call {kind} {op}({kind} {u}, {kind} {v})")
    else:
        r = t.a.op(f"{ {'PADD': 'add', 'PSUB': 'sub', 'PMUL': 'mul'}[name[:4]] } {kind} {u}, {v}")
    t.set_lanes(to, apart(t, r, kind, n))


@declare("PSLLW PSLLD PSLLQ PSRLW PSRLD PSRLQ PSRAW PSRAD")
def _shift(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to = ops[0]
    x = ops[1] if len(ops) == 3 else ops[0]
    n, by = count(to), immediate(ops[-1])
    bits = {"W": 16, "D": 32, "Q": 64}[name[-1]]
    kind = _kind(name[-1], n)
    lanes = t.lanes(x, n)
    if name == "PSRLQ" and by >= 52:  # sign and exponent alone: constant by pieces
        lanes = [Lane(t.bits(w)) for w in lanes]
    u = joined(t, lanes, kind)
    if by >= bits and name[2] != "R" or by >= bits and name[3] == "L":
        t.set_lanes(to, [Lane("0") for _ in range(n)])
        return
    op = {"PSLL": "shl", "PSRL": "lshr", "PSRA": "ashr"}[name[:4]]
    amount = "<" + ", ".join([f"i{bits} {min(by, bits - 1)}"] * (64 * n // bits)) + ">"
    t.set_lanes(to, apart(t, t.a.op(f"{op} {kind} {u}, {amount}"), kind, n))


@declare("PSHUFD SHUFPS")
def _shuffle_halves(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    bits = immediate(ops[-1])
    to, x, y = (ops[0], ops[1], ops[1]) if name == "PSHUFD" else three(t, ops[:-1])
    n = count(to)
    u, v = t.lanes(x, n), t.lanes(y, n)
    order = [bits >> 2 * i & 3 for i in range(4)]
    if all(order[i] % 2 == 0 and order[i + 1] == order[i] + 1 for i in (0, 2)):  # whole lanes
        row = [(u, order[0] // 2), (v, order[2] // 2)]
        t.set_lanes(to, [w[half + at] for half in range(0, n, 2) for w, at in row])
        return
    kind = _kind("D", n)
    a, b = joined(t, u, kind), joined(t, v, kind)
    mask = []
    for half in range(0, 2 * n, 4):
        mask += [half + order[0], half + order[1], 2 * n + half + order[2], 2 * n + half + order[3]]
    text = ", ".join(f"i32 {m}" for m in mask)
    r = t.a.op(f"shufflevector {kind} {a}, {kind} {b}, <{2 * n} x i32> <{text}>")
    t.set_lanes(to, apart(t, r, kind, n))


@declare("PUNPCKLBW PUNPCKLWD PUNPCKLDQ PUNPCKHBW PUNPCKHWD PUNPCKHDQ UNPCKLPS UNPCKHPS")
def _interleave(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    n = count(to)
    width = "D" if name.endswith("PS") else name[-2]
    kind = _kind(width, n)
    elements = int(kind[1:].split()[0])
    each = elements // (n // 2)  # within 128 bits
    high = "H" in name.removeprefix("P")[4:6]
    mask = []
    for half in range(0, elements, each):
        for p in range(each // 2):
            at = half + p + (each // 2 if high else 0)
            mask += [at, elements + at]
    a, b = joined(t, t.lanes(x, n), kind), joined(t, t.lanes(y, n), kind)
    text = ", ".join(f"i32 {m}" for m in mask)
    r = t.a.op(f"shufflevector {kind} {a}, {kind} {b}, <{elements} x i32> <{text}>")
    t.set_lanes(to, apart(t, r, kind, n))


@declare("PMOVSXDQ PMOVZXDQ")
def _widened(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    n, out = count(ops[0]), []
    words = [t.inactive(w) for w in t.lanes(ops[1], n // 2)]
    for i in range(n):
        half = t.a.op(f"trunc i64 {t.a.op(f'lshr i64 {words[i // 2]}, {32 * (i % 2)}')} to i32")
        out.append(Lane(t.a.op(f"{'sext' if name[4] == 'S' else 'zext'} i32 {half} to i64")))
    t.set_lanes(ops[0], out)


@declare("PMULUDQ")
def _long_products(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops)
    out = []
    for u, v in zip(t.lanes(x, count(to)), t.lanes(y, count(to)), strict=True):
        p, q = (t.a.op(f"and i64 {t.inactive(w)}, 4294967295") for w in (u, v))
        out.append(Lane(t.a.op(f"mul i64 {p}, {q}")))
    t.set_lanes(to, out)


@declare("PEXTRD")
def _extract_half(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    at = immediate(ops[2]) & 3
    word = t.a.op(f"lshr i64 {t.inactive(t.lanes(ops[1], 2)[at // 2])}, {32 * (at % 2)}")
    t.set_integer(ops[0], t.a.op(f"trunc i64 {word} to i32"), 4)


@declare("PINSRD")
def _insert_half(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    to, x, y = three(t, ops[:-1])
    at = immediate(ops[-1]) & 3
    lanes = t.lanes(x, 2)
    old = t.a.op(f"and i64 {t.inactive(lanes[at // 2])}, {0xFFFFFFFF << (32 * (1 - at % 2)) & (1 << 64) - 1}")
    new = t.a.op(f"shl i64 {t.a.op(f'zext i32 {t.integer(y).text} to i64')}, {32 * (at % 2)}")
    lanes[at // 2] = Lane(t.a.op(f"or i64 {old}, {new}"))
    t.set_lanes(to, lanes)


@declare("PBROADCASTD")
def _broadcast_half_word(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    if isinstance(ops[1], Vector):
        x = t.a.op(f"and i64 {t.inactive(t.low(ops[1]))}, 4294967295")
    else:
        x = t.a.op(f"zext i32 {t.integer(ops[1]).text} to i64")
    both = t.a.op(f"or i64 {x}, {t.a.op(f'shl i64 {x}, 32')}")
    t.set_lanes(ops[0], [Lane(both)] * count(ops[0]))


@declare("PMOVMSKB")
def _byte_signs(t: Translator, name: str, ops: tuple[Operand, ...]) -> None:
    assert isinstance(ops[1], Vector)
    n = count(ops[1])
    v = joined(t, t.lanes(ops[1], n), _kind("B", n))
    c = t.a.op(f"icmp slt {_kind('B', n)} {v}, zeroinitializer")
    t.set_integer(ops[0], t.a.op(f"zext i{8 * n} {t.a.op(f'bitcast <{8 * n} x i1> {c} to i{8 * n}')} to i64"), 8)
