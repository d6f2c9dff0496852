"""A continuous normalizing flow with the exact divergence.

The flow ``dx/dt = v(t, x)`` transports the data to a normal distribution. Along the flow the logarithm of their density
changes by ``-div v``, which is usually estimated (FFJORD, Grathwohl et al., arXiv 1810.01367) since reverse mode needs
a pass for each dimension. `jetplane.divergence` gives it exactly by one pass of 1 + D channels, with a graph to train
through.

    python examples/flow.py --picture flow.png

The integrator is the fourth-order Runge-Kutta method with a few equal steps. The data are two half circles.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

import jetplane as jp


def half_circles(n: int) -> Tensor:
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 1.5 * (torch.stack([x, y], 1) + 0.07 * torch.randn(n, 2))


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )

    def forward(self, t: float, x: Tensor) -> Tensor:
        return self.layers(torch.cat([x, torch.full_like(x[:, :1], t)], 1))


def slope(v: Velocity, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and divergence, the value from the pass that gives the derivative."""
    divergence, velocity = jp.divergence(lambda x: (lambda y: (y, y))(v(t, x)), x, batch_dim=0, has_aux=True)
    return velocity, divergence


def log_density(v: Velocity, x: Tensor, steps: int = 4) -> Tensor:
    """Of data: that of the normal distribution where they end, and the divergence on the way."""
    h, total = 1 / steps, torch.zeros(len(x))
    for n in range(steps):
        t = n * h
        a, da = slope(v, t, x)
        b, db = slope(v, t + h / 2, x + h / 2 * a)
        c, dc = slope(v, t + h / 2, x + h / 2 * b)
        d, dd = slope(v, t + h, x + h * c)
        x, total = x + h / 6 * (a + 2 * b + 2 * c + d), total + h / 6 * (da + 2 * db + 2 * dc + dd)
    return total - 0.5 * x.square().sum(1) - math.log(2 * math.pi)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--picture", help="where to draw data and density")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    v, begin = Velocity(), time.process_time()
    optimizer = torch.optim.Adam(v.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for n in range(options.steps):
        optimizer.zero_grad()
        loss = -log_density(v, half_circles(options.points)).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        if n % max(1, options.steps // 6) == 0:
            print(f"step {n:4d}: {-loss.item():.3f} nats a point")
    side = torch.linspace(-2.5, 2.5, 100 if options.picture else 20)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    with torch.no_grad():
        final = log_density(v, half_circles(2000)).mean().item()
        density = log_density(v, grid).exp().reshape(len(side), len(side))
    mass = (density.sum() * (side[1] - side[0]) ** 2).item()
    print(
        f"{final:.3f} nats a point on new data; the density has mass {mass:.3f} ({time.process_time() - begin:.0f} s)"
    )
    if options.picture:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.6), sharex=True, sharey=True)
        axes[0].scatter(*half_circles(2000).T, s=2)
        axes[0].set(title="data", aspect="equal")
        axes[1].pcolormesh(side.numpy(), side.numpy(), density.numpy())
        axes[1].set(title=f"density of the flow, mass {mass:.3f}", aspect="equal")
        figure.tight_layout()
        figure.savefig(options.picture, dpi=110)
    return final


if __name__ == "__main__":
    main()
