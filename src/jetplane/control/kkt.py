"""KKT systems of transcribed problems, solved interval by interval, for many problems at once.

    [ W + Σ   Jᵀ ] [dy]   [b]
    [   J    -D  ] [dλ] = [c]

W is the Hessian of the Lagrangian, J the Jacobian of the constraints, Σ and D are diagonal. Ordered by the intervals of
the mesh the matrix is banded but for a border: times, integrals, parameters, constraints on them and on the ends. It is
solved in three steps, each by dense tensor operations over all problems:

1. *Condensing*, over all intervals at once. Collocation determines the states v = x₁ … xₙ of an interval by its first
   state x₀, its controls u and the border g: one LU factorization of the interval's defects gives v = F (u, x₀, g) + f,
   and the Hessian on that space. Path constraints, whose D is positive, enter as Jᵀ D⁻¹ J.
2. *Riccati recursion*, from the last interval to the first. The value of what remains is a quadratic function of the
   interval's first state and of θ = (g, σ, μ): the border, the multipliers of the end state and of the integrals. A
   Cholesky factorization eliminates the controls; the matrix has the right inertia if every one of them exists and the
   border's matrix has it. This takes the value's part by states alone; the mixed part by states and θ follows from a
   second, linear recursion, as right-hand sides do, and the part by θ alone is a sum over all intervals.
3. *The border*, one small dense symmetric system: first and last states, times, integrals, parameters, and the
   multipliers of constraints on them.

The end state's constraint enters with an additional square, ``ρ/2 |x - x_N|²``, which changes neither the solution nor
the inertia, but makes recursions positive definite where only the constraint does so (Debreu's lemma). Where
constraints of the ends depend on each other, the border's matrix is singular; the least of their multipliers are taken.
Condensing is that of Bock, Plitt, *A multiple shooting algorithm for direct solution of optimal control problems*, IFAC
1984, the recursion that of Rao, Wright, Rawlings, *Application of interior-point methods to model predictive control*,
Journal of Optimization Theory and Applications 99 (1998).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bands import Banded, Bands, Chain, Group

PENALTY = 1e7  # ρ, in units of the scaled problem
SINGULAR = 1e-13  # eigenvalues of the equilibrated border below this are zero
BORDER = 1e200  # is added to diagonals whose Cholesky factors nobody reads, so that these exist
AHEAD = 25  # intervals of a single problem whose costs are computed together


@dataclass
class _Condensed:
    """Of a group's intervals (intervals, problems, …), what no factor of the inertia changes."""

    weights: Tensor  # W of each node, of the Hessian alone (points, local + border, local + border)
    path: Tensor  # (points * path constraints, local + border)
    integral: Tensor  # (points * integrals, local)
    lu: Tensor
    pivots: Tensor
    inner: Tensor  # F: later states by controls, first states, border
    expand: Tensor  # variables of all nodes by controls, first states, border (points, local + border, …)

    def select(self, chosen: Tensor) -> _Condensed:
        return _Condensed(*(getattr(self, f.name)[:, chosen] for f in fields(self)))


class _Costs(NamedTuple):
    """Of a group's intervals, in the making."""

    weights: Tensor  # W of each node
    by_own: Tensor  # costs by controls, x₀ and border; below them integrals by these
    lower: Tensor  # Cholesky factors by controls and x₀; of x₀ only rows by controls count


@dataclass
class _GroupFactor:
    """Of a group's intervals: what the recursion makes of them."""

    weights: Tensor  # W of each node (points, local + border, local + border)
    cholesky: Tensor
    feedback: Tensor  # controls by x₀, θ
    loop: Tensor  # next x₀ by x₀, θ with the feedback


@dataclass
class _ChainFactor:
    value: Tensor  # at the first edge (problems, x₀ θ, x₀ θ)
    values: Tensor  # of each edge, by the states there and by all (intervals + 1, problems, x₀, x₀ θ)
    groups: list[_GroupFactor]


@dataclass
class Condensed:
    """A Jacobian with its defects factored, and a Hessian by intervals: what `KKT.condense` has made, for any Σ, D."""

    root: Tensor  # the border's own entries
    chains: list[list[_Condensed]]

    def select(self, chosen: Tensor) -> Condensed:
        """That of some problems, given by their numbers."""
        return Condensed(self.root[chosen], [[part.select(chosen) for part in chain] for chain in self.chains])


def times(a: Tensor, x: Tensor) -> Tensor:
    """Products of matrices (…, n, m) and vectors (…, m); faster than batched products of matrices."""
    return (a * x[..., None, :]).sum(-1)


def transposed_times(a: Tensor, x: Tensor) -> Tensor:
    """Products of transposed matrices (…, n, m) and vectors (…, n)."""
    return (x[..., None, :] @ a)[..., 0, :]


@dataclass
class Factorization:
    """What `KKT.factor` has made; of use where the inertia is that of a minimum: `correct` (problems,)."""

    condensed: Condensed
    chains: list[_ChainFactor]
    root: Tensor  # the border's matrix, equilibrated by factors of rows and columns
    equilibration: Tensor
    vectors: Tensor
    inverse: Tensor  # of its eigenvalues; zero for those that vanish
    still: Tensor  # variables of the border that do not move (problems, border)
    damping: Tensor  # D (constraints, problems)
    correct: Tensor

    @property
    def complete(self) -> bool:
        """Whether the recursions went through, as they do where the inertia is right."""
        return bool(self.chains[-1].groups)

    def update(self, chosen: Tensor, other: Factorization) -> None:
        """Replace the factors of some problems, given by their numbers."""
        if not other.complete:
            self.correct[chosen] = False
            return
        for mine, new in zip(self.chains, other.chains, strict=True):
            mine.value[chosen], mine.values[:, chosen] = new.value, new.values
            for a, b in zip(mine.groups, new.groups, strict=True):
                for f in fields(_GroupFactor):
                    getattr(a, f.name)[:, chosen] = getattr(b, f.name)
        for part in ("root", "equilibration", "vectors", "inverse", "still", "correct"):
            getattr(self, part)[chosen] = getattr(other, part)
        self.damping[:, chosen] = other.damping


class KKT:
    """The KKT systems of a program, or of a batch of programs that differ by their numbers only.

    Vectors have shape (size, problems), nonzeros (nonzeros, problems), float64.

    Args:
        nlp: for the structure.
        fixed: variables that do not move, (variables,) or (variables, problems); only first and last states, times,
            integrals, parameters and controls (these in all problems or in none) can be fixed.
        device: where tensors are.

    Raises:
        ArgumentError: a state within a phase is fixed, or entries lie outside of the band.
    """

    def __init__(self, nlp: Banded, fixed: Tensor, device: torch.device | str = "cpu") -> None:
        self.device, self.n, self.m = torch.device(device), nlp.n, nlp.m
        self.bands = Bands(nlp, fixed if fixed.dim() == 2 else fixed[:, None], self.device)
        self.jacobian_places, self.hessian_places = (
            tuple(torch.from_numpy(np.asarray(a, np.int64)).to(self.device) for a in structure)
            for structure in (nlp.jacobian_structure, nlp.hessian_structure)
        )

    # Products

    def _product(self, lines: Tensor, columns: Tensor, values: Tensor, v: Tensor, size: int) -> Tensor:
        problems = values.shape[1]
        terms = values * v[columns]
        if problems == 1:
            return v.new_zeros(size).index_add_(0, lines, terms[:, 0])[:, None]
        return v.new_zeros(size, problems).index_add_(0, lines, terms)

    def jacobian_times(self, jacobian: Tensor, v: Tensor) -> Tensor:
        """J v."""
        rows, columns = self.jacobian_places
        return self._product(rows, columns, jacobian, v, self.m)

    def transposed_times(self, jacobian: Tensor, v: Tensor) -> Tensor:
        """Jᵀ v."""
        rows, columns = self.jacobian_places
        return self._product(columns, rows, jacobian, v, self.n)

    def hessian_times(self, hessian: Tensor, v: Tensor) -> Tensor:
        """W v, from the lower triangle."""
        rows, columns = self.hessian_places
        lower = hessian * (rows != columns)[:, None]
        return self._product(rows, columns, hessian, v, self.n) + self._product(columns, rows, lower, v, self.n)

    def residual(
        self, jacobian: Tensor, hessian: Tensor, sigma: Tensor, damping: Tensor, fixed: Tensor,
        right: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `found` leaves of the right-hand side; D is `damping`, which may be less than what was factored."""
        (b, c), (dy, dual) = right, found
        r = b - self.hessian_times(hessian, dy) - sigma * dy - self.transposed_times(jacobian, dual)
        q = c - self.jacobian_times(jacobian, dy) + damping * dual
        return r.masked_fill(fixed, 0.0), q

    # Factorization

    def condense(self, jacobian: Tensor, hessian: Tensor) -> Condensed:
        """Factor the defects.

        Args:
            jacobian: its nonzeros, in the order of the program's structure.
            hessian: nonzeros of its lower triangle, likewise.
        """
        rows, columns = self.hessian_places
        hessian = hessian.masked_fill((self.bands.still[rows] | self.bands.still[columns])[:, None], 0.0)
        jacobian = jacobian.masked_fill(self.bands.still[self.jacobian_places[1]][:, None], 0.0)
        chains = []
        for chain, groups in zip(self.bands.chains, self.bands.groups, strict=True):
            parts, nx = [], chain.nx
            for group in groups:
                lu, pivots, _ = torch.linalg.lu_factor_ex(group.inner.of(jacobian).mT)
                inner = torch.linalg.lu_solve(lu, pivots, group.outer.of(jacobian).mT.neg_())
                expand = group.expand.expand(*inner.shape[:2], -1, -1, -1).clone()
                expand[:, :, 1:, :nx] = inner[:, :, :-nx].unflatten(2, (group.points - 1, nx))
                path, integral = group.path.of(jacobian), group.integral.of(jacobian)
                parts.append(_Condensed(group.weights.of(hessian), path, integral, lu, pivots, inner, expand))
            chains.append(parts)
        root = (self.bands.root_hessian.of(hessian) + self.bands.root_jacobian.of(jacobian))[0]
        return Condensed(root, chains)

    def factor(self, condensed: Condensed, sigma: Tensor, damping: Tensor, fixed: Tensor) -> Factorization:
        """Factor the matrix.

        Args:
            condensed: Jacobian and Hessian.
            sigma: Σ (variables, problems).
            damping: D (constraints, problems): positive in path constraints; zero or positive in those of integrals and
                ends; not used in defects.
            fixed: variables that do not move (variables, problems).
        """
        chains = []
        sigma = sigma.masked_fill(self.bands.still[:, None], 1.0)
        root, problems = condensed.root.clone(), sigma.shape[1]
        correct = torch.ones(problems, dtype=torch.bool, device=root.device)
        for number, chain in enumerate(self.bands.chains):
            factor, good = self._factor_chain(number, chain, condensed.chains[number], sigma, damping)
            chains.append(factor)
            correct &= good
            if not factor.groups:
                nothing = root[:, :0]
                return Factorization(condensed, chains, nothing, nothing, nothing, nothing, nothing, damping, correct)
            self._add_value(number, chain, factor.value, root)
        variables = len(self.bands.root_columns)
        diagonal = torch.diagonal(root, dim1=-2, dim2=-1)
        diagonal[:, :variables] += (sigma[self.bands.root_columns] * self.bands.root_own[:, None]).T
        diagonal[:, self.bands.root_size - len(self.bands.root_rows) :] -= damping[self.bands.root_rows].T
        still = torch.zeros(problems, self.bands.root_size, dtype=torch.bool, device=root.device)
        still[:, :variables] = fixed[self.bands.root_columns].T
        root.masked_fill_(still[:, :, None] | still[:, None, :], 0.0)
        diagonal.masked_fill_(still, 1.0)
        scale = torch.ones_like(diagonal)
        for _ in range(4):
            largest = (root * scale[:, :, None] * scale[:, None, :]).abs().amax(-1)
            scale = scale / largest.clamp_min(1e-300).sqrt()
        scale = torch.where(scale.isfinite(), scale, 1.0)
        equilibrated = root * scale[:, :, None] * scale[:, None, :]
        finite = equilibrated.isfinite().flatten(1).all(1)
        identity = torch.eye(self.bands.root_size, dtype=root.dtype, device=root.device)
        equilibrated = torch.where(finite[:, None, None], equilibrated, identity)
        eigenvalues, vectors = torch.linalg.eigh(equilibrated)
        zero = eigenvalues.abs() < SINGULAR
        # Dependent constraints have multipliers in the null space; of those the least ones are taken.
        correct &= finite & (((eigenvalues < 0) | zero).sum(-1) == self.bands.multipliers)
        inverse = torch.where(zero, 0.0, 1 / eigenvalues)
        return Factorization(condensed, chains, equilibrated, scale, vectors, inverse, still, damping, correct)

    def _add_value(self, number: int, chain: Chain, value: Tensor, root: Tensor) -> None:
        """The value of a phase as a function of the border: σ = ν - ρ x_N."""
        nx, g = chain.nx, len(chain.border)
        where, last = self._where(number)
        nu = self.bands.nu_of[number]
        root[:, where[:, None], where] += value
        # Through σ, the end state has -ρ times the rows and columns of ν.
        s = nx + g
        root[:, where[:, None], last] -= PENALTY * value[:, :, s : s + nx]
        root[:, last[:, None], where] -= PENALTY * value[:, s : s + nx, :]
        root[:, last[:, None], last] += PENALTY**2 * value[:, s : s + nx, s : s + nx]
        root[:, last, last] += PENALTY
        root[:, last, nu] -= 1
        root[:, nu, last] -= 1

    def _factor_chain(self, number: int, chain: Chain, parts, sigma, damping) -> tuple[_ChainFactor, Tensor]:
        nx, nu, g = chain.nx, chain.nu, len(chain.border)
        problems, intervals = sigma.shape[1], len(chain.degrees)
        groups, place, costs = self.bands.groups[number], {}, []
        for k, (group, part) in enumerate(zip(groups, parts, strict=True)):
            count, columns = len(group.members), group.points * nu + nx
            weights = torch.empty_like(part.weights).view(count, problems, group.points, *[chain.local + g] * 2)
            cost = weights.new_empty(count, problems, columns + g + chain.nq, columns + g)
            costs.append(_Costs(weights, cost, weights.new_empty(count, problems, columns, columns).mT))
            place.update((e, (k, i)) for i, e in enumerate(group.members.tolist()))
        # A single problem's recursion ends at the first interval without a factor, mostly one of the last ones.
        alone = problems == 1 and self.device.type == "cpu"
        values = sigma.new_zeros(intervals + 1, problems, nx, nx)
        values[-1, :, range(nx), range(nx)] = PENALTY
        at = values.unbind(0)
        bad = torch.zeros(problems, dtype=torch.int32, device=sigma.device)
        info = torch.empty_like(bad)
        steps: dict[int, tuple[Tensor, ...]] = {}
        for e in range(intervals - 1, -1, -1):
            if e not in steps:
                k, last = place[e]
                group, part, cost = groups[k], parts[k], costs[k]
                chosen = slice(max(0, last + 1 - AHEAD) if alone else 0, last + 1)
                self._reduce(chain, group, part, cost, chosen, sigma, damping)
                u = group.points * nu
                border = torch.diag(torch.arange(u + nx, device=sigma.device) >= u).to(sigma) * BORDER
                end, total = part.inner[chosen, :, -nx:, : u + nx], cost.by_own[chosen, :, : u + nx, : u + nx]
                lower = cost.lower[chosen]
                half = lower[..., u:, :u]
                views = (end, end.mT, total, total[..., u:, u:], lower, half, half.mT)
                members = group.members[chosen].tolist()
                steps.update(zip(members, zip(*(v.unbind(0) for v in views), repeat(border)), strict=False))
            end, transposed, total, rest, lower, half, half_t, border = steps[e]
            total.baddbmm_(transposed, torch.bmm(at[e + 1], end))
            torch.linalg.cholesky_ex(total + border, out=(lower, info))
            torch.baddbmm(rest, half, half_t, alpha=-1, out=at[e])
            bad |= info
            if alone and info.item():
                return _ChainFactor(values[0], values, []), bad == 0
        return self._with_theta(chain, groups, parts, costs, values, bad == 0)

    @staticmethod
    def _reduce(chain: Chain, group: Group, part: _Condensed, costs: _Costs, chosen: slice, sigma, damping) -> None:
        """Costs of some intervals by controls, x₀ and border, and below them what integrals have by these."""
        nx, nu, g, d = chain.nx, chain.nu, len(chain.border), chain.local
        weights, cost, u = costs.weights[chosen], costs.by_own[chosen], group.points * nu
        weights.copy_(part.weights[chosen].view_as(weights))
        diagonal = torch.diagonal(weights, dim1=-2, dim2=-1)[..., :d]
        diagonal += sigma[group.columns[chosen]].transpose(1, 2).reshape(diagonal.shape)
        if chain.np:
            rows = part.path[chosen].view(*weights.shape[:3], chain.np, d + g)
            weights += rows.mT @ (rows / damping[group.path_rows[chosen]].transpose(1, 2).reshape(*rows.shape[:-1], 1))
        expand, columns = part.expand[chosen], u + nx + g
        torch.matmul(expand.flatten(2, 3).mT, (weights @ expand).flatten(2, 3), out=cost[..., :columns, :])
        if chain.nq:
            integral = part.integral.view(-1, *weights.shape[1:3], chain.nq, d)[chosen]
            cost[..., columns:, :] = (integral @ expand[..., :d, :]).sum(2)

    def _with_theta(self, chain: Chain, groups, parts, costs, states, good) -> tuple[_ChainFactor, Tensor]:
        """What the recursion by states has made, and what θ adds to it."""
        nx, nu, g, theta = chain.nx, chain.nu, len(chain.border), chain.theta
        problems, intervals = states.shape[1], len(chain.degrees)
        pieces: list = [None] * intervals
        loops: list = [None] * intervals
        kept = []
        for group, part, found in zip(groups, parts, costs, strict=True):
            u, end, cost = group.points * nu, part.inner[..., -nx:, :], found.by_own
            columns = u + nx + g
            feedback = torch.linalg.solve_triangular(
                found.lower[..., :u, :u].mT, found.lower[..., u:, :u].mT, upper=True
            ).neg_()
            loop = end[..., u : u + nx] + end[..., :u] @ feedback
            # Costs by (u, x₀, θ) and θ; those of the next interval are still to come.
            by_theta = cost.new_zeros(*cost.shape[:2], u + nx + theta, theta)
            by_theta[..., :columns, :g] = cost[..., :columns, u + nx :]
            by_theta[..., :columns, g + nx :] = cost[..., columns:, :].mT
            by_theta[..., columns + nx :, :g] = cost[..., columns:, u + nx :]
            by_theta[..., :columns, :g] += end.mT @ (states[group.members + 1] @ end[..., u + nx :])
            piece = by_theta[..., u : u + nx, :] + feedback.mT @ by_theta[..., :u, :]
            for e, one, other in zip(group.members.tolist(), piece.unbind(0), loop.mT.unbind(0), strict=True):
                pieces[e], loops[e] = one, other
            kept.append((feedback, loop, by_theta))
        mixed = states.new_zeros(problems, nx, theta)
        mixed[:, range(nx), range(g, g + nx)] = 1
        mixes = [mixed] * (intervals + 1)
        for e in range(intervals - 1, -1, -1):
            mixes[e] = mixed = torch.baddbmm(pieces[e], loops[e], mixed)
        values = torch.cat([states, torch.stack(mixes)], -1)
        first = states.new_zeros(problems, nx + theta, nx + theta)
        first[:, :nx], first[:, nx:, :nx] = values[0], mixed.mT
        made = []
        for group, part, found, (feedback, loop, by_theta) in zip(groups, parts, costs, kept, strict=True):
            u, end = group.points * nu, part.inner[..., -nx:, :]
            cholesky = found.lower[..., :u, :u]
            pushed = end.mT @ values[group.members + 1][..., nx:]
            by_theta[..., : u + nx + g, :] += pushed
            by_theta[..., u + nx :, :g] += pushed[..., u + nx :, :].mT
            half = torch.linalg.solve_triangular(cholesky, by_theta[..., :u, :], upper=False)
            first[:, nx:, nx:] += (by_theta[..., u + nx :, :] - half.mT @ half).sum(0)
            other = torch.linalg.solve_triangular(cholesky.mT, half, upper=True).neg_()
            by_loop = end[..., :u] @ other
            by_loop[..., :g] += end[..., u + nx :]
            made.append(
                _GroupFactor(found.weights, cholesky, torch.cat([feedback, other], -1), torch.cat([loop, by_loop], -1))
            )
        return _ChainFactor(first, values, made), good & first.isfinite().flatten(1).all(1)

    # Solution

    def solve(self, factor: Factorization, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for a right-hand side: dy (variables, problems) and dλ (constraints, problems)."""
        variables = len(self.bands.root_columns)
        right = b.new_zeros(b.shape[1], self.bands.root_size)
        right[:, :variables] = (b[self.bands.root_columns] * self.bands.root_own[:, None]).T
        right[:, self.bands.root_size - len(self.bands.root_rows) :] = c[self.bands.root_rows].T
        states = []
        for number, chain in enumerate(self.bands.chains):
            state, p = self._backward(number, chain, factor, b, c)
            states.append(state)
            where, last = self._where(number)
            s = chain.nx + len(chain.border)
            right[:, where] -= p
            right[:, last] += PENALTY * p[:, s : s + chain.nx]
        right.masked_fill_(factor.still, 0.0)
        scale = factor.equilibration
        right = right * scale
        found = torch.zeros_like(right)
        for _ in range(2):
            rest = right - times(factor.root, found)
            found = found + times(factor.vectors, factor.inverse * times(factor.vectors.mT, rest))
        found = found * scale
        dy, dual = torch.empty_like(b), torch.empty_like(c)
        dy[self.bands.root_columns] = found[:, :variables].T
        dual[self.bands.root_rows] = found[:, self.bands.root_size - len(self.bands.root_rows) :].T
        for number, chain in enumerate(self.bands.chains):
            where, last = self._where(number)
            z = found[:, where]
            s = chain.nx + len(chain.border)
            z[:, s : s + chain.nx] -= PENALTY * found[:, last]
            self._forward(number, chain, factor, c, states[number], z, dy, dual)
        return dy, dual

    def _where(self, number: int) -> tuple[Tensor, Tensor]:
        """Where x₀ and θ of a phase lie among the border's unknowns, and where its last state does."""
        b = self.bands
        where = [b.first_of[number], b.border_of[number], b.nu_of[number], b.integral_of[number]]
        return torch.cat(where), b.last_of[number]

    def _backward(self, number: int, chain: Chain, factorization: Factorization, b, c):
        """Linear terms of the value at each edge, and what the way forward needs; of the first edge, those by θ too."""
        nx, nu, g, d, nq = chain.nx, chain.nu, len(chain.border), chain.local, chain.nq
        problems, intervals = b.shape[1], len(chain.degrees)
        factor, damping = factorization.chains[number], factorization.damping
        pieces: list = [None] * intervals
        loops: list = [None] * intervals
        kept = []
        for group, part, made in zip(
            self.bands.groups[number], factorization.condensed.chains[number], factor.groups, strict=True
        ):
            count, points, u = len(group.members), group.points, group.points * nu
            shape = count, problems, points
            linear = b.new_zeros(*shape, d + g)
            linear[..., :d] = b[group.columns].transpose(1, 2).reshape(*shape, d).neg()
            if chain.np:
                right = (c[group.path_rows] / damping[group.path_rows]).transpose(1, 2).reshape(*shape, chain.np)
                linear -= transposed_times(part.path.view(*shape, chain.np, d + g), right)
            f = torch.linalg.lu_solve(part.lu, part.pivots, c[group.defects].transpose(1, 2)[..., None])[..., 0]
            later = f.view(*shape, nx)[:, :, :-1]  # of the nodes after the first
            gradient = linear.clone()
            gradient[:, :, 1:] += times(made.weights[:, :, 1:, :, :nx], later)
            columns = u + nx + g
            q = f.new_zeros(count, problems, u + nx + chain.theta)
            q[..., :columns] = transposed_times(part.inner[..., :-nx, :], gradient[:, :, 1:, :nx].flatten(2))
            q[..., :u] += gradient[..., nx:d].flatten(2)
            q[..., u : u + nx] += gradient[:, :, 0, :nx]
            q[..., u + nx : columns] += gradient[..., d:].sum(2)
            if nq:
                rows = part.integral.view(*shape, nq, d)[:, :, 1:, :, :nx]
                q[..., columns + nx :] = times(rows, later).sum(2)
            # p of this edge is (feedback ᵀ, 1) (q + Tᵀ (p of the next edge + P f)).
            pushed = transposed_times(factor.values[group.members + 1], f[..., -nx:])
            q[..., :columns] += transposed_times(part.inner[..., -nx:, :], pushed[..., :nx])
            q[..., u + nx :] += pushed[..., nx:]
            piece = q[..., u:] + transposed_times(made.feedback, q[..., :u])
            for e, one, other in zip(
                group.members.tolist(), piece[..., :nx, None].unbind(0), made.loop[..., :nx].mT.unbind(0), strict=True
            ):
                pieces[e], loops[e] = one, other
            kept.append((f, linear, q[..., :u], piece[..., nx:]))
        p = b.new_zeros(problems, nx, 1)
        costates: list[Tensor] = [p] * (intervals + 1)
        for e in range(intervals - 1, -1, -1):
            p = torch.baddbmm(pieces[e], loops[e], p)
            costates[e] = p
        edges = torch.stack(costates)[..., 0]
        first = b.new_zeros(problems, nx + chain.theta)
        first[:, :nx] = edges[0]
        for group, made, (_, _, _, piece) in zip(self.bands.groups[number], factor.groups, kept, strict=True):
            first[:, nx:] += (piece + transposed_times(made.loop[..., nx:], edges[group.members + 1])).sum(0)
        return (edges, kept), first

    def _forward(self, number: int, chain: Chain, factorization: Factorization, c, state, z, dy, dual) -> None:
        """States, controls and multipliers from the first state and θ."""
        nx, nu, g, d = chain.nx, chain.nu, len(chain.border), chain.local
        (edges, kept), groups = state, self.bands.groups[number]
        problems, intervals = z.shape[0], len(chain.degrees)
        factor, damping = factorization.chains[number], factorization.damping
        theta = z[:, nx:]
        loops: list = [None] * intervals
        constants: list = [None] * intervals
        open_loop = []
        for group, part, made, (f, _, q, _) in zip(
            groups, factorization.condensed.chains[number], factor.groups, kept, strict=True
        ):
            end = part.inner[..., -nx:, : group.points * nu]
            slope = q + transposed_times(end, edges[group.members + 1])
            k = torch.cholesky_solve(slope[..., None], made.cholesky)[..., 0].neg_()
            open_loop.append(k)
            constant = f[..., -nx:] + times(made.loop[..., nx:], theta) + times(end, k)
            for e, one, other in zip(
                group.members.tolist(), made.loop[..., :nx].unbind(0), constant[..., None].unbind(0), strict=True
            ):
                loops[e], constants[e] = one, other
        x = z[:, :nx, None]
        trajectory = [x]
        for e in range(intervals):
            x = torch.baddbmm(constants[e], loops[e], x)
            trajectory.append(x)
        full = torch.cat([torch.stack(trajectory)[..., 0], theta.expand(intervals + 1, -1, -1)], -1)
        push = times(factor.values, full) + edges  # costates at the edges
        for group, part, made, (f, linear, _, _), k in zip(
            groups,
            factorization.condensed.chains[number],
            factor.groups,
            kept,
            open_loop,
            strict=True,
        ):
            count, members, points = len(group.members), group.members, group.points
            here = full[members]
            controls = times(made.feedback, here) + k
            later = times(part.inner, torch.cat([controls, here[..., : nx + g]], -1)) + f
            nodes = here.new_empty(count, problems, points, d + g)
            nodes[:, :, 0, :nx] = here[..., :nx]
            nodes[:, :, 1:, :nx] = later.view(count, problems, points, nx)[:, :, :-1]
            nodes[..., nx:d] = controls.view(count, problems, points, nu)
            nodes[..., d:] = here[:, :, None, nx : nx + g]
            slope = linear[:, :, 1:, :nx] + times(made.weights[:, :, 1:, :nx], nodes[:, :, 1:])
            right = torch.cat([slope.flatten(2), push[members + 1]], -1)
            found = torch.linalg.lu_solve(part.lu, part.pivots, right[..., None], adjoint=True)[..., 0]
            dual[group.defects] = found.transpose(1, 2).neg()
            dy[group.columns] = nodes[..., :d].flatten(2).transpose(1, 2)
            if chain.np:
                rows = times(part.path.view(count, problems, points, chain.np, d + g), nodes)
                dual[group.path_rows] = (rows.flatten(2).transpose(1, 2) - c[group.path_rows]) / damping[
                    group.path_rows
                ]
