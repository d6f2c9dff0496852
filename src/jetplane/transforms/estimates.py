"""Directions of unbiased estimates of traces: random signs, and random coordinates.

    "hutchinson"   tr A = E[v^T A v]               for v of independent random signs
    "axes"         tr A = E[D / S sum_s A_ss]      for S of the D coordinates, drawn without replacement

Signs are drawn for each point, so that errors at different points are independent. Coordinates are shared by all
points: a first linear layer then works with S columns of its weight, however large D is.

Source: Hutchinson, Commun. Stat. Simul. 18 (1989); Hu et al., arXiv 2412.00088 (stochastic Taylor derivatives).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ArgumentError
from .arguments import Call, Directions

Estimate = Literal["hutchinson", "axes"] | None


@dataclass(frozen=True)
class Sample:
    """Random directions of an estimate.

    Attributes:
        call: what is differentiated.
        count: S, how many directions.
        scale: of the sum over them.
        numbers: the coordinates that were drawn; None for random signs.
        generator: of random signs.
    """

    call: Call
    count: int
    scale: float
    numbers: torch.Tensor | None
    generator: torch.Generator | None

    def directions(self, run: slice) -> Directions:
        """A run of them."""
        if self.numbers is not None:
            return self.call.axes(which=self.numbers[run].tolist())
        k = run.stop - run.start
        return [
            torch.randint(2, (k, *x.shape), generator=self.generator, device=x.device).mul_(2).sub_(1).to(x.dtype)
            for x in self.call.leaves
        ]


def sampled(call: Call, estimate: Estimate, samples: int | None, generator: torch.Generator | None) -> Sample | None:
    """The directions of an estimate; None where none is wanted.

    Raises:
        ArgumentError: an unknown word, no number of samples, more axes than there are.
    """
    if estimate is None:
        if samples is not None or generator is not None:
            raise ArgumentError("samples and generator belong to estimate='hutchinson' or estimate='axes'")
        return None
    if estimate not in ("hutchinson", "axes"):
        raise ArgumentError(f"estimate must be None, 'hutchinson' or 'axes', got {estimate!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"samples must be an integer of at least 1 with estimate={estimate!r}, got {samples!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if estimate == "hutchinson":
        return Sample(call, samples, 1 / samples, None, generator)
    if samples > call.size:
        raise ArgumentError(f"samples: expected at most {call.size}, the number of coordinates, got {samples}")
    drawn = torch.randperm(call.size, generator=generator)[:samples]
    return Sample(call, samples, call.size / samples, drawn, None)
