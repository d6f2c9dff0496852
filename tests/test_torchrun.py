"""Runs of several processes: torchrun, lost processes, resuming with another number of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Gang

import jetplane as jp
from jetplane.errors import RunFolderError
from jetplane.experiments import launch, store, train
from jetplane.experiments.config import Config
from jetplane.experiments.train import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore::jetplane.RescueWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's dependencies
]
EPOCHS = 40
PLAIN = ("--model", "logreg", "--k", "5", "--epochs", str(EPOCHS))


@contextlib.contextmanager
def torchrun(folder: Path, *options: str, settings: tuple[str, ...] = PLAIN) -> Iterator[subprocess.Popen]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
        "-m", "jetplane", "train", *settings, "--out", str(folder),
    ]  # fmt: skip
    source = str(Path(jp.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as agent:
        try:
            yield agent
        finally:
            agent.terminate()  # which ends its processes


def ended(agent: subprocess.Popen) -> str:
    """What it said until its end."""
    return agent.communicate(timeout=120)[0]


def kill_second_rank(agent: subprocess.Popen, folder: Path, epochs: int) -> None:
    """SIGKILL, as soon as so many epochs are done."""
    end = time.monotonic() + 60
    while len(store.read_rows(folder / "metrics.jsonl")) < epochs:
        assert time.monotonic() < end and agent.poll() is None
        time.sleep(0.01)
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError("there is no second rank")


def numbers(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in store.read_rows(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with torchrun(folder) as agent:
        said = ended(agent)
    assert agent.returncode == 0, said
    assert said.count("run folder") == 1 and "2 processes, 336 bytes a step" in said.replace("\n", " ")
    return numbers(folder)


def close(some, others):
    assert len(some) == len(others) == EPOCHS
    for a, b in zip(some, others, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_numbers_are_those_of_one_process(undisturbed, tmp_path):
    Run(Config(model="logreg", k=5, epochs=EPOCHS), tmp_path / "run").train()
    close(numbers(tmp_path / "run"), undisturbed)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
class TestAKilledRank:
    def test_torchrun_starts_again_and_the_numbers_are_the_same(self, undisturbed, tmp_path):
        with torchrun(tmp_path / "run", "--max-restarts", "1") as agent:
            kill_second_rank(agent, tmp_path / "run", 5)
            said = ended(agent)
        assert agent.returncode == 0, said
        assert numbers(tmp_path / "run") == undisturbed

    def test_else_the_checkpoint_is_whole_and_one_process_goes_on(self, undisturbed, tmp_path):
        with torchrun(tmp_path / "run") as agent:
            kill_second_rank(agent, tmp_path / "run", 5)
            said = ended(agent)
        assert agent.returncode != 0 and "SIGKILL" in said
        done = store.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"]
        assert 5 <= done < EPOCHS
        assert Run.resume(tmp_path / "run").train()["status"] == "finished"
        close(numbers(tmp_path / "run"), undisturbed)

    def test_a_search_goes_on_in_one_process(self, tmp_path):
        with torchrun(
            tmp_path / "run", settings=("--model", "mlp", "--method", "plane-search", "--epochs", "8")
        ) as agent:
            kill_second_rank(agent, tmp_path / "run", 2)
            ended(agent)
        done = store.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"]
        assert 2 <= done < 8
        assert Run.resume(tmp_path / "run").train()["status"] == "finished"
        Run(Config(model="mlp", method="plane-search", epochs=8), tmp_path / "alone").train()
        some, others = numbers(tmp_path / "run"), numbers(tmp_path / "alone")
        assert len(some) == len(others) == 8
        for a, b in zip(some[:2], others[:2], strict=True):  # rounding grows after these
            assert a == pytest.approx(b, rel=1e-2)
        assert some[-1]["train_loss"] < 0.25


# --- without torchrun ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    gang = Gang(2, tmp_path_factory.mktemp("gang"))
    yield gang
    gang.stop()


def begun(rank, folder, settings):
    try:
        return Run(Config(epochs=1, batch_size=500, **settings[rank]), folder).train()
    except jp.JetplaneError as error:
        return error


def test_a_folder_that_exists_is_refused_on_all_ranks(two, tmp_path):
    first, second = two.run(begun, tmp_path / "run", [{}, {}])
    assert first["ranks"] == 2 and "last" in first and second["status"] == "finished"
    for error in two.run(begun, tmp_path / "run", [{}, {}]):
        assert isinstance(error, RunFolderError)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"schedule": "cosine"}], ids=str)
def test_other_settings_are_refused_at_the_start(settings, two, tmp_path):
    ((name, value),) = settings.items()
    for error in two.run(begun, tmp_path / "run", [{}, settings]):
        assert isinstance(error, jp.HandshakeError) and f"{name}: {value!r} on rank 1" in str(error)
    assert not (tmp_path / "run").exists()


def other_data(rank, folder):
    if rank == 1:
        load = train.data.load
        train.data.load = lambda *args: _shorter(load(*args))
    try:
        return begun(rank, folder, [{}, {}])
    finally:
        if rank == 1:
            train.data.load = load


def _shorter(data):
    split = train.data.Split(data.train.images[:-1], data.train.labels[:-1])
    return type(data)(**{**vars(data), "train": split})


def test_other_data_are_refused_at_the_start(two, tmp_path):
    for error in two.run(other_data, tmp_path / "run"):
        assert isinstance(error, jp.HandshakeError) and error.ranks == (1,)
        assert "training examples: 1437 on rank 1, 1438 on others" in str(error)
    assert not (tmp_path / "run").exists()


def diverging(rank, folder):
    run = Run(Config(model="logreg", epochs=2, batch_size=500), folder)
    if rank == 1:
        run.train_split.images.fill_(float("nan"))
    return run.train()


def test_nan_on_one_rank_names_rank_and_batch_on_all(two, tmp_path):
    first, second = two.run(diverging, tmp_path / "run")
    assert first["message"].startswith("epoch 1, batch 1: rank 1: the loss is not finite")
    assert first["status"] == second["status"] == "diverged"


@pytest.mark.parametrize("method", ["sgd", "fomoh-bp"])
def test_methods_with_gradients_run_alone(method, monkeypatch):
    monkeypatch.setattr(launch, "group", object)
    with pytest.raises(jp.ArgumentError, match="have to send gradients"):
        train.optimizer(Config(method=method), torch.nn.Linear(1, 1))
