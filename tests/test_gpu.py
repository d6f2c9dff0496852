"""The script that runs on a card, on the CPU at a reduced size."""

import torch
from torch.nn import functional as F

import jetplane as jp
from benchmarks import coverage, gpu


def test_verdicts():
    of = gpu.Setting(torch.device("cpu"), True, 60.0)
    results = {"tangents": gpu.tangents(of)}
    assert gpu.failures(results) == []
    results["tangents"][0]["same bits"] = False
    results["waits"] = [{"model": "mlp", "waits": 2, "allowed": gpu.ALLOWED}]
    assert len(gpu.failures(results)) == 2


def test_an_evaluation_waits_for_the_device_once(monkeypatch):
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    waits = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self, of=torch.Tensor.__bool__: waits.append(1) or of(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self, of=torch.Tensor.item: waits.append(1) or of(self))
    jp.evaluate(
        lambda: F.cross_entropy(layer(x).tanh(), x[:, 0].sign().relu().long()),
        list(layer.parameters()),
        jp.Directions(2),
    )
    assert len(waits) == gpu.ALLOWED


def test_an_operator_that_deviates_is_found():
    op = coverage.operators()["exp"]

    class Wrong:
        def __getattr__(self, name):
            return getattr(op, name)

        def op(self, x):
            return x.exp() if x.dtype == torch.float64 else 1.01 * x.exp()

    assert gpu._operator(Wrong(), torch.float32, gpu.Setting(torch.device("cpu"), True, 60.0))[0] == "deviates"
