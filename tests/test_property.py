"""Random small programs, and properties that every plane has."""

import pytest
import torch
from cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jetplane as jp
from jetplane.testing import check_plane

N = 4  # all intermediate values are N x N matrices

OUT_OF_PLACE = {
    "matmul": lambda x, y: x @ y / N,
    "product": lambda x, y: x * y,
    "sum": lambda x, y: x + 2 * y,
    "tanh": lambda x, y: x.tanh(),
    "sin": lambda x, y: x.sin() + y,
    "softmax": lambda x, y: x.softmax(-1) - y,
    "transpose": lambda x, y: x.T,
    "flip": lambda x, y: x.flip(0),
    "reshape": lambda x, y: x.T.reshape(N, N),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "cat": lambda x, y: torch.cat([x[:2], y[2:]]),
    "rows": lambda x, y: x[torch.tensor([2, 0, 1, 1])],
    "norm": lambda x, y: x / (1 + x.norm()),
    "layer_norm": lambda x, y: torch.nn.functional.layer_norm(x, (N,)) + y,
}

# Each gets a value of its own, x, and writes to it through a view or directly.
IN_PLACE = {
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(y.sin()),
    "relu_": lambda x, y: x.relu_(),
    "row": lambda x, y: x[1].add_(y[0]),
    "column": lambda x, y: x[:, 2].mul_(y[:, 1]),
    "block": lambda x, y: x[1:3, :2].copy_(y[:2, 2:]),
    "transposed": lambda x, y: x.T[0].sub_(y[3]),
    "flat": lambda x, y: x.view(-1)[3:7].mul_(2.5),
    "diagonal": lambda x, y: x.diagonal().add_(y.diagonal()),
    "setitem": lambda x, y: x.__setitem__((slice(None), 0), y[:, 3]),
    "mask": lambda x, y: x.__setitem__(y > 0, y.sum()),
    "zero": lambda x, y: x[2].zero_(),
    "index_add_": lambda x, y: x.index_add_(0, torch.tensor([3, 1]), y[:2]),
}

FRESH = {
    "buffer": lambda x: torch.zeros(N, N, dtype=x.dtype),
    "clone": lambda x: x.clone(),
    "like": torch.zeros_like,
}

step = st.one_of(
    st.tuples(st.just("out"), st.sampled_from(sorted(OUT_OF_PLACE)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("in"), st.sampled_from(sorted(IN_PLACE)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("new"), st.sampled_from(sorted(FRESH)), st.integers(0, 9), st.integers(0, 9)),
)


def run(program, w, data):
    """Values are kept in a list; in-place steps write to values that no other step reads by autograd."""
    values = [w * 1, w.exp() / 3, data * 1]
    for kind, name, i, j in program:
        x, y = values[i % len(values)], values[j % len(values)]
        if kind == "out":
            values.append(OUT_OF_PLACE[name](x, y))
        elif kind == "new":
            values.append(FRESH[name](x))
        else:
            target = x.clone()  # autograd forbids overwriting what it has saved
            view = target.view(N, N)
            IN_PLACE[name](target, y.clone())
            values += [target, view * 1]
    return torch.stack([v.square().sum().tanh() + v.sum() / 9 for v in values]).sum()


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(step, min_size=1, max_size=7))
def test_programs_of_views_and_writes(program):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, N, dtype=torch.float64, generator=g).requires_grad_()
    data = torch.randn(N, N, dtype=torch.float64, generator=g)
    tangents = [torch.randn(2, N, N, dtype=torch.float64, generator=g)]
    check_plane(lambda: run(program, w, data), [w], tangents, 1e-8)


# Programs whose values share memory: views of views, and writes through any of them.
VIEWS = {
    "transpose": lambda x: x.transpose(0, -1),
    "rows": lambda x: x[1:3],
    "every other": lambda x: x[::2],
    "last": lambda x: x.select(0, -1) if x.dim() > 1 else x,
    "diagonal": lambda x: x.diagonal() if x.dim() == 2 else x,
    "split": lambda x: x.split(1, 0)[0],
    "unbind": lambda x: x.unbind(0)[0] if x.dim() > 1 else x,
    "strided": lambda x: x.as_strided((2,), (1,), x.storage_offset()),
    "contiguous": lambda x: x.contiguous(),
    "flat": lambda x: x.reshape(-1),
}

WRITES = {
    "add_": lambda x, s: x.add_(s),
    "mul_": lambda x, s: x.mul_(s),
    "tanh_": lambda x, s: x.tanh_(),
    "fill_": lambda x, s: x.fill_(0.5),
    "first": lambda x, s: x.__setitem__(0, s),
    "all": lambda x, s: x.__setitem__(slice(None), s * 2),
    "indexed": lambda x, s: x.__setitem__(torch.tensor([0, -1]), s),
    "last indexed": lambda x, s: x.__setitem__((..., torch.tensor([0, -1])), s),
    "positive": lambda x, s: x.__setitem__(x > 0, s),
    "masked_fill_": lambda x, s: x.masked_fill_(x > 0, s),
    "turned": lambda x, s: x.copy_(x.flip(0) * s),
    "sin out": lambda x, s: torch.sin(x, out=x),
    "mul out": lambda x, s: torch.mul(x, s, out=x),
}

MADE = {
    "clone": lambda x: x.clone(),
    "buffer": lambda x: torch.zeros(x.shape, dtype=x.dtype),
    "empty": lambda x: x.new_empty(x.shape).fill_(0.1),
    "sin": torch.sin,
    "cat": lambda x: torch.cat([x, x]),
}

KINDS = {"view": VIEWS, "write": WRITES, "new": MADE}
aliasing_step = st.sampled_from([(kind, name) for kind, table in KINDS.items() for name in table])


def run_aliasing(program, w, data):
    values = [w * 1, w.sin(), data.clone()]
    for (kind, name), i, j in program:
        x, y = values[i % len(values)], values[j % len(values)]
        if kind == "write":
            WRITES[name](x, y.sum().tanh())
        else:
            values.append(KINDS[kind][name](x))
    return torch.stack([v.square().sum().tanh() + v.sum().sin() / 9 for v in [*values, w]]).sum()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(aliasing_step, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7))
def test_programs_that_share_memory(program):
    """Autograd refuses many of them; `check_plane` then takes central differences."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, N, dtype=torch.float64, generator=g).requires_grad_()
    data = torch.randn(N, N, dtype=torch.float64, generator=g)
    with torch.no_grad():
        value = run_aliasing(program, w, data)
    tangents = [0.1 * torch.randn(2, N, N, dtype=torch.float64, generator=g)]
    plane = check_plane(lambda: run_aliasing(program, w, data), [w], tangents, 1e-8)
    torch.testing.assert_close(plane.value, value)


EVERY, PICK = slice(None), torch.tensor([0, 2])
INDICES = {
    "row": 1,
    "step": slice(None, None, 2),
    "ellipsis": ...,
    "true": True,
    "rows": PICK,
    "list": [0, 2],
    "columns": (EVERY, PICK),
    "columns of some": (slice(1, None), PICK),
    "last": (..., PICK),
    "new axis": (None, PICK),
    "points": (PICK, PICK),
    "row and columns": (1, PICK),
    "rows and column": (PICK, 1),
    "mask": torch.eye(N) > 0,
    "column mask": (EVERY, torch.arange(N) > 1),
    "crossed": (PICK[:, None], PICK),
}


@pytest.mark.parametrize("plain", [False, True], ids=["jet", "plain buffer"])
@pytest.mark.parametrize("name", INDICES)
def test_indexed_writes_and_reads(name, plain):
    index = INDICES[name]

    def f(x):
        target = torch.zeros(N, N, dtype=x.dtype) if plain else x.cos()
        target[index] = x.sin()[index]
        target[index] *= x.sum()
        return target * x

    jp.testing.check_rule(f, torch.linspace(-1, 2, N * N, dtype=torch.float64).reshape(N, N))


NAMES = ["mlp gelu", "causal attention, tied", "resnet train"]


def plane(name, directions):
    torch.manual_seed(1)
    case = CASES[name](torch.float64)
    return jp.evaluate(case.loss, case.params, directions)


def tangents(name, k=3):
    torch.manual_seed(1)
    return CASES[name](torch.float64).tangents(k)


@pytest.mark.parametrize("name", NAMES)
def test_rotation_of_the_directions_rotates_the_plane(name):
    v = tangents(name)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    a, b = plane(name, v), plane(name, [torch.tensordot(q, t, 1) for t in v])
    torch.testing.assert_close(b.slope, q @ a.slope)
    torch.testing.assert_close(b.curvature, q @ a.curvature @ q.T)


@pytest.mark.parametrize("name", NAMES)
def test_polarisation(name):
    v = tangents(name, 2)
    a = plane(name, v)
    b = plane(name, [torch.stack([t[0] + t[1], t[0] - t[1]]) for t in v])
    torch.testing.assert_close(a.curvature[0, 1], (b.curvature[0, 0] - b.curvature[1, 1]) / 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_direction_stays_zero(name):
    v = tangents(name)
    for t in v:
        t[1] = 0
    a = plane(name, v)
    assert a.slope[1] == 0
    rounding = 1e-13 * a.curvature.abs().max()
    assert a.curvature[1].abs().max() <= rounding and a.curvature[:, 1].abs().max() <= rounding


@pytest.mark.parametrize("k", [1, 3])
def test_slope_is_linear_in_the_directions(k):
    u, v = tangents("mlp gelu", 2 * k), tangents("mlp gelu", k)
    halves = [t[:k] for t in u], [t[k:] for t in u]
    combined = plane("mlp gelu", [2 * a - 3 * b for a, b in zip(*halves, strict=True)])
    expected = 2 * plane("mlp gelu", halves[0]).slope - 3 * plane("mlp gelu", halves[1]).slope
    torch.testing.assert_close(combined.slope, expected)
    found = plane("mlp gelu", v)
    assert torch.equal(found.curvature, found.curvature.mT)
