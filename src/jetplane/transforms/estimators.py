"""Curvature of models too large for their Hessian: unbiased estimates from random lines, and conjugate gradients.

Everything here sees the loss through `jetplane.evaluate` alone, many directions at once and a chunk at a time, so
no backward pass and no memory of activations is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._sharding import refuse
from ..directions import Directions
from ..errors import ArgumentError
from ..evaluation.api import evaluate

Control = Literal["trace"] | float
Status = Literal["converged", "limit", "indefinite"]


@dataclass(frozen=True)
class HessianEstimate:
    """An estimate of the Hessian over all parameters, flattened one after the other.

    Attributes:
        value: the loss, shape ().
        gradient: the forward gradient of the same directions, one tensor of each parameter's shape.
        mean: the estimate, (D, D) for D parameters in all.
        error: its standard error, entry by entry, (D, D).
    """

    value: Tensor
    gradient: tuple[Tensor, ...]
    mean: Tensor
    error: Tensor


@dataclass(frozen=True)
class DiagonalEstimate:
    """An estimate of the Hessian's diagonal.

    Attributes:
        value: the loss, shape ().
        gradient: the forward gradient of the same directions, one tensor of each parameter's shape.
        mean: the estimate, one tensor of each parameter's shape.
        error: its standard error, likewise.
    """

    value: Tensor
    gradient: tuple[Tensor, ...]
    mean: tuple[Tensor, ...]
    error: tuple[Tensor, ...]


def estimate_hessian(
    closure: Callable[[], Tensor], params: Sequence[Tensor], samples: int, *, control: Control = "trace",
    seed: int = 0, chunk: int = 64,
) -> HessianEstimate:  # fmt: skip
    """The Hessian H from quadratic forms ``s = v^T H v`` of Gaussian directions v, without bias.

    ``E[s v v^T] = 2 H + tr(H) I`` and ``E[s] = tr(H)``, so that each direction gives an unbiased estimate
    ``s (v v^T - I) / 2``. Its variance is smallest for a Hessian of trace zero. The control variate makes the trace
    zero: with the matrix ``c I`` subtracted before and added again after,

        H  ~  mean_k [ c I + (s_k - c |v_k|^2) (v_k v_k^T - I) / 2 ]

    is unbiased for every c that does not depend on v_k, and best for ``c = tr(H) / D``, whatever H is. "trace" takes
    the mean of the *other* directions' quadratic forms for it, ``c_k = mean_{j != k} s_j / D``.

    Args:
        closure: returns a scalar loss, computed by torch functions of the parameters.
        params: the tensors that move, D numbers in all.
        samples: directions, at least 2. The error falls with their square root and grows with D.
        control: "trace" as above, or a fixed number c; 0 is no control.
        seed: of the directions.
        chunk: directions of one evaluation.

    Returns:
        A `HessianEstimate`. Its errors are those of a mean of independent estimates; what "trace" shares between them
        is smaller by the number of samples.

    Raises:
        ArgumentError: samples < 2, chunk < 1, a control that is neither "trace" nor finite.
        Others: as `jetplane.evaluate`.

    >>> import torch, jetplane as jp
    >>> x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> found = jp.estimate_hessian(lambda: x[0] ** 2 + x[0] * x[1] + 3 * x[1] ** 2, [x], samples=4000)
    >>> exact = torch.tensor([[2.0, 1.0], [1.0, 6.0]])
    >>> bool(((found.mean - exact).abs() < 4 * found.error).all())
    True

    Source: ``newton_step`` in the code of Cobb et al., arXiv 2408.10419, whose control is a multiple of the identity
    chosen by hand; the moments are Isserlis' theorem.
    """
    params = list(params)
    lines = _lines(closure, params, samples, control, seed, chunk)
    total, squares = (lines.slope.new_zeros(lines.size, lines.size) for _ in range(2))
    # Off the diagonal a sample is w v_i v_j / 2 with w = s - c |v|²; on it, c + w (v_i² - 1) / 2.
    diagonal, diagonal_squares, gradient = (lines.slope.new_zeros(lines.size) for _ in range(3))
    for v, slope, weight, c in lines.weighted(control):
        gradient += slope @ v
        total += v.T @ (weight[:, None] * v) / 2
        squares += v.square().T @ (weight.square()[:, None] * v.square()) / 4
        own = c[:, None] + weight[:, None] * (v.square() - 1) / 2
        diagonal += own.sum(0)
        diagonal_squares += own.square().sum(0)
    total.diagonal().copy_(diagonal)
    squares.diagonal().copy_(diagonal_squares)
    mean, error = _moments((total + total.mT) / 2, squares, samples)  # symmetric to the last bit
    kind = torch.promote_types(params[0].dtype, torch.float32)
    return HessianEstimate(lines.value, _split(gradient / samples, params), mean.to(kind), error.to(kind))


def estimate_diagonal(
    closure: Callable[[], Tensor], params: Sequence[Tensor], samples: int, *, control: Control = "trace",
    seed: int = 0, chunk: int = 64,
) -> DiagonalEstimate:  # fmt: skip
    """The diagonal of the Hessian, as `estimate_hessian` estimates it, in memory of the parameters' size.

        H_ii  ~  mean_k [ c + (s_k - c |v_k|^2) (v_ki^2 - 1) / 2 ],    s_k = v_k^T H v_k

    Arguments are those of `estimate_hessian`.

    Returns:
        A `DiagonalEstimate`.

    Raises:
        As `estimate_hessian`.

    >>> import torch, jetplane as jp
    >>> x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> found = jp.estimate_diagonal(lambda: x[0] ** 2 + x[0] * x[1] + 3 * x[1] ** 2, [x], samples=4000)
    >>> bool(((found.mean[0] - torch.tensor([2.0, 6.0])).abs() < 4 * found.error[0]).all())
    True

    Source: as `estimate_hessian`; in the paper's code, ``newton_step_diag``.
    """
    params = list(params)
    lines = _lines(closure, params, samples, control, seed, chunk)
    total, squares, gradient = (lines.slope.new_zeros(lines.size) for _ in range(3))
    for v, slope, weight, c in lines.weighted(control):
        gradient += slope @ v
        own = v.square_().sub_(1).mul_(weight[:, None] / 2).add_(c[:, None])
        total += own.sum(0)
        squares += own.square_().sum(0)
    mean, error = _moments(total, squares, samples)
    return DiagonalEstimate(lines.value, *(_split(t, params) for t in (gradient / samples, mean, error)))


@dataclass
class _Lines:
    """Slope and curvature along each of many random lines, double precision; the lines are drawn again."""

    value: Tensor
    slope: Tensor
    curvature: Tensor
    size: int
    draw: Callable[[], Iterator[Tensor]]

    def weighted(self, control: Control) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each chunk: directions (k, D), slopes, ``s_k - c_k |v_k|²`` and ``c_k``."""
        n, s = len(self.curvature), self.curvature
        c = (s.sum() - s) / (n - 1) / self.size if control == "trace" else torch.full_like(s, float(control))
        start = 0
        for v in self.draw():
            part = slice(start, start := start + len(v))
            yield v, self.slope[part], s[part] - c[part] * v.square().sum(1), c[part]


def _lines(
    closure: Callable[[], Tensor], params: list[Tensor], samples: int, control: Control, seed: int, chunk: int
) -> _Lines:
    refuse(params, "estimates")
    _check_count("samples", samples, 2)
    _check_count("chunk", chunk, 1)
    if control != "trace" and not (isinstance(control, (int, float)) and math.isfinite(control)):
        raise ArgumentError(f"control must be 'trace' or a finite number, got {control!r}")

    def chunks() -> Iterator[Directions]:
        for step, start in enumerate(range(0, samples, chunk)):
            directions = Directions(min(chunk, samples - start), seed=seed)
            directions.step = step
            yield directions

    planes = [evaluate(closure, params, directions, pairs="diagonal") for directions in chunks()]
    slope = torch.cat([plane.slope for plane in planes]).double()
    curvature = torch.cat([plane.curvature for plane in planes if plane.curvature is not None]).double()

    def draw() -> Iterator[Tensor]:
        for directions in chunks():
            yield torch.cat([v.flatten(1).double() for v in directions.tangents(params)], 1)

    return _Lines(planes[0].value, slope, curvature, sum(p.numel() for p in params), draw)


def _moments(total: Tensor, squares: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean, and its standard error."""
    mean = total / n
    return mean, ((squares / n - mean.square()).clamp_min(0) / (n - 1)).sqrt()


@dataclass(frozen=True)
class NewtonSolution:
    """The solution of ``(H + damping I) x = g`` by conjugate gradients.

    Attributes:
        value: the loss, shape ().
        gradient: g, one tensor of each parameter's shape, exact.
        solution: x, likewise; ``theta - x`` is Newton's step.
        residual: ``|(H + damping I) x - g| / |g|``.
        iterations: number of products with H.
        status: "converged"; "limit", if the iterations were not enough; "indefinite", if a direction without positive
            curvature was found: x is then the iterate before it, or g if it was the first direction.
    """

    value: Tensor
    gradient: tuple[Tensor, ...]
    solution: tuple[Tensor, ...]
    residual: float
    iterations: int
    status: Status


def solve_newton(
    closure: Callable[[], Tensor], params: Sequence[Tensor], *, damping: float = 0.0, tolerance: float = 1e-6,
    iterations: int | None = None, chunk: int = 64,
) -> NewtonSolution:  # fmt: skip
    """``(H + damping I)^-1 g`` by conjugate gradients, forward only.

    Component d of a product ``H p`` is ``e_d^T H p``: one plane (e_d, p) of two directions for each of the D numbers in
    the parameters, a chunk of them at a time. The gradient and the diagonal of H, which preconditions, take one pass
    over the coordinates.

    Args:
        closure: returns a scalar loss, computed by torch functions of the parameters.
        params: the tensors that move, D numbers in all.
        damping: added to H's diagonal, at least 0.
        tolerance: stop where the residual is at most this, relative to the gradient.
        iterations: the largest number of products; D by default, enough in exact arithmetic.
        chunk: coordinates of one evaluation.

    Returns:
        A `NewtonSolution`; look at its status.

    Raises:
        ArgumentError: a negative damping or tolerance, iterations or chunk < 1.
        Others: as `jetplane.evaluate`.

    >>> import torch, jetplane as jp
    >>> x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> newton = jp.solve_newton(lambda: (x[0] - 3) ** 2 + x[0] * x[1] + 3 * x[1] ** 2, [x])
    >>> newton.status, newton.iterations
    ('converged', 2)
    >>> (x - newton.solution[0]).round(decimals=4)  # the minimum
    tensor([ 3.2727, -0.5455], dtype=torch.float64)

    Source: Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952); stopping at negative curvature as in truncated
    Newton methods (Steihaug, SIAM J. Numer. Anal. 20, 1983).
    """
    params = list(params)
    if not params:
        raise ArgumentError("no parameters: expected at least one tensor that the closure uses")
    refuse(params, "solve_newton")
    for name, number in (("damping", damping), ("tolerance", tolerance)):
        if not 0 <= number < math.inf:
            raise ArgumentError(f"{name} must be finite and at least 0, got {number!r}")
    _check_count("chunk", chunk, 1)
    if iterations is not None:
        _check_count("iterations", iterations, 1)
    value, g, diagonal = _along_coordinates(closure, params, chunk)
    diagonal += damping
    scale = diagonal if bool((diagonal > 0).all()) else torch.ones_like(diagonal)
    x, r, count = torch.zeros_like(g), g.clone(), 0
    size, limit = g.norm().item(), g.numel() if iterations is None else iterations
    p = z = r / scale
    status: Status = "converged" if size == 0 else "limit"
    while status == "limit" and count < limit:
        hp = _product(closure, params, p, chunk) + damping * p
        count += 1
        bend = p @ hp
        if not bool(bend > 0):
            status = "indefinite"
            if count == 1:
                x, r = g, g - (hp if scale is not diagonal else _product(closure, params, g, chunk) + damping * g)
            break
        weight = r @ z
        x = x + weight / bend * p
        r = r - weight / bend * hp
        if r.norm().item() <= tolerance * size:
            status = "converged"
        z = r / scale
        p = z + (r @ z) / weight * p
    residual = r.norm().item() / size if size else 0.0
    return NewtonSolution(value, _split(g, params), _split(x, params), residual, count, status)


def _along_coordinates(
    closure: Callable[[], Tensor], params: list[Tensor], chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and the Hessian's diagonal, flat and in double precision."""
    planes = [evaluate(closure, params, axes, pairs="diagonal") for axes in _axes(params, chunk)]
    slope, bend = (torch.cat(ts).double() for ts in zip(*((p.slope, p.curvature) for p in planes), strict=True))
    return planes[0].value, slope, bend


def _product(closure: Callable[[], Tensor], params: list[Tensor], p: Tensor, chunk: int) -> Tensor:
    """``H p``, flat and in double precision."""
    length = p.norm()
    along = [v.to(param.dtype) for v, param in zip(_split(p / length, params), params, strict=True)]
    parts = []
    for axes in _axes(params, chunk):
        # planes (e_d, p) of two directions each
        paired = [torch.stack([e, v.expand_as(e)], 1).flatten(0, 1) for e, v in zip(axes, along, strict=True)]
        curvature = evaluate(closure, params, paired, pairs=2).curvature
        assert curvature is not None
        parts.append(curvature[:, 0, 1].double())
    return torch.cat(parts) * length


def _axes(params: list[Tensor], chunk: int) -> Iterator[list[Tensor]]:
    """The coordinate directions of all parameters together, a chunk at a time."""
    sizes = [p.numel() for p in params]
    for start in range(0, sum(sizes), chunk):
        stop = min(start + chunk, sum(sizes))
        axes, first = [], 0
        for p, size in zip(params, sizes, strict=True):
            rows = p.new_zeros(stop - start, size)
            if start < first + size and first < stop:
                own = torch.arange(max(start, first), min(stop, first + size), device=p.device)
                rows[own - start, own - first] = 1
            axes.append(rows.reshape(-1, *p.shape))
            first += size
        yield axes


def _check_count(name: str, number: int, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {number!r}")


def _split(flat: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = flat.split([p.numel() for p in params])
    return tuple(
        part.reshape(p.shape).to(torch.promote_types(p.dtype, torch.float32))
        for part, p in zip(parts, params, strict=True)
    )
