"""The curvature monitor: time, memory and error of a reading, and the edge of stability along a training run.

    python -m benchmarks.monitor --json docs/results/monitor.json --figure docs/images/monitor.png
    python -m benchmarks.monitor --data-dir FOLDER ...        # MNIST instead of the small digits of scikit-learn
    python -m benchmarks.monitor --from docs/results/monitor.json      # its tables

A reading is ``v^T Hess(L) v`` along the step v that Adam takes, of length one. Beside ours: reverse over reverse (one
product with the Hessian), hessian-eigenthings by differences of gradients, its choice for large models, if it is there
(``pip install hessian-eigenthings``), and the search for the critical rate by forward passes of arXiv 2601.16979. Time
is processor time of one thread as a ratio to a plain forward pass, medians of turns that alternate; memory the peak
above model and batch in a fresh process; error is against reverse over reverse in double precision.

The run is gradient descent on all of a thousand images, by an MLP with tanh: curvature along the steps rises to 2 over
the rate and stays there. Every reading is repeated by the search, and by one of many passes that is taken for exact.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.experiments import data

from .measuring import ROOT, environment, machine
from .memory import SMALL, peak_growth
from .problems import BATCH, Problem, make

MODELS = ["mlp", "cnn", "gpt"]
TURNS = 7
SEARCH, EIGENTHINGS, REVERSE = "critical rate by search", "hessian-eigenthings, differences", "reverse over reverse"
OURS, BOTH, PLANE = "ours", "ours, with Gauss-Newton", "ours, three directions"
EDGE_RATE, EDGE_STEPS, EDGE_EVERY = 0.06, 800, 10


# --- critical rates by forward passes -------------------------------------------------------------------------------


def critical_rate(loss: Callable[[float], float], start: float, bisections: int = 3) -> tuple[float, int]:
    """The rate at which the loss along a direction is again what it was, and how many forward passes it took.

    Doubled or halved from ``start`` until it is bracketed, then bisected: within a factor of ``2^(1 / 2^bisections)``.

    Args:
        loss: after a step at a rate.
        start: where to begin; the one of the step before.
        bisections: of the logarithm.
    """
    before, count, rate = loss(0.0), 1, start

    def rises(at: float) -> bool:
        nonlocal count
        count += 1
        return not loss(at) < before

    high = rises(rate)
    low_rate, high_rate = (rate, rate)
    for _ in range(60):
        rate = rate / 2 if high else rate * 2
        if rises(rate) != high:
            low_rate, high_rate = (rate, 2 * rate) if high else (rate / 2, rate)
            break
    for _ in range(bisections):
        middle = (low_rate * high_rate) ** 0.5
        low_rate, high_rate = (low_rate, middle) if rises(middle) else (middle, high_rate)
    return (low_rate * high_rate) ** 0.5, count


class Line:
    """The loss along a direction, by displaced parameters."""

    def __init__(self, closure: Callable[[], Tensor], params: list[Tensor], direction: list[Tensor]) -> None:
        self.closure, self.params, self.direction = closure, params, direction
        self.held = [p.detach().clone() for p in params]

    @torch.no_grad()
    def __call__(self, rate: float) -> float:
        try:
            for p, v in zip(self.params, self.direction, strict=True):
                p.add_(v, alpha=rate)
            return self.closure().item()
        finally:
            for p, before in zip(self.params, self.held, strict=True):
                p.copy_(before)


# --- one reading ------------------------------------------------------------------------------------------------------


def at_a_step(name: str, batch: int | None = None) -> tuple[Problem, list[Tensor]]:
    """A problem after a few steps of Adam, and the direction of the next, of length one."""
    problem = make(name, 1, batch)
    params = list(problem.model.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-3)
    before: list[Tensor] = []
    for _ in range(4):
        before = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    step = [p.detach() - b for p, b in zip(params, before, strict=True)]
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    optimizer.zero_grad()
    norm = torch.stack([v.norm() for v in step]).norm()
    return problem, [v / norm for v in step]


def reading(way: str, problem: Problem, direction: list[Tensor]) -> Callable[[], float | None]:
    """What a way measures along a direction: the curvature, or something else (None)."""
    params: list[Tensor] = list(problem.model.parameters())
    if way == "forward":

        def forward() -> None:
            with torch.inference_mode():
                problem.loss()

        return forward
    if way == SEARCH:
        line = Line(problem.loss, list(params), direction)
        start = critical_rate(line, 1.0)[0] * 1.1  # that of the step before

        def search() -> None:
            critical_rate(line, start)

        return search
    if way == REVERSE:

        def reverse() -> float:
            grads = torch.autograd.grad(problem.loss(), params, create_graph=True)
            product = torch.autograd.grad(grads, params, direction)
            return sum(float((h * v).sum()) for h, v in zip(product, direction, strict=True))

        return reverse
    if way == EIGENTHINGS:
        from hessian_eigenthings.operators.hessian import HessianOperator  # type: ignore[import-not-found]

        flat = torch.cat([v.flatten() for v in direction])
        operator = HessianOperator(
            problem.model, [(problem.x, problem.y)], lambda model, b: F.cross_entropy(model(b[0]), b[1]),
            method="finite_difference",
        )  # fmt: skip
        return lambda: float(operator.matvec(flat) @ flat)
    held = jp.directions.StoredDirections([v.unsqueeze(0) for v in direction])
    if way == PLANE:
        others = [torch.randn_like(v) for v in direction], [torch.randn_like(v) for v in direction]
        held = jp.directions.StoredDirections([torch.stack(vs) for vs in zip(direction, *others, strict=True)])

    def ours() -> float:
        plane = jp.evaluate(problem.loss, params, held, "hessian", examples=True)
        if way == BOTH:
            jp.evaluate(problem.loss, params, held, "ggn", examples=True)
        assert plane.curvature is not None
        return plane.curvature[0, 0].item()

    return ours


def ways() -> list[str]:
    found = [OURS, BOTH, PLANE, REVERSE]
    try:
        import hessian_eigenthings  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        pass
    else:
        found.append(EIGENTHINGS)
    return [*found, SEARCH]


def of_model(name: str) -> list[dict[str, Any]]:
    """Time, memory and error of every way."""
    problem, direction = at_a_step(name)
    double = Problem(name, copy.deepcopy(problem.model).double(), problem.x, problem.y, {})
    if name != "gpt":
        double.x = problem.x.double()
    exact = reading(REVERSE, double, [v.double() for v in direction])()
    assert exact is not None
    runs = {way: reading(way, problem, direction) for way in ["forward", *ways()]}
    times: dict[str, list[float]] = {way: [] for way in runs}
    values: dict[str, float | None] = {}
    for turn in range(TURNS + 1):
        for way, run in runs.items():
            start = time.process_time()
            values[way] = run()
            if turn:
                times[way].append(time.process_time() - start)
    rows = []
    for way in runs:
        value = values[way]
        rows.append(
            {
                "model": name,
                "way": way,
                "milliseconds": 1e3 * sorted(times[way])[TURNS // 2],
                "forwards": sorted(times[way])[TURNS // 2] / sorted(times["forward"])[TURNS // 2],
                "error": None if value is None else abs(value - exact) / abs(exact),
                "peak": in_fresh_process(name, way),
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def in_fresh_process(name: str, way: str) -> int:
    command = [sys.executable, "-m", "benchmarks.monitor", "--case", json.dumps([name, way])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(1, **SMALL), check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {way}: failed\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def peak(name: str, way: str) -> int:
    torch.set_num_threads(1)
    small, direction = at_a_step(name, 2)
    reading(way, small, direction)()
    problem, direction = at_a_step(name, BATCH[name])
    return peak_growth(reading(way, problem, direction))


# --- the edge of stability --------------------------------------------------------------------------------------------


def edge(folder: Path | None) -> dict[str, Any]:
    """Gradient descent on a thousand images, with a reading every few steps by each way."""
    images = data.load("mnist" if folder else "digits", folder).train
    x, y = images.images[:1000].flatten(1), F.one_hot(images.labels[:1000], 10).float()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )  # fmt: skip
    params: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=EDGE_RATE)

    def loss() -> Tensor:
        return F.mse_loss(model(x), y) * 5  # half the squared error of an image

    largest = torch.randn(sum(p.numel() for p in params))
    rows: list[dict[str, float]] = []
    seconds = {"pass": 0.0, "search": 0.0}
    monitor = jp.CurvatureMonitor(optimizer, loss, every=EDGE_EVERY)
    searched = EDGE_RATE
    for step in range(EDGE_STEPS):
        optimizer.zero_grad()
        loss().backward()
        if step % EDGE_EVERY == 0:
            line = Line(loss, params, [-p.grad.clone() for p in params])  # type: ignore[union-attr]
            start = time.process_time()
            searched, count = critical_rate(line, searched)
            seconds["search"] += time.process_time() - start
            exact, _ = critical_rate(line, searched, 8)
            sharpness, largest = power_iteration(loss, params, largest)
        start = time.process_time()
        optimizer.step()
        seconds["pass"] += (time.process_time() - start) * (step % EDGE_EVERY == 0)
        if step % EDGE_EVERY == 0:
            found = monitor.readings[-1]
            rows.append(
                {
                    "step": step, "loss": found.value, "pass": found.critical_rate, "search": searched, "exact": exact,
                    "passes_of_search": count, "largest": sharpness,
                }
            )  # fmt: skip
    forward = timed(loss)
    return {
        "data": "MNIST" if folder else "digits", "rate": EDGE_RATE, "rows": rows,
        "forwards": {name: s / len(rows) / forward for name, s in seconds.items()},
    }  # fmt: skip


def timed(run: Callable[[], Any]) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(15):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return sorted(times)[7]


def power_iteration(
    loss: Callable[[], Tensor], params: list[Tensor], v: Tensor, count: int = 5
) -> tuple[float, Tensor]:
    """The Hessian's largest eigenvalue by products in reverse mode, from where the last reading left off."""
    value = 0.0
    for _ in range(count):
        v = v / v.norm()
        parts = [part.reshape(p.shape) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
        grads = torch.autograd.grad(loss(), params, create_graph=True)
        product = torch.cat([h.flatten() for h in torch.autograd.grad(grads, params, parts)])
        value, v = float(product @ v), product
    return value, v


# --- tables and figure ------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    lines = [
        found["machine"],
        "",
        "| model | way | forward passes | peak, MiB | relative error |",
        "|---|---|--:|--:|--:|",
    ]
    for row in found.get("readings", []):
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(f"| {row['model']} | {row['way']} | {row['forwards']:.1f} | {row['peak'] / 2**20:.0f} | {error} |")
    run = found.get("edge")
    if run is None:
        return "\n".join(lines)
    late = run["rows"][len(run["rows"]) // 2 :]

    def median(name: str) -> float:
        return sorted(abs(r[name] / r["exact"] - 1) for r in late)[len(late) // 2]

    count = sum(r["passes_of_search"] for r in run["rows"]) / len(run["rows"])
    lines += [
        "",
        f"{run['data']}, gradient descent at {run['rate']}, second half of the run: the median error of the critical",
        f"rate, against a search of many passes, is {100 * median('pass'):.1f} % by one pass of jets, and "
        f"{100 * median('search'):.1f} % by a search of {count:.1f} forward passes; in time "
        f"{run['forwards']['pass']:.1f} (with the step itself) and {run['forwards']['search']:.1f} forward passes",
    ]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The edge of stability, and what a reading costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=[1.3, 1])
    run = found["edge"]
    steps = [r["step"] for r in run["rows"]]
    left.plot(steps, [r["search"] for r in run["rows"]], ".", markersize=4, color="C2", label="critical rate by search")
    left.plot(steps, [r["pass"] for r in run["rows"]], color="C0", label="2 / curvature along the step, one pass")
    left.plot(steps, [2 / r["largest"] for r in run["rows"]], "--", color="C3", label="2 / largest eigenvalue")
    left.axhline(run["rate"], color="C1", label="rate")
    left.set(yscale="log", xlabel="step", ylabel="rate")
    left.set_title(f"Gradient descent on {run['data']} comes to the edge of stability", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0.1, 0.4))
    names = [way for way in dict.fromkeys(row["way"] for row in found["readings"]) if way != "forward"]
    models = list(dict.fromkeys(row["model"] for row in found["readings"]))
    for i, way in enumerate(names):
        at = {row["model"]: row["forwards"] for row in found["readings"] if row["way"] == way}
        places = [n + (i - len(names) / 2) * 0.8 / len(names) for n in range(len(models))]
        right.barh(places, [at[m] for m in models], height=0.75 / len(names), label=way, color=f"C{i}")
    right.set_yticks(range(len(models)), models)
    right.invert_yaxis()
    right.set_xlabel("forward passes of a reading")
    right.set_title("Time", loc="left", fontsize=11)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print the tables and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sections", nargs="+", choices=["edge", "readings"], default=["edge", "readings"])
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--data-dir", type=Path, help="folder of MNIST's files")
    add("--json", type=Path, help="all figures")
    add("--figure", type=Path)
    add("--from", nargs="+", type=Path, default=[], dest="earlier", help="figures of earlier runs, to put together")
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(peak(*args.case))
        return
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for path in args.earlier:
        found |= json.loads(path.read_text())
    if not args.earlier:
        found = {
            "command": "python -m benchmarks.monitor" + (" --data-dir FOLDER" if args.data_dir else ""),
            "machine": machine(1),
        }
        if "edge" in args.sections:
            found["edge"] = edge(args.data_dir)
        if "readings" in args.sections:
            found["readings"] = [row for name in args.models for row in of_model(name)]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.figure and {"edge", "readings"} <= set(found):
        draw(found, args.figure)
    print(tables(found))


if __name__ == "__main__":
    main()
