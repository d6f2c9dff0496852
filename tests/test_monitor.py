"""The curvature monitor: its numbers against reverse over reverse, and a training that it does not disturb."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp

N = 16
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.5, max_iter=3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01),
}


def network(dtype: torch.dtype = torch.float64, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(8, 3)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(N, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (N,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, watch: Any = None) -> Any:
    """A plain loop; ``watch(closure)`` makes a monitor."""
    current: list[tuple[Tensor, Tensor]] = []

    def loss() -> Tensor:
        x, y = current[-1]
        return F.cross_entropy(model(x), y)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    monitor = watch(loss) if watch else None
    dtype = next(model.parameters()).dtype
    for batch in batches(steps, dtype):
        current.append(batch)
        optimizer.step(closure)
    return monitor


def reverse(model: nn.Module, before: list[Tensor], directions: list[list[Tensor]], batch: Any) -> Any:
    """Slope, exact and Gauss-Newton curvature, and the covariance of the slope, by reverse mode."""
    params, (x, y) = list(model.parameters()), batch
    with torch.no_grad():
        now = [p.clone() for p in params]
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    outputs = model(x)
    grads = torch.autograd.grad(F.cross_entropy(outputs, y), params, create_graph=True)
    slopes = [sum((g * v).sum() for g, v in zip(grads, d, strict=True)) for d in directions]
    products = [torch.autograd.grad(s, params, retain_graph=True, materialize_grads=True) for s in slopes]
    hessian = [
        [sum((h * v).sum() for h, v in zip(product, d, strict=True)) for d in directions] for product in products
    ]
    names = [n for n, _ in model.named_parameters()]

    def of(ps: tuple[Tensor, ...]) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, ps, strict=True)), (x,))

    held = tuple(p.detach() for p in params)
    js = torch.stack([torch.func.jvp(of, (held,), (tuple(d),))[1] for d in directions])  # (K, N, classes)
    prob = of(held).softmax(-1)
    inner = torch.diag_embed(prob) - prob.unsqueeze(2) * prob.unsqueeze(1)
    ggn = torch.einsum("kni,nij,lnj->kl", js, inner, js) / len(x)
    parts = torch.einsum("kni,ni->nk", js, (prob - F.one_hot(y, 3))) / len(x)
    centred = parts - parts.mean(0)
    covariance = centred.T @ centred * len(x) / (len(x) - 1)
    with torch.no_grad():
        for p, b in zip(params, now, strict=True):
            p.copy_(b)
    return torch.stack(slopes).detach(), torch.tensor(hessian), ggn.detach(), covariance.detach()


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "lbfgs"])
def test_against_reverse_over_reverse(name: str) -> None:
    model = network()
    params = list(model.parameters())
    optimizer = OPTIMIZERS[name](params)
    trail: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: trail.append([[p.detach().clone() for p in params]]))
    optimizer.register_step_post_hook(lambda *_: trail[-1].append([p.grad.clone() for p in params]))
    monitor = train(
        model, optimizer, 5,
        lambda loss: jp.CurvatureMonitor(
            optimizer, loss, every=2, directions=("step", "previous", "gradient"), curvature="both"
        ),
    )  # fmt: skip
    trail.append([[p.detach().clone() for p in params]])
    assert [r.step for r in monitor.readings] == [1, 3, 5]
    assert monitor.readings[0].directions == ("step", "gradient")
    solved: list[int] = []
    for reading in monitor.readings:
        t = reading.step - 1
        taken = [b - a for a, b in zip(trail[t][0], trail[t + 1][0], strict=True)]
        directions = [taken, trail[t][1]]
        if t:
            directions.insert(1, [b - a for a, b in zip(trail[t - 1][0], trail[t][0], strict=True)])
        slope, hessian, ggn, covariance = reverse(model, trail[t][0], directions, batches(5)[t])
        assert torch.allclose(reading.slope, slope, rtol=1e-6, atol=0)
        for found, expected in (
            (reading.curvature, hessian),
            (reading.gauss_newton, ggn),
            (reading.covariance, covariance),
        ):
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
            assert found[0, 0].item() == pytest.approx(expected[0, 0].item(), rel=1e-6)
        assert reading.noise_share == pytest.approx(min(1.0, (covariance[0, 0] / slope[0] ** 2).item()), rel=1e-6)
        expected = -torch.linalg.solve(hessian, slope)
        unit = hessian / reading.norms.outer(reading.norms)
        values = torch.linalg.eigvalsh(unit)
        if values.min() > 2e-3 * values.max():  # with SGD directions are dependent
            assert torch.allclose(reading.plane_step, expected, rtol=1e-5)
            solved.append(reading.step)

    assert solved or name in ("sgd", "momentum")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_undisturbed_bit_for_bit(name: str) -> None:
    def run(watched: bool) -> Any:
        model = network(torch.float32, dropout=0.3, norm=True)
        optimizer = OPTIMIZERS[name](model.parameters())
        torch.manual_seed(2)
        random.seed(2)
        watch = lambda loss: jp.CurvatureMonitor(optimizer, loss, every=2, directions=("step", "previous"))  # noqa: E731
        monitor = train(model, optimizer, 6, watch if watched else None)
        grads = [p.grad.clone() for p in model.parameters()]
        return monitor, model.state_dict(), optimizer.state_dict(), grads, torch.rand(1), random.random()

    plain, watched = run(False), run(True)
    assert len(watched[0].readings) == 3
    for key, value in plain[1].items():
        assert torch.equal(value, watched[1][key]), key
    assert same(plain[2:], watched[2:])


def test_undisturbed_in_chunks() -> None:
    """An evaluation in chunks is run without side effects by itself, and within the monitor's."""

    def run(watched: bool) -> Any:
        model = network(norm=True)
        optimizer = torch.optim.SGD([{"params": []}, {"params": model.parameters(), "lr": 0.1}], lr=0.5)
        watch = lambda loss: jp.CurvatureMonitor(  # noqa: E731
            optimizer, loss, directions=("step", "previous"), curvature="ggn", chunk=1
        )
        return train(model, optimizer, 3, watch if watched else None), dict(model.state_dict())

    plain, watched = run(False), run(True)
    assert same(plain[1], watched[1])
    assert [r.rate for r in watched[0].readings] == [0.1] * 3  # of the group that has parameters


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_gradient_descent_at_the_edge() -> None:
    """On a quadratic function the critical rate is 2 / curvature along the gradient."""
    bend = torch.tensor([1.0, 4.0, 25.0])
    x = nn.Parameter(torch.tensor([0.0, 0.0, 1.0]))
    optimizer = torch.optim.SGD([x], lr=0.01)
    loss = lambda: (bend * x**2).sum() / 2  # noqa: E731
    with jp.CurvatureMonitor(optimizer, loss) as monitor:
        loss().backward()
        optimizer.step()
    (reading,) = monitor.readings
    assert reading.sharpness == pytest.approx(25, rel=1e-5)
    assert reading.critical_rate == pytest.approx(2 / 25, rel=1e-5)
    assert reading.best_factor == pytest.approx(4, rel=1e-5)
    assert reading.plane_step.item() == pytest.approx(4, rel=1e-5)
    assert math.isnan(reading.noise_share)  # nothing is known of examples
    optimizer.step()
    assert len(monitor.readings) == 1  # closed


def test_negative_curvature() -> None:
    x = nn.Parameter(torch.tensor([0.1]))
    optimizer = torch.optim.SGD([x], lr=0.1)
    loss = lambda: torch.cos(x).sum()  # noqa: E731
    monitor = jp.CurvatureMonitor(optimizer, loss)
    loss().backward()
    optimizer.step()
    assert monitor.readings[0].sharpness < 0 and monitor.readings[0].best_factor == math.inf
    assert monitor.readings[0].plane_step.item() > 0  # downhill all the same


def test_steps_that_are_skipped() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([x], lr=0.0)
    monitor = jp.CurvatureMonitor(optimizer, lambda: x.square().sum())
    x.square().sum().backward()
    optimizer.step()
    assert monitor.steps == 1 and not monitor.readings


def test_our_own_optimizers() -> None:
    model = network()
    optimizer = jp.optim.FoMoHKD(model.parameters(), lr=1.0, k=3, descent="saddle-free", clip=1.0)
    x, y = batches(1)[0]
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    with jp.CurvatureMonitor(optimizer, loss) as monitor:
        optimizer.step(loss)
    reading = monitor.readings[0]
    assert reading.value == pytest.approx(optimizer.plane.value.item())
    assert reading.slope[0] < 0


def test_writer_and_plot() -> None:
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.rows.append((name, value, step))

    class Axes:
        def __init__(self) -> None:
            self.lines: dict[str, Any] = {}

        def plot(self, x: Any, y: Any, *_: str, label: str, **__: Any) -> None:
            self.lines[label] = list(zip(x, y, strict=True))

        def set(self, **_: Any) -> None: ...

        def legend(self, **_: Any) -> None: ...

    model, writer, axes, reported = network(), Writer(), Axes(), []
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    watch = lambda loss: jp.CurvatureMonitor(  # noqa: E731
        optimizer, loss, every=2, curvature="both", writer=writer, report=reported.append
    )
    monitor = train(model, optimizer, 3, watch)
    assert reported == monitor.readings
    names = {name for name, _, _ in writer.rows}
    assert {"curvature/sharpness", "curvature/critical_rate", "curvature/noise_share", "curvature/rate"} <= names
    assert {step for _, _, step in writer.rows} == {1, 3}
    monitor.plot(axes)
    assert axes.lines["rate"] == [(1, 0.1), (3, 0.1)]
    assert axes.lines["2 / curvature along the step"][0][1] == monitor.readings[0].critical_rate


def test_errors_leave_everything_as_it_was() -> None:
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    x, y = batches(1)[0]
    jp.CurvatureMonitor(optimizer, lambda: torch.from_numpy(model(x).numpy()).sum(), audit="never")
    F.cross_entropy(model(x), y).backward()
    twin = copy.deepcopy(model)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        b.grad = a.grad.clone()
    OPTIMIZERS["adam"](twin.parameters()).step()
    with pytest.raises(jp.DerivativeError, match="numpy"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_hidden_parameter_is_found() -> None:
    x = nn.Parameter(torch.ones(3))
    view = x.detach().numpy()
    optimizer = torch.optim.SGD([x], lr=0.1)
    jp.CurvatureMonitor(optimizer, lambda: x.square().sum() * float(view[0]))
    x.square().sum().backward()
    with pytest.raises(jp.AuditError):
        optimizer.step()


def test_refusals() -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([x], lr=0.1)
    loss = lambda: x.sum()  # noqa: E731
    for match, make in {
        "torch.optim.Optimizer": lambda: jp.CurvatureMonitor(x, loss),
        "closure must": lambda: jp.CurvatureMonitor(optimizer, 3),
        "every must": lambda: jp.CurvatureMonitor(optimizer, loss, every=0),
        "directions must": lambda: jp.CurvatureMonitor(optimizer, loss, directions=("gradient",)),
        "curvature must": lambda: jp.CurvatureMonitor(optimizer, loss, curvature="exact"),
        "writer must": lambda: jp.CurvatureMonitor(optimizer, loss, writer=3),
        "audit must": lambda: jp.CurvatureMonitor(optimizer, loss, audit="always"),
        "nothing to plot": lambda: jp.CurvatureMonitor(optimizer, loss).plot(None),
    }.items():
        with pytest.raises(jp.ArgumentError, match=match):
            make()


# --- other libraries' loops ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")
    from jetplane.callbacks import LightningMonitor

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.float32, norm=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class Logger(lightning.pytorch.loggers.logger.DummyLogger):
        rows: list[Any] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, metrics))

    def fit(callbacks: list[Any]) -> Any:
        lightning.seed_everything(0, verbose=False)
        module, logger = Module(), Logger()
        trainer = lightning.Trainer(
            max_steps=5, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(batches(5, torch.float32), batch_size=None))
        return module.state_dict()

    callback = LightningMonitor(lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]), every=2)
    watched = fit([callback])
    assert [r.step for r in callback.monitor.readings] == [1, 3, 5]
    assert all(r.slope[0] < 0 for r in callback.monitor.readings)
    assert any("curvature/sharpness" in metrics for _, metrics in Logger.rows)
    assert same(dict(watched), dict(fit([])))


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="the loop is the Trainer's")
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    from jetplane.callbacks import TrainerMonitor

    def fit(callbacks: list[Any]) -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        config._attn_implementation = "eager"
        model = transformers.GPT2LMHeadModel(config)
        ids = torch.randint(0, 11, (16, 8), generator=torch.Generator().manual_seed(0))
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in ids]
        transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks).train()
        return model.state_dict(), {"input_ids": ids[:4], "labels": ids[:4]}

    plain, batch = fit([])
    callback = TrainerMonitor(batch, every=3)
    watched, _ = fit([callback])
    assert [r.step for r in callback.monitor.readings] == [1, 4]
    assert same(dict(plain), dict(watched))


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    from jetplane import callbacks

    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(callbacks.importlib, "import_module", refuse)
    for make in (callbacks._lightning_monitor, callbacks._trainer_monitor):
        with pytest.raises(jp.MissingPackageError, match=r"pip install 'jetplane\[frameworks\]'"):
            make.__wrapped__()
    with pytest.raises(AttributeError, match="Nothing"):
        _ = callbacks.Nothing
