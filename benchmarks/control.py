"""Optimal control beside CasADi, pockit, opty and dymos, where they are installed.

    python -m benchmarks.control                          # every problem, derivatives of 2,000 nodes, a network
    python -m benchmarks.control --cases goddard shuttle --json control.json
    python -m benchmarks.control --others-path FOLDER     # a folder with pockit-optimal-control, opty, dymos
    python -m benchmarks.control --banded cases large batch chunks --json control-banded.json  # the banded solver

CasADi gets the scalar graph of the same functions as its own expressions (SX, mapped over nodes), the same
transcription on the same mesh from the same guess, and its own IPOPT with monotone barrier and IPOPT's own scaling: the
comparison is of what a user gets from each. The last column is the relative difference of optima where ours has that
scaling too. The others solve the brachistochrone alone (`benchmarks.control_rivals`). Times are processor time of one
thread; a solve is the second of two.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.control import CASES
from examples.control.flight import low_thrust
from jetplane.control import interior_point, ipopt, solve_batch
from jetplane.control.guessing import start
from jetplane.control.model import Model
from jetplane.control.nlp import NLP
from jetplane.control.solving import meshes_of, scaling_of
from jetplane.llvm import Graph

from .control_rivals import RIVALS
from .measuring import environment, machine

FIXED = {"brachistochrone": (10, 4), "cart_pole": (25, 3), "quadrotor": (20, 4)}  # where the example refines its mesh


def timed(f: Callable[[], Any], rounds: int = 15) -> float:
    """Median milliseconds of processor time."""
    f()
    times = []
    for _ in range(rounds):
        t, n = time.process_time(), 0
        while time.process_time() - t < 0.02:
            f()
            n += 1
        times.append((time.process_time() - t) / n)
    return 1e3 * statistics.median(times)


# CasADi


def expressions(graph: Graph, variables: list[Any], results: list[int]) -> Any:
    """The scalar graph as CasADi's expressions."""
    ca: Any = importlib.import_module("casadi")
    names = {"atan2": ca.atan2, "pow": ca.power, "abs": ca.fabs, "select": ca.if_else}
    known: dict[int, Any] = {}
    for node in graph.needed(results):
        operator, arguments = graph.rows[node]
        if operator == "constant":
            known[node] = arguments[0]
        elif operator == "input":
            known[node] = variables[arguments[0]]
        else:
            a = [known[n] for n in arguments]
            match operator:
                case "add":
                    known[node] = a[0] + a[1]
                case "sub":
                    known[node] = a[0] - a[1]
                case "mul":
                    known[node] = a[0] * a[1]
                case "div":
                    known[node] = a[0] / a[1]
                case "neg":
                    known[node] = -a[0]
                case _:
                    known[node] = (names.get(operator) or getattr(ca, operator))(*a)
    return ca.vertcat(*(known[r] for r in results))


def casadi_program(nlp: NLP) -> dict[str, Any]:
    """The same transcription in CasADi."""
    ca: Any = importlib.import_module("casadi")
    y = ca.MX.sym("y", nlp.n)
    rows: list[Any] = []
    ends: list[Any] = []
    cost: Any = 0
    p = y[nlp.parameters]
    for name, model in nlp.model.phases.items():
        place, mesh, arrays = nlp.places[name], nlp.meshes[name], nlp.phases[name]
        (nx, nu, nq), nodes = model.sizes, mesh.nodes
        z = ca.SX.sym("z", model.program.variables)
        f = ca.Function(name, [z], [expressions(model.program.graph, ca.vertsplit(z), model.program.results)])
        x = ca.reshape(y[place.states], nodes + 1, nx)
        u = ca.reshape(y[place.controls], nodes, nu)
        t0 = model.phase.t0[0] if place.t0 is None else y[place.t0]
        tf = model.phase.tf[0] if place.tf is None else y[place.tf]
        times = t0 + (tf - t0) * ca.DM(mesh.times[:-1])
        values = f.map(nodes)(ca.horzcat(x[:-1, :], u, times, ca.repmat(p.T, nodes, 1)).T).T
        matrix = arrays.matrix.tocoo()
        d = ca.DM.triplet(matrix.coords[0].tolist(), matrix.coords[1].tolist(), ca.DM(matrix.data), nodes, nodes + 1)
        half = ca.DM(mesh.half_lengths)
        weights = ca.DM(mesh.weights)
        rows.append(ca.vec(ca.mtimes(d, x) - (tf - t0) * ca.repmat(half, 1, nx) * values[:, :nx]))
        if len(model.lower):
            rows.append(ca.vec(values[:, model.timed :]))
        if nq:
            integrals = ca.mtimes(values[:, nx : nx + nq].T, weights) * (tf - t0)
            rows.append(y[place.integrals] - integrals)
        if model.running:
            cost += (tf - t0) * ca.dot(values[:, model.timed - 1], weights)
        ends += [x[0, :].T, x[-1, :].T, ca.MX(t0), ca.MX(tf), y[place.integrals]]
    e = ca.SX.sym("e", nlp.model.ends.variables)
    g = ca.Function("ends", [e], [expressions(nlp.model.ends.graph, ca.vertsplit(e), nlp.model.ends.results)])
    if nlp.model.ends.results:
        values = g(ca.vertcat(*ends, p))
        if len(nlp.model.lower):
            rows.append(values[nlp.model.has_final :])
        cost += values[0] if nlp.model.has_final else 0
    return {"x": y, "f": cost, "g": ca.vertcat(*rows)}


def casadi_solve(nlp: NLP, first: np.ndarray) -> dict[str, Any]:
    """Solve by CasADi and its IPOPT, twice."""
    ca: Any = importlib.import_module("casadi")
    t = time.process_time()
    options = {"ipopt": {"print_level": 0, "sb": "yes", "tol": 1e-8, "max_iter": 3000}, "print_time": False}
    solver = ca.nlpsol("solver", "ipopt", casadi_program(nlp), options)
    setup = time.process_time() - t
    bounds = {"lbx": nlp.lower, "ubx": nlp.upper, "lbg": nlp.constraint_lower, "ubg": nlp.constraint_upper}
    for _ in range(2):
        t = time.process_time()
        found = solver(x0=first, **bounds)
        seconds = time.process_time() - t
    stats = solver.stats()
    derivatives = sum(v for k, v in stats.items() if k.startswith("t_proc_nlp_"))
    return {
        "setup": setup,
        "solve": seconds,
        "derivatives": derivatives,
        "iterations": stats["iter_count"],
        "objective": float(found["f"]),
        "status": stats["return_status"],
    }


# Ours


def ours(name: str) -> tuple[dict[str, Any], NLP, np.ndarray]:
    """Solve an example twice; set-up is measured with an empty cache and with a full one."""
    case = CASES[name]()
    options = {**case.options, "mesh": case.options.get("mesh", FIXED.get(name, (20, 3)))}
    options.pop("accuracy", None)
    setups = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JETPLANE_CACHE"] = folder
        for _ in range(2):
            t = time.process_time()
            model = Model(case.problem)
            nlp = NLP(model, meshes_of(case.problem, options["mesh"]))
            setups.append(time.process_time() - t)
        first = start(nlp, None).y
        for _ in range(2):
            solution = case.problem.solve(**options)
        # By IPOPT's own scaling, as CasADi has it: the same program must have the same optimum.
        same = case.problem.solve(**{**options, "scaling": "none"})
    return (
        {
            "setup": setups[0],
            "setup, cached": setups[1],
            "solve": solution.seconds["derivatives"] + solution.seconds["solver"],
            "derivatives": solution.seconds["derivatives"],
            "iterations": solution.iterations,
            "objective": solution.objective,
            "same scaling": {"objective": same.objective, "iterations": same.iterations},
            "status": solution.status.name,
            "variables": nlp.n,
            "error": float(max(ph.error.max() for ph in solution.phases.values())),
            "simulation": max(solution.simulate().difference.values()),
            "optimum": case.optimum,
        },
        nlp,
        first,
    )


def derivatives(nodes: int) -> list[dict[str, Any]]:
    """The powered descent's Lagrangian at many nodes: values, Jacobian and Hessian."""
    [model] = Model(CASES["powered_descent"]().problem).phases.values()
    rng = np.random.default_rng(0)
    z = np.abs(0.3 * rng.normal(size=(model.program.variables, nodes))) + 0.5
    rows = []
    reference = None
    for backend in ("llvm", "torch"):
        [model] = Model(CASES["powered_descent"]().problem, backend).phases.values()
        at = model.program.at(nodes)
        at.variables[:] = z
        at.weights[:] = 1.0
        at.changed()
        row: dict[str, Any] = {"way": f"ours, {backend}", "nodes": nodes}
        for key in ("values", "jacobian", "hessian"):
            row[key] = timed(getattr(at, key), 5 if backend == "torch" else 15)
        found = {k: v for k, v in zip(model.program.hessian_keys, at.hessian().copy(), strict=True)}
        if reference is None:
            reference = found
        row["difference"] = max(float(np.abs(found[k] - reference[k]).max()) for k in reference)
        rows.append(row)
    if importlib.util.find_spec("casadi"):
        ca: Any = importlib.import_module("casadi")
        s = ca.SX.sym("z", model.program.variables)
        f = expressions(model.program.graph, ca.vertsplit(s), model.program.results)
        hessian = ca.tril(ca.hessian(ca.sum1(f), s)[0])
        row = {"way": "CasADi, SX mapped", "nodes": nodes}
        for key, made in (("values", f), ("jacobian", ca.jacobian(f, s)), ("hessian", hessian)):
            mapped = ca.Function(key, [s], [made]).map(nodes)
            row[key] = buffered(mapped, z.T)
        mapped = ca.Function("h", [s], [hessian])
        at = np.array(mapped(z[:, 0]).full())
        assert reference is not None
        row["difference"] = max(float(abs(at[k] - v[0])) for k, v in reference.items())
        rows.append(row)
    return rows


def _memory(array: Any) -> memoryview:
    return memoryview(array)


def buffered(function: Any, z: np.ndarray) -> float:
    """Milliseconds of a mapped function of CasADi without conversions of its arguments."""
    buffer, trigger = function.buffer()
    given, out = np.ascontiguousarray(z).ravel(), np.zeros(function.nnz_out(0))
    buffer.set_arg(0, _memory(given))
    buffer.set_res(0, _memory(out))
    return timed(trigger, 5)


def networks(nodes: int) -> list[dict[str, Any]]:
    """A network 16-64-64-13 as dynamics: the Hessian of the weighted sum of its outputs."""
    from jetplane.control.program import Program, trace

    torch.manual_seed(0)
    nn = torch.nn
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 13)).double()
    net.requires_grad_(False)
    z, weights = torch.randn(nodes, 16, dtype=torch.float64), torch.randn(nodes, 13, dtype=torch.float64)
    graph, variables, [results] = trace(lambda x, p: [("net", net(x), 13)], 16, 0, 2)
    at = Program(graph, variables, results).at(nodes)
    at.variables[:], at.weights[:] = z.T.numpy(), weights.T.numpy()
    at.changed()
    at.jacobian()
    hessian = torch.func.vmap(torch.func.hessian(lambda z, w: (net(z) * w).sum()))
    reference = hessian(z, weights).numpy()
    found = np.zeros((nodes, 16, 16))
    for (i, j), row in zip(at.program.hessian_keys, at.hessian(), strict=True):
        found[:, i, j] = found[:, j, i] = row

    def all_of_it() -> None:
        at.changed()
        at.hessian()

    rows = [
        {
            "way": "ours",
            "nodes": nodes,
            "hessian": timed(all_of_it, 5),
            "difference": float(abs(found - reference).max()),
        },
        {"way": "torch.func", "nodes": nodes, "hessian": timed(lambda: hessian(z, weights), 3), "difference": 0.0},
    ]
    if importlib.util.find_spec("casadi"):
        ca: Any = importlib.import_module("casadi")
        values = [ca.DM(w.numpy()) for w in net.parameters()]
        x, w = ca.MX.sym("x", 16), ca.MX.sym("w", 13)
        h = ca.tanh(ca.mtimes(values[0], x) + values[1])
        h = ca.tanh(ca.mtimes(values[2], h) + values[3])
        y = ca.mtimes(values[4], h) + values[5]
        mapped = ca.Function("h", [x, w], [ca.hessian(ca.dot(w, y), x)[0]]).map(nodes)
        buffer, trigger = mapped.buffer()
        a, b, out = z.numpy().ravel().copy(), weights.numpy().ravel().copy(), np.zeros(mapped.nnz_out(0))
        buffer.set_arg(0, _memory(a))
        buffer.set_arg(1, _memory(b))
        buffer.set_res(0, _memory(out))
        ms = timed(trigger, 2)
        off = float(abs(out.reshape(nodes, 16, 16) - reference).max())
        rows.append({"way": "CasADi, MX mapped", "nodes": nodes, "hessian": ms, "difference": off})
    return rows


# Other packages, in processes of their own


def rival(name: str, path: str | None) -> dict[str, Any] | None:
    """The brachistochrone by another package; None where it is not there or fails."""
    if not path and not importlib.util.find_spec(name):
        return None
    environ = environment(1)
    if path:
        environ["PYTHONPATH"] = os.pathsep.join([path, environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "benchmarks.control_rivals", name]
    run = subprocess.run(command, env=environ, capture_output=True, text=True)
    if run.returncode:
        print(f"{name}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(run.stdout.strip().splitlines()[-1])


# The banded solver beside IPOPT


def solvers(name: str, mesh: Any, limit: int, rounds: int = 1) -> dict[str, Any]:
    """The same program from the same start with the same scaling by both solvers, one after the other in each round."""
    case = CASES[name]()
    nlp = NLP(Model(case.problem), meshes_of(case.problem, mesh))
    first = start(nlp, None)
    scaling = scaling_of(nlp, first.y, case.options.get("scaling", "auto"))
    times: dict[str, list[float]] = {"banded": [], "IPOPT": []}
    found = {}
    for _ in range(rounds):
        for way, spent in times.items():
            began = time.process_time()
            if way == "banded":
                options = {"tol": 1e-8, "max_iterations": limit}
                found[way] = interior_point.solve(nlp, first, options=options, scaling=scaling)
            else:
                found[way] = ipopt.solve(nlp, first, options={"tol": 1e-8, "max_iter": limit}, scaling=scaling)
            spent.append(time.process_time() - began)
    rows: dict[str, Any] = {"variables": nlp.n, "constraints": nlp.m}
    for way, outcome in found.items():
        seconds = statistics.median(times[way])
        rows[way] = {
            "status": outcome.status.name,
            "objective": outcome.objective,
            "iterations": outcome.iterations,
            "seconds": seconds,
            "ms an iteration": 1e3 * seconds / max(outcome.iterations, 1),
        }
    rows["difference"] = (rows["banded"]["objective"] - rows["IPOPT"]["objective"]) / max(
        1, abs(rows["IPOPT"]["objective"])
    )
    return rows


def transfers(problems: int, rivals: int) -> dict[str, Any]:
    """Low-thrust transfers with different thrusts: all by `solve_batch`, some of them by IPOPT one by one."""
    thrusts = np.linspace(0.28, 0.45, problems)
    batch = solve_batch(low_thrust(None).problem, {"thrust": thrusts}, mesh=(40, 3), max_iterations=1000)
    seconds = sum(batch.seconds.values())

    def ipopt(number: int) -> tuple[float, int, float, str]:
        began = time.process_time()
        solution = low_thrust(float(thrusts[number])).problem.solve(mesh=(40, 3))
        return solution.objective, solution.iterations, time.process_time() - began, solution.status.name

    chosen = np.linspace(0, problems - 1, rivals).astype(int)
    theirs = [ipopt(int(number)) for number in chosen]
    failed = {
        f"{thrusts[number]:.9g}": {"status": batch.status[number].name, "iterations": int(batch.iterations[number]),
                                   "IPOPT": ipopt(int(number))}
        for number in np.flatnonzero(~np.asarray(batch.success))
    }  # fmt: skip
    difference = (batch.objective[chosen] - [t[0] for t in theirs]) / [t[0] for t in theirs]
    return {
        "problems": problems,
        "statuses": {name: [s.name for s in batch.status].count(name) for name in {s.name for s in batch.status}},
        "seconds": seconds,
        "seconds a problem": seconds / problems,
        "iterations, median": float(np.median(batch.iterations)),
        "iterations, most": int(batch.iterations.max()),
        "cost, least and most": [float(batch.objective.min()), float(batch.objective.max())],
        "started twice": int((batch.starts == 2).sum()),
        "failed": failed,
        "IPOPT": {
            "problems": rivals,
            "solved": sum(t[3] == "SOLVED" for t in theirs),
            "failed": {f"{thrusts[n]:.9g}": t[3] for n, t in zip(chosen, theirs, strict=True) if t[3] != "SOLVED"},
            "seconds a problem": statistics.mean(t[2] for t in theirs),
            "iterations, median": statistics.median(t[1] for t in theirs),
        },
        "cost beside IPOPT's": {
            "lower by more than 1e-8": int((difference < -1e-8).sum()),
            "equal": int((abs(difference) <= 1e-8).sum()),
            "higher": int((difference > 1e-8).sum()),
            "median of relative differences": float(np.median(difference)),
            "largest": float(abs(difference).max()),
        },
    }


def chunks() -> dict[str, float]:
    """Milliseconds of an iteration for each of so many low-thrust transfers at once, 60 iterations of all."""
    found = {}
    for problems in (1, 10, 25, 50, 100):
        thrusts = np.linspace(0.28, 0.45, problems)
        batch = solve_batch(low_thrust(None).problem, {"thrust": thrusts}, mesh=(40, 3), max_iterations=60)
        found[str(problems)] = 1e3 * sum(batch.seconds.values()) / float(batch.iterations.sum())
    return found


def banded(parts: list[str], names: list[str], problems: int, rivals: int, report: dict[str, Any]) -> None:
    """Tables of the banded solver beside IPOPT."""
    head = "| | variables | banded: iterations | cost | s | ms each | IPOPT: iterations | cost | s | ms | difference |"
    if "cases" in parts or "large" in parts:
        print(f"\n{head}\n|---|{'--:|' * 10}")
    runs = [(name, FIXED.get(name) or CASES[name]().options["mesh"], 3000, 1) for name in names if "cases" in parts]
    if "large" in parts:
        runs += [("powered_descent", mesh, 60, 3) for mesh in ((50, 5), (200, 5))]
    for name, mesh, limit, rounds in runs:
        row = solvers(name, mesh, limit, rounds)
        key = name if limit == 3000 else f"{name}, {mesh[0]} x {mesh[1]}, {limit} iterations at most"
        report.setdefault("cases" if limit == 3000 else "large", {})[key] = row
        cells = [
            f"{r['iterations']}{'' if r['status'] == 'SOLVED' else ' ' + r['status']} | {r['objective']:.9g} | "
            f"{r['seconds']:.2f} | {r['ms an iteration']:.1f}"
            for r in (row["banded"], row["IPOPT"])
        ]
        print(f"| {key} | {row['variables']} | {' | '.join(cells)} | {row['difference']:.0e} |", flush=True)
    if "chunks" in parts:
        report["chunks"] = chunks()
        print(f"\nmilliseconds of an iteration by problems of a batch: {json.dumps(report['chunks'])}", flush=True)
    if "batch" in parts:
        report["batch"] = transfers(problems, rivals)
        print(f"\n{problems} low-thrust transfers: {json.dumps(report['batch'], indent=1)}")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[name for name in CASES if name != "known"], choices=list(CASES))
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--others-path", help="a folder with pockit-optimal-control, opty, dymos and what they need")
    parser.add_argument(
        "--banded", nargs="+", choices=["cases", "large", "batch", "chunks"], help="the banded solver and IPOPT"
    )
    parser.add_argument("--problems", type=int, default=500, help="of the batch")
    parser.add_argument("--rivals", type=int, default=20, help="of them by IPOPT")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    command = "python -m benchmarks.control" + " --others-path FOLDER" * bool(given.others_path)
    report: dict[str, Any] = {"machine": machine(1), "command": command, "cases": {}}
    print(report["machine"])
    if given.banded:
        if given.json and given.json.exists():  # parts that ran before
            report = json.loads(given.json.read_text())
        report["command"] = (
            f"python -m benchmarks.control --banded cases large batch chunks --problems {given.problems} "
            f"--rivals {given.rivals}"
        )
        banded(given.banded, given.cases, given.problems, given.rivals, report)
        if given.json:
            given.json.write_text(json.dumps(report, indent=1) + "\n")
        return
    casadi = importlib.util.find_spec("casadi") is not None
    print(
        "\n| problem | way | variables | set-up s | cached | solve s | derivatives | iterations | cost | same scaling |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in given.cases:
        mine, nlp, first = ours(name)
        ways = {"jetplane": mine}
        # Networks are functions of torch, which CasADi cannot take.
        if casadi and not any(m.program.externals for m in nlp.model.phases.values()):
            ways["CasADi"] = casadi_solve(nlp, first)
            off = mine["same scaling"]["objective"] - ways["CasADi"]["objective"]
            ways["CasADi"]["difference"] = off / max(1, abs(ways["CasADi"]["objective"]))
        if name == "brachistochrone":
            found = {rival_name: rival(rival_name, given.others_path) for rival_name in RIVALS}
            ways.update({rival_name: row for rival_name, row in found.items() if row})
        report["cases"][name] = ways
        for way, row in ways.items():
            cached = f"{row['setup, cached']:.3f}" if "setup, cached" in row else ""
            share = f"{100 * row['derivatives'] / row['solve']:.0f} %" if "derivatives" in row else ""
            off = f"{row['difference']:.0e}" if "difference" in row else ""
            print(
                f"| {name if way == 'jetplane' else ''} | {way} | {row.get('variables', '')} | {row['setup']:.2f} | "
                f"{cached} "
                f"| {row['solve']:.3f} | {share} | {row.get('iterations', '')} | {row['objective']:.9g} | {off} |",
                flush=True,
            )
    report["derivatives"] = derivatives(given.nodes)
    print(f"\npowered descent, {given.nodes} nodes, milliseconds\n\n| way | values | Jacobian | Hessian | difference |")
    print("|---|--:|--:|--:|--:|")
    for row in report["derivatives"]:
        print(
            f"| {row['way']} | {row['values']:.3f} | {row['jacobian']:.3f} | {row['hessian']:.3f} | "
            f"{row['difference']:.0e} |"
        )
    report["network"] = networks(given.nodes)
    print(f"\nnetwork 16-64-64-13, {given.nodes} nodes, milliseconds\n\n| way | Hessian | difference |\n|---|--:|--:|")
    for row in report["network"]:
        print(f"| {row['way']} | {row['hessian']:.1f} | {row['difference']:.0e} |")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
