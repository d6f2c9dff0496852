"""Derivatives that a closure takes itself, by reverse mode in tensors of its own, are carried or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jetplane as jp
from jetplane.errors import DerivativeError
from jetplane.gradients.allocation import allocate
from jetplane.gradients.perturbation import estimate


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2), nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1),
    ).double()  # fmt: skip


X = double(6, 3)


def in_inputs(f, x):
    return torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]


def residual(net, z):
    """Of a differential equation, with second derivatives in single columns."""
    t, x, y = (c.clone().requires_grad_() for c in z.detach().split(1, 1))
    u = net(torch.cat([t, x, y], 1))
    ones = torch.ones_like(u)
    ut, ux = (torch.autograd.grad(u, c, ones, create_graph=True)[0] for c in (t, x))
    return (ut + u * ux - 0.1 * torch.autograd.grad(ux, x, ones, create_graph=True)[0]).square().mean()


def penalty(net, z):
    return (in_inputs(net, z).norm(dim=1) - 1).square().mean() + net(z).mean()


def force(net, z):
    return F.mse_loss(in_inputs(lambda r: net((r[:, None] - r).square().add(1).rsqrt().sum(1)), z), X)


def adversary(net, z):
    """Without create_graph the derivative is a constant."""
    return F.mse_loss(net(X + 0.1 * torch.autograd.grad(net(z).square().sum(), z)[0]), X[:, :1])


def langevin(net, z):
    for _ in range(2):
        z = (z - 0.1 * torch.autograd.grad(net(z).sum(), z)[0]).detach().requires_grad_()
    return net(X).mean() - net(z).mean()


def hidden(net, z):
    """In a tensor that depends on the parameters."""
    h = net[0](X).requires_grad_()
    return in_inputs(lambda h: net[2](net[1](h)), h).square().sum() + h.square().mean()


def stopped(net, z):
    """The user's detach() is told from autograd's own, by which it keeps results for the way back."""
    return (in_inputs(lambda z: net(z).exp(), z) * net(z).exp().detach()).square().sum()


def straight_through(net, z):
    return in_inputs(lambda z: F.gumbel_softmax(net(z) * X, tau=2.0, hard=True) * X, z).square().sum()


def functional(net, z):
    jacobian = torch.autograd.functional.jacobian(lambda z: net(z).sum(0), X, create_graph=True)
    hessian = torch.autograd.functional.hessian(lambda z: net(z).sum(), X[0], create_graph=True)
    return jacobian.square().sum() + hessian.square().sum()


def fused(net, z):
    return in_inputs(lambda z: F.scaled_dot_product_attention(net[0](z), net[0](z).tanh(), net[0](z)), z).square().sum()


def batched(net, z):
    rows = torch.autograd.grad(net(z), z, torch.eye(6).double().unsqueeze(-1), create_graph=True, is_grads_batched=True)
    return rows[0].square().sum()


CARRIED = [
    residual, penalty, force, adversary, langevin, hidden, stopped, straight_through, functional, fused, batched,
]  # fmt: skip


def closure_of(loss, net):
    def closure():
        torch.manual_seed(1)
        return loss(net, X.clone().requires_grad_())

    return closure


# The last bias has no effect on derivatives of the network.
@pytest.mark.filterwarnings("ignore:no derivative of the loss reaches:jetplane.JetplaneWarning")
@pytest.mark.parametrize("loss", CARRIED, ids=lambda f: f.__name__)
def test_carried(loss):
    net = mlp()
    closure, params = closure_of(loss, net), list(net.parameters())
    tangents = [double(2, *p.shape, seed=i) for i, p in enumerate(params)]
    exact = jp.testing.grad_of_grad(closure, params, tangents)
    plane = jp.evaluate(closure, params, tangents)
    torch.testing.assert_close(plane.slope, exact.slope, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(plane.curvature, exact.curvature, rtol=1e-7, atol=1e-8)
    assert not any(p.grad is not None for p in params)
    if loss is not straight_through:  # whose detach() inside of torch's own function a plain run cannot tell
        assert jp.audit(closure, params).verdict == "agrees"
    jp.optim.FoMoHKD(params, lr=1e-3, k=2, descent="saddle-free").step(closure)


def test_through_convolutions_and_norms():
    net = convolutional()
    closure, params = closure_of(penalty, net), list(net.parameters())
    tangents = [double(2, *p.shape, seed=i) for i, p in enumerate(params)]
    expected = jp.testing.central_differences(closure, params, tangents)
    plane = jp.evaluate(closure, params, tangents)
    torch.testing.assert_close(plane.slope, expected.slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(plane.curvature, expected.curvature, rtol=1e-3, atol=1e-4)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def in_a_buffer(net, z):
    out = torch.zeros(7, 1).double()
    out[:6] = net(z)
    return torch.autograd.grad(out.square().sum() + net(z).sum(), z, create_graph=True)[0].square().sum()


REFUSED = {
    "a custom function": (
        lambda net, z: in_inputs(lambda z: Squared.apply(net(z)) + net(z), z).square().sum(), "function Squared"
    ),
    "a buffer": (in_a_buffer, "torch.stack in place of a buffer"),
    "a checkpoint": (
        lambda net, z: in_inputs(lambda z: checkpoint(net, z, use_reentrant=False), z).square().sum(), "checkpoint"
    ),
    "parameters": (
        lambda net, z: torch.autograd.grad(net(z).sum(), list(net.parameters()), create_graph=True)[0].sum(),
        "functional_call",
    ),
    "no graph": (lambda net, z: in_inputs(net[2], net[1](net[0](X))).sum(), r"requires_grad_\(\)"),
    "backward": (lambda net, z: net(z).sum().backward(), "calls no backward"),
    "backward of several": (lambda net, z: torch.autograd.backward([net(z).sum()]), "calls no backward"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::jetplane.FallbackWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loss, message = REFUSED[name]
    net = mlp()
    params = list(net.parameters())
    for run in (lambda c: jp.evaluate(c, params, jp.Directions(2)), jp.optim.FGD(params, lr=0.1).step):
        with pytest.raises(DerivativeError, match=message):
            run(closure_of(loss, net))


def test_a_custom_function_of_data_alone_is_in_the_graph():
    net = mlp()

    def loss(net, z):
        return in_inputs(lambda z: net(Squared.apply(z)), z).square().sum()

    closure, params = closure_of(loss, net), list(net.parameters())
    tangents = [double(2, *p.shape, seed=i) for i, p in enumerate(params)]
    exact = jp.testing.grad_of_grad(closure, params, tangents)
    torch.testing.assert_close(jp.evaluate(closure, params, tangents).slope, exact.slope, rtol=1e-8, atol=1e-10)


def test_gauss_newton_and_chunks():
    net = mlp()
    closure, params = closure_of(force, net), list(net.parameters())
    tangents = [double(4, *p.shape, seed=i) for i, p in enumerate(params)]
    whole = jp.evaluate(closure, params, tangents, "ggn")
    parts = jp.evaluate(closure, params, tangents, "ggn", chunk=2)
    torch.testing.assert_close(parts.curvature, whole.curvature, rtol=1e-9, atol=1e-11)
    assert bool((torch.linalg.eigvalsh(whole.curvature) > -1e-9).all())


def test_estimates_of_layers_that_are_differentiated_are_forward_gradients():
    """Noise on a layer's outputs does not see the weights in the derivative by its inputs."""
    net = mlp()
    params, target = list(net.parameters()), X.cos()

    def closure():
        return F.mse_loss(in_inputs(net, X.clone().requires_grad_()), target)

    exact = torch.autograd.grad(closure(), params, allow_unused=True)[:3]
    plans = allocate(closure, net, params, passes=50)
    found = [estimate(closure, net, params, plans, seed=s).gradient[:3] for s in range(24)]
    mean = torch.cat([torch.stack(each).mean(0).flatten() for each in zip(*found, strict=True)])
    whole = torch.cat([g.flatten() for g in exact])
    assert (mean - whole).norm() < 0.5 * whole.norm()


def test_what_is_kept_is_an_ordinary_tensor():
    net, kept = mlp(), []

    def closure():
        kept.append(in_inputs(net, X.clone().requires_grad_()))
        return kept[-1].square().mean()

    jp.evaluate(closure, list(net.parameters()), jp.Directions(1))
    assert type(kept[0]) is torch.Tensor and not kept[0].requires_grad
    net(kept[0]).sum().backward()


THROUGH = {
    "laplacian": lambda net, x: jp.laplacian(net, x, batch_dim=0).sum(),
    "jvp": lambda net, x: jp.jvp(net, (x,), (torch.ones_like(x),))[1].sum(),
    "torch.func.grad": lambda net, x: torch.func.grad(lambda z: net(z).square().sum())(x).sum(),
}


@pytest.mark.parametrize("name", THROUGH)
def test_a_graph_through_other_derivatives_is_refused(name):
    """They keep no graph of their own inside of an evaluation: a part of the gradient would be left out."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    def loss():
        x = torch.ones(3, 2).double().requires_grad_()
        u = net(x).sin().sum() + THROUGH[name](net, x)
        return torch.autograd.grad(u, x, create_graph=True)[0].square().sum()

    with pytest.raises(jp.DerivativeError, match="may be cut by"):
        jp.evaluate(loss, list(net.parameters()), jp.Directions(2))
