"""Local heads: closed-form gradients of each layer's own loss, fast weights, and planes in every n-th step."""

import copy
import dataclasses
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.gradients import ActivityPerturbation, Batch, LocalHeads, local_losses
from jetplane.gradients.tape import Tape
from jetplane.subspace.sources import Averages, Context, FastWeights, PreviousStep, Result, Subspace

DOUBLE = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), **DOUBLE)


# --- the losses' gradients ------------------------------------------------------------------------------------


def _cross_entropy(shape, **settings):
    generator = seeded(len(shape))
    z = torch.randn(shape, generator=generator, **DOUBLE)
    classes = shape[0 if len(shape) == 1 else 1]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return z, torch.randint(classes, rows, generator=generator), settings


WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.7], **DOUBLE)
LOSSES = {
    "cross entropy": (F.cross_entropy, *_cross_entropy((7, 4))),
    "of one example": (F.cross_entropy, *_cross_entropy((4,))),
    "at positions": (F.cross_entropy, *_cross_entropy((3, 4, 2, 5))),
    "weighted": (F.cross_entropy, *_cross_entropy((7, 4), weight=WEIGHT)),
    "smoothed": (F.cross_entropy, *_cross_entropy((7, 4), label_smoothing=0.2)),
    "weighted and smoothed": (F.cross_entropy, *_cross_entropy((7, 4), weight=WEIGHT, label_smoothing=0.2)),
    "summed": (F.cross_entropy, *_cross_entropy((7, 4), reduction="sum")),
    "rows left out": (F.cross_entropy, *_cross_entropy((7, 4), ignore_index=1)),
    "probabilities": (
        F.cross_entropy, normal(6, 4, 3, seed=0),
        torch.rand(6, 4, 3, generator=seeded(1), **DOUBLE), {"weight": WEIGHT, "label_smoothing": 0.1},
    ),
    "squared error": (
        F.mse_loss, normal(5, 3, seed=0), normal(5, 3, seed=1), {}
    ),
    "sum of squares": (
        F.mse_loss, normal(5, 2, 3, seed=0), normal(5, 2, 3, seed=1),
        {"reduction": "sum"},
    ),
    "of a vector": (
        F.mse_loss, normal(5, seed=0), normal(5, seed=1), {}
    ),
    "weighted squares": (
        F.mse_loss, normal(5, 3, seed=0), normal(5, 3, seed=1),
        {"weight": torch.rand(5, 3, generator=seeded(2), **DOUBLE)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_loss_functions_are_those_of_reverse_mode(name):
    function, z, target, settings = LOSSES[name]
    z = z.clone().requires_grad_()
    value = function(z, target, **settings)
    weight = torch.rand(value.shape, generator=seeded(9), **DOUBLE)
    (exact,) = torch.autograd.grad(value, z, weight)
    found = local_losses.met(function, (z.detach(), target), settings)
    found = dataclasses.replace(found, weight=weight)
    assert found.rows * found.width == z.numel()
    rows = z.detach() if found.axis is None else z.detach().movedim(found.axis, -1)
    gradient = found.gradient(rows.reshape(found.rows, found.width))
    torch.testing.assert_close(found.shaped(gradient), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("function", "link", "target"),
    [
        (F.nll_loss, lambda z: z.log_softmax(-1), torch.tensor([1, 0, 2])),
        (F.binary_cross_entropy, torch.sigmoid, torch.eye(3, **DOUBLE)),
        (F.kl_div, lambda z: z.log_softmax(-1), torch.eye(3, **DOUBLE)),
    ],
)
def test_heads_put_out_numbers_that_become_what_the_loss_takes(function, link, target):
    z = normal(3, 3).requires_grad_()
    exact = torch.autograd.grad(function(link(z), target, reduction="sum"), z)[0]
    found = local_losses.met(function, (link(z).detach(), target), {"reduction": "sum"})
    torch.testing.assert_close(found.gradient(z.detach()), exact, rtol=1e-12, atol=1e-14)


def test_other_losses_are_not_met():
    assert local_losses.met(F.triplet_margin_loss, (torch.ones(2, 2),) * 3, {}) is None


# --- the layers' gradients ------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """An embedding, layers at each position, a mean over them where one output is wanted for each example."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled
        self.table, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = F.gelu(self.hidden(self.norm(self.table(x))), approximate="tanh")
        return self.out(h.mean(1) if self.pooled else h)


IMAGES = normal(6, 2, 9, 9, seed=0)
ROWS = normal(6, 4, seed=1)
CODES = torch.randint(9, (6, 5), generator=seeded(2))
LABELS = torch.randint(3, (6,), generator=seeded(3))
NEXT = torch.randint(3, (6, 5), generator=seeded(4))

# A model, its loss, and what the head of each layer but the last reads of it, as the model computes it.
CASES = {
    "relu": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda m: F.cross_entropy(m(ROWS), LABELS),
        lambda m: {"0": lambda y: y.relu(), "2": lambda y: y.tanh()},
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 3)),
        lambda m: F.cross_entropy(m(ROWS), LABELS),
        lambda m: {"0": lambda y: y.relu(), "2": F.silu},
    ),
    "regression": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.Sigmoid(), nn.Linear(7, 2)),
        lambda m: F.mse_loss(m(ROWS), ROWS[:, :2]),
        lambda m: {"0": lambda y: y.sigmoid()},
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(3, 4, 2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(100, 3),
        ),
        lambda m: F.cross_entropy(m(IMAGES), LABELS),
        lambda m: {"0": lambda y: F.max_pool2d(y.relu(), 2, ceil_mode=True).flatten(1),
            "3": lambda y: F.gelu(y).flatten(1),
        },
    ),
    "next token": (
        lambda: Tokens(pooled=False),
        lambda m: F.cross_entropy(m(CODES).flatten(0, 1), NEXT.flatten()),
        lambda m: {
            "table": lambda y: m.norm(y).flatten(0, 1),
            "hidden": lambda y: F.gelu(y, approximate="tanh").flatten(0, 1),
        },
    ),
    "next token, classes first": (
        lambda: Tokens(pooled=False),
        lambda m: F.cross_entropy(m(CODES).movedim(-1, 1), NEXT, reduction="sum"),
        lambda m: {
            "table": lambda y: m.norm(y).flatten(0, 1),
            "hidden": lambda y: F.gelu(y, approximate="tanh").flatten(0, 1),
        },
    ),
    "a class for a sequence": (
        lambda: Tokens(pooled=True),
        lambda m: F.cross_entropy(m(CODES), LABELS),
        lambda m: {
            "table": lambda y: m.norm(y).mean(1),
            "hidden": lambda y: F.gelu(y, approximate="tanh").mean(1),
        },
    ),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    make, loss, reads = CASES[name]
    model = make().double()
    return model, (lambda: loss(model)), reads(model)


def batch(closure, model):
    params = list(model.parameters())
    return Batch(closure, params, model, None, None, [], frozenset(range(len(params))), seed=0)


def with_random_heads(estimator, given):
    """The state after preparation, with heads that have learned something."""
    state = estimator.prepare(given, {})
    generator = seeded(7)
    for head in state["heads"].values():
        head["weight"] = torch.randn(head["weight"].shape, generator=generator, **DOUBLE)
    return state


def expected(model, closure, reads, heads):
    """By reverse mode that is cut between layers: gradients by the parameters' names, and those of the heads."""
    seen, layers = {}, dict(model.named_modules())
    handles = [
        layers[name].register_forward_hook(lambda m, args, y, name=name: seen.update({name: args[0].clone()}))
        for name in reads
    ]
    with torch.no_grad():
        closure()
    for handle in handles:
        handle.remove()
    found = []

    class Catch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func in (F.cross_entropy, F.mse_loss):
                found.append((func, args, kwargs))
            return func(*args, **kwargs)

    with Catch():
        closure()
    ((function, (output, target), settings),) = found
    weights = {name: w.clone().requires_grad_() for name, w in heads.items()}
    total = torch.zeros((), **DOUBLE)
    for name, read in reads.items():
        features = read(layers[name](seen[name].detach()))
        z = features @ weights[name][:, :-1].mT + weights[name][:, -1]
        if output.dim() > 2:  # classes first
            z = z.reshape(output.movedim(1, -1).shape).movedim(-1, 1)
        total = total + function(z, target, **settings)
    own = torch.autograd.grad(total, list(weights.values()), retain_graph=True)
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True), dict(zip(weights, own, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_the_gradient_of_its_own_loss(name, recompute):
    model, closure, reads = made(name)
    given, estimator = batch(closure, model), LocalHeads(recompute=recompute)
    state = with_random_heads(estimator, given)
    heads = {n: head["weight"] for n, head in state["heads"].items()}
    assert list(heads) == list(reads)
    with torch.no_grad():
        *gradient, value = estimator.measure(given, state)
    assert [t.shape for t in (*gradient, value)] == list(estimator.shapes(given, state))
    wanted, own = expected(model, closure, reads, heads)
    exact = torch.autograd.grad(closure(), list(model.parameters()))
    count = len(exact)
    for found, local, whole in zip(gradient[:count], wanted, exact, strict=True):
        torch.testing.assert_close(found, whole if local is None else local, rtol=1e-10, atol=1e-12)
    for found, name_of in zip(gradient[count:], heads, strict=True):
        torch.testing.assert_close(found, own[name_of], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(value, closure().detach())


def test_a_layer_with_many_features_is_read_by_channels_means(monkeypatch):
    monkeypatch.setattr("jetplane.gradients.heads.MOST", 20)
    model, closure, reads = made("convolutions")
    reads |= {
        "0": lambda y: F.max_pool2d(y.relu(), 2, ceil_mode=True).mean((2, 3)), "3": lambda y: F.gelu(y).mean((2, 3))
    }  # fmt: skip
    given, estimator = batch(closure, model), LocalHeads()
    state = with_random_heads(estimator, given)
    wanted, _ = expected(model, closure, reads, {n: h["weight"] for n, h in state["heads"].items()})
    with torch.no_grad():
        found = estimator.measure(given, state)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-12)


def test_a_layer_that_is_called_twice_adds_up_its_calls():
    torch.manual_seed(0)
    layer, last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    model = nn.ModuleList([layer, last])
    closure = lambda: F.cross_entropy(last(layer(layer(ROWS).relu()).relu()), LABELS)  # noqa: E731
    given, estimator = batch(closure, model), LocalHeads()
    state = with_random_heads(estimator, given)
    head = state["heads"]["0"]["weight"]
    x = layer(ROWS).relu().detach()
    both = sum(F.cross_entropy(layer(v).relu() @ head[:, :-1].mT + head[:, -1], LABELS) for v in (ROWS, x))
    with torch.no_grad():
        found = estimator.measure(given, state)
    torch.testing.assert_close(found[0], torch.autograd.grad(both, layer.weight)[0], rtol=1e-10, atol=1e-12)


def test_heads_learn_by_adams_steps():
    model, closure, _ = made("regression")
    given, estimator = batch(closure, model), LocalHeads(rate=0.02)
    state = with_random_heads(estimator, given)
    head = nn.Parameter(state["heads"]["0"]["weight"].clone())
    adam = torch.optim.Adam([head], lr=0.02)
    features = model[:2](ROWS).detach()
    for _ in range(5):
        with torch.no_grad():
            state = estimator.estimate(given, estimator.measure(given, state), state).state
        adam.zero_grad()
        F.mse_loss(features @ head[:, :-1].mT + head[:, -1], ROWS[:, :2]).backward()
        adam.step()
    torch.testing.assert_close(state["heads"]["0"]["weight"], head.detach(), rtol=1e-9, atol=1e-9)


def test_heads_begin_as_linear_layers_do():
    model, closure, _ = made("relu")
    given = batch(closure, model)
    first, again = (LocalHeads().prepare(given, {})["heads"]["0"]["weight"] for _ in range(2))
    assert torch.equal(first, again) and first.shape == (3, 8)
    assert 0 < first.abs().max() <= 7**-0.5 and first.unique().numel() == 24


class Inner(nn.Module):
    """A layer in the middle whose output has no part for each example."""

    def __init__(self):
        super().__init__()
        self.mean, self.out = nn.Linear(4, 5), nn.Linear(9, 3)

    def forward(self, x):
        h = self.mean(x.mean(0, keepdim=True)).relu()
        return self.out(torch.cat([x, h.detach().expand(len(x), 5)], 1))


def test_what_has_no_head_is_said():
    model = Inner().double()
    with pytest.warns(jp.JetplaneWarning, match=r"2 of 4 parameters, shapes \[\(5, 4\), \(5,\)\]"):
        LocalHeads().prepare(batch(lambda: F.cross_entropy(model(ROWS), LABELS), model), {})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z: F.triplet_margin_loss(z, z + 1, z - 1), "calls triplet_margin_loss. Take"),
        (lambda z: z.square().sum(), "calls none. Take"),
        (lambda z: F.cross_entropy(z @ z.mT, torch.arange(6)), "made of several examples"),
    ],
)
def test_closures_without_a_known_loss_are_refused(loss, message):
    model = nn.Linear(4, 3).double()
    opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=LocalHeads())
    before = model.weight.detach().clone()
    with pytest.raises(jp.ArgumentError, match=message):
        opt.step(lambda: loss(model(ROWS)))
    assert torch.equal(model.weight, before) and opt.state["jetplane"]["step"] == 0


# --- closures as people write them ----------------------------------------------------------------------------


def measured(model, closure, recompute=False):
    """Gradients by the parameters' names, and the heads."""
    given, estimator = batch(closure, model), LocalHeads(recompute=recompute)
    state = with_random_heads(estimator, given)
    with torch.no_grad():
        found = estimator.measure(given, state)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, found, strict=False)), {n: h["weight"] for n, h in state["heads"].items()}


def reverse(loss, model):
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def local(head, features):
    return features @ head[:, :-1].mT + head[:, -1]


def close(found, exact):
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


def perceptron(outputs=3, **settings):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, outputs, **settings)).double()


SIGNS = (ROWS[:, :3] > 0).double()
KEPT = torch.tensor([1.0, 0, 1, 1, 0, 2], **DOUBLE)
TAILS = {  # of the output z
    "several labels": lambda z: F.binary_cross_entropy_with_logits(z, SIGNS, pos_weight=WEIGHT[:3]),
    "probabilities": lambda z: F.binary_cross_entropy(torch.sigmoid(z), SIGNS),
    "log-probabilities": lambda z: F.nll_loss(F.log_softmax(z, 1), LABELS, ignore_index=1),
    "robust": lambda z: F.huber_loss(z, ROWS[:, :3], delta=0.5) + F.smooth_l1_loss(z, SIGNS),
    "masked": lambda z: (F.cross_entropy(z, LABELS, reduction="none") * KEPT).sum() / KEPT.sum(),
    "scaled": lambda z: -3 * F.cross_entropy(z, LABELS, weight=WEIGHT[:3], label_smoothing=0.1) / 2,
    "squashed": lambda z: F.mse_loss(torch.sigmoid(z), SIGNS),
    "beside another term": lambda z: F.cross_entropy(z, LABELS) + 0.1 * z.logsumexp(1).square().mean(),
    "one number each": lambda z: F.mse_loss(z[:, 0], ROWS[:, 0]),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", TAILS)
def test_the_last_layer_has_the_exact_gradient_whatever_is_made_of_its_output(name, recompute):
    model = perceptron()
    closure = lambda: TAILS[name](model(ROWS))  # noqa: E731
    found, heads = measured(model, closure, recompute)
    exact = reverse(closure(), model)
    close(found["2.weight"], exact["2.weight"])
    close(found["2.bias"], exact["2.bias"])
    assert heads and found["0.weight"].any()
    if name in ("several labels", "masked", "scaled", "robust"):  # the head's loss is the closure's
        (head, *more) = heads.values()
        z = local(head, model[:2](ROWS))
        loss = TAILS[name](z) if not more else F.huber_loss(z, ROWS[:, :3], delta=0.5) + F.smooth_l1_loss(
            local(more[0], model[:2](ROWS)), SIGNS
        )  # fmt: skip
        close(found["0.weight"], reverse(loss, model)["0.weight"])


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_are_added_up_and_share_heads(recompute):
    model = perceptron()
    parts = list(zip(ROWS.split(2), LABELS.split(2), strict=True))
    found, heads = measured(model, lambda: sum(F.cross_entropy(model(x), y) for x, y in parts) / 3, recompute)
    whole, same = measured(model, lambda: F.cross_entropy(model(ROWS), LABELS))
    assert list(heads) == list(same) == ["0"]
    for name, g in whole.items():
        close(found[name], g)


def test_each_of_two_losses_has_a_head_and_its_weight():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(4, 7), "a": nn.Linear(7, 3), "b": nn.Linear(7, 2)}).double()

    def closure():
        h = model["trunk"](ROWS).tanh()
        F.mse_loss(h, torch.ones_like(h))  # looked at, and no part of the loss
        return F.cross_entropy(model["a"](h), LABELS) + 0.25 * F.mse_loss(model["b"](h), ROWS[:, :2])

    found, heads = measured(model, closure)
    h = model["trunk"](ROWS).tanh()
    first, second = heads["trunk"], heads["trunk, loss 2"]
    loss = F.cross_entropy(local(first, h), LABELS) + 0.25 * F.mse_loss(local(second, h), ROWS[:, :2])
    close(found["trunk.weight"], reverse(loss, model)["trunk.weight"])
    exact = reverse(closure(), model)
    close(found["a.weight"], exact["a.weight"])
    close(found["b.weight"], exact["b.weight"])


def test_terms_of_parameters_alone_are_exact():
    model = perceptron()
    plain, _ = measured(model, lambda: F.cross_entropy(model(ROWS), LABELS))
    decayed, _ = measured(
        model, lambda: F.cross_entropy(model(ROWS), LABELS) + 0.1 * sum(p.square().sum() for p in model.parameters())
    )
    for name, p in model.named_parameters():
        close(decayed[name], plain[name] + 0.2 * p.detach())


@pytest.mark.parametrize(
    "taken",
    [
        lambda z: (z[:, :-1].reshape(-1, 3), NEXT[:, 1:].reshape(-1)),
        lambda z: (z.transpose(0, 1).reshape(-1, 3), NEXT.T.reshape(-1)),
        lambda z: (z[NEXT > 0], NEXT[NEXT > 0]),
        lambda z: (z[:, -1], NEXT[:, -1]),
        lambda z: (z[:, 1:].transpose(1, 2), NEXT[:, 1:]),
    ],
)
@pytest.mark.parametrize("flat", [False, True])  # as GPT-2 calls its layers
def test_heads_read_the_positions_that_the_loss_takes(taken, flat):
    torch.manual_seed(0)
    model = Tokens(pooled=False).double()
    codes = CODES.flatten() if flat else CODES
    found, heads = measured(model, lambda: F.cross_entropy(*taken(model(codes).reshape(6, 5, 3))))
    h = F.gelu(model.hidden(model.norm(model.table(CODES)).detach()), approximate="tanh")
    loss = F.cross_entropy(*taken(local(heads["hidden"], h)))
    close(found["hidden.weight"], reverse(loss, model)["hidden.weight"])


class Residual(nn.Module):
    """Two blocks that add to a stream."""

    def __init__(self):
        super().__init__()
        self.start, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.start(x)
        h = h + self.a(h).relu()
        return self.out(self.norm(h + self.b(h).relu()))


def test_heads_of_a_residual_model_read_the_stream():
    torch.manual_seed(0)
    model = Residual().double()
    found, heads = measured(model, lambda: F.cross_entropy(model(ROWS), LABELS))
    assert list(heads) == ["start", "a", "b"]
    h0 = model.start(ROWS)
    h1 = h0 + model.a(h0.detach()).relu()
    h2 = h1 + model.b(h1.detach()).relu()
    reads = {"start": h0, "a": h1, "b": model.norm(h2)}
    loss = sum(F.cross_entropy(local(heads[name], h), LABELS) for name, h in reads.items())
    exact = reverse(loss, model)
    for name in ("start.weight", "a.weight", "b.weight", "norm.weight"):
        close(found[name], exact[name])


class Attending(nn.Module):
    """Attention, whose positions come first inside of torch's module."""

    def __init__(self):
        super().__init__()
        self.table, self.attention = nn.Embedding(9, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = self.table(x)
        return self.out(h + self.attention(h, h, h, need_weights=False)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_heads_keep_the_order_of_positions_that_attention_swaps(recompute):
    torch.manual_seed(0)
    model = Attending().double()
    codes, targets = CODES[:5], NEXT[:5]  # as many sequences as positions
    found, heads = measured(model, lambda: F.cross_entropy(model(codes).flatten(0, 1), targets.flatten()), recompute)
    table = model.table(codes)
    part = model.attention(*[table.detach()] * 3, need_weights=False)[0]
    stream = part if recompute else table + part  # where a head's reach ends at the first layer, the stream is not read
    stream = stream + table.detach() if recompute else stream
    z = [
        local(heads["table"], table),
        local(heads["attention.out_proj" if "attention.out_proj" in heads else "attention"], stream),
    ]
    loss = sum(F.cross_entropy(y.flatten(0, 1), targets.flatten()) for y in z)
    exact = reverse(loss, model)
    close(found["table.weight"], exact["table.weight"])
    close(found["attention.in_proj_weight"], exact["attention.in_proj_weight"])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.cell(x.unsqueeze(1))[0][:, -1])


def test_layers_of_every_kind_have_estimates():
    torch.manual_seed(0)
    model = Recurrent().double()
    found, heads = measured(model, lambda: F.cross_entropy(model(ROWS), LABELS))
    loss = F.cross_entropy(local(heads["cell"], model.cell(ROWS.unsqueeze(1))[0][:, -1]), LABELS)
    close(found["cell.weight_ih_l0"], reverse(loss, model)["cell.weight_ih_l0"])

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    pixels = torch.randint(3, (6, 7, 7), generator=seeded(0))
    found, heads = measured(model, lambda: F.cross_entropy(model(IMAGES), pixels))
    loss = F.cross_entropy(local(heads["0"], model[:3](IMAGES).movedim(1, -1)).movedim(-1, 1), pixels)
    exact = reverse(loss, model)
    for name in ("0.weight", "1.weight", "1.bias"):
        close(found[name], exact[name])

    torch.manual_seed(0)
    bare = nn.ParameterList([torch.randn(7, 4, **DOUBLE), torch.randn(3, 7, **DOUBLE)])
    found, heads = measured(bare, lambda: F.cross_entropy((ROWS @ bare[0].T).relu() @ bare[1].T, LABELS))
    (head,) = heads.values()
    close(found["0"], reverse(F.cross_entropy(local(head, (ROWS @ bare[0].T).relu()), LABELS), bare)["0"])

    model = perceptron()
    nn.utils.parametrizations.weight_norm(model[0])
    found, heads = measured(model, lambda: F.cross_entropy(model(ROWS), LABELS))
    (head,) = heads.values()
    exact = reverse(F.cross_entropy(local(head, model[:2](ROWS)), LABELS), model)
    close(found["0.parametrizations.weight.original1"], exact["0.parametrizations.weight.original1"])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_layer_before_code_that_is_not_seen_is_read():
    model = perceptron()
    found, heads = measured(model, lambda: F.cross_entropy(model[2](Doubled.apply(model[0](ROWS))), LABELS))
    loss = F.cross_entropy(local(heads["0"], model[0](ROWS)), LABELS)
    close(found["0.weight"], reverse(loss, model)["0.weight"])


def test_one_example_without_an_axis_for_it():
    model = perceptron()
    found, _ = measured(model, lambda: F.cross_entropy(model(ROWS[0]), LABELS[0]))
    same, _ = measured(model, lambda: F.cross_entropy(model(ROWS[:1]), LABELS[:1]))
    for name, g in same.items():
        close(found[name], g)


def test_layers_below_a_frozen_one_have_heads():
    model = perceptron()
    model[2].requires_grad_(False)
    moving = [model[0].weight, model[0].bias]
    given, estimator = Batch(
        lambda: F.cross_entropy(model(ROWS), LABELS), moving, model, None, None, [], frozenset({0, 1}), seed=0
    ), LocalHeads()  # fmt: skip
    state = with_random_heads(estimator, given)
    with torch.no_grad():
        found = estimator.measure(given, state)
    loss = F.cross_entropy(local(state["heads"]["0"]["weight"], model[:2](ROWS)), LABELS)
    close(found[0], torch.autograd.grad(loss, model[0].weight)[0])


def test_pixels_of_one_channel_are_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 1)).double()
    pixels = (IMAGES[:, 0, 1:-1, 1:-1] > 0).double()
    loss = lambda z: F.binary_cross_entropy_with_logits(z.squeeze(1), pixels)  # noqa: E731
    found, heads = measured(model, lambda: loss(model(IMAGES)))
    z = local(heads["0"], model[:2](IMAGES).movedim(1, -1)).movedim(-1, 1)
    close(found["0.weight"], reverse(loss(z), model)["0.weight"])


def test_checkpoints_and_the_closures_own_no_grad():
    model = perceptron()
    exact, _ = measured(model, lambda: F.cross_entropy(model(ROWS), LABELS))
    checkpoint = torch.utils.checkpoint.checkpoint
    found, _ = measured(model, lambda: F.cross_entropy(checkpoint(model, ROWS, use_reentrant=False), LABELS))
    for name, g in exact.items():
        close(found[name], g)

    def watched():
        h = model[:2](ROWS)
        with torch.no_grad():
            assert h.numpy().shape == (6, 7) and float(h.mean()) >= 0
            model(ROWS)
        return F.cross_entropy(model[2](h), LABELS)

    found, _ = measured(model, watched)
    for name, g in exact.items():
        close(found[name], g)


@pytest.mark.parametrize("write", ["activation", "input"])
def test_what_is_written_to_later_is_an_error(write):
    model = perceptron()

    def closure():
        h = model[0](ROWS).relu() if write == "activation" else model[0](ROWS) * 1.0
        z = model[2](h)
        h += 1
        return F.cross_entropy(z, LABELS) + 0 * h.sum()

    with pytest.raises(jp.ArgumentError, match="writes to a tensor"):
        measured(model, closure)


def test_layers_that_the_first_step_has_not_called_are_said():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]).double()
    calls = []

    def closure():
        calls.append(0)
        h = model[0](ROWS).relu()
        return F.cross_entropy(model[2](model[1](h).relu() if len(calls) > 2 else h), LABELS)

    given, estimator = batch(closure, model), LocalHeads()
    with pytest.warns(jp.JetplaneWarning, match="2 of 6 parameters"):
        state = estimator.prepare(given, {})
    with torch.no_grad(), pytest.warns(jp.JetplaneWarning, match="without a head: .'1'"):
        estimator.measure(given, state)


# --- fast weights -----------------------------------------------------------------------------------------------


def test_fast_weights_take_adams_steps_and_are_averaged():
    p, reference = torch.randn(3, 2, **DOUBLE), None
    reference = nn.Parameter(p.clone())
    adam, source = torch.optim.Adam([reference], lr=0.1), FastWeights(rate=0.1, average=0.8)
    state, passed = [{}], []
    assert source.weights(Context([p], [0], state, 0, 0)) is None
    assert source.directions(Context([p], [0], state, 0, 0)) is None
    for step in range(20):
        g = torch.randn(3, 2, generator=seeded(step), **DOUBLE)
        reference.grad = g
        adam.step()
        passed.append(reference.detach().clone())
        state = source.remember(Context([p], [0], state, step, 0), Result([g], [None]))
        torch.testing.assert_close(source.weights(Context([p], [0], state, step, 0))[0], passed[-1])
    weights = [(i + 1) * (i + 2) * (i + 3) for i in range(17)]  # until the memory of 0.8 is shorter
    mean = sum(w * z for w, z in zip(weights, passed, strict=False)) / sum(weights)
    for z in passed[17:]:
        mean = 0.8 * mean + 0.2 * z
    found = source.directions(Context([p], [0], state, 20, 0))
    for row, there in enumerate((passed[-1], mean)):
        torch.testing.assert_close(found.draw(0, p)[row], (there - p) / (there - p).norm())


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"decays": (1.0, 0.9)}, {"average": -0.1}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(jp.ArgumentError, match="positive rate and decays"):
        FastWeights(**settings)


# --- steps ------------------------------------------------------------------------------------------------------

X = torch.randn(256, 6, generator=seeded(0))
Y = (X[:, 0] > X[:, 1] ** 2).long() + (X[:, 2] > 1).long()


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def optimizer(net, every=4, **settings):
    subspace = Subspace([FastWeights(rate=0.02)], every=every)
    return jp.optim.PlaneSearch(net.parameters(), net, gradient=LocalHeads(), subspace=subspace, **settings)


def steps(net, opt, count, first=0):
    losses = []
    for i in range(first, first + count):
        rows = torch.randperm(256, generator=seeded(i))[:64]
        losses.append(opt.step(lambda rows=rows: F.cross_entropy(net(X[rows]), Y[rows])).item())
    return losses


def test_by_default_a_plane_is_evaluated_in_every_sixteenth_step():
    net = network()
    opt = jp.optim.PlaneSearch(net.parameters(), net, gradient=LocalHeads())
    assert opt.subspace == (FastWeights(),) and opt.every == 16
    steps(net, opt, 15)
    assert opt.plane is None
    before = [p.detach().clone() for p in net.parameters()]
    steps(net, opt, 1, 15)
    assert opt.plane.slope.shape == (2,)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_it_trains_and_the_loss_is_that_of_the_model():
    net = network()
    with torch.no_grad():
        before = F.cross_entropy(net(X), Y).item()
    steps(net, optimizer(net), 80)
    with torch.no_grad():
        assert F.cross_entropy(net(X), Y).item() < 0.5 * before


def flat(net, opt, name=None):
    """The parameters, or what is remembered of them under a name."""
    own = [p if name is None else opt.state[p][f"FastWeights/{name}"] for p in net.parameters()]
    return torch.cat([t.detach().double().flatten() for t in own])


@pytest.mark.parametrize("best", ["theta", "fast", "mean"])
def test_the_batch_after_a_planes_judges_its_step(monkeypatch, best):
    """Parameters go to the fast weights or their average where the loss of that batch is lower, else they stay."""
    monkeypatch.setattr("jetplane.optim.points.EARLY", set())
    net = network()
    opt = optimizer(net, every=8)
    steps(net, opt, 8)
    with torch.no_grad():
        for p in net.parameters():
            good = opt.state[p]["FastWeights/fast"].clone()
            opt.state[p] |= {f"FastWeights/{name}": good if name == best else 30 * good for name in ("fast", "mean")}
            p.copy_(good if best == "theta" else 30 * good)
    opt.state["jetplane"]["shares"] = {}
    start, mean = flat(net, opt, None if best == "theta" else best), flat(net, opt, "mean")
    steps(net, opt, 1, 8)
    follows = flat(net, opt, "mean") - mean if best != "theta" else 0.0
    torch.testing.assert_close(flat(net, opt), start + follows, atol=1e-5, rtol=1e-4)
    assert opt.state["jetplane"]["shares"] == {"FastWeights": float(best != "theta")}


def test_before_the_first_plane_the_second_and_fifth_batch_judge():
    net, moved = network(), []
    opt = optimizer(net, every=100)
    for step in range(6):
        before = [p.detach().clone() for p in net.parameters()]
        steps(net, opt, 1, step)
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)))
        if moved[-1] and step < 4:
            opt.state["jetplane"]["shares"] = {}  # or parameters go on with the average
    assert moved == [False, True, False, False, True, True]


def test_a_plane_of_few_examples_does_not_step_past_the_farthest_point():
    """Parameters follow the average at a small distance, along which a plane would go tens of times as far."""
    net = network()
    opt = optimizer(net, every=8)
    steps(net, opt, 7)
    points = [flat(net, opt, name) for name in ("fast", "mean")]
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(opt.state[p]["FastWeights/mean"] + 1e-4 * torch.randn_like(p))
    start = flat(net, opt)
    steps(net, opt, 1, 7)
    farthest = max((point - start).norm() for point in points)
    assert 0 < (flat(net, opt) - start).norm() <= 1.001 * farthest


def test_rounding_between_parameters_and_the_average_is_no_direction():
    net = network()
    opt = optimizer(net, every=100)
    steps(net, opt, 3)
    for distance, k in ((1e-4, 2), (1e-7, 1)):
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(opt.state[p]["FastWeights/mean"] * (1 + distance))
        (context,) = opt._contexts(opt._moving())
        assert opt.subspace[0].directions(context).k == k


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_slope_that_is_not_finite_is_an_error_and_nothing_of_it_remains(with_heads):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    opt = jp.optim.PlaneSearch(net.parameters(), net, gradient=jp.gradients.LocalHeads() if with_heads else None)

    def step(infinite: bool) -> torch.Tensor:
        def closure():
            out = net(x)
            return F.mse_loss(out + (out - out.detach()).sqrt() if infinite else out, y)

        return opt.step(closure)

    for _ in range(3):
        step(False)
    before = copy.deepcopy((opt.state_dict()["state"], net.state_dict()))
    with pytest.raises(jp.errors.NonFiniteError, match="finite"):
        step(True)
    torch.testing.assert_close((opt.state_dict()["state"], net.state_dict()), before, rtol=0, atol=0)
    assert opt.state["jetplane"]["step"] == 3
    assert step(False) < 10


def test_parameters_do_not_go_to_points_at_which_the_loss_is_not_finite():
    net = network()
    opt = optimizer(net, every=8)
    steps(net, opt, 8)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(opt.state[p]["FastWeights/fast"])
            opt.state[p]["FastWeights/mean"].fill_(float("nan"))
    opt.state["jetplane"]["shares"] = {}
    steps(net, opt, 1, 8)
    assert torch.isfinite(flat(net, opt)).all()


def test_a_learning_rate_of_zero_leaves_parameters_where_they_are():
    net = network()
    opt = optimizer(net, every=4, lr=0.0)
    before = [p.detach().clone() for p in net.parameters()]
    steps(net, opt, 10)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_between_planes_parameters_follow_the_average_by_the_part_that_planes_have_given_it(monkeypatch):
    """Planes make them w_1 z + w_2 mean + (1 - w_1 - w_2) theta; then they move with the mean by the sum of parts."""
    monkeypatch.setattr("jetplane.optim.points.is_judged", lambda step, every: False)
    net, part = network(), 0.0
    opt = optimizer(net, every=4)
    for step in range(14):
        theta = flat(net, opt)
        points = torch.stack([flat(net, opt, "fast"), flat(net, opt, "mean")]) if step else None
        steps(net, opt, 1, step)
        if points is not None and (step + 1) % 4 == 0:
            w = torch.linalg.lstsq((points - theta).T, (flat(net, opt) - theta).unsqueeze(1)).solution.sum().item()
            part = min(max(w + (1 - w) * part, 0.0), 1.0)
            assert abs(part) > 0.05
        elif points is not None:
            follows = part * (flat(net, opt, "mean") - points[1])
            torch.testing.assert_close(flat(net, opt) - theta, follows, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(dtype):
    """Squares of gradients and small steps are kept in single precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    x, y = ROWS.to(dtype), LABELS
    opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=LocalHeads())
    losses = [opt.step(lambda: F.cross_entropy(model(x).float(), y)).item() for _ in range(64)]
    assert min(losses) < 0.7 * losses[0]
    state = opt.state[model[0].weight]
    assert {t.dtype for t in state.values()} == {torch.float32} and model[0].weight.dtype == dtype


def test_a_plane_where_the_fast_weights_have_not_moved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    before = [p.detach().clone() for p in model.parameters()]
    opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=LocalHeads(), audit="never")
    for _ in range(33):
        assert opt.step(lambda: 0 * F.cross_entropy(model(ROWS), LABELS) + 1.0) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "loss", [lambda z: F.multi_margin_loss(z, LABELS), lambda z: F.l1_loss(z, F.one_hot(LABELS, 3).double())]
)
def test_losses_without_curvature_have_planes(loss):
    """Their planes are evaluated with exact curvature, whose pairs need two directions at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=LocalHeads())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*curv", jp.JetplaneWarning)
        losses = [opt.step(lambda: loss(model(ROWS))).item() for _ in range(32)]
    assert opt.curvature == "hessian" and opt.plane is not None
    assert loss(model(ROWS)).item() < 0.99 * losses[-1]  # the last step had a plane


def test_nothing_of_a_pass_waits_for_the_garbage_collector():
    net, gone = network(), []

    def closure():
        h = net(X)
        gone.append(weakref.ref(h))
        return F.cross_entropy(h, Y)

    opt = optimizer(net)
    gc.disable()
    try:
        for _ in range(4):
            opt.step(closure)
        assert gone and not any(one() is not None for one in gone)
    finally:
        gc.enable()


def test_a_step_without_a_plane_returns_the_loss_at_the_fast_weights():
    net = network()
    opt = optimizer(net)
    steps(net, opt, 2)
    fast, rows = copy.deepcopy(net), torch.randperm(256, generator=seeded(2))[:64]
    with torch.no_grad():
        for p, own in zip(fast.parameters(), net.parameters(), strict=True):
            p.copy_(opt.state[own]["FastWeights/fast"])
        expected = F.cross_entropy(fast(X[rows]), Y[rows]).item()
    assert steps(net, opt, 1, 2)[0] == pytest.approx(expected, rel=1e-6)


def test_estimates_leave_parameters_and_errors_too():
    net = network()
    opt = optimizer(net)
    steps(net, opt, 2)
    before = [p.detach().clone() for p in net.parameters()]

    def fails():
        net(X)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        opt.step(fails)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_loss_that_is_not_finite_raises_and_is_not_learned_from():
    net = network()
    opt = optimizer(net)
    steps(net, opt, 2)
    learned = copy.deepcopy(opt.state["jetplane"]["gradient"])
    with pytest.raises(jp.NonFiniteError, match="not finite"):
        opt.step(lambda: F.cross_entropy(net(X * torch.inf), Y))
    torch.testing.assert_close(opt.state["jetplane"]["gradient"], learned)


def test_random_numbers_and_buffers_move_once_in_every_step():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(dropout=0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    net = Counted()
    opt = optimizer(net, every=3)
    steps(net, opt, 7)
    after = torch.rand(1)
    assert net.calls == 7
    torch.manual_seed(0)
    network()  # as above
    for _ in range(7):
        F.dropout(torch.ones(64, 16), 0.5)
    assert torch.equal(after, torch.rand(1))


def test_training_resumes_bit_for_bit():
    net = network()
    opt = optimizer(net)
    steps(net, opt, 6)
    other = copy.deepcopy(net)
    again = optimizer(other)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert steps(net, opt, 7, 6) == steps(other, again, 7, 6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_other_sources_stand_beside_fast_weights():
    net = network()
    sources = [FastWeights(rate=0.02), Averages(), PreviousStep()]
    opt = jp.optim.PlaneSearch(net.parameters(), net, gradient=LocalHeads(), subspace=sources)
    assert opt.every == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = steps(net, opt, 30)
    assert opt.plane.slope.shape[0] > 5 and losses[-1] < 0.8 * losses[0]


NOISE, NOTHING = Subspace([Averages()], every=2), Subspace([PreviousStep()], every=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": LocalHeads(), "model": None}, "LocalHeads needs the model whose layers have the heads"),
        ({"gradient": ActivityPerturbation(), "subspace": NOISE}, "take every=1"),
        ({"gradient": LocalHeads(), "subspace": NOTHING}, "no source learns"),
    ],
)
def test_combinations_that_cannot_be_are_refused(settings, message):
    net = network()
    with pytest.raises(jp.ArgumentError, match=message):
        jp.optim.PlaneSearch(net.parameters(), **({"model": net} | settings))


@pytest.mark.parametrize("every", [0, True, 1.5])
def test_every_must_be_a_number_of_steps(every):
    with pytest.raises(jp.ArgumentError, match="every must be an integer of at least 1"):
        Subspace(every=every)


def test_rates_must_be_positive():
    with pytest.raises(jp.ArgumentError, match="rate must be positive"):
        LocalHeads(rate=0.0)


def test_the_tape_keeps_no_input_that_a_derivative_does_not_need():
    array = np.ones(8, dtype=np.float32)
    kept, tape, w = weakref.ref(array), Tape(), torch.ones(8)
    x = torch.from_numpy(array)
    del array
    y = tape.run(torch.add, (x, w), {}, leaves=(x, w))
    z = tape.run(torch.add, (y, 1.0), {})
    node = tape.node(y)
    assert node is not None and kept() is not None
    node.inputs = [leaf for leaf in node.inputs if leaf.tensor is not x]  # a leaf is kept by its node
    del x
    assert kept() is None and tape.node(z) is not None


def frozen_between():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].requires_grad_(False)
    return net, [p for p in net.parameters() if p.requires_grad]


def test_a_loss_of_what_two_frozen_layers_share_is_refused():
    net, params = frozen_between()
    net[4].requires_grad_(False)
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    order = torch.arange(11, -1, -1)

    def closure():
        shared = net[:4](x)
        return F.cross_entropy(shared[order], y[order]) + F.cross_entropy(net[4](shared), y)

    opt = jp.optim.PlaneSearch(params[:2], net, gradient=LocalHeads())
    with pytest.raises(jp.ArgumentError, match="which another layer takes too"):
        opt.step(closure)
