"""Forward gradient descent: the rule for its rate, and the heavy ball."""

import copy

import pytest
import torch

import jetplane as jp
from jetplane.directions import KURTOSIS


@pytest.mark.parametrize("law", KURTOSIS)
@pytest.mark.parametrize(("size", "k"), [(1, 1), (7, 1), (7, 4)])
def test_the_rule_is_the_mean_square_of_the_forward_gradient(law, size, k):
    g = torch.linspace(1, 2, size).double()
    planes = 40_000
    v = jp.Directions(planes * k, law, seed=5).tangents([g])[0].reshape(planes, k, size)
    squares = ((v @ g).unsqueeze(-1) * v).mean(1).square().sum(-1) / g.square().sum()
    error = squares.std() / planes**0.5
    assert abs(squares.mean() - 1 / jp.step_scale(law, size, k)) < 5 * error + 1e-6


@pytest.mark.parametrize("arguments", [("cauchy", 3), ("gaussian", 0), ("gaussian", 3, 0)])
def test_bad_arguments_of_the_rule(arguments):
    with pytest.raises(jp.ArgumentError):
        jp.step_scale(*arguments)


def test_at_the_rule_the_expected_loss_falls_by_it():
    """One step on a round quadratic, mean over seeds."""
    losses = []
    for seed in range(2000):
        x = torch.ones(5, dtype=torch.float64, requires_grad=True)
        jp.optim.FGD([x], lr=jp.step_scale("uniform", 5), law="uniform", seed=seed).step(
            lambda x=x: x.square().sum() / 2
        )
        losses.append((x.detach().square().sum() / 5).item())
    ratios = torch.tensor(losses)
    assert abs(ratios.mean() - (1 - jp.step_scale("uniform", 5))) < 5 * ratios.std() / len(ratios) ** 0.5


def problem():
    x, y = (torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True) for _ in range(2))
    return x, y, lambda: (x**2).sum() + (x * y).sum() + (y**4).sum()


def test_momentum_is_the_heavy_ball():
    x, y, loss = problem()
    groups = [{"params": [x]}, {"params": [y], "momentum": 0.0, "lr": 0.01}]
    opt = jp.optim.FGD(groups, lr=0.02, k=2, momentum=0.7, seed=1)
    directions = jp.Directions(2, seed=1)
    before = x.detach().clone()
    for n in range(6):
        directions.step = n
        v, w = directions.tangents([x, y])
        slope = jp.evaluate(loss, [x, y], [v, w], "none").slope
        at = x.detach().clone()
        expected = at - 0.02 * (slope @ v) / 2 + 0.7 * (at - before)
        expected_y = y.detach() - 0.01 * (slope @ w) / 2
        opt.step(loss)
        torch.testing.assert_close(x.detach(), expected)
        torch.testing.assert_close(y.detach(), expected_y)
        before = at


def test_a_ball_rolls_on_from_a_checkpoint_bit_for_bit():
    x, y, loss = problem()
    opt = jp.optim.FGD([x, y], lr=0.02, momentum=0.9)
    for _ in range(3):
        opt.step(loss)
    state, at = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in (x, y)]
    for _ in range(3):
        opt.step(loss)
    u, v, again = problem()
    other = jp.optim.FGD([u, v], lr=0.5)
    other.load_state_dict(state)
    with torch.no_grad():
        u.copy_(at[0])
        v.copy_(at[1])
    for _ in range(3):
        other.step(again)
    assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_bad_momentum(momentum):
    with pytest.raises(jp.ArgumentError, match="momentum"):
        jp.optim.FGD([torch.ones(2, requires_grad=True)], momentum=momentum)
