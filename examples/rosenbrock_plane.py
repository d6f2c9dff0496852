# %% [markdown]
# # Rosenbrock's valley in a plane
#
# f(x) = Σ 100 (xₙ₊₁ − xₙ²)² + (1 − xₙ)² in ten dimensions, minimized by the paper's FoMoH-KD: each step draws a plane
# of K directions, evaluates slope and curvature on it in one forward pass, and goes to the minimum of that quadratic
# model. The animation shows, for some steps, the plane (colour: f, sampled), the quadratic model (lines), and the step.
# With K = 10 the plane is the whole space, and a step is Newton's.

# %%
from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter

import jetplane as jp


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    """Of points (..., n)."""
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


# %% [markdown]
# One step in a plane of two directions, with what the picture needs: the plane, its model, and where the step goes.


# %%
def step_in_plane(x: torch.Tensor, generator: torch.Generator) -> dict:
    """Draw a plane at x, solve it, and move x."""
    directions, _ = torch.linalg.qr(torch.randn(len(x), 2, generator=generator, dtype=x.dtype))
    directions = directions.T.contiguous()
    plane = jp.evaluate(lambda: rosenbrock(x), [x], [directions])
    # saddle-free: along directions of negative curvature the step goes downhill all the same
    size, axes = torch.linalg.eigh(plane.curvature)
    move = -axes @ ((axes.T @ plane.slope) / size.abs().clamp(min=1e-6))
    while rosenbrock(x + move @ directions) > plane.value:  # the model is right nearby alone
        move = move / 2
    seen = {"x": x.clone(), "directions": directions, "plane": plane, "move": move}
    x += move @ directions
    return seen


def path(steps: int, seed: int = 0) -> tuple[list[dict], torch.Tensor]:
    """The steps from (2, 2, ...), and the values of f."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((10,), 2.0, dtype=torch.float64)
    seen, values = [], []
    for _ in range(steps):
        values.append(rosenbrock(x))
        seen.append(step_in_plane(x, generator))
    return seen, torch.stack([*values, rosenbrock(x)])


# %% [markdown]
# The pictures: colour is log f on the plane, sampled; lines are the model of one evaluation.


# %%
def animate(seen: list[dict], values: torch.Tensor, out: Path, grid: int) -> None:
    """Write an animated GIF, a frame a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")

    def frame(n: int) -> list:
        at, plane, move = (seen[n][name] for name in ("x", "plane", "move"))
        reach = 1.8 * float(move.norm()) + 1e-9
        axis = torch.linspace(-reach, reach, grid, dtype=at.dtype)
        a, b = torch.meshgrid(axis, axis, indexing="xy")
        here = torch.stack([a, b], -1)
        f = rosenbrock(at + here @ seen[n]["directions"])
        model = plane.value + here @ plane.slope + 0.5 * torch.einsum("...i,ij,...j", here, plane.curvature, here)
        levels = torch.linspace(float(f.min()), float(f.max()), 12).tolist()
        left.clear()
        left.contourf(a, b, f, levels, cmap="Blues_r")
        left.contour(a, b, model, levels, colors="#D55E00", linewidths=1.1)
        left.annotate("", move.tolist(), (0.0, 0.0), arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 2})
        left.set_title(f"step {n + 1}: the plane, its model, the step", fontsize=10)
        left.set_xlabel("first direction")
        left.set_ylabel("second direction")
        left.locator_params(nbins=5)
        right.clear()
        right.semilogy(values, color="#999999", linewidth=1)
        right.semilogy(values[: n + 2], color="#0072B2", linewidth=2)
        right.set_title("f over steps", fontsize=10)
        right.set_xlabel("step")
        right.set_ylabel("f(x)")
        return []

    shown = sorted({round(n) for n in torch.linspace(0, len(seen) - 1, min(12, len(seen))).tolist()})
    FuncAnimation(figure, frame, frames=shown).save(out, PillowWriter(fps=2), dpi=80)
    plt.close(figure)


# %% [markdown]
# And the optimizer of the library, with planes of 2 and of 10 directions, over as many steps.


# %%
def optimized(k: int, steps: int) -> torch.Tensor:
    """Values of f over steps of FoMoH-KD with K directions."""
    x = torch.full((10,), 2.0, dtype=torch.float64, requires_grad=True)  # as parameters do: it may move
    opt = jp.optim.FoMoHKD([x], lr=1.0, k=k, descent="saddle-free")
    return torch.stack([opt.step(lambda: rosenbrock(x)) for _ in range(steps)])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Write the animation; returns the last values of f."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("rosenbrock.gif"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--grid", type=int, default=61, help="points along each side")
    args, _ = parser.parse_known_args(arguments)  # a notebook has arguments of its own
    seen, values = path(args.steps)
    animate(seen, values, args.out, args.grid)
    found = {"animation": float(values[-1]), **{f"FoMoH-{k}D": float(optimized(k, args.steps)[-1]) for k in (2, 10)}}
    for name, value in found.items():
        print(f"{name:<12} f = {value:.3g} after {args.steps} steps, from {float(values[0]):.3g}")
    return found


if __name__ == "__main__":
    main()
