"""The benchmark of drawn directions: cosines and training on a task of a few numbers."""

import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from benchmarks import drawn
from benchmarks.tasks import Task


def small_task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator) + 1
    y = (x[:, 0] > x[:, 1]).long()

    def batches(size, generator):
        while True:
            at = torch.randperm(64, generator=generator)[:size]
            yield x[at], y[at]

    def score(model):
        out = model(x)
        return F.cross_entropy(out, y).item(), (out.argmax(1) == y).double().mean().item()

    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
    return Task(make, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches, 32, score, "accuracy")


def test_cosines_are_those_of_estimates(monkeypatch):
    monkeypatch.setattr(drawn, "STEPS", 5)
    monkeypatch.setattr(drawn, "BATCHES", 2)
    found = drawn.cosines(small_task())
    assert list(found) == [*drawn.KINDS, "activity perturbation"]
    assert all(list(row) == ["0.weight", "2.weight", "all"] for row in found.values())
    assert found["activity perturbation"]["2.weight"] > 0.999  # the last layer's is exact
    assert all(0 < row["all"] <= 1 for row in found.values())


def test_runs_train_for_their_seconds_and_say_where_they_diverge():
    found = drawn.trained(small_task(), drawn.fgd(1e-2, tangents="inputs"), 0.3)
    assert found["steps"] > 3 and 0 < found["test loss"] < 1
    found = drawn.trained(small_task(), drawn.fgd(1e30), 0.5)
    assert found["train loss"] == float("inf") and found["accuracy"] == 0
    opt = drawn.planes(jp.sources.Drawn(4, tangents="inputs"))(small_task().model())
    assert isinstance(opt, jp.optim.PlaneSearch) and opt.model is None
