"""Products of many numbers, as trees of products of two: exact where numbers are zero, where quotients are not."""

from __future__ import annotations

from typing import Any

import torch

from ..jets import Space, primal
from .registry import register


def _converted(x: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None and not (x.dtype.is_floating_point or x.dtype.is_complex):
        dtype = torch.int64
    return x if dtype is None or dtype == x.dtype else x.to(dtype)


@register("prod")
def _(space: Space, x: Any, *, dtype: torch.dtype | None = None) -> Any:
    return torch.prod(x.flatten(), 0, dtype=dtype)


@register("prod.dim_int")
def _(space: Space, x: Any, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    x = _converted(x, dtype)
    if not x.dim():
        return x.clone()
    if not x.shape[dim]:
        return torch.prod(primal(x, space), dim, keepdim)
    while (n := x.shape[dim]) > 1:
        half = n // 2
        pairs = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = pairs if n % 2 == 0 else torch.cat([pairs, x.narrow(dim, n - 1, 1)], dim)
    return x.clone() if keepdim else x.squeeze(dim).clone()


@register("cumprod")
def _(space: Space, x: Any, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """By doubling: after m steps each is the product of 2^m numbers up to it (Hillis and Steele, 1986)."""
    x = _converted(x, dtype)
    reach, n = 1, x.shape[dim] if x.dim() else 1
    while reach < n:
        products = x.narrow(dim, reach, n - reach) * x.narrow(dim, 0, n - reach)
        x = torch.cat([x.narrow(dim, 0, reach), products], dim)
        reach *= 2
    return x.clone() if n <= 1 else x
