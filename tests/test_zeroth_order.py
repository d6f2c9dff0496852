"""Zeroth-order optimizers against the formulas of their papers, on a quadratic that records where it is evaluated."""

import pytest
import torch
from torch import Tensor

from jetplane.errors import ArgumentError, NonFiniteError
from jetplane.experiments.zeroth_order import FZOO, LOZO, HiZOO, MeZO, ZerothOrder

EPS, RATE = 1e-2, 3e-2


class Quadratic:
    """``L(theta) = theta^T H theta / 2 + b^T theta`` of a matrix and a vector, in double precision."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.vector = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
        root = torch.randn(17, 17, generator=generator, dtype=torch.float64)
        self.h, self.b = root @ root.T / 17, torch.randn(17, generator=generator, dtype=torch.float64)
        self.places: list[Tensor] = []

    @property
    def params(self) -> list[Tensor]:
        return [self.matrix, self.vector]

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params])

    def at(self, theta: Tensor) -> Tensor:
        return theta @ self.h @ theta / 2 + self.b @ theta

    def closure(self) -> Tensor:
        self.places.append(self.theta)
        return self.at(self.theta)

    def stepped(self, opt: ZerothOrder) -> tuple[Tensor, list[Tensor], Tensor]:
        """Weights before a step, where the loss was evaluated, and weights after it."""
        self.places, before = [], self.theta
        opt.step(self.closure)
        return before, self.places, self.theta


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_mezo():
    loss, seen = Quadratic(), []
    opt = MeZO(loss.params, lr=RATE, eps=EPS, seed=3)
    for _ in range(2):
        before, (above, below), after = loss.stepped(opt)
        z = (above - before) / EPS
        same(below, before - EPS * z)
        g = (loss.at(above) - loss.at(below)) / (2 * EPS)
        same(after, before - RATE * g * z)
        seen.append(z)
    assert (seen[0] - seen[1]).abs().max() > 0.1  # another direction in each step


def test_fzoo():
    loss = Quadratic()
    opt = FZOO(loss.params, lr=RATE, eps=EPS, samples=5)
    for _ in range(2):
        before, (here, *others), after = loss.stepped(opt)
        same(here, before)
        u = (torch.stack(others) - before) / EPS
        same(u.abs(), torch.ones_like(u))
        assert len(u) == 5 and len(u.round().unique(dim=0)) == 5
        losses = torch.stack([loss.at(place) for place in others])
        sigma = (losses - losses.mean()).square().mean().sqrt()
        g = ((losses - loss.at(before)).unsqueeze(1) * u).mean(0)
        same(after, before - RATE * g / sigma)


def test_hizoo():
    loss, alpha = Quadratic(), 0.2
    opt = HiZOO(loss.params, lr=RATE, eps=EPS, smooth=alpha)
    inverse = torch.ones_like(loss.theta)  # of Sigma
    for _ in range(3):
        before, (here, above, below), after = loss.stepped(opt)
        same(here, before)
        same(below, 2 * before - above)
        u = (above - before) / EPS * inverse.sqrt()
        bend = loss.at(above) + loss.at(below) - 2 * loss.at(before)
        inverse = (1 - alpha) * inverse + alpha * bend.abs() / (2 * EPS**2) * u * u * inverse
        g = (loss.at(above) - loss.at(below)) / (2 * EPS)
        same(after, before - RATE * g * u / inverse.sqrt())
    assert (inverse - 1).abs().max() > 0.1


def test_lozo():
    loss, bases, rank = Quadratic(), [], 2
    opt = LOZO(loss.params, lr=RATE, eps=EPS, rank=rank, interval=2)
    for _ in range(4):
        before, (above, below), after = loss.stepped(opt)
        z = (above - before) / EPS
        same(below, before - EPS * z)
        left, values, right = torch.linalg.svd(z[:12].reshape(4, 3))
        assert values[rank - 1] > 1e-3 and values[rank] < 1e-9  # U V^T has rank r
        bases.append(right[:rank].T @ right[:rank])  # what V spans
        g = (loss.at(above) - loss.at(below)) / (2 * EPS)
        same(after, before - RATE * g * z)
    same(bases[0], bases[1])
    same(bases[2], bases[3])
    assert (bases[1] - bases[2]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [MeZO, FZOO, HiZOO, LOZO])
def test_perturbations_have_the_moments_of_their_law(kind):
    p = torch.zeros(200, 300, requires_grad=True)
    opt = kind([p], lr=1.0)
    z = torch.cat([z.flatten() for _, z in opt._drawn()])
    assert z.mean().abs() < 0.1 and 0.7 < z.std() < 1.4


@pytest.mark.parametrize("kind", [MeZO, FZOO, HiZOO, LOZO])
def test_what_is_frozen_stays_and_a_loss_that_is_not_finite_moves_nothing(kind):
    loss = Quadratic()
    loss.vector.requires_grad_(False)
    kept = loss.vector.clone()
    opt = kind(loss.params, lr=RATE)
    opt.step(loss.closure)
    assert torch.equal(loss.vector, kept)
    before, calls = loss.theta, []

    def breaks() -> Tensor:
        calls.append(1)
        return loss.at(loss.theta) * (torch.nan if len(calls) > 1 else 1)

    with pytest.raises(NonFiniteError, match="smaller rate"):
        opt.step(breaks)
    same(loss.theta, before)


def test_equal_seeds_give_equal_steps():
    ends = []
    for seed in (1, 1, 2):
        loss = Quadratic()
        opt = MeZO(loss.params, lr=RATE, seed=seed)
        for _ in range(3):
            opt.step(loss.closure)
        ends.append(loss.theta)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(MeZO, {"lr": 0.0}), (MeZO, {"eps": -1.0}), (FZOO, {"samples": 1}), (HiZOO, {"smooth": 2.0}), (LOZO, {"rank": 0})],
)
def test_settings_that_cannot_be(kind, settings):
    with pytest.raises(ArgumentError, match="must be"):
        kind([torch.ones(2, requires_grad=True)], **({"lr": 0.1} | settings))
