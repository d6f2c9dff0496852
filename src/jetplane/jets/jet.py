"""Jets: tensors that carry their first and second directional derivatives.

A jet of a value y that depends on parameters moving along K directions holds

- the *primal* ``y`` of shape S,
- the *first coefficients* ``y_i = dy/da_i`` of the K directions,
- the *second coefficients* ``y_ij = d²y/(da_i da_j)``, those that the structure of its `Space` keeps.

Coefficients are derivatives, never Taylor coefficients: there are no factorials. What is zero by structure is absent
(`jetplane.jets.coefficients`).

The number system is the hyper-dual one of Cobb et al., arXiv 2408.10419, section 2, with all K
directions in one number so that the primal and the first coefficients are computed once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .._torch import (
    DisableTorchFunctionSubclass,
    Keys,
    TorchDispatchMode,
    below_autograd,
    below_view_tracking,
    disabled_torch_dispatch,
    disabled_torch_function,
    innermost_mode,
    is_stand_in,
    make_wrapper_subclass,
    recording_keys,
    tree_leaves,
    under,
    user_keys,
)
from ..errors import DerivativeError
from .coefficients import Coefficients, absent
from .space import MODEL, Key, Space
from .structured import LowRank, Tangents

WRITTEN = (
    "a parameter was written to in place inside the closure; expected a closure that does not change the "
    "parameters of the evaluation. Write to a copy (parameter.clone()), or outside the closure"
)

LOST = torch.empty(0)  # the examples of a jet that stands for a sum over them, but no longer tells which

Held = Coefficients | Tensor | Tangents | None  # what coefficients can be given as


class _Detaching(threading.local):
    """Whether a call of ``detach()`` is under way in this thread, and a function in whose graph results are kept."""

    by_user = False
    by_autograd = False
    times = 0


_detaching = _Detaching()


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Let ``aten.detach`` keep derivatives: autograd takes results into its graph by it."""
    before, _detaching.by_autograd = _detaching.by_autograd, True
    try:
        yield
    finally:
        _detaching.by_autograd = before


@contextlib.contextmanager
def detaching() -> Iterator[None]:
    """Let ``aten.detach`` stop derivatives: the user's own code calls ``detach()``."""
    before, _detaching.by_user = _detaching.by_user, True
    _detaching.times += 1
    try:
        yield
    finally:
        _detaching.by_user = before


def times_detached() -> int:
    """How often code of users in this thread has called ``detach()`` of what carries derivatives."""
    return _detaching.times


def who_detaches() -> str:
    """Of whom a call of ``aten.detach`` is: the "user", "autograd", or "nobody" that is known."""
    return "user" if _detaching.by_user else "autograd" if _detaching.by_autograd else "nobody"


class Jet(torch.Tensor):
    """A tensor that shows its primal's shape, dtype and device and carries coefficients beside it.

    Jets are made by an evaluation (`jetplane.evaluate`, `jetplane.jet`) and never seen by its caller. That of a
    parameter may have `Tangents` as its first coefficients.

    Attributes:
        primal: the value.
        first: first coefficients.
        second: second coefficients.
        space: the directions.
        base: the jet whose memory this one looks into, if it is a view.
        version: how often the base had been written to when the coefficients were read.
        is_seed: whether it stands for a parameter.
        is_argument: whether it stands for an argument of a function, whose memory is the caller's: a write in place
            gives it another primal.
        origin: the primal that it was made with, if it has another one since.
        kind: see `Space.gauss_newton`.
        examples: each example's part of the slope; of losses that are not added up yet, integers, and of
            sums of losses that are stacked, a tuple: see `jetplane.rules.examples`.
        known: the curved functions of which it is a linear one: see `jetplane.rules.by_hand`.
    """

    primal: Tensor
    first: Coefficients
    second: Coefficients
    space: Space
    base: Jet | None
    version: int
    is_seed: bool
    kind: int
    examples: Any
    known: Any
    origin: Tensor | None
    is_argument: bool

    __torch_function__ = disabled_torch_function  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        primal: Tensor,
        first: Held,
        second: Held,
        space: Space | Key,
        base: Jet | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        kind: int | None = None,
    ) -> Jet:
        return make_wrapper_subclass(
            Recorded if cls is Jet and isinstance(space, Space) and space.recorded and not space.traced else cls,
            primal.shape,
            strides=primal.stride(),
            storage_offset=primal.storage_offset(),
            dtype=primal.dtype,
            device=primal.device,
        )

    def __init__(
        self,
        primal: Tensor,
        first: Held,
        second: Held,
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
        self.first = first.disowned() if isinstance(first, Coefficients) else Coefficients(space, 1, first)
        self.second = second.disowned() if isinstance(second, Coefficients) else Coefficients(space, 2, second)
        self.space = space
        self.base = base
        self.version = 0 if base is None else base.version
        self.is_seed = False
        self.origin = None
        self.is_argument = False
        self.kind = space.kind if kind is None else kind
        self.examples = None
        self.known = None
        made = space.made
        if made is not None:
            made.append(ref(self))
            if len(made) > space.most:
                space.forget()

    # --- what a compiler sees: tensors and plain numbers ---------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Key, int]]:
        meta = self.space.key, self.kind
        if self.has_factors:
            return ["primal", "left", "right"], meta
        names = [n for n in ("primal", "first_tensor", "second_tensor") if getattr(self, n) is not None]
        known = self.examples is not None and self.examples is not LOST
        return [*names, "examples"] if known else names, meta

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: tuple[Key, int], size: Any, stride: Any) -> Jet:
        key, kind = meta
        first, second, left, right = (inner.get(n) for n in ("first_tensor", "second_tensor", "left", "right"))
        jet = Jet(inner["primal"], first, second, key, None, left, right, kind)
        jet.examples = inner.get("examples")
        return jet

    @property
    def has_factors(self) -> bool:
        """Whether the first coefficients are low-rank tangents; a compiler cannot look at those themselves."""
        return isinstance(self.first.structured, LowRank)

    @property
    def left(self) -> Tensor:
        """The left factor of low-rank tangents."""
        low = self.first.structured
        assert isinstance(low, LowRank)
        return low.left

    @property
    def right(self) -> Tensor:
        """The right factor."""
        low = self.first.structured
        assert isinstance(low, LowRank)
        return low.right

    @property
    def level(self) -> int:
        """How deep the evaluation that it belongs to is nested."""
        return self.space.level

    @property
    def first_tensor(self) -> Tensor | None:
        """All first coefficients as one tensor (K, *S), or None."""
        return self._whole(parts(self, self.space)[1])

    @property
    def second_tensor(self) -> Tensor | None:
        """All second coefficients as one tensor (count, *S), or None."""
        return self._whole(parts(self, self.space)[2])

    def _whole(self, c: Coefficients) -> Tensor | None:
        return c.full(self.primal.shape, c.tensor.dtype, c.tensor.device) if c else None

    def __repr__(self) -> str:  # type: ignore[override]
        order = 2 if self.second else 1 if self.first else 0
        return f"Jet({self.primal!r}, k={self.space.k}, carried order={order})"

    def __format__(self, spec: str) -> str:
        return format(self.primal, spec) if spec else repr(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(types) > 1 and any(map(goes_outside, types)):
            return NotImplemented  # it takes itself apart, and its parts meet the jets
        try:
            return _dispatch(func, args, kwargs or {})
        except AttributeError:  # in another thread the evaluation ended meanwhile, and jets became ordinary tensors
            if func._schema.is_mutable or any(isinstance(x, Jet) for x in tree_leaves((args, kwargs))):
                raise
            return func(*args, **(kwargs or {}))

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

    def detach(self) -> Tensor:
        """The value without derivatives, whoever asks."""
        if torch.compiler.is_compiling():
            return super().detach()
        with detaching():
            return super().detach()

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


class Recorded(Jet):
    """A jet of an evaluation whose rules record a graph for reverse mode.

    Such an evaluation runs user code with autograd, so that what is computed of plain tensors alone is recorded.
    Autograd, though, would break composite operators up and hold jets in a graph of its own. An operator that takes a
    jet is therefore called below autograd, which passes it to its rule as a whole, and rules run with autograd again.
    """

    @classmethod
    def __torch_function__(  # pyright: ignore[reportIncompatibleVariableOverride]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with DisableTorchFunctionSubclass():
            args = tuple(_resolved(x) for x in args)
            kwargs = {name: _resolved(x) for name, x in (kwargs or {}).items()}
        with whole(between=isinstance(func, FunctionType)):
            return func(*args, **kwargs)


def _resolved(x: Any) -> Any:
    """A plain tensor without lazy conjugation or sign, which torch would resolve below autograd, unrecorded."""
    if type(x) is Tensor:
        return x.resolve_conj().resolve_neg() if x.requires_grad and (x.is_conj() or x.is_neg()) else x
    return type(x)(_resolved(y) for y in x) if type(x) in (list, tuple) else x


class _Between(TorchDispatchMode):
    """Records what is computed of plain tensors alone, where code runs below autograd."""

    def __init__(self, keys: Keys) -> None:
        super().__init__()
        self._keys = keys

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what would make it skip imports a compiler, at the first operator, and costs time at each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, Tensor) and x.requires_grad for x in leaves) or any(
            isinstance(x, Jet) for x in leaves
        ):
            return func(*args, **kwargs)
        with under(self._keys):
            return func(*args, **kwargs)


class _Traced(TorchDispatchMode):
    """Records what a rule computes of plain tensors, where a compiler traces it; jets are met below autograd."""

    records = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, Jet) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with under(recording_keys()):
            return func(*args, **kwargs)


def traced() -> contextlib.AbstractContextManager[Any]:
    """Have rules recorded by autograd where a compiler traces them."""
    return contextlib.nullcontext() if isinstance(innermost_mode(), _Traced) else _Traced()


@contextlib.contextmanager
def whole(between: bool) -> Iterator[None]:
    """Call a function so that operators on recorded jets arrive as a whole.

    Args:
        between: whether it may compute with plain tensors between operators, as functions that torch defines in Python.
    """
    keys, nothing = user_keys(tracked=True), contextlib.nullcontext()
    with (
        DisableTorchFunctionSubclass(),
        below_autograd(),
        below_view_tracking() if between else nothing,
        _Between(keys) if between else nothing,
    ):
        yield


@functools.cache
def goes_outside(cls: type) -> bool:
    """Whether tensors of a class wrap others and take operators apart, as jets do; a compiler's stand-ins do not."""
    takes_over = cls.__torch_dispatch__ is not disabled_torch_dispatch  # type: ignore[attr-defined]
    return takes_over and not issubclass(cls, Jet) and not is_stand_in(cls)


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
    if cls is Tensor or asked is disabled_torch_function:  # a parameter's
        return Jet
    return type(cls.__name__, (Jet, cls), {"__torch_function__": asked})


Dispatcher = Callable[[Any, Any, dict[str, Any]], Any]
_dispatch: Dispatcher
_refresh: Callable[[Jet], None]


def set_dispatcher(dispatcher: Dispatcher) -> None:
    """Install what carries jets through operators; called once, by `jetplane.rules`."""
    global _dispatch
    _dispatch = dispatcher


def set_refresh(refresh: Callable[[Jet], None]) -> None:
    """Install what reads a view's coefficients again; called once, by `jetplane.jets.storage`."""
    global _refresh
    _refresh = refresh


# --- how rules look at an argument, and how they answer --------------------------------------------


def is_jet(x: Any, space: Space) -> bool:
    """Whether x is a jet of this space; jets of outer spaces are constants here."""
    return isinstance(x, Jet) and x.space is space


def parts(x: Any, space: Space) -> tuple[Any, Coefficients, Coefficients]:
    """Primal, first and second coefficients of anything; those of a constant are absent."""
    if not (isinstance(x, Jet) and x.space is space):
        return x, absent(space, 1), absent(space, 2)
    if x.base is not None and x.base.version != x.version:
        _refresh(x)
    first, second = x.first, x.second
    if (
        first.structured is not None and first.sparse is None
    ):  # a rule may look at the tensor more than once, and the jet does not keep it
        first = Coefficients(space, 1, first.held, first.rows)
    if kind_of(x) < space.kind == MODEL:  # Gauss-Newton: the model is linear in what enters it
        second = absent(space, 2)
    return x.primal, first, second


def kind_of(x: Jet) -> int:
    """The kind of a jet, of a view with what was written into its memory since."""
    return max(x.kind, x.root().kind)


def primal(x: Any, space: Space) -> Any:
    """The primal of a jet of this space; anything else as it is."""
    if not (isinstance(x, Jet) and x.space is space):
        return x
    if x.base is not None and x.base.version != x.version and x.base.origin is not None:
        _refresh(x)
    return x.primal


def innermost(x: Any) -> Any:
    """The primal of a jet of jets that is a plain tensor; anything else as it is."""
    while isinstance(x, Jet):
        x = x.primal
    return x


def make(primal: Tensor, first: Coefficients, second: Coefficients, space: Space) -> Tensor:
    """A jet, its coefficients expanded to the primal's shape; the bare primal where none is left."""
    dtype, shape = primal.dtype, primal.shape
    if (first.held is None and second.held is None) or not (dtype.is_floating_point or dtype.is_complex):
        return primal
    dtype = carried(dtype)
    # 0-dim primals do not promote, (K,) coefficients would
    return Jet(primal, _fitted(first, dtype, shape), _fitted(second, dtype, shape), space)


def _fitted(c: Coefficients, dtype: torch.dtype, shape: torch.Size) -> Coefficients:
    if c.held is None:
        return c
    if c.dtype is not None and c.dtype != dtype:
        c = c.to(dtype)
    return c.expanded(shape)


def carried(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coefficients: that of the primal, but single precision beside a half-precision one."""
    return torch.float32 if dtype.itemsize == 2 and dtype.is_floating_point else dtype


def precise(p: Tensor) -> Tensor:
    """A primal in the dtype of its coefficients, for derivatives to be computed from."""
    dtype = carried(p.dtype)
    return p if p.dtype == dtype else p.to(dtype)
