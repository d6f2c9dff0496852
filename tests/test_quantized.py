"""Models in few bits: quantized weights are constants, and rounding has the derivative that is chosen."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.testing import central_differences, grad_of_grad

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore::DeprecationWarning")

GRID = 0.25  # of values that are quantized in tests


def tangents(params: list[Tensor], k: int = 2) -> list[Tensor]:
    return [torch.randn(k, *p.shape, dtype=p.dtype) for p in params]


def dynamic(layer: nn.Module, dtype: torch.dtype = torch.qint8) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype)


def same(found: jp.PlaneModel, wanted: jp.PlaneModel, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(found.slope.double(), wanted.slope.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.curvature.double(), wanted.curvature.double(), rtol=tolerance, atol=tolerance)


def reverse(reference, params: list[Tensor], v: list[Tensor]) -> jp.PlaneModel:
    return grad_of_grad(reference, [p.requires_grad_() for p in params], v)


class TestPackedWeights:
    """Operators of compilers for weight-only layers: bilinear in the input and the scales."""

    def layer(self, bits: int):
        integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 64))
        scale = 0.01 * torch.rand(16) + 0.01
        if bits == 8:
            packed = integers.to(torch.int8)
            return lambda x, s: torch._weight_int8pack_mm(x, packed, s), integers, scale
        packed = torch._convert_weight_to_int4pack_for_cpu((integers + 8).to(torch.int32), 1)
        pairs = torch.stack([scale, torch.zeros(16)], -1).expand(2, 16, 2).contiguous()
        return lambda x, s: torch._weight_int4pack_mm_for_cpu(x, packed, 32, s), integers, pairs

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_input_and_scales_move(self, bits, curvature):
        layer, integers, scale = self.layer(bits)
        w, x = torch.rand(64), torch.randn(8, 64)
        target = torch.randn(8, 16)

        def reference() -> Tensor:
            if bits == 8:
                weight = integers * scale[:, None]
            else:  # a pair of scale and zero for each 32 inputs of each output
                s, z = (pair.repeat_interleave(32, 0).T for pair in scale.unbind(-1))
                weight = integers * s + z
            return F.mse_loss(F.linear((w * x).tanh(), weight), target)

        params, v = [w, scale], tangents([w, scale])
        found = jp.evaluate(lambda: F.mse_loss(layer((w * x).tanh(), scale), target), params, v, curvature)
        same(found, jp.evaluate(reference, params, v, curvature))

    def test_half_precision(self):
        packed, scale = torch.randint(-128, 128, (16, 64)).to(torch.int8), torch.full((16,), 0.01, dtype=torch.bfloat16)
        w, x = torch.rand(64, dtype=torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16)
        v = tangents([w])
        found = jp.evaluate(lambda: torch._weight_int8pack_mm(w * x, packed, scale).square().mean(), [w], v)
        wide = w.float()
        wanted = jp.evaluate(
            lambda: F.linear(wide * x.float(), packed * scale.float()[:, None]).square().mean(), [wide], [v[0].float()]
        )
        assert found.slope.dtype == torch.float32
        torch.testing.assert_close(found.slope, wanted.slope, rtol=0.03, atol=0.03 * float(wanted.slope.abs().max()))


class TestDynamicLayers:
    def case(self):
        torch.manual_seed(0)
        layer = nn.Linear(64, 16)
        return dynamic(layer)[0], torch.rand(64) + 0.5, torch.randn(8, 64)

    def test_nothing_chosen_is_refused_with_the_remedy(self):
        layer, w, x = self.case()
        with pytest.raises(jp.DerivativeError, match=r"linear_dynamic.*jetplane.quantization\('straight-through'\)"):
            jp.evaluate(lambda: layer(w * x).square().mean(), [w], tangents([w]))

    def test_one_branch_of_two_is_refused_too(self):
        layer, w, x = self.case()
        with pytest.raises(jp.DerivativeError, match="quantizes values"):
            jp.evaluate(lambda: (w * x).mean() + layer(w * x).square().mean(), [w], tangents([w]))

    def test_constant_inputs_need_no_choice(self):
        layer, w, x = self.case()
        plane = jp.evaluate(lambda: (w[:16] * layer(x)).sum(), [w], tangents([w]))
        assert torch.isfinite(plane.slope).all()

    @pytest.mark.parametrize("relu", [False, True])
    def test_straight_through_is_the_layer_without_rounding_at_the_rounded_value(self, relu):
        layer, w, x = self.case()
        weight, bias = layer.weight().dequantize(), layer.bias().detach()
        packed = layer._packed_params._packed_params
        op = torch.ops.quantized.linear_relu_dynamic if relu else torch.ops.quantized.linear_dynamic

        def reference() -> Tensor:
            y = F.linear(w * x, weight, bias)
            y = y + (torch.ops.quantized.linear_dynamic((w * x).detach(), packed) - y).detach()
            return (y.relu() if relu else y).sin().sum()

        v = tangents([w])
        with jp.quantization("straight-through"):
            found = jp.evaluate(lambda: op(w * x, packed).sin().sum(), [w], v)
        same(found, reverse(reference, [w], v))

    def test_exact_is_what_differences_show_between_two_jumps(self):
        layer, _, x = self.case()
        low, high = float(x.min()), float(x.max())
        x = (((x - low) / (high - low) * 255).round() - 120) / 255  # in the middle of the cells of any range like it
        a = torch.tensor([1.3])
        with jp.quantization("exact"):
            found = jp.evaluate(lambda: layer(a * x).double().sin().sum(), [a], [torch.ones(1, 1)])

        def at(h: float) -> float:
            return float(layer((a + h) * x).double().sin().sum())

        slope = (at(1e-2) - at(-1e-2)) / 2e-2
        torch.testing.assert_close(found.slope.item(), slope, rtol=1e-3, atol=1e-2)

    def test_half_precision_weights_need_no_choice(self):
        layer, w, x = dynamic(nn.Linear(64, 16), torch.float16)[0], torch.rand(64), torch.randn(8, 64)
        v = tangents([w])
        weight, bias = layer.weight(), layer.bias().detach()
        found = jp.evaluate(lambda: layer(w * x).sin().sum(), [w], v)
        same(found, reverse(lambda: F.linear(w * x, weight, bias).sin().sum(), [w], v), 1e-2)


class TestFakeQuantization:
    def setup_method(self):
        torch.manual_seed(0)
        self.x = torch.randn(16, 6, dtype=torch.float64)
        self.w = torch.rand(6, dtype=torch.float64) + 0.5
        self.v = tangents([self.w])

    def test_nothing_chosen_is_refused(self):
        with pytest.raises(jp.DerivativeError, match="fake_quantize_per_tensor_affine"):
            jp.evaluate(
                lambda: torch.fake_quantize_per_tensor_affine(self.w * self.x, GRID, 0, -8, 7).sum(), [self.w], self.v
            )

    def test_straight_through_is_torchs_gradient(self):
        w = self.w.requires_grad_()
        zeros = torch.zeros(6, dtype=torch.int32)
        scales = torch.rand(6) + 0.1
        for quantize in (
            lambda t: torch.fake_quantize_per_tensor_affine(t, GRID, 1, -8, 7),
            lambda t: torch.fake_quantize_per_tensor_affine(
                t, torch.tensor(GRID), torch.tensor(1, dtype=torch.int32), -8, 7
            ),
            lambda t: torch.fake_quantize_per_channel_affine(t.float(), scales, zeros, 1, -8, 7),
        ):
            loss = lambda q=quantize: q(w * self.x).sin().sum()  # noqa: E731
            wanted = torch.autograd.grad(loss(), w)[0]
            with jp.quantization("straight-through"):
                found = jp.evaluate(loss, [w], self.v, "none")
            torch.testing.assert_close(found.slope.double(), self.v[0] @ wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("channels", [False, True])
    def test_scale_and_zero_point_that_are_learned(self, channels):
        n = 6 if channels else 1
        scale, zero = (torch.rand(n) + 0.1).requires_grad_(), torch.full((n,), 1.0).requires_grad_()
        x = self.x.float().requires_grad_()

        def loss() -> Tensor:
            if channels:
                return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 1, -4, 3, 0.5).sin().sum()
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -4, 3, 0.5).sin().sum()

        params = [x, scale, zero]
        v, wanted = tangents(params), torch.autograd.grad(loss(), params)
        with jp.quantization("straight-through"):
            found = jp.evaluate(loss, params, v, "none")
        slope = sum((t.flatten(1) @ g.flatten() for t, g in zip(v, wanted, strict=True)), torch.zeros(2))
        torch.testing.assert_close(found.slope, slope, rtol=1e-4, atol=1e-3)

    def test_exact_has_the_derivative_of_the_scale_alone(self):
        scale = torch.tensor([GRID])
        x = GRID * torch.tensor([-2.0, 1.0, 3.0, 40.0]) + 0.01  # far from a jump
        zero = torch.zeros(1, dtype=torch.int32)
        loss = lambda: torch.fake_quantize_per_tensor_affine(x, scale, zero, -8, 7).square().sum()  # noqa: E731
        with jp.quantization("exact"):
            found = jp.evaluate(loss, [scale], [torch.ones(1, 1)])
        wanted = central_differences(loss, [scale], [torch.ones(1, 1)])
        torch.testing.assert_close(found.slope.item(), wanted.slope.item(), rtol=1e-3, atol=1e-3)
        assert found.slope.item() == pytest.approx(2 * GRID * (4 + 1 + 9 + 49), rel=1e-5)

    def test_observers_update_their_ranges_once(self):
        w, x = self.w.float(), self.x.float()
        fake = torch.ao.quantization.FusedMovingAvgObsFakeQuantize()
        v = [t.float() for t in self.v]
        with pytest.raises(jp.DerivativeError, match="quantizes values"):
            jp.evaluate(lambda: fake(w * x).sum(), [w], v)
        assert fake.activation_post_process.max_val.item() == -float("inf")
        with jp.quantization("straight-through"):
            found = jp.evaluate(lambda: fake(w * x).sum(), [w], v, "none")
        assert fake.activation_post_process.max_val.item() == pytest.approx((w * x).max().item())
        torch.testing.assert_close(found.slope, v[0] @ x.sum(0), rtol=1e-4, atol=1e-3)

    def test_round_passes_where_it_is_chosen(self):
        loss = lambda: ((self.w * self.x / GRID).round() * GRID).sum()  # noqa: E731
        with jp.quantization("straight-through"):
            found = jp.evaluate(loss, [self.w], self.v)
        torch.testing.assert_close(found.slope, self.v[0] @ self.x.sum(0))
        with pytest.raises(jp.UnusedParametersError):  # zero, as in reverse mode
            jp.evaluate(loss, [self.w], self.v)

    @pytest.mark.parametrize(
        "rounded",
        [
            lambda x: torch.floor(x / GRID + 0.5),
            lambda x: torch.ceil(x / GRID),
            lambda x: (x / GRID).trunc_(),
            lambda x: torch.div(x, GRID, rounding_mode="floor"),
            lambda x: torch.div(x, torch.full_like(x, GRID), rounding_mode="trunc"),
            lambda x: x // GRID,
        ],
    )
    def test_other_ways_to_round(self, rounded):
        """In a model where another path has a derivative of its own, so that a lost one would not be noticed."""
        loss = lambda: (rounded(self.w * self.x) * GRID + self.w * self.x).sum()  # noqa: E731
        with jp.quantization("straight-through"):
            found = jp.evaluate(loss, [self.w], self.v)
        torch.testing.assert_close(found.slope, 2 * self.v[0] @ self.x.sum(0))
        with jp.quantization("exact"):
            torch.testing.assert_close(jp.evaluate(loss, [self.w], self.v).slope, self.v[0] @ self.x.sum(0))


class TestIntegers:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
    def test_casts_to_few_bits_are_refused_unless_exact(self, dtype):
        w = torch.rand(4)
        loss = lambda: (w * 10).to(dtype).sum() + w.sum()  # noqa: E731
        for chosen in (None, "straight-through"):
            with pytest.raises(jp.DerivativeError, match="int"):
                with jp.quantization(chosen) if chosen else jp.strict():
                    jp.evaluate(loss, [w], [torch.ones(1, 4)])
        with jp.quantization("exact"):
            assert jp.evaluate(loss, [w], [torch.ones(1, 4)]).slope.item() == 4

    def test_casts_to_indices_are_constants(self):
        w, table = torch.rand(4), torch.arange(10.0)
        assert jp.evaluate(lambda: (table[(w * 9).long()] * w).sum(), [w], [torch.ones(1, 4)]).slope.item() >= 0

    def test_quantized_tensors_are_refused(self):
        w = torch.rand(4)
        with pytest.raises(jp.DerivativeError, match="quantize_per_tensor"):
            jp.evaluate(
                lambda: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8).dequantize().sum(), [w], [torch.ones(1, 4)]
            )


class TestChoice:
    def test_an_unknown_word(self):
        with pytest.raises(jp.ArgumentError, match="'straight-through' or 'exact', got 'ste'"):
            with jp.quantization("ste"):
                pass

    def test_it_ends_and_nests(self):
        w = torch.rand(4)
        quantized = lambda: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127)  # noqa: E731

        @jp.quantization("straight-through")
        def closure() -> Tensor:
            with jp.quantization("exact"):
                still = quantized()
            return (quantized() * still).sum()

        found = jp.evaluate(closure, [w], [torch.ones(1, 4)])
        assert found.slope.item() == pytest.approx(quantized().sum().item())
        with pytest.raises(jp.DerivativeError):
            jp.evaluate(lambda: quantized().sum(), [w], [torch.ones(1, 4)])

    def test_threads_of_the_closure_take_it_over(self):
        w, found = torch.rand(4), []

        def closure() -> Tensor:
            def work() -> None:
                found.append(torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return found.pop().sum()

        with jp.quantization("straight-through"):
            assert jp.evaluate(closure, [w], [torch.ones(1, 4)]).slope.item() == pytest.approx(4)

    def test_an_optimizer_trains_norms_of_a_quantized_model_and_its_audit_does_not_object(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 3))
        x = torch.randn(128, 8)
        y = x[:, :3].argmax(1)
        small = dynamic(model)
        params = [p for m in small.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
        opt = jp.optim.PlaneSearch(params, subspace=[jp.sources.Drawn(8), jp.sources.PreviousStep()])
        with jp.quantization("straight-through"):
            losses = [float(opt.step(lambda: F.cross_entropy(small(x), y))) for _ in range(15)]
        assert losses[-1] < 0.9 * losses[0]


class TestTorchao:
    """Weights that are tensors of a class of torchao's."""

    @pytest.fixture
    def case(self):
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

        def make(name: str, **options):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 16))
            quantization.quantize_(model, getattr(quantization, name)(**options))
            return model, torch.randn(8, 64), list(model[1].parameters())

        return make

    def reference(self, model: nn.Sequential, x: Tensor):
        """The same with dequantized weights."""
        plain = nn.Sequential(nn.Linear(64, 32), model[1], nn.Tanh(), nn.Linear(32, 16)).requires_grad_(False)
        for n in (0, 3):
            plain[n].weight.copy_(model[n].weight.dequantize())
            plain[n].bias.copy_(model[n].bias)
        return lambda: plain(x).sin().sum()

    def test_weights_in_few_bits_are_constants(self, case):
        for name, options in (("Int8WeightOnlyConfig", {}), ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4})):
            model, x, params = case(name, **options)
            v = tangents(params)
            same(
                jp.evaluate(lambda m=model, x=x: m(x).sin().sum(), params, v),
                jp.evaluate(self.reference(model, x), params, v),
            )

    def test_a_scale_moves(self, case):
        model, x, _ = case("Int8WeightOnlyConfig")
        scale, v = model[3].weight.scale, tangents([model[3].weight.scale])
        entering = model[:3](x).detach()
        integers = model[3].weight.qdata.float()
        found = jp.evaluate(lambda: model(x).sin().sum(), [scale], v)
        wanted = jp.evaluate(lambda: F.linear(entering, integers * scale, model[3].bias).sin().sum(), [scale], v)
        same(found, wanted)

    def test_quantized_inputs_pass_straight_through_where_it_is_chosen(self, case):
        model, x, params = case("Int8DynamicActivationInt8WeightConfig")
        v, loss = tangents(params), lambda: model(x).square().sum()
        with pytest.raises(jp.DerivativeError, match="Int8Tensor"):
            jp.evaluate(loss, params, v)
        with pytest.raises(jp.DerivativeError, match="straight-through"), jp.quantization("exact"):
            jp.evaluate(loss, params, v)
        plain = nn.Linear(32, 16).requires_grad_(False)
        plain.weight.copy_(model[3].weight.dequantize())
        plain.bias.copy_(model[3].bias)

        def reference() -> Tensor:
            h = model[2](model[1](model[0](x)))
            y = plain(h)
            return (y + (model[3](h.detach()) - y).detach()).square().sum()

        with jp.quantization("straight-through"):
            found = jp.evaluate(loss, params, v)
        same(found, reverse(reference, params, v))
