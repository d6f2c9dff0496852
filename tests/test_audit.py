"""Audits convict what evaluations do not see, and nothing else."""

import contextlib
import copy
import math
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES
from test_models import OWN
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.evaluation import audit, interception, threads
from jetplane.experiments import models
from jetplane.subspace.search import FullStep
from jetplane.subspace.sources import Drawn, Subspace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*prototype:UserWarning",
    "ignore:.*enable_nested_tensor:UserWarning", "ignore::jetplane.RescueWarning",
)  # fmt: skip


def not_convicted(closure, params, seed=0):
    report = jp.audit(closure, params, seed=seed)
    assert report.verdict in ("agrees", "unclear") and not report.suspicious, report
    return report


# --- no false alarm ---------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 8, padding_idx=0), nn.LSTM(8, 12, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.body(self.embed(x))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.1, batch_first=True)
        self.embed, self.body, self.head = nn.Embedding(7, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Conv2d(6, 8, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5)), lambda: torch.randn(24, 10)),
    "cnn": (convolutional, lambda: torch.randn(12, 1, 12, 12)),
    "lstm": (Recurrent, lambda: torch.randint(0, 7, (12, 9))),
    "transformer": (Transformer, lambda: torch.randint(0, 7, (12, 9))),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarm(name, seed):
    torch.manual_seed(seed)
    net, x = (make() for make in NETS[name])
    y = torch.randint(0, 5, (len(x),))
    assert not_convicted(lambda: F.cross_entropy(net(x), y), list(net.parameters()), seed).verdict == "agrees"


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_false_alarm_in_any_precision(name, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        net, x = (make() for make in NETS[name])
        net, y = net.to(dtype), torch.randint(0, 5, (len(x),))
        x = x.to(dtype) if x.is_floating_point() else x
        not_convicted(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y), list(net.parameters()), seed)


SCALES = {
    "gradient scale": lambda loss: 65536 * loss,
    "tiny": lambda loss: 1e-12 * loss,
    "huge": lambda loss: 1e12 * loss,
    "offset": lambda loss: loss + 1e3,
    "offset that hides it": lambda loss: loss + 1e9,
    "difference of large numbers": lambda loss: (loss + 1e4) - 1e4,
}


@pytest.mark.parametrize("scale", SCALES)
def test_no_false_alarm_at_any_scale(scale):
    for seed in range(5):
        torch.manual_seed(seed)
        net, x = (make() for make in NETS["mlp"])
        y = torch.randint(0, 5, (len(x),))
        params = list(net.parameters())
        not_convicted(lambda n=net, x=x, y=y: SCALES[scale](F.cross_entropy(n(x), y)), params, seed)


def test_no_false_alarm_where_a_loss_has_been_rounded_to_zero():
    """The logarithm of a softmax that is one but for rounding does not change, and its slope is not zero."""
    z, y = torch.tensor([[20.0, 0.0, -3.0]]), torch.tensor([0])
    report = jp.audit(lambda: F.cross_entropy(z, y), [z])
    assert report.losses[0] == 0 and report.slope != 0
    assert report.verdict == "unclear" and not report.suspicious
    hidden = z.numpy()  # what is missed, of a size that rounding does not hide, is still found
    assert jp.audit(lambda: F.cross_entropy(z, y) + 1e-2 * (z.sum() - float(hidden.sum())), [z]).verdict == "differs"


KINKS = {
    "abs": lambda z: z.abs().sum(),
    "relu": lambda z: (F.relu(z) - F.relu(-z)).sum(),
    "hinge": lambda z: F.relu(z - z.detach()).sum(),
    "norm": lambda z: z.norm(),
    "max": lambda z: z.max(),
    "rounded": lambda z: (z * 1e3).round().sum() / 1e3,
    "steps": lambda z: (z > 0).double().mean(),
    "clamp": lambda z: z.clamp(0, 1).sum(),
}


@pytest.mark.parametrize("kink", KINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_false_alarm_at_a_kink(kink, dtype):
    w, z = torch.randn(4).to(dtype), torch.zeros(5, dtype=dtype)
    for seed in range(5):
        not_convicted(lambda: w.square().sum() + KINKS[kink](z), [w, z], seed)


@pytest.mark.parametrize("name", CASES)
def test_no_false_alarm_on_the_cases(name):
    for dtype in (torch.float32, torch.float64):
        case = CASES[name](dtype)
        not_convicted(case.loss, case.params)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", OWN)
def test_no_false_alarm_on_models_of_torch(name, mode):
    torch.manual_seed(0)
    model, x = getattr(OWN[name](), mode)(), torch.randn(3, 5, 4)
    not_convicted(lambda: model(x), list(model.parameters()))


@pytest.mark.parametrize("name", ["logreg", "cnn", "cnn-bn"])
def test_no_false_alarm_on_the_demonstration(name):
    torch.manual_seed(0)
    model, x, y = models.build(name, 8), torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))
    for seed in range(3):
        not_convicted(lambda: F.cross_entropy(model(x), y), list(model.parameters()), seed)


def straight_through(w, x):
    return (x * (w + (w.round() - w).detach())).square().sum()


def temporal_difference(w, x):
    return (x @ w - 0.9 * (x.roll(1, 0) @ w).detach() - 1).square().mean()


def scaled_by_a_number(w, x):
    return (x @ w).square().mean() * (1 + w.norm().item())


def weighed_by_data(w, x):
    return (x @ w).square().mean() * w.data.square().sum()


def regularized_if(w, x):
    return (x @ w).square().mean() + (w.square().sum() if bool(w[0] > 0) else w.abs().sum())


def sampled(w, x):
    return (torch.distributions.Gamma(w.exp(), 1.0).rsample() * x[0]).sum()


def straight_through_inside_of_torch(w, x):
    torch.manual_seed(1)
    return (F.gumbel_softmax(x * w, hard=True) @ w.detach()).square().sum()


def clamped_under_no_grad(w, x):
    """What is written to keeps its derivative; `gaussian_nll_loss` clamps a copy of the variance."""
    return F.gaussian_nll_loss(x @ w, torch.zeros(8).double(), w.exp().sum().expand(8)) + F.cosine_similarity(
        w, x[0], dim=0
    )


def filled_under_no_grad(w, x):
    held = torch.empty(4).double()
    with torch.no_grad():
        held.copy_(w)
        w.exp().mul_(2)
    return (held * w).sum()


def rounded(w, x):
    return (x @ w.bfloat16().double()).square().mean() + (w.half() * 2).double().square().sum()


def viewed_under_no_grad(w, x):
    with torch.no_grad():
        turned = w.view(2, 2).t()
    return (turned.flatten() * w).square().sum()


def renormed(w, x):
    return F.embedding(torch.tensor([0, 1]), w.view(2, 2), max_norm=0.5).square().sum() + w.sum()


STOPPED = [
    straight_through, temporal_difference, scaled_by_a_number, weighed_by_data, regularized_if, sampled,
    straight_through_inside_of_torch, clamped_under_no_grad, filled_under_no_grad, rounded, viewed_under_no_grad,
    renormed,
]  # fmt: skip


@pytest.mark.parametrize("loss", STOPPED, ids=lambda f: f.__name__)
def test_no_false_alarm_where_the_closure_stops_derivatives(loss):
    torch.manual_seed(0)
    w, x = torch.randn(4).double(), torch.randn(8, 4).double()
    for seed in range(3):
        not_convicted(lambda: loss(w, x), [w], seed)


def test_derivatives_stopped_by_no_grad_or_not():
    """Whether an evaluation stops at the user's no_grad or not is none of an audit's business."""
    torch.manual_seed(0)
    w, x = torch.randn(4).double(), torch.randn(8, 4).double()

    def loss():
        with torch.no_grad():
            target = x @ w
        return (2 * (x @ w) - target).square().mean()

    not_convicted(loss, [w])


# --- what is not seen is convicted --------------------------------------------------------------------------------


@contextlib.contextmanager
def unmended(monkeypatch):
    """Interception of torch's functions, in the thread of the closure, and nothing else."""
    with monkeypatch.context() as patch:
        patch.setattr(interception, "_Operators", lambda interception: contextlib.nullcontext())
        patch.setattr(interception, "inner", SimpleNamespace(recording=lambda *_, **__: contextlib.nullcontext()))
        patch.setattr(threads, "taking_part", lambda run: run)
        patch.setattr(threads, "refusing", lambda params, interception: contextlib.nullcontext())
        yield


def by_functional():
    w, x = torch.tensor([2.0]), torch.tensor([1.0])
    jacobian = torch.autograd.functional.jacobian
    return lambda: (w * 3).sum() + jacobian(lambda z: (w * z) ** 2, x, create_graph=True).sum(), {"w": w}, {"w"}


def by_vmap():
    s, p = torch.tensor([1.0]), torch.ones(3, 2)
    return lambda: s.sum() + torch.vmap(lambda p: (p**2).sum())(p).sum(), {"s": s, "p": p}, {"p"}


def by_script():
    net = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Tanh(), nn.Linear(2, 1))
    x = torch.randn(5, 2)
    return lambda: net(x).square().mean(), dict(net.named_parameters()), {"0.weight", "0.bias"}


def by_thread():
    s, p = torch.tensor([1.0]), torch.ones(3, 2)

    def closure():
        with ThreadPoolExecutor(1) as pool:
            return s.sum() + pool.submit(lambda: (p**2).sum()).result()

    return closure, {"s": s, "p": p}, {"p"}


def by_nesting():
    rows = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(2, 2)], layout=torch.jagged)
    w, v = torch.ones(2, 2), torch.ones(2)
    return lambda: (rows @ w).values().square().sum() + w.sum() + v.sum(), {"w": w, "v": v}, {"w"}


def by_memory():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, seen = torch.randn(5, 3), net[2].weight.detach().numpy()
    return lambda: net(x).mean() + float((seen**2).sum()), dict(net.named_parameters()), {"2.weight"}


UNSEEN = [by_functional, by_vmap, by_script, by_thread, by_nesting, by_memory]


@pytest.mark.parametrize("make", UNSEEN, ids=lambda f: f.__name__)
def test_measurement_alone_convicts(monkeypatch, make):
    torch.manual_seed(0)
    closure, named, missed = make()
    before = {name: p.detach().clone() for name, p in named.items()}
    state = torch.get_rng_state()
    with unmended(monkeypatch):
        for seed in range(3):
            report = jp.audit(closure, list(named.values()), names=list(named), seed=seed)
            assert report.verdict == "differs" and set(report.parameters) == missed, report
            with pytest.raises(jp.AuditError, match=next(iter(missed))) as raised:
                report.check()
            assert set(raised.value.parameters) == missed
    assert all(torch.equal(p, before[name]) for name, p in named.items())
    assert torch.equal(torch.get_rng_state(), state)
    if make is not by_memory and make is not by_functional:
        assert jp.audit(closure, list(named.values())).verdict == "agrees"


OPTIMIZERS = {
    "fgd": lambda p, **k: jp.optim.FGD(p, lr=0.1, **k),
    "fomoh": lambda p, **k: jp.optim.FoMoH(p, **k),
    "fomoh-kd": lambda p, **k: jp.optim.FoMoHKD(p, k=2, **k),
    "plane search": lambda p, **k: jp.optim.PlaneSearch(
        p, lr=0.1, subspace=Subspace([Drawn(2)], "hessian"), search=FullStep(), **k
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_audit_their_closure(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    x, seen = torch.randn(6, 3), net[3].weight.detach().numpy()
    opt = OPTIMIZERS[name](list(net.named_parameters()))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(jp.AuditError, match=r"'3\.weight'"):
        opt.step(lambda: net(x).square().mean() + float((seen**2).sum()))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert opt.state_dict()["param_groups"][0]["jetplane"]["step"] == 0
    opt.step(lambda: net(x).square().mean())
    unaudited = OPTIMIZERS[name](net.parameters(), audit="never")
    unaudited.step(lambda: net(x).square().mean() + float((seen**2).sum()))


def test_an_audit_is_done_again_where_something_changes(monkeypatch):
    audited = []
    original = jp.optim.base.audit
    monkeypatch.setattr(jp.optim.base, "audit", lambda *a, **k: (audited.append(1), original(*a, **k))[1])

    def count(run):
        audited.clear()
        run()
        return len(audited)

    net, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1)), torch.randn(6, 3)
    opt = jp.optim.FGD(net.parameters(), lr=1e-3)

    def step():
        opt.step(lambda: net(x).square().mean())

    assert count(step) == 1
    assert count(step) == count(step) == 0
    net.eval()
    assert count(step) == 1
    net[0].requires_grad_(False)
    assert count(step) == 1
    net[0].requires_grad_(True)
    assert count(step) == 1
    assert count(lambda: opt.step(lambda: net(x).abs().mean())) == 1
    assert count(step) == 1
    always = jp.optim.FGD(net.parameters(), audit="always")
    assert count(lambda: [always.step(lambda: net(x).square().mean()) for _ in range(3)]) == 3


def test_audits_cost_few_runs_and_no_more():
    calls, w = [], torch.ones(3)

    def closure():
        calls.append(1)
        return (w**3).sum()

    report = jp.audit(closure, [w])
    assert report.verdict == "agrees" and report.runs == len(calls) == 3


def test_another_direction_is_drawn_where_the_loss_is_level_along_the_first(monkeypatch):
    w, level = torch.linspace(1, 2, 8), torch.zeros(8)
    level[0], level[1], level[2] = w[1], -w[0], 1e-5  # along which (w ** 2).sum() hardly changes
    drawn = audit._Audit.direction
    calls = []

    def direction(self, places):
        calls.append(drawn(self, places))
        return {0: level} if len(calls) == 1 else calls[-1]

    monkeypatch.setattr(audit._Audit, "direction", direction)
    report = jp.audit(lambda: (w**2).sum(), [w])
    assert report.verdict == "agrees" and abs(report.slope) > 0.1 and len(calls) == 2 and report.runs == 6


def test_the_report_is_readable():
    w, v = torch.ones(3), torch.ones(2)
    seen = w.numpy()
    good = jp.audit(lambda: (w**2).sum() + v.sum(), [w, v])
    assert str(good).startswith("agrees: slope ") and "(3 runs)" in str(good)
    good.check()
    bad = jp.audit(lambda: (w**2).sum() + v.sum() + float(seen.sum()), [w, v], names=["w", "v"])
    assert "because of w" in str(bad)
    with pytest.raises(jp.AuditError, match="parameter 0 of shape"):
        jp.audit(lambda: (w**2).sum() + v.sum() + float(seen.sum()), [w, v]).check()


def test_a_suspicion_is_a_warning():
    report = jp.AuditReport("unclear", 1.0, 2.0, (1.0, 1.0), suspicious=True, reason="it is so")
    with pytest.warns(jp.AuditWarning, match="may not be that of its loss"):
        report.check()


def test_closures_that_cannot_be_run_nearby():
    w = torch.ones(2).double()

    def closure():
        if not torch.equal(w, torch.ones(2).double()):
            raise ValueError("only here")
        return (w**2).sum()

    assert jp.audit(closure, [w]).verdict == "unclear"
    assert torch.equal(w, torch.ones(2).double())

    def interrupted():
        if not torch.equal(w, torch.ones(2).double()):
            raise KeyboardInterrupt
        return (w**2).sum()

    with pytest.raises(KeyboardInterrupt):
        jp.audit(interrupted, [w])
    assert torch.equal(w, torch.ones(2).double())


def test_arguments():
    w = torch.ones(2)
    with pytest.raises(jp.ArgumentError, match="name for each of 1"):
        jp.audit(lambda: w.sum(), [w], names=["a", "b"])
    with pytest.raises(jp.ArgumentError, match="audit must be"):
        jp.optim.FGD([w], audit="sometimes")
    with pytest.raises(jp.UnusedParametersError):
        jp.audit(lambda: torch.ones(2).sum(), [w])


# --- closures that are not the same each time -----------------------------------------------------------------------

GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(0), lambda g: torch.randn(4, generator=g)),
    "numpy": (lambda: np.random.default_rng(0), lambda g: torch.from_numpy(g.standard_normal(4)).float()),
    "numpy, legacy": (lambda: np.random.RandomState(0), lambda g: torch.from_numpy(g.randn(4)).float()),
    "random": (lambda: random.Random(0), lambda g: torch.tensor([g.gauss(0, 1) for _ in range(4)])),
}


def batches():
    yield from (torch.full((4,), float(n)) for n in range(100))


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_set_back(name):
    make, draw = GENERATORS[name]
    w, generator = torch.ones(4), make()

    def closure():
        return (w * draw(generator)).square().sum()

    tangents = [torch.eye(4)]
    expected = jp.evaluate(closure, [w], tangents).slope  # one run
    generator = make()
    plane = jp.evaluate(closure, [w], tangents, chunk=2, generators=[generator])
    assert torch.equal(plane.slope, expected)
    once = make()
    draw(once)
    assert torch.equal(draw(generator), draw(once))  # it has moved once
    with pytest.raises(jp.RandomClosureError, match=r"generators=\[\.\.\.\]"):
        jp.evaluate(closure, [w], tangents, chunk=2)
    assert jp.audit(closure, [w]).verdict == "random"
    assert jp.audit(closure, [w], generators=[generator]).verdict == "agrees"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_set_generators_back(name):
    def train(**options):
        torch.manual_seed(0)
        net, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
        x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
        opt = OPTIMIZERS[name](net.parameters(), generators=[generator], **options)
        noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for _ in range(1)]
        seen = []

        def closure():
            drawn = torch.randn(x.shape, generator=generator)
            seen.append(drawn)
            return F.cross_entropy(net(x + 0.1 * drawn), y)

        losses = [opt.step(closure).item() for _ in range(3)]
        assert torch.equal(seen[0], noise[0])
        return losses, torch.randn(3, generator=generator)

    audited, plain = train(), train(audit="never")
    assert audited[0] == plain[0] and torch.equal(audited[1], plain[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_refuse_random_closures(name):
    net, generator, x = nn.Linear(3, 2), torch.Generator(), torch.randn(8, 3)
    before = [p.clone() for p in net.parameters()]
    opt = OPTIMIZERS[name](net.parameters())
    with pytest.raises(jp.RandomClosureError, match="fetch the batch outside"):
        opt.step(lambda: net(x + torch.randn(x.shape, generator=generator)).square().mean())
    stream = batches()
    with pytest.raises(jp.RandomClosureError):
        opt.step(lambda: (net.weight.sum() * next(stream)).square().mean())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_closures_whose_losses_differ_by_little_are_told_from_rough_ones():
    """Two of their runs agree by chance now and then."""
    verdicts = []
    for seed in range(40):
        torch.manual_seed(seed)
        net, generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.Generator()
        generator.manual_seed(seed)
        x, y = torch.randn(64, 8), torch.randint(3, (64,))

        def loss(net=net, generator=generator, x=x, y=y):
            return F.cross_entropy(net(x * (torch.rand(x.shape, generator=generator) > 0.01)), y)

        verdicts.append(jp.audit(loss, list(net.parameters()), seed=seed).verdict)
    assert verdicts == 40 * ["random"]


@pytest.mark.parametrize("draw", [lambda: np.random.randn(), random.random], ids=["numpy", "random"])
def test_global_generators_are_set_back(draw):
    w = torch.ones(4)
    assert jp.audit(lambda: (w * draw()).square().sum(), [w]).verdict == "agrees"


def test_estimates_of_random_closures_are_refused():
    """Whose plane is evaluated by one run, and its gradient estimated by others."""
    net, generator, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.Generator(), torch.randn(8, 3)
    opt = jp.optim.PlaneSearch(net.parameters(), net, audit="never")
    with pytest.raises(jp.RandomClosureError, match="in several runs"):
        opt.step(lambda: F.mse_loss(net(x + torch.randn(x.shape, generator=generator)), x[:, :1]))


def test_gauss_newton_chunks_of_random_closures_are_refused():
    w, generator, x = torch.randn(3, 2), torch.Generator(), torch.randn(8, 3)
    y = torch.randint(0, 2, (8,))

    def closure():
        return F.cross_entropy(x @ w + torch.randn(8, 2, generator=generator), y)

    with pytest.raises(jp.RandomClosureError):
        jp.evaluate(closure, [w], jp.Directions(4), "ggn", chunk=2)
    plane = jp.evaluate(closure, [w], jp.Directions(4), "ggn", chunk=2, generators=[generator])
    assert math.isfinite(plane.value.item())


def test_a_generator_of_another_kind():
    w = torch.ones(2)
    with pytest.raises(jp.ArgumentError, match="generators must be"):
        jp.evaluate(lambda: w.sum(), [w], jp.Directions(1), generators=[iter([])])
    with pytest.raises(jp.ArgumentError, match="generators must be"):
        jp.optim.FGD([w], generators=[42])


def test_what_a_closure_deep_copies_stays_what_it_is():
    """The copy's memory is allocated and filled by no operator that says so."""
    w, kept = torch.ones(64), []

    def closure():
        kept.append([copy.deepcopy(torch.full((n,), 7)) for n in range(1, 40)])
        return (w**2).sum()

    for _ in range(20):
        assert jp.audit(closure, [w]).verdict == "agrees"
    assert all(bool((t == 7).all()) for run in kept for t in run)
