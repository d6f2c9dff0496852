"""Derivatives along directions, and first derivatives, by forward jets.

All of these functions nest: ``f`` may itself call them, and they may be called inside a closure that is being
evaluated on a plane. Where grad mode is on, results have a graph to whatever requires grad: see `along`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._torch import records, tree_map, tree_unflatten
from ..errors import ArgumentError, ShapeError
from ..evaluation.compiled import GraphBroken, coefficients, jets_of, tracing
from ..evaluation.context import expansion
from ..evaluation.interception import Interception
from ..evaluation.leaving import plain_result
from ..evaluation.specification import Pairs, PlaneSpec
from ..jets import (
    Coefficients,
    Diagonal,
    Jet,
    PairStructure,
    Space,
    Sparse,
    Sums,
    Tangents,
    carried,
    parts,
    promoted,
)
from .arguments import Argnums, Call, Directions, call_of
from .compiling import traceable
from .costs import Chunk, check_chunk, directions_at_a_time, in_turn, runs_of
from .estimates import Estimate, sampled

_log = logging.getLogger("jetplane.transforms")


@dataclass(frozen=True)
class Expansion:
    """A function's result and its derivatives, leaf by leaf.

    Attributes:
        value: of each leaf.
        first: first coefficients, (K, *S) of each.
        second: second coefficients, (count, *S) of each; empty where they were not wanted.
        spec: the tree that these are the leaves of.
        aux: what the function returned beside its result.
    """

    value: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    spec: Any
    aux: Any

    def tree(self, leaves: Sequence[Any]) -> Any:
        """One thing for each leaf, in the structure of the function's result."""
        return tree_unflatten(list(leaves), self.spec)


def along(
    call: Call,
    tangents: Sequence[Tensor | Tangents | None],
    structure: PairStructure,
    order: int = 2,
    seconds: Sequence[Tensor | None] | None = None,
    gradient: bool = True,
) -> Expansion:
    """Value, first and second coefficients along K directions.

    Where autograd records what is computed, rules run with it and write to no memory that it must see: the results
    have a graph to whatever requires grad, primals, tangents and what f uses beside them.

    Args:
        call: what is differentiated.
        tangents: K for each tensor that moves.
        structure: which second coefficients there are.
        order: 1 leaves them out.
        seconds: second coefficients (count, *shape) of the tensors themselves; none by default.
        gradient: whether the first coefficients of the results are wanted.
    """
    if torch.compiler.is_compiling():
        space, jets = jets_of(call.leaves, tangents, seconds, structure, order)
        try:
            with tracing(space, {}, ()):
                returned = call.at(jets)
        except GraphBroken:
            pass
        else:
            return _of_graph(call, returned, space, order)
    graph = records()
    with expansion(structure, order, recorded=graph) as space:
        leaves = _seeds(call, tangents, seconds, space)
        space.points = call.points is not None
        with Interception(space).running():
            returned = call.at(leaves)
        if space.materialized and any(isinstance(v, Sparse) for v in tangents):
            _log.info("%s: coefficients are dense from %s on", call.name, ", ".join(space.materialized))
        ys, spec, aux = call.outputs(returned)
        found: list[list[Tensor]] = [[], [], []]
        for y in ys:
            p, first, second = _coefficients(y, space)
            found[0].append(p)
            if gradient:
                found[1].append(first.full(p.shape, p.dtype, p.device))
            if order == 2:
                found[2].append(second.full(p.shape, p.dtype, p.device))
        aux = _primals(aux, space)
    if space.level == 1:
        found = [[_released(t) for t in ts] for ts in found]
        aux = _map(_released, aux)
    return Expansion(found[0], found[1], found[2], spec, aux)


def _of_graph(call: Call, returned: Any, space: Space, order: int) -> Expansion:
    """Coefficients of what f returned, in a compiler's graph; without one for reverse mode where grad mode is off."""
    ys, spec, aux = call.outputs(returned)
    found: list[list[Tensor]] = [[], [], []]
    for y in ys:
        value, first, second = map(_as_recorded, coefficients(y, space))
        for into, c, n in ((found[1], first, space.k), (found[2], second, space.structure.count)):
            into.append(value.new_zeros(n, *value.shape, dtype=carried(value.dtype)) if c is None else c)
        found[0].append(value)
    return Expansion(
        found[0],
        found[1],
        found[2] if order == 2 else [],
        spec,
        _map(lambda t: _as_recorded(coefficients(t, space)[0]), aux),
    )


def _as_recorded(t: Any) -> Any:
    return t if t is None or torch.is_grad_enabled() else t.detach()


def blockwise(
    call: Call,
    tangents: Sequence[Tensor | Tangents | None],
    k: int,
    take: Callable[[list[Tensor], list[Tensor]], None],
) -> None:
    """Value and first coefficients of what f yields, block by block: nothing of a block is kept when the next is made.

    Args:
        call: of an f that yields tensors, or trees of them.
        tangents: k for each tensor that moves.
        k: number of directions.
        take: called with the tensors of each block, and their first coefficients (k, *S); jets of an evaluation
            around this one, where they depend on its parameters.
    """
    with expansion(Diagonal(k), 1) as space:
        leaves = _seeds(call, tangents, None, space)
        with Interception(space).running():
            for block in call.at(leaves):
                every = [_coefficients(y, space)[:2] for y in call.outputs(block)[0]]
                pairs = [(p, first.full(p.shape, p.dtype, p.device)) for p, first in every]
                take(*([t if isinstance(t, Jet) else _released(t) for t in ts] for ts in zip(*pairs, strict=True)))


def _coefficients(y: Tensor, space: Space) -> tuple[Tensor, Coefficients, Coefficients]:
    """The value with its first and second coefficients."""
    jet = promoted(y)
    return parts(y if jet is None else jet, space)


def _seeds(
    call: Call, tangents: Sequence[Tensor | Tangents | None], seconds: Sequence[Tensor | None] | None, space: Space
) -> list[Jet]:
    return [
        _seed(x, v, None if seconds is None else seconds[n], space)
        for n, (x, v) in enumerate(zip(call.leaves, tangents, strict=True))
    ]


def expanded(
    call: Call,
    directions: Callable[[slice], Directions],
    k: int,
    chunk: Chunk,
    structure: Callable[[int], PairStructure],
    *,
    order: int = 2,
    gradient: bool = False,
    drift: Sequence[Tensor | None] | None = None,
    remedy: str = "chunk=",
    width: int = 1,
) -> Expansion:
    """Coefficients of the highest order along k directions, some of them at a time.

    Args:
        call: what is differentiated.
        directions: a run of them.
        k: how many there are.
        chunk: at a time.
        structure: the second coefficients of so many directions. Sums add up over the runs; others lie one behind the
            other.
        order: 1 or 2.
        gradient: whether first coefficients are kept beside second ones.
        drift: the second coefficients of the inputs, once.
        remedy: see `directions_at_a_time`.
        width: likewise.
    """

    def once(run: slice) -> Expansion:
        k = run.stop - run.start
        seconds = drift if run.start == 0 else None
        return along(call, directions(run), structure(k), order, seconds, gradient or order == 1)

    runs = runs_of(k, directions_at_a_time(call, chunk, k, remedy, width))
    firsts, seconds, last = [], [], None
    for last in in_turn(runs, once):
        if order == 1 or gradient:
            firsts.append(last.first)
        seconds.append(last.second)
    assert last is not None
    if len(runs) == 1:
        return last
    summed = isinstance(structure(1), Sums)
    first = [torch.cat(ys) for ys in zip(*firsts, strict=True)]
    second = [torch.stack(ys).sum(0) if summed else torch.cat(ys) for ys in zip(*seconds, strict=True)]
    return replace(last, first=first, second=second)


def _seed(x: Tensor, v: Tensor | Tangents | None, second: Tensor | None, space: Space) -> Jet:
    dtype = carried(x.dtype)
    if not space.recorded and not isinstance(x, Jet):
        x = x.detach()
    elif space.recorded and x.is_inference():
        x = x.clone()
    jet = Jet(x, None if v is None else v.to(dtype), None if second is None else second.to(dtype), space)
    jet.is_argument = True
    return jet


def _map(f: Callable[[Tensor], Any], tree: Any) -> Any:
    return tree_map(lambda t: f(t) if isinstance(t, Tensor) else t, tree)


def _primals(aux: Any, space: Space) -> Any:
    def value(t: Tensor) -> Any:
        jet = promoted(t)
        return parts(t if jet is None else jet, space)[0]

    return _map(value, aux)


def _released(t: Tensor) -> Tensor:
    """A tensor of its own instead of a view of internals."""
    return t if t.requires_grad else plain_result(t).clone()


@traceable
def jet(
    f: Callable[..., Any], primals: Any, tangents: Any, pairs: Pairs = "all", order: int = 2, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None,
) -> Any:  # fmt: skip
    """Value, first and second directional derivatives of ``f`` along K directions.

        first[i]     = d/da_i       f(x + sum a v)
        second[i, j] = d²/da_i da_j f(x + sum a v),   at a = 0

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        tangents: K directions in the structure of the primals, each tensor of shape (K, *primal.shape).
        pairs: "all", "diagonal", or the size of independent planes, as in `jetplane.evaluate`.
        order: 1 leaves the second derivatives out (None).
        argnums: which arguments move: an int, or several; all by default. Tangents are those of these arguments.
        has_aux: whether f returns ``(result, aux)``; aux is passed through.
        batch_dim: the axis of points; f's result at each must depend on that point alone, which is not checked.
            Tangents may then be (K, *shape at one point), shared by all points.

    Returns:
        ``(value, first, second)`` of the structure of f's result, with shapes S, (K, *S) and
        (K, K, *S); (K, *S) for the diagonal, (K/b, b, b, *S) for planes of b directions. With ``has_aux``
        ``((value, first, second), aux)``.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: tangents that do not match the primals, results that are
            no tensors, an unknown order.
        DerivativeError: f leaves torch, writes to its arguments, or holds an operator that cannot be carried.

    >>> import torch, jetplane as jp
    >>> x = torch.tensor([1.0, 2.0])
    >>> value, first, second = jp.jet(lambda x: x.prod(), x, torch.eye(2))
    >>> value, first, second
    (tensor(2.), tensor([2., 1.]), tensor([[0., 1.],
            [1., 0.]]))

    Source: Cobb et al., arXiv 2408.10419, section 2 (hyper-dual numbers), for K directions at once.
    """
    if order not in (1, 2) or isinstance(order, bool):
        raise ArgumentError(f"order must be 1 or 2, got {order!r}; derivatives nest: give f that calls jetplane.jet")
    call = call_of("jet", f, primals, argnums, has_aux, batch_dim, real=False)
    vs, k = call.directions(tangents)
    structure = PlaneSpec(k, pairs=pairs).structure
    got = along(call, vs, structure, order)
    second = got.tree([structure.matrix(y) for y in got.second]) if order == 2 else None
    return call.result((got.tree(got.value), got.tree(got.first), second), got.aux)


@traceable
def jvp(
    f: Callable[..., Any], primals: Any, tangents: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Value and derivative along one direction, ``(f(x), J v)``, as `torch.func.jvp`.

    Other arguments are those of `jacobian`.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: the point: a tensor, or a tuple of arguments. They may be complex.
        tangents: the direction v, of the structure and shapes of the primals (of those of ``argnums``).
        argnums: which arguments move.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points; f's result at each must depend on that point alone, which is not checked. v may
            then be shared, of a point's shape.

    Returns:
        ``(value, derivative)``, and aux as a third with ``has_aux``.

    Raises:
        As `jet`.

    >>> import torch, jetplane as jp
    >>> jp.jvp(torch.sin, torch.tensor(0.0), torch.tensor(2.0))
    (tensor(0.), tensor(2.))
    """
    call = call_of("jvp", f, primals, argnums, has_aux, batch_dim, real=False)
    vs, _ = call.directions(tangents, k=1)
    got = along(call, vs, Diagonal(1), 1)
    result = got.tree(got.value), got.tree([y[0] for y in got.first])
    return (*result, got.aux) if has_aux else result


@traceable
def linearize(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> tuple[Any, ...]:  # fmt: skip
    """The value and the linear map ``v -> J v`` at a point, as `torch.func.linearize`.

    The map takes one direction in the structure of the primals, or K of them, (K, *primal.shape), at once. Nothing is
    stored: each call runs f again with its directions, which costs 1 + K evaluations. Arguments are those of
    `jacobian`; with ``batch_dim`` f's result at a point must depend on that point alone, which is not checked.
    ``chunk`` counts directions of the map.

    Returns:
        ``(value, map)``, and aux as a third with ``has_aux``.

    Raises:
        As `jet`; ShapeError also by the map.

    >>> import torch, jetplane as jp
    >>> value, push = jp.linearize(torch.exp, torch.zeros(2))
    >>> value, push(torch.tensor([1.0, 3.0])), push(torch.eye(2))
    (tensor([1., 1.]), tensor([1., 3.]), tensor([[1., 0.],
            [0., 1.]]))
    """
    call = call_of("linearize", f, primals, argnums, has_aux, batch_dim, real=False)
    check_chunk(chunk)
    ys, spec, aux = call.outputs(call.at(call.leaves))

    def push(tangents: Any) -> Any:
        given = call.flat(tangents, "tangents")
        one = all(
            isinstance(v, Tensor) and v.dim() <= x.dim() and v.shape in (x.shape, shape)
            for x, shape, v in zip(call.leaves, call.shapes, given, strict=True)
        )
        vs, k = call.directions(tangents, k=1 if one else None)
        got = expanded(call, lambda run: [v[run] for v in vs], k, chunk, Diagonal, order=1)
        return got.tree([y[0] if one else y for y in got.first])

    value = tree_unflatten(ys, spec)
    return (value, push, aux) if has_aux else (value, push)


@traceable
def jacobian(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
) -> Any:  # fmt: skip
    """The Jacobian of ``f``, exactly: D directions, the total size of the primals (at one point), and 1 + D channels.

    Args:
        f: a function of tensors that returns a tensor, or a tree of tensors.
        primals: where; a tensor, or a tuple of arguments, each of them a tensor or a tree of tensors.
        argnums: which arguments move: an int, or several; all by default.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points in the primals. f is called once with all points, and its result at each must
            depend on that point alone (no batch normalization in training), which is not checked: where it depends on
            other points, their part is missing. D directions then suffice, instead of one for each number of each
            point.
        chunk: directions at a time; "auto" carries all if they surely fit into half of the free memory; None always
            carries all.

    Returns:
        For a result of shape S and a primal of shape X (at one point): (*S, *X), as `torch.func.jacfwd`, in the
        structure of the result, and within it of the primals. With ``has_aux`` ``(jacobian, aux)``.

    Raises:
        As `jet`; ArgumentError: what does not fit into memory, or takes too many runs.

    >>> import torch, jetplane as jp
    >>> jp.jacobian(lambda x: x**2, torch.tensor([1.0, 2.0]))
    tensor([[2., 0.],
            [0., 4.]])
    """
    call = call_of("jacobian", f, primals, argnums, has_aux, batch_dim)
    got = expanded(call, call.sparse_axes, call.size, chunk, Diagonal, order=1)
    return call.result(got.tree([blocks(call, y) for y in got.first]), got.aux)


def blocks(call: Call, stack: Tensor) -> Any:
    """Derivatives (D, *S) as (*S, *X) for each leaf of the primals, in their structure."""
    return call.tree(call.split(stack.movedim(0, -1), -1))


@traceable
def divergence(
    f: Callable[..., Any], primals: Any, *,
    argnums: Argnums = None, has_aux: bool = False, batch_dim: int | None = None, chunk: Chunk = "auto",
    estimate: Estimate = None, samples: int | None = None, generator: torch.Generator | None = None,
) -> Any:  # fmt: skip
    """The divergence ``sum_d dF_d/dx_d`` of a vector field, a function whose result has the shape of its primals.

    Other arguments are those of `jacobian`, and of `laplacian` for estimates.

    Args:
        f: the field; its result has the structure and shapes of the primals that move.
        primals: where; a tensor, or a tuple of arguments.
        argnums: which arguments move.
        has_aux: whether f returns ``(result, aux)``.
        batch_dim: the axis of points. f is called with all of them; its result at each must depend on that point
            alone, which is not checked.
        chunk: directions at a time.
        estimate: "hutchinson" or "axes" for an unbiased estimate.
        samples: directions of the estimate.
        generator: of its random numbers.

    Returns:
        A number, shape (); (points,) with ``batch_dim``. With ``has_aux`` ``(divergence, aux)``.

    Raises:
        As `jacobian`; ShapeError: a result of other shapes than the primals.

    >>> import torch, jetplane as jp
    >>> jp.divergence(lambda x: x**2, torch.tensor([1.0, 2.0]))
    tensor(6.)

    Source: of the estimate, Hutchinson, Commun. Stat. Simul. 18 (1989); in flows, Grathwohl et al., arXiv 1810.01367.
    """
    call = call_of("divergence", f, primals, argnums, has_aux, batch_dim)
    drawn = sampled(call, estimate, samples, generator)
    k = call.size if drawn is None else drawn.count

    def once(run: slice) -> tuple[Tensor, Any]:
        vs = call.axes(run) if drawn is None else drawn.directions(run)
        got = along(call, vs, Diagonal(run.stop - run.start), 1)
        if [y.shape for y in got.value] != [x.shape for x in call.leaves]:
            raise ShapeError(
                f"divergence: expected a result of the primals' shapes {[tuple(x.shape) for x in call.leaves]}, "
                f"got {[tuple(y.shape) for y in got.value]}"
            )
        terms = [call.contracted(y, v) for y, v in zip(got.first, vs, strict=True) if v is not None]
        return torch.stack(terms).sum(0), got.aux

    terms, auxes = zip(*in_turn(runs_of(k, directions_at_a_time(call, chunk, k)), once), strict=True)
    found = torch.stack(terms).sum(0)
    return call.result(found if drawn is None else found * drawn.scale, auxes[-1])
