"""Sources of directions by themselves: what they remember, what they add to a plane, and what they refuse."""

import pytest
import torch
from torch import nn

import jetplane as jp
from jetplane.directions import Directions
from jetplane.subspace.sources import (
    Averages,
    Context,
    Drawn,
    PreviousStep,
    Result,
    Source,
    Subspace,
    kept_of_average,
    layer_groups,
    signal_fraction,
)

SHAPES = [(3, 2), (3,), (2, 3), (2,), (1, 2)]


def context(state, step=0, **settings):
    """Of as many of the parameters as there are states, known to directions by other places."""
    params = [torch.zeros(shape) for shape in SHAPES[: len(state)]]
    return Context(params, [10 + 2 * i for i in range(len(state))], state, step, seed=3, **settings)


def remembered(source, gradients, steps=()):
    """The state after so many steps with these estimates."""
    state = [{} for _ in gradients[0]]
    for n, found in enumerate(gradients):
        moved = steps[n] if steps else [None] * len(found)
        state = source.remember(context(state, n), Result(found, moved))
    return state


def vectors(source, state, step, **settings):
    """The directions, each as one vector over all parameters."""
    found = context(state, step, **settings)
    directions = source.directions(found)
    drawn = [directions.draw(i, p).flatten(1) for i, p in zip(found.places, found.params, strict=True)]
    return torch.cat(drawn, 1)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def estimates(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(number)]


# --- averages ---------------------------------------------------------------------------------------------


def test_averages_weigh_values_by_their_age():
    """The first value by no more than its age leaves it; mean squares are kept at 0.99."""
    values, averages, state = torch.randn(5, 3), Averages((0.9,), groups=1), [{}]
    for n, value in enumerate(values):
        state = averages.remember(Context([value], [0], state, n, 0), Result([value], [None]))
    for decay, name, of in ((0.9, "average 0.9", values), (0.99, "square", values.square())):
        weights = decay ** torch.arange(4, -1, -1)
        torch.testing.assert_close(state[0][name], (weights / weights.sum()) @ of)
    weights = 0.9 ** torch.arange(4, -1, -1)
    energy = ((weights / weights.sum()) ** 2 * values.square().sum(1)).sum()
    torch.testing.assert_close(state[0]["energy 0.9"], energy)


def test_averages_of_noise_count_for_little():
    torch.manual_seed(0)
    signal, source = torch.full((200,), 0.1), Averages()
    fractions = {}
    for name, part in {"noise": 0.0, "signal": 1.0}.items():
        state, found = [{}], []
        for n in range(50):
            value = part * signal + 0.1 * torch.randn(200)
            state = source.remember(Context([value], [0], state, n, 0), Result([value], [None]))
            held = state[0]
            found.append([signal_fraction(held[f"average {b}"], held[f"energy {b}"], b, n + 1) for b in source.decays])
        fractions[name] = torch.tensor(found)
    assert fractions["noise"][0].tolist() == [1.0, 1.0]  # of one estimate nothing is known
    # Unbiased: the mean of noise has no signal, and half of the square of each value above is signal: of an average
    # with weights of squares s in all, 1 / (1 + s).
    assert fractions["noise"][20:].mean().abs() < 0.15
    squares = torch.tensor([(1 - b) / (1 + b) * (1 + b**50) / (1 - b**50) for b in source.decays])
    torch.testing.assert_close(fractions["signal"][-10:].mean(0), 1 / (1 + squares), rtol=0.05, atol=0.0)


def test_two_equal_estimates_are_all_signal_and_two_orthogonal_ones_all_noise():
    for second, expected in ((torch.tensor([2.0, 0.0]), 1.0), (torch.tensor([0.0, 2.0]), 0.0)):
        state = [{}]
        for n, value in enumerate((torch.tensor([2.0, 0.0]), second)):
            state = Averages((0.9,)).remember(Context([value], [0], state, n, 0), Result([value], [None]))
        fraction = signal_fraction(state[0]["average 0.9"], state[0]["energy 0.9"], 0.9, 2)
        assert fraction == pytest.approx(expected, abs=1e-6)


def test_an_average_counts_by_its_signal_in_parts_of_a_quarter():
    source, unit = Averages((0.9,), scaled=False), torch.tensor([1.0, 0.0])
    params, weight = [torch.zeros(2), torch.zeros(2)], (1 - 0.9) / (1 + 0.9)  # of squares, after many steps
    for signal, expected in ((1.0, 1.0), (0.125, 0.5), (-1.0, 0.01)):
        energy = torch.tensor(1 - signal * (1 - weight))
        state = [{"average 0.9": unit, "energy 0.9": torch.tensor(weight)}, {"average 0.9": unit, "energy 0.9": energy}]
        found = source.directions(Context(params, [0, 1], state, 1000, 0))
        sizes = [found.draw(i, p)[0, 0].item() for i, p in enumerate(params)]
        assert sizes[1] / sizes[0] == pytest.approx(expected, rel=1e-4)


def test_two_estimates_by_hand():
    """Weights 0.9 : 1 at the decay 0.9; of orthogonal estimates the signal is that of their mean, which is none."""
    found = [[torch.tensor([[2.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]]
    state = [{}]
    for n, gradient in enumerate(found):
        of = Context([torch.zeros(1, 2)], [0], state, n, 0)
        state = Averages((0.9,)).remember(of, Result(gradient, [None]))
    old, new = 0.9 / 1.9, 1 / 1.9
    torch.testing.assert_close(state[0]["average 0.9"], torch.tensor([[2 * old, new]]))
    torch.testing.assert_close(state[0]["energy 0.9"], torch.tensor(old**2 * 4 + new**2))
    torch.testing.assert_close(state[0]["square"], torch.tensor([[4 * 0.99 / 1.99, 1 / 1.99]]))


def of_estimates(found, decays, groups):
    """The directions of averages by their definition: weights by age, scaled ones cut into groups."""
    ages = torch.arange(len(found) - 1, -1, -1)
    plain, rows = [], []
    for n, decay in enumerate(decays):
        w = decay**ages / (decay**ages).sum()
        s = 0.99**ages / (0.99**ages).sum()
        means, squares, counts = [], [], []
        for values in (torch.stack(of) for of in zip(*found, strict=True)):
            mean = torch.tensordot(w, values, 1)
            signal = mean.square().sum() - (w**2 * values.flatten(1).square().sum(1)).sum()
            fraction = signal / ((1 - (w**2).sum()) * mean.square().sum())
            counts.append((fraction / 0.25).clamp(0.01, 1.0))
            means.append(mean)
            squares.append(torch.tensordot(s, values.square(), 1))
        plain.append([c * m for c, m in zip(counts, means, strict=True)])
        scaled = [c * m / q.sqrt() for c, m, q in zip(counts, means, squares, strict=True)]
        cut = sorted(set(groups)) if n == 0 else [None]
        rows += [[x * (g in (None, mine)) for x, mine in zip(scaled, groups, strict=True)] for g in cut]
    return torch.stack([flat(row) / flat(row).norm() for row in (*plain, *rows)])


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_averages_by_their_definition(groups):
    model = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1, bias=False)])
    params = list(model.parameters())
    of_layers = {1: [0] * 5, 2: [0, 0, 0, 0, 1], 3: [0, 0, 1, 1, 2]}[groups]
    assert layer_groups(params, model, groups) == of_layers
    source, found = Averages((0.9, 0.5), groups=groups), estimates(5)
    state = [{} for _ in params]
    places = list(range(len(params)))
    for n, gradient in enumerate(found):
        state = source.remember(Context(params, places, state, n, 0, model), Result(gradient, [None] * 5))
    directions = source.directions(Context(params, places, state, 5, 0, model))
    drawn = torch.cat([directions.draw(i, p).flatten(1) for i, p in enumerate(params)], 1)
    torch.testing.assert_close(drawn, of_estimates(found, (0.9, 0.5), of_layers))


def test_parameters_that_join_later_begin_with_their_first_estimate():
    source = Averages((0.9,))
    state = remembered(source, [g[:1] for g in estimates(3)]) + [{}]
    late = estimates(1, seed=5)[0][:2]
    state = source.remember(context(state, 3), Result(late, [None, None]))
    assert torch.equal(state[1]["average 0.9"], late[1]) and torch.equal(state[1]["square"], late[1].square())
    assert vectors(source, [state[0], {}], 4)[:, 6:].abs().max() == 0.0  # nothing is known of it


def test_without_scaling_no_squares_are_remembered():
    source = Averages((0.0, 0.9), scaled=False)
    state = remembered(source, estimates(2))
    assert sorted(state[0]) == ["average 0.0", "average 0.9", "energy 0.0", "energy 0.9"]
    last = flat(estimates(2)[1])
    found = vectors(source, state, 2)
    assert found.shape == (2, 19)
    torch.testing.assert_close(found[0] / found[0].norm(), found[0])
    assert torch.equal(found[0].sign(), last.sign())


def test_half_precision_averages_have_energies_in_single_precision():
    state = Averages((0.5,)).remember(
        Context([torch.zeros(2).half()], [0], [{}], 0, 0), Result([torch.tensor([300.0, 400.0]).half()], [None])
    )
    assert state[0]["energy 0.5"].dtype == torch.float32 and state[0]["energy 0.5"].item() == 250_000.0


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_how_much_of_an_average_is_kept(decay):
    for n in (0, 1, 2, 7):
        weights = [decay**age for age in range(n + 1)]
        assert kept_of_average(decay, n) == pytest.approx(1 - 1 / sum(weights))


def test_a_fraction_of_nothing_is_nothing():
    zero = torch.zeros(3)
    assert signal_fraction(zero, torch.tensor(0.0), 0.9, 5) == 0.0
    assert signal_fraction(zero, torch.tensor(0.0), 0.9, 0) == signal_fraction(zero, torch.tensor(0.0), 0.9, 1) == 1.0
    assert signal_fraction(torch.tensor([1.0]), torch.tensor(1.0), 0.0, 9) == 1.0  # the last estimate alone


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (1, [0, 0, 0, 0, 0, 0, 0, 0]),
        (2, [0, 0, 0, 0, 0, 0, 0, 1]),
        (3, [0, 1, 1, 1, 1, 1, 1, 2]),
        (4, [0, 1, 1, 1, 2, 2, 2, 3]),
        (5, [0, 1, 1, 2, 2, 3, 3, 4]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (20, [0, 1, 4, 7, 10, 13, 16, 19]),
    ],
)
def test_groups_are_the_first_layer_the_last_one_and_runs_of_those_between(groups, expected):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
    assert layer_groups([m.weight for m in model], model, groups) == expected
    assert layer_groups([model[3].bias], model, groups) == [groups - 1 if groups > 1 else 0]
    two = [model[6].bias, model[2].weight, model[2].bias]
    assert layer_groups(two, model, groups) == ([groups - 1, 0, 0] if groups > 1 else [0, 0, 0])
    assert layer_groups([m.weight for m in model], None, groups) == [0] * 8


# --- the previous step ------------------------------------------------------------------------------------


def test_the_previous_step_is_the_last_one_that_was_not_zero():
    source, (first, second) = PreviousStep(), estimates(2)
    zero = [torch.zeros(shape) for shape in SHAPES]
    assert not PreviousStep.learns and not PreviousStep.compared
    state = source.remember(context([{}] * 5), Result([], zero))
    assert state == [{}] * 5 and source.directions(context(state)) is None
    state = source.remember(context(state), Result([], first))
    torch.testing.assert_close(vectors(source, state, 1), (flat(first) / flat(first).norm()).unsqueeze(0))
    assert source.remember(context(state), Result([], zero)) is state
    assert source.remember(context(state), Result([], [None] * 5)) is state
    state = source.remember(context(state), Result([], [second[0], None, zero[2], *second[3:]]))
    mixed = flat([second[0], first[1], zero[2], *second[3:]])
    torch.testing.assert_close(vectors(source, state, 2), (mixed / mixed.norm()).unsqueeze(0))


# --- drawn directions -------------------------------------------------------------------------------------


def test_drawn_directions_are_those_of_the_seed_and_step():
    settings = {"law": "rademacher", "tangents": "low-rank", "rank": 2}
    source = Drawn(4, **settings)
    expected = Directions(4, **settings, seed=3)
    expected.step = 7
    of = context([{}] * 2, 7)
    directions = source.directions(of)
    for place, param in zip(of.places, of.params, strict=True):
        torch.testing.assert_close(directions.draw(place, param), expected.draw(place, param))
    sparse = Drawn(4, tangents="sparse", density=0.5).directions(of)
    assert sparse.structure == "sparse" and sparse.density == 0.5
    assert source.remember(of, Result([], [])) is of.state and not source.learns and not source.compared


def test_as_many_directions_as_parameters_are_the_coordinates():
    for k in (9, None):
        of = context([{}] * 2)
        assert of.size == 9
        directions = Drawn(k).directions(of)
        drawn = [directions.draw(i, p).flatten(1) for i, p in zip(of.places, of.params, strict=True)]
        assert torch.equal(torch.cat(drawn, 1), torch.eye(9))
    half = Context([torch.zeros(2, 2).half()], [0], [{}], 0, 0)
    assert Drawn(4).directions(half).draw(0, half.params[0]).dtype == torch.float16


def test_64_directions_are_drawn_where_their_number_is_not_given():
    assert [Drawn().count(size) for size in (5, 64, 65, 10**6)] == [5, 64, 64, 64]
    assert [Drawn(3).count(size) for size in (3, 4)] == [3, 3]
    with pytest.raises(jp.ArgumentError, match="k = 3 directions exceed the number of parameters that may move, 2"):
        Drawn(3).count(2)


# --- what is refused --------------------------------------------------------------------------------------

BAD = {
    "no decay": lambda: Averages(()),
    "a decay of one": lambda: Averages((0.9, 1.0)),
    "a negative decay": lambda: Averages((-0.1,)),
    "no group": lambda: Averages(groups=0),
    "a truth value of groups": lambda: Averages(groups=True),
    "a fraction of groups": lambda: Averages(groups=2.0),  # type: ignore[arg-type]
    "no direction": lambda: Drawn(0),
    "another law": lambda: Drawn(law="cauchy"),
    "rank unasked": lambda: Drawn(rank=2),
    "density unasked": lambda: Drawn(tangents="dense", density=0.5),
    "another curvature": lambda: Subspace(curvature="fisher"),  # type: ignore[arg-type]
    "no source": lambda: Subspace([]),
    "no Source": lambda: Subspace([Averages(), 3]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    with pytest.raises(jp.ArgumentError):
        BAD[name]()


def test_settings_that_are_allowed():
    assert Averages((0.0,), groups=1).decays == (0.0,)
    assert Subspace().sources is None and Subspace([Drawn(1)], curvature="hessian").curvature == "hessian"
    assert Source.learns and Source.compared and Averages.learns and not Averages.compared
