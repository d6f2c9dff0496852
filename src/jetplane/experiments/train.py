"""A training run: one loop for all methods, and a folder from which it can be resumed after any interruption."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, CheckpointError, NonFiniteError, RunFolderError, SingularPlaneError
from ..parallel.ranks import Ranks, fingerprint
from . import data, environment, launch, memory, models, store
from .config import Config
from .methods import METHODS, Settings

Observer = Callable[[int, int, float], None]  # (steps done, steps in all, loss of the last step)
OnEpoch = Callable[[dict[str, Any]], None]  # (row of metrics of the epoch)


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration, for all parameters of a model.

    Raises:
        ArgumentError: there are several ranks, and the method cannot take a step in common.
    """
    method = METHODS[config.method]
    group = launch.group()
    if group is not None and not method.many_processes:
        raise ArgumentError(f"the method {config.method} would have to send gradients; train it in one process")
    assert config.lr is not None and config.k is not None
    settings = Settings(
        config.lr, config.k, clip=config.clip or None, weight_decay=config.weight_decay, seed=config.seed,
        descent=config.descent, process_group=group,
    )  # fmt: skip
    return method.build(list(model.parameters()), model, settings)


def scheduler(config: Config, opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate schedule of a configuration, to be stepped once an epoch."""
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(opt, config.epochs)
    if config.schedule == "drops":
        return torch.optim.lr_scheduler.StepLR(opt, config.drop_every, config.drop)
    if config.schedule == "drops-at-once":
        milestones = [config.drop_every] * (config.epochs // config.drop_every)
        return torch.optim.lr_scheduler.MultiStepLR(opt, milestones, config.drop)
    milestones = [] if config.schedule == "constant" else [int(config.epochs * f) for f in (0.6, 0.85)]
    return torch.optim.lr_scheduler.MultiStepLR(opt, milestones, 0.1)


class Run:
    """A training run and its folder.

    The folder holds ``config.json``, ``environment.json`` (versions, machine, date), ``metrics.jsonl`` (a line per
    epoch), ``checkpoint.pt`` (after the last complete epoch), ``result.json``, TensorBoard events and, drawn by the
    command line, ``curves.png``.

    Of several ranks (torchrun) each takes its shard of every batch, and rank 0 alone reads and writes the folder. The
    numbers do not depend on the number of ranks, up to rounding.

    Args:
        config: the configuration.
        folder: the run folder; it is created if it does not exist.
        resume: continue from the folder's checkpoint.
        data_dir: folder of the data set, if it does not come with a library.
        dataset: the data set itself, for several runs on the same data.

    Raises:
        RunFolderError: the folder exists and ``resume`` was not asked for.
        CheckpointError: the folder's checkpoint is damaged, or belongs to another configuration or model.
        ArgumentError: the device does not exist, or the method cannot run on several ranks.
        HandshakeError: ranks have different configurations, data or code.
    """

    def __init__(
        self, config: Config, folder: Path, resume: bool = False, data_dir: Path | None = None,
        dataset: data.Data | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.folder = folder
        self.data = data.load(config.data, data_dir) if dataset is None else dataset
        if config.examples:
            self.data = self.data.first(config.examples)
        device = _device(launch.device(config.device))
        torch.manual_seed(config.seed)
        self.model = models.build(config.model, self.data.side, self.data.channels).to(device)
        self.opt = optimizer(config, self.model)
        self.schedule = scheduler(config, self.opt)
        self.train_split, self.test_split = (
            data.Split(s.images.to(device), s.labels.to(device)) for s in (self.data.train, self.data.test)
        )
        self.epoch, self.batch, self.seconds = 0, 0, 0.0
        self.ranks: Ranks | None = getattr(self.opt, "ranks", None)
        if self.ranks is not None:
            self.ranks.handshake(dataclasses.asdict(config) | self._data_facts())
        if resume:
            self._restore()
        else:
            launch.on_first_rank(self._begin)

    def _data_facts(self) -> dict[str, Any]:
        splits = {"training": self.train_split, "test": self.test_split}
        sizes = {f"{name} examples": len(s.labels) for name, s in splits.items()}
        return sizes | {f"{name} data": f"{fingerprint([s.images, s.labels]):x}" for name, s in splits.items()}

    def _begin(self) -> None:
        if self.folder.exists() and any(self.folder.iterdir()):
            raise RunFolderError(
                f"{self.folder} exists; name another folder with --out, or continue with --resume {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.save(self.folder / "config.json")

    @staticmethod
    def resume(folder: Path, data_dir: Path | None = None, dataset: data.Data | None = None) -> Run:
        """Continue from the checkpoint of a run folder.

        Raises:
            CheckpointError: the folder does not exist, holds no configuration, or its checkpoint does not fit.
        """
        if launch.rank() == 0 and not folder.is_dir():
            raise CheckpointError(f"{folder}: no such run folder")
        config = launch.on_first_rank(lambda: Config.load(folder / "config.json"))
        return Run(config, folder, True, data_dir, dataset)

    def train(
        self,
        observe: Observer = lambda done, total, loss: None,
        on_epoch: OnEpoch = lambda row: None,
    ) -> dict[str, Any]:
        """Train the remaining epochs.

        Args:
            observe: called after each step with the steps done, the steps in all and the loss.
            on_epoch: called after each epoch, once it is on disk, with its row of metrics: "epoch", "train_loss",
                "lr", "test_loss", "test_accuracy" and "seconds"; for trackers other than TensorBoard. An exception
                that it raises ends the training and is passed on; the run can be resumed.

        Returns:
            The content of ``result.json``: "status", "finished" or "diverged" (with a "message"); "last", a list with
            the last row of metrics; "peak_memory", peak resident memory in bytes above that at the start. With several
            ranks also "ranks", their number, and "bytes_per_step", what each of them sends in a step.

        >>> import tempfile
        >>> losses = []
        >>> run = Run(Config(epochs=2), Path(tempfile.mkdtemp()) / "run")
        >>> result = run.train(on_epoch=lambda row: losses.append(row["test_loss"]))
        >>> result["status"], len(losses)
        ('finished', 2)

        With Weights & Biases, and in the same way with any other tracker::

            with wandb.init(project="jetplane", config=dataclasses.asdict(run.config)) as board:
                run.train(on_epoch=lambda row: board.log(row, step=row["epoch"]))
        """
        from torch.utils.tensorboard import SummaryWriter

        first = launch.rank() == 0  # it alone evaluates and writes
        if first and self.epoch < self.config.epochs:
            environment.record(self.folder, self.train_split.images.device, self.epoch)
        baseline = memory.reset_peak()
        batches = -(-len(self.train_split.labels) // self.config.batch_size)
        total = batches * self.config.epochs
        status: dict[str, Any] = {"status": "finished"}
        writer: Any = nullcontext()
        if first:
            writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.epoch + 1)
        with writer as events:
            while self.epoch < self.config.epochs:
                try:
                    row = self._epoch(lambda done, loss: observe(self.epoch * batches + done, total, loss))
                except (NonFiniteError, SingularPlaneError) as error:
                    status = {"status": "diverged", "message": f"epoch {self.epoch + 1}, batch {self.batch}: {error}"}
                    break
                self.epoch += 1
                self.schedule.step()
                if not first:
                    continue
                row = {"epoch": self.epoch, **row, **self._evaluate(), "seconds": round(self.seconds, 4)}
                store.append_row(self.folder / "metrics.jsonl", row)
                self._save()
                for name, value in row.items():
                    if name != "epoch":
                        events.add_scalar(name, value, self.epoch)
                events.flush()
                on_epoch(dict(row))
        if self.ranks is not None:
            status |= {"ranks": self.ranks.size, "bytes_per_step": round(self.ranks.wire_bytes)}
        if not first:
            return status
        result = status | {"last": self.rows()[-1:], "peak_memory": max(memory.peak() - baseline, 0)}
        store.write_atomically(self.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        return result

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics so far."""
        return store.read_rows(self.folder / "metrics.jsonl")

    def _epoch(self, observe: Callable[[int, float], None]) -> dict[str, float]:
        """Train one epoch. Its batches depend on the seed and the number of the epoch alone."""
        self.model.train()
        torch.manual_seed((self.config.seed << 20) + self.epoch)
        images, labels = self.train_split.images, self.train_split.labels
        total, start = 0.0, time.perf_counter()
        rate = self.opt.param_groups[0]["lr"]
        for n, batch in enumerate(torch.randperm(len(labels)).split(self.config.batch_size)):
            self.batch, own = n + 1, launch.shard(torch.arange(len(batch)))
            x, y = images[batch], labels[batch[own]]
            if self.data.augment is not None:  # the whole batch, so that all ranks draw the same numbers
                x = self.data.augment(x)
            x = x[own]
            loss = self._step(lambda x=x, y=y: F.cross_entropy(self.model(x), y), len(own)).item()
            total += loss * len(batch)
            observe(n + 1, loss)
        self.seconds += time.perf_counter() - start
        return {"train_loss": total / len(labels), "lr": rate}

    def _step(self, closure: Callable[[], Tensor], examples: int) -> Tensor:
        if not METHODS[self.config.method].backward:
            return self.opt.step(closure, weight=examples)  # type: ignore[return-value,arg-type,call-arg]
        self.opt.zero_grad()
        loss = closure()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is not finite: {loss.item()}")
        loss.backward()
        self.opt.step()
        return loss.detach()

    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        loss = right = 0.0
        images, labels = self.test_split.images, self.test_split.labels
        with torch.inference_mode():
            for x, y in zip(images.split(2000), labels.split(2000), strict=True):
                out = self.model(x)
                loss += F.cross_entropy(out, y, reduction="sum").item()
                right += (out.argmax(1) == y).sum().item()
        return {"test_loss": loss / len(labels), "test_accuracy": right / len(labels)}

    def _save(self) -> None:
        store.save_checkpoint(
            self.folder / "checkpoint.pt",
            {
                "config": dataclasses.asdict(self.config),
                "epoch": self.epoch,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.opt.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
        )

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        state = launch.on_first_rank(lambda: store.load_checkpoint(path) if path.exists() else None)
        if state is None:  # the run ended within its first epoch
            self._keep_rows()
            return
        known = dataclasses.asdict(Config.of(state["config"]))  # defaults for settings that older versions did not have
        if known != dataclasses.asdict(self.config):
            changed = sorted(k for k, v in dataclasses.asdict(self.config).items() if known[k] != v)
            raise CheckpointError(f"{path}: belongs to another run; different: {', '.join(changed)}")
        try:
            self.model.load_state_dict(state["model"])
            self.opt.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: does not fit this model: {error}") from error
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self._keep_rows()

    def _keep_rows(self) -> None:
        if launch.rank() == 0:
            store.keep_rows(self.folder / "metrics.jsonl", self.epoch)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
