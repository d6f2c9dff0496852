"""Derivatives that a closure takes itself, by reverse mode: ``torch.autograd.grad`` with respect to tensors of its own.

A closure runs below autograd. What it computes from tensors that require gradients is an exception: residuals of
differential equations, gradient penalties and forces differentiate the model in its inputs, by a graph. Functions that
take such a tensor run with autograd, which holds jets in its graph as it holds tensors, and its backward formulas are
operators that carry jets in turn. Parameters of modules start no graph: those of the evaluation are jets, and others,
as those of the opposite network of a GAN, are constants.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch import TRANSFORMS, make_dual, tree_leaves
from ..errors import DerivativeError
from ..rules.grad_mode import in_graph
from ..rules.grad_mode import recording as _recording

# Derivatives that running below autograd, or the end of the evaluation, would turn into zeros or errors.
_REFUSED = {torch.Tensor.backward: "backward()", torch.autograd.backward: "backward()"}
_REFUSED[make_dual] = "torch.autograd.forward_ad"


def recording(
    func: Any, args: Iterable[Any], kwargs: dict[str, Any], params: Collection[int] = (), lost: str = ""
) -> Any:
    """What a function that a closure calls runs in: with autograd where an argument starts or continues a graph.

    Args:
        func: the function.
        args: its arguments, parameters replaced by their jets.
        kwargs: likewise.
        params: identities of parameters that are there as they are.
        lost: what has cut the graph in this evaluation.

    Raises:
        DerivativeError: it takes derivatives that cannot be carried.
    """
    if func in _REFUSED:
        _refuse(_REFUSED[func])
    if func is torch.autograd.grad:
        return _differentiating(args, kwargs, lost)
    if _starts(args, params) or (kwargs and _starts(kwargs.values(), params)):
        return _recorded(func)
    return _nothing


_nothing = contextlib.nullcontext()


def refuse(func: Any) -> None:
    """Refuse derivatives by a graph where jets are recorded in one themselves, and the two would be one.

    Raises:
        DerivativeError: the function takes such derivatives.
    """
    if func in _REFUSED:
        _refuse(_REFUSED[func])
    if func is torch.autograd.grad and _caller() != TRANSFORMS:
        _refuse("torch.autograd.grad")


def _starts(values: Iterable[Any], params: Collection[int]) -> bool:
    for x in values:
        if isinstance(x, Tensor):
            if in_graph(x, params):
                return True
        elif isinstance(x, (list, tuple)) and _starts(x, params):
            return True
    return False


@contextlib.contextmanager
def _recorded(func: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if func in _ATTENTION:  # fused kernels have a first derivative alone
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_recording(torch.is_grad_enabled()))
        yield


_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}


def _differentiating(args: Any, kwargs: dict[str, Any], lost: str) -> Any:
    if _caller() == TRANSFORMS:  # which has a graph of its own
        return _nothing
    inputs = tree_leaves(args[1] if len(args) > 1 else kwargs.get("inputs"))
    if not all(isinstance(x, Tensor) and in_graph(x) for x in inputs):
        _refuse(
            "torch.autograd.grad with respect to parameters, or to a tensor that does not require gradients",
            ", or call requires_grad_() on the tensor before it is used",
        )
    if lost:
        raise DerivativeError(
            f"torch.autograd.grad inside a forward-only evaluation, whose graph may be cut by {lost}: its derivative "
            "would lack a part. Use torch functions there (torch.cat or torch.stack in place of a buffer), or "
            "differentiate by torch.func.grad or jetplane.jvp"
        )
    return _recording(True)


def _refuse(what: str, more: str = "") -> None:
    raise DerivativeError(
        f"{what} inside a forward-only evaluation. A closure returns its loss and calls no backward(); for "
        "derivatives inside it use torch.func.grad and its like (in parameters: with torch.func.functional_call), "
        f"or jetplane.jet, jetplane.hvp or jetplane.laplacian{more}"
    )


def _caller() -> str:
    """The module that called the function which is being intercepted."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(_BETWEEN):
        frame = frame.f_back
    return frame.f_globals["__name__"]


_BETWEEN = (__package__ or "", "torch.overrides", "torch.autograd")
