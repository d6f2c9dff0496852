"""The arithmetic of coefficients against that of dense stacks, with zeros for what is absent."""

import itertools

import pytest
import torch

from jetplane.jets import (
    AllPairs,
    Coefficients,
    Diagonal,
    LowRank,
    Partial,
    Planes,
    Space,
    Star,
    Sums,
    outer,
    symmetric,
)
from jetplane.jets.coefficients import SMALL, absent, aligned, broadcast, condensed, expand, jointly, lift, writable

K = 4
ROWS = [None, (0, 2), (1,), (0, 1, 3), ()]  # all of them, some, none
SHAPES = [(), (3,), (2, 3)]
D = torch.float64
CPU = torch.device("cpu")


def space(structure=None, order=2):
    return Space(structure or AllPairs(K), order)


def of(s, rows, shape, order=1, owned=False, dtype=D):
    """Random coefficients of which these are there."""
    count = s.count(order) if rows is None else len(rows)
    held = torch.randn(count, *shape).to(dtype)
    return absent(s, order) if rows == () else Coefficients(s, order, held, rows, owned)


def dense(c, shape):
    """All of a stack in its shape, written down independently of `Coefficients.full`."""
    whole = torch.zeros(c.space.count(c.order), *shape, dtype=D)
    if c.held is not None:
        rows = range(len(whole)) if c.rows is None else c.rows
        for n, row in enumerate(rows):
            whole[row] = c.tensor[n]
    return whole


def same(found, expected, shape):
    torch.testing.assert_close(dense(found, shape), expected.expand(len(expected), *shape))


@pytest.mark.parametrize("rows", ROWS)
def test_all_of_them(rows):
    s = space()
    for shape in SHAPES:
        c = of(s, rows, shape)
        assert torch.equal(c.full(shape, D, CPU), dense(c, shape))
        assert bool(c) == (rows != ())
    c = of(s, rows, (1, 3))
    assert torch.equal(c.full((2, 3), D, CPU), dense(c, (2, 3)))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ROWS, ROWS)))
@pytest.mark.parametrize("owned", [False, True])
def test_sums(first, second, owned):
    s = space()
    for a_shape, b_shape in [((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (3,))]:
        shape = torch.broadcast_shapes(a_shape, b_shape)
        lifted = lambda c, whole, shape=shape: lift(dense(c, whole), len(shape))  # noqa: E731

        def terms(a_shape=a_shape, b_shape=b_shape):
            return of(s, first, a_shape, owned=owned), of(s, second, b_shape)

        for alpha, add in (
            (1, lambda a, b: a + b),
            (-1, lambda a, b: a - b),
            (2.5, lambda a, b: a.plus(b, 2.5)),
            (1, lambda a, b: a.add(b)),
            (-3, lambda a, b: a.add(b, -3)),
        ):
            a, b = terms()
            expected, kept = lifted(a, a_shape) + alpha * lifted(b, b_shape), dense(b, b_shape)
            before = dense(a, a_shape)
            found = add(a, b)
            same(found, expected, shape)
            assert torch.equal(dense(b, b_shape), kept)
            if not owned:
                assert torch.equal(dense(a, a_shape), before)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ROWS, ROWS)))
@pytest.mark.parametrize("owned", [False, True])
def test_sums_of_products(first, second, owned):
    s = space()
    for factor in (torch.randn(3).to(D), torch.randn(2, 3).to(D), torch.randn(()).to(D), torch.randn(3), 1.5):
        for value in (1, -2):
            a, b = of(s, first, (2, 3), owned=owned), of(s, second, (2, 3))
            before = dense(a, (2, 3))
            expected = before + value * factor * dense(b, (2, 3))
            found = a.add_product(factor, b, value)
            torch.testing.assert_close(dense(found, (2, 3)), expected)
            if not owned:
                assert torch.equal(dense(a, (2, 3)), before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("owned", [False, True])
def test_products_with_a_factor(rows, owned):
    s = space()
    for shape in SHAPES:
        for factor in (2, -0.5, torch.randn(()).to(D), torch.randn(3).to(D), torch.randn(2, 1).to(D), torch.randn(3)):
            whole = torch.broadcast_shapes(shape, getattr(factor, "shape", ()))
            c = of(s, rows, shape, owned=owned)
            before = dense(c, shape)
            expected = lift(before, len(whole)) * factor
            for found in (c * factor, factor * c if not isinstance(factor, torch.Tensor) else c * factor):
                same(found, expected, whole)
            same(c / factor, lift(before, len(whole)) / factor, whole)
            same(-c, -before, shape)
            assert torch.equal(dense(c, shape), before)
            c *= factor
            same(c, expected, whole)


def test_what_is_owned_is_overwritten_where_it_fits():
    s = space()
    grown, alien = torch.randn(2, 3).to(D), torch.randn(3).to(torch.complex128)
    for change, in_place in (
        (lambda c: c.__imul__(2.0), True),
        (lambda c: c.__imul__(torch.ones(3).to(D)), True),
        (lambda c: c.__imul__(torch.ones(3)), True),
        (lambda c: c.__imul__(grown), False),
        (lambda c: c.__imul__(alien), False),
        (lambda c: c.add(of(s, None, (3,))), True),
        (lambda c: c.add(of(s, None, ())), True),
        (lambda c: c.add(of(s, None, (2, 3))), False),
        (lambda c: c.add(of(s, (0,), (3,))), False),
        (lambda c: c.add_product(torch.ones(3).to(D), of(s, None, (3,))), True),
        (lambda c: c.add_product(torch.ones(3), of(s, None, (3,))), False),
        (lambda c: c.add_product(grown, of(s, None, (3,))), False),
        (lambda c: c.add_product(2.0, of(s, None, (3,))), False),
    ):
        for owned in (False, True):
            c = of(s, None, (3,), owned=owned)
            held = c.tensor
            assert (change(c).tensor.data_ptr() == held.data_ptr()) == (in_place and owned)


def test_ownership():
    s = space()
    c = of(s, None, (3,))
    assert not c.owned and c.own().owned and not c.disowned().owned
    assert not Coefficients(s, 1, torch.ones(1, 3).expand(K, 3)).own().owned  # memory that its rows share
    assert (c * 2).owned and (c + c).owned and (-c).owned and (c / 2).owned
    assert c.map(torch.sin, True).owned and not c.map(torch.sin).owned
    assert not c.expanded((2, 3)).owned and not c.condensed().owned and not c.lifted(3).owned
    assert c.to(torch.float32).owned and not c.to(D).owned and c.to(D) is c
    same_tensor = Coefficients(s, 1, c.tensor, owned=True).to(D, CPU)
    assert same_tensor.owned and not c.to(D, CPU).owned


@pytest.mark.parametrize("rows", ROWS)
def test_totals(rows):
    s = space()
    for shape in SHAPES:
        c, weight = of(s, rows, shape), torch.randn(shape)
        whole = dense(c, shape)
        same(c.total(), whole.reshape(K, -1).sum(1), ())
        same(c.total(weight.to(D)), (whole * weight.to(D)).reshape(K, -1).sum(1), ())
        same(c.total(weight), (whole * weight).reshape(K, -1).sum(1), ())


@pytest.mark.parametrize("rows", ROWS)
def test_shapes_change(rows):
    s = space()
    c = of(s, rows, (2, 3))
    whole = dense(c, (2, 3))
    same(c.moved(lambda t: t.reshape(-1, 3, 2)), whole.reshape(K, 3, 2), (3, 2))
    turned = c.map(lambda t: t.mT)
    same(turned.moved(lambda t: t.reshape(-1, 6)), whole.mT.reshape(K, 6), (6,))
    same(c.expanded((5, 2, 3)), whole[:, None].expand(K, 5, 2, 3), (5, 2, 3))
    assert c.expanded((2, 3)) is c
    same(c.lifted(3), whole[:, None], (1, 2, 3))
    assert c.lifted(2) is c and c.lifted(1) is c
    same(c.expanded((5, 2, 3)).condensed(), whole[:, None], (1, 2, 3))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("structured", [False, True])
def test_runs_of_directions(rows, structured):
    s = space()
    c = of(s, rows, (2, 3))
    if structured and rows != ():
        n = len(c.tensor)
        c = Coefficients(s, 1, LowRank(torch.randn(n, 1, 2).to(D), torch.randn(n, 1, 3).to(D), (2, 3)), rows)
    whole = c.full((2, 3), D, CPU) if rows != () else dense(c, (2, 3))
    for first in range(K):
        for last in range(first + 1, K + 1):
            wanted = range(first, last)
            rows_there = [row for row in wanted if row in (range(K) if rows is None else rows)]
            fresh = Coefficients(s, 1, c.held, rows)
            found = fresh.selected(slice(first, last))
            assert bool(found) == bool(rows_there)
            mask = torch.zeros(K, 1, 1).to(D)
            mask[rows_there] = 1
            torch.testing.assert_close(dense(found, (2, 3)), whole * mask)
            assert found.rows == (None if len(rows_there) == K else tuple(rows_there) if rows_there else None)


STRUCTURES = [
    AllPairs(K), Diagonal(K), Planes(K, 2), Star(K), Sums.trace(K), Sums(K, (((0, 2.0), (3, 1.0)), ((1, -1.0),)))
]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_products_of_first_coefficients(structure):
    s = space(structure)

    def kept(full, shape):
        found = torch.zeros(structure.count, *shape, dtype=D)
        for n, i, j, weight in structure.terms():
            found[n] += weight * full[i, j]
        return found

    for first, second in itertools.product(ROWS, ROWS):
        for a_shape, b_shape in [((2, 3), (2, 3)), ((3,), (2, 3)), ((2, 1), (3,))]:
            shape = torch.broadcast_shapes(a_shape, b_shape)
            a, b = of(s, first, a_shape), of(s, second, b_shape)
            x, y = lift(dense(a, a_shape), 2), lift(dense(b, b_shape), 2)
            product = (x[:, None] * y[None]).expand(K, K, *shape)
            same(symmetric(a, b), kept(product + product.transpose(0, 1), shape), shape)
        a, factor, into = of(s, first, (2, 3)), torch.randn(2, 3).to(D), of(s, None, (2, 3), order=2, owned=True)
        x = dense(a, (2, 3))
        square = kept(x[:, None] * x[None], (2, 3))
        same(outer(a, a), square, (2, 3))
        same(outer(a, a) * factor, square * factor, (2, 3))
        same(outer(a, a) * torch.ones(4, 1, 1).to(D), square[:, None].expand(-1, 4, -1, -1), (4, 2, 3))
        same(outer(a, a).total(factor), (square * factor).sum((1, 2)), ())
        same(outer(a, a).formed() + outer(a, a), 2 * square, (2, 3))
        for alpha in (1, -2):
            before = dense(into, (2, 3))
            into = into.add(outer(a, a), alpha)
            same(into, before + alpha * square, (2, 3))
            same(outer(a, a).plus(into, alpha), square + alpha * dense(into, (2, 3)), (2, 3))


def test_no_second_coefficients_are_made_where_none_are_wanted():
    s = space(order=1)
    a = of(s, None, (3,))
    assert not outer(a, a) and not symmetric(a, a)
    s = space(Star(K))
    assert not symmetric(of(s, (0, 1), (3,)), of(s, (1,), (3,)))  # neither is the last direction


def test_joint_functions_take_zeros_for_what_is_absent():
    s = space()
    for first, second in itertools.product(ROWS, ROWS):
        a, b = of(s, first, (2, 3)), of(s, second, (4, 3))
        found = jointly(s, lambda *x: torch.cat(x, 1), [a, b], [(2, 3), (4, 3)], D, CPU)
        same(found, torch.cat([dense(a, (2, 3)), dense(b, (4, 3))], 1), (6, 3))
        assert bool(found) == (first != () or second != ())
        if first != () and second != ():
            rows, x, y = aligned(a, b)
            together = range(K) if None in (first, second) else sorted({*first, *second})
            assert rows == (None if None in (first, second) else tuple(together))
            assert torch.equal(x, dense(a, (2, 3))[list(together)]) and torch.equal(y, dense(b, (4, 3))[list(together)])


def test_kernels_write_what_functions_give():
    s = space()
    for requires_grad in (False, True):
        for rows in ROWS:
            c = of(s, rows, (2, 3))
            operand = torch.ones(3, requires_grad=requires_grad).to(D)
            calls = []

            def kernel(stack, out, calls=calls, operand=operand):
                calls.append(tuple(stack.shape))
                torch.mul(stack, operand, out=out)

            each = c.each((2, 3), kernel, lambda x, operand=operand: x * operand, operand)
            same(each, dense(c, (2, 3)), (2, 3))
            there = 0 if rows == () else len(c.tensor)
            assert calls == ([] if requires_grad else [(2, 3)] * there)
            calls.clear()
            same(c.written((2, 3), kernel, lambda x, operand=operand: x * operand, operand), dense(c, (2, 3)), (2, 3))
            assert calls == ([] if requires_grad or not there else [(there, 2, 3)])


def test_partial_tangents_say_which_are_there():
    s = space()
    c = Coefficients(s, 1, Partial(K, (1, 3), torch.ones(2, 3)))
    assert c.rows == (1, 3) and isinstance(c.held, torch.Tensor) and c.structured is None
    assert not Coefficients(s, 1, Partial(K, (), torch.ones(0, 3)))
    assert repr(c) == "Coefficients(order=1, count=4, there=(1, 3))"
    assert repr(absent(s, 2)) == "Coefficients(order=2, count=10, there=none)"
    assert repr(of(s, None, (1,))) == "Coefficients(order=1, count=4, there=all)"
    assert absent(s, 1) is absent(s, 1) and absent(s, 1) is not absent(s, 2)


def test_materialized_factors_are_counted_by_operator():
    s = space()
    s.operator = "sin"
    for n in (1, 2):
        low = Coefficients(s, 1, LowRank(torch.ones(K, 1, 2), torch.ones(K, 1, 3), (2, 3)))
        assert low.dtype == torch.float32 and low.structured is not None
        assert low.tensor is low.tensor and s.materialized == {"sin": n}


def test_large_results_are_in_the_memory_of_the_evaluation():
    s = space()
    for n in (SMALL // K - 1, SMALL // K, SMALL):
        c, factor = Coefficients(s, 1, torch.randn(K, n)), torch.randn(n)
        torch.testing.assert_close((c * factor).tensor, c.tensor * factor)
        torch.testing.assert_close((c + c).tensor, 2 * c.tensor)
        torch.testing.assert_close((c * factor.double()).tensor, c.tensor * factor.double())
        torch.testing.assert_close((c / 3).tensor, c.tensor / 3)
        one = Coefficients(s, 1, torch.randn(K, 1))
        torch.testing.assert_close((one * factor).tensor, one.tensor * factor)
        torch.testing.assert_close((c * factor[0]).tensor, c.tensor * factor[0])


def test_helpers_of_shapes():
    for a, b in itertools.product([(), (1,), (3,), (2, 1), (2, 3), (4, 1, 3)], repeat=2):
        assert broadcast(a, b) == tuple(torch.broadcast_shapes(a, b))
    c = torch.randn(K, 3)
    assert lift(c, 0) is c and lift(c, 1) is c and lift(c, 3).shape == (K, 1, 1, 3)
    assert expand(c, (3,)) is c and torch.equal(expand(c, (2, 3)), c[:, None].expand(K, 2, 3))
    shared = c[:, None, :, None].expand(K, 5, 3, 2)
    assert condensed(shared).shape == (K, 1, 3, 1) and condensed(c) is c
    assert condensed(c[:1].expand(K, 3)).shape == (K, 3)  # directions are not condensed


def test_who_may_be_written_to():
    plain, recorded = torch.ones(2), torch.ones(2, requires_grad=True)
    assert writable(plain, 3.0, None) and writable(torch.nn.Parameter(plain, False))
    assert not writable(plain, recorded)
    with torch.no_grad():
        assert writable(plain, recorded)
    assert not writable(torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {})))
