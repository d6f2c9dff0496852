"""What an experiment is, and how it is carried out: unit by unit, each of them once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .results import Results

Budget = Literal["smoke", "hour", "paper"]
Progress = Callable[[float, float], None]  # (fraction of the unit that is done, loss)
Observer = Callable[[float, float, str, float], None]  # (cost done, cost in all, name of the unit, loss)


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done once and kept.

    Attributes:
        name: of its metrics in the results folder.
        cost: expected, in any unit that all the experiment's units share.
        work: does it and returns the metrics.
    """

    name: str
    cost: float
    work: Callable[[Progress], Any]


class Experiment(ABC):
    """An experiment of the paper under a budget.

    Attributes:
        config: everything that decides the numbers; plain values.
    """

    config: dict[str, Any]

    @abstractmethod
    def units(self, results: Results) -> list[Unit]:
        """All the work, in an order in which later units may read the metrics of earlier ones."""

    @abstractmethod
    def report(self, results: Results) -> None:
        """Write the page and the figures from the metrics."""


def carry_out(
    experiment: Experiment, folder: Path, observe: Observer = lambda done, total, name, loss: None
) -> Results:
    """Do the work that the folder does not hold yet, and report.

    Raises:
        RunFolderError: the folder belongs to something else.
    """
    results = Results(folder, experiment.config)
    todo = [unit for unit in experiment.units(results) if not results.has(unit.name)]
    total, done = sum(unit.cost for unit in todo), 0.0
    for unit in todo:
        observe(done, total, unit.name, float("nan"))

        def progress(fraction: float, loss: float, before: float = done, unit: Unit = unit) -> None:
            observe(before + fraction * unit.cost, total, unit.name, loss)

        results.keep(unit.name, unit.work(progress))
        done += unit.cost
        observe(done, total, unit.name, float("nan"))
    experiment.report(results)
    return results
