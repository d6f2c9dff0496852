"""Rules of a user's own: for operators that torch does not know, and for custom autograd functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from ..errors import ArgumentError, DerivativeError
from ..jets import Jet, Space, chain, primal
from ..jets import linear as linear_jet
from .fallback import missing
from .grad_mode import innermost
from .registry import RULES

_functions: dict[type, Callable[..., Any]] = {}


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
            is a derivative that is zero everywhere.
        composed: the same function written in torch operators that have rules; called with jets.
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
        _functions[op] = _constant_function(op) if composed is None else composed
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
    if isinstance(op, torch._ops.OpOverloadPacket):
        names = op.overloads()
        if len(names) != 1:
            raise ArgumentError(f"{op} has the overloads {names}; register each of them, as {op}.{names[0]}")
        op = getattr(op, names[0])
    if not isinstance(op, torch._ops.OpOverload):
        raise ArgumentError(f"expected an operator or an autograd.Function, got {type(op).__name__}")
    return op


def _constant_function(function: type) -> Callable[..., Any]:
    def composed(*args: Any) -> Any:
        return _original_apply(function, *[innermost(a) for a in args])

    return composed


def differentiate_forward(function: type) -> None:
    """Say of an autograd function that its forward pass, run on jets, has the derivatives that it defines."""

    def forward(*args: Any) -> Any:
        context = FunctionCtx()
        context.needs_input_grad = (False,) * len(args)  # type: ignore[attr-defined]
        return function.forward(context, *args)  # type: ignore[attr-defined]  # apply() would switch grad mode off

    _functions[function] = forward


def _carries(x: Any) -> bool:
    """Whether x is a jet, or the wrapper of one that `jetplane.evaluation.sharded` makes."""
    return isinstance(x, Jet) or isinstance(getattr(x, "_local_tensor", None), Jet)


_original_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


@contextlib.contextmanager
def intercept_functions(seeded: Callable[[Any], Any], active: Callable[[], bool]) -> Iterator[None]:
    """While a closure runs: custom autograd functions on jets go to their rule, or raise.

    Their forward would run on the jets as they are, and a derivative that ``backward`` defines would be
    replaced in silence by that of ``forward``.
    """
    before: Any = vars(torch.autograd.Function)["apply"]  # unbound: subclasses inherit it

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not active():  # another thread
            return before.__func__(cls, *args, **kwargs)
        args = tuple(seeded(a) for a in args)
        if not torch.is_grad_enabled():
            args = tuple(innermost(a) for a in args)
        if not any(map(_carries, args)):
            return before.__func__(cls, *args, **kwargs)
        rule = _functions.get(cls)
        if rule is None:
            raise DerivativeError(
                f"the custom autograd function {cls.__qualname__} defines its own derivatives, which forward "
                "jets cannot see. Register the same function in torch operators: "
                f"jetplane.register_rule({cls.__qualname__}, composed=...)"
            )
        return rule(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = before  # type: ignore[method-assign]
