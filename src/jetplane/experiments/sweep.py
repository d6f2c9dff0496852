"""Hyperparameter search for one method by Optuna: the learning rate, optionally k and clip; resumable, with pruning."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from ..errors import ArgumentError, CheckpointError, NonFiniteError, RunFolderError, SingularPlaneError
from . import store
from .config import SWEEP_SPREAD, Config
from .methods import METHODS
from .report import COLOURS, plt, rounded_ticks
from .train import Run

SPACE = "space"  # attribute of the study that holds the search space
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
# (trials done, configuration of the current one, its steps done, its steps in all, loss)
Observer = Callable[[int, Config, int, int, float], None]


@dataclass(frozen=True)
class Space:
    """The search space of a sweep. Each varied setting is drawn log-uniformly from its range.

    Attributes:
        config: the settings that do not vary. Its ``lr``, and ``k`` and ``clip`` where they have a range, are not used.
        lr: lowest and highest rate; by default the configuration's rate divided and multiplied by `SWEEP_SPREAD`.
        k: lowest and highest number of directions, both included; None for the configuration's.
        clip: lowest and highest limit of the norm of a step; None for the configuration's.

    Raises:
        ArgumentError: a range is empty or not positive, or the method does not have the setting.
    """

    config: Config
    lr: tuple[float, float] | None = None
    k: tuple[int, int] | None = None
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            rate = float(self.config.lr or 0.0)
            object.__setattr__(self, "lr", (rate / SWEEP_SPREAD, rate * SWEEP_SPREAD))
        for name, bounds in self.ranges.items():
            low, high = bounds
            if not 0 < low <= high < math.inf:
                raise ArgumentError(f"the range of {name} must be 0 < low <= high, got {low:g} to {high:g}")
        name, method = self.config.method, METHODS[self.config.method]
        if self.k and not (method.takes_k and method.k):
            raise ArgumentError(f"the method {name} draws no directions, so it takes no range of k")
        if self.clip and not method.takes_clip:
            raise ArgumentError(f"the method {name} takes no clip, so it takes no range of it")

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The settings that vary, each with its bounds."""
        every = {"lr": self.lr, "k": self.k, "clip": self.clip}
        return {name: bounds for name, bounds in every.items() if bounds is not None}

    @property
    def label(self) -> str:
        """The method as a title names it."""
        return METHODS[self.config.method].title if self.k else self.config.label

    def plain(self) -> dict[str, Any]:
        """A dictionary that JSON can represent; equal for equal search spaces."""
        kept = {name: value for name, value in asdict(self.config).items() if name not in self.ranges}
        return kept | {f"{name}_range": list(bounds) for name, bounds in self.ranges.items()}

    def propose(self, trial: optuna.Trial) -> Config:
        """The configuration of a trial."""
        values: dict[str, Any] = {}
        for name, (low, high) in self.ranges.items():
            suggest = trial.suggest_int if name == "k" else trial.suggest_float
            values[name] = suggest(name, low, high, log=True)  # type: ignore[arg-type]
        return replace(self.config, **values)


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        trial: number of the trial, and name of its run folder.
        config: its configuration.
        status: "finished", "pruned" or "diverged".
        epochs: epochs trained.
        loss: test loss of the last epoch; None if it is not finite, or if there is no epoch.
        accuracy: test accuracy of the last epoch.
        seconds: seconds of training.
    """

    trial: int
    config: Config
    status: str
    epochs: int
    loss: float | None
    accuracy: float | None
    seconds: float


class Sweep:
    """A sweep and its folder.

    The folder holds ``trials/`` (a run folder for each), ``sweep.db`` (Optuna's storage, unless another is given) and,
    after `write`, ``table.md``, ``sweep.png``, ``sweep.svg`` and ``best.json``, a configuration for
    ``jetplane train --config``. The objective is the test loss of the last epoch. A trial that diverges ends. Once four
    trials have finished, a trial is pruned from its second epoch on if its best loss is above the median of the
    others' at that epoch.

    A folder that holds a sweep is continued: an interrupted trial is resumed from its checkpoint, and each proposal
    depends on the seed and the previous trials alone, so that an interruption does not change the result.

    Args:
        space: the search space. The seed of its configuration also seeds the proposals.
        folder: the sweep folder; its name is that of the study.
        storage: a URL for Optuna, such as ``sqlite:///sweeps.db``.
        data_dir: folder of the data set, if it does not come with a library.

    Raises:
        CheckpointError: the stored sweep has another search space.
        RunFolderError: the folder holds something else, or another process uses it.
        ArgumentError: the storage cannot be opened.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "sweep"
    >>> sweep = Sweep(Space(Config(method="fgd", epochs=1), lr=(0.01, 1.0)), folder)
    >>> sweep.run(trials=2)
    >>> [outcome.status for outcome in sweep.outcomes()]
    ['finished', 'finished']
    """

    def __init__(self, space: Space, folder: Path, storage: str | None = None, data_dir: Path | None = None) -> None:
        self.space = space
        self.folder = folder
        self.data_dir = data_dir
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "trials").is_dir():
            raise RunFolderError(f"{folder} exists and holds no sweep; name another folder with --out")
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(folder / "sweep.lock", timeout=0)
        with self._alone():
            self.study = self._open(storage)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise RunFolderError(
                f"{self.folder}: another process is working on this sweep; wait for it to end"
            ) from None
        try:
            yield
        finally:
            self.lock.release()

    def _open(self, storage: str | None) -> optuna.Study:
        path = self.folder / "sweep.db"
        shown = storage or str(path)

        def connect() -> sqlite3.Connection:  # not by URL, in which some characters of file names have a meaning
            return sqlite3.connect(path, check_same_thread=False)

        try:
            study = optuna.create_study(
                storage=storage or RDBStorage(f"sqlite:///{path.name}", engine_kwargs={"creator": connect}),
                study_name=self.folder.resolve().name,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
                load_if_exists=True,
            )
            stored = study.user_attrs.get(SPACE)
        except Exception as error:  # noqa: BLE001 - database drivers raise exceptions of their own
            reason = str(error).splitlines()[0]
            raise ArgumentError(f"the storage {shown} cannot be opened as Optuna's: {reason}") from error
        space = self.space.plain()
        if stored is None and not study.trials:
            study.set_user_attr(SPACE, space)
            return study
        # Settings that did not exist when the sweep was stored have their default.
        known = {field.name: field.default for field in fields(Config) if field.name in space} | (stored or {})
        if known != space:
            raise CheckpointError(f"{shown}: this sweep has {_differences(known, space)}; name another folder")
        return study

    def run(self, trials: int, observe: Observer = lambda done, config, step, steps, loss: None) -> None:
        """Run trials until ``trials`` of them have ended; interrupted ones are resumed first.

        Args:
            trials: number of trials, those of earlier calls included.
            observe: called during a trial; see `Observer`.

        Raises:
            ArgumentError: trials < 1.
            JetplaneError: a trial cannot run (no data, no such device). It counts as interrupted.
        """
        if trials < 1:
            raise ArgumentError(f"trials must be at least 1, got {trials}")
        with self._alone():
            for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
                self.study.tell(trial.number, state=TrialState.FAIL)  # it is queued again with the same values
                if trial.params:
                    self.study.enqueue_trial(trial.params)
            while (done := len(self.study.get_trials(deepcopy=False, states=ENDED))) < trials:
                # A sampler for each trial: the state of a longer-lived one would be lost by an interruption.
                self.study.sampler = optuna.samplers.TPESampler(seed=(self.space.config.seed << 20) + done)
                self._trial(self.study.ask(), done, observe)

    def _trial(self, trial: optuna.Trial, place: int, observe: Observer) -> None:
        config = self.space.propose(trial)
        trial.set_user_attr("trial", place)
        folder = self.folder / "trials" / f"{place:03d}"
        begun = (folder / "config.json").exists()
        run = Run.resume(folder, self.data_dir) if begun else Run(config, folder, data_dir=self.data_dir)
        if run.config != config:
            raise RunFolderError(f"{folder}: expected the run of trial {place}, found another one; move it away")

        def judge(row: dict[str, Any]) -> None:
            if not math.isfinite(row["test_loss"]):
                raise NonFiniteError(f"the test loss is not finite: {row['test_loss']}")
            trial.report(row["test_loss"], row["epoch"])
            if row["epoch"] < config.epochs and trial.should_prune():
                raise optuna.TrialPruned

        try:
            for row in run.rows():
                judge(row)
            status = run.train(lambda *step: observe(place, config, *step), on_epoch=judge)["status"]
        except optuna.TrialPruned:
            status = "pruned"
        except (NonFiniteError, SingularPlaneError):
            status = "diverged"
        rows = run.rows()
        last = rows[-1] if rows else {}
        loss = last.get("test_loss", math.nan)
        for name, value in {
            "status": status, "epochs": len(rows), "loss": loss if math.isfinite(loss) else None,
            "accuracy": last.get("test_accuracy"), "seconds": run.seconds,
        }.items():  # fmt: skip
            trial.set_user_attr(name, value)
        if status == "finished":
            self.study.tell(trial, loss)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def outcomes(self) -> list[Outcome]:
        """The trials that have ended, in order."""
        return sorted((self._outcome(t) for t in self.study.get_trials(states=ENDED)), key=lambda o: o.trial)

    def _outcome(self, trial: FrozenTrial) -> Outcome:
        return Outcome(config=replace(self.space.config, **trial.params), **trial.user_attrs)

    def best(self) -> Outcome | None:
        """The finished trial with the lowest loss; None if there is none."""
        finished = [o for o in self.outcomes() if o.status == "finished"]
        return min(finished, key=lambda o: o.loss or 0.0, default=None)

    def table(self) -> list[dict[str, str]]:
        """A row for each trial: finished, then pruned, then diverged ones; each group by its loss."""
        order = ["finished", "pruned", "diverged"]
        outcomes = sorted(
            self.outcomes(), key=lambda o: (order.index(o.status), o.loss if o.loss is not None else math.inf)
        )
        return [
            {
                "trial": f"{o.trial:03d}",
                **{name: f"{getattr(o.config, name):.4g}" for name in self.space.ranges},
                "epochs": str(o.epochs),
                "test loss": "-" if o.loss is None else f"{o.loss:.4g}",
                "accuracy": "-" if o.accuracy is None else f"{100 * o.accuracy:.1f} %",
                "seconds": f"{o.seconds:.1f}",
                "status": o.status,
            }
            for o in outcomes
        ]

    def write(self) -> None:
        """Write ``table.md``, ``sweep.png``, ``sweep.svg`` and, if a trial finished, ``best.json``."""
        best = self.best()
        if best is not None:
            best.config.save(self.folder / "best.json")
        store.write_atomically(self.folder / "table.md", self._markdown().encode())
        self._draw()

    def _markdown(self) -> str:
        config, rows = self.space.config, self.table()
        ranges = [f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in self.space.ranges.items()]
        kept = [f"{name} {value}" for name, value in self.space.plain().items() if not name.endswith("_range")]
        lines = [f"# {self._title()}", "", f"Log-uniform: {', '.join(ranges)}. Kept: {', '.join(kept)}."]
        lines += ["Test loss and accuracy are those of a trial's last epoch.", ""]
        if rows:
            lines += ["| " + " | ".join(rows[0]) + " |", "|" + "--:|" * (len(rows[0]) - 1) + "---|"]
            lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
        best = self.best()
        if best is not None:
            lines += ["", f"Best: trial {best.trial:03d}, to be trained with `jetplane train --config best.json`."]
        if config.seed:
            lines += [f"Seed of the runs and of the proposals: {config.seed}."]
        return "\n".join(lines) + "\n"

    def _title(self) -> str:
        return f"{self.space.label}, {self.space.config.model} on {self.space.config.data}"

    def _draw(self) -> None:
        """Plot the loss over each setting that varies."""
        outcomes, best = self.outcomes(), self.best()
        names = {"lr": "rate", "k": "directions", "clip": "largest step"}
        ranges = self.space.ranges
        figure, panels = plt.subplots(
            1, len(ranges), figsize=(1.5 + 4.5 * len(ranges), 4.2), squeeze=False, sharey=True, layout="constrained"
        )
        figure.suptitle(self._title(), fontsize=12)
        for axes, (name, (low, high)) in zip(panels[0], ranges.items(), strict=True):
            _points(axes, outcomes, best, name)
            axes.set_xscale("log")
            if any(o.loss is not None for o in outcomes):
                axes.set_yscale("log")
                axes.margins(y=0.15)
                rounded_ticks(axes.yaxis)
            else:
                axes.set_yticks([])
            axes.set_xlim(low / 1.2, high * 1.2)
            rounded_ticks(axes.xaxis)
            axes.set_xlabel(names[name])
            axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel("test loss of the last epoch")
        handles, labels = panels[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(handles))
        for suffix in ("png", "svg"):
            figure.savefig(self.folder / f"sweep.{suffix}", dpi=150)
        plt.close(figure)


MARKS = {"finished": ("o", COLOURS[0]), "pruned": ("v", COLOURS[4]), "diverged": ("x", COLOURS[1])}


def _points(axes: Any, outcomes: Sequence[Outcome], best: Outcome | None, name: str) -> None:
    for status, (marker, colour) in MARKS.items():
        chosen = [o for o in outcomes if o.status == status]
        if not chosen:
            continue
        x = [getattr(o.config, name) for o in chosen]
        label = f"{status} ({len(chosen)})"
        if status == "diverged":  # at the upper edge, whatever their last loss was
            axes.scatter(
                x, [0.97] * len(x), marker=marker, color=colour, label=label, transform=axes.get_xaxis_transform()
            )
        else:
            axes.scatter(x, [o.loss for o in chosen], marker=marker, color=colour, label=label, zorder=3)
    if best is not None:
        at = getattr(best.config, name)
        axes.scatter([at], [best.loss], s=130, facecolors="none", edgecolors="black", label="best", zorder=4)
        axes.annotate(
            f"{at:.3g}", (at, best.loss), xytext=(0, -16), textcoords="offset points", ha="center", fontsize=9
        )


def _differences(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    names = sorted(name for name in stored | asked if stored.get(name) != asked.get(name))

    def shown(values: dict[str, Any], name: str) -> str:
        value = values.get(name)
        return "none" if value is None else " ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)

    return ", ".join(f"--{n.replace('_', '-')} {shown(stored, n)}, not {shown(asked, n)}" for n in names)
