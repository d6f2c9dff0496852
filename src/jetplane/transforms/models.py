"""Modules as functions of their parameters, for `jetplane.jvp`, `jetplane.linearize`, `jetplane.jet` and the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _sharding
from ..directions import AbstractDirections
from ..errors import ArgumentError
from ..evaluation import sharded
from ..evaluation.interception import Interception
from ..jets import Jet, parts

Parameters = dict[str, Tensor]


def functional(model: nn.Module) -> tuple[Functional, Parameters]:
    """A module as a function of its parameters, ``f(params, *args, **kwargs)``, and its current parameters.

    ``f`` is differentiated in its parameters, its arguments or both, along one direction or K together:
    ``jp.jvp(f, (params, x), (tangents, dx))``, ``jp.linearize(lambda p: f(p, x), params)``. The module itself runs,
    with its hooks and buffers; it may be wrapped by `torch.nn.parallel.DistributedDataParallel`, compiled, or sharded
    by FSDP2 (`torch.distributed.fsdp.fully_shard`), whose parameters and tangents are `DTensor`s.

    Args:
        model: any module. It is not changed.

    Returns:
        ``(f, params)``: params by their names, as `torch.nn.Module.named_parameters` gives them, tied ones once. ``f``
        takes all of them or some; the others are the module's own.

    Raises:
        ArgumentError: by ``f``, names that the module does not have, and sharded parameters that are not its own.

    >>> import torch, jetplane as jp
    >>> f, params = jp.functional(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([1.0, 2.0])
    >>> value, derivative = jp.jvp(lambda p: f(p, x), (params,), ({"weight": torch.tensor([[1.0, 10.0]])},))
    >>> derivative
    tensor([21.])
    """
    sharded.give_back_copies(model)
    return Functional(model), dict(model.named_parameters())


class Functional:
    """What `functional` gives: ``f(params, *args, **kwargs)``.

    Attributes:
        model: the module that runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own = dict(model.named_parameters())

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's result with these parameters in place of its own."""
        unknown = sorted(set(params) - set(self._own))
        if unknown:
            raise ArgumentError(
                f"functional: expected names of parameters of {type(self.model).__name__}, got {unknown[:3]}; "
                "they are those of model.named_parameters(), in which tied parameters occur once"
            )
        split = {name: p for name, p in params.items() if _sharding.is_sharded(self._own[name])}
        if not split:
            return torch.func.functional_call(self.model, dict(params), args, kwargs)
        if len(split) < len(params):
            raise ArgumentError("functional: expected a model all of whose parameters are sharded, or none")
        return self._sharded(split, args, kwargs)

    def _sharded(self, params: Parameters, args: Any, kwargs: Any) -> Any:
        """The module's result with jets in place of its own parameters, whose whole copies only its hooks make."""
        moving = {name: p for name, p in params.items() if isinstance(p, Jet)}
        for name, p in params.items():
            own = self._own[name]
            if p is not own and not (isinstance(p, Jet) and _same(p.primal, own)):
                raise ArgumentError(
                    f"functional: parameter {name} of a sharded model must be the model's own, since FSDP2 and tensor "
                    "parallelism compute with that; move the model there, or take a copy of it"
                )
        if not moving:
            return self.model(*args, **kwargs)
        space = next(iter(moving.values())).space
        interception = Interception(space)
        owners, directions = [self._own[name] for name in moving], _Given(moving)
        places = {id(p): i for i, p in enumerate(owners)}

        def gathered(param: Tensor, copy: Tensor) -> None:
            like = copy if _sharding.is_sharded(copy) else _sharding.whole(param)
            interception.register(copy, places[id(param)], directions, like)

        for i, own in enumerate(owners):
            interception.register(own, i, directions, own)
        with interception.running(), sharded.running(owners, gathered):
            return sharded.gathered(self.model(*args, **kwargs))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two sharded tensors have one memory."""
    return _sharding.is_sharded(a) and _sharding.local(a).data_ptr() == _sharding.local(b).data_ptr()


class _Given(AbstractDirections):
    """Tangents that are `DTensor`s: the rank's own part, or the whole where FSDP2 has made a whole copy."""

    cacheable = False

    def __init__(self, moving: Mapping[str, Jet]) -> None:
        self._tangents = [parts(jet, jet.space)[1].tensor for jet in moving.values()]
        self.k = self._tangents[0].shape[0]

    def draw(self, index: int, param: Tensor, directions: slice | None = None) -> Tensor:
        """The tangents (K, *param.shape) of a parameter, of which a `DTensor` is this rank's part."""
        held: Any = self._tangents[index]
        if _sharding.is_sharded(held):
            held = _sharding.local(held) if _sharding.is_sharded(param) else held.full_tensor()
        return held[directions or slice(None)]

    def combine(self, index: int, param: Tensor, kappa: Tensor) -> Tensor:
        """``sum_k kappa[k] v_k`` for one parameter."""
        return torch.tensordot(kappa, self.draw(index, param), 1)
