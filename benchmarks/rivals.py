"""The methods that `convergence` compares: ours, the paper's and SOFO's, zeroth order, backpropagation.

The code of other projects is used if an environment variable names its source tree: FOMOH_SRC for SRI-CSL/fomoh, the
paper's, and SOFO_SRC for hennequin-lab/SOFO.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import jetplane as jp
from jetplane.experiments import methods
from jetplane.experiments.zeroth_order import MeZO
from jetplane.gradients import ActivityPerturbation, LocalHeads, ResidualStream
from jetplane.subspace.descent import Damped
from jetplane.subspace.search import FullStep, NoiseAware
from jetplane.subspace.sources import Averages, Drawn, FastWeights, PreviousStep, Subspace

from .local_rivals import ActivationGuided, AlignedFeedback, MonoForward
from .tasks import Batch, Task

Closure = Callable[[], Tensor]
Step = Callable[[Closure, Batch], Any]  # a step on a batch, and the loss before it
PLANE = "plane-search"
HEADS = f"{PLANE}, local heads"
EACH = f"{HEADS}, a plane in each step"
STREAM = f"{PLANE}, residual stream"
SLOW_STREAM = f"{STREAM}, fast weights at 1e-3"
BLOCKWISE = f"{STREAM}, one block at a time"
MONO, GRAPE, AGZO = "local heads, Adam", "aligned feedback (GrAPE)", "AGZO"
ADAM, CHECKPOINTED = "Adam, backprop", "Adam, checkpointed"
FAST_MONO, FAST_ADAM = f"{MONO} at 3e-3", f"{ADAM} at 3e-3"  # the rate of our own fast weights


@dataclass(frozen=True)
class Trainer:
    """A method that trains a model.

    Attributes:
        step: takes a step; the closure computes the loss of the batch.
        write: copies the weights to the model, for a method that keeps its own.
    """

    step: Step
    write: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Method:
    """A method of training.

    Attributes:
        make: makes the trainer of a model for a task, with a learning rate.
        rates: learning rates by task; "" for all others. None for a method without one.
        reverse: whether it uses reverse mode, and the loss that is written for it.
        tasks: tasks that it supports; None for all.
        source: environment variable that names the source tree of its project; None for none.
    """

    make: Callable[[nn.Module, Task, float], Trainer]
    rates: dict[str, float] | None
    reverse: bool = False
    tasks: tuple[str, ...] | None = None
    source: str | None = None

    def rate(self, task: str) -> float:
        return 1.0 if self.rates is None else self.rates.get(task, self.rates[""])


def moving(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# --- ours -------------------------------------------------------------------------------------------------


def plane_search(**settings: Any) -> Callable[[nn.Module, Task, float], Trainer]:
    """PlaneSearch; without its model where the loss differentiates the model, so that layers cannot be perturbed."""

    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        own: dict[str, Any] = {"model": model if task.layers else None} | settings
        opt = jp.optim.PlaneSearch(moving(model), **own)
        return Trainer(lambda closure, batch: opt.step(closure))

    return make


def registered(name: str, k: int | None = None) -> Callable[[nn.Module, Task, float], Trainer]:
    """A method of the registry with its defaults and a rate."""
    method = methods.METHODS[name]

    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        settings = methods.Settings(rate, method.k if k is None else k, clip=method.clip or None)
        opt: Any = method.build(moving(model), model, settings)
        return Trainer(lambda closure, batch: opt.step(closure))

    return make


def label(name: str, k: int | None = None) -> str:
    return methods.METHODS[name].label(k)


def sofo(model: nn.Module, task: Task, rate: float) -> Trainer:
    """SOFO's method with its published settings for MNIST: K = 340 dense tangents, damping 1e-3, a fixed rate."""
    size = sum(p.numel() for p in moving(model))
    drawn = Drawn(min(340, size), tangents="dense")
    return plane_search(model=None, lr=rate, subspace=[drawn], descent=Damped(1e-3), search=FullStep())(
        model, task, rate
    )


def mezo(model: nn.Module, task: Task, rate: float) -> Trainer:
    """Zeroth order: MeZO."""
    opt = MeZO(moving(model), lr=rate)
    return Trainer(lambda closure, batch: opt.step(closure))


# --- without a global backward pass ------------------------------------------------------------------------


def local(kind: Callable[[nn.Module, float], Any]) -> Callable[[nn.Module, Task, float], Trainer]:
    """A rival that takes inputs and targets, and needs no closure."""

    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        rival = kind(model, rate)
        return Trainer(lambda closure, batch: rival.step(*batch))

    return make


def agzo(model: nn.Module, task: Task, rate: float) -> Trainer:
    rival = ActivationGuided(model, rate)
    return Trainer(lambda closure, batch: rival.step(closure))


# --- backpropagation --------------------------------------------------------------------------------------


def _checkpointed(model: nn.Module) -> None:
    """Checkpoint activations: keep the inputs of the model's parts, and run each part again in the backward pass.

    A `Sequential` is cut into about as many segments as a segment has layers. The parts of other models are the
    elements of their module lists, or their children if they have none.
    """
    if isinstance(model, nn.Sequential):
        segments = max(1, round(math.sqrt(len(model))))
        whole = list(model)
        model.forward = lambda input: checkpoint_sequential(whole, segments, input, use_reentrant=False)
        return
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = [block for m in lists for block in m if any(True for _ in block.children())]
    for part in blocks or list(model.children()):
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)  # pyright: ignore


def backprop(
    kind: Callable[..., torch.optim.Optimizer], checkpoints: bool = False
) -> Callable[[nn.Module, Task, float], Trainer]:
    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        if checkpoints:
            _checkpointed(model)
        optimizer = kind(moving(model), lr=rate)

        def step(closure: Closure, batch: Batch) -> Tensor:
            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Trainer(step)

    return make


# --- other projects' code ---------------------------------------------------------------------------------


def _module(variable: str, folder: str, name: str) -> Any:
    path = os.path.join(os.environ[variable], folder)
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module(name)


def papers_code(k: int, curved: bool = True) -> Callable[[nn.Module, Task, float], Trainer]:
    """The paper's own models and steps, along one direction or K of them, with or without curvature."""

    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        library, steps = _module("FOMOH_SRC", "src", "fomoh.nn"), _module("FOMOH_SRC", "src", "fomoh.opt")
        assert isinstance(model, nn.Sequential)
        widths = [m.in_features for m in model if isinstance(m, nn.Linear)]
        flat = isinstance(model[0], nn.Flatten)
        if not flat:
            own = library.CNNModel()
        else:
            own = library.LogisticRegressionModel(widths[0], 10)
            own = own if len(widths) == 1 else library.DenseModel([*widths, 10])
        own.nn_module_to_htorch_model(copy.deepcopy(model), verbose=False)  # it takes over the memory
        optimizer = torch.optim.SGD(list(own.params.values()), lr=rate)

        def loss(out: Any, labels: Any) -> Any:  # its logistic regression ends in log-probabilities
            return library.nll_loss(out if len(widths) == 1 else out.logsoftmax(-1), labels)

        def step(closure: Closure, batch: Batch) -> float:
            x, y = batch[0].flatten(1) if flat else batch[0], batch[1]
            if k > 1:
                return float(steps.optimizer_step_plane_Nd(own, loss, 1, x, y, N=k, lr=rate)[0])
            x, y = library.htorch(x), library.htorch(y)
            return library.optimizer_step(own, loss, optimizer, 1, x, y, hess=curved, epsilon=1e-5)[0].real.item()

        @torch.no_grad()
        def write() -> None:
            for p, q in zip(model.parameters(), own.params.values(), strict=True):
                p.copy_(q.t() if p.dim() == 2 else q)

        return Trainer(step, write)

    return make


def sofos_code(model: nn.Module, task: Task, rate: float) -> Trainer:
    """SOFO's own step with its settings for MNIST."""
    api = _module("SOFO_SRC", "pytorch", "api")
    params = {name: p.detach() for name, p in model.named_parameters()}  # the model's own memory
    generator = torch.Generator().manual_seed(torch.initial_seed())

    def step(closure: Closure, batch: Batch) -> float:
        x, y = batch
        loss, change, _ = api.value_and_sofo_grad(
            lambda params: functional_call(model, params, (x,)), lambda out: F.cross_entropy(out, y),
            tangent_size=340, damping=1e-3, classification=True,
        )(generator, params)  # fmt: skip
        with torch.no_grad():
            for name, p in params.items():
                p.sub_(change[name], alpha=rate)
        return loss.item()

    return Trainer(step)


# --- all of them ------------------------------------------------------------------------------------------

_FGD = {**methods.METHODS["fgd"].large_rates, "mlp": 2e-4, "": 1e-4}
_FOMOH = {"": methods.METHODS["fomoh"].rates["mlp"]} | {
    model: methods.METHODS["fomoh"].rates[model] for model in methods.METHODS["fomoh"].published
}
_SEQUENTIAL = ("logreg", "mlp", "cnn")
_TRANSFORMERS = ("characters", "gpt2", "llama")
_PAPER: dict[str, Any] = {"tasks": _SEQUENTIAL, "source": "FOMOH_SRC"}

LEAN = [Averages(decays=(0.9,)), PreviousStep()]

METHODS: dict[str, Method] = {
    PLANE: Method(plane_search(), None),
    HEADS: Method(plane_search(gradient=LocalHeads()), None, tasks=(*_SEQUENTIAL, *_TRANSFORMERS, "lora")),
    EACH: Method(plane_search(gradient=LocalHeads(rate=1e-2), subspace=LEAN), None, tasks=("characters", "lora")),
    STREAM: Method(plane_search(gradient=ResidualStream()), None, tasks=(*_TRANSFORMERS, "lora")),
    SLOW_STREAM: Method(
        plane_search(gradient=ResidualStream(), subspace=Subspace([FastWeights(rate=1e-3)], chunk=1, every=16)),
        None,
        tasks=_TRANSFORMERS,
    ),
    BLOCKWISE: Method(plane_search(gradient=ResidualStream(recompute=True)), None, tasks=(*_TRANSFORMERS, "lora")),
    MONO: Method(local(MonoForward), {"": 1e-3}, tasks=_SEQUENTIAL),
    FAST_MONO: Method(local(MonoForward), {"": 3e-3}, tasks=_SEQUENTIAL),
    GRAPE: Method(local(AlignedFeedback), {"": 1e-3}, tasks=_SEQUENTIAL),
    AGZO: Method(agzo, {"": 1e-4}),
    label("fgd"): Method(registered("fgd"), _FGD),
    label("fomoh"): Method(registered("fomoh"), _FOMOH),
    label("fomoh-kd", 2): Method(registered("fomoh-kd", 2), {"": 1.0}),
    label("fomoh-kd", 3): Method(registered("fomoh-kd", 3), {"": 1.0}),
    f"{label('fgd')}, paper's code": Method(papers_code(1, curved=False), _FGD, **_PAPER),
    f"{label('fomoh')}, paper's code": Method(papers_code(1), _FOMOH, **_PAPER),
    f"{label('fomoh-kd', 2)}, paper's code": Method(papers_code(2), {"cnn": 0.05, "": 1.0}, **_PAPER),
    f"{label('fomoh-kd', 3)}, paper's code": Method(papers_code(3), {"cnn": 0.05, "": 1.0}, **_PAPER),
    "SOFO's method": Method(sofo, {"": 0.1}),
    "SOFO's code": Method(sofos_code, {"": 0.01}, tasks=("logreg", "mlp"), source="SOFO_SRC"),
    "MeZO-style": Method(mezo, _FGD),
    label("sgd"): Method(backprop(torch.optim.SGD), {"": 0.1}, reverse=True),
    ADAM: Method(backprop(torch.optim.Adam), {"": 1e-3}, reverse=True),
    FAST_ADAM: Method(backprop(torch.optim.Adam), {"": 3e-3}, reverse=True),
    "SGD, checkpointed": Method(backprop(torch.optim.SGD, checkpoints=True), {"": 0.1}, reverse=True),
    CHECKPOINTED: Method(backprop(torch.optim.Adam, checkpoints=True), {"": 1e-3}, reverse=True),
}


_ABLATIONS: dict[str, dict[str, Any]] = {
    "without the layers' noise: 64 drawn directions": {"model": None},
    "without feedback": {"gradient": ActivityPerturbation(feedback=False)},
    "without scaled averages": {"subspace": [Averages(scaled=False), PreviousStep()]},
    "without groups of layers": {"subspace": [Averages(groups=1), PreviousStep()]},
    "without the previous step": {"subspace": [Averages()]},
    "without the longer average": {"subspace": [Averages((0.9,)), PreviousStep()]},
    "whole steps": {"search": FullStep()},
    "rates down to a thousandth": {"search": NoiseAware()},
    "at least half of a step": {"search": NoiseAware(floor=0.5)},
    "with 8 drawn directions": {"subspace": [Drawn(8), Averages(), PreviousStep()]},
    "twice the passes": {"gradient": ActivityPerturbation(passes=16.0)},
    "exact curvature": {"subspace": Subspace(curvature="hessian")},
    "one direction at a time": {"subspace": Subspace(chunk=1)},
}
ABLATIONS = {name: Method(plane_search(**settings), None) for name, settings in _ABLATIONS.items()}
