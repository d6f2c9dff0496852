"""What models and batches `jetplane.Adapter` takes, what it refuses, and that it changes nothing of a model."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import jetplane as jp
from jetplane import adaptation
from jetplane.adaptation import channel_axis, moments
from jetplane.errors import CheckpointError, JetplaneWarning

SOURCE, BATCH = torch.randn(128, 8, generator=torch.Generator().manual_seed(0)), 2 * torch.randn(
    64, 8, generator=torch.Generator().manual_seed(1)
) + 1  # fmt: skip


def mlp(norm=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), norm or nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def cnn(norm=None):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


class Calls(nn.Module):
    """A model whose forward pass is a function of itself and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)
        self.eval()

    def forward(self, x):
        return self.function(self, x)


def distance(adapter, batch):
    """|r|^2 without what enters the first module, which nothing changes."""
    with torch.no_grad():
        r = adapter._shift(adapter.offsets, batch)[1]
    return float(r[2 * len(adapter._source[0].mean) :].square().sum())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("make", [mlp, cnn])
    def test_models_of_other_precision(self, make, dtype):
        """What is measured and solved is as of the model in single precision, within the rounding of the model."""
        torch.manual_seed(1)
        source, batch = (SOURCE, BATCH) if make is mlp else (torch.randn(64, 3, 9, 9), 2 * torch.randn(32, 3, 9, 9) + 1)
        wanted, adapter = jp.Adapter(make(), source), jp.Adapter(make().to(dtype), source.to(dtype))
        start = distance(adapter, batch.to(dtype))
        for _ in range(3):
            logits, other = adapter(batch.to(dtype)), wanted(batch)
        assert logits.dtype == dtype
        assert adapter.offsets.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert distance(adapter, batch.to(dtype)) < start
        torch.testing.assert_close(logits.float(), other, rtol=0.05, atol=0.05)

    def test_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapter = jp.Adapter(mlp(), SOURCE)
            logits = adapter(BATCH)
        assert logits.dtype == torch.bfloat16 and adapter.offsets.dtype == torch.float32
        torch.testing.assert_close(logits.float(), jp.Adapter(mlp(), SOURCE)(BATCH), rtol=0.05, atol=0.05)


class TestCalls:
    def test_a_layer_that_is_not_called_is_left_out_with_a_warning(self):
        model = Calls(lambda m, x: m.body(x), body=mlp(), spare=nn.LayerNorm(4))
        with pytest.warns(JetplaneWarning, match="does not call it: 'spare'"):
            adapter = jp.Adapter(model, SOURCE)
        assert adapter.layers == [model.body[1]]
        assert torch.equal(adapter(BATCH), jp.Adapter(mlp(), SOURCE)(BATCH))
        with pytest.raises(jp.ArgumentError, match="layers: 'spare' is not called"):
            jp.Adapter(model, SOURCE, layers=[model.body[1], model.spare])
        with pytest.raises(jp.ArgumentError, match="watched: 'spare' is not called"):
            jp.Adapter(model, SOURCE, layers=[model.body[1]], watched=[model.spare])
        with pytest.raises(jp.ArgumentError, match="none of the normalization layers is called"):
            jp.Adapter(model, SOURCE, layers=[model.spare])

    def test_each_call_of_a_shared_layer_counts(self):
        torch.manual_seed(0)
        norm, seen = nn.LayerNorm(8), []

        def forward(m, x):
            for _ in range(2):
                x = norm(m.a(x).relu() * 3)
                seen.append(x)
            return m.h(x)

        adapter = jp.Adapter(Calls(forward, a=nn.Linear(8, 8), norm=norm, h=nn.Linear(8, 3)), SOURCE)
        assert len(adapter._targets) == 2 and adapter.layers == [norm] and len(adapter.offsets) == 32
        assert not torch.allclose(adapter._targets[0].mean, adapter._targets[1].mean, atol=0.05)
        seen.clear()
        adapter.predicted(BATCH)
        for x, target in zip(seen, adapter._targets, strict=True):
            mean, deviation = moments(norm, x)
            torch.testing.assert_close(mean, target.mean, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(deviation, target.deviation, rtol=1e-3, atol=1e-3)
        start = distance(adapter, BATCH)
        for _ in range(3):
            adapter(BATCH)
        assert distance(adapter, BATCH) < 0.9 * start

    @pytest.mark.parametrize("few", [0, 2])
    def test_calls_that_depend_on_the_batch_are_refused(self, few):
        def forward(m, x):
            for _ in range(1 if len(x) > 100 else few):
                x = m.norm(x)
            return m.body(x)

        adapter = jp.Adapter(Calls(forward, norm=nn.LayerNorm(8), body=mlp()), SOURCE)
        with pytest.raises(jp.ArgumentError, match="in another order, or not as often"):
            adapter(BATCH)

    def test_watched_calls_that_depend_on_the_batch_are_refused(self):
        model = Calls(lambda m, x: m.body(x if len(x) > 100 else m.a(x)), a=nn.Linear(8, 8), body=mlp())
        with pytest.raises(jp.ArgumentError, match="watched modules are called in another order"):
            jp.Adapter(model, SOURCE)(BATCH)

    def test_what_is_cut_from_the_statistics(self):
        body = mlp()
        with pytest.raises(jp.DerivativeError, match="outside of torch.no_grad"):
            jp.Adapter(Calls(lambda m, x: torch.no_grad()(m.body)(x), body=body), SOURCE)
        model = Calls(lambda m, x: m.top(torch.no_grad()(m.body)(x)), body=body, top=nn.LayerNorm(3))
        with pytest.warns(JetplaneWarning, match=r"moves none of the statistics that are compared: 'body.1'"):
            jp.Adapter(model, SOURCE)(BATCH)

    def test_axes_of_channels(self):
        class Channels(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.movedim(1, -1)).movedim(-1, 1)

        image, tokens = torch.zeros(2, 6, 5, 4), torch.zeros(2, 5, 6)
        for module, x, axis in [
            (nn.BatchNorm2d(6), image, 1), (nn.GroupNorm(2, 6), image, 1), (nn.InstanceNorm2d(6), image, 1),
            (nn.BatchNorm1d(5), tokens, 1), (nn.LayerNorm(4), image, -1), (Channels(6), image, 1),
            (nn.LayerNorm([6, 5, 4]), image, 1), (nn.RMSNorm(6), tokens, -1), (nn.Conv1d(5, 3, 3), tokens, 1),
            (nn.Conv2d(6, 3, 3), image, 1), (nn.Linear(4, 3), image, -1), (nn.Linear(6, 3), tokens, -1),
            (None, image, 1), (None, tokens, -1), (nn.BatchNorm1d(6), torch.zeros(2, 6), -1),
        ]:  # fmt: skip
            assert channel_axis(module, x) == axis, module

    @pytest.mark.parametrize(
        "norm", [nn.LayerNorm(16, elementwise_affine=False), nn.RMSNorm(16), nn.BatchNorm1d(16, affine=False),
                 nn.BatchNorm1d(16, track_running_stats=False), nn.GroupNorm(4, 16, affine=False)],
    )  # fmt: skip
    def test_layers_without_parameters(self, norm):
        adapter = jp.Adapter(mlp(norm), SOURCE)
        start = distance(adapter, BATCH)
        for _ in range(3):
            adapter(BATCH)
        assert distance(adapter, BATCH) < start

    def test_torch_s_encoder_shows_its_layers(self):
        """Whose fused kernel would call none of them."""
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        model = Calls(lambda m, x: m.head(m.encoder(x).mean(1)), encoder=encoder, head=nn.Linear(8, 3))
        adapter = jp.Adapter(model, torch.randn(64, 5, 8))
        assert len(adapter.layers) == 4
        assert adapter(2 * torch.randn(32, 5, 8)).shape == (32, 3)


class TestFrozen:
    def test_training_mode_is_refused_and_nothing_moves(self):
        model = cnn().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(jp.ArgumentError, match=r"training mode .*expected model.eval"):
            jp.Adapter(model, torch.randn(64, 3, 9, 9))
        adapter = jp.Adapter(model.eval(), torch.randn(64, 3, 9, 9))
        adapter(torch.randn(32, 3, 9, 9))
        model[1].train()
        for call in (adapter, adapter.predicted):
            with pytest.raises(jp.ArgumentError, match=r"training mode \(1\)"):
                call(torch.randn(32, 3, 9, 9))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_changed_model_is_refused(self):
        model = mlp()
        adapter = jp.Adapter(model, SOURCE)
        for change in (lambda: model[0].weight.data.mul_(2), lambda: model.load_state_dict(mlp().state_dict())):
            adapter(BATCH)
            with torch.no_grad():
                change()
            for other in (adapter, adapter.predicted, adapter.restarted()):
                with pytest.raises(jp.ArgumentError, match=r"model was changed .*weight"):
                    other(BATCH)
            adapter = jp.Adapter(model, SOURCE)
        with pytest.raises(jp.ArgumentError, match="model was changed"):
            model.double()
            adapter(BATCH.double())

    def test_a_forward_pass_that_changes_a_buffer_is_refused(self):
        def forward(m, x):
            m.ranges.copy_(x.amax())
            return m.body(x)

        model = Calls(forward, body=mlp())
        model.register_buffer("ranges", torch.zeros(()))
        with pytest.raises(jp.ArgumentError, match=r"\(ranges\).* changes a buffer"):
            jp.Adapter(model, SOURCE)

    def test_a_model_that_writes_to_its_input(self):
        model, batch = Calls(lambda m, x: m.body(x.mul_(0.5)), body=mlp()), BATCH.clone()
        adapter = jp.Adapter(model, SOURCE.clone())
        logits = adapter(batch)
        assert torch.equal(batch, BATCH)
        assert torch.equal(logits, jp.Adapter(mlp(), 0.5 * SOURCE)(0.5 * BATCH))

    def test_other_threads_see_the_model_as_it_is(self):
        model, wrong, ended = mlp(), [], threading.Event()
        adapter = jp.Adapter(model, SOURCE)
        with torch.no_grad():
            plain = model(BATCH)

        def other():
            while not ended.is_set():
                with torch.no_grad():
                    wrong.extend([] if torch.equal(model(BATCH), plain) else [1])

        thread = threading.Thread(target=other)
        thread.start()
        for _ in range(20):
            adapter(BATCH)
        ended.set()
        thread.join()
        assert not wrong

    def test_compiled_models(self):
        compiled = torch.compile(mlp(), backend="eager")
        plain = compiled(BATCH)
        adapter = jp.Adapter(compiled, SOURCE)
        assert torch.equal(adapter(BATCH), jp.Adapter(mlp(), SOURCE)(BATCH))
        assert torch.equal(compiled(BATCH), plain)


class TestBatches:
    @pytest.mark.parametrize("size", [0, 1])
    def test_too_few_examples(self, size):
        adapter = jp.Adapter(mlp(), SOURCE)
        error = jp.ArgumentError if size == 0 else jp.ShapeError
        for call in (adapter, adapter.predicted, lambda x: jp.Adapter(mlp(), x)):
            with pytest.raises(error, match="the batch is empty" if size == 0 else "expected two values"):
                call(BATCH[:size])

    def test_sizes_may_change_and_one_image_of_many_pixels_can_be_predicted(self):
        adapter = jp.Adapter(cnn(), torch.randn(64, 3, 9, 9))
        for size in (16, 3, 40):
            assert adapter(torch.randn(size, 3, 9, 9)).shape == (size, 4)
        assert adapter(torch.randn(16, 3, 12, 11)).shape == (16, 4)
        assert adapter.predicted(torch.randn(1, 3, 9, 9)).isfinite().all()

    @pytest.mark.parametrize("first", [True, False])
    def test_nan_is_refused_and_forgotten(self, first):
        adapter, bad = jp.Adapter(mlp(), SOURCE), BATCH.clone()
        bad[3, 2] = torch.nan
        other = adapter.restarted()
        if not first:
            assert torch.equal(adapter(BATCH), other(BATCH))
        with pytest.raises(jp.NonFiniteError, match="a batch are NaN"):
            adapter(bad)
        assert torch.equal(adapter(BATCH), other(BATCH))
        with pytest.raises(jp.NonFiniteError, match="source data are NaN"):
            jp.Adapter(mlp(), bad)

    def test_dicts_in_and_out(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = mlp()

            def forward(self, *, pixels, scale=1.0):
                return {"logits": self.body(pixels * scale)}

        adapter = jp.Adapter(Named().eval(), {"scale": 1.0, "pixels": SOURCE})
        assert torch.equal(adapter({"pixels": BATCH}), jp.Adapter(mlp(), SOURCE)(BATCH))
        with pytest.raises(jp.ArgumentError, match="empty"):
            adapter({"pixels": BATCH[:0]})

    def test_models_of_transformers(self):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).eval()
        adapter, x = jp.Adapter(model, {"pixel_values": torch.randn(64, 3, 16, 16)}), 2 * torch.randn(16, 3, 16, 16)
        start = distance(adapter, {"pixel_values": x})
        assert len(adapter.layers) == 5 and adapter({"pixel_values": x}).shape == (16, 4)
        assert distance(adapter, x) < start

    def test_integers_in(self):
        body = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        model = Calls(lambda m, x: m.body(x).mean(1), body=body)
        adapter = jp.Adapter(model, torch.randint(20, (64, 7)))
        assert adapter(torch.randint(5, (32, 9))).shape == (32, 3)

    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            (lambda y: (y, y), jp.ArgumentError, "got tuple; wrap the model"),
            (lambda y: {"scores": y}, jp.ArgumentError, "a dict with 'logits'"),
            (lambda y: y.argmax(1), jp.ArgumentError, "expected logits"),
            (lambda y: y[:, :, None, None], jp.ShapeError, r"\(N, classes\)"),
        ],
    )
    def test_outputs_that_are_no_logits(self, change, error, said):
        with pytest.raises(error, match=said):
            jp.Adapter(Calls(lambda m, x: change(m.body(x)), body=mlp()), SOURCE)

    def test_what_is_no_batch(self):
        for wrong in ([SOURCE, torch.zeros(128)], SOURCE.numpy(), torch.utils.data.DataLoader(SOURCE)):  # type: ignore[arg-type]
            with pytest.raises(jp.ArgumentError, match="expected a tensor, or a dict"):
                jp.Adapter(mlp(), wrong)  # type: ignore[arg-type]

    def test_inference_mode_and_grad_mode_change_nothing(self):
        adapter = jp.Adapter(mlp(), SOURCE)
        plain = [adapter(BATCH), adapter(BATCH)]
        with torch.inference_mode():
            other = jp.Adapter(mlp(), SOURCE)
            assert torch.equal(other(BATCH), plain[0])
        logits = other(BATCH.clone().requires_grad_())
        assert torch.equal(logits, plain[1]) and not logits.requires_grad
        with torch.inference_mode():
            model, source = mlp(), SOURCE.clone()
        assert torch.equal(jp.Adapter(model, source)(BATCH), plain[0])

    def test_transforms_are_refused(self):
        with pytest.raises(jp.ArgumentError, match="use a loop"):
            torch.vmap(jp.Adapter(mlp(), SOURCE))(torch.randn(3, 64, 8))

    def test_channels_that_depend_on_the_batch(self):
        model = Calls(
            lambda m, x: x @ m.head.weight[: x.shape[1]] + m.norm(x).sum(), norm=nn.Softmax(1), head=nn.Linear(3, 9)
        )
        adapter = jp.Adapter(model, torch.randn(64, 8), layers=[model.norm])
        with pytest.raises(jp.ShapeError, match="norm: expected 8 channels, as on source data, got 7"):
            adapter(torch.randn(64, 7))

    @pytest.mark.parametrize("wrong", [{"damping": 0.0}, {"entropy_weight": -1.0}, {"damping": torch.nan}, {"k": 2.5}])
    def test_numbers_outside_their_domain(self, wrong):
        with pytest.raises(jp.ArgumentError, match=next(iter(wrong))):
            jp.Adapter(mlp(), SOURCE, **wrong)

    def test_memory(self, monkeypatch):
        monkeypatch.setattr(adaptation, "free_memory", lambda device: 1000)
        with pytest.raises(jp.ArgumentError, match=r"takes .* kB, of which 1 kB are free"):
            jp.Adapter(mlp(), SOURCE)


class TestState:
    def test_is_saved_and_loaded(self, tmp_path):
        model = mlp()
        for steps in (0, 2):
            adapter = jp.Adapter(model, SOURCE)
            for _ in range(steps):
                adapter(BATCH)
            torch.save(adapter.state_dict(), tmp_path / "adapter.pt")
            other = jp.Adapter(model, SOURCE)
            other(2 * BATCH)
            other.load_state_dict(torch.load(tmp_path / "adapter.pt", weights_only=True))
            assert torch.equal(adapter(BATCH), other(BATCH))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
    def test_copies_go_their_own_way(self, copied):
        adapter = jp.Adapter(mlp(), SOURCE, params=())
        adapter(BATCH)
        other = copied(adapter)
        assert other.model is not adapter.model
        assert torch.equal(adapter(BATCH), other(BATCH))
        other(3 * BATCH)
        assert not torch.equal(adapter.offsets, other.offsets)

    def test_other_states_are_refused(self):
        adapter = jp.Adapter(mlp(), SOURCE)
        with pytest.raises(CheckpointError, match="got the keys"):
            adapter.load_state_dict({"weights": torch.zeros(3)})
        with pytest.raises(CheckpointError, match=r"'offsets': expected shape \(32,\), got \(3,\)"):
            adapter.load_state_dict(adapter.state_dict() | {"offsets": torch.zeros(3)})


class Prompted(nn.Module):
    """Tokens with learned prompts, attention, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prompts = nn.Parameter(0.1 * torch.randn(2, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.prompts.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class TestParameters:
    source, batch = torch.randn(64, 4, 8), 2 * torch.randn(32, 4, 8) + 1

    def test_prompts_alone(self):
        model = Prompted().eval()
        before = model.prompts.detach().clone()
        adapter = jp.Adapter(model, self.source, layers=[], params=[model.prompts])
        start = distance(adapter, self.batch)
        for _ in range(4):
            logits = adapter(self.batch)
        assert distance(adapter, self.batch) < start
        assert torch.equal(model.prompts, before) and adapter.offsets.norm() > 0
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.prompts.add_(adapter.offsets.reshape(2, 8))
            torch.testing.assert_close(adapter.predicted(self.batch), other(self.batch))
        torch.testing.assert_close(logits, other(self.batch))
        adapter.reset()
        with torch.no_grad():
            torch.testing.assert_close(adapter.predicted(self.batch), model(self.batch))

    def test_the_step_is_that_of_differences(self):
        """The Gauss-Newton step of scales, shifts and prompts, with a Jacobian by central differences."""
        model = Prompted().eval().double()
        source = self.source.double()
        adapter = jp.Adapter(model, source, params=[model.prompts], damping=0.5)
        size = len(adapter.offsets)
        assert size == 2 * 8 + 16

        def r(offsets):
            return adapter._shift(offsets, source)[1]

        with torch.no_grad():
            axes = 1e-5 * torch.eye(size, dtype=torch.float64)
            j = torch.stack([(r(v) - r(-v)) / 2e-5 for v in axes], 1)
        gram = j.T @ j
        mu = 0.5 * gram.diagonal().mean()
        wanted = -torch.linalg.solve(gram + mu * torch.eye(size), j.T)
        torch.testing.assert_close(adapter._newton, wanted, rtol=1e-4, atol=1e-6)

    def test_beside_layers_and_in_half_precision(self):
        model = Prompted().eval().bfloat16()
        adapter = jp.Adapter(model, self.source.bfloat16(), params=[model.prompts])
        start = distance(adapter, self.batch.bfloat16())
        for _ in range(3):
            logits = adapter(self.batch.bfloat16())
        assert logits.dtype == torch.bfloat16 and adapter.offsets[16:].norm() > 0
        assert distance(adapter, self.batch.bfloat16()) < start

    def test_what_is_refused(self):
        model = Prompted().eval()
        model.register_buffer("small", torch.zeros(3, dtype=torch.int8))
        with pytest.raises(jp.ArgumentError, match=r"params\[0\]"):
            jp.Adapter(model, self.source, params=[model.prompts[:1]])
        with pytest.raises(jp.DTypeError, match="'small'"):
            jp.Adapter(model, self.source, params=[model.small])  # type: ignore[list-item]
