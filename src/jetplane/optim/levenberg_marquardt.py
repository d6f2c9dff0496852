"""Nonlinear least squares for few parameters behind long computations, forward only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_unflatten
from ..errors import (
    ArgumentError,
    DerivativeError,
    DeviceError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    UnusedParametersError,
)
from ..jets import Jet
from ..rules.grad_mode import evaluating
from ..subspace.linear_model import LinearModel, Region, RowFactor
from ..subspace.robust import Rho, RobustLoss
from ..transforms.arguments import Call, call_of
from ..transforms.costs import in_turn, runs_of
from ..transforms.forward import blockwise

Status = Literal["gtol", "ftol", "xtol", "stalled", "limit"]
Bounds = tuple[Any, Any]

MESSAGES: dict[Status, str] = {
    "gtol": "the residuals are orthogonal to their derivatives, within gtol",
    "ftol": "no step within the bounds would lower the cost by more than ftol of it",
    "xtol": "the step to the minimum is below xtol",
    "stalled": (
        "no step lowers the cost, however short: rounding (tolerances are too small for it), noise, a kink, or a wrong "
        "derivative"
    ),
    "limit": "max_nfev evaluations were not enough",
}
_OUTER = (
    "of least_squares depends on the parameters of an evaluation around it, whose derivatives do not pass through the "
    "fit: call it under torch.no_grad() if none are wanted"
)
_ROWS = 256  # residuals that are collected before they are summed
_FIRST_RADIUS = 100.0  # the first step's most, in parts of the scaled parameters' length


@dataclass(frozen=True)
class LeastSquaresResult:
    """The result of `least_squares`.

    Attributes:
        params: the parameters found, in the structure in which they were given.
        cost: half the sum of squares, or of the robust loss.
        fun: the residuals at ``params``, as the function returned them; None if it yields them.
        gradient: gradient of the cost, in the structure of the parameters.
        covariance: covariance of the parameters, flattened one after the other, (n, n) in float64. See
            `least_squares`.
        standard_errors: the roots of the diagonal of the covariance, in the structure of the parameters.
        active_mask: -1 where a parameter is at its lower bound and the cost falls beyond it, 1 likewise at the upper
            bound, otherwise 0; in the structure of the parameters.
        residuals: m, the number of residuals.
        nfev: number of evaluations of the residuals, each with all derivatives.
        iterations: number of steps taken.
        history: the cost of each evaluation; infinite where residuals were not finite.
        status: why the search ended: "gtol", "ftol" and "xtol" mean convergence, "stalled" and "limit" do not.
    """

    params: Any
    cost: float
    fun: Any
    gradient: Any
    covariance: Tensor
    standard_errors: Any
    active_mask: Any
    residuals: int
    nfev: int
    iterations: int
    history: tuple[float, ...]
    status: Status

    @property
    def success(self) -> bool:
        """Whether the search converged."""
        return self.status in ("gtol", "ftol", "xtol")

    @property
    def message(self) -> str:
        """The status in words."""
        return MESSAGES[self.status]


def least_squares(
    residuals: Callable[[Any], Any], params: Any, *, bounds: Bounds | None = None, loss: str | Rho = "linear",
    f_scale: float = 1.0, x_scale: Any = "jac", ftol: float | None = None, xtol: float | None = None,
    gtol: float | None = None, max_nfev: int | None = None, absolute_sigma: bool = False, chunk: int | None = None,
) -> LeastSquaresResult:  # fmt: skip
    """Minimize ``sum_i rho(r_i(theta)^2) / 2`` by the Levenberg-Marquardt method, one forward pass per evaluation.

    The pass carries the derivatives along all n coordinates: 1 + n numbers for each number that the function computes,
    and no tape. Only a triangular factor of (n + 1)^2 numbers is kept of residuals and Jacobian. A function that
    *yields* its residuals in blocks as it computes them therefore needs the same memory for ten steps of a simulation
    as for 1e5.

    Each step minimizes the linearized problem exactly within the bounds and a trust region. The shape of the region
    follows from the largest norm so far of each column of the Jacobian, so units of parameters and residuals do not
    matter.

    Args:
        residuals: a function of the parameters that returns a tensor of residuals, or a tree of tensors, or a generator
            that yields them. It must compute the same residuals each time.
        params: the starting point: a tensor, or a list, tuple or dict of tensors. They are not written to.
        bounds: ``(lower, upper)``, each a number for all, or of the structure of the parameters with numbers or tensors
            for leaves, of a single tensor also a list; None for no bounds, as are infinite ones.
        loss: "linear" (squares), "soft_l1", "huber", "cauchy", "arctan", or a function of ``z = (r / f_scale)^2`` that
            returns rho(z), rho'(z) and rho''(z) as one tensor (3, *z.shape).
        f_scale: C: residuals below it count as inliers. The cost is ``sum_i C^2 rho((r_i / C)^2) / 2``.
        x_scale: "jac" as above, or a number, or numbers or tensors in the structure of the parameters: the change of a
            parameter that counts as one.
        ftol: stop if the step to the minimum of the linearized problem would lower the cost by at most this fraction.
        xtol: stop if that step is shorter than this fraction of the parameters (in scaled length).
        gtol: stop if the cosine between the residuals and each column of the Jacobian is at most this.
            All three are 1e-8 by default, 1e-5 if a parameter is of single precision or less.
        max_nfev: the largest number of evaluations; 100 n by default.
        absolute_sigma: whether residuals were divided by known standard deviations, as in `scipy.optimize.curve_fit`.
        chunk: coordinates to carry at a time: n / chunk passes an evaluation, and the whole Jacobian is kept.

    Returns:
        A `LeastSquaresResult`. Its covariance is ``s^2 (J^T J)^-1`` with ``s^2 = 2 cost / (m - n)``, or s = 1 with
        ``absolute_sigma``; for robust losses that of M-estimates, ``A^-1 B A^-1 m / (m - n)`` with A the second
        derivative of the cost for linear residuals, and B the sum of squares of its gradient's parts. Parameters that
        the residuals do not determine have an infinite variance; so do all parameters if m <= n and s is not known.
        For parameters at an active bound it is NaN; the covariance of the others treats these as known.

    Raises:
        ArgumentError: no parameters, bounds that cross or that the start is outside of, an unknown word, numbers
            outside of their domain.
        ShapeError: bounds or scales of another structure or shape than the parameters, or a number of residuals that
            changes.
        DTypeError: parameters or residuals that are not real floating-point tensors.
        DeviceError: parameters on several devices.
        NonFiniteError: residuals or derivatives that are not finite at the start. Later, the step is shortened instead.
        UnusedParametersError: the residuals depend on none of the parameters.
        DerivativeError: the function leaves torch, or an operator cannot be carried; inside another evaluation, the
            start or the residuals depend on its parameters. Derivatives do not pass through the fit.

    >>> import torch, jetplane as jp
    >>> t = torch.linspace(0, 4, 50, dtype=torch.float64)  # of a decay
    >>> y = 2 * torch.exp(-0.5 * t) + 0.01 * torch.sin(40 * t)
    >>> start = {"a": torch.tensor(1.0).double(), "rate": torch.tensor(1.0).double()}
    >>> fit = jp.optim.least_squares(lambda p: p["a"] * torch.exp(-p["rate"] * t) - y, start)
    >>> fit.success, round(fit.params["rate"].item(), 2), fit.nfev < 12, fit.standard_errors["rate"].item() < 0.01
    (True, 0.5, True, True)

    >>> def simulated(p):  # y' = -rate y, step by step
    ...     u, dt = p["a"], 4 / 49
    ...     for target in y:
    ...         yield u - target
    ...         u = u * (1 - dt * p["rate"] / 2) / (1 + dt * p["rate"] / 2)
    >>> round(jp.optim.least_squares(simulated, start).params["rate"].item(), 2)
    0.5

    Source: Moré, Lecture Notes in Mathematics 630 (1978), with the trust region of MINPACK's lmder; the test of ftol is
    the squared relative offset of Bates and Watts, Technometrics 23 (1981); robust losses as in SciPy, their covariance
    by Huber, Robust Statistics (1981), section 7.6.
    """
    problem = _Problem.of(residuals, params, RobustLoss.named(loss, f_scale), chunk)
    lower, upper = problem.bounds(bounds)
    scale = None if isinstance(x_scale, str) and x_scale == "jac" else problem.numbers(x_scale, "x_scale").reciprocal()
    if scale is not None and not bool(((scale > 0) & scale.isfinite()).all()):
        raise ArgumentError(f"x_scale must be 'jac' or positive numbers, got {x_scale!r}")
    double = all(leaf.dtype == torch.float64 for leaf in problem.call.leaves)
    tolerances = [_tolerance(name, t, double) for name, t in (("ftol", ftol), ("xtol", xtol), ("gtol", gtol))]
    limit = _count("max_nfev", 100 * problem.n if max_nfev is None else max_nfev)
    if problem.call.nested:
        raise DerivativeError(f"the start {_OUTER}, or detach() the start")
    # Inside another evaluation derivatives go on, so that residuals which depend on its parameters are seen.
    with contextlib.nullcontext() if evaluating() else torch.no_grad():
        return _minimized(problem, lower, upper, scale, tolerances, limit, absolute_sigma)


def _tolerance(name: str, value: float | None, double: bool) -> float:
    if value is None:
        return 1e-8 if double else 1e-5
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ArgumentError(f"{name} must be a number of at least 0, got {value!r}")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


# --- the problem ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """The problem at one place.

    Attributes:
        x: the place, (n,) in float64.
        model: the linearized problem; None where something is not finite.
        cost: half the sum of squares.
        count: m, the number of residuals.
        fun: the residuals, if they are returned.
        bread: A, and
        meat: B of a robust loss, (n, n); else None.
    """

    x: Tensor
    model: LinearModel | None
    cost: float
    count: int
    fun: Any
    bread: Tensor | None = None
    meat: Tensor | None = None


@dataclass(frozen=True)
class _Problem:
    """Residuals as a function of n numbers.

    Attributes:
        call: the user's function, at the parameters that it was started with.
        robust: the loss; None for squares.
        chunk: coordinates of one pass.
    """

    call: Call
    robust: RobustLoss | None
    chunk: int

    @staticmethod
    def of(residuals: Callable[[Any], Any], params: Any, robust: RobustLoss | None, chunk: int | None) -> _Problem:
        """With parameters as they were given."""
        call = call_of("least_squares", residuals, (params,), 0)
        devices = {leaf.device for leaf in call.leaves}
        if len(devices) > 1:
            raise DeviceError(f"parameters must lie on one device, got {sorted(map(str, devices))}")
        return _Problem(call, robust, call.size if chunk is None else min(_count("chunk", chunk), call.size))

    @property
    def n(self) -> int:
        """How many numbers the parameters are."""
        return self.call.size

    @property
    def start(self) -> Tensor:
        """The parameters as one vector, (n,) in float64, as all vectors here are."""
        return torch.cat([leaf.detach().flatten().double().cpu() for leaf in self.call.leaves])

    def leaves(self, x: Tensor, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], Tensor]:
        """The parameters at x in their own dtype, and the vector that these are: rounded, and within the bounds."""
        found = []
        for leaf, part, low, high in zip(*([self.call.leaves, *map(self.split, (x, lower, upper))]), strict=True):
            rounded = part.to(leaf.dtype)
            rounded = torch.where(rounded.double() > high, rounded.nextafter(rounded.new_full((), -torch.inf)), rounded)
            rounded = torch.where(rounded.double() < low, rounded.nextafter(rounded.new_full((), torch.inf)), rounded)
            found.append(rounded.to(leaf.device))
        return found, torch.cat([leaf.flatten().double().cpu() for leaf in found])

    def split(self, x: Tensor) -> list[Tensor]:
        """A vector in the shapes of the parameters."""
        return self.call.split(x, 0)

    def tree(self, x: Tensor, like_parameters: bool = True) -> Any:
        """A vector in the structure of the parameters, and in their dtypes."""
        pairs = zip(self.split(x), self.call.leaves, strict=True)
        return self.call.tree([part.to(leaf.device, leaf.dtype if like_parameters else None) for part, leaf in pairs])

    def numbers(self, given: Any, what: str) -> Tensor:
        """A vector of numbers: one for all, or one for each in the structure of the parameters."""
        if isinstance(given, (int, float)):
            leaves = [given] * len(self.call.leaves)
        elif isinstance(self.call.arguments[0], Tensor) and isinstance(given, (list, tuple)):
            leaves = [torch.as_tensor(given, dtype=torch.float64)]
        else:
            leaves = self.call.flat(given, what)
        found = []
        for i, (number, shape) in enumerate(zip(leaves, self.call.shapes, strict=True)):
            tensor = torch.as_tensor(number, dtype=torch.float64).detach().cpu()
            if tensor.shape != shape and tensor.dim():
                raise ShapeError(f"{what} of parameter {i}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
            found.append(tensor.expand(shape).flatten())
        return torch.cat(found)

    def bounds(self, given: Bounds | None) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds as vectors, checked."""
        if given is None:
            given = (-math.inf, math.inf)
        if not (isinstance(given, (tuple, list)) and len(given) == 2):
            raise ArgumentError(f"bounds must be (lower, upper), got {type(given).__name__}")
        lower, upper = (self.numbers(g, name) for g, name in zip(given, ("lower bounds", "upper bounds"), strict=True))
        if not bool((lower <= upper).all()):
            raise ArgumentError("bounds: expected lower bounds of at most the upper bounds")
        outside = (self.start < lower) | (self.start > upper)
        if bool(outside.any()):
            raise ArgumentError(
                f"the start lies outside the bounds in {int(outside.sum())} of {self.n} entries, at flat indices "
                f"{outside.nonzero().flatten().tolist()[:5]}"
            )
        return lower, upper

    def evaluated(self, x: Tensor, leaves: Sequence[Tensor]) -> _Evaluation:
        """Residuals with their derivatives, by one pass for each chunk of coordinates."""
        sums = _Sums(self.n, self.robust, leaves[0].device)
        returned: dict[str, Any] = {}

        def blocks(p: Any) -> Iterator[Any]:
            result = self.call.f(p)
            if isinstance(result, Iterator):
                yield from result
            else:
                returned["spec"] = tree_flatten(result)[1]
                yield result

        def take(ys: list[Tensor], firsts: list[Tensor]) -> None:
            if returned:
                returned["leaves"] = ys
            for y, first in zip(ys, firsts, strict=True):
                if y.is_complex():
                    raise DTypeError("residuals: expected real numbers; return torch.view_as_real of complex ones")
                if isinstance(y, Jet) or isinstance(first, Jet):
                    raise DerivativeError(f"a residual {_OUTER}")
                if len(first) == self.n:
                    sums.add(y, first)
                else:
                    columns[-1].append((y, first))

        columns: list[list[tuple[Tensor, Tensor]]] = []
        here = replace(self.call, f=blocks, leaves=tuple(leaves))

        def once(run: slice) -> None:
            columns.append([])
            blockwise(here, here.axes(run), run.stop - run.start, take)

        for _ in in_turn(runs_of(self.n, self.chunk), once):
            pass
        if self.chunk < self.n:
            if len({tuple(y.shape for y, _ in column) for column in columns}) > 1:
                raise ShapeError(
                    "chunk= runs the function more than once, and a later run gave residuals of other shapes"
                )
            for parts in zip(*columns, strict=True):
                sums.add(parts[-1][0], torch.cat([first for _, first in parts]))
        fun = tree_unflatten(returned["leaves"], returned["spec"]) if returned else None
        return sums.evaluation(x, fun)


class _Sums:
    """What is kept of residuals and Jacobian: sums over residuals, and the triangular factor of their rows."""

    def __init__(self, n: int, robust: RobustLoss | None, device: torch.device) -> None:
        self.factor, self.robust = RowFactor(n + 1), robust
        self.cost = torch.zeros((), dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.bread, self.meat = torch.zeros(2, n, n, dtype=torch.float64, device=device)
        self.held: list[tuple[Tensor, Tensor]] = []
        self.count, self.due = 0, _ROWS

    def add(self, y: Tensor, first: Tensor) -> None:
        """Add residuals, of any shape S, and their derivatives, (n, *S)."""
        self.held.append((y.reshape(-1), first.reshape(len(first), -1)))
        self.count += y.numel()
        if self.count >= self.due:
            self._summed()

    def _summed(self) -> None:
        if not self.held:
            return
        r, j = (
            torch.cat([y for y, _ in self.held]).double(),
            torch.cat([first for _, first in self.held], 1).double().mT,
        )
        self.held, self.due = [], self.count + _ROWS
        if self.robust is None:
            self.cost += r @ r / 2
        else:
            rho = self.robust(r)
            self.cost += rho[0].sum() / 2
            self.bread += j.mT @ ((rho[1] + 2 * rho[2] * r.square()).unsqueeze(1) * j)
            self.meat += j.mT @ ((rho[1] * r).square().unsqueeze(1) * j)
            r, j = self.robust.scaled(rho, r, j)
        rows = torch.cat([j, r.unsqueeze(1)], 1)
        self.finite &= rows.isfinite().all()
        self.factor.add(rows.nan_to_num())

    def evaluation(self, x: Tensor, fun: Any) -> _Evaluation:
        """The problem at x.

        Raises:
            ArgumentError: there is no residual.
        """
        if not self.count:
            raise ArgumentError("residuals: expected at least one number, got none")
        self._summed()
        cost = self.cost.item()
        if not (bool(self.finite) and math.isfinite(cost)):
            return _Evaluation(x, None, math.inf, self.count, fun)
        model = LinearModel.of(self.factor.matrix().cpu(), cost)
        if self.robust is None:
            return _Evaluation(x, model, cost, self.count, fun)
        return _Evaluation(x, model, cost, self.count, fun, self.bread.cpu(), self.meat.cpu())


# --- the method -------------------------------------------------------------------------------------------------------


def _minimized(
    problem: _Problem, lower: Tensor, upper: Tensor, fixed_scale: Tensor | None, tolerances: Sequence[float],
    limit: int, absolute_sigma: bool,
) -> LeastSquaresResult:  # fmt: skip
    leaves, x = problem.leaves(problem.start, lower, upper)
    here = problem.evaluated(x, leaves)
    if here.model is None:
        raise NonFiniteError("the residuals or their derivatives are not finite at the start: NaN or inf inside")
    if not bool(here.model.norms.any()):
        raise UnusedParametersError(
            "the residuals do not change with any of the parameters at the start: the function does not use its "
            "argument, every path is cut (detach(), item(), a comparison), or all derivatives are zero there"
        )
    history, iterations, status = [here.cost], 0, None
    scale = torch.zeros_like(x) if fixed_scale is None else fixed_scale
    radius, region = math.inf, None
    while True:
        assert here.model is not None
        if region is None:  # at a new place
            scale = torch.maximum(scale, here.model.norms) if fixed_scale is None else scale
            used = torch.where(scale > 0, scale, 1)
            region = Region(here.model, used, lower - here.x, upper - here.x)
            reason = _converged(here, region.step(None)[0], used, _held(here, lower, upper), *tolerances)
            status = status or reason
            length = (used * here.x).norm().item() or 1.0
        if status is None and len(history) >= limit:
            status = "limit"
        if status is not None:
            return _result(problem, here, _held(here, lower, upper), absolute_sigma, tuple(history), iterations, status)
        p, damping = region.step(min(radius, _FIRST_RADIUS * length) if math.isinf(radius) else radius)
        size = (used * p).norm().item()
        radius = min(radius, size) if len(history) == 1 else radius
        goal = torch.where(p <= region.lower, lower, torch.where(p >= region.upper, upper, here.x + p))
        leaves, x = problem.leaves(goal, lower, upper)
        there = problem.evaluated(x, leaves)
        if there.count != here.count:
            raise ShapeError(
                f"residuals: expected as many in each evaluation, got {here.count} at first and {there.count} now"
            )
        history.append(there.cost)
        promised, decrease = here.model.decrease(p), here.cost - there.cost
        if 0.25 * promised < decrease <= tolerances[0] * here.cost:
            status = "ftol"
        radius, accepted = _judged(here, there, p, size, radius, damping)
        if accepted:
            here, iterations, region = there, iterations + 1, None
        elif radius <= max(tolerances[1], torch.finfo(x.dtype).eps) * length or torch.equal(x, here.x):
            status = "stalled"


def _held(here: _Evaluation, lower: Tensor, upper: Tensor) -> Tensor:
    """-1 where the cost falls beyond a lower bound that has been reached, 1 beyond an upper one, else 0."""
    assert here.model is not None
    gradient = here.model.gradient
    below, above = (here.x <= lower) & (gradient > 0), (here.x >= upper) & (gradient < 0)
    return above.int() - below.int()


def _converged(
    here: _Evaluation, full: Tensor, scale: Tensor, held: Tensor, ftol: float, xtol: float, gtol: float
) -> Status | None:
    """Why it ends here, by the step to the minimum of the linearized problem."""
    model = here.model
    assert model is not None
    lengths = (model.norms * math.sqrt(2 * here.cost))[held == 0]
    if bool((model.gradient[held == 0].abs() <= gtol * lengths).all()):
        return "gtol"
    if model.decrease(full) <= ftol * here.cost:
        return "ftol"
    return "xtol" if (scale * full).norm() <= xtol * (scale * here.x).norm() else None


def _judged(
    here: _Evaluation, there: _Evaluation, p: Tensor, size: float, radius: float, damping: float
) -> tuple[float, bool]:
    """The next radius, and whether a step is taken: by the ratio of the decrease to that of the linearized problem.

    Args:
        here: before the step.
        there: after it.
        p: the step.
        size: its scaled length.
        radius: so far.
        damping: of the step.
    """
    assert here.model is not None
    decrease, slope = here.cost - there.cost, (here.model.gradient @ p).item()
    promised = here.model.decrease(p)
    ratio = decrease / promised if promised > 0 else -1.0
    if not ratio > 0.25:
        # A cost that rises is a parabola through both costs and the slope: go to its minimum.
        part = 0.5 if decrease >= 0 else 0.5 * slope / (slope + decrease) if math.isfinite(decrease) else 0.1
        part = 0.1 if there.cost >= 100 * here.cost else max(part, 0.1)
        radius = part * min(radius, 10 * size)
    elif ratio >= 0.75 or not damping:
        radius = 2 * size
    return radius, ratio >= 1e-4


# --- the result -------------------------------------------------------------------------------------------------------


def _result(
    problem: _Problem, here: _Evaluation, held: Tensor, absolute_sigma: bool, history: tuple[float, ...],
    iterations: int, status: Status,
) -> LeastSquaresResult:  # fmt: skip
    assert here.model is not None
    coarsest = max(torch.finfo(leaf.dtype).eps for leaf in problem.call.leaves)
    covariance = _covariance(here, held == 0, coarsest, absolute_sigma)
    return LeastSquaresResult(
        params=problem.tree(here.x), cost=here.cost, fun=here.fun, gradient=problem.tree(here.model.gradient),
        covariance=covariance, standard_errors=problem.tree(covariance.diagonal().sqrt()),
        active_mask=problem.call.tree([part.int() for part in problem.split(held)]),
        residuals=here.count, nfev=len(history), iterations=iterations, history=history, status=status,
    )  # fmt: skip


def _covariance(here: _Evaluation, free: Tensor, eps: float, absolute_sigma: bool) -> Tensor:
    """Of all parameters; see `least_squares`."""
    assert here.model is not None
    n, freedom = int(free.sum()), here.count - int(free.sum())
    whole = torch.full((len(free), len(free)), torch.nan, dtype=torch.float64)
    if not n:
        return whole
    r = here.model.r[:, free]
    norms = torch.where((length := r.norm(dim=0)) > 0, length, 1)
    if here.bread is None or here.meat is None:
        _, s, right = torch.linalg.svd(r / norms, full_matrices=False)
        values, basis, least = s.square(), right.mT, (n * eps * s.max()) ** 2
    else:
        values, basis = torch.linalg.eigh(here.bread[free][:, free] / norms / norms.unsqueeze(1))
        least = n * eps * values.max().clamp_min(0)
    known = values > least
    inverse = basis[:, known] / values[known] @ basis[:, known].mT / norms / norms.unsqueeze(1)
    if here.meat is not None:
        covariance = inverse @ here.meat[free][:, free] @ inverse * (here.count / max(freedom, 1))
    else:
        covariance = inverse * (1.0 if absolute_sigma else 2 * here.cost / max(freedom, 1))
    undetermined = basis[:, ~known].square().sum(1) > math.sqrt(eps)
    if freedom < 1 and not (absolute_sigma and here.meat is None):
        undetermined[:] = True
    covariance[undetermined] = torch.nan
    covariance[:, undetermined] = torch.nan
    covariance.diagonal()[undetermined] = torch.inf
    index = free.nonzero().flatten()
    whole[index.unsqueeze(1), index] = covariance
    return whole
