"""Torch functions of nodes become a graph of scalars for each node.

A function is called once, on tensors of a few lanes (nodes) whose entries are nodes of a graph. A dispatch mode sees
the operators below torch's functions. Structural ones (views, concatenation, writes by index) run as they are on the
numbers of the entries; elementwise ones and sums of products become scalar operators; large products, look-ups and
operators without a rule become an `External`, a tensor function that torch itself computes. Lanes are traced
separately: an operator that would combine two of them, and a function that treats them differently, cannot be hidden.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import TorchDispatchMode, decompositions, no_dispatch, tree_leaves, tree_map
from ..errors import JetplaneError, ShapeError, TraceError
from ..llvm import Graph
from .external import OutsideFunction, Recording, Slot

# Where products have this many outputs and multiply-adds for each node, torch is faster than scalars.
LARGE_OUTPUTS, LARGE_PRODUCTS = 16, 64


def user_line() -> str | None:
    """The nearest line of code outside of torch and this package, as ``file:line in function``."""
    frame = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "jetplane"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return None


class Symbolic(Tensor):
    """A tensor that has no numbers: of graph nodes, or a value inside of an external function."""

    @staticmethod
    def __new__(cls, like: Tensor, dtype: torch.dtype, *_: Any) -> Any:
        """A wrapper without storage, laid out as `like`, since torch looks at strides; `__init__` sets its content."""
        return Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), like.storage_offset(), dtype=dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Refuse: the tracer's mode handles all operators while it is on."""
        raise TraceError(
            f"a value of a traced function is used outside it, by {func}: keep no tensors from one call to another"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)})"

    def __bool__(self) -> bool:
        raise TraceError(
            "Python branches on a value of a traced function (if, and, max, …), which has no number yet; choose with "
            f"torch.where, torch.maximum, …\n  at {user_line()}"
        )

    def __float__(self) -> float:
        raise TraceError(
            "a value of a traced function is converted to a Python number (float, math.sin, …), which it has not yet; "
            f"use torch's functions\n  at {user_line()}"
        )

    def __int__(self) -> int:
        return int(self.__float__())

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        """Refuse: there are no numbers."""
        raise TraceError(
            "a value of a traced function is passed to NumPy, where torch cannot follow it; compute with torch, or let "
            f"jetplane.control.per_node call what torch cannot see\n  at {user_line()}"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        """Refuse: there are no numbers."""
        return self.numpy()


class Scalars(Symbolic):
    """A tensor whose entries are nodes of the graph; `nodes` (int64) has their numbers."""

    def __init__(self, nodes: Tensor, dtype: torch.dtype) -> None:
        self.nodes = nodes


class Opaque(Symbolic):
    """A value inside of an external function that is still being recorded; `slot` is its place there."""

    def __init__(self, like: Tensor, dtype: torch.dtype, recording: Recording, slot: int) -> None:
        self.recording, self.slot = recording, slot


class _Primitive(Exception):
    """A decomposition has come to a primitive operator."""


Apply = Callable[..., int]


def _where_positive(g: Graph, x: int, a: int, b: int) -> int:
    return g.apply("select", g.apply("lt", g.constant(0.0), x), a, b)


def _elementwise() -> dict[str, Callable[..., int]]:
    """Functions of (graph, nodes of arguments); alphas and scales are arguments like others."""

    def c(value: float) -> Callable[[Graph], int]:
        return lambda g: g.constant(value)

    one, zero = c(1.0), c(0.0)

    def call(name: str) -> Callable[..., int]:
        return lambda g, *a: g.apply(name, *a)

    def sigmoid(g, x):
        return g.apply("div", one(g), g.apply("add", one(g), g.apply("exp", g.apply("neg", x))))

    def maximum(g, a, b):
        return g.apply("select", g.apply("lt", a, b), b, a)

    def minimum(g, a, b):
        return g.apply("select", g.apply("lt", a, b), a, b)

    def logical_not(g, a):
        return g.apply("sub", one(g), a)

    def clamp(g, x, low=None, high=None):
        x = x if low is None else maximum(g, x, low)
        return x if high is None else minimum(g, x, high)

    def softplus(g, x, beta=None, threshold=None):
        # max(x, 0) + log(1 + exp(-|x|)): no overflow, and torch's threshold lies within rounding
        scaled = x if beta is None else g.apply("mul", beta, x)
        tail = g.apply("log1p", g.apply("exp", g.apply("neg", g.apply("abs", scaled))))
        total = g.apply("add", maximum(g, scaled, zero(g)), tail)
        return total if beta is None else g.apply("div", total, beta)

    def ceil(g, x):
        return g.apply("neg", g.apply("floor", g.apply("neg", x)))

    def trunc(g, x):
        return g.apply("select", g.apply("lt", x, zero(g)), ceil(g, x), g.apply("floor", x))

    def remainder(g, x, y, whole=lambda g, q: g.apply("floor", q)):
        return g.apply("sub", x, g.apply("mul", y, whole(g, g.apply("div", x, y))))

    def nearest(g, x):  # ties to even
        up = g.apply("floor", g.apply("add", x, c(0.5)(g)))
        tie = g.apply("eq", g.apply("sub", up, x), c(0.5)(g))
        odd = g.apply("eq", remainder(g, up, c(2.0)(g)), one(g))
        return g.apply("sub", up, g.apply("mul", tie, odd))

    def gelu(g, x):
        half = g.apply("mul", c(0.5)(g), x)
        return g.apply("mul", half, g.apply("add", one(g), g.apply("erf", g.apply("mul", x, c(0.7071067811865476)(g)))))

    table: dict[str, Callable[..., int]] = {
        **{
            name: call(name)
            for name in "mul div neg sqrt exp log sin cos tan asin acos atan sinh cosh tanh erf".split()
        },
        **{name: call(name) for name in "expm1 log1p abs floor atan2 pow lt le eq".split()},
        "add": lambda g, a, b, alpha=None: g.apply("add", a, b if alpha is None else g.apply("mul", alpha, b)),
        "sub": lambda g, a, b, alpha=None: g.apply("sub", a, b if alpha is None else g.apply("mul", alpha, b)),
        "rsub": lambda g, a, b, alpha=None: g.apply("sub", b, a if alpha is None else g.apply("mul", alpha, a)),
        "gt": lambda g, a, b: g.apply("lt", b, a),
        "ge": lambda g, a, b: g.apply("le", b, a),
        "ne": lambda g, a, b: logical_not(g, g.apply("eq", a, b)),
        "logical_and": call("mul"),
        "bitwise_and": call("mul"),
        "logical_not": logical_not,
        "bitwise_not": logical_not,
        "logical_or": maximum,
        "bitwise_or": maximum,
        "square": lambda g, x: g.apply("mul", x, x),
        "reciprocal": lambda g, x: g.apply("div", one(g), x),
        "rsqrt": lambda g, x: g.apply("div", one(g), g.apply("sqrt", x)),
        "exp2": lambda g, x: g.apply("exp", g.apply("mul", x, c(0.6931471805599453)(g))),
        "log2": lambda g, x: g.apply("mul", g.apply("log", x), c(1.4426950408889634)(g)),
        "log10": lambda g, x: g.apply("mul", g.apply("log", x), c(0.4342944819032518)(g)),
        "sigmoid": sigmoid,
        "silu": lambda g, x: g.apply("mul", x, sigmoid(g, x)),
        "softplus": softplus,
        "gelu": gelu,
        "relu": lambda g, x: _where_positive(g, x, x, zero(g)),
        "leaky_relu": lambda g, x, slope=None: _where_positive(
            g, x, x, g.apply("mul", c(0.01)(g) if slope is None else slope, x)
        ),
        "elu": lambda g, x: _where_positive(g, x, x, g.apply("expm1", x)),
        "sign": lambda g, x: _where_positive(
            g, x, one(g), g.apply("select", g.apply("lt", x, zero(g)), c(-1.0)(g), zero(g))
        ),
        "ceil": ceil,
        "trunc": trunc,
        "fix": trunc,
        "frac": lambda g, x: g.apply("sub", x, trunc(g, x)),
        "round": nearest,
        "remainder": remainder,
        "fmod": lambda g, x, y: remainder(g, x, y, trunc),
        "maximum": maximum,
        "minimum": minimum,
        "fmax": maximum,
        "fmin": minimum,
        "clamp": clamp,
        "clamp_min": lambda g, x, low: maximum(g, x, low),
        "clamp_max": lambda g, x, high: minimum(g, x, high),
        "hardtanh": clamp,
        "where": call("select"),
        "masked_fill": lambda g, x, mask, value: g.apply("select", mask, value, x),
        "lerp": lambda g, a, b, w: g.apply("add", a, g.apply("mul", w, g.apply("sub", b, a))),
        "hypot": lambda g, a, b: g.apply("sqrt", g.apply("add", g.apply("mul", a, a), g.apply("mul", b, b))),
        "addcmul": lambda g, x, a, b, value=None: g.apply(
            "add", x, g.apply("mul", a, b) if value is None else g.apply("mul", value, g.apply("mul", a, b))
        ),
        "addcdiv": lambda g, x, a, b, value=None: g.apply(
            "add", x, g.apply("div", a, b) if value is None else g.apply("mul", value, g.apply("div", a, b))
        ),
    }
    return table


ELEMENTWISE = _elementwise()
COMPARISONS = set("lt le eq gt ge ne logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not".split())
# They run as they are on the numbers of nodes: where they fill with zeros, node 0 is the constant zero.
STRUCTURAL = set(
    "view _unsafe_view reshape expand permute transpose t select slice unsqueeze squeeze cat stack index_select "
    "gather index "
    "flip roll repeat clone detach alias unbind split split_with_sizes narrow diagonal diag_embed tril triu unfold "
    "constant_pad_nd select_scatter slice_scatter diagonal_scatter index_put as_strided lift_fresh expand_copy "
    "view_copy "
    "zeros_like new_zeros take".split()
)
MADE = set("zeros ones full empty new_ones new_full new_empty ones_like full_like empty_like".split())
PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"}
TRANSPOSES = {"t", "transpose", "permute"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}


_active = threading.local()


def _out_of_place(func):
    """The operator that returns what one in place writes: of the same name and arguments."""
    packet = getattr(getattr(torch.ops, func.namespace), func._overloadpacket.__name__[:-1])
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    overloads = (getattr(packet, name) for name in packet.overloads())
    return next(o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted)


class Tracer(TorchDispatchMode):
    """Traces calls of functions into one graph.

    Args:
        graph: its first node is the constant zero, made here.
        lanes: how many nodes a function is traced for.
    """

    def __init__(self, graph: Graph, lanes: int) -> None:
        super().__init__()
        self.graph, self.lanes = graph, lanes
        self._lanes: list[int] = []  # of each node, a bit for each lane that it depends on
        self._origin: dict[int, int] = {}
        zero = graph.constant(0.0)
        assert zero == 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports the compiler, which takes seconds

    def __enter__(self):
        _active.tracers = [*getattr(_active, "tracers", []), self]
        return super().__enter__()

    def __exit__(self, *error: Any):
        _active.tracers = _active.tracers[:-1]
        return super().__exit__(*error)

    @staticmethod
    def active() -> Tracer | None:
        """The tracer that is at work in this thread."""
        tracers = getattr(_active, "tracers", [])
        return tracers[-1] if tracers else None

    def input(self, lane: int | None = None) -> int:
        """A new input, of one lane or of all alike."""
        node = self.graph.input()
        self._origin[node] = 0 if lane is None else 1 << lane
        return node

    def tensor(self, nodes: Tensor, dtype: torch.dtype = torch.float64) -> Scalars:
        """The tensor of some nodes."""
        return Scalars(nodes, dtype)

    def mask(self, node: int) -> int:
        """Which lanes a node depends on, as bits."""
        while len(self._lanes) <= node:
            number = len(self._lanes)
            mask = self._origin.get(number, 0)
            for argument in self.graph.arguments(number):
                mask |= self._lanes[argument]
            self._lanes.append(mask)
        return self._lanes[node]

    # What an operator does

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        symbolic = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Symbolic)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(
                f"random numbers ({name}) in a traced function would be the same at all nodes and in all calls; draw "
                f"them outside, and set modules with dropout to eval()\n  at {user_line()}"
            )
        if func.namespace == "prims" and symbolic:
            raise _Primitive
        if not symbolic:
            result = func(*args, **kwargs)
            # What a function makes in order to write into it becomes symbolic at once.
            if name in MADE or name in ("zeros", "zeros_like", "new_zeros"):
                return self._constant(result)
            return result
        self.graph.line = user_line()
        try:
            return self._apply(func, name, args, kwargs)
        except JetplaneError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise TraceError(f"{name} of a traced function failed: {error}\n  at {self.graph.line}") from error

    def _apply(self, func, name: str, args: tuple, kwargs: dict):
        if name in READS:
            raise TraceError(
                f"a value is read ({name}), but a traced function has no numbers yet; use torch.where "
                f"for a "
                f"choice by value, and keep the value a tensor\n  at {self.graph.line}"
            )
        if torch.Tag.inplace_view in func.tags:
            return self._reshape_in_place(func, args, kwargs)
        if name.endswith("_") and not name.startswith("_"):
            return self._write(func, name[:-1], args, kwargs)
        opaque = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Opaque)]
        scalars = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Scalars)]
        # A transposed matrix has the nodes last, where torch could not compute it for all of them: it is of scalars.
        if opaque and not scalars and not (name in TRANSPOSES and args[0].dim() == 2):
            return self._record(func, args, kwargs)
        if opaque:  # ends here: its values become scalars
            args, kwargs = tree_map(lambda a: self.scalars(a) if isinstance(a, Opaque) else a, (args, kwargs))
        if name in ("_to_copy", "to"):
            return self._convert(args[0], kwargs)
        if name in ("zeros_like", "new_zeros", *MADE):
            return self._constant(func(*tree_map(self._stand_in, args), **tree_map(self._stand_in, kwargs)))
        if name in STRUCTURAL and not self._indexed_by_value(name, args):
            return self._structural(func, args, kwargs)
        if name in PRODUCTS:
            return self._product(func, name, args, kwargs)
        rule = getattr(self, f"_{name}", None) if name in RULES else None
        if rule is not None:
            return rule(*args, **kwargs)
        if name in ELEMENTWISE and self._plain(name, args, kwargs):
            return self._pointwise(name, args, kwargs)
        decomposed = self._decomposed(func, args, kwargs, torch.Tag.pointwise in func.tags or not self._by_node(args))
        if decomposed is not NotImplemented:
            return decomposed
        return self._record(func, args, kwargs)

    def _plain(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether an elementwise operator has no options that its rule does not know."""
        if name == "gelu":
            return not kwargs.get("approximate", "none") != "none"
        if name == "elu":
            return len(args) == 1
        return not set(kwargs) - {"alpha", "value", "min", "max"} and not (name == "div" and "rounding_mode" in kwargs)

    def _by_node(self, args: Any) -> bool:
        """Whether all scalars have the nodes in their first dimension, as functions that torch computes must."""
        return all(a.dim() and a.shape[0] == self.lanes for a in tree_leaves(args) if isinstance(a, Scalars))

    def _decomposed(self, func, args, kwargs, by_table: bool):
        """By what it is made of; an operator that torch computes for all nodes at once is left to it as a whole."""
        with self:
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented or not by_table:
                return result
            table = decompositions()
            try:
                return table[func](*args, **kwargs) if func in table else NotImplemented
            except _Primitive:  # which has no derivatives: the operator itself has
                return NotImplemented

    # Constants, and what is not a scalar

    def _constant(self, values: Tensor):
        """The nodes of a tensor of numbers."""
        if not (values.is_floating_point() or values.dtype == torch.bool):
            return values
        flat = values.detach().double().reshape(-1).tolist()
        nodes = torch.tensor([self.graph.constant(v) for v in flat], dtype=torch.int64).reshape(values.shape)
        return self.tensor(nodes, torch.bool if values.dtype == torch.bool else torch.float64)

    def scalars(self, value) -> Scalars:
        """Any value as a tensor of nodes: what was recorded outside ends here."""
        if isinstance(value, Scalars):
            return value
        if isinstance(value, Opaque):
            return self._close(value)
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        made = self._constant(
            tensor.double() if not tensor.is_floating_point() and tensor.dtype != torch.bool else tensor
        )
        assert isinstance(made, Scalars)
        return made

    @staticmethod
    def _stand_in(value):
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Symbolic) else value

    def _convert(self, value: Scalars, kwargs: dict) -> Scalars:
        dtype = kwargs.get("dtype") or value.dtype
        if dtype in (torch.float64, torch.float32, torch.bool) or dtype == value.dtype:
            if value.dtype != torch.bool and dtype == torch.bool:
                return self._pointwise("ne", (value, 0.0), {})
            return self.tensor(value.nodes.clone(), torch.bool if dtype == torch.bool else torch.float64)
        raise TraceError(
            f"a value is converted to {dtype}, which rounds it: its derivative would be lost\n  at {self.graph.line}"
        )

    def _indexed_by_value(self, name: str, args: tuple) -> bool:
        return name in ("index", "gather", "index_select", "take", "index_put") and any(
            isinstance(a, Symbolic) for a in tree_leaves(args[1:2] if name == "index_put" else args[1:])
        )

    # Structure, and writes

    def _structural(self, func, args, kwargs):
        dtypes = {a.dtype for a in tree_leaves((args, kwargs)) if isinstance(a, Scalars)}
        dtype = torch.bool if dtypes == {torch.bool} else torch.float64

        def numbers(a):
            if isinstance(a, Scalars):
                return a.nodes
            return self.scalars(a).nodes if isinstance(a, Tensor) and a.is_floating_point() else a

        result = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        return tree_map(lambda r: self.tensor(r, dtype) if isinstance(r, Tensor) else r, result)

    @staticmethod
    def _reshape_in_place(func, args: tuple, kwargs: dict):
        """``squeeze_``, ``t_``, …: the tensor keeps its memory, and gets another shape."""
        target = args[0]
        if isinstance(target, Scalars):
            target.nodes = func(target.nodes.detach(), *args[1:], **kwargs)
        else:
            [target.slot], _ = target.recording.append(_out_of_place(func), (Slot(target.slot), *args[1:]), kwargs)
        with no_dispatch():
            return func(*args, **kwargs)

    def _write(self, func, bare: str, args: tuple, kwargs: dict):
        """An operator in place: its result is written into the nodes of the tensor, which views of it share."""
        target = args[0]
        if isinstance(target, Opaque):
            if target.recording.has_views(target.slot):
                raise TraceError(
                    f"{func._overloadpacket.__name__} writes into a value of a tensor function that has views; write "
                    f"{bare} without the underscore\n  at {self.graph.line}"
                )
            written = self._record(_out_of_place(func), args, kwargs)
            assert isinstance(written, Opaque)
            target.slot = written.slot
            return target
        if not isinstance(target, Scalars):
            raise TraceError(
                "a value of the traced function is written into a tensor made outside it; make the tensor inside "
                "the "
                f"function (torch.zeros, torch.stack)\n  at {self.graph.line}"
            )
        if bare == "copy":
            result = self.scalars(args[1])
        elif bare in ("fill", "zero"):
            result = self.scalars(args[1] if bare == "fill" else 0.0)
        elif bare == "index_put":
            indices = tuple(args[1])
            if any(isinstance(i, Symbolic) for i in indices):
                mask = self.scalars(indices[0])
                value = args[2] if isinstance(args[2], Tensor) and args[2].dim() else args[2]
                result = self._pointwise("where", (mask, value, target), {})
            else:
                target.nodes.index_put_(list(indices), self.scalars(args[2]).nodes)
                return target
        else:
            result = self._apply(_out_of_place(func), bare, args, kwargs)
        if result is not NotImplemented:
            target.nodes.copy_(self.scalars(result).nodes)
        return target

    # Arithmetic

    def _checked(self, nodes: Tensor, shapes: Sequence[tuple[int, ...]] = ()) -> Tensor:
        for node in set(nodes.reshape(-1).tolist()):
            mask = self.mask(node)
            if mask & (mask - 1):
                raise TraceError(
                    "an operator combines values of different nodes; dynamics, path constraints and integrands are "
                    "functions of one node each: the first dimension is that of nodes, sum over the last ones (dim=-1)"
                    f"{self._broadcast(shapes)}\n  at {self.graph.line}"
                )
        return nodes

    def _broadcast(self, shapes: Sequence[tuple[int, ...]]) -> str:
        """What is wrong where shapes like (nodes,) and (nodes, 1) meet."""
        flat = [s for s in shapes if s == (self.lanes,)]
        deep = [s for s in shapes if len(s) == 2 and s[0] == self.lanes]
        if not flat or not deep:
            return ""
        return (
            f". Here (nodes,) and (nodes, {deep[0][1]}) meet, which torch broadcasts to (nodes, nodes): take a column "
            "of the second one, x.name[:, 0], or keep the dimension of the first, sum(-1, keepdim=True)"
        )

    def _pointwise(self, name: str, args: Sequence, kwargs: dict) -> Scalars:
        if kwargs.get("alpha") == 1 or kwargs.get("value") == 1:
            kwargs = {}
        names = [n for n in ("alpha", "value", "min", "max") if kwargs.get(n) is not None]
        values = [None if a is None else self.scalars(a).nodes for a in args]
        if name == "softplus":
            values = values[:2]
        if names == ["max"] and name == "clamp":
            values.append(None)
        values += [self.scalars(kwargs[n]).nodes for n in names]
        present = [v for v in values if v is not None]
        shape = torch.broadcast_shapes(*(v.shape for v in present))
        lists = [[None] * shape.numel() if v is None else v.expand(shape).reshape(-1).tolist() for v in values]
        rule, graph = ELEMENTWISE[name], self.graph
        nodes = torch.tensor([rule(graph, *entry) for entry in zip(*lists, strict=True)], dtype=torch.int64)
        checked = self._checked(nodes.reshape(shape), [tuple(v.shape) for v in present])
        return self.tensor(checked, torch.bool if name in COMPARISONS else torch.float64)

    def _fold_over(self, x, dims, keepdim: bool, function: Callable[[list[int]], int]) -> Scalars:
        """A reduction: a function of lists of nodes."""
        nodes = self.scalars(x).nodes
        dims = range(nodes.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = sorted(d % max(nodes.dim(), 1) for d in dims)
        kept = [d for d in range(nodes.dim()) if d not in dims]
        rows = nodes.permute(*kept, *dims).reshape([nodes.shape[d] for d in kept] + [-1])
        flat = rows.reshape(-1, rows.shape[-1]).tolist() if nodes.dim() else [[int(nodes)]]
        shape = [1 if d in dims else n for d, n in enumerate(nodes.shape)] if keepdim else rows.shape[:-1]
        result = torch.tensor([function(row) for row in flat], dtype=torch.int64).reshape(shape)
        return self.tensor(self._checked(result))

    def _total(self, nodes: list[int]) -> int:
        total = self.graph.constant(0.0)
        for node in nodes:
            total = self.graph.apply("add", total, node)
        return total

    def _sum(self, x, dim=None, keepdim=False, dtype=None):
        return self._fold_over(x, dim, keepdim, self._total)

    def _mean(self, x, dim=None, keepdim=False, dtype=None):
        return self._fold_over(
            x,
            dim,
            keepdim,
            lambda nodes: self.graph.apply("div", self._total(nodes), self.graph.constant(len(nodes))),
        )

    def _prod(self, x, dim=None, keepdim=False, dtype=None):
        def product(nodes):
            total = nodes[0]
            for node in nodes[1:]:
                total = self.graph.apply("mul", total, node)
            return total

        return self._fold_over(x, dim, keepdim, product)

    def _linalg_vector_norm(self, x, ord=2, dim=None, keepdim=False, dtype=None):
        graph = self.graph
        if ord == 2:

            def length(nodes):  # with the derivative 0 at 0, as torch has it
                square = self._total([graph.apply("mul", n, n) for n in nodes])
                safe = _where_positive(graph, square, square, graph.constant(1.0))
                return _where_positive(graph, square, graph.apply("sqrt", safe), graph.constant(0.0))

            return self._fold_over(x, dim, keepdim, length)
        absolute = self._pointwise("abs", (x,), {})
        if ord == 1:
            return self._sum(absolute, dim, keepdim)
        if ord == float("inf"):
            return self._amax(absolute, [] if dim is None else dim, keepdim)
        powers = self._sum(self._pointwise("pow", (absolute, ord), {}), dim, keepdim)
        return self._pointwise("pow", (powers, 1 / ord), {})

    def _extreme(self, name: str, x, dim, keepdim):
        def fold(nodes):
            best = nodes[0]
            for node in nodes[1:]:
                best = ELEMENTWISE[name](self.graph, best, node)
            return best

        return self._fold_over(x, dim, keepdim, fold)

    def _amax(self, x, dim=(), keepdim=False):
        return self._extreme("maximum", x, list(dim) if not isinstance(dim, int) else dim, keepdim)

    def _amin(self, x, dim=(), keepdim=False):
        return self._extreme("minimum", x, list(dim) if not isinstance(dim, int) else dim, keepdim)

    def _cumsum(self, x, dim, dtype=None):
        parts = list(self.scalars(x).nodes.unbind(dim))
        for n in range(1, len(parts)):
            parts[n] = self._pointwise("add", (self.tensor(parts[n - 1]), self.tensor(parts[n])), {}).nodes
        return self.tensor(torch.stack(parts, dim))

    def _addbmm(self, x, a, b, **factors):
        """A sum over the batch is one product."""
        with self:
            return torch.addmm(x, a.transpose(0, 1).flatten(1), b.flatten(0, 1), **factors)

    def _linalg_cross(self, a, b, *, dim=-1):
        a, b = torch.broadcast_tensors(self.scalars(a).nodes, self.scalars(b).nodes)
        x, y = ([self.tensor(part) for part in nodes.unbind(dim)] for nodes in (a, b))
        rows = []
        for i, j in ((1, 2), (2, 0), (0, 1)):
            left, right = (self._pointwise("mul", pair, {}) for pair in ((x[i], y[j]), (x[j], y[i])))
            rows.append(self._pointwise("sub", (left, right), {}).nodes)
        return self.tensor(torch.stack(rows, dim))

    def _product(self, func, name: str, args: tuple, kwargs: dict):
        added = args[0] if name in ("addmm", "baddbmm", "addmv") else None
        a, b = args[1:3] if added is not None else args[:2]
        a_symbolic, b_symbolic = isinstance(a, Symbolic), isinstance(b, Symbolic)
        outputs = b.shape[-1] if b.dim() > 1 else 1
        if a_symbolic and not b_symbolic and a.dim() > 1:
            if outputs >= LARGE_OUTPUTS and a.shape[-1] * outputs >= LARGE_PRODUCTS and self._by_node(args):
                return self._record(func, args, kwargs)
        x, y = self.scalars(a).nodes, self.scalars(b).nodes
        graph = self.graph
        if x.shape[-1] != y.shape[0 if y.dim() == 1 else -2]:
            shapes = " and ".join(
                f"({', '.join('nodes' if n == self.lanes else str(n) for n in nodes.shape)})" for nodes in (x, y)
            )
            raise TraceError(
                f"matrices of shapes {shapes} cannot be multiplied; states and controls have the nodes in their first "
                f"dimension: x @ A.T instead of A @ x\n  at {self.graph.line}"
            )
        left = x.reshape(1, 1, -1) if x.dim() == 1 else x.unsqueeze(0) if x.dim() == 2 else x
        right = y.reshape(1, -1, 1) if y.dim() == 1 else y.unsqueeze(0) if y.dim() == 2 else y
        result = torch.tensor(
            [
                [
                    [
                        self._total([graph.apply("mul", p, q) for p, q in zip(row, column, strict=True)])
                        for column in zip(*m, strict=True)
                    ]
                    for row in n
                ]
                for n, m in zip(left.tolist(), right.tolist(), strict=True)
            ],
            dtype=torch.int64,
        ).reshape(left.shape[0], left.shape[1], right.shape[2])
        shape = (*((x.shape[0],) if x.dim() == 3 else ()), *x.shape[-2:-1], *(y.shape[-1:] if y.dim() > 1 else ()))
        product = self.tensor(self._checked(result.reshape(shape)))
        if added is None:
            return product
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        product = product if alpha == 1 else self._pointwise("mul", (product, alpha), {})
        added = added if beta == 1 else self._pointwise("mul", (added, beta), {})
        return self._pointwise("add", (added, product), {})

    # External functions

    def _record(self, func, args: tuple, kwargs: dict):
        """Let torch compute an operator, as part of a function of some scalars of each node."""
        sources = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Symbolic)]
        if not self._by_node(sources):
            raise TraceError(
                f"{func._overloadpacket.__name__} has no rule for scalars, and its argument has not the nodes in its "
                f"first "
                f"dimension, so that torch cannot compute it for all nodes at once\n  at {self.graph.line}"
            )
        recordings = [a.recording for a in sources if isinstance(a, Opaque)]
        recording = recordings[0] if recordings else Recording(self.lanes, self.graph.line)
        for other in recordings[1:]:
            recording.join(other)

        def entered(a):
            if isinstance(a, Scalars):
                return recording.argument(a.nodes, a.dtype)
            if isinstance(a, Opaque):
                return Slot(a.slot)
            return a

        slots, likes = recording.append(func, *tree_map(entered, (args, kwargs)))
        made = [
            None if like is None else Opaque(like, like.dtype, recording, slot)
            for slot, like in zip(slots, likes, strict=True)
        ]
        return made[0] if recording.single(slots) else tuple(made)

    def _close(self, value: Opaque) -> Scalars:
        """The values of an external function as nodes: one External for each lane."""
        return self.tensor(value.recording.close(self, value.slot, value.shape), torch.float64)

    def external(self, function: OutsideFunction, arguments: list[list[int]]) -> list[list[int]]:
        """An external for each lane, of that lane's arguments; the nodes of its values."""
        rows = []
        for lane, nodes in enumerate(arguments):
            mask = 0
            for node in nodes:
                mask |= self.mask(node)
            if mask & ~(1 << lane):
                raise TraceError(f"an operator combines values of different nodes\n  at {function.line}")
            made = self.graph.external(function, nodes, function.outputs)
            self._origin.update(dict.fromkeys(made.values, mask))
            rows.append(list(made.values))
        return rows


RULES = set("sum mean prod linalg_vector_norm amax amin cumsum linalg_cross addbmm".split())


def outputs(tracer: Tracer, value: Any, size: int | None, what: str) -> Tensor:
    """The nodes (lanes, size) of what a function returned.

    Args:
        tracer: that ran it.
        value: a tensor of shape (nodes, size), (nodes,) where size is 1, or one without nodes that is the same at all.
        size: how many entries there must be for each node, or None for any number.
        what: the function's name in messages.
    """
    if not isinstance(value, (Tensor, int, float)):
        raise ShapeError(f"{what} must return a tensor, got {type(value).__name__}")
    nodes = tracer.scalars(value).nodes
    lanes = tracer.lanes
    shape = tuple(nodes.shape)
    if nodes.dim() == 1 and shape[0] == lanes:
        nodes = nodes.unsqueeze(1)
    elif nodes.dim() < 2:
        nodes = nodes.reshape(1, -1).expand(lanes, -1)
    if nodes.dim() != 2 or nodes.shape[0] not in (1, lanes) or (size is not None and nodes.shape[1] not in (1, size)):
        expected = f"(nodes, {'m' if size is None else size})" + (" or (nodes,)" if size in (None, 1) else "")
        came = "(" + ", ".join("nodes" if d == 0 and n == lanes else str(n) for d, n in enumerate(shape)) + ")"
        raise ShapeError(f"{what} must return shape {expected}, got {came}")
    if size is not None and nodes.shape[1] != size:
        if nodes.shape[1] == 1 and len(shape) == 2:
            raise ShapeError(f"{what} must return shape (nodes, {size}), got (nodes, 1)")
        nodes = nodes.expand(-1, size)
    return nodes.expand(lanes, -1)
