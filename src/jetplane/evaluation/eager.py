"""One run of a closure on a plane, with all of its directions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from .. import _sharding
from ..directions import AbstractDirections
from ..rules.by_hand import as_loss
from ..rules.examples import known
from . import gradient_hooks, sharded
from .checks import checked_finite, coefficients_of
from .context import expansion
from .entrance import Entrance
from .interception import Interception
from .plane import PlaneModel
from .specification import PlaneSpec


def evaluate_at_once(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    directions: AbstractDirections,
    spec: PlaneSpec,
    entrance: Entrance | None = None,
) -> PlaneModel:
    """The plane by one run of the closure.

    Args:
        closure: as in `jetplane.evaluate`.
        params: the parameters that move.
        directions: along which.
        spec: of the plane; all its directions are carried together.
        entrance: where the model carries a part of the directions only.

    Raises:
        As `jetplane.evaluate`.
    """
    structure = spec.structure
    with expansion(structure, spec.order, spec.gauss_newton, spec.examples) as space:
        space.entrance, space.remembered, space.penalties = entrance, True, spec.penalties
        interception = Interception(space)
        gradient_hooks.announce(params)
        for i, p in enumerate(params):
            interception.register(p, i, directions, p)
        with interception.running(), _copies_registered(interception, params, directions):
            loss = as_loss(sharded.gathered(interception.replaced(closure())), space)
        value, first, second = coefficients_of(loss, space, bool(interception.used or interception.unmoved))
        if second is None and spec.curvature != "none":
            second = value.new_zeros(structure.count)
        if first is None:
            first = value.new_zeros(spec.k)
        second = None if second is None else structure.matrix(second)
        examples = known(loss, first) if spec.examples else None
        model = PlaneModel(value, first, second, examples, space.materialized)
        interception.used.clear()  # what nobody else holds need not become ordinary tensors
        del loss
    return model if space.level > 1 else checked_finite(model)


@contextlib.contextmanager
def _copies_registered(
    interception: Interception, params: Sequence[Tensor], directions: AbstractDirections
) -> Iterator[None]:
    """Register whole copies of sharded parameters too, as they are made for a module."""
    places = {id(p): i for i, p in enumerate(params)}

    def gathered(param: Tensor, copy: Tensor) -> None:
        like = copy if _sharding.is_sharded(copy) else _sharding.whole(param)
        interception.register(copy, places[id(param)], directions, like)

    with sharded.running(params, gathered):
        yield
