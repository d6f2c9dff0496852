"""First and second coefficients held against differences of the function itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..jets import PairStructure

Rows = Tensor | None  # coefficients of one parameter, (count, n)
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Verdict(NamedTuple):
    """What differences say: ``wrong`` names the output that they convict, of its size how far it is off."""

    what: str
    text: str
    wrong: tuple[int, float, float] | None = None


def held(
    value: Callable[[list[Rows]], Tensor],
    center: Tensor,
    inputs: Sequence[Tensor | None],
    first: list[Rows],
    second: list[Rows],
    structure: PairStructure | None,
    found: tuple[Tensor | None, Tensor | None],
) -> list[Verdict]:
    """Compare along sums of all directions, so that no input that moves is left out.

    With w drawn once, ``v = sum w_i v_i`` and ``a = sum w_i w_j x_ij``, the path ``x + h v + h² a / 2`` has the slope
    ``sum w_i y_i`` and the second derivative ``sum w_i w_j y_ij``. Structures that keep fewer pairs are compared on
    one mixed derivative, of a direction with the sum of those that it is paired with.

    Args:
        value: doubles that the function gives where its inputs are moved by so much, flat.
        center: those where they are not moved.
        inputs: values of the parameters; None or integers where nothing moves.
        first: coefficients of the inputs, for each parameter.
        second: the same of second order.
        structure: of the second coefficients.
        found: coefficients of the outputs, (K, n) and (count, n).
    """
    moving = [n for n, c in enumerate(first) if c is not None]
    slopes, bends = found
    if slopes is None or not moving or not any(bool(c.any()) for c in first if c is not None):
        return [Verdict("slope", "of a point that does not move")]
    made: list[Verdict] = []
    lengths = [float(x.square().mean().sqrt()) for n in moving if (x := inputs[n]) is not None]
    own = {n: s or 1.0 for n, s in zip(moving, lengths, strict=True)}
    pooled = {n: 1 + max(lengths) for n in moving}
    for scale in (own, pooled):  # long steps may leave the function's domain: only where short ones tell nothing
        made = _compared(value, center, first, second, structure, slopes, bends, scale)
        if any(v.wrong for v in made) or all("unclear" not in v.text for v in made):
            break
    return made


def _compared(
    value: Callable[[list[Rows]], Tensor], center: Tensor, first: list[Rows], second: list[Rows],
    structure: PairStructure | None, slopes: Tensor, bends: Tensor | None, scale: dict[int, float],
) -> list[Verdict]:  # fmt: skip
    k = len(slopes)
    sizes = torch.stack([c.square().mean(1).sqrt() / scale[n] for n, c in enumerate(first) if c is not None]).amax(0)
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(k, generator=draw, dtype=torch.float64) + 0.5
    weights *= torch.where(torch.rand(k, generator=draw) < 0.5, -1.0, 1.0)
    weights = torch.where(sizes > 0, weights / sizes, 0.0)
    pairs = _pairs(structure, weights, sizes)

    def along(w: Tensor) -> list[Rows]:
        return [None if c is None else w @ c for c in first]

    def ends(w: Tensor, bent: list[Rows]) -> list[tuple[Tensor, Tensor]]:
        v = along(w)
        return [
            (value(_path(v, h, bent, h * h / 2)), value(_path(v, -h, bent, h * h / 2))) for h in steps
        ]  # fmt: skip

    unit = 1 / max(float(c.square().mean().sqrt()) / scale[n] for n, c in enumerate(along(weights)) if c is not None)
    steps = [unit * s for s in STEPS]
    noise = 4 * torch.finfo(torch.float64).eps * center.abs()
    every = pairs is not None and pairs.left is pairs.right
    bent = [None if c is None or not every else pairs.sums @ c for c in second] if pairs else []
    outer = ends(weights, bent)
    differences = [(p - m) / (2 * h) for h, (p, m) in zip(steps, outer, strict=True)]
    sided = [(p - 2 * center + m).abs() / h for h, (p, m) in zip(steps, outer, strict=True)]
    made = [_verdict("slope", weights @ slopes, differences, [noise / h for h in steps], 1e-3, sided)]
    if pairs is None or bends is None:
        return made
    ours, squares = pairs.sums @ bends, [noise / h**2 for h in steps]
    if every:
        rows = [(p - 2 * center + m) / h**2 for h, (p, m) in zip(steps, outer, strict=True)]
        return [*made, _verdict("curvature", ours, rows, squares, 0.05)]
    # Of x + s p + t q + s t a the mixed derivative in s and t.
    p, q = along(pairs.left), along(pairs.right)
    crossed = [None if c is None else pairs.sums @ c for c in second]
    both, apart = _path(p, 1.0, q, 1.0), _path(p, 1.0, q, -1.0)
    rows = []
    for h in steps:
        same = value(_path(both, h, crossed, h * h)) + value(_path(both, -h, crossed, h * h))
        other = value(_path(apart, h, crossed, -h * h)) + value(_path(apart, -h, crossed, -h * h))
        rows.append((same - other) / (4 * h * h))
    return [*made, _verdict("curvature", ours, rows, squares, 0.05)]


class _Pairs(NamedTuple):
    """Two sums of directions, and the sum of second coefficients that is their mixed one."""

    left: Tensor
    right: Tensor
    sums: Tensor


def _pairs(structure: PairStructure | None, weights: Tensor, sizes: Tensor) -> _Pairs | None:
    if structure is None or not structure.single:
        return None
    terms = structure.terms()
    sums = torch.zeros(structure.count, dtype=torch.float64)
    if len(terms) == structure.k * (structure.k + 1) // 2:
        for n, i, j, _ in terms:
            sums[n] = weights[i] * weights[j] * (1 if i == j else 2)
        return _Pairs(weights, weights, sums)
    count = torch.bincount(torch.tensor([[t.i, t.j] for t in terms]).flatten(), minlength=structure.k)
    first = int(torch.where(sizes > 0, count, -1).argmax())  # the direction of most pairs
    left, right = torch.zeros_like(weights), torch.zeros_like(weights)
    left[first] = weights[first]
    for n, i, j, _ in terms:
        if first in (i, j):
            other = j if i == first else i
            right[other] = weights[other]
            sums[n] = weights[first] * weights[other]
    return _Pairs(left, right, sums)


def _path(v: list[Rows], h: float, a: list[Rows], square: float) -> list[Rows]:
    out: list[Rows] = []
    for n, x in enumerate(v):
        bent = a[n] if a else None
        moved = None if x is None else h * x
        out.append(moved if bent is None else square * bent if moved is None else moved + square * bent)
    return out


def _verdict(
    what: str,
    ours: Tensor,
    rows: list[Tensor],
    noise: list[Tensor],
    tolerance: float,
    sided: list[Tensor] | None = None,
) -> Verdict:
    """What differences at shrinking steps say of each output.

    Three in a row that agree, ten times better than with ours, convict it, if they are the shortest ones that rounding
    does not blur: over longer steps a function with many kinks has another curvature. At a kink, where those of the two
    sides differ, nothing is said.
    """
    zero = torch.zeros_like(ours)
    agrees = (ours.abs() <= 10 * noise[0]) & (rows[0].abs() <= 10 * noise[0])  # both are zero to rounding
    convicted, away, spread, size = torch.zeros_like(agrees), zero, zero, zero
    clear = torch.ones_like(agrees)
    for n, (row, e) in enumerate(zip(rows, noise, strict=True)):
        clear = clear & row.isfinite() & ours.isfinite() & (e <= 0.1 * tolerance * torch.maximum(row.abs(), ours.abs()))
        if n < 2:
            continue
        a, b, c = rows[n - 2 : n + 1]
        long = torch.maximum(b.abs(), ours.abs()).clamp_min(1e-300)
        between = torch.maximum((a - b).abs(), (b - c).abs())
        off = torch.stack([(r - ours).abs() for r in (a, b, c)]).amin(0)
        near = between <= tolerance * long
        agrees |= clear & near & (off <= torch.maximum(10 * between, 1e-9 * long))
        far = near & (off > 10 * between) & (off > tolerance * long)
        if sided is not None:
            far &= sided[n] <= 0.1 * off
        convicted = torch.where(clear, far, convicted)
        away, spread, size = (
            torch.where(clear, new, old) for new, old in ((off, away), (between, spread), (long, size))
        )
    wrong = convicted & ~agrees
    if bool(wrong.any()):
        worst = int(torch.where(wrong, away / size, 0.0).argmax())
        off, apart = (float(e[worst] / size[worst]) for e in (away, spread))
        return Verdict(what, "differs from differences", (worst, off, apart))
    if bool(agrees.all()):
        return Verdict(what, "agrees with differences")
    some = int(agrees.sum())
    return Verdict(
        what, f"agrees with differences in {some} of {len(ours)} outputs, unclear in others" if some else "unclear"
    )
