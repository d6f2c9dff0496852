"""Losses of log-probabilities as losses of logits, for Gauss-Newton curvature.

``nll_loss(log_softmax(z))`` is the cross entropy of z. As a function of the log-probabilities it is linear and has no
curvature; as a function of z it has that of the cross entropy. So the result of ``log_softmax`` remembers z, and
``nll_loss`` and ``kl_div`` of it begin at z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..jets import Jet, Space, is_jet
from .registry import operator

_LOG_SOFTMAX = {operator(name) for name in ("log_softmax.int", "_log_softmax", "special_log_softmax")}


@dataclass(frozen=True)
class Logits:
    """What a tensor is the ``log_softmax`` of.

    Attributes:
        x: the logits.
        dim: the axis of the classes.
        versions: how often the tensor and x had been written to.
    """

    x: Jet
    dim: int
    versions: tuple[int, int]


def follow(func: Any, space: Space, args: Sequence[Any], result: Any) -> None:
    """Let the result of ``log_softmax`` remember its logits."""
    if func in _LOG_SOFTMAX and len(args) > 1 and is_jet(args[0], space) and result.dtype == args[0].dtype:
        x = args[0]
        result.softmax_of = Logits(x, args[1] % max(x.dim(), 1), (result.root().version, x.root().version))


def of_logits(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A loss function and its arguments, from logits where it is given their ``log_softmax``; called as a loss is."""
    y = args[0] if args else kwargs.get("input")
    if func not in (F.nll_loss, F.kl_div) or not isinstance(y, Jet):
        return func, args, kwargs
    known = y.softmax_of
    if known is None or known.versions != (y.root().version, known.x.root().version):
        return func, args, kwargs
    if func is F.kl_div:
        first = torch.log_softmax(known.x, known.dim)
    elif known.dim == min(y.dim() - 1, 1):
        func, first = F.cross_entropy, known.x  # which takes the same arguments
    else:
        return func, args, kwargs
    return (func, (first, *args[1:]), kwargs) if args else (func, args, kwargs | {"input": first})
