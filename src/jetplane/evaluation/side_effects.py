"""Running a closure without side effects: buffers that it writes to and random states are set back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch import TorchDispatchMode, memory_of, tree_leaves
from ..jets import Jet


class UndoLog(TorchDispatchMode):
    """Copies of the tensors that were there before, each made when the tensor is first written to in place.

    Attributes:
        saved: by identity, each tensor that was written to and its values before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fresh: set[int] = set()  # storages allocated meanwhile: nothing outside looks into them
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}

    def restore(self) -> None:
        """Write the values of before back."""
        with torch.no_grad():
            for tensor, before in self.saved.values():
                tensor.detach().copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            for argument, value in [*zip(schema.arguments, args, strict=False), *_named(schema, kwargs)]:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(value)
        elif "batch_norm" in schema.name:  # writes running statistics without saying so
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.name in ("running_mean", "running_var"):
                    self._save(value)
        result = func(*args, **kwargs)
        if not any(r.alias_info for r in schema.returns):
            self._fresh.update(memory_of(t) for t in tree_leaves(result) if _has_memory(t))
        return result

    def _save(self, value: Any) -> None:
        known = _has_memory(value) and memory_of(value) in self._fresh
        if isinstance(value, Tensor) and not isinstance(value, Jet) and not known and id(value) not in self.saved:
            self.saved[id(value)] = value, value.detach().clone()


def _has_memory(x: Any) -> bool:
    """Whether x is a plain tensor with memory of its own, as those of sparse layouts are not."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided


def _named(schema: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


RandomState = tuple[Tensor, list[Tensor]]  # of torch's generators: the processor's, and each GPU's


def random_state() -> RandomState:
    """The present state of torch's generators, for `without_side_effects` to start from."""
    return torch.random.get_rng_state(), [torch.cuda.get_rng_state(d) for d in _devices()]


@contextlib.contextmanager
def without_side_effects(begin: RandomState | None = None) -> Iterator[UndoLog]:
    """Set buffers written in place and torch's random state back at the end, whatever is raised.

    Dropout draws the same masks again afterwards, and BatchNorm's running statistics move once.

    Args:
        begin: a state to give torch's generators at the start, which repeats the random numbers drawn from there;
            by default they go on from where they are.
    """
    log = UndoLog()
    with torch.random.fork_rng(devices=_devices()):
        if begin is not None:
            torch.random.set_rng_state(begin[0])
            for device, state in zip(_devices(), begin[1], strict=True):
                torch.cuda.set_rng_state(state, device)
        try:
            with log:
                yield log
        finally:
            log.restore()
