"""Sweeps: what they find, what survives an interruption, what is refused, the command."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import optuna
import pytest
from typer.testing import CliRunner

from jetplane import cli
from jetplane.errors import ArgumentError, CheckpointError, DataError, RunFolderError
from jetplane.experiments import store
from jetplane.experiments.config import Config
from jetplane.experiments.sweep import Space, Sweep
from jetplane.experiments.train import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's dependencies
    pytest.mark.filterwarnings("ignore::jetplane.RescueWarning"),
]
optuna.logging.set_verbosity(optuna.logging.WARNING)

FGD = Space(Config(method="fgd", epochs=2, batch_size=256), lr=(0.005, 0.5))


def results(sweep: Sweep):
    """Outcomes without times."""
    return [(o.trial, o.config, o.status, o.epochs, o.loss, o.accuracy) for o in sweep.outcomes()]


def test_the_best_trial_is_the_one_of_lowest_loss(tmp_path):
    sweep = Sweep(FGD, tmp_path / "a # folder? 100%")
    sweep.run(trials=3)
    sweep.write()
    outcomes = sweep.outcomes()
    assert [o.trial for o in outcomes] == [0, 1, 2] and len({o.config.lr for o in outcomes}) == 3
    assert all(0.005 <= (o.config.lr or 0) <= 0.5 for o in outcomes)
    for outcome in outcomes:
        folder = sweep.folder / "trials" / f"{outcome.trial:03d}"
        assert store.read_rows(folder / "metrics.jsonl")[-1]["test_loss"] == outcome.loss
        assert Config.load(folder / "config.json") == outcome.config
    best = min(outcomes, key=lambda o: o.loss or math.inf)
    assert Config.load(sweep.folder / "best.json") == best.config
    table = (sweep.folder / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| 00")]
    assert len(rows) == 3 and f"| {best.trial:03d} | {best.config.lr:.4g} | 2 | {best.loss:.4g} |" in rows[0]
    assert (sweep.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (sweep.folder / "sweep.svg").read_text()
    assert {p.name for p in sweep.folder.iterdir()} >= {"sweep.db", "trials"}


def test_more_trials_are_added_to_those_that_are_there(tmp_path):
    Sweep(FGD, tmp_path / "parts").run(trials=1)
    again = Sweep(FGD, tmp_path / "parts")
    trained = []
    again.run(trials=3, observe=lambda done, *step: trained.append(done))
    again.run(trials=3, observe=lambda done, *step: pytest.fail("nothing was left to do"))
    assert set(trained) == {1, 2}
    whole = Sweep(FGD, tmp_path / "whole")
    whole.run(trials=3)
    assert results(again) == results(whole)


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_trial_goes_on_where_it_was(epoch, tmp_path, monkeypatch):
    """Ctrl-C in the second trial, after its first epoch is on disk, or in the second epoch."""
    train = Run.train

    def interrupted(self, observe, on_epoch):
        def stop(row):
            if self.folder.name == "001" and row["epoch"] == epoch:
                raise KeyboardInterrupt
            on_epoch(row)

        return train(self, observe, stop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train", interrupted)
        Sweep(FGD, tmp_path / "parts").run(trials=3)
    again = Sweep(FGD, tmp_path / "parts")
    assert [o.trial for o in again.outcomes()] == [0]
    steps = []
    again.run(trials=3, observe=lambda done, config, step, steps_, loss: steps.append((done, step)))
    first = [step for done, step in steps if done == 1]
    batches = 6  # of an epoch
    assert first == list(range(epoch * batches + 1, 2 * batches + 1))
    whole = Sweep(FGD, tmp_path / "whole")
    whole.run(trials=3)
    assert results(again) == results(whole)


def test_diverged_and_hopeless_runs_end_early(tmp_path):
    space = Space(Config(model="mlp", method="sgd", epochs=4, batch_size=512), lr=(1e-3, 1e12))
    sweep = Sweep(space, tmp_path / "sweep")
    sweep.run(trials=14)
    status = {o.status for o in sweep.outcomes()}
    assert status == {"finished", "pruned", "diverged"}
    for outcome in sweep.outcomes():
        if outcome.status == "finished":
            assert outcome.epochs == 4 and outcome.loss is not None
        elif outcome.status == "pruned":
            assert 2 <= outcome.epochs < 4
        else:
            assert (outcome.config.lr or 0) > 1
    rows = [row["status"] for row in sweep.table()]
    assert rows == sorted(rows, key=["finished", "pruned", "diverged"].index)
    sweep.write()
    assert len((tmp_path / "sweep" / "table.md").read_text().splitlines()) > 14


def test_k_and_clip_vary_too(tmp_path):
    space = Space(Config(method="fomoh-kd", epochs=1, batch_size=512), lr=(0.1, 1.0), k=(2, 5), clip=(0.5, 2.0))
    sweep = Sweep(space, tmp_path / "sweep")
    sweep.run(trials=3)
    sweep.write()
    configs = [o.config for o in sweep.outcomes()]
    assert all(2 <= (c.k or 0) <= 5 and isinstance(c.k, int) and 0.5 <= (c.clip or 0) <= 2 for c in configs)
    assert len({c.clip for c in configs}) == 3


def test_without_a_range_the_rate_lies_around_the_methods_own():
    low, high = Space(Config(method="sgd", lr=0.6)).ranges["lr"]
    assert low == pytest.approx(0.02) and high == pytest.approx(18)


class TestRefusals:
    @pytest.mark.parametrize(
        "ranges",
        [
            {"lr": (0.0, 1.0)},
            {"lr": (1.0, 0.1)},
            {"lr": (1.0, math.inf)},
            {"k": (0, 3)},
            {"method": "sgd", "k": (1, 3)},
            {"method": "sgd", "clip": (1.0, 3.0)},
        ],
    )
    def test_ranges(self, ranges):
        with pytest.raises(ArgumentError, match="range"):
            Space(Config(method=ranges.pop("method", "fgd")), **ranges)

    def test_another_search_space(self, tmp_path):
        Sweep(FGD, tmp_path / "sweep").run(trials=1)
        other = Space(Config(method="fgd", epochs=3, batch_size=256), lr=(0.005, 0.7))
        with pytest.raises(CheckpointError, match="--epochs 2, not 3, --lr-range 0.005 0.5, not 0.005 0.7"):
            Sweep(other, tmp_path / "sweep")
        with pytest.raises(CheckpointError, match="--k 1, not none, --k-range none, not 1 4"):
            Sweep(Space(FGD.config, lr=(0.005, 0.5), k=(1, 4)), tmp_path / "sweep")
        sweep = Sweep(FGD, tmp_path / "sweep")
        older = {name: value for name, value in sweep.study.user_attrs["space"].items() if name != "descent"}
        sweep.study.set_user_attr("space", older)  # as if configurations had no such field yet
        assert len(Sweep(FGD, tmp_path / "sweep").outcomes()) == 1

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RunFolderError, match="no sweep"):
            Sweep(FGD, tmp_path)

    def test_a_second_process(self, tmp_path):
        sweep = Sweep(FGD, tmp_path / "sweep")
        with filelock.FileLock(tmp_path / "sweep" / "sweep.lock"):
            with pytest.raises(RunFolderError, match="another process"):
                sweep.run(trials=1)

    def test_a_damaged_storage(self, tmp_path):
        (tmp_path / "sweep" / "trials").mkdir(parents=True)
        (tmp_path / "sweep" / "sweep.db").write_bytes(b"something else" * 100)
        with pytest.raises(ArgumentError, match="sweep.db cannot be opened"):
            Sweep(FGD, tmp_path / "sweep")
        with pytest.raises(ArgumentError, match="nonsense cannot be opened"):
            Sweep(FGD, tmp_path / "other", storage="nonsense")

    def test_no_trials(self, tmp_path):
        with pytest.raises(ArgumentError, match="at least 1"):
            Sweep(FGD, tmp_path / "sweep").run(trials=0)

    def test_a_run_folder_that_is_another_run(self, tmp_path):
        sweep = Sweep(FGD, tmp_path / "sweep")
        Run(Config(epochs=1), tmp_path / "sweep" / "trials" / "000")
        with pytest.raises(RunFolderError, match="move it away"):
            sweep.run(trials=1)

    def test_what_stops_every_trial_stops_the_sweep(self, tmp_path, monkeypatch):
        monkeypatch.delenv("JETPLANE_MNIST", raising=False)
        sweep = Sweep(Space(Config(data="mnist", method="sgd")), tmp_path / "sweep")
        with pytest.raises(DataError, match="data-dir"):
            sweep.run(trials=2)
        assert sweep.outcomes() == []


def test_a_storage_of_ones_own(tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    Sweep(FGD, tmp_path / "one", storage=url).run(trials=1)
    sweep = Sweep(FGD, tmp_path / "two", storage=url)
    assert sweep.outcomes() == [] and len(Sweep(FGD, tmp_path / "one", storage=url).outcomes()) == 1
    assert set(optuna.get_all_study_names(url)) == {"one", "two"}


class TestCommandLine:
    runner = CliRunner()
    options = ["--method", "fgd", "--epochs", "1", "--lr-range", "0.01", "1", "--batch-size", "512"]

    def test_sweep_then_train_the_best(self, tmp_path):
        out = str(tmp_path / "sweep")
        for trials in ("2", "3"):
            done = self.runner.invoke(cli.app, ["sweep", *self.options, "--trials", trials, "--out", out])
            assert done.exit_code == 0, done.output
            assert done.output.count("finished") == int(trials) and f"train --config {out}/best.json" in done.output
        best = Config.load(tmp_path / "sweep" / "best.json")
        run = tmp_path / "run"
        args = ["train", "--config", f"{out}/best.json", "--epochs", "2", "--out", str(run)]
        done = self.runner.invoke(cli.app, args)
        assert done.exit_code == 0, done.output
        trained = Config.load(run / "config.json")
        assert (trained.lr, trained.method, trained.batch_size) == (best.lr, "fgd", 512) and trained.epochs == 2

    def test_a_configuration_that_is_none(self, tmp_path):
        (tmp_path / "best.json").write_text('{"speed": 3}')
        for command in ("train", "sweep"):
            done = self.runner.invoke(cli.app, [command, "--config", str(tmp_path / "best.json")])
            assert isinstance(done.exception, CheckpointError) and "speed" in str(done.exception)
        done = self.runner.invoke(cli.app, ["train", "--config", "a.json", "--resume", "b"])
        assert isinstance(done.exception, ArgumentError) and "both" in str(done.exception)

    def test_when_everything_diverges(self, tmp_path):
        args = ["sweep", "--method", "sgd", "--model", "mlp", "--epochs", "1", "--lr-range", "1e30", "1e31"]
        done = self.runner.invoke(cli.app, [*args, "--trials", "2", "--out", str(tmp_path / "sweep")])
        assert isinstance(done.exception, ArgumentError) and "lower --lr-range" in str(done.exception)
        assert done.output.count("diverged") == 2 and not (tmp_path / "sweep" / "best.json").exists()

    def test_a_kill_loses_nothing_but_an_epoch(self, tmp_path):
        out = tmp_path / "sweep"
        args = ["sweep", "--method", "fgd", "--epochs", "16", "--lr-range", "0.01", "0.1", "--trials", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "jetplane", *args, "--out", str(out)],
            stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        metrics = out / "trials" / "000" / "metrics.jsonl"
        while len(store.read_rows(metrics)) < 2 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        before = store.read_rows(metrics)
        assert 2 <= len(before) < 16
        done = self.runner.invoke(cli.app, [*args, "--out", str(out)])
        assert done.exit_code == 0, done.output
        after = store.read_rows(metrics)
        assert after[: len(before) - 1] == before[:-1] and len(after) == 16  # with the times of the first process
        environment = json.loads((metrics.parent / "environment.json").read_text())
        assert len(environment["resumed"]) == 1
        assert sorted(Path(out / "trials").iterdir()) == [out / "trials" / n for n in ("000", "001")]
