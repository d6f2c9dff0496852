"""Scaled dot-product attention of jets by blocks of queries and keys: memory linear in the lengths.

With scores s = scale q kᵀ + mask (a jet, as q, k, v and even the mask may be), the weights of a block of keys, their
logarithmic sum l and the block's output are

    l = log sum exp(s),    p = exp(s - l),    o = sum p v,    all sums over the keys of the block

With s_i and s_ij for the coefficients of s, and c_i = s_i - l_i, they have the coefficients

    l_i  = sum p s_i                     p_i  = p c_i
    l_ij = sum p (s_ij + c_i c_j)        p_ij = p (s_ij + c_i c_j - l_ij)

and those of o follow by the product rule. The output for all keys is attention over blocks:

    o = sum over blocks b of softmax(l)_b o_b

This is the softmax by blocks of Milakov and Gimelshein, arXiv 1805.02867, and of Rabe and Staats, arXiv 2112.05682, for
jets, in any structure of pairs. Derivation: docs/attention.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..jets import Coefficients, Space, carried, make, outer, overwritten, parts, primal, writable
from .forms import BATCHED
from .products import bilinear
from .registry import register

QUERIES, KEYS = 512, 1024  # of a block
SCORES = QUERIES * KEYS  # of a block, of several heads where lengths are small

Box = Sequence[slice]  # a part of each axis of the batch, the last of which are heads


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
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    own = 3 if enable_gqa else 2  # axes that are not broadcast
    lead = torch.broadcast_shapes(*(x.shape[:-own] for x in (query, key, value)))
    batch = (*lead, *query.shape[-own:-2])
    if not columns:
        return query.new_zeros(*batch, rows, value.shape[-1])
    kind, dtype = query.dtype, carried(query.dtype)
    kept = _kept((*batch, rows, columns), primal(query, space), dropout_p)
    query, key, value = (_spread(x, dtype, (*lead, *x.shape[-own:])) for x in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if attn_mask is not None:
        attn_mask = _spread(attn_mask, dtype, (*batch, rows, columns))
    boxes, over_keys = _blocks_of(batch, rows, columns, QUERIES if is_causal else KEYS)
    outputs = []
    for *box, q in itertools.product(*boxes):
        part, blocks = torch.mul(_rows(space, query, box, q), scale), []
        for k in over_keys:
            if is_causal and k.start >= q.stop:  # none of these queries sees one of these keys
                break
            scores = _scores(space, part, _rows(space, key, box, k, groups))
            if is_causal and k.stop > q.start + 1:
                seen = torch.ones(q.stop - q.start, k.stop - k.start, dtype=torch.bool, device=query.device)
                scores = scores.masked(seen.tril(q.start - k.start))
            if attn_mask is not None:
                mask = attn_mask[*box, q, k]
                scores = scores.masked(mask) if mask.dtype == torch.bool else scores.plus(mask)
            factors = None if kept is None else kept[*box, q, k]
            blocks.append(scores.attended(_rows(space, value, box, k, groups), factors))
        outputs.append(_joined(blocks).to(kind))
    return _assembled(outputs, [len(along) for along in boxes])


def _spread(x: Any, dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """Queries, keys, values or a mask in the dtype of coefficients, with all axes."""
    x = x if x.dtype in (dtype, torch.bool) else x.to(dtype)
    return x if x.shape == shape else x.expand(shape)


def _blocks_of(batch: Sequence[int], rows: int, columns: int, keys: int) -> tuple[list[list[slice]], list[slice]]:
    """Blocks along each axis of the batch and along queries, and blocks of keys."""
    q = min(max(rows, 1), QUERIES)
    k = min(columns, keys if rows > QUERIES else max(keys, SCORES // q))
    most, boxes = max(SCORES // (q * k), 1), [_blocks(rows, q)]
    for n in reversed(batch):
        step = max(min(n, most), 1)
        most //= step
        boxes.insert(0, _blocks(n, step))
    return boxes, _blocks(columns, k)


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)] or [slice(0, 0)]


def _rows(space: Space, x: Any, box: Box, rows: slice, groups: int = 1) -> Any:
    """Some rows of queries, keys or values of some heads: with grouped queries several heads have the same keys."""
    p, x1, x2 = parts(x, space)
    if groups > 1:
        heads = torch.arange(box[-1].start, box[-1].stop, device=p.device) // groups
        box = [*box[:-1], slice(box[-1].start // groups, (box[-1].stop - 1) // groups + 1)]

    def cut(t: Tensor) -> Tensor:
        t = t[..., *box, rows, :]
        return t.index_select(-3, heads - box[-1].start) if groups > 1 else t

    return make(cut(p), x1.map(cut), x2.map(cut), space)


def _joined(blocks: Sequence[Block]) -> Any:
    """The output for the keys of all blocks."""
    if len(blocks) == 1:
        return blocks[0].output
    shares = torch.softmax(torch.stack([block.logsum for block in blocks]), 0)
    return torch.mul(shares, torch.stack([block.output for block in blocks])).sum(0)


def _assembled(outputs: list[Any], counts: Sequence[int]) -> Any:
    """The outputs of all boxes as one, by their numbers along each axis up to that of queries."""
    for dim, n in enumerate(reversed(counts), 2):
        if n > 1:
            outputs = [torch.cat(outputs[i : i + n], -dim) for i in range(0, len(outputs), n)]
    return outputs[0]


def _kept(shape: tuple[int, ...], like: Tensor, dropout: float) -> Tensor | None:
    """Dropout's factors for all weights, drawn as the plain run draws them: one tensor, whatever is carried."""
    return torch.nn.functional.dropout(like.new_ones(shape), dropout) if dropout else None


class Block(NamedTuple):
    """What queries get of some keys.

    Attributes:
        output: o, (..., queries, values), a jet or a tensor.
        logsum: l, (..., queries, 1); the least number of its dtype for a query that sees none of them.
    """

    output: Any
    logsum: Any


class Scores(NamedTuple):
    """Scores of a block, (..., queries, keys), in memory that may be overwritten.

    Attributes:
        space: of the evaluation.
        value: s.
        first: s_i.
        second: s_ij.
        partial: whether some may be minus infinity: not seen.
    """

    space: Space
    value: Tensor
    first: Coefficients
    second: Coefficients
    partial: bool = False

    def masked(self, seen: Tensor) -> Scores:
        """Without what may not be seen. Its weights are zero, so that its coefficients need not be."""
        return self._replace(value=overwritten(self.value, "masked_fill", ~seen, -math.inf), partial=True)

    def plus(self, mask: Any) -> Scores:
        """The sum with a mask, which may be a jet."""
        m, m1, m2 = parts(mask, self.space)
        shape = self.value.shape
        first, second = (of.add(c.expanded(shape)) for of, c in ((self.first, m1), (self.second, m2)))
        return Scores(self.space, overwritten(self.value, "add", m), first, second, True)

    def attended(self, values: Any, kept: Tensor | None) -> Block:
        """The block's output and logarithmic sum; ``kept`` are factors of the weights."""
        space, s1, s2 = self.space, self.first, self.second
        p, logsum = _softmax(self.value, self.partial)
        if space.order == 1 and not s2:  # the same in two passes
            s1 *= p
            l1, l2 = s1.map(_sums), s2
            p1, p2 = s1.add_product(p, l1, -1), s2
        else:
            l1 = (s1 * p).map(_sums)
            p1 = s1.add(l1, -1)
            p2 = s2.add(outer(p1, p1)).formed()
            p1 *= p
            p2 *= p
            l2 = p2.map(_sums)
            p2 = p2.add_product(p, l2, -1)
        if kept is not None:
            kept = kept.to(p.dtype)
            p, p1, p2 = p * kept, p1 * kept, p2 * kept
        return Block(bilinear(space, BATCHED, make(p, p1, p2, space), values), make(logsum, l1, l2, space))


def _scores(space: Space, queries: Any, keys: Any) -> Scores:
    """``q kᵀ``."""
    p, k1, k2 = parts(keys, space)
    keys = make(p.mT, k1.map(lambda c: c.mT), k2.map(lambda c: c.mT), space)
    s, s1, s2 = parts(bilinear(space, BATCHED, queries, keys), space)
    return Scores(space, s, s1.own(), s2.own())  # of which nobody else knows


def _softmax(s: Tensor, partial: bool) -> tuple[Tensor, Tensor]:
    """``exp(s - l)`` and l; a query that sees nothing has no weights."""
    if writable(s):
        p = torch.softmax(s, -1)
        logsum = s.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    else:
        logsum = torch.logsumexp(s, -1, keepdim=True)
        p = torch.exp(s - logsum)
    if partial:
        blind = s.amax(-1, keepdim=True) == -math.inf
        p = overwritten(p, "masked_fill", blind, 0)
        logsum = logsum.masked_fill(blind, torch.finfo(logsum.dtype).min)
    return p, logsum


def _sums(c: Tensor) -> Tensor:
    """Sums over keys."""
    return c.sum(-1, keepdim=True)
