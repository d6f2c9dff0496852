"""Bases of what linear layers take in, and directions in their span.

The gradient of a linear layer's weight is ``sum_n e_n x_n^T``: its rows lie in the span of the inputs x_n of the batch.
A direction ``R A^T``, with A an orthonormal basis of what they mostly span, leaves out what no gradient has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import DisableTorchFunction, no_dispatch
from ..directions import Directions, SpannedDirections
from ..errors import ArgumentError, NonFiniteError
from ..jets import carried
from .leaving import plain_run
from .side_effects import without_side_effects

ITERATIONS = 3  # of the power method, each a product with the inputs and one with their transpose
INPUTS_OF_ONE = (
    'tangents="inputs" needs the batch of one process, since shards have inputs of their own: take "rank-one" with '
    "process_group"
)


def input_bases(
    closure: Callable[[], Any], params: Sequence[Tensor], rank: int = 1, seed: int = 0
) -> dict[int, Tensor]:
    """An orthonormal basis of what each linear layer's inputs mostly span, by a run of the closure.

        A <- orth(sum_n x_n x_n^T A),    three times from a random start

    Args:
        closure: calls `torch.nn.functional.linear` with parameters; its side effects are undone.
        params: whose bases are wanted.
        rank: number of columns of A, at most that of inputs and of their features.
        seed: of the start.

    Returns:
        Matrices (features, rank) by the places of parameters. Those that `linear` does not take have none.

    Raises:
        ArgumentError: rank < 1.
        NonFiniteError: inputs that are NaN or infinite.

    >>> import torch
    >>> w, x = torch.ones(3, 2), torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> input_bases(lambda: torch.nn.functional.linear(x, w).sum(), [w])[0].abs()
    tensor([[0.6000],
            [0.8000]])

    Source: AGZO, arXiv 2601.17261.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ArgumentError(f"rank must be an integer of at least 1, got {rank!r}")
    met = _Inputs(params, rank, seed)
    with torch.no_grad(), without_side_effects(), plain_run(params, again=True), met:
        closure()
    return met.bases


def in_span(
    k: int, law: str, seed: int, step: int, closure: Callable[[], Any], params: Sequence[Tensor],
    places: Sequence[int], rank: int = 1,
) -> SpannedDirections:  # fmt: skip
    """K directions of a step in the span of linear layers' inputs; see `input_bases` and `SpannedDirections`."""
    source = Directions(k, law, "dense", seed)
    source.step = step
    found = input_bases(closure, params, rank, seed + step)
    return SpannedDirections(source, {places[i]: basis for i, basis in found.items()})


@final
class _Inputs(TorchFunctionMode):
    """Meets the inputs of linear layers; of several calls with one weight they are put together."""

    def __init__(self, params: Sequence[Tensor], rank: int, seed: int) -> None:
        super().__init__()
        self.bases: dict[int, Tensor] = {}
        self._places = {id(p): i for i, p in enumerate(params)}
        self._rank = rank
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._met: dict[int, Tensor] = {}  # (rank, features): bases, each vector as long as the inputs along it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = [*args, *(kwargs or {}).values()][:2]
            place = self._places.get(id(weight))
            if place is not None and isinstance(x, Tensor) and x.numel():
                with DisableTorchFunction(), no_dispatch():
                    self._meet(place, x.detach().reshape(-1, x.shape[-1]).to(carried(weight.dtype)))
        return func(*args, **(kwargs or {}))

    def _meet(self, place: int, x: Tensor) -> None:
        if place in self._met:
            x = torch.cat([self._met[place], x])
        if not bool(x.isfinite().all()):
            raise NonFiniteError(f"a linear layer, parameter {place}, takes inputs that are NaN or infinite")
        start = torch.randn(x.shape[1], min(self._rank, *x.shape), generator=self._generator).to(x)
        basis = torch.linalg.qr(start).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(x.mT @ (x @ basis)).Q
        self.bases[place] = basis
        self._met[place] = (x @ basis).norm(dim=0).unsqueeze(1) * basis.mT
