"""Rules of a user's own: for operators that torch does not know, and for custom autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._torch import Operator, OperatorPacket
from ..errors import ArgumentError
from ..jets import Jet, Space, chain, primal
from ..jets import linear as linear_jet
from .fallback import missing
from .functions import register_function
from .registry import RULES


def register_rule(
    op: Any,
    *,
    linear: Callable[..., Any] | None = None,
    elementwise: Callable[..., Any] | None = None,
    composed: Callable[..., Any] | None = None,
    constant: bool = False,
) -> None:
    """Say how jets pass through an operator, in one of four ways.

    Args:
        op: an operator (``torch.ops.mylib.myop`` or one of its overloads, what
            ``torch.library.custom_op`` returns) or a subclass of ``torch.autograd.Function``.
        linear: the operator is linear in its first argument; ``linear(stack, *others)`` applies it to a
            stack of n tensors, shape (n, *S), at once.
        elementwise: ``elementwise(x, y, *others)`` returns (f', f'') at the input x and result y; None
            stands for a derivative that is zero everywhere.
        composed: the same function, written in torch operators that have rules; it is called with jets.
        constant: the result does not depend differentiably on the inputs.

    Raises:
        ArgumentError: not exactly one way is given, or ``op`` is not an operator. An autograd function
            takes ``composed`` or ``constant``.

    >>> import torch, jetplane as jp
    >>> @torch.library.custom_op("doctest::cube", mutates_args=())
    ... def cube(x: torch.Tensor) -> torch.Tensor:
    ...     return x**3
    >>> jp.register_rule(cube, elementwise=lambda x, y: (3 * x**2, 6 * x))
    >>> jp.hessian(lambda x: cube(x).sum(), torch.tensor([1.0, 2.0]))
    tensor([[ 6.,  0.],
            [ 0., 12.]])

    Check a rule with `jetplane.testing.check_rule`.
    """
    ways = [linear is not None, elementwise is not None, composed is not None, constant]
    if sum(ways) != 1:
        raise ArgumentError("give exactly one of linear=, elementwise=, composed= and constant=True")
    if isinstance(op, type) and issubclass(op, torch.autograd.Function):
        if composed is None and not constant:
            raise ArgumentError("an autograd.Function takes composed= or constant=True")
        register_function(op, composed)
        return
    func = _overload(op)

    def rule(space: Space, *args: Any, **kwargs: Any) -> Any:
        if composed is not None:
            return composed(*args, **kwargs)
        if constant:
            return func(*[primal(a, space) for a in args], **kwargs)
        x, *others = args
        if any(isinstance(a, Jet) and a.space is space for a in others):
            raise missing(func, "its rule covers the first argument alone, and another one carries derivatives")
        if linear is not None:
            act = linear
            return linear_jet(space, x, lambda p: func(p, *others, **kwargs), lambda c: act(c, *others, **kwargs))
        assert elementwise is not None
        p = primal(x, space)
        y = func(p, *others, **kwargs)
        return chain(space, x, y, *elementwise(p, y, *others, **kwargs))

    RULES[func] = rule


def _overload(op: Any) -> Any:
    op = getattr(op, "_opoverload", op)  # torch.library.custom_op
    if isinstance(op, OperatorPacket):
        names = op.overloads()
        if len(names) != 1:
            raise ArgumentError(f"{op} has the overloads {names}; register each of them, as {op}.{names[0]}")
        op = getattr(op, names[0])
    if not isinstance(op, Operator):
        raise ArgumentError(f"expected an operator or an autograd.Function, got {type(op).__name__}")
    return op
