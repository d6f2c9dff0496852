"""Bad input: a typed error that says what was expected, and nothing changed."""

import numpy as np
import pytest
import torch
from cases import Doubled
from torch import nn

import jetplane as jp
from jetplane.rules.functions import REGISTERED

W = torch.tensor([1.0, 2.0, 3.0])


def test_autograd_functions_work_after_an_evaluation():
    w = torch.ones(3, requires_grad=True)
    jp.evaluate(lambda: w.sum(), [w], [torch.ones(1, 3)])
    Doubled.apply(w).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [3.0, 3.0, 3.0]


CLOSURES = {
    "vector": (lambda w: w * 2, jp.LossError, "scalar"),
    "number": (lambda w: 3.0, jp.LossError, "float"),
    "integer": (lambda w: w.sum().long(), jp.LossError, "floating"),
    "unused": (lambda w: torch.ones(()), jp.UnusedParametersError, "none"),
    "cut": (lambda w: w.detach().sum(), jp.UnusedParametersError, "cut"),
    "numpy": (lambda w: torch.tensor((w * 2).numpy()).sum(), jp.DerivativeError, r"numpy\(\)"),
    "asarray": (lambda w: torch.tensor(np.asarray(w * 2)).sum(), jp.DerivativeError, "NumPy"),
    "tolist": (lambda w: torch.tensor((w * 2).tolist()).sum(), jp.DerivativeError, "tolist"),
    "nan": (lambda w: (w * float("nan")).sum(), jp.NonFiniteError, "loss"),
    "inf": (lambda w: (w * 1e38).exp().sum(), jp.NonFiniteError, "loss"),
    "infinite slope": (lambda w: (w - w.detach()).sqrt().sum(), jp.NonFiniteError, "slope"),
    "in place": (lambda w: w.mul_(2).sum(), jp.DerivativeError, "in place"),
    "view in place": (lambda w: w[:1].mul_(2).sum(), jp.DerivativeError, "in place"),
    "autograd": (lambda w: torch.autograd.grad(w.sum(), w)[0].sum(), jp.DerivativeError, r"jetplane\.jet"),
    "backward": (lambda w: w.sum().backward(), jp.DerivativeError, "backward"),
    "raises": (lambda w: 1 / 0, ZeroDivisionError, "zero"),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_closures(name):
    f, error, message = CLOSURES[name]
    w = W.clone()
    with pytest.raises(error, match=message):
        jp.evaluate(lambda: f(w), [w], [torch.ones(2, 3)])
    assert torch.equal(w, W)


DIRECTIONS = {
    "shape": ([torch.ones(2, 4)], jp.ShapeError, r"\(2, 3\)"),
    "number": ([torch.ones(2, 3)] * 2, jp.ShapeError, "1 parameters"),
    "dtype": ([torch.ones(2, 3).double()], jp.DTypeError, "float32"),
    "device": ([torch.ones(2, 3, device="meta")], jp.DeviceError, "meta"),
    "k": ([torch.ones(0, 3)], jp.ArgumentError, "k must be"),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions(name):
    directions, error, message = DIRECTIONS[name]
    with pytest.raises(error, match=message):
        jp.evaluate(lambda: W.sum(), [W], directions)


def test_parameters():
    with pytest.raises(jp.ArgumentError, match="no parameters"):
        jp.evaluate(lambda: W.sum(), [], [])
    with pytest.raises(jp.DTypeError, match="int64"):
        jp.evaluate(lambda: W.sum(), [torch.ones(3, dtype=torch.int64)], [torch.ones(1, 3)])
    with pytest.raises(jp.ArgumentError, match="twice"):
        jp.evaluate(lambda: W.sum(), [W, W], [torch.ones(1, 3)] * 2)


@pytest.mark.parametrize("pairs", ["some", 0, 3, True])
def test_pairs(pairs):
    with pytest.raises(jp.ArgumentError, match="pairs"):
        jp.evaluate(lambda: W.sum(), [W], [torch.ones(2, 3)], pairs=pairs)


def test_an_error_names_the_line_and_the_module():
    class Layer(nn.Module):
        def forward(self, x):
            return Doubled.apply(x)

    layer = Layer()
    with jp.strict(), pytest.raises(jp.DerivativeError, match=r"test_errors\.py:\d+ in forward, inside module Layer"):
        jp.evaluate(lambda: layer(W).sum(), [W], [torch.ones(1, 3)])


def without_rule(x):
    return torch.ones(2).scatter_reduce(0, torch.tensor([0, 1, 0]), x, "prod")


def test_strict_forbids_the_local_fallback():
    with jp.strict(), pytest.raises(jp.MissingRuleError, match="register_rule"):
        jp.jet(without_rule, torch.ones(3), torch.ones(1, 3))


def test_the_fallback_is_announced_once():
    from jetplane.rules import fallback

    fallback._announced.clear()
    with pytest.warns(jp.FallbackWarning, match="scatter_reduce"):
        jp.jet(without_rule, torch.ones(3), torch.ones(1, 3))


def test_an_operator_without_derivative_raises():
    @torch.library.custom_op("jetplane_tests::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(jp.MissingRuleError, match="opaque"):
        jp.jet(opaque, torch.ones(3), torch.ones(1, 3))


def test_a_custom_operator_with_a_backward_of_its_own_raises():
    """Its backward need not be differentiable: the curvature would be zero in silence."""

    @torch.library.custom_op("jetplane_tests::squared", mutates_args=())
    def squared(x: torch.Tensor) -> torch.Tensor:
        return x * x

    def backward(ctx, g):
        with torch.no_grad():
            return 2 * ctx.x * g

    squared.register_autograd(backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]))
    with pytest.raises(jp.MissingRuleError, match="squared"):
        jp.evaluate(lambda: squared(W).sum(), [W], [torch.ones(1, 3)])


class TestRegisterRule:
    def test_elementwise_linear_composed_constant(self):
        @torch.library.custom_op("jetplane_tests::cube", mutates_args=())
        def cube(x: torch.Tensor) -> torch.Tensor:
            return x**3

        jp.register_rule(cube, elementwise=lambda x, y: (3 * x**2, 6 * x))
        x = torch.randn(4).double()
        torch.testing.assert_close(
            jp.hessian(lambda x: cube(x).sum(), x), torch.func.hessian(lambda x: (x**3).sum())(x)
        )

        @torch.library.custom_op("jetplane_tests::reverse", mutates_args=())
        def reverse(x: torch.Tensor) -> torch.Tensor:
            return x.flip(0)

        jp.register_rule(reverse, linear=lambda stack: stack.flip(1))
        weights = torch.arange(4.0).double()
        torch.testing.assert_close(
            jp.hessian(lambda x: (reverse(x) ** 2 * weights).sum(), x),
            torch.func.hessian(lambda x: (x.flip(0) ** 2 * weights).sum())(x),
        )

    def test_autograd_function(self):
        jp.register_rule(Doubled, composed=lambda x: 2 * x)
        try:
            plane = jp.evaluate(lambda: Doubled.apply(W).sum(), [W], [torch.ones(1, 3)])
            assert plane.slope.item() == 6.0
        finally:
            del REGISTERED[Doubled]

    @pytest.mark.parametrize("ways", [{}, {"constant": True, "linear": lambda c: c}])
    def test_exactly_one_way(self, ways):
        with pytest.raises(jp.ArgumentError, match="exactly one"):
            jp.register_rule(torch.ops.aten.sin.default, **ways)

    def test_not_an_operator(self):
        with pytest.raises(jp.ArgumentError, match="operator"):
            jp.register_rule(torch.sin, constant=True)
