"""Hessian-vector products by forward over reverse mode, where a graph is allowed.

    H v = d/da grad f(x + a v)

A product takes the time of some evaluations, whatever the number of coordinates is, and the memory of a backward
pass: torch's own reverse mode, differentiated along v by torch's own forward mode.

Source: Pearlmutter, Neural Computation 6 (1994); the modes are those of `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_unflatten
from ..errors import DerivativeError, JetplaneError
from ..evaluation.context import recording
from .arguments import Point, check_scalar, outputs


def products(
    f: Callable[..., Any], where: Point, vectors: Sequence[Tensor], has_aux: bool = False, what: str = "hvp"
) -> tuple[list[Tensor], Tensor, Any]:
    """``H v`` for each of K vectors.

    Args:
        f: a function that gives one number (at each point).
        where: the point.
        vectors: (K, *shape) for each tensor that moves.
        has_aux: whether f returns a pair.
        what: the caller's name in errors.

    Returns:
        The products, (K, *shape) for each tensor that moves, f's value, and aux.

    Raises:
        ShapeError: f gives more than one number.
        DerivativeError: an operator that torch cannot differentiate this way.
    """
    leaves = tuple(where.leaves) if recording() else tuple(x.detach() for x in where.leaves)

    beside: dict[str, Any] = {}  # torch.func passes tensors alone through

    def total(*xs: Tensor) -> tuple[Tensor, list[Tensor]]:
        ys, _, aux = outputs(where.call(f, xs), has_aux)
        check_scalar(where, ys, what)
        flat, beside["spec"] = tree_flatten((ys[0], aux))
        beside["leaves"] = [None if isinstance(t, Tensor) else (t,) for t in flat]
        return ys[0].sum(), [t for t in flat if isinstance(t, Tensor)]

    gradient = torch.func.grad(total, argnums=tuple(range(len(leaves))), has_aux=True)

    def product(vs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        got: Any = torch.func.jvp(gradient, leaves, vs, has_aux=True)
        return got[1], got[2]

    try:
        if vectors[0].shape[0] == 1:
            found, tensors = product(tuple(v[0] for v in vectors))
            found = [t.unsqueeze(0) for t in found]
        else:
            dims: Any = (0, None)
            found, tensors = torch.vmap(product, out_dims=dims, randomness="same")(tuple(vectors))
    except JetplaneError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise DerivativeError(
            f"{what}: torch cannot differentiate f by forward over reverse mode; use mode='forward'. "
            f"It says: {str(error).splitlines()[0]}"
        ) from error
    passed = iter(tensors)
    flat = [next(passed) if other is None else other[0] for other in beside["leaves"]]
    value, aux = tree_unflatten(flat, beside["spec"])
    return list(found), value, aux
