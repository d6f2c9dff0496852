"""One evaluation of a closure on a plane: loss, slope and curvature along K directions.

    slope[i]        = grad(L) . v_i
    curvature[i, j] = v_i^T Hess(L) v_j

The closure runs once, unmodified. Wherever an operator takes a parameter, it gets the parameter's jet, and jets carry
the derivatives through: nothing is stored for a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..directions import AbstractDirections
from ..jets import Tangents
from .checks import as_directions, checked_arguments
from .chunks import evaluate_in_chunks
from .compiled import GraphBroken, jets_of_parameters, plane_of, tracing
from .eager import evaluate_at_once
from .plane import PlaneModel
from .side_effects import setting_back
from .specification import Chunk, Curvature, Pairs, PlaneSpec


def evaluate(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    directions: AbstractDirections | Sequence[Tensor | Tangents],
    curvature: Curvature = "hessian",
    pairs: Pairs = "all",
    *,
    examples: bool = False,
    chunk: Chunk = None,
    memory: int | None = None,
    generators: Sequence[Any] = (),
) -> PlaneModel:
    """Run a closure once on the plane that directions span at the parameters.

    Args:
        closure: returns a scalar loss, computed by torch functions of the parameters.
        params: the tensors that move; others are constants. A complex tensor moves along complex tangents, like its
            real and imaginary parts as two real tensors.
        directions: `jetplane.Directions`, or for each parameter one tensor of shape (K, *param.shape) or
            `jetplane.LowRank`.
        curvature: "hessian" for exact curvature; "ggn" for Gauss-Newton curvature, ``J^T Hess(l) J`` with J
            the model's Jacobian and l the loss function, whose number of products is linear in K: one of
            ``torch.nn.functional``, a sum of squares or log-probabilities, or marked with `jetplane.loss`; "none" for
            the slope alone.
        pairs: "all" K(K+1)/2 pairs, "diagonal", or an int b for independent planes of b consecutive
            directions each.
        examples: also give each example's part of the slope, ``examples[n, i] = grad(L_n) . v_i`` with
            ``L = sum_n L_n``, at next to no cost. Examples are counted along the first axis of the input of the loss
            function. Their parts are known for torch's own losses, times constants and in sums; with "ggn" and "none"
            also beside regularizers and for sums of squares and log-probabilities, with "ggn" for losses marked with
            `jetplane.loss`. Otherwise None.
        chunk: directions to carry at a time; all by default. The closure then runs once for each chunk, and
            for all pairs of exact curvature once for each two halves of chunks: the same numbers with less
            memory. With "ggn", parameters and losses carry all directions at once, and the model a chunk of
            them. All runs but the last have no side effects: random numbers are drawn again, and buffers are
            restored. "auto" takes the largest chunk that ``memory`` allows, judged by the activations that one plain
            run keeps alive.
        memory: bytes for "auto"; by default half of the free memory.
        generators: random generators that the closure uses besides torch's own and the global ones of NumPy and
            `random`: `torch.Generator`, `numpy.random.Generator`, `numpy.random.RandomState`, `random.Random`. They are
            reset between runs.

    Returns:
        A `PlaneModel` of detached tensors, float32 at least.

    Raises:
        ArgumentError: no parameters, k < 1, pairs that do not divide k, an unknown word, or a chunk below 1 (below 2
            for all pairs) or not a multiple of the size of a plane.
        ShapeError, DTypeError, DeviceError: directions that do not match their parameter.
        LossError: the closure did not return a scalar floating-point tensor.
        UnknownLossError: ("ggn") its loss function is not known; see `jetplane.loss`.
        RandomClosureError: the closure gave different losses in several runs.
        UnusedParametersError: the loss depends on none of the parameters.
        NonFiniteError: NaN or infinity in the loss, slope or curvature.
        DerivativeError: the closure leaves torch, calls autograd, or writes to a parameter.

    Parameters are never modified, even if an error is raised.

    >>> import torch, jetplane as jp
    >>> w = torch.tensor([1.0, 2.0])
    >>> plane = jp.evaluate(lambda: (w**3).sum(), [w], [torch.eye(2)])
    >>> plane.slope, plane.curvature
    (tensor([ 3., 12.]), tensor([[ 6.,  0.],
            [ 0., 12.]]))

    Source: Cobb et al., arXiv 2408.10419, sections 2 and 3.
    """
    params = checked_arguments(closure, params)
    along = as_directions(params, directions)
    spec = PlaneSpec(along.k, curvature, pairs, examples, chunk, memory)
    if not generators:
        return evaluate_plane(closure, params, along, spec)
    with setting_back(generators):
        return evaluate_plane(closure, params, along, spec)


def evaluate_plane(
    closure: Callable[[], Tensor], params: Sequence[Tensor], directions: AbstractDirections, spec: PlaneSpec
) -> PlaneModel:
    """`evaluate` for a given specification, whose arguments have been checked.

    Raises:
        As `evaluate`.
    """
    if torch.compiler.is_compiling():
        structure = spec.structure
        space, jets = jets_of_parameters(params, directions, structure, spec)
        try:
            with tracing(space, jets, params):
                loss = closure()
        except GraphBroken:
            pass
        else:
            return plane_of(loss, space, spec)
    run = evaluate_at_once if spec.chunk is None else evaluate_in_chunks
    return run(closure, params, directions, spec)
