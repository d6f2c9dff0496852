"""Hessian-vector products by reverse mode, where a graph is allowed.

    several at once, forward over reverse:    H v = d/da grad f(x + a v)
    a single one, reverse over reverse:       H v = grad (v . grad f),   the Hessian being symmetric

A product takes the time of some evaluations, whatever the number of coordinates is, and the memory of a backward
pass. A second backward pass is several times faster than torch's forward mode through the first one, but cannot be
batched.

Source: Pearlmutter, Neural Computation 6 (1994); the modes are those of `torch.func` and `torch.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import records, tree_flatten, tree_unflatten
from ..errors import DerivativeError, JetplaneError
from .arguments import Call


def products(call: Call, vectors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Any]:
    """``H v`` for each of K vectors.

    Args:
        call: of a function that gives one number (at each point).
        vectors: (K, *shape) for each tensor that moves.

    Returns:
        The products, (K, *shape) for each tensor that moves, f's value, and aux.

    Raises:
        ShapeError: f gives more than one number.
        DerivativeError: an operator that torch cannot differentiate this way.
    """
    beside: dict[str, Any] = {}  # torch.func passes tensors alone through

    def total(*xs: Tensor) -> tuple[Tensor, list[Tensor]]:
        ys, _, aux = call.outputs(call.at(xs))
        call.check_scalar(ys)
        flat, beside["spec"] = tree_flatten((ys[0], aux))
        beside["leaves"] = [None if isinstance(t, Tensor) else (t,) for t in flat]
        return ys[0].sum(), [t for t in flat if isinstance(t, Tensor)]

    try:
        if vectors[0].shape[0] == 1:
            found, tensors = _one(total, call.leaves, vectors)
        else:
            found, tensors = _several(total, call.leaves, vectors)
    except JetplaneError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise DerivativeError(
            f"{call.name}: torch cannot differentiate f twice with reverse mode; use mode='forward'. "
            f"It says: {str(error).splitlines()[0]}"
        ) from error
    passed = iter(tensors)
    flat = [next(passed) if other is None else other[0] for other in beside["leaves"]]
    value, aux = tree_unflatten(flat, beside["spec"])
    return list(found), value, aux


Total = Callable[..., tuple[Tensor, list[Tensor]]]


def _one(total: Total, leaves: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The product with one vector."""
    recorded = records()
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors of their own: f may use the primals beside, as constants.
        xs = [x.view_as(x) if recorded and x.requires_grad else x.detach().clone().requires_grad_() for x in leaves]
        y, beside = total(*xs)
        first = _gradient(y, xs, True)
        vs = [v[0].clone() if v.is_inference() else v[0] for v in vectors]
        along = torch.stack([(g * v).sum() for g, v in zip(first, vs, strict=True)]).sum()
        found = _gradient(along, xs, recorded)
    if not recorded or not _reaches_others([*found, *beside], xs):
        found, beside = [t.detach() for t in found], [t.detach() for t in beside]
    return [t.unsqueeze(0) for t in found], beside


def _reaches_others(results: Sequence[Tensor], xs: Sequence[Tensor]) -> bool:
    """Whether results have a graph to anything but tensors that were made here."""
    own = {id(x) for x in xs if x.is_leaf}
    waiting = [t.grad_fn for t in results if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return True
        found = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= found
        waiting += found
    return False


def _gradient(y: Tensor, xs: Sequence[Tensor], create: bool) -> Sequence[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    return torch.autograd.grad(y, xs, create_graph=create, allow_unused=True, materialize_grads=True)


def _several(total: Total, leaves: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """The products with several vectors."""
    leaves = tuple(leaves) if records() else tuple(x.detach() for x in leaves)
    gradient = torch.func.grad(total, argnums=tuple(range(len(leaves))), has_aux=True)

    def product(vs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        got: Any = torch.func.jvp(gradient, leaves, vs, has_aux=True)
        return got[1], got[2]

    dims: Any = (0, None)
    return torch.vmap(product, out_dims=dims, randomness="same")(tuple(vectors))
