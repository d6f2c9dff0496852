"""Runs: their folders, what survives a kill, damaged files, the command line."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import jetplane as jp
from jetplane import cli
from jetplane.errors import CheckpointError, DataError, RunFolderError
from jetplane.experiments import data, models, report, store, train
from jetplane.experiments.config import Config
from jetplane.experiments.methods import METHODS
from jetplane.experiments.train import Run
from jetplane.subspace.descent import Damped

pytestmark = [
    pytest.mark.filterwarnings("ignore::jetplane.RescueWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's dependencies
]


def numbers(folder: Path):
    """Metrics without times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in store.read_rows(folder / "metrics.jsonl")]


def weights(folder: Path):
    return store.load_checkpoint(folder / "checkpoint.pt")["model"]


@pytest.mark.parametrize("model", ["logreg", "mlp", "cnn"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_model(method, model, tmp_path):
    result = Run(Config(model=model, method=method, epochs=1, batch_size=256), tmp_path / "run").train()
    assert result["status"] == "finished" and result["last"][0]["epoch"] == 1
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "tensorboard",
    }  # fmt: skip


def test_the_cost_of_plane_search_counts_the_directions_that_it_remembers(monkeypatch):
    seen, solve = [], Damped.solve

    def counted(self, slope, curvature):
        seen.append(len(slope))
        return solve(self, slope, curvature)

    monkeypatch.setattr(Damped, "solve", counted)
    config = Config(method="plane-search")
    model, (x, y) = models.build("mlp", 8), (torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    model.append(torch.nn.Linear(10, 10))  # first layer, last one, and one between them
    opt = train.optimizer(config, model)
    for _ in range(4):
        opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    assert seen[-1] == max(seen)
    assert config.forward_passes == 1 + 2 * seen[-1] + 8  # and the passes of the estimates


def test_defaults_of_the_command_line_are_those_of_a_configuration(tmp_path):
    done = CliRunner().invoke(cli.app, ["train", "--epochs", "1", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert Config.load(tmp_path / "run" / "config.json") == Config(epochs=1)


def test_training_learns(tmp_path):
    run = Run(Config(method="fomoh-kd", k=10, lr=0.6, clip=1.0, epochs=8), tmp_path / "run")
    assert run.train()["last"][0]["test_accuracy"] > 0.75


def test_plane_search_learns_without_a_rate(tmp_path):
    run = Run(Config(model="mlp", method="plane-search", epochs=4), tmp_path / "run")
    assert run.config.lr == 1.0 and run.config.label == "PlaneSearch"
    assert run.train()["last"][0]["test_accuracy"] > 0.85


def test_the_papers_models_have_its_numbers_of_parameters():
    sizes = {n: sum(p.numel() for p in models.build(n, 28).parameters()) for n in ("logreg", "cnn")}
    assert sizes == {"logreg": 7_850, "cnn": 431_080}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_resuming_gives_the_numbers_of_an_uninterrupted_run(schedule, tmp_path, monkeypatch):
    config = Config(model="mlp", method="fomoh", epochs=4, schedule=schedule)
    Run(config, tmp_path / "whole").train()

    def interrupted(self, *args, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] > 30:
            raise KeyboardInterrupt
        return step(self, *args)

    step = Run._step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_step", interrupted)
        Run(config, tmp_path / "parts").train()
    run = Run.resume(tmp_path / "parts")
    assert run.epoch == 2
    run.train()
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    a, b = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_kill_loses_at_most_an_epoch(tmp_path):
    out = tmp_path / "killed"
    options = ["--model", "cnn", "--method", "fomoh-kd", "--k", "3", "--epochs", "6", "--seed", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jetplane", "train", *options, "--out", str(out)],
        stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(store.read_rows(out / "metrics.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(store.read_rows(out / "metrics.jsonl"))
    assert done >= 2
    run = Run.resume(out)
    assert run.epoch >= done - 1
    run.train()
    Run(run.config, tmp_path / "whole").train()
    assert numbers(out) == numbers(tmp_path / "whole")


def test_a_diverged_run_says_so(tmp_path):
    result = Run(Config(model="mlp", method="sgd", lr=1e30, epochs=3), tmp_path / "run").train()
    assert result["status"] == "diverged" and "not finite" in result["message"]


class TestRefusals:
    def test_an_existing_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RunFolderError, match="--resume"):
            Run(Config(), tmp_path)

    def test_a_folder_that_is_no_run(self, tmp_path):
        with pytest.raises(CheckpointError, match="configuration"):
            Run.resume(tmp_path)
        with pytest.raises(CheckpointError, match="no such"):
            Run.resume(tmp_path / "nowhere")

    @pytest.fixture
    def finished(self, tmp_path):
        Run(Config(epochs=1), tmp_path / "run").train()
        return tmp_path / "run"

    def test_a_damaged_checkpoint(self, finished):
        path = finished / "checkpoint.pt"
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match="checksum"):
            Run.resume(finished)
        path.write_bytes(b"something else")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            Run.resume(finished)

    def test_code_in_a_checkpoint_is_not_run(self, finished):
        class Evil:
            def __reduce__(self):
                return print, ("gotcha",)

        store.save_checkpoint(finished / "checkpoint.pt", {"config": Evil()})
        with pytest.raises(CheckpointError, match="cannot be read"):
            Run.resume(finished)

    def test_a_checkpoint_of_another_configuration(self, finished):
        values = json.loads((finished / "config.json").read_text())
        (finished / "config.json").write_text(json.dumps(values | {"lr": 9.0}))
        with pytest.raises(CheckpointError, match="different: lr"):
            Run.resume(finished)

    @pytest.mark.parametrize(
        "settings",
        [
            {"model": "gpt"},
            {"epochs": 0},
            {"schedule": "up"},
            {"method": "sgd", "k": 3},
            {"method": "sgd", "clip": 1.0},
        ],
    )
    def test_settings(self, settings):
        with pytest.raises(jp.ArgumentError):
            Config(**settings)

    def test_a_device_that_is_not_there(self, tmp_path):
        with pytest.raises(jp.ArgumentError, match="device"):
            Run(Config(device="cuda:77"), tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["logreg", "cnn"])
def test_the_default_settings_do_not_blow_up(method, model, tmp_path):
    run = Run(Config(model=model, method=method, epochs=6), tmp_path / "run")
    assert run.train()["last"][0]["train_loss"] < 3  # chance is 2.3


class TestMnist:
    """On files of our own making; the real ones are checked by checksum."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        import hashlib

        known = {}
        for name, (_, header) in data.MNIST_FILES.items():
            n = 12 if name.startswith("train") else 6
            body = bytes(i % 10 for i in range(n if header == 8 else n * 784))
            content = bytes(header) + body
            known[name] = (hashlib.md5(content).hexdigest(), header)
            if name.startswith("train"):
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / "deep").mkdir(exist_ok=True)
                (tmp_path / "deep" / name).write_bytes(content)
        monkeypatch.setattr(data, "MNIST_FILES", known)
        return tmp_path

    def test_reads_packed_and_unpacked_files(self, folder):
        mnist = data.load("mnist", folder)
        assert mnist.train.images.shape == (12, 1, 28, 28) and mnist.test.labels.tolist() == [0, 1, 2, 3, 4, 5]

    def test_the_folder_may_come_from_the_environment(self, folder, monkeypatch):
        monkeypatch.setenv(data.FOLDER_VARIABLE, str(folder))
        assert data.load("mnist").side == 28

    def test_missing_truncated_and_changed_files(self, folder):
        with pytest.raises(DataError, match="data-dir"):
            data.load("mnist")
        path = folder / "train-labels-idx1-ubyte.gz"
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        with pytest.raises(DataError, match="cannot be read or unpacked"):
            data.load("mnist", folder)
        path.write_bytes(gzip.compress(b"other"))
        with pytest.raises(DataError, match="MD5"):
            data.load("mnist", folder)
        path.unlink()
        with pytest.raises(DataError, match="found neither"):
            data.load("mnist", folder)

    def test_no_mirror_answers(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "MNIST_MIRRORS", ("http://localhost:9/",))
        with pytest.raises(DataError, match="localhost"):
            data.fetch_mnist(tmp_path)


class TestCommandLine:
    runner = CliRunner()

    def test_train_resume_and_compare(self, tmp_path):
        folders = [str(tmp_path / m) for m in ("fgd", "sgd")]
        for folder in folders:
            done = self.runner.invoke(
                cli.app, ["train", "--method", Path(folder).name, "--epochs", "2", "--out", folder]
            )
            assert done.exit_code == 0, done.output
            assert "run folder" in done.output and (Path(folder) / "curves.png").stat().st_size > 10_000
        again = self.runner.invoke(cli.app, ["train", "--resume", folders[0]])
        assert again.exit_code == 0
        picture = tmp_path / "both.png"
        assert self.runner.invoke(cli.app, ["compare", *folders, "--out", str(picture)]).exit_code == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_resumed_run_keeps_its_options(self, tmp_path):
        folder = tmp_path / "run"
        Run(Config(epochs=1), folder).train()
        same = self.runner.invoke(cli.app, ["train", "--resume", str(folder), "--model", "logreg"])
        assert same.exit_code == 0, same.output
        other = self.runner.invoke(cli.app, ["train", "--resume", str(folder), "--model", "mlp"])
        assert isinstance(other.exception, CheckpointError) and "--model logreg" in str(other.exception)

    def test_ctrl_c_says_how_to_go_on(self, tmp_path):
        out = tmp_path / "run"
        # A shell that puts the tests in the background has them ignore Ctrl-C, and children inherit that.
        program = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from jetplane.__main__ import main; main()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, "train", "--model", "cnn", "--epochs", "500", "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not store.read_rows(out / "metrics.jsonl") and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130 and f"--resume {out}" in output and "Traceback" not in output

    def test_a_run_that_diverges_later_keeps_its_picture(self, tmp_path, monkeypatch):
        epoch = Run._epoch

        def diverges(self, observe):
            if self.epoch == 1:
                raise jp.NonFiniteError("the loss is nan")
            return epoch(self, observe)

        monkeypatch.setattr(Run, "_epoch", diverges)
        done = self.runner.invoke(cli.app, ["train", "--epochs", "3", "--out", str(tmp_path / "run")])
        assert done.exit_code == 2 and "diverged" in done.output and (tmp_path / "run" / "curves.png").exists()

    def test_errors_are_one_line_and_exit_code_2(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setattr(sys, "argv", ["jetplane", "train", "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error") and "exists" in error and "\n" not in error and "Traceback" not in error

    def test_an_unknown_word_names_the_known_ones(self):
        result = self.runner.invoke(cli.app, ["train", "--method", "adam"])
        assert result.exit_code == 2 and "fomoh-kd" in result.output

    def test_a_legend_tells_runs_of_one_method_apart(self):
        configs = [Config(lr=0.1), Config(lr=0.2), Config(method="sgd")]
        assert report.names(configs) == ["FoMoH-3D, lr 0.1", "FoMoH-3D, lr 0.2", "SGD, backprop"]
        assert report.names(configs[::2]) == ["FoMoH-3D", "SGD, backprop"]

    def test_an_unfinished_run_cannot_be_compared(self, tmp_path):
        Config().save(tmp_path / "config.json")
        with pytest.raises(RunFolderError, match="nothing to show"):
            report.Finished.read(tmp_path)


def test_a_run_in_a_process_of_its_own(tmp_path):
    from jetplane.experiments.demo import plan, run_apart

    steps, folders = [], [tmp_path / "first", tmp_path / "second"]
    configs = [Config(epochs=2), Config(epochs=2, seed=1)]
    run_apart(configs, folders, lambda done, total, loss: steps.append((done, total)))
    assert steps[-1] == (48, 48)
    runs = [report.Finished.read(folder) for folder in folders]
    assert all(run.result["peak_memory"] > 0 for run in runs)
    with pytest.raises(jp.JetplaneError, match="exists"):
        run_apart(configs, folders, lambda *a: None)
    assert {c.method for configs in plan() for c in configs} == {"sgd", "fgd", "fomoh", "fomoh-kd", "plane-search"}
    assert all([c.seed for c in configs] == [5, 6] for configs in plan(5, 2))

    [row] = report.table(runs)  # seeds share a row
    low, high = sorted(run.rows[-1]["test_loss"] for run in runs)
    assert row["loss"] == f"{(low + high) / 2:.3f} ± {(high - low) / 2**0.5:.3f}"
    assert len(report.table([runs[0], dataclasses.replace(runs[1], config=Config(epochs=2, lr=0.1))])) == 2
    report.draw(runs, tmp_path / "curves.png", "two seeds")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
