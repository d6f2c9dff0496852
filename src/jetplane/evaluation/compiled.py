"""Evaluations as a compiler can follow them: jets are made in its graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import constant_in_graphs, functions_watched, private_functions_offered, tree_map
from ..directions import AbstractDirections
from ..errors import ArgumentError, DerivativeError, UnknownLossError
from ..jets import LOSS, MODEL, Deferred, Jet, LowRank, PairStructure, Partial, Space, Stacked, Tangents, carried
from ..rules import rounding
from ..rules.dispatch import inside_loss
from ..rules.losses import cross_entropy_whole, linear_cross_entropy
from .checks import NO_LOSS
from .context import at_depth, nested, recorded
from .interception import LINEAR_CROSS_ENTROPY, LOSSES
from .plane import PlaneModel
from .specification import PlaneSpec

PASSED_BY = (
    "compiled code holds a tensor with an autograd graph, which may come from a parameter by a step that the compiler "
    "does not show: .T, .mT, .H, iteration, vmap, autograd functions. Use functions instead (p.t(), "
    "p.transpose(-1, -2), p.unbind()); detach() tensors from elsewhere, or evaluate without torch.compile"
)


FUNCTION = (
    "a custom autograd function of a tensor with derivatives, in compiled code, which would lose them. Write it in "
    "torch operators, or compile without fullgraph=True: these derivatives are then computed uncompiled"
)


@constant_in_graphs
def _functions_watched() -> bool:
    return functions_watched(Jet, FUNCTION)


class _CompiledInterception(TorchFunctionMode):
    """What is left of `Interception` in compiled code: parameters become jets."""

    def __init__(self, jets: dict[int, Jet], kind: type, space: Space) -> None:
        super().__init__()
        self.jets = jets
        self.kind = kind  # of the parameters: whoever asks for the identity of data recompiles for each batch
        self.space = space

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():  # switched off by the user's own code: derivatives stop
            target = args[0] if args else None
            args, kwargs = tree_map(self._constant, (args, kwargs or {}))
            result = func(*args, **kwargs)
            return target if isinstance(target, Jet) and result is target.primal else result
        args, kwargs = tree_map(self._replaced, (args, kwargs or {}))
        if self.space.gauss_newton and (func in LOSSES or inside_loss()):
            # Operators meet the jets after the user's code has run: what enters a loss must say so itself.
            args, kwargs = tree_map(self._entering, (args, kwargs))
        if func is LINEAR_CROSS_ENTROPY:
            with self:
                return linear_cross_entropy(*args, **kwargs)
        if func is F.cross_entropy:
            func = cross_entropy_whole
        elif func is Tensor.unflatten:  # whose super() a compiler does not follow
            func = torch.unflatten
        return func(*args, **kwargs)

    def _entering(self, x: Any) -> Any:
        if not isinstance(x, Jet) or x.kind == LOSS or x.level != self.space.level:
            return x
        if x.has_factors:
            return Jet(x.primal, None, None, self.space.key, None, x.left, x.right, LOSS)
        return Jet(x.primal, x.first_tensor, x.second_tensor, self.space.key, None, None, None, LOSS)

    def _replaced(self, x: Any) -> Any:
        if isinstance(x, self.kind):
            x = self.jets.get(id(x), x)
        if self.space.recorded:
            return x
        if isinstance(x, Tensor) and x.requires_grad and self.space.level == 1:  # outer levels ask who it is
            if self.jets and not isinstance(x, Jet) and not x.is_leaf:
                raise DerivativeError(PASSED_BY)
            return x.detach()  # nothing is recorded for reverse mode
        return x

    def _constant(self, x: Any) -> Any:
        return x.primal if isinstance(x, Jet) else x


_verified = threading.local()  # outside: whether the numbers of compiled evaluations are held against others


@contextlib.contextmanager
def verified() -> Iterator[None]:
    """Compiled evaluations inside are held against eager ones by the caller."""
    _verified.outside = True
    try:
        yield
    finally:
        _verified.outside = False


def jets_of_parameters(
    params: Sequence[Tensor], directions: AbstractDirections, structure: PairStructure, spec: PlaneSpec
) -> tuple[Space, dict[int, Jet]]:
    """The directions of a plane that a compiler traces, and the jets of the parameters that move, by identity.

    Raises:
        ArgumentError: the directions are to be carried in chunks; a parameter does not require grad, by which those
            that pass by interception are told, and the numbers are not `verified`.
    """
    if spec.chunk is not None:
        raise ArgumentError("chunk= cannot be compiled; compile the evaluation of one chunk")
    if not all(p.requires_grad for p in params) and not getattr(_verified, "outside", False):
        raise ArgumentError(
            "compiled code needs parameters that require grad; call requires_grad_() on those that move"
        )
    space = Space(structure, spec.order, nested() + 1, spec.gauss_newton, spec.examples)
    jets = {}
    with torch.no_grad():
        for i, p in enumerate(params):
            tangents = directions.structured(i, p)
            if isinstance(tangents, (Deferred, Stacked, Partial)):
                tangents = tangents.materialized()
            if isinstance(tangents, LowRank):
                low = tangents.to(carried(p.dtype))
                jets[id(p)] = Jet(p.detach(), None, None, space.key, None, low.left, low.right)
            elif tangents is not None:
                jets[id(p)] = Jet(p.detach(), tangents.to(carried(p.dtype)), None, space.key)
    return space, jets


def jets_of(
    leaves: Sequence[Tensor],
    tangents: Sequence[Tensor | Tangents | None],
    seconds: Sequence[Tensor | None] | None,
    structure: PairStructure,
    order: int,
) -> tuple[Space, list[Jet]]:
    """The directions of a function's derivatives that a compiler traces, and a jet for each of its tensors that move.

    Rules are recorded for reverse mode, also where nobody asks for it: the compiler leaves out what is not used. Planes
    around record nothing.

    Args:
        leaves: what moves.
        tangents: K for each leaf.
        seconds: second coefficients of the leaves themselves.
        structure: which second coefficients there are.
        order: 1 leaves them out.
    """
    space = Space(structure, order, nested() + 1, recorded=recorded() if nested() else True)
    jets = []
    for x, v, second in zip(leaves, tangents, seconds or [None] * len(leaves), strict=True):
        if not isinstance(x, Jet) and not space.recorded:  # an outer evaluation goes on through its own jets
            x = x.detach()
        v = v.materialized() if isinstance(v, Tangents) else v
        dtype = carried(x.dtype)
        first, second = (None if c is None else c.to(dtype) for c in (v, second))
        jets.append(Jet(x, first, second, space.key))
    return space, jets


class GraphBroken(Exception):
    """A compiler cannot follow user code, and has left the graph before it."""


@contextlib.contextmanager
def tracing(space: Space, jets: dict[int, Jet], params: Sequence[Tensor]) -> Iterator[None]:
    """Let a compiler follow user code with jets in place of parameters.

    Raises:
        GraphBroken: it cannot, and enters this outside of its graph: evaluate by other means.
    """
    kind = torch.nn.Parameter if all(isinstance(p, torch.nn.Parameter) for p in params) else Tensor
    if not torch.compiler.is_compiling():
        raise GraphBroken
    private_functions_offered()
    _functions_watched()
    # Rules will ask for it: a comparison is guarded, and under another choice the code is compiled anew.
    _ = rounding.chosen() == "straight-through"
    with (
        at_depth(space.level, space.recorded),
        torch.no_grad(),
        _CompiledInterception(jets, kind, space),
        torch.enable_grad(),
    ):
        yield


def coefficients(y: Any, space: Space) -> tuple[Any, Tensor | None, Tensor | None]:
    """Value, first and second coefficients of what user code returned; None where there are none."""
    if not isinstance(y, Jet) or y.level != space.level:
        return y, None, None
    return y.primal, y.first_tensor, y.second_tensor


def plane_of(loss: Any, space: Space, spec: PlaneSpec) -> PlaneModel:
    """The plane of a loss. Its numbers are not checked.

    Raises:
        DerivativeError: the loss depends on no parameter, as far as a compiler shows.
        UnknownLossError: Gauss-Newton curvature met no loss function.
    """
    if not isinstance(loss, Jet):
        raise DerivativeError(PASSED_BY)
    if spec.gauss_newton and loss.kind == MODEL:
        raise UnknownLossError(NO_LOSS)
    value, first, second = loss.primal, loss.first_tensor, loss.second_tensor
    examples = loss.examples if spec.examples else None
    if first is None:
        first = value.new_zeros(space.k)
    if spec.curvature == "none":
        return PlaneModel(value, first, None, examples)
    if second is None:
        second = value.new_zeros(space.structure.count)
    return PlaneModel(value, first, space.structure.matrix(second), examples)
