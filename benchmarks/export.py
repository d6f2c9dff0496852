"""Exported programs: what they take beside the eager evaluation, and whether they give its numbers.

    python -m benchmarks.export --json docs/results/export.json
    python -m benchmarks.export --from docs/results/export.json      # its table

A function is exported once, with weights, tangents and data as inputs, and then run with other weights and tangents:
by the eager code, by the `torch.export.ExportedProgram`, and by ONNX Runtime on the same program. Time is processor
time of one thread, a median of turns that alternate, as a ratio to the eager code; error is the largest deviation from
the eager numbers, relative to the largest of each result. Needs ``pip install 'jetplane[export]'``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import jetplane as jp

from .measuring import machine
from .problems import Problem, make

MODELS = ["mlp", "cnn", "gpt"]
K, TURNS = 2, 7
EAGER, PROGRAM, ONNX = "eager", "torch.export", "ONNX Runtime"
Weights = dict[str, Tensor]


def plane(problem: Problem, curvature: str) -> Callable[..., Any]:
    """Loss, slope and curvature from weights, tangents and data."""

    def run(weights: Weights, tangents: Weights, x: Tensor, y: Tensor) -> Any:
        def loss() -> Tensor:
            return F.cross_entropy(torch.func.functional_call(problem.model, weights, (x,)), y)

        found = jp.evaluate(loss, list(weights.values()), list(tangents.values()), curvature=curvature)  # type: ignore[arg-type]
        return (found.value, found.slope) if found.curvature is None else (found.value, found.slope, found.curvature)

    return run


def derivatives(problem: Problem, how: str) -> Callable[..., Any]:
    """Of the model's outputs, by `jetplane.linearize` or `jetplane.jet`."""

    def run(weights: Weights, tangents: Weights, x: Tensor, y: Tensor) -> Any:
        def f(weights: Weights) -> Tensor:
            return torch.func.functional_call(problem.model, weights, (x,))

        if how == "linearize":
            value, push = jp.linearize(f, (weights,))
            return value, push((tangents,))
        return jp.jet(f, (weights,), (tangents,), pairs="diagonal")

    return run


FUNCTIONS: dict[str, Callable[[Problem], Callable[..., Any]]] = {
    "slopes": lambda problem: plane(problem, "none"),
    "Gauss-Newton": lambda problem: plane(problem, "ggn"),
    "exact curvature": lambda problem: plane(problem, "hessian"),
    "linearize": lambda problem: derivatives(problem, "linearize"),
    "jet, diagonal": lambda problem: derivatives(problem, "jet"),
}


def leaves(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def of(name: str, what: str, batch: int | None = None, turns: int = TURNS) -> list[dict[str, Any]]:
    """Time and error of one function of one model."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    problem, other = make(name, K, batch), make(name, K, batch, seed=1)
    weights = {n: p.detach().clone() for n, p in problem.params.items()}
    f = FUNCTIONS[what](problem)
    start = time.process_time()
    program = jp.export(f, (weights, problem.tangents, problem.x, problem.y))
    seconds = time.process_time() - start
    args = {n: p.detach().clone() for n, p in other.params.items()}, other.tangents, other.x, other.y
    flat, module = leaves(args), program.module()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "program.onnx")
        torch.onnx.export(program, f=path, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
    feed = {one.name: t.numpy() for one, t in zip(session.get_inputs(), flat, strict=True)}

    def by_module() -> list[Tensor]:
        with torch.inference_mode():
            return leaves(module(*flat))

    runs: dict[str, Callable[[], list[Tensor]]] = {
        EAGER: lambda: leaves(f(*args)),
        PROGRAM: by_module,
        ONNX: lambda: [torch.from_numpy(r) for r in session.run(None, feed)],
    }
    times: dict[str, list[float]] = {way: [] for way in runs}
    with torch.no_grad():
        found = {way: [t.clone() for t in run()] for way, run in runs.items()}
        for _ in range(turns):
            for way, run in runs.items():
                start = time.process_time()
                run()
                times[way].append(time.process_time() - start)
    middle = {way: statistics.median(ts) for way, ts in times.items()}
    return [
        {
            "model": name, "function": what, "way": way, "k": K, "milliseconds": 1e3 * middle[way],
            "ratio": middle[way] / middle[EAGER], "export_seconds": seconds,
            "error": max(
                ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found[way], found[EAGER], strict=True)
            ),
        }
        for way in runs
    ]  # fmt: skip


def table(found: dict[str, Any]) -> str:
    rows = found["rows"]
    lines = [
        found["machine"], "",
        "| model | function, K = 2 | eager, ms | `torch.export` | error | ONNX Runtime | error |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for model, what in dict.fromkeys((row["model"], row["function"]) for row in rows):
        at = {row["way"]: row for row in rows if (row["model"], row["function"]) == (model, what)}
        cells = [f"{at[way]['ratio']:.2f} | {at[way]['error']:.0e}" for way in (PROGRAM, ONNX)]
        lines.append(f"| {model} | {what} | {at[EAGER]['milliseconds']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--functions", nargs="+", choices=list(FUNCTIONS), default=list(FUNCTIONS))
    add("--turns", type=int, default=TURNS)
    add("--json", type=Path, help="all figures")
    add("--from", type=Path, dest="earlier", help="figures of an earlier run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if args.earlier:
        found = json.loads(args.earlier.read_text())
    else:
        warnings.simplefilter("ignore")  # of the compiler and the exporter
        rows = []
        for name in args.models:
            for what in args.functions:
                rows += of(name, what, turns=args.turns)
                print(rows[-2:], file=sys.stderr)
                found = {"command": "python -m benchmarks.export", "machine": machine(1), "rows": rows}
                if args.json:  # a run that is stopped has what it had
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
