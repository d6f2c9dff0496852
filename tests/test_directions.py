"""Drawn directions: the same numbers however they are asked for, structures of tangents, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jetplane as jp
from jetplane.directions import (
    KURTOSIS,
    CachedDirections,
    ConcatenatedDirections,
    Directions,
    StoredDirections,
    laws,
    step_scale,
)
from jetplane.jets import Deferred

DENSE = list(laws.LAWS)
EVERY = list(KURTOSIS)
PARAMS = [torch.zeros(30, 7), torch.zeros(13), torch.zeros(2, 3, 5), torch.zeros(())]


@pytest.mark.parametrize("law", EVERY)
@pytest.mark.parametrize("structure", ["dense", "rank-one"])
class TestOnDemand:
    def directions(self, law, structure):
        directions = Directions(5, law, tangents=structure, seed=7)
        directions.step = 3
        return directions

    def test_parts_are_the_parts_of_the_whole(self, law, structure, monkeypatch):
        whole = self.directions(law, structure).tangents(PARAMS)
        monkeypatch.setattr(laws, "_CHUNK_CPU", 4)
        again = self.directions(law, structure)
        again.prepare(PARAMS)
        for i, (p, t) in enumerate(zip(PARAMS, whole, strict=True)):
            assert t.shape == (5, *p.shape)
            torch.testing.assert_close(again.draw(i, p), t, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(again.draw(i, p, slice(1, 4, 2)), t[1:4:2], rtol=1e-6, atol=1e-7)

    def test_combine_is_the_weighted_sum(self, law, structure):
        directions = self.directions(law, structure)
        kappa = torch.randn(5, dtype=torch.float64)
        tangents = directions.tangents(PARAMS)
        held, stored = CachedDirections(directions, PARAMS), StoredDirections(tangents)
        for i, (p, t) in enumerate(zip(PARAMS, tangents, strict=True)):
            expected = torch.tensordot(kappa, t.double(), 1).float()
            for source in (directions, held, stored):
                torch.testing.assert_close(source.combine(i, p, kappa), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_hold_the_same_numbers(self, law, structure, dtype):
        if structure == "rank-one" or law == "sphere":
            rtol = 10 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
        else:
            rtol = 0.0
        single = self.directions(law, structure).tangents(PARAMS)
        other = self.directions(law, structure).tangents([p.to(dtype) for p in PARAMS])
        for a, b in zip(single, other, strict=True):
            assert b.dtype == dtype
            torch.testing.assert_close(b, a.to(dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize(("law", "structure"), [*((law, "dense") for law in DENSE), ("gaussian", "rank-one")])
def test_traces_with_a_step_that_changes(law, structure):
    directions = Directions(5, law, tangents=structure)

    def program(step):
        directions.step = step
        return directions.draw(0, PARAMS[0])

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for step in (1, 2):
        expected = program(step)
        torch.testing.assert_close(compiled(torch.tensor(step)), expected)
    torch._dynamo.reset()


def test_a_compiled_draw_is_the_draw():
    # Shapes at which a sequence of counters, left to the compiler, was miscompiled.
    directions = Directions(3, "uniform")

    def program(step):
        directions.step = step
        return directions.draw(0, torch.empty(100, 10))

    expected = program(5)
    torch.testing.assert_close(torch.compile(program, fullgraph=True)(torch.tensor(5)), expected)
    torch._dynamo.reset()


def test_rank_one_tangents_are_products():
    directions = Directions(64, tangents="rank-one")
    w = torch.empty(20, 3, 5)
    factors = directions.structured(1, w)
    assert isinstance(factors, jp.LowRank)
    a, b = factors.left[:, 0], factors.right[:, 0]
    assert a.shape == (64, 20) and b.shape == (64, 15)
    torch.testing.assert_close(directions.draw(1, w), torch.einsum("ki,kj->kij", a, b).reshape(64, 20, 3, 5))
    assert not directions.is_low_rank(torch.empty(20))
    torch.testing.assert_close(directions.draw(1, w[0, 0]), Directions(64).draw(1, w[0, 0]))
    assert abs(directions.draw(0, torch.empty(300, 300)).var() - 1) < 0.1


@pytest.mark.parametrize("structure", ["dense", "rank-one"])
def test_the_sphere_has_one_norm_over_all_parameters(structure):
    directions = Directions(3, "sphere", tangents=structure)
    tangents = directions.tangents(PARAMS)
    norms = torch.cat([t.reshape(3, -1) for t in tangents], 1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), math.sqrt(sum(p.numel() for p in PARAMS))))
    directions.step = 1
    with pytest.raises(jp.ArgumentError, match="prepare"):
        directions.draw(0, PARAMS[0])
    held = CachedDirections(directions, PARAMS[:2], places=[5, 9])
    some = torch.cat([held.draw(i, p).flatten(1) for i, p in enumerate(PARAMS[:2])], 1)
    torch.testing.assert_close(some.norm(dim=1), torch.full((3,), math.sqrt(223)))


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // 4 for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("law", DENSE)
@pytest.mark.parametrize("structure", ["dense", "rank-one"])
def test_combining_needs_the_memory_of_one_direction(law, structure):
    w = torch.empty(1000, 1000)
    directions = Directions(16, law, tangents=structure)
    with _Largest() as largest:
        directions.combine(0, w, torch.ones(16))
    assert largest.numel <= w.numel()


UNTYPED: Any = Directions
BAD = {
    "k": (lambda: Directions(0), jp.ArgumentError, "at least 1"),
    "k of another type": (lambda: UNTYPED(2.0), jp.ArgumentError, "integer"),
    "k a truth value": (lambda: Directions(True), jp.ArgumentError, "integer"),
    "seed a truth value": (lambda: Directions(1, seed=True), jp.ArgumentError, "seed"),
    "density above one": (lambda: Directions(1, tangents="sparse", density=1.1), jp.ArgumentError, r"\(0, 1\]"),
    "density unasked": (lambda: Directions(1, density=0.5), jp.ArgumentError, "sparse"),
    "rank missing": (lambda: Directions(1, tangents="low-rank"), jp.ArgumentError, "rank belongs"),
    "law": (lambda: Directions(1, "cauchy"), jp.ArgumentError, "gaussian"),
    "structure": (lambda: UNTYPED(1, tangents="low"), jp.ArgumentError, "rank-one"),
    "density missing": (lambda: Directions(1, tangents="sparse"), jp.ArgumentError, "density"),
    "density": (lambda: Directions(1, tangents="sparse", density=0.0), jp.ArgumentError, r"\(0, 1\]"),
    "rank": (lambda: Directions(1, tangents="low-rank", rank=0), jp.ArgumentError, "rank must be"),
    "rank unasked": (lambda: Directions(1, rank=2), jp.ArgumentError, "low-rank"),
    "seed": (lambda: UNTYPED(1, seed=0.5), jp.ArgumentError, "seed"),
    "integers": (
        lambda: Directions(1).draw(3, torch.ones(2, dtype=torch.int32)),
        jp.DTypeError,
        "parameter 3",
    ),
    "kappa": (lambda: Directions(2).combine(0, torch.ones(2), torch.ones(3)), jp.ShapeError, "kappa"),
    "nothing to concatenate": (lambda: ConcatenatedDirections([]), jp.ArgumentError, "at least one"),
    "stored": (lambda: StoredDirections([torch.ones(2, 3), torch.ones(3, 3)]), jp.ShapeError, "one K"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    build, error, message = BAD[name]
    with pytest.raises(error, match=message):
        build()


def test_empty_parameters_and_wide_seeds():
    assert Directions(2).draw(0, torch.empty(0, 4)).shape == (2, 0, 4)
    assert Directions(2, tangents="rank-one").draw(0, torch.empty(0, 4)).shape == (2, 0, 4)
    one, wide, below = (Directions(1, seed=seed).draw(0, torch.empty(5)) for seed in (1, 2**64 + 1, -1))
    assert torch.equal(one, wide) and not torch.equal(one, below)


@pytest.mark.parametrize("size", [1, 10])
@pytest.mark.parametrize("k", [1, 4])
def test_step_scales(size, k):
    for law, kurtosis in {"gaussian": 3, "rademacher": 1, "uniform": 1.8, "laplace": 6, "semicircle": 2}.items():
        assert KURTOSIS[law] == kurtosis
        assert step_scale(law, size, k) == pytest.approx(k / (size + kurtosis + k - 2))
    assert step_scale("sphere", size, k) == pytest.approx(k / (size + k - 1))
    for bad in ({"size": 0}, {"k": 0}, {"law": "cauchy"}):
        with pytest.raises(jp.ArgumentError):
            step_scale(**({"law": "gaussian", "size": 1, "k": 1} | bad))


def test_settings_at_their_limits():
    w = torch.empty(4, 6)
    dense, product = Directions(3, seed=2), Directions(3, tangents="rank-one", seed=2)
    torch.testing.assert_close(Directions(3, tangents="sparse", density=1.0, seed=2).draw(0, w), dense.draw(0, w))
    torch.testing.assert_close(Directions(3, tangents="low-rank", rank=1, seed=2).draw(0, w), product.draw(0, w))
    assert repr(product) == "Directions(k=3, law='gaussian', tangents='rank-one', seed=2)"


def test_low_rank_tangents_are_means_of_products():
    directions, w = Directions(3, tangents="low-rank", rank=4, seed=2), torch.empty(5, 6)
    factors = directions.structured(1, w)
    assert isinstance(factors, jp.LowRank)
    assert (factors.left.shape, factors.right.shape) == ((3, 4, 5), (3, 4, 6))
    numbers = Directions(3, seed=2).draw(1, torch.empty(4 * 11)).reshape(3, 4, 11)
    torch.testing.assert_close(factors.left, numbers[..., :5] / 2)
    torch.testing.assert_close(factors.right, numbers[..., 5:])
    for i in (torch.empty(5), torch.empty(0, 6)):
        assert not directions.is_low_rank(i) and isinstance(directions.structured(0, i), Deferred)


@pytest.mark.parametrize("settings", [{}, {"tangents": "rank-one"}, {"law": "sphere"}, {"law": "sphere", "seed": 9}])
def test_a_complex_parameter_has_the_tangents_of_its_parts(settings):
    z, parts = torch.zeros(4, 3, dtype=torch.complex64), torch.zeros(4, 3, 2)
    of_complex, of_real = Directions(2, **settings), Directions(2, **settings)
    of_complex.prepare([z])
    of_real.prepare([parts])
    drawn = of_complex.draw(0, z)
    torch.testing.assert_close(torch.view_as_real(drawn), of_real.draw(0, parts))
    torch.testing.assert_close(of_complex.structured(0, z).materialized(), drawn)
    kappa = torch.tensor([2.0, -1.0])
    torch.testing.assert_close(of_complex.combine(0, z, kappa), 2 * drawn[0] - drawn[1])
    assert of_complex.squared_norms([z, z]).tolist() == [48.0, 48.0]


def test_the_sphere_is_scaled_anew_for_another_step_or_seed():
    directions, w = Directions(2, "sphere"), torch.empty(50)
    first = directions.tangents([w])[0]
    for name in ("step", "seed"):
        setattr(directions, name, 4)
        with pytest.raises(jp.ArgumentError, match="prepare"):
            directions.combine(0, w, torch.ones(2))
        again = directions.tangents([w])[0]
        torch.testing.assert_close(again.norm(dim=1), first.norm(dim=1))
        assert not torch.equal(again, first)
