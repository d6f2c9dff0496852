"""Derivatives of functions beside torch.func and autograd, and beside other packages where they are installed.

    python -m benchmarks.operators                       # every task, every rival that is there
    python -m benchmarks.operators --tasks lap10 pinn2 --rounds 5 --json operators.json

Time is processor time of one thread in float32, the median of bursts of processes that take turns; memory is the growth
of the resident memory during one evaluation, in a process of its own. Networks are D-256-256-256-1 with tanh. Every
result is held against the first way's.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shlex
import statistics
import subprocess
import sys
import time
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
from .wavefunctions import FermiNet, Particles, PsiFormer, problem

Way = Callable[[], Any]
TOLERANCE = 1e-3  # relative, float32
PART = 512  # points at a time, of steps that add gradients up


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


def jet_for_pytorch(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The package jet-for-pytorch, collapsed, traced once and batched by vmap."""
    from jet import laplacian  # pyright: ignore[reportMissingImports]

    operator = vmap(laplacian(net, (x[0],)))
    return lambda: operator(x)[:, 0]


def _in_jax(net: nn.Module) -> tuple[Any, Any]:
    """A network's weights and the same function in jax, of one point."""
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    layers = [m for m in net if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    weights = [(jnp.asarray(m.weight.detach().numpy()), jnp.asarray(m.bias.detach().numpy())) for m in layers]

    def f(weights: Any, x: Any) -> Any:
        for n, (w, b) in enumerate(weights):
            x = w @ x + b
            x = jnp.tanh(x) if n + 1 < len(weights) else x
        return x[0]

    return weights, f


def folx_laplacian(net: nn.Module, x: Tensor) -> Way:
    """The package folx, compiled by jax."""
    import folx  # pyright: ignore[reportMissingImports]
    import jax  # pyright: ignore[reportMissingImports]

    weights, f = _in_jax(net)
    at = jax.numpy.asarray(x.numpy())
    operator = jax.jit(jax.vmap(folx.ForwardLaplacianOperator(0)(lambda z: f(weights, z))))
    return lambda: torch.from_numpy(jax.device_get(operator(at)[0]).copy())


def folx_step(net: nn.Module, x: Tensor) -> Way:
    """A step of a physics-informed network in folx."""
    import folx  # pyright: ignore[reportMissingImports]
    import jax  # pyright: ignore[reportMissingImports]

    weights, f = _in_jax(net)
    at = jax.numpy.asarray(x.numpy())

    def loss(weights: Any) -> Any:
        each = jax.vmap(lambda z: folx.ForwardLaplacianOperator(0)(lambda y: f(weights, y))(z)[0])(at)
        return (each**2).mean()

    step = jax.jit(jax.value_and_grad(loss))

    def run() -> Tensor:
        value, gradient = step(weights)
        norms = [float(jax.numpy.linalg.norm(t.ravel())) for pair in gradient for t in pair][:-1]
        return torch.tensor([float(value), *norms])

    return run


LAPLACIANS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "jetplane": by_jetplane,
    "torch.func": by_torch_func,
    "jvp of jvp": by_nested_jvp,
    "autograd": by_autograd,
}
BUILT: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    **{name: functools.partial(lambda f, net, x: functools.partial(f, net, x), f) for name, f in LAPLACIANS.items()},
    "jet-for-pytorch": jet_for_pytorch,
}
NEEDS = {"jet-for-pytorch": "jet", "folx": "folx"}  # packages of rivals that need one


def compiled(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The Laplacian by `jetplane.laplacian`, in one graph of `torch.compile`; (B, 1)."""
    f = torch.compile(lambda x: jp.laplacian(net, x, batch_dim=0), fullgraph=True)
    return lambda: f(x)


def laplacians(d: int, b: int) -> dict[str, Callable[[], Way]]:
    """Laplacians at B points in D dimensions."""

    def way(f: Callable[[nn.Module, Tensor], Callable[[], Tensor]]) -> Callable[[], Way]:
        def build() -> Way:
            found = f(network(d).requires_grad_(False), points(b, d))

            def run() -> Tensor:
                with torch.no_grad():
                    return found().detach()

            return run

        return build

    ways = {"jetplane": way(BUILT["jetplane"]), "jetplane, compiled": way(compiled)}
    ways |= {name: way(f) for name, f in BUILT.items() if name != "jetplane"}
    return ways | {"folx": lambda: folx_laplacian(network(d), points(b, d))}


def pinn(d: int, b: int) -> dict[str, Callable[[], Way]]:
    """Value and gradient, in all parameters, of the mean square of Laplacians."""

    def way(f: Callable[[nn.Module, Tensor], Callable[[], Tensor]]) -> Callable[[], Way]:
        def build() -> Way:
            net = network(d)
            found = f(net, points(b, d))

            def run() -> Tensor:
                loss = found().square().mean()
                gradient = torch.autograd.grad(loss, list(net.parameters())[:-1])
                return torch.stack([loss.detach(), *(g.norm() for g in gradient)])

            return run

        return build

    def in_parts() -> Way:
        net, parts = network(d), points(b, d).split(PART)

        def run() -> Tensor:
            value, gradient = torch.zeros(()), [torch.zeros_like(p) for p in list(net.parameters())[:-1]]
            for part in parts:
                loss = by_jetplane(net, part).square().sum() / b
                found = torch.autograd.grad(loss, list(net.parameters())[:-1])
                value += loss.detach()
                for total, g in zip(gradient, found, strict=True):
                    total += g
            return torch.stack([value, *(g.norm() for g in gradient)])

        return run

    ways = {name: way(f) for name, f in BUILT.items()} | {"jetplane, compiled": way(compiled)}
    if b > PART:
        ways[f"jetplane, {PART} points at a time"] = in_parts
    return ways | {"folx": lambda: folx_step(network(d), points(b, d))}


def sampled_axes(d: int, b: int, samples: int) -> dict[str, Callable[[], Way]]:
    """Second derivatives along a few axes of many: the first ones here, in place of a draw, so that ways agree."""

    def ours() -> Way:
        net, x = network(d).requires_grad_(False), points(b, d)
        # Of D axes, those that this seed draws lie in front.
        drawn = torch.randperm(d, generator=torch.Generator().manual_seed(0))
        weight = dict(net.named_parameters())["0.weight"]
        weight.copy_(weight[:, drawn.argsort()])
        generator, x = torch.Generator(), x[:, drawn.argsort()].contiguous()

        def run() -> Tensor:
            generator.manual_seed(0)
            found = jp.laplacian(net, x, batch_dim=0, estimate="axes", samples=samples, generator=generator)
            return found[:, 0] * (samples / d)

        return run

    def by_hand() -> Way:
        net, x = network(d).requires_grad_(False), points(b, d)
        layers = [(m.weight, m.bias) for m in net if isinstance(m, nn.Linear)]

        def run() -> Tensor:
            y, first, second = x, None, None
            for n, (w, bias) in enumerate(layers):
                y = y @ w.T + bias
                first = w[:, :samples].T[:, None] if first is None else first @ w.T
                second = None if second is None else second @ w.T
                if n + 1 < len(layers):
                    y = y.tanh()
                    slope = 1 - y * y
                    bend = -2 * y * slope * (first * first).sum(0)
                    second = bend if second is None else slope * second + bend
                    first = slope * first
            assert second is not None
            return second[:, 0]

        return run

    def nested() -> Way:
        net, x = network(d).requires_grad_(False), points(b, d)

        def along(e: Tensor) -> Tensor:
            v = e.expand_as(x)
            return jvp(lambda z: jvp(net, (z,), (v,))[1], (x,), (v,))[1][:, 0]

        axes = torch.eye(samples, d)
        return lambda: vmap(along)(axes).sum(0)

    return {"jetplane": ours, "by hand": by_hand, "jvp of jvp": nested}


def without_graph(ways: dict[str, Callable[[], Way]]) -> dict[str, Callable[[], Way]]:
    """The same under `torch.no_grad`: no results have a graph for reverse mode."""

    def way(build: Callable[[], Way]) -> Callable[[], Way]:
        return lambda: torch.no_grad()(build())

    return {name: way(build) for name, build in ways.items()}


def diffusion(d: int, r: int, b: int) -> dict[str, Callable[[], Way]]:
    """``tr(sigma sigma^T Hess)`` with r columns that all points share."""

    def sigma() -> Tensor:
        return torch.randn(d, r, generator=torch.Generator().manual_seed(2)) / d**0.5

    def ours() -> Way:
        net, x, s = network(d).requires_grad_(False), points(b, d), sigma()
        return lambda: jp.weighted_laplacian(net, x, s, batch_dim=0)[:, 0]

    def nested() -> Way:
        net, x, s = network(d).requires_grad_(False), points(b, d), sigma()

        def along(v: Tensor) -> Tensor:
            v = v.expand_as(x)
            return jvp(lambda z: jvp(net, (z,), (v,))[1], (x,), (v,))[1][:, 0]

        return lambda: vmap(along)(s.T.contiguous()).sum(0)

    def reverse() -> Way:
        net, x, s = network(d).requires_grad_(False), points(b, d), sigma()
        hessian = vmap(jacfwd(grad(lambda z: net(z).squeeze())))
        return lambda: torch.einsum("bij,ir,jr->b", hessian(x), s, s)

    return {"jetplane": ours, "torch.func": reverse, "jvp of jvp": nested}


def biharmonic(d: int, b: int) -> dict[str, Callable[[], Way]]:
    """The Laplacian of the Laplacian."""

    def ours() -> Way:
        net, x = network(d).requires_grad_(False), points(b, d)
        return lambda: jp.bilaplacian(net, x, batch_dim=0)[:, 0]

    def func() -> Way:
        net, x = network(d).requires_grad_(False), points(b, d)

        def once(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda z: torch.trace(jacfwd(grad(f))(z))

        return lambda: vmap(once(once(lambda z: net(z).squeeze())))(x)

    def folx_twice() -> Way:
        import folx  # pyright: ignore[reportMissingImports]
        import jax  # pyright: ignore[reportMissingImports]

        net, x = network(d), points(b, d)
        weights, f = _in_jax(net)
        at = jax.numpy.asarray(x.numpy())
        once = folx.ForwardLaplacianOperator(0)
        inner = lambda z: once(lambda y: f(weights, y))(z)[0]  # noqa: E731
        operator = jax.jit(jax.vmap(lambda z: once(inner)(z)[0]))
        return lambda: torch.from_numpy(jax.device_get(operator(at)).copy())

    return {"jetplane": ours, "torch.func": func, "folx": folx_twice}


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


def particles() -> dict[str, Callable[[], Way]]:
    """Laplacians in 200 coordinates, of which a feature depends on the four of its particle."""

    def way(f: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Callable[[], Way]:
        def build() -> Way:
            torch.manual_seed(0)
            net, x = Particles().requires_grad_(False), torch.randn(16, 200)
            return lambda: f(net, x)

        return build

    def trace(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
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
    "lap100large": ("Laplacian, D 100, B 2048", lambda: laplacians(100, 2048)),
    "lap2one": ("Laplacian, D 2, B 1", lambda: laplacians(2, 1)),
    "lap100one": ("Laplacian, D 100, B 1", lambda: laplacians(100, 1)),
    "pinn2": ("PINN step, D 2, B 2048", lambda: pinn(2, 2048)),
    "pinn10": ("PINN step, D 10, B 256", lambda: pinn(10, 256)),
    "pinn100": ("PINN step, D 100, B 256", lambda: pinn(100, 256)),
    "pinn50": ("PINN step, D 50, B 2048", lambda: pinn(50, 2048)),
    "stde": ("16 of 10,000 axes, B 100", lambda: without_graph(sampled_axes(10_000, 100, 16))),
    "diffusion": ("Fokker-Planck, D 100, 50 columns, B 256", lambda: without_graph(diffusion(100, 50, 256))),
    "biharmonic": ("Biharmonic, D 5, B 256", lambda: without_graph(biharmonic(5, 256))),
    "hessian": ("Hessian, D 1,000", lambda: hessian(1000)),
    "hvp": ("Hessian-vector product, D 10,000", lambda: product(10_000)),
    "slogdet": ("Laplacian of slogdet (256, 4, 8, 8), K 24", determinants),
    "ferminet": ("Laplacian of a FermiNet, 8 electrons, B 64", lambda: wave_function(FermiNet)),
    "particles": ("Laplacian in the coordinates of 50 particles of 4, B 16", particles),
    "psiformer": ("Laplacian of a PsiFormer, 8 electrons, B 64", lambda: wave_function(PsiFormer)),
}


def ways(task: str, only: list[str] | None) -> list[str]:
    """The ways of a task whose packages are installed, or those of them that are wanted."""
    found = [w for w in TASKS[task][1]() if w not in NEEDS or importlib.util.find_spec(NEEDS[w]) is not None]
    return [w for w in found if only is None or w in only]


def measured(task: str, rounds: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Time and memory of each way of a task."""
    names, rows = ways(task, only), []
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


def measured_here(task: str, rounds: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Time alone, of ways that take turns in this process: for machines that others use."""
    torch.set_num_threads(1)
    runs: dict[str, Way] = {}
    rows: dict[str, dict[str, Any]] = {w: {"task": TASKS[task][0], "way": w} for w in ways(task, only)}
    seconds: dict[str, list[float]] = {w: [] for w in rows}
    first = None
    for w, build in TASKS[task][1]().items():
        if w not in rows:
            continue
        try:
            run = build()
            found = run().detach().flatten()
        except Exception as error:  # of a rival's: that is its row
            rows[w]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        runs[w], first = run, found if first is None else first
        rows[w]["agrees"] = bool((found - first).abs().max() <= TOLERANCE * first.abs().max())
    for _ in range(rounds):
        for w, run in runs.items():
            begin = time.process_time()
            run()
            seconds[w].append(time.process_time() - begin)
    return [row | ({"ms": 1000 * statistics.median(seconds[w])} if w in runs else {}) for w, row in rows.items()]


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
            memory = f"{row['mib']:.0f}" if "mib" in row else ""
            lines.append(f"| {row['task']} | {row['way']} | {row['ms']:.1f} | {memory} | {word} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Times of all ways, relative to ours in the same task."""
    import matplotlib.pyplot as plt

    ours = {row["task"]: row["ms"] for row in rows if row["way"] == "jetplane" and "ms" in row}
    tasks, names = list(ours), sorted({row["way"] for row in rows} - {"jetplane"})
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.55 * len(tasks)))
    for n, name in enumerate(names):
        own = [row for row in rows if row["way"] == name and "ms" in row]
        at = [tasks.index(row["task"]) + 0.8 * ((n + 0.5) / len(names) - 0.5) for row in own]
        axis.barh(at, [row["ms"] / ours[row["task"]] for row in own], 0.8 / len(names), label=name)
    axis.axvline(1, color="black", lw=1)
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], [str(t) for t in ticks])
    axis.set_xlim(0.1, 20)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.invert_yaxis()
    axis.set_xlabel("time, relative to Jetplane's")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, or be measured."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve_one(json.loads(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="*", help="all by default")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--here", action="store_true", help="time alone, in turns within one process")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--figure", type=Path, help="where to draw; with --from, numbers of before")
    parser.add_argument(
        "--from", dest="before", type=Path, nargs="*", help="draw these files' numbers, measure nothing"
    )
    options = parser.parse_args()
    if options.before:
        draw([row for file in options.before for row in json.loads(file.read_text())["rows"]], options.figure)
        return
    way = measured_here if options.here else measured
    rows = [row for task in options.tasks for row in way(task, options.rounds, options.ways)]
    print(machine(1), end="\n\n")
    print(table(rows))
    if options.figure is not None:
        draw(rows, options.figure)
    if options.json is not None:
        command = shlex.join(["python", "-m", "benchmarks.operators", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, "machine": machine(1), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
