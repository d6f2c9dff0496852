"""Learned feedback: what a layer's outputs are to blame for, predicted from the errors at the end of the model.

The gradient of example n at a layer's output is close to linear in its gradient e_n at the last layer's output, given
on which side of zero each output is (exactly so below one ReLU):

    predicted_n = P e_n where a_n > 0, N e_n elsewhere

P and N are learned from the noisy estimates that `jetplane.gradients.perturbation` makes, and serve them as control
variate: with slopes ``s_nk`` along noise ``u_nk``,

    delta_n = predicted_n + mean_k ((s_nk - predicted_n . u_nk) u_nk)

has the same expectation whatever was predicted, and a variance of only what was not. The part behind the mean is
what is learned from, by least squares in the metric of the errors, recursively, with a ridge of the lessons' noise.

Sources: feedback weights learned by perturbation, Lansdell, Prakash and Kording, arXiv 1906.00889; control variates,
Owen, Monte Carlo theory, methods and examples, chapter 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Record = dict[str, Any]

ERRORS = "errors"  # the name under which a record has the errors' second moments

_KEPT = 0.9  # how much of the second moments is kept from step to step
_RIDGE = 1e-3  # what is added to the second moments, in parts of their mean
_LEAST = 0.1  # the gain never falls below this, or below a fifth of what noise allows


class Course(NamedTuple):
    """What a layer's feedback is like.

    Attributes:
        outputs: numbers that the layer puts out for one example.
        errors: numbers that the last layer puts out for one example.
        noise: variance of one step's lesson, in parts of what is to be learned: it sets the gain.
    """

    outputs: int
    errors: int
    noise: float


class Feedback:
    """Predictions of one step, and the lessons that are drawn from it.

    Args:
        courses: by the names of layers.
        record: what earlier steps have learned, {} at first. It is left as it is.
        like: a tensor of the device and dtype of all of it.

    >>> import torch
    >>> courses, record = {"layer": Course(outputs=3, errors=2, noise=0.1)}, {}
    >>> truth, errors = torch.randn(3, 2), torch.randn(100, 2)
    >>> high = torch.ones(100, 3, dtype=torch.bool)
    >>> for _ in range(60):
    ...     step = Feedback(courses, record, errors)
    ...     left = errors @ truth.mT - step.predicted("layer", errors, high)
    ...     step.note("layer", errors, high, left)
    ...     record = step.learned(step.lessons)
    >>> predicted = Feedback(courses, record, errors).predicted("layer", errors, high)
    >>> bool((predicted - errors @ truth.mT).abs().max() < 0.01)
    True
    """

    def __init__(self, courses: dict[str, Course], record: Record, like: Tensor) -> None:
        self.courses = courses
        self._record = record
        self._like = like
        self._noted: dict[str, Tensor] = {}

    def predicted(self, name: str, errors: Tensor, high: Tensor) -> Tensor:
        """Gradients at a layer's outputs, (rows, outputs); ``high`` tells which outputs are above zero."""
        if name not in self._record:
            return torch.zeros(high.shape, dtype=errors.dtype, device=errors.device)
        above, below = self._record[name].to(errors)
        return torch.where(high, errors @ above.mT, errors @ below.mT)

    def note(self, name: str, errors: Tensor, high: Tensor, left: Tensor, part: float = 1.0) -> None:
        """A lesson: what of the gradients was not predicted, (rows, outputs). ``part``: of the batch, of a shard."""
        above = left * high
        self._noted[name] = part * torch.stack([above.mT @ errors, (left - above).mT @ errors])
        self._noted[ERRORS] = part * errors.mT @ errors

    @property
    def lessons(self) -> list[Tensor]:
        """All that was noted, in one order. Of shards of a batch, their weighted mean is that of the whole."""
        return [
            self._noted[name] if name in self._noted else self._like.new_zeros(shape)
            for name, shape in self._shapes().items()
        ]

    def learned(self, lessons: Sequence[Tensor]) -> Record:
        """The record after a step's lessons."""
        if not self.courses:
            return self._record
        told = dict(zip(self._shapes(), lessons, strict=True))
        now = told[ERRORS].double()
        if not bool(now.diagonal().sum() > 0):
            return self._record
        mean = self._record[ERRORS].to(now) if ERRORS in self._record else now
        mean = _KEPT * mean + (1 - _KEPT) * now
        metric = (mean + now) / 2  # a step of much larger errors than before must not overshoot
        one = metric.diagonal().mean() * torch.eye(len(now), dtype=now.dtype, device=now.device)
        steps = 1 + self._record.get("steps", 0)
        record: Record = {"steps": steps, ERRORS: mean.to(self._like.dtype)}
        for name, course in self.courses.items():
            # Of rows, each side of zero has about half.
            gain = max(min(1.0, 2 / (steps + course.noise)), min(_LEAST, 0.2 / course.noise))
            # As in ridge regression: rare errors, of which few rows tell, must not learn those rows' noise.
            ridge = (_RIDGE + gain * course.noise) * one
            moved = gain * torch.linalg.solve(metric + ridge, told[name].double(), left=False)
            record[name] = self._record.get(name, 0) + moved.to(told[name].dtype)
        return record

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {n: (2, c.outputs, c.errors) for n, c in self.courses.items()}
        for course in self.courses.values():
            shapes[ERRORS] = (course.errors, course.errors)
        return shapes
