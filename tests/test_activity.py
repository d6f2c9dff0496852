"""Activity perturbation: unbiased for every kind of layer, exact where every output is moved, and without traces."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.errors import JetplaneWarning
from jetplane.gradients import OTHERS, Feedback, LayerPlan, allocate, estimate
from jetplane.gradients.feedback import FeedbackSpec, FeedbackState

N = 6


class Tokens(nn.Module):
    """Embedding, normalization, attention by hand, and a head, over sequences."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4, eps=1.0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.tensor([0.9]))

    def forward(self, x):
        h = self.norm(self.embed(x))
        h = h + torch.softmax(h @ h.mT, -1) @ self.mix(h)
        return (self.scale * self.head(h)).flatten(0, 1)


class Recurrent(nn.Module):
    """One layer that is called at every step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(5, 3)
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            h = self.cell(torch.cat([step, h], 1)).tanh()
        return self.out(h)


def images(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)), (5,)),
    "convolutions": (lambda: images(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 2, groups=1),
                                    nn.Tanh()), (2, 7, 7)),
    "convolutions, groups and padding": (lambda: images(nn.Conv2d(2, 4, 3, groups=2, padding="same",
                                         padding_mode="circular", dilation=2), nn.Tanh()), (2, 5, 5)),
    "convolutions in one dimension": (lambda: images(nn.Conv1d(2, 2, 3, padding=2, dilation=2, stride=2), nn.Tanh(),
                                      nn.Conv1d(2, 3, 2, groups=1)), (2, 12)),
    "convolution and pooling": (lambda: images(nn.Conv2d(2, 8, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)), (2, 6, 6)),
    "tokens": (Tokens, None),
    "recurrent": (Recurrent, (3, 2)),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(3)
    make, shape = MODELS[request.param]
    net = make().double()
    x = torch.randint(5, (N, 3)) if shape is None else torch.randn(N, *shape).double()
    y = torch.randint(4, (N * 3 if shape is None else N,))
    net(x)
    return net, lambda: F.cross_entropy(net(x), y)


def gradient(closure, params):
    return torch.cat([g.flatten() for g in torch.autograd.grad(closure(), params)])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def estimated(*args, **kwargs):
    return flat(estimate(*args, **kwargs).gradient)


def test_is_unbiased(case):
    net, closure = case
    params = list(net.parameters())
    plans = allocate(closure, net, params, 40, per_position=False)
    estimates = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(60)])
    error = (estimates.mean(0) - gradient(closure, params)).abs()
    deviation = estimates.std(0) / math.sqrt(len(estimates))
    assert bool((error <= 5 * deviation + 1e-9).all())
    # and not only for being noisy: all of it together points where the gradient does
    assert F.cosine_similarity(estimates.mean(0), gradient(closure, params), dim=0) > 0.9


def test_is_exact_where_each_output_is_moved(case):
    net, closure = case
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    params = list(last.parameters())
    plans = allocate(closure, net, params, 1000)
    assert [s.mode for s in plans.values()] == ["basis"]
    torch.testing.assert_close(estimated(closure, net, params, plans, 0), gradient(closure, params))


def test_late_layers_get_more_samples_and_the_budget_is_kept():
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(1024, 1024), nn.Tanh())], nn.Linear(1024, 3))
    x, y = torch.randn(256, 1024), torch.randint(3, (256,))
    plans = allocate(lambda: F.cross_entropy(net(x), y), net, list(net.parameters()), 20)
    samples = [plans[name].samples for name in ("0", "2", "4", "6")]
    assert samples == sorted(samples) and samples[-1] >= 2 * samples[0]
    assert plans["8"] == LayerPlan("basis", 3)
    assert OTHERS not in plans


def test_chunks_bound_what_a_pass_carries():
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    params = list(net.parameters())
    whole = allocate(lambda: F.cross_entropy(net(x), y), net, params, 50)
    parts = allocate(lambda: F.cross_entropy(net(x), y), net, params, 50, chunk=2)
    for name, plan in parts.items():
        assert replace(plan, passes=1) == whole[name]
    carried = {name: -(-plan.samples // plan.passes) for name, plan in parts.items()}
    assert carried["0"] <= 2 and carried["2"] <= 2 * 8 and parts["0"].passes > 1
    estimates = [
        estimate(lambda: F.cross_entropy(net(x), y), net, params, plans, 0).gradient for plans in (whole, parts)
    ]
    for a, b in zip(*estimates, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_layers_count_in_what_noise_costs():
    layer, tail = nn.Linear(8, 64), [nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Linear(1024, 3)]
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    plans = {}
    for net in (nn.Sequential(layer), nn.Sequential(layer, *tail)):
        found = allocate(lambda net=net: F.cross_entropy(net(x), y), net, list(layer.parameters()), 8)
        assert set(found) == {"0"}
        plans[len(net)] = found["0"].samples
    assert plans[1] == 64  # next to nothing, so all of its outputs
    assert 2 <= plans[5] <= 8


def test_the_number_of_passes_changes_no_number(case):
    net, closure = case
    params = list(net.parameters())
    plans = allocate(closure, net, params, 60)
    parted = {name: replace(s, passes=min(3, s.samples)) for name, s in plans.items()}
    a, b = (estimated(closure, net, params, s, 1) for s in (plans, parted))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(s.passes > 1 for s in parted.values())


def test_shards_have_the_noise_of_the_whole_batch():
    torch.manual_seed(3)
    net = images(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Tanh()).double()
    x, y = torch.randn(9, 2, 6, 6).double(), torch.randint(4, (9,))
    net(x)
    params = list(net.parameters())

    def loss(part):
        return lambda: F.cross_entropy(net(x[part]), y[part])

    parts = [(slice(0, 2), 2, 0), (slice(2, 9), 7, 2)]
    plans = allocate(loss(slice(0, 9)), net, params, 30)
    assert {plan.mode for plan in plans.values()} == {"weights", "outputs", "basis"}
    assert all(allocate(loss(part), net, params, 30, whole=9 / n) == plans for part, n, _ in parts)
    for mode in ("weights", "outputs"):
        plans = {name: s if s.mode == "basis" else replace(s, mode=mode) for name, s in plans.items()}
        whole = estimated(loss(slice(0, 9)), net, params, plans, 1)
        found = [n / 9 * estimated(loss(part), net, params, plans, 1, at / n) for part, n, at in parts]
        torch.testing.assert_close(found[0] + found[1], whole, rtol=1e-11, atol=1e-13)


def test_a_loss_that_does_not_tell_its_examples_apart():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = torch.randn(2, 3).double(), torch.randn(2, 2).double()
    closure = lambda: F.mse_loss(net(x), y).sqrt()  # noqa: E731
    params = list(net.parameters())
    plans = {"0": LayerPlan("outputs", 64), "2": LayerPlan("outputs", 64)}
    estimates = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(100)])
    torch.testing.assert_close(estimates.mean(0), gradient(closure, params), rtol=0.05, atol=0.02)


def test_a_loss_that_differentiates_the_model_itself():
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(5, 2).double()
    closure = lambda: F.mse_loss(jp.jet(net, x, torch.ones(1, 5, 2).double())[2], torch.ones(1, 1, 5, 1))  # noqa: E731
    params = list(net.parameters())
    plans = allocate(closure, net, params, 10)
    assert set(plans) == {OTHERS}
    estimates = [estimated(closure, net, params, {OTHERS: LayerPlan("parameters", 2000)}, seed) for seed in range(30)]
    assert F.cosine_similarity(torch.stack(estimates).mean(0), _gradient_by_basis(closure, params), dim=0) > 0.99


def _gradient_by_basis(closure, params):
    size = sum(p.numel() for p in params)
    basis = torch.eye(size).double().split([p.numel() for p in params], 1)
    return jp.evaluate(closure, params, [b.reshape(size, *p.shape) for b, p in zip(basis, params, strict=True)]).slope


def test_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    params = list(net.parameters())
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    before, random = [t.clone() for t in net.state_dict().values()], torch.get_rng_state()
    a, b = (estimate(closure, net, params, allocate(closure, net, params, 9), 0).gradient for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(before, net.state_dict().values(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))  # dropout drew the same masks
    assert all(not m._forward_hooks for m in net.modules())


def test_a_layer_that_the_loss_does_not_use_gets_zero():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "spare": nn.Linear(3, 2), "cut": nn.Linear(3, 2)})
    x, y = torch.randn(4, 3), torch.randint(2, (4,))

    def closure():
        net["cut"](x)
        return F.cross_entropy(net["used"](x), y)

    params = list(net.parameters())
    plans = allocate(closure, net, params, 10)
    found = estimate(closure, net, params, plans, 0).gradient
    assert all(bool(found[i].any()) == (i < 2) for i in range(6))


def test_a_layer_before_a_normalization_over_the_batch_is_found():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    x, y = torch.randn(64, 5).double(), torch.randint(4, (64,))
    closure, weight = lambda: F.cross_entropy(net(x), y), net[0].weight
    plans = allocate(closure, net, [weight, *net[3].parameters()], 40)
    found = torch.stack([estimate(closure, net, [weight], plans, seed).gradient[0] for seed in range(30)]).mean(0)
    (truth,) = torch.autograd.grad(closure(), [weight])
    assert F.cosine_similarity(found.flatten(), truth.flatten(), dim=0) > 0.6  # what examples do to others is left out
    net.eval()
    assert allocate(closure, net, [weight, *net[3].parameters()], 40)["0"].mode == "basis"


def by_position():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 3)).double()
    x, y = torch.randint(6, (5, 16)), torch.randint(3, (80,))
    return net, lambda: F.cross_entropy(net(x).flatten(0, 1), y)


def test_positions_that_nothing_mixes_judge_their_own_noise():
    net, closure = by_position()
    params = list(net.parameters())
    spread = {}
    for per_position in (False, True):
        plans = allocate(closure, net, params, 10, per_position=per_position) | {
            "1": LayerPlan("outputs", 2, per_position=per_position)
        }
        found = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(80)])
        error = (found.mean(0) - gradient(closure, params)).norm()
        spread[per_position] = found.var(0).sum().sqrt()
        assert error < 1.3 * spread[per_position] / math.sqrt(80)
    assert spread[True] < spread[False] / 3  # a fourth, for 16 positions


def test_positions_that_are_mixed_are_a_choice():
    torch.manual_seed(3)
    net = Tokens().double()
    x, y = torch.randint(5, (N, 3)), torch.randint(4, (N * 3,))
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    params = list(net.parameters())
    for per_position in (False, True):
        plans = allocate(closure, net, params, 10, per_position=per_position)
        assert {n for n, s in plans.items() if s.per_position} == (
            {"embed", "norm", "mix", "head"} if per_position else set()
        )


# --- outputs without effect ------------------------------------------------------------------------------


class Residual(nn.Module):
    """Half of what the first layer puts out goes past the second one."""

    def __init__(self, past: bool):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 80), nn.Linear(80, 80), nn.Linear(80, 4)
        self.past = past

    def forward(self, x):
        h = self.first(x)
        y = self.second(h.relu())
        return self.last((y + h if self.past else y).relu())


def test_noise_without_effect_is_left_out():
    torch.manual_seed(0)
    net = images(nn.Conv2d(2, 8, 5), nn.ReLU(), nn.MaxPool2d(2)).double()
    x, y = torch.randn(9, 2, 6, 6).double(), torch.randint(4, (9,))
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    closure()
    params = list(net.parameters())
    plans = allocate(closure, net, params, 4)
    last = list(plans)[-1]
    assert (plans["0"].mode, plans["0"].successor, plans[last].successor) == ("outputs", last, None)
    truth, error = gradient(closure, params), {}
    for name, used in (("left out", plans), ("all", {n: replace(s, successor=None) for n, s in plans.items()})):
        found = [estimated(closure, net, params, used, seed) - truth for seed in range(30)]
        error[name] = torch.stack(found).square().sum()
    assert error["left out"] < 0.35 * error["all"]  # of four of a window one counts at most


def test_only_layers_all_of_whose_effect_is_seen():
    x, y = torch.randn(30, 5), torch.randint(4, (30,))
    for past in (False, True):
        net = Residual(past)
        plans = allocate(lambda net=net: F.cross_entropy(net(x), y), net, list(net.parameters()), 1)
        assert [plans[name].successor for name in ("first", "second")] == [None if past else "second", "last"]


def test_a_model_that_changes_its_ways_is_met_with_all_of_the_noise():
    torch.manual_seed(2)
    net = Residual(False).double()
    x, y = torch.randn(8, 5).double(), torch.randint(4, (8,))
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    params = list(net.parameters())
    plans = allocate(closure, net, params, 1)
    net.past = True
    same = {n: replace(s, successor=None) for n, s in plans.items()}
    a, b = (estimated(closure, net, params, s, 5) for s in (plans, same))
    assert plans["first"].successor == "second"
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_last_layer_is_moved_along_each_output_if_that_costs_no_more_than_the_passes():
    net = nn.Sequential(nn.Linear(512, 2048), nn.Tanh(), nn.Linear(2048, 100))
    x, y = torch.randn(64, 512), torch.randint(100, (64,))
    modes = {}
    for passes in (0.5, 8):
        found = allocate(lambda: F.cross_entropy(net(x), y), net, list(net.parameters()), passes)
        modes[passes] = [plan.mode for plan in found.values()]
        assert (found["0"].feedback is not None) == (passes == 8)
    assert modes == {0.5: ["outputs", "outputs"], 8: ["outputs", "basis"]}


class TestMicroBatches:
    """Closures that run over parts of a batch one after another: each part's noise is judged by its own examples."""

    @staticmethod
    def network():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        return net, torch.randn(9, 5).double(), torch.randint(3, (9,))

    @staticmethod
    def side_by_side(net, x, y, size):
        pairs = list(zip(x.split(size), y.split(size), strict=True))
        return lambda: torch.cat([F.cross_entropy(net(a), b, reduction="none") for a, b in pairs]).mean()

    @staticmethod
    def added_up(net, x, y, size):
        pairs = list(zip(x.split(size), y.split(size), strict=True))
        return lambda: sum(F.cross_entropy(net(a), b) * (len(a) / len(x)) for a, b in pairs)

    @pytest.mark.parametrize("kind", ["side_by_side", "added_up"])
    @pytest.mark.parametrize("size", [9, 3, 4, 2])
    def test_plans_are_those_of_the_whole_batch(self, kind, size):
        net, x, y = self.network()
        params = list(net.parameters())
        whole = allocate(lambda: F.cross_entropy(net(x), y), net, params, 40)
        found = allocate(getattr(self, kind)(net, x, y, size), net, params, 40)
        calls = math.ceil(9 / size)
        assert {plan.calls for plan in found.values()} == {calls}
        assert {n: p.mode for n, p in found.items()} == {n: p.mode for n, p in whole.items()}

    @pytest.mark.parametrize("kind", ["side_by_side", "added_up"])
    @pytest.mark.parametrize("size", [3, 4, 2])
    def test_gradients_along_each_output_are_exact(self, kind, size):
        net, x, y = self.network()
        params = list(net.parameters())
        closure = getattr(self, kind)(net, x, y, size)
        plans = {n: LayerPlan("basis", k, calls=math.ceil(9 / size)) for n, k in (("0", 12), ("2", 6), ("4", 3))}
        torch.testing.assert_close(estimated(closure, net, params, plans, 0), gradient(closure, params))

    @pytest.mark.parametrize("kind", ["side_by_side", "added_up"])
    def test_noise_is_as_small_as_that_of_the_whole_batch(self, kind):
        net, x, y = self.network()
        params = list(net.parameters())
        errors = []
        for closure, calls in ((lambda: F.cross_entropy(net(x), y), 1), (getattr(self, kind)(net, x, y, 3), 3)):
            plans = {n: LayerPlan("outputs", 16, calls=calls) for n in ("0", "2", "4")}
            found = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(40)])
            exact = gradient(closure, params)
            assert (found.mean(0) - exact).norm() < 1.4 * found.var(0).sum().sqrt() / math.sqrt(40)
            errors.append((found - exact).square().sum(1).mean())
        assert 0.8 < errors[1] / errors[0] < 1.25

    @pytest.mark.parametrize("kind", ["side_by_side", "added_up"])
    def test_feedback_learns_what_it_learns_of_the_whole_batch(self, kind):
        net, x, y = self.network()
        params = list(net.parameters())
        learned = []
        for closure, calls in ((lambda: F.cross_entropy(net(x), y), 1), (getattr(self, kind)(net, x, y, 3), 3)):
            plans = {"0": LayerPlan("outputs", 8, calls=calls), "2": LayerPlan("outputs", 8, calls=calls)}
            plans |= {"4": LayerPlan("basis", 3, calls=calls)}
            specs, state = {"0": FeedbackSpec(12, 3, 0.3)}, FeedbackState()
            for seed in range(150):
                feedback = Feedback(specs, state, params[0])
                state = feedback.update(estimate(closure, net, params, plans, seed, feedback=feedback).statistics)
            learned.append(state)
        torch.testing.assert_close(learned[0].second_moments, learned[1].second_moments)
        above = [state.maps["0"][0].flatten() for state in learned]
        assert F.cosine_similarity(*above, dim=0) > 0.9

    def test_feedback_is_planned(self):
        net = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 3)).double()
        x, y = torch.randn(8, 50).double(), torch.randint(3, (8,))
        params = list(net.parameters())
        plans = [allocate(self.added_up(net, x, y, size), net, params, 4) for size in (8, 2)]
        assert plans[0]["0"].feedback is not None
        assert plans[1]["0"].feedback is not None and plans[1]["4"].mode == "basis"

    def test_fewer_or_more_parts_than_planned_stay_unbiased(self):
        net, x, y = self.network()
        params = list(net.parameters())
        plans = {n: LayerPlan("outputs", 32, calls=3) for n in ("0", "2", "4")}
        for size in (9, 5, 2):
            closure = self.side_by_side(net, x, y, size)
            found = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(60)])
            error = (found.mean(0) - gradient(closure, params)).norm()
            assert error < 1.4 * found.var(0).sum().sqrt() / math.sqrt(60)

    @pytest.mark.parametrize("wide", [False, True])
    @pytest.mark.parametrize("form", ["halves", "strided", "each", "uneven", "permuted", "compared"])
    def test_a_trunk_that_runs_once_is_judged_by_its_own_examples(self, form, wide):
        """The losses of parts are added up, part by part where these are equally long, or reordered."""
        torch.manual_seed(5)
        trunk = nn.Sequential(nn.Linear(5, 40 if wide else 7), nn.Tanh(), nn.Linear(40 if wide else 7, 6), nn.Tanh())
        net = nn.ModuleList([trunk, nn.Linear(6, 4)]).double()
        x, y = torch.randn(12, 5).double(), torch.randint(4, (12,))
        parts = {
            "halves": [slice(0, 6), slice(6, 12)],
            "strided": [slice(i, None, 4) for i in range(4)],
            "each": [slice(i, i + 1) for i in range(12)],
            "uneven": [slice(0, 2), slice(2, 12)],
            "permuted": [torch.randperm(12)],
            "compared": [slice(0, 12)],
        }

        def closure():
            h = net[0](x)
            h = h - h.mean(0) if form == "compared" else h
            return sum(F.cross_entropy(net[1](h[part]), y[: len(h[part])]) for part in parts[form])

        params = list(net.parameters())
        plans = allocate(closure, net, params, 20)
        found = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(30)])
        error = (found.mean(0) - gradient(closure, params)).norm()
        assert error < 1.5 * found.var(0).sum().sqrt() / math.sqrt(30) + 1e-9

    def test_parts_of_another_number_than_planned_are_not_guessed(self):
        """Planned for one part of the batch, a closure may be called with two: nobody knows whose their sums are."""
        net, x, y = self.network()
        params, x, y = list(net.parameters()), x[:8], y[:8]

        def closure(n):
            h = net[:4](x[:n])
            return sum(F.cross_entropy(net[4](a), b) for a, b in zip(h.split(4), y[:n].split(4), strict=True))

        assert {plan.order for plan in allocate(lambda: closure(4), net, params, 2).values()} == {"own"}
        plans = {"0": LayerPlan("outputs", 16), "2": LayerPlan("basis", 6), "4": LayerPlan("outputs", 16)}
        with pytest.warns(JetplaneWarning, match="stay without an estimate"):
            found = torch.stack([estimated(lambda: closure(8), net, params, plans, seed) for seed in range(80)])
        exact, moves = gradient(lambda: closure(8), params), found.var(0) > 0
        error = (found.mean(0) - exact)[moves].norm()
        assert moves.any() and not bool(found[:, ~moves].any())
        assert error < 1.5 * found.var(0).sum().sqrt() / math.sqrt(80)

    @pytest.mark.parametrize("first", [nn.BatchNorm1d(7), nn.Identity()])
    def test_normalized_rows_keep_parts_of_their_own(self, first):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 7), first, nn.Tanh(), nn.Linear(7, 3)).double()
        x, y = torch.randn(32, 5).double(), torch.randint(3, (32,))
        plans = allocate(lambda: F.cross_entropy(net(x), y), net, list(net.parameters()), 3)
        assert [plan.order for plan in plans.values()][0] == "own"

    def test_a_layer_that_reads_its_own_output_is_one(self):
        net = Recurrent().double()
        x, y = torch.randn(N, 4, 2).double(), torch.randint(4, (N,))
        plans = allocate(lambda: F.cross_entropy(net(x), y), net, list(net.parameters()), 20)
        assert plans["cell"].calls == 1


@pytest.mark.parametrize(
    "reduced",
    [
        lambda e: e.mean(), lambda e: e.sum() / 7, lambda e: (2 * e).mean(), lambda e: (e * torch.ones(6)).sum(),
        lambda e: torch.cat([e, 3 * e]).mean(), lambda e: -(-e).sum(), lambda e: e.square().mean(),
    ],
)  # fmt: skip
def test_losses_that_are_not_reduced_tell_their_examples(reduced):
    net, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    closure = lambda: reduced(F.cross_entropy(net(x), y, reduction="none"))  # noqa: E731
    params = list(net.parameters())
    model = nn.Sequential(net)
    plans = allocate(closure, model, params, 20)
    found = estimated(closure, model, params, plans, 0)
    assert plans["0"].mode == "basis"
    torch.testing.assert_close(found, gradient(closure, params))


@pytest.mark.parametrize("reduced", [lambda e: e.max(), lambda e: e[:3].sum() + e[3:].sum(), lambda e: e.std()])
def test_no_exact_gradient_is_claimed_where_a_loss_mixes_its_examples(reduced):
    net, x, y = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    closure = lambda: reduced(F.cross_entropy(net(x), y, reduction="none"))  # noqa: E731
    params = list(net.parameters())
    plans = allocate(closure, net, params, 40)
    assert plans["0"].mode == "outputs"
    found = torch.stack([estimated(closure, net, params, plans, seed) for seed in range(80)])
    error = (found.mean(0) - gradient(closure, params)).norm()
    assert error < 1.5 * found.var(0).sum().sqrt() / math.sqrt(80)


def test_a_loss_without_examples_gives_no_direction_where_exact_ones_were_planned():
    net, x, y = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    with pytest.warns(JetplaneWarning, match="1 parts for 6 rows of layer '0'.*stay without an estimate"):
        found = estimated(
            lambda: F.mse_loss(net(x), y).sqrt(), net, list(net.parameters()), {"0": LayerPlan("basis", 3)}, 0
        )
    assert not found.any()
