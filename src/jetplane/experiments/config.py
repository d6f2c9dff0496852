"""What a run is: its configuration, complete and written down."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ArgumentError, CheckpointError

DataName = Literal["digits", "mnist"]
ModelName = Literal["logreg", "mlp", "cnn"]
MethodName = Literal["fgd", "fomoh", "fomoh-kd", "fomoh-bp", "plane-search", "sgd"]
ScheduleName = Literal["constant", "cosine", "step"]
DescentName = Literal["newton", "saddle-free", "damped"]
WORDS = {
    "data": DataName, "model": ModelName, "method": MethodName, "schedule": ScheduleName, "descent": DescentName,
}  # fmt: skip

# Rates that do well on digits; those of FoMoH are the paper's for its own two models.
RATES: dict[str, dict[str, float]] = {
    "logreg": {"fgd": 0.02, "fomoh": 0.1362, "fomoh-kd": 0.3, "fomoh-bp": 1.0, "sgd": 0.5},
    "mlp": {"fgd": 0.005, "fomoh": 0.3, "fomoh-kd": 0.3, "fomoh-bp": 0.5, "sgd": 0.2},
    "cnn": {"fgd": 0.01, "fomoh": 0.544, "fomoh-kd": 0.3, "fomoh-bp": 0.5, "sgd": 0.2},
}
# Only the rate of forward gradient descent must shrink with the number of parameters.
MNIST_RATES: dict[str, dict[str, float]] = {"logreg": {"fgd": 5e-4}, "mlp": {"fgd": 5e-4}, "cnn": {"fgd": 1e-4}}
# The curvature along a random direction is often close to zero, and the step that divides by it far too long.
CLIPS = {"fomoh": 1.0, "fomoh-kd": 1.0}
DIRECTIONS = {"fgd": 1, "fomoh": 1, "fomoh-kd": 3, "fomoh-bp": 1, "plane-search": 0, "sgd": 0}
NO_RATE = 1.0  # of plane-search: the whole of the step that it finds


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run.

    Attributes:
        data: "digits" (scikit-learn's, 8 x 8) or "mnist".
        model: "logreg", "mlp" or "cnn".
        method: "fgd", "fomoh", "fomoh-kd", "fomoh-bp", "plane-search" or "sgd".
        k: directions drawn per step; 0 for the methods without any, and where plane-search remembers enough.
        lr: the rate at the start; plane-search needs none, and takes it for a factor on its own.
        schedule: "constant", "cosine" (to zero at the end) or "step" (a tenth after 60 and 85 % of the epochs).
        descent: how FoMoH-KD solves its plane.
        batch_size: examples of one step.
        epochs: passes over the training data.
        seed: of initial weights, batches and directions.
        clip: largest norm of a step; 0 for no limit.
        weight_decay: decoupled.
        device: where to train.
    """

    data: str = "digits"
    model: str = "logreg"
    method: str = "fomoh-kd"
    k: int | None = None
    lr: float | None = None
    schedule: str = "constant"
    descent: str = "saddle-free"
    batch_size: int = 128
    epochs: int = 20
    seed: int = 0
    clip: float | None = None
    weight_decay: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, kind in WORDS.items():
            if getattr(self, name) not in get_args(kind):
                words = ", ".join(get_args(kind))
                raise ArgumentError(f"{name} must be one of {words}; got {getattr(self, name)!r}")
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.k is None:
            object.__setattr__(self, "k", DIRECTIONS[self.method])
        elif self.method in ("sgd", "fomoh-bp") and self.k != DIRECTIONS[self.method]:
            raise ArgumentError(f"the method {self.method} draws no directions, so it takes no k; got {self.k}")
        if self.lr is None:
            rates = RATES[self.model] | (MNIST_RATES[self.model] if self.data == "mnist" else {})
            object.__setattr__(self, "lr", rates.get(self.method, NO_RATE))
        if self.clip is None:
            object.__setattr__(self, "clip", CLIPS.get(self.method, 0.0))
        elif self.method == "sgd" and self.clip:
            raise ArgumentError(f"the method sgd is torch's own and takes no clip; got {self.clip}")

    @property
    def label(self) -> str:
        """The method as a legend names it."""
        if self.method == "fomoh-kd":
            return f"FoMoH-{self.k}D"
        names = {"fgd": "FGD", "fomoh": "FoMoH", "fomoh-bp": "FoMoH-BP", "plane-search": "PlaneSearch"}
        names["sgd"] = "SGD, backprop"
        return names[self.method] + (f", {self.k} directions" if (self.k or 0) > 1 else "")

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> Config:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or is no configuration.
        """
        try:
            return Config.of(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not the configuration of a run ({error})") from error

    @staticmethod
    def of(values: dict[str, Any]) -> Config:
        """From the values that `dataclasses.asdict` gives."""
        return Config(**values)
