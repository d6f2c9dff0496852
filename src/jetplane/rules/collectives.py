"""Collectives of torch.distributed inside a loss, as tensor parallelism by hand has them.

Functional sums over ranks are linear. The collectives that write in place are refused: their results would arrive
without derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from ..jet import Space, make, parts
from .registry import RULES


def _all_reduce(space: Space, x: Any, reduction: str, group: str) -> Tensor:
    """The sum or mean over ranks, of value and coefficients together in one message.

    Ranks must send alike, so coefficients that are zero by structure, perhaps on this rank alone, are sent as zeros.
    """
    if reduction.lower() not in ("sum", "avg"):
        raise DerivativeError(f"all_reduce of jets by {reduction!r}: only 'sum' and 'avg' are linear")
    value, first, second = parts(x, space)
    counts = [1, space.k, space.pairs if space.order == 2 or space.gauss_newton else 0]
    rows = [
        part if part is not None else value.new_zeros(count, *value.shape)
        for part, count in zip((value.unsqueeze(0), first, second), counts, strict=True)
    ]
    dtype = torch.promote_types(value.dtype, rows[1].dtype)  # half-precision values have coefficients in single
    stacked = torch.cat([row.to(dtype) for row in rows])
    functional = torch.ops._c10d_functional
    total = functional.wait_tensor(functional.all_reduce(stacked, reduction, group))
    value, first, second = total.split(counts)
    return make(value[0].to(rows[0].dtype), first, second if counts[2] else None, space)


def _refuse(name: str) -> Any:
    def rule(space: Space, *args: Any, **kwargs: Any) -> Any:
        raise DerivativeError(
            f"{name} writes in place, and derivatives would stay behind. For a sum over ranks use "
            "torch.distributed._functional_collectives.all_reduce; detach() tensors whose derivatives are not wanted"
        )

    return rule


if torch.distributed.is_available():
    RULES[torch.ops._c10d_functional.all_reduce.default] = _all_reduce
    for _name in ("wait_tensor", "_wrap_tensor_autograd"):  # the sum has been waited for
        if hasattr(torch.ops._c10d_functional, _name):
            RULES[getattr(torch.ops._c10d_functional, _name).default] = lambda space, x: x
    for _name in {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("c10d::")}:
        _packet = getattr(torch.ops.c10d, _name.removeprefix("c10d::"))
        for _overload in _packet.overloads():
            RULES[getattr(_packet, _overload)] = _refuse(_name)
