"""Derivatives of functions beside torch.func and autograd, and beside other packages where they are installed.

    python -m benchmarks.operators                       # every task, every rival that is there
    python -m benchmarks.operators --tasks lap10 pinn2 --rounds 5 --json operators.json

Time is processor time of one thread in float32, the median of bursts of processes that take turns; memory is the growth
of the resident memory during one evaluation, in a process of its own. Networks are D-256-256-256-1 with tanh. Every
result is held against the first way's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import jetplane as jp

from .measuring import ROOT, Process, environment, machine
from .memory import SMALL, peak_growth
from .protocol import serve
from .wavefunctions import FermiNet, PsiFormer, problem

Way = Callable[[], Any]
TOLERANCE = 1e-3  # relative, float32


def network(d: int) -> nn.Sequential:
    """D-256-256-256-1 with tanh."""
    torch.manual_seed(0)
    sizes = [d, 256, 256, 256]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(256, 1))


def points(b: int, d: int) -> Tensor:
    """Points in D dimensions."""
    return torch.randn(b, d, generator=torch.Generator().manual_seed(1))


# --- ways: what is called, for a network and points ---------------------------------------------------------------


def by_jetplane(net: nn.Module, x: Tensor) -> Tensor:
    """Laplacians by collapsed jets."""
    return jp.laplacian(net, x, batch_dim=0)[:, 0]


def by_torch_func(net: nn.Module, x: Tensor) -> Tensor:
    """Traces of `torch.func` Hessians, forward over reverse, at each point."""
    weights: dict[str, Tensor] = dict(net.named_parameters())

    def trace(z: Tensor) -> Tensor:
        return torch.trace(jacfwd(grad(lambda y: functional_call(net, weights, y).squeeze()))(z))

    return vmap(trace)(x)


def by_nested_jvp(net: nn.Module, x: Tensor) -> Tensor:
    """`torch.func.jvp` of jvp along each coordinate, with which nothing is kept for a backward pass."""
    eye = torch.eye(x.shape[1])

    def second(e: Tensor) -> Tensor:
        v = e.expand_as(x)
        return jvp(lambda z: jvp(net, (z,), (v,))[1], (x,), (v,))[1][:, 0]

    return vmap(second)(eye).sum(0)


def by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    """A backward pass through a backward pass for each coordinate."""
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        g = torch.autograd.grad(net(z).sum(), z, create_graph=True)[0]
        total = torch.zeros(len(x))
        for d in range(x.shape[1]):
            total = total + torch.autograd.grad(g[:, d].sum(), z, create_graph=True)[0][:, d]
    return total


def by_jet_for_pytorch(net: nn.Module, x: Tensor) -> Tensor:
    """The package jet-for-pytorch, collapsed."""
    from jet.laplacian import laplacian  # pyright: ignore[reportMissingImports]

    return laplacian(net, x)[-1][:, 0]


LAPLACIANS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "jetplane": by_jetplane,
    "torch.func": by_torch_func,
    "jvp of jvp": by_nested_jvp,
    "autograd": by_autograd,
    "jet-for-pytorch": by_jet_for_pytorch,
}
NEEDS = {"jet-for-pytorch": "jet"}  # packages of rivals that need one


def laplacians(d: int, b: int) -> dict[str, Callable[[], Way]]:
    """Laplacians at B points in D dimensions."""

    def way(f: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], Way]:
        def build() -> Way:
            net, x = network(d).requires_grad_(False), points(b, d)

            def run() -> Tensor:
                with torch.no_grad():
                    return f(net, x).detach()

            return run

        return build

    return {name: way(f) for name, f in LAPLACIANS.items()}


def pinn(d: int, b: int) -> dict[str, Callable[[], Way]]:
    """Value and gradient, in all parameters, of the mean square of Laplacians."""

    def way(f: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], Way]:
        def build() -> Way:
            net, x = network(d), points(b, d)

            def run() -> Tensor:
                loss = f(net, x).square().mean()
                gradient = torch.autograd.grad(loss, list(net.parameters())[:-1])
                return torch.stack([loss.detach(), *(g.norm() for g in gradient)])

            return run

        return build

    return {name: way(f) for name, f in LAPLACIANS.items()}


def hessian(d: int) -> dict[str, Callable[[], Way]]:
    """The Hessian of a network of D inputs."""

    def way(f: Callable[[Callable[..., Tensor], Tensor], Any]) -> Callable[[], Way]:
        def build() -> Way:
            net, x = network(d).requires_grad_(False), points(1, d)[0]
            return lambda: f(lambda z: net(z).squeeze(), x)

        return build

    return {
        "jetplane": way(lambda f, x: jp.hessian(f, x, mode="auto")),
        "torch.func": way(lambda f, x: torch.func.hessian(f)(x)),
        "autograd": way(lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True)),
    }


def product(d: int) -> dict[str, Callable[[], Way]]:
    """A Hessian-vector product in D dimensions."""

    def way(f: Callable[[Callable[..., Tensor], Tensor, Tensor], Any]) -> Callable[[], Way]:
        def build() -> Way:
            net, (x, v) = network(d).requires_grad_(False), points(2, d)
            return lambda: f(lambda z: net(z).squeeze(), x, v)

        return build

    return {
        "jetplane": way(lambda f, x, v: jp.hvp(f, x, v, mode="auto")),
        "torch.func": way(lambda f, x, v: jvp(grad(f), (x,), (v,))[1]),
        "autograd": way(lambda f, x, v: torch.autograd.functional.hvp(f, x, v)[1]),
    }


def by_double_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Laplacians by a second backward pass for each coordinate, of which no graph is kept."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        z = x.clone().requires_grad_()
        g = torch.autograd.grad(f(z).sum(), z, create_graph=True)[0]
        rows = [torch.autograd.grad(g[:, d].sum(), z, retain_graph=True)[0][:, d] for d in range(x.shape[1])]
    return torch.stack(rows).sum(0)


def wave_function(kind: type[nn.Module]) -> dict[str, Callable[[], Way]]:
    """Laplacians of log |psi| at 64 configurations of 8 electrons."""

    def way(f: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Callable[[], Way]:
        def build() -> Way:
            net, x = problem(kind)

            def run() -> Tensor:
                with torch.no_grad():
                    return f(net, x).clamp(-1000, 1000)  # as local energies are, near nodes

            return run

        return build

    def trace(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(lambda z: torch.trace(jacfwd(grad(lambda y: net(y[None])[0]))(z)))(x)

    return {
        "jetplane": way(lambda f, x: jp.laplacian(f, x, batch_dim=0)),
        "autograd": way(by_double_backward),
        "torch.func": way(trace),
    }


def determinants() -> dict[str, Callable[[], Way]]:
    """Laplacians of ``log |det|`` of 4 matrices 8 × 8, sines of linear functions of 24 coordinates, at 256 points."""

    def build(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Way]:
        def made() -> Way:
            torch.manual_seed(0)
            w, shift = 0.3 * torch.randn(24, 256), (3 * torch.eye(8)).expand(4, 8, 8).flatten()
            x = points(256, 24)
            return lambda: way(x, w, shift)

        return made

    def f(x: Tensor, w: Tensor, shift: Tensor) -> Tensor:
        return torch.linalg.slogdet(((x @ w).sin() + shift).unflatten(-1, (4, 8, 8)))[1].sum(-1)

    def by_hand(x: Tensor, w: Tensor, shift: Tensor) -> Tensor:
        inner = x @ w
        matrices = (inner.sin() + shift).unflatten(-1, (4, 8, 8))
        first = (inner.cos() * w[:, None]).unflatten(-1, (4, 8, 8))  # (24, 256, 4, 8, 8)
        second = (-inner.sin() * w.square().sum(0)).unflatten(-1, (4, 8, 8))
        inverse = torch.linalg.inv(matrices)
        products = inverse @ first
        return (inverse.mT * second).sum((1, 2, 3)) - (products * products.mT).sum((0, 2, 3, 4))

    return {
        "jetplane": build(lambda x, w, shift: jp.laplacian(lambda z: f(z, w, shift), x, batch_dim=0)),
        "autograd": build(lambda x, w, shift: by_double_backward(lambda z: f(z, w, shift), x)),
        "by hand": build(by_hand),
    }


TASKS: dict[str, tuple[str, Callable[[], dict[str, Callable[[], Way]]]]] = {
    "lap10": ("Laplacian, D 10, B 256", lambda: laplacians(10, 256)),
    "lap100": ("Laplacian, D 100, B 256", lambda: laplacians(100, 256)),
    "lap10large": ("Laplacian, D 10, B 2048", lambda: laplacians(10, 2048)),
    "lap2one": ("Laplacian, D 2, B 1", lambda: laplacians(2, 1)),
    "pinn2": ("PINN step, D 2, B 2048", lambda: pinn(2, 2048)),
    "pinn10": ("PINN step, D 10, B 256", lambda: pinn(10, 256)),
    "hessian": ("Hessian, D 1,000", lambda: hessian(1000)),
    "hvp": ("Hessian-vector product, D 10,000", lambda: product(10_000)),
    "slogdet": ("Laplacian of slogdet (256, 4, 8, 8), K 24", determinants),
    "ferminet": ("Laplacian of a FermiNet, 8 electrons, B 64", lambda: wave_function(FermiNet)),
    "psiformer": ("Laplacian of a PsiFormer, 8 electrons, B 64", lambda: wave_function(PsiFormer)),
}


def ways(task: str) -> list[str]:
    """The ways of a task whose packages are installed."""
    return [w for w in TASKS[task][1]() if w not in NEEDS or importlib.util.find_spec(NEEDS[w]) is not None]


def measured(task: str, rounds: int) -> list[dict[str, Any]]:
    """Time and memory of each way of a task."""
    names, rows = ways(task), []
    processes = {w: Process("operators", {"task": task, "way": w, "threads": 1}) for w in names}
    answers = {w: p.ask("evaluate", 600) for w, p in processes.items()}
    for _ in range(rounds):
        for w, process in processes.items():
            if "error" not in answers[w]:
                process.take_turn(600)
    first = answers[names[0]].get("result")
    for w, process in processes.items():
        process.stop()
        row: dict[str, Any] = {"task": TASKS[task][0], "way": w}
        if "error" in answers[w]:
            rows.append(row | {"error": answers[w]["error"]})
            continue
        found, expected = torch.tensor(answers[w]["result"]), torch.tensor(first)
        row["agrees"] = bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
        row["ms"] = statistics.median([*process.clean, *process.disturbed])
        spec = json.dumps({"task": task, "way": w, "threads": 1, "memory": True})
        command = [sys.executable, "-m", "benchmarks.operators", spec]
        got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(1, **SMALL), check=True)
        row["mib"] = json.loads(got.stdout.splitlines()[-1]) / 2**20
        rows.append(row)
    return rows


def serve_one(spec: dict[str, Any]) -> None:
    """The measured process."""
    torch.set_num_threads(spec["threads"])
    make = TASKS[spec["task"]][1]()[spec["way"]]
    if spec.get("memory"):
        run = make()
        run()
        print(peak_growth(run))
        return

    def build() -> tuple[Way, Callable[[Any], dict[str, Any]]]:
        return make(), lambda result: {"result": result.detach().flatten()[:4096].tolist()}

    serve(build, cpu_time=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table in Markdown."""
    lines = ["| task | way | ms | MiB | |", "|---|---|--:|--:|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['task']} | {row['way']} | | | {row['error']} |")
        else:
            word = "" if row["agrees"] else "another result"
            lines.append(f"| {row['task']} | {row['way']} | {row['ms']:.1f} | {row['mib']:.0f} | {word} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or be measured."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve_one(json.loads(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    rows = [row for task in options.tasks for row in measured(task, options.rounds)]
    print(machine(1), end="\n\n")
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(1), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
