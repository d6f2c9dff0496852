"""Steps to 1e-10 on functions without noise, beside Newton's method (analytic Hessian, halved until the value falls).

python -m benchmarks.functions
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import jetplane as jp
from jetplane.subspace.descent import Newton
from jetplane.subspace.search import Backtracking, NoState, Outcome, Proposal, decided
from jetplane.subspace.sources import Averages, Drawn, PreviousStep, Subspace

GOAL, MOST = 1e-10, 2000
Function = Callable[[Tensor], Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(d: int, condition: float) -> Function:
    """Half of ``(x - 1)^T A (x - 1)``, A with eigenvalues from 1 / condition to 1 in directions of its own."""
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)).double()).Q
    scales = torch.logspace(0, -torch.tensor(condition).log10().item(), d).double().sqrt()
    return lambda x: 0.5 * ((turn @ (x - 1)) * scales).square().sum()


# --- the Moré-Garbow-Hillstrom collection: residuals, starts and least values --------------------------------
# Source: ACM Transactions on Mathematical Software 7 (1981), pages 17-41, where they have the numbers in the comments.


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _stack(*residuals: Tensor) -> Tensor:
    return torch.stack(residuals)


def freudenstein_roth(x: Tensor) -> Tensor:  # 2
    a, b = x
    return _stack(-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b)


def powell_badly_scaled(x: Tensor) -> Tensor:  # 3
    a, b = x
    return _stack(1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001)


def brown_badly_scaled(x: Tensor) -> Tensor:  # 4
    a, b = x
    return _stack(a - 1e6, b - 2e-6, a * b - 2)


def beale(x: Tensor) -> Tensor:  # 5
    a, b = x
    powers = torch.arange(1, 4, device=x.device)
    return _numbers(1.5, 2.25, 2.625) - a * (1 - b**powers)


def helical_valley(x: Tensor) -> Tensor:  # 7
    a, b, c = x
    turn = torch.atan(b / a) / (2 * math.pi) + torch.where(a < 0, 0.5, 0.0)
    return _stack(10 * (c - 10 * turn), 10 * ((a * a + b * b).sqrt() - 1), c)


BARD = _numbers(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def bard(x: Tensor) -> Tensor:  # 8
    u = torch.arange(1, 16).double()
    return BARD - (x[0] + u / ((16 - u) * x[1] + torch.minimum(u, 16 - u) * x[2]))


def box(x: Tensor) -> Tensor:  # 12
    t = torch.arange(1, 11).double() / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:  # 13, and 22 for more than four
    a, b, c, d = x.reshape(-1, 4).unbind(1)
    return torch.cat([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2])


def wood(x: Tensor) -> Tensor:  # 14
    a, b, c, d = x
    return _stack(
        10 * (b - a * a),
        1 - a,
        math.sqrt(90) * (d - c * c),
        1 - c,
        math.sqrt(10) * (b + d - 2),
        (b - d) / math.sqrt(10),
    )


KOWALIK = _numbers(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_AT = _numbers(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Tensor) -> Tensor:  # 15
    u = KOWALIK_AT
    return KOWALIK - x[0] * (u * u + u * x[1]) / (u * u + u * x[2] + x[3])


def biggs(x: Tensor) -> Tensor:  # 18
    t = torch.arange(1, 14).double() / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def watson(x: Tensor) -> Tensor:  # 20
    t = (torch.arange(1, 30).double() / 29).unsqueeze(1)
    j = torch.arange(len(x)).double()
    rate = (j[1:] * x[1:] * t ** (j[1:] - 1)).sum(1)
    value = (x * t**j).sum(1)
    return torch.cat([rate - value**2 - 1, x[:1], (x[1] - x[0] ** 2 - 1).reshape(1)])


def extended_rosenbrock(x: Tensor) -> Tensor:  # 21
    a, b = x.reshape(-1, 2).unbind(1)
    return torch.cat([10 * (b - a * a), 1 - a])


def variably_dimensioned(x: Tensor) -> Tensor:  # 25
    total = (torch.arange(1, len(x) + 1).double() * (x - 1)).sum().reshape(1)
    return torch.cat([x - 1, total, total**2])


def trigonometric(x: Tensor) -> Tensor:  # 26
    n, i = len(x), torch.arange(1, len(x) + 1).double()
    return n - torch.cos(x).sum() + i * (1 - torch.cos(x)) - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:  # 27
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), (torch.prod(x) - 1).reshape(1)])


def chebyquad(x: Tensor) -> Tensor:  # 35
    y = 2 * x - 1
    older, old, residuals = torch.ones_like(y), y, []
    for i in range(1, len(x) + 1):
        integral = -1 / (i * i - 1) if i % 2 == 0 else 0.0
        residuals.append(old.mean() - integral)
        older, old = old, 2 * y * old - older
    return torch.stack(residuals)


def squares(residuals: Function) -> Function:
    return lambda x: residuals(x).square().sum()


@dataclass(frozen=True)
class Case:
    """A function, where to begin, and its least values: local ones are among them where methods end there."""

    f: Function
    start: Tensor
    least: tuple[float, ...] = (0.0,)

    def solved(self, value: float) -> bool:
        """Whether a value is within 1e-10 of a least one."""
        return any(abs(value - least) < GOAL for least in self.least)


def _mgh(residuals: Function, *start: float, least: tuple[float, ...] = (0.0,)) -> Case:
    return Case(squares(residuals), _numbers(*start), least)


CASES: dict[str, Case] = {
    "Rosenbrock, 2": Case(rosenbrock, _numbers(-1.2, 1.0)),
    "Rosenbrock, 10": Case(rosenbrock, torch.full((10,), -0.5)),
    "Rosenbrock, 100": Case(rosenbrock, torch.full((100,), 0.0)),
    "quadratic, 10, condition 1e6": Case(quadratic(10, 1e6), torch.zeros(10)),
    "quadratic, 100, condition 1e6": Case(quadratic(100, 1e6), torch.zeros(100)),
}
COLLECTION: dict[str, Case] = {
    "Freudenstein and Roth, 2": _mgh(freudenstein_roth, 0.5, -2.0, least=(0.0, 48.98425367924)),
    "Powell badly scaled, 2": _mgh(powell_badly_scaled, 0.0, 1.0),
    "Brown badly scaled, 2": _mgh(brown_badly_scaled, 1.0, 1.0),
    "Beale, 2": _mgh(beale, 1.0, 1.0),
    "helical valley, 3": _mgh(helical_valley, -1.0, 0.0, 0.0),
    "Bard, 3": _mgh(bard, 1.0, 1.0, 1.0, least=(8.214877306579e-3,)),
    "Box, 3": _mgh(box, 0.0, 10.0, 20.0),
    "Powell singular, 4": _mgh(powell_singular, 3.0, -1.0, 0.0, 1.0),
    "Wood, 4": _mgh(wood, -3.0, -1.0, -3.0, -1.0),
    "Kowalik and Osborne, 4": _mgh(kowalik_osborne, 0.25, 0.39, 0.415, 0.39, least=(3.07505603849e-4,)),
    "Biggs EXP6, 6": _mgh(biggs, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, least=(0.0, 5.655649925500e-3)),
    "Watson, 6": _mgh(watson, *[0.0] * 6, least=(2.287670053552e-3,)),
    "extended Rosenbrock, 10": _mgh(extended_rosenbrock, *[-1.2, 1.0] * 5),
    "extended Powell singular, 12": _mgh(powell_singular, *[3.0, -1.0, 0.0, 1.0] * 3),
    "variably dimensioned, 10": _mgh(variably_dimensioned, *[1 - j / 10 for j in range(1, 11)]),
    "trigonometric, 10": _mgh(trigonometric, *[0.1] * 10, least=(0.0, 2.795056121876e-5)),
    "Brown almost linear, 10": _mgh(brown_almost_linear, *[0.5] * 10, least=(0.0, 1.0)),
    "Chebyquad, 8": _mgh(chebyquad, *[j / 9 for j in range(1, 9)], least=(3.516873725678e-3,)),
}


def newton(case: Case, most: int = MOST) -> int | None:
    """Newton's steps, halved until the value falls; None where no part of one lowers it."""
    x, f = case.start.double(), case.f

    for n in range(most):
        value = f(x).item()
        if case.solved(value):
            return n
        slope, hessian = torch.func.grad(f)(x), torch.func.hessian(f)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jp.RescueWarning)  # indefinite Hessians are Newton's own affair
            proposal = Proposal.of(value, slope, hessian, Newton())
        at = x
        found = decided(Backtracking(), proposal, NoState(), lambda t, at=at: Outcome(f(at + t.rate * t.kappa).item()))
        if not found.rate:
            return None
        x = x + found.rate * found.kappa
    return most


def plane_search(case: Case, k: int, most: int = MOST, **settings: Any) -> tuple[int, bool, float]:
    """Steps of `jetplane.optim.PlaneSearch` with k directions, whether the value never rose, and the last value."""
    w = torch.nn.Parameter(case.start.double().clone())
    subspace = Subspace([Drawn(k), Averages(), PreviousStep()], "hessian")
    opt = jp.optim.PlaneSearch([w], subspace=subspace, **settings)
    last, monotone = float("inf"), True
    for n in range(most + 1):
        value = case.f(w.detach()).item()
        monotone, last = monotone and value <= last, value
        if case.solved(value):
            return n, monotone, value
        if n < most:
            opt.step(lambda: case.f(w))
    return most, monotone, last


def count(steps: int, monotone: bool, most: int) -> str:
    """A cell of the tables."""
    return (f"> {most}" if steps == most else str(steps)) + ("" if monotone else " (not monotone)")


def table(cases: dict[str, Case], parts: tuple[int, ...], most: int) -> None:
    """Count and print, with K = D and D over each of the parts."""
    print("| function |", " | ".join(["Newton", "K = D", *(f"K = D / {part}" for part in parts)]), "|")
    print("|---|--:|--:|" + "--:|" * len(parts))
    for name, case in cases.items():
        d = len(case.start)
        steps = newton(case, most)
        cells = ["fails" if steps is None else count(steps, True, most)]
        for k in (d, *(d // part for part in parts)):
            cells.append(count(*plane_search(case, k, most)[:2], most) if k else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print both tables."""
    table(CASES, (2, 5), MOST)
    print()
    table(COLLECTION, (2,), 300)


if __name__ == "__main__":
    main()
