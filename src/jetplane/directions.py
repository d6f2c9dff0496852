"""Directions: K tangents for every parameter, drawn where they are needed.

Nothing is stored. The tangents of a parameter are a function of (seed, step, index of the parameter, direction,
element), so any of them can be drawn again: at the update, in another process, on another device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from .errors import ArgumentError, DTypeError, ShapeError
from .laws import LAWS, key, pieces, twists

Structure = Literal["dense", "rank-one"]

# The fourth moment of one entry, for rules that set the step size by it. "sphere": 3 P / (P + 2) for P
# parameters, here its limit.
KURTOSIS: dict[str, float] = {name: law.kurtosis for name, law in LAWS.items()} | {"sphere": 3.0}

_MATRIX, _DIRECTION = 1, 2  # what a key is for


class AbstractDirections(ABC):
    """K directions in the space of all parameters: what a plane is spanned by."""

    k: int

    @abstractmethod
    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index, or some of the K."""

    @abstractmethod
    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape."""

    def tangents(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The tangents of all parameters: one tensor (K, *param.shape) for each."""
        return [self.draw(index, param) for index, param in enumerate(params)]


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

    def __init__(
        self, k: int, law: str = "gaussian", tangents: Structure = "dense", seed: int = 0
    ) -> None:
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
        self._scales: tuple[object, Tensor] | None = None  # of the sphere, and what they belong to

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
        """
        if self.is_rank_one(param):
            a, b = self.factors(index, param, directions)
            return (a.unsqueeze(2) * b.unsqueeze(1)).reshape(-1, *param.shape)
        flat = self._numbers(index, param, param.numel(), directions)
        return self._scaled(flat, directions).reshape(-1, *param.shape)

    def factors(
        self, index: int, param: Tensor, directions: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """The factors of rank-one tangents: a (directions, rows) and b (directions, columns).

        The tangent is ``a b^T``, shaped as the parameter.

        Raises:
            ArgumentError: the tangents of this parameter are dense.
        """
        if not self.is_rank_one(param):
            raise ArgumentError(
                f"parameter {index} of shape {tuple(param.shape)} has no factors: its tangents are dense"
            )
        rows = param.shape[0]
        columns = param.numel() // max(rows, 1)
        numbers = self._numbers(index, param, rows + columns, directions)
        return self._scaled(numbers[:, :rows], directions), numbers[:, rows:]

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter, in its shape and dtype.

        The tangents are drawn again, a few thousand elements at a time, and never held.
        """
        kappa = kappa.to(param.device, torch.float32 if param.dtype.itemsize < 4 else param.dtype)
        if kappa.shape != (self.k,):
            raise ShapeError(f"kappa: expected shape {(self.k,)}, got {tuple(kappa.shape)}")
        if self.is_rank_one(param):
            a, b = self.factors(index, param.new_empty((), dtype=kappa.dtype).expand(param.shape))
            return ((a.mT * kappa) @ b).reshape(param.shape).to(param.dtype)
        kappa = self._scaled(kappa.unsqueeze(1)).squeeze(1)
        total = torch.zeros(param.numel(), dtype=kappa.dtype, device=param.device)
        for streams, place, values in self._pieces(index, param, param.numel()):
            total[place].addmv_(values.to(kappa.dtype).mT, kappa[streams])
        return total.reshape(param.shape).to(param.dtype)

    def tangents(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The tangents of all parameters: one tensor (K, *param.shape) for each."""
        self.prepare(params)
        return super().tangents(params)

    materialize = tangents

    def prepare(self, params: Sequence[Tensor]) -> None:
        """Find what the draws of one step have in common: for the law "sphere", the norms.

        `tangents` calls it. Before a `draw` from the sphere it must have been called in the same step, with
        all the parameters; other laws do without.
        """
        if self.law != "sphere" or self._ready():
            return
        squares = torch.zeros(self.k, dtype=torch.float64, device=params[0].device if params else None)
        for index, param in enumerate(params):
            rows = param.shape[0] if self.is_rank_one(param) else param.numel()
            columns = param.numel() // max(rows, 1)
            parts = torch.zeros(2, self.k, dtype=torch.float64, device=param.device)
            for streams, place, values in self._pieces(index, param, rows + columns * (columns > 1)):
                inside = max(0, min(rows - place.start, values.shape[1]))
                for part, piece in zip(parts, (values[:, :inside], values[:, inside:]), strict=True):
                    part[streams] += piece.double().square_().sum(1)
            squares += (parts[0] * parts[1] if self.is_rank_one(param) else parts[0]).to(squares.device)
        size = sum(param.numel() for param in params)
        self._scales = (self._moment(), (size / squares).sqrt_())

    def _moment(self) -> object:
        return (self.seed, int(self.step))

    def _ready(self) -> bool:
        return self._scales is not None and self._scales[0] == self._moment()

    def _scaled(self, numbers: Tensor, directions: slice | None = None) -> Tensor:
        if self.law != "sphere":
            return numbers
        if not self._ready():
            raise ArgumentError(
                "the law 'sphere' is scaled over all parameters together: call prepare(params) or "
                "tangents(params) in this step before drawing for one of them"
            )
        assert self._scales is not None
        scales = self._scales[1][directions or slice(None)]
        return numbers.mul_(scales.to(numbers.device, numbers.dtype).unsqueeze(1))

    def _numbers(self, index: int, param: Tensor, size: int, directions: slice | None) -> Tensor:
        """`size` numbers for each direction, in the parameter's dtype."""
        count = len(range(self.k)[directions or slice(None)])
        numbers = torch.empty(count, size, dtype=param.dtype, device=param.device)
        for streams, place, values in self._pieces(index, param, size, directions):
            numbers[streams, place] = values
        return numbers

    def _pieces(
        self, index: int, param: Tensor, size: int, directions: slice | None = None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        if not param.dtype.is_floating_point:
            raise DTypeError(f"parameter {index}: expected a floating dtype, got {param.dtype}")
        law = LAWS["gaussian" if self.law == "sphere" else self.law]
        stream = key(self.seed, self.step, index)
        chosen = range(self.k)[directions or slice(None)]
        return pieces(law, key(stream, _MATRIX), twists(key(stream, _DIRECTION), chosen, param.device), size)


class HeldDirections(AbstractDirections):
    """Directions whose tangents, once drawn, are kept: one copy, and no second drawing at the update.

    Args:
        source: where tangents come from; None if all are given.
        tangents: by index of the parameter, each (K, *param.shape): gradients, previous steps, ...
        k: their number, if there is no source.
    """

    def __init__(
        self,
        source: AbstractDirections | None = None,
        tangents: Sequence[Tensor] = (),
        k: int | None = None,
    ) -> None:
        ...
