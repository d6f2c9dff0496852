"""Which outputs of a layer have an effect: of a ReLU's inputs those above zero, of a max-pool's the largest.

Three tangents on a layer's outputs, the same for every example,

    one = 1,    place = j,    mark = m_j    at output j, with numbers m that nothing smooth goes through,

come to the next layer's input i as ``sum_j J_ij (1, j, m_j)``. If input i depends on one output alone, ``place / one``
is that output's j, and ``mark = m_j one`` confirms it. Every layer has marks of its own. Where that holds of all
inputs, outputs that none of them names have no effect: their gradient is zero, and noise on them is noise and nothing
else. It holds behind activation functions, pooling by maximum, dropout and whatever moves numbers around; not behind
normalization or averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .jet import carried

PROBES = 3
MOST = 1 << 17  # outputs of an example whose places single precision tells apart
_NEAR = 1e-3  # how well a mark has to be met, relative to the derivative


def probes(y: Tensor, layer: int = 0) -> Tensor:
    """The three tangents of outputs y, (3, *y.shape), with the marks of a layer of this number."""
    place = torch.arange(y[0].numel(), device=y.device)
    rows = torch.stack([torch.ones_like(place), place, _marks(place, layer)]).to(carried(y.dtype))
    rows[2] /= _MODULUS
    return rows.unsqueeze(1).expand(-1, len(y), -1).reshape(PROBES, *y.shape)


def effective(met: Tensor, outputs: int, layer: int = 0) -> Tensor | None:
    """Which of a layer's outputs have an effect, (examples, outputs); None if that cannot be told.

    Args:
        met: the probes as they are at the next layer's input, (3, examples, …).
        outputs: how many numbers the layer puts out for an example.
        layer: the number that its probes were made with.
    """
    one, place, mark = met.flatten(2)
    there = one != 0
    which = torch.where(there, place / one, 0).round().clamp(0, outputs - 1).long()
    expected = _marks(which, layer).to(mark.dtype) / _MODULUS
    fits = (mark - expected * one).abs() <= _NEAR * one.abs()
    if not bool(fits.all()):
        return None
    found = torch.zeros(len(one), outputs + 1, dtype=torch.bool, device=met.device)
    return found.scatter_(1, torch.where(there, which, outputs), True)[:, :outputs]


_MODULUS = 65521


def _marks(place: Tensor, layer: int) -> Tensor:
    """An integer for each place, of the square: marks of a mean of places are not the mean of their marks."""
    return (place * place * 40503 + place * 12345 + layer * 7919 + 1) % _MODULUS
