"""Which part of a sharded parameter (`DTensor`) this rank holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError

Runs = Iterator[tuple[slice, slice, Tensor]]  # which of K directions, which run of elements, their numbers


def is_sharded(x: Any) -> bool:
    """Whether x is a `DTensor`."""
    if type(x) in (Tensor, nn.Parameter):
        return False
    loaded = sys.modules.get("torch.distributed.tensor")  # where nobody has loaded it there are none
    return loaded is not None and isinstance(x, loaded.DTensor)


Pieces = Runs | Iterator[tuple[slice, slice | Tensor, Tensor]]  # which of K directions, which elements, their numbers


# --- which part of a tensor this rank has -----------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A box of a tensor: what this rank has of it.

    Attributes:
        whole: the shape of the tensor.
        box: where the part lies in each dimension.
    """

    whole: torch.Size
    box: tuple[slice, ...]

    @property
    def shape(self) -> torch.Size:
        """Of the part."""
        return torch.Size(b.stop - b.start for b in self.box)

    @property
    def run(self) -> slice:
        """The shortest run of the tensor's elements, in their order, that holds the part.

        >>> Part(torch.Size((4, 3)), (slice(1, 3), slice(0, 3))).run
        slice(3, 9, None)
        """
        if self.shape.numel() == 0:
            return slice(0, 0)
        first = last = 0
        for size, b in zip(self.whole, self.box, strict=True):
            first, last = first * size + b.start, last * size + b.stop - 1
        return slice(first, last + 1)

    @property
    def windows(self) -> tuple[int, slice] | None:
        """A period and a window, if the part is what lies in the window of every period of elements.

        >>> Part(torch.Size((2, 4)), (slice(0, 2), slice(1, 3))).windows
        (4, slice(1, 3, None))
        """
        split = [d for d, (size, b) in enumerate(zip(self.whole, self.box, strict=True)) if b != slice(0, size)]
        if len(split) != 1:
            return None
        b, inner = self.box[split[0]], math.prod(self.whole[split[0] + 1 :])
        return self.whole[split[0]] * inner, slice(b.start * inner, b.stop * inner)

    def picked(self, drawn: Runs) -> Pieces:
        """Of numbers drawn for `run`, a piece at a time, those of the part, and where in it they lie."""
        start, stop = self.run.start, self.run.stop
        for streams, run, values in drawn:
            if stop - start == self.shape.numel():  # in one piece
                yield streams, slice(run.start - start, run.stop - start), values
                continue
            chosen, place = self._inside(torch.arange(run.start, run.stop, device=values.device))
            yield streams, place, values[:, chosen]

    def _inside(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the whole tensor's elements belong to the part, and where in it they lie."""
        inside = torch.ones_like(elements, dtype=torch.bool)
        place, stride = torch.zeros_like(elements), 1
        for size, b in zip(reversed(self.whole), reversed(self.box), strict=True):
            at = elements % size - b.start
            inside &= (at >= 0) & (at < b.stop - b.start)
            place += at * stride
            elements, stride = elements // size, stride * (b.stop - b.start)
        chosen = inside.nonzero().flatten()
        return chosen, place[chosen]

    def of(self, stack: Tensor) -> Tensor:
        """The part of each of n whole tensors, (n, *whole)."""
        return stack[(slice(None), *self.box)]

    def of_factors(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (n, r, rows) and (n, r, columns) of the part of a product of low rank."""
        rows, columns = self.box[0], self.box[1:]
        cut = right.unflatten(2, self.whole[1:])[(slice(None), slice(None), *columns)]
        return left[:, :, rows], cut.flatten(2)


def part_of(param: Tensor) -> Part | None:
    """The part that this rank has of a `DTensor`; None for any other tensor.

    Raises:
        ArgumentError: it is not a box of the tensor.
    """
    if not is_sharded(param):
        return None
    spec: Any = param
    mesh, placements, box = spec.device_mesh, spec.placements, [range(size) for size in param.shape]
    at = mesh.get_coordinate()
    splits = [(i, p) for i, p in enumerate(placements) if hasattr(p, "dim") and not p.is_partial()]
    # FSDP2 splits what tensor parallelism has split before, although its dimension of the mesh comes first.
    late = [(i, p) for i, p in splits if hasattr(p, "split_factor")]
    early = [split for split in splits if split not in late]
    known = len(splits) == sum(not p.is_replicate() for p in placements) and all(
        p.split_factor == math.prod(mesh.size(j) for j, q in early if j > i and q.dim == p.dim) for i, p in late
    )
    if at is not None and known:
        for i, p in (*early, *reversed(late)):
            each = -(-len(box[p.dim]) // mesh.size(i))
            box[p.dim] = box[p.dim][at[i] * each : (at[i] + 1) * each]
    if at is None or not known or [len(b) for b in box] != list(local(param).shape):
        raise ArgumentError(
            f"a parameter of shape {tuple(param.shape)}, {placements} on {mesh}: expected that this rank holds a box "
            f"of it, split by Shard and Replicate; its own tensor is of shape {tuple(local(param).shape)}"
        )
    return Part(param.shape, tuple(slice(b.start, b.stop) for b in box))


def local(param: Tensor) -> Tensor:
    """The tensor in this rank's memory: of a `DTensor` its part, of any other itself."""
    return param._local_tensor if is_sharded(param) else param  # type: ignore[attr-defined]


def whole(param: Tensor) -> Tensor:
    """A tensor without memory of the whole parameter's shape, dtype and device."""
    return torch.empty((), dtype=param.dtype, device=param.device).expand(param.shape)


def joint_norm(steps: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all parameters of steps of which this rank has its part."""
    squares: dict[tuple[Any, ...], Tensor] = {}
    for step, param in zip(steps, params, strict=True):
        axes = _split_axes(param)
        squares[axes] = step.double().square().sum() + squares.get(axes, 0)
    for axes, total in squares.items():
        for mesh, axis in axes:
            torch.distributed.all_reduce(total, group=mesh.get_group(axis))
    return torch.stack(list(squares.values())).sum().sqrt()


def _split_axes(param: Tensor) -> tuple[tuple[Any, int], ...]:
    """The meshes' axes that a parameter is split along."""
    if not is_sharded(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return tuple((mesh, i) for i, p in enumerate(placements) if not p.is_replicate())


def wrapped(part: Tensor, param: Tensor) -> Tensor:
    """A `DTensor`, laid out as the parameter, of this rank's part of it."""
    from dataclasses import replace

    from torch.distributed.tensor import DTensor

    spec: Any = param._spec  # type: ignore[attr-defined]
    if part.dtype != param.dtype:
        spec = replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=part.dtype))
    return DTensor(part, spec, requires_grad=False)  # not from_local(), which would look at a jet's tangents


def held_alike(param: Tensor, ranks: Sequence[int]) -> bool:
    """Whether those of the ranks that hold the parameter hold the same part of it."""
    axes = [(mesh.mesh, axis) for mesh, axis in _split_axes(param)]
    places = [[(ids == rank).nonzero() for rank in ranks] for ids, _ in axes]
    return all(
        len({int(place[0, axis]) for place in found if len(place)}) <= 1
        for (_, axis), found in zip(axes, places, strict=True)
    )


def refuse(params: Sequence[Tensor], what: str) -> None:
    """Raise where models that are sharded cannot be had.

    Raises:
        ArgumentError: a parameter is a `DTensor`.
    """
    for i, p in enumerate(params):
        if is_sharded(p):
            spec: Any = p
            raise ArgumentError(
                f"{what} cannot be had for models that are sharded: parameter {i} of shape {tuple(p.shape)} is a "
                f"DTensor, {spec.placements} on {spec.device_mesh}. FGD, FoMoH and FoMoHKD take it"
            )
