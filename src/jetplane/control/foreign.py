"""Code that torch cannot see as dynamics: a function of nodes, with derivatives by its own rule for jets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError, TraceError
from ..transforms.forward import jet
from .external import OutsideFunction
from .tracing import Symbolic, Tracer, user_line


def per_node(f: Callable[[Tensor], Tensor], outputs: int, *, batched: bool = False) -> Callable[[Tensor], Tensor]:
    """A function of nodes that torch cannot see, for dynamics, path constraints and integrands.

    Args:
        f: takes the k values of one node, (k,), float64, and gives ``outputs`` numbers. It is made of functions with
            rules for jets: `jetplane.compiled`, `jetplane.register_native`, `jetplane.blackbox`, and torch's own.
        outputs: m, how many numbers it gives.
        batched: f takes all nodes at once, (nodes, k), and gives (nodes, m), each row from that row alone. All
            derivatives are then one call, in which each of k directions moves all nodes; otherwise each node is a call.

    Returns:
        A function (nodes, k) → (nodes, m). First and second derivatives are those of f.

    Raises:
        ShapeError: the argument is no (nodes, k), or f gives another number of values.
        TraceError: a batched f gives a node what depends on others.

    >>> import jetplane as jp, torch
    >>> drag = jp.control.per_node(jp.blackbox(lambda z: z[:, :1] * z[:, 1:].abs()), outputs=1, batched=True)
    >>> ocp = jp.control.Problem()
    >>> ph = ocp.phase("cart", states={"x": 1, "v": 1}, controls={"u": 1}, t0=0.0, tf=2.0)
    >>> ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.u - 0.1 * drag(torch.cat([x.v, x.v], -1))}
    """
    return _NodeFunction(f, outputs, batched)


class _NodeFunction(OutsideFunction):
    def __init__(self, f: Callable[[Tensor], Tensor], outputs: int, batched: bool) -> None:
        self.f, self.outputs, self.batched, self.line = f, outputs, batched, None
        self._alone = not batched  # whether nodes were seen not to depend on each other

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ShapeError(f"a function of nodes takes values of shape (nodes, k), got {list(x.shape)}")
        tracer = Tracer.active()
        if tracer is None or not isinstance(x, Symbolic):
            return self.value(x)
        self.line = tracer.graph.line = user_line()
        rows = tracer.external(self, tracer.scalars(x).nodes.tolist())
        return tracer.tensor(torch.tensor(rows, dtype=torch.int64))

    def _at(self, x: Tensor) -> Tensor:
        """F of one node (k,), or of a batch (nodes, k)."""
        y, expected = self.f(x), (*x.shape[:-1], self.outputs)
        if y.numel() != math.prod(expected):
            raise ShapeError(
                f"a function of nodes must give shape {list(expected)}, got {list(y.shape)}\n  at {self.line}"
            )
        return y.reshape(expected)

    def value(self, x: Tensor) -> Tensor:
        if not self.batched:
            return torch.stack([self._at(row) for row in x]).double()
        y = self._at(x).double()
        if not self._alone and len(x) > 1:
            first = self._at(x[:1]).double()
            if not torch.allclose(first, y[:1], rtol=1e-9, atol=1e-12, equal_nan=True):
                raise TraceError(f"a batched function of nodes combines values of different nodes\n  at {self.line}")
            self._alone = True
        return y

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        directions = torch.eye(x.shape[1], dtype=x.dtype)
        if self.batched:
            y, first, second = jet(self._at, x, directions[:, None].expand(-1, len(x), -1).contiguous())
        else:
            each = [jet(self._at, row, directions) for row in x]
            y, first, second = (torch.stack([row[n] for row in each], n) for n in range(3))
        return y.double(), first.permute(2, 0, 1).contiguous(), second

    def hessian(self, x: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        return torch.einsum("ijnm,nm->ijn", kept, weights).contiguous()
