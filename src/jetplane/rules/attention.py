"""Scaled dot-product attention, composed of products and a softmax: no fused kernel is needed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from ..jets import Space, primal
from .registry import register


@register("scaled_dot_product_attention")
def _(
    space: Space,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(torch.mul(query, scale), key.transpose(-2, -1))
    if is_causal:
        rows, columns = scores.shape[-2:]
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = torch.add(scores, attn_mask)
    weights = torch.softmax(scores, -1)
    blind = primal(scores, space).eq(-math.inf).all(-1, keepdim=True)  # a row that may see nothing gives zero
    if bool(blind.any()):
        weights = weights.masked_fill(blind, 0)
    return torch.matmul(F.dropout(weights, dropout_p) if dropout_p else weights, value)
