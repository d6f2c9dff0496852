"""Activity perturbation: an estimate of the gradient from noise on what layers put out, forward only.

A layer's output ``a_n`` of example n moves along noise ``u_nk`` of its own, K samples of it. The loss's slope
along it, kept apart for each example, is ``s_nk = grad_{a_n}(L_n) . u_nk``, and

    delta_n = mean_k (s_nk u_nk),   E[delta_n] = grad_{a_n}(L_n)

turns into a direction for the parameters by the layer's vector-Jacobian product, ``sum_n delta_n x_n^T`` for
``a = W x``. The variance grows with the numbers that a layer puts out for one example, not with the number of weights.

Each layer has passes of its own that start at it: what comes before carries no coefficients, so noise on late
layers is cheap and they get more samples (`jetplane.gradients.allocation`). Nothing is held from one pass to the next
but the slopes: a last pass meets every layer's input again, redraws the noise, and adds up the directions.

A closure may run over micro-batches one after another, and so call a layer several times. Each call then moves along
directions of its own, which are absent in the other calls and cost nothing there (`LayerPlan.calls`).

Source: Ren, Kornblith, Liao, Hinton, "Scaling forward gradient with local losses", arXiv 2210.03310.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..directions import Directions
from ..directions.laws import key
from ..errors import ArgumentError, JetplaneWarning, ShapeError, UnusedParametersError, warn_user
from ..evaluation.api import evaluate
from ..evaluation.side_effects import without_side_effects
from ..jets import carried
from .active_outputs import Finish, visit
from .feedback import Feedback
from .layers import (
    PerturbableLayer,
    WeightPerturbableLayer,
    layer_of,
    owned,
    parameters_of,
    perturbed_modules,
)
from .noise import signs
from .passes import Closure, trace
from .plan import OTHERS, LayerPlan, Mode
from .rows import Slopes, grouped, slopes_along


class PerturbationEstimate(NamedTuple):
    """What `estimate` returns.

    Attributes:
        gradient: one tensor for each parameter, zero where the loss makes no use of it.
        statistics: of the feedback, for `Feedback.update`; empty without feedback.
    """

    gradient: list[Tensor]
    statistics: list[Tensor]


def estimate(
    closure: Closure,
    model: nn.Module,
    params: Sequence[Tensor],
    plans: Mapping[str, LayerPlan],
    seed: Any,
    offset: float = 0.0,
    feedback: Feedback | None = None,
    fraction: float = 1.0,
) -> PerturbationEstimate:
    """An estimate of the gradient, from perturbed activities. It is unbiased, but for plans ``per_position``.

    Args:
        closure: returns the loss. It is called several times, and must compute the same each time; torch's
            random numbers, and what it writes to buffers, are set back after each.
        model: holds the layers: modules of registered classes (`jetplane.gradients.register_layer`). Axis 0 of what
            they put out counts examples, or parts of examples in their order.
        params: what to estimate the gradient for. Those that no layer accounts for are moved themselves.
        plans: of each layer, as `jetplane.gradients.allocate` gives them for these parameters.
        seed: an integer; equal seeds give equal noise.
        offset: of a shard of a batch, how many times its examples come before it. Each example has its own noise, by
            its place in the whole batch, so that the mean of the shards' estimates is the estimate of the whole.
        feedback: predicts gradients at layers' outputs, to less variance.
        fraction: of the whole batch that a shard is.

    Raises:
        ArgumentError: no plan accounts for some of the parameters, which were frozen when the plans were made.
        ShapeError: a registered layer's products have not the names and shapes of its parameters.

    The loss has to tell its examples apart (see `jetplane.evaluate`); if it does not, the slope of the
    whole batch is taken for each example's, which is unbiased too, and as many times noisier as there are examples.

    >>> import torch
    >>> from torch.nn import functional as F
    >>> from jetplane.gradients import allocate
    >>> net, x, y = torch.nn.Sequential(torch.nn.Linear(5, 3)), torch.randn(8, 5), torch.randint(3, (8,))
    >>> closure = lambda: F.cross_entropy(net(x), y)
    >>> params = list(net.parameters())
    >>> plans = allocate(closure, net, params, passes=50)
    >>> plans["0"].mode, plans["0"].samples  # each of the three outputs is moved, so the gradient is exact
    ('basis', 3)
    >>> weight, bias = estimate(closure, net, params, plans, seed=0).gradient
    >>> exact = torch.autograd.grad(closure(), params)
    >>> bool(torch.allclose(weight, exact[0], atol=1e-6))
    True
    """
    modules = perturbed_modules(model, params)
    layers = [
        perturbed(name, modules[name], plan, key(seed, i), offset)
        for i, (name, plan) in enumerate(plans.items())
        if name in modules
    ]
    covered = owned({layer.name: layer.module for layer in layers})
    others = [p for p in params if id(p) not in covered]
    if others and OTHERS not in plans:
        shapes = [tuple(p.shape) for p in others]
        raise ArgumentError(
            f"no plan accounts for {len(others)} of {len(params)} parameters, shapes {shapes}: the plans were made "
            "while these were frozen, or for another model. Call allocate anew"
        )
    every = dict(model.named_modules())
    successors = {layer.module: every[layer.plan.successor] for layer in layers if layer.plan.successor in every}
    with torch.no_grad():
        slopes = {layer.module: layer.slopes(closure) for layer in layers}
        found = _directions(closure, params, layers, slopes, successors, feedback)
        if found is None:  # the model takes another way than when its successors were found
            found = _directions(closure, params, layers, slopes, {}, feedback)
            assert found is not None
        total, correlations = found
        if others:
            moved = _forward_gradient(closure, others, plans[OTHERS].samples, int(key(seed, -1)))
            total |= {id(p): direction for p, direction in zip(others, moved, strict=True)}
        gradient = [total[id(p)].to(p.dtype) if id(p) in total else torch.zeros_like(p) for p in params]
        if feedback is None:
            return PerturbationEstimate(gradient, [])
        errors = _errors(layers, slopes)
        statistics = feedback.sufficient_statistics(correlations, None if errors is None else errors.whole(), fraction)
        return PerturbationEstimate(gradient, statistics)


def accounted_for(closure: Closure, model: nn.Module, params: Sequence[Tensor]) -> int:
    """How many numbers of the parameters belong to layers all of whose effect on a loss goes through what they put out.

    A loss that differentiates the model itself, such as the residual of an equation, depends on derivatives of layers'
    outputs too, which no noise on the outputs moves.

    Args:
        closure: returns the loss; called once, without side effects.
        model: holds the layers.
        params: what to estimate the gradient for.
    """
    modules = perturbed_modules(model, params)
    traces, _ = trace(closure, modules, params)
    covered = owned({name: modules[name] for name in traces})
    return sum(p.numel() for p in params if id(p) in covered)


def _errors(layers: Sequence[PerturbedLayer], slopes: Mapping[nn.Module, Slopes | None]) -> Slopes | None:
    """Gradients at the last layer's output, (rows, outputs); None if they are not known exactly."""
    return slopes[layers[-1].module] if layers and layers[-1].plan.mode == "basis" else None


def _directions(
    closure: Closure,
    params: Sequence[Tensor],
    layers: Sequence[PerturbedLayer],
    slopes: Mapping[nn.Module, Slopes | None],
    successors: Mapping[nn.Module, nn.Module],
    feedback: Feedback | None,
) -> tuple[dict[int, Tensor], dict[str, Tensor]] | None:
    """A last pass: the directions by the ids of parameters, and what each layer's feedback learns from by its name.

    None if it could not be told which outputs are active.
    """
    errors = _errors(layers, slopes)
    of = {layer.module: layer for layer in layers}
    moving = {id(p) for p in params}
    total: dict[int, Tensor] = {}
    correlations: dict[str, Tensor] = {}
    read_later = set(successors.values())

    def begin(module: nn.Module, call: int, x: Tensor, y: Tensor) -> Finish:
        layer, every = of[module], slopes[module]
        slope = None if every is None else every.of(call)
        control = None
        if feedback is not None and layer.name in feedback.specs and errors is not None and call < len(errors.rows):
            own, rows = errors.of(call), layer.rows(y.shape)
            # Examples may be fewer than in the batch that was planned for, but must be the errors' own.
            if rows == len(own) and y.numel() == rows * feedback.specs[layer.name].outputs:
                control = _ControlVariate(feedback, layer.name, own, (y > 0).reshape(rows, -1))
        if module in read_later:
            x = x.clone()

        def finish(active: Tensor | None) -> None:
            if slope is None:
                return
            directions, correlation = layer.directions(call, x, y, slope, active, control)
            for name, p in layer.parameters.items():
                if id(p) in moving:
                    total[id(p)] = total[id(p)] + directions[name] if id(p) in total else directions[name]
            if correlation is not None:
                before = correlations.get(layer.name)
                correlations[layer.name] = correlation if before is None else before + correlation

        return finish

    return (total, correlations) if visit(closure, of, successors, begin) else None


def _forward_gradient(closure: Closure, params: list[Tensor], samples: int, seed: int) -> list[Tensor]:
    """``mean_k (F_k v_k)`` with the slopes F_k along random directions v_k; zeros if the loss uses no parameter."""
    directions = Directions(samples, seed=seed)
    with without_side_effects(), contextlib.suppress(UnusedParametersError):
        slope = evaluate(closure, params, directions, "none").slope
        return [directions.combine(i, p, slope / samples) for i, p in enumerate(params)]
    return [torch.zeros_like(p) for p in params]


# --- one layer --------------------------------------------------------------------------------------------


class _ControlVariate(NamedTuple):
    """The feedback's part in the estimate of one layer."""

    feedback: Feedback
    name: str
    errors: Tensor  # (rows, errors)
    positive: Tensor  # which outputs are above zero, (rows, outputs)

    def predict(self) -> Tensor:
        return self.feedback.predict(self.name, self.errors, self.positive)

    def correlate(self, residual: Tensor) -> Tensor:
        return self.feedback.correlate(self.errors, self.positive, residual)


@dataclass(frozen=True)
class PerturbedLayer(ABC):
    """A layer with its plan. A subclass for each mode says along what the layer moves.

    Attributes:
        name: of the module in the model.
        module: of a registered class.
        layer: what is registered for it.
        parameters: what directions are found for, by the names in the module.
        plan: how it is perturbed.
        stream: key of its random numbers.
        offset: how many times as many examples come before these in the whole batch.
    """

    name: str
    module: nn.Module
    layer: PerturbableLayer
    parameters: dict[str, nn.Parameter]
    plan: LayerPlan
    stream: Any
    offset: float

    @abstractmethod
    def tangents(self, call: int, x: Tensor, y: Tensor, samples: range) -> Tensor:
        """Changes of the output y of a call, (samples, *y.shape)."""

    @abstractmethod
    def directions(
        self, call: int, x: Tensor, y: Tensor, slopes: Tensor, active: Tensor | None, control: _ControlVariate | None
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """A call's part of the gradient's estimate, by the names of parameters.

        Args:
            call: its number in the pass.
            x: the module's input.
            y: its output, of which only shape, dtype and device count: it may have been written to.
            slopes: (rows, samples).
            active: which outputs are active, (examples, outputs); None if all count as such.
            control: predicts the gradient at the output; None without feedback.

        Returns:
            The directions, and what the feedback learns from: `Feedback.correlate` of what was not predicted, or None.
        """

    def rows(self, shape: torch.Size) -> int:
        """How many parts of an output are judged by slopes of their own."""
        return shape[:-1].numel() if self.plan.per_position else shape[0]

    def vjp(self, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """The registered layer's vector-Jacobian products, checked."""
        products = self.layer.vjp(self.module, x, cotangent)
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        found = {name: tuple(t.shape) for name, t in products.items() if name in expected}
        if found != expected:
            raise ShapeError(
                f"{type(self.layer).__name__}.vjp must return a tensor of the shape of each parameter, {expected}; "
                f"got { ({name: tuple(t.shape) for name, t in products.items()}) } for layer {self.name!r}"
            )
        return {name: products[name] for name in expected}

    def slopes(self, closure: Closure) -> Slopes | None:
        """Slopes of the loss's parts along the layer's tangents; None if it does not depend on the layer."""
        found = []
        for samples in self.plan.split():

            def tangents(module: nn.Module, call: int, x: Tensor, y: Tensor, samples: range = samples) -> Tensor:
                return self.tangents(call, x, y, samples)

            slopes = slopes_along(closure, [self.module], tangents, self.rows, self.plan.calls, len(samples))
            if slopes is None:
                return None
            found.append(slopes)
        return Slopes(torch.cat([slopes.values for slopes in found], 2), found[0].rows)


@final
class _MovedOutputs(PerturbedLayer):
    """Random signs on the outputs: ``delta_n = mean_k (s_nk u_nk)``, with feedback as control variate."""

    def tangents(self, call: int, x: Tensor, y: Tensor, samples: range) -> Tensor:
        return signs(key(self.stream, call), samples, y.shape, y, self.offset)

    def directions(
        self, call: int, x: Tensor, y: Tensor, slopes: Tensor, active: Tensor | None, control: _ControlVariate | None
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        rows = self.rows(y.shape)
        count = self.plan.samples
        slopes = grouped(slopes, rows, self.plan.order) / count
        mask = None if active is None else active.reshape(rows, -1)
        prediction = None if control is None else control.predict()
        if prediction is not None and mask is not None:
            prediction.mul_(mask)
        delta = torch.zeros(y.shape, dtype=carried(y.dtype), device=y.device).reshape(rows, -1)
        for samples in self.plan.split():
            noise = self.tangents(call, x, y, samples).reshape(len(samples), rows, -1)
            for k, u in zip(samples, noise, strict=True):
                slope = slopes[:, k]
                if prediction is not None:
                    slope = slope - torch.linalg.vecdot(prediction, u) / count
                delta.addcmul_(u, slope.unsqueeze(1))
        if mask is not None:
            delta.mul_(mask)
        correlation = None
        if control is not None and prediction is not None:
            correlation = control.correlate(delta)
            delta.add_(prediction)
        return self.vjp(x, delta.reshape(y.shape)), correlation


@final
class _MovedFeatures(PerturbedLayer):
    """Each feature of a positionwise layer by itself: slopes are the gradient at the output, exactly."""

    def tangents(self, call: int, x: Tensor, y: Tensor, samples: range) -> Tensor:
        unit = torch.eye(y.shape[-1], dtype=carried(y.dtype), device=y.device)[samples.start : samples.stop]
        return unit.reshape(len(samples), *([1] * (y.dim() - 1)), -1).expand(-1, *y.shape).contiguous()

    def rows(self, shape: torch.Size) -> int:
        return shape[:-1].numel()

    def directions(
        self, call: int, x: Tensor, y: Tensor, slopes: Tensor, active: Tensor | None, control: _ControlVariate | None
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        rows = self.rows(y.shape)
        if self.plan.order != "own" or len(slopes) % max(rows, 1):
            warn_user(
                f"the loss has {len(slopes)} parts for {rows} rows of layer {self.name!r}, another ratio than when "
                "this was planned: whose they are is not known, and the layer's parameters stay without an estimate",
                JetplaneWarning,
            )
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}, None
        return self.vjp(x, grouped(slopes, rows, self.plan.order).reshape(y.shape)), None


@final
class _MovedWeights(PerturbedLayer):
    """Random signs on the weights, each example its own: the direction is ``sum_n mean_k (s_nk W_nk)``."""

    def tangents(self, call: int, x: Tensor, y: Tensor, samples: range) -> Tensor:
        assert isinstance(self.layer, WeightPerturbableLayer)
        noise = self._noise(call, y, samples).split(self._sizes, -1)
        shaped = {
            n: t.reshape(*t.shape[:2], *p.shape) for (n, p), t in zip(self.parameters.items(), noise, strict=True)
        }
        return self.layer.jvp(self.module, x, shaped)

    def directions(
        self, call: int, x: Tensor, y: Tensor, slopes: Tensor, active: Tensor | None, control: _ControlVariate | None
    ) -> tuple[Mapping[str, Tensor], Tensor | None]:
        slopes = grouped(slopes, self.rows(y.shape), self.plan.order) / self.plan.samples
        total = sum(
            slopes[:, samples.start : samples.stop].mT.reshape(-1) @ self._noise(call, y, samples).flatten(0, 1)
            for samples in self.plan.split()
        )
        assert isinstance(total, Tensor)
        named = zip(self.parameters.items(), total.split(self._sizes), strict=True)
        return {name: t.reshape(p.shape) for (name, p), t in named}, None

    @property
    def _sizes(self) -> list[int]:
        return [p.numel() for p in self.parameters.values()]

    def _noise(self, call: int, y: Tensor, samples: range) -> Tensor:
        """Signs for all parameters side by side, (samples, N, numbers)."""
        return signs(key(self.stream, call), samples, (len(y), sum(self._sizes)), y, self.offset)


_MODES: dict[Mode, type[PerturbedLayer]] = {
    "outputs": _MovedOutputs,
    "basis": _MovedFeatures,
    "weights": _MovedWeights,
}


def perturbed(name: str, module: nn.Module, plan: LayerPlan, stream: Any, offset: float = 0.0) -> PerturbedLayer:
    """A layer that moves as its plan says.

    Raises:
        ArgumentError: the module cannot be perturbed.
    """
    layer = layer_of(module)
    if layer is None:
        raise ArgumentError(f"module {name!r} cannot be perturbed: its class {type(module).__name__} is not registered")
    return _MODES[plan.mode](name, module, layer, parameters_of(module, layer), plan, stream, offset)
