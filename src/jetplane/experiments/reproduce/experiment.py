"""Experiments as lists of work items, each of which is done once and its result kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Results

Progress = Callable[[float, float], None]  # (fraction of the work item that is done, loss)
Observer = Callable[[float, float, str, float], None]  # (cost done, cost in all, name of the work item, loss)


@dataclass(frozen=True)
class WorkItem:
    """A part of an experiment that is done once.

    Attributes:
        name: name of its metrics in the results folder.
        cost: expected cost relative to the other items of the experiment.
        work: does it and returns the metrics.
    """

    name: str
    cost: float
    work: Callable[[Progress], Any]


class Experiment(ABC):
    """An experiment of the paper under a budget.

    Attributes:
        config: everything that decides the numbers, as plain values.
    """

    config: dict[str, Any]

    @abstractmethod
    def items(self, results: Results) -> list[WorkItem]:
        """All work items; later ones may read the metrics of earlier ones."""

    @abstractmethod
    def report(self, results: Results) -> None:
        """Write the page and the figures from the metrics."""


def run_experiment(
    experiment: Experiment, folder: Path, observe: Observer = lambda done, total, name, loss: None
) -> Results:
    """Do the work items whose metrics the folder does not hold yet, and write the report.

    Raises:
        RunFolderError: the folder holds something else.
    """
    results = Results(folder, experiment.config)
    todo = [item for item in experiment.items(results) if not results.has(item.name)]
    total, done = sum(item.cost for item in todo), 0.0
    for item in todo:
        observe(done, total, item.name, float("nan"))

        def progress(fraction: float, loss: float, before: float = done, item: WorkItem = item) -> None:
            observe(before + fraction * item.cost, total, item.name, loss)

        results.write(item.name, item.work(progress))
        done += item.cost
        observe(done, total, item.name, float("nan"))
    experiment.report(results)
    return results
