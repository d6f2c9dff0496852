"""Layers that can be perturbed: a registry along the class hierarchy, torch's own costs, plans that grow stale."""

import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import jetplane as jp
from jetplane.gradients import (
    OTHERS,
    LayerPlan,
    PerturbableLayer,
    WeightPerturbableLayer,
    allocate,
    estimate,
    layers,
    perturbable,
    register_layer,
    signature,
)
from jetplane.gradients.passes import trace


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(layers, "_registry", dict(layers._registry))


def mlp(first=None):
    torch.manual_seed(0)
    net = nn.Sequential(first or nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(8, 5).double(), torch.randint(4, (8,))
    return net, lambda: F.cross_entropy(net(x), y)


def exact(closure, params):
    return list(torch.autograd.grad(closure(), params))


def mean_estimate(closure, net, params, plans, count=200):
    found = [estimate(closure, net, params, plans, seed).gradient for seed in range(count)]
    return [torch.stack(tensors).mean(0) for tensors in zip(*found, strict=True)]


# --- along the class hierarchy ----------------------------------------------------------------------------


class Named(nn.Linear):
    """Another name, another constructor, the same computation."""

    def __init__(self):
        super().__init__(5, 6)
        self.note = "mine"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv1d):
    """Overrides what the convolution's own forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


def test_a_subclass_that_computes_the_same_is_perturbed():
    net, closure = mlp(Named())
    params = list(net.parameters())
    plans = allocate(closure, net, params, 100)
    assert set(plans) == {"0", "2"} and perturbable(net, params) == sum(p.numel() for p in params)
    torch.testing.assert_close(estimate(closure, net, params, plans, 0).gradient, exact(closure, params))


def test_a_subclass_with_another_forward_is_not_taken_for_its_base():
    net, closure = mlp(Doubled(5, 6))
    params = list(net.parameters())
    plans = allocate(closure, net, params, 100)
    assert set(plans) == {"2", OTHERS} and perturbable(net, params) == 28
    found = estimate(closure, net, params, plans | {OTHERS: LayerPlan("parameters", 4000)}, 0).gradient
    for a, b in zip(found, exact(closure, params), strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95


def test_a_subclass_with_another_forward_can_be_registered_itself():
    class DoubledLayer(PerturbableLayer):
        positionwise = True

        def vjp(self, module, x, cotangent):
            return {"weight": 2 * cotangent.mT @ x, "bias": 2 * cotangent.sum(0)}

    register_layer(Doubled, DoubledLayer())
    net, closure = mlp(Doubled(5, 6))
    params = list(net.parameters())
    plans = allocate(closure, net, params, 100)
    assert plans["0"].mode == "basis"
    torch.testing.assert_close(estimate(closure, net, params, plans, 0).gradient, exact(closure, params))


def test_a_forward_replaced_on_the_instance_is_another_forward():
    net, _ = mlp()
    assert layers.layer_of(net[0]) is not None
    net[0].forward = types.MethodType(lambda self, x: x @ self.weight.mT, net[0])
    assert layers.layer_of(net[0]) is None


def test_methods_that_the_forward_calls_count_as_well():
    assert layers.layer_of(nn.Conv1d(2, 3, 2)) is not None
    assert layers.layer_of(Standardized(2, 3, 2)) is None


def test_the_nearest_registered_class_counts():
    class Other(PerturbableLayer):
        def vjp(self, module, x, cotangent):
            raise NotImplementedError

    other = Other()
    register_layer(Named, other)
    assert layers.layer_of(Named()) is other
    assert layers.layer_of(type("Derived", (Named,), {})()) is other
    assert layers.layer_of(nn.Linear(2, 3)) is not other
    register_layer(Named, None)
    assert layers.layer_of(Named()) is None


def test_attention_uses_its_projection_without_calling_it():
    attention = nn.MultiheadAttention(8, 2)
    assert perturbable(attention, list(attention.parameters())) == 0


# --- the layers of torch ----------------------------------------------------------------------------------


PRODUCTS = {
    "linear": (nn.Linear(5, 7), torch.randn(3, 4, 5)),
    "linear without bias": (nn.Linear(5, 7, bias=False), torch.randn(3, 5)),
    "convolution": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), torch.randn(2, 4, 8, 7)),
    "convolution, groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 8, 8)),
    "convolution, depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="valid"), torch.randn(2, 4, 8, 8)),
    "convolution, same size": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), torch.randn(2, 2, 9, 9)),
    "convolution, circular": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), torch.randn(2, 2, 6, 6)),
    "convolution, reflected": (nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), torch.randn(2, 2, 9)),
    "convolution in one dimension": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9)),
    "embedding": (nn.Embedding(5, 4, padding_idx=1), torch.randint(5, (6, 3))),
    "layer norm": (nn.LayerNorm(4), torch.randn(3, 2, 4)),
    "layer norm over two axes": (nn.LayerNorm((2, 4), bias=False), torch.randn(3, 2, 4)),
}


def in_double(name):
    module, x = PRODUCTS[name]
    return module.double(), x.double() if x.is_floating_point() else x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_reverse_mode(name):
    module, x = in_double(name)
    y = module(x)
    cotangent = torch.randn_like(y)
    found = layers.layer_of(module).vjp(module, x, cotangent)
    own = dict(module.named_parameters())
    for key, truth in zip(own, torch.autograd.grad(y, list(own.values()), cotangent), strict=True):
        torch.testing.assert_close(found[key], truth)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", [name for name in PRODUCTS if "convolution" in name])
def test_changes_by_weights_of_each_example_are_those_of_its_own_call(name):
    module, x = in_double(name)
    tangents = {key: torch.randn(3, len(x), *p.shape).double() for key, p in module.named_parameters()}
    found = layers.layer_of(module).jvp(module, x, tangents)
    for k in range(3):
        for n in range(len(x)):
            own = {key: t[k, n] for key, t in tangents.items()}  # the output is linear in the weights
            torch.testing.assert_close(found[k, n], torch.func.functional_call(module, own, x[n : n + 1])[0])


# --- a kind of one's own ----------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.factor


class ScaleLayer(WeightPerturbableLayer):
    parameters = ("factor",)
    positionwise = True

    def vjp(self, module, x, cotangent):
        return {"factor": (x * cotangent).sum(0)}

    def jvp(self, module, x, tangents):
        return x * tangents["factor"]


def scaled():
    register_layer(Scale, ScaleLayer())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), Scale(6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(8, 5).double(), torch.randint(4, (8,))
    return net, lambda: F.cross_entropy(net(x), y)


@pytest.mark.parametrize("mode", ["outputs", "basis", "weights"])
def test_one_registration_is_all_that_a_new_kind_of_layer_needs(mode):
    net, closure = scaled()
    params = [net[1].factor]
    assert set(allocate(closure, net, params, 10)) == {"1"}
    plans = {"1": LayerPlan(mode, 6)}
    (found,), (truth,) = mean_estimate(closure, net, params, plans), exact(closure, params)
    assert (found - truth).norm() < (1e-9 if mode == "basis" else 0.2) * truth.norm()


def test_parameters_that_a_layer_does_not_account_for_are_moved_themselves():
    net, closure = scaled()
    params = [net[1].factor, net[1].unused]
    assert perturbable(net, params) == 6
    plans = allocate(closure, net, params, 10)
    assert set(plans) == {"1", OTHERS}
    factor, unused = estimate(closure, net, params, plans, 0).gradient
    assert bool(factor.any()) and not bool(unused.any())


@pytest.mark.parametrize("products", [{}, {"factr": torch.zeros(6)}, {"factor": torch.zeros(5)}])
def test_products_that_do_not_fit_the_parameters_are_refused(products):
    class Wrong(ScaleLayer):
        def vjp(self, module, x, cotangent):
            return products

    net, closure = scaled()
    register_layer(Scale, Wrong())
    with pytest.raises(jp.ShapeError, match="Wrong.vjp must return .*'factor': \\(6,\\)"):
        estimate(closure, net, [net[1].factor], {"1": LayerPlan("outputs", 2)}, 0)


@pytest.mark.parametrize(("cls", "layer"), [(ScaleLayer, ScaleLayer()), (Scale(2), ScaleLayer()), (Scale, ScaleLayer)])
def test_what_is_no_class_of_modules_or_no_layer_is_refused(cls, layer):
    with pytest.raises(jp.ArgumentError, match="expected"):
        register_layer(cls, layer)


def test_plane_search_perturbs_a_registered_layer():
    net, closure = scaled()
    opt = jp.optim.PlaneSearch([net[1].factor], net)
    assert not any(isinstance(source, jp.sources.Drawn) for source in opt.subspace)
    losses = [float(opt.step(closure)) for _ in range(10)]
    assert losses[-1] < losses[0]


# --- weights that are no parameters -----------------------------------------------------------------------


PARAMETRIZED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": lambda module: torch.nn.utils.weight_norm(module),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_is_a_function_of_parameters_is_moved_by_them(name):
    net, closure = mlp()
    PARAMETRIZED[name](net[0])
    net.eval()
    params = list(net.parameters())
    own = {id(p) for p in net[0].parameters()}
    assert perturbable(net, params) == 28
    plans = allocate(closure, net, params, 10)
    assert set(plans) == {"2", OTHERS}
    found = estimate(closure, net, params, plans | {OTHERS: LayerPlan("parameters", 6000)}, 0).gradient
    truth = exact(closure, params)
    a, b = ([t.flatten() for t, p in zip(of, params, strict=True) if id(p) in own] for of in (found, truth))
    assert F.cosine_similarity(torch.cat(a), torch.cat(b), dim=0) > 0.95


# --- costs ------------------------------------------------------------------------------------------------


HAND_COUNTS = {  # module, input, multiply-adds
    "linear": (nn.Linear(5, 7), torch.randn(3, 5), 3 * 7 * 5),
    "linear over sequences": (nn.Linear(5, 7), torch.randn(3, 4, 5), 3 * 4 * 7 * 5),
    "without bias": (nn.Linear(5, 7, bias=False), torch.randn(3, 5), 3 * 7 * 5),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8), 2 * 6 * 64 * 4 * 9),
    "convolution, strides": (nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 9, 9), 2 * 6 * 16 * 4 * 9),
    "convolution, groups": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 8, 8), 2 * 6 * 36 * 2 * 9),
    "convolution in one dimension": (nn.Conv1d(2, 3, 4), torch.randn(2, 2, 9), 2 * 3 * 6 * 2 * 4),
    "embedding": (nn.Embedding(5, 4), torch.randint(5, (2, 3)), 0),  # copies
    "layer norm": (nn.LayerNorm(4), torch.randn(2, 4), 0),  # no product of matrices
}


@pytest.mark.parametrize("name", HAND_COUNTS)
def test_operators_cost_what_torch_counts(name):
    module, x, multiply_adds = HAND_COUNTS[name]
    traces, total = trace(lambda: module(x), {"layer": module}, list(module.parameters()))
    assert traces["layer"].flops == total == 2 * multiply_adds
    assert traces["layer"].outputs == module(x).numel()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        h = self.mix(h) + self.mix(h.softmax(-1))
        return self.last(h @ h.mT @ h)


def test_what_remains_after_a_layer_counts_products_outside_of_layers():
    net, x = Attention(), torch.randn(2, 5, 4)
    traces, total = trace(lambda: net(x), dict(net.named_children()), list(net.parameters()))
    linear, product, last = 2 * 2 * 5 * 4 * 4, 2 * 2 * 5 * 5 * 4, 2 * 2 * 5 * 4 * 3
    assert total == 3 * linear + 2 * product + last
    assert [traces[name].calls for name in ("first", "mix", "last")] == [1, 2, 1]
    assert traces["mix"].flops == 2 * linear
    assert traces["first"].remaining == 2 * linear + 2 * product + last
    assert traces["mix"].remaining == linear + 2 * product + last  # its own second call carries noise as well
    assert traces["last"].remaining == 0


def test_layers_that_a_loss_differentiates_itself_are_left_out():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    loss = lambda: jp.jet(net, x, torch.ones(1, 4, 3))[1].square().sum() + net(x).sum()  # noqa: E731
    traces, total = trace(loss, {"layer": net}, list(net.parameters()))
    assert not traces and total >= 2 * 4 * 3 * 2


def test_weights_of_grouped_convolutions_are_perturbed_where_they_are_fewer():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3))
    x, y = torch.randn(9, 4, 6, 6), torch.randint(3, (9,))
    plans = allocate(lambda: F.cross_entropy(net(x), y), net, list(net.parameters()), 40)
    assert plans["0"].mode == "weights"


# --- plans that grow stale --------------------------------------------------------------------------------


def test_a_signature_tells_what_moves_and_in_which_mode():
    net, _ = mlp()
    net.append(nn.Dropout(0.1))
    params = list(net.parameters())
    extra = torch.zeros(3, requires_grad=True)
    seen = {
        "all": signature(net, params),
        "one frozen": signature(net, params[1:]),
        "another frozen": signature(net, params[:-1]),
        "one outside of the model": signature(net, [*params, extra]),
    }
    net[-1].eval()
    seen["one layer in evaluation"] = signature(net, params)
    net.eval()
    seen["all in evaluation"] = signature(net, params)
    net.train()
    parametrizations.weight_norm(net[0])
    seen["parametrized"] = signature(net, list(net.parameters()))
    assert len(set(seen.values())) == len(seen)


def test_a_signature_tells_nothing_else():
    net, closure = mlp()
    params = list(net.parameters())
    before = signature(net, params)
    with torch.no_grad():
        params[0].add_(1)
    closure()
    again, _ = mlp()
    assert (
        before == signature(net, params) == signature(net, params[::-1]) == signature(again, list(again.parameters()))
    )


def test_a_layer_unfrozen_later_needs_a_new_plan_and_gets_it():
    net, closure = mlp()
    params = list(net.parameters())
    plans = allocate(closure, net, params[2:], 100)
    with pytest.raises(jp.ArgumentError, match="no plan accounts for 2 of 4 parameters, .*allocate anew"):
        estimate(closure, net, params, plans, 0)
    assert signature(net, params) != signature(net, params[2:])
    plans = allocate(closure, net, params, 100)
    torch.testing.assert_close(estimate(closure, net, params, plans, 0).gradient, exact(closure, params))


def test_a_plan_goes_through_plain_data():
    net = nn.Sequential(nn.Linear(5, 60), nn.ReLU(), nn.Linear(60, 4))
    x, y = torch.randn(900, 5), torch.randint(4, (900,))
    plans = allocate(lambda: F.cross_entropy(net(x), y), net, list(net.parameters()), 2)
    assert plans["0"].feedback is not None and plans["0"].successor == "2" and plans["2"].feedback is None
    assert {name: LayerPlan.of(plan.plain()) for name, plan in plans.items()} == plans


@pytest.mark.parametrize(("samples", "passes"), [(5, 1), (5, 2), (7, 7), (64, 5)])
def test_samples_are_split_among_passes_evenly(samples, passes):
    parts = LayerPlan("outputs", samples, passes).split()
    assert [i for part in parts for i in part] == list(range(samples))
    assert len(parts) == passes and max(map(len, parts)) == math.ceil(samples / passes)
