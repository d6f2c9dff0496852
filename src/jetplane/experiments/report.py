"""Tables and figures of training runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402

from ..errors import RunFolderError  # noqa: E402
from . import store  # noqa: E402
from .config import Config  # noqa: E402

# Okabe and Ito's colours, distinct for colour-blind readers; the line styles are distinct in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES: list[Any] = ["-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1))]
COLUMNS = ("epoch", "train_loss", "test_loss", "test_accuracy", "seconds")  # columns of metrics.jsonl used here


@dataclass(frozen=True)
class Finished:
    """The content of a run folder."""

    folder: Path
    config: Config
    rows: list[dict[str, Any]]
    result: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Finished:
        """Read a run folder.

        Raises:
            CheckpointError: it holds no configuration.
            RunFolderError: it is missing, its files are damaged, or no epoch was finished and the run did not diverge.
        """
        if not folder.is_dir():
            raise RunFolderError(f"{folder}: no such folder")
        config = Config.load(folder / "config.json")
        try:
            rows = store.read_rows(folder / "metrics.jsonl")
            path = folder / "result.json"
            result = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{folder}: its metrics or its result cannot be read ({error})") from error
        if not isinstance(result, dict) or not all(map(_is_row, rows)):
            raise RunFolderError(f"{folder}: expected rows with {', '.join(COLUMNS)} and a result, found other content")
        if not rows and result.get("status") != "diverged":
            raise RunFolderError(f"{folder}: this run has not finished an epoch, so there is nothing to show")
        return Finished(folder, config, rows, result)

    @property
    def status(self) -> str:
        """Either "finished", "diverged" or "stopped"."""
        return self.result.get("status", "stopped")


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), (int, float)) for name in COLUMNS)


def by_seed(runs: Sequence[Finished]) -> list[list[Finished]]:
    """Runs grouped by their configuration without the seed, in the order in which each appears first."""
    groups: dict[Config, list[Finished]] = {}
    for run in runs:
        groups.setdefault(replace(run.config, seed=0), []).append(run)
    return list(groups.values())


def table(runs: Sequence[Finished]) -> list[dict[str, str]]:
    """A row for each configuration: test loss and accuracy of the last epoch, seconds of training and peak memory.

    Runs that differ in the seed alone share a row: mean and standard deviation of their losses and accuracies, their
    mean seconds, and their largest peak of memory.
    """
    return [_row(alike) for alike in by_seed(runs)]


def _row(runs: Sequence[Finished]) -> dict[str, str]:
    last = [run.rows[-1] for run in runs if run.rows]  # a run that diverged in its first epoch has none
    diverged = sum(run.status == "diverged" for run in runs)
    of = f" {diverged} of {len(runs)}" if len(runs) > 1 else ""
    memory = [run.result["peak_memory"] for run in runs if "peak_memory" in run.result]
    return {
        "model": runs[0].config.model,
        "method": runs[0].config.label + (f" — diverged{of}" if diverged else ""),
        "epochs": str(max((row["epoch"] for row in last), default=0)),
        "loss": _mean([row["test_loss"] for row in last], "{:.3f}") if last else "-",
        "accuracy": _mean([100 * row["test_accuracy"] for row in last], "{:.1f}") + " %" if last else "-",
        "seconds": f"{statistics.mean(row['seconds'] for row in last):.1f}" if last else "-",
        "memory": f"{max(memory) / 2**20:.0f} MiB" if memory else "-",
    }


def _mean(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def draw(runs: Sequence[Finished], path: Path, title: str) -> None:
    """Plot test losses over epochs and over seconds, a row of panels for each model.

    Of runs that differ in the seed alone the mean is a line, and the lowest to the highest a band.

    Raises:
        RunFolderError: no run has finished an epoch.
    """
    names = list(dict.fromkeys((run.config.data, run.config.model) for run in runs if run.rows))
    if not names:
        raise RunFolderError("every one of these runs diverged in its first epoch, so there is no curve to draw")
    figure, panels = plt.subplots(
        len(names), 2, figsize=(12, 0.6 + 3.4 * len(names)), squeeze=False, sharey="row", layout="constrained"
    )
    figure.suptitle(title, fontsize=13)
    for (data, model), (left, right) in zip(names, panels, strict=True):
        chosen = by_seed([run for run in runs if run.rows and (run.config.data, run.config.model) == (data, model)])
        _curves(left, chosen, "epoch")
        _curves(right, chosen, "seconds")
        left.set_xlabel("epochs")
        right.set_xlabel("seconds of training")
        left.set_ylabel("test loss")
        left.set_title(f"{model} on {data}", loc="left", fontsize=11)
        right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def names(configs: Sequence[Config]) -> list[str]:
    """The label of each run in a legend: its method and, where runs have the same, the settings that differ."""
    settings = [asdict(config) | {"k": None} for config in configs]  # the label has k
    labels = [config.label for config in configs]

    def name(n: int) -> str:
        alike = [values for values, label in zip(settings, labels, strict=True) if label == labels[n]]
        differ = [key for key in settings[n] if any(values[key] != settings[n][key] for values in alike)]
        return ", ".join([labels[n], *(f"{key.replace('_', ' ')} {_short(settings[n][key])}" for key in differ)])

    return [name(n) for n in range(len(configs))]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(axes: Axes, groups: Sequence[Sequence[Finished]], over: str) -> None:
    labels = names([runs[0].config for runs in groups])
    ends = []
    for n, runs in enumerate(groups):
        shortest = min(len(run.rows) for run in runs)  # the epochs that all of them have finished
        rows = list(zip(*(run.rows[:shortest] for run in runs), strict=True))
        x = [statistics.mean(row[over] for row in epoch) for epoch in rows]
        losses = [[row["test_loss"] for row in epoch] for epoch in rows]
        style, colour = STYLES[n % len(STYLES)], COLOURS[n % len(COLOURS)]
        accuracy = 100 * statistics.mean(run.rows[-1]["test_accuracy"] for run in runs)
        means, label = [statistics.mean(epoch) for epoch in losses], f"{labels[n]}: {accuracy:.1f} %"
        axes.plot(x, means, linestyle=style, color=colour, linewidth=1.8, label=label)
        if len(runs) > 1:
            lowest, highest = [min(epoch) for epoch in losses], [max(epoch) for epoch in losses]
            axes.fill_between(x, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        ends.append(x[-1])
    axes.set_yscale("log")
    rounded_ticks(axes.yaxis)
    if over == "epoch":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if max(ends) > 10 * min(ends) > 0:  # on a linear axis the short runs would not be visible
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def rounded_ticks(axis: Axis) -> None:
    """Put ticks of a logarithmic axis at round numbers; more of them where it spans fewer powers of ten."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if 0 < low < high < math.inf else 1.0
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 4 else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
