"""What the measuring commands share: processes of their own, and a line about the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .protocol import machine_busy

ROOT = Path(__file__).resolve().parent.parent


def machine(threads: int) -> str:
    """CPU, threads, versions and date in one line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    day = datetime.date.today().isoformat()
    return f"{name}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, {day}"


def environment(threads: int, **extra: str) -> dict[str, str]:
    """The environment of a measured process: this repository importable, OpenMP threads kept in place."""
    if threads == 1:
        extra["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        **extra,
    }


def wait_for_quiet(seconds: float) -> float:
    """Wait until the other processes of the machine rest, at most so long; returns the time waited."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = machine_busy()
        time.sleep(0.25)
        after = machine_busy()
        if before is None or after is None or after - before < 0.05:
            break
    return time.perf_counter() - start


class Process:
    """One measured process; `protocol.serve` is its other end."""

    def __init__(self, module: str, spec: dict[str, Any], python: str | None = None) -> None:
        command = [python or sys.executable, "-m", f"benchmarks.{module}", json.dumps(spec)]
        self.way = spec["way"]
        self.quota = 0
        self.clean: list[float] = []
        self.disturbed: list[float] = []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment(spec["threads"]),
        )

    def ask(self, word: str, timeout: float) -> dict[str, Any]:
        """Say a word and wait for the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(word + "\n")
            stdin.flush()
        except OSError:
            return {"error": "the process died"}
        if not select.select([stdout], [], [], timeout)[0]:
            return {"error": f"no answer within {timeout:.0f} s"}
        line = stdout.readline()
        return json.loads(line) if line else {"error": "the process died"}

    def take_turn(self, timeout: float) -> bool:
        """Time a burst; whether it went undisturbed."""
        answer = self.ask("turn", timeout)
        if "error" in answer:
            self.quota = 0
            return True
        (self.disturbed if answer["disturbed"] else self.clean).append(answer["ms"])
        return not answer["disturbed"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
