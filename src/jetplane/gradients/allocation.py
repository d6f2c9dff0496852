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
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import JetplaneWarning, warn_user
from ..evaluation.context import expansion
from ..evaluation.interception import Interception
from ..evaluation.side_effects import without_side_effects
from ..jets import Coefficients, Diagonal, Jet, parts
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
from .passes import Closure, LayerTrace, hooked, trace
from .plan import OTHERS, LayerPlan, Mode
from .rows import Told, told

_COEFFICIENTS = 1 << 24  # of a layer's output, that one pass carries at most
_FREE = 1 << 17  # coefficients that cost no time beside what starting a pass costs
_NOISE_FLOPS = 600.0  # floating-point operations that cost as much as drawing, carrying and using a number of noise
_ACTIVE = 0.9  # a layer of whose outputs more than this part is active counts as one of which all are
_MOST_FREE_SAMPLES = 64
_MOST_CALLS = 64  # of a layer, that may have directions of their own


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
    facts = _observe(closure, model, params, per_position)
    last = None if facts.last is None else facts.told.get(facts.last)
    if last is not None and last.order == "unknown" and last.parts > 1:
        warn_user(
            "the parts of the loss are not those of the examples that the model puts out, in their order, as where "
            "outputs are permuted, sorted or selected before the loss, or compared with each other: estimates of the "
            "gradient are noisier by as many times as there are examples. Permute or select the inputs instead",
            JetplaneWarning,
        )
    demands = {name: facts.demand(name) for name in facts.names}
    covered = owned({name: facts.modules[name] for name in facts.names})
    others = sum(p.numel() for p in params if id(p) not in covered)
    if others:
        demands[OTHERS] = _Demand("parameters", others, 2.0)
    scale = passes / (sum(math.sqrt(d.variance * d.cost) for d in demands.values()) or 1)

    outputs = [t.outputs for t in facts.traces.values()]
    widest = dict(zip(reversed(facts.traces), accumulate(reversed(outputs), max), strict=True))  # from here on
    plans = {}
    for name, demand in demands.items():
        samples = max(1, round(scale * math.sqrt(demand.variance / demand.cost)))
        if name == OTHERS:
            plans[name] = LayerPlan("parameters", samples)
            continue
        samples = max(samples, min(_FREE // max(round(whole * widest[name]), 1), _MOST_FREE_SAMPLES))
        mode, features = demand.mode, facts.traces[name].shape[-1]
        affordable = features <= samples or (name == facts.last and features * demand.cost <= passes)
        if affordable and facts.exact_by_features(name):
            mode, samples = "basis", features
        calls = facts.apart.get(name, 1)
        held = facts.traces[name].outputs / calls / _COEFFICIENTS
        if chunk is not None:
            held = widest[name] / (chunk * max(outputs))
        successor = facts.activity[name].successor if mode == "outputs" and name in facts.activity else None
        plans[name] = LayerPlan(
            mode, samples, min(samples, math.ceil(samples * held)), name in facts.own_rows, successor, None, calls,
            "own" if mode == "basis" or name in facts.own_rows else facts.told[name].order,
        )  # fmt: skip
    return _with_feedback(plans, facts, sum(p.numel() for p in params), whole)


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


class _Activity(NamedTuple):
    """Where it shows which outputs of a layer are active, and what part of them is."""

    successor: str
    part: float


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


@dataclass(frozen=True)
class _Facts:
    """What a few passes tell of a model and its loss.

    Attributes:
        modules: those to perturb, by name, called or not.
        traces: of all modules that can be perturbed and were called, frozen ones too. Calls that have nothing to do
            with each other stand as one call with all of their examples.
        flops: of a pass.
        names: of the modules to perturb that were called, in the order of first calls.
        apart: how many calls have nothing to do with each other, of layers that are called several times.
        positions: how many come out of each positionwise layer that is called once, or as if it were.
        told: which of the loss's parts the rows of each layer have.
        by_position: the layers whose positions have parts of their own.
        own_rows: those whose positions are taken for examples.
        activity: of layers some of whose outputs are not active.
        normalized: whether some module normalizes by the mean of the batch at hand.
    """

    modules: dict[str, nn.Module]
    traces: dict[str, LayerTrace]
    flops: int
    names: list[str]
    apart: dict[str, int]
    positions: dict[str, int]
    told: dict[str, Told]
    by_position: set[str]
    own_rows: set[str]
    activity: dict[str, _Activity]
    normalized: bool

    @property
    def last(self) -> str | None:
        return self.names[-1] if self.names else None

    def demand(self, name: str) -> _Demand:
        """Noise on the weights where those are fewer than the active outputs of a row, and the layer takes it."""
        t, layer = self.traces[name], layer_of(self.modules[name])
        assert layer is not None
        told, rows = self.told[name], t.rows
        if told.order != "own":  # rows that share a part have each other's noise
            rows = min(t.rows, max(told.parts, 1)) if told.order != "unknown" else 1
        outputs = t.outputs / (told.parts if name in self.own_rows else rows)
        if name in self.activity:
            outputs *= self.activity[name].part
        flops, total = t.remaining + _NOISE_FLOPS * t.outputs, self.flops or 1
        weights = sum(p.numel() for p in parameters_of(self.modules[name], layer).values())
        if isinstance(layer, WeightPerturbableLayer) and weights * t.rows < outputs * rows:
            return _Demand("weights", weights * t.rows / rows, (flops + t.flops) / total)
        return _Demand("outputs", outputs, flops / total)

    def exact_by_features(self, name: str) -> bool:
        """Whether slopes along each feature of a layer are its output's gradient.

        They are if each of the layer's positions has parts of the loss of its own. One direction for all examples says
        nothing where a batch is normalized: its mean takes it away.
        """
        layer = layer_of(self.modules[name])
        if layer is None or not layer.featurewise or name not in self.by_position:
            return False
        alone = self.positions[name] == self.traces[name].rows or name == self.last or name in self.own_rows
        return alone and (name == self.last or not self.normalized)


def _observe(closure: Closure, model: nn.Module, params: Sequence[Tensor], per_position: bool) -> _Facts:
    known, modules = registered_modules(model), perturbed_modules(model, params)
    traces, flops = trace(closure, known, params)
    names = [name for name in traces if name in modules]
    apart = _apart(closure, known, traces, names)
    traces = {name: t.as_one() if name in apart else t for name, t in traces.items()}
    once = {name for name, t in traces.items() if t.calls == 1} | set(apart)
    positions = {}
    for name in names:
        layer, t = layer_of(modules[name]), traces[name]
        if layer is not None and layer.positionwise and name in once:
            positions[name] = t.outputs // t.shape[-1]
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    normalized = any(isinstance(m, batch_norms) and (m.training or m.running_mean is None) for m in model.modules())
    told = _told(closure, modules, traces, names, apart, normalized)
    every = {n: positions[n] for n in positions if told[n].parts and told[n].parts % positions[n] == 0}
    others = {name: count for name, count in every.items() if count != traces[name].rows}
    finer = _told(closure, modules, traces, list(others), apart, True, by_position=True)
    by_position = {name for name in every if finer.get(name, told[name]).order == "own"}
    own_rows = {name for name in others if per_position and name in by_position and others[name] == told[name].parts}
    activity = _activity(closure, known, traces, once, names[:-1])
    return _Facts(modules, traces, flops, names, apart, positions, told, by_position, own_rows, activity, normalized)


def _told(
    closure: Closure, modules: Mapping[str, nn.Module], traces: Mapping[str, LayerTrace], names: Sequence[str],
    apart: Mapping[str, int], roughly: bool, by_position: bool = False,
) -> dict[str, Told]:  # fmt: skip
    """Which parts of the loss the rows of layers have, or their positions: those with equally many rows together.

    The last layer is by itself, and strictly: feedback takes what it has for exact.
    """
    groups: dict[Any, list[str]] = {}
    for name in names:
        t = traces[name]
        rows = t.outputs // t.shape[-1] if by_position else t.rows
        groups.setdefault((apart.get(name, 1), rows, name == names[-1]), []).append(name)
    count = (lambda shape: shape[:-1].numel()) if by_position else (lambda shape: shape[0] if shape else 1)
    found: dict[str, Told] = {}
    for (calls, _, last), group in groups.items():
        each = told(closure, [modules[name] for name in group], count, calls, roughly and not last)
        found |= dict(zip(group, each, strict=True))
    return found


def _apart(
    closure: Closure, known: Mapping[str, nn.Module], traces: Mapping[str, LayerTrace], names: Sequence[str]
) -> dict[str, int]:
    """How many calls are apart, of layers that are called several times: all together, or else each by itself."""
    several = {name: t.calls for name, t in traces.items() if 1 < t.calls <= _MOST_CALLS}
    found: dict[str, int] = {}
    for calls in sorted(set(several.values())):
        group = [name for name in several if several[name] == calls]
        if not _are_apart(closure, known, group, calls):
            group = [name for name in group if name in names and _are_apart(closure, known, [name], calls)]
        found |= dict.fromkeys(group, calls)
    return found


def _are_apart(closure: Closure, known: Mapping[str, nn.Module], names: Sequence[str], calls: int) -> bool:
    """Whether no layer's input depends on several calls of these, as where each call has a micro-batch.

    A pass in which the outputs of each call move along a direction of its own tells. Each can then have as many
    directions as it needs, which take no time in the calls of others.
    """
    apart, targets = [True], {known[name] for name in names}
    with without_side_effects(), expansion(Diagonal(calls), 1) as space:

        def after(module: nn.Module, call: int, x: Any, y: Any) -> Any:
            arrived = parts(x, space)[1]
            if arrived and (arrived.rows is None or len(arrived.rows) > 1):
                apart[0] = False
            if module not in targets or call >= calls:
                return None
            at, first, _ = parts(y, space)
            moved = Coefficients(space, 1, torch.ones(1, *at.shape, dtype=at.dtype, device=at.device), (call,))
            return Jet(at, first + moved, None, space)

        with hooked(after, known.values(), space=space), Interception(space).running():
            closure()
    return apart[0]


def _activity(
    closure: Closure, known: Mapping[str, nn.Module], traces: Mapping[str, LayerTrace], once: Set[str],
    names: Sequence[str],
) -> dict[str, _Activity]:  # fmt: skip
    """Layers some of whose outputs are not active, all of which shows at the input of the layer that is met next."""
    found = {}
    for name, following in itertools.pairwise(traces):
        t, alike = traces[name], traces[name].calls == traces[following].calls
        if name not in names or not {name, following} <= once or not alike or t.outputs > MOST * t.rows:
            continue
        parts: list[float] = []

        def begin(module: nn.Module, call: int, x: Tensor, y: Tensor, parts: list[float] = parts) -> Finish:
            return lambda active: None if active is None else parts.append(active.double().mean().item())

        told = visit(closure, [known[name]], {known[name]: known[following]}, begin)
        if told and parts and parts[0] < _ACTIVE:
            found[name] = _Activity(following, parts[0])
    return found


def _with_feedback(plans: dict[str, LayerPlan], facts: _Facts, memory: int, whole: float) -> dict[str, LayerPlan]:
    """Plans with feedback for layers whose rows are those of the last one's errors, late layers first.

    Args:
        plans: of all layers.
        facts: of the model.
        memory: how many numbers feedback may have in all.
        whole: how many times the examples at hand a batch has.
    """
    if facts.last is None or plans[facts.last].mode != "basis":
        return plans
    errors, found = plans[facts.last].samples, dict(plans)
    rows = facts.traces[facts.last].outputs // errors
    for name in reversed(facts.names):
        plan, t = plans[name], facts.traces[name]
        outputs = t.outputs // rows
        needed = 2 * outputs * errors
        alike = plan.calls == plans[facts.last].calls == t.calls
        if plan.mode != "outputs" or plan.order != "own" or not alike or needed > memory:
            continue
        memory -= needed
        if rows == (t.outputs // t.shape[-1] if plan.per_position else t.rows):
            noise = outputs * errors / (plan.samples * round(rows * whole))
            found[name] = replace(plan, feedback=FeedbackSpec(outputs, errors, noise))
    return found
