"""Compiled code with derivatives: time of the two-dimensional Burgers solver, over the solver itself in the same run.

    python -m benchmarks.native --json docs/results/native.json

A 50 x 50 grid, 50 steps, gcc -O2 and -O3: what the Derivgrind paper (arXiv 2209.01895) measures. Both are called by
their addresses, in turns, on one thread; times are processor times, medians over turns. Slopes are held against
differences. Columns: flags, K, order, ratio, goal, milliseconds, error of the slope, same bits, seconds to lift and
compile, seconds to take the code from disk.
"""

import argparse
import ctypes
import datetime
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from jetplane.jets import AllPairs
from jetplane.native.code import Code
from jetplane.native.coefficients import Layout
from jetplane.native.module import WORDS
from jetplane.native.program import Program
from jetplane.native.registers import INTEGERS

SOURCE = Path(__file__).parent / "native_burgers.c"
N, STEPS = 50, 50
GOALS = {(1, 1): 4, (4, 1): 4, (8, 1): 5, (1, 2): 5, (3, 2): 15, (8, 2): 60}
CASES = [(1, 1), (4, 1), (8, 1), (16, 1), (1, 2), (3, 2), (4, 2), (8, 2)]
Call = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layout_of(k: int, order: int) -> Layout:
    return Layout.of(k, [(t.n, t.i, t.j, t.weight) for t in AllPairs(k).terms()] if order == 2 else [])


def measured(native, code: Code, u: torch.Tensor, v: torch.Tensor, tangents: torch.Tensor, turns: int) -> dict:
    layout, size, arena = code.layout, u.numel(), code.arena
    at = arena.base + 64

    def prepare(_):
        for n, x in enumerate((u, v)):
            ctypes.memmove(at + 8 * size * n, x.data_ptr(), 8 * size)
        table = torch.frombuffer(
            (ctypes.c_double * (2 * size * layout.stride)).from_address(arena.shadow(layout) + 64 * layout.stride),
            dtype=torch.float64,
        ).view(2 * size, layout.stride)
        table.zero_()
        table[:, : layout.k] = tangents.T
        code.words[:4] = [at, at + 8 * size, N, STEPS]
        return at + 16 * size, arena.stack - 8

    code.run(prepare)
    found = torch.frombuffer(code.words, dtype=torch.float64)[WORDS : WORDS + 1 + layout.stride].clone()
    value = native(u.data_ptr(), v.data_ptr(), N, STEPS)
    moved = [[x + s * 1e-6 * t for x, t in zip((u, v), tangents[0].view(2, -1), strict=True)] for s in (1, -1)]
    ends = [native(p.data_ptr(), q.data_ptr(), N, STEPS) for p, q in moved]
    slope = (ends[0] - ends[1]) / 2e-6
    heap, stack = prepare(None)
    times: list[list[float]] = [[], []]
    for _ in range(turns):
        start = time.process_time()
        native(u.data_ptr(), v.data_ptr(), N, STEPS)
        times[0].append(time.process_time() - start)
        code._reset(heap)
        code.words[:4] = [at, at + 8 * size, N, STEPS]
        code.words[INTEGERS.index("rsp")] = stack
        start = time.process_time()
        code._run(ctypes.addressof(code.words))
        times[1].append(time.process_time() - start)
    own, lifted = (statistics.median(t) for t in times)
    return {
        "same_bits": bool(found[0] == value),
        "slope_error": abs(float(found[1]) - slope) / abs(slope),
        "native_ms": 1e3 * own,
        "ms": 1e3 * lifted,
        "ratio": lifted / own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    i, j = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    h = 50 / (N - 1)
    u, v = ((i + j) * h).double().flatten(), ((j - i) * h + 0.37).double().flatten()  # no kink where v is 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for flag in ("-O2", "-O3"):
            file = f"{folder}/burgers{flag}.so"
            subprocess.run(["gcc", flag, "-shared", "-fPIC", "-o", file, SOURCE, "-lm"], check=True)
            library = ctypes.CDLL(file)
            address = ctypes.cast(library.burgers2d, ctypes.c_void_p).value
            assert address
            native = Call(address)
            for k, order in CASES:
                begun = time.process_time()
                code = Code(Program(address), layout_of(k, order), "burgers2d")
                made = time.process_time() - begun
                tangents = torch.randn(k, 2 * u.numel(), dtype=torch.float64, generator=seeded())
                row = {"flags": flag, "k": k, "order": order, "goal": GOALS.get((k, order))}
                row |= measured(native, code, u, v, tangents, args.turns)
                kept = time.process_time()
                again = Code.kept(Program(address), code.layout, "burgers2d")
                row["kept_s"] = time.process_time() - kept if again else None
                report = code.report
                row |= {"made_s": made, "instructions": report.instructions}
                rows.append(row)
                print(
                    f"| {flag} | {k} | {'first' if order == 1 else 'all pairs'} | {row['ratio']:.1f} | "
                    f"{row['goal'] or ''} | {row['ms']:.2f} | {row['slope_error']:.0e} | {row['same_bits']} | "
                    f"{made:.2f} | {row['kept_s'] or math.nan:.3f} |",
                    flush=True,
                )
    if args.json:
        result = {
            "command": "python -m benchmarks.native",
            "machine": f"{platform.machine()}, one thread, processor time",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
