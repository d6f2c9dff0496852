"""The paper's experiments: what they claim, and that they can be interrupted and trusted."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import jetplane as jp
from jetplane import cli
from jetplane.errors import CheckpointError, DataError, RunFolderError
from jetplane.experiments import data, models
from jetplane.experiments.config import Config
from jetplane.experiments.reproduce import experiment, laws, rosenbrock, run_experiment
from jetplane.experiments.reproduce.results import Results, markdown, pm
from jetplane.experiments.train import Run, optimizer, scheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore::jetplane.RescueWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's dependencies
]


def quiet(fraction, loss):
    """Whoever watches an experiment in a test."""


class TestRosenbrock:
    def test_the_formulas_of_gradient_and_hessian(self):
        for d in (2, 5):
            x = torch.randn(d).double()
            gradient, hessian = rosenbrock.derivatives(x)
            torch.testing.assert_close(gradient, torch.func.grad(rosenbrock.rosenbrock)(x))
            torch.testing.assert_close(hessian, torch.func.hessian(rosenbrock.rosenbrock)(x))

    @pytest.mark.parametrize("seed", range(10))
    def test_in_two_dimensions_the_path_of_a_plane_is_newtons(self, seed):
        ours, newton = (rosenbrock.iterates(2, m, seed, 30, quiet)["points"] for m in ("fomoh-2", "newton"))
        assert np.abs(np.array(ours) - newton).max() < 1e-8
        assert newton[-1] == pytest.approx([1, 1], abs=1e-12)

    def test_in_ten_dimensions_more_is_better_and_all_is_newton(self):
        """10 starts, 100 iterations, as in the paper: the medians of the last losses go down with K."""
        ks = range(2, 11)
        losses = {k: [rosenbrock.iterates(10, f"fomoh-{k}", s, 100, quiet)["loss"] for s in range(10)] for k in ks}
        medians = [np.median(np.log10(np.maximum(np.array(losses[k])[:, -1], rosenbrock.FLOOR))) for k in ks]
        # Neighbours differ by little for small K; by half an order of magnitude or more from 6 on.
        assert all(b < a + 0.05 for a, b in zip(medians, medians[1:], strict=False)), medians
        assert all(b < a for a, b in zip(medians, medians[2:], strict=False)), medians
        assert all(b < a - 0.4 for a, b in zip(medians[4:], medians[5:], strict=False)), medians
        # K = 10: Newton's losses, until Newton itself is thrown so far that rounding decides where it comes down.
        whole = 0
        for seed in range(10):
            ours = np.array(losses[10][seed])
            newton = np.array(rosenbrock.iterates(10, "newton", seed, 100, quiet)["loss"])
            thrown = np.flatnonzero(newton > 1e6)
            end = thrown[0] if len(thrown) else len(newton)
            apart = np.abs(ours - newton)[:end] > 1e-3 * newton[:end]
            assert not (apart & (newton[:end] > 1e-20)).any(), seed
            whole += end == len(newton)
        assert whole >= 7  # 8 starts on the machine where this was written

    def test_a_path_that_leaves_the_numbers_ends(self, monkeypatch):
        monkeypatch.setattr(rosenbrock, "FGD_RATE", 1e3)
        metrics = rosenbrock.iterates(2, "fgd", 0, 40, quiet)
        assert metrics["ended"] and len(metrics["loss"]) == 41


class TestLaws:
    @pytest.mark.parametrize("law", laws.LAWS)
    def test_the_rule_is_the_exact_rate_on_a_round_quadratic(self, law):
        a = laws.curvatures("round", 12)
        rate = jp.step_scale(law, 12)
        losses = laws.predicted(law, a, rate, 0.0, 5)
        assert losses[1:] / losses[:-1] == pytest.approx(np.full(5, 1 - rate))
        stretched = laws.curvatures("stretched", 12)
        assert laws.spectral_radius(laws.recursion(law, stretched, rate)) < 1 - stretched.min() * rate

    @pytest.mark.parametrize("law", ["rademacher", "sphere", "laplace"])
    @pytest.mark.parametrize("momentum", [0.0, 0.6])
    def test_our_optimizer_does_what_the_recursion_expects(self, law, momentum):
        a = laws.curvatures("stretched", 4)
        found = np.array([laws.descend(law, a, 0.15, momentum, 6, seed) for seed in range(400)])
        expected = laws.predicted(law, a, 0.15, momentum, 6)
        error = found.std(0, ddof=1) / len(found) ** 0.5
        assert (np.abs(found.mean(0) - expected) <= 4.5 * error + 1e-12).all()

    def test_several_directions_are_less_noise(self):
        a = laws.curvatures("round", 6)
        for k in (1, 3):
            rate = jp.step_scale("uniform", 6, k)
            assert laws.spectral_radius(laws.recursion("uniform", a, rate, k=k)) == pytest.approx(1 - rate)


def milestones(schedule: str, epochs: int, every: int) -> list[float]:
    config = Config(method="fomoh", lr=1.0, schedule=schedule, drop_every=every, epochs=epochs)
    opt = optimizer(config, torch.nn.Linear(1, 1))
    steps = scheduler(config, opt)
    rates = []
    for _ in range(epochs):
        rates.append(opt.param_groups[0]["lr"])
        opt._opt_called = True  # or torch warns: nothing is trained here
        steps.step()
    return rates


class TestSchedules:
    """As the paper's scripts drop the rate, counted by hand from their code."""

    def test_one_at_a_time(self):
        assert milestones("drops", 7, 2) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001])

    def test_all_at_once(self):
        assert milestones("drops-at-once", 7, 2) == pytest.approx([1, 1, *[0.001] * 5])

    @pytest.mark.parametrize("settings", [{"drop_every": 0}, {"drop": 0.0}, {"examples": -1}])
    def test_bad_settings(self, settings):
        with pytest.raises(jp.ArgumentError):
            Config(**settings)


class TestResults:
    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RunFolderError, match="no results"):
            Results(tmp_path, {})
        with pytest.raises(RunFolderError, match="no results"):
            Results(tmp_path / "file", {})

    def test_a_folder_of_another_configuration_is_refused(self, tmp_path):
        Results(tmp_path, {"seeds": (0, 1), "rate": 0.1})
        Results(tmp_path, {"seeds": [0, 1], "rate": 0.1})
        with pytest.raises(RunFolderError, match="different: rate"):
            Results(tmp_path, {"seeds": [0, 1], "rate": 0.2})

    def test_damaged_metrics_say_how_to_go_on(self, tmp_path):
        results = Results(tmp_path, {})
        results.write("a/b", [1.0])
        (tmp_path / "metrics" / "a" / "b.json").write_text("[1.")
        with pytest.raises(RunFolderError, match="delete it"):
            results.read("a/b")

    def test_tables(self):
        assert markdown([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"
        assert pm([1.0, 3.0], 1) == "2.0 ± 1.0" and pm([0.5], 1, 100) == "50.0"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "metrics").rglob("*.json")}


def without_times(content: dict[str, bytes]) -> dict:
    def strip(x):
        if isinstance(x, dict):
            return {k: strip(v) for k, v in x.items() if k != "seconds"}
        return [strip(v) for v in x] if isinstance(x, list) else x

    return {name: strip(json.loads(text)) for name, text in content.items()}


class TestResuming:
    @pytest.mark.parametrize(("name", "at"), [("logreg", 30), ("laws", 9)])
    def test_an_interrupted_experiment_goes_on(self, name, at, tmp_path):
        """Stopped, then finished: the numbers of one that was never stopped, and nothing is done twice."""
        run_experiment(experiment(name, "smoke"), tmp_path / "whole")
        seen = []

        def stops(done, total, unit, loss):
            seen.append(unit)
            if len(seen) > at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment(name, "smoke"), tmp_path / "parts", stops)
        before = files(tmp_path / "parts")
        assert before
        run_experiment(experiment(name, "smoke"), tmp_path / "parts")
        after = files(tmp_path / "parts")
        assert {n: after[n] for n in before} == before
        assert without_times(after) == without_times(files(tmp_path / "whole"))
        again = []
        run_experiment(experiment(name, "smoke"), tmp_path / "parts", lambda *a: again.append(a))
        assert not again and files(tmp_path / "parts") == after


class TestCommand:
    runner = CliRunner()

    @pytest.mark.parametrize("name", ["rosenbrock", "logreg", "cnn"])
    def test_a_results_folder(self, name, tmp_path):
        out = tmp_path / name
        done = self.runner.invoke(cli.app, ["reproduce", name, "--budget", "smoke", "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert "FoMoH-2D" in done.output and str(out) in done.output.replace("\n", "")
        here = {p.name for p in out.iterdir()}
        assert {"configuration.json", "environment.json", "metrics", "results.md"} <= here
        pictures = {p for p in here if p.endswith(".png")}
        assert pictures and {p.replace("png", "svg") for p in pictures} <= here
        page = (out / "results.md").read_text()
        assert all(f"({p})" in page for p in pictures)

    def test_the_html_report_finds_the_runs(self, tmp_path):
        run_experiment(experiment("logreg", "smoke"), tmp_path / "results")
        done = self.runner.invoke(cli.app, ["report", str(tmp_path / "results"), "--out", str(tmp_path / "page.html")])
        assert done.exit_code == 0, done.output
        runs = len(list((tmp_path / "results" / "runs").rglob("metrics.jsonl")))
        assert f"report of {runs} runs" in done.output and runs == 32

    def test_a_folder_in_use(self, tmp_path):
        (tmp_path / "file").touch()
        done = self.runner.invoke(cli.app, ["reproduce", "laws", "--budget", "smoke", "--out", str(tmp_path)])
        assert isinstance(done.exception, RunFolderError)


class TestNetworks:
    def test_the_papers_numbers(self):
        """What the paper and its scripts say, against the resolved configuration."""
        logreg, cnn = (experiment(name, "paper").config for name in ("logreg", "cnn"))
        assert (logreg["epochs"], logreg["seeds"], logreg["shared"]["batch_size"]) == (2000, [0, 1, 2, 3, 4], 1024)
        assert (cnn["epochs"], cnn["seeds"], cnn["shared"]["batch_size"]) == (3000, [0, 1, 3], 2048)
        assert logreg["published_rates"] == {"FoMoH": 0.1362} and cnn["published_rates"] == {"FoMoH": 0.544}
        for config in (logreg, cnn):
            assert config["shared"]["clip"] == 0 and config["shared"]["descent"] == "newton"
            assert config["shared"]["drop_every"] == 1000
        swept = set(cnn["sweep"]["grids"]) | set(cnn["published_rates"])
        assert swept == {m.partition(", drops")[0] for m in cnn["methods"]}

    def test_fewer_epochs_than_the_budget(self):
        config = experiment("cnn", "paper", epochs=30).config
        assert (config["epochs"], config["shared"]["drop_every"], config["sweep"]["epochs"]) == (30, 10, 30)
        for name, epochs in (("cnn", 0), ("laws", 5)):
            with pytest.raises(jp.ArgumentError, match="epochs"):
                experiment(name, "smoke", epochs=epochs)

    def test_the_sweep_decides(self, tmp_path):
        subject = experiment("logreg", "smoke")
        results = run_experiment(subject, tmp_path)
        grid = subject.config["sweep"]["grids"]["SGD, backprop"]
        losses = [results.read(f"sweep/sgd-backprop-{rate:g}")["rows"][-1]["train_loss"] for rate in grid]
        assert subject.rate(results, "SGD, backprop") == grid[int(np.argmin(losses))]
        assert results.read("fomoh/seed-0")["config"]["lr"] == 0.1362
        assert subject.rate(results, "FoMoH-3D, drops") == subject.rate(results, "FoMoH-3D")

    def test_a_diverged_rate_loses(self, tmp_path):
        subject = experiment("logreg", "smoke")
        results = Results(tmp_path, subject.config)
        low, high = subject.config["sweep"]["grids"]["FGD"]
        results.write(f"sweep/fgd-{low:g}", {"status": "finished", "rows": [{"train_loss": 2.0}]})
        results.write(f"sweep/fgd-{high:g}", {"status": "diverged", "rows": []})
        assert subject.rate(results, "FGD") == low

    def test_a_run_folder_of_another_configuration_is_refused(self, tmp_path):
        subject = experiment("logreg", "smoke")
        results = Results(tmp_path, subject.config)
        item = subject.items(results)[0]
        Run(Config(epochs=1), tmp_path / "runs" / item.name)
        with pytest.raises(RunFolderError, match="another configuration"):
            item.work(quiet)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder in the format of CIFAR-10, 20 images a batch; its checksums are taken for the right ones."""
    import hashlib

    known = {}
    random = np.random.default_rng(0)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for n, name in enumerate(data.CIFAR10_FILES):
        labels = [(i + n) % 10 for i in range(20)]
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        pixels[:, :1024] = np.array(labels)[:, None] * 25  # red tells the class
        content = pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"made up"}, protocol=2)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
        known[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(data, "CIFAR10_FILES", known)
    return tmp_path


class TestCifar:
    def test_reads_the_format(self, cifar, monkeypatch):
        monkeypatch.setenv(data.CIFAR10_VARIABLE, str(cifar))
        found = data.load("cifar10")
        assert found.train.images.shape == (100, 3, 32, 32) and found.test.labels.tolist()[:3] == [5, 6, 7]
        red = found.train.images[3, 0] * data.CIFAR10_STD[0] + data.CIFAR10_MEAN[0]
        torch.testing.assert_close(red, torch.full((32, 32), 75 / 255))
        assert found.first(7).train.images.shape == (7, 3, 32, 32) and found.channels == 3

    def test_bad_files(self, cifar, monkeypatch):
        import hashlib

        with pytest.raises(DataError, match="JETPLANE_CIFAR10"):
            data.load("cifar10")
        path = cifar / "cifar-10-batches-py" / "data_batch_2"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match="MD5"):
            data.load("cifar10", cifar)
        for content, message in (
            (pickle.dumps(print), "no place"), (pickle.dumps({b"data": 3}), "not a batch"), (b"", "not a batch"),
        ):  # fmt: skip
            path.write_bytes(content)
            monkeypatch.setitem(data.CIFAR10_FILES, "data_batch_2", hashlib.md5(content).hexdigest())
            with pytest.raises(DataError, match=message):
                data.load("cifar10", cifar)
        path.unlink()
        with pytest.raises(DataError, match="found none"):
            data.load("cifar10", cifar)

    def test_no_net(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "CIFAR10_ARCHIVE", ("http://localhost:9/a.tar.gz", "md5:00"))
        with pytest.raises(DataError, match="localhost"):
            data.fetch_cifar10(tmp_path)

    def test_an_archive_is_unpacked_and_checked(self, cifar, tmp_path, monkeypatch):
        import hashlib
        import tarfile

        archive = tmp_path / "out" / "a.tar.gz"
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(cifar / "cifar-10-batches-py", "cifar-10-batches-py")
        checksum = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(data, "CIFAR10_ARCHIVE", ("http://localhost:9/a.tar.gz", f"md5:{checksum}"))
        data.fetch_cifar10(archive.parent)  # the archive is there already, so the net is not asked
        assert data.load("cifar10", archive.parent).train.images.shape[0] == 100

    def test_shifts_and_flips_keep_what_is_inside(self):
        images = torch.arange(2 * 3 * 8 * 8).float().reshape(2, 3, 8, 8) + 1
        margin = torch.tensor([-1.0, -2.0, -3.0]).reshape(1, 3, 1, 1)
        same = data.flipped_and_shifted(images, margin, by=0)
        for a, b in zip(images, same, strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        seen = set()
        for _ in range(200):
            (moved,) = data.flipped_and_shifted(images[:1], margin, by=2)
            for c in range(3):
                outside = moved[c] < 0
                assert (moved[c][outside] == margin.flatten()[c]).all()
            kept = moved[0][moved[0] > 0]
            assert set(kept.tolist()) <= set(images[0, 0].flatten().tolist()) and len(kept) >= 36
            seen.add((len(kept), bool(moved[0, 4, 4] < moved[0, 4, 5])))
        assert len({flip for _, flip in seen}) == 2 and {64, 36} <= {n for n, _ in seen}

    def test_the_model(self):
        model = models.build("cnn-bn", 32, 3)
        assert sum(p.numel() for p in model.parameters()) == 2_396_330  # as CNN_CIFAR10_torch of the paper's code
        with pytest.raises(jp.ArgumentError, match="at least 8"):
            models.build("cnn-bn", 6)

    def test_the_whole_pipeline(self, cifar, tmp_path):
        results = run_experiment(experiment("cifar", "smoke", cifar), tmp_path / "out")
        rows = results.read("fomoh-3d/seed-1")["rows"]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert "cnn-bn on cifar10" in (tmp_path / "out" / "results.md").read_text()

    def test_augmented_runs_resume_bit_for_bit(self, cifar, tmp_path):
        config = Config(data="cifar10", model="cnn-bn", method="fomoh", epochs=2, batch_size=16, examples=32)
        whole = Run(config, tmp_path / "whole", data_dir=cifar)
        whole.train()
        parts = Run(config, tmp_path / "parts", data_dir=cifar)
        with pytest.raises(KeyboardInterrupt):
            parts.train(lambda done, total, loss: (_ for _ in ()).throw(KeyboardInterrupt) if done == 3 else None)
        parts = Run.resume(tmp_path / "parts", cifar)
        assert parts.epoch == 1
        parts.train()
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_checkpoint_of_before_an_option_existed_can_be_resumed(tmp_path):
    from jetplane.experiments import store

    run = Run(Config(epochs=2), tmp_path / "run")
    run.train()
    for name in ("drop", "examples"):
        state = store.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
        del state["config"][name]
        store.save_checkpoint(tmp_path / "run" / "checkpoint.pt", state)
    assert Run.resume(tmp_path / "run").epoch == 2
    state["config"]["lr"] = 7.0
    store.save_checkpoint(tmp_path / "run" / "checkpoint.pt", state)
    with pytest.raises(CheckpointError, match="different: lr"):
        Run.resume(tmp_path / "run")
