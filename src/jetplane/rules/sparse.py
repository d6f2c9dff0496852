"""Sparse matrices as constants beside dense jets: linear in the dense argument.

All coefficients of a jet lie side by side as columns of one matrix, so they cost one product, and a sparse matrix is
read once. Sparse tensors whose values carry derivatives are refused: their jets would need coefficients of the
pattern's own layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from ..jets import Jet, Space, add_jets, is_jet, linear, primal
from .grad_mode import autograd

LAYOUTS = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
CARRIED = "@, mm, mv, bmm, addmm, addmv, linear, torch.sparse.mm, torch.sparse.addmm and sums with dense tensors"
# Of normal tensors, torch makes no views of a sparse layout in inference mode, nor products that need one.
VIEWS = {
    torch.t, torch.transpose, torch.adjoint, torch.matmul, torch.mm,
    Tensor.t, Tensor.transpose, Tensor.adjoint, Tensor.permute, Tensor.select, Tensor.__getitem__,
    Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__,
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
}  # fmt: skip
# Names of operators that make sparse tensors out of dense ones.
MAKERS = ("sparse_coo_tensor", "sparse_compressed_tensor", "sparse_cs", "sparse_bs", "to_sparse", "sparse_mask")


def is_sparse(x: Any) -> bool:
    """Whether x is a tensor of one of torch's sparse layouts."""
    return isinstance(x, Tensor) and x.layout in LAYOUTS


def constant(func: Any, args: Sequence[Any]) -> bool:
    """Whether a torch function makes a view, or takes a product, of constant sparse tensors: see `VIEWS`."""
    return func in VIEWS and any(map(is_sparse, args)) and not any(isinstance(a, Jet) for a in args)


def concerns(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator takes or makes sparse tensors."""
    return any(map(is_sparse, args)) or _makes_sparse(func)


@functools.cache
def _makes_sparse(func: Any) -> bool:
    packet = func._schema.name.partition("::")[2]
    return any(name in packet for name in MAKERS)


def carry(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operator that takes or makes sparse tensors, with jets among its dense arguments.

    Raises:
        DerivativeError: the result would be sparse, with values that carry derivatives, or the operator is not linear.
    """
    rule = None if _makes_sparse(func) else RULES.get(func._schema.name.partition("::")[2])
    result = NotImplemented if rule is None else rule(space, *args, **kwargs)
    if result is NotImplemented:
        layouts = [str(a.layout) for a in args if is_sparse(a)]
        what = f"takes a tensor of layout {layouts[0]}" if layouts else "makes a sparse tensor"
        raise DerivativeError(
            f"{func} {what} where values depend on the parameters; sparse matrices are supported as constants, in "
            f"{CARRIED}. Where values of the matrix itself depend on parameters, write the product by its indices, "
            "torch.zeros(rows, n).index_add(0, row, values[:, None] * x[column]), or use a dense matrix"
        )
    return result


# --- products ------------------------------------------------------------------------------------------------


def _like(s: Tensor, c: Tensor) -> Tensor:
    """A sparse matrix in the dtype of coefficients, which is single precision beside half."""
    return s if s.dtype == c.dtype else s.to(c.dtype)


def _times(space: Space, s: Tensor, x: Any, product: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """``s @ x`` for a dense matrix, vector or batch x."""
    product = product or (torch.bmm if s.dim() == 3 else torch.matmul)  # matmul would expand s, which torch does not

    def on_stack(c: Tensor) -> Tensor:
        columns = c.unsqueeze(-1) if x.dim() == 1 else c
        y = product(_like(s, c), columns.movedim(0, -2).flatten(-2))
        y = y.unflatten(-1, (c.shape[0], columns.shape[-1])).movedim(-2, 0)
        return y.squeeze(-1) if x.dim() == 1 else y

    return linear(space, x, lambda p: product(s, p), on_stack)


def _timed(space: Space, x: Any, s: Tensor) -> Tensor:
    """``x @ s`` for a dense matrix or vector x."""

    def product(rows: Tensor) -> Tensor:
        if s.layout is not torch.sparse_coo:
            return rows @ _like(s, rows)
        with autograd(), torch.no_grad():  # see VIEWS
            transposed = _like(s, rows).t()
        return (transposed @ rows.mT).mT

    def on_stack(c: Tensor) -> Tensor:
        return product(c.flatten(0, -2)).unflatten(0, c.shape[:-1])

    return linear(space, x, lambda p: product(p.reshape(-1, p.shape[-1])).reshape(*p.shape[:-1], s.shape[1]), on_stack)


def _product(space: Space, a: Any, b: Any) -> Any:
    if is_sparse(a) and is_jet(b, space) and b.dim() <= a.dim():
        return _times(space, a, b)
    if is_sparse(b) and is_jet(a, space) and b.dim() == 2:
        return _timed(space, a, b)
    return NotImplemented


def _reduced(space: Space, a: Any, b: Any, reduce: str = "sum") -> Any:
    """``torch.sparse.mm``, whose mean is that of the entries that are there."""
    if reduce == "sum" or not is_sparse(a):
        return _product(space, a, b) if reduce == "sum" else NotImplemented
    if reduce != "mean":
        return NotImplemented
    return _times(space, a, b, functools.partial(torch.sparse.mm, reduce=reduce))


def _added(space: Space, x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """``beta x + alpha a @ b``."""
    if not (is_jet(a, space) or is_jet(b, space)):  # the product is constant
        product: Any = torch.mm(a, b) if b.dim() == 2 else torch.mv(a, b)
    else:
        product = _product(space, a, b)
    if product is NotImplemented or is_sparse(x):
        return NotImplemented
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else torch.add(product, x if beta == 1 else beta * x)


def _linear(space: Space, x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``, which torch computes with the sparse matrix at the left."""
    if not is_sparse(weight):
        return NotImplemented
    y = x
    if is_jet(x, space):
        flat = x.reshape(-1, x.shape[-1]).t()
        y = _times(space, weight, flat).t().reshape(*x.shape[:-1], weight.shape[0])
    else:
        y = torch.nn.functional.linear(x, weight)
    return y if bias is None else torch.add(y, bias)


def _sum(space: Space, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    """A dense tensor plus a constant sparse one, which is dense."""
    if not is_sparse(a) and not is_sparse(b):
        return NotImplemented
    y = torch.add(*(primal(x, space) for x in (a, b)), alpha=alpha)
    return add_jets(space, a, b, y, alpha)


RULES = {
    "matmul": _product,
    "mm": _product,
    "mv": _product,
    "bmm": _product,
    "_sparse_mm": _reduced,
    "addmm": _added,
    "addmv": _added,
    "_sparse_addmm": _added,
    "linear": _linear,
    "add": _sum,
}
