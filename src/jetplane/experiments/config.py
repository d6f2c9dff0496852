"""The configuration of a training run: every setting, validated and complete, as JSON on disk."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ArgumentError, CheckpointError
from . import store
from .methods import DESCENT, METHODS, DescentName, MethodName

DataName = Literal["digits", "mnist", "cifar10"]
ModelName = Literal["logreg", "mlp", "cnn", "cnn-bn"]
ScheduleName = Literal["constant", "cosine", "step", "drops", "drops-at-once"]
ExperimentName = Literal["rosenbrock", "laws", "logreg", "cnn", "cifar"]
Budget = Literal["smoke", "hour", "paper"]
SWEEP_EPOCHS, SWEEP_TRIALS = 10, 20  # epochs of a trial, and trials, by default
SWEEP_SPREAD = 30.0  # default range of a sweep's rates: the configuration's rate divided and multiplied by this


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run. The defaults here are those of the command line.

    Attributes:
        data: "digits" (scikit-learn's, 8 x 8), "mnist" or "cifar10".
        model: "logreg", "mlp", "cnn" or "cnn-bn" (BatchNorm and dropout).
        method: a name in `jetplane.experiments.methods.METHODS`.
        k: directions drawn in each step; None for the method's default. "plane-search" draws none by default.
        lr: initial learning rate; None for the method's default. For "plane-search" a factor on its step.
        schedule: schedule of the learning rate: "constant", "cosine" (to zero at the end), "step" (times 0.1 after 60
            and 85 % of the epochs), "drops" (times ``drop`` after every ``drop_every`` epochs) or "drops-at-once" (as
            many drops, all of them after the first ``drop_every`` epochs, as in the paper's scripts for all methods
            but FoMoH-KD).
        descent: how FoMoH-KD solves its plane.
        batch_size: examples in a step.
        epochs: passes over the training data.
        seed: seed of initial weights, batches and directions.
        clip: largest Euclidean norm of a step; 0 for no limit, None for the method's default.
        weight_decay: decoupled weight decay.
        device: device to train on.
        drop_every: epochs between drops of the rate.
        drop: factor of a drop.
        examples: size of the subset of the training and of the test data that is used; 0 for all.

    Raises:
        ArgumentError: a value is out of range, or a setting that the method does not have is given.
    """

    data: DataName = "digits"
    model: ModelName = "logreg"
    method: MethodName = "fomoh-kd"
    k: int | None = None
    lr: float | None = None
    schedule: ScheduleName = "constant"
    descent: DescentName = DESCENT
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
        for name, hint in get_type_hints(Config).items():
            value, allowed = getattr(self, name), get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and value not in allowed:
                raise ArgumentError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not allowed and name != "device" and value is not None and not number:
                raise ArgumentError(f"{name} must be a number, got {value!r}")
        for name in ("batch_size", "epochs", "drop_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.examples < 0 or not self.drop > 0:
            raise ArgumentError(f"expected examples >= 0 and drop > 0, got {self.examples} and {self.drop}")
        method = METHODS[self.method]
        if self.k is None:
            object.__setattr__(self, "k", method.k)
        elif not method.takes_k and self.k != method.k:
            raise ArgumentError(f"the method {self.method} draws no directions, so it takes no k; got {self.k}")
        if self.lr is None:
            object.__setattr__(self, "lr", method.rate(self.data, self.model))
        if self.clip is None:
            object.__setattr__(self, "clip", method.clip)
        elif not method.takes_clip and self.clip:
            raise ArgumentError(f"the method {self.method} is torch's own and takes no clip; got {self.clip}")

    @property
    def label(self) -> str:
        """The method as a legend names it."""
        return METHODS[self.method].label(self.k)

    @property
    def forward_passes(self) -> int:
        """The cost of a step in plain forward passes of its batch, and of an epoch in passes over the training data.

        Counted are the products of a layer in the middle of a large network (docs/how_it_works.md): ``1 + 2K`` for
        slopes, ``1 + 3K`` with the curvature along each direction, ``(1 + K)²`` with that of all pairs, 3 for a forward
        and a backward pass. FoMoH-BP runs backprop, then the curvature along the gradient. PlaneSearch carries first
        coefficients along its remembered and its drawn directions, and spends 8 passes on estimates of the gradient.
        Layers that cost less, such as the first, and operators that are not products are not counted.

        >>> [Config(method=m).forward_passes for m in ("sgd", "fgd", "fomoh", "fomoh-bp", "fomoh-kd", "plane-search")]
        [3, 3, 4, 7, 16, 23]
        """
        return METHODS[self.method].passes(self.k or 0)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        store.write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @staticmethod
    def load(path: Path) -> Config:
        """Read the file that `save` wrote.

        Raises:
            CheckpointError: the file is missing or does not hold a configuration.
        """
        try:
            return Config.of(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not the configuration of a run ({error})") from error

    @staticmethod
    def of(values: dict[str, Any]) -> Config:
        """Make a configuration from a dictionary as `dataclasses.asdict` returns it."""
        return Config(**values)
