"""Local heads: each layer's gradient of a loss of its own, by a linear read-out, and no gradient crosses a layer.

A layer puts out y, the model makes ``h = f(y)`` of it by activation functions and pooling, and the layer's head reads

    z_n = M h_n + c,    loss_n = l(z_n, target_n)

with the loss function l and the targets that the closure has. With ``e_n = grad_z(loss_n)`` in closed form, the head
learns from ``sum_n e_n h_n^T`` by Adam's steps, and the layer's part of the estimate is its own vector-Jacobian product
with ``f'(y) (M^T e_n)``. The layer whose output the loss takes needs no head: e_n is exact there.

One pass of the closure gives all of it, at about the cost of two forward passes. It is an estimate of the gradient of
other losses than the model's, and biased. What a plane makes of it is judged by the model's loss.

Sources: Nøkland and Eidnes, "Training neural networks with local error signals", arXiv 1901.06656; Mono-Forward, arXiv
2501.09238, equations 1 to 4, which has the same heads for ReLU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentError, JetplaneWarning, LossError
from ..evaluation.interception import LOSSES
from ..evaluation.leaving import plain_run
from ..evaluation.side_effects import without_side_effects
from ..rules.elementwise import SLOPES
from ..rules.registry import aten
from .allocation import signature
from .estimators import Batch, Estimate, Estimator, State, model_of
from .layers import PerturbableLayer, layer_of, owned, parameters_of, perturbed_modules
from .local_losses import NAMES, LocalLoss, met
from .passes import hooked

MOST = 4096  # features that a head reads of a row; of a layer with more, the means over positions
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam's steps of the heads


@final
@dataclass(frozen=True)
class LocalHeads(Estimator):
    """The gradients of layers' local losses: see `jetplane.gradients.heads`.

    Heads are chosen by the loss function that the closure calls, `torch.nn.functional.cross_entropy` (of classes,
    probabilities, or the next token at each position) or `torch.nn.functional.mse_loss`, and read the outputs of the
    layers that `register_layer` knows. Parameters of other modules have no estimate, which a warning says once.

    Attributes:
        rate: learning rate of Adam's steps of the heads.
        recompute: find the targets in an extra pass, so that each layer is finished before the next one runs and
            no layer's input is kept. By default the extra pass is saved, and the inputs of all layers are kept until
            the loss is computed, as in reverse mode.

    Raises:
        ArgumentError: a rate that is not positive; (in a step) a closure with no known loss function, or with several.

    >>> import torch, jetplane as jp
    >>> from torch.nn import functional as F
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(256, 8)
    >>> y = (x[:, 0] > x[:, 1] ** 2).long()
    >>> opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=jp.gradients.LocalHeads())
    >>> losses = [opt.step(lambda: F.cross_entropy(model(x), y)) for _ in range(96)]
    >>> bool(losses[-1] < 0.5 * losses[0])
    True
    """

    rate: float = 3e-3
    recompute: bool = False
    alone = True

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ArgumentError(f"rate must be positive, got {self.rate}")

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """See `Estimator`: which parameters move, and of which layers they are."""
        assert model is not None
        return signature(model, params)

    def prepare(self, batch: Batch, state: State) -> State:
        """See `Estimator`: one pass tells which layers have a head, and how large it is."""
        found = _Pass(model_of(batch), batch.params, {})
        with without_side_effects():
            loss = found.run(batch.closure)
        known, heads = state.get("heads", {}), {}
        generator = torch.Generator().manual_seed(batch.seed % 2**63)
        for name, features in found.features(loss).items():
            shape = (loss.width, features + 1)
            old = known.get(name)
            fits = old is not None and tuple(old["weight"].shape) == shape
            # As torch's linear layers begin. Heads of zeros would tell all outputs of a layer the same.
            drawn = (2 * torch.rand(shape, generator=generator, dtype=_dtype(batch)) - 1) / features**0.5
            weight = drawn.to(batch.params[0].device)
            zeros = torch.zeros_like(weight)
            heads[name] = old if fits else {"weight": weight, "average": zeros, "square": zeros}
        _say_what_is_left(found.covered(loss), batch.params)
        return {"heads": heads, "steps": state.get("steps", 0)}

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """See `Estimator`: those of the parameters, of the heads, and the loss."""
        heads = [head["weight"].shape for head in state["heads"].values()]
        return [*(p.shape for p in batch.params), *heads, torch.Size(())]

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`."""
        heads = {name: head["weight"] for name, head in state["heads"].items()}
        targets = None
        if self.recompute:
            first = _Pass(model_of(batch), batch.params, {})
            with without_side_effects():
                targets = first.run(batch.closure)
        found = _Pass(model_of(batch), batch.params, heads, targets)
        with contextlib.nullcontext() if batch.plane is None else without_side_effects():
            found.run(batch.closure)
        total = found.total
        gradient = [total[id(p)].to(p.dtype) if id(p) in total else torch.zeros_like(p) for p in batch.params]
        return [*gradient, *(found.of_heads.get(n, torch.zeros_like(w)) for n, w in heads.items()), found.value]

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        count, steps = len(batch.params), state["steps"] + 1
        heads = {}
        for (name, head), g in zip(state["heads"].items(), means[count:-1], strict=True):
            average, square = torch.lerp(g, head["average"], BETAS[0]), torch.lerp(g * g, head["square"], BETAS[1])
            step = (average / (1 - BETAS[0] ** steps)) / ((square / (1 - BETAS[1] ** steps)).sqrt() + EPSILON)
            heads[name] = {"weight": head["weight"] - self.rate * step, "average": average, "square": square}
        return Estimate(means[:count], {"heads": heads, "steps": steps}, means[-1])


def _dtype(batch: Batch) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in batch.params) else torch.float32


def _say_what_is_left(covered: set[int], params: Sequence[Tensor]) -> None:
    left = [tuple(p.shape) for p in params if id(p) not in covered]
    if len(left) == len(params):
        raise ArgumentError(
            "no layer has a local head: heads read the outputs of layers that jetplane.gradients.register_layer knows, "
            "with as many rows as the loss has. Take jetplane.gradients.ActivityPerturbation()"
        )
    if left:
        warnings.warn(
            f"{len(left)} of {len(params)} parameters, shapes {left}, belong to no layer with a local head, and have "
            "no estimate of their gradient: they stay. jetplane.gradients.register_layer makes layers known",
            JetplaneWarning,
            stacklevel=2,
        )


# --- one pass -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """A call of a layer, and what the model makes of its output.

    Attributes:
        name: of the layer.
        module: it.
        x: its input.
        y: its output; None once it has gone through a function.
        h: what has become of it so far.
        back: for each function on the way the product with its transposed derivative, first the first.
    """

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor | None
    h: Tensor
    back: list[Callable[[Tensor], Tensor]] = field(default_factory=list)


@final
class _Pass(TorchFunctionMode):
    """A pass of a closure in which layers are met, functions of their outputs, and the loss function.

    Args:
        model: holds the layers.
        params: those that move.
        heads: weights (width, features + 1) by the names of layers.
        targets: the loss, where it is known before.

    Attributes:
        total: gradients by the ids of parameters.
        of_heads: gradients of the heads' weights.
        value: the closure's loss.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], heads: dict[str, Tensor], targets: LocalLoss | None = None
    ) -> None:
        super().__init__()
        self.total: dict[int, Tensor] = {}
        self.of_heads: dict[str, Tensor] = {}
        self.value = torch.zeros(())
        self._names = {module: name for name, module in perturbed_modules(model, params).items()}
        self._params = params
        self._moving = {id(p) for p in params}
        self._heads = heads
        self._targets = targets
        self._open: list[_Call] = []  # calls that are not done with
        self._losses: list[LocalLoss] = []
        self._others: set[str] = set()

    def run(self, closure: Callable[[], Any]) -> LocalLoss:
        """Run the closure.

        Raises:
            ArgumentError: it calls no loss function that is known, or several.
            LossError: it returns no scalar.
        """
        with plain_run(self._params, again=True), hooked(self._after, self._names), self:
            value = closure()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise LossError(f"the closure must return a scalar loss, got {type(value).__name__}")
        self.value = value.detach().reshape(())
        if len(self._losses) != 1:
            what = "several" if self._losses else f"{', '.join(sorted(self._others)) or 'none'}, of which none is known"
            raise ArgumentError(
                f"local heads need a closure that calls one loss function out of {NAMES}; this one calls {what}. "
                "Take jetplane.gradients.ActivityPerturbation()"
            )
        (loss,) = self._losses
        if self._heads:
            self._finish(loss, last=True)
        return loss

    def features(self, loss: LocalLoss) -> dict[str, int]:
        """How many numbers of a row each layer's head reads; layers that need none, or have none, are not there."""
        read = {call.name: _read(call, loss.rows) for call in self._open if not _is_output(call, loss)}
        return {name: found[0].shape[1] for name, found in read.items() if found is not None}

    def covered(self, loss: LocalLoss) -> set[int]:
        """The ids of parameters that will have a gradient."""
        named = self.features(loss)
        calls = [call for call in self._open if call.name in named or _is_output(call, loss)]
        return owned({call.name: call.module for call in calls})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOSSES:
            loss = met(func, args, kwargs)
            if loss is None:
                self._others.add(func.__name__)
            else:
                self._losses.append(loss)
            return func(*args, **kwargs)
        call = None
        if args and isinstance(args[0], Tensor):
            call = next((c for c in reversed(self._open) if c.h is args[0]), None)
        follow = None if call is None else _FOLLOWED.get(getattr(func, "__name__", ""))
        if call is None or follow is None:
            return func(*args, **kwargs)
        h, back = follow(func, args, kwargs)
        if back is not None:
            call.h, call.y = h, None  # of which nothing but the next layer's input need be kept
            call.back.append(back)
        return h

    def _after(self, module: nn.Module, number: int, x: Tensor, y: Tensor) -> None:
        if self._targets is not None and self._heads:
            self._finish(self._targets, last=False)
        self._open.append(_Call(self._names[module], module, x, y, y))

    def _finish(self, loss: LocalLoss, last: bool) -> None:
        """Add up what the open calls give, and let go of them."""
        for call in self._open:
            layer = layer_of(call.module)
            assert layer is not None
            if last and _is_output(call, loss):
                self._add(call, layer, _in_place_of(call.h, loss))
            elif call.name in self._heads and (read := _read(call, loss.rows)) is not None:
                self._add(call, layer, self._through(call, self._heads[call.name], loss, *read))
        self._open = []

    def _through(
        self, call: _Call, head: Tensor, loss: LocalLoss, features: Tensor, unread: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The gradient of the head's loss at the layer's output; the head's own is added up."""
        features = features.to(head.dtype)
        weight, bias = head[:, :-1], head[:, -1]
        e = loss.gradient(torch.addmm(bias, features, weight.mT))
        own = torch.cat([e.mT @ features, e.sum(0).unsqueeze(1)], 1)
        self.of_heads[call.name] = self.of_heads[call.name] + own if call.name in self.of_heads else own
        g = unread(e @ weight)
        for back in reversed(call.back):
            g = back(g)
        return g

    def _add(self, call: _Call, layer: PerturbableLayer, cotangent: Tensor) -> None:
        products = layer.vjp(call.module, call.x, cotangent)
        for name, p in parameters_of(call.module, layer).items():
            if id(p) in self._moving:
                g = products[name]
                self.total[id(p)] = self.total[id(p)] + g if id(p) in self.total else g


def _is_output(call: _Call, loss: LocalLoss) -> bool:
    """Whether the loss function takes the layer's output itself, in whatever shape."""
    y, output = call.y, loss.output
    return y is not None and y.numel() == output.numel() and y.data_ptr() == output.data_ptr()


def _in_place_of(y: Tensor, loss: LocalLoss) -> Tensor:
    """The loss's gradient at a tensor of which its output is a view."""
    output, gradient = loss.output, loss.own_gradient()
    found = torch.empty_strided(output.shape, output.stride(), dtype=gradient.dtype, device=gradient.device)
    return found.copy_(gradient).as_strided(y.shape, y.stride())


def _read(call: _Call, rows: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """What a head reads of a layer, (rows, features), and what brings a gradient at it back to the shape of h.

    None if the layer's output has not a part for each row of the loss.
    """
    h, layer = call.h, layer_of(call.module)
    if layer is not None and layer.positionwise and h.dim() > 1 and h.shape[:-1].numel() == rows:
        return h.reshape(rows, -1), lambda g: g.reshape(h.shape)
    if h.dim() == 0 or h.shape[0] != rows:
        return None
    if layer is not None and layer.positionwise and h.dim() > 2:
        count = h.shape[1:-1].numel()
        return h.reshape(rows, count, -1).mean(
            1
        ), lambda g: (g / count).unsqueeze(1).expand(-1, count, -1).reshape(h.shape)
    if h.dim() > 2 and h[0].numel() > MOST:
        count = h[0, 0].numel()
        return h.flatten(2).mean(2), lambda g: (g / count).unsqueeze(2).expand(-1, -1, count).reshape(h.shape)
    return h.reshape(rows, -1), lambda g: g.reshape(h.shape)


# --- functions between layers ---------------------------------------------------------------------------------

Followed = tuple[Any, Callable[[Tensor], Tensor] | None]  # the result, and the transposed derivative where it is known


def _relu(func: Any, args: Any, kwargs: Any) -> Followed:
    h = func(*args, **kwargs)
    return h, lambda g: g * (h > 0)


def _smooth(name: str) -> Callable[[Any, Any, Any], Followed]:
    slope = SLOPES[name]

    def follow(func: Any, args: Any, kwargs: Any) -> Followed:
        x, h = args[0], func(*args, **kwargs)
        settings = {key: value for key, value in kwargs.items() if key != "inplace"}
        return h, None if h is x else lambda g: slope(g, x, h, *args[1:2] if name == "elu" else (), **settings)

    return follow


def _max_pool(func: Any, args: Any, kwargs: Any) -> Followed:
    x, *rest = args
    if kwargs.get("return_indices", False) or len(rest) > 5:
        return func(*args, **kwargs), None
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, rest, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    if x.dim() != 4:
        return func(*args, **kwargs), None
    h, indices = F.max_pool2d(x, **given, return_indices=True)
    size = given["kernel_size"]
    stride = given.get("stride") or size
    settings = [_pair(v) for v in (size, stride, given.get("padding", 0), given.get("dilation", 1))]
    ceil = given.get("ceil_mode", False)
    return h, lambda g: aten.max_pool2d_with_indices_backward(g.contiguous(), x, *settings, ceil, indices)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


_FOLLOWED: dict[str, Callable[[Any, Any, Any], Followed]] = {
    "relu": _relu,
    "relu_": _relu,
    "max_pool2d": _max_pool,
    "_max_pool2d": _max_pool,
} | {name: _smooth(name) for name in ("tanh", "sigmoid", "silu", "gelu")}
