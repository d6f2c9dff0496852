"""What a closure stops derivatives at by its own will, noted in one run and held at the same values in others.

These are `detach()`, `item()`, `.data`, what runs under `torch.no_grad()`, and rows of padding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import TorchDispatchMode, disable_current_modes, memory_of
from ..jets import detaching, who_detaches
from ..rules import rounding, scripts
from ..rules.functions import intercept_functions
from .constructors import CONVERTING, COPYING

_aten = torch.ops.aten
_STOPPING = {torch.Tensor.data.__get__, torch.Tensor.tolist, *COPYING}  # type: ignore[attr-defined]
_DETACHING = {torch.detach, torch.Tensor.detach}
_STOPPING_OPERATORS = {op.default for op in (_aten.detach, _aten._local_scalar_dense, _aten.item, _aten.is_nonzero)}
# Functions whose derivative is by convention, or on average, another one than that of their value.
_CONVENTIONS = {
    getattr(torch, name)
    for name in (
        "_standard_gamma",
        "_sample_dirichlet",
        "poisson",
    )
}


@dataclass
class Stops:
    """What stopped derivatives in one run, in order; held at the same values in others.

    Attributes:
        parameters: their memory.
        no_grad: whether what runs under `torch.no_grad()` is among it.
        values: in order.
        holding: whether values are repeated, not noted.
        under_no_grad: whether something was computed under `torch.no_grad()`.
        to_integers: whether integers were made of numbers, as by comparisons and ``argmax``: they have no derivative.
        custom: whether a custom autograd function was called, whose forward torch runs under `torch.no_grad()`.
        in_doubt: why the derivative of the closure need not be that of its loss, or nothing.
        eps: the coarsest rounding that was seen.
    """

    parameters: frozenset[int] = frozenset()
    no_grad: bool = True
    values: list[Any] = field(default_factory=list)
    holding: bool = False
    under_no_grad: bool = False
    to_integers: bool = False
    custom: bool = False
    in_doubt: str = ""
    eps: float = 0.0

    def held(self) -> Stops:
        """For a run that repeats the values of this one."""
        return Stops(self.parameters, self.no_grad, self.values, True, eps=self.eps)

    def rounds(self, dtype: torch.dtype) -> None:
        """Something was computed in this dtype."""
        if dtype.is_floating_point:
            self.eps = max(self.eps, torch.finfo(dtype).eps)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record, or repeat, what stops derivatives inside."""
        with intercept_functions(self._custom), _Holding(self), _HoldingOperators(self):
            yield

    def _custom(self, x: Any) -> Any:
        self.custom = True
        self.in_doubt = "a custom autograd function defines a derivative of its own"
        return x

    def take(self, made: Any) -> Any:
        """A value that stops derivatives: noted, or replaced by the one noted before."""
        if not self.holding:
            self.values.append(_kept(made))
            return made
        known = self.values[self._next] if self._next < len(self.values) else made
        self._next += 1
        if not isinstance(made, Tensor):
            return known if type(known) is type(made) else made
        with disable_current_modes():  # what is the same stays itself: the closure may write into its memory
            if not isinstance(known, Tensor) or known.shape != made.shape or torch.equal(known, made):
                return made
        return _kept(known)

    _next: int = 0


class _HoldingOperators(TorchDispatchMode):
    """Holds what stops derivatives, and sees in which precision the closure computes, whoever calls the operators."""

    def __init__(self, stops: Stops) -> None:
        super().__init__()
        self._stops = stops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stops = self._stops
        changed = args[0] if args and stops.no_grad and _writes(func) and not torch.is_grad_enabled() else None
        before = _kept(changed)
        made = func(*args, **(kwargs or {}))
        if made is changed and type(made) is Tensor and made.is_floating_point():
            return self._written(func, made, before)
        if func in _STOPPING_OPERATORS:
            goes_on = func is _aten.detach.default and (
                who_detaches() == "autograd" or (who_detaches() == "nobody" and scripts.detaches_by_itself())
            )
            return made if goes_on else stops.take(made)
        moves = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
        if type(made) is Tensor:
            return self._made(func, made, moves)
        if type(made) in (list, tuple):
            return type(made)(self._made(func, x, moves) if type(x) is Tensor else x for x in made)
        return made

    def _written(self, func: Any, made: Tensor, before: Tensor) -> Tensor:
        """What was written to where derivatives stop: it keeps those that it had before."""
        stops = self._stops
        stops.under_no_grad = True
        at_first = stops.take(before)
        moves = at_first is not before and func._schema.name not in _OVERWRITING
        known = stops.take(made)
        if known is not made:
            with disable_current_modes():
                made.copy_(before + (known - at_first) if moves else known)
        return made

    def _made(self, func: Any, made: Tensor, moves: bool) -> Tensor:
        stops = self._stops
        if not made.is_floating_point():
            stops.to_integers = stops.to_integers or (moves and not made.is_complex())
            return made
        stops.rounds(made.dtype)
        if not stops.no_grad or torch.is_grad_enabled():
            return made
        stops.under_no_grad = True
        if any(r.alias_info is not None for r in func._schema.returns):
            if memory(made) in stops.parameters:
                stops.in_doubt = "a view of a parameter is made under torch.no_grad()"
            return made  # memory that may be written to; what it looks into is held, if it was made here
        return stops.take(made)


class _Holding(TorchFunctionMode):
    def __init__(self, stops: Stops) -> None:
        super().__init__()
        self._stops = stops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, stops = kwargs or {}, self._stops
        if func in _DETACHING:
            with detaching():
                return func(*args, **kwargs)
        made = func(*args, **kwargs)
        if func in _CONVENTIONS:
            stops.in_doubt = f"{func.__name__} has a derivative by convention"
        if rounding.chosen() is not None:
            stops.in_doubt = "what is quantized has the derivative that jetplane.quantization names"
        if func in _STOPPING:
            return stops.take(made)
        if func in CONVERTING and not (args and isinstance(args[0], Tensor)):
            return stops.take(made)
        return self._padded(made, args, kwargs) if func is F.embedding else made

    def _padded(self, made: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Rows of padding, which by convention are not moved."""
        padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
        if padding is None:
            return made
        rows, weight = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
        known = self._stops.take(made)
        return torch.where((rows == padding % len(weight)).unsqueeze(-1), known, made)


@functools.cache
def _writes(func: Any) -> bool:
    """Whether an operator writes to its first argument."""
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


_OVERWRITING = {f"aten::{name}" for name in "copy_ zero_ fill_ normal_ uniform_ bernoulli_ random_ set_".split()}


def _kept(x: Any) -> Any:
    """A value that nobody else writes to."""
    if not isinstance(x, Tensor):
        return x
    with disable_current_modes():
        return x.detach().clone()


def memory(p: Tensor) -> int:
    """What two tensors share that look into one memory."""
    return memory_of(p) if p.layout is torch.strided else id(p)
