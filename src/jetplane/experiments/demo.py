"""The demonstration: two models on handwritten digits, trained by several methods, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import JetplaneError
from .apart import call_apart
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
    call_apart(_run, configs, folders, observe=observe)


def _run(configs: Sequence[Config], folders: Sequence[Path], report: Callable[[int, int, float], None]) -> None:
    import torch

    from .train import Run

    torch.set_num_threads(1)  # on images this small, threads cost more than they give
    for n, (config, folder) in enumerate(zip(configs, folders, strict=True)):

        def observe(done: int, total: int, loss: float, n: int = n) -> None:
            if done % 4 == 0 or done == total:
                report(n * total + done, len(configs) * total, loss)

        try:
            Run(config, folder).train(observe)
        except Exception as error:
            raise JetplaneError(f"{config.label} on {config.model}: {type(error).__name__}: {error}") from error
