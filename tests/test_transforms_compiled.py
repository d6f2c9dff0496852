"""Derivatives of functions inside `torch.compile`, against the uncompiled ones."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
POINTS, ALONG = torch.randn(5, 4).double(), torch.randn(2, 5, 4).double()
F_OF, PARAMS = jp.functional(NET)
TANGENTS = {name: torch.randn(2, *p.shape).double() for name, p in PARAMS.items()}
ONE = {name: t[0] for name, t in TANGENTS.items()}


def valley(z):
    return (z[1:] - z[:-1] ** 2).square().sum() + z.sin().prod()


def stopped(a):
    with torch.no_grad():
        return a.sin()


def both(x):
    value, push = jp.linearize(NET, x)
    return value, push(ALONG), push(ALONG[0])


def residual_plane():
    def loss():
        return F.mse_loss(jp.laplacian(NET, POINTS, batch_dim=0), torch.ones(5, 3).double())

    plane = jp.evaluate(loss, list(NET.parameters()), list(TANGENTS.values()), "ggn")
    return plane.value, plane.slope, plane.curvature


P = nn.Parameter(torch.rand(3, 3).double() + 0.1)
Q = torch.rand(3, 3).double()
MATRICES = torch.linspace(0.5, 6, 32).double().sin().reshape(2, 4, 4)
MATRICES[1, :, 3] = MATRICES[1, :, 0] - MATRICES[1, :, 1]  # singular
ALONG_MATRICES = torch.linspace(1, 7, 96).double().cos().reshape(3, 2, 4, 4)


def determinants(x):
    return torch.linalg.det(x + x**2 / 4)


def attended(z):
    """Attention at each point by `torch.vmap`: among three tokens, of which the layers make query, key and value."""

    def at(point):
        tokens = NET(torch.stack([point, point.sin(), point.cos()])).sin()
        return F.scaled_dot_product_attention(tokens, tokens.flip(0), tokens * 2, is_causal=True).sum(0)

    return torch.vmap(at)(z)


CASES = {
    "attention under vmap": lambda: jp.laplacian(attended, POINTS[:2], batch_dim=0),
    "jet in parameters and input": lambda: jp.jet(F_OF, (PARAMS, POINTS), (TANGENTS, ALONG)),
    "jet, planes": lambda: jp.jet(NET, POINTS, torch.cat([ALONG, ALONG.sin()]), pairs=2),
    "jet, first order": lambda: jp.jet(NET, POINTS, ALONG, order=1)[:2],
    "jvp with aux": lambda: jp.jvp(lambda x: (NET(x), {"sum": x.sum()}), POINTS, ALONG[0], has_aux=True),
    "jvp of one argument": lambda: jp.jvp(F_OF, (PARAMS, POINTS), ALONG[0], argnums=1),
    "jvp of constants": lambda: jp.jvp(lambda x: (x, torch.ones(3).double()), POINTS, ALONG[0]),
    "linearize": lambda: both(POINTS),
    "jacobian of a tree": lambda: jp.jacobian(lambda p: F_OF(p, POINTS), (PARAMS,)),
    "hessian": lambda: jp.hessian(valley, POINTS[0]),
    "hvp": lambda: jp.hvp(valley, POINTS[0], ALONG[0, 0]),
    "hessian_diagonal": lambda: jp.hessian_diagonal(NET, POINTS, batch_dim=0),
    "value_and_laplacian": lambda: jp.value_and_laplacian(NET, POINTS, batch_dim=0),
    "determinants": lambda: jp.jet(determinants, MATRICES, ALONG_MATRICES),
    "bilaplacian": lambda: jp.bilaplacian(valley, POINTS[0]),
    "divergence": lambda: jp.divergence(lambda z: z.sin() * z.sum(), POINTS[0]),
    "nested": lambda: jp.jvp(lambda a: jp.jvp(lambda b: (a * b).sin(), POINTS, ALONG[0])[1], POINTS, ALONG[1]),
    "stopped by no_grad and detach": lambda: jp.jvp(lambda a: a * stopped(a) * a.detach(), POINTS, ALONG[0]),
    "plane of a differential equation": residual_plane,
}


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


LONG = ("jet, planes", "jacobian of a tree", "hessian", "hessian_diagonal", "bilaplacian")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in CASES])
def test_one_graph(name):
    torch._dynamo.reset()
    with torch.no_grad():
        expected = leaves(CASES[name]())
        found = leaves(torch.compile(CASES[name], fullgraph=True, backend="aot_eager")())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def written(z):
    """Writes in place, to whole tensors and to views, with parameters among what is written."""
    h = NET(z).sin()
    h[:, :2] *= P[0, :2]
    h[:, 1].add_(h[:, 0].exp())
    return h.tanh_()


def mixed(z):
    """`torch.func` inside: each point's Jacobian by reverse mode."""
    return torch.vmap(torch.func.jacrev(NET))(z).flatten(1)


def signed(z):
    """A sum of determinants with their signs, through attention, whose fused backward formula has no derivative."""
    h = nn.functional.scaled_dot_product_attention(*NET(z).view(3, 1, 1, 1, -1).sin())
    sign, logarithm = torch.linalg.slogdet(h.view(-1, 1, 1))
    return (sign * logarithm.exp()).sum().abs().log()


WITH_GRAPH = {
    "signs": lambda x: jp.laplacian(signed, x[:3]),
    "laplacian": lambda x: jp.laplacian(NET, x, batch_dim=0),
    "value_and_laplacian, writes": lambda x: jp.value_and_laplacian(written, x, batch_dim=0),
    "jvp in parameters and input": lambda x: jp.jvp(F_OF, (dict(NET.named_parameters()), x), (ONE, ALONG[0])),
    "jacobian": lambda x: jp.jacobian(NET, x, batch_dim=0),
    "stopped by no_grad and detach": lambda x: jp.jvp(lambda a: NET(a).sum() * stopped(a) * a.detach(), x, ALONG[0]),
    "nested": lambda x: jp.jvp(lambda a: jp.jvp(NET, a, ALONG[0])[1] * a.sum(), x, ALONG[1]),
    "torch.func inside": lambda x: jp.laplacian(mixed, x, batch_dim=0),
    "jet": lambda x: jp.jet(NET, x, ALONG),
    "linearize": both,
    "hvp": lambda x: jp.hvp(lambda z: NET(z).sin().prod(), x, ALONG[0]),
    "vhv": lambda x: jp.vhv(lambda z: NET(z).sin().prod(), x, ALONG[0]),
    "hessian": lambda x: jp.hessian(lambda z: NET(z).square().sum(), x[:2]),
    "hessian_diagonal": lambda x: jp.hessian_diagonal(NET, x, batch_dim=0),
    "divergence": lambda x: jp.divergence(lambda z: NET(z).sum(1, keepdim=True) * z.sin(), x, batch_dim=0),
    "weighted_laplacian": lambda x: jp.weighted_laplacian(NET, x, torch.eye(4).double() * 2, POINTS, batch_dim=0),
    "bilaplacian": lambda x: jp.bilaplacian(NET, x, batch_dim=0),
    "determinants": lambda x: jp.jet(determinants, MATRICES * x.sum(), ALONG_MATRICES),
    "attention under vmap": lambda x: jp.laplacian(attended, x[:2], batch_dim=0),
}
REFERENCES = {  # by other functions
    "torch.func inside": lambda x: jp.laplacian(lambda z: jp.jacobian(NET, z, batch_dim=0).flatten(1), x, batch_dim=0)
}
LONG_WITH_GRAPH = [*WITH_GRAPH][7:]


def loss_of(f, x):
    """A number that depends on each result in its own way."""
    each = [t for t in leaves(f(x)) if isinstance(t, torch.Tensor)]
    return torch.stack([(t.flatten() * (1 + torch.arange(t.numel())).cos()).square().mean() for t in each]).sum()


def gradients(loss, x):
    value = loss(x)
    return value, *torch.autograd.grad(value, [x, *NET.parameters()], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG_WITH_GRAPH else n for n in WITH_GRAPH]
)
def test_gradients_through_one_graph(name):
    """Reverse mode through results, in parameters and points, against the uncompiled functions."""
    torch._dynamo.reset()
    x = POINTS.clone().requires_grad_()
    loss = lambda x: loss_of(WITH_GRAPH[name], x)  # noqa: E731
    expected = gradients(lambda x: loss_of(REFERENCES.get(name, WITH_GRAPH[name]), x), x)
    found = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_compiled_step_of_training():
    """A physics-informed network by Adam, its loss one graph, in the same steps as uncompiled."""

    def trained(compile):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        adam = torch.optim.Adam(net.parameters(), lr=1e-2)

        def loss(x):
            u, _, second = jp.value_and_laplacian(net, x, batch_dim=0)
            return (second + u.sin()).square().mean() + net(torch.zeros(1, 2).double()).square().mean()

        loss = torch.compile(loss, fullgraph=True, backend="aot_eager") if compile else loss
        for step in range(4):
            adam.zero_grad()
            loss(torch.rand(6, 2, generator=torch.Generator().manual_seed(step)).double()).backward()
            adam.step()
        return [p.detach() for p in net.parameters()]

    torch._dynamo.reset()
    for a, b in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def in_a_new_thread(f):
    found = []
    thread = threading.Thread(target=lambda: found.append(f()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("name", ["laplacian", "loss"])
def test_a_thread_that_has_not_evaluated_compiles_once(name):
    """What a trace leaves behind in its thread is not what its guards have asked for."""
    params, axes = list(NET.parameters()), list(TANGENTS.values())

    @jp.loss
    def loss(y):
        return y.pow(4).mean()

    f = {
        "laplacian": lambda x: jp.laplacian(NET, x, batch_dim=0),
        "loss": lambda x: jp.evaluate(lambda: loss(NET(x)), params, axes, "ggn").curvature,
    }[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    found = in_a_new_thread(lambda: [compiled(POINTS) for _ in range(2)])
    torch.testing.assert_close(found, [f(POINTS)] * 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_the_derivative_of_rounding_is_that_of_each_call():
    """It was that of the first call, and zero where the choice was inside of the compiled code."""

    def rounded(x):
        return jp.jvp(lambda z: NET((z * 8).round() / 8), x, ALONG[0])[1]

    def inside(x):
        with jp.quantization("straight-through"):
            return rounded(x)

    torch._dynamo.reset()
    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")
    assert not compiled(POINTS).any()
    for _ in range(2):
        with jp.quantization("straight-through"):
            torch.testing.assert_close(compiled(POINTS), inside(POINTS))
        assert not compiled(POINTS).any()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="around the call of the compiled function"):
        torch.compile(inside, fullgraph=True, backend="aot_eager")(POINTS)


def test_a_backward_pass_inside_of_the_graph(monkeypatch):
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace torch.autograd.grad")
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    torch._dynamo.reset()

    def step(x):
        return torch.autograd.grad(jp.laplacian(NET, x, batch_dim=0).square().mean(), list(NET.parameters())[:3])

    for a, b in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(POINTS), step(POINTS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_results_have_no_graph_under_no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        value, (inside, _) = torch.compile(both, fullgraph=True, backend="aot_eager")(POINTS)[:2]
        found = torch.compile(lambda x: jp.laplacian(mixed, x, batch_dim=0), fullgraph=True, backend="eager")(POINTS)
        expected = jp.laplacian(mixed, POINTS, batch_dim=0)
    assert not any(t.requires_grad for t in (value, inside, found))
    torch.testing.assert_close(found, expected)


class Straight(torch.autograd.Function):
    """Its derivative is not that of its forward pass."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x.round() * w

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_custom_functions_are_refused(requires_grad):
    """A compiler runs them without asking: derivatives would be lost, or those of the forward pass."""
    weight = torch.full((4,), 2.0).double().requires_grad_(requires_grad)
    of = lambda x: jp.jvp(lambda z: Straight.apply(z, weight), x, ALONG[0])[1]  # noqa: E731
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="custom autograd function of a tensor"):
        torch.compile(of, fullgraph=True, backend="eager")(POINTS)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(of, backend="eager")(POINTS), 2 * ALONG[0])


def test_writes_that_cannot_be_followed():
    torch._dynamo.reset()

    def filled(z):
        out = torch.zeros(5, 8).double()
        out[:, :4] = z.sin()
        return out

    with pytest.raises(Exception, match="written into a buffer without, in compiled code"):
        torch.compile(lambda x: jp.laplacian(filled, x, batch_dim=0), fullgraph=True, backend="eager")(POINTS)


def test_derivatives_under_no_grad_inside_of_others():
    torch._dynamo.reset()

    def inner(z):
        with torch.no_grad():
            h = jp.hessian_diagonal(lambda y: y.sin().sum(), z)
        return (h * z**2).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="the outer ones stop there"):
        torch.compile(lambda x: jp.laplacian(inner, x), fullgraph=True, backend="eager")(POINTS)


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x):
        hidden = self.inner(x).tanh()
        torch._dynamo.graph_break()
        return self.outer(hidden).tanh()


def test_what_cannot_be_followed_runs_uncompiled():
    torch._dynamo.reset()
    model = Breaking()
    params = list(model.parameters())
    tangents = [torch.randn(2, *p.shape).double() for p in params]

    def run():
        plane = jp.evaluate(lambda: model(POINTS).square().mean(), params, tangents)
        return jp.jet(model, POINTS, ALONG), plane.slope, plane.curvature

    with torch.no_grad():
        expected, found = leaves(run()), leaves(torch.compile(run, backend="eager")())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_meanflow_in_one_graph():
    """The recipe of docs/models.md: the tangent without a graph, the value with one."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 4)).double()
    (z, v), (r, t) = torch.randn(2, 5, 4).double(), torch.rand(2, 5, 1).double()

    def loss():
        u = lambda z, r, t: net(torch.cat([z, r, t], 1))  # noqa: E731
        with torch.no_grad():
            _, du = jp.jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
        return (u(z, r, t) - (v - (t - r) * du)).square().mean()

    params = list(net.parameters())
    expected = torch.autograd.grad(loss(), params)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), params)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


SEEN = {
    "private function": lambda: torch._weight_norm(P, P[:, :1], 0).sin().sum(),
    "unflatten": lambda: P.unflatten(0, (3, 1)).sin().sum(),
    "reflected": lambda: (Q @ P).sin().sum() + (2**P).sum(),
}
PASSING_BY = {
    ".T": lambda: (Q @ P.T).sin().sum() + P.sum(),
    "iteration": lambda: sum(row.sin().sum() for row in P) + P.sum(),
    "vmap": lambda: torch.vmap(torch.sin)(P).sum() + P.sum(),
    "alone": lambda: P.mT.sin().sum(),
}


@pytest.mark.parametrize("name", SEEN)
def test_parameters_that_are_seen(name):
    torch._dynamo.reset()
    expected = jp.evaluate(SEEN[name], [P], [Q[None]])
    with torch.no_grad():
        found = torch.compile(jp.evaluate, fullgraph=True, backend="aot_eager")(SEEN[name], [P], [Q[None]])
    torch.testing.assert_close(found.slope, expected.slope)
    torch.testing.assert_close(found.curvature, expected.curvature)


@pytest.mark.parametrize("name", PASSING_BY)
def test_parameters_that_pass_by_a_compiler_raise(name):
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="DerivativeError.*compiled code"):
        torch.compile(jp.evaluate, fullgraph=True, backend="aot_eager")(PASSING_BY[name], [P], [Q[None]])


def test_compiled_parameters_must_require_grad():
    torch._dynamo.reset()
    w = torch.ones(3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ArgumentError.*require grad"):
        torch.compile(jp.evaluate, fullgraph=True, backend="eager")(lambda: w.sin().sum(), [w], [torch.ones(1, 3)])


def test_options_that_cannot_be_compiled():
    torch._dynamo.reset()
    with torch.no_grad():
        for match, f in {
            "chunk= cannot": lambda: jp.jacobian(NET, POINTS, chunk=1),
            "forward-over-reverse' cannot": lambda: jp.hvp(valley, POINTS[0], POINTS[1], mode="forward-over-reverse"),
        }.items():
            with pytest.raises(torch._dynamo.exc.Unsupported, match=match):
                torch.compile(f, fullgraph=True, backend="eager")()


def test_other_shapes_in_one_process():
    """The second shape makes the compiler take sizes for symbols."""
    of = lambda x: jp.laplacian(lambda z: z.sin().prod(-1), x, batch_dim=0)  # noqa: E731
    f = torch.compile(of, fullgraph=True, backend="eager")
    with torch.no_grad():
        for shape in ((3, 4), (5, 4), (5, 6), (2, 7)):
            x = torch.rand(shape, dtype=torch.float64)
            torch.testing.assert_close(f(x), -shape[1] * x.sin().prod(-1))
