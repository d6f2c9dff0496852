"""Collectives of torch.distributed inside a loss: those of tensor parallelism, by `DTensor` or by hand.

Functional sums over ranks, and collectives that move parts of tensors between ranks, are linear; maxima take what the
rank has that won. The collectives that write in place are refused: their results would arrive without derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import operator_names
from ..errors import DerivativeError
from ..jets import Coefficients, Space, carried, make, parts
from .registry import enter

_functional = torch.ops._c10d_functional


def _linear(op: Any, space: Space, x: Any, *args: Any) -> Tensor:
    """Value and coefficients together in one message.

    They lie along the second axis, as collectives cut and join along the first one. Ranks must send alike, so
    coefficients that are zero by structure, perhaps on this rank alone, are sent as zeros.
    """
    value, x1, x2 = parts(x, space)
    dtype, shape = carried(value.dtype), value.shape
    orders = [x1, x2] if space.order == 2 or space.gauss_newton else [x1]
    rows = [value.unsqueeze(0).to(dtype), *(c.full(shape, dtype, value.device) for c in orders)]
    axis = min(value.dim(), 1)
    stacked = torch.cat(rows).movedim(0, axis).contiguous()
    result = _functional.wait_tensor(op(stacked, *args))
    found, *coefficients = result.movedim(axis, 0).split([len(row) for row in rows])
    y1, y2 = (Coefficients(space, c.order, held) for c, held in zip((x1, x2), (*coefficients, None), strict=False))
    return make(found[0].to(value.dtype), y1, y2, space)


def _extremum(space: Space, x: Any, reduction: str, group: Any) -> Tensor:
    """The largest or smallest value over ranks, and the coefficients of the rank that has it, or the mean of ties."""
    value, x1, x2 = parts(x, space)
    best = _functional.wait_tensor(_functional.all_reduce(value, reduction, group))
    mine = (value == best).to(value.dtype)
    share = mine / _functional.wait_tensor(_functional.all_reduce(mine, "sum", group))
    mine = make(value, x1 * share, x2 * share, space)
    return make(best, *parts(_linear(_functional.all_reduce.default, space, mine, "sum", group), space)[1:], space)


def _enter(name: str) -> None:
    """A rule for a collective, and for the one of several tensors, where torch has them."""
    op = getattr(_functional, name).default
    words = {"all_reduce": ("sum", "avg", "max", "min"), "reduce_scatter_tensor": ("sum", "avg")}.get(name)

    def rule(space: Space, x: Any, *args: Any) -> Tensor:
        word = args[0].lower() if words else ""
        if words and word not in words:
            raise DerivativeError(f"{name} of jets by {word!r}: known are {', '.join(words)}")
        return _extremum(space, x, *args) if word in ("max", "min") else _linear(op, space, x, *args)

    enter(op, rule)
    if hasattr(_functional, f"{name}_coalesced"):
        several = getattr(_functional, f"{name}_coalesced").default
        enter(several, lambda space, xs, *args: [rule(space, x, *args) for x in xs])


def _refuse(name: str) -> Any:
    def rule(space: Space, *args: Any, **kwargs: Any) -> Any:
        raise DerivativeError(
            f"{name} writes in place, and derivatives would stay behind. For a sum over ranks use "
            "torch.distributed._functional_collectives.all_reduce; detach() tensors whose derivatives are not wanted"
        )

    return rule


if torch.distributed.is_available():
    for _name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"):
        _enter(_name)
    for _name in ("wait_tensor", "_wrap_tensor_autograd"):  # the result has been waited for
        if hasattr(_functional, _name):
            enter(getattr(_functional, _name).default, lambda space, x: x)
    for _name in operator_names("c10d"):
        _packet = getattr(torch.ops.c10d, _name)
        for _overload in _packet.overloads():
            enter(getattr(_packet, _overload), _refuse(f"c10d::{_name}"))
