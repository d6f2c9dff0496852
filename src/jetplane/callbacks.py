"""`jetplane.CurvatureMonitor` as a callback of other libraries' training loops.

`LightningMonitor` and `TrainerMonitor` are made where they are first asked for, and need `lightning` or `transformers`
(``pip install 'jetplane[frameworks]'``) then.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import MissingPackageError
from .monitor import CurvatureMonitor, CurvatureReading

if TYPE_CHECKING:
    LightningMonitor: Any
    TrainerMonitor: Any


def _imported(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{what} needs {name}: pip install 'jetplane[frameworks]'") from error


@functools.cache
def _lightning_monitor() -> type:
    lightning = _imported("lightning", "LightningMonitor")

    class LightningMonitor(lightning.Callback):
        """A Lightning callback that measures curvature along the steps of a module's optimizer.

        Readings go to the trainer's loggers under ``curvature/``, and are kept in ``monitor.readings``.

        Args:
            loss: of a module and a batch; it must not log, nor call ``backward``.
            every: as for `jetplane.CurvatureMonitor`, as are ``options``.
            optimizer: which of the module's optimizers.
        """

        def __init__(
            self, loss: Callable[[Any, Any], Any], every: int = 50, optimizer: int = 0, **options: Any
        ) -> None:
            self.monitor: CurvatureMonitor | None = None
            self._loss, self._place = loss, optimizer
            self._options: dict[str, Any] = {"every": every, **options}
            self._batch: Any = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Look at the optimizer."""

            def report(reading: CurvatureReading) -> None:
                named = {f"curvature/{name}": x for name, x in reading.scalars().items()}
                for logger in trainer.loggers:
                    logger.log_metrics(named, step=trainer.global_step)

            closure = lambda: self._loss(pl_module, self._batch)  # noqa: E731
            optimizer = trainer.optimizers[self._place]
            self.monitor = CurvatureMonitor(optimizer, closure, **{"report": report, **self._options})

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            """Keep the batch."""
            self._batch = batch

        def on_train_batch_end(self, *_: Any) -> None:
            """Forget the batch."""
            self._batch = None

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Stop."""
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Stop."""
            self._close()

        def _close(self) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return LightningMonitor


@functools.cache
def _trainer_monitor() -> type:
    transformers = _imported("transformers", "TrainerMonitor")

    class TrainerMonitor(transformers.TrainerCallback):
        """A callback of `transformers.Trainer` that measures curvature along its steps, on one batch.

        The Trainer does not tell its callbacks the batch of a step, so one is given. Readings are kept in
        ``monitor.readings``; for TensorBoard give ``writer=``.

        Args:
            batch: on the model's device.
            loss: of the model and the batch; ``model(**batch).loss`` by default.
            every: as for `jetplane.CurvatureMonitor`, as are ``options``.
        """

        def __init__(
            self, batch: Any, loss: Callable[[Any, Any], Any] | None = None, every: int = 50, **options: Any
        ) -> None:
            self.monitor: CurvatureMonitor | None = None
            self._batch, self._loss = batch, loss or _own_loss
            self._options: dict[str, Any] = {"every": every, **options}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Look at the optimizer."""
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
            self.monitor = CurvatureMonitor(inner, lambda: self._loss(model, self._batch), **self._options)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Stop."""
            if self.monitor is not None:
                self.monitor.close()

    return TrainerMonitor


def _own_loss(model: Any, batch: Any) -> Any:
    return model(**batch).loss


_MADE = {"LightningMonitor": _lightning_monitor, "TrainerMonitor": _trainer_monitor}


def __getattr__(name: str) -> Any:
    if name in _MADE:
        return _MADE[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
