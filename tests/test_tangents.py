"""Structured tangents and chunks: the numbers of dense tangents evaluated at once."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jetplane as jp
from jetplane.directions import CachedDirections, ConcatenatedDirections, StoredDirections
from jetplane.evaluation import chunks as chunking

STRUCTURES = {
    "rank-one": {"tangents": "rank-one"},
    "rank 3": {"tangents": "low-rank", "rank": 3},
    "sparse": {"tangents": "sparse", "density": 0.3},
}
WITH_A_LOSS = {"logistic regression", "mlp gelu", "paper cnn", "causal attention, tied", "resnet train"}


def agree(found: jp.PlaneModel, expected: jp.PlaneModel, tolerance: float) -> None:
    for name in ("value", "slope", "curvature"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30), name


def draw(case, k: int, **structure) -> tuple[jp.Directions, list[torch.Tensor]]:
    directions = jp.Directions(k, seed=5, **structure)
    return directions, directions.materialize(case.params)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_dense_tangents(name: str, structure: str):
    case = CASES[name](torch.float64)
    directions, dense = draw(case, 4, **STRUCTURES[structure])
    wanted = [("hessian", "all"), ("hessian", 2), ("hessian", "diagonal"), ("none", "all")]
    for curvature, pairs in wanted + [("ggn", "all")] * (name in WITH_A_LOSS):
        torch.manual_seed(0)
        found = jp.evaluate(case.loss, case.params, directions, curvature, pairs)
        torch.manual_seed(0)
        agree(found, jp.evaluate(case.loss, case.params, dense, curvature, pairs), 1e-9)


def test_a_few_operators_alone_form_low_rank_tangents():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x, y = torch.randn(6, 1, 8, 8), torch.randint(0, 5, (6,))
    directions = jp.Directions(3, tangents="rank-one")
    loss = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    assert jp.evaluate(loss, list(net.parameters()), directions).materialized == {}
    decayed = lambda: loss() + net[3].weight.square().sum()  # noqa: E731
    assert list(jp.evaluate(decayed, list(net.parameters()), directions).materialized) == ["aten::square"]


@pytest.mark.parametrize("groups", [1, 2])
def test_low_rank_convolutions_with_settings(groups: int):
    w = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64)
    x, u = torch.randn(2, 4, 9, 9, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    loss = lambda: F.conv2d(F.conv2d(x, u, padding=1).tanh(), w, stride=2, dilation=2, groups=groups).square().sum()  # noqa: E731
    directions = jp.Directions(3, tangents="low-rank", rank=2)
    agree(
        jp.evaluate(loss, [u, w], directions), jp.evaluate(loss, [u, w], directions.materialize([u, w])), 1e-10
    )  # fmt: skip


def test_low_rank_tangents_inside_jets_of_jets():
    net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    points = torch.randn(5, 2, dtype=torch.float64)
    loss = lambda: jp.laplacian(lambda x: net(x).squeeze(-1), points).square().mean()  # noqa: E731
    directions = jp.Directions(3, tangents="rank-one")
    params = list(net.parameters())
    agree(jp.evaluate(loss, params, directions), jp.evaluate(loss, params, directions.materialize(params)), 1e-10)


def test_half_precision_weights_have_single_precision_factors():
    net = nn.Linear(8, 4).bfloat16()
    x = torch.randn(16, 8).bfloat16()
    loss = lambda: net(x).float().square().mean()  # noqa: E731
    directions = jp.Directions(2, tangents="rank-one")
    params = list(net.parameters())
    agree(jp.evaluate(loss, params, directions), jp.evaluate(loss, params, directions.materialize(params)), 2e-2)


def test_compiled_low_rank_tangents():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(7, 6)
    opts = []
    for compiled in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        opt = jp.optim.FoMoHKD(net.parameters(), k=2, tangents="rank-one", descent="saddle-free", compile=compiled)
        losses = [opt.step(lambda net=net: net(x).square().mean()).item() for _ in range(3)]
        opts.append(losses)
    assert opts[0] == pytest.approx(opts[1], rel=1e-5)


# --- how they are distributed ---------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_mean_of_v_v_is_the_identity(structure: str):
    params = [torch.empty(3, 2), torch.empty(4), torch.empty(2, 2)]
    directions = jp.Directions(30_000, seed=3, **STRUCTURES[structure])
    v = torch.cat([t.flatten(1) for t in directions.tangents(params)], 1).double()
    assert (v.T @ v / len(v) - torch.eye(14)).abs().max() < 0.12
    assert v.mean(0).abs().max() < 0.05


def test_sparse_tangents_have_their_density_and_the_same_numbers_in_parts():
    w = torch.empty(300, 100)
    directions = jp.Directions(4, tangents="sparse", density=0.1)
    v = directions.draw(0, w)
    assert abs((v != 0).double().mean() - 0.1) < 0.005
    assert ((v[0] != 0) == (v[1] != 0)).double().mean() < 0.9
    torch.testing.assert_close(directions.draw(0, w, slice(2, 4)), v[2:4])
    kappa = torch.tensor([1.0, -2.0, 0.5, 3.0])
    torch.testing.assert_close(directions.combine(0, w, kappa), torch.tensordot(kappa, v, 1))


def test_what_low_rank_tangents_refuse():
    w = torch.empty(3, 4)
    with pytest.raises(jp.ShapeError, match=r"\(K, r, 3\) and \(K, r, 4\), got \(2, 1, 4\)"):
        jp.LowRank(torch.ones(2, 1, 4), torch.ones(2, 1, 3), w.shape)
    with pytest.raises(jp.ShapeError, match="two dimensions"):
        jp.LowRank(torch.ones(2, 1, 4), torch.ones(2, 1, 1), (4,))
    with pytest.raises(jp.DTypeError, match="one dtype"):
        jp.LowRank(torch.ones(2, 1, 3), torch.ones(2, 1, 4).double(), w.shape)
    with pytest.raises(jp.ShapeError, match="tangents 0"):
        jp.evaluate(lambda: w.sum(), [w], [jp.LowRank(torch.ones(2, 1, 4), torch.ones(2, 1, 3), (4, 3))])


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 4, 5, 6, "auto"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "none"])
@pytest.mark.parametrize("name", ["resnet train", "seeded dropout", "mlp gelu"])
def test_chunks_give_the_same_numbers(name: str, curvature, chunk):
    case = CASES[name](torch.float64)
    buffers = {n: b.clone() for n, b in case.module.named_buffers()}
    tangents = case.tangents(6)
    found = []
    for size in (None, chunk):
        case.module.load_state_dict(buffers, strict=False)
        torch.manual_seed(7)
        found.append(jp.evaluate(case.loss, case.params, tangents, curvature, chunk=size, memory=1))
        found.append({n: b.clone() for n, b in case.module.named_buffers()} | {"random": torch.rand(1)})
    agree(found[2], found[0], 1e-12)
    assert found[1].keys() == found[3].keys() and all(torch.equal(found[1][n], found[3][n]) for n in found[1])


@pytest.mark.parametrize(("pairs", "chunk"), [("diagonal", 1), ("diagonal", 4), (2, 2), (3, 3), (2, 4)])
def test_chunks_of_planes(pairs, chunk: int):
    case = CASES["mlp gelu"](torch.float64)
    tangents = case.tangents(6)
    agree(
        jp.evaluate(case.loss, case.params, tangents, pairs=pairs, chunk=chunk),
        jp.evaluate(case.loss, case.params, tangents, pairs=pairs),
        1e-12,
    )


@pytest.mark.parametrize(("pairs", "chunk"), [("all", 1), ("diagonal", 0), (2, 3), ("all", 2.0), ("all", True)])
def test_chunks_that_cannot_be(pairs, chunk):
    case = CASES["mlp gelu"](torch.float64)
    with pytest.raises(jp.ArgumentError, match="chunk must be"):
        jp.evaluate(case.loss, case.params, case.tangents(6), pairs=pairs, chunk=chunk)


@pytest.mark.parametrize("k", [5, 6, 64])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_every_two_directions_meet(k: int, size: int):
    met = set()
    for chunk in chunking.chunks_of(k, size, crossed=True):
        inside = [i for run in chunk for i in range(k)[run]]
        assert len(inside) <= size
        met |= {(i, j) for i in inside for j in inside}
    assert len(met) == k * k


def test_auto_takes_what_memory_allows():
    sizes = [chunking.affordable(64, 64, True, True, 1000, memory) for memory in (0, 10**4, 10**5, 10**9)]
    assert sizes[0] == 2 and sizes[-1] == 64 and sizes == sorted(sizes)
    c = sizes[2]
    assert c + c * (c + 1) // 2 <= 100 < (c + 2) + (c + 2) * (c + 3) // 2
    alive = chunking.activations(lambda: torch.ones(1000).exp().exp().exp().sum(), [])
    assert 8_000 <= alive <= 16_100


# --- chunks of Gauss-Newton planes ------------------------------------------------------------------


class Heads(nn.Module):
    """Two losses, one with a parameter of its own, a regularizer, buffers that are written to, a weight made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 2)
        self.noise, self.gain = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(6, 1))
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        h = torch.empty(len(x), 6, dtype=torch.float64)
        h[:, :3], h[:, 3:] = self.body(x).tanh().chunk(2, 1)
        weight = self.gain.T * self.a.weight.T.contiguous().T
        classes = F.cross_entropy(F.linear(h, weight, self.a.bias), y, label_smoothing=0.1)
        values = F.gaussian_nll_loss(self.b(h), z, self.noise.exp().expand(len(x), 2))
        with jp.loss():
            own = ((h.sum(1) - 1) ** 4).mean()
        return classes + values + own + 0.1 * sum((p**2).sum() for p in self.parameters())


def heads(**structure):
    torch.manual_seed(1)
    net, x, y, z = Heads(), torch.randn(5, 3).double(), torch.randint(4, (5,)), torch.randn(5, 2).double()
    params = list(net.parameters())
    runs = []

    def loss() -> torch.Tensor:
        runs.append(0)
        return net(x, y, z)

    return loss, params, jp.Directions(7, seed=3, **structure), runs


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
@pytest.mark.parametrize("structure", [{}, *STRUCTURES.values()], ids=["dense", *STRUCTURES])
def test_chunks_of_a_gauss_newton_plane_take_one_run_each(structure, chunk: int):
    loss, params, directions, runs = heads(**structure)
    whole = jp.evaluate(loss, params, directions, "ggn", examples=True)
    runs.clear()
    parts = jp.evaluate(loss, params, directions, "ggn", examples=True, chunk=chunk)
    agree(parts, whole, 1e-12)
    assert len(runs) == -(-7 // chunk)
    assert (parts.examples is None) == (whole.examples is None)


def test_directions_of_several_kinds_in_chunks():
    loss, params, drawn, _ = heads(tangents="rank-one")
    given = StoredDirections([torch.randn(3, *p.shape, dtype=torch.float64) for p in params])
    mixed = ConcatenatedDirections([given, drawn])
    whole = jp.evaluate(loss, params, mixed, "ggn")
    for chunk in (1, 2, 4, 5):
        agree(jp.evaluate(loss, params, mixed, "ggn", chunk=chunk), whole, 1e-12)


def test_examples_in_chunks():
    net, (x, y) = nn.Linear(3, 4).double(), (torch.randn(5, 3).double(), torch.randint(4, (5,)))
    params, tangents = list(net.parameters()), [torch.randn(6, *p.shape).double() for p in net.parameters()]
    found = [
        jp.evaluate(lambda: F.cross_entropy(net(x), y), params, tangents, "ggn", examples=True, chunk=chunk)
        for chunk in (None, 1, 4)
    ]
    for parts in found[1:]:
        torch.testing.assert_close(parts.examples, found[0].examples, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["memory of a parameter", "output of the model"])
def test_writing_across_kinds_meets_by_halves(where: str):
    torch.manual_seed(2)
    w, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    runs = []

    def loss() -> torch.Tensor:
        runs.append(0)
        if where == "output of the model":
            out = x @ w
            with jp.loss():
                return out.sub_(1).pow_(2).sum()
        held = torch.zeros_like(w)
        row = held[0]
        held.copy_((x @ w)[:3])
        return F.mse_loss(row * held, torch.ones(3, 3).double())

    tangents = [torch.randn(4, 3, 3, dtype=torch.float64)]
    whole = jp.evaluate(loss, [w], tangents, "ggn")
    runs.clear()
    agree(jp.evaluate(loss, [w], tangents, "ggn", chunk=1), whole, 1e-12)
    assert len(runs) == 1 + 6  # one that found it, then any two of four


def test_a_closure_that_changes_between_chunks_is_told():
    w, x = torch.randn(3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    runs = []

    def loss() -> torch.Tensor:  # whose value is the same
        runs.append(0)
        return F.mse_loss((x @ w)[: len(runs) + 1], torch.zeros(len(runs) + 1, dtype=torch.float64))

    with pytest.raises(jp.DerivativeError, match="expected a closure that computes the same in each run"):
        jp.evaluate(loss, [w], [torch.eye(3, dtype=torch.float64)], "ggn", chunk=1)


def test_a_gauss_newton_plane_in_chunks_carries_one_chunk_through_the_model():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    carried = []
    for module in net:
        module.register_forward_hook(lambda module, args, out: carried.append(len(out.first.tensor)))
    jp.evaluate(lambda: F.cross_entropy(net(x), y), list(net.parameters()), jp.Directions(5), "ggn", chunk=2)
    assert carried == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_model_outputs_in_plain_memory_have_no_curvature_of_their_own():
    w, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)

    def loss(in_memory: bool) -> torch.Tensor:
        h = x @ w
        if in_memory:
            memory = torch.empty(3, 3, dtype=torch.float64)
            memory[:] = h
            h = memory
        return F.mse_loss(h * h, torch.ones(3, 3, dtype=torch.float64))

    tangents = [torch.randn(2, 3, 3, dtype=torch.float64)]
    agree(*[jp.evaluate(lambda m=m: loss(m), [w], tangents, "ggn") for m in (True, False)], 1e-12)


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest memory that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves(result) if type(t) is torch.Tensor]
        self.numel = max([self.numel, *(t.untyped_storage().nbytes() // 4 for t in leaves)])
        return result


def test_tangents_beyond_the_limit_are_drawn_again():
    params = [torch.empty(50, 10), torch.empty(30, 10)]
    held = CachedDirections(jp.Directions(2, seed=1), params, limit=4 * 2 * 300)
    first, second = (held.draw(i, p) for i, p in enumerate(params))
    assert held.draw(1, params[1]).data_ptr() == second.data_ptr()
    assert held.draw(0, params[0]).data_ptr() != first.data_ptr()
    kappa = torch.tensor([0.5, 2.0])
    for i, (p, v) in enumerate(zip(params, (first, second), strict=True)):
        torch.testing.assert_close(held.combine(i, p, kappa), torch.tensordot(kappa, v, 1))


@pytest.mark.parametrize("tangents", ["dense", "rank-one"])
def test_a_step_never_holds_all_tangents(tangents, monkeypatch):
    monkeypatch.setattr("jetplane.optim.base.CACHED_BYTES", 0)
    k, width = 64, 128
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(4)])
    x = torch.randn(2, width)
    opt = jp.optim.FGD(net.parameters(), k=k, lr=1e-3, tangents=tangents, audit="never")
    with Largest() as largest:
        opt.step(lambda: net(x).square().mean())
    assert largest.numel <= (k * width * width if tangents == "dense" else width * width)


@pytest.mark.parametrize("loss", ["mean of squares", "sum of a product", "scaled", "regularizer"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_loss_that_is_summed_up_forms_no_pairs(loss, curvature):
    k, n = 32, 4096
    w, x = torch.randn(3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    losses = {
        "mean of squares": lambda: ((x @ w - 1) ** 2).mean(),
        "sum of a product": lambda: (lambda r: r * r)(x @ w).sum(),
        "scaled": lambda: (torch.exp(x @ w) * 0.5 * x[:, 0]).sum(),
        "regularizer": lambda: (w.repeat(n) ** 2).sum(),
    }
    closure = jp.loss()(losses[loss])
    directions = jp.Directions(k)
    with Largest() as largest:
        found = jp.evaluate(closure, [w], directions, curvature)
    assert largest.numel <= 2 * k * n * 3  # the count is in single precision; all pairs would be 2 k (k+1)/2 n
    dense = directions.materialize([w])[0]
    plain = w.clone().requires_grad_()
    exact = {
        "mean of squares": lambda w: ((x @ w - 1) ** 2).mean(),
        "sum of a product": lambda w: (x @ w).square().sum(),
        "scaled": lambda w: (torch.exp(x @ w) * 0.5 * x[:, 0]).sum(),
        "regularizer": lambda w: n * (w**2).sum(),
    }
    hessian = torch.autograd.functional.hessian(exact[loss], plain)
    torch.testing.assert_close(found.curvature, dense @ hessian @ dense.T, rtol=1e-9, atol=1e-9)
