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
        lambda: SaddleFree(1.01),
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


class TestDescents:
    slope = torch.tensor([1.0, -2.0, 3.0])

    def test_newton_leaves_null_directions_out_and_says_so(self):
        h = torch.diag(torch.tensor([2.0, 0.0, 1.0]))
        with pytest.warns(jp.RescueWarning, match="1 of 3"):
            kappa = Newton()(self.slope, h)
        torch.testing.assert_close(kappa, torch.tensor([-0.5, 0.0, -3.0]).double())

    def test_newton_announces_an_indefinite_plane(self):
        with pytest.warns(jp.RescueWarning, match="indefinite"):
            kappa = Newton()(self.slope, torch.diag(torch.tensor([2.0, -1.0, 1.0])))
        torch.testing.assert_close(kappa, torch.tensor([-0.5, -2.0, -3.0]).double())

    @pytest.mark.parametrize("descent", [Newton(), SaddleFree(), Damped()])
    def test_no_curvature_at_all(self, descent):
        with pytest.raises(jp.SingularPlaneError):
            descent(self.slope, torch.zeros(3, 3))

    @pytest.mark.parametrize("descent", [SaddleFree(), Damped()])
    def test_never_uphill(self, descent):
        h = torch.randn(3, 3)
        kappa = descent(self.slope, h + h.T)
        assert kappa @ self.slope.double() < 0

    def test_means(self):
        torch.testing.assert_close(ForwardGradient()(self.slope, None), -self.slope.double() / 3)
        kappa = CurvatureScaled(0.0)(self.slope, torch.tensor([1.0, -2.0, 4.0]))
        torch.testing.assert_close(kappa, torch.tensor([-1.0, 1.0, -0.75]).double() / 3)
        with pytest.raises(jp.SingularPlaneError):
            CurvatureScaled(0.0)(self.slope, torch.zeros(3))
        with pytest.raises(jp.ShapeError, match=r"\(3, 3\)"):
            Newton()(self.slope, torch.zeros(2, 2))


# --- thresholds and defaults ------------------------------------------------------------------------------


def repeated(values: list[float], dtype: torch.dtype = torch.float32, number: int = 5) -> torch.Tensor:
    """So many planes that are equal, of these eigenvalues."""
    return torch.diag(torch.tensor(values, dtype=dtype)).expand(number, -1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3])
def test_newton_leaves_out_ten_k_times_the_rounding(k, dtype):
    least, slope = 4.0 * 10 * k * torch.finfo(dtype).eps, torch.ones(5, k)
    with pytest.warns(jp.RescueWarning, match=f"^singular plane: {5 * (k - 1)} of {5 * k} eigenvalues"):
        kappa = Newton()(slope, repeated([4.0] + (k - 1) * [0.99 * least], dtype))
    assert_close(kappa, torch.tensor([-0.25] + (k - 1) * [0.0]).double().expand(5, k) / 5)
    kappa = Newton()(slope, repeated([4.0] + (k - 1) * [1.01 * least], dtype))
    assert_close(kappa, torch.tensor([-0.25] + (k - 1) * [-1 / (1.01 * least)]).double().expand(5, k) / 5)


def test_newton_leaves_out_what_it_is_told_to():
    curvature = torch.diag(torch.tensor([2.0, 1.1, 0.9]))
    with pytest.warns(jp.RescueWarning, match="1 of 3 eigenvalues are below 5.0e-01"):
        kappa = Newton(tolerance=0.5)(torch.ones(3), curvature)
    assert_close(kappa, torch.tensor([-0.5, -1 / 1.1, 0.0]).double())
    with pytest.warns(jp.RescueWarning, match="1 of 2"):  # what has no inverse, whatever the tolerance
        assert_close(
            Newton(tolerance=0.0)(torch.ones(2), torch.diag(torch.tensor([2.0, 0.0]))), torch.tensor([-0.5, 0]).double()
        )


def test_warnings_name_the_line_that_calls_the_descent():
    curvature = torch.diag(torch.tensor([1.0, -0.5, -1e-12]))
    with pytest.warns(jp.RescueWarning) as caught:
        Newton()(torch.ones(3), curvature)
    singular, indefinite = caught
    assert {singular.filename, indefinite.filename} == {__file__}
    assert "singular plane: 1 of 3" in str(singular.message)
    assert "uphill along 1 of 3" in str(indefinite.message)  # a negative eigenvalue that is rounding is left out


def test_saddle_free_without_a_floor_has_k_times_the_rounding():
    kappa = SaddleFree(floor=None)(torch.ones(5, 3), repeated([2.0, 1.0, 1e-20]))
    least = 3 * torch.finfo(torch.float32).eps * 2.0
    expected = -torch.tensor([0.5, 1.0, 1 / least]).double()
    assert_close(kappa, expected.expand(5, 3) / 5)
    assert_close(SaddleFree(floor=None)(torch.ones(3), torch.diag(torch.tensor([2.0, 1.0, 1e-20]))), expected)


def test_defaults():
    slope, curvature = torch.ones(3), torch.diag(torch.tensor([2.0, 0.5, 0.0]))
    assert_close(SaddleFree()(slope, curvature), -torch.tensor([0.5, 2.0, 1 / 2e-3]).double())
    assert_close(Damped()(slope, curvature), -torch.tensor([1 / 2.02, 1 / 0.52, 1 / 0.02]).double())
    assert_close(CurvatureScaled()(slope, curvature.diagonal())[2], -torch.tensor(1 / 3e-5).double())
    assert_close(SaddleFree(floor=1.0)(slope, curvature), torch.full((3,), -0.5).double())


def test_damping_takes_negative_curvature_for_none():
    kappa = Damped(0.1)(torch.ones(3), torch.diag(torch.tensor([-2.0, 0.5, 1.0])))
    assert_close(kappa, -torch.tensor([1 / 0.2, 1 / 0.7, 1 / 1.2]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvature_above_sixteen_roundings_squared_is_scaled_up(dtype):
    rounding = 4.0 * torch.finfo(dtype).eps ** 2
    diagonal = torch.tensor([4.0, 17.0**2 * rounding, -(17.0**2) * rounding, 15.0**2 * rounding], dtype=dtype)
    descent = Damped(0.25, scaled=True)
    step = descent.solve(torch.zeros(2, 4), diagonal.diag().expand(2, 4, 4))
    inverse = torch.stack([torch.tensor(0.2), 0.8 / diagonal[1], 4 / diagonal[1], torch.tensor(4.0)]).double()
    assert_close(step.inverse, inverse.diag().expand(2, 4, 4))  # 1 / 1.25, 1 / 1.25 and twice 1 / 0.25 before scaling


@pytest.mark.parametrize("slope", [torch.ones(2), torch.ones(3, 2)])
@pytest.mark.parametrize("descent", SPECTRAL[:3], ids=lambda d: type(d).__name__)
def test_a_plane_without_curvature_names_its_directions(descent, slope):
    curvature = torch.eye(2).expand(*slope.shape, 2).clone()
    curvature.reshape(-1, 2, 2)[-1] = 0.0
    with pytest.raises(jp.SingularPlaneError, match="plane of 2 directions"):
        descent(slope, curvature)


@pytest.mark.parametrize("descent", SPECTRAL[:3], ids=lambda d: type(d).__name__)
def test_without_slope_and_curvature_there_is_no_step(descent):
    assert torch.equal(descent(torch.zeros(2), torch.zeros(2, 2)), torch.zeros(2).double())
    alone = descent(torch.ones(2), torch.eye(2))
    planes = descent(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.stack([torch.eye(2), torch.zeros(2, 2)]))
    assert torch.equal(planes, torch.stack([alone, torch.zeros(2).double()]) / 2)


def test_curvature_of_another_shape():
    with pytest.raises(jp.ShapeError, match=r"slope of shape \(3,\): expected curvature \(3, 3\), got None"):
        Newton()(torch.ones(3), None)
    with pytest.raises(jp.ShapeError, match=r"expected curvature \(3,\), got \(3, 3\)"):
        CurvatureScaled()(torch.ones(3), torch.eye(3))
