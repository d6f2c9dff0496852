"""The paper's experiments, each by one command: ``jetplane reproduce NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...errors import ArgumentError
from .experiment import Budget, Experiment, carry_out
from .laws import Laws
from .networks import Networks
from .rosenbrock import Rosenbrock

ExperimentName = Literal["rosenbrock", "laws", "logreg", "cnn", "cifar"]

__all__ = ["Budget", "Experiment", "ExperimentName", "carry_out", "experiment"]


def experiment(
    name: ExperimentName, budget: Budget, data_dir: Path | None = None, device: str = "cpu", epochs: int | None = None
) -> Experiment:
    """An experiment by its name.

    Args:
        name: "rosenbrock", "laws" (of the tangents), "logreg", "cnn" or "cifar".
        budget: "smoke" (seconds), "hour" (on 2 cores) or "paper".
        data_dir: where the data set of the last three is; otherwise an environment variable names it.
        device: where the last three train.
        epochs: of the last three, instead of the budget's.

    Raises:
        ArgumentError: epochs < 1, or for an experiment that has none.
    """
    if name in ("rosenbrock", "laws"):
        if epochs is not None:
            raise ArgumentError(f"{name} has iterations of its own and takes no epochs; got {epochs}")
        return Rosenbrock(budget) if name == "rosenbrock" else Laws(budget)
    return Networks(name, budget, data_dir, device, epochs)
