"""Scaled dot-product attention of jets by blocks of queries and keys: memory linear in the lengths.

With scores s = scale q kᵀ + mask of a query (a jet, as q, k, v and even the mask may be), a shift m of all of its
scores and ``e = exp(s - m)``, the output of a query is

    o = N / Z,    N = sum over keys of e v,    Z = sum over keys of e

The shift cancels in o and in its derivatives. N and Z are sums over keys, so they, and their coefficients, add up over
blocks of keys. With p = exp(s - m), and s_i short for (s - m)_i, the product and the chain rule give for a block

    N_i  = sum p (s_i v + v_i)                                        Z_i  = sum p s_i
    N_ij = sum p ((s_ij + s_i s_j) v + s_i v_j + s_j v_i + v_ij)      Z_ij = sum p (s_ij + s_i s_j)

m is the largest score so far, as a jet: the term of the key that decides is then exactly one and has no coefficients,
and nothing large cancels. Where a block brings a larger one, m', what was summed so far is multiplied by the jet
exp(m - m'): the running softmax of Milakov and Gimelshein, arXiv 1805.02867, and of Rabe and Staats, arXiv 2112.05682,
for jets. At the end

    o_i  = (N_i - o Z_i) / Z
    o_ij = (N_ij - o Z_ij - o_i Z_j - o_j Z_i) / Z

All of it is carried by the rules of products, `exp` and division on blocks, in every structure of pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..jets import Space, carried, primal
from .registry import register

QUERIES, KEYS = 256, 512  # of a block
WHOLE = 1 << 18  # scores of all heads up to which one block has all of them


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
    rows, columns = query.shape[-2], key.shape[-2]
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2] if not enable_gqa else ())
    if not columns:
        return query.new_zeros(*batch, rows, value.shape[-1])
    small = batch.numel() * rows * columns <= WHOLE
    kept = _kept((*batch, rows, columns), primal(query, space), dropout_p)
    dtype = carried(query.dtype)
    outputs = []
    for q in _blocks(rows, rows if small else QUERIES):
        part = torch.mul(query[..., q, :].to(dtype), 1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        running = None
        for k in _blocks(columns, columns if small else KEYS):
            if is_causal and k.start >= q.stop:  # none of these queries sees one of these keys
                break
            keys, values = (_heads(x[..., k, :].to(dtype), query, enable_gqa) for x in (key, value))
            scores = torch.matmul(part, keys.transpose(-2, -1))
            if is_causal and k.stop > q.start + 1:
                seen = torch.ones(q.stop - q.start, k.stop - k.start, dtype=torch.bool, device=query.device)
                scores = scores.masked_fill(~seen.tril(q.start - k.start), -math.inf)
            if attn_mask is not None:
                mask = _cut(attn_mask, q, k)
                blind = mask.dtype == torch.bool
                scores = scores.masked_fill(~mask, -math.inf) if blind else torch.add(scores, mask.to(dtype))
            running = _added(space, running, scores, values, None if kept is None else kept[..., q, k])
        assert running is not None
        numerator, denominator, _ = running
        total = primal(denominator, space)
        # A query that may see nothing gives zero.
        denominator = torch.where(torch.eq(total, 0), 1, denominator)
        outputs.append(torch.div(numerator, denominator).to(query.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, max(size, 1))] or [slice(0, 0)]


def _heads(x: Any, query: Any, grouped: bool) -> Any:
    """Keys or values of all the queries' heads: with grouped queries several have the same ones."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) if grouped else x


def _cut(mask: Any, q: slice, k: slice) -> Any:
    """The part of a mask, which may have an axis of size one for all queries or keys."""
    mask = mask if mask.dim() > 1 else mask.unsqueeze(0)
    mask = mask[..., k] if mask.shape[-1] > 1 else mask
    return mask[..., q, :] if mask.shape[-2] > 1 else mask


def _kept(shape: tuple[int, ...], like: Tensor, dropout: float) -> Tensor | None:
    """Dropout's factors for all weights, drawn as the plain run draws them: one tensor, whatever is carried."""
    return torch.nn.functional.dropout(like.new_ones(shape), dropout) if dropout else None


def _added(space: Space, running: Any, scores: Any, values: Any, kept: Tensor | None) -> tuple[Any, Any, Any]:
    """Numerator, denominator and largest score after another block of keys."""
    largest, place = primal(scores, space).max(-1, keepdim=True)
    highest = scores.gather(-1, place)
    if running is not None:
        highest = torch.where(primal(running[2], space) >= largest, running[2], highest)
    # A query that has seen nothing yet has no score to shift by.
    shift = torch.where(primal(highest, space).isneginf(), 0, highest)
    weights = torch.exp(torch.sub(scores, shift))
    denominator = weights.sum(-1, keepdim=True)
    numerator = torch.matmul(weights if kept is None else torch.mul(weights, kept.to(weights.dtype)), values)
    if running is not None:
        before = torch.exp(torch.sub(running[2], shift))
        numerator = torch.add(torch.mul(running[0], before), numerator)
        denominator = torch.add(torch.mul(running[1], before), denominator)
    return numerator, denominator, highest
