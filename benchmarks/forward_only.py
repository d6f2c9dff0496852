r"""Training without a backward pass: every method by one protocol, and the page that says who is ahead where.

    python -m benchmarks.forward_only --data-dir FOLDER

trains on MNIST and on the help texts of Python, measures peak memory and how close each method's estimate comes to the
gradient, and writes docs/results/forward_only.json, .md and two figures. All methods have the same initial weights,
batches and seeds, and processor time on one thread as their budget. Runs that the file has are not made again
(``--again``), so a part can be made at a time:

    python -m benchmarks.forward_only --data-dir FOLDER --tasks mlp --methods "plane-search, local heads"
    python -m benchmarks.forward_only --page        # from what the file has
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from jetplane.experiments.environment import describe
from jetplane.experiments.finetune.comparison import RUNGS
from jetplane.gradients import ActivityPerturbation, Batch, Estimator, LocalHeads, ResidualStream
from jetplane.optim import PlaneSearch

from .convergence import LEAST, curves_of, forward_seconds, methods, run, train_loss_of
from .learning_curves import LearningCurve, Results, by_method, draw, load, merged, shown, table
from .local_rivals import ActivationGuided, AlignedFeedback, MonoForward
from .measuring import ROOT, machine
from .rivals import (
    ADAM,
    AGZO,
    BLOCKWISE,
    CHECKPOINTED,
    FAST_ADAM,
    FAST_MONO,
    GRAPE,
    HEADS,
    MONO,
    PLANE,
    STREAM,
    label,
)
from .tasks import TASKS, Task

OUT = ROOT / "docs" / "results" / "forward_only"
THREADS = 1
COSINE_STEPS = 200  # of training, after which estimates are held against the gradient
TUNED = ", tuned"  # behind the name of a method whose rate is the best of `TRIALS`
TRIALS, SPAN = 25, 30.0  # rates, from the stated one over this factor to that times it, evenly spaced on a log scale
OURS = {STREAM, BLOCKWISE, HEADS, PLANE}
BACKPROP = {ADAM, FAST_ADAM, CHECKPOINTED, label("sgd"), f"{ADAM}{TUNED}", f"{CHECKPOINTED}{TUNED}"}
LOCAL = {MONO, FAST_MONO, f"{MONO}{TUNED}"}
BASE = label("fgd")  # where the gap to backprop begins, if it has runs


@dataclass(frozen=True)
class Protocol:
    """What is run on a task.

    Attributes:
        seconds: of processor time, each run.
        methods: by the seeds that they get.
    """

    seconds: float
    methods: dict[str, tuple[int, ...]]


MAIN = (0, 1, 2, 3, 4)
IMAGES = (HEADS, MONO, FAST_MONO, ADAM, FAST_ADAM, CHECKPOINTED, GRAPE, PLANE, label("fgd"), AGZO)
TEXT = (STREAM, BLOCKWISE, HEADS, PLANE, ADAM, FAST_ADAM, CHECKPOINTED, AGZO)
RATED = {MONO, ADAM, CHECKPOINTED, GRAPE, label("fgd"), AGZO}


def with_tuned(names: Sequence[str]) -> list[str]:
    """Methods, each that has a rate followed by itself with a tuned one."""
    return [name for m in names for name in ((m, f"{m}{TUNED}") if m in RATED else (m,))]


PROTOCOL = {
    "mlp": Protocol(60.0, dict.fromkeys(with_tuned(IMAGES), MAIN)),
    "cnn": Protocol(30.0, dict.fromkeys(with_tuned(IMAGES), MAIN)),
    "characters": Protocol(30.0, dict.fromkeys(with_tuned(TEXT), MAIN)),
}

# --- runs ---------------------------------------------------------------------------------------------------


def settings(task: str, seed: int, data_dir: Path | None) -> argparse.Namespace:
    """What `curves_of` takes, by the protocol; memory is measured with the first seed."""
    return argparse.Namespace(
        batch=None, clock=time.process_time, rates={}, sweep=False, sweep_seconds=0.0, seeds=[seed],
        seconds=PROTOCOL[task].seconds, steps=[], memory=seed == MAIN[0], threads=THREADS, data_dir=data_dir,
    )  # fmt: skip


def tuned(stated: float, seconds: float, outcome: Callable[[float, float], float]) -> tuple[float, dict[str, float]]:
    """The best of `TRIALS` rates, and the loss of each.

    All rates get a part of a run's seconds, and the best of them, by `RUNGS`, a larger part.

    Args:
        stated: the rate in the middle.
        seconds: of a run.
        outcome: the loss after training at a rate for so many seconds.
    """
    rates, found = [stated * SPAN ** (2 * i / (TRIALS - 1) - 1) for i in range(TRIALS)], {}
    for share, part in RUNGS:
        last = {rate: outcome(rate, seconds / part) for rate in rates[: math.ceil(TRIALS / share)]}
        rates, found = sorted(last, key=last.__getitem__), found | last
    return rates[0], {f"{rate:.2g}": loss for rate, loss in sorted(found.items())}


def tuned_curves(
    results: Results, task: Task, name: str, method: str, seeds: Sequence[int], data_dir: Path | None
) -> Iterator[LearningCurve]:
    """Runs of a method at the best of `TRIALS` rates, which are tried with the first seed unless the file has it."""
    base, seconds = method.removesuffix(TUNED), PROTOCOL[name].seconds
    how, earlier = methods()[base], [c for c in results.get(name, []) if c.method == method]
    if earlier:
        rate, tried = earlier[0].rate, earlier[0].sweep
    else:
        forward = forward_seconds(task, task.batch, time.process_time)

        def outcome(rate: float, seconds: float) -> float:
            trial = LearningCurve(method, MAIN[0], rate, task.measure, budget=seconds)
            return train_loss_of(
                run(task, trial, how, task.batch, time.process_time, forward, scored=False, least=LEAST)
            )

        rate, tried = tuned(how.rate(name), seconds, outcome)
        print(f"{name}, {method}: rate {rate:.2g} of {tried}", file=sys.stderr)
    memory = next((c.memory for c in results.get(name, []) if c.method == base and c.memory), None)
    for seed in seeds:
        given = settings(name, seed, data_dir)
        given.rates, given.memory = {method: rate}, False
        for c in curves_of(task, name, method, how, given):
            c.sweep, c.sweep_seconds, c.memory = tried, seconds / RUNGS[0][1], memory
            yield c


def missing(results: Results, task: str, method: str, seeds: Sequence[int]) -> list[int]:
    """The seeds of which the file has no whole run."""
    had = {c.seed for c in results.get(task, []) if c.method == method and c.status != "interrupted"}
    return [seed for seed in seeds if seed not in had]


def left(results: Results) -> str:
    """What of the protocol the file has no runs of; empty if it has all."""
    found = []
    for task, protocol in PROTOCOL.items():
        lacking = {m: missing(results, task, m, seeds) for m, seeds in protocol.methods.items()}
        named = [f"{m} (seeds {', '.join(map(str, s))})" for m, s in lacking.items() if s]
        if named:
            found.append(f"{task}: " + "; ".join(named))
    return ". ".join(found)


# --- estimates beside the gradient -----------------------------------------------------------------------------


def cosines(task: Task, method: str) -> dict[str, float]:
    """The cosine of a method's estimate and the gradient for each layer, after some steps of its own training."""
    torch.manual_seed(0)
    model = task.model()
    batches = list(islice(task.batches(task.batch, torch.Generator().manual_seed(0)), COSINE_STEPS + 1))
    estimate = _ESTIMATES[method](task, model, batches[:-1])
    found = estimate(batches[-1])
    for p in model.parameters():
        p.grad = None
    with torch.enable_grad():
        exact = torch.autograd.grad(task.loss(model, batches[-1]), list(model.parameters()))
    out = {}
    for (name, _), g, e in zip(model.named_parameters(), found, exact, strict=True):
        if name.endswith("weight") and e.dim() > 1:
            out[name] = torch.nn.functional.cosine_similarity(g.flatten(), e.flatten(), 0).item()
    return out


Estimates = Callable[[Any], list[Tensor]]  # of a batch


def _ours(estimator: Estimator, **settings: Any) -> Callable[[Task, nn.Module, list[Any]], Estimates]:
    def trained(task: Task, model: nn.Module, batches: list[Any]) -> Estimates:
        opt = PlaneSearch(model.parameters(), model, gradient=estimator, **settings)
        for b in batches:
            opt.step(lambda b=b: task.loss(model, b))
        params = list(model.parameters())

        @torch.no_grad()
        def of(b: Any) -> list[Tensor]:
            every = frozenset(range(len(params)))
            batch = Batch(lambda: task.loss(model, b), params, model, None, None, [], every, seed=1)
            state = opt.state["jetplane"]["gradient"]  # type: ignore[index]
            return list(estimator.measure(batch, state))[: len(params)]

        return of

    return trained


def _mono(task: Task, model: nn.Module, batches: list[Any]) -> Estimates:
    rival = MonoForward(model, 1e-3)
    for b in batches:
        rival.step(*b)

    def of(b: Any) -> list[Tensor]:
        model.zero_grad()
        for loss in rival.losses(*b):
            loss.backward()
        return _grads(model)

    return of


def _grape(task: Task, model: nn.Module, batches: list[Any]) -> Estimates:
    rival = AlignedFeedback(model, 1e-3)
    for b in batches:
        rival.step(*b)

    def of(b: Any) -> list[Tensor]:
        rival.gradients(*b)
        return _grads(model)

    return of


def _agzo(task: Task, model: nn.Module, batches: list[Any]) -> Estimates:
    rival = ActivationGuided(model, 1e-4)
    for b in batches:
        rival.step(lambda b=b: task.loss(model, b))

    def of(b: Any) -> list[Tensor]:
        directions = rival.directions()
        slope = sum(
            (g * v).sum()
            for g, v in zip(torch.autograd.grad(task.loss(model, b), rival.params), directions, strict=True)
        )  # what its difference of losses tends to
        return [slope * v for v in directions]

    return of


def _grads(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


_ESTIMATES: dict[str, Callable[[Task, nn.Module, list[Any]], Estimates]] = {
    STREAM: _ours(ResidualStream()),
    HEADS: _ours(LocalHeads()),
    PLANE: _ours(ActivityPerturbation()),
    MONO: _mono,
    GRAPE: _grape,
    AGZO: _agzo,
}

# --- the page -------------------------------------------------------------------------------------------------


def gap_closed(curves: list[LearningCurve]) -> tuple[str, dict[str, float]]:
    """What part of the way to the better Adam each forward-only method has gone at the end.

    Returns:
        Where the way begins, at `BASE` or, where that has no run, at the untrained model; and the parts by methods.
    """
    ends = {method: fmean(c.rows[-1]["measure"] for c in own) for method, own in by_method(curves).items()}
    best = [ends[m] for m in (ADAM, FAST_ADAM, f"{ADAM}{TUNED}") if m in ends]
    if not best:
        return BASE, {}
    goal = (max if curves[0].measure == "accuracy" else min)(best)
    begin, start = (BASE, ends[BASE]) if BASE in ends else ("the untrained model", curves[0].rows[0]["measure"])
    if goal == start:
        return begin, {}
    return begin, {m: (v - start) / (goal - start) for m, v in ends.items() if m not in BACKPROP | {BASE}}


def ahead(name: str, curves: list[LearningCurve]) -> str:
    """One sentence for each time: the best method with a backward pass, and the best without."""
    longest, measure, lines = max(c.seconds for c in curves), curves[0].measure, []
    for t in (longest / 16, longest / 4, longest):
        at = {}
        for method, own in by_method(curves).items():
            rows = [row for c in own if (row := c.at(t)) is not None]
            if rows and t - rows[0]["seconds"] < 0.3 * t:
                at[method] = fmean(row["measure"] for row in rows)
        pick = max if measure == "accuracy" else min
        found = []
        for word, chosen in (
            ("with a backward pass", [m for m in at if m in BACKPROP]),
            ("local heads with Adam", [m for m in at if m in LOCAL]),
            ("ours", [m for m in at if m in OURS]),
            ("other forward-only methods", [m for m in at if m not in BACKPROP | OURS | LOCAL]),
        ):
            if chosen:
                m = pick(chosen, key=at.__getitem__)
                found.append((at[m], f"{word} {shown(at[m], measure)} ({m})"))
        found.sort(key=lambda item: item[0], reverse=measure == "accuracy")
        lines.append(f"- {name}, after {t:.3g} s: " + "; ".join(text for _, text in found) + ".")
    return "\n".join(lines)


def page(held: dict[str, Any], results: Results) -> str:
    """The page's text."""
    lines = [
        "# Training without a backward pass",
        "",
        f"Made by `python -m benchmarks.forward_only` from [its runs](forward_only.json): {held['machine']}.",
        "",
        "All methods have the same initial weights, batches, order of data and seeds, and the same processor time on "
        "one thread; held-out scores are taken outside of the clock. Nothing of ours is set: `plane-search` is "
        "`PlaneSearch(params, model)`, `plane-search, local heads` the same with `gradient=jp.gradients.LocalHeads()`, "
        "`plane-search, residual stream` with `gradient=jp.gradients.ResidualStream()`, `one block at a time` with "
        "`recompute=True`. Rivals have the rate that their row states; Adam and local heads with Adam also have that "
        f"of our fast weights, 3e-3. *Tuned* is the best of {TRIALS} rates by the training loss of short runs, and has "
        "the memory of the stated one. A spread is the range of as many seeds as the row says. *Forwards a step* is a "
        "step's time over that of a plain forward pass; memory is the peak above weights and data.",
        "",
        "![Held-out error and loss over seconds](forward_only.png)",
        "",
        "Over forward-equivalents (seconds over those of a plain forward pass), and at the end over peak memory:",
        "",
        "![The same over forward-equivalents, and over peak memory](forward_only_costs.png)",
        "",
        "## Who is ahead",
        "",
    ]
    for name, curves in results.items():
        lines += [ahead(name, curves), ""]
    lacking = left(results)
    if lacking:
        lines += [f"Runs of the protocol that are still to be made: {lacking}.", ""]
    for name, curves in results.items():
        lines += [f"## {name}", "", table(name, curves), ""]
        begin, gaps = gap_closed(curves)
        if gaps:
            lines += [
                f"Part of the gap from {begin} to the better Adam that is closed at the end: "
                + "; ".join(f"{m} {100 * v:.1f} %" for m, v in gaps.items())
                + ".",
                "",
            ]
        found = held.get("cosines", {}).get(name, {})
        if found:
            layers = list(next(iter(found.values())))
            lines += [
                f"Cosine of the estimate and the gradient, for each layer's weights, after {COSINE_STEPS} steps of a "
                "method's own training (one batch, one seed):",
                "",
                "| | " + " | ".join(layers) + " |",
                "|---|" + "--:|" * len(layers),
                *(f"| {m} | " + " | ".join(f"{c[layer]:.3f}" for layer in layers) + " |" for m, c in found.items()),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run what is missing, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(PROTOCOL), default=list(PROTOCOL))
    add("--methods", nargs="+", help="[default: those of the protocol]")
    add("--seeds", nargs="+", type=int, help="[default: those of the protocol]")
    add("--data-dir", type=Path, help="folder of MNIST's files, or JETPLANE_MNIST")
    add("--again", action="store_true", help="make runs again that the file has")
    add("--page", action="store_true", help="write the page from what the file has, and run nothing")
    add("--out", type=Path, default=OUT, help="the files' path without its ending")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    file, machines, results, held = args.out.with_suffix(".json"), [], {}, {}
    if file.exists():
        joined, results = load([file])
        machines = list(dict.fromkeys(line for text in joined for line in text.split("; ")))
        held = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("machine", "results")}

    def write() -> None:
        order = {name: list(PROTOCOL[name].methods) for name in PROTOCOL}
        sorted_results = {
            name: sorted(
                results[name], key=lambda c, o=order[name]: (o.index(c.method) if c.method in o else 99, c.seed)
            )
            for name in PROTOCOL
            if results.get(name)
        }
        held["machine"] = "; ".join(machines)
        content = held | {"results": {n: [asdict(c) for c in cs] for n, cs in sorted_results.items()}}
        file.write_text(
            json.dumps(content, indent=None, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n"
        )
        args.out.with_suffix(".md").write_text(page(held, sorted_results))
        drawn = {name: [c for c in curves if not c.method.endswith(TUNED)] for name, curves in sorted_results.items()}
        draw(drawn, args.out.with_suffix(".png"), "processor time of one thread")
        draw(drawn, args.out.with_name(f"{args.out.name}_costs.png"), "forward passes and memory", costs=True)

    if args.page:
        write()
        return
    here = machine(THREADS) + ", processor time"
    machines = list(dict.fromkeys([*machines, here]))
    held["environment"] = describe(torch.device("cpu"))
    held["command"] = "python -m benchmarks.forward_only --data-dir FOLDER"
    for name in args.tasks:
        task = TASKS[name](args.data_dir)
        for method, seeds in PROTOCOL[name].methods.items():
            if args.methods and method not in args.methods:
                continue
            wanted = args.seeds or seeds
            wanted = wanted if args.again else missing(results, name, method, wanted)
            if not wanted:
                continue
            if method.endswith(TUNED):
                made = ([c] for c in tuned_curves(results, task, name, method, wanted, args.data_dir))
            else:
                how = methods()[method]
                made = (curves_of(task, name, method, how, settings(name, s, args.data_dir)) for s in wanted)
            for done in made:
                results = merged(results, {name: done})
                write()
        known = held.setdefault("cosines", {}).setdefault(name, {})
        for method in _ESTIMATES:
            chosen = method in PROTOCOL[name].methods and (not args.methods or method in args.methods)
            if chosen and (args.again or method not in known):
                known[method] = cosines(task, method)
                write()
    write()


if __name__ == "__main__":
    main()
