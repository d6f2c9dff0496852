"""Pair structures, and coefficients of which some are absent, against the dense ones and reverse mode."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.directions import StoredDirections
from jetplane.errors import TorchVersionError
from jetplane.evaluation.context import expansion
from jetplane.jets import (
    AllPairs,
    Coefficients,
    Deferred,
    Diagonal,
    Jet,
    LowRank,
    Partial,
    Planes,
    Space,
    Stacked,
    Star,
    Sums,
    outer,
    parts,
    symmetric,
)
from jetplane.jets.pairs import Listed, structure_of
from jetplane.rules.registry import declare, enter, register

K = 6
GROUPS = Sums(K, (((0, 1.0), (2, -2.0)), ((1, 3.0), (4, 1.0), (5, 0.5))))
STRUCTURES = [AllPairs(K), Diagonal(K), Planes(K, 2), Planes(K, 3), Star(K), Sums.trace(K), GROUPS]


def expected(structure, full):
    """What a structure keeps of all x_ij, by its terms."""
    found = torch.zeros(structure.count, *full.shape[2:], dtype=full.dtype)
    for n, i, j, weight in structure.terms():
        found[n] += weight * full[i, j]
    return found


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_outer_products_are_sums_over_terms(structure):
    a, b = torch.randn(K, 3, 4).double(), torch.randn(K, 1, 4).double()
    product = a[:, None] * b[None]
    torch.testing.assert_close(structure.outer(a, b), expected(structure, product))
    torch.testing.assert_close(structure.symmetric(a, b), expected(structure, product + product.transpose(0, 1)))
    out = torch.empty(structure.count, 3, 4).double()
    structure.write_outer(out, a, b)
    torch.testing.assert_close(out, structure.outer(a, b))
    structure.add_outer(out, a, b)
    torch.testing.assert_close(out, 2 * structure.outer(a, b))
    torch.testing.assert_close(structure.gram(a.flatten(1), 3 * a.flatten(1)), structure.outer(a, 3 * a).sum((1, 2)))


def test_large_sums_are_written_in_blocks_that_change_nothing():
    structure, a = Sums.trace(3), torch.randn(3, 1 << 17).double()
    out = torch.ones(1, 1 << 17).double()
    structure.add_outer(out, a, a)
    torch.testing.assert_close(out, 1 + a.square().sum(0, keepdim=True))


@pytest.mark.parametrize("k", [40, 37])
def test_sums_over_many_directions_are_added_in_blocks_of_them(k):
    a, b = torch.randn(k, 3, 1000).double(), torch.randn(k, 1, 1000).double()
    out = torch.ones(1, 3, 1000).double()
    Sums.trace(k).add_outer(out, a, b)
    torch.testing.assert_close(out, 1 + (a * b).sum(0, keepdim=True))
    Sums.trace(k).add_outer(out, a, b[:1])  # the same for all directions
    torch.testing.assert_close(out, 1 + (a * b).sum(0, keepdim=True) + (a * b[:1]).sum(0, keepdim=True))


@pytest.mark.parametrize("structure", [*STRUCTURES, Listed(K, ((0, 2), (1, 5)))], ids=str)
def test_a_structure_is_made_again_from_its_key(structure):
    assert structure_of(structure.key) == structure


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("rows", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (0, 2), (3,)])
def test_a_restricted_structure_keeps_what_lies_among_its_directions(structure, rows):
    a = torch.randn(K, 2).double()
    there = torch.zeros(K, 1).double()
    there[list(rows)] = 1
    whole = structure.outer(a * there, a * there)
    found = structure.restricted(rows)
    if found is None:
        assert not whole.any()
        return
    inner, kept = found
    spread = torch.zeros_like(whole)
    spread[list(kept)] = inner.outer(a[list(rows)], a[list(rows)])
    torch.testing.assert_close(spread, whole)


def network(w):
    """Products of all kinds, normalization, attention and losses in one function of a matrix."""
    x = torch.linspace(-1, 1, 36, dtype=w.dtype).reshape(9, 4)
    hidden = F.layer_norm(x @ w, (4,))
    scores = (hidden @ hidden.t() / 2).softmax(-1) @ hidden
    images = F.conv2d(hidden.reshape(1, 1, 6, 6), w[:2, :2].reshape(1, 1, 2, 2))
    loss = F.cross_entropy(F.gelu(scores @ w.tanh()), torch.arange(9) % 4)
    return loss + images.square().logsumexp((0, 1, 2, 3)) + torch.bmm(w[None], w[None].exp()).std()


@pytest.fixture(scope="module")
def hessian():
    w = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return w, torch.autograd.functional.hessian(network, w).reshape(16, 16)


def coefficients(f, w, tangents, structure, order=2):
    """First and second coefficients of f at w for a structure."""
    with torch.inference_mode(), expansion(structure, order) as space:
        _, first, second = parts(f(Jet(w, Coefficients(space, 1, tangents), None, space)), space)
        return (c.full((), torch.float64, w.device).clone() for c in (first, second))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_every_structure_against_reverse_over_reverse(structure, hessian):
    w, h = hessian
    tangents = torch.randn(K, 4, 4).double()
    v = tangents.flatten(1)
    first, second = coefficients(network, w, tangents, structure)
    torch.testing.assert_close(second, expected(structure, v @ h @ v.mT))
    _, dense = coefficients(network, w, tangents, AllPairs(K))
    torch.testing.assert_close(AllPairs(K).matrix(dense), v @ h @ v.mT)


def low_rank(k):
    left, right = torch.randn(k, 2, 4).double(), torch.randn(k, 2, 4).double()
    return LowRank(left, right, (4, 4))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("rows", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (3,), ()])
@pytest.mark.parametrize("kind", ["dense", "low rank", "stacked"])
def test_absent_directions_are_zeros(structure, rows, kind, hessian):
    w = hessian[0]
    held = {
        "dense": lambda n: torch.randn(n, 4, 4).double(),
        "low rank": low_rank,
        "stacked": lambda n: Stacked([torch.randn(1, 4, 4).double(), low_rank(n - 1)]) if n > 1 else low_rank(n),
    }[kind](len(rows))
    partial = Partial(K, rows, held)
    tangents = partial if rows else None
    if not rows:
        with torch.inference_mode(), expansion(structure, 2) as space:
            assert not Coefficients(space, 1, partial)
        return
    for got, want in zip(
        coefficients(network, w, tangents, structure),
        coefficients(network, w, partial.materialized(), structure),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "none"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_planes_whose_directions_move_some_layers_alone(curvature, chunk):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 3).double(), torch.randint(2, (7,))
    params = list(net.parameters())
    rows = [(0, 2), (0, 2), (1,), (), (1, 3), (3,)]
    held = [
        Partial(4, r, low_rank_of(p, len(r)) if p.dim() == 2 and r else torch.randn(len(r), *p.shape).double())
        for p, r in zip(params, rows, strict=True)
    ]

    def plane(tangents):
        options = {} if chunk is None else {"chunk": chunk}
        return jp.evaluate(
            lambda: F.cross_entropy(net(x), y), params, StoredDirections(tangents), curvature, examples=True, **options
        )

    got, want = plane(held), plane([t.materialized() for t in held])
    torch.testing.assert_close(got.slope, want.slope)
    torch.testing.assert_close(got.curvature, want.curvature)
    torch.testing.assert_close(got.examples, want.examples)


def low_rank_of(param, k):
    rows, columns = param.shape
    return LowRank(torch.randn(k, 1, rows).double(), torch.randn(k, 1, columns).double(), param.shape)


def test_what_no_direction_moves_costs_nothing():
    w, x = torch.randn(4, 4), torch.randn(8, 4)
    with torch.inference_mode(), expansion(AllPairs(3), 2) as space:
        jet = Jet(w, Coefficients(space, 1, Partial(3, (1,), torch.ones(1, 4, 4))), None, space)
        _, first, second = parts(torch.tanh(x @ jet), space)
        assert first.tensor.shape == (1, 8, 4) and first.rows == (1,)
        assert second.tensor.shape == (1, 8, 4) and second.rows == (3,)  # the pair (1, 1) of (0,0) (0,1) (0,2) (1,1)
        assert not parts(x, space)[1]


def space(structure=None, order=2):
    return Space(structure or AllPairs(3), order)


def test_sums_of_different_directions_have_all_of_them():
    s = space()
    a, b = Coefficients(s, 1, torch.ones(1, 2), (0,)), Coefficients(s, 1, torch.ones(2, 2), (0, 2))
    total = a - b
    assert total.rows == (0, 2)
    assert total.tensor.tolist() == [[0, 0], [-1, -1]]
    assert (a + Coefficients(s, 1)) is a
    assert not Coefficients(s, 1) + Coefficients(s, 1)


def test_only_what_is_owned_is_overwritten():
    s, held = space(), torch.ones(3, 2)
    theirs = Coefficients(s, 1, held)
    mine = theirs * 2
    before = mine.tensor
    theirs += mine
    assert held.tolist() == [[1, 1]] * 3  # and the sum is a new tensor
    mine += Coefficients(s, 1, held)
    assert mine.tensor is before
    given = Jet(torch.zeros(2), mine, None, s).first
    given += Coefficients(s, 1, held)
    assert before.tolist() == [[3, 3]] * 3  # it became a jet's, and nobody's to overwrite


def test_products_that_are_summed_are_never_formed():
    s = space()
    a = Coefficients(s, 1, torch.randn(3, 5))
    product = outer(a, a)
    assert (product * torch.ones(5)).is_product
    torch.testing.assert_close(product.total().tensor, (a.tensor @ a.tensor.mT)[torch.triu(torch.ones(3, 3)) == 1])
    assert product.is_product
    assert not outer(a, Coefficients(s, 1)) and not symmetric(a, Coefficients(s, 1))
    assert not outer(Coefficients(space(order=1), 1, torch.ones(3, 5)), a)


def test_drawn_tangents_are_drawn_once_by_an_operator_and_not_kept():
    drawn = []
    like = torch.zeros(2)
    deferred = Deferred(lambda run: drawn.append(run) or torch.ones(3, 2)[run], like, 3)
    s = space()
    jet = Jet(like, deferred, None, s)
    for n in (1, 2):
        x1 = parts(jet, s)[1]
        assert x1.tensor is x1.tensor and len(drawn) == n
    assert jet.first.structured is deferred


def test_a_gauss_newton_plane_in_chunks_of_two_losses_of_one_shape():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(2, 7, 3).double(), torch.randn(2, 7, 2).double()
    losses = [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss]
    for a, b in itertools.product(losses, losses):
        closure = lambda a=a, b=b: a(net(x[0]), y[0]) + 2 * b(net(x[1]), y[1])  # noqa: E731
        whole = jp.evaluate(closure, list(net.parameters()), jp.Directions(6), "ggn")
        part = jp.evaluate(closure, list(net.parameters()), jp.Directions(6), "ggn", chunk=2)
        torch.testing.assert_close(part.curvature, whole.curvature)


def test_a_misspelt_rule_and_a_second_one_are_errors():
    with pytest.raises(TorchVersionError, match="sinn"):
        register("sinn")(lambda space, x: x)
    with pytest.raises(jp.ArgumentError, match="already"):
        declare("sin", lambda op: lambda space, x: x)
    with pytest.raises(jp.ArgumentError, match="already"):
        enter(torch.ops.aten.sin.default, lambda space, x: x)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("rows", [None, (1, 4)])
def test_large_elementwise_results_in_blocks_and_shared_directions(structure, rows):
    p = torch.randn(300, 256).double()
    for tangents in (torch.randn(K, 1, 256).double().expand(K, 300, 256), torch.randn(K, 300, 256).double()):
        held = tangents if rows is None else Partial(K, rows, tangents[list(rows)])
        with torch.inference_mode(), expansion(structure, 2) as space:
            found = parts(torch.tanh(torch.exp(Jet(p, Coefficients(space, 1, held), None, space))), space)[1:]
            first, second = (c.full(p.shape, p.dtype, p.device).clone() for c in found)
        y, x = torch.tanh(p.exp()), held.materialized() if rows else tangents
        d1 = (1 - y * y) * p.exp()
        d2 = d1 - 2 * y * d1 * p.exp()
        torch.testing.assert_close(first, d1 * x)
        torch.testing.assert_close(second, expected(structure, d2 * x[:, None] * x[None]))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_interpolated_products_keep_their_digits(size):
    """Sums that are interpolated are of factors of one size, whatever the lengths of the tangents."""
    torch.manual_seed(0)
    layers = [torch.randn(256, 256) / 16 for _ in range(2)]
    tangents = [size * torch.randn(3, 256, 256) / 16 for _ in layers]
    x = torch.randn(512, 256)

    def plane(dtype):
        params, data = [w.to(dtype) for w in layers], x.to(dtype)
        return jp.evaluate(
            lambda: ((data @ params[0]).tanh() @ params[1]).sum(), params, [t.to(dtype) for t in tangents]
        )

    single, double = plane(torch.float32), plane(torch.float64)
    for found, expected in ((single.slope, double.slope), (single.curvature, double.curvature)):
        assert (found.double() - expected).norm() < 1e-4 * expected.norm()
