"""Slope and curvature against reverse over reverse in float64, on models."""

import pytest
import torch
from cases import CASES, Case, rosenbrock
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.jets import Deferred
from jetplane.testing import check_plane, grad_of_grad


def build(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(1)
    return CASES[name](dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("k", [1, 2, 3, 10])
@pytest.mark.parametrize("name", CASES)
def test_all_pairs(name: str, k: int):
    case = build(name)
    check_plane(case.loss, case.params, case.tangents(k), 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str):
    case, exact = build(name, torch.float32), build(name)
    exact.module.load_state_dict(case.module.state_dict())
    tangents = case.tangents(3)
    expected = grad_of_grad(exact.loss, exact.params, [t.double() for t in tangents])
    found = jp.evaluate(case.loss, case.params, tangents)
    assert relative(found.slope, expected.slope) < 1e-4
    assert relative(found.curvature, expected.curvature) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_diagonal_blocks_and_slope_agree_with_all_pairs(name: str):
    case = build(name)
    tangents = case.tangents(6)
    full = jp.evaluate(case.loss, case.params, tangents)
    assert full.curvature is not None
    diagonal = jp.evaluate(case.loss, case.params, tangents, pairs="diagonal").curvature
    blocks = jp.evaluate(case.loss, case.params, tangents, pairs=3).curvature
    torch.testing.assert_close(diagonal, full.curvature.diagonal(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        blocks, torch.stack([full.curvature[:3, :3], full.curvature[3:, 3:]]), rtol=1e-9, atol=1e-10
    )
    slope = jp.evaluate(case.loss, case.params, tangents, curvature="none")
    assert slope.curvature is None
    torch.testing.assert_close(slope.slope, full.slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d", [2, 10, 100])
def test_rosenbrock(d: int):
    x = torch.linspace(-1, 1, d, dtype=torch.float64).requires_grad_()
    check_plane(lambda: rosenbrock(x), [x], [torch.randn(3, d, dtype=torch.float64)], 1e-9)


def test_running_statistics_move_once_by_the_primal_alone():
    case, plain = build("resnet train"), build("resnet train")
    jp.evaluate(case.loss, case.params, case.tangents(3))
    with torch.no_grad():
        plain.loss()
    for a, b in zip(case.module.buffers(), plain.module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_parameters_are_untouched_and_results_are_ordinary_tensors():
    case = build("mlp tanh")
    before = [p.detach().clone() for p in case.params]
    plane = jp.evaluate(case.loss, case.params, case.tangents(2))
    assert all(torch.equal(p, b) for p, b in zip(case.params, before, strict=True))
    assert not plane.slope.is_inference() and not plane.slope.requires_grad
    (plane.slope * torch.ones(2, dtype=torch.float64, requires_grad=True)).sum().backward()


def test_no_grad_around_an_evaluation_changes_nothing():
    case = build("mlp tanh")
    tangents = case.tangents(2)
    with torch.no_grad():
        inside = jp.evaluate(case.loss, case.params, tangents)
    torch.testing.assert_close(inside.slope, jp.evaluate(case.loss, case.params, tangents).slope)


def test_detach_stops_derivatives():
    w = torch.tensor([2.0], dtype=torch.float64)
    plane = jp.evaluate(lambda: (w * w.detach()).sum(), [w], [torch.ones(1, 1, dtype=torch.float64)])
    assert plane.slope.item() == 2.0 and plane.curvature.item() == 0.0


def test_python_scalars_and_zero_dim_tensors_do_not_promote():
    w = torch.ones(3)
    scale = torch.tensor(2.0, dtype=torch.float64)
    plane = jp.evaluate(lambda: ((w * 0.5 + scale) ** 2).sum(), [w], [torch.ones(1, 3)])
    assert plane.slope.dtype == plane.value.dtype == torch.float32


class TestGaussNewton:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda o, y, t: F.cross_entropy(o, y, label_smoothing=0.1),
            lambda o, y, t: F.cross_entropy(o, y, weight=torch.linspace(0.5, 2, 5).double(), ignore_index=2),
            lambda o, y, t: F.cross_entropy(o, y, reduction="none").square().sum(),
            lambda o, y, t: nn.CrossEntropyLoss(reduction="sum")(o, y),
            lambda o, y, t: F.nll_loss(F.log_softmax(o, 1), y, torch.linspace(0.5, 2, 5).double(), ignore_index=2),
            lambda o, y, t: nn.NLLLoss(reduction="none")(nn.LogSoftmax(-1)(o), y).sum(),
            lambda o, y, t: F.nll_loss(input=torch.log_softmax(o, dim=1), target=y),
            lambda o, y, t: F.kl_div(o.log_softmax(0), t.softmax(0), reduction="batchmean"),
            lambda o, y, t: F.mse_loss(o, t),
            lambda o, y, t: F.smooth_l1_loss(o, t, beta=0.7),
            lambda o, y, t: F.huber_loss(o, t),
            lambda o, y, t: F.binary_cross_entropy_with_logits(o, t.sigmoid()),
            lambda o, y, t: F.gaussian_nll_loss(o, t, torch.full_like(t, 0.5)),
            lambda o, y, t: F.poisson_nll_loss(o, t.abs()),
        ],
    )
    def test_is_the_dense_product(self, loss):
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        x, t = torch.randn(9, 6).double(), torch.randn(9, 5).double()
        y = torch.randint(0, 5, (9,))
        params = dict(net.named_parameters())
        tangents = [torch.randn(4, *p.shape).double() for p in params.values()]
        found = jp.evaluate(lambda: loss(net(x), y, t), list(params.values()), tangents, curvature="ggn")
        detached = {n: p.detach() for n, p in params.items()}
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(detached)
        j = torch.cat([jacobian[n].reshape(45, -1) for n in params], 1)
        v = torch.cat([u.reshape(4, -1) for u in tangents], 1)
        h = torch.func.hessian(lambda o: loss(o.view(9, 5), y, t))(net(x).detach().reshape(-1))
        expected = v @ j.T @ h @ j @ v.T
        torch.testing.assert_close(found.curvature, expected, rtol=1e-9, atol=1e-10)
        assert torch.linalg.eigvalsh(found.curvature).min() > -1e-9

    def test_is_the_hessian_of_a_linear_model(self):
        case = build("logistic regression")
        tangents = case.tangents(5)
        ggn = jp.evaluate(case.loss, case.params, tangents, curvature="ggn").curvature
        torch.testing.assert_close(ggn, jp.evaluate(case.loss, case.params, tangents).curvature)

    def test_a_regularizer_is_carried_exactly(self):
        case = build("mlp tanh")
        tangents = case.tangents(3)

        def penalty():
            flat = torch.cat([p.flatten() for p in case.params])
            return 0.1 * flat.pow(4).sum() + flat.norm()

        both = jp.evaluate(lambda: case.loss() + penalty(), case.params, tangents, curvature="ggn").curvature
        loss = jp.evaluate(case.loss, case.params, tangents, curvature="ggn").curvature
        exact = jp.evaluate(penalty, case.params, tangents).curvature
        torch.testing.assert_close(both, loss + exact)

    def test_needs_a_loss_function(self):
        case = build("mlp tanh")
        x = torch.randn(2, 6).double()
        fourth = lambda: case.module(x).pow(4).mean()  # noqa: E731
        with pytest.raises(jp.LossError, match=r"jetplane\.loss"):
            jp.evaluate(fourth, case.params, case.tangents(2), curvature="ggn")
        jp.evaluate(jp.loss()(lambda: fourth()), case.params, case.tangents(2), curvature="ggn")

    def test_what_is_written_to_is_no_log_softmax(self):
        case = build("mlp tanh")
        x, y = torch.randn(2, 6).double(), torch.tensor([1, 3])
        with pytest.warns(jp.JetplaneWarning, match="no curvature"):
            plane = jp.evaluate(
                lambda: F.nll_loss(F.log_softmax(case.module(x), 1).mul_(2), y),
                case.params, case.tangents(2), curvature="ggn",
            )  # fmt: skip
        assert not plane.curvature.any()

    def test_a_flat_loss_is_announced(self):
        case = build("mlp tanh")
        x = torch.randn(2, 6).double()
        with pytest.warns(jp.JetplaneWarning, match="no curvature"):
            jp.evaluate(
                lambda: F.l1_loss(case.module(x), x.new_zeros(2, 10)),
                case.params,
                case.tangents(2),
                curvature="ggn",
            )


def test_compiled_without_graph_breaks():
    case = build("wide mlp", torch.float32)
    tangents = case.tangents(2)
    eager = jp.evaluate(case.loss, case.params, tangents)
    compiled = torch.compile(lambda t: jp.evaluate(case.loss, case.params, t), fullgraph=True, backend="aot_eager")(
        tangents
    )
    torch.testing.assert_close(compiled.slope, eager.slope, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.curvature, eager.curvature, rtol=1e-4, atol=1e-5)


FIRST_ORDER = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.7),
    "softplus": lambda x: F.softplus(x, 2.0, 1.5),
    "softmax": lambda x: torch.softmax(x, 1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "affine layer norm": lambda x: F.layer_norm(x, x.shape[2:], x.sum((0, 1)), x.prod(0).sum(0)),
    "group norm": lambda x: F.group_norm(x, 3),
    "broadcast": lambda x: F.gelu(x[:1].expand(5, -1, -1)),
    "transposed": lambda x: torch.softmax(F.silu(x.transpose(0, 1)), 0),
    "product": lambda x: x * x[:, :1] * x[0, 0],
    "transposed layer norm": lambda x: F.layer_norm(x.transpose(0, 1), (4, x.shape[2])),
    "silu of columns": lambda x: F.silu(x.transpose(0, 2)),
}


@pytest.mark.parametrize("size", [4, 6000])  # the larger in blocks
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_coefficients_alone_are_those_beside_second_ones(name: str, k: int, size: int):
    x, v = torch.randn(4, 6, size, dtype=torch.float64), torch.randn(k, 4, 6, size, dtype=torch.float64)
    closure = lambda: FIRST_ORDER[name](x + x.sin()).cos().mean()  # noqa: E731
    alone, beside = (jp.evaluate(closure, [x], [v], curvature) for curvature in ("none", "hessian"))
    assert relative(alone.slope, beside.slope) < 1e-10


@jp.loss()
def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum(1).mean()


def marked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with jp.loss():
        return (output - target).square().exp().mean()


CROSS_ENTROPY = nn.CrossEntropyLoss(label_smoothing=0.1)
LOSSES = {
    "cross_entropy": lambda out, w: F.cross_entropy(out, out.detach().argmax(1).flip(0), w.new_ones(3), ignore_index=1),
    "a module": lambda out, w: CROSS_ENTROPY(out, out.detach().argmax(1).flip(0)),
    "binary": lambda out, w: F.binary_cross_entropy_with_logits(out, torch.ones_like(out), reduction="sum"),
    "unreduced": lambda out, w: F.mse_loss(out, torch.ones_like(out), reduction="none").sum(1).exp().mean(),
    "decorated": lambda out, w: squared(out, torch.ones_like(out)),
    "in a context": lambda out, w: marked(out, torch.ones_like(out)),
    "two terms": lambda out, w: F.huber_loss(out, 2 * torch.ones_like(out)) + 3 * squared(out, torch.ones_like(out)),
    "a regularizer": lambda out, w: F.mse_loss(out, torch.ones_like(out)) + 0.1 * w.square().sum() + w.exp().mean(),
    "of a parameter": lambda out, w: F.mse_loss(w.t(), torch.ones_like(w.t())) + squared(out, torch.ones_like(out)),
}


@pytest.mark.parametrize("tangents", ["dense", "rank-one"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_gauss_newton_is_the_eager_one(name: str, tangents):
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    params = list(net.parameters())
    drawn = [jp.Directions(3, tangents=tangents).structured(i, p) for i, p in enumerate(params)]
    given = [t.materialized() if isinstance(t, Deferred) else t for t in drawn]
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    program = torch.compile(jp.evaluate, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(16, 5)
        loss = lambda x=x: LOSSES[name](net(x), params[0])  # noqa: E731
        eager = jp.evaluate(loss, params, given, "ggn", examples=True)
        compiled = program(loss, params, given, "ggn", examples=True)
        for part in ("value", "slope", "curvature", "examples"):
            a, b = getattr(compiled, part), getattr(eager, part)
            assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-6), part
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_compiled_gauss_newton_needs_a_loss_function():
    case = build("mlp tanh", torch.float32)
    program = torch.compile(jp.evaluate, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"LossError.*jetplane\.loss"):
        program(lambda: case.module(torch.ones(2, 6)).square().mean(), case.params, case.tangents(2), "ggn")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_finite_and_accumulates_in_single(dtype, bound):
    net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())
    net = net.append(nn.Linear(64, 10)).to(dtype)
    x, y = torch.randn(64, 16).to(dtype), torch.randint(0, 10, (64,))
    params = list(net.parameters())
    tangents = [torch.randn(3, *p.shape).to(dtype) for p in params]
    found = jp.evaluate(lambda: F.cross_entropy(net(x), y), params, tangents)
    double = [p.detach().double().requires_grad_() for p in params]
    names = [n for n, _ in net.named_parameters()]
    closure = lambda: F.cross_entropy(  # noqa: E731
        torch.func.functional_call(net, dict(zip(names, double, strict=True)), (x.double(),)), y
    )
    expected = grad_of_grad(closure, double, [t.double() for t in tangents])
    assert found.slope.dtype == found.curvature.dtype == torch.float32
    alone = jp.evaluate(lambda: F.cross_entropy(net(x), y), params, tangents, curvature="none")
    assert relative(found.slope, expected.slope) < bound and relative(alone.slope, expected.slope) < bound
    assert relative(found.curvature, expected.curvature) < bound


def test_autocast():
    net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    params = list(net.parameters())
    tangents = [torch.randn(3, *p.shape) for p in params]

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(x), y)

    mixed = jp.evaluate(closure, params, tangents)
    exact = jp.evaluate(lambda: F.cross_entropy(net(x), y), params, tangents)
    assert relative(mixed.slope, exact.slope) < 0.05 and relative(mixed.curvature, exact.curvature) < 0.05
