"""Every operator of torch's own list against an oracle: `python -m benchmarks.coverage`.

Torch describes its operators with sample inputs (`op_db`). Each sample is evaluated by jets along two
directions and compared with reverse over reverse in double precision; central differences settle
disagreements. Inputs move on curves, so that every operator meets second coefficients too. In-place
and ``out=`` variants are compared with their functional counterpart. Prints a summary and writes
docs/coverage.md, of which the last part is about other kinds of tensors and code (`benchmarks.kinds`).
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import jetplane as jp
from jetplane.evaluation.plane import PlaneModel
from jetplane.rules import RULES, fallback
from jetplane.testing import central_differences, contract, grad_of_grad

from . import kinds

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
TOLERANCE = 1e-7
SETTLED = 1e-5  # what central differences are trusted to
VARIANTS = ("function", "in place", "into a buffer", "out=")

# Worst first: an operator is what its worst sample is.
STATUS = {
    "WRONG": "slope or curvature deviate from the oracle and from central differences",
    "crash": "an error that is not one of Jetplane's",
    "timeout": "did not end in time",
    "error": "a typed error that names the operator",
    "fallback": "exact; reverse over reverse inside the operator was needed",
    "decomposed": "exact; carried through torch's own decomposition",
    "rule": "exact; by rules of Jetplane's own",
    "no oracle": "torch has no finite second derivative to compare with",
}
EXACT = ("rule", "decomposed", "fallback")


@dataclass
class Row:
    """What was found for one operator: a status for each variant, and why where it is not exact."""

    name: str
    status: dict[str, str] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    detail: dict[str, str] = field(default_factory=dict)
    fallback: list[str] = field(default_factory=list)
    oracle: str = ""  # of the function: reverse over reverse, or differences where torch has no second derivative

    def add(self, variant: str, status: str, detail: str = "") -> None:
        """Enter one sample; the worst one stays."""
        order = list(STATUS)
        before = self.status.get(variant)
        if status != "no oracle":
            self.samples[variant] = self.samples.get(variant, 0) + 1
        if before is None or order.index(status) < order.index(before):
            self.status[variant], self.detail[variant] = status, detail


@dataclass
class Sample:
    """A call of an operator that can be repeated with other numbers in its differentiable inputs."""

    call: Callable[[list[Tensor]], Any]  # takes all inputs that move, gives the differentiable outputs
    moving: list[Tensor]

    def loss(self, bent: list[Tensor], weights: list[Tensor]) -> Tensor:
        torch.manual_seed(0)
        return contract(self.call(bent), weights, torch.Generator().manual_seed(1))


def operators() -> dict[str, Any]:
    """The entries of `op_db` that take double precision, by name."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = [op for op in op_db if torch.float64 in op.dtypes]
    return {op.name + ("." + op.variant_test_name if op.variant_test_name else ""): op for op in found}


def samples(op: Any, limit: int) -> Iterator[tuple[str, Sample, Sample]]:
    """(variant, what jets run, what the oracle runs) for up to ``limit`` sample inputs, spread over all."""
    torch.manual_seed(0)
    random.seed(0)
    listed = list(op.sample_inputs("cpu", torch.float64, requires_grad=op.supports_autograd))
    for n in sorted({round(i * (len(listed) - 1) / max(limit - 1, 1)) for i in range(min(limit, len(listed)))}):
        yield from _variants(op, listed[n])


def _variants(op: Any, sample: Any) -> Iterator[tuple[str, Sample, Sample]]:
    leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    double = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and _moves(x)]
    where = [i for i in double if leaves[i].requires_grad] or double
    constants = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
    origin = [constants[i].clone() for i in where]

    def bound(call: Callable[..., Any]) -> Callable[[list[Tensor]], Any]:
        def run(moving: list[Tensor]) -> Any:
            values = list(constants)
            for i, x in zip(where, moving, strict=True):
                values[i] = x
            return call(*tree_unflatten(values, spec))

        return run

    def function(x: Any, args: Any, kwargs: Any) -> Any:
        return sample.output_process_fn_grad(op.gradcheck_wrapper(op.op, x, *args, **kwargs))

    functional = Sample(bound(function), origin)
    yield "function", functional, functional

    inplace = op.get_inplace()
    if inplace is not None and isinstance(sample.input, Tensor) and not sample.broadcasts_input:

        def overwritten(x: Any, args: Any, kwargs: Any) -> Any:
            x = x.clone()
            inplace(x, *args, **kwargs)
            return x

        def copied(x: Any, args: Any, kwargs: Any) -> Any:
            return op.op(x.clone(), *args, **kwargs)

        yield "in place", Sample(bound(overwritten), origin), Sample(bound(copied), origin)
        if len(where) > 1 and where[0] == 0:  # a plain tensor that jets are written into
            fixed = origin[0]

            def held(run: Callable[[list[Tensor]], Any]) -> Callable[[list[Tensor]], Any]:
                return lambda moving: run([fixed, *moving])

            yield (
                "into a buffer",
                Sample(held(bound(overwritten)), origin[1:]),
                Sample(held(bound(copied)), origin[1:]),
            )
    if op.supports_out:

        def into(x: Any, args: Any, kwargs: Any) -> Any:
            with torch.no_grad():
                plain = op.op(*tree_unflatten(constants, spec)[:1], *sample_args, **sample_kwargs)
            out = tree_map(lambda t: torch.zeros_like(t) if isinstance(t, Tensor) else t, plain)
            op.op(x, *args, **kwargs, out=out)
            return out

        def direct(x: Any, args: Any, kwargs: Any) -> Any:
            return op.op(x, *args, **kwargs)

        _, sample_args, sample_kwargs = tree_unflatten(constants, spec)
        yield "out=", Sample(bound(into), origin), Sample(bound(direct), origin)


def _moves(x: Tensor) -> bool:
    return x.dtype == torch.float64 and x.layout == torch.strided and x.numel() > 0


def check(row: Row, variant: str, jets: Sample, plain: Sample) -> None:
    """Compare one sample and enter the result."""
    params = [x.clone().requires_grad_() for x in jets.moving]
    if not params or all(p.numel() == 0 for p in params):
        return row.add(variant, "no oracle", "no floating input")
    generator = torch.Generator().manual_seed(2)
    tangents = [torch.randn(2, *p.shape, dtype=p.dtype, generator=generator) for p in params]
    weights: list[Tensor] = []

    def closure(sample: Sample) -> Callable[[], Tensor]:
        # The value and slope of the input itself, and a curvature that the operator must carry.
        return lambda: sample.loss([p + 0.3 * (p - o) ** 2 for p, o in zip(params, jets.moving, strict=True)], weights)

    try:
        want, oracle = grad_of_grad(closure(plain), params, tangents), "reverse"
    except Exception:  # torch's own refusals come in every type
        try:
            want, oracle = central_differences(closure(plain), params, tangents), "differences"
            if deviation(central_differences(closure(plain), params, tangents, 1e-4), want) > SETTLED:
                return row.add(variant, "no oracle", "differences do not converge")
        except Exception as error:
            return row.add(variant, "no oracle", _first_line(error))
    if not all(bool(torch.isfinite(t).all()) for t in (want.value, want.slope, _curvature(want))):
        return row.add(variant, "no oracle", "not finite")
    row.oracle = row.oracle if variant != "function" else max(row.oracle, oracle)
    if want.value.dtype != torch.float64:
        return row.add(variant, "no oracle", f"computed in {want.value.dtype}")
    fallback._announced.clear()
    with warnings.catch_warnings(record=True) as caught, Rungs() as rungs:
        warnings.simplefilter("always")
        try:
            got = jp.evaluate(closure(jets), params, tangents)
        except jp.UnusedParametersError:
            got = PlaneModel(want.value, torch.zeros(2).double(), torch.zeros(2, 2).double())
        except jp.JetplaneError as error:
            return row.add(variant, "error", _first_line(error))
        except Exception as error:
            return row.add(variant, "crash", _first_line(error))
    fallen = [str(w.message).partition(" ")[0] for w in caught if issubclass(w.category, jp.FallbackWarning)]
    row.fallback = sorted({*row.fallback, *fallen})
    error = deviation(got, want)
    if oracle == "differences":
        if error > 10 * SETTLED:
            text = f"deviates by {error:.0e} from differences: {_numbers(got)}, wanted {_numbers(want)}"
            return row.add(variant, "WRONG", text)
    elif error > TOLERANCE or not _symmetric(want):
        judge = central_differences(closure(plain), params, tangents)
        if not _symmetric(want) and deviation(got, judge) > SETTLED:
            return row.add(variant, "no oracle", "the oracle is asymmetric, and differences decide for neither")
        if deviation(want, judge) <= SETTLED or deviation(got, judge) > SETTLED:
            text = f"deviates by {error:.0e}: {_numbers(got)}, wanted {_numbers(want)}"
            return row.add(variant, "WRONG", text)
    row.add(variant, "fallback" if fallen else "decomposed" if rungs.decomposed else "rule")


class Rungs:
    """Notes which operators had no rule of their own, while it is entered."""

    def __enter__(self) -> Rungs:
        self.module: Any = sys.modules["jetplane.rules.dispatch"]
        self.carry = self.module.carry
        self.decomposed: set[Any] = set()
        self.module.carry = self._noting
        return self

    def __exit__(self, *_: object) -> None:
        self.module.carry = self.carry

    def _noting(self, func: Any, *rest: Any) -> Any:
        if func not in RULES:
            self.decomposed.add(func)
        return self.carry(func, *rest)


def deviation(got: PlaneModel, want: PlaneModel) -> float:
    """Largest error relative to the largest entry, where entries that are rounding alone do not count."""
    scale = max(1.0, float(want.value.abs()), float(want.slope.abs().max()))
    c = _curvature(want)
    noise = 100 * float((c - c.mT).abs().max()) / TOLERANCE  # a symmetric matrix shows its rounding
    floors = (1e-6 * scale, 1e-6 * scale, max(1e-6 * scale, noise) if _symmetric(want) else 1e-6 * scale)
    worst = 0.0
    for a, b, floor in zip((got.value, got.slope, _curvature(got)), (want.value, want.slope, c), floors, strict=True):
        error = float((a - b).abs().max()) / max(float(b.abs().max()), floor)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _curvature(plane: PlaneModel) -> Tensor:
    assert plane.curvature is not None
    return plane.curvature


def _symmetric(plane: PlaneModel) -> bool:
    c = _curvature(plane)
    return torch.allclose(c, c.mT, rtol=1e-9, atol=1e-11 * max(1.0, float(plane.slope.abs().max())))


def _numbers(plane: PlaneModel) -> str:
    return str([f"{x:.5g}" for x in (*plane.slope.tolist(), *_curvature(plane).flatten().tolist())]).replace("'", "")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:240]


def examine(name: str, op: Any, limit: int, seconds: float) -> Row:
    """All samples and variants of one operator, or as many as time allows."""
    row = Row(name)
    end = time.monotonic() + seconds
    try:
        for variant, jets, plain in samples(op, limit):
            check(row, variant, jets, plain)
            if time.monotonic() > end:
                break
    except Exception as error:
        row.add("function", "no oracle", "no samples: " + _first_line(error))
    return row


# --- many operators: workers that may crash or hang -----------------------------------------------


def work(limit: int, seconds: float) -> None:
    """A worker: names on standard input, rows on standard output."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = operators()
    results = sys.stdout
    sys.stdout = sys.stderr  # samples may print
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps(asdict(examine(name, known[name], limit, seconds))), file=results, flush=True)


def sweep(names: list[str], limit: int, seconds: float, processes: int) -> list[Row]:
    """Rows for all names, in order; a worker that dies or hangs costs one operator."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        todo.put(name)
    rows: dict[str, Row] = {}

    def supervise() -> None:
        worker: subprocess.Popen[str] | None = None
        while True:
            try:
                name = todo.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                command = [sys.executable, "-m", "benchmarks.coverage", "--worker", "--samples", str(limit)]
                worker = subprocess.Popen(
                    [*command, "--seconds", str(seconds)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
            assert worker.stdin is not None and worker.stdout is not None
            timer = threading.Timer(4 * seconds + 60, worker.kill)
            timer.start()
            worker.stdin.write(name + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            hung = not timer.is_alive()
            timer.cancel()
            if line:
                rows[name] = Row(**json.loads(line))
            else:
                worker.wait()
                rows[name] = Row(name)
                rows[name].add("function", *(("timeout", "") if hung else ("crash", "the process died")))
                worker = None
            print(f"\r{len(rows)} of {len(names)}", end="", file=sys.stderr, flush=True)
        if worker is not None and worker.stdin is not None:
            worker.stdin.close()
            worker.wait()

    threads = [threading.Thread(target=supervise) for _ in range(processes)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    print(file=sys.stderr)
    return [rows[name] for name in names]


# --- report ----------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> str:
    """Counts for each variant, over the operators with an oracle; the rest of torch's list in a line of its own."""
    twice = [row for row in rows if row.oracle == "reverse"]
    others = [row for row in rows if row.oracle == "differences"]
    lines = [
        "| variant | operators | exact | of these by fallback | typed error | wrong or crashed |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for variant, chosen in [*((v, twice) for v in VARIANTS), ("function", others)]:
        count = Counter(row.status[variant] for row in chosen if variant in row.status)
        judged = sum(count.values()) - count["no oracle"]
        if not judged:
            continue
        exact = sum(count[s] for s in EXACT)
        bad = count["WRONG"] + count["crash"] + count["timeout"]
        where = variant if chosen is twice else variant + ", without second derivatives in torch"
        cells = [
            where,
            judged,
            f"{exact} ({exact / judged:.1%})",
            f"{count['fallback']} ({count['fallback'] / judged:.1%})",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, count["error"], bad])) + " |")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """The page docs/coverage.md."""
    table = [
        "| operator | " + " | ".join(VARIANTS) + " | samples | remark |",
        "|---|" + "---|" * len(VARIANTS) + "--:|---|",
    ]
    for row in rows:
        remarks = [f"{v}: {d}" if v != "function" else d for v, d in row.detail.items() if d]
        remarks += ["falls back for " + ", ".join(row.fallback)] if row.fallback else []
        remark = "; ".join(dict.fromkeys(remarks)).replace("|", "\\|").replace("<", "&lt;")[:300]
        cells = " | ".join(row.status.get(v, "") for v in VARIANTS)
        table.append(f"| {row.name} | {cells} | {sum(row.samples.values())} | {remark} |")
    meanings = "\n".join(f"- **{status}**: {meaning}." for status, meaning in STATUS.items())
    return (
        "# Operators\n\n"
        f"Generated by `python -m benchmarks.coverage` on {date.today()}, torch {torch.__version__}, CPU. "
        "Operators and samples are torch's own (`op_db`), double precision, K = 2, all pairs, every differentiable "
        f"floating input moving on a curve; relative tolerance {TOLERANCE:.0e}.\n\n"
        f"{summary(rows)}\n\n{meanings}\n\n"
        "An operator is what its worst sample is. *Into a buffer* is the in-place variant on a plain tensor, with jets "
        "as the other arguments.\n\n" + "\n".join(table) + "\n\n" + kinds.section()
    )


def renew_kinds(out: Path) -> None:
    """Put the last part of the page in place of what is there, and print it."""
    part = kinds.section()
    before = out.read_text().partition(part.partition("\n")[0])[0].rstrip()
    out.write_text(f"{before}\n\n{part}")
    print(f"{part}\nwritten: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="operators as op_db names them; all where none is given")
    parser.add_argument("--samples", type=int, default=30, help="of each operator, at most")
    parser.add_argument("--seconds", type=float, default=30, help="for each operator, about")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the page; docs/coverage.md where all operators are swept")
    parser.add_argument("--kinds", action="store_true", help="only the part about kinds of tensors and code")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.samples, args.seconds)
    if args.kinds:
        return renew_kinds(args.out or PAGE)
    known = list(operators())
    names = [n for n in known if not args.names or n in args.names or n.partition(".")[0] in args.names]
    rows = sweep(names, args.samples, args.seconds, args.processes)
    print(summary(rows))
    for row in rows:
        for variant, status in row.status.items():
            if status not in (*EXACT, "no oracle") or args.names:
                print(f"{row.name} ({variant}): {status} {row.detail[variant]}")
    out = args.out or (None if args.names else PAGE)
    if out is not None:
        out.write_text(page(rows))
        print(f"written: {out}")


if __name__ == "__main__":
    main()
