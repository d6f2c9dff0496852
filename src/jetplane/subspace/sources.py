"""Sources of directions: what the plane of `jetplane.optim.PlaneSearch` is spanned by.

A source says which directions it adds to this step's plane, and what it remembers after the step: one small dictionary
of tensors for each parameter. It has no state of its own, so that one source may serve several optimizers.

>>> import torch, jetplane as jp
>>> context = Context(params=[torch.zeros(3)], places=[0], state=[{}], step=0, seed=0)
>>> source = Averages(decays=(0.9,), scaled=False)
>>> source.directions(context) is None  # nothing is known yet
True
>>> state = source.remember(context, Result(gradient=[torch.tensor([0.0, 3.0, 4.0])], steps=[None]))
>>> source.directions(Context([torch.zeros(3)], [0], state, 1, 0)).draw(0, torch.zeros(3))
tensor([[0.0000, 0.6000, 0.8000]])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..directions import AbstractDirections, Directions, StoredDirections, Structure, Term, UnitDirections
from ..directions.unit import joint_norm
from ..errors import ArgumentError
from ..evaluation.inputs import INPUTS_OF_ONE, in_span
from ..jets import carried

State = Mapping[str, Tensor]  # what a source remembers of one parameter, {} at first
Curvature = Literal["ggn", "hessian"]

DRAWN = 64  # directions, where their number is not given
SIGNAL = 0.25  # an average of which more than this part is signal counts in full
LEAST_WEIGHT = 0.01  # of an average that is noise alone: planes keep their size
ADAM_EPSILON = 1e-8
SQUARE_DECAY = 0.99  # how much of the average of squares is kept from step to step


@dataclass(frozen=True)
class Context:
    """The information that a source gets before a step.

    Attributes:
        params: the tensors that may move.
        places: the index of each among all parameters of the optimizer, as directions use it.
        state: the state of this source for each of them.
        step: number of earlier steps.
        seed: seed of the optimizer.
        model: model of the optimizer, or None.
        closure: returns the loss of this step's batch; None with a process group.
    """

    params: Sequence[Tensor]
    places: Sequence[int]
    state: Sequence[State]
    step: int
    seed: int
    model: nn.Module | None = None
    closure: Callable[[], Any] | None = None

    @property
    def size(self) -> int:
        """How many numbers may move."""
        return sum(p.numel() for p in self.params)


@dataclass(frozen=True)
class Result:
    """The result of a step.

    Attributes:
        gradient: an estimate of the gradient on this step's batch before the step, one tensor for each parameter; empty
            if no source `learns`.
        steps: the change of each parameter; None for parameters that the loss does not use.
    """

    gradient: Sequence[Tensor]
    steps: Sequence[Tensor | None]


class Source(ABC):
    """A source of directions for a plane.

    Attributes:
        learns: whether the source uses estimates of the gradient, which cost extra passes.
        compared: whether processes that step together compare its directions bit by bit. This is not needed for
            directions that follow from the state and the seed alone, since these are compared anyway.
        separable: whether `remember` treats each parameter by itself. It is then called for one at a time, and the old
            state of each is let go of before the next: the new ones of all are not held beside the old. It must not
            raise an error then.
    """

    learns: bool = True
    compared: bool = True
    separable: bool = False

    def weights(self, context: Context) -> Sequence[Tensor] | None:
        """The point at which to estimate the gradient, one tensor for each parameter; None for the current parameters.

        The batches of some steps judge whether parameters move to it, or to another of `points`: of the step after each
        plane's, and before the first plane of the second and the fifth.
        """
        return None

    def points(self, context: Context) -> Sequence[Sequence[Tensor]]:
        """The points to which the source's directions lead, in their order; none if they lead to no points.

        A list of points, each a tensor for each parameter, of its shape.
        The first is that of `weights`, the last the steadiest: in steps without a plane, parameters move as it does, by
        the part that planes have given these points in them.
        """
        return []

    @abstractmethod
    def directions(self, context: Context) -> AbstractDirections | None:
        """The directions for this step's plane: finite tensors that do not depend on this step's batch; or None."""

    @abstractmethod
    def remember(self, context: Context, result: Result) -> Sequence[State]:
        """The new state, one dictionary for each of the context's parameters. The old state is not modified."""


@final
@dataclass(frozen=True)
class Averages(Source):
    """Normalized running averages of gradient estimates, and the same divided by the root mean square of each entry.

        m_t = sum_i w_i g_i,   w_i in proportion to decay^(t - i);    m_t,    m_t / sqrt(mean of g_i^2)

    The second kind are Adam's steps. The first of these is split into ``groups``, each a direction of its own: the
    first layer, the last layer, and runs of the layers in between, since their best step lengths differ. At each
    parameter an average is weighted by the share of signal in its square (`signal_fraction`), in full from 1/4 on.

    The state is an average for each decay, one mean square and, for each average, one number.

    Attributes:
        decays: the fraction of each average that is kept from step to step.
        scaled: whether to include the averages divided by the root mean square.
        groups: number of groups of layers of a model into which the first scaled average is split; 1: no split.

    Raises:
        ArgumentError: no decay, one outside of [0, 1), or fewer than one group.

    Source: Adam, arXiv 1412.6980, for averages over root mean squares.
    """

    decays: tuple[float, ...] = (0.9, 0.99)
    scaled: bool = True
    groups: int = 3
    compared = False
    separable = True

    def __post_init__(self) -> None:
        if not isinstance(self.decays, (list, tuple)) or not all(isinstance(b, (int, float)) for b in self.decays):
            raise ArgumentError(f"decays must be numbers in [0, 1), as (0.9, 0.99), got {self.decays!r}")
        if not self.decays or not all(0 <= b < 1 for b in self.decays):
            raise ArgumentError(f"decays must be at least one number in [0, 1), got {self.decays}")
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ArgumentError(f"groups must be an integer of at least 1, got {self.groups!r}")

    def directions(self, context: Context) -> AbstractDirections | None:
        """See `Source`."""
        known = [(i, state) for i, state in zip(context.places, context.state, strict=True) if state]
        groups = dict(zip(context.places, layer_groups(context.params, context.model, self.groups), strict=True))
        plain, scaled = [], []
        for b in self.decays:
            weights = {i: _weight(s[f"average {b}"], s[f"energy {b}"], b, context.step) for i, s in known}
            plain.append({i: Term(s[f"average {b}"], weights[i]) for i, s in known})
            if not self.scaled:
                continue
            whole = {i: Term(s[f"average {b}"], weights[i], s["square"]) for i, s in known}
            cut = sorted(set(groups.values())) if b == self.decays[0] else [None]
            scaled += [{i: t for i, t in whole.items() if group in (None, groups[i])} for group in cut]
        return UnitDirections.of([*plain, *scaled])

    def remember(self, context: Context, result: Result) -> Sequence[State]:
        """See `Source`."""
        pairs = zip(context.state, result.gradient, strict=True)
        return [self._averaged(old, g, context.step if old else 0) for old, g in pairs]

    def _averaged(self, old: State, gradient: Tensor, n: int) -> State:
        new = {}
        energy = gradient.double().square().sum().to(carried(gradient.dtype))
        for b in self.decays:
            kept = kept_of_average(b, n)
            new[f"average {b}"] = _mixed(old.get(f"average {b}"), gradient, kept)
            new[f"energy {b}"] = kept**2 * old.get(f"energy {b}", 0.0) + (1 - kept) ** 2 * energy
        if self.scaled:
            new["square"] = _mixed(old.get("square"), gradient.square(), kept_of_average(SQUARE_DECAY, n))
        return new


LATEST = 4.0  # an average of n fast weights is about that of their latest n / 4, until its memory is shorter


@final
@dataclass(frozen=True)
class FastWeights(Source):
    """The directions to weights z that follow Adam's steps on their own, and to the running average of z.

        z <- z - rate * m / (sqrt(s) + 1e-8),    v_1 = z - theta,    v_2 = mean(z) - theta

    with the bias-corrected running averages m and s of estimates g of the gradient at z, and of g^2. In the plane of
    these directions theta moves to the point at which the loss of the batch is lowest, by no more than the distance
    to the farther of z and mean(z); z continues from where it is.
    The next batch, to which no plane is fitted, judges that point: theta moves to z or mean(z) if the loss there is
    lower. Before the first plane, the second and the fifth batch judge. In the other steps theta moves with mean(z), by
    the part that z and mean(z) have in it. So z explores at the cost of an estimate, and theta follows it as far as the
    loss falls. If the estimates do not lower the loss, theta stays.

    After n steps the part 4 / (n + 4) of mean(z) is new, or ``1 - average`` if that is more.

    The state is four tensors of each parameter's size, in single precision at least.

    Attributes:
        rate: learning rate of Adam's steps. It may be larger than usual, since theta takes averages, not z.
        decays: decays of m and s.
        average: the fraction of the average of z that is kept from step to step.

    Raises:
        ArgumentError: a rate that is not positive, or a decay outside of [0, 1).

    Sources: Adam, arXiv 1412.6980; averages of iterates, Polyak and Juditsky, SIAM J. Control Optim. 30, 1992;
    of which the latest part weighs most, Shamir and Zhang, arXiv 1212.1824;
    Lookahead, arXiv 1907.08610, whose slow weights go a fixed part of the way to fast ones; SEBOOST, arXiv 1609.00629,
    whose planes are spanned by where another method has gone.
    """

    rate: float = 3e-3
    decays: tuple[float, float] = (0.9, 0.999)
    average: float = 0.99
    compared = False
    separable = True

    def __post_init__(self) -> None:
        if not self.rate > 0 or not all(0 <= b < 1 for b in (*self.decays, self.average)):
            raise ArgumentError(
                f"expected a positive rate and decays in [0, 1), got {self.rate}, {self.decays} and {self.average}"
            )

    def weights(self, context: Context) -> Sequence[Tensor] | None:
        """See `Source`: z."""
        return next(iter(self.points(context)), None)

    def points(self, context: Context) -> Sequence[Sequence[Tensor]]:
        """See `Source`: z, and the average of z."""
        pairs = list(zip(context.params, context.state, strict=True))
        return [[s.get(name, p) for p, s in pairs] for name in ("fast", "mean")] if any(context.state) else []

    def directions(self, context: Context) -> AbstractDirections | None:
        """See `Source`."""
        known = [(i, p, s) for i, p, s in zip(context.places, context.params, context.state, strict=True) if s]
        points = [{i: Term(s[name], origin=p) for i, p, s in known} for name in ("fast", "mean")]
        if not known:
            return None
        # Parameters that have moved on with the average differ from it by rounding, which is no direction.
        noise = joint_norm(2 * torch.finfo(p.dtype).eps * p for _, p, _ in known)
        is_apart = joint_norm(term.materialized() for term in points[1].values()) > noise
        return UnitDirections.of(points if is_apart else points[:1])

    def remember(self, context: Context, result: Result) -> Sequence[State]:
        """See `Source`."""
        every = zip(context.params, context.state, result.gradient, strict=True)
        return [self._moved(old or {"fast": p}, g, carried(p.dtype), context.step if old else 0) for p, old, g in every]

    def _moved(self, old: State, gradient: Tensor, dtype: torch.dtype, n: int) -> State:
        old, gradient = {name: t.to(dtype) for name, t in old.items()}, gradient.to(dtype)

        def mixed(name: str, value: Tensor, decay: float) -> Tensor:
            return value if name not in old else torch.lerp(value, old[name], kept_of_average(decay, n))

        average = mixed("average", gradient, self.decays[0])
        square = mixed("square", gradient.square(), self.decays[1])
        fast = torch.addcdiv(old["fast"], average, square.sqrt().add_(ADAM_EPSILON), value=-self.rate)
        mean = torch.lerp(fast, old.get("mean", fast), min(self.average, n / (n + LATEST)))
        return {"fast": fast, "mean": mean, "average": average, "square": square}


@final
@dataclass(frozen=True)
class PreviousStep(Source):
    """The last nonzero step, normalized (SEBOOST, arXiv 1609.00629; arXiv 2406.17954)."""

    learns = False
    compared = False

    def directions(self, context: Context) -> AbstractDirections | None:
        """See `Source`."""
        known = zip(context.places, context.state, strict=True)
        return UnitDirections.of([{i: Term(state["step"]) for i, state in known if state}])

    def remember(self, context: Context, result: Result) -> Sequence[State]:
        """See `Source`."""
        if not any(step is not None and bool(step.any()) for step in result.steps):
            return context.state
        pairs = zip(context.state, result.steps, strict=True)
        return [old if step is None else {"step": step} for old, step in pairs]


@final
@dataclass(frozen=True)
class Drawn(Source):
    """Directions drawn again in each step: `jetplane.Directions`; the coordinates if there are as many as parameters.

    Attributes:
        k: number of directions; None for 64, or for the number of parameters if that is smaller.
        law: see `jetplane.Directions`, also for the following.
        tangents: structure of the tangents; also "inputs", which are ``R A^T`` for the weights of linear layers, with R
            drawn and A an orthonormal basis of what their inputs in this batch mostly span, and dense for others
            (AGZO, arXiv 2601.17261). This costs a forward pass, and forward gradients then estimate the part of the
            gradient in that span: see `jetplane.directions.SpannedDirections`.
        rank: rank of "low-rank" tangents, or of A (1 by default).
        density: density of "sparse" tangents.

    Raises:
        ArgumentError: invalid settings, or (by `directions`) more directions than parameters.
    """

    k: int | None = None
    law: str = "gaussian"
    tangents: Structure = "rank-one"
    rank: int | None = None
    density: float | None = None
    learns = False
    compared = False

    def __post_init__(self) -> None:
        k = 1 if self.k is None else self.k
        if self.tangents != "inputs":
            Directions(k, self.law, self.tangents, rank=self.rank, density=self.density)
            return
        Directions(k, self.law, density=self.density)
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ArgumentError(f"rank must be an integer of at least 1, got {self.rank!r}")

    def count(self, size: int) -> int:
        """How many directions there are for so many parameters."""
        if self.k is not None and self.k > size:
            raise ArgumentError(f"k = {self.k} directions exceed the number of parameters that may move, {size}")
        return min(DRAWN, size) if self.k is None else self.k

    def directions(self, context: Context) -> AbstractDirections:
        """See `Source`."""
        k = self.count(context.size)
        if k == context.size:
            return StoredDirections(dict(zip(context.places, _coordinates(context.params), strict=True)))
        if self.tangents == "inputs":
            if context.closure is None:
                raise ArgumentError(INPUTS_OF_ONE)
            params, places = context.params, context.places
            return in_span(k, self.law, context.seed, context.step, context.closure, params, places, self.rank or 1)
        drawn = Directions(k, self.law, self.tangents, context.seed, rank=self.rank, density=self.density)
        drawn.step = context.step
        return drawn

    def remember(self, context: Context, result: Result) -> Sequence[State]:
        """See `Source`: nothing."""
        return context.state


@dataclass(frozen=True)
class Subspace:
    """The sources of the plane of a step, and how the plane is evaluated.

    Attributes:
        sources: sources of its directions, in this order, for at most as many directions as there are parameters. None
            for the default: see `jetplane.optim.PlaneSearch`.
        curvature: "ggn" for Gauss-Newton curvature, which needs a loss function that is known (`jetplane.loss`), or
            "hessian" for exact curvature; see `jetplane.evaluate`. None for "ggn" if the closure has such a loss
            function, else "hessian", with a warning.
        chunk: directions to carry at a time, an integer or "auto"; see `jetplane.evaluate`. None for all of them, or,
            to save memory, for one at a time with "ggn" if less than a tenth of the model moves, as with adapters.
        every: a plane is evaluated in one step of ``every``. The other steps estimate the gradient and update the
            sources, and parameters follow `Source.points`; this needs an estimator that is ``alone``
            (`jetplane.gradients.Estimator`).

    Raises:
        ArgumentError: no source, another curvature, or ``every`` less than 1.
    """

    sources: Sequence[Source] | None = None
    curvature: Curvature | None = None
    chunk: int | Literal["auto"] | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ArgumentError(f"every must be an integer of at least 1, got {self.every!r}")
        if self.curvature not in ("ggn", "hessian", None):
            raise ArgumentError(f"curvature must be 'ggn', 'hessian' or None, got {self.curvature!r}")
        if self.sources is not None and not isinstance(self.sources, (list, tuple)):
            raise ArgumentError(f"sources must be a list of Source, got {self.sources!r}: put it in a list")
        if self.chunk not in (None, "auto") and (type(self.chunk) is not int or self.chunk < 1):
            raise ArgumentError(f"chunk must be 'auto', None or an integer of at least 1, got {self.chunk!r}")
        if self.sources is not None and not (self.sources and all(isinstance(s, Source) for s in self.sources)):
            raise ArgumentError(f"sources must be at least one Source of directions, got {list(self.sources)}")


def kept_of_average(decay: float, n: int) -> float:
    """How much of a running average of n values is kept for another one.

    Values weigh ``decay**age`` in parts of the sum of all weights, as in Adam's corrected averages: the first of them
    weighs no more than its age leaves it.

    >>> [round(kept_of_average(0.9, n), 3) for n in (0, 1, 10, 1000)]
    [0.0, 0.474, 0.854, 0.9]
    """
    return decay * (1 - decay**n) / (1 - decay ** (n + 1))


def signal_fraction(average: Tensor, energy: Tensor, decay: float, n: int) -> float:
    """What part of the square of a running average of n estimates is signal; 1 for n = 1, where nothing is known.

    The square of ``sum_i w_i g_i`` without its terms ``w_i^2 |g_i|^2``, whose sum is the energy, is on average that of
    the estimates' mean, however noisy they are, less the weight of those terms: ``1 - sum_i w_i^2`` corrects for it.
    """
    weight = (1 - decay) / (1 + decay) * (1 + decay**n) / (1 - decay**n) if n else 1.0  # sum_i w_i^2
    if weight == 1:
        return 1.0
    whole = average.double().square().sum().item()
    return (whole - energy.item()) / ((1 - weight) * whole) if whole > 0 else 0.0


def layer_groups(params: Sequence[Tensor], model: nn.Module | None, groups: int) -> list[int]:
    """The group of each parameter: that of the first layer, of the last one, or of a run of those in between.

    Layers are the modules that own parameters, in the model's order. Without a model all are in one group.
    """
    if model is None or groups == 1:
        return [0] * len(params)
    owners = {id(p): i for i, m in enumerate(model.modules()) for p in m.parameters(recurse=False)}
    layers = [owners.get(id(p), 0) for p in params]
    order = {layer: i for i, layer in enumerate(sorted(set(layers)))}
    last, inner = len(order) - 1, max(groups - 2, 0)
    runs = max(last - 1, 1)

    def group(i: int) -> int:
        if i == last:
            return groups - 1
        return 0 if i == 0 or not inner else 1 + (i - 1) * inner // runs

    return [group(order[layer]) for layer in layers]


def _weight(average: Tensor, energy: Tensor, decay: float, n: int) -> float:
    return min(max(signal_fraction(average, energy, decay, n) / SIGNAL, LEAST_WEIGHT), 1.0)


def _mixed(average: Tensor | None, value: Tensor, kept: float) -> Tensor:
    return value if average is None else kept * average + (1 - kept) * value


def _coordinates(params: Sequence[Tensor]) -> list[Tensor]:
    """The unit vectors of the whole space: for each parameter a tensor (size, *param.shape)."""
    sizes = [p.numel() for p in params]
    parts = torch.eye(sum(sizes), device=params[0].device).split(sizes, 1)
    return [part.reshape(-1, *p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]
