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
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .._torch import DisableTorchFunctionSubclass, disabled_torch_function, make_wrapper_subclass
from .coefficients import Coefficients, absent
from .space import MODEL, Key, Space
from .structured import LowRank, Tangents

LOST = torch.empty(0)  # the examples of a jet that stands for a sum over them, but no longer tells which

Held = Coefficients | Tensor | Tangents | None  # what coefficients can be given as


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
        is_seed: whether it stands for a parameter, or for an argument of a function.
        origin: the primal that it was made with, if it has another one since.
        kind: see `Space.gauss_newton`.
        examples: each example's part of the slope: see `jetplane.rules.examples`.
    """

    primal: Tensor
    first: Coefficients
    second: Coefficients
    space: Space
    base: Jet | None
    version: int
    is_seed: bool
    kind: int
    examples: Tensor | None
    origin: Tensor | None

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
            Recorded if isinstance(space, Space) and space.recorded else cls,
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
        self.kind = space.kind if kind is None else kind
        self.examples = None

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
        return f"Jet(shape={tuple(self.shape)}, dtype={self.dtype}, k={self.space.k}, carried order={order})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

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

    Such an evaluation runs user code with grad mode on, so that what is computed of plain tensors alone is recorded.
    Autograd, though, would break composite operators up and hold jets in a graph of its own. An operator that takes a
    jet is therefore called under inference mode, which passes it to its rule as a whole, and rules leave that mode.
    Functions that torch defines in Python may compute with plain tensors between operators, and run as they are.
    """

    @classmethod
    def __torch_function__(  # pyright: ignore[reportIncompatibleVariableOverride]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        whole = torch.is_grad_enabled() and not isinstance(func, FunctionType)
        with DisableTorchFunctionSubclass(), torch.inference_mode() if whole else contextlib.nullcontext():
            return func(*args, **(kwargs or {}))


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
    if first.structured is not None:  # a rule may look at the tensor more than once, and the jet does not keep it
        first = Coefficients(space, 1, first.held, first.rows)
    if kind_of(x) < space.kind == MODEL:  # Gauss-Newton: the model is linear in functions of the parameters
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
