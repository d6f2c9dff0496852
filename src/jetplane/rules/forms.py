"""Bilinear maps of tensors, and how stacks of coefficients pass through them.

A `Form` is a product of two tensors: of matrices, of batches of matrices, of images with a kernel. As it stands it
works on any tensors, jets of an outer evaluation and a compiler's stand-ins among them. Its ``in_place`` variant does
the same with kernels that write to given memory.

Where both factors have first coefficients the cross terms and the first-order terms are interpolated from products of
sums, if products are dear (`pays`): 1 + K + K(K+1)/2 products instead of 1 + 2K + K², the number of coefficients that
the result has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..jets import PairStructure, Space, innermost, writable
from .registry import aten

BLOCK = 1 << 17  # elements of a sum of weights that are held at a time
IMAGES = 1 << 21  # elements of images that are convolved at a time
FEW = 1 << 12  # numbers of two batches of matrices up to which a call costs more than copies of one of them
NARROW = 96  # rows or columns below which reading a factor costs as much as multiplying it


class Form(ABC):
    """A bilinear map of two tensors, and how stacks of n tensors pass through it.

    Attributes:
        by_rows: whether each row of b, along its first axis, makes a channel of its own: the second axis of y.
    """

    by_rows = False

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The product."""

    @property
    def in_place(self) -> Form:
        """The same with kernels that write to given memory; itself where there are none."""
        return self

    def chosen(self, *tensors: Any) -> Form:
        """The form to be used for these tensors."""
        return self.in_place if writable(*tensors) else self

    def pays(self, a: Tensor, b: Tensor) -> bool:
        """Whether a product costs so much more than sums of its factors that interpolation pays."""
        return False

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """Products of each tensor of the stack a with the tensor b."""
        return torch.stack([self(t, b) for t in a.unbind(0)])

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """Products of the tensor a with each tensor of the stack b."""
        return torch.stack([self(a, t) for t in b.unbind(0)])

    def both(self, space: Space, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        """``f(a_i, b) + f(a, b_i)`` for each direction."""
        return self.left(space, da, b) + self.right(space, a, db)

    def spread(self, space: Space, onto: Tensor | None, inner: Tensor, left: Tensor) -> Tensor:
        """``onto[n] + sum_m inner[n, :, m] left[n, m]``: channels m spread to those of the result.

        Args:
            space: of the evaluation.
            onto: a stack of results (n, N, channels, ...), which may be overwritten, or None.
            inner: (n, N, m, ...).
            left: (n, m, channels).
        """
        y = torch.einsum("nbm...,nmc->nbc...", inner, left)
        return y if onto is None else onto + y

    def crossed(
        self,
        space: Space,
        structure: PairStructure,
        a: Tensor,
        da: Tensor,
        b: Tensor,
        db: Tensor,
        y: Tensor,
        interpolate: bool,
    ) -> tuple[Tensor, Tensor]:
        """``f(a_i, b) + f(a, b_i)``, and ``f(a_i, b_j) + f(a_j, b_i)`` for each second coefficient of a structure.

        ``y`` is the product itself, and ``interpolate`` asks for products of sums.
        """
        if interpolate:
            return self._interpolated(structure, a, da, b, db, y)
        first = self.left(space, da, b) + self.right(space, a, db)
        second: list[Any] = [0] * structure.count
        for n, i, j, weight in structure.terms():
            product = self(da[i], db[j]) + self(da[j], db[i]) if i != j else (2 * weight) * self(da[i], db[i])
            second[n] = second[n] + product
        return first, torch.stack(second)

    def _interpolated(
        self, structure: PairStructure, a: Tensor, da: Tensor, b: Tensor, db: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `InPlace.crossed`; a compiler fuses the sums."""
        s = _sizes(a, da, b, db)
        own = [self(da[i], db[i]) for i in range(structure.k)]
        first = []
        for i in range(structure.k):
            whole = self(a + s[i] * da[i], b + s[i] * db[i])
            first.append((whole - y) / s[i] - s[i] * own[i])
        second: list[Any] = [0] * structure.count
        for n, i, j, weight in structure.terms():
            if i == j:
                second[n] = second[n] + (2 * weight) * own[i]
            else:
                ratio = s[j] / s[i]
                both = self(da[i] + ratio * da[j], db[i] + ratio * db[j])
                second[n] = second[n] + (both - own[i]) / ratio - ratio * own[j]
        return torch.stack(first), torch.stack(second)


class InPlace(Form):
    """A form with kernels that write to given memory."""

    def into(self, out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
        """Write the product to ``out``, or add it to what is there."""
        y = self(a, b)
        if keep:
            out.add_(y)
        else:
            out.copy_(y)

    def of_sums(self, out: Tensor, a: Tensor, da: Tensor, b: Tensor, db: Tensor, scale: float, work: Work) -> None:
        """Write ``f(a + scale da, b + scale db)``."""
        left = torch.add(a, da, alpha=scale, out=work("left", a))
        right = torch.add(b, db, alpha=scale, out=work("right", b))
        self.into(out, left, right, False)

    def spread(self, space: Space, onto: Tensor | None, inner: Tensor, left: Tensor) -> Tensor:
        """See `Form.spread`."""
        left = left.reshape(*left.shape[:2], 1, left.shape[2], *[1] * (inner.dim() - 3))
        if onto is None:
            shape = torch.broadcast_shapes(inner[:, :, :1].shape, left[:, 0].shape)
            onto = torch.mul(inner[:, :, :1], left[:, 0], out=space.memory.empty(shape, inner))
            inner, left = inner[:, :, 1:], left[:, 1:]
        for m in range(left.shape[1]):
            onto.addcmul_(inner[:, :, m : m + 1], left[:, m])
        return onto

    def crossed(
        self,
        space: Space,
        structure: PairStructure,
        a: Tensor,
        da: Tensor,
        b: Tensor,
        db: Tensor,
        y: Tensor,
        interpolate: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `Form.crossed`. Products of sums are interpolated as Karatsuba multiplies polynomials.

        With directions scaled by s_i so that all products are of one size (which keeps cancellation at
        the rounding error of the terms themselves) and D_i = f(a_i, b_i):

            y_ii           = 2 D_i
            s_i y_i        = f(a + s_i a_i, b + s_i b_i) - f(a, b) - s_i^2 D_i
            s_i s_j y_ij   = f(s_i a_i + s_j a_j, s_i b_i + s_j b_j) - s_i^2 D_i - s_j^2 D_j
        """
        terms = structure.terms()
        second = space.memory.empty((structure.count, *y.shape), y)
        if not interpolate:
            first = self.left(space, da, b)
            for i in range(structure.k):
                self.into(first[i], a, db[i], True)
            begun: set[int] = set()
            for n, i, j, weight in terms:
                self.into(second[n], da[i] if weight == 1 else weight * da[i], db[j], n in begun)
                begun.add(n)
                if i != j:
                    self.into(second[n], da[j], db[i], True)
                elif structure.single:
                    second[n].mul_(2)
            return first, second if structure.single else second.mul_(2)
        s = _sizes(a, da, b, db).tolist()
        work, first = Work(), space.memory.empty((structure.k, *y.shape), y)
        place = {i: second[n] for n, i, j, _ in terms if i == j} if structure.single else {}
        sums: dict[int, list[tuple[int, float]]] = {}
        if not structure.single:
            second.zero_()
            for n, i, _, weight in terms:
                sums.setdefault(i, []).append((n, weight))
        own = []  # D_i, kept where y_ii will be if it is wanted
        for i in range(structure.k):
            d = place[i] if i in place else work("own", y) if structure.on_diagonal else torch.empty_like(y)
            self.into(d, da[i], db[i], False)
            self.of_sums(first[i], a, da[i], b, db[i], s[i], work)
            first[i].sub_(y).div_(s[i]).sub_(d, alpha=s[i])
            for n, weight in sums.get(i, ()):
                second[n].add_(d, alpha=2 * weight)
            own.append(d)
        for n, i, j, _ in terms:
            if i != j:
                ratio = s[j] / s[i]
                self.of_sums(second[n], da[i], da[j], db[i], db[j], ratio, work)
                second[n].sub_(own[i]).div_(ratio).sub_(own[j], alpha=ratio)
        for d in place.values():
            d.mul_(2)
        return first, second


class Work:
    """Buffers that the products of one operator share: fresh memory costs as much as the sums."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """The buffer of this name, shaped as a tensor."""
        held = self._held.get(name)
        if held is None or held.shape != like.shape:
            held = self._held[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return held


def _sizes(pa: Tensor, fa: Tensor, pb: Tensor, fb: Tensor) -> Tensor:
    """s_i with ``|a_i| |b_i| s_i² = |a| |b|``; constants for outer levels, whose values do not matter."""
    pa, fa, pb, fb = (innermost(t) for t in (pa, fa, pb, fb))
    ratio = torch.sqrt(_norms(pa[None]) * _norms(pb[None]) / (_norms(fa) * _norms(fb)))
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1)  # a zero factor needs no scale


def _norms(c: Tensor) -> Tensor:
    """Norms of a stack, in single precision at least: half precision would overflow."""
    return torch.linalg.vector_norm(c.flatten(1), dim=1, dtype=torch.promote_types(c.dtype, torch.float32))


# --- matrix products -------------------------------------------------------------------------


def _by_columns(w: Tensor) -> bool:
    """Whether ``(w x^T)^T`` takes less time than ``x w^T``, as it does for odd numbers of columns."""
    columns, depth = w.shape
    return 1 < columns < NARROW and columns % 16 != 0 and (columns < 16 or depth >= 64)


class _Rows(Form):
    """``x @ w.T`` for a matrix x of n rows and a weight w as `torch.nn.Linear` keeps it."""

    by_rows = True

    @property
    def in_place(self) -> Form:
        return _ROWS_IN_PLACE

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self._columns(a, b).t().contiguous() if _by_columns(b) else a @ b.t()

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        return self(a.flatten(0, 1), b).view(*a.shape[:-1], b.shape[0])

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if b.shape[1] < NARROW:  # one product reads a once
            return self._columns(a, b.flatten(0, 1)).unflatten(0, b.shape[:2]).mT.contiguous()
        return torch.matmul(a, b.transpose(1, 2))

    def _columns(self, a: Tensor, b: Tensor) -> Tensor:
        """The product transposed."""
        return b @ a.t()

    def pays(self, a: Tensor, b: Tensor) -> bool:
        return a.shape[0] >= NARROW and b.shape[0] >= NARROW

    def spread(self, space: Space, onto: Tensor | None, inner: Tensor, left: Tensor) -> Tensor:
        return torch.matmul(inner, left) if onto is None else onto + torch.matmul(inner, left)


class _RowsInPlace(_Rows, InPlace):
    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if _by_columns(b):
            return super().left(space, a, b)
        out = space.memory.empty((*a.shape[:-1], b.shape[0]), a)
        torch.mm(a.flatten(0, 1), b.t(), out=out.flatten(0, 1))
        return out

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if b.shape[1] < NARROW:
            return super().right(space, a, b)
        out = space.memory.empty((b.shape[0], a.shape[0], b.shape[1]), a)
        for i in range(b.shape[0]):
            torch.mm(a, b[i].t(), out=out[i])
        return out

    def both(self, space: Space, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        if db.shape[1] < NARROW:
            return super().both(space, a, da, b, db)
        total = self.left(space, da, b)
        for out, weight in zip(total, db, strict=True):
            out.addmm_(a, weight.t())
        return total

    def into(self, out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
        if keep:
            out.addmm_(a, b.t())
        else:
            torch.mm(a, b.t(), out=out)

    def of_sums(self, out: Tensor, a: Tensor, da: Tensor, b: Tensor, db: Tensor, scale: float, work: Work) -> None:
        left = torch.add(a, da, alpha=scale, out=work("left", a))
        step = max(1, BLOCK // max(b.shape[1], 1))
        for start in range(0, b.shape[0], step):  # weights in blocks that stay in the cache
            rows = slice(start, start + step)
            right = torch.add(b[rows], db[rows], alpha=scale, out=work("right", b[rows]))
            torch.mm(left, right.t(), out=out[:, rows])

    def spread(self, space: Space, onto: Tensor | None, inner: Tensor, left: Tensor) -> Tensor:
        if onto is None:
            return torch.bmm(inner, left, out=space.memory.empty((*inner.shape[:2], left.shape[2]), left))
        return onto.baddbmm_(inner, left)


class _Batched(Form):
    """``a @ b`` for batches of matrices, (*batch, r, s) and (*batch, s, t): each direction apart, in the cache."""

    @property
    def in_place(self) -> Form:
        return _BATCHED_IN_PLACE

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class _BatchedInPlace(_Batched, InPlace):
    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if max(a[0].numel(), b.numel()) < FEW:
            return super().left(space, a, b)
        out = space.memory.empty((*a.shape[:-1], b.shape[-1]), a)
        b = _matrices(b)
        for y, factor in zip(_matrices(out, 1), _matrices(a, 1), strict=True):
            torch.bmm(factor, b, out=y)
        return out

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        if max(a.numel(), b[0].numel()) < FEW:
            return super().right(space, a, b)
        out = space.memory.empty((*b.shape[:-2], a.shape[-2], b.shape[-1]), b)
        a = _matrices(a)
        for y, factor in zip(_matrices(out, 1), _matrices(b, 1), strict=True):
            torch.bmm(a, factor, out=y)
        return out

    def both(self, space: Space, a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        out = space.memory.empty((*da.shape[:-1], b.shape[-1]), da)
        a, b = _matrices(a), _matrices(b)
        for y, left, right in zip(_matrices(out, 1), _matrices(da, 1), _matrices(db, 1), strict=True):
            torch.bmm(left, b, out=y).baddbmm_(a, right)
        return out

    def crossed(
        self,
        space: Space,
        structure: PairStructure,
        a: Tensor,
        da: Tensor,
        b: Tensor,
        db: Tensor,
        y: Tensor,
        interpolate: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `Form.crossed`; what is no batch of matrices in memory is copied once."""
        a, b, da, db = _matrices(a), _matrices(b), _matrices(da, 1), _matrices(db, 1)
        first, second = super().crossed(space, structure, a, da, b, db, _matrices(y), interpolate)
        return first.view(first.shape[0], *y.shape), second.view(second.shape[0], *y.shape)

    def into(self, out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
        out, a, b = _matrices(out), _matrices(a), _matrices(b)
        if keep:
            out.baddbmm_(a, b)
        else:
            torch.bmm(a, b, out=out)


def _matrices(x: Tensor, axes: int = 0) -> Tensor:
    """The batch as one dimension, behind a number of axes that stay; transposed matrices stay so."""
    if x.dim() <= 3 + axes:
        return x if x.dim() == 3 + axes else x.unsqueeze(axes)
    return x.mT.flatten(axes, -3).mT if x.stride(-2) == 1 else x.flatten(axes, -3)


ROWS, BATCHED = _Rows(), _Batched()
_ROWS_IN_PLACE, _BATCHED_IN_PLACE = _RowsInPlace(), _BatchedInPlace()


# --- convolutions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution(Form):
    """A convolution of batched images with a kernel, with the settings of ``aten.convolution``."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @property
    def in_place(self) -> Form:
        """See `Form`."""
        return _ConvolutionInPlace(*(getattr(self, f) for f in self.__dataclass_fields__))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        settings = self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        return aten.convolution(a, b, None, *settings)

    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """The stack of images as one batch."""
        y = self(a.flatten(0, 1), b)
        return y.reshape(*a.shape[:2], *y.shape[1:])

    def right(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        """One convolution with n times the output channels."""
        if self.groups > 1 or self.transposed:
            return super().right(space, a, b)
        y = self(a, b.flatten(0, 1))
        return y.unflatten(1, b.shape[:2]).movedim(1, 0)

    def pays(self, a: Tensor, b: Tensor) -> bool:
        """Always."""
        return True

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """See `Form`."""
        return self.groups == 1 and not self.transposed


class _ConvolutionInPlace(Convolution, InPlace):
    def left(self, space: Space, a: Tensor, b: Tensor) -> Tensor:
        # So many tensors of the stack at a time that the library's own copies of them stay in the cache.
        step = max(1, IMAGES // max(a[0].numel(), 1))
        if step >= len(a):
            return super().left(space, a, b)
        out = None
        for start in range(0, len(a), step):
            y = super().left(space, a[start : start + step], b)
            out = space.memory.empty((len(a), *y.shape[1:]), y) if out is None else out
            out[start : start + step].copy_(y)
        assert out is not None
        return out
