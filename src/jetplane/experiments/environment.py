"""The environment of a run (versions, machine, threads, date), recorded in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import store

NAME = "environment.json"


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, machine and date as a dictionary that JSON can represent.

    Keys: ``date`` (UTC), ``jetplane``, ``torch`` and ``python`` (versions), ``system``, ``cpu``, ``cores`` (those that
    this process may use), ``threads`` (of torch) and ``device``.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "jetplane": _version("jetplane"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def record(folder: Path, device: torch.device, epoch: int) -> None:
    """Record the environment in which a run starts, or is resumed after ``epoch`` epochs.

    ``environment.json`` describes the first start; its list ``resumed`` holds the later ones, each with its epoch.
    """
    here = describe(device)
    known = read(folder)
    if known is None:
        content = here | {"resumed": []}
    else:
        content = known | {"resumed": [*known.get("resumed", []), here | {"epoch": epoch}]}
    store.write_atomically(folder / NAME, (json.dumps(content, indent=2) + "\n").encode())


def read(folder: Path) -> dict[str, Any] | None:
    """The content of the file that `record` wrote; None if it is missing or damaged."""
    try:
        content = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """Name of the processor, or its architecture where the system does not give a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
