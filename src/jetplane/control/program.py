"""What is computed at all nodes at once: a traced graph with its derivatives, compiled, and arrays for its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError, TraceError
from ..llvm import WIDTH, Derivatives, Graph, Kernel, TorchKernel, available
from .external import Nonlinear, OutsideFunction
from .tracing import Tracer, outputs


class Program:
    """A function of K variables with M outputs for each node, and its exact sparse derivatives.

    Args:
        graph: the function.
        variables: K input nodes; the first inputs of the graph, in order.
        results: M nodes.
        backend: "llvm", "torch", or "auto": llvm where llvmlite is installed.

    Attributes:
        jacobian_keys: (output, variable) of each structural nonzero.
        hessian_keys: (variable, variable), lower triangle, of the weighted sum of outputs.
    """

    def __init__(self, graph: Graph, variables: Sequence[int], results: Sequence[int], backend: str = "auto") -> None:
        if backend not in ("auto", "llvm", "torch"):
            raise ArgumentError(f"backend must be 'auto', 'llvm' or 'torch', got {backend!r}")
        self.graph, self.results = graph, list(results)
        self.variables = len(variables)
        weights = [graph.input() for _ in results]
        self.weights = (
            slice(*(graph.rows[w][1][0] + end for w, end in ((weights[0], 0), (weights[-1], 1))))
            if weights
            else slice(0, 0)
        )
        derivatives = Derivatives(graph, results, variables)
        jacobian = derivatives.jacobian()
        hessian, adjoints = derivatives.hessian(weights)
        self.jacobian_keys, self.hessian_keys = list(jacobian), list(hessian)
        inside = set(graph.needed(results, outside=True))
        self.externals = [(n, e) for n, e in enumerate(graph.externals) if inside & set(e.values)]
        functions: dict[str, Sequence[int]] = {
            "values": self.results,
            "jacobian": list(jacobian.values()),
            "hessian": list(hessian.values()),
        }
        for n, external in self.externals:
            functions[f"arguments{n}"] = external.arguments
            if n in adjoints:
                functions[f"adjoints{n}"] = adjoints[n]
        self.functions = functions
        self.kernel = (
            Kernel(graph, functions)
            if backend == "llvm" or (backend == "auto" and available())
            else TorchKernel(graph, functions)
        )

    def operations(self, name: str) -> int:
        """How many scalar operators a function has for each node."""
        graph = self.graph
        return sum(graph.rows[n][0] not in ("input", "constant") for n in graph.needed(self.functions[name]))

    def at(self, lanes: int) -> Evaluation:
        """Arrays for so many nodes."""
        return Evaluation(self, lanes)


class Evaluation:
    """A program at some nodes. Set `variables` (K, nodes), call `changed`, and ask.

    Results are views of arrays that the next call overwrites.
    """

    def __init__(self, program: Program, lanes: int) -> None:
        self.program, self.lanes = program, lanes
        self._padded = -(-lanes // WIDTH) * WIDTH
        self._inputs = np.zeros((program.graph.inputs, self._padded))
        self._out = {name: np.zeros((len(nodes), self._padded)) for name, nodes in program.functions.items()}
        self._tensors = {name: torch.from_numpy(array) for name, array in self._out.items()}
        self._input_tensor = torch.from_numpy(self._inputs)
        self.variables = self._inputs[: program.variables, :lanes]
        self.weights = self._inputs[program.weights, :lanes]
        self._pad = slice(lanes, self._padded)
        self._known = {"values": False, "slopes": False}
        self._swept: dict[int, list[Nonlinear]] = {}

    def changed(self) -> None:
        """The variables have new values."""
        self._known = {"values": False, "slopes": False}

    def _call(self, name: str) -> np.ndarray:
        if self._padded > self.lanes:
            self._inputs[:, self._pad] = self._inputs[:, :1]
        self.program.kernel(name, self._input_tensor, self._tensors[name])
        return self._out[name][:, : self.lanes]

    def _rows(self, nodes) -> list[int]:
        rows = self.program.graph.rows
        return [rows[n][1][0] if rows[n][0] == "input" else -1 for n in nodes]

    def _put(self, nodes, values: np.ndarray) -> None:
        for row, value in zip(self._rows(nodes), values, strict=True):
            if row >= 0:
                self._inputs[row, : self.lanes] = value

    def _outside(self, slopes: bool) -> None:
        """Values of externals, and with `slopes` their Jacobians."""
        key = "slopes" if slopes else "values"
        if self._known[key]:
            return
        for n, external in self.program.externals:
            function = external.function
            assert isinstance(function, OutsideFunction)
            x = torch.from_numpy(np.ascontiguousarray(self._call(f"arguments{n}").T))
            if not slopes or not function.differentiable:
                self._put(external.values, function.value(x).T.numpy())
                continue
            y, jacobian, self._swept[n] = function.derivatives(x)
            self._put(external.values, y.T.numpy())
            for nodes, rows in zip(external.jacobian, jacobian.numpy(), strict=True):
                self._put(nodes, rows)
        self._known[key] = self._known["values"] = True

    def values(self) -> np.ndarray:
        """Outputs (M, nodes)."""
        self._outside(slopes=False)
        return self._call("values")

    def jacobian(self) -> np.ndarray:
        """Nonzeros of the Jacobian (len(jacobian_keys), nodes)."""
        self._outside(slopes=True)
        return self._call("jacobian")

    def hessian(self) -> np.ndarray:
        """Nonzeros of the Hessian of the weighted sum (len(hessian_keys), nodes); set `weights` (M, nodes) before."""
        self._outside(slopes=True)
        for n, external in self.program.externals:
            if f"adjoints{n}" not in self.program.functions:
                continue
            function = external.function
            assert isinstance(function, OutsideFunction)
            if not function.differentiable:
                continue
            x = torch.from_numpy(np.ascontiguousarray(self._call(f"arguments{n}").T))
            adjoints = torch.from_numpy(np.ascontiguousarray(self._call(f"adjoints{n}").T))
            second = function.hessian(x, adjoints, self._swept[n]).numpy()
            for row, nodes in enumerate(external.hessian):
                self._put(nodes, second[row, : row + 1])
        return self._call("hessian")

    def first_bad(self) -> tuple[int, int, str | None] | None:
        """Where values are not finite: (node, output, line of code), or None."""
        values = self.values()
        bad = ~np.isfinite(values)
        if not bad.any():
            return None
        output, lane = map(int, np.argwhere(bad)[0])
        graph = self.program.graph
        order = graph.needed([self.program.results[output]])
        column = torch.from_numpy(self._inputs[:, lane : lane + 1].copy())
        found = TorchKernel(graph, {}).values(order, column)
        line = next((graph.lines[n] for n in order if not bool(found[n].isfinite().all())), None)
        return lane, output, line


def copied(source: Graph, target: Graph, results: Sequence[int], inputs: dict[int, int], known: dict) -> list[int]:
    """Nodes of one graph in another, where inputs are replaced; `known` has externals by function and arguments."""
    places = {value: (e, row) for e in source.externals for row, value in enumerate(e.values)}
    new = dict(inputs)
    for node in source.needed(results, outside=True):
        if node in new:
            continue
        operator, arguments = source.rows[node]
        target.line = source.lines[node]
        if operator == "constant":
            new[node] = target.constant(arguments[0])
        elif operator == "input":
            external, row = places[node]
            key = (id(external.function), tuple(new[a] for a in external.arguments))
            if key not in known:
                function = external.function
                assert isinstance(function, OutsideFunction)
                known[key] = target.external(function, key[1], function.outputs, differentiable=function.differentiable)
            new[node] = known[key].values[row]
        else:
            new[node] = target.apply(operator, *(new[a] for a in arguments))
    return [new[r] for r in results]


def trace(
    run: Callable[[Any, Any], Sequence[tuple[str, Any, int | None]]], each: int, shared: int, lanes: int
) -> tuple[Graph, list[int], list[list[int]]]:
    """The graph of functions of `each` variables of a node and `shared` variables of all nodes.

    Args:
        run: takes tensors (nodes, each) and (shared,); returns names, values and sizes of its outputs.
        each: how many variables a node has.
        shared: how many all nodes have in common.
        lanes: for how many nodes it is traced; 0 for a function that has no nodes, whose variables are all shared.

    Returns:
        the graph, its variables, and the nodes of each output.
    """
    tracer = Tracer(Graph(), max(lanes, 1))
    own = torch.tensor([[tracer.input(lane if lanes else None) for _ in range(each)] for lane in range(tracer.lanes)])
    own = own.reshape(tracer.lanes, each).long()
    common = torch.tensor([tracer.input() for _ in range(shared)], dtype=torch.int64)
    with torch.no_grad():
        with tracer:
            made = run(tracer.tensor(own), tracer.tensor(common))
        found = [(name, outputs(tracer, value, size, name)) for name, value, size in made]
    graph = Graph()
    variables = [graph.input() for _ in range(each + shared)]
    known: dict = {}
    results: list[list[int]] = []
    for lane in range(tracer.lanes):
        inputs = dict(zip([*own[lane].tolist(), *common.tolist()], variables, strict=True))
        for number, (name, nodes) in enumerate(found):
            wanted = nodes[lane].tolist()
            allowed = 1 << lane if lanes else 0
            for node in wanted:
                if tracer.mask(node) & ~allowed:
                    raise TraceError(
                        f"{name} at one node depends on other nodes: the first dimension of every tensor is that of "
                        f"nodes\n"
                        f"  at {tracer.graph.lines[node] or tracer.graph.line}"
                    )
            new = copied(tracer.graph, graph, wanted, inputs, known)
            if lane == 0:
                results.append(new)
            elif new != results[number]:
                differing = next(
                    a for a, b in zip(wanted, zip(new, results[number], strict=True), strict=True) if b[0] != b[1]
                )
                raise TraceError(
                    f"{name} is not the same function at each node: it must depend on its arguments alone (time is t), "
                    f"not on a "
                    f"node's number or on random numbers\n  at {tracer.graph.lines[differing] or tracer.graph.line}"
                )
    return graph, variables, results
