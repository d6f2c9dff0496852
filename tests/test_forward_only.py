"""What the comparison of forward-only methods makes of runs."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import forward_only
from benchmarks.learning_curves import LearningCurve
from benchmarks.rivals import ADAM, FAST_ADAM, HEADS, MONO, PLANE, label
from benchmarks.tasks import Task


def curve(method, measures, seed=0, **settings):
    rows = [
        {"seconds": t, "steps": i, "epochs": i, "forwards": i, "train": 1.0, "loss": 1.0, "measure": m}
        for i, (t, m) in enumerate(zip((0, 1, 4, 16), measures, strict=True))
    ]
    return LearningCurve(method, seed, 0.1, rows=rows, budget=16, **settings)


CURVES = [
    curve(HEADS, (0.1, 0.8, 0.92, 0.96)), curve(MONO, (0.1, 0.85, 0.9, 0.94)), curve(ADAM, (0.1, 0.7, 0.9, 0.94)),
    curve(FAST_ADAM, (0.1, 0.75, 0.88, 0.98)), curve(label("fgd"), (0.1, 0.2, 0.3, 0.48)),
]  # fmt: skip


def test_the_gap_is_from_forward_gradients_to_the_better_adam():
    begin, parts = forward_only.gap_closed(CURVES)
    assert begin == "FGD" and parts == pytest.approx({HEADS: 0.96, MONO: 0.92})
    assert forward_only.gap_closed(CURVES[:2])[1] == {}


def test_without_forward_gradients_the_gap_is_from_the_untrained_model():
    begin, parts = forward_only.gap_closed(CURVES[:3])
    assert begin == "the untrained model" and parts == pytest.approx({HEADS: 0.86 / 0.84, MONO: 1.0})
    errors = [curve(m, values, measure="error") for m, values in ((HEADS, (4, 3, 3, 2.5)), (ADAM, (4, 3, 2.5, 2)))]
    errors.append(curve(FAST_ADAM, (4, 3, 3, 3), measure="error"))
    assert forward_only.gap_closed(errors)[1] == pytest.approx({HEADS: 0.75})


def test_at_each_time_the_best_of_each_kind_is_named_in_order():
    first, second, third = forward_only.ahead("mlp", CURVES).splitlines()
    assert first == (
        f"- mlp, after 1 s: local heads with Adam 85.0 % ({MONO}); ours 80.0 % ({HEADS}); with a backward pass 75.0 % "
        f"({FAST_ADAM}); other forward-only methods 20.0 % (FGD)."
    )
    assert second.startswith("- mlp, after 4 s: ours 92.0 %") and third.startswith(
        "- mlp, after 16 s: with a backward pass 98.0 %"
    )


def test_runs_that_are_there_are_not_made_again():
    had = {"mlp": [curve(MONO, (0, 0, 0, 0)), curve(MONO, (0, 0, 0, 0), seed=1, status="interrupted")]}
    assert forward_only.missing(had, "mlp", MONO, (0, 1, 2)) == [1, 2]
    assert forward_only.missing(had, "cnn", MONO, (0, 1)) == [0, 1]


def test_what_is_still_to_be_run_is_said(monkeypatch):
    monkeypatch.setattr(forward_only, "PROTOCOL", {"mlp": forward_only.Protocol(1.0, {HEADS: (0, 1), MONO: (0,)})})
    assert forward_only.left({"mlp": CURVES}) == f"mlp: {HEADS} (seeds 1)"
    assert forward_only.left({"mlp": [*CURVES, curve(HEADS, (0, 0, 0, 0), seed=1)]}) == ""


def test_the_tuned_rate_is_the_best_of_those_that_get_more_seconds():
    asked = []

    def outcome(rate, seconds):
        asked.append((rate, seconds))
        return abs(rate - 0.5) if seconds > 4 else abs(rate - 0.3)  # short runs prefer a smaller one

    rate, tried = forward_only.tuned(0.1, 64.0, outcome)
    short, long = ([r for r, seconds in asked if seconds == s] for s in (4.0, 16.0))
    assert (
        len(short) == forward_only.TRIALS and min(short) == pytest.approx(0.1 / 30) and max(short) == pytest.approx(3)
    )
    assert sorted(long) == sorted(sorted(short, key=lambda r: abs(r - 0.3))[:7]) and len(tried) == len(short)
    assert rate == min(long, key=lambda r: abs(r - 0.5))


def test_a_tuned_method_keeps_its_rate_for_later_seeds(monkeypatch):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    task = Task(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        lambda model, b: F.cross_entropy(model(b[0]), b[1]), lambda size, generator: itertools.repeat((x, y)), 64,
        lambda model: (0.0, (model(x).argmax(1) == y).double().mean().item()), "accuracy",
    )  # fmt: skip
    method = f"{ADAM}{forward_only.TUNED}"
    monkeypatch.setattr(forward_only, "PROTOCOL", {"mlp": forward_only.Protocol(0.1, {method: (0, 1)})})
    known = curve(ADAM, (0, 0, 0, 0))
    known.memory = 7
    (first,) = forward_only.tuned_curves({"mlp": [known]}, task, "mlp", method, [0], None)
    assert first.method == method and first.memory == 7 and len(first.sweep) == forward_only.TRIALS
    assert 1e-3 / 30.1 < first.rate < 0.03 * 1.01 and f"{first.rate:.2g}" in first.sweep
    monkeypatch.setattr(forward_only, "tuned", None)  # not asked again
    (second,) = forward_only.tuned_curves({"mlp": [known, first]}, task, "mlp", method, [1], None)
    assert second.rate == first.rate and second.seed == 1 and second.sweep == first.sweep


def test_every_rival_with_a_rate_is_in_the_protocol_twice():
    for protocol in forward_only.PROTOCOL.values():
        for method in protocol.methods.keys() & forward_only.RATED:
            assert f"{method}{forward_only.TUNED}" in protocol.methods


def test_the_page_has_tables_cosines_and_the_gap():
    held = {"machine": "one machine", "cosines": {"mlp": {HEADS: {"1.weight": 0.5}}}}
    text = forward_only.page(held, {"mlp": CURVES})
    assert f"| {HEADS} | 0.500 |" in text and f"{HEADS} 96.0 %" in text and "one machine" in text
    assert f"| {HEADS} | 1 | 0.1 | 80.0 % | 92.0 % | 96.0 % |" in text


@pytest.mark.parametrize("method", [HEADS, PLANE, MONO, forward_only.GRAPE, forward_only.AGZO])
def test_cosines_are_one_where_a_single_layer_sees_the_loss(monkeypatch, method):
    """The last layer has its exact gradient by all methods but AGZO, whose direction is random."""
    monkeypatch.setattr(forward_only, "COSINE_STEPS", 3)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

    def batches(size, generator):
        while True:
            yield x, y

    task = Task(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        lambda model, b: F.cross_entropy(model(b[0]), b[1]), batches, 64, lambda model: (0.0, 0.0), "accuracy",
    )  # fmt: skip
    found = forward_only.cosines(task, method)
    assert list(found) == ["0.weight", "2.weight"]
    if method == forward_only.AGZO:
        assert -1 <= found["2.weight"] < 0.999
    else:
        assert found["2.weight"] == pytest.approx(1.0, abs=1e-5)
        assert method == PLANE or found["0.weight"] < 0.9999  # whose noise goes along all eight outputs


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.f(x).tanh()


def test_cosines_of_the_residual_stream_are_one_from_the_last_block_on(monkeypatch):
    monkeypatch.setattr(forward_only, "COSINE_STEPS", 3)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    task = Task(
        lambda: nn.Sequential(nn.Linear(6, 8), _Block(), _Block(), nn.Linear(8, 3)),
        lambda model, b: F.cross_entropy(model(b[0]), b[1]), lambda size, generator: iter([(x, y)] * 4), 64,
        lambda model: (0.0, 0.0), "accuracy",
    )  # fmt: skip
    found = forward_only.cosines(task, forward_only.STREAM)
    assert found["2.f.weight"] == pytest.approx(1.0, abs=1e-5) == found["3.weight"]
    assert 0.5 < found["1.f.weight"] < 0.9999
