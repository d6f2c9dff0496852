"""Whether and how far to step along what a descent proposes.

The rate itself is the parameter group's ``lr``, so that torch's schedulers drive it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clipped(steps: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Steps scaled down together so that their joint Euclidean norm is at most ``limit``.

    >>> import torch
    >>> clipped([torch.tensor([3.0, 4.0])], 1.0)
    [tensor([0.6000, 0.8000])]
    """
    total = torch.stack([s.double().norm() for s in steps]).norm().item()
    return list(steps) if total <= limit else [s * (limit / total) for s in steps]
