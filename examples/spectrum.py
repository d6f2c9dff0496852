"""The spectrum of a small network's Hessian, before and after training.

The loss is a function of one dict of parameters: `jetplane.hessian` returns a dict of dicts of blocks, which are
assembled into the matrix. ``mode="auto"`` takes Hessian-vector products where they are cheaper. `jetplane.evaluate`
gives the Gauss-Newton matrix along all coordinates, to which the Hessian reduces once the network fits.

    python examples/spectrum.py --picture spectrum.png

As in Sagun et al., arXiv 1706.04454: few large eigenvalues, about as many as there are classes, and many near zero.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp

CLASSES = 3


def spirals(n: int) -> tuple[Tensor, Tensor]:
    """Three arms."""
    label, r = torch.randint(CLASSES, (n,)), torch.rand(n)
    angle = 2 * math.pi * label / CLASSES + 3 * r + 0.15 * torch.randn(n)
    return torch.stack([r * angle.cos(), r * angle.sin()], 1), label


def matrix(blocks: dict[str, dict[str, Tensor]], params: dict[str, Tensor]) -> Tensor:
    """Blocks within blocks as one matrix."""
    rows = [
        torch.cat([blocks[a][b].reshape(p.numel(), q.numel()) for b, q in params.items()], 1) for a, p in params.items()
    ]
    return torch.cat(rows)


def spectra(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, params, x), y)

    hessian = matrix(jp.hessian(loss, params, mode="auto"), params)
    trainable = list(net.parameters())
    d = sum(p.numel() for p in trainable)
    axes = torch.eye(d).split([p.numel() for p in trainable], 1)
    tangents = [e.reshape(d, *p.shape) for e, p in zip(axes, trainable, strict=True)]
    ggn = jp.evaluate(lambda: F.cross_entropy(net(x), y), trainable, tangents, curvature="ggn").curvature
    assert ggn is not None
    return {"Hessian": torch.linalg.eigvalsh(hessian.double()), "Gauss-Newton": torch.linalg.eigvalsh(ggn.double())}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Tensor]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--picture", help="where to draw the eigenvalues")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    (x, y), begin = spirals(500), time.process_time()
    found = {"before training": spectra(net, x, y)}
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(options.steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    found["after training"] = spectra(net, x, y)
    for when, of in found.items():
        h = of["Hessian"]
        print(
            f"{when}: {len(h)} eigenvalues from {h[0]:.3g} to {h[-1]:.3g}, {(h < -1e-6).sum()} negative, "
            f"{(h.abs() > 0.05 * h[-1]).sum()} larger than 5 % of the largest; "
            f"Gauss-Newton to {of['Gauss-Newton'][-1]:.3g}"
        )
    print(f"{time.process_time() - begin:.0f} s")
    if options.picture:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(8, 3.3), sharey=True)
        for axis, (when, of) in zip(axes, found.items(), strict=True):
            for kind, marker in (("Hessian", "."), ("Gauss-Newton", "x")):
                axis.plot(of[kind].flip(0).numpy(), marker, ms=3, label=kind)
            axis.set_yscale("symlog", linthresh=1e-4)
            axis.set(title=when, xlabel="number")
        axes[0].set_ylabel("eigenvalue")
        axes[0].legend()
        figure.tight_layout()
        figure.savefig(options.picture, dpi=110)
    return found


if __name__ == "__main__":
    main()
