"""The programs in examples/, at sizes of seconds."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
matplotlib.use("Agg")


def run(name: str, *arguments: str):
    """What ``main`` of an example returns."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.mark.parametrize(("atom", "most"), [("helium", 0.01), ("lithium", 0.3)])
def test_atoms(atom, most, tmp_path):
    sizes = ("--steps", "20", "--walkers", "256", "--samples", "10", "--json", str(tmp_path / "a.json"))
    found = run("atoms", "--atom", atom, *sizes, "--picture", str(tmp_path / "a.png"))
    above, error = found["energy"] - found["literature"], found["error"]
    assert -4 * error < above < most + 4 * error and error < 0.03
    assert (tmp_path / "a.png").exists() and (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("equation", "most"), [("poisson", 0.2), ("burgers", 0.5), ("allen-cahn", 0.2)])
def test_physics(equation, most, tmp_path):
    picture = tmp_path / "p.png"
    sizes = ("--steps", "25", "--forward-steps", "4")
    errors = run("physics", "--equation", equation, *sizes, "--picture", str(picture))
    assert errors["PlaneSearch, forward only"] < most and errors["Adam"] < 1 and picture.exists()


def test_the_fokker_planck_equation(tmp_path):
    assert run("fokker_planck", "--steps", "30", "--points", "64", "--picture", str(tmp_path / "f.png")) < 0.6
    assert (tmp_path / "f.png").exists()


def test_a_flow(tmp_path):
    nats = run("flow", "--steps", "6", "--points", "64", "--picture", str(tmp_path / "f.png"))
    assert -4 < nats < -2 and (tmp_path / "f.png").exists()


@pytest.mark.filterwarnings("ignore")  # torch means to leave dynamic quantization to torchao
def test_adaptation_at_test_time():
    found = run("adapt_at_test_time", "200")
    assert found["after"] > found["before"] + 15


def test_a_spectrum(tmp_path):
    found = run("spectrum", "--steps", "20", "--picture", str(tmp_path / "s.png"))
    for of in found.values():
        assert of["Gauss-Newton"].min() > -1e-5 and len(of["Hessian"]) == len(of["Gauss-Newton"])
    assert torch.linalg.norm(found["before training"]["Hessian"]) > 0 and (tmp_path / "s.png").exists()


def test_a_plane(tmp_path):
    ratio = run("plane_picture", "--grid", "5", "--out", str(tmp_path / "p.png"))
    assert 0.5 < ratio < 1.5 and (tmp_path / "p.png").exists()


def test_the_monitor_in_a_plain_loop(tmp_path):
    """Gradient descent comes to the edge of stability."""
    pytest.importorskip("tensorboard", reason="scalars go to it")
    picture = tmp_path / "p.png"
    monitor = run("monitor_edge_of_stability", "--picture", str(picture), "--logdir", str(tmp_path / "runs"))
    readings = monitor.readings
    assert readings[0].critical_rate > 1.3 * readings[0].rate and readings[-1].value < readings[0].value / 4
    late = sorted(r.critical_rate for r in readings[-10:])
    assert late[5] == pytest.approx(readings[-1].rate, rel=0.15)
    assert picture.exists() and list((tmp_path / "runs").glob("events*"))


@pytest.mark.filterwarnings("ignore")
def test_the_monitor_in_lightning(tmp_path):
    pytest.importorskip("lightning", reason="the loop is Lightning's")
    picture = tmp_path / "p.png"
    found = run("monitor_lightning", "--epochs", "1", "--folder", str(tmp_path), "--picture", str(picture))
    steps, rates = found["curvature/critical_rate"]
    assert steps[:3] == [0, 4, 8] and rates[0] > found["curvature/rate"][1][0] and picture.exists()


@pytest.mark.filterwarnings("ignore")
def test_the_monitor_in_the_trainer(tmp_path):
    pytest.importorskip("transformers", reason="the loop is the Trainer's")
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    picture = tmp_path / "p.png"
    found = run("monitor_trainer", "--steps", "6", "--warmup", "12", "--picture", str(picture))
    assert [r.step for r in found[0][1].readings] == [1, 6] and picture.exists()
    assert found[12][1].readings[0].rate < found[0][1].readings[0].rate


def test_all_programs_are_in_the_gallery():
    page = (FOLDER.parent / "docs/gallery.md").read_text()
    assert [p.name for p in sorted(FOLDER.glob("[a-z]*.py")) if p.name not in page] == []


def test_hyper_dual_numbers(capsys):
    runpy.run_path(str(FOLDER / "hyper_dual_numbers.py"))
    hand, jets, reverse = (line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines())
    assert hand.removeprefix("[") == jets.removeprefix("[") and reverse.split()[-1] in hand


def test_a_custom_operator(capsys):
    runpy.run_path(str(FOLDER / "custom_operator.py"))
    first, second = re.findall(r"(?:rule|softsign) +(\[.*\])", capsys.readouterr().out)
    assert first == second


def test_rosenbrock_in_a_plane(tmp_path):
    found = run("rosenbrock_plane", "--steps", "12", "--grid", "7", "--out", str(tmp_path / "r.gif"))
    assert found["FoMoH-10D"] < found["FoMoH-2D"] < 3606 and (tmp_path / "r.gif").read_bytes()[:3] == b"GIF"


def test_many_processes():
    program = [sys.executable, str(FOLDER / "many_processes.py")]
    said = subprocess.run(program, capture_output=True, text=True, check=True, timeout=300).stdout
    assert "the same weights bit for bit" in said and "697 bytes a step" in said
