"""The four models that everything here is measured on, with a batch and tangents for each.

Weights, batch and tangents come from one seeded generator in float32 and are then cast, so that runs in
float32 and float64 see the same point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = ("logreg", "mlp", "cnn", "gpt")
BATCH = {"logreg": 1024, "mlp": 512, "cnn": 256, "gpt": 8}
INPUTS, CLASSES = 784, 10
WIDTH, HIDDEN = 1024, 2  # of the MLP
EMBEDDING, HEADS, SEQUENCE, VOCABULARY, LAYERS = 256, 4, 64, 1000, 4  # of the GPT-style stack


class Attention(nn.Module):
    """Causal self-attention by its formula, so that every way of differentiating it can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(EMBEDDING, 3 * EMBEDDING)
        self.out = nn.Linear(EMBEDDING, EMBEDDING)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / math.sqrt(d // HEADS) + mask, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(EMBEDDING), Attention()
        self.norm2 = nn.LayerNorm(EMBEDDING)
        self.up, self.down = nn.Linear(EMBEDDING, 4 * EMBEDDING), nn.Linear(4 * EMBEDDING, EMBEDDING)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a norm and a head of its own."""

    mask: Tensor

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, EMBEDDING)
        self.position = nn.Parameter(torch.empty(SEQUENCE, EMBEDDING))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(EMBEDDING), nn.Linear(EMBEDDING, VOCABULARY, bias=False)
        self.register_buffer("mask", torch.full((SEQUENCE, SEQUENCE), -1e9).triu(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x)).flatten(0, 1)


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """The paper's CNN for 28 x 28 images: 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, CLASSES),
    )  # fmt: skip


BUILD: dict[str, Callable[[], nn.Module]] = {
    "logreg": lambda: nn.Sequential(nn.Linear(INPUTS, CLASSES)),
    "mlp": lambda: mlp([INPUTS] + [WIDTH] * HIDDEN + [CLASSES]),
    "cnn": cnn,
    "gpt": GPT,
}


@dataclass
class Problem:
    """One plane to evaluate."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    tangents: dict[str, Tensor]

    @property
    def k(self) -> int:
        """Number of directions."""
        return next(iter(self.tangents.values())).shape[0]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Every parameter, by name."""
        return dict(self.model.named_parameters())

    def loss(self) -> Tensor:
        """The loss as a user would write it."""
        return F.cross_entropy(self.model(self.x), self.y)


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of the usual sizes; small biases, and norms a little off one, so that nothing is symmetric."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(0.05 * noise + ("norm" in name and name.endswith("weight")))
            elif name in ("token.weight", "position"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / math.sqrt(p[0].numel()))


def make(
    name: str,
    k: int,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Problem:
    """A problem by the name of its model; another model of the same inputs and outputs may be given."""
    generator = torch.Generator().manual_seed(seed)
    model = BUILD[name]() if model is None else model
    fill(model, generator)
    n = batch or BATCH[name]
    if name == "gpt":
        x = torch.randint(VOCABULARY, (n, SEQUENCE), generator=generator)
        y = torch.randint(VOCABULARY, (n * SEQUENCE,), generator=generator)
    else:
        x = torch.randn(n, *((1, 28, 28) if name == "cnn" else (INPUTS,)), generator=generator).to(dtype)
        y = torch.randint(CLASSES, (n,), generator=generator)
    tangents = {
        p_name: torch.randn(k, *p.shape, generator=generator).to(dtype) for p_name, p in model.named_parameters()
    }
    return Problem(name, model.to(dtype), x, y, tangents)
