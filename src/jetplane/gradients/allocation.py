"""Allocation of samples: which noise each layer gets, and how much, for a given number of forward passes.

The variance of a layer's estimate is taken to be ``d / K`` for d numbers that it puts out for one example (or weights,
where those are fewer), K samples of which cost ``K c``, c the part of a forward pass that comes after the layer. Under
``sum K c = passes`` the sum of variances is least for

    K = passes sqrt(d / c) / sum sqrt(d c)

A layer that gets d samples or more is moved along each of its d outputs instead, which is exact.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from .active_outputs import MOST, Finish, visit
from .feedback import FeedbackSpec
from .layers import (
    WeightPerturbableLayer,
    layer_of,
    owned,
    parameters_of,
    perturbed_modules,
    registered_modules,
)
from .passes import Closure, LayerTrace, trace
from .perturbation import perturbed
from .plan import OTHERS, LayerPlan, Mode

_COEFFICIENTS = 1 << 24  # of a layer's output, that one pass carries at most
_FREE = 1 << 17  # coefficients that cost no time beside what starting a pass costs
_NOISE_FLOPS = 600.0  # floating-point operations that cost as much as drawing, carrying and using a number of noise
_ACTIVE = 0.9  # a layer of whose outputs more than this part is active counts as one of which all are
_MOST_FREE_SAMPLES = 64


def allocate(
    closure: Closure,
    model: nn.Module,
    params: Sequence[Tensor],
    passes: float,
    whole: float = 1.0,
    per_position: bool = True,
    chunk: int | None = None,
) -> dict[str, LayerPlan]:
    """How each layer is perturbed, so that all of it costs about ``passes`` forward passes.

    The last layer is moved along each of its outputs also if that costs as much again as ``passes``, since the layers
    before it then learn from its errors (`jetplane.gradients.Feedback`), as far as their feedback takes no more memory
    than the parameters.

    A loss over the positions of sequences tells positions apart. If as many positions come out of a layer,
    ``per_position`` lets each position's noise be judged by its own loss alone. Where no later layer mixes positions,
    that is exact, and as many times less noisy as a sequence has positions. Else what a position does to others is left
    out: the estimate is biased. A direction that is somewhat off serves better than one that is mostly noise, and the
    slope along it is exact whatever it is.

    Args:
        closure: returns the loss; it is called a few times, without side effects.
        model: holds the layers: modules of registered classes (`jetplane.gradients.register_layer`).
        params: what to estimate the gradient for.
        passes: what all of it may cost, in forward passes.
        whole: how many times the closure's examples a batch has of which they are a shard.
        per_position: whether positions may be taken for examples.
        chunk: a pass carries no more coefficients than the widest layer has in a plane of so many directions.

    Returns:
        Plans by the names of layers that the closure made use of. `OTHERS` stands for the parameters that none of
        them accounts for; it is there if such parameters are. They hold as long as the `signature` is the same.
    """
    known = registered_modules(model)
    modules = perturbed_modules(model, params)
    traces, total = trace(closure, known)  # of frozen layers too, which cost as well
    names = [name for name in traces if name in modules]  # in the order of first calls
    last = names[-1] if names else None
    positions = _positions(modules, traces)
    rows = _loss_rows(closure, last, modules, traces, positions)
    own_rows = {n for n in positions if per_position and positions[n] == rows and rows != traces[n].rows}
    activity = _activity(closure, known, traces, [n for n in names if n != last])

    demands = {}
    for name in names:
        t = traces[name]
        outputs = t.outputs / (rows if name in own_rows else t.rows)
        if name in activity:
            outputs *= activity[name].part
        demands[name] = _demand(modules[name], t, outputs, total or 1)
    covered = owned({name: modules[name] for name in names})
    others = sum(p.numel() for p in params if id(p) not in covered)
    if others:
        demands[OTHERS] = _Demand("parameters", others, 2.0)
    scale = passes / (sum(math.sqrt(d.variance * d.cost) for d in demands.values()) or 1)

    normalized = _normalizes_batches(model)
    widest = dict(zip(reversed(traces), accumulate((t.outputs for t in reversed(traces.values())), max), strict=True))
    plans = {}
    for name, demand in demands.items():
        samples = max(1, round(scale * math.sqrt(demand.variance / demand.cost)))
        if name == OTHERS:
            plans[name] = LayerPlan("parameters", samples)
            continue
        free = min(_FREE // max(round(whole * widest[name]), 1), _MOST_FREE_SAMPLES)
        samples, mode = max(samples, free), demand.mode
        # Moved along each of its outputs a layer is exact if the loss takes each of its positions for an example.
        alone = {traces[name].rows} | ({rows} if name == last or name in own_rows else set())
        # One direction for all examples says nothing where a batch is normalized: its mean takes it away.
        exact = positions.get(name) in alone and (name == last or not normalized)
        features = traces[name].shape[-1]
        if exact and (features <= samples or (name == last and features * demand.cost <= passes)):
            samples, mode = features, "basis"
        held = traces[name].outputs / _COEFFICIENTS
        if chunk is not None:
            held = widest[name] / (chunk * max(widest.values()))
        successor = activity[name].successor if mode == "outputs" and name in activity else None
        plans[name] = LayerPlan(mode, samples, min(samples, math.ceil(samples * held)), name in own_rows, successor)
    return _with_feedback(plans, traces, last, sum(p.numel() for p in params), whole)


def signature(model: nn.Module, params: Sequence[Tensor]) -> str:
    """What plans depend on beside the closure: if it changes, `allocate` has to be called anew.

    It tells which parameters move, which modules can be perturbed and which are in training mode. It takes no pass, and
    is the same on all ranks and in resumed runs.
    """
    moving = {id(p) for p in params}
    facts = [
        (name, type(m).__qualname__, m.training, layer_of(m) is not None,
         [(own, tuple(p.shape)) for own, p in m.named_parameters(recurse=False) if id(p) in moving])
        for name, m in model.named_modules()
    ]  # fmt: skip
    inside = {id(p) for p in model.parameters()}
    outside = [(i, tuple(p.shape)) for i, p in enumerate(params) if id(p) not in inside]
    return hashlib.sha256(repr((facts, outside)).encode()).hexdigest()


# --- what the loss and the layers are like ----------------------------------------------------------------


def _positions(modules: Mapping[str, nn.Module], traces: Mapping[str, LayerTrace]) -> dict[str, int]:
    """How many positions come out of each positionwise layer that is called once."""
    found = {}
    for name, t in traces.items():
        layer = layer_of(modules[name]) if name in modules else None
        if layer is not None and layer.positionwise and t.calls == 1:
            found[name] = t.outputs // t.shape[-1]
    return found


def _loss_rows(
    closure: Closure,
    last: str | None,
    modules: Mapping[str, nn.Module],
    traces: Mapping[str, LayerTrace],
    positions: Mapping[str, int],
) -> int:
    """How many parts the loss tells apart; 0 if it tells none, or if no layer's positions are other than its rows."""
    if last is None or all(positions[name] == traces[name].rows for name in positions):
        return 0
    slopes = perturbed(last, modules[last], LayerPlan("outputs", 1), stream=0).slopes(closure)
    return 0 if slopes is None else len(slopes)


def _normalizes_batches(model: nn.Module) -> bool:
    """Whether some module normalizes by the mean of the batch at hand."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(m, kinds) and (m.training or m.running_mean is None) for m in model.modules())


class _Activity(NamedTuple):
    """Where it shows which outputs of a layer are active, and what part of them is."""

    successor: str
    part: float


def _activity(
    closure: Closure, known: Mapping[str, nn.Module], traces: Mapping[str, LayerTrace], names: Sequence[str]
) -> dict[str, _Activity]:
    """Layers some of whose outputs are not active, all of which shows at the input of the layer that is met next."""
    found = {}
    for name, following in itertools.pairwise(traces):
        t = traces[name]
        if name not in names or not t.calls == traces[following].calls == 1 or t.outputs > MOST * t.rows:
            continue
        parts: list[float] = []

        def begin(module: nn.Module, call: int, x: Tensor, y: Tensor, parts: list[float] = parts) -> Finish:
            return lambda active: None if active is None else parts.append(active.double().mean().item())

        module = known[name]
        told = visit(closure, [module], {module: known[following]}, begin)
        if told and parts and parts[0] < _ACTIVE:
            found[name] = _Activity(following, parts[0])
    return found


class _Demand(NamedTuple):
    """What a layer's estimate needs.

    Attributes:
        mode: the noise that is best for it.
        variance: of one sample, in units of the squared gradient.
        cost: of one sample, in forward passes.
    """

    mode: Mode
    variance: float
    cost: float


def _demand(module: nn.Module, t: LayerTrace, outputs: float, total: int) -> _Demand:
    """Noise on the weights where those are fewer than the active outputs of a row, and the layer takes it."""
    layer = layer_of(module)
    assert layer is not None
    weights = sum(p.numel() for p in parameters_of(module, layer).values())
    flops = t.remaining + _NOISE_FLOPS * t.outputs
    if isinstance(layer, WeightPerturbableLayer) and weights < outputs:
        return _Demand("weights", weights, (flops + t.flops) / total)
    return _Demand("outputs", outputs, flops / total)


def _with_feedback(
    plans: dict[str, LayerPlan], traces: Mapping[str, LayerTrace], last: str | None, memory: int, whole: float
) -> dict[str, LayerPlan]:
    """Plans with feedback for layers whose rows are those of the last one's errors, late layers first.

    Args:
        plans: of all layers.
        traces: of all layers.
        last: name of the last one.
        memory: how many numbers feedback may have in all.
        whole: how many times the traced examples a batch has.
    """
    if last is None or plans[last].mode != "basis":
        return plans
    errors, found = plans[last].samples, dict(plans)
    rows = traces[last].outputs // errors
    for name, t in reversed(list(traces.items())):
        if name not in plans or plans[name].mode != "outputs" or t.calls != 1:
            continue
        plan, outputs = plans[name], t.outputs // rows
        needed = 2 * outputs * errors
        if needed > memory:
            continue
        memory -= needed
        if rows == (t.outputs // t.shape[-1] if plan.per_position else t.rows):
            noise = outputs * errors / (plan.samples * round(rows * whole))
            found[name] = replace(plan, feedback=FeedbackSpec(outputs, errors, noise))
    return found
