"""The kinds of layers that can be perturbed: from the change of an output to a direction for the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as nn_grad


class Layer(ABC):
    """A kind of module: from the change of its output, or noise on its weights, to a direction."""

    @abstractmethod
    def products(self, module: Any, x: Tensor, y: Tensor) -> int:
        """Multiply-adds of a call."""

    @abstractmethod
    def weights(self, module: Any, x: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with ``sum_n delta_n . d output_n / d parameter``."""


class _Linear(Layer):
    def products(self, module: nn.Linear, x: Tensor, y: Tensor) -> int:
        return y.numel() * module.in_features

    def weights(self, module: nn.Linear, x: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        flat = delta.reshape(-1, module.out_features)
        yield module.weight, flat.mT @ x.reshape(-1, module.in_features).to(flat.dtype)
        if module.bias is not None:
            yield module.bias, flat.sum(0)


class _Convolution(Layer):
    def products(self, module: Any, x: Tensor, y: Tensor) -> int:
        return y.numel() * module.weight[0].numel()

    def weights(self, module: Any, x: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x, settings = _padded(module, x.to(delta.dtype))
        of_weight = nn_grad.conv2d_weight if module.weight.dim() == 4 else nn_grad.conv1d_weight
        yield module.weight, of_weight(x, module.weight.shape, delta, **settings)
        if module.bias is not None:
            yield module.bias, delta.transpose(0, 1).flatten(1).sum(1)


class _Embedding(Layer):
    def products(self, module: nn.Embedding, x: Tensor, y: Tensor) -> int:
        return y.numel()

    def weights(self, module: nn.Embedding, x: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.zeros(module.weight.shape, dtype=delta.dtype, device=delta.device)
        rows.index_add_(0, x.reshape(-1), delta.reshape(-1, module.embedding_dim))
        if module.padding_idx is not None:
            rows[module.padding_idx] = 0
        yield module.weight, rows


class _LayerNorm(Layer):
    def products(self, module: nn.LayerNorm, x: Tensor, y: Tensor) -> int:
        return y.numel()

    def weights(self, module: nn.LayerNorm, x: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        shape = module.normalized_shape
        flat = delta.reshape(-1, *shape)
        if module.weight is not None:
            yield module.weight, (F.layer_norm(x.to(delta.dtype), shape, eps=module.eps).reshape_as(flat) * flat).sum(0)
        if module.bias is not None:
            yield module.bias, flat.sum(0)


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: _Linear(),
    nn.Conv1d: _Convolution(),
    nn.Conv2d: _Convolution(),
    nn.Embedding: _Embedding(),
    nn.LayerNorm: _LayerNorm(),
}


def _padded(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A convolution's input with its padding on, whatever mode and words it has, and the settings left."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    return x, {"stride": module.stride, "padding": 0, "dilation": module.dilation, "groups": module.groups}


def patches(module: Any, x: Tensor) -> Tensor:
    """What each output position of a convolution sees: (N, fan-in, positions)."""
    x, settings = _padded(module, x)
    kernel, stride, dilation = module.kernel_size, settings["stride"], settings["dilation"]
    if x.dim() == 3:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(x, kernel, dilation, 0, stride)


def moving(model: nn.Module, params: Sequence[Tensor]) -> dict[str, nn.Module]:
    """The modules that can be perturbed and own one of the parameters, by name."""
    ids = {id(p) for p in params}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in LAYERS and any(id(p) in ids for p in module.parameters(recurse=False))
    }


def perturbable(model: nn.Module, params: Sequence[Tensor]) -> int:
    """How many numbers of the parameters belong to layers that can be perturbed."""
    owned = {id(p) for layer in moving(model, params).values() for p in layer.parameters(recurse=False)}
    return sum(p.numel() for p in params if id(p) in owned)


def weights_of(module: nn.Module) -> int:
    """How many numbers its own parameters have."""
    return sum(p.numel() for p in module.parameters(recurse=False))


def has_weight_noise(module: nn.Module) -> bool:
    """Whether noise may be on the weights, of each example its own."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
