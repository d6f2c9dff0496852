"""Directions: K tangents for every parameter, drawn where they are needed.

Nothing is stored. The tangents of a parameter are a function of (seed, step, index of the parameter,
direction, element), so any of them can be drawn again: at the update, in another process, on another device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor

from .errors import ArgumentError, DTypeError, ShapeError, SingularPlaneError
from .laws import LAWS, Runs, coins, key, pieces, twists, windows
from .sharded import Part, Pieces, local, part_of, whole
from .tangents import Deferred, LowRank, Stacked, Tangents

Structure = Literal["dense", "rank-one", "low-rank", "sparse", "block"]

# The fourth moment of one entry, for rules that set the step size by it. "sphere": 3 P / (P + 2) for P
# parameters, here its limit.
KURTOSIS: dict[str, float] = {name: law.kurtosis for name, law in LAWS.items()} | {"sphere": 3.0}

_ELEMENT, _DIRECTION, _KEPT = 1, 2, 3  # what a key is for


def step_scale(law: str, size: int, k: int = 1) -> float:
    """How much shorter a step along the forward gradient must be than one along the gradient g itself.

        |g|^2 / E|G|^2,    G = mean_k (g . v_k) v_k,    E|G|^2 = (size + kurtosis + k - 2) / k |g|^2

    With a loss whose gradient is L-Lipschitz, `jetplane.optim.FGD` at the rate ``step_scale / L`` lowers the expected
    loss by ``step_scale |g|^2 / (2 L)`` a step, and no rate promises more. For k = 1 this is the variance
    ``1 / (d + kappa_4 - 1)`` of the tangents of which the source has the same step; tangents here have variance one.

    Args:
        law: of the tangents; see `Directions`. On the "sphere" E|G|^2 is ``(size + k - 1) / k |g|^2``: its entries
            depend on each other.
        size: of the gradient: the number of parameters that move.
        k: directions of a step.

    Raises:
        ArgumentError: an unknown law, size or k < 1.

    >>> step_scale("rademacher", 100), step_scale("laplace", 100)
    (0.01, 0.009523809523809525)

    Source: Shukla and Shin, arXiv 2310.14168.
    """
    if law not in KURTOSIS:
        raise ArgumentError(f"law must be one of {', '.join(KURTOSIS)}; got {law!r}")
    for name, value in (("size", size), ("k", k)):
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    kurtosis = 1.0 if law == "sphere" else KURTOSIS[law]
    return k / (size + kurtosis + k - 2)


class AbstractDirections(ABC):
    """K directions in the space of all parameters: what a plane is spanned by.

    Of a parameter that is a `DTensor` they have the part that this rank holds: read "this rank's part of the parameter"
    for "parameter" wherever its shape or elements are meant.
    """

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

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """The same as `draw`, not formed yet where that can wait; None where no direction moves the parameter."""
        return Deferred(lambda run: self.draw(index, param, run), local(param), self.k)

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
        tangents: how they are built, always with E[v v^T] = I.
            "dense": every entry drawn from the law.
            "rank-one": the tangent of a parameter with two or more dimensions, read as a matrix (shape[0],
            everything else), is ``a b^T``, with the entries of a and b drawn from the law; vectors stay dense.
            Products use the factors, so such tangents cost nearly nothing beside the plain forward.
            "low-rank": ``(a_1 b_1^T + ... + a_r b_r^T) / sqrt(r)``.
            "sparse": entries are kept with probability ``density``, and those divided by its root.
            "block": each direction moves one parameter alone, the next direction the next one, going on from
            step to step; times the root of their number.
        rank: r of "low-rank".
        density: of "sparse".
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

    def __init__(
        self, k: int, law: str = "gaussian", tangents: Structure = "dense", seed: int = 0,
        *, rank: int | None = None, density: float | None = None,
    ) -> None:  # fmt: skip
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"k, the number of directions, must be an integer of at least 1, got {k!r}")
        if law not in KURTOSIS:
            raise ArgumentError(f"law must be one of {', '.join(KURTOSIS)}; got {law!r}")
        if tangents not in get_args(Structure):
            raise ArgumentError(f"tangents must be one of {', '.join(get_args(Structure))}; got {tangents!r}")
        for name, value, needed in (("rank", rank, "low-rank"), ("density", density, "sparse")):
            if (value is None) != (tangents != needed):
                raise ArgumentError(f"{name} belongs to tangents={needed!r}; got {name}={value!r}, {tangents!r}")
        if rank is not None and rank < 1:
            raise ArgumentError(f"rank must be at least 1, got {rank}")
        if density is not None and not 0 < density <= 1:
            raise ArgumentError(f"density must be in (0, 1], got {density}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(f"seed must be an integer, got {seed!r}")
        self.k = k
        self.law = law
        self.structure: Structure = tangents
        self.rank = rank or 1
        self.density = density
        self.seed = seed
        self.step: int | Tensor = 0
        self._scales = torch.empty(0)  # of the sphere
        self._norms_of: tuple[int, int | Tensor] | None = None  # the seed and step they belong to
        self._order: dict[int, int] = {}  # of the parameters that blocks take turns in

    def __repr__(self) -> str:
        return f"Directions(k={self.k}, law={self.law!r}, tangents={self.structure!r}, seed={self.seed})"

    def is_low_rank(self, param: Tensor) -> bool:
        """Whether this parameter's tangents are sums of products ``a b^T``."""
        return self.structure in ("rank-one", "low-rank") and param.dim() > 1

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
        return self._scaled(flat, directions).reshape(len(flat), *local(param).shape)

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """Low-rank tangents as their factors, dense ones to be drawn later, None for a block that rests.

        Raises:
            ArgumentError: as `draw`.
        """
        if self.is_low_rank(param):
            left, right = self._factors(index, param, None)
            return LowRank(self._scaled(left.flatten(1)).view_as(left), right, local(param).shape)
        if self.structure == "block" and not self._moved(index, None):
            return None
        return super().structured(index, param)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype.

        The tangents are drawn again, a cache's size at a time, and never held.
        """
        work = _working_dtype(param)
        kappa = _checked(kappa, self.k).to(param.device, work, copy=True)
        kappa = self._scaled(kappa.unsqueeze(1)).squeeze(1)
        if self.is_low_rank(param):
            shape = local(param).shape
            return LowRank(*self._factors(index, param, None), shape).weighted(kappa).to(param.dtype)
        total = torch.zeros(local(param).numel(), dtype=work, device=param.device)
        for streams, place, values in self._entries(index, param, None):
            total[place] = torch.addmv(total[place], values.to(work).mT, kappa[streams])
        return total.reshape(local(param).shape).to(param.dtype)

    def materialize(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The same as `tangents`: what a plane would be spanned by in this step."""
        return self.tangents(params)

    def prepare(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Find what the draws of one step share: the order of blocks; for the law "sphere", the norms."""
        self._order = {index: n for n, index in enumerate(places or range(len(params)))}
        if self.law != "sphere" or self._norms_of == (self.seed, self.step):
            return
        squares = torch.zeros(self.k, dtype=torch.float64)
        for index, param in zip(places or range(len(params)), params, strict=True):
            norms = torch.linalg.vector_norm(self._flat(index, whole(param), None), dim=1, dtype=torch.float64)
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

    def _moved(self, index: int, directions: slice | None) -> list[int]:
        """Which of the chosen directions move this parameter, all of them unless they are blocks."""
        chosen = self._chosen(directions)
        if self.structure != "block":
            return list(range(len(chosen)))
        if index not in self._order:
            raise ArgumentError("blocks take turns over all parameters: call prepare(params) before drawing for one")
        step = int(self.step) * self.k
        return [n for n, i in enumerate(chosen) if (step + i) % len(self._order) == self._order[index]]

    def _flat(self, index: int, param: Tensor, directions: slice | None) -> Tensor:
        """Tangents (directions, elements) before the sphere's scaling."""
        if self.is_low_rank(param):
            left, right = self._factors(index, param, directions)
            return torch.bmm(left.mT, right).flatten(1)
        return self._gathered(self._entries(index, param, directions), local(param), local(param).numel(), directions)

    def _factors(self, index: int, param: Tensor, directions: slice | None) -> tuple[Tensor, Tensor]:
        """Left (directions, r, rows) and right (directions, r, columns)."""
        rows = param.shape[0]
        columns = param.numel() // max(rows, 1)
        size = self.rank * (rows + columns)
        numbers = self._gathered(self._pieces(index, param, size, directions), param, size, directions)
        left, right = numbers.unflatten(1, (self.rank, rows + columns)).split((rows, columns), 2)
        part = part_of(param)
        if part is not None:
            left, right = part.of_factors(left, right)
        return (left if self.rank == 1 else left / math.sqrt(self.rank)), right

    def _gathered(self, drawn: Pieces, like: Tensor, size: int, directions: slice | None) -> Tensor:
        """`size` numbers for each direction, in a dtype and on a device."""
        numbers = torch.empty(len(self._chosen(directions)), size, dtype=like.dtype, device=like.device)
        for streams, place, values in drawn:
            numbers[streams, place] = values if isinstance(place, slice) else values.to(like.dtype)
        return numbers

    def _entries(self, index: int, param: Tensor, directions: slice | None) -> Pieces:
        """The numbers of dense tangents."""
        return self._pieces(index, param, param.numel(), directions, part_of(param))

    def _pieces(
        self, index: int, param: Tensor, size: int, directions: slice | None, part: Part | None = None
    ) -> Pieces:
        """`size` numbers for each direction, or those of a part of them."""
        if not param.dtype.is_floating_point:
            raise DTypeError(f"parameter {index}: expected a floating dtype, got {param.dtype}")
        law = LAWS["gaussian" if self.law == "sphere" else self.law]
        stream = key(self.seed, self.step, index)
        apart = twists(key(stream, _DIRECTION), self._chosen(directions), param.device)
        begin, inside = key(stream, _ELEMENT), None if part is None else part.windows
        drawn: Pieces | None = None
        if inside is not None and self.structure != "sparse":
            drawn = windows(law, begin, apart, size, *inside)
        if drawn is None:
            runs = pieces(law, begin, apart, size, None if part is None else part.run)
            if self.structure == "sparse":
                runs = self._thinned(runs, key(stream, _KEPT), apart)
            drawn = runs if part is None else part.picked(runs)
        if self.structure == "block":
            scale = torch.zeros(len(self._chosen(directions)), 1, device=param.device)
            scale[self._moved(index, directions)] = math.sqrt(len(self._order))
            return ((streams, place, values * scale[streams]) for streams, place, values in drawn)
        return drawn

    def _thinned(self, drawn: Runs, start: int | Tensor, apart: Tensor) -> Runs:
        """Entries kept with probability ``density``, scaled to variance one."""
        assert self.density is not None
        for streams, place, values in drawn:
            kept = coins(start, apart[streams], place, self.density)
            yield streams, place, torch.where(kept, values / math.sqrt(self.density), 0)

    def _chosen(self, directions: slice | None) -> range:
        return range(self.k)[directions or slice(None)]


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
        held, kappa = self.structured(index, param), _checked(kappa, self.k)
        if isinstance(held, LowRank):
            return held.weighted(kappa.to(param.device, _working_dtype(param))).to(param.dtype)
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
        parts = _checked(kappa, self.k).split([source.k for source in self.sources])
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
            flat = self._source.draw(index, whole(param)).reshape(self.k, -1).double()
            gram += (flat @ flat.mT).cpu()
        triangle, failed = torch.linalg.cholesky_ex(gram)
        diagonal = triangle.diagonal()
        if int(failed) or bool((diagonal <= 1e-6 * gram.diagonal().sqrt()).any()):
            raise SingularPlaneError(f"{self.k} directions are to be made orthogonal, but depend on each other")
        size = sum(param.numel() for param in params)
        self._turn = torch.linalg.solve_triangular(triangle, math.sqrt(size) * torch.eye(self.k).double(), upper=False)

    def _turned(self) -> Tensor:
        if self._turn is None:
            raise ArgumentError("directions are orthogonal over all parameters: call prepare(params) before drawing")
        return self._turn

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""
        turn = self._turned()[directions or slice(None)].to(param.device, _working_dtype(param))
        drawn = self._source.draw(index, param)
        return torch.tensordot(turn, drawn.to(turn.dtype), 1).to(param.dtype)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype."""
        turn = self._turned().to(kappa.device)
        return self._source.combine(index, param, turn.mT @ _checked(kappa, self.k).double())


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
        for run, part in zip(self._runs, _checked(kappa, self.k).split(self._each), strict=True):
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
            return weighted_sum(_checked(kappa, self.k), held)
        return self._source.combine(self._places[index], param, kappa)


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
