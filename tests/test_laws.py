"""Drawn numbers by their definition, in Python's integers and double precision, whatever part of them is asked for.

They are the same in every release: a run that is resumed draws on where it stopped.
"""

import math
from itertools import pairwise

import pytest
import torch

from jetplane.directions import Directions, laws

CPU = torch.device("cpu")
WORD = 2**64
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's


# --- the definition -------------------------------------------------------------------------------------


def signed(word, bits=64):
    return (word + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def mixed(word, twist=0):
    word = (word ^ word >> 30) * FIRST % WORD ^ twist
    word = (word ^ word >> 27) * SECOND % WORD
    return word ^ word >> 31


def folded(*words):
    key = 0
    for word in words:
        key = mixed(((key ^ word % WORD) + GOLDEN) % WORD)
    return key


def lane(start, twist, place):
    return mixed((start + (place + 1) * GOLDEN) % WORD, twist)


def numbers(law, lane):
    """All numbers that a lane gives."""
    low, high = signed(lane % 2**32, 32), signed(lane >> 32, 32)
    fraction, angle = max(abs(signed(lane)), 1) / 2**63, math.pi * low / 2**31
    if law == "gaussian":
        radius = math.sqrt(-2 * math.log(fraction))
        return [radius * math.cos(angle), radius * math.sin(angle)]
    if law == "rademacher":
        return [-1.0 if lane >> bit & 1 else 1.0 for bit in range(64)]
    if law == "uniform":
        return [math.sqrt(3) * (half + 0.5) / 2**31 for half in (low, high)]
    if law == "laplace":
        sides = [(half + 0.5) / 2**31 for half in (low, high)]
        return [math.copysign(math.sqrt(0.5) * math.log(abs(side)), side) for side in sides]
    assert law == "semicircle"
    return [2 * math.sqrt(fraction) * math.cos(angle)]


def stream(law, start, twist, size):
    """``size`` numbers: the first one of each lane, then the second one of each."""
    rows = laws.LAWS[law].rows
    lanes = -(-size // rows)
    every = [numbers(law, lane(start, twist, place)) for place in range(lanes)]
    return [each[row] for row in range(rows) for each in every][:size]


# --- what is drawn --------------------------------------------------------------------------------------

START = folded(11, 12)
TWISTS = [mixed((START + (n + 1) * GOLDEN) % WORD) for n in range(3)]
SIZES = {law: 64 * 6 - 5 if law == "rademacher" else 23 for law in laws.LAWS}


def words(values):
    return torch.tensor([signed(v) for v in values])


def collected(runs, size):
    """The numbers, and how often each of them was given."""
    found, times = torch.zeros(len(TWISTS), size), torch.zeros(len(TWISTS), size)
    for block, place, values in runs:
        found[block, place] = values
        times[block, place] += 1
    return found, times


def drawn(law, size, run=None):
    return collected(laws.pieces(laws.LAWS[law], signed(START), words(TWISTS), size, run), size)


# Published outputs of SplitMix64: from 0 by S. Vigna's C code, from 1234567 by the task at Rosetta Code.
@pytest.mark.parametrize(
    ("start", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
    ],
)
def test_lanes_are_splitmix64(start, outputs):
    untwisted = laws._mix(laws._outputs(range(len(outputs)), CPU) + start)
    assert [int(lane) % 2**64 for lane in untwisted] == outputs
    assert int(laws._mix(laws._signed(start + laws._GOLDEN))) % 2**64 == outputs[0]


def test_keys_from_tensors_are_keys_from_integers():
    words = (2**63 + 5, 12, -3)
    assert int(laws.key(words[0], torch.tensor(12), words[2])) == laws.key(*words)
    assert len({laws.key(a, b) for a in range(20) for b in range(20)}) == 400


def test_keys_are_folded_words():
    for key in ((), (0,), (5, -3, 2**64 - 1), (7, 7, 7)):
        assert laws.key(*key) % WORD == (folded(*key) if key else 0)
    assert laws.twists(signed(START), range(3), CPU).tolist() == words(TWISTS).tolist()
    assert laws.twists(signed(START), range(1, 3), CPU).tolist() == words(TWISTS[1:]).tolist()


def test_fourth_moments():
    known = {"gaussian": 3.0, "rademacher": 1.0, "uniform": 9 / 5, "laplace": 6.0, "semicircle": 2.0}
    assert {name: law.kurtosis for name, law in laws.LAWS.items()} == known


@pytest.mark.parametrize("chunk", [4, 7, 40])
@pytest.mark.parametrize("law", laws.LAWS)
def test_a_chunk_is_all_that_is_held_at_a_time(law, chunk, monkeypatch):
    monkeypatch.setattr(laws, "_CHUNK_CPU", chunk)
    period = 6 if law == "rademacher" else 4
    size = 384 if law == "rademacher" else 24
    runs = laws.windows(laws.LAWS[law], 0, words(TWISTS), size, period, slice(1, 3))
    pieces = [*laws.pieces(laws.LAWS[law], 0, words(TWISTS), size), *runs]
    assert max(values.numel() for _, _, values in pieces) <= chunk


@pytest.mark.parametrize("chunk", [4, 7, 40, 1 << 17])
@pytest.mark.parametrize("law", laws.LAWS)
def test_streams(law, chunk, monkeypatch):
    monkeypatch.setattr(laws, "_CHUNK_CPU", chunk)
    size = SIZES[law]
    found, times = drawn(law, size)
    expected = torch.tensor([stream(law, START, twist, size) for twist in TWISTS])
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    assert bool((times == 1).all())


@pytest.mark.parametrize("chunk", [4, 1 << 17])
@pytest.mark.parametrize("law", laws.LAWS)
def test_runs_of_a_stream(law, chunk, monkeypatch):
    monkeypatch.setattr(laws, "_CHUNK_CPU", chunk)
    size, step = SIZES[law], 61 if law == "rademacher" else 1
    whole, _ = drawn(law, size)
    for first in range(0, size + 1, step):
        for last in range(first, size + 1, step):
            found, times = drawn(law, size, slice(first, last))
            inside = (torch.arange(size) >= first) & (torch.arange(size) < last)
            torch.testing.assert_close(found, whole * inside, rtol=1e-6, atol=1e-6)
            assert torch.equal(times, inside.float().expand_as(times))


def test_a_run_draws_the_lanes_that_it_needs(monkeypatch):
    counted = []
    law = laws.Law(2, lambda lanes: iter([counted.append(lanes.numel()) or (0, torch.zeros(len(lanes), 2, 0))]), 0.0)
    for run, lanes in ((slice(3, 5), 2), (slice(12, 15), 3), (slice(9, 12), 3), (slice(3, 14), 10), (slice(4, 4), 0)):
        counted.clear()
        list(laws.pieces(law, 0, torch.zeros(1, dtype=torch.int64), 20, run))
        assert sum(counted) == lanes  # of ten; the second number of a lane comes ten places after the first


@pytest.mark.parametrize("chunk", [4, 7, 1 << 17])
@pytest.mark.parametrize(
    ("law", "size", "period"),
    [("gaussian", 48, 6), ("uniform", 48, 24), ("semicircle", 12, 4), ("rademacher", 372, 6), ("rademacher", 384, 3)],
)
def test_windows_of_a_stream(law, size, period, chunk, monkeypatch):
    whole, _ = drawn(law, size)
    monkeypatch.setattr(laws, "_CHUNK_CPU", chunk)
    for window in (slice(0, period), slice(1, period - 1), slice(period - 1, period), slice(1, 1)):
        runs = laws.windows(laws.LAWS[law], signed(START), words(TWISTS), size, period, window)
        width = window.stop - window.start
        found, times = collected(runs, size // period * width)
        expected = whole.unflatten(1, (-1, period))[:, :, window].flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert bool((times == 1).all())


@pytest.mark.parametrize(("size", "period"), [(0, 1), (48, 7), (42, 6), (18, 6)])
def test_windows_that_do_not_fit_into_the_rows_of_lanes(size, period):
    assert laws.windows(laws.LAWS["gaussian"], 0, words(TWISTS), size, period, slice(0, 1)) is None


@pytest.mark.parametrize("chance", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_coins_are_lanes_below_the_chance(chance):
    found = laws.coins(signed(START), words(TWISTS), slice(5, 400), chance)
    expected = [[signed(lane(START, t, n)) < (chance - 0.5) * 2.0**64 for n in range(5, 400)] for t in TWISTS]
    assert found.tolist() == expected


@pytest.mark.parametrize("law", laws.LAWS)
def test_directions_are_streams_by_seed_step_parameter_and_direction(law):
    directions = Directions(3, law, seed=5)
    directions.step = 7
    stem = folded(5, 7, 2)
    start, key = folded(stem, 1), folded(stem, 2)
    twists = [mixed((key + (k + 1) * GOLDEN) % WORD) for k in range(3)]
    expected = torch.tensor([stream(law, start, twist, 21) for twist in twists]).reshape(3, 3, 7)
    torch.testing.assert_close(directions.draw(2, torch.empty(3, 7)), expected, rtol=2e-6, atol=1e-6)


def test_kept_entries_are_coins_of_the_stream():
    directions, dense = Directions(3, tangents="sparse", density=0.25, seed=5), Directions(3, seed=5)
    stem = folded(5, 0, 2)
    start, key = folded(stem, 3), folded(stem, 2)
    twists = [mixed((key + (k + 1) * GOLDEN) % WORD) for k in range(3)]
    kept = torch.tensor([[signed(lane(start, t, n)) < -0.25 * 2.0**64 for n in range(400)] for t in twists])
    w = torch.empty(400)
    torch.testing.assert_close(directions.draw(2, w), torch.where(kept, 2 * dense.draw(2, w), 0))


def test_extreme_lanes_give_finite_numbers():
    """Zero, the least and the largest word, and words whose halves are so."""
    lanes = words([0, 1, WORD - 1, WORD // 2, WORD // 2 - 1, 2**32, 2**31, 2**31 - 1]).unsqueeze(0)
    for name, law in laws.LAWS.items():
        rows = [values[0] for _, values in law.draw(lanes.clone())]
        found = torch.cat(rows).mT
        expected = torch.tensor([numbers(name, v % WORD) for v in lanes[0].tolist()])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("law", laws.LAWS)
def test_rows_come_in_their_order(law):
    lanes = torch.arange(1, 6).unsqueeze(0)
    firsts = [(row, values.shape[1]) for row, values in laws.LAWS[law].draw(lanes)]
    assert firsts[0][0] == 0 and all(b[0] == a[0] + a[1] for a, b in pairwise(firsts))
    assert sum(firsts[-1]) == laws.LAWS[law].rows
