"""What leaves an evaluation, and what the user's own grad mode stops inside of one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

import jetplane as jp
from jetplane.errors import DerivativeError, JetplaneWarning, UnusedParametersError


def slope(closure, params: list[Tensor], **options) -> Tensor:
    """The whole gradient by one direction for each entry."""
    sizes = [p.numel() for p in params]
    eye = torch.eye(sum(sizes), dtype=params[0].dtype).split(sizes, 1)
    tangents = [e.reshape(-1, *p.shape) for e, p in zip(eye, params, strict=True)]
    return jp.evaluate(closure, params, tangents, **options).slope


def gradient(closure, params: list[Tensor]) -> Tensor:
    """The same by reverse mode."""
    params = [p.requires_grad_() for p in params]
    grads = torch.autograd.grad(closure(), params, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)])


def as_reverse_mode(closure, params: list[Tensor]) -> None:
    got = slope(closure, params)
    torch.testing.assert_close(got, gradient(closure, params))


def vector(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x.exp()


class TestNoGrad:
    @pytest.mark.parametrize(
        "off", [torch.no_grad, torch.inference_mode, lambda: torch.autograd.grad_mode.set_grad_enabled(False)]
    )
    def test_stops_derivatives_inside_of_a_closure(self, off):
        def closure():
            with off():
                target = (w * 3).tanh()
                assert type(target) is Tensor
            return (w.sin() * target).sum()

        w = vector(3)
        torch.testing.assert_close(slope(closure, [w]), w.cos() * (3 * w).tanh())

    def test_as_a_function_and_as_a_decorator(self):
        def closure():
            torch.set_grad_enabled(False)
            a = w.cos()
            torch.set_grad_enabled(True)
            return (w * a * decorated(w)).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])

    def test_enable_grad_inside_of_it_carries_on(self):
        def closure():
            with torch.no_grad():
                a = w.cos()
                with torch.enable_grad():
                    b = w.sin() * a
            return (b * w).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])

    def test_around_an_evaluation_changes_nothing(self):
        w = vector(3)
        for around in (torch.no_grad, torch.inference_mode):
            with around():
                assert torch.equal(slope(lambda: (w**3).sum(), [w]), 3 * w**2)

    def test_a_closure_that_is_decorated_as_a_whole_is_told(self):
        w = vector(3)
        with pytest.raises(UnusedParametersError, match=r"torch.no_grad\(\) in the closure"):
            slope(torch.no_grad()(lambda: (w**3).sum()), [w])

    def test_grad_mode_is_as_it_was_afterwards(self):
        w = vector(3)
        seen = []
        with torch.no_grad():
            slope(lambda: (seen.append(torch.is_grad_enabled()), (w**2).sum())[1], [w])
            assert not torch.is_grad_enabled()
        assert seen == [True] and torch.is_grad_enabled()

    def test_a_bootstrapped_target(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x, after = vector(5, 3), vector(5, 3)

        def closure():
            with torch.no_grad():
                target = 1 + 0.9 * net(after)
            return F.mse_loss(net(x), target)

        as_reverse_mode(closure, list(net.parameters()))

    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_curvature_sees_a_constant(self, curvature):
        w, x = vector(3), vector(4, 3)

        def closure(held=None):
            with torch.no_grad():
                target = (x @ w).sin()
            return F.mse_loss(x @ w, target if held is None else held)

        tangents = [torch.eye(3, dtype=torch.float64)]
        got = jp.evaluate(closure, [w], tangents, curvature)
        expected = jp.evaluate(lambda: closure((x @ w).sin().detach()), [w], tangents, curvature)
        torch.testing.assert_close(got.slope, expected.slope)
        torch.testing.assert_close(got.curvature, expected.curvature)

    def test_the_score_of_a_sample(self):
        mu = vector(2)

        def closure():
            torch.manual_seed(0)
            normal = torch.distributions.MultivariateNormal(mu, torch.eye(2, dtype=torch.float64))
            return normal.log_prob(normal.sample()).sum()

        as_reverse_mode(closure, [mu])

    def test_spectral_norm_and_the_norm_of_parameters(self):
        torch.manual_seed(0)
        plain = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).double()
        x, ours = vector(5, 3), copy.deepcopy(plain)

        def closure(layer):
            return layer(x).square().sum() / nn.utils.get_total_norm(list(layer.parameters()))

        got = slope(lambda: closure(ours), list(ours.parameters()))
        torch.testing.assert_close(got, gradient(lambda: closure(plain), list(plain.parameters())))
        for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_parameter_that_is_used_there_alone_does_not_move(self):
        w, teacher = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        opt = jp.optim.FGD([w, teacher], lr=0.1)

        def closure():
            with torch.no_grad():
                target = teacher * 2
            return (w - target).square().sum()

        opt.step(closure)
        assert torch.equal(teacher, torch.ones(3)) and not torch.equal(w, torch.ones(3))

    def test_optimizers_step_under_it(self):
        w = nn.Parameter(torch.ones(3))
        opt = jp.optim.FoMoHKD([w], k=3)
        with torch.no_grad():
            opt.step(lambda: (w**2).sum())
        torch.testing.assert_close(w.detach(), torch.zeros(3), atol=1e-5, rtol=0)

    def test_an_average_of_parameters_is_kept_in_a_buffer(self):
        w, average = vector(3), torch.zeros(3, dtype=torch.float64)

        def closure():
            with torch.no_grad():
                average.mul_(0.9).add_(w, alpha=0.1)
            return (w * average).sum()

        got = slope(closure, [w])
        torch.testing.assert_close(average, 0.1 * w)
        torch.testing.assert_close(got, average)

    @pytest.mark.parametrize("write", ["mul_", "in place by operator", "out", "copy_", "item", "foreach"])
    def test_what_is_written_to_keeps_its_derivative(self, write):
        def closure():
            h = w.sin()
            with torch.no_grad():
                if write == "mul_":
                    h.mul_(2)
                elif write == "in place by operator":
                    h *= 2
                elif write == "out":
                    torch.mul(h, 2, out=h)
                elif write == "copy_":
                    h.copy_(2 * w.sin())
                elif write == "item":
                    h[0] = 5.0
                else:
                    torch._foreach_mul_([h], 2.0)
            return h.square().sum()

        w = vector(3)
        got = slope(closure, [w])
        value = w.sin() * (torch.tensor([5 / w[0].sin().item(), 1, 1]) if write == "item" else 2)
        torch.testing.assert_close(got, 2 * value * w.cos())

    def test_a_parameter_may_not_be_written_to(self):
        def closure():
            with torch.no_grad():
                w.clamp_(-1, 1)
            return w.sum()

        w = vector(3)
        before = w.clone()
        with pytest.raises(DerivativeError, match="a parameter was written to in place"):
            slope(closure, [w])
        assert torch.equal(w, before)

    def test_a_view_made_there_is_not_written_to_outside(self):
        def closure():
            h = w.sin()
            with torch.no_grad():
                first = h[:1]
            first.add_(w[1:2])
            return h.sum()

        w = vector(3)
        with pytest.raises(DerivativeError, match="view that was made under"):
            slope(closure, [w])

    def test_numpy_and_lists_are_allowed_there(self):
        w, seen = vector(3), []

        def closure():
            with torch.no_grad():
                seen.append((w.sin().numpy().sum(), w.tolist(), (2 * w).tolist()))
            return w.sin().sum()

        assert torch.equal(slope(closure, [w]), w.cos())
        assert seen == [(w.sin().numpy().sum(), w.tolist(), (2 * w).tolist())]

    def test_a_custom_autograd_function_is_a_plain_one_there(self):
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, g):
                return 2 * g

        def closure():
            with torch.no_grad():
                target = Double.apply(w)
            return (w * target).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])

    def test_detach_in_place_stops_derivatives(self):
        def closure():
            h = w.sin()
            h.detach_()
            return (h * w).sum()

        w = vector(3)
        as_reverse_mode(closure, [w])
        with pytest.raises(DerivativeError, match="detach_"):
            slope(lambda: (w.detach_() * w).sum(), [w])

    def test_inside_of_functions_of_tensors(self):
        def f(x):
            with torch.no_grad():
                held = x.exp()
            return (x**2 * held).sum()

        x = vector(3)
        torch.testing.assert_close(jp.hessian(f, x), torch.diag(2 * x.exp()))
        _, first, second = jp.jet(f, x, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(first, 2 * x * x.exp())
        torch.testing.assert_close(second, torch.diag(2 * x.exp()))

    def test_functions_of_tensors_inside_of_it_do_their_own_work(self):
        """Derivatives by x are wanted, those by the parameter stop."""

        def closure():
            with torch.no_grad():
                curved = jp.laplacian(lambda z: (w * z**3).sum(), x)
                both = jp.laplacian(lambda z: (w * z**3).sum(), w)
            return (w * curved).sum() + both * w[0]

        w, x = vector(3), vector(3)
        expected = (6 * w * x).sum().repeat(3)
        expected[0] += (6 * w * w).sum()
        torch.testing.assert_close(slope(closure, [w]), expected)

    def test_evaluations_nested_in_an_evaluation_go_on_outside_of_it(self):
        def closure():
            with torch.no_grad():
                jp.laplacian(lambda z: (w * z**3).sum(), x)
            return jp.laplacian(lambda z: (w**2 * z**3).sum(), x)

        w, x = vector(3), vector(3)
        torch.testing.assert_close(slope(closure, [w]), 12 * w * x)


def evaluate_once(closure, params: list[Tensor]) -> None:
    jp.evaluate(closure, params, jp.Directions(k=2))


KEPT = {
    "a function of the parameters": lambda w: w.sin(),
    "a view of one": lambda w: w.sin()[1:],
    "a parameter's view": lambda w: w.view(3, 1),
    "a part of several": lambda w: w.sin().split(2)[0],
    "a buffer that was written into": lambda w: torch.zeros(3, dtype=w.dtype).copy_(w),
    "what was written into": lambda w: w.sin().mul_(2),
    "transposed in place": lambda w: w.sin().view(3, 1).t_(),
    "detached": lambda w: w.sin().detach(),
    "made under no_grad": lambda w: decorated(w),
    "data": lambda w: torch.arange(3.0),
    "a view of data": lambda w: torch.arange(3.0)[1:],
    "complex": lambda w: torch.complex(w, w).conj(),
    "an integer": lambda w: w.argsort(),
    "a fallback's": lambda w: torch.special.i1e(w),
    "a loss": lambda w: F.mse_loss(w, torch.zeros_like(w)),
    "zeros": lambda w: torch.zeros_like(w),
}


class TestWhatIsKept:
    @pytest.mark.parametrize("name", KEPT)
    def test_is_an_ordinary_tensor(self, name):
        w, kept, inside = vector(3), {}, {}

        def closure():
            kept["x"] = KEPT[name](w)
            inside["x"] = kept["x"].detach().clone()
            return (w**2).sum()

        evaluate_once(closure, [w])
        x = kept["x"]
        expected = KEPT[name](w.detach())
        assert type(x) is Tensor and not x.is_inference() and not vars(x) and not x.requires_grad
        torch.testing.assert_close(x, expected)
        assert torch.equal(x, inside["x"])
        assert str(x) == str(expected) and x.tolist() == expected.tolist()
        if not x.is_complex():
            assert (x.numpy() == expected.numpy()).all()
        held = io.BytesIO()
        torch.save(kept, held)
        held.seek(0)
        for again in (torch.load(held)["x"], copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
            assert type(again) is Tensor and torch.equal(again, x)

    @pytest.mark.parametrize("name", KEPT)
    def test_is_used_by_reverse_mode(self, name):
        w, kept = vector(3), {}
        evaluate_once(lambda: (kept.update(x=KEPT[name](w)), (w**2).sum())[1], [w])
        x, u = kept["x"], torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (x * u).sum().abs().backward()
        assert u.grad is not None
        if x.is_floating_point():
            v = x.clone().requires_grad_()
            (v * x).sum().backward()
            assert torch.equal(v.grad, x)
            x.requires_grad_().square().sum().backward()
            torch.testing.assert_close(x.grad, 2 * x.detach())

    def test_views_share_memory_with_what_they_look_into(self):
        w, kept = vector(3), {}

        def closure():
            kept["x"] = w.sin()
            kept["part"] = kept["x"][1:]
            kept["buffer"] = torch.zeros(3)
            kept["slot"] = kept["buffer"][0]
            return kept["part"].sum()

        evaluate_once(closure, [w])
        kept["x"].fill_(5)
        assert kept["part"].tolist() == [5, 5]
        assert kept["slot"]._base is kept["buffer"]
        before = kept["buffer"]._version
        kept["slot"].add_(1)  # reverse mode would see it
        assert kept["buffer"]._version == before + 1 and kept["buffer"][0] == 1

    def test_a_table_that_is_built_on_first_use(self):
        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.table = nn.Linear(8, 8), None

            def forward(self, x):
                if self.table is None:
                    self.table = torch.sin(torch.arange(x.shape[1]).float())[:, None].expand(-1, 8).contiguous()
                return self.linear(x) * self.table

        for chunk in (None, 1, "auto"):
            m, x = Positions(), torch.randn(2, 6, 8)
            jp.evaluate(lambda: m(x).square().mean(), list(m.parameters()), jp.Directions(k=2), "none", chunk=chunk)  # noqa: B023
            m(x).square().mean().backward()
            jp.evaluate(lambda: m(x).square().mean(), list(m.parameters()), jp.Directions(k=2), "none")  # noqa: B023

    def test_parameters_made_inside_are_trained(self):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2), nn.LazyBatchNorm1d()), torch.randn(5, 3)
        evaluate_once(lambda: net(x).square().sum(), list(net[0].parameters()))
        assert [type(m) for m in net] == [nn.Linear, nn.Linear, nn.BatchNorm1d]
        net(x).square().sum().backward()
        assert all(type(p) is nn.Parameter and p.grad is not None for p in net.parameters())
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        before = [p.detach().clone() for p in net.parameters()]
        jp.optim.FGD(net.parameters(), lr=1e-3).step(lambda: net(x).sum())
        assert not any(torch.equal(p, b) for p, b in zip(net[1].parameters(), before[2:4], strict=True))

    def test_what_an_evaluation_that_fails_has_kept(self):
        w, kept = vector(3), {}

        def closure():
            kept["x"] = w.sin()
            raise KeyError("no")

        with pytest.raises(KeyError):
            evaluate_once(closure, [w])
        assert type(kept["x"]) is Tensor and torch.equal(kept["x"], w.sin())

    def test_of_functions_of_tensors(self):
        x, kept = vector(3), {}
        jp.hessian(lambda z: (kept.update(y=z.sin(), x=z), (z**2).sum())[1], x)
        assert type(kept["y"]) is type(kept["x"]) is Tensor
        assert torch.equal(kept["y"], x.sin()) and torch.equal(kept["x"], x)
        assert jp.laplacian(lambda z: (z**2 * kept["y"]).sum(), x) == 2 * kept["y"].sum()

    def test_of_an_inner_evaluation_carries_on_in_the_outer_one(self):
        w, x, kept = vector(3), vector(3), {}

        def closure():
            laplacian = jp.laplacian(lambda z: (kept.update(h=w * z), (w * z**3).sum())[1], x)
            kept["part"] = kept["h"][:2]
            return laplacian + (kept["h"] ** 2).sum() + kept["part"].sum()

        got = slope(closure, [w])
        expected = 6 * x + 2 * w * x**2
        expected[:2] += x[:2]
        torch.testing.assert_close(got, expected)
        assert type(kept["h"]) is Tensor and torch.equal(kept["h"], w * x)

    def test_is_freed_where_nobody_holds_it(self):
        w, refs = vector(3), []

        def closure():
            h = w
            for _ in range(5):
                h = h.sin()
                refs.append(weakref.ref(h))
            return h.sum()

        evaluate_once(closure, [w])
        gc.collect()
        assert [r() for r in refs] == [None] * 5

    def test_holds_no_coefficients(self):
        w, kept = torch.ones(1000), {}

        def closure():
            kept["x"] = w.sin()
            with torch.no_grad():
                kept["view"] = kept["x"][:1]
            return kept["x"].sum()

        gc.collect()
        coefficients = [1000 * 7, 1000 * 28]
        jp.evaluate(closure, [w], jp.Directions(k=7))
        gc.collect()
        assert not [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() in coefficients]
        assert torch.equal(kept["view"], kept["x"][:1])

    def test_other_threads_hold_it_too(self):
        """Conversion under the hands of threads that read the tensor all the time."""
        w, held, wrong, done = torch.ones(64), [torch.ones(64)], [], threading.Event()

        def read():
            while not done.is_set():
                x = held[0]
                with torch.no_grad():
                    total = (x * 2).sum().item()
                if total != 128:
                    wrong.append(total)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for t in threads:
            t.start()
        try:
            for _ in range(100):
                jp.evaluate(lambda: (held.__setitem__(0, w * 1), held[0].sum())[1], [w], [torch.ones(1, 64)])
        finally:
            done.set()
            for t in threads:
                t.join()
        assert not wrong and type(held[0]) is Tensor

    def test_many_are_forgotten_on_the_way(self):
        """References to jets that are gone do not pile up."""
        w, sizes = torch.ones(1), []

        def closure():
            h = w
            for _ in range(6000):
                h = h + 1
            sizes.append(len(h.space.made))
            return h.sum()

        jp.evaluate(closure, [w], [torch.ones(1, 1)])
        assert sizes[0] < 5000


class TestShowing:
    def test_numbers_of_jets_inside(self):
        w, seen = torch.tensor([2.0, 3.0]), []

        def closure():
            loss = (w**2).sum()
            seen.extend([f"{loss:.3f}", f"{loss}", repr(w * 1), str(w), f"{w[0]:.1f}", repr(nn.Linear(1, 1))])
            return loss

        evaluate_once(closure, [w])
        assert seen[0] == "13.000" and "tensor(13.)" in seen[1] and "k=2" in seen[1]
        assert "tensor([2., 3.])" in seen[2] and seen[3] == "tensor([2., 3.])" and seen[4] == "2.0"

    def test_jets_of_inner_evaluations(self):
        seen = []
        jp.laplacian(lambda z: (seen.append(f"{z.sum():.1f} {z}"), (z**2).sum())[1], torch.ones(2))
        assert seen[0].startswith("2.0 Jet(tensor([1., 1.])")


class TestEnteringLater:
    @staticmethod
    def state():
        torch.manual_seed(0)
        cell, read = nn.RNNCell(2, 3), nn.Linear(3, 1)
        return cell, read, torch.randn(4, 2), {"h": torch.zeros(4, 3)}

    def test_a_hidden_state_raises_and_names_the_line(self):
        cell, read, x, held = self.state()

        def closure():
            held["h"] = cell(x, held["h"])
            return read(held["h"]).square().mean()

        params = [*cell.parameters(), *read.parameters()]
        evaluate_once(closure, params)
        before = held["h"].clone()
        with pytest.raises(
            DerivativeError, match=r"made from parameters by an earlier evaluation(.|\n)*detach\(\) it(.|\n)*in closure"
        ):
            evaluate_once(closure, params)
        assert torch.equal(held["h"], before)

    @pytest.mark.parametrize(
        "clean", ["detach inside", "detach outside", "data", "no_grad", "detach_", "overwrite", "clone"]
    )
    def test_a_hidden_state_that_is_detached(self, clean):
        cell, read, x, held = self.state()

        def closure():
            h = held["h"]
            if clean == "detach inside":
                h = h.detach()
            elif clean == "data":
                h = h.data
            elif clean == "detach_":
                h.detach_()
            elif clean == "overwrite":
                h.copy_(torch.ones(4, 3))
            elif clean == "no_grad":
                with torch.no_grad():
                    h = h.clone()
            held["h"] = cell(x, h)
            return read(held["h"]).square().mean()

        params = [*cell.parameters(), *read.parameters()]
        for _ in range(3):
            if clean == "detach outside":
                held["h"] = held["h"].detach()
            elif clean == "clone":
                held["h"] = held["h"].clone()
            start = torch.ones(4, 3) if clean == "overwrite" else held["h"].clone()
            got = slope(closure, params)
            held_now = held["h"]
            expected = gradient(lambda: read(cell(x, start)).square().mean(), params)  # noqa: B023
            torch.testing.assert_close(got, expected)
            held["h"] = held_now

    def test_tuples_lists_and_keywords_are_looked_into(self):
        lstm, x, held = nn.LSTM(2, 3), torch.randn(5, 4, 2), {"s": None}

        def closure():
            y, held["s"] = lstm(x, held["s"])
            return y.square().mean()

        evaluate_once(closure, list(lstm.parameters()))
        with pytest.raises(DerivativeError, match="earlier evaluation"):
            evaluate_once(closure, list(lstm.parameters()))
        w, kept = torch.ones(2), []
        evaluate_once(lambda: (kept.append(w * 2), w.sum())[1], [w])
        for use in (lambda: torch.stack([w, kept[0]]).sum(), lambda: torch.add(w, other=kept[0]).sum()):
            with pytest.raises(DerivativeError, match="earlier evaluation"):
                evaluate_once(use, [w])

    def test_a_running_baseline_in_a_buffer(self):
        w, baseline = torch.ones(3), torch.zeros(())

        def closure():
            baseline.mul_(0.9).add_(w.sum(), alpha=0.1)
            return w.sum() - baseline

        evaluate_once(closure, [w])
        with pytest.raises(DerivativeError, match="earlier evaluation"):
            evaluate_once(closure, [w])

    def test_a_buffer_that_is_written_into_by_parts(self):
        w, cache = torch.ones(3), torch.zeros(2, 3)

        def closure():
            cache[0] = w * 2
            return cache.sum()

        evaluate_once(closure, [w])
        with pytest.raises(DerivativeError, match="earlier evaluation"):
            evaluate_once(closure, [w])

    def test_a_workspace_that_is_overwritten_each_time(self):
        w, space = torch.ones(3), torch.zeros(3)

        def closure():
            space[:] = w * 2
            torch.mul(w, 3, out=space)
            space.copy_(w * 4)
            return (space * w).sum()

        for _ in range(2):
            assert torch.equal(slope(closure, [w]), 8 * w)

    def test_a_cache_of_a_function_of_parameters(self):
        w, cache = torch.ones(3), {}
        closure = lambda: (cache.setdefault("y", w.exp()) * w).sum()  # noqa: E731
        with pytest.raises(DerivativeError, match="earlier evaluation"):
            jp.evaluate(closure, [w], jp.Directions(k=2), "none", chunk=1)

    def test_caches_of_what_carried_no_derivatives(self):
        w, cache, x = torch.ones(3), {}, torch.randn(3, 3)

        def closure():
            if not cache:
                cache["adjacency"] = x / x.sum(0)
                cache["mask"] = w > 0
                cache["statistics"] = w.detach().mean()
                with torch.no_grad():
                    cache["norm"] = w.norm()
                cache["order"] = w.argsort()
                cache["noise"] = torch.rand_like(w)
            return (cache["adjacency"] @ w[cache["order"]] * cache["mask"]).sum() * cache["norm"] + cache["statistics"]

        for _ in range(2):
            slope(closure, [w])

    def test_uses_without_derivatives(self):
        w, kept = torch.ones(3), []

        def closure():
            if kept:
                last = kept[-1]
                assert last.shape == (3,) and last.dtype == torch.float32 and len(last) == 3
                assert last.tolist() == [2, 2, 2] and (last > 1).all() and f"{last}"
                assert torch.zeros_like(last).sum() == 0
                with torch.no_grad():
                    assert (last - w).norm() > 0
            kept.append(w * 2)
            return kept[-1].sum()

        for _ in range(2):
            evaluate_once(closure, [w])

    def test_losses_that_are_kept_are_averaged_outside(self):
        w, losses = nn.Parameter(torch.ones(3)), []
        opt = jp.optim.FGD([w], lr=0.01)
        for _ in range(3):
            opt.step(lambda: (losses.append((w**2).sum()), losses[-1])[1])
            assert torch.stack(losses).mean() > 0 and float(losses[-1]) > 0

    @pytest.mark.parametrize("kind", ["batch norm", "pruned", "weight norm", "spectral norm", "old weight norm"])
    def test_layers_that_hold_tensors_from_call_to_call(self, kind):
        layer = nn.Linear(3, 4)
        if kind == "pruned":
            l1_unstructured(layer, "weight", amount=0.5)
        elif kind == "weight norm":
            nn.utils.parametrizations.weight_norm(layer)
        elif kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(layer)
        elif kind == "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(layer)
        net, x = nn.Sequential(layer, nn.BatchNorm1d(4)), torch.randn(6, 3)
        for _ in range(2):
            evaluate_once(lambda: net(x).square().mul(torch.arange(4)).sum(), list(net.parameters()))
        held = io.BytesIO()
        torch.save(net.state_dict(), held)
        if kind not in ("weight norm", "spectral norm"):  # torch refuses to copy these in whole
            copy.deepcopy(net)
        net(x).square().sum().backward()

    def test_another_tensor_in_the_place_of_one_that_is_gone(self):
        """The memory of a tensor that raised is used again: identities must not be mixed up."""
        w, kept = torch.ones(3), []
        for _ in range(200):
            evaluate_once(lambda: (kept.append(w * 2), w.sum())[1], [w])
            kept.clear()
            fresh = [torch.ones(3) for _ in range(5)]
            evaluate_once(lambda: sum(fresh, w * 1).sum(), [w])  # noqa: B023


class TestGradientHooks:
    @pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_of_parameters_are_announced_once(self, register):
        w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        getattr(w, register)(lambda g: None)
        opt = jp.optim.FGD([w, other], lr=0.1)
        closure = lambda: (w**2).sum() + other.sum()  # noqa: E731
        with pytest.warns(JetplaneWarning, match=r"hooks do not run.*1 parameter\(s\) have some, of shape \(3,\)"):
            opt.step(closure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.step(closure)
            evaluate_once(closure, [w, other])

    def test_removed_ones_are_not(self):
        w = nn.Parameter(torch.ones(3))
        w.register_hook(lambda g: 0 * g).remove()
        evaluate_once(lambda: (w**2).sum(), [w])

    @pytest.mark.parametrize("way", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    @pytest.mark.parametrize("keywords", [False, True])
    def test_of_modules_are_announced_once(self, way, keywords):
        net, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.ones(1, 3)
        getattr(net[0], way)(lambda module, *grads: None)
        closure = (lambda: net[0](input=x).sum()) if keywords else lambda: net(x).sum()
        with pytest.warns(JetplaneWarning, match="backward hooks do not run in forward mode, and Linear has some"):
            evaluate_once(closure, list(net.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate_once(closure, list(net.parameters()))

    def test_of_activations_are_announced(self):
        w = torch.ones(3)

        def closure():
            h = w * 2
            h.retain_grad()
            h.register_hook(lambda g: 0 * g).remove()
            return h.sum()

        with pytest.warns(JetplaneWarning) as heard:
            assert torch.equal(slope(closure, [w]), torch.full((3,), 2.0))
        assert [str(m.message).partition("()")[0] for m in heard] == ["retain_grad", "register_hook"]
        assert all(m.filename == __file__ for m in heard)


class TestResultsAreOrdinary:
    def test_of_nested_evaluations(self):
        w, x = vector(3), vector(3)
        inner = []

        def closure():
            plane = jp.evaluate(lambda: (w * x**3).sum(), [x], [torch.eye(3, dtype=torch.float64)])
            inner.append(plane)
            return plane.slope.sum() + plane.curvature.sum() + plane.value

        plane = jp.evaluate(closure, [w], [torch.eye(3, dtype=torch.float64)])
        torch.testing.assert_close(plane.slope, 3 * x**2 + 6 * x + x**3)
        for model in (plane, *inner):
            assert {type(t) for t in (model.value, model.slope, model.curvature)} == {Tensor}
        torch.testing.assert_close(inner[0].slope, 3 * w * x**2)

    @pytest.mark.parametrize("way", ["evaluate", "jet"])
    def test_a_jet_of_another_threads_evaluation_is_refused(self, way):
        w, u, x = torch.ones(3), torch.ones(3), torch.ones(3)
        jets, made, used = [], threading.Event(), threading.Event()

        def one():
            evaluate_once(lambda: (jets.append(w * 2), made.set(), used.wait(10), (w * w).sum())[-1], [w])

        thread = threading.Thread(target=one)
        thread.start()
        made.wait(10)
        try:
            with pytest.raises(DerivativeError, match="another thread"):
                if way == "evaluate":
                    jp.evaluate(lambda: (u * jets[0]).sum(), [u], [torch.ones(1, 3)])
                else:
                    jp.jet(lambda z: z * jets[0], x, torch.ones(1, 3))
        finally:
            used.set()
            thread.join()
        assert type(jets[0]) is Tensor


def constants(w, x):
    """Constructors take the numbers of tensors, one by one or together."""
    several = torch.tensor([w.detach().sum()]) + torch.as_tensor([w.detach()[0], 1.0]).double()
    return (torch.tensor([[w.detach().norm()]]) * w.sum() + w.new_tensor(w) @ w + several.sum() * w[1]).square().sum()


def copied(w, x):
    torch.manual_seed(0)
    net = nn.Linear(4, 1).double()
    net.weight = nn.Parameter(w.detach()[None])
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    torch.save({"w": w * 2, "net": net.state_dict()}, io.BytesIO())
    return sum((each(x) * (x @ w)).square().mean() for each in copies)


def assigned(w, x):
    """To the data of another tensor: the value alone."""
    net = nn.Linear(4, 1).double()
    nn.utils.vector_to_parameters(torch.cat([w * 2, w[:1]]), net.parameters())
    return (net(x).detach() * (x @ w)).square().mean()


class TestConstants:
    """What makes a constant of a tensor stops its derivatives, as it does for autograd."""

    @pytest.mark.filterwarnings("ignore:.*copy construct from a tensor:UserWarning")
    @pytest.mark.parametrize("loss", [constants, copied, assigned], ids=lambda f: f.__name__)
    def test_values_alone(self, loss):
        torch.manual_seed(0)
        w, x = torch.randn(4).double().requires_grad_(), torch.randn(6, 4).double()
        closure = lambda: loss(w, x)  # noqa: E731
        expected = torch.autograd.grad(closure(), w)[0]
        eye = torch.eye(4).double()
        torch.testing.assert_close(jp.evaluate(closure, [w], [eye], "none").slope, expected)
        for seed in range(3):
            assert jp.audit(closure, [w], seed=seed).verdict == "agrees"

    @pytest.mark.parametrize(
        "use",
        [
            lambda w: torch.DoubleTensor([(w * 2).sum()]).sum(),
            lambda w: nn.Parameter(w * 2).sum(),
            lambda w: torch.tensor((w * 2).storage().tolist()).sum(),
            lambda w: torch.masked.masked_tensor(w * 2, w > 0).sum().get_data(),
            lambda w: setattr(w, "data", w.data * 0.5) or w.sum(),
            lambda w: setattr(w, "data", torch.zeros(4).double()) or w.sum(),
        ],
    )
    @pytest.mark.filterwarnings(
        "ignore:.*TypedStorage:UserWarning",
        "ignore:.*Converting a tensor:UserWarning",
        "ignore:.*MaskedTensors:UserWarning",
    )
    def test_what_cannot_be_followed_is_told(self, use):
        w = torch.ones(4).double()
        opt = jp.optim.FGD([nn.Parameter(w)], lr=0.1)
        moved = opt.param_groups[0]["params"][0]
        with pytest.raises(DerivativeError, match="detach|computes? another|Replace"):
            jp.evaluate(lambda: use(w) + w.sum(), [w], jp.Directions(1))
        with pytest.raises(DerivativeError):
            opt.step(lambda: use(moved) + moved.sum())
        assert bool((moved == 1).all())

    def test_a_parameter_is_a_loss(self):
        w = nn.Parameter(torch.ones(1))
        assert jp.evaluate(lambda: w, [w], [torch.ones(1, 1)], "none").slope.item() == 1
        assert jp.audit(lambda: w, [w]).verdict == "agrees"


class TestPlainRuns:
    """Runs without jets beside the evaluations: they must not launder what an evaluation would refuse."""

    def test_what_the_users_no_grad_computes_may_be_kept(self):
        """As spectral normalization does in training mode, and the averaged weights of a teacher."""
        torch.manual_seed(0)
        for norm in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
            net = nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 1))).double()
            teacher, x = copy.deepcopy(net[2]), torch.randn(6, 3).double()

            def closure(net=net, teacher=teacher, x=x):
                with torch.no_grad():
                    for a, b in zip(teacher.parameters(), net[2].parameters(), strict=True):
                        a.mul_(0.9).add_(b, alpha=0.1)
                    target = teacher(torch.ones(1, 4).double())
                return F.mse_loss(net(x), target.expand(6, 1))

            params = list(net.parameters())
            before = copy.deepcopy([net.state_dict(), teacher.state_dict()])
            assert jp.audit(closure, params).verdict == "agrees"
            for state, now in zip(before, (net.state_dict(), teacher.state_dict()), strict=True):
                assert all(torch.equal(state[name], t) for name, t in now.items())
            for opt in (
                jp.optim.FoMoHKD(params, k=2, lr=1e-3, descent="saddle-free"),
                jp.optim.PlaneSearch(params, net),
            ):
                for _ in range(2):
                    opt.step(closure)

    def test_assignments_to_data_are_set_back(self):
        w, teacher = torch.ones(3), torch.zeros(3)

        def closure():
            teacher.data = 0.9 * teacher.data + 0.1 * w.data
            return (w * (1 + teacher)).sum()

        memory = teacher.data_ptr()
        assert jp.audit(closure, [w]).verdict == "agrees"
        assert bool((teacher == 0).all()) and teacher.data_ptr() == memory

    def test_a_tensor_that_gets_other_memory_is_set_back(self):
        w, table = torch.ones(3), torch.arange(2.0)

        def closure():
            table.resize_(4).fill_(2.0)
            torch.tensor([]).set_(torch.ones(2))
            return (w * table[0]).sum()

        assert jp.audit(closure, [w]).verdict == "agrees"
        assert table.tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("pred", [True, False])
    def test_higher_order_operators(self, pred):
        net = nn.Linear(3, 1)
        x, y = torch.randn(5, 3), torch.randn(5, 1)
        flag = torch.tensor(pred)
        closure = lambda: F.mse_loss(torch.cond(flag, lambda a: net(a).sin(), lambda a: net(a).cos(), (x,)), y)  # noqa: E731
        assert jp.audit(closure, list(net.parameters())).verdict == "agrees"
        jp.optim.PlaneSearch(net.parameters(), net).step(closure)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    def test_copies_of_a_model_that_is_perturbed(self, copied):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        x = torch.randn(6, 3)
        opt = jp.optim.PlaneSearch(net.parameters(), net)
        for _ in range(2):
            opt.step(lambda: F.mse_loss(net(x), copied(net)(x).detach() + 1))

    def test_a_cache_that_the_measurement_of_memory_fills(self):
        w, cache = torch.ones(3), {}

        def closure():
            if not cache:
                cache["y"] = w.exp()
                cache["data"] = torch.arange(3.0)
            return (cache["y"] * w * cache["data"]).sum()

        with pytest.raises(DerivativeError, match="earlier evaluation"):
            jp.evaluate(closure, [w], jp.Directions(k=2), "none", chunk="auto")
        assert type(cache["y"]) is Tensor and not cache["y"].requires_grad

    def test_a_hidden_state_in_a_search_along_the_step(self):
        cell, read, x, held = TestEnteringLater.state()
        params = [*cell.parameters(), *read.parameters()]
        opt = jp.optim.PlaneSearch(
            params, subspace=[jp.sources.Drawn(2), jp.sources.Averages(), jp.sources.PreviousStep()]
        )

        def closure():
            held["h"] = cell(x, held["h"])
            return F.mse_loss(read(held["h"]), torch.zeros(4, 1))

        with pytest.raises(DerivativeError, match="earlier evaluation"):
            for _ in range(2):
                opt.step(closure)

    def test_buffers_and_data_stay_what_they_are(self):
        net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), torch.randn(8, 3)
        opt = jp.optim.PlaneSearch(
            net.parameters(), net, subspace=[jp.sources.Drawn(2), jp.sources.Averages(), jp.sources.PreviousStep()]
        )
        kept = []

        def closure():
            loss = F.mse_loss(net(x), torch.zeros(8, 1))
            kept.append((loss.item(), loss.detach(), x * 2))
            return loss

        for _ in range(2):
            opt.step(closure)
        jp.evaluate(closure, list(net.parameters()), jp.Directions(k=4), "none", chunk="auto")
        assert all(type(t) is Tensor for t in kept[-1][1:])

    def test_a_profiler_that_refers_to_tensors_is_a_typed_error(self):
        net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(3)
        expected = jp.laplacian(net, x)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities):
            assert torch.equal(jp.laplacian(net, x), expected)
        profiled = torch.profiler.profile(activities=activities, record_shapes=True)
        with profiled, pytest.raises(DerivativeError, match="record_shapes=True; profile without it"):
            jp.laplacian(net, x)
        assert torch.equal(jp.laplacian(net, x), expected)
