"""KKT systems of transcribed problems, solved interval by interval, for many problems at once.

    [ W + Σ   Jᵀ ] [dy]   [b]
    [   J    -D  ] [dλ] = [c]

W is the Hessian of the Lagrangian, J the Jacobian of the constraints, Σ and D are diagonal. Ordered by the intervals of
the mesh the matrix is banded but for a border: times, integrals, parameters, and the constraints on them and on the ends.
It is solved in three steps, each by dense tensor operations over all problems:

1. *Condensing*, over all intervals at once. Collocation determines the states x₁ … xₙ of an interval by its first state
   x₀, its controls u and the border g: one LU factorization of the interval's defects gives v = F (u, x₀, g) + f, and the
   Hessian on that space. Path constraints with D > 0 enter as Jᵀ D⁻¹ J.
2. *Riccati recursion*, from the last interval to the first. The value of what remains is a quadratic function of the
   interval's first state and of θ = (g, σ, μ): the border, the multipliers of the end state and of the integrals. A
   Cholesky factorization eliminates the controls; the matrix has the right inertia if every one of them exists and the
   border's matrix has it.
3. *The border*, one small dense symmetric system: first and last states, times, integrals, parameters, and the
   multipliers of constraints on them.

The end state's constraint enters with an additional square, ``ρ/2 |x - x_N|²``, which changes neither the solution nor the
inertia, but makes recursions positive definite where only the constraint does so (Debreu's lemma). Condensing and
recursion follow Rao, Wright, Rawlings, *Application of interior-point methods to model predictive control*, JOTA 99
(1998), and Bock, Plitt, *A multiple shooting algorithm for direct solution of optimal control problems*, IFAC 1984.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from .nlp import NLP

PENALTY = 1e3  # ρ, in units of the scaled problem
SINGULAR = 1e-13  # eigenvalues of the equilibrated border below this are zero


class Blocks:
    """Nonzeros of a sparse matrix (nonzeros, problems) as dense blocks (blocks, problems, rows, columns)."""

    def __init__(self, shape: tuple[int, int, int], source: np.ndarray, target: np.ndarray, device: torch.device):
        self.shape = shape
        self.source, self.target = (torch.from_numpy(a.astype(np.int64)).to(device) for a in (source, target))

    def of(self, values: Tensor) -> Tensor:
        """The blocks; a tensor of their own."""
        blocks, rows, columns = self.shape
        cells = values.new_zeros(blocks * rows * columns, values.shape[1])
        cells[self.target] = values[self.source]
        return cells.view(blocks, rows, columns, values.shape[1]).permute(0, 3, 1, 2).contiguous()


class _Targets:
    """Where nonzeros go: collected by block matrix, made into `Blocks`."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, source: np.ndarray, block, row, column) -> None:
        _, rows, columns = self.shape
        self.parts.append((source, (np.asarray(block) * rows + row) * columns + column + 0 * source))

    def build(self, device: torch.device) -> Blocks:
        empty = np.zeros(0, np.int64)
        source, target = (np.concatenate([empty, *part]) for part in (zip(*self.parts, strict=True) or ((), ())))
        return Blocks(self.shape, source, target, device)


@dataclass
class _Group:
    """Intervals of one phase with the same number of points."""

    points: int
    members: Tensor  # intervals
    nodes: Tensor  # (intervals, points)
    defects: Tensor  # rows of defects (intervals, points * states), node by node
    states: Tensor  # columns of the states after the first (intervals, points * states)
    inner: Blocks  # defects by those
    outer: Blocks  # defects by controls, first states, border


class Chain:
    """A phase: its intervals, and which rows and columns they hold."""

    def __init__(self, nlp: NLP, name: str, border: Sequence[int]) -> None:
        place, mesh = nlp.places[name], nlp.meshes[name]
        self.name = name
        self.nx, self.nu, self.nq = nlp.model.phases[name].sizes
        self.nodes = mesh.nodes
        self.np = (place.path.stop - place.path.start) // self.nodes
        self.border = list(border)
        self.local = self.nx + self.nu
        self.theta = len(border) + self.nx + self.nq
        self.degrees, self.starts = np.array(mesh.degrees), mesh.starts
        k = np.arange(self.nodes)
        self.state_columns = place.states.start + np.arange(self.nx) * (self.nodes + 1) + np.arange(self.nodes + 1)[:, None]
        self.control_columns = place.controls.start + np.arange(self.nu) * self.nodes + k[:, None]
        self.defect_rows = place.defects.start + np.arange(self.nx) * self.nodes + k[:, None]
        self.path_rows = place.path.start + np.arange(self.np) * self.nodes + k[:, None]
        self.integral_rows = np.arange(place.integral_rows.start, place.integral_rows.stop)
        self.interval = np.repeat(np.arange(len(self.degrees)), self.degrees)


@dataclass
class _GroupFactor:
    """Of a group's intervals (intervals, problems, …): LU of the defects, the condensed problem, the feedback."""

    lu: Tensor
    pivots: Tensor
    inner: Tensor  # F: later states by controls, first states, border
    expand: Tensor  # Z: of each node (points, local + border) by controls, first states, border
    step: Tensor  # T: next (x, θ) by controls, x, θ
    cholesky: Tensor
    feedback: Tensor  # controls by x, θ
    loop: Tensor  # next x by x, θ with the feedback


@dataclass
class _ChainFactor:
    weights: Tensor  # W of each node (nodes, problems, local + border, ·)
    path: Tensor
    integral: Tensor
    values: Tensor  # P of each edge (intervals + 1, problems, x θ, x θ)
    groups: list[_GroupFactor]


@dataclass
class Factorization:
    """What `KKT.factor` has made. `correct` (problems,): the inertia is that of a minimum; `singular`: the border is so."""

    chains: list[_ChainFactor]
    root: Tensor
    pivots: Tensor
    equilibration: Tensor
    still: Tensor  # variables of the border that do not move (problems, border)
    damping: Tensor  # D (constraints, problems)
    ends: Tensor  # δ (problems,)
    correct: Tensor
    singular: Tensor

    def update(self, chosen: Tensor, other: Factorization) -> None:
        """Replace the factors of some problems, given by their numbers."""
        for mine, new in zip(self.chains, other.chains, strict=True):
            for part in ("weights", "path", "integral", "values"):
                getattr(mine, part)[:, chosen] = getattr(new, part)
            for a, b in zip(mine.groups, new.groups, strict=True):
                for f in fields(_GroupFactor):
                    getattr(a, f.name)[:, chosen] = getattr(b, f.name)
        for part in ("root", "pivots", "equilibration", "still", "ends", "correct", "singular"):
            getattr(self, part)[chosen] = getattr(other, part)
        self.damping[:, chosen] = other.damping


class KKT:
    """The KKT systems of a program, or of a batch of programs that differ by their numbers only.

    Vectors have shape (size, problems), nonzeros (nonzeros, problems), float64.

    Args:
        nlp: for the structure.
        fixed: variables that do not move, (variables,) or (variables, problems); only first and last states, times,
            integrals and parameters can be fixed.
        device: where tensors are.

    Raises:
        ArgumentError: a state within the phase or a control is fixed, or entries lie outside of the band.
    """

    def __init__(self, nlp: NLP, fixed: Tensor, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.n, self.m = nlp.n, nlp.m
        self.fixed = fixed if fixed.dim() == 2 else fixed[:, None]
        self.jacobian_places, self.hessian_places = (
            tuple(self._index(a) for a in structure) for structure in (nlp.jacobian_structure, nlp.hessian_structure)
        )
        always = self.fixed.all(1).cpu().numpy()
        parameters = range(nlp.parameters.start, nlp.parameters.stop)
        self.chains: list[Chain] = []
        root: list[int] = []
        for name, place in nlp.places.items():
            border = [c for c in (place.t0, place.tf, *parameters) if c is not None and not always[c]]
            chain = Chain(nlp, name, border)
            self.chains.append(chain)
            root += [*chain.state_columns[0], *chain.state_columns[-1]]
        for place in nlp.places.values():
            root += [c for c in (place.t0, place.tf) if c is not None]
            root += range(place.integrals.start, place.integrals.stop)
        root += parameters
        self._lay_out(nlp, np.array(root, int))
        movable = torch.ones_like(self.fixed)
        movable[self.root_columns] = False
        if bool((movable & self.fixed).any()):
            column = int((movable & self.fixed).any(1).nonzero()[0])
            raise ArgumentError(f"{nlp.variable_name(column)} is fixed; only ends, times and parameters can be")

    def _index(self, a) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(self.device)

    def _lay_out(self, nlp: NLP, root: np.ndarray) -> None:
        n, m = nlp.n, nlp.m
        chain_of, node_of, local_of = np.full(n, -1), np.full(n, -1), np.full(n, -1)
        for c, chain in enumerate(self.chains):
            for columns, first in ((chain.state_columns, 0), (chain.control_columns, chain.nx)):
                chain_of[columns] = c
                node_of[columns] = np.arange(len(columns))[:, None]
                local_of[columns] = first + np.arange(columns.shape[1])
        root_of = np.full(n, -1)
        root_of[root] = np.arange(len(root))
        # Unknowns of the border: its variables, multipliers of the end states, of integrals and of ends.
        size = len(root)
        nu_of = []
        for chain in self.chains:
            nu_of.append(np.arange(size, size + chain.nx))
            size += chain.nx
        rows = np.concatenate([*(chain.integral_rows for chain in self.chains), np.arange(m)[nlp.end_rows]]).astype(int)
        row_of = np.full(m, -1)
        row_of[rows] = size + np.arange(len(rows))
        self.root_size, self.multipliers = size + len(rows), size + len(rows) - len(root)
        self.root_columns, self.root_rows = self._index(root), self._index(rows)
        jacobian, hessian = _Targets((1, self.root_size, self.root_size)), _Targets((1, self.root_size, self.root_size))
        # Hessian
        r, c = (np.asarray(a) for a in nlp.hessian_structure)
        source = np.arange(len(r))
        taken = np.zeros(len(r), bool)
        self.weights: list[Blocks] = []
        for number, chain in enumerate(self.chains):
            border = np.full(n, -1)
            border[chain.border] = chain.local + np.arange(len(chain.border))
            d = chain.local + len(chain.border)
            blocks = _Targets((chain.nodes, d, d))
            inside = [(chain_of[a] == number) & (node_of[a] < chain.nodes) for a in (r, c)]
            both = inside[0] & inside[1] & (node_of[r] == node_of[c])
            places = [np.where(i, local_of[a], border[a]) for i, a in zip(inside, (r, c), strict=True)]
            mixed = (inside[0] & (border[c] >= 0)) | (inside[1] & (border[r] >= 0))
            here = both | mixed
            node = np.where(inside[0], node_of[r], node_of[c])
            blocks.add(source[here], node[here], places[0][here], places[1][here])
            off = here & (places[0] != places[1])
            blocks.add(source[off], node[off], places[1][off], places[0][off])
            taken |= here
            self.weights.append(blocks.build(self.device))
        here = ~taken & (root_of[r] >= 0) & (root_of[c] >= 0)
        hessian.add(source[here], 0, root_of[r][here], root_of[c][here])
        off = here & (r != c)
        hessian.add(source[off], 0, root_of[c][off], root_of[r][off])
        fixed = self.fixed.all(1).cpu().numpy()
        self._complete(taken | here | fixed[r] | fixed[c], "Hessian")
        # Jacobian
        r, c = (np.asarray(a) for a in nlp.jacobian_structure)
        source = np.arange(len(r))
        taken = (row_of[r] >= 0) & (root_of[c] >= 0) & ~self._inside_of_integral(r, c, chain_of)
        jacobian.add(source[taken], 0, row_of[r][taken], root_of[c][taken])
        jacobian.add(source[taken], 0, root_of[c][taken], row_of[r][taken])
        self.path: list[Blocks] = []
        self.integral: list[Blocks] = []
        self.groups: list[list[_Group]] = []
        for number, chain in enumerate(self.chains):
            nx, nu = chain.nx, chain.nu
            border = np.full(n, -1)
            border[chain.border] = np.arange(len(chain.border))
            row_node, row_local = np.full(m, -1), np.full(m, -1)

            def entries(lines: np.ndarray, row_node=row_node, row_local=row_local):
                row_node[:] = -1
                row_node[lines] = np.arange(len(lines))[:, None]
                row_local[lines] = np.arange(lines.shape[1])
                return row_node[r] >= 0

            path = _Targets((chain.nodes, chain.np, chain.local + len(chain.border)))
            here = entries(chain.path_rows)
            own = here & (chain_of[c] == number) & (node_of[c] == row_node[r])
            path.add(source[own], row_node[r][own], row_local[r][own], local_of[c][own])
            far = here & (border[c] >= 0)
            path.add(source[far], row_node[r][far], row_local[r][far], chain.local + border[c][far])
            taken |= own | far
            self.path.append(path.build(self.device))
            integral = _Targets((chain.nodes, chain.nq, chain.local))
            line = np.full(m, -1)
            line[chain.integral_rows] = np.arange(chain.nq)
            own = (line[r] >= 0) & (chain_of[c] == number) & (node_of[c] < chain.nodes)
            integral.add(source[own], node_of[c][own], line[r][own], local_of[c][own])
            taken |= own
            self.integral.append(integral.build(self.device))
            here = entries(chain.defect_rows)
            groups = []
            for points in np.unique(chain.degrees):
                members = np.flatnonzero(chain.degrees == points)
                position = np.full(len(chain.degrees), -1)
                position[members] = np.arange(len(members))
                starts = chain.starts[members]
                nodes = starts[:, None] + np.arange(points)
                inner = _Targets((len(members), points * nx, points * nx))
                outer = _Targets((len(members), points * nx, points * nu + nx + len(chain.border)))
                e = np.where(here, chain.interval[np.clip(row_node[r], 0, chain.nodes - 1)], 0)
                mine = here & (position[e] >= 0)
                first = chain.starts[e]
                row = (row_node[r] - first) * nx + row_local[r]
                offset = node_of[c] - first
                ours = mine & (chain_of[c] == number) & (offset >= 0) & (offset <= points)
                later = ours & (local_of[c] < nx) & (offset > 0)
                inner.add(source[later], position[e][later], row[later], ((offset - 1) * nx + local_of[c])[later])
                start = ours & (local_of[c] < nx) & (offset == 0)
                outer.add(source[start], position[e][start], row[start], points * nu + local_of[c][start])
                control = ours & (local_of[c] >= nx)
                column = offset * nu + local_of[c] - nx
                outer.add(source[control], position[e][control], row[control], column[control])
                far = mine & (border[c] >= 0)
                outer.add(source[far], position[e][far], row[far], points * nu + nx + border[c][far])
                taken |= later | start | control | far
                groups.append(
                    _Group(
                        int(points),
                        self._index(members),
                        self._index(nodes),
                        self._index(chain.defect_rows[nodes].reshape(len(members), -1)),
                        self._index(chain.state_columns[nodes + 1].reshape(len(members), -1)),
                        inner.build(self.device),
                        outer.build(self.device),
                    )
                )
            self.groups.append(groups)
        self._complete(taken | fixed[c], "Jacobian")
        self.root_hessian, self.root_jacobian = hessian.build(self.device), jacobian.build(self.device)
        self.node_columns = [
            self._index(np.concatenate([chain.state_columns[:-1], chain.control_columns], 1)) for chain in self.chains
        ]
        self.path_rows = [self._index(chain.path_rows) for chain in self.chains]
        self.nu_of = [self._index(a) for a in nu_of]
        self.first_of = [self._index(root_of[chain.state_columns[0]]) for chain in self.chains]
        self.last_of = [self._index(root_of[chain.state_columns[-1]]) for chain in self.chains]
        self.border_of = [self._index(root_of[chain.border]) for chain in self.chains]
        self.integral_of = [self._index(row_of[chain.integral_rows]) for chain in self.chains]
        # First states have their diagonal in the first interval.
        own = np.ones(len(root), bool)
        for chain in self.chains:
            own[root_of[chain.state_columns[0]]] = False
        self.root_own = torch.from_numpy(own).to(self.device)

    def _inside_of_integral(self, r: np.ndarray, c: np.ndarray, chain_of: np.ndarray) -> np.ndarray:
        """Entries of integrals by states and controls: they belong to intervals, not to the border."""
        integral = np.zeros(self.m, bool)
        for chain in self.chains:
            integral[chain.integral_rows] = True
        return integral[r] & (chain_of[c] >= 0)

    @staticmethod
    def _complete(taken: np.ndarray, what: str) -> None:
        if not taken.all():
            raise ArgumentError(f"{int((~taken).sum())} entries of the {what} lie outside of intervals and border")

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
        self, factor: Factorization, jacobian: Tensor, hessian: Tensor, sigma: Tensor, damping: Tensor, fixed: Tensor,
        right: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `found` leaves of the right-hand side; D is `damping`, which may be less than what was factored."""
        (b, c), (dy, dual) = right, found
        r = b - self.hessian_times(hessian, dy) - sigma * dy - self.transposed_times(jacobian, dual)
        q = c - self.jacobian_times(jacobian, dy) + damping * dual
        if bool((factor.ends > 0).any()):
            defects = torch.zeros_like(dual)
            for groups in self.groups:
                for group in groups:
                    defects[group.defects] = dual[group.defects]
            slopes = self.transposed_times(jacobian, defects)
            last = torch.zeros_like(dy)
            for chain in self.chains:
                columns = self._index(chain.state_columns[-1])
                last[columns] = slopes[columns]
            ends = self.jacobian_times(jacobian, last) * factor.ends
            for groups in self.groups:
                for group in groups:
                    q[group.defects] += ends[group.defects]
        return r.masked_fill(fixed, 0.0), q

    # Factorization

    def factor(
        self, jacobian: Tensor, hessian: Tensor, sigma: Tensor, damping: Tensor, fixed: Tensor, ends: Tensor
    ) -> Factorization:
        """Factor the matrix.

        Args:
            jacobian, hessian: nonzeros, in the order of the program's structures.
            sigma: Σ (variables, problems).
            damping: D (constraints, problems): positive in path constraints; zero or positive in those of integrals and
                ends; not used in defects.
            fixed: variables that do not move (variables, problems).
            ends: δ >= 0 (problems,): end states may miss the end of the last interval by δ times their multipliers; for
                ends that cannot be reached independently. In the system above, D has δ E Eᵀ in the rows of defects, E
                being their slopes by the end states.
        """
        chains = []
        problems = jacobian.shape[1]
        correct = torch.ones(problems, dtype=torch.bool, device=jacobian.device)
        root = (self.root_hessian.of(hessian) + self.root_jacobian.of(jacobian))[0]
        for number, chain in enumerate(self.chains):
            factor, good = self._factor_chain(number, chain, jacobian, hessian, sigma, damping)
            chains.append(factor)
            correct &= good
            self._add_value(number, chain, factor.values[0], root)
        variables = len(self.root_columns)
        diagonal = torch.diagonal(root, dim1=-2, dim2=-1)
        diagonal[:, :variables] += (sigma[self.root_columns] * self.root_own[:, None]).T
        diagonal[:, self.root_size - len(self.root_rows) :] -= damping[self.root_rows].T
        for nu in self.nu_of:
            diagonal[:, nu] -= ends[:, None]
        still = torch.zeros(problems, self.root_size, dtype=torch.bool, device=root.device)
        still[:, :variables] = fixed[self.root_columns].T
        root.masked_fill_(still[:, :, None] | still[:, None, :], 0.0)
        diagonal.masked_fill_(still, 1.0)
        scale = torch.ones_like(diagonal)
        for _ in range(4):
            largest = (root * scale[:, :, None] * scale[:, None, :]).abs().amax(-1)
            scale = scale / largest.clamp_min(1e-300).sqrt()
        scale = torch.where(scale.isfinite(), scale, 1.0)
        equilibrated = root * scale[:, :, None] * scale[:, None, :]
        finite = equilibrated.isfinite().flatten(1).all(1)
        equilibrated = torch.where(finite[:, None, None], equilibrated, torch.eye(self.root_size, dtype=root.dtype))
        eigenvalues = torch.linalg.eigvalsh(equilibrated)
        singular = finite & (eigenvalues.abs().amin(-1) < SINGULAR)
        correct &= finite & ~singular & ((eigenvalues < 0).sum(-1) == self.multipliers)
        lu, pivots, _ = torch.linalg.lu_factor_ex(equilibrated)
        return Factorization(chains, lu, pivots, scale, still, damping, ends, correct, singular)

    def _add_value(self, number: int, chain: Chain, value: Tensor, root: Tensor) -> None:
        """The value of a phase as a function of the border: σ = ν - ρ x_N."""
        nx, g = chain.nx, len(chain.border)
        first, last, nu = self.first_of[number], self.last_of[number], self.nu_of[number]
        where = torch.cat([first, self.border_of[number], nu, self.integral_of[number]])
        root[:, where[:, None], where] += value
        # Through σ, the end state has -ρ times the rows and columns of ν.
        s = nx + g
        root[:, where[:, None], last] -= PENALTY * value[:, :, s : s + nx]
        root[:, last[:, None], where] -= PENALTY * value[:, s : s + nx, :]
        root[:, last[:, None], last] += PENALTY**2 * value[:, s : s + nx, s : s + nx]
        root[:, last, last] += PENALTY
        root[:, last, nu] -= 1
        root[:, nu, last] -= 1

    def _factor_chain(self, number: int, chain: Chain, jacobian, hessian, sigma, damping) -> tuple[_ChainFactor, Tensor]:
        nx, nu, g, theta, d = chain.nx, chain.nu, len(chain.border), chain.theta, chain.local
        weights = self.weights[number].of(hessian)
        problems = weights.shape[1]
        torch.diagonal(weights, dim1=-2, dim2=-1)[..., :d] += sigma[self.node_columns[number]].transpose(1, 2)
        path = self.path[number].of(jacobian)
        if chain.np:
            scaled = path / damping[self.path_rows[number]].transpose(1, 2)[..., None]
            weights += path.mT @ scaled
        integral = self.integral[number].of(jacobian)
        intervals = len(chain.degrees)
        s = nx + theta
        steps, costs = [None] * intervals, [None] * intervals
        parts = []
        for group in self.groups[number]:
            lu, pivots, _ = torch.linalg.lu_factor_ex(group.inner.of(jacobian))
            inner = -torch.linalg.lu_solve(lu, pivots, group.outer.of(jacobian))
            count, u = len(group.members), group.points * nu
            columns = u + nx + g
            expand = inner.new_zeros(count, problems, group.points, d + g, columns)
            expand[:, :, 1:, :nx] = inner.view(count, problems, group.points, nx, columns)[:, :, :-1]
            for i in range(nx):
                expand[:, :, 0, i, u + i] = 1
            for j in range(group.points):
                for i in range(nu):
                    expand[:, :, j, nx + i, j * nu + i] = 1
            for i in range(g):
                expand[:, :, :, d + i, u + nx + i] = 1
            cost = inner.new_zeros(count, problems, u + s, u + s)
            weighted = (weights[group.nodes].transpose(1, 2) @ expand).flatten(2, 3)
            flat = expand.flatten(2, 3)
            cost[..., :columns, :columns] = flat.mT @ weighted
            if chain.nq:
                rows = (integral[group.nodes].transpose(1, 2) @ expand[..., :d, :]).sum(2)
                cost[..., columns + nx :, :columns] = rows
                cost[..., :columns, columns + nx :] = rows.mT
            step = inner.new_zeros(count, problems, s, u + s)
            step[..., :nx, :columns] = inner[..., -nx:, :]
            for i in range(theta):
                step[..., nx + i, u + nx + i] = 1
            for e, one, other in zip(group.members.tolist(), step.unbind(0), cost.unbind(0), strict=True):
                steps[e], costs[e] = one, other
            parts.append((lu, pivots, inner, expand, step))
        value = weights.new_zeros(problems, s, s)
        for i in range(nx):
            value[:, i, i] = PENALTY
            value[:, i, nx + g + i] = value[:, nx + g + i, i] = 1
        values: list[Tensor] = [value] * (intervals + 1)
        factors: list = [None] * intervals
        bad = torch.zeros(problems, dtype=torch.int32, device=weights.device)
        for e in range(intervals - 1, -1, -1):
            step: Tensor = steps[e]  # type: ignore[assignment]
            u = step.shape[-1] - s
            total = torch.baddbmm(costs[e], step.mT, torch.bmm(value, step))  # type: ignore[arg-type]
            cholesky, info = torch.linalg.cholesky_ex(total[:, :u, :u])
            half = torch.linalg.solve_triangular(cholesky, total[:, :u, u:], upper=False)
            value = torch.baddbmm(total[:, u:, u:], half.mT, half, alpha=-1)
            bad |= info
            values[e], factors[e] = value, (cholesky, half)
        groups = []
        for group, (lu, pivots, inner, expand, step) in zip(self.groups[number], parts, strict=True):
            members = group.members.tolist()
            cholesky = torch.stack([factors[e][0] for e in members])
            half = torch.stack([factors[e][1] for e in members])
            feedback = -torch.linalg.solve_triangular(cholesky.mT, half, upper=True)
            u = feedback.shape[-2]
            loop = step[..., :nx, u:] + step[..., :nx, :u] @ feedback
            groups.append(_GroupFactor(lu, pivots, inner, expand, step, cholesky, feedback, loop))
        stacked = torch.stack(values)
        good = (bad == 0) & stacked[0].isfinite().flatten(1).all(1)
        return _ChainFactor(weights, path, integral, stacked, groups), good

    # Solution

    def solve(self, factor: Factorization, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """dy (variables, problems) and dλ (constraints, problems) for a right-hand side."""
        variables = len(self.root_columns)
        right = b.new_zeros(b.shape[1], self.root_size)
        right[:, :variables] = (b[self.root_columns] * self.root_own[:, None]).T
        right[:, self.root_size - len(self.root_rows) :] = c[self.root_rows].T
        states = []
        for number, chain in enumerate(self.chains):
            state, p = self._backward(number, chain, factor.chains[number], factor.damping, b, c)
            states.append(state)
            where, last = self._where(number)
            s = chain.nx + len(chain.border)
            right[:, where] -= p
            right[:, last] += PENALTY * p[:, s : s + chain.nx]
        right.masked_fill_(factor.still, 0.0)
        scale = factor.equilibration
        found = torch.linalg.lu_solve(factor.root, factor.pivots, (right * scale)[..., None])[..., 0] * scale
        dy, dual = torch.empty_like(b), torch.empty_like(c)
        dy[self.root_columns] = found[:, :variables].T
        dual[self.root_rows] = found[:, self.root_size - len(self.root_rows) :].T
        for number, chain in enumerate(self.chains):
            where, last = self._where(number)
            z = found[:, where]
            s = chain.nx + len(chain.border)
            z[:, s : s + chain.nx] -= PENALTY * found[:, last]
            self._forward(number, chain, factor.chains[number], factor.damping, c, states[number], z, dy, dual)
        return dy, dual

    def _where(self, number: int) -> tuple[Tensor, Tensor]:
        first, nu = self.first_of[number], self.nu_of[number]
        return torch.cat([first, self.border_of[number], nu, self.integral_of[number]]), self.last_of[number]

    def _backward(self, number: int, chain: Chain, factor: _ChainFactor, damping, b, c):
        """Linear terms of the value at each edge."""
        nx, nu, g, d = chain.nx, chain.nu, len(chain.border), chain.local
        problems = b.shape[1]
        linear = b.new_zeros(chain.nodes, problems, d + g)
        linear[..., :d] = -b[self.node_columns[number]].transpose(1, 2)
        if chain.np:
            rows = self.path_rows[number]
            linear -= (factor.path.mT @ (c[rows] / damping[rows]).transpose(1, 2)[..., None])[..., 0]
        intervals = len(chain.degrees)
        pieces, kept = [None] * intervals, []
        for group, made in zip(self.groups[number], factor.groups, strict=True):
            count = len(group.members)
            f = torch.linalg.lu_solve(made.lu, made.pivots, c[group.defects].transpose(1, 2)[..., None])[..., 0]
            shifted = f.new_zeros(count, problems, group.points, d + g, 1)
            shifted[:, :, 1:, :nx, 0] = f.view(count, problems, group.points, nx)[:, :, :-1]
            nodes = group.nodes
            gradient = linear[nodes].transpose(1, 2) + (factor.weights[nodes].transpose(1, 2) @ shifted)[..., 0]
            u = group.points * nu
            q = f.new_zeros(count, problems, made.step.shape[-1])
            columns = u + nx + g
            q[..., :columns] = (gradient.flatten(2)[..., None, :] @ made.expand.flatten(2, 3))[..., 0, :]
            if chain.nq:
                rows = (factor.integral[nodes].transpose(1, 2) @ shifted[..., :d, :])[..., 0].sum(2)
                q[..., columns + nx :] = rows
            end = f[..., -nx:]
            pushed = (factor.values[group.members + 1][..., :nx] @ end[..., None])[..., 0]
            # p of this edge is (feedback ᵀ, 1) (q + Tᵀ (p of the next edge + P f)).
            total = q + (pushed[..., None, :] @ made.step)[..., 0, :]
            piece = total[..., u:] + (total[..., None, :u] @ made.feedback)[..., 0, :]
            for e, one in zip(group.members.tolist(), piece[..., :nx, None].unbind(0), strict=True):
                pieces[e] = (one, None)
            kept.append((f, linear, total, piece))
        loops: list = [None] * intervals
        for group, made in zip(self.groups[number], factor.groups, strict=True):
            for e, one in zip(group.members.tolist(), made.loop[..., :nx].mT.unbind(0), strict=True):
                loops[e] = one
        p = b.new_zeros(problems, nx, 1)
        costates: list[Tensor] = [p] * (intervals + 1)
        for e in range(intervals - 1, -1, -1):
            p = torch.baddbmm(pieces[e][0], loops[e], p)  # type: ignore[index]
            costates[e] = p
        edges = torch.stack(costates)[..., 0]
        first = b.new_zeros(problems, nx + chain.theta)
        first[:, :nx] = edges[0]
        for group, made, (_, _, _, piece) in zip(self.groups[number], factor.groups, kept, strict=True):
            through = (edges[group.members + 1][..., None, :] @ made.loop[..., nx:])[..., 0, :]
            first[:, nx:] += (piece[..., nx:] + through).sum(0)
        return (edges, kept), first

    def _forward(self, number: int, chain: Chain, factor: _ChainFactor, damping, c, state, z, dy, dual) -> None:
        """States, controls and multipliers from the first state and θ."""
        nx, nu, g, d = chain.nx, chain.nu, len(chain.border), chain.local
        edges, kept = state
        problems, intervals = z.shape[0], len(chain.degrees)
        theta = z[:, nx:]
        loops: list = [None] * intervals
        constants: list = [None] * intervals
        open_loop = []
        for group, made, (f, _, total, _) in zip(self.groups[number], factor.groups, kept, strict=True):
            u = group.points * nu
            slope = total[..., :u] + (edges[group.members + 1][..., None, :] @ made.step[..., :nx, :u])[..., 0, :]
            k = -torch.cholesky_solve(slope[..., None], made.cholesky)[..., 0]
            open_loop.append(k)
            constant = f[..., -nx:, None] + made.loop[..., nx:] @ theta[..., None] + made.step[..., :nx, :u] @ k[..., None]
            for e, one, other in zip(
                group.members.tolist(), made.loop[..., :nx].unbind(0), constant.unbind(0), strict=True
            ):
                loops[e], constants[e] = one, other
        x = z[:, :nx, None]
        trajectory = [x]
        for e in range(intervals):
            x = torch.baddbmm(constants[e], loops[e], x)
            trajectory.append(x)
        states = torch.stack(trajectory)[..., 0]
        full = torch.cat([states, theta.expand(intervals + 1, -1, -1)], -1)
        push = (factor.values[..., :nx, :] @ full[..., None])[..., 0] + edges  # costates at the edges
        border = theta[:, :g]
        for group, made, (f, linear, _, _), k in zip(self.groups[number], factor.groups, kept, open_loop, strict=True):
            count, members = len(group.members), group.members
            controls = (made.feedback @ full[members][..., None])[..., 0] + k
            free = torch.cat([controls, states[members], border.expand(count, -1, -1)], -1)
            later = (made.inner @ free[..., None])[..., 0] + f
            nodes = free.new_empty(count, problems, group.points, d + g)
            nodes[:, :, 0, :nx] = states[members]
            nodes[:, :, 1:, :nx] = later.view(count, problems, group.points, nx)[:, :, :-1]
            nodes[..., nx:d] = controls.view(count, problems, group.points, nu)
            nodes[..., d:] = border[:, None]
            slope = linear[group.nodes].transpose(1, 2)
            slope = slope + (factor.weights[group.nodes].transpose(1, 2) @ nodes[..., None])[..., 0]
            right = torch.cat([slope[:, :, 1:, :nx].flatten(2), push[members + 1]], -1)
            found = -torch.linalg.lu_solve(made.lu, made.pivots, right[..., None], adjoint=True)[..., 0]
            dual[group.defects] = found.transpose(1, 2)
            columns = self.node_columns[number][group.nodes]
            dy[columns[:, :, nx:]] = nodes[..., nx:d].permute(0, 2, 3, 1)
            inner = columns[:, 1:, :nx]
            dy[inner] = nodes[:, :, 1:, :nx].permute(0, 2, 3, 1)
            # The end of an interval is the start of the next one; that of the last is of the border.
            starts = columns[:, 0, :nx]
            later_starts = members > 0
            dy[starts[later_starts]] = states[members[later_starts]].transpose(1, 2)
            if chain.np:
                rows = self.path_rows[number][group.nodes]
                values = (factor.path[group.nodes].transpose(1, 2) @ nodes[..., None])[..., 0].permute(0, 2, 3, 1)
                dual[rows] = (values - c[rows]) / damping[rows]
