"""Forward gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from ..descent import Descent, ForwardGradient
from .base import Params, PlaneOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@final
class FGD(PlaneOptimizer):
    """Forward gradient descent: ``theta <- theta - lr * mean_k (F_k v_k)``, with ``F_k = grad(L) . v_k``.

    Unbiased, since E[v v^T] = I, and noisy: its variance grows with the number of parameters.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr`` and
            ``weight_decay``. Frozen parameters are left alone.
        lr: the rate.
        k: directions per step.
        law: of the tangents; see `jetplane.Directions`.
        planes: multiplies the number of directions; they are averaged.
        clip: largest Euclidean norm of a step over all parameters, or None.
        weight_decay: decoupled: ``theta <- theta - lr * weight_decay * theta`` beside the step.
        seed: of the directions. Seed and step counter are part of ``state_dict()``.
        compile: run every step but the first as one compiled graph (`torch.compile`, ``fullgraph=True``).
        process_group: of `torch.distributed`, whose ranks have a shard of each batch each, or a `DeviceMesh` with
            the dimensions "data" and "direction"; see `jetplane.distributed`. None, which is also what
            ``torch.distributed.group.WORLD`` is before ``init_process_group()``: this process is alone.

    Raises:
        ArgumentError, DTypeError, DeviceError: settings or parameters that cannot be.

    >>> import torch, jetplane as jp
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> opt = jp.optim.FGD([w], lr=0.1, k=2)
    >>> for _ in range(200):
    ...     loss = opt.step(lambda: (w**2).sum())
    >>> bool(loss < 1e-3)
    True

    Source: Baydin et al., arXiv 2202.08587, algorithm 1.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, k: int = 1, *, law: str = "gaussian", planes: int = 1,
        clip: float | None = None, weight_decay: float = 0.0, seed: int = 0,
        compile: bool = False, process_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, k, law, planes, clip, weight_decay, seed, compile, process_group)

    @property
    def descent(self) -> Descent:
        """The forward gradient."""
        return ForwardGradient()
