"""Coefficients in LLVM: where those of a double lie, and their calculus as instructions.

First coefficients of K directions are one vector, padded to a power of two or a multiple of 8. Second ones are in
*groups*, each a vector whose place p belongs to a pair of directions (l_p, r_p), so that a product of first
coefficients is one multiplication of two permuted vectors. All pairs of K directions are grouped as cyclic diagonals,

    group d:  (i, i + d mod K),  i = 0 … K - 1,   d = 0 … K // 2,

of which the last one has K/2 places where K is even: K(K+1)/2 in all, none twice, and permutations are rotations.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .assembly import Assembly

Term = tuple[int, int, int, float]  # which second coefficient, two directions, a weight
Parts = tuple[str, ...]  # the names of the vectors that hold coefficients: first ones, then each group
Jet = Parts | None  # None: zero by structure

FLAGS = "nsz contract reassoc"


def padded(n: int) -> int:
    """The length of the vector that holds n numbers."""
    return 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8


def number(x: float) -> str:
    """A constant of type double."""
    return "0x" + struct.pack(">d", x).hex().upper()


@dataclass(frozen=True)
class Group:
    """Second coefficients that are computed together.

    Attributes:
        left, right: the directions of each place.
        weights: if given, the group is one number, the sum over places with these weights.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        """The length of its vector."""
        return 1 if self.weights is not None else len(self.left)


@dataclass(frozen=True)
class Layout:
    """Which coefficients a double carries, and in which order.

    Attributes:
        k: number of directions.
        groups: second coefficients; none at first order.
        places: for each second coefficient its group and its place in it.
    """

    k: int
    groups: tuple[Group, ...] = ()
    places: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(k: int, terms: Sequence[Term] = ()) -> Layout:
        """The layout for second coefficients that are sums of pairs of directions."""
        width = padded(k)
        count = max((t[0] for t in terms), default=-1) + 1
        if len(terms) == count and all(t[3] == 1.0 for t in terms):
            pairs = {(min(i, j), max(i, j)): n for n, i, j, _ in terms}
            groups = _grouped(k, width, set(pairs))
            places = [(-1, -1)] * count
            for g, group in enumerate(groups):
                for p, pair in enumerate(zip(group.left, group.right, strict=True)):
                    n = pairs.pop((min(pair), max(pair)), None)
                    if n is not None:
                        places[n] = g, p
            return Layout(k, tuple(groups), tuple(places))
        summed = []
        for n in range(count):
            own = [t for t in terms if t[0] == n]
            size = padded(len(own))
            fill = [(0, 0, 0, 0.0)] * (size - len(own))
            left, right, weights = zip(*((i, j, w) for _, i, j, w in [*own, *fill]), strict=True)
            summed.append(Group(left, right, weights))
        return Layout(k, tuple(summed), tuple((n, 0) for n in range(count)))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Lengths of all vectors."""
        return (padded(self.k), *(g.width for g in self.groups))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each vector begins, in doubles."""
        at, found = 0, []
        for w in self.widths:
            found.append(at)
            at += w
        return tuple(found)

    @cached_property
    def stride(self) -> int:
        """Doubles that the coefficients of one double take."""
        return sum(self.widths)

    @cached_property
    def slots(self) -> tuple[list[int], list[int]]:
        """Where the first and the second coefficients are, in doubles."""
        return list(range(self.k)), [self.offsets[1 + g] + p for g, p in self.places]

    @property
    def types(self) -> tuple[str, ...]:
        """LLVM types of the vectors."""
        return tuple(vector(w) for w in self.widths)


def _grouped(k: int, width: int, pairs: set[tuple[int, int]]) -> list[Group]:
    """Groups that hold all of these pairs."""
    every = {(i, j) for i in range(k) for j in range(i, k)}
    if pairs == every or pairs == {(i, i) for i in range(k)}:
        own = tuple(range(width))
        groups = [Group(own, own)]
        for d in range(1, k // 2 + 1 if pairs == every else 0):
            places = k // 2 if 2 * d == k else k
            left = tuple(range(padded(places)))
            groups.append(Group(left, tuple((i + d) % k if i < places else i for i in left)))
        return groups
    order, size, groups = sorted(pairs), min(8, padded(len(pairs))), []
    for at in range(0, len(order), size):
        some = order[at : at + size]
        some = [*some, *[some[-1]] * (padded(len(some)) - len(some))]
        groups.append(Group(tuple(i for i, _ in some), tuple(j for _, j in some)))
    return groups


def vector(width: int) -> str:
    """The LLVM type of a vector of doubles."""
    return "double" if width == 1 else f"<{width} x double>"


class Calculus:
    """Chain and product rule, written as instructions into a function."""

    def __init__(self, layout: Layout, into: Assembly) -> None:
        self.layout, self.a = layout, into
        self._zero: Parts = tuple("0.0" if w == 1 else "zeroinitializer" for w in layout.widths)

    @property
    def zero(self) -> Parts:
        """Coefficients of a constant."""
        return self._zero

    # --- linear ---------------------------------------------------------------------------------------

    def splat(self, x: str, width: int) -> str:
        """A vector of one number."""
        if width == 1:
            return x
        t = vector(width)
        if not x.startswith("%"):
            return "<" + ", ".join([f"double {x}"] * width) + ">"
        one = self.a.op(f"insertelement {t} poison, double {x}, i32 0")
        return self.a.op(f"shufflevector {t} {one}, {t} poison, <{width} x i32> zeroinitializer")

    def _each(self, op: str, x: Parts, y: Parts) -> Parts:
        return tuple(self.a.op(f"{op} {FLAGS} {t} {p}, {q}") for t, p, q in zip(self.layout.types, x, y, strict=True))

    def scale(self, f: str, s: Jet) -> Jet:
        """F times coefficients."""
        return None if s is None else self._each("fmul", s, tuple(self.splat(f, w) for w in self.layout.widths))

    def add(self, s: Jet, t: Jet) -> Jet:
        """The sum."""
        return t if s is None else s if t is None else self._each("fadd", s, t)

    def negate(self, s: Jet) -> Jet:
        """The negative."""
        if s is None:
            return None
        return tuple(self.a.op(f"fneg {t} {p}") for t, p in zip(self.layout.types, s, strict=True))

    def subtract(self, s: Jet, t: Jet) -> Jet:
        """The difference."""
        return s if t is None else self.negate(t) if s is None else self._each("fsub", s, t)

    def select(self, condition: str, s: Jet, t: Jet) -> Jet:
        """S where the condition holds, else t."""
        if s is None and t is None:
            return None
        pairs = zip(self.layout.types, s or self.zero, t or self.zero, strict=True)
        return tuple(self.a.op(f"select i1 {condition}, {k} {p}, {k} {q}") for k, p, q in pairs)

    def active(self, s: Parts) -> str:
        """Whether any coefficient is not zero (i1). What was overwritten in part is not active."""
        return self.a.op(f"call i1 @jp_active({self.arguments(s)})")

    def arguments(self, s: Jet) -> str:
        """Coefficients as arguments of a function."""
        return ", ".join(f"{t} {p}" for t, p in zip(self.layout.types, s or self.zero, strict=True))

    # --- products of first coefficients -----------------------------------------------------------------

    def _permuted(self, x: str, places: tuple[int, ...]) -> str:
        width = self.layout.widths[0]
        if width == 1 or places == tuple(range(width)):
            return x
        t = vector(width)
        if len(places) == 1:
            return self.a.op(f"extractelement {t} {x}, i32 {places[0]}")
        mask = ", ".join(f"i32 {p}" for p in places)
        return self.a.op(f"shufflevector {t} {x}, {t} poison, <{len(places)} x i32> <{mask}>")

    def _outer(self, g: Group, x: str, y: str, both: bool) -> str:
        """``x_l y_r``, and with ``both`` ``+ x_r y_l``, for the places of a group."""
        t = vector(len(g.left))
        p = self.a.op(f"fmul {FLAGS} {t} {self._permuted(x, g.left)}, {self._permuted(y, g.right)}")
        if both:
            if x == y or g.left == g.right:
                p = self.a.op(f"fadd {FLAGS} {t} {p}, {p}")
            else:
                q = self.a.op(f"fmul {FLAGS} {t} {self._permuted(y, g.left)}, {self._permuted(x, g.right)}")
                p = self.a.op(f"fadd {FLAGS} {t} {p}, {q}")
        if g.weights is None:
            return p
        n = len(g.left)
        if n == 1:
            return self.a.op(f"fmul {FLAGS} double {p}, {number(g.weights[0])}")
        weights = ", ".join(f"double {number(w)}" for w in g.weights)
        p = self.a.op(f"fmul {FLAGS} {t} {p}, <{weights}>")
        return self.a.op(f"call {FLAGS} double @llvm.vector.reduce.fadd.v{n}f64(double -0.0, {t} {p})")

    def _plus(self, s: Parts, x: str, y: str, both: bool, factor: str | None = None) -> Parts:
        """S with ``factor * outer`` added to its second coefficients."""
        out = [s[0]]
        for g, w, own in zip(self.layout.groups, self.layout.widths[1:], s[1:], strict=True):
            t, p = vector(w), self._outer(g, x, y, both)
            if factor is not None:
                p = self.a.op(f"fmul {FLAGS} {t} {p}, {self.splat(factor, w)}")
            out.append(self.a.op(f"fadd {FLAGS} {t} {own}, {p}"))
        return tuple(out)

    # --- rules ------------------------------------------------------------------------------------------

    def chain(self, s: Jet, d1: str, d2: str | None) -> Jet:
        """Of f(x), ``f' x_i`` and ``f' x_ij + f'' x_i x_j``; d2 None where f'' is zero."""
        out = self.scale(d1, s)
        if out is None or d2 is None or not self.layout.groups:
            return out
        assert s is not None
        return self._plus(out, s[0], s[0], False, d2)

    def chain2(self, s: Jet, t: Jet, g: tuple[str, str], h: tuple[str, str, str]) -> Jet:
        """Of f(x, y) with gradient g and second derivatives h: xx, xy, yy."""
        out = self.add(self.chain(s, g[0], h[0]), self.chain(t, g[1], h[2]))
        if out is None or s is None or t is None or not self.layout.groups:
            return out
        return self._plus(out, s[0], t[0], True, h[1])

    def multiply(self, x: str, s: Jet, y: str, t: Jet) -> Jet:
        """``x y``."""
        out = self.add(self.scale(y, s), self.scale(x, t))
        if out is None or s is None or t is None or not self.layout.groups:
            return out
        return self._plus(out, s[0], t[0], True)

    def divide(self, z: str, y: str, s: Jet, t: Jet) -> Jet:
        """``z = x / y``: ``z_i = (x_i - z y_i) / y``, ``z_ij = (x_ij - z y_ij - z_i y_j - z_j y_i) / y``."""
        if s is None and t is None:
            return None
        r = self.a.op(f"fdiv double 1.0, {y}")
        if t is None:
            return self.scale(r, s)
        out = self.subtract(s, self.scale(z, t))
        assert out is not None
        first = self.a.op(f"fmul {FLAGS} {self.layout.types[0]} {out[0]}, {self.splat(r, self.layout.widths[0])}")
        if not self.layout.groups:
            return (first,)
        minus = self.a.op(f"fneg {self.layout.types[0]} {t[0]}")
        out = self._plus(out, first, minus, True)
        scaled = self.scale(r, out)
        assert scaled is not None
        return (first, *scaled[1:])

    def sqrt(self, z: str, s: Jet) -> Jet:
        """Of a square root z, ``z_i = x_i / 2z`` and ``z_ij = (x_ij / 2 - z_i z_j) / z``; zero where x is still."""
        if s is None:
            return None
        r = self.a.op(f"fdiv double 1.0, {z}")
        zero = self.a.op(f"fcmp oeq double {z}, 0.0")
        moves = self.active(s)
        still = self.a.op(f"xor i1 {moves}, true")
        off = self.a.op(f"and i1 {zero}, {still}")
        r = self.a.op(f"select i1 {off}, double 0.0, double {r}")
        half = self.a.op(f"fmul double {r}, 0.5")
        out = self.scale(half, s)
        assert out is not None
        if not self.layout.groups:
            return out
        minus = self.a.op(f"fneg double {r}")
        return self._plus(out, out[0], out[0], False, minus)
