"""What leaves an evaluation, and what the user's own grad mode stops inside of one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jetplane as jp
from jetplane.errors import DerivativeError, UnusedParametersError


def slope(closure, params: list[Tensor], **options) -> Tensor:
    """The whole gradient by one direction for each entry."""
    sizes = [p.numel() for p in params]
    eye = torch.eye(sum(sizes), dtype=params[0].dtype).split(sizes, 1)
    tangents = [e.reshape(-1, *p.shape) for e, p in zip(eye, params, strict=True)]
    return jp.evaluate(closure, params, tangents, **options).slope


def gradient(closure, params: list[Tensor]) -> Tensor:
    """The same by reverse mode."""
    params = [p.requires_grad_() for p in params]
    grads = torch.autograd.grad(closure(), params, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)])


def as_reverse_mode(closure, params: list[Tensor]) -> None:
    got = slope(closure, params)
    torch.testing.assert_close(got, gradient(closure, params))


def vector(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x.exp()


class TestNoGrad:
    @pytest.mark.parametrize(
        "off", [torch.no_grad, torch.inference_mode, lambda: torch.autograd.grad_mode.set_grad_enabled(False)]
    )
    def test_stops_derivatives_inside_of_a_closure(self, off):
        def closure():
            with off():
                target = (w * 3).tanh()
                assert type(target) is Tensor
            return (w.sin() * target).sum()

        w = vector(3)
        torch.testing.assert_close(slope(closure, [w]), w.cos() * (3 * w).tanh())

    def test_as_a_function_and_as_a_decorator(self):
        def closure():
            torch.set_grad_enabled(False)
            a = w.cos()
            torch.set_grad_enabled(True)
            return (w * a * decorated(w)).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])

    def test_enable_grad_inside_of_it_carries_on(self):
        def closure():
            with torch.no_grad():
                a = w.cos()
                with torch.enable_grad():
                    b = w.sin() * a
            return (b * w).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])

    def test_around_an_evaluation_changes_nothing(self):
        w = vector(3)
        for around in (torch.no_grad, torch.inference_mode):
            with around():
                assert torch.equal(slope(lambda: (w**3).sum(), [w]), 3 * w**2)

    def test_a_closure_that_is_decorated_as_a_whole_is_told(self):
        w = vector(3)
        with pytest.raises(UnusedParametersError, match=r"torch.no_grad\(\) in the closure"):
            slope(torch.no_grad()(lambda: (w**3).sum()), [w])

    def test_grad_mode_is_as_it_was_afterwards(self):
        w = vector(3)
        seen = []
        with torch.no_grad():
            slope(lambda: (seen.append(torch.is_grad_enabled()), (w**2).sum())[1], [w])
            assert not torch.is_grad_enabled()
        assert seen == [True] and torch.is_grad_enabled()

    def test_a_bootstrapped_target(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x, after = vector(5, 3), vector(5, 3)

        def closure():
            with torch.no_grad():
                target = 1 + 0.9 * net(after)
            return F.mse_loss(net(x), target)

        as_reverse_mode(closure, list(net.parameters()))

    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_curvature_sees_a_constant(self, curvature):
        w, x = vector(3), vector(4, 3)

        def closure(held=None):
            with torch.no_grad():
                target = (x @ w).sin()
            return F.mse_loss(x @ w, target if held is None else held)

        tangents = [torch.eye(3, dtype=torch.float64)]
        got = jp.evaluate(closure, [w], tangents, curvature)
        expected = jp.evaluate(lambda: closure((x @ w).sin().detach()), [w], tangents, curvature)
        torch.testing.assert_close(got.slope, expected.slope)
        torch.testing.assert_close(got.curvature, expected.curvature)

    def test_the_score_of_a_sample(self):
        mu = vector(2)

        def closure():
            torch.manual_seed(0)
            normal = torch.distributions.MultivariateNormal(mu, torch.eye(2, dtype=torch.float64))
            return normal.log_prob(normal.sample()).sum()

        as_reverse_mode(closure, [mu])

    def test_spectral_norm_and_the_norm_of_parameters(self):
        torch.manual_seed(0)
        plain = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).double()
        x, ours = vector(5, 3), copy.deepcopy(plain)

        def closure(layer):
            return layer(x).square().sum() / nn.utils.get_total_norm(list(layer.parameters()))

        got = slope(lambda: closure(ours), list(ours.parameters()))
        torch.testing.assert_close(got, gradient(lambda: closure(plain), list(plain.parameters())))
        for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_parameter_that_is_used_there_alone_does_not_move(self):
        w, teacher = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        opt = jp.optim.FGD([w, teacher], lr=0.1)

        def closure():
            with torch.no_grad():
                target = teacher * 2
            return (w - target).square().sum()

        opt.step(closure)
        assert torch.equal(teacher, torch.ones(3)) and not torch.equal(w, torch.ones(3))

    def test_optimizers_step_under_it(self):
        w = nn.Parameter(torch.ones(3))
        opt = jp.optim.FoMoHKD([w], k=3)
        with torch.no_grad():
            opt.step(lambda: (w**2).sum())
        torch.testing.assert_close(w.detach(), torch.zeros(3), atol=1e-5, rtol=0)

    def test_an_average_of_parameters_is_kept_in_a_buffer(self):
        w, average = vector(3), torch.zeros(3, dtype=torch.float64)

        def closure():
            with torch.no_grad():
                average.mul_(0.9).add_(w, alpha=0.1)
            return (w * average).sum()

        got = slope(closure, [w])
        torch.testing.assert_close(average, 0.1 * w)
        torch.testing.assert_close(got, average)

    @pytest.mark.parametrize("write", ["mul_", "in place by operator", "out", "copy_", "item", "foreach"])
    def test_what_is_written_to_keeps_its_derivative(self, write):
        def closure():
            h = w.sin()
            with torch.no_grad():
                if write == "mul_":
                    h.mul_(2)
                elif write == "in place by operator":
                    h *= 2
                elif write == "out":
                    torch.mul(h, 2, out=h)
                elif write == "copy_":
                    h.copy_(2 * w.sin())
                elif write == "item":
                    h[0] = 5.0
                else:
                    torch._foreach_mul_([h], 2.0)
            return h.square().sum()

        w = vector(3)
        got = slope(closure, [w])
        value = w.sin() * (torch.tensor([5 / w[0].sin().item(), 1, 1]) if write == "item" else 2)
        torch.testing.assert_close(got, 2 * value * w.cos())

    def test_a_parameter_may_not_be_written_to(self):
        def closure():
            with torch.no_grad():
                w.clamp_(-1, 1)
            return w.sum()

        w = vector(3)
        before = w.clone()
        with pytest.raises(DerivativeError, match="a parameter was written to in place"):
            slope(closure, [w])
        assert torch.equal(w, before)

    def test_a_view_made_there_is_not_written_to_outside(self):
        def closure():
            h = w.sin()
            with torch.no_grad():
                first = h[:1]
            first.add_(w[1:2])
            return h.sum()

        w = vector(3)
        with pytest.raises(DerivativeError, match="view that was made under"):
            slope(closure, [w])

    def test_numpy_and_lists_are_allowed_there(self):
        w, seen = vector(3), []

        def closure():
            with torch.no_grad():
                seen.append((w.sin().numpy().sum(), w.tolist(), (2 * w).tolist()))
            return w.sin().sum()

        assert torch.equal(slope(closure, [w]), w.cos())
        assert seen == [(w.sin().numpy().sum(), w.tolist(), (2 * w).tolist())]

    def test_a_custom_autograd_function_is_a_plain_one_there(self):
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, g):
                return 2 * g

        def closure():
            with torch.no_grad():
                target = Double.apply(w)
            return (w * target).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])

    def test_detach_in_place_stops_derivatives(self):
        def closure():
            h = w.sin()
            h.detach_()
            return (h * w).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])
        with pytest.raises(DerivativeError, match="detach_"):
            slope(lambda: (w.detach_() * w).sum(), [w])

    def test_inside_of_functions_of_tensors(self):
        def f(x):
            with torch.no_grad():
                held = x.exp()
            return (x**2 * held).sum()

        x = vector(3)
        torch.testing.assert_close(jp.hessian(f, x), torch.diag(2 * x.exp()))
        _, first, second = jp.jet(f, x, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(first, 2 * x * x.exp())
        torch.testing.assert_close(second, torch.diag(2 * x.exp()))

    def test_functions_of_tensors_inside_of_it_do_their_own_work(self):
        """Derivatives by x are wanted, those by the parameter stop."""

        def closure():
            with torch.no_grad():
                curved = jp.laplacian(lambda z: (w * z**3).sum(), x)
                both = jp.laplacian(lambda z: (w * z**3).sum(), w)
            return (w * curved).sum() + both * w[0]

        w, x = vector(3), vector(3)
        expected = (6 * w * x).sum().repeat(3)
        expected[0] += (6 * w * w).sum()
        torch.testing.assert_close(slope(closure, [w]), expected)

    def test_evaluations_nested_in_an_evaluation_go_on_outside_of_it(self):
        def closure():
            with torch.no_grad():
                jp.laplacian(lambda z: (w * z**3).sum(), x)
            return jp.laplacian(lambda z: (w**2 * z**3).sum(), x)

        w, x = vector(3), vector(3)
        torch.testing.assert_close(slope(closure, [w]), 12 * w * x)
