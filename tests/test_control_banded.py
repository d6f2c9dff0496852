"""The interior point of `jetplane.control`: its linear algebra beside dense matrices, its optima beside IPOPT's."""

import os
import signal
from dataclasses import replace

import pytest
import torch

import jetplane as jp

np = pytest.importorskip("numpy", reason="jetplane.control needs NumPy")
pytest.importorskip("scipy", reason="jetplane.control needs SciPy")

from test_control import double_integrator, two_phases  # noqa: E402

from examples.control import CASES, flight  # noqa: E402
from jetplane.control import Mesh, Status, interior_point, ipopt  # noqa: E402
from jetplane.control.kkt import KKT  # noqa: E402

needs_ipopt = pytest.mark.skipif(ipopt.library_path() is None, reason="no libipopt: pip install casadi")
MESHES = {"a": Mesh((0.3, 0.3, 0.4), (3, 2, 3)), "b": Mesh.uniform(4, 3)}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("JETPLANE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def dense(shape, structure, values):
    matrix = np.zeros(shape)
    matrix[structure] = values
    return matrix


class System:
    """A random KKT system with the structure of a program, banded and dense."""

    def __init__(self, nlp, problems=3, curvature=30.0, seed=0, device="cpu"):
        rng = np.random.default_rng(seed)
        self.nlp, self.problems = nlp, problems
        fixed = nlp.lower == nlp.upper
        self.fixed = np.repeat(fixed[:, None], problems, 1)
        self.jacobian = rng.normal(size=(len(nlp.jacobian_structure[0]), problems))
        # Defects as of short intervals: the derivative's matrix dominates.
        y = np.clip(rng.normal(size=nlp.n), nlp.lower, nlp.upper)
        self.jacobian = nlp.jacobian(y)[:, None] + 0.1 * self.jacobian
        self.hessian = rng.normal(size=(len(nlp.hessian_structure[0]), problems))
        self.sigma = curvature + rng.random((nlp.n, problems))
        self.damping = np.zeros((nlp.m, problems))
        for place in nlp.places.values():
            self.damping[place.path] = 0.1 + rng.random(self.damping[place.path].shape)
        self.damping[nlp.end_rows] = rng.random(self.damping[nlp.end_rows].shape)
        self.b, self.c = rng.normal(size=(nlp.n, problems)), rng.normal(size=(nlp.m, problems))
        self.b[self.fixed] = 0
        self.device = torch.device(device)
        self.kkt = KKT(nlp, torch.from_numpy(fixed).to(self.device), self.device)

    def tensors(self, *names):
        return [torch.from_numpy(getattr(self, name)).to(self.device) for name in names]

    def factor(self):
        jacobian, hessian, sigma, damping, fixed = self.tensors("jacobian", "hessian", "sigma", "damping", "fixed")
        return self.kkt.factor(self.kkt.condense(jacobian, hessian), sigma, damping, fixed)

    def solution(self, factor):
        """With a step of refinement, as the interior point has it."""
        b, c = self.tensors("b", "c")
        jacobian, hessian, sigma, damping, fixed = self.tensors("jacobian", "hessian", "sigma", "damping", "fixed")
        dy, dual = self.kkt.solve(factor, b, c)
        rest = self.kkt.residual(jacobian, hessian, sigma, damping, fixed, (b, c), (dy, dual))
        return [a + more for a, more in zip((dy, dual), self.kkt.solve(factor, *rest), strict=True)]

    def matrix(self, problem):
        """The dense matrix on free variables, and which these are."""
        nlp, free = self.nlp, ~self.fixed[:, problem]
        lower = dense((nlp.n, nlp.n), nlp.hessian_structure, self.hessian[:, problem])
        w = lower + lower.T - np.diag(np.diag(lower)) + np.diag(self.sigma[:, problem])
        j = dense((nlp.m, nlp.n), nlp.jacobian_structure, self.jacobian[:, problem])[:, free]
        return np.block([[w[free][:, free], j.T], [j, -np.diag(self.damping[:, problem])]]), free


PROGRAMS = {
    "everything": lambda: two_phases().nlp(MESHES),
    "brachistochrone": lambda: CASES["brachistochrone"]().problem.nlp((4, 3)),
    "hyper_sensitive": lambda: CASES["hyper_sensitive"]().problem.nlp((5, 2)),
    "no controls": lambda: without_controls().nlp((3, 3)),
}


def without_controls():
    """A parameter and a free start alone: fit an exponential to its ends."""
    ocp = jp.control.Problem()
    ocp.parameter("rate", 1, -3.0, 3.0, guess=0.5)
    ph = ocp.phase("a", states={"x": 1}, t0=0.0, tf=1.0)
    ph.dynamics = lambda x, u, t, p: {"x": p.rate * x.x}
    ocp.minimize(final=lambda e: ((e.a.x0.x - 1) ** 2 + (e.a.xf.x - 2) ** 2).sum())
    return ocp


class TestLinearAlgebra:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_equals_a_dense_solve(self, name, device):
        system = System(PROGRAMS[name](), device=device)
        factor = system.factor()
        dy, dual = (a.cpu().numpy() for a in system.solution(factor))
        for p in range(system.problems):
            matrix, free = system.matrix(p)
            expected = np.linalg.solve(matrix, np.concatenate([system.b[free, p], system.c[:, p]]))
            found = np.concatenate([dy[free, p], dual[:, p]])
            np.testing.assert_allclose(found, expected, atol=1e-9 * abs(expected).max())
            assert not dy[~free, p].any()
            assert bool(factor.correct[p]) == ((np.linalg.eigvalsh(matrix) < 0).sum() == system.nlp.m)

    def test_residual_is_that_of_the_matrix(self):
        system = System(two_phases().nlp(MESHES))
        names = ("jacobian", "hessian", "sigma", "damping", "fixed")
        right, found = system.tensors("b", "c"), [torch.randn_like(a) for a in system.tensors("b", "c")]
        found[0][torch.from_numpy(system.fixed)] = 0
        jacobian, hessian, sigma, damping, fixed = system.tensors(*names)
        left = system.kkt.residual(jacobian, hessian, sigma, damping, fixed, (right[0], right[1]), (found[0], found[1]))
        r, q = (a.numpy() for a in left)
        for p in range(system.problems):
            matrix, free = system.matrix(p)
            x = np.concatenate([found[0][free, p], found[1][:, p]])
            expected = np.concatenate([system.b[free, p], system.c[:, p]]) - matrix @ x
            np.testing.assert_allclose(np.concatenate([r[free, p], q[:, p]]), expected, atol=1e-11)

    @pytest.mark.parametrize("curvature", [-30.0, -1.0, 0.0, 3.0, 30.0])
    def test_a_wrong_inertia_is_never_called_correct(self, curvature):
        system = System(two_phases().nlp(MESHES), problems=6, curvature=curvature)
        correct = system.factor().correct
        right = [(np.linalg.eigvalsh(system.matrix(p)[0]) < 0).sum() == system.nlp.m for p in range(6)]
        assert not any(bool(c) and not r for c, r in zip(correct, right, strict=True))
        assert bool(correct.all()) if curvature == 30.0 else True
        assert not bool(correct.any()) if curvature == -30.0 else True

    def test_single_problems_are_factored_anew(self):
        system = System(two_phases().nlp(MESHES))
        factor = system.factor()
        system.sigma[:, 1] += 7.0
        chosen = torch.tensor([1])
        sigma, damping, fixed = (a[:, chosen] for a in system.tensors("sigma", "damping", "fixed"))
        factor.update(chosen, system.kkt.factor(factor.condensed.select(chosen), sigma, damping, fixed))
        for a, b in zip(system.solution(factor), system.solution(system.factor()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_dependent_end_constraints_have_least_multipliers(self):
        ocp = double_integrator()
        ocp.boundary["again"] = (lambda e: e.move.xf.x - e.move.x0.x, 1.0, 1.0)  # says what the ends say
        sol = ocp.solve(mesh=(3, 4), solver="banded")
        assert sol.status is Status.SOLVED and sol.objective == pytest.approx(12.0, abs=1e-7)

    def test_what_is_fixed_inside_is_refused(self):
        nlp = double_integrator().nlp((3, 2))
        fixed = torch.zeros(nlp.n, dtype=torch.bool)
        fixed[1] = True
        with pytest.raises(jp.errors.ArgumentError, match="state x at node 1 of phase 'move' is fixed"):
            KKT(nlp, fixed)


class TestBatchedPrograms:
    @pytest.mark.parametrize("name", ["everything", "learned"])
    def test_equal_single_ones(self, name):
        nlp = two_phases().nlp(MESHES) if name == "everything" else CASES["learned"]().problem.nlp((4, 3))
        rng = np.random.default_rng(0)
        y, multipliers = 0.7 + 0.3 * rng.normal(size=(nlp.n, 3)), rng.normal(size=(nlp.m, 3))
        batch = nlp.batch(3)
        for function in ("objective", "gradient", "constraints", "jacobian"):
            single = np.stack([getattr(nlp, function)(y[:, p]) for p in range(3)], -1)
            np.testing.assert_allclose(getattr(batch, function)(y), single, rtol=1e-12, atol=1e-12)
        single = np.stack([nlp.hessian(y[:, p], multipliers[:, p], 0.5) for p in range(3)], -1)
        np.testing.assert_allclose(batch.hessian(y, multipliers, 0.5), single, rtol=1e-12, atol=1e-12)


class TestSolver:
    @needs_ipopt
    @pytest.mark.parametrize(
        ("name", "mesh"),
        [
            ("brachistochrone", (10, 4)),
            ("bryson_denham", (30, 4)),
            ("goddard", (60, 3)),
            ("goddard_smooth", (60, 3)),
            ("hyper_sensitive", None),
            ("moon_lander", (50, 3)),
            ("cart_pole", (25, 3)),
            ("shuttle", (40, 4)),
            ("quadrotor", (20, 4)),
            ("powered_descent", (40, 2)),
            ("learned", None),
        ],
    )
    def test_finds_the_optimum_of_ipopt(self, name, mesh):
        case = CASES[name]()
        options = {**case.options, **({"mesh": mesh} if mesh else {})}
        ours, theirs = (case.problem.solve(**options, solver=s) for s in ("banded", "ipopt"))
        assert ours.status is theirs.status is Status.SOLVED
        # The powered descent's optimum is flat: IPOPT ends up to 7e-8 above it, and rounding decides where.
        tol = 2e-7 if name == "powered_descent" else 1e-8
        assert ours.objective == pytest.approx(theirs.objective, rel=tol, abs=tol)

    @needs_ipopt
    @pytest.mark.long
    def test_its_low_thrust_transfer_is_optimal_for_ipopt_too(self):
        # There are many local optima near each other, and rounding decides which one a solver comes to.
        case = CASES["low_thrust"]()
        ours = case.problem.solve(**case.options, solver="banded")
        theirs = case.problem.solve(**case.options, guess=ours)
        assert ours.status is theirs.status is Status.SOLVED
        assert ours.objective == pytest.approx(theirs.objective, rel=5e-8)

    def test_its_result_satisfies_the_conditions_of_optimality(self):
        case = CASES["cart_pole"]()
        mesh = (25, 3)
        sol = case.problem.solve(mesh=mesh, solver="banded")
        nlp, out = case.problem.nlp(mesh), sol.outcome
        free = nlp.lower < nlp.upper
        assert out.multipliers is not None and out.lower_multipliers is not None and out.upper_multipliers is not None
        slope = nlp.gradient(out.y) + nlp.jacobian_matrix(out.y).T @ out.multipliers
        slope += out.upper_multipliers - out.lower_multipliers
        assert abs(slope[free]).max() < 1e-5 * abs(out.multipliers).max()
        assert abs(nlp.constraints(out.y)).max() < 1e-7
        assert (out.lower_multipliers >= 0).all() and (out.upper_multipliers >= 0).all()
        for distance, z in ((out.y - nlp.lower, out.lower_multipliers), (nlp.upper - out.y, out.upper_multipliers)):
            bounded = free & np.isfinite(distance)
            assert (distance[bounded] > -1e-6).all() and abs(distance[bounded] * z[bounded]).max() < 1e-4

    def test_costates_are_those_of_the_maximum_principle(self):
        sol = double_integrator().solve(mesh=(3, 4), solver="banded")
        np.testing.assert_allclose(sol.costates.x, -24.0, atol=1e-6)
        np.testing.assert_allclose(sol.costates.v[:, 0], -2 * (6 - 12 * sol.t), atol=1e-6)

    def test_integral_and_parameter(self):
        ocp = jp.control.Problem()
        ocp.parameter("k", 1, 0.0, 3.0, guess=1.0)
        ph = ocp.phase("a", states={"x": 1}, controls={"u": 1}, t0=0.0, tf=1.0)
        ph.dynamics = lambda x, u, t, p: {"x": p.k * u.u}
        ph.integral["effort"] = (lambda x, u, t, p: u.u.square(), None, 1.0)
        ph.start(x=0.0)
        ocp.minimize(final=lambda e: -e.a.xf.x + e.p.k.square() / 2)
        sol = ocp.solve(mesh=(2, 3), solver="banded")
        assert sol.status is Status.SOLVED and sol.objective == pytest.approx(-0.5, abs=1e-6)
        assert sol.integral.effort == pytest.approx(1.0, abs=1e-6)

    def test_linked_phases_with_meshes_of_several_degrees(self):
        ocp = jp.control.Problem()
        for name, t0, tf in (("one", 0.0, (0.1, 0.9)), ("two", (0.1, 0.9), 1.0)):
            ph = ocp.phase(name, states={"x": 1, "v": 1}, controls={"a": 1}, t0=t0, tf=tf)
            ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
        ocp.phases["one"].start(x=0.0, v=0.0)
        ocp.phases["two"].end(x=1.0, v=0.0)
        ocp.link("one", "two")
        ocp.boundary["half"] = (lambda e: e.one.tf, 0.5, 0.5)
        cost = lambda x, u, t, p: u.a.square()  # noqa: E731
        ocp.minimize(running={"one": cost, "two": cost})
        sol = ocp.solve(mesh={"one": Mesh((0.3, 0.4, 0.3), (3, 4, 3)), "two": (2, 3)}, solver="banded")
        assert sol.status is Status.SOLVED and sol.objective == pytest.approx(12.0, abs=1e-6)

    def test_without_controls(self):
        sol = without_controls().solve(mesh=(3, 4), solver="banded")
        assert sol.status is Status.SOLVED
        assert sol.p.rate == pytest.approx(np.log(2.0), abs=1e-5) and sol.objective == pytest.approx(0.0, abs=1e-8)

    @pytest.mark.parametrize("bounds", [(None, None), (-7.0, 7.0)])
    def test_equality_constraints_on_the_path(self, bounds):
        ocp = double_integrator()
        ph = ocp.phases["move"]
        ph.controls.add("b", (1, *bounds))
        ph.path["sum"] = (lambda x, u, t, p: u.a + u.b, 0.0, 0.0)
        ocp.minimize(running=lambda x, u, t, p: (u.a.square() + u.b.square()) / 2)
        sol = ocp.solve(mesh=(3, 4), solver="banded")
        assert sol.status is Status.SOLVED and sol.objective == pytest.approx(12.0, abs=1e-6)
        np.testing.assert_allclose(sol.u.a, -sol.u.b, atol=1e-7)

    def test_fixed_control(self):
        ocp = double_integrator()
        ocp.phases["move"].controls.add("b", (1, 2.0, 2.0))
        ocp.phases["move"].dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a + u.b}
        ocp.minimize(running=lambda x, u, t, p: (u.a + u.b).square())
        sol = ocp.solve(mesh=(3, 4), solver="banded")
        assert sol.status is Status.SOLVED and sol.objective == pytest.approx(12.0, abs=1e-6)
        np.testing.assert_allclose(sol.u.b, 2.0, atol=1e-14)

    def test_large_fixed_control_keeps_its_value(self):
        ocp = double_integrator()
        ocp.phases["move"].controls.add("b", (1, 1e4, 1e4))
        ocp.phases["move"].dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a + u.b}
        ocp.minimize(running=lambda x, u, t, p: u.a.square())
        sol = ocp.solve(mesh=(3, 4), solver="banded")
        assert sol.status is Status.SOLVED and sol.objective == pytest.approx(1e8 + 12.0, abs=1e-3)

    def test_refinement(self):
        sol = CASES["cart_pole"]().problem.solve(accuracy=1e-5, solver="banded")
        assert sol.success and sol.error.max() <= 1e-5 and len(sol.history) > 1

    def test_warm_start_takes_few_iterations(self):
        case = CASES["brachistochrone"]()
        cold = case.problem.solve(mesh=(10, 4), solver="banded")
        warm = case.problem.solve(mesh=(10, 4), guess=cold, solver="banded")
        assert warm.success and warm.iterations < cold.iterations / 2

    def test_infeasible(self):
        ocp = double_integrator()
        ocp.phases["move"].path["slow"] = (lambda x, u, t, p: x.v, -0.5, 0.5)
        sol = ocp.solve(mesh=(4, 3), solver="banded", max_iterations=300)
        assert sol.status in (Status.INFEASIBLE, Status.RESTORATION_FAILED)

    def test_contradiction_of_ends(self):
        # The least-squares step is zero at once: no progress, and not a limit of iterations.
        ocp = double_integrator()
        ocp.boundary["again"] = (lambda e: e.move.xf.x, 2.0, 2.0)  # is 1 already
        sol = ocp.solve(mesh=(4, 3), solver="banded", max_iterations=50)
        assert sol.status is Status.INFEASIBLE and sol.iterations < 10

    def test_complementarity_holds_in_the_units_of_the_cost(self):
        ocp = double_integrator()
        ocp.phases["move"].path["speed"] = (lambda x, u, t, p: x.v, None, 1.3)
        ocp.minimize(running=lambda x, u, t, p: 1e6 * u.a.square() + 1e8 * x.x)  # slopes of 1e8 at the guess
        sol = ocp.solve(mesh=(5, 3), solver="banded")
        nlp, out = ocp.nlp((5, 3)), sol.outcome
        rows = nlp.places["move"].path
        assert sol.status is Status.SOLVED and out.multipliers is not None
        distance = nlp.constraint_upper[rows] - nlp.constraints(out.y)[rows]
        # The relaxation of bounds comes on top, 1e-8 of them.
        assert (np.abs(distance + 1.3e-8) * out.multipliers[rows]).max() <= 1.1e-4

    def test_bounds_hold_in_the_units_of_the_problem(self):
        ocp = double_integrator()
        ocp.phases["move"].path["speed"] = (lambda x, u, t, p: 1e8 * x.v, None, 1.2e8)
        sol = ocp.solve(mesh=(5, 3), solver="banded")
        assert sol.status is Status.SOLVED and 1e8 * sol.x.v[:-1].max() <= 1.2e8 + 1e-4

    def test_unbounded(self):
        ocp = double_integrator()
        ocp.minimize(running=lambda x, u, t, p: -u.a.square())
        sol = ocp.solve(mesh=(4, 3), solver="banded", max_iterations=300)
        assert not sol.success

    def test_limits_and_options(self):
        case = CASES["cart_pole"]()
        sol = case.problem.solve(mesh=(10, 3), max_iterations=2, solver="banded")
        assert sol.status is Status.ITERATION_LIMIT and sol.iterations == 2 and not sol.success
        sol = case.problem.solve(mesh=(40, 4), time_limit=1e-3, solver="banded")
        assert sol.status is Status.TIME_LIMIT
        with pytest.raises(jp.errors.ArgumentError, match="options are IPOPT's"):
            case.problem.solve(solver="banded", options={"mu_init": 1.0})

    def test_ctrl_c_returns_the_best_iterate(self, monkeypatch):
        from jetplane.control import solving

        def interrupting(self, nlp):
            return lambda it: os.kill(os.getpid(), signal.SIGINT) if it.number == 5 else None

        monkeypatch.setattr(solving._Line, "of", interrupting)
        sol = CASES["cart_pole"]().problem.solve(mesh=(10, 3), solver="banded")
        assert sol.status is Status.STOPPED and np.isfinite(sol.x.all).all()


def cart():
    """As fast as possible over a distance that is a parameter: 2 sqrt(distance), where the time allows it."""
    ocp = jp.control.Problem()
    ocp.parameter("distance", 1, 0.1, 100.0)
    ocp.parameter("limits", 2, 0.1, 10.0)
    ph = ocp.phase("cart", states={"x": 1, "v": 1}, controls={"a": (1, -10.0, 10.0)}, t0=0.0, tf=(0.1, 10.0))
    ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a}
    ph.path["push"] = (lambda x, u, t, p: u.a - p.limits[0], None, 0.0)
    ph.path["brake"] = (lambda x, u, t, p: -u.a - p.limits[1], None, 0.0)
    ph.start(x=0.0, v=0.0)
    ph.end(v=0.0)
    ocp.boundary["there"] = (lambda e: e.cart.xf.x - e.p.distance, 0.0, 0.0)
    ocp.minimize(final=lambda e: e.cart.tf)
    return ocp


class TestBatches:
    def test_every_problem_has_its_own_optimum_and_status(self):
        distances = np.array([0.25, 1.0, 4.0, 9.0, 50.0])
        batch = jp.control.solve_batch(cart(), {"distance": distances, "limits": np.ones((5, 2))}, mesh=(10, 2))
        assert batch.success.tolist() == [True] * 4 + [False] and len(batch) == 5  # 50 m take more than 10 s
        np.testing.assert_allclose(batch.objective[:4], 2 * np.sqrt(distances[:4]), rtol=1e-6)
        sol = batch[2]
        assert sol.p.distance == 4.0 and sol.x.x[-1, 0] == pytest.approx(4.0, abs=1e-6)
        assert sol.objective == batch.objective[2] and sol.error.shape == (10,)
        assert sol.iterations == batch.iterations[2]

    def test_equal_single_solves(self):
        case, values = flight.low_thrust(None), [0.3, 0.36]
        options = {"mesh": (8, 3), "max_iterations": 25}
        batch = jp.control.solve_batch(case.problem, {"thrust": values}, **options)
        for number, value in enumerate(values):
            alone = jp.control.solve_batch(case.problem, {"thrust": [value]}, **options)
            assert alone.objective[0] == pytest.approx(batch.objective[number], rel=1e-6)

    @pytest.mark.parametrize(
        ("parameters", "error", "message"),
        [
            ({}, jp.errors.ArgumentError, "at least one parameter"),
            ({"mass": [1.0]}, jp.errors.ArgumentError, "no 'mass'; they are distance, limits"),
            ({"distance": [1.0, 200.0]}, jp.errors.ArgumentError, "distance = 200 of problem 1 is outside"),
            ({"distance": [[1.0, 2.0]]}, jp.errors.ShapeError, r"\(problems, 1\), got \(1, 2\)"),
            ({"distance": [1.0], "limits": np.ones((2, 2))}, jp.errors.ShapeError, "has 2 values, other"),
            ({"distance": [float("nan")]}, jp.errors.ArgumentError, "outside its bounds"),
        ],
    )
    def test_bad_input(self, parameters, error, message):
        with pytest.raises(error, match=message):
            jp.control.solve_batch(cart(), parameters, mesh=(3, 2))

    def test_values_that_are_no_numbers(self):
        for values in (["a"], [[1.0, 2.0], [3.0]], [1 + 1j]):
            with pytest.raises(jp.errors.ArgumentError, match="values of 'distance'.*expected real numbers"):
                jp.control.solve_batch(cart(), {"distance": values}, mesh=(3, 2))
        with pytest.raises(jp.errors.ArgumentError, match="must be a dict"):
            jp.control.solve_batch(cart(), [1.0], mesh=(3, 2))  # type: ignore[arg-type]
        with pytest.raises(jp.errors.ArgumentError, match="whole number"):
            jp.control.solve_batch(cart(), {"distance": [1.0]}, mesh=(3, 2), chunk=1.5)  # type: ignore[arg-type]

    def test_members_that_fail_together_leave_the_others(self):
        ocp = double_integrator()
        ocp.parameter("most", 1, 0.0, 3.0)
        ocp.phases["move"].path["speed"] = (lambda x, u, t, p: x.v - p.most, None, 0.0)
        most = [0.5, 1.2, 1.4, 2.0, 0.9, 1.0]
        batch = jp.control.solve_batch(ocp, {"most": most}, mesh=(6, 3), max_iterations=300)
        assert batch.success.tolist() == [False, True, True, True, False, False]
        for number in (1, 2, 3):
            alone = jp.control.solve_batch(ocp, {"most": [most[number]]}, mesh=(6, 3))
            assert batch.objective[number] == pytest.approx(alone.objective[0], rel=1e-9)

    @pytest.mark.parametrize("strength", [[-1.0, 1.0, 4.0], [1.0, -1.0, 4.0]])
    def test_a_member_that_is_not_a_number_spoils_no_other(self, strength):
        ocp = double_integrator()
        ocp.parameter("strength", 1, guess=-1.0)  # itself outside the domain, but not used
        ph = ocp.phases["move"]
        ph.dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a * p.strength.sqrt()}
        ph.path["power"] = (lambda x, u, t, p: u.a * p.strength.log(), -1e3, 1e3)
        batch = jp.control.solve_batch(ocp, {"strength": strength}, mesh=(3, 4))
        for value, status, objective in zip(strength, batch.status, batch.objective, strict=True):
            assert status is (Status.SOLVED if value > 0 else Status.NOT_A_NUMBER)
            assert value < 0 or objective == pytest.approx(12.0 / value, rel=1e-6)
        with pytest.raises(jp.errors.NonFiniteError, match="rate of v"):
            jp.control.solve_batch(ocp, {"strength": [-1.0, -2.0]}, mesh=(3, 4))

    def test_those_that_fail_start_again_from_the_nearest_solution(self, monkeypatch):
        solve, starts = interior_point.solve_batch, []

        def failing_once(nlp, y, *rest, **options):
            starts.append(y)
            found = solve(nlp, y, *rest, **options)
            return [replace(o, status=Status.STALLED) if k == 1 == len(starts) else o for k, o in enumerate(found)]

        monkeypatch.setattr(interior_point, "solve_batch", failing_once)
        parameters = {"distance": np.array([1.0, 3.0, 4.0, 50.0]), "limits": np.ones((4, 2))}
        batch = jp.control.solve_batch(cart(), parameters, mesh=(6, 2))
        assert batch.starts.tolist() == [1, 2, 1, 2]  # 50 m take more than 10 s
        assert [s.name for s in batch.status] == ["SOLVED", "SOLVED", "SOLVED", "INFEASIBLE"]
        assert batch[1].objective == pytest.approx(2 * 3**0.5, rel=1e-6)
        assert batch.iterations[1] > batch.iterations[2]
        first, second = starts
        others = np.ones(len(first), bool)
        others[batch.nlp.parameters] = False
        assert second.shape[1] == 2 and (second[others] == batch.outcomes[2].y[others, None]).all()
        assert (second[batch.nlp.parameters] == first[batch.nlp.parameters][:, [1, 3]]).all()
        alone = jp.control.solve_batch(cart(), {name: values[3:] for name, values in parameters.items()}, mesh=(6, 2))
        assert alone.status == [Status.INFEASIBLE] and alone.starts.tolist() == [1]

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", 1.5])
    def test_a_device_that_is_not_there(self, device):
        with pytest.raises(jp.errors.ArgumentError, match=f"device {device!r} cannot be used"):
            jp.control.solve_batch(cart(), {"distance": [1.0]}, mesh=(3, 2), device=device)
        with pytest.raises(jp.errors.ArgumentError, match="one mesh for all problems"):
            jp.control.solve_batch(cart(), {"distance": [1.0]}, mesh="refine")

    def test_a_coarse_mesh_is_warned_of(self):
        ocp = double_integrator()
        ocp.parameter("wave", 1, 0.0, 60.0)
        ocp.phases["move"].dynamics = lambda x, u, t, p: {"x": x.v, "v": u.a - p.wave * (20 * x.x).sin()}
        with pytest.warns(jp.errors.CoarseMeshWarning, match="1 of 2 solutions .* those of problem 1"):
            jp.control.solve_batch(ocp, {"wave": [0.0, 50.0]}, mesh=(2, 2))

    def test_ctrl_c_ends_all_chunks(self, monkeypatch):
        from jetplane.control import solving

        def interrupting(self, nlp):
            return lambda it: os.kill(os.getpid(), signal.SIGINT) if it.number == 2 else None

        monkeypatch.setattr(solving._Line, "of", interrupting)
        batch = jp.control.solve_batch(cart(), {"distance": [1.0, 2.0, 3.0]}, mesh=(6, 2), chunk=1)
        assert batch.status == [Status.STOPPED] * 3 and batch.iterations.tolist() == [2, 0, 0]
