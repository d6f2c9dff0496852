"""The experiments of the paper, each run by one command: ``jetplane reproduce NAME``."""

from __future__ import annotations

from pathlib import Path

from ...errors import ArgumentError
from ..config import Budget, Config, ExperimentName
from .experiment import Experiment, run_experiment
from .laws import Laws
from .networks import Networks
from .rosenbrock import Rosenbrock

__all__ = ["Experiment", "experiment", "run_experiment"]


def experiment(
    name: ExperimentName,
    budget: Budget,
    data_dir: Path | None = None,
    device: str = Config.device,
    epochs: int | None = None,
) -> Experiment:
    """An experiment by its name.

    Args:
        name: "rosenbrock", "laws" (of the distribution of tangents), "logreg", "cnn" or "cifar".
        budget: "smoke" (seconds), "hour" (on 2 cores) or "paper".
        data_dir: folder of the data set of the last three; by default the one that an environment variable names.
        device: device on which the last three train.
        epochs: epochs of the last three, instead of the budget's.

    Raises:
        ArgumentError: epochs < 1, or epochs given for an experiment without any.
    """
    if name in ("rosenbrock", "laws"):
        if epochs is not None:
            raise ArgumentError(f"{name} counts iterations and takes no --epochs; got {epochs}")
        return Rosenbrock(budget) if name == "rosenbrock" else Laws(budget)
    return Networks(name, budget, data_dir, device, epochs)
