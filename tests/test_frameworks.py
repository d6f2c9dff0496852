"""Training loops and model wrappers of other libraries, as docs/frameworks.md says to use them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.jets import Jet
from jetplane.testing import check_plane

os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own warnings

OPTIMIZERS = {
    "fgd": lambda params: jp.optim.FGD(params, lr=0.02, k=4),
    "fomoh-kd": lambda params: jp.optim.FoMoHKD(params, lr=0.5, k=4, descent="saddle-free", clip=1.0),
}


def tangents(params: list[Tensor], k: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(k, *p.shape, dtype=p.dtype, generator=generator) for p in params]


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


# Lightning


class ForwardOnly:
    """Mixin for a LightningModule: its automatic optimization without a backward pass."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._loss = loss  # Lightning's closure returns a detached one

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Tensor:
            optimizer_closure()
            return self.__dict__.pop("_loss")

        optimizer.step(closure)


def lightning_module(make: Callable[[Any], torch.optim.Optimizer], *bases: type) -> Any:
    class Module(*bases):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(float(outputs["loss"]))

        def configure_optimizers(self) -> Any:
            opt = make(self.parameters())
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)]

    return Module()


@pytest.fixture
def labelled() -> torch.utils.data.DataLoader:
    x = torch.randn(32, 4)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)


def fit(module: Any, data: Any, tmp_path: Any, epochs: int = 8, resume: Any = None, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning_automatic_optimization(name: str, labelled: Any, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")
    module = lightning_module(OPTIMIZERS[name], ForwardOnly, lightning.LightningModule)
    trainer = fit(module, labelled, tmp_path)
    assert module.losses[-1] < 0.9 * module.losses[0]
    assert trainer.callback_metrics["loss_epoch"] > 0
    assert trainer.global_step == 16
    assert all(p.grad is None for p in module.parameters())


def test_lightning_without_the_two_hooks_says_what_is_wrong(labelled: Any, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")
    module = lightning_module(OPTIMIZERS["fgd"], lightning.LightningModule)
    with pytest.raises(jp.DerivativeError, match="backward"):
        fit(module, labelled, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_lightning_precision(precision: str, labelled: Any, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")
    module = lightning_module(OPTIMIZERS["fomoh-kd"], ForwardOnly, lightning.LightningModule)
    fit(module, labelled, tmp_path, epochs=4, precision=precision, gradient_clip_val=1.0)
    assert module.losses[-1] < module.losses[0]


def test_lightning_resumes_from_its_checkpoint(labelled: Any, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")
    modules = []
    for path in (None, "half"):
        torch.manual_seed(0)
        module = lightning_module(OPTIMIZERS["fomoh-kd"], ForwardOnly, lightning.LightningModule)
        if path:
            fit(module, labelled, tmp_path, epochs=2).save_checkpoint(tmp_path / path)
            module = lightning_module(OPTIMIZERS["fomoh-kd"], ForwardOnly, lightning.LightningModule)
        fit(module, labelled, tmp_path, epochs=4, resume=tmp_path / path if path else None)
        modules.append(module)
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_lightning_manual_optimization(labelled: Any, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the loop is Lightning's")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Linear(4, 3)
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            loss = self.optimizers().step(lambda: F.cross_entropy(self.net(x), y))
            self.log("loss", loss)
            self.losses.append(float(loss))

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["fomoh-kd"](self.parameters())

    module = Module()
    fit(module, labelled, tmp_path)
    assert module.losses[-1] < 0.9 * module.losses[0]


# transformers


NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def language_model(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="the models are those of an optional library")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2, **options
        )
    )


@pytest.mark.models
def test_bloom_whose_gelu_is_a_function_of_its_own():
    transformers = pytest.importorskip("transformers", reason="the model is that of an optional library")
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0)
    ).double()
    tokens = torch.arange(12).reshape(2, 6)
    params = trainable(model)
    check_plane(lambda: model(input_ids=tokens, labels=tokens).loss, params, tangents(params), 1e-4)  # float32 inside


def held_trainer() -> type:
    transformers = pytest.importorskip("transformers", reason="the loop is that of an optional library")

    class ForwardTrainer(transformers.Trainer):
        """Steps where the micro-batches of a step are complete."""

        held: list[Any] = []

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            model.train()
            self.held = [*self.held, self._prepare_inputs(inputs)]
            if not self.accelerator.sync_gradients:
                return torch.zeros((), device=self.args.device)
            batches, self.held = self.held, []

            def closure() -> Tensor:
                return torch.stack([self.compute_loss(model, b) for b in batches]).mean()

            self.optimizer.step(closure)
            return self.optimizer.optimizer.plane.value

    return ForwardTrainer


class SteppedByClosure(jp.optim.FoMoHKD):
    """Ignores the loop's own step(): the step is taken where the closure is."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if closure is not None else None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(accumulation: int, tmp_path: Any) -> None:
    trainer_class = held_trainer()
    import transformers

    model = language_model()
    tokens = torch.arange(8).repeat(16, 1)
    data = [{"input_ids": t, "labels": t} for t in tokens]
    opt = SteppedByClosure(model.parameters(), lr=0.5, k=6, descent="saddle-free", clip=1.0)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, max_steps=12,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = trainer_class(model=model, args=args, train_dataset=data, optimizers=(opt, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2
    assert losses[0] == pytest.approx(float(torch.tensor(20.0).log()), rel=0.05)
    assert opt.state["jetplane"]["step"] == 12
    assert all(p.grad is None for p in model.parameters())


def test_trainer_resumes_from_its_checkpoint(tmp_path: Any) -> None:
    trainer_class = held_trainer()
    import transformers

    tokens = torch.arange(8).repeat(8, 1)
    data = [{"input_ids": t, "labels": t} for t in tokens]
    models = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        models.append(language_model())
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        opt = SteppedByClosure(models[-1].parameters(), lr=0.5, k=4, descent="saddle-free", clip=1.0)
        trainer = trainer_class(model=models[-1], args=args, train_dataset=data, optimizers=(opt, None))
        trainer.train(resume_from_checkpoint=resume)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


# Accelerate


@pytest.fixture
def regression() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return model, torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)


def test_micro_batches_average_to_the_whole_batch(regression: Any) -> None:
    model, x, y = regression
    params = list(model.parameters())

    def plane(a: Tensor, b: Tensor) -> jp.PlaneModel:
        return jp.evaluate(lambda: F.mse_loss(model(a), b), params, jp.Directions(3, seed=5))

    whole = plane(x, y)
    parts = [plane(a, b) for a, b in zip(x.chunk(4), y.chunk(4), strict=True)]
    for name in ("value", "slope", "curvature"):
        mean = torch.stack([getattr(p, name) for p in parts]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_accumulates_over_micro_batches(name: str, regression: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the loop is Accelerate's")
    model, x, y = regression
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    opt = OPTIMIZERS[name](model.parameters())
    prepared, optimizer, loader = accelerator.prepare(model, opt, data)
    losses: list[float] = []
    held: list[Any] = []
    for _ in range(10):
        for batch in loader:
            with accelerator.accumulate(prepared):
                held.append(batch)
                if accelerator.sync_gradients:
                    optimizer.step(lambda: torch.stack([F.mse_loss(prepared(a), b) for a, b in held]).mean())
                    losses.append(float(opt.plane.value))
                    held.clear()
    assert len(losses) == 10 and losses[-1] < losses[0]

    after = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(start)
    plain = OPTIMIZERS[name](model.parameters())
    for _ in range(10):
        plain.step(lambda: F.mse_loss(model(x), y))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=1e-9, atol=1e-11)


def test_accelerate_mixed_precision() -> None:
    accelerate = pytest.importorskip("accelerate", reason="the loop is Accelerate's")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        model, x, y = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(12, 4), torch.randn(12, 2)
        opt = OPTIMIZERS["fomoh-kd"](model.parameters())
        prepared, optimizer = accelerator.prepare(model, opt)
        losses = []
        for _ in range(10):
            optimizer.step(lambda: F.mse_loss(prepared(x), y))
            losses.append(float(opt.plane.value))
        assert losses[-1] < losses[0]
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_saves_and_resumes(regression: Any, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the loop is Accelerate's")
    model, x, y = regression
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, OPTIMIZERS["fgd"](model.parameters()))

    def train() -> dict[str, Tensor]:
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(prepared(x), y))
        return {key: value.clone() for key, value in model.state_dict().items()}

    train()
    accelerator.save_state(str(tmp_path))
    first = train()
    accelerator.load_state(str(tmp_path))
    for key, value in train().items():
        assert torch.equal(value, first[key])


# PEFT


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="the adapters are those of an optional library")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True, **options)
    model = peft.get_peft_model(language_model(**NO_DROPOUT), config)
    for name, p in model.named_parameters():  # B starts at zero, which hides half of the derivatives
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def test_lora_moves_the_adapters_alone() -> None:
    model = adapted()
    tokens = torch.arange(8).repeat(4, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    opt = jp.optim.FoMoHKD(trainable(model), lr=0.5, k=4, descent="saddle-free", clip=1.0)
    losses = [float(opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)) for _ in range(10)]
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_lora_equals_reverse_mode(options: dict[str, Any]) -> None:
    model = adapted(torch.float64, **options)
    tokens = torch.randint(0, 20, (2, 7))

    def closure() -> Tensor:
        return F.cross_entropy(model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    params = trainable(model)
    check_plane(closure, params, tangents(params))


def test_layers_before_the_first_adapter_run_plainly() -> None:
    model = adapted(layers_to_transform=[1])
    tokens = torch.arange(8).repeat(4, 1)
    jets: list[bool] = []
    for block in model.base_model.model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: jets.append(isinstance(output, Jet)))
    params = trainable(model)
    jp.evaluate(lambda: model(input_ids=tokens, labels=tokens).loss, params, tangents(params))
    assert jets == [False, True]


# Models of the library, whose language-model losses are float32: a loss of our own on their logits


def test_gpt2_with_tied_embeddings() -> None:
    model = language_model(**NO_DROPOUT).double()
    assert model.lm_head.weight is model.transformer.wte.weight
    tokens = torch.randint(0, 20, (2, 7))

    def closure() -> Tensor:
        return F.cross_entropy(model(input_ids=tokens)["logits"][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    params = list(model.parameters())
    check_plane(closure, params, tangents(params))


def test_bert_with_a_padded_batch() -> None:
    transformers = pytest.importorskip("transformers", reason="the models are those of an optional library")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).double()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    batch = {"input_ids": torch.randint(0, 20, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    params = list(model.parameters())
    check_plane(lambda: model(**batch).logits.log_softmax(-1)[..., 3].mean().neg(), params, tangents(params))


def test_resnet_in_train_mode() -> None:
    transformers = pytest.importorskip("transformers", reason="the models are those of an optional library")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).double().train()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    params = list(model.parameters())
    check_plane(lambda: F.cross_entropy(model(pixel_values=images).logits, labels), params, tangents(params))


# torch's own wrappers of modules and parameters


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "orthogonal by matrix_exp": lambda m: nn.utils.parametrizations.orthogonal(m, orthogonal_map="matrix_exp"),
    "orthogonal by cayley": lambda m: nn.utils.parametrizations.orthogonal(m, orthogonal_map="cayley"),
    "orthogonal by householder": lambda m: nn.utils.parametrizations.orthogonal(m, orthogonal_map="householder"),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm by hooks": nn.utils.weight_norm,
    "spectral_norm by hooks": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations(name: str, mode: str) -> None:
    model = nn.Sequential(PARAMETRIZATIONS[name](nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    model.train(mode == "train")
    x = torch.randn(6, 5, dtype=torch.float64)
    buffers = {key: b.clone() for key, b in model.named_buffers()}

    def closure() -> Tensor:
        for key, b in model.named_buffers():  # spectral_norm iterates once in every forward of train mode
            b.copy_(buffers[key])
        return model(x).square().sum()

    params = list(model.parameters())
    check_plane(closure, params, tangents(params))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def test_a_parametrization_of_your_own_trains() -> None:
    model = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    x = torch.randn(16, 4)
    y = x @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    opt = jp.optim.FoMoHKD(model.parameters(), lr=1.0, k=8)

    def closure() -> Tensor:
        with nn.utils.parametrize.cached():
            return F.mse_loss(model(x) + model(x), 2 * y)

    losses = [float(opt.step(closure)) for _ in range(20)]
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.weight, model.weight.mT)


def test_functional_call() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    named = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    params = list(named.values())

    def closure() -> Tensor:
        scaled = {name: 2 * p if "weight" in name else p for name, p in named.items()}
        return torch.func.functional_call(model, scaled, (x,)).square().mean()

    check_plane(closure, params, tangents(params))
    opt = jp.optim.FoMoH(params, lr=0.1, k=4)
    losses = [float(opt.step(closure)) for _ in range(10)]
    assert losses[-1] < losses[0]
