"""Test-time adaptation: a frozen model is fitted to new data, without labels and without a backward pass.

The adapted numbers are a scale and a shift for each channel of each call of a normalization layer, and whatever
parameters the user names, such as prompts. They are stored beside the model, whose weights may be int8. For each batch:

1. Each normalization layer is given back the mean and the standard deviation that its output had on source data,
   channel by channel. Batch statistics do this for BatchNorm; here it works for any normalization, in the same pass.
2. The remaining shift r is measured at the inputs of the layers with weights and at the logits: moments of the batch
   minus those of the source, in standard deviations of the source, divided by the root of the number of channels. The
   loss is that of FOA (Niu et al., arXiv 2404.01650, equation 5), in these units:

       L = entropy_weight * mean entropy of the predictions + |r|^2 + decay * |offsets|^2

   r has the offsets among its components, times the root of ``decay``, in what follows.

3. A Gauss-Newton step ``v = -(J^T J + mu I)^-1 J^T r`` is computed from the Jacobian J of r, measured once on source
   data, and from r of the previous batch. It is split by layers. The parts and the previous step are the directions of
   a plane. One evaluation (`jetplane.evaluate`) gives the slope and the Gauss-Newton curvature of the current L along
   them, and these determine the coefficient of each direction.

4. The pass that predicts also tells the loss after the step. Where that is higher than before, half of the step is
   tried, then a quarter, then the batch is predicted without one; at once, where the plane promises no more than
   rounding. All passes of a batch see the same random numbers, if the model draws some. A step that does not suit later
   batches is taken back by their planes, which have it as a direction.

With K directions a step costs as many products as 1 + K forward passes for the plane, and one pass that predicts.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._torch import transform_level
from .errors import (
    ArgumentError,
    CheckpointError,
    DerivativeError,
    DTypeError,
    JetplaneWarning,
    NonFiniteError,
    ShapeError,
)
from .evaluation.api import evaluate
from .evaluation.chunks import free_memory
from .evaluation.compilers import eager
from .evaluation.side_effects import RandomState
from .rules import loss as loss_function
from .rules import quantization
from .rules.rounding import Rounding
from .subspace.descent import SaddleFree
from .transforms.costs import amount
from .transforms.forward import jacobian

BY_SECOND_AXIS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
NORMALIZATION = (nn.LayerNorm, nn.RMSNorm, *BY_SECOND_AXIS)
WITH_MODES = (*BY_SECOND_AXIS[1:], nn.modules.dropout._DropoutNd, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)
EPS = 1e-5  # added to variances
SMALLEST = 1e-2  # standard deviation that a distance is measured in
PARTS = (1.0, 0.5, 0.25)  # of a step that are tried
EXAMPLES, DIRECTIONS = 128, 16  # of source data that J is measured on, and how many at a time

Moments = tuple[Tensor, Tensor]  # mean and standard deviation of each channel
Batch = Tensor | Mapping[str, Any]

NOT_FINITE = (
    "statistics or the loss of {} are NaN or infinite; does it hold NaN, or does the model overflow in half precision? "
    "Values of all examples enter the moments"
)


@final
class Adapter:
    """A model that adapts to each batch it is given and predicts it. `jetplane.adaptation` describes the method.

    Args:
        model: in evaluation mode, on one device. For a batch of N examples it returns logits (N, ..., classes), or an
            object with ``logits``, or a dict with "logits", as the models of transformers do. Its weights may be
            quantized, in half precision, compiled. It is not modified.
        source: a batch of a few hundred examples like those the model was trained on, without labels: a tensor, or a
            dict of the model's keyword arguments. The first axis of tensors is that of examples.
        layers: the normalization layers whose scales and shifts move; by default all of `torch.nn`'s that the model
            calls. A layer that is called several times has statistics, scales and shifts for each call.
        watched: modules whose inputs are compared with those of source data; by default all with a ``weight`` that are
            not normalization layers.
        params: parameters or buffers of the model that move too, such as the prompts of a vision transformer.
        k: the largest number of directions of a plane.
        entropy_weight: weight of the entropy of the predictions, at least 0.
        decay: weight of ``|offsets|^2``, at least 0; for streams of some hundred batches without a `reset` 0.03. It
            keeps them from lowering the entropy ever further, by predictions that are sure and wrong.
        damping: mu, in units of the mean of the diagonal of J^T J, more than 0.
        derivative: the derivative of quantized activations: see `jetplane.quantization`.

    Attributes:
        layers: the normalization layers that are adapted.
        offsets: what moves, (D,), float32 at least: for each call of a layer the relative change of its scale and its
            shift in standard deviations of the source, for each channel; then what is added to each of ``params``.

    Channels are the second axis of what BatchNorm, GroupNorm, InstanceNorm and convolutions work on; of other modules
    the axis that is as long as their ``weight``, the last where none or several are.

    Batches should have about ten examples or more, since their moments are compared. An adapter is for one thread.
    Others may use the model meanwhile, unless ``params`` are given. To measure J takes D / 16 runs of 16 directions
    each, and memory for 2 D (D + R) numbers, with R twice the number of channels that are compared.

    Raises:
        ArgumentError: nothing to adapt; a layer, watched module or parameter that the model does not have or does not
            call; a model in training mode, or that changes when it is called; k < 2; a weight outside its domain; a
            batch or an output of another type; an empty batch; J does not fit into memory.
        ShapeError: a layer, a watched module or the logits have a single value for each channel.
        DTypeError: ``params`` that are not floating.
        NonFiniteError: NaN or infinity in the source or its statistics.
        DerivativeError: nothing that is adapted moves what is compared, or what `jetplane.jacobian` refuses.

    Warns:
        JetplaneWarning: a normalization layer that is not called, or that moves nothing that is compared.

    >>> import torch, jetplane as jp
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    >>> adapter = jp.Adapter(model, torch.randn(256, 8))
    >>> logits = [adapter(batch) for batch in 2 * torch.randn(5, 64, 8) + 1]
    >>> adapter.reset()  # for data of another kind
    """

    def __init__(
        self,
        model: nn.Module,
        source: Batch,
        *,
        layers: Sequence[nn.Module] | None = None,
        watched: Sequence[nn.Module] | None = None,
        params: Sequence[Tensor] = (),
        k: int = 10,
        entropy_weight: float = 0.3,
        decay: float = 0.0,
        damping: float = 0.1,
        derivative: Rounding = "straight-through",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"expected Adapter(model, source) with a torch.nn.Module, got {type(model).__name__}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ArgumentError(
                f"k must be at least 2, for a part of the Gauss-Newton step and the previous step; got {k!r}"
            )
        if not (0 <= entropy_weight < torch.inf and 0 <= decay < torch.inf and 0 < damping < torch.inf):
            raise ArgumentError(
                "expected entropy_weight >= 0, decay >= 0 and damping > 0, all finite; got "
                f"{entropy_weight}, {decay} and {damping}"
            )
        self.model, self.k, self.entropy_weight, self.decay = model, k, entropy_weight, decay
        self.derivative: Rounding = derivative
        self.layers = [m for m in model.modules() if isinstance(m, NORMALIZATION)] if layers is None else list(layers)
        self.watched = list(weighted_modules(model) if watched is None else watched)
        self._params = _named(model, params)
        if not self.layers and not self._params:
            raise ArgumentError(
                "expected a model with normalization layers, found none; name the layers to adapt with layers=[...], "
                "or parameters with params=[...]"
            )
        self._versions: dict[str, Any] | None = None
        self._check_frozen()
        with torch.inference_mode(False), torch.no_grad():
            self._measure(source)
            self.layers = self._called(self.layers, self._targets, None if layers is None else "layers")
            if watched is not None:
                self._called(self.watched, self._source, "watched")
            self._newton = self._gauss_newton(source, damping)
        self._check_frozen()
        self.reset()

    def reset(self) -> None:
        """Undo the adaptation."""
        self.offsets = torch.zeros_like(self.offsets)
        self._last: Tensor | None = None  # r of the batch before
        self._step: Tensor | None = None  # the step before

    def restarted(self) -> Adapter:
        """A new adapter for the same model and source, which has not adapted yet."""
        other = copy.copy(self)
        other._versions = self._versions
        other.reset()
        return other

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Adapt to a batch, and give its logits. If an error is raised, the adaptation is as it was before.

        Raises:
            ArgumentError, ShapeError: as of the class, for this batch; channels, or the calls of modules, are not those
                of the source; the model was changed.
            NonFiniteError: NaN or infinity in the batch, or in what the model makes of it.
            DerivativeError: as `jetplane.evaluate`.
        """
        if transform_level() is not None:
            raise ArgumentError("an adapter cannot be called inside torch.vmap or torch.func's transforms; use a loop")
        self._check_frozen()
        offsets, begin = self.offsets, RandomState()
        last = self._shift(offsets, batch)[1] if self._last is None else self._last
        with _without_autocast(offsets):
            directions = self._directions(self._newton @ last)

        def loss(logits: Tensor, r: Tensor) -> Tensor:
            return self.entropy_weight * entropy(logits) + r.square().sum()

        def closure() -> Tensor:
            logits, found = self._run(offsets, batch)
            r = self._residuals(found, offsets)
            with loss_function():
                return loss(logits, r)

        try:
            begin.restore()
            with quantization(self.derivative):
                plane = evaluate(closure, [offsets], [directions], "ggn")
        except NonFiniteError as error:
            raise NonFiniteError(NOT_FINITE.format("a batch")) from error
        with _without_autocast(offsets):
            kappa = SaddleFree()(plane.slope, plane.curvature)
            step = kappa.to(offsets) @ directions
            decrease = -(plane.slope.to(kappa) @ kappa) / 2
            tells = bool(decrease > torch.finfo(plane.value.dtype).eps * plane.value.abs())
        for part in (*(PARTS if tells else PARTS[:1]), 0.0):
            begin.restore()
            try:
                logits, last = self._shift(offsets + part * step, batch)
            except NonFiniteError:
                if part == 0:
                    raise
                continue
            with _without_autocast(offsets):
                if part == 0 or bool(loss(logits, last) <= plane.value):
                    break
        self.offsets, self._last = offsets + part * step, last
        self._step = part * step if part else self._step
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def predicted(self, batch: Batch) -> Tensor:
        """The logits of a batch under the current adaptation, which does not change.

        Raises:
            ArgumentError, ShapeError: as a call.
        """
        self._check_frozen()
        return self._run(self.offsets, batch, compare=False)[0]

    def state_dict(self) -> dict[str, Tensor | None]:
        """What the adapter has learned, without what was measured on source data."""
        return {"offsets": self.offsets, "residuals": self._last, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Go on from the `state_dict` of an adapter for the same model and source.

        Raises:
            CheckpointError: it is no such state, or of an adapter of other sizes.
        """
        offsets = state.get("offsets")
        if offsets is None or not {"residuals", "step"} <= set(state):
            raise CheckpointError(f"expected what the state_dict() of an adapter gives, got the keys {sorted(state)}")
        sizes = {"offsets": len(self.offsets), "residuals": self._newton.shape[1], "step": len(self.offsets)}
        for name, size in sizes.items():
            value = state[name]
            if value is not None and tuple(value.shape) != (size,):
                raise CheckpointError(
                    f"{name!r}: expected shape {(size,)}, got {tuple(value.shape)}; the state is of another model, "
                    "or of other layers, watched modules or parameters"
                )
        last, step = (None if v is None else v.to(self.offsets, copy=True) for v in (state["residuals"], state["step"]))
        self.offsets, self._last, self._step = offsets.to(self.offsets, copy=True), last, step

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles may hold other tensors, whose versions are noted when the copy is first used."""
        return self.__dict__ | {"_versions": None}

    # --- what is measured on source data --------------------------------------------------------------------------

    def _measure(self, source: Batch) -> None:
        """Moments of each call of a layer and, where these are restored, of what is compared."""
        self._targets: list[_Call] = []
        logits = self._forward(source, [], lambda layer, y: self._targets.append(_Call(layer, *moments(layer, y))))
        sizes = [len(call.mean) for call in self._targets for _ in range(2)]
        self._sizes = [*sizes, *(p.numel() for p in self._params.values())]
        if not self._sizes:
            raise ArgumentError("none of the normalization layers is called in the forward pass; expected one at least")
        self.offsets = logits.new_zeros(sum(self._sizes), dtype=_precise(logits.dtype))
        self._source = self._run(self.offsets, source)[1]
        _check_finite(torch.cat([part for call in self._source for part in (call.mean, call.deviation)]), "source data")

    def _called(self, modules: Sequence[nn.Module], calls: Sequence[_Call], argument: str | None) -> list[nn.Module]:
        """The modules that are called; others are an error where the caller named them as an argument."""
        called = {call.module for call in calls}
        left = ", ".join(repr(self._name(m)) for m in modules if m not in called)
        if left and argument:
            raise ArgumentError(f"{argument}: {left} is not called by the model with a floating tensor; leave it out")
        if left:
            warnings.warn(
                f"not adapted, since the model does not call it: {left}; name the layers to adapt with layers=[...]",
                JetplaneWarning,
                stacklevel=3,
            )
        return [m for m in modules if m in called]

    def _gauss_newton(self, source: Batch, damping: float) -> Tensor:
        """``-(J^T J + mu I)^-1 J^T`` on source data, (D, R)."""
        d, r = len(self.offsets), sum(2 * len(call.mean) for call in self._source)
        needed, free = 2 * d * (d + r) * self.offsets.element_size(), free_memory(self.offsets.device)
        if needed > free:
            raise ArgumentError(
                f"the Jacobian of {r:,} statistics by {d:,} numbers takes {amount(needed)}, of which {amount(free)} "
                "are free; adapt fewer layers (layers=[...]), or compare fewer modules (watched=[...])"
            )
        some = _first(source, EXAMPLES)
        with quantization(self.derivative):
            j = jacobian(lambda t: self._distances(self._run(t, some)[1]), self.offsets, chunk=DIRECTIONS)
        _check_finite(j, "source data")
        moving = [bool(part.any()) for part in j.split(self._sizes, 1)]
        if not any(moving):
            raise DerivativeError(
                "what is adapted moves none of the statistics that are compared; expected layers before watched "
                "modules or logits, and a forward pass outside of torch.no_grad()"
            )
        owners = [self._name(call.module) for call in self._targets for _ in range(2)] + list(self._params)
        still = dict.fromkeys(repr(owner) for owner, moves in zip(owners, moving, strict=True) if not moves)
        if still:
            warnings.warn(
                f"not adapted, since it moves none of the statistics that are compared: {', '.join(still)}; is it "
                "under torch.no_grad() in the forward pass?",
                JetplaneWarning,
                stacklevel=3,
            )
        with _without_autocast(j):
            mu = damping * j.square().sum(0).mean()
            j = torch.cat([j, self.decay**0.5 * torch.eye(d, dtype=j.dtype, device=j.device)])
            gram = j.T @ j
            gram.diagonal().add_(mu)
            return -torch.linalg.solve(gram, j.T)

    def _directions(self, newton: Tensor) -> Tensor:
        """Pieces of a Gauss-Newton step, a layer's scales, its shifts or more in each, and the step before: (K, D)."""
        pieces = torch.block_diag(*newton.split(self._sizes))
        per = -(-len(pieces) // (self.k - 1))
        rows = [piece.sum(0) for piece in pieces.split(per)]
        rows = rows if self._step is None else [*rows, self._step]
        return torch.stack([row / row.norm() for row in rows if row.norm() > 0] or [torch.ones_like(newton)])

    # --- the model with offsets -----------------------------------------------------------------------------------

    def _shift(self, offsets: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and r."""
        logits, found = self._run(offsets, batch)
        r = self._residuals(found, offsets)
        _check_finite(r, "a batch")
        return logits, r

    def _residuals(self, found: Sequence[_Call], offsets: Tensor) -> Tensor:
        """r, (R + D,): distances of statistics, and the offsets times the root of their weight."""
        return torch.cat([self._distances(found), self.decay**0.5 * offsets])

    def _distances(self, found: Sequence[_Call]) -> Tensor:
        """Of the statistics, in standard deviations of the source, (R,)."""
        if [call.module for call in found] != [call.module for call in self._source]:
            raise ArgumentError("watched modules are called in another order, or not as often, as on source data")
        parts = []
        for call, wanted in zip(found, self._source, strict=True):
            self._check_channels(wanted, call.mean)
            unit = wanted.deviation.clamp_min(SMALLEST) * len(wanted.deviation) ** 0.5
            parts += [(call.mean - wanted.mean) / unit, (call.deviation - wanted.deviation) / unit]
        return torch.cat(parts).to(self.offsets.dtype)

    def _run(self, offsets: Any, batch: Batch, compare: bool = True) -> tuple[Tensor, list[_Call]]:
        """Logits with the moments of the source restored, and the moments of what is compared, the logits last."""
        pieces = offsets.split(self._sizes)
        n = 2 * len(self._targets)
        targets = iter(zip(self._targets, pieces[:n:2], pieces[1:n:2], strict=True))
        seen: list[_Call] = []

        def restored(layer: nn.Module, y: Tensor) -> Tensor:
            expected = next(targets, None)
            if expected is None or expected[0].module is not layer:
                self._refuse_call(self._name(layer))
            target, gain, shift = expected
            mean, deviation = moments(layer, y)
            self._check_channels(target, mean)
            scale = target.deviation / deviation * (1 + gain)
            offset = target.mean + target.deviation * shift - mean * scale
            if channel_axis(layer, y) == 1:
                scale, offset = (v.reshape(-1, *[1] * (y.dim() - 2)) for v in (scale, offset))
            return (y * scale + offset).to(y.dtype)

        def noted(module: nn.Module, x: Tensor) -> None:
            seen.append(_Call(module, *moments(module, x)))

        logits = self._forward(batch, pieces[n:], restored, noted if compare else None)
        if next(targets, None) is not None:
            self._refuse_call("the end")
        return logits, [*seen, _Call(None, *moments(None, logits))] if compare else []

    def _forward(
        self,
        batch: Batch,
        added: Sequence[Tensor],
        on_output: Callable[[nn.Module, Tensor], Tensor | None],
        on_input: Callable[[nn.Module, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits of a batch.

        Args:
            batch: as the caller gave it.
            added: to each of the parameters that are adapted; nothing at all by default.
            on_output: called with each output of a layer, which what it returns replaces.
            on_input: called with each input of a watched module.
        """
        args, kwargs = _arguments(batch)
        thread = threading.get_ident()  # others may run the model meanwhile

        def after(layer: nn.Module, args: Any, y: Any) -> Tensor | None:
            if threading.get_ident() != thread:
                return None
            if not isinstance(y, Tensor):
                raise ArgumentError(f"layer {self._name(layer)!r} gave a {type(y).__name__}, expected a tensor")
            return on_output(layer, y)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if on_input is not None and x is not None and x.is_floating_point() and threading.get_ident() == thread:
                on_input(module, x)

        hooks = [layer.register_forward_hook(after) for layer in self.layers]
        hooks += [module.register_forward_pre_hook(before, with_kwargs=True) for module in self.watched if on_input]
        pairs = zip(self._params.items(), added, strict=False)
        values = {name: (p + a.reshape(p.shape)).to(p.dtype) for (name, p), a in pairs}
        with _removing(hooks), eager():  # what was compiled before would not see the hooks
            return _logits(functional_call(self.model, values, args, kwargs) if values else self.model(*args, **kwargs))

    # --- checks ---------------------------------------------------------------------------------------------------

    def _name(self, module: nn.Module | None) -> str:
        names = {m: name for name, m in self.model.named_modules()}
        return "logits" if module is None else names.get(module) or type(module).__name__

    def _refuse_call(self, came: str) -> NoReturn:
        raise ArgumentError(
            "normalization layers are called in another order, or not as often, as on source data: "
            f"{came} comes too early"
        )

    def _check_channels(self, wanted: _Call, mean: Tensor) -> None:
        if mean.shape != wanted.mean.shape:
            raise ShapeError(
                f"{self._name(wanted.module)}: expected {len(wanted.mean)} channels, as on source data, got {len(mean)}"
            )

    def _check_frozen(self) -> None:
        """Check that the model is in evaluation mode, and what it was."""
        # Layers that quantization puts in keep the flag of new modules, without a meaning.
        training = [name for name, m in self.model.named_modules() if m.training and isinstance(m, WITH_MODES)]
        if self.model.training or training:
            raise ArgumentError(
                f"the model is in training mode ({', '.join(training[:3]) or 'as a whole'}), in which BatchNorm moves "
                "its statistics and dropout is random; expected model.eval()"
            )
        now = _versions(self.model)
        before = self._versions or now
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if changed:
            raise ArgumentError(
                f"the model was changed after source data were measured ({', '.join(changed[:3])}); make a new "
                "Adapter. If its forward pass changes a buffer, turn that off"
            )
        self._versions = now


@dataclass(frozen=True)
class _Call:
    """A call of a module in a forward pass, None for that of the model, and the moments of its output or input."""

    module: nn.Module | None
    mean: Tensor
    deviation: Tensor


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the predictions, whose logits are (N, ..., classes), in single precision at least."""
    logits = logits.to(_precise(logits.dtype))
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def moments(module: nn.Module | None, x: Tensor) -> Moments:
    """Mean and standard deviation of each channel of x, the input or output of a module, in single precision at least.

    Raises:
        ShapeError: less than two values of each channel.
    """
    rows = x.movedim(1, -1) if channel_axis(module, x) == 1 else x
    rows = rows.reshape(-1, rows.shape[-1]).to(_precise(x.dtype))
    if len(rows) < 2:
        raise ShapeError(
            f"expected two values of each channel at least, for means and deviations, got {len(rows)}"
            + ("" if module is None else f" at a {type(module).__name__}")
            + f", where the shape is {tuple(x.shape)}; give batches of ten examples or more"
        )
    mean = rows.mean(0)
    return mean, ((rows - mean).square().mean(0) + EPS).sqrt()


def channel_axis(module: nn.Module | None, x: Tensor) -> int:
    """The axis of channels of the input or output of a module, 1 or -1; without a module the second of images."""
    if x.dim() < 3 or hasattr(module, "in_features"):
        return -1
    if isinstance(module, BY_SECOND_AXIS):
        return 1
    weight = getattr(module, "weight", None)
    shape = getattr(module, "normalized_shape", None) or (weight.shape if isinstance(weight, Tensor) else ())
    if len(shape) == 1:  # a number for each channel
        return 1 if x.shape[1] == shape[0] != x.shape[-1] else -1
    return 1 if len(shape) > 2 or (not shape and x.dim() > 3) else -1


def weighted_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with a ``weight``, normalization layers left out."""
    for child in module.children():
        if isinstance(child, NORMALIZATION):
            continue
        if hasattr(child, "weight"):
            yield child
        else:
            yield from weighted_modules(child)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _without_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _check_finite(values: Tensor, of: str) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(NOT_FINITE.format(of))


def _named(model: nn.Module, params: Sequence[Tensor]) -> dict[str, Tensor]:
    """The names of parameters and buffers of a model."""
    names = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}
    for i, p in enumerate(params):
        if id(p) not in names:
            raise ArgumentError(
                f"params[{i}] is no parameter or buffer of the model; expected one of model.parameters()"
            )
        if not p.is_floating_point():
            raise DTypeError(f"params[{i}], {names[id(p)]!r}: expected a floating dtype, got {p.dtype}")
    return {names[id(p)]: p for p in params}


def _versions(model: nn.Module) -> dict[str, Any]:
    """What changes when a parameter or a floating buffer of a model is written to, or moved.

    Sums see what is written through ``.data``; only versions see what leaves a sum as it is. BatchNorm raises the
    versions of its buffers without writing to them, so of buffers there are none.
    """
    params, found = dict(model.named_parameters()), {}
    for name, t in (params | dict(model.named_buffers())).items():
        if t.is_floating_point():
            version = t._version if name in params and not t.is_inference() else None
            plain = type(t) in (Tensor, nn.Parameter)  # classes of quantized weights may have no sum
            total = t.detach().nan_to_num().sum(dtype=torch.float32).item() if plain else None
            found[name] = t.dtype, t.device, version, total
    return found


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments, with copies of tensors: several passes take them, and a model may write to them."""
    if not isinstance(batch, (Tensor, Mapping)):
        raise ArgumentError(
            f"expected a tensor, or a dict of the model's keyword arguments, got {type(batch).__name__}; of (images, "
            "labels) give the images, and as the source one batch of a loader"
        )
    if _examples(batch) == 0:
        raise ArgumentError("the batch is empty; expected ten examples or more")
    if isinstance(batch, Tensor):
        return (batch.detach().clone(),), {}
    return (), {key: x.detach().clone() if isinstance(x, Tensor) else x for key, x in batch.items()}


def _examples(batch: Batch) -> int | None:
    """The length of the first axis of a batch's first tensor."""
    tensors = [batch] if isinstance(batch, Tensor) else [t for t in batch.values() if isinstance(t, Tensor)]
    return next((len(t) for t in tensors if t.dim()), None)


def _first(batch: Batch, n: int) -> Batch:
    """The first n examples."""
    if isinstance(batch, Tensor):
        return batch[:n]
    size = _examples(batch)
    return {key: t[:n] if isinstance(t, Tensor) and t.dim() and len(t) == size else t for key, t in batch.items()}


def _logits(output: Any) -> Tensor:
    """The logits in what a model returned."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ArgumentError(
            "expected logits, an object with logits or a dict with 'logits' from the model, got "
            f"{type(output).__name__}; wrap the model in a module that returns its logits"
        )
    if found.dim() not in (2, 3):
        raise ShapeError(
            f"expected logits (N, classes) or (N, tokens, classes), got {tuple(found.shape)}; wrap the model in a "
            "module that returns them so"
        )
    return found


@contextlib.contextmanager
def _removing(hooks: Iterable[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
