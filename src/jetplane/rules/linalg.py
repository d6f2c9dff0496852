"""Inverses, determinants, solutions of linear systems, and functions of matrices.

With A0 the primal and B0 its inverse, ``E = A B0 - I`` is a jet whose primal is zero. Power series in E therefore end
with the term of second order:

    A^-1          = B0 (I - E + E E)
    log det A     = log det A0 + tr E - tr(E E) / 2
    det A         = det A0 (1 + tr E + ((tr E)² - tr(E E)) / 2)

Linear systems are solved by `jetplane.rules.implicit`. The primal may be a jet of an outer evaluation, whose own rule
then takes its turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from ..jets import Coefficients, Space, innermost, is_jet, linear, make, outer, parts, plain, primal
from .forms import BATCHED
from .implicit import chord
from .registry import aten, register

DEGREE = 18  # of the Taylor polynomial of exp, in matrices of norm one: its second derivative errs by 1/17!
GROUP = 4  # powers of a matrix that are formed: Paterson and Stockmeyer, SIAM J. Comput. 2 (1973)


def identity(a: Any) -> Tensor:
    """The identity of the size of square matrices."""
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def trace(x: Any) -> Any:
    """The sum along the diagonal of the last two axes."""
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


@register("linalg_inv_ex")
def _(space: Space, a: Any, *, check_errors: bool = False) -> Any:
    inverse, info = torch.linalg.inv_ex(primal(a, space), check_errors=check_errors)
    e = a @ inverse - identity(a)
    return inverse - inverse @ (e - e @ e), info


# --- determinants ---------------------------------------------------------------------------------------------


def _traces(space: Space, a: Any, inverse: Tensor) -> Any:
    """``tr E - tr(E E) / 2``, a jet whose primal is zero: ``tr(B0 A_i)`` and ``tr(B0 A_ij) - tr(B0 A_i B0 A_j)``."""
    _, a1, a2 = parts(a, space)
    m = a1.map(lambda c: BATCHED.chosen(inverse, c).right(space, inverse, c), True)
    second = a2.map(lambda c: (c * inverse.mT).sum((-2, -1)), True)
    products = outer(m, m.map(lambda c: c.mT)).map(lambda c: c.sum((-2, -1)), True)
    return make(inverse.new_zeros(inverse.shape[:-2]), m.map(trace, True), second - products, space)


def _factors(p: Tensor) -> tuple[Tensor, Tensor]:
    """What torch keeps of a determinant for its backward pass."""
    return torch.linalg.lu_factor_ex(innermost(p).detach())[:2]


@register("_linalg_slogdet")
def _(space: Space, a: Any) -> Any:
    p = primal(a, space)
    sign, logabsdet, *factors = aten._linalg_slogdet(p)
    change = _traces(space, a, torch.linalg.inv_ex(p)[0])
    if p.is_complex():
        sign, change = sign * torch.exp(1j * change.imag), change.real
    return sign, logabsdet + change, *factors


@register("_linalg_det")
def _(space: Space, a: Any) -> Any:
    p = primal(a, space)
    if torch.compiler.is_compiling():  # which knows no values to choose by
        return _in_singular_bases(a), *_factors(p)
    inverse, _ = torch.linalg.inv_ex(p)
    if _well_conditioned(space, innermost(p), innermost(inverse)):
        change = _traces(space, a, inverse)
        return torch.linalg.det(p) * (1 + change + change * change / 2), *_factors(p)
    if not innermost(p).isfinite().all():
        return NotImplemented
    return _in_singular_bases(a), *_factors(p)


def _well_conditioned(space: Space, p: Tensor, inverse: Tensor) -> bool:
    """Whether products of the inverse, of as many factors as there are derivatives, cancel to enough digits.

    Those of n factors err by ``eps cond^(n - 1)``. An evaluation around takes two derivatives more, a graph one.
    """
    norms = p.detach().abs().sum(-1).amax(-1) * inverse.detach().abs().sum(-1).amax(-1) if p.numel() else p
    factors = 2 * space.level + (space.recorded and p.requires_grad)
    return bool((norms.real < torch.finfo(p.dtype).eps ** (-1 / factors)).all())


def _in_singular_bases(a: Any) -> Any:
    """The determinant in the bases U and V of singular vectors, constants that make the primal of ``U^H A V`` diagonal.

    Elimination divides by the large singular values alone, and its multipliers have the primal zero. What is left is a
    small block, whose determinant is formed as a polynomial. Each step is exact, whatever is differentiated how often.
    A compiler eliminates all but two, so that a matrix with three that vanish gives NaN there.
    """
    p = innermost(a).detach()
    u, s, vh = torch.linalg.svd(p)
    m, eps = (u.mH @ a @ vh.mH).reshape(-1, *p.shape[-2:]), torch.finfo(s.dtype).eps
    if torch.compiler.is_compiling():
        rank = max(p.shape[-1] - 2, 0)
        known = (s[..., :rank] > s[..., :1] * eps * p.shape[-1]).all(-1).flatten()
        found = _eliminated(m, rank) * torch.where(known, 1.0, torch.nan)
    else:
        ranks = (s > s[..., :1] * eps**0.25).sum(-1).flatten()
        found = torch.cat([_eliminated(m[ranks == rank], rank) for rank in ranks.unique().tolist()])
        found = found[ranks.argsort(stable=True).argsort()]
    return torch.linalg.det(u) * torch.linalg.det(vh) * found.reshape(s.shape[:-1])


def _eliminated(m: Any, rank: int) -> Any:
    """The determinants of matrices (B, n, n) by elimination with the pivots that lie on the diagonal."""
    value: Any = 1
    for _ in range(rank):
        pivot = m[:, :1, :1]
        value = value * pivot[:, 0, 0]
        m = m[:, 1:, 1:] - m[:, 1:, :1] * (m[:, :1, 1:] / pivot)
    total: Any = identity(m).expand(m.shape)
    coefficient: Any = None
    for k in range(1, m.shape[-1] + 1):  # Faddeev and LeVerrier: divides by whole numbers alone
        product = m @ total
        coefficient = -trace(product) / k
        total = product + coefficient[:, None, None] * identity(m)
    return value if coefficient is None else value * coefficient * (-1) ** m.shape[-1]


# --- linear systems -------------------------------------------------------------------------------------------


def _system(space: Space, a: Any, b: Any, solve: Callable[[Any, Any], Any], matrix: Callable[[Any], Any]) -> Any:
    """X of ``A X = B``: with one factorization of the primal, by ``X + A0^-1 (B - A X)``.

    Args:
        space: of the evaluation.
        a: square matrices.
        b: right sides, matrices of the same batch.
        solve: solves one system, of plain tensors or jets of outer evaluations.
        matrix: the part of a that is read.
    """
    if not is_jet(a, space):

        def on_stack(c: Tensor) -> Tensor:  # all right sides as columns of one system
            columns = c.movedim(0, -2)
            return solve(a, columns.flatten(-2)).unflatten(-1, columns.shape[-2:]).movedim(-2, 0)

        return linear(space, b, lambda p: solve(a, p), on_stack)
    p = primal(a, space)
    moving = matrix(a)
    (x,) = chord(space, (solve(p, primal(b, space)),), lambda x: (x + solve(p, b - moving @ x),))
    return x


def _of_one_batch(a: Any, b: Any) -> tuple[Any, Any]:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


@register("_linalg_solve_ex")
def _(space: Space, a: Any, b: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    if b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1]):
        found = torch.ops.aten._linalg_solve_ex(a, b.unsqueeze(-1), left=left, check_errors=check_errors)
        return found[0].squeeze(-1), *found[1:]
    p = primal(a, space)
    factors, pivots, info = torch.linalg.lu_factor_ex(innermost(p).detach(), check_errors=check_errors)
    a, b = _of_one_batch(a if left else a.mT, b if left else b.mT)
    if plain(p):
        of_p = torch.linalg.lu_factor_ex(primal(a, space))[:2]

    def solve(m: Any, r: Any) -> Any:
        return torch.linalg.lu_solve(*of_p, r) if plain(m) and not m.requires_grad else torch.linalg.solve_ex(m, r)[0]

    x = _system(space, a, b, solve, lambda a: a)
    return x if left else x.mT, factors, pivots, info


@register("linalg_solve_triangular")
def _(space: Space, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    if not left:
        x = torch.linalg.solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular)
        return x.mT

    def matrix(a: Any) -> Any:
        inside = 1 if unitriangular else 0
        part = a.triu(inside) if upper else a.tril(-inside)
        return part + identity(a) if unitriangular else part

    a, b = _of_one_batch(a, b)
    return _system(
        space,
        a,
        b,
        lambda m, r: torch.linalg.solve_triangular(m, r, upper=upper, unitriangular=unitriangular),
        matrix,
    )


@register("triangular_solve")
def _(space: Space, b: Any, a: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False) -> Any:
    if transpose:
        x = torch.linalg.solve_triangular(a.mT, b, upper=not upper, unitriangular=unitriangular)
    else:
        x = torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unitriangular)
    return x, a.clone()


@register("linalg_lu_solve")
def _(space: Space, lu: Any, pivots: Tensor, b: Any, *, left: bool = True, adjoint: bool = False) -> Any:
    if not left:
        return torch.linalg.lu_solve(lu, pivots, b.mH, adjoint=not adjoint).mH
    permutation, lower, upper = torch.lu_unpack(lu, pivots)
    solve = torch.linalg.solve_triangular
    if adjoint:
        return permutation @ solve(lower.mH, solve(upper.mH, b, upper=False), upper=True, unitriangular=True)
    return solve(upper, solve(lower, permutation.mT @ b, upper=False, unitriangular=True), upper=True)


@register("cholesky_solve")
def _(space: Space, b: Any, factor: Any, upper: bool = False) -> Any:
    lower = factor.mH if upper else factor
    solve = torch.linalg.solve_triangular
    return solve(lower.mH, solve(lower, b, upper=False), upper=True)


@register("cholesky_inverse")
def _(space: Space, factor: Any, upper: bool = False) -> Any:
    return torch.cholesky_solve(identity(factor).expand(factor.shape), factor, upper)


@register("linalg_pinv.atol_rtol_tensor")
def _(space: Space, a: Any, *, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> Any:
    """``A^+``, for matrices that keep their rank.

    ``X = A^H Y A^H`` with ``Y = A0^+H A0^+ A0^+H`` has the rows and columns of the result and its primal; a step of
    third order, ``X (I + E + E E)`` with ``E = I - A X``, is exact then. (Ben-Israel, Math. Comp. 19, 1965.)
    """
    atol, rtol = (innermost(t) for t in (atol, rtol))
    inverse = torch.linalg.pinv(primal(a, space), atol=atol, rtol=rtol, hermitian=hermitian)
    if not innermost(inverse).any():  # nothing is above the tolerance
        return inverse
    _check_rank(parts(a, space)[1], innermost(primal(a, space)).detach(), innermost(inverse).detach())
    x = a.mH @ (inverse.mH @ inverse @ inverse.mH) @ a.mH
    e = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device) - a @ x
    x = x + x @ (e + e @ e)
    return make(inverse, *parts(x, space)[1:], space)


def _check_rank(a1: Coefficients, p: Tensor, inverse: Tensor) -> None:
    left = torch.eye(p.shape[-2], dtype=p.dtype, device=p.device) - p @ inverse
    right = identity(p) - inverse @ p
    tolerance = torch.finfo(p.dtype).eps ** 0.5

    def leaves(c: Tensor) -> bool:
        return bool((left @ c @ right).abs().amax() > tolerance * c.abs().amax())

    if p.numel() and (leaves(p) or (a1 and leaves(innermost(a1.tensor).detach()))):
        raise DerivativeError(
            "linalg.pinv of a matrix whose rank changes along a direction, or with singular values that are cut off: "
            "it is not continuous there, or its derivatives are not those of the pseudoinverse. Use a ridge, "
            "torch.linalg.solve(A.mT @ A + c * I, A.mT), or a factor of full rank"
        )


@register("linalg_lstsq")
def _(space: Space, a: Any, b: Any, rcond: float | None = None, *, driver: str | None = None) -> Any:
    found = torch.linalg.lstsq(innermost(a).detach(), innermost(b).detach(), rcond, driver=driver)
    vector = b.dim() == a.dim() - 1 and b.shape == a.shape[:-1]
    right = b.unsqueeze(-1) if vector else b
    x = torch.linalg.pinv(a, rtol=rcond) @ right
    residuals = found.residuals
    if residuals.numel():
        residuals = (a @ x - right).abs().square().sum(-2)
    return x.squeeze(-1) if vector else x, residuals, found.rank, found.singular_values


# --- functions ------------------------------------------------------------------------------------------------


@register("linalg_matrix_exp")
def _(space: Space, a: Any) -> Any:
    """Scaling and squaring: ``exp(A) = exp(A / 2^s)^(2^s)``, by a polynomial of matrices of norm one at most."""
    norms = innermost(a).detach().abs().sum(-2).amax(-1) if a.numel() else torch.zeros(())
    squarings = torch.frexp(norms.nan_to_num(0, 0).double()).exponent.clamp(min=0)
    x = a * torch.ldexp(torch.ones_like(norms), -squarings)[..., None, None]
    powers = [identity(a).expand(a.shape), x]
    while len(powers) <= GROUP:
        powers.append(powers[-1] @ x)
    factorial, coefficients = 1.0, [1.0]
    for n in range(1, DEGREE + 1):
        factorial *= n
        coefficients.append(1 / factorial)
    groups = [coefficients[n : n + GROUP] for n in range(0, DEGREE + 1, GROUP)]
    total: Any = None
    for group in reversed(groups):
        part = sum((c * power for c, power in zip(group[1:], powers[1:], strict=False)), group[0] * powers[0])
        total = part if total is None else total @ powers[GROUP] + part
    for n in range(int(squarings.max()) if squarings.numel() else 0):
        more = squarings > n
        squared = total @ total
        total = squared if more.all() else torch.where(more[..., None, None], squared, total)
    return total


def _reflections(a: Any, tau: Any) -> tuple[Any, Any]:
    """V and T with ``H_1 ... H_k = I - V T V^H``: the compact form of Schreiber and Van Loan (1989).

    ``T^-1 = diag(1 / tau) + strict upper part of V^H V``.
    """
    k = tau.shape[-1]
    v = a[..., :k].tril(-1) + torch.eye(a.shape[-2], k, dtype=a.dtype, device=a.device)
    inner = tau.unsqueeze(-1) * (v.mH @ v).triu(1) + identity(v)
    t = torch.linalg.solve_triangular(inner, torch.diag_embed(tau), upper=True, unitriangular=True)
    return v, t


@register("linalg_householder_product")
def _(space: Space, a: Any, tau: Any) -> Any:
    v, t = _reflections(a, tau)
    n = a.shape[-1]
    return torch.eye(a.shape[-2], n, dtype=a.dtype, device=a.device) - v @ (t @ v[..., :n, :].mH)


@register("ormqr")
def _(space: Space, a: Any, tau: Any, other: Any, left: bool = True, transpose: bool = False) -> Any:
    v, t = _reflections(a, tau)
    t = t.mH if transpose else t
    return other - (v @ (t @ (v.mH @ other)) if left else ((other @ v) @ t) @ v.mH)
