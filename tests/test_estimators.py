"""Curvature from random lines and conjugate gradients, against exact Hessians in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp

WITHIN = 5.0  # standard errors: a normal estimate lies outside once in 1.7 million


@pytest.fixture
def problem():
    """A closure of a small network, its parameters, and their exact Hessian and gradient."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(20, 2).double(), torch.randint(0, 2, (20,))
    params = list(net.parameters())

    def closure():
        return F.cross_entropy(net(x), y) + sum((p - 0.3).square().sum() for p in params)

    axes = torch.eye(sum(p.numel() for p in params)).double()
    directions = [a.reshape(-1, *p.shape) for a, p in zip(axes.split([p.numel() for p in params], 1), params)]  # noqa: B905
    exact = jp.evaluate(closure, params, directions)
    return closure, params, exact.curvature, exact.slope


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("control", ["trace", 0.0, 2.0])
def test_the_estimate_is_unbiased_and_knows_its_error(control, problem):
    closure, params, exact, _ = problem
    found = jp.estimate_hessian(closure, params, 3000, control=control)
    off = (found.mean - exact) / found.error
    assert off.abs().max() < WITHIN
    # 289 entries, correlated: their mean square is 1 if the errors are right
    assert 0.6 < off.square().mean() < 1.6
    assert torch.equal(found.mean, found.mean.mT)
    diagonal = jp.estimate_diagonal(closure, params, 3000, control=control)
    assert [t.shape for t in diagonal.mean] == [p.shape for p in params]
    torch.testing.assert_close(flat(diagonal.mean), found.mean.diagonal())
    torch.testing.assert_close(flat(diagonal.error), found.error.diagonal())


def test_many_small_estimates_have_no_bias(problem):
    """Two samples share their control variate the most; the mean over seeds shows what it would do."""
    closure, params, exact, slope = problem
    found = [jp.estimate_hessian(closure, params, 2, seed=seed) for seed in range(1500)]
    means = torch.stack([f.mean for f in found])
    error = means.std(0) / len(means) ** 0.5
    assert ((means.mean(0) - exact) / error).abs().max() < WITHIN
    gradients = torch.stack([flat(f.gradient) for f in found])
    assert ((gradients.mean(0) - slope) / gradients.std(0) * len(found) ** 0.5).abs().max() < WITHIN


def test_errors_fall_with_the_square_root_and_the_control_variate_helps(problem):
    closure, params, _, _ = problem

    def error(samples, control="trace"):
        return jp.estimate_hessian(closure, params, samples, control=control).error.norm()

    assert 1.8 < error(1000) / error(4000) < 2.2
    assert error(2000, 0.0) > 10 * error(2000)  # 24: this Hessian is not far from a multiple of I


def test_for_a_multiple_of_the_identity_the_estimate_is_exact():
    x = torch.randn(5).double()
    found = jp.estimate_hessian(lambda: 1.5 * x.square().sum(), [x], 4, control=3.0)
    torch.testing.assert_close(found.mean, 3 * torch.eye(5).double())
    assert found.error.max() < 1e-7


def test_chunks_do_not_change_what_is_estimated(problem):
    closure, params, exact, _ = problem
    whole = jp.estimate_hessian(closure, params, 100, chunk=100)
    parts = jp.estimate_hessian(closure, params, 101, chunk=25)  # the last chunk holds one
    assert whole.value == parts.value == closure()
    assert ((parts.mean - exact) / parts.error).abs().max() < WITHIN


def test_the_newton_system_is_solved(problem):
    closure, params, h, g = problem
    for chunk in (5, 64):
        newton = jp.solve_newton(closure, params, tolerance=1e-12, chunk=chunk)
        assert newton.status == "converged" and newton.residual <= 1e-12 and newton.iterations <= len(g)
        torch.testing.assert_close(flat(newton.gradient), g)
        torch.testing.assert_close(flat(newton.solution), torch.linalg.solve(h, g), rtol=1e-9, atol=1e-11)
        assert [t.shape for t in newton.solution] == [p.shape for p in params]
    damped = jp.solve_newton(closure, params, damping=0.5, tolerance=1e-12)
    expected = torch.linalg.solve(h + 0.5 * torch.eye(len(g)), g)
    torch.testing.assert_close(flat(damped.solution), expected, rtol=1e-9, atol=1e-11)


def test_conjugate_gradients_take_one_step_for_each_curvature():
    """By the diagonal alone, all curvatures of a separable loss are one."""
    x = torch.randn(6).double()
    scales = torch.tensor([1.0, 1e3, 5.0, 1e-3, 7.0, 40.0]).double()
    newton = jp.solve_newton(lambda: (scales * (x - 1).square()).sum(), [x])
    assert newton.iterations == 1 and newton.status == "converged"
    torch.testing.assert_close(x - newton.solution[0], torch.ones(6).double())


def test_what_ends_without_a_solution_says_so(problem):
    closure, params, _, g = problem
    short = jp.solve_newton(closure, params, iterations=1, tolerance=1e-12)
    assert short.status == "limit" and short.iterations == 1 and 0 < short.residual < 1
    x = torch.tensor([1.0, 2.0]).double()
    saddle = jp.solve_newton(lambda: x[0] * x[1] - x[0].square(), [x])
    assert saddle.status == "indefinite"
    torch.testing.assert_close(saddle.solution[0], saddle.gradient[0])
    h = torch.tensor([[-2.0, 1.0], [1.0, 0.0]]).double()
    g = saddle.gradient[0]
    assert saddle.residual == pytest.approx(((h @ g - g).norm() / g.norm()).item())
    bottom = torch.zeros(3).double()
    flat_there = jp.solve_newton(lambda: bottom.square().sum(), [bottom])
    assert flat_there.status == "converged" and not flat_there.solution[0].any() and flat_there.residual == 0


def test_half_and_single_precision_come_out_in_single():
    w = torch.randn(3, dtype=torch.bfloat16)
    found = jp.estimate_diagonal(lambda: w.square().sum(), [w], 8)
    assert found.mean[0].dtype == torch.float32
    v = torch.randn(3)
    newton = jp.solve_newton(lambda: (v - 1).square().sum(), [v])
    torch.testing.assert_close(v - newton.solution[0], torch.ones(3))


@pytest.mark.parametrize(
    "call",
    [
        lambda f, p: jp.estimate_hessian(f, p, 1),
        lambda f, p: jp.estimate_diagonal(f, p, 4, chunk=0),
        lambda f, p: jp.estimate_diagonal(f, p, 4, control=float("nan")),
        lambda f, p: jp.estimate_diagonal(f, p, 4, control="mean"),
        lambda f, p: jp.estimate_hessian(f, [], 4),
        lambda f, p: jp.solve_newton(f, p, damping=-1.0),
        lambda f, p: jp.solve_newton(f, p, iterations=0),
        lambda f, p: jp.solve_newton(f, []),
    ],
)
def test_bad_arguments(call):
    x = torch.ones(2)
    with pytest.raises(jp.ArgumentError):
        call(lambda: x.square().sum(), [x])
