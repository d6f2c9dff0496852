"""The general optimizer: a plane of what is known and what is drawn, and no learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from ..directions import (
    AbstractDirections,
    Directions,
    HeldDirections,
    MixedDirections,
    OrthogonalDirections,
    ScaledDirections,
    StoredDirections,
    Structure,
)
from ..directions.laws import key
from ..errors import ArgumentError, DTypeError, ShapeError
from ..evaluation.audit import Auditing
from ..evaluation.checks import CACHED_BYTES
from ..evaluation.plane import PlaneModel
from ..evaluation.repeats import elsewhere
from ..evaluation.side_effects import RandomState, without_side_effects
from ..evaluation.specification import Curvature, PlaneSpec
from ..gradients.feedback import Feedback
from ..gradients.layers import perturbable
from ..gradients.perturbation import Share, allot, estimate
from ..jets.jet import carried
from ..subspace.descent import Damped, Descent, SaddleFree, Solution, Spectral, named
from ..subspace.search import Backtracking, ExactLine, Line, NoiseAware, Proposal, Search, Whole
from .base import STATE, Chunk, Closure, Moving, Params, PlaneOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Guess = Callable[[], Sequence[Tensor]]

PREVIOUS, AVERAGE, ALONE, SQUARE = "previous", "average {}", "alone {}", "square"  # names in the state of a parameter
DRAWN = 64  # directions, by default, where there is no model to perturb
LEAST = 0.1  # of a step, in a plane of nothing but averages over many batches
FEW = 0.1  # of a model's parameters: where fewer move, memory for all directions at a time is not spent
CLEAR = 0.25  # an average of which more than this part is signal counts in full
SQUARE_KEPT = 0.99  # how much of the average of squares is kept from step to step


@final
class PlaneSearch(PlaneOptimizer):
    """Search in a plane of remembered and drawn directions: no learning rate, nothing to be tuned.

        kappa = -M F,    theta <- theta + rate * sum_k kappa_k v_k

    with F the slope and M the damped inverse of the Gauss-Newton matrix of the plane, both of this batch. The plane
    is spanned by

    - running averages of gradient estimates from earlier batches: with ``model``, by noise on its layers'
      outputs (`.gradients.perturbation`), else the forward gradients ``mean_k (F_k v_k)`` of the drawn directions;
    - the same averages, each entry over the root of its running mean square (``scaled``), as Adam's steps are; with
      ``model`` the first of them is cut into ``parts``, directions of their own: the first layer, the last one, and
      runs of those in between, whose right lengths differ;
    - the previous step;
    - ``k`` directions drawn anew;
    - whatever ``guess`` returns.

    In averages a parameter counts for less where they are mostly noise, by what its estimates have in common.

    The rate is what of the step is not noise, by the spread of the examples' slopes; where this batch's loss does
    not fall as the plane promises, the plane is damped (`.search.NoiseAware`). Without drawn directions the
    rate is at least a tenth: the best rate for one step is less than the best for many (Wu et al., arXiv 1803.02021).
    Estimates enter the plane one step after the batch that they come from: in a plane of directions that were
    fitted to the very batch that judges them, the slope would be biased, and its noise taken for signal.

    Where the loss does not tell its examples apart, the step is halved until the loss falls, or with
    ``curvature="hessian"`` the loss is minimized along it, by more passes. With as many directions as parameters
    (``k``) the plane is the whole space, and this is (Gauss-)Newton's method.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr`` (a factor on the
            step, 1 unless ``rate`` is a number; with unlike factors the step is not the plane's solution, and may be
            refused) and ``weight_decay``. Frozen parameters are left alone.
        model: holds the layers to perturb. The closure is called several times a step and must compute the same
            each time; what it writes to buffers, and torch's random numbers, move once.
        k: directions to draw; by default 0 with a model whose layers that can be perturbed own half of the parameters
            or more (one, until there is something to remember), otherwise 64, or as many as there are parameters.
        curvature: "ggn", which needs a loss function (see `jetplane.evaluate`), or "hessian".
        tangents: structure of the drawn directions: "rank-one", "dense", "low-rank" (with ``rank``), "sparse" (with
            ``density``), or "block", each direction in one parameter alone; see `jetplane.Directions`.
        rank, density: of such tangents.
        orthogonal: whether the drawn directions are made orthogonal; see `jetplane.directions.OrthogonalDirections`.
        preconditioned: whether the drawn directions' entries are divided by the root of the running mean square of
            the gradient estimates; see `jetplane.directions.ScaledDirections`.
        rate: "auto" as above, a number for steps of that part, or a `jetplane.subspace.search.Search`.
        descent: what solves the plane, a `jetplane.subspace.descent.Spectral` or its name. By default
            `jetplane.subspace.descent.Damped` on directions of unit curvature for "ggn", and for "hessian"
            `jetplane.subspace.descent.SaddleFree`. Others are "newton", "truncated" and "cubic".
        law: of the drawn directions.
        averages: how much of each running average is kept from step to step.
        scaled: whether the averages are in the plane in scaled form as well.
        parts: into how many parts the first scaled average is cut, where there is a ``model``; 1 for none.
        previous: whether the previous step is in the plane.
        passes: about how many forward passes the estimates by the model's layers cost in a step.
        feedback: whether to predict gradients at layers' outputs by what their noise has taught.
        guess: called before each step; returns a direction, one tensor for each parameter that may move.
        clip: largest Euclidean norm of a step over all parameters, or None.
        weight_decay: decoupled: ``theta <- theta - lr * weight_decay * theta`` beside the step.
        seed: of the directions and the noise. With the averages and the previous step it is part of
            ``state_dict()``, so that training resumes bit for bit.
        every: evaluate the curvature in every so many steps, and the slope alone in those between, with the last
            curvature. That is for planes whose directions keep their meaning from step to step, so without drawn
            ones, unless they are as many as the parameters and thus the coordinates; and without ``guess``. The running
            averages and the previous step turn slowly, but they do turn. Where the plane gets another direction its
            curvature is evaluated at once. It pays with "hessian", whose cost grows with the square of the number of
            directions; "ggn" costs little beside the slope.
        chunk: directions to carry at a time, an integer or "auto"; see `jetplane.evaluate`. By default all of them, but
            one where less than a tenth of ``model`` moves, as in adapters: what is scarce there is memory.
        compile: evaluate the plane as one compiled graph (`torch.compile`, ``fullgraph=True``), from the third step
            on, when as many directions are remembered as ever will be. The other passes of a step run eagerly.
        audit: "first" holds the slope of a closure against differences of its loss before its first step, and again
            where its code, the parameters that move or the mode of its modules change: about ten forward passes, see
            `jetplane.audit`; "always" does so before every step, "never" not at all.
        generators: of random numbers that the closure draws from besides torch's own; see `jetplane.evaluate`.
        process_group: processes that step together, each with its shard of the batch, or a `DeviceMesh`; see
            `jetplane.parallel.ranks`. A step sends a few numbers for each pair of the plane's directions and, with
            ``model``, the estimate of the gradient as well: 4 bytes a parameter. A ``guess`` must be the same on all.

    Raises:
        ArgumentError, DTypeError, DeviceError: settings or parameters that cannot be.

    >>> import torch, jetplane as jp
    >>> from torch.nn import functional as F
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(256, 8)
    >>> y = (x[:, 0] > x[:, 1] ** 2).long()
    >>> opt = jp.optim.PlaneSearch(model.parameters(), model)
    >>> losses = [opt.step(lambda: F.cross_entropy(model(x), y)) for _ in range(60)]
    >>> bool(losses[-1] < 0.5 * losses[0])
    True

    Sources: planes of previous steps, arXiv 2406.17954 and SEBOOST (arXiv 1609.00629); Gauss-Newton in random
    planes, SOFO (hennequin-lab, NeurIPS 2024); activity perturbation, arXiv 2210.03310; Adam, arXiv 1412.6980.
    """

    _own = (
        *PlaneOptimizer._own,
        *("model", "curvature", "search", "averages", "scaled", "parts", "previous", "passes", "feedback", "guess"),
        *("rank", "density", "orthogonal", "preconditioned", "every"),
    )

    def __init__(
        self, params: Params, model: nn.Module | None = None, k: int | None = None, *,
        curvature: Curvature = "ggn", tangents: Structure = "rank-one", rate: str | float | Search = "auto",
        descent: str | Descent | None = None, law: str = "gaussian", averages: Sequence[float] = (0.9, 0.99),
        scaled: bool = True, parts: int = 3, previous: bool = True, passes: float = 8.0, feedback: bool = True,
        guess: Guess | None = None, clip: float | None = None, weight_decay: float = 0.0, seed: int = 0,
        chunk: Chunk = None, rank: int | None = None, density: float | None = None, orthogonal: bool = False,
        preconditioned: bool = False, every: int = 1, compile: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None, audit: Auditing = "first",
        generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        if k == 0 and model is None:
            raise ArgumentError(
                "without a model there is nothing but drawn directions to learn from: k must be positive"
            )
        if isinstance(rate, str) and rate != "auto":
            raise ArgumentError(f"rate must be 'auto', a number or a Search, got {rate!r}")
        if curvature not in ("ggn", "hessian"):
            raise ArgumentError(f"curvature must be 'ggn' or 'hessian', got {curvature!r}")
        if not all(0 <= b < 1 for b in averages) or not 0 < passes < math.inf:
            raise ArgumentError(f"expected averages in [0, 1) and passes above 0, got {averages} and {passes}")
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
            raise ArgumentError(f"parts must be an integer of at least 1, got {parts!r}")
        if preconditioned and not (scaled and averages):
            raise ArgumentError("preconditioned needs the running mean square, which scaled averages alone keep")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be an integer of at least 1, got {every!r}")
        default = Damped(scaled=True) if curvature == "ggn" else SaddleFree(None)
        solver = default if descent is None else named(descent)
        if not isinstance(solver, Spectral):
            raise ArgumentError(f"descent must solve a plane as a whole, which {type(solver).__name__} does not")
        self._descent = solver
        self.model = model
        self.curvature: Curvature = curvature
        # Beside exact curvature, which costs as much as many passes, those of a good line search are few.
        otherwise = ExactLine(10) if curvature == "hessian" else Backtracking()
        self.averages = tuple(averages)
        self.scaled = scaled
        self.parts = parts
        self.previous = previous
        self.passes = passes
        self.feedback = feedback
        self.guess = guess
        lr = rate if isinstance(rate, (int, float)) else 1.0
        super().__init__(
            params, lr, k or 1, law, tangents, clip=clip, weight_decay=weight_decay, seed=seed, chunk=chunk,
            rank=rank, density=density, compile=compile, process_group=process_group, audit=audit,
            generators=generators,
        )  # fmt: skip
        moving = [p for p, _, _ in self._moving()]
        size = sum(p.numel() for p in moving)
        if k is None:
            k = 0 if model is not None and 2 * perturbable(model, moving) >= size else min(DRAWN, size)
        self.k = k
        if chunk is None and not compile and curvature == "ggn" and model is not None:
            whole = sum(p.numel() for p in model.parameters())
            self.chunk = 1 if size < FEW * whole else None
        auto = NoiseAware(floor=NoiseAware.floor if k else LEAST, otherwise=otherwise)
        self.search: Search = rate if isinstance(rate, Search) else auto if rate == "auto" else Whole()
        self.rank = rank
        self.density = density
        self.orthogonal = orthogonal
        self.preconditioned = preconditioned
        self.every = every
        if every > 1 and (guess is not None or k not in (0, size)):
            raise ArgumentError(
                f"every = {every} keeps a curvature for directions that are the same in the next step, which "
                f"drawn ones (k = {k}) and a guess are not"
            )

    def _without_sharding(self) -> str:
        return type(self).__name__

    @property
    def descent(self) -> Spectral:
        """What solves the plane."""
        return self._descent

    # --- the plane ---------------------------------------------------------------------------------------

    def _directions(self, moving: Moving, closure: Closure) -> HeldDirections:
        params, places = [p for p, _, _ in moving], [place for _, _, place in moving]
        size = sum(p.numel() for p in params)
        stored = self._stored(moving)[: size - self.k]  # more directions than parameters would be dependent
        self._lasting = self.k == size or (self.k == 0 and bool(stored))
        sources: list[AbstractDirections] = []
        self._drawn = 0
        if stored:
            together = zip(places, zip(*stored, strict=True), strict=True)
            sources.append(StoredDirections({place: torch.stack(tensors) for place, tensors in together}))
        if self.k == size:
            sources.append(StoredDirections(dict(zip(places, _coordinates(params), strict=True))))
        elif self.k or not stored:
            own = self.state[STATE]  # type: ignore[index]
            self._drawn = self.k or 1
            drawn = Directions(
                self._drawn, self.law, self.tangents, own["seed"], rank=self.rank, density=self.density
            )  # fmt: skip
            drawn.step = own["step"]
            new = ScaledDirections(drawn, self._scales(moving)) if self.preconditioned else drawn
            sources.append(OrthogonalDirections(new) if self.orthogonal else new)
        return HeldDirections(MixedDirections(sources), params, places, CACHED_BYTES)

    def _scales(self, moving: Moving) -> dict[int, Tensor]:
        """One over the root mean square of each entry's estimates, by place; of mean one over all, and bounded."""
        squares = {place: self.state[p][SQUARE] for p, _, place in moving if SQUARE in self.state[p]}
        if not squares:
            return {}
        mean = torch.cat([s.flatten() for s in squares.values()]).mean().clamp_min(torch.finfo(torch.float32).tiny)
        scales = {place: (s / mean).clamp(1e-6, 1e6).rsqrt() for place, s in squares.items()}
        level = torch.cat([s.flatten() for s in scales.values()]).mean()
        return {place: s / level for place, s in scales.items()}

    def _stored(self, moving: Moving) -> list[list[Tensor]]:
        """What is known, as directions of norm one: for each a tensor for each parameter."""
        found = [] if self.guess is None else [self._guessed(self.guess, moving)]
        states = [(p, self.state[p]) for p, _, _ in moving]
        averages = [AVERAGE.format(b) for b in self.averages]
        step = self.state[STATE]["step"]  # type: ignore[index]
        worth = [{AVERAGE.format(b): _worth(state, b, step) for b in self.averages} for _, state in states]

        def held(name: str, scaled: bool) -> list[Tensor]:
            return [
                of.get(name, 1.0) * (_scaled(state[name], state[SQUARE]) if scaled else state[name])
                if name in state
                else torch.zeros_like(p)
                for (p, state), of in zip(states, worth, strict=True)
            ]

        for name in (*averages, *([PREVIOUS] if self.previous else [])):
            if any(name in state for _, state in states):
                found.append(held(name, scaled=False))
        for name in averages if any(SQUARE in state for _, state in states) else ():
            whole = held(name, scaled=True)
            found += _cut(whole, self._parts(moving)) if name == averages[0] else [whole]
        norms = [_norm(tensors) for tensors in found]
        return [[t / norm for t in tensors] for tensors, norm in zip(found, norms, strict=True) if norm > 0]

    def _parts(self, moving: Moving) -> list[int]:
        """The part of each parameter: that of the first layer, of the last one, or of a run of those in between."""
        if self.model is None or self.parts == 1:
            return [0] * len(moving)
        owners = {id(p): i for i, m in enumerate(self.model.modules()) for p in m.parameters(recurse=False)}
        layers = [owners.get(id(p), 0) for p, _, _ in moving]
        order = {layer: i for i, layer in enumerate(sorted(set(layers)))}
        last, inner = len(order) - 1, max(self.parts - 2, 0)
        runs = max(last - 1, 1)

        def part(i: int) -> int:
            if i == last:
                return self.parts - 1
            return 0 if i == 0 or not inner else 1 + (i - 1) * inner // runs

        return [part(order[layer]) for layer in layers]

    def _guessed(self, guess: Guess, moving: Moving) -> list[Tensor]:
        if self.ranks is None:
            return _checked_guess(guess(), moving)
        self.ranks.greet(self._facts)
        return self.ranks.agreed("guess", lambda: _checked_guess(guess(), moving), moving[0][0].device)

    def _spec(self, directions: AbstractDirections) -> PlaneSpec:
        return PlaneSpec(directions.k, self.curvature, "all", self.search.examples, self.chunk)

    def _facts(self) -> dict[str, Any]:
        remembered = sorted({name for p, _, _ in self._moving() for name in self.state.get(p, {})})
        return super()._facts() | {"remembered": remembered}

    _drawn: int  # how many directions of this step's plane were drawn anew; they are its last ones
    _lasting: bool  # whether directions of this step's plane are there in the next one
    _random: RandomState  # where random numbers stood before the evaluation of this step

    def _evaluate(
        self, closure: Closure, params: list[Tensor], directions: AbstractDirections, spec: PlaneSpec
    ) -> PlaneModel:
        self._random = RandomState()
        own = self.state[STATE]  # type: ignore[index]
        last = own.get("curvature")
        stale = last is None or own["step"] % self.every == 0 or len(last) != directions.k
        spec = spec if stale else replace(spec, curvature="none")
        plane = super()._evaluate(closure, params, directions, spec)
        return plane if stale else replace(plane, curvature=last)

    # --- the step ----------------------------------------------------------------------------------------

    def _advance(
        self, closure: Closure, weight: float, moving: Moving, directions: AbstractDirections, plane: PlaneModel
    ) -> dict[str, Any]:
        own = self.state[STATE]  # type: ignore[index]
        params = [p for p, _, _ in moving]
        assert plane.curvature is not None
        solution = self.descent.solve(plane.slope, plane.curvature)
        formed: dict[int, tuple[Tensor, list[tuple[int, Tensor]]]] = {}  # the last line's coefficients and step

        def steps_along(kappa: Tensor) -> list[tuple[int, Tensor]]:
            if id(kappa) not in formed:
                formed.clear()
                formed[id(kappa)] = kappa, list(self._steps(moving, directions, plane, kappa))
            return formed[id(kappa)][1]

        def line(kappa: Tensor) -> Line:
            steps = steps_along(kappa)

            def loss_of_shard_at(rate: float) -> float:
                with elsewhere(closure), _moved(rate, params, steps), without_side_effects(self._random):
                    return float(closure())

            def loss_at(rate: float) -> float:
                if self.ranks is None:
                    return loss_of_shard_at(rate)
                dtype, device = plane.value.dtype, plane.value.device
                options: dict[str, Any] = {"dtype": torch.float64, "device": device}
                loss = self.ranks.mean(lambda: torch.tensor([loss_of_shard_at(rate)], **options), 1, weight, **options)
                return loss.to(dtype).item()  # rounded as that of one process

            return Line(loss_at, lambda: _norm([step for _, step in steps]))

        factor = max(float(group["lr"]) for _, group, _ in moving)
        covariance = None if plane.moments is None else plane.moments.covariance
        curvature, lengths = plane.curvature, self._lengths(params, plane.slope)

        def damped(damping: float) -> Solution:
            return self.descent.solve(plane.slope, (curvature + damping * lengths.diag()).to(curvature.dtype))

        stiffest = (curvature.diagonal() / lengths).max().item()
        value = plane.value.item()
        rounding = 2 * torch.finfo(plane.value.dtype).eps * abs(value)
        proposal = Proposal(value, plane.slope, solution, covariance, line, factor, damped, stiffest, rounding)
        kappa, rate, record = self.search(proposal, own.get("search", {}))
        steps = steps_along(kappa)
        found, changed = self._estimates(closure, weight, params, directions, plane.slope)
        if self.every > 1:
            changed["curvature"] = plane.curvature if self._lasting else None
        steps = [(i, rate * step) for i, step in steps]
        self._move(moving, steps)
        self._remember(params, found, steps, own["step"])
        return changed | {"search": record}

    def _lengths(self, params: list[Tensor], slope: Tensor) -> Tensor:
        """The squared lengths of the plane's directions: one if remembered, as many as parameters if drawn."""
        lengths = torch.ones(len(slope), dtype=torch.float64, device=slope.device)
        lengths[len(slope) - self._drawn :] = sum(p.numel() for p in params)
        return lengths

    def _estimates(
        self, closure: Closure, weight: float, params: list[Tensor], directions: AbstractDirections, slope: Tensor
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Estimates of the gradient from this batch, for planes of later ones, and what of the state has changed."""
        if not self.averages:
            return [], {}
        if self.model is not None:
            return self._perturbed(closure, weight, params, self.model)
        # The drawn directions, of which there are k at the end, give mean_k (F_k v_k).
        weights = torch.cat([slope.new_zeros(len(slope) - self.k), slope[-self.k :] / self.k])
        assert isinstance(directions, HeldDirections)
        used = directions.used
        found = [directions.combine(i, p, weights) if i in used else torch.zeros_like(p) for i, p in enumerate(params)]
        if self.preconditioned:  # what they give is the gradient times the squares of their scales
            moving = self._moving()
            scales = self._scales(moving)
            found = [
                f / scales[place].square() if place in scales else f
                for f, (_, _, place) in zip(found, moving, strict=True)
            ]
        return found, {}

    def _perturbed(
        self, closure: Closure, weight: float, params: list[Tensor], model: nn.Module
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Estimates by noise on the model's layers; the layers' shares, and what their feedback has learned."""
        own, ranks, device = self.state[STATE], self.ranks, params[0].device  # type: ignore[index]
        if ranks is None:
            before, weight, whole = 0.0, 1.0, 1.0
        else:
            before, whole = ranks.place(weight, device)

        def allotted() -> dict[str, Share]:
            chunk = self.chunk if isinstance(self.chunk, int) else None
            return allot(closure, model, params, self.passes, whole / weight, chunk=chunk)

        shares = {name: Share.of(fields) for name, fields in own.get("shares", {}).items()}
        if not shares:
            shares = allotted() if ranks is None else ranks.first(lambda: allotted() if weight else None)
        courses = {name: s.course for name, s in shares.items() if s.course is not None and self.feedback}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        feedback = Feedback(courses, own.get("feedback", {}), torch.empty(0, dtype=dtype, device=device))

        def numbers() -> Tensor:
            seed = int(key(own["seed"], own["step"]))
            found = estimate(closure, model, params, shares, seed, before / weight, feedback, weight / whole)
            return torch.cat([t.flatten().to(dtype) for t in (*found, *feedback.lessons)])

        shapes = [p.shape for p in params] + [t.shape for t in feedback.lessons]
        sizes = [shape.numel() for shape in shapes]
        together = numbers() if ranks is None else ranks.mean(numbers, sum(sizes), weight, dtype, device)
        parts = [part.reshape(shape) for part, shape in zip(together.split(sizes), shapes, strict=True)]
        found = [part.to(p.dtype, copy=True) for part, p in zip(parts, params, strict=False)]
        record = feedback.learned(parts[len(params) :])
        return found, {"shares": {name: share.plain() for name, share in shares.items()}, "feedback": record}

    def _remember(self, params: list[Tensor], found: list[Tensor], steps: list[tuple[int, Tensor]], n: int) -> None:
        if self.previous and any(bool(step.any()) for _, step in steps):
            for i, step in steps:
                self.state[params[i]][PREVIOUS] = step
        for p, estimated in zip(params, found, strict=False):  # there are none without averages
            state, new = self.state[p], {AVERAGE.format(b): (b, estimated) for b in self.averages}
            if self.scaled:
                new[SQUARE] = SQUARE_KEPT, estimated * estimated
            square = estimated.double().square().sum().to(carried(p.dtype))
            for b in self.averages:
                kept, name = _kept(b, n), ALONE.format(b)
                state[name] = kept**2 * state.get(name, 0.0) + (1 - kept) ** 2 * square
            for name, (b, value) in new.items():
                kept = _kept(b, n)
                state[name] = kept * state[name] + (1 - kept) * value if name in state else value


@contextlib.contextmanager
def _moved(rate: float, params: list[Tensor], steps: list[tuple[int, Tensor]]) -> Iterator[None]:
    """The parameters after a part of the step; they are set back."""
    before = [params[i].clone() for i, _ in steps]
    try:
        for i, step in steps:
            params[i].add_(step, alpha=rate)
        yield
    finally:
        for (i, _), held in zip(steps, before, strict=True):
            params[i].copy_(held)


def _kept(b: float, n: int) -> float:
    """How much of a running average of n values is kept for another one.

    Values weigh ``b**age`` in parts of the sum of all weights, as in Adam's corrected averages: the first of them
    weighs no more than its age leaves it.

    >>> [round(_kept(0.9, n), 3) for n in (0, 1, 10, 1000)]
    [0.0, 0.474, 0.854, 0.9]
    """
    return b * (1 - b**n) / (1 - b ** (n + 1))


def _worth(state: dict[str, Any], b: float, n: int) -> float:
    """How much to make of a running average of n estimates: what part of its square is signal, in parts of `CLEAR`.

    The square of ``sum_i w_i g_i`` without its terms ``w_i^2 |g_i|^2`` is on average that of the estimates' mean,
    however noisy they are, less the weight of those terms. It is never zero, so that planes keep their size.
    """
    name, alone = AVERAGE.format(b), ALONE.format(b)
    weight = (1 - b) / (1 + b) * (1 + b**n) / (1 - b**n) if n else 1.0  # sum_i w_i^2
    if weight == 1 or name not in state or alone not in state:  # of one estimate nothing is known
        return 1.0
    whole = state[name].double().square().sum().item()
    signal = (whole - state[alone].item()) / ((1 - weight) * whole) if whole > 0 else 0.0
    return min(max(signal / CLEAR, 0.01), 1.0)


def _scaled(average: Tensor, square: Tensor) -> Tensor:
    """``average / sqrt(square)``; where nothing was ever estimated, zero."""
    return average * torch.where(square > 0, square, 1).rsqrt()


def _cut(tensors: list[Tensor], parts: list[int]) -> list[list[Tensor]]:
    """A direction as several, each zero outside of its part."""
    return [
        [t if mine == part else torch.zeros_like(t) for t, mine in zip(tensors, parts, strict=True)]
        for part in sorted(set(parts))
    ]


def _coordinates(params: list[Tensor]) -> list[Tensor]:
    """The unit vectors of the whole space: for each parameter a tensor (size, *param.shape)."""
    sizes = [p.numel() for p in params]
    parts = torch.eye(sum(sizes), device=params[0].device).split(sizes, 1)
    return [part.reshape(-1, *p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack([t.double().norm() for t in tensors]).norm().item()


def _checked_guess(guess: Sequence[Tensor], moving: Moving) -> list[Tensor]:
    tensors = list(guess)
    shapes, expected = [tuple(t.shape) for t in tensors], [tuple(p.shape) for p, _, _ in moving]
    if shapes != expected:
        raise ShapeError(f"guess() must return a tensor for each parameter that may move, {expected}; got {shapes}")
    for t, (p, _, _) in zip(tensors, moving, strict=True):
        if t.dtype != p.dtype:
            raise DTypeError(f"guess() must return tensors of its parameters' dtype {p.dtype}, got {t.dtype}")
    return [t.detach() for t in tensors]
