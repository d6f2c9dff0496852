"""Styles that the figures of all experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from ..report import COLOURS, STYLES


def style(n: int, variant: int | None = None) -> dict[str, Any]:
    """Colour and line style of the n-th curve, distinct for colour-blind readers and in grey.

    Args:
        n: number of the curve.
        variant: number of a variant of the curve, with its colour and another line style; None without variants.
    """
    line = n + 2 * (n // len(COLOURS)) if variant is None else variant
    return {"color": COLOURS[n % len(COLOURS)], "linestyle": STYLES[line % len(STYLES)]}


def plain_log(axis: Axis) -> None:
    """Put ticks of a logarithmic axis at 1, 2, 5, 10, ..., as plain numbers; for an axis of a few decades."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Set title and labels, draw a light grid, and remove the upper and the right frame line."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def band(axes: Axes, x: Sequence[float], seeds: Any, log: bool = False, **line: Any) -> None:
    """Plot the mean over seeds and a band of its standard error.

    Args:
        axes: axes to plot on.
        x: (points,), the same for all seeds.
        seeds: values (seeds, points).
        log: plot the geometric mean, for values over orders of magnitude, whose arithmetic mean the worst seed decides.
        line: line style of the mean.
    """
    values = np.log(seeds) if log else np.asarray(seeds)
    mean = values.mean(0)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(mean)
    low, mean, high = (np.exp(v) if log else v for v in (mean - error, mean, mean + error))
    (drawn,) = axes.plot(x, mean, linewidth=1.8, **line)
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
