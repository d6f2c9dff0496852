"""Closures that are run several times at the same place, and must give the same loss each time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from .._torch import DisableTorchFunction
from ..errors import RandomClosureError
from ..jets import innermost
from . import threads
from .side_effects import RandomState, without_side_effects

RELATIVE = 1e-4  # how far two losses may differ by rounding alone, in single precision
ADVICE = (
    "Every run must compute the same loss: fetch the batch outside the closure, start each run from the same hidden "
    "state, and pass your own random generators as generators=[...], which are then reset between runs like torch's"
)


def tolerance(losses: Sequence[float], dtypes: Sequence[torch.dtype]) -> float:
    """How far losses at one place may differ by rounding, with computations in these dtypes."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    relative = min(max(RELATIVE * eps / torch.finfo(torch.float32).eps, 1e-9), 0.05)
    return relative * max(abs(loss) for loss in losses)


@final
class RepeatedClosure:
    """A closure whose losses at the same place are held against each other.

    A run is compared with the first one if it starts from the same state of torch's generators. Where they differ by
    more than rounding, two more runs decide whether the closure is to blame.

    Args:
        closure: as in `jetplane.evaluate`.
        params: where it is evaluated.

    Raises:
        RandomClosureError: (of a call) the closure gives different losses at the same place.
    """

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
        self.closure = closure
        self._dtypes = [p.dtype for p in params]
        self._first: tuple[float, RandomState] | None = None
        self._comparing = True

    @staticmethod
    def of(closure: Callable[[], Any], params: Sequence[Tensor]) -> RepeatedClosure:
        """The closure itself if it is one already."""
        return closure if isinstance(closure, RepeatedClosure) else RepeatedClosure(closure, params)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Runs inside are at another place."""
        before, self._comparing = self._comparing, False
        try:
            yield
        finally:
            self._comparing = before

    def __call__(self) -> Any:
        """Run the closure, and compare its loss."""
        if not self._comparing:
            return self.closure()
        begin = RandomState()
        loss = self.closure()
        value = _number(loss)
        if value is None:
            return loss
        if self._first is None:
            self._first = value, begin
        elif not self._same(value, self._first[0], loss.dtype) and begin.same_as(self._first[1]):
            self._comparing = False
            again = []
            with threads.suspended(), torch.no_grad():
                for _ in range(2):
                    with without_side_effects(begin):
                        again.append(_number(self.closure()))
            one, other = again
            if one is None or other is None or not self._same(one, other, loss.dtype):
                raise RandomClosureError(
                    f"the closure gave different losses in several runs at the same place: {self._first[0]:.9g}, then "
                    f"{value:.9g}, and {', '.join(f'{x:.9g}' for x in again if x is not None)} when it was run again. "
                    + ADVICE
                )
        return loss

    def _same(self, a: float, b: float, dtype: torch.dtype) -> bool:
        return not abs(a - b) > tolerance((a, b), (*self._dtypes, dtype))  # infinities and NaN are told elsewhere


def _number(loss: Any) -> float | None:
    """The value of a loss; None if it is not a scalar, which is told elsewhere."""
    loss = innermost(loss)
    if type(loss) is not Tensor or loss.numel() != 1 or not loss.dtype.is_floating_point:
        return None
    with DisableTorchFunction():
        return loss.item()
