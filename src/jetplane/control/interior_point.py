"""A primal-dual interior-point method with a filter line search, for many programs at once.

    minimize f(y)  such that  lower <= y <= upper,  constraint_lower <= g(y) <= constraint_upper

The method is that of Wächter, Biegler, *On the implementation of an interior-point filter line-search algorithm for
large-scale nonlinear programming*, Mathematical Programming 106 (2006), with its constants. Inequalities get slacks; a
barrier parameter falls monotonically. Steps are those of Newton's method on the perturbed conditions of optimality,
with a multiple of the identity added to the Hessian where the inertia is not that of a minimum, and with second-order
corrections. A filter accepts progress in cost or in feasibility (`jetplane.control.line_search`). Where the line search
fails, the same method minimizes the violation of the constraints (`jetplane.control.elastic`), until the filter accepts
an iterate; where this ends at a minimum of the violation, the problem is infeasible there. Linear systems go to
`jetplane.control.kkt`.

All programs of a batch make their iterations together; each has its own barrier parameter, filter, step lengths,
regularization and status. Vectors have shape (size, problems).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .elastic import Elastic
from .ipopt import Scaling, interrupts
from .iterates import DAMPING, Point, Program, State, evaluate
from .kkt import KKT, Factorization
from .line_search import Direction, search
from .nlp import NLP
from .problem import INFINITY
from .scaled import Scaled
from .status import Iteration, Outcome, Status

# Constants of the paper, by its names or by those of IPOPT's options.
KAPPA_EPSILON, KAPPA_MU, THETA_MU, TAU_MIN, KAPPA_SIGMA, S_MAX = 10.0, 0.2, 1.5, 0.99, 1e10, 100.0
FIRST_MU, WARM_MU = 0.1, 1e-6
FIRST_DELTA, LEAST_DELTA, MOST_DELTA = 1e-4, 1e-20, 1e20
BOUND_PUSH, WARM_PUSH, BOUND_RELAX, MULTIPLIERS = 1e-2, 1e-9, 1e-8, 1e3
ACCEPTABLE, ACCEPTABLE_ITERATIONS = 1e-6, 15
EQUALITY = 1e-8  # D of equality constraints of the path, which iterative refinement takes back
REFINEMENTS, RESIDUAL = 6, 1e-10
VIOLATION = 1e-4  # of constraints and bounds, in the units of the problem, at most
COMPLEMENTARITY = 1e-4  # products of distances and multipliers, in the units of the cost, at most
SHORT, SHORT_STEPS, RESETS = 1e-2, 5, 5  # length of steps; so many in a row empty the filter, so often at most
LESS, MUCH_LESS = 0.9, 0.1  # of the infeasibility before, that a restoration is to reach; that a filter is emptied for
ELASTIC_TOL, ELASTIC_ACCEPTABLE = 1e-6, 1e-4  # of the restoration
FAR = 1e6  # times the size of the start: where variables go that grow without end
UNDECIDED = (Status.STALLED, Status.RESTORATION_FAILED, Status.ITERATION_LIMIT, Status.INFEASIBLE)  # of the unbounded
SMALL, ROUNDING = 1e-2, 1e-10  # violation beside them: of constraints, and of rounding


@dataclass
class Limits:
    """When to end."""

    tol: float
    iterations: int
    deadline: float | None  # of the monotonic clock
    stop: threading.Event
    acceptable: float = ACCEPTABLE

    def reached(self) -> Status | None:
        """The limit that all problems have reached."""
        if self.stop.is_set():
            return Status.STOPPED
        return Status.TIME_LIMIT if self.deadline is not None and time.monotonic() > self.deadline else None


@dataclass
class Ended:
    """How a problem has ended, scaled."""

    status: Status
    w: Tensor
    multipliers: Tensor
    at_lower: Tensor
    at_upper: Tensor
    iterations: int


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
    left = options.get("time_limit")
    deadline = None if left is None else time.monotonic() + left
    limits = Limits(options["tol"], options["max_iterations"], deadline, stop)
    with interrupts(stop), torch.no_grad():
        program = Scaled(nlp, scaling, y.shape[1], torch.device(device))
        first, low, high = (program.tensor(a) / program.sizes for a in (y, lower, upper))
        method = _InteriorPoint(program, limits, on_iteration)
        state = method.start(first, low, high, warm)
        ended = method.run(state)
        return [_outcome(nlp, program, end, len(ended)) for end in ended]


def _outcome(nlp: NLP, program: Scaled, end: Ended, problems: int) -> Outcome:
    """The end of a problem in its own units."""
    sizes, rows = program.sizes[:, 0], program.rows[:, 0]
    y = (end.w[: program.n] * sizes).cpu().numpy()
    multipliers = (end.multipliers * rows / program.factor).cpu().numpy()
    at_lower, at_upper = (
        (z[: program.n] / (program.factor * sizes)).cpu().numpy() for z in (end.at_lower, end.at_upper)
    )
    seconds = program.seconds / problems
    return Outcome(end.status, y, nlp.objective(y), end.iterations, multipliers, at_lower, at_upper, seconds)


class _InteriorPoint:
    """The method for one program.

    Args:
        program: scaled.
        limits: when to end.
        on_iteration: as for `solve_batch`.
        enough: of numbers of problems and their w: those that have come far enough, and end as solved.
        kkt: the structure of the program's systems, where it is known already.
    """

    def __init__(
        self,
        program: Program,
        limits: Limits,
        on_iteration: Callable[[Iteration], None] | None,
        enough: Callable[[Tensor, Tensor], Tensor] | None = None,
        kkt: KKT | None = None,
    ) -> None:
        self.program, self.limits, self.on_iteration, self.enough = program, limits, on_iteration, enough
        self._kkt = kkt
        self.elastic_kkt: KKT | None = None
        self.n, self.m, self.slack, self.device = program.n, program.m, program.slack, program.device
        self.is_slack = torch.zeros_like(program.path)
        self.is_slack[self.slack] = True

    # Start

    def start(self, y: Tensor, lower: Tensor, upper: Tensor, warm: Outcome | None) -> State:
        """The first state of all problems from their variables and bounds, scaled."""
        program = self.program
        assert isinstance(program, Scaled)
        y = torch.minimum(torch.maximum(y, lower), upper)
        fixed = (lower == upper) & program.fixable  # states within a phase get an interval about their value
        problems, slack = y.shape[1], self.slack
        lower, upper = (
            torch.cat([b, c[slack].expand(-1, problems)])
            for b, c in ((lower, program.constraint_lower), (upper, program.constraint_upper))
        )
        still = torch.cat([fixed, fixed.new_zeros(len(slack), problems)])
        unit = torch.cat([1 / program.sizes, program.rows[slack]])
        relax = lambda a: torch.minimum(BOUND_RELAX * a.abs().clamp_min(1), VIOLATION * unit)  # noqa: E731
        lower = torch.where((lower < -INFINITY) | still, -torch.inf, lower - relax(lower))
        upper = torch.where((upper > INFINITY) | still, torch.inf, upper + relax(upper))
        push = BOUND_PUSH if warm is None else WARM_PUSH
        w = _pushed(y, lower[: self.n], upper[: self.n], push)
        w = torch.cat([w, _pushed(program.constraints(w)[slack], lower[self.n :], upper[self.n :], push)])
        state = self._state(w, lower, upper, fixed, torch.full_like(w[0], FIRST_MU if warm is None else WARM_MU))
        if warm is None:
            state.multipliers = self._estimate(state)
            return state
        assert warm.multipliers is not None
        dual = program.tensor(warm.multipliers)[:, None] / program.rows * program.factor
        state.multipliers = dual.expand(-1, problems).clone()
        for target, values, sign in (
            (state.at_lower, warm.lower_multipliers, -1.0),
            (state.at_upper, warm.upper_multipliers, 1.0),
        ):
            if values is not None:
                own = program.tensor(values)[:, None] * program.factor * program.sizes
                both = torch.cat([own, (sign * dual[slack]).clamp_min(0.0)])
                target.copy_(torch.where(target > 0, both.clamp_min(1e-9), 0.0))
        return state

    def _state(self, w: Tensor, lower: Tensor, upper: Tensor, fixed: Tensor, mu: Tensor) -> State:
        self.kkt = self._kkt or KKT(self.program, fixed, self.device)
        zeros, none = torch.zeros_like(mu), w.new_zeros(0, len(mu))
        state = State(
            torch.arange(len(mu), device=self.device), w, w.new_zeros(self.m, len(mu)),
            lower.isfinite().to(w), upper.isfinite().to(w), lower, upper, fixed, mu, zeros,
            zeros, zeros, none, none, zeros, zeros, zeros, zeros,
        )  # fmt: skip
        theta = evaluate(self.program, state, w).theta.clamp_min(1)
        state.theta_least, state.theta_most = 1e-4 * theta, 1e4 * theta
        return state

    def _estimate(self, s: State) -> Tensor:
        """Multipliers by least squares of the conditions of optimality; zero where they would be too large."""
        y = s.w[: self.n]
        jacobian = self.program.jacobian(y)
        hessian = jacobian.new_zeros(len(self.kkt.hessian_places[0]), y.shape[1])
        right = torch.where(s.fixed, 0.0, -(self.program.gradient(y) - s.at_lower[: self.n] + s.at_upper[: self.n]))
        c = jacobian.new_zeros(self.m, y.shape[1])
        c[self.slack] = s.at_lower[self.n :] - s.at_upper[self.n :]
        damping = torch.where(self.is_slack, 1.0, torch.where(self.program.path, EQUALITY, 0.0))
        damping = damping.expand(-1, y.shape[1]).to(c)
        factor = self.kkt.factor(self.kkt.condense(jacobian, hessian), torch.ones_like(y), damping, s.fixed)
        _, dual = self.kkt.solve(factor, right, c)
        small = dual.abs().amax(0) <= MULTIPLIERS  # NaN is not
        return torch.where(small, dual, 0.0)

    # Iterations

    def run(self, s: State) -> list[Ended]:
        """Iterate until every problem has ended."""
        problems = len(s.number)
        self.ended: list[Ended | None] = [None] * problems
        self.best = torch.full((problems,), torch.inf, dtype=s.w.dtype, device=self.device)
        self.best_w, self.first_w = s.w.clone(), s.w
        self.first_cost = self.program.objective(s.w[: self.n])
        while len(s.number):
            s = self._iterate(s)
        return self.ended  # type: ignore[return-value]

    def _iterate(self, s: State, again: bool = False) -> State:
        """One iteration of all problems; `again` where some have just left, and the others are looked at anew."""
        program, y = self.program, s.w[: self.n]
        point = evaluate(program, s, s.w)
        gradient, jacobian = program.gradient(y), program.jacobian(y)
        below, above = s.distances(s.w)
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
                Iteration(int(s.iterations[worst]), float(program.cost(y)[worst]), float(infeasible[worst]),
                          float(optimality[worst]), float(s.mu[worst]))
            )  # fmt: skip
        # As in IPOPT, errors in the units of the problem are limited, too, so that no scaling can hide them.
        violation = (point.constraints.abs() / program.rows).amax(0)
        unscaled = (dual[: self.n].abs() / (program.sizes * program.factor)).amax(0)
        if not again:
            s.acceptable = torch.where((total <= self.limits.acceptable) & (violation <= 1e-2), s.acceptable + 1, 0.0)
        gap = torch.maximum(products[0].amax(0), products[1].amax(0)) / program.factor
        tol = self.limits.tol
        solved = (total <= tol) & (violation <= VIOLATION) & (unscaled <= 1) & (gap <= COMPLEMENTARITY)
        if self.enough is not None:
            solved |= self.enough(s.number, s.w)
        ended: dict[Status, Tensor] = {Status.SOLVED: solved}
        ended[Status.ACCEPTABLE] = (s.acceptable >= ACCEPTABLE_ITERATIONS) & ~solved
        running = ~solved & ~ended[Status.ACCEPTABLE]
        over = self.limits.reached()
        if over is not None:
            ended[over] = running
        ended[Status.NOT_A_NUMBER] = running & ~(point.finite & jacobian.isfinite().all(0) & gradient.isfinite().all(0))
        ended[Status.DIVERGED] = running & (s.w.abs().amax(0) > INFINITY)
        ended[Status.ITERATION_LIMIT] = running & (s.iterations >= self.limits.iterations)
        for status, which in ended.items():
            self._end(s, which, status)
        left = self._left(s)
        if left is not s:
            return self._iterate(left, again=True) if len(left.number) else left
        # The barrier parameter
        least = min(tol, COMPLEMENTARITY * program.factor) / (KAPPA_EPSILON + 1)
        while True:
            lower = (error(s.mu) <= KAPPA_EPSILON * s.mu) & (s.mu > least)
            if not bool(lower.any()):
                break
            s.mu = torch.where(lower, torch.minimum(KAPPA_MU * s.mu, s.mu**THETA_MU).clamp_min(least), s.mu)
            s.empty_filter(lower)
        s.iterations = s.iterations + 1
        point = replace(point, phi=s.barrier(s.w, point.objective))
        return self._step(s, point, gradient, jacobian, slope, below, above, bounded)

    def _remember(self, s: State, total: Tensor) -> None:
        better = total <= self.best[s.number]
        which = s.number[better]
        self.best[which] = total[better]
        self.best_w[:, which] = s.w[:, better]

    def _end(self, s: State, which: Tensor, status: Status) -> None:
        """Some problems end; those that did not find what they sought may have gone off."""
        for k in which.nonzero()[:, 0].tolist():
            number = int(s.number[k])
            if self.ended[number] is not None:
                continue
            how = Status.DIVERGED if status in UNDECIDED and self._gone(s, k, status) else status
            last = how.success or how in (Status.DIVERGED, Status.INFEASIBLE)
            self.ended[number] = Ended(
                how,
                (s.w[:, k] if last else self.best_w[:, number]).clone(),
                s.multipliers[:, k].clone(),
                s.at_lower[:, k].clone(),
                s.at_upper[:, k].clone(),
                int(s.iterations[k]),
            )

    def _gone(self, s: State, k: int, status: Status) -> bool:
        """Whether a problem's variables have grown far at ever lower cost, and its violation is small beside them."""
        w, number = s.w[:, k : k + 1], int(s.number[k])
        size = float(w.abs().max())
        if not FAR * max(1.0, float(self.first_w[:, number].abs().max())) <= size:
            return False
        one = torch.tensor([k], device=self.device)
        point = evaluate(self.program.select(one), s.select(one), w)
        small = ROUNDING if status is Status.INFEASIBLE else SMALL
        violation, cost = float(point.constraints.abs().max()), float(point.objective[0])
        return violation <= small * size and cost < float(self.first_cost[number])

    def _left(self, s: State) -> State:
        """The problems that have not ended; the state itself where these are all."""
        ended = torch.tensor([self.ended[int(k)] is not None for k in s.number], device=self.device)
        if not bool(ended.any()):
            return s
        keep = (~ended).nonzero()[:, 0]
        if len(keep):
            self.program = self.program.select(keep)
        return s.select(keep)

    def _step(self, s: State, point: Point, gradient, jacobian, slope, below, above, bounded) -> State:
        n, y = self.n, s.w[: self.n]
        single = bounded[0] ^ bounded[1]
        barrier = torch.cat([gradient, gradient.new_zeros(len(self.slack), gradient.shape[1])])
        barrier = barrier - s.mu / below + s.mu / above
        barrier = barrier + torch.where(single, torch.where(bounded[0], DAMPING * s.mu, -DAMPING * s.mu), 0.0)
        hessian = self.program.hessian(y, s.multipliers)
        sigma = s.at_lower / below + s.at_upper / above
        right = -slope - barrier
        right[:n] += gradient  # which both have
        right[:n].masked_fill_(s.fixed, 0.0)
        factor, delta, damping, failed = self._factor(s, jacobian, hessian, sigma)
        tau = (1 - s.mu).clamp_min(TAU_MIN)
        total = sigma + delta

        def direction(constraints: Tensor) -> Direction:
            c = -constraints
            c[self.slack] += right[n:] / total[n:].clamp_min(1e-20)
            dy, dual = self._refined(factor, jacobian, hessian, total[:n], damping, right[:n], c, s.fixed)
            ds = (right[n:] + dual[self.slack]) / total[n:].clamp_min(1e-20)
            return Direction(torch.cat([dy, ds]), dual)

        def longest(dw: Tensor) -> Tensor:
            down = torch.where(dw < 0, -tau * below / dw, torch.inf)
            up = torch.where(dw > 0, tau * above / dw, torch.inf)
            return torch.minimum(down, up).amin(0).clamp_max(1.0)

        if bool(failed.all()):
            first = Direction(torch.zeros_like(s.w), torch.zeros_like(s.multipliers))
        else:
            first = direction(point.constraints)
        failed |= ~(first.w.isfinite().all(0) & first.multipliers.isfinite().all(0))
        first = Direction(*(torch.where(failed, 0.0, part) for part in first))
        change = (barrier * first.w).sum(0)
        step = search(
            lambda w: evaluate(self.program, s, w), s, point, first, change, direction, longest, failed, VIOLATION
        )
        # Multipliers of bounds
        used, accepted = step.used.w, step.accepted
        d_lower = torch.where(bounded[0], s.mu / below - s.at_lower - s.at_lower / below * used, 0.0)
        d_upper = torch.where(bounded[1], s.mu / above - s.at_upper + s.at_upper / above * used, 0.0)
        beta = torch.ones_like(step.length)
        for z, dz in ((s.at_lower, d_lower), (s.at_upper, d_upper)):
            beta = torch.minimum(beta, torch.where(dz < 0, -tau * z / dz, torch.inf).amin(0))
        # The filter takes what a step has left that did not lower the cost enough.
        adds = ~(accepted & step.by_cost)
        if bool(adds.any()):
            s.add_to_filter(point, adds)
        # Near an optimum, what the filter has kept may refuse Newton's steps; IPOPT forgets it then, too.
        short = torch.where(step.length < SHORT, s.short + 1, 0.0)
        stuck = (short >= SHORT_STEPS) & (s.resets < RESETS)
        if bool(stuck.any()):
            s.empty_filter(stuck)
        s = replace(
            s,
            w=torch.where(accepted, step.w, s.w),
            multipliers=torch.where(accepted, s.multipliers + step.length * step.used.multipliers, s.multipliers),
            at_lower=torch.where(accepted, s.at_lower + beta * d_lower, s.at_lower),
            at_upper=torch.where(accepted, s.at_upper + beta * d_upper, s.at_upper),
            last_delta=torch.where(delta > 0, delta, s.last_delta),
            short=torch.where(stuck, 0.0, short),
            resets=s.resets + stuck,
        )
        if not bool(accepted.all()):
            s = self._restore(s, point, ~accepted)
        below, above = s.distances(s.w)  # of those that are left
        for z, distance, b in (("at_lower", below, s.lower.isfinite()), ("at_upper", above, s.upper.isfinite())):
            least, largest = s.mu / (KAPPA_SIGMA * distance), KAPPA_SIGMA * s.mu / distance
            value = torch.minimum(torch.maximum(getattr(s, z), least), largest)
            setattr(s, z, torch.where(b, value, 0.0))
        return s

    def _factor(self, s: State, jacobian, hessian, sigma) -> tuple[Factorization, Tensor, Tensor, Tensor]:
        """Factors with the right inertia, the multiples of the identity they took, and where there are none."""
        n = self.n
        delta = torch.zeros_like(s.mu)

        def damped(which):
            total = sigma[n:, which] + delta[which]
            d = total.new_zeros(self.m, total.shape[1])
            d[self.slack] = 1 / total.clamp_min(1e-20)
            return d

        condensed = self.kkt.condense(jacobian, hessian)

        def factored(chosen: Tensor | None) -> Factorization:
            which = slice(None) if chosen is None else chosen
            damping = torch.where(self.program.path & ~self.is_slack, EQUALITY, damped(which))
            return self.kkt.factor(
                condensed if chosen is None else condensed.select(chosen),
                sigma[:n, which] + delta[which], damping, s.fixed[:, which],
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

    # Restoration

    def _restore(self, s: State, point: Point, which: Tensor) -> State:
        """Where the line search has failed, lower the violation of the constraints until the filter accepts it."""
        if isinstance(self.program, Elastic):  # which is never infeasible: rounding lets its line search fail
            self._end(s, which, Status.STALLED)
            return self._left(s)
        self._end(s, which & (point.constraints.abs().amax(0) <= self.limits.tol), Status.STALLED)
        chosen = torch.tensor([bool(w) and self.ended[int(k)] is None for w, k in zip(which, s.number, strict=True)])
        chosen = chosen.nonzero()[:, 0].to(self.device)
        if not len(chosen):
            return self._left(s)
        n, program, part, before = self.n, self.program.select(chosen), s.select(chosen), point.theta[chosen]
        elastic = Elastic(program, part.w[:n], point.constraints[:, chosen].abs().amax(0))

        def own(w: Tensor) -> Tensor:
            return torch.cat([w[elastic.own], w[elastic.n :]])

        def enough(number: Tensor, w: Tensor) -> Tensor:
            state = part.select(number)
            now = evaluate(program.select(number), state, own(w))
            in_filter = ((now.theta <= state.filter_theta) | (now.phi <= state.filter_phi)).all(0)
            return now.finite & in_filter & (now.theta <= LESS * before[number])

        limits = replace(self.limits, tol=ELASTIC_TOL, acceptable=ELASTIC_ACCEPTABLE)
        method = _InteriorPoint(elastic, limits, self.on_iteration, enough, self.elastic_kkt)
        found = method.run(method.elastic_start(part, point.constraints[:, chosen]))
        self.elastic_kkt = method.kkt
        w = torch.stack([end.w for end in found], 1)
        s.w[:, chosen] = part.w = own(w)
        s.iterations[chosen] = torch.tensor([end.iterations for end in found]).to(s.iterations)
        accepted = enough(torch.arange(len(chosen), device=self.device), w)
        lower = evaluate(program, part, part.w).theta <= MUCH_LESS * before
        restored, emptied = torch.zeros_like(which), torch.zeros_like(which)
        restored[chosen], emptied[chosen] = accepted | lower, lower & ~accepted
        for k, end in zip(chosen.tolist(), found, strict=True):
            one = torch.zeros_like(which)
            one[k] = ~restored[k]
            limited = end.status in (Status.STOPPED, Status.TIME_LIMIT, Status.ITERATION_LIMIT)
            status = Status.INFEASIBLE if end.status.success else Status.RESTORATION_FAILED
            self._end(s, one, end.status if limited else status)
        if bool(restored.any()):
            s.empty_filter(emptied)
            for z, distance in zip(("at_lower", "at_upper"), s.distances(s.w), strict=True):
                setattr(s, z, torch.where(restored, _bound_multipliers(s.mu, distance), getattr(s, z)))
            s.multipliers = torch.where(restored, self._estimate(s), s.multipliers)
        return self._left(s)

    def elastic_start(self, s: State, constraints: Tensor) -> State:
        """The first state of an elastic program: where the given program's state is, without violation."""
        program = self.program
        assert isinstance(program, Elastic)
        n = program.program.n
        infinite = torch.full_like(constraints, torch.inf)
        w, lower, upper = (
            torch.cat([program.joined(own[:n], elastic), own[n:]])
            for own, elastic in ((s.w, constraints), (s.lower, -infinite), (s.upper, infinite))
        )
        fixed = program.joined(s.fixed, torch.zeros_like(constraints, dtype=torch.bool))
        state = self._state(w, lower, upper, fixed, program.violation.clamp(ELASTIC_TOL, FIRST_MU))
        state.at_lower, state.at_upper = (_bound_multipliers(state.mu, d) for d in state.distances(w))
        state.multipliers = constraints / program.violation
        state.iterations = s.iterations.clone()
        return state


def _bound_multipliers(mu: Tensor, distance: Tensor) -> Tensor:
    """Multipliers of bounds from the distances to them."""
    return torch.where(distance.isfinite(), (mu / distance).clamp_max(MULTIPLIERS), 0.0)


def _pushed(w: Tensor, lower: Tensor, upper: Tensor, push: float) -> Tensor:
    """Into the interior of the bounds."""
    width = upper - lower
    low = lower + torch.minimum(push * lower.abs().clamp_min(1), push * width)
    high = upper - torch.minimum(push * upper.abs().clamp_min(1), push * width)
    w = torch.maximum(w, torch.where(low.isfinite(), low, w))
    return torch.minimum(w, torch.where(high.isfinite(), high, w))
