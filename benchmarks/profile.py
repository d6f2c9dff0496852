"""Where the time of one evaluation goes.

    python -m benchmarks.profile --model cnn --k 3

Two tables from torch's profiler: the kernels that ran, by the time spent in each itself, and the operators
of the model, by the time between their call and return (kernels and rule together). The profiler makes
many small operators look slower than they are; the first line has the times without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .limits import LIMITS, limit
from .measuring import machine
from .problems import MODELS, make
from .ways import VARIANTS, WAYS, forward

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mkldnn_convolution",
    "_slow_conv2d_forward",
    "convolution_overrideable",
)


def milliseconds(run: Callable[[], Any], seconds: float) -> float:
    """Median time of a run."""
    run()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        at = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - at))
    return statistics.median(times)


def recorded(run: Callable[[], Any], runs: int) -> list[Any]:
    """The profiler's events of some runs."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(runs):
            run()
    return [e for e in prof.events() or [] if "::" in e.name]


def inside(event: Any) -> bool:
    """Whether an operator ran inside another one."""
    parent = event.cpu_parent
    while parent is not None:
        if "::" in parent.name:
            return True
        parent = parent.cpu_parent
    return False


def rows(events: Iterable[tuple[str, float]], runs: int, most: int) -> list[tuple[str, float, float]]:
    """Name, milliseconds and count of one run, largest first."""
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for name, microseconds in events:
        total[name] += microseconds / 1e3 / runs
        count[name] += 1
    ordered = sorted(total, key=lambda n: -total[n])
    out = [(n, total[n], count[n] / runs) for n in ordered[:most]]
    rest = ordered[most:]
    if rest:
        out.append((f"{len(rest)} others", sum(total[n] for n in rest), sum(count[n] for n in rest) / runs))
    return out


def table(head: str, lines: list[tuple[str, float, float]], whole: float) -> str:
    """A table in Markdown."""
    text = [f"| {head} | ms | calls | share |", "|---|--:|--:|--:|"]
    text += [f"| {name} | {ms:.2f} | {count:.0f} | {ms / whole:.0%} |" for name, ms, count in lines]
    return "\n".join(text)


def report(args: argparse.Namespace) -> str:
    """The profile of one model, K and way."""
    problem = make(args.model, args.k, args.batch)
    run = (WAYS | VARIANTS)[args.way](problem)
    plain = milliseconds(forward(problem), args.seconds)
    ours = milliseconds(run, args.seconds)
    events = recorded(run, args.runs)
    kernels = [(e.name.removeprefix("aten::"), e.self_cpu_time_total) for e in events]
    operators = [(e.name.removeprefix("aten::"), e.cpu_time_total) for e in events if not inside(e)]
    whole = sum(t for _, t in operators) / 1e3 / args.runs
    products = sum(t for name, t in kernels if name in PRODUCTS) / 1e3 / args.runs
    ratio = f"{ours:.2f} ms, {ours / plain:.2f} times the plain forward pass ({plain:.2f} ms)"
    limits = f"limit {limit(args.model, args.k, *LIMITS[args.way]):.2f}" if args.way in LIMITS else ""
    return "\n\n".join([
        f"{args.model}, K = {args.k}, {args.way}: {ratio}; {limits}",
        f"under the profiler: {whole:.2f} ms in operators, {products:.2f} ms of it in products",
        table("kernel, itself", rows(kernels, args.runs, args.most), whole),
        table("operator of the model", rows(operators, args.runs, args.most), whole),
    ])  # fmt: skip


def main() -> None:
    """Profile and print."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=summary)
    add = parser.add_argument
    add("--model", choices=MODELS, default="cnn")
    add("--k", type=int, default=3)
    add("--way", choices=[*WAYS, *VARIANTS], default="ours")
    add("--batch", type=int)
    add("--threads", type=int, default=2)
    add("--runs", type=int, default=5)
    add("--most", type=int, default=12, help="lines of each table")
    add("--seconds", type=float, default=1.0, help="for each of the two times of the first line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.threads), report(args), sep="\n\n")


if __name__ == "__main__":
    main()
