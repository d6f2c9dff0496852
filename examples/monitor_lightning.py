"""The curvature monitor as a Lightning callback: how far Adam's steps are from the edge, and how much of them is noise.

    python examples/monitor_lightning.py [--epochs 12] [--folder runs] [--picture lightning.png]

A small convolutional network with batch normalization, on the handwritten digits that scikit-learn includes, by AdamW
with a rate that rises and falls (OneCycleLR). Readings go to Lightning's TensorBoard logger, and the picture is drawn
from its file. Needs ``pip install 'jetplane[cli,frameworks]'``.
"""

import argparse
import logging
import math
import warnings

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from jetplane.callbacks import LightningMonitor

BATCH = 64


class Digits(lightning.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.SiLU(), torch.nn.AvgPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.SiLU(), torch.nn.Flatten(),
            torch.nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        loss = loss_of(self, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loss_of(module, batch):
    """What the monitor differentiates: as `training_step`, but without logging."""
    return F.cross_entropy(module.net(batch[0]), batch[1])


def scalars(folder):
    """What TensorBoard's file holds: steps and values of each name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: ([e.step for e in events.Scalars(name)], [e.value for e in events.Scalars(name)])
        for name in events.Tags()["scalars"]
    }


def draw(found, picture):
    """Rate and critical rate, and the noise share of the slope, over steps."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps, rates = found["curvature/critical_rate"]
    there = [(t, r) for t, r in zip(steps, rates, strict=True) if 0 < r < math.inf]  # no steps uphill
    left.plot(*zip(*there, strict=True), ".-", label="critical rate", color="C0")
    left.plot(*found["curvature/rate"], label="rate (OneCycleLR)", color="C1")
    left.set(yscale="log", xlabel="step", ylabel="rate")
    left.set_title("Adam's steps beside the edge of stability", loc="left", fontsize=10)
    left.legend(frameon=False)
    right.plot(*found["curvature/noise_share"], ".", color="C3")
    right.set(xlabel="step", ylabel="noise share of the squared slope", ylim=(0, None))
    right.set_title("How much of the slope along a step is noise", loc="left", fontsize=10)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments=None):
    """TensorBoard's scalars of the run that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--picture")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*many workers.*")  # the data are in memory

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16 - 0.3).float().view(-1, 1, 8, 8), torch.tensor(labels))
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    logger = TensorBoardLogger(args.folder, name="monitor_lightning")
    trainer = lightning.Trainer(
        max_epochs=args.epochs, accelerator="cpu", logger=logger, log_every_n_steps=args.every,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LightningMonitor(loss_of, every=args.every)],
    )  # fmt: skip
    trainer.fit(Digits(args.epochs * len(loader)), loader)
    found = scalars(logger.log_dir)
    if args.picture:
        draw(found, args.picture)
    return found


if __name__ == "__main__":
    for name, (steps, values) in main().items():
        print(f"{name}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}")
