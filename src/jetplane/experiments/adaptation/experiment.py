"""Accuracy under fifteen corruptions by each way of adaptation: data, models, runs, table and picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adaptation import Adapter
from ..data import fashion_mnist
from . import models
from .corruptions import CORRUPTIONS, corrupted
from .methods import METHODS, Setting

BATCH = 64
TITLES: dict[models.Architecture, str] = {"vit": "ViT", "cnn": "CNN"}
EPOCHS: dict[models.Architecture, int] = {"vit": 5, "cnn": 2}
OBSERVED = 1024  # training images for ranges of activations, and for source statistics of FOA and ZOA
CALIBRATED = 256  # of them for ours, which takes a Jacobian beside
Observe = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """Images (N, 28, 28) from 0 to 1, and labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def fashion_mnist(folder: Path | None) -> Images:
        """Fashion-MNIST of a folder.

        Raises:
            DataError: files are missing or damaged.
        """
        return Images(*fashion_mnist(folder))

    @staticmethod
    def drawn(n: int = 640) -> Images:
        """Ten classes of stripes and squares, for a trial without data."""
        g = torch.Generator().manual_seed(0)
        labels = torch.arange(2 * n) % 10
        y, z = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
        angle = labels[:, None, None] * (torch.pi / 10)
        phase = torch.rand(2 * n, 1, 1, generator=g) * 2 * torch.pi
        waves = torch.sin((y * angle.sin() + z * angle.cos()) * 0.9 + phase)
        middle = torch.exp(-((y - 14) ** 2 + (z - 14) ** 2) / 80)
        images = (waves.clamp_min(0) * middle).clamp(0, 1)
        return Images(images[:n], labels[:n], images[n:], labels[n:])


def prepared(images: Images, model: nn.Module) -> Setting:
    """A model with its 8-bit copy, training images without labels, and our adapter, calibrated on some of them."""
    source = images.train[
        torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:OBSERVED], None
    ]
    small = models.quantized(model, source)
    return Setting(model, small, source, Adapter(small, source[:CALIBRATED]))


def run(
    images: Images,
    setting: Setting,
    seed: int,
    examples: int,
    methods: Sequence[str] = tuple(METHODS),
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    observe: Observe = lambda said: None,
) -> dict[str, Any]:
    """Accuracies (%) and seconds a batch of each method: ``{method: {"accuracy": {corruption: …}, "seconds": …}}``.

    Each corruption starts anew. The seed is that of the test images chosen, of corruptions and of methods.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images.test), generator=generator)[:examples]
    setting = replace(setting, seed=seed)
    found: dict[str, Any] = {name: {"accuracy": {}, "seconds": 0.0} for name in methods}
    labels = images.test_labels[chosen]
    for corruption in corruptions:
        damaged = corrupted(images.test[chosen], corruption, seed)[:, None]
        for name in methods:
            step, start = METHODS[name](setting), time.process_time()
            with torch.no_grad():
                batches = zip(damaged.split(BATCH), labels.split(BATCH), strict=True)
                right = sum(int((step(x).argmax(1) == y).sum()) for x, y in batches)
            found[name]["accuracy"][corruption] = 100 * right / len(chosen)
            found[name]["seconds"] += (time.process_time() - start) / (len(corruptions) * -(-len(chosen) // BATCH))
        observe(corruption)
    return found


def available() -> list[str]:
    """Names of the methods whose packages are installed."""
    return [name for name in METHODS if name != "FOA" or find_spec("cma") is not None]


def trained(name: models.Architecture, images: Images, folder: Path | None, epochs: int | None = None) -> nn.Module:
    """A model trained with seed 0, or read from a folder, where it is kept."""
    path = None if folder is None else folder / f"{name}.pt"
    if path is not None and path.exists():
        model = models.MODELS[name]()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval().requires_grad_(False)
    model = models.train(name, images.train[:, None], images.train_labels, epochs or EPOCHS[name])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def clean_accuracy(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracies (%) on the test images as they are, in floating point and in 8 bits."""
    small = models.quantized(model, images.train[:OBSERVED, None])
    with torch.no_grad():
        right = [int((m(images.test[:, None]).argmax(1) == images.test_labels).sum()) for m in (model, small)]
    return 100 * right[0] / len(images.test), 100 * right[1] / len(images.test)


def mean_accuracy(runs: Sequence[dict[str, Any]], method: str) -> tuple[float, float]:
    """Mean over corruptions and seeds, and the standard deviation of the seeds' means."""
    means = [statistics.mean(run[method]["accuracy"].values()) for run in runs]
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Mean accuracies of each model in Markdown."""
    methods = [m for m in METHODS if all(m in run for runs in found.values() for run in runs)]
    lines = [
        "| method | " + " | ".join(f"{name} | ms a batch" for name in found) + " |",
        "|---|" + "--:|--:|" * len(found),
    ]
    for method in methods:
        cells = []
        for runs in found.values():
            mean, spread = mean_accuracy(runs, method)
            seconds = statistics.mean(run[method]["seconds"] for run in runs)
            cells.append(f"{mean:.1f} ± {spread:.1f} % | {1000 * seconds:.0f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_corruption(runs: Sequence[dict[str, Any]]) -> str:
    """Accuracies of one model under each corruption in Markdown."""
    methods = [m for m in METHODS if m in runs[0]]
    lines = ["| corruption | " + " | ".join(methods) + " |", "|---|" + "--:|" * len(methods)]
    for corruption in runs[0][methods[0]]["accuracy"]:
        means = [statistics.mean(run[m]["accuracy"][corruption] for run in runs) for m in methods]
        best = max(means)
        lines.append(
            f"| {corruption} | " + " | ".join(f"**{m:.0f}**" if m == best else f"{m:.0f}" for m in means) + " |"
        )
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean accuracies with the spread of seeds, and accuracies under each corruption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(5.5 * len(found), 7), layout="constrained", squeeze=False)
    for column, (name, runs) in enumerate(found.items()):
        methods = [m for m in METHODS if m in runs[0]]
        bars, lines = axes[0][column], axes[1][column]
        for n, method in enumerate(methods):
            mean, spread = mean_accuracy(runs, method)
            color = "C3" if method == "Adapter" else str(0.8 - 0.12 * n)
            bars.barh(n, mean, xerr=spread, color=color)
            bars.annotate(f"{mean:.1f}", (mean + spread + 0.5, n), va="center", fontsize=9)
            values = [statistics.mean(run[method]["accuracy"][c] for run in runs) for c in runs[0][method]["accuracy"]]
            style = "o-" if method == "Adapter" else ".--"
            lines.plot(values, style, color=color if method == "Adapter" else f"C{n + 4}", label=method, linewidth=1)
        bars.set_yticks(range(len(methods)), methods)
        bars.invert_yaxis()
        bars.set_xlim(0, 1.15 * bars.get_xlim()[1])
        bars.set_xlabel("mean accuracy, %")
        bars.set_title(name, loc="left")
        lines.set_xticks(
            range(len(runs[0][methods[0]]["accuracy"])), list(runs[0][methods[0]]["accuracy"]), rotation=90
        )
        lines.set_ylabel("accuracy, %")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
