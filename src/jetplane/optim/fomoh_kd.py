"""Second-order search in a plane of K directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from ..directions import Structure
from ..evaluation.audit import Auditing
from ..subspace.descent import Descent, named
from .base import Chunk, Params, PlaneOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@final
class FoMoHKD(PlaneOptimizer):
    """FoMoH-KD: Newton's method in the plane of K random directions.

        kappa = -H^-1 F,    theta <- theta + lr * sum_k kappa_k v_k

    with ``F_i = grad(L) . v_i`` and ``H_ij = v_i^T Hess(L) v_j``, both exact and from one
    forward pass. If K is the number of parameters, this is Newton's method itself.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr`` and
            ``weight_decay``. Frozen parameters are left alone.
        lr: the learning rate; 1 is the plain Newton step in the plane.
        k: number of directions of a plane, at most the number of parameters.
        descent: "newton" as above, "saddle-free" (eigenvalues of H by absolute value and bounded away from
            zero), "damped", or a `jetplane.subspace.descent.Descent`.
        law: distribution of the tangents; see `jetplane.Directions`.
        tangents: "dense" or "rank-one" (nearly free beside the plain forward); see `jetplane.Directions`. "inputs": for
            weights of linear layers ``a b^T``, with a drawn and b the direction in which the inputs of the batch are
            largest (AGZO, arXiv 2601.17261), at one more forward pass: see `jetplane.directions.SpannedDirections`.
        planes: independent planes of one evaluation, whose steps are averaged.
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
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    >>> opt = jp.optim.FoMoHKD([w], k=2)
    >>> loss = opt.step(lambda: (w[0] - 3) ** 2 + 5 * (w[0] + w[1]) ** 2)
    >>> w.detach().round(decimals=6)
    tensor([ 3., -3.], dtype=torch.float64)

    Source: Cobb et al., arXiv 2408.10419, section 3 (FoMoH-KD).
    """

    def __init__(
        self, params: Params, lr: float = 1.0, k: int = 3, *, descent: str | Descent = "newton",
        law: str = "gaussian", tangents: Structure = "dense", planes: int = 1, clip: float | None = None,
        weight_decay: float = 0.0, seed: int = 0, chunk: Chunk = None, compile: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None, audit: Auditing = "first",
        generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._descent = named(descent)
        super().__init__(
            params, lr, k, law, tangents, planes, clip, weight_decay, seed, chunk, compile, process_group,
            audit=audit, generators=generators,
        )  # fmt: skip

    @property
    def descent(self) -> Descent:
        """The rule that solves for the step in the plane."""
        return self._descent
