"""The same graphs as torch operators: where llvmlite is not installed, and on devices other than the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .graph import Graph

_OPERATORS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "lt": lambda a, b: torch.lt(a, b).to(a.dtype),
    "le": lambda a, b: torch.le(a, b).to(a.dtype),
    "eq": lambda a, b: torch.eq(a, b).to(a.dtype),
    "select": lambda c, a, b: torch.where(c != 0, a, b),
}


class TorchKernel:
    """As `Kernel`, by one torch operator a node, on the device of the inputs.

    Example:
        >>> graph = Graph()
        >>> x = graph.input()
        >>> kernel = TorchKernel(graph, {"square": [graph.apply("mul", x, x)]})
        >>> kernel("square", torch.arange(3.0, dtype=torch.float64)[None])
        tensor([[0., 1., 4.]], dtype=torch.float64)
    """

    def __init__(self, graph: Graph, functions: Mapping[str, Sequence[int]]) -> None:
        self.inputs = graph.inputs
        self.rows = {name: len(outputs) for name, outputs in functions.items()}
        self._graph = graph
        self._functions = {name: (graph.needed(nodes), list(nodes)) for name, nodes in functions.items()}

    def values(self, order: Sequence[int], inputs: torch.Tensor) -> dict[int, torch.Tensor]:
        """The values (lanes,) of nodes, given in order with all that they depend on."""
        found: dict[int, torch.Tensor] = {}
        for node in order:
            operator, arguments = self._graph.rows[node]
            if operator == "input":
                found[node] = inputs[arguments[0]]
            elif operator == "constant":
                found[node] = inputs.new_tensor(arguments[0])
            else:
                function = _OPERATORS.get(operator) or getattr(torch, operator)
                found[node] = function(*(found[a] for a in arguments))
        return found

    def __call__(self, name: str, inputs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute (inputs, lanes) → (outputs, lanes)."""
        order, outputs = self._functions[name]
        if out is None:
            out = inputs.new_empty(len(outputs), inputs.shape[1])
        found = self.values(order, inputs)
        for row, node in enumerate(outputs):
            out[row] = found[node]
        return out
