"""Long sequences and large vocabularies, for `benchmarks.memory`: attention alone, and a GPT with a tied read-out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jetplane as jp

HEADS, SIZE = 8, 64  # of the attention
ROWS = 512  # queries between checkpoints
DENSE = 4096  # length up to which scores are formed for all keys at once, and exact curvature is carried
WIDTH, LAYERS, VOCABULARY, POSITIONS = 128, 2, 50257, 1024  # of the GPT

ATTENTION = ("inference", "ours, K = 1", "ours, K = 3", "ours, exact, K = 2", "dense, K = 1", "backprop",
             "backprop, dense", "backprop, dense, checkpointed")  # fmt: skip
READING = ("inference", "ours, slope", "ours, ggn", "ours, exact", "backprop")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its formula: all scores at once."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula for some queries at a time, each part run again in the backward pass."""
    return torch.cat([checkpoint(dense, part, k, v, use_reentrant=False) for part in q.split(ROWS, -2)], -2)


def attention(case: dict[str, Any]) -> Callable[[], Any]:
    """One attention without a mask, in a way."""
    way, shape = case["way"], (1, HEADS, case["length"], SIZE)
    k = int(way[-1]) if way[-1].isdigit() else 0
    xs = tuple(torch.randn(shape, requires_grad=way.startswith("backprop")) for _ in range(3))
    vs = tuple(torch.randn(k, *shape) for _ in range(3))
    f = dense if "dense" in way else F.scaled_dot_product_attention
    if way == "inference":
        return lambda: F.scaled_dot_product_attention(*xs)
    if way.startswith("backprop"):
        g = in_parts if way.endswith("checkpointed") else f
        return lambda: torch.autograd.grad(g(*xs).sum(), xs)

    def run() -> Any:
        with torch.no_grad():
            return jp.jet(f, xs, vs, order=2 if "exact" in way else 1)

    return run


class Layer(nn.Module):
    """A pre-norm transformer layer with torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Reader(nn.Module):
    """A GPT whose read-out is its embedding."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(positions, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.layers(self.token(tokens) + self.position(places))))


def reading(case: dict[str, Any]) -> Callable[[], Any]:
    """The loss of a GPT with a large vocabulary, in a way."""
    way, k, positions = case["way"], case["k"], case["positions"]
    torch.manual_seed(0)
    model = Reader(positions)
    tokens = torch.randint(VOCABULARY, (1, positions + 1))
    params = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    if way == "inference":

        def run() -> Any:
            with torch.inference_mode():
                return loss()

        return run
    if way == "backprop":
        return lambda: torch.autograd.grad(loss(), params)
    curvature: Any = {"slope": "none", "ggn": "ggn", "exact": "hessian"}[way.rpartition(" ")[2]]
    given = [torch.randn(k, *p.shape) for p in params]
    return lambda: jp.evaluate(loss, params, given, curvature)
