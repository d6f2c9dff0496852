"""Peak memory of one evaluation, each case in a fresh process.

    python -m benchmarks.memory                      # every section
    python -m benchmarks.memory --sections depth --k 3

Measured is the growth of the process's resident memory while one evaluation runs, on top of what it holds
before: the interpreter, the model, the batch and the tangents (in "drawn" rows the tangents are part of
the growth). The process is warmed up by an evaluation on a small batch, so that code and thread pools
are there already. Two settings keep the C library's allocator from hiding anything: every block above
64 KiB is mapped and given back on its own, and free memory is handed back before the measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jetplane as jp

from . import long
from .measuring import ROOT, environment, machine
from .problems import BATCH, BUILD, CLASSES, GPT, INPUTS, Block, make, mlp
from .tasks import Recurrent, along, delayed

SMALL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
DEPTHS = (4, 16, 64)
LENGTHS = (100, 400, 1600)
LINES = 64  # directions of the length section
WIDE = 512  # width of the MLPs of the depth section


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most so far (VmHWM)."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def peak_growth(run: Callable[[], Any]) -> int:
    """Bytes by which the resident memory grows at most while run runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the highest mark so far becomes what is resident now
    result = run()
    highest = resident("VmHWM")
    del result
    return highest - before


# --- what is measured -------------------------------------------------------------------------


def build(case: dict[str, Any]) -> nn.Module:
    """The model of a case, with as many layers as it asks for."""
    if case["model"] == "mlp":
        return mlp([INPUTS] + [WIDE] * (case["layers"] - 1) + [CLASSES])
    if case["model"] == "gpt":
        return GPT(case["layers"])
    return BUILD[case["model"]]()


class Checkpointed(nn.Module):
    """A model that keeps the inputs of its blocks alone and runs each block again in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        if isinstance(model, GPT):
            h = model.token(x) + model.position
            for block in model.blocks:
                assert isinstance(block, Block)
                h = checkpoint(block, h, model.mask, use_reentrant=False)
            return checkpoint(lambda h: model.head(model.norm(h)).flatten(0, 1), h, use_reentrant=False)
        assert isinstance(model, nn.Sequential)
        parts, part = [], []
        for layer in model:  # a segment ends where a convolution or linear layer would begin
            if part and isinstance(layer, (nn.Conv2d, nn.Linear)):
                parts.append(nn.Sequential(*part))
                part = []
            part.append(layer)
        for segment in [*parts, nn.Sequential(*part)]:
            x = checkpoint(segment, x, use_reentrant=False)
        return x


def evaluation(case: dict[str, Any], batch: int) -> Callable[[], Any]:
    """The function that a case measures."""
    way, k = case["way"], case["k"]
    if case["model"] == "lstm":
        return recurrent(way, k, delayed(batch, case["length"], torch.Generator()))
    given = way.startswith("ours") and not way.endswith(("drawn", "rank-one"))
    problem = make(case["model"], k if given else 1, batch, model=build(case))
    params = list(problem.params.values())
    tangents = list(problem.tangents.values())
    if not given:
        problem.tangents.clear()
        tangents.clear()
    if way == "inference":

        def run() -> Any:
            with torch.inference_mode():
                return problem.loss()
    elif way in ("backprop", "backprop, checkpointed"):
        model = Checkpointed(problem.model) if way.endswith("checkpointed") else problem.model

        def run() -> Any:
            loss = F.cross_entropy(model(problem.x), problem.y)
            return torch.autograd.grad(loss, params)
    else:
        directions = tangents
        if not given:
            directions = jp.Directions(k, tangents="rank-one" if way.endswith("rank-one") else "dense")
        curvature = "ggn" if "ggn" in way else "none" if "slope" in way else "hessian"

        def run() -> Any:
            return jp.evaluate(problem.loss, params, directions, curvature=curvature)

    return run


def recurrent(way: str, k: int, batch: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    """An evaluation of the LSTM that follows a sequence."""
    torch.manual_seed(0)
    model = Recurrent(1)
    params = list(model.parameters())

    def run() -> Any:
        if way == "backprop":
            return torch.autograd.grad(along(model, *batch), params)
        if way == "inference":
            with torch.inference_mode():
                return along(model, *batch)
        return jp.evaluate(lambda: along(model, *batch), params, jp.Directions(k, tangents="rank-one"), "ggn")

    return run


def measured(case: dict[str, Any]) -> dict[str, int]:
    """In the measured process: bytes of the parameters and of the peak above all that is held."""
    torch.set_num_threads(case["threads"])
    if case["model"] in LONG:
        return measured_long(case)
    evaluation(case, 2)()
    run = evaluation(case, case["batch"])
    peak = peak_growth(run)
    model = Recurrent(1) if case["model"] == "lstm" else build(case)
    return {"parameters": sum(4 * p.numel() for p in model.parameters()), "peak": peak}


LONG: dict[str, tuple[Callable[[dict[str, Any]], Callable[[], Any]], dict[str, int]]] = {
    "attention": (long.attention, {"length": 8}),
    "reader": (long.reading, {"positions": 4}),
}  # what builds a case, and the small one that runs first


def measured_long(case: dict[str, Any]) -> dict[str, int]:
    """Of a long sequence: bytes of the peak above all that is held, and microseconds of the processor."""
    build, little = LONG[case["model"]]
    build(case | little)()
    run = build(case)
    start = time.process_time()
    peak = peak_growth(run)
    return {"peak": peak, "microseconds": round(1e6 * (time.process_time() - start))}


# --- sections -----------------------------------------------------------------------------------


def in_fresh_process(case: dict[str, Any]) -> dict[str, int]:
    """Measure a case in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(case["threads"], **SMALL),
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, case: dict[str, Any]) -> dict[str, float]:
    """Medians over ``args.runs`` fresh processes, which are noted in ``args.rows`` too."""
    runs = [in_fresh_process(case) for _ in range(args.runs)]
    args.rows.append(case | {"runs": runs})
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f}"


def depth(args: argparse.Namespace) -> str:
    """MLPs that differ in depth alone."""
    lines = [
        f"MLPs of width {WIDE}, batch 512, K = {args.k}: peak above parameters, batch and tangents, MiB",
        "",
        "| layers | parameters | tangents | inference | ours | ours, drawn (with its tangents) | backprop |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for layers in DEPTHS:
        cells = []
        base = {"model": "mlp", "layers": layers, "k": args.k, "batch": 512, "threads": args.threads}
        parameters = 0
        for way in ("inference", "ours", "ours, drawn", "backprop"):
            result = measure(args, base | {"way": way})
            parameters = result["parameters"]
            cells.append(result["peak"])
        figures = [parameters, args.k * parameters, *cells]
        lines.append(f"| {layers} | " + " | ".join(mib(c) for c in figures) + " |")
    return "\n".join(lines)


def against(args: argparse.Namespace) -> str:
    """The paper's CNN and GPT-style stacks against inference and backpropagation."""
    ways = (
        "inference",
        "ours",
        "ours, ggn",
        "ours, rank-one",
        "ours, ggn, rank-one",
        "backprop",
        "backprop, checkpointed",
    )
    lines = [
        f"K = {args.k}: peak above parameters, batch and tangents, MiB (backprop includes its gradients)",
        "",
        "| model | batch | parameters | tangents | " + " | ".join(ways) + " |",
        "|---|--:|--:|--:|" + "--:|" * len(ways),
    ]
    cases = [("cnn", 0, BATCH["cnn"])] + [("gpt", layers, BATCH["gpt"]) for layers in args.layers]
    for model, layers, batch in cases:
        base = {"model": model, "layers": layers, "k": args.k, "batch": batch, "threads": args.threads}
        results = [measure(args, base | {"way": way}) for way in ways]
        parameters = results[0]["parameters"]
        name = f"{model}, {layers} layers" if layers else model
        figures = " | ".join(mib(c) for c in (parameters, args.k * parameters, *(r["peak"] for r in results)))
        lines.append(f"| {name} | {batch} | {figures} |")
    return "\n".join(lines)


def length(args: argparse.Namespace) -> str:
    """An LSTM along sequences that differ in length alone, a segment at a time."""
    ways = ("inference", "ours, ggn, rank-one", "backprop")
    lines = [
        f"LSTM of 64 units, batch 64, K = {LINES}: peak above parameters and batch, MiB",
        "",
        "| length | " + " | ".join(ways) + " |",
        "|--:|" + "--:|" * len(ways),
    ]
    for n in LENGTHS:
        case = {"model": "lstm", "length": n, "k": LINES, "batch": 64, "threads": args.threads}
        lines.append(f"| {n} | " + " | ".join(mib(measure(args, case | {"way": w})["peak"]) for w in ways) + " |")
    return "\n".join(lines)


def attention(args: argparse.Namespace) -> str:
    """Attention alone, by length."""
    lines = [
        f"Attention, {long.HEADS} heads of {long.SIZE}: peak above queries, keys, values and tangents, results and "
        "gradients with it, MiB; in brackets processor time over inference's",
        "",
        "| length | " + " | ".join(long.ATTENTION) + " |",
        "|--:|" + "--:|" * len(long.ATTENTION),
    ]
    for n in args.lengths:
        cells, base = [], 0
        for way in long.ATTENTION:
            if n > long.DENSE and ("exact" in way or ("dense" in way and not way.endswith("checkpointed"))):
                cells.append("")
                continue
            found = measure(args, {"model": "attention", "length": n, "way": way, "threads": args.threads})
            base = base or found["microseconds"]
            cells.append(f"{mib(found['peak'])} ({found['microseconds'] / base:.1f})")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def vocabulary(args: argparse.Namespace) -> str:
    """A GPT with a large vocabulary and a tied read-out."""
    largest = 4 * long.POSITIONS * long.VOCABULARY
    lines = [
        f"GPT of {long.LAYERS} layers of {long.WIDTH}, {long.VOCABULARY} tokens of vocabulary, {long.POSITIONS} "
        f"positions, K = {args.k}: peak above parameters and tangents, MiB; the logits are {mib(largest)}",
        "",
        "| " + " | ".join(long.READING) + " |",
        "|" + "--:|" * len(long.READING),
    ]
    base = {"model": "reader", "positions": long.POSITIONS, "k": args.k, "threads": args.threads}
    lines.append("| " + " | ".join(mib(measure(args, base | {"way": w})["peak"]) for w in long.READING) + " |")
    return "\n".join(lines)


SECTIONS = {
    "depth": depth, "against": against, "length": length, "attention": attention, "vocabulary": vocabulary,
}  # fmt: skip


def main() -> None:
    """Measure, print and write the tables."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=summary)
    add = parser.add_argument
    add("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    add("--k", type=int, default=2)
    add("--layers", nargs="+", type=int, default=[4, 16], help="of the GPT-style stacks")
    add("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192], help="of the attention section")
    add("--threads", type=int, default=2)
    add("--runs", type=int, default=1, help="fresh processes for each figure; medians are shown")
    add("--out", type=Path, help="write the tables here too")
    add("--json", type=Path, help="all figures of all runs")
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(json.loads(args.case))))
        return
    text, args.rows = machine(args.threads) + "\n", []
    for name in args.sections:
        text += "\n" + SECTIONS[name](args) + "\n"
        if args.out:
            args.out.write_text(text)
        if args.json:
            lengths, sections = (" ".join(map(str, words)) for words in (args.lengths, args.sections))
            command = f"python -m benchmarks.memory --sections {sections} --lengths {lengths} --k {args.k}"
            command += f" --threads {args.threads} --runs {args.runs}"
            found = {"command": command, "machine": machine(args.threads), "rows": args.rows}
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
