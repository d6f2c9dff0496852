"""One evaluation is an exact quadratic model of the loss on a plane: a picture of both, and of the step.

    python examples/plane_picture.py --out plane.png

A network learns handwritten digits for a few steps. Then one forward pass gives slope and curvature along two
directions; the loss itself is sampled on a grid over the same plane, by one plain forward pass for each point.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

import jetplane as jp


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """512 of scikit-learn's images of handwritten digits as rows of 64 numbers from 0 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:512] / 16, dtype=torch.float32), torch.tensor(labels[:512])


def main(arguments: list[str] | None = None) -> float:
    """Draw the picture; returns by how much the loss falls, as promised by the model and in fact, as a ratio."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("plane.png"))
    parser.add_argument("--grid", type=int, default=61, help="points along each side")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    params = list(model.parameters())

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    opt = jp.optim.PlaneSearch(params, model)
    before = [p.detach().clone() for p in params]
    for _ in range(12):
        opt.step(loss)
    # Two directions: the way that training went so far, and one at random, both of length 1.
    first = [p.detach() - q for p, q in zip(params, before, strict=True)]
    second = [torch.randn_like(p) for p in params]
    directions = [torch.stack(pair) for pair in zip(unit(first), unit(second), strict=True)]

    plane = jp.evaluate(loss, params, directions)  # one forward pass
    step = -torch.linalg.solve(plane.curvature, plane.slope)
    reach = 1.6 * float(step.norm())
    axis = torch.linspace(-reach, reach, args.grid)
    a, b = torch.meshgrid(axis, axis, indexing="xy")
    at = torch.stack([a, b], -1)
    model_loss = plane.value + at @ plane.slope + 0.5 * torch.einsum("...i,ij,...j", at, plane.curvature, at)
    true_loss = sampled(loss, params, directions, at)

    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    levels = torch.linspace(float(true_loss.min()), float(true_loss.max()), 14).tolist()
    filled = axes.contourf(a, b, true_loss, levels, cmap="Blues_r")
    axes.contour(a, b, model_loss, levels, colors="#D55E00", linewidths=1.2)
    axes.annotate("", step.tolist(), (0.0, 0.0), arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 2})
    axes.plot(0, 0, "ko")
    axes.set_aspect("equal")
    axes.set_xlabel("along the way of training so far")
    axes.set_ylabel("along a random direction")
    axes.set_title("Colour: the loss, sampled. Lines: its model, from one pass. Arrow: the step", fontsize=10)
    figure.colorbar(filled, label="loss")
    figure.savefig(args.out, dpi=150)
    promised, there = plane.value + step @ plane.slope / 2, sampled(loss, params, directions, step)
    print(
        f"loss {float(plane.value):.4f}; after the step {float(promised):.4f} by the model, {float(there):.4f} in fact"
    )
    print(f"picture  {args.out}")
    return float((plane.value - there) / (plane.value - promised))


def unit(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors scaled in common to length 1."""
    length = torch.stack([v.square().sum() for v in vectors]).sum().sqrt()
    return [v / length for v in vectors]


@torch.no_grad()
def sampled(loss, params, directions, at: torch.Tensor) -> torch.Tensor:
    """The loss at points of the plane, by a forward pass for each."""
    origin = [p.clone() for p in params]
    values = []
    for point in at.reshape(-1, 2):
        for p, p0, d in zip(params, origin, directions, strict=True):
            p.copy_(p0 + torch.tensordot(point, d, 1))
        values.append(loss())
    for p, p0 in zip(params, origin, strict=True):
        p.copy_(p0)
    return torch.stack(values).reshape(at.shape[:-1])


if __name__ == "__main__":
    main()
