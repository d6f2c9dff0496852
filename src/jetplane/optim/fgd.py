"""Forward gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from ..directions import AbstractDirections, Structure
from ..errors import ArgumentError
from ..evaluation.audit import Auditing
from ..evaluation.plane import PlaneModel
from ..subspace.descent import Descent, ForwardGradient
from .base import Chunk, Closure, Moving, Params, PlaneOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@final
class FGD(PlaneOptimizer):
    """Forward gradient descent: ``theta <- theta - lr * mean_k (F_k v_k)``, with ``F_k = grad(L) . v_k``.

    The estimate is unbiased, since E[v v^T] = I, and noisy: its variance grows with the number of parameters, so the
    rate must shrink with that number (`jetplane.step_scale`). Momentum is that of the heavy ball: each step adds
    ``momentum`` times the previous step, ``theta_t - theta_{t-1}``.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr``, ``momentum`` and
            ``weight_decay``. Frozen parameters are left alone.
        lr: the learning rate.
        k: number of directions per step.
        momentum: factor of the heavy ball, in [0, 1).
        law: distribution of the tangents; see `jetplane.Directions`.
        tangents: "dense" or "rank-one" (nearly free beside the plain forward); see `jetplane.Directions`. "inputs": for
            weights of linear layers ``a b^T``, with a drawn and b the direction in which the inputs of the batch are
            largest (AGZO, arXiv 2601.17261), at one more forward pass: see `jetplane.directions.SpannedDirections`.
        planes: multiplies the number of directions; the results are averaged.
        clip: largest Euclidean norm of a step over all parameters, or None.
        weight_decay: decoupled weight decay: ``theta <- theta - lr * weight_decay * theta`` beside the step.
        seed: seed of the directions. Seed and step counter are part of ``state_dict()``.
        chunk: directions to carry at a time, an integer or "auto"; see `jetplane.evaluate`.
        compile: run every step but the first as one compiled graph (`torch.compile`, ``fullgraph=True``).
        audit: "first" compares the slope of a closure with differences of its loss before its first step, and again
            when its code, the parameters that move or the mode of its modules change. This costs five to nine forward
            passes; see `jetplane.audit`. "always" does so before every step, "never" not at all.
        generators: random generators that the closure uses besides torch's own; see `jetplane.evaluate`.
        process_group: a process group of `torch.distributed`, each rank of which has one shard of each batch, or a
            `DeviceMesh` with the dimensions "data" and "direction"; see `jetplane.parallel.ranks`. None: this process
            trains alone. ``torch.distributed.group.WORLD`` is None before ``init_process_group()``.

    Raises:
        ArgumentError, DTypeError, DeviceError: settings or parameters that are not valid.

    >>> import torch, jetplane as jp
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> opt = jp.optim.FGD([w], lr=0.1, k=2)
    >>> for _ in range(200):
    ...     loss = opt.step(lambda: (w**2).sum())
    >>> bool(loss < 1e-3)
    True

    Sources: Baydin et al., arXiv 2202.08587, algorithm 1; with momentum, Polyak's heavy ball (1964), as in Shukla and
    Shin, arXiv 2310.14168.
    """

    _options = (*PlaneOptimizer._options, "momentum")

    def __init__(
        self, params: Params, lr: float = 1e-3, k: int = 1, *, momentum: float = 0.0, law: str = "gaussian",
        tangents: Structure = "dense", planes: int = 1, clip: float | None = None, weight_decay: float = 0.0,
        seed: int = 0, chunk: Chunk = None, compile: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None, audit: Auditing = "first",
        generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, k, law, tangents, planes, clip, weight_decay, seed, chunk, compile, process_group,
            audit=audit, generators=generators,
        )  # fmt: skip
        self.defaults["momentum"] = momentum  # groups that are added later have it as well
        for group in self.param_groups:
            group.setdefault("momentum", momentum)
            if not 0 <= group["momentum"] < 1:
                raise ArgumentError(f"momentum must be in [0, 1), got {group['momentum']!r}")

    @property
    def descent(self) -> Descent:
        """The forward gradient."""
        return ForwardGradient()

    def _advance(
        self, closure: Closure, weight: float, moving: Moving, directions: AbstractDirections, plane: PlaneModel
    ) -> dict[str, Any]:
        """As every Jetplane optimizer's; with momentum, the last change of the parameters goes on."""
        balls = [(p, group["momentum"]) for p, group, _ in moving if group["momentum"]]
        before = [p.clone() for p, _ in balls]
        changed = super()._advance(closure, weight, moving, directions, plane)
        for (p, momentum), old in zip(balls, before, strict=True):
            if "change" in (own := self.state[p]):
                p.add_(own["change"], alpha=momentum)
            own["change"] = old.neg_().add_(p)
        return changed
