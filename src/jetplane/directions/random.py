"""Directions that are drawn at random: K tangents for every parameter, drawn where they are needed.

Nothing is stored. The tangents of a parameter are a function of (seed, step, index of the parameter,
direction, element), so any of them can be drawn again: at the update, in another process, on another device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor

from .._sharding import Part, Pieces, Runs, local, part_of, whole
from ..errors import ArgumentError, DTypeError
from ..jets import LowRank, Tangents
from .base import AbstractDirections, as_real, checked, working_dtype
from .laws import LAWS, coins, key, pieces, twists, windows

Structure = Literal["dense", "rank-one", "low-rank", "sparse", "inputs"]

# The fourth moment of one entry, for rules that set the step size by it. "sphere": 3 P / (P + 2) for P
# parameters, here its limit.
KURTOSIS: dict[str, float] = {name: law.kurtosis for name, law in LAWS.items()} | {"sphere": 3.0}

_ELEMENT, _DIRECTION, _KEPT = 1, 2, 3  # what a key is for


def step_scale(law: str, size: int, k: int = 1) -> float:
    """How much shorter a step along the forward gradient must be than one along the gradient g itself.

        |g|^2 / E|G|^2,    G = mean_k (g . v_k) v_k,    E|G|^2 = (size + kurtosis + k - 2) / k |g|^2

    With a loss whose gradient is L-Lipschitz, `jetplane.optim.FGD` at the rate ``step_scale / L`` lowers the expected
    loss by ``step_scale |g|^2 / (2 L)`` per step, and no other rate guarantees more. For k = 1 this equals the variance
    ``1 / (d + kappa_4 - 1)`` that the source chooses for its tangents; tangents here have variance one.

    Args:
        law: distribution of the tangents; see `Directions`. On the "sphere" E|G|^2 is ``(size + k - 1) / k |g|^2``,
            since its entries depend on each other.
        size: size of the gradient: the number of parameters that move.
        k: number of directions per step.

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
            Products use the factors, so such tangents cost little more than the plain forward pass.
            "low-rank": ``(a_1 b_1^T + ... + a_r b_r^T) / sqrt(r)``.
            "sparse": entries are kept with probability ``density`` and divided by its root.
            ("inputs" needs a batch: optimizers and `jetplane.sources.Drawn` take it.)
        rank: r of "low-rank".
        density: probability of "sparse".
        seed: any integer, taken modulo 2^64.

    Attributes:
        step: number of the draw. The owner of the directions increments it; equal steps give equal numbers.

    The real and imaginary parts of a complex parameter, as a real one of shape (*shape, 2), are drawn independently.

    The numbers do not depend on torch's generators, on the device (up to the rounding of log, sin and cos),
    on the dtype (they are drawn in float32 and cast), or on which part of them is requested. They do
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

    isotropic = True

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
        if tangents == "inputs":
            raise ArgumentError(
                'tangents="inputs" needs the inputs of a batch, which optimizers have: jetplane.optim.FGD(params, '
                'tangents="inputs"), jetplane.sources.Drawn(tangents="inputs")'
            )
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
        self._scales = torch.empty(0, device="cpu")  # of the sphere
        self._norms_of: tuple[int, int | Tensor] | None = None  # the seed and step they belong to

    def __repr__(self) -> str:
        return f"Directions(k={self.k}, law={self.law!r}, tangents={self.structure!r}, seed={self.seed})"

    def is_low_rank(self, param: Tensor) -> bool:
        """Whether this parameter's tangents are sums of products ``a b^T``."""
        return self.structure in ("rank-one", "low-rank") and param.dim() > 1 and param.numel() > 0

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents of one parameter.

        Args:
            index: the parameter's index among all parameters.
            param: gives shape, dtype and device; its values are not used.
            directions: which of the K; all by default.

        Returns:
            A tensor of shape (directions, *param.shape).

        Raises:
            DTypeError: the parameter is not of a floating dtype.
            ArgumentError: the law is "sphere", and `prepare` was not called in this step.
        """
        if param.is_complex():
            return torch.view_as_complex(self.draw(index, as_real(param), directions))
        flat = self._flat(index, param, directions)
        return self._scaled(flat, directions).reshape(len(flat), *local(param).shape)

    def structured(self, index: int, param: Tensor) -> Tensor | Tangents | None:
        """Low-rank tangents as their factors, dense ones to be drawn later.

        Raises:
            ArgumentError: as `draw`.
        """
        if self.is_low_rank(param) and not param.is_complex():
            left, right = self._factors(index, param, None)
            return LowRank(self._scaled(left.flatten(1)).view_as(left), right, local(param).shape)
        return super().structured(index, param)

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype.

        The tangents are drawn again, a cache's size at a time, and never held.
        """
        if param.is_complex():
            return torch.view_as_complex(self.combine(index, as_real(param), kappa))
        work = working_dtype(param)
        kappa = checked(kappa, self.k).to(param.device, work, copy=True)
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
        """Find what the draws of one step share: for the law "sphere", the norms."""
        if self.law != "sphere" or self._norms_of == (self.seed, self.step):
            return
        squares = torch.zeros(self.k, dtype=torch.float64, device="cpu")
        for index, param in zip(places or range(len(params)), params, strict=True):
            flat = self._flat(index, as_real(whole(param)), None)
            norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
            squares += norms.square().cpu()
        self._scales = (sum(as_real(param).numel() for param in params) / squares).sqrt_()
        self._norms_of = (self.seed, self.step)

    def squared_norms(self, params: Sequence[Tensor], places: Sequence[int] | None = None) -> Tensor:
        """What is expected of each: the number of parameters, since entries have variance one."""
        size = float(sum(as_real(param).numel() for param in params))
        return torch.full((self.k,), size, dtype=torch.float64, device="cpu")

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
        return drawn

    def _thinned(self, drawn: Runs, start: int | Tensor, apart: Tensor) -> Runs:
        """Entries kept with probability ``density``, scaled to variance one."""
        assert self.density is not None
        for streams, place, values in drawn:
            kept = coins(start, apart[streams], place, self.density)
            yield streams, place, torch.where(kept, values / math.sqrt(self.density), 0)

    def _chosen(self, directions: slice | None) -> range:
        return range(self.k)[directions or slice(None)]
