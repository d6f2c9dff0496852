"""Random programs of many operators as functions: Jacobian, Laplacian and their graph, against reverse mode."""

import random

import pytest
import torch
from torch.nn import functional as F

import jetplane as jp

D = 12
LIMIT = 200  # numbers of a value


def squares(x):
    """The same rows beside and below, through writes into a buffer and a view."""
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        out[n] = x[x.shape[0] - 1 - n] * (n + 1)
    first = out[0]
    first.sin_()
    return out


# operations on a value x of one axis or more, and another value y of the same shape
OPERATIONS = {
    "sin": lambda x, y, d: x.sin(),
    "tanh": lambda x, y, d: x.tanh() * 1.5,
    "relu": lambda x, y, d: F.relu(x),
    "quotient": lambda x, y, d: x / (2 + y.sin()),
    "product": lambda x, y, d: x * y,
    "sum": lambda x, y, d: torch.add(x, y, alpha=-0.7),
    "maximum": lambda x, y, d: torch.maximum(x, 0.9 * y),
    "where": lambda x, y, d: torch.where(x > y, x, 2 * y),
    "mask": lambda x, y, d: x.masked_fill(x.detach() > 0.7, 0.3),
    "power": lambda x, y, d: x**2,
    "flip": lambda x, y, d: x.flip(d),
    "roll": lambda x, y, d: x.roll(1, d),
    "transposed": lambda x, y, d: x.movedim(d, 0),
    "cat": lambda x, y, d: torch.cat([x, torch.ones_like(x[:1]).expand_as(x), y], d),
    "stack": lambda x, y, d: torch.stack([x, y.sin()], d),
    "stack at the end": lambda x, y, d: torch.stack([x, y.flip(0)], -1),
    "select": lambda x, y, d: x.index_select(d, torch.tensor([0, 0, -1]) % x.shape[d]),
    "index": lambda x, y, d: x[[0, -1, 0]],
    "gather": lambda x, y, d: x.gather(d, x.detach().argsort(d)),
    "sort": lambda x, y, d: x.sort(d).values,
    "largest": lambda x, y, d: x.topk(1, d).values,
    "pad": lambda x, y, d: F.pad(x, (1, 0), value=0.2),
    "repeat": lambda x, y, d: x.repeat_interleave(2, d),
    "pairs": lambda x, y, d: x.unsqueeze(1) - y.unsqueeze(0),
    "outer": lambda x, y, d: x.unsqueeze(-1) * y.unsqueeze(-2),
    "sums": lambda x, y, d: x.sum(d, keepdim=True),
    "mean": lambda x, y, d: x.mean(d),
    "norm": lambda x, y, d: torch.linalg.vector_norm(x + 0.3, dim=d),
    "layer": lambda x, y, d: F.linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype).cumsum(0) / 4, torch.ones(3).to(x)),
    "product of matrices": lambda x, y, d: 0.3 * x @ y.mT if x.dim() > 1 else x,
    "softmax": lambda x, y, d: torch.softmax(x, d),
    "cumulative": lambda x, y, d: x.cumsum(d),
    "written": lambda x, y, d: squares(x),
    "scattered": lambda x, y, d: x.scatter_add(d, torch.zeros_like(x, dtype=torch.long), y.cos()),
    "reduced": lambda x, y, d: x.scatter_reduce(d, (x.detach() > 0).long() % x.shape[d], y, "amax"),
    "vmap": lambda x, y, d: torch.vmap(lambda a, b: (a * b.sin()).sum())(x, y),
    "complex": lambda x, y, d: torch.complex(x, y.sin()).abs(),
    "halves": lambda x, y, d: x.chunk(2, d)[-1],
    "apart": lambda x, y, d: x.unbind(d)[0],
    "constant": lambda x, y, d: x * y.detach(),
}


def program(seed):
    """A function of 12 numbers, and the names of its steps."""
    draw = random.Random(seed)
    shape = draw.choice([(4, 3), (12,), (2, 3, 2), (6, 2)])
    steps, shapes = [], [shape]
    x = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    while len(steps) < 6:
        name, n, m, dim = draw.choice(list(OPERATIONS)), draw.randrange(len(shapes)), draw.random(), draw.random()
        step = name, n, [k for k, s in enumerate(shapes) if s == shapes[n]], m, dim
        y = run([*steps, step], shape, x)
        if not y.dim() or not 0 < y.numel() <= LIMIT or y.dim() > 4 or y.abs().max() > 100:
            continue
        steps.append(step)
        shapes.append(tuple(y.shape))
    weight = torch.randn(2, y.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (lambda x: weight @ run(steps, shape, x).flatten()), x, [name for name, *_ in steps]


def run(steps, shape, x):
    values = [x.reshape(shape)]
    for name, n, partners, m, dim in steps:
        other = values[partners[int(m * len(partners))]]
        values.append(OPERATIONS[name](values[n], other, int(dim * values[n].dim())))
    return values[-1]


def reverse(f, x):
    """Jacobian and Laplacian, with a graph."""
    first, second = [], []
    for y in f(x).unbind():
        (g,) = torch.autograd.grad(y, x, create_graph=True) if y.requires_grad else (torch.zeros_like(x),)
        rows = [
            torch.autograd.grad(e, x, create_graph=True, allow_unused=True)[0] if e.requires_grad else None for e in g
        ]
        first.append(g)
        second.append(sum((row[n] for n, row in enumerate(rows) if row is not None), torch.zeros((), dtype=x.dtype)))
    return torch.stack(first), torch.stack(second)


@pytest.mark.parametrize("seed", range(70))
def test_random_programs(seed):
    f, x, names = program(seed)
    x.requires_grad_()
    jacobian, laplacian = reverse(f, x)
    found = jp.value_and_laplacian(f, x)
    weights = torch.linspace(-1, 1, D, dtype=x.dtype), torch.tensor([0.3, -0.8], dtype=x.dtype)

    def slope(jacobian, laplacian):
        total = (jacobian @ weights[0]).sum() + laplacian @ weights[1]
        return torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m: f"{names}: {m}")

    close(found.gradient, jacobian)
    close(found.laplacian, laplacian)
    zero = torch.zeros_like(x)
    a, b = (slope(*of) for of in ((found.gradient, found.laplacian), (jacobian, laplacian)))
    close(zero if a is None else a, zero if b is None else b)
    with torch.no_grad():
        close(jp.jacobian(f, x), jacobian.detach())
        close(jp.laplacian(f, x, chunk=7), laplacian.detach())
