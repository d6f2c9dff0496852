"""Layers that can be perturbed: a registry from classes of modules to what perturbation has to know of them.

A `PerturbableLayer` turns a gradient at a module's output into one for its parameters. One registration is all that a
new kind of module needs:

    >>> import torch
    >>> from torch import nn
    >>> from jetplane.gradients import PerturbableLayer, register_layer
    >>> class Scale(nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(width))
    ...
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> class ScaleLayer(PerturbableLayer):
    ...     parameters = ("factor",)
    ...     positionwise = True
    ...
    ...     def vjp(self, module, x, cotangent):
    ...         return {"factor": (x * cotangent).reshape(-1, x.shape[-1]).sum(0)}
    >>> register_layer(Scale, ScaleLayer())
    >>> net = nn.Sequential(nn.Linear(3, 4), Scale(4))
    >>> perturbable(net, list(net.parameters()))
    20

A module is treated as the nearest registered class that it derives from (its method resolution order decides), if
both compute the same: see `layer_of`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from ..errors import ArgumentError


class PerturbableLayer(ABC):
    """What perturbation has to know of a class of modules that compute ``y = f(x, parameters)``.

    The first axis of x and y counts examples, or parts of examples in their order.

    Attributes:
        parameters: names of the module's own parameters that `vjp` accounts for. One that a module lacks is None.
        methods: names of the methods that compute y. A subclass that overrides one of them is another kind of layer.
        positionwise: whether the last axis of y holds the features of one position, and the others count positions.
        featurewise: whether a positionwise layer is moved along each of its features where it gets as many samples.
            All positions move at once, so this is exact where no later layer mixes positions: leave it out for layers
            that stand before those that do.
    """

    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    positionwise: ClassVar[bool] = False
    featurewise: ClassVar[bool] = True

    @abstractmethod
    def vjp(self, module: Any, x: Tensor, cotangent: Tensor) -> Mapping[str, Tensor]:
        """The vector-Jacobian product ``cotangent^T dy/dp`` for each parameter p, summed over examples.

        Args:
            module: an instance of the registered class.
            x: its first argument.
            cotangent: shape of y; float32 or wider, so possibly wider than x.

        Returns:
            A tensor of the parameter's shape by the name of each one in ``parameters`` that is not None; tensors for
            those that are None are ignored.
        """


class WeightPerturbableLayer(PerturbableLayer):
    """A layer that can also be perturbed at its weights, different noise for each example.

    That has the smaller variance where a layer has fewer weights than it puts out numbers for an example.
    """

    @abstractmethod
    def jvp(self, module: Any, x: Tensor, tangents: Mapping[str, Tensor]) -> Tensor:
        """The change of the output ``dy/dp tangent``, for tangents of each example's own.

        Args:
            module: an instance of the registered class.
            x: its first argument, N examples.
            tangents: (samples, N, *p.shape) by the name of each parameter p that is not None.

        Returns:
            A tensor of shape (samples, *y.shape).
        """


_registry: dict[type[nn.Module], PerturbableLayer | None] = {}


def register_layer(cls: type[nn.Module], layer: PerturbableLayer | None) -> None:
    """Say how modules of a class are perturbed. A later registration of the class replaces an earlier one.

    Args:
        cls: the class. Subclasses that compute the same are perturbed alike.
        layer: an instance, which serves all modules of the class; None if they are not to be perturbed, for example
            because their parameters are used without calling them.

    Raises:
        ArgumentError: ``cls`` is no class of modules, or ``layer`` no instance of `PerturbableLayer`.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ArgumentError(f"expected a subclass of torch.nn.Module to register, got {cls!r}")
    if layer is not None and not isinstance(layer, PerturbableLayer):
        raise ArgumentError(f"expected an instance of PerturbableLayer for {cls.__qualname__}, or None; got {layer!r}")
    _registry[cls] = layer


def layer_of(module: nn.Module) -> PerturbableLayer | None:
    """What is registered for a module, or None if it cannot be perturbed.

    The first registered class in the module's method resolution order counts. The module is perturbed only if

    - it has that class's ``forward`` (and other `PerturbableLayer.methods`), neither overridden by a subclass nor
      replaced on the instance: what another forward computes has to be registered for itself;
    - all of the layer's parameters are plain ones. Those of parametrizations (`torch.nn.utils.parametrize`, weight
      norm, spectral norm, pruning) are not, since their weights are functions of other parameters.
    """
    cls = next((c for c in type(module).__mro__ if c in _registry), None)
    layer = None if cls is None else _registry[cls]
    if layer is None:
        return None
    same = all(getattr(getattr(module, m), "__func__", None) is getattr(cls, m) for m in layer.methods)
    plain = all(name in module._parameters for name in layer.parameters)
    return layer if same and plain else None


def parameters_of(module: nn.Module, layer: PerturbableLayer) -> dict[str, nn.Parameter]:
    """The parameters of a module that a layer accounts for, by their names in it."""
    own = {name: module._parameters[name] for name in layer.parameters}
    return {name: p for name, p in own.items() if p is not None}


def registered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that can be perturbed, frozen or not, by name."""
    return {name: module for name, module in model.named_modules() if layer_of(module) is not None}


def perturbed_modules(model: nn.Module, params: Sequence[Tensor]) -> dict[str, nn.Module]:
    """The modules that can be perturbed and own one of the parameters, by name."""
    moving = {id(p) for p in params}

    def moves(module: nn.Module) -> bool:
        layer = layer_of(module)
        return layer is not None and any(id(p) in moving for p in parameters_of(module, layer).values())

    return {name: module for name, module in model.named_modules() if moves(module)}


def owned(modules: Mapping[str, nn.Module]) -> set[int]:
    """The ids of all parameters that perturbation of these modules accounts for."""
    layers = [(module, layer_of(module)) for module in modules.values()]
    return {id(p) for module, layer in layers if layer is not None for p in parameters_of(module, layer).values()}


def perturbable(model: nn.Module, params: Sequence[Tensor]) -> int:
    """How many numbers of the parameters belong to layers that can be perturbed."""
    covered = owned(perturbed_modules(model, params))
    return sum(p.numel() for p in params if id(p) in covered)


# --- the layers of torch ----------------------------------------------------------------------------------


@final
class LinearLayer(PerturbableLayer):
    """``y = x W^T + b`` for x of shape (…, in), W (out, in): the products are ``cotangent^T x`` and its row sum."""

    positionwise = True

    def vjp(self, module: nn.Linear, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """See `PerturbableLayer.vjp`."""
        rows = cotangent.reshape(-1, module.out_features)
        return {"weight": rows.mT @ x.reshape(-1, module.in_features).to(rows.dtype), "bias": rows.sum(0)}


@final
class ConvolutionLayer(WeightPerturbableLayer):
    """Convolutions of one and two dimensions, with every padding, stride, dilation and number of groups."""

    methods = ("forward", "_conv_forward")

    def vjp(self, module: nn.Conv1d | nn.Conv2d, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """See `PerturbableLayer.vjp`."""
        weight = nn_grad.conv2d_weight if module.weight.dim() == 4 else nn_grad.conv1d_weight
        settings: Any = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
        shape: Any = module.weight.shape
        return {
            "weight": weight(_padded(module, x.to(cotangent.dtype)), shape, cotangent, padding=0, **settings),
            "bias": cotangent.transpose(0, 1).flatten(1).sum(1),
        }

    def jvp(self, module: nn.Conv1d | nn.Conv2d, x: Tensor, tangents: Mapping[str, Tensor]) -> Tensor:
        """See `WeightPerturbableLayer.jvp`: a product with what each output position sees of the input."""
        weight = tangents["weight"]
        samples, n, outputs = weight.shape[:3]
        patches, positions = _patches(module, x.to(weight.dtype))
        groups = module.groups
        weight = weight.reshape(samples, n, groups, outputs // groups, -1).permute(1, 2, 0, 3, 4)
        patches = patches.reshape(n, groups, weight.shape[-1], -1)
        y = (weight.flatten(2, 3) @ patches).reshape(n, groups, samples, outputs // groups, -1)
        y = y.permute(2, 0, 1, 3, 4).reshape(samples, n, outputs, -1)
        if "bias" in tangents:
            y = y.add_(tangents["bias"].unsqueeze(-1))
        return y.reshape(samples, n, outputs, *positions)


@final
class EmbeddingLayer(PerturbableLayer):
    """``y = W[x]`` for integers x: the rows of the cotangent are added up for each entry of the table."""

    parameters = ("weight",)
    positionwise = True
    featurewise = False

    def vjp(self, module: nn.Embedding, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """See `PerturbableLayer.vjp`. The row of ``padding_idx`` has no gradient, as in torch."""
        table = torch.zeros(module.weight.shape, dtype=cotangent.dtype, device=cotangent.device)
        table.index_add_(0, x.reshape(-1), cotangent.reshape(-1, module.embedding_dim))
        if module.padding_idx is not None:
            table[module.padding_idx] = 0
        return {"weight": table}


@final
class LayerNormLayer(PerturbableLayer):
    """``y = W * normalized(x) + b``."""

    positionwise = True
    featurewise = False

    def vjp(self, module: nn.LayerNorm, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """See `PerturbableLayer.vjp`."""
        shape: Any = module.normalized_shape
        rows = cotangent.reshape(-1, *shape)
        normalized = F.layer_norm(x.to(cotangent.dtype), shape, eps=module.eps).reshape_as(rows)
        return {"weight": (normalized * rows).sum(0), "bias": rows.sum(0)}


register_layer(nn.Linear, LinearLayer())
register_layer(nn.modules.linear.NonDynamicallyQuantizableLinear, None)  # of attention, which uses its weight alone
register_layer(nn.Conv1d, ConvolutionLayer())
register_layer(nn.Conv2d, ConvolutionLayer())
register_layer(nn.Embedding, EmbeddingLayer())
register_layer(nn.LayerNorm, LayerNormLayer())


def _padded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution's input with its padding on, whatever mode and words that has."""
    if module.padding == "valid":
        return x
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(int(p), int(p)) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, [p for pair in reversed(sides) for p in pair], mode)


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, list[int]]:
    """What each output position of a convolution sees, (N, in * kernel, positions), and the positions' shape."""
    x = _padded(module, x)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    positions = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(x, kernel, dilation, 0, stride), positions
