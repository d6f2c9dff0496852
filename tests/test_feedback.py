"""Learned feedback: a control variate that stays unbiased, and recursive least squares with a gain and a ridge."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jetplane.gradients import Feedback, FeedbackSpec, FeedbackState, LayerPlan, allocate, estimate

EMPTY = FeedbackState()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def gradient(closure, params):
    return flat(torch.autograd.grad(closure(), params))


def relu_network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x, y = torch.randn(64, 6).double(), torch.randint(3, (64,))
    return net, lambda: F.cross_entropy(net(x), y)


def learn(net, closure, steps):
    """Plans with fewer samples than outputs, their feedback's specifications, and what a few steps teach it."""
    params = list(net.parameters())
    plans = allocate(closure, net, params, 8)
    plans |= {"4": LayerPlan("basis", 3)}
    plans |= {name: LayerPlan("outputs", 2, feedback=FeedbackSpec(20, 3, 1.0)) for name in ("0", "2")}
    specs = {name: plans[name].feedback for name in ("0", "2")}
    state = EMPTY
    for seed in range(steps):
        feedback = Feedback(specs, state, params[0])
        state = feedback.update(estimate(closure, net, params, plans, 1000 + seed, feedback=feedback).statistics)
    return params, plans, specs, state


def test_whatever_is_predicted_the_estimate_is_unbiased():
    net, closure = relu_network()
    params, plans, specs, _ = learn(net, closure, 0)
    state = FeedbackState(5, None, {name: torch.randn(2, 20, 3).double() for name in ("0", "2")})
    found = torch.stack([
        flat(estimate(closure, net, params, plans, seed, feedback=Feedback(specs, state, params[0])).gradient)
        for seed in range(100)
    ])  # fmt: skip
    assert (found.mean(0) - gradient(closure, params)).norm() < 1.3 * found.var(0).sum().sqrt() / 10


def test_feedback_takes_the_noise_away():
    net, closure = relu_network()
    errors = {}
    for steps in (0, 100):
        params, plans, specs, state = learn(net, closure, steps)
        feedback = Feedback(specs, state, params[0])
        found = [flat(estimate(closure, net, params, plans, s, feedback=feedback).gradient) for s in range(20)]
        errors[steps] = sum((f - gradient(closure, params)).square().sum() for f in found)
    assert errors[100] < 0.15 * errors[0]  # a ReLU away from the errors all of it, two ReLUs away much


def test_statistics_of_shards_add_up_to_those_of_the_batch():
    net, _ = relu_network()
    x, y = torch.randn(9, 6).double(), torch.randint(3, (9,))
    closure = lambda part=slice(0, 9): F.cross_entropy(net(x[part]), y[part])  # noqa: E731
    params, plans, specs, state = learn(net, closure, 2)

    def statistics(part, at, n):
        feedback = Feedback(specs, state, params[0])
        return estimate(lambda: closure(part), net, params, plans, 7, at / n, feedback, n / 9).statistics

    whole = statistics(slice(0, 9), 0, 9)
    parts = [(n, statistics(slice(at, at + n), at, n)) for at, n in ((0, 4), (4, 2), (6, 3))]
    assert len(whole) == 3 and all(bool(value.any()) for value in whole)
    for i, value in enumerate(whole):
        torch.testing.assert_close(sum(n / 9 * found[i] for n, found in parts), value)


def test_rare_errors_do_not_learn_the_noise_of_their_few_rows():
    generator = torch.Generator().manual_seed(0)
    outputs, kinds, rows, state = 64, 20, 256, EMPTY
    truth = torch.randn(outputs, kinds, generator=generator)
    often = 1.0 / torch.arange(1, kinds + 1) ** 3  # the last kind comes every 40 steps
    positive = torch.ones(rows, outputs, dtype=torch.bool)
    specs = {"layer": FeedbackSpec(outputs, kinds, outputs * kinds / rows)}
    for _ in range(100):
        errors = F.one_hot(torch.multinomial(often, rows, True, generator=generator), kinds).float()
        feedback = Feedback(specs, state, errors)
        left = errors @ truth.mT - feedback.predict("layer", errors, positive)
        noise = torch.randint(2, left.shape, generator=generator) * 2.0 - 1
        residual = (left * noise).sum(1, keepdim=True) * noise
        correlations = {"layer": feedback.correlate(errors, positive, residual)}
        state = feedback.update(feedback.sufficient_statistics(correlations, errors))
    assert left.square().mean() < 0.3 * (errors @ truth.mT).square().mean()
    every = torch.eye(kinds)
    wrong = every @ truth.mT - Feedback(specs, state, every).predict("layer", every, positive[:kinds])
    assert wrong[-3:].norm() < 2 * truth[:, -3:].norm()


# --- one layer, exact residuals ---------------------------------------------------------------------------


def problem(noise, outputs=4, errors=3, rows=500):
    torch.manual_seed(0)
    return {"layer": FeedbackSpec(outputs, errors, noise)}, torch.randn(rows, errors).double()


def step(specs, state, errors, truth):
    """One update by what was not predicted of gradients that are a map of the errors, all outputs above zero."""
    feedback = Feedback(specs, state, errors)
    positive = torch.ones(len(errors), specs["layer"].outputs, dtype=torch.bool)
    residual = errors @ truth.mT - feedback.predict("layer", errors, positive)
    correlations = {"layer": feedback.correlate(errors, positive, residual)}
    return feedback.update(feedback.sufficient_statistics(correlations, errors))


def test_without_noise_the_first_step_learns_all_of_it():
    specs, errors = problem(noise=1e-6)
    truth = torch.randn(4, 3).double()
    above = step(specs, EMPTY, errors, truth).maps["layer"][0]
    assert (above - truth).norm() < 0.01 * truth.norm()


def test_what_has_changed_is_followed_however_many_steps_there_were():
    specs, errors = problem(noise=1e-6)
    state, truth = FeedbackState(10_000, errors.mT @ errors, {"layer": torch.zeros(2, 4, 3).double()}), torch.ones(4, 3)
    for _ in range(40):
        state = step(specs, state, errors, truth.double())
    left = (state.maps["layer"][0] - truth).norm() / truth.norm()
    assert 0.5 * 0.9**40 < left < 2 * 0.9**40  # at the least gain


def test_the_more_noise_the_less_a_late_step_teaches():
    learned = {}
    for noise in (2.0, 20.0, 200.0):
        specs, errors = problem(noise)
        state = FeedbackState(10_000, errors.mT @ errors, {"layer": torch.zeros(2, 4, 3).double()})
        learned[noise] = step(specs, state, errors, torch.ones(4, 3).double()).maps["layer"][0].mean().item()
    ridge = 1 / 1.2  # of noise times gain, where that is 0.2
    assert learned[2.0] == pytest.approx(0.1 * ridge, rel=0.02)  # as without noise
    assert learned[20.0] == pytest.approx(0.01 * ridge, rel=0.02)
    assert learned[200.0] == pytest.approx(0.001 * ridge, rel=0.02)


@pytest.mark.parametrize(
    ("steps", "noise", "gain"),
    [
        *((1, 1.0, 1.0), (2, 0.5, 0.8), (3, 2.0, 0.4), (8, 8.0, 0.125), (18, 1.5, 0.2 / 1.95)),
        *((19, 2.0, 0.1), (4, 36.0, 0.05), (200, 4.0, 0.05), (200, 1.0, 0.1)),
    ],
)
def test_the_gain_is_two_in_parts_of_steps_and_noise(steps, noise, gain):
    """At most 1, and at least 0.1, or less where the noise is above 2: see the test above."""
    specs, errors = problem(noise)
    errors = torch.linalg.qr(errors).Q  # S = I
    state = FeedbackState(steps - 1, torch.eye(3).double())
    maps = step(specs, state, errors, torch.ones(4, 3).double()).maps["layer"]
    torch.testing.assert_close(maps[0], torch.full((4, 3), gain / (1 + 1e-3 + gain * noise)).double())


def test_errors_without_correlations_and_correlations_without_errors_teach_nothing():
    specs, errors = problem(noise=0.1)
    feedback = Feedback(specs, EMPTY, errors)
    assert not any(bool(value.any()) for value in feedback.sufficient_statistics({}, errors))
    *_, moments = feedback.sufficient_statistics({"layer": torch.ones(2, 4, 3)}, None)
    assert moments.shape == (3, 3) and not bool(moments.any())


def test_a_step_of_much_larger_errors_does_not_overshoot():
    specs, errors = problem(noise=1e-6)
    small = errors.mT @ errors
    truth = torch.ones(4, 3).double()
    state = step(specs, FeedbackState(0, small), 10 * errors, truth)
    assert (state.maps["layer"][0] - truth).norm() < truth.norm()
    torch.testing.assert_close(state.second_moments, 0.9 * small + 0.1 * 100 * small)


def test_errors_that_never_occur_are_no_reason_to_learn():
    specs, errors = problem(noise=1e-6)
    errors[:, 2] = 0  # S is singular
    maps = step(specs, EMPTY, errors, torch.ones(4, 3).double()).maps["layer"]
    assert bool(maps.isfinite().all()) and not bool(maps[..., 2].any())
    assert (maps[0, :, :2] - 1).abs().max() < 0.01


def test_noise_is_a_ridge():
    specs, errors = problem(noise=0.5)
    truth = torch.randn(4, 3).double()
    s = errors.mT @ errors
    expected = truth @ s @ torch.linalg.inv(s + (1e-3 + 0.5) * s.diagonal().mean() * torch.eye(3).double())
    torch.testing.assert_close(step(specs, EMPTY, errors, truth).maps["layer"][0], expected)  # of gain 1


def test_each_side_of_zero_has_a_map_of_its_own():
    specs, errors = problem(noise=1e-6)
    positive = torch.rand(len(errors), 4) < 0.5
    above, below = torch.randn(2, 4, 3).double()
    state = EMPTY
    for _ in range(60):
        feedback = Feedback(specs, state, errors)
        residual = torch.where(positive, errors @ above.mT, errors @ below.mT)
        residual = residual - feedback.predict("layer", errors, positive)
        correlations = {"layer": feedback.correlate(errors, positive, residual)}
        state = feedback.update(feedback.sufficient_statistics(correlations, errors))
    torch.testing.assert_close(state.maps["layer"], torch.stack([above, below]), rtol=1e-2, atol=1e-2)


def test_a_step_that_met_no_errors_teaches_nothing():
    specs, errors = problem(noise=0.1)
    state = step(specs, EMPTY, errors, torch.ones(4, 3).double())
    feedback = Feedback(specs, state, errors)
    after = feedback.update(feedback.sufficient_statistics({}, None))
    assert after.steps == 1 and torch.equal(after.maps["layer"], state.maps["layer"])


def test_what_was_learned_for_another_shape_is_dropped():
    _, errors = problem(noise=0.1)
    state = step({"layer": FeedbackSpec(4, 3, 0.1)}, EMPTY, errors, torch.ones(4, 3).double())
    specs, wider = {"layer": FeedbackSpec(4, 5, 1e-6)}, torch.randn(500, 5).double()
    feedback = Feedback(specs, state, wider)
    assert not bool(feedback.predict("layer", wider, wider[:, :4] > 0).any())
    after = step(specs, state, wider, torch.ones(4, 5).double())
    assert after.steps == 2 and after.maps["layer"].shape == (2, 4, 5) and after.second_moments.shape == (5, 5)


def test_a_state_goes_through_plain_data():
    specs, errors = problem(noise=0.1)
    state = step(specs, EMPTY, errors, torch.ones(4, 3).double())
    again = FeedbackState.of(state.plain())
    assert again.steps == state.steps and torch.equal(again.second_moments, state.second_moments)
    assert torch.equal(again.maps["layer"], state.maps["layer"])
    assert FeedbackState.of({}) == EMPTY
