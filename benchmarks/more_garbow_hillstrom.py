"""The test problems of Moré, Garbow and Hillstrom: sums of squares with a standard start and known minima.

Source: J. J. Moré, B. S. Garbow, K. E. Hillstrom, Testing unconstrained optimization software, ACM Transactions on
Mathematical Software 7 (1981). Numbers and names of problems are the paper's, and so are the sizes, where it has some.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Residuals = Callable[[Tensor], Tensor]


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def count(n: int) -> Tensor:
    """1, ..., n."""
    return torch.arange(1, n + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        number: in the paper.
        name: likewise.
        residuals: a function of x (n,), (m,).
        start: (n,).
        minima: of the sum of squares, known ones: the lowest first, local ones and those at infinity after it.
    """

    number: int
    name: str
    residuals: Residuals
    start: Tensor
    minima: tuple[float, ...] = (0.0,)

    @property
    def n(self) -> int:
        return len(self.start)


BARD = vector(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
GAUSSIAN = vector(
    0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989, 0.3521, 0.2420, 0.1295, 0.0540, 0.0175, 0.0044,
    0.0009,
)  # fmt: skip
MEYER = vector(
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872
)  # fmt: skip
KOWALIK = vector(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_U = vector(4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
OSBORNE_1 = vector(
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
    0.406,
)  # fmt: skip
OSBORNE_2 = vector(
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
    0.054,
)  # fmt: skip


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:
    return vector(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** count(3))


def jennrich_sampson(x: Tensor) -> Tensor:
    i = count(10)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


def helical_valley(x: Tensor) -> Tensor:
    a, b, c = x
    angle = torch.atan(b / a) / (2 * math.pi) + torch.where(a > 0, 0.0, 0.5)
    return torch.stack([10 * (c - 10 * angle), 10 * ((a**2 + b**2).sqrt() - 1), c])


def bard(x: Tensor) -> Tensor:
    u = count(15)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def gaussian(x: Tensor) -> Tensor:
    t = (8 - count(15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - GAUSSIAN


def meyer(x: Tensor) -> Tensor:
    return x[0] * torch.exp(x[1] / (45 + 5 * count(16) + x[2])) - MEYER


def gulf(x: Tensor) -> Tensor:
    t = count(99) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-((y - x[1]).abs() ** x[2]) / x[0]) - t


def box(x: Tensor) -> Tensor:
    t = count(10) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.reshape(-1, 4).T
    parts = [a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2]
    return torch.stack(parts, 1).flatten()


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [
            10 * (b - a**2),
            1 - a,
            math.sqrt(90) * (d - c**2),
            1 - c,
            math.sqrt(10) * (b + d - 2),
            (b - d) / math.sqrt(10),
        ]
    )


def kowalik_osborne(x: Tensor) -> Tensor:
    u = KOWALIK_U
    return KOWALIK - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:
    t = count(20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def osborne_1(x: Tensor) -> Tensor:
    t = 10 * (count(33) - 1)
    return OSBORNE_1 - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def biggs(x: Tensor) -> Tensor:
    t = count(13) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def osborne_2(x: Tensor) -> Tensor:
    t = (count(65) - 1) / 10
    bumps = sum(x[k + 1] * torch.exp(-((t - x[k + 8]) ** 2) * x[k + 5]) for k in range(3))
    return OSBORNE_2 - (x[0] * torch.exp(-t * x[4]) + bumps)


def watson(x: Tensor) -> Tensor:
    t, j = (count(29) / 29).unsqueeze(1), count(len(x))
    derivative = ((j - 1)[1:] * t ** (j - 2)[1:]) @ x[1:]
    rows = derivative - (t ** (j - 1) @ x) ** 2 - 1
    return torch.cat([rows, x[:1], (x[1] - x[0] ** 2 - 1).reshape(1)])


def extended_rosenbrock(x: Tensor) -> Tensor:
    a, b = x.reshape(-1, 2).T
    return torch.stack([10 * (b - a**2), 1 - a], 1).flatten()


def penalty_1(x: Tensor) -> Tensor:
    return torch.cat([math.sqrt(1e-5) * (x - 1), ((x**2).sum() - 0.25).reshape(1)])


def penalty_2(x: Tensor) -> Tensor:
    n, root, e = len(x), math.sqrt(1e-5), torch.exp(x / 10)
    i = count(n)[1:]
    y = torch.exp(i / 10) + torch.exp((i - 1) / 10)
    last = (((n - count(n) + 1) * x**2).sum() - 1).reshape(1)
    return torch.cat([(x[0] - 0.2).reshape(1), root * (e[1:] + e[:-1] - y), root * (e[1:] - math.exp(-0.1)), last])


def variably_dimensioned(x: Tensor) -> Tensor:
    s = (count(len(x)) * (x - 1)).sum().reshape(1)
    return torch.cat([x - 1, s, s**2])


def trigonometric(x: Tensor) -> Tensor:
    n, i = len(x), count(len(x))
    return n - torch.cos(x).sum() + i * (1 - torch.cos(x)) - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:
    n = len(x)
    return torch.cat([x[:-1] + x.sum() - (n + 1), (x.prod() - 1).reshape(1)])


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours before and after each number, zero beyond the ends."""
    zero = torch.zeros(1, dtype=x.dtype)
    return torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])


def discrete_boundary_value(x: Tensor) -> Tensor:
    before, after = padded(x)
    h = 1 / (len(x) + 1)
    return 2 * x - before - after + h**2 * (x + count(len(x)) * h + 1) ** 3 / 2


def discrete_integral_equation(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    t = count(len(x)) * h
    cube = (x + t + 1) ** 3
    left, right = t * cube, (1 - t) * cube
    up_to = left.cumsum(0)
    return x + h * ((1 - t) * up_to + t * (right.sum() - right.cumsum(0))) / 2


def broyden_tridiagonal(x: Tensor) -> Tensor:
    before, after = padded(x)
    return (3 - 2 * x) * x - before - 2 * after + 1


def broyden_banded(x: Tensor) -> Tensor:
    i = torch.arange(len(x))
    distance = i - i.unsqueeze(1)  # of column j from row i
    band = ((distance >= -5) & (distance <= 1) & (distance != 0)).double()
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def linear_full_rank(m: int) -> Residuals:
    def residuals(x: Tensor) -> Tensor:
        shared = -2 * x.sum() / m - 1
        return torch.cat([x + shared, shared.expand(m - len(x))])

    return residuals


def linear_rank_1(m: int) -> Residuals:
    return lambda x: count(m) * (count(len(x)) * x).sum() - 1


def linear_rank_1_zero(m: int) -> Residuals:
    def residuals(x: Tensor) -> Tensor:
        inner = (count(m) - 1)[1:-1] * (count(len(x))[1:-1] * x[1:-1]).sum() - 1
        return torch.cat([vector(-1), inner, vector(-1)])

    return residuals


def chebyquad(x: Tensor) -> Tensor:
    n, t = len(x), 2 * x - 1
    before, now, rows = torch.ones_like(t), t, []
    for i in range(1, n + 1):
        rows.append(now.mean() + (1 / (i**2 - 1) if i % 2 == 0 else 0))
        before, now = now, 2 * t * now - before
    return torch.stack(rows)


def spread(n: int) -> Tensor:
    """T (t - 1) with t = i / (n + 1)."""
    t = count(n) / (n + 1)
    return t * (t - 1)


PROBLEMS = [
    Problem(1, "Rosenbrock", rosenbrock, vector(-1.2, 1)),
    Problem(2, "Freudenstein and Roth", freudenstein_roth, vector(0.5, -2), (0.0, 48.98425)),
    Problem(3, "Powell badly scaled", powell_badly_scaled, vector(0, 1)),
    Problem(4, "Brown badly scaled", brown_badly_scaled, vector(1, 1)),
    Problem(5, "Beale", beale, vector(1, 1)),
    Problem(6, "Jennrich and Sampson", jennrich_sampson, vector(0.3, 0.4), (124.36218,)),
    Problem(7, "helical valley", helical_valley, vector(-1, 0, 0)),
    Problem(8, "Bard", bard, vector(1, 1, 1), (8.214877e-3, 17.42869)),
    Problem(9, "Gaussian", gaussian, vector(0.4, 1, 0), (1.127933e-8,)),
    Problem(10, "Meyer", meyer, vector(0.02, 4000, 250), (87.94586,)),
    Problem(11, "Gulf research", gulf, vector(5, 2.5, 0.15)),
    Problem(12, "Box three-dimensional", box, vector(0, 10, 20)),
    Problem(13, "Powell singular", powell_singular, vector(3, -1, 0, 1)),
    Problem(14, "Wood", wood, vector(-3, -1, -3, -1)),
    Problem(15, "Kowalik and Osborne", kowalik_osborne, vector(0.25, 0.39, 0.415, 0.39), (3.075056e-4, 1.027342e-3)),
    Problem(16, "Brown and Dennis", brown_dennis, vector(25, 5, -5, -1), (85822.2016,)),
    Problem(17, "Osborne 1", osborne_1, vector(0.5, 1.5, -1, 0.01, 0.02), (5.464895e-5,)),
    Problem(18, "Biggs EXP6", biggs, vector(1, 2, 1, 1, 1, 1), (0.0, 5.655650e-3)),
    Problem(
        19, "Osborne 2", osborne_2, vector(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), (4.013774e-2, 1.789813)
    ),
    Problem(20, "Watson, 6", watson, torch.zeros(6).double(), (2.287670e-3,)),
    Problem(20, "Watson, 9", watson, torch.zeros(9).double(), (1.399760e-6,)),
    Problem(20, "Watson, 12", watson, torch.zeros(12).double(), (4.722381e-10,)),
    Problem(21, "extended Rosenbrock, 10", extended_rosenbrock, vector(-1.2, 1).repeat(5)),
    Problem(22, "extended Powell singular, 12", powell_singular, vector(3, -1, 0, 1).repeat(3)),
    Problem(23, "penalty I, 4", penalty_1, count(4), (2.249978e-5,)),
    Problem(23, "penalty I, 10", penalty_1, count(10), (7.087651e-5,)),
    Problem(24, "penalty II, 4", penalty_2, torch.full((4,), 0.5).double(), (9.376293e-6,)),
    Problem(24, "penalty II, 10", penalty_2, torch.full((10,), 0.5).double(), (2.936605e-4,)),
    Problem(25, "variably dimensioned, 10", variably_dimensioned, 1 - count(10) / 10),
    Problem(26, "trigonometric, 10", trigonometric, torch.full((10,), 0.1).double(), (0.0, 2.795061e-5)),
    Problem(27, "Brown almost-linear, 10", brown_almost_linear, torch.full((10,), 0.5).double(), (0.0, 1.0)),
    Problem(28, "discrete boundary value, 10", discrete_boundary_value, spread(10)),
    Problem(29, "discrete integral equation, 10", discrete_integral_equation, spread(10)),
    Problem(30, "Broyden tridiagonal, 10", broyden_tridiagonal, -torch.ones(10).double()),
    Problem(31, "Broyden banded, 10", broyden_banded, -torch.ones(10).double()),
    Problem(32, "linear, full rank, 5 of 10", linear_full_rank(10), torch.ones(5).double(), (5.0,)),
    Problem(33, "linear, rank 1, 5 of 10", linear_rank_1(10), torch.ones(5).double(), (90 / 42,)),
    Problem(34, "linear, rank 1, zeros, 5 of 10", linear_rank_1_zero(10), torch.ones(5).double(), (124 / 34,)),
    Problem(35, "Chebyquad, 8", chebyquad, count(8) / 9, (3.516874e-3,)),
    Problem(35, "Chebyquad, 10", chebyquad, count(10) / 11, (4.772714e-3, 6.503955e-3)),
]
