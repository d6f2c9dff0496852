"""Run a closure more than once with the effects of once: random numbers and buffers are set back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..jets.jet import Jet


class _Journal(TorchDispatchMode):
    """Keeps a copy of every tensor that was there before, made when it is first written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: set[int] = set()  # memory that came to be meanwhile
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            for argument, value in [*zip(schema.arguments, args, strict=False), *_named(schema, kwargs)]:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(value)
        elif "batch_norm" in schema.name:  # writes running statistics without saying so
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.name in ("running_mean", "running_var"):
                    self._keep(value)
        result = func(*args, **kwargs)
        if not any(r.alias_info for r in schema.returns):
            self.fresh.update(t.untyped_storage()._cdata for t in tree_leaves(result) if _has_memory(t))
        return result

    def _keep(self, value: Any) -> None:
        known = type(value) in (Tensor, torch.nn.Parameter) and value.untyped_storage()._cdata in self.fresh
        if isinstance(value, Tensor) and not isinstance(value, Jet) and not known and id(value) not in self.saved:
            self.saved[id(value)] = value, value.detach().clone()


def _has_memory(x: Any) -> bool:
    """Whether x is a plain tensor with memory of its own, as those of sparse layouts are not."""
    return type(x) is Tensor and x.layout is torch.strided


def _named(schema: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


RandomState = tuple[Tensor, list[Tensor]]  # of torch's generators: the processor's, and each GPU's


def random_state() -> RandomState:
    """Where torch's random numbers stand, for a `rehearsal` to begin there."""
    return torch.random.get_rng_state(), [torch.cuda.get_rng_state(d) for d in _devices()]


@contextlib.contextmanager
def rehearsal(begin: RandomState | None = None) -> Iterator[_Journal]:
    """What runs inside leaves no trace: buffers written in place and torch's random state are set back.

    Dropout draws the same masks again afterwards, and BatchNorm's running statistics move once.

    Args:
        begin: where random numbers stand inside, to see once more what was seen then; by default where they are.
    """
    journal = _Journal()
    with torch.random.fork_rng(devices=_devices()):
        if begin is not None:
            torch.random.set_rng_state(begin[0])
            for device, state in zip(_devices(), begin[1], strict=True):
                torch.cuda.set_rng_state(state, device)
        try:
            with journal:
                yield journal
        finally:
            with torch.no_grad():
                for tensor, before in journal.saved.values():
                    tensor.detach().copy_(before)
