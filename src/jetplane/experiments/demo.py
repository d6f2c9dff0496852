"""The demonstration: two models on handwritten digits, trained by several methods, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import JetplaneError
from .config import Config
from .methods import METHODS

EPOCHS = 20
SEEDS = 3
MINUTES = 2  # of two cores with nothing else running
# In the order of the figure, by model. Settings are those of `METHODS`: ten directions a step for the paper's methods,
# rates and clips that did best of a few without a seed that fails, and PlaneSearch with its defaults.
SHOWN = ("sgd", "fgd", "fomoh", "fomoh-kd", "plane-search")
MODELS = ("logreg", "cnn")


def plan(seed: int = Config.seed, seeds: int = SEEDS) -> list[list[Config]]:
    """The configurations of the demonstration: for each model and method those of consecutive seeds."""
    shared: dict[str, Any] = {"data": "digits", "epochs": EPOCHS, "schedule": "cosine"}
    return [
        [
            Config.of({**shared, "seed": s, "model": model, "method": name, **METHODS[name].demo[model]})
            for s in range(seed, seed + seeds)
        ]
        for model in MODELS
        for name in SHOWN
    ]


def run_apart(configs: Sequence[Config], folders: Sequence[Path], observe: Callable[[int, int, float], None]) -> None:
    """Train in a new process, so that the measured peak of memory is that of these runs alone.

    Args:
        configs: the configurations, which are run one after another.
        folders: the run folder of each.
        observe: called with the steps done, the steps in all and the loss; steps are those of all runs.

    Raises:
        JetplaneError: a run failed; the message is that of its process.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    process = context.Process(target=_work, args=(configs, folders, messages), daemon=True)
    process.start()
    try:
        while True:
            try:
                kind, *content = messages.get(timeout=0.5)
            except queue.Empty:
                if process.is_alive():
                    continue
                raise JetplaneError(
                    f"the runs in {folders[0].parent} ended with exit code {process.exitcode}"
                ) from None
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


def _work(configs: Sequence[Config], folders: Sequence[Path], messages: Any) -> None:
    import torch

    from .train import Run

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
    torch.set_num_threads(1)  # on images this small, threads cost more than they give
    config = configs[0]
    try:
        for n, (config, folder) in enumerate(zip(configs, folders, strict=True)):

            def observe(done: int, total: int, loss: float, n: int = n) -> None:
                if done % 4 == 0 or done == total:
                    messages.put(("step", n * total + done, len(configs) * total, loss))

            Run(config, folder).train(observe)
        messages.put(("done",))
    except Exception as error:  # noqa: BLE001 - it crosses a process boundary as a message
        messages.put(("error", f"{config.label} on {config.model}: {type(error).__name__}: {error}"))
