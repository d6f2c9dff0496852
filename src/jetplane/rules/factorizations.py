"""Factorizations of matrices: each by its own equations, solved by `jetplane.rules.implicit`.

Signs and phases of vectors stay as they are at the primal. Hermitian matrices, of which torch reads one triangle, are
differentiated as their Hermitian part, as reverse mode does. What does not exist is refused: a basis of a complement,
and vectors that belong to equal values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from ..jets import Space, innermost, plain, primal
from .implicit import chord
from .linalg import identity
from .registry import register


def _halved(x: Any) -> Any:
    """The lower triangle, with half of the diagonal."""
    return (x.tril() + x.tril(-1)) / 2


def _diagonal(x: Any) -> Any:
    return x.diagonal(dim1=-2, dim2=-1)


def _norms(x: Any) -> Any:
    """Squared norms of columns."""
    return (x.conj() * x).real.sum(-2) if x.is_complex() else (x * x).sum(-2)


def _projected(x: Any, y: Any) -> Any:
    """``diag(X^H Y)``."""
    return (x.conj() * y).sum(-2)


# --- triangles ------------------------------------------------------------------------------------------------


def _cholesky(space: Space, a: Any, lower: Tensor) -> Any:
    """``L L^H = A``: with ``N = L0^-1 (A - L L^H) L0^-H`` dL = L0 (N below its diagonal, half of it on it)."""
    a = (a + a.mH) / 2
    inverse = torch.linalg.solve_triangular(lower, identity(lower).expand(lower.shape), upper=False)

    def step(x: Any) -> tuple[Any]:
        return (x + lower @ _halved(inverse @ (a - x @ x.mH) @ inverse.mH),)

    return chord(space, (lower,), step)[0]


@register("linalg_cholesky_ex")
def _(space: Space, a: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    lower, info = torch.linalg.cholesky_ex(
        primal(a, space).mH if upper else primal(a, space), check_errors=check_errors
    )
    found = _cholesky(space, a.mH if upper else a, lower)
    return found.mH if upper else found, info


@register("cholesky")
def _(space: Space, a: Any, upper: bool = False) -> Any:
    return torch.linalg.cholesky(a, upper=upper)


def _lu(space: Space, a: Any, permutation: Tensor, lower: Tensor, upper: Tensor) -> tuple[Any, Any]:
    """``L U = P^T A``: with ``N = L0^-1 (P^T A - L U) U0^-1`` dL = L0 (N below its diagonal), dU = (the rest) U0."""
    a, k = permutation.mT @ a, lower.shape[-1]
    l0, u0 = lower[..., :k, :], upper[..., :k]
    of_l = torch.linalg.solve_triangular(l0, identity(l0).expand(l0.shape), upper=False, unitriangular=True)
    of_u = torch.linalg.solve_triangular(u0, identity(u0).expand(u0.shape), upper=True)
    square = a[..., :k, :k]

    def step(left: Any, right: Any) -> tuple[Any, Any]:
        n = of_l @ (square - left @ right) @ of_u
        return left + l0 @ n.tril(-1), right + n.triu() @ u0

    left, right = chord(space, (l0, u0), step)
    if lower.shape[-2] > k:
        below = torch.linalg.solve_triangular(right, a[..., k:, :], upper=True, left=False)
        left = torch.cat([left, below], -2)
    if upper.shape[-1] > k:
        beside = torch.linalg.solve_triangular(left, a[..., k:], upper=False, unitriangular=True)
        right = torch.cat([right, beside], -1)
    return left, right


@register("linalg_lu")
def _(space: Space, a: Any, *, pivot: bool = True) -> Any:
    permutation, lower, upper = torch.linalg.lu(primal(a, space), pivot=pivot)
    permutation = innermost(permutation)
    if not pivot:
        permutation = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
    return innermost(torch.linalg.lu(innermost(a), pivot=pivot)[0]), *_lu(space, a, permutation, lower, upper)


@register("linalg_lu_factor_ex")
def _(space: Space, a: Any, *, pivot: bool = True, check_errors: bool = False) -> Any:
    factors, pivots, info = torch.linalg.lu_factor_ex(primal(a, space), pivot=pivot, check_errors=check_errors)
    permutation, lower, upper = torch.lu_unpack(factors, pivots)
    left, right = _lu(space, a, innermost(permutation), lower, upper)
    k = lower.shape[-1]
    strict = left.tril(-1)
    if right.shape[-1] > k:
        strict = torch.nn.functional.pad(strict, (0, right.shape[-1] - k))
    if left.shape[-2] > k:
        right = torch.nn.functional.pad(right, (0, 0, 0, left.shape[-2] - k))
    return strict + right, pivots, info


@register("lu_unpack")
def _(space: Space, lu: Any, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True) -> Any:
    permutation, lower, upper = torch.lu_unpack(innermost(lu).detach(), pivots, unpack_data, unpack_pivots)
    if unpack_data:
        m, n = lu.shape[-2:]
        k = min(m, n)
        lower = lu[..., :k].tril(-1) + torch.eye(m, k, dtype=lu.dtype, device=lu.device)
        upper = lu[..., :k, :].triu()
    return permutation, lower, upper


@register("linalg_qr")
def _(space: Space, a: Any, mode: str = "reduced") -> Any:
    m, n = a.shape[-2:]
    if mode == "complete" and m > n:
        raise DerivativeError(
            f"linalg.qr with mode='complete' of a matrix {m} × {n}: the {m - n} columns beyond the matrix's own are "
            "any basis of their complement and have no derivative. Use mode='reduced'"
        )
    k = min(m, n)
    q, r = _qr(space, a[..., :k])
    if n > k:
        r = torch.cat([r, q.mH @ a[..., k:]], -1)
    return (torch.linalg.qr(innermost(a).detach(), "r")[0] if mode == "r" else q), r


def _qr(space: Space, a: Any) -> tuple[Any, Any]:
    """``Q R = A, Q^H Q = I`` for m × n matrices with m >= n.

    With ``E = A - Q R`` and ``M = Q0^H E R0^-1 = W + T``, where ``W = Q0^H dQ``, ``W + W^H = I - Q^H Q`` and
    ``T = dR R0^-1`` is upper triangular with a real diagonal, the lower triangle of M is that of W.
    """
    q0, r0 = torch.linalg.qr(primal(a, space))
    inverse = torch.linalg.solve_triangular(r0, identity(r0).expand(r0.shape), upper=True)
    eye = identity(r0)

    def step(q: Any, r: Any) -> tuple[Any, Any]:
        e = (a - q @ r) @ inverse
        m, f = q0.mH @ e, eye - q.mH @ q
        low = m.tril(-1)
        w = low - low.mH + f.triu() - torch.diag_embed(_diagonal(f)) / 2
        if m.is_complex():
            w = w + torch.diag_embed(1j * _diagonal(m).imag)
        return q + e + q0 @ (w - m), r + (m - w).triu() @ r0

    q, r = chord(space, (q0, r0), step)
    return q, r


# --- spectra --------------------------------------------------------------------------------------------------


class _Gaps:
    """The gaps ``v_j - v_i`` of values.

    Raises:
        DerivativeError: derivatives are ``wanted`` that divide by a gap which is rounding, or by a value that is, where
            they are to be ``positive``.
    """

    def __init__(self, values: Any, what: str, wanted: bool, positive: bool = False) -> None:
        self._diagonal = identity(values.unsqueeze(-2))
        self._gaps = values.unsqueeze(-2) - values.unsqueeze(-1) + self._diagonal
        known = innermost(values).detach()
        if not wanted or not plain(known) or not known.numel() or torch.compiler.is_compiling():
            return
        largest = torch.finfo(known.dtype).max / 4
        distances = (innermost(self._gaps).detach().abs() + self._diagonal.abs() * largest).amin((-2, -1))
        if positive:
            distances = torch.minimum(distances, known.abs().amin(-1))
        least = known.shape[-1] * torch.finfo(known.dtype).eps * known.abs().amax(-1)
        if bool((distances <= least).any()):
            raise DerivativeError(
                f"{what} of a matrix with values that are equal up to rounding{', or zero' if positive else ''}: "
                "derivatives of vectors, and second ones of values, do not exist there. Write the loss in functions of "
                "the matrix that single out no value (a trace, a power, matrix_exp), or separate the values"
            )

    def divide(self, x: Any) -> Any:
        """``x_ij / (v_j - v_i)``, and zero on the diagonal."""
        return (x * (1 - self._diagonal)) / self._gaps


def _unread(p: Tensor, uplo: str) -> Tensor:
    """What a matrix, as it is read, differs by from its Hermitian part: zero, unless one triangle alone is right."""
    read = p.triu(1).mH + p.triu() if uplo.upper() == "U" else p.tril(-1).mH + p.tril()
    if read.is_complex():  # the diagonal is read as real
        read = read - torch.diag_embed(1j * _diagonal(read).imag)
    return read - (p + p.mH) / 2


@register("_linalg_eigh")
def _(space: Space, a: Any, uplo: str = "L", compute_v: bool = True) -> Any:
    """``A V = V diag(l)`` with columns of norm one.

    With ``X = V0^H (A V - V diag(l))`` l moves by the diagonal of X, and V by ``V0 C``, ``C_ij = X_ij / (l_j - l_i)``.
    """
    l0, v0 = torch.linalg.eigh(primal(a, space), uplo)
    a = (a + a.mH) / 2 + _unread(innermost(a).detach(), uplo)
    gaps = _Gaps(l0, "linalg.eigh", compute_v or space.order == 2)

    def step(values: Any, v: Any) -> tuple[Any, Any]:
        x = v0.mH @ (a @ v - v * values.unsqueeze(-2))
        moved = _diagonal(x)
        c = gaps.divide(x) - torch.diag_embed(_norms(v) - 1) / 2
        return values + (moved.real if moved.is_complex() else moved), v + v0 @ c

    values, v = chord(space, (l0, v0), step)
    return values, v if compute_v else l0.new_empty(0)


@register("linalg_eigvalsh")
def _(space: Space, a: Any, uplo: str = "L") -> Any:
    return torch.ops.aten._linalg_eigh(a, uplo, False)[0]


@register("linalg_eig")
def _(space: Space, a: Any) -> Any:
    """As for Hermitian matrices, with ``X = V0^-1 (A V - V diag(l))``; columns keep norm one, and turn by no phase."""
    l0, v0 = torch.linalg.eig(primal(a, space))
    inverse, gram = torch.linalg.inv(v0), v0.mH @ v0
    gaps = _Gaps(l0, "linalg.eig", True)
    a = a.to(l0.dtype)

    def step(values: Any, v: Any) -> tuple[Any, Any]:
        x = inverse @ (a @ v - v * values.unsqueeze(-2))
        c = gaps.divide(x)
        along = _diagonal(gram @ c).real + (_norms(v) - 1) / 2
        return values + _diagonal(x), v + v0 @ (c - torch.diag_embed(along))

    return chord(space, (l0, v0), step)


@register("_linalg_svd")
def _(space: Space, a: Any, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None) -> Any:
    """``A V = U diag(s)``, ``A^H U = V diag(s)`` with columns of norm one.

    With ``R = A V - U diag(s)``, ``T = A^H U - V diag(s)``, ``X = U0^H R`` and ``Y = V0^H T``, s moves by the real
    diagonal of (X + Y) / 2, and

        U by U0 P + (I - U0 U0^H) R / s,   P_ij = (s_i Y_ij + s_j X_ij) / (s_j² - s_i²)
        V by V0 Q + (I - V0 V0^H) T / s,   Q_ij = (s_i X_ij + s_j Y_ij) / (s_j² - s_i²)
    """
    m, n = a.shape[-2:]
    if compute_uv and full_matrices and m != n:
        raise DerivativeError(
            f"linalg.svd with full_matrices=True of a matrix {m} × {n}: the {abs(m - n)} vectors beyond the singular "
            "values are any basis of their complement and have no derivative. Use full_matrices=False"
        )
    u0, s0, vh0 = torch.linalg.svd(primal(a, space), full_matrices=False, driver=driver)
    v0 = vh0.mH
    gaps = _Gaps(s0 * s0, "linalg.svd", compute_uv or space.order == 2, m != n)
    rows, columns = s0.unsqueeze(-1), s0.unsqueeze(-2)

    def step(u: Any, s: Any, v: Any) -> tuple[Any, Any, Any]:
        r, t = a @ v - u * s.unsqueeze(-2), a.mH @ u - v * s.unsqueeze(-2)
        x, y = u0.mH @ r, v0.mH @ t
        p, q = gaps.divide(rows * y + columns * x), gaps.divide(rows * x + columns * y)
        of_u, of_v = (1 - _norms(u)) / 2, (1 - _norms(v)) / 2
        moved = _diagonal(x + y) / 2
        if a.is_complex():
            turn = 1j * _diagonal(x).imag / (2 * s0)
            of_u, of_v, moved = of_u + turn, of_v - turn, moved.real
        p, q = p + torch.diag_embed(of_u), q + torch.diag_embed(of_v)
        du = u0 @ p if m <= n else u0 @ p + (r - u0 @ x) / columns
        dv = v0 @ q if n <= m else v0 @ q + (t - v0 @ y) / columns
        return u + du, s + moved, v + dv

    u, s, v = chord(space, (u0, s0, v0), step)
    if compute_uv:
        return u, s, v.mH
    return s0.new_empty(0), s, s0.new_empty(0)


@register("linalg_svdvals")
def _(space: Space, a: Any, *, driver: str | None = None) -> Any:
    return torch.ops.aten._linalg_svd(a, False, False, driver=driver)[1]
