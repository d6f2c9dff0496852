"""The methods that `convergence` compares: ours, the paper's and SOFO's, zeroth order, backpropagation.

Code of other projects is used if a variable names its tree: FOMOH_SRC that of SRI-CSL/fomoh, the paper's, and
SOFO_SRC that of hennequin-lab/SOFO.
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
from jetplane.gradients import ActivityPerturbation
from jetplane.subspace.descent import Damped
from jetplane.subspace.search import FullStep, NoiseAware
from jetplane.subspace.sources import Averages, Drawn, PreviousStep, Subspace

from .tasks import Batch, Task

Closure = Callable[[], Tensor]
Step = Callable[[Closure, Batch], Any]  # a step on a batch, and the loss before it
PLANE = "plane-search"


@dataclass(frozen=True)
class Trainer:
    """A method at work on a model.

    Attributes:
        step: takes a step; the closure is the loss of the batch.
        write: brings the model's weights up to date, for a method that keeps its own.
    """

    step: Step
    write: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Method:
    """How to train.

    Attributes:
        make: puts the method to work, with a rate.
        rates: by task; "" for all others. None for a method that has no rate.
        reverse: whether it goes backward, and needs losses written for that.
        tasks: those it can do, None for all.
        source: the variable that names the tree of the project it belongs to.
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
    """Our general optimizer; where a loss differentiates the model itself, its layers are left out of it."""

    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        own: dict[str, Any] = {"model": model if task.layers else None} | settings
        opt = jp.optim.PlaneSearch(moving(model), **own)
        return Trainer(lambda closure, batch: opt.step(closure))

    return make


def forward_only(kind: Callable[..., Any], **settings: Any) -> Callable[[nn.Module, Task, float], Trainer]:
    def make(model: nn.Module, task: Task, rate: float) -> Trainer:
        opt = kind(moving(model), lr=rate, **settings)
        return Trainer(lambda closure, batch: opt.step(closure))

    return make


def sofo(model: nn.Module, task: Task, rate: float) -> Trainer:
    """SOFO's method at its published settings for MNIST: K = 340 dense tangents, damping 1e-3, a fixed rate."""
    size = sum(p.numel() for p in moving(model))
    drawn = Drawn(min(340, size), tangents="dense")
    return plane_search(model=None, lr=rate, subspace=[drawn], descent=Damped(1e-3), search=FullStep())(
        model, task, rate
    )


def mezo(model: nn.Module, task: Task, rate: float) -> Trainer:
    """Zeroth order: the loss's difference along one Gaussian direction, redrawn from its seed (MeZO)."""
    params, directions, size = moving(model), jp.Directions(1), 1e-3

    def move(by: float) -> None:
        for i, p in enumerate(params):
            p.add_(directions.combine(i, p, torch.tensor([by])))

    @torch.no_grad()
    def step(closure: Closure, batch: Batch) -> float:
        move(size)
        above = closure().item()
        move(-2 * size)
        below = closure().item()
        move(size - rate * (above - below) / (2 * size))
        directions.step += 1
        return (above + below) / 2

    return Trainer(step)


# --- backpropagation --------------------------------------------------------------------------------------


def _checkpointed(model: nn.Module) -> None:
    """Keep the inputs of the model's parts alone and run each part again in the backward pass.

    A chain of layers is cut into about as many segments as segments have layers, other models at the
    blocks of their lists, or at their children if they have none.
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
    """The paper's own models and steps: along K directions, or one, with their curvature or without."""

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

_FGD = {"logreg": 5e-4, "mlp": 2e-4, "cnn": 1e-4, "": 1e-4}
_FOMOH = {"logreg": 0.1362, "cnn": 0.544, "": 0.3}
_PAPER: dict[str, Any] = {"tasks": ("logreg", "mlp", "cnn"), "source": "FOMOH_SRC"}

METHODS: dict[str, Method] = {
    PLANE: Method(plane_search(), None),
    "FGD": Method(forward_only(jp.optim.FGD), _FGD),
    "FoMoH": Method(forward_only(jp.optim.FoMoH, clip=1.0), _FOMOH),
    "FoMoH-2D": Method(forward_only(jp.optim.FoMoHKD, k=2, descent="saddle-free", clip=1.0), {"": 1.0}),
    "FoMoH-3D": Method(forward_only(jp.optim.FoMoHKD, k=3, descent="saddle-free", clip=1.0), {"": 1.0}),
    "FGD, paper's code": Method(papers_code(1, curved=False), _FGD, **_PAPER),
    "FoMoH, paper's code": Method(papers_code(1), _FOMOH, **_PAPER),
    "FoMoH-2D, paper's code": Method(papers_code(2), {"cnn": 0.05, "": 1.0}, **_PAPER),
    "FoMoH-3D, paper's code": Method(papers_code(3), {"cnn": 0.05, "": 1.0}, **_PAPER),
    "SOFO's method": Method(sofo, {"": 0.1}),
    "SOFO's code": Method(sofos_code, {"": 0.01}, tasks=("logreg", "mlp"), source="SOFO_SRC"),
    "MeZO-style": Method(mezo, _FGD),
    "SGD, backprop": Method(backprop(torch.optim.SGD), {"": 0.1}, reverse=True),
    "Adam, backprop": Method(backprop(torch.optim.Adam), {"": 1e-3}, reverse=True),
    "SGD, checkpointed": Method(backprop(torch.optim.SGD, checkpoints=True), {"": 0.1}, reverse=True),
    "Adam, checkpointed": Method(backprop(torch.optim.Adam, checkpoints=True), {"": 1e-3}, reverse=True),
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
