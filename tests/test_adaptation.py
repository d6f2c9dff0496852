"""Adaptation at test time: `jetplane.Adapter`, its rivals, the corruptions, and all of it at a small size."""

import copy
import json

import pytest
import torch
from torch import nn

import jetplane as jp
from jetplane.adaptation import entropy, moments, weighted_modules
from jetplane.errors import DataError

pytest.importorskip("typer", reason="needs the extra cli")
from typer.testing import CliRunner  # noqa: E402

from jetplane import cli  # noqa: E402
from jetplane.experiments import data  # noqa: E402
from jetplane.experiments.adaptation import experiment, methods, models  # noqa: E402
from jetplane.experiments.adaptation.corruptions import CORRUPTIONS, corrupted  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def images():
    return experiment.Images.drawn(320)


@pytest.fixture(scope="module", params=["vit", "cnn"])
def setting(request, images):
    torch.manual_seed(0)
    make = {"vit": lambda: models.ViT(16, 1, 2), "cnn": lambda: models.CNN((4, 8))}[request.param]
    model = make().eval().requires_grad_(False)
    source = images.train[:64, None]
    small = models.quantized(model, source)
    return methods.Setting(model, small, source, jp.Adapter(small, source))


def damaged(images):
    return corrupted(images.test[:64], "contrast")[:, None]


class TestAdapter:
    def test_a_step_lowers_the_distance_and_leaves_the_model_alone(self, setting, images):
        adapter, x = setting.adapter.restarted(), damaged(images)
        state = setting.quantized.state_dict()
        before = {n: v.clone() for n, v in state.items() if isinstance(v, torch.Tensor) and not v.is_quantized}
        start = adapter._distances(adapter._run(adapter.offsets, x)[1]).square().sum()
        for _ in range(3):
            logits = adapter(x)
        assert logits.shape == (64, 10) and torch.isfinite(logits).all()
        assert adapter._last is not None and adapter._last.square().sum() < 0.9 * start
        after = setting.quantized.state_dict()
        assert before and all(torch.equal(value, after[name]) for name, value in before.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in setting.quantized.modules())

    def test_reset_forgets(self, setting, images):
        adapter, x = setting.adapter.restarted(), damaged(images)
        first = adapter(x)
        assert not torch.equal(first, adapter(x))
        moved = adapter.predicted(x)
        adapter.reset()
        assert not torch.equal(moved, adapter.predicted(x))
        assert torch.equal(first, adapter(x))

    def test_directions_are_as_many_as_a_step_of_twelve_passes_allows(self, setting, images):
        adapter, x = setting.adapter.restarted(), damaged(images)
        adapter(x)
        found = adapter._directions(torch.randn(len(adapter.offsets)))
        assert 1 + len(found) + 1 <= methods.PASSES
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))

    def test_data_like_the_source_change_little(self, setting, images):
        adapter, x = setting.adapter.restarted(), images.train[64:128, None]
        with torch.no_grad():
            plain = setting.quantized(x)
        assert (adapter(x).argmax(1) == plain.argmax(1)).float().mean() > 0.5

    def test_what_is_refused(self):
        with pytest.raises(jp.ArgumentError, match="normalization layers, found none"):
            jp.Adapter(nn.Linear(4, 3), torch.randn(8, 4))
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        with pytest.raises(jp.ArgumentError, match="k must be at least 2"):
            jp.Adapter(model, torch.randn(8, 4), k=1)

    def test_moments_are_restored_exactly_for_every_normalization(self):
        torch.manual_seed(0)
        x, y = torch.randn(64, 3, 8, 8), 3 * torch.randn(64, 3, 8, 8) + 1
        for norm in (nn.BatchNorm2d(6), nn.GroupNorm(2, 6)):
            model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Flatten(), nn.Linear(216, 5)).eval()
            adapter = jp.Adapter(model, x)
            seen: list = []
            with torch.no_grad():
                hook = model[2].register_forward_pre_hook(lambda m, a, seen=seen: seen.append(moments(norm, a[0])))  # noqa: B023
                adapter._run(adapter.offsets, y)
                hook.remove()
            target = adapter._targets[0]
            for found, wanted in zip(seen[0], (target.mean, target.deviation), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


class TestRivals:
    def test_statistics_of_the_batch_are_batchnorms_own(self, images):
        model = models.CNN((4, 8)).eval().requires_grad_(False)
        setting = methods.Setting(model, model, images.train[:64, None], None)  # type: ignore[arg-type]
        x = damaged(images)
        wanted = copy.deepcopy(model).train()(x)
        torch.testing.assert_close(methods.norm_statistics(setting)(x), wanted, rtol=1e-4, atol=1e-4)

    def test_tent_lowers_the_entropy_of_the_model_in_floating_point(self, setting, images):
        x, step = damaged(images), methods.tent(setting, 1e-2)
        first = entropy(step(x))
        for _ in range(5):
            last = entropy(step(x))
        assert last < first

    def test_foa_predicts_by_the_fittest_candidate(self, setting, images):
        """Of the first batch no prompts at all are a candidate, and nothing is shifted yet."""
        pytest.importorskip("cma", reason="needs the extra adapt")
        x = damaged(images)
        step = methods.foa(setting, weight=0.0)
        with torch.no_grad():
            model = copy.deepcopy(setting.quantized)
            methods._use_batch_statistics(model)
            model.prompts = torch.zeros((3, 16) if hasattr(model, "token") else (7, 7))  # type: ignore[assignment]
            assert entropy(step(x)) <= entropy(model(x)) + 1e-6
            assert torch.isfinite(step(x)).all()

    def test_perturbations_estimate_the_gradient(self):
        g, params = torch.tensor([1.0, -2.0, 0.5]), [torch.zeros(3)]
        found = methods.perturbed(
            lambda: params[0] @ g, params, torch.tensor(0.0), 0.01, 4000, torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(found[0], g, atol=0.15, rtol=0)
        assert torch.equal(params[0], torch.zeros(3))

    def test_zoa_predicts_before_it_moves(self, setting, images):
        x, step = damaged(images), methods.zoa(setting)
        with torch.no_grad():
            first = step(x)
            model = copy.deepcopy(setting.quantized)
            methods._use_batch_statistics(model)
            torch.testing.assert_close(first, model(x), rtol=1e-3, atol=1e-3)
            assert not torch.equal(first, step(x))

    def test_the_layers_that_are_compared(self):
        model = models.CNN((4, 8))
        assert list(weighted_modules(model)) == [*model.convolutions, model.head]


class TestCorruptions:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_each_changes_images_the_same_way_for_a_seed(self, name, images):
        x = images.test[:8]
        y = corrupted(x, name, 1)
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and not torch.equal(x, y)
        assert torch.equal(y, corrupted(x, name, 1))

    def test_there_are_fifteen_and_others_are_refused(self, images):
        assert len(CORRUPTIONS) == 15
        with pytest.raises(jp.ArgumentError, match="no corruption 'rain'"):
            corrupted(images.test[:1], "rain")
        with pytest.raises(jp.ArgumentError, match="shape"):
            corrupted(torch.zeros(1, 8, 8), "fog")

    def test_blurs_keep_the_brightness_of_a_flat_image_inside(self):
        flat = torch.full((1, 28, 28), 0.5)
        for name in ("defocus blur", "motion blur", "pixelate", "jpeg compression", "elastic transform", "contrast"):
            assert corrupted(flat, name)[0, 12:16, 12:16].sub(0.5).abs().max() < 0.03, name

    def test_contrast_is_its_formula(self, images):
        x = images.test[:4]
        mean = x.mean((1, 2), keepdim=True)
        torch.testing.assert_close(corrupted(x, "contrast"), 0.1 * (x - mean) + mean)


class TestExperiment:
    def test_all_methods_on_one_corruption(self, setting, images):
        found = experiment.run(images, setting, 0, 64, experiment.available(), ["contrast"])
        assert set(found) == set(experiment.available())
        assert all(0 <= of["accuracy"]["contrast"] <= 100 and of["seconds"] > 0 for of in found.values())
        again = experiment.run(images, setting, 0, 64, ["Adapter"], ["contrast"])
        assert again["Adapter"]["accuracy"] == found["Adapter"]["accuracy"]

    def test_8_bits_change_logits_little(self, setting, images):
        with torch.no_grad():
            in_float, small = (m(images.test[:64, None]) for m in (setting.model, setting.quantized))
        assert 0 < (in_float - small).norm() < 0.1 * in_float.norm()

    def test_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setattr(experiment, "CORRUPTIONS", ["contrast", "fog"])
        monkeypatch.setattr(models, "MODELS", {"vit": lambda: models.ViT(16, 1, 2), "cnn": lambda: models.CNN((4, 8))})
        run = experiment.run
        monkeypatch.setattr(experiment, "run", lambda *a, **k: run(*a, **k, corruptions=["contrast", "fog"]))
        done = CliRunner().invoke(cli.app, ["adapt", "--data", "drawn", "--examples", "64", "--out", str(tmp_path)])
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / "results.json").read_text())
        assert set(found) == {"ViT", "CNN"} and (tmp_path / "adaptation.png").exists()
        assert "Adapter" in (tmp_path / "results.md").read_text() and (tmp_path / "cnn.pt").exists()

    def test_fashion_mnist_that_is_not_there(self, tmp_path):
        with pytest.raises(DataError, match="Fashion-MNIST"):
            data.fashion_mnist(tmp_path)


class TestLongStreams:
    """Batches of source data, one after the other: there is nothing to adapt to."""

    def test_decay_bounds_what_entropy_would_move(self) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 5))
        labels = torch.randn(16, 5, generator=generator)
        x = torch.randn(1024, 16, generator=generator)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x @ labels).argmax(1)).backward()
            optimizer.step()
        model.eval()
        lengths = []
        for decay in (0.0, 0.1):
            adapter = jp.Adapter(model, x[:256], entropy_weight=1.0, decay=decay)
            for batch in torch.randn(30, 64, 16, generator=generator.manual_seed(1)):
                adapter(batch)
            lengths.append(adapter.offsets.norm().item())
        assert 3 * lengths[1] < lengths[0]

    def test_decay_is_a_number_of_at_least_zero(self) -> None:
        with pytest.raises(jp.ArgumentError, match="decay"):
            jp.Adapter(nn.Sequential(nn.LayerNorm(4)).eval(), torch.randn(8, 4), decay=-1.0)


class Sharp(nn.Module):
    """A model far from linear in its scales and shifts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.first, self.b, self.second = (
            nn.Linear(8, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.second(self.b((3 * self.first(self.a(x))).sin())).exp())


def test_no_step_raises_the_loss_of_its_batch():
    """Of 30 whole steps 12 do here; they are shortened, or left out where no part of them lowers the loss."""
    model = Sharp().eval()
    torch.manual_seed(1)
    adapter = jp.Adapter(model, torch.randn(256, 8), entropy_weight=3.0, damping=1e-3)

    def loss(batch):
        logits, r = adapter._shift(adapter.offsets, batch)
        return (3 * entropy(logits) + r.square().sum()).item()

    left = 0
    for i in range(30):
        batch, offsets = 2 * torch.randn(10, 8) + i % 3, adapter.offsets
        before, step = loss(batch), adapter._step
        logits = adapter(batch)
        assert loss(batch) <= before * (1 + 1e-6)
        torch.testing.assert_close(logits, adapter.predicted(batch))
        if torch.equal(adapter.offsets, offsets):
            left += 1
            assert adapter._step is step
        else:
            torch.testing.assert_close(adapter._step, adapter.offsets - offsets, rtol=1e-3, atol=1e-5)
    assert 0 < left < 10


class Noisy(nn.Module):
    """A model that draws random numbers in evaluation mode too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
        self.drawn = []

    def forward(self, x):
        noise = torch.randn(x.shape)
        self.drawn.append(noise)
        return self.net(x + noise)


def test_all_passes_of_a_batch_see_the_same_random_numbers():
    """Or the noise of two passes decides whether a step is taken."""
    model = Noisy().eval()
    torch.manual_seed(1)
    adapter = jp.Adapter(model, torch.randn(256, 8))
    for _ in range(4):
        batch, begin = 2 * torch.randn(32, 8) + 1, torch.get_rng_state()
        model.drawn.clear()
        adapter(batch)
        assert len(model.drawn) >= 2 and all(torch.equal(noise, model.drawn[0]) for noise in model.drawn)
        end = torch.get_rng_state()
        torch.set_rng_state(begin)
        torch.randn(batch.shape)
        assert torch.equal(torch.get_rng_state(), end)  # as after one pass


def test_where_nothing_is_left_to_gain_steps_are_not_halved():
    """A batch that comes again and again: its loss falls no more, and parts of a step would tell nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    adapter, passes = jp.Adapter(model, torch.randn(256, 8)), []
    batch = 2 * torch.randn(64, 8) + 1
    for _ in range(60):
        seen = []
        hook = model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        adapter(batch)
        hook.remove()
        passes.append(len(seen))
    assert max(passes[30:]) <= 3  # that of the plane, that of the step, that without it
