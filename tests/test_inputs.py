"""Directions in the span of linear layers' inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.directions import CachedDirections, SpannedDirections
from jetplane.evaluation.inputs import in_span, input_bases
from jetplane.jets import LowRank
from jetplane.subspace.sources import Averages, Context, Drawn

DOUBLE = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), **DOUBLE)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3)).double()


X, Y = normal(5, 9) @ normal(9, 9, seed=1), torch.randint(3, (5,), generator=seeded(2))


def closure_of(model):
    return lambda: F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_basis_is_that_of_the_largest_singular_vectors(rank):
    x = torch.linalg.qr(normal(8, 6)).Q * torch.tensor([50.0, 10, 0.1, 0.05, 0.02, 0.01], **DOUBLE)
    x = x @ torch.linalg.qr(normal(6, 6, seed=3)).Q.mT
    w = torch.zeros(4, 6, **DOUBLE)
    (basis,) = input_bases(lambda: F.linear(x, weight=w).sum(), [w], rank).values()
    largest = torch.linalg.svd(x).Vh[:rank].mT
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, **DOUBLE))
    torch.testing.assert_close(basis @ basis.mT, largest @ largest.mT, rtol=0, atol=1e-3)


def test_inputs_of_several_calls_are_put_together():
    w, parts = torch.zeros(4, 6, **DOUBLE), [normal(3, 6, seed=i) for i in range(3)]
    (basis,) = input_bases(lambda: sum(F.linear(x, w).sum() for x in parts), [w], 6).values()
    assert basis.shape == (6, 6)
    low = [torch.outer(torch.ones(3, **DOUBLE), direction) for direction in normal(2, 6, seed=9)]
    (basis,) = input_bases(lambda: sum(F.linear(x, w).sum() for x in low), [w], 2).values()
    for x in low:  # both calls' inputs are in the span
        torch.testing.assert_close(x @ basis @ basis.mT, x)


def test_rank_is_at_most_that_of_the_inputs_and_other_parameters_have_none():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Flatten(), nn.Linear(7, 4)).double()
    params = list(model.parameters())
    found = input_bases(lambda: model(X.unsqueeze(1)).sum(), params, 50)
    assert {i: tuple(a.shape) for i, a in found.items()} == {2: (7, 5)}


def test_drawing_leaves_random_numbers_and_buffers_as_they_are():
    model = nn.Sequential(nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3)).double()
    before, state = model[0].running_mean.clone(), torch.get_rng_state()
    assert len(input_bases(closure_of(model), list(model.parameters()))) == 1
    assert torch.equal(before, model[0].running_mean) and torch.equal(state, torch.get_rng_state())


def test_directions_are_factors_and_the_same_however_they_are_asked_for():
    w, b, basis = torch.zeros(4, 6, **DOUBLE), torch.zeros(4, **DOUBLE), torch.linalg.qr(normal(6, 2)).Q
    directions = SpannedDirections(jp.Directions(5, seed=3), {7: basis})
    directions.prepare([w, b], [7, 9])
    v, of_bias = directions.draw(7, w), directions.draw(9, b)
    assert isinstance(directions.structured(7, w), LowRank) and of_bias.shape == (5, 4)
    torch.testing.assert_close(directions.structured(7, w).materialized(), v)
    torch.testing.assert_close(directions.draw(7, w, slice(1, 3)), v[1:3])
    torch.testing.assert_close(v @ basis @ basis.mT, v)
    kappa = normal(5)
    for place, p, every in ((7, w, v), (9, b, of_bias)):
        torch.testing.assert_close(directions.combine(place, p, kappa), torch.tensordot(kappa, every, 1))
    assert directions.squared_norms([w, b], [7, 9]).tolist() == [4 * 2 + 4] * 5
    cached = CachedDirections(directions, [w, b], [7, 9])
    torch.testing.assert_close(cached.draw(0, w), v)


def test_forward_gradients_estimate_the_part_of_the_gradient_in_the_span():
    """Without bias; all of it where the basis spans all inputs."""
    model = network().eval()
    params, closure = list(model.parameters()), closure_of(model)
    exact = torch.autograd.grad(closure(), params)
    for rank, whole in ((1, False), (9, True)):
        directions = in_span(20_000, "gaussian", 0, 0, closure, params, range(4), rank)
        bases = input_bases(closure, params, rank)
        plane = jp.evaluate(closure, params, directions, "none")
        for i, (p, g) in enumerate(zip(params, exact, strict=True)):
            a = bases.get(i)
            wanted = g if a is None else g @ a @ a.mT
            found = directions.combine(i, p, plane.slope / directions.k)
            assert (found - wanted).norm() < 0.15 * max(wanted.norm(), exact[0].norm())
            if whole and i == 0:
                torch.testing.assert_close(wanted, g)


@pytest.mark.parametrize("kind", ["FGD", "FoMoH", "FoMoHKD", "PlaneSearch"])
def test_optimizers_move_weights_in_the_span_alone(kind):
    model = network().train()
    params, closure = list(model.parameters()), closure_of(model)
    if kind == "PlaneSearch":
        opt = jp.optim.PlaneSearch(params, subspace=[Drawn(4, tangents="inputs", rank=2), Averages()])
        rank = 2
    else:
        settings = {"descent": "saddle-free"} if kind == "FoMoHKD" else {}
        opt, rank = getattr(jp.optim, kind)(params, lr=1e-2, k=4, tangents="inputs", **settings), 1
    for step in range(3):
        before, basis = params[0].detach().clone(), input_bases(closure, params, rank, step)[0]
        opt.step(closure)
        moved = params[0].detach() - before
        assert moved.any()
        if step == 0:  # later ones also move along remembered directions
            torch.testing.assert_close(moved @ basis @ basis.mT, moved)


def test_training_resumes_bit_for_bit():
    def made():
        model = network()
        return model, jp.optim.FGD(model.parameters(), 1e-2, 4, tangents="inputs")

    model, opt = made()
    other, again = made()
    for _ in range(2):
        opt.step(closure_of(model))
    other.load_state_dict(model.state_dict())
    again.load_state_dict(opt.state_dict())
    torch.manual_seed(5)
    opt.step(closure_of(model))
    torch.manual_seed(5)
    again.step(closure_of(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jp.Directions(2, tangents="inputs"), "needs the inputs of a batch"),
        (lambda: Drawn(2, tangents="inputs", rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: Drawn(2, tangents="inputs", density=0.5), "density belongs to"),
        (lambda: input_bases(lambda: None, [], rank=True), "rank must be an integer of at least 1, got True"),
        (
            lambda: jp.optim.FGD([torch.zeros(3, 2)], tangents="inputs", process_group=object()),
            "needs the batch of one process",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(jp.ArgumentError, match=message):
        call()


def test_bases_that_do_not_fit_and_inputs_that_are_not_finite_are_refused():
    w = torch.zeros(4, 6)
    with pytest.raises(
        jp.ShapeError, match=r"parameter 0 of shape \(4, 6\): expected a basis \(6, rank\), got \(5, 1\)"
    ):
        SpannedDirections(jp.Directions(2), {0: torch.zeros(5, 1)}).draw(0, w)
    with pytest.raises(jp.NonFiniteError, match="takes inputs that are NaN"):
        input_bases(lambda: F.linear(torch.full((2, 6), torch.nan), w).sum(), [w])


def test_inputs_need_the_closure_of_one_process():
    with pytest.raises(jp.ArgumentError, match="needs the batch of one process"):
        Drawn(2, tangents="inputs").directions(Context([torch.zeros(3, 2)], [0], [{}], 0, 0))
