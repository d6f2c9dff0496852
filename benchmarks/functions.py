"""Steps to 1e-10 on functions without noise, beside Newton's method with the analytic Hessian and the same search.

python -m benchmarks.functions
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import jetplane as jp
from jetplane.search import Backtracking, Proposal

GOAL, MOST = 1e-10, 2000
Function = Callable[[Tensor], Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(d: int, condition: float) -> Function:
    """Half of ``(x - 1)^T A (x - 1)``, A with eigenvalues from 1 / condition to 1 in directions of its own."""
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)).double()).Q
    scales = torch.logspace(0, -torch.tensor(condition).log10().item(), d).double().sqrt()
    return lambda x: 0.5 * ((turn @ (x - 1)) * scales).square().sum()


CASES: dict[str, tuple[Function, Tensor]] = {
    "Rosenbrock, 2": (rosenbrock, torch.tensor([-1.2, 1.0])),
    "Rosenbrock, 10": (rosenbrock, torch.full((10,), -0.5)),
    "Rosenbrock, 100": (rosenbrock, torch.full((100,), 0.0)),
    "quadratic, 10, condition 1e6": (quadratic(10, 1e6), torch.zeros(10)),
    "quadratic, 100, condition 1e6": (quadratic(100, 1e6), torch.zeros(100)),
}


def newton(f: Function, start: Tensor) -> int:
    """Newton's steps, halved until the value falls."""
    x = start.double()
    for n in range(MOST):
        if f(x) < GOAL:
            return n
        slope, inverse = torch.func.grad(f)(x), torch.linalg.inv(torch.func.hessian(f)(x))
        step = -inverse @ slope
        at = lambda rate, x=x, step=step: f(x + rate * step).item()  # noqa: E731
        x = x + Backtracking()(Proposal(f(x).item(), slope, inverse, None, at), {})[0] * step
    return MOST


def plane_search(f: Function, start: Tensor, k: int) -> tuple[int, bool]:
    """Steps of `jetplane.optim.PlaneSearch` with k directions, and whether the value never rose."""
    w = torch.nn.Parameter(start.double())
    opt = jp.optim.PlaneSearch([w], k=k, curvature="hessian")
    last, monotone = float("inf"), True
    for n in range(MOST):
        value = f(w.detach()).item()
        monotone, last = monotone and value <= last, value
        if value < GOAL:
            return n, monotone
        opt.step(lambda: f(w))
    return MOST, monotone


def main() -> None:
    """Count and print."""
    print("| function | Newton | K = D | K = D / 2 | K = D / 5 |", "|---|--:|--:|--:|--:|", sep="\n")
    for name, (f, start) in CASES.items():
        d = len(start)
        cells = [str(newton(f, start))]
        for k in (d, d // 2, d // 5):
            steps, monotone = plane_search(f, start, k) if k else (None, True)
            cells.append("" if steps is None else f"> {MOST}" if steps == MOST else str(steps))
            cells[-1] += "" if monotone else " (not monotone)"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
