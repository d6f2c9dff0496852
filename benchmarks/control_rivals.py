"""The brachistochrone by other packages, on 10 intervals of 4 points or as many nodes, from the same guess.

    python -m benchmarks.control_rivals pockit      # or opty, dymos; prints one line of JSON

`benchmarks.control` runs each in a process of its own, where the package is installed. A solve is the second of two.

- pockit: Radau collocation, IPOPT.
- dymos: Radau collocation (compressed), SciPy's SLSQP with coloured derivatives; the components have exact ones.
- opty: the midpoint rule on 41 nodes, IPOPT; the error of its optimum is that of the rule.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib import import_module
from typing import Any

import numpy as np


def pockit() -> dict[str, Any]:
    """pockit-optimal-control."""
    began = time.process_time()
    sp: Any = import_module("sympy")
    radau: Any = import_module("pockit.radau")
    ipopt: Any = import_module("pockit.optimizer.ipopt")
    system = radau.System(0)
    phase = system.new_phase(["x", "y", "v"], ["angle"])
    v, (angle,) = phase.x[2], phase.u
    phase.set_dynamics([v * sp.sin(angle), v * sp.cos(angle), 9.81 * sp.cos(angle)])
    phase.set_integral([1.0])
    phase.set_phase_constraint([v, angle], [0.0, 0.0], [20.0, np.pi])
    phase.set_boundary_condition([0.0, 0.0, 0.0], [2.0, 2.0, None], 0.0, None)
    phase.set_discretization(10, 4)
    system.set_phase([phase])
    system.set_objective(phase.I[0])
    guess = radau.linear_guess(phase, 0.0)
    guess.t_f = 1.0
    guess.x[2] = 6.0 * guess.t_x
    guess.u[0] = np.pi / 2
    options = {"tol": 1e-8, "print_level": 0, "sb": "yes"}
    ipopt.solve(system, guess, optimizer_options=options)
    first = time.process_time() - began
    began = time.process_time()
    _, info = ipopt.solve(system, guess, optimizer_options=options)
    again = time.process_time() - began
    return {
        "setup": first - again,
        "solve": again,
        "objective": float(info["obj_val"]),
        "status": "SOLVED" if info["status"] == 0 else str(info["status"]),
    }


def opty() -> dict[str, Any]:
    """Opty, with cyipopt."""
    began = time.process_time()
    sm: Any = import_module("sympy")
    symbols: Any = import_module("sympy.physics.mechanics").dynamicsymbols
    nodes, h = 41, sm.symbols("h")
    x, y, v, angle = symbols("x y v angle")
    rates = (v * sm.sin(angle), v * sm.cos(angle), 9.81 * sm.cos(angle))
    equations = sm.Matrix([state.diff() - rate for state, rate in zip((x, y, v), rates, strict=True)])
    end, last = (nodes - 1) * h, 1.0 / (nodes - 1)

    def gradient(free):
        result = np.zeros_like(free)
        result[-1] = nodes - 1
        return result

    problem = import_module("opty").Problem(
        lambda free: (nodes - 1) * free[-1],
        gradient,
        equations,
        (x, y, v),
        nodes,
        h,
        instance_constraints=(x.func(0 * h), y.func(0 * h), v.func(0 * h), x.func(end) - 2, y.func(end) - 2),
        time_symbol=symbols._t,
        bounds={v: (0.0, 20.0), angle: (0.0, np.pi), h: (0.1 * last, 10.0 * last)},
        integration_method="midpoint",
        backend="numpy",
    )
    for name, value in (("tol", 1e-8), ("print_level", 0), ("sb", "yes")):
        problem.add_option(name, value)
    s = np.linspace(0, 1, nodes)
    guess = np.concatenate([2 * s, 2 * s, 6 * s, np.full(nodes, np.pi / 2), [last]])
    problem.solve(guess)
    first = time.process_time() - began
    began = time.process_time()
    free, info = problem.solve(guess)
    again = time.process_time() - began
    return {
        "variables": len(free),
        "setup": first - again,
        "solve": again,
        "objective": float(info["obj_val"]),
        "status": "SOLVED" if info["status"] == 0 else str(info["status"]),
    }


def dymos() -> dict[str, Any]:
    """dymos, on OpenMDAO."""
    began = time.process_time()
    om: Any = import_module("openmdao.api")
    dm: Any = import_module("dymos")

    class Slide(om.ExplicitComponent):
        def initialize(self):
            self.options.declare("num_nodes", types=int)

        def setup(self):
            n = self.options["num_nodes"]
            for name in ("v", "angle"):
                self.add_input(name, shape=n)
            for name in ("x_rate", "y_rate", "v_rate"):
                self.add_output(name, shape=n)
            every = np.arange(n)
            for name in ("x_rate", "y_rate"):
                self.declare_partials(name, ["v", "angle"], rows=every, cols=every)
            self.declare_partials("v_rate", "angle", rows=every, cols=every)

        def compute(self, inputs, outputs):
            v, sine, cosine = inputs["v"], np.sin(inputs["angle"]), np.cos(inputs["angle"])
            outputs["x_rate"], outputs["y_rate"], outputs["v_rate"] = v * sine, v * cosine, 9.81 * cosine

        def compute_partials(self, inputs, partials):
            v, sine, cosine = inputs["v"], np.sin(inputs["angle"]), np.cos(inputs["angle"])
            partials["x_rate", "v"], partials["x_rate", "angle"] = sine, v * cosine
            partials["y_rate", "v"], partials["y_rate", "angle"] = cosine, -v * sine
            partials["v_rate", "angle"] = -9.81 * sine

    def solved() -> tuple[Any, Any, float]:
        problem = om.Problem()
        problem.driver = om.ScipyOptimizeDriver(optimizer="SLSQP", tol=1e-8, maxiter=3000, disp=False)
        problem.driver.declare_coloring(show_summary=False)
        trajectory = problem.model.add_subsystem("trajectory", dm.Trajectory())
        phase = dm.Phase(ode_class=Slide, transcription=dm.Radau(num_segments=10, order=4, compressed=True))
        trajectory.add_phase("phase", phase)
        phase.set_time_options(fix_initial=True, duration_bounds=(0.1, 10.0))
        for name in ("x", "y"):
            phase.add_state(name, rate_source=f"{name}_rate", fix_initial=True, fix_final=True)
        phase.add_state("v", rate_source="v_rate", targets=["v"], fix_initial=True, lower=0.0, upper=20.0)
        phase.add_control("angle", targets=["angle"], lower=0.0, upper=np.pi, continuity=False, rate_continuity=False)
        phase.add_objective("time", loc="final")
        problem.setup()
        phase.set_time_val(initial=0.0, duration=1.0)
        for name, values in (("x", (0, 2)), ("y", (0, 2)), ("v", (0, 6))):
            phase.set_state_val(name, values)
        phase.set_control_val("angle", (np.pi / 2, np.pi / 2))
        problem.final_setup()
        clock = time.process_time()
        result = problem.run_driver()
        return problem, result, time.process_time() - clock

    _, _, solve = solved()
    setup = time.process_time() - began - solve
    problem, result, again = solved()
    return {
        "variables": sum(int(np.prod(m["size"])) for m in problem.driver._designvars.values()),
        "setup": setup,
        "solve": again,
        "iterations": int(problem.driver.iter_count),
        "objective": float(problem.get_val("trajectory.phase.timeseries.time")[-1, 0]),
        "status": "SOLVED" if result.success else result.exit_status,
    }


RIVALS = {f.__name__: f for f in (pockit, opty, dymos)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(RIVALS[sys.argv[1]]()))
