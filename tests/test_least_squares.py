"""Nonlinear least squares: minima, derivatives of every form of residuals, bounds, robust losses, errors of the fit."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jetplane as jp
from benchmarks.more_garbow_hillstrom import PROBLEMS, Problem, rosenbrock
from jetplane.subspace.linear_model import LinearModel, Region, RowFactor
from jetplane.subspace.robust import NAMED

scipy_optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the reference")

SLOW = {"Meyer", "Brown and Dennis", "penalty I, 10", "penalty II, 4", "penalty II, 10", "Wood"}
SLOW |= {"extended Powell singular, 12", "Powell singular"}
LOSSES = [name for name in NAMED if name != "linear"]
T = torch.linspace(0, 3, 25, dtype=torch.float64)


def reached(problem: Problem, squares: float) -> bool:
    return any(abs(squares - m) <= 1e-5 * m if m else squares < 1e-12 for m in problem.minima)


def numpy_of(problem: Problem) -> tuple[Any, Any]:
    """Residuals and Jacobian, for SciPy."""

    def fun(x: Any) -> Any:
        return problem.residuals(torch.from_numpy(np.array(x))).numpy()

    def jac(x: Any) -> Any:
        return torch.func.jacrev(problem.residuals)(torch.from_numpy(np.array(x))).numpy()

    return fun, jac


def decay(p: Any) -> Tensor:
    return p["height"] * torch.exp(-p["rate"] * T) + p["rest"]


def noisy(seed: int = 0, outliers: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    truth = {"height": torch.tensor(2.0), "rate": torch.tensor(1.5), "rest": torch.tensor(0.3)}
    y = decay(truth) + 0.05 * torch.randn(len(T), generator=generator, dtype=torch.float64)
    y[3 : 3 + outliers] += 2.0
    return y


def start() -> dict[str, Tensor]:
    return {name: torch.tensor(1.0, dtype=torch.float64) for name in ("height", "rate", "rest")}


def flat(tree: dict[str, Tensor]) -> np.ndarray:
    return torch.stack([tree[name] for name in ("height", "rate", "rest")]).double().numpy()


def as_numpy(y: Tensor) -> Any:
    return lambda x: (
        decay(dict(zip(("height", "rate", "rest"), torch.from_numpy(np.array(x)), strict=True))) - y
    ).numpy()


class TestMinima:
    @pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name not in SLOW], ids=lambda p: p.name)
    def test_problem(self, problem: Problem) -> None:
        fit = jp.optim.least_squares(problem.residuals, problem.start)
        assert fit.success, fit.message
        assert reached(problem, 2 * fit.cost), fit
        assert fit.nfev == len(fit.history) and fit.cost == min(fit.history)

    @pytest.mark.long
    @pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name in SLOW], ids=lambda p: p.name)
    def test_slow_problem(self, problem: Problem) -> None:
        assert reached(problem, 2 * jp.optim.least_squares(problem.residuals, problem.start).cost)

    def test_fewer_calls_than_scipy(self) -> None:
        ours = theirs = 0
        for problem in (p for p in PROBLEMS if p.number in (5, 8, 9, 12, 15, 19, 28, 29, 30, 31)):
            calls = []
            fun, _ = numpy_of(problem)
            scipy_optimize.least_squares(lambda x: (calls.append(1), fun(x))[1], problem.start.numpy())  # noqa: B023
            ours += jp.optim.least_squares(problem.residuals, problem.start).nfev
            theirs += len(calls)
        assert ours < theirs / 3

    def test_units_do_not_matter(self) -> None:
        fit = jp.optim.least_squares(rosenbrock, torch.tensor([-1.2, 1.0]).double())
        scaled = jp.optim.least_squares(lambda x: 1e-9 * rosenbrock(x * torch.tensor([2.0**-20, 2.0**30]).double()),
                                        torch.tensor([-1.2 * 2.0**20, 2.0**-30]).double())  # fmt: skip
        assert scaled.nfev == fit.nfev
        assert np.allclose(scaled.params.numpy() * [2.0**-20, 2.0**30], 1)


class TestForms:
    """Residuals and parameters may have many forms, and all give one fit."""

    y = noisy()

    def reference(self) -> Any:
        return jp.optim.least_squares(lambda p: decay(p) - self.y, start())

    def test_yielded(self) -> None:
        def one_by_one(p: Any) -> Any:
            for value, target in zip(decay(p), self.y, strict=True):
                yield value - target

        fit, expected = jp.optim.least_squares(one_by_one, start()), self.reference()
        assert fit.nfev == expected.nfev and fit.fun is None
        assert np.allclose(flat(fit.params), flat(expected.params), rtol=1e-9)
        assert torch.allclose(fit.covariance, expected.covariance, rtol=1e-7)
        assert torch.equal(expected.fun, decay(expected.params) - self.y)

    @pytest.mark.parametrize("chunk", [1, 2, 3, 9])
    def test_chunks(self, chunk: int) -> None:
        def blocks(p: Any) -> Any:
            r = decay(p) - self.y
            yield {"head": r[:5].reshape(5, 1), "tail": [r[5], r[6:]]}

        fit, expected = jp.optim.least_squares(blocks, start(), chunk=chunk), self.reference()
        assert fit.nfev == expected.nfev and fit.residuals == len(T)
        assert np.allclose(flat(fit.params), flat(expected.params), rtol=1e-9)

    def test_structures(self) -> None:
        names, expected = ("height", "rate", "rest"), flat(self.reference().params)
        as_list = jp.optim.least_squares(
            lambda p: decay(dict(zip(names, p, strict=True))) - self.y, list(start().values())
        )
        assert isinstance(as_list.params, list) and isinstance(as_list.standard_errors, list)
        assert np.allclose(torch.stack(as_list.params).numpy(), expected)
        one = jp.optim.least_squares(lambda p: decay(dict(zip(names, p, strict=True))) - self.y, torch.ones(3).double())
        assert one.params.shape == (3,) and np.allclose(one.params.numpy(), expected)

    def test_single_precision(self) -> None:
        fit = jp.optim.least_squares(lambda p: decay(p) - self.y, {k: v.float() for k, v in start().items()})
        assert fit.success and all(p.dtype == torch.float32 for p in fit.params.values())
        assert np.allclose(flat(fit.params), flat(self.reference().params), rtol=1e-3)

    def test_a_model_of_torch(self) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
        y = torch.sin(2 * T).unsqueeze(1)
        params = {n: p.detach() for n, p in model.named_parameters()}
        before = {n: p.clone() for n, p in params.items()}
        fit = jp.optim.least_squares(
            lambda p: torch.func.functional_call(model, p, (T.unsqueeze(1),)) - y, params, max_nfev=60
        )
        assert fit.cost < 1e-3 and fit.fun.shape == (len(T), 1)
        assert all(torch.equal(before[n], p) for n, p in params.items())

    def test_memory_does_not_grow_with_time(self) -> None:
        code = """
import json, sys, torch, jetplane as jp
from benchmarks.memory import peak_growth
def residuals(p, steps):
    u = p[0]
    for _ in range(steps):
        u = u + 0.01 * torch.sin(p[1:] * u).sum()
        yield u - 0.5
x = torch.rand(20, dtype=torch.float64)
run = lambda steps: jp.optim.least_squares(lambda p: residuals(p, steps), x, max_nfev=1)
run(100)
print(json.dumps([peak_growth(lambda: run(steps)) for steps in (500, 2000)]))
"""
        root = Path(__file__).parent.parent
        paths = os.pathsep.join([str(root), str(Path(jp.__file__).parent.parent)])
        env = os.environ | {"PYTHONPATH": paths, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        short, long = json.loads(done.stdout)
        assert long < short + 2**18  # the Jacobian alone would be 240 KB longer, a tape megabytes


class TestRobust:
    @pytest.mark.parametrize("loss", LOSSES)
    def test_as_scipy(self, loss: str) -> None:
        y = noisy(outliers=3)
        fit = jp.optim.least_squares(lambda p: decay(p) - y, start(), loss=loss, f_scale=0.1)
        options = {"loss": loss, "f_scale": 0.1, "xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}
        theirs = scipy_optimize.least_squares(as_numpy(y), np.ones(3), "3-point", **options)
        assert fit.success
        assert fit.cost == pytest.approx(theirs.cost, rel=1e-7)
        assert np.allclose(flat(fit.params), theirs.x, rtol=2e-3)

    @pytest.mark.parametrize("loss", NAMED)
    def test_derivatives(self, loss: str) -> None:
        z = torch.tensor([0.01, 0.3, 0.9, 1.7, 30.0], dtype=torch.float64, requires_grad=True)
        rho = NAMED[loss](z)
        first = torch.autograd.grad(rho[0].sum(), z, create_graph=True)[0]
        assert torch.allclose(rho[1], first)
        second = torch.autograd.grad(first.sum(), z)[0] if first.requires_grad else torch.zeros_like(z)
        assert torch.allclose(rho[2], second)

    def test_a_start_at_which_every_residual_is_an_outlier(self) -> None:
        y = noisy(outliers=3) - 4
        fit = jp.optim.least_squares(lambda p: decay(p) - y, start(), loss="huber", f_scale=0.1)
        near = scipy_optimize.least_squares(as_numpy(y), [2.0, 1.0, -4.0], "3-point", loss="huber", f_scale=0.1)
        assert fit.success and fit.nfev <= 25
        assert fit.cost == pytest.approx(near.cost, rel=1e-6)

    def test_own_function(self) -> None:
        y = noisy(outliers=2)
        fit = jp.optim.least_squares(lambda p: decay(p) - y, start(), loss=NAMED["cauchy"], f_scale=0.1)
        named = jp.optim.least_squares(lambda p: decay(p) - y, start(), loss="cauchy", f_scale=0.1)
        assert fit.history == named.history

    def test_covariance_is_that_of_the_estimates(self) -> None:
        """Standard errors equal the spread of estimates over many data sets, for noise with long tails."""
        t = torch.linspace(-1, 1, 40, dtype=torch.float64)
        generator = np.random.default_rng(0)
        found, errors = [], []
        for _ in range(60):
            noise = torch.from_numpy(generator.standard_t(2.5, len(t)))
            y = 1 + 2 * t + 0.2 * noise
            fit = jp.optim.least_squares(
                lambda p, y=y: p[0] + p[1] * t - y, torch.zeros(2).double(), loss="huber", f_scale=0.2
            )
            found.append(fit.params)
            errors.append(fit.standard_errors)
        spread, stated = torch.stack(found).std(0), torch.stack(errors).square().mean(0).sqrt()
        assert torch.allclose(spread, stated, rtol=0.35)  # sixty data sets tell a spread within 9 %


class TestBounds:
    @pytest.mark.parametrize("seed", range(6))
    def test_linear_problems_in_a_box(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(12, 7, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-3, 4)
        b = 3 * torch.randn(12, generator=generator, dtype=torch.float64)
        lower = -torch.rand(7, generator=generator, dtype=torch.float64) * 10.0 ** -torch.arange(-3, 4).double()
        upper = torch.rand(7, generator=generator, dtype=torch.float64) * 10.0 ** -torch.arange(-3, 4).double()
        theirs = scipy_optimize.lsq_linear(a.numpy(), b.numpy(), (lower.numpy(), upper.numpy()), "bvls", tol=1e-14)
        fit = jp.optim.least_squares(lambda x: a @ x - b, torch.zeros(7).double(), bounds=(lower, upper))
        assert fit.cost == pytest.approx(theirs.cost, rel=1e-10)
        assert np.array_equal(fit.active_mask.numpy(), theirs.active_mask)
        assert bool(((fit.params >= lower) & (fit.params <= upper)).all())
        assert fit.nfev <= 3  # the model is the problem

    def test_against_scipy(self) -> None:
        y = noisy()
        fit = jp.optim.least_squares(
            lambda p: decay(p) - y, start(), bounds=({"height": 0, "rate": 0.5, "rest": 0.4}, 3.0)
        )
        theirs = scipy_optimize.least_squares(as_numpy(y), np.ones(3), bounds=([0, 0.5, 0.4], 3.0), xtol=1e-12)
        assert fit.cost == pytest.approx(theirs.cost, rel=1e-6)
        assert fit.params["rest"] == 0.4 and fit.active_mask["rest"] == -1
        assert math.isnan(fit.standard_errors["rest"]) and math.isfinite(fit.standard_errors["rate"])

    def test_lists_for_a_tensor(self) -> None:
        x = torch.tensor([1.0, 2.0]).double()
        low, high = torch.tensor([-5.0, 0.0]), torch.tensor([0.9, 9.0])
        with pytest.raises(jp.ArgumentError, match="outside"):
            jp.optim.least_squares(rosenbrock, x, bounds=(low.tolist(), high.tolist()))
        found = [jp.optim.least_squares(rosenbrock, x - 0.5, bounds=b) for b in ((low, high), ([-5, 0], (0.9, 9)))]
        assert found[0].params.tolist() == pytest.approx(found[1].params.tolist(), abs=1e-6)
        assert found[1].active_mask.tolist() == [1, 0]
        with pytest.raises(jp.ShapeError, match="lower bounds"):
            jp.optim.least_squares(rosenbrock, x, bounds=([0], [9, 9]))

    def test_every_evaluation_is_inside(self) -> None:
        seen = []

        def residuals(x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return torch.stack([x[0].sqrt() - 3, 10 * (x[1] - x[0])])

        limits = torch.tensor([0.1, 0.1]), torch.tensor([5.7, 7.3])
        fit = jp.optim.least_squares(residuals, torch.tensor([1.0, 1.0]), bounds=limits)
        assert fit.active_mask.tolist() == [1, 0]
        assert all(bool(((x >= limits[0]) & (x <= limits[1])).all()) for x in seen)

    def test_trust_region_step_is_the_constrained_minimum(self) -> None:
        generator = torch.Generator().manual_seed(1)
        r = torch.randn(5, 5, generator=generator, dtype=torch.float64).triu()
        q = torch.randn(5, generator=generator, dtype=torch.float64)
        scale = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
        wall = torch.full((5,), 0.2, dtype=torch.float64)
        model = LinearModel(r, q, 0.0)
        p, damping = Region(model, scale, -wall, wall).step(0.15)
        assert (scale * p).norm().item() == pytest.approx(0.15, rel=0.011) and damping > 0
        slope = model.gradient + r.mT @ (r @ p) + damping * scale**2 * p  # zero where no bound holds the step
        inner = p.abs() < wall
        assert 0 < inner.sum() < 5
        assert slope[inner].abs().max() < 1e-9 and bool((slope[~inner] * p[~inner] < 0).all())


class TestErrorsOfTheFit:
    def test_as_curve_fit(self) -> None:
        y = noisy()

        def model(t: Any, height: float, rate: float, rest: float) -> Any:
            return height * np.exp(-rate * t) + rest

        sigma = 0.05
        for absolute in (False, True):
            _, covariance = scipy_optimize.curve_fit(
                model, T.numpy(), y.numpy(), np.ones(3), np.full(len(T), sigma), absolute_sigma=absolute
            )
            fit = jp.optim.least_squares(lambda p: (decay(p) - y) / sigma, start(), absolute_sigma=absolute)
            assert np.allclose(fit.covariance.numpy(), covariance, rtol=1e-4)
        assert flat(fit.standard_errors) == pytest.approx(np.sqrt(covariance.diagonal()), rel=1e-4)

    def test_what_is_not_determined(self) -> None:
        y = noisy()
        fit = jp.optim.least_squares(
            lambda p: p[0] * p[1] * torch.exp(-p[2] * T) - y, torch.tensor([1.0, 2.0, 1.0, 5.0]).double()
        )
        assert fit.success
        assert fit.standard_errors.isinf().tolist() == [True, True, False, True]
        known = jp.optim.least_squares(lambda p: p[0] * torch.exp(-p[1] * T) - y, torch.ones(2).double())
        # one degree of freedom is counted for each parameter, known or not
        ratio = (fit.covariance[2, 2] / known.covariance[1, 1]).item()
        assert ratio == pytest.approx((len(T) - 2) / (len(T) - 4), rel=1e-3)

    def test_as_many_parameters_as_residuals(self) -> None:
        fit = jp.optim.least_squares(rosenbrock, torch.tensor([-1.2, 1.0]).double())
        assert fit.standard_errors.isinf().all()
        fit = jp.optim.least_squares(rosenbrock, torch.tensor([-1.2, 1.0]).double(), absolute_sigma=True)
        j = torch.tensor([[-20.0, 10.0], [-1.0, 0.0]]).double()
        assert torch.allclose(fit.covariance, torch.linalg.inv(j.mT @ j))


class TestEndings:
    def test_limit(self) -> None:
        fit = jp.optim.least_squares(rosenbrock, torch.tensor([-1.2, 1.0]).double(), max_nfev=4)
        assert fit.status == "limit" and not fit.success and fit.nfev == 4 and "max_nfev" in fit.message

    def test_stalled(self) -> None:
        """A kink: the linearized problem promises what no step holds."""
        fit = jp.optim.least_squares(lambda x: torch.cat([x.abs() + 1, x]), torch.tensor([1.0]).double())
        assert not fit.success or fit.params.abs() < 1e-6

    def test_wrong_derivative_is_no_success(self) -> None:
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def jvp(ctx: Any, v: Tensor) -> Tensor:
                return -2 * v

        fit = jp.optim.least_squares(lambda x: Wrong.apply(x) - 1, torch.tensor([1.0, 2.0]).double())
        assert fit.status == "stalled" and not fit.success

    def test_not_finite_at_a_trial(self) -> None:
        fit = jp.optim.least_squares(lambda x: torch.log(x) + 3, torch.tensor([5.0]).double())
        assert fit.success and math.inf in fit.history
        assert fit.params.item() == pytest.approx(math.exp(-3))


class TestRefusals:
    x = torch.tensor([1.0, 2.0]).double()

    def refused(
        self, kind: type[Exception], match: str, residuals: Any = rosenbrock, x: Any = None, **options: Any
    ) -> None:
        with pytest.raises(kind, match=match):
            jp.optim.least_squares(residuals, self.x if x is None else x, **options)

    def test_arguments(self) -> None:
        self.refused(jp.ArgumentError, "loss must be", loss="hubert")
        self.refused(jp.ArgumentError, "f_scale", loss="huber", f_scale=0)
        self.refused(jp.ArgumentError, "x_scale", x_scale=-1.0)
        self.refused(jp.ArgumentError, "ftol", ftol=-1.0)
        self.refused(jp.ArgumentError, "max_nfev", max_nfev=0)
        self.refused(jp.ArgumentError, "chunk", chunk=0)
        self.refused(jp.ArgumentError, "bounds must be", bounds=3)
        self.refused(jp.ArgumentError, "at most the upper", bounds=(1, -1))
        self.refused(jp.ArgumentError, "flat indices .1.", bounds=(0, 1.5))
        self.refused(jp.ShapeError, "lower bounds of parameter 0", bounds=(torch.zeros(3), 9))
        self.refused(jp.ShapeError, "structure", bounds=({"a": 0}, 9))
        self.refused(jp.DTypeError, "floating", x=torch.tensor([1, 2]))
        self.refused(jp.ShapeError, "rho", loss=lambda z: z)

    def test_derivatives_do_not_pass_through_a_fit(self) -> None:
        def fitted(y: Any) -> Any:
            return jp.optim.least_squares(lambda p: p - y, torch.zeros(1).double()).params

        def yielded(y: Any) -> Any:
            return jp.optim.least_squares(lambda p: (p - v for v in y), torch.zeros(1).double()).params

        def started(y: Any) -> Any:
            return jp.optim.least_squares(lambda p: p - 1, y).params

        for fit in (fitted, yielded, started):
            with pytest.raises(jp.DerivativeError, match="do not pass through the fit"):
                jp.jvp(fit, (self.x,), (self.x,))
        assert torch.allclose(fitted(self.x), self.x.mean())

        def stopped(y: Any) -> Any:
            with torch.no_grad():
                held = fitted(y)
            return held + y

        value, tangent = jp.jvp(stopped, (self.x,), (self.x,))
        assert torch.allclose(value, self.x + self.x.mean()) and torch.equal(tangent, self.x)

    def test_residuals(self) -> None:
        self.refused(jp.UnusedParametersError, "do not change", lambda x: torch.ones(3))
        self.refused(jp.NonFiniteError, "start", lambda x: torch.log(-x))
        self.refused(jp.ArgumentError, "got none", lambda x: iter(()))
        self.refused(jp.DTypeError, "floating-point", lambda x: 3)
        self.refused(jp.DerivativeError, "numpy", lambda x: torch.from_numpy(np.sin(x.numpy())))
        counts = iter((2, 1, 1, 1))
        self.refused(jp.ShapeError, "got 2 at first", lambda x: rosenbrock(x)[: next(counts)])


def test_row_factor_takes_any_split() -> None:
    rows = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1, 7, 400, 1000):
        factor = RowFactor(5)
        for part in rows.split(size):
            factor.add(part)
        assert torch.allclose(factor.matrix().mT @ factor.matrix(), rows.mT @ rows)


class TestExamples:
    """The scripts in examples/ run, and find what is known of their data."""

    folder = Path(__file__).parent.parent / "examples"

    def fitted(self, name: str, *arguments: Any) -> Any:
        return runpy.run_path(str(self.folder / f"fit_{name}.py"))["fit"](*arguments)

    def test_lotka_volterra(self) -> None:
        fit = self.fitted("lotka_volterra")
        assert fit.success
        # a Bayesian analysis of these data with weak priors has 0.55, 0.80, 0.028 and 0.024
        assert fit.params["growth"].tolist() == pytest.approx([0.55, 0.80], abs=0.02)
        assert fit.params["effect"].tolist() == pytest.approx([0.028, 0.024], abs=0.001)

    def test_epidemic(self) -> None:
        fit = self.fitted("epidemic")
        assert fit.success and not any(mask.item() for mask in fit.active_mask.values())
        assert (fit.params["infection"] / fit.params["recovery"]).item() == pytest.approx(3.9, abs=0.2)

    def test_pendulum(self) -> None:
        fit = self.fitted("pendulum", 1500)
        assert fit.success and fit.fun is None
        truth = runpy.run_path(str(self.folder / "fit_pendulum.py"))["TRUTH"]
        for name, value in truth.items():
            assert abs(fit.params[name] - value) < 4 * fit.standard_errors[name]
