"""Descents on batches of planes, and what they make of scale."""

import math

import pytest
import torch
from torch.testing import assert_close

import jetplane as jp
from jetplane.subspace.descent import (
    Cubic,
    CurvatureScaled,
    Damped,
    Descent,
    ForwardGradient,
    Newton,
    SaddleFree,
    Truncated,
    named,
)

SPECTRAL = [Newton(), SaddleFree(), Damped(), Truncated(), Damped(scaled=True)]
CUBIC = [Cubic(), Cubic(sigma=1e-3), Cubic(sigma=1e3, scaled=True)]


def planes(number: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    root = torch.randn(number, k, k)
    return torch.randn(number, k), root @ root.mT + torch.eye(k)


@pytest.mark.parametrize("descent", SPECTRAL + CUBIC, ids=str)
def test_planes_are_solved_apart_and_averaged(descent):
    slope, curvature = planes(4, 3)
    together = descent(slope, curvature)
    apart = torch.stack([descent(f, h) for f, h in zip(slope, curvature, strict=True)])
    assert together.dtype == torch.float64
    assert_close(together, apart / 4)


@pytest.mark.parametrize("descent", [ForwardGradient(), CurvatureScaled()], ids=lambda d: type(d).__name__)
def test_lines_are_averaged(descent):
    slope, curvature = torch.randn(6), torch.randn(6)
    apart = torch.cat([descent(slope[i : i + 1], curvature[i : i + 1]) for i in range(6)])
    assert_close(descent(slope, curvature), apart / 6)


def test_newton_solves_the_plane():
    slope, curvature = (t[0].double() for t in planes(1, 5))
    assert_close(Newton()(slope, curvature), -torch.linalg.solve(curvature, slope))


@pytest.mark.parametrize("descent", SPECTRAL, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_the_loss_does_not_matter(descent, scale):
    slope, curvature = (t[0].double() for t in planes(1, 4))
    assert_close(descent(slope * scale, curvature * scale), descent(slope, curvature))


@pytest.mark.parametrize("descent", SPECTRAL[:3], ids=lambda d: type(d).__name__)
def test_turning_the_plane_turns_the_step(descent):
    slope, curvature = (t[0].double() for t in planes(1, 4))
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    assert_close(descent(turn.mT @ slope, turn.mT @ curvature @ turn), turn.mT @ descent(slope, curvature))


@pytest.mark.parametrize("descent", SPECTRAL + CUBIC, ids=str)
def test_the_step_is_a_symmetric_matrix_times_the_slope(descent):
    slope, curvature = planes(2, 4)
    inverse = descent.solve(slope, curvature).inverse
    assert_close(inverse, inverse.mT)
    assert_close(-(inverse @ slope.double().unsqueeze(-1)).squeeze(-1) / 2, descent(slope, curvature))


def test_scaled_damping_does_not_depend_on_the_lengths_of_directions():
    slope, curvature = (t[0].double() for t in planes(1, 4))
    lengths = torch.tensor([1.0, 1e3, 1e-3, 10.0]).double()
    scaled = Damped(0.1, scaled=True)(slope * lengths, curvature * lengths.outer(lengths))
    assert_close(scaled * lengths, Damped(0.1, scaled=True)(slope, curvature))
    flat = torch.zeros(2, 2)
    flat[0, 0] = 4.0  # the second direction is of no curvature
    assert_close(
        Damped(0.1, scaled=True).solve(torch.ones(2), flat).inverse, torch.diag(torch.tensor([1 / 4.4, 10.0])).double()
    )


def test_saddle_free_is_bounded():
    slope = torch.tensor([1.0, 1.0])
    kappa = SaddleFree(floor=0.1)(slope, torch.diag(torch.tensor([-2.0, 1e-9])))
    assert_close(kappa, torch.tensor([-0.5, -5.0]).double())


def test_truncation_leaves_out_what_is_small_or_beyond_the_rank():
    slope, curvature = torch.ones(3), torch.diag(torch.tensor([-4.0, 2.0, 1e-4]))
    assert_close(Truncated()(slope, curvature), torch.tensor([-0.25, -0.5, 0.0]).double())
    assert_close(Truncated(rank=1)(slope, curvature), torch.tensor([-0.25, 0.0, 0.0]).double())
    assert_close(Truncated(tolerance=0.0)(slope, curvature)[2], torch.tensor(-1e4).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e6])
def test_cubic_steps_are_global_minima_of_their_model(sigma, scaled):
    """Optimality is stationarity with H + sigma r I without a negative eigenvalue (Nesterov and Polyak)."""
    torch.manual_seed(0)
    for size in (1e-6, 1.0, 100.0):
        h = torch.randn(5, 5).double()
        h, slope = h + h.mT, size * torch.randn(5).double()
        lengths = h.diagonal().abs().rsqrt() if scaled else torch.ones(5).double()
        step = Cubic(sigma, scaled)(slope, h) / lengths
        h, slope = h * lengths.outer(lengths), slope * lengths
        r = step.norm()
        assert_close(h @ step + sigma * r * step, -slope, rtol=1e-8, atol=1e-9 * (r + size).item())
        assert torch.linalg.eigvalsh(h)[0] + sigma * r >= -1e-9 * h.abs().max()


@pytest.mark.parametrize("along", [0.0, 1e-300, 1e-12, -1e-12])
@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_cubic_leaves_saddle_points(along, rest):
    """The hard case: the slope has nothing, or next to nothing, along the lowest curvature."""
    h = torch.diag(torch.tensor([-2.0, 1.0, 3.0])).double()
    slope = torch.tensor([along, rest, 0.1 * rest]).double()
    step = Cubic(1.0)(slope, h)
    r = step.norm()
    assert_close(h @ step + r * step, -slope, rtol=0, atol=1e-9)
    assert r >= 2 - 1e-12 and abs(step[0]) > 1.9


def test_cubic_without_curvature_has_a_length_and_without_slope_none():
    step = Cubic(2.0)(torch.tensor([3.0, 4.0]), torch.zeros(2, 2))
    assert_close(step, -torch.tensor([0.6, 0.8]).double() * 2.5**0.5)
    assert_close(Cubic(2.0)(torch.zeros(2), torch.eye(2)), torch.zeros(2).double())


def test_one_singular_plane_among_many_is_rescued_alone():
    slope, curvature = planes(3, 2)
    curvature[1] = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.warns(jp.RescueWarning, match="1 of 6"):
        kappa = Newton()(slope, curvature)
    assert_close(kappa[1], torch.tensor([-slope[1, 0].item() / 3, 0.0]).double())
    assert_close(kappa[0], Newton()(slope[:1], curvature[:1])[0] / 3)


@pytest.mark.parametrize("name", ["newton", "saddle-free", "damped", "truncated", "cubic"])
def test_names(name):
    assert isinstance(named(name), Descent)
    assert named(Damped(0.5)) == Damped(0.5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CurvatureScaled(-1.0),
        lambda: SaddleFree(0.0),
        lambda: Damped(0.0),
        lambda: named("up"),
        lambda: Truncated(1.0),
        lambda: Truncated(rank=0),
        lambda: Cubic(0.0),
        lambda: Cubic(math.inf),
    ],
)
def test_bad_settings(build):
    with pytest.raises(jp.ArgumentError):
        build()


def test_a_direction_without_effect_is_not_scaled_up():
    curvature = torch.tensor([[1.0, 0.0], [0.0, 1e-15]])  # of a bias before a BatchNorm: rounding
    kappa = Damped(scaled=True)(torch.tensor([1.0, 1e-9]), curvature)
    assert abs(kappa[1]) < 1e-6
