"""What a run is: its configuration, complete and written down."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ArgumentError, CheckpointError
from . import store

DataName = Literal["digits", "mnist", "cifar10"]
ModelName = Literal["logreg", "mlp", "cnn", "cnn-bn"]
MethodName = Literal["fgd", "fomoh", "fomoh-kd", "fomoh-bp", "plane-search", "sgd"]
ScheduleName = Literal["constant", "cosine", "step", "drops", "drops-at-once"]
DescentName = Literal["newton", "saddle-free", "damped"]
WORDS = {
    "data": DataName, "model": ModelName, "method": MethodName, "schedule": ScheduleName, "descent": DescentName,
}  # fmt: skip

# Rates that do well on digits; those of FoMoH are the paper's for its own two models.
RATES: dict[str, dict[str, float]] = {
    "logreg": {"fgd": 0.02, "fomoh": 0.1362, "fomoh-kd": 0.3, "fomoh-bp": 1.0, "sgd": 0.5},
    "mlp": {"fgd": 0.005, "fomoh": 0.3, "fomoh-kd": 0.3, "fomoh-bp": 0.5, "sgd": 0.2},
    "cnn": {"fgd": 0.01, "fomoh": 0.544, "fomoh-kd": 0.3, "fomoh-bp": 0.5, "sgd": 0.2},
    "cnn-bn": {"fgd": 2e-5, "fomoh": 0.544, "fomoh-kd": 0.3, "fomoh-bp": 0.5, "sgd": 0.2},
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
        data: "digits" (scikit-learn's, 8 x 8), "mnist" or "cifar10".
        model: "logreg", "mlp", "cnn" or "cnn-bn" (BatchNorm and dropout).
        method: "fgd", "fomoh", "fomoh-kd", "fomoh-bp", "plane-search" or "sgd".
        k: directions drawn per step; 0 for the methods without any, and for plane-search's own choice.
        lr: the rate at the start; plane-search needs none, and takes it for a factor on its own.
        schedule: "constant", "cosine" (to zero at the end), "step" (a tenth after 60 and 85 % of the epochs), "drops"
            (times ``drop`` after each ``drop_every`` epochs) or "drops-at-once" (as many drops, all of them after the
            first ``drop_every`` epochs: what the paper's scripts do, except for FoMoH-KD).
        descent: how FoMoH-KD solves its plane.
        batch_size: examples of one step.
        epochs: passes over the training data.
        seed: of initial weights, batches and directions.
        clip: largest norm of a step; 0 for no limit.
        weight_decay: decoupled.
        device: where to train.
        drop_every: epochs between drops of the rate.
        drop: factor of a drop.
        examples: use the first so many of the training and of the test data; 0 for all.
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
    drop_every: int = 1000
    drop: float = 0.1
    examples: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in (*WORDS, "device") and value is not None and not number:
                raise ArgumentError(f"{name} must be a number, got {value!r}")
        for name, kind in WORDS.items():
            if getattr(self, name) not in get_args(kind):
                words = ", ".join(get_args(kind))
                raise ArgumentError(f"{name} must be one of {words}; got {getattr(self, name)!r}")
        for name in ("batch_size", "epochs", "drop_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.examples < 0 or not self.drop > 0:
            raise ArgumentError(f"expected examples >= 0 and drop > 0, got {self.examples} and {self.drop}")
        if self.k is None:
            object.__setattr__(self, "k", DIRECTIONS[self.method])
        elif self.method in ("sgd", "fomoh-bp") and self.k != DIRECTIONS[self.method]:
            raise ArgumentError(f"the method {self.method} draws no directions, so it takes no k; got {self.k}")
        if self.lr is None:
            rates = RATES[self.model] | (MNIST_RATES.get(self.model, {}) if self.data != "digits" else {})
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

    @property
    def forward_passes(self) -> int:
        """What a step costs in plain forward passes of its batch, and an epoch in passes over the training data.

        The products of a layer in the middle of a large network (docs/how_it_works.md): ``1 + 2K`` for slopes,
        ``1 + 3K`` with the curvature along each direction, ``(1 + K)²`` with that of all pairs, 3 for forward
        and backward. FoMoH-BP runs backprop, then the curvature along its gradient. Layers that cost less, such
        as the first, and what is not a product are not counted: it compares methods, the seconds are measured.

        >>> [Config(method=m).forward_passes for m in ("sgd", "fgd", "fomoh", "fomoh-bp", "fomoh-kd")]
        [3, 3, 4, 7, 16]
        """
        k, backprop = self.k or 0, 3
        remembered, estimates = 7, 8  # what PlaneSearch remembers, and what it spends on estimates of the gradient
        return {
            "sgd": backprop, "fgd": 1 + 2 * k, "fomoh": 1 + 3 * k, "fomoh-bp": backprop + 1 + 3,
            "fomoh-kd": (1 + k) ** 2, "plane-search": 1 + 2 * (k + remembered) + estimates,
        }[self.method]  # fmt: skip

    def save(self, path: Path) -> None:
        """Write as JSON."""
        store.write_whole(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

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
