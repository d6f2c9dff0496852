"""Coefficients: the first or second derivatives that a jet carries, as a type with arithmetic of its own.

Of n coefficients of a value of shape S some or all may be zero by structure. Those are *absent*: nothing is held
of them, and whatever is linear in coefficients costs nothing along them. Absence, laziness (tangents that are drawn
when an operator asks for them, products that are summed up before anyone forms them) and ownership (whether memory
may be overwritten) are known here alone: rules are written in the arithmetic of this class.

    y1 = d1 * x1                            # f'(x) x_i; absent where x_i is
    y2 = d1 * x2 + outer(d2 * x1, x1)       # f'(x) x_ij + f''(x) x_i x_j
    y2 += symmetric(x1, w1)                 # in place where y2 is the rule's own
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import records
from .pairs import PairStructure
from .space import Space
from .sparsity import Sparse
from .structured import Deferred, Partial, Tangents

Rows = tuple[int, ...]  # which of the coefficients are there, ascending

_PLAIN = (Tensor, torch.nn.Parameter)
SMALL = 1 << 14  # elements below which fresh memory costs nothing that matters


def plain(*tensors: Any) -> bool:
    """Whether no jet, no compiler's stand-in and no other subclass is among the tensors."""
    return all(type(t) in _PLAIN or not isinstance(t, Tensor) for t in tensors)


def writable(*tensors: Any) -> bool:
    """Whether kernels that write to given memory may be used.

    Not with a jet or a compiler's stand-in among the tensors, nor where reverse mode must see what is written.
    """
    for t in tensors:
        if isinstance(t, Tensor):
            if type(t) not in _PLAIN:
                return False
            if t.requires_grad and not torch.compiler.is_compiling() and records():
                return False
    return True


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape that two shapes broadcast to; `torch.broadcast_shapes` takes as long as a small operator."""
    if len(a) < len(b):
        a, b = b, a
    ahead = len(a) - len(b)
    return (*a[:ahead], *(n if m == 1 else m for m, n in zip(a[ahead:], b, strict=True)))


def overwritten(own: Tensor, op: str, *args: Any) -> Tensor:
    """``own.op(*args)``, in place of a tensor that nobody else knows, where that may be."""
    return getattr(own, f"{op}_" if writable(own, *args) else op)(*args)


def lift(c: Tensor, ndim: int) -> Tensor:
    """Coefficients (n, *S) viewed as (n, 1, …, 1, *S) with ``ndim`` axes after the first.

    Broadcasting aligns shapes at the right, which would let the direction axis meet a data axis.
    """
    missing = ndim + 1 - c.dim()
    return c if missing <= 0 else c.reshape(c.shape[0], *([1] * missing), *c.shape[1:])


def condensed(c: Tensor) -> Tensor:
    """A stack with size one along axes of the value along which it was expanded."""
    if type(c) in _PLAIN and 0 in c.stride():
        for d in range(1, c.dim()):
            if c.stride(d) == 0 and c.shape[d] > 1:
                c = c.narrow(d, 0, 1)
    return c


@dataclass(frozen=True)
class _Outer:
    """Second coefficients ``sum w a_i b_j`` before they are formed: summed up at once, they never are."""

    structure: PairStructure
    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return broadcast(self.a.shape[1:], self.b.shape[1:])

    def materialized(self, space: Space) -> Tensor:
        if not writable(self.a, self.b):
            return self.structure.outer(self.a, self.b)
        like = self.a
        if self.a.dtype != self.b.dtype:
            like = self.a.new_empty(0, dtype=torch.result_type(self.a, self.b))
        out = space.memory.empty((self.structure.count, *self.shape), like)
        self.structure.write_outer(out, self.a, self.b)
        return out

    def summed(self, weight: Tensor | None) -> Tensor:
        """The sums over all elements, times a weight."""
        a = self.a if weight is None else self.a * weight
        shape = broadcast(a.shape[1:], self.b.shape[1:])
        a, b = (c.expand(c.shape[0], *shape).reshape(c.shape[0], math.prod(shape)) for c in (a, self.b))
        return self.structure.gram(a, b)


@dataclass(frozen=True)
class _Joined:
    """Coefficients of values side by side along their last axis, before they are copied into one stack.

    What multiplies them by a matrix never forms them: a piece that is the same at many places is multiplied once, and
    one that is absent not at all.

    Attributes:
        pieces: stacks (m, *S), up to expansion, or None where absent; and their sizes along the last axis.
        shape: of the value.
    """

    pieces: tuple[tuple[Tensor | None, int], ...]
    shape: tuple[int, ...]

    def materialized(self, space: Space) -> Tensor:
        there = [c for c, _ in self.pieces if c is not None]
        count, zero = there[0].shape[0], there[0].new_zeros(())
        stacks = [(zero if c is None else c).expand(count, *self.shape[:-1], size) for c, size in self.pieces]
        if not writable(*there):
            return torch.cat(stacks, -1)
        return torch.cat(stacks, -1, out=space.memory.empty((count, *self.shape), zero))

    def mapped(self, f: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """``sum f(piece, place)``, largest pieces first."""
        places, start = [], 0
        for c, size in self.pieces:
            if c is not None:
                places.append((condensed(c), slice(start, start + size)))
            start += size
        places.sort(key=lambda piece: piece[0].numel(), reverse=True)
        total = f(*places[0])
        for piece, place in places[1:]:
            term = f(piece, place)
            fits = broadcast(total.shape, term.shape) == total.shape
            total = overwritten(total, "add", term) if fits else total + term
        return total


class Coefficients:
    """The first (order 1) or second (order 2) coefficients of a value, of which some or all may be absent.

    Args:
        space: of the evaluation.
        order: 1 or 2.
        held: those that are there: a tensor (m, *S), or what a tensor can be formed of; None if there is none.
        rows: which of the coefficients are there; None for all of them.
        owned: whether the tensor is the only one on its memory, so that it may be overwritten.
    """

    __slots__ = ("held", "order", "owned", "rows", "space")

    def __init__(
        self,
        space: Space,
        order: int,
        held: Tensor | Tangents | _Outer | _Joined | None = None,
        rows: Rows | None = None,
        owned: bool = False,
    ) -> None:
        if isinstance(held, Partial):
            held, rows = (held.tangents, held.rows) if held.rows else (None, None)
        self.space = space
        self.order = order
        self.held = held
        self.rows = rows
        self.owned = owned

    def __bool__(self) -> bool:
        """Whether any coefficient is there."""
        return self.held is not None

    def __repr__(self) -> str:
        there = "none" if self.held is None else "all" if self.rows is None else self.rows
        return f"Coefficients(order={self.order}, count={self.space.count(self.order)}, there={there})"

    # --- what is held -------------------------------------------------------------------------------------

    @property
    def tensor(self) -> Tensor:
        """Those that are there, as one tensor (m, *S)."""
        held = self.held
        if isinstance(held, Tensor):
            return held
        assert held is not None, "absent coefficients have no tensor"
        if isinstance(held, (_Outer, _Joined)):
            self.held = held.materialized(self.space)
            return self.held
        if not isinstance(held, Deferred):
            names = self.space.materialized
            names[self.space.operator] = names.get(self.space.operator, 0) + 1
        self.held = held.materialized()
        return self.held

    @property
    def structured(self) -> Tangents | None:
        """Tangents that have a structure, for operators that can use it; None for anything else."""
        return self.held if isinstance(self.held, Tangents) else None

    @property
    def sparse(self) -> Sparse | None:
        """First coefficients of which each element has few, or None."""
        return self.held if isinstance(self.held, Sparse) else None

    def gathered(self, dim: int) -> bool:
        """Whether each element has few coefficients, the same along an axis (a negative number), as they are now."""
        if not isinstance(self.held, Sparse) or (held := self.held.gathered([dim])) is None:
            return False
        self.held = held
        return True

    @property
    def is_product(self) -> bool:
        """Whether they are products that nobody has formed yet: what sums them up never forms them."""
        return isinstance(self.held, _Outer)

    @property
    def is_joined(self) -> bool:
        """Whether they lie side by side and nobody has formed one stack of them yet."""
        return isinstance(self.held, _Joined)

    def map_pieces(self, f: Callable[[Tensor, slice], Tensor]) -> Coefficients:
        """A linear function of the last axis, ``sum f(piece, place)`` over the pieces that it is made of.

        Args:
            f: takes a stack of a piece, of size one along axes along which nothing changes, and its place on the axis.
        """
        if isinstance(self.held, _Joined):
            return self._new(self.held.mapped(f))
        if isinstance(self.held, Sparse) and (held := self.held.gathered([-1])) is not None:
            return self._new(held.with_rows(f(held.rows, slice(None))))
        return self.map(lambda c: f(condensed(c), slice(None)), True)

    def formed(self) -> Coefficients:
        """The same, with products formed."""
        return self._new(self.tensor) if self.is_product else self

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what is held; None where nothing is, or where it is not known yet."""
        return self.held.dtype if isinstance(self.held, (Tensor, Tangents)) else None

    def full(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """All of them as a tensor (n, *shape), zero where absent."""
        count = self.space.count(self.order)
        if self.held is None:
            return torch.zeros((), dtype=dtype, device=device).expand(count, *shape)
        there = expand(self.tensor, shape)
        return there if self.rows is None else _spread(there, self.rows, tuple(range(count)))

    def disowned(self) -> Coefficients:
        """The same, which nobody may overwrite from now on."""
        self.owned = False
        return self

    def own(self) -> Coefficients:
        """The same, which may be overwritten: for what a rule got of an operator that it called itself."""
        self.owned = not (isinstance(self.held, Tensor) and 0 in self.held.stride())  # expanded memory is shared
        return self

    def _new(self, held: Tensor | Tangents, owned: bool = True) -> Coefficients:
        return Coefficients(self.space, self.order, held, self.rows, owned)

    def _owns(self, *others: Any) -> bool:
        return self.owned and isinstance(self.held, Tensor) and writable(self.held, *others)

    def condensed(self) -> Coefficients:
        """The same with size one along axes along which nothing changes, such as points that share directions."""
        return self if self.held is None or isinstance(self.held, Sparse) else self._new(condensed(self.tensor), False)

    def selected(self, run: slice) -> Coefficients:
        """Those of a run of directions; the others become absent."""
        count = self.space.count(self.order)
        wanted = range(count)[run]
        places = [n for n, row in enumerate(self.rows or range(count)) if row in wanted] if self else []
        if not places:
            return absent(self.space, self.order)
        held = self.held if isinstance(self.held, Tangents) else self.tensor
        part = slice(places[0], places[-1] + 1)
        rows = tuple((self.rows or range(count))[n] for n in places)
        return Coefficients(self.space, self.order, held[part], None if len(rows) == count else rows)

    # --- linear functions ---------------------------------------------------------------------------------

    def map(self, f: Callable[[Tensor], Tensor], owned: bool = False) -> Coefficients:
        """A linear function applied to each coefficient.

        Args:
            f: acts on a stack (m, *S) of any number of coefficients at once.
            owned: whether what it returns is in memory of its own.
        """
        return self if self.held is None else self._new(f(self.tensor), owned)

    def moved(self, f: Callable[[Tensor], Tensor]) -> Coefficients:
        """A function that moves, repeats and picks elements, applied to each coefficient.

        Args:
            f: acts on a stack (m, *S), of integers too.
        """
        return self._new(self.held.moved(f), False) if isinstance(self.held, Sparse) else self.map(f)

    def local(self, f: Callable[[Tensor], Tensor]) -> Coefficients:
        """A linear function of each element by itself, applied to each coefficient, in memory of its own."""
        return self._new(self.held.with_rows(f(self.held.rows))) if isinstance(self.held, Sparse) else self.map(f, True)

    def cut(self, f: Callable[[Tensor], Sequence[Tensor]], count: int) -> list[Coefficients]:
        """Those of the ``count`` parts that f cuts a value into; f acts on a stack (m, *S), of integers too."""
        if self.held is None:
            return [self] * count
        if isinstance(self.held, Sparse):
            return [self.moved(lambda c, n=n: f(c)[n]) for n in range(count)]
        return [Coefficients(self.space, self.order, part, self.rows) for part in f(self.tensor)]

    def summed(self, f: Callable[[Tensor], Tensor], dims: Sequence[int], keepdim: bool, share: float) -> Coefficients:
        """Sums over axes of the value, times a number.

        Args:
            f: what does it to a stack (m, *S).
            dims: the axes.
            keepdim: whether they stay, with size one.
            share: the number; f has it.
        """
        if not isinstance(self.held, Sparse) or not len(dims):
            return self.map(f, True)
        ndim = self.held.rows.dim() - 1
        dims = [d % ndim - ndim for d in dims]
        found = self._new(self.held.summed(dims)) * share
        return found if keepdim else found.moved(lambda c: c.squeeze(dims))

    def each(
        self,
        shape: Sequence[int],
        kernel: Callable[[Tensor, Tensor], Any],
        otherwise: Callable[[Tensor], Tensor],
        *operands: Any,
    ) -> Coefficients:
        """The same, one coefficient after the other in the cache, by a kernel that writes its result.

        Args:
            shape: of a result.
            kernel: ``kernel(c, out)`` for one coefficient.
            otherwise: acts on a stack, where memory cannot be written to.
            operands: other tensors that the kernel takes.
        """
        if self.held is None:
            return self
        c = self.tensor
        if not writable(c, *operands):
            return self._new(otherwise(c))
        out = self.space.memory.empty((c.shape[0], *shape), c)
        for one, written in zip(c, out, strict=True):
            kernel(one, written)
        return self._new(out)

    def written(
        self,
        shape: Sequence[int],
        kernel: Callable[[Tensor, Tensor], Any],
        otherwise: Callable[[Tensor], Tensor],
        *operands: Any,
    ) -> Coefficients:
        """The same by a kernel that takes the whole stack, ``kernel(stack, out)``."""
        if self.held is None:
            return self
        c = self.tensor
        if not writable(c, *operands):
            return self._new(otherwise(c))
        out = self.space.memory.empty((c.shape[0], *shape), c)
        kernel(c, out)
        return self._new(out)

    def expanded(self, shape: Sequence[int]) -> Coefficients:
        """Expanded to a value of the given shape."""
        held = self.held
        if held is None:
            return self
        if (held.shape if isinstance(held, (_Outer, _Joined)) else held.shape[1:]) == shape:
            return self
        if isinstance(held, Sparse):
            return self._new(held.moved(lambda c: expand(c, shape)), False)
        return self._new(expand(self.tensor, shape), False)

    def lifted(self, ndim: int) -> Coefficients:
        """With leading axes of size one, so that the value has at least ``ndim`` dimensions."""
        if isinstance(self.held, Sparse):
            return self.moved(lambda c: lift(c, ndim))
        return self if self.held is None or self.tensor.dim() > ndim else self._new(lift(self.tensor, ndim), False)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Coefficients:
        """In another dtype, on another device."""
        if self.held is None or (self.dtype == dtype and device is None):
            return self
        if isinstance(self.held, Sparse) and device is None:
            return self._new(self.held.to(dtype))
        c = self.tensor
        moved = c.to(dtype=dtype) if device is None else c.to(device=device, dtype=dtype)
        return self._new(moved, self.owned or moved is not c)

    def total(self, weight: Tensor | None = None) -> Coefficients:
        """The sums over all elements, times a weight of the value's shape."""
        if self.held is None:
            return self
        if isinstance(self.held, _Outer):
            return self._new(self.held.summed(weight))
        if isinstance(self.held, Sparse) and weight is None and self.held.rows.dim() > 1:
            return self.summed(torch.sum, range(self.held.rows.dim() - 1), False, 1)
        c = self.tensor
        if weight is None:
            return self._new(c.sum(list(range(1, c.dim()))) if c.dim() > 1 else c)
        return self._new(c.reshape(c.shape[0], -1) @ weight.reshape(-1).to(c.dtype))

    # --- sums and products --------------------------------------------------------------------------------

    def __neg__(self) -> Coefficients:
        return self * -1 if isinstance(self.held, Sparse) else self.map(torch.neg, True)

    def __mul__(self, factor: Any) -> Coefficients:
        if self.held is None:
            return self
        ndim = factor.dim() if isinstance(factor, Tensor) else 0
        if isinstance(self.held, _Outer):
            outer = self.held
            if ndim == 0 or broadcast(outer.a.shape[1:], factor.shape) == outer.a.shape[1:]:
                product = _Outer(outer.structure, factor * outer.a, outer.b)
                return Coefficients(self.space, 2, product, self.rows, True)
        if isinstance(self.held, Sparse):
            return self._new(self.held.with_rows(lift(self.held.rows, ndim) * factor))
        return self._new(_written(self.space, torch.mul, lift(self.tensor, ndim), factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Coefficients:
        ndim = divisor.dim() if isinstance(divisor, Tensor) else 0
        if isinstance(self.held, Sparse):
            return self._new(self.held.with_rows(lift(self.held.rows, ndim) / divisor))
        return self.map(lambda c: _written(self.space, torch.div, lift(c, ndim), divisor), True)

    def __imul__(self, factor: Any) -> Coefficients:
        if self._owns(factor) and _fits(self.held, factor):  # type: ignore[arg-type]
            self.held.mul_(factor)  # type: ignore[union-attr]
            return self
        return self * factor

    def __add__(self, other: Coefficients) -> Coefficients:
        return self.plus(other)

    def __sub__(self, other: Coefficients) -> Coefficients:
        return self.plus(other, -1)

    def plus(self, other: Coefficients, alpha: Any = 1) -> Coefficients:
        """``self + alpha * other``."""
        if not other:
            return self
        if not self:
            return other if isinstance(alpha, (int, float)) and alpha == 1 else other * alpha
        if isinstance(self.held, _Outer) and isinstance(alpha, (int, float)):
            return self._new(self.held.materialized(self.space)).add(other, alpha)
        if isinstance(self.held, Sparse) and isinstance(other.held, Sparse) and isinstance(alpha, (int, float)):
            if self.rows == other.rows and (total := self.held.plus(other.held, alpha)) is not None:
                return self._new(total)
        rows, a, b = aligned(self, other)
        ndim = max(a.dim(), b.dim()) - 1
        total = _written(self.space, torch.add, lift(a, ndim), lift(b, ndim), alpha=alpha)
        return Coefficients(self.space, self.order, total, rows, True)

    def __iadd__(self, other: Coefficients) -> Coefficients:
        return self.add(other)

    def __isub__(self, other: Coefficients) -> Coefficients:
        return self.add(other, -1)

    def add(self, other: Coefficients, alpha: int | float = 1) -> Coefficients:
        """``self + alpha * other``, in place of self where that is owned: use the result, not self."""
        if not other or not self or self.rows != other.rows or isinstance(self.held, Sparse):
            return self.plus(other, alpha)
        if isinstance(other.held, _Outer):
            outer = other.held
            target = self.tensor
            if self._owns(outer.a, outer.b) and outer.shape == target.shape[1:]:
                same = target.dtype == outer.a.dtype == outer.b.dtype
                if same and (alpha == 1 or outer.a.dim() == target.dim()):
                    a = outer.a if alpha == 1 else outer.a * alpha
                    ndim = target.dim() - 1
                    outer.structure.add_outer(target, lift(a, ndim), lift(outer.b, ndim))
                    return self
            return self.plus(other._new(outer.materialized(self.space)), alpha)
        term = other.tensor
        if self._owns(term):
            target = self.held
            assert isinstance(target, Tensor)
            term = lift(term, target.dim() - 1)
            if _fits_stack(target, term):
                target.add_(term, alpha=alpha)
                return self
        return self.plus(other, alpha)

    def add_product(self, factor: Any, other: Coefficients, value: int | float = 1) -> Coefficients:
        """``self + value * factor * other``, in place of self where that is owned: use the result, not self."""
        if not other:
            return self
        if not self:
            product = other * factor
            return product if value == 1 else product * value
        known = isinstance(factor, Tensor) and self.rows == other.rows and not isinstance(self.held, Sparse)
        if known and self._owns(factor, other.tensor):
            target = self.held
            assert isinstance(target, Tensor)
            term = lift(other.tensor, target.dim() - 1)
            if factor.dtype == target.dtype == term.dtype and factor.dim() < target.dim():
                if broadcast(broadcast(target.shape, factor.shape), term.shape) == target.shape:
                    target.addcmul_(factor, term, value=value)
                    return self
        return self.plus(other * factor, value)


def _fits(target: Tensor, factor: Any) -> bool:
    """Whether a factor of the value's shape can be multiplied into coefficients in place."""
    if not isinstance(factor, Tensor):
        return True
    return (
        factor.dim() < target.dim()
        and torch.result_type(target, factor) == target.dtype
        and broadcast(target.shape[1:], factor.shape) == target.shape[1:]
    )


def _fits_stack(target: Tensor, term: Tensor) -> bool:
    return (
        term.dim() == target.dim()
        and torch.result_type(target, term) == target.dtype
        and (term.shape == target.shape or broadcast(target.shape, term.shape) == target.shape)
    )


def _written(space: Space, op: Callable[..., Tensor], c: Tensor, other: Any, **options: Any) -> Tensor:
    """An elementwise ``op(c, other)``, written to the memory of the evaluation."""
    number = type(other) in (int, float)
    if not writable(c, other) or not (number or (isinstance(other, Tensor) and other.dtype == c.dtype)):
        return op(c, other, **options)
    if c.numel() < SMALL:  # of which the memory of the evaluation would not be told anyway
        return op(c, other, **options)
    shape = c.shape if number or other.dim() == 0 else broadcast(c.shape, other.shape)
    return op(c, other, out=space.memory.empty(shape, c), **options)


def reshaped(space: Space, c: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of the given shape where there is one, else a copy in the memory of the evaluation."""
    if not writable(c):
        return c.reshape(shape)
    try:
        return c.view(shape)
    except RuntimeError:
        out = space.memory.empty(c.shape, c)
        return out.copy_(c).view(shape)


def expand(c: Tensor, shape: Sequence[int]) -> Tensor:
    """A stack of coefficients expanded to a value of the given shape."""
    c = lift(c, len(shape))
    return c if c.shape[1:] == tuple(shape) else c.expand(c.shape[0], *shape)


# --- absence in part ------------------------------------------------------------------------------------------


def _spread(c: Tensor, rows: Rows, onto: Rows) -> Tensor:
    """Coefficients with zeros for those of ``onto`` that are not among them."""
    place = {row: n for n, row in enumerate(onto)}
    index = torch.tensor([place[row] for row in rows], device=c.device)
    return c.new_zeros(len(onto), *c.shape[1:]).index_copy(0, index, c)


def _united(*several: Coefficients) -> Rows | None:
    """The rows that one of them has; None for all."""
    if any(c.rows is None for c in several):
        return None
    return tuple(sorted({row for c in several for row in c.rows or ()}))


def aligned(*several: Coefficients) -> tuple[Rows | None, *tuple[Tensor, ...]]:
    """The rows that one of several has, and the tensors of all on them, with zeros where one has none.

    None of them may be absent as a whole.
    """
    first = several[0].rows
    if all(c.rows == first for c in several):
        return first, *(c.tensor for c in several)
    rows = _united(*several)
    onto = tuple(range(several[0].space.count(several[0].order))) if rows is None else rows
    return rows, *(c.tensor if c.rows == rows else _spread(c.tensor, c.rows or (), onto) for c in several)


def absent(space: Space, order: int) -> Coefficients:
    """Coefficients that are all zero by structure."""
    found = space.absent.get(order)
    if found is None:
        found = space.absent[order] = Coefficients(space, order)
    return found


def jointly(
    space: Space,
    f: Callable[..., Tensor],
    several: Sequence[Coefficients],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Coefficients:
    """A function that is linear in several values together, applied to their coefficients.

    What is absent of some but not of all takes part as zeros.

    Args:
        space: of the evaluation.
        f: takes a stack for each of the values.
        several: of each value.
        shapes: of the values.
        dtype: of the zeros.
        device: of the zeros.
    """
    there = [c for c in several if c]
    if not there:
        return several[0]
    rows, *_ = tensors = aligned(*there)
    count = tensors[1].shape[0]  # type: ignore[union-attr]
    found = iter(tensors[1:])
    zero = torch.zeros((), dtype=dtype, device=device)
    stacks = [next(found) if c else zero.expand(count, *shape) for c, shape in zip(several, shapes, strict=True)]
    return Coefficients(space, several[0].order, f(*stacks), rows)


def joined(
    space: Space,
    several: Sequence[Coefficients],
    sizes: Sequence[int],
    shape: Sequence[int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Coefficients:
    """Coefficients of values side by side along an axis (a negative number), which has these sizes in them.

    Args:
        space: of the evaluation.
        several: of each value.
        sizes: of the axis.
        shape: of the result.
        dim: the axis.
        dtype: of the result's coefficients.
        device: of the result.
    """
    there = [c for c in several if c]
    if not there:
        return several[0]
    same = all(c.rows == there[0].rows and c.dtype == dtype for c in there)
    if same and all(c.sparse is not None for c in there):
        found = Sparse.joined([c.sparse or size for c, size in zip(several, sizes, strict=True)], shape, dim)
        if found is not None:
            return there[0]._new(found)
    if same and dim == -1 and not torch.compiler.is_compiling():
        tensors = [c.tensor if c else None for c in several]
        if plain(*tensors):
            pieces = tuple(zip(tensors, sizes, strict=True))
            return Coefficients(space, there[0].order, _Joined(pieces, tuple(shape)), there[0].rows)
    axis = len(shape) + dim
    shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
    return jointly(space, lambda *cs: torch.cat(cs, dim), several, shapes, dtype, device)


# --- pairs ----------------------------------------------------------------------------------------------------


def outer(a: Coefficients, b: Coefficients) -> Coefficients:
    """``a_i b_j`` for each second coefficient; where ``a_i b_j = a_j b_i`` does not hold, use `symmetric`.

    Nothing is formed before somebody looks: sums over elements become products of matrices. Absent where operators
    make no second coefficients.
    """
    space = a.space
    if not a or not b or space.order == 1:
        return absent(space, 2)
    if (inner := _sparse_inner(a, b)) is not None:
        return Coefficients(space, 2, inner, None, True)
    structure, rows, ta, tb = _paired(space, a, b)
    return absent(space, 2) if structure is None else Coefficients(space, 2, _Outer(structure, ta, tb), rows, True)


def symmetric(a: Coefficients, b: Coefficients) -> Coefficients:
    """``a_i b_j + a_j b_i`` for each second coefficient, elementwise."""
    space = a.space
    if not a or not b or space.order == 1:
        return absent(space, 2)
    if (inner := _sparse_inner(a, b)) is not None:
        return Coefficients(space, 2, 2 * inner, None, True)
    structure, rows, ta, tb = _paired(space, a, b)
    if structure is None:
        return absent(space, 2)
    if not writable(ta, tb):
        return Coefficients(space, 2, structure.symmetric(ta, tb), rows, True)
    total = _Outer(structure, ta, tb).materialized(space)
    if structure.on_diagonal:
        total.mul_(2)
    else:
        structure.add_outer(total, tb, ta)
    return Coefficients(space, 2, total, rows, True)


def _sparse_inner(a: Coefficients, b: Coefficients) -> Tensor | None:
    """The sum over all directions of ``a_k b_k``, where that is the second coefficient and each element has few."""
    if a.sparse is None or b.sparse is None or not a.space.structure.is_trace:
        return None
    return a.sparse.inner(b.sparse)


def _paired(space: Space, a: Coefficients, b: Coefficients) -> tuple[PairStructure | None, Rows | None, Tensor, Tensor]:
    """The structure of the directions that are there, which coefficients it has, and both factors on them."""
    rows, ta, tb = aligned(a, b)
    ndim = max(ta.dim(), tb.dim()) - 1
    ta, tb = lift(ta, ndim), lift(tb, ndim)
    if rows is None:
        return space.structure, None, ta, tb
    found = space.structure.restricted(rows)
    return (None, None, ta, tb) if found is None else (*found, ta, tb)
