"""A sum of squares to first order in its residuals, and the step that minimizes it in a trust region and bounds.

Of residuals r and their Jacobian J only the triangular factor T of ``[J r] = Q T`` is kept, (n + 1) x (n + 1) numbers
for n parameters. Rows are added block by block, so there may be any number of them. T has all that a step needs,
``J^T J`` and ``J^T r`` among it, and unlike ``J^T J`` it does not square J's condition number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256  # collected at least before they are factored
_CLOSE = 0.01  # how near to the radius of a trust region a step ends that would leave it


class RowFactor:
    """The triangular factor of rows ``[J r]``, in double precision.

    Args:
        columns: n + 1.

    >>> import torch
    >>> factor = RowFactor(2)
    >>> factor.add(torch.tensor([[3.0, 1.0]]))
    >>> factor.add(torch.tensor([[4.0, 2.0]]))
    >>> (factor.matrix().mT @ factor.matrix()).round(decimals=6)  # J^T J = 25, J^T r = 11, r^T r = 5
    tensor([[25., 11.],
            [11.,  5.]], dtype=torch.float64)
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._held: list[Tensor] = []
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Add rows, (b, columns)."""
        self._held.append(rows.double())
        self._count += len(rows)
        if self._count >= max(_ROWS, 4 * self.columns):
            self._factor()

    def matrix(self) -> Tensor:
        """T, (columns, columns)."""
        self._factor()
        held = self._held[0]
        return torch.cat([held, held.new_zeros(self.columns - len(held), self.columns)])

    def _factor(self) -> None:
        self._held = [torch.linalg.qr(torch.cat(self._held), mode="r").R]
        self._count = len(self._held[0])


@dataclass(frozen=True)
class LinearModel:
    """``|R p + q|^2 / 2`` plus a constant: half the sum of squares after a step p, residuals being linear.

    Attributes:
        r: R, (n, n), triangular, with ``R^T R = J^T J``.
        q: (n,), with ``R^T q = J^T r``.
        cost: half the sum of squares, or what stands for it, at ``p = 0``.

    >>> import torch
    >>> model = LinearModel(torch.eye(2).double(), torch.tensor([3.0, 4.0]).double(), 12.5)
    >>> free = torch.full((2,), torch.inf).double()
    >>> region = Region(model, torch.ones(2).double(), -free, free)
    >>> region.step(None), region.step(1.0)[0].norm().item() < 1.1
    ((tensor([-3., -4.], dtype=torch.float64), 0.0), True)
    """

    r: Tensor
    q: Tensor
    cost: float

    @staticmethod
    def of(matrix: Tensor, cost: float) -> LinearModel:
        """From the triangular factor of ``[J r]``."""
        return LinearModel(matrix[:-1, :-1], matrix[:-1, -1], cost)

    @property
    def gradient(self) -> Tensor:
        """``J^T r``."""
        return self.r.mT @ self.q

    @property
    def norms(self) -> Tensor:
        """Of the columns of J."""
        return self.r.norm(dim=0)

    def decrease(self, p: Tensor) -> float:
        """By how much half the sum of squares falls in the model after a step p."""
        moved = self.r @ p
        return -(moved @ self.q + 0.5 * moved @ moved).item()


class Region:
    """Where a step may go: bounds, and a trust region ``|D p| <= radius`` with positive scales D.

    Args:
        model: what is minimized.
        scale: D, (n,).
        lower: of p, (n,), at most 0; minus infinity for none.
        upper: of p, (n,), at least 0.
    """

    def __init__(self, model: LinearModel, scale: Tensor, lower: Tensor, upper: Tensor) -> None:
        self.scale = scale
        self.lower, self.upper = lower, upper
        self._r, self._q = model.r / scale, model.q  # of u = D p
        self._lower, self._upper = lower * scale, upper * scale
        self._solvers: dict[bytes, Callable[[Tensor, float], Tensor]] = {}

    def step(self, radius: float | None) -> tuple[Tensor, float]:
        """The minimizer of the model in the bounds, with ``|D p|`` at the radius within 1 %, or below it.

        Args:
            radius: of the trust region; None for none.

        Returns:
            p, and the damping lambda, with which p minimizes ``|R p + q|^2 / 2 + lambda |D p|^2 / 2`` in the bounds.

        Source: Moré, The Levenberg-Marquardt algorithm, Lecture Notes in Mathematics 630 (1978).
        """
        u, damping = self._minimized(0.0), 0.0
        if radius is not None and u.norm().item() > (1 + _CLOSE) * radius:
            # The length falls with the damping, and is at most 2 |R^T q| / damping.
            high = 2 * (self._r.mT @ self._q).norm().item() / radius
            low = 1e-40 * high
            for _ in range(200):
                damping = (low * high) ** 0.5
                u = self._minimized(damping)
                length = u.norm().item()
                if abs(length / radius - 1) <= _CLOSE or high / low < 1 + 1e-9:
                    break
                low, high = (damping, high) if length > radius else (low, damping)
        p = torch.where(u <= self._lower, self.lower, torch.where(u >= self._upper, self.upper, u / self.scale))
        return p, damping

    def _minimized(self, damping: float) -> Tensor:
        """The u within the bounds that minimizes the damped model.

        Source: Stark and Parker, Bounded-variable least squares, Computational Statistics 10 (1995).
        """
        u, free = torch.zeros_like(self._q), torch.ones_like(self._q, dtype=torch.bool)
        eps = torch.finfo(u.dtype).eps
        for _ in range(10 * len(u) + 10):
            goal = u.clone()
            goal[free] = self._solver(free)(self._q + self._r[:, ~free] @ u[~free], damping)
            room = torch.where(goal > u, self._upper - u, u - self._lower)  # until a bound is met
            part = torch.where(goal == u, torch.inf, room / (goal - u).abs())
            t = min(1.0, part[free].min().item()) if bool(free.any()) else 1.0
            if t < 1:
                u = (u + t * (goal - u)).clamp(self._lower, self._upper)
                met = free & (part <= t)
                u = torch.where(met, torch.where(goal > u, self._upper, self._lower), u)
                free = free & ~met
                continue
            u = goal
            pull = -(self._r.mT @ (self._r @ u + self._q) + damping * u)  # where the model falls
            inwards = torch.where(u <= self._lower, pull, -pull)
            inwards[free | (self._lower == self._upper)] = 0
            if not bool(inwards.max() > 1e3 * eps * (self._r.norm(dim=0) * self._q.norm()).max()):
                break
            free[inwards.argmax()] = True
        return u

    def _solver(self, free: Tensor) -> Callable[[Tensor, float], Tensor]:
        """What gives the minimizer over the free coordinates for ``(q, damping)``, the shortest of several."""
        key = bytes(free.tolist())
        if key not in self._solvers:
            left, s, right = torch.linalg.svd(self._r[:, free], full_matrices=False)
            least = len(free) * torch.finfo(s.dtype).eps * s.max() if len(s) else s.new_zeros(())

            def solve(q: Tensor, damping: float) -> Tensor:
                weight = s / (s.square() + damping) if damping else torch.where(s > least, 1 / s, 0)
                return -right.mT @ (weight * (left.mT @ q))

            self._solvers[key] = solve
        return self._solvers[key]
