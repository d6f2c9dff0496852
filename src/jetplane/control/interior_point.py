"""A primal-dual interior-point method with a filter line search, for many programs at once.

    minimize f(y)  such that  lower <= y <= upper,  constraint_lower <= g(y) <= constraint_upper

The method is that of Wächter, Biegler, *On the implementation of an interior-point filter line-search algorithm for
large-scale nonlinear programming*, Mathematical Programming 106 (2006), with its constants. Inequalities get slacks; a
barrier parameter falls monotonically. Steps are those of Newton's method on the perturbed conditions of optimality,
with a multiple of the identity added to the Hessian where the inertia is not that of a minimum, and with second-order
corrections. A filter accepts progress in cost or in feasibility. Linear systems go to `jetplane.control.kkt`. Where the
line search fails, steps of least norm towards the linearized constraints restore feasibility; this is simpler than the
paper's restoration, and the one part that is not of the paper.

All programs of a batch make their iterations together; each has its own barrier parameter, filter, step lengths,
regularization and status. Vectors have shape (size, problems).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ipopt import Scaling, interrupts
from .kkt import KKT, Factorization
from .nlp import NLP
from .problem import INFINITY
from .status import Iteration, Outcome, Status

# Constants of the paper, by its names or by those of IPOPT's options.
KAPPA_EPSILON, KAPPA_MU, THETA_MU, TAU_MIN, KAPPA_SIGMA, S_MAX = 10.0, 0.2, 1.5, 0.99, 1e10, 100.0
GAMMA_THETA, GAMMA_PHI, DELTA, S_THETA, S_PHI, ETA_PHI = 1e-5, 1e-8, 1.0, 1.1, 2.3, 1e-8
FIRST_DELTA, LEAST_DELTA, MOST_DELTA = 1e-4, 1e-20, 1e20
BOUND_PUSH, BOUND_RELAX, DAMPING, MULTIPLIERS = 1e-2, 1e-8, 1e-5, 1e3
CORRECTIONS, KAPPA_SOC = 4, 0.99
ACCEPTABLE, ACCEPTABLE_ITERATIONS = 1e-6, 15
EQUALITY = 1e-8  # D of equality constraints of the path, which iterative refinement takes back
REFINEMENTS, RESIDUAL = 6, 1e-10
RESTORATIONS = 100
VIOLATION = 1e-4  # of constraints and bounds, in the units of the problem, at most
COMPLEMENTARITY = 1e-4  # products of distances and multipliers, in the units of the cost, at most
STATIONARY = 1e-6  # gradient of the infeasibility below which nothing near is less infeasible
EPSILON = float(np.finfo(float).eps)


@dataclass
class _State:
    """Iterates of all problems; every tensor's last dimension is that of problems."""

    number: Tensor  # of the problem in the batch
    w: Tensor  # variables and slacks
    multipliers: Tensor
    at_lower: Tensor
    at_upper: Tensor
    lower: Tensor
    upper: Tensor
    fixed: Tensor
    mu: Tensor
    last_delta: Tensor
    theta_least: Tensor
    theta_most: Tensor
    filter_theta: Tensor
    filter_phi: Tensor
    acceptable: Tensor  # iterations in a row
    restoring: Tensor  # iterations of the restoration, 0 outside
    target: Tensor  # infeasibility below which it ends

    def select(self, chosen: Tensor) -> _State:
        return _State(**{f.name: getattr(self, f.name)[..., chosen] for f in fields(self)})


@dataclass
class _Point:
    """Functions at an iterate, scaled."""

    objective: Tensor
    constraints: Tensor  # (constraints, problems), less slacks and right-hand sides
    theta: Tensor
    phi: Tensor
    finite: Tensor


def solve(
    nlp: NLP,
    start: Outcome,
    *,
    options: dict[str, Any],
    scaling: Scaling | None = None,
    warm: bool = False,
    on_iteration: Callable[[Iteration], None] | None = None,
) -> Outcome:
    """Solve a program from `start` (its y; with `warm` its multipliers too); see `solve_batch`."""
    bounds = nlp.lower[:, None], nlp.upper[:, None]
    [outcome] = solve_batch(
        nlp, start.y[:, None], *bounds, options=options, scaling=scaling, warm=start if warm else None,
        on_iteration=on_iteration,
    )  # fmt: skip
    return outcome


def solve_batch(
    nlp: NLP,
    y: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    options: dict[str, Any],
    scaling: Scaling | None = None,
    warm: Outcome | None = None,
    on_iteration: Callable[[Iteration], None] | None = None,
    device: torch.device | str = "cpu",
    stop: threading.Event | None = None,
) -> list[Outcome]:
    """Solve programs that differ by the bounds of their variables.

    Args:
        nlp: structure, functions, bounds of constraints.
        y: first iterates (variables, problems).
        lower: bounds (variables, problems).
        upper: likewise.
        options: ``tol``, ``max_iterations``, ``time_limit`` (seconds or None).
        scaling: factors for variables, constraints and the cost.
        warm: multipliers to start from, of the single program.
        on_iteration: is called with the numbers of the problem that is furthest from its end.
        device: of the linear algebra; functions are computed on the CPU.
        stop: ends the iterations when it is set, as Ctrl-C does, which sets it.

    Returns:
        outcomes in the order of the problems.
    """
    stop = stop or threading.Event()
    with interrupts(stop), torch.no_grad():
        return _InteriorPoint(nlp, y, lower, upper, options, scaling, warm, on_iteration, device, stop).run()


class _InteriorPoint:
    def __init__(self, nlp, y, lower, upper, options, scaling, warm, on_iteration, device, stop) -> None:
        self.program, self.on_iteration, self.stop = nlp, on_iteration, stop
        self.device = torch.device(device)
        self.tol, self.limit = options["tol"], options["max_iterations"]
        left = options.get("time_limit")
        self.deadline = None if left is None else time.monotonic() + left
        self.callbacks = 0.0
        scaling = scaling or Scaling(np.ones(nlp.n), np.ones(nlp.m), 1.0)
        self.sizes, self.rows, self.factor = 1 / scaling.variables, scaling.constraints, scaling.objective
        rows, columns = nlp.jacobian_structure
        self.jacobian_scale = self.tensor(self.rows[rows] * self.sizes[columns])[:, None]
        rows, columns = nlp.hessian_structure
        self.hessian_scale = self.tensor(self.sizes[rows] * self.sizes[columns])[:, None]
        low, high = nlp.constraint_lower * self.rows, nlp.constraint_upper * self.rows
        equal = nlp.constraint_lower == nlp.constraint_upper
        self.slack = self.tensor(np.flatnonzero(~equal))
        self.right = self.tensor(np.where(equal, low, 0.0))[:, None]
        lower, upper = lower / self.sizes[:, None], upper / self.sizes[:, None]
        y = np.clip(y / self.sizes[:, None], lower, upper)
        problems = y.shape[1]
        self.problems, self.n, self.m = problems, nlp.n, nlp.m
        fixed = self.tensor(lower == upper)
        fixable = torch.zeros(nlp.n, 1, dtype=torch.bool, device=self.device)
        for name, place in nlp.places.items():
            nodes = nlp.meshes[name].nodes
            for i in range(nlp.model.phases[name].sizes[0]):
                fixable[[place.states.start + i * (nodes + 1), place.states.start + i * (nodes + 1) + nodes]] = True
            for c in (place.t0, place.tf):
                if c is not None:
                    fixable[c] = True
            fixable[place.integrals] = fixable[place.controls] = True
        fixable[nlp.parameters] = True
        fixed &= fixable  # states within a phase get an interval about their value
        self.kkt = KKT(nlp, fixed, self.device)
        self.path = torch.zeros(nlp.m, 1, dtype=torch.bool, device=self.device)
        for place in nlp.places.values():
            self.path[place.path] = True
        self.is_slack = torch.zeros(nlp.m, 1, dtype=torch.bool, device=self.device)
        self.is_slack[self.slack] = True
        self.nlp = nlp.batch(problems)
        wide = lambda a: np.broadcast_to(a[~equal, None], (int((~equal).sum()), problems))  # noqa: E731
        lower = self.tensor(np.concatenate([lower, wide(low)]))
        upper = self.tensor(np.concatenate([upper, wide(high)]))
        still = torch.cat([fixed, torch.zeros(len(self.slack), problems, dtype=torch.bool, device=self.device)])
        unit = self.tensor(np.concatenate([1 / self.sizes, self.rows[~equal]]))[:, None]
        relax = lambda a: torch.minimum(BOUND_RELAX * a.abs().clamp_min(1), VIOLATION * unit)  # noqa: E731
        lower = torch.where((lower < -INFINITY) | still, -torch.inf, lower - relax(lower))
        upper = torch.where((upper > INFINITY) | still, torch.inf, upper + relax(upper))
        self.state = self._start(self.tensor(y), lower, upper, fixed, warm)
        self.outcomes: list[Outcome | None] = [None] * problems

    def tensor(self, a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(self.device)

    # Functions, scaled

    def _call(self, function: str, y: Tensor, *arguments: Any) -> Tensor:
        began = time.process_time()
        with np.errstate(all="ignore"):
            value = getattr(self.nlp, function)(y.cpu().numpy() * self.sizes[:, None], *arguments)
        self.callbacks += time.process_time() - began
        return self.tensor(value)

    def _jacobian(self, y: Tensor) -> Tensor:
        return self._call("jacobian", y) * self.jacobian_scale

    def _hessian(self, y: Tensor, multipliers: Tensor) -> Tensor:
        rows = multipliers.cpu().numpy() * self.rows[:, None]
        return self._call("hessian", y, rows, self.factor) * self.hessian_scale

    def _gradient(self, y: Tensor) -> Tensor:
        return self._call("gradient", y) * self.tensor(self.sizes * self.factor)[:, None]

    def _constraints(self, y: Tensor) -> Tensor:
        return self._call("constraints", y) * self.tensor(self.rows)[:, None]

    def _distances(self, s: _State, w: Tensor) -> tuple[Tensor, Tensor]:
        """To the bounds; infinite where there is none, never zero."""
        least = EPSILON * w.abs().clamp_min(1)
        return torch.maximum(w - s.lower, least), torch.maximum(s.upper - w, least)

    def _point(self, s: _State, w: Tensor) -> _Point:
        y = w[: self.n]
        objective = self._call("objective", y) * self.factor
        c = self._constraints(y) - self.right
        c[self.slack] -= w[self.n :]
        theta = c.abs().sum(0)
        phi = self._barrier(s, w, objective)
        return _Point(objective, c, theta, phi, theta.isfinite() & phi.isfinite())

    def _barrier(self, s: _State, w: Tensor, objective: Tensor) -> Tensor:
        """The cost with logarithms of the distances to bounds."""
        below, above = self._distances(s, w)
        # Variables with one bound get a small linear term, which keeps them from growing without end.
        logarithms = torch.where(below.isfinite(), below.log(), 0.0) + torch.where(above.isfinite(), above.log(), 0.0)
        single = below.isfinite() ^ above.isfinite()
        linear = torch.where(single, torch.minimum(below, above), 0.0)
        return objective + s.mu * (DAMPING * linear - logarithms).sum(0)

    # Start

    def _start(self, y: Tensor, lower: Tensor, upper: Tensor, fixed: Tensor, warm: Outcome | None) -> _State:
        push = 1e-9 if warm is not None else BOUND_PUSH
        w = self._pushed(y, lower[: self.n], upper[: self.n], push)
        slack = self._constraints(w)[self.slack]
        w = torch.cat([w, self._pushed(slack, lower[self.n :], upper[self.n :], push)])
        problems = w.shape[1]
        zeros, ones = w.new_zeros(problems), w.new_ones(problems)
        state = _State(
            torch.arange(problems, device=self.device), w, w.new_zeros(self.m, problems),
            lower.isfinite().to(w), upper.isfinite().to(w), lower, upper, fixed, 0.1 * ones, zeros.clone(),
            zeros.clone(), zeros.clone(), w.new_full((0, problems), torch.inf), w.new_full((0, problems), torch.inf),
            zeros.clone(), zeros.clone(), zeros.clone(),
        )  # fmt: skip
        if warm is None:
            state.multipliers = self._estimate(state)
        else:
            assert warm.multipliers is not None
            scale = self.factor * self.sizes
            dual = warm.multipliers / self.rows * self.factor
            state.multipliers = self.tensor(dual)[:, None].expand(-1, problems).clone()
            state.mu = 1e-6 * ones
            slack = self.tensor(dual)[self.slack]
            for target, values, sign in (
                (state.at_lower, warm.lower_multipliers, -1.0),
                (state.at_upper, warm.upper_multipliers, 1.0),
            ):
                if values is not None:
                    both = torch.cat([self.tensor(values * scale), (sign * slack).clamp_min(0.0)])[:, None]
                    target.copy_(torch.where(target > 0, both.clamp_min(1e-9), 0.0))
        point = self._point(state, w)
        state.theta_least, state.theta_most = 1e-4 * point.theta.clamp_min(1), 1e4 * point.theta.clamp_min(1)
        return state

    @staticmethod
    def _pushed(w: Tensor, lower: Tensor, upper: Tensor, push: float) -> Tensor:
        width = upper - lower
        low = lower + torch.minimum(push * lower.abs().clamp_min(1), push * width)
        high = upper - torch.minimum(push * upper.abs().clamp_min(1), push * width)
        return torch.minimum(
            torch.maximum(w, torch.where(low.isfinite(), low, w)), torch.where(high.isfinite(), high, w)
        )

    def _estimate(self, s: _State) -> Tensor:
        """Multipliers by least squares of the conditions of optimality; zero where they would be too large."""
        y = s.w[: self.n]
        jacobian = self._jacobian(y)
        hessian = jacobian.new_zeros(len(self.kkt.hessian_places[0]), y.shape[1])
        right = torch.where(s.fixed, 0.0, -(self._gradient(y) - s.at_lower[: self.n] + s.at_upper[: self.n]))
        slack = s.at_lower[self.n :] - s.at_upper[self.n :]
        c = jacobian.new_zeros(self.m, y.shape[1])
        c[self.slack] = slack
        damping = torch.where(self.is_slack, 1.0, torch.where(self.path, EQUALITY, 0.0)).expand(-1, y.shape[1]).to(c)
        factor = self.kkt.factor(self.kkt.condense(jacobian), hessian, torch.ones_like(y), damping, s.fixed)
        _, dual = self.kkt.solve(factor, right, c)
        small = dual.abs().amax(0) <= MULTIPLIERS  # NaN is not
        return torch.where(small, dual, 0.0)

    # Iterations

    def run(self) -> list[Outcome]:
        """Iterate until every problem has ended."""
        self.iteration = 0
        s = self.state
        self.best = torch.full((self.problems,), torch.inf, dtype=s.w.dtype, device=self.device)
        self.best_y = s.w[: self.n].clone()
        while True:
            s = self._iterate(s)
            if not s.number.numel():
                break
            self.iteration += 1
        return self.outcomes  # type: ignore[return-value]

    def _iterate(self, s: _State, again: bool = False) -> _State:
        """One iteration of all problems; `again` where some have just left, and the others are looked at anew."""
        y = s.w[: self.n]
        point = self._point(s, s.w)
        gradient, jacobian = self._gradient(y), self._jacobian(y)
        below, above = self._distances(s, s.w)
        bounded = s.lower.isfinite(), s.upper.isfinite()
        # Conditions of optimality
        slope = torch.cat([gradient + self.kkt.transposed_times(jacobian, s.multipliers), -s.multipliers[self.slack]])
        dual = slope - s.at_lower + s.at_upper
        dual[: self.n].masked_fill_(s.fixed, 0.0)
        products = [
            torch.where(b, d * z, 0.0)
            for b, d, z in zip(bounded, (below, above), (s.at_lower, s.at_upper), strict=True)
        ]
        count = (bounded[0].sum(0) + bounded[1].sum(0)).clamp_min(1)
        sizes = s.at_lower.sum(0) + s.at_upper.sum(0)
        s_d = (((sizes + s.multipliers.abs().sum(0)) / (self.m + count)).clamp_min(S_MAX)) / S_MAX
        s_c = ((sizes / count).clamp_min(S_MAX)) / S_MAX
        infeasible, optimality = point.constraints.abs().amax(0), dual.abs().amax(0)

        def error(mu: Tensor) -> Tensor:
            worst = torch.zeros_like(mu)
            for b, product in zip(bounded, products, strict=True):
                worst = torch.maximum(worst, torch.where(b, (product - mu).abs(), 0.0).amax(0))
            return torch.maximum(torch.maximum(optimality / s_d, infeasible), worst / s_c)

        total = error(torch.zeros_like(s.mu))
        self._remember(s, total)
        if self.on_iteration is not None and not again:
            worst = int(total.argmax())
            self.on_iteration(
                Iteration(self.iteration, float(point.objective[worst]) / self.factor, float(infeasible[worst]),
                          float(optimality[worst]), float(s.mu[worst]))
            )  # fmt: skip
        outside = s.restoring == 0
        # As in IPOPT, errors in the units of the problem are limited, too, so that no scaling can hide them.
        violation = (point.constraints.abs() / self.tensor(self.rows)[:, None]).amax(0)
        unscaled = (dual[: self.n].abs() / self.tensor(self.sizes * self.factor)[:, None]).amax(0)
        if not again:
            nearly = (total <= ACCEPTABLE) & (violation <= 1e-2) & outside
            s.acceptable = torch.where(nearly, s.acceptable + 1, 0.0)
        gap = torch.maximum(products[0].amax(0), products[1].amax(0)) / self.factor
        solved = (total <= self.tol) & (violation <= VIOLATION) & (unscaled <= 1) & (gap <= COMPLEMENTARITY) & outside
        ended: dict[Status, Tensor] = {Status.SOLVED: solved}
        ended[Status.ACCEPTABLE] = (s.acceptable >= ACCEPTABLE_ITERATIONS) & ~solved
        running = ~solved & ~ended[Status.ACCEPTABLE]
        over = None
        if self.stop.is_set():
            over = Status.STOPPED
        elif self.iteration >= self.limit:
            over = Status.ITERATION_LIMIT
        elif self.deadline is not None and time.monotonic() > self.deadline:
            over = Status.TIME_LIMIT
        if over is not None:
            ended[over] = running
        ended[Status.NOT_A_NUMBER] = running & ~(point.finite & jacobian.isfinite().all(0) & gradient.isfinite().all(0))
        ended[Status.DIVERGED] = running & (s.w.abs().amax(0) > INFINITY)
        finished = torch.stack(list(ended.values())).any(0)
        if bool(finished.any()):
            for status, which in ended.items():
                self._finish(s, which, status)
            # What has ended leaves the batch where this is worth the copies, else its steps are not looked at.
            keep = (~finished).nonzero()[:, 0]
            s = s.select(keep)
            if not len(keep):
                return s
            self.nlp = self.program.batch(len(keep))
            return self._iterate(s, again=True)
        # The barrier parameter
        least = min(self.tol, COMPLEMENTARITY * self.factor) / (KAPPA_EPSILON + 1)
        while True:
            lower = outside & (error(s.mu) <= KAPPA_EPSILON * s.mu) & (s.mu > least)
            if not bool(lower.any()):
                break
            s.mu = torch.where(lower, torch.minimum(KAPPA_MU * s.mu, s.mu**THETA_MU).clamp_min(least), s.mu)
            s.filter_theta = torch.where(lower, torch.inf, s.filter_theta)
            s.filter_phi = torch.where(lower, torch.inf, s.filter_phi)
        keep = s.filter_theta.isfinite().any(1)
        s.filter_theta, s.filter_phi = s.filter_theta[keep], s.filter_phi[keep]
        point = replace(point, phi=self._barrier(s, s.w, point.objective))
        return self._step(s, point, gradient, jacobian, slope, below, above, bounded)

    def _remember(self, s: _State, total: Tensor) -> None:
        better = total <= self.best[s.number]
        which = s.number[better]
        self.best[which] = total[better]
        self.best_y[:, which] = s.w[: self.n, better]

    def _finish(self, s: _State, which: Tensor, status: Status) -> None:
        for k in which.nonzero()[:, 0].tolist():
            number = int(s.number[k])
            y = (s.w[: self.n, k] if status.success else self.best_y[:, number]).cpu().numpy() * self.sizes
            scale = self.factor * self.sizes
            self.outcomes[number] = Outcome(
                status,
                y,
                self.program.objective(y),
                self.iteration,
                s.multipliers[:, k].cpu().numpy() * self.rows / self.factor,
                s.at_lower[: self.n, k].cpu().numpy() / scale,
                s.at_upper[: self.n, k].cpu().numpy() / scale,
                self.callbacks / self.problems,
            )

    def _step(self, s: _State, point: _Point, gradient, jacobian, slope, below, above, bounded) -> _State:
        n = self.n
        y = s.w[:n]
        restoring = s.restoring > 0
        single = bounded[0] ^ bounded[1]
        barrier = torch.cat([gradient, gradient.new_zeros(len(self.slack), gradient.shape[1])])
        barrier = barrier - s.mu / below + s.mu / above
        barrier = barrier + torch.where(single, torch.where(bounded[0], DAMPING * s.mu, -DAMPING * s.mu), 0.0)
        hessian = self._hessian(y, s.multipliers)
        sigma = s.at_lower / below + s.at_upper / above
        right = -slope - barrier
        right[:n] += gradient  # which both have
        if bool(restoring.any()):
            # The least step, in a norm that grows towards bounds, to where linearized constraints hold.
            hessian = torch.where(restoring, 0.0, hessian)
            sigma = torch.where(restoring, 1.0 + s.mu / below**2 + s.mu / above**2, sigma)
            right = torch.where(restoring, 0.0, right)
        right[:n].masked_fill_(s.fixed, 0.0)
        factor, delta, damping, failed = self._factor(s, jacobian, hessian, sigma)
        tau = (1 - s.mu).clamp_min(TAU_MIN)

        def direction(constraints: Tensor) -> tuple[Tensor, Tensor]:
            total = sigma + delta
            c = -constraints
            c[self.slack] += right[n:] / total[n:].clamp_min(1e-20)
            dy, dual = self._refined(factor, jacobian, hessian, total[:n], damping, right[:n], c, s.fixed)
            ds = (right[n:] + dual[self.slack]) / total[n:].clamp_min(1e-20)
            return torch.cat([dy, ds]), dual

        def longest(dw: Tensor) -> Tensor:
            down = torch.where(dw < 0, -tau * below / dw, torch.inf)
            up = torch.where(dw > 0, tau * above / dw, torch.inf)
            return torch.minimum(down, up).amin(0).clamp_max(1.0)

        if bool(failed.all()):
            dw, dual = torch.zeros_like(s.w), torch.zeros_like(s.multipliers)
        else:
            dw, dual = direction(point.constraints)
        failed |= ~(dw.isfinite().all(0) & dual.isfinite().all(0))
        dw, dual = torch.where(failed, 0.0, dw), torch.where(failed, 0.0, dual)
        most = longest(dw)
        change = (barrier * dw).sum(0)
        alpha, w, dual, used, accepted, armijo = self._search(
            s, point, dw, dual, most, change, direction, longest, failed, restoring
        )
        # Multipliers of bounds
        d_lower = torch.where(bounded[0], s.mu / below - s.at_lower - s.at_lower / below * used, 0.0)
        d_upper = torch.where(bounded[1], s.mu / above - s.at_upper + s.at_upper / above * used, 0.0)
        beta = torch.ones_like(alpha)
        for z, dz in ((s.at_lower, d_lower), (s.at_upper, d_upper)):
            beta = torch.minimum(beta, torch.where(dz < 0, -tau * z / dz, torch.inf).amin(0))
        newton = accepted & ~restoring
        # The filter takes what a step has left that did not lower the cost enough.
        adds = newton & ~armijo
        if bool(adds.any()):
            self._filter(s, point, adds)
        s = replace(
            s,
            w=torch.where(accepted, w, s.w),
            multipliers=torch.where(newton, s.multipliers + alpha * dual, s.multipliers),
            at_lower=torch.where(newton, s.at_lower + beta * d_lower, s.at_lower),
            at_upper=torch.where(newton, s.at_upper + beta * d_upper, s.at_upper),
            last_delta=torch.where((delta > 0) & ~restoring, delta, s.last_delta),
        )
        s = self._restore(s, point, accepted, restoring)
        below, above = self._distances(s, s.w)  # of those that are left
        for z, distance, b in (("at_lower", below, s.lower.isfinite()), ("at_upper", above, s.upper.isfinite())):
            least, largest = s.mu / (KAPPA_SIGMA * distance), KAPPA_SIGMA * s.mu / distance
            value = torch.minimum(torch.maximum(getattr(s, z), least), largest)
            setattr(s, z, torch.where(b, value, 0.0))
        return s

    @staticmethod
    def _filter(s: _State, point: _Point, which: Tensor) -> None:
        theta = torch.where(which, (1 - GAMMA_THETA) * point.theta, torch.inf)
        phi = torch.where(which, point.phi - GAMMA_PHI * point.theta, torch.inf)
        s.filter_theta = torch.cat([s.filter_theta, theta[None]])
        s.filter_phi = torch.cat([s.filter_phi, phi[None]])

    def _factor(self, s: _State, jacobian, hessian, sigma) -> tuple[Factorization, Tensor, Tensor, Tensor]:
        """Factors with the right inertia, the multiples of the identity they took, and where there are none."""
        n = self.n
        delta = torch.zeros_like(s.mu)

        def damped(which):
            total = sigma[n:, which] + delta[which]
            d = total.new_zeros(self.m, total.shape[1])
            d[self.slack] = 1 / total.clamp_min(1e-20)
            return d

        condensed = self.kkt.condense(jacobian)

        def factored(chosen: Tensor | None) -> Factorization:
            which = slice(None) if chosen is None else chosen
            damping = torch.where(self.path & ~self.is_slack, EQUALITY, damped(which))
            return self.kkt.factor(
                condensed if chosen is None else condensed.select(chosen),
                hessian[:, which], sigma[:n, which] + delta[which], damping, s.fixed[:, which],
            )  # fmt: skip

        everything = torch.arange(len(delta), device=self.device)
        factor = factored(None)
        failed = torch.zeros_like(s.fixed[0])
        while True:
            bad = ~factor.correct & ~failed
            if not bool(bad.any()):
                break
            first = torch.where(s.last_delta == 0, FIRST_DELTA, (s.last_delta / 3).clamp_min(LEAST_DELTA))
            grown = torch.where(s.last_delta == 0, 100.0, 8.0) * delta
            delta = torch.where(bad, torch.where(delta == 0, first, grown), delta)
            failed |= delta > MOST_DELTA
            which = everything[bad & ~failed]
            if len(which) == len(everything):
                factor = factored(None)
            elif len(which):
                factor.update(which, factored(which))
        return factor, delta, damped(slice(None)), failed

    def _refined(self, factor, jacobian, hessian, sigma, damping, b, c, fixed) -> tuple[Tensor, Tensor]:
        """The solution of the system, with iterative refinement."""
        dy, dual = self.kkt.solve(factor, b, c)
        size = torch.maximum(b.abs().amax(0), c.abs().amax(0))
        previous = torch.full_like(size, torch.inf)
        for _ in range(REFINEMENTS):
            r, q = self.kkt.residual(jacobian, hessian, sigma, damping, fixed, (b, c), (dy, dual))
            residual = torch.maximum(r.abs().amax(0), q.abs().amax(0))
            length = torch.maximum(dy.abs().amax(0), dual.abs().amax(0)).clamp_max(1e6 * size)
            worse = ~(residual < 0.5 * previous)
            if bool(((residual <= RESIDUAL * (size + length)) | worse).all()):
                break
            more, other = self.kkt.solve(factor, r, q)
            improve = ~worse
            dy, dual = torch.where(improve, dy + more, dy), torch.where(improve, dual + other, dual)
            previous = residual
        return dy, dual

    # Line search

    def _search(self, s, point, dw, dual, most, change, direction, longest, failed, restoring):
        """Step lengths, new iterates, directions of multipliers and variables used, where accepted, where by cost."""
        switching = (change < 0) & (point.theta <= s.theta_least)
        power = torch.where(change < 0, (-change).clamp_min(0.0) ** S_PHI, 0.0)
        least = torch.where(
            change < 0,
            torch.minimum(
                torch.full_like(change, GAMMA_THETA),
                torch.where(
                    switching,
                    torch.minimum(GAMMA_PHI * point.theta / -change, DELTA * point.theta**S_THETA / power),
                    GAMMA_PHI * point.theta / -change,
                ),
            ),
            GAMMA_THETA,
        )
        least = 0.05 * torch.where(least.isfinite(), least, GAMMA_THETA)
        least = torch.where(restoring, 1e-8, least.clamp_min(1e-14))
        # Steps at the limit of rounding are taken as they are, but for those that leave constraints violated.
        tiny = ((dw.abs() / (1 + s.w.abs())).amax(0) < 10 * EPSILON) & ~restoring & ~failed
        tiny &= point.constraints.abs().amax(0) <= VIOLATION
        alpha = most.clone()
        result, used, multiplier = s.w.clone(), dw.clone(), dual.clone()
        accepted, by_cost = torch.zeros_like(failed), torch.zeros_like(failed)
        pending = ~failed
        slack = 10 * EPSILON * point.phi.abs()

        def judged(alpha: Tensor, trial: _Point) -> tuple[Tensor, Tensor]:
            armijo = switching & (alpha * power > DELTA * point.theta**S_THETA)
            enough = trial.phi <= point.phi + ETA_PHI * alpha * change + slack
            progress = (trial.theta <= (1 - GAMMA_THETA) * point.theta) | (
                trial.phi <= point.phi - GAMMA_PHI * point.theta + slack
            )
            in_filter = ((trial.theta <= s.filter_theta) | (trial.phi <= s.filter_phi + slack)).all(0)
            good = trial.finite & (trial.theta <= s.theta_most) & in_filter & torch.where(armijo, enough, progress)
            nearer = trial.finite & (trial.theta <= (1 - 1e-4 * alpha) * point.theta)
            return torch.where(restoring, nearer, good) | (tiny & trial.finite), armijo & enough

        trials = 0
        while bool(pending.any()):
            w = s.w + alpha * dw
            trial = self._point(s, w)
            good, armijo = judged(alpha, trial)
            new = pending & good
            result = torch.where(new, w, result)
            accepted, by_cost, pending = accepted | new, by_cost | (new & armijo), pending & ~new
            if trials == 0:
                wanted = pending & trial.finite & (trial.theta >= point.theta) & ~restoring
                before = point.theta
                constraints = point.constraints
                step = alpha
                for _ in range(CORRECTIONS):
                    if not bool(wanted.any()):
                        break
                    constraints = torch.where(wanted, step * constraints + trial.constraints, constraints)
                    corrected, other = direction(constraints)
                    step = longest(corrected)
                    w = s.w + step * corrected
                    trial = self._point(s, w)
                    good, armijo = judged(alpha, trial)
                    new = wanted & good & corrected.isfinite().all(0)
                    result, alpha = torch.where(new, w, result), torch.where(new, step, alpha)
                    used, multiplier = torch.where(new, corrected, used), torch.where(new, other, multiplier)
                    accepted, by_cost, pending = accepted | new, by_cost | (new & armijo), pending & ~new
                    wanted = wanted & ~new & trial.finite & (trial.theta <= KAPPA_SOC * before)
                    before = trial.theta
            trials += 1
            alpha = torch.where(pending, alpha / 2, alpha)
            pending = pending & (alpha >= least)
        return alpha, result, multiplier, used, accepted, by_cost

    # Restoration

    def _restore(self, s: _State, point: _Point, accepted: Tensor, restoring: Tensor) -> _State:
        """Enter the restoration where the line search has failed; leave it where it succeeds, end where it fails."""
        enter = ~accepted & ~restoring
        if bool(enter.any()):
            self._filter(s, point, enter)
            s.restoring = torch.where(enter, 1.0, s.restoring)
            s.target = torch.where(enter, 0.9 * point.theta, s.target)
        if not bool(restoring.any()):
            # Without infeasibility there is nothing to restore.
            self._give_up(s, enter & (point.theta <= self.tol), Status.STALLED)
            return self._without_ended(s)
        s.restoring = torch.where(restoring, s.restoring + 1, s.restoring)
        now = self._point(s, s.w)
        in_filter = ((now.theta <= s.filter_theta) | (now.phi <= s.filter_phi)).all(0)
        done = restoring & accepted & (now.theta <= s.target) & in_filter
        if bool(done.any()):
            below, above = self._distances(s, s.w)
            for z, distance in (("at_lower", below), ("at_upper", above)):
                fresh = torch.where(distance.isfinite(), (s.mu / distance).clamp_max(MULTIPLIERS), 0.0)
                setattr(s, z, torch.where(done, fresh, getattr(s, z)))
            s.multipliers = torch.where(done, self._estimate(s), s.multipliers)
            s.restoring = torch.where(done, 0.0, s.restoring)
        stuck = restoring & ~done & (~accepted | (s.restoring > RESTORATIONS))
        feasible = now.theta <= self.tol
        self._give_up(s, stuck & feasible, Status.STALLED)
        if bool((stuck & ~feasible).any()):
            nowhere = self._stationary(s, now)
            self._give_up(s, stuck & ~feasible & nowhere, Status.INFEASIBLE)
            self._give_up(s, stuck & ~feasible & ~nowhere, Status.RESTORATION_FAILED)
        return self._without_ended(s)

    def _stationary(self, s: _State, point: _Point) -> Tensor:
        """Where no direction within the bounds lowers the sum of squares of the constraints."""
        c, jacobian = point.constraints, self._jacobian(s.w[: self.n])
        slope = torch.cat([self.kkt.transposed_times(jacobian, c).masked_fill(s.fixed, 0.0), -c[self.slack]])
        below, above = self._distances(s, s.w)
        room = torch.where(slope > 0, below, above).clamp_max(1.0)
        # Each component in proportion to its terms, so that none with large ones hides others.
        sizes = torch.cat([self.kkt.transposed_times(jacobian.abs(), c.abs()), c[self.slack].abs()])
        sizes = torch.maximum(sizes, STATIONARY * sizes.amax(0))
        return (slope.abs() * room <= STATIONARY * sizes).all(0)

    def _give_up(self, s: _State, which: Tensor, status: Status) -> None:
        if bool(which.any()):
            self._finish(s, which, status)

    def _without_ended(self, s: _State) -> _State:
        ended = torch.tensor([self.outcomes[int(k)] is not None for k in s.number], device=self.device)
        if not bool(ended.any()):
            return s
        keep = (~ended).nonzero()[:, 0]
        self.nlp = self.program.batch(max(len(keep), 1))
        return s.select(keep)
