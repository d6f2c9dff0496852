"""Collectives of torch.distributed inside a loss: those of tensor parallelism, by `DTensor` or by hand.

Functional sums over ranks, and collectives that move parts of tensors between ranks, are linear; maxima take what the
rank has that won. The collectives that write in place are refused: their results would arrive without derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from ..jets.jet import Space, make, parts, scale
from .registry import RULES

_functional = torch.ops._c10d_functional


def _linear(op: Any, space: Space, x: Any, *args: Any) -> Tensor:
    """Value and coefficients together in one message.

    They lie along the second axis, as collectives cut and join along the first one. Ranks must send alike, so
    coefficients that are zero by structure, perhaps on this rank alone, are sent as zeros.
    """
    value, first, second = parts(x, space)
    counts = [1, space.k, space.pairs if space.order == 2 or space.gauss_newton else 0]
    rows = [
        part if part is not None else value.new_zeros(count, *value.shape)
        for part, count in zip((value.unsqueeze(0), first, second), counts, strict=True)
    ]
    dtype = torch.promote_types(value.dtype, rows[1].dtype)  # half-precision values have coefficients in single
    axis = min(value.dim(), 1)
    stacked = torch.cat([row.to(dtype) for row in rows]).movedim(0, axis).contiguous()
    result = _functional.wait_tensor(op(stacked, *args))
    value, first, second = result.movedim(axis, 0).split(counts)
    return make(value[0].to(rows[0].dtype), first, second if counts[2] else None, space)


def _extremum(space: Space, x: Any, reduction: str, group: Any) -> Tensor:
    """The largest or smallest value over ranks, and the coefficients of the rank that has it, or the mean of ties."""
    value, first, second = parts(x, space)
    best = _functional.wait_tensor(_functional.all_reduce(value, reduction, group))
    mine = (value == best).to(value.dtype)
    share = mine / _functional.wait_tensor(_functional.all_reduce(mine, "sum", group))
    mine = make(value, scale(share, first), scale(share, second), space)
    _, first, second = parts(_linear(_functional.all_reduce.default, space, mine, "sum", group), space)
    return make(best, first, second, space)


def _enter(name: str) -> None:
    """A rule for a collective, and for the one of several tensors, where torch has them."""
    op = getattr(_functional, name).default
    words = {"all_reduce": ("sum", "avg", "max", "min"), "reduce_scatter_tensor": ("sum", "avg")}.get(name)

    def rule(space: Space, x: Any, *args: Any) -> Tensor:
        word = args[0].lower() if words else ""
        if words and word not in words:
            raise DerivativeError(f"{name} of jets by {word!r}: known are {', '.join(words)}")
        return _extremum(space, x, *args) if word in ("max", "min") else _linear(op, space, x, *args)

    RULES[op] = rule
    if hasattr(_functional, f"{name}_coalesced"):
        several = getattr(_functional, f"{name}_coalesced").default
        RULES[several] = lambda space, xs, *args: [rule(space, x, *args) for x in xs]


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
            RULES[getattr(_functional, _name).default] = lambda space, x: x
    for _name in {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("c10d::")}:
        _packet = getattr(torch.ops.c10d, _name.removeprefix("c10d::"))
        for _overload in _packet.overloads():
            RULES[getattr(_packet, _overload)] = _refuse(_name)
