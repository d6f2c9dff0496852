"""The demonstration: two models on real digits, every method, each run in a process of its own."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import JetplaneError
from .config import Config

EPOCHS = 50
# The paper's methods draw ten directions a step each; rates are the best of a few tried for each, and FoMoH
# takes the paper's step as it is. PlaneSearch is as it comes.
METHODS: dict[str, list[dict[str, Any]]] = {
    "logreg": [
        {"method": "sgd", "lr": 0.5},
        {"method": "fgd", "lr": 0.2, "k": 10},
        {"method": "fomoh", "lr": 1.0, "k": 10, "clip": 0},
        {"method": "fomoh-kd", "lr": 0.6, "k": 10, "clip": 1.0},
        {"method": "plane-search", "schedule": "constant"},
    ],
    "cnn": [
        {"method": "sgd", "lr": 0.2},
        {"method": "fgd", "lr": 0.03, "k": 10},
        {"method": "fomoh", "lr": 0.544, "k": 10, "clip": 0},
        {"method": "fomoh-kd", "lr": 0.5, "k": 10, "clip": 1.0},
        {"method": "plane-search", "schedule": "constant"},
    ],
}


def plan(seed: int = 0) -> list[Config]:
    """The runs of the demonstration."""
    return [
        Config(**{"data": "digits", "model": model, "epochs": EPOCHS, "seed": seed, "schedule": "cosine"} | settings)
        for model, methods in METHODS.items()
        for settings in methods
    ]


def run_apart(config: Config, folder: Path, observe: Callable[[int, int, float], None]) -> None:
    """Train in a fresh process, so that its peak memory is its own.

    Raises:
        JetplaneError: the process failed; its message is passed on.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    process = context.Process(target=_work, args=(config, folder, messages), daemon=True)
    process.start()
    try:
        while True:
            try:
                kind, *content = messages.get(timeout=0.5)
            except queue.Empty:
                if process.is_alive():
                    continue
                raise JetplaneError(f"the run in {folder} ended with exit code {process.exitcode}") from None
            if kind == "step":
                observe(*content)
            elif kind == "error":
                raise JetplaneError(content[0])
            else:
                break
        process.join(timeout=5)
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _work(config: Config, folder: Path, messages: Any) -> None:
    import torch

    from .train import Run

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
    torch.set_num_threads(1)  # on images this small, threads cost more than they give
    try:
        run = Run(config, folder)

        def observe(done: int, total: int, loss: float) -> None:
            if done % 4 == 0 or done == total:
                messages.put(("step", done, total, loss))

        run.train(observe)
        messages.put(("done",))
    except Exception as error:  # noqa: BLE001 - it crosses a process boundary as a message
        messages.put(("error", f"{config.label} on {config.model}: {type(error).__name__}: {error}"))
