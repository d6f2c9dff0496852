"""Descents on batches of planes, and what they make of scale."""

import pytest
import torch
from torch.testing import assert_close

import jetplane as jp
from jetplane.subspace.descent import (
    CurvatureScaled,
    Damped,
    Descent,
    ForwardGradient,
    Newton,
    SaddleFree,
    named,
)

SPECTRAL = [Newton(), SaddleFree(), Damped(), Damped(scaled=True)]


def planes(number: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    root = torch.randn(number, k, k)
    return torch.randn(number, k), root @ root.mT + torch.eye(k)


@pytest.mark.parametrize("descent", SPECTRAL, ids=str)
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


@pytest.mark.parametrize("descent", SPECTRAL, ids=str)
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


def test_one_singular_plane_among_many_is_rescued_alone():
    slope, curvature = planes(3, 2)
    curvature[1] = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.warns(jp.RescueWarning, match="1 of 6"):
        kappa = Newton()(slope, curvature)
    assert_close(kappa[1], torch.tensor([-slope[1, 0].item() / 3, 0.0]).double())
    assert_close(kappa[0], Newton()(slope[:1], curvature[:1])[0] / 3)


@pytest.mark.parametrize("name", ["newton", "saddle-free", "damped"])
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
    ],
)
def test_bad_settings(build):
    with pytest.raises(jp.ArgumentError):
        build()


def test_a_direction_without_effect_is_not_scaled_up():
    curvature = torch.tensor([[1.0, 0.0], [0.0, 1e-15]])  # of a bias before a BatchNorm: rounding
    kappa = Damped(scaled=True)(torch.tensor([1.0, 1e-9]), curvature)
    assert abs(kappa[1]) < 1e-6
