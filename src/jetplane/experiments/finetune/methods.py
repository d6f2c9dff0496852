"""What fine-tunes: PlaneSearch, its rivals that need no backward pass, and Adam. A new method is one more entry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ... import optim
from ...errors import ArgumentError, NonFiniteError
from ...gradients import LocalHeads, ResidualStream
from ...optim.plane_search import ROUND
from ...subspace.descent import Damped
from ...subspace.search import FullStep
from ...subspace.sources import Drawn, FastWeights, Subspace
from .. import zeroth_order
from .classifier import TextClassifier

SOFO_DIRECTIONS, SOFO_DAMPING, SOFO_CHUNK = 32, 1e-3, 4
Kind = Literal["forward", "zeroth order", "backprop"]


@dataclass(frozen=True)
class Batch:
    """Some texts: states (n, t, width) and mask (n, t) of the frozen part, and labels (n,)."""

    states: Tensor
    mask: Tensor
    labels: Tensor

    def split(self, size: int) -> list[Batch]:
        """Parts of at most ``size`` texts."""
        parts = zip(self.states.split(size), self.mask.split(size), self.labels.split(size), strict=True)
        return [Batch(*part) for part in parts]


def loss_of(model: TextClassifier, batch: Batch, micro_batch: int | None = None) -> Tensor:
    """The mean cross entropy of a batch, at the memory of so many texts where nothing is kept of them."""
    parts = batch.split(micro_batch or len(batch.labels))
    losses = [F.cross_entropy(model(part.states, part.mask), part.labels, reduction="none") for part in parts]
    return torch.cat(losses).mean()


Step = Callable[[Batch], float]  # takes a step; returns the loss before it, or an estimate of it
Build = Callable[[TextClassifier, float, int, int], Step]  # from the model, the rate, the seed and the micro-batch


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning.

    Attributes:
        title: name in tables.
        kind: what it needs of the model.
        build: makes the function that takes a step.
        rates: published rates by the name of the parameters that train, "" for the others; empty where it takes none.
        search: range in which a search looks for the rate, log-uniformly.
        source: of its formula.
        period: steps after which it has taken all the memory that it ever takes.
    """

    title: str
    kind: Kind
    build: Build
    source: str
    rates: Mapping[str, float] = field(default_factory=dict)
    search: tuple[float, float] | None = None
    period: int = 4  # by then averages remember all directions that they ever do

    def rate(self, parameters: str) -> float | None:
        """The published rate; None for a method without one."""
        return self.rates.get(parameters, self.rates[""]) if self.rates else None


def _by_closure(make: Callable[[list[nn.Parameter], TextClassifier, float, int], Any], in_parts: bool = True) -> Build:
    """A method whose optimizer takes a closure that returns the loss, in parts of a micro-batch or of the whole."""

    def build(model: TextClassifier, rate: float, seed: int, micro_batch: int) -> Step:
        opt, size = make(model.trained, model, rate, seed), micro_batch if in_parts else None
        return lambda batch: float(opt.step(lambda: loss_of(model, batch, size)))

    return build


def _activity_perturbation(params: list[nn.Parameter], model: TextClassifier, rate: float, seed: int) -> Any:
    return optim.PlaneSearch(params, model, seed=seed)


def _local_heads(model: TextClassifier, rate: float, seed: int, micro_batch: int) -> Step:
    """Estimates take the whole batch; a plane, and the audit before the first step, a half of it at a time.

    These carry two numbers where a plain pass has one.
    """
    opt = optim.PlaneSearch(model.trained, model, seed=seed, gradient=LocalHeads())
    audited = False

    def step(batch: Batch) -> float:
        nonlocal audited
        size = len(batch.labels)
        part = size if audited and not opt.plane_next else (size + 1) // 2
        audited = True
        return float(opt.step(lambda: loss_of(model, batch, part)))

    return step


def _residual_stream(model: TextClassifier, rate: float, seed: int, micro_batch: int) -> Step:
    """The error of the frozen read-out along the residual stream, apart for attention and feed-forward network.

    Exact within whole blocks it would be reverse mode, where the last block alone trains.
    """
    plan, estimator = Subspace([FastWeights()], every=ROUND), ResidualStream(exact="sublayer")
    opt = optim.PlaneSearch(model.trained, model, seed=seed, gradient=estimator, subspace=plan)

    def step(batch: Batch) -> float:
        try:
            return float(opt.step(lambda: loss_of(model, batch, micro_batch)))
        except ArgumentError as error:
            raise ArgumentError(f"{error}. Of this command: --method perturbation") from error

    return step


def _plane_search(model: TextClassifier, rate: float, seed: int, micro_batch: int) -> Step:
    """By local heads where the read-out trains, whose gradient they have exactly; else by the read-out's error."""
    build = _local_heads if model.head.weight.requires_grad else _residual_stream
    return build(model, rate, seed, micro_batch)


def _fgd(params: list[nn.Parameter], model: TextClassifier, rate: float, seed: int) -> Any:
    return optim.FGD(params, lr=rate, k=1, seed=seed)


def _sofo(params: list[nn.Parameter], model: TextClassifier, rate: float, seed: int) -> Any:
    drawn = Drawn(min(SOFO_DIRECTIONS, sum(p.numel() for p in params)), tangents="dense")
    plan = Subspace([drawn], chunk=SOFO_CHUNK)
    return optim.PlaneSearch(
        params, lr=rate, subspace=plan, descent=Damped(SOFO_DAMPING), search=FullStep(), seed=seed
    )  # fmt: skip


def _zeroth(kind: type[zeroth_order.ZerothOrder], **settings: Any) -> Build:
    return _by_closure(lambda params, model, rate, seed: kind(params, lr=rate, seed=seed, **settings), in_parts=False)


def _adam(model: TextClassifier, rate: float, seed: int, micro_batch: int) -> Step:
    return _backprop(model, rate, None)


def _adam_checkpointed(model: TextClassifier, rate: float, seed: int, micro_batch: int) -> Step:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return _backprop(model, rate, micro_batch)


def _backprop(model: TextClassifier, rate: float, micro_batch: int | None) -> Step:
    """Adam on gradients of backprop, those of micro-batches added up."""
    opt = torch.optim.Adam(model.trained, lr=rate)

    def step(batch: Batch) -> float:
        opt.zero_grad()
        size, total = len(batch.labels), 0.0
        for part in batch.split(micro_batch or size):
            loss = loss_of(model, part) * (len(part.labels) / size)
            total += loss.item()
            if total - total != 0:
                raise NonFiniteError(f"the loss is not finite: {total}; try a smaller rate")
            loss.backward()
        opt.step()
        return total

    return step


# MeZO's rates are those of RoBERTa-large, the highest of its grid where it has several. They stand for HiZOO's and
# LOZO's, which have published none for adapters and prefixes.
_MEZO = {"lora": 1e-4, "prefix": 1e-2, "": 1e-5}

METHODS: dict[str, Method] = {
    "plane-search": Method("PlaneSearch", "forward", _plane_search, "this package", period=ROUND),
    "perturbation": Method(
        "PlaneSearch by perturbation", "forward", _by_closure(_activity_perturbation), "this package"
    ),
    "fgd": Method("FGD", "forward", _by_closure(_fgd), "arXiv 2202.08587", {"": 1e-4}, (1e-5, 1e-1)),
    "sofo": Method("SOFO's method", "forward", _by_closure(_sofo), "NeurIPS 2024", {"": 0.1}, (1e-2, 1.0)),
    "mezo": Method("MeZO", "zeroth order", _zeroth(zeroth_order.MeZO), "arXiv 2305.17333", _MEZO, (1e-5, 1e-1)),
    "fzoo": Method(
        "FZOO", "zeroth order", _zeroth(zeroth_order.FZOO, eps=1e-4), "arXiv 2506.09034", {"": 5e-5}, (1e-5, 1e-1)
    ),
    "hizoo": Method("HiZOO", "zeroth order", _zeroth(zeroth_order.HiZOO), "arXiv 2402.15173", _MEZO, (1e-5, 1e-1)),
    "lozo": Method("LOZO", "zeroth order", _zeroth(zeroth_order.LOZO), "arXiv 2410.07698", _MEZO, (1e-5, 1e-1)),
    "adam": Method("Adam", "backprop", _adam, "arXiv 1412.6980", {"": 1e-3}, (1e-4, 3e-2)),
    "adam-checkpointed": Method(
        "Adam, checkpointed", "backprop", _adam_checkpointed, "arXiv 1604.06174", {"": 1e-3}, (1e-4, 3e-2)
    ),
}  # fmt: skip


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in METHODS:
        raise ArgumentError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
