"""Derivatives of functions of tensors, in the manner of ``torch.func``, by forward jets alone.

All of them nest: a function may itself call them, and they may be called inside a closure that is
being evaluated on a plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_map
from ..errors import ArgumentError, DTypeError, ShapeError
from ..evaluation.context import expansion
from ..evaluation.interception import Interception
from ..evaluation.specification import Pairs, PlaneSpec
from ..jets import Jet, PairStructure, Space, Star, Sums, parts, precise, promoted

Primals = Tensor | Sequence[Tensor]


def jet(
    f: Callable[..., Any], primals: Primals, tangents: Primals, pairs: Pairs = "all", order: int = 2
) -> tuple[Any, Any, Any]:
    """Value, first and second directional derivatives of ``f`` along K directions.

        first[i]     = d/da_i       f(x + sum a v)
        second[i, j] = d²/da_i da_j f(x + sum a v),   at a = 0

    Args:
        f: a function of tensors that returns a tensor, or a tuple, list or dict of tensors.
        primals: where; a tensor or a sequence of tensors, one for each argument.
        tangents: K directions, each tensor of shape (K, *primal.shape).
        pairs: "all", "diagonal", or the size of independent planes, as in `jetplane.evaluate`.
        order: 1 leaves the second derivatives out (None).

    Returns:
        ``(value, first, second)`` of the structure of f's result, with shapes S, (K, *S) and
        (K, K, *S); (K, *S) for the diagonal, (K/b, b, b, *S) for planes of b directions.

    Raises:
        ShapeError, DTypeError, ArgumentError: tangents that do not match the primals.
        DerivativeError: f leaves torch, or holds an operator that cannot be carried.

    >>> import torch, jetplane as jp
    >>> x = torch.tensor([1.0, 2.0])
    >>> value, first, second = jp.jet(lambda x: x.prod(), x, torch.eye(2))
    >>> value, first, second
    (tensor(2.), tensor([2., 1.]), tensor([[0., 1.],
            [1., 0.]]))

    Source: Cobb et al., arXiv 2408.10419, section 2 (hyper-dual numbers), for K directions at once.
    """
    xs, vs, k = _checked(primals, tangents)
    if order not in (1, 2):
        raise ArgumentError(f"order must be 1 or 2, got {order!r}")
    return _along(f, xs, vs, PlaneSpec(k, pairs=pairs).structure, order)


def _along(
    f: Callable[..., Any], xs: Sequence[Tensor], vs: Sequence[Tensor], structure: PairStructure, order: int = 2
) -> tuple[Any, Any, Any]:
    """Value, first and second coefficients of f along K directions, for a structure of pairs."""
    with torch.inference_mode(), expansion(structure, order) as space:
        result = _call(f, xs, vs, space)
        value, first, second = (tree_map(lambda y, n=n: _part(y, space, n), result) for n in range(3))
    if space.level > 1:
        return value, first, second
    return _released(value), _released(first), _released(second)


def _call(f: Callable[..., Any], xs: Sequence[Tensor], vs: Sequence[Tensor], space: Space) -> Any:
    with Interception(space).running():
        return f(
            *[
                Jet(x if isinstance(x, Jet) else x.detach(), precise(v), None, space)
                for x, v in zip(xs, vs, strict=True)
            ]
        )


def _part(y: Any, space: Space, n: int) -> Any:
    """Value, first or second derivatives of one result, zeros where there is no dependence."""
    if not isinstance(y, Tensor):
        return y if n == 0 else None
    jet = promoted(y)
    p, *coefficients = parts(y if jet is None else jet, space)
    if n == 0:
        return p
    if n == 2 and space.order == 1:
        return None
    found = coefficients[n - 1].full(p.shape, p.dtype, p.device)
    return found if n == 1 else space.structure.matrix(found)


def _released(tree: Any) -> Any:
    """Ordinary tensors instead of inference tensors and views of internals."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree)


def _checked(primals: Primals, tangents: Primals) -> tuple[list[Tensor], list[Tensor], int]:
    xs = [primals] if isinstance(primals, Tensor) else list(primals)
    vs = [tangents] if isinstance(tangents, Tensor) else list(tangents)
    if not xs or len(xs) != len(vs):
        raise ShapeError(f"expected tangents for each of {len(xs)} primals, got {len(vs)}")
    k = vs[0].shape[0] if vs[0].dim() else 0
    if k < 1:
        raise ArgumentError("k must be at least 1: tangents are of shape (k, *primal.shape)")
    for i, (x, v) in enumerate(zip(xs, vs, strict=True)):
        if not (x.dtype.is_floating_point or x.dtype.is_complex):
            raise DTypeError(f"primal {i}: expected a floating dtype, got {x.dtype}")
        if tuple(v.shape) != (k, *x.shape):
            raise ShapeError(f"tangents {i}: expected shape {(k, *x.shape)}, got {tuple(v.shape)}")
        if v.dtype != x.dtype:
            raise DTypeError(f"tangents {i}: expected {x.dtype} as its primal, got {v.dtype}")
    return xs, vs, k


def quadratic_form(f: Callable[..., Any], primals: Primals, tangents: Primals, pairs: Pairs = "all") -> Any:
    """``v_i^T Hess(f) v_j`` for all pairs, (K, K, *S), or for the diagonal, (K, *S).

    See `jet` for arguments and errors.

    >>> import torch, jetplane as jp
    >>> jp.quadratic_form(lambda x: (x**2).sum(), torch.zeros(3), torch.eye(3), pairs="diagonal")
    tensor([2., 2., 2.])
    """
    return jet(f, primals, tangents, pairs)[2]


def _basis(xs: Sequence[Tensor]) -> list[Tensor]:
    """All coordinate directions of the primals together, one stack for each."""
    total, start, out = sum(x.numel() for x in xs), 0, []
    for x in xs:
        rows = torch.zeros(total, x.numel(), dtype=x.dtype, device=x.device)
        rows[start : start + x.numel()] = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        out.append(rows.reshape(total, *x.shape))
        start += x.numel()
    return out


def _as_list(primals: Primals) -> list[Tensor]:
    return [primals] if isinstance(primals, Tensor) else list(primals)


def hessian(f: Callable[..., Any], primals: Primals) -> Any:
    """The Hessian of ``f``, exactly and forward only: D = total size of the primals directions at once.

    Returns:
        For one primal of shape X and a result of shape S: shape (*S, *X, *X), as `torch.func.hessian`.
        For several primals: a nested tuple of blocks ``h[a][b]`` of shape (*S, *X_a, *X_b).

    Raises:
        As `jet`.

    >>> import torch, jetplane as jp
    >>> jp.hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 2.0]))
    tensor([[4., 2.],
            [2., 0.]])
    """
    xs = _as_list(primals)
    second = jet(f, xs, _basis(xs))[2]
    sizes = [x.numel() for x in xs]

    def blocks(h: Tensor) -> Any:
        h = h.movedim((0, 1), (-2, -1))
        lead = h.shape[:-2]
        rows = [
            tuple(part.reshape(*lead, *x.shape, *y.shape) for part, y in zip(row.split(sizes, -1), xs, strict=True))
            for row, x in zip(h.split(sizes, -2), xs, strict=True)
        ]
        return rows[0][0] if isinstance(primals, Tensor) else tuple(rows)

    return tree_map(blocks, second)


def laplacian(f: Callable[..., Any], primals: Primals) -> Any:
    """``sum_d d²f/dx_d²`` over all coordinates of the primals, of the shape of f's result.

    The D second coefficients are carried as their sum: 1 + D + 1 channels in all.

    Raises:
        As `jet`.

    >>> import torch, jetplane as jp
    >>> jp.laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    tensor(18.)
    """
    xs = _as_list(primals)
    xs, vs, k = _checked(xs, _basis(xs))
    return tree_map(lambda h: h.squeeze(0), _along(f, xs, vs, Sums.trace(k))[2])


def hvp(f: Callable[..., Tensor], primals: Primals, v: Primals) -> Any:
    """The Hessian-vector product ``Hess(f) v`` of a scalar function, forward only.

    Each component is ``e_d^T Hess(f) v``: D + 1 first coefficients and the D second ones of pairs with v.

    Returns:
        A tensor of the primal's shape, or a tuple of them.

    Raises:
        As `jet`.

    >>> import torch, jetplane as jp
    >>> jp.hvp(lambda x: x.prod(), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0]))
    tensor([0., 3., 2.])
    """
    xs, vs = _as_list(primals), _as_list(v)
    for i, (x, t) in enumerate(zip(xs, vs, strict=True)):
        if x.shape != t.shape:
            raise ShapeError(f"vector {i}: expected shape {tuple(x.shape)}, got {tuple(t.shape)}")
    together = [torch.cat([e, t.unsqueeze(0)]) for e, t in zip(_basis(xs), vs, strict=True)]
    xs, together, k = _checked(xs, together)
    column = _along(f, xs, together, Star(k))[2]
    sizes = [x.numel() for x in xs]
    out = tuple(c.reshape(x.shape) for c, x in zip(column.split(sizes), xs, strict=True))
    return out[0] if isinstance(primals, Tensor) else out
