"""IPOPT by its C interface, from any shared library of it: that of CasADi's wheel, a path, the system's.

Wächter, Biegler, *On the implementation of an interior-point filter line-search algorithm for large-scale nonlinear
programming*, Mathematical Programming 106 (2006). Nothing of Python's is compiled: callbacks go through ctypes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, MissingPackageError
from .nlp import NLP
from .status import Iteration, Outcome, Status

NUMBER, INDEX, BOOL, POINTER = ctypes.c_double, ctypes.c_int, ctypes.c_bool, ctypes.POINTER
NUMBERS, INDICES, DATA = POINTER(NUMBER), POINTER(INDEX), ctypes.c_void_p
_OBJECTIVE = ctypes.CFUNCTYPE(BOOL, INDEX, NUMBERS, BOOL, NUMBERS, DATA)
_CONSTRAINTS = ctypes.CFUNCTYPE(BOOL, INDEX, NUMBERS, BOOL, INDEX, NUMBERS, DATA)
_JACOBIAN = ctypes.CFUNCTYPE(BOOL, INDEX, NUMBERS, BOOL, INDEX, INDEX, INDICES, INDICES, NUMBERS, DATA)
_HESSIAN = ctypes.CFUNCTYPE(
    BOOL, INDEX, NUMBERS, BOOL, NUMBER, INDEX, NUMBERS, BOOL, INDEX, INDICES, INDICES, NUMBERS, DATA
)
_PROGRESS = ctypes.CFUNCTYPE(BOOL, INDEX, INDEX, *[NUMBER] * 8, INDEX, DATA)
_NAMES = ("libipopt.so.3", "libipopt.so", "libipopt.3.dylib", "libipopt.dylib", "libipopt-3.dll", "ipopt-3.dll")

# IPOPT's return codes.
STATUSES = {
    0: Status.SOLVED,
    1: Status.ACCEPTABLE,
    2: Status.INFEASIBLE,
    3: Status.STALLED,
    4: Status.DIVERGED,
    5: Status.STOPPED,
    6: Status.SOLVED,  # a feasible point of a problem without freedom
    -1: Status.ITERATION_LIMIT,
    -2: Status.RESTORATION_FAILED,
    -3: Status.STALLED,
    -4: Status.TIME_LIMIT,
    -5: Status.TIME_LIMIT,
    -10: Status.OVERDETERMINED,
    -11: Status.BAD_PROBLEM,
    -12: Status.BAD_OPTION,
    -13: Status.NOT_A_NUMBER,
}


def library_path(path: str | None = None) -> str | None:
    """Where libipopt is: the path given, ``JETPLANE_IPOPT``, CasADi's wheel, the system's; None if nowhere."""
    if path is not None:
        return path
    named = os.environ.get("JETPLANE_IPOPT")
    if named:
        return named
    spec = find_spec("casadi")
    if spec and spec.origin:
        folder = Path(spec.origin).parent
        for name in _NAMES:
            if (folder / name).exists():
                return str(folder / name)
    return ctypes.util.find_library("ipopt")


@cache
def _load(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
        library.CreateIpoptProblem.restype = DATA
    except (OSError, AttributeError) as error:
        raise MissingPackageError(f"{path} is not a library with IPOPT's C interface: {error}") from error
    library.IpoptSolve.restype = INDEX
    for name in ("AddIpoptStrOption", "AddIpoptNumOption", "AddIpoptIntOption", "SetIpoptProblemScaling"):
        getattr(library, name).restype = BOOL
    return library


def library(path: str | None = None) -> ctypes.CDLL:
    """The library.

    Raises:
        MissingPackageError: it is nowhere; the message says how to get it.
    """
    found = library_path(path)
    if found is None:
        raise MissingPackageError(
            "IPOPT was not found. pip install 'jetplane[control]' brings it (in CasADi's wheel); or set "
            "JETPLANE_IPOPT=/path/to/libipopt.so, or install it on the system (apt-get install coinor-libipopt-dev); "
            "solver='trust-constr' needs SciPy alone"
        )
    return _load(found)


@contextmanager
def interrupts(flag: threading.Event):
    """Ctrl-C sets a flag instead of raising somewhere inside of a library; a second one raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass
class Scaling:
    """Factors by which variables, constraints and the objective are multiplied inside of the solver."""

    variables: np.ndarray
    constraints: np.ndarray
    objective: float


def solve(
    nlp: NLP,
    start: Outcome,
    *,
    options: dict[str, Any],
    scaling: Scaling | None = None,
    warm: bool = False,
    on_iteration: Callable[[Iteration], None] | None = None,
    path: str | None = None,
) -> Outcome:
    """Solve a program from `start` (its y; with `warm` its multipliers too).

    Ctrl-C ends it with the best iterate so far.
    """
    ipopt = library(path)
    failure: list[BaseException] = []
    stop = threading.Event()
    best: dict[str, Any] = {"error": np.inf, "y": start.y.copy()}
    latest = [start.y.copy()]
    clock = {"callbacks": 0.0}
    iterations = [0]

    kinds = {n: NUMBER * n for n in (nlp.n, nlp.m, len(nlp.jacobian_structure[0]), len(nlp.hessian_structure[0]))}

    def array(pointer, n):  # numpy's as_array makes a type for each call, which takes ten times as long
        if not n:
            return np.zeros(0)
        memory: Any = kinds[n].from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memory)

    def write_structure(rows, columns, count, structure):
        for pointer, values in zip((rows, columns), structure, strict=True):
            np.ctypeslib.as_array(pointer, shape=(count,))[:] = values

    def guarded(function):
        def call(*arguments):
            if failure:
                return False
            began = time.process_time()
            try:
                return function(*arguments)
            except BaseException as error:  # raised again when the library has returned
                failure.append(error)
                return False
            finally:
                clock["callbacks"] += time.process_time() - began

        return call

    @_OBJECTIVE
    @guarded
    def objective(n, x, new, out, data):
        out[0] = nlp.objective(array(x, n))
        return np.isfinite(out[0])

    @_OBJECTIVE
    @guarded
    def gradient(n, x, new, out, data):
        latest[0] = array(x, n).copy()
        array(out, n)[:] = nlp.gradient(latest[0])
        return True

    @_CONSTRAINTS
    @guarded
    def constraints(n, x, new, m, out, data):
        array(out, m)[:] = nlp.constraints(array(x, n))
        return True

    @_JACOBIAN
    @guarded
    def jacobian(n, x, new, m, count, rows, columns, out, data):
        if rows:
            write_structure(rows, columns, count, nlp.jacobian_structure)
        else:
            array(out, count)[:] = nlp.jacobian(array(x, n))
        return True

    @_HESSIAN
    @guarded
    def hessian(n, x, new, factor, m, multipliers, new_multipliers, count, rows, columns, out, data):
        if rows:
            write_structure(rows, columns, count, nlp.hessian_structure)
        else:
            array(out, count)[:] = nlp.hessian(array(x, n), array(multipliers, m), factor)
        return True

    def pointer(a: np.ndarray):
        return a.ctypes.data_as(NUMBERS)

    lower, upper = np.clip(nlp.lower, -2e19, 2e19), np.clip(nlp.upper, -2e19, 2e19)
    low, high = np.clip(nlp.constraint_lower, -2e19, 2e19), np.clip(nlp.constraint_upper, -2e19, 2e19)
    problem = DATA(
        ipopt.CreateIpoptProblem(
            INDEX(nlp.n), pointer(lower), pointer(upper), INDEX(nlp.m), pointer(low), pointer(high),
            INDEX(len(nlp.jacobian_structure[0])), INDEX(len(nlp.hessian_structure[0])), INDEX(0),
            objective, constraints, gradient, jacobian, hessian,
        )
    )  # fmt: skip
    if not problem.value:
        raise ArgumentError("IPOPT rejects the problem: its numbers of variables, constraints or nonzeros are invalid")
    y = np.clip(start.y, nlp.lower, nlp.upper).astype(float)
    g, objective_value = np.zeros(max(nlp.m, 1)), NUMBER(0.0)

    def of(values: np.ndarray | None, size: int) -> np.ndarray:
        return np.zeros(max(size, 1)) if values is None else np.array(values, float)

    multipliers, at_lower, at_upper = (
        of(start.multipliers, nlp.m),
        of(start.lower_multipliers, nlp.n),
        of(start.upper_multipliers, nlp.n),
    )

    @_PROGRESS
    @guarded
    def progress(
        mode, number, value, infeasibility, dual, mu, step, regularization, dual_step, primal_step, trials, data
    ):
        iterations[0] = number
        error = max(infeasibility, dual)
        if mode == 0 and error <= best["error"]:
            # Optimality has just been computed, so the last gradient is that of this iterate.
            best.update(error=error, y=latest[0])
        if on_iteration is not None:
            on_iteration(Iteration(number, value, infeasibility, dual, mu))
        return not stop.is_set()

    try:
        ipopt.SetIntermediateCallback(problem, progress)
        if scaling is not None:
            options = {"nlp_scaling_method": "user-scaling", **options}
            ipopt.SetIpoptProblemScaling(
                problem, NUMBER(scaling.objective), pointer(scaling.variables), pointer(scaling.constraints)
            )
        if warm:
            options = {
                "warm_start_init_point": "yes",
                "warm_start_bound_push": 1e-9,
                "warm_start_slack_bound_push": 1e-9,
                "warm_start_mult_bound_push": 1e-9,
                "mu_init": 1e-6,
                **options,
            }
        for name, value in {"print_level": 0, "sb": "yes", **options}.items():
            key = name.encode()
            value = int(value) if isinstance(value, np.integer) else value
            if isinstance(value, bool):
                value = "yes" if value else "no"
            if isinstance(value, str):
                accepted = ipopt.AddIpoptStrOption(problem, key, value.encode())
            elif isinstance(value, int) and ipopt.AddIpoptIntOption(problem, key, INDEX(value)):
                accepted = True
            else:
                accepted = ipopt.AddIpoptNumOption(problem, key, NUMBER(value))
            if not accepted:
                raise ArgumentError(
                    f"IPOPT rejects the option {name}={value!r}: unknown name, or a value of the wrong type or range"
                )
        with interrupts(stop):
            code = ipopt.IpoptSolve(
                problem, pointer(y), pointer(g), ctypes.byref(objective_value),
                pointer(multipliers), pointer(at_lower), pointer(at_upper), None,
            )  # fmt: skip
    finally:
        ipopt.FreeIpoptProblem(problem)
    if failure:
        raise failure[0]
    status = STATUSES.get(code, Status.FAILED)
    if status is not Status.SOLVED and np.isfinite(best["error"]) and status is not Status.ACCEPTABLE:
        y = best["y"]
    return Outcome(
        status,
        y,
        nlp.objective(y),
        iterations[0],
        multipliers[: nlp.m],
        at_lower[: nlp.n],
        at_upper[: nlp.n],
        clock["callbacks"],
    )
