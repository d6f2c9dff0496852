"""Optimizers: what a step is, what stays when it fails, and resuming bit for bit."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import rosenbrock
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.evaluation.side_effects import without_side_effects
from jetplane.subspace.descent import SaddleFree

ALL = {
    "fgd": lambda p, **k: jp.optim.FGD(p, lr=0.01, k=2, **k),
    "fomoh": lambda p, **k: jp.optim.FoMoH(p, lr=0.1, k=2, **k),
    "fomoh-kd": lambda p, **k: jp.optim.FoMoHKD(p, lr=0.1, k=2, descent="saddle-free", **k),
    "plane-search": lambda p, **k: jp.optim.PlaneSearch(p, subspace=[jp.sources.Drawn(2), jp.sources.Averages()], **k),
    "fomoh-bp": lambda p, **k: jp.optim.FoMoHBP(
        p, lr=0.1, **{n: v for n, v in k.items() if n not in ("seed", "planes")}
    ),
}
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 4, generator=G), torch.randint(0, 3, (16,), generator=G)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def closure(net):
    return lambda: F.cross_entropy(net(X), Y)


def snapshot(net, opt):
    return [t.clone() for t in net.state_dict().values()], copy.deepcopy(opt.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_trains(name):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    opt = ALL[name](net.parameters())
    losses = [opt.step(closure(net)).item() for _ in range(200)]
    assert losses[-1] < 0.95 * losses[0]
    assert opt.plane.value.item() == losses[-1]


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_a_plain_tensor_and_schedulers_drive_the_rate(name):
    net = network()
    opt = ALL[name](net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    loss = opt.step(closure(net))
    assert type(loss) is torch.Tensor and loss.shape == () and not loss.requires_grad
    rate = opt.param_groups[0]["lr"]
    scheduler.step()
    assert opt.param_groups[0]["lr"] == rate / 2


@pytest.mark.parametrize("name", ALL)
def test_resumes_bit_for_bit(name):
    net = network()
    opt = ALL[name](net.parameters())
    for _ in range(3):
        opt.step(closure(net))
    other = network()
    other.load_state_dict(net.state_dict())
    again = ALL[name](other.parameters())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for model, optimizer in ((net, opt), (other, again)):
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.step(closure(model))
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("fails", "error"),
    [
        (lambda net: 1 / 0, ZeroDivisionError),
        (lambda net: net(X), jp.LossError),
        (lambda net: net(X).sum() * float("nan"), jp.NonFiniteError),
        (lambda net: torch.zeros((), requires_grad=True) * 1, jp.UnusedParametersError),
    ],
)
def test_a_failing_closure_changes_nothing(name, fails, error):
    net = network()
    opt = ALL[name](net.parameters())
    opt.step(closure(net))
    net.eval()
    before, state = snapshot(net, opt)
    also = {"fomoh-bp": RuntimeError, "plane-search": jp.LossError}.get(name, error)  # what comes first
    with pytest.raises((error, also)):
        opt.step(lambda: fails(net))
    after, state_after = snapshot(net, opt)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert str(state) == str(state_after)


@pytest.mark.parametrize("name", [name for name in ALL if name != "plane-search"])  # it may refuse half a step
def test_frozen_parameters_stay_and_groups_have_their_own_rate(name):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    net[0].weight.requires_grad_(False)
    opt = ALL[name]([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}])
    before = [p.detach().clone() for p in net.parameters()]
    opt.step(closure(net))
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [False, True, False, False]


def test_freezing_does_not_change_the_directions_of_others():
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].weight.requires_grad_(False)
    opts = [jp.optim.FGD(net.parameters(), lr=0.1) for net in nets]
    tangents = [
        opt._directions(opt._moving(), lambda: None).draw(len(opt._moving()) - 1, net.bias)
        for opt, net in zip(opts, nets, strict=True)
    ]
    assert torch.equal(*tangents)


def test_tied_weights_move_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    net = Tied().double()
    w = net.a.weight
    opt = jp.optim.FoMoHKD(net.parameters(), k=16)
    plain = w.detach().clone()
    x = X.double()
    loss = lambda v: (x @ v.T @ v.T).square().mean() + v.square().sum()  # noqa: E731
    gradient, hessian = torch.func.grad(loss)(plain), torch.func.hessian(loss)(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: net(x).square().mean() + net.a.weight.square().sum())
    step = torch.linalg.solve(hessian.reshape(16, 16), gradient.reshape(16)).reshape(4, 4)
    torch.testing.assert_close(w.detach(), plain - step, rtol=1e-6, atol=1e-8)


def test_newton_reaches_the_minimum_of_a_quadratic_in_one_step():
    d = 6
    a = torch.randn(d, d).double()
    a, b = a @ a.T + torch.eye(d), torch.randn(d).double()
    w = nn.Parameter(torch.randn(d).double())
    jp.optim.FoMoHKD([w], k=d).step(lambda: 0.5 * w @ a @ w - b @ w)
    torch.testing.assert_close(w.detach(), torch.linalg.solve(a, b), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("d", [2, 10])
@pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")
def test_newton_iterates_on_rosenbrock(d):
    w = nn.Parameter(torch.full((d,), -0.5).double())
    x = w.detach().clone()
    opt = jp.optim.FoMoHKD([w], k=d)
    for _ in range(12):
        gradient, hessian = torch.func.grad(rosenbrock)(x), torch.func.hessian(rosenbrock)(x)
        x = x - torch.linalg.solve(hessian, gradient)
        opt.step(lambda: rosenbrock(w))
        torch.testing.assert_close(w.detach(), x, rtol=1e-6, atol=1e-8)


def test_more_directions_descend_faster_on_rosenbrock():
    ends = []
    for k in (2, 5, 10):
        w = nn.Parameter(torch.zeros(10).double())
        opt = jp.optim.FoMoHKD([w], k=k, descent="saddle-free")
        for _ in range(60):
            opt.step(lambda w=w: rosenbrock(w))
        ends.append(rosenbrock(w).item())
    assert ends[0] > ends[1] > ends[2]


def test_planes_are_averaged():
    net = nn.Linear(4, 3).double()
    x = X.double()
    loss = lambda: F.cross_entropy(net(x), Y)  # noqa: E731
    before = [p.detach().clone() for p in net.parameters()]
    opt = jp.optim.FoMoHKD(net.parameters(), k=2, planes=3, descent="saddle-free")
    directions = opt._directions(opt._moving(), lambda: None)
    tangents = [directions.draw(i, p) for i, p in enumerate(net.parameters())]
    expected = [torch.zeros_like(b) for b in before]
    for n in range(3):
        part = [t[2 * n : 2 * n + 2] for t in tangents]
        plane = jp.evaluate(loss, list(net.parameters()), part)
        kappa = SaddleFree()(plane.slope, plane.curvature) / 3
        expected = [e + torch.tensordot(kappa, t, 1) for e, t in zip(expected, part, strict=True)]
    opt.step(loss)
    for p, b, e in zip(net.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach() - b, e)


def test_clipping_and_decoupled_weight_decay():
    w = nn.Parameter(torch.ones(5).double())
    jp.optim.FGD([w], lr=1e3, clip=0.25).step(lambda: w.square().sum())
    assert abs((w.detach() - 1).norm().item() - 0.25) < 1e-9
    w = nn.Parameter(torch.ones(5).double())
    jp.optim.FoMoH([w], lr=0.1, weight_decay=0.5, clip=1e-12).step(lambda: w.square().sum())
    torch.testing.assert_close(w.detach(), torch.full((5,), 0.95).double())


def test_bp_moves_buffers_once_and_sees_one_dropout_mask():
    net, plain = network(), network()
    opt = jp.optim.FoMoHBP(net.parameters(), lr=0.0)
    torch.manual_seed(3)
    loss = opt.step(closure(net))
    torch.manual_seed(3)
    expected = closure(plain)()
    torch.testing.assert_close(loss, expected.detach())
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    gradient = torch.autograd.grad(closure(plain)(), list(plain.parameters()))  # another mask: only sizes match
    assert opt.plane is not None and opt.plane.slope.item() > 0 and len(gradient) == 6


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original(name, how):
    net = nn.Linear(4, 3)
    opt = ALL[name](net.parameters(), clip=0.5)
    opt.step(closure(net))
    twin, again = how((net, opt))
    for model, optimizer in ((net, opt), (twin, again)):
        optimizer.step(closure(model))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_a_state_that_was_handed_out_does_not_move_on():
    net = nn.Linear(4, 3)
    opt = jp.optim.FGD(net.parameters())
    state = opt.state_dict()
    opt.step(closure(net))
    assert state["param_groups"][0]["jetplane"]["step"] == 0
    assert opt.state_dict()["param_groups"][0]["jetplane"]["step"] == 1


@pytest.mark.parametrize("name", ["fgd", "fomoh", "fomoh-kd", "plane-search"])
def test_parameters_without_a_part_in_the_loss_stay(name):
    net, idle = nn.Linear(4, 3), nn.Parameter(torch.ones(5))
    ALL[name]([idle, *net.parameters()], weight_decay=0.1).step(closure(net))
    assert torch.equal(idle.detach(), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_may_differ(dtype):
    a, b = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3))
    opt = jp.optim.FoMoH([a, b], lr=0.5, k=4)
    losses = [opt.step(lambda: (a.float() * b + a.float() ** 2 + b**2).sum()).item() for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0] and a.dtype == dtype


def test_freezing_later_counts():
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = jp.optim.FoMoHKD([w, other], k=3, descent="saddle-free")
    opt.step(lambda: (w**2 + other**2).sum())
    w.requires_grad_(False)
    with pytest.raises(jp.ArgumentError, match="exceed"):
        opt.step(lambda: (w**2 + other**2).sum())


def test_a_step_beyond_the_numbers_is_refused():
    w = nn.Parameter(torch.ones(3))
    opt = jp.optim.FoMoH([w], eps=1e-42)
    with pytest.raises(jp.NonFiniteError, match="step"):
        opt.step(lambda: w.sum())
    assert torch.equal(w.detach(), torch.ones(3)) and opt.state_dict()["param_groups"][0]["jetplane"]["step"] == 0


def test_a_run_without_side_effects_keeps_no_activations():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
    with without_side_effects() as log:
        net(X).sum().backward()
    kept = {id(tensor) for tensor, *_ in log.saved.values()}
    assert kept == {id(buffer) for buffer in net.buffers()}


def test_what_an_operator_returns_of_its_arguments_is_set_back():
    kept = torch.zeros(3)
    with torch.inference_mode(), without_side_effects():
        F.dropout(kept, 0.5, False).add_(1)  # the same tensor, though the operator does not say so
    assert torch.equal(kept, torch.zeros(3))


def test_a_run_without_side_effects_inside_another():
    net = nn.BatchNorm1d(4)
    before = [b.clone() for b in net.buffers()]
    with without_side_effects():
        with without_side_effects():
            net(X)
        net(X)
    assert all(map(torch.equal, before, net.buffers()))


W = [nn.Parameter(torch.ones(3))]
BAD = {
    "one tensor": (lambda: jp.optim.FGD(W[0]), jp.ArgumentError, "list"),
    "infinite lr": (lambda: jp.optim.FGD(W, lr=float("inf")), jp.ArgumentError, "lr"),
    "k 0": (lambda: jp.optim.FGD(W, k=0), jp.ArgumentError, "k"),
    "k too large": (lambda: jp.optim.FoMoHKD(W, k=4), jp.ArgumentError, "exceed"),
    "negative lr": (lambda: jp.optim.FGD(W, lr=-1.0), jp.ArgumentError, "lr"),
    "nan lr": (lambda: jp.optim.FGD(W, lr=float("nan")), jp.ArgumentError, "lr"),
    "negative decay": (lambda: jp.optim.FoMoH(W, weight_decay=-1.0), jp.ArgumentError, "weight_decay"),
    "negative eps": (lambda: jp.optim.FoMoH(W, eps=-1.0), jp.ArgumentError, "eps"),
    "clip 0": (lambda: jp.optim.FGD(W, clip=0.0), jp.ArgumentError, "clip"),
    "planes 0": (lambda: jp.optim.FGD(W, planes=0), jp.ArgumentError, "planes"),
    "law": (lambda: jp.optim.FGD(W, law="cauchy"), jp.ArgumentError, "law"),
    "descent": (lambda: jp.optim.FoMoHKD(W, descent="downhill"), jp.ArgumentError, "descent"),
    "empty": (lambda: jp.optim.FGD([]), jp.ArgumentError, "no parameters"),
    "integers": (lambda: jp.optim.FGD([torch.ones(3, dtype=torch.int64)]), jp.DTypeError, "int64"),
    "devices": (
        lambda: jp.optim.FGD([*W, torch.ones(3, device="meta", requires_grad=True)]),
        jp.DeviceError,
        "one device",
    ),
    "no closure": (lambda: jp.optim.FGD(W).step(), jp.ArgumentError, "closure"),
    "all frozen": (
        lambda: jp.optim.FGD([nn.Parameter(torch.ones(3), requires_grad=False)], k=1),
        jp.ArgumentError,
        "parameters",
    ),
    "foreign state": (
        lambda: jp.optim.FGD(W).load_state_dict(torch.optim.SGD(W).state_dict()),
        jp.ShapeError,
        "Jetplane",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    build, error, message = BAD[name]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")
@pytest.mark.parametrize("kind", [jp.optim.FGD, jp.optim.FoMoHKD])
def test_compiled_steps_are_those_of_eager_ones(kind, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, **k, backend="aot_eager"))
    torch._dynamo.reset()
    nets = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    unused = nn.Parameter(torch.ones(3))
    opts = [kind([*net.parameters(), unused], k=2, lr=0.1, compile=n == 1) for n, net in enumerate(nets)]
    for n in range(4):
        x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
        losses = [
            o.step(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y)) for o, net in zip(opts, nets, strict=True)
        ]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        if n == 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # no recompilation
    assert torch.equal(unused, torch.ones(3))
    with pytest.raises(jp.NonFiniteError):
        opts[1].step(lambda net=nets[1], x=x, y=y: F.cross_entropy(net(x * float("nan")), y))


@pytest.mark.parametrize("name", ["FGD", "PlaneSearch"])
def test_a_loss_that_runs_away_is_said_once(name):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    opt, steps = (jp.optim.FGD([w], lr=1.0, k=6), 20) if name == "FGD" else (jp.optim.PlaneSearch([w]), 6)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        losses = [opt.step(lambda: -(w**2).sum()).item() for _ in range(steps)]
    said = [str(m.message) for m in met if "it may have no least value" in str(m.message)]
    assert len(said) == 1 and losses[-1] < -1e7 and f"from {losses[0]:.3g} to" in said[0]


def test_losses_that_are_large_and_negative_are_not_said():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    opt = jp.optim.FGD([w], lr=1e-2, k=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            opt.step(lambda: (w**2).sum() - 1e9)


@pytest.mark.parametrize("name", ["FGD", "FoMoHKD", "PlaneSearch"])
def test_a_closure_that_begins_to_detach_is_looked_at_again(name):
    """Under the same code. The step that meets it may still move what is cut off, later ones do not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    make = {
        "FGD": lambda: jp.optim.FGD(model.parameters(), 1e-2, 4),
        "FoMoHKD": lambda: jp.optim.FoMoHKD(model.parameters(), 1e-2, 4, descent="saddle-free"),
        "PlaneSearch": lambda: jp.optim.PlaneSearch(model.parameters(), model),
    }
    opt, detached = make[name](), False

    def closure():
        h = model[1](model[0](x))
        return torch.nn.functional.cross_entropy(model[2](h.detach() if detached else h), y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            opt.step(closure)
        detached = True
        opt.step(closure)
    before, last = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    with pytest.warns(jp.JetplaneWarning, match=r"no derivative of the loss reaches parameter 0 .*, parameter 1"):
        opt.step(closure)
    assert torch.equal(before, model[0].weight) and not torch.equal(last, model[2].weight)


def test_a_closure_that_always_detaches_is_looked_at_once(monkeypatch):
    from jetplane.optim import base

    torch.manual_seed(0)
    w, calls = torch.nn.Parameter(torch.randn(6)), []
    found = base.audit
    monkeypatch.setattr(base, "audit", lambda *a, **k: calls.append(0) or found(*a, **k))
    opt = jp.optim.FGD([w], lr=1e-2, k=2)
    for _ in range(4):
        opt.step(lambda: (w * w.detach()).sum())
    assert len(calls) == 1
