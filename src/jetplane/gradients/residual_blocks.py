"""Internal: which modules of a model are residual blocks, found by what it computes.

A block is a module that puts out one of its inputs with something added that depends on it,

    y = x + f_1(x) + f_2(x + f_1(x)) + ...

or that, with norms or ReLUs of the sums on the way, as in a post-norm transformer, ``h = norm(x + f_1(x))``,
``y = norm(h + f_2(h))``, or a ResNet, ``y = relu(x + f(x))``. A pass follows, function by function, which tensors are
such sums and what each tensor depends on. What was met on the way is then computed again and held against the block's
output, so that what functions do not show (a write through a view) is no block. A module that only runs blocks one
after another on its input, as a stack does, is left out: they are found.

>>> import torch
>>> class Residual(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.f = torch.nn.Linear(3, 3)
...     def forward(self, x):
...         return x + self.f(x).relu()
>>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), Residual(), Residual(), torch.nn.Linear(3, 1))
>>> find_blocks(lambda: model(torch.randn(5, 2)), model)
{'1': [(0, 0, ())], '2': [(0, 0, ())]}
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import DisableTorchFunction, disabled_torch_dispatch, no_dispatch, transform_around, tree_leaves, tree_map
from ..errors import ArgumentError
from .tape import writes

Pair = tuple[int, int, tuple[int, ...]]  # places of an input and an output, and of the calls of `MAPS` on the way
ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}
SUBTRACTING = {"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"}
MAPS = {"layer_norm", "rms_norm", "relu", "relu_"}  # of one tensor, into another of its shape


def find_blocks(
    closure: Callable[[], Any], model: nn.Module, names: Collection[str] | None = None
) -> dict[str, list[Pair]]:  # fmt: skip
    """The residual blocks that a closure calls, by their names in the order of their calls.

    Args:
        closure: calls the model.
        model: holds the blocks.
        names: of those that are meant, which may add what functions do not show to depend on their input; None for all.

    Returns:
        For each block the places, among the leaves of its arguments and of its result, of what it began with and of
        the sum, or of the former as it came; and, among the calls of `MAPS` within the block, the places of those
        on the way.

    Raises:
        ArgumentError: a module of ``names`` is not in the model, is not called, or is no block.
    """
    every = model.named_modules(remove_duplicate=False)
    modules = {n: m for n, m in every if any(True for _ in m.parameters()) and not isinstance(m, ScriptModule)}
    if names is not None:
        unknown = [name for name in names if name not in modules]
        if unknown:
            some = [name for name in modules if name][:4]
            raise ArgumentError(
                f"blocks names modules that the model does not have, with parameters: {unknown}. Names are those of "
                f"model.named_modules(): {', '.join(some)}, …"
            )
        modules = {name: modules[name] for name in names}
    first = {module: name for name, module in reversed(modules.items())}  # of a module that has several names
    trace = _Trace(names is not None)
    with contextlib.ExitStack() as stack:
        for module in model.modules():  # what hooks for the way back would make of tensors is no function
            for hooks in (module._backward_hooks, module._backward_pre_hooks):
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
        for module, name in reversed(first.items()):
            stack.callback(module.register_forward_pre_hook(trace.enter, with_kwargs=True).remove)
            leave = functools.partial(trace.leave, name)
            stack.callback(module.register_forward_hook(leave, prepend=True).remove)
        stack.enter_context(trace)
        closure()
    found = {f.name: list(f.pairs) for f in trace.found if f.name not in trace.irregular}
    others = [name for name in names or () if first[modules[name]] not in found]
    if others:
        raise ArgumentError(
            f"modules {others} of blocks are not called, or do not put out one of their inputs with something added: "
            "no function besides sums, and layer_norm, rms_norm and relu of sums, may lie between that input and the "
            "output"
        )
    return found


class Found(NamedTuple):
    """A call of a block: its name, its pairs, tokens of the sums that it was given and of what it gave, its parts."""

    name: str
    pairs: tuple[Pair, ...]
    taken: frozenset[int]
    given: frozenset[int]
    parts: int


class _Map(NamedTuple):
    """One of `MAPS` of a sum: its place among all calls of them, and its function."""

    place: int
    function: Callable[[Tensor], Tensor]


Step = Tensor | _Map  # on the way from a tensor: what is added, or a map


@dataclass(eq=False)
class _Known:
    """What is known of a tensor.

    Attributes:
        depends: on which tokens.
        sums: by tokens, the steps from the tensor that has the token.
    """

    depends: frozenset[int] = frozenset()
    sums: dict[int, tuple[Step, ...]] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    """A call of a module that has not ended: the copies of its inputs by tokens, their places, and blocks inside.

    ``maps`` is how many calls of `MAPS` were before it.
    """

    inputs: dict[int, tuple[int, Tensor]]
    taken: frozenset[int]
    after: bool
    maps: int
    found: list[Found] = field(default_factory=list)


@final
class _Trace(TorchFunctionMode):
    """A pass in which sums and dependences are followed. A token stands for an input of a call, or a block's output.

    Attributes:
        irregular: names of modules of which some calls are blocks, and others not or with other pairs.
    """

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.irregular: set[str] = set()
        self._named = named
        self._thread = threading.get_ident()  # others may use the model meanwhile
        self._pairs: dict[str, tuple[Pair, ...]] = {}
        self._whole = _Call({}, frozenset(), False, 0)
        self._calls = [self._whole]
        self._tokens = 0
        self._maps = 0
        self._given: set[int] = set()  # tokens of what blocks gave
        self._known: Any = WeakTensorKeyDictionary()

    @property
    def found(self) -> list[Found]:
        """Calls of blocks, in their order."""
        return self._whole.found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = None
        if writes(func, kwargs) and args and isinstance(args[0], Tensor):
            with DisableTorchFunction(), no_dispatch():
                before = args[0].detach().clone() if _is_plain(args[0]) else args[0]
                self._known[before] = self._of(args[0])
        result = func(*args, **kwargs)
        with DisableTorchFunction(), no_dispatch():
            self._follow(func, args, kwargs, result, before)
        self._maps += is_map(func)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, before: Tensor | None) -> None:
        """What is known of a function's result; ``before`` is its first argument, where that is written to."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = [self._of(t) for t in given]
        depends = frozenset().union(*(known.depends for known in own))
        if not depends:
            return
        sums: dict[int, tuple[Step, ...]] = {}
        operands = [*args[:2], *(kwargs[n] for n in ("input", "other") if n in kwargs)]
        name = getattr(func, "__name__", "")
        if name in ADDING | SUBTRACTING and isinstance(result, Tensor) and len(operands) == 2:
            factor = kwargs.get("alpha", 1) * (-1 if name in SUBTRACTING else 1)
            if before is not None:
                operands = [before if x is args[0] else x for x in operands]
            first, second = operands
            for one, other, by in ((first, second, factor), (second, first, 1))[: 1 if factor != 1 else 2]:
                if _is_plain(one) and _is_plain(result) and one.shape == result.shape and self._of(one).sums:
                    part = self._part(other, by)
                    for token, parts in self._of(one).sums.items():
                        sums.setdefault(token, (*parts, part))
        if is_map(func) and _is_plain(result):
            x, function = mapped(func, args, kwargs)
            step = _Map(self._maps, function)
            sums = {token: (*steps, step) for token, steps in self._of(x).sums.items()}
        made = [y for y in tree_leaves(result) if isinstance(y, Tensor) and not any(y is t for t in given)]
        for y in (*made, *args[: before is not None]):
            self._known[y] = _Known(depends, sums)

    def _part(self, x: Any, factor: float) -> Tensor:
        """What a sum adds, a tensor or a number."""
        x = x if isinstance(x, Tensor) else torch.tensor(x, device="cpu")
        if factor == 1:
            return x
        part = x.detach() * factor
        self._known[part] = _Known(self._of(x).depends)
        return part

    def _of(self, x: Tensor) -> _Known:
        return self._known.get(x) or _Known()

    def _token(self, x: Tensor) -> int:
        """A new token for a tensor."""
        self._tokens += 1
        old = self._of(x)
        self._known[x] = _Known(old.depends | {self._tokens}, old.sums | {self._tokens: ()})
        return self._tokens

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""
        if threading.get_ident() != self._thread:
            return
        with DisableTorchFunction(), no_dispatch():
            distinct: dict[int, tuple[int, Tensor]] = {}
            for i, x in enumerate(tree_leaves((args, kwargs))):
                if is_state(x):
                    distinct.setdefault(id(x), (i, x))
            inputs = [*distinct.values()]
            taken = frozenset().union(*(self._of(x).sums for _, x in inputs))
            after = any(self._of(x).depends & self._given for _, x in inputs)
            copies = {self._token(x): (i, x.detach().clone()) for i, x in inputs}
            self._calls.append(_Call(copies, taken, after, self._maps))

    def leave(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        """A call ends: note whether the module is a block."""
        if threading.get_ident() != self._thread:
            return
        with DisableTorchFunction(), no_dispatch():
            call, outer = self._calls.pop(), self._calls[-1]
            pairs, parts, last, passed = [], set(), [], []
            for j, y in enumerate(tree_leaves(out)):
                known = self._of(y) if is_state(y) else _Known()
                for token in sorted(call.inputs.keys() & known.sums.keys()):
                    i, x = call.inputs[token]
                    steps = known.sums[token]
                    added = [step for step in steps if isinstance(step, Tensor)]
                    maps = tuple(step.place - call.maps for step in steps if isinstance(step, _Map))
                    passed += [] if steps else [(i, j, maps)]
                    depends = any(token in self._of(part).depends for part in added)
                    if not (depends or (self._named and added)) or is_transformed(y) or not _adds_up(x, steps, y):
                        continue
                    pairs.append((i, j, maps))
                    last.append(y)
                    parts |= {id(part) for part in added}  # the same of a sum that is put out twice
            begun = {i for i, _, _ in pairs}
            pairs += [pair for pair in passed if pair[0] in begun]  # what is put out as it came, beside the sum
            if self._pairs.setdefault(name, tuple(pairs)) != tuple(pairs):
                self.irregular.add(name)
            if not pairs:
                outer.found += call.found
                return
            ends = frozenset().union(*(self._of(y).sums for y in last))
            along = [f for f in call.found if f.taken & call.inputs.keys() and f.given & ends]
            whole = along and sum(f.parts for f in along) == len(parts)
            outermost = call.found and not along and not call.after
            if not self._named and (whole or outermost):
                outer.found += call.found
                return
            given = frozenset(self._token(y) for y in last)
            self._given |= given
            inside = [f for f in call.found if f not in along]
            outer.found += [*inside, Found(name, tuple(pairs), call.taken, given, len(parts))]


def is_state(x: Any) -> bool:
    """Whether something may be what blocks add to."""
    return _is_plain(x) and x.is_floating_point() and x.dim() > 0


def _is_plain(x: Any) -> bool:
    """Whether something is a tensor with memory of its own; nested ones and those of other libraries may have none."""
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    return type(x).__torch_dispatch__ is disabled_torch_dispatch  # type: ignore[attr-defined]


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor is one of a transform of torch.func, or carries a derivative of torch's forward mode."""
    return transform_around() is not None or unpack_dual(x).tangent is not None


def is_map(func: Any) -> bool:
    """Whether a function is one of `MAPS`."""
    return getattr(func, "__name__", "") in MAPS


def mapped(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], constant: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:  # fmt: skip
    """What one of `MAPS` is called on, and its function, which writes to nothing.

    Args:
        func: the function.
        args: its arguments.
        kwargs: the others.
        constant: whether its parameters are constants in this function.
    """
    x, args = (args[0], args[1:]) if args else (kwargs["input"], ())
    if func.__name__ in ("relu", "relu_"):
        return x, torch.relu
    kwargs = {name: value for name, value in kwargs.items() if name != "input"}
    if constant:
        args, kwargs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs))
    return x, lambda t: func(t, *args, **kwargs)


def _adds_up(x: Tensor, steps: Sequence[Step], y: Tensor) -> bool:
    total, rtol = x, max(1e-3, 4 * torch.finfo(y.dtype).eps)
    for step in steps:
        total = step.function(total) if isinstance(step, _Map) else total + step
    return total.shape == y.shape and bool(
        torch.isclose(total.to(y.dtype), y, rtol=rtol, atol=1e-5, equal_nan=True).all()
    )
