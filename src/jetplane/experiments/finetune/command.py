"""``jetplane finetune``: a comparison from its options to its folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...errors import RunFolderError
from .. import environment, store
from . import comparison
from .options import Comparison
from .preparing import Prepared, prepare

RESULT = "result.json"
Observer = Callable[[str, float, float, float], None]  # (what is done, how much of it, of how much, loss)


def compare(work: Comparison, folder: Path, observe: Observer = lambda what, done, total, loss: None) -> dict[str, Any]:
    """Run a comparison and write its folder: ``result.json`` and the trained weights of each run.

    ``result.json`` grows with each method, so that an interrupted comparison keeps what it has, and the same one with
    the same folder goes on with the methods that are left. The weights, in ``METHOD-SEED.pt``, are those with the best
    accuracy on dev: ``weights`` by their names in the classifier.

    Returns:
        What ``result.json`` holds.

    Raises:
        RunFolderError: the folder has something else in it, or another comparison.
        JetplaneError: see `preparing.prepare` and `comparison.compare`.
    """
    entries = _earlier(work, folder)
    done = {entry.name for entry in entries}
    left = [name for name in dict.fromkeys(work.methods) if name not in done]
    if not left:
        return json.loads((folder / RESULT).read_text())
    prepared = prepare(work.source, lambda done, total: observe("frozen blocks", done, total, float("nan")))
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}

    def keep(entry: comparison.Entry) -> None:
        entries.append(entry)
        for outcome in entry.outcomes:
            store.save_checkpoint(
                folder / f"{entry.name}-{outcome.seed}.pt", {"classes": prepared.classes, "weights": outcome.weights}
            )
        content.update(_content(work, prepared, entries))
        store.write_atomically(folder / RESULT, (json.dumps(content, indent=1) + "\n").encode())

    comparison.compare(
        prepared.task, left, work.settings, range(work.seeds), work.trials, observe, work.rates, keep
    )  # fmt: skip
    return content


def _earlier(work: Comparison, folder: Path) -> list[comparison.Entry]:
    """What the folder already has of this comparison."""
    if not folder.exists() or not any(folder.iterdir()):
        return []
    try:
        content = json.loads((folder / RESULT).read_text())
        same = all(content[name] == value for name, value in json.loads(json.dumps(_asked(work))).items())
        entries = [comparison.Entry.of(entry) for entry in content["entries"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{folder} exists, and holds no comparison; name another folder with --out") from error
    if not same:
        raise RunFolderError(f"{folder} exists, with a comparison of other options; name another folder with --out")
    return entries


def _asked(work: Comparison) -> dict[str, Any]:
    """All of a comparison but its methods."""
    source = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(work.source).items()}
    for name in ("model", "data", "test_data"):
        source[name] = source[name] and Path(source[name]).name
    runs = {"seeds": work.seeds, "trials": work.trials, "rates": dict(work.rates)}
    return {"source": source | {"cache": None}, "settings": asdict(work.settings), "runs": runs}


def _content(work: Comparison, prepared: Prepared, entries: Sequence[comparison.Entry]) -> dict[str, Any]:
    return {
        "command": ["jetplane", *sys.argv[1:]],
        "environment": environment.describe(torch.device("cpu")),
        **_asked(work),
        "classes": prepared.classes,
        "sizes": prepared.task.sizes,
        "frozen": {"blocks": prepared.frozen, "seconds": prepared.seconds},
        "table": comparison.table(entries),
        "entries": [entry.plain() for entry in entries],
    }


def rows(folder: Path) -> list[dict[str, str]]:
    """The table of a comparison's folder."""
    return json.loads((folder / RESULT).read_text())["table"]
