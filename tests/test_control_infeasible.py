"""How the interior point of `jetplane.control` ends where there is no solution, and its restoration of feasibility."""

from typing import Any

import pytest
import torch

import jetplane as jp

np = pytest.importorskip("numpy", reason="jetplane.control needs NumPy")
pytest.importorskip("scipy", reason="jetplane.control needs SciPy")

from test_control import differences, two_phases  # noqa: E402

from jetplane.control import Mesh, Status  # noqa: E402
from jetplane.control.elastic import PROXIMITY, Elastic  # noqa: E402
from jetplane.control.ipopt import Scaling  # noqa: E402
from jetplane.control.scaled import Scaled  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("JETPLANE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def cart(distance: float | None = 1.0, push=None, tf: Any = 1.0, cost=None, **states):
    """A cart that is pushed from rest to rest."""
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "cart",
        states={"x": (1, *states.get("x", (None, None))), "v": (1, *states.get("v", (None, None)))},
        controls={"a": 1 if push is None else (1, -push, push)},
        t0=0.0,
        tf=tf,
    )
    ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
    ph.start(x=0.0, v=0.0)
    if distance is not None:
        ph.end(x=distance, v=0.0)
    ocp.minimize(running=cost or (lambda x, u, t, p: u.a.square()))
    return ocp, ph


def slow_path():
    ocp, ph = cart()
    ph.path["slow"] = (lambda x, u, t, p: x.v, -0.5, 0.5)
    return ocp


def slow_state():
    return cart(v=(-0.5, 0.5))[0]


def ends():
    ocp, ph = cart()
    ocp.boundary["again"] = (lambda e: e.cart.xf.x, 2.0, 2.0)
    return ocp


def short():
    return cart(push=1.0)[0]


def energy():
    ocp, ph = cart()
    ph.integral["E"] = (lambda x, u, t, p: u.a.square(), None, 5.0)
    return ocp


def pendulum():
    ocp = jp.control.Problem()
    ph = ocp.phase("swing", states={"q": 1, "w": 1}, controls={"u": (1, -0.5, 0.5)}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"q": x.w, "w": -x.q.sin() + u.u}
    ph.start(q=0.0, w=0.0)
    ph.end(q=3.14159, w=0.0)
    ocp.minimize(running=lambda x, u, t, p: u.u.square())
    return ocp


def parameter():
    ocp, ph = cart()
    ocp.parameter("k", 1, -10.0, 10.0)
    ocp.boundary["root"] = (lambda e: e.p.k.square() + 1, 0.0, 0.0)
    return ocp


def path_of_controls():
    ocp, ph = cart()
    ph.path["square"] = (lambda x, u, t, p: u.a.square() + x.v.square(), None, -1.0)
    return ocp


def uncontrolled():
    ocp = jp.control.Problem()
    ph = ocp.phase("decay", states={"x": 1}, controls={"u": (1, 0.0, 1.0)}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"x": -x.x - u.u * x.x**3}
    ph.start(x=1.0)
    ph.end(x=2.0)
    ocp.minimize(running=lambda x, u, t, p: u.u.square())
    return ocp


def linked():
    ocp = jp.control.Problem()
    for name, t0, tf in (("one", 0.0, 1.0), ("two", 1.0, 2.0)):
        ph = ocp.phase(name, states={"x": 1}, controls={"u": (1, -1.0, 1.0)}, t0=t0, tf=tf)
        ph.dynamics = lambda x, u, t, p: {"x": u.u - 0.1 * x.x**2}
    ocp.phases["one"].start(x=0.0)
    ocp.phases["two"].end(x=3.0)
    ocp.link("one", "two")
    ocp.minimize(running={"one": lambda x, u, t, p: u.u.square(), "two": lambda x, u, t, p: u.u.square()})
    return ocp


def corridor():
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "drive", states={"x": (1, -3.0, 3.0), "y": (1, -1.0, 1.0)}, controls={"v": (2, -1.0, 1.0)}, t0=0.0, tf=5.0
    )
    ph.dynamics = lambda x, u, t, p: {"x": u.v[:, :1], "y": u.v[:, 1:]}
    ph.path["wall"] = (lambda x, u, t, p: x.x.square() + x.y.square(), 2.0, None)
    ph.start(x=-2.0, y=0.0)
    ph.end(x=2.0, y=0.0)
    ocp.minimize(running=lambda x, u, t, p: u.v.square().sum(-1))
    return ocp


def hover():
    ocp = jp.control.Problem()
    ph = ocp.phase(
        "hover",
        states={"h": (1, 0.0, 100.0), "v": 1, "m": (1, 0.1, 2.0)},
        controls={"T": (1, 0.0, 5.0)},
        t0=0.0,
        tf=5.0,
    )
    ph.dynamics = lambda x, u, t, p: {"h": x.v, "v": u.T / x.m - 9.81, "m": -0.01 * u.T}
    ph.start(h=10.0, v=0.0, m=1.0)
    ph.end(h=10.0)
    ocp.minimize(running=lambda x, u, t, p: u.T)
    return ocp


def nonlinear_equality():
    ocp, ph = cart(distance=None)
    ph.path["circle"] = (lambda x, u, t, p: x.x.cos() + 0.5 * u.a.cos(), 2.0, 2.0)
    return ocp


def minimum_time():
    ocp, ph = cart(distance=1.0, push=1.0, tf=(0.1, 1.5))
    return ocp


def far_start():
    # x stays above 1, but the start is at 0
    ocp, ph = cart()
    ph.path["above"] = (lambda x, u, t, p: x.x + 0.1 * u.a, 1.0, None)
    ph.path["small"] = (lambda x, u, t, p: u.a, -1.0, 1.0)
    return ocp


INFEASIBLE = {
    f.__name__: f
    for f in (
        slow_path,
        slow_state,
        ends,
        short,
        energy,
        pendulum,
        parameter,
        path_of_controls,
        uncontrolled,
        linked,
        corridor,
        hover,
        nonlinear_equality,
        minimum_time,
        far_start,
    )
}


def concave():
    return cart(cost=lambda x, u, t, p: -u.a.square())[0]


def linear():
    return cart(distance=None, cost=lambda x, u, t, p: -u.a)[0]


def final():
    ocp, ph = cart(distance=None)
    ocp.minimize(final=lambda e: -e.cart.xf.x)
    return ocp


def cubic():
    ocp, ph = cart(distance=None)
    ph.guess(a=1.0)
    ocp.minimize(final=lambda e: -(e.cart.xf.x**3))
    return ocp


def time():
    ocp, ph = cart(tf=(0.5, None))
    ocp.minimize(final=lambda e: -e.cart.tf)
    return ocp


def free_parameter():
    ocp, ph = cart()
    ocp.parameter("k", 2)
    ocp.minimize(running=lambda x, u, t, p: u.a.square(), final=lambda e: e.p.k[0])
    return ocp


def saddle():
    ocp, ph = cart()
    ocp.parameter("k", 2, guess=[1.0, -0.5])
    ocp.minimize(running=lambda x, u, t, p: u.a.square(), final=lambda e: e.p.k[0] * e.p.k[1])
    return ocp


def growth():
    ocp = jp.control.Problem()
    ph = ocp.phase("grow", states={"x": 1}, controls={"u": 1}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"x": x.x * u.u}
    ph.start(x=1.0)
    ocp.minimize(final=lambda e: -e.grow.xf.x)
    return ocp


def root():
    ocp, ph = cart(distance=None, cost=lambda x, u, t, p: -(1 + u.a.square()).sqrt())
    ph.guess(a=1.0)
    return ocp


def one_bound():
    ocp = jp.control.Problem()
    ph = ocp.phase("fall", states={"x": (1, None, 10.0)}, controls={"u": (1, 0.0, None)}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"x": -u.u.square()}
    ph.start(x=2.0)  # from some starts the steps become so short that a limit ends them first
    ocp.minimize(final=lambda e: e.fall.xf.x)
    return ocp


def ray():
    # along x = y without end
    ocp = jp.control.Problem()
    ph = ocp.phase("ray", states={"x": 1, "y": 1}, controls={"u": 2}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"x": u.u[:, :1], "y": u.u[:, 1:]}
    ph.start(x=0.0, y=0.0)
    ocp.minimize(final=lambda e: -e.ray.xf.x - e.ray.xf.y, running=lambda x, u, t, p: (u.u[:, 0] - u.u[:, 1]) ** 2)
    return ocp


UNBOUNDED = {
    f.__name__: f for f in (concave, linear, final, cubic, time, free_parameter, saddle, growth, root, one_bound, ray)
}


def solve(ocp, **options):
    return ocp.solve(mesh=(6, 3), solver="banded", **{"max_iterations": 500, **options})


class TestInfeasible:
    @pytest.mark.parametrize("name", INFEASIBLE)
    def test_ends_as_such(self, name):
        assert solve(INFEASIBLE[name]()).status is Status.INFEASIBLE

    @pytest.mark.parametrize("name", ["slow_path", "short", "pendulum", "uncontrolled", "linked", "minimum_time"])
    def test_ends_at_a_least_violation(self, name):
        """No direction within the bounds lowers the sum of squares of the violations."""
        ocp = INFEASIBLE[name]()
        sol, nlp = solve(ocp, scaling="none"), ocp.nlp((6, 3))
        assert sol.status is Status.INFEASIBLE
        y = sol.outcome.y
        g = nlp.constraints(y)
        violation = g - np.clip(g, nlp.constraint_lower, nlp.constraint_upper)
        slope = nlp.jacobian_matrix(y).T @ violation
        assert np.abs(violation).max() > 1e-3
        room = np.where(slope > 0, y - nlp.lower, nlp.upper - y)
        assert (np.abs(slope) * np.clip(room, 0, 1)).max() <= 1e-3 * np.abs(violation).max()

    def test_in_a_batch_those_that_have_a_solution_find_it(self):
        ocp, _ = cart(push=1.0)
        ocp.parameter("distance", 1, 0.0, 2.0)
        ocp.phases["cart"].end(v=0.0, x=(None, None))
        ocp.boundary["there"] = (lambda e: e.cart.xf.x - e.p.distance, 0.0, 0.0)
        batch = jp.control.solve_batch(ocp, {"distance": [0.1, 0.2, 1.0, 0.24, 2.0]}, mesh=(6, 3))
        assert [s.name for s in batch.status] == ["SOLVED", "SOLVED", "INFEASIBLE", "SOLVED", "INFEASIBLE"]

    def test_limits_hold_within_the_restoration(self):
        whole = solve(pendulum())
        for limit in (whole.iterations - 2, whole.iterations // 2):
            sol = solve(pendulum(), max_iterations=limit)
            assert sol.status is Status.ITERATION_LIMIT and sol.iterations == limit
        assert solve(pendulum(), time_limit=1e-9).status is Status.TIME_LIMIT


LONG = {"time", "growth"}


class TestUnbounded:
    @pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in UNBOUNDED])
    def test_ends_as_such(self, name):
        sol = solve(UNBOUNDED[name]())
        assert sol.status is Status.DIVERGED and sol.objective < -1e6

    def test_large_numbers_alone_are_no_divergence(self):
        """A far target in metres, with nothing that tells its size."""
        ocp, ph = cart(distance=1e9, tf=1e3)
        assert solve(ocp, scaling="none").success
        sol = solve(ocp, scaling="none", max_iterations=1)
        assert sol.status in (Status.ITERATION_LIMIT, Status.SOLVED)


class TestElastic:
    def program(self):
        nlp = two_phases().nlp({"a": Mesh((0.3, 0.7), (3, 2)), "b": Mesh.uniform(2, 2)})
        rng = np.random.default_rng(0)
        scaling = Scaling(1 + rng.random(nlp.n), 1 + rng.random(nlp.m), 3.0)
        scaled = Scaled(nlp, scaling, 2, torch.device("cpu"))
        y = torch.from_numpy(rng.random((nlp.n, 2)))
        return nlp, scaled, Elastic(scaled, y, torch.tensor([0.5, 2.0]).double()), rng

    def test_derivatives(self):
        nlp, _, elastic, rng = self.program()
        z, multipliers = rng.random((elastic.n, 2)), rng.normal(size=(nlp.m, 2))

        def at(function, number, *arguments):
            """Of one problem, as a function of its variables alone."""

            def of(z_one):
                whole = torch.from_numpy(z).clone()
                whole[:, number] = torch.from_numpy(z_one)
                return getattr(elastic, function)(whole, *arguments)[..., number].numpy()

            return of

        for number in range(2):
            here = z[:, number]
            np.testing.assert_allclose(
                at("gradient", number)(here), differences(at("objective", number), here), atol=1e-8
            )
            jacobian = np.zeros((elastic.m, elastic.n))
            jacobian[elastic.jacobian_structure] = at("jacobian", number)(here)
            np.testing.assert_allclose(jacobian, differences(at("constraints", number), here), atol=1e-7)

            def slope(z_one, number=number):
                rows = np.zeros((elastic.m, elastic.n))
                rows[elastic.jacobian_structure] = at("jacobian", number)(z_one)
                return at("gradient", number)(z_one) + rows.T @ multipliers[:, number]

            hessian = np.zeros((elastic.n, elastic.n))
            hessian[elastic.hessian_structure] = at("hessian", number, torch.from_numpy(multipliers))(here)
            assert not np.triu(hessian, 1).any()
            hessian += np.tril(hessian, -1).T
            np.testing.assert_allclose(hessian, differences(slope, here), atol=1e-6)

    def test_objective_is_the_violation_near_the_start(self):
        _, scaled, elastic, rng = self.program()
        y, e = torch.from_numpy(rng.random((scaled.n, 2))), torch.from_numpy(rng.random((scaled.m, 2)))
        far = ((y - elastic.center) / elastic.center.abs().clamp_min(1)).square().sum(0)
        expected = 0.5 * (e.square().sum(0) / elastic.violation + PROXIMITY * far)
        torch.testing.assert_close(elastic.objective(elastic.joined(y, e)), expected)
        torch.testing.assert_close(elastic.constraints(elastic.joined(y, e)), scaled.constraints(y) - e)
