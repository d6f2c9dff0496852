"""Exact sparse first and second derivatives of a graph, as nodes of the same graph.

First derivatives are forward jets with as many coefficients as variables a node depends on. The Hessian of a weighted
sum of outputs takes one sweep of adjoints back and

    H = sum over nodes v of  adjoint(v) * sum over pairs of arguments (a, b) of  (d²v / da db) * J_a J_bᵀ,

so that second derivatives exist at nonlinear operators alone and none is carried through the rest. Structural zeros are
absent, and what folds to a constant zero is taken away: the structure is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .graph import Graph

Sparse = dict[int, int]  # variable -> node


def partials(graph: Graph, node: int) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """First derivatives ``(argument, node)`` and second ``(argument, argument, node)`` of one node.

    A pair of different arguments stands once for both mixed derivatives.
    """
    operator, arguments = graph.rows[node]
    apply, constant = graph.apply, graph.constant

    def mul(*factors: int) -> int:
        product = factors[0]
        for factor in factors[1:]:
            product = apply("mul", product, factor)
        return product

    def neg(a: int) -> int:
        return apply("neg", a)

    one, two = constant(1.0), constant(2.0)
    if operator in ("input", "constant", "lt", "le", "eq", "floor"):
        return [], []
    if operator == "add":
        return [(arguments[0], one), (arguments[1], one)], []
    if operator == "sub":
        return [(arguments[0], one), (arguments[1], constant(-1.0))], []
    if operator == "neg":
        return [(arguments[0], constant(-1.0))], []
    if operator == "mul":
        a, b = arguments
        if a == b:
            return [(a, mul(two, a))], [(a, a, two)]
        return [(a, b), (b, a)], [(a, b, one)]
    if operator == "div":
        a, b = arguments
        r = apply("div", one, b)
        if graph.value(a) is not None:  # d/db only
            return [(b, neg(mul(node, r)))], [(b, b, mul(two, node, mul(r, r)))]
        return [(a, r), (b, neg(mul(node, r)))], [(a, b, neg(mul(r, r))), (b, b, mul(two, node, mul(r, r)))]
    if operator == "atan2":
        y, x = arguments
        s = apply("add", mul(x, x), mul(y, y))
        fy, fx = apply("div", x, s), neg(apply("div", y, s))
        fyy = mul(two, fy, fx)
        fxy = apply("sub", mul(fx, fx), mul(fy, fy))
        return [(y, fy), (x, fx)], [(y, y, fyy), (x, x, neg(fyy)), (y, x, fxy)]
    if operator == "pow":
        x, exponent = arguments
        e = graph.value(exponent)
        assert e is not None
        first = mul(exponent, apply("pow", x, constant(e - 1)))
        return [(x, first)], [(x, x, mul(constant(e * (e - 1)), apply("pow", x, constant(e - 2))))]
    x = arguments[0]
    first, second = _unary(operator, graph, x, node, mul, neg)
    return [(x, first)], [(x, x, second)]


def _unary(operator: str, graph: Graph, x: int, y: int, mul, neg) -> tuple[int, int]:
    """F' and f'' of an elementwise function at x, where y = f(x)."""
    apply, constant = graph.apply, graph.constant
    one, two, half = constant(1.0), constant(2.0), constant(0.5)
    match operator:
        case "sqrt":
            first = apply("div", half, y)
            return first, neg(apply("div", mul(half, first), x))
        case "exp":
            return y, y
        case "expm1":
            return apply("add", y, one), apply("add", y, one)
        case "log":
            r = apply("div", one, x)
            return r, neg(mul(r, r))
        case "log1p":
            r = apply("div", one, apply("add", x, one))
            return r, neg(mul(r, r))
        case "sin":
            return apply("cos", x), neg(y)
        case "cos":
            return neg(apply("sin", x)), neg(y)
        case "tan":
            first = apply("add", one, mul(y, y))
            return first, mul(two, y, first)
        case "asin" | "acos":
            s = apply("sub", one, mul(x, x))
            first = apply("div", one, apply("sqrt", s))
            second = apply("div", mul(x, first), s)
            return (first, second) if operator == "asin" else (neg(first), neg(second))
        case "atan":
            first = apply("div", one, apply("add", one, mul(x, x)))
            return first, neg(mul(two, x, mul(first, first)))
        case "sinh":
            return apply("cosh", x), y
        case "cosh":
            return apply("sinh", x), y
        case "tanh":
            first = apply("sub", one, mul(y, y))
            return first, neg(mul(two, y, first))
        case "erf":
            first = mul(constant(1.1283791670955126), apply("exp", neg(mul(x, x))))
            return first, neg(mul(two, x, first))
        case "abs":
            zero = constant(0.0)
            below = apply("select", apply("lt", x, zero), constant(-1.0), zero)
            return apply("select", apply("lt", zero, x), one, below), zero
    raise NotImplementedError(operator)


class Derivatives:
    """Derivatives of outputs of a graph with respect to variables.

    Args:
        graph: grows by the nodes of the derivatives.
        outputs: nodes.
        variables: nodes, inputs as a rule. A variable's number is its place here.

    Example:
        >>> graph = Graph()
        >>> x, y, weight = graph.input(), graph.input(), graph.input()
        >>> d = Derivatives(graph, [graph.apply("mul", x, graph.apply("sin", y))], [x, y])
        >>> sorted(d.jacobian())  # output, variable
        [(0, 0), (0, 1)]
        >>> sorted(d.hessian([weight])[0])  # lower triangle
        [(1, 0), (1, 1)]
    """

    def __init__(self, graph: Graph, outputs: Sequence[int], variables: Sequence[int]) -> None:
        self.graph, self.outputs = graph, list(outputs)
        self._order = graph.needed(outputs, outside=True)
        self._externals = {value: (e, row) for e in graph.externals for row, value in enumerate(e.values)}
        self._first: dict[int, Sparse] = {v: {i: graph.constant(1.0)} for i, v in enumerate(variables)}
        self._partials: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int, int]]]] = {}
        for node in self._order:
            if node not in self._first:
                self._first[node] = self._forward(node)

    def _forward(self, node: int) -> Sparse:
        graph = self.graph
        operator, arguments = graph.rows[node]
        if operator == "select":
            condition, a, b = arguments
            zero = graph.constant(0.0)
            da, db = self._first[a], self._first[b]
            return {i: graph.apply("select", condition, da.get(i, zero), db.get(i, zero)) for i in sorted({*da, *db})}
        if node in self._externals:
            external, row = self._externals[node]
            first, second = list(zip(external.arguments, external.jacobian[row], strict=True)), []
        elif not any(self._first[a] for a in graph.arguments(node)):
            return {}
        else:
            first, second = partials(graph, node)
        self._partials[node] = first, second
        total: Sparse = {}
        for argument, factor in first:
            for i, d in self._first[argument].items():
                self._accumulate(total, i, graph.apply("mul", factor, d))
        return self._without_zeros(total)

    def _accumulate(self, total: dict, key, node: int) -> None:
        total[key] = self.graph.apply("add", total[key], node) if key in total else node

    def _without_zeros(self, total: dict) -> dict:
        return {key: node for key, node in total.items() if self.graph.value(node) != 0}

    def jacobian(self) -> dict[tuple[int, int], int]:
        """Nodes of the first derivatives, by (output, variable)."""
        return {(row, i): d for row, node in enumerate(self.outputs) for i, d in sorted(self._first[node].items())}

    def hessian(self, weights: Sequence[int]) -> tuple[dict[tuple[int, int], int], Mapping[int, Sequence[int]]]:
        """Second derivatives of ``sum of weights[r] * outputs[r]``.

        Returns:
            nodes by (variable, variable), lower triangle; and for each external, by its place in `graph.externals`, the
            nodes of the adjoints of its values, which are to be known before its `hessian` inputs are.
        """
        graph = self.graph
        adjoint: Sparse = {}
        for weight, node in zip(weights, self.outputs, strict=True):
            self._accumulate(adjoint, node, weight)
        total: dict[tuple[int, int], int] = {}
        zero = graph.constant(0.0)
        for node in reversed(self._order):
            if node not in adjoint or not self._first[node]:
                continue
            operator, arguments = graph.rows[node]
            if operator == "select":
                condition, a, b = arguments
                for branch, parts in ((a, (adjoint[node], zero)), (b, (zero, adjoint[node]))):
                    if self._first[branch]:
                        self._accumulate(adjoint, branch, graph.apply("select", condition, *parts))
                continue
            first, second = self._partials.get(node, ((), ()))
            for argument, factor in first:
                if self._first[argument]:
                    self._accumulate(adjoint, argument, graph.apply("mul", adjoint[node], factor))
            for a, b, factor in second:
                self._outer(total, a, b, graph.apply("mul", adjoint[node], factor))
        outside: dict[int, Sequence[int]] = {}
        for place, external in enumerate(graph.externals):
            if any(value in adjoint for value in external.values):
                outside[place] = [adjoint.get(value, zero) for value in external.values]
                for row, a in enumerate(external.arguments):
                    for column, weight in enumerate(external.hessian[row]):
                        b = external.arguments[column]
                        if a == b and column < row:  # one node, given as two arguments: both mixed derivatives
                            weight = graph.apply("mul", graph.constant(2.0), weight)
                        self._outer(total, a, b, weight)
        return self._without_zeros(total), outside

    def _outer(self, total: dict[tuple[int, int], int], a: int, b: int, factor: int) -> None:
        """Add ``factor * (J_a J_bᵀ + J_b J_aᵀ)``, or ``factor * J_a J_aᵀ`` where the arguments are one."""
        apply, da, db = self.graph.apply, self._first[a], self._first[b]
        if self.graph.value(factor) == 0:
            return
        if a == b:
            items = sorted(da.items())
            for n, (i, di) in enumerate(items):
                left = apply("mul", factor, di)
                for j, dj in items[: n + 1]:
                    self._accumulate(total, (i, j), apply("mul", left, dj))
            return
        for i, di in sorted(da.items()):
            left = apply("mul", factor, di)
            for j, dj in sorted(db.items()):
                product = apply("mul", left, dj)
                if i == j:
                    product = apply("mul", self.graph.constant(2.0), product)
                self._accumulate(total, (max(i, j), min(i, j)), product)
