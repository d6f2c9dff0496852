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


@pytest.mark.parametrize(("atom", "least", "most"), [("helium", -3.0, -2.6), ("lithium", -7.8, -6.5)])
def test_atoms(atom, least, most, tmp_path):
    sizes = ("--steps", "6", "--walkers", "128", "--samples", "4", "--json", str(tmp_path / "a.json"))
    found = run("atoms", "--atom", atom, *sizes, "--picture", str(tmp_path / "a.png"))
    assert least < found["energy"] < most and 0 < found["error"] < 0.2
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


def test_a_spectrum(tmp_path):
    found = run("spectrum", "--steps", "20", "--picture", str(tmp_path / "s.png"))
    for of in found.values():
        assert of["Gauss-Newton"].min() > -1e-5 and len(of["Hessian"]) == len(of["Gauss-Newton"])
    assert torch.linalg.norm(found["before training"]["Hessian"]) > 0 and (tmp_path / "s.png").exists()


def test_a_plane(tmp_path):
    ratio = run("plane_picture", "--grid", "5", "--out", str(tmp_path / "p.png"))
    assert 0.5 < ratio < 1.5 and (tmp_path / "p.png").exists()


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
    assert "the same weights bit for bit" in said and "696 bytes a step" in said
