"""SciPy's trust-constr, where no IPOPT is there: for small problems; slower, and its multipliers are estimates."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sparse
from scipy.optimize import Bounds, NonlinearConstraint, minimize

from .ipopt import interrupts
from .nlp import NLP
from .status import Iteration, Outcome, Status


def solve(
    nlp: NLP,
    start: Outcome,
    *,
    options: dict[str, Any],
    on_iteration: Callable[[Iteration], None] | None = None,
) -> Outcome:
    """Solve a program from `start`. Fixed variables are taken out; times and limits are as for IPOPT."""
    free = nlp.lower < nlp.upper
    fixed = np.where(free, 0.0, nlp.lower)
    columns = np.flatnonzero(free)
    clock = {"callbacks": 0.0}

    def full(z: np.ndarray) -> np.ndarray:
        y = fixed.copy()
        y[columns] = z
        return y

    def timed(function):
        def call(*arguments):
            began = time.process_time()
            result = function(*arguments)
            clock["callbacks"] += time.process_time() - began
            return result

        return call

    def hessian(z, v, factor):
        return sparse.csc_array(nlp.hessian_matrix(full(z), v, factor))[columns][:, columns]

    constraint = NonlinearConstraint(
        timed(lambda z: nlp.constraints(full(z))),
        nlp.constraint_lower,
        nlp.constraint_upper,
        jac=timed(lambda z: sparse.csc_array(nlp.jacobian_matrix(full(z)))[:, columns]),  # type: ignore[arg-type]
        hess=timed(lambda z, v: hessian(z, v, 0.0)),
    )
    stop = threading.Event()
    ended: dict[str, Status] = {}
    began = time.monotonic()
    limit = options.get("time_limit")

    def progress(z, state):
        if on_iteration is not None:
            on_iteration(
                Iteration(
                    state.nit,
                    float(state.fun),
                    float(state.constr_violation),
                    float(state.optimality),
                    float(state.barrier_parameter) if hasattr(state, "barrier_parameter") else 0.0,
                )
            )
        if stop.is_set():
            ended["why"] = Status.STOPPED
        elif limit is not None and time.monotonic() - began > limit:
            ended["why"] = Status.TIME_LIMIT
        return "why" in ended

    with interrupts(stop), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps with a zero change of the gradient, in linear problems
        result = minimize(
            timed(lambda z: nlp.objective(full(z))),
            np.clip(start.y, nlp.lower, nlp.upper)[columns],
            method="trust-constr",
            jac=timed(lambda z: nlp.gradient(full(z))[columns]),
            hess=timed(lambda z: hessian(z, np.zeros(nlp.m), 1.0)),
            bounds=Bounds(nlp.lower[columns], nlp.upper[columns]),  # type: ignore[arg-type]
            constraints=[constraint] if nlp.m else [],
            callback=progress,
            options={
                "maxiter": options.get("max_iterations", 3000),
                "gtol": options.get("tol", 1e-8),
                "xtol": 1e-14,
                "barrier_tol": options.get("tol", 1e-8),
            },
        )
    y = full(result.x)
    if "why" in ended:
        status = ended["why"]
    elif result.status == 0:
        status = Status.ITERATION_LIMIT
    elif result.constr_violation > 1e3 * options.get("tol", 1e-8):
        status = Status.INFEASIBLE
    else:
        status = Status.SOLVED if result.status == 1 else Status.ACCEPTABLE
    multipliers = np.array(result.v[0]) if nlp.m else np.zeros(0)
    return Outcome(status, y, float(result.fun), int(result.nit), multipliers, None, None, clock["callbacks"])
