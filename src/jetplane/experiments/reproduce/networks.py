"""The paper's classifiers: logistic regression and the CNN on MNIST, the CNN on CIFAR-10, by every method.

Rates: the paper's where it publishes them, else the best of a grid, one short run each, by the training loss of
its last epoch, so that the test data choose nothing. Methods with a schedule take the rate of the same method
without.

The paper's scripts apply their schedule in two ways. FoMoH-KD's rate drops to a tenth after every 1,000 epochs. For all
other methods the same settings make a list of *equal* milestones, which torch counts together: all drops come at once
after the first 1,000 epochs (1/100 in 2,000 epochs, 1/1000 in 3,000). Both readings run here, for FoMoH and FoMoH-3D.
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
from ..config import Config
from ..train import Run
from .experiment import Budget, Experiment, Progress, Unit
from .figures import band, plain_log, style, tidy
from .results import Results, markdown, pm

# What is common to all runs of a model; the steps are the paper's own: no clipping, plain Newton in the plane.
SHARED = {"clip": 0.0, "descent": "newton"}
SETUPS: dict[str, dict[str, Any]] = {
    "logreg": {"data": "mnist", "model": "logreg", "batch_size": 1024},
    "cnn": {"data": "mnist", "model": "cnn", "batch_size": 2048},
    "cifar": {"data": "cifar10", "model": "cnn-bn", "batch_size": 2048},
}
# Epochs, seeds, epochs between drops of the rate, examples (0: all); of the sweep: epochs, rates.
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
THROWN = 100.0  # a cross entropy at which the figure ends: a run beyond it was thrown, and how far tells nothing
METHODS: dict[str, dict[str, Any]] = {
    "FGD": {"method": "fgd"},
    "FoMoH": {"method": "fomoh"},
    "FoMoH, drops": {"method": "fomoh", "schedule": "drops"},
    "FoMoH, drops at once": {"method": "fomoh", "schedule": "drops-at-once"},
    "FoMoH-2D": {"method": "fomoh-kd", "k": 2},
    "FoMoH-2D, drops": {"method": "fomoh-kd", "k": 2, "schedule": "drops"},
    "FoMoH-3D": {"method": "fomoh-kd", "k": 3},
    "FoMoH-3D, drops": {"method": "fomoh-kd", "k": 3, "schedule": "drops"},
    "FoMoH-3D, drops at once": {"method": "fomoh-kd", "k": 3, "schedule": "drops-at-once"},
    "FoMoH-BP": {"method": "fomoh-bp"},
    "SGD, backprop": {"method": "sgd"},
}
PUBLISHED = {"logreg": {"FoMoH": 0.1362}, "cnn": {"FoMoH": 0.544}}
# Where the paper's own searches looked, log-uniformly.
SPACES = {
    "FGD": (1e-5, 1e-1), "FoMoH": (1e-3, 1.0), "FoMoH-2D": (1e-3, 1.0), "FoMoH-3D": (1e-3, 1.0),
    "FoMoH-BP": (1e-2, 1.0), "SGD, backprop": (5e-3, 0.5),
}  # fmt: skip


class Networks(Experiment):
    """A model of the paper, trained by every method.

    Args:
        name: "logreg", "cnn" or "cifar".
        budget: "smoke" trains "logreg" and "cnn" on the digits of scikit-learn, which need no download.
        data_dir: where the data set is; otherwise a variable names it.
        device: where to train.
        epochs: instead of the budget's; drops of the rate and the sweep shrink with them.

    Raises:
        ArgumentError: epochs < 1.
    """

    def __init__(
        self, name: str, budget: Budget, data_dir: Path | None = None, device: str = "cpu", epochs: int | None = None
    ) -> None:
        plan = {"examples": 0} | SETUPS[name] | BUDGETS[name][budget]
        if epochs is not None:
            if epochs < 1:
                raise ArgumentError(f"epochs must be at least 1, got {epochs}")
            plan["drop_every"] = max(1, plan["drop_every"] * epochs // plan["epochs"])
            plan["sweep_epochs"] = min(plan["sweep_epochs"], epochs)
            plan["epochs"] = epochs
        if budget == "smoke" and name != "cifar":
            plan |= {"data": "digits", "batch_size": 256}
        published = PUBLISHED.get(name, {})
        grids = {
            method: [float(f"{rate:.3g}") for rate in np.geomspace(*space, plan["rates"])]
            for method, space in SPACES.items()
            if method not in published
        }
        shared = {n: plan[n] for n in ("data", "model", "batch_size", "drop_every", "examples")}
        self.config = {
            "experiment": name, "budget": budget, "shared": shared | SHARED | {"device": device},
            "epochs": plan["epochs"], "seeds": plan["seeds"], "methods": METHODS, "published_rates": published,
            "sweep": {"epochs": plan["sweep_epochs"], "seed": 100, "grids": grids, "by": "last training loss"},
        }  # fmt: skip
        self._data_dir = data_dir
        self._dataset: data.Data | None = None

    def units(self, results: Results) -> list[Unit]:
        """The runs of the sweep, then those of each method and seed."""
        sweep = self.config["sweep"]
        units = []
        for method, grid in sweep["grids"].items():
            for rate in grid:
                config = self._config(method, rate, sweep["seed"], sweep["epochs"])
                units.append(self._unit(results, _sweep_name(method, rate), config))
        for method in self.config["methods"]:
            for seed in self.config["seeds"]:
                units.append(self._unit(results, _name(method, seed), method=method, seed=seed))
        return units

    def rate(self, results: Results, method: str) -> float:
        """The published rate of a method, or the best of its grid."""
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

    def _unit(self, results: Results, name: str, config: Config | None = None, method: str = "", seed: int = 0) -> Unit:
        def work(progress: Progress) -> dict[str, Any]:
            # The rate of a method is known when its sweep is through, which is before its turn comes.
            chosen = config or self._config(method, self.rate(results, method), seed, self.config["epochs"])
            return self._train(chosen, results.folder / "runs" / name, progress)

        known = config or self._config(method, 1.0, seed, self.config["epochs"])
        return Unit(name, known.epochs * (known.forward_passes + 0.5), work)  # the half: test data, files

    def _train(self, config: Config, folder: Path, progress: Progress) -> dict[str, Any]:
        if self._dataset is None:
            self._dataset = data.load(config.data, self._data_dir)
        if (folder / "config.json").exists():
            run = Run.resume(folder, dataset=self._dataset)
            if run.config != config:
                raise RunFolderError(f"{folder}: belongs to another configuration; delete it to train it anew")
        else:
            run = Run(config, folder, dataset=self._dataset)
        result = run.train(lambda done, total, loss: progress(done / total, loss))
        return {"config": asdict(config), "status": result["status"], "rows": run.rows()}

    def report(self, results: Results) -> None:
        """Loss and accuracy over epochs and seconds, the table, and what the sweep found."""
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
        panels[0, 0].set_ylim(top=min(panels[0, 0].get_ylim()[1], THROWN))
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
