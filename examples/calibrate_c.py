"""A simulator in C, calibrated by Newton steps in the plane.

    pip install '.[native]'  &&  python examples/calibrate_c.py     # Linux on x86-64, with gcc

A damped pendulum is integrated by C code (`pendulum.c`). Its damping, frequency and initial angle are found from noisy
measurements: three directions span all parameters, so each step of FoMoH-KD is a step of Newton's method, with the
exact slope and curvature through the compiled code.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

import jetplane as jp

STEPS = 400


def build() -> ctypes.CDLL:
    """Compile the simulator, as its users do."""
    folder = tempfile.mkdtemp()
    source = Path(__file__).with_name("pendulum.c")
    subprocess.run(["gcc", "-O2", "-g", "-shared", "-fPIC", "-o", f"{folder}/pendulum.so", source, "-lm"], check=True)
    return ctypes.CDLL(f"{folder}/pendulum.so")


def calibrate(steps: int = 8) -> tuple[torch.Tensor, list[float]]:
    """The parameters that are found, and the losses on the way."""
    torch.manual_seed(0)
    simulate = jp.compiled(build().simulate, "void(const double[3] parameters in, int steps, double[steps] out)")
    truth = torch.tensor([0.25, 2.0, 0.9], dtype=torch.float64)  # damping, frequency, initial angle
    measured = simulate(truth, STEPS) + 0.001 * torch.randn(STEPS, dtype=torch.float64)

    guess = torch.nn.Parameter(torch.tensor([0.2, 1.9, 0.8], dtype=torch.float64))
    optimizer = jp.optim.FoMoHKD([guess], lr=1.0, k=3, descent="saddle-free")
    losses = [float(optimizer.step(lambda: (simulate(guess, STEPS) - measured).square().mean())) for _ in range(steps)]
    print(simulate.report())
    return guess.detach(), losses


def main() -> None:
    """Calibrate, and print what was found."""
    found, losses = calibrate()
    print("losses", " ".join(f"{x:.2e}" for x in losses))
    print("found ", [round(x, 4) for x in found.tolist()], "true [0.25, 2.0, 0.9]")


if __name__ == "__main__":
    main()
