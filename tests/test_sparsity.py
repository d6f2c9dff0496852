"""Coefficients of which each element has few, against autograd."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.jets import Sparse

N, D = 10, 3  # particles and their coordinates: K = 30 directions


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers).double()


PHI, RHO, PAIR, WIDE = mlp(D, 8, 8), mlp(8, 8), mlp(2 * D + 1, 8), mlp(N * 8, 4)
WIDE_ONE = mlp(D, 8)
MASK = torch.arange(N * 8).reshape(N, 8) % 3 == 0
WEIGHT = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def particles(x):
    return x.reshape(*x.shape[:-1], N, D)


def pair_features(x):
    r = particles(x)
    between = r[..., :, None, :] - r[..., None, :, :]
    apart = torch.eye(N, dtype=x.dtype)[..., None]
    lengths = torch.linalg.vector_norm(between + apart, dim=-1, keepdim=True)
    own = r[..., :, None, :].expand_as(between)
    return PAIR(torch.cat([between, lengths, own], -1))


def written(x):
    out = x.new_zeros(*x.shape[:-1], N, 2)
    out[..., 0] = particles(x).sin().sum(-1)
    out[..., 1] = particles(x)[..., 0] * 2
    return (out**2).sum((-1, -2))


# functions of points (..., 30)
FUNCTIONS = {
    "a sum over particles": lambda x: RHO(PHI(particles(x)).sum(-2)),
    "a mean over particles": lambda x: RHO(PHI(particles(x)).mean(-2, keepdim=True)).squeeze(-2),
    "each particle": lambda x: PHI(particles(x)),
    "pairs": lambda x: RHO(pair_features(x).mean(-2).sum(-2)),
    "pairs of one particle": lambda x: pair_features(x)[..., 2, :, :].sum(-2),
    "all particles in one layer": lambda x: WIDE(PHI(particles(x)).flatten(-2)),
    "a product of neighbours": lambda x: (PHI(particles(x)) * PHI(particles(x)).roll(1, -2)).sum((-1, -2)),
    "a chain": lambda x: ((x[..., 1:] - x[..., :-1] ** 2) ** 2).sum(-1),
    "elementwise": lambda x: x.sin() * x.exp() / (1 + x**2),
    "elementwise, summed": lambda x: (x.sin() * x.exp()).sum(-1),
    "a plain layer": lambda x: mlp(N * D, 8)(x),
    "matmul": lambda x: (particles(x) @ WEIGHT.T).tanh().sum(-2),
    "einsum": lambda x: torch.einsum("...nd,ed->...ne", particles(x), WEIGHT).sin().sum((-1, -2)),
    "attention": lambda x: F.scaled_dot_product_attention(*PHI(particles(x)).chunk(2, -1)[:1] * 3).sum((-1, -2)),
    "layer norm": lambda x: (F.layer_norm(PHI(particles(x)), (8,)) ** 3).sum((-1, -2)),
    "softmax": lambda x: (torch.softmax(PHI(particles(x)), -1) ** 2).sum((-1, -2)),
    "softmax over particles": lambda x: (torch.softmax(PHI(particles(x)), -2) ** 2).sum((-1, -2)),
    "transpose, flip, roll": lambda x: (particles(x).mT.flip(-1).roll(2, -1).mT * particles(x)).sin().sum((-1, -2)),
    "repeat": lambda x: (particles(x).repeat(*[1] * (x.dim() - 1), 1, 2)).tanh() @ torch.ones(6, dtype=x.dtype),
    "index": lambda x: (particles(x)[..., [0, 3, 3, 7], :] * particles(x)[..., [1, 3, 2, 7], :]).sum(-1),
    "gather": lambda x: x.gather(-1, torch.tensor([0, 4, 4, 9]).expand(*x.shape[:-1], 4)).cos().prod(-1),
    "unfold": lambda x: x.unfold(-1, 4, 2).square().sum(-1).sqrt(),
    "diagonal": lambda x: (particles(x)[..., :3, :].diagonal(0, -2, -1) ** 3).sum(-1),
    "sort": lambda x: (x.sort(-1).values * torch.arange(30.0, dtype=x.dtype)).sin().sum(-1),
    "where": lambda x: torch.where(x > 0, x**2, x.sin()).sum(-1),
    "max": lambda x: PHI(particles(x)).amax(-2).square().sum(-1),
    "cumsum": lambda x: x.cumsum(-1).sin().sum(-1),
    "a constant beside": lambda x: torch.cat([particles(x), torch.ones_like(particles(x)[..., :1])], -1).sin(),
    "beside each other": lambda x: torch.cat([particles(x).sin(), particles(x).sum(-1, keepdim=True) ** 2], -1).exp(),
    "below each other": lambda x: torch.cat([particles(x).sin(), particles(x).mean(-2, keepdim=True) ** 2], -2),
    "stack": lambda x: torch.stack([x.sin(), x.cos()], -1).prod(-1),
    "a sum of both": lambda x: particles(x).sin() + particles(x).sum((-1, -2), keepdim=True) ** 2,
    "written": written,
    "norms": lambda x: torch.linalg.vector_norm(particles(x), dim=-1).log(),
    "a part of the coordinates": lambda x: x[..., 4:10].sin().sum(-1),
    "negated, divided": lambda x: (-particles(x) / (2 + particles(x) ** 2)).sum((-1, -2)),
    "variance": lambda x: particles(x).var(-1).sum(-1),
    "relu": lambda x: (PHI(particles(x)).relu() * particles(x)[..., :1]).sum((-1, -2)),
    "clamped, masked": lambda x: PHI(particles(x)).clamp(-0.3, 0.2).masked_fill(MASK, 0.5).square().sum(-1),
    "where of two": lambda x: torch.where(MASK, PHI(particles(x)), PHI(particles(x)).roll(1, -2)).sin().sum((-1, -2)),
    "stacked particles": lambda x: torch.stack([PHI(r) for r in particles(x).unbind(-2)], -2).square().sum(-1),
    "stacked beside": lambda x: torch.stack([PHI(particles(x)), PHI(particles(x)).flip(-2)], -1).prod(-1).sum(-1),
    "groups of particles": lambda x: torch.cat([PHI(particles(x)[..., :4, :]), WIDE_ONE(particles(x)[..., 4:, :])], -2),
    "a constant below": lambda x: torch.cat([particles(x), torch.ones_like(particles(x)[..., :1, :])], -2).sin(),
    "products of pairs": lambda x: (
        (PHI(particles(x)).unsqueeze(-2) * PHI(particles(x)).unsqueeze(-3)).tanh().sum((-1, -2, -3))
    ),
    "cross products": lambda x: torch.linalg.cross(particles(x), particles(x).roll(1, -2)).square().sum(-1),
    "sorted features": lambda x: (PHI(particles(x)).sort(-1).values * torch.arange(8.0, dtype=x.dtype)).sum((-1, -2)),
    "largest features": lambda x: PHI(particles(x)).topk(2, -1).values.prod(-1),
    "repeated": lambda x: PHI(particles(x)).repeat_interleave(2, -2).square().sum(-1),
    "an empty part": lambda x: torch.cat([PHI(particles(x)[..., :0, :]), PHI(particles(x))[..., 3:5, :]], -2).sum(-1),
    "sums over nothing": lambda x: PHI(particles(x)[..., :0, :]).sum(-2) + PHI(particles(x)[..., 0, :]),
}
KEPT = [
    "relu", "clamped, masked", "stacked particles", "stacked beside", "groups of particles", "cross products",
    "sorted features", "largest features", "repeated", "where of two",
]  # fmt: skip


def one_by_one(f, x):
    """Jacobian and Laplacian of each point, by reverse mode over forward mode of torch."""
    first, second = [], []
    for point in x:
        jacobian = torch.autograd.functional.jacobian(f, point)
        first.append(jacobian)
        size = jacobian.numel() // len(point)

        def flat(z):
            return f(z).reshape(-1)

        rows = [torch.autograd.functional.hessian(lambda z, n=n: flat(z)[n], point).trace() for n in range(size)]
        second.append(torch.stack(rows).reshape(jacobian.shape[:-1]))
    return torch.stack(first), torch.stack(second)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    f = FUNCTIONS[name]
    x = torch.randn(2, N * D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, second = one_by_one(f, x)
    torch.testing.assert_close(jp.jacobian(f, x, batch_dim=0), first)
    torch.testing.assert_close(jp.laplacian(f, x, batch_dim=0), second)
    found = jp.value_and_laplacian(f, x, batch_dim=0)
    torch.testing.assert_close((found.gradient, found.laplacian), (first, second))
    torch.testing.assert_close(jp.laplacian(f, x[0]), second[0])
    torch.testing.assert_close(jp.laplacian(f, x, batch_dim=0, chunk=7), second)


def test_a_graph_to_weights_and_points():
    def loss():
        return jp.laplacian(FUNCTIONS["pairs"], x, batch_dim=0).square().sum()

    x = torch.randn(2, N * D, dtype=torch.float64, requires_grad=True)
    places = [x, PAIR[0].weight]
    found = torch.autograd.grad(loss(), places)
    for place, slope in zip(places, found, strict=True):
        v, h = torch.randn_like(place), 1e-5
        with torch.no_grad():
            values = []
            for step in (h, -2 * h):
                place += step * v
                values.append(loss())
            place += h * v
        torch.testing.assert_close((slope * v).sum(), (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_several_arguments_and_other_axes_of_points():
    def f(x, y):
        return (x[:, None] - y[None]).square().sum(-1).exp().sum()

    x, y = torch.randn(4, 3, dtype=torch.float64) / 3, torch.randn(5, 3, dtype=torch.float64) / 3
    hessian = torch.autograd.functional.hessian(f, (x, y))
    expected = hessian[0][0].reshape(12, 12).trace() + hessian[1][1].reshape(15, 15).trace()
    torch.testing.assert_close(jp.laplacian(f, (x, y)), expected)
    points = torch.randn(N * D, 3, dtype=torch.float64)
    at_end = jp.laplacian(lambda z: FUNCTIONS["a sum over particles"](z.mT).mT, points, batch_dim=1)
    torch.testing.assert_close(at_end, jp.laplacian(FUNCTIONS["a sum over particles"], points.mT, batch_dim=0).mT)


def test_single_precision_many_points():
    net, x = mlp(D, 32, 32).float(), torch.randn(300, N * D)

    def f(x):
        return net(particles(x)).sum((-1, -2))

    found = jp.laplacian(f, x, batch_dim=0)
    net.double()
    torch.testing.assert_close(found.double(), jp.laplacian(f, x.double(), batch_dim=0), rtol=1e-4, atol=1e-4)


def test_nested():
    x = torch.randn(2, 12, dtype=torch.float64) / 2

    def f(x):
        return x.reshape(*x.shape[:-1], 4, 3).square().sum(-1).sin().sum(-1)

    outer = torch.stack([
        torch.autograd.functional.hessian(
            lambda z: torch.func.hessian(f)(z).diagonal().sum(), point
        ).trace() for point in x
    ])  # fmt: skip
    torch.testing.assert_close(jp.bilaplacian(f, x, batch_dim=0), outer)


def test_few_rows_are_carried(monkeypatch):
    """What would have 30 rows has as many as a feature depends on."""
    seen = []
    kept = Sparse.with_rows
    monkeypatch.setattr(Sparse, "with_rows", lambda self, rows: seen.append(rows.shape[0]) or kept(self, rows))
    monkeypatch.setattr(Sparse, "materialized", lambda self: pytest.fail("made dense"))
    jp.laplacian(FUNCTIONS["a sum over particles"], torch.randn(2, N * D, dtype=torch.float64), batch_dim=0)
    assert max(seen) == D
    seen.clear()
    jp.laplacian(lambda x: pair_features(x).sum((-1, -2, -3)), torch.randn(2, N * D, dtype=torch.float64), batch_dim=0)
    assert max(seen) == 2 * D


@pytest.mark.parametrize("name", KEPT)
def test_what_moves_or_picks_elements_keeps_few_rows(name, caplog):
    x = torch.randn(2, N * D, dtype=torch.float64)
    with caplog.at_level(logging.INFO, "jetplane.transforms"), torch.no_grad():
        jp.value_and_laplacian(FUNCTIONS[name], x, batch_dim=0)
    assert "dense" not in caplog.text


def test_the_log_says_where_they_become_dense(caplog):
    with caplog.at_level(logging.INFO, "jetplane.transforms"):
        jp.laplacian(FUNCTIONS["attention"], torch.randn(2, N * D, dtype=torch.float64), batch_dim=0)
    assert "dense" in caplog.text and "scaled_dot_product_attention" in caplog.text


@pytest.mark.parametrize("seed", range(30))
def test_arithmetic(seed):
    """Random sequences of operations, against the dense tensors."""
    draw = torch.Generator().manual_seed(seed)

    def number(n):
        return int(torch.randint(n, (), generator=draw))

    like = torch.randn(2, 5, 4, dtype=torch.float64, generator=draw)
    start = Sparse.axes(like, torch.arange(20).reshape(5, 4) - number(6), 20)
    some = [start.with_rows(start.rows * torch.randn(start.rows.shape, dtype=torch.float64, generator=draw))]
    moves = [
        lambda c: c.flip(-1), lambda c: c.roll(1, -2), lambda c: c[..., [0, 1, 1, 3]],
        lambda c: c[:, :, [4, 0, 2, 3, 3]], lambda c: c, lambda c: c[:, [1, 0]],
    ]  # fmt: skip
    for _ in range(8):
        a, b = some[number(len(some))], some[number(len(some))]
        x, y = a.materialized(), b.materialized()
        found = a.moved(move := moves[number(len(moves))])
        torch.testing.assert_close(found.materialized(), move(x))
        some.append(found)
        if (total := found.plus(b, -0.5)) is not None:
            torch.testing.assert_close(total.materialized(), move(x) - 0.5 * y)
            some.append(total)
        last = some[-1]
        dense = last.materialized()
        torch.testing.assert_close(last.inner(last), dense.square().sum(0, keepdim=True))
        if b.shape == last.shape:
            torch.testing.assert_close(last.inner(b), (dense * y).sum(0, keepdim=True))
        for dims in ([-1], [-2], [-3, -1]):
            if (gathered := last.gathered(dims)) is not None:
                torch.testing.assert_close(gathered.materialized(), dense)
                torch.testing.assert_close(gathered.inner(gathered), dense.square().sum(0, keepdim=True))
            summed = last.summed(dims)
            summed = summed if isinstance(summed, torch.Tensor) else summed.materialized()
            torch.testing.assert_close(summed, dense.sum(dims, keepdim=True))
        for dim in (-1, -2):
            shape = [2, 5, 4]
            shape[dim] *= 3
            if (joined := Sparse.joined([last, shape[dim] // 3, a], shape, dim)) is not None:
                torch.testing.assert_close(joined.materialized(), torch.cat([dense, 0 * x, x], dim))
