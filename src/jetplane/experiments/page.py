"""The report: one self-contained HTML page with interactive curves, tables and the settings of runs."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import plotly
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from ..errors import CheckpointError, RunFolderError
from . import environment, report, store
from .report import COLOURS, STYLES, Finished

WIDTH = 2  # of lines, in pixels
PANELS = {"train_loss": "train loss", "test_loss": "test loss", "test_accuracy": "test accuracy"}


@dataclass(frozen=True)
class Quantity:
    """A quantity that the x axis can show.

    Attributes:
        button: text of its button.
        title: title of the axis.
        of: value of a row of metrics of a run.
    """

    button: str
    title: str
    of: Callable[[Finished, dict[str, Any]], float]

    def values(self, run: Finished) -> list[float]:
        """The value for each row of a run, rounded to six digits."""
        return [float(f"{self.of(run, row):.6g}") for row in run.rows]


QUANTITIES = [
    Quantity("Epochs", "epochs", lambda run, row: row["epoch"]),
    Quantity("Seconds", "seconds of training", lambda run, row: row["seconds"]),
    Quantity("Forward passes", "forward-pass equivalents", lambda run, row: row["epoch"] * run.config.forward_passes),
]


@dataclass(frozen=True)
class Curve:
    """Runs that differ in their seed alone; they share a line style and an entry of the legend."""

    name: str
    colour: str
    pattern: Sequence[float]  # lengths of dashes and gaps in pixels; empty for a solid line
    runs: list[Finished]

    @property
    def dash(self) -> str:
        """The pattern in plotly's notation."""
        return ",".join(f"{length:g}px" for length in self.pattern) or "solid"


def find(folders: Iterable[Path]) -> list[Finished]:
    """The runs in folders, each of them a run folder or a folder with run folders at any depth.

    Raises:
        RunFolderError: a folder is missing or holds no run, or runs cannot be read; the message names all of them.
    """
    runs: dict[Path, Finished] = {}
    wrong: list[str] = []
    for folder in folders:
        inside = [folder] if (folder / "config.json").exists() else _inside(folder)
        if not inside:
            what = (
                "holds no run: expected a config.json in it or below" if folder.is_dir() else "there is no such folder"
            )
            wrong.append(f"{folder}: {what}")
        for one in inside:
            try:
                runs.setdefault(one.resolve(), Finished.read(one))
            except (CheckpointError, RunFolderError) as error:
                wrong.append(str(error))
    if wrong:
        raise RunFolderError("; ".join(wrong))
    return list(runs.values())


def _inside(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("config.json"))


def write(runs: Sequence[Finished], path: Path) -> None:
    """Write the page for some runs.

    Raises:
        RunFolderError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomically(path, render(runs).encode())
    except OSError as error:
        raise RunFolderError(f"{path}: the report cannot be written ({error.strerror})") from error


def render(runs: Sequence[Finished]) -> str:
    """The page as HTML. It includes plotly's JavaScript, and its content security policy forbids network access."""
    folders = _short([run.folder for run in runs])
    problems = dict.fromkeys((run.config.data, run.config.model) for run in runs)
    grouped = {
        problem: _curves([run for run in runs if (run.config.data, run.config.model) == problem])
        for problem in problems
    }
    styled = _styled(grouped)
    sections, script = [], True
    for n, ((data, model), curves) in enumerate(styled.items()):
        drawn = any(run.rows for curve in curves for run in curve.runs)
        figure = _figure(curves, folders) if drawn else None
        sections.append(
            {
                "title": f"{model} on {data}",
                "figure": _html(figure, f"curves-{n}", script) if figure else None,
                "rows": [_row(curve, run, folders[run.folder]) for curve in curves for run in curve.runs],
            }
        )
        script = script and figure is None
    details = [
        {
            "folder": folders[run.folder],
            "label": run.config.label,
            "message": run.result.get("message") if run.status == "diverged" else None,
            "tables": [("Configuration", asdict(run.config)), *_environments(run.folder)],
        }
        for run in runs
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "page.html"
    )
    return template.render(
        sections=sections, details=details, date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=plotly.__version__,
    )  # fmt: skip


def _short(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders relative to their common parent."""
    common = os.path.commonpath([folder.resolve() for folder in folders])
    return {
        folder: os.path.relpath(folder.resolve(), common) if str(folder.resolve()) != common else folder.resolve().name
        for folder in folders
    }


def _curves(runs: Sequence[Finished]) -> list[tuple[str, list[Finished]]]:
    """Runs grouped by their label in the legend, which does not contain the seed."""
    grouped = report.by_seed(runs)
    return list(zip(report.names([alike[0].config for alike in grouped]), grouped, strict=True))


def _styled(grouped: dict[Any, list[tuple[str, list[Finished]]]]) -> dict[Any, list[Curve]]:
    """Curves with their styles; equal names have equal styles in all sections."""
    places = {name: n for n, name in enumerate(dict.fromkeys(name for pairs in grouped.values() for name, _ in pairs))}

    def curve(name: str, runs: list[Finished]) -> Curve:
        n = places[name]
        style = STYLES[n % len(STYLES)]
        pattern = () if style == "-" else tuple(WIDTH * length for length in style[1])
        return Curve(name, COLOURS[n % len(COLOURS)], pattern, runs)

    return {problem: [curve(*pair) for pair in pairs] for problem, pairs in grouped.items()}


def _row(curve: Curve, run: Finished, folder: str) -> dict[str, Any]:
    [cells] = report.table([run])
    epochs = run.rows[-1]["epoch"] if run.rows else 0
    ended = {"finished": "", "diverged": f"diverged after {epochs} of {run.config.epochs} epochs"}
    return {
        "colour": curve.colour, "pattern": " ".join(f"{length:g}" for length in curve.pattern), "name": curve.name,
        "folder": folder, "seed": run.config.seed, "rate": f"{run.config.lr:.4g}", "epochs": cells["epochs"],
        "loss": cells["loss"], "accuracy": cells["accuracy"], "seconds": cells["seconds"],
        "passes": f"{epochs * run.config.forward_passes:,}", "memory": cells["memory"], "status": run.status,
        "note": ended.get(run.status, f"stopped after {epochs} of {run.config.epochs} epochs"),
    }  # fmt: skip


def _environments(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    known = environment.read(folder)
    if known is None:
        return [("Environment", {"": "not recorded"})]
    first = {name: value for name, value in known.items() if name != "resumed"}
    tables = [("Environment", first)]
    for later in known.get("resumed", []):
        changed = {name: value for name, value in later.items() if name != "epoch" and value != first.get(name)}
        tables.append((f"Resumed after epoch {later.get('epoch')}", changed))
    return tables


# --- the figure ---------------------------------------------------------------------------------


def _figure(curves: Sequence[Curve], folders: dict[Path, str]) -> go.Figure:
    """Losses and accuracy in panels one below the other, so that they fit into a narrow window."""
    figure = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    drawn: list[tuple[Finished, slice]] = []  # the run and the rows of each trace
    for curve in curves:
        shown = [run for run in curve.runs if run.rows]
        diverged = any(run.status == "diverged" for run in shown)
        name = html.escape(curve.name + (" (✕ diverged)" if diverged else ""), quote=False)
        for n, run in enumerate(shown):
            common = {"name": name, "legendgroup": name}
            hover = html.escape(f"{curve.name} · {folders[run.folder]}", quote=False)
            for place, (column, title) in enumerate(PANELS.items(), 1):
                y = [row[column] for row in run.rows]
                template = f"{hover}<br>{title} %{{y:.4~g}} at %{{x:.4~g}}<extra></extra>"
                line = go.Scatter(
                    y=y, **common, showlegend=n == 0 and place == 1, hovertemplate=template,
                    mode="lines" if len(y) > 1 else "lines+markers",  # a line of one point is invisible
                    line={"color": curve.colour, "dash": curve.dash, "width": WIDTH},
                )  # fmt: skip
                figure.add_trace(line, row=place, col=1)
                drawn.append((run, slice(None)))
                if run.status == "diverged":
                    marker = {"symbol": "x", "size": 10, "color": curve.colour}
                    cross = go.Scatter(
                        y=y[-1:], **common, showlegend=False, mode="markers", marker=marker,
                        hovertemplate=template.replace("<extra>", "<br>diverged after this epoch<extra>"),
                    )  # fmt: skip
                    figure.add_trace(cross, row=place, col=1)
                    drawn.append((run, slice(-1, None)))
    switches = [_switch(quantity, drawn) for quantity in QUANTITIES]
    restyle, relayout = switches[0]
    for trace, x in zip(figure.data, restyle["x"], strict=True):
        trace.x = x  # type: ignore[attr-defined]
    figure.update_layout(
        template="simple_white", height=220 * len(PANELS) + 150 + 30 * len(curves),
        margin={"l": 10, "r": 10, "t": 80, "b": 10},  # room for plotly's buttons above ours
        font={"size": 13, "color": "#222222", "family": "system-ui, sans-serif"}, hoverlabel={"align": "left"},
        legend={"orientation": "h", "y": -0.09, "yanchor": "top", "x": 0, "itemwidth": 40},
        updatemenus=[
            {
                "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom",
                "pad": {"b": 12, "l": 0}, "showactive": True, "active": 0,
                "buttons": [
                    {"label": quantity.button, "method": "update", "args": list(switch)}
                    for quantity, switch in zip(QUANTITIES, switches, strict=True)
                ],
            }
        ],
    )  # fmt: skip
    figure.update_layout(relayout)
    figure.update_xaxes(showgrid=True, gridcolor="#e4e4e4", automargin=True, tickformat=".4~r", tickangle=0, nticks=10)
    figure.update_yaxes(showgrid=True, gridcolor="#e4e4e4", automargin=True)
    for place, (column, title) in enumerate(PANELS.items(), 1):
        if column == "test_accuracy":
            kind = {"tickformat": ".0%"}
        else:
            values = [row[column] for run, _ in drawn for row in run.rows if 0 < row[column] < math.inf]
            ratio = max(values, default=1.0) / min(values, default=1.0)
            # From one to four powers of ten plotly labels every digit: 1, 2 and 5 are enough.
            kind = {"type": "log", "tickformat": ".3~r", "dtick": "D2" if 4 < ratio < 1e4 else None}
        figure.update_yaxes({"title_text": title, **kind}, row=place, col=1)
    return figure


def _switch(quantity: Quantity, drawn: Sequence[tuple[Finished, slice]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The changes that a button makes: the x of every trace; title and scale of the axes."""
    runs = list({id(run): run for run, _ in drawn}.values())
    ends = [quantity.values(run)[-1] for run in runs]
    kind = "log" if max(ends) > 10 * min(ends) > 0 else "linear"  # on a linear axis short runs would not be visible
    axes = [f"xaxis{n}" if n > 1 else "xaxis" for n in range(1, len(PANELS) + 1)]
    whole = quantity.button == "Epochs" and kind == "linear" and max(ends) <= 10  # no ticks at half epochs
    settings = {
        "type": kind,
        "autorange": True,
        "tickmode": "linear" if whole else "auto",
        "dtick": 1 if whole else None,
    }
    relayout = {f"{axis}.{name}": value for axis in axes for name, value in settings.items()}
    title = quantity.title + (" (log)" if kind == "log" else "")
    return {"x": [quantity.values(run)[part] for run, part in drawn]}, relayout | {f"{axes[-1]}.title.text": title}


def _html(figure: go.Figure, name: str, script: bool) -> str:
    """The figure as an HTML element, with plotly's JavaScript if asked for."""
    buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [buttons]}
    return figure.to_html(full_html=False, include_plotlyjs=script, include_mathjax=False, div_id=name, config=config)
