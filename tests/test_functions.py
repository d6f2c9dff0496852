"""Functions of tensors, and evaluations inside evaluations."""

import pytest
import torch
from torch import nn

import jetplane as jp
from jetplane.testing import grad_of_grad


def f(x):
    return (x**3).prod() + x.sin().sum()


def test_hessian_and_products_against_torch_func():
    x, v = torch.randn(4).double(), torch.randn(4).double()
    expected = torch.func.hessian(f)(x)
    torch.testing.assert_close(jp.hessian(f, x), expected)
    torch.testing.assert_close(jp.hvp(f, x, v), expected @ v)
    torch.testing.assert_close(jp.laplacian(f, x), expected.trace())
    torch.testing.assert_close(jp.quadratic_form(f, x, torch.eye(4).double()), expected)


def test_hessian_of_several_arguments_and_of_vectors():
    a, b = torch.randn(2).double(), torch.randn(3).double()
    blocks = jp.hessian(lambda a, b: (a * b.sum()).prod(), (a, b))
    expected = torch.func.hessian(lambda a, b: (a * b.sum()).prod(), argnums=(0, 1))(a, b)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(blocks[i][j], expected[i][j])
    torch.testing.assert_close(jp.hessian(torch.sin, a), torch.func.hessian(torch.sin)(a))


def test_first_derivatives_and_structures():
    x, v = torch.randn(3).double(), torch.randn(2, 3).double()
    value, first, second = jp.jet(lambda x: {"a": x.exp(), "b": x.sum()}, x, v)
    torch.testing.assert_close(first["a"], v * x.exp())
    torch.testing.assert_close(second["a"], v[:, None] * v[None] * x.exp())
    assert second["b"].shape == (2, 2) and not second["b"].any()
    assert jp.jet(torch.exp, x, v, order=1)[2] is None


def test_no_perturbation_confusion():
    def outer(x):
        return x * jp.jet(lambda y: x + y, torch.ones(()), torch.ones(1))[1][0]

    value, first, second = jp.jet(outer, torch.tensor(2.0), torch.ones(1))
    assert (value, first, second) == (2.0, 1.0, 0.0)


def physics_loss(net, x, laplacian):
    return (laplacian(net, x) - 1).square().mean() + net(x).square().mean()


def by_jets(net, x):
    axes = torch.eye(2, dtype=x.dtype)[:, None].expand(2, *x.shape)
    return jp.jet(net, x, axes, pairs="diagonal")[2].sum(0).squeeze(-1)


def by_autograd(net, x):
    x = x.clone().requires_grad_()
    gradient = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    rows = [torch.autograd.grad(gradient[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2)]
    return rows[0] + rows[1]


def by_points(net, x):
    return torch.stack([jp.laplacian(lambda z: net(z).squeeze(), point) for point in x])


@pytest.mark.parametrize("laplacian", [by_jets, by_points])
def test_a_loss_that_holds_the_networks_own_laplacian(laplacian):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.rand(5, 2).double()
    params = list(net.parameters())
    tangents = [torch.randn(3, *p.shape).double() for p in params]
    expected = grad_of_grad(lambda: physics_loss(net, x, by_autograd), params, tangents)
    found = jp.evaluate(lambda: physics_loss(net, x, laplacian), params, tangents)
    torch.testing.assert_close(found.slope, expected.slope)
    torch.testing.assert_close(found.curvature, expected.curvature)


@pytest.mark.parametrize(
    ("tangents", "error"),
    [
        (torch.ones(2, 4), jp.ShapeError),
        (torch.ones(2, 3).double(), jp.DTypeError),
        (torch.ones(0, 3), jp.ArgumentError),
    ],
)
def test_tangents_that_do_not_match(tangents, error):
    with pytest.raises(error):
        jp.jet(torch.sin, torch.ones(3), tangents)
