"""How estimates of the gradient are made, from which later planes are spanned.

An estimator looks at the batch again, by passes of its own (`Estimator.measure`), and turns what it has measured
into an estimate (`Estimator.estimate`). In between processes that step together take the mean over their shards. It has
no state of its own: what it learns from step to step goes in and comes out, as plain tensors, numbers, lists and
dictionaries.
"""

from __future__ import annotations

import hashlib
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
from .feedback import ERRORS, Feedback
from .perturbation import Share, allot, estimate

State = dict[str, Any]  # plain values, {} at first


@dataclass(frozen=True)
class Batch:
    """What an estimator sees: the plane that was just evaluated, and this process's shard of the batch.

    Attributes:
        closure: returns the loss of the shard. Run it under `jetplane.gradients.rehearsal`, so that buffers and random
            numbers move once in a step.
        params: the tensors that may move.
        model: holds the layers, or None.
        directions: of the plane, by the places of ``params`` among themselves.
        plane: its loss, slope and curvature, of the whole batch.
        drawn: which of its directions v have ``E[v v^T] = I``.
        used: the places of the parameters that the loss makes use of.
        seed: another one in each step.
        before: how many times the shard's examples come before it in the whole batch.
        part: of the whole batch that the shard is; 0 for an empty one.
        chunk: how many directions the plane's evaluation has carried at a time, or None.
    """

    closure: Callable[[], Any]
    params: Sequence[Tensor]
    model: nn.Module | None
    directions: AbstractDirections
    plane: PlaneModel
    drawn: Sequence[int]
    used: frozenset[int]
    seed: int
    before: float = 0.0
    part: float = 1.0
    chunk: int | None = None


@dataclass(frozen=True)
class Estimate:
    """An estimate of the gradient, one tensor for each parameter, and the estimator's new state."""

    gradient: Sequence[Tensor]
    state: State


class Estimator(ABC):
    """What estimates the gradient on a batch.

    Attributes:
        measures: whether it looks at the batch again. If not, `measure` is not called.
    """

    measures: bool = True

    @abstractmethod
    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """What is measured on the shard, such that the weighted mean over shards is that of the whole batch."""

    @abstractmethod
    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """The estimate, from what was measured on the whole batch, and the new state; the old one is left as it is."""

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """The shapes of what `measure` returns: by default one tensor for each parameter."""
        return [p.shape for p in batch.params]

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """What `prepare` depends on: it is called in the first step, and where this changes."""
        return ""

    def prepare(self, batch: Batch, state: State) -> State:
        """Decide what is decided once for many steps, by one process for all: the new state."""
        return state


@final
@dataclass(frozen=True)
class ForwardGradients(Estimator):
    """``mean_k (F_k v_k)`` over the plane's drawn directions, without a pass of its own (arXiv 2202.08587)."""

    measures = False

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`: nothing."""
        return []

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        drawn, slope = list(batch.drawn), batch.plane.slope
        weights = torch.zeros_like(slope)
        weights[drawn] = slope[drawn] / max(len(drawn), 1)
        every = enumerate(batch.params)
        found = [batch.directions.combine(i, p, weights) if i in batch.used else torch.zeros_like(p) for i, p in every]
        return Estimate(found, state)


@final
@dataclass(frozen=True)
class ActivityPerturbation(Estimator):
    """Noise on the outputs of the model's layers: see `jetplane.gradients.perturbation`.

    Attributes:
        passes: about how many forward passes an estimate costs.
        feedback: whether to predict gradients at layers' outputs by what their noise has taught.

    Raises:
        ArgumentError: passes that are not positive and finite.
    """

    passes: float = 8.0
    feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.passes < math.inf:
            raise ArgumentError(f"passes must be positive and finite, got {self.passes}")

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """See `Estimator`: which parameters move, and which modules are in training mode."""
        assert model is not None
        ids = {id(p) for p in params}
        moving = [name for name, p in model.named_parameters() if id(p) in ids]
        training = [name for name, module in model.named_modules() if module.training]
        return hashlib.sha256(repr((moving, training)).encode()).hexdigest()[:16]

    def prepare(self, batch: Batch, state: State) -> State:
        """See `Estimator`: allocate samples to layers. Feedback of which the shapes have changed is forgotten."""
        shares = allot(batch.closure, _model_of(batch), batch.params, self.passes, 1 / batch.part, chunk=batch.chunk)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, course in ((name, share.course) for name, share in shares.items() if share.course is not None):
            shapes |= {name: (2, course.outputs, course.errors), ERRORS: (course.errors, course.errors)}
        feedback = state.get("feedback", {}).items()
        fitting = {name: t for name, t in feedback if name not in shapes or tuple(t.shape) == shapes[name]}
        return {"plans": {name: share.plain() for name, share in shares.items()}, "feedback": fitting}

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """See `Estimator`: those of the parameters, then of what feedback learns from."""
        _, feedback = self._restored(batch, state)
        return [*(p.shape for p in batch.params), *(t.shape for t in feedback.lessons)]

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`."""
        shares, feedback = self._restored(batch, state)
        found = estimate(
            batch.closure, _model_of(batch), batch.params, shares, batch.seed, batch.before, feedback, batch.part
        )
        return [*found, *feedback.lessons]

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        _, feedback = self._restored(batch, state)
        count = len(batch.params)
        return Estimate(means[:count], state | {"feedback": feedback.learned(means[count:])})

    def _restored(self, batch: Batch, state: State) -> tuple[dict[str, Share], Feedback]:
        """The layers' plans, and the feedback as earlier steps have left it."""
        shares = {name: Share.of(fields) for name, fields in state["plans"].items()}
        courses = {name: s.course for name, s in shares.items() if s.course is not None and self.feedback}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in batch.params) else torch.float32
        like = torch.empty(0, dtype=dtype, device=batch.params[0].device)
        return shares, Feedback(courses, state.get("feedback", {}), like)


def _model_of(batch: Batch) -> nn.Module:
    assert batch.model is not None
    return batch.model
