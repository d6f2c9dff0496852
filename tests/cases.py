"""Models and losses that the plane tests run on: data, so that the tests are a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Case:
    """A module and the closure of its loss, in the dtype that it was built for."""

    module: nn.Module
    loss: Callable[[], Tensor]

    @property
    def params(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def tangents(self, k: int, seed: int = 0) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(k, *p.shape, generator=g, dtype=torch.float64).to(p.dtype) for p in self.params]


def _data(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


def _labels(n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(4))


def _classifier(module: nn.Module, x: Tensor, classes: int = 10) -> Case:
    y = _labels(len(x), classes)
    return Case(module, lambda: F.cross_entropy(module(x), y))


def mlp(activation: Callable[[], nn.Module], width: int = 12) -> Callable[[torch.dtype], Case]:
    def build(dtype: torch.dtype) -> Case:
        net = nn.Sequential(
            nn.Linear(6, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 10)
        )
        return _classifier(net.to(dtype), _data(dtype, 9, 6))

    return build


def wide_mlp(dtype: torch.dtype) -> Case:
    """Wide enough that products are interpolated."""
    net = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return _classifier(net.to(dtype), _data(dtype, 100, 8))


def logistic_regression(dtype: torch.dtype) -> Case:
    return _classifier(nn.Linear(20, 10).to(dtype), _data(dtype, 16, 20))


def paper_cnn(dtype: torch.dtype) -> Case:
    net = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == 431_080
    return _classifier(net.to(dtype), _data(dtype, 3, 1, 28, 28))


def encoder_stack(dtype: torch.dtype) -> Case:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype)
    x = _data(dtype, 2, 5, 16)
    return Case(net, lambda: net(x).square().mean())


class Attention(nn.Module):
    """A causal pre-norm block on scaled_dot_product_attention, with a tied head."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        b, t, d = h.shape
        q, k, v = self.qkv(self.norm(h)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        h = h + self.down(F.gelu(self.up(self.norm2(h)), approximate="tanh"))
        return h @ self.embed.weight.T


def causal_attention(dtype: torch.dtype) -> Case:
    net = Attention().to(dtype)
    tokens = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(5))
    return Case(net, lambda: F.cross_entropy(net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


class Residual(nn.Module):
    """In-place ReLU, an in-place sum with the identity, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(self.conv1(x)))
        identity = h
        h = self.norm2(self.conv2(h))
        h += identity
        return self.head(self.relu(h).mean((2, 3)))


def resnet(dtype: torch.dtype) -> Case:
    return _classifier(Residual().to(dtype), _data(dtype, 4, 3, 6, 6))


def resnet_eval(dtype: torch.dtype) -> Case:
    net = Residual().to(dtype)
    net.norm1.running_mean.add_(0.1)  # type: ignore[union-attr]
    return _classifier(net.eval(), _data(dtype, 4, 3, 6, 6))


def recurrent(kind: type[nn.Module]) -> Callable[[torch.dtype], Case]:
    def build(dtype: torch.dtype) -> Case:
        net = kind(4, 5, 2, batch_first=True, bidirectional=True).to(dtype)
        x = _data(dtype, 2, 4, 4)
        return Case(net, lambda: net(x)[0].square().mean())

    return build


def packed_lstm(dtype: torch.dtype) -> Case:
    net = nn.LSTM(4, 5, 2, bidirectional=True).to(dtype)
    x = _data(dtype, 4, 3, 4)

    def loss() -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]))
        out, (h, c) = net(packed)
        return out.data.square().mean() + h.sin().sum() + c.sum()

    return Case(net, loss)


def seeded_dropout(dtype: torch.dtype) -> Case:
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 10)).to(dtype)
    x, y = _data(dtype, 9, 6), _labels(9, 10)

    def loss() -> Tensor:
        torch.manual_seed(7)
        return F.cross_entropy(net(x), y)

    return Case(net, loss)


class Buffers(nn.Module):
    """Writes of computed rows into a plain buffer, and into slices of what was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).clone()
        buffer = torch.zeros_like(x)
        for i in range(len(x)):
            buffer[i] = h[i].tanh() * (1 if i == 0 else buffer[i - 1].clone())
        h[:, 1:] = h[:, :-1].clone().sin() * 2
        h.view(-1)[2] = buffer.sum()
        return h @ buffer.T


def buffers(dtype: torch.dtype) -> Case:
    net = Buffers().to(dtype)
    x = _data(dtype, 3, 4)
    return Case(net, lambda: net(x).square().sum())


def frozen(dtype: torch.dtype) -> Case:
    case = mlp(nn.Tanh)(dtype)
    next(case.module.parameters()).requires_grad_(False)
    return case


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "logistic regression": logistic_regression,
    "mlp relu": mlp(nn.ReLU),
    "mlp tanh": mlp(nn.Tanh),
    "mlp gelu": mlp(nn.GELU),
    "mlp gelu tanh": mlp(lambda: nn.GELU("tanh")),
    "mlp silu": mlp(nn.SiLU),
    "mlp sigmoid": mlp(nn.Sigmoid),
    "mlp softplus": mlp(nn.Softplus),
    "wide mlp": wide_mlp,
    "paper cnn": paper_cnn,
    "encoder stack": encoder_stack,
    "causal attention, tied": causal_attention,
    "resnet train": resnet,
    "resnet eval": resnet_eval,
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "packed lstm": packed_lstm,
    "seeded dropout": seeded_dropout,
    "buffers": buffers,
    "frozen": frozen,
}


def rosenbrock(x: Tensor) -> Tensor:
    """The Rosenbrock function; its minimum 0 is at (1, …, 1)."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


class Doubled(torch.autograd.Function):
    """A function that defines another derivative than that of its forward pass."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g
