"""Ways to adapt a model at test time, each by its paper: functions that make a step, which predicts a batch.

All but TENT run forward passes of the 8-bit model alone, and as many of them a batch as `PASSES`, if they can use them.
FOA and ZOA compare the features that enter the last layer and the inputs of the other layers with weights, as `Adapter`
does: of the class token in their papers, whose models are larger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...adaptation import NORMALIZATION, Adapter, entropy, moments, weighted_modules
from ...errors import MissingPackageError

PASSES = 12
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What methods are given.

    Attributes:
        model: in floating point.
        quantized: the same in 8 bits.
        source: training images, without labels.
        adapter: ours, as it is before the first batch.
        seed: of what methods draw.
    """

    model: nn.Module
    quantized: nn.Module
    source: Tensor
    adapter: Adapter
    seed: int = 0


def unadapted(setting: Setting) -> Step:
    """The model as it is."""
    return setting.quantized


def norm_statistics(setting: Setting) -> Step:
    """Normalization layers with the statistics of the batch (Schneider et al., arXiv 2006.16971): BatchNorm's own."""
    model = copy.deepcopy(setting.quantized)
    _use_batch_statistics(model)
    return model


def tent(setting: Setting, rate: float = 1e-3) -> Step:
    """TENT (Wang et al., arXiv 2006.10726): entropy by backprop to scales and shifts, in floating point, by Adam."""
    model = copy.deepcopy(setting.model)
    _use_batch_statistics(model)
    params = _affine(model)
    for p in params:
        p.requires_grad_()
    optimizer = torch.optim.Adam(params, lr=rate)

    def step(images: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = model(images)
            optimizer.zero_grad()
            entropy(logits).backward()
            optimizer.step()
        return logits.detach()

    return step


def foa(setting: Setting, weight: float = 0.4) -> Step:
    """FOA (Niu et al., arXiv 2404.01650): prompts by CMA-ES, and features of the last layer shifted back.

    Equations 5 to 9, with their settings. The fitness is the sum of entropies plus ``weight * N / 64`` times squared
    distances of means and standard deviations; a candidate less than `PASSES` is drawn, beside the best so far. Of the
    ViT prompts are three tokens, drawn with deviation one; of the CNN a coarse pattern on the images with deviation a
    tenth, and BatchNorm has the statistics of the batch.

    Raises:
        MissingPackageError: cma is not installed.
    """
    try:
        cma = import_module("cma")
    except ImportError as error:
        raise MissingPackageError("FOA needs cma: pip install 'jetplane[adapt]'") from error
    model = copy.deepcopy(setting.quantized)
    _use_batch_statistics(model)
    observed = _Observed(model, setting.source)
    shape, sigma = ((3, observed.width), 1.0) if hasattr(model, "token") else ((7, 7), 0.1)
    size = torch.Size(shape).numel()
    search = cma.CMAEvolutionStrategy(
        size * [0.0], sigma, {"popsize": PASSES - 1, "verbose": -9, "seed": setting.seed + 1}
    )
    state: dict[str, Any] = {"best": torch.zeros(size).double().numpy(), "mean": None}

    def step(images: Tensor) -> Tensor:
        found, means, fitness = (torch.inf, Tensor()), [], []
        candidates = [*search.ask(), state["best"]]
        for candidate in candidates:
            model.prompts = torch.as_tensor(candidate).float().reshape(shape)  # type: ignore[assignment]
            logits, statistics, features = observed(images)
            loss = len(images) * entropy(logits) + weight * len(images) / 64 * observed.distance(statistics)
            fitness.append(float(loss))
            means.append(features.mean(0))
            if fitness[-1] < found[0]:
                found = fitness[-1], features
                state["best"] = candidate
        search.tell(candidates, fitness)
        shift = 0 if state["mean"] is None else observed.mean - state["mean"]
        mean = torch.stack(means).mean(0)
        state["mean"] = mean if state["mean"] is None else 0.9 * state["mean"] + 0.1 * mean
        return model.head(found[1] + shift)  # type: ignore[operator]

    return step


def zoa(setting: Setting, weight: float = 30.0, size: float = 0.01, rate: float = 5e-3) -> Step:
    """ZOA (Deng et al., arXiv 2508.02180): scales and shifts by one-sided simultaneous perturbations.

    The loss is the mean entropy plus ``weight`` times mean squared distances of means and standard deviations. The
    first pass predicts, with features of the last layer shifted back as in FOA; `PASSES` - 1 perturbations, with
    entries uniform in ±[1/2, 1], are averaged. What it keeps of earlier domains has no use where there is one.
    """
    model = copy.deepcopy(setting.quantized)
    _use_batch_statistics(model)
    params = _affine(model)
    observed = _Observed(model, setting.source)
    generator = torch.Generator().manual_seed(setting.seed)
    state: dict[str, Any] = {"mean": None}

    def loss(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, statistics, features = observed(images)
        return entropy(logits) + weight * observed.distance(statistics) / observed.numbers, features

    def step(images: Tensor) -> Tensor:
        before, features = loss(images)
        shift = 0 if state["mean"] is None else observed.mean - state["mean"]
        logits = model.head(features + shift)  # type: ignore[operator]
        gradient = perturbed(lambda: loss(images)[0], params, before, size, PASSES - 1, generator)
        for p, g in zip(params, gradient, strict=True):
            p.sub_(rate * g)
        mean = features.mean(0)
        state["mean"] = mean if state["mean"] is None else 0.9 * state["mean"] + 0.1 * mean
        return logits

    return step


def restored(setting: Setting) -> Step:
    """The start of each step of ours, alone: normalization layers with the moments of the source."""
    return setting.adapter.restarted().predicted


def plane(setting: Setting) -> Step:
    """Ours: `jetplane.Adapter`."""
    return setting.adapter.restarted()


METHODS: dict[str, Callable[[Setting], Step]] = {
    "no adaptation": unadapted,
    "norm statistics": norm_statistics,
    "TENT, backprop, fp32": tent,
    "FOA": foa,
    "ZOA": zoa,
    "Adapter, moments alone": restored,
    "Adapter": plane,
}


def perturbed(
    loss: Callable[[], Tensor], params: list[Tensor], value: Tensor, size: float, n: int, generator: torch.Generator
) -> list[Tensor]:
    """The gradient by n simultaneous perturbations v: the mean of ``(L(p + size v) - value) / (size v)``."""
    kept, total = [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    for _ in range(n):
        moved = [_signed(p, generator) for p in params]
        for p, k, v in zip(params, kept, moved, strict=True):
            p.copy_(k + size * v)
        difference = loss() - value
        for t, v in zip(total, moved, strict=True):
            t.add_(difference / (n * size * v))
    for p, k in zip(params, kept, strict=True):
        p.copy_(k)
    return total


# --- parts ---------------------------------------------------------------------------------------------------------


def _use_batch_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None


def _affine(model: nn.Module) -> list[Tensor]:
    return [p for m in model.modules() if isinstance(m, NORMALIZATION) for p in m.parameters()]


def _signed(like: Tensor, generator: torch.Generator) -> Tensor:
    size = 0.5 + 0.5 * torch.rand(like.shape, generator=generator)
    return torch.where(torch.rand(like.shape, generator=generator) < 0.5, -size, size)


class _Observed:
    """Runs a model whose last layer is ``head``, with moments of what enters layers with weights, and of the source."""

    def __init__(self, model: nn.Module, source: Tensor) -> None:
        self.model, self.layers = model, list(weighted_modules(model))[1:]
        self.seen: list[Tensor] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda module, args: self.seen.append(args[0]))
        _, self.source, features = self(source)
        self.mean, self.width = features.mean(0), features.shape[1]
        self.numbers = sum(len(m) for m, _ in self.source)

    def __call__(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """Logits, moments, and features that enter the last layer."""
        self.seen.clear()
        logits = self.model(images)
        return logits, [moments(None, x) for x in self.seen], self.seen[-1]

    def distance(self, statistics: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of squared distances of means and of standard deviations."""
        pairs = zip(statistics, self.source, strict=True)
        return torch.stack([(a - b).square().sum() for found, wanted in pairs for a, b in zip(found, wanted)]).sum()  # noqa: B905
