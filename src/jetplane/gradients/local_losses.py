"""Internal: loss functions met in a closure, and their gradient with respect to other outputs than the model's.

A read-out of a layer puts out one row of numbers for each row of the model's output. Its local loss is the function
that the closure calls, with the same targets and settings. Its gradient is known in closed form: for rows z_n,

    cross entropy:  p_n sum_c t_nc - t_n,  p_n = softmax(z_n),  t_nc = w_c ((1 - s) [c = y_n] + s / C)
    squared error:  2 w_n (z_n - y_n)

divided as the loss function's reduction says, with class weights w, smoothing s, and targets y_n that may be
probabilities in place of classes.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F


class LocalLoss(ABC):
    """A loss function with its targets.

    Attributes:
        output: what the closure gave it, the model's output or what was made of it.
        rows: how many rows the output has.
        width: how many numbers a row has.
    """

    output: Tensor
    rows: int
    width: int

    @abstractmethod
    def gradient(self, z: Tensor) -> Tensor:
        """Of the loss with respect to outputs z in place of the model's, both (rows, width)."""

    @abstractmethod
    def shaped(self, gradient: Tensor) -> Tensor:
        """A gradient (rows, width) in the shape of the model's output."""

    def own_gradient(self) -> Tensor:
        """The gradient with respect to the model's output, in its shape."""
        return self.shaped(self.gradient(self._own_rows()))

    @abstractmethod
    def _own_rows(self) -> Tensor: ...


@final
@dataclass(frozen=True)
class CrossEntropy(LocalLoss):
    """`torch.nn.functional.cross_entropy` of logits (C), (N, C) or (N, C, d1, …)."""

    output: Tensor
    target: Tensor
    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    @property
    def rows(self) -> int:  # type: ignore[override]
        """See `LocalLoss`."""
        return self.output.numel() // self.width

    @property
    def width(self) -> int:  # type: ignore[override]
        """See `LocalLoss`."""
        return self.output.shape[0 if self.output.dim() == 1 else 1]

    def gradient(self, z: Tensor) -> Tensor:
        """See `LocalLoss`."""
        wanted, divisor = self._wanted(z)
        return (z.softmax(1) * wanted.sum(1, keepdim=True)).sub_(wanted).div_(divisor)

    def _wanted(self, z: Tensor) -> tuple[Tensor, Any]:
        """The t_nc, (rows, width), and what the sum of losses is divided by."""
        smooth, weight = self.label_smoothing, None if self.weight is None else self.weight.to(z.dtype)
        if self.target.is_floating_point():
            t = self._as_rows(self.target).to(z.dtype) * (1 - smooth) + smooth / self.width
            count: Any = self.rows
            return (t if weight is None else t * weight), (count if self.reduction == "mean" else 1)
        classes = self.target.reshape(-1)
        kept = classes != self.ignore_index
        at = torch.where(kept, classes, 0).unsqueeze(1)
        t = torch.full_like(z, smooth / self.width).scatter_(1, at, 1 - smooth + smooth / self.width)
        if weight is not None:
            t = t * weight
        count = kept.sum() if weight is None else (weight[at.squeeze(1)] * kept).sum()
        return t * kept.unsqueeze(1), (count if self.reduction == "mean" else 1)

    def shaped(self, gradient: Tensor) -> Tensor:
        """See `LocalLoss`."""
        if self.output.dim() <= 2:
            return gradient.reshape(self.output.shape)
        places = self.output.movedim(1, -1).shape
        return gradient.reshape(places).movedim(-1, 1)

    def _own_rows(self) -> Tensor:
        return self._as_rows(self.output)

    def _as_rows(self, t: Tensor) -> Tensor:
        return (t if t.dim() <= 2 else t.movedim(1, -1)).reshape(-1, self.width)


@final
@dataclass(frozen=True)
class SquaredError(LocalLoss):
    """`torch.nn.functional.mse_loss` of outputs (N), or (…, D) with a row for each of all but the last axis."""

    output: Tensor
    target: Tensor
    reduction: str = "mean"
    weight: Tensor | None = None

    @property
    def rows(self) -> int:  # type: ignore[override]
        """See `LocalLoss`."""
        return self.output.numel() // self.width

    @property
    def width(self) -> int:  # type: ignore[override]
        """See `LocalLoss`."""
        return 1 if self.output.dim() <= 1 else self.output.shape[-1]

    def gradient(self, z: Tensor) -> Tensor:
        """See `LocalLoss`."""
        off = 2 * (z - self._as_rows(self.target).to(z.dtype))
        count: Any = self.output.numel()
        if self.weight is not None:
            weight = self._as_rows(self.weight).to(z.dtype)
            off, count = off * weight, weight.sum()
        return off / count if self.reduction == "mean" else off

    def shaped(self, gradient: Tensor) -> Tensor:
        """See `LocalLoss`."""
        return gradient.reshape(self.output.shape)

    def _own_rows(self) -> Tensor:
        return self._as_rows(self.output)

    def _as_rows(self, t: Tensor) -> Tensor:
        return t.expand_as(self.output).reshape(-1, self.width)


_KNOWN: Mapping[Any, type[LocalLoss]] = {F.cross_entropy: CrossEntropy, F.mse_loss: SquaredError}
_SETTINGS = {function: inspect.signature(function) for function in _KNOWN}
NAMES = ", ".join(function.__name__ for function in _KNOWN)


def met(function: Any, args: Any, kwargs: Any) -> LocalLoss | None:
    """The local loss of a call of a function; None if it is none of those that are known.

    Losses that are not reduced (``reduction="none"``) count as their sum: what becomes of them is not known.
    """
    if function not in _KNOWN:
        return None
    given = dict(_SETTINGS[function].bind(*args, **kwargs).arguments)
    settings = {"output": given.pop("input"), "target": given.pop("target")}
    for name in ("size_average", "reduce"):  # of old, which say the same as the reduction
        given.pop(name, None)
    return _KNOWN[function](**settings, **given)
