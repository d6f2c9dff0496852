"""Internal: random signs for each example of a batch, as a function of seed, example and sample alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..directions.laws import LAWS, pieces, twists
from ..jets import carried

_LANES = 1 << 12  # lanes of the law that are drawn together: all their numbers fit in a cache


def signs(stream: Any, samples: range, shape: Sequence[int], like: Tensor, offset: float = 0.0) -> Tensor:
    """Independent signs, -1 or 1 with equal probability: a Rademacher law.

    Args:
        stream: key of the random numbers, as `jetplane.directions.laws.key` makes it.
        samples: which samples to draw.
        shape: of one sample; its first axis counts examples.
        like: a tensor of the device and dtype that the signs go with.
        offset: examples of the whole batch before these, in multiples of ``shape[0]``. An example's signs depend on its
            place in the whole batch, and so not on how the batch is cut into shards.

    Returns:
        A tensor of shape (samples, *shape), float32 or the wider dtype of ``like``.
    """
    rows, size = shape[0], math.prod(shape[1:])
    out = torch.empty(len(samples) * rows, size, dtype=carried(like.dtype), device=like.device)
    first = round(offset * rows)
    streams = twists(stream, samples, like.device).unsqueeze(1)
    streams = twists(streams, range(first, first + rows), like.device).flatten()
    law = LAWS["rademacher"]
    block = max(1, _LANES // max(-(-size // law.rows), 1))
    for some, written in zip(streams.split(block), out.split(block), strict=True):
        for which, place, values in pieces(law, stream, some, size):
            written[which, place] = values
    return out.reshape(len(samples), *shape)
