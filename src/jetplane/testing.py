"""Check derivatives against reverse mode and central differences, on your own operators and models.

The oracle is reverse over reverse in double precision. Its matrix is checked for symmetry, because
torch's formulas can be wrong too; where it is not symmetric, or disagrees with the jets, central
differences decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import DerivativeError
from .evaluation.api import evaluate
from .evaluation.plane import PlaneModel

CURVATURE = 0.3  # of the curves that inputs move on
SETTLED = 1e-5  # relative error up to which central differences are trusted


def grad_of_grad(closure: Callable[[], Tensor], params: Sequence[Tensor], tangents: Sequence[Tensor]) -> PlaneModel:
    """Loss, slope and curvature on a plane by reverse over reverse: the reference to which results are compared.

    Args:
        closure: the scalar loss.
        params: leaves that require gradients.
        tangents: one tensor (K, *param.shape) for each.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> grad_of_grad(lambda: (w**3).sum(), [w], [torch.eye(2)]).curvature
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    k = tangents[0].shape[0]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = closure()
        gradient = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        slope, curvature = [], torch.zeros(k, k, dtype=loss.dtype)
        for i in range(k):
            along = _dot(gradient, tangents, i, loss)
            slope.append(along.detach())
            if along.requires_grad:
                row = torch.autograd.grad(along, params, retain_graph=True, allow_unused=True)
                curvature[i] = torch.stack([_dot(row, tangents, j, loss).detach() for j in range(k)])
    return PlaneModel(loss.detach(), torch.stack(slope), curvature)


def _dot(gradient: Sequence[Tensor | None], tangents: Sequence[Tensor], i: int, loss: Tensor) -> Tensor:
    terms = [(g * t[i]).sum() for g, t in zip(gradient, tangents, strict=True) if g is not None]
    return torch.stack(terms).sum() if terms else loss.new_zeros(())


def central_differences(
    closure: Callable[[], Tensor], params: Sequence[Tensor], tangents: Sequence[Tensor], step: float = 5e-4
) -> PlaneModel:
    """The same by central differences of the loss, to about 1e-7: decides where formulas disagree.

    Two steps are extrapolated, so that the error is of fourth order in ``step``.
    """
    k = tangents[0].shape[0]
    before = [p.detach().clone() for p in params]
    leaves = [p for p in params if p.is_leaf and p.requires_grad]

    def at(*moves: tuple[int, float]) -> Tensor:
        with torch.no_grad():
            for p, b, t in zip(params, before, tangents, strict=True):
                p.copy_(b + sum(a * t[i] for i, a in moves))
        for p in leaves:  # no graph from them, which refuses some writes to views
            p.requires_grad_(False)
        with torch.enable_grad():  # the closure may take derivatives itself
            return closure().detach()

    def slope(i: int, h: float) -> Tensor:
        return (at((i, h)) - at((i, -h))) / (2 * h)

    def curvature(i: int, j: int, h: float) -> Tensor:
        corners = at((i, h), (j, h)) + at((i, -h), (j, -h)) - at((i, h), (j, -h)) - at((i, -h), (j, h))
        return corners / (4 * h * h)

    def extrapolated(quotient: Callable[..., Tensor], *directions: int) -> Tensor:
        return (4 * quotient(*directions, step) - quotient(*directions, 2 * step)) / 3

    try:
        loss = at()
        slopes = torch.stack([extrapolated(slope, i) for i in range(k)])
        rows = [torch.stack([extrapolated(curvature, i, j) for j in range(k)]) for i in range(k)]
    finally:
        with torch.no_grad():
            for p, b in zip(params, before, strict=True):
                p.copy_(b)
        for p in leaves:
            p.requires_grad_()
    return PlaneModel(loss, slopes, torch.stack(rows))


def check_plane(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    tangents: Sequence[Tensor],
    tolerance: float = 1e-9,
) -> PlaneModel:
    """Evaluate a plane with jets and compare it with `grad_of_grad`.

    Args:
        closure: the scalar loss.
        params: leaves that require gradients; in float64 for the default tolerance.
        tangents: one tensor (K, *param.shape) for each.
        tolerance: largest error, relative to the largest entry.

    Returns:
        The jets' plane model.

    Raises:
        AssertionError: slope or curvature disagree with reverse mode; or with central differences, if these
            contradict reverse mode or torch has no second derivative.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> plane = check_plane(lambda: w.prod().sin(), [w], [torch.eye(2, dtype=torch.float64)])
    """
    try:
        expected = grad_of_grad(closure, params, tangents)
    except RuntimeError:  # torch has no second derivative of something in it
        expected = None
    found = evaluate(closure, params, tangents)
    failures = ["torch has no second derivative"] if expected is None else _differences(found, expected, tolerance)
    if failures and params[0].dtype == torch.float64:
        judge = central_differences(closure, params, tangents)
        if expected is None or _differences(expected, judge, SETTLED):  # they refute reverse mode
            failures = _differences(found, judge, SETTLED)
    if failures:
        raise AssertionError("jets disagree with reverse mode and with central differences:\n" + "\n".join(failures))
    return found


def _differences(found: PlaneModel, expected: PlaneModel, tolerance: float) -> list[str]:
    scale = max(1.0, float(expected.value.abs()), float(expected.slope.abs().max()))
    failures = []
    for name in ("value", "slope", "curvature"):
        a, b = getattr(found, name).double(), getattr(expected, name).double()
        if name == "curvature" and not torch.allclose(b, b.mT, rtol=1e-6, atol=1e-9 * scale):
            failures.append("the oracle's curvature is not symmetric")
            continue
        error = float((a - b).abs().max())
        if not error <= tolerance * float(b.abs().max()) + 1e-3 * tolerance * scale:
            failures.append(f"{name}: {a.tolist()}, expected {b.tolist()}")
    return failures


def check_rule(f: Callable[..., Any], *inputs: Any, k: int = 2, seed: int = 0, tolerance: float = 1e-7) -> None:
    """Check how jets pass through a function or operator, your own included.

    Every real floating tensor among the inputs moves along ``k`` random directions; the results are
    contracted with fixed random weights to a scalar, whose slope and curvature are compared as in
    `check_plane`.

    Args:
        f: returns a tensor, or a structure of them.
        inputs: in float64; other values are passed as they are.
        k: number of directions.
        seed: of the directions.
        tolerance: relative.

    Raises:
        AssertionError: the derivatives are wrong.
        DerivativeError: f cannot be carried, or no input is a floating tensor.

    >>> import torch, jetplane as jp
    >>> jp.testing.check_rule(torch.nn.functional.silu, torch.randn(3, dtype=torch.float64))
    """
    loss, leaves = scalar_loss(f, inputs)
    if not leaves:
        raise DerivativeError("check_rule needs at least one real floating-point tensor among the inputs, got none")
    generator = torch.Generator().manual_seed(seed)
    tangents = [torch.randn(k, *x.shape, dtype=x.dtype, generator=generator) for x in leaves]
    check_plane(loss, leaves, tangents, tolerance)


def scalar_loss(
    f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A closure that contracts ``f(*args, **kwargs)`` to a scalar, and the leaves that it moves with.

    Leaves are copies of all real floating tensors among the arguments, nested ones too. They enter f on
    curves, with the value and slope of the leaf itself and a curvature that f must carry: a rule that loses
    second coefficients is found out, even a linear one.
    """
    flat, spec = tree_flatten((tuple(args), kwargs or {}))
    where = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and _moves(x)]
    origins = [flat[i].detach().clone() for i in where]
    leaves = [x.clone().requires_grad_() for x in origins]
    weights: list[Tensor] = []

    def loss() -> Tensor:
        values = list(flat)
        for i, leaf, origin in zip(where, leaves, origins, strict=True):
            values[i] = leaf + CURVATURE * (leaf - origin) ** 2
        inner_args, inner_kwargs = tree_unflatten(values, spec)
        torch.manual_seed(0)
        return contract(f(*inner_args, **inner_kwargs), weights, torch.Generator().manual_seed(1))

    return loss, leaves


def _moves(x: Tensor) -> bool:
    return x.dtype.is_floating_point and x.layout == torch.strided


def contract(result: Any, weights: list[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """All real and complex tensors of a result, weighted at random and summed to a real scalar.

    ``weights`` is filled at the first call and used again at later ones.
    """
    total: Any = 0
    tensors = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
    for i, t in enumerate(t for t in tensors if t.dtype.is_floating_point or t.dtype.is_complex):
        real = torch.view_as_real(t.resolve_conj()) if t.dtype.is_complex else t
        if i >= len(weights):
            weights.append(torch.randn(real.shape, dtype=torch.float64, generator=generator).to(real.dtype))
        total = total + (real * weights[i]).sum()
    return total
