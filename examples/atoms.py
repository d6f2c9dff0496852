"""Ground states of helium and lithium by variational Monte Carlo.

The energy of a trial function psi is the mean, over positions drawn from psi², of the local energy

    E(x) = -1/2 (lap log psi + |grad log psi|²) - sum_i Z / r_i + sum_{i<j} 1 / r_ij     (Hartree, Bohr)

and it is never below the ground state's energy. Its Laplacian and gradient come from one forward pass,
`jetplane.value_and_laplacian`; the parameters move against the natural gradient, ``2 E[(E(x) - E) grad log psi]`` in
the metric of ``grad log psi`` (Sorella, Phys. Rev. Lett. 80 (1998)), so the Laplacian need not be differentiated.

    python examples/atoms.py                    # helium, within 0.2 mHa, half a minute on one core
    python examples/atoms.py --atom lithium     # within 0.5 mHa, a minute

The trial function has for each spin a determinant of orbitals, whose features depend on the distances of all electrons
from the nucleus and from each other (as in FermiNet, Pfau et al., arXiv 1909.02487, in small). It fulfils the cusp
conditions of Kato (Commun. Pure Appl. Math. 10 (1957)), so that the local energy has no poles: envelopes have the slope
-Z at the nucleus, and a factor ``exp(sum c r_ij / (1 + a r_ij))`` the slope c at ``r_ij = 0``, 1/2 for electrons of
opposite spins and 1/4 for equal ones. Positions are drawn by Metropolis' method.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import jetplane as jp


@dataclass(frozen=True)
class Atom:
    charge: int
    up: int
    down: int
    energy: float  # of the literature, nonrelativistic, nucleus at rest

    @property
    def electrons(self) -> int:
        return self.up + self.down


ATOMS = {
    "helium": Atom(2, 1, 1, -2.903724),  # Pekeris, Phys. Rev. 115 (1959)
    "lithium": Atom(3, 2, 1, -7.478060),  # Yan and Drake, Phys. Rev. A 52 (1995)
}
WIDTH = 16


def smooth(r: Tensor) -> Tensor:
    """Three functions of distances (..., 1) without a slope at r = 0: a network of them leaves the cusps alone."""
    square = r.square()
    return torch.cat([square / (1 + square), torch.exp(-square), torch.log1p(square)], -1)


class WaveFunction(nn.Module):
    """``log |psi|`` of electrons at (walkers, 3 N) positions, up spins first."""

    def __init__(self, atom: Atom):
        super().__init__()
        self.atom, n = atom, atom.electrons
        self.pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        self.same = torch.tensor([[(i < atom.up) == (j < atom.up)] for i, j in self.pairs]).float()
        self.cusp = (0.5 - 0.25 * self.same) / 2  # each pair is there twice
        self.reach = nn.Parameter(torch.ones(2))  # of the cusps' factors, by spin
        self.pair = nn.Sequential(nn.Linear(10, WIDTH), nn.Tanh())
        self.single = nn.Sequential(nn.Linear(3 + WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.orbitals = nn.Linear(WIDTH, n)
        nn.init.ones_(self.orbitals.bias)
        # Envelopes exp(-Z r + tail r² / (1 + r)): near the nucleus slope -Z, which cancels its pole; slower outside.
        self.tail = nn.Parameter(torch.tensor([0.4, atom.charge - 0.7])[: atom.up])

    def forward(self, x: Tensor) -> Tensor:
        up, at = self.atom.up, x.unflatten(-1, (self.atom.electrons, 3))
        r = at.square().sum(-1, keepdim=True).sqrt()  # (walkers, N, 1)
        first, second = zip(*self.pairs, strict=True)
        apart = (at[:, first] - at[:, second]).square().sum(-1, keepdim=True).sqrt()
        alone = smooth(r)
        # Where the two electrons are, and how far apart: an electron's orbitals depend on where the others are.
        pairs = torch.cat([smooth(apart), alone[:, first], alone[:, second], self.same.expand_as(apart)], -1)
        others = self.pair(pairs).unflatten(1, (self.atom.electrons, -1)).mean(2)
        h = self.orbitals(self.single(torch.cat([alone, others], -1)))  # (walkers, N, N)
        envelopes = torch.exp(-self.atom.charge * r + self.tail * r.square() / (1 + r))
        log = (self.cusp * apart / (1 + self.reach[self.same.long()] * apart)).sum((1, 2))
        for spin in (slice(up), slice(up, None)):
            phi = h[:, spin, spin]
            phi = phi * envelopes[:, spin, : phi.shape[-1]]
            log = log + (torch.linalg.slogdet(phi)[1] if phi.shape[-1] > 1 else phi[:, 0, 0].abs().log())
        return log


def local_energy(psi: WaveFunction, x: Tensor) -> Tensor:
    """``(H psi) / psi`` at each walker."""
    found = jp.value_and_laplacian(psi, x, batch_dim=0)
    kinetic = -0.5 * (found.laplacian + found.gradient.square().sum(-1))
    at = x.unflatten(-1, (psi.atom.electrons, 3))
    first, second = zip(*[(i, j) for i, j in psi.pairs if i < j], strict=True)
    repulsion = (1 / (at[:, first] - at[:, second]).norm(dim=-1)).sum(-1)
    return kinetic - (psi.atom.charge / at.norm(dim=-1)).sum(-1) + repulsion


class Metropolis:
    """Walkers that are distributed as psi²; half of the moves are accepted."""

    def __init__(self, psi: WaveFunction, walkers: int):
        self.psi, self.step = psi, 0.5
        self.x = torch.randn(walkers, 3 * psi.atom.electrons) * 0.7
        self.move(100)

    @torch.no_grad()
    def move(self, times: int) -> Tensor:
        log = self.psi(self.x)
        for _ in range(times):
            new = self.x + self.step * torch.randn_like(self.x)
            there = self.psi(new)
            taken = torch.rand_like(log).log() < 2 * (there - log)
            self.x, log = torch.where(taken[:, None], new, self.x), torch.where(taken, there, log)
            self.step *= 1.02 if taken.float().mean() > 0.5 else 0.98
        return self.x


def natural_gradient(psi: WaveFunction, x: Tensor, energy: Tensor, damping: float = 3e-4) -> Tensor:
    """``(S + damping)^-1 g`` for the energy's gradient g and the covariance S of grad log psi, over all parameters.

    With a centred row of grad log psi for each walker, S = Oᵀ O and g = 2 Oᵀ e.
    """
    params = dict(psi.named_parameters())
    gradient = torch.func.grad(lambda params, z: torch.func.functional_call(psi, params, z[None])[0])
    each = torch.func.vmap(gradient, (None, 0))({name: p.detach() for name, p in params.items()}, x)
    rows = torch.cat([each[name].flatten(1) for name in params], 1).double()
    rows = (rows - rows.mean(0)) / len(x) ** 0.5
    e = 2 * (energy - energy.mean()).double() / len(x) ** 0.5
    metric = rows.T @ rows
    metric.diagonal().add_(damping)
    return torch.linalg.solve(metric, rows.T @ e).float()


def train(psi: WaveFunction, walkers: Metropolis, steps: int) -> list[float]:
    """Energies while the function improves."""
    energies = []
    for n in range(steps):
        x = walkers.move(8)
        with torch.no_grad():
            energy = local_energy(psi, x)
        middle, spread = energy.median(), (energy - energy.median()).abs().mean()
        kept = energy.clamp(middle - 5 * spread, middle + 5 * spread)  # a few walkers near a node, or the nucleus
        change = natural_gradient(psi, x, kept)
        rate = 0.3 / (1 + 4 * n / steps) * min(1.0, 2.0 / change.norm().item())
        with torch.no_grad():
            flat = torch.nn.utils.parameters_to_vector(psi.parameters()) - rate * change
            torch.nn.utils.vector_to_parameters(flat, psi.parameters())
        energies.append(energy.mean().item())
        if n % max(1, steps // 10) == 0:
            print(f"step {n:5d}: energy {energies[-1]:.4f} ± {energy.std().item() / len(x) ** 0.5:.4f} Hartree")
    return energies


def measured(psi: WaveFunction, walkers: Metropolis, samples: int) -> tuple[float, float]:
    """The energy, and its standard error from the walkers' means, which are independent."""
    total = torch.zeros(len(walkers.x), dtype=torch.float64)
    for _ in range(samples):
        with torch.no_grad():
            total += local_energy(psi, walkers.move(10)).double()
    means = total / samples
    return means.mean().item(), means.std().item() / math.sqrt(len(means))


def draw(energies: list[float], energy: float, error: float, atom: Atom, name: str, path: str) -> None:
    import matplotlib.pyplot as plt

    steps, above = len(energies), [(e - atom.energy) * 1000 for e in energies]
    mean = [sum(above[max(0, i - 9) : i + 1]) / len(above[max(0, i - 9) : i + 1]) for i in range(steps)]
    plt.figure(figsize=(6, 3.5))
    plt.plot(above, ".", ms=3, color="silver", label="mean over the walkers")
    plt.plot(mean, lw=1, label="of ten steps")
    plt.errorbar(
        steps * 1.03, (energy - atom.energy) * 1000, error * 1000, fmt="o", ms=4, capsize=3, label="at the end"
    )
    plt.axhspan(-1, 1, color="gray", alpha=0.2, lw=0, label="1 mHa")
    plt.ylim(-5, 15)
    plt.xlabel("step")
    plt.ylabel("energy - literature, mHa")
    plt.title(f"{name.capitalize()} by variational Monte Carlo")
    plt.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atom", choices=ATOMS, default="helium")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--walkers", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=200, help="for the energy at the end, of each walker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="where to draw the energy over steps")
    parser.add_argument("--json", help="where to write the result")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    atom, begin = ATOMS[options.atom], time.process_time()
    psi = WaveFunction(atom)
    walkers = Metropolis(psi, options.walkers)
    energies = train(psi, walkers, options.steps)
    energy, error = measured(psi, walkers, options.samples)
    print(f"{options.atom}: {energy:.5f} ± {error:.5f} Hartree; literature {atom.energy:.5f}")
    result = {
        "atom": options.atom, "seed": options.seed, "energy": energy, "error": error, "literature": atom.energy,
        "steps": options.steps, "walkers": options.walkers, "samples": options.samples,
        "seconds": time.process_time() - begin,
    }  # fmt: skip
    if options.picture:
        draw(energies, energy, error, atom, options.atom, options.picture)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return result


if __name__ == "__main__":
    main()
