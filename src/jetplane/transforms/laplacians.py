"""Laplacians and their kin: second-order operators whose second coefficients are carried as one sum.

Along directions v_i the sum ``s = sum_i d²f/da_i²`` obeys a chain rule of its own, so that one second coefficient is
carried instead of one for each direction, 1 + D + 1 channels in all:

    elementwise f:  y_i = f' x_i,    y_s = f' x_s + f'' sum_i x_i²
    product a b:                     y_s = a_s b + a b_s + 2 sum_i a_i b_i

A second coefficient of the input itself is a drift: with ``x_s = b`` the result is ``sum_i d²f/da_i² + b . grad f``.

Source: collapsed Taylor mode, Dangel et al., arXiv 2505.13644; the forward Laplacian, Li et al., arXiv 2307.08214.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import tree_map
from ..errors import DTypeError, ShapeError
from ..jets import Sums
from .arguments import Argnums, Directions, Point, point
from .compiling import uncompiled
from .costs import REVERSE_COST, Chunk, Mode, chosen_mode, directions_at_a_time, in_runs
from .estimates import Estimate, sampled
from .forward import Expansion, along, blocks, with_aux
from .reverse import products


class ValueAndLaplacian(NamedTuple):
    """What one pass gives.

    Attributes:
        value: f's result, of shape S.
        gradient: its first derivatives, (*S, *X), in the structure of the primals.
        laplacian: ``sum_d d²f/dx_d²``, of shape S.
    """

    value: Any
    gradient: Any
    laplacian: Any


@uncompiled
def laplacian(
    f: Callable[..., Any],
    primals: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
    chunk: Chunk = "auto",
    mode: Mode = "forward",
    estimate: Estimate = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """``sum_d d²f/dx_d²`` over all coordinates of the primals (at each point), of the shape of f's result.

    The D second coefficients are carried as their sum: 1 + D + 1 channels.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points in the primals. f is called once with all points, and its result at each must
            depend on that point alone (no batch normalization in training): D directions are carried then, and not one
            for each number of each point.
        chunk: directions at a time; "auto" carries all where they are sure to fit into half of the free memory, None
            always.
        mode: "forward"; "forward-over-reverse" for D Hessian-vector products, for functions that give one number (at
            each point); "auto" for the cheaper one.
        estimate: for an unbiased estimate of few directions: "hutchinson", random signs, drawn for each point; "axes",
            coordinates drawn without replacement, shared by all points.
        samples: directions of the estimate.
        generator: of its random numbers; torch's own by default.

    Returns:
        A tensor of the shape of f's result, or a tree of them. With ``has_aux`` ``(laplacian, aux)``.

    Raises:
        As `jetplane.jet`; ArgumentError: what does not fit into memory, or takes too many runs.

    >>> import torch, jetplane as jp
    >>> jp.laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    tensor(18.)
    >>> points = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 3.0]])
    >>> jp.laplacian(lambda x: (x**3).sum(1), points, batch_dim=0)
    tensor([18.,  6., 36.])

    Source: Dangel et al., arXiv 2505.13644; of the estimates, Hutchinson (1989) and Hu et al., arXiv 2412.00088.
    """
    where = point(primals, argnums, batch_dim)
    drawn = sampled(where, estimate, samples, generator)
    k = where.size if drawn is None else drawn.count
    directions = where.axes if drawn is None else drawn.directions
    mode = chosen_mode(mode, where, "laplacian", k + 1, k)
    if mode == "forward-over-reverse":
        found, aux = _by_products(f, where, directions, k, chunk, has_aux)
    else:
        found, aux = _traced(f, where, directions, k, chunk, has_aux, "laplacian")
    if drawn is not None:
        found = _scaled(found, drawn.scale)
    return with_aux(found, aux, has_aux)


def _traced(
    f: Callable[..., Any],
    where: Point,
    directions: Callable[[slice], Directions],
    k: int,
    chunk: Chunk,
    has_aux: bool,
    what: str,
    drift: list[Tensor] | None = None,
) -> tuple[Any, Any]:
    """The sum of second derivatives along k directions, plus a drift's derivative, and aux."""
    size = directions_at_a_time(chunk, what, where, k, f, "estimate= with samples=, or chunk=")

    def once(run: slice) -> Expansion:
        seconds = drift if run.start == 0 else None
        return along(f, where, directions(run), Sums.trace(run.stop - run.start), 2, seconds, has_aux)

    found, got = None, None
    for got in in_runs(k, size, once):
        parts = [y[0] for y in got.second]
        found = parts if found is None else [a + b for a, b in zip(found, parts, strict=True)]
    assert got is not None and found is not None
    return got.tree(found), got.aux


def _by_products(
    f: Callable[..., Any], where: Point, directions: Callable[[slice], Directions], k: int, chunk: Chunk, has_aux: bool
) -> tuple[Tensor, Any]:
    """The same by Hessian-vector products, ``sum_k v_k . H v_k``."""
    size = directions_at_a_time(chunk, "laplacian", where, REVERSE_COST * k, f, "estimate= with samples=")
    size = max(1, size // REVERSE_COST) if chunk in ("auto", None) else size

    def once(run: slice) -> tuple[Tensor, Any]:
        vs = where.dense(directions(run), run.stop - run.start)
        found, value, aux = products(f, where, vs, has_aux, "laplacian")
        terms = [where.contracted(y, v) for y, v in zip(found, vs, strict=True)]
        return torch.stack(terms).sum(0).reshape(value.shape), aux

    parts = list(in_runs(k, size, once))
    return torch.stack([part for part, _ in parts]).sum(0), parts[-1][1]


def _scaled(tree: Any, factor: float) -> Any:
    return tree_map(lambda t: t * factor, tree)


@uncompiled
def value_and_laplacian(
    f: Callable[..., Any],
    primals: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
) -> Any:
    """Value, gradient and Laplacian of one pass of 1 + D + 1 channels.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points, see `laplacian`.

    Returns:
        A `ValueAndLaplacian`. With ``has_aux`` ``(it, aux)``.

    Raises:
        As `jetplane.jet`.

    >>> import torch, jetplane as jp
    >>> found = jp.value_and_laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    >>> found.value, found.gradient, found.laplacian
    (tensor(9.), tensor([ 3., 12.]), tensor(18.))
    """
    where = point(primals, argnums, batch_dim)
    directions_at_a_time(None, "value_and_laplacian", where, where.size, f, "laplacian(..., chunk=) and a gradient")
    got = along(f, where, where.axes(), Sums.trace(where.size), has_aux=has_aux)
    found = ValueAndLaplacian(
        got.tree(got.value),
        got.tree([blocks(where, y) for y in got.first]),
        got.tree([y[0] for y in got.second]),
    )
    return with_aux(found, got.aux, has_aux)


@uncompiled
def weighted_laplacian(
    f: Callable[..., Any],
    primals: Any,
    sigma: Any,
    drift: Any = None,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
    chunk: Chunk = "auto",
) -> Any:
    """``tr(sigma sigma^T Hess f) + drift . grad f``: the generator of a diffusion, up to a factor, for any r columns.

    The r columns of sigma are the directions, 1 + r + 1 channels; the drift is a second coefficient of the input, which
    costs nothing.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        sigma: r columns, (*X, r) for a primal of shape X at one point, in the structure of the primals; with
            ``batch_dim`` also a matrix for each point, (*primal.shape, r). Or a function of the primals that gives it:
            sigma of the point. It is not differentiated, as the formula says.
        drift: b, of the structure and shapes of the primals, (*X) or one for each point; or a function of the primals.
            None for no drift.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points, see `laplacian`.
        chunk: columns at a time, see `laplacian`.

    Returns:
        A tensor of the shape of f's result, or a tree of them. With ``has_aux`` ``(it, aux)``.

    Raises:
        As `jetplane.jet`; ShapeError, DTypeError: sigma or drift that do not fit the primals.

    >>> import torch, jetplane as jp
    >>> x, sigma = torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [1.0]])
    >>> jp.weighted_laplacian(lambda x: x[0] * x[1], x, sigma)  # d²/dt² of f(x + t (1, 1))
    tensor(2.)
    >>> jp.weighted_laplacian(lambda x: x[0] * x[1], x, sigma, drift=lambda x: -x)
    tensor(-2.)

    Source: Dangel et al., arXiv 2505.13644, section 3.2.
    """
    where = point(primals, argnums, batch_dim)
    columns = [_first(s) for s in where.flat(_at(sigma, where), "sigma")]
    vs, r = where.directions(where.tree(columns), "sigma (its columns, as the first axis)")
    seconds = None
    if drift is not None:
        seconds, _ = where.directions(_at(drift, where), "drift", k=1)
    found, aux = _traced(f, where, lambda run: [v[run] for v in vs], r, chunk, has_aux, "weighted_laplacian", seconds)
    return with_aux(found, aux, has_aux)


def _at(given: Any, where: Point) -> Any:
    """Sigma or drift at the point."""
    return given(*where.arguments) if callable(given) and not isinstance(given, Tensor) else given


def _first(sigma: Any) -> Tensor:
    if not isinstance(sigma, Tensor):
        raise DTypeError(f"sigma: expected a tensor (*primal.shape, r), got {type(sigma).__name__}")
    if not sigma.dim():
        raise ShapeError("sigma: expected a tensor (*primal.shape, r), got a number; the columns of c I are c * eye")
    return sigma.movedim(-1, 0)


@uncompiled
def bilaplacian(
    f: Callable[..., Any],
    primals: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
) -> Any:
    """``sum_ij d⁴f / dx_i² dx_j²``, the Laplacian of the Laplacian, exactly: (D + 2)² channels.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points, see `laplacian`.

    Returns:
        A tensor of the shape of f's result, or a tree of them. With ``has_aux`` ``(it, aux)``.

    Raises:
        As `laplacian`.

    >>> import torch, jetplane as jp
    >>> jp.bilaplacian(lambda x: (x**4).sum() + (x[0] * x[1]) ** 2, torch.tensor([1.0, 2.0]))
    tensor(56.)
    """

    def inner(*arguments: Any) -> Any:
        options: Any = {"argnums": where.argnums, "has_aux": has_aux, "batch_dim": batch_dim, "chunk": None}
        return laplacian(f, arguments, **options)

    where = point(primals, argnums, batch_dim)
    return laplacian(inner, where.arguments, argnums=where.argnums, has_aux=has_aux, batch_dim=batch_dim)
