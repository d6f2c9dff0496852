"""A pendulum known only from data: a network is fitted to simulated rates, and its model is swung up."""

from __future__ import annotations

import math

import torch

import jetplane as jp

from .case import Case

GRAVITY, FRICTION = 9.81, 0.1


def truth(angle, rate, torque):
    """The rate's derivative, which the network is to learn."""
    return -GRAVITY * angle.sin() - FRICTION * rate + torque


def network(hidden: int = 32, samples: int = 2000, steps: int = 200) -> torch.nn.Module:
    """Fit a network of (sin, cos, rate, torque) to the rates at random states."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(4, hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(hidden, 1),
        ).double()
        angle = (torch.rand(samples, 1, dtype=torch.float64) * 2 - 1) * math.pi
        rate, torque = (2 * torch.rand(2, samples, 1, dtype=torch.float64) - 1) * torch.tensor([[[8.0]], [[5.0]]])
    x = torch.cat([angle.sin(), angle.cos(), rate / 8, torque / 5], 1)
    y = truth(angle, rate, torque) / 10
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return net.requires_grad_(False)


def pendulum(acceleration) -> jp.control.Problem:
    """Swing-up in 3 s with least effort, where the derivative of the rate is a function of (angle, rate, torque)."""
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "swing",
        states={"angle": (1, -4.0, 4.0), "rate": (1, -8.0, 8.0)},
        controls={"torque": (1, -5.0, 5.0)},
        t0=0.0,
        tf=3.0,
    )
    ph.dynamics = lambda x, u, t, p: {"angle": x.rate, "rate": acceleration(x.angle, x.rate, u.torque)}
    ph.start(angle=0.0, rate=0.0)
    ph.end(angle=math.pi, rate=0.0)
    ph.guess(torque=lambda t: 3 * torch.tensor(t).mul(4).sin().numpy())
    ocp.minimize(running=lambda x, u, t, p: u.torque.square())
    return ocp


def learned() -> Case:
    """The pendulum with the network as its dynamics."""
    net = network()

    def acceleration(angle, rate, torque):
        return 10 * net(torch.cat([angle.sin(), angle.cos(), rate / 8, torque / 5], 1))

    return Case(pendulum(acceleration), None, 0.0, "simulated data", {"mesh": (30, 3)})


def known() -> Case:
    """The same with the true dynamics, for comparison."""
    return Case(pendulum(truth), None, 0.0, "simulated data", {"mesh": (30, 3)})
