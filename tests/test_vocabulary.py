"""Cross entropy some rows at a time, and read-outs that are tied to embeddings, against reverse over reverse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.rules import losses
from jetplane.testing import check_plane

GOALS = {
    "labels": lambda y: F.cross_entropy(y, torch.tensor([0, 6, 2, 2, 5, 1, 3])),
    "summed": lambda y: F.cross_entropy(y, torch.tensor([0, 6, 2, 2, 5, 1, 3]), reduction="sum"),
    "ignored": lambda y: F.cross_entropy(y, torch.tensor([0, -100, 2, 2, -100, -100, -100])),
    "weights": lambda y: F.cross_entropy(y, torch.tensor([0, 6, 2, 2, 5, 1, 3]), torch.rand(7).double() + 0.1),
    "smoothed": lambda y: F.cross_entropy(y, torch.tensor([0, 6, 2, 2, 5, -100, 3]), label_smoothing=0.2),
    "probabilities": lambda y: F.cross_entropy(y, torch.eye(7).double().roll(1, 0) * 0.7 + 0.3 / 7),
}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.token(tokens))))


@pytest.fixture
def two_rows(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", 14)


@pytest.mark.parametrize("goal", GOALS)
def test_rows_of_a_tied_read_out(goal, two_rows):
    torch.manual_seed(0)
    model = Tied().double()
    params = list(model.parameters())
    tangents = [torch.randn(3, *p.shape).double() for p in params]

    def loss():
        torch.manual_seed(1)
        return GOALS[goal](model(torch.arange(7)))

    check_plane(loss, params, tangents, 1e-9)


@pytest.mark.parametrize("curvature", ["none", "ggn", "hessian"])
@pytest.mark.parametrize("shape", [(7, 7), (5, 7, 3)])
def test_rows_give_what_all_give(curvature, shape, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 7).double(), torch.randn(shape[0], *shape[2:], 4).double()
    labels = torch.randint(7, (shape[0], *shape[2:]))
    params = list(layer.parameters())
    directions = jp.Directions(3)

    def plane():
        return jp.evaluate(
            lambda: F.cross_entropy(layer(x).sin().movedim(-1, 1), labels), params, directions, curvature
        )

    whole = plane()
    monkeypatch.setattr(losses, "BLOCK", 20)
    rows = plane()
    torch.testing.assert_close((rows.value, rows.slope), (whole.value, whole.slope))
    if curvature != "none":
        torch.testing.assert_close(rows.curvature, whole.curvature)


def test_logits_in_half_precision(two_rows):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 7).bfloat16(), torch.randn(6, 4).bfloat16()
    params, labels = list(layer.parameters()), torch.arange(6)
    tangents = [torch.randn(2, *p.shape).bfloat16() for p in params]
    got = jp.evaluate(lambda: F.cross_entropy(layer(x), labels), params, tangents)
    precise = nn.Linear(4, 7).double()
    precise.load_state_dict({name: p.double() for name, p in layer.state_dict().items()})
    want = jp.evaluate(
        lambda: F.cross_entropy(precise(x.double()), labels), list(precise.parameters()), [t.double() for t in tangents]
    )
    torch.testing.assert_close(got.slope.double(), want.slope, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.curvature.double(), want.curvature, rtol=2e-2, atol=2e-2)
