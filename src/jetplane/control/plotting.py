"""Pictures of solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingPackageError
from .solution import PhaseSolution, Solution


def _part_names(parts: Any) -> list[tuple[str, np.ndarray]]:
    layout = parts._layout
    return [(layout.entry(i), parts.all[:, i]) for i in range(layout.size)]


def _style(n: int) -> str:
    """Colours repeat after ten lines; their style does not."""
    return ("-", "--", ":")[n // 10 % 3]


def plot(solution: Solution, path: str | Path | None = None) -> Any:
    """States, controls and costates over time, and the error of each interval of the mesh, of every phase."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for ph in solution.phases.values():
        _phase(axes, ph, len(solution.phases) > 1)
    for axis, title in zip(axes.flat, ("states", "controls", "costates", "error of intervals"), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("time")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        handles, labels = axis.get_legend_handles_labels()
        if 1 < len(labels) <= 16:
            axis.legend(fontsize=7, ncols=1 + (len(labels) > 8), frameon=False)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _phase(axes: Any, ph: PhaseSolution, several: bool) -> None:
    prefix = f"{ph.name}: " if several else ""
    edges = ph.t[0] + (ph.t[-1] - ph.t[0]) * ph.mesh.edges
    dense = np.unique(np.concatenate([np.linspace(ph.t[0], ph.t[-1], 400), edges])).clip(ph.t[0], ph.t[-1])
    x, u = ph.at(dense)
    for axis, parts, nodes in ((axes[0, 0], x, ph.x), (axes[0, 1], u, ph.u)):
        for n, ((name, values), (_, marks)) in enumerate(zip(_part_names(parts), _part_names(nodes), strict=True)):
            [line] = axis.plot(dense, values, _style(n), linewidth=1.4, label=prefix + name)
            if len(ph.t) <= 120:
                axis.plot(ph.t[:-1], marks[:-1], ".", color=line.get_color(), markersize=3)
    for n, (name, values) in enumerate(_part_names(ph.costates)):
        axes[1, 0].plot(ph.t, values, _style(n), linewidth=1.4, label=prefix + name)
    axes[1, 1].stairs(np.maximum(ph.error, 1e-17), edges, fill=True, alpha=0.35)
    axes[1, 1].stairs(np.maximum(ph.error, 1e-17), edges, linewidth=1.0)
    axes[1, 1].set_yscale("log")
