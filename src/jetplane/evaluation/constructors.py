"""Functions that make constants of the numbers of tensors: derivatives stop there, as they do for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import tree_map
from ..jets import innermost

COPYING = {torch.tensor, torch.scalar_tensor, torch.Tensor.new_tensor}
CONVERTING = {torch.as_tensor, torch.asarray}  # of what is no tensor, such as a list of them
ALL = COPYING | CONVERTING


def of_numbers(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of one of these functions, with values in the place of jets that it makes constants of."""

    def number(x: Any) -> Any:
        return x if func in CONVERTING and isinstance(x, Tensor) else tree_map(innermost, x)

    return tuple(map(number, args)), {name: number(x) for name, x in kwargs.items()}
