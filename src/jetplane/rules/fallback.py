"""What is left when an operator has no rule and no decomposition: autograd inside that one operator.

With inputs ``x(a, c) = x + sum a_i x_i + sum c_n x_n``, a and c real numbers for each first and second coefficient, and
a cotangent u, the derivatives

    g(a, c, u) = d<u, op(x(a, c))> / d(a, c)

are linear in u, so their derivatives by u are those of the result: ``y_i = d/du dg/da_i``, and for a second coefficient
that sums pairs ``y_n = d/du (dg/dc_n + sum w d²g / da_i da_j)``: reverse over reverse over a linear map. It is exact
where torch's own backward formulas are, local (nothing is kept after the operator), and slow, a pass for each.

What is linear in u gives itself back when its derivative is contracted with u, which is checked. Where single precision
fails the check, that may be rounding: the operator is differentiated once more in double precision, which decides.
"""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_leaves, tree_unflatten
from ..errors import FallbackWarning, MissingRuleError
from ..jets import Coefficients, Jet, Space, chain, make, parts, plain
from .grad_mode import autograd

_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("jetplane_strict", default=False)
_announced: set[Any] = set()

TRUSTED = {"aten", "prims"}  # namespaces whose backward passes can be differentiated, or say that they cannot

ROUNDING = 1e3  # roundings of the terms of a sum that two ways to compute it may differ by
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-4}  # the same, as a part of the sum of their sizes


class NotLinearError(RuntimeError):
    """A backward pass that is not linear in the cotangent."""


ELEMENTWISE_LIMIT = 4096  # output elements that are differentiated one by one where nothing else works


class Draws:
    """Where torch's random numbers stand, so that a function that runs again draws the same."""

    def __init__(self, args: Sequence[Any]) -> None:
        found = {a.device for a in args if isinstance(a, Tensor) and a.device.type == "cuda"}
        self.devices = sorted(d.index for d in found)
        self._cpu = torch.random.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

    def again(self) -> None:
        """Set them back there."""
        torch.random.set_rng_state(self._cpu)
        for device, state in zip(self.devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


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
        with autograd():
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
    if func.namespace not in TRUSTED:
        raise missing(func, "nothing says that the backward pass of a custom operator can be differentiated again")
    if forbidden():
        raise missing(func, "jetplane.strict() forbids the local fallback")
    if not all_plain(space, args, kwargs):
        raise missing(func, "the local fallback reaches neither into derivatives of derivatives nor into compiled code")
    try:
        result = reverse_over_reverse(func, space, args, kwargs)
        moves = any(c for a in tree_leaves((args, kwargs)) for c in parts(a, space)[1:])
        if moves and not any(isinstance(y, Jet) for y in tree_leaves(result)):
            raise NotImplementedError("it has no derivative in torch")  # which is not to be zero
    except (RuntimeError, NotImplementedError) as error:
        raise missing(func, f"autograd cannot differentiate it twice either ({str(error).splitlines()[0]})") from error
    announce(func, f"{func} has no rule for jets")
    return result


def forbidden() -> bool:
    """Whether `strict` forbids the local fallback here."""
    return _strict.get()


def all_plain(space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether neither primals nor coefficients of the arguments are jets of an outer evaluation themselves."""
    of = [parts(a, space) for a in tree_leaves((args, kwargs))]
    return plain(*(p for p, _, _ in of), *(c.tensor for _, *both in of for c in both if c))


def announce(what: Any, why: str) -> None:
    """Warn, once for each operator or function, that it is differentiated locally by reverse mode."""
    if what not in _announced:
        _announced.add(what)
        warnings.warn(
            f"{why}: it is differentiated by reverse over reverse, locally and slowly. "
            "Register a rule with jetplane.register_rule, or forbid this with jetplane.strict().",
            FallbackWarning,
            stacklevel=2,
        )


def reverse_over_reverse(f: Callable[..., Any], space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of ``f(*args, **kwargs)``, with the coefficients that autograd finds inside of f.

    Raises:
        RuntimeError, NotImplementedError: autograd does not differentiate f, or not twice, or its backward pass is
            not linear in the cotangent.
    """
    leaves, spec = tree_flatten((tuple(args), kwargs))
    carried = [parts(a, space) for a in leaves]
    try:
        ys, tree = _differentiated(f, space, carried, spec)
    except NotLinearError as error:
        if not any(isinstance(p, Tensor) and p.dtype in DOUBLE for p, _, _ in carried):
            raise
        try:
            ys, tree = _in_double(f, space, carried, spec)
        except NotLinearError:
            raise
        except (RuntimeError, NotImplementedError):  # it takes no double precision
            raise error from None
    # jets are made here, without autograd again, where all others are made
    return tree_unflatten([make(*y, space) if len(y) == 3 else y[0] for y in ys], tree)


DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}

Carried = Sequence[tuple[Any, Coefficients, Coefficients]]  # primals and coefficients of all arguments


def _in_double(f: Callable[..., Any], space: Space, carried: Carried, spec: Any) -> tuple[list[tuple[Any, ...]], Any]:
    """`_differentiated` in double precision, its results in the dtypes that they would have had."""

    def widened(x: Any) -> Any:
        dtype = DOUBLE.get(getattr(x, "dtype", None))  # type: ignore[arg-type]
        return x if dtype is None else x.to(dtype)

    with autograd():
        plain_args, plain_kwargs = tree_unflatten([_normal(p) for p, _, _ in carried], spec)
        values, _ = tree_flatten(f(*plain_args, **plain_kwargs))
    ys, tree = _differentiated(f, space, [tuple(map(widened, of)) for of in carried], spec)  # type: ignore[misc]
    found = []
    for value, (_, *coefficients) in zip(values, ys, strict=True):
        found.append((value, *(c.to(value.dtype) for c in coefficients)))
    return found, tree


def _differentiated(
    f: Callable[..., Any], space: Space, carried: Carried, spec: Any
) -> tuple[list[tuple[Any, ...]], Any]:
    """Primals of all results, with their coefficients where they are tensors that move, and the tree of results."""
    with autograd():
        outputs, along = _along(f, space, carried, spec)
        moving = _Moving(space, carried)
        keep = space.recorded and _recorded(*(t for p, *cs in carried for t in (p, *(c.tensor for c in cs if c))))
        found = [
            moving.checked(*_coefficients(y, *along, space, keep)) if isinstance(y, Tensor) else (y,)
            for y in outputs[0]
        ]
    return found, outputs[1]


def _along(func: Any, space: Space, carried: Sequence[Any], spec: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The operator's outputs as functions of a and c, at zero."""
    reals = [c.tensor for _, *cs in carried for c in cs if c]
    dtype = torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in reals) else torch.float32
    device = reals[0].device if reals else None  # none in memory that no jet was written into yet
    a, c = (
        torch.zeros(count, dtype=dtype, device=device, requires_grad=True) for count in (space.k, space.structure.count)
    )

    def at(p: Any, x1: Coefficients, x2: Coefficients) -> Any:
        if not (x1 or x2):
            return _normal(p)
        x = p.clone()
        for along, coefficients in ((a, x1), (c, x2)):
            if coefficients:
                stack = coefficients.full(p.shape, coefficients.tensor.dtype, p.device)
                x = x + _combined(along, stack).to(p.dtype)
        return x

    inner_args, inner_kwargs = tree_unflatten([at(*c) for c in carried], spec)
    return tree_flatten(func(*inner_args, **inner_kwargs)), (a, c)


def _combined(a: Tensor, c: Tensor) -> Tensor:
    """``sum_n a_n c_n``; what does not move, or is not finite, passes no gradient back, infinite ones neither."""
    along = a.to(c.dtype).reshape(-1, *[1] * (c.dim() - 1))
    finite = c.isfinite()
    return _Along.apply(along, torch.where(finite, c, 0)).where(finite, 0).sum(0)  # type: ignore[union-attr]


class _Along(torch.autograd.Function):
    """The product of a number for each coefficient with the coefficients, ``(n, 1, ...) * (n, *S)``.

    A coefficient that is zero takes nothing of an infinite gradient; of a finite one it keeps its place in the graph,
    since what is zero at these parameters may move with them.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, c: Tensor) -> Tensor:  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(a, c)
        return a * c

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        a, c = ctx.saved_tensors
        known = torch.where((c == 0) & ~g.isfinite(), 0, g)
        return (known * c.conj()).sum_to_size(a.shape), g * a.conj()


class _Moving:
    """Along which directions the inputs move, and whether by finite coefficients.

    Where a gradient is not finite, a direction in which nothing moves still has coefficients zero, and one that is
    not finite itself leaves the others as they are.
    """

    def __init__(self, space: Space, carried: Sequence[Any]) -> None:
        first, second = (
            sum(
                (c[order].full((), torch.float64, torch.device("cpu")) for c in self._sizes(carried) if c[order]),
                torch.zeros(space.count(order), dtype=torch.float64),
            )
            for order in (1, 2)
        )
        self.first, self.second = first, second.clone()
        for n, i, j, _ in space.structure.terms():
            if first[i] != 0 and first[j] != 0:
                self.second[n] += first[i] + first[j]

    def _sizes(self, carried: Sequence[Any]) -> list[Any]:
        return [
            (p, *(c.map(lambda t: t.detach().abs().reshape(t.shape[0], -1).sum(1).double().cpu()) for c in cs))
            for p, *cs in carried
        ]

    def checked(self, y: Tensor, first: Coefficients | None = None, second: Coefficients | None = None) -> Any:
        """The coefficients of a result, zero for directions that do not move and NaN for those that are not finite."""

        def known(c: Coefficients, size: Tensor) -> Coefficients:
            def of(t: Tensor) -> Tensor:
                sizes = size.to(t.device).reshape(-1, *[1] * (t.dim() - 1))
                still = (sizes == 0) & ~t.isfinite()  # a zero that is finite keeps its place in the graph
                return torch.where(still, 0, torch.where(sizes.isfinite(), t, torch.nan))

            return c.map(of, True)

        if first is None or second is None:
            return (y,)
        return y, known(first, self.first), known(second, self.second)


def _coefficients(y: Tensor, a: Tensor, c: Tensor, space: Space, keep: bool) -> tuple[Any, ...]:
    """Primal, first and second coefficients of one output y(a, c); the primal alone where it is constant."""
    if not _depends(y, a, c):
        return (y if keep else y.detach(),)
    real = torch.view_as_real(y) if y.is_complex() else y
    try:
        first, second = _by_cotangent(real, a, c, space, keep)
    except (RuntimeError, NotImplementedError) as error:
        if real.numel() > ELEMENTWISE_LIMIT or (isinstance(error, NotLinearError) and real.dtype in DOUBLE):
            raise
        first, second = _by_element(real, a, c, space, keep)
    if y.is_complex():
        first, second = (None if s is None else torch.view_as_complex(s.contiguous()) for s in (first, second))
    return y if keep else y.detach(), Coefficients(space, 1, first), Coefficients(space, 2, second)


def _depends(y: Tensor, a: Tensor, c: Tensor) -> bool:
    """Whether an output depends on the directions, and not on recorded constants alone."""
    if not y.requires_grad:
        return False
    real = torch.view_as_real(y) if y.is_complex() else y
    found = torch.autograd.grad(real.sum(), (a, c), retain_graph=True, allow_unused=True)
    return any(g is not None for g in found)


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
    # Where a formula forgets its cotangent, the result must not be trusted.
    _check_linear("first", first, u, g, y)
    gc = _grad(y, c, u, create=True)
    if space.order == 1 and not gc.requires_grad:
        return first if keep else first.detach(), None
    sums = _sums(g, gc, a, space) if space.order == 2 else list(gc.unbind())
    second = torch.stack([_grad(e, u, create=keep) for e in sums])
    _check_linear("second", second, u, torch.stack([e.detach() for e in sums]), y)
    return (first, second) if keep else (first.detach(), second.detach())


def _check_linear(which: str, c: Tensor, u: Tensor, expected: Tensor, y: Tensor) -> None:
    """Hold the sums ``sum c_n u`` against what they are derivatives of, up to the rounding of their terms.

    Raises:
        NotLinearError: they differ.
    """
    rows, u, y = (t.detach().double() for t in (c.reshape(len(c), u.numel()), u.flatten(), y.flatten()))
    found, wanted = rows @ u, expected.detach().double()
    own = torch.finfo(c.dtype).eps * ROUNDING * (y @ u.abs()).abs()
    tolerance = PRECISION.get(c.dtype, 1e-2) * (rows.abs() @ u.abs()) + torch.where(y.isfinite().all(), own, 0)
    wrong = ((found - wanted).abs() > tolerance) & found.isfinite() & wanted.isfinite()
    wrong |= found.isnan() != wanted.isnan()
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise NotLinearError(
            "its backward pass is not linear in the cotangent, or torch does not see that it is: along a random one it "
            f"gives {float(wanted[n]):.6g}, and its derivative by the cotangent, which is the {which} coefficient {n}, "
            f"contracts to {float(found[n]):.6g}"
        )


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
    first, second = (torch.stack(each, -1).reshape(len(each[0]), *y.shape) for each in (firsts, seconds))
    u = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=_generator(y))
    _check_linear("first", first, u, _grad(y, a, u), y)
    return first, second
