"""A look at a problem before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .guessing import start
from .model import Model
from .nlp import NLP
from .problem import Problem


@dataclass
class CheckReport:
    """What `Problem.check` found.

    Attributes:
        variables, constraints, jacobian_nonzeros, hessian_nonzeros: sizes of the program on the mesh of the check.
        gradient_error, jacobian_error, hessian_error: largest differences to central differences, relative to 1 + the
            entry.
        operations: scalar operators for a node of values, Jacobian and Hessian, by phase.
        warnings: what may go wrong, in words.
    """

    variables: int
    constraints: int
    jacobian_nonzeros: int
    hessian_nonzeros: int
    gradient_error: float
    jacobian_error: float
    hessian_error: float
    operations: dict[str, tuple[int, int, int]]
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether derivatives agree with differences and nothing is to be warned of."""
        return not self.warnings

    def __str__(self) -> str:
        lines = [
            f"{self.variables} variables, {self.constraints} constraints, {self.jacobian_nonzeros} nonzeros of the "
            f"Jacobian, "
            f"{self.hessian_nonzeros} of the Hessian",
            f"derivatives against differences: gradient {self.gradient_error:.1e}, Jacobian {self.jacobian_error:.1e}, "
            f"Hessian {self.hessian_error:.1e}",
        ]
        for name, (values, jacobian, hessian) in self.operations.items():
            lines.append(
                f"phase {name!r}: {values}, {jacobian}, {hessian} operations a node (values, Jacobian, Hessian)"
            )
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def check(problem: Problem, guess: Any = None, mesh: Any = (5, 3)) -> CheckReport:
    """Compare derivatives with central differences near the guess, and look for what makes solvers fail."""
    from .solving import meshes_of

    model = Model(problem)
    nlp = NLP(model, meshes_of(problem, mesh))
    y = start(nlp, guess).y
    rng = np.random.default_rng(0)
    warnings: list[str] = []
    # Off the guess, where symmetries hide errors, and within bounds.
    inside = np.clip(y + 1e-3 * (1 + np.abs(y)) * rng.standard_normal(nlp.n), nlp.lower, nlp.upper)
    inside = inside if np.isfinite(nlp.constraints(inside)).all() else y
    multipliers = rng.standard_normal(nlp.m)

    def lagrangian(z: np.ndarray) -> np.ndarray:
        return nlp.gradient(z) + nlp.jacobian_matrix(z).T @ multipliers

    # Directions instead of all columns: an entry that is missing or wrong shows in each of them.
    worst = np.zeros(3)
    jacobian, hessian = nlp.jacobian_matrix(inside), nlp.hessian_matrix(inside, multipliers)
    gradient = nlp.gradient(inside)
    for _ in range(8):
        v = rng.choice([-1.0, 1.0], nlp.n)
        v = v * (1 + np.abs(inside))
        for n, (exact, function) in enumerate(
            ((gradient @ v, nlp.objective), (jacobian @ v, nlp.constraints), (hessian @ v, lagrangian))
        ):
            best = np.inf
            for h in (1e-4, 1e-5, 1e-6):
                with np.errstate(all="ignore"):
                    difference = (np.asarray(function(inside + h * v)) - function(inside - h * v)) / (2 * h)
                off = np.max(np.abs(difference - exact) / (1 + np.max(np.abs(exact), initial=0.0)), initial=0.0)
                best = min(best, float(off) if np.isfinite(off) else np.inf)
            worst[n] = max(worst[n], best)
    for name, error in zip(("gradient", "Jacobian", "Hessian"), worst, strict=True):
        if error > 1e-5:
            warnings.append(
                f"the {name} differs from differences by {error:.1e}: a function has a kink or a jump near the "
                f"guess, or is "
                "not finite beside it"
            )
    warnings += _degenerate(nlp) + _scales(nlp, y)
    return CheckReport(
        nlp.n,
        nlp.m,
        len(nlp.jacobian_structure[0]),
        len(nlp.hessian_structure[0]),
        float(worst[0]),
        float(worst[1]),
        float(worst[2]),
        {
            name: tuple(m.program.operations(f) for f in ("values", "jacobian", "hessian"))  # type: ignore[misc]
            for name, m in model.phases.items()
        },
        warnings,
    )


def _degenerate(nlp: NLP) -> list[str]:
    """Too many equations, and rows or columns that nothing enters."""
    found = []
    free = nlp.lower < nlp.upper
    equations = int((nlp.constraint_lower == nlp.constraint_upper).sum())
    if equations > free.sum():
        found.append(f"{equations} equations for {int(free.sum())} free variables: too much is fixed at the ends")
    rows, columns = nlp.jacobian_structure
    constrained = np.bincount(columns, minlength=nlp.n) > 0
    in_cost = np.zeros(nlp.n, bool)
    in_cost[nlp._gradient_columns] = True
    for column in np.flatnonzero(free & ~constrained & ~in_cost)[:3]:
        found.append(f"{nlp.variable_name(int(column))} enters neither a constraint nor the cost")
    usable = np.bincount(rows[free[columns]], minlength=nlp.m) > 0
    for row in np.flatnonzero(~usable)[:3]:
        found.append(f"{nlp.constraint_name(int(row))} has no free variable: all that enter it are fixed")
    return found


def _scales(nlp: NLP, y: np.ndarray) -> list[str]:
    """Sizes of states that differ by more than scaling by the guess will even out."""
    found = []
    for name, model in nlp.model.phases.items():
        place, ph = nlp.places[name], model.phase
        x = np.abs(y[place.states].reshape(ph.states.size, -1)).max(1)
        bounded = (np.abs(ph.states.lower) < 1e20) & (np.abs(ph.states.upper) < 1e20)
        for i in np.flatnonzero(~bounded & (x == 0))[:5]:
            found.append(
                f"state {ph.states.entry(int(i))} of phase {name!r} is zero in the guess and has no bounds: its "
                f"scale is unknown; "
                "give bounds, a guess, or scaling="
            )
    return found
