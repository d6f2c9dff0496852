"""Loss functions: where the reduction is a sum, second coefficients are summed without being formed.

A loss of the form ``sum(l(x))`` has the slope ``sum(l' x_i)``, a matrix-vector product, and the
curvature ``sum(l' x_ij) + sum(l'' x_i x_j)``, a matrix-vector product and a Gram matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..jets import (
    Coefficients,
    Jet,
    Space,
    absent,
    carried,
    chain,
    chain_many,
    is_jet,
    make,
    outer,
    overwritten,
    parts,
    precise,
    primal,
    writable,
)
from . import examples
from .registry import aten, enter, register

NONE, MEAN, SUM = 0, 1, 2
CLAMPED = 1e-12  # the least p (1 - p) in derivatives of the binary cross entropy
BLOCK = 1 << 19  # elements of a stack that are weighed at a time


def reduce(y: Any, reduction: int) -> Any:
    """The reduction that torch's loss functions share."""
    if reduction == NONE:
        return y
    total = y.mean() if reduction == MEAN else y.sum()
    if isinstance(y, Jet) and y.space.examples:
        share = torch.full_like(y.primal, 1 / max(y.numel(), 1) if reduction == MEAN else 1)
        examples.keep(y.space, total, parts(y, y.space)[1], share)
    return total


def summed_chain(space: Space, x: Any, y: Tensor, d1: Tensor, d2: Tensor | None, reduction: int) -> Any:
    """``reduce(l(x))`` for an elementwise l with value y and derivatives d1 and d2."""
    if reduction == NONE:
        return chain(space, x, y, d1, d2)
    _, x1, x2 = parts(x, space)
    share = 1 / max(y.numel(), 1) if reduction == MEAN else 1
    slope, curvature = x1.total(d1 * share), x2.total(d1 * share)
    if d2 is not None:
        curvature += outer(x1 * (d2 * share), x1).total()
    return examples.keep(space, make(reduce(y, reduction), slope, curvature, space), x1, d1 * share)


# --- functions of the difference of input and target --------------------------------------------


@register("mse_loss")
def _(space: Space, x: Any, target: Any, reduction: int = MEAN) -> Any:
    d = torch.sub(x, target)
    p = precise(primal(d, space))
    return summed_chain(space, d, (p * p).to(d.dtype), 2 * p, torch.full_like(p, 2), reduction)


@register("l1_loss")
def _(space: Space, x: Any, target: Any, reduction: int = MEAN) -> Any:
    return reduce(torch.abs(torch.sub(x, target)), reduction)


@register("huber_loss")
def _(space: Space, x: Any, target: Any, reduction: int = MEAN, delta: float = 1.0) -> Any:
    d = torch.sub(x, target)
    p = primal(d, space)
    near = p.abs() <= delta
    bent = (p.abs() < delta).to(p.dtype)
    y = torch.where(near, 0.5 * p * p, delta * (p.abs() - 0.5 * delta))
    return summed_chain(space, d, y, torch.where(near, p, delta * torch.sgn(p)), bent, reduction)


@register("smooth_l1_loss")
def _(space: Space, x: Any, target: Any, reduction: int = MEAN, beta: float = 1.0) -> Any:
    if beta == 0:
        return aten.l1_loss(x, target, reduction)
    d = torch.sub(x, target)
    p = primal(d, space)
    near = p.abs() < beta
    y = torch.where(near, 0.5 * p * p / beta, p.abs() - 0.5 * beta)
    d1 = torch.where(near, p / beta, torch.sgn(p))
    return summed_chain(space, d, y, d1, near.to(p.dtype) / beta, reduction)


# --- binary ---------------------------------------------------------------------------------------


@register("binary_cross_entropy_with_logits")
def _(space: Space, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = MEAN) -> Any:
    if any(is_jet(t, space) for t in (target, weight, pos_weight)) or target.shape != x.shape:
        negative = torch.mul(torch.sub(1, target), F.logsigmoid(torch.neg(x)))
        positive = torch.mul(target, F.logsigmoid(x))
        positive = positive if pos_weight is None else torch.mul(positive, pos_weight)
        y = torch.neg(torch.add(negative, positive))
        return reduce(y if weight is None else torch.mul(y, weight), reduction)
    p = primal(x, space)
    y = aten.binary_cross_entropy_with_logits(p, target, weight, pos_weight, NONE)
    s = torch.sigmoid(p)
    d1, d2 = s - target, s * (1 - s)
    if pos_weight is not None:
        positive = target * pos_weight
        total = 1 - target + positive
        d1, d2 = s * total - positive, d2 * total
    if weight is not None:
        d1, d2 = d1 * weight, d2 * weight
    return summed_chain(space, x, y, d1, d2, reduction)


@register("binary_cross_entropy")
def _(space: Space, x: Any, target: Any, weight: Any = None, reduction: int = MEAN) -> Any:
    # As torch, which takes logarithms to be at least -100, and p (1 - p) in the derivatives to be at least 1e-12.
    p, t = precise(primal(x, space)), precise(primal(target, space))
    q = 1 - p
    both = (p * q).clamp(min=CLAMPED)
    d1, d2 = (p - t) / both, (t * q * q + (1 - t) * p * p) / (both * both)
    if is_jet(target, space) or is_jet(weight, space):
        y = aten.binary_cross_entropy(primal(x, space), primal(target, space), None, NONE)
        gradient = d1, torch.log1p(-p) - torch.log(p)
        y = chain_many(space, (x, target), y, gradient, {(0, 0): d2, (0, 1): -1 / both})
        return reduce(y if weight is None else torch.mul(y, weight), reduction)
    y = aten.binary_cross_entropy(primal(x, space), primal(target, space), weight, NONE)
    if weight is not None:
        d1, d2 = d1 * weight, d2 * weight
    return summed_chain(space, x, y, d1, d2, reduction)


@register("soft_margin_loss")
def _(space: Space, x: Any, target: Any, reduction: int = MEAN) -> Any:
    return reduce(torch.neg(F.logsigmoid(torch.mul(x, target))), reduction)


# --- margins: flat at the kink itself, as torch's kernels -------------------------------------------


@register("multi_margin_loss")
def _(
    space: Space, x: Any, target: Tensor, p: Any = 1, margin: Any = 1, weight: Any = None, reduction: int = MEAN
) -> Any:
    rows, labels = x.reshape(-1, x.shape[-1] if x.dim() else 1), target.reshape(-1, 1)
    z = torch.add(torch.sub(margin, rows.gather(1, labels)), rows)
    others = torch.arange(rows.shape[1], device=x.device) != labels
    z = torch.where((z > 0) & others, z, 0)
    z = z if p == 1 else torch.square(z)
    y = (z if weight is None else torch.mul(z, weight[labels])).mean(1)
    return reduce(y if x.dim() > 1 or reduction != NONE else y.squeeze(0), reduction)


@register("multilabel_margin_loss")
def _(space: Space, x: Any, target: Tensor, reduction: int = MEAN) -> Any:
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    labels = target.reshape(rows.shape)
    listed = (labels >= 0).cumprod(1).bool()  # a negative label ends the list
    labels = torch.where(listed, labels, 0)
    wanted = torch.zeros(rows.shape, dtype=labels.dtype, device=x.device).scatter_add(
        1, labels, listed.to(labels.dtype)
    )
    z = torch.add(torch.sub(1, rows.gather(1, labels)).unsqueeze(2), rows.unsqueeze(1))
    z = torch.where((z > 0) & listed.unsqueeze(2) & (wanted == 0).unsqueeze(1), z, 0)
    y = torch.div(z.sum((1, 2)), rows.shape[1])
    return reduce(y if x.dim() > 1 or reduction != NONE else y.squeeze(0), reduction)


# --- classes --------------------------------------------------------------------------------------


@register("nll_loss", "nll_loss2d", "nll_loss_nd")
def _(space: Space, x: Any, target: Tensor, weight: Any = None, reduction: int = MEAN, ignore_index: int = -100) -> Any:
    batched = x if x.dim() > 1 else x.unsqueeze(0)
    labels = target if x.dim() > 1 else target.reshape(1)
    kept = labels != ignore_index
    picked = batched.gather(1, torch.where(kept, labels, 0).unsqueeze(1)).squeeze(1)
    share = kept.to(x.dtype)
    if weight is not None:
        share = torch.mul(share, weight[torch.where(kept, labels, 0)])
    if reduction == MEAN:
        y = torch.neg(torch.div(torch.mul(picked, share).sum(), share.sum()))
        if not is_jet(share, space):
            examples.keep(space, y, parts(picked, space)[1], -share / share.sum())
    else:
        y = reduce(torch.neg(torch.where(kept, torch.mul(picked, share), 0)), reduction)
    return y if x.dim() > 1 or reduction != NONE else y.squeeze(0)


@register("nll_loss_forward", "nll_loss2d_forward")
def _(space: Space, x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> Any:
    kept = target != ignore_index
    total = kept.to(x.dtype) if weight is None else weight[torch.where(kept, target, 0)] * kept
    return aten.nll_loss_nd(x, target, weight, reduction, ignore_index), primal(total, space).sum()


@register("cross_entropy_loss")
def _cross_entropy(
    space: Space,
    x: Any,
    target: Any,
    weight: Any = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    if reduction == MEAN and x.shape.numel() == 0:
        return torch.mul(_cross_entropy(space, x, target, weight, SUM, ignore_index, label_smoothing), math.nan)
    if reduction == NONE or is_jet(target, space) or is_jet(weight, space) or not is_jet(x, space):
        return _composed_cross_entropy(space, x, target, weight, reduction, ignore_index, label_smoothing)
    dim = 0 if x.dim() == 1 else 1
    p, x1, x2 = parts(x, space)
    like = p.new_empty((), dtype=carried(p.dtype)).expand(p.shape) if writable(p) else precise(p)
    goal = _goal(like, target, weight, reduction, ignore_index, label_smoothing, dim)
    loss, slope, curvature, d1 = _summed_rows(space, p, x1, x2, goal)
    made = make(loss.to(p.dtype), slope, curvature, space)
    return examples.keep(space, made, x1, d1) if p.dim() > 1 else made


def weighed_softmax(
    space: Space, p: Tensor, x1: Coefficients, goal: Tensor, dim: int
) -> tuple[Coefficients, Coefficients, Tensor]:
    """Slope and curvature of ``-sum(goal * log_softmax)`` and, where examples are kept, its derivative in p."""
    found = _summed_rows(space, p, x1, absent(space, 2), _Goal(dim, goal.sum(dim, keepdim=True), goal))
    return found[1:]


def _summed_rows(
    space: Space, p: Tensor, x1: Coefficients, x2: Coefficients, goal: _Goal
) -> tuple[Tensor, Coefficients, Coefficients, Tensor]:
    """Loss, slope and curvature, as sums over some rows of logits at a time, and the last rows' derivatives.

    Nothing of the logits' size is formed: with a large vocabulary they are the largest activation of the model.
    """
    n = p.shape[0]
    rows = max(1, BLOCK // max(p[:1].numel(), 1))
    held = [c.tensor for c in (x1, x2) if c and not c.is_product]
    if goal.dim == 0 or space.examples or rows >= n or x2.is_product or not writable(p, *held):
        return _some_rows(space, p, x1, x2, goal)
    loss, slope, curvature, d1 = p.new_zeros((), dtype=carried(p.dtype)), absent(space, 1), absent(space, 2), p
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        some1, some2 = (c.map(lambda c, part=part: c[:, part]) for c in (x1, x2))
        found, f1, f2, d1 = _some_rows(space, p[part], some1, some2, goal.rows(part))
        loss, slope, curvature = loss + found, slope + f1, curvature + f2
    return loss, slope, curvature, d1


def _some_rows(
    space: Space, p: Tensor, x1: Coefficients, x2: Coefficients, goal: _Goal
) -> tuple[Tensor, Coefficients, Coefficients, Tensor]:
    """Loss, slope and curvature of logits, and the first derivatives."""
    dim, mass = goal.dim, goal.mass
    z = torch.log_softmax(precise(p), dim)
    loss = goal.loss(z)
    y = overwritten(z, "exp")
    curvature = _spread(space, x1, y, mass, dim)
    d1 = goal.taken_from(overwritten(y, "mul", mass))
    return loss, x1.total(d1), curvature + x2.total(d1), d1


def _spread(space: Space, x1: Coefficients, y: Tensor, mass: Tensor, dim: int) -> Coefficients:
    """``sum(mass y (x_i - a_i) (x_j - a_j))``, ``a_i = sum(y x_i)`` over a dimension: the curvature of log_softmax.

    From ``sum(y x_i x_j) - a_i a_j`` sure predictions would leave rounding. Where stacks are large, some rows at a
    time: what is weighed stays in the cache.
    """
    curvature = absent(space, 2)
    if not x1 or space.order == 1:
        return curvature
    n = len(y) if dim == 1 else 1
    rows = max(1, BLOCK // max(x1.tensor[:, :1].numel(), 1)) if dim == 1 else n
    for start in range(0, max(n, 1), max(rows, 1)):
        part = slice(start, start + rows) if rows < n else slice(None)
        share, of_rows = y[part], mass[part]

        def centred(c: Tensor, part: slice = part, share: Tensor = share) -> Tensor:
            c = c[:, part]
            return c - (c * share).sum(dim + 1, keepdim=True)

        apart = x1.map(centred)
        curvature += outer(apart * (of_rows * share), apart).total()
    return curvature


# A compiler breaks aten's operator up before a jet meets it. This one stays whole, and jets alone meet it.
_library = torch.library.Library("jetplane", "DEF")
_library.define(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, float smoothing)"
    " -> Tensor"
)
WHOLE = torch.ops.jetplane.cross_entropy.default
enter(WHOLE, _cross_entropy)


def cross_entropy_whole(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` in code that is being compiled."""
    if not isinstance(input, Jet) or isinstance(weight, Jet) or size_average is not None or reduce is not None:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    how = {"none": NONE, "mean": MEAN, "sum": SUM}[reduction]
    return WHOLE(input, target, weight, how, ignore_index, label_smoothing)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` as a layer and a loss.

    Torch's own is one function, in which a model and its loss cannot be told apart, and makes chunks (``options``) of
    gradients that it cannot differentiate.
    """
    classes, *more = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    if more:
        logits = logits.unflatten(-1, (classes, *more))
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits, target, weight, None, ignored, None, reduction, label_smoothing)


@dataclass(frozen=True)
class _Goal:
    """The goal of a cross entropy ``-sum(goal * log_softmax)``.

    Attributes:
        dim: the dimension of classes.
        mass: sums over classes, which stay as a dimension of size 1.
        given: the goal, of the logits' shape, or where all of the mass is at one class the ``labels``, of the shape
            of ``mass``.
    """

    dim: int
    mass: Tensor
    given: Tensor | None = None
    labels: Tensor | None = None

    def rows(self, part: slice) -> _Goal:
        """The goal of some rows, along the first axis."""
        given, labels = (None if t is None else t[part] for t in (self.given, self.labels))
        return _Goal(self.dim, self.mass[part], given, labels)

    def taken_from(self, masses: Tensor) -> Tensor:
        """``masses - goal``; the masses may be overwritten."""
        if self.labels is None:
            return masses - self.materialized(masses)
        return overwritten(masses, "scatter_add", self.dim, self.labels, -self.mass)

    def loss(self, z: Tensor) -> Tensor:
        """``-sum(goal * z)``; where the goal is zero z may be infinite."""
        goal, z = (self.given, z) if self.labels is None else (self.mass, z.gather(self.dim, self.labels))
        assert goal is not None
        return -(goal * torch.where(goal == 0, 0, z)).sum()

    def materialized(self, like: Tensor) -> Tensor:
        """The goal, in the shape of the logits."""
        if self.given is not None:
            return self.given
        assert self.labels is not None
        return torch.zeros_like(like).scatter(self.dim, self.labels, self.mass)


def _goal(
    p: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    dim: int,
) -> _Goal:
    classes = p.shape[dim]
    shape = [1] * p.dim()
    shape[dim] = classes
    per_class = None if weight is None else weight.reshape(shape)
    if target.dtype.is_floating_point:
        goal = target * (1 - smoothing) + smoothing / classes
        goal = goal if per_class is None else goal * per_class
        if reduction == MEAN:
            goal = goal / max(p.numel() // classes, 1)
        return _Goal(dim, goal.sum(dim, keepdim=True), goal)
    kept = target != ignore_index
    labels = torch.where(kept, target, 0)
    share = kept.to(p.dtype)
    hard = share if weight is None else share * weight[labels]
    if reduction == MEAN:
        total = hard.sum()
        share, hard = share / total, hard / total
    labels = labels.unsqueeze(dim)
    at_labels = _Goal(dim, hard.unsqueeze(dim), labels=labels)
    if not smoothing:
        return at_labels
    spread = share.unsqueeze(dim) * (smoothing / classes)
    goal = at_labels.materialized(p) * (1 - smoothing) + (spread if per_class is None else spread * per_class)
    return _Goal(dim, goal.sum(dim, keepdim=True), goal)


def _composed_cross_entropy(
    space: Space, x: Any, target: Any, weight: Any, reduction: int, ignore_index: int, smoothing: float
) -> Any:
    dim = 0 if x.dim() == 1 else 1
    z = torch.log_softmax(x, dim)
    p, t = primal(x, space), primal(target, space)
    if t.dtype.is_floating_point:
        goal = torch.add(torch.mul(target, 1 - smoothing), smoothing / p.shape[dim])
    elif reduction == NONE and not smoothing:
        return aten.nll_loss_nd(z, target, weight, reduction, ignore_index)
    else:
        w = primal(weight, space)
        if is_jet(weight, space):
            return NotImplemented
        goal = _goal(p, t, w, reduction, ignore_index, smoothing, dim).materialized(p)
        y = torch.neg(torch.mul(goal, z)).sum(dim)
        return reduce(y, SUM if reduction != NONE else NONE)
    shape = [1] * p.dim()
    shape[dim] = p.shape[dim]
    goal = goal if weight is None else torch.mul(goal, weight.reshape(shape))
    y = torch.neg(torch.mul(goal, z)).sum(dim)
    return reduce(y, reduction)
