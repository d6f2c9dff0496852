"""The entry point that outside benchmark harnesses call: one plane evaluation in plain terms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import jetplane as jp


def plane_eval(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    tangents: dict[str, Tensor],
    batch: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, slope (K,) and exact curvature (K, K) of ``loss_fn(model(x), y)``.

    Args:
        loss_fn: called as ``loss_fn(output, target)``.
        model: its parameters named in ``tangents`` move, the others are constants.
        tangents: one tensor of shape (K, *shape) for each parameter that moves, by name.
        batch: inputs and targets.
    """
    x, y = batch
    params = [model.get_parameter(name) for name in tangents]
    plane = jp.evaluate(lambda: loss_fn(model(x), y), params, list(tangents.values()))
    return plane.value, plane.slope, plane.curvature
