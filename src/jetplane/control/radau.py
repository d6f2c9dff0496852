"""Legendre-Gauss-Radau points with quadrature, differentiation and interpolation, and meshes of intervals.

Points lie in [-1, 1): the left end is one, the right end is none. States are polynomials through the points and the
right end, controls through the points. Garg, Patterson, Hager, Rao, Benson, Huntington, *A unified framework for the
numerical solution of optimal control problems using pseudospectral methods*, Automatica 46 (2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral

import numpy as np
from numpy.polynomial import legendre

from ..errors import ArgumentError


@cache
def radau(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (n,), weights (n,), and the differentiation matrix (n, n + 1) on points and right end.

    >>> points, weights, differentiation = radau(3)
    >>> round(float(weights @ points**4), 12)  # exact to degree 2 n - 2
    0.4
    """
    # Zeros of P_n + P_(n-1), by Newton's method from the companion matrix's.
    c = np.zeros(n + 1)
    c[n - 1 :] = 1
    points = np.sort(np.real(legendre.legroots(c)))
    points[0] = -1
    for _ in range(3):
        points[1:] -= legendre.legval(points[1:], c) / legendre.legval(points[1:], legendre.legder(c))
    p = legendre.legval(points, np.eye(n)[n - 1])
    weights = (1 - points) / (n * p) ** 2
    nodes = np.append(points, 1.0)
    return points, weights, differentiation(nodes)[:n]


def barycentric(nodes: np.ndarray) -> np.ndarray:
    """Barycentric weights of nodes."""
    differences = nodes[:, None] - nodes
    np.fill_diagonal(differences, 1.0)
    return 1 / differences.prod(1)


def differentiation(nodes: np.ndarray) -> np.ndarray:
    """The matrix that maps values at nodes to the derivatives of their polynomial at the nodes."""
    b = barycentric(nodes)
    differences = nodes[:, None] - nodes
    np.fill_diagonal(differences, 1.0)
    matrix = b / b[:, None] / differences
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, -matrix.sum(1))
    return matrix


def interpolation(nodes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The matrix (len(at), len(nodes)) that maps values at nodes to those of their polynomial at other places."""
    differences = at[:, None] - nodes
    exact = differences == 0
    differences[exact] = 1.0
    terms = barycentric(nodes) / differences
    matrix = terms / terms.sum(1, keepdims=True)
    hit = exact.any(1)
    matrix[hit] = exact[hit]
    return matrix


@dataclass(frozen=True)
class Mesh:
    """Intervals of a phase and the number of points in each.

    Args:
        fractions: lengths of the intervals as parts of the phase; they sum to 1.
        degrees: points in each interval.

    Example:
        >>> Mesh.uniform(4, 3).nodes
        12

    Raises:
        ArgumentError: no intervals, lengths that are not positive, fewer than two points.
    """

    fractions: tuple[float, ...]
    degrees: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.degrees or len(self.degrees) != len(self.fractions):
            raise ArgumentError(
                f"a mesh needs as many degrees as intervals, at least one; got {len(self.degrees)} and "
                f"{len(self.fractions)}"
            )
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-9:
            raise ArgumentError("the lengths of the intervals must be positive and sum to 1")
        if min(self.degrees) < 2:
            raise ArgumentError(f"an interval needs at least 2 points, got {min(self.degrees)}")

    @classmethod
    def uniform(cls, intervals: int, degree: int) -> Mesh:
        """Equal intervals with `degree` points each."""
        if intervals < 1:
            raise ArgumentError(f"a mesh needs at least one interval, got {intervals}")
        return cls((1.0 / intervals,) * intervals, (degree,) * intervals)

    @property
    def nodes(self) -> int:
        """Collocation points of all intervals."""
        return sum(self.degrees)

    @property
    def starts(self) -> np.ndarray:
        """The first node of each interval, and the number of nodes."""
        return np.concatenate([[0], np.cumsum(self.degrees)])

    @property
    def edges(self) -> np.ndarray:
        """Ends of intervals in [0, 1]."""
        edges = np.concatenate([[0.0], np.cumsum(self.fractions)])
        edges[-1] = 1.0
        return edges

    @property
    def times(self) -> np.ndarray:
        """Nodes and the right end, in [0, 1]."""
        parts = [a + (radau(n)[0] + 1) / 2 * (b - a) for n, a, b in self._intervals()]
        return np.concatenate([*parts, [1.0]])

    @property
    def half_lengths(self) -> np.ndarray:
        """Half the length of the interval of each node."""
        return np.repeat(np.diff(self.edges) / 2, self.degrees)

    @property
    def weights(self) -> np.ndarray:
        """Quadrature weights of the nodes; they sum to 1."""
        return np.concatenate([radau(n)[1] for n in self.degrees]) * self.half_lengths

    def differentiation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns and values of the differentiation matrix (nodes, nodes + 1), in local time of each interval."""
        rows, columns, values = [], [], []
        for start, n in zip(self.starts, self.degrees, strict=False):
            matrix = radau(n)[2]
            row, column = np.indices(matrix.shape)
            rows.append(start + row.ravel())
            columns.append(start + column.ravel())
            values.append(matrix.ravel())
        return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)

    def _intervals(self) -> list[tuple[int, float, float]]:
        edges = self.edges
        return [(n, float(edges[e]), float(edges[e + 1])) for e, n in enumerate(self.degrees)]

    def evaluate(self, values: np.ndarray, times: np.ndarray) -> np.ndarray:
        """A trajectory at times in [0, 1]: values (nodes + 1, n) are states, (nodes, n) controls."""
        times = np.clip(np.asarray(times, float), 0.0, 1.0)
        edges, starts = self.edges, self.starts
        which = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(self.degrees) - 1)
        extra = len(values) - self.nodes
        result = np.empty((len(times), values.shape[1]))
        for e in np.unique(which):
            inside = which == e
            n = self.degrees[e]
            local = 2 * (times[inside] - edges[e]) / (edges[e + 1] - edges[e]) - 1
            nodes = np.append(radau(n)[0], 1.0)[: n + extra]
            result[inside] = interpolation(nodes, local) @ values[starts[e] : starts[e] + n + extra]
        return result


def as_mesh(value: object) -> Mesh:
    """A mesh, or (intervals, degree)."""
    if isinstance(value, Mesh):
        return value
    if isinstance(value, (Sequence, np.ndarray)) and len(value) == 2 and all(isinstance(v, Integral) for v in value):
        return Mesh.uniform(*map(int, value))
    raise ArgumentError(f"a mesh must be a jp.control.Mesh, (intervals, degree) or 'refine'; got {value!r}")
