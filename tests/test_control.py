"""Optimal control: tracing, exact derivatives, known optima, and what is said about bad input."""

import copy
import math
import os
import pickle
import signal
import threading

import pytest
import torch

import jetplane as jp

np = pytest.importorskip("numpy", reason="jetplane.control needs NumPy")
pytest.importorskip("scipy", reason="jetplane.control needs SciPy")

from examples.control import CASES  # noqa: E402
from jetplane.control import ipopt  # noqa: E402
from jetplane.control.guessing import phase_guess  # noqa: E402
from jetplane.control.program import Program, trace  # noqa: E402
from jetplane.control.radau import Mesh, interpolation, radau  # noqa: E402
from jetplane.llvm import available  # noqa: E402

needs_ipopt = pytest.mark.skipif(ipopt.library_path() is None, reason="no libipopt: pip install casadi")
needs_llvm = pytest.mark.skipif(not available(), reason="llvmlite is not installed")
BACKENDS = ["torch", pytest.param("llvm", marks=needs_llvm)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("JETPLANE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


# Derivatives


def dense(program, z, p, weights):
    """Values, Jacobians and Hessians at nodes, as dense tensors with the nodes first."""
    nodes, each = z.shape
    at = program.at(nodes)
    at.variables[:each] = z.T.numpy()
    at.variables[each:] = p.numpy()[:, None]
    at.changed()
    values = torch.from_numpy(at.values().copy()).T
    n = each + len(p)
    jacobian, hessian = torch.zeros(nodes, values.shape[1], n).double(), torch.zeros(nodes, n, n).double()
    for (r, i), row in zip(program.jacobian_keys, at.jacobian(), strict=True):
        jacobian[:, r, i] = torch.from_numpy(row)
    at.weights[:] = weights.T.numpy()
    for (i, j), row in zip(program.hessian_keys, at.hessian(), strict=True):
        hessian[:, i, j] = hessian[:, j, i] = torch.from_numpy(row)
    return values, jacobian, hessian


def compare(function, each, shared=0, backend="torch", nodes=5, scale=1.0, tol=1e-12):
    """A function of (nodes, each) and (shared,) against torch.func, node by node."""
    graph, variables, [results] = trace(lambda z, p: [("f", function(z, p), None)], each, shared, 2)
    program = Program(graph, variables, results, backend)
    generator = torch.Generator().manual_seed(1)
    z = scale * (torch.rand(nodes, each, generator=generator, dtype=torch.float64) + 0.1)
    p = torch.rand(shared, generator=generator, dtype=torch.float64) + 0.1
    weights = torch.randn(nodes, len(results), generator=generator, dtype=torch.float64)
    values, jacobian, hessian = dense(program, z, p, weights)

    def one(v):
        return function(v[None, :each], v[each:]).reshape(-1)

    for n in range(nodes):
        v = torch.cat([z[n], p])
        first = torch.autograd.functional.jacobian(one, v)
        second = torch.autograd.functional.hessian(lambda v, n=n: (one(v) * weights[n]).sum(), v)
        for ours, theirs in ((values[n], one(v)), (jacobian[n], first), (hessian[n], second)):
            assert torch.allclose(ours, theirs.detach(), rtol=tol, atol=tol * (1 + theirs.abs().max().item()))
    return program


FUNCTIONS = {
    "arithmetic": lambda z, p: (z[:, 0] * z[:, 1] - z[:, 2] / z[:, 1]) * 2 - 3 / z[:, 0],
    "alpha": lambda z, p: torch.add(z[:, 0], z[:, 1].square(), alpha=3) - torch.rsub(z[:, 2] ** 2, z[:, 1], alpha=2),
    "powers": lambda z, p: z[:, 0] ** 2.5 + z[:, 1] ** -1 + z[:, 2] ** z[:, 0] + 2 ** z[:, 1],
    "functions": lambda z, p: torch.stack(
        [
            f(z[:, :2]).sum(-1)
            for f in (
                torch.sqrt,
                torch.rsqrt,
                torch.exp,
                torch.log,
                torch.log2,
                torch.log10,
                torch.log1p,
                torch.expm1,
                torch.exp2,
                torch.sin,
                torch.cos,
                torch.tan,
                torch.asin,
                torch.acos,
                torch.atan,
                torch.sinh,
                torch.cosh,
                torch.tanh,
                torch.erf,
                torch.sigmoid,
                torch.square,
                torch.reciprocal,
                torch.abs,
                torch.relu,
                torch.nn.functional.silu,
                torch.nn.functional.softplus,
                torch.nn.functional.gelu,
                torch.nn.functional.elu,
                torch.neg,
                torch.nn.functional.leaky_relu,
                torch.sign,
            )
        ],
        1,
    ),
    "two arguments": lambda z, p: (
        torch.stack(
            [
                f(z[:, 0] * z[:, 2], z[:, 1])
                for f in (
                    torch.atan2,
                    torch.hypot,
                    torch.maximum,
                    torch.minimum,
                    torch.fmax,
                    torch.fmin,
                )
            ],
            1,
        )
        * z[:, 1:2]
    ),
    "scaled softplus": lambda z, p: torch.nn.functional.softplus(z[:, 0] * z[:, 1], beta=3.0),
    "clamp": lambda z, p: z.clamp(0.3, 0.7) * z + z.clamp(min=0.5) + z.clamp(max=0.4).square(),
    "where": lambda z, p: torch.where((z[:, 0] > 0.5) & ~(z[:, 1] >= 0.6), z[:, 0] * z[:, 1], z[:, 2].sin()),
    "masked": lambda z, p: (z * z).masked_fill(z != z.abs(), 0.0),
    "reductions": lambda z, p: torch.stack(
        [
            z.sum(-1),
            z.mean(1),
            z.prod(-1),
            z.norm(dim=-1),
            z.norm(p=1, dim=-1),
            z.norm(p=3, dim=1),
            z.amax(-1),
            z.amin(-1),
            torch.linalg.vector_norm(z, float("inf"), dim=-1),
            z.cumsum(1)[:, 1],
            (z**2).sum((1,)),
        ],
        1,
    ),
    "matrices": lambda z, p: z @ torch.arange(9.0, dtype=torch.float64).reshape(3, 3) * z,
    "batched products": lambda z, p: torch.einsum("bi,bj->bij", z, z[:, :2]).flatten(1) @ torch.ones(6, 2).double(),
    "outer and bmm": lambda z, p: torch.bmm(z[:, :, None], z[:, None, :]).diagonal(dim1=1, dim2=2),
    "linear layer": lambda z, p: torch.nn.functional.linear(z, torch.eye(3).double() + 1, torch.ones(3).double()).sin(),
    "cross": lambda z, p: torch.linalg.cross(z, z.flip(-1) ** 2, dim=-1),
    "structure": lambda z, p: (
        torch.cat([z.roll(1, -1), z[:, [2, 0]], z.repeat(1, 2)[:, :2], z[..., None].mT.squeeze(1)], 1) ** 2
    ),
    "split": lambda z, p: torch.stack(
        [a.squeeze(-1) * b.squeeze(-1) for a, b in zip(z.split(1, 1), z.chunk(3, 1), strict=True)], 1
    ),
    "parameters": lambda z, p: z * p[:3].square() + p[3] * z[:, :1],
    "lerp": lambda z, p: (
        torch.lerp(z[:, 0], z[:, 1] ** 2, z[:, 2]) + torch.addcmul(z[:, 0], z[:, 1], z[:, 2], value=2.0)
    ),
    "addcdiv": lambda z, p: torch.addcdiv(z[:, 0], z[:, 1], z[:, 2], value=-0.5),
    "whole numbers": lambda z, p: (
        (8 * z).round() * z
        + (7 * z - 2).trunc()
        + (3 * z).ceil() * z
        + (5 * z).frac()
        + torch.fmod(3 * z - 1, 0.7)
        + torch.remainder(3 * z - 1, 0.7)
        + torch.round(torch.full((3,), 2.5).double()) * z
    ),
    "no rule for scalars": lambda z, p: torch.lgamma(z + 1).sin() * z,
    "constants": lambda z, p: torch.zeros_like(z) + torch.full((3,), 2.0).double() * z * torch.tensor([1.0, 0.0, 3.0]),
}


# Products in all the shapes that users write: of states, of parameters that all nodes share, and of constants.
SQUARE, WIDE = torch.linspace(-1, 2, 9).double().reshape(3, 3).cos(), torch.linspace(-2, 1, 60).double().sin()
WIDE = WIDE.reshape(3, 20)
PRODUCTS = {
    "vector @ matrix": lambda z, p: p @ SQUARE + z,
    "vector @ matrix, alike at all nodes": lambda z, p: p.square() @ SQUARE,
    "matrix @ vector": lambda z, p: (SQUARE @ p) * z,
    "vector @ vector": lambda z, p: (p @ SQUARE[0]) * z + (p @ p) * z.square(),
    "vector @ matrix @ vector": lambda z, p: (p @ SQUARE @ p) * z,
    "vector @ wide matrix": lambda z, p: (p @ WIDE).tanh() @ WIDE.T + z,
    "states @ wide matrix": lambda z, p: z @ WIDE @ WIDE.T + p,
    "states and parameters @ wide matrix": lambda z, p: torch.cat([z, p.expand(len(z), 3)], 1) @ WIDE.repeat(2, 1),
    "vector @ transposed states": lambda z, p: (p @ z.T)[:, None] * z + (SQUARE[0] @ z.T)[:, None],
    "states @ vector": lambda z, p: (z @ p)[:, None] * z + (z @ SQUARE[0])[:, None],
    "states @ transposed": lambda z, p: z @ SQUARE.T * (z @ SQUARE.mT),
    "matrix @ columns": lambda z, p: (SQUARE @ z[..., None])[..., 0] * (SQUARE @ z.unsqueeze(-1)).squeeze(-1),
    "matrix @ transposed states": lambda z, p: (SQUARE @ z.T).T * (torch.outer(p, p) @ z.mT).mT,
    "row @ column": lambda z, p: (z[:, None] @ z[:, :, None])[:, 0] * z,
    "batched": lambda z, p: torch.bmm(z[:, :, None], z[:, None]).sin().sum(-1) + torch.matmul(z[:, None], SQUARE)[:, 0],
    "matrices of states": lambda z, p: ((torch.diag_embed(z) @ SQUARE).mT @ z[..., None]).squeeze(-1),
    "einsum": lambda z, p: torch.cat(
        [
            torch.einsum("ni,ij->nj", z, SQUARE),
            torch.einsum("ij,nj->ni", SQUARE, z),
            torch.einsum("ni,nj->nij", z, z).flatten(1),
            torch.einsum("ni,ij,nj->n", z, SQUARE, z)[:, None],
            torch.einsum("...i,ij->...j", z, SQUARE),
            torch.einsum("i,ij->j", p, SQUARE).expand(len(z), 3),
            torch.einsum("nji,nj->ni", z[:, :, None] * z[:, None], z),
            torch.einsum("i,ni->n", p, z)[:, None],
        ],
        1,
    ),
    "of two vectors": lambda z, p: (
        torch.dot(p, SQUARE[0]) * z
        + torch.inner(p, SQUARE[1]) * z
        + torch.vdot(p, p) * z
        + torch.outer(p, SQUARE[2]).sin().sum() * z
        + torch.ger(p, p)[0, 1] * z
        + torch.kron(p, p)[5]
    ),
    "of two states": lambda z, p: torch.linalg.vecdot(z, z.sin())[:, None] * torch.inner(z, SQUARE),
    "linear": lambda z, p: torch.nn.functional.linear(z, SQUARE, p) * torch.nn.functional.linear(p, SQUARE),
    "linear, three dimensions": lambda z, p: torch.nn.functional.linear(z[:, :, None].expand(-1, 3, 3), SQUARE).prod(1),
    "bilinear": lambda z, p: torch.nn.functional.bilinear(z, z, torch.stack([SQUARE, SQUARE.T, SQUARE @ SQUARE])),
    "tensordot": lambda z, p: torch.tensordot(z, SQUARE, 1) * torch.tensordot(z, SQUARE, ([1], [1])),
    "chains": lambda z, p: (
        torch.linalg.multi_dot([z, SQUARE, SQUARE])
        + torch.linalg.multi_dot([p, SQUARE, p]) * z
        + z @ torch.linalg.matrix_power(torch.outer(p, p), 3)
    ),
    "sums with products": lambda z, p: (
        torch.addmv(p, SQUARE, p, beta=2, alpha=0.5) * z
        + torch.addmm(p, z, SQUARE, alpha=0.3)
        + torch.addr(SQUARE, p, p, alpha=2.0).sum() * z
        + torch.addbmm(SQUARE, torch.outer(p, p)[None], SQUARE[None], beta=0.5).sum(0)
        + torch.baddbmm(p, z[:, None], torch.outer(p, p).expand(len(z), 3, 3))[:, 0]
    ),
    "whole matrices": lambda z, p: (
        torch.trace(torch.outer(p, p)) * z + torch.block_diag(p[None], SQUARE[:1]).sin().sum() * z + torch.diag(p) @ p
    ),
    "a network's transposed values": lambda z, p: (torch.outer(p, p) @ torch.lgamma(z + 1).T).T * z,
}
IN_PLACE = {
    "squeeze_": lambda z, p: (SQUARE @ z.unsqueeze(-1)).squeeze_(-1) * z,
    "squeeze_ of all": lambda z, p: (z[:, :, None] * z[:, None, :1]).squeeze_().sin(),
    "unsqueeze_": lambda z, p: (z * z).unsqueeze_(-1).unsqueeze_(0).squeeze_(0).squeeze_(-1),
    "transpose_": lambda z, p: (z * z).transpose_(0, 1).t_().swapaxes_(0, 1).swapdims_(0, 1),
    "as_strided_": lambda z, p: (z * z).as_strided_((len(z), 2), (3, 1), 1),
    "shared memory": lambda z, p: (lambda y: (y.view(y.shape).unsqueeze_(-1).mul_(p[:, None]), y.sin())[1])(z * z),
    "of a network": lambda z, p: torch.lgamma(z[..., None] + 1).squeeze_(-1) * z,
    "relu_ of a network": lambda z, p: (z @ WIDE).sub_(0.1).relu_() @ WIDE.T,
    "scalars into a network": lambda z, p: (z @ WIDE).mul_(z[:, :1]).tanh_() @ WIDE.T,
}


class TestTracing:
    @pytest.mark.parametrize("name", PRODUCTS)
    def test_products_equal_torch(self, name):
        def function(z, p):
            value = PRODUCTS[name](z, p)
            return value if value.dim() == 2 else value.expand(len(z), -1)

        compare(function, 3, 3)

    @pytest.mark.parametrize("name", IN_PLACE)
    def test_shapes_in_place_equal_torch(self, name):
        compare(IN_PLACE[name], 3, 3)

    def test_values_of_functions_with_views_are_not_written(self):
        def function(z, p):
            value = torch.lgamma(z + 1)
            view = value[:, 1:]
            value.mul_(2.0)
            return view

        with pytest.raises(jp.TraceError, match="without the underscore\n  at .*test_control.py"):
            trace(lambda z, p: [("f", function(z, p), None)], 3, 0, 2)

    def test_a_norm_has_a_derivative_at_zero(self):
        """That of torch, in both orders."""
        program = compare(lambda z, p: z[:, :2].norm(dim=-1) + z[:, 2], 3)
        values, slopes, bends = dense(program, torch.zeros(4, 3).double(), torch.zeros(0).double(), torch.ones(4, 1))
        assert not values.any() and not bends.any()
        assert torch.equal(slopes, torch.tensor([0.0, 0.0, 1.0]).double().expand(4, 1, 3))

    def test_columns_that_meet_values_without_columns_are_named(self):
        with pytest.raises(jp.TraceError, match=r"\(nodes,\) and \(nodes, 1\) meet, .* x.name\[:, 0\]"):
            trace(lambda z, p: [("f", z.sum(-1) + z[:, :1], None)], 3, 0, 2)

    def test_no_second_derivative_of_torchs(self):
        with pytest.raises(jp.TraceError, match="no second derivatives"):
            compare(lambda z, p: torch.cdist(z[:, None], SQUARE[None])[:, 0], 3)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_equals_torch(self, name, backend):
        compare(FUNCTIONS[name], 3, 4 if name == "parameters" else 0, backend)

    def test_writes(self):
        def f(z, p):
            y = torch.zeros(z.shape[0], 3, dtype=z.dtype)
            y[:, 0] = z[:, 0] * z[:, 1]
            view = y[:, 1:]
            view.add_(z[:, 1:].sin())
            y[:, 2] *= z[:, 0]
            return y

        compare(f, 3)

    def test_structure_of_a_rotation_is_exact(self):
        program = compare(lambda z, p: z[:, :1] * z[:, 1:2] + z[:, 2:] - z[:, 2:], 3)
        assert program.jacobian_keys == [(0, 0), (0, 1)]
        assert program.hessian_keys == [(1, 0)]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_network(self, backend):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(3, 24), torch.nn.Tanh(), torch.nn.Linear(24, 20), torch.nn.SiLU(), torch.nn.Linear(20, 2)
        ).double()  # fmt: skip
        program = compare(lambda z, p: net(z * z) * z[:, :2], 3, backend=backend, tol=1e-11)
        assert len(program.externals) == 1

    def test_two_networks_one_after_the_other(self):
        torch.manual_seed(0)
        one = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Sigmoid(), torch.nn.Linear(32, 2)).double()
        two = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).double()

        def f(z, p):
            a = one(z) * z[:, :2]
            return two(torch.cat([a, z[:, 1:].exp()], 1)) * a[:, :1]

        program = compare(f, 3, tol=1e-11)
        assert len(program.externals) == 2

    def test_a_function_that_scalars_cannot_do_is_torchs(self):
        norm = torch.nn.LayerNorm(3).double()
        program = compare(
            lambda z, p: torch.linalg.solve(torch.eye(3).double() + z[:, :, None] * z[:, None, :], norm(z)), 3
        )
        assert len(program.externals) >= 1

    def test_an_operator_that_torch_cannot_see_into(self):
        @torch.library.custom_op("jetplane_tests::wave", mutates_args=())
        def wave(x: torch.Tensor, shift: float) -> torch.Tensor:
            return torch.from_numpy(np.sin(x.detach().numpy() + shift))

        wave.register_fake(lambda x, shift: torch.empty_like(x))
        wave.register_autograd(
            lambda ctx, g: (g * wave(ctx.x, ctx.shift + np.pi / 2), None),
            setup_context=lambda ctx, inputs, output: ctx.__dict__.update(x=inputs[0], shift=inputs[1]),
        )
        program = compare(lambda z, p: wave(z * z, 0.3) * z, 3)
        assert len(program.externals) == 1

    def test_look_up_in_a_table(self):
        knots, values = torch.linspace(0, 2, 5).double(), torch.randn(6, dtype=torch.float64)

        def f(z, p):
            place = torch.searchsorted(knots, z[:, 0].contiguous())
            left = knots[(place - 1).clamp(min=0)]
            return values[place] * (z[:, 0] - left) + z[:, 1] ** 2

        compare(f, 3)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda z, p: z if z[0, 0] > 0 else -z, "Python branches"),
            (lambda z, p: z if z[:, 0] > 0 else -z, "Python branches"),
            (lambda z, p: max(z[:, :1], z[:, 1:2]), "Python branches"),
            (lambda z, p: torch.from_numpy(np.sin(z.numpy())), "NumPy.*per_node"),
            (lambda z, p: torch.tensor(np.sin(z)), "NumPy.*per_node"),
            (lambda z, p: z * torch.rand(1), "random numbers"),
            (lambda z, p: z * z[0, 1].item(), "value is read"),
            (lambda z, p: z - z.mean(0), "different nodes"),
            (lambda z, p: z[:, 0] * z[:, 1:2], "different nodes"),
            (lambda z, p: z.flip(0), "depends on other nodes"),
            (lambda z, p: z * torch.rand(z.shape[0], 1), "random numbers"),
            (lambda z, p: torch.nn.functional.dropout(z), "random numbers"),
            (lambda z, p: z * torch.arange(z.shape[0])[:, None].double(), "not the same function at each node"),
            (lambda z, p: torch.nn.functional.batch_norm(z, None, None, training=True), "different nodes"),
            (lambda z, p: torch.softmax(z, 0), "different nodes"),
        ],
    )
    def test_refused_with_the_users_line(self, function, message):
        with pytest.raises(jp.TraceError, match=message) as caught:
            trace(lambda z, p: [("f", function(z, p), None)], 3, 0, 2)
        assert "test_control.py:" in str(caught.value)

    def test_ties_are_rounded_to_even(self):
        x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4, -2.6], dtype=torch.float64)[:, None]
        graph, variables, [results] = trace(lambda z, p: [("f", z.round(), None)], 1, 0, 2)
        values = dense(Program(graph, variables, results, "torch"), x, torch.zeros(0).double(), torch.ones_like(x))[0]
        assert torch.equal(values, x.round())

    @pytest.mark.parametrize("batched", [False, True])
    def test_code_that_torch_cannot_see(self, batched):
        """By its own rule for jets."""

        def seen(z):
            return torch.stack([z[..., 0].sin() * z[..., 1], z[..., 0] * z[..., 2].exp()], -1)

        box = jp.blackbox(lambda z: seen(z.detach()), derivative=lambda x, v: jp.jvp(seen, x[0], v[0])[1])
        f = jp.control.per_node(box, outputs=2, batched=batched)
        z = torch.rand(4, 3, dtype=torch.float64)
        assert (f(z) - seen(z)).abs().max() < 1e-15  # plain values
        graph, variables, [results] = trace(lambda z, p: [("f", f(z) * z[:, :1], None)], 3, 0, 2)
        program, weights = Program(graph, variables, results, "torch"), torch.rand(4, 2).double()
        values, slopes, bends = dense(program, z, torch.zeros(0).double(), weights)

        def whole(z):
            return seen(z) * z[0]

        for n, row in enumerate(z):
            assert (values[n] - whole(row)).abs().max() < 1e-14
            assert (slopes[n] - torch.func.jacrev(whole)(row)).abs().max() < 1e-12
            expected = torch.func.hessian(lambda z, w=weights[n]: whole(z) @ w)(row)
            assert (bends[n] - expected).abs().max() < 1e-6  # second derivatives are differences of first ones
        with pytest.raises(jp.errors.ShapeError, match="must give shape .*3.*, got"):
            jp.control.per_node(seen, outputs=3, batched=batched)(z)
        with pytest.raises(jp.errors.ShapeError, match=r"shape \(nodes, k\), got \[3\]"):
            f(z[0])
        if batched:
            with pytest.raises(jp.TraceError, match="different nodes"):
                jp.control.per_node(lambda z: z - z.mean(0), outputs=3, batched=True)(z)

    def test_values_do_not_outlive_their_trace(self):
        kept = []
        trace(lambda z, p: [("f", kept.append(z) or z, None)], 2, 0, 2)
        with pytest.raises(jp.TraceError, match="outside it"):
            kept[0] + 1

    def test_writes_outside_are_refused(self):
        outside = torch.zeros(2, 3).double()

        def f(z, p):
            outside.copy_(z)
            return outside

        with pytest.raises(jp.TraceError, match="made outside it"):
            trace(lambda z, p: [("f", f(z, p), None)], 3, 0, 2)


class TestRadau:
    @pytest.mark.parametrize("n", [2, 3, 7, 12, 20])
    def test_exact_for_polynomials(self, n):
        points, weights, matrix = radau(n)
        nodes = np.append(points, 1.0)
        for k in range(2 * n - 1):
            assert weights @ points**k == pytest.approx((1 + (-1) ** k) / (k + 1), abs=1e-12)
        for k in range(n + 1):
            slope = k * points ** max(k - 1, 0)
            np.testing.assert_allclose(matrix @ nodes**k, slope, atol=1e-9)
            at = np.array([-0.3, 0.2, points[-1]])
            np.testing.assert_allclose(interpolation(nodes, at) @ nodes**k, at**k, atol=1e-10)

    def test_mesh(self):
        mesh = Mesh((0.25, 0.75), (2, 4))
        assert mesh.weights.sum() == pytest.approx(1)
        x = np.stack([mesh.times**2, mesh.times], 1)
        at = np.array([0.0, 0.1, 0.25, 0.9, 1.0])
        np.testing.assert_allclose(mesh.evaluate(x, at), np.stack([at**2, at], 1), atol=1e-14)

    @pytest.mark.parametrize("arguments", [((0.5,), (2, 2)), ((), ()), ((0.5, 0.6), (2, 2)), ((1.0,), (1,))])
    def test_bad_meshes(self, arguments):
        with pytest.raises(jp.errors.ArgumentError):
            Mesh(*arguments)


def two_phases():
    """Everything at once: free times, path, boundary and integral constraints, parameters, linked phases."""
    ocp = jp.control.Problem()
    ocp.parameter("k", 2, 0.0, 5.0)
    a = ocp.phase("a", states={"x": 2, "v": (1, -9, 9)}, controls={"u": (2, -1, 1)}, t0=(0.0, 1.0), tf=(2.0, 9.0))
    a.dynamics = lambda x, u, t, p: {
        "x": torch.sin(x.x * t) * x.v + u.u * p.k,
        "v": (u.u * x.x).sum(-1) * t[:, 0] - x.v[:, 0] ** 3,
    }
    a.path["g"] = (lambda x, u, t, p: (x.x**2).sum(-1) * t[:, 0], None, 3.0)
    a.integral["E"] = (lambda x, u, t, p: (u.u**2).sum(-1) * p.k[0] * t[:, 0], 0, 9)
    b = ocp.phase("b", states={"x": 2}, controls={"w": 1}, t0=(0.0, 9.0), tf=5.0)
    b.dynamics = lambda x, u, t, p: torch.stack([x.x[:, 1] * u.w[:, 0], -x.x[:, 0] * t[:, 0]], 1)
    ocp.link("a", "b")
    ocp.boundary["turn"] = (lambda e: e.a.x0.x * e.b.xf.x - e.p.k, -1.0, None)
    ocp.minimize(
        final=lambda e: (e.b.xf.x**2).sum() * e.a.tf + e.a.integral.E * e.p.k[1] * e.a.t0,
        running={"a": lambda x, u, t, p: x.v**2 * p.k[1] * t, "b": lambda x, u, t, p: u.w**2 * x.x[:, :1]},
    )
    return ocp


def differences(f, y, h=1e-6):
    return np.stack([(f(y + h * e) - f(y - h * e)) / (2 * h) for e in np.eye(len(y))], -1)


class TestNLP:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_derivatives_of_everything_at_once(self, backend):
        nlp = two_phases().nlp(mesh={"a": Mesh((0.3, 0.7), (3, 2)), "b": (2, 2)}, backend=backend)
        rng = np.random.default_rng(0)
        y, multipliers = rng.random(nlp.n), rng.normal(size=nlp.m)
        np.testing.assert_allclose(nlp.gradient(y), differences(nlp.objective, y), atol=1e-8)
        jacobian = nlp.jacobian_matrix(y).toarray()
        np.testing.assert_allclose(jacobian, differences(nlp.constraints, y), atol=1e-8)

        def slope(y):
            return 0.7 * nlp.gradient(y) + nlp.jacobian_matrix(y).T @ multipliers

        hessian = nlp.hessian_matrix(y, multipliers, 0.7).toarray()
        np.testing.assert_allclose(hessian, differences(slope, y), atol=1e-7)
        # The structure has no entry that is zero everywhere.
        assert (np.abs(nlp.hessian(y, multipliers, 0.7)) > 0).mean() > 0.99

    def test_every_row_and_column_has_a_name(self):
        nlp = two_phases().nlp(mesh=(2, 2))
        assert len({nlp.constraint_name(i) for i in range(nlp.m)}) == nlp.m
        assert len({nlp.variable_name(i) for i in range(nlp.n)}) == nlp.n
        assert nlp.variable_name(nlp.n - 1) == "parameter k[1]"
        assert nlp.constraint_name(nlp.m - 1) == "boundary constraint turn[1]"

    @pytest.mark.parametrize("name", ["powered_descent", "low_thrust", "quadrotor", "shuttle", "learned"])
    def test_nodes_of_real_problems_equal_torch(self, name):
        problem = CASES[name]().problem
        nlp = problem.nlp(mesh=(1, 3))
        [(key, model)] = nlp.model.phases.items()
        ph, program = model.phase, model.program
        nx, nu = ph.states.size, ph.controls.size
        rng = torch.Generator().manual_seed(0)
        z = torch.rand(3, nx + nu + 1, generator=rng, dtype=torch.float64) * 0.5 + 0.4
        weights = torch.randn(3, len(model.names), generator=rng, dtype=torch.float64)
        values, jacobian, hessian = dense(program, z, torch.zeros(0).double(), weights)
        running = problem.running.get(key)

        def f(v):
            from jetplane.control.model import dynamics_parts
            from jetplane.control.problem import Parts

            a = (Parts(v[None, :nx], ph.states), Parts(v[None, nx:-1], ph.controls), v[None, -1:], None)
            parts = [value for _, value, _ in dynamics_parts(ph, ph.dynamics(*a))]
            parts += [running(*a)] if running else []
            parts += [c.function(*a) for c in ph.path.values()]
            return torch.cat([part.reshape(-1) for part in parts])

        for n in range(3):
            first = torch.autograd.functional.jacobian(f, z[n])
            second = torch.autograd.functional.hessian(lambda v, n=n: (f(v) * weights[n]).sum(), z[n])
            for ours, theirs in ((values[n], f(z[n])), (jacobian[n], first), (hessian[n], second)):
                size = 1 + theirs.abs().max().item()
                assert (ours - theirs).abs().max().item() < 1e-12 * size


@needs_ipopt
class TestKnownOptima:
    @pytest.mark.parametrize(
        "name", ["brachistochrone", "bryson_denham", "goddard", "hyper_sensitive", "moon_lander", "shuttle"]
    )
    def test_optimum(self, name):
        case = CASES[name]()
        solution = case.problem.solve(**case.options)
        assert solution.status is jp.control.Status.SOLVED
        assert abs(solution.objective - case.optimum) < case.tolerance * max(1, abs(case.optimum))

    def test_a_small_cost_takes_the_ripples_off_a_singular_arc(self):
        smooth, rippled = (CASES[name]().problem.solve(mesh=(60, 3)) for name in ("goddard_smooth", "goddard"))
        steps = [float(np.abs(np.diff(s.u.T[:, 0])).sum()) for s in (smooth, rippled)]
        assert steps[0] < 5.2 < 6 < steps[1]
        assert 0 < rippled.x.h[-1, 0] - smooth.x.h[-1, 0] < 2e-6

    def test_cart_pole_is_that_of_a_fine_mesh(self):
        case = CASES["cart_pole"]()
        refined = case.problem.solve(**case.options)
        fine = case.problem.solve(mesh=(60, 4))
        assert refined.objective == pytest.approx(fine.objective, rel=1e-6)
        assert max(refined.simulate().difference.values()) < 1e-5

    def test_learned_dynamics_are_near_the_true_ones(self):
        learned, known = (CASES[name]() for name in ("learned", "known"))
        first, second = learned.problem.solve(**learned.options), known.problem.solve(**known.options)
        assert first.success and second.success
        assert first.objective == pytest.approx(second.objective, rel=0.02)

    @pytest.mark.parametrize("name", ["powered_descent", "low_thrust", "quadrotor"])
    @pytest.mark.long
    def test_flight(self, name):
        case = CASES[name]()
        assert case.problem.solve(**case.options).status is jp.control.Status.SOLVED


class TestGuess:
    def path(self, function, **guess):
        ocp = double_integrator()
        ocp.phases["move"].path["p"] = (function, None, 10.0)
        ocp.phases["move"].guess(**guess)
        return ocp

    def test_derivatives_that_are_not_finite_are_named(self):
        ocp = self.path(lambda x, u, t, p: u.a.square().sum(-1).sqrt())
        with pytest.raises(jp.errors.NonFiniteError, match="derivative of .* by control a at node 0 .*square root"):
            ocp.solve(mesh=(3, 2), solver="banded")
        assert (
            self.path(lambda x, u, t, p: u.a.square().sum(-1).sqrt(), a=1.0).solve(mesh=(3, 2), solver="banded").success
        )
        ocp = double_integrator()
        ocp.minimize(final=lambda e: e.move.xf.x, running=lambda x, u, t, p: u.a.abs().sqrt())
        with pytest.raises(jp.errors.NonFiniteError, match="derivative of the cost by control a at node 0"):
            ocp.solve(mesh=(3, 2), solver="banded")

    def test_at_a_bound_they_are_those_within(self):
        ocp = jp.control.Problem()
        ph = ocp.phase("other", states={"y": 1}, controls={"w": (1, 0.0, 4.0)}, t0=0.0, tf=1.0)
        ph.dynamics = lambda x, u, t, p: {"y": u.w.sqrt()}
        ph.start(y=0.0)
        ph.end(y=1.0)
        ph.guess(w=0.0)
        ocp.minimize(running=lambda x, u, t, p: u.w.square())
        assert ocp.solve(mesh=(3, 2), solver="banded").success


def double_integrator(**times):
    """Rest to rest over one unit of length, least square of the acceleration: cost 12, x = 3 t² - 2 t³."""
    ocp = jp.control.Problem()
    ph = ocp.phase("move", states={"x": 1, "v": 1}, controls={"a": 1}, **{"t0": 0.0, "tf": 1.0, **times})
    ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
    ph.start(x=0.0, v=0.0)
    ph.end(x=1.0, v=0.0)
    ocp.minimize(running=lambda x, u, t, p: u.a.square())
    return ocp


class TestSolving:
    @needs_ipopt
    def test_costates_are_those_of_the_maximum_principle(self):
        sol = double_integrator().solve(mesh=(3, 4))
        # The cost 12 d² has the derivative -24 by the start of x; a = 6 - 12 t = -p_v / 2.
        np.testing.assert_allclose(sol.costates.x, -24.0, atol=1e-6)
        np.testing.assert_allclose(sol.costates.v[:, 0], -2 * (6 - 12 * sol.t), atol=1e-6)
        np.testing.assert_allclose(sol.x.x[:, 0], 3 * sol.t**2 - 2 * sol.t**3, atol=1e-8)

    @needs_ipopt
    def test_costates_are_slopes_of_the_cost_and_do_not_depend_on_scaling(self):
        costs, costates = [], []
        for start, scaling in ((0.0, "auto"), (1e-4, "none"), (-1e-4, {"v": 50.0, "a": 0.1})):
            ocp = double_integrator()
            ocp.phases["move"].start(v=start)
            sol = ocp.solve(mesh=(3, 4), scaling=scaling)
            costs.append(sol.objective)
            costates.append(sol.costates.v[0, 0])
        assert costates == pytest.approx([(costs[1] - costs[2]) / 2e-4] * 3, rel=1e-3)

    def test_trust_constr_where_there_is_no_ipopt(self):
        sol = double_integrator().solve(mesh=(3, 3), solver="trust-constr")
        assert sol.success and sol.objective == pytest.approx(12.0, abs=1e-6)

    @needs_ipopt
    def test_integral_and_parameter(self):
        ocp = jp.control.Problem()
        ocp.parameter("k", 1, 0.0, 3.0, guess=1.0)
        ph = ocp.phase("a", states={"x": 1}, controls={"u": 1}, t0=0.0, tf=1.0)
        ph.dynamics = lambda x, u, t, p: {"x": p.k * u.u}
        ph.integral["effort"] = (lambda x, u, t, p: u.u.square(), None, 1.0)
        ph.start(x=0.0)
        ocp.minimize(final=lambda e: -e.a.xf.x + e.p.k.square() / 2)
        sol = ocp.solve(mesh=(2, 3))
        # u = 1 uses the whole effort, k = 1 balances gain and price.
        assert sol.integral.effort == pytest.approx(1.0, abs=1e-6)
        assert sol.p.k == pytest.approx(1.0, abs=1e-5)
        assert sol.objective == pytest.approx(-0.5, abs=1e-6)

    @needs_ipopt
    def test_linked_phases_are_as_good_as_one(self):
        ocp = jp.control.Problem()
        for name, t0, tf in (("one", 0.0, (0.1, 0.9)), ("two", (0.1, 0.9), 1.0)):
            ph = ocp.phase(name, states={"x": 1, "v": 1}, controls={"a": 1}, t0=t0, tf=tf)
            ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
        ocp.phases["one"].start(x=0.0, v=0.0)
        ocp.phases["two"].end(x=1.0, v=0.0)
        ocp.link("one", "two")
        ocp.boundary["half"] = (lambda e: e.one.tf, 0.5, 0.5)
        cost = lambda x, u, t, p: u.a.square()  # noqa: E731
        ocp.minimize(running={"one": cost, "two": cost})
        sol = ocp.solve(mesh=(2, 3))
        assert sol.objective == pytest.approx(12.0, abs=1e-6)
        assert sol["one"].x.x[-1, 0] == pytest.approx(0.5, abs=1e-6)
        with pytest.raises(AttributeError, match="one, two"):
            sol.x  # noqa: B018

    @needs_ipopt
    def test_warm_start_takes_few_iterations(self):
        case = CASES["brachistochrone"]()
        cold = case.problem.solve(mesh=(10, 4))
        warm = case.problem.solve(mesh=(10, 4), guess=cold)
        finer = case.problem.solve(mesh=(15, 4), guess=cold)
        assert warm.iterations < cold.iterations / 2
        assert finer.iterations < cold.iterations

    @needs_ipopt
    def test_refinement_reaches_its_accuracy_and_simulation_agrees(self):
        sol = CASES["cart_pole"]().problem.solve(accuracy=1e-5)
        assert sol.error.max() <= 1e-5 and len(sol.history) > 1
        assert sol.history[0][1] > sol.history[-1][1]
        assert sol.simulate().difference["swing"] < 1e-4

    @needs_ipopt
    def test_backends_agree(self):
        objectives = [
            CASES["brachistochrone"]().problem.solve(mesh=(5, 4), backend=b).objective
            for b in ("torch", *(["llvm"] if available() else []))
        ]
        assert objectives == pytest.approx([objectives[0]] * len(objectives), rel=1e-9)

    @needs_ipopt
    def test_ctrl_c_returns_the_best_iterate(self, monkeypatch):
        from jetplane.control import solving

        def interrupting(self, nlp):
            return lambda it: os.kill(os.getpid(), signal.SIGINT) if it.number == 5 else None

        monkeypatch.setattr(solving._Line, "of", interrupting)
        case = CASES["cart_pole"]()
        before = signal.getsignal(signal.SIGINT)
        sol = case.problem.solve(mesh=(10, 3))
        assert signal.getsignal(signal.SIGINT) is before
        assert sol.status is jp.control.Status.STOPPED and sol.iterations == 5
        assert np.isfinite(sol.x.all).all() and not sol.success
        assert case.problem.solve(mesh=(10, 3), solver="trust-constr").status is jp.control.Status.STOPPED

    @needs_ipopt
    def test_an_error_in_a_function_comes_out_as_it_is(self, monkeypatch):
        from jetplane.control import solving

        def failing(self, nlp):
            def fail(it):
                raise KeyError("mine")

            return fail

        monkeypatch.setattr(solving._Line, "of", failing)
        with pytest.raises(KeyError, match="mine"):
            CASES["cart_pole"]().problem.solve(mesh=(10, 3))

    @needs_ipopt
    def test_a_coarse_mesh_is_warned_of(self):
        case = CASES["cart_pole"]()
        with pytest.warns(jp.errors.CoarseMeshWarning, match="phase 'swing' are off by .* use mesh='refine'"):
            sol = case.problem.solve(mesh=(3, 3))
        assert sol.success and sol.error.max() > 0.05

    @needs_ipopt
    def test_limits(self):
        case = CASES["cart_pole"]()
        sol = case.problem.solve(mesh=(10, 3), max_iterations=2)
        assert sol.status is jp.control.Status.ITERATION_LIMIT and not sol.success
        sol = case.problem.solve(mesh=(40, 4), time_limit=1e-3)
        assert sol.status is jp.control.Status.TIME_LIMIT

    @needs_ipopt
    def test_infeasible(self):
        ocp = double_integrator()
        ocp.phases["move"].path["slow"] = (lambda x, u, t, p: x.v, -0.5, 0.5)
        sol = ocp.solve(mesh=(4, 3))
        assert sol.status in (jp.control.Status.INFEASIBLE, jp.control.Status.RESTORATION_FAILED)
        assert "relax bounds" in sol.status.value

    @needs_ipopt
    def test_progress(self, capsys):
        double_integrator().solve(mesh=(2, 3), progress=True)
        assert "iteration 0: cost" in capsys.readouterr().err

    @needs_ipopt
    def test_saved_and_loaded(self, tmp_path):
        ocp = double_integrator()
        sol = ocp.solve(mesh=(3, 3))
        sol.save(tmp_path / "a.npz")
        again = jp.control.load(tmp_path / "a.npz", ocp)
        np.testing.assert_array_equal(again.x.v, sol.x.v)
        assert again.status is sol.status and again.objective == sol.objective and again.history == sol.history
        assert ocp.solve(mesh=(3, 3), guess=again).iterations <= sol.iterations
        for mesh in ((3, 3), (4, 4)):  # multipliers go through the file, also those that other meshes start from
            one, two = (ocp.solve(mesh=mesh, guess=guess) for guess in (sol, again))
            assert (one.iterations, one.objective) == (two.iterations, two.objective)
        assert again["move"].duals.keys() == sol["move"].duals.keys() and len(again["move"].duals) == 6
        with pytest.raises(jp.errors.CheckpointError, match="another problem"):
            jp.control.load(tmp_path / "a.npz", CASES["goddard"]().problem)
        (tmp_path / "b.npz").write_bytes(b"no")
        with pytest.raises(jp.errors.CheckpointError, match="cannot be read"):
            jp.control.load(tmp_path / "b.npz", ocp)

    @needs_ipopt
    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib", reason="pictures need it")
        sol = double_integrator().solve(mesh=(3, 3))
        sol.plot(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10_000
        assert len(sol.plot().axes) == 4

    @needs_ipopt
    def test_between_nodes(self):
        sol = double_integrator().solve(mesh=(3, 4))
        x, u = sol.at([0.0, 0.37, 1.0])
        np.testing.assert_allclose(u.a[:, 0], [6.0, 6 - 12 * 0.37, -6.0], atol=1e-6)
        with pytest.raises(jp.errors.ArgumentError, match="within"):
            sol.at(1.5)

    def test_guess_by_simulation(self):
        ocp = double_integrator(tf=(0.5, 3.0))
        ph = ocp.phases["move"]
        ph.guess_by_simulation(tf=2.0, steps=20, a=lambda t: t)
        np.testing.assert_allclose(ph.guesses["v"][:, 0], np.linspace(0, 2, 21) ** 2 / 2, atol=1e-5)
        with pytest.raises(jp.errors.ArgumentError, match="has no"):
            ph.guess(z=0.0)

    @needs_ipopt
    def test_check(self):
        report = double_integrator().check()
        assert report.gradient_error < 1e-6 and report.jacobian_error < 1e-6 and report.hessian_error < 1e-6
        kink = double_integrator()
        kink.phases["move"].dynamics = lambda x, u, t, p: {"x": x.v.abs().sqrt(), "v": u.a}
        kink.phases["move"].guess(v=1e-7)
        assert any("differs from differences" in w for w in kink.check().warnings)


class TestBadInput:
    """Each is typed, names the place and says what came."""

    def problem(self, **change):
        ocp = double_integrator()
        for name, value in change.items():
            setattr(ocp.phases["move"], name, value)
        return ocp

    def test_bounds_that_cross(self):
        ocp = jp.control.Problem()
        with pytest.raises(jp.errors.ArgumentError, match=r"'v': bounds cross in entry 1: lower 3 is above upper 2"):
            ocp.phase("a", states={"v": (2, [0.0, 3.0], 2.0)}, t0=0.0, tf=1.0)
        ocp = self.problem()
        ocp.phases["move"].path["p"] = (lambda x, u, t, p: x.v, 1.0, 0.0)
        with pytest.raises(jp.errors.ArgumentError, match="'p' of 'move': bounds cross"):
            ocp.nlp()
        with pytest.raises(jp.errors.ArgumentError, match="ends before it starts"):
            jp.control.Problem().phase("a", states={"x": 1}, t0=2.0, tf=1.0)

    def test_states_that_no_dynamics_define(self):
        with pytest.raises(jp.errors.ArgumentError, match="do not define v"):
            self.problem(dynamics=lambda x, u, t, p: {"x": x.v}).nlp()
        with pytest.raises(jp.errors.ArgumentError, match="no dynamics: states x, v"):
            self.problem(dynamics=None).nlp()
        with pytest.raises(jp.errors.ArgumentError, match="define w, which are not states"):
            self.problem(dynamics=lambda x, u, t, p: {"x": x.v, "v": u.a, "w": u.a}).nlp()

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, u, t, p: {"x": x.all, "v": u.a},
            lambda x, u, t, p: {"x": x.v.sum(), "v": u.a},
            lambda x, u, t, p: x.v,
            lambda x, u, t, p: {"x": x.v[..., None, None], "v": u.a},
        ],
    )
    def test_dynamics_of_a_wrong_shape(self, function):
        with pytest.raises((jp.errors.ShapeError, jp.TraceError), match="phase 'move'|different nodes"):
            self.problem(dynamics=function).nlp()

    def test_not_a_number_at_the_guess(self):
        ocp = self.problem(dynamics=lambda x, u, t, p: {"x": x.v, "v": (x.x - 0.5).sqrt() + u.a})
        with pytest.raises(
            jp.errors.NonFiniteError, match=r"rate of v of phase 'move' is not finite at node 0 \(x = 0"
        ) as e:
            ocp.solve(solver="trust-constr", mesh=(2, 2))
        assert "test_control.py" in str(e.value)

    def test_constraint_that_no_variable_enters(self):
        ocp = self.problem()
        ocp.phases["move"].path["p"] = (lambda x, u, t, p: x.v * 0 + 1, 0.0, 2.0)
        with pytest.raises(jp.errors.ArgumentError, match="constraint 'p'.* does not depend on any variable"):
            ocp.nlp()

    def test_phase_that_is_not_linked(self):
        ocp = two_phases()
        ocp.boundary.clear()
        ocp.phases["a"].dynamics = lambda x, u, t, p: {"x": u.u, "v": x.v}
        ocp.phases["a"].integral.clear()
        ocp.minimize(final=lambda e: e.b.xf.x[0] + e.a.xf.v)
        with pytest.raises(jp.errors.ArgumentError, match="nothing links phase 'b'"):
            ocp.nlp()

    def test_phases_that_cannot_be_linked(self):
        ocp = jp.control.Problem()
        for name, t0 in (("a", 0.0), ("b", 2.0)):
            ocp.phase(name, states={"x": 1}, controls={"u": 1}, t0=t0, tf=t0 + 1)
        with pytest.raises(jp.errors.ArgumentError, match="'a' ends in .* and 'b' starts in .* cannot be linked"):
            ocp.link("a", "b")

    def test_solver_that_is_not_there(self, monkeypatch, tmp_path):
        with pytest.raises(jp.MissingPackageError, match="not a library with IPOPT's C interface"):
            double_integrator().solve(solver=str(tmp_path / "libipopt.so"))
        monkeypatch.setattr(ipopt, "library_path", lambda path=None: None)
        with pytest.raises(jp.MissingPackageError, match=r"pip install 'jetplane\[control\]'"):
            double_integrator().solve()

    def test_no_cost_no_phases_unknown_names(self):
        ocp = jp.control.Problem()
        with pytest.raises(jp.errors.ArgumentError, match="no phases"):
            ocp.nlp()
        ocp = double_integrator()
        with pytest.raises(jp.errors.ArgumentError, match=r"have no 'w'; they are x, v"):
            ocp.phases["move"].start(w=0.0)
        with pytest.raises(jp.errors.ArgumentError, match="outside its bounds"):
            ocp.phase("b", states={"x": (1, 0, 1)}, t0=0, tf=1).start(x=2.0)
        with pytest.raises(jp.errors.ArgumentError, match="reserved for the whole vector"):
            jp.control.Problem().phase("b", states={"all": 1}, t0=0, tf=1)
        with pytest.raises(jp.errors.ArgumentError, match="no phase 'c'"):
            ocp.link("move", "c")
        with pytest.raises(jp.errors.ArgumentError, match="function, lower, upper"):
            ocp.phases["move"].path["p"] = 3
        with pytest.raises(jp.errors.ArgumentError, match="'refine'"):
            double_integrator().nlp(mesh=3)
        with pytest.raises(jp.errors.ArgumentError, match="have no 'q'"):
            self.problem(dynamics=lambda x, u, t, p: {"x": x.q, "v": u.a}).nlp()

    def test_calls_and_values_of_another_form(self):
        for dynamics, error, message in (
            (lambda x, u: x.v, "Argument", r"dynamics of phase 'move' must be a function of \(x, u, t, p\): too many"),
            (lambda x, u, t, p: (x.v, u.a), "Shape", "a dict by names of states, or one tensor"),
            (lambda x, u, t, p: {"x": x.v, "v": math.sin(x.x)}, "Trace", "Python number.*\n  at .*test_control.py"),
            (lambda x, u, t, p: SQUARE[:2, :2] @ torch.cat([x.x, x.v], 1), "Trace", r"\(2, 2\) and \(nodes, 2\)"),
        ):
            with pytest.raises(getattr(jp.errors, f"{error}Error"), match=message):
                self.problem(dynamics=dynamics).nlp()
        ocp = double_integrator()
        with pytest.raises(jp.errors.ArgumentError, match="minimize takes functions.*got float"):
            ocp.minimize(running=1.0)
        ocp.minimize(final=lambda e: e.tf)
        with pytest.raises(jp.errors.ArgumentError, match=r"no phase 'tf'; there are move, with ends like e.move.tf"):
            ocp.nlp()
        ocp.minimize(final=lambda: 1.0)
        with pytest.raises(jp.errors.ArgumentError, match=r"the final cost must be a function of \(e\)"):
            ocp.nlp()
        with pytest.raises(jp.errors.ArgumentError, match="solver must be 'ipopt', 'banded'"):
            double_integrator().solve(solver="bandit")

    @pytest.mark.parametrize(
        "value",
        [np.float16(0.25), torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor([0.25], requires_grad=True), [0.25]],
    )
    def test_numbers_of_every_kind(self, value):
        ocp = double_integrator()
        ocp.phases["move"].start(x=value)
        ocp.phases["move"].guess(a=value, x=lambda t: torch.as_tensor(t, dtype=torch.bfloat16))
        nlp = ocp.nlp(mesh=(2, 2))
        assert nlp.lower[0] == nlp.upper[0] == 0.25
        _, _, x, u = phase_guess(ocp.phases["move"], Mesh.uniform(2, 2))
        assert (u == 0.25).all() and abs(x[:, 0] - Mesh.uniform(2, 2).times).max() < 0.01

    @pytest.mark.parametrize("value", ["a", 1j, torch.tensor(1j), {"x": 1}, [[1.0], [1.0, 2.0]]])
    def test_what_is_no_number(self, value):
        ocp = double_integrator()
        with pytest.raises(jp.errors.ArgumentError, match="start of 'move': 'x'.*expected real numbers"):
            ocp.phases["move"].start(x=value)
        for name in ("x", "a"):
            ocp = double_integrator()
            ocp.phases["move"].guess(**{name: value})
            with pytest.raises(jp.errors.ArgumentError, match=f"guess of '{name}' in 'move': expected real numbers"):
                ocp.solve(solver="banded", mesh=(2, 2))

    @pytest.mark.parametrize("value", [math.nan, "a"])
    def test_guesses_of_times_and_integrals(self, value):
        for name in ("tf", "effort"):
            ocp = jp.control.Problem()
            ph = ocp.phase("a", states={"x": 1}, controls={"u": 1}, t0=0.0, tf=(0.5, 2.0))
            ph.dynamics = lambda x, u, t, p: {"x": u.u}
            ph.integral["effort"] = (lambda x, u, t, p: u.u**2, 0.0, 9.0)
            ph.guess(**{name: value})
            ocp.minimize(final=lambda e: e.a.tf)
            with pytest.raises(jp.errors.ArgumentError, match=f"guess of '{name}' in 'a': expected"):
                ocp.solve(solver="banded", mesh=(2, 2))

    @pytest.mark.parametrize("solver", ["ipopt", "banded", "trust-constr"])
    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("tol", ["a", None, -1.0, 0, math.nan]),
            ("accuracy", ["a", None, 0.0]),
            ("refinements", [-1, 1.5, None]),
            ("max_iterations", [-1, 2.5, "a", None, True]),
            ("time_limit", ["a", -1.0, math.nan]),
        ],
    )
    def test_limits_that_are_none(self, solver, name, values):
        for value in values:
            with pytest.raises(jp.errors.ArgumentError, match=f"{name} must be .*got {value!r}"):
                double_integrator().solve(mesh=(2, 2), solver=solver, **{name: value})

    @needs_ipopt
    def test_unknown_options_and_scales(self):
        with pytest.raises(jp.errors.ArgumentError, match="nonsense"):
            double_integrator().solve(mesh=(2, 2), options={"nonsense": 1})
        with pytest.raises(jp.errors.ArgumentError, match="scaling names"):
            double_integrator().solve(mesh=(2, 2), scaling={"q": 1.0})

    def test_guess_of_another_problem(self):
        a = double_integrator()
        sol = a.solve(mesh=(2, 2), solver="trust-constr")
        with pytest.raises(jp.errors.ArgumentError, match="the guess has phases"):
            two_phases().solve(guess=sol, solver="trust-constr", mesh=(2, 2))
        for mesh in ("refine", (2, 2)):
            with pytest.raises(jp.errors.ArgumentError, match="guess must be a Solution.*got dict"):
                a.solve(guess={"x": 1.0}, mesh=mesh, solver="banded")
        with pytest.raises(jp.errors.ArgumentError, match="the guess has phases"):
            two_phases().solve(guess=sol, solver="banded")
        with pytest.raises(jp.errors.ArgumentError, match="solver must be a name or a path"):
            a.solve(solver=None)


class TestHabits:
    """What engineers write otherwise than the documentation: it works as meant, or is refused."""

    @staticmethod
    def cart(states=None, controls=None, t0=0.0, tf=(0.1, 10.0)):
        """From rest to rest at distance 1 with accelerations of at most 1, which takes 2."""
        ocp = jp.control.Problem()
        names = list(states or ("x", "v"))
        ph = ocp.phase(
            "cart", states=states or {"x": 1, "v": 1}, controls=controls or {"a": (1, -1.0, 1.0)}, t0=t0, tf=tf
        )
        ph.dynamics = lambda x, u, t, p: dict(zip(names, (x[names[1]], u.a), strict=True))
        ph.start(**dict.fromkeys(names, 0.0))
        ph.end(**dict(zip(names, (1.0, 0.0), strict=True)))
        ocp.minimize(final=lambda e: e.cart.tf)
        return ocp

    def time_of(self, ocp, **options):
        sol = ocp.solve(**{"mesh": (4, 2), "solver": "banded", **options})
        assert sol.success
        return sol.objective

    @pytest.mark.parametrize(
        "change",
        [
            {"tf": [0.1, 10.0]},
            {"tf": np.array([0.1, 10.0])},
            {"t0": 0, "tf": torch.tensor([1, 10])},
            {"controls": {"a": [1, -1, np.ones(1)]}},
            {"states": {"x": np.int64(1), "v": np.int32(1)}},
            {"states": {"self": 1, "items": 1}},
        ],
    )
    def test_bounds_sizes_and_names(self, change):
        assert self.time_of(self.cart(**change)) == pytest.approx(2.0, abs=1e-5)

    @needs_ipopt
    def test_numbers_of_numpy(self):
        options = {"tol": np.float32(1e-8), "max_iterations": np.int64(200), "time_limit": np.float32(60)}
        for solver in ("banded", "ipopt"):
            for mesh in (np.array([4, 2]), (np.int64(4), np.int32(2))):
                assert self.time_of(self.cart(), mesh=mesh, solver=solver, **options) == pytest.approx(2.0, abs=1e-5)
        ocp = self.cart()
        ocp.parameter("k", np.int64(2), 1, 3)
        assert ocp.parameters.size == 2

    @pytest.mark.parametrize("name", ["_v", "__class__", "_layout", "t0", "tf"])
    def test_names_that_are_taken(self, name):
        with pytest.raises(jp.errors.ArgumentError, match="Python's own|reserved for the"):
            self.cart(states={"x": 1, name: 1})

    def test_a_tuple_that_may_be_values_or_bounds_is_refused(self):
        ph = jp.control.Problem().phase("a", states={"r": 2, "s": 3}, t0=0.0, tf=1.0)
        with pytest.raises(jp.errors.ArgumentError, match=r"\(1.0, 2.0\) may be their values or their bounds"):
            ph.start(r=(1.0, 2.0))
        ph.start(r=(0.5, 0.5), s=(1.0, 2.0))
        ph.end(r=([1.0, 2.0], [1.0, 3.0]), s=(1.0, 2.0, 3.0))
        assert ph.at_start[0].tolist() == [0.5, 0.5, 1.0, 1.0, 1.0] and ph.at_start[1].tolist()[2:] == [2.0] * 3
        assert ph.at_end[1].tolist() == [1.0, 3.0, 1.0, 2.0, 3.0]

    def test_constraints_as_of_any_dict(self):
        slow = (lambda x, u, t, p: x.v, -9, 0.5)

        def assigned(ph):
            ph.path = {"slow": slow}

        def joined(ph):
            ph.path |= {"slow": slow}

        ways = [
            lambda ph: ph.path.update({"slow": slow}),
            lambda ph: ph.path.update(slow=list(slow)),
            lambda ph: ph.path.setdefault("slow", slow),
            assigned,
            joined,
        ]
        for way in ways:
            ocp = self.cart()
            way(ocp.phases["cart"])
            assert ocp.nlp((2, 2)).constraint_upper.max() == 0.5
        for way in (lambda ph: ph.path.update(slow=3), lambda ph: setattr(ph, "path", [slow])):
            with pytest.raises(jp.errors.ArgumentError, match="function, lower, upper"):
                way(self.cart().phases["cart"])

    def test_functions_made_in_a_loop(self):
        ocp = self.cart()
        for k in (1, 2):
            ocp.phases["cart"].path[f"p{k}"] = (lambda x, u, t, p, k=k: k * x.v, None, 1.0)
        assert self.time_of(ocp) == pytest.approx(2.5, abs=0.1)  # no faster than 1/2

    def test_an_integral_named_as_a_state(self):
        ph = self.cart().phases["cart"]
        ph.integral["x"] = (lambda x, u, t, p: u.a**2, 0.0, 9.0)
        ph.guess(v=0.1)
        with pytest.raises(jp.errors.ArgumentError, match="'x' is an integral, and a state"):
            ph.guess(x=0.1)

    @pytest.mark.parametrize("order", ["abc", "cab", "bca"])
    def test_phases_of_free_times_in_any_order_do_not_run_backwards(self, order):
        ocp = jp.control.Problem()
        times = {"a": (0.0, (0.1, 5.0)), "b": ((0.1, 5.0), (0.2, 6.0)), "c": ((0.2, 6.0), (0.3, 10.0))}
        made = {}
        for name in order:
            t0, tf = times[name]
            made[name] = ocp.phase(name, states={"x": 1, "v": 1}, controls={"a": (1, -1.0, 1.0)}, t0=t0, tf=tf)
            made[name].dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
        made["a"].start(x=0.0, v=0.0)
        made["c"].end(x=1.0, v=0.0)
        ocp.link(made["b"], "c")
        ocp.link("a", made["b"], states=("x", "v"))
        ocp.minimize(final=lambda e: e.c.tf)
        sol = ocp.solve(mesh=(6, 2), solver="banded")
        assert sol.success and sol.objective == pytest.approx(2.0, abs=1e-5)
        assert all((np.diff(ph.t) >= -1e-7).all() for ph in sol.phases.values())

    def test_a_link_of_no_states_and_of_one(self):
        ocp = jp.control.Problem()
        for name, t0 in (("a", 0.0), ("b", 1.0)):
            ocp.phase(name, states={"place": 2, "v": 1}, t0=t0, tf=t0 + 1).dynamics = lambda x, u, t, p: 0 * x.all
        ocp.minimize(final=lambda e: e.a.xf.v + e.b.xf.v)
        for states, rows in (([], 1), ("place", 3), (None, 4)):
            ocp.link("a", "b", states)
            assert len(ocp.nlp((1, 2)).model.lower) == rows

    def test_one_problem_in_threads_and_twice(self):
        ocp, found = self.cart(), []
        threads = [threading.Thread(target=lambda: found.append(self.time_of(ocp))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [pytest.approx(2.0, abs=1e-5)] * 3
        ocp.phases["cart"].end(x=4.0)
        assert self.time_of(ocp) == pytest.approx(4.0, abs=1e-5)

    def test_pickled_and_copied(self):
        sol = self.cart().solve(mesh=(4, 2), solver="banded")
        for made in (pickle.loads(pickle.dumps(sol)), copy.copy(sol), copy.deepcopy(sol)):
            assert made.objective == sol.objective and (made.x.v == sol.x.v).all()
            again = self.cart().solve(mesh=(4, 2), solver="banded", guess=made)
            assert again.iterations < sol.iterations
        assert copy.deepcopy(sol).simulate().difference["cart"] < 1e-6
        lost = pickle.loads(pickle.dumps(sol))
        with pytest.raises(jp.errors.ArgumentError, match="set its .problem"):
            lost.simulate()
        lost.problem = sol.problem
        assert lost.simulate().difference["cart"] < 1e-6


def test_the_core_does_not_import_control():
    import subprocess
    import sys

    code = "import sys, jetplane; assert not {'jetplane.control', 'scipy'} & set(sys.modules); jetplane.control"
    subprocess.run([sys.executable, "-c", code], check=True)
