"""Directions: what the tangents are, drawn on demand from where they stand.

A tangent is a function of (seed, step, parameter, direction, element), computed by the counter-based
generator of `jetplane.laws`. So any of them can be drawn again alone: at the update, in another chunk,
on another rank; nothing has to be stored or sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .errors import ArgumentError, DTypeError
from .laws import LAWS, key, pieces

Structure = Literal["dense", "rank-one"]


class Directions:
    """K directions in the space of all parameters, every coordinate of mean zero and variance one.

    Args:
        k: how many directions.
        law: "gaussian", "rademacher", "uniform", "laplace", "semicircle", or "sphere" (Gaussian, scaled so
            that each direction has norm sqrt(P) over all P parameters together).
        tangents: "dense", or "rank-one": ``a b^T`` for each parameter of two or more dimensions, seen as a
            matrix of its first dimension by all others; vectors stay dense.
        seed: of the stream.
        step: which draw of the stream; an attribute that may be moved on.

    Raises:
        ArgumentError: k < 1, or an unknown law or structure.

    >>> import torch, jetplane as jp
    >>> directions = jp.Directions(3, law="rademacher", seed=1)
    >>> [t.shape for t in directions.materialize([torch.zeros(2, 4), torch.zeros(5)])]
    [torch.Size([3, 2, 4]), torch.Size([3, 5])]

    Source: Cobb et al., arXiv 2408.10419 (Gaussian); Shukla and Shin, arXiv 2310.14168 (other laws).
    """

    def __init__(
        self, k: int, law: str = "gaussian", tangents: Structure = "dense", seed: int = 0, step: int = 0
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"k must be an integer of at least 1, got {k!r}")
        if law not in LAWS and law != "sphere":
            raise ArgumentError(f"unknown law {law!r}; expected one of {', '.join([*LAWS, 'sphere'])}")
        if tangents not in ("dense", "rank-one"):
            raise ArgumentError(f"tangents must be 'dense' or 'rank-one', got {tangents!r}")
        self.k = k
        self.law = law
        self.structure: Structure = tangents
        self.seed = seed
        self.step = step
        self._norms: tuple[tuple[int, int], Tensor] | None = None

    def __repr__(self) -> str:
        return (
            f"Directions(k={self.k}, law={self.law!r}, tangents={self.structure!r}, "
            f"seed={self.seed}, step={self.step})"
        )

    def prepare(self, params: Sequence[Tensor]) -> None:
        """Look at all parameters before tangents of single ones are drawn; only "sphere" needs it."""
        if self.law != "sphere" or (self._norms is not None and self._norms[0] == (self.seed, self.step)):
            return
        total = torch.zeros(self.k, dtype=torch.float64)
        for i, p in enumerate(params):
            total += self._draw(i, p, None).double().pow(2).flatten(1).sum(1).cpu()
        size = sum(p.numel() for p in params)
        self._norms = (self.seed, self.step), torch.sqrt(size / total)

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """Tangents of one parameter, (K, *param.shape) or those of a slice of the directions.

        Raises:
            DTypeError: the parameter is not of a floating dtype.
            ArgumentError: the law is "sphere" and `prepare` has not seen all parameters.
        """
        values = self._draw(index, param, directions)
        if self.law == "sphere":
            values.mul_(self._scale(directions, values).reshape(-1, *([1] * param.dim())))
        return values.to(param.dtype)

    def factors(
        self, index: int, param: Tensor, directions: slice | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """The factors a (K, m) and b (K, n) of a rank-one tangent, or None where tangents are dense.

        The tangent is ``a b^T`` reshaped to the parameter, an (m, *rest) tensor with n = prod(rest).
        """
        if self.structure == "dense" or param.dim() < 2:
            return None
        m = param.shape[0]
        a = self._stream(index, 1, m, param.device, directions)
        b = self._stream(index, 2, param.numel() // max(m, 1), param.device, directions)
        if self.law == "sphere" and self._norms is not None:
            a.mul_(self._scale(directions, a).reshape(-1, 1))
        return a.to(param.dtype), b.to(param.dtype)

    def tangents(self, params: Sequence[Tensor]) -> list[Tensor]:
        """All tangents: one tensor of shape (K, *param.shape) for each parameter."""
        self.prepare(params)
        return [self.draw(i, p) for i, p in enumerate(params)]

    materialize = tangents

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa_k v_k`` for one parameter, drawn piece by piece: (K, *shape) is never held."""
        kappa = kappa.to(torch.float32).to(param.device)
        if self.law == "sphere":
            kappa = kappa * self._scale(None, kappa)
        factors = self.factors(index, param) if self.law != "sphere" else self._raw_factors(index, param)
        if factors is not None:
            a, b = factors
            return ((a * kappa.to(a.dtype)[:, None]).T @ b).reshape(param.shape)
        out = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
        for streams, where, values in self._pieces(index, 0, param.numel(), param.device, None):
            out[where] += kappa[streams] @ values
        return out.reshape(param.shape).to(param.dtype)

    def _raw_factors(self, index: int, param: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.structure == "dense" or param.dim() < 2:
            return None
        m = param.shape[0]
        return (
            self._stream(index, 1, m, param.device, None),
            self._stream(index, 2, param.numel() // max(m, 1), param.device, None),
        )

    def _draw(self, index: int, param: Tensor, directions: slice | None) -> Tensor:
        if not param.dtype.is_floating_point:
            raise DTypeError(f"parameter {index} must be of a floating dtype, got {param.dtype}")
        if self.structure == "rank-one" and param.dim() >= 2:
            m = param.shape[0]
            a = self._stream(index, 1, m, param.device, directions)
            b = self._stream(index, 2, param.numel() // max(m, 1), param.device, directions)
            return (a[:, :, None] * b[:, None, :]).reshape(-1, *param.shape)
        return self._stream(index, 0, param.numel(), param.device, directions).reshape(-1, *param.shape)

    def _stream(
        self, index: int, factor: int, size: int, device: torch.device, directions: slice | None
    ) -> Tensor:
        count = len(range(self.k)[directions or slice(None)])
        out = torch.empty(count, size, dtype=torch.float32, device=device)
        for streams, where, values in self._pieces(index, factor, size, device, directions):
            out[streams, where] = values
        return out

    def _pieces(self, index: int, factor: int, size: int, device: torch.device, directions: slice | None):  # noqa: ANN202
        chosen = range(self.k)[directions or slice(None)]
        start = key(self.seed, self.step, index, factor)
        twists = torch.tensor([key(self.seed, self.step, d, 3) for d in chosen], device=device)
        law = LAWS["gaussian" if self.law == "sphere" else self.law]
        return pieces(law, start, twists, size) if size else iter(())

    def _scale(self, directions: slice | None, like: Tensor) -> Tensor:
        if self._norms is None or self._norms[0] != (self.seed, self.step):
            raise ArgumentError("the law 'sphere' needs prepare(params) before single tangents are drawn")
        return self._norms[1][directions or slice(None)].to(like)


def variance_rate(dimension: int, law: str) -> float:
    """The variance of tangents at which forward gradients decrease a quadratic fastest.

        sigma² = 1 / (d + kurtosis - 1)

    with d the dimension and the kurtosis that of one coordinate. Source: Shukla and Shin, arXiv 2310.14168.

    >>> round(variance_rate(10, "gaussian"), 4), round(variance_rate(10, "rademacher"), 4)
    (0.0833, 0.1)
    """
    if law not in LAWS:
        raise ArgumentError(f"unknown law {law!r}; expected one of {', '.join(LAWS)}")
    if dimension < 1 or not math.isfinite(dimension):
        raise ArgumentError(f"the dimension must be at least 1, got {dimension}")
    return 1 / (dimension + LAWS[law].kurtosis - 1)
