"""Checks of what enters an evaluation and of what leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..directions import AbstractDirections, CachedDirections, StoredDirections
from ..errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    LossError,
    NonFiniteError,
    ShapeError,
    UnknownLossError,
    UnusedParametersError,
)
from ..jets import MODEL, Jet, Space, Tangents, goes_outside, kind_of, promoted
from ..rules.dispatch import KNOWN_LOSSES
from ..rules.sparse import is_sparse
from .leaving import plain_result
from .plane import PlaneModel

CACHED_BYTES = 1 << 26  # of drawn tangents, kept for the next operator, or the update, that asks for them
NO_LOSS = f"Gauss-Newton curvature ('ggn') found no loss function that is known in the closure. {KNOWN_LOSSES}"


def checked_arguments(closure: Any, params: Any) -> list[Tensor]:
    """The parameters of a closure as a list: each a different dense tensor of a floating dtype.

    Raises:
        ArgumentError, DTypeError: they are not, or the closure cannot be called.
    """
    if not callable(closure):
        raise ArgumentError(
            f"expected a closure, a function that computes the loss, got {type(closure).__name__}: write "
            "lambda: loss_function(model(x), y)"
        )
    if not isinstance(params, Iterable) or isinstance(params, (Tensor, str, Mapping)):
        raise ArgumentError(
            f"params must be an iterable of tensors, got a {type(params).__name__}: list(model.parameters())"
        )
    params = list(params)
    if not params:
        raise ArgumentError("no parameters: expected at least one tensor that the closure uses")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise ArgumentError(f"parameter {i} must be a tensor, got {type(p).__name__}")
        if not (p.dtype.is_floating_point or p.dtype.is_complex):
            raise DTypeError(f"parameter {i} must be of a floating dtype, got {p.dtype}")
        if p.device.type == "meta":
            raise ArgumentError(f"parameter {i} is on the meta device and has no values; expected one with memory")
        if is_sparse(p):
            raise ArgumentError(
                f"parameter {i} is of layout {p.layout}; expected a dense tensor. Let its values be the parameter, and "
                "write products by its indices: torch.zeros(rows, n).index_add(0, row, values[:, None] * x[column])"
            )
    if len({id(p) for p in params}) != len(params):
        raise ArgumentError("a parameter is given twice; expected each tensor once")
    return params


def as_directions(
    params: Sequence[Tensor], directions: AbstractDirections | Sequence[Tensor | Tangents]
) -> AbstractDirections:
    """Directions as an evaluation draws them, from a source or from one tensor of tangents for each parameter.

    Raises:
        ArgumentError, ShapeError, DTypeError, DeviceError: tangents that do not match their parameter.
    """
    if isinstance(directions, (CachedDirections, StoredDirections)):
        return directions
    if isinstance(directions, AbstractDirections):
        return CachedDirections(directions, params, limit=CACHED_BYTES)
    if not isinstance(directions, (list, tuple)):
        raise ArgumentError(
            f"expected jetplane.Directions(k), or one tensor of tangents for each parameter, got {directions!r}"
        )
    if len(directions) != len(params):
        raise ShapeError(f"expected one tensor of tangents for each of {len(params)} parameters, got {len(directions)}")
    k = directions[0].shape[0] if len(directions[0].shape) else 0
    if k < 1:
        raise ArgumentError("k must be at least 1: tangents are of shape (k, *param.shape)")
    for i, (p, t) in enumerate(zip(params, directions, strict=True)):
        if tuple(t.shape) != (k, *p.shape):
            raise ShapeError(f"tangents {i}: expected shape {(k, *p.shape)}, got {tuple(t.shape)}")
        if t.dtype != p.dtype:
            raise DTypeError(f"tangents {i}: expected {p.dtype}, the dtype of the parameter, got {t.dtype}")
        if t.device != p.device:
            raise DeviceError(f"tangents {i}: expected device {p.device}, that of the parameter, got {t.device}")
    return StoredDirections([t.detach() if isinstance(t, Tensor) else t for t in directions])


def check_loss(loss: Any) -> None:
    """Check that a closure returned a scalar of a floating dtype.

    Raises:
        LossError: it did not.
    """
    if not isinstance(loss, Tensor):
        remedy = "the loss alone, as a tensor" if loss is not None else "the loss: return loss"
        remedy = "the loss without .item(), float() or numpy()" if isinstance(loss, float) else remedy
        raise LossError(f"the closure must return a scalar tensor, got {type(loss).__name__}; let it return {remedy}")
    if goes_outside(type(loss)):
        raise LossError(
            f"the closure must return a plain tensor, got a {type(loss).__name__}, which wraps others; return the one "
            "inside of it that is to be differentiated"
        )
    if loss.numel() != 1:
        raise LossError(
            f"the closure must return a scalar loss, got shape {tuple(loss.shape)}; take its mean() or sum()"
        )
    if not loss.dtype.is_floating_point:
        raise LossError(f"the closure must return a floating-point loss, got {loss.dtype}")


def coefficients_of(loss: Any, space: Space, used: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, shape (), its first coefficients (K,) and its second ones (pairs,); None where they are zero.

    Args:
        loss: what the closure returned.
        space: that of the evaluation.
        used: whether the closure used a parameter.

    Raises:
        LossError: not a scalar of a floating dtype.
        UnknownLossError: not one that a loss function made, for Gauss-Newton curvature.
        UnusedParametersError: it does not depend on the parameters.
    """
    check_loss(loss)
    jet = promoted(loss)
    loss = loss if jet is None else jet
    if not (isinstance(loss, Jet) and loss.space is space):
        raise UnusedParametersError(
            "the loss does not depend on the parameters: "
            + (
                "they were used, but every path to the loss was cut (detach(), torch.no_grad() in the closure, item(), "
                "a comparison)"
                if used
                else "the closure uses none of them; expected a loss computed from these very tensors"
            )
        )
    if space.gauss_newton and kind_of(loss) == MODEL:
        raise UnknownLossError(NO_LOSS)
    first, second = loss.first_tensor, loss.second_tensor
    return (
        loss.primal.reshape(()),
        None if first is None else first.reshape(space.k),
        None if second is None else second.reshape(space.structure.count),
    )


def checked_finite(model: PlaneModel) -> PlaneModel:
    """The model as tensors of their own, of single precision at least.

    Raises:
        NonFiniteError: NaN or infinity in the loss, slope or curvature.
    """

    def plain(t: Tensor) -> Tensor:
        t = plain_result(t)
        return t.clone() if t.dtype in (torch.float32, torch.float64) else t.float()

    value, slope = plain(model.value), plain(model.slope)
    curvature = None if model.curvature is None else plain(model.curvature)
    found = {"loss": value, "slope": slope} | ({} if curvature is None else {"curvature": curvature})
    finite = torch.stack([torch.isfinite(t).all().to(value.device) for t in found.values()])
    if not bool(finite.all()):  # the one place where an evaluation waits for its device
        name, t = next(pair for pair, good in zip(found.items(), finite.tolist(), strict=True) if not good)
        raise NonFiniteError(f"the {name} is not finite: {t.tolist() if t.numel() <= 9 else 'NaN or inf inside'}")
    examples = None if model.examples is None else plain(model.examples)
    return replace(model, value=value, slope=slope, curvature=curvature, examples=examples)
