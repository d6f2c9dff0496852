"""The paper's classifiers: logistic regression and the CNN on MNIST, the CNN on CIFAR-10, by every method.

Rates are the paper's where it publishes them. Otherwise each rate of a grid is tried in one short run, and the lowest
training loss of the last epoch decides, so that the test data are not used. A method with a schedule has the rate of
the same method without one.

The paper's scripts apply their schedule in two ways. FoMoH-KD's rate is multiplied by 0.1 after every 1,000 epochs. For
all other methods the same settings give a list of *equal* milestones, which torch adds up: all drops occur after the
first 1,000 epochs (a factor of 1/100 in 2,000 epochs, 1/1000 in 3,000). FoMoH and FoMoH-3D run with both.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from ...errors import ArgumentError, RunFolderError
from .. import data
from ..config import Budget, Config
from ..methods import METHODS
from ..train import Run
from .experiment import Experiment, Progress, WorkItem
from .figures import band, plain_log, style, tidy
from .results import Results, markdown, pm

# Settings of all runs: the paper's own steps, without clipping and by plain Newton in the plane.
SHARED = {"clip": 0.0, "descent": "newton"}
SETUPS: dict[str, dict[str, Any]] = {
    "logreg": {"data": "mnist", "model": "logreg", "batch_size": 1024},
    "cnn": {"data": "mnist", "model": "cnn", "batch_size": 2048},
    "cifar": {"data": "cifar10", "model": "cnn-bn", "batch_size": 2048},
}
# Of the runs: epochs, seeds, epochs between drops of the rate, examples (all if not given). Of the sweep: epochs and
# number of rates.
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "logreg": {
        "smoke": {"epochs": 2, "seeds": [0, 1], "drop_every": 1, "sweep_epochs": 1, "rates": 2},
        "hour": {"epochs": 100, "seeds": [0, 1, 2, 3, 4], "drop_every": 50, "sweep_epochs": 10, "rates": 7},
        "paper": {"epochs": 2000, "seeds": [0, 1, 2, 3, 4], "drop_every": 1000, "sweep_epochs": 100, "rates": 13},
    },
    "cnn": {
        "smoke": {"epochs": 2, "seeds": [0, 1], "drop_every": 1, "sweep_epochs": 1, "rates": 2},
        "hour": {
            "epochs": 9, "seeds": [0, 1], "drop_every": 3, "examples": 20_000, "sweep_epochs": 2, "rates": 4,
        },
        "paper": {"epochs": 3000, "seeds": [0, 1, 3], "drop_every": 1000, "sweep_epochs": 100, "rates": 13},
    },
    "cifar": {
        "smoke": {
            "epochs": 2, "seeds": [0, 1], "drop_every": 1, "examples": 8, "batch_size": 8, "sweep_epochs": 1,
            "rates": 2,
        },
        "hour": {
            "epochs": 6, "seeds": [0, 1], "drop_every": 2, "examples": 2000, "batch_size": 500, "sweep_epochs": 1,
            "rates": 3,
        },
        "paper": {"epochs": 3000, "seeds": [0, 1, 3], "drop_every": 1000, "sweep_epochs": 100, "rates": 13},
    },
}  # fmt: skip
HIGHEST = 100.0  # cross entropy at the upper end of the figure; beyond it the value means nothing
_RUNS: list[dict[str, Any]] = [
    {"method": "fgd"},
    {"method": "fomoh"},
    {"method": "fomoh", "schedule": "drops"},
    {"method": "fomoh", "schedule": "drops-at-once"},
    {"method": "fomoh-kd", "k": 2},
    {"method": "fomoh-kd", "k": 2, "schedule": "drops"},
    {"method": "fomoh-kd", "k": 3},
    {"method": "fomoh-kd", "k": 3, "schedule": "drops"},
    {"method": "fomoh-kd", "k": 3, "schedule": "drops-at-once"},
    {"method": "fomoh-bp"},
    {"method": "sgd"},
]


def _label(method: str, k: int | None = None, schedule: str | None = None) -> str:
    """A method with its schedule as tables and legends name it."""
    return METHODS[method].label(k) + (f", {schedule.replace('-', ' ')}" if schedule else "")


RUNS = {_label(**settings): settings for settings in _RUNS}


class Networks(Experiment):
    """A model of the paper, trained by every method.

    Args:
        name: "logreg", "cnn" or "cifar".
        budget: "smoke" trains "logreg" and "cnn" on the digits of scikit-learn, which need no download.
        data_dir: folder of the data set; by default the one that an environment variable names.
        device: device to train on.
        epochs: number of epochs instead of the budget's; epochs between drops and of the sweep change in proportion.

    Raises:
        ArgumentError: epochs < 1.
    """

    def __init__(
        self, name: str, budget: Budget, data_dir: Path | None = None, device: str = Config.device,
        epochs: int | None = None,
    ) -> None:  # fmt: skip
        plan: dict[str, Any] = {"examples": 0} | SETUPS[name] | BUDGETS[name][budget]
        if epochs is not None:
            if epochs < 1:
                raise ArgumentError(f"epochs must be at least 1, got {epochs}")
            plan["drop_every"] = max(1, plan["drop_every"] * epochs // plan["epochs"])
            plan["sweep_epochs"] = min(plan["sweep_epochs"], epochs)
            plan["epochs"] = epochs
        if budget == "smoke" and name != "cifar":
            plan |= {"data": "digits", "batch_size": 256}
        unscheduled = {label: METHODS[run["method"]] for label, run in RUNS.items() if "schedule" not in run}
        model = plan["model"]
        published = {label: method.rates[model] for label, method in unscheduled.items() if model in method.published}
        grids = {
            label: [float(f"{rate:.3g}") for rate in np.geomspace(*method.search, plan["rates"])]
            for label, method in unscheduled.items()
            if label not in published and method.search is not None
        }
        shared = {n: plan[n] for n in ("data", "model", "batch_size", "drop_every", "examples")}
        self.config = {
            "experiment": name, "budget": budget, "shared": shared | SHARED | {"device": device},
            "epochs": plan["epochs"], "seeds": plan["seeds"], "methods": RUNS, "published_rates": published,
            "sweep": {"epochs": plan["sweep_epochs"], "seed": 100, "grids": grids, "by": "last training loss"},
        }  # fmt: skip
        self._data_dir = data_dir
        self._dataset: data.Data | None = None

    def items(self, results: Results) -> list[WorkItem]:
        """The runs of the sweep, then those of each method and seed."""
        sweep = self.config["sweep"]
        items = []
        for method, grid in sweep["grids"].items():
            for rate in grid:
                config = self._config(method, rate, sweep["seed"], sweep["epochs"])
                items.append(self._item(results, _sweep_name(method, rate), config))
        for method in self.config["methods"]:
            for seed in self.config["seeds"]:
                items.append(self._item(results, _name(method, seed), method=method, seed=seed))
        return items

    def rate(self, results: Results, method: str) -> float:
        """The published rate of a method, or the best one of its grid."""
        method = method.partition(", drops")[0]
        if method in self.config["published_rates"]:
            return self.config["published_rates"][method]

        def loss(rate: float) -> float:
            found = results.read(_sweep_name(method, rate))
            return found["rows"][-1]["train_loss"] if found["status"] == "finished" else float("inf")

        return min(self.config["sweep"]["grids"][method], key=loss)

    def _config(self, method: str, rate: float, seed: int, epochs: int) -> Config:
        settings = self.config["methods"][method]
        return Config(lr=rate, seed=seed, epochs=epochs, **self.config["shared"], **settings)

    def _item(
        self, results: Results, name: str, config: Config | None = None, method: str = "", seed: int = 0
    ) -> WorkItem:
        def work(progress: Progress) -> dict[str, Any]:
            # The rate of a method is known after its sweep, which comes before its runs.
            chosen = config or self._config(method, self.rate(results, method), seed, self.config["epochs"])
            return self._train(chosen, results.folder / "runs" / name, progress)

        known = config or self._config(method, 1.0, seed, self.config["epochs"])
        return WorkItem(name, known.epochs * (known.forward_passes + 0.5), work)  # 0.5 for test data and files

    def _train(self, config: Config, folder: Path, progress: Progress) -> dict[str, Any]:
        if self._dataset is None:
            self._dataset = data.load(config.data, self._data_dir)
        if (folder / "config.json").exists():
            run = Run.resume(folder, dataset=self._dataset)
            if run.config != config:
                raise RunFolderError(f"{folder}: belongs to another configuration; delete it to train again")
        else:
            run = Run(config, folder, dataset=self._dataset)
        result = run.train(lambda done, total, loss: progress(done / total, loss))
        return {"config": asdict(config), "status": result["status"], "rows": run.rows()}

    def report(self, results: Results) -> None:
        """Plot loss and accuracy over epochs and seconds; write their table and that of the sweep."""
        runs = {
            method: [results.read(_name(method, seed)) for seed in self.config["seeds"]]
            for method in self.config["methods"]
        }
        rows = []
        for method, found in runs.items():
            finished = [run["rows"][-1] for run in found if run["status"] == "finished"]
            lost = len(found) - len(finished)
            row = {"method": method, "rate": f"{self.rate(results, method):.4g}"}
            for title, key, digits, scale in (
                ("test loss", "test_loss", 3, 1.0), ("test accuracy, %", "test_accuracy", 1, 100.0),
                ("train loss", "train_loss", 3, 1.0), ("seconds", "seconds", 1, 1.0),
            ):  # fmt: skip
                row[title] = pm([r[key] for r in finished], digits, scale) if finished else "-"
            rows.append(row | {"diverged": f"{lost} of {len(found)}" if lost else "-"})
        self._figure(results, runs)
        shared = self.config["shared"]
        results.page(
            f"{self.config['experiment']}: {shared['model']} on {shared['data']}",
            [
                f"After {self.config['epochs']} epochs with batches of {shared['batch_size']}"
                + (f", on the first {shared['examples']} examples" if shared["examples"] else "")
                + f": mean over {len(self.config['seeds'])} seeds with its standard error. Seconds are those of "
                f"training alone. Budget {self.config['budget']}, the rest in `configuration.json`; each run has "
                "its folder in `runs`.",
                markdown(rows),
                "![curves](curves.png)",
                f"*Drops*: the rate falls to a tenth after each {shared['drop_every']} epochs. *Drops at once*: as "
                "often, but all after the first of them. The paper's scripts do the one for FoMoH-KD and the other for "
                "the rest.",
                "## The sweep",
                f"Training loss of the last of {self.config['sweep']['epochs']} epochs for each rate, one seed; the "
                "lowest is taken. Rates that the paper publishes are not swept: "
                + (", ".join(f"{m} {r}" for m, r in self.config["published_rates"].items()) or "none") + ".",
                self._sweep_table(results),
            ],
        )  # fmt: skip

    def _sweep_table(self, results: Results) -> str:
        rows = []
        for method, grid in self.config["sweep"]["grids"].items():
            best = self.rate(results, method)
            cells = []
            for rate in grid:
                found = results.read(_sweep_name(method, rate))
                lost = found["status"] != "finished"
                text = f"{rate:g}: " + ("diverged" if lost else f"{found['rows'][-1]['train_loss']:.3f}")
                cells.append(f"**{text}**" if rate == best else text)
            rows.append({"method": method, **{f"rate {n + 1}": cell for n, cell in enumerate(cells)}})
        return markdown(rows)

    def _figure(self, results: Results, runs: dict[str, list[dict[str, Any]]]) -> None:
        figure, panels = plt.subplots(2, 2, figsize=(13, 8.5), sharex="col", sharey="row", layout="constrained")
        shared = self.config["shared"]
        figure.suptitle(
            f"{shared['model']} on {shared['data']}: mean and standard error of {len(self.config['seeds'])} seeds",
            fontsize=13,
        )
        bases = list(dict.fromkeys(method.partition(", drops")[0] for method in runs))
        for method, found in runs.items():
            length = min(len(run["rows"]) for run in found)
            if not length:
                continue  # a seed diverged in its first epoch
            values = {
                key: np.array([[row[key] for row in run["rows"][:length]] for run in found])
                for key in ("test_loss", "test_accuracy", "seconds")
            }
            base, _, drops = method.partition(", drops")
            line: dict[str, Any] = style(bases.index(base), 0 if base == method else 3 if drops else 1) | {
                "label": method
            }
            for column, x in enumerate((range(1, length + 1), values["seconds"].mean(0))):
                band(panels[0, column], x, values["test_loss"], log=True, **line)
                band(panels[1, column], x, 100 * values["test_accuracy"], **line)
        for column, x in enumerate(("epochs", "seconds of training")):
            tidy(panels[0, column], "test loss", "", "cross entropy" if column == 0 else "")
            tidy(panels[1, column], "test accuracy", x, "%" if column == 0 else "")
        panels[0, 0].set_yscale("log")
        panels[0, 0].set_ylim(top=min(panels[0, 0].get_ylim()[1], HIGHEST))
        panels[0, 1].set_xscale("log")
        plain_log(panels[0, 0].yaxis)
        plain_log(panels[1, 1].xaxis)
        panels[1, 0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
        results.figure("curves", figure)


def _slug(method: str) -> str:
    return method.lower().replace(", ", "-").replace(" ", "-")


def _name(method: str, seed: int) -> str:
    return f"{_slug(method)}/seed-{seed}"


def _sweep_name(method: str, rate: float) -> str:
    return f"sweep/{_slug(method)}-{rate:g}"
