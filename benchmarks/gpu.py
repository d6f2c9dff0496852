"""Everything that wants a card, in one run of ten minutes: ``python -m benchmarks.gpu --out FILE.json``.

| section | what it holds |
|---|---|
| `rules` | first and second coefficients of torch's operator samples against the CPU's in double precision |
| `tangents` | whether drawn tangents are the same bits on the device and on the CPU |
| `waits` | operators of one evaluation that wait for the device: none inside is asked, one at its end |
| `plane` | time of slope, Gauss-Newton and exact curvature over a forward pass |
| `attention` | time and memory of attention's first coefficients over inference's, by length |
| `memory` | peak memory of an evaluation of a deep model, beside inference and backprop |
| `convergence` | the loss of a small classifier after so many seconds, by method |

``--device cpu --smoke`` runs all of it at a reduced size, as CI does. ``--table FILE`` prints the tables of a file. It
fails where bits differ, an evaluation waits more than once or a rule is not exact.
Needs torch alone, and ``expecttest`` for the operator samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

import jetplane as jp

from .measuring import machine
from .memory import peak_growth
from .problems import make, mlp

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # of a norm, relative
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
ALLOWED = 1  # waits of an evaluation: whether its numbers are finite, at its end
SMOKE = ("add", "mul", "exp", "log_softmax", "nn.functional.linear", "nn.functional.layer_norm", "matmul", "sum",
         "nn.functional.scaled_dot_product_attention", "nn.functional.cross_entropy")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a run is asked for.

    Attributes:
        device: on which.
        smoke: whether sizes are reduced.
        seconds: that all sections together may take.
    """

    device: torch.device
    smoke: bool
    seconds: float

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the tables."""
        return torch.float32, torch.bfloat16

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, *runs: Callable[[], Any], repeats: int = 5) -> list[float]:
        """Median seconds of each, taking turns."""
        found: list[list[float]] = [[] for _ in runs]
        for turn in range(repeats + 1):
            for of, run in zip(found, runs, strict=True):
                self.wait()
                start = time.perf_counter()
                run()
                self.wait()
                if turn:
                    of.append(time.perf_counter() - start)
        return [statistics.median(of) for of in found]

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes by which memory grows at most while something runs."""
        if self.device.type != "cuda":
            return peak_growth(run)
        run()
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


# --- rules --------------------------------------------------------------------------------------------


def rules(of: Setting) -> dict[str, Any]:
    """Coefficients of torch's operator samples, on the device in each dtype, against the CPU in double precision."""
    from .coverage import operators

    known = operators()
    names = [name for name in known if not of.smoke or name in SMOKE]
    end = time.monotonic() + 0.45 * of.seconds
    counts = {str(dtype): Counter[str]() for dtype in of.dtypes}
    worst: list[dict[str, Any]] = []
    for name in names:
        if time.monotonic() > end:
            for count in counts.values():
                count["no time"] += 1
            continue
        for dtype in of.dtypes:
            status, detail = _operator(known[name], dtype, of)
            counts[str(dtype)][status] += 1
            if status not in ("exact", "no sample"):
                worst.append({"operator": name, "dtype": str(dtype), "status": status, "detail": detail})
    return {"tolerance": {str(d): t for d, t in TOLERANCE.items()}, "counts": counts, "not exact": worst}


def _operator(op: Any, dtype: torch.dtype, of: Setting) -> tuple[str, str]:
    """The status of an operator's first differentiable sample in one dtype, and why."""
    torch.manual_seed(0)
    try:
        for sample in op.sample_inputs("cpu", torch.float64):
            leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
            where = [
                i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel()
            ]
            if where:
                break
        else:
            return "no sample", ""
        coarse = [x.to(dtype).double() if i in where else x for i, x in enumerate(leaves)]
        generator = torch.Generator().manual_seed(1)
        tangents = [torch.randn(2, *coarse[i].shape, generator=generator).to(dtype).double() for i in where]

        def along(leaves: list[Any], tangents: list[Tensor]) -> list[Tensor]:
            def call(*moving: Tensor) -> list[Tensor]:
                values = list(leaves)
                for i, x in zip(where, moving, strict=True):
                    values[i] = x
                x, args, kwargs = tree_unflatten(values, spec)
                found = tree_flatten(sample.output_process_fn_grad(op.op(x, *args, **kwargs)))[0]
                return [y for y in found if isinstance(y, Tensor) and y.is_floating_point()]

            torch.manual_seed(2)
            result = jp.jet(call, tuple(leaves[i] for i in where), tuple(tangents), pairs="diagonal")
            return [y.detach().cpu().double() for y in tree_flatten(result)[0]]

        want = along(coarse, tangents)
    except Exception:  # torch's own refusals come in every type
        return "no sample", ""
    if not want or not all(bool(torch.isfinite(t).all()) for t in want):
        return "no sample", ""
    cast = [
        x.to(of.device, dtype if i in where else x.dtype) if isinstance(x, Tensor) else x for i, x in enumerate(coarse)
    ]
    try:
        op.op(*_call(cast, spec)[0], **_call(cast, spec)[1])
    except Exception:  # not on this device or in this dtype
        return "no sample", ""
    try:
        got = along(cast, [t.to(of.device, dtype) for t in tangents])
    except jp.JetplaneError as error:
        return "error", f"{type(error).__name__}: {str(error)[:160]}"
    except Exception as error:
        return "crash", f"{type(error).__name__}: {str(error)[:160]}"
    deviation = max(
        float((a - b).norm() / (b.norm() + 0.1 * (len(b.flatten()) ** 0.5))) for a, b in zip(got, want, strict=True)
    )
    return ("exact", "") if deviation < TOLERANCE[dtype] else ("deviates", f"by {deviation:.1e}")


def _call(leaves: list[Any], spec: Any) -> tuple[list[Any], dict[str, Any]]:
    x, args, kwargs = tree_unflatten(leaves, spec)
    return [x, *args], kwargs


# --- tangents and waits -------------------------------------------------------------------------------


def tangents(of: Setting) -> list[dict[str, Any]]:
    """Whether tangents are the same bits on both devices."""
    rows = []
    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "rank-one": {},
        "low-rank": {"rank": 2},
        "sparse": {"density": 0.1},
    }
    for kind, options in kinds.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            p = torch.zeros(130, 70, dtype=dtype)
            on_cpu, on_device = (jp.Directions(5, tangents=kind, **options).draw(0, x) for x in (p, p.to(of.device)))
            rows.append({"tangents": kind, "dtype": str(dtype), "same bits": torch.equal(on_cpu, on_device.cpu())})
    return rows


def waits(of: Setting) -> list[dict[str, Any]]:
    """How many operators of one evaluation wait for the device."""
    from torch.profiler import ProfilerActivity, profile

    rows = []
    for name in ("mlp", "cnn", "gpt"):
        for curvature in ("none", "hessian") if of.smoke else ("none", "ggn", "hessian"):
            problem = make(name, 2, 4)
            problem.model.to(of.device)
            x, y = problem.x.to(of.device), problem.y.to(of.device)
            params = list(problem.model.parameters())

            def run(
                model: nn.Module = problem.model,
                x: Tensor = x,
                y: Tensor = y,
                params: Any = params,
                how: Any = curvature,
            ) -> Any:
                return jp.evaluate(lambda: F.cross_entropy(model(x), y), params, jp.Directions(2), how)

            run()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run()
            found = {e.key: e.count for e in seen.key_averages() if e.key in WAITS}
            rows.append({"model": name, "curvature": curvature, "waits": sum(found.values()), "allowed": ALLOWED})
    return rows


# --- tables -------------------------------------------------------------------------------------------


def plane(of: Setting) -> list[dict[str, Any]]:
    """Time of an evaluation over a plain forward pass."""
    rows = []
    for name in ("mlp", "cnn", "gpt"):
        for dtype in of.dtypes:
            for k in (1,) if of.smoke else (1, 3, 10):
                problem = make(name, k, 8 if of.smoke else None, dtype)
                model = problem.model.to(of.device)
                x, y = problem.x.to(of.device), problem.y.to(of.device)
                params = list(model.parameters())
                given = [problem.tangents[n].to(of.device) for n, _ in model.named_parameters()]

                def loss(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                    return F.cross_entropy(model(x), y)

                def forward(loss: Any = loss) -> None:
                    with torch.inference_mode():
                        loss()

                def evaluated(
                    how: Any, loss: Any = loss, params: Any = params, given: Any = given
                ) -> Callable[[], Any]:
                    return lambda: jp.evaluate(loss, params, given, how)

                ways = {"slope": "none", "ggn": "ggn", "exact": "hessian"}
                if k > 3:
                    ways.pop("exact")
                base, *times = of.timed(forward, *map(evaluated, ways.values()), repeats=2 if of.smoke else 5)
                row: dict[str, Any] = {"model": name, "dtype": str(dtype), "k": k, "forward_ms": 1000 * base}
                rows.append(row | {way: t / base for way, t in zip(ways, times, strict=True)})
    return rows


def attention(of: Setting) -> list[dict[str, Any]]:
    """Time and memory of attention's first coefficients, 8 heads of 64."""
    rows = []
    for dtype in of.dtypes:
        for length in (128,) if of.smoke else (512, 1024, 2048, 4096, 8192, 16384):
            for k in (1,) if of.smoke else (1, 3):
                shape = 1, 8, length, 64
                xs = tuple(torch.randn(shape, device=of.device, dtype=dtype) for _ in range(3))
                vs = tuple(torch.randn(k, *shape, device=of.device, dtype=dtype) for _ in range(3))

                def inference(xs: Any = xs) -> Tensor:
                    return F.scaled_dot_product_attention(*xs)

                def first(xs: Any = xs, vs: Any = vs) -> Any:
                    return jp.jet(F.scaled_dot_product_attention, xs, vs, order=1)

                with torch.no_grad():
                    base, ours = of.timed(inference, first, repeats=3)
                    memory = of.peak(inference), of.peak(first)
                row = {"dtype": str(dtype), "length": length, "k": k, "inference_ms": 1000 * base, "time": ours / base}
                rows.append(row | {"inference_bytes": memory[0], "bytes": memory[1]})
    return rows


def memory(of: Setting) -> list[dict[str, Any]]:
    """Peak memory of MLPs that differ in depth, K = 2, above parameters, batch and tangents."""
    rows = []
    width, batch = (64, 32) if of.smoke else (1024, 8192)
    for dtype in of.dtypes:
        for layers in (4,) if of.smoke else (4, 16, 64):
            model = mlp([width] * (layers + 1)).to(of.device, dtype)
            x, y = torch.randn(batch, width, device=of.device, dtype=dtype), torch.zeros(batch, device=of.device).long()
            params = list(model.parameters())
            given = [torch.randn(2, *p.shape, device=of.device, dtype=dtype) for p in params]

            def loss(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(model(x), y)

            def inference(loss: Any = loss) -> None:
                with torch.inference_mode():
                    loss()

            def evaluated(loss: Any = loss, params: Any = params, given: Any = given) -> Any:
                return jp.evaluate(loss, params, given, "ggn")

            def backprop(loss: Any = loss, params: Any = params) -> Any:
                return torch.autograd.grad(loss(), params)

            found = {way.__name__: of.peak(way) for way in (inference, evaluated, backprop)}
            rows.append({"dtype": str(dtype), "layers": layers} | found)
    return rows


def convergence(of: Setting) -> list[dict[str, Any]]:
    """Losses of a classifier of a random teacher's labels, after equal times."""
    rows = []
    seconds = 0.5 if of.smoke else 10.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator)
    y = (x @ torch.randn(64, 10, generator=generator)).argmax(1)
    for dtype in of.dtypes:
        inputs, labels = x.to(of.device, dtype), y.to(of.device)
        for method in ("FGD", "FoMoHKD", "PlaneSearch", "Adam"):
            torch.manual_seed(0)
            model = mlp([64, 128, 10]).to(of.device, dtype)
            rows.append({"dtype": str(dtype), "method": method} | _trained(method, model, inputs, labels, seconds, of))
    return rows


def _trained(method: str, model: nn.Module, x: Tensor, y: Tensor, seconds: float, of: Setting) -> dict[str, Any]:
    params = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(x).float(), y)

    optimizer: Any
    if method == "FGD":
        optimizer = jp.optim.FGD(params, lr=0.01, k=10)
    elif method == "FoMoHKD":
        optimizer = jp.optim.FoMoHKD(params, lr=0.3, k=10, descent="saddle-free")
    elif method == "PlaneSearch":
        optimizer = jp.optim.PlaneSearch(params, model)
    else:
        optimizer = torch.optim.Adam(params)
    with torch.no_grad():
        first = float(loss())
    steps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        if method == "Adam":
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        else:
            optimizer.step(loss)
        of.wait()
        steps += 1
    with torch.no_grad():
        return {"seconds": seconds, "steps": steps, "first": first, "last": float(loss())}


SECTIONS: dict[str, Callable[[Setting], Any]] = {
    "tangents": tangents, "waits": waits, "plane": plane, "attention": attention, "memory": memory,
    "convergence": convergence, "rules": rules,
}  # fmt: skip


# --- output -------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"{results['device']}; {results['machine']}"]
    for name in SECTIONS:
        rows = results.get(name)
        if rows is None:
            continue
        lines += ["", f"## {name}", ""]
        if name == "rules":
            lines += [f"{dtype}: " + ", ".join(f"{n} {s}" for s, n in c.items()) for dtype, c in rows["counts"].items()]
            rows = rows["not exact"]
        columns = list(rows[0]) if rows else []
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"] if columns else []
        lines += ["| " + " | ".join(_shown(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def failures(results: dict[str, Any]) -> list[str]:
    """What is not as it was asked for."""
    found = [f"tangents differ: {row}" for row in results.get("tangents", ()) if not row["same bits"]]
    found += [f"waits inside: {row}" for row in results.get("waits", ()) if row["waits"] > row["allowed"]]
    return found + [f"rule: {row}" for row in results.get("rules", {}).get("not exact", ())]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda")
    add("--smoke", action="store_true", help="everything at a reduced size")
    add("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    add("--seconds", type=float, default=540.0, help="for all of it; rules get what is left of a share")
    add("--out", type=Path, help="write the results here, as JSON, after each section")
    add("--table", type=Path, help="print the tables of this file and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(args.table.read_text())))
        return
    of = Setting(torch.device(args.device), args.smoke, args.seconds)
    if of.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no card is visible to torch; --device cpu --smoke runs everything at a reduced size")
    device = torch.cuda.get_device_name() if of.device.type == "cuda" else str(of.device)
    results: dict[str, Any] = {"device": device, "machine": machine(torch.get_num_threads())}
    warnings.simplefilter("ignore")
    start = time.monotonic()
    for name in args.sections:
        began = time.monotonic()
        results[name] = SECTIONS[name](Setting(of.device, of.smoke, of.seconds - (began - start)))
        results.setdefault("seconds", {})[name] = time.monotonic() - began
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))
    if failed := failures(results):
        raise SystemExit("\n".join(["", "not as asked for:", *failed]))


if __name__ == "__main__":
    main()
