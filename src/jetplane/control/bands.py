"""Which nonzeros of a transcribed problem lie in which interval, and which in the border.

Variables of an interval are the states and controls of its nodes; its constraints are the defects and path constraints
there. The border has the first and last states of all phases, times, integrals and parameters, and the constraints on
them. All of it is known from the structure of the program alone, and is kept as indices from nonzeros to dense blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from .nlp import Place
from .radau import Mesh


class Banded(Protocol):
    """What is needed of a program; `NLP` has it."""

    n: int
    m: int
    places: dict[str, Place]
    meshes: dict[str, Mesh]
    parameters: slice
    end_rows: slice
    jacobian_structure: tuple[np.ndarray, np.ndarray]
    hessian_structure: tuple[np.ndarray, np.ndarray]

    def variable_name(self, column: int) -> str:
        """What a variable is, for messages."""
        ...


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
class Group:
    """Intervals of one phase with the same number of points; which rows and columns they hold, node by node."""

    points: int
    members: Tensor  # intervals
    columns: Tensor  # states and controls (intervals, points * local)
    defects: Tensor  # rows of defects (intervals, points * states)
    path_rows: Tensor  # (intervals, points * path constraints)
    inner: Blocks  # states after the first, by their defects: transposed, as LAPACK wants them
    outer: Blocks  # controls, first states, border by defects, likewise
    weights: Blocks  # W of each node by states, controls, border
    path: Blocks
    integral: Blocks
    expand: Tensor  # nodes' variables by controls, first states, border; rows of later states are zero


class Chain:
    """A phase: its intervals, and which rows and columns they hold."""

    def __init__(self, nlp: Banded, name: str, border: Sequence[int]) -> None:
        place, mesh = nlp.places[name], nlp.meshes[name]
        self.nodes = mesh.nodes
        self.nx, self.nu, self.np = (
            (part.stop - part.start) // count
            for part, count in ((place.defects, mesh.nodes), (place.controls, mesh.nodes), (place.path, mesh.nodes))
        )
        self.nq = place.integral_rows.stop - place.integral_rows.start
        self.border = list(border)
        self.local = self.nx + self.nu
        self.theta = len(border) + self.nx + self.nq
        self.degrees, self.starts = np.array(mesh.degrees), mesh.starts
        k = np.arange(self.nodes)
        self.state_columns = (
            place.states.start + np.arange(self.nx) * (self.nodes + 1) + np.arange(self.nodes + 1)[:, None]
        )
        self.control_columns = place.controls.start + np.arange(self.nu) * self.nodes + k[:, None]
        self.defect_rows = place.defects.start + np.arange(self.nx) * self.nodes + k[:, None]
        self.path_rows = place.path.start + np.arange(self.np) * self.nodes + k[:, None]
        self.integral_rows = np.arange(place.integral_rows.start, place.integral_rows.stop)
        self.interval = np.repeat(np.arange(len(self.degrees)), self.degrees)


@dataclass
class _Span:
    """Intervals of one phase with the same number of points, and where nonzeros lie in them.

    Of variables, `node` and `local` are the node and the place there, -1 in other phases; `border` is the place in the
    border, -1 elsewhere.
    """

    chain: Chain
    points: int
    count: int
    position: np.ndarray  # of each node's interval among these, -1 for others; of the last node -1

    def hessian(self, structure, node: np.ndarray, local: np.ndarray, border: np.ndarray) -> _Targets:
        """Nodes by themselves and by the border, both triangles."""
        d, rows, columns = self.chain.local, *(np.asarray(a) for a in structure)
        targets = _Targets((self.count, self.points * (d + len(self.chain.border)), d + len(self.chain.border)))
        mine = (node >= 0) & (node < self.chain.nodes)
        at = np.where(mine[rows], node[rows], np.where(mine[columns], node[columns], self.chain.nodes))
        e = self.position[at]
        left, right = (
            np.where(mine[side], local[side], np.where(border[side] >= 0, d + border[side], -1))
            for side in (rows, columns)
        )
        same = ~(mine[rows] & mine[columns]) | (node[rows] == node[columns])
        here = np.flatnonzero((e >= 0) & (left >= 0) & (right >= 0) & same)
        offset = (at - self._first(at))[here] * targets.shape[2]
        targets.add(here, e[here], offset + left[here], right[here])
        other = left[here] != right[here]
        offset, here = offset[other], here[other]
        targets.add(here, e[here], offset + right[here], left[here])
        return targets

    def jacobian(self, structure, constraints: int, node, local, border) -> dict[str, _Targets]:
        """Defects, path constraints and integrals."""
        chain, (rows, columns) = self.chain, (np.asarray(a) for a in structure)
        nx, nu, d, g, u = chain.nx, chain.nu, chain.local, len(chain.border), self.points * chain.nu
        row_node, kind, row_local = np.full(constraints, -1), np.full(constraints, "", "U8"), np.full(constraints, -1)
        for name, lines in (("defect", chain.defect_rows), ("path", chain.path_rows)):
            row_node[lines], kind[lines] = np.arange(len(lines))[:, None], name
            row_local[lines] = np.arange(lines.shape[1])
        kind[chain.integral_rows], row_local[chain.integral_rows] = "integral", np.arange(chain.nq)
        targets = {
            "inner": _Targets((self.count, self.points * nx, self.points * nx)),
            "outer": _Targets((self.count, u + nx + g, self.points * nx)),
            "path": _Targets((self.count, self.points * chain.np, d + g)),
            "integral": _Targets((self.count, self.points * chain.nq, d)),
        }
        kinds, row_local, far = kind[rows], row_local[rows], border[columns] >= 0
        node, local = node[columns], local[columns]
        at = np.where(kinds == "integral", node, row_node[rows])
        at = np.where(at < 0, chain.nodes, at)
        e = self.position[at]
        row, offset = at - self._first(at), node - self._first(at)  # within the interval
        near = (node >= 0) & (offset >= 0) & (offset <= self.points)
        defect, path, integral = ((e >= 0) & (kinds == name) for name in ("defect", "path", "integral"))

        def put(name: str, which: np.ndarray, lines: np.ndarray, places: np.ndarray) -> None:
            source = np.flatnonzero(which)
            targets[name].add(source, e[source], lines[source], places[source])

        lines, state = row * nx + row_local, local < nx
        put("inner", defect & near & state & (offset > 0), (offset - 1) * nx + local, lines)
        put("outer", defect & near & state & (offset == 0), u + local, lines)
        put("outer", defect & near & ~state, offset * nu + local - nx, lines)
        put("outer", defect & far, u + nx + border[columns], lines)
        lines = row * chain.np + row_local
        put("path", path & near & (offset == row), lines, local)
        put("path", path & far, lines, d + border[columns])
        put("integral", integral & near, row * chain.nq + row_local, local)
        return targets

    def _first(self, at: np.ndarray) -> np.ndarray:
        """The first node of the interval of each of some nodes."""
        chain = self.chain
        first = np.append(chain.starts[:-1], chain.nodes)
        return first[np.append(chain.interval, len(chain.degrees))[at]]


class Bands:
    """The layout of a program's KKT systems.

    Args:
        nlp: for the structure.
        fixed: variables that do not move, (variables, problems).
        device: where indices are.

    Attributes:
        chains: the phases.
        groups: of each phase, its intervals by their numbers of points.
        still: controls that never move (variables,).
        root_size, multipliers: unknowns of the border, and how many of them are multipliers.
        root_columns, root_rows: variables and constraints of the border.
        root_own: variables of the border whose diagonal no interval has.
        root_hessian, root_jacobian: the border's nonzeros.

    Raises:
        ArgumentError: a state within a phase is fixed, or entries lie outside of the band.
    """

    def __init__(self, nlp: Banded, fixed: Tensor, device: torch.device) -> None:
        self.device, self.fixed = device, fixed
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
        # Of controls that do not move, the matrix has the identity alone.
        self.still = torch.zeros_like(self.fixed[:, 0])
        for chain in self.chains:
            columns = self._index(chain.control_columns.ravel())
            self.still[columns] = self.fixed[columns].all(1)
        movable[self.still] = False
        if bool((movable & self.fixed).any()):
            column = int((movable & self.fixed).any(1).nonzero()[0])
            raise ArgumentError(f"{nlp.variable_name(column)} is fixed; only ends, times, parameters, controls can be")

    def _index(self, a) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(self.device)

    def _lay_out(self, nlp: Banded, root: np.ndarray) -> None:
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
        self.groups: list[list[Group]] = [
            self._groups(number, nlp, chain_of, node_of, local_of) for number in range(len(self.chains))
        ]
        fixed = self.fixed.all(1).cpu().numpy()
        # What no interval has is the border's.
        r, c = (np.asarray(a) for a in nlp.hessian_structure)
        source = np.arange(len(r))
        taken = self._taken(len(r), "weights")
        here = ~taken & (root_of[r] >= 0) & (root_of[c] >= 0)
        hessian.add(source[here], 0, root_of[r][here], root_of[c][here])
        off = here & (r != c)
        hessian.add(source[off], 0, root_of[c][off], root_of[r][off])
        self._complete(taken | here | fixed[r] | fixed[c], "Hessian")
        r, c = (np.asarray(a) for a in nlp.jacobian_structure)
        source = np.arange(len(r))
        taken = self._taken(len(r), "inner", "outer", "path", "integral")
        here = ~taken & (row_of[r] >= 0) & (root_of[c] >= 0)
        jacobian.add(source[here], 0, row_of[r][here], root_of[c][here])
        jacobian.add(source[here], 0, root_of[c][here], row_of[r][here])
        self._complete(taken | here | fixed[c], "Jacobian")
        self.root_hessian, self.root_jacobian = hessian.build(self.device), jacobian.build(self.device)
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

    def _taken(self, count: int, *parts: str) -> np.ndarray:
        """Which nonzeros are in those blocks of groups."""
        taken = np.zeros(count, bool)
        for groups in self.groups:
            for group in groups:
                for part in parts:
                    taken[getattr(group, part).source.cpu().numpy()] = True
        return taken

    def _groups(self, number: int, nlp: Banded, chain_of, node_of, local_of) -> list[Group]:
        """Intervals of a phase by their numbers of points, and where their nonzeros go."""
        chain = self.chains[number]
        nx, nu, d, g = chain.nx, chain.nu, chain.local, len(chain.border)
        border = np.full(nlp.n, -1)
        border[chain.border] = np.arange(g)
        node_of, local_of = np.where(chain_of == number, (node_of, local_of), -1)
        groups = []
        for points in np.unique(chain.degrees).tolist():
            members = np.flatnonzero(chain.degrees == points)
            u = points * nu
            position = np.full(len(chain.degrees) + 1, -1)  # the end belongs to no interval
            position[members] = np.arange(len(members))
            span = _Span(chain, points, len(members), position[np.append(chain.interval, len(chain.degrees))])
            expand = torch.zeros(points, d + g, u + nx + g, dtype=torch.float64)
            expand[0, range(nx), range(u, u + nx)] = 1
            for j in range(points):
                expand[j, range(nx, d), range(j * nu, (j + 1) * nu)] = 1
                expand[j, range(d, d + g), range(u + nx, u + nx + g)] = 1
            nodes = chain.starts[members][:, None] + np.arange(points)
            columns = np.concatenate([chain.state_columns[nodes], chain.control_columns[nodes]], 2)
            blocks = {"weights": span.hessian(nlp.hessian_structure, node_of, local_of, border)}
            blocks.update(span.jacobian(nlp.jacobian_structure, nlp.m, node_of, local_of, border))
            groups.append(
                Group(
                    points,
                    self._index(members),
                    self._index(columns.reshape(len(members), -1)),
                    self._index(chain.defect_rows[nodes].reshape(len(members), -1)),
                    self._index(chain.path_rows[nodes].reshape(len(members), -1)),
                    **{name: part.build(self.device) for name, part in blocks.items()},
                    expand=expand.to(self.device),
                )
            )
        return groups

    @staticmethod
    def _complete(taken: np.ndarray, what: str) -> None:
        if not taken.all():
            raise ArgumentError(f"{int((~taken).sum())} entries of the {what} lie outside of intervals and border")
