"""The demonstration: two models on handwritten digits, trained by several methods, each run in its own process."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import JetplaneError
from .config import Config
from .methods import METHODS

EPOCHS = 50
# In the order of the figure, by model. Settings are those of `METHODS`: ten directions a step for the paper's methods,
# rates that did best of a few, and PlaneSearch with its defaults.
SHOWN = ("sgd", "fgd", "fomoh", "fomoh-kd", "plane-search")
MODELS = ("logreg", "cnn")


def plan(seed: int = Config.seed) -> list[Config]:
    """The configurations of the demonstration."""
    shared: dict[str, Any] = {"data": "digits", "epochs": EPOCHS, "seed": seed, "schedule": "cosine"}
    return [
        Config.of({**shared, "model": model, "method": name, **METHODS[name].demo[model]})
        for model in MODELS
        for name in SHOWN
    ]


def run_apart(config: Config, folder: Path, observe: Callable[[int, int, float], None]) -> None:
    """Train in a new process, so that the measured peak of memory is that of this run alone.

    Args:
        config: the configuration.
        folder: the run folder.
        observe: called with the steps done, the steps in all and the loss.

    Raises:
        JetplaneError: the run failed; the message is that of its process.
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
