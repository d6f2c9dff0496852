"""What is left when an operator has no rule and no decomposition: autograd inside that one operator.

With inputs x(a) = x + sum a_i x_i + 1/2 sum a_i a_j x_ij along real a in R^K and a cotangent u,
``g(a, u) = d<u, op(x(a))>/da`` is linear in u, so its derivatives by u are the first coefficients,
and those of ``dg/da`` are the second ones: reverse over reverse over a linear map. It is exact where
torch's own backward formulas are, local (nothing is kept after the operator), and slow, K² passes.
"""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import FallbackWarning, MissingRuleError
from ..jets.jet import Jet, Space, make, parts, plain
from .zeros import chain

_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("jetplane_strict", default=False)
_announced: set[Any] = set()

TRUSTED = {"aten", "prims"}  # namespaces whose backward passes can be differentiated, or say that they cannot

ELEMENTWISE_LIMIT = 4096  # output elements that are differentiated one by one where nothing else works


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Forbid the local reverse fallback: an operator without a rule raises `MissingRuleError`.

    >>> import torch, jetplane as jp
    >>> x = torch.eye(2) + 1
    >>> with jp.strict():
    ...     value, slope, curvature = jp.jet(torch.exp, x, torch.ones(1, 2, 2))
    """
    token = _strict.set(enabled)
    try:
        yield
    finally:
        _strict.reset(token)


def missing(func: Any, why: str) -> MissingRuleError:
    """The error that names an operator and the remedy."""
    return MissingRuleError(
        f"{func} has no rule for jets, and {why}. Register one: jetplane.register_rule({func}, ...), "
        "as linear, elementwise by its derivatives, or composed of other torch functions; "
        "see the documentation of jetplane.register_rule"
    )


def pointwise(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An elementwise operator of one jet, by exact f' and f'' from autograd of its sum."""
    jets = [a for a in args if isinstance(a, Jet) and a.space is space]
    if torch.Tag.pointwise not in func.tags or len(jets) != 1 or any(isinstance(a, (list, tuple)) for a in args):
        return NotImplemented
    p = parts(jets[0], space)[0]
    if not plain(p) or not p.dtype.is_floating_point:
        return NotImplemented
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = p.clone().requires_grad_()
            y = func(*[x if a is jets[0] else _normal(a) for a in args], **kwargs)
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.requires_grad:
                return NotImplemented
            d1 = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
            d2 = torch.autograd.grad(d1.sum(), x)[0] if space.order == 2 and d1.requires_grad else None
    except (RuntimeError, NotImplementedError):
        return NotImplemented
    return chain(space, jets[0], y.detach(), d1.detach(), d2)


def _normal(a: Any) -> Any:
    return a.clone() if isinstance(a, Tensor) and a.is_inference() else a


def reverse(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Any differentiable operator, by reverse over reverse inside it."""
    leaves, spec = tree_flatten((tuple(args), kwargs))
    carried = [parts(a, space) for a in leaves]
    if not plain(*(t for c in carried for t in c if isinstance(t, Tensor))):
        raise missing(func, "the local fallback does not reach into nested jets")
    if func.namespace not in TRUSTED:
        raise missing(func, "nothing says that the backward pass of a custom operator can be differentiated again")
    if _strict.get():
        raise missing(func, "jetplane.strict() forbids the local fallback")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            outputs, a = _along(func, space, leaves, carried, spec)
            if not any(isinstance(y, Tensor) and y.requires_grad for y in outputs[0]):
                raise NotImplementedError("it has no derivative in torch")  # which is not to be zero
            moving = _Moving(space, carried)
            found = [moving.checked(*_coefficients(y, a, space)) if isinstance(y, Tensor) else (y,) for y in outputs[0]]
    except (RuntimeError, NotImplementedError) as error:
        raise missing(func, f"autograd cannot differentiate it twice either ({str(error).splitlines()[0]})") from error
    if func not in _announced:
        _announced.add(func)
        warnings.warn(
            f"{func} has no rule for jets: it is differentiated by reverse over reverse, locally and slowly. "
            "Register a rule with jetplane.register_rule, or forbid this with jetplane.strict().",
            FallbackWarning,
            stacklevel=2,
        )
    # jets are made here, under inference mode again, where all others are made
    return tree_unflatten([make(*f, space) if len(f) == 3 else f[0] for f in found], outputs[1])


def _along(func: Any, space: Space, leaves: Sequence[Any], carried: Sequence[Any], spec: Any) -> tuple[Any, Tensor]:
    """The operator's outputs as functions of a, at a = 0."""
    reals = [t for _, *cs in carried for t in cs if t is not None]
    dtype = torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in reals) else torch.float32
    a = torch.zeros(space.k, dtype=dtype, device=reals[0].device, requires_grad=True)
    half = torch.stack([a[i] * a[j] * (0.5 if i == j else 1.0) for i, j in space.indices()])

    def at(leaf: Any, c: Any) -> Any:
        p, first, second = c
        if first is None and second is None:
            return _normal(p)
        x = p.clone()
        if first is not None:
            x = x + _combined(a, first).to(p.dtype)
        if second is not None:
            x = x + _combined(half, second).to(p.dtype)
        return x

    inner_args, inner_kwargs = tree_unflatten([at(x, c) for x, c in zip(leaves, carried, strict=True)], spec)
    return tree_flatten(func(*inner_args, **inner_kwargs)), a


def _combined(a: Tensor, c: Tensor) -> Tensor:
    """``sum_n a_n c_n``; what does not move, or is not finite, passes no gradient back, infinite ones neither."""
    moves = (c != 0) & c.isfinite()
    return torch.where(moves, a.to(c.dtype).reshape(-1, *[1] * (c.dim() - 1)) * c.clone(), 0).sum(0)


class _Moving:
    """Along which directions the inputs move, and whether by finite coefficients.

    Where a gradient is not finite, a direction in which nothing moves still has coefficients zero, and one that is
    not finite itself leaves the others as they are.
    """

    def __init__(self, space: Space, carried: Sequence[Any]) -> None:
        first, second = (
            sum(
                (c[n].abs().reshape(size, -1).double().sum(1) for c in carried if c[n] is not None and c[n].numel()),
                torch.zeros(size, dtype=torch.float64),
            )
            for n, size in ((1, space.k), (2, space.pairs))
        )
        i, j = torch.tensor(space.indices()).T
        both = torch.where((first[i] == 0) | (first[j] == 0), 0, first[i] + first[j])
        self.first, self.second = first, second + both

    def checked(self, y: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> tuple[Any, ...]:
        """The coefficients of a result, zero for directions that do not move and NaN for those that are not finite."""

        def known(c: Tensor | None, size: Tensor) -> Tensor | None:
            if c is None:
                return None
            size = size.to(c.device).reshape(-1, *[1] * (c.dim() - 1))
            return torch.where(size == 0, 0, torch.where(size.isfinite(), c, torch.nan))

        return (y,) if first is None else (y, known(first, self.first), known(second, self.second))


def _coefficients(y: Tensor, a: Tensor, space: Space) -> tuple[Any, ...]:
    """Primal, first and second coefficients of one output y(a); the primal alone where it is constant."""
    if not y.requires_grad:
        return (y.detach(),)
    real = torch.view_as_real(y) if y.is_complex() else y
    try:
        first, second = _by_cotangent(real, a, space)
    except (RuntimeError, NotImplementedError):
        if real.numel() > ELEMENTWISE_LIMIT:
            raise
        first, second = _by_element(real, a, space)
    if y.is_complex():
        first = torch.view_as_complex(first.contiguous())
        second = None if second is None else torch.view_as_complex(second.contiguous())
    return y.detach(), first, second


def _grad(y: Tensor, x: Tensor, u: Tensor | None = None, create: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    g = torch.autograd.grad(y, x, u, create_graph=create, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if g is None else g


def _by_cotangent(y: Tensor, a: Tensor, space: Space) -> tuple[Tensor, Tensor | None]:
    u = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=_generator(y), requires_grad=True)
    g = _grad(y, a, u, create=True)
    first = torch.stack([_grad(g[i], u) for i in range(space.k)])
    if space.order == 1:
        return first.detach(), None
    rows: dict[int, Tensor] = {}
    second = []
    for i, j in space.indices():
        if i not in rows:
            rows[i] = _grad(g[i], a, create=True)
        second.append(_grad(rows[i][j], u))
    curvature = torch.stack(second).detach()
    # Both are linear in u, so contracting with u gives back what they are derivatives of. Where a formula
    # of torch forgets its cotangent it does not, and the result must not be trusted.
    expected = torch.stack([rows[i][j].detach() for i, j in space.indices()])
    if not (_contracts(first, u, g) and _contracts(curvature, u, expected)):
        raise RuntimeError("its double backward is not linear in the cotangent")
    return first.detach(), curvature


def _contracts(c: Tensor, u: Tensor, expected: Tensor) -> bool:
    found = c.reshape(c.shape[0], u.numel()) @ u.detach().reshape(-1)
    tolerance = 1e-3 if c.dtype == torch.float32 else 1e-8
    return torch.allclose(found, expected.detach().to(found.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def _generator(y: Tensor) -> torch.Generator:
    """A stream of our own: the user's random numbers stay as they are."""
    return torch.Generator(y.device).manual_seed(0)


def _by_element(y: Tensor, a: Tensor, space: Space) -> tuple[Tensor, Tensor | None]:
    firsts, seconds = [], []
    for element in y.reshape(-1).unbind(0):
        g = _grad(element, a, create=True)
        firsts.append(g.detach())
        if space.order == 2:
            rows = torch.stack([_grad(g[i], a) for i in range(space.k)])
            seconds.append(torch.stack([rows[i, j] for i, j in space.indices()]).detach())
    first = torch.stack(firsts, -1).reshape(space.k, *y.shape)
    return first, torch.stack(seconds, -1).reshape(space.pairs, *y.shape) if seconds else None
