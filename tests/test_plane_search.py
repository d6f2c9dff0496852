"""PlaneSearch: what spans its plane, what it remembers, and that it trains without a rate."""

import copy
import io
import warnings
from dataclasses import dataclass

import pytest
import torch
from cases import rosenbrock
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import jetplane as jp
from jetplane.gradients import ActivityPerturbation, Batch, Estimate, Estimator, ForwardGradients
from jetplane.gradients.plan import OTHERS
from jetplane.subspace.descent import CurvatureScaled, Damped, SaddleFree
from jetplane.subspace.search import Backtracking, ExactLine, FullStep, NoiseAware
from jetplane.subspace.sources import (
    Averages,
    Drawn,
    PreviousStep,
    Source,
    Subspace,
    layer_groups,
)

X = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1] ** 2).long() + (X[:, 2] > 1).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(128, generator=generator).split(32):
            yield X[batch], Y[batch]


def train(net, opt, steps, seed=0):
    data = batches(seed)
    losses = []
    for _ in range(steps):
        x, y = next(data)
        x = x.to(next(net.parameters()).dtype)
        losses.append(opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y)).item())
    return losses


REMEMBERED = [Averages(), PreviousStep()]
SETTINGS = {
    "half precision": lambda net: jp.optim.PlaneSearch(net.bfloat16().parameters(), net),
    "memory": lambda net: jp.optim.PlaneSearch(net.parameters(), net),
    "memory and noise": lambda net: jp.optim.PlaneSearch(
        net.parameters(), net, subspace=[Drawn(4), *REMEMBERED], weight_decay=1e-4
    ),
    "drawn": lambda net: jp.optim.PlaneSearch(net.parameters(), subspace=[Drawn(16), *REMEMBERED]),
    "low-rank": lambda net: jp.optim.PlaneSearch(
        net.parameters(), subspace=[Drawn(8, tangents="low-rank", rank=2), *REMEMBERED]
    ),
    "sparse": lambda net: jp.optim.PlaneSearch(
        net.parameters(), net, subspace=[Drawn(8, tangents="sparse", density=0.5), *REMEMBERED]
    ),
    "dense": lambda net: jp.optim.PlaneSearch(net.parameters(), subspace=[Drawn(8, tangents="dense"), *REMEMBERED]),
    "exact curvature": lambda net: jp.optim.PlaneSearch(
        net.parameters(), net, subspace=Subspace(curvature="hessian"), clip=1.0
    ),
    "a rate": lambda net: jp.optim.PlaneSearch(net.parameters(), net, lr=0.3, search=FullStep()),
    "line search": lambda net: jp.optim.PlaneSearch(net.parameters(), net, search=Backtracking()),
    "a direction at a time": lambda net: jp.optim.PlaneSearch(net.parameters(), net, subspace=Subspace(chunk=1)),
    "no feedback": lambda net: jp.optim.PlaneSearch(
        net.parameters(), net, gradient=ActivityPerturbation(passes=4.0, feedback=False)
    ),
}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "a direction at a time"])  # the same, later
def test_trains_without_a_rate(name):
    net = network()
    losses = train(net, SETTINGS[name](net), 48)
    assert sum(losses[-8:]) / 8 < 0.75 * sum(losses[:4]) / 4


@pytest.mark.parametrize("name", SETTINGS)
def test_resumes_bit_for_bit_through_a_file(name):
    net = network()
    opt = SETTINGS[name](net)
    train(net, opt, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = network()
    twin.load_state_dict(state["net"])
    again = SETTINGS[name](twin)
    again.load_state_dict(state["opt"])
    for model, optimizer in ((net, opt), (twin, again)):
        torch.manual_seed(5)
        train(model, optimizer, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_step_has_the_effects_of_one_pass():
    net, plain = network(), network()
    opt = jp.optim.PlaneSearch(net.parameters(), net, search=Backtracking())
    torch.manual_seed(3)
    loss = opt.step(lambda: F.cross_entropy(net(X), Y))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(loss, F.cross_entropy(plain(X), Y).detach())
    assert torch.equal(after, torch.get_rng_state())
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# --- sources -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(Source):
    """One direction of the user's own."""

    tensors: tuple[torch.Tensor, ...]

    def directions(self, context):
        pairs = zip(context.places, self.tensors, strict=True)
        return jp.directions.StoredDirections({place: t.unsqueeze(0) for place, t in pairs})

    def remember(self, context, result):
        count = [s.get("count", torch.zeros(())) + 1 for s in context.state]
        return [{"count": n} for n in count]


def state_of(opt, name):
    """What is remembered of each parameter under a name."""
    return [opt.state[p].get(name) for group in opt.param_groups for p in group["params"]]


def spanned(opt):
    """The directions of the next plane, each as one vector."""
    moving = opt._moving()
    span = opt._spanned(opt._contexts(moving))
    found = [span.directions.draw(i, p).flatten(1) for i, (p, _, _) in enumerate(moving)]
    return torch.cat(found, 1), span


def test_the_plane_is_spanned_by_its_sources():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    idle = nn.Parameter(torch.ones(2))
    given = Given(tuple(torch.randn(p.shape) for p in (*net.parameters(), idle)))
    sources = [given, Averages((0.0, 0.5), scaled=False), PreviousStep(), Drawn(2)]
    opt = jp.optim.PlaneSearch([*net.parameters(), idle], net, subspace=sources)
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    opt.step(closure)
    assert opt.plane.slope.shape == (3,)  # the given one and two drawn ones
    first = [p.detach().clone() for p in net.parameters()]
    old = state_of(opt, "Averages/average 0.0")[:4]
    opt.step(closure)
    assert opt.plane.slope.shape == (6,)
    new, halves = state_of(opt, "Averages/average 0.0")[:4], state_of(opt, "Averages/average 0.5")
    steps = state_of(opt, "PreviousStep/step")
    for i, (p, b, a, c) in enumerate(zip(net.parameters(), first, old, new, strict=True)):
        torch.testing.assert_close(steps[i], p.detach() - b)
        torch.testing.assert_close(halves[i], a / 3 + 2 * c / 3)  # as one half to its square
    assert torch.equal(idle.detach(), torch.ones(2)) and OTHERS in opt.state["jetplane"]["gradient"]["plans"]
    assert [n.item() for n in state_of(opt, "Given/count")] == [2.0] * 5
    vectors, span = spanned(opt)
    torch.testing.assert_close(vectors[0], torch.cat([t.flatten() for t in given.tensors]))
    torch.testing.assert_close(vectors[1:4].norm(dim=1), torch.ones(3))
    size = sum(p.numel() for p in (*net.parameters(), idle))
    expected = [vectors[0].square().sum().item(), 1.0, 1.0, 1.0, size, size]
    assert span.squared_norms.tolist() == pytest.approx(expected)
    assert span.drawn == [4, 5]


def test_two_sources_of_one_kind_remember_apart():
    net = nn.Linear(6, 3)
    opt = jp.optim.PlaneSearch(net.parameters(), net, subspace=[Averages((0.5,)), Averages((0.9,), scaled=False)])
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(net(X), Y))
    assert sorted(opt.state[net.weight]) == [
        "Averages 2/average 0.9", "Averages 2/energy 0.9",
        "Averages/average 0.5", "Averages/energy 0.5", "Averages/square",
    ]  # fmt: skip


def test_scaled_averages_are_in_the_plane_as_well():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    opt = jp.optim.PlaneSearch(net.parameters(), net, subspace=[Averages((0.5,)), PreviousStep()])
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    for _ in range(2):
        opt.step(closure)
    average, *scaled, previous = spanned(opt)[0]
    mean, square = state_of(opt, "Averages/average 0.5")[1:], state_of(opt, "Averages/square")[1:]
    expected = torch.cat([(m / s.sqrt()).flatten() for m, s in zip(mean, square, strict=True)])
    for direction, group in zip(scaled, (slice(0, 5), slice(5, None)), strict=True):  # each layer for itself
        torch.testing.assert_close(direction[group], expected[group] / expected[group].norm())
        assert direction.count_nonzero() == direction[group].count_nonzero()
    opt.step(closure)
    assert opt.plane.slope.shape == (4,)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5]]),
        (2, [[0, 1, 2, 3, 4], [5]]),
        (3, [[0], [1, 2, 3, 4], [5]]),
        (4, [[0], [1, 2], [3, 4], [5]]),
        (9, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_the_first_layer_and_the_last_are_groups_of_their_own(groups, expected):
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)])
    params = list(reversed(list(net.parameters())))
    opt = jp.optim.PlaneSearch(params, net, subspace=[Averages((0.5,), groups=groups)])
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(net(X[:, :3]), Y))
    places = [int(name.split(".")[0]) for name, _ in reversed(list(net.named_parameters()))]
    vectors = spanned(opt)[0][1:].split([p.numel() for p in params], 1)
    moved = torch.stack([v.any(1) for v in vectors], 1).tolist()
    assert [sorted({layer for layer, yes in zip(places, row, strict=True) if yes}) for row in moved] == expected
    assert layer_groups(params, None, groups) == [0] * 12


# --- how much is held --------------------------------------------------------------------------------------


def held_bytes(value, seen):
    """Bytes of the tensors that are reachable from an object, each memory once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return 0 if storage.data_ptr() in seen else seen.add(storage.data_ptr()) or storage.nbytes()
    if isinstance(value, dict):
        return sum(held_bytes(v, seen) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(held_bytes(v, seen) for v in value)
    return held_bytes(vars(value), seen) if hasattr(value, "__dict__") and "jetplane" in type(value).__module__ else 0


def test_a_plane_of_what_is_remembered_holds_nothing_and_its_state_four_tensors_a_parameter():
    net = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())])
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    for _ in range(3):
        opt.step(lambda: F.mse_loss(net(torch.ones(8, 32)), torch.zeros(8, 32)))
    size = 4 * sum(p.numel() for p in net.parameters())
    states = [opt.state[p] for p in net.parameters()]
    assert held_bytes(states, set()) / size == pytest.approx(4.0, abs=0.1)
    contexts = opt._contexts(opt._moving())
    known = {t.untyped_storage().data_ptr() for state in states for t in state.values()}
    known |= {p.untyped_storage().data_ptr() for p in net.parameters()}
    span = opt._spanned(contexts)
    params = list(net.parameters())
    tangents = [span.directions.structured(i, p) for i, p in enumerate(params)]
    assert held_bytes(span, known) < 0.01 * size
    rows = [t.rows if hasattr(t, "rows") else range(t.shape[0]) for t in tangents]
    assert {len(r) for r in rows} == {5} and span.directions.k == 7  # in its own group alone


# --- estimates ---------------------------------------------------------------------------------------------


def test_estimates_do_not_come_from_the_batch_that_judges_them():
    """With labels that mean nothing the slope along the estimates is zero on average, as an unbiased one is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 10))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    opt = jp.optim.PlaneSearch(
        net.parameters(), net, lr=1e-12, subspace=[Averages((0.0,), scaled=False)], search=FullStep()
    )
    slopes = []
    for _ in range(400):
        x, y = torch.randn(16, 20), torch.randint(10, (16,))
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
        slopes.append(opt.plane.slope[0])
    slopes = torch.stack(slopes[1:])
    assert slopes.mean().abs() < 4 * slopes.std() / len(slopes) ** 0.5
    assert slopes.std() > 0.05


def test_forward_gradients_are_means_over_the_drawn_directions():
    net = nn.Linear(6, 3)
    opt = jp.optim.PlaneSearch(net.parameters(), subspace=[Drawn(4), Averages((0.0,), scaled=False)])
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    opt.step(closure)
    vectors = spanned(opt)[0]
    opt.step(closure)
    expected = opt.plane.slope[:4] @ vectors[:4] / 4
    found = torch.cat([t.flatten() for t in state_of(opt, "Averages/average 0.0")])
    torch.testing.assert_close(found, expected)


def test_what_learns_from_nothing_costs_no_estimates():
    net = network()
    calls = []
    opt = jp.optim.PlaneSearch(
        net.parameters(), net, subspace=Subspace([Drawn(4), PreviousStep()], "ggn"), search=FullStep(), audit="never"
    )
    for _ in range(2):
        opt.step(lambda: calls.append(1) or F.cross_entropy(net(X), Y))
    assert len(calls) == 2 and opt.plane.slope.shape == (5,)


@dataclass(frozen=True)
class Counted(Estimator):
    """Half of the gradient by reverse mode, and how often it was asked for."""

    def measure(self, batch: Batch, state):
        with torch.enable_grad():
            return [g / 2 for g in torch.autograd.grad(batch.closure(), list(batch.params))]

    def estimate(self, batch: Batch, means, state):
        return Estimate([2 * g for g in means], {"times": state.get("times", 0) + 1})


def test_an_estimator_of_your_own():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = jp.optim.PlaneSearch(net.parameters(), gradient=Counted(), subspace=[Averages((0.0,), scaled=False)])
    losses = [opt.step(lambda: F.cross_entropy(net(X), Y)).item() for _ in range(20)]
    expected = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
    opt.param_groups[0]["lr"] = 0.0
    opt.step(lambda: F.cross_entropy(net(X), Y))
    for found, exact in zip(state_of(opt, "Averages/average 0.0"), expected, strict=True):
        torch.testing.assert_close(found, exact)
    assert losses[-1] < 0.5 * losses[0] and opt.state_dict()["param_groups"][0]["jetplane"]["gradient"] == {"times": 21}


def test_layers_that_are_unfrozen_later_are_trained():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for p in net[0].parameters():
        p.requires_grad_(False)
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    train(net, opt, 3)
    assert set(opt.state["jetplane"]["gradient"]["plans"]) == {"2"}
    for p in net[0].parameters():
        p.requires_grad_(True)
    before = net[0].weight.detach().clone()
    train(net, opt, 1)
    late = opt.state[net[0].weight]  # begins with its first estimate, in full
    assert late["Averages/energy 0.9"].item() == pytest.approx(late["Averages/average 0.9"].square().sum().item())
    train(net, opt, 2)
    assert set(opt.state["jetplane"]["gradient"]["plans"]) == {"0", "2"}
    assert not torch.equal(net[0].weight.detach(), before)


# --- whole steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_all_directions_are_newtons_method(curvature):
    net = nn.Linear(3, 2).double()
    x, t = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    subspace = Subspace([Drawn(8)], curvature)
    opt = jp.optim.PlaneSearch(net.parameters(), subspace=subspace, descent="newton", search=FullStep())
    opt.step(lambda: F.mse_loss(net(x), t))
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], 1), t).solution
    torch.testing.assert_close(torch.cat([net.weight.mT, net.bias[None]]).detach(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "k"), [(10, 10), (10, 3), (50, 20)])
def test_functions_without_noise_never_rise(d, k):
    w = nn.Parameter(torch.full((d,), -0.5).double())
    opt = jp.optim.PlaneSearch([w], subspace=Subspace([Drawn(k), *REMEMBERED], "hessian"))
    losses = [opt.step(lambda: rosenbrock(w)).item() for _ in range(60)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < (1e-10 if k == d else 0.2 * losses[0])


def test_exact_line_search_leaves_a_minimum_alone():
    bad = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    opt = jp.optim.PlaneSearch([bad], subspace=Subspace([Drawn()], "hessian"), search=ExactLine(), audit="never")
    calls = []

    def rises():  # every pass but the one with jets finds the loss higher
        calls.append(1)
        return bad.square().sum() + (0 if len(calls) == 1 else 10)

    opt.step(rises)
    assert torch.equal(bad.detach(), torch.tensor([1.0, 2.0]).double())


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failing_closure_changes_nothing(call):
    """In the plane, in the look at the loss after the step, and in the estimate."""
    net = network().eval()
    opt = jp.optim.PlaneSearch(net.parameters(), net, audit="never")
    train(net, opt, 2)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError
        return F.cross_entropy(net(X), Y)

    before, structure = tree_flatten((copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())))
    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    after, now = tree_flatten((net.state_dict(), opt.state_dict()))
    assert structure == now
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all(not m._forward_hooks for m in net.modules())


def test_weight_decay_comes_before_the_step():
    for kind in (
        lambda w, decay: jp.optim.PlaneSearch([w], lr=0.5, weight_decay=decay, search=FullStep()),
        lambda w, decay: jp.optim.FoMoHKD([w], lr=0.5, weight_decay=decay, k=2),
    ):
        steps = {}
        for decay in (0.0, 0.2):
            w = nn.Parameter(torch.tensor([1.0, -2.0]).double())
            kind(w, decay).step(lambda w=w: F.mse_loss(w, torch.tensor([3.0, 4.0]).double()))
            steps[decay] = w.detach() - (1 - 0.5 * decay) * torch.tensor([1.0, -2.0])
        torch.testing.assert_close(steps[0.2], steps[0.0])


def test_the_loss_after_a_step_sees_the_random_numbers_of_the_plane():
    w, drawn = nn.Parameter(torch.ones(3)), []
    opt = jp.optim.PlaneSearch([w], subspace=Subspace(curvature="ggn"), search=Backtracking(), audit="never")

    def closure():
        drawn.append(torch.rand(()).item())
        return F.mse_loss(w, torch.zeros(3))

    for _ in range(2):
        opt.step(closure)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0] != drawn[2]


@pytest.mark.parametrize("loss", ["squares", "classes"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("gradient", [None, jp.gradients.LocalHeads()], ids=["perturbation", "heads"])
def test_batches_of_a_few_examples_do_not_diverge(loss, size, gradient):
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    x = torch.randn(256, 8)
    y = torch.tanh(x[:, :3]) if loss == "squares" else x[:, :3].argmax(1)
    of = F.mse_loss if loss == "squares" else F.cross_entropy
    opt = jp.optim.PlaneSearch(net.parameters(), net, gradient=gradient)
    before = of(net(x), y).item()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the spread of", jp.RescueWarning)
        for _ in range(150):
            batch = torch.randint(256, (size,))
            opt.step(lambda batch=batch: of(net(x[batch]), y[batch]))
    assert of(net(x), y).item() < 1.05 * before


def test_all_of_the_data_has_no_noise():
    """Four examples, in every step: exclusive or is learned to rounding."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x, y = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [1], [1], [0]])
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    losses = [opt.step(lambda: F.mse_loss(net(x), y)).item() for _ in range(60)]
    assert losses[-1] < 1e-6


def test_a_plane_without_curvature_is_not_stepped_along():
    """A softmax that rounds to 0 and 1 has a slope and no curvature."""
    net = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[300.0, 0.0], [-300.0, 0.0]]))
    x, y = torch.ones(64, 2), torch.ones(64, dtype=torch.long)
    opt = jp.optim.PlaneSearch(net.parameters(), net, subspace=jp.sources.Subspace(curvature="ggn"))
    before = net.weight.clone()
    with pytest.warns(jp.RescueWarning, match="curvature of a plane of .* is zero"):
        opt.step(lambda: F.cross_entropy(net(x), y))
    assert torch.equal(net.weight, before)


def test_a_closure_may_take_planes_in_parts():
    """Which steps have a plane is told before; parts of the batch, the same numbers up to rounding."""

    def trained(parts):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
        opt = jp.optim.PlaneSearch(net.parameters(), net, gradient=jp.gradients.LocalHeads())
        x, told, losses = X.double(), [], []

        def loss(size):
            pieces = zip(x.split(size), Y.split(size), strict=True)
            return torch.cat([F.cross_entropy(net(a), b, reduction="none") for a, b in pieces]).mean()

        for _ in range(33):
            told.append(opt.plane_next)
            size = parts if told[-1] else 128
            losses.append(opt.step(lambda size=size: loss(size)).item())
        return told, torch.tensor(losses)

    (told, whole), (_, halves) = trained(128), trained(64)
    assert [i for i, plane in enumerate(told) if plane] == [15, 31]
    torch.testing.assert_close(halves, whole, rtol=1e-9, atol=0)
    assert jp.optim.PlaneSearch([torch.nn.Parameter(torch.ones(2))]).plane_next


def test_steps_are_clipped_by_their_joint_norm():
    pair = [nn.Parameter(torch.zeros(3).double()), nn.Parameter(torch.zeros(2).double())]
    loss = lambda: F.mse_loss(torch.cat(list(pair)), torch.full((5,), 10.0).double())  # noqa: E731
    for opt in (jp.optim.PlaneSearch(pair, clip=1.0, search=FullStep()), jp.optim.FoMoHKD(pair, k=5, lr=1.0, clip=1.0)):
        before = torch.cat([p.detach() for p in pair])
        opt.step(loss)
        assert (torch.cat([p.detach() for p in pair]) - before).norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"clip": 0.1}, {"lr": 0.1}])
def test_short_steps_are_held_against_what_they_promise(settings):
    """A quadratic keeps every promise: nothing is damped, however much the step is shortened."""
    net = nn.Linear(6, 3).double()
    opt = jp.optim.PlaneSearch(net.parameters(), subspace=[Drawn(5)], **settings)
    for _ in range(3):
        opt.step(lambda: F.mse_loss(net(X.double()), F.one_hot(Y).double()))
    assert opt.state["jetplane"]["search"]["damping"] == 0.0


def test_drawn_directions_are_damped_by_their_length():
    """That of a drawn direction is the root of the number of parameters, of a remembered one 1."""
    net = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    opt = jp.optim.PlaneSearch(net.parameters(), subspace=[Drawn(3), *REMEMBERED])
    closure = lambda: F.cross_entropy(net(X.double()), Y)  # noqa: E731
    for _ in range(2):
        opt.step(closure)
    size = sum(p.numel() for p in net.parameters())
    assert spanned(opt)[1].squared_norms.tolist() == [size] * 3 + [1.0] * 5


def test_frozen_parameters_stay_and_groups_have_their_own_rate():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}]
    opt = jp.optim.PlaneSearch(groups, net, search=FullStep())
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(net(X), Y))
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [False, True, False, False]


def test_layers_that_are_frozen_or_unfrozen_later_are_planned_anew():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(64, 4), torch.randint(2, (64,))
    net[0].requires_grad_(False)
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    first = [p.clone() for p in net[0].parameters()]
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(net(x), y))
    assert all(torch.equal(a, b) for a, b in zip(first, net[0].parameters(), strict=True))
    net[0].requires_grad_(True)
    net[2].requires_grad_(False)
    last = [p.clone() for p in net[2].parameters()]
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(net(x), y))
    assert not any(torch.equal(a, b) for a, b in zip(first, net[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(last, net[2].parameters(), strict=True))
    assert set(opt.state["jetplane"]["gradient"]["plans"]) == {"0"}


def test_few_parameters_are_all_moved():
    w = nn.Parameter(torch.ones(3))
    opt = jp.optim.PlaneSearch([w])
    opt.step(lambda: F.mse_loss(w, torch.zeros(3)))
    assert torch.equal(spanned(opt)[0], torch.eye(3))
    with pytest.raises(jp.ArgumentError, match="exceed"):
        jp.optim.PlaneSearch([w], subspace=[Drawn(4)])


def test_the_default_parts():
    net, opts = nn.Linear(6, 3), {}
    for name, settings in {
        "model": {"model": net},
        "drawn": {},
        "exact": {"subspace": Subspace(curvature="hessian")},
    }.items():
        opts[name] = jp.optim.PlaneSearch(net.parameters(), **settings)
    assert opts["model"].subspace == (Averages(), PreviousStep()) and opts["model"].gradient == ActivityPerturbation()
    assert opts["drawn"].subspace == (Drawn(), Averages(), PreviousStep())
    assert opts["drawn"].gradient == opts["exact"].gradient == ForwardGradients()
    # Whole steps of drawn directions are noise; of averages over many batches at least a tenth is worth going.
    assert [opt.search.floor for opt in opts.values()] == [0.1, 1e-3, 1e-3]
    assert [opt.search.otherwise for opt in opts.values()] == [Backtracking(), Backtracking(), ExactLine(10)]
    assert [opt.descent for opt in opts.values()] == [Damped(scaled=True), Damped(scaled=True), SaddleFree(None)]


def test_models_that_can_hardly_be_perturbed_have_directions_drawn():
    lstm = nn.ModuleList([nn.LSTM(3, 16), nn.Linear(16, 2)])
    mlp = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 2))
    draws = lambda model: Drawn() in jp.optim.PlaneSearch(model.parameters(), model).subspace  # noqa: E731
    assert [draws(model) for model in (lstm, mlp)] == [True, False]
    for p in mlp[0].parameters():
        p.requires_grad_(False)  # what stands still does not count
    assert not draws(mlp)


W = [nn.Parameter(torch.ones(3))]
BAD = {
    "nothing to learn from": (
        lambda: jp.optim.PlaneSearch(W, subspace=REMEMBERED), jp.ArgumentError, "has none: add jetplane.sources.Drawn"
    ),
    "no source": (lambda: Subspace([]), jp.ArgumentError, "at least one Source"),
    "no sources": (lambda: jp.optim.PlaneSearch(W, subspace=[3]), jp.ArgumentError, "at least one Source"),
    "rate": (lambda: jp.optim.PlaneSearch(W, lr=-1.0), jp.ArgumentError, "lr"),
    "search": (lambda: jp.optim.PlaneSearch(W, search="fast"), jp.ArgumentError, "instance of Search"),
    "gradient": (lambda: jp.optim.PlaneSearch(W, gradient=3), jp.ArgumentError, "instance of Estimator"),
    "gradient without a model": (
        lambda: jp.optim.PlaneSearch(W, gradient=ActivityPerturbation()), jp.ArgumentError, "needs the model"
    ),
    "curvature": (lambda: Subspace(curvature="none"), jp.ArgumentError, "curvature"),
    "averages": (lambda: Averages((1.0,)), jp.ArgumentError, "decays"),
    "no averages": (lambda: Averages(()), jp.ArgumentError, "at least one"),
    "groups": (lambda: Averages(groups=0), jp.ArgumentError, "groups"),
    "passes": (lambda: ActivityPerturbation(passes=0), jp.ArgumentError, "passes"),
    "descent": (lambda: jp.optim.PlaneSearch(W, descent=CurvatureScaled()), jp.ArgumentError, "CurvatureScaled"),
    "structure": (lambda: Drawn(tangents="sparse"), jp.ArgumentError, "density"),
    "no loss function": (
        lambda: jp.optim.PlaneSearch(W, subspace=Subspace([Drawn(1)], "ggn")).step(lambda: (X[:, :3] @ W[0]).sum()),
        jp.UnknownLossError, "loss function",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    build, error, message = BAD[name]
    with pytest.raises(error, match=message):
        build()


# --- beside torch's own helpers ----------------------------------------------------------------------------


def test_copies_step_as_the_original():
    net = network()
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    train(net, opt, 2)
    both, twin = copy.deepcopy((net, opt)), (net, opt)
    found = []
    for model, optimizer in (both, twin):
        torch.manual_seed(5)
        found.append(train(model, optimizer, 2, seed=1))
    assert found[0] == found[1]


def test_another_search_begins_anew():
    net = network()
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    train(net, opt, 2)
    opt.search = FullStep()
    train(net, opt, 1)
    assert opt.state["jetplane"]["search"] == {}
    opt.search = NoiseAware()
    train(net, opt, 1)
    assert opt.state["jetplane"]["search"]["signal"] > 0


def test_a_schedule_of_torch_drives_the_rate():
    nets = [nn.Linear(6, 3), nn.Linear(6, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [jp.optim.PlaneSearch(net.parameters(), net, search=FullStep()) for net in nets]
    schedule = torch.optim.lr_scheduler.StepLR(opts[0], step_size=1, gamma=0.5)
    for expected in (0.5, 0.25):
        for net, opt in zip(nets, opts, strict=True):
            opt.step(lambda net=net: F.cross_entropy(net(X), Y))
        schedule.step()
        assert schedule.get_last_lr() == [expected]
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            q.data.copy_(p)
            opts[1].state[q] = {name: value.clone() for name, value in opts[0].state[p].items()}
        before = nets[0].weight.detach().clone()
        for net, opt in zip(nets, opts, strict=True):
            opt.step(lambda net=net: F.cross_entropy(net(X), Y))
        torch.testing.assert_close(nets[0].weight - before, expected * (nets[1].weight - before))
        nets[1].load_state_dict(nets[0].state_dict())
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            opts[1].state[q] = {name: value.clone() for name, value in opts[0].state[p].items()}


def test_averaged_weights_for_evaluation():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    seen = []
    for _ in range(4):
        opt.step(lambda: F.cross_entropy(net(X), Y))
        averaged.update_parameters(net)
        seen.append(net[0].weight.detach().clone())
    torch.testing.assert_close(averaged.module[0].weight.detach(), torch.stack(seen).mean(0))
    assert torch.equal(net[0].weight.detach(), seen[-1])


def test_few_parameters_of_a_model_take_little_memory():
    net = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Linear(50, 2))
    assert jp.optim.PlaneSearch(net.parameters(), net).chunk is None
    net[0].requires_grad_(False)
    head = list(net[1].parameters())
    assert jp.optim.PlaneSearch(head, net).chunk == 1
    assert jp.optim.PlaneSearch(head, net, subspace=Subspace(chunk=2)).chunk == 2
    assert jp.optim.PlaneSearch(head, net, subspace=Subspace(curvature="hessian")).chunk is None


@pytest.mark.parametrize(("model", "count"), [(True, 1), (False, 40)])
def test_it_goes_on_where_the_loss_has_come_to_zero(model, count):
    """Steps without effect raise nothing, and the parameters stay finite."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(count, 10), torch.randint(0, 3, (count,))
    opt = jp.optim.PlaneSearch(net.parameters(), net if model else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jp.RescueWarning)
        losses = [opt.step(lambda: F.cross_entropy(net(x), y)).item() for _ in range(48)]
        assert losses[-1] < 1e-6
        opt.step(lambda: 1 * F.cross_entropy(net(x), y))  # another closure, which is audited
    assert all(bool(p.isfinite().all()) for p in net.parameters())
