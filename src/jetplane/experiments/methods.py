"""The registry of methods: for each one its label, default settings, cost of a step and how its optimizer is built.

The experiments, the command line and the benchmarks read `METHODS`; a new method is one more entry. The settings are
read without torch, which is imported when an optimizer is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import jetplane as jp

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..subspace.descent import Descent

DescentName = Literal["newton", "saddle-free", "damped"]
DESCENT: DescentName = "saddle-free"


@dataclass(frozen=True)
class Settings:
    """Settings of an optimizer. A method reads those that it has.

    Attributes:
        lr: learning rate; for PlaneSearch a factor on its step.
        k: directions that are drawn in each step.
        clip: largest Euclidean norm of a step; None for no limit.
        weight_decay: decoupled weight decay.
        seed: seed of the directions.
        descent: how FoMoH-KD solves its plane.
        eps: what FoMoH adds to the absolute curvature.
        process_group: ranks that take each step in common; None for one process.
    """

    lr: float
    k: int
    clip: float | None = None
    weight_decay: float = 0.0
    seed: int = 0
    descent: str | Descent = DESCENT
    eps: float = 1e-5
    process_group: Any = None


if TYPE_CHECKING:
    Params = Sequence[torch.Tensor]
    Build = Callable[[Params, nn.Module | None, Settings], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """A method of training.

    Attributes:
        title: name in titles, for any number of directions.
        build: makes the optimizer of parameters; the model is for methods that perturb its layers.
        k: directions drawn in each step, by default; 0 for none.
        passes: cost of a step with k directions in plain forward passes of its batch; see `Config.forward_passes`.
        rates: default learning rate by model (and for "rosenbrock"), found on the 8 x 8 digits; 1 where none is given.
        large_rates: the same for MNIST and CIFAR-10, where it differs.
        published: models whose rate is the paper's.
        search: range in which the paper's searches look for the rate, log-uniformly; None where it has none.
        clip: default limit of the norm of a step; 0 for none.
        demo: settings of `jetplane demo` by model; nothing given for a model: not in the demonstration.
        numbered: label by the number of directions; None for the title, followed by the number if it is above one.
        takes_k: whether the number of directions can be set.
        takes_clip: whether the norm of a step can be limited.
        backward: whether the training loop calls ``loss.backward()`` before ``step()``, instead of passing a closure.
        many_processes: whether several processes can take a step in common.
    """

    title: str
    build: Build
    k: int
    passes: Callable[[int], int]
    rates: Mapping[str, float] = field(default_factory=dict)
    large_rates: Mapping[str, float] = field(default_factory=dict)
    published: Sequence[str] = ()
    search: tuple[float, float] | None = None
    clip: float = 0.0
    demo: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbered: str | None = None
    takes_k: bool = True
    takes_clip: bool = True
    backward: bool = False
    many_processes: bool = True

    def label(self, k: int | None = None) -> str:
        """The method with k directions (by default its own number) as a legend names it.

        >>> METHODS["fomoh-kd"].label(2), METHODS["fgd"].label(), METHODS["fgd"].label(10)
        ('FoMoH-2D', 'FGD', 'FGD, 10 directions')
        """
        k = self.k if k is None else k
        if self.numbered is not None:
            return self.numbered.format(k=k)
        return f"{self.title}, {k} directions" if k > 1 else self.title

    def rate(self, data: str, model: str) -> float:
        """Default learning rate of a model on a data set."""
        rates = {**self.rates, **(self.large_rates if data != "digits" else {})}
        return rates.get(model, 1.0)


# --- how optimizers are built -----------------------------------------------------------------------------


def _shared(settings: Settings) -> dict[str, Any]:
    """The arguments that all optimizers of this package have in common."""
    return {
        "lr": settings.lr, "clip": settings.clip, "weight_decay": settings.weight_decay, "seed": settings.seed,
        "process_group": settings.process_group,
    }  # fmt: skip


def _fgd(params: Params, model: nn.Module | None, settings: Settings) -> torch.optim.Optimizer:
    return jp.optim.FGD(params, k=settings.k, **_shared(settings))


def _fomoh(params: Params, model: nn.Module | None, settings: Settings) -> torch.optim.Optimizer:
    return jp.optim.FoMoH(params, k=settings.k, eps=settings.eps, **_shared(settings))


def _fomoh_kd(params: Params, model: nn.Module | None, settings: Settings) -> torch.optim.Optimizer:
    return jp.optim.FoMoHKD(params, k=settings.k, descent=settings.descent, **_shared(settings))


def _fomoh_bp(params: Params, model: nn.Module | None, settings: Settings) -> torch.optim.Optimizer:
    return jp.optim.FoMoHBP(
        params, lr=settings.lr, eps=settings.eps, clip=settings.clip, weight_decay=settings.weight_decay
    )


def _plane_search(params: Params, model: nn.Module | None, settings: Settings) -> torch.optim.Optimizer:
    subspace = [jp.sources.Drawn(settings.k), jp.sources.Averages(), jp.sources.PreviousStep()] if settings.k else None
    return jp.optim.PlaneSearch(params, model, subspace=subspace, **_shared(settings))


def _sgd(params: Params, model: nn.Module | None, settings: Settings) -> torch.optim.Optimizer:
    from torch.optim import SGD

    return SGD(params, lr=settings.lr, weight_decay=settings.weight_decay)


# --- the registry -----------------------------------------------------------------------------------------

_BACKPROP = 3  # forward passes that a forward and a backward pass cost
# Directions of PlaneSearch that are not drawn: 2 averages, the previous step, 2 scaled averages, the first of them in 3
# parts (for a model of three layers or more).
_REMEMBERED = 2 + 1 + (3 + 1)
_ESTIMATES = 8  # forward passes that PlaneSearch spends on estimates of the gradient

METHODS: dict[str, Method] = {
    "fgd": Method(
        "FGD", _fgd, k=1, passes=lambda k: 1 + 2 * k,
        rates={"logreg": 0.02, "mlp": 0.005, "cnn": 0.01, "cnn-bn": 2e-5,
               "rosenbrock": 1e-4},  # the paper's notebook; at 1e-3, in the paper's script, some starts diverge
        large_rates={"logreg": 5e-4, "mlp": 5e-4, "cnn": 1e-4},  # the rate shrinks with the number of parameters
        search=(1e-5, 1e-1),
        demo={"logreg": {"lr": 0.2, "k": 10}, "cnn": {"lr": 0.2, "k": 10, "clip": 1.0}},
    ),
    "fomoh": Method(
        "FoMoH", _fomoh, k=1, passes=lambda k: 1 + 3 * k,
        rates={"logreg": 0.1362, "mlp": 0.3, "cnn": 0.544, "cnn-bn": 0.544}, published=("logreg", "cnn"),
        search=(1e-3, 1.0),
        clip=1.0,  # curvature along a random direction is often near zero, and a step divided by it far too long
        demo={"logreg": {"lr": 4.0, "k": 10, "clip": 1.0}, "cnn": {"lr": 4.0, "k": 10, "clip": 1.0}},
    ),
    "fomoh-kd": Method(
        "FoMoH-KD", _fomoh_kd, k=3, passes=lambda k: (1 + k) ** 2,
        rates={"logreg": 0.3, "mlp": 0.3, "cnn": 0.3, "cnn-bn": 0.3},
        search=(1e-3, 1.0), clip=1.0, numbered="FoMoH-{k}D",
        demo={"logreg": {"lr": 0.6, "k": 10, "clip": 1.0}, "cnn": {"lr": 1.0, "k": 10, "clip": 1.0}},
    ),
    "fomoh-bp": Method(
        "FoMoH-BP", _fomoh_bp, k=1, passes=lambda k: _BACKPROP + 4,  # then the curvature along one dense direction
        rates={"logreg": 1.0, "mlp": 0.5, "cnn": 0.5, "cnn-bn": 0.5},
        search=(1e-2, 1.0), takes_k=False, many_processes=False,
    ),
    "plane-search": Method(
        "PlaneSearch", _plane_search, k=0, passes=lambda k: 1 + 2 * (k + _REMEMBERED) + _ESTIMATES,
        demo={model: {"schedule": "constant"} for model in ("logreg", "cnn")},
    ),
    "sgd": Method(
        "SGD, backprop", _sgd, k=0, passes=lambda k: _BACKPROP,
        rates={"logreg": 0.5, "mlp": 0.2, "cnn": 0.2, "cnn-bn": 0.2}, search=(5e-3, 0.5),
        takes_k=False, takes_clip=False, backward=True, many_processes=False,
        demo={"logreg": {"lr": 0.5}, "cnn": {"lr": 0.2}},
    ),
}  # fmt: skip

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]  # what the command line offers
