"""Models as functions of their parameters: derivatives along directions, alone, wrapped, sharded and compiled."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import jetplane as jp


class Tied(nn.Module):
    """A transformer whose read-out is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def along(model, k=None):
    generator = torch.Generator().manual_seed(5)
    lead = () if k is None else (k,)
    return {
        name: torch.randn(*lead, *p.shape, dtype=p.dtype, generator=generator) for name, p in model.named_parameters()
    }


def differences(f, params, tangents, h=1e-5):
    """Central differences, of fourth order."""

    def at(t):
        return f({name: (p + t * tangents[name]).detach() for name, p in params.items()})

    with torch.no_grad():
        return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def test_a_transformer_with_tied_weights():
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.randint(11, (3, 7))
    f, params = jp.functional(model)
    assert len(params) == len(set(map(id, model.parameters()))) and "head.weight" not in params
    tangents = along(model)
    value, derivative = jp.jvp(lambda p: f(p, tokens), (params,), (tangents,))
    torch.testing.assert_close(value, model(tokens))
    torch.testing.assert_close(derivative, differences(lambda p: f(p, tokens), params, tangents), rtol=1e-7, atol=1e-8)


def test_parameters_and_arguments_with_aux_and_some_parameters_alone():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(4, 6).double()
    f, params = jp.functional(model)
    tangents, dx = along(model), torch.randn(4, 6).double()

    def with_hidden(p, x):
        y = f(p, x)
        return {"y": y}, y.detach()

    got, derivative, aux = jp.jvp(with_hidden, (params, x), (tangents, dx), has_aux=True)
    want, wanted, _ = torch.func.jvp(with_hidden, (params, x), (tangents, dx), has_aux=True)
    torch.testing.assert_close((got, derivative), (want, wanted))
    torch.testing.assert_close(aux, model(x).detach())
    last = {"2.bias": params["2.bias"]}
    _, some = jp.jvp(lambda p: f(p, x), (last,), ({"2.bias": tangents["2.bias"]},))
    torch.testing.assert_close(some, tangents["2.bias"].expand(4, 3))
    with pytest.raises(jp.ArgumentError, match="3.bias"):
        f({"3.bias": params["2.bias"]}, x)


def test_k_tangents_at_once_make_nothing_of_order_two(monkeypatch):
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.randint(11, (2, 5))
    f, params = jp.functional(model)
    tangents = along(model, 3)
    seen = []
    init = jp.jets.Jet.__init__

    def watched(self, primal, first, second, *rest, **named):
        seen.append(second is not None and bool(second) if isinstance(second, jp.jets.Coefficients) else second)
        init(self, primal, first, second, *rest, **named)

    monkeypatch.setattr(jp.jets.Jet, "__init__", watched)
    value, push = jp.linearize(lambda p: f(p, tokens), params)
    many = push(tangents)
    assert seen and not any(s is not None and s is not False for s in seen)
    torch.testing.assert_close(value, model(tokens))
    for n in range(3):
        one = {name: t[n] for name, t in tangents.items()}
        torch.testing.assert_close(many[n], jp.jvp(lambda p: f(p, tokens), (params,), (one,))[1])


def test_a_compiled_model():
    torch.manual_seed(0)
    model = mlp()
    x, dx = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    compiled = torch.compile(model, fullgraph=True)
    f, params = jp.functional(compiled)
    tangents = along(compiled)
    got = jp.jvp(f, (params, x), (tangents, dx))
    g, own = jp.functional(model)
    named = {name.removeprefix("_orig_mod."): t for name, t in tangents.items()}
    torch.testing.assert_close(got, jp.jvp(g, (own, x), (named, dx)))


# --- recipes of the documentation ---------------------------------------------------------------------


class Velocity(nn.Module):
    """u(z, r, t), with norm and nonlinearity."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 4))

    def forward(self, z, r, t):
        return self.net(torch.cat([z, r, t], 1))


def meanflow_loss(u, z, v, r, t):
    """MeanFlow, arXiv 2505.13447, equation 10: the tangent has no graph, the value has one."""
    with torch.no_grad():
        _, along_path = jp.jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
        target = v - (t - r) * along_path
    return (u(z, r, t) - target).square().mean()


def test_the_target_of_meanflow():
    torch.manual_seed(0)
    u, (z, v) = Velocity().double(), torch.randn(2, 5, 4).double()
    r, t = torch.rand(2, 5, 1).double()
    gradient = torch.autograd.grad(meanflow_loss(u, z, v, r, t), list(u.parameters()))
    h = 1e-5

    def at(s):
        return u(z + s * v, r, t + s)

    total = ((8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)).detach()
    loss = (u(z, r, t) - (v - (t - r) * total)).square().mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, list(u.parameters())), rtol=1e-7, atol=1e-8)


def consistency_gradient(f, x, dx, t):
    """sCM, arXiv 2410.11081, without its weights: the gradient of f(x, t) . stopgrad(f - df/dt) in the parameters."""
    with torch.no_grad():
        value, tangent = jp.jvp(f, (x, t), (dx, torch.ones_like(t)))
    y = f(x, t)
    return (y - (value - tangent)).square().mean()


def test_a_consistency_model():
    torch.manual_seed(0)
    u = Velocity().double()
    x, dx = torch.randn(2, 5, 4).double()
    t = torch.rand(5, 1).double()

    def f(x, t):
        return t.cos() * x - t.sin() * u(x, t, t)

    got = torch.autograd.grad(consistency_gradient(f, x, dx, t), list(u.parameters()))
    _, tangent = torch.func.jvp(f, (x, t), (dx, torch.ones_like(t)))
    surrogate = (f(x, t) * 2 * tangent.detach()).sum() / tangent.numel()
    torch.testing.assert_close(got, torch.autograd.grad(surrogate, list(u.parameters())))


def test_the_linearized_predictive_of_a_laplace_approximation():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(4, 6).double()
    f, params = jp.functional(model)
    scale = {name: 0.1 * torch.rand_like(p).detach() + 0.05 for name, p in params.items()}
    samples = {name: s * torch.randn(200, *s.shape).double() for name, s in scale.items()}
    mean, push = jp.linearize(lambda p: f(p, x), params)
    drawn = push(samples)  # (200, 4, 3): J θ' for each sample θ', no Jacobian
    jacobian = torch.func.jacrev(lambda p: f(p, x))({name: p.detach() for name, p in params.items()})
    exact = sum(torch.einsum("bc...,n...->nbc", jacobian[name], samples[name]) for name in params)
    torch.testing.assert_close(drawn, exact)
    variance = sum((jacobian[name].square() * scale[name].square()).flatten(2).sum(2) for name in params)
    assert ((drawn.var(0) / variance - 1).abs() < 0.5).all() and mean.shape == (4, 3)


# --- two ranks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    gang = ranks.Gang(2, tmp_path_factory.mktemp("ranks"))
    yield gang
    gang.stop()


def raised(answers):
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def under_ddp(rank):
    """An unmodified DDP module: in its input, in its parameters, and MeanFlow's step by it."""
    torch.manual_seed(0)
    net = Velocity().double()
    alone, model = copy.deepcopy(net), DistributedDataParallel(net)
    z, v = torch.randn(2, 2, 5, 4).double()[:, rank]
    r, t = torch.rand(2, 2, 5, 1).double()[:, rank]
    moved = (v, torch.zeros_like(r), torch.ones_like(t))
    torch.testing.assert_close(jp.jvp(model, (z, r, t), moved), jp.jvp(alone, (z, r, t), moved))
    f, params = jp.functional(model)
    g, own = jp.functional(alone)
    tangents = along(model)
    named = {name.removeprefix("module."): x for name, x in tangents.items()}
    torch.testing.assert_close(
        jp.jvp(lambda p: f(p, z, r, t), (params,), (tangents,)), jp.jvp(lambda p: g(p, z, r, t), (own,), (named,))
    )
    meanflow_loss(model, z, v, r, t).backward()
    meanflow_loss(alone, z, v, r, t).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert q.grad is not None
        dist.all_reduce(q.grad)
        torch.testing.assert_close(p.grad, q.grad / 2)
    return True


def under_fsdp2(rank):
    """Sharded by FSDP2: in its input, and in its parameters along K directions that are laid out as they are."""
    torch.manual_seed(0)
    alone = mlp()
    tangents = along(alone, 2)
    net, mesh = copy.deepcopy(alone), init_device_mesh("cpu", (2,))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    x, dx = torch.randn(2, 2, 5, 6).double()[:, rank]
    torch.testing.assert_close(jp.jvp(net, (x,), (dx,)), jp.jvp(alone, (x,), (dx,)))
    f, params = jp.functional(net)
    g, own = jp.functional(alone)
    assert all(isinstance(p, DTensor) for p in params.values())
    split = {name: distribute_tensor(t, mesh, [type(params[name].placements[0])(1)]) for name, t in tangents.items()}
    with torch.no_grad():
        value, first, _ = jp.jet(lambda p, x: f(p, x), (params, x), (split, torch.stack([dx, 2 * dx])), order=1)
        want, wanted, _ = jp.jet(lambda p, x: g(p, x), (own, x), (tangents, torch.stack([dx, 2 * dx])), order=1)
        one = {name: t[0] for name, t in split.items()}
        _, single = jp.jvp(lambda p: f(p, x), (params,), (one,))
    torch.testing.assert_close((value, first), (want, wanted))
    torch.testing.assert_close(single, jp.jvp(lambda p: g(p, x), (own,), ({n: t[0] for n, t in tangents.items()},))[1])
    F.mse_loss(net(x), torch.zeros(5, 3).double()).backward()  # and it trains by reverse mode afterwards
    assert all(p.grad is not None for p in net.parameters())
    return True


def watched_under_ddp(rank):
    """A monitor leaves buffers, which DDP sends to all ranks in each forward pass, as they would be without it."""
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(8, 4) + rank
        loss = lambda: model(x).square().sum(1).sin().mean()  # noqa: E731, B023
        monitor = jp.CurvatureMonitor(optimizer, loss) if watched else None
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert monitor is None or len(monitor.readings) == 2
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("way", [under_ddp, under_fsdp2, watched_under_ddp], ids=["ddp", "fsdp2", "monitor"])
def test_unmodified_modules_of_two_ranks(two, way):
    assert raised(two.run(way)) == [True, True]
