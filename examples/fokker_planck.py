"""The Fokker-Planck equation in ten dimensions, by a network for the logarithm of the density.

A particle follows ``dx = -A x dt + sigma dW``. Its density p(t, x) obeys p_t = div(A x p) + 1/2 tr(sigma sigmaᵀ Hess
p), and so l = log p

    l_t = tr A + (A x) . grad l + 1/2 tr(sigma sigmaᵀ Hess l) + 1/2 |sigmaᵀ grad l|²

Of z = (t, x), the terms linear in l are one `jetplane.weighted_laplacian`: the columns of sigma are its directions, and
``(-1, A x)`` is its drift, at no extra cost. The gradient is one `jetplane.jacobian`. Both have a graph: Adam trains
the network on paths of the particle. The process is linear, so the solution is known: a Gaussian, with a covariance
from an ordinary differential equation, against which log p is compared.

    python examples/fokker_planck.py --picture fokker_planck.png
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

import jetplane as jp

D, END = 10, 1.0
torch.manual_seed(1)
TURN = torch.randn(D, D) / D**0.5
A = 0.8 * torch.eye(D) + 0.5 * (TURN - TURN.T)  # it spirals into the origin
SIGMA = torch.eye(D) + 0.3 * torch.randn(D, D) / D**0.5
START = torch.full((D,), 0.7)  # mean at t = 0; the covariance is the identity
STEPS = 200


def moments() -> tuple[Tensor, Tensor]:
    """Mean and covariance at STEPS + 1 times: m' = -A m, S' = -A S - S Aᵀ + sigma sigmaᵀ, by Heun's method."""

    def slope(m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return -A @ m, -A @ s - s @ A.T + SIGMA @ SIGMA.T

    m, s, h = START, torch.eye(D), END / STEPS
    means, covariances = [m], [s]
    for _ in range(STEPS):
        dm, ds = slope(m, s)
        em, es = slope(m + h * dm, s + h * ds)
        m, s = m + h * (dm + em) / 2, s + h * (ds + es) / 2
        means.append(m)
        covariances.append(s)
    return torch.stack(means), torch.stack(covariances)


class Density(nn.Module):
    """log p of z = (t, x): the initial Gaussian, and t times a network with quadratic features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(D, 32, bias=False)
        self.layers = nn.Sequential(nn.Linear(1 + 64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 65))

    def forward(self, z: Tensor) -> Tensor:
        t, x = z[..., :1], z[..., 1:]
        first = -0.5 * (x - START).square().sum(-1) - 0.5 * D * math.log(2 * math.pi)
        h = self.features(x)
        h = torch.cat([h, h.square()], -1)
        out = self.layers(torch.cat([t, h / (1 + h.square()).sqrt()], -1))
        return first + t[..., 0] * ((out[..., :-1] * h).mean(-1) + out[..., -1])


def residual(density: Density, z: Tensor) -> Tensor:
    x = z[:, 1:]
    columns = torch.cat([torch.zeros(1, D), SIGMA]) / math.sqrt(2)  # nothing diffuses in t
    drift = torch.cat([-torch.ones(len(z), 1), x @ A.T], 1)
    linear = jp.weighted_laplacian(density, z, columns, drift, batch_dim=0)
    gradient = jp.jacobian(density, z, batch_dim=0)[:, 1:]
    return linear + A.trace() + 0.5 * (gradient @ SIGMA).square().sum(1)


def paths(n: int, means: Tensor, covariances: Tensor) -> Tensor:
    """Points (t, x) of particles at random times, somewhat more spread than they are."""
    at = torch.randint(STEPS + 1, (n,))
    root = torch.linalg.cholesky(covariances)[at]
    x = means[at] + 1.2 * (root @ torch.randn(n, D, 1))[..., 0]
    return torch.cat([(at / STEPS * END)[:, None], x], 1)


def exact(z: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    at = (z[:, 0] / END * STEPS).round().long()
    return torch.distributions.MultivariateNormal(means[at], covariances[at]).log_prob(z[:, 1:])


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--picture", help="where to draw log p beside the solution")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    means, covariances = moments()
    density, begin, errors = Density(), time.process_time(), []
    test = paths(2000, means, covariances)
    solution = exact(test, means, covariances)

    def error() -> float:
        with torch.no_grad():
            return ((density(test) - solution).square().mean().sqrt() / solution.std()).item()

    optimizer = torch.optim.Adam(density.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for n in range(options.steps):
        optimizer.zero_grad()
        loss = residual(density, paths(options.points, means, covariances)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        if n % max(1, options.steps // 30) == 0 or n + 1 == options.steps:
            errors.append((n, error()))
    print(
        f"loss {loss.item():.2e}; log p within {100 * errors[-1][1]:.1f} % of its spread, in the root mean square "
        f"({time.process_time() - begin:.0f} s)"
    )
    if options.picture:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
        with torch.no_grad():
            axes[0].scatter(solution.numpy(), density(test).numpy(), s=3, alpha=0.5)
        axes[0].axline((solution.min(), solution.min()), slope=1, color="gray", lw=0.8)
        axes[0].set(xlabel="log p, solution", ylabel="log p, network", title="Fokker-Planck, 10 dimensions")
        axes[1].semilogy(*zip(*errors, strict=True))
        axes[1].set(xlabel="step", title="error of log p, of its spread")
        figure.tight_layout()
        figure.savefig(options.picture, dpi=110)
    return errors[-1][1]


if __name__ == "__main__":
    main()
