"""Reverse mode through derivatives of functions, in parameters and points, against reverse mode alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import jetplane as jp
from jetplane.rules import scripts

D, B, H = 2, 3, 6
close = torch.testing.assert_close


class Attention(nn.Module):
    """A network with composite operators, and functions that torch defines in Python."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        x = self.first(x.unsqueeze(-1))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(F.silu(x)).mean(-2)


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H), nn.GELU(), nn.Linear(H, 1)),
    "sines": lambda: nn.Sequential(nn.Linear(D, H), Sine(), nn.Linear(H, 1)),
    "attention": Attention,
}


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(3 * x) * x.exp().clamp(max=5.0)


def residual(net, value, gradient, laplacian):
    """What a physics-informed network's loss is made of."""
    return (laplacian + value * gradient.sum(-1) - 1).square().mean()


def by_reverse(net, x):
    def gradient(z):
        return torch.autograd.grad(net(z).sum(), z, create_graph=True)[0]

    z = x if x.requires_grad else x.clone().requires_grad_()
    g = gradient(z)
    rows = [torch.autograd.grad(g[:, d].sum(), z, create_graph=True)[0] for d in range(D)]
    return net(z)[:, 0], g, torch.stack(rows, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_physics_informed_loss(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *net.parameters()]
    with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate its fused attention twice
        value, g, h = by_reverse(net, x)
        expected = torch.autograd.grad(residual(net, value, g, torch.einsum("bii->b", h)), leaves, allow_unused=True)
    found = jp.value_and_laplacian(net, x, batch_dim=0)
    parts = found.value[:, 0], found.gradient[:, 0], found.laplacian[:, 0]
    got = torch.autograd.grad(residual(net, *parts), leaves, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, check_dtype=False)


FUNCTIONS = {
    "laplacian": (lambda net, x: jp.laplacian(net, x, batch_dim=0)[:, 0], lambda v, g, h: torch.einsum("bii->b", h)),
    "laplacian in chunks": (
        lambda net, x: jp.laplacian(net, x, batch_dim=0, chunk=1)[:, 0],
        lambda v, g, h: torch.einsum("bii->b", h),
    ),
    "hessian": (lambda net, x: jp.hessian(net, x, batch_dim=0)[:, 0], lambda v, g, h: h),
    "hessian by products": (
        lambda net, x: jp.hessian(net, x, batch_dim=0, mode="forward-over-reverse")[:, 0],
        lambda v, g, h: h,
    ),
    "hvp": (lambda net, x: jp.hvp(net, x, torch.ones(D).double(), batch_dim=0), lambda v, g, h: h.sum(-1)),
    "hvp by reverse mode": (
        lambda net, x: jp.hvp(net, x, torch.ones(D).double(), batch_dim=0, mode="forward-over-reverse"),
        lambda v, g, h: h.sum(-1),
    ),
    "jacobian": (lambda net, x: jp.jacobian(net, x, batch_dim=0)[:, 0], lambda v, g, h: g),
    "weighted": (
        lambda net, x: jp.weighted_laplacian(net, x, lambda x: x[..., None], lambda x: x, batch_dim=0)[:, 0],
        None,
    ),
    "jet": (
        lambda net, x: jp.jet(net, x, torch.eye(D).double(), batch_dim=0)[2][..., 0],
        lambda v, g, h: h.permute(1, 2, 0),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_graph_to_parameters_and_points(name):
    torch.manual_seed(0)
    net = NETWORKS["mlp"]().double()
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *list(net.parameters())[:-1]]
    function, expected = FUNCTIONS[name]
    value, g, h = by_reverse(net, x)
    if expected is None:
        want = torch.einsum("bij,bi,bj->b", h, x, x) + (x * g).sum(-1)
    else:
        want = expected(value, g, h)
    got = function(net, x)
    close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True),
        torch.autograd.grad((want * weights).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        close(a, b)


def gradient_and_difference(f, w):
    """The directional derivative of a number that depends on a tensor, by reverse mode and by differences."""
    w, u, step = w.detach(), torch.randn_like(w), 1e-4
    leaf = w.clone().requires_grad_()
    along = (torch.autograd.grad(f(leaf), leaf)[0] * u).sum()
    with torch.no_grad():
        quotient = [(f(w + h * u) - f(w - h * u)) / (2 * h) for h in (step, 2 * step)]
    return along, (4 * quotient[0] - quotient[1]) / 3


# Operators whose rules use kernels that autograd cannot see through, write in place, or have no rule.
OPERATORS = {
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "cross entropy": lambda x: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long)),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.flip(0) ** 2),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None] ** 2, x[None, None]),
    "convolution": lambda x: F.conv2d(x[None, None], x[None, None, :2, :2]),
    "product": lambda x: x @ x.mT,
    "relu": lambda x: x.relu() ** 3,
    "in place": lambda x: (x * 2).mul_(x).add_(x.exp()),
    "indexed": lambda x: x[:, [0, 2, 2]].index_add(1, torch.tensor([0]), x[:, :1]),
    "norm": lambda x: x.norm(dim=-1),
    "no rule, pointwise": lambda x: torch.special.i0e(x),
    "no rule": lambda x: torch.logdet(x @ x.mT + torch.eye(len(x), dtype=x.dtype)),
}


@pytest.mark.filterwarnings("ignore::jetplane.errors.FallbackWarning")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("order", [1, 2])
def test_operators_keep_the_graph(name, order):
    torch.manual_seed(0)
    w, x, v = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))

    def f(w):
        found = jp.jet(lambda x: OPERATORS[name](w * x).sin(), x, v[None], order=order)
        return sum(t.sum() * (n + 1) for n, t in enumerate(found) if t is not None)

    along, quotient = gradient_and_difference(f, w)
    close(along, quotient, rtol=1e-6, atol=1e-7)


def test_nothing_that_requires_grad_no_graph():
    net = NETWORKS["mlp"]().requires_grad_(False)
    x = torch.randn(B, D)
    v = torch.ones(D)
    assert not jp.laplacian(net, x, batch_dim=0).requires_grad
    assert not jp.hvp(net, x, v, batch_dim=0, mode="forward-over-reverse").requires_grad
    net.requires_grad_(True)
    with torch.no_grad():
        assert not jp.laplacian(net, x, batch_dim=0).requires_grad
        assert not jp.hvp(net, x, v, batch_dim=0, mode="forward-over-reverse").requires_grad
    with torch.inference_mode():
        x = torch.randn(B, D)
        assert not jp.hvp(net, x, v, batch_dim=0, mode="forward-over-reverse").requires_grad
    assert jp.laplacian(net, x, batch_dim=0).requires_grad
    assert not jp.laplacian(torch.prod, torch.ones(3)).requires_grad  # which has no rule


def test_what_f_computes_of_its_parameters_alone_is_in_the_graph():
    w, x = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0)
    got = jp.laplacian(lambda x: w.exp().sin() * x**3, x)
    close(torch.autograd.grad(got, w)[0], 12 * w.exp().cos() * w.exp())


def test_what_the_user_keeps_out_of_the_graph_stays_out():
    w, x = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0)

    def f(x):
        with torch.no_grad():
            scale = w * 2
        return w * scale * x.detach() * x**2

    close(torch.autograd.grad(jp.laplacian(f, x), w)[0], torch.tensor(4.0))


def test_the_graph_of_a_gradient():
    torch.manual_seed(0)
    net = NETWORKS["mlp"]().double()
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *list(net.parameters())[:-1]]
    _, _, h = by_reverse(net, x)

    def twice(laplacian):
        first = torch.autograd.grad(laplacian.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, b in zip(twice(jp.laplacian(net, x, batch_dim=0)), twice(torch.einsum("bii->b", h)), strict=True):
        close(a, b)


def test_jacobians_of_torch_inside():
    """With several layers, and constant factors on the way back, whose results depend on no point."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H, bias=False), nn.Linear(H, 2)).double()
    x, leaves = torch.randn(B, D, dtype=torch.float64), [p for n, p in net.named_parameters() if n != "3.bias"]
    f = lambda z: torch.vmap(torch.func.jacrev(net))(z).square().sum((1, 2))  # noqa: E731

    def energy(z):
        return torch.func.jacrev(net)(z).square().sum()

    expected = torch.vmap(lambda z: torch.func.hessian(energy)(z).trace())(x)
    found = jp.laplacian(f, x, batch_dim=0)
    close(found, expected)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (found, expected)), strict=True):
        close(a, b)


def test_checkpoints():
    torch.manual_seed(0)
    net = NETWORKS["mlp"]().double()
    x, leaves = torch.randn(B, D, dtype=torch.float64), [*net.parameters()][:-1]
    inside = lambda z: checkpoint(net, z, use_reentrant=False)  # noqa: E731
    whole = checkpoint(lambda z: jp.laplacian(net, z, batch_dim=0), x, use_reentrant=False)
    expected = torch.autograd.grad(jp.laplacian(net, x, batch_dim=0).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(whole.square().sum(), leaves), expected, strict=True):
        close(a, b)
    with pytest.raises(jp.errors.DerivativeError, match="without checkpoint"):
        jp.laplacian(inside, x, batch_dim=0)
    with torch.no_grad():
        close(jp.laplacian(inside, x, batch_dim=0), whole)


def test_detached_numbers_under_vmap_give_no_warning(recwarn, monkeypatch):
    """Transforms detach what autograd keeps, which is not the author's doing."""
    monkeypatch.setattr(scripts, "_told", False)
    torch.manual_seed(0)
    net = NETWORKS["mlp"]().double()
    x = torch.randn(B, D, dtype=torch.float64)
    f = lambda z: (z * net[0].weight.abs()).exp().sum() * z.detach().sum()  # noqa: E731
    found = jp.laplacian(torch.vmap(f), x, batch_dim=0)
    close(found, jp.laplacian(lambda z: torch.stack([f(point) for point in z]), x, batch_dim=0))
    assert not [w for w in recwarn if "detaches" in str(w.message)]


def test_third_derivatives_by_nesting():
    x = torch.randn(3).double().requires_grad_()
    wave = lambda x: (x[0] * x[1]).sin() * x.exp().sum()  # noqa: E731
    expected = torch.func.grad(lambda z: torch.func.hessian(wave)(z).trace())(x)
    close(jp.jacobian(lambda z: jp.laplacian(wave, z), x), expected)
    close(torch.autograd.grad(jp.laplacian(wave, x), x)[0], expected)
    twice = torch.autograd.grad(jp.bilaplacian(wave, x), x)[0]
    close(twice, torch.func.grad(lambda z: jp_free_bilaplacian(wave, z))(x))


def jp_free_bilaplacian(f, z):
    return torch.func.hessian(lambda y: torch.func.hessian(f)(y).trace())(z).trace()


def whole(x, w):
    y = w * x
    view = y[0:1]
    y.mul_(w + 1)
    return (view**3).sum()


def part(x, w):
    y = w * x
    y[0:1].mul_(w + 1)
    return (y**3).sum()


def buffer(x, w):
    y = torch.zeros(3, dtype=x.dtype)
    y[0] = w * x[0]
    y[1:] = x[1:] ** 2 * w
    return (y**3).sum()


def views_of_views(x, w):
    y = (w * x).reshape(3, 1).t()
    y[0, 1] = w * x[0] ** 2
    y.t()[1:].mul_(3.0)
    y[:, 2].add_(x[0])
    return (y**3).sum()


@pytest.mark.parametrize("f", [whole, part, buffer, views_of_views])
def test_writes_in_place_are_in_the_graph(f):
    w, x = torch.tensor(1.5).double().requires_grad_(), torch.tensor([1.0, 2.0, 3.0]).double()
    expected = torch.autograd.functional.hessian(lambda x: f(x, w), x, create_graph=True).trace()
    got = jp.laplacian(lambda x: f(x, w), x)
    close(got, expected)
    close(torch.autograd.grad(got, w), torch.autograd.grad(expected, w))


def test_a_view_of_a_nested_jet_that_was_written_to_is_refused():
    x, w = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(1.5)
    with pytest.raises(jp.DerivativeError, match="take the view after the write"):
        jp.jvp(lambda w: jp.laplacian(lambda x: whole(x, w), x), w, w)


def two_numbers(kept, x, w):
    kept[0] = w * x[0] ** 2
    kept[1] = w * x[0]
    return kept.sum()


def a_constant_first(kept, x, w):
    kept[0] = w**3
    kept[1] = w * x[0]
    return kept[0] * x[1] ** 2 + kept[1] ** 2


def a_whole(kept, x, w):
    kept.copy_(w * x)
    return (kept**3).sum()


def through_a_view(kept, x, w):
    view = kept.view(2, 1)[1:]
    view[0] = w * x[1:] ** 2
    kept.mul_(w)
    return (kept * x).sum()


def added_up(kept, x, w):
    kept.add_(w)
    return (kept * x**3).sum()


@pytest.mark.parametrize("f", [two_numbers, a_constant_first, a_whole, through_a_view, added_up])
@pytest.mark.parametrize("chunk", ["auto", 1])
def test_a_buffer_of_the_user_is_in_the_graph_as_in_reverse_mode(f, chunk):
    w, x = torch.tensor(0.5).double().requires_grad_(), torch.tensor([3.0, 2.0]).double()
    kept, theirs = torch.zeros(2).double(), torch.zeros(2).double()
    got = jp.laplacian(lambda x: f(kept, x, w), x, chunk=chunk)
    f(theirs, x, w)
    fresh = lambda x: f(torch.zeros(2).double(), x, w)  # noqa: E731
    expected = torch.autograd.functional.hessian(fresh, x, create_graph=True).trace()
    weights = torch.tensor([1.0, 2.0]).double()
    for a, b in ((got, expected), (kept, theirs)):
        close(a, b)
        pair = [torch.autograd.grad((t * (weights if t.dim() else 1)).sum(), w, retain_graph=True) for t in (a, b)]
        close(*pair)


def test_a_buffer_that_is_overwritten_in_each_step():
    net, kept, x = nn.Linear(2, 2), torch.zeros(3, 2), torch.randn(3, 2)

    def f(z):
        kept[:] = net(z)
        return (kept**3).sum(1)

    first = torch.autograd.grad(jp.laplacian(f, x, batch_dim=0).sum(), net.weight)
    close(torch.autograd.grad(jp.laplacian(f, x, batch_dim=0).sum(), net.weight), first)


def test_a_write_to_a_leaf_that_requires_grad_is_refused():
    kept = nn.Parameter(torch.zeros(2))

    def f(x):
        kept[1] = x[0]
        return (kept * x).sum()

    with pytest.raises(jp.DerivativeError, match="leaf that requires grad"):
        jp.laplacian(f, torch.ones(2))
    with torch.no_grad():
        close(jp.laplacian(f, torch.ones(2)), torch.zeros(()))


@pytest.mark.parametrize("numpy", [False, True])
def test_a_black_box_has_no_graph_and_says_so(numpy):
    w, x = torch.tensor([1.0, 2.0]).double().requires_grad_(), torch.tensor([0.3, 0.7]).double()
    box = jp.blackbox((lambda a: np.sin(a)) if numpy else torch.sin, numpy=numpy, scale=1.0)
    found = jp.jet(lambda x: box(w * x).sum(), x, torch.eye(2).double(), pairs="diagonal")
    for t in found if numpy else found[1:]:
        with pytest.raises(jp.DerivativeError, match="blackbox.*no graph"):
            torch.autograd.grad(t.sum(), w, retain_graph=True)
    if numpy:
        with pytest.raises(jp.DerivativeError, match="blackbox.*no graph"):
            box(w).sum().backward()
    assert not jp.laplacian(lambda x: box(w.detach() * x).sum(), x).requires_grad


def test_torch_functions_in_python_may_take_parameters_apart():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    w, y, v = (torch.randn(1, 3, 4).double() for _ in range(3))

    def f(w):
        crossed = lambda y: attention(w * y, (w * y) ** 2, y.sin())[0].sum()  # noqa: E731
        return jp.jet(crossed, y, v[None])[2].sum()

    along, quotient = gradient_and_difference(f, w)
    close(along, quotient, rtol=1e-6, atol=1e-7)


SPECIAL = {
    "i0": torch.special.i0,
    "i1": torch.special.i1,
    "powers": lambda x: x ** torch.tensor([1.0, 2.0, 0.0, 3.0, 2.0], dtype=x.dtype),
    "frexp": lambda x: torch.frexp(x + 0.7).mantissa ** 3,
}


@pytest.mark.parametrize("name", SPECIAL)
def test_formulas_hold_at_zero_and_near_it_in_a_graph_and_nested(name):
    """A branch that is not taken, with a division by zero, must not reach the third derivative."""
    x = torch.tensor([0.0, 0.0, 0.0, 1e-8, -0.4], dtype=torch.float64, requires_grad=True)
    f, h = SPECIAL[name], 1e-4

    def second(z):
        return jp.hessian_diagonal(lambda z: f(z).sum(), z)

    expected = [(second(x.detach() + h) - second(x.detach() - h)) / (2 * h)]
    torch.testing.assert_close(torch.autograd.grad(second(x).sum(), x)[0], expected[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(jp.jacobian(second, x).diagonal(), expected[0], rtol=1e-5, atol=1e-6)


def test_a_conjugate_under_vmap():
    f = torch.vmap(lambda x: (torch.complex(x, x.sin()).conj() * (1 + 2j)).conj().real)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(jp.jacobian(f, x, batch_dim=0), torch.diag_embed(1 + 2 * x.cos()))
