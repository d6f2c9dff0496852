"""A small vision transformer and a small CNN for Fashion-MNIST: trained in floating point, and made 8-bit."""

from __future__ import annotations

import copy
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Architecture = Literal["vit", "cnn"]
CLASSES = 10


class Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm and beside a way around."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 7 x 7 pixels and a class token of width 48, three blocks, four heads; ``prompts`` are tokens beside.

    Attributes:
        prompts: (P, width) tokens after the class token, or None.
    """

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(49, width)
        self.place = nn.Parameter(0.02 * torch.randn(17, width))
        self.token = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.prompts: Tensor | None = None

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens (N, 17, width) of images (N, 1, 28, 28)."""
        patches = images.unfold(2, 7, 7).unfold(3, 7, 7).reshape(len(images), 16, 49)
        return torch.cat([self.token.expand(len(images), 1, -1), self.patches(patches)], 1) + self.place

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        x = self.tokens(images)
        if self.prompts is not None:
            x = torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class CNN(nn.Module):
    """Four convolutions with BatchNorm, pooling, and a linear layer.

    Attributes:
        prompts: (7, 7), a pattern that is enlarged and added to the images, or None.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 32, 64)) -> None:
        super().__init__()
        sizes = (1, *widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, widths, strict=False))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
        self.head = nn.Linear(widths[-1], CLASSES)
        self.prompts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        if self.prompts is not None:
            x = x + F.interpolate(self.prompts[None, None], x.shape[-2:], mode="bilinear")
        for n, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if n in (0, 2):
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


MODELS = {"vit": ViT, "cnn": CNN}


def train(name: Architecture, images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> nn.Module:
    """A model trained by Adam with a one-cycle rate, in evaluation mode.

    Args:
        name: "vit" or "cnn".
        images: (N, 1, 28, 28) from 0 to 1.
        labels: (N,).
        epochs: passes over them, in batches of 128.
        seed: of weights and batches.
    """
    torch.manual_seed(seed)
    model = MODELS[name]().train()
    rate, steps = (2e-3 if name == "vit" else 1e-2), epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            if len(batch) < 128:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


class Int8Conv2d(nn.Module):
    """A convolution with an int8 weight, one scale a channel, of activations in 8 bits with a calibrated range."""

    def __init__(self, layer: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        w = layer.weight.detach()
        scale = w.abs().amax((1, 2, 3), keepdim=True) / 127
        self.padding = layer.padding
        self.register_buffer("weight", (w / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.step = max(high - low, 1e-6) / 255
        self.zero = round(-low / self.step)

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer, with x rounded to 8 bits."""
        x = torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, 255)
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)  # type: ignore[operator]


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with int8 weights and 8-bit activations: linear layers by torch's dynamic quantization, others by ours.

    Args:
        model: in floating point, in evaluation mode.
        images: from which the ranges of convolutions' inputs are taken.
    """
    model = copy.deepcopy(model)
    ranges: dict[str, tuple[float, float]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def noting(name: str):
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            ranges[name] = (min(float(args[0].min()), 0.0), max(float(args[0].max()), 0.0))

        return note

    hooks = [m.register_forward_pre_hook(noting(name)) for name, m in layers.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Int8Conv2d(layer, *ranges[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to leave this to torchao, which is another package
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
