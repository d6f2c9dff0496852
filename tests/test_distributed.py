"""Ranks that train together: real processes over gloo."""

import copy
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Gang
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves

import jetplane as jp
from jetplane.directions import StoredDirections
from jetplane.evaluation.specification import PlaneSpec
from jetplane.gradients import ActivityPerturbation, LocalHeads, ResidualStream
from jetplane.parallel import ranks as distributed
from jetplane.parallel.message import PlaneMessage
from jetplane.parallel.ranks import fingerprint
from jetplane.parallel.work import plan
from jetplane.subspace.search import FullStep
from jetplane.subspace.sources import Averages, Drawn, FastWeights, PreviousStep, Source, Subspace

pytestmark = pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")

OPTIMIZERS = {
    "fgd": lambda p, **kw: jp.optim.FGD(p, lr=2e-3, k=4, **kw),
    "fomoh": lambda p, **kw: jp.optim.FoMoH(p, lr=0.1, k=4, clip=0.5, **kw),
    "fomoh-kd": lambda p, **kw: jp.optim.FoMoHKD(p, lr=0.3, k=5, descent="saddle-free", clip=0.5, **kw),
    "planes": lambda p, **kw: jp.optim.FoMoHKD(p, lr=0.3, k=2, planes=3, descent="damped", clip=0.5, **kw),
}


def drawn(k=None, **settings):
    """The default sources with directions drawn."""
    return [Drawn(k, **settings), Averages(), PreviousStep()]


# Planes of remembered directions, whose step is judged by its noise and guarded by losses of its own.
SEARCHES = {
    "drawn": lambda net, **kw: jp.optim.PlaneSearch(net.parameters(), **{"subspace": drawn(8)} | kw),
    "dense": lambda net, **kw: jp.optim.PlaneSearch(
        net.parameters(),
        subspace=Subspace(drawn(5, tangents="dense"), curvature="hessian"),
        descent="damped",
        clip=0.5,
        weight_decay=1e-3,
        **kw,
    ),
    "model": lambda net, **kw: jp.optim.PlaneSearch(
        net.parameters(), net, gradient=ActivityPerturbation(passes=3.0), **kw
    ),
    "local heads": lambda net, **kw: jp.optim.PlaneSearch(
        net.parameters(), net, gradient=LocalHeads(), subspace=Subspace([FastWeights()], every=3), **kw
    ),
    "residual stream": lambda net, **kw: jp.optim.PlaneSearch(
        net.parameters(), net, gradient=ResidualStream(), subspace=Subspace([FastWeights()], every=3), **kw
    ),
}

# Numbers of a step: loss, slope, curvature.
SENT = {"fgd": 1 + 4, "fomoh": 1 + 4 + 4, "fomoh-kd": 1 + 5 + 15, "planes": 1 + 6 + 3 * 3}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    gang = Gang(2, tmp_path_factory.mktemp("gang"))
    yield gang
    gang.stop()


class Residual(nn.Linear):
    def forward(self, x):
        return x + super().forward(x).tanh()


def network(dtype=torch.float64, blocks=0):
    torch.manual_seed(3)
    inner = [Residual(8, 8) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *inner, nn.Linear(8, 3)).to(dtype)


def batch(dtype=torch.float64, n=23):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def train(net, opt, x, y, steps, **kwargs):
    return [opt.step(lambda: F.cross_entropy(net(x), y), **kwargs).item() for _ in range(steps)]


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# --- what ranks do --------------------------------------------------------------------------------


def shard_of(rank, x, y, cut):
    return (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])


def data_parallel(rank, name, dtype, cut, steps=50):
    net = network(dtype)
    opt = OPTIMIZERS[name](net.parameters(), process_group=dist.group.WORLD)
    x, y = shard_of(rank, *batch(dtype), cut)
    return train(net, opt, x, y, steps, weight=len(x)), flat(net), opt.ranks.sent / opt.ranks.steps


def direction_parallel(rank, name, dtype, steps=50):
    net = network(dtype)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "direction"))
    opt = OPTIMIZERS[name](net.parameters(), process_group=mesh)
    return train(net, opt, *batch(dtype), steps), flat(net), opt.ranks.parts


BOTH = [(torch.float64, 1e-12), (torch.float32, 1e-6)]


class TestTrajectory:
    """Of 50 steps: that of one process with the whole batch, and the same bits on all ranks."""

    def check(self, results, name, dtype, close):
        net = network(dtype)
        losses = torch.tensor(train(net, OPTIMIZERS[name](net.parameters()), *batch(dtype), 50), dtype=torch.float64)
        first, bits, _ = results[0]
        for other, others, _ in results[1:]:
            assert other == first and torch.equal(others, bits)
        assert losses[-1] < losses[0]
        # Steps on all of the data are whole, which keeps more of what rounding adds.
        torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), losses, rtol=3 * close, atol=0)
        assert (bits - flat(net)).norm() <= 10 * close * bits.norm()

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize(("dtype", "close"), BOTH, ids=str)
    def test_unequal_shards_of_data(self, two, name, dtype, close):
        results = two.run(data_parallel, name, dtype, 7)
        self.check(results, name, dtype, close)
        # A mean of 50 steps, the first of which agrees on what is cut off: six numbers.
        assert {sent for _, _, sent in results} == {8 * (21 + SENT[name] + 6 / 50)}

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_shares_of_the_directions(self, two, name):
        self.check(two.run(direction_parallel, name, torch.float64), name, torch.float64, 1e-12)

    def test_a_rank_without_examples(self, two):
        self.check(two.run(data_parallel, "fomoh-kd", torch.float64, 23), "fomoh-kd", torch.float64, 1e-12)


MANY = 200  # examples. Fitting a few to the last amplifies rounding, also that of one process: see docs/scaling.md


def same(a, b):
    """Whether nested plain values are equal, tensors bit by bit."""
    (mine, layout), (others, other) = tree_flatten(a), tree_flatten(b)
    pairs = zip(mine, others, strict=True)
    return layout == other and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def searched(rank, name, dtype, cut, steps=50, shape=None):
    net = network(dtype, 2 if name == "residual stream" else 0)
    names = [name for name in ("data", "direction") if shape and name in shape]
    mesh = init_device_mesh("cpu", tuple(shape[n] for n in names), mesh_dim_names=tuple(names)) if shape else None
    opt = SEARCHES[name](net, process_group=mesh or dist.group.WORLD)
    x, y = batch(dtype, MANY)
    if opt.ranks.size > opt.ranks.parts:
        x, y = shard_of(opt.ranks.shard, x, y, cut)
    losses = train(net, opt, x, y, steps, weight=len(x))
    state = {key: value for key, value in opt.state_dict()["state"].items() if key != "jetplane"}
    return losses, flat(net), (state, opt.state_dict()["param_groups"][0]["jetplane"], opt.ranks.sent)


class TestPlaneSearch:
    """As one process with the whole batch: the slope's covariance, the guard and the estimates included."""

    def check(self, results, name, dtype, close):
        net = network(dtype, 2 if name == "residual stream" else 0)
        opt = SEARCHES[name](net)
        losses = torch.tensor(train(net, opt, *batch(dtype, MANY), 50), dtype=torch.float64)
        first, bits, (state, own, _) = results[0]
        for other, others, (its, also, _) in results[1:]:
            assert other == first and torch.equal(others, bits) and same(also, own)
            assert str(its) == str(state)
            for i, tensors in state.items():
                assert all(torch.equal(tensors[n], its[i][n]) for n in tensors)
        assert losses[-1] < losses[0]
        # Steps on all of the data are whole, which keeps more of what rounding adds.
        torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), losses, rtol=3 * close, atol=0)
        assert (bits - flat(net)).norm() <= 30 * close * bits.norm()  # flat directions keep what rounding adds
        alone = opt.state["jetplane"]["search"]
        assert own["search"] == pytest.approx(alone, rel=100 * close) and alone["noise"] > 0
        assert own["gradient"].get("plans") == opt.state["jetplane"]["gradient"].get("plans")

    @pytest.mark.parametrize("name", SEARCHES)
    @pytest.mark.parametrize(("dtype", "close"), BOTH, ids=str)
    def test_unequal_shards_of_data(self, two, name, dtype, close):
        if name in ("model", "residual stream") and dtype is torch.float32:
            close *= 20  # what feedback has learned, and scaled averages of a deeper network, amplify rounding
        self.check(two.run(searched, name, dtype, 60), name, dtype, close)

    @pytest.mark.parametrize("name", SEARCHES)
    def test_a_rank_without_examples(self, two, name):
        self.check(two.run(searched, name, torch.float64, MANY), name, torch.float64, 1e-12)

    @pytest.mark.parametrize("name", SEARCHES)
    def test_shares_of_the_directions(self, two, name):
        self.check(two.run(searched, name, torch.float64, 0, 50, {"direction": 2}), name, torch.float64, 1e-12)


def fitted(rank, order=None):
    """50 steps on 23 examples with random labels, in single precision: a problem that amplifies rounding."""
    net, (x, y) = network(torch.float32), batch(torch.float32)
    if order is None:
        x, y = shard_of(rank, x, y, 7)
    else:
        x, y = x[order], y[order]
    opt = SEARCHES["drawn"](net, process_group=dist.group.WORLD if order is None else None)
    return torch.tensor(train(net, opt, x, y, 50, weight=len(x))).double()


def test_rounding_grows_as_in_one_process_with_its_examples_in_another_order(two):
    alone = fitted(0, torch.arange(23))
    orders = [torch.randperm(23, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    usual = torch.stack([(fitted(0, order) - alone).abs() for order in orders]).amax()
    of_ranks = (two.run(fitted)[0] - alone).abs()
    assert of_ranks[:5].amax() < 1e-5 and of_ranks.amax() < 10 * usual < 0.1


def pooled(rank, kind, layout):
    """The covariance of the slope, by shards and alone; of rows that weigh unlike."""
    net, (x, y) = network(), batch()
    params, group = list(net.parameters()), dist.group.WORLD
    row = torch.linspace(0.1, 2.0, len(x), dtype=torch.float64)

    def regularizer():  # whose parts are known beside Gauss-Newton curvature
        return 1e-2 * params[0].square().sum() if layout == "data" else 0.0

    def loss(part):
        mean = F.cross_entropy(net(x[part]), y[part]) + 0.3 * F.mse_loss(row[part] * net(x[part])[:, 0], row[part])
        return mean.sqrt() if kind == "unknown on one" and rank == 1 else mean + regularizer()

    if layout == "direction":
        mine, group = slice(None), init_device_mesh("cpu", (2,), mesh_dim_names=("direction",))
    else:
        mine = slice(0, 7) if rank == 0 else slice(7, None)
    ranks, tangents = distributed.Ranks(group), StoredDirections(jp.Directions(10).tangents(params))
    curvature = "hessian" if layout == "direction" else "ggn"
    plane = ranks.evaluate(
        lambda: loss(mine), lambda part: jp.evaluate(lambda: loss(mine), params, part, curvature, examples=True),
        tangents, PlaneSpec(10, curvature, "all", examples=True), params, {}, dict, float(len(x[mine])),
    )  # fmt: skip
    alone = jp.evaluate(lambda: loss(slice(None)), params, tangents, curvature, examples=True)
    return plane, alone.moments


@pytest.mark.parametrize("layout", ["data", "direction"])
def test_the_covariance_of_the_slope_is_that_of_the_whole_batch(two, layout):
    for plane, alone in two.run(pooled, "", layout):
        assert alone.count == plane.moments.count == 23
        torch.testing.assert_close(plane.moments.total, plane.slope, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(plane.moments.covariance, alone.covariance, rtol=1e-12, atol=1e-14)


def test_the_covariance_is_unknown_if_one_shard_does_not_know_it(two):
    for plane, _ in two.run(pooled, "unknown on one", "data"):
        assert plane.moments is None and plane.slope.isfinite().all()


def tensors_of(*states):
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in tree_leaves(states)]


def equal(some, others):
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


class Guess(Source):
    """A direction of which nothing says that all ranks have the same."""

    learns = False

    def __init__(self, guess):
        self.guess = guess

    def directions(self, context):
        return StoredDirections({i: t.unsqueeze(0) for i, t in zip(context.places, self.guess(), strict=True)})

    def remember(self, context, result):
        return context.state


def search_disturbed(rank, name, call, how, weighs=True):
    """Two good steps, one in which a call of rank 1's closure goes wrong, and a good one again."""
    net, (x, y) = network(), shard_of(rank, *batch(), 7)
    guess = [torch.ones_like(p) for p in net.parameters()]
    calls, wrong = [], [False]

    def closure():
        calls.append(1)
        if rank == 1 and wrong[0] and len(calls) == call:
            if how == "raises":
                raise OSError("the data are gone")
            return F.cross_entropy(net(x), y) * float("nan")
        return F.cross_entropy(net(x), y)

    def guessed():
        if rank == 1 and wrong[0] and how == "guess raises":
            raise OSError("no guess")
        return [2 * g if rank == 1 and wrong[0] and how == "guess differs" else g for g in guess]

    own = {"subspace": [Guess(guessed), *drawn(8)]} if how.startswith("guess") else {}
    opt = SEARCHES[name](net, process_group=dist.group.WORLD, audit="never", **own)
    train(net, opt, x, y, 2, weight=len(x))
    if how == "state" and rank == 1:
        opt.state[net[0].weight]["Averages/square"][1, 2] *= 1 + 1e-15
    before = tensors_of(net.state_dict(), opt.state_dict())
    calls.clear()
    wrong[0] = True
    error = step_of(opt, closure, weight=len(x))
    untouched = equal(tensors_of(net.state_dict(), opt.state_dict()), before)
    wrong[0] = False
    return error, untouched, step_of(opt, closure, weight=len(x)), flat(net)


class TestFailuresOfOneRankInASearch:
    @pytest.mark.parametrize(
        ("name", "call", "how"),
        [("drawn", 1, "raises"), ("drawn", 2, "raises"), ("model", 2, "raises"), ("model", 5, "raises"),
         ("drawn", 0, "guess raises")],
        ids=["plane", "guard", "guard with a model", "estimate", "guess"],
    )  # fmt: skip
    def test_an_error_stops_all(self, two, name, call, how):
        (other, untouched, after, bits), (own, also, same, its) = two.run(search_disturbed, name, call, how)
        assert isinstance(other, jp.RemoteError) and other.ranks == (1,) and "rank 1: OSError: " in str(other)
        assert isinstance(own, OSError)
        assert untouched and also
        assert isinstance(after, float) and after == same and torch.equal(bits, its)

    def test_nan_in_the_plane_is_the_same_error_on_all(self, two):
        (other, untouched, after, bits), (own, also, same, its) = two.run(search_disturbed, "model", 1, "nan")
        assert isinstance(other, jp.NonFiniteError) and isinstance(own, jp.NonFiniteError)
        assert str(other).startswith("rank 1: the loss is not finite")
        assert untouched and also and after == same and torch.equal(bits, its)

    def test_nan_in_the_guard_shortens_the_step_of_all(self, two):
        (loss, _, after, bits), (also, _, same, its) = two.run(search_disturbed, "drawn", 2, "nan")
        assert isinstance(loss, float) and loss == also and after == same and torch.equal(bits, its)
        (_, _, unhindered, _), _ = two.run(search_disturbed, "drawn", 0, "nan")
        assert after != unhindered

    @pytest.mark.parametrize(
        ("how", "said"), [("guess differs", "directions of Guess: "), ("state", "Averages/square of parameter 0: ")]
    )
    def test_what_differs_is_named(self, two, how, said):
        for error, untouched, *_ in two.run(search_disturbed, "model", 0, how):
            assert isinstance(error, jp.RanksDifferError) and error.ranks == (1,) and said in str(error)
            assert untouched


def search_refused(rank, changes):
    net, (x, y) = network(), batch()
    options = {"subspace": drawn(3)} | (changes if rank == 1 else {})
    if "model" in options:
        options["model"] = net
    opt = jp.optim.PlaneSearch(net.parameters(), process_group=dist.group.WORLD, **options)
    return step_of(opt, lambda: F.cross_entropy(net(x), y))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subspace": drawn(4)}, "Drawn: \"Drawn(k=4, law='gaussian'"),
        ({"subspace": Subspace(drawn(3), "hessian")}, "curvature: 'hessian' on rank 1, 'ggn' on others"),
        ({"descent": "newton"}, "descent: 'Newton(tolerance=None)' on rank 1"),
        ({"search": FullStep()}, "search: 'FullStep()' on rank 1, 'NoiseAware("),
        ({"lr": 0.5}, "lr: [0.5] on rank 1"),
        ({"subspace": [Drawn(3)]}, "subspace: 'Drawn' on rank 1, 'Drawn, Averages, PreviousStep' on others"),
        ({"model": True}, "model: 'Sequential' on rank 1, None on others"),
        (
            {"model": True, "gradient": ActivityPerturbation(3.0)},
            "gradient: 'ActivityPerturbation(passes=3.0, feedback=True)' on rank 1",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_settings_of_a_search_are_refused_at_the_start(two, changes, said):
    for error in two.run(search_refused, changes):
        assert isinstance(error, jp.HandshakeError) and error.ranks == (1,) and said in str(error)


def search_sent(rank, with_model):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3))
    x, y = shard_of(rank, *batch(torch.float32, 64), 20)
    model = net if with_model else None
    opt = jp.optim.PlaneSearch(net.parameters(), model, process_group=dist.group.WORLD, audit="never")
    train(net, opt, x, y, 3, weight=len(x))
    before = opt.ranks.sent
    calls = []
    opt.step(lambda: calls.append(1) or F.cross_entropy(net(x), y), weight=len(x))
    learned = opt.state["jetplane"]["gradient"].get("feedback")
    taught = [learned["second_moments"], *learned["maps"].values()] if learned else []
    assert len(taught) == 2 * with_model  # of the first layer, and the errors' moments
    size = sum(t.numel() for t in (*net.parameters(), *taught))
    return opt.ranks.sent - before, len(opt.plane.slope), len(calls) - 1, size


def test_bytes_of_a_search(two):
    for sent, k, guards, _ in two.run(search_sent, False):
        assert k == 64 + 5
        numbers = 1 + k + k * (k + 1) // 2
        assert sent == 8 * (21 + 2 * numbers + 3 * guards) < 40_000
    for sent, k, _, size in two.run(search_sent, True):
        plane = 8 * (21 + 2 * (1 + k + k * (k + 1) // 2))
        rest = sent - plane - 4 * (2 + size) - 8 * 2  # the estimate, and where the shards lie
        assert k == 6 and rest > 0 and rest % 24 == 0  # two layers: the first scaled average is two of them


def step_of(opt, loss, **kwargs):
    """The error of a step, or its loss."""
    try:
        return opt.step(loss, **kwargs).item()
    except Exception as error:
        return error


def disturbed(rank, disturb):
    """A good step, one that rank 1 disturbs, and a good one again."""
    net, (x, y) = network(), shard_of(rank, *batch(), 7)
    opt = OPTIMIZERS["fomoh-kd"](net.parameters(), process_group=dist.group.WORLD)
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    step_of(opt, closure, weight=len(x))
    before, state = flat(net), copy.deepcopy(opt.state_dict())
    error = step_of(opt, disturb(net, opt, closure) if rank == 1 else closure, weight=len(x))
    untouched = torch.equal(flat(net), before) and opt.state_dict() == state
    return error, untouched, step_of(opt, closure, weight=len(x))


def raises(net, opt, closure):
    def loss():
        raise OSError("the data are gone")

    return loss


def not_finite(net, opt, closure):
    return lambda: closure() * torch.tensor(float("nan"))


def flipped_bit(net, opt, closure):
    with torch.no_grad():
        net[2].bias[1] = torch.nextafter(net[2].bias[1], torch.tensor(9.0))
    return closure


def other_rate(net, opt, closure):
    opt.param_groups[0]["lr"] *= 0.5
    return closure


class TestFailuresOfOneRank:
    def test_an_error_stops_all_with_its_rank(self, two):
        (other, untouched, after), (own, also, same) = two.run(disturbed, raises)
        assert isinstance(other, jp.RemoteError) and other.ranks == (1,) and "rank 1: OSError: the data" in str(other)
        assert isinstance(own, OSError)
        assert untouched and also and isinstance(after, float) and after == same

    def test_nan_is_the_same_error_on_all(self, two):
        (other, untouched, after), (own, also, same) = two.run(disturbed, not_finite)
        assert isinstance(other, jp.NonFiniteError) and isinstance(own, jp.NonFiniteError)
        assert str(other).startswith("rank 1: the loss is not finite")
        assert untouched and also and after == same

    def test_parameters_that_differ_in_one_bit(self, two):
        for error, _, again in two.run(disturbed, flipped_bit):
            assert isinstance(error, jp.RanksDifferError) and error.ranks == (1,)
            assert "parameter 3: " in str(error) and "parameter 2" not in str(error)
            assert isinstance(again, jp.RanksDifferError)

    def test_rates_that_differ(self, two):
        for error, _, _ in two.run(disturbed, other_rate):
            assert isinstance(error, jp.RanksDifferError)
            assert "lr: [0.15] on rank 1, [0.3] on others" in str(error)


def interrupted(rank, everywhere):
    net = network()
    opt = OPTIMIZERS["fgd"](net.parameters(), process_group=dist.group.WORLD)

    def loss():
        if everywhere or rank == 0:
            raise KeyboardInterrupt
        return net(batch()[0]).square().mean()

    try:
        opt.step(loss)
    except BaseException as error:
        return type(error)


def test_ctrl_c_stops_all(two):
    assert two.run(interrupted, True) == [KeyboardInterrupt, KeyboardInterrupt]
    assert two.run(interrupted, False) == [KeyboardInterrupt, jp.RemoteError]


def refused(rank, changes):
    net, (x, y) = network(), batch()
    group = dist.group.WORLD
    kwargs = {"k": 3}
    if rank == 1:
        net = nn.Linear(6, 3, dtype=torch.float64) if "model" in changes else net
        distributed.code.cache_clear()
        package = distributed.__file__
        distributed.__file__ = __file__ if "code" in changes else package
        kwargs |= {k: v for k, v in changes.items() if k not in ("model", "code")}
    try:
        opt = jp.optim.FoMoHKD(net.parameters(), process_group=group, **kwargs)
        return step_of(opt, lambda: F.cross_entropy(net(x), y))
    finally:
        if rank == 1:
            distributed.__file__ = package
            distributed.code.cache_clear()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 5}, "seed: 5 on rank 1, 0 on others"),
        ({"k": 4}, "k: 4 on rank 1, 3 on others"),
        ({"law": "uniform"}, "law: 'uniform' on rank 1, 'gaussian' on others"),
        ({"descent": "damped"}, "descent: 'Damped(damping=0.01, scaled=False)' on rank 1"),
        ({"model": "other"}, "number of parameters: 21 on rank 1, 83 on others"),
        ({"code": "other"}, "code of jetplane: "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused_at_the_start(two, changes, said):
    for error in two.run(refused, changes):
        assert isinstance(error, jp.HandshakeError) and error.ranks == (1,)
        assert said in str(error)


class Experts(nn.Module):
    """Uses one of two layers, as the data say."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 3, dtype=torch.float64) for _ in range(3))

    def forward(self, x, which):
        return torch.cat([self.layers[w](x[which == w]) for w in which.unique().tolist()])


def experts(rank, ranks):
    """Shards that make use of different parameters."""
    torch.manual_seed(1)
    net, (x, y) = Experts(), batch()
    group = dist.group.WORLD if ranks > 1 else None
    which = torch.zeros(len(y), dtype=torch.long)
    which[7:] = 1
    if ranks > 1:
        x, y, which = (t[:7] if rank == 0 else t[7:] for t in (x, y, which))
    opt = jp.optim.FoMoHKD(net.parameters(), lr=0.3, k=3, descent="damped", weight_decay=0.1, process_group=group)
    for _ in range(5):
        opt.step(lambda: F.cross_entropy(net(x, which), y), weight=len(y))
    return flat(net)


def test_parameters_that_one_shard_uses_move_on_all_ranks(two):
    first, second = two.run(experts, 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, experts(0, 1), rtol=1e-12, atol=1e-14)


def noisy(rank, ranks, k=10):
    """Random numbers and buffers move once a step, however often a rank evaluates."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).double()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("direction",)) if ranks > 1 else None
    opt = jp.optim.FoMoHKD(net.parameters(), lr=0.1, k=k, descent="saddle-free", clip=0.3, process_group=mesh)
    x, y = batch()
    losses = train(net, opt, x, y, 5)
    items = 1 if opt.ranks is None else len(plan(PlaneSpec(k, "hessian", "all"), 2)[rank])
    return losses, flat(net), net[1].running_mean, items


def test_dropout_and_buffers_with_shares_of_the_directions(two):
    first, second = two.run(noisy, 2)
    assert first[3] == second[3] == 2  # blocks of directions
    assert all(torch.equal(a, b) for a, b in zip(first[1:3], second[1:3], strict=True))
    losses, params, mean, _ = noisy(0, 1)
    assert first[0] == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(first[1], params, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(first[2], mean, rtol=1e-11, atol=1e-13)


def misused(rank, how):
    net, (x, y) = network(), batch()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("direction",))
    opt = jp.optim.FoMoHKD(net.parameters(), k=10, process_group=mesh, audit="never")
    batches = iter(x.split(2))
    if how == "fetches":
        return step_of(opt, lambda: net(next(batches)).square().mean())
    x, y = shard_of(rank, x, y, 7) if how == "shards" else (x, y)
    return step_of(opt, lambda: F.cross_entropy(net(x), y), weight=1 + rank if how == "weights" else 1)


def test_ranks_that_share_directions_must_share_the_batch(two):
    for how in ("shards", "weights"):
        for error in two.run(misused, how):
            assert isinstance(error, jp.RanksDifferError) and "the same batch" in str(error)
    for error in two.run(misused, "fetches"):
        assert isinstance(error, jp.RandomClosureError) and "fetch the batch outside" in str(error)


def settings(rank):
    """What is refused, by its message."""
    world, said = dist.group.WORLD, []
    net, (x, y) = network(), batch()
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    line = init_device_mesh("cpu", (2,), mesh_dim_names=("direction",))
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    alone = dist.new_group([0])
    tries = {
        "mesh": lambda: jp.optim.FGD(net.parameters(), process_group=other),
        "word": lambda: jp.optim.FGD(net.parameters(), process_group="data"),
        "group": lambda: jp.optim.FGD(net.parameters(), process_group=alone) if rank else None,
        "compile": lambda: jp.optim.FGD(net.parameters(), process_group=line, compile=True),
        "copy": lambda: copy.deepcopy(jp.optim.FGD(net.parameters(), process_group=world)),
        "weight": lambda: jp.optim.FGD(net.parameters(), process_group=world).step(closure, weight=-1.0),
        "empty": lambda: jp.optim.FGD(net.parameters(), process_group=world).step(closure, weight=0),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except jp.ArgumentError as error:
            said.append((name, str(error)))
    return said


def test_settings_that_cannot_be(two):
    first, second = map(dict, two.run(settings))
    assert first.keys() | {"group"} == second.keys() == {"mesh", "word", "group", "compile", "copy", "weight", "empty"}
    assert "mesh with dimensions 'data' and 'direction'" in first["mesh"] and "'tensor'" in first["mesh"]


def test_without_torch_distributed_started():
    with pytest.raises(jp.ArgumentError, match="init_process_group"):
        jp.optim.FGD(network().parameters(), process_group=object())


def resumed(rank, state, weights):
    net, (x, y) = network(), shard_of(rank, *batch(), 7)
    net.load_state_dict(weights)
    opt = OPTIMIZERS["fomoh"](net.parameters(), process_group=dist.group.WORLD)
    opt.load_state_dict(state)
    train(net, opt, x, y, 3, weight=len(x))
    return net.state_dict(), opt.state_dict()


def test_a_state_goes_on_with_another_number_of_ranks(two):
    net, (x, y) = network(), batch()
    opt = OPTIMIZERS["fomoh"](net.parameters())
    train(net, opt, x, y, 4)
    (weights, state), _ = two.run(resumed, opt.state_dict(), net.state_dict())
    train(net, opt, x, y, 3)
    torch.testing.assert_close(weights, net.state_dict(), rtol=1e-12, atol=1e-14)
    net.load_state_dict(weights)
    opt.load_state_dict(state)
    assert opt.step(lambda: F.cross_entropy(net(x), y)).isfinite()


def gauss_newton(rank):
    net, (x, y) = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3)), batch(torch.float32)
    ranks, params = distributed.Ranks(dist.group.WORLD), list(net.parameters())
    tangents = StoredDirections(jp.Directions(64).tangents(params))
    closure = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    plane = ranks.evaluate(
        closure, lambda part: jp.evaluate(closure, params, part, "ggn"), tangents, PlaneSpec(64, "ggn", "all"),
        params, {}, dict, 1.0,
    )  # fmt: skip
    return plane, ranks.sent, jp.evaluate(closure, params, tangents, "ggn")


def test_bytes_of_64_directions_with_gauss_newton_curvature(two):
    for plane, sent, alone in two.run(gauss_newton):
        assert sent == 8 * (21 + 1 + 64 + 64 * 65 // 2) < 40_000 / 2  # a ring sends at most twice as much
        torch.testing.assert_close(plane.curvature, alone.curvature, rtol=1e-6, atol=0)
        assert plane.curvature.dtype == torch.float32


SPECS = [
    *(PlaneSpec(k, "hessian", "all") for k in (1, 2, 3, 5, 10, 33)), PlaneSpec(24, "ggn", "all", examples=True),
    PlaneSpec(7, "none", "diagonal"), PlaneSpec(7, "hessian", "diagonal"), PlaneSpec(12, "hessian", 3),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_every_number_is_counted_once(spec, parts):
    slope = torch.zeros(spec.k, dtype=torch.long)
    pairs = torch.zeros(spec.k, spec.k, dtype=torch.long)
    for items in plan(spec, parts):
        assert items
        for item in items:
            assert item.directions == sorted(set(item.directions))
            slope[item.directions] += item.slope
            if item.pairs is not None:
                held = torch.zeros_like(pairs)
                held[torch.tensor(item.directions)[:, None], torch.tensor(item.directions)] = 1
                pairs += item.pairs * held
    assert bool((slope == 1).all())
    if spec.pairs == "all":
        assert bool((pairs == 1).all())


@pytest.mark.parametrize(("curvature", "pairs"), [("none", "all"), ("hessian", "diagonal"), ("hessian", 3)])
def test_moments_without_all_pairs_are_refused(curvature, pairs):
    with pytest.raises(jp.ArgumentError, match="the curvature of all pairs"):
        PlaneMessage(PlaneSpec(6, curvature, pairs, examples=True))


def test_the_work_is_divided():
    def share(k, parts):
        whole = (k + 1) ** 2
        return (
            max(
                sum((len(t.directions) + 1) ** 2 for t in items)
                for items in plan(PlaneSpec(k, "hessian", "all"), parts)
            )
            / whole
        )

    assert share(64, 2) < 0.77 and share(64, 3) < 0.46 and share(64, 8) < 0.22
    # most of a Gauss-Newton plane's cost is in the directions: never worse than alone
    assert max(len(t.directions) for items in plan(PlaneSpec(64, "ggn", "all"), 3) for t in items) == 43
    assert [len(items) for items in plan(PlaneSpec(64, "ggn", "all"), 2)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_one_bit_and_changes_nothing(dtype):
    params = [torch.randn(50, 3).to(dtype), torch.randn(()).to(dtype), torch.randn(6, 5).to(dtype).mT]
    before = [p.clone() for p in params]
    marks = {fingerprint(params)}
    assert fingerprint([p.clone() for p in params]) in marks
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for p in params:
        bits = p.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])
        bits[(0,) * p.dim()] ^= 1
        marks.add(fingerprint(params))
    marks.add(fingerprint(params[::-1]))
    assert len(marks) == 5


# --- four ranks, one of which is lost ----------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    gang = Gang(4, tmp_path_factory.mktemp("four"), timeout=30)
    yield gang
    gang.stop()


def both_axes(rank, name, dtype):
    net, (x, y) = network(dtype), batch(dtype)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "direction"))
    opt = OPTIMIZERS[name](net.parameters(), process_group=mesh)
    x, y = shard_of(mesh.get_local_rank("data"), x, y, 7)
    return train(net, opt, x, y, 50, weight=len(x)), flat(net), opt.ranks.sent


def test_both_axes(four):
    TestTrajectory().check(four.run(both_axes, "fomoh-kd", torch.float64), "fomoh-kd", torch.float64, 1e-12)


@pytest.mark.parametrize("name", ["dense", "model"])
def test_a_search_on_both_axes(four, name):
    results = four.run(searched, name, torch.float64, 60, 50, {"data": 2, "direction": 2})
    TestPlaneSearch().check(results, name, torch.float64, 1e-12)


def killed(rank):
    net, (x, y) = network(), batch()
    opt = OPTIMIZERS["fomoh"](net.parameters(), process_group=dist.group.WORLD)
    train(net, opt, x, y, 3)
    before = flat(net)

    def loss():
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(net(x), y)

    start = time.monotonic()
    error = step_of(opt, loss)
    return error, time.monotonic() - start, torch.equal(flat(net), before)


def test_a_rank_that_is_killed_is_named(four):
    results = four.run(killed)
    assert results.pop(2) is None
    for error, seconds, untouched in results:
        assert isinstance(error, jp.LostRankError) and error.ranks == (2,)
        assert str(error).startswith("rank 2 is lost")
        assert seconds < 12 and untouched


def killed_in_the_guard(rank):
    net, (x, y) = network(), batch()
    opt = SEARCHES["drawn"](net, process_group=dist.group.WORLD)
    train(net, opt, x, y, 2)
    before, calls = tensors_of(net.state_dict(), opt.state_dict()), []

    def loss():
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(net(x), y)

    return step_of(opt, loss), equal(tensors_of(net.state_dict(), opt.state_dict()), before)


def test_a_rank_that_is_killed_in_the_guard_is_named(tmp_path):
    gang = Gang(2, tmp_path, timeout=30)
    try:
        (error, untouched), nothing = gang.run(killed_in_the_guard)
    finally:
        gang.stop()
    assert isinstance(error, jp.LostRankError) and error.ranks == (1,)
    assert untouched and nothing is None


def hanging(rank):
    net, (x, y) = network(), batch()
    opt = OPTIMIZERS["fgd"](net.parameters(), process_group=dist.group.WORLD)
    train(net, opt, x, y, 1)
    before = flat(net)

    def loss():
        if rank == 1:
            time.sleep(9)
        return F.cross_entropy(net(x), y)

    start = time.monotonic()
    return step_of(opt, loss), time.monotonic() - start, torch.equal(flat(net), before)


def test_a_rank_that_hangs_is_named_after_the_time_out(tmp_path):
    gang = Gang(2, tmp_path, timeout=2)
    try:
        (first, seconds, untouched), (late, _, also) = gang.run(hanging)
    finally:
        gang.stop()
    assert isinstance(first, jp.LostRankError) and first.ranks == (1,) and seconds < 2 + 6
    assert isinstance(late, jp.LostRankError) and late.ranks == () and "gave up waiting" in str(late)
    assert untouched and also


def split_by_hand(rank, how):
    """A layer whose inputs are split over ranks, beside the whole layer."""
    generator = torch.Generator().manual_seed(0)
    w, x, v = (torch.randn(*s, 6, dtype=torch.float64, generator=generator) for s in ((4,), (5,), (2, 4)))
    mine = slice(3 * rank, 3 * rank + 3)
    part = w[:, mine].clone()

    def loss():
        h = F.linear(x[:, mine], part)
        if how == "in place":
            dist.all_reduce(h)
        elif how == "product":
            h = all_reduce(h, "product", dist.group.WORLD)
        else:
            h = all_reduce(h, "sum", dist.group.WORLD)
        return F.mse_loss(h.tanh(), torch.ones_like(h))

    kind = "ggn" if how == "ggn" else "none" if how == "slope" else "hessian"
    whole = jp.evaluate(lambda: F.mse_loss(F.linear(x, w).tanh(), torch.ones(5, 4).double()), [w], [v], kind)
    try:
        return whole, jp.evaluate(loss, [part], [v[:, :, mine].clone()], kind)
    except jp.DerivativeError as error:
        return str(error)


@pytest.mark.parametrize("how", ["hessian", "ggn", "slope"])
def test_sums_over_ranks_inside_a_loss(two, how):
    for whole, part in two.run(split_by_hand, how):
        torch.testing.assert_close(vars(part), vars(whole), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("how", "said"), [("in place", "writes in place"), ("product", "known are sum, avg, max")])
def test_collectives_that_lose_derivatives_are_refused(two, how, said):
    for error in two.run(split_by_hand, how):
        assert said in error
