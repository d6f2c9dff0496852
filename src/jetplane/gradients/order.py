"""Internal: which position of a batch the numbers of a tensor come from, through functions that move positions.

A local head pairs the rows of what it reads with the rows of the loss. Where a model sorts, rolls or permutes its batch
between layers, both have to be known. Functions that move numbers, as indexing does, are applied to the positions'
numbers as well. All others, layers among them, are taken to keep positions: the first of their arguments that is known
says where the result comes from, and arguments that are added up have to agree.

An order that has been lost is a new one, with a base of its own, that no other order is compared with.

>>> h = torch.zeros(3, 2)
>>> start = Order.start(h.shape, None)
>>> start.replaced(start.ids[[2, 0, 1]]).labels(3, -1).tolist()
[3, 1, 2]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, final

import torch
from torch import Tensor

from .._torch import DisableTorchFunction, no_dispatch, tree_flatten, tree_leaves, tree_unflatten
from .tape import Node, writes


@final
@dataclass(frozen=True, eq=False)
class Order:
    """Where the numbers of a tensor come from.

    Attributes:
        base: orders of different bases cannot be compared; 0 for that of the batch.
        count: how many positions there are.
        ids: for each number of the tensor the position that it comes from, 1 to ``count``, or 0 if from none; int32.
        moved: whether a function may have changed the order of positions on the way.
    """

    base: int
    count: int
    ids: Tensor
    moved: bool = False

    @staticmethod
    def start(shape: torch.Size, channels: int | None, device: Any = None) -> Order:
        """Positions in their order: all axes but that of features, which is the last one or that of channels."""
        first = channels is not None and len(shape) > 2 and shape[1] == channels
        lead = (shape[0], *shape[2:]) if first else shape[:-1]
        count = torch.Size(lead).numel()
        ids = torch.arange(1, count + 1, dtype=torch.int32, device=device).reshape(lead)
        return Order(0, count, ids.unsqueeze(1 if first else -1).expand(shape))

    def replaced(self, ids: Tensor, moved: bool = False) -> Order:
        """The same positions at other places."""
        return replace(self, ids=ids, moved=self.moved or moved)

    def lost(self, base: int) -> Order:
        """An order that no other is compared with."""
        return replace(self, base=base, moved=True)

    def labels(self, rows: int, axis: int | None, scaled: bool = False) -> Tensor | None:
        """The position of each of some rows, (rows,); None if the numbers of a row come from several.

        Args:
            rows: how many.
            axis: along which the numbers of a row lie.
            scaled: count in rows of the loss, of which each has as many positions, or each position as many rows.
        """
        ids = self.ids if axis is None else self.ids.movedim(axis, -1)
        if rows == 0 or ids.numel() % rows:
            return None
        if ids.dim() and ids.stride(-1) == 0 and ids.shape[:-1].numel() % rows == 0:
            ids = ids[..., :1]
        ids = ids.reshape(rows, -1)
        if scaled and self.count % rows == 0:
            ids = torch.where(ids > 0, (ids - 1) // (self.count // rows) + 1, 0)
        elif scaled and rows % self.count == 0:
            each = rows // self.count
            inside = torch.arange(rows, device=ids.device).unsqueeze(1) % each
            ids = torch.where(ids > 0, (ids - 1) * each + inside + 1, 0)
        elif scaled:
            return None
        found = ids.amax(1)
        alone = (ids == found.unsqueeze(1)) | (ids == 0)
        return found.long() if bool(alone.all()) and bool((found > 0).all()) else None

    def passed(self, shape: torch.Size) -> Order | None:
        """The order of a result of this shape whose positions are those of this tensor; None if that cannot be."""
        ids = self.ids
        if ids.shape == shape:
            return self
        if len(shape) == ids.dim() > 1 and ids.shape[:-1] == shape[:-1] and bool((ids == ids[..., :1]).all()):
            return self.replaced(ids[..., :1].expand(shape))
        return self.by_examples(shape)

    def by_examples(self, shape: torch.Size) -> Order | None:
        """The same where each part of a tensor along its first axis is of one example; None if it is not so."""
        if not shape or not self.ids.dim() or shape[0] != self.ids.shape[0] or self.count % shape[0]:
            return None
        found = self.labels(shape[0], None, scaled=True)
        if found is None:
            return None
        return replace(self, count=shape[0], ids=found.int().reshape(-1, *(1 for _ in shape[1:])).expand(shape))


@final
class Orders:
    """Orders of tensors on a tape.

    Args:
        following: whether orders are followed at all.

    Attributes:
        following: whether they are.
        moved: whether a function has been met that may change the order of positions.
    """

    def __init__(self, following: bool) -> None:
        self.moved = False
        self.following = following
        self._known: dict[tuple[int, int], Order] = {}

    def of(self, node: Node) -> Order | None:
        """The order of a tensor; None for that of the batch."""
        return self._known.get((node.number, node.place))

    def follow(
        self, func: Any, args: Any, kwargs: Any, nodes: Sequence[tuple[Tensor, Node]],
        results: Sequence[tuple[Any, Node | None]], start: Callable[[Tensor, Node], Order],
    ) -> None:  # fmt: skip
        """Note the orders of what a function has returned.

        Args:
            func: the function.
            args: its arguments.
            kwargs: those given by name.
            nodes: those of them that come from layers.
            results: what it has returned or written to, with nodes of what is on the tape.
            start: gives the order of an argument in the order of the batch.
        """
        nodes = [(t, node) for t, node in nodes if t.dim()]
        name, known = getattr(func, "__name__", ""), any(self.of(node) for _, node in nodes)
        moving = func in _TRANSPOSING or name in _MOVING or name in _SLICING or (known and name in _VIEWS)
        if not nodes or not (known or moving):
            return
        every = [(t, self.of(node) or start(t, node)) for t, node in nodes]
        if moving:
            moves = name in _MOVING or (name in _INDEXING and _takes_places(args[1]))
            found = _moved(func, args, kwargs, _comparable(every), moves)
        elif name.strip("_") in _ADDING:
            found = [None if node is None else _agreed(every, y.shape) for y, node in results]
        else:
            every = every[:1]
            found = [None if node is None else every[0][1].passed(y.shape) for y, node in results]
        lost = any(order.moved for _, order in every)
        for (y, node), order in zip_longest(results, found or ()):
            if node is not None and y.dim() and (order is not None or lost):
                order = order or start(y, node).lost(node.number)
                self._known[node.number, node.place] = order
                self.moved |= order.moved


def paired(
    wanted: Order, axis: int | None, found: Order, channels: int | None, rows: int, by_rows: bool
) -> tuple[Tensor | None, Tensor | None] | None:  # fmt: skip
    """Where in a tensor the rows of a loss are.

    Args:
        wanted: the order of what the loss takes.
        axis: along which the numbers of its rows lie.
        found: the order of the tensor.
        channels: how many it has along its second axis; None where its features lie along the last one.
        rows: of the loss.
        by_rows: whether the tensor has a part for each row.

    Returns:
        The place of each row among those of the tensor, (rows,), and None; or None, and the same among its positions;
        None of both where all are at their place. None if it cannot be told.
    """
    if wanted.base != found.base:
        return None
    same = wanted.count == found.count
    of = channels if channels is not None and found.ids.dim() > 2 and found.ids.shape[1] == channels else None
    inner = -1 if of is None else 1
    for scaled, positions in ((False, False), (False, True), (True, False)):
        if (not scaled and not same) or (positions and of is not None) or not (positions or by_rows):
            continue
        number = found.ids.shape[:-1].numel() if positions else rows
        a, b = wanted.labels(rows, axis, scaled), found.labels(number, inner, scaled)
        place = None if a is None or b is None else _places(a, b)
        if place is not None:
            there = torch.equal(place, torch.arange(number, device=place.device))
            return (None, None) if there else (None, place) if positions else (place, None)
    return None


def _places(wanted: Tensor, among: Tensor) -> Tensor | None:
    """The place of each number among others; None if one is not there, or several times."""
    if torch.equal(wanted, among):
        return torch.arange(len(among), device=among.device)
    ordered, at = among.sort()
    place = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    alone = bool((ordered[1:] != ordered[:-1]).all())
    return at[place] if alone and torch.equal(ordered[place], wanted) else None


def _moved(func: Any, args: Any, kwargs: Any, every: Sequence[tuple[Tensor, Order]], moves: bool) -> list[Order]:
    """The orders of the results of a function that moves numbers: those of positions are moved in the same way."""
    if not every:
        return []
    one, ids = every[0][1], {id(t): order.ids for t, order in every}

    def moving(value: Any) -> Any:
        if isinstance(value, Tensor):
            none = value.is_floating_point() and id(value) not in ids
            return torch.zeros_like(value, dtype=torch.int32) if none else ids.get(id(value), value)
        return 0 if isinstance(value, float) else value

    written = writes(func, kwargs)
    with DisableTorchFunction(), no_dispatch():
        flat, spec = tree_flatten((args, kwargs))
        flat = [moving(value) for value in flat]
        if written:
            flat[0] = flat[0].clone()
        given, named = tree_unflatten(flat, spec)
        result = func(*given, **named)
        found = [flat[0]] if written else tree_leaves(result)
        moved = any(order.moved for _, order in every) or moves
        return [one.replaced(_slim(y), moved or not _rising(y)) for y in found]


def _slim(ids: Tensor) -> Tensor:
    """The same in less memory where all features of a position come from one."""
    (small,) = _without_copies(ids)
    first = small[..., :1] if small.dim() and small.shape[-1] else small
    return (first if bool((small == first).all()) else small).clone().expand(ids.shape)


def _without_copies(*ids: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape with size one along the axes along which each of them repeats itself in memory."""
    for axis in range(ids[0].dim()):
        if ids[0].shape[axis] > 1 and all(one.stride(axis) == 0 for one in ids):
            ids = tuple(one.narrow(axis, 0, 1) for one in ids)
    return ids


def _comparable(every: Sequence[tuple[Tensor, Order]]) -> Sequence[tuple[Tensor, Order]]:
    """The same in orders of the same positions; none if there are no such."""
    kinds = {(order.base, order.count) for _, order in every}
    if len(kinds) == 1:
        return every
    found = [(t, order.by_examples(t.shape)) for t, order in every]
    fits = len({(order.base, order.count) for _, order in found if order is not None}) == 1
    return [(t, order) for t, order in found if order is not None] if fits and all(o for _, o in found) else []


def _agreed(every: Sequence[tuple[Tensor, Order]], shape: torch.Size) -> Order | None:
    """The order of what is made of several tensors, number by number; None where theirs differ."""
    every = _comparable(every)
    if not every:
        return None
    ids = _without_copies(*(order.ids.broadcast_to(shape) for _, order in every))
    found = torch.stack(ids).amax(0)
    agree = all(bool(((one == found) | (one == 0)).all()) for one in ids)
    return every[0][1].replaced(found.expand(shape), any(order.moved for _, order in every)) if agree else None


def _rising(ids: Tensor) -> bool:
    """Whether positions are in their order along each axis."""
    (ids,) = _without_copies(ids)
    gaps = ids.numel() > 0 and not bool((ids > 0).all())
    for axis, size in enumerate(ids.shape if ids.numel() else ()):
        # Where there are none in between, neighbours tell, in a quarter of the memory.
        before = ids.cummax(axis).values if gaps else ids.narrow(axis, 0, size - 1)
        after = ids if gaps else ids.narrow(axis, 1, size - 1)
        if bool(((after < before) & (after > 0) if gaps else after < before).any()):
            return False
    return True


def _takes_places(index: Any) -> bool:
    """Whether an index has a tensor of places."""
    every = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, list) or (hasattr(i, "__array__") and getattr(i, "ndim", 0)) for i in every)


_TRANSPOSING = {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
_INDEXING = {"__getitem__", "__setitem__"}
_MOVING = set(
    """
    index_select gather take take_along_dim masked_select roll flip flipud fliplr rot90 index_copy index_copy_ index_put
    index_put_ index_add index_add_ scatter scatter_ scatter_add scatter_add_
    """.split()
)
_SLICING = _INDEXING | set(
    """
    select narrow split chunk tensor_split unbind transpose swapaxes swapdims permute movedim moveaxis t
    """.split()
)
# What changes no order by itself.
_VIEWS = set(
    """
    view reshape flatten unflatten squeeze unsqueeze view_as reshape_as cat concat concatenate stack hstack vstack
    """.split()
)
# Number by number, by their names without underscores.
_ADDING = set(
    """
    add radd iadd sub rsub isub mul rmul imul div truediv rtruediv itruediv where lerp addcmul addcdiv maximum minimum
    """.split()
)
