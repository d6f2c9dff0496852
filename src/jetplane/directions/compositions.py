"""Directions made of others: given ones, one source behind the other, some of a source, cached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from .._sharding import local, part_of
from ..errors import ArgumentError, ShapeError
from ..jets import Deferred, LowRank, Partial, Stacked, Tangents
from .base import AbstractDirections, checked, weighted_sum, working_dtype


def materialized(tangents: Tensor | Tangents) -> Tensor:
    """The tensor (K, *S)."""
    return tangents.materialized() if isinstance(tangents, Tangents) else tangents


def concatenated(pieces: Sequence[tuple[int, Tensor | Tangents | None]], param: Tensor) -> Tensor | Tangents | None:
    """Tangents of one parameter, one piece behind the other, each with its number of directions.

    Factors stay factors, and directions that do not move the parameter (None, or absent from a `Partial`) stay absent.
    """
    rows: list[int] = []
    there: list[Tensor | Tangents] = []
    start = 0
    for k, tangents in pieces:
        if isinstance(tangents, Partial):
            rows += [start + row for row in tangents.rows]
            there.append(tangents.tangents)
        elif tangents is not None:
            rows += range(start, start + k)
            there.append(tangents)
        start += k
    if not rows:
        return None
    one = _joined([t for t in there if t.shape[0]], param)
    return one if len(rows) == start else Partial(start, rows, one)


def _joined(pieces: list[Tensor | Tangents], param: Tensor) -> Tensor | Tangents:
    if len(pieces) == 1:
        return pieces[0]
    factors = [piece for piece in pieces if isinstance(piece, LowRank)]
    if len(factors) == len(pieces) and len({piece.left.shape[1] for piece in factors}) == 1:
        left, right = (torch.cat([getattr(f, side) for f in factors]) for side in ("left", "right"))
        return LowRank(left, right, factors[0].shape[1:])
    together = Stacked(pieces)
    if factors:
        return together
    return Deferred(lambda run: materialized(together[run]), local(param), together.shape[0])


@final
class StoredDirections(AbstractDirections):
    """Given directions, such as a gradient or previous steps.

    Args:
        tangents: for each parameter one tensor (K, *param.shape), or `jetplane.LowRank`: in their order, or by
            their indices. A parameter whose index is left out does not move.
    """

    cacheable = False

    def __init__(self, tangents: Sequence[Tensor | Tangents] | Mapping[int, Tensor | Tangents]) -> None:
        held = dict(tangents) if isinstance(tangents, Mapping) else dict(enumerate(tangents))
        counts = {t.shape[0] if len(t.shape) else 0 for t in held.values()}
        if len(counts) != 1 or 0 in counts:
            raise ShapeError(
                "expected one tensor (K, *param.shape) for each parameter, with one K of at least 1; got "
                f"shapes {[tuple(t.shape) for t in held.values()]}"
            )
        self.k = counts.pop()
        self._tangents = held

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        held = self.structured(index, param)
        if held is None:
            here = local(param)
            return here.new_zeros(self.k, *here.shape)[directions or slice(None)]
        return materialized(held)[directions or slice(None)]

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """What was given."""
        held, part = self._tangents.get(index), part_of(param)
        if part is None or held is None:
            return held
        if isinstance(held, LowRank):
            return LowRank(*part.of_factors(held.left, held.right), part.shape)
        return part.of(materialized(held))

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        held, kappa = self.structured(index, param), checked(kappa, self.k)
        if isinstance(held, LowRank):
            return held.weighted(kappa.to(param.device, working_dtype(param))).to(param.dtype)
        return weighted_sum(kappa, self.draw(index, param))


@final
class ConcatenatedDirections(AbstractDirections):
    """The directions of several sources, one after the other: for example previous steps, then drawn directions.

    Args:
        sources: at least one.

    >>> import torch, jetplane as jp
    >>> w = torch.zeros(3)
    >>> both = ConcatenatedDirections([StoredDirections([torch.ones(1, 3)]), jp.Directions(2)])
    >>> both.k, both.combine(0, w, torch.tensor([5.0, 0.0, 0.0]))
    (3, tensor([5., 5., 5.]))
    """

    def __init__(self, sources: Sequence[AbstractDirections]) -> None:
        if not sources:
            raise ArgumentError("expected at least one source of directions to concatenate, got none")
        self.sources = list(sources)
        self.k = sum(source.k for source in sources)
        self.isotropic = all(source.isotropic for source in sources)
        self.cacheable = any(source.cacheable for source in sources)

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Prepare every source."""
        for source in self.sources:
            source.prepare(params, places)

    def forget(self) -> None:
        """Let every source forget."""
        for source in self.sources:
            source.forget()

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """Those of every source."""
        return torch.cat([source.squared_norms(params, places) for source in self.sources])

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        if len(self.sources) == 1:
            return self.sources[0].draw(index, param, directions)
        every = torch.cat([source.draw(index, param) for source in self.sources])
        return every[directions or slice(None)]

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """Each source's own, one behind the other."""
        return concatenated([(source.k, source.structured(index, param)) for source in self.sources], param)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        parts = checked(kappa, self.k).split([source.k for source in self.sources])
        combined = [source.combine(index, param, part) for source, part in zip(self.sources, parts, strict=True)]
        return torch.stack(combined).sum(0)


@final
class SelectedDirections(AbstractDirections):
    """Some of another's directions: consecutive runs of them.

    Args:
        source: where tangents come from.
        runs: which of its directions, in this order.
    """

    def __init__(self, source: AbstractDirections, runs: Sequence[slice]) -> None:
        self._source, self._runs = source, list(runs)
        self._each = [len(range(source.k)[run]) for run in runs]
        self.k = sum(self._each)
        self.isotropic, self.cacheable = source.isotropic, source.cacheable

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Prepare the source."""
        self._source.prepare(params, places)

    def forget(self) -> None:
        """Let the source forget."""
        self._source.forget()

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """Those of the source's directions that are selected."""
        every = self._source.squared_norms(params, places)
        return torch.cat([every[run] for run in self._runs])

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        drawn = [self._source.draw(index, param, run) for run in self._runs]
        return (drawn[0] if len(drawn) == 1 else torch.cat(drawn))[directions or slice(None)]

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """The source's own: factors stay factors."""
        every = self._source.structured(index, param)
        if every is None:
            return None
        return concatenated([(k, every[run]) for k, run in zip(self._each, self._runs, strict=True)], param)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        every = kappa.new_zeros(self._source.k)
        for run, part in zip(self._runs, checked(kappa, self.k).split(self._each), strict=True):
            every[run] = part
        return self._source.combine(index, param, every)


@final
class SpannedDirections(AbstractDirections):
    """``v = R A^T``, with A an orthonormal basis of a subspace in which the rows of a matrix may move.

        E[v v^T] = I (x) A A^T

    if R has ``E[R R^T] = I``: forward gradients ``mean_k (F_k v_k)`` estimate the gradient's part in the subspace,
    without bias, and nothing of the rest. It is all of the gradient where A spans the inputs of a linear layer.

    Args:
        source: where R, (K, rows, rank), comes from, and the directions of parameters without a basis.
        bases: matrices A, (columns, rank), by the index of parameters.

    >>> import torch, jetplane as jp
    >>> w = torch.zeros(3, 2)
    >>> directions = SpannedDirections(jp.Directions(4), {0: torch.tensor([[0.6], [0.8]])})
    >>> v = directions.draw(0, w)
    >>> torch.allclose(v[..., 1] / v[..., 0], torch.tensor(4 / 3))
    True

    Source: AGZO, arXiv 2601.17261.
    """

    def __init__(self, source: AbstractDirections, bases: Mapping[int, Tensor]) -> None:
        self.k, self.isotropic, self.cacheable = source.k, source.isotropic, source.cacheable
        self._source, self._bases = source, bases

    def _inner(self, index: int, param: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the source draws for, and the basis."""
        basis = self._bases.get(index)
        if basis is None:
            return param, None
        if basis.dim() != 2 or param.shape[1:].numel() != basis.shape[0] or param.dim() < 2:
            raise ShapeError(
                f"parameter {index} of shape {tuple(param.shape)}: expected a basis ({param.shape[1:].numel()}, rank), "
                f"got {tuple(basis.shape)}"
            )
        return param.new_empty(len(param), basis.shape[1]), basis.to(param)

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Prepare the source."""
        places = places or range(len(params))
        self._source.prepare([self._inner(i, p)[0] for i, p in zip(places, params, strict=True)], places)

    def forget(self) -> None:
        """Let the source forget."""
        self._source.forget()

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """Those of R: A is orthonormal."""
        places = places or range(len(params))
        return self._source.squared_norms([self._inner(i, p)[0] for i, p in zip(places, params, strict=True)], places)

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        inner, basis = self._inner(index, param)
        drawn = self._source.draw(index, inner, directions)
        return drawn if basis is None else (drawn @ basis.mT).reshape(len(drawn), *param.shape)

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """R and A as factors."""
        inner, basis = self._inner(index, param)
        if basis is None:
            return self._source.structured(index, param)
        left = self._source.draw(index, inner).mT
        return LowRank(left, basis.mT.expand(self.k, -1, -1), param.shape)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        inner, basis = self._inner(index, param)
        combined = self._source.combine(index, inner, kappa)
        return combined if basis is None else (combined @ basis.mT).reshape(param.shape)


@final
class CachedDirections(AbstractDirections):
    """The tangents of given parameters in one step: kept once drawn while they fit, drawn again otherwise.

    What is kept spares the next drawing: at the update, or where a layer is used more than once. Directions that are
    not `cacheable` are not kept.

    Args:
        source: where tangents come from.
        params: all the parameters of a step.
        places: the index by which the source knows each of them; 0, 1, 2, ... by default.
        limit: bytes to keep in all.

    Attributes:
        used: the indices of the parameters whose tangents were asked for by an evaluation.
    """

    def __init__(
        self,
        source: AbstractDirections,
        params: Sequence[Tensor],
        places: Sequence[int] | None = None,
        limit: float = math.inf,
    ) -> None:
        self.k, self.isotropic, self.cacheable = source.k, source.isotropic, False
        self.used: set[int] = set()
        self._source = source
        self._places = range(len(params)) if places is None else places
        self._held: dict[int, Tensor] = {}
        self._room = limit if source.cacheable else 0
        source.prepare(params, places)

    def forget(self) -> None:
        """Keep nothing of what was drawn so far."""
        self._room += sum(held.nbytes for held in self._held.values())
        self._held.clear()
        self._source.forget()

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """Those of the source."""
        return self._source.squared_norms(params, [self._places[i] for i in places or range(len(params))])

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        held = self._kept(index, param)
        if held is not None:
            return held[directions or slice(None)]
        size = self.k * local(param).numel() * param.element_size()
        if index in self._held or size > self._room:
            return self._source.draw(self._places[index], param, directions)
        self._held[index] = self._source.draw(self._places[index], param)
        self._room -= size
        return self._held[index][directions or slice(None)]

    def _kept(self, index: int, param: Tensor) -> Tensor | None:
        """The tangents that are kept of a parameter; of a part of it, if those of the whole are."""
        held = self._held.get(index)
        if held is None or held.shape[1:] == local(param).shape:
            return held
        part = part_of(param)
        return part.of(held) if part is not None and held.shape[1:] == part.whole else None

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """As the source has them; `used` collects the parameters that were asked for."""
        self.used.add(index)
        structured = self._source.structured(self._places[index], param)
        cached = isinstance(structured, Deferred) and self._source.cacheable
        return super().structured(index, param) if cached else structured

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        held = self._kept(index, param)
        if held is not None:
            return weighted_sum(checked(kappa, self.k), held)
        return self._source.combine(self._places[index], param, kappa)
