"""Zeroth-order optimizers for fine-tuning, from the formulas of their papers: values of the loss alone move weights.

Each takes a closure that returns the loss. Perturbations are drawn anew from a seed for each use, so that none is
stored, and weights are moved in place, as in MeZO. Public code was read where a formula leaves something open: which
gradients are scaled by which curvature, what a deviation is of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from ..directions.laws import key
from ..errors import ArgumentError, NonFiniteError

Closure = Callable[[], Tensor]


class ZerothOrder(torch.optim.Optimizer):
    """What zeroth-order optimizers share: perturbations from seeds, and losses at perturbed weights.

    Args:
        params: parameters; those that do not require gradients stay.
        lr: the rate eta.
        eps: the size of a perturbation.
        seed: of the perturbations.

    Raises:
        ArgumentError: a rate or a size is not positive.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, eps: float = 1e-3, seed: int = 0) -> None:
        if not (lr > 0 and eps > 0):
            raise ArgumentError(f"lr and eps must be positive, got {lr} and {eps}")
        super().__init__(params, {"lr": lr, "eps": eps})
        self.seed = seed
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take a step.

        Args:
            closure: returns the loss, a tensor of shape ().

        Returns:
            An estimate of the loss before the step.

        Raises:
            NonFiniteError: a loss is not finite; parameters are then as they were, up to rounding.
        """
        loss = self._step(closure)
        self.steps += 1
        return loss

    @abstractmethod
    def _step(self, closure: Closure) -> float: ...

    @property
    def lr(self) -> float:
        """The rate."""
        return self.param_groups[0]["lr"]

    @property
    def eps(self) -> float:
        """The size of a perturbation."""
        return self.param_groups[0]["eps"]

    @property
    def _moving(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _drawn(self, sample: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter and its perturbation; the same numbers each time in a step."""
        moving = self._moving
        generator = torch.Generator(moving[0].device).manual_seed(int(key(self.seed, self.steps, sample)) % (1 << 63))
        for i, p in enumerate(moving):
            yield p, self._draw(i, p, generator)

    def _draw(self, index: int, p: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)

    def _move(self, by: float, sample: int = 0) -> None:
        """``theta <- theta + by * z``."""
        for p, z in self._drawn(sample):
            p.add_(z, alpha=by)

    def _loss(self, closure: Closure, undo: float, sample: int = 0) -> float:
        """The loss where the weights are now; where it is not finite they go back by ``undo * z``."""
        loss = float(closure())
        if loss - loss != 0:
            self._move(undo, sample)
            raise NonFiniteError(f"the loss is not finite: {loss}; try a smaller rate")
        return loss

    def _both_sides(self, closure: Closure) -> tuple[float, float]:
        """``L(theta + eps z)`` and ``L(theta - eps z)``; the weights are those of before."""
        self._move(self.eps)
        above = self._loss(closure, -self.eps)
        self._move(-2 * self.eps)
        below = self._loss(closure, self.eps)
        self._move(self.eps)
        return above, below


@final
class MeZO(ZerothOrder):
    """Central differences along one Gaussian direction (Malladi et al., arXiv 2305.17333, algorithm 1).

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),    theta <- theta - eta g z,    z ~ N(0, I)

    >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> opt = MeZO([w], lr=0.05)
    >>> losses = [opt.step(lambda: w.square().sum()) for _ in range(100)]
    >>> losses[-1] < 0.05 * losses[0]
    True
    """

    def _step(self, closure: Closure) -> float:
        above, below = self._both_sides(closure)
        self._move(-self.lr * (above - below) / (2 * self.eps))
        return (above + below) / 2


@final
class FZOO(ZerothOrder):
    """One-sided differences along N random signs, over the deviation of their losses (Dang et al., arXiv 2506.09034).

        l_i = L(theta + eps u_i),    g = 1/(eps N) sum_i (l_i - l_0) u_i,    theta <- theta - eta g / sigma

    with sigma the standard deviation of the l_i, and u_i of entries +1 and -1. As in its public code eps is left out of
    g, which scales the rate: ``theta <- theta - eta / (N sigma) sum_i (l_i - l_0) u_i``. The paper runs the N passes as
    one batch on a GPU; here they follow one another, at the memory of one.

    Args:
        params: see `ZerothOrder`.
        lr: the rate eta.
        eps: the size of a perturbation.
        seed: of the perturbations.
        samples: N; 8 in the paper.

    >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> opt = FZOO([w], lr=0.05)
    >>> losses = [opt.step(lambda: w.square().sum()) for _ in range(100)]
    >>> losses[-1] < 0.05 * losses[0]
    True
    """

    def __init__(self, params: Iterable[Tensor], lr: float, eps: float = 1e-3, seed: int = 0, samples: int = 8) -> None:
        super().__init__(params, lr, eps, seed)
        if samples < 2:
            raise ArgumentError(f"samples must be at least 2, to have a standard deviation, got {samples}")
        self.samples = samples

    def _draw(self, index: int, p: Tensor, generator: torch.Generator) -> Tensor:
        signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device)
        return signs.to(p.dtype).mul_(2).sub_(1)

    def _step(self, closure: Closure) -> float:
        here = self._loss(closure, 0.0)
        losses = []
        for i in range(self.samples):
            self._move(self.eps, i)
            losses.append(self._loss(closure, -self.eps, i))
            self._move(-self.eps, i)
        deviation = float(torch.tensor(losses, dtype=torch.float64).std(correction=0))
        if deviation > 0:
            for i, loss in enumerate(losses):
                self._move(-self.lr * (loss - here) / (self.samples * deviation), i)
        return here


@final
class HiZOO(ZerothOrder):
    """MeZO with a diagonal of curvature (Zhao et al., arXiv 2402.15173, algorithm 1).

        l_+- = L(theta +- eps s u),    s = sqrt(Sigma),    u ~ N(0, I)
        1 / Sigma <- (1 - alpha) / Sigma + alpha |l_+ + l_- - 2 l_0| / (2 eps^2) (u / s)^2
        theta <- theta - eta (l_+ - l_-) / (2 eps) s u

    where the last line has the new Sigma, as in the public code. At first Sigma is one.

    Args:
        params: see `ZerothOrder`.
        lr: the rate eta.
        eps: the size of a perturbation.
        seed: of the perturbations.
        smooth: alpha; 1e-8 in the paper's published command.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, eps: float = 1e-3, seed: int = 0, smooth: float = 1e-8
    ) -> None:
        super().__init__(params, lr, eps, seed)
        if not 0 <= smooth <= 1:
            raise ArgumentError(f"smooth must be from 0 to 1, got {smooth}")
        self.smooth = smooth

    def _draw(self, index: int, p: Tensor, generator: torch.Generator) -> Tensor:
        return super()._draw(index, p, generator).div_(self._curvature(p).sqrt())

    def _curvature(self, p: Tensor) -> Tensor:
        state: dict[str, Any] = self.state[p]
        if "curvature" not in state:
            state["curvature"] = torch.ones_like(p)
        return state["curvature"]

    def _step(self, closure: Closure) -> float:
        here = self._loss(closure, 0.0)
        above, below = self._both_sides(closure)
        bend = abs(above + below - 2 * here) / (2 * self.eps**2)
        slope = (above - below) / (2 * self.eps)
        for p, moved in self._drawn():  # moved = s u, with the old Sigma
            curvature = self._curvature(p)
            normal = moved * curvature.sqrt()  # u
            curvature.mul_(1 - self.smooth + self.smooth * bend * normal.square())
            p.sub_(normal / curvature.sqrt(), alpha=self.lr * slope)
        return here


@final
class LOZO(ZerothOrder):
    """MeZO along matrices of low rank (Chen et al., arXiv 2410.07698, algorithm 1).

        Z = U V^T,    g = (L(X + eps Z) - L(X - eps Z)) / (2 eps),    X <- X - eta g Z

    for a matrix X (m, n), U (m, r) Gaussian and new in each step, V (n, r) Gaussian and new every ``interval`` steps.
    Other parameters are moved along Gaussian vectors. The published code and commands have r = 1 and an interval of 100
    for causal models; a factor 1 / r of the paper is part of the rate.

    Args:
        params: see `ZerothOrder`.
        lr: the rate eta.
        eps: the size of a perturbation.
        seed: of the perturbations.
        rank: r.
        interval: steps with the same V.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, eps: float = 1e-3, seed: int = 0, rank: int = 1, interval: int = 100
    ) -> None:
        super().__init__(params, lr, eps, seed)
        if rank < 1 or interval < 1:
            raise ArgumentError(f"rank and interval must be at least 1, got {rank} and {interval}")
        self.rank = rank
        self.interval = interval

    def _draw(self, index: int, p: Tensor, generator: torch.Generator) -> Tensor:
        if p.dim() < 2:
            return super()._draw(index, p, generator)
        kind: Any = {"device": p.device, "dtype": p.dtype}
        left = torch.randn(p.shape[0], self.rank, generator=generator, **kind)
        lazy = key(self.seed, -1, self.steps // self.interval, index)
        right = torch.randn(
            p[0].numel(), self.rank, generator=torch.Generator(p.device).manual_seed(int(lazy) % (1 << 63)), **kind
        )
        return (left @ right.T).reshape(p.shape)

    def _step(self, closure: Closure) -> float:
        above, below = self._both_sides(closure)
        self._move(-self.lr * (above - below) / (2 * self.eps))
        return (above + below) / 2
