"""Optimal control of dynamics in C: the greatest range of a hang glider through an updraft.

    pip install '.[native,control]'  &&  python examples/glider_c.py     # Linux on x86-64, with gcc

Forces are computed by compiled code (`glider.c`), which torch cannot see: `jetplane.compiled` gives it exact first and
second derivatives, `jetplane.control.per_node` calls it for all points of the trajectory. Bulirsch, Nerz, Pesch and von
Stryk (1993) found 1248.03 m (COPS 3).
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

import jetplane as jp


def build() -> ctypes.CDLL:
    """Compile the model, as its users do."""
    folder = tempfile.mkdtemp()
    source = Path(__file__).with_name("glider.c")
    subprocess.run(["gcc", "-O2", "-g", "-shared", "-fPIC", "-o", f"{folder}/glider.so", source, "-lm"], check=True)
    return ctypes.CDLL(f"{folder}/glider.so")


def problem() -> jp.control.Problem:
    """From 1000 m down to 900 m, with the same velocity at both ends."""
    forces = jp.compiled(build().forces, "void(int n, const double[n*5] in, double[n*2] out)")
    forces_at = jp.control.per_node(lambda z: forces(len(z), z), outputs=2, batched=True)
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "flight",
        states={"x": (1, 0.0, 2000.0), "y": (1, 0.0, 2000.0), "v": (2, -20.0, 50.0)},
        controls={"lift": (1, 0.0, 1.4)},
        t0=0.0,
        tf=(50.0, 150.0),
    )

    def dynamics(x, u, t, p):
        return {"x": x.v[:, :1], "y": x.v[:, 1:], "v": forces_at(torch.cat([x.x, x.y, x.v, u.lift], -1))}

    ph.dynamics = dynamics
    ph.start(x=0.0, y=1000.0, v=[13.2275675, -1.28750052])
    ph.end(y=900.0, v=[13.2275675, -1.28750052])
    ph.guess(tf=100.0, x=[0.0, 1250.0], y=[1000.0, 900.0], v=[13.23, -1.29], lift=0.7)
    ocp.minimize(final=lambda e: -e.flight.xf.x)
    return ocp


def main() -> None:
    """Solve it, and print how far the glider gets."""
    solution = problem().solve(mesh="refine", accuracy=1e-6)
    print(solution.status.value)
    print(f"range {-solution.objective:.2f} m (1248.03 m in COPS 3), in {float(solution.t[-1]):.2f} s")
    print(solution.simulate())


if __name__ == "__main__":
    main()
