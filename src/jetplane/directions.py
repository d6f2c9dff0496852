"""Directions: K tangents for every parameter, drawn where they are needed.

Nothing is stored. The tangents of a parameter are a function of (seed, step, index of the parameter,
direction, element), so any of them can be drawn again: at the update, in another process, on another device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from .errors import ArgumentError, DTypeError, ShapeError
from .laws import LAWS, key, pieces, twists

Structure = Literal["dense", "rank-one"]

# The fourth moment of one entry, for rules that set the step size by it. "sphere": 3 P / (P + 2) for P
# parameters, here its limit.
KURTOSIS: dict[str, float] = {name: law.kurtosis for name, law in LAWS.items()} | {"sphere": 3.0}

_ELEMENT, _DIRECTION = 1, 2  # what a key is for


class AbstractDirections(ABC):
    """K directions in the space of all parameters: what a plane is spanned by."""

    k: int

    @abstractmethod
    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""

    @abstractmethod
    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""

    def prepare(  # noqa: B027 (most have nothing to prepare)
        self, params: Sequence[Tensor], places: Sequence[int] | None = None
    ) -> None:
        """Called before one step's draws with all its parameters, and their indices if not 0, 1, 2, ..."""

    def tangents(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The tangents of all parameters: one tensor (K, *param.shape) for each."""
        self.prepare(params)
        return [self.draw(index, param) for index, param in enumerate(params)]


@final
class Directions(AbstractDirections):
    """K random directions, each entry of mean zero and variance one.

    Args:
        k: how many.
        law: "gaussian", "rademacher" (signs), "uniform", "laplace", "semicircle" (Wigner's) or "sphere"
            (Gaussian, then scaled to norm sqrt(P) over all P parameters together).
        tangents: "dense", or "rank-one": the tangent of a parameter with two or more dimensions, read as a
            matrix (shape[0], everything else), is ``a b^T``, with the entries of a and b drawn from the law;
            vectors stay dense.
        seed: any integer of 64 bits.

    Attributes:
        step: which draw this is. Whoever owns the directions moves it on; equal steps give equal numbers.

    The numbers do not depend on torch's generators, on the device (up to the rounding of log, sin and cos),
    on the dtype (they are drawn in float32 and cast), nor on which part is asked for. They do
    depend on the parameter's number of elements.

    >>> import torch, jetplane as jp
    >>> w = torch.zeros(3, 2)
    >>> directions = jp.Directions(4, seed=1)
    >>> v = directions.draw(0, w)
    >>> v.shape
    torch.Size([4, 3, 2])
    >>> torch.equal(directions.draw(0, w, slice(2, 3)), v[2:3])
    True
    """

    def __init__(self, k: int, law: str = "gaussian", tangents: Structure = "dense", seed: int = 0) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"k, the number of directions, must be an integer of at least 1, got {k!r}")
        if law not in KURTOSIS:
            raise ArgumentError(f"law must be one of {', '.join(KURTOSIS)}; got {law!r}")
        if tangents not in ("dense", "rank-one"):
            raise ArgumentError(f"tangents must be 'dense' or 'rank-one', got {tangents!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(f"seed must be an integer, got {seed!r}")
        self.k = k
        self.law = law
        self.structure: Structure = tangents
        self.seed = seed
        self.step: int | Tensor = 0
        self._scales = torch.empty(0)  # of the sphere
        self._norms_of: tuple[int, int | Tensor] | None = None  # the seed and step they belong to

    def __repr__(self) -> str:
        return f"Directions(k={self.k}, law={self.law!r}, tangents={self.structure!r}, seed={self.seed})"

    def is_rank_one(self, param: Tensor) -> bool:
        """Whether this parameter's tangents are products ``a b^T``."""
        return self.structure == "rank-one" and param.dim() > 1

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents of one parameter.

        Args:
            index: the parameter's place among all parameters.
            param: gives shape, dtype and device; its values are not looked at.
            directions: which of the K; all by default.

        Returns:
            A tensor of shape (directions, *param.shape).

        Raises:
            DTypeError: the parameter is not of a floating dtype.
            ArgumentError: the law is "sphere", and `prepare` was not called in this step.
        """
        flat = self._flat(index, param, directions)
        return self._scaled(flat, directions).reshape(len(flat), *param.shape)

    def factors(self, index: int, param: Tensor, directions: slice | None = None) -> tuple[Tensor, Tensor]:
        """The factors of rank-one tangents: a (directions, rows) and b (directions, columns).

        The tangent is ``a b^T``, shaped as the parameter.

        Raises:
            ArgumentError: the tangents of this parameter are dense.
        """
        if not self.is_rank_one(param):
            raise ArgumentError(
                f"parameter {index} of shape {tuple(param.shape)} has no factors: its tangents are dense"
            )
        a, b = self._factors(index, param, directions)
        return self._scaled(a, directions), b

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype.

        The tangents are drawn again, a cache's size at a time, and never held.
        """
        work = _working_dtype(param)
        kappa = _checked(kappa, self.k).to(param.device, work, copy=True)
        kappa = self._scaled(kappa.unsqueeze(1)).squeeze(1)
        if self.is_rank_one(param):
            a, b = self._factors(index, param, None)
            total = (a.to(work).mT * kappa) @ b.to(work)
        else:
            total = torch.zeros(param.numel(), dtype=work, device=param.device)
            for streams, place, values in self._pieces(index, param, param.numel(), None):
                total[place].addmv_(values.to(work).mT, kappa[streams])
        return total.reshape(param.shape).to(param.dtype)

    def materialize(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The same as `tangents`: what a plane would be spanned by in this step."""
        return self.tangents(params)

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Find what the draws of one step share: for the law "sphere", the norms; else nothing."""
        if self.law != "sphere" or self._norms_of == (self.seed, self.step):
            return
        squares = torch.zeros(self.k, dtype=torch.float64)
        for index, param in zip(places or range(len(params)), params, strict=True):
            norms = torch.linalg.vector_norm(self._flat(index, param, None), dim=1, dtype=torch.float64)
            squares += norms.square().cpu()
        self._scales = (sum(param.numel() for param in params) / squares).sqrt_()
        self._norms_of = (self.seed, self.step)

    def _scaled(self, numbers: Tensor, directions: slice | None = None) -> Tensor:
        if self.law != "sphere":
            return numbers
        if self._norms_of != (self.seed, self.step):
            raise ArgumentError(
                "the law 'sphere' is scaled over all parameters together: call prepare(params) or "
                "tangents(params) in this step before drawing for one of them"
            )
        scales = self._scales[directions or slice(None)]
        return numbers.mul_(scales.to(numbers.device, numbers.dtype).unsqueeze(1))

    def _flat(self, index: int, param: Tensor, directions: slice | None) -> Tensor:
        """Tangents (directions, elements) before the sphere's scaling."""
        if self.is_rank_one(param):
            a, b = self._factors(index, param, directions)
            return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
        return self._numbers(index, param, param.numel(), directions)

    def _factors(self, index: int, param: Tensor, directions: slice | None) -> tuple[Tensor, Tensor]:
        rows = param.shape[0]
        columns = param.numel() // max(rows, 1)
        numbers = self._numbers(index, param, rows + columns, directions)
        return numbers[:, :rows], numbers[:, rows:]

    def _numbers(self, index: int, param: Tensor, size: int, directions: slice | None) -> Tensor:
        """`size` numbers for each direction, in the parameter's dtype."""
        count = len(self._chosen(directions))
        numbers = torch.empty(count, size, dtype=param.dtype, device=param.device)
        for streams, place, values in self._pieces(index, param, size, directions):
            numbers[streams, place] = values
        return numbers

    def _pieces(
        self, index: int, param: Tensor, size: int, directions: slice | None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        if not param.dtype.is_floating_point:
            raise DTypeError(f"parameter {index}: expected a floating dtype, got {param.dtype}")
        law = LAWS["gaussian" if self.law == "sphere" else self.law]
        stream = key(self.seed, self.step, index)
        apart = twists(key(stream, _DIRECTION), self._chosen(directions), param.device)
        return pieces(law, key(stream, _ELEMENT), apart, size)

    def _chosen(self, directions: slice | None) -> range:
        return range(self.k)[directions or slice(None)]


@final
class StoredDirections(AbstractDirections):
    """Directions that are given: a gradient, previous steps, a guess.

    Args:
        tangents: one tensor (K, *param.shape) for each parameter: in their order, or by their indices.
    """

    def __init__(self, tangents: Sequence[Tensor] | Mapping[int, Tensor]) -> None:
        held = dict(tangents) if isinstance(tangents, Mapping) else dict(enumerate(tangents))
        counts = {len(t) if t.dim() else 0 for t in held.values()}
        if len(counts) != 1 or 0 in counts:
            raise ShapeError(
                "expected one tensor (K, *param.shape) for each parameter, with one K of at least 1; got "
                f"shapes {[tuple(t.shape) for t in held.values()]}"
            )
        self.k = counts.pop()
        self._tangents = held

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        return self._tangents[index][directions or slice(None)]

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        return weighted_sum(_checked(kappa, self.k), self._tangents[index])


@final
class MixedDirections(AbstractDirections):
    """The directions of several sources, one behind the other: say, previous steps beside drawn ones.

    Args:
        sources: at least one.

    >>> import torch, jetplane as jp
    >>> w = torch.zeros(3)
    >>> mixed = MixedDirections([StoredDirections([torch.ones(1, 3)]), jp.Directions(2)])
    >>> mixed.k, mixed.combine(0, w, torch.tensor([5.0, 0.0, 0.0]))
    (3, tensor([5., 5., 5.]))
    """

    def __init__(self, sources: Sequence[AbstractDirections]) -> None:
        if not sources:
            raise ArgumentError("expected at least one source of directions to mix, got none")
        self.sources = list(sources)
        self.k = sum(source.k for source in sources)

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Prepare every source."""
        for source in self.sources:
            source.prepare(params, places)

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        every = torch.cat([source.draw(index, param) for source in self.sources])
        return every[directions or slice(None)]

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        parts = _checked(kappa, self.k).split([source.k for source in self.sources])
        combined = [source.combine(index, param, part) for source, part in zip(self.sources, parts, strict=True)]
        return torch.stack(combined).sum(0)


@final
class HeldDirections(AbstractDirections, Sequence[Tensor]):
    """The tangents of given parameters, drawn when first asked for and kept until this object goes.

    One copy of the tangents in memory spares the second drawing at the update. As a sequence: the tangents of
    each parameter.

    Args:
        source: where tangents come from.
        params: all the parameters of a step.
        places: the index by which the source knows each of them; 0, 1, 2, ... by default.
    """

    def __init__(
        self, source: AbstractDirections, params: Sequence[Tensor], places: Sequence[int] | None = None
    ) -> None:
        self.k = source.k
        self._source = source
        self._params = list(params)
        self._places = range(len(params)) if places is None else places
        self._held: dict[int, Tensor] = {}
        source.prepare(params, places)

    def __len__(self) -> int:
        return len(self._params)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return [self[i] for i in index] if isinstance(index, range) else self.draw(index, self._params[index])

    @property
    def used(self) -> set[int]:
        """The indices of the parameters for which tangents were drawn: those that the loss made use of."""
        return set(self._held)

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        if index not in self._held:
            self._held[index] = self._source.draw(self._places[index], param)
        return self._held[index][directions or slice(None)]

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        return weighted_sum(_checked(kappa, self.k), self.draw(index, param))


def weighted_sum(weights: Tensor, tensors: Tensor) -> Tensor:
    """``sum_k weights[k] tensors[k]``, summed in single precision at least, without a copy of them all."""
    work = _working_dtype(tensors)
    weights = weights.to(tensors.device, work)
    if work == tensors.dtype:
        return torch.tensordot(weights, tensors, 1)
    total = torch.zeros(tensors.shape[1:], dtype=work, device=tensors.device)
    for weight, tensor in zip(weights, tensors, strict=True):
        total.addcmul_(tensor, weight)
    return total.to(tensors.dtype)


def _working_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def _checked(kappa: Tensor, k: int) -> Tensor:
    if kappa.shape != (k,):
        raise ShapeError(f"kappa: expected shape {(k,)}, got {tuple(kappa.shape)}")
    return kappa
