"""Whether and how far to step along what a descent proposes.

The rate itself is the parameter group's ``lr``, so that torch's schedulers drive it; a search scales the step
besides. It is a value without a state: what it must remember from step to step, its *record*, is a dictionary of
numbers that goes in and comes out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError

Record = dict[str, float]


@dataclass(frozen=True)
class Proposal:
    """A step that a descent proposes: ``kappa = -M F`` along a plane of K directions.

    Attributes:
        value: the loss before it.
        slope: F, shape (K,).
        inverse: M, shape (K, K), symmetric.
        examples: each example's part of the slope, (N, K), or None.
        loss_at: the loss after so much of the step, by a pass of its own.
    """

    value: float
    slope: Tensor
    inverse: Tensor
    examples: Tensor | None
    loss_at: Callable[[float], float]

    @property
    def signal(self) -> float:
        """``F^T M F``: how fast the loss falls along the step, twice what a quadratic model promises."""
        slope = self.slope.double()
        return (slope @ self.inverse @ slope).item()

    @property
    def noise(self) -> float | None:
        """``tr(M C)``, C the covariance of the slope: what `signal` would be on average without a gradient."""
        covariance = slope_covariance(self.examples)
        return None if covariance is None else (self.inverse * covariance).sum().item()


def slope_covariance(examples: Tensor | None) -> Tensor | None:
    """The covariance (K, K) of a slope, the sum of its examples' parts (N, K); None for fewer than two of them.

    >>> import torch
    >>> slope_covariance(torch.tensor([[1.0], [3.0]]))  # two examples: N times their variance 2
    tensor([[4.]], dtype=torch.float64)
    """
    if examples is None or len(examples) < 2:
        return None
    n = len(examples)
    apart = examples.double() - examples.double().mean(0)
    return apart.mT @ apart * (n / (n - 1))


class Search(ABC):
    """What decides how much of a proposed step is taken.

    Attributes:
        examples: whether it makes use of the examples' parts of the slope.
    """

    examples: bool = False

    @abstractmethod
    def __call__(self, proposal: Proposal, record: Record) -> tuple[float, Record]:
        """How much of the step to take, 0 for none of it, and the record to come with next time ({} at first)."""


@dataclass(frozen=True)
class Whole(Search):
    """The whole step: its length is the rate's business."""

    def __call__(self, proposal: Proposal, record: Record) -> tuple[float, Record]:
        """See `Search`."""
        return 1.0, record


@dataclass(frozen=True)
class Backtracking(Search):
    """Halve the step until the loss falls by a part of what its slope promises (Armijo), by passes of their own.

    The loss never rises: where no length will do, the step is not taken. For losses without noise.

    Attributes:
        part: the part, ``L(rate) <= L(0) - part * rate * signal``.
        halvings: how often at most.

    >>> import torch
    >>> steep = Proposal(1.0, torch.tensor([2.0]), torch.tensor([[2.0]]).double(), None, lambda r: (1 - 4 * r) ** 2)
    >>> Backtracking()(steep, {})
    (0.25, {})
    """

    part: float = 1e-4
    halvings: int = 40

    def __post_init__(self) -> None:
        if not 0 < self.part < 1 or self.halvings < 0:
            raise ArgumentError(f"expected 0 < part < 1 and halvings >= 0, got {self.part} and {self.halvings}")

    def __call__(self, proposal: Proposal, record: Record) -> tuple[float, Record]:
        """See `Search`."""
        return self.shortened(proposal, 1.0), record

    def shortened(self, proposal: Proposal, rate: float) -> float:
        """The first of ``rate``, a half, a fourth of it, … for which the loss falls; 0 if there is none."""
        signal = proposal.signal
        for n in range(self.halvings + 1):
            if proposal.loss_at(rate / 2**n) <= proposal.value - self.part * rate / 2**n * signal:
                return rate / 2**n
        return 0.0


@dataclass(frozen=True)
class NoiseAware(Search):
    """Shrink the step by what of it is noise: ``1 - tr(M C) / (F^T M F)``, both averaged over steps.

    With the true slope G, ``F = G + noise`` and noise of covariance C, the loss of a quadratic model after ``rate``
    times the step ``-M F`` falls most, on average, for this rate: ``E[F^T M F] = G^T M G + tr(M C)``, of which the
    first term is worth going for. C comes from the examples' parts of the slope, at no cost. It is unbiased where
    the directions do not depend on the batch: see `jetplane.activity`.

    The model of the plane may be wrong where the step leads: it is halved until the loss of the same batch falls.
    Where the loss does not tell its examples apart, this is all that is done.

    Attributes:
        memory: how much of the averages is kept from step to step.
        floor: the least that is taken of a step, unless the loss rises.
        guard: whether to look at the loss after the step, by a pass of its own. Else nothing is halved.

    >>> import torch
    >>> after = lambda rate: 100 - 8 * rate
    >>> step = Proposal(100.0, torch.tensor([4.0]), torch.tensor([[1.0]]).double(), torch.tensor([[1.0], [3.0]]), after)
    >>> NoiseAware()(step, {})[0]  # noise 4, signal 16
    0.75
    """

    memory: float = 0.95
    floor: float = 1e-3
    guard: bool = True
    examples = True

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1 or not 0 <= self.floor <= 1:
            raise ArgumentError(f"expected 0 <= memory < 1 and 0 <= floor <= 1, got {self.memory} and {self.floor}")

    def __call__(self, proposal: Proposal, record: Record) -> tuple[float, Record]:
        """See `Search`."""
        noise = proposal.noise
        if noise is None:
            return Backtracking().shortened(proposal, 1.0), record
        mixed = {}
        for name, value in (("noise", noise), ("signal", proposal.signal)):
            mixed[name] = self.memory * record.get(name, 0.0) + (1 - self.memory) * value
        if not mixed["signal"] > 0:
            return 0.0, mixed
        rate = max(self.floor, 1 - mixed["noise"] / mixed["signal"])
        return Backtracking().shortened(proposal, rate) if self.guard else rate, mixed


def clipped(steps: Sequence[Tensor], limit: float, norm: Tensor | None = None) -> list[Tensor]:
    """Steps scaled down together so that their joint Euclidean norm is at most ``limit``.

    Args:
        steps: one for each parameter.
        limit: their joint norm at most.
        norm: theirs now, where what is given is a part of them.

    >>> import torch
    >>> clipped([torch.tensor([3.0, 4.0])], 1.0)
    [tensor([0.6000, 0.8000])]
    """
    total = (torch.stack([s.double().norm() for s in steps]).norm() if norm is None else norm).item()
    return list(steps) if total <= limit else [s * (limit / total) for s in steps]
