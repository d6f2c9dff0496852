"""A pendulum: frequency, damping and the first state, fitted to noisy angles along a long simulation.

    python examples/fit_pendulum.py [number of time steps, 10000 by default]

Data are generated. However long the simulation is, memory stays the same: residuals are yielded as they are computed.
"""

import sys

import torch

import jetplane as jp

DT, EVERY, NOISE = 0.002, 50, 0.02  # seconds, steps between observations, radians
TRUTH = {"squared_frequency": 9.0, "damping": 0.05, "angle": 1.2, "velocity": 0.0}


def simulated(p, steps):
    """Angles at the times of observation: a'' = -w² sin a - damping a', by the symplectic Euler method."""
    angle, velocity = p["angle"], p["velocity"]
    pull, kept = DT * p["squared_frequency"], 1 - DT * p["damping"]
    for n in range(steps):
        velocity = velocity * kept - pull * angle.sin()
        angle = angle + DT * velocity
        if n % EVERY == 0:
            yield angle


def observed(steps):
    """Generated observations."""
    exact = torch.stack(list(simulated({name: torch.tensor(x).double() for name, x in TRUTH.items()}, steps)))
    return exact + NOISE * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=exact.dtype)


def fit(steps):
    """The fit, from a start that is some percent off."""
    angles = observed(steps)

    def residuals(p):
        for angle, target in zip(simulated(p, steps), angles, strict=True):
            yield angle - target

    start = {"squared_frequency": 9.1, "damping": 0.1, "angle": 1.0, "velocity": 0.1}
    return jp.optim.least_squares(residuals, {name: torch.tensor(x).double() for name, x in start.items()})


if __name__ == "__main__":
    found = fit(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print(f"{found.message}; {found.nfev} evaluations, {found.residuals} residuals")
    for name, true in TRUTH.items():
        print(f"{name}: {found.params[name]:.5f} ± {found.standard_errors[name]:.5f}; it was {true}")
