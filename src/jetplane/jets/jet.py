"""Jets: tensors that carry their first and second directional derivatives.

A jet of a value y that depends on parameters moving along K directions holds

- the *primal* ``y`` of shape S,
- the *first coefficients* ``y_i = dy/da_i``, stacked to shape (K, *S),
- the *second coefficients* ``y_ij = d²y/(da_i da_j)``, one for each pair of `Space`, (pairs, *S).

Coefficients are derivatives, never Taylor coefficients: there are no factorials. A coefficient that
is zero by structure is absent (None), and this module alone knows how absence is added, multiplied
and chained; the rules in `jetplane.rules` are written in terms of `linear`, `chain` and `product`.

The number system is the hyper-dual one of Cobb et al., arXiv 2408.10419, section 2, with all K
directions in one number so that the primal and the first coefficients are computed once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from .memory import Memory
from .structured import Deferred, LowRank, Tangents

PARAMETER, MODEL, LOSS = 0, 1, 2  # kinds of jets: see Space.gauss_newton


LOST = torch.empty(0)  # the examples of a jet that stands for a sum over them, but no longer tells which

Key = tuple[int, int, int, int, bool, bool]  # k, block, order, level, gauss_newton and examples of a space


@dataclass(eq=False)
class Space:
    """The directions that jets of one evaluation are expanded along.

    Attributes:
        k: number of directions.
        block: directions of one plane. Pairs are kept within planes alone: ``block == k`` keeps all
            K(K+1)/2 pairs, ``block == 1`` the diagonal.
        order: 2 where operators make second coefficients, 1 where they only pass on those that are there.
        gauss_newton: second coefficients are made by loss functions and by functions of the parameters
            alone (regularizers), not by the model between them. Jets then have a kind: PARAMETER (a
            function of parameters alone), MODEL (of data too), LOSS (what a loss function made).
        kind: the kind of what the operator being carried makes.
        operator: the name of the operator being carried.
        formed: operators that formed low-rank tangents since they could not use the factors, and how often.
        keys: torch's dispatch keys as they are for user code. Inside ``__torch_dispatch__`` more of them
            are off, lazy conjugation and view tracking among them, which rules and autograd rely on.
        level: nesting depth. Jets of an outer evaluation have a smaller level and are constants
            for this one, which is what rules perturbation confusion out.
        examples: whether each example's part of the slope is kept: see `jetplane.rules.examples`.
        entrance: where the model carries a part of the directions only: see `jetplane.evaluation.entrance`.
    """

    k: int
    block: int
    order: int = 2
    level: int = 0
    gauss_newton: bool = False
    examples: bool = False
    kind: int = PARAMETER
    keys: tuple[Any, Any] | None = None
    operator: str = ""
    formed: dict[str, int] = field(default_factory=dict)
    entrance: Any = None

    @property
    def key(self) -> Key:
        """What a compiler may hold of a space: plain numbers."""
        return self.k, self.block, self.order, self.level, self.gauss_newton, self.examples

    @staticmethod
    @functools.cache
    def of(key: Key) -> Space:
        """The one space with this key, for compiled code."""
        return Space(*key)

    @functools.cached_property
    def memory(self) -> Memory:
        """Where large coefficients of this evaluation are; compiled code has its own."""
        return Memory(self.k)

    def finish(self) -> None:
        """The evaluation is over; tensors that it returned may be in its memory."""
        if "memory" in self.__dict__:
            self.memory.trim()

    @property
    def planes(self) -> int:
        """Number of independent planes, k / block."""
        return self.k // self.block

    @property
    def plane_pairs(self) -> int:
        """Pairs (i, j) with i <= j within one plane."""
        return self.block * (self.block + 1) // 2

    @property
    def pairs(self) -> int:
        """Number of second coefficients."""
        return self.planes * self.plane_pairs

    def indices(self) -> list[tuple[int, int]]:
        """Directions (i, j) of each second coefficient, in order of storage."""
        b = self.block
        return [(q * b + r, q * b + c) for q in range(self.planes) for r in range(b) for c in range(r, b)]

    def rows(self) -> Iterator[tuple[int, slice]]:
        """For each row r of a plane's upper triangle: r and where its pairs (r, r..block-1) are."""
        start = 0
        for r in range(self.block):
            yield r, slice(start, start + self.block - r)
            start += self.block - r


class Jet(torch.Tensor):
    """A tensor that shows its primal's shape, dtype and device and carries coefficients beside it.

    Jets are made by an evaluation (`jetplane.evaluate`, `jetplane.jet`) and never seen by its caller. That of a
    parameter may have `Tangents` as its first coefficients; `parts` forms them.
    """

    primal: Tensor
    first: Tensor | Tangents | None
    second: Tensor | Outer | None
    space: Space
    base: Jet | None
    version: int
    is_seed: bool
    kind: int
    examples: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        primal: Tensor,
        first: Tensor | Tangents | None,
        second: Tensor | Outer | None,
        space: Space | Key,
        base: Jet | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        kind: int | None = None,
    ) -> Jet:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            primal.shape,
            strides=primal.stride(),
            storage_offset=primal.storage_offset(),
            dtype=primal.dtype,
            device=primal.device,
        )

    def __init__(
        self,
        primal: Tensor,
        first: Tensor | Tangents | None,
        second: Tensor | Outer | None,
        space: Space | Key,
        base: Jet | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        kind: int | None = None,
    ) -> None:
        if left is not None and right is not None:  # compiled code passes tensors alone
            first = LowRank(left, right, primal.shape)
        space = space if isinstance(space, Space) else Space.of(space)
        self.primal = primal
        self.first = first
        self.second = second
        self.space = space
        self.base = base  # the jet whose storage a view looks into
        self.version = 0 if base is None else base.version
        self.is_seed = False
        self.kind = space.kind if kind is None else kind
        self.examples = None

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Key, int]]:
        meta = self.space.key, self.kind
        if isinstance(self.first, LowRank):
            return ["primal", "left", "right"], meta
        parts(self, self.space)  # a compiler sees coefficients as they are now
        known = self.examples is not None and self.examples is not LOST
        held = [n for n in ("primal", "first", "second") if getattr(self, n) is not None]
        return [*held, "examples"] if known else held, meta

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: tuple[Key, int], size: Any, stride: Any) -> Jet:
        key, kind = meta
        first, second, left, right = (inner.get(name) for name in ("first", "second", "left", "right"))
        jet = Jet(inner["primal"], first, second, key, None, left, right, kind)
        jet.examples = inner.get("examples")
        return jet

    @property
    def has_factors(self) -> bool:
        """Whether the first coefficients are low-rank tangents; a compiler cannot look at those themselves."""
        return isinstance(self.first, LowRank)

    @property
    def left(self) -> Tensor:
        """The left factor of low-rank tangents, as a compiler asks for it."""
        assert isinstance(self.first, LowRank)
        return self.first.left

    @property
    def right(self) -> Tensor:
        """The right factor."""
        assert isinstance(self.first, LowRank)
        return self.first.right

    def __repr__(self) -> str:  # type: ignore[override]
        order = 0 if self.first is None else 1 if self.second is None else 2
        return f"Jet(shape={tuple(self.shape)}, dtype={self.dtype}, k={self.space.k}, carried order={order})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(types) > 1 and any(map(goes_outside, types)):
            return NotImplemented  # it takes itself apart, and its parts meet the jets
        return _dispatch(func, args, kwargs or {})

    def as_subclass(self, cls: type) -> Any:
        """The same jet with the class of other data, whose ``__torch_function__`` goes on to be asked.

        Raises:
            DerivativeError: the class takes over operators (``__torch_dispatch__``), which the jet does itself.
        """
        wanted = _jet_class(cls)
        if type(self) is wanted:
            return self
        jet = wanted(self.primal, self.first, self.second, self.space, self.root(), kind=self.kind)
        jet.version, jet.examples = self.version, self.examples
        return jet

    def __copy__(self) -> Jet:
        return self.alias(self.primal)

    def __deepcopy__(self, memo: Any) -> Jet:
        return torch.ops.aten.clone.default(self)

    def root(self) -> Jet:
        """The jet whose memory this one looks into: itself, unless it is a view."""
        return self if self.base is None else self.base

    def alias(self, primal: Tensor) -> Jet:
        """Another jet over the same coefficients."""
        return Jet(primal, self.first, self.second, self.space, self.root())


@functools.cache
def goes_outside(cls: type) -> bool:
    """Whether tensors of a class wrap others and take operators apart, as jets do; a compiler's stand-ins do not."""
    takes_over = cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    return takes_over and not issubclass(cls, Jet) and not cls.__module__.startswith("torch._subclasses")


@functools.cache
def _jet_class(cls: type) -> type[Jet]:
    """The class of jets of a class of tensors."""
    if issubclass(cls, Jet):
        return cls
    if goes_outside(cls):
        raise DerivativeError(
            f"as_subclass({cls.__name__}) of a tensor that depends on the parameters, where {cls.__name__} takes over "
            "operators by __torch_dispatch__; expected a class that wraps tensors instead, or none"
        )
    asked = inspect.getattr_static(cls, "__torch_function__")
    if cls is Tensor or asked is torch._C._disabled_torch_function_impl:  # a parameter's
        return Jet
    return type(cls.__name__, (Jet, cls), {"__torch_function__": asked})


Dispatcher = Callable[[Any, Any, dict[str, Any]], Any]
_dispatch: Dispatcher


def set_dispatcher(dispatcher: Dispatcher) -> None:
    """Install what carries jets through operators; called once, by `jetplane.rules`."""
    global _dispatch
    _dispatch = dispatcher


# --- parts: how rules look at an argument ------------------------------------------------


def is_jet(x: Any, space: Space) -> bool:
    """Whether x is a jet of this space; jets of outer spaces are constants here."""
    return isinstance(x, Jet) and x.space is space


def parts(x: Any, space: Space) -> tuple[Any, Tensor | None, Tensor | None]:
    """Primal, first and second coefficients of anything; a constant has the first part only."""
    if not (isinstance(x, Jet) and x.space is space):
        return x, None, None
    if x.base is not None and x.base.version != x.version:
        _refresh(x)
    first = x.first
    if isinstance(first, Tangents):
        if not isinstance(first, Deferred):
            space.formed[space.operator] = space.formed.get(space.operator, 0) + 1
        first = first.formed()
    if _bent(x, space):
        return x.primal, first, None
    if isinstance(x.second, Outer):
        x.second = x.second.formed(space)
    return x.primal, first, x.second


def kind_of(x: Jet) -> int:
    """The kind of a jet, of a view with what was written into its memory since."""
    return max(x.kind, x.root().kind)


def low_rank(x: Any, space: Space) -> LowRank | None:
    """The tangents of a parameter's jet where they are of low rank: for operators that can use the factors."""
    return x.first if is_jet(x, space) and isinstance(x.first, LowRank) else None


def primal(x: Any, space: Space) -> Any:
    """The primal of a jet of this space; anything else as it is."""
    return x.primal if isinstance(x, Jet) and x.space is space else x


def products(x: Any, space: Space) -> Outer | None:
    """The second coefficients where they are products that nobody has formed: for operators that sum them up."""
    return x.second if is_jet(x, space) and isinstance(x.second, Outer) and not _bent(x, space) else None


def _bent(x: Jet, space: Space) -> bool:
    """Whether a function of the parameters enters the model, which Gauss-Newton takes to be linear in it."""
    return kind_of(x) < space.kind == MODEL


def make(primal: Tensor, first: Tensor | None, second: Tensor | Outer | None, space: Space) -> Tensor:
    """A jet, or the bare primal where no coefficient is left."""
    if first is None and second is None:
        return primal
    if not (primal.dtype.is_floating_point or primal.dtype.is_complex):
        return primal
    dtype = carried(primal.dtype)
    if first is not None and first.dtype != dtype:  # 0-dim primals do not promote, (K,) coefficients would
        first = first.to(dtype)
    if isinstance(second, Tensor) and second.dtype != dtype:
        second = second.to(dtype)
    return Jet(primal, first, second, space)


def carried(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coefficients: that of the primal, but single precision beside a half-precision one."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def precise(p: Tensor) -> Tensor:
    """A primal in the dtype of its coefficients, for derivatives to be computed from."""
    dtype = carried(p.dtype)
    return p if p.dtype == dtype else p.to(dtype)


def lift(c: Tensor, ndim: int) -> Tensor:
    """Coefficients (n, *S) viewed as (n, 1, …, 1, *S) with ``ndim`` axes after the first.

    Broadcasting aligns shapes at the right, which would let the direction axis meet a data axis.
    """
    missing = ndim + 1 - c.dim()
    if missing <= 0:
        return c
    return c.reshape(c.shape[0], *([1] * missing), *c.shape[1:])


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum, where None is zero."""
    if a is None:
        return b
    return a if b is None else a + b


def scale(factor: Any, c: Tensor | None) -> Tensor | None:
    """Product with a factor, where None is zero."""
    return None if c is None else factor * c


def apply(space: Space, op: Callable[..., Tensor], c: Tensor, other: Any, **options: Any) -> Tensor:
    """An elementwise ``op(c, other)``, written to the memory of the evaluation."""
    number = type(other) in (int, float)
    if not plain(c) or not (number or (plain(other) and other.dtype == c.dtype)):
        return op(c, other, **options)
    shape = c.shape if number or other.dim() == 0 else torch.broadcast_shapes(c.shape, other.shape)
    return op(c, other, out=space.memory.empty(shape, c), **options)


def reshaped(space: Space, c: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of the given shape where there is one, else a copy in the memory of the evaluation."""
    if not plain(c):
        return c.reshape(shape)
    try:
        return c.view(shape)
    except RuntimeError:
        out = space.memory.empty(c.shape, c)
        return out.copy_(c).view(shape)


def plain(*tensors: Tensor | None) -> bool:
    """Whether in-place kernels may be used: no outer jet and no compiler's stand-in among them."""
    return all(t is None or type(t) in _PLAIN for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def expand(c: Tensor, shape: Sequence[int]) -> Tensor:
    """Coefficients expanded to a result of the given shape."""
    c = lift(c, len(shape))
    return c if c.shape[1:] == tuple(shape) else c.expand(c.shape[0], *shape)


def broadcast(c: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The same, where None stays None."""
    return None if c is None else expand(c, shape)


# --- pairs -------------------------------------------------------------------------------


def outer(space: Space, a: Tensor, b: Tensor) -> Tensor:
    """``a_i * b_j`` for each pair i <= j; a and b of shape (K, *S) up to broadcasting."""
    a, b = _align(a, b)
    if space.block == 1:
        return a * b
    pa, pb = _by_plane(space, a), _by_plane(space, b)
    if not plain(a, b):
        return torch.cat([pa[:, r : r + 1] * pb[:, r:] for r, _ in space.rows()], 1).flatten(0, 1)
    shape = torch.broadcast_shapes(a.shape[1:], b.shape[1:])
    like = a.new_empty(0, dtype=torch.result_type(a, b))
    out = space.memory.empty((space.planes, space.plane_pairs, *shape), like)
    for r, row in space.rows():
        torch.mul(pa[:, r : r + 1], pb[:, r:], out=out[:, row])
    return out.flatten(0, 1)


def symmetric(space: Space, a: Tensor, b: Tensor) -> Tensor:
    """``a_i * b_j + a_j * b_i`` for each pair i <= j, elementwise."""
    a, b = _align(a, b)
    if space.block == 1:
        return 2 * (a * b)
    if not plain(a, b):
        return outer(space, a, b) + outer(space, b, a)
    out = outer(space, a, b)
    pa, pb, po = _by_plane(space, a), _by_plane(space, b), _by_plane(space, out)
    for r, row in space.rows():
        po[:, row].addcmul_(pa[:, r:], pb[:, r : r + 1])
    return out


@dataclass(frozen=True)
class Outer:
    """Second coefficients ``a_i * b_j`` before they are formed: summed up at once, they never are."""

    a: Tensor
    b: Tensor

    def formed(self, space: Space) -> Tensor:
        """One tensor for each pair."""
        return outer(space, self.a, self.b)

    def scaled(self, factor: Any) -> Outer:
        """Times a constant, elementwise."""
        return Outer(factor * self.a, self.b)

    def summed(self, space: Space) -> Tensor:
        """``sum(a_i * b_j)`` over all elements, for each pair."""
        return gram(space, self.a, self.b)


def gram(space: Space, a: Tensor, b: Tensor) -> Tensor:
    """``sum(a_i * b_j)`` over all elements, for each pair: (pairs,), without (pairs, *S) in memory.

    ``sum(a_i b_j)`` must be symmetric in i and j, as it is for a Hessian form.
    """
    a, b = _align(a, b)
    shape = torch.broadcast_shapes(a.shape[1:], b.shape[1:])
    a, b = (c.expand(c.shape[0], *shape).reshape(space.planes, space.block, shape.numel()) for c in (a, b))
    if space.block == 1:
        return (a * b).sum((1, 2))
    products = a @ b.transpose(1, 2)
    return torch.cat([products[:, r, r:] for r, _ in space.rows()], 1).flatten()


def _by_plane(space: Space, c: Tensor) -> Tensor:
    return c.reshape(space.planes, c.shape[0] // space.planes, *c.shape[1:])


def _align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    ndim = max(a.dim(), b.dim()) - 1
    return lift(a, ndim), lift(b, ndim)


# --- calculus: every rule is one of these -------------------------------------------------


def linear(space: Space, x: Any, f: Callable[[Any], Tensor], on_stack: Callable[[Tensor], Tensor]) -> Tensor:
    """A linear f: applied to the primal, and to stacks of coefficients (n, *S) by ``on_stack``."""
    p, first, second = parts(x, space)
    return make(
        f(p),
        None if first is None else on_stack(first),
        None if second is None else on_stack(second),
        space,
    )


def chain(space: Space, x: Any, y: Tensor, d1: Tensor | None, d2: Tensor | None) -> Tensor:
    """Elementwise y = f(x): ``y_i = f' x_i`` and ``y_ij = f' x_ij + f'' x_i x_j``; None is zero."""
    _, first, second = parts(x, space)
    y1 = None if d1 is None else scale(d1, first)
    y2: Tensor | Outer | None = None if d1 is None else scale(d1, second)
    if d2 is not None and first is not None and space.order == 2:
        bent = d2 * first
        y2 = Outer(bent, first) if y2 is None and bent.shape == first.shape else accumulate(space, y2, bent, first)
    return make(y, y1, y2, space)


def chain_many(
    space: Space,
    xs: Sequence[Any],
    y: Tensor,
    gradient: Sequence[Tensor | None],
    hessian: dict[tuple[int, int], Tensor],
) -> Tensor:
    """Elementwise y = f(x_0, x_1, …) by its partial derivatives.

    ``hessian[a, b]`` with a <= b holds the mixed second derivative; an absent one is zero.
    """
    shape = y.shape
    every = [parts(x, space) for x in xs]
    firsts = [broadcast(f, shape) for _, f, _ in every]
    y1 = y2 = None
    for g, f, (_, _, s) in zip(gradient, firsts, every, strict=True):
        if g is not None:
            y1 = add(y1, scale(g, f))
            y2 = add(y2, scale(g, broadcast(s, shape)))
    if space.order == 2:
        for (a, b), h in hessian.items():
            fa, fb = firsts[a], firsts[b]
            if fa is None or fb is None:
                continue
            y2 = add(y2, outer(space, h * fa, fa) if a == b else symmetric(space, h * fa, fb))
    return make(y, y1, y2, space)


def accumulate(space: Space, into: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``into + outer(a, b)``, in place where ``into`` is ours to overwrite."""
    if into is None:
        return outer(space, a, b)
    if not plain(into, a, b):
        return into + outer(space, a, b)
    target, pa, pb = _by_plane(space, into), _by_plane(space, a), _by_plane(space, b)
    for r, row in space.rows():
        target[:, row].addcmul_(pa[:, r : r + 1], pb[:, r:])
    return into


def multiply(space: Space, a: Any, b: Any) -> Tensor:
    """The elementwise product, with broadcasting."""
    for x, factor in ((a, b), (b, a)):
        lazy = products(x, space)
        if (
            lazy is not None
            and not is_jet(factor, space)
            and torch.broadcast_shapes(x.shape, _shape(factor)) == x.shape
        ):
            first = None if x.first is None else factor * x.first
            return make(torch.mul(x.primal, factor), first, lazy.scaled(factor), space)
    if a is b and is_jet(a, space):
        return chain(space, a, torch.mul(a.primal, a.primal), 2 * precise(a.primal), precise(a.primal).new_full((), 2))
    pa, fa, sa = parts(a, space)
    pb, fb, sb = parts(b, space)
    y = torch.mul(pa, pb)
    ndim = y.dim()

    def crossed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        left = None if a is None else apply(space, torch.mul, lift(a, ndim), pb)
        return left if b is None else _plus_product(space, left, pa, lift(b, ndim))

    y1, y2 = crossed(fa, fb), crossed(sa, sb)
    if fa is not None and fb is not None and space.order == 2:
        y2 = add(y2, symmetric(space, lift(fa, ndim), lift(fb, ndim)))
    return make(y, broadcast(y1, y.shape), broadcast(y2, y.shape), space)


def _plus_product(space: Space, total: Tensor | None, a: Any, c: Tensor) -> Tensor:
    """``total + a * c``, in place where that is possible: the total is ours."""
    if total is None:
        return apply(space, torch.mul, c, a)
    if not (plain(total, c) and type(a) is Tensor and a.dtype == total.dtype == c.dtype):
        return total + a * c
    fits = torch.broadcast_shapes(total.shape, a.shape, c.shape) == total.shape
    return total.addcmul_(a, c) if fits else total + a * c


def _shape(x: Any) -> Sequence[int]:
    return x.shape if isinstance(x, Tensor) else ()


def add_jets(space: Space, a: Any, b: Any, y: Tensor, alpha: Any = 1) -> Tensor:
    """``a + alpha * b`` with broadcasting; y is the primal result."""
    _, fa, sa = parts(a, space)
    _, fb, sb = parts(b, space)
    return make(y, _add_scaled(space, fa, fb, alpha, y.shape), _add_scaled(space, sa, sb, alpha, y.shape), space)


def _add_scaled(space: Space, a: Tensor | None, b: Tensor | None, alpha: Any, shape: Sequence[int]) -> Tensor | None:
    a, b = broadcast(a, shape), broadcast(b, shape)
    if b is None:
        return a
    if a is None:
        return b if alpha == 1 else b * alpha
    return apply(space, torch.add, a, b, alpha=alpha)


# --- storage: views and in-place writes ----------------------------------------------------


def storage(x: Tensor) -> torch.UntypedStorage:
    """The memory that the innermost primal lives in."""
    while isinstance(x, Jet):
        x = x.primal
    return x.untyped_storage()


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors look into one memory."""
    return storage(a)._cdata == storage(b)._cdata


def mark_view(result: Any, source: Jet) -> Any:
    """Record that a result looks into the source's memory, so that later writes reach both."""
    if not isinstance(result, Tensor) or not same_storage(result, source):
        return result
    base = source.root()
    if not isinstance(result, Jet):  # a part of a buffer that has no coefficients yet
        return Jet(result, None, None, source.space, base) if source.first is source.second is None else result
    if result.base is None:
        result.base, result.version = base, base.version
    return result


def write(target: Jet, value: Any, space: Space) -> Jet:
    """Overwrite a jet in place, so that everything which looks into its memory sees the change.

    Coefficients are replaced, never written to: other jets may share them. Views read theirs again
    from the base when its version has moved.

    Raises:
        DerivativeError: the target is a parameter of the evaluation, or its memory overlaps itself.
    """
    base = target.root()
    if base.is_seed:
        raise DerivativeError(
            "a parameter was written to in place inside the closure; expected a closure that leaves the "
            "parameters of the evaluation as they are. Write to a copy (parameter.clone()), or outside of it"
        )
    if any(s == 0 and n > 1 for n, s in zip(target.primal.shape, target.primal.stride(), strict=True)):
        raise DerivativeError("in-place write to an expanded tensor, whose elements share memory; clone() it first")
    if not plain(target.primal, value.primal if is_jet(value, space) else value) and target is not base:
        raise DerivativeError("in-place write to a view inside nested jets; use the out-of-place operation")
    p, first, second = parts(value, space)
    base.kind = target.kind = max(base.kind, value.kind if is_jet(value, space) else base.kind)
    parts(target, space)  # what is left of the old coefficients must be current
    parts(base, space)
    assert not isinstance(base.first, Tangents) and not isinstance(base.second, Outer)
    base.first = _replaced(base, target, base.first, first, space.k)
    base.second = _replaced(base, target, base.second, second, space.pairs)
    if p is not target.primal:
        if plain(target.primal, p):
            target.primal.copy_(p)
        else:
            target.primal = p.expand_as(target.primal)
    base.version += 1
    if target is base:
        return target
    _refresh(target)
    return target


def _replaced(base: Jet, view: Jet, held: Tensor | None, new: Tensor | None, n: int) -> Tensor | None:
    """The base's coefficients with those of a view replaced."""
    if held is None and new is None:
        return None
    new = broadcast(new, view.shape)
    if new is not None and new.dtype != carried(base.dtype):
        new = new.to(carried(base.dtype))
    if view is base:
        return new
    out = _laid_out(held, n, base.primal)
    region = _region(base, view.primal, out)
    region.zero_() if new is None else region.copy_(new)
    return out


def _refresh(view: Jet) -> None:
    """Read a view's coefficients again after somebody wrote into its base."""
    base = view.base
    assert base is not None
    for name in ("first", "second"):
        c = getattr(base, name)
        if c is not None and c.stride()[1:] != base.primal.stride():
            c = _laid_out(c, c.shape[0], base.primal)
            setattr(base, name, c)
        setattr(view, name, None if c is None else _region(base, view.primal, c))
    view.version = base.version


def _region(base: Jet, view: Tensor, c: Tensor) -> Tensor:
    """The part of the base's coefficients, laid out as its primal, that a view of the primal covers."""
    origin = base.primal.storage_offset()
    if base.dtype.is_complex and not view.dtype.is_complex:  # real parts lie at every second number
        c, origin = torch.view_as_real(c), 2 * origin
    if carried(view.dtype) != c.dtype or view.is_conj() != base.primal.is_conj() or view.is_neg():
        raise DerivativeError("an in-place write through, or under, a conjugate view of complex numbers")
    start = view.storage_offset() - origin
    return c.as_strided((c.shape[0], *view.shape), (c.stride(0), *view.stride()), c.storage_offset() + start)


def _laid_out(c: Tensor | None, n: int, like: Tensor) -> Tensor:
    """Coefficients in memory of their own with the primal's strides; None is zero."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    out = torch.empty_strided((n, *like.shape), (extent, *like.stride()), dtype=carried(like.dtype), device=like.device)
    return out.zero_() if c is None else out.copy_(c)


# Plain buffers that a jet was written into: storage -> a flat jet over the whole of it.
_promoted: dict[int, Jet] = {}


def promote(buffer: Tensor, space: Space) -> Jet:
    """The jet that stands for a plain tensor from now on, since a jet is about to be written into it."""
    key = storage(buffer)._cdata
    if key not in _promoted:
        memory = buffer.untyped_storage()
        flat = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        flat = flat.set_(memory)  # type: ignore[call-overload]
        flat = flat.as_strided((memory.nbytes() // buffer.element_size(),), (1,), 0)
        _promoted[key] = Jet(flat, None, None, space)
    jet = promoted(buffer)
    assert jet is not None
    return jet


def promoted(x: Tensor) -> Jet | None:
    """The jet over a plain tensor whose memory a jet was written into, or None."""
    if isinstance(x, Jet) or not _promoted or x.layout is not torch.strided:
        return None
    root = _promoted.get(storage(x)._cdata)
    if root is None or root.dtype != x.dtype:
        return None
    view = Jet(x, None, None, root.space, root, kind=root.kind)
    _refresh(view)
    return view


def forget_promoted(space: Space) -> None:
    """End of an evaluation: its buffers are plain tensors again."""
    for key in [key for key, jet in _promoted.items() if jet.space is space]:
        del _promoted[key]


def promotions() -> set[int]:
    """The buffers that are jets now."""
    return set(_promoted)


def forget_promotions(but: set[int]) -> None:
    """Take back promotions that were made since ``but`` was read."""
    for key in set(_promoted) - but:
        del _promoted[key]


def any_promoted() -> bool:
    """Whether plain arguments need a look at all."""
    return bool(_promoted)
