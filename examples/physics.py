"""Physics-informed networks for Poisson's, Burgers' and the Allen-Cahn equation, by backpropagation and without it.

A network u is trained to satisfy an equation at random points: the loss is the mean square of the residual. The
Laplacian in it is `jetplane.laplacian`, one forward pass of 1 + D + 1 channels; its result has a graph, so that Adam
trains through it. The same loss can be trained forward only, by `jetplane.optim.PlaneSearch`, with the Laplacian
inside: nothing is stored for a backward pass.

    python examples/physics.py                              # Poisson by Adam, then forward only
    python examples/physics.py --equation burgers --picture burgers.png

Boundary and initial values are built into u, so that the loss has one term.

    poisson      lap u = f on the square [0, 1]², u = 0 on its boundary; the solution is sin(pi x) sin(pi y)
    burgers      u_t + u u_x = 0.05 u_xx, u(0, x) = -sin(pi x), u(t, ±1) = 0; compared with the Cole-Hopf formula
    allen-cahn   u_t = 0.01 u_xx + u - u³, u(0, x) = 0.5 sin(pi x), u(t, ±1) = 0; compared with finite differences
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import jetplane as jp


@dataclass(frozen=True)
class Problem:
    """An equation for u of points (n, 2), which are (x, y) or (t, x)."""

    shape: Callable[[Tensor, Tensor], Tensor]  # network's output, points -> u, with its boundary values
    residual: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    points: Callable[[int], Tensor]
    grid: Callable[[], tuple[Tensor, Tensor]]  # points (n, n, 2), and the solution there
    axes: tuple[str, str]


# --- Poisson ---------------------------------------------------------------------------------------------


def square(n: int) -> Tensor:
    return torch.rand(n, 2)


def sines(p: Tensor) -> Tensor:
    return (torch.sin(math.pi * p[..., 0]) * torch.sin(math.pi * p[..., 1])).float()


def poisson(u: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    return (jp.laplacian(u, p, batch_dim=0) + 2 * math.pi**2 * sines(p)) / (2 * math.pi**2)


def unit_grid() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 1, 50)
    p = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
    return p, sines(p)


# --- in time ---------------------------------------------------------------------------------------------


def strip(n: int) -> Tensor:
    return torch.rand(n, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])


def in_time(u: Callable[[Tensor], Tensor], p: Tensor, viscosity: float) -> tuple[Tensor, Tensor, Tensor]:
    """u, u_x, and u_t - viscosity u_xx: a second derivative along x alone, with the drift d/dt, in one pass."""
    sigma = torch.tensor([[0.0], [math.sqrt(viscosity)]])
    flow = jp.weighted_laplacian(u, p, sigma, torch.tensor([-1.0, 0.0]), batch_dim=0)
    value, slope = jp.jvp(u, p, torch.tensor([0.0, 1.0]), batch_dim=0)
    return value, slope, -flow


def burgers(u: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    value, slope, flow = in_time(u, p, 0.05)
    return flow + value * slope


def allen_cahn(u: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    value, _, flow = in_time(u, p, 0.01)
    return flow - value + value**3


def strip_grid() -> Tensor:
    return torch.stack(torch.meshgrid(torch.linspace(0, 1, 21), torch.linspace(-1, 1, 81), indexing="ij"), -1)


def burgers_grid() -> tuple[Tensor, Tensor]:
    """Cole and Hopf's formula: a quotient of Gaussian integrals, by Gauss and Hermite's rule."""
    import numpy as np

    p, viscosity = strip_grid().double(), 0.05
    z, weights = map(torch.from_numpy, np.polynomial.hermite.hermgauss(100))
    y = p[..., 1:] - 2 * (viscosity * p[..., :1]).sqrt() * z
    density = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * viscosity))
    u = -(torch.sin(math.pi * y) * density).sum(-1) / density.sum(-1)
    return p.float(), u.float()


def allen_cahn_grid() -> tuple[Tensor, Tensor]:
    """Differences on a grid four times as fine, in small steps."""
    x, steps = torch.linspace(-1, 1, 321, dtype=torch.float64), 1_000
    u, h, frames = 0.5 * torch.sin(math.pi * x), x[1] - x[0], []
    for n in range(steps + 1):
        if n % (steps // 20) == 0:
            frames.append(u[::4])
        bend = torch.zeros_like(u)
        bend[1:-1] = (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2
        change = 0.01 * bend + u - u**3
        change[0] = change[-1] = 0
        u = u + change / steps
    return strip_grid(), torch.stack(frames).float()


PROBLEMS = {
    "poisson": Problem(
        lambda v, p: 16 * v * p[..., 0] * (1 - p[..., 0]) * p[..., 1] * (1 - p[..., 1]),
        poisson, square, unit_grid, ("y", "x"),
    ),
    "burgers": Problem(
        lambda v, p: -torch.sin(math.pi * p[..., 1]) + p[..., 0] * (1 - p[..., 1] ** 2) * v,
        burgers, strip, burgers_grid, ("x", "t"),
    ),
    "allen-cahn": Problem(
        lambda v, p: 0.5 * torch.sin(math.pi * p[..., 1]) + p[..., 0] * (1 - p[..., 1] ** 2) * v,
        allen_cahn, strip, allen_cahn_grid, ("x", "t"),
    ),
}  # fmt: skip


class Network(nn.Module):
    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        self.layers = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, p: Tensor) -> Tensor:
        return self.problem.shape(self.layers(p)[..., 0], p)


def by_adam(net: Network, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        p = net.problem.points(512)
        optimizer.zero_grad()
        loss = net.problem.residual(net, p).square().mean()
        loss.backward()  # through the Laplacian
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def forward_only(net: Network, steps: int) -> list[float]:
    """The plane holds drawn directions beside those that the search remembers; the Laplacian is inside the closure."""
    sources = [jp.sources.Drawn(16), jp.sources.Averages(), jp.sources.PreviousStep()]
    optimizer = jp.optim.PlaneSearch(net.parameters(), subspace=sources)
    losses = []
    for _ in range(steps):
        p = net.problem.points(256)
        loss = optimizer.step(lambda p=p: nn.functional.mse_loss(net.problem.residual(net, p), torch.zeros(len(p))))
        losses.append(loss.item())
    return losses


def error(net: Network) -> float:
    """Relative to the solution, in the mean square over a grid."""
    p, solution = net.problem.grid()
    with torch.no_grad():
        return ((net(p) - solution).norm() / solution.norm()).item()


def draw(problem: Problem, name: str, nets: dict[str, Network], losses: dict[str, list[float]], path: str) -> None:
    import matplotlib.pyplot as plt

    p, solution = problem.grid()
    panels = {"solution": solution.numpy()} | {way: net(p).detach().numpy() for way, net in nets.items()}
    p, most = p.numpy(), abs(panels["solution"]).max()
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(3.6 * (len(panels) + 1), 3.2))
    for axis, (label, u) in zip(axes, panels.items(), strict=False):
        mesh = axis.pcolormesh(p[..., 1], p[..., 0], u, cmap="RdBu_r", vmin=-most, vmax=most)
        axis.set(title=label, xlabel=problem.axes[0], ylabel=problem.axes[1])
        figure.colorbar(mesh, ax=axis)
    for way, values in losses.items():
        axes[-1].semilogy(values, label=way, lw=1)
    axes[-1].set(title="loss", xlabel="step")
    axes[-1].legend()
    figure.suptitle({"poisson": "Poisson", "burgers": "Burgers", "allen-cahn": "Allen-Cahn"}[name])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equation", choices=PROBLEMS, default="poisson")
    parser.add_argument("--steps", type=int, default=1000, help="of Adam")
    parser.add_argument("--forward-steps", type=int, default=60, help="of PlaneSearch; 0 leaves it out")
    parser.add_argument("--picture", help="where to draw the solutions")
    options = parser.parse_args(arguments)
    problem, nets, losses, errors = PROBLEMS[options.equation], {}, {}, {}
    for way, train, steps in (
        ("Adam", by_adam, options.steps),
        ("PlaneSearch, forward only", forward_only, options.forward_steps),
    ):
        if not steps:
            continue
        torch.manual_seed(0)
        nets[way], begin = Network(problem), time.process_time()
        losses[way] = train(nets[way], steps)
        errors[way] = error(nets[way])
        seconds = time.process_time() - begin
        print(
            f"{way}: loss {losses[way][-1]:.2e}, error {100 * errors[way]:.2f} % after {steps} steps, {seconds:.0f} s"
        )
    if options.picture:
        draw(problem, options.equation, nets, losses, options.picture)
    return errors


if __name__ == "__main__":
    main()
