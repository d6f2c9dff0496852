"""Wave functions of electrons in plain torch, whose kinetic energy is a Laplacian of log |psi| at each configuration.

Two networks of the sizes that tests of such packages have: a FermiNet (Pfau et al., arXiv 1909.02487) with streams of
electrons and of pairs, and a network of self-attention between electrons (PsiFormer, von Glehn et al., arXiv
2211.13672). Both end in a sum of determinants of orbitals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UP = 4  # of the electrons; the others' spin is down
NUCLEI = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])


def lengths(x: Tensor) -> Tensor:
    """Norms along the last axis, which stays."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class Orbitals(nn.Module):
    """``log |sum_k det(phi_k)|`` of orbitals that are linear in features, with an exponential envelope."""

    def __init__(self, electrons: int, features: int, determinants: int) -> None:
        super().__init__()
        self.shape = determinants, electrons
        self.linear = nn.Linear(features, determinants * electrons)
        self.decay = nn.Parameter(torch.ones(len(NUCLEI), determinants * electrons))
        self.weight = nn.Parameter(torch.ones(len(NUCLEI), determinants * electrons))

    def forward(self, features: Tensor, distances: Tensor) -> Tensor:
        """Of features (B, electrons, features) and distances to nuclei (B, electrons, nuclei)."""
        envelope = (torch.exp(-distances.unsqueeze(-1) * self.decay) * self.weight).sum(-2)
        orbitals = (self.linear(features) * envelope).unflatten(-1, self.shape).movedim(-2, -3)
        sign, logabsdet = torch.linalg.slogdet(orbitals)
        largest = logabsdet.detach().amax(-1, keepdim=True)
        return (sign * torch.exp(logabsdet - largest)).sum(-1).abs().log() + largest.squeeze(-1)


class FermiNet(nn.Module):
    """Layers of ``h_i = tanh(W [h_i, means of h, means of g_ij])`` and ``g_ij = tanh(V g_ij)``, with residuals."""

    def __init__(
        self, electrons: int = 8, single: int = 64, pair: int = 16, layers: int = 3, determinants: int = 4
    ) -> None:
        super().__init__()
        self.electrons = electrons
        singles, pairs = [4 * len(NUCLEI), *[single] * layers], [4, *[pair] * layers]
        self.singles = nn.ModuleList(
            nn.Linear(3 * h + 2 * g, after) for h, g, after in zip(singles, pairs, singles[1:], strict=False)
        )
        self.pairs = nn.ModuleList(nn.Linear(g, after) for g, after in zip(pairs[:-2], pairs[1:-1], strict=True))
        self.orbitals = Orbitals(electrons, single, determinants)

    def forward(self, x: Tensor) -> Tensor:
        """``log |psi|`` (B,) of configurations (B, 3 electrons)."""
        r = x.unflatten(-1, (self.electrons, 3))
        to_nuclei = r.unsqueeze(-2) - NUCLEI.to(r)
        distances = lengths(to_nuclei)
        h = torch.cat([to_nuclei, distances], -1).flatten(-2)
        between = r.unsqueeze(-2) - r.unsqueeze(-3)
        apart = torch.eye(self.electrons, dtype=r.dtype).unsqueeze(-1)
        g = torch.cat([between, lengths(between + apart) * (1 - apart)], -1)
        for n, single in enumerate(self.singles):
            means = [part.mean(-2, keepdim=True).expand_as(h) for part in (h[..., :UP, :], h[..., UP:, :])]
            mixed = torch.cat([h, *means, g[..., :UP, :].mean(-2), g[..., UP:, :].mean(-2)], -1)
            new = torch.tanh(single(mixed))
            h = new if n == 0 else h + new
            if n < len(self.pairs):
                new = torch.tanh(self.pairs[n](g))
                g = new if n == 0 else g + new
        return self.orbitals(h, distances.squeeze(-1))


class PsiFormer(nn.Module):
    """Layers of self-attention between electrons and a perceptron of one layer, with residuals."""

    def __init__(
        self, electrons: int = 8, features: int = 64, heads: int = 4, layers: int = 2, determinants: int = 4
    ) -> None:
        super().__init__()
        self.electrons, self.heads = electrons, heads
        self.enter = nn.Linear(4 * len(NUCLEI) + 1, features)
        self.projections = nn.ModuleList(nn.Linear(features, 3 * features) for _ in range(layers))
        self.outputs = nn.ModuleList(nn.Linear(features, features) for _ in range(layers))
        self.perceptrons = nn.ModuleList(nn.Linear(features, features) for _ in range(layers))
        self.orbitals = Orbitals(electrons, features, determinants)

    def forward(self, x: Tensor) -> Tensor:
        """``log |psi|`` (B,) of configurations (B, 3 electrons)."""
        r = x.unflatten(-1, (self.electrons, 3))
        to_nuclei = r.unsqueeze(-2) - NUCLEI.to(r)
        distances = lengths(to_nuclei)
        spin = torch.where(torch.arange(self.electrons) < UP, 1.0, -1.0).to(r)[:, None].expand(*r.shape[:-1], 1)
        h = self.enter(torch.cat([torch.cat([to_nuclei, distances], -1).flatten(-2), spin], -1))
        for projection, output, perceptron in zip(self.projections, self.outputs, self.perceptrons, strict=True):
            q, k, v = projection(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
            h = h + output(mixed)
            h = h + torch.tanh(perceptron(h))
        return self.orbitals(h, distances.squeeze(-1))


class Particles(nn.Module):
    """``rho(sum_n phi(x_n))``, one number for particles whose order does not matter."""

    def __init__(self, particles: int = 50, coordinates: int = 4, features: int = 64) -> None:
        super().__init__()
        self.shape = particles, coordinates
        sizes = [coordinates, *[features] * 3]
        self.each = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.head = nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Of configurations (B, particles coordinates)."""
        h = x.unflatten(-1, self.shape)
        for layer in self.each:
            h = torch.tanh(layer(h))
        return self.head(h.sum(-2)).squeeze(-1)


def problem(kind: type[nn.Module], batch: int = 64, electrons: int = 8) -> tuple[nn.Module, Tensor]:
    """A network and configurations, the same in every process.

    Weights are twice those that layers start with: orbitals differ more then, and determinants are further from zero.
    """
    torch.manual_seed(0)
    net = kind(electrons).requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight *= 2
    return net, torch.randn(batch, 3 * electrons, generator=torch.Generator().manual_seed(2))
