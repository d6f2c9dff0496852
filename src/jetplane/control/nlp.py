"""The nonlinear program of a problem on a mesh: Radau collocation, assembled by index arrays that are built once.

Variables of a phase, one after the other: states (nx, nodes + 1), controls (nu, nodes), t0 and tf where they are free,
integrals; after all phases the parameters. Constraints of a phase: defects ``D x - (tf - t0) h f`` (nx, nodes), path
constraints (nc, nodes), integrals; after all phases those of the ends.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sparse

from ..errors import ArgumentError
from .model import Model, PhaseModel
from .radau import Mesh

Map = list[tuple[np.ndarray, np.ndarray]]  # of a local variable: columns and factors at each node


@dataclass
class Place:
    """Where a phase's variables and constraints lie."""

    states: slice
    controls: slice
    t0: int | None
    tf: int | None
    integrals: slice
    defects: slice
    path: slice
    integral_rows: slice


class Entries:
    """Contributions to a sparse matrix that is a linear function of a vector of sources."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, row, column, source, factor) -> None:
        """``matrix[row, column] += factor * sources[source]``, broadcast."""
        self._parts.append(tuple(np.ravel(a) for a in np.broadcast_arrays(row, column, source, factor)))

    def build(self, columns: int, sources: int) -> tuple[np.ndarray, np.ndarray, sparse.csr_array]:
        """Rows and columns of the nonzeros, and the matrix that maps sources to their values."""
        if not self._parts:
            return np.zeros(0, int), np.zeros(0, int), sparse.csr_array((0, sources))
        row, column, source, factor = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        keep = factor != 0
        row, column, source, factor = row[keep], column[keep], source[keep], factor[keep]
        keys, place = np.unique(row.astype(np.int64) * columns + column, return_inverse=True)
        matrix = sparse.csr_array((factor.astype(float), (place, source)), shape=(len(keys), sources))
        return keys // columns, keys % columns, matrix


class NLP:
    """minimize f(y) such that lower <= y <= upper, constraint_lower <= g(y) <= constraint_upper.

    Args:
        model: the traced problem.
        meshes: by the names of the phases.

    All methods take y (n,) and multipliers (m,). Of a batch of programs, made by `batch`, they take (n, problems) and
    (m, problems), and the results have this last dimension, too.

    Attributes:
        n, m: variables and constraints.
        lower, upper, constraint_lower, constraint_upper: bounds; infinite where there is none.
        jacobian_structure, hessian_structure: rows and columns of the nonzeros; the Hessian's lower triangle.

    Example:
        >>> import numpy, jetplane as jp
        >>> ocp = jp.control.Problem()
        >>> ph = ocp.phase("a", states={"x": 1}, controls={"u": 1}, t0=0.0, tf=1.0)
        >>> ph.dynamics = lambda x, u, t, p: -x.x**3 + u.u
        >>> ph.start(x=1.0)
        >>> ocp.minimize(running=lambda x, u, t, p: x.x**2 + u.u**2)
        >>> nlp = ocp.nlp(mesh=(5, 3))
        >>> y = numpy.full(nlp.n, 0.5)
        >>> round(nlp.objective(y), 9), nlp.constraints(y).shape, len(nlp.jacobian(y)) == len(nlp.jacobian_structure[0])
        (0.5, (15,), True)
    """

    def __init__(self, model: Model, meshes: Mapping[str, Mesh]) -> None:
        self.model, self.meshes = model, dict(meshes)
        if set(meshes) != set(model.phases):
            raise ArgumentError(f"expected a mesh for each of the phases {sorted(model.phases)}, got {sorted(meshes)}")
        self._lay_out()
        self.phases = {name: _PhaseArrays(self, name) for name in model.phases}
        self._ends = model.ends.at(1)
        self._tail: tuple[int, ...] = ()
        self._assemble()
        self._last: np.ndarray | None = None
        self._fresh: set[str] = set()

    def batch(self, problems: int) -> NLP:
        """The same program for many values of its variables at once; bounds stay those of one program."""
        made = copy.copy(self)
        made._tail = (problems,)
        made.phases = {name: arrays.batch(problems) for name, arrays in self.phases.items()}
        made._ends = self.model.ends.at(problems)
        made._end_free, made._end_fixed = self._end_free[:, None], self._end_fixed[:, None]
        made._first = np.zeros((len(self._first), problems))
        made._first[-1] = 1.0
        made._second = np.zeros((len(self._second), problems))
        made._last, made._fresh = None, set()
        return made

    # Layout and bounds

    def _lay_out(self) -> None:
        self.places: dict[str, Place] = {}
        lower, upper, low, high = [], [], [], []
        n = m = 0

        def take(size: int) -> slice:
            nonlocal n
            n += size
            return slice(n - size, n)

        def rows(size: int) -> slice:
            nonlocal m
            m += size
            return slice(m - size, m)

        for name, model in self.model.phases.items():
            ph, (nx, nu, nq), nodes = model.phase, model.sizes, self.meshes[name].nodes
            states, controls = take(nx * (nodes + 1)), take(nu * nodes)
            for bound, ends, target in ((ph.states.lower, 0, lower), (ph.states.upper, 1, upper)):
                block = np.repeat(bound[:, None], nodes + 1, 1)
                block[:, 0], block[:, -1] = ph.at_start[ends], ph.at_end[ends]
                target.append(block.ravel())
            lower.append(np.repeat(ph.controls.lower, nodes))
            upper.append(np.repeat(ph.controls.upper, nodes))
            times: list[int | None] = []
            for interval in (ph.t0, ph.tf):
                free = interval[0] < interval[1]
                times.append(take(1).start if free else None)
                lower.append(np.array(interval[:1] if free else []))
                upper.append(np.array(interval[1:] if free else []))
            integrals = take(nq)
            lower.append(model.integral_lower)
            upper.append(model.integral_upper)
            defects, path, integral_rows = rows(nx * nodes), rows(len(model.lower) * nodes), rows(nq)
            low += [np.zeros(nx * nodes), np.repeat(model.lower, nodes), np.zeros(nq)]
            high += [np.zeros(nx * nodes), np.repeat(model.upper, nodes), np.zeros(nq)]
            self.places[name] = Place(states, controls, times[0], times[1], integrals, defects, path, integral_rows)
        self.parameters = take(self.model.parameters.size)
        self.end_rows = rows(len(self.model.lower))
        lower.append(self.model.parameters.lower)
        upper.append(self.model.parameters.upper)
        low.append(self.model.lower)
        high.append(self.model.upper)
        self.n, self.m = n, m
        self.lower, self.upper = np.concatenate(lower), np.concatenate(upper)
        self.constraint_lower, self.constraint_upper = np.concatenate(low), np.concatenate(high)

    def _end_maps(self) -> tuple[list[int | None], np.ndarray]:
        """Columns of the variables of the ends, None where fixed; and values where fixed."""
        columns: list[int | None] = []
        fixed: list[float] = []
        for name, model in self.model.phases.items():
            place, nodes, nx = self.places[name], self.meshes[name].nodes, model.sizes[0]
            first = [place.states.start + i * (nodes + 1) for i in range(nx)]
            columns += [*first, *(c + nodes for c in first), place.t0, place.tf]
            columns += range(place.integrals.start, place.integrals.stop)
            fixed += [0.0] * 2 * nx + [model.phase.t0[0], model.phase.tf[0]] + [0.0] * model.sizes[2]
        columns += range(self.parameters.start, self.parameters.stop)
        return columns, np.array(fixed + [0.0] * self.model.parameters.size)

    def _assemble(self) -> None:
        gradient, jacobian, hessian = Entries(), Entries(), Entries()
        first = second = 0
        for arrays in self.phases.values():
            first = arrays.first_entries(gradient, jacobian, first)
            second = arrays.second_entries(hessian, second)
        self._end_columns, self._end_fixed = self._end_maps()
        self._end_taken = np.array([0 if c is None else c for c in self._end_columns], int)
        self._end_free = np.array([c is not None for c in self._end_columns], bool)
        ends, has_final = self.model.ends, self.model.has_final
        for s, (row, i) in enumerate(ends.jacobian_keys):
            column = self._end_columns[i]
            if column is not None:
                if row < has_final:
                    gradient.add(0, column, first + s, 1.0)
                else:
                    jacobian.add(self.end_rows.start + row - has_final, column, first + s, 1.0)
        for s, (i, j) in enumerate(ends.hessian_keys):
            a, b = self._end_columns[i], self._end_columns[j]
            if a is not None and b is not None:
                hessian.add(max(a, b), min(a, b), second + s, 1.0 if a != b or i == j else 2.0)
        one = first + len(ends.jacobian_keys)  # the last source is 1
        for arrays in self.phases.values():
            arrays.constant_entries(jacobian, one)
        self._first = np.zeros(one + 1)
        self._first[-1] = 1.0
        self._second = np.zeros(second + len(ends.hessian_keys))
        _, self._gradient_columns, self._gradient_matrix = gradient.build(self.n, len(self._first))
        rows, columns, self._jacobian_matrix = jacobian.build(self.n, len(self._first))
        self.jacobian_structure = rows, columns
        rows, columns, self._hessian_matrix = hessian.build(self.n, len(self._second))
        self.hessian_structure = rows, columns

    # Values

    def _at(self, y: np.ndarray) -> None:
        if self._last is not None and self._last.shape == y.shape and (self._last == y).all():
            return
        self._last = np.array(y, float)
        self._fresh = set()
        for arrays in self.phases.values():
            arrays.set(self._last)
        ends = np.where(self._end_free, self._last[self._end_taken], self._end_fixed)
        self._ends.variables[:] = ends.reshape(self._ends.variables.shape)
        self._ends.changed()

    def _values(self, y: np.ndarray) -> np.ndarray:
        self._at(y)
        if "values" not in self._fresh:
            for arrays in self.phases.values():
                arrays.values = arrays.nodes.values()
            self._end_values = self._ends.values().reshape(-1, *self._tail)
            self._fresh.add("values")
        return self._end_values

    def _slopes(self, y: np.ndarray) -> np.ndarray:
        self._values(y)
        if "slopes" not in self._fresh:
            start = 0
            for arrays in self.phases.values():
                start = arrays.fill_first(self._first, start)
            self._first[start:-1] = self._ends.jacobian().reshape(-1, *self._tail)
            self._fresh.add("slopes")
        return self._first

    def objective(self, y: np.ndarray) -> Any:
        """f(y)."""
        ends = self._values(y)
        total = ends[0].copy() if self.model.has_final else np.zeros(self._tail)
        for arrays in self.phases.values():
            total = total + arrays.running()
        return total if self._tail else float(total)

    def gradient(self, y: np.ndarray) -> np.ndarray:
        """The gradient of f (n,)."""
        result = np.zeros((self.n, *self._tail))
        result[self._gradient_columns] = self._gradient_matrix @ self._slopes(y)
        return result

    def constraints(self, y: np.ndarray) -> np.ndarray:
        """g(y) (m,)."""
        ends = self._values(y)
        result = np.empty((self.m, *self._tail))
        for arrays in self.phases.values():
            arrays.constraints(result)
        result[self.end_rows] = ends[self.model.has_final :]
        return result

    def jacobian(self, y: np.ndarray) -> np.ndarray:
        """Nonzeros of the Jacobian of g, in the order of `jacobian_structure`."""
        return self._jacobian_matrix @ self._slopes(y)

    def hessian(self, y: np.ndarray, multipliers: np.ndarray, factor: float = 1.0) -> np.ndarray:
        """Nonzeros of the Hessian of ``factor * f + multipliers @ g``, in the order of `hessian_structure`."""
        self._at(y)
        start = 0
        for arrays in self.phases.values():
            start = arrays.fill_second(self._second, start, multipliers, factor)
        if self.model.has_final:
            self._ends.weights[0] = factor
        weights = self._ends.weights[self.model.has_final :]
        weights[:] = multipliers[self.end_rows].reshape(weights.shape)
        self._second[start:] = self._ends.hessian().reshape(-1, *self._tail)
        return self._hessian_matrix @ self._second

    def jacobian_matrix(self, y: np.ndarray) -> sparse.csr_array:
        """The Jacobian as a sparse matrix (m, n)."""
        return sparse.csr_array((self.jacobian(y), self.jacobian_structure), shape=(self.m, self.n))

    def hessian_matrix(self, y: np.ndarray, multipliers: np.ndarray, factor: float = 1.0) -> sparse.csr_array:
        """The Hessian of the Lagrangian as a sparse matrix (n, n), both triangles."""
        rows, columns = self.hessian_structure
        lower = sparse.csr_array((self.hessian(y, multipliers, factor), (rows, columns)), shape=(self.n, self.n))
        return sparse.csr_array(lower + lower.T - sparse.diags_array(lower.diagonal()))

    # Names

    def constraint_name(self, row: int) -> str:
        """What a constraint is, for messages."""
        for name, model in self.model.phases.items():
            place, nodes = self.places[name], self.meshes[name].nodes
            nx, _, nq = model.sizes
            for part, labels in (
                (place.defects, [f"defect of {model.phase.states.entry(i)}" for i in range(nx)]),
                (place.path, model.names[len(model.names) - len(model.lower) :]),
            ):
                if part.start <= row < part.stop:
                    i, node = divmod(row - part.start, nodes)
                    return f"{labels[i]} at node {node} of phase {name!r}"
            if place.integral_rows.start <= row < place.integral_rows.stop:
                return f"integral {model.integrals.entry(row - place.integral_rows.start)} of phase {name!r}"
        return f"boundary constraint {self.model.end_names[self.model.has_final + row - self.end_rows.start]}"

    def variable_name(self, column: int) -> str:
        """What a variable is, for messages."""
        for name, model in self.model.phases.items():
            place, nodes = self.places[name], self.meshes[name].nodes
            if place.states.start <= column < place.states.stop:
                i, node = divmod(column - place.states.start, nodes + 1)
                return f"state {model.phase.states.entry(i)} at node {node} of phase {name!r}"
            if place.controls.start <= column < place.controls.stop:
                i, node = divmod(column - place.controls.start, nodes)
                return f"control {model.phase.controls.entry(i)} at node {node} of phase {name!r}"
            if column in (place.t0, place.tf):
                return f"{'t0' if column == place.t0 else 'tf'} of phase {name!r}"
            if place.integrals.start <= column < place.integrals.stop:
                return f"integral {model.integrals.entry(column - place.integrals.start)} of phase {name!r}"
        return f"parameter {self.model.parameters.entry(column - self.parameters.start)}"


class _PhaseArrays:
    """A phase at the nodes of its mesh."""

    def __init__(self, nlp: NLP, name: str) -> None:
        self.model: PhaseModel = nlp.model.phases[name]
        self.mesh, self.place, self._parameters = nlp.meshes[name], nlp.places[name], nlp.parameters
        nx, nu, nq = self.model.sizes
        nodes = self.count = self.mesh.nodes
        self.nodes = self.model.program.at(nodes)
        self.values = np.zeros((0, nodes))
        self.tau, self.half, self.weight = self.mesh.times, self.mesh.half_lengths, self.mesh.weights
        self.rows, self.columns, self.matrix_values = self.mesh.differentiation()
        self.matrix = sparse.csr_array((self.matrix_values, (self.rows, self.columns)), shape=(nodes, nodes + 1))
        k = np.arange(nodes)
        ones = np.ones(nodes)
        place, tau = self.place, self.tau[:-1]
        self.maps: list[Map] = [[(place.states.start + i * (nodes + 1) + k, ones)] for i in range(nx)]
        self.maps += [[(place.controls.start + i * nodes + k, ones)] for i in range(nu)]
        time: Map = []
        length: Map = []  # of tf - t0
        if place.t0 is not None:
            time.append((np.full(nodes, place.t0), 1 - tau))
            length.append((np.full(nodes, place.t0), -ones))
        if place.tf is not None:
            time.append((np.full(nodes, place.tf), tau))
            length.append((np.full(nodes, place.tf), ones))
        self.maps.append(time)
        self.maps += [[(np.full(nodes, c), ones)] for c in range(self._parameters.start, self._parameters.stop)]
        self.length_map = length
        # Of each timed output: its factor in the NLP beside (tf - t0).
        self.factors = np.array([*[-self.half] * nx, *[-self.weight] * nq, *[self.weight] * self.model.running])
        self.factors = self.factors.reshape(self.model.timed, nodes)
        keys = self.model.program.jacobian_keys
        self.output = np.array([r for r, _ in keys], int)
        self.variable = np.array([i for _, i in keys], int)
        self.is_timed = self.output < self.model.timed
        # Sums over outputs of Jacobian entries of one variable, for derivatives by the length of the phase.
        timed = np.flatnonzero(self.is_timed)
        self._by_variable = timed[np.argsort(self.variable[timed], kind="stable")]
        self.coupled, self._first_of = np.unique(self.variable[self._by_variable], return_index=True)
        self._tail: tuple[int, ...] = ()

    def batch(self, problems: int) -> _PhaseArrays:
        """Arrays with a last dimension of problems; indices are shared."""
        made = copy.copy(self)
        made._tail = (problems,)
        made.nodes = self.model.program.at(self.count * problems)
        made.tau, made.half, made.factors = self.tau[:, None], self.half[:, None], self.factors[..., None]
        return made

    def _shaped(self, a: np.ndarray) -> np.ndarray:
        """Rows of all nodes and problems as (rows, nodes[, problems]); a view."""
        return a.reshape(len(a), self.count, *self._tail)

    def set(self, y: np.ndarray) -> None:
        place, (nx, nu, _), nodes = self.place, self.model.sizes, self.count
        self.states = y[place.states].reshape(nx, nodes + 1, *self._tail)
        phase = self.model.phase
        t0 = phase.t0[0] if place.t0 is None else y[place.t0]
        tf = phase.tf[0] if place.tf is None else y[place.tf]
        self.length = tf - t0
        z = self._shaped(self.nodes.variables)
        z[:nx] = self.states[:, :-1]
        z[nx : nx + nu] = y[place.controls].reshape(nu, nodes, *self._tail)
        z[nx + nu] = t0 + self.length * self.tau[:-1]
        z[nx + nu + 1 :] = y[self._parameters, None]
        self.integrals = y[place.integrals]
        self.nodes.changed()

    def running(self) -> Any:
        if not self.model.running:
            return 0.0
        return self.length * (self.weight @ self._shaped(self.values)[self.model.timed - 1])

    def constraints(self, out: np.ndarray) -> None:
        nx, _, nq = self.model.sizes
        place, values = self.place, self._shaped(self.values)
        lines = self.states.swapaxes(0, 1)  # (nodes + 1, states[, problems])
        slopes = (self.matrix @ lines.reshape(len(lines), -1)).reshape(self.count, *lines.shape[1:]).swapaxes(0, 1)
        defects = slopes + self.length * self.factors[:nx] * values[:nx]
        out[place.defects] = defects.reshape(-1, *self._tail)
        out[place.path] = values[self.model.timed :].reshape(-1, *self._tail)
        if nq:
            integrals = np.tensordot(self.weight, values[nx : nx + nq], (0, 1))
            out[place.integral_rows] = self.integrals - self.length * integrals

    def fill_first(self, sources: np.ndarray, start: int) -> int:
        jacobian = self._shaped(self.nodes.jacobian())
        end = start + len(jacobian) * self.count
        target = sources[start:end].reshape(jacobian.shape)
        target[:] = jacobian
        target[self.is_timed] *= self.length
        start, end = end, end + self.model.timed * self.count
        sources[start:end] = self.values[: self.model.timed].reshape(-1, *self._tail)
        return end

    def _target(self, output: int):
        """The rows of an output at the nodes, or None for the cost."""
        nx, _, nq = self.model.sizes
        nodes, place = self.count, self.place
        if output < nx:
            return place.defects.start + output * nodes + np.arange(nodes)
        if output < nx + nq:
            return np.full(nodes, place.integral_rows.start + output - nx)
        if output < self.model.timed:
            return None
        return place.path.start + (output - self.model.timed) * nodes + np.arange(nodes)

    def first_entries(self, gradient: Entries, jacobian: Entries, start: int) -> int:
        nodes, k = self.count, np.arange(self.count)
        for s, (output, variable) in enumerate(zip(self.output, self.variable, strict=True)):
            rows = self._target(output)
            factor = self.factors[output] if output < self.model.timed else np.ones(nodes)
            for columns, part in self.maps[variable]:
                target, row = (gradient, 0) if rows is None else (jacobian, rows)
                target.add(row, columns, start + s * nodes + k, factor * part)
        start += len(self.output) * nodes
        for output in range(self.model.timed):
            rows = self._target(output)
            for columns, part in self.length_map:
                target, row = (gradient, 0) if rows is None else (jacobian, rows)
                target.add(row, columns, start + output * nodes + k, self.factors[output] * part)
        return start + self.model.timed * nodes

    def constant_entries(self, jacobian: Entries, one: int) -> None:
        nx, _, nq = self.model.sizes
        place, nodes = self.place, self.count
        for i in range(nx):
            jacobian.add(
                place.defects.start + i * nodes + self.rows,
                place.states.start + i * (nodes + 1) + self.columns,
                one,
                self.matrix_values,
            )
        for q in range(nq):
            jacobian.add(place.integral_rows.start + q, place.integrals.start + q, one, 1.0)

    def second_entries(self, hessian: Entries, start: int) -> int:
        nodes, k = self.count, np.arange(self.count)
        for s, (i, j) in enumerate(self.model.program.hessian_keys):
            self._pair(hessian, self.maps[i], self.maps[j], i == j, start + s * nodes + k)
        start += len(self.model.program.hessian_keys) * nodes
        if self.length_map:
            for s, variable in enumerate(self.coupled):
                self._pair(hessian, self.length_map, self.maps[variable], False, start + s * nodes + k)
            start += len(self.coupled) * nodes
        return start

    @staticmethod
    def _pair(hessian: Entries, one: Map, other: Map, same: bool, source: np.ndarray) -> None:
        """Second derivatives by two local variables, which are linear in the columns they map to."""
        for a, (left, factor) in enumerate(one):
            for b, (right, part) in enumerate(other):
                if same and b > a:
                    continue
                product = factor * part
                if not same:  # the mixed derivative stands for both triangles
                    product = np.where(left == right, 2 * product, product)
                hessian.add(np.maximum(left, right), np.minimum(left, right), source, product)

    def fill_second(self, sources: np.ndarray, start: int, multipliers: np.ndarray, factor: float) -> int:
        nx, _, nq = self.model.sizes
        timed, nodes, place = self.model.timed, self.count, self.place
        rates = np.empty((timed, nodes, *self._tail))
        rates[:nx] = multipliers[place.defects].reshape(nx, nodes, *self._tail)
        rates[nx : nx + nq] = multipliers[place.integral_rows, None]
        rates[nx + nq :] = factor
        rates *= self.factors
        weights = self._shaped(self.nodes.weights)
        weights[:timed] = self.length * rates
        weights[timed:] = multipliers[place.path].reshape(-1, nodes, *self._tail)
        hessian = self.nodes.hessian()
        end = start + len(hessian) * nodes
        sources[start:end] = hessian.reshape(-1, *self._tail)
        start = end
        if self.length_map and len(self.coupled):
            entries = self._shaped(self.nodes.jacobian())[self._by_variable] * rates[self.output[self._by_variable]]
            coupled = np.add.reduceat(entries, self._first_of, axis=0)
            end = start + len(coupled) * nodes
            sources[start:end] = coupled.reshape(-1, *self._tail)
            start = end
        return start
