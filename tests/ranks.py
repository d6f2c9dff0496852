"""Processes for tests of training together: each calls a function of its rank over gloo."""

import contextlib
import datetime
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Gang:
    """Processes that stay up, since importing torch costs more than most tests."""

    def __init__(self, size: int, folder: Path, timeout: float = 60.0) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.connections: list[Connection] = [mine for mine, _ in pipes]
        self.processes: list[SpawnProcess] = [
            context.Process(target=_work, args=(rank, size, str(folder / "store"), timeout, other), daemon=True)
            for rank, (_, other) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, other in pipes:
            other.close()

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 90.0) -> list[Any]:
        """What function(rank, *args) gives on each rank; what it raises; None where the process ended."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send((function, args))
        results: list[Any] = [None] * len(self.connections)
        waiting = dict(zip(self.connections, range(len(results)), strict=True))
        while waiting:
            ready = wait(list(waiting), seconds)
            assert ready, f"ranks {sorted(waiting.values())} did not answer within {seconds} s"
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                with contextlib.suppress(EOFError, OSError):
                    results[rank] = connection.recv()  # type: ignore[union-attr]
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = function(rank, *args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)
