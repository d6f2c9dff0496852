"""Test problems from the literature, with their optima."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

import jetplane as jp

from .case import Case


def brachistochrone() -> Case:
    """The fastest slide from rest, 2 m across and 2 m down: a cycloid."""
    g = 9.81
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "slide", states={"x": (2, 0, 10), "v": (1, 0, 20)}, controls={"angle": (1, 0, math.pi)}, t0=0.0, tf=(0.1, 10.0)
    )
    ph.dynamics = lambda x, u, t, p: {
        "x": torch.cat([x.v * u.angle.sin(), x.v * u.angle.cos()], 1),
        "v": g * u.angle.cos(),
    }
    ph.start(x=0.0, v=0.0)
    ph.end(x=[2.0, 2.0])
    ph.guess(tf=1.0, v=lambda t: 6.0 * t)
    ocp.minimize(final=lambda e: e.slide.tf)
    # The cycloid x = r (a - sin a), y = r (1 - cos a) through (2, 2), run through in a sqrt(r / g).
    a: Any = brentq(lambda a: a - math.sin(a) - (1 - math.cos(a)), 0.5, 6.0)
    optimum = a * math.sqrt(2 / (1 - math.cos(a)) / g)
    return Case(ocp, optimum, 1e-8, "Bernoulli 1696", {"accuracy": 1e-7})


def bryson_denham() -> Case:
    """Least effort to turn back, without going beyond 1/9; Bryson, Denham, Dreyfus 1963: the cost is 4 / (9 l)."""
    limit = 1 / 9
    ocp = jp.control.Problem()
    ph = ocp.phase("turn", states={"x": (1, None, limit), "v": 1}, controls={"a": 1}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
    ph.start(x=0.0, v=1.0)
    ph.end(x=0.0, v=-1.0)
    ocp.minimize(running=lambda x, u, t, p: u.a.square() / 2)
    return Case(ocp, 4.0, 1e-5, "Bryson, Denham, Dreyfus 1963", {"mesh": (30, 4)})


def goddard(weight: float = 0.0) -> Case:
    """How high a sounding rocket gets with drag; COPS 3 (Dolan, Moré, Munson 2004), whose optimum is 1.01283.

    Thrust enters linearly, and for a while its best value is neither bound: on that singular arc the height does not
    change, to first order, when thrust ripples from node to node. ``weight`` times its square is a cost that does.
    """
    thrust, mass, c, drag, scale = 3.5, 0.6, 0.5, 310.0, 500.0
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "ascent",
        states={"h": (1, 1.0, 2.0), "v": (1, 0.0, 1.0), "m": (1, mass, 1.0)},
        controls={"T": (1, 0.0, thrust)},
        t0=0.0,
        tf=(0.02, 1.0),
    )

    def dynamics(x, u, t, p):
        resistance = drag * x.v.square() * torch.exp(-scale * (x.h - 1))
        return {"h": x.v, "v": (u.T - resistance) / x.m - 1 / x.h.square(), "m": -u.T / c}

    ph.dynamics = dynamics
    ph.start(h=1.0, v=0.0, m=1.0)
    ph.end(m=mass)
    ph.guess(tf=0.2, h=lambda t: 1 + 0.05 * t, v=0.05)
    small = (lambda x, u, t, p: weight * u.T.square()) if weight else None
    ocp.minimize(final=lambda e: -e.ascent.xf.h, running=small)
    return Case(ocp, None if weight else -1.01283, 1e-5, "COPS 3, 2004", {"mesh": (60, 3)})


def goddard_smooth() -> Case:
    """Goddard's rocket with a small cost on the square of its thrust, which takes the ripples off its singular arc."""
    return goddard(weight=1e-4)


def hyper_sensitive() -> Case:
    """Two boundary layers, 10,000 units of time apart; Rao, Mease 2000.

    Between them the state is zero, so the optimum is the sum of the costs on the stable manifold of 0 and on the
    unstable one.
    """
    first, last, duration = 1.0, 1.5, 10_000.0
    ocp = jp.control.Problem()
    ph = ocp.phase("wait", states={"x": (1, -50, 50)}, controls={"u": (1, -50, 50)}, t0=0.0, tf=duration)
    ph.dynamics = lambda x, u, t, p: {"x": -(x.x**3) + u.u}
    ph.start(x=first)
    ph.end(x=last)
    ocp.minimize(running=lambda x, u, t, p: (x.x.square() + u.u.square()) / 2)

    def manifold(x: float) -> float:
        return (x**2 * math.sqrt(x**4 + 1) + math.asinh(x**2)) / 4

    optimum = manifold(first) - first**4 / 4 + manifold(last) + last**4 / 4
    # Short intervals at both ends.
    lengths = np.concatenate([np.geomspace(0.2, 1000, 20), np.geomspace(1000, 0.2, 20)])
    mesh = jp.control.Mesh(tuple(lengths / lengths.sum()), (8,) * 40)
    return Case(ocp, optimum, 1e-5, "Rao, Mease 2000", {"mesh": mesh, "scaling": {"x": 1.0, "u": 1.0}})


def moon_lander() -> Case:
    """Fuel of a soft landing: free fall, then full thrust; Meditch 1964. With these numbers it is 2 sqrt(17)."""
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "land", states={"h": (1, 0, 20), "v": (1, -20, 20)}, controls={"a": (1, 0, 3)}, t0=0.0, tf=(1.0, 20.0)
    )
    ph.dynamics = lambda x, u, t, p: {"h": x.v, "v": u.a - 1.5}
    ph.start(h=10.0, v=-2.0)
    ph.end(h=0.0, v=0.0)
    ph.guess(tf=4.0)
    ocp.minimize(running=lambda x, u, t, p: u.a)
    return Case(ocp, 2 * math.sqrt(17), 2e-3, "Meditch 1964", {"mesh": (50, 3)})


def cart_pole() -> Case:
    """Swing-up with least square of the force; Kelly, SIAM Review 59 (2017)."""
    m1, m2, length, g, distance, force = 1.0, 0.3, 0.5, 9.81, 1.0, 20.0
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "swing",
        states={"x": (1, -2, 2), "angle": 1, "v": 1, "rate": 1},
        controls={"F": (1, -force, force)},
        t0=0.0,
        tf=2.0,
    )

    def dynamics(x, u, t, p):
        sine, cosine = x.angle.sin(), x.angle.cos()
        swing = length * m2 * sine * x.rate.square()
        slide = swing + u.F + m2 * g * cosine * sine
        turn = cosine * (swing + u.F) + (m1 + m2) * g * sine
        divisor = m1 + m2 * sine.square()
        return {"x": x.v, "angle": x.rate, "v": slide / divisor, "rate": -turn / (length * divisor)}

    ph.dynamics = dynamics
    ph.start(x=0.0, angle=0.0, v=0.0, rate=0.0)
    ph.end(x=distance, angle=math.pi, v=0.0, rate=0.0)
    ocp.minimize(running=lambda x, u, t, p: u.F.square())
    return Case(ocp, None, 0.0, "Kelly 2017", {"accuracy": 1e-6})
