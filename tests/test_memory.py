import os
import platform
import subprocess
import sys

import pytest
import torch

from jetplane.jets import memory
from jetplane.jets.memory import LARGE, Memory

LIKE = torch.empty(0)
N = LARGE // 4


@pytest.fixture
def held():
    region = Memory(64)
    if region._region is None:
        pytest.skip("no region of addresses here")
    return region


def test_the_place_of_a_dead_tensor_is_taken_again(held):
    a = held.empty((2, N), LIKE)
    at = a.data_ptr()
    view = a[1:].t()
    del a
    b = held.empty((2, N), LIKE)
    assert b.data_ptr() >= at + 8 * N  # the view lives
    del view
    assert held.empty((N,), LIKE).data_ptr() == at


def test_tensors_do_not_overlap(held):
    generator = torch.Generator().manual_seed(0)
    alive = {}
    for n in range(60):
        size = int(torch.randint(1, 4, (), generator=generator)) * N + n
        alive[n] = held.empty((size,), LIKE).fill_(n)
        if len(alive) > 4:
            del alive[sorted(alive)[int(torch.randint(len(alive), (), generator=generator))]]
        assert all(bool((t == value).all()) for value, t in alive.items())


def test_trimming_keeps_what_lives_and_clears_the_rest(held):
    a, b = held.empty((N,), LIKE).fill_(1), held.empty((N,), LIKE).fill_(2)
    del a
    held.trim()
    assert bool((b == 2).all())
    assert bool((held.empty((N,), LIKE) == 0).all())  # a page that was given back


def test_small_ones_and_systems_without_regions_have_memory_of_their_own(monkeypatch, held):
    assert held.empty((3, 4), LIKE.double()).dtype == torch.float64
    assert not held._taken
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE")
    other = Memory(64)
    assert other.empty((2, N), LIKE).shape == (2, N)
    other.trim()
    assert not other._taken


def test_few_directions_keep_to_the_allocator():
    few = Memory(2)
    few.empty((N,), LIKE)
    assert not few._taken


FAULTS = """
import resource, torch
from jetplane.jets import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(1 << 18) for _ in range(20)]  # of 1 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    before = faults()
keep_freed()
for _ in range(3):
    after = faults()
print(before, after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of another C library")
def test_freed_memory_is_kept():
    """Of 20 MiB, 5,120 pages, hardly one is mapped again."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=env)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before
