"""Time of one plane evaluation by every way at hand, as ratios to the plain forward pass.

    python -m benchmarks.plane --models mlp cnn gpt logreg --ks 1 2 3 10

Every way runs in a process of its own on the same weights, batch and tangents. Ours is compared with
reverse over reverse in float64 before anything is timed, and every way's float32 numbers with the same
reference. Timing goes round: each process in its turn, one at a time, a short burst each, and again. Turns
that other programs disturbed are repeated. A cell of the table is the median over a way's turns divided by
that of the plain forward pass in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .limits import LIMITS, limit
from .measuring import Process, machine, wait_for_quiet
from .peers import JAX_PEERS, PEERS
from .problems import MODELS, make
from .ways import FORWARD, OURS, REFERENCE, VARIANTS, WAYS

EXACT, SINGLE = 1e-9, 1e-3  # largest relative errors, float64 and float32
# Another curvature, or directions of their own. Tests compare them with dense ones.
OTHER_NUMBERS = {"ggn", "batched jvps", "rank-one", "ggn, rank-one", "compiled, rank-one", "drawn", "step"}
GAP = 0.01  # seconds between turns, for the threads of the last process to fall asleep
EXACT_PAIRS = 16  # 64 directions have 2,080 pairs
SLOW_PAIRS = 3  # unrolled ways compile or run each pair apart: larger K is left out unless asked for


@dataclass
class Row:
    """One model and K."""

    model: str
    k: int
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def forward(self) -> float | None:
        """Milliseconds of the plain forward pass."""
        return self.cells.get(FORWARD, {}).get("ms")


def spec(args: argparse.Namespace, way: str, model: str, k: int, dtype: str, **more: Any) -> dict[str, Any]:
    """What a measured process needs to know."""
    base = {"way": way, "model": model, "k": k, "dtype": dtype, "batch": args.batch}
    return base | {"threads": args.threads, "cpu_time": args.cpu_time} | more


def start(args: argparse.Namespace, way: str, model: str, k: int, dtype: str, arrays: str) -> Process:
    """A process that can evaluate this way."""
    if way in JAX_PEERS:
        return Process("jax_peer", spec(args, way, model, k, dtype, arrays=arrays), args.jax_python)
    python = args.jet_python if way == "jet-for-pytorch" else None
    return Process("worker", spec(args, way, model, k, dtype), python)


def once(args: argparse.Namespace, way: str, model: str, k: int) -> dict[str, Any]:
    """One evaluation in float64 in a fresh process."""
    process = start(args, way, model, k, "float64", "")
    try:
        return process.ask("evaluate", args.timeout)
    finally:
        process.stop()


def error(answer: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """Largest error of loss, slope and curvature, each relative to its largest entry."""
    worst = None
    for name in ("loss", "slope", "curvature"):
        if answer.get(name) is None:
            continue
        value = torch.tensor(answer[name], dtype=torch.float64)
        truth = torch.tensor(reference[name], dtype=torch.float64)
        if name == "curvature" and value.dim() == 1:
            truth = truth.diagonal()
        difference = float((value - truth).abs().max() / truth.abs().max())
        if difference != difference:
            return float("inf")
        worst = difference if worst is None else max(worst, difference)
    return worst


def checked(args: argparse.Namespace, model: str, k: int) -> dict[str, Any]:
    """The reference in float64, once our numbers agree with it."""
    reference, own = once(args, REFERENCE, model, k), once(args, OURS, model, k)
    for way, answer in ((REFERENCE, reference), (OURS, own)):
        if "error" in answer:
            raise SystemExit(f"{model}, K = {k}: {way} failed: {answer['error']}")
    curvature = torch.tensor(reference["curvature"], dtype=torch.float64)
    asymmetry = float((curvature - curvature.T).abs().max() / curvature.abs().max())
    difference = error(own, reference)
    if asymmetry > EXACT:
        raise SystemExit(f"{model}, K = {k}: the reference is asymmetric by {asymmetry:.1e}")
    if difference is None or difference > EXACT:
        raise SystemExit(f"{model}, K = {k}: ours differs from the reference by {difference} in float64")
    return reference | {"difference": difference}


def write_arrays(args: argparse.Namespace, model: str, k: int, path: str) -> None:
    """The problem as a file that a Python without torch can read."""
    import numpy as np

    problem = make(model, k, args.batch)
    arrays = {f"param:{n}": p.detach().numpy() for n, p in problem.params.items()}
    arrays |= {f"tangent:{n}": t.numpy() for n, t in problem.tangents.items()}
    np.savez(path, x=problem.x.numpy(), y=problem.y.numpy(), **arrays)  # pyright: ignore[reportArgumentType]


def measure(args: argparse.Namespace, model: str, k: int) -> Row:
    """All ways on one model and K."""
    row = Row(model, k)
    chosen = [way for way in args.ways if k <= args.cap.get(way, k)]
    reference = checked(args, model, k) if OURS in chosen else None
    with tempfile.TemporaryDirectory() as folder:
        arrays = str(Path(folder) / "problem.npz")
        if any(way in JAX_PEERS for way in chosen):
            write_arrays(args, model, k, arrays)
        running: list[Process] = []
        try:
            started = [start(args, way, model, k, "float32", arrays) for way in chosen]
            running.extend(started)
            for process in started:  # they import together, but then no two of them work at a time
                process.ask("ready", args.timeout)
            for way, process in zip(chosen, started, strict=True):
                answer = process.ask("evaluate", args.timeout)
                if "error" in answer:
                    row.cells[way] = {"error": answer["error"]}
                    running.remove(process)
                    process.stop()
                    continue
                difference = None if reference is None or way in OTHER_NUMBERS else error(answer, reference)
                row.cells[way] = {
                    "error_float32": difference,
                    "wrong": difference is not None and difference > SINGLE,
                }
                first = process.ask("turn", args.timeout).get("ms", answer["ms"])
                fewest = 3 if first < 5e3 else 1
                process.quota = max(fewest, min(args.turns, int(args.seconds * 1e3 / max(first, 200))))
            take_turns(args, running)
            for process in running:
                times = process.clean or process.disturbed
                if times:
                    row.cells[process.way] |= {
                        "ms": statistics.median(times),
                        "fastest_ms": min(times),
                        "turns": len(times),
                        "disturbed": not process.clean,
                    }
                else:
                    row.cells[process.way] = {"error": "died while it was timed"}
        finally:
            for process in running:
                process.stop()
    if reference is not None:
        row.cells[OURS]["error_float64"] = reference["difference"]
    return row


def take_turns(args: argparse.Namespace, running: list[Process]) -> None:
    """Every process in its turn until each has its quota; disturbed turns are repeated up to a point."""
    patience = args.patience
    for number in range(max((p.quota for p in running), default=0)):
        for process in running:
            for _ in range(3):
                if number >= process.quota:
                    break
                time.sleep(GAP)
                if process.take_turn(args.timeout) or patience <= 0:
                    break
                patience -= wait_for_quiet(patience)


def cell(row: Row, way: str) -> str:
    """A ratio, or why there is none."""
    value = row.cells.get(way)
    if value is None:
        return "-"
    if "error" in value:
        return "fails"
    ratio = "?" if row.forward is None else f"{value['ms'] / row.forward:.1f}"
    least = f" ({limit(row.model, row.k, *LIMITS[way]):.1f})" if way in LIMITS else ""
    return ratio + least + (" wrong" if value["wrong"] else "") + ("~" if value["disturbed"] else "")


def table(rows: list[Row], ways: list[str], title: str) -> str:
    """The rows as Markdown."""
    shown = [way for way in ways if way != FORWARD]
    lines = [
        title,
        "",
        "| model | K | forward, ms | " + " | ".join(shown) + " |",
        "|---|--:|--:|" + "--:|" * len(shown),
    ]
    for row in rows:
        ms = "?" if row.forward is None else f"{row.forward:.2f}"
        cells = " | ".join(cell(row, way) for way in shown)
        lines.append(f"| {row.model} | {row.k} | {ms} | {cells} |")
    lines += ["", "Ratios to the plain forward pass of the same run; medians over turns."]
    lines += ["In brackets the limit: products of one evaluation over those of a forward pass; see the README."]
    if any(c.get("wrong") for row in rows for c in row.cells.values()):
        lines.append(f"wrong: differs from reverse over reverse in float64 by more than {SINGLE:.0e}.")
    if any(c.get("disturbed") for row in rows for c in row.cells.values()):
        lines.append("~: every turn was disturbed by other programs.")
    for row in rows:
        failures = {way: c["error"] for way, c in row.cells.items() if "error" in c}
        lines += [f"fails: {row.model}, K = {row.k}, {way}: {text}" for way, text in failures.items()]
    own = [row.cells[OURS] for row in rows if OURS in row.cells]
    worst = max((c["error_float64"] for c in own), default=0.0)
    single = max((c.get("error_float32") or 0.0 for c in own), default=0.0)
    lines.append(f"Ours against reverse over reverse: {worst:.0e} in float64, {single:.0e} in float32.")
    return "\n\n".join(["\n".join(lines[: 4 + len(rows)]), "  \n".join(lines[5 + len(rows) :])]) + "\n"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plane", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["mlp", "cnn", "gpt", "logreg"])
    add("--ks", nargs="+", type=int, default=[1, 2, 3])
    add("--ways", nargs="+", help=f"instead of all at hand; among {[*WAYS, *VARIANTS, *PEERS, *JAX_PEERS]}")
    add("--also", nargs="+", choices=list(VARIANTS), default=[], help="further columns of ours")
    add("--threads", type=int, default=2)
    add("--cpu-time", action="store_true", help="processor time on one thread: for a machine that is shared")
    add("--batch", type=int, help="another batch size")
    add("--turns", type=int, default=15, help="bursts for each way")
    add("--seconds", type=float, default=5.0, help="time for each way and cell, about")
    add("--patience", type=float, default=60.0, help="seconds for each cell to wait for a quiet machine")
    add("--timeout", type=float, default=300.0, help="seconds after which a way counts as failed")
    add("--cap", nargs="*", default=[], metavar="WAY=K", help="largest K of a way")
    add("--fomoh-src", default=os.environ.get("FOMOH_SRC"), help="source tree of the paper's code")
    add("--jet-path", default=os.environ.get("JET_PATH"), help="folder that holds jet-for-pytorch's package")
    add("--jet-python", default=os.environ.get("JET_PYTHON"), help="a Python with torch for jet-for-pytorch")
    add("--jax-python", default=os.environ.get("JAX_PYTHON"), help="a Python with jax and numpy")
    add("--out", type=Path, help="write the table here too")
    add("--json", type=Path, help="write all numbers here")
    args = parser.parse_args(argv)
    if args.cpu_time:
        args.threads = 1
    for variable, value in (("FOMOH_SRC", args.fomoh_src), ("JET_PATH", args.jet_path)):
        if value:
            os.environ[variable] = str(Path(value).resolve())
    if not args.ways:
        args.ways = [*WAYS, *args.also]
        args.ways += ["fomoh", "fomoh batched"] if args.fomoh_src else []
        args.ways += ["jet-for-pytorch"] if args.jet_path or args.jet_python else []
        args.ways += list(JAX_PEERS) if args.jax_python else []
    args.ways = list(dict.fromkeys([FORWARD, OURS, *args.ways]))
    unknown = set(args.ways) - {*WAYS, *VARIANTS, *PEERS, *JAX_PEERS}
    if unknown:
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}")
    caps = dict.fromkeys((OURS, REFERENCE, "rank-one"), EXACT_PAIRS)
    caps |= dict.fromkeys(("jax jvp unrolled", "jax jet"), SLOW_PAIRS)
    try:
        args.cap = caps | {way: int(k) for way, _, k in (c.rpartition("=") for c in args.cap)}
    except ValueError:
        parser.error("--cap takes WAY=K")
    return args


def main() -> None:
    """Measure, print and write the table."""
    args = arguments()
    title = machine(args.threads) + (", processor time" if args.cpu_time else "")
    rows: list[Row] = []
    for model in args.models:
        for k in args.ks:
            rows.append(measure(args, model, k))
            print(f"{model}, K = {k}:", {w: cell(rows[-1], w) for w in args.ways}, file=sys.stderr, flush=True)
            text = table(rows, args.ways, title)
            if args.out:
                args.out.write_text(text)
            if args.json:
                cells = [{"model": r.model, "k": r.k, "ways": r.cells} for r in rows]
                command = shlex.join(["python", "-m", "benchmarks.plane", *sys.argv[1:]])
                args.json.write_text(json.dumps({"command": command, "machine": title, "rows": cells}, indent=1))
    print(text)


if __name__ == "__main__":
    main()
