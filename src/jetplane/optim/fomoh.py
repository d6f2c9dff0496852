"""The forward gradient scaled by curvature, along random directions or along the gradient itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ..directions import StoredDirections, Structure
from ..errors import LossError, UnusedParametersError
from ..evaluation.audit import Auditing
from ..evaluation.side_effects import without_side_effects
from ..subspace.descent import CurvatureScaled, Descent
from .base import Chunk, Closure, Moving, Params, PlaneOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@final
class FoMoH(PlaneOptimizer):
    """FoMoH: the forward gradient, each direction scaled by the curvature along it.

        theta <- theta - lr * mean_k (F_k / (|H_kk| + eps) * v_k)

    with ``F_k = grad(L) . v_k`` and ``H_kk = v_k^T Hess(L) v_k``.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr`` and
            ``weight_decay``. Frozen parameters are left alone.
        lr: the learning rate. The paper's rates: 0.1362 (logistic regression), 0.544 (CNN).
        k: number of directions per step, each on its own line.
        eps: added to the curvature.
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
    >>> opt = jp.optim.FoMoH([w], lr=0.5)
    >>> for _ in range(100):
    ...     loss = opt.step(lambda: (w**2).sum())
    >>> bool(loss < 1e-3)
    True

    Source: Cobb et al., arXiv 2408.10419, section 3 (FoMoH).
    """

    def __init__(
        self, params: Params, lr: float = 0.1, k: int = 1, *, eps: float = 1e-5, law: str = "gaussian",
        tangents: Structure = "dense", planes: int = 1, clip: float | None = None, weight_decay: float = 0.0,
        seed: int = 0, chunk: Chunk = None, compile: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None, audit: Auditing = "first",
        generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._descent = CurvatureScaled(eps)
        super().__init__(
            params, lr, k, law, tangents, planes, clip, weight_decay, seed, chunk, compile, process_group,
            audit=audit, generators=generators,
        )  # fmt: skip

    @property
    def descent(self) -> Descent:
        """The step that divides each slope by the curvature along its direction."""
        return self._descent


@final
class FoMoHBP(PlaneOptimizer):
    """FoMoH-BP, the paper's ablation: FoMoH with the backpropagated gradient g as its one direction.

        theta <- theta - lr * (g.g) / (|g^T Hess(L) g| + eps) * g

    It is the only optimizer here that uses reverse mode. The closure runs twice, once for each mode, with the
    same random numbers. Buffers such as BatchNorm's running statistics are updated once.

    Args:
        params, lr, eps, clip, weight_decay, audit, generators: as for `FoMoH`.

    Raises:
        ArgumentError, DTypeError, DeviceError: settings or parameters that are not valid.

    >>> import torch, jetplane as jp
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> opt = jp.optim.FoMoHBP([w], lr=1.0)
    >>> loss = opt.step(lambda: (w**2).sum())
    >>> bool(w.detach().norm() < 1e-3)
    True

    Source: Cobb et al., arXiv 2408.10419, section 4 (FoMoH-BP).
    """

    def __init__(
        self, params: Params, lr: float = 0.1, *, eps: float = 1e-5, clip: float | None = None,
        weight_decay: float = 0.0, audit: Auditing = "first", generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._descent = CurvatureScaled(eps)
        super().__init__(params, lr, 1, clip=clip, weight_decay=weight_decay, audit=audit, generators=generators)

    def _without_sharding(self) -> str:
        return type(self).__name__

    @property
    def descent(self) -> Descent:
        """The step that divides the slope by the curvature along the gradient."""
        return self._descent

    def _directions(self, moving: Moving, closure: Closure) -> StoredDirections:
        with without_side_effects(), torch.enable_grad():
            loss = closure()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise LossError(f"the closure must return a scalar loss, got {got}")
            if not loss.requires_grad:
                raise UnusedParametersError("the loss does not depend on the parameters")
            params = [p for p, _, _ in moving]
            gradient = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return StoredDirections([g.unsqueeze(0) for g in gradient])
