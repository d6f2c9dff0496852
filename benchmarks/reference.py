"""Training by our optimizers beside the paper's own code: same weights, batches, rates and epochs.

    FOMOH_SRC=FOLDER JETPLANE_MNIST=FOLDER python -m benchmarks.reference --model logreg --epochs 5 --seeds 0 1

FOMOH_SRC names the source tree of SRI-CSL/fomoh. Both sides start from the same weights and see the same batches in
the same order. First, one step of each along the same directions must give the same parameters. Then they train, and
each draws its own directions, so that losses agree within the spread of seeds and not to the last digit; with
--same-directions the paper's code takes ours, and they agree to rounding and what training makes of it. Both run in
this process and take turns, run by run. Wall and processor time are those of the training steps alone; on a machine
that others use, with one thread, processor time is the one to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

from jetplane.directions import Directions
from jetplane.errors import RescueWarning
from jetplane.experiments import data, models
from jetplane.experiments.config import Config
from jetplane.experiments.methods import METHODS
from jetplane.experiments.reproduce.figures import band, plain_log, style, tidy
from jetplane.experiments.reproduce.results import markdown, mean_error, pm
from jetplane.experiments.train import Run, optimizer

from .measuring import machine

SIDES = ("ours", "paper's code")
_RUNS = (("fgd", 1), ("fomoh", 1), ("fomoh-kd", 2), ("fomoh-kd", 3))
RUNS: dict[str, dict[str, Any]] = {METHODS[name].label(k): {"method": name, "k": k} for name, k in _RUNS}
# FoMoH's are the paper's. The others of logistic regression did best of a few in three epochs; those of the CNN are
# low enough for the plain Newton step, which goes far where the plane is indefinite.
RATES = {
    "logreg": {"FGD": 1e-3, "FoMoH": METHODS["fomoh"].rates["logreg"], "FoMoH-2D": 1.0, "FoMoH-3D": 1.0},
    "cnn": {"FGD": 1e-4, "FoMoH": METHODS["fomoh"].rates["cnn"], "FoMoH-2D": 0.05, "FoMoH-3D": 0.05},
}
BATCH = {"logreg": 1024, "cnn": 2048}
Rows = list[dict[str, float]]


class Timed(Run):
    """A run whose rows say how much processor time an epoch's steps took."""

    def _epoch(self, observe: Callable[[int, float], None]) -> dict[str, float]:
        start = time.process_time()
        row = super()._epoch(observe)
        return row | {"cpu": time.process_time() - start}


def ours(config: Config, dataset: data.Data) -> Rows:
    """Train by the project's own loop."""
    with tempfile.TemporaryDirectory() as folder:
        run = Timed(config, Path(folder) / "run", dataset=dataset)
        run.train()
        rows = run.rows()
    walls = [row["seconds"] for row in rows]
    return [
        {**{n: row[n] for n in ("train_loss", "test_loss", "test_accuracy", "cpu")}, "wall": wall}
        for row, wall in zip(rows, np.diff([0.0, *walls]).tolist(), strict=True)
    ]


class Reference:
    """The paper's model and step functions, on our data.

    Args:
        config: of our run beside it.
        dataset: of both.
        same: step along the directions that our run draws, instead of its own.
    """

    def __init__(self, config: Config, dataset: data.Data, same: bool = False) -> None:
        source = Path(os.environ["FOMOH_SRC"]) / "src"
        if str(source) not in sys.path:
            sys.path.insert(0, str(source))
        import fomoh.nn as library  # type: ignore[import-not-found]
        import fomoh.opt as steps  # type: ignore[import-not-found]

        self.library, self.steps, self.config, self.data, self.same = library, steps, config, dataset, same
        self.directions = Directions(config.k or 1, seed=config.seed)
        torch.manual_seed(config.seed)  # the weights that our run starts from
        self.like = models.build(config.model, dataset.side)
        self.flat = config.model == "logreg"
        self.model = library.LogisticRegressionModel(784, 10) if self.flat else library.CNNModel()
        self.model.nn_module_to_htorch_model(copy.deepcopy(self.like), verbose=False)  # it takes over the memory
        self.opt = torch.optim.SGD(list(self.model.params.values()), lr=config.lr or 0.0)

    def loss(self, out: Any, labels: Any) -> Any:
        """Its logistic regression ends in log-probabilities, its CNN in logits."""
        return self.library.nll_loss(out if self.flat else out.logsoftmax(-1), labels)

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step of the paper's code, and the loss before it."""
        with mock.patch("torch.randn", self._drawn) if self.same else contextlib.nullcontext():
            loss = self._step(x.flatten(1) if self.flat else x, y)
        self.directions.step += 1
        return loss

    def _drawn(self, *size: int) -> Tensor:
        """In place of its random numbers: our directions of this step, in its layout."""
        tangents = self.directions.tangents(list(self.like.parameters()))
        flat = torch.cat([(v.mT if v.dim() == 3 else v).flatten(1) for v in tangents], 1)
        return flat.reshape([int(n) for n in size])

    def _step(self, x: Tensor, y: Tensor) -> float:
        if self.config.method == "fomoh-kd":
            loss, _ = self.steps.optimizer_step_plane_Nd(
                self.model, self.loss, 1, x, y, N=self.config.k, lr=self.config.lr
            )
            return float(loss)
        wrap = self.library.htorch
        curved = self.config.method == "fomoh"
        loss, _ = self.library.optimizer_step(
            self.model, self.loss, self.opt, 1, wrap(x), wrap(y), hess=curved, epsilon=1e-5
        )
        return loss.real.item()

    def test(self) -> dict[str, float]:
        """Test loss and accuracy, by our model with its weights."""
        with torch.no_grad():
            for p, own in zip(self.like.parameters(), self.model.params.values(), strict=True):
                p.copy_(own.t() if p.dim() == 2 else own)
        images, labels = self.data.test.images, self.data.test.labels
        with torch.inference_mode():
            out = torch.cat([self.like(x) for x in images.split(2000)])
        right = (out.argmax(1) == labels).double().mean().item()
        return {"test_loss": F.cross_entropy(out, labels).item(), "test_accuracy": right}

    def train(self) -> Rows:
        """The epochs of our run: the same batches in the same order."""
        images, labels = self.data.train.images, self.data.train.labels
        rows = []
        for epoch in range(self.config.epochs):
            torch.manual_seed((self.config.seed << 20) + epoch)
            total, wall, cpu = 0.0, time.perf_counter(), time.process_time()
            for batch in torch.randperm(len(labels)).split(self.config.batch_size):
                total += self.step(images[batch], labels[batch]) * len(batch)
            times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            rows.append({"train_loss": total / len(labels), **self.test(), **times})
        return rows


def check(config: Config, dataset: data.Data) -> float:
    """One step of both sides from the same weights along the same directions.

    Returns:
        The largest difference between parameters after it, relative to the largest change of one.

    Raises:
        RuntimeError: the difference is not rounding.
    """
    reference = Reference(config, dataset, same=True)
    x, y = dataset.train.images[:1000], dataset.train.labels[:1000]
    params: list[Tensor] = list(reference.like.parameters())
    before = [p.detach().clone() for p in params]
    opt = optimizer(config, reference.like)
    opt.step(lambda: F.cross_entropy(reference.like(x), y))  # type: ignore[arg-type,return-value]
    reference.step(x, y)
    own = [p.t() if p.dim() == 2 else p for p in reference.model.params.values()]
    largest = max((p - b).abs().max().item() for p, b in zip(params, before, strict=True))
    error = max((p - q).abs().max().item() for p, q in zip(params, own, strict=True)) / largest
    if not error < 5e-3:  # rounding in single precision, and ReLU's kinks
        raise RuntimeError(f"{config.label}: along the same directions the steps differ by {error:.1e} of the change")
    return error


def compare(runs: dict[str, dict[str, list[Rows]]]) -> tuple[str, str]:
    """A table of the last epoch, and one of all epochs. Mean over seeds with its standard error."""
    last, every = [], []
    for method, sides in runs.items():
        row = {"method": method}
        for name, key, digits, scale in (("test loss", "test_loss", 3, 1), ("accuracy, %", "test_accuracy", 1, 100)):
            for side in SIDES:
                row[f"{name}: {side}"] = pm([rows[-1][key] for rows in sides[side]], digits, scale)
        for name, key in (("CPU seconds an epoch", "cpu"), ("wall seconds an epoch", "wall")):
            mine, theirs = (mean_error([r[key] for rows in sides[side] for r in rows])[0] for side in SIDES)
            row[name] = f"{mine:.2f} : {theirs:.2f} = 1 : {theirs / mine:.1f}"
        last.append(row)
        for epoch in range(len(sides[SIDES[0]][0])):
            line = {"method": method, "epoch": str(epoch + 1)}
            values = [[rows[epoch]["test_loss"] for rows in sides[side]] for side in SIDES]
            for side, v in zip(SIDES, values, strict=True):
                line[f"test loss: {side}"] = pm(v)
            line["difference"] = pm([a - b for a, b in zip(*values, strict=True)])  # of the same start
            every.append(line)
    return markdown(last), markdown(every)


def draw(runs: dict[str, dict[str, list[Rows]]], path: Path, title: str) -> None:
    """Test loss over epochs and over processor time; ours in lines, the paper's code dashed."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=13)
    for n, (method, sides) in enumerate(runs.items()):
        for side in SIDES:
            losses = np.array([[row["test_loss"] for row in rows] for rows in sides[side]])
            seconds = np.cumsum([[row["cpu"] for row in rows] for rows in sides[side]], 1).mean(0)
            line = style(n, SIDES.index(side)) | {"label": f"{method}, {side}"}
            for axes, x in zip(panels, (range(1, losses.shape[1] + 1), seconds), strict=True):
                band(axes, x, losses, log=True, **line)
    tidy(panels[0], "", "epochs", "test loss")
    tidy(panels[1], "", "seconds of processor time", "")
    panels[0].set_yscale("log")
    panels[1].set_xscale("log")
    plain_log(panels[0].yaxis)
    plain_log(panels[1].xaxis)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run both sides and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(RATES), default="logreg")
    parser.add_argument("--methods", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--examples", type=int, default=0, help="use the first so many; 0: all")
    parser.add_argument("--batch-size", type=int, help="[default: the paper's, 1024 or 2048]")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST [or JETPLANE_MNIST]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--same-directions", action="store_true", help="both sides step along ours")
    parser.add_argument("--out", type=Path, help="folder for the raw numbers and the figure")
    args = parser.parse_args()
    if not os.environ.get("FOMOH_SRC"):
        parser.error("FOMOH_SRC must name the paper's code, the tree of SRI-CSL/fomoh")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", RescueWarning)  # of uphill steps: both sides take them
    dataset = data.load("mnist", args.data_dir)
    dataset = dataset.first(args.examples) if args.examples else dataset
    runs: dict[str, dict[str, list[Rows]]] = {}
    apart = 0.0
    for method in args.methods:
        runs[method] = {side: [] for side in SIDES}
        for seed in args.seeds:
            config = Config(
                data="mnist", model=args.model, lr=RATES[args.model][method], seed=seed, epochs=args.epochs,
                batch_size=args.batch_size or BATCH[args.model], clip=0.0, descent="newton", **RUNS[method],
            )  # fmt: skip
            apart = max(apart, check(config, dataset))
            runs[method][SIDES[0]].append(ours(config, dataset))
            runs[method][SIDES[1]].append(Reference(config, dataset, args.same_directions).train())
            print(f"{method}, seed {seed}: done", file=sys.stderr)
    last, every = compare(runs)
    same = f"Along the same directions, first steps agree to {apart:.0e} of the largest change of a parameter."
    print(f"{machine(args.threads)}\n\n{same}\n\n{last}\n\n{every}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"reference-{args.model}.json").write_text(json.dumps(runs, indent=1) + "\n")
        title = f"{args.model} on MNIST, {len(args.seeds)} seeds: ours and the paper's own code"
        draw(runs, args.out / f"reference-{args.model}.png", title)


if __name__ == "__main__":
    main()
