"""Estimates of the gradient by the error of a frozen read-out, carried down the residual stream.

Where the read-out W of a causal model does not train, the error at the state h that it reads is known in closed form,

    dL/dh = W^T (softmax(W h) - y)

and the blocks below have added their parts to a stream that ends in h (after a norm, if there is one):

    u_i = u_{i-1} + f_i(norm(u_{i-1})),    f_i attention or a feed-forward network

The estimate takes the derivative of u_i with respect to u_{i-1} to be one: the error reaches the output of each f_i
along the stream alone, and what later f_j make of u_i is left out. Within the sublayer f_i, with its norm, the
derivative is exact, by reverse mode; it ends at the sublayer's input. So no gradient crosses a sublayer, and one
pass gives the estimate. It is exact for what follows the last sublayer and within the last one, and biased elsewhere.
What a plane makes of it is judged by the model's loss.

Sources: direct feedback, Nøkland, arXiv 1609.01596, whose fixed random matrices the stream and W replace; reading the
stream by the model's own read-out, as in early exits (arXiv 1709.01686); local losses for each block of layers, arXiv
1901.06656.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..._torch import tree_leaves, tree_map
from ...errors import ArgumentError
from ...gradients import Batch, Estimate, Estimator, without_side_effects
from .classifier import TextClassifier


@final
@dataclass(frozen=True)
class StreamError(Estimator):
    """The error of a frozen read-out, along the residual stream of a `TextClassifier`: see `finetune.stream`.

    Raises:
        ArgumentError: (in the first step) the error reaches some parameters in no way.
    """

    alone = True

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """See `Estimator`: how many parameters move."""
        return str(len(params))

    def prepare(self, batch: Batch, state: dict[str, Any]) -> dict[str, Any]:
        """See `Estimator`: nothing is chosen; what cannot be estimated is refused.

        Raises:
            ArgumentError: the error does not reach all parameters.
        """
        with without_side_effects():
            _, found = _run(batch)
        lost = [tuple(p.shape) for p, g in zip(batch.params, found, strict=True) if g is None]
        if lost:
            raise ArgumentError(
                f"the error of the read-out does not reach {len(lost)} of {len(found)} parameters along the residual "
                f"stream, shapes {lost[:4]}: these blocks are put together in another way. Take --method perturbation"
            )
        return state

    def shapes(self, batch: Batch, state: dict[str, Any]) -> Sequence[torch.Size]:
        """See `Estimator`: those of the parameters, and the loss."""
        return [*(p.shape for p in batch.params), torch.Size(())]

    def measure(self, batch: Batch, state: dict[str, Any]) -> Sequence[Tensor]:
        """See `Estimator`."""
        with contextlib.nullcontext() if batch.plane is None else without_side_effects():
            loss, found = _run(batch)
        return [*(torch.zeros_like(p) if g is None else g for p, g in zip(batch.params, found, strict=True)), loss]

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: dict[str, Any]) -> Estimate:
        """See `Estimator`."""
        return Estimate(means[:-1], state, means[-1])


def _run(batch: Batch) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The loss, and the derivative that stays within sublayers."""
    assert isinstance(batch.model, TextClassifier)
    with torch.enable_grad(), _apart(batch.model.blocks):
        loss = batch.closure()
        return loss.detach(), torch.autograd.grad(loss, list(batch.params), allow_unused=True)


@contextlib.contextmanager
def _apart(blocks: nn.ModuleList) -> Iterator[None]:
    """Run blocks so that no derivative goes from a sublayer to the stream that it reads, besides the first sublayer.

    What a child of a block takes is the stream if no other child of it has put it out: the states that enter the
    block, or a sum. The first sublayer reads states that nothing but a prefix trains.
    """
    entered: list[Tensor] = []  # what enters the first block
    put_out: list[Tensor] = []  # by children of the block that runs

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        put_out.clear()
        if block is blocks[0]:
            entered[:] = _tensors((args, kwargs))

    def take(child: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def own(x: Any) -> Any:
            stream = isinstance(x, Tensor) and not any(x is y for y in (*entered, *put_out))
            return x.detach() if stream else x

        return tree_map(own, (args, kwargs))

    def put(child: nn.Module, args: Any, out: Any) -> None:
        put_out.extend(_tensors(out))

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    for block in blocks:
        for child in block.children():
            hooks += [child.register_forward_pre_hook(take, with_kwargs=True), child.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(x: Any) -> list[Tensor]:
    return [y for y in tree_leaves(x) if isinstance(y, Tensor)]
