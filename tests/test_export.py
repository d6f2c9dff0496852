"""Planes as exported programs: the same numbers, in other runtimes too, and an error where they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler and the exporter


class Attention(nn.Module):
    """A block of a small transformer, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv, self.out = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 7)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("mask", torch.full((4, 4), -1e9).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        return self.out(h + (q @ k.mT / 8**0.5 + self.mask).softmax(-1) @ v).flatten(0, 1)


def case(name: str, curvature: str) -> tuple[Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    else:
        model = Attention()
        x, y = torch.randint(0, 7, (3, 4)), torch.randint(0, 7, (12,))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    tangents = [torch.randn(2, *p.shape) for p in weights.values()]

    def plane(ws: dict[str, Tensor], vs: list[Tensor], x: Tensor, y: Tensor) -> Any:
        loss = lambda: F.cross_entropy(torch.func.functional_call(model, ws, (x,)), y)  # noqa: E731
        found = jp.evaluate(loss, list(ws.values()), vs, curvature=curvature)  # type: ignore[arg-type]
        return (found.value, found.slope) if found.curvature is None else (found.value, found.slope, found.curvature)

    return plane, (weights, tangents, x, y)


@pytest.mark.parametrize(
    ("name", "curvature"),
    [
        ("mlp", "hessian"),
        pytest.param("attention", "ggn", marks=pytest.mark.long),
        pytest.param("attention", "hessian", marks=pytest.mark.long),
    ],
)
def test_same_numbers_in_both_runtimes(name: str, curvature: str, tmp_path: Path) -> None:
    plane, (weights, tangents, x, y) = case(name, curvature)
    program = jp.export(plane, (weights, tangents, x, y))
    torch.export.save(program, tmp_path / "plane.pt2")
    loaded = torch.export.load(tmp_path / "plane.pt2").module()
    others = (
        {n: w + 0.3 * torch.randn_like(w) for n, w in weights.items()},
        [torch.randn_like(v) for v in tangents],
        x,
        y,
    )
    leaves = [*others[0].values(), *others[1], x, y]
    expected = plane(*others)
    for a, b in zip(expected, loaded(*leaves), strict=True):
        assert (a - b).abs().max() <= 2e-6 * a.abs().max()
    onnxruntime = pytest.importorskip("onnxruntime", reason="the other runtime")
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs it")
    torch.onnx.export(program, f=str(tmp_path / "plane.onnx"), verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "plane.onnx"))
    feed = {one.name: leaf.numpy() for one, leaf in zip(session.get_inputs(), leaves, strict=True)}
    for a, b in zip(expected, session.run(None, feed), strict=True):
        assert (a - torch.from_numpy(b)).abs().max() <= 5e-6 * a.abs().max()


def of_outputs(kind: str) -> tuple[Any, tuple[Any, ...]]:
    """Derivatives of a model with batch normalization in training, which writes to buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    f, params = jp.functional(model)

    def linearized(ws: dict[str, Tensor], vs: dict[str, Tensor], x: Tensor) -> Any:
        value, push = jp.linearize(lambda w: f(w, x), (ws,))
        return value, push((vs,))

    def jet(ws: dict[str, Tensor], vs: dict[str, Tensor], x: Tensor) -> Any:
        return jp.jet(lambda w: f(w, x), (ws,), (vs,), pairs="diagonal")

    weights = {n: p.detach().clone() for n, p in params.items()}
    tangents = {n: torch.randn(2, *p.shape) for n, p in weights.items()}
    return {"jet": jet, "linearize": linearized}[kind], (weights, tangents, torch.randn(6, 5), model)


@pytest.mark.parametrize("kind", ["jet", "linearize"])
def test_derivatives_of_functions(kind: str, tmp_path: Path) -> None:
    f, (weights, tangents, x, model) = of_outputs(kind)
    before = [b.clone() for b in model.buffers()]
    program = jp.export(f, (weights, tangents, x))
    assert all(map(torch.equal, before, model.buffers()))
    others = {n: w + 0.3 * torch.randn_like(w) for n, w in weights.items()}, tangents, torch.randn(6, 5)
    leaves = [*others[0].values(), *tangents.values(), others[2]]
    with torch.no_grad():
        expected = f(*others)
        model[1].running_mean.add_(1)  # the program has its own
    for a, b in zip(expected, program.module()(*leaves), strict=True):
        assert (a - b).abs().max() <= 2e-6 * a.abs().max()
    onnxruntime = pytest.importorskip("onnxruntime", reason="the other runtime")
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs it")
    torch.onnx.export(program, f=str(tmp_path / "jet.onnx"), verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "jet.onnx"))
    feed = {one.name: leaf.numpy() for one, leaf in zip(session.get_inputs(), leaves, strict=True)}
    for a, b in zip(expected, session.run(None, feed), strict=True):
        assert (a - torch.from_numpy(b)).abs().max() <= 5e-6 * a.abs().max()


def test_double_precision_is_equal_to_rounding() -> None:
    labels = torch.tensor([0, 2])

    def f(w: Tensor, v: Tensor, x: Tensor) -> Any:
        found = jp.evaluate(lambda: F.cross_entropy(torch.tanh(x @ w), labels), [w], [v])
        return found.value, found.slope, found.curvature

    def args() -> list[Tensor]:
        return [torch.randn(s).double() for s in ((5, 3), (2, 5, 3), (2, 5))]

    program, others = jp.export(f, args()).module(), args()
    for a, b in zip(f(*others), program(*others), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-14, atol=1e-14)


def test_other_shapes_are_refused() -> None:
    program = jp.export(lambda w, v: jp.jvp(torch.sin, w, v), (torch.ones(3), torch.ones(3)))
    with pytest.raises((RuntimeError, AssertionError), match="shape|size"):
        program.module()(torch.ones(4), torch.ones(4))


def test_refusals() -> None:
    plane, args = case("mlp", "none")
    with pytest.raises(jp.ArgumentError, match="expected tensors"):
        jp.export(plane, (3, 4))
    w = torch.ones(3)
    with pytest.raises(jp.ArgumentError, match="share memory"):
        jp.export(lambda a, b: (a + b).sum(), (w, w))


def test_a_program_with_other_numbers_is_refused() -> None:
    def changing(w: Tensor, v: Tensor) -> Tensor:
        scale = 1.0 if torch.compiler.is_compiling() else 2.0
        return jp.evaluate(lambda: scale * (w**2).sum(), [w], [v], curvature="none").slope

    with pytest.raises(jp.DerivativeError, match="result 0 of the program"):
        jp.export(changing, (torch.ones(3), torch.ones(1, 3)))


def test_tracing_without_jets_is_refused() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.ones(2)
    for f in (
        lambda x: jp.jet(lambda x: x.sin().sum(), x, torch.eye(2))[1],
        lambda x: jp.evaluate(lambda: x.sin().sum(), [x], [torch.eye(2)]).slope,
    ):
        with pytest.raises(jp.DerivativeError, match=r"jetplane\.export"):
            make_fx(f)(x)


def test_training_without_torch() -> None:
    pytest.importorskip("onnxruntime", reason="the runtime")
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs it")
    script = str(Path(__file__).parent.parent / "examples" / "export_to_onnx.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch: False" in done.stdout
    first, last = (float(word) for word in done.stdout.split() if word.startswith("0."))
    assert last < 0.8 * first
