"""Running a closure without side effects: buffers that it writes to and random states are set back."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import TorchDispatchMode, memory_of, tree_leaves
from ..errors import ArgumentError
from ..jets import Jet, owner_of

MOVING = {"aten::set_", "aten::resize_", "aten::resize_as_"}  # operators that give a tensor other memory


class UndoLog(TorchDispatchMode):
    """Copies of the tensors that were there before, each made when the tensor is first written to in place.

    Attributes:
        saved: by identity, each tensor that was written to, its values before, and whether it was in a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fresh: set[int] = set()  # storages allocated meanwhile: nothing outside looks into them
        self._raw: dict[int, Tensor] = {}  # bytes of whole storages, as they are copied by `deepcopy`
        self._places: dict[int, Tensor] = {}  # what looks into the memory that a tensor had before it got another
        self.saved: dict[int, tuple[Tensor, Tensor, bool]] = {}

    def restore(self) -> None:
        """Write the values of before back, the last first, and take what was in no graph out of it."""
        with torch.no_grad():
            for key, (tensor, before, graph) in reversed(self.saved.items()):
                if key in self._places:
                    tensor.data = self._places[key]
                tensor.detach().copy_(before)
                if owner_of(tensor).requires_grad and not graph:
                    owner_of(tensor).detach_()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            for argument, value in [*zip(schema.arguments, args, strict=False), *_named(schema, kwargs)]:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.save(value, schema.name in MOVING)
        elif schema.name.startswith("c10d::"):  # collectives write to what they are given without saying so
            for value in tree_leaves((args, kwargs)):
                self.save(value)
        elif "batch_norm" in schema.name:  # writes running statistics without saying so
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.name in ("running_mean", "running_var"):
                    self.save(value)
        sets = schema.name == "aten::set_" and args[0].dtype == torch.uint8 and self._is_fresh(args[0])
        result = func(*args, **kwargs)
        if sets:
            self._raw[id(args[0])] = args[0]
        if not any(r.alias_info for r in schema.returns) or schema.name == "aten::lift_fresh":
            # Composite operators (dropout, flatten_dense_tensors) may return what they were given without saying so.
            made, given = ({memory_of(t) for t in tree_leaves(x) if _has_memory(t)} for x in (result, (args, kwargs)))
            self._fresh |= made if schema.name == "aten::lift_fresh" else made - given
        return result

    def save(self, value: Any, moves: bool = False) -> None:
        """Remember what is about to be written to, unless it was made meanwhile, or to get other memory (``moves``)."""
        known = self._is_fresh(value)
        if not known and id(value) in self._raw:  # a storage that is filled by another one was just allocated
            self._fresh.add(memory_of(value))
            return
        if isinstance(value, Tensor) and not isinstance(value, Jet) and not known and id(value) not in self.saved:
            self.saved[id(value)] = value, value.detach().clone(), owner_of(value).requires_grad
            if moves:
                self._places[id(value)] = value.detach()

    def _is_fresh(self, value: Any) -> bool:
        return _has_memory(value) and memory_of(value) in self._fresh


class _Assignments(TorchFunctionMode):
    """Tells a log of ``x.data = y``, which is no operator."""

    def __init__(self, log: UndoLog) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SET_DATA:
            self._log.save(args[0], moves=True)
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _has_memory(x: Any) -> bool:
    """Whether x is a plain tensor with memory of its own, as those of sparse layouts are not."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided


def _named(schema: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


class _Here(threading.local):
    generators: tuple[Any, ...] = ()  # of the user's, to be set back as torch's are
    undone: bool = False


_here = _Here()


@contextlib.contextmanager
def setting_back(generators: Sequence[Any]) -> Iterator[None]:
    """Let `RandomState` and `without_side_effects` inside cover generators of the user's own.

    Args:
        generators: each a `torch.Generator`, `numpy.random.Generator`, `numpy.random.RandomState` or `random.Random`.

    Raises:
        ArgumentError: one of them is something else.
    """
    if not isinstance(generators, (list, tuple)):
        raise ArgumentError(f"generators must be a list, got {generators!r}: generators=[generator], or () for none")
    for generator in generators:
        _accessors(generator)
    before = _here.generators
    _here.generators = (*before, *generators)
    try:
        yield
    finally:
        _here.generators = before


def _accessors(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What reads the state of a generator, and what sets it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state, generator.set_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if hasattr(generator, "get_state") and hasattr(generator, "set_state"):  # NumPy need not be there
        return generator.get_state, generator.set_state
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    raise ArgumentError(
        f"generators must be torch.Generator, numpy.random.Generator, numpy.random.RandomState or random.Random, got "
        f"{type(generator).__name__}"
    )


class RandomState:
    """Where random numbers stand: those of torch on every device, of `random`, of NumPy if imported, of the user's.

    >>> state = RandomState()
    >>> first = torch.rand(2)
    >>> state.restore()
    >>> torch.equal(torch.rand(2), first)
    True
    """

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy.random")
        shared = [] if numpy is None else [numpy]
        accessors = [_accessors(generator) for generator in (random._inst, *shared, *_here.generators)]  # type: ignore[attr-defined]
        self._states = [(read(), write) for read, write in accessors]
        self._torch = torch.random.get_rng_state()
        self._devices = [torch.cuda.get_rng_state(d) for d in _devices()]

    def restore(self) -> None:
        """Set all of them back."""
        torch.random.set_rng_state(self._torch)
        for device, state in zip(_devices(), self._devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        for state, write in self._states:
            write(state)

    def same_as(self, other: RandomState) -> bool:
        """Whether torch would draw the same numbers from both."""
        mine, others = (self._torch, *self._devices), (other._torch, *other._devices)
        return all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


@contextlib.contextmanager
def without_side_effects(begin: RandomState | None = None) -> Iterator[UndoLog]:
    """Set buffers written in place and random states back at the end, whatever is raised.

    Dropout draws the same masks again afterwards, and BatchNorm's running statistics move once.

    Args:
        begin: where random numbers start from inside, to repeat those drawn there; by default where they are.
    """
    log, now, before = UndoLog(), RandomState(), _here.undone
    if begin is not None:
        begin.restore()
    _here.undone = True
    try:
        with log, _Assignments(log):
            yield log
    finally:
        _here.undone = before
        log.restore()
        now.restore()


def undone() -> bool:
    """Whether what is written now is going to be set back."""
    return _here.undone
