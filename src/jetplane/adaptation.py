"""Test-time adaptation: a frozen model is fitted to new data, without labels and without a backward pass.

The adapted numbers are a scale and a shift for each channel of each normalization layer. They are stored beside the
model, whose weights may be int8. For each batch:

1. Each normalization layer is given back the mean and the standard deviation that its output had on source data,
   channel by channel. Batch statistics do this for BatchNorm; here it works for any normalization, in the same pass.
2. The remaining shift r is measured at the inputs of the layers with weights and at the logits: moments of the batch
   minus those of the source, in standard deviations of the source, divided by the root of the number of channels. The
   loss is that of FOA (Niu et al., arXiv 2404.01650, equation 5), in these units:

       L = entropy_weight * mean entropy of the predictions + |r|^2

3. A Gauss-Newton step ``v = -(J^T J + mu I)^-1 J^T r`` is computed from the Jacobian J of r, measured once on source
   data, and from r of the previous batch. It is split by layers. The parts and the previous step are the directions of
   a plane. One evaluation (`jetplane.evaluate`) gives the slope and the Gauss-Newton curvature of the current L along
   them, and these determine the coefficient of each direction.

With K directions a step costs as many products as 1 + K forward passes for the plane, and one pass that predicts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .evaluation.api import evaluate
from .rules import loss as loss_function
from .rules import quantization
from .rules.rounding import Rounding
from .subspace.descent import SaddleFree
from .transforms.forward import jacobian

NORMALIZATION = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
EPS = 1e-5  # added to variances
SMALLEST = 1e-2  # standard deviation that a distance is measured in
EXAMPLES, DIRECTIONS = 128, 16  # of source data that J is measured on, and how many at a time

Moments = tuple[Tensor, Tensor]  # mean and standard deviation of each channel


@final
class Adapter:
    """A model that adapts to each batch it is given and predicts it. `jetplane.adaptation` describes the method.

    Args:
        model: gives logits (N, classes) for a batch of N examples. It is not modified. Outputs of normalization layers
            are (N, C, H, W) or (N, ..., C).
        source: a batch of a few hundred examples like those the model was trained on, without labels: one tensor.
        layers: the normalization layers whose scales and shifts move; by default all of `torch.nn`'s.
        watched: modules whose inputs are compared with those of source data; by default all with a ``weight`` that are
            not normalization layers.
        k: the largest number of directions of a plane.
        entropy_weight: weight of the entropy of the predictions.
        damping: mu, in units of the mean of the diagonal of J^T J.
        derivative: the derivative of quantized activations: see `jetplane.quantization`.

    Batches should have about ten examples or more, since their moments are compared.

    Raises:
        ArgumentError: no normalization layers, or k < 2.

    >>> import torch, jetplane as jp
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    >>> adapter = jp.Adapter(model, torch.randn(256, 8))
    >>> logits = [adapter(batch) for batch in 2 * torch.randn(5, 64, 8) + 1]
    >>> adapter.reset()  # for data of another kind
    """

    def __init__(
        self,
        model: nn.Module,
        source: Tensor,
        *,
        layers: Sequence[nn.Module] | None = None,
        watched: Sequence[nn.Module] | None = None,
        k: int = 10,
        entropy_weight: float = 0.3,
        damping: float = 0.1,
        derivative: Rounding = "straight-through",
    ) -> None:
        found = [m for m in model.modules() if isinstance(m, NORMALIZATION)]
        self.model, self.layers = model, found if layers is None else list(layers)
        self.watched = list(weighted_modules(model) if watched is None else watched)
        self.k, self.entropy_weight = k, entropy_weight
        self.derivative: Rounding = derivative
        if not self.layers:
            raise ArgumentError(
                "expected a model with normalization layers, found none; name the layers to adapt with layers=[...]"
            )
        if k < 2:
            raise ArgumentError(
                f"k must be at least 2, for a part of the Gauss-Newton step and the previous step; got {k}"
            )
        with torch.no_grad():
            self._targets = self._outputs(source)
            self._sizes = [len(mean) for mean, _ in self._targets for _ in range(2)]
            self.scales_and_shifts = source.new_zeros(sum(self._sizes))
            self._source = self._observed(self.scales_and_shifts, source)[1]
            with quantization(derivative):
                some = source[:EXAMPLES]
                j = jacobian(
                    lambda t: self._residuals(self._observed(t, some)[1]), self.scales_and_shifts, chunk=DIRECTIONS
                )
            gram = j.T @ j
            gram.diagonal().add_(damping * gram.diagonal().mean())
            self._newton = -torch.linalg.solve(gram, j.T)
        self.reset()

    def reset(self) -> None:
        """Undo the adaptation."""
        self.scales_and_shifts = torch.zeros_like(self.scales_and_shifts)
        self._last: Tensor | None = None  # r of the batch before
        self._step: Tensor | None = None  # the step before

    def restarted(self) -> Adapter:
        """A new adapter for the same model and source, which has not adapted yet."""
        other = copy.copy(self)
        other.reset()
        return other

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """Adapt to a batch, and give its logits.

        Raises:
            As `jetplane.evaluate`.
        """
        theta = self.scales_and_shifts
        if self._last is None:
            self._last = self._residuals(self._observed(theta, batch)[1])
        directions = self._directions(self._newton @ self._last)

        def closure() -> Tensor:
            logits, moments = self._observed(theta, batch)
            r = self._residuals(moments)
            with loss_function():
                return self.entropy_weight * entropy(logits) + r.square().sum()

        with quantization(self.derivative):
            plane = evaluate(closure, [theta], [directions], "ggn")
        self._step = SaddleFree()(plane.slope, plane.curvature).to(theta) @ directions
        self.scales_and_shifts = theta + self._step
        logits, moments = self._observed(self.scales_and_shifts, batch)
        self._last = self._residuals(moments)
        return logits

    @torch.no_grad()
    def predicted(self, batch: Any) -> Tensor:
        """The logits of a batch under the current adaptation, which does not change."""
        return self._observed(self.scales_and_shifts, batch)[0]

    def _directions(self, newton: Tensor) -> Tensor:
        """Pieces of a Gauss-Newton step, a layer's scales, its shifts or more in each, and the step before: (K, D)."""
        pieces = torch.block_diag(*newton.split(self._sizes))
        per = -(-len(pieces) // (self.k - 1))
        rows = [piece.sum(0) for piece in pieces.split(per)]
        rows = rows if self._step is None else [*rows, self._step]
        return torch.stack([row / row.norm() for row in rows if row.norm() > 0] or [torch.ones_like(newton)])

    # --- the model with scales and shifts ------------------------------------------------------------------------

    def _outputs(self, batch: Any) -> list[Moments]:
        """Moments of the outputs of normalization layers, in their order."""
        found: dict[nn.Module, Moments] = {}
        hooks = [m.register_forward_hook(lambda m, _, y: found.update({m: moments(m, y)})) for m in self.layers]
        with _removing(hooks):
            self.model(batch)
        return [found[m] for m in self.layers]

    def _observed(self, scales_and_shifts: Any, batch: Any) -> tuple[Tensor, list[Moments]]:
        """Logits, and moments of what enters the watched modules and of the logits."""
        seen: list[Moments] = []
        pieces = scales_and_shifts.split(self._sizes)
        triples = zip(self.layers, self._targets, pieces[::2], pieces[1::2], strict=True)
        hooks = [m.register_forward_hook(_restored(target, gain, shift)) for m, target, gain, shift in triples]
        hooks += [
            m.register_forward_pre_hook(lambda _, args: seen.append(moments(None, args[0]))) for m in self.watched
        ]
        with _removing(hooks):
            logits = self.model(batch)
        return logits, [*seen, moments(None, logits)]

    def _residuals(self, found: list[Moments]) -> Tensor:
        parts = []
        for (mean, deviation), (m, s) in zip(found, self._source, strict=True):
            unit = s.clamp_min(SMALLEST) * len(s) ** 0.5
            parts += [(mean - m) / unit, (deviation - s) / unit]
        return torch.cat(parts)


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the predictions, whose logits are (N, classes)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def moments(layer: nn.Module | None, x: Tensor) -> Moments:
    """Mean and standard deviation of each channel of x, which a layer has put out; None for what is not known."""
    rows = x.movedim(1, -1) if _by_second_axis(layer, x) else x
    rows = rows.reshape(-1, rows.shape[-1])
    mean = rows.mean(0)
    return mean, ((rows - mean).square().mean(0) + EPS).sqrt()


def weighted_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with a ``weight``, normalization layers left out."""
    for child in module.children():
        if isinstance(child, NORMALIZATION):
            continue
        if hasattr(child, "weight"):
            yield child
        else:
            yield from weighted_modules(child)


def _by_second_axis(layer: nn.Module | None, x: Tensor) -> bool:
    """Whether channels are the second axis: of images, and of what layers put out that say so."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return False
    return x.dim() >= 4 or (layer is not None and x.dim() == 3)


def _restored(target: Moments, gain: Tensor, shift: Tensor) -> Callable[..., Tensor]:
    """A hook that gives an output the moments ``target``, scaled by 1 + gain and moved by shift deviations."""

    def restored(layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        mean, deviation = moments(layer, y)
        scale = target[1] / deviation * (1 + gain)
        offset = target[0] + target[1] * shift - mean * scale
        if _by_second_axis(layer, y):
            scale, offset = (v.reshape(-1, *[1] * (y.dim() - 2)) for v in (scale, offset))
        return y * scale + offset

    return restored


@contextlib.contextmanager
def _removing(hooks: Iterable[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
