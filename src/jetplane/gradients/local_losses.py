"""Internal: loss functions met in a closure, and their gradient with respect to other outputs than the model's.

A read-out of a layer puts out one row of numbers z_n for each row of the model's output. Its local loss is the function
that the closure calls, with the same targets and settings, at ``f(z)``: f makes of any numbers what the loss function
takes, log-probabilities for `nll_loss` and `kl_div`, probabilities for `binary_cross_entropy`, z itself for others. The
gradient is torch's own vector-Jacobian product of the loss function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch import DisableTorchFunction, no_dispatch
from ..rules.grad_mode import autograd


def _log_softmax(z: Tensor) -> Tensor:
    return z.log_softmax(-1)


# What makes of a row of numbers one that the function takes; None for the numbers themselves.
_LINKS: Mapping[Any, Callable[[Tensor], Tensor] | None] = {
    F.cross_entropy: None,
    F.nll_loss: _log_softmax,
    F.kl_div: _log_softmax,
    F.binary_cross_entropy_with_logits: None,
    F.binary_cross_entropy: torch.sigmoid,
    F.multilabel_soft_margin_loss: None,
    F.multi_margin_loss: None,
    F.soft_margin_loss: None,
    F.mse_loss: None,
    F.l1_loss: None,
    F.smooth_l1_loss: None,
    F.huber_loss: None,
}
_CLASSES = {F.cross_entropy, F.nll_loss}  # along the second axis of their input
_SETTINGS = {function: inspect.signature(function) for function in _LINKS}
NAMES = ", ".join(function.__name__ for function in _LINKS)


@final
@dataclass(frozen=True)
class LocalLoss:
    """A call of a loss function.

    Attributes:
        function: it.
        output: what the closure gave it, the model's output or what was made of it.
        settings: its other arguments, by name.
        axis: of the output, along which the numbers of a row lie; None where each number is a row.
        weight: the derivative of the closure's loss with respect to the result, in its shape.
    """

    function: Any
    output: Tensor
    settings: Mapping[str, Any]
    axis: int | None
    weight: Tensor | None = None

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return 1 if self.axis is None else self.output.shape[self.axis]

    @property
    def rows(self) -> int:
        """How many rows the output has."""
        return self.output.numel() // max(self.width, 1)

    def gradient(self, z: Tensor) -> Tensor:
        """Of the weighted loss with respect to outputs z in place of the model's, both (rows, width)."""
        link = _LINKS[self.function]
        with DisableTorchFunction(), no_dispatch(), autograd():
            start = z.detach().requires_grad_()
            value = self.function(self.shaped(start if link is None else link(start)), **self._cast(z.dtype))
            weight = torch.ones_like(value) if self.weight is None else self.weight.to(value.dtype)
            return torch.autograd.grad(value, start, weight.reshape(value.shape))[0]

    def shaped(self, z: Tensor) -> Tensor:
        """Numbers (rows, width) in the shape of the output."""
        if self.axis is None:
            return z.reshape(self.output.shape)
        return z.reshape(self.output.movedim(self.axis, -1).shape).movedim(-1, self.axis)

    def _cast(self, dtype: torch.dtype) -> dict[str, Any]:
        """The settings, tensors of numbers in another precision where the output is in it."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return {name: cast(value) for name, value in self.settings.items()}


def met(
    function: Any, args: Any, kwargs: Any, channels: torch.Size | None = None, single: bool = False
) -> LocalLoss | None:  # fmt: skip
    """The local loss of a call of a function; None if it is none of those that are known.

    Args:
        function: of `torch.nn.functional`.
        args: its arguments.
        kwargs: those given by name.
        channels: shape of what a convolution has put out, whose features lie along the second axis, where the input is
            made of that; None for other layers.
        single: whether an input of one axis is one row; if not, each of its numbers is one.
    """
    if function not in _LINKS:
        return None
    given = dict(_SETTINGS[function].bind(*args, **kwargs).arguments)
    output = given.pop("input")
    if output.dim() == 0:
        return None
    if function in _CLASSES:
        axis = 0 if output.dim() == 1 else 1
    elif channels is not None and output.dim() > 2:
        axis = 1 if output.dim() == len(channels) else None  # None where the only channel has gone
    else:
        axis = None if output.dim() == 1 and not single else output.dim() - 1
    return LocalLoss(function, output, given, axis)
