"""Kinds of tensors and code that a closure may hold: carried with right derivatives, or told."""

import copy
import io
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from cases import Doubled
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.masked import masked_tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import jetplane as jp
from benchmarks import kinds
from benchmarks.kinds import Clipped, Intermediate
from jetplane._torch import FunctionBase
from jetplane.evaluation.context import expansion
from jetplane.jets import AllPairs, Coefficients, Diagonal, Jet, Planes, Star, Sums, parts
from jetplane.rules.functions import intercept_functions
from jetplane.testing import check_plane

pytestmark = pytest.mark.filterwarnings("ignore::jetplane.FallbackWarning")


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moving(params: list[Tensor], k: int = 2) -> list[Tensor]:
    return [torch.randn(k, *p.shape, dtype=p.dtype) for p in params]


def slope(closure, params: list[Tensor], tangents: list[Tensor], **options) -> Tensor:
    return jp.evaluate(closure, params, tangents, "none", **options).slope


def reverse_slope(closure, params: list[Tensor], tangents: list[Tensor]) -> Tensor:
    params = [p.requires_grad_() for p in params]
    gradient = torch.autograd.grad(closure(), params)
    return torch.stack([(g * t).flatten(1).sum(1) for g, t in zip(gradient, tangents, strict=True)]).sum(0)


def same(closure, reference, params: list[Tensor], **options) -> None:
    """Both have the same plane."""
    v = moving(params, 3)
    found, wanted = (jp.evaluate(f, params, v, **options) for f in (closure, reference))
    torch.testing.assert_close(found.value, wanted.value)
    torch.testing.assert_close(found.slope, wanted.slope)
    torch.testing.assert_close(found.curvature, wanted.curvature)


class TestThreads:
    """What is intercepted belongs to the thread that evaluates; torch is as it was once nobody does."""

    def test_evaluations_that_end_in_the_order_they_began(self):
        first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
        w, u, found = torch.ones(3), torch.ones(3), {}

        def first() -> None:
            jp.evaluate(lambda: (first_in.set(), second_in.wait(5), (w * w).sum())[2], [w], [torch.ones(1, 3)])
            first_out.set()

        def second() -> None:
            first_in.wait(5)
            closure = lambda: (second_in.set(), first_out.wait(5), Doubled.apply(u).sum())[2]  # noqa: E731
            found["slope"] = jp.evaluate(closure, [u], [torch.ones(1, 3)]).slope

        threads = [threading.Thread(target=f) for f in (first, second)]
        [t.start() for t in threads]
        [t.join(20) for t in threads]
        assert found["slope"].tolist() == [9.0]
        assert "apply" not in vars(FunctionBase)

    def test_reverse_mode_in_one_thread_while_another_evaluates(self):
        inside, done, x = threading.Event(), threading.Event(), torch.ones(3, requires_grad=True)

        def other() -> None:
            inside.wait(5)
            Doubled.apply(x).sum().backward()
            done.set()

        thread = threading.Thread(target=other)
        thread.start()
        w = torch.ones(3)
        jp.evaluate(lambda: (inside.set(), done.wait(5), (w * w).sum())[2], [w], [torch.ones(1, 3)])
        thread.join(5)
        assert x.grad is not None and x.grad.tolist() == [3.0, 3.0, 3.0]

    def test_somebody_elses_replacement_is_left_alone(self):
        original, calls, w = vars(torch.autograd.Function)["apply"], [], torch.ones(3)

        def counted(function, *args):
            calls.append(function)
            return original.__func__(function, *args)

        theirs = classmethod(counted)

        def closure() -> torch.Tensor:
            torch.autograd.Function.apply = theirs  # type: ignore[method-assign]
            return Doubled.apply(w).sum()

        try:
            assert slope(closure, [w], [torch.ones(1, 3)]).tolist() == [9.0]
            assert vars(torch.autograd.Function)["apply"] is theirs and Doubled in calls
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]

    def test_what_was_taken_before_the_evaluation(self):
        w = torch.ones(3)
        assert slope(lambda: APPLIED(w).sum(), [w], [torch.ones(1, 3)]).tolist() == [9.0]


APPLIED = Doubled.apply


class Gelu(torch.autograd.Function):
    """The approximation of GELU by tanh, with a backward pass of its own, as in Bloom."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        inner = torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))
        bent = (1 - inner * inner) * (0.7978845608028654 + 0.1070322243 * x * x)
        return g * (0.5 * x * bent + 0.5 * (1 + inner))


class Once(Gelu):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Gelu.backward(ctx, g)


class Numpy(torch.autograd.Function):
    """The logarithm of cosh, in NumPy both ways."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().numpy()
        return torch.from_numpy(np.log(np.cosh(ctx.x)))

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * np.tanh(ctx.x))


class Hidden(Gelu):
    """Whose backward pass is hidden from autograd."""

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return Gelu.backward(ctx, g)


class Scaled(torch.autograd.Function):
    """Several inputs and outputs, of which one is not differentiable, and an argument without gradient."""

    @staticmethod
    def forward(ctx, x, mode, w):
        ctx.save_for_backward(x, w)
        largest = x.amax(-1)
        ctx.mark_non_differentiable(largest)
        return x.exp() * w, largest, x.sin()

    @staticmethod
    def backward(ctx, g, _, h):
        x, w = ctx.saved_tensors
        return g * x.exp() * w + h * x.cos(), None, (g * x.exp()).sum(0)


class Added(torch.autograd.Function):
    """Writes into its input."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.mark_dirty(x)
        return x.add_(y * y), y * 3

    @staticmethod
    def setup(ctx, y):
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, g, h):
        return g, None


class Affine(torch.autograd.Function):
    """By jvp: outputs saved, results of its own saved, tangents that are absent, a context set apart."""

    @staticmethod
    def forward(x, power, w, label):
        e = torch.exp(x)
        return e * w, x**power, torch.argmax(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, power, w, _ = inputs
        ctx.power, ctx.tanh = power, torch.tanh(x)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_forward(x, w, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx, dx, _, dw, __):
        x, w, ew = ctx.saved_tensors
        first = None
        if dx is not None:
            first = ew * dx
        if dw is not None:
            first = ew / w * dw if first is None else first + ew / w * dw
        return first, None if dx is None else ctx.power * x ** (ctx.power - 1) * dx, None


class SavedInForward(torch.autograd.Function):
    """By jvp, with a result of forward's own."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_forward(x, s)
        return x * s

    @staticmethod
    def jvp(ctx, t):
        x, s = ctx.saved_tensors
        return t * (s + x * s * (1 - s))


class Rounded(torch.autograd.Function):
    """A straight-through estimator by jvp."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


class Dropped(torch.autograd.Function):
    """Random numbers in forward that jvp uses."""

    @staticmethod
    def forward(ctx, x):
        ctx.mask = (torch.rand(x.shape) < 0.5).to(x.dtype)
        ctx.save_for_forward(x)
        return ctx.mask * x**3

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return ctx.mask * 3 * x**2 * t


class NumpyJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return torch.from_numpy(np.log(np.cosh(x.numpy())))

    @staticmethod
    def jvp(ctx, t):
        return torch.from_numpy(np.tanh(ctx.x.numpy())) * t


class TestFunctions:
    def test_backward_defines_both_derivatives(self):
        w, x = double(5), double(4, 5)
        closure = lambda: (Gelu.apply(x * w + 0.2 * w**2).cos() * x).sum()  # noqa: E731
        check_plane(closure, [w.requires_grad_()], moving([w], 3))

    def test_several_outputs_and_arguments(self):
        w, v = double(4), double(3, 4)

        def closure():
            y, largest, z = Scaled.apply(v * w, "mode", w.tanh())
            return (y * largest[:, None]).sum() + (y * z).sum()

        params = [w.requires_grad_(), v.requires_grad_()]
        check_plane(closure, params, moving(params))

    def test_the_derivative_is_what_backward_says(self):
        w, v = double(3), moving([double(3)])
        plane = jp.evaluate(lambda: (Doubled.apply(w) ** 2).sum(), [w], v)
        torch.testing.assert_close(plane.slope, (2 * 2 * w * 3 * v[0]).sum(1))
        torch.testing.assert_close(plane.curvature, 2 * 9 * v[0] @ v[0].T)

    @pytest.mark.parametrize("function", [Gelu, SavedInForward])
    def test_memory_that_nothing_was_written_into_yet(self, function):
        w = double(3)
        same(lambda: (w + function.apply(torch.zeros_like(w))).square().sum(), lambda: w.square().sum(), [w])

    def test_the_warning_says_it_once(self):
        class Own(Gelu):
            pass

        w = double(3)
        with pytest.warns(jp.FallbackWarning, match="Own"):
            jp.evaluate(lambda: Own.apply(w).sum(), [w], moving([w]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jp.evaluate(lambda: Own.apply(w).sum(), [w], moving([w]))

    def test_strict_forbids_backward_and_allows_jvp(self):
        w = double(3)
        with jp.strict():
            with pytest.raises(jp.DerivativeError, match="strict"):
                jp.evaluate(lambda: Gelu.apply(w).sum(), [w], moving([w]))
            jp.evaluate(lambda: SavedInForward.apply(w).sum(), [w], moving([w]))

    @pytest.mark.parametrize("function", [Intermediate, Once, Numpy, Hidden])
    def test_no_second_derivative(self, function):
        w, v = double(3, 2), moving([double(3, 2)])
        closure = lambda: (function.apply(w) ** 2).sum()  # noqa: E731
        torch.testing.assert_close(slope(closure, [w], v), reverse_slope(closure, [w], v))
        with pytest.raises(jp.DerivativeError, match=f"{function.__qualname__}.*register_rule"):
            jp.evaluate(closure, [w], v)

    def test_gauss_newton_needs_the_first_alone(self):
        w, x, t = double(4), double(6, 4), double(6)
        v = moving([w])[0]
        found = jp.evaluate(lambda: F.mse_loss(Once.apply(x * w).sum(1), t), [w], [v], "ggn")
        wanted = jp.evaluate(lambda: F.mse_loss(F.gelu(x * w, approximate="tanh").sum(1), t), [w], [v], "ggn")
        torch.testing.assert_close(found.slope, wanted.slope)
        torch.testing.assert_close(found.curvature, wanted.curvature)

    def test_gauss_newton_in_chunks_and_by_example(self):
        w, x, t = double(4), double(6, 4), double(6)
        v = moving([w], 4)
        closure = lambda: F.mse_loss(Gelu.apply(x * w).sum(1), t)  # noqa: E731
        whole = jp.evaluate(closure, [w], v, "ggn", examples=True)
        parts = jp.evaluate(closure, [w], v, "ggn", chunk=2)
        torch.testing.assert_close(whole.curvature, parts.curvature)
        torch.testing.assert_close(whole.examples.sum(0), whole.slope)

    def test_a_backward_that_is_not_linear_is_refused(self):
        w = double(3)
        with pytest.raises(jp.DerivativeError, match="linear"):
            slope(lambda: Clipped.apply(w).sum(), [w], moving([w]))

    def test_many_outputs_without_double_backward_are_refused(self):
        w = double(5000)
        with pytest.raises(jp.DerivativeError, match="Once"):
            slope(lambda: Once.apply(w).sum(), [w], moving([w]))

    def test_jvp_with_a_context_set_apart(self):
        w, x = double(4).abs() + 1, double(4)
        reference = lambda: (torch.exp(w * x) * w.sin() * (w * x) ** 3).sum()  # noqa: E731

        def closure():
            y, cubed, place = Affine.apply(w * x, 3, w.sin(), label="a")
            assert not isinstance(place, jp.jets.jet.Jet)
            return (y * cubed).sum()

        same(closure, reference, [w])

    @pytest.mark.parametrize("pairs", ["all", "diagonal", 2])
    def test_jvp_with_results_of_its_own(self, pairs):
        w, v = double(3), moving([double(3)], 4)
        found = jp.evaluate(lambda: (SavedInForward.apply(w**2) ** 2).sum(), [w], v, pairs=pairs)
        wanted = jp.evaluate(lambda: (F.silu(w**2) ** 2).sum(), [w], v, pairs=pairs)
        torch.testing.assert_close(found.slope, wanted.slope)
        torch.testing.assert_close(found.curvature, wanted.curvature)

    def test_jvp_of_one_argument_alone(self):
        w, x = double(4).abs() + 1, double(4)
        same(lambda: Affine.apply(x, 3, w, None)[0].square().sum(), lambda: (x.exp() * w).square().sum(), [w])
        same(lambda: Affine.apply(w, 3, x, None)[1].square().sum(), lambda: (w**3).square().sum(), [w])

    def test_jvp_is_what_it_says(self):
        w, v = double(3), moving([double(3)])
        plane = jp.evaluate(lambda: (Rounded.apply(w) * w).sum(), [w], v)
        torch.testing.assert_close(plane.slope, ((w + w.round()) * v[0]).sum(1))
        torch.testing.assert_close(plane.curvature, 2 * v[0] @ v[0].T)

    def test_jvp_draws_once(self):
        w, v = double(30), moving([double(30)])
        torch.manual_seed(3)
        plane = jp.evaluate(lambda: Dropped.apply(w).sum() + 0 * torch.rand(1, dtype=w.dtype), [w], v)
        after = torch.rand(1)
        torch.manual_seed(3)
        mask = (torch.rand(30) < 0.5).double()
        torch.rand(1, dtype=w.dtype)
        torch.testing.assert_close(plane.curvature, (v[0] * mask * 6 * w) @ v[0].T)
        assert after == torch.rand(1)

    def test_jvp_in_numpy_has_a_first_derivative(self):
        w, v = double(3), moving([double(3)])
        torch.testing.assert_close(slope(lambda: NumpyJvp.apply(w).sum(), [w], v), (w.tanh() * v[0]).sum(1))
        with pytest.raises(jp.DerivativeError, match="NumpyJvp.*once more"):
            jp.evaluate(lambda: NumpyJvp.apply(w).sum(), [w], v)

    def test_a_wrong_jvp_is_refused(self):
        class Short(SavedInForward):
            @staticmethod
            def jvp(ctx, t):
                return t.sum()

        w = double(3)
        with pytest.raises(jp.DerivativeError, match="shapes"):
            slope(lambda: Short.apply(w).sum(), [w], moving([w]))

    def test_an_input_that_is_written_to(self):
        class ByJvp(Added):
            @staticmethod
            def forward(ctx, x, y):
                ctx.save_for_forward(y)
                return Added.forward(ctx, x, y)

            @staticmethod
            def jvp(ctx, dx, dy):
                (y,) = ctx.saved_tensors
                return dx.add_(2 * y * dy), 3 * dy

        class ByBackward(Added):
            @staticmethod
            def forward(ctx, x, y):
                ctx.save_for_backward(y)
                return Added.forward(ctx, x, y)

            @staticmethod
            def backward(ctx, g, h):
                (y,) = ctx.saved_tensors
                return g, 2 * y * g + 3 * h

        w, before = double(3), None
        before = w.clone()

        def with_function(function):
            def closure():
                x = w.sin()
                function.apply(x, w.cos())
                return (x**2).sum()

            return closure

        reference = lambda: ((w.sin() + w.cos() ** 2) ** 2).sum()  # noqa: E731
        for function in (ByJvp, ByBackward):
            same(with_function(function), reference, [w])
            with pytest.raises(jp.DerivativeError, match="written to in place"):
                jp.evaluate(lambda function=function: function.apply(w, w.cos())[0].sum(), [w], moving([w]))
            assert torch.equal(w, before)

    def test_a_reentrant_checkpoint_is_what_it_holds(self):
        w, x = double(4), double(3, 4)
        closure = lambda: checkpoint(torch.tanh, x * w, use_reentrant=True).square().sum()  # noqa: E731
        same(closure, lambda: (x * w).tanh().square().sum(), [w])

    def test_a_parameter_that_is_not_an_argument_is_refused(self):
        w = double(3)

        class Closed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * w

            @staticmethod
            def backward(ctx, g):
                return g * w

        with pytest.raises(jp.DerivativeError, match="Closed"):
            slope(lambda: Closed.apply(w.sin()).sum(), [w], moving([w]))

    def test_derivatives_of_derivatives_are_refused(self):
        w, x = double(3), double(3)
        with pytest.raises(jp.DerivativeError, match="Gelu"):
            slope(lambda: jp.laplacian(lambda z: Gelu.apply(z * w).sum(), x), [w], moving([w]))

    @pytest.mark.parametrize("function", [Gelu, SavedInForward])
    def test_half_precision(self, function):
        w, v = torch.randn(8).bfloat16(), torch.randn(2, 8).bfloat16()
        found = jp.evaluate(lambda: function.apply(w).float().sum(), [w], [v])
        wide = w.float()
        wanted = jp.evaluate(lambda: function.apply(wide).sum(), [wide], [v.float()])
        torch.testing.assert_close(found.slope, wanted.slope, rtol=0.03, atol=0.03)
        torch.testing.assert_close(found.curvature, wanted.curvature, rtol=0.05, atol=0.05)


S = (torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5).double() * torch.arange(1.0, 25).view(6, 4)

PRODUCTS = {
    "matmul": lambda s, x, y, u: s @ x,
    "vector": lambda s, x, y, u: s @ x[:, 0],
    "mm": lambda s, x, y, u: torch.mm(s, x),
    "mv": lambda s, x, y, u: torch.mv(s, x[:, 0]),
    "sparse.mm": lambda s, x, y, u: torch.sparse.mm(s, x),
    "addmm": lambda s, x, y, u: torch.addmm(u[:, None], s, x, beta=2, alpha=3),
    "addmm of a constant": lambda s, x, y, u: torch.addmm(u[:, None], s, torch.ones(4, 3, dtype=x.dtype)),
    "sparse.addmm": lambda s, x, y, u: torch.sparse.addmm(u[:, None].expand(6, 3), s, x, alpha=2),
    "addmv": lambda s, x, y, u: torch.addmv(u, s, x[:, 0], beta=0.5),
    "linear": lambda s, x, y, u: F.linear(x.mT.expand(2, 3, 4), s, u),
}
FROM_THE_RIGHT = {
    "matrix": lambda s, x, y, u: y @ s,
    "row": lambda s, x, y, u: y[0] @ s,
    "transposed": lambda s, x, y, u: s.t() @ y.mT,
}
LAYOUTS = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda s: s.to_sparse_bsr((2, 2)),
    "bsc": lambda s: s.to_sparse_bsc((2, 2)),
}
SPARSE = [(layout, name) for layout in LAYOUTS for name in PRODUCTS if layout != "bsc"]  # as far as torch itself goes
SPARSE += [(layout, name) for layout in LAYOUTS for name in FROM_THE_RIGHT if layout != "bsr"]


@pytest.mark.filterwarnings("ignore:Sparse")
class TestSparse:
    @pytest.mark.parametrize(("layout", "name"), SPARSE)
    def test_products_are_those_of_the_dense_matrix(self, layout, name):
        product, params = (PRODUCTS | FROM_THE_RIGHT)[name], [double(4, 3), double(5, 6), double(6)]
        sparse = LAYOUTS[layout](S)

        def closure(s: Tensor) -> Tensor:
            x, y, u = (p.sin() for p in params)
            return (product(s, x, y, u) ** 2).sum() + sum((p**2).sum() for p in params)

        self.same(closure, sparse, params)

    def test_sums_and_means(self):
        params = [double(4, 3), double(6, 4)]
        self.same(lambda s: ((params[1].exp() + s) ** 3).sum(), S.to_sparse(), params[1:])
        found = jp.evaluate(
            lambda: (torch.sparse.mm(S.to_sparse_csr(), params[0], "mean") ** 2).sum(), params[:1], moving(params[:1])
        )
        counts = (S != 0).sum(1, keepdim=True).clamp(min=1)
        assert torch.allclose(found.value, ((S / counts) @ params[0]).square().sum())

    def test_batches(self):
        x, both = double(2, 4, 3), torch.stack([S, 2 * S])
        self.same(lambda s: (torch.bmm(s, x.sin()) ** 2).sum(), both.to_sparse(), [x])

    def test_half_precision_coefficients(self):
        x, v = torch.randn(4, 3).bfloat16(), torch.randn(2, 4, 3).bfloat16()
        s = S.bfloat16()
        found = jp.evaluate(lambda: (s.to_sparse() @ x.sin()).float().square().mean(), [x], [v])
        wanted = jp.evaluate(lambda: (s @ x.sin()).float().square().mean(), [x], [v])
        torch.testing.assert_close(found.curvature, wanted.curvature, rtol=0.05, atol=0.5)

    def test_a_graph_network_in_chunks_beside_a_buffer(self):
        a, x, layers = (S @ S.T / 500).to_sparse(), torch.randn(6, 4), [nn.Linear(4, 5), nn.Linear(5, 3)]
        params, target = [p for m in layers for p in m.parameters()], torch.arange(6) % 3
        buffer = torch.zeros(6, 3)

        def closure(a: Tensor) -> Tensor:
            buffer[:, :] = a.t() @ layers[1](F.relu(a @ layers[0](x)))  # a jet in plain memory
            return F.cross_entropy(buffer, target)

        v = moving(params, 4)
        wanted = jp.evaluate(lambda: closure(a.to_dense().float()), params, v, "ggn")
        for chunk in (None, 2):
            found = jp.evaluate(lambda: closure(a.float()), params, v, "ggn", chunk=chunk)
            torch.testing.assert_close(found.slope, wanted.slope)
            torch.testing.assert_close(found.curvature, wanted.curvature)

    @pytest.mark.parametrize(
        "closure",
        [
            lambda w: torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), w, (2, 2)) @ torch.ones(2, 2).double(),
            lambda w: torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), w, (2, 2)) @ w.sin(),
            lambda w: w.diag().to_sparse() @ torch.ones(2, 2).double(),
            lambda w: (torch.eye(2).double().to_sparse() * w.expand(2, 2)).to_dense(),
        ],
    )
    def test_values_that_are_parameters_are_refused(self, closure):
        w = double(2)
        with pytest.raises(jp.DerivativeError, match="index_add"):
            slope(lambda: closure(w).sum(), [w], moving([w]))

    def test_a_sparse_parameter_is_refused(self):
        w = S.to_sparse()
        with pytest.raises(jp.ArgumentError, match="layout"):
            jp.evaluate(lambda: torch.sparse.sum(w), [w], [torch.ones(1, 6, 4).double()])

    @staticmethod
    def same(closure, sparse: Tensor, params: list[Tensor]) -> None:
        v = moving(params, 3)
        found, wanted = (jp.evaluate(lambda s=s: closure(s), params, v) for s in (sparse, sparse.to_dense()))
        torch.testing.assert_close(found.slope, wanted.slope)
        torch.testing.assert_close(found.curvature, wanted.curvature)


def stance() -> str:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


class TestCompiled:
    """Compiled code in a closure runs its eager code, and is compiled as before afterwards."""

    def setup_method(self):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.x, self.params = double(5, 4), list(self.model.parameters())

    def closure(self, model) -> Tensor:
        return model(self.x).square().sum()

    @pytest.mark.parametrize("options", [{}, {"fullgraph": True}])
    def test_modules_and_functions(self, options):
        compiled = torch.compile(self.model, backend="eager", **options)
        function = torch.compile(lambda x: self.model(x), backend="eager", **options)
        for each in (compiled, function):
            same(lambda each=each: self.closure(each), lambda: self.closure(self.model), self.params)
        before = self.model(self.x)
        self.model.compile(backend="eager")
        same(lambda: self.closure(self.model), lambda: self.closure(self.model.forward), self.params)
        assert torch.equal(self.model(self.x), before)

    def test_nothing_is_compiled_and_the_stance_is_set_back(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(self.model, backend=backend)
        compiled(self.x)
        assert len(graphs) == 1
        seen = []

        def closure():
            jp.jet(lambda z: seen.append(stance()) or z.sin(), self.x, torch.ones(1, 5, 4, dtype=self.x.dtype))
            seen.append(stance())
            return self.closure(compiled)

        with torch.compiler.set_stance("fail_on_recompile"):
            jp.evaluate(closure, self.params, moving(self.params))
            assert stance() == "fail_on_recompile"
        assert seen == ["force_eager"] * 2 and len(graphs) == 1
        with pytest.raises(ZeroDivisionError):
            jp.evaluate(lambda: self.closure(compiled) / (1 // 0), self.params, moving(self.params))
        assert stance() == "default"
        compiled(self.x)
        assert len(graphs) == 1

    def test_evaluations_that_end_in_the_order_they_began(self):
        torch.compile(self.model, backend="eager")
        first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
        w, seen = torch.ones(3), []

        def first() -> None:
            jp.evaluate(lambda: (first_in.set(), second_in.wait(5), (w * w).sum())[2], [w], [torch.ones(1, 3)])
            first_out.set()

        def second() -> None:
            first_in.wait(5)
            closure = lambda: (second_in.set(), first_out.wait(5), seen.append(stance()), (w * w).sum())[3]  # noqa: E731
            jp.evaluate(closure, [w], [torch.ones(1, 3)])

        threads = [threading.Thread(target=f) for f in (first, second)]
        [t.start() for t in threads]
        [t.join(20) for t in threads]
        assert seen == ["force_eager"] and stance() == "default"

    @pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
    def test_an_evaluation_that_a_compiled_function_calls(self):
        def function(x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return jp.laplacian(lambda z: (z**3).sum(), 2 * x)

        found = torch.compile(function, backend="eager")(self.x)
        torch.testing.assert_close(found, 12 * self.x.sum())

    def test_the_compiler_is_imported_by_the_closure(self):
        code = (
            "import sys, torch, jetplane as jp\n"
            "w, before = torch.ones(3), torch.compile\n"
            "assert 'torch._dynamo' not in sys.modules\n"
            "f = lambda: torch.cond(w.sum() > 0, lambda x: x**2, lambda x: x, (w,)).sum()\n"
            "print(jp.evaluate(f, [w], [torch.ones(1, 3)]).curvature.item(), torch.compile is before)\n"
            "from torch._dynamo import eval_frame\n"
            "print(eval_frame._stance.stance)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == ["6.0", "True", "default"], done.stderr


class Steep(torch.autograd.Function):
    """The cube, ten times as steep."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 30 * g * x**2

    jvp = backward


class TestHigherOrder:
    def test_conditions_and_loops(self):
        w, b = double(3), double(3)
        same(
            lambda: torch.cond(w.sum() > -100, lambda x: (x * b).sin(), lambda x: x.cos(), (w * w,)).sum(),
            lambda: (w * w * b).sin().sum(),
            [w, b],
        )
        from torch._higher_order_ops import while_loop

        same(
            lambda: while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, (x * b).sin()), (torch.tensor(0), w))[1].sum(),
            lambda: ((w * b).sin() * b).sin().sum(),
            [w, b],
        )

    @pytest.mark.parametrize("inside", [lambda w, x: w * Steep.apply(x), lambda w, x: Steep.apply(w) * x])
    def test_custom_functions_inside_vmap(self, inside):
        w, x = double(3), double(4)
        closure = lambda: torch.vmap(lambda z: inside(w, z).sum())(x).square().sum()  # noqa: E731
        v = moving([w])
        torch.testing.assert_close(slope(closure, [w], v), reverse_slope(closure, [w], v))

    def test_others_are_refused(self):
        from torch._higher_order_ops.map import map as mapped

        w, x = double(3), double(3)
        with pytest.raises(jp.DerivativeError, match="map_impl.*loop"):
            slope(lambda: mapped(lambda y: y * w, x).sum(), [w], moving([w]))


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestFlexAttention:
    length = 5

    def case(self, heads: int = 2):
        self.qkv = [double(2, h, self.length, 4) for h in (2, heads, heads)]
        self.table = double(2, 2 * self.length)
        self.params = [*self.qkv, self.table]

    def reference(self, mod: str, causal: bool) -> Tensor:
        q, k, v = (t.sin() for t in self.qkv)
        k, v = (t.repeat_interleave(2 // t.shape[1], 1) for t in (k, v))
        s, i = q @ k.mT / 2, torch.arange(self.length)
        if mod == "table":
            s = s + self.table[:, i[:, None] - i + self.length]
        elif mod == "capped":
            s = 2 * torch.tanh(s / 2)
        s = s.masked_fill(i[:, None] < i, -torch.inf) if causal else s
        return (s.softmax(-1) @ v).square().sum() + 0 * sum(p.sum() for p in self.params)

    def closure(self, mod: str, causal: bool, attention=flex_attention, **options) -> Tensor:
        mods = {
            "none": None,
            "table": lambda s, b, h, i, j: s + self.table[h, i - j + self.length],  # captures a parameter
            "capped": lambda s, b, h, i, j: 2 * torch.tanh(s / 2),
        }
        mask = None
        if causal:
            size = self.length
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device="cpu", BLOCK_SIZE=size)
        out = attention(*(t.sin() for t in self.qkv), score_mod=mods[mod], block_mask=mask, **options)
        return out.square().sum() + 0 * sum(p.sum() for p in self.params)

    @pytest.mark.parametrize("mod", ["none", "table", "capped"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_it_is_what_it_says(self, mod, causal):
        self.case()
        same(lambda: self.closure(mod, causal), lambda: self.reference(mod, causal), self.params)

    def test_compiled_and_with_fewer_heads_of_keys(self):
        self.case(heads=1)
        compiled = torch.compile(flex_attention)
        same(
            lambda: self.closure("none", True, compiled, enable_gqa=True),
            lambda: self.reference("none", True),
            self.params,
        )


class Tagged(torch.Tensor):
    """Counts what it is asked for."""

    asked: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Tagged.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(torch.Tensor):
    pass


class Capped(torch.Tensor):
    """Another sum than torch's: at most one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.add:
            with torch._C.DisableTorchFunctionSubclass():
                result = result.clamp(max=1).as_subclass(Capped)
        return result


class TestSubclasses:
    """Data and targets of classes of their own."""

    def setup_method(self):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).double()
        self.x, self.y, self.params = double(16, 4), double(16, 1), list(self.model.parameters())

    def reference(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    @pytest.mark.parametrize("cls", [Tagged, Plain])
    @pytest.mark.parametrize("options", [{}, {"curvature": "ggn"}])
    def test_data_and_targets(self, cls, options):
        x, y = self.x.as_subclass(cls), self.y.as_subclass(cls)
        for closure in (
            lambda: F.mse_loss(self.model(x), self.y),
            lambda: F.mse_loss(self.model(self.x), y),
            lambda: F.mse_loss(self.model(x), y).as_subclass(Tensor),
        ):
            same(closure, self.reference, self.params, **options)

    def test_the_class_goes_on_to_be_asked(self):
        Tagged.asked.clear()
        seen = []

        def closure() -> Tensor:
            hidden = self.model(self.x.as_subclass(Tagged))
            seen.append(type(hidden).__name__)
            return F.mse_loss(hidden, self.y)

        jp.evaluate(closure, self.params, moving(self.params))
        assert seen == ["Tagged"] and {F.linear, F.mse_loss} <= set(Tagged.asked)
        x = self.x.as_subclass(Capped)
        same(
            lambda: torch.add(self.model(x), 0.5).sum(),
            lambda: (self.model(self.x) + 0.5).clamp(max=1).sum(),
            self.params,
        )

    def test_parameters(self):
        Tagged.asked.clear()
        w = double(3)
        tagged = w.as_subclass(Tagged)
        found = jp.evaluate(lambda: (tagged**2).sum(), [tagged], [torch.ones(1, 3).double()])
        assert torch.Tensor.pow in Tagged.asked or torch.Tensor.__pow__ in Tagged.asked
        assert type(found.slope) is Tensor
        torch.testing.assert_close(found.slope, 2 * w.sum().reshape(1))
        with pytest.raises(jp.DerivativeError, match="written to in place"):
            jp.evaluate(lambda: tagged.mul_(2).sum(), [tagged], [torch.ones(1, 3).double()])
        assert torch.equal(tagged.as_subclass(Tensor), w)

    def test_writes_reach_the_tensor_that_it_was(self):
        w = double(3)

        def closure() -> Tensor:
            h = w.sin()
            h.as_subclass(Tagged)[0] = 0
            return (h**2).sum()

        same(closure, lambda: (w[1:].sin() ** 2).sum(), [w])

    def test_wrappers_that_take_operators_apart(self):
        both = TwoTensor(self.x, 2 * self.x)
        same(lambda: F.mse_loss(self.model(both).a, self.y), self.reference, self.params)
        same(
            lambda: F.mse_loss(self.model(both).b, self.y),
            lambda: F.mse_loss(self.model(2 * self.x), self.y),
            self.params,
        )
        ones = torch.ones(8, 4, dtype=self.x.dtype)
        same(
            lambda: (self.params[0].sin() * TwoTensor(ones, 3 * ones)).b.sum(),
            lambda: 3 * self.params[0].sin().sum(),
            self.params[:1],
        )
        with pytest.raises(jp.LossError, match="TwoTensor"):
            jp.evaluate(lambda: self.model(both).sum(), self.params, moving(self.params))
        with pytest.raises(jp.DerivativeError, match="as_subclass"):
            slope(lambda: self.params[0].sin().as_subclass(TwoTensor).a.sum(), self.params, moving(self.params))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
    def test_wrappers_that_do_not_take_jets_are_refused(self):
        masked = masked_tensor(self.x, self.x > 0)
        with pytest.raises(jp.DerivativeError, match="class"):
            slope(lambda: (self.params[0].sum() * masked).sum().get_data(), self.params, moving(self.params))


def simulated(x):
    """A vector and a number, in NumPy."""
    return np.sin(x) * np.exp(x / 2), float(np.sum(x**3))


def seen(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin() * (x / 2).exp(), (x**3).sum()


class Counted:
    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *args):
        self.calls += 1
        return self.f(*args)


class TestBlackbox:
    def near(self, closure, reference, params: list[Tensor], k: int = 3, rough: float = 1e-6, **options) -> None:
        v = moving(params, k)
        found, wanted = (jp.evaluate(f, params, v, **options) for f in (closure, reference))
        torch.testing.assert_close(found.value, wanted.value)
        torch.testing.assert_close(found.slope, wanted.slope, rtol=rough / 1e3, atol=rough / 1e3)
        torch.testing.assert_close(found.curvature, wanted.curvature, rtol=rough, atol=rough)

    def loss(self, f):
        y, s = f
        return (y**2).sum() + (y * s).sum()

    @pytest.mark.parametrize("options", [{}, {"pairs": "diagonal"}, {"pairs": 2}, {"chunk": 2}])
    def test_differences(self, options):
        w, box = double(5), jp.blackbox(simulated, numpy=True)
        self.near(lambda: self.loss(box(w)), lambda: self.loss(seen(w)), [w], 4, 1e-5, **options)
        self.near(lambda: self.loss(box(w.sin() * w)), lambda: self.loss(seen(w.sin() * w)), [w], 4, 1e-5, **options)

    def test_calls_are_as_many_as_documented(self):
        w, f = double(5), Counted(lambda x: x.sin())
        box = jp.blackbox(f, noise=1e-16)
        for k in (1, 2, 3):
            f.calls = 0
            jp.evaluate(lambda: box(w).sum(), [w], moving([w], k), "none")
            assert f.calls == 1 + 2 * k
            f.calls = 0
            jp.evaluate(lambda: box(w).sum(), [w], moving([w], k))
            assert f.calls == 2 + 4 * k + k * (k - 1)

    @pytest.mark.parametrize("given", [1, 2])
    def test_derivatives_that_are_given(self, given):
        def derivative(inputs, tangents):
            (x, n), (v, none) = inputs, tangents
            assert none is None
            return np.cos(n * x) * n * v

        def second(inputs, tangents, others):
            (x, n), (v, _), (u, _) = inputs, tangents, others
            return -np.sin(n * x) * n**2 * v * u

        w, options = double(4), {"derivative": derivative}
        if given == 2:
            options["second"] = second
        box = jp.blackbox(lambda x, n: np.sin(n * x), numpy=True, **options)
        reference = lambda: ((3 * w * w).sin() ** 2).sum()  # noqa: E731
        self.near(lambda: (box(w * w, 3) ** 2).sum(), reference, [w], rough=1e-8 if given == 1 else 1e-11)

    def test_noise_is_measured(self):
        w = double(6)
        v = moving([w])
        for f, rough in ((lambda x: np.sin(x), 1e-9), (lambda x: np.sin(x.astype(np.float32)), 1e-3)):
            box = jp.blackbox(f, numpy=True)
            found = jp.evaluate(lambda box=box: box(w).sum(), [w], v)
            wanted = jp.evaluate(lambda: w.sin().sum(), [w], v)
            torch.testing.assert_close(found.slope, wanted.slope, rtol=rough, atol=rough)
            torch.testing.assert_close(found.curvature, wanted.curvature, rtol=0.05, atol=0.05)

    def test_gauss_newton_of_a_simulated_model(self):
        w, x, t = double(4), double(6, 4), double(6)
        box = jp.blackbox(lambda w, x: np.tanh(x @ w), numpy=True)
        self.near(
            lambda: F.mse_loss(box(w, x), t), lambda: F.mse_loss((x @ w).tanh(), t), [w], rough=1e-5, curvature="ggn"
        )

    def test_single_precision_stays(self):
        w = torch.randn(5)
        v, box, kinds = moving([w], 3), jp.blackbox(simulated, numpy=True), []

        def closure() -> Tensor:
            y, s = box(w)
            kinds.extend([y.dtype, s.dtype])
            return self.loss((y, s))

        found, wanted = jp.evaluate(closure, [w], v), jp.evaluate(lambda: self.loss(seen(w)), [w], v)
        assert kinds == [torch.float32] * 2 == [y.dtype for y in box(w)]
        torch.testing.assert_close(found.slope, wanted.slope, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.curvature, wanted.curvature, rtol=1e-5, atol=1e-4)

    def test_inputs_without_jets_just_call(self):
        x, f = double(3), Counted(lambda x, flag: (x, flag))
        box, same_object = jp.blackbox(f), object()
        assert box(x, same_object)[0] is x and box(x, same_object)[1] is same_object and f.calls == 2
        w = double(3)
        f.calls = 0
        jp.evaluate(lambda: (w * box(x, 1)[0]).sum(), [w], moving([w]))
        assert f.calls == 1

    def test_directions_that_do_not_move_it(self):
        w, u, box = double(3), double(3), jp.blackbox(np.sin, numpy=True)
        v = [torch.stack([double(3), torch.zeros(3).double()]), torch.stack([torch.zeros(3).double(), double(3)])]
        for inside in (lambda: w, lambda: w * u):
            found = jp.evaluate(lambda inside=inside: (box(inside()) * u).sum(), [w, u], v)
            wanted = jp.evaluate(lambda inside=inside: (inside().sin() * u).sum(), [w, u], v)
            torch.testing.assert_close(found.curvature, wanted.curvature, rtol=1e-6, atol=1e-6)

    def test_it_trains(self):
        w = nn.Parameter(torch.tensor([2.0, 1.5]))
        box = jp.blackbox(lambda w: np.array([w[0] * w[1], w[0] - w[1] ** 2]), numpy=True)
        opt = jp.optim.FoMoHKD([w], k=2, descent="saddle-free")
        for _ in range(25):
            loss = opt.step(lambda: (box(w) - torch.tensor([1.0, 0.0])).square().sum())
        assert loss < 1e-6

    def test_random_numbers_are_the_same_in_all_calls(self):
        w, box = double(4), jp.blackbox(lambda x: x.sin() + torch.randn(4, dtype=x.dtype))
        v = moving([w])
        found, wanted = (slope(f, [w], v) for f in (lambda: box(w).sum(), lambda: w.sin().sum()))
        torch.testing.assert_close(found, wanted)

    def test_errors(self):
        w, box = double(3), jp.blackbox(lambda x: x * w)
        with pytest.raises(jp.DerivativeError, match="not among its arguments"):
            slope(lambda: box(w.sin()).sum(), [w], moving([w]))
        box = jp.blackbox(np.sin, numpy=True)
        with pytest.raises(jp.DerivativeError, match="nested derivatives"):
            slope(lambda: jp.laplacian(lambda z: box(z * w).sum(), double(3)), [w], moving([w]))
        box = jp.blackbox(np.sin, derivative=lambda x, v: v[0][:1], numpy=True)
        with pytest.raises(jp.DerivativeError, match="shapes"):
            slope(lambda: box(w).sum(), [w], moving([w]))
        for options in ({"second": np.sin}, {"noise": 0.0}, {"scale": -1.0}):
            with pytest.raises(jp.ArgumentError):
                jp.blackbox(np.sin, **options)

    @pytest.mark.parametrize("f", [lambda x: x[:1] * 1j, lambda x: torch.polar(x, x)])
    def test_complex_numbers_are_refused(self, f):
        w, box = double(3), jp.blackbox(lambda x: f(x.real))
        for closure in (lambda: box(w).abs().sum(), lambda: box(torch.complex(w, w)).abs().sum()):
            with pytest.raises(jp.DerivativeError, match="view_as_real"):
                slope(closure, [w], moving([w]))


class Quotient(torch.autograd.Function):
    """By jvp: ``x / (1 + y²)``."""

    @staticmethod
    def forward(ctx, x, y):
        out = x / (1 + y * y)
        ctx.save_for_forward(y, out)
        return out

    @staticmethod
    def jvp(ctx, dx, dy):
        y, out = ctx.saved_tensors
        return (dx - 2 * out * y * dy) / (1 + y * y)


BOX = {"dtype": torch.float64, "numpy": True}
OPAQUE = {  # functions that are not carried operator by operator, the same in torch, and how exact they are
    "jvp": (SavedInForward.apply, F.silu, 1e-9),
    "jvp of two": (lambda x: Quotient.apply(x, x.cos()), lambda x: x / (1 + x.cos() ** 2), 1e-9),
    "backward": (Gelu.apply, lambda x: F.gelu(x, approximate="tanh"), 1e-9),
    "differences": (jp.blackbox(np.sin, **BOX), torch.sin, 1e-5),
    "derivative": (jp.blackbox(np.sin, derivative=lambda x, v: np.cos(x[0]) * v[0], **BOX), torch.sin, 1e-7),
}
STRUCTURES = [
    AllPairs(4), Diagonal(4), Planes(4, 2), Star(4), Sums.trace(4),
    Sums(4, (((0, 1.0), (2, -2.0)), ((1, 3.0), (2, 0.5), (3, 1.0)))),
]  # fmt: skip


class TestPairStructures:
    """Every structure of pairs, along all directions or a part of them."""

    W = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ROWS = {"all": None, "some": (1, 3), "one": (2,), "none": ()}

    def coefficients(self, f, structure, rows, order=2, bent=False) -> list[Tensor]:
        """Value and all first and second coefficients of f at W; ``bent``: W has second coefficients of its own."""
        tangents = torch.randn(structure.k, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.inference_mode(), expansion(structure, order) as space, intercept_functions(lambda x: x):
            if rows is None:
                x1 = Coefficients(space, 1, tangents)
            else:
                x1 = Coefficients(space, 1, tangents[list(rows)], rows) if rows else None
            x2 = torch.ones(structure.count, 5, dtype=torch.float64) if bent else None
            p, *both = parts(f(Jet(self.W, x1, x2, space)), space)
            return [p.clone(), *(c.full(p.shape, p.dtype, p.device).clone() for c in both)]

    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize("name", OPAQUE)
    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_second_coefficients_are_sums_over_pairs(self, structure, name, rows):
        opaque, plain, rough = OPAQUE[name]
        for inner in (lambda x: x, lambda x: x.exp() * x):
            found = self.coefficients(lambda x, inner=inner: opaque(inner(x)), structure, self.ROWS[rows])
            value, first, second = self.coefficients(lambda x, i=inner: plain(i(x)), AllPairs(4), self.ROWS[rows])
            every, wanted = AllPairs(4).matrix(second), torch.zeros(structure.count, 5, dtype=torch.float64)
            for n, i, j, weight in structure.terms():
                wanted[n] += weight * every[i, j]
            torch.testing.assert_close(found[:2], [value, first], rtol=rough, atol=rough)
            torch.testing.assert_close(found[2], wanted, rtol=rough, atol=rough)

    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("name", OPAQUE)
    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_second_coefficients_that_are_there_are_passed_on(self, structure, name, order):
        opaque, plain, rough = OPAQUE[name]
        for rows in self.ROWS.values():
            found, wanted = (self.coefficients(f, structure, rows, order, bent=True) for f in (opaque, plain))
            torch.testing.assert_close(found, wanted, rtol=rough, atol=rough)

    def test_directions_that_do_not_move_the_arguments_of_a_jvp_stay_absent(self):
        with torch.inference_mode(), expansion(Star(4), 2) as space, intercept_functions(lambda x: x):
            x1 = Coefficients(space, 1, torch.ones(1, 5, dtype=torch.float64), (1,))
            _, y1, y2 = parts(SavedInForward.apply(Jet(self.W, x1, None, space)), space)
            assert y1.rows == (1,) and not y2


REPARAMETRIZED = {
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "pruned by rows": lambda m: prune.random_structured(m[2], "weight", 0.3, dim=0),
    "pruned together": lambda m: prune.global_unstructured(
        [(m[0], "weight"), (m[2], "weight")], pruning_method=prune.L1Unstructured, amount=0.4
    ),
    "weight norm": lambda m: parametrizations.weight_norm(m[0]),
    "weight norm, old": lambda m: nn.utils.weight_norm(m[0]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[0]).eval(),
    "spectral norm, old": lambda m: nn.utils.spectral_norm(m[0]).eval(),
    "orthogonal": lambda m: parametrizations.orthogonal(m[2]),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZED)
class TestReparametrized:
    """Weights that are computed anew in each forward pass."""

    def case(self, name: str):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        REPARAMETRIZED[name](model)
        x, y = double(16, 4), double(16, 2)
        return model, [p for p in model.parameters() if p.requires_grad], lambda: F.mse_loss(model(x), y)

    def test_the_plane_is_that_of_reverse_mode(self, name):
        _, params, closure = self.case(name)
        check_plane(closure, params, moving(params, 3), 1e-8)

    def test_the_model_is_an_ordinary_one_afterwards(self, name):
        model, params, closure = self.case(name)
        before = closure().detach()
        jp.evaluate(closure, params, moving(params, 3))
        twin = copy.deepcopy(model)
        torch.save(model.state_dict(), io.BytesIO())
        assert torch.equal(closure(), before) and set(twin.state_dict()) == set(model.state_dict())
        gradient = torch.autograd.grad(closure(), params)
        opt = jp.optim.FGD(params, lr=1e-3, k=8)
        assert all(torch.isfinite(g).all() for g in gradient)
        torch.testing.assert_close(opt.step(closure), before)
        assert closure() < before


COMPLEX = {
    "modulus": lambda w: (w.abs() ** 2).sum() + w.abs().sum(),
    "argument": lambda w: w.angle().sin().sum(),
    "powers": lambda w: (w * w.conj()).real.sum() + (w**3).imag.sum(),
    "parts": lambda w: torch.view_as_real(w).exp().sum(),
    "norm": lambda w: w.norm() + torch.linalg.matrix_norm(w[..., 0]),
    "exponential": lambda w: (w.exp() * (2 + 1j)).abs().sum(),
    "real factors": lambda w: (w * torch.arange(1.0, 7)).abs().sum(),
}


class FourierLayer(nn.Module):
    """A layer of a Fourier neural operator: complex weights on low frequencies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(4, 4, 6, dtype=torch.complex128))
        self.skip = nn.Conv1d(4, 4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[..., :6] = torch.einsum("bim,iom->bom", spectrum[..., :6], self.weight)
        return F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.skip(x))


class TestComplexParameters:
    """They move as the two real parameters that their parts are."""

    @staticmethod
    def same_as_real(closure, w: Tensor, others: list[Tensor], k: int = 3, **options) -> None:
        """The plane of ``closure(w)`` is that of the real parameter, whose slope is reverse mode's."""
        v, real = moving([w, *others], k), torch.view_as_real(w).detach().clone()
        found = jp.evaluate(lambda: closure(w), [w, *others], v, **options)
        parts = [torch.view_as_real(v[0]), *v[1:]]
        wanted = jp.evaluate(lambda: closure(torch.view_as_complex(real)), [real, *others], parts, **options)
        oracle = reverse_slope(lambda: closure(torch.view_as_complex(real)), [real, *others], parts)
        torch.testing.assert_close(found.slope, oracle)
        torch.testing.assert_close(found.slope, wanted.slope)
        torch.testing.assert_close(found.curvature, wanted.curvature)

    @pytest.mark.parametrize("name", COMPLEX)
    def test_functions(self, name):
        self.same_as_real(COMPLEX[name], torch.randn(3, 4, 6, dtype=torch.complex128), [])

    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_a_fourier_layer(self, curvature):
        layer, x, t = FourierLayer(), double(8, 4, 16), double(8, 4, 16)
        others = [p.detach().clone() for p in layer.skip.parameters()]

        def closure(w: Tensor) -> Tensor:
            named = {"weight": w, "skip.weight": others[0], "skip.bias": others[1]}
            return F.mse_loss(torch.func.functional_call(layer, named, (x,)), t)

        self.same_as_real(closure, layer.weight.detach().clone(), others, curvature=curvature)

    @pytest.mark.parametrize("law", ["gaussian", "sphere", "laplace"])
    @pytest.mark.parametrize("tangents", ["dense", "rank-one", "sparse"])
    def test_directions_are_those_of_the_parts(self, law, tangents):
        if law == "sphere" and tangents == "sparse":
            law = "uniform"
        w, u = torch.zeros(5, 3, dtype=torch.complex128), torch.zeros(4).double()
        options = {"density": 0.5} if tangents == "sparse" else {}
        drawn = [jp.Directions(4, law, tangents, seed=1, **options) for _ in range(2)]
        mixed, real = drawn[0].tangents([w, u]), drawn[1].tangents([torch.view_as_real(w), u])
        assert torch.equal(torch.view_as_real(mixed[0]), real[0]) and torch.equal(mixed[1], real[1])
        kappa = torch.randn(4).double()
        torch.testing.assert_close(drawn[0].combine(0, w, kappa), torch.tensordot(kappa.to(w.dtype), mixed[0], 1))
        if law == "sphere":
            squares = sum(t.abs().square().flatten(1).sum(1) for t in mixed)
            torch.testing.assert_close(squares, torch.full((4,), 34.0).double())

    @pytest.mark.parametrize(
        ("make", "options"),
        [
            (jp.optim.FGD, {"lr": 0.05, "k": 8}),
            (jp.optim.FGD, {"lr": 0.05, "k": 8, "momentum": 0.5, "tangents": "rank-one"}),
            (jp.optim.FoMoH, {"lr": 0.5, "k": 8, "clip": 0.2}),
            (jp.optim.FoMoHKD, {"lr": 1.0, "k": 8, "descent": "saddle-free", "clip": 1.0}),
            (jp.optim.FoMoHBP, {"lr": 0.5}),
        ],
    )
    def test_optimizers(self, make, options):
        layer, x = FourierLayer(), double(8, 4, 16)
        target = FourierLayer()(x).detach()
        opt = make(layer.parameters(), **options)
        losses = [float(opt.step(lambda: F.mse_loss(layer(x), target))) for _ in range(30)]
        assert losses[-1] < 0.98 * losses[0] and layer.weight.is_complex()
        if "clip" in options:
            before = [p.detach().clone() for p in layer.parameters()]
            opt.step(lambda: F.mse_loss(layer(x), target))
            moved = [(p - q).abs().square().sum() for p, q in zip(layer.parameters(), before, strict=True)]
            assert torch.stack(moved).sum().sqrt() <= options["clip"] * (1 + 1e-9)

    def test_as_many_directions_as_real_parameters(self):
        w = nn.Parameter(torch.randn(2, dtype=torch.complex128))
        opt = jp.optim.FoMoHKD([w], k=4)  # a whole Newton step
        opt.step(lambda: ((w - (1 + 2j)).abs() ** 2).sum())
        torch.testing.assert_close(w.detach(), torch.full((2,), 1 + 2j, dtype=torch.complex128))
        with pytest.raises(jp.ArgumentError, match="exceed"):
            jp.optim.FoMoHKD([w], k=5)

    def test_what_does_not_take_them_says_so(self):
        w = nn.Parameter(torch.randn(2, dtype=torch.complex128))
        with pytest.raises(jp.DTypeError, match="view_as_real"):
            jp.optim.PlaneSearch([w])
        with pytest.raises(jp.DTypeError, match="complex128"):
            jp.evaluate(lambda: w.abs().sum(), [w], [torch.ones(1, 2).double()])
        with pytest.raises(jp.LossError, match="complex"):
            jp.evaluate(lambda: w.sum(), [w], jp.Directions(1))


@pytest.mark.parametrize("name", kinds.PROGRAMS)
def test_every_program_of_the_table_is_carried_or_told_or_refused(name):
    try:
        found = {kinds.outcome(kinds.PROGRAMS[name], c)[0] for c in ("none", "hessian")}
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    assert found <= {"carried", "told", "refused"}
