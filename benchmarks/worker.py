"""A measured process with torch: ``python -m benchmarks.worker SPECIFICATION``, spoken to by `protocol`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from .peers import PEERS
from .problems import make
from .protocol import serve
from .ways import VARIANTS, WAYS, Result


def numbers(result: Result) -> dict[str, Any]:
    """A result as lists of numbers."""
    loss, slope, curvature = result
    return {
        "loss": float(loss),
        "slope": None if slope is None else slope.tolist(),
        "curvature": None if curvature is None else curvature.tolist(),
    }


def main() -> None:
    """Measure what the one argument, a JSON object, asks for."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])

    def build() -> tuple[Callable[[], Result], Callable[[Any], dict[str, Any]]]:
        problem = make(spec["model"], spec["k"], spec["batch"], getattr(torch, spec["dtype"]))
        return (WAYS | VARIANTS | PEERS)[spec["way"]](problem), numbers

    serve(build, spec["cpu_time"])


if __name__ == "__main__":
    main()
