"""PlaneSearch: what spans its plane, what it remembers, and that it trains without a rate."""

import copy
import io

import pytest
import torch
from cases import rosenbrock
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.gradients.perturbation import OTHERS
from jetplane.optim import plane_search
from jetplane.optim.plane_search import AVERAGE, PREVIOUS
from jetplane.subspace.descent import CurvatureScaled
from jetplane.subspace.search import AdaptiveCubic, Backtracking, ExactLine, NoiseAware, TrustRegion, Whole

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
        losses.append(opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y)).item())
    return losses


SETTINGS = {
    "memory": lambda net: jp.optim.PlaneSearch(net.parameters(), net),
    "memory and noise": lambda net: jp.optim.PlaneSearch(net.parameters(), net, k=4, weight_decay=1e-4),
    "drawn": lambda net: jp.optim.PlaneSearch(net.parameters(), k=16),
    "exact curvature": lambda net: jp.optim.PlaneSearch(net.parameters(), net, curvature="hessian", clip=1.0),
    "a rate": lambda net: jp.optim.PlaneSearch(net.parameters(), net, rate=0.3),
    "line search": lambda net: jp.optim.PlaneSearch(net.parameters(), net, rate=Backtracking()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_trains_without_a_rate(name):
    net = network()
    losses = train(net, SETTINGS[name](net), 120)
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
    opt = jp.optim.PlaneSearch(net.parameters(), net, rate=Backtracking())
    torch.manual_seed(3)
    loss = opt.step(lambda: F.cross_entropy(net(X), Y))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(loss, F.cross_entropy(plain(X), Y).detach())
    assert torch.equal(after, torch.get_rng_state())
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_plane_is_spanned_by_what_is_remembered():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    idle = nn.Parameter(torch.ones(2))
    guess = [torch.randn(p.shape) for p in (*net.parameters(), idle)]
    opt = jp.optim.PlaneSearch(
        [*net.parameters(), idle], net, k=2, averages=(0.0, 0.5), scaled=False, guess=lambda: guess
    )
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    opt.step(closure)
    assert opt.plane.slope.shape == (3,)  # the guess and two drawn ones
    first = [p.detach().clone() for p in net.parameters()]
    old = [opt.state[p][AVERAGE.format(0.0)] for p in net.parameters()]
    opt.step(closure)
    assert opt.plane.slope.shape == (6,)
    new = [opt.state[p][AVERAGE.format(0.0)] for p in net.parameters()]
    for p, b, a, c in zip(net.parameters(), first, old, new, strict=True):
        torch.testing.assert_close(opt.state[p][PREVIOUS], p.detach() - b)
        torch.testing.assert_close(opt.state[p][AVERAGE.format(0.5)], a / 3 + 2 * c / 3)  # as one half to its square
    assert torch.equal(idle.detach(), torch.ones(2)) and OTHERS in opt.state["jetplane"]["shares"]
    stored = opt._stored(opt._moving())
    norms = [torch.cat([t.flatten() for t in direction]).norm() for direction in stored]
    torch.testing.assert_close(torch.stack(norms), torch.ones(4))


def test_scaled_averages_are_in_the_plane_as_well():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    opt = jp.optim.PlaneSearch(net.parameters(), net, averages=(0.5,))
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    for _ in range(2):
        opt.step(closure)
    average, previous, *scaled = opt._stored(opt._moving())
    mean = [opt.state[p][AVERAGE.format(0.5)] for p, _, _ in opt._moving()]
    square = [opt.state[p]["square"] for p, _, _ in opt._moving()]
    expected = torch.cat([(m / s.sqrt()).flatten() for m, s in zip(mean, square, strict=True)])
    for cut, part in zip(scaled, (slice(0, 5), slice(5, None)), strict=True):  # each layer's part for itself
        direction = torch.cat([t.flatten() for t in cut])
        torch.testing.assert_close(direction[part], expected[part] / expected[part].norm())
        assert direction.count_nonzero() == direction[part].count_nonzero()
    opt.step(closure)
    assert opt.plane.slope.shape == (4,)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5]]),
        (2, [[0, 1, 2, 3, 4], [5]]),
        (3, [[0], [1, 2, 3, 4], [5]]),
        (4, [[0], [1, 2], [3, 4], [5]]),
        (9, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_the_first_layer_and_the_last_are_parts_of_their_own(parts, expected):
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)])
    opt = jp.optim.PlaneSearch(reversed(list(net.parameters())), net, parts=parts, averages=(0.5,), previous=False)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(net(X[:, :3]), Y))
    places = [int(name.split(".")[0]) for name, _ in reversed(list(net.named_parameters()))]
    directions = opt._stored(opt._moving())[1:]
    found = [sorted({layer for layer, t in zip(places, d, strict=True) if bool(t.any())}) for d in directions]
    assert found == expected
    assert len(jp.optim.PlaneSearch(net.parameters(), k=2, parts=parts)._parts(opt._moving())) == 12


def test_estimates_do_not_come_from_the_batch_that_judges_them():
    """With labels that mean nothing the slope along the estimates is zero on average, as an unbiased one is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 10))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    opt = jp.optim.PlaneSearch(net.parameters(), net, averages=(0.0,), scaled=False, rate=1e-12)
    slopes = []
    for _ in range(400):
        x, y = torch.randn(16, 20), torch.randint(10, (16,))
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
        slopes.append(opt.plane.slope[0])
    slopes = torch.stack(slopes[1:])
    assert slopes.mean().abs() < 4 * slopes.std() / len(slopes) ** 0.5
    assert slopes.std() > 0.05


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_all_directions_are_newtons_method(curvature):
    net = nn.Linear(3, 2).double()
    x, t = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    opt = jp.optim.PlaneSearch(net.parameters(), k=8, curvature=curvature, descent="newton", rate=1.0)
    opt.step(lambda: F.mse_loss(net(x), t))
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], 1), t).solution
    torch.testing.assert_close(torch.cat([net.weight.mT, net.bias[None]]).detach(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "k"), [(10, 10), (10, 3), (50, 20)])
def test_functions_without_noise_never_rise(d, k):
    w = nn.Parameter(torch.full((d,), -0.5).double())
    opt = jp.optim.PlaneSearch([w], k=k, curvature="hessian")
    losses = [opt.step(lambda: rosenbrock(w)).item() for _ in range(60)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < (1e-10 if k == d else 0.2 * losses[0])


def test_a_failing_estimate_changes_nothing():
    net = network().eval()
    opt = jp.optim.PlaneSearch(net.parameters(), net, audit="never")
    train(net, opt, 2)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        return F.cross_entropy(net(X), Y)

    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert str(state) == str(opt.state_dict())
    assert all(not m._forward_hooks for m in net.modules())


def test_frozen_parameters_stay_and_groups_have_their_own_rate():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}]
    opt = jp.optim.PlaneSearch(groups, net, rate=Whole())
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(net(X), Y))
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [False, True, False, False]


def test_few_parameters_are_all_moved():
    w = nn.Parameter(torch.ones(3))
    assert jp.optim.PlaneSearch([w]).k == 3
    with pytest.raises(jp.ArgumentError, match="exceed"):
        jp.optim.PlaneSearch([w], k=4)


def test_models_that_can_hardly_be_perturbed_have_directions_drawn():
    lstm = nn.ModuleList([nn.LSTM(3, 16), nn.Linear(16, 2)])
    mlp = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 2))
    assert [jp.optim.PlaneSearch(model.parameters(), model).k for model in (lstm, mlp)] == [64, 0]
    for p in mlp[0].parameters():
        p.requires_grad_(False)  # what stands still does not count
    assert jp.optim.PlaneSearch(mlp.parameters(), mlp).k == 0


W = [nn.Parameter(torch.ones(3))]
BAD = {
    "nothing to learn from": (lambda: jp.optim.PlaneSearch(W, k=0), jp.ArgumentError, "k must be positive"),
    "rate": (lambda: jp.optim.PlaneSearch(W, k=1, rate="fast"), jp.ArgumentError, "rate"),
    "negative rate": (lambda: jp.optim.PlaneSearch(W, k=1, rate=-1.0), jp.ArgumentError, "lr"),
    "curvature": (lambda: jp.optim.PlaneSearch(W, k=1, curvature="none"), jp.ArgumentError, "curvature"),
    "averages": (lambda: jp.optim.PlaneSearch(W, k=1, averages=(1.0,)), jp.ArgumentError, "averages"),
    "parts": (lambda: jp.optim.PlaneSearch(W, k=1, parts=0), jp.ArgumentError, "parts"),
    "passes": (lambda: jp.optim.PlaneSearch(W, k=1, passes=0), jp.ArgumentError, "passes"),
    "descent": (lambda: jp.optim.PlaneSearch(W, k=1, descent=CurvatureScaled()), jp.ArgumentError, "CurvatureScaled"),
    "structure": (lambda: jp.optim.PlaneSearch(W, k=1, tangents="sparse"), jp.ArgumentError, "density"),
    "guess of another shape": (
        lambda: jp.optim.PlaneSearch(W, k=1, guess=lambda: [torch.ones(2)]).step(lambda: F.mse_loss(W[0], X[0, :3])),
        jp.ShapeError,
        "guess",
    ),
    "guess of another type": (
        lambda: jp.optim.PlaneSearch(W, k=1, guess=lambda: [torch.ones(3).double()]).step(lambda: W[0].sum()),
        jp.DTypeError,
        "guess",
    ),
    "no loss function": (
        lambda: jp.optim.PlaneSearch(W, k=1).step(lambda: (X[:, :3] @ W[0]).sum()), jp.LossError, "loss function",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    build, error, message = BAD[name]
    with pytest.raises(error, match=message):
        build()


# --- structures of the drawn directions, lazy curvature, and torch's own helpers -----------------------------

NEW = {
    "low-rank": {"tangents": "low-rank", "rank": 2},
    "sparse": {"tangents": "sparse", "density": 0.5},
    "block": {"tangents": "block"},
    "dense": {"tangents": "dense"},
    "orthogonal": {"tangents": "dense", "orthogonal": True},
    "orthogonal rank-one": {"orthogonal": True},
    "preconditioned": {"preconditioned": True},
    "preconditioned and orthogonal": {"preconditioned": True, "orthogonal": True},
    "noise by eigenvector": {"rate": NoiseAware(each=True)},
    "truncated": {"descent": "truncated"},
}


@pytest.mark.parametrize("with_model", [False, True], ids=["weights", "layers"])
@pytest.mark.parametrize("name", NEW)
def test_settings_train_and_resume(name, with_model):
    build = lambda net: jp.optim.PlaneSearch(net.parameters(), net if with_model else None, k=8, **NEW[name])  # noqa: E731
    net, twin = network(), network()
    opt = build(net)
    losses = train(net, opt, 40)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    cut = 2 if with_model else 0  # the first scaled average is in three parts
    assert opt.plane.slope.shape == (13 + cut,)  # the previous step and two averages, plain and scaled, beside 8
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin.load_state_dict(state["net"])
    again = build(twin)
    again.load_state_dict(state["opt"])
    for model, optimizer in ((net, opt), (twin, again), (copy.deepcopy(net), None)):
        if optimizer is not None:
            torch.manual_seed(5)
            train(model, optimizer, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
    copied = copy.deepcopy(opt)
    assert all(getattr(copied, n) == getattr(opt, n) for n in ("rank", "density", "orthogonal", "preconditioned"))


def test_preconditioned_directions_estimate_the_gradient_all_the_same():
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    goal = torch.tensor([4.0, 4.0, -4.0, 8.0])
    closure = lambda: (goal * w).sum() + 0 * w.square().sum()  # noqa: E731
    total = torch.zeros(4)
    for seed in range(500):
        opt = jp.optim.PlaneSearch(
            [w], k=2, curvature="hessian", descent="cubic", preconditioned=True, averages=(0.5,), seed=seed, rate=0.0
        )
        opt.state[w].update({AVERAGE.format(0.5): torch.zeros(4), "square": torch.tensor([1.0, 16.0, 0.25, 4.0])})
        opt.step(closure)
        total += opt.state[w][AVERAGE.format(0.5)]  # the first estimate, whatever stood there
    scale = torch.tensor([1.0, 0.25, 2.0, 0.5])
    deviation = (scale * goal).norm() / scale / 1000**0.5  # of a mean of 1000 (F v / scale), nearly
    assert bool(((total / 500 - goal).abs() < 4 * deviation).all())


def test_curvature_is_kept_for_a_few_steps():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = jp.optim.PlaneSearch(net.parameters(), net, every=3)
    closure = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    kept, losses = [], []
    for _ in range(13):
        losses.append(opt.step(closure).item())
        kept.append(opt.plane.curvature)
    same = [a is b or torch.equal(a, b) for a, b in zip(kept, kept[1:], strict=False) if a.shape == b.shape]
    # Step 0 has a drawn direction, step 1 the remembered ones for the first time; then steps 3, 6, 9, 12 are fresh.
    assert same == [step % 3 != 0 for step in range(2, 13)]
    assert losses[-1] < losses[0]
    slopes_only = jp.optim.PlaneSearch(
        [w := nn.Parameter(torch.full((4,), -0.5).double())], k=4, curvature="hessian", every=2
    )
    values = [slopes_only.step(lambda: rosenbrock(w)).item() for _ in range(80)]
    assert values[-1] < 1e-10 and all(b <= a for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("settings", [{"k": 8}, {"k": 0, "guess": lambda: []}], ids=["drawn", "guess"])
def test_curvature_of_changing_directions_is_not_kept(settings):
    net = network()
    with pytest.raises(jp.ArgumentError, match="every = 2"):
        jp.optim.PlaneSearch(net.parameters(), net, every=2, **settings)


def test_a_schedule_of_torch_drives_the_rate():
    nets = [nn.Linear(6, 3), nn.Linear(6, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [jp.optim.PlaneSearch(net.parameters(), net, rate=Whole()) for net in nets]
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


@pytest.mark.parametrize("rate", [ExactLine(), TrustRegion(), TrustRegion(metric="plane"), AdaptiveCubic()], ids=repr)
def test_searches_go_down_and_leave_a_minimum_alone(rate):
    w = nn.Parameter(torch.full((6,), -0.5).double())
    opt = jp.optim.PlaneSearch([w], k=6, curvature="hessian", rate=rate)
    losses = [opt.step(lambda: rosenbrock(w)).item() for _ in range(60)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < 1e-10
    bad = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    opt = jp.optim.PlaneSearch([bad], k=2, curvature="hessian", rate=rate, audit="never")
    calls = []

    def rises():  # every pass but the one with jets finds the loss higher
        calls.append(1)
        return bad.square().sum() + (0 if len(calls) % 100 == 1 else 10)

    opt.step(rises)
    assert torch.equal(bad.detach(), torch.tensor([1.0, 2.0]).double())


@pytest.mark.parametrize("settings", [{}, {"k": 3}, {"curvature": "hessian"}])
def test_compiled_steps_are_those_of_eager_ones(settings, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile(f, **k, backend="aot_eager"))
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        opt = jp.optim.PlaneSearch(net.parameters(), net, compile=compiled, **settings)
        losses.append(train(net, opt, 6))
        assert opt.plane.examples is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # steps amplify rounding
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


# --- averages of noise, models that do not hold, and models of which little moves -----------------------------


def test_averages_of_noise_count_for_little():
    torch.manual_seed(0)
    state, signal = {}, torch.full((200,), 0.1)
    worth = {}
    for name, part in {"noise": 0.0, "signal": 1.0}.items():
        params = [torch.nn.Parameter(torch.zeros(200))]
        opt = jp.optim.PlaneSearch(params, k=1)
        found = []
        for n in range(50):
            opt._remember(params, [part * signal + 0.1 * torch.randn(200)], [], n)
            found.append([plane_search._worth(opt.state[params[0]], b, n + 1) for b in opt.averages])
        worth[name] = found
        state = opt.state[params[0]]
        alone = state["alone 0.9"].item() / state["average 0.9"].square().sum().item()
        assert (alone > 0.8) == (name == "noise")
    assert worth["noise"][0] == [1.0, 1.0]  # of one estimate nothing is known
    assert sum(sum(w) for w in worth["noise"][20:]) / 60 < 0.3
    assert all(w == [1.0, 1.0] for w in worth["signal"][10:])


def test_few_parameters_of_a_model_take_little_memory():
    net = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Linear(50, 2))
    assert jp.optim.PlaneSearch(net.parameters(), net).chunk is None
    net[0].requires_grad_(False)
    head = list(net[1].parameters())
    assert jp.optim.PlaneSearch(head, net).chunk == 1
    assert jp.optim.PlaneSearch(head, net, chunk=2).chunk == 2
    assert jp.optim.PlaneSearch(head, net, curvature="hessian").chunk is None
