"""How estimates of the gradient are made, from which later planes are spanned.

An estimator looks at the batch again, by passes of its own (`Estimator.measure`), and turns what it has measured
into an estimate (`Estimator.estimate`). In between processes that step together take the mean over their shards. It has
no state of its own: what it learns from step to step goes in and comes out, as plain tensors, numbers, lists and
dictionaries.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..directions import AbstractDirections
from ..errors import ArgumentError
from ..evaluation.plane import PlaneModel
from .allocation import allocate, signature
from .feedback import Feedback, FeedbackState
from .perturbation import estimate
from .plan import LayerPlan

State = dict[str, Any]  # plain values, {} at first


@dataclass(frozen=True)
class Batch:
    """The input of an estimator: the plane just evaluated, and this process's shard of the batch.

    Attributes:
        closure: returns the loss of the shard. Run it under `without_side_effects` of `jetplane.gradients`, so that
            buffers and random numbers move once in a step.
        params: the tensors that may move.
        model: holds the layers, or None.
        directions: of the plane, by the places of ``params`` among themselves; None between planes, see
            `Estimator.alone`, and where an estimator measures elsewhere (`jetplane.sources.Source.weights`): they are
            those at the parameters.
        plane: its loss, slope and curvature, of the whole batch; None between planes.
        drawn: which of its directions v have ``E[v v^T] = I``.
        used: the places of the parameters that the loss uses.
        seed: a seed that differs in each step.
        before: number of examples before the shard in the whole batch, in multiples of the shard's size.
        part: the fraction of the whole batch that the shard is; 0 for an empty one.
        chunk: how many directions the plane's evaluation carried at a time, or None.
    """

    closure: Callable[[], Any]
    params: Sequence[Tensor]
    model: nn.Module | None
    directions: AbstractDirections | None
    plane: PlaneModel | None
    drawn: Sequence[int]
    used: frozenset[int]
    seed: int
    before: float = 0.0
    part: float = 1.0
    chunk: int | None = None


@dataclass(frozen=True)
class Estimate:
    """The result of an estimator.

    Attributes:
        gradient: an estimate of the gradient, one tensor for each parameter.
        state: the estimator's new state.
        loss: the loss of the whole batch where the estimate was made, a tensor of shape (); None where it is not known.
    """

    gradient: Sequence[Tensor]
    state: State
    loss: Tensor | None = None


class Estimator(ABC):
    """An estimator of the gradient on a batch.

    Attributes:
        measures: whether the estimator evaluates the batch again. If not, `measure` is not called.
        alone: whether it works without a plane (`jetplane.sources.Subspace`). If the batch's ``plane`` is None,
            `measure` then runs the closure once with all of its side effects, and the estimate contains the loss. By
            default fast weights then follow the estimates, and a plane is evaluated in every 16th step.
    """

    measures: bool = True
    alone: bool = False

    @abstractmethod
    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """Measure on the shard; the weighted mean over shards must be the measurement of the whole batch."""

    @abstractmethod
    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """The estimate from the measurement of the whole batch, and the new state. The old state is not modified."""

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """The shapes of what `measure` returns: by default one tensor for each parameter."""
        return [p.shape for p in batch.params]

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """A value on which `prepare` depends: it is called in the first step, and whenever this value changes."""
        return ""

    def prepare(self, batch: Batch, state: State) -> State:
        """Make the choices that hold for many steps, in one process for all; returns the new state."""
        return state


@final
@dataclass(frozen=True)
class ForwardGradients(Estimator):
    """``mean_k (F_k v_k)`` over the plane's drawn directions, without an extra pass (arXiv 2202.08587)."""

    measures = False

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`: nothing."""
        return []

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        assert batch.plane is not None and batch.directions is not None
        directions, drawn, slope = batch.directions, list(batch.drawn), batch.plane.slope
        weights = torch.zeros_like(slope)
        weights[drawn] = slope[drawn] / max(len(drawn), 1)
        every = enumerate(batch.params)
        found = [directions.combine(i, p, weights) if i in batch.used else torch.zeros_like(p) for i, p in every]
        return Estimate(found, state)


@final
@dataclass(frozen=True)
class ActivityPerturbation(Estimator):
    """Noise on the outputs of the model's layers: see `jetplane.gradients.perturbation`.

    Attributes:
        passes: approximate number of forward passes of an estimate.
        feedback: whether to predict gradients at layers' outputs from the noise of earlier steps.

    Raises:
        ArgumentError: passes that are not positive and finite.
    """

    passes: float = 8.0
    feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.passes, (int, float)) or not 0 < self.passes < math.inf:
            raise ArgumentError(f"passes must be a number, positive and finite, got {self.passes!r}")

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """See `Estimator`: which parameters move, and what layers can be perturbed, in which mode."""
        assert model is not None
        return signature(model, params)

    def prepare(self, batch: Batch, state: State) -> State:
        """See `Estimator`: plan how each layer is perturbed."""
        plans = allocate(batch.closure, model_of(batch), batch.params, self.passes, 1 / batch.part, chunk=batch.chunk)
        return {"plans": {name: plan.plain() for name, plan in plans.items()}, "feedback": state.get("feedback", {})}

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """See `Estimator`: those of the parameters, then of what feedback learns from."""
        _, feedback = self._restored(batch, state)
        return [*(p.shape for p in batch.params), *map(torch.Size, feedback.shapes)]

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`."""
        plans, feedback = self._restored(batch, state)
        found = estimate(
            batch.closure, model_of(batch), batch.params, plans, batch.seed, batch.before, feedback, batch.part
        )
        return [*found.gradient, *found.statistics]

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        _, feedback = self._restored(batch, state)
        count = len(batch.params)
        return Estimate(means[:count], state | {"feedback": feedback.update(means[count:]).plain()})

    def _restored(self, batch: Batch, state: State) -> tuple[dict[str, LayerPlan], Feedback]:
        """The layers' plans, and the feedback as earlier steps have left it."""
        plans = {name: LayerPlan.of(fields) for name, fields in state["plans"].items()}
        specs = {name: p.feedback for name, p in plans.items() if p.feedback is not None and self.feedback}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in batch.params) else torch.float32
        like = torch.empty(0, dtype=dtype, device=batch.params[0].device)
        return plans, Feedback(specs, FeedbackState.of(state.get("feedback", {})), like)


def model_of(batch: Batch) -> nn.Module:
    """The batch's model, which is there."""
    assert batch.model is not None
    return batch.model
