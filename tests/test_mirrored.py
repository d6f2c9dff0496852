"""The Laplacian of a Laplacian, whose two evaluations share their mixed derivatives, against nested torch.func."""

import pytest
import torch
from torch.func import hessian, vmap

import jetplane as jp
from jetplane.jets import Mirrored

W, V = (torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 6))


def twice(f, x):
    """Traces of Hessians of traces of Hessians, at each point."""

    def trace(g):
        return lambda z: hessian(g)(z).diagonal(dim1=-2, dim2=-1).sum(-1)

    return vmap(trace(trace(lambda z: f(z[None])[0])))(x)


def rows():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


KEPT = {
    "layers": lambda x: torch.tanh(torch.tanh(x @ W) @ V).sum(1),
    "an elementwise function of the point": lambda x: (x.sin() @ W).sigmoid().sum(1),
    "sums of positions": lambda x: torch.nn.functional.linear(x[:, None], V[:, :4]).cos().flatten(1).exp().sum(1),
    "a constant": lambda x: (x @ W + 1).sin().sum(1),
}
IN_FULL = {
    "a product": lambda x: (x @ W).tanh().prod(1),
    "a residual connection": lambda x: ((x @ W) + (x @ W).tanh()).sin().sum(1),
    "a scaled argument": lambda x: (2 * (x @ W)).sin().sum(1),
    "a function that may be infinite": lambda x: (2 + (x @ W).sin()).log().sum(1),
    "a softmax": lambda x: (x @ W).softmax(-1).square().sum(1),
    "a matrix of the point": lambda x: ((x[:, None] @ torch.diag_embed(x))[:, 0] @ W).tanh().sum(1),
    "writes in place": lambda x: (x @ W).tanh().clone().mul_(2).add_(x[:, :1]).sigmoid().sum(1),
    "sharing with what is written": lambda x: _shared(x @ W),
}


def _shared(h):
    a = h.tanh()
    b = a + 1
    a.mul_(3)
    return (b.sin() * a).sum(1)


@pytest.mark.parametrize("name", [*KEPT, *IN_FULL])
@pytest.mark.parametrize("graph", [False, True])
def test_against_nested_hessians(name, graph):
    f = {**KEPT, **IN_FULL}[name]
    with torch.set_grad_enabled(graph):
        found = jp.bilaplacian(f, rows(), batch_dim=0)
    try:
        expected = twice(f, rows())
    except RuntimeError:  # vmap does not take writes in place of this kind
        expected = jp.laplacian(lambda x: jp.laplacian(f, x, batch_dim=0), rows(), batch_dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KEPT)
def test_the_form_is_kept(name, monkeypatch):
    """Nothing is formed in full: channels are 2 (D + 2) + D (D + 1) / 2."""
    monkeypatch.setattr(Mirrored, "materialized", lambda self: pytest.fail("formed in full"))
    assert jp.bilaplacian(KEPT[name], rows(), batch_dim=0).shape == (3,)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, c: ((x + c) @ W).tanh().sum(1),
        lambda x, c: (c * (x @ W[:, :4])).sin().sum(1),
        lambda x, c: torch.linalg.solve(torch.diag_embed(c.square() + 2), x).tanh().sum(1),
    ],
)
def test_detached_copies_of_the_point_do_not_move(f):
    found = jp.bilaplacian(lambda x: f(x, x.detach()), rows(), batch_dim=0)
    at = rows()
    each = [twice(lambda x, n=n: f(x, at[n : n + 1]), at[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(found, torch.cat(each), rtol=1e-10, atol=1e-10)


def test_several_arguments_and_a_graph():
    a, b = rows()[:, :1], rows()[:, 1:]
    w = W.clone().requires_grad_()

    def f(a, b):
        return torch.tanh(torch.tanh(torch.cat([a, b], 1) @ w) @ V).sum(1)

    found = jp.bilaplacian(f, (a, b), batch_dim=0)
    torch.testing.assert_close(found.detach(), twice(lambda x: f(x[:, :1], x[:, 1:]), rows()).detach())
    gradient = torch.autograd.grad(found.square().sum(), w)[0]

    def of(w):
        return twice(lambda x: torch.tanh(torch.tanh(x @ w) @ V).sum(1), rows()).square().sum()

    torch.testing.assert_close(gradient, torch.func.grad(of)(W))
