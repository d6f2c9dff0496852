"""Mathematical functions of the system, never lifted: their values are their own, their derivatives are formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

from .coefficients import number
from .translator import FILLS, Lane, Translator
from .vectors import arithmetic, fused, root

Derivatives = tuple[str, str | None]
Unary = Callable[["Writer", str, str], Derivatives]  # of x and f(x): f' and f''


class Writer:
    """Arithmetic on doubles for formulas."""

    def __init__(self, t: Translator) -> None:
        self.t = t

    def __call__(self, op: str, *args: str) -> str:
        """One operation: ``w("mul", x, y)``."""
        if op == "neg":
            return self.t.a.op(f"fneg double {args[0]}")
        if op in ("sqrt", "fabs"):
            return self.t.a.op(f"call double @llvm.{op}.f64(double {args[0]})")
        return self.t.a.op(f"f{op} double {args[0]}, {args[1]}")

    def of(self, name: str, *args: str) -> str:
        """A function of the system, by its name."""
        return called(self.t, name, *args)

    def polynomial(self, x: str, *c: float) -> str:
        """``c0 + c1 x + c2 x² + …``."""
        total = number(c[-1])
        for k in reversed(c[:-1]):
            total = self("add", self("mul", total, x), number(k))
        return total


def called(t: Translator, name: str, *args: str) -> str:
    """Call a function on doubles as it is."""
    f = t.module.external(name, len(args))
    return t.a.op(f"call double {f}({', '.join(f'double {x}' for x in args)})")


ONE, TWO, HALF = "1.0", "2.0", "0.5"


def _inverse(w: Writer, x: str) -> str:
    return w("div", ONE, x)


def _logarithm(base: float) -> Unary:
    scale = number(1 / math.log(base))

    def rule(w: Writer, x: str, y: str) -> Derivatives:
        r = _inverse(w, x)
        d = w("mul", scale, r)
        return d, w("neg", w("mul", d, r))

    return rule


def _power_of(base: float) -> Unary:
    scale = number(math.log(base))
    return lambda w, x, y: (d := w("mul", scale, y), w("mul", scale, d))


def _asin(w: Writer, x: str, y: str) -> Derivatives:
    # (1 - x)(1 + x) keeps its digits near the ends.
    r = _inverse(w, w("mul", w("sub", ONE, x), w("add", ONE, x)))
    d = w("sqrt", r)
    return d, w("mul", w("mul", x, d), r)


def _acos(w: Writer, x: str, y: str) -> Derivatives:
    d, e = _asin(w, x, y)
    assert e is not None
    return w("neg", d), w("neg", e)


def _square_plus(w: Writer, x: str, sign: str) -> str:
    return w(sign, w("mul", x, x), ONE)


def _asinh(w: Writer, x: str, y: str) -> Derivatives:
    r = _inverse(w, _square_plus(w, x, "add"))
    d = w("sqrt", r)
    return d, w("neg", w("mul", w("mul", x, d), r))


def _acosh(w: Writer, x: str, y: str) -> Derivatives:
    r = _inverse(w, w("mul", w("sub", x, ONE), w("add", x, ONE)))
    d = w("sqrt", r)
    return d, w("neg", w("mul", w("mul", x, d), r))


def _atanh(w: Writer, x: str, y: str) -> Derivatives:
    d = _inverse(w, w("mul", w("sub", ONE, x), w("add", ONE, x)))
    return d, w("mul", w("mul", TWO, x), w("mul", d, d))


def _atan(w: Writer, x: str, y: str) -> Derivatives:
    d = _inverse(w, _square_plus(w, x, "add"))
    return d, w("mul", w("mul", "-2.0", x), w("mul", d, d))


def _tan(w: Writer, x: str, y: str) -> Derivatives:
    d = _square_plus(w, y, "add")
    return d, w("mul", w("mul", TWO, y), d)


def _tanh(w: Writer, x: str, y: str) -> Derivatives:
    c = _inverse(w, w.of("cosh", x))
    d = w("mul", c, c)  # 1 - y² has no digits left where x is large
    return d, w("mul", w("mul", "-2.0", y), d)


def _erf(sign: float) -> Unary:
    def rule(w: Writer, x: str, y: str) -> Derivatives:
        d = w("mul", number(sign * 2 / math.sqrt(math.pi)), w.of("exp", w("neg", w("mul", x, x))))
        return d, w("mul", w("mul", "-2.0", x), d)

    return rule


def _cbrt(w: Writer, x: str, y: str) -> Derivatives:
    d = _inverse(w, w("mul", "3.0", w("mul", y, y)))
    return d, w("neg", w("mul", w("div", d, x), number(2 / 3)))


def _log1p(w: Writer, x: str, y: str) -> Derivatives:
    d = _inverse(w, w("add", ONE, x))
    return d, w("neg", w("mul", d, d))


def _expm1(w: Writer, x: str, y: str) -> Derivatives:
    d = w.of("exp", x)
    return d, d


def _bessel(second: str) -> Unary:
    """Of order zero: ``f' = -f1``, ``f'' = f1 / x - f``."""

    def rule(w: Writer, x: str, y: str) -> Derivatives:
        other = w.of(second, x)
        return w("neg", other), w("sub", w("div", other, x), y)

    return rule


def _bessel_one(second: str) -> Unary:
    """Of order one: ``f' = f0 - f / x``, and f'' by Bessel's equation."""

    def rule(w: Writer, x: str, y: str) -> Derivatives:
        d = w("sub", w.of(second, x), w("div", y, x))
        e = w("sub", w("div", w("sub", w("div", y, x), d), x), y)
        return d, e

    return rule


def _gamma(w: Writer, x: str, y: str) -> Derivatives:
    p, q = _lgamma(w, x, y)
    assert q is not None
    d = w("mul", y, p)
    return d, w("mul", y, w("add", w("mul", p, p), q))


def _lgamma(w: Writer, x: str, y: str) -> Derivatives:
    w.t.module.polygamma()
    return w.t.a.op(f"call double @jp_digamma(double {x})"), w.t.a.op(f"call double @jp_trigamma(double {x})")


UNARY: dict[str, Unary] = {
    "exp": lambda w, x, y: (y, y),
    "exp2": _power_of(2.0),
    "exp10": _power_of(10.0),
    "expm1": _expm1,
    "log": _logarithm(math.e),
    "log2": _logarithm(2.0),
    "log10": _logarithm(10.0),
    "log1p": _log1p,
    "sin": lambda w, x, y: (w.of("cos", x), w("neg", y)),
    "cos": lambda w, x, y: (w("neg", w.of("sin", x)), w("neg", y)),
    "tan": _tan,
    "asin": _asin,
    "acos": _acos,
    "atan": _atan,
    "sinh": lambda w, x, y: (w.of("cosh", x), y),
    "cosh": lambda w, x, y: (w.of("sinh", x), y),
    "tanh": _tanh,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "cbrt": _cbrt,
    "erf": _erf(1.0),
    "erfc": _erf(-1.0),
    "j0": _bessel("j1"),
    "y0": _bessel("y1"),
    "j1": _bessel_one("j0"),
    "y1": _bessel_one("y0"),
    "tgamma": _gamma,
    "lgamma": _lgamma,
}
STEPS = "floor ceil trunc round rint nearbyint roundeven logb".split()  # constant by pieces
TO_INTEGER = {"lround": 8, "lrint": 8, "llround": 8, "llrint": 8, "ilogb": 4, "__isnan": 4, "isnan": 4, "__isinf": 4,
              "isinf": 4, "__finite": 4, "finite": 4, "__signbit": 4, "__fpclassify": 4}  # fmt: skip


def _moving(t: Translator, x: Lane, d: Derivatives) -> Derivatives:
    """Derivatives where x moves; zero where it does not, so that an infinite one spoils nothing."""
    assert x.jet is not None
    moves = t.c.active(x.jet)
    return (
        t.a.op(f"select i1 {moves}, double {d[0]}, double 0.0"),
        None if d[1] is None else t.a.op(f"select i1 {moves}, double {d[1]}, double 0.0"),
    )


def _of_two(t: Translator, value: str, x: Lane, y: Lane, g: tuple[str, str], h: tuple[str, str, str]) -> None:
    """f(x, y) with gradient g and second derivatives h, which count where x or y moves."""
    moves = "false"
    for lane in (x, y):
        if lane.jet is not None:
            moves = t.a.op(f"or i1 {moves}, {t.c.active(lane.jet)}")
    kept = [t.a.op(f"select i1 {moves}, double {d}, double 0.0") for d in (*g, *h)]
    _give(t, value, t.c.chain2(x.jet, y.jet, (kept[0], kept[1]), (kept[2], kept[3], kept[4])))


def _argument(t: Translator, n: int) -> Lane:
    return t.lane(f"x{n}.0")


def _give(t: Translator, value: str, jet: object = None) -> None:
    t.put("x0.0", Lane(None, jet, value))  # type: ignore[arg-type]


def unary(name: str, rule: Unary, at: int | None = None) -> Callable[[Translator], None]:
    """A function of one double, by its name or address."""

    def emit(t: Translator) -> None:
        x = _argument(t, 0)
        u = t.double(x)
        y = t.a.op(f"call double {t.module.external(name, 1, at)}(double {u})")
        _give(t, y, None if x.jet is None else t.c.chain(x.jet, *_moving(t, x, rule(Writer(t), u, y))))

    return emit


def step(name: str) -> Callable[[Translator], None]:
    """A function of one double that is constant by pieces."""
    return lambda t: _give(t, called(t, name, t.double(_argument(t, 0))))


def whole(name: str, size: int) -> Callable[[Translator], None]:
    """A function of one double whose result is an integer of so many bytes."""

    def emit(t: Translator) -> None:
        kind = f"i{8 * size}"
        r = t.a.op(f"call {kind} {t.module.external(name)}(double {t.double(_argument(t, 0))})")
        t.put("rax", Lane(r if size == 8 else t.a.op(f"sext {kind} {r} to i64")))

    return emit


def _sqrt(t: Translator) -> None:
    t.put("x0.0", root(t, _argument(t, 0)))


def _fabs(t: Translator) -> None:
    x = _argument(t, 0)
    u = t.double(x)
    negative = t.a.op(f"icmp slt i64 {t.bits(x)}, 0")
    _give(t, t.a.op(f"call double @llvm.fabs.f64(double {u})"), t.c.select(negative, t.c.negate(x.jet), x.jet))


def _pow(t: Translator) -> None:
    w, x, y = Writer(t), _argument(t, 0), _argument(t, 1)
    u, v = t.double(x), t.double(y)
    z = called(t, "pow", u, v)
    if x.jet is None and y.jet is None:
        return _give(t, z)
    p1, p2 = called(t, "pow", u, w("sub", v, ONE)), called(t, "pow", u, w("sub", v, TWO))
    k = w("mul", v, w("sub", v, ONE))

    def times(a: str, b: str) -> str:  # zero times infinity is zero: x² at 0 has the second derivative 2
        none = t.a.op(f"fcmp oeq double {a}, 0.0")
        return t.a.op(f"select i1 {none}, double 0.0, double {w('mul', a, b)}")

    gx, hxx = times(v, p1), times(k, p2)
    moves = t.c.active(y.jet) if y.jet is not None else "false"
    safe = t.a.op(f"select i1 {moves}, double {u}, double 1.0")
    positive = t.a.op(f"fcmp ogt double {safe}, 0.0")
    l = called(t, "log", t.a.op(f"select i1 {positive}, double {safe}, double 1.0"))  # noqa: E741
    # Of a negative number a power is defined at integers alone, and moves along no exponent: NaN there.
    zero = t.a.op(f"fcmp oeq double {safe}, 0.0")
    off = t.a.op(f"select i1 {zero}, double 0.0, double {number(math.nan)}")
    l = t.a.op(f"select i1 {positive}, double {l}, double {off}")  # noqa: E741
    gy = w("mul", z, l)
    hxy = w("add", p1, w("mul", gx, l))
    return _of_two(t, z, x, y, (gx, gy), (hxx, hxy, w("mul", gy, l)))


def _atan2(t: Translator) -> None:
    w, y, x = Writer(t), _argument(t, 0), _argument(t, 1)
    v, u = t.double(y), t.double(x)
    z = called(t, "atan2", v, u)
    r = _inverse(w, w("add", w("mul", u, u), w("mul", v, v)))
    gy, gx = w("mul", u, r), w("neg", w("mul", v, r))
    hyy = w("mul", w("mul", TWO, gx), gy)
    hxy = w("sub", w("mul", gx, gx), w("mul", gy, gy))
    _of_two(t, z, y, x, (gy, gx), (hyy, hxy, w("neg", hyy)))


def _hypot(t: Translator) -> None:
    w, x, y = Writer(t), _argument(t, 0), _argument(t, 1)
    u, v = t.double(x), t.double(y)
    z = called(t, "hypot", u, v)
    r = _inverse(w, z)
    gx, gy = w("mul", u, r), w("mul", v, r)
    hxx, hyy = w("mul", w("mul", gy, gy), r), w("mul", w("mul", gx, gx), r)
    _of_two(t, z, x, y, (gx, gy), (hxx, w("neg", w("mul", w("mul", gx, gy), r)), hyy))


def _extreme(name: str) -> Callable[[Translator], None]:
    def emit(t: Translator) -> None:
        x, y = _argument(t, 0), _argument(t, 1)
        u, v = t.double(x), t.double(y)
        z = called(t, name, u, v)
        if name == "fdim":
            above = t.a.op(f"fcmp ogt double {u}, {v}")
            return _give(t, z, t.c.select(above, t.c.subtract(x.jet, y.jet), None))
        first = t.a.op(f"fcmp {'oge' if name == 'fmax' else 'ole'} double {u}, {v}")
        first = t.a.op(f"or i1 {first}, {t.a.op(f'fcmp uno double {v}, {v}')}")
        return _give(t, z, t.c.select(first, x.jet, y.jet))

    return emit


def _remainder(name: str) -> Callable[[Translator], None]:
    def emit(t: Translator) -> None:
        w, x, y = Writer(t), _argument(t, 0), _argument(t, 1)
        u, v = t.double(x), t.double(y)
        z = called(t, name, u, v)
        n = t.a.op(f"call double @llvm.rint.f64(double {w('div', w('sub', u, z), v)})")  # z = x - n y, n constant
        _give(t, z, t.c.subtract(x.jet, t.c.scale(n, y.jet)))

    return emit


def _copysign(t: Translator) -> None:
    x, y = _argument(t, 0), _argument(t, 1)
    z = t.a.op(f"call double @llvm.copysign.f64(double {t.double(x)}, double {t.double(y)})")
    differ = t.a.op(f"icmp slt i64 {t.a.op(f'xor i64 {t.bits(x)}, {t.bits(y)}')}, 0")
    _give(t, z, t.c.select(differ, t.c.negate(x.jet), x.jet))


def _fma(t: Translator) -> None:
    t.put("x0.0", fused(t, _argument(t, 0), _argument(t, 1), _argument(t, 2), False, False))


def _scaled(name: str) -> Callable[[Translator], None]:
    def emit(t: Translator) -> None:
        kind = "i64" if name == "scalbln" else "i32"
        n = t.inactive(t.lane("rdi"))
        n = n if kind == "i64" else t.a.op(f"trunc i64 {n} to i32")
        x, f = _argument(t, 0), t.module.external(name)
        z = t.a.op(f"call double {f}(double {t.double(x)}, {kind} {n})")
        _give(t, z, t.c.scale(t.a.op(f"call double {f}(double 1.0, {kind} {n})"), x.jet))

    return emit


def _frexp(t: Translator) -> None:
    x, to = _argument(t, 0), t.bits(t.lane("rdi"))
    p = t.a.op(f"inttoptr i64 {to} to ptr")
    z = t.a.op(f"call double {t.module.external('frexp')}(double {t.double(x)}, ptr {p})")
    t.a.do(f"call void @jp_mark(i64 {to}, i64 4)")
    n = t.a.op(f"sub i32 0, {t.a.op(f'load i32, ptr {p}')}")
    f = t.a.op(f"call double {t.module.external('ldexp')}(double 1.0, i32 {n})")
    _give(t, z, t.c.scale(f, x.jet))


def _modf(t: Translator) -> None:
    x, to = _argument(t, 0), t.bits(t.lane("rdi"))
    p = t.a.op(f"inttoptr i64 {to} to ptr")
    z = t.a.op(f"call double {t.module.external('modf')}(double {t.double(x)}, ptr {p})")
    t.a.do(f"call void @jp_clear(i64 {to}, i64 8, i64 {t.site(FILLS)})")
    _give(t, z, x.jet)


def _remquo(t: Translator) -> None:
    to = t.bits(t.lane("rdi"))
    u, v = t.double(_argument(t, 0)), t.double(_argument(t, 1))
    p = t.a.op(f"inttoptr i64 {to} to ptr")
    _remainder("remainder")(t)
    t.a.op(f"call double {t.module.external('remquo')}(double {u}, double {v}, ptr {p})")
    t.a.do(f"call void @jp_mark(i64 {to}, i64 4)")


def _lgamma_r(t: Translator) -> None:
    to = t.bits(t.lane("rdi"))
    u, p = t.double(_argument(t, 0)), t.a.op(f"inttoptr i64 {to} to ptr")
    t.a.op(f"call double {t.module.external('lgamma_r')}(double {u}, ptr {p})")
    t.a.do(f"call void @jp_mark(i64 {to}, i64 4)")
    unary("lgamma", UNARY["lgamma"])(t)


def _nextafter(t: Translator) -> None:
    x = _argument(t, 0)
    _give(t, called(t, "nextafter", t.double(x), t.double(_argument(t, 1))), x.jet)


def _bessel_of(name: str) -> Callable[[Translator], None]:
    """Of order n: ``f' = (f_{n-1} - f_{n+1}) / 2``, and the same again."""

    def emit(t: Translator) -> None:
        x, w = _argument(t, 0), Writer(t)
        n, u = t.a.op(f"trunc i64 {t.inactive(t.lane('rdi'))} to i32"), t.double(x)

        def order(k: int) -> str:
            m = t.a.op(f"add i32 {n}, {k}")
            return t.a.op(f"call double {t.module.external(name)}(i32 {m}, double {u})")

        y, far = order(0), w("add", order(-2), order(2))
        d = w("mul", HALF, w("sub", order(-1), order(1)))
        e = w("mul", "0.25", w("sub", far, w("mul", TWO, y)))
        _give(t, y, None if x.jet is None else t.c.chain(x.jet, *_moving(t, x, (d, e))))

    return emit


def _sincos(t: Translator) -> None:
    x, w = _argument(t, 0), Writer(t)
    u = t.double(x)
    s, c = called(t, "sin", u), called(t, "cos", u)
    first, second = t.bits(t.lane("rdi")), t.bits(t.lane("rsi"))
    t.store(first, Lane(None, t.c.chain(x.jet, c, w("neg", s)), s))
    t.store(second, Lane(None, t.c.chain(x.jet, w("neg", s), w("neg", c)), c))


def vector(name: str, scalar: str, n: int, arguments: int) -> Callable[[Translator], None]:
    """A function of libmvec: values are its own, derivatives those of each lane."""

    def emit(t: Translator) -> None:
        kind = f"<{n} x double>"
        given = []
        for k in range(arguments):
            v = "poison"
            for i in range(n):
                v = t.a.op(f"insertelement {kind} {v}, double {t.double(t.lane(f'x{k}.{i}'))}, i32 {i}")
            given.append(v)
        y = t.a.op(f"call {kind} {t.module.external(name)}({', '.join(f'{kind} {v}' for v in given)})")
        lanes = []
        for i in range(n):
            z = t.a.op(f"extractelement {kind} {y}, i32 {i}")
            args = [t.lane(f"x{k}.{i}") for k in range(arguments)]
            if arguments == 1:
                x = args[0]
                d = None if x.jet is None else _moving(t, x, UNARY[scalar](Writer(t), t.double(x), z))
                lanes.append(Lane(None, None if d is None else t.c.chain(x.jet, *d), z))
            else:
                kept = [t.lane(f"x{k}.0") for k in range(2)]
                for k in range(2):
                    t.put(f"x{k}.0", args[k])
                BINARY[scalar](t)
                lanes.append(Lane(None, t.lane("x0.0").jet, z))
                for k in range(2):
                    t.put(f"x{k}.0", kept[k])
        for i, lane in enumerate(lanes):
            t.put(f"x0.{i}", lane)

    return emit


# --- complex functions: a number's parts are in two registers, and so are those of the result --------------------

Complex = tuple[str, str]


def _times(w: Writer, x: Complex, y: Complex) -> Complex:
    real = w("sub", w("mul", x[0], y[0]), w("mul", x[1], y[1]))
    return real, w("add", w("mul", x[0], y[1]), w("mul", x[1], y[0]))


def _scaled_by(w: Writer, f: str, x: Complex) -> Complex:
    return w("mul", f, x[0]), w("mul", f, x[1])


def _reciprocal(w: Writer, x: Complex) -> Complex:
    r = _inverse(w, w("add", w("mul", x[0], x[0]), w("mul", x[1], x[1])))
    return w("mul", x[0], r), w("neg", w("mul", x[1], r))


def _of_complex(t: Translator, name: str, *args: str) -> Complex:
    given = ", ".join(f"double {x}" for x in args)
    r = t.a.op(f"call {{ double, double }} {t.module.external(name)}({given})")
    return t.a.op(f"extractvalue {{ double, double }} {r}, 0"), t.a.op(f"extractvalue {{ double, double }} {r}, 1")


def _holomorphic(t: Translator, z: tuple[Lane, Lane], y: Complex, d: Complex, e: Complex) -> tuple[Lane, Lane]:
    """The two parts of f(z) = y with f' = d and f'' = e, by the equations of Cauchy and Riemann."""
    minus = [t.a.op(f"fneg double {x}") for x in (d[1], e[0], e[1])]
    real = t.c.chain2(z[0].jet, z[1].jet, (d[0], minus[0]), (e[0], minus[2], minus[1]))
    imaginary = t.c.chain2(z[0].jet, z[1].jet, (d[1], d[0]), (e[1], e[0], minus[2]))
    return Lane(None, real, y[0]), Lane(None, imaginary, y[1])


def _complex_derivatives(t: Translator, name: str, z: Complex, y: Complex) -> tuple[Complex, Complex]:
    w, minus = Writer(t), "-1.0"
    if name == "exp":
        return y, y
    if name == "log":
        r = _reciprocal(w, z)
        return r, _scaled_by(w, minus, _times(w, r, r))
    if name == "sqrt":
        d = _scaled_by(w, HALF, _reciprocal(w, y))
        return d, _scaled_by(w, "-0.5", _times(w, d, _reciprocal(w, z)))
    if name in ("tan", "tanh"):
        sign = "1.0" if name == "tan" else minus
        square = _scaled_by(w, sign, _times(w, y, y))
        d = w("add", ONE, square[0]), square[1]
        return d, _scaled_by(w, "2.0" if name == "tan" else "-2.0", _times(w, y, d))
    other = {"sin": "ccos", "cos": "csin", "sinh": "ccosh", "cosh": "csinh"}[name]
    d = _of_complex(t, other, *z)
    return (_scaled_by(w, minus, d) if name == "cos" else d), (y if "h" in name else _scaled_by(w, minus, y))


def _complex_lanes(t: Translator, name: str, z: tuple[Lane, Lane]) -> tuple[Lane, Lane]:
    parts = t.double(z[0]), t.double(z[1])
    y = _of_complex(t, f"c{name}", *parts)
    return _holomorphic(t, z, y, *_complex_derivatives(t, name, parts, y))


def _complex(name: str) -> Callable[[Translator], None]:
    def emit(t: Translator) -> None:
        for n, lane in enumerate(_complex_lanes(t, name, (_argument(t, 0), _argument(t, 1)))):
            t.put(f"x{n}.0", lane)

    return emit


def _complex_power(t: Translator) -> None:
    """``z^w = exp(w log z)``."""
    z, w = (_argument(t, 0), _argument(t, 1)), (_argument(t, 2), _argument(t, 3))
    y = _of_complex(t, "cpow", *(t.double(x) for x in (*z, *w)))
    a, b = _complex_lanes(t, "log", z)
    c, d = w
    real = arithmetic(t, "SUB", arithmetic(t, "MUL", a, c), arithmetic(t, "MUL", b, d))
    imaginary = arithmetic(t, "ADD", arithmetic(t, "MUL", a, d), arithmetic(t, "MUL", b, c))
    for n, lane in enumerate(_holomorphic(t, (real, imaginary), y, y, y)):
        t.put(f"x{n}.0", lane)


def _argument_of(t: Translator) -> None:
    x, y = _argument(t, 0), _argument(t, 1)
    t.put("x0.0", y)
    t.put("x1.0", x)
    _atan2(t)


BINARY: dict[str, Callable[[Translator], None]] = {
    "pow": _pow, "atan2": _atan2, "hypot": _hypot, "cabs": _hypot, "carg": _argument_of, "cpow": _complex_power,
    **{f"c{n}": _complex(n) for n in "exp log sqrt sin cos sinh cosh tan tanh".split()},
    "remquo": _remquo, "lgamma_r": _lgamma_r, "nextafter": _nextafter, "jn": _bessel_of("jn"), "yn": _bessel_of("yn"),
    "copysign": _copysign, "fma": _fma, "frexp": _frexp, "modf": _modf,
    "sincos": _sincos, "sqrt": _sqrt, "fabs": _fabs,
    **{n: _extreme(n) for n in ("fmax", "fmin", "fdim")},
    **{n: _remainder(n) for n in ("fmod", "remainder")},
    **{n: _scaled(n) for n in ("ldexp", "scalbn", "scalbln")},
}  # fmt: skip


def users(name: str, at: int, first: int, second: int) -> Callable[[Translator], None]:
    """A function of one double with the user's derivatives, all by address."""

    def rule(w: Writer, x: str, y: str) -> Derivatives:
        t = w.t
        d, e = (t.module.external(f"{name}.{n}", 1, a) for n, a in (("first", first), ("second", second)))
        return t.a.op(f"call double {d}(double {x})"), t.a.op(f"call double {e}(double {x})")

    return unary(name, rule, at)


# Digamma and trigamma: upward recurrence to x >= 12, then the asymptotic series; reflection where x is negative.
_BERNOULLI = [1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510]


def polygamma() -> str:
    """The two functions as LLVM assembly."""
    out = []
    for name, second in (("jp_digamma", False), ("jp_trigamma", True)):
        lines = [f"define internal double @{name}(double %x0) noinline nounwind {{", "entry:"]
        lines += [
            "  %neg = fcmp ole double %x0, 0.0",
            "  %mirrored = fsub double 1.0, %x0",
            "  %x = select i1 %neg, double %mirrored, double %x0",
            "  br label %loop",
            "loop:",
            "  %y = phi double [%x, %entry], [%y1, %up]",
            "  %s = phi double [0.0, %entry], [%s1, %up]",
            "  %small = fcmp olt double %y, 12.0",
            "  br i1 %small, label %up, label %series",
            "up:",
            "  %r = fdiv double 1.0, %y",
            "  %r2 = fmul double %r, %r",
            f"  %s1 = {'fadd double %s, %r2' if second else 'fsub double %s, %r'}",
            "  %y1 = fadd double %y, 1.0",
            "  br label %loop",
            "series:",
            "  %i = fdiv double 1.0, %y",
            "  %i2 = fmul double %i, %i",
        ]
        # digamma: log y - 1/2y - sum B2k / (2k y^2k); trigamma: 1/y + 1/2y² + sum B2k / y^(2k+1)
        terms = [b if second else -b / (2 * k) for k, b in enumerate(_BERNOULLI, 1)]
        last = number(terms[-1])
        for n, term in enumerate(reversed(terms[:-1])):
            lines += [f"  %m{n} = fmul double {last}, %i2", f"  %a{n} = fadd double %m{n}, {number(term)}"]
            last = f"%a{n}"
        lines += [f"  %tail0 = fmul double {last}, %i2"]
        if second:
            lines += [
                "  %tail = fmul double %tail0, %i",
                "  %h = fmul double 0.5, %i2",
                "  %b = fadd double %i, %h",
                "  %c = fadd double %b, %tail",
            ]
        else:
            lines += [
                "  %l = call double @jp.log(double %y)",
                "  %h = fmul double 0.5, %i",
                "  %b = fsub double %l, %h",
                "  %c = fadd double %b, %tail0",
            ]
        lines += ["  %d = fadd double %c, %s", "  br i1 %neg, label %mirror, label %done", "done:", "  ret double %d"]
        pi = number(math.pi)
        lines += ["mirror:", f"  %px = fmul double {pi}, %x0", "  %sin = call double @jp.sin(double %px)"]
        if second:  # pi² / sin² - trigamma(1 - x)
            lines += [f"  %q = fdiv double {pi}, %sin", "  %q2 = fmul double %q, %q", "  %e = fsub double %q2, %d"]
        else:  # digamma(1 - x) - pi / tan(pi x)
            lines += [
                "  %cos = call double @jp.cos(double %px)",
                "  %cot = fdiv double %cos, %sin",
                f"  %q = fmul double {pi}, %cot",
                "  %e = fsub double %d, %q",
            ]
        lines += ["  ret double %e", "}"]
        out.append("\n".join(lines))
    return "\n".join(out)
