"""Wrong uses of derivatives of functions, and tensors of the caller."""

import logging

import pytest
import torch
from torch import nn

import jetplane as jp
from jetplane.transforms.costs import amount

x = torch.tensor([1.0, 2.0, 3.0])
many = torch.ones(1_000_000)


def cubes(x):
    return (x**3).sum()


MISUSES = {
    "no result": (lambda: jp.hessian(lambda x: None, x), jp.DTypeError, "NoneType"),
    "a float as result": (lambda: jp.laplacian(lambda x: 3.0, x), jp.DTypeError, "float"),
    "integers as result": (lambda: jp.jacobian(lambda x: x.long(), x), jp.DTypeError, "int64.*has_aux"),
    "integers as primal": (lambda: jp.hessian(cubes, torch.arange(3)), jp.DTypeError, "int64"),
    "None as primal": (lambda: jp.hessian(cubes, None), jp.DTypeError, "NoneType.*argnums"),
    "None among primals": (lambda: jp.hessian(lambda x, y: cubes(x), (x, None)), jp.DTypeError, "argnums"),
    "complex primals": (lambda: jp.hessian(lambda x: x.abs().sum(), x + 1j), jp.DTypeError, "view_as_real"),
    "no arguments": (lambda: jp.hessian(cubes, ()), jp.ArgumentError, "at least one"),
    "no numbers": (lambda: jp.hessian(cubes, torch.ones(0)), jp.ArgumentError, "at least one number"),
    "argnums": (lambda: jp.hessian(cubes, x, argnums=1), jp.ArgumentError, "argnums"),
    "argnums twice": (lambda: jp.hessian(torch.dot, (x, x), argnums=(0, 0)), jp.ArgumentError, "each once"),
    "a float as argnums": (lambda: jp.hessian(cubes, x, argnums=1.0), jp.ArgumentError, "argnums"),
    "no argnums": (lambda: jp.hessian(cubes, x, argnums=()), jp.ArgumentError, "at least one argument"),
    "no function": (lambda: jp.hessian(x, x), jp.ArgumentError, "hessian: expected a function.*Tensor"),
    "an empty result": (lambda: jp.jacobian(lambda x: (), x), jp.DTypeError, "none in"),
    "a sparse primal": (lambda: jp.hessian(cubes, torch.eye(3).to_sparse()), jp.ArgumentError, "sparse_coo.*values"),
    "a nested primal": (
        lambda: jp.laplacian(cubes, torch.nested.nested_tensor([x, x], layout=torch.jagged)),
        jp.ArgumentError, "nested",
    ),
    "a primal without numbers": (lambda: jp.hessian(cubes, torch.ones(3, device="meta")), jp.DeviceError, "meta"),
    "three results with aux": (
        lambda: jp.laplacian(lambda x: (cubes(x), 1, 2), x, has_aux=True), jp.ArgumentError, "aux",
    ),
    "hvp of a vector": (lambda: jp.hvp(torch.sin, x, x), jp.ShapeError, "one number"),
    "hvp of a vector by reverse mode": (
        lambda: jp.hvp(torch.sin, x, x, mode="forward-over-reverse"), jp.ShapeError, "one number",
    ),
    "hvp of two results": (lambda: jp.hvp(lambda x: (x.sum(), x.sum()), x, x), jp.ShapeError, "2 result"),
    "too many vectors": (lambda: jp.hvp(cubes, x, (x, x)), jp.ShapeError, "structure"),
    "a longer vector": (lambda: jp.hvp(cubes, x, torch.ones(4)), jp.ShapeError, r"\(4,\)"),
    "a vector in another dtype": (lambda: jp.hvp(cubes, x, x.double()), jp.DTypeError, "float64"),
    "None as vector": (lambda: jp.hvp(cubes, x, None), jp.ArgumentError, "NoneType"),
    "a longer tangent": (lambda: jp.jvp(torch.sin, x, torch.ones(4)), jp.ShapeError, r"\(4,\)"),
    "no pair": (lambda: jp.hessian(cubes, x, has_aux=True), jp.ArgumentError, "aux"),
    "order 3": (lambda: jp.jet(cubes, x, x[None], order=3), jp.ArgumentError, "nest"),
    "no such mode": (lambda: jp.hessian(cubes, x, mode="reverse"), jp.ArgumentError, "forward-over-reverse"),
    "no chunk": (lambda: jp.hessian(cubes, x, chunk=0), jp.ArgumentError, "chunk"),
    "an unknown word as chunk": (lambda: jp.bilaplacian(cubes, x, chunk="all"), jp.ArgumentError, "'auto'"),
    "a chunk for the map of linearize": (lambda: jp.linearize(cubes, x, chunk=-1), jp.ArgumentError, "chunk"),
    "a longer vector for the map of linearize": (
        lambda: jp.linearize(cubes, x)[1](torch.ones(4)), jp.ShapeError, r"expected shape \(4, 3\)",
    ),
    "no axis of points at -1": (lambda: jp.laplacian(cubes, x, batch_dim=-1), jp.ArgumentError, "batch_dim"),
    "no generator": (
        lambda: jp.laplacian(cubes, x, estimate="axes", samples=2, generator=3), jp.ArgumentError, "generator",
    ),
    "no such estimate": (lambda: jp.laplacian(cubes, x, estimate="xtrace"), jp.ArgumentError, "hutchinson"),
    "an estimate of no samples": (lambda: jp.laplacian(cubes, x, estimate="axes"), jp.ArgumentError, "samples"),
    "samples of no estimate": (lambda: jp.laplacian(cubes, x, samples=2), jp.ArgumentError, "estimate"),
    "more axes than there are": (
        lambda: jp.laplacian(cubes, x, estimate="axes", samples=4), jp.ArgumentError, "at most",
    ),
    "a field of another shape": (lambda: jp.divergence(lambda x: x[:2], x), jp.ShapeError, "primals' shapes"),
    "sigma of another shape": (lambda: jp.weighted_laplacian(cubes, x, torch.ones(4, 2)), jp.ShapeError, "sigma"),
    "a number as sigma": (lambda: jp.weighted_laplacian(cubes, x, 2.0), jp.DTypeError, "sigma"),
    "a drift of another shape": (
        lambda: jp.weighted_laplacian(cubes, x, torch.eye(3), torch.ones(2)), jp.ShapeError, "drift",
    ),
    "no axis of points": (lambda: jp.laplacian(cubes, x, batch_dim=1), jp.ShapeError, "batch_dim"),
    "a result without points": (lambda: jp.laplacian(cubes, x, batch_dim=0), jp.ShapeError, "axis of 3 points"),
    "different numbers of points": (
        lambda: jp.laplacian(torch.add, (x, torch.ones(2)), batch_dim=0), jp.ShapeError, "as many points",
    ),
    "batch normalization of points": (
        lambda: jp.laplacian(nn.BatchNorm1d(3), torch.randn(5, 3), batch_dim=0), jp.DerivativeError, "eval",
    ),
    "vmap": (lambda: torch.vmap(lambda z: jp.laplacian(cubes, z))(x[None]), jp.ArgumentError, "batch_dim"),
    "torch.func.grad": (
        lambda: torch.func.grad(lambda z: jp.laplacian(cubes, z))(x), jp.ArgumentError, "have a graph",
    ),
    "a Hessian of a million numbers": (lambda: jp.hessian(cubes, many), jp.ArgumentError, "4 TB.*hvp"),
    "a product with it": (lambda: jp.hvp(cubes, many, many, chunk=None), jp.ArgumentError, "4 TB.*over-reverse"),
    "a product in a million runs": (lambda: jp.hvp(cubes, many, many), jp.ArgumentError, "runs.*over-reverse"),
    "reverse mode inside of an evaluation": (
        lambda: jp.hessian(lambda z: jp.hvp(cubes, z, x, mode="forward-over-reverse").sum(), x),
        jp.ArgumentError, "mode='forward'",
    ),
    "autograd inside": (
        lambda: jp.laplacian(lambda z: torch.autograd.grad(cubes(z), z)[0].sum(), x), jp.DerivativeError, "autograd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_a_wrong_use_is_told(name):
    call, error, words = MISUSES[name]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


@pytest.mark.parametrize(
    "f",
    [
        lambda a: a.add_(1).sum(),
        lambda a: a[0:1].mul_(2).sum(),
        lambda a: a.sin_().sum(),
        lambda a: a.__setitem__(0, 1.0) or a.sum(),
        lambda a: a.view(-1).zero_().sum(),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_of_the_caller_are_never_written_to(f, grad):
    a = x.clone().requires_grad_(grad)
    expected = torch.func.hessian(lambda z: f(z.clone()) ** 3)(x).trace()
    torch.testing.assert_close(jp.laplacian(lambda z: f(z) ** 3, a), expected, check_dtype=False)
    assert torch.equal(a, x)


def test_a_write_to_an_argument_where_derivatives_stop_is_refused():
    def f(z):
        with torch.no_grad():
            z.add_(1)
        return cubes(z)

    with pytest.raises(jp.DerivativeError, match="written to in place"):
        jp.laplacian(f, x)


def test_what_auto_chose_is_said(caplog):
    with caplog.at_level(logging.INFO, "jetplane.transforms"):
        jp.hessian(cubes, torch.ones(20), mode="auto")
        jp.hessian(cubes, torch.ones(2), mode="auto")
    assert ["forward-over-reverse" in record.message for record in caplog.records] == [True, False]


def test_an_evaluation_around_has_reverse_mode_only_where_it_may():
    inner = lambda z: jp.hvp(cubes, z, x, mode="auto").sum()  # noqa: E731
    torch.testing.assert_close(jp.jacobian(inner, x), 6 * x)


def test_chunks_leave_one_side_effect():
    calls = torch.zeros(())

    def f(z):
        calls.add_(1)
        return cubes(z)

    torch.testing.assert_close(jp.laplacian(f, x, chunk=1), torch.tensor(36.0))
    assert calls == 1


def test_amounts():
    assert [amount(n) for n in (12, 4096, 4e12)] == ["12 B", "4.1 kB", "4 TB"]
