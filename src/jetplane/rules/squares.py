"""Squared errors that are written by hand: a sum of squares over all elements is a loss for Gauss-Newton curvature.

    L = sum(w x^2),    L_i = sum(2 w x x_i),    L_ij = sum(2 w x_i x_j)

``(a - b).square().mean()`` calls no loss function. Squares are remembered with what they are made of, through factors
that do not depend on parameters and through sums over some axes; the sum over all elements has the curvature above.
Models take such sums too, as in a norm. So this is a kind of its own (`jetplane.jets.SQUARES`): where the sum meets
data or an output of the model, or enters a loss function, its second coefficients are dropped, and it is a part of the
model like any other. Where slopes alone are taken, as by estimators of the gradient, the sum knows its examples' parts.
Beside exact curvature squares are not followed: penalties and functions without noise would be taken for losses of
examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..jets import SQUARES, Jet, Space, is_jet, make, outer, parts, precise
from . import examples
from .registry import operator


@dataclass(frozen=True)
class Squares:
    """A tensor that is ``sum(weight * x**2)`` over some axes of x.

    Attributes:
        x: the jet that is squared.
        version: how often x had been written to.
        weight: a constant that broadcasts with x.
        shape: of the tensor, with axes of size 1 where x was summed over.
        axes: the axis of x that each of the tensor's own stands for.
    """

    x: Jet
    version: int
    weight: Tensor | float
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @staticmethod
    def of(x: Jet) -> Squares:
        """``x**2``."""
        return Squares(x, x.root().version, 1.0, tuple(x.shape), tuple(range(x.dim())))

    def times(self, factor: Tensor | float, shape: torch.Size) -> Squares | None:
        """The product of a tensor of this shape and a factor; None where that makes it larger."""
        if isinstance(factor, Tensor) and factor.dim():
            if torch.broadcast_shapes(factor.shape, shape) != shape:
                return None
            factor = factor.expand(shape).reshape(self.shape)
        return replace(self, weight=self.weight * factor)

    def summed(self, dim: Any, keepdim: bool, mean: bool) -> Squares:
        """The sum, or the mean, over dimensions of the tensor; None and none of them are all."""
        n = len(self.axes)
        dims = [dim] if isinstance(dim, int) else list(dim or range(n))
        gone = {d % n for d in dims} if n else set()
        taken = {self.axes[d] for d in gone}
        shape = tuple(1 if axis in taken else size for axis, size in enumerate(self.shape))
        count = math.prod(self.shape[axis] for axis in taken)
        axes = self.axes if keepdim else tuple(axis for d, axis in enumerate(self.axes) if d not in gone)
        return replace(self, weight=self.weight / count if mean else self.weight, shape=shape, axes=axes)


def follow(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
    """The result of an operator of the model: with what it is the square of, or, of one element, as a loss."""
    rule = _RULES.get(func)
    if rule is None or not is_jet(result, space) or not result.numel():
        return result
    found = rule(space, *args, **kwargs)
    if found is None:
        return result
    if result.numel() == 1 and func in _SUMS:
        return _total(space, found, result)
    result.squares = found, result.root().version
    return result


def _known(y: Any, space: Space) -> Squares | None:
    """What a tensor is the square of, unless it or that was written to since."""
    if not is_jet(y, space) or y.squares is None:
        return None
    squares, version = y.squares
    return squares if (y.root().version, squares.x.root().version) == (version, squares.version) else None


def _total(space: Space, squares: Squares, total: Jet) -> Jet:
    """The loss ``sum(weight * x**2)``, of which value and slope are known, with its examples."""
    before = space.order, space.kind
    space.order, space.kind = 2, SQUARES
    try:
        x = squares.x if space.entrance is None else space.entrance.into_loss(squares.x, space)
        (p, x1, _), value = parts(x, space), total.primal
        d2 = (2 * squares.weight * torch.ones_like(precise(p))).expand(p.shape)
        d1 = d2 * precise(p)
        if not space.gauss_newton:
            return examples.keep(space, total, x1, d1)
        totals = x1.total(d1), outer(x1 * d2, x1).total()
        slope, curvature = (c.moved(lambda t: t.reshape(len(t), *value.shape)) for c in totals)
        return examples.keep(space, make(value, slope, curvature, space), x1, d1)
    finally:
        space.order, space.kind = before


# --- operators ------------------------------------------------------------------------------------------------------


def _square(space: Space, x: Any) -> Squares | None:
    return Squares.of(x) if is_jet(x, space) else None


def _power(space: Space, x: Any, exponent: Any) -> Squares | None:
    return _square(space, x) if exponent == 2 else None


def _product(space: Space, x: Any, y: Any) -> Squares | None:
    if x is y:
        return _square(space, x)
    squares, other, tensor = (_known(x, space), y, x) if isinstance(x, Jet) else (_known(y, space), x, y)
    return None if squares is None or isinstance(other, Jet) else squares.times(other, tensor.shape)


def _quotient(space: Space, x: Any, y: Any) -> Squares | None:
    squares = _known(x, space)
    return None if squares is None or isinstance(y, Jet) else squares.times(1 / y, x.shape)


def _sum(mean: bool) -> Callable[..., Squares | None]:
    def rule(space: Space, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Squares | None:
        squares = None if dtype is not None else _known(x, space)
        return None if squares is None else squares.summed(dim, keepdim, mean)

    return rule


_SUMS = {operator(name): _sum(mean="mean" in name) for name in ("sum", "sum.dim_IntList", "mean", "mean.dim")}
_RULES: dict[Any, Callable[..., Squares | None]] = {
    operator("square"): _square,
    operator("pow.Tensor_Scalar"): _power,
    operator("mul.Tensor"): _product,
    operator("div.Tensor"): _quotient,
} | _SUMS
