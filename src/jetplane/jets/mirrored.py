"""First coefficients that the evaluation around this one carries already, where both go along the same directions.

In the Laplacian of a Laplacian two evaluations nest, and derivatives commute. Of a value x whose inner second
coefficient is s the outer evaluation carries

    d_j x,   sum_j d_j² x,   d_j s,   sum_j d_j² s

so that of the inner first coefficients ``d_i x`` nothing is new but ``d_j d_i x``, once for each pair i <= j: outer
first coefficients of s are ``d_j sum_i d_i² x = sum_i d_i² (d_j x)``.
Of (D + 2)² channels 2 (D + 2) + D (D + 1) / 2 are left, 29 of 49 for D = 5. Linear operators with constants and
elementwise functions keep this form; any other operator gets the full coefficients.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from .coefficients import Coefficients, absent, expand, plain, writable
from .jet import Jet, parts
from .pairs import AllPairs
from .space import Space
from .structured import Tangents


@final
class Mirrored(Tangents):
    """Inner first coefficients (K, *S), each of which is a jet of the outer evaluation.

    Args:
        value: the outer first coefficients of the value, ``d_i x``.
        second: those of the sum of inner second coefficients, (K, 1, *S).
        cross: ``d_i d_j x`` for i <= j, (pairs, *S); None for zero.
        shape: (K, *S).
    """

    def __init__(self, value: Coefficients, second: Coefficients, cross: Tensor | None, shape: torch.Size) -> None:
        self.value, self.second, self.cross, self.shape = value, second, cross, shape
        self.dtype, self.device = value.tensor.dtype, value.tensor.device

    @staticmethod
    def seed(x: Jet) -> Mirrored:
        """Those of an argument, which the outer evaluation moves along the same directions."""
        return Mirrored(x.first, absent(x.space, 1), None, torch.Size((x.space.k, *x.shape)))

    @property
    def outer(self) -> Space:
        """The space of the outer evaluation."""
        return self.value.space

    @property
    def pairs(self) -> AllPairs:
        """The order of what ``cross`` holds."""
        return AllPairs(self.shape[0])

    def stack(self) -> Tensor:
        """``d_i x``, (K, *S), of plain numbers."""
        return self.value.full(self.shape[1:], self.dtype, self.device)

    def materialized(self) -> Tensor:
        """The (K, *S) as a jet of the outer evaluation."""
        outer, cross, second = self.outer, None, None
        if self.cross is not None:
            cross = self.pairs.matrix(expand(self.cross, self.shape[1:]))
        if self.second:
            shape = (1, *self.shape[1:])
            second = self.second.full(shape, self.dtype, self.device)[:, 0].unsqueeze(0)
        return self.stack() if cross is None and second is None else Jet(self.stack(), cross, second, outer)

    def to(self, dtype: torch.dtype) -> Any:
        """The same in another dtype, in full."""
        return self if dtype == self.dtype else self.materialized().to(dtype)

    def __getitem__(self, directions: slice) -> Tensor:
        """A run of the K, in full."""
        return self.materialized()[directions]


def mirrored(p: Any, first: Coefficients) -> Mirrored | None:
    """What is held of first coefficients where it mirrors that of the primal p; None where it does not."""
    held = first.held
    if not isinstance(held, Mirrored) or not isinstance(p, Jet) or p.space is not held.outer:
        return None
    return held if parts(p, held.outer)[1].held is held.value.held else None


def reflected(space: Space, held: Mirrored, y: Any, second: Coefficients, cross: Tensor | None) -> Coefficients | None:
    """First coefficients of a result, of what is known of it; None where that does not suffice.

    Args:
        space: of the inner evaluation.
        held: first coefficients of the argument.
        y: the primal result, a function of the argument's alone.
        second: its inner second coefficients.
        cross: ``d_i d_j y``.
    """
    outer = held.outer
    if not isinstance(y, Jet) or y.space is not outer or (cross is not None and not plain(cross)):
        return None
    _, y1, y2 = parts(y, outer)
    if not y1 or y1.structured is not None or (cross is None and y2):
        return None
    of_second = parts(second.tensor, outer)[1] if second else absent(outer, 1)
    return Coefficients(space, 1, Mirrored(y1, of_second, cross, torch.Size((held.shape[0], *y.shape))))


def curved(held: Mirrored, d1: Tensor, d2: Tensor) -> Tensor:
    """``f' d_i d_j x + f'' d_i x d_j x`` for i <= j, of plain derivatives."""
    x, pairs, shape = held.stack(), held.pairs, torch.broadcast_shapes(d1.shape, held.shape[1:])
    x = x.expand(-1, *shape)
    if not writable(x, d1, d2, held.cross):
        products = pairs.outer(d2 * x, x)
        return products if held.cross is None else held.cross * d1 + products
    total = held.outer.memory.empty((pairs.count, *shape), x)
    if held.cross is None:
        pairs.write_outer(total, d2 * x, x)
    else:
        torch.mul(held.cross, d1, out=total)
        pairs.add_outer(total, d2 * x, x)
    return total


def squared(held: Mirrored) -> Tensor:
    """``sum_i (d_i x)²``, (1, *S), a jet of the outer evaluation."""
    outer, x = held.outer, held.stack()
    value, cross = x.square().sum(0), held.cross
    second = None
    if held.second:
        second = 2 * (x * held.second.full((1, *held.shape[1:]), held.dtype, held.device)[:, 0]).sum(0)
    if cross is None:
        return Jet(value[None], None, None if second is None else second[None, None], outer)
    if not writable(x, cross, second):
        matrix = held.pairs.matrix(cross)
        squares = 2 * matrix.square().sum((0, 1))
        first, second = 2 * (x * matrix).sum(1), squares if second is None else second + squares
        return Jet(value[None], first[:, None], second[None, None], outer)
    first = torch.zeros_like(x)
    second = torch.zeros_like(value) if second is None else second
    for i, j, n in ((t.i, t.j, t.n) for t in held.pairs.terms()):
        first[j].addcmul_(x[i], cross[n], value=2)
        if i != j:
            first[i].addcmul_(x[j], cross[n], value=2)
        second.addcmul_(cross[n], cross[n], value=2 if i == j else 4)
    return Jet(value[None], first[:, None], second[None, None], outer)
