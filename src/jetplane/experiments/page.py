"""The report: one HTML page, complete in itself, with interactive curves, tables and all settings of runs."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import plotly
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from ..errors import CheckpointError, RunFolderError
from . import environment, report, store
from .config import Config
from .report import COLOURS, STYLES, Finished

WIDTH = 2  # of a line, pixels
PANELS = {"train_loss": "train loss", "test_loss": "test loss", "test_accuracy": "test accuracy"}


@dataclass(frozen=True)
class Unit:
    """What the x axis may count: a button's text, the axis's title and the value of a row."""

    button: str
    title: str
    of: Callable[[Finished, dict[str, Any]], float]

    def values(self, run: Finished) -> list[float]:
        """The x of each row of a run."""
        return [float(f"{self.of(run, row):.6g}") for row in run.rows]


UNITS = [
    Unit("Epochs", "epochs", lambda run, row: row["epoch"]),
    Unit("Seconds", "seconds of training", lambda run, row: row["seconds"]),
    Unit("Forward passes", "forward-pass equivalents", lambda run, row: row["epoch"] * run.config.forward_passes),
]


@dataclass(frozen=True)
class Curve:
    """Runs that differ in nothing but their seed: one line style, one entry of the legend."""

    name: str
    colour: str
    pattern: Sequence[float]  # lengths of strokes and gaps in pixels; empty for a line without gaps
    runs: list[Finished]

    @property
    def dash(self) -> str:
        """The pattern as plotly takes it."""
        return ",".join(f"{length:g}px" for length in self.pattern) or "solid"


def find(folders: Iterable[Path]) -> list[Finished]:
    """The runs in folders, each a run folder or one that holds run folders at any depth.

    Raises:
        RunFolderError: a folder is missing or holds no run, or runs in it cannot be shown; all are named.
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
    """Write the page of some runs.

    Raises:
        RunFolderError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_whole(path, render(runs).encode())
    except OSError as error:
        raise RunFolderError(f"{path}: the report cannot be written ({error.strerror})") from error


def render(runs: Sequence[Finished]) -> str:
    """The page as text. It loads nothing: plotly's program lies inside, and the page forbids the network."""
    folders = _short([run.folder for run in runs])
    problems = dict.fromkeys((run.config.data, run.config.model) for run in runs)
    grouped = {
        problem: _curves([run for run in runs if (run.config.data, run.config.model) == problem])
        for problem in problems
    }
    styled = _styled(grouped)
    sections, program = [], True
    for n, ((data, model), curves) in enumerate(styled.items()):
        drawn = any(run.rows for curve in curves for run in curve.runs)
        figure = _figure(curves, folders) if drawn else None
        sections.append(
            {
                "title": f"{model} on {data}",
                "figure": _html(figure, f"curves-{n}", program) if figure else None,
                "rows": [_row(curve, run, folders[run.folder]) for curve in curves for run in curve.runs],
            }
        )
        program = program and figure is None
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
    """Names of the folders without what they have in common."""
    common = os.path.commonpath([folder.resolve() for folder in folders])
    return {
        folder: os.path.relpath(folder.resolve(), common) if str(folder.resolve()) != common else folder.resolve().name
        for folder in folders
    }


def _curves(runs: Sequence[Finished]) -> list[tuple[str, list[Finished]]]:
    """Runs by their name in the legend, which leaves seeds out."""
    grouped: dict[Config, list[Finished]] = {}
    for run in runs:
        grouped.setdefault(replace(run.config, seed=0), []).append(run)
    return list(zip(report.names(list(grouped)), grouped.values(), strict=True))


def _styled(grouped: dict[Any, list[tuple[str, list[Finished]]]]) -> dict[Any, list[Curve]]:
    """Curves with their styles: what has one name looks the same in every section."""
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
    """Losses and accuracy, one below the other so that a narrow window shows them whole."""
    figure = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    drawn: list[tuple[Finished, slice]] = []  # for each trace its run, and which of its rows
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
                    mode="lines" if len(y) > 1 else "lines+markers",  # a line of one point cannot be seen
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
    switches = [_switch(unit, drawn) for unit in UNITS]
    restyle, relayout = switches[0]
    for trace, x in zip(figure.data, restyle["x"], strict=True):
        trace.x = x  # type: ignore[attr-defined]
    figure.update_layout(
        template="simple_white", height=220 * len(PANELS) + 150 + 30 * len(curves),
        margin={"l": 10, "r": 10, "t": 80, "b": 10},  # plotly's own buttons above ours, which they else cover
        font={"size": 13, "color": "#222222", "family": "system-ui, sans-serif"}, hoverlabel={"align": "left"},
        legend={"orientation": "h", "y": -0.09, "yanchor": "top", "x": 0, "itemwidth": 40},
        updatemenus=[
            {
                "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom",
                "pad": {"b": 12, "l": 0}, "showactive": True, "active": 0,
                "buttons": [
                    {"label": unit.button, "method": "update", "args": list(switch)}
                    for unit, switch in zip(UNITS, switches, strict=True)
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
            # Between few and many powers of ten plotly writes every digit: 1, 2 and 5 are enough.
            kind = {"type": "log", "tickformat": ".3~r", "dtick": "D2" if 4 < ratio < 1e4 else None}
        figure.update_yaxes({"title_text": title, **kind}, row=place, col=1)
    return figure


def _switch(unit: Unit, drawn: Sequence[tuple[Finished, slice]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a button changes: the x of every trace, the axes' title and scale."""
    runs = list({id(run): run for run, _ in drawn}.values())
    ends = [unit.values(run)[-1] for run in runs]
    kind = "log" if max(ends) > 10 * min(ends) > 0 else "linear"  # else the short runs are a stroke at the left edge
    axes = [f"xaxis{n}" if n > 1 else "xaxis" for n in range(1, len(PANELS) + 1)]
    whole = unit.button == "Epochs" and kind == "linear" and max(ends) <= 10  # else there are ticks at half epochs
    settings = {
        "type": kind,
        "autorange": True,
        "tickmode": "linear" if whole else "auto",
        "dtick": 1 if whole else None,
    }
    relayout = {f"{axis}.{name}": value for axis in axes for name, value in settings.items()}
    title = unit.title + (" (log)" if kind == "log" else "")
    return {"x": [unit.values(run)[part] for run, part in drawn]}, relayout | {f"{axes[-1]}.title.text": title}


def _html(figure: go.Figure, name: str, program: bool) -> str:
    """The figure as a piece of a page, with plotly's program if it is the first one."""
    buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [buttons]}
    return figure.to_html(full_html=False, include_plotlyjs=program, include_mathjax=False, div_id=name, config=config)
