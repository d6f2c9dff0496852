"""What convergence is measured on: a model, its batches, and a number that says how far it got."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jetplane as jp
from jetplane.experiments import data, models

Batch = tuple[Tensor, ...]
LENGTH, HIDDEN = 100, 64  # of the delayed sum
CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 2  # of the characters


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        model: built anew under a seeded generator.
        loss: of the model on a batch.
        batches: endless; the batch size and a generator go in.
        batch: the batch size.
        score: of the model on held-out data: a loss, and what is to be reported.
        measure: what is reported: "accuracy", of which more is better, or an error.
        layers: whether the loss uses the model as its layers are, so that they can be perturbed.
        epoch: examples of an epoch.
        reverse: the same loss for reverse mode, if that needs another way to write it.
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
    """A model of the experiments on MNIST."""

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
    """An LSTM and a read-out of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, HIDDEN, batch_first=True)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def _sums(size: int, generator: torch.Generator) -> Batch:
    """Sequences of numbers of which two are marked, and the sum of those two: variance 1/6."""
    values = torch.rand(size, LENGTH, generator=generator)
    marks = torch.zeros(size, LENGTH)
    for half in (0, 1):
        place = torch.randint(LENGTH // 2, (size, 1), generator=generator) + half * (LENGTH // 2)
        marks.scatter_(1, place, 1.0)
    return torch.stack([values, marks], 2), (values * marks).sum(1, keepdim=True)


def delayed_sum(folder: Path | None) -> Task:
    """An LSTM is to add two marked numbers of a sequence. The error is relative to always answering the mean."""
    x, y = _sums(1000, torch.Generator().manual_seed(99))

    def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield _sums(size, generator)

    def score(model: nn.Module) -> tuple[float, float]:
        loss = F.mse_loss(model(x), y).item()
        return loss, loss / y.var(correction=0).item()

    return Task(Recurrent, lambda model, b: F.mse_loss(model(b[0]), b[1]), batches, 128, score, "error", epoch=10_000)


class Characters(nn.Module):
    """A causal transformer over characters."""

    mask: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(BLOCKS))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(BLOCKS))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(BLOCKS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * BLOCKS + 1))
        self.head = nn.Linear(WIDTH, vocabulary)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(torch.arange(x.shape[1]).expand_as(x))
        for i in range(BLOCKS):
            n, t, d = h.shape
            q, k, v = self.qkv[i](self.norms[2 * i](h)).view(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + self.mix[i](mixed.transpose(1, 2).reshape(n, t, d))
            h = h + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](h))))
        return self.head(self.norms[-1](h))


def characters(folder: Path | None) -> Task:
    """The next character of Python's own help texts, which every Python ships."""
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

    return Task(lambda: Characters(len(alphabet)), loss, batches, 32, score, "error", epoch=len(train) // CONTEXT)


# --- a differential equation ------------------------------------------------------------------------------


def poisson(folder: Path | None) -> Task:
    """``-Laplace(u) = f`` on the unit square, zero on its edge; u = sin(pi x) sin(pi y). Error: relative L2."""

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
    "poisson": poisson,
    "characters": characters,
}
