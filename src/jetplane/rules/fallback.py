"""What is left when an operator has no rule and no decomposition: autograd inside that one operator.

With inputs ``x(a, c) = x + sum a_i x_i + sum c_n x_n``, a and c real numbers for each first and second coefficient, and
a cotangent u, the derivatives

    g(a, c, u) = d<u, op(x(a, c))> / d(a, c)

are linear in u, so their derivatives by u are those of the result: ``y_i = d/du dg/da_i``, and for a second coefficient
that sums pairs ``y_n = d/du (dg/dc_n + sum w d²g / da_i da_j)``: reverse over reverse over a linear map. It is exact
where torch's own backward formulas are, local (nothing is kept after the operator), and slow, a pass for each.
"""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_unflatten
from ..errors import FallbackWarning, MissingRuleError
from ..jets import Coefficients, Jet, Space, chain, make, parts, plain

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
            recorded = space.recorded and _recorded(p, *args)
            x = p.clone() if recorded and p.requires_grad else p.detach().clone().requires_grad_()
            y = func(*[x if a is jets[0] else _normal(a) for a in args], **kwargs)
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.requires_grad:
                return NotImplemented
            d1 = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
            twice = space.order == 2 and d1.requires_grad
            d2 = torch.autograd.grad(d1.sum(), x, create_graph=recorded)[0] if twice else None
    except (RuntimeError, NotImplementedError):
        return NotImplemented
    return chain(space, jets[0], y, d1, d2) if recorded else chain(space, jets[0], y.detach(), d1.detach(), d2)


def _recorded(*tensors: Any) -> bool:
    """Whether one of the tensors is in a graph that is recorded."""
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _normal(a: Any) -> Any:
    return a.clone() if isinstance(a, Tensor) and a.is_inference() else a


def reverse(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Any differentiable operator, by reverse over reverse inside it."""
    leaves, spec = tree_flatten((tuple(args), kwargs))
    carried = [parts(a, space) for a in leaves]
    if not plain(*(p for p, _, _ in carried), *(c.tensor for _, *cs in carried for c in cs if c)):
        raise missing(func, "the local fallback does not reach into nested jets")
    if func.namespace not in TRUSTED:
        raise missing(func, "nothing says that the backward pass of a custom operator can be differentiated again")
    if _strict.get():
        raise missing(func, "jetplane.strict() forbids the local fallback")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            outputs, along = _along(func, space, carried, spec)
            if not any(isinstance(y, Tensor) and y.requires_grad for y in outputs[0]):
                raise NotImplementedError("it has no derivative in torch")  # which is not to be zero
            keep = space.recorded and _recorded(*(t for p, *cs in carried for t in (p, *(c.tensor for c in cs if c))))
            found = [_coefficients(y, *along, space, keep) if isinstance(y, Tensor) else (y,) for y in outputs[0]]
            if not keep:
                found = [tuple(t.detach() if isinstance(t, Tensor) else t for t in f) for f in found]
            found = [(f[0], *(Coefficients(space, n + 1, t) for n, t in enumerate(f[1:]))) for f in found]
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


def _along(func: Any, space: Space, carried: Sequence[Any], spec: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The operator's outputs as functions of a and c, at zero."""
    reals = [c.tensor for _, *cs in carried for c in cs if c]
    dtype = torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in reals) else torch.float32
    a, c = (
        torch.zeros(count, dtype=dtype, device=reals[0].device, requires_grad=True)
        for count in (space.k, space.structure.count)
    )

    def at(p: Any, x1: Coefficients, x2: Coefficients) -> Any:
        if not (x1 or x2):
            return _normal(p)
        x = p.clone()
        for along, coefficients in ((a, x1), (c, x2)):
            if coefficients:
                stack = coefficients.full(p.shape, coefficients.tensor.dtype, p.device)
                x = x + torch.tensordot(along.to(stack.dtype), stack.clone(), 1).to(p.dtype)
        return x

    inner_args, inner_kwargs = tree_unflatten([at(*c) for c in carried], spec)
    return tree_flatten(func(*inner_args, **inner_kwargs)), (a, c)


def _coefficients(y: Tensor, a: Tensor, c: Tensor, space: Space, keep: bool) -> tuple[Any, ...]:
    """Primal, first and second coefficients of one output y(a, c); the primal alone where it is constant."""
    if not _depends(y, a):
        return (y,)
    real = torch.view_as_real(y) if y.is_complex() else y
    try:
        first, second = _by_cotangent(real, a, c, space, keep)
    except (RuntimeError, NotImplementedError):
        if real.numel() > ELEMENTWISE_LIMIT:
            raise
        first, second = _by_element(real, a, c, space, keep)
    if y.is_complex():
        first, second = (None if s is None else torch.view_as_complex(s.contiguous()) for s in (first, second))
    return y, first, second


def _depends(y: Tensor, a: Tensor) -> bool:
    """Whether an output depends on the directions, and not on recorded constants alone."""
    if not y.requires_grad:
        return False
    real = torch.view_as_real(y) if y.is_complex() else y
    return torch.autograd.grad(real.sum(), a, retain_graph=True, allow_unused=True)[0] is not None


def _grad(y: Tensor, x: Tensor, u: Tensor | None = None, create: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    g = torch.autograd.grad(y, x, u, create_graph=create, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if g is None else g


def _sums(g: Tensor, gc: Tensor, a: Tensor, space: Space) -> list[Tensor]:
    """``dg/dc_n + sum w d²g / da_i da_j`` for each second coefficient."""
    rows: dict[int, Tensor] = {}
    sums = list(gc.unbind())
    for n, i, j, weight in space.structure.terms():
        if i not in rows:
            rows[i] = _grad(g[i], a, create=True)
        sums[n] = sums[n] + (rows[i][j] if weight == 1 else weight * rows[i][j])
    return sums


def _by_cotangent(y: Tensor, a: Tensor, c: Tensor, space: Space, keep: bool) -> tuple[Tensor, Tensor | None]:
    u = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=_generator(y), requires_grad=True)
    g = _grad(y, a, u, create=True)
    first = torch.stack([_grad(g[i], u, create=keep) for i in range(space.k)])
    gc = _grad(y, c, u, create=True)
    if space.order == 1:
        second = torch.stack([_grad(e, u, create=keep) for e in gc.unbind()]) if gc.requires_grad else None
        return first, second
    sums = _sums(g, gc, a, space)
    second = torch.stack([_grad(e, u, create=keep) for e in sums])
    # Both are linear in u, so contracting with u gives back what they are derivatives of. Where a formula
    # of torch forgets its cotangent it does not, and the result must not be trusted.
    expected = torch.stack([e.detach() for e in sums])
    if not (_contracts(first, u, g) and _contracts(second, u, expected)):
        raise RuntimeError("its double backward is not linear in the cotangent")
    return first, second


def _contracts(c: Tensor, u: Tensor, expected: Tensor) -> bool:
    found = c.detach().reshape(c.shape[0], u.numel()) @ u.detach().reshape(-1)
    tolerance = 1e-3 if c.dtype == torch.float32 else 1e-8
    return torch.allclose(found, expected.detach().to(found.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def _generator(y: Tensor) -> torch.Generator:
    """A stream of our own: the user's random numbers stay as they are."""
    return torch.Generator(y.device).manual_seed(0)


def _by_element(y: Tensor, a: Tensor, c: Tensor, space: Space, keep: bool) -> tuple[Tensor, Tensor | None]:
    firsts, seconds = [], []
    for element in y.reshape(-1).unbind(0):
        g, gc = _grad(element, a, create=True), _grad(element, c, create=True)
        firsts.append(g if keep else g.detach())
        sums = _sums(g, gc, a, space) if space.order == 2 else list(gc.unbind())
        seconds.append(torch.stack(sums) if keep else torch.stack(sums).detach())
    shape = y.shape
    return torch.stack(firsts, -1).reshape(space.k, *shape), torch.stack(seconds, -1).reshape(len(seconds[0]), *shape)
