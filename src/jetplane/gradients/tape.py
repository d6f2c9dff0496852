"""Internal: what functions of a closure do to some tensors, and the products with their transposed derivatives.

A `Tape` runs functions one by one and keeps the way back for each: torch's own kernel of that function's
vector-Jacobian product. There is no graph of several functions. Its caller decides which functions are on the tape, and
along which arguments there is a way back.

>>> import torch
>>> tape, w = Tape(), torch.tensor([1.0, -2.0])
>>> y = tape.run(torch.relu, (w,), {}, leaves=(w,))
>>> z = tape.run(torch.mul, (y, 3.0), {})
>>> [(leaf.tensor is w, c) for leaf, c in tape.back({tape.node(z): torch.ones(2)}).items() if leaf.tensor is not None]
[(True, tensor([3., 0.]))]
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from .._torch import DisableTorchFunction, no_dispatch, tree_flatten, tree_map, tree_unflatten
from ..errors import ArgumentError
from ..rules.formulas import SLOPES
from ..rules.grad_mode import autograd

Back = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]  # from cotangents of results to those of inputs


@dataclass(eq=False)
class Node:
    """A result of a function on the tape, or a leaf.

    Attributes:
        tensor: of a leaf; None for results.
        number: of the function, in the order of calls.
        place: which of the function's ``count`` results it is.
        calls: the numbers of functions with leaves from which it comes.
        inputs: of the function.
        back: its way back to them; None for a leaf.
        dtype: of the tensor.
        shape: of the tensor.
    """

    tensor: Tensor | None
    number: int
    place: int
    count: int
    calls: frozenset[int]
    inputs: Sequence[Node]
    back: Back | None
    dtype: torch.dtype
    shape: torch.Size


@final
class Tape:
    """Functions that have been run, in their order, and the tensors that they returned.

    Attributes:
        number: of the last function.
    """

    def __init__(self) -> None:
        self.number = 0
        self._known: dict[int, tuple[weakref.ref[Tensor], Node]] = {}

    def node(self, x: Any) -> Node | None:
        """The node of a tensor that a function on the tape has returned; None for others."""
        known = self._known.get(id(x))
        return known[1] if known is not None and known[0]() is x else None

    def start(self, x: Tensor) -> Node:
        """Put the result of a function on the tape that has no way back."""
        self.number += 1
        node = Node(None, self.number, 0, 1, frozenset({self.number}), (), None, x.dtype, x.shape)
        self._put(x, node)
        return node

    def run(
        self, func: Any, args: Any, kwargs: Any, leaves: Collection[Tensor] = (),
        along: Callable[[Node], bool] = lambda node: True,
    ) -> Any:  # fmt: skip
        """A function's result, with its way back to leaves and to results of earlier functions.

        Args:
            func: the function.
            args: its arguments.
            kwargs: those given by name.
            leaves: those of the arguments that are leaves.
            along: whether there is a way back to an argument that is on the tape.
        """
        flat, spec = tree_flatten((args, kwargs))
        ids = {id(leaf) for leaf in leaves}
        at: dict[int, Node] = {}
        for i, value in enumerate(flat):
            node = self.node(value)
            if id(value) in ids:
                at[i] = Node(value, 0, 0, 1, frozenset(), (), None, value.dtype, value.shape)
            elif node is not None and along(node):
                at[i] = node
        if not at:
            return func(*args, **kwargs)
        self.number += 1
        slope = _CLOSED.get(getattr(func, "__name__", ""))
        if slope is not None and list(at) == [0] and len(args) == 1:
            y = func(*args, **kwargs)
            self._add([y], list(at.values()), _closed(slope, y), bool(ids))
            return y
        return self._recorded(func, flat, spec, at, writes(func, kwargs), bool(ids))

    def _recorded(self, func: Any, flat: list[Any], spec: Any, at: dict[int, Node], written: bool, own: bool) -> Any:
        target, results, plain = flat[0] if written else None, [], []
        # Hooks of the user's, as checkpoints set them, would run the model again on the way back.
        with DisableTorchFunction(), no_dispatch(), autograd(), saved_tensors_hooks(pack, unpack):
            flat, token = list(flat), torch.empty(0, requires_grad=True)
            for i in at:
                flat[i] = _Start.apply(flat[i], token)
            starts = [get_gradient_edge(flat[i]) for i in at]
            if target is not None:
                flat[0] = flat[0].clone()  # a start may not be written to, and what is written to must not get a graph
            given, named = tree_unflatten(flat, spec)
            out = func(*given, **named)

            def taken(y: Any) -> Any:
                if not isinstance(y, Tensor) or not y.requires_grad:
                    return y
                results.append(get_gradient_edge(y))
                plain.append(y.detach())
                return plain[-1]

            if target is None:
                found = tree_map(taken, out)
            else:
                target.copy_(taken(flat[0]))
                plain, found = plain and [target], target if out is flat[0] else out

        def back(cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            met = [(e, c) for e, c in zip(results, cotangents, strict=True) if c is not None]
            edges, given = [e for e, _ in met], [c for _, c in met]
            with DisableTorchFunction(), no_dispatch(), autograd():
                return torch.autograd.grad(edges, starts, given, retain_graph=True, allow_unused=True)

        self._add(plain, list(at.values()), back, own)
        return found

    def back(self, cotangents: Mapping[Node, Tensor], leaves: bool = False, last: bool = False) -> dict[Node, Tensor]:
        """Sums of products with transposed derivatives.

        Args:
            cotangents: by the nodes of results.
            leaves: whether those of leaves alone are kept, which takes less memory.
            last: whether nothing goes back over these nodes again, so that each function lets go of what it has kept.

        Returns:
            The same of all nodes on the way back from these, down to the leaves.
        """
        total = dict(cotangents)
        met: dict[int, dict[int, Node]] = {}
        for node in total:
            met.setdefault(node.number, {})[node.place] = node
        while met:
            nodes = met.pop(max(met))
            one = next(iter(nodes.values()))
            if one.back is None:
                continue
            take = total.pop if leaves else total.__getitem__
            given = [take(nodes[i]).to(nodes[i].dtype) if i in nodes else None for i in range(one.count)]
            back = one.back
            if last:
                for node in nodes.values():
                    node.back = None
            found, back, given = back(given), None, None
            for source, c in zip(one.inputs, found, strict=True):
                if c is None:
                    continue
                total[source] = total[source] + c if source in total else c
                met.setdefault(source.number, {})[source.place] = source
        return total

    @staticmethod
    def leaves(node: Node) -> list[Tensor]:
        """The leaves from which a result comes."""
        found, waiting, met = [], [node], {node}
        while waiting:
            one = waiting.pop()
            if one.tensor is not None:
                found.append(one.tensor)
            new = [source for source in one.inputs if source not in met]
            met.update(new)
            waiting += new
        return found

    def _add(self, results: Sequence[Tensor], inputs: Sequence[Node], back: Back, own: bool) -> None:
        calls = frozenset({self.number}) if own else frozenset()
        calls = calls.union(*(node.calls for node in inputs))
        for i, y in enumerate(results):
            node = Node(None, self.number, i, len(results), calls, inputs, back, y.dtype, y.shape)
            self._put(y, node)

    def _put(self, x: Tensor, node: Node) -> None:
        # A tape that its tensors refer to would be freed, with all that it keeps, by the garbage collector alone.
        self._known[id(x)] = weakref.ref(x, functools.partial(_forget, weakref.ref(self), id(x))), node


class _Start(torch.autograd.Function):
    """A tensor as the start of a graph that keeps of it what derivatives need alone: a leaf would keep all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor) -> Tensor:
        """The tensor; the token, which requires a gradient, lets it have one."""
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """None is asked for: derivatives end here."""
        return None, None


def _forget(tape: weakref.ref[Tape], key: int, gone: weakref.ref[Tensor]) -> None:
    known = {} if (own := tape()) is None else own._known
    if key in known and known[key][0] is gone:  # another tensor may have taken its place
        del known[key]


def writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes its result to its first argument."""
    name = getattr(func, "__name__", "")
    return name in _ASSIGNING or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


def _closed(slope: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Back:
    """The way back of an activation function, which needs its result alone."""
    version = y._version

    def back(cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (c,) = cotangents
        return [None if c is None else slope(c, unwritten(y, version))]

    return back


def pack(x: Tensor) -> tuple[Tensor, int]:
    """What a derivative needs, detached, as a result would else keep itself alive."""
    x = x.detach()
    return x, x._version


def unpack(kept: tuple[Tensor, int]) -> Tensor:
    """What `pack` has kept, if it has not been written to since."""
    return unwritten(*kept)


def unwritten(x: Tensor, version: int) -> Tensor:
    """A tensor that was kept.

    Raises:
        ArgumentError: something has been written to it since.
    """
    if x._version == version:
        return x
    raise ArgumentError(
        "the model writes to a tensor that the derivative of an earlier function needs, which torch's backward would "
        "refuse too: write to a copy of it, or take jetplane.gradients.ActivityPerturbation()"
    )


_ASSIGNING = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__",
}  # fmt: skip
_CLOSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda c, y: torch.ops.aten.threshold_backward(c, y, 0),
    "relu_": lambda c, y: torch.ops.aten.threshold_backward(c, y, 0),
    "tanh": lambda c, y: SLOPES["tanh"](c, y, y),
    "sigmoid": lambda c, y: SLOPES["sigmoid"](c, y, y),
}
