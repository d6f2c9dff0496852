"""Inverses and determinants, exact and nested, without the local fallback."""

import pytest
import torch
from torch.autograd.functional import hessian

import jetplane as jp

CASES = {
    "slogdet": lambda z: torch.linalg.slogdet(z)[1].sin().sum(),
    "logdet": lambda z: torch.logdet(z @ z.mT).sum(),
    "inv": lambda z: torch.linalg.inv(z).sin().sum(),
    "inverse of an inverse": lambda z: (torch.linalg.inv(torch.linalg.inv(z) + z) * z).sum(),
    "matrix_power": lambda z: torch.linalg.matrix_power(z, -2).sum(),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
def test_hessians(name, batch):
    torch.manual_seed(len(batch))
    f, z = CASES[name], torch.randn(*batch, 4, 4).double() + 3 * torch.eye(4).double()
    with jp.strict():
        found, laplacian = jp.hessian(f, z), jp.laplacian(f, z)
    expected = hessian(f, z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(laplacian, expected.reshape(z.numel(), -1).trace(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_laplacians_inside_a_loss(name):
    """As for a wave function: along parameters, of second derivatives along coordinates."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 3).double().requires_grad_(), torch.randn(3, 3).double()
    identity = torch.eye(3).double()

    def f(z):
        return CASES[name]((z @ w).tanh() + 3 * identity)

    truth = hessian(f, x, create_graph=True).reshape(9, 9).trace().square()
    (gradient,) = torch.autograd.grad(truth, w)
    with jp.strict():
        plane = jp.evaluate(lambda: jp.laplacian(f, x).square(), [w], [torch.eye(9).double().reshape(9, 3, 3)], "none")
    torch.testing.assert_close(plane.value, truth.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(plane.slope, gradient.flatten(), rtol=1e-8, atol=1e-10)
