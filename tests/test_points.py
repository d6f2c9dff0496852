"""Where parameters go among the points of sources as users train: groups, clips, freezing, other sources, faults."""

import copy
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import jetplane as jp
from jetplane.directions import Term, UnitDirections
from jetplane.gradients import LocalHeads
from jetplane.optim import points
from jetplane.subspace.sources import Averages, Context, FastWeights, Source, Subspace

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1] ** 2).long() + (X[:, 2] > 1).long()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def optimizer(net, sources=None, every=4, groups=None, **settings):
    params = net.parameters() if groups is None else groups
    return jp.optim.PlaneSearch(
        params,
        net,
        gradient=LocalHeads(),
        subspace=Subspace(sources or [FastWeights(rate=0.02)], every=every),
        **settings,
    )


def steps(net, opt, count, first=0, factor=1.0):
    losses = []
    for i in range(first, first + count):
        rows = torch.randperm(256, generator=torch.Generator().manual_seed(i))[:64]
        x = X[rows].to(next(net.parameters()).dtype)
        losses.append(opt.step(lambda x=x, rows=rows: factor * F.cross_entropy(net(x), Y[rows])).item())
    return losses


def loss_of(net):
    with torch.no_grad():
        return F.cross_entropy(net(X.to(next(net.parameters()).dtype)), Y).item()


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def held(net, opt):
    """Copies of what training may change."""
    return copy.deepcopy(tree_leaves((opt.state_dict(), net.state_dict(), torch.get_rng_state())))


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_no_step_is_longer_than_the_clip():
    net, lengths = network(), []
    opt = optimizer(net, clip=0.05)
    for i in range(20):
        before = flat(net)
        steps(net, opt, 1, i)
        lengths.append((flat(net) - before).norm().item())
    assert max(lengths) <= 0.05 * (1 + 1e-4)
    assert sum(length > 0.04 for length in lengths) > 10  # of planes, of those that judge, and between


@pytest.mark.filterwarnings("ignore:1 of 8|2 of 8:jetplane.errors.JetplaneWarning")
def test_what_the_loss_does_not_use_is_not_decayed():
    net = network()
    net.unused = nn.Linear(2, 2)
    before = net.unused.weight.detach().clone()
    trunk = net[:5]
    opt = optimizer(net, weight_decay=0.1)
    for _ in range(10):
        opt.step(lambda: F.cross_entropy(trunk(X), Y))
    assert torch.equal(before, net.unused.weight)


def test_a_group_with_a_rate_of_zero_counts_as_frozen():
    """Or the fast weights of the others would be fitted to values of it that parameters never have."""
    ends = []
    for frozen in (True, False):
        net = network()
        first, others = list(net[0].parameters()), [*net[2].parameters(), *net[4].parameters()]
        net[0].requires_grad_(not frozen)
        opt = optimizer(net, groups=[{"params": first, "lr": 1.0 if frozen else 0.0}, {"params": others}])
        steps(net, opt, 40)
        ends.append(flat(net))
    assert torch.equal(*ends)


def test_a_rate_of_zero_may_be_raised_later():
    net = network()
    opt = optimizer(net, groups=[{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2:].parameters()}])
    before = net[0].weight.detach().clone()
    steps(net, opt, 10)
    assert torch.equal(before, net[0].weight)
    opt.param_groups[0]["lr"] = 1.0
    steps(net, opt, 40, 10)
    assert not torch.equal(before, net[0].weight) and loss_of(net) < 0.7


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16])
def test_training_goes_on_in_another_dtype(of, to):
    first, second = network(of), network(to)
    opt, other = optimizer(first), optimizer(second)
    steps(first, opt, 8)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(second, other, 40, 8)
    assert loss_of(second) < 0.9
    wanted = torch.float64 if to == torch.float64 else torch.float32
    assert {t.dtype for p in second.parameters() for t in other.state[p].values()} == {wanted}


@pytest.mark.parametrize("sources", [[Averages(), FastWeights(0.02)], [FastWeights(0.02), FastWeights(0.005)]])
def test_shares_belong_to_sources_not_to_places(sources):
    """A state is loaded by an optimizer with other sources, in another order, and the other way round."""
    net = network()
    one, both = optimizer(net), optimizer(net, sources)
    steps(net, one, 6)
    share = one.state["jetplane"]["shares"]["FastWeights"]
    assert share > 0
    both.load_state_dict(one.state_dict())
    steps(net, both, 1, 6)  # no plane: shares stay
    assert both.state["jetplane"]["shares"]["FastWeights"] == share
    assert sum(both.state["jetplane"]["shares"].values()) == share
    steps(net, both, 5, 7)
    one.load_state_dict(both.state_dict())
    steps(net, one, 8, 12)
    assert list(one.state["jetplane"]["shares"]) == ["FastWeights"]


@dataclass(frozen=True)
class Towards(Source):
    """Points of the state, as they are."""

    names: tuple[str, ...] = ("a",)
    learns = False

    def points(self, context):
        return [[s[name] for s in context.state] for name in self.names]

    def directions(self, context):
        pairs = zip(context.places, context.params, context.state, strict=True)
        found = [(i, p, s) for i, p, s in pairs]
        return UnitDirections.of([{i: Term(s[name] - p) for i, p, s in found} for name in self.names])

    def remember(self, context, result):
        return context.state


def context(params, **states):
    each = [{name: value[i] for name, value in states.items()} for i in range(len(params))]
    return Context(params, list(range(len(params))), each, 5, 0)


def test_shares_of_several_sources_are_no_more_than_the_whole():
    origin = [torch.zeros(2)]
    contexts = [context(origin, a=[torch.tensor([2.0, 0.0])]), context(origin, a=[torch.tensor([0.0, 4.0])])]
    two = [Towards(), Towards()]
    weights = [torch.tensor([1.6]), torch.tensor([3.2])]  # 0.8 of the way to each
    assert points.shares(two, contexts, weights, [0.0, 0.0]) == pytest.approx([0.5, 0.5])
    weights = [torch.tensor([0.5]), torch.tensor([1.0])]  # a quarter of each: the rest as before
    assert points.shares(two, contexts, weights, [1.0, 0.0]) == pytest.approx([0.75, 0.25])


def test_shares_where_the_plane_had_no_room_for_all_points():
    of = context([torch.zeros(1)], a=[torch.tensor([2.0])], b=[torch.tensor([3.0])])
    assert points.shares([Towards(("a", "b"))], [of], [torch.tensor([1.0])], [0.0]) == [0.5]


def test_the_loss_at_a_point_is_known_only_for_all_of_it():
    """A parameter that joins has no state, and all points have the same tensor of it."""
    params = [torch.zeros(1), torch.zeros(1)]
    same, fast, mean = params[0], torch.tensor([1.0]), torch.tensor([2.0])
    of, asked = context(params, a=[same, fast], b=[same, mean]), []

    def loss(changes):
        asked.append([change.item() for _, change in changes])
        return 5.0

    changes, shares = points.judged([Towards(("a", "b"))], [of], [1.0, 1.0], [0.0], loss, ([same, fast], 1.0))
    assert asked == [[], [0.0, 2.0]]
    assert [i for i, _ in changes] == [1] and changes[0][1].item() == 1 and shares == [1.0]


def test_no_point_is_taken_where_no_loss_is_finite():
    params, nan = [torch.zeros(1)], float("nan")
    of = context(params, a=[torch.tensor([1.0])], b=[torch.tensor([nan])])
    changes, shares = points.judged([Towards(("a", "b"))], [of], [0.5], [0.3], lambda changes: nan, None)
    assert changes == [] and shares == [0.3]


BAD = {
    "a generator": lambda s: (point for point in [[s]]),
    "none": lambda s: None,
    "too few": lambda s: [[]],
    "another shape": lambda s: [[s.flatten()]],
    "a number": lambda s: [[1.0]],
}


@pytest.mark.parametrize("name", BAD)
def test_points_that_are_none_are_refused(name):
    class Bad(Towards):
        def points(self, context):
            return BAD[name](context.params[0])

    with pytest.raises(jp.errors.ArgumentError, match="points of Bad"):
        points.points_of(Bad(), context([torch.zeros(2, 3)], a=[torch.zeros(2, 3)]))


class _Wrong(Source):
    """A source that goes wrong in some method, once it has a state."""

    def __init__(self, where):
        self.where = where

    def weights(self, context):
        return [torch.zeros(()) for _ in context.params] if self.where == "weights" and any(context.state) else None

    def points(self, context):
        known = any(context.state)
        if self.where == "points" and known and next(iter(context.state[0].values())) > 2:
            raise ValueError("points")
        return [[p + 0.1 for p in context.params]] if known else []

    def directions(self, context):
        return None

    def remember(self, context, result):
        n = max([s["n"] for s in context.state if s], default=torch.zeros(())) + 1
        return [{"n": n} for _ in context.params][: 1 if self.where == "remember" and n > 2 else None]


@pytest.mark.parametrize(
    "where, error",
    [("weights", jp.errors.ArgumentError), ("points", ValueError), ("remember", jp.errors.ArgumentError)],
)
def test_a_source_that_goes_wrong_changes_nothing(where, error):
    net = network()
    opt = optimizer(net, [FastWeights(0.02), _Wrong(where)] if where != "weights" else [_Wrong(where)])
    for i in range(6):
        before = held(net, opt)
        try:
            steps(net, opt, 1, i)
        except error as caught:
            assert where in str(caught)
            break
    assert same(held(net, opt), before)
    assert i in (1, 2, 3)


class _Watched(Source):
    """Separable: it notes what of its own state and of the gradients is alive at each parameter."""

    separable = True

    def __init__(self):
        self.old, self.gradients, self.counts = [], [], []

    def directions(self, context):
        return None

    def remember(self, context, result):
        assert len(context.params) == len(result.gradient) == len(result.steps) == 1
        self.counts.append(sum(held() is not None for held in (*self.old, *self.gradients)))
        self.old += [weakref.ref(t) for state in context.state for t in state.values()]
        self.gradients += [weakref.ref(g) for g in result.gradient]
        return [{"n": torch.zeros_like(result.gradient[0])}]


@pytest.mark.parametrize("every", [1, 4])
def test_separable_sources_let_go_of_each_parameter_before_the_next(every):
    net, watched = network(), _Watched()
    opt = optimizer(net, [FastWeights(0.02), watched, Averages()], every=every)
    steps(net, opt, 6)
    assert len(watched.counts) == 6 * 6
    assert max(watched.counts[12:]) <= 1  # the averages of the first step are its gradient


def test_fast_weights_hold_no_directions_beside_their_points():
    """They are made of the points and the parameters when they are asked for."""
    net = network()
    opt = optimizer(net)
    steps(net, opt, 3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)  # away from the average
    (of,) = opt._contexts(opt._moving())
    made = FastWeights(0.02).directions(of)
    held = {t.data_ptr() for t in (*of.params, *(t for state in of.state for t in state.values()))}
    terms = [term for row in made._terms.values() for term in row.values()]
    assert {t.data_ptr() for term in terms for t in (term.tensor, term.origin)} <= held
    for i, p in enumerate(of.params):
        expected = [of.state[i][name] - p for name in ("fast", "mean")]
        lengths = [
            sum((s[name] - q).square().sum() for q, s in zip(of.params, of.state, strict=True))
            for name in ("fast", "mean")
        ]
        for row, (v, length) in enumerate(zip(expected, lengths, strict=True)):
            torch.testing.assert_close(made.draw(i, p)[row], v / length.sqrt(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(made.combine(i, p, torch.eye(2)[row]), v / length.sqrt(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["local heads", "noise on layers", "forward gradients"])
def test_a_batch_whose_squares_overflow_is_not_learned_from(kind):
    """The loss and its slope are finite, the average of squares would not be, and NaN from the next step on."""
    net = network()
    opt = {
        "local heads": lambda: optimizer(net),
        "noise on layers": lambda: jp.optim.PlaneSearch(net.parameters(), net),
        "forward gradients": lambda: jp.optim.PlaneSearch(net.parameters()),
    }[kind]()
    steps(net, opt, 6)
    before = held(net, opt)
    with pytest.raises(jp.errors.NonFiniteError, match="square"):
        steps(net, opt, 1, 6, factor=1e25)
    assert same(held(net, opt), before)
    steps(net, opt, 40, 6)
    assert loss_of(net) < 0.7


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_in_any_run_of_the_closure_change_nothing(error):
    net = network()
    opt = optimizer(net)
    runs = []
    for i in range(9):
        while True:
            before, left = held(net, opt), [len(runs)]

            def closure(left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise error("stop")
                return F.cross_entropy(net(X), Y)

            try:
                opt.step(closure)
            except error:
                assert same(held(net, opt), before)
                runs.append(i)
                continue
            runs.clear()
            break
    assert opt.state["jetplane"]["step"] == 9


def test_steps_under_inference_mode_are_as_those_outside():
    """Nothing is made in it that a later step outside could not compute with."""
    ends = []
    for inside in (False, True):
        net = network()
        opt = optimizer(net)
        with torch.inference_mode(inside):
            for i in range(6):
                opt.step(lambda net=net, i=i: F.cross_entropy(net(X[i::4]), Y[i::4]))
        steps(net, opt, 6, 6)
        net(X).sum().backward()
        ends.append(flat(net))
    assert torch.equal(*ends)


def test_a_rate_that_is_not_finite_is_refused_before_anything_changes():
    net = network()
    opt = optimizer(net)
    steps(net, opt, 4)
    opt.param_groups[0]["lr"] = float("nan")
    before = held(net, opt)
    with pytest.raises(jp.errors.ArgumentError, match="lr must be finite"):
        steps(net, opt, 1, 4)
    after = held(net, opt)
    assert same(*([x for x in found if isinstance(x, torch.Tensor)] for found in (before, after)))
    assert opt.state["jetplane"]["step"] == 4


ESTIMATORS = {
    "local heads": lambda net: optimizer(net),
    "noise on layers": lambda net: jp.optim.PlaneSearch(net.parameters(), net),
    "forward gradients": lambda net: jp.optim.PlaneSearch(net.parameters()),
}


@pytest.mark.parametrize("to", ESTIMATORS)
@pytest.mark.parametrize("of", ESTIMATORS)
def test_another_estimator_begins_anew(of, to):
    """The state of an optimizer with one is loaded by an optimizer with another."""
    net = network()
    first, second = ESTIMATORS[of](net), ESTIMATORS[to](net)
    steps(net, first, 6)
    second.load_state_dict(first.state_dict())
    steps(net, second, 30, 6)
    assert second.state["jetplane"]["step"] == 36 and loss_of(net) < 0.85


@pytest.mark.parametrize("gradient", [None, LocalHeads(), jp.gradients.ForwardGradients()])
def test_an_empty_batch_changes_nothing(gradient):
    """As the last one of a loader may be, where rows are left out."""
    net = network()
    opt = jp.optim.PlaneSearch(
        net.parameters(), None if gradient == jp.gradients.ForwardGradients() else net, gradient=gradient
    )
    steps(net, opt, 2)
    before = held(net, opt)
    with pytest.raises(jp.errors.NonFiniteError):
        opt.step(lambda: F.cross_entropy(net(X[:0]), Y[:0]))
    assert same(held(net, opt), before)
    steps(net, opt, 1)


def test_what_is_empty_may_be_joined_with_what_moves():
    """As a cache that holds nothing yet is with the first keys."""
    net = network()
    opt = jp.optim.PlaneSearch(net.parameters(), net)
    losses = [opt.step(lambda: F.cross_entropy(torch.cat([torch.tensor([]), net(X)], 1), Y)).item() for _ in range(3)]
    assert losses[-1] < losses[0]
