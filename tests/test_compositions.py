"""Directions made of others: stored, concatenated, selected, cached, of norm one; and what they say of absence."""

import math

import pytest
import torch

import jetplane as jp
from jetplane._sharding import Part
from jetplane.directions import (
    AbstractDirections,
    CachedDirections,
    ConcatenatedDirections,
    Directions,
    SelectedDirections,
    StoredDirections,
    Term,
    UnitDirections,
    compositions,
)
from jetplane.directions.compositions import concatenated
from jetplane.jets import Deferred, Partial, Stacked

PARAMS = [torch.zeros(30, 7), torch.zeros(13), torch.zeros(2, 3, 5), torch.zeros(())]


def test_held_directions_draw_once_and_only_what_is_asked_for():
    held = CachedDirections(Directions(2), PARAMS, places=[4, 5, 6, 7])
    assert held.used == set()
    tangents = held.structured(1, PARAMS[1])
    assert isinstance(tangents, Deferred) and held.used == {1}
    assert tangents.materialized().data_ptr() == held.draw(1, PARAMS[1]).data_ptr()
    torch.testing.assert_close(tangents.materialized(), Directions(2).draw(5, PARAMS[1]))


def test_concatenated_directions_are_their_sources_one_behind_the_other():
    stored = [torch.randn(2, *p.shape) for p in PARAMS]
    sphere = Directions(3, "sphere")
    both = ConcatenatedDirections([StoredDirections(dict(enumerate(stored))), sphere])
    tangents = both.tangents(PARAMS)
    expected = sphere.tangents(PARAMS)
    kappa = torch.randn(5)
    for i, p in enumerate(PARAMS):
        torch.testing.assert_close(tangents[i], torch.cat([stored[i], expected[i]]))
        torch.testing.assert_close(both.draw(i, p, slice(1, 4)), tangents[i][1:4])
        torch.testing.assert_close(both.combine(i, p, kappa), torch.tensordot(kappa, tangents[i], 1))
    with pytest.raises(jp.ShapeError, match="kappa"):
        both.combine(0, PARAMS[0], torch.ones(4))


def flat(tangents: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tangents], 1).double()


def test_squared_norms():
    given = StoredDirections([torch.randn(2, *p.shape) for p in PARAMS])
    expected = flat(given.tangents(PARAMS)).square().sum(1)
    torch.testing.assert_close(given.squared_norms(PARAMS), expected)
    size = sum(p.numel() for p in PARAMS)
    both = ConcatenatedDirections([given, Directions(3)])
    torch.testing.assert_close(both.squared_norms(PARAMS)[2:], torch.full((3,), float(size)).double())
    torch.testing.assert_close(SelectedDirections(both, [slice(1, 2)]).squared_norms(PARAMS), expected[1:])
    torch.testing.assert_close(CachedDirections(both, PARAMS).squared_norms(PARAMS)[:2], expected)
    norms = flat(Directions(400, tangents="rank-one").tangents(PARAMS)).square().sum(1)
    assert norms.mean() == pytest.approx(size, rel=0.1)  # what is expected of drawn ones


# --- directions that do not move every parameter -----------------------------------------------------------


def some_move() -> UnitDirections:
    """Three directions of which the first parameter has all, the second two, the third one, the last none."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, *p.shape) for p in PARAMS]
    moved = {0: (0, 1, 2), 1: (0, 2), 2: (1,)}
    vectors = [{i: Term(tensors[i][row], 2.0) for i, rows in moved.items() if row in rows} for row in range(3)]
    found = UnitDirections.of(vectors)
    assert found is not None
    return found


def test_unit_directions_have_norm_one_and_say_what_they_move():
    directions = some_move()
    v = flat(directions.tangents(PARAMS))
    torch.testing.assert_close(v @ v.mT * torch.eye(3), torch.eye(3).double())
    kinds = [directions.structured(i, p) for i, p in enumerate(PARAMS)]
    assert isinstance(kinds[0], Deferred) and kinds[3] is None
    assert isinstance(kinds[1], Partial) and isinstance(kinds[2], Partial)
    assert (kinds[1].rows, kinds[2].rows) == ((0, 2), (1,))
    for i, (p, kind) in enumerate(zip(PARAMS, kinds, strict=True)):
        drawn = directions.draw(i, p)
        if kind is not None:
            torch.testing.assert_close(kind.materialized(), drawn)
            torch.testing.assert_close(kind[1:3].materialized(), drawn[1:3])
            assert kind[3:].materialized().shape == (0, *p.shape)
            torch.testing.assert_close(kind[1:2].to(torch.float64).materialized(), drawn[1:2].double())
        kappa = torch.randn(3)
        torch.testing.assert_close(directions.combine(i, p, kappa), torch.tensordot(kappa, drawn, 1))
        torch.testing.assert_close(directions.draw(i, p, slice(1, 3)), drawn[1:3])
    with pytest.raises(jp.ShapeError, match="kappa"):
        directions.combine(0, PARAMS[0], torch.ones(4))


def test_terms_over_a_root_mean_square():
    term = Term(torch.tensor([3.0, 1.0, 5.0]), 2.0, torch.tensor([9.0, 4.0, 0.0]))
    torch.testing.assert_close(term.materialized(), torch.tensor([2.0, 1.0, 0.0]))
    small = Term(torch.tensor([3.0, -1.0, 0.0]), square=torch.tensor([1e-4, 0.25, 1e-20]))
    torch.testing.assert_close(small.materialized(), torch.tensor([300.0, -2.0, 0.0]))
    assert torch.equal(Term(small.tensor).materialized(), small.tensor)


def test_combined_terms_have_their_weights_and_squares():
    square = torch.tensor([4.0, 0.25, 0.0])
    terms = [Term(torch.tensor([3.0, -1.0, 5.0]), 0.5, square), Term(torch.tensor([1.0, 2.0, 3.0]), -3.0)]
    directions = UnitDirections([{0: term} for term in terms])
    combined = directions.combine(0, torch.empty(3), torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(combined, torch.tensor([1.5 - 30.0, -2.0 - 60.0, -90.0]))


def test_vectors_of_zeros_are_left_out():
    assert UnitDirections.of([{0: Term(torch.zeros(2))}, {}]) is None
    found = UnitDirections.of([{}, {0: Term(torch.tensor([3e-9, 0.0])), 1: Term(torch.tensor([4e-9]))}, {}])
    assert found is not None and found.k == 1
    torch.testing.assert_close(found.draw(0, torch.empty(2)), torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(found.draw(1, torch.empty(1)), torch.tensor([[0.8]]))


def test_vectors_too_short_to_be_scaled_are_left_out():
    """In single precision their inverse norm is infinite, and zeros beside it NaN."""
    assert UnitDirections.of([{0: Term(torch.tensor([1e-41, 0.0]))}]) is None
    found = UnitDirections.of([{0: Term(torch.tensor([0.0, 2e-38]))}])
    assert found is not None
    torch.testing.assert_close(found.draw(0, torch.empty(2)), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("drawn", ["dense", "rank-one"])
def test_compositions_keep_absence(drawn):
    """Behind each other, selected and cached: the same numbers, and nothing is stored for what does not move."""
    sources = [some_move(), Directions(2, tangents=drawn), StoredDirections({1: torch.ones(1, *PARAMS[1].shape)})]
    both = ConcatenatedDirections(sources)
    for directions in (both, SelectedDirections(both, [slice(0, 2), slice(3, 6)]), CachedDirections(both, PARAMS)):
        kappa = torch.randn(directions.k)
        for i, p in enumerate(PARAMS):
            tangents, whole = directions.structured(i, p), directions.draw(i, p)
            torch.testing.assert_close(tangents.materialized(), whole)
            torch.testing.assert_close(directions.combine(i, p, kappa), torch.tensordot(kappa, whole, 1))
    assert both.structured(3, PARAMS[3]).rows == (3, 4)
    assert both.structured(1, PARAMS[1]).rows == (0, 2, 3, 4, 5)


@pytest.mark.parametrize("rows", [(0,), (1, 0), (0, 3)])
def test_partial_tangents_of_other_rows(rows):
    with pytest.raises(jp.ShapeError, match="ascending rows below k = 3"):
        Partial(3, rows, torch.ones(2, 4))


def test_planes_of_absent_directions_are_those_of_zeros():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    params, x = list(net.parameters()), torch.randn(5, 3).double()
    vectors = [
        {0: Term(torch.randn(4, 3).double())},
        {2: Term(torch.randn(2, 4).double()), 3: Term(torch.ones(2).double())},
    ]
    directions = UnitDirections.of(vectors)
    assert directions is not None
    for settings in ({}, {"curvature": "ggn", "chunk": 1}, {"curvature": "ggn", "examples": True}, {"chunk": 2}):
        loss = lambda: torch.nn.functional.mse_loss(net(x), torch.ones(5, 2).double())  # noqa: E731
        found = jp.evaluate(loss, params, directions, **settings)
        expected = jp.evaluate(loss, params, directions.tangents(params), **settings)
        torch.testing.assert_close(found.slope, expected.slope)
        torch.testing.assert_close(found.curvature, expected.curvature)


# --- what compositions pass on ----------------------------------------------------------------------------


class Counted(AbstractDirections):
    """Two directions of ones and twos, which count how often they are drawn."""

    k = 2
    draws = 0

    def draw(self, index, param, directions=None):
        self.draws += 1
        return torch.stack([torch.full_like(param, n) for n in (1.0, 2.0)])[directions or slice(None)]

    def combine(self, index, param, kappa):
        self.draws += 1
        return torch.full_like(param, float(kappa[0] + 2 * kappa[1]))


def test_who_is_isotropic_and_who_is_worth_keeping():
    drawn, given = Directions(2), StoredDirections([torch.ones(1, 3)])
    unit = UnitDirections.of([{0: Term(torch.ones(3))}])
    flags = lambda d: (d.isotropic, d.cacheable)  # noqa: E731
    assert flags(drawn) == (True, True)
    assert flags(given) == flags(unit) == (False, False)
    assert flags(Counted()) == (False, True)
    assert flags(ConcatenatedDirections([drawn, drawn])) == (True, True)
    assert flags(ConcatenatedDirections([given, drawn])) == (False, True)
    assert flags(ConcatenatedDirections([given, given])) == (False, False)
    assert flags(SelectedDirections(drawn, [slice(1, 2)])) == (True, True)
    assert flags(SelectedDirections(given, [slice(0, 1)])) == (False, False)
    assert flags(CachedDirections(drawn, [torch.ones(3)])) == (True, False)
    assert flags(CachedDirections(given, [torch.ones(3)])) == (False, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_fits_is_kept_to_the_byte(dtype):
    w, other = torch.zeros(5, dtype=dtype), torch.zeros(1, dtype=dtype)
    size = 2 * 5 * dtype.itemsize
    for limit, draws in ((size, 1), (size - 1, 3), (math.inf, 1)):
        source = Counted()
        held = CachedDirections(source, [w, other], limit=limit)
        assert torch.equal(held.draw(0, w), held.draw(0, w))
        assert held.draw(0, w, slice(1, 2)).tolist() == [[2.0] * 5]
        assert source.draws == draws
        assert held.combine(0, w, torch.tensor([1.0, 3.0])).tolist() == [7.0] * 5
        assert source.draws == draws + (limit < size)
    source = Counted()
    held = CachedDirections(source, [w, other], limit=size)
    for _ in range(2):
        held.draw(0, w)
        held.draw(1, other)
    assert source.draws == 3  # the second one did not fit
    held.forget()  # and now it does
    for _ in range(2):
        held.draw(1, other)
    assert source.draws == 4
    held.draw(0, w)
    held.draw(0, w)
    assert source.draws == 6  # as the first one does not


def test_of_a_part_of_a_parameter_the_part_of_what_is_kept(monkeypatch):
    """A sharded parameter: stand-ins say which part of it this rank has."""
    source, whole, mine = Counted(), torch.zeros(6, 4), torch.zeros(2, 4)
    held = CachedDirections(source, [whole])
    kept = held.draw(0, whole)
    kept += torch.arange(24.0).reshape(6, 4)  # so that rows differ
    for of, draws in ((Part(torch.Size((6, 4)), (slice(2, 4), slice(0, 4))), 1), (None, 2)):
        monkeypatch.setattr(compositions, "part_of", lambda param, of=of: of)
        found = held.draw(0, mine)
        assert torch.equal(found, kept[:, 2:4] if of else Counted().draw(0, mine)) and source.draws == draws
    other = Part(torch.Size((5, 4)), (slice(2, 4), slice(0, 4)))  # of another whole
    monkeypatch.setattr(compositions, "part_of", lambda param: other)
    held.draw(0, mine)
    assert source.draws == 3


def test_what_is_not_worth_keeping_is_not_kept():
    source = Counted()
    source.cacheable = False
    held = CachedDirections(source, [PARAMS[1]])
    for _ in range(2):
        held.draw(0, PARAMS[1])
    assert source.draws == 2


def test_a_part_is_drawn_without_the_whole_where_the_whole_is_not_kept():
    sizes = []

    class Watched(Counted):
        def draw(self, index, param, directions=None):
            sizes.append(directions)
            return super().draw(index, param, directions)

    run = slice(1, 2)
    ConcatenatedDirections([Watched()]).draw(0, PARAMS[1], run)
    CachedDirections(Watched(), PARAMS, limit=0).draw(1, PARAMS[1], run)
    SelectedDirections(Watched(), [run]).draw(0, PARAMS[1])
    Watched().structured(0, PARAMS[1])[run].materialized()
    assert sizes == [run] * 4


@pytest.mark.parametrize(
    "of", [Directions(5, seed=3), Directions(5, tangents="rank-one"), Counted()], ids=["dense", "rank-one", "counted"]
)
def test_selected_directions_are_those_of_the_source_in_another_order(of):
    runs = [slice(3, 5), slice(0, 2)] if of.k == 5 else [slice(1, 2), slice(0, 1)]
    chosen = [row for run in runs for row in range(of.k)[run]]
    some = SelectedDirections(of, runs)
    assert some.k == len(chosen)
    kappa = torch.arange(1.0, 1 + len(chosen))
    for i, p in enumerate(PARAMS):
        whole = of.draw(i, p)[chosen]
        torch.testing.assert_close(some.draw(i, p), whole)
        torch.testing.assert_close(some.draw(i, p, slice(1, 3)), whole[1:3])
        torch.testing.assert_close(some.structured(i, p)[slice(0, len(chosen))].materialized(), whole)
        torch.testing.assert_close(some.combine(i, p, kappa), torch.tensordot(kappa, whole, 1))
    with pytest.raises(jp.ShapeError, match="kappa"):
        some.combine(0, PARAMS[0], torch.ones(len(chosen) + 1))


def test_squared_norms_of_tensors_are_summed_over_all_parameters():
    sizes = sum(p.numel() for p in PARAMS)
    assert Counted().squared_norms(PARAMS).tolist() == [sizes, 4 * sizes]
    assert Counted().squared_norms(PARAMS).dtype == torch.float64
    assert CachedDirections(Counted(), PARAMS[:1]).squared_norms(PARAMS[:1]).tolist() == [210, 840]
    stored = StoredDirections({5: torch.ones(1, 4), 7: 3 * torch.ones(1, 2)})
    assert stored.squared_norms([torch.empty(4), torch.empty(2)], places=[5, 7]).tolist() == [4 + 18]
    held = CachedDirections(stored, [torch.empty(4), torch.empty(2)], places=[5, 7])
    assert held.squared_norms([torch.empty(4), torch.empty(2)]).tolist() == [4 + 18]
    assert held.squared_norms([torch.empty(2)], places=[1]).tolist() == [18]
    with pytest.raises(ValueError, match="zip"):
        stored.squared_norms([torch.empty(4)], places=[5, 7])


@pytest.mark.parametrize("low_rank", [False, True])
def test_sums_are_of_single_precision_at_least(low_rank):
    """600 ones on top of 256 in bfloat16, where each alone would be lost; and double precision is kept."""
    k = 601
    tangents = torch.cat([torch.full((1, 1, 1), 256.0), torch.ones(k - 1, 1, 1)]).bfloat16()
    held = jp.LowRank(tangents, torch.ones_like(tangents), (1, 1)) if low_rank else tangents
    combined = StoredDirections([held]).combine(0, torch.empty(1, 1).bfloat16(), torch.ones(k))
    assert combined.dtype == torch.bfloat16 and combined.item() == 856.0
    if not low_rank:
        terms = UnitDirections([{0: Term(t)} for t in tangents])
        assert terms.combine(0, torch.empty(1, 1).bfloat16(), torch.ones(k)).item() == 856.0
    fine = torch.tensor([[[1.0]], [[1e-12]]]).double()
    held = jp.LowRank(fine, torch.ones_like(fine), (1, 1)) if low_rank else fine
    double = StoredDirections([held]).combine(0, torch.empty(1, 1).double(), torch.ones(2).double())
    assert double.item() == 1 + 1e-12


@pytest.mark.parametrize("given", [[], [torch.ones(())], [torch.ones(0, 3)], {0: torch.ones(2, 3), 4: torch.ones(3)}])
def test_stored_directions_have_one_number(given):
    with pytest.raises(jp.ShapeError, match="one K of at least 1"):
        StoredDirections(given)


def test_compositions_prepare_and_forget_their_sources():
    for wrap in (
        lambda d: ConcatenatedDirections([d, Directions(1)]),
        lambda d: SelectedDirections(d, [slice(0, 2)]),
        lambda d: CachedDirections(d, PARAMS),
    ):
        sphere = Directions(2, "sphere")
        directions = wrap(sphere)
        directions.prepare(PARAMS)
        torch.testing.assert_close(directions.draw(0, PARAMS[0])[:2], sphere.draw(0, PARAMS[0]))
        inner = CachedDirections(Counted(), PARAMS)
        outer = wrap(inner)
        inner.draw(1, PARAMS[1])
        outer.forget()
        inner.draw(1, PARAMS[1])
        assert inner._source.draws == 2


def test_directions_that_move_nothing_do_not_spoil_factors():
    low, none = Directions(2, tangents="rank-one").structured(0, PARAMS[0]), torch.empty(0, *PARAMS[0].shape)
    for pieces, rows in (([(1, Partial(1, (), none)), (2, low)], (1, 2)), ([(2, low), (3, None)], (0, 1))):
        held = concatenated(pieces, PARAMS[0])
        assert isinstance(held, Partial) and held.rows == rows and held.tangents is low
    assert concatenated([(1, Partial(1, (), none)), (2, None)], PARAMS[0]) is None
    assert concatenated([(2, low)], PARAMS[0]) is low


def test_joined_tangents_are_factors_where_all_are_of_one_rank():
    def low(rank, seed):
        return Directions(2, tangents="low-rank", rank=rank, seed=seed)

    w = PARAMS[0]
    dense = Directions(1)
    kinds = {
        jp.LowRank: [low(2, 0), low(2, 1)],
        Stacked: [low(2, 0), low(3, 1)],
        Deferred: [dense, dense],
    }
    for kind, sources in kinds.items():
        both = ConcatenatedDirections(sources)
        held = both.structured(0, w)
        assert type(held) is kind
        expected = torch.cat([source.draw(0, w) for source in sources])
        torch.testing.assert_close(held.materialized(), expected)
        torch.testing.assert_close(held[slice(1, both.k)].materialized(), expected[1:])
    assert type(ConcatenatedDirections([dense, low(2, 0)]).structured(0, w)) is Stacked
    assert type(ConcatenatedDirections([low(2, 0)]).structured(0, w)) is jp.LowRank
