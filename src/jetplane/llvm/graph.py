"""Graphs of scalars: folded, hashed and shared while they grow, so that equal expressions are one node.

A node is an integer. Its row is ``(operator, arguments)``; arguments are nodes made before, so that the numbers of
nodes are a topological order. A graph says what happens to one lane (one collocation point, one call); back ends run it
over many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = tuple[str, tuple]

# What is computed where all arguments are constants. A comparison is 1.0 or 0.0.
EVALUATE: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "lt": lambda a, b: float(a < b),
    "le": lambda a, b: float(a <= b),
    "eq": lambda a, b: float(a == b),
    "select": lambda c, a, b: a if c else b,
    "abs": abs,
    "floor": lambda a: float(math.floor(a)),
    "pow": math.pow,
    "atan2": math.atan2,
    **{
        name: getattr(math, name)
        for name in "sqrt exp log sin cos tan asin acos atan sinh cosh tanh erf expm1 log1p".split()
    },
}
COMMUTATIVE = ("add", "mul", "eq")


@dataclass(frozen=True)
class External:
    """A function of lanes that is computed outside of the graph, a network for example.

    Attributes:
        function: the caller's own object; the graph does not look at it.
        arguments: nodes whose values it takes, k of them.
        values: input nodes that receive its m values.
        jacobian: input nodes that receive its derivatives, m tuples of k.
        hessian: input nodes that receive second derivatives of the sum of values times their adjoints: rows of the
            lower triangle, k tuples of 1, 2, ..., k.
    """

    function: object
    arguments: tuple[int, ...]
    values: tuple[int, ...]
    jacobian: tuple[tuple[int, ...], ...]
    hessian: tuple[tuple[int, ...], ...]


@dataclass
class Graph:
    """Nodes of scalars, and the externals among them.

    Example:
        >>> graph = Graph()
        >>> x, y = graph.input(), graph.input()
        >>> graph.apply("mul", x, y) == graph.apply("mul", y, x)  # equal expressions are one node
        True
        >>> graph.value(graph.apply("add", graph.constant(1.0), graph.constant(2.0)))
        3.0

    Attributes:
        rows: the operator and the arguments of each node.
        inputs: how many inputs there are; input i is row i of the matrix that a kernel takes.
        externals: in the order of their making.
        line: the line of code that nodes made from now on come from, and `lines` that of each node.
    """

    rows: list[Row] = field(default_factory=list)
    inputs: int = 0
    externals: list[External] = field(default_factory=list)
    line: str | None = None
    lines: list[str | None] = field(default_factory=list)
    _index: dict[Row, int] = field(default_factory=dict, repr=False)

    def input(self) -> int:
        """A new input."""
        self.inputs += 1
        return self._node(("input", (self.inputs - 1,)))

    def constant(self, value: float) -> int:
        """A constant."""
        value = float(value)
        # The sign tells 0.0 from -0.0, and the text NaN from NaN: both are equal or unequal where they must not be.
        return self._node(("constant", (value, repr(value))))

    def value(self, node: int) -> float | None:
        """The value of a constant, or None."""
        operator, arguments = self.rows[node]
        return arguments[0] if operator == "constant" else None

    def apply(self, operator: str, *arguments: int) -> int:
        """The node of an operator (a key of `EVALUATE`) applied to nodes."""
        folded = self._fold(operator, arguments)
        if folded is not None:
            return folded
        if operator in COMMUTATIVE and arguments[1] < arguments[0]:
            arguments = arguments[::-1]
        return self._node((operator, arguments))

    def external(
        self, function: object, arguments: Sequence[int], values: int, *, differentiable: bool = True
    ) -> External:
        """A function that is computed outside, of the values of some nodes.

        Where it is not differentiable (a look-up that is constant between its steps), derivatives are the constant
        zero.
        """
        k = len(arguments)

        def derivative() -> int:
            return self.input() if differentiable else self.constant(0.0)

        made = External(
            function,
            tuple(arguments),
            tuple(self.input() for _ in range(values)),
            tuple(tuple(derivative() for _ in range(k)) for _ in range(values)),
            tuple(tuple(derivative() for _ in range(row + 1)) for row in range(k)),
        )
        self.externals.append(made)
        return made

    def needed(self, outputs: Iterable[int], *, outside: bool = False) -> list[int]:
        """All nodes that outputs depend on, in order; with `outside`, through externals to their arguments too."""
        sources = {value: e.arguments for e in self.externals for value in e.values} if outside else {}
        seen: set[int] = set()
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(sources.get(node) or self.arguments(node))
        return sorted(seen)

    def arguments(self, node: int) -> tuple[int, ...]:
        """The nodes that a node is computed of."""
        operator, arguments = self.rows[node]
        return () if operator in ("input", "constant") else arguments

    def _node(self, row: Row) -> int:
        node = self._index.get(row)
        if node is None:
            node = self._index[row] = len(self.rows)
            self.rows.append(row)
            self.lines.append(self.line)
        return node

    def _fold(self, operator: str, arguments: tuple[int, ...]) -> int | None:
        """A simpler node that is equal, or None.

        Nothing is folded that would turn NaN or infinity into a number, except a product with a constant zero: a
        structural zero stays one.
        """
        values = [self.value(a) for a in arguments]
        if None not in values:
            try:
                return self.constant(EVALUATE[operator](*values))
            except (ValueError, ZeroDivisionError, OverflowError):
                return None  # the lanes compute the NaN or infinity
        rule = getattr(self, f"_fold_{operator}", None)
        return rule(arguments, values) if rule else None

    def _negated(self, node: int) -> int | None:
        operator, arguments = self.rows[node]
        return arguments[0] if operator == "neg" else None

    def _fold_add(self, arguments, values):
        a, b = arguments
        if values[0] == 0:
            return b
        if values[1] == 0:
            return a
        for x, y in ((a, b), (b, a)):
            negated = self._negated(y)
            if negated is not None:
                return self.apply("sub", x, negated)
            if self.rows[x] == ("sub", (self.rows[x][1][0], y)):  # (x - y) + y
                return self.rows[x][1][0]
        return None

    def _fold_sub(self, arguments, values):
        a, b = arguments
        if values[1] == 0:
            return a
        if values[0] == 0:
            return self.apply("neg", b)
        if a == b:
            return self.constant(0.0)
        negated = self._negated(b)
        if negated is not None:
            return self.apply("add", a, negated)
        if self.rows[a][0] == "add" and b in self.rows[a][1]:  # (x + y) - y
            x, y = self.rows[a][1]
            return x if y == b else y
        return None

    def _fold_mul(self, arguments, values):
        for factor, (a, b) in ((values[0], arguments), (values[1], arguments[::-1])):
            if factor == 0:
                return self.constant(0.0)
            if factor == 1:
                return b
            if factor == -1:
                return self.apply("neg", b)
            negated = self._negated(a)  # signs go outside, and constants together
            if negated is not None:
                return self.apply("neg", self.apply("mul", negated, b))
            if factor is not None and self.rows[b][0] == "mul":
                for x, y in (self.rows[b][1], self.rows[b][1][::-1]):
                    other = self.value(x)
                    if other is not None:
                        return self.apply("mul", self.constant(factor * other), y)
        return None

    def _fold_div(self, arguments, values):
        a, b = arguments
        if values[0] == 0:
            return self.constant(0.0)
        if values[1]:
            return self.apply("mul", a, self.constant(1.0 / values[1]))
        negated = self._negated(a)
        if negated is not None:
            return self.apply("neg", self.apply("div", negated, b))
        return None

    def _fold_neg(self, arguments, values):
        operator, inner = self.rows[arguments[0]]
        if operator == "neg":
            return inner[0]
        if operator == "sub":
            return self.apply("sub", inner[1], inner[0])
        return None

    def _fold_pow(self, arguments, values):
        """Whole and half exponents, which are exact and have derivatives at zero."""
        x, exponent = arguments[0], values[1]
        if exponent is None:  # x > 0, as for the function of two variables
            return self.apply("exp", self.apply("mul", arguments[1], self.apply("log", x)))
        if exponent < 0 and (2 * exponent).is_integer() and exponent >= -16:
            return self.apply("div", self.constant(1.0), self.apply("pow", x, self.constant(-exponent)))
        if exponent == 0:
            return self.constant(1.0)
        if exponent.is_integer() and exponent <= 16:
            half = self.apply("pow", x, self.constant(exponent // 2)) if exponent > 1 else self.constant(1.0)
            square = self.apply("mul", half, half)
            return self.apply("mul", square, x) if exponent % 2 else square
        if (2 * exponent).is_integer() and 0 < exponent <= 16:
            return self.apply("mul", self.apply("pow", x, self.constant(exponent - 0.5)), self.apply("sqrt", x))
        return None

    def _fold_select(self, arguments, values):
        condition, a, b = arguments
        if values[0] is not None:
            return a if values[0] else b
        return a if a == b else None
