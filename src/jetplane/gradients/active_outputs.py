"""Which outputs of a layer have an effect: of a ReLU's inputs those above zero, of a max-pool's the largest.

Three tangents on a layer's outputs,

    one = 1,    place = j,    mark = m_nj    at output j of example n, with numbers m that nothing smooth goes through,

come to the next layer's input i as ``sum_j J_ij (1, j, m_nj)``. If input i depends on one output alone, ``place / one``
is that output's j, and ``mark = m_nj one`` confirms it. Every layer has marks of its own, and every example, since
normalization over a batch takes away whatever is the same in all of it. Where that holds of all inputs, outputs that
none of them names have no effect: their gradient is zero, and noise on them is noise and nothing else. It holds behind
activation functions, pooling by maximum, dropout and whatever moves numbers around; not behind normalization or
averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..jets import carried

PROBES = 3
MOST = 1 << 17  # outputs of an example whose places single precision tells apart
_NEAR = 1e-3  # how well a mark has to be met, relative to the derivative


def probes(y: Tensor, layer: int = 0) -> Tensor:
    """The three tangents of outputs y, (3, *y.shape), with the marks of a layer of this number."""
    place = torch.arange(y[0].numel(), device=y.device).expand(len(y), -1)
    rows = torch.stack([torch.ones_like(place), place, _marks(place, layer)]).to(carried(y.dtype))
    rows[2] /= _MODULUS
    return rows.reshape(PROBES, *y.shape)


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
    """An integer for each place of each example, of squares: marks of a mean are not the mean of the marks."""
    example = torch.arange(len(place), device=place.device).unsqueeze(1)
    return (place * place * 40503 + place * 12345 + example * example * 30011 + layer * 7919 + 1) % _MODULUS
