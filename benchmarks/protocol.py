"""How a measured process talks to the one that measures: lines of JSON, one answer to each word.

Free of torch and jax, so that processes of either can use it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

TURN_SECONDS, TURN_RUNS = 0.2, 40


def machine_busy() -> float | None:
    """Seconds of processor time that all processes together have used; None where /proc is missing."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq, steal, *_ = (int(v) for v in f.readline().split()[1:])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def turn(run: Callable[[], Any], slow: bool, clock: Callable[[], float]) -> tuple[float, bool]:
    """Median milliseconds of a short burst, and whether other processes disturbed it."""
    if not slow:
        run()  # fills the caches that others' turns have emptied
    before, own, start, times = machine_busy(), time.process_time(), time.perf_counter(), []
    while not times or (time.perf_counter() - start < TURN_SECONDS and len(times) < TURN_RUNS):
        at = clock()
        run()
        times.append(1e3 * (clock() - at))
    if clock is time.process_time:  # others may take the processor, but not the time on this clock
        return statistics.median(times), False
    wall, own, after = time.perf_counter() - start, time.process_time() - own, machine_busy()
    # /proc counts in hundredths of a second, for each core
    foreign = 0.0 if before is None or after is None else after - before - own
    return statistics.median(times), foreign > 0.03 + 0.1 * wall


def serve(build: Callable[[], tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]], cpu_time: bool) -> None:
    """Answer words from standard input until it ends.

    ``build`` returns the function to measure and one that turns its result into JSON. "evaluate" builds it
    and runs it once, "turn" times a burst, "ready" does nothing.
    With ``cpu_time`` the clock is the time that this process spends on processors.
    """
    link = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the lines

    def answer(**message: Any) -> None:
        link.write(json.dumps(message) + "\n")
        link.flush()

    clock = time.process_time if cpu_time else time.perf_counter
    run: Callable[[], Any] = lambda: None  # noqa: E731
    last = 0.0
    for word in sys.stdin:
        if word.strip() == "ready":
            answer()
        elif word.strip() == "evaluate":
            try:
                run, described = build()
                at = clock()
                result = run()
                last = 1e3 * (clock() - at)
                answer(ms=last, **described(result))
            except Exception as error:  # a way that cannot express a model is a result, not a crash
                text = str(error).strip().splitlines()
                answer(error=f"{type(error).__name__}: {text[0] if text else ''}"[:200])
                return
        else:
            last, disturbed = turn(run, last > 1e3, clock)
            answer(ms=last, disturbed=disturbed)
