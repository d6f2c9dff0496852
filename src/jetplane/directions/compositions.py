"""Directions made of others: given, side by side, orthogonal, scaled, chosen, cached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from .._sharding import local, part_of, whole
from ..errors import ArgumentError, ShapeError, SingularPlaneError
from ..jets.structured import Deferred, LowRank, Stacked, Tangents
from .base import AbstractDirections, as_real, checked, weighted_sum, working_dtype


@final
class StoredDirections(AbstractDirections):
    """Directions that are given: a gradient, previous steps, a guess.

    Args:
        tangents: for each parameter one tensor (K, *param.shape), or `jetplane.LowRank`: in their order, or by
            their indices.
    """

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
        return (held.formed() if isinstance(held, Tangents) else held)[directions or slice(None)]

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents:
        """What was given."""
        held, part = self._tangents[index], part_of(param)
        if part is None:
            return held
        if isinstance(held, LowRank):
            return LowRank(*part.of_factors(held.left, held.right), part.shape)
        return part.of(held.formed() if isinstance(held, Tangents) else held)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        held, kappa = self.structured(index, param), checked(kappa, self.k)
        if isinstance(held, LowRank):
            return held.weighted(kappa.to(param.device, working_dtype(param))).to(param.dtype)
        return weighted_sum(kappa, self.draw(index, param))


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
        if len(self.sources) == 1:
            return self.sources[0].draw(index, param, directions)
        every = torch.cat([source.draw(index, param) for source in self.sources])
        return every[directions or slice(None)]

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """Each source's own, one behind the other, where one of them has factors."""
        parts = [source.structured(index, param) for source in self.sources]
        if any(isinstance(part, LowRank) for part in parts):
            pairs = zip(parts, self.sources, strict=True)
            return Stacked([source.draw(index, param) if part is None else part for part, source in pairs])
        return super().structured(index, param)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        parts = checked(kappa, self.k).split([source.k for source in self.sources])
        combined = [source.combine(index, param, part) for source, part in zip(self.sources, parts, strict=True)]
        return torch.stack(combined).sum(0)


@final
class OrthogonalDirections(AbstractDirections):
    """Another's directions made orthogonal over all parameters together, each of norm ``sqrt(P)`` for P parameters.

        V' = sqrt(P) L^-1 V,    V V^T = L L^T

    which is Gram-Schmidt: they span the same plane, so that descents which do not mind the lengths and angles of
    directions (Newton) take the same step. What changes is what does mind: damping, and the forward gradient
    ``mean_k (F_k v_k)``, which is then ``P / K`` times the projection of the gradient onto the plane, without the
    variance of overlapping directions. Of Gaussian directions it makes uniformly distributed ones.
    The combinations of rank-one or sparse tangents are dense: their products cost what dense ones do.

    Args:
        source: what is to be made orthogonal; at most as many directions as there are parameters.

    Raises:
        SingularPlaneError: (of `prepare`) the directions depend on each other.

    >>> import torch, jetplane as jp
    >>> directions = OrthogonalDirections(jp.Directions(2))
    >>> v = torch.cat([t.flatten(1) for t in directions.tangents([torch.zeros(3, 4), torch.zeros(8)])], 1)
    >>> (v @ v.mT).round(decimals=3).abs()
    tensor([[20.,  0.],
            [ 0., 20.]])

    Source: Choromanski et al., arXiv 1804.02395, for orthogonal directions in gradient estimates.
    """

    def __init__(self, source: AbstractDirections) -> None:
        self._source = source
        self.k = source.k
        self._turn: Tensor | None = None

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Find the combinations that are orthogonal, by one draw of all directions."""
        self._source.prepare(params, places)
        gram = torch.zeros(self.k, self.k, dtype=torch.float64)
        for index, param in zip(places or range(len(params)), params, strict=True):
            flat = as_real(self._source.draw(index, whole(param))).reshape(self.k, -1).double()
            gram += (flat @ flat.mT).cpu()
        triangle, failed = torch.linalg.cholesky_ex(gram)
        diagonal = triangle.diagonal()
        if int(failed) or bool((diagonal <= 1e-6 * gram.diagonal().sqrt()).any()):
            raise SingularPlaneError(f"{self.k} directions are to be made orthogonal, but depend on each other")
        size = sum(as_real(param).numel() for param in params)
        self._turn = torch.linalg.solve_triangular(triangle, math.sqrt(size) * torch.eye(self.k).double(), upper=False)

    def _turned(self) -> Tensor:
        if self._turn is None:
            raise ArgumentError("directions are orthogonal over all parameters: call prepare(params) before drawing")
        return self._turn

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        turn = self._turned()[directions or slice(None)].to(param.device, working_dtype(param))
        drawn = self._source.draw(index, param)
        return torch.tensordot(turn, drawn.to(turn.dtype), 1).to(param.dtype)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        turn = self._turned().to(kappa.device)
        return self._source.combine(index, param, turn.mT @ checked(kappa, self.k).double())


@final
class ScaledDirections(AbstractDirections):
    """Another's directions with each entry multiplied by a scale: longer where a parameter may go far.

    With one over the root of a running mean square, or of a diagonal of the curvature, that is a diagonal
    preconditioner: directions look for what is likely to help. The forward gradient of such directions is the
    gradient times the squares of the scales. Rank-one tangents become dense.

    Args:
        source: what is to be scaled.
        scales: positive tensors of the parameters' shapes, by their indices; others are not scaled.

    >>> import torch, jetplane as jp
    >>> w = torch.zeros(2)
    >>> scaled = ScaledDirections(StoredDirections([torch.ones(1, 2)]), {0: torch.tensor([1.0, 3.0])})
    >>> scaled.draw(0, w), scaled.combine(0, w, torch.tensor([2.0]))
    (tensor([[1., 3.]]), tensor([2., 6.]))

    Source: Adam's diagonal, arXiv 1412.6980, on drawn directions.
    """

    def __init__(self, source: AbstractDirections, scales: Mapping[int, Tensor]) -> None:
        self._source, self._scales = source, dict(scales)
        self.k = source.k

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Prepare the source.

        Raises:
            ShapeError: a scale does not have its parameter's shape.
        """
        for index, param in zip(places or range(len(params)), params, strict=True):
            if index in self._scales and self._scales[index].shape != param.shape:
                got = tuple(self._scales[index].shape)
                raise ShapeError(f"scale of parameter {index}: expected shape {tuple(param.shape)}, got {got}")
        self._source.prepare(params, places)

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        return self._scaled(index, param, self._source.draw(index, param, directions))

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        return self._scaled(index, param, self._source.combine(index, param, kappa))

    def _scaled(self, index: int, param: Tensor, numbers: Tensor) -> Tensor:
        if index not in self._scales:
            return numbers
        scale, part = self._scales[index], part_of(param)
        return numbers * (scale if part is None else scale[part.box]).to(numbers.dtype)


@final
class ChosenDirections(AbstractDirections):
    """Some of another's directions: consecutive runs of them.

    Args:
        source: where tangents come from.
        runs: which of its directions, in this order.
    """

    def __init__(self, source: AbstractDirections, runs: Sequence[slice]) -> None:
        self._source, self._runs = source, list(runs)
        self._each = [len(range(source.k)[run]) for run in runs]
        self.k = sum(self._each)

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Prepare the source."""
        self._source.prepare(params, places)

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        drawn = [self._source.draw(index, param, run) for run in self._runs]
        return (drawn[0] if len(drawn) == 1 else torch.cat(drawn))[directions or slice(None)]

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """Factors stay factors."""
        whole = self._source.structured(index, param)
        if isinstance(whole, LowRank):
            left, right = (torch.cat([f[run] for run in self._runs]) for f in (whole.left, whole.right))
            return LowRank(left, right, whole.shape[1:])
        if isinstance(whole, Stacked) and len(self._runs) == 1:
            return whole[self._runs[0]]
        return None if whole is None else super().structured(index, param)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        whole = kappa.new_zeros(self._source.k)
        for run, part in zip(self._runs, checked(kappa, self.k).split(self._each), strict=True):
            whole[run] = part
        return self._source.combine(index, param, whole)


@final
class HeldDirections(AbstractDirections):
    """The tangents of given parameters in one step: kept once drawn while they fit, drawn again otherwise.

    What is kept spares the next drawing: at the update, or where a layer is used more than once.

    Args:
        source: where tangents come from.
        params: all the parameters of a step.
        places: the index by which the source knows each of them; 0, 1, 2, ... by default.
        limit: bytes to keep in all.
    """

    def __init__(
        self,
        source: AbstractDirections,
        params: Sequence[Tensor],
        places: Sequence[int] | None = None,
        limit: float = math.inf,
    ) -> None:
        self.k = source.k
        self.used: set[int] = set()
        self._source = source
        self._places = range(len(params)) if places is None else places
        self._held: dict[int, Tensor] = {}
        self._room = limit
        source.prepare(params, places)

    def forget(self) -> None:
        """Keep nothing of what was drawn so far."""
        self._room += sum(held.nbytes for held in self._held.values())
        self._held.clear()

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
        return super().structured(index, param) if isinstance(structured, Deferred) else structured

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        held = self._kept(index, param)
        if held is not None:
            return weighted_sum(checked(kappa, self.k), held)
        return self._source.combine(self._places[index], param, kappa)
