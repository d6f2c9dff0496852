"""An evaluation as a compiler can follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import tree_map
from ..directions import AbstractDirections
from ..errors import ArgumentError, LossError
from ..jets import LOSS, MODEL, Deferred, Jet, LowRank, Partial, Space, Stacked, carried
from ..rules.dispatch import inside_loss
from ..rules.losses import cross_entropy_whole, linear_cross_entropy
from .checks import NO_LOSS
from .interception import LINEAR_CROSS_ENTROPY, LOSSES
from .plane import PlaneModel
from .specification import PlaneSpec


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
        return func(*args, **kwargs)

    def _entering(self, x: Any) -> Any:
        if not isinstance(x, Jet) or x.kind == LOSS:
            return x
        if x.has_factors:
            return Jet(x.primal, None, None, self.space.key, None, x.left, x.right, LOSS)
        return Jet(x.primal, x.first_tensor, x.second_tensor, self.space.key, None, None, None, LOSS)

    def _replaced(self, x: Any) -> Any:
        if isinstance(x, self.kind):
            x = self.jets.get(id(x), x)
        return x.detach() if isinstance(x, Tensor) and x.requires_grad else x  # nothing is recorded for reverse mode

    def _constant(self, x: Any) -> Any:
        return x.primal if isinstance(x, Jet) else x


def evaluate_compiled(
    closure: Callable[[], Tensor], params: Sequence[Tensor], directions: AbstractDirections, spec: PlaneSpec
) -> PlaneModel:
    """The plane, traced by a compiler: jets are made in the graph, and numbers are not checked.

    Raises:
        ArgumentError: the directions are to be carried in chunks.
        LossError: Gauss-Newton curvature met no loss function.
    """
    if spec.chunk is not None:
        raise ArgumentError("chunk= cannot be compiled; compile the evaluation of one chunk")
    structure = spec.structure
    space = Space(structure, spec.order, 1, spec.gauss_newton, spec.examples)
    key = space.key
    with torch.no_grad():
        jets = {}
        for i, p in enumerate(params):
            tangents = directions.structured(i, p)
            if isinstance(tangents, (Deferred, Stacked, Partial)):
                tangents = tangents.materialized()
            if isinstance(tangents, LowRank):
                low = tangents.to(carried(p.dtype))
                jets[id(p)] = Jet(p.detach(), None, None, key, None, low.left, low.right)
            elif tangents is not None:
                jets[id(p)] = Jet(p.detach(), tangents.to(carried(p.dtype)), None, key)
        kind = torch.nn.Parameter if all(isinstance(p, torch.nn.Parameter) for p in params) else Tensor
        with _CompiledInterception(jets, kind, space), torch.enable_grad():
            loss = closure()
        if spec.gauss_newton and loss.kind == MODEL:  # type: ignore[attr-defined]
            raise LossError(NO_LOSS)
        value, first, second = loss.primal, loss.first_tensor, loss.second_tensor  # type: ignore[attr-defined]
        examples = loss.examples if spec.examples else None  # type: ignore[attr-defined]
        if spec.curvature == "none":
            return PlaneModel(value, first, None, examples)
        if second is None:
            second = value.new_zeros(structure.count)
        return PlaneModel(value, first, structure.matrix(second), examples)
