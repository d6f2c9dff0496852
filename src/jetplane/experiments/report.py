"""Tables and pictures of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from ..errors import RunFolderError  # noqa: E402
from . import store  # noqa: E402
from .config import Config  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles tell them apart in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES: list[Any] = ["-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1))]


@dataclass(frozen=True)
class Finished:
    """A run as its folder tells it."""

    folder: Path
    config: Config
    rows: list[dict[str, Any]]
    result: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Finished:
        """Read a run folder.

        Raises:
            RunFolderError: it holds no metrics.
        """
        config = Config.load(folder / "config.json")
        rows = store.read_rows(folder / "metrics.jsonl")
        if not rows:
            raise RunFolderError(f"{folder}: no epoch of this run was finished, so there is nothing to show")
        path = folder / "result.json"
        return Finished(folder, config, rows, json.loads(path.read_text()) if path.exists() else {})


def table(runs: Sequence[Finished]) -> list[dict[str, str]]:
    """Test loss and accuracy, seconds and peak memory of each run's last epoch."""
    return [
        {
            "model": run.config.model,
            "method": run.config.label + (" — diverged" if run.result.get("status") == "diverged" else ""),
            "epochs": str(run.rows[-1]["epoch"]),
            "loss": f"{run.rows[-1]['test_loss']:.3f}",
            "accuracy": f"{100 * run.rows[-1]['test_accuracy']:.1f} %",
            "seconds": f"{run.rows[-1]['seconds']:.1f}",
            "memory": f"{run.result['peak_memory'] / 2**20:.0f} MiB" if "peak_memory" in run.result else "-",
        }
        for run in runs
    ]


def draw(runs: Sequence[Finished], path: Path, title: str) -> None:
    """Test loss over epochs and over seconds, a row of panels for each model."""
    names = list(dict.fromkeys((run.config.data, run.config.model) for run in runs))
    figure, panels = plt.subplots(
        len(names), 2, figsize=(12, 0.6 + 3.4 * len(names)), squeeze=False, sharey="row", layout="constrained"
    )
    figure.suptitle(title, fontsize=13)
    for (data, model), (left, right) in zip(names, panels, strict=True):
        chosen = [run for run in runs if (run.config.data, run.config.model) == (data, model)]
        _curves(left, chosen, "epoch")
        _curves(right, chosen, "seconds")
        left.set_xlabel("epochs")
        right.set_xlabel("seconds of training")
        left.set_ylabel("test loss")
        left.set_title(f"{model} on {data}", loc="left", fontsize=11)
        right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _names(runs: Sequence[Finished]) -> list[str]:
    """What a legend calls each run: its method, and where methods repeat, the settings that differ."""
    settings = [asdict(run.config) | {"k": None} for run in runs]  # k is in the label
    differ = [name for name in settings[0] if len({values[name] for values in settings}) > 1 and name != "method"]
    labels = [run.config.label for run in runs]
    return [
        ", ".join([label, *(f"{name.replace('_', ' ')} {values[name]}" for name in differ)])
        if labels.count(label) > 1
        else label
        for label, values in zip(labels, settings, strict=True)
    ]


def _curves(axes: Axes, runs: Sequence[Finished], over: str) -> None:
    names = _names(runs)
    for n, run in enumerate(runs):
        axes.plot(
            [row[over] for row in run.rows],
            [row["test_loss"] for row in run.rows],
            linestyle=STYLES[n % len(STYLES)],
            color=COLOURS[n % len(COLOURS)],
            linewidth=1.8,
            label=f"{names[n]}: {100 * run.rows[-1]['test_accuracy']:.1f} %",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    ends = [run.rows[-1][over] for run in runs]
    if max(ends) > 10 * min(ends) > 0:  # else the short runs are a stroke at the left edge
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
