"""Learning curves of training runs: files, tables, times to a target and the figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from jetplane.experiments.report import COLOURS, STYLES, plt

from .rivals import PLANE

Rows = list[dict[str, float]]
MARKERS = "osD^"


@dataclass
class LearningCurve:
    """The learning curve of one run.

    Attributes:
        method: name of the method.
        seed: seed of weights, batches and directions.
        rate: learning rate; None for a method without one.
        measure: the reported quantity, "accuracy" or an error.
        rows: seconds, steps, epochs, forward passes, held-out loss and measure, and "train", the mean loss of the
            batches since the previous row, each before its step.
        status: "finished", "interrupted", or "diverged" with a reason.
        budget: seconds of training that it was given.
        sweep: training loss at the end of a short run for each rate that was tried; empty without a sweep.
        sweep_seconds: seconds of training of each short run.
        memory: peak memory of training above the weights in bytes; None if it was not measured.
    """

    method: str
    seed: int
    rate: float | None
    measure: str = "accuracy"
    rows: Rows = field(default_factory=list)
    status: str = "finished"
    budget: float = 0.0
    sweep: dict[str, float] = field(default_factory=dict)
    sweep_seconds: float = 0.0
    memory: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training of the whole run."""
        return self.budget or self.rows[-1]["seconds"]

    def at(self, seconds: float) -> dict[str, float] | None:
        """The last row up to a time; None if the run ended before it without diverging."""
        if not self.status.startswith("diverged") and self.seconds < 0.98 * seconds:
            return None
        return next((row for row in reversed(self.rows) if row["seconds"] <= 1.02 * seconds + 0.02), None)

    def when(self, reached: Callable[[dict[str, float]], bool]) -> float | None:
        """The seconds of the first row that satisfies a condition; None if there is none."""
        return next((row["seconds"] for row in self.rows if reached(row)), None)


Results = dict[str, list[LearningCurve]]  # by task


def save(results: Results, machine: str, path: Path) -> None:
    rows = {name: [asdict(c) for c in curves] for name, curves in results.items()}
    path.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


def load(paths: Iterable[Path]) -> tuple[list[str], Results]:
    """Machines and learning curves from files; for equal task, method and seed the last one is kept."""
    machines: list[str] = []
    found: dict[str, dict[tuple[str, int], LearningCurve]] = {}
    for path in paths:
        held = json.loads(path.read_text())
        machines.append(held["machine"])
        for name, curves in held["results"].items():
            for c in curves:
                found.setdefault(name, {})[c["method"], c["seed"]] = LearningCurve(**c)
    return list(dict.fromkeys(machines)), {name: list(curves.values()) for name, curves in found.items()}


def merged(earlier: Results, later: Results) -> Results:
    """The learning curves of both; for equal task, method and seed the later one."""
    out = {name: list(curves) for name, curves in earlier.items()}
    for name, curves in later.items():
        new = {(c.method, c.seed) for c in curves}
        out[name] = [c for c in out.get(name, []) if (c.method, c.seed) not in new] + curves
    return out


def by_method(curves: list[LearningCurve]) -> dict[str, list[LearningCurve]]:
    return {method: [c for c in curves if c.method == method] for method in dict.fromkeys(c.method for c in curves)}


# --- tables -----------------------------------------------------------------------------------------------


def shown(value: float, measure: str) -> str:
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"{value:.3g}"


def _cell(curves: list[LearningCurve], seconds: float) -> str:
    rows = [row for c in curves if (row := c.at(seconds)) is not None]
    if not rows:
        return ""
    measure, values = curves[0].measure, [row["measure"] for row in rows]
    spread = f" ± {shown(max(values) - min(values), measure)}" if len(values) > 1 else ""
    return shown(fmean(values), measure) + spread


def table(name: str, curves: list[LearningCurve]) -> str:
    """Means over seeds at three times, forward passes of a step, and peak memory if it was measured."""
    longest = max(c.seconds for c in curves)
    times = [longest / 16, longest / 4, longest]
    heads = [name, "seeds", "rate", *(f"{t:.3g} s" for t in times), "train loss", "epochs", "forwards a step"]
    measured = any(c.memory is not None for c in curves)
    if measured:
        heads.append("peak above the weights, MiB")
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for method, own in by_method(curves).items():
        last = own[0].rows[-1]
        note = " (diverged)" if any(c.status.startswith("diverged") for c in own) else ""
        cells = [
            method + note,
            str(len(own)),
            "none" if own[0].rate is None else f"{own[0].rate:.3g}",
            *(_cell(own, t) for t in times),
            f"{fmean(c.rows[-1]['train'] for c in own):.3g}" if all("train" in c.rows[-1] for c in own) else "",
            f"{last['epochs']:.3g}",
            f"{last['forwards'] / max(last['steps'], 1):.3g}",
        ]
        if measured:
            cells.append("" if own[0].memory is None else f"{own[0].memory / 2**20:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweeps(name: str, curves: list[LearningCurve]) -> str:
    """The rates that were tried with their training losses; empty without a sweep."""
    swept = {method: own[0] for method, own in by_method(curves).items() if own[0].sweep}
    lines = [
        f"- {method}, {c.sweep_seconds:g} s each: "
        + "; ".join(
            f"**{rate}: {loss:.4g}**" if float(rate) == c.rate else f"{rate}: {loss:.4g}"
            for rate, loss in c.sweep.items()
        )
        for method, c in swept.items()
    ]
    return "\n".join([f"Rates that were tried on {name}, and the train loss at the end:", "", *lines]) if lines else ""


def targets(name: str, curves: list[LearningCurve], at: float | None = None) -> str:
    """Loss and measure of each rival at the end, or at a time, and when plane-search reaches them."""
    methods = by_method(curves)
    ours = methods.pop(PLANE, [])
    if not ours or not methods:
        return ""
    measure = curves[0].measure
    word = measure if measure == "accuracy" else held_out(curves)
    lines = [
        f"| {name} | after | train loss | {PLANE} has it after | times sooner | {word} | {PLANE} has it after "
        "| times sooner |",
        "|---|" + "--:|" * 7,
    ]
    for method, own in methods.items():
        if method.startswith(PLANE):
            continue
        rows = [c.at(at) if at else c.rows[-1] for c in own]
        rows = [row for row in rows if row is not None and row["seconds"] > 0]
        if not rows:
            continue
        seconds = fmean(row["seconds"] for row in rows)
        loss = fmean(row.get("train", math.nan) for row in rows)
        score = fmean(row["measure"] for row in rows)

        def better(row: dict[str, float], score: float = score) -> bool:
            return row["measure"] >= score if measure == "accuracy" else row["measure"] <= score

        sooner = [
            _sooner(seconds, [c.when(lambda row, loss=loss: row.get("train", math.nan) <= loss) for c in ours]),
            _sooner(seconds, [c.when(better) for c in ours]),
        ]
        cells = [method, f"{seconds:.3g} s", f"{loss:.3g}", *sooner[0], shown(score, measure), *sooner[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sooner(seconds: float, ours: list[float | None]) -> tuple[str, str]:
    """The mean time at which our runs reached a target, and ``seconds`` divided by it."""
    reached = [t for t in ours if t is not None]
    if len(reached) < len(ours):
        return "not reached", ""
    mean = fmean(reached)
    return f"{mean:.3g} s", f"{seconds / mean:.3g}" if mean else ""


def report(results: Results, machine: str, at: float | None = None) -> str:
    """All tables."""
    parts = [machine]
    for name, curves in results.items():
        if curves:
            parts += [table(name, curves), targets(name, curves, at), sweeps(name, curves)]
    return "\n\n".join(part for part in parts if part)


# --- the figure ------------------------------------------------------------------------------------------


def held_out(curves: list[LearningCurve]) -> str:
    """What a measure that is no accuracy is called: the loss, where it is the same as that."""
    same = all(row["measure"] == row.get("loss") for c in curves for row in c.rows)
    return "held-out loss" if same else "held-out error"


def _mean(lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[Sequence[float], Sequence[float]]:
    """The mean of curves over the time that they have in common, with as many points as the first one."""
    if len(lines) == 1:
        return lines[0]
    begin, end = max(seconds[0] for seconds, _ in lines), min(seconds[-1] for seconds, _ in lines)
    times = np.geomspace(begin, end, len(lines[0][0]))
    values = [np.interp(np.log(times), np.log(seconds), values) for seconds, values in lines]
    return times.tolist(), np.mean(values, 0).tolist()


def draw(results: Results, path: Path, title: str, costs: bool = False) -> None:
    """Plot the measure over seconds, a panel for each task: of each method the mean of its seeds, and these thin.

    Args:
        results: curves by task.
        path: of the figure.
        title: of the figure.
        costs: plot it over forward-equivalents instead, and what it is at the end over peak memory.
    """
    results = {name: curves for name, curves in results.items() if curves}
    rows = 2 if costs else 1
    figure, panels = plt.subplots(
        rows, len(results), figsize=(1 + 4.4 * len(results), 0.8 + 3.4 * rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=12)
    methods = list(dict.fromkeys(c.method for curves in results.values() for c in curves))
    for column, (name, curves) in zip(panels.T, results.items(), strict=True):
        for method, own in by_method(curves).items():
            n = methods.index(method)
            colour, style = COLOURS[n % len(COLOURS)], STYLES[(2 * (n // len(COLOURS)) + n) % len(STYLES)]
            over, plotted = ("forwards" if costs else "seconds"), [c for c in own if len(c.rows) > 1]
            lines = [([r[over] for r in c.rows[1:]], [_worse(c, r) for r in c.rows[1:]]) for c in plotted]
            for x, y in lines if len(lines) > 1 else ():
                column[0].plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
            marker = MARKERS[n // len(COLOURS) % len(MARKERS)] if costs else None
            if lines:
                width = 2.6 if method == PLANE else 1.6
                column[0].plot(
                    *_mean(lines), color=colour, linestyle=style, linewidth=width, marker=marker, markevery=[-1],
                    label=method,
                )  # fmt: skip
            memory = next((c.memory for c in own if c.memory), None)
            if costs and plotted and memory:
                end = fmean(_worse(c, c.rows[-1]) for c in plotted)
                column[1].plot(memory / 2**20, end, color=colour, marker=marker)
        label = "test error" if curves[0].measure == "accuracy" else held_out(curves)
        column[0].set(title=name, xlabel="forward-equivalents" if costs else "seconds", ylabel=label)
        if costs:
            column[1].set(xlabel="peak memory above weights and data, MiB", ylabel=f"{label} at the end")
        for panel in column:
            panel.set(yscale="log")
            panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
            panel.spines[["top", "right"]].set_visible(False)
        column[0].set(xscale="log")
    named = {
        label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }  # one entry a method, for all panels and seeds
    methods = [m for m in methods if m in named]
    figure.legend([named[m] for m in methods], methods, frameon=False, fontsize=9, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _worse(curve: LearningCurve, row: dict[str, float]) -> float:
    """A row's measure so that less is better."""
    return 1 - row["measure"] if curve.measure == "accuracy" else row["measure"]
