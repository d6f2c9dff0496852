"""The chain rule for sums of second coefficients as one step of a graph for reverse mode.

    y_i = d1 x_i,    y_s = d1 x_s + d2 sum_i x_i²

Autograd would hold and form several stacks of the size of all first coefficients in its way back; the formulas below
form one, the gradient itself:

    gradient of x_i:  d1 g_i + 2 d2 g_s x_i        of d1:  sum_i g_i x_i + g_s x_s
    gradient of x_s:  d1 g_s                       of d2:  g_s sum_i x_i²

Where the way back is itself recorded (`create_graph`), it is made of ordinary operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TraceChain(torch.autograd.Function):
    """The chain rule for one sum of all second coefficients, with weights one.

    ``TraceChain.apply(x1, x2, d1, d2)`` takes first coefficients (K, *S), of which axes may have size one where all
    points share them, second ones (1, *S) or None, and f' and f'' of shape S; it gives (K, *S) and (1, *S).
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor | None, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x1, x2, d1, d2)
        second = _squares(x1) * d2
        if x2 is not None:
            second.addcmul_(x2, d1)
        return x1 * d1, second

    @staticmethod
    def backward(ctx: Any, g1: Tensor | None, g2: Tensor | None) -> Any:  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        x1, x2, d1, d2 = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_operators(x1, x2, d1, d2, g1, g2)
        along = torch.zeros_like(d1)
        gx1 = torch.zeros_like(x1) if g1 is None else (g1 * d1).sum_to_size(x1.shape)
        if g1 is not None:
            for g, x in zip(g1, x1, strict=True):
                along.addcmul_(g, x)
        if g2 is None:
            return gx1, None, along, None
        factor = (2 * d2 * g2[0]).sum_to_size(x1.shape[1:])
        for g, x in zip(gx1, x1, strict=True):
            g.addcmul_(factor, x)
        if x2 is not None:
            along.addcmul_(g2[0], x2[0])
        return gx1, None if x2 is None else g2 * d1, along, (g2 * _squares(x1))[0]


def _squares(x: Tensor) -> Tensor:
    """``sum_i x_i²``, (1, *S)."""
    if torch.is_grad_enabled():
        return x.square().sum(0, keepdim=True)
    total = torch.zeros_like(x[:1])
    for one in x:
        total[0].addcmul_(one, one)
    return total


def _by_operators(x1: Any, x2: Any, d1: Any, d2: Any, g1: Any, g2: Any) -> tuple[Any, ...]:
    gx1: Any = torch.zeros_like(x1) if g1 is None else (g1 * d1).sum_to_size(x1.shape)
    along: Any = torch.zeros_like(d1) if g1 is None else (g1 * x1).sum(0)
    if g2 is None:
        return gx1, None, along, None
    gx1 = gx1 + (2 * d2 * g2 * x1).sum_to_size(x1.shape)
    if x2 is not None:
        along = along + (g2 * x2)[0]
    return gx1, None if x2 is None else g2 * d1, along, (g2 * x1.square().sum(0, keepdim=True))[0]
