"""Laws by their statistics: moments, distribution functions, and independence of whatever lies next to each other."""

import math

import pytest
import torch

from jetplane.directions import KURTOSIS, Directions, laws

DENSE = list(laws.LAWS)


def draw(law: str, n: int, index: int = 0, seed: int = 0, step: int = 0) -> torch.Tensor:
    directions = Directions(1, law, seed=seed)
    directions.step = step
    return directions.draw(index, torch.empty(n))[0]


N = 1 << 19
CDF = {
    "gaussian": torch.special.ndtr,
    "uniform": lambda x: (x / math.sqrt(3) + 1) / 2,
    "laplace": lambda x: (1 + x.sign() * (1 - torch.exp(-math.sqrt(2) * x.abs()))) / 2,
    "semicircle": lambda x: 0.5 + x * (4 - x**2).sqrt() / (4 * math.pi) + torch.asin(x / 2) / math.pi,
}


@pytest.mark.parametrize("law", DENSE)
def test_moments(law):
    x = draw(law, N).double()
    assert abs(x.mean()) < 5 / math.sqrt(N)
    # Five standard errors, which the sample's own higher moments give.
    assert abs((x**2).mean() - 1) <= 5 * (x**2).std() / math.sqrt(N) + 1e-12
    assert abs((x**3).mean()) < 5 * (x**3).std() / math.sqrt(N)
    assert abs((x**4).mean() - KURTOSIS[law]) <= 5 * (x**4).std() / math.sqrt(N) + 1e-12


@pytest.mark.parametrize("law", CDF)
def test_law_by_kolmogorov_and_smirnov(law):
    x = draw(law, N, seed=3).double().sort().values
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    gap = torch.maximum(steps[1:] - CDF[law](x), CDF[law](x) - steps[:-1]).max()
    assert gap < 1.95 / math.sqrt(N)  # one in a thousand


def test_signs_are_fair_in_every_bit():
    assert set(draw("rademacher", 1000).tolist()) == {-1.0, 1.0}
    means = draw("rademacher", 64 * 4096).reshape(64, 4096).mean(1)
    assert means.abs().max() < 5 / math.sqrt(4096)


NEIGHBOURS = {
    "seeds": lambda law: (draw(law, N, seed=1), draw(law, N, seed=2)),
    "steps": lambda law: (draw(law, N, step=1), draw(law, N, step=2)),
    "seed and step": lambda law: (draw(law, N, seed=1, step=2), draw(law, N, seed=2, step=1)),
    "parameters": lambda law: (draw(law, N, index=0), draw(law, N, index=1)),
    "directions": lambda law: Directions(2, law).draw(0, torch.empty(N)),
    "elements": lambda law: (draw(law, N)[:-1], draw(law, N)[1:]),
    "halves": lambda law: draw(law, N).chunk(2),
}


@pytest.mark.parametrize("law", DENSE)
@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_independent(law, pair):
    a, b = (x.double() for x in NEIGHBOURS[pair](law))
    shapes = [lambda x: x] if law == "rademacher" else [lambda x: x, lambda x: x**2, torch.sign]
    for f in shapes:
        for g in shapes:
            table = torch.stack([f(a), g(b)])
            assert abs(torch.corrcoef(table)[0, 1]) < 5 / math.sqrt(a.numel())


def test_pairs_of_directions_fill_the_square_evenly():
    a, b = Directions(2, "uniform").draw(0, torch.empty(N))
    cells = 64
    x, y = (((v / math.sqrt(3) + 1) / 2 * cells).long().clamp(0, cells - 1) for v in (a, b))
    counts = torch.bincount(x * cells + y, minlength=cells**2).double()
    chi = ((counts - N / cells**2) ** 2 / (N / cells**2)).sum()
    assert abs(chi - cells**2) < 5 * math.sqrt(2 * cells**2)
