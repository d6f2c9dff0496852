"""Tensor functions inside a graph of scalars: networks, look-ups, whatever torch computes better for all nodes at once.

A function y = f(x) takes k and gives m numbers for each node. Its Jacobian is carried as first-order jets; second
derivatives of ``sum of w * y`` are

    W = sum over elementwise operators of  Σ_units  w_unit f″(z) J_z J_zᵀ,

where J_z are the jets at the operator's input and w_unit is the adjoint of its output, by one reverse sweep inside of
the function. Where operators are neither linear nor elementwise, reverse mode over reverse mode gives all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._torch import tree_leaves, tree_map
from ..errors import TraceError

if TYPE_CHECKING:
    from .tracing import Tracer

RESHAPES = ("view", "_unsafe_view", "reshape")
PARTS = ("slice", "select", "unsqueeze")
SMOOTH = set("tanh sigmoid sin cos exp silu gelu softplus relu elu celu leaky_relu erf sqrt log square pow".split())


class Slot:
    """A value of a recording, by its place."""

    def __init__(self, place: int) -> None:
        self.place = place


class Nonlinear(NamedTuple):
    """An elementwise operator on its way: its place, f'' at its input, and the input's jets (nodes or 1, k, ...)."""

    place: int
    second: Tensor
    jets: Tensor


class OutsideFunction(ABC):
    """A function (nodes, k) → (nodes, m) that a graph of scalars has no operators for.

    Attributes:
        outputs: m.
        line: of the user's code, for messages.
        differentiable: whether the output has a derivative at all.
    """

    outputs: int
    line: str | None
    differentiable: Any = True

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """(nodes, k) → (nodes, m)."""

    @abstractmethod
    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Values (nodes, m), Jacobian (m, k, nodes), and what `hessian` takes."""

    @abstractmethod
    def hessian(self, x: Tensor, weights: Tensor, kept: Any) -> Tensor:
        """Second derivatives (k, k, nodes) of the sum of values (nodes, m) times weights (nodes, m)."""


class TensorFunction(OutsideFunction):
    """A recorded function of the nodes' arguments (nodes, k) → (nodes, m).

    Attributes:
        outputs: m.
        line: of the user's code, for messages.
        spread: whether constants with as many equal rows as there were nodes in the trace have a row for each node.
    """

    def __init__(self, steps: list[tuple], arguments: list[tuple], output: int, lanes: int, outputs: int, line) -> None:
        self.steps, self.arguments, self.output = steps, arguments, output
        self.lanes, self.outputs, self.line = lanes, outputs, line
        self.spread = False
        self._chain = self._is_chain()

    def _split(self, x: Tensor) -> dict[int, Tensor]:
        """The arguments as tensors of their own shapes."""
        found, start = {}, 0
        for place, shape, dtype in self.arguments:
            size = int(torch.Size(shape[1:]).numel())
            part = x[:, start : start + size].reshape(len(x), *shape[1:])
            found[place] = part if dtype != torch.bool else part != 0
            start += size
        return found

    def _sized(self, name: str, args: tuple, nodes: int) -> tuple:
        """Shapes among the arguments of an operator have as many nodes as there are now."""
        if name in (*RESHAPES, "expand") and args[1] and args[1][0] == self.lanes:
            return (args[0], [nodes, *args[1][1:]], *args[2:])
        return args

    def _run(self, x: Tensor, each=None) -> Tensor:
        values = self._split(x)
        for places, func, args, kwargs in self.steps:
            name = func._overloadpacket.__name__
            args, kwargs = tree_map(lambda a: values[a.place] if isinstance(a, Slot) else a, (args, kwargs))
            args = self._sized(name, args, len(x))
            if self.spread:
                args, kwargs = tree_map(lambda a: self._for_all(a, len(x)), (args, kwargs))
            result = each(places[0], name, func, args, kwargs) if each else func(*args, **kwargs)
            parts = result if isinstance(result, (tuple, list)) else (result,)
            for place, part in zip(places, parts, strict=True):
                values[place] = part
        return values[self.output].reshape(len(x), -1).double()

    def _for_all(self, a: Any, nodes: int) -> Any:
        """A constant that is one for each node of the trace, for other numbers of nodes."""
        if (
            not isinstance(a, Tensor)
            or a.requires_grad
            or not a.dim()
            or a.shape[0] != self.lanes
            or nodes == self.lanes
        ):
            return a
        return a[:1].expand(nodes, *a.shape[1:]) if bool((a == a[:1]).all()) else a

    @torch.no_grad()
    def value(self, x: Tensor) -> Tensor:
        """(nodes, k) → (nodes, m)."""
        return self._run(x)

    def _is_chain(self) -> bool:
        """Whether every operator is linear in its first or second argument, or elementwise with torch's derivatives."""
        for _, func, args, kwargs in self.steps:
            name = func._overloadpacket.__name__
            slots = [n for n, a in enumerate(args) if isinstance(a, Slot)]
            inside = sum(isinstance(a, Slot) for a in tree_leaves((args, kwargs)))
            if name in ("add", "sub", "mul") and inside == 1 and slots == [0] and not kwargs:
                continue
            if inside != 1 or not slots or kwargs:
                return False
            if name in ("addmm", "mm"):
                if slots != [1 if name == "addmm" else 0]:
                    return False
            elif slots != [0]:
                return False
            elif name in RESHAPES:
                if not args[1] or args[1][0] != self.lanes:
                    return False
            elif name in PARTS:  # of the dimensions behind that of nodes
                if len(args) < 2 or not isinstance(args[1], int) or args[1] < 1:
                    return False
            elif name not in SMOOTH and name != "neg":
                return False
        return len(self.arguments) == 1

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, list[Nonlinear]]:
        """Values (nodes, m), Jacobian (m, k, nodes), and what `hessian` takes."""
        if not self._chain:
            return *self._by_reverse(x), []
        y, jets, kept = self._sweep(x.detach())
        return y, jets.permute(2, 1, 0), kept

    @torch.no_grad()
    def _sweep(self, x: Tensor) -> tuple[Tensor, Tensor, list[Nonlinear]]:
        """Values with first-order jets (nodes, k, ...), and the operators that second derivatives come from."""
        nodes, k = x.shape
        [(entry, shape, _)] = self.arguments
        values = self._split(x)
        eye = torch.eye(k, dtype=x.dtype, device=x.device).reshape(1, k, *shape[1:])
        jets = {entry: eye}  # of one node as long as they are the same for all
        kept: list[Nonlinear] = []
        for places, func, args, _ in self.steps:
            name, place = func._overloadpacket.__name__, places[0]
            source = next(a for a in args if isinstance(a, Slot)).place
            z, jet = values[source], jets[source]
            plain = tuple(z if isinstance(a, Slot) else a for a in args)
            values[place] = value = func(*self._sized(name, plain, nodes))
            if name in SMOOTH:
                first, second = self._slopes(func, plain, z)
                kept.append(Nonlinear(place, second, jet))
                jets[place] = jet * first.unsqueeze(1)
            elif name == "addmm":
                jets[place] = jet @ args[2]
            elif name == "mm":
                jets[place] = jet @ args[1]
            elif name in ("add", "sub", "mul"):
                other = args[1]
                if name == "mul":
                    if isinstance(other, Tensor) and other.dim() == value.dim():
                        other = other.unsqueeze(1)
                    jet = jet * other
                jets[place] = jet.expand(len(jet), k, *value.shape[1:])
            else:  # shapes, and signs: all directions are nodes of their own
                tangent = tuple(jet.flatten(0, 1) if isinstance(a, Slot) else a for a in args)
                moved = func(*self._sized(name, tangent, len(jet) * k))
                jets[place] = moved.reshape(len(jet), k, *moved.shape[1:])
        jet = jets[self.output].reshape(-1, k, self.outputs).expand(nodes, k, self.outputs)
        return values[self.output].reshape(nodes, -1), jet, kept

    @staticmethod
    def _slopes(func, args: tuple, z: Tensor) -> tuple[Tensor, Tensor]:
        """F' and f'' of an elementwise operator."""
        if func._overloadpacket.__name__ == "tanh":
            y = torch.tanh(z)
            first = 1 - y * y
            return first, -2 * y * first
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = func(z, *args[1:])
            (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
            if not first.requires_grad:
                return first.detach(), torch.zeros_like(z)
            (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True)
        return first.detach(), torch.zeros_like(z) if second is None else second

    def hessian(self, x: Tensor, weights: Tensor, kept: list[Nonlinear]) -> Tensor:
        """Second derivatives (k, k, nodes) of the sum of values (nodes, m) times weights (nodes, m)."""
        nodes, k = x.shape
        if not self._chain:
            return self._second_by_reverse(x, weights)
        total = torch.zeros(nodes, k, k, dtype=x.dtype, device=x.device)
        if not kept:
            return total.permute(1, 2, 0)
        adjoints = self._adjoints(x, weights, [n.place for n in kept])
        for nonlinear, adjoint in zip(kept, adjoints, strict=True):
            jet = nonlinear.jets.flatten(2)
            curved = (adjoint * nonlinear.second).reshape(nodes, -1)
            if len(jet) == 1:  # one matrix for all nodes: products of its columns, once
                columns = jet[0].T
                pairs = (columns[:, :, None] * columns[:, None, :]).flatten(1)
                total += (curved @ pairs).reshape(nodes, k, k)
            else:
                total.baddbmm_(jet * curved.unsqueeze(1), jet.mT)
        return total.permute(1, 2, 0)

    def _adjoints(self, x: Tensor, weights: Tensor, places: list[int]) -> list[Tensor]:
        """Derivatives of the weighted sum with respect to the values at some places."""
        found: dict[int, Tensor] = {}

        def keep(place, name, func, args, kwargs):
            result = func(*args, **kwargs)
            if place in places:
                result = result if result.requires_grad else result.requires_grad_()
                found[place] = result
            return result

        with torch.enable_grad():
            y = self._run(x.detach().requires_grad_(), keep)
            return list(torch.autograd.grad((y * weights).sum(), [found[p] for p in places]))

    def _by_reverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self._run(x)
            rows = []
            for i in range(y.shape[1]):
                (row,) = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(x) if row is None else row)
        return y.detach(), torch.stack(rows).transpose(1, 2)

    def _second_by_reverse(self, x: Tensor, weights: Tensor) -> Tensor:
        nodes, k = x.shape
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (first,) = torch.autograd.grad((self._run(x) * weights).sum(), x, create_graph=True)
            if not first.requires_grad:
                return torch.zeros(k, k, nodes, dtype=x.dtype)
            rows = []
            for i in range(k):
                try:
                    (row,) = torch.autograd.grad(first[:, i].sum(), x, retain_graph=True, allow_unused=True)
                except NotImplementedError as error:
                    raise TraceError(f"torch has no second derivatives here: {error}\n  at {self.line}") from error
                rows.append(torch.zeros_like(x) if row is None else row)
        return torch.stack(rows).transpose(1, 2)

    @cached_property
    def differentiable(self) -> bool:
        """Whether the output has a derivative at all; a look-up of a table by a whole number has none.

        Not inside of a dispatch mode, where nothing has a graph.
        """
        with torch.enable_grad():
            return self._run(self._probe().requires_grad_()).requires_grad

    def _probe(self) -> Tensor:
        arguments = sum(int(torch.Size(shape[1:]).numel()) for _, shape, _ in self.arguments)
        return torch.rand(3, arguments, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mixes(self) -> bool:
        """Whether the values at one node depend on other nodes."""
        x = self._probe()
        together = self.value(x)
        return any(
            not torch.allclose(self.value(x[n : n + 1])[0], together[n], rtol=1e-9, atol=1e-12, equal_nan=True)
            for n in range(len(x))
        )


class Recording:
    """Operators on their way to a `TensorFunction`."""

    def __init__(self, lanes: int, line: str | None) -> None:
        self.lanes, self.line = lanes, line
        self.steps: list[tuple] = []
        self.entries: list[tuple[int, Tensor, torch.dtype]] = []  # place, nodes, dtype
        self.meta: dict[int, Any] = {}
        self.places = 0
        self._tuple = False
        self._closed: dict[int, Tensor] = {}

    def join(self, other: Recording) -> None:
        """Two recordings that meet are one function of the arguments of both."""
        if other is not self:
            raise TraceError(
                "a function computed outside the graph combines values of two tensor functions: apply it to plain "
                f"values, or compute both in one torch.nn.Module\n  at {self.line}"
            )

    def argument(self, nodes: Tensor, dtype: torch.dtype) -> Slot:
        """A tensor of scalars enters."""
        for place, known, _ in self.entries:
            if known.shape == nodes.shape and bool((known == nodes).all()):
                return Slot(place)
        self.entries.append((self.places, nodes.clone(), dtype))
        self.meta[self.places] = torch.empty(nodes.shape, dtype=dtype, device="meta")
        self.places += 1
        return Slot(self.places - 1)

    def has_views(self, place: int) -> bool:
        """Whether a value shares its memory with others of the recording."""
        return any(
            place in places or any(isinstance(a, Slot) and a.place == place for a in tree_leaves((args, kwargs)))
            for places, func, args, kwargs in self.steps
            if func.is_view
        )

    def append(self, func, args: tuple, kwargs: dict):
        """Add an operator; the places of its results, with tensors on the meta device like them."""
        if func is torch.ops.aten.view.default:  # strides may differ from those of the trace
            func = torch.ops.aten.reshape.default

        def constant(a):
            if isinstance(a, Tensor):
                a = a.detach()
                return a.double() if a.is_floating_point() else a
            return a

        args, kwargs = tree_map(constant, (args, kwargs))

        def stand_in(a):
            return self.meta[a.place] if isinstance(a, Slot) else a.to("meta") if isinstance(a, Tensor) else a

        result = func(*tree_map(stand_in, args), **tree_map(stand_in, kwargs))
        self._tuple = isinstance(result, (tuple, list))
        parts = list(result) if isinstance(result, (tuple, list)) else [result]
        places = list(range(self.places, self.places + len(parts)))
        self.places += len(parts)
        for place, part in zip(places, parts, strict=True):
            self.meta[place] = part
        self.steps.append((places, func, args, kwargs))
        return places, parts

    def single(self, places: list[int]) -> bool:
        """Whether the operator added last gave one tensor, not a tuple."""
        return not self._tuple

    def close(self, tracer: Tracer, place: int, shape) -> Tensor:
        """Nodes for the value at a place."""
        if place in self._closed:
            return self._closed[place]
        if not shape or shape[0] != self.lanes:
            raise TraceError(
                f"an operator combines values of different nodes: the first dimension of a result is that of nodes, "
                f"and it is "
                f"{shape[0] if shape else 'gone'} where {self.lanes} are traced\n  at {self.line}"
            )
        needed, wanted = [], {place}
        for step in reversed(self.steps):
            if wanted & set(step[0]):
                needed.append(step)
                wanted |= {a.place for a in tree_leaves(step[2:]) if isinstance(a, Slot)}
        entries = [(p, nodes, dtype) for p, nodes, dtype in self.entries if p in wanted]
        arguments = [(p, tuple(nodes.shape), dtype) for p, nodes, dtype in entries]
        outputs = int(torch.Size(shape[1:]).numel())
        function = TensorFunction(needed[::-1], arguments, place, self.lanes, outputs, self.line)
        nodes = torch.cat([nodes.reshape(self.lanes, -1) for _, nodes, _ in entries], 1)
        try:
            mixes = function.mixes()
        except RuntimeError:
            function.spread = True
            function._chain = False
            try:
                mixes = function.mixes()
            except RuntimeError as error:
                raise TraceError(
                    f"a tensor function cannot be computed for other numbers of nodes: {error}\n  at {self.line}"
                ) from error
        if mixes:
            raise TraceError(f"an operator combines values of different nodes\n  at {self.line}")
        values = tracer.external(function, nodes.tolist())
        self._closed[place] = torch.tensor(values, dtype=torch.int64).reshape(shape)
        return self._closed[place]
