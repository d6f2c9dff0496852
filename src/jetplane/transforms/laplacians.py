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
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DTypeError, ShapeError
from ..jets import Sums
from .arguments import Argnums, Call, Directions, call_of
from .compiling import traceable
from .costs import Chunk, Mode, chosen_mode, in_turn, products_at_a_time, runs_of
from .estimates import Estimate, sampled
from .forward import blocks, expanded
from .reverse import products

ESTIMATE = "estimate= with samples=, or chunk="


class ValueAndLaplacian(NamedTuple):
    """The results of one pass.

    Attributes:
        value: f's result, of shape S.
        gradient: its first derivatives, (*S, *X), in the structure of the primals.
        laplacian: ``sum_d d²f/dx_d²``, of shape S.
    """

    value: Any
    gradient: Any
    laplacian: Any


@traceable
def laplacian(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
    mode: Mode = "forward", estimate: Estimate = None, samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:  # fmt: skip
    """``sum_d d²f/dx_d²`` over all coordinates of the primals (at each point), of the shape of f's result.

    The D second coefficients are carried as their sum: 1 + D + 1 channels. Other arguments are those of
    `jetplane.jacobian`.

    As for autograd, derivatives stop at numbers that f reads from tensors (`detach()`, `item()`, comparisons).

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points. f is called with all of them; its result at each must depend on that point
            alone, which is not checked.
        chunk: directions at a time.
        mode: "forward"; "forward-over-reverse" for D Hessian-vector products, for functions that give one number (at
            each point); "auto" for the cheaper one.
        estimate: for an unbiased estimate of few directions: "hutchinson", random signs, drawn for each point; "axes",
            coordinates drawn without replacement, shared by all points.
        samples: directions of the estimate.
        generator: of its random numbers; torch's own by default.

    Returns:
        A tensor of the shape of f's result, (points, 1) for a network with one output and ``batch_dim=0``, or a tree of
        them. With ``has_aux`` ``(laplacian, aux)``.

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
    call = call_of("laplacian", f, primals, argnums, has_aux, batch_dim)
    drawn = sampled(call, estimate, samples, generator)
    k = call.size if drawn is None else drawn.count
    directions = call.axes if drawn is None else drawn.directions
    scale = 1.0 if drawn is None else drawn.scale
    if chosen_mode(mode, call, k + 1, k) == "forward-over-reverse":
        found, aux = _by_products(call, directions, k, chunk)
        return call.result(found * scale, aux)
    got = expanded(call, call.sparse_axes if drawn is None else directions, k, chunk, Sums.trace, remedy=ESTIMATE)
    return call.result(got.tree([y[0] * scale for y in got.second]), got.aux)


def _by_products(call: Call, directions: Callable[[slice], Directions], k: int, chunk: Chunk) -> tuple[Tensor, Any]:
    """The same by Hessian-vector products, ``sum_k v_k . H v_k``."""

    def once(run: slice) -> tuple[Tensor, Any]:
        vs = call.dense(directions(run), run.stop - run.start)
        found, value, aux = products(call, vs)
        terms = [call.contracted(y, v) for y, v in zip(found, vs, strict=True)]
        return torch.stack(terms).sum(0).reshape(value.shape), aux

    terms, auxes = zip(*in_turn(runs_of(k, products_at_a_time(call, chunk, k, ESTIMATE)), once), strict=True)
    return torch.stack(terms).sum(0), auxes[-1]


@traceable
def value_and_laplacian(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> Any:  # fmt: skip
    """Value, gradient and Laplacian of one pass of 1 + D + 1 channels.

    Arguments are those of `jetplane.jacobian`; in chunks each run repeats the value. With ``batch_dim`` f's result at
    a point must depend on that point alone, which is not checked.

    Returns:
        A `ValueAndLaplacian` of ``value`` (*S), ``gradient`` (*S, *X) and ``laplacian`` (*S), for a result of shape S
        and a primal of shape X at one point. A network with one output gives S = (points, 1): compare it with something
        of that shape, or take ``f = lambda x: net(x).squeeze(-1)``. With ``has_aux`` ``(it, aux)``.

    Raises:
        As `laplacian`.

    >>> import torch, jetplane as jp
    >>> found = jp.value_and_laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    >>> found.value, found.gradient, found.laplacian
    (tensor(9.), tensor([ 3., 12.]), tensor(18.))
    """
    call = call_of("value_and_laplacian", f, primals, argnums, has_aux, batch_dim)
    got = expanded(call, call.sparse_axes, call.size, chunk, Sums.trace, gradient=True)
    found = ValueAndLaplacian(
        got.tree(got.value),
        got.tree([blocks(call, y) for y in got.first]),
        got.tree([y[0] for y in got.second]),
    )
    return call.result(found, got.aux)


@traceable
def weighted_laplacian(
    f: Callable[..., Any], primals: Any, sigma: Any, drift: Any = None, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> Any:  # fmt: skip
    """``tr(sigma sigma^T Hess f) + drift . grad f``: the generator of a diffusion, up to a factor, for any r columns.

    The r columns of sigma are the directions, 1 + r + 1 channels; the drift is a second coefficient of the input, which
    costs nothing. Other arguments are those of `jetplane.jacobian`.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        sigma: r columns, (*X, r) for a primal of shape X at one point, in the structure of the primals; with
            ``batch_dim`` also a matrix for each point, (*primal.shape, r). Or a function of the primals that returns
            it. As in the formula, sigma is not differentiated.
        drift: b, of the structure and shapes of the primals, (*X) or one for each point; or a function of the primals.
            None for no drift.
        argnums: which arguments move.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points. f is called with all of them; its result at each must depend on that point
            alone, which is not checked.
        chunk: columns at a time.

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
    call = call_of("weighted_laplacian", f, primals, argnums, has_aux, batch_dim)
    columns = [_columns(s, i, call) for i, s in enumerate(call.flat(_at(sigma, call), "sigma"))]
    vs, r = call.directions(call.tree(columns), "sigma, its columns first,")
    seconds = None
    if drift is not None:
        seconds, _ = call.directions(_at(drift, call), "drift", k=1)
    got = expanded(call, lambda run: [v[run] for v in vs], r, chunk, Sums.trace, drift=seconds)
    return call.result(got.tree([y[0] for y in got.second]), got.aux)


def _at(given: Any, call: Call) -> Any:
    """Sigma or drift at the point."""
    return given(*call.arguments) if callable(given) and not isinstance(given, Tensor) else given


def _columns(sigma: Any, i: int, call: Call) -> Tensor:
    """The columns of a leaf's sigma, as the first axis."""
    if not isinstance(sigma, Tensor):
        raise DTypeError(f"sigma: expected a tensor (*primal.shape, r), got {type(sigma).__name__}")
    if not sigma.dim():
        raise ShapeError("sigma: expected a tensor (*primal.shape, r), got a number; the columns of c I are c * eye")
    whole, point = call.leaves[i].shape, call.shapes[i]
    if sigma.shape[:-1] not in (whole, point):
        shapes = " or ".join(f"({', '.join(map(str, shape))}, r)" for shape in dict.fromkeys((point, whole)))
        forgotten = call.missing_points([]) if sigma.shape[:-1] == whole[1:] else ""
        column = ". One column is sigma.unsqueeze(-1)" if sigma.shape == point else ""
        raise ShapeError(
            f"sigma {i}: expected r columns, shape {shapes}, for a primal of shape {tuple(whole)}, got "
            f"{tuple(sigma.shape)}{forgotten}{column}"
        )
    return sigma.movedim(-1, 0)


@traceable
def bilaplacian(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> Any:  # fmt: skip
    """``sum_ij d⁴f / dx_i² dx_j²``, the Laplacian of the Laplacian, exactly: (D + 2)² channels.

    Arguments are those of `jetplane.jacobian`, where ``batch_dim`` stands for points whose results each depend on that
    point alone, which is not checked; ``chunk`` is of the outer Laplacian's directions, each of which carries
    all D + 2 channels of the inner one.

    Returns:
        A tensor of the shape of f's result, or a tree of them. With ``has_aux`` ``(it, aux)``.

    Raises:
        As `laplacian`.

    >>> import torch, jetplane as jp
    >>> jp.bilaplacian(lambda x: (x**4).sum() + (x[0] * x[1]) ** 2, torch.tensor([1.0, 2.0]))
    tensor(56.)
    """
    call = call_of("bilaplacian", f, primals, argnums, has_aux, batch_dim)

    def inner(*arguments: Any) -> Any:
        moving = call_of("bilaplacian", f, arguments, call.argnums, has_aux, batch_dim)
        got = expanded(moving, moving.axes_around, call.size, call.size, Sums.trace)
        return moving.result(got.tree([y[0] for y in got.second]), got.aux)

    outer = replace(call, f=inner)
    got = expanded(outer, call.axes, call.size, chunk, Sums.trace, width=call.size + 2)
    return call.result(got.tree([y[0] for y in got.second]), got.aux)
