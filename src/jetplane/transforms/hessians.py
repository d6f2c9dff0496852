"""Second derivatives of functions: products with the Hessian, its diagonal, and the Hessian itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import records
from ..evaluation.chunks import by_direction, chunks_of
from ..evaluation.side_effects import without_side_effects
from ..jets import AllPairs, Diagonal, Partial, Star, Tangents
from .arguments import Argnums, Point, check_scalar, point
from .compiling import uncompiled
from .costs import (
    REVERSE_COST,
    Chunk,
    Mode,
    check_memory,
    chosen_mode,
    directions_at_a_time,
    in_runs,
)
from .forward import Expansion, along, blocks, with_aux
from .reverse import products

REVERSE = "hvp(..., mode='forward-over-reverse')"


@uncompiled
def hvp(
    f: Callable[..., Tensor],
    primals: Any,
    v: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
    chunk: Chunk = "auto",
    mode: Mode = "forward",
) -> Any:
    """The Hessian-vector product ``Hess(f) v`` of a function that gives one number.

    - ``mode="forward"``: component d is ``e_d^T Hess(f) v``, D + 1 first coefficients and the D second ones of pairs
      with v; no graph, and memory of ``chunk`` directions.
    - ``mode="forward-over-reverse"``: two passes of reverse mode: the time of some evaluations
      whatever D is, and the memory of a backward pass.
    - ``mode="auto"``: the cheaper one that is allowed; the log of ``jetplane.transforms`` says which.

    Args:
        f: a function of tensors that returns one number (at each point).
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        v: one vector in the structure and shapes of the primals (of those of ``argnums``).
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points: one product for each, see `jacobian`. v may be shared, of a point's shape.
        chunk: directions at a time in forward mode, see `jacobian`.
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
    where = point(primals, argnums, batch_dim)
    vectors, _ = where.directions(v, "v", k=1)
    mode = chosen_mode(mode, where, "hvp", 2 * where.size + 1, 1)
    if mode == "forward-over-reverse":
        found, _, aux = products(f, where, vectors, has_aux)
        return with_aux(where.tree([t[0] for t in found]), aux, has_aux)
    size = directions_at_a_time(chunk, "hvp", where, where.size, f, REVERSE + " or chunk=")

    def once(run: slice) -> Expansion:
        together = [_beside(e, t, run.stop - run.start) for e, t in zip(where.axes(run), vectors, strict=True)]
        got = along(f, where, together, Star(run.stop - run.start + 1), has_aux=has_aux)
        check_scalar(where, got.value, "hvp")
        return got

    parts = list(in_runs(where.size, size, once))
    return with_aux(where.like_primals(torch.cat([part.second[0] for part in parts])), parts[-1].aux, has_aux)


def _beside(axes: Tensor | Tangents | None, v: Tensor, k: int) -> Tensor | Tangents:
    """The coordinate directions with v as the last one."""
    if axes is None:
        return Partial(k + 1, (k,), v)
    if isinstance(axes, Partial):
        assert isinstance(axes.tangents, Tensor)
        return Partial(k + 1, (*axes.rows, k), torch.cat([axes.tangents, v]))
    assert isinstance(axes, Tensor)
    return torch.cat([axes, v])


@uncompiled
def vhv(
    f: Callable[..., Any],
    primals: Any,
    v: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
) -> Any:
    """``v^T Hess(f) v``, of the shape of f's result: three channels, whatever the number of coordinates is.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments.
        v: one vector in the structure and shapes of the primals (of those of ``argnums``).
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points; v may then be shared, of a point's shape.

    Raises:
        As `jet`.

    >>> import torch, jetplane as jp
    >>> jp.vhv(lambda x: x.prod(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    where = point(primals, argnums, batch_dim)
    vectors, _ = where.directions(v, "v", k=1)
    got = along(f, where, vectors, Diagonal(1), has_aux=has_aux)
    return with_aux(got.tree([y[0] for y in got.second]), got.aux, has_aux)


@uncompiled
def hessian_diagonal(
    f: Callable[..., Any],
    primals: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
    chunk: Chunk = "auto",
) -> Any:
    """The diagonal of the Hessian, ``d²f / dx_d²`` for each coordinate: 1 + 2D channels.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points, see `jacobian`.
        chunk: directions at a time, see `jacobian`.

    Returns:
        For a result of shape S and a primal of shape X (at one point): (*S, *X), in the structure of the result, and
        within it of the primals. With ``has_aux`` ``(diagonal, aux)``.

    Raises:
        As `jet`; ArgumentError: what does not fit into memory.

    >>> import torch, jetplane as jp
    >>> jp.hessian_diagonal(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    tensor([ 6., 12.])
    """
    where = point(primals, argnums, batch_dim)
    size = directions_at_a_time(chunk, "hessian_diagonal", where, where.size, f)
    got = list(
        in_runs(
            where.size,
            size,
            lambda run: along(f, where, where.axes(run), Diagonal(run.stop - run.start), has_aux=has_aux),
        )
    )
    last = got[-1]
    found = last.tree([blocks(where, torch.cat(ys)) for ys in zip(*(g.second for g in got), strict=True)])
    return with_aux(found, last.aux, has_aux)


@uncompiled
def hessian(
    f: Callable[..., Any],
    primals: Any,
    *,
    argnums: Argnums = None,
    has_aux: bool = False,
    batch_dim: int | None = None,
    chunk: Chunk = "auto",
    mode: Mode = "forward",
) -> Any:
    """The Hessian of ``f``, exactly.

    - ``mode="forward"``: D directions and their D(D+1)/2 pairs, in runs of at most ``chunk`` directions, in which
      every two of them meet.
    - ``mode="forward-over-reverse"``: D Hessian-vector products, ``chunk`` at a time; for functions that give one
      number (at each point).
    - ``mode="auto"``: the cheaper one that is allowed; the log of ``jetplane.transforms`` says which.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points: one Hessian for each, see `jacobian`.
        chunk: directions at a time, see `jacobian`.
        mode: see above.

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
    where = point(primals, argnums, batch_dim)
    d = where.size
    check_memory("hessian", where, d * where.bytes, f"use {REVERSE}, hessian_diagonal, or laplacian")
    mode = chosen_mode(mode, where, "hessian", d + d * (d + 1) // 2, d)
    if mode == "forward-over-reverse":
        return _by_products(f, where, chunk, has_aux)
    pairs = d * (d + 1) // 2 + d
    size = directions_at_a_time(chunk, "hessian", where, pairs, f, "hessian(..., mode='forward-over-reverse')")
    if size < pairs and chunk == "auto":  # so many coefficients, of which c directions have c (c + 3) / 2
        size = max(2, int((2 * size + 2.25) ** 0.5 - 1.5))
    if size >= d:
        got = along(f, where, where.axes(), AllPairs(d), has_aux=has_aux)
        return with_aux(got.tree([_square(where, AllPairs(d).matrix(y)) for y in got.second]), got.aux, has_aux)
    chunks, found = chunks_of(d, max(size, 2), crossed=True), []
    for n, chunk_ in enumerate(chunks):
        numbers = torch.cat([torch.arange(d)[run] for run in chunk_])
        structure = AllPairs(len(numbers))
        if n + 1 < len(chunks):
            with without_side_effects():
                got = along(f, where, where.axes(which=numbers), structure, has_aux=has_aux)
        else:
            got = along(f, where, where.axes(which=numbers), structure, has_aux=has_aux)
        found.append((got, [structure.matrix(y) for y in got.second]))
    last = found[-1][0]
    joined = [by_direction(d, chunks, pieces, square=True) for pieces in zip(*(m for _, m in found), strict=True)]
    return with_aux(last.tree([_square(where, h) for h in joined]), last.aux, has_aux)


def _square(where: Point, h: Tensor) -> Any:
    """Second derivatives (D, D, *S) as blocks (*S, *X_a, *X_b) in trees of the primals within trees."""
    h = h.movedim((0, 1), (-2, -1))
    return where.tree([where.tree(where.split(row, -1)) for row in where.split(h, -2)])


def _by_products(f: Callable[..., Any], where: Point, chunk: Chunk, has_aux: bool) -> Any:
    """The Hessian of a function that gives one number, by its products with the coordinate directions."""
    if records() and chunk == "auto":
        size = where.size
    else:
        size = directions_at_a_time(chunk, "hessian", where, REVERSE_COST * where.size, f, "hessian_diagonal")
        size = max(1, size // REVERSE_COST) if chunk in ("auto", None) else size

    def once(run: slice) -> tuple[list[Tensor], Tensor, Any]:
        return products(f, where, where.dense(where.axes(run), run.stop - run.start), has_aux, "hessian")

    parts = list(in_runs(where.size, size, once))
    _, value, aux = parts[-1]
    columns = []
    for n, size_ in enumerate(where.sizes):
        column = torch.cat([found[n] for found, _, _ in parts])  # (D, *x.shape)
        if where.batch_dim is not None:
            column = column.movedim(where.batch_dim + 1, 1)
        columns.append(column.reshape(where.size, *value.shape, size_))
    return with_aux(_square(where, torch.cat(columns, -1).movedim(-1, 1)), aux, has_aux)
