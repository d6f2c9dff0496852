"""Results folders: the configuration, the metrics of each work item, a page and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ...errors import RunFolderError
from .. import environment, store

Row = dict[str, str]


class Results:
    """A folder with ``configuration.json``, ``environment.json``, ``metrics/``, ``results.md`` and figures.

    Args:
        folder: the results folder; it is created if it does not exist.
        config: everything that decides the numbers.

    Raises:
        RunFolderError: the folder holds something else, or results of another configuration.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        path = folder / "configuration.json"
        if path.exists():
            _refuse_changes(path, config)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(
                f"{folder} exists and holds no results of this command; name another folder with --out"
            )
        else:
            (folder / "metrics").mkdir(parents=True, exist_ok=True)
            _write(path, config)
            environment.record(folder, torch.device("cpu"), 0)

    def has(self, name: str) -> bool:
        """Whether the folder holds metrics of this name."""
        return self._path(name).exists()

    def write(self, name: str, metrics: Any) -> None:
        """Write metrics atomically."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, metrics)

    def read(self, name: str) -> Any:
        """Read metrics that `write` wrote.

        Raises:
            RunFolderError: they are missing or damaged.
        """
        try:
            return json.loads(self._path(name).read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self._path(name)}: cannot be read ({error}); delete it to compute it again"
            ) from error

    def figure(self, name: str, figure: Figure) -> None:
        """Write a figure as PNG and SVG, and close it."""
        for kind in ("png", "svg"):
            figure.savefig(self.folder / f"{name}.{kind}", dpi=150)
        plt.close(figure)

    def page(self, title: str, sections: Sequence[str]) -> None:
        """Write ``results.md``."""
        store.write_atomically(self.folder / "results.md", "\n\n".join([f"# {title}", *sections, ""]).encode())

    def _path(self, name: str) -> Path:
        return self.folder / "metrics" / f"{name}.json"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    names = list(rows[0])
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *([row[n] for n in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; for a single value the error is NaN."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else float("nan")


def pm(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Mean and standard error for a table; numbers of a million and more by their order of magnitude alone.

    >>> pm([1.0, 2.0]), pm([2e12, 55.1])
    ('1.500 ± 0.500', '1e+12 ± 1e+12')
    """
    mean, error = mean_error([scale * v for v in values])
    form = f".{digits}f" if abs(mean) < 1e6 else ".1g"
    return f"{mean:{form}}" + (f" ± {error:{form}}" if error == error else "")


def _write(path: Path, content: Any) -> None:
    store.write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _refuse_changes(path: Path, config: dict[str, Any]) -> None:
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise RunFolderError(f"{path}: not the configuration of a reproduction ({error})") from error
    changed = sorted(n for n in old.keys() | config.keys() if old.get(n) != config.get(n))
    if changed:
        raise RunFolderError(
            f"{path.parent} holds results of another configuration; different: {', '.join(changed)}. "
            "Name another folder with --out"
        )
