"""The filter line search of Wächter, Biegler 2006 (section 2.3), with second-order corrections (2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .iterates import EPSILON, GAMMA_PHI, GAMMA_THETA, Point, State

# Constants of the paper.
DELTA, S_THETA, S_PHI, ETA_PHI, GAMMA_ALPHA = 1.0, 1.1, 2.3, 1e-8, 0.05
CORRECTIONS, KAPPA_SOC = 4, 0.99


class Direction(NamedTuple):
    """Of variables and slacks, and of multipliers."""

    w: Tensor
    multipliers: Tensor


class Step(NamedTuple):
    """What a line search has found; where it has not, `accepted` is false."""

    length: Tensor
    w: Tensor  # the new iterate
    used: Direction  # with corrections
    accepted: Tensor
    by_cost: Tensor  # the cost has fallen as Armijo's rule asks


def search(
    evaluate: Callable[[Tensor], Point],
    s: State,
    point: Point,
    first: Direction,
    slope: Tensor,
    corrected: Callable[[Tensor], Direction],
    longest: Callable[[Tensor], Tensor],
    failed: Tensor,
    feasible: float,
) -> Step:
    """Search along a direction, halving the step.

    Args:
        evaluate: functions at an iterate.
        s: where the search starts.
        point: functions there.
        first: Newton's direction.
        slope: of the barrier function along it.
        corrected: the direction for other values of the constraints.
        longest: how far a direction can be followed within the bounds.
        failed: problems without a direction.
        feasible: violation of a constraint below which steps at the limit of rounding are taken as they are.
    """
    switching = (slope < 0) & (point.theta <= s.theta_least)
    power = torch.where(slope < 0, (-slope).clamp_min(0.0) ** S_PHI, 0.0)
    by_cost = torch.where(slope < 0, GAMMA_PHI * point.theta / -slope, GAMMA_THETA)
    by_cost = torch.where(switching, torch.minimum(by_cost, DELTA * point.theta**S_THETA / power), by_cost)
    least = GAMMA_ALPHA * by_cost.clamp_max(GAMMA_THETA)
    least = torch.where(least.isfinite(), least, GAMMA_ALPHA * GAMMA_THETA).clamp_min(1e-14)
    tiny = ((first.w.abs() / (1 + s.w.abs())).amax(0) < 10 * EPSILON) & ~failed
    tiny &= point.constraints.abs().amax(0) <= feasible
    rounding = 10 * EPSILON * point.phi.abs()

    def judged(alpha: Tensor, trial: Point) -> tuple[Tensor, Tensor]:
        armijo = switching & (alpha * power > DELTA * point.theta**S_THETA)
        enough = trial.phi <= point.phi + ETA_PHI * alpha * slope + rounding
        progress = (trial.theta <= (1 - GAMMA_THETA) * point.theta) | (
            trial.phi <= point.phi - GAMMA_PHI * point.theta + rounding
        )
        in_filter = ((trial.theta <= s.filter_theta) | (trial.phi <= s.filter_phi + rounding)).all(0)
        good = trial.finite & (trial.theta <= s.theta_most) & in_filter & torch.where(armijo, enough, progress)
        return good | (tiny & trial.finite), armijo & enough

    alpha = longest(first.w)
    result, used, multipliers = s.w.clone(), first.w.clone(), first.multipliers.clone()
    accepted, lowered = torch.zeros_like(failed), torch.zeros_like(failed)
    pending = ~failed
    trials = 0
    while bool(pending.any()):
        w = s.w + alpha * first.w
        trial = evaluate(w)
        good, armijo = judged(alpha, trial)
        new = pending & good
        result = torch.where(new, w, result)
        accepted, lowered, pending = accepted | new, lowered | (new & armijo), pending & ~new
        if trials == 0:
            wanted = pending & trial.finite & (trial.theta >= point.theta)
            before, constraints, step = point.theta, point.constraints, alpha
            for _ in range(CORRECTIONS):
                if not bool(wanted.any()):
                    break
                constraints = torch.where(wanted, step * constraints + trial.constraints, constraints)
                other = corrected(constraints)
                step = longest(other.w)
                w = s.w + step * other.w
                trial = evaluate(w)
                good, armijo = judged(alpha, trial)
                new = wanted & good & other.w.isfinite().all(0)
                result, alpha = torch.where(new, w, result), torch.where(new, step, alpha)
                used = torch.where(new, other.w, used)
                multipliers = torch.where(new, other.multipliers, multipliers)
                accepted, lowered, pending = accepted | new, lowered | (new & armijo), pending & ~new
                wanted = wanted & ~new & trial.finite & (trial.theta <= KAPPA_SOC * before)
                before = trial.theta
        trials += 1
        alpha = torch.where(pending, alpha / 2, alpha)
        pending = pending & (alpha >= least)
    return Step(alpha, result, Direction(used, multipliers), accepted, lowered)
