"""How soon training gets where: every method on the same data, batches, initial weights and seeds.

    python -m benchmarks.convergence --tasks logreg mlp cnn --data-dir MNIST --seconds 60 --out table.md

Nothing of `jetplane.optim.PlaneSearch` is tuned: its defaults, and one batch size for all methods. Rivals run at
the rates that are written here; the best of a sweep may be chosen by ``--rate METHOD=RATE``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jetplane as jp
from jetplane.descent import Damped
from jetplane.experiments.report import COLOURS, STYLES, plt
from jetplane.search import NoiseAware

from .measuring import machine
from .tasks import TASKS, Task

Step = Callable[[Callable[[], Tensor]], Any]
PLANE = "plane-search"

# --- methods ----------------------------------------------------------------------------------------------


def plane_search(**settings: Any) -> Callable[[nn.Module, Task, float], Step]:
    """Our general optimizer; where a loss differentiates the model itself, its layers are left out of it."""

    def make(model: nn.Module, task: Task, rate: float) -> Step:
        own: dict[str, Any] = {"model": model if task.layers else None} | settings
        return jp.optim.PlaneSearch(model.parameters(), **own).step

    return make


def forward_only(kind: Callable[..., Any], **settings: Any) -> Callable[[nn.Module, Task, float], Step]:
    return lambda model, task, rate: kind(model.parameters(), lr=rate, **settings).step


def sofo(model: nn.Module, task: Task, rate: float) -> Step:
    """SOFO's method at its published settings for MNIST: K = 340 dense tangents, damping 1e-3, a fixed rate."""
    size = sum(p.numel() for p in model.parameters())
    return jp.optim.PlaneSearch(
        model.parameters(), k=min(340, size), tangents="dense", averages=(), previous=False, descent=Damped(1e-3),
        rate=rate,
    ).step  # fmt: skip


def backprop(kind: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module, Task, float], Step]:
    def make(model: nn.Module, task: Task, rate: float) -> Step:
        optimizer = kind(model.parameters(), lr=rate)

        def step(closure: Callable[[], Tensor]) -> None:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()

        return step

    return make


def mezo(model: nn.Module, task: Task, rate: float) -> Step:
    """Zeroth order: the loss's difference along one Gaussian direction, redrawn from its seed (MeZO)."""
    params, directions, size = list(model.parameters()), jp.Directions(1), 1e-3

    @torch.no_grad()
    def move(by: float) -> None:
        for i, p in enumerate(params):
            p.add_(directions.combine(i, p, torch.tensor([by])))

    @torch.no_grad()
    def step(closure: Callable[[], Tensor]) -> None:
        move(size)
        above = closure().item()
        move(-2 * size)
        below = closure().item()
        move(size - rate * (above - below) / (2 * size))
        directions.step += 1

    return step


METHODS: dict[str, tuple[Callable[[nn.Module, Task, float], Step], dict[str, float]]] = {
    # name: (maker, rates by task; "" for all others)
    PLANE: (plane_search(), {"": 1.0}),
    "FGD": (forward_only(jp.optim.FGD), {"logreg": 5e-4, "mlp": 2e-4, "cnn": 1e-4, "": 1e-4}),
    "FoMoH": (forward_only(jp.optim.FoMoH, clip=1.0), {"logreg": 0.1362, "cnn": 0.544, "": 0.3}),
    "FoMoH-2D": (forward_only(jp.optim.FoMoHKD, k=2, descent="saddle-free", clip=1.0), {"": 1.0}),
    "FoMoH-3D": (forward_only(jp.optim.FoMoHKD, k=3, descent="saddle-free", clip=1.0), {"": 1.0}),
    "SOFO's method": (sofo, {"": 0.1}),
    "MeZO-style": (mezo, {"logreg": 5e-4, "mlp": 2e-4, "cnn": 1e-4, "": 1e-4}),
    "SGD, backprop": (backprop(torch.optim.SGD), {"logreg": 0.1, "": 0.1}),
    "Adam, backprop": (backprop(torch.optim.Adam), {"": 1e-3}),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "without the layers' noise: 64 drawn directions": {"model": None},
    "without scaled averages": {"scaled": False},
    "without the previous step": {"previous": False},
    "without the longer average": {"averages": (0.9,)},
    "whole steps": {"rate": 1.0},
    "without the guard": {"rate": NoiseAware(guard=False)},
    "with 8 drawn directions": {"k": 8},
    "twice the passes": {"passes": 16.0},
    "exact curvature": {"curvature": "hessian"},
}

# --- runs -------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """How one run went: rows of seconds, epochs, forward passes, loss and measure."""

    method: str
    seed: int
    rate: float
    rows: list[dict[str, float]] = field(default_factory=list)
    status: str = "finished"

    def when(self, reached: Callable[[float], bool]) -> dict[str, float] | None:
        """The first row whose measure is good enough."""
        return next((row for row in self.rows if reached(row["measure"])), None)

    def at(self, seconds: float) -> dict[str, float] | None:
        """The last row that is not later."""
        return next((row for row in reversed(self.rows) if row["seconds"] <= 1.02 * seconds + 0.02), None)


def forward_seconds(task: Task, batch: int, clock: Callable[[], float]) -> float:
    """What a plain forward pass takes, best of several."""
    torch.manual_seed(0)
    model, b = task.model(), next(task.batches(batch, torch.Generator().manual_seed(0)))
    times = []
    with torch.inference_mode():
        for _ in range(12):
            start = clock()
            task.loss(model, b)
            times.append(clock() - start)
    return sorted(times[2:])[len(times[2:]) // 2]


def run(
    task: Task, name: str, make: Callable[[nn.Module, Task, float], Step], rate: float, args: argparse.Namespace,
    seed: int, batch: int, forward: float,
) -> Course:  # fmt: skip
    """Train for the given seconds; scores are taken at times that grow by a third, outside of the clock."""
    torch.manual_seed(seed)
    model = task.model()
    step, clock = make(model, task, rate), args.clock
    loss = task.reverse if name.endswith("backprop") and task.reverse else task.loss
    course, seconds, due, steps = Course(name, seed, rate), 0.0, args.seconds / 64, 0

    def note() -> None:
        model.eval()
        with torch.no_grad():
            loss, measure = task.score(model)
        model.train()
        course.rows.append(
            {"seconds": seconds, "steps": steps, "epochs": steps * batch / task.epoch, "forwards": seconds / forward,
             "loss": loss, "measure": measure}
        )  # fmt: skip

    note()
    for b in task.batches(batch, torch.Generator().manual_seed(seed)):
        start = clock()
        try:
            step(lambda b=b: loss(model, b))
        except (jp.NonFiniteError, jp.SingularPlaneError) as error:
            course.status = f"diverged: {error}"
            break
        seconds += clock() - start
        steps += 1
        if seconds >= due or steps == 1:
            note()
            due = seconds * 4 / 3
        if seconds >= args.seconds:
            break
    if course.rows[-1]["steps"] != steps:
        note()
    return course


# --- reports ----------------------------------------------------------------------------------------------


def shown(value: float, measure: str) -> str:
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"{value:.3g}"


def table(name: str, task: Task, courses: list[Course], seconds: float) -> str:
    """Means over seeds at a few times, and what a step costs in forward passes."""
    times = [seconds / 16, seconds / 4, seconds]
    head = " | ".join(f"{t:.3g} s" for t in times)
    lines = [f"| {name} | rate | {head} | epochs | forwards a step |", "|---|--:|" + "--:|" * (len(times) + 2)]
    for method in dict.fromkeys(c.method for c in courses):
        own = [c for c in courses if c.method == method]
        cells = []
        for t in times:
            rows = [r for c in own if (r := c.at(t)) is not None]
            values = [r["measure"] for r in rows]
            spread = f" ± {shown(max(values) - min(values), task.measure)}" if len(values) > 1 else ""
            cells.append(shown(sum(values) / len(values), task.measure) + spread)
        last = own[0].rows[-1]
        cost = last["forwards"] / max(last["steps"], 1)
        rate = "none" if method.startswith(PLANE) and method != PLANE + ", whole steps" else f"{own[0].rate:g}"
        note = "" if all(c.status == "finished" for c in own) else " (diverged)"
        lines.append(f"| {method}{note} | {rate} | {' | '.join(cells)} | {last['epochs']:.3g} | {cost:.3g} |")
    return "\n".join(lines)


def draw(results: dict[str, tuple[Task, list[Course]]], path: Path, title: str) -> None:
    """The measure over seconds, a panel for each task."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(1 + 4.4 * len(results), 4.2), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=12)
    methods = list(dict.fromkeys(c.method for _, courses in results.values() for c in courses))
    for panel, (name, (task, courses)) in zip(panels[0], results.items(), strict=True):
        for c in courses:
            n = methods.index(c.method)
            error = task.measure == "accuracy"
            panel.plot(
                [r["seconds"] for r in c.rows[1:]],
                [1 - r["measure"] if error else r["measure"] for r in c.rows[1:]],
                color=COLOURS[n % len(COLOURS)], linestyle=STYLES[(n // len(COLOURS) + n) % len(STYLES)],
                linewidth=2.6 if c.method == PLANE else 1.4, label=c.method,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", title=name, xlabel="seconds")
        panel.set_ylabel("test error" if task.measure == "accuracy" else "held-out error")
        panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    named = {
        label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }  # one line a method, however many panels and seeds it is in
    figure.legend([named[m] for m in methods], methods, frameon=False, fontsize=9, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["logreg", "mlp", "cnn"], choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ablations", nargs="*", choices=list(ABLATIONS), help="none named: all of them")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's files, or JETPLANE_MNIST")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each method")
    parser.add_argument("--batch", type=int, help="another batch size than the tasks' own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rate", action="append", default=[], metavar="METHOD=RATE", help="another rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="the clock is processor time over threads")
    parser.add_argument("--out", type=Path, help="the table")
    parser.add_argument("--json", type=Path, help="every row")
    parser.add_argument("--figure", type=Path, help="the picture")
    args = parser.parse_args()
    try:
        args.rates = {method: float(rate) for method, _, rate in (r.rpartition("=") for r in args.rate)}
    except ValueError:
        parser.error("--rate takes METHOD=RATE")
    threads = args.threads
    args.clock = (lambda: time.process_time() / threads) if args.cpu_time else time.perf_counter
    return args


def main() -> None:
    """Train, print and write what was asked for."""
    args = arguments()
    torch.set_num_threads(args.threads)
    title = machine(args.threads) + (", processor time" if args.cpu_time else "")
    chosen = {name: METHODS[name] for name in args.methods}
    if args.ablations is not None:
        names = args.ablations or list(ABLATIONS)
        chosen |= {f"{PLANE}, {name}": (plane_search(**ABLATIONS[name]), {"": 1.0}) for name in names}
    results: dict[str, tuple[Task, list[Course]]] = {}
    for name in args.tasks:
        task = TASKS[name](args.data_dir)
        batch = args.batch or task.batch
        forward = forward_seconds(task, batch, args.clock)
        courses: list[Course] = []
        results[name] = (task, courses)
        for method, (make, rates) in chosen.items():
            rate = args.rates.get(method, rates.get(name, rates[""]))
            for seed in args.seeds:
                courses.append(run(task, method, make, rate, args, seed, batch, forward))
                last = courses[-1].rows[-1]
                print(f"{name}, {method}, seed {seed}: {json.dumps(last)} {courses[-1].status}", file=sys.stderr)
        text = "\n\n".join([title, *(table(n, t, c, args.seconds) for n, (t, c) in results.items())])
        if args.out:
            args.out.write_text(text + "\n")
        if args.json:
            rows = {n: [vars(c) for c in courses] for n, (_, courses) in results.items()}
            args.json.write_text(json.dumps({"machine": title, "results": rows}, indent=1))
        if args.figure:
            draw(results, args.figure, title)
    print("\n\n".join([title, *(table(n, t, c, args.seconds) for n, (t, c) in results.items())]))


if __name__ == "__main__":
    main()
