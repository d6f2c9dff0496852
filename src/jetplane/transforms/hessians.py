"""Second derivatives of functions: products with the Hessian, its diagonal, quadratic forms, and the Hessian itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..evaluation.chunks import by_direction, chunks_of
from ..evaluation.specification import Pairs, PlaneSpec
from ..jets import AllPairs, Diagonal, Partial, Star, Tangents
from .arguments import Argnums, Call, Directions, call_of
from .compiling import traceable
from .costs import (
    Chunk,
    Mode,
    check_memory,
    chosen_mode,
    directions_at_a_time,
    in_turn,
    products_at_a_time,
    runs_of,
)
from .forward import Expansion, along, blocks, expanded
from .reverse import products

REVERSE = "hvp(..., mode='forward-over-reverse')"


@traceable
def hvp(
    f: Callable[..., Tensor], primals: Any, v: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
    mode: Mode = "forward",
) -> Any:  # fmt: skip
    """The Hessian-vector product ``Hess(f) v`` of a function that gives one number.

    - ``mode="forward"``: component d is ``e_d^T Hess(f) v``, D + 1 first coefficients and the D second ones of pairs
      with v; no graph, and memory of ``chunk`` directions.
    - ``mode="forward-over-reverse"``: two passes of reverse mode: the time of some evaluations
      for any D, and the memory of a backward pass.
    - ``mode="auto"``: the cheaper one that is allowed; the log of ``jetplane.transforms`` says which.

    Other arguments are those of `jetplane.jacobian`.

    Args:
        f: a function of tensors that returns one number (at each point).
        primals: where; a tensor, or a tuple of arguments.
        v: one vector in the structure and shapes of the primals (of those of ``argnums``).
        argnums: which arguments move.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points: one product for each. f's result at each must depend on that point alone,
            which is not checked. v may be shared, of a point's shape.
        chunk: directions at a time in forward mode.
        mode: see above.

    Returns:
        The product, in the structure and shapes of the primals. With ``has_aux`` ``(product, aux)``.

    Raises:
        As `jet`; ShapeError: f gives more than one number. ArgumentError: what does not fit into memory, or takes too
            many runs.

    >>> import torch, jetplane as jp
    >>> jp.hvp(lambda x: x.prod(), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0]))
    tensor([0., 3., 2.])
    """
    call = call_of("hvp", f, primals, argnums, has_aux, batch_dim)
    vectors, _ = call.directions(v, "v", k=1)
    if chosen_mode(mode, call, 2 * call.size + 1, 1) == "forward-over-reverse":
        found, _, aux = products(call, vectors)
        return call.result(call.tree([t[0] for t in found]), aux)

    def beside(run: slice) -> Directions:
        k = run.stop - run.start
        return [_beside(e, t, k) for e, t in zip(call.axes(run), vectors, strict=True)]

    got = expanded(call, beside, call.size, chunk, lambda k: Star(k + 1), remedy=REVERSE + " or chunk=")
    call.check_scalar(got.value)
    return call.result(call.like_primals(got.second[0]), got.aux)


def _beside(axes: Tensor | Tangents | None, v: Tensor, k: int) -> Tensor | Tangents:
    """The coordinate directions with v as the last one."""
    if axes is None:
        return Partial(k + 1, (k,), v)
    if isinstance(axes, Partial):
        assert isinstance(axes.tangents, Tensor)
        return Partial(k + 1, (*axes.rows, k), torch.cat([axes.tangents, v]))
    assert isinstance(axes, Tensor)
    return torch.cat([axes, v])


@traceable
def vhv(
    f: Callable[..., Any], primals: Any, v: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None,
) -> Any:  # fmt: skip
    """``v^T Hess(f) v``, of the shape of f's result: three channels for any number of coordinates.

    For one vector, without chunks; `quadratic_form` takes several. Other arguments are those of `jetplane.jacobian`.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments.
        v: one vector in the structure and shapes of the primals (of those of ``argnums``).
        argnums: which arguments move.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points; f's result at each must depend on that point alone, which is not checked. v may
            then be shared, of a point's shape.

    Returns:
        A tensor of the shape of f's result, or a tree of them. With ``has_aux`` ``(it, aux)``.

    Raises:
        As `jet`.

    >>> import torch, jetplane as jp
    >>> jp.vhv(lambda x: x.prod(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    call = call_of("vhv", f, primals, argnums, has_aux, batch_dim)
    vectors, _ = call.directions(v, "v", k=1)
    got = along(call, vectors, Diagonal(1))
    return call.result(got.tree([y[0] for y in got.second]), got.aux)


@traceable
def quadratic_form(
    f: Callable[..., Any], primals: Any, tangents: Any, pairs: Pairs = "all", *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> Any:  # fmt: skip
    """``v_i^T Hess(f) v_j`` along K directions.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments. They may be complex.
        tangents: K directions, as in `jet`.
        pairs: "all", "diagonal", or the size of independent planes.
        argnums: which arguments move, see `jetplane.jacobian`.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points. f is called with all of them; its result at each must depend on that point
            alone, which is not checked.
        chunk: directions at a time; with planes a multiple of their size.

    Returns:
        (K, K, *S) for results of shape S; (K, *S) for the diagonal, (K/b, b, b, *S) for planes of b directions. With
        ``has_aux`` ``(it, aux)``.

    Raises:
        As `jet`; ArgumentError: what does not fit into memory, or a chunk that divides a plane.

    >>> import torch, jetplane as jp
    >>> jp.quadratic_form(lambda x: (x**2).sum(), torch.zeros(3), torch.eye(3), pairs="diagonal")
    tensor([2., 2., 2.])
    """
    call = call_of("quadratic_form", f, primals, argnums, has_aux, batch_dim, real=False)
    vs, k = call.directions(tangents)
    spec = PlaneSpec(k, pairs=pairs)
    if pairs == "all":
        got = _all_pairs(call, lambda numbers: [v[numbers] for v in vs], k, chunk, "pairs='diagonal' or chunk=")
        return call.result(got.tree(got.second), got.aux)
    block = spec.block
    if type(chunk) is int and chunk % block:
        raise ArgumentError(f"chunk must be a multiple of the {block} directions of a plane, got {chunk}")

    def planes(run: slice) -> Directions:
        return [v[run.start * block : run.stop * block] for v in vs]

    size = chunk // block if type(chunk) is int else chunk
    structure = lambda n: spec.restricted(n * block).structure  # noqa: E731
    got = expanded(call, planes, k // block, size, structure, width=(block + 3) // 2)
    return call.result(got.tree([spec.structure.matrix(y) for y in got.second]), got.aux)


@traceable
def hessian_diagonal(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> Any:  # fmt: skip
    """The diagonal of the Hessian, ``d²f / dx_d²`` for each coordinate: 1 + 2D channels.

    Arguments are those of `jetplane.jacobian`. With ``batch_dim`` f's result at a point must depend on that point
    alone, which is not checked.

    Returns:
        For a result of shape S and a primal of shape X (at one point): (*S, *X), in the structure of the result, and
        within it of the primals. With ``has_aux`` ``(diagonal, aux)``.

    Raises:
        As `jacobian`.

    >>> import torch, jetplane as jp
    >>> jp.hessian_diagonal(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    tensor([ 6., 12.])
    """
    call = call_of("hessian_diagonal", f, primals, argnums, has_aux, batch_dim)
    got = expanded(call, call.axes, call.size, chunk, Diagonal, width=2)
    return call.result(got.tree([blocks(call, y) for y in got.second]), got.aux)


@traceable
def hessian(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
    mode: Mode = "forward",
) -> Any:  # fmt: skip
    """The Hessian of ``f``, exactly, for functions that give one number or many.

    - ``mode="forward"``: D first coefficients and D(D + 1)/2 second ones; in chunks any two directions meet once.
    - ``mode="forward-over-reverse"``: D Hessian-vector products, ``chunk`` at a time; for functions that give one
      number (at each point).
    - ``mode="auto"``: the cheaper one that is allowed; the log of ``jetplane.transforms`` says which.

    Arguments are those of `jetplane.jacobian`. With ``batch_dim`` f's result at a point must depend on that point
    alone, which is not checked.

    Returns:
        For a result of shape S and a primal of shape X (at one point): (*S, *X, *X), as `torch.func.hessian`; for trees
        of primals, trees of blocks within trees, ``h[a][b]`` of shape (*S, *X_a, *X_b). With ``has_aux``
        ``(hessian, aux)``.

    Raises:
        As `jet`; ArgumentError: a Hessian, or coefficients, that do not fit into memory.

    >>> import torch, jetplane as jp
    >>> jp.hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 2.0]))
    tensor([[4., 2.],
            [2., 0.]])
    >>> jp.hessian(lambda p: (p["a"] * p["b"]).sum(), {"a": torch.ones(1), "b": torch.ones(1)})["a"]["b"]
    tensor([[1.]])
    """
    call = call_of("hessian", f, primals, argnums, has_aux, batch_dim)
    d = call.size
    check_memory(call, d * call.bytes, f"{REVERSE}, hessian_diagonal, or laplacian")
    if chosen_mode(mode, call, d + d * (d + 1) // 2, d) == "forward-over-reverse":
        return _by_products(call, chunk)
    remedy = "hessian(..., mode='forward-over-reverse')"
    got = _all_pairs(call, lambda numbers: call.axes(which=numbers), d, chunk, remedy)
    return call.result(got.tree([_square(call, h) for h in got.second]), got.aux)


def _all_pairs(call: Call, pick: Callable[[list[int]], Directions], k: int, chunk: Chunk, remedy: str) -> Expansion:
    """Second derivatives along every two of k directions, (K, K, *S), by runs in which each two of them meet."""
    coefficients = k * (k + 3) // 2
    size = directions_at_a_time(call, chunk, coefficients, remedy)
    if size < coefficients and chunk == "auto":  # so many coefficients, of which c directions have c (c + 3) / 2
        size = max(2, int((2 * size + 2.25) ** 0.5 - 1.5))
    chunks = [[slice(0, k)]] if size >= k else chunks_of(k, max(size, 2), crossed=True)

    def once(runs: list[slice]) -> Expansion:
        numbers = [n for run in runs for n in range(k)[run]]
        structure = AllPairs(len(numbers))
        got = along(call, pick(numbers), structure)
        return replace(got, first=[], second=[structure.matrix(y) for y in got.second])

    parts = list(in_turn(chunks, once))
    if len(parts) == 1:
        return parts[0]
    pieces = zip(*(part.second for part in parts), strict=True)
    return replace(parts[-1], second=[by_direction(k, chunks, p, square=True) for p in pieces])


def _square(call: Call, h: Tensor) -> Any:
    """Second derivatives (D, D, *S) as blocks (*S, *X_a, *X_b) in trees of the primals within trees."""
    h = h.movedim((0, 1), (-2, -1))
    return call.tree([call.tree(call.split(row, -1)) for row in call.split(h, -2)])


def _by_products(call: Call, chunk: Chunk) -> Any:
    """The Hessian of a function that gives one number, by its products with the coordinate directions."""

    def once(run: slice) -> tuple[list[Tensor], Tensor, Any]:
        return products(call, call.dense(call.axes(run), run.stop - run.start))

    size = products_at_a_time(call, chunk, call.size, "hessian_diagonal")
    parts = list(in_turn(runs_of(call.size, size), once))
    _, value, aux = parts[-1]
    columns = []
    for n, numbers in enumerate(call.sizes):
        column = torch.cat([found[n] for found, _, _ in parts])  # (D, *x.shape)
        if call.batch_dim is not None:
            column = column.movedim(call.batch_dim + 1, 1)
        columns.append(column.reshape(call.size, *value.shape, numbers))
    return call.result(_square(call, torch.cat(columns, -1).movedim(-1, 1)), aux)
