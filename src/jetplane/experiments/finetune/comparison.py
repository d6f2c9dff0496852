"""Several methods on one task: each run in a process of its own, rivals at published or searched rates, one table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..apart import call_apart
from .methods import METHODS, method_of
from .options import Settings
from .training import Memory, Outcome, Task, measure, run

RUNGS = ((1, 16), (4, 4))  # of a search: one in so many trials gets one so-manieth of the seconds
JUDGED = 200  # dev texts that judge a trial
Observer = Callable[[str, float, float, float], None]  # (what runs, seconds trained, of how many, loss)


@dataclass(frozen=True)
class Tuned:
    """The result of a search for a rate.

    Attributes:
        rate: the best.
        trials: of each trial its rate, its seconds, its accuracy on the judging texts and its status.
    """

    rate: float
    trials: list[dict[str, Any]]


def tune(
    task: Task,
    name: str,
    settings: Settings,
    trials: int,
    seed: int,
    observe: Callable[[int], None] = lambda trial: None,
) -> Tuned:
    """Search a method's rate by successive halving (Jamieson, Talwalkar, arXiv 1502.07943).

    Rates are drawn log-uniformly from the method's range, evenly spread; each trains for a sixteenth of the seconds,
    and the best quarter for a quarter of them. What counts is the accuracy on some of the dev texts; among equal ones
    the rate that came first in the rung before.
    """
    method = METHODS[name]
    assert method.search is not None
    low, high = map(math.log, method.search)
    offsets = torch.rand(trials, generator=torch.Generator().manual_seed(seed)).tolist()
    rates = [math.exp(low + (high - low) * (i + offset) / trials) for i, offset in enumerate(offsets)]
    judges, tried = task.places("dev")[:JUDGED], []
    for share, part in RUNGS:
        rates = rates[: max(1, math.ceil(trials / share))]
        brief, found = replace(settings, seconds=settings.seconds / part, scores=1), []
        for rate in rates:
            outcome = run(task, name, brief, rate, seed, judges, tested=False)
            found.append(outcome.dev if outcome.status == "finished" else -1.0)
            tried.append({"rate": rate, "seconds": outcome.seconds, "dev": outcome.dev, "status": outcome.status})
            observe(len(tried))
        rates = [rates[i] for i in sorted(range(len(rates)), key=lambda i: -found[i])]
    return Tuned(rates[0], tried)


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: a method at one rate.

    Attributes:
        name: of the method.
        tuned: the search of its rate; None at its published rate, or where it takes none.
        outcomes: of each seed.
        memory: of its steps.
    """

    name: str
    tuned: Tuned | None
    outcomes: list[Outcome]
    memory: Memory

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Entry:
        """What `plain` has been made of, without weights."""
        tuned = None if plain["tuned"] is None else Tuned(**plain["tuned"])
        return Entry(plain["method"], tuned, [Outcome.of(run) for run in plain["runs"]], Memory(**plain["memory"]))

    def plain(self) -> dict[str, Any]:
        """A dictionary that JSON can represent."""
        return {
            "method": self.name, "source": METHODS[self.name].source,
            "tuned": None if self.tuned is None else asdict(self.tuned),
            "memory": asdict(self.memory), "runs": [outcome.plain() for outcome in self.outcomes],
        }  # fmt: skip


def compare(
    task: Task,
    names: Sequence[str],
    settings: Settings,
    seeds: Sequence[int],
    trials: int = 0,
    observe: Observer = lambda what, done, total, loss: None,
    rates: Mapping[str, float] | None = None,
    on_entry: Callable[[Entry], None] = lambda entry: None,
) -> list[Entry]:
    """Run methods on a task, each in a process of its own.

    Args:
        task: the texts and the model.
        names: of methods.
        settings: of all runs.
        seeds: of the runs of each method.
        trials: of the search of a rate; 0 for none.
        observe: is told of progress.
        rates: given ones, in place of those published.
        on_entry: called after each method.

    Raises:
        ArgumentError: there is no such method, or the parameters that train cannot be chosen in this model.
    """
    entries: list[Entry] = []
    for name in names:
        rate = (rates or {}).get(name)
        entries.append(call_apart(_entry, task, name, settings, tuple(seeds), trials, rate, observe=observe))
        on_entry(entries[-1])
    return entries


def _entry(
    task: Task, name: str, settings: Settings, seeds: tuple[int, ...], trials: int, rate: float | None, report: Observer
) -> Entry:
    title, used = method_of(name).title, measure(task, name, settings)  # memory first: what follows would hide it
    tuned = None
    if trials and rate is None and METHODS[name].search is not None:
        tuned = tune(task, name, settings, trials, min(seeds), lambda n: report(f"{title}, rate", n, trials, math.nan))
        rate = tuned.rate
    outcomes = [
        run(
            task, name, settings, rate, seed,
            observe=lambda seconds, loss, seed=seed: report(f"{title}, seed {seed}", seconds, settings.seconds, loss),
        )
        for seed in seeds
    ]  # fmt: skip
    return Entry(name, tuned, outcomes, used)


def table(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """A row for each entry: accuracies are means and standard deviations over seeds, in percent."""
    return [
        {
            "method": METHODS[entry.name].title + (", tuned" if entry.tuned else ""),
            "rate": "none" if entry.outcomes[0].rate is None else f"{entry.outcomes[0].rate:.1e}",
            "dev": _percent([outcome.dev for outcome in entry.outcomes]),
            "test": _percent([outcome.test for outcome in entry.outcomes]),
            "failed": f"{sum(outcome.status == 'failed' for outcome in entry.outcomes)} of {len(entry.outcomes)}",
            "steps": f"{statistics.mean(outcome.steps for outcome in entry.outcomes):.0f}",
            "seconds": f"{statistics.mean(outcome.seconds for outcome in entry.outcomes):.1f}",
            "memory": f"{entry.memory.training / 2**20:.0f} MiB",
            "of inference": f"{entry.memory.training / entry.memory.inference:.2f}",
        }
        for entry in entries
    ]


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
