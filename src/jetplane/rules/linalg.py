"""Inverses and determinants of jets, by products alone.

With A0 the primal and B0 its inverse, ``E = A B0 - I`` is a jet whose primal is zero. Power series in E therefore end
with the term of second order:

    A^-1          = B0 (I - E + E E)
    log |det A|   = log |det A0| + tr E - tr(E E) / 2

The primal may be a jet of an outer evaluation, whose own rule then takes its turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..jets import Space, primal
from .registry import register


def _relative(a: Any, inverse: Tensor) -> Tensor:
    """``A B0 - I``."""
    return a @ inverse - torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


@register("linalg_inv_ex")
def _(space: Space, a: Any, *, check_errors: bool = False) -> Any:
    inverse, info = torch.linalg.inv_ex(primal(a, space), check_errors=check_errors)
    e = _relative(a, inverse)
    return inverse - inverse @ (e - e @ e), info


@register("_linalg_slogdet")
def _(space: Space, a: Any) -> Any:
    p = primal(a, space)
    if p.is_complex():  # the sign moves as well
        return NotImplemented
    factors, pivots, _ = torch.linalg.lu_factor_ex(p.detach())
    sign, logabsdet = torch.linalg.slogdet(p)
    e = _relative(a, torch.linalg.inv_ex(p)[0])
    return sign, logabsdet + _trace(e) - _trace(e @ e) / 2, factors, pivots
