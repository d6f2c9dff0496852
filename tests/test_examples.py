"""Each example's part of the slope, against one evaluation for each example."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp

N, K = 7, 4


@pytest.fixture
def case():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, t, y = torch.randn(N, 6).double(), torch.randn(N, 5).double(), torch.randint(5, (N,))
    params = list(net.parameters())
    return net, x, t, y, params, [torch.randn(K, *p.shape).double() for p in params]


WEIGHT = torch.linspace(0.5, 2, 5).double()
# name: loss of (outputs, targets, labels), summed over examples
SUMS = {
    "cross_entropy": lambda o, t, y: F.cross_entropy(o, y, reduction="sum"),
    "cross_entropy, smoothed, weighted": lambda o, t, y: F.cross_entropy(
        o, y, WEIGHT, reduction="sum", label_smoothing=0.1
    ),
    "cross_entropy, soft targets": lambda o, t, y: F.cross_entropy(o, t.softmax(-1), reduction="sum"),
    "nll": lambda o, t, y: F.nll_loss(o.log_softmax(-1), y, WEIGHT, ignore_index=2, reduction="sum"),
    "mse": lambda o, t, y: F.mse_loss(o, t, reduction="sum"),
    "l1": lambda o, t, y: F.l1_loss(o, t, reduction="sum"),
    "huber": lambda o, t, y: F.huber_loss(o, t, reduction="sum"),
    "smooth_l1": lambda o, t, y: F.smooth_l1_loss(o, t, reduction="sum"),
    "bce": lambda o, t, y: F.binary_cross_entropy(o.sigmoid(), t.sigmoid(), reduction="sum"),
    "bce with logits": lambda o, t, y: F.binary_cross_entropy_with_logits(o, t.sigmoid(), reduction="sum"),
    "soft_margin": lambda o, t, y: F.soft_margin_loss(o, t.sign(), reduction="sum"),
}


def one_by_one(case, loss):
    net, x, t, y, params, tangents = case
    slopes = [
        jp.evaluate(lambda n=n: loss(net(x[n : n + 1]), t[n : n + 1], y[n : n + 1]), params, tangents).slope
        for n in range(N)
    ]
    return torch.stack(slopes)


@pytest.mark.filterwarnings("ignore::jetplane.JetplaneWarning")
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "none"])
@pytest.mark.parametrize("name", SUMS)
def test_losses(case, name, curvature):
    net, x, t, y, params, tangents = case
    plane = jp.evaluate(lambda: SUMS[name](net(x), t, y), params, tangents, curvature, examples=True)
    torch.testing.assert_close(plane.examples, one_by_one(case, SUMS[name]), rtol=1e-9, atol=1e-12)


def mse(o, t, y):
    return F.mse_loss(o, t, reduction="sum")


# name: (loss, the same as a sum over examples, curvatures it is known for)
MADE = {
    "mean": (lambda net, x, t, y: F.cross_entropy(net(x), y),
             lambda o, t, y: SUMS["cross_entropy"](o, t, y) / N, ("ggn", "hessian", "none")),
    "mean of nll": (lambda net, x, t, y: F.nll_loss(net(x).log_softmax(-1), y),
                    lambda o, t, y: SUMS["cross_entropy"](o, t, y) / N, ("hessian", "none")),
    "times constants": (lambda net, x, t, y: -(3 * F.mse_loss(net(x), t) / 2) * torch.tensor([0.5]).double(),
                        lambda o, t, y: -0.75 * mse(o, t, y) / (5 * N), ("ggn", "hessian", "none")),
    "two losses": (lambda net, x, t, y: F.mse_loss(net(x), t) - 2 * F.cross_entropy(net(x), y).view(1),
                   lambda o, t, y: mse(o, t, y) / (5 * N) - 2 * SUMS["cross_entropy"](o, t, y) / N,
                   ("ggn", "hessian", "none")),
    "accumulated": (lambda net, x, t, y: F.mse_loss(net(x), t).add_(F.cross_entropy(net(x), y), alpha=2),
                    lambda o, t, y: mse(o, t, y) / (5 * N) + 2 * SUMS["cross_entropy"](o, t, y) / N,
                    ("ggn", "hessian", "none")),
    "reduced by hand": (lambda net, x, t, y: F.mse_loss(net(x), t, reduction="none").sum(1).mean(),
                        lambda o, t, y: mse(o, t, y) / N, ("ggn",)),
    "a loss of one's own": (lambda net, x, t, y: jp.loss()(lambda o: ((o - t) ** 4).mean())(net(x)),
                            lambda o, t, y: ((o - t) ** 4).sum() / (5 * N), ("ggn",)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "curvature"), [(n, c) for n in MADE for c in MADE[n][2]])
def test_what_follows_on_a_loss(case, name, curvature):
    net, x, t, y, params, tangents = case
    closure, apart, _ = MADE[name]
    plane = jp.evaluate(lambda: closure(net, x, t, y), params, tangents, curvature, examples=True)
    torch.testing.assert_close(plane.examples, one_by_one(case, apart), rtol=1e-9, atol=1e-12)


def test_a_regularizer_is_shared_equally(case):
    net, x, t, y, params, tangents = case
    penalty = lambda: 0.1 * sum((p**2).sum() for p in params)  # noqa: E731
    share = jp.evaluate(penalty, params, tangents).slope / N
    for closure in (lambda: F.mse_loss(net(x), t) + penalty(), lambda: penalty() + F.mse_loss(net(x), t)):
        plane = jp.evaluate(closure, params, tangents, "ggn", examples=True)
        expected = one_by_one(case, lambda o, t, y: mse(o, t, y) / (5 * N)) + share
        torch.testing.assert_close(plane.examples, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(plane.examples.sum(0), plane.slope, rtol=1e-12, atol=1e-12)


def test_sums_over_different_batches_are_placed_one_behind_the_other(case):
    net, x, t, y, params, tangents = case
    closure = lambda: F.mse_loss(net(x), t) + F.mse_loss(net(x[:3]), t[:3])  # noqa: E731
    plane = jp.evaluate(closure, params, tangents, examples=True)
    rows = one_by_one(case, mse) / 5
    torch.testing.assert_close(plane.examples, torch.cat([rows / N, rows[:3] / 3]), rtol=1e-9, atol=1e-12)


UNKNOWN = {
    "a function of the loss": lambda net, x, t, y, p: F.mse_loss(net(x), t).sqrt(),
    "the greatest of losses": lambda net, x, t, y, p: torch.stack([mse(net(x), t, y), mse(net(x), t, y)]).max(),
    "a learned weight": lambda net, x, t, y, p: F.mse_loss(net(x), t) * p[3].sum(),
    "not a loss function": lambda net, x, t, y, p: ((net(x) - t) ** 2).mean(),
    "a regularizer, where kinds are not told apart": lambda net, x, t, y, p: F.mse_loss(net(x), t) + (p[0] ** 2).sum(),
    "added to a penalty in place": lambda net, x, t, y, p: (p[0] ** 2).sum().add_(F.mse_loss(net(x), t)),
    "in place through a view": lambda net, x, t, y, p: [s := F.mse_loss(net(x), t), s.view(1).mul_(3), s][-1],
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_none(case, name):
    net, x, t, y, params, tangents = case
    plane = jp.evaluate(lambda: UNKNOWN[name](net, x, t, y, params), params, tangents, examples=True)
    assert plane.examples is None


def test_marked_losses_with_a_penalty_inside(case):
    net, x, t, y, params, tangents = case
    loss = jp.loss()(lambda o: ((o - t) ** 2).sum() + (params[0] ** 2).sum())
    plane = jp.evaluate(lambda: loss(net(x)), params, tangents, "ggn", examples=True)
    share = jp.evaluate(lambda: (params[0] ** 2).sum(), params, tangents).slope / N
    torch.testing.assert_close(plane.examples, one_by_one(case, mse) + share, rtol=1e-9, atol=1e-12)


def test_nothing_is_kept_unless_asked_for(case):
    net, x, t, y, params, tangents = case
    assert jp.evaluate(lambda: F.mse_loss(net(x), t), params, tangents).examples is None


def test_residuals_of_a_differential_equation(case):
    net, x, t, y, params, tangents = case

    def residual(x, t):
        value = jp.jet(lambda z: net(z), x, torch.ones(1, *x.shape).double(), pairs="diagonal")[2]
        return F.mse_loss(value[0], t, reduction="sum")

    plane = jp.evaluate(lambda: residual(x, t), params, tangents, "ggn", examples=True)
    rows = [
        jp.evaluate(lambda n=n: residual(x[n : n + 1], t[n : n + 1]), params, tangents, "ggn").slope for n in range(N)
    ]
    torch.testing.assert_close(plane.examples, torch.stack(rows), rtol=1e-9, atol=1e-12)


def test_sure_predictions_lose_no_digits():
    """Where the loss is next to nothing, slopes are sums of small numbers and not differences of large ones."""
    torch.manual_seed(0)
    labels = torch.randint(10, (200,))
    logits = 12 * F.one_hot(labels, 10) + torch.randn(200, 10)
    tangents = torch.eye(10).unsqueeze(1).expand(10, 200, 10).contiguous()

    def plane(dtype):
        w = logits.to(dtype)
        return jp.evaluate(lambda: F.cross_entropy(w, labels), [w], [tangents.to(dtype)], "ggn", examples=True)

    single, double = plane(torch.float32), plane(torch.float64)
    assert single.examples is not None
    torch.testing.assert_close(single.slope.double(), double.slope, rtol=1e-3, atol=2e-8)


@pytest.mark.parametrize("seed", range(3))
def test_a_direction_without_effect_leaves_the_examples_of_others(seed):
    """Equal changes of all logits cancel within each example, and what is left of them is rounding alone."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    x, y = 3 * torch.randn(256, 8), torch.randint(2, (256,))
    params = list(net.parameters())
    directions = [torch.stack([torch.randn_like(p), torch.zeros_like(p)]) for p in params]
    directions[-1][1] = 1
    found = jp.evaluate(lambda: F.cross_entropy(net(x), y), params, directions, "none", examples=True)
    assert found.examples is not None
    torch.testing.assert_close(found.examples.sum(0), found.slope)
    alone = jp.evaluate(lambda: F.cross_entropy(net(x[:1]), y[:1]), params, directions, "none").slope / 256
    torch.testing.assert_close(found.examples[0], alone, atol=1e-7, rtol=1e-4)
