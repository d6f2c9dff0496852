"""Derivatives of functions, against torch.autograd.functional and torch.func."""

import pytest
import torch
from torch import nn

import jetplane as jp

D, B = 3, 4


def f(x):
    return (x**3).prod() + x.sin().sum()


def wave(x):
    return (x[0] * x[1]).sin() * x.exp().sum()


def field(x):
    return torch.stack([x[0] * x[1], x[1].sin() * x[2], (x[0] + x[2]) ** 2])


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).double()


def points():
    return torch.randn(B, D).double()


def hessians(net, x, **options):
    """The Hessian at each point, by reverse over reverse."""
    return torch.stack([torch.autograd.functional.hessian(lambda z: net(z).sum(), z, **options) for z in x])


close = torch.testing.assert_close


# --- one point ----------------------------------------------------------------------------------------------


def test_first_derivatives():
    x, v = torch.randn(D).double(), torch.randn(D).double()
    j = torch.autograd.functional.jacobian(field, x)
    close(jp.jacobian(field, x), j)
    close(jp.jacobian(field, x, chunk=2), j)
    close(jp.jvp(field, x, v), torch.func.jvp(field, (x,), (v,)))
    close(jp.divergence(field, x), j.trace())
    value, push = jp.linearize(field, x)
    close((value, push(v), push(v[None])), (field(x), j @ v, (j @ v)[None]))


@pytest.mark.parametrize("chunk", [None, "auto", 1, 2, 3, 100])
def test_second_derivatives(chunk):
    x, v = torch.randn(4).double(), torch.randn(4).double()
    h = torch.autograd.functional.hessian(f, x)
    close(jp.hessian(f, x, chunk=chunk), h)
    close(jp.hessian_diagonal(f, x, chunk=chunk), h.diagonal())
    close(jp.laplacian(f, x, chunk=chunk), h.trace())
    close(jp.hvp(f, x, v, chunk=chunk), h @ v)
    close(jp.vhv(f, x, v), v @ h @ v)
    for mode in ("forward-over-reverse", "auto"):
        close(jp.hessian(f, x, chunk=chunk, mode=mode), h)
        close(jp.hvp(f, x, v, mode=mode), h @ v)
        close(jp.laplacian(f, x, chunk=chunk, mode=mode), h.trace())
    found = jp.value_and_laplacian(f, x)
    close(tuple(found), (f(x), torch.func.grad(f)(x), h.trace()))


def test_a_weighted_laplacian_with_a_drift():
    x, sigma, b = torch.randn(4).double(), torch.randn(4, 2).double(), torch.randn(4).double()
    h, g = torch.autograd.functional.hessian(f, x), torch.func.grad(f)(x)
    close(jp.weighted_laplacian(f, x, sigma), (sigma @ sigma.mT @ h).trace())
    for chunk in ("auto", 1):
        got = jp.weighted_laplacian(f, x, lambda y: sigma * y[:, None], lambda y: b * y, chunk=chunk)
        s = sigma * x[:, None]
        close(got, (s @ s.mT @ h).trace() + (b * x) @ g)


def test_a_bilaplacian():
    x = torch.randn(3).double()
    inner = lambda z: torch.func.hessian(wave)(z).trace()  # noqa: E731
    close(jp.bilaplacian(wave, x), torch.func.hessian(inner)(x).trace())


def test_a_number_as_primal():
    x = torch.tensor(0.7).double()
    sin = torch.sin(x)
    close(jp.hessian(torch.sin, x), -sin)
    close(jp.hvp(torch.sin, x, x), -sin * x)
    close(jp.laplacian(torch.sin, x), -sin)
    close(jp.bilaplacian(torch.sin, x), sin)
    close(jp.jacobian(torch.sin, x), x.cos())
    close(jp.hessian(torch.sin, x, mode="forward-over-reverse"), -sin)


# --- trees of arguments and results ----------------------------------------------------------------------------


def tree(p, scale, other):
    return {"y": (p["a"] * p["b"][0].sum()).exp().sum() * scale * other, "z": [p["a"] ** 2 * other]}


def test_trees_argnums_and_aux():
    p = {"a": torch.randn(2).double(), "b": [torch.randn(3).double()]}
    other = torch.randn(()).double()
    arguments = (p, 3, other)
    for argnums in (0, 2, (0, 2), (2, 0), -1):
        expected = torch.func.hessian(tree, argnums=argnums)(*arguments)
        close(jp.hessian(tree, arguments, argnums=argnums), expected)
        close(jp.hessian(tree, arguments, argnums=argnums, chunk=2), expected)
        close(jp.jacobian(tree, arguments, argnums=argnums), torch.func.jacrev(tree, argnums=argnums)(*arguments))
    whole = jp.hessian(tree, arguments, argnums=(0, 2))
    trace = lambda h: h[0]["a"][0]["a"].diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    trace_b = lambda h: h[0]["b"][0][0]["b"][0].diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    expected = trace(whole["z"][0]) + trace_b(whole["z"][0]) + whole["z"][0][1][1]
    close(jp.laplacian(tree, arguments, argnums=(0, 2))["z"][0], expected)
    close(jp.hessian_diagonal(tree, arguments, argnums=0)["y"]["a"], whole["y"][0]["a"][0]["a"].diagonal())
    scalar = lambda *args: tree(*args)["y"]  # noqa: E731
    v = {"a": torch.randn(2).double(), "b": [torch.randn(3).double()]}
    product = whole["y"][0]["a"][0]["a"] @ v["a"] + whole["y"][0]["a"][0]["b"][0] @ v["b"][0]
    for mode in ("forward", "forward-over-reverse"):
        close(jp.hvp(scalar, arguments, v, argnums=0, mode=mode)["a"], product)
        close(jp.hessian(scalar, arguments, argnums=(0, 2), mode=mode), whole["y"])


def test_aux_is_passed_through():
    def g(x):
        return wave(x), {"squares": x**2, "n": 3, "nothing": None}

    x, v = torch.randn(3).double(), torch.randn(3).double()
    aux = {"squares": x**2, "n": 3}
    for got in (
        jp.hessian(g, x, has_aux=True),
        jp.hessian(g, x, has_aux=True, mode="forward-over-reverse"),
        jp.hvp(g, x, v, has_aux=True),
        jp.hvp(g, x, v, has_aux=True, mode="forward-over-reverse"),
        jp.laplacian(g, x, has_aux=True, chunk=1),
        jp.bilaplacian(g, x, has_aux=True),
        jp.jet(g, x, v[None], has_aux=True),
        jp.jvp(g, x, v, has_aux=True)[1:],
        jp.value_and_laplacian(g, x, has_aux=True),
    ):
        assert got[-1].pop("nothing") is None
        close(got[-1], aux)
    close(jp.laplacian(g, x, has_aux=True)[0], jp.laplacian(wave, x))


# --- one result for each point -----------------------------------------------------------------------------------


def test_one_result_for_each_point(net):
    x, v = points(), torch.randn(B, D).double()
    h = hessians(net, x)
    g = torch.stack([torch.autograd.functional.jacobian(net, z) for z in x])
    close(jp.laplacian(net, x, batch_dim=0), torch.einsum("bdd->b", h)[:, None])
    close(jp.laplacian(net, x, batch_dim=0, chunk=2), torch.einsum("bdd->b", h)[:, None])
    close(jp.jacobian(net, x, batch_dim=0), g)
    close(jp.hessian_diagonal(net, x, batch_dim=0), torch.einsum("bdd->bd", h)[:, None])
    for mode in ("forward", "forward-over-reverse"):
        close(jp.hessian(net, x, batch_dim=0, mode=mode), h[:, None])
        close(jp.hvp(net, x, v, batch_dim=0, mode=mode), torch.einsum("bij,bj->bi", h, v))
        close(jp.hvp(net, x, v[0], batch_dim=0, mode=mode), torch.einsum("bij,j->bi", h, v[0]))
        close(jp.laplacian(net, x, batch_dim=0, mode=mode), torch.einsum("bdd->b", h)[:, None])
    close(jp.vhv(net, x, v, batch_dim=0), torch.einsum("bij,bi,bj->b", h, v, v)[:, None])
    sigma, b = torch.randn(B, D, 2).double(), torch.randn(D).double()
    expected = torch.einsum("bij,bir,bjr->b", h, sigma, sigma)[:, None] + g @ b
    close(jp.weighted_laplacian(net, x, sigma, b, batch_dim=0), expected)
    found = jp.value_and_laplacian(net, x, batch_dim=0)
    close(tuple(found), (net(x), g, torch.einsum("bdd->b", h)[:, None]))


def test_points_along_another_axis(net):
    x = points()
    close(jp.laplacian(lambda z: net(z.mT).mT, x.mT, batch_dim=1), jp.laplacian(net, x, batch_dim=0).mT)
    v = torch.randn(D, B).double()
    close(jp.hvp(lambda z: net(z.mT), x.mT, v, batch_dim=1), jp.hvp(net, x, v.mT, batch_dim=0).mT)


def test_points_in_several_arguments(net):
    x, t = points(), torch.randn(B, 1).double()
    first = nn.Linear(1, D).double()
    u = lambda t, x: net(x + first(t))  # noqa: E731
    together = jp.laplacian(u, (t, x), batch_dim=0)
    apart = jp.laplacian(u, (t, x), batch_dim=0, argnums=0) + jp.laplacian(u, (t, x), batch_dim=0, argnums=1)
    close(together, apart)
    expected = hessians(lambda z: u(z[:1], z[1:]), torch.cat([t, x], 1))
    close(together, torch.einsum("bdd->b", expected)[:, None])


def test_the_divergence_and_the_bilaplacian_of_a_field_at_each_point():
    x = points()
    at_all = lambda x: torch.func.vmap(field)(x)  # noqa: E731
    by_columns = lambda x: field(x.mT).mT  # noqa: E731
    expected = torch.stack([torch.autograd.functional.jacobian(field, z).trace() for z in x])
    close(jp.divergence(by_columns, x, batch_dim=0), expected)
    close(jp.divergence(by_columns, x, batch_dim=0, chunk=1), expected)
    close(at_all(x), by_columns(x))
    each = torch.stack([jp.bilaplacian(lambda z: (z.sin() * z.exp()).sum() ** 2, z) for z in x])
    close(jp.bilaplacian(lambda z: (z.sin() * z.exp()).sum(1) ** 2, x, batch_dim=0), each)


# --- estimates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", ["hutchinson", "axes"])
def test_estimates_are_unbiased(estimate, net):
    x, generator = points(), torch.Generator().manual_seed(0)
    options = {"batch_dim": 0, "estimate": estimate, "generator": generator}
    draws = torch.stack([jp.laplacian(net, x, samples=2, **options) for _ in range(200)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - jp.laplacian(net, x, batch_dim=0)).abs() < 4 * error).all()
    by_columns = lambda x: field(x.mT).mT  # noqa: E731
    draws = torch.stack([jp.divergence(by_columns, x, samples=2, **options) for _ in range(200)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - jp.divergence(by_columns, x, batch_dim=0)).abs() < 4 * error).all()


def test_all_axes_are_exact(net):
    x = points()
    close(jp.laplacian(net, x, batch_dim=0, estimate="axes", samples=D), jp.laplacian(net, x, batch_dim=0))


def test_shared_directions_meet_a_weight_and_a_bias_that_move():
    x, w, b = points(), torch.randn(5, D).double(), torch.randn(5).double()
    f = lambda x, w, b: nn.functional.linear(x, w, b).tanh().sum(-1)  # noqa: E731
    each = [torch.func.hessian(f, argnums=(0, 1, 2))(z, w, b) for z in x]
    v = torch.eye(D).double()
    move = torch.randn(D, 5, D).double(), torch.randn(D, 5).double()
    second = jp.jet(f, (x, w, b), (v[:, None].expand(D, B, D), *move), pairs="diagonal")[2]
    for n, h in enumerate(each):
        flat = torch.cat([v, move[0].flatten(1), move[1]], 1)
        rows = zip((x[0], w, b), h, strict=True)
        whole = torch.cat([torch.cat([block.reshape(of.numel(), -1) for block in row], 1) for of, row in rows])
        close(second[:, n], torch.einsum("ki,ij,kj->k", flat, whole, flat))


@pytest.mark.parametrize("chunk", [None, 2])
def test_sampled_axes_are_columns_of_a_layer_and_vectors_elsewhere(chunk):
    generator = torch.Generator().manual_seed(4)
    x, y, w = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (6, 6, 3))
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(5))[:4]
    functions = (
        lambda x, y: torch.tanh(torch.nn.functional.linear(x, w) - y @ w.t()).prod(1),
        lambda x, y: (x * y).sin().sum(1) + (x @ w.t()).exp().sum(1),
        lambda x, y: x[:, 1].exp() * y.reshape(-1).sin().reshape(6, 5).sum(1),
    )
    for f in functions:
        again = torch.Generator().manual_seed(5)
        found = jp.laplacian(f, (x, y), batch_dim=0, estimate="axes", samples=4, generator=again, chunk=chunk)
        each = [
            torch.func.hessian(lambda z, f=f: f(z[None, :5].expand(6, 5), z[None, 5:].expand(6, 5))[0])(
                torch.cat([a, b])
            )
            for a, b in zip(x, y, strict=True)
        ]
        close(found, torch.stack(each).diagonal(dim1=1, dim2=2)[:, drawn].sum(1) * 10 / 4)
    field = jp.divergence(
        lambda x: (x @ w.t()).tanh() @ w, x, batch_dim=0, estimate="axes", samples=5, generator=torch.Generator()
    )
    close(field, jp.divergence(lambda x: (x @ w.t()).tanh() @ w, x, batch_dim=0))
