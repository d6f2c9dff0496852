"""One run: a method, a rate and a seed for a budget of seconds; what it reaches, and what memory its steps take."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import NonFiniteError, SingularPlaneError
from .. import memory
from .classifier import TextClassifier
from .frozen import States
from .methods import Batch, loss_of, method_of
from .options import Settings
from .parameters import choose

SCORED = 50  # texts that are scored at a time
Observer = Callable[[float, float], None]  # (seconds trained, loss)


@dataclass(frozen=True)
class Task:
    """What all methods have in common.

    Attributes:
        model: the classifier, of which nothing trains yet.
        states: of all texts, in the order of train, dev and test.
        labels: likewise, (N,).
        sizes: of train, dev and test.
    """

    model: TextClassifier
    states: States
    labels: Tensor
    sizes: tuple[int, int, int]

    def places(self, part: Literal["train", "dev", "test"]) -> Tensor:
        """The places of a part's texts among all."""
        parts = torch.arange(len(self.labels)).split(self.sizes)
        return parts[("train", "dev", "test").index(part)]

    def batch(self, places: Tensor) -> Batch:
        """The texts at these places."""
        return Batch(*self.states.read(places), self.labels[places])

    def prepared(self, settings: Settings, seed: int) -> TextClassifier:
        """A copy of the classifier in which the parameters that train are chosen."""
        model = copy.deepcopy(self.model)
        choose(model, settings.parameters, seed, settings.rank, settings.prefix, settings.targets)
        return model

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches of the training texts, each text once in an epoch."""
        generator, train = torch.Generator().manual_seed(seed), self.places("train")
        while True:
            for chosen in torch.randperm(len(train), generator=generator).split(size):
                yield self.batch(train[chosen])


@dataclass
class Outcome:
    """What a run has reached.

    Attributes:
        method: its name in `methods.METHODS`.
        seed: of initial weights, batches and the method's random numbers.
        rate: None for a method without one.
        status: "finished", or "failed" where the loss or a step was not finite. Its weights are then those of the best
            score before.
        message: why it failed.
        seconds: trained.
        steps: taken.
        dev: best accuracy on the dev texts.
        test: accuracy of these weights on the test texts; NaN if it was not asked for.
        curve: a row for each score: seconds, steps, mean training loss since the last row, accuracy on dev.
        weights: the parameters that train, where dev was best, by their names in the classifier.
    """

    method: str
    seed: int
    rate: float | None
    status: str = "finished"
    message: str = ""
    seconds: float = 0.0
    steps: int = 0
    dev: float = math.nan
    test: float = math.nan
    curve: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Outcome:
        """What `plain` has been made of, without weights."""
        absent = {name: math.nan for name in ("dev", "test") if plain[name] is None}
        return Outcome(**{**plain, **absent})

    def plain(self) -> dict[str, Any]:
        """A dictionary that JSON can represent, without the weights."""
        kept = asdict(self) | {"weights": None}
        return {name: None if value != value else value for name, value in kept.items() if name != "weights"}


def accuracy(model: TextClassifier, task: Task, places: Tensor) -> float:
    """The share of these texts whose class has the highest logit."""
    right = 0
    with torch.inference_mode():
        for chosen in places.split(SCORED):
            batch = task.batch(chosen)
            right += int((model(batch.states, batch.mask).argmax(1) == batch.labels).sum())
    return right / len(places)


def run(
    task: Task, name: str, settings: Settings, rate: float | None, seed: int, dev: Tensor | None = None,
    tested: bool = True, observe: Observer = lambda seconds, loss: None,
) -> Outcome:  # fmt: skip
    """Train with a method until the seconds are spent, and score.

    Args:
        task: the texts and the model.
        name: of the method.
        settings: of all runs.
        rate: of the method; None for its published one.
        seed: of everything that is drawn.
        dev: places of the texts that choose; None for all of dev.
        tested: whether the test texts are scored.
        observe: called after each step.
    """
    method = method_of(name)
    rate = method.rate(settings.parameters) if rate is None else rate
    model = task.prepared(settings, seed)
    step = method.build(model, 1.0 if rate is None else rate, seed, settings.micro_batch)
    dev = task.places("dev") if dev is None else dev
    clock = time.process_time if settings.clock == "processor" else time.perf_counter
    outcome, losses, due = Outcome(name, seed, rate), [], 1

    def score() -> None:
        found = accuracy(model, task, dev)
        mean = sum(losses) / max(len(losses), 1)
        outcome.curve.append({"seconds": outcome.seconds, "steps": outcome.steps, "train": mean, "dev": found})
        losses.clear()
        if not found <= outcome.dev:
            outcome.dev = found
            outcome.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    for batch in task.batches(settings.batch, seed):
        start = clock()
        try:
            losses.append(step(batch))
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"the loss is {losses[-1]}")
        except (NonFiniteError, SingularPlaneError) as error:
            outcome.status, outcome.message = "failed", str(error)
            break
        outcome.seconds += clock() - start
        outcome.steps += 1
        observe(outcome.seconds, losses[-1])
        if outcome.seconds >= settings.seconds * due / settings.scores:
            score()
            due = int(outcome.seconds / settings.seconds * settings.scores) + 1
        if outcome.seconds >= settings.seconds:
            break
    if not outcome.weights:  # it failed before its first score
        outcome.weights = {
            n: p.detach() for n, p in task.prepared(settings, seed).named_parameters() if p.requires_grad
        }
        model.load_state_dict(outcome.weights, strict=False)
        outcome.dev = accuracy(model, task, dev)
    if tested:
        model.load_state_dict(outcome.weights, strict=False)
        outcome.test = accuracy(model, task, task.places("test"))
    return outcome


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes, beyond the interpreter, the libraries and the batch.

    Attributes:
        weights: of the classifier that trains.
        inference: of a pass without training over the same batch, its weights included.
        training: of a method's `period` of steps, weights and all that it keeps included.
    """

    weights: int
    inference: int
    training: int


def measure(task: Task, name: str, settings: Settings) -> Memory:
    """What memory a method takes. To be called in a process of its own."""
    method, batch = method_of(name), next(task.batches(settings.batch, 0))
    rate = method.rate(settings.parameters) or 1.0

    def steps(model: TextClassifier, batch: Batch) -> None:
        step = method.build(model, rate, 0, settings.micro_batch)
        for _ in range(method.period):
            step(batch)

    steps(task.prepared(settings, 0), batch.split(2)[0])  # what code, libraries and threads take once
    model = task.prepared(settings, 0)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    memory.give_back()
    before = memory.reset_peak()
    with torch.inference_mode():
        loss_of(model, batch)
    inference = weights + memory.peak() - before
    memory.give_back()
    before = memory.reset_peak()
    steps(model, batch)
    return Memory(weights, inference, weights + memory.peak() - before)
