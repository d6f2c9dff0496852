"""Which outputs are active: against the Jacobian of reverse mode, through what may follow on a layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jetplane import jet
from jetplane.gradients.active_outputs import MOST, active_outputs, probes

N = 5
TOLD = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "maximum of windows": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
    "windows that overlap": nn.MaxPool2d(3, stride=1),
    "clamped": nn.Hardtanh(-0.5, 0.5),
    "all of them": nn.Sequential(nn.GELU(), nn.Tanh()),
    "moved around": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (6, 4, 3)), nn.ReLU(), nn.Flatten(2)),
    "cropped": nn.ZeroPad2d((-1, 1, 2, -1)),
    "scaled": nn.Sequential(nn.LeakyReLU(0.1), nn.Threshold(0.2, 3.0)),
}
NOT_TOLD = {
    "mean of windows": nn.AvgPool2d(2),
    "normalized": nn.LayerNorm(6),
    "softmax": nn.Softmax(-1),
    "normalized over the batch": nn.BatchNorm2d(2),
    "mean of the batch taken away": nn.BatchNorm2d(2, affine=False, track_running_stats=False),
    "mixed": nn.Conv2d(2, 3, 2),
}


def met(after: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return jet(after, y.clone(), probes(y), order=1)[1]


def affected(after: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Outputs whose column of the Jacobian is not zero."""
    rows = [torch.autograd.functional.jacobian(lambda v: after(v.clone()), y[i : i + 1]) for i in range(len(y))]
    return torch.stack([(r.flatten(0, -y.dim() - 1) != 0).any(0).flatten() for r in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TOLD)
def test_found(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    y = torch.randn(N, 2, 6, 6, dtype=dtype)
    found = active_outputs(met(TOLD[name], y), y[0].numel())
    assert found is not None
    assert torch.equal(found, affected(TOLD[name], y))


def test_dropout_of_the_same_mask():
    y = torch.randn(N, 40)
    torch.manual_seed(1)
    kept = F.dropout(torch.ones_like(y), 0.4) != 0
    torch.manual_seed(1)
    assert torch.equal(active_outputs(met(nn.Dropout(0.4), y), 40), kept)


@pytest.mark.parametrize("name", NOT_TOLD)
def test_nothing_is_said_where_an_input_depends_on_several_outputs(name: str):
    y = torch.randn(N, 2, 6, 6)
    assert active_outputs(met(NOT_TOLD[name], y), y[0].numel()) is None


@pytest.mark.parametrize("distance", [1, 2, 64, 4096])
def test_a_difference_of_two_is_not_taken_for_none(distance: int):
    y = torch.randn(2, 10_000)
    assert active_outputs(met(lambda v: v[:, distance:] - v[:, :-distance], y), 10_000) is None  # type: ignore[arg-type]
    assert active_outputs(met(lambda v: v[:, distance:] + v[:, :-distance], y), 10_000) is None  # type: ignore[arg-type]


def test_places_are_told_apart_up_to_the_most():
    y = torch.randn(1, MOST)
    assert torch.equal(active_outputs(met(lambda v: 0.1 * F.relu(3 * v), y), MOST), y > 0)  # type: ignore[arg-type]


def test_what_is_not_a_number_says_nothing():
    y = torch.tensor([[1.0, float("nan"), 2.0]])
    assert active_outputs(met(lambda v: v * v, y), 3) is None  # type: ignore[arg-type]
