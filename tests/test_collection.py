"""Functions without noise: what the benchmark counts is what it says."""

import pytest
import torch

from benchmarks.functions import COLLECTION, newton, plane_search

# At the start, from the formulas by hand: the sum of squares that the collection's tables have.
STARTS = {
    "Freudenstein and Roth, 2": 400.5,
    "Beale, 2": 14.203125,
    "helical valley, 3": 2500.0,
    "Powell singular, 4": 215.0,
    "Wood, 4": 19192.0,
    "Watson, 6": 30.0,
    "extended Rosenbrock, 10": 121.0,
}


@pytest.mark.parametrize("name", STARTS)
def test_starting_values(name):
    case = COLLECTION[name]
    assert case.f(case.start).item() == pytest.approx(STARTS[name])


@pytest.mark.parametrize(
    "name", ["Freudenstein and Roth, 2", "Bard, 3", "Box, 3", "Powell singular, 4", "Chebyquad, 8"]
)
def test_all_directions_are_as_good_as_newtons_method(name):
    case = COLLECTION[name]
    steps, monotone, value = plane_search(case, len(case.start), 50)
    assert case.solved(value) and monotone
    reference = newton(case)
    assert reference is not None and steps <= 1.2 * reference


@pytest.mark.parametrize("name", ["Brown badly scaled, 2", "Beale, 2", "Wood, 4", "Kowalik and Osborne, 4"])
def test_functions_at_which_newtons_method_fails(name):
    case = COLLECTION[name]
    steps, monotone, value = plane_search(case, len(case.start), 40)
    assert case.solved(value) and monotone and steps < 40


@pytest.mark.parametrize("name", ["Wood, 4", "Biggs EXP6, 6", "extended Rosenbrock, 10"])
def test_fewer_directions_never_rise(name):
    case = COLLECTION[name]
    start = case.f(case.start).item()
    _, monotone, value = plane_search(case, len(case.start) // 2, 40)
    assert monotone and value < 0.5 * start
    assert torch.isfinite(torch.tensor(value))
