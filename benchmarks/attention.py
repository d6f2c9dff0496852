"""Time of attention with derivatives over that of torch's own kernel, in turns within one process.

    python -m benchmarks.attention --lengths 2048 4096 --json docs/results/attention.json

8 heads of 64, float32, one thread, processor time, medians of rounds after one that warms up. Memory, in new processes:
`python -m benchmarks.memory --sections attention`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import jetplane as jp

from .measuring import machine

HEADS, WIDTH = 8, 64


def ways(length: int, causal: bool) -> dict[str, Callable[[], object]]:
    """Inference, and jets of it."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, HEADS, length, WIDTH) for _ in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def jets(k: int, order: int) -> Callable[[], object]:
        tangents = tuple(torch.randn(k, 1, HEADS, length, WIDTH) for _ in range(3))
        return lambda: jp.jet(attention, inputs, tangents, order=order)

    return {
        "inference": lambda: attention(*inputs),
        "K = 1": jets(1, 1),
        "K = 3": jets(3, 1),
        "K = 3, exact": jets(3, 2),
    }


def measured(length: int, causal: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    runs = ways(length, causal)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if n:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(ms) for name, ms in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| tokens | inference, ms | K = 1 | K = 3 | K = 3, exact |\n|---|--:|--:|--:|--:|")
    with torch.no_grad():
        for length in args.lengths:
            for causal in (False, True):
                ms = measured(length, causal, args.rounds)
                one = ms["inference"]
                ratios = " | ".join(f"{ms[name] / one:.1f}" for name in list(ms)[1:])
                print(f"| {length:,}{', causal' if causal else ''} | {one:.0f} | {ratios} |", flush=True)
                rows.append({"length": length, "causal": causal, "milliseconds": ms})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(1), "rounds": args.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
