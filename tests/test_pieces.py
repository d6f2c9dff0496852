"""Features side by side stay pieces until an operator needs one stack, and layers multiply each piece."""

import pytest
import torch
from torch.autograd.functional import hessian

import jetplane as jp
from jetplane.jets import coefficients

W = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).double()


def mixed(x, *more):
    """A layer of electrons: own features, a mean that all share, constants, something that moves elsewhere."""
    r = x.unflatten(-1, (4, 3))
    shared = r.sin().mean(-2, keepdim=True).expand_as(r)
    constant = torch.ones(*r.shape[:-1], 2, dtype=r.dtype)
    return torch.cat([r, shared, constant, r.cos()[..., :1] * torch.ones(3, dtype=r.dtype), *more], -1)


def layer(x):
    return torch.nn.functional.linear(mixed(x), W, W[:, 0]).tanh()


CONSUMERS = {
    "layer": lambda x: layer(x).sum(-1).prod(-1),
    "layer of a layer": lambda x: (
        torch.cat([layer(x), layer(x + 1)[..., :6]], -1).matmul(W.mT[:10]).sin().sum((-2, -1))
    ),
    "elementwise": lambda x: mixed(x).sin().sum((-2, -1)),
    "cut": lambda x: (mixed(x)[..., 2:5] ** 2).sum((-2, -1)),
    "both": lambda x: (mixed(x) * (layer(x) @ W)).sum((-2, -1)),
    "pieces of pieces": lambda x: torch.cat([mixed(x), mixed(x + 1)], -1).square().sum((-2, -1)),
}


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize("points", [(), (3,)])
def test_laplacians(name, points):
    f, x = CONSUMERS[name], torch.randn(*points, 12, generator=torch.Generator().manual_seed(1)).double()
    with jp.strict():
        found = jp.laplacian(f, x, batch_dim=0 if points else None)
        graph = jp.hessian(f, x) if not points else None
    expected = torch.stack([hessian(lambda z: f(z), z) for z in x.reshape(-1, 12)])
    torch.testing.assert_close(found.reshape(-1), expected.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-10, atol=1e-10)
    if graph is not None:
        torch.testing.assert_close(graph, expected[0], rtol=1e-10, atol=1e-10)


def test_parameters_on_both_sides_of_a_layer():
    """A weight that moves needs the whole stack; directions that are absent in part are not joined."""
    x, w, v = torch.randn(2, 12).double(), W.clone().requires_grad_(), torch.randn(12).double().requires_grad_()

    def loss():
        return torch.nn.functional.linear(mixed(x * v), w).tanh().square().sum()

    directions = [torch.randn(3, *p.shape).double() for p in (w, v)]
    plane = jp.evaluate(loss, [w, v], directions)
    expected = jp.testing.grad_of_grad(loss, [w, v], directions)
    torch.testing.assert_close(plane.slope, expected.slope)
    torch.testing.assert_close(plane.curvature, expected.curvature)


def test_a_layer_forms_no_stack(monkeypatch):
    formed = []
    original = coefficients._Joined.materialized
    monkeypatch.setattr(
        coefficients._Joined, "materialized", lambda self, space: (formed.append(self), original(self, space))[1]
    )
    jp.laplacian(lambda x: layer(x).sum((-2, -1)), torch.randn(3, 12).double(), batch_dim=0)
    assert not formed
    jp.laplacian(lambda x: mixed(x).sin().sum((-2, -1)), torch.randn(3, 12).double(), batch_dim=0)
    assert formed
