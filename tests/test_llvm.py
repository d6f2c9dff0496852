"""Graphs of scalars: folding, derivatives against torch's, both back ends, the cache."""

import math

import pytest
import torch

import jetplane as jp
from jetplane.llvm import EVALUATE, Derivatives, Graph, Kernel, TorchKernel, available

needs_llvm = pytest.mark.skipif(not available(), reason="llvmlite is not installed")
BACK_ENDS = [TorchKernel, pytest.param(Kernel, marks=needs_llvm)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JETPLANE_CACHE", str(tmp_path))
    return tmp_path


# An expression of two variables for each operator, within its domain for 0 < x, y < 1.
UNARY = sorted(set(EVALUATE) - {"add", "sub", "mul", "div", "lt", "le", "eq", "select", "pow", "atan2"})
EXPRESSIONS = {
    **{
        name: lambda f, x, y, name=name: f(name, f("mul", x, f("add", x, y)))
        for name in UNARY
        if name not in ("asin", "acos")
    },
    **{name: lambda f, x, y, name=name: f(name, f("mul", x, y)) for name in ("asin", "acos")},
    "add": lambda f, x, y: f("mul", f("add", x, y), y),
    "sub": lambda f, x, y: f("mul", f("sub", x, y), y),
    "mul": lambda f, x, y: f("mul", f("mul", x, x), y),
    "div": lambda f, x, y: f("div", f("sin", x), f("add", y, x)),
    "atan2": lambda f, x, y: f("atan2", f("mul", x, y), f("sub", y, x)),
    "pow": lambda f, x, y: f("pow", x, y),
    "select": lambda f, x, y: f("select", f("lt", x, y), f("mul", x, y), f("sin", x)),
    "le": lambda f, x, y: f("mul", f("le", x, y), f("mul", x, y)),
    "lt": lambda f, x, y: f("mul", f("lt", x, y), f("mul", x, y)),
    "eq": lambda f, x, y: f("mul", f("eq", x, y), f("mul", x, y)),
}
TORCH = {
    "select": lambda c, a, b: torch.where(c != 0, a, b),
    "lt": lambda a, b: (a < b).double(),
    "le": lambda a, b: (a <= b).double(),
    "eq": lambda a, b: (a == b).double(),
}


def test_every_operator_has_an_expression():
    assert set(EXPRESSIONS) == set(EVALUATE)


def derived(graph, outputs, variables, kernel):
    """Values (m, lanes), Jacobian (m, n, lanes) and Hessian of the weighted sum (n, n, lanes), dense."""
    weights = [graph.input() for _ in outputs]
    d = Derivatives(graph, outputs, variables)
    jacobian, (hessian, _) = d.jacobian(), d.hessian(weights)
    made = kernel(graph, {"f": outputs, "j": list(jacobian.values()), "h": list(hessian.values())})

    def run(inputs):
        m, n, lanes = len(outputs), len(variables), inputs.shape[1]
        dense_j, dense_h = torch.zeros(m, n, lanes).double(), torch.zeros(n, n, lanes).double()
        for (r, i), row in zip(jacobian, made("j", inputs), strict=True):
            dense_j[r, i] = row
        for (i, j), row in zip(hessian, made("h", inputs), strict=True):
            dense_h[i, j] = dense_h[j, i] = row
        return made("f", inputs), dense_j, dense_h

    return run


@pytest.mark.parametrize("kernel", BACK_ENDS)
@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_derivatives_equal_torch(name, kernel):
    graph = Graph()
    x, y = graph.input(), graph.input()
    run = derived(graph, [EXPRESSIONS[name](graph.apply, x, y)], [x, y], kernel)
    z = torch.rand(2, 11, dtype=torch.float64) * 0.8 + 0.1
    if name == "eq":
        z[1, :5] = z[0, :5]
    weight = torch.randn(1, 11, dtype=torch.float64)
    value, jacobian, hessian = run(torch.cat([z, weight]))

    def f(z):
        return EXPRESSIONS[name](lambda op, *a: (TORCH.get(op) or getattr(torch, op))(*a), z[0], z[1])

    torch.testing.assert_close(value[0], f(z), rtol=1e-13, atol=1e-14)
    for lane in range(11):
        first = torch.autograd.functional.jacobian(f, z[:, lane])
        second = torch.autograd.functional.hessian(f, z[:, lane])
        torch.testing.assert_close(jacobian[0, :, lane], first, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(hessian[..., lane], weight[0, lane] * second, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("exponent", [-3, -2, -0.5, 0, 0.5, 1, 2, 2.5, 3, 7, 0.3, -1.7])
def test_constant_exponents(exponent):
    graph = Graph()
    x = graph.input()
    run = derived(graph, [graph.apply("pow", x, graph.constant(exponent))], [x], TorchKernel)
    z = torch.tensor([[0.3, 0.7, 1.9]], dtype=torch.float64)
    value, first, second = run(torch.cat([z, torch.ones_like(z)]))
    torch.testing.assert_close(value, z**exponent)
    torch.testing.assert_close(first[0], exponent * z ** (exponent - 1))
    torch.testing.assert_close(second[0], exponent * (exponent - 1) * z ** (exponent - 2))


class TestGraph:
    def test_equal_expressions_are_one_node(self):
        graph = Graph()
        x, y = graph.input(), graph.input()
        assert graph.apply("add", x, y) == graph.apply("add", y, x)
        assert graph.apply("sub", x, y) != graph.apply("sub", y, x)

    def test_constants_fold(self):
        graph = Graph()
        x = graph.input()
        zero, one = graph.constant(0.0), graph.constant(1.0)
        assert graph.apply("add", x, zero) == graph.apply("mul", one, x) == graph.apply("div", x, one) == x
        assert graph.value(graph.apply("mul", x, zero)) == 0.0
        assert graph.value(graph.apply("sub", x, x)) == 0.0
        assert graph.apply("neg", graph.apply("neg", x)) == x
        assert graph.value(graph.apply("sin", graph.constant(0.5))) == math.sin(0.5)

    def test_what_cannot_be_folded_is_left_to_the_lanes(self):
        graph = Graph()
        node = graph.apply("log", graph.constant(-1.0))
        assert graph.value(node) is None
        assert TorchKernel(graph, {"f": [node]})("f", torch.zeros(0, 2, dtype=torch.float64)).isnan().all()

    def test_structure_is_exact(self):
        graph = Graph()
        x, y, w = (graph.input() for _ in range(3))
        f = graph.apply
        # (x + y)(x - y) has no mixed derivative, x + y - x no first one in x.
        d = Derivatives(graph, [f("mul", f("add", x, y), f("sub", x, y)), f("sub", f("add", x, y), x)], [x, y])
        assert set(d.jacobian()) == {(0, 0), (0, 1), (1, 1)}
        assert set(d.hessian([w, w])[0]) == {(0, 0), (1, 1)}

    def test_branch_not_taken_keeps_its_nan_out_of_first_derivatives(self):
        graph = Graph()
        x = graph.input()
        root = graph.apply("select", graph.apply("lt", graph.constant(0.0), x), graph.apply("sqrt", x), x)
        d = Derivatives(graph, [root], [x])
        kernel = TorchKernel(graph, {"j": list(d.jacobian().values())})
        assert kernel("j", torch.tensor([[-1.0, 4.0]], dtype=torch.float64)).tolist() == [[1.0, 0.25]]


class TestExternal:
    def test_second_derivatives_through_an_external(self):
        graph = Graph()
        x, y, weight = (graph.input() for _ in range(3))
        apply = graph.apply
        # g(a, b) = (a² b, sin a) is computed outside; f = x g_0 + g_1 with a = x y, b = y².
        external = graph.external(None, [apply("mul", x, y), apply("mul", y, y)], 2)
        out = apply("add", apply("mul", x, external.values[0]), external.values[1])
        d = Derivatives(graph, [out], [x, y])
        jacobian, (hessian, adjoints) = d.jacobian(), d.hessian([weight])
        kernel = TorchKernel(graph, {"j": list(jacobian.values()), "h": list(hessian.values()), "adjoint": adjoints[0]})
        z = torch.tensor([0.7, 1.3], dtype=torch.float64)
        inputs = torch.zeros(graph.inputs, 1, dtype=torch.float64)
        a, b = z[0] * z[1], z[1] ** 2

        def put(node, value):
            inputs[graph.rows[node][1][0]] = value

        put(x, z[0]), put(y, z[1]), put(weight, 2.0)
        for node, value in zip(external.values, (a**2 * b, a.sin()), strict=True):
            put(node, value)
        for row, values in zip(external.jacobian, ((2 * a * b, a**2), (a.cos(), 0.0)), strict=True):
            for node, value in zip(row, values, strict=True):
                put(node, value)
        u, v = kernel("adjoint", inputs)[:, 0]
        for row, values in zip(external.hessian, ((u * 2 * b - v * a.sin(),), (u * 2 * a, 0.0)), strict=True):
            for node, value in zip(row, values, strict=True):
                put(node, value)

        def f(z):
            a, b = z[0] * z[1], z[1] ** 2
            return z[0] * a**2 * b + a.sin()

        first = torch.autograd.functional.jacobian(f, z)
        second = 2 * torch.autograd.functional.hessian(f, z)
        for (_, i), value in zip(jacobian, kernel("j", inputs), strict=True):
            torch.testing.assert_close(value[0], first[i])
        for (i, j), value in zip(hessian, kernel("h", inputs), strict=True):
            torch.testing.assert_close(value[0], second[i, j])


@needs_llvm
class TestKernel:
    def graph(self):
        graph = Graph()
        x = graph.input()
        return graph, graph.apply("sin", graph.apply("mul", x, x))

    @pytest.mark.parametrize("lanes", [0, 1, 7, 8, 9, 16, 100])
    def test_any_number_of_lanes(self, lanes):
        graph, y = self.graph()
        x = torch.randn(1, lanes, dtype=torch.float64)
        torch.testing.assert_close(Kernel(graph, {"f": [y]})("f", x), (x * x).sin())

    def test_code_is_kept_and_a_damaged_file_compiled_anew(self, cache):
        graph, y = self.graph()
        Kernel(graph, {"f": [y]})
        [file] = cache.glob("*.o")
        code = file.read_bytes()
        file.write_bytes(code[:40] + b"\0" * 8 + code[48:])
        x = torch.randn(1, 8, dtype=torch.float64)
        torch.testing.assert_close(Kernel(graph, {"f": [y]})("f", x), (x * x).sin())
        assert file.read_bytes() == code

    def test_a_folder_that_cannot_be_written_costs_time_only(self, cache, monkeypatch):
        (cache / "file").write_text("")
        monkeypatch.setenv("JETPLANE_CACHE", str(cache / "file" / "folder"))
        graph, y = self.graph()
        Kernel(graph, {"f": [y]})

    def test_bad_inputs(self):
        graph, y = self.graph()
        kernel = Kernel(graph, {"f": [y]})
        with pytest.raises(jp.errors.ShapeError, match="float64 matrix of 1 or more rows"):
            kernel("f", torch.zeros(1, 8))
        with pytest.raises(jp.errors.ShapeError, match="out must be"):
            kernel("f", torch.zeros(1, 8).double(), torch.zeros(2, 8).double())
        with pytest.raises(jp.errors.ArgumentError, match="letters"):
            Kernel(graph, {"a b": [y]})


def test_without_llvmlite_the_error_says_how_to_get_it(monkeypatch):
    from jetplane.llvm import compiler

    compiler.binding.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "llvmlite.binding", None)
    with pytest.raises(jp.MissingPackageError, match=r"pip install 'jetplane\[control\]'"):
        Kernel(Graph(), {"f": []})
    compiler.binding.cache_clear()
