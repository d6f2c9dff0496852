"""Searches: how far a step is taken."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

import jetplane as jp
from jetplane.evaluation.plane import SlopeMoments
from jetplane.subspace.descent import Damped, Newton, SaddleFree
from jetplane.subspace.search import (
    Backtracking,
    Decision,
    ExactLine,
    FullStep,
    NoiseAware,
    NoiseState,
    NoState,
    Outcome,
    Proposal,
    Trial,
    advance,
    decided,
)


def proposal(slope, inverse, examples=None, value=1.0, **settings):
    curvature = torch.linalg.inv(torch.tensor(inverse).double())
    covariance = None if examples is None else SlopeMoments.of(examples).covariance
    return Proposal.of(value, torch.tensor(slope), curvature, Newton(), covariance=covariance, **settings)


def along(search, step, loss_at, state=None, scale=1.0):
    """What a search decides where the loss is a function of the rate."""
    state = search.start if state is None else state
    return decided(search, step, state, lambda trial: Outcome(loss_at(trial.rate), scale))


def as_promised(search, step, state=None):
    """What a search decides where the loss falls as the plane promises."""
    state = search.start if state is None else state
    return decided(search, step, state, lambda trial: Outcome(step.value - step.decrease(trial.kappa, trial.rate)))


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
    assert step.decrease(step.kappa) == pytest.approx(24.0)
    assert step.decrease(step.kappa, 0.5) == pytest.approx(48.0 * (0.5 - 0.125))


def test_the_noise_aware_rate_minimizes_the_expected_loss():
    """On a quadratic, over many batches, no other constant rate goes lower than that of the averages."""
    torch.manual_seed(0)
    hessian = torch.diag(torch.tensor([1.0, 4.0, 0.5])).double()
    gradient, spread = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.4, 0.1, 0.2]).double()
    inverse, state, search, rate = torch.linalg.inv(hessian), NoiseState(), NoiseAware(memory=0.999), 0.0
    slopes = []
    for _ in range(4000):
        examples = (gradient + spread * math.sqrt(20) * torch.randn(20, 3).double()) / 20
        slopes.append(examples.sum(0))
        decision = as_promised(search, proposal(slopes[-1].tolist(), inverse.tolist(), examples), state)
        rate, state = decision.rate, decision.state
    steps = -torch.stack(slopes) @ inverse

    def expected(rate):
        return (rate * steps @ gradient + 0.5 * rate**2 * ((steps @ hessian) * steps).sum(1)).mean()

    best = min((r / 100 for r in range(101)), key=lambda r: float(expected(r)))
    assert 0.2 < best < 0.8 and abs(rate - best) < 0.05


def test_averages_forget_and_the_floor_holds():
    search = NoiseAware()
    pure_noise = proposal([0.0], [[1.0]], torch.tensor([[1.0], [-1.0]]))
    certain = proposal([2.0], [[1.0]], torch.tensor([[1.0], [1.0]]))
    decision = as_promised(search, pure_noise)
    assert (decision.rate, decision.state) == (0.0, NoiseState(pytest.approx(0.2), 0.0, 0.0))
    decision = as_promised(search, certain, NoiseState(100.0, 100.0))
    assert decision.rate == pytest.approx(max(1e-3, 1 - 95 / (95 + 0.2)))
    assert as_promised(NoiseAware(floor=0.5), certain, NoiseState(100.0, 100.0)).rate == 0.5
    for _ in range(300):
        decision = as_promised(search, certain, decision.state)
    assert decision.rate == pytest.approx(1.0, abs=1e-4)


def test_the_batch_of_the_last_step_has_no_noise():
    examples = torch.tensor([[4.0], [0.0]])  # as much noise as signal
    step = proposal([4.0], [[1.0]], examples, value=3.0, rounding=1e-9)
    again = as_promised(NoiseAware(), step, NoiseState(after=3.0 + 4e-9))
    assert again.rate == 1.0
    other = as_promised(NoiseAware(), step, NoiseState(after=3.0 + 4e-8))
    assert other.rate == NoiseAware().floor
    assert as_promised(NoiseAware(), step).state.after is not None
    coarse = proposal([4.0], [[1.0]], examples, value=3.0, rounding=0.05)  # as of half precision
    assert as_promised(NoiseAware(), coarse, NoiseState(after=3.1)).rate == NoiseAware().floor


def test_no_more_examples_than_directions_have_no_floor():
    step = {n: proposal([4.0], [[1.0]], torch.tensor([[4.0], [0.0]]), value=3.0, count=n) for n in (1, 2, 3)}
    assert as_promised(NoiseAware(floor=0.1), step[2]).rate == 0.1
    assert as_promised(NoiseAware(floor=0.1), step[1]).rate == 1e-3  # the first step: it may be the whole data
    with pytest.warns(jp.RescueWarning, match="spread of 1 examples .* along 1 directions.* more than 1 examples"):
        assert as_promised(NoiseAware(floor=0.1), step[1], NoiseState(after=7.0)).rate == 1e-3
    with pytest.warns(jp.RescueWarning, match=r"put the outputs for single examples together, with torch\.cat"):
        assert as_promised(NoiseAware(), step[1], NoiseState(after=7.0)).rate == 1e-3  # also where that is the floor


def test_all_of_one_example_may_be_noise():
    lone = proposal([4.0], [[1.0]], torch.tensor([[4.0]]), value=3.0, count=1)
    assert lone.covariance is None and lone.noise == lone.signal == 16.0


def test_a_step_that_raises_the_loss_is_halved():
    examples = torch.tensor([[1.0], [3.0]])  # noise 4, signal 16: a rate of 3/4, and 0.1 damping for the last attempt
    decision = along(NoiseAware(), proposal([4.0], [[1.0]], examples), lambda r: 1 - r if r < 0.2 else 2.0)
    assert decision.rate == pytest.approx(0.75 / 4) and decision.state.damping == pytest.approx(1.0)


def curved(**settings):
    """A plane of a steep and a flat direction of length one."""
    slope, hessian = torch.tensor([1.0, 0.1]).double(), torch.diag(torch.tensor([1.0, 0.001])).double()
    sure = SlopeMoments.of(slope.repeat(2, 1) / 2).covariance
    return Proposal.of(0.0, slope, hessian, Newton(), covariance=sure, **settings)


def of_kappa(loss):
    """A loss of the coefficients that is not the plane's model."""
    return lambda trial: Outcome(loss(trial.rate * trial.kappa))


def test_a_plane_whose_model_does_not_hold_is_damped():
    def loss(kappa):  # far along the flat direction it rises
        return (kappa[0] + kappa[0] ** 2 / 2 + 0.1 * kappa[1] + 0.05 * kappa[1] ** 2).item()

    found = decided(NoiseAware(), curved(), NoiseState(), of_kappa(loss))
    assert found.rate == pytest.approx(1.0)
    assert found.state.damping == pytest.approx(0.1)  # a thousandth of the steepest, and ten times as much twice
    assert found.kappa.tolist() == pytest.approx([-1 / 1.1, -0.1 / 0.101])
    assert loss(found.kappa) < -0.4
    again = decided(NoiseAware(), curved(), found.state, of_kappa(loss))
    assert again.state.damping == pytest.approx(0.1 / 3)  # it held at once
    small = decided(NoiseAware(), curved(), replace(found.state, damping=1e-4), of_kappa(lambda kappa: -1e9))
    assert small.state.damping == 0.0  # a ten-thousandth of the steepest is none


@pytest.mark.parametrize(("part", "damped"), [(0.5, True), (0.74, True), (0.76, False)])
def test_three_quarters_of_the_promise_are_asked_for(part, damped):
    step = curved()
    falls = lambda trial: Outcome(-part * step.decrease(trial.kappa, trial.rate))  # noqa: E731
    assert (decided(NoiseAware(), step, NoiseState(), falls).state.damping > 0) == damped


@pytest.mark.parametrize(("before", "after"), [(0.99e-4, 0.0), (1.01e-4, 1.01e-4 / 3), (0.3, 0.1)])
def test_a_third_of_the_damping_is_left_where_it_held(before, after):
    """And none below a ten-thousandth of the largest curvature, here 4."""
    decision = as_promised(NoiseAware(), certain(), NoiseState(damping=4 * before))
    assert decision.state.damping == pytest.approx(4 * after)


@pytest.mark.parametrize(("before", "after"), [(0.0, 1e-3), (0.9e-4, 1e-3), (1.1e-4, 1.1e-3)])
def test_ten_times_the_damping_is_tried_where_it_did_not_hold(before, after):
    """And at least a thousandth of the largest curvature, here 4."""
    step, asked = certain(), []
    falls = lambda trial: Outcome(9.0 if not asked.append(trial) and len(asked) < 2 else -9.0)  # noqa: E731
    decision = decided(NoiseAware(), step, NoiseState(damping=4 * before), falls)
    assert decision.state.damping == pytest.approx(4 * after)
    kappas = [trial.kappa.item() for trial in asked]
    assert kappas == pytest.approx([-1 / (4 + 4 * before), -1 / (4 + 4 * after)], rel=1e-9)


def test_damping_is_bounded_where_no_step_lowers_the_loss():
    """As at a loss that rounding keeps from falling; the bound is that of the curvature now, here 4."""
    state = NoiseState()
    for _ in range(20):
        state = decided(NoiseAware(), certain(), state, lambda trial: Outcome(1.0)).state
    assert state.damping == 4e6
    assert as_promised(NoiseAware(), certain(), NoiseState(damping=1e30)).state.damping == pytest.approx(4e6 / 3)


def test_exactly_three_quarters_are_enough():
    falls = lambda trial: Outcome(-0.75 / 8)  # noqa: E731 (an eighth is promised)
    assert decided(NoiseAware(), certain(), NoiseState(), falls).state.damping == 0.0


def certain():
    """A plane of one direction, whose slope is the same for all examples."""
    none = torch.zeros(1, 1).double()
    return Proposal.of(0.0, torch.ones(1).double(), torch.full((1, 1), 4.0).double(), Newton(), covariance=none)


def test_a_shortened_step_promises_less():
    """By the rates of parameter groups and by clipping; Newton's steps promise half of the slope along them."""
    step, scale = curved(), 0.1
    promised = lambda trial: step.decrease(trial.kappa, scale * trial.rate)  # noqa: E731
    decision = decided(NoiseAware(), step, NoiseState(), lambda trial: Outcome(-promised(trial), scale))
    assert decision.state.damping == 0.0
    one = proposal([1.0], [[1.0]])
    assert along(Backtracking(part=0.5), one, lambda r: 1 - 0.06 * r, scale=0.1).rate == 1.0
    assert along(Backtracking(part=0.5), one, lambda r: 1 - 0.04 * r, scale=0.1).rate == 0.0


def test_directions_are_damped_by_their_squared_norms():
    step = replace(curved(), squared_norms=torch.tensor([1.0, 100.0]).double())
    assert step.largest_curvature == 1.0
    damped = step.damped(0.1)
    assert damped.kappa.tolist() == pytest.approx([-1 / 1.1, -0.1 / (0.001 + 0.1 * 100)])
    assert damped.curvature is step.curvature  # promises are those of the plane as it is
    scaled = Proposal.of(0.0, step.slope, step.curvature, Damped(0.1, scaled=True)).damped(1.0)
    expected = Damped(0.1, scaled=True)(step.slope, step.curvature + torch.eye(2))
    torch.testing.assert_close(scaled.kappa, expected)


def test_negative_curvature_is_damped_by_its_absolute_value():
    turned = torch.linalg.qr(torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double()).Q
    hessian = turned * torch.tensor([2.0, -3.0]).double() @ turned.mT
    slope = torch.tensor([0.3, 0.7]).double()
    for descent in (SaddleFree(None), Newton()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jp.RescueWarning)
            step = Proposal.of(0.0, slope, hessian, descent).damped(0.5)
        wanted = -turned @ ((turned.mT @ slope) / torch.tensor([2.5, 3.5]).double())
        torch.testing.assert_close(step.kappa, wanted)
    assert Proposal.of(0.0, slope, -torch.eye(2).double(), SaddleFree()).largest_curvature == 1.0


def test_a_plane_of_negative_curvature_is_damped_until_the_loss_falls():
    """Along it the model promises more the longer the step; the loss of a kink does not keep it."""
    slope, hessian = torch.tensor([-1.0]).double(), torch.tensor([[-0.1]]).double()
    sure = SlopeMoments.of(slope.repeat(2, 1) / 2).covariance
    step = Proposal.of(0.0, slope, hessian, SaddleFree(None), covariance=sure)
    found = decided(NoiseAware(), step, NoiseState(), of_kappa(lambda kappa: max(-kappa, kappa - 2).item()))
    assert 0 < found.rate * found.kappa.item() < 2
    assert found.kappa.item() == pytest.approx(1 / (0.1 + 0.1)) and found.state.damping == pytest.approx(0.1)


def test_a_plane_whose_model_holds_is_not_damped():
    decision = as_promised(NoiseAware(), curved())
    assert (decision.rate, decision.state.damping) == (1.0, 0.0)
    assert decision.kappa.tolist() == pytest.approx([-1.0, -100.0])


def test_what_is_rounded_away_is_no_reason_to_damp():
    still = lambda trial: Outcome(0.1)  # noqa: E731
    assert decided(NoiseAware(), curved(rounding=10.0), NoiseState(), still).state.damping == 0.0
    assert decided(NoiseAware(), curved(), NoiseState(), still).rate == 0.0


def test_what_no_damping_helps_is_halved():
    rises = of_kappa(lambda kappa: -1e-3 if kappa.norm() < 0.2 else 1.0)
    decision = decided(NoiseAware(), curved(), NoiseState(), rises)
    assert decision.rate in (0.125, 0.25) and decision.state.damping == pytest.approx(1.0)


def test_without_examples_the_loss_is_asked():
    state = NoiseState(noise=1.0)
    decision = along(NoiseAware(), proposal([2.0], [[2.0]]), lambda r: (1 - 4 * r) ** 2, state)
    assert decision.rate == 0.25 and decision.state == state


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
    assert along(Backtracking(), proposal([1.0], [[1.0]]), loss_at).rate == rate


def test_a_full_step_asks_nothing():
    step = proposal([1.0], [[1.0]])
    decision = advance(FullStep().decide(step, NoState()), None)
    assert isinstance(decision, Decision) and (decision.rate, decision.kappa) == (1.0, step.kappa)
    assert isinstance(advance(Backtracking().decide(step, NoState()), None), Trial)


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
    step = proposal([1.0], [[1.0]], None, loss_at(0.0))
    assert along(ExactLine(passes=25), step, counted).rate == pytest.approx(least, abs=2e-2)
    assert len(passes) == 25
    for n in range(1, 25):
        rate = along(ExactLine(passes=n), step, loss_at).rate
        assert loss_at(rate) <= loss_at(0.0)
    assert along(ExactLine(), proposal([1.0], [[1.0]]), lambda r: 1 + r).rate == 0.0


def test_the_first_parabola_has_the_slope_of_the_shortened_step():
    parabola = lambda r: 1 - 0.1 * r + 0.1 * r**2 / 0.6  # noqa: E731
    assert along(ExactLine(2), proposal([1.0], [[1.0]]), parabola, scale=0.1).rate == pytest.approx(0.3)


def asked(search, step, loss_at, scale=1.0):
    """The rates of a search's trials."""
    rates = []
    along(search, step, lambda r: rates.append(r) or loss_at(r), scale=scale)
    return rates


def least_of_parabola(*points):
    """Where the parabola through three points is least."""
    x, y = torch.tensor(points).double().unbind(1)
    _, b, c = torch.linalg.solve(torch.stack([x**0, x, x**2], 1), y).tolist()
    return -b / (2 * c)


STEEP = proposal([3.0], [[0.5]], value=7.0)  # a slope of -4.5 along the step


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bend", [5.0, 8.0, 20.0])
def test_the_second_pass_is_at_the_least_of_the_parabola_of_value_slope_and_first_loss(bend, scale):
    loss_at = lambda r: 7 - 4.5 * scale * r + bend * r**2  # noqa: E731
    least = 4.5 * scale / (2 * bend)
    assert asked(ExactLine(2), STEEP, loss_at, scale) == pytest.approx([1.0, max(least, 0.1)])


@pytest.mark.parametrize("loss_at", [lambda r: 7 + 1e4 * r, lambda r: math.inf, lambda r: math.nan])
def test_passes_come_nearer_by_a_tenth_where_no_loss_is_lower(loss_at):
    assert asked(ExactLine(3), STEEP, loss_at) == pytest.approx([1.0, 0.1, 0.01])
    assert along(ExactLine(3), STEEP, loss_at).rate == 0.0


def test_passes_go_twice_as_far_while_the_loss_falls():
    assert asked(ExactLine(4), STEEP, lambda r: 7 - r) == [1.0, 2.0, 4.0, 8.0]
    assert along(ExactLine(4), STEEP, lambda r: 7 - r).rate == 8.0
    assert asked(ExactLine(), STEEP, lambda r: 7 - r)[-1] == 32.0  # six of them


def test_who_makes_use_of_examples():
    assert NoiseAware().examples and not any(s.examples for s in (FullStep(), Backtracking(), ExactLine()))


def test_steps_along_which_the_loss_does_not_fall_at_first():
    assert asked(ExactLine(3), proposal([0.0], [[1.0]]), lambda r: 1.0) == pytest.approx([1.0, 0.1, 0.01])
    with pytest.warns(jp.RescueWarning, match="indefinite"):
        uphill = proposal([3.0], [[-0.5]], value=7.0)  # to the top of a parabola, with a slope of 4.5
    for slope in (9.0, 2.0):
        assert asked(ExactLine(2), uphill, lambda r, slope=slope: 7 + slope * r) == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    "loss_at", [lambda r: (r - 0.4) ** 4 + r / 9, lambda r: 3 * math.exp(-5 * r) + r**2, lambda r: -r / (r**4 + 12)]
)
def test_later_passes_are_at_the_least_of_the_parabola_through_the_best_point_and_its_neighbours(loss_at):
    rates = asked(ExactLine(5), proposal([1.0], [[1.0]], value=loss_at(0.0)), loss_at)
    known = sorted([0.0, *rates[:-1]])
    best = known.index(min(known, key=loss_at))
    assert rates[-1] == pytest.approx(least_of_parabola(*((r, loss_at(r)) for r in known[best - 1 : best + 2])))


GOLDEN = (3 - math.sqrt(5)) / 2


@pytest.mark.parametrize("least", [0.389, 0.391, 0.409, 0.411])
def test_a_parabola_that_moves_by_less_than_a_hundredth_gives_way_to_a_golden_section(least):
    step = proposal([1.0], [[1.0]])
    first = 1 + (1 / 0.8 - 1)  # so that the second pass is at 0.4
    bend = (first - 1) / (1 - 2 * least)  # of the parabola through the losses at 0 and 1 that is least there
    second = 1 - 2 * bend * least * 0.4 + bend * 0.4**2
    rates = asked(ExactLine(3), step, lambda r: first if r == 1 else second)
    section = 0.4 + GOLDEN * 0.6  # of the longer side
    assert rates == pytest.approx([1.0, 0.4, least if abs(least - 0.4) > 0.01 else section])


def test_golden_sections_of_the_longer_side():
    """A parabola is least where the second pass was; without a finite neighbour there is none."""
    rates = asked(ExactLine(4), proposal([1.0], [[1.0]]), lambda r: 1 - r + r**2 / 0.6)
    assert rates == pytest.approx([1.0, 0.3, 0.3 + GOLDEN * 0.7, 0.3 - GOLDEN * 0.3])
    rates = asked(ExactLine(4), proposal([1.0], [[1.0]]), lambda r: 1 - r if r < 0.2 else math.inf)
    assert rates == pytest.approx([1.0, 0.1, 0.1 + GOLDEN * 0.9, 0.1 + GOLDEN**2 * 0.9])


@pytest.mark.parametrize("halvings", [0, 2, 40])
def test_backtracking_halves_so_often(halvings):
    search, step = Backtracking() if halvings == 40 else Backtracking(halvings=halvings), proposal([1.0], [[1.0]])
    for least, rate in ((2.0**-halvings, 2.0**-halvings), (2.0 ** -(halvings + 1), 0.0)):
        assert along(search, step, lambda r, least=least: 1 - r / 2 if r <= least else 2.0).rate == rate
    assert asked(search, step, lambda r: 2.0) == [2.0**-n for n in range(halvings + 1)]


@pytest.mark.parametrize(("part", "taken"), [(0.9e-4, False), (1.1e-4, True)])
def test_backtracking_asks_for_a_ten_thousandth_of_what_the_slope_promises(part, taken):
    step = proposal([2.0], [[1.0]], value=8.0)  # a slope of -4 along the step
    assert (along(Backtracking(halvings=0), step, lambda r: 8 - part * 4 * r).rate == 1.0) is taken


def test_the_largest_curvature_is_that_of_directions_of_norm_one():
    step = replace(curved(), curvature=torch.diag(torch.tensor([2.0, 1.0])), squared_norms=torch.tensor([4.0, 0.5]))
    assert step.largest_curvature == 2.0


@pytest.mark.parametrize("limits", [(0.0, 0.0), (0.999, 1.0)])
def test_limits_are_allowed(limits):
    memory, floor = limits
    search = NoiseAware(memory=memory, floor=floor)
    noisy = proposal([1.0], [[1.0]], torch.tensor([[3.0], [-2.0]]))  # noise of 12.5 beside a signal of 1
    assert as_promised(search, noisy).rate == floor


@pytest.mark.parametrize(
    "build",
    [
        lambda: Backtracking(part=1.0),
        lambda: NoiseAware(floor=1.1),
        lambda: NoiseAware(memory=-0.1),
        lambda: Backtracking(part=0.0),
        lambda: Backtracking(halvings=-1),
        lambda: NoiseAware(memory=1.0),
        lambda: NoiseAware(floor=-0.1),
        lambda: ExactLine(passes=0),
    ],
)
def test_bad_settings(build):
    with pytest.raises(jp.ArgumentError):
        build()
