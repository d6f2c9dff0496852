"""Searches: how far a step is taken."""

import math
from dataclasses import replace

import pytest
import torch

import jetplane as jp
from jetplane.evaluation.plane import SlopeMoments
from jetplane.subspace.descent import Newton, SaddleFree
from jetplane.subspace.search import (
    AdaptiveCubic,
    Backtracking,
    ExactLine,
    Line,
    NoiseAware,
    Proposal,
    TrustRegion,
    Whole,
)


def proposal(slope, inverse, examples=None, loss_at=lambda rate: math.nan, value=1.0):
    slope = torch.tensor(slope)
    solution = Newton().solve(slope, torch.linalg.inv(torch.tensor(inverse).double()))
    line = lambda kappa: Line(loss_at, lambda: kappa.norm().item())  # noqa: E731
    covariance = None if examples is None else SlopeMoments.of(examples).covariance
    return Proposal(value, slope, solution, covariance, line)


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
    assert step.signal == pytest.approx(48.0)
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
        _, rate, record = search(proposal(slopes[-1].tolist(), inverse.tolist(), examples), record)
    steps = -torch.stack(slopes) @ inverse

    def expected(rate):
        return (rate * steps @ gradient + 0.5 * rate**2 * ((steps @ hessian) * steps).sum(1)).mean()

    best = min((r / 100 for r in range(101)), key=lambda r: float(expected(r)))
    assert 0.2 < best < 0.8 and abs(rate - best) < 0.05


def test_averages_forget_and_the_floor_holds():
    search = NoiseAware(guard=False)
    pure_noise = proposal([0.0], [[1.0]], torch.tensor([[1.0], [-1.0]]))
    certain = proposal([2.0], [[1.0]], torch.tensor([[1.0], [1.0]]))
    assert search(pure_noise, {})[1:] == (0.0, {"noise": pytest.approx(0.2), "signal": 0.0})
    _, rate, record = search(certain, {"noise": 100.0, "signal": 100.0})
    assert rate == pytest.approx(max(1e-3, 1 - 95 / (95 + 0.2)))
    for _ in range(300):
        _, rate, record = search(certain, record)
    assert rate == pytest.approx(1.0, abs=1e-4)
    given = {"noise": 1.0, "signal": 1.0}
    search(certain, given)
    assert given == {"noise": 1.0, "signal": 1.0}


def test_a_step_that_raises_the_loss_is_halved():
    examples = torch.tensor([[1.0], [3.0]])  # noise 4, signal 16: a rate of 3/4
    rises = proposal([4.0], [[1.0]], examples, lambda r: 1 - r if r < 0.2 else 2.0)
    assert NoiseAware()(rises, {})[1] == 0.75 / 4
    assert NoiseAware(guard=False)(rises, {})[1] == 0.75


def curved(loss_of):
    """A plane of a steep and a flat direction of length one, and a loss of the coefficients that is not its model's."""
    slope, hessian = torch.tensor([1.0, 0.1]).double(), torch.diag(torch.tensor([1.0, 0.001])).double()
    solve = lambda damping: Newton().solve(slope, hessian + damping * torch.eye(2))  # noqa: E731
    line = lambda kappa: Line(lambda rate: loss_of(rate * kappa), lambda: kappa.norm().item())  # noqa: E731
    sure = SlopeMoments.of(slope.repeat(2, 1) / 2).covariance
    return Proposal(0.0, slope, solve(0.0), sure, line, damped=solve, stiffest=1.0)


def test_a_plane_whose_model_does_not_hold_is_damped():
    def loss(kappa):  # far along the flat direction it rises
        return (kappa[0] + kappa[0] ** 2 / 2 + 0.1 * kappa[1] + 0.05 * kappa[1] ** 2).item()

    kappa, rate, record = NoiseAware()(curved(loss), {})
    assert rate == pytest.approx(1.0)
    assert record["damping"] == pytest.approx(0.1)  # a thousandth of the steepest, and ten times as much twice
    assert kappa.tolist() == pytest.approx([-1 / 1.1, -0.1 / 0.101])
    assert loss(kappa) < -0.4
    kappa, rate, again = NoiseAware()(curved(loss), record)
    assert again["damping"] == pytest.approx(0.1 / 3)  # it held at once


def test_a_plane_whose_model_holds_is_not_damped():
    model = lambda kappa: (kappa @ torch.tensor([1.0, 0.1]).double() + (kappa**2) @ MODEL / 2).item()  # noqa: E731
    kappa, rate, record = NoiseAware()(curved(model), {})
    assert (rate, record["damping"]) == (1.0, 0.0)
    assert kappa.tolist() == pytest.approx([-1.0, -100.0])


def test_what_is_rounded_away_is_no_reason_to_damp():
    still = replace(curved(lambda kappa: 0.1), rounding=10.0)
    assert NoiseAware()(still, {})[2]["damping"] == 0.0
    assert NoiseAware()(replace(still, rounding=0.0), {})[1] == 0.0


def test_what_no_damping_helps_is_halved():
    rises = curved(lambda kappa: -1e-3 if kappa.norm() < 0.2 else 1.0)
    kappa, rate, record = NoiseAware()(rises, {})
    assert rate in (0.125, 0.25) and record["damping"] == pytest.approx(1.0)


MODEL = torch.tensor([1.0, 0.001]).double()


def test_without_examples_the_loss_is_asked():
    _, rate, record = NoiseAware()(proposal([2.0], [[2.0]], None, lambda r: (1 - 4 * r) ** 2), {"noise": 1.0})
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
    assert Backtracking()(proposal([1.0], [[1.0]], None, loss_at), {"kept": 1.0})[1:] == (rate, {"kept": 1.0})


def test_whole():
    assert Whole()(proposal([1.0], [[1.0]]), {})[1:] == (1.0, {})


# --- noise by coordinate ---------------------------------------------------------------------------------


def test_one_noisy_direction_does_not_slow_the_others():
    examples = torch.tensor([[2.0, 10.0], [2.0, -9.0]])  # slope 4 without noise; slope 1 with a variance of 361
    step = proposal([4.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], examples)
    together, rate, _ = NoiseAware(guard=False)(step, {})
    assert rate == 1e-3
    torch.testing.assert_close(together, torch.tensor([-4.0, -1.0]).double())
    kappa, rate, record = NoiseAware(guard=False, each=True)(step, {})
    torch.testing.assert_close(rate * kappa, torch.tensor([-4.0, -1e-3]).double())
    assert all(isinstance(v, float) for name in ("noise", "signal") for v in record[name])


def test_the_rate_of_each_coordinate_minimizes_the_expected_loss():
    """On a quadratic, over many batches: coordinate by coordinate the rate is near the best constant one."""
    torch.manual_seed(0)
    hessian = torch.diag(torch.tensor([0.5, 1.0, 4.0])).double()
    gradient, spread = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.1, 0.2, 0.2]).double()
    inverse, record, search = torch.linalg.inv(hessian), {}, NoiseAware(memory=0.999, guard=False, each=True)
    kappa, slope = torch.zeros(3), torch.ones(3)
    for _ in range(4000):
        examples = (gradient + spread * math.sqrt(20) * torch.randn(20, 3).double()) / 20
        slope = examples.sum(0)
        kappa, _, record = search(proposal(slope.tolist(), inverse.tolist(), examples), record)
    taken = -kappa / (inverse @ slope)
    torch.testing.assert_close(taken, gradient**2 / (gradient**2 + spread**2), rtol=0, atol=0.08)


def test_averages_by_coordinate_begin_anew_in_a_larger_plane():
    search, one = NoiseAware(guard=False, each=True), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    _, _, record = search(proposal([2.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], one), {"noise": [9.0], "signal": [1.0]})
    assert record["noise"] == [0.0, 0.0] and record["signal"] == pytest.approx([0.2, 0.2])
    _, _, record = search(proposal([2.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], one), record)
    assert record["signal"] == pytest.approx([0.39, 0.39])


# --- passes along the line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_at", "least"),
    [
        (lambda r: (r - 0.3) ** 2, 0.3),
        (lambda r: (r - 5.0) ** 2, 5.0),
        (lambda r: -r * math.exp(-r), 1.0),
        (lambda r: math.nan if r > 0.2 else (r - 0.1) ** 2, 0.1),
        (lambda r: abs(r - 0.7), 0.7),
    ],
)
def test_exact_line_finds_the_least_loss(loss_at, least):
    passes = []
    counted = lambda r: passes.append(r) or loss_at(r)  # noqa: E731
    step = proposal([1.0], [[1.0]], None, counted, loss_at(0.0))
    assert ExactLine(passes=25)(step, {"kept": 1.0})[1:] == (pytest.approx(least, abs=2e-2), {"kept": 1.0})
    assert len(passes) == 25
    for n in range(1, 25):
        rate = ExactLine(passes=n)(step, {})[1]
        assert loss_at(rate) <= loss_at(0.0)
    assert ExactLine()(proposal([1.0], [[1.0]], None, lambda r: 1 + r), {})[1] == 0.0


# --- the ratio test --------------------------------------------------------------------------------------


def along(f, x, hessian, **settings):
    """A proposal at x for a function of the coefficients themselves."""
    slope = torch.func.grad(f)(x)

    def line(kappa):
        return Line(lambda r: f(x + r * kappa).item(), lambda: kappa.norm().item())

    return Proposal(f(x).item(), slope, SaddleFree().solve(slope, hessian), None, line, **settings)


def test_the_radius_follows_the_ratio():
    eye = torch.eye(2).double()
    f = lambda x: 0.5 * x.square().sum()  # noqa: E731
    step = along(f, torch.tensor([3.0, 4.0]).double(), eye)
    assert step.decrease(step.solution.step) == pytest.approx(12.5)
    kappa, rate, record = TrustRegion(radius=1.0)(step, {})
    assert rate == pytest.approx(0.2) and record == {"radius": 2.0}  # as promised, and at the radius
    assert TrustRegion(radius=1.0)(step, {"radius": 2.0})[1] == pytest.approx(0.4)
    assert TrustRegion()(step, {})[1:] == (1.0, {"radius": pytest.approx(10.0)})
    assert TrustRegion(radius=50.0)(step, {})[2] == {"radius": 50.0}  # good, but not at the radius
    worse = along(f, torch.tensor([3.0, 4.0]).double(), 0.1 * eye)  # ten times too long: the loss rises
    kappa, rate, record = TrustRegion(tries=1)(worse, {})
    assert rate == 0.0 and record == {"radius": pytest.approx(12.5)}
    kappa, rate, record = TrustRegion(tries=5)(worse, {})
    assert rate == pytest.approx(0.0625) and f(torch.tensor([3.0, 4.0]) + rate * kappa) < 12.5
    metric = TrustRegion(radius=1.0, metric="plane")(along(f, torch.tensor([3.0, 4.0]).double(), 4 * eye), {})
    assert metric[1] == pytest.approx(1 / 2.5)  # sqrt(F^T M F) = 5 / 2


def test_the_promise_reckons_with_the_rate_of_the_group():
    f = lambda x: 0.5 * x.square().sum()  # noqa: E731
    step = along(f, torch.tensor([3.0, 4.0]).double(), torch.eye(2).double(), factor=0.5)
    assert step.decrease(step.solution.step) == pytest.approx(25 * (0.5 - 0.125))


def test_adaptive_cubic_finds_its_sigma():
    f = lambda x: (x**4).sum() / 4 - x.square().sum() / 2  # noqa: E731
    x, record = torch.tensor([0.01, 0.0]).double(), {}
    values = [f(x).item()]
    for _ in range(25):
        kappa, rate, record = AdaptiveCubic()(along(f, x, torch.func.hessian(f)(x)), record)
        x = x + rate * kappa
        values.append(f(x).item())
    assert all(b <= a for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == pytest.approx(-0.5)  # out of the saddle point of the second coordinate as well
    rises = along(lambda x: x.square().sum(), torch.ones(2).double(), torch.eye(2).double())
    refused = Proposal(-1.0, rises.slope, rises.solution, None, rises.line)
    kappa, rate, record = AdaptiveCubic(sigma=1.0, tries=3)(refused, {})
    assert rate == 0.0 and record == {"sigma": 64.0}


@pytest.mark.parametrize(
    "build",
    [
        lambda: Backtracking(part=0.0),
        lambda: Backtracking(halvings=-1),
        lambda: NoiseAware(memory=1.0),
        lambda: NoiseAware(floor=-0.1),
        lambda: ExactLine(passes=0),
        lambda: TrustRegion(radius=0.0),
        lambda: TrustRegion(metric="loss"),  # type: ignore[arg-type]
        lambda: TrustRegion(tries=0),
        lambda: AdaptiveCubic(sigma=-1.0),
        lambda: AdaptiveCubic(tries=0),
    ],
)
def test_bad_settings(build):
    with pytest.raises(jp.ArgumentError):
        build()
