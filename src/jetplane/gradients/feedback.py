"""Internal: learned feedback, gradients at a layer's outputs predicted from the errors at the end of the model.

The gradient of example n at a layer's output is close to linear in its gradient e_n at the last layer's output, given
the sign of each output (exactly so below one ReLU):

    prediction_n = P e_n where a_n > 0, N e_n elsewhere

P and N are learned from the noisy estimates of `jetplane.gradients.perturbation`, and serve them as control variate:
with slopes ``s_nk`` along noise ``u_nk``,

    delta_n = prediction_n + residual_n,    residual_n = mean_k ((s_nk - prediction_n . u_nk) u_nk)

has the expectation of ``mean_k (s_nk u_nk)`` for every prediction, and the variance of what was not predicted. The maps
follow by recursive least squares with a ridge. With ``S`` the second moments of the errors, ``C`` the correlation of
residuals and errors (for each map over the outputs on its side of zero) and ``g`` the gain,

    map <- map + g C (S + (r + g noise) tr(S) / errors I)^-1,    C = sum_n residual_n e_n^T,    S = sum_n e_n e_n^T

Sources: feedback weights learned by perturbation, Lansdell, Prakash and Kording, arXiv 1906.00889; control variates,
Owen, Monte Carlo theory, methods and examples, chapter 8. Feedback aligned by JVPs that is itself the direction: GrAPE,
Caillon and others, "Scaling direct feedback learning with Jacobian alignment guarantees", ICLR 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

_DECAY = 0.9  # how much of the running second moments is kept from step to step
_RIDGE = 1e-3  # r: the ridge without noise, in parts of the second moments' mean
_LEAST_GAIN = 0.1


class FeedbackSpec(NamedTuple):
    """What a layer's feedback is like.

    Attributes:
        outputs: numbers that the layer puts out for one example.
        errors: numbers that the last layer puts out for one example.
        noise: variance of one step's residuals, in parts of what is to be learned.
    """

    outputs: int
    errors: int
    noise: float


@dataclass(frozen=True)
class FeedbackState:
    """What has been learned.

    Attributes:
        steps: how many updates.
        second_moments: running mean of S, (errors, errors); None before the first update.
        maps: P and N, stacked (2, outputs, errors), by the names of layers.
    """

    steps: int = 0
    second_moments: Tensor | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The fields as a dictionary of numbers and tensors, for checkpoints."""
        return {"steps": self.steps, "second_moments": self.second_moments, "maps": dict(self.maps)}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> FeedbackState:
        """A state from what `plain` gave; the initial one from an empty dictionary."""
        return cls(**fields)


@final
class Feedback:
    """Predictions from what has been learned, and the update by a step's sufficient statistics. A value: never changes.

    Args:
        specs: by the names of layers.
        state: what earlier steps have learned. Maps of another shape than ``specs`` says are dropped.
        like: a tensor of the device and dtype of all of it.

    >>> import torch
    >>> specs, state = {"layer": FeedbackSpec(outputs=3, errors=2, noise=0.1)}, FeedbackState()
    >>> truth, errors = torch.randn(3, 2), torch.randn(100, 2)
    >>> positive = torch.ones(100, 3, dtype=torch.bool)
    >>> for _ in range(60):
    ...     feedback = Feedback(specs, state, errors)
    ...     residual = errors @ truth.mT - feedback.predict("layer", errors, positive)
    ...     correlations = {"layer": feedback.correlate(errors, positive, residual)}
    ...     state = feedback.update(feedback.sufficient_statistics(correlations, errors))
    >>> prediction = Feedback(specs, state, errors).predict("layer", errors, positive)
    >>> bool((prediction - errors @ truth.mT).abs().max() < 0.01)
    True
    """

    def __init__(self, specs: Mapping[str, FeedbackSpec], state: FeedbackState, like: Tensor) -> None:
        self.specs = specs
        self._like = like
        shapes = {name: (2, spec.outputs, spec.errors) for name, spec in specs.items()}
        maps = {name: m for name, m in state.maps.items() if shapes.get(name) == tuple(m.shape)}
        errors = {spec.errors for spec in specs.values()}
        moments = state.second_moments
        if moments is not None and {len(moments)} != errors:
            moments = None
        self._state = FeedbackState(state.steps, moments, maps)
        self.shapes: list[tuple[int, ...]] = [*shapes.values(), *((e, e) for e in errors)]

    def predict(self, name: str, errors: Tensor, positive: Tensor) -> Tensor:
        """Predicted gradients at a layer's outputs.

        Args:
            name: of the layer.
            errors: gradients at the last layer's output, (rows, errors).
            positive: which outputs of the layer are above zero, (rows, outputs).

        Returns:
            A tensor of shape (rows, outputs); zeros if nothing has been learned for the layer.
        """
        if name not in self._state.maps:
            return torch.zeros(positive.shape, dtype=errors.dtype, device=errors.device)
        above, below = self._state.maps[name].to(errors)
        return torch.where(positive, errors @ above.mT, errors @ below.mT)

    @staticmethod
    def correlate(errors: Tensor, positive: Tensor, residual: Tensor) -> Tensor:
        """The correlations C of both maps, (2, outputs, errors), of residuals (rows, outputs)."""
        above = residual * positive
        return torch.stack([above.mT @ errors, (residual - above).mT @ errors])

    def sufficient_statistics(
        self, correlations: Mapping[str, Tensor], errors: Tensor | None, fraction: float = 1.0
    ) -> list[Tensor]:
        """All that a step teaches, tensors of the `shapes`: C of each layer, and S.

        Args:
            correlations: C by the names of layers; zeros for those that are missing.
            errors: gradients at the last layer's output, (rows, errors); None if they are not known.
            fraction: of the batch that these examples are. The mean of shards' statistics, weighted by their fractions,
                is the statistics of the batch.
        """
        found = [correlations.get(name) for name in self.specs]
        if self.specs:
            found.append(None if errors is None or not correlations else errors.mT @ errors)
        return [
            self._like.new_zeros(shape) if value is None else fraction * value
            for value, shape in zip(found, self.shapes, strict=True)
        ]

    def update(self, statistics: Sequence[Tensor]) -> FeedbackState:
        """The state after a step with these sufficient statistics; the state as it is if no errors were met."""
        if not self.specs:
            return self._state
        *correlations, moments = statistics
        now = moments.double()
        if not bool(now.diagonal().sum() > 0):
            return self._state
        before = self._state.second_moments
        mean = now if before is None else _DECAY * before.to(now) + (1 - _DECAY) * now
        metric = (mean + now) / 2  # a step of much larger errors than before must not overshoot
        level = metric.diagonal().mean() * torch.eye(len(now), dtype=now.dtype, device=now.device)
        steps = self._state.steps + 1
        maps = {}
        for (name, spec), correlation in zip(self.specs.items(), correlations, strict=True):
            g = _gain(steps, spec.noise)
            # As in ridge regression: rare errors, of which few rows tell, must not learn those rows' noise.
            ridge = (_RIDGE + g * spec.noise) * level
            change = g * torch.linalg.solve(metric + ridge, correlation.double(), left=False)
            maps[name] = self._state.maps.get(name, 0) + change.to(correlation.dtype)
        return FeedbackState(steps, mean.to(self._like.dtype), maps)


def _gain(steps: int, noise: float) -> float:
    """How much of what one step tells is learned: ``2 / (steps + noise)``, at most 1, at least ``0.1``.

    2 rather than 1, since each map sees about half of the rows. Noise lowers the least gain to ``0.2 / noise``.
    """
    return max(min(1.0, 2 / (steps + noise)), min(_LEAST_GAIN, 0.2 / noise))
