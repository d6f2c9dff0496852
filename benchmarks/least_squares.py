"""Nonlinear least squares: evaluations on Moré's, Garbow's and Hillstrom's problems, and memory over time steps.

    python -m benchmarks.least_squares --json docs/results/least-squares.json --figure docs/images/least-squares.png
    python -m benchmarks.least_squares --from docs/results/least-squares.json      # its tables

Beside ours: `scipy.optimize.least_squares` by each of its methods with exact Jacobians and, as it is called without any
option, with differences; torch-levenberg-marquardt, if it is there (`pip install torch-levenberg-marquardt`).

What is counted are evaluations of the residuals. Ours has all derivatives in each. SciPy's Jacobians that are given are
not counted, and those by differences are the n evaluations that they are. For torch-levenberg-marquardt those with
derivatives and those without count alike.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import jetplane as jp

from .measuring import ROOT, environment, machine
from .memory import SMALL, peak_growth
from .more_garbow_hillstrom import PROBLEMS, Problem

OURS = "ours"
UNSCALED = "ours, x_scale=1"
METHODS = ["lm", "trf", "dogbox"]
DIFFERENCES = "SciPy, as called without options"
TORCH_LM = "torch-levenberg-marquardt"
MOST = 2000  # evaluations of a problem
STEPS = (1_000, 10_000, 100_000)
PARAMETERS = 20


class Enough(Exception):  # noqa: N818
    """More evaluations than a run may take."""


class Counted:
    """Residuals that note the sum of squares of every evaluation."""

    def __init__(self, residuals: Callable[[Tensor], Tensor]) -> None:
        self.residuals = residuals
        self.squares: list[float] = []

    def __call__(self, x: Any) -> Any:
        if len(self.squares) >= MOST:
            raise Enough
        found = self.residuals(torch.as_tensor(np.array(x), dtype=torch.float64)).numpy()
        self.squares.append(float(found @ found) if np.isfinite(found).all() else math.inf)
        return found


def near(squares: float, minimum: float) -> bool:
    """Whether a sum of squares is at a minimum: within 1e-6 of it, or below 1e-12 where it is zero."""
    return squares <= (1 + 1e-6) * minimum if minimum else squares <= 1e-12


def outcome(problem: Problem, history: list[float], status: str) -> dict[str, Any]:
    """Of a run: how many evaluations it took, where it ended, and after how many it was there first."""
    best, at = math.inf, []
    for squares in history:
        best = min(best, squares)
        at.append(best)
    reached = [m for m in problem.minima if near(best, m) and best >= m * (1 - 1e-4)]
    first = next(i + 1 for i, s in enumerate(at) if near(s, reached[-1])) if reached else None
    return {"evaluations": len(history), "squares": best, "reached": first, "status": status}


def of_ours(problem: Problem, **options: Any) -> dict[str, Any]:
    fit = jp.optim.least_squares(problem.residuals, problem.start, **options)
    return outcome(problem, [2 * cost for cost in fit.history], fit.status)


def of_scipy(problem: Problem, **options: Any) -> dict[str, Any]:
    from scipy.optimize import least_squares

    counted = Counted(problem.residuals)
    try:
        done = least_squares(counted, problem.start.numpy(), **options)
    except Enough:
        return outcome(problem, counted.squares, "limit")
    except ValueError as error:
        return outcome(problem, counted.squares, f"failed: {error}")
    return outcome(problem, counted.squares, str(done.status))


def exact(problem: Problem) -> Callable[[Any], Any]:
    jacobian = torch.func.jacrev(problem.residuals)
    return lambda x: jacobian(torch.as_tensor(np.array(x), dtype=torch.float64)).numpy()


def of_torch_lm(problem: Problem) -> dict[str, Any] | None:
    try:
        from torch_levenberg_marquardt.training import LevenbergMarquardtModule  # type: ignore[import-not-found]
    except ImportError:
        return None
    history: list[float] = []
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]

    class Residuals(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(problem.start.clone())

        def forward(self, _: Tensor) -> Tensor:
            found = problem.residuals(self.x).unsqueeze(1)
            plain = found
            while functorch.is_functorch_wrapped_tensor(plain):
                plain = functorch.get_unwrapped(plain)
            history.append(float(plain.square().sum()))
            return found

    model = Residuals()
    targets = torch.zeros(len(problem.residuals(problem.start)), 1, dtype=torch.float64)
    trainer = LevenbergMarquardtModule(model, use_vmap=False)
    before, status = math.inf, "limit"
    try:
        while len(history) < MOST // 4:
            _, loss, stop, _ = trainer.training_step(torch.zeros(1), targets)
            # It has no test of convergence: the caller's is SciPy's default ftol.
            if stop or abs(before - float(loss)) <= 1e-8 * float(loss):
                status = "stopped" if stop else "ftol"
                break
            before = float(loss)
    except Exception as error:  # noqa: BLE001
        status = f"failed: {type(error).__name__}"
    return outcome(problem, history or [math.inf], status)


def ways() -> dict[str, Callable[[Problem], dict[str, Any] | None]]:
    found: dict[str, Callable[[Problem], dict[str, Any] | None]] = {
        OURS: of_ours,
        UNSCALED: lambda p: of_ours(p, x_scale=1.0),
    }
    for method in METHODS:
        found[f"SciPy {method}, exact Jacobian"] = lambda p, method=method: of_scipy(p, jac=exact(p), method=method)
    return found | {DIFFERENCES: of_scipy, TORCH_LM: of_torch_lm}


# --- memory over time steps -----------------------------------------------------------------------------------------


def simulation(way: str, steps: int) -> Callable[[], Any]:
    """A simulation of a few numbers with 20 parameters and a residual every step, and its Jacobian by one way."""
    x = torch.linspace(0.1, 1, PARAMETERS, dtype=torch.float64)

    def yielded(x: Tensor) -> Any:
        u = x[0]
        for _ in range(steps):
            u = u + 0.01 * torch.sin(x * u).sum()
            yield u - 0.5

    def returned(x: Tensor) -> Tensor:
        return torch.stack(list(yielded(x)))

    if way == "ours, yielded":
        return lambda: jp.optim.least_squares(yielded, x, max_nfev=1)
    if way == "ours, returned":
        return lambda: jp.optim.least_squares(returned, x, max_nfev=1)
    if way == "plain":
        return lambda: sum(float(r) ** 2 for r in yielded(x))

    def reverse() -> Any:
        p = x.clone().requires_grad_()
        return torch.autograd.grad(returned(p).square().sum() / 2, p)

    return reverse


WAYS = ["plain", "ours, yielded", "ours, returned", "one gradient by backprop"]


def memory(steps: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for n in steps:
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.least_squares", "--case", json.dumps([way, n])]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=environment(1, **SMALL), check=False
            )
            if done.returncode:
                raise SystemExit(f"{way}, {n} steps: failed\n{done.stderr[-2000:]}")
            rows.append({"way": way, "steps": n} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
    return rows


def measured(way: str, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    simulation(way, 100)()
    run, start = simulation(way, steps), time.process_time()
    peak = peak_growth(run)
    return {"peak": peak, "seconds": time.process_time() - start}


# --- tables and figure ------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    names = [name for name in ways() if any(name in row for row in found["problems"])]
    lines = [found["machine"], "", "| problem | n | " + " | ".join(names) + " |", "|---|--:|" + "--:|" * len(names)]

    def cell(entry: dict[str, Any] | None) -> str:
        if entry is None:
            return ""
        return f"{entry['evaluations']}" + (f" ({entry['reached']})" if entry["reached"] else " (not)")

    for row in found["problems"]:
        lines.append(f"| {row['name']} | {row['n']} | " + " | ".join(cell(row.get(name)) for name in names) + " |")
    for label, key in (("sum", "evaluations"), ("at a minimum", "")):
        cells = []
        for name in names:
            entries = [row[name] for row in found["problems"] if row.get(name)]
            cells.append(str(sum(e[key] for e in entries) if key else sum(e["reached"] is not None for e in entries)))
        lines.append(f"| {label} | | " + " | ".join(cells) + " |")
    lines += ["", "| time steps | " + " | ".join(WAYS) + " |", "|--:|" + "--:|" * len(WAYS)]
    for n in sorted({row["steps"] for row in found["memory"]}):
        at = {row["way"]: row for row in found["memory"] if row["steps"] == n}
        cells = [f"{at[way]['peak'] / 2**20:.2f} MiB, {at[way]['seconds']:.1f} s" for way in WAYS]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Problems solved over evaluations; memory over time steps; two fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    solved, grown, prey, ill = axes.flat
    names = [name for name in ways() if any(name in row for row in found["problems"])]
    for i, name in enumerate(names):
        reached = sorted(row[name]["reached"] for row in found["problems"] if row.get(name) and row[name]["reached"])
        solved.step(
            [1, *reached, MOST], [0, *range(1, len(reached) + 1), len(reached)], where="post", label=name,
            linewidth=2.2 if name == OURS else 1.3, linestyle="-" if name.startswith("ours") else "--", color=f"C{i}",
        )  # fmt: skip
    solved.set(xscale="log", xlabel="evaluations of the residuals", ylabel="problems at a minimum")
    solved.set_title(f"{len(found['problems'])} problems of Moré, Garbow, Hillstrom", loc="left", fontsize=11)
    solved.legend(frameon=False, fontsize=8)
    for way in WAYS:
        rows = [row for row in found["memory"] if row["way"] == way]
        grown.plot([r["steps"] for r in rows], [max(r["peak"], 2**12) / 2**20 for r in rows], "o-", label=way)
    grown.set(xscale="log", yscale="log", xlabel="time steps", ylabel="peak memory, MiB")
    grown.set_title(f"A simulation with {PARAMETERS} parameters", loc="left", fontsize=11)
    grown.legend(frameon=False, fontsize=8)
    example = runpy.run_path(str(ROOT / "examples" / "fit_lotka_volterra.py"))
    fit = example["fit"]()
    curve = torch.stack(list(example["simulated"](fit.params))).exp()
    for i, (name, color) in enumerate((("hare", "C0"), ("lynx", "C3"))):
        years = range(1900, 1900 + len(curve))
        prey.plot(years, example["PELTS"][:, i], "o", color=color, label=name)
        prey.plot(years, curve[:, i], color=color)
    prey.set(xlabel="year", ylabel="thousands of pelts")
    prey.xaxis.get_major_locator().set_params(integer=True)
    prey.set_title("Lotka-Volterra: six parameters", loc="left", fontsize=11)
    prey.legend(frameon=False, fontsize=8)
    example = runpy.run_path(str(ROOT / "examples" / "fit_epidemic.py"))
    fit = example["fit"]()
    curve = torch.stack(list(example["simulated"](fit.params)))
    ill.plot(example["IN_BED"], "o", color="C2", label="in bed")
    ill.plot(curve, color="C2", label="SIR model")
    ill.set(xlabel="day", ylabel="boys of 763")
    ill.set_title("An epidemic: three parameters", loc="left", fontsize=11)
    ill.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print the tables and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", nargs="+", type=int, default=list(STEPS))
    add("--json", type=Path, help="all figures")
    add("--figure", type=Path)
    add("--from", type=Path, dest="earlier", help="figures of an earlier run")
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(*args.case)))
        return
    torch.set_num_threads(1)
    if args.earlier:
        found = json.loads(args.earlier.read_text())
    else:
        found = {
            "command": "python -m benchmarks.least_squares", "machine": machine(1), "problems": [], "memory": []
        }  # fmt: skip
        for problem in PROBLEMS:
            row = {"name": problem.name, "n": problem.n}
            row |= {name: got for name, way in ways().items() if (got := way(problem)) is not None}
            found["problems"].append(row)
            print(problem.name, file=sys.stderr)
        found["memory"] = memory(tuple(args.steps))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.figure:
        draw(found, args.figure)
    print(tables(found))


if __name__ == "__main__":
    main()
