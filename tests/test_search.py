"""Searches: how far a step is taken."""

import math

import pytest
import torch

import jetplane as jp
from jetplane.plane import SlopeMoments
from jetplane.search import Backtracking, NoiseAware, Proposal, Whole


def proposal(slope, inverse, examples=None, loss_at=lambda rate: math.nan, value=1.0):
    covariance = None if examples is None else SlopeMoments.of(examples).covariance
    return Proposal(value, torch.tensor(slope), torch.tensor(inverse).double(), covariance, loss_at)


def test_covariance_is_that_of_sums_over_batches():
    population = torch.randn(100_000, 2).double() @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    batches = population.reshape(-1, 50, 2)
    estimated = torch.stack([SlopeMoments.of(b).covariance for b in batches]).mean(0)
    torch.testing.assert_close(estimated, torch.cov(batches.sum(1).mT), rtol=0.1, atol=2.0)
    assert SlopeMoments.of(torch.ones(1, 2)).covariance is None


def test_moments_of_shards_add_up():
    examples = torch.randn(30, 4).double() + 2.0
    first, second, whole = (SlopeMoments.of(e) for e in (examples[:7], examples[7:], examples))
    added = SlopeMoments(7 + 23, first.total + second.total, first.products + second.products)
    torch.testing.assert_close(added.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.covariance, 30 * torch.cov(examples.mT), rtol=1e-12, atol=1e-12)


def test_signal_and_noise():
    examples = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    step = proposal([4.0, 4.0], [[2.0, 0.0], [0.0, 1.0]], examples)
    assert step.signal == 48.0
    assert step.noise == pytest.approx(2 * 4.0 + 1 * 16.0)
    assert proposal([4.0, 4.0], [[2.0, 0.0], [0.0, 1.0]]).noise is None


def test_the_noise_aware_rate_minimizes_the_expected_loss():
    """On a quadratic, over many batches, no other constant rate goes lower than that of the averages."""
    torch.manual_seed(0)
    hessian = torch.diag(torch.tensor([1.0, 4.0, 0.5])).double()
    gradient, spread = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.4, 0.1, 0.2]).double()
    inverse, record, search, rate = torch.linalg.inv(hessian), {}, NoiseAware(memory=0.999, guard=False), 0.0
    slopes = []
    for _ in range(4000):
        examples = (gradient + spread * math.sqrt(20) * torch.randn(20, 3).double()) / 20
        slopes.append(examples.sum(0))
        rate, record = search(proposal(slopes[-1].tolist(), inverse.tolist(), examples), record)
    steps = -torch.stack(slopes) @ inverse

    def expected(rate):
        return (rate * steps @ gradient + 0.5 * rate**2 * ((steps @ hessian) * steps).sum(1)).mean()

    best = min((r / 100 for r in range(101)), key=lambda r: float(expected(r)))
    assert 0.2 < best < 0.8 and abs(rate - best) < 0.05


def test_averages_forget_and_the_floor_holds():
    search = NoiseAware(guard=False)
    pure_noise = proposal([0.0], [[1.0]], torch.tensor([[1.0], [-1.0]]))
    certain = proposal([2.0], [[1.0]], torch.tensor([[1.0], [1.0]]))
    assert search(pure_noise, {}) == (0.0, {"noise": pytest.approx(0.2), "signal": 0.0})
    rate, record = search(certain, {"noise": 100.0, "signal": 100.0})
    assert rate == pytest.approx(max(1e-3, 1 - 95 / (95 + 0.2)))
    for _ in range(300):
        rate, record = search(certain, record)
    assert rate == pytest.approx(1.0, abs=1e-4)
    given = {"noise": 1.0, "signal": 1.0}
    search(certain, given)
    assert given == {"noise": 1.0, "signal": 1.0}


def test_a_step_that_raises_the_loss_is_halved():
    examples = torch.tensor([[1.0], [3.0]])  # noise 4, signal 16: a rate of 3/4
    rises = proposal([4.0], [[1.0]], examples, lambda r: 1 - r if r < 0.2 else 2.0)
    assert NoiseAware()(rises, {})[0] == 0.75 / 4
    assert NoiseAware(guard=False)(rises, {})[0] == 0.75


def test_without_examples_the_loss_is_asked():
    rate, record = NoiseAware()(proposal([2.0], [[2.0]], None, lambda r: (1 - 4 * r) ** 2), {"noise": 1.0})
    assert rate == 0.25 and record == {"noise": 1.0}


@pytest.mark.parametrize(
    ("loss_at", "rate"),
    [
        (lambda r: 1 - r, 1.0),
        (lambda r: 1 - r if r < 0.3 else math.nan, 0.25),
        (lambda r: 1 + r, 0.0),
        (lambda r: 1.0, 0.0),
    ],
)
def test_backtracking(loss_at, rate):
    assert Backtracking()(proposal([1.0], [[1.0]], None, loss_at), {"kept": 1.0}) == (rate, {"kept": 1.0})


def test_whole():
    assert Whole()(proposal([1.0], [[1.0]]), {}) == (1.0, {})


@pytest.mark.parametrize(
    "build",
    [
        lambda: Backtracking(part=0.0),
        lambda: Backtracking(halvings=-1),
        lambda: NoiseAware(memory=1.0),
        lambda: NoiseAware(floor=-0.1),
    ],
)
def test_bad_settings(build):
    with pytest.raises(jp.ArgumentError):
        build()
