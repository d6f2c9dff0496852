"""The general optimizer: a plane of what is known and what is drawn, and no learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from .._torch import tree_leaves
from ..directions import AbstractDirections, CachedDirections, ConcatenatedDirections, Directions, SelectedDirections
from ..directions.laws import key
from ..directions.unit import joint_norm
from ..errors import ArgumentError, JetplaneWarning, NonFiniteError, RescueWarning, UnknownLossError, warn_user
from ..evaluation.api import evaluate_plane
from ..evaluation.audit import Auditing
from ..evaluation.checks import CACHED_BYTES, as_directions
from ..evaluation.leaving import plain_run
from ..evaluation.plane import PlaneModel
from ..evaluation.repeats import RepeatedClosure
from ..evaluation.side_effects import RandomState, setting_back, without_side_effects
from ..evaluation.specification import Curvature, PlaneSpec
from ..gradients.estimators import ActivityPerturbation, Batch, Estimate, Estimator, ForwardGradients
from ..gradients.heads import LocalHeads
from ..gradients.layers import perturbable
from ..gradients.perturbation import accounted_for
from ..jets import carried
from ..subspace.descent import Damped, Descent, SaddleFree, Spectral, named
from ..subspace.search import Backtracking, Decision, ExactLine, NoiseAware, Outcome, Proposal, Search, advance
from ..subspace.sources import (
    DRAWN,
    Averages,
    Context,
    Drawn,
    FastWeights,
    PreviousStep,
    Result,
    Source,
    State,
    Subspace,
)
from . import points
from .base import ALL, STATE, Closure, Moving, Params, PlaneOptimizer, comparable
from .points import Changes, Following

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

LEAST = 0.1  # of a step, in a plane of nothing but averages over many batches
DRAWN_EXACT = 10  # directions beside exact curvature, whose cost grows with their square
ROUND = 16  # steps from one plane to the next, where estimates are made without one
FEW = 0.1  # of a model's parameters: where fewer move, memory for all directions at a time is not spent


@dataclass(frozen=True)
class _Shard:
    """This process's part of the batch.

    Attributes:
        closure: returns its loss.
        weight: of this loss in the mean over processes.
        begin: where torch's random numbers stand before the plane is evaluated.
    """

    closure: RepeatedClosure
    weight: float
    begin: RandomState


@dataclass(frozen=True)
class _Span:
    """The directions of one step's plane.

    Attributes:
        directions: all of them, by the places of parameters among those that move.
        squared_norms: of each, (K,) in float64.
        drawn: which of them have ``E[v v^T] = I``.
        counts: how many each source has given.
    """

    directions: CachedDirections
    squared_norms: Tensor
    drawn: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True)
class _Settings:
    """What of an optimizer depends on its closure.

    Attributes:
        curvature: the kind by which planes are evaluated.
        drawn: whether directions are drawn.
        forward: whether these give the estimates of the gradient.
    """

    curvature: Curvature
    drawn: bool
    forward: bool


@final
class PlaneSearch(PlaneOptimizer):
    """Search in a plane of remembered and drawn directions: no learning rate, nothing to be tuned.

        kappa = -M F,    theta <- theta + lr * rate * sum_k kappa_k v_k

    with F the slope and M the damped inverse of the Gauss-Newton matrix of the plane, both of this batch. That matrix
    needs a loss function that is known: one of ``torch.nn.functional``, a sum of squares or log-probabilities, or
    marked with `jetplane.loss`. For a closure without one the exact curvature of the plane is taken, with a warning.
    That costs more, so that 10 directions are drawn where 64 would be. It has four parts:

    - ``subspace``: the directions that span the plane. By default these are running averages of gradient estimates
      from earlier batches, the same averages divided by the root mean square of each entry, as in Adam's steps, and
      the previous step (`jetplane.sources.Averages`, `jetplane.sources.PreviousStep`). 64 freshly drawn directions
      come first (`jetplane.sources.Drawn`), unless half of the parameters or more belong to layers of a model that can
      be perturbed. If nothing has been remembered yet, the plane has one drawn direction.
    - ``gradient``: how gradients are estimated. With a model, by noise on the outputs of its layers
      (`jetplane.gradients.ActivityPerturbation`); otherwise as the forward gradients ``mean_k (F_k v_k)`` of the drawn
      directions (`jetplane.gradients.ForwardGradients`). `jetplane.gradients.LocalHeads` uses a local loss for each
      layer, at a twentieth of the cost, `jetplane.gradients.ResidualStream` the error at the end of a residual stream.
      With these and others that need no plane (`jetplane.gradients.Estimator.alone`) the default subspace is that of
      `jetplane.sources.FastWeights`, and a plane is evaluated in every 16th step. Estimates enter the plane one step
      after their batch: if directions were fitted to the same batch that judges them, the slope would be biased, and
      its noise mistaken for signal.
    - ``descent``: how the step in the plane is solved for: `jetplane.descent.Damped` on directions of unit curvature,
      with exact curvature `jetplane.descent.SaddleFree`. It does not choose the curvature: ``subspace`` does.
    - ``search``: how far to go. By default the noise in the step is estimated from the spread of the examples' slopes
      and the step is shortened by it; the plane is damped if the loss of this batch falls by less than the plane
      predicts (`jetplane.search.NoiseAware`). Without drawn directions the rate is at least a tenth: the best rate for
      one step is less than the best for many (Wu et al., arXiv 1803.02021). If the examples' parts of the slope are
      not known, the step is halved until the loss falls; with exact curvature, the loss is minimized along the step by
      more passes.

    With as many drawn directions as parameters the plane is the whole space, and this is (Gauss-)Newton's method.
    Your own sources, estimators and searches are small classes: docs/extending.md.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr`` (if the rates differ,
            the step is not the plane's solution and may be rejected) and ``weight_decay``. Frozen parameters do not
            change; those of a group with a rate of zero count as frozen, unless all rates are zero.
        model: holds the layers to perturb, and tells layers apart. The closure is called several times per step and
            must compute the same each time; buffers and torch's random state advance once. If the loss differentiates
            the model itself, as a residual of an equation does, directions are drawn as without a model, with a
            warning.
        lr: a factor on the step, which schedulers may change.
        weight_decay: decoupled weight decay: ``theta <- theta - lr * weight_decay * theta`` before the step is added.
        clip: largest Euclidean norm of ``lr * sum_k kappa_k v_k`` over all parameters, or None. Steps between planes
            are no longer either.
        seed: seed of the directions and the noise. The seed and the state of the sources are part of
            ``state_dict()``, so that training resumes bit for bit.
        subspace: a list of `jetplane.sources.Source`, or a `jetplane.sources.Subspace` of them, which also says
            what curvature is evaluated and how many directions at a time.
        gradient: a `jetplane.gradients.Estimator`.
        descent: a `jetplane.descent.Spectral` or its name: "damped", "saddle-free", "newton".
        search: a `jetplane.search.Search`.
        audit: "first" compares the slope of a closure with differences of its loss before its first step, and again
            when its code, the parameters that move or the mode of its modules change. This costs five to nine forward
            passes; see `jetplane.audit`. It also finds the parameters that no derivative of the loss reaches
            (``detach()``), which are then left as they are, with a warning. "always" does so before
            every step, "never" not at all.
        generators: random generators that the closure uses besides torch's own; see `jetplane.evaluate`.
        process_group: processes that step together, each with its shard of the batch, or a `DeviceMesh`; see
            `jetplane.distributed`. A step sends a few numbers for each pair of the plane's directions and, with
            ``model``, also the estimate of the gradient: 4 bytes per parameter.

    Raises:
        ArgumentError, DTypeError, DeviceError: settings or parameters that are not valid.
        UnknownLossError: (of `step`) ``curvature="ggn"`` was asked for, and the loss function is not known.

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
        "clip", "chunk", "plane", "audit", "model", "subspace", "curvature", "every", "gradient", "search", "_descent",
        "_given", "_settled",
    )  # fmt: skip

    curvature: Curvature

    _takes_complex = False  # its averages, guards and estimates are of real numbers

    def __init__(
        self, params: Params, model: nn.Module | None = None, *, lr: float = 1.0, weight_decay: float = 0.0,
        clip: float | None = None, seed: int = 0, subspace: Sequence[Source] | Subspace | None = None,
        gradient: Estimator | None = None, descent: str | Descent | None = None, search: Search | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None, audit: Auditing = "first",
        generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        local = isinstance(gradient, LocalHeads)
        if subspace is None and isinstance(gradient, Estimator) and gradient.alone:
            subspace = Subspace([FastWeights()], chunk=1, every=ROUND)
        if isinstance(subspace, Source):
            raise ArgumentError(f"subspace must be a list of sources or a Subspace, got one: subspace=[{subspace}]")
        plan = subspace if isinstance(subspace, Subspace) else Subspace(subspace)
        solver = None if descent is None else named(descent)
        if model is not None and not isinstance(model, nn.Module):
            raise ArgumentError(
                "model must be the torch.nn.Module that the parameters belong to, or None; got "
                f"{type(model).__name__}: PlaneSearch(model.parameters(), model)"
            )
        if solver is not None and not isinstance(solver, Spectral):
            raise ArgumentError(
                f"descent must use the whole curvature matrix of a plane, which {type(solver).__name__} does not"
            )
        for name, value, kind in (("gradient", gradient, Estimator), ("search", search, Search)):
            if value is not None and not isinstance(value, kind):
                raise ArgumentError(f"{name} must be an instance of {kind.__name__} or None, got {value!r}")
        super().__init__(
            params, lr, 1, clip=clip, weight_decay=weight_decay, seed=seed, process_group=process_group,
            audit=audit, generators=generators,
        )  # fmt: skip
        self.model = model
        self.every = plan.every
        self._given = plan, gradient, solver, search
        moving = [p for p, _, _ in self._moving()]
        if model is not None and moving and not {id(p) for p in moving} & set(map(id, _tensors(model))):
            raise ArgumentError(
                "none of the parameters that may move belongs to the model; expected PlaneSearch(model.parameters(), "
                "model), with one model, not a copy of it"
            )
        self._settle(self._called_for(plan.curvature or "ggn", moving, None), moving)
        for source in self.subspace:
            if isinstance(source, Drawn):
                source.count(sum(p.numel() for p in moving))
        if isinstance(self.gradient, (ActivityPerturbation, LocalHeads)) and model is None:
            uses = "whose layers it perturbs" if not local else "whose layers have the heads"
            raise ArgumentError(
                f"{type(self.gradient).__name__} needs the model {uses}, got None: PlaneSearch(params, model)"
            )
        if self.every > 1 and not self.gradient.alone:
            raise ArgumentError(
                f"every = {self.every} leaves steps without a plane, which {type(self.gradient).__name__} cannot make "
                "estimates in: take every=1, or jetplane.gradients.LocalHeads()"
            )
        if self.every > 1 and not any(source.learns for source in self.subspace):
            raise ArgumentError(
                f"every = {self.every} leaves steps without a plane, and no source learns in those steps; take every=1"
            )
        drawless = all(isinstance(source, (Averages, PreviousStep)) for source in self.subspace)
        if isinstance(self.gradient, ForwardGradients) and drawless:
            raise ArgumentError(
                "forward gradients need drawn directions, and the subspace has none: add jetplane.sources.Drawn() "
                "to it, or give a model"
            )

    def _called_for(self, curvature: Curvature, params: Sequence[Tensor], told: float | None) -> _Settings:
        """What goes with a curvature, and with how many numbers belong to layers whose noise tells of them."""
        plan, _, _, _ = self._given
        covered = 0 if self.model is None else perturbable(self.model, params)
        told = covered if told is None else told
        drawn = self.model is None or 2 * told < sum(p.numel() for p in params)
        return _Settings(curvature, drawn, self.model is None or (plan.sources is None and told == 0 < covered))

    def _settle(self, settings: _Settings, params: Sequence[Tensor]) -> None:
        """Take what is called for, where it was not given."""
        plan, estimator, descent, search = self._given
        exact, size = settings.curvature == "hessian", sum(p.numel() for p in params)
        drawn = [Drawn(DRAWN_EXACT if exact and size > DRAWN else None)] if settings.drawn else []
        self.subspace = tuple([*drawn, Averages(), PreviousStep()] if plan.sources is None else plan.sources)
        self.curvature = settings.curvature
        self.gradient = estimator or (ForwardGradients() if settings.forward else ActivityPerturbation())
        self._descent = descent or (SaddleFree(None) if exact else Damped(scaled=True))
        # Beside exact curvature, which costs as much as many passes, those of a good line search are few.
        otherwise = ExactLine(10) if exact else Backtracking()
        draws = any(isinstance(source, Drawn) for source in self.subspace)
        self.search = search or NoiseAware(floor=NoiseAware.floor if draws else LEAST, otherwise=otherwise)
        self.chunk = max(plan.chunk, 2) if exact and isinstance(plan.chunk, int) else plan.chunk  # pairs need two
        if plan.chunk is None and not exact and self.model is not None:
            self.chunk = 1 if size < FEW * sum(p.numel() for p in self.model.parameters()) else None
        self._settled = settings

    def _inspect(self, closure: Closure, params: list[Tensor], weight: float) -> None:
        """See `PlaneOptimizer._inspect`. Tell, too, what was not given and depends on the closure."""
        super()._inspect(closure, params, weight)
        plan, estimator, _, _ = self._given
        model, moving = self.model, [p for p in params if id(p) not in self._cut_off]
        curvature, told = plan.curvature, None
        if curvature is None:
            (known,) = self._over_ranks(lambda: [_loss_is_curved(closure, moving)], 1, weight)
            curvature = "hessian" if known < ALL else "ggn"
        if model is not None and estimator is None and plan.sources is None:
            (told,) = self._over_ranks(lambda: [accounted_for(closure, model, moving)], 1, weight)
        settings = self._called_for(curvature, moving, told)
        if plan.curvature is None and settings.curvature == "hessian" != self._settled.curvature:
            warn_user(
                "the closure has no loss function that is known and curved, which Gauss-Newton curvature needs: its "
                "exact curvature is taken, at a higher cost. If the loss is a function of the model's outputs, mark it "
                "with @jetplane.loss, or take one of torch.nn.functional (smooth, not l1 or margins); "
                'subspace=jetplane.sources.Subspace(curvature="hessian") says that exact curvature is meant',
                JetplaneWarning,
            )
        if settings.forward and not self._settled.forward:
            warn_user(
                "the loss differentiates the model itself, so that noise on its layers' outputs does not tell the "
                f"gradient: directions are drawn instead, as by {type(self).__name__}(params) without a model",
                JetplaneWarning,
            )
        if settings != self._settled:
            self._settle(settings, moving)

    @property
    def plane_next(self) -> bool:
        """Whether the next step evaluates a plane: with ``every`` above one, the others estimate the gradient alone."""
        return (self.state[STATE]["step"] + 1) % self.every == 0  # type: ignore[index]

    @property
    def descent(self) -> Spectral:
        """The rule that solves for the step in the plane."""
        return self._descent

    # --- one step, from top to bottom ---------------------------------------------------------------------

    @torch.inference_mode(False)  # what is remembered in it could not be computed with outside of it
    def step(self, closure: Closure | None = None, *, weight: float = 1.0) -> Tensor:  # type: ignore[override]
        """Span a plane, evaluate it, decide how far to step in it, estimate the gradient for later planes, and move.

        If a plane is evaluated only in every n-th step (`jetplane.sources.Subspace.every`), the other steps estimate
        the gradient and update the sources; parameters move only with the points to which planes have taken them
        (`jetplane.sources.Source.points`).

        Args:
            closure: computes and returns the scalar loss. It must not call ``backward``.
            weight: with a process group: the weight of this rank's loss in the mean; see `PlaneOptimizer.step`.

        Returns:
            The loss before the step, a plain tensor of shape (). With a process group, that of the whole batch. In a
            step without a plane it is the loss where the gradient was estimated.

        Raises:
            JetplaneError: as `PlaneOptimizer.step`. Parameters and the optimizer's state are then as they were.
        """
        repeated, moving = self._started(closure, weight)
        own, told = self.state[STATE], dict[str, Any]()  # type: ignore[index]
        with torch.no_grad(), setting_back(self.generators):
            contexts = self._contexts(moving, repeated if self.ranks is None else None)
            rates = [float(group["lr"]) for _, group, _ in moving]
            if not all(map(math.isfinite, rates)):
                raise ArgumentError(f"lr must be finite, got {rates} for the parameters that may move")
            shard = _Shard(repeated, weight, RandomState())
            span, plane, changes, limit = None, None, [], math.inf if self.clip is None else self.clip
            shares: Sequence[float] = [own.get("shares", {}).get(label, 0.0) for label in self._labels]
            if self.plane_next:
                span = self._spanned(contexts)
                plane = self._evaluated(repeated, weight, moving, span.directions)
                proposal = _proposed(plane, self.descent, span.squared_norms)
                decision, changes, taken = self._decided(shard, moving, contexts, span, plane, proposal)
                told["search"] = asdict(decision.state)
                if self.every > 1:
                    # The one that is drawn where no source has any is of none.
                    weights = taken[: sum(span.counts)].split(list(span.counts))
                    shares = points.shares(self.subspace, contexts, weights, shares)
            estimate, signature = self._estimated(shard, contexts, span, plane)
            if plane is None and points.is_judged(own["step"], self.every):
                changes, shares = self._judged(shard, contexts, estimate, rates, shares, limit)
            steps, gradient, params = dict(changes), list(estimate.gradient), contexts[0].params
            estimate, contexts, span = replace(estimate, gradient=[]), [], None  # memory, that the next line lets go of
            following = self._remember(
                moving, repeated if self.ranks is None else None, gradient, [*map(steps.get, range(len(moving)))],
                shares if plane is None else [0.0] * len(shares),
            )  # fmt: skip
            self._move(moving, changes)
            taken = joint_norm(steps.values()) if steps and self.clip is not None else 0.0
            following.move(params, rates, max(limit - taken, 0.0))
        told |= {"gradient": estimate.state, "signature": signature, "step": own["step"] + 1}
        told["estimator"] = type(self.gradient).__name__
        told["shares"] = dict(zip(self._labels, shares, strict=True))
        # A new record: one that state_dict() has handed out must not move on.
        self.state[STATE] = own | told  # type: ignore[index]
        if plane is None:
            assert estimate.loss is not None
            return estimate.loss
        self.plane = plane
        return plane.value

    def _contexts(self, moving: Moving, closure: Closure | None = None) -> list[Context]:
        """What each source sees."""
        params, places = [p for p, _, _ in moving], [place for _, _, place in moving]
        own, states = self.state[STATE], [self.state.get(p, {}) for p in params]  # type: ignore[index]
        return [
            Context(
                params, places, [_of(state, label) for state in states], own["step"], own["seed"], self.model, closure
            )
            for label in self._labels
        ]

    def _elsewhere(self, contexts: Sequence[Context]) -> Sequence[Tensor] | None:
        """Where the gradient is estimated: where the first source says that has a wish."""
        for source, context in zip(self.subspace, contexts, strict=True):
            wanted = source.weights(context)
            if wanted is not None:
                points.check_point(source, "weights", wanted, context.params)
                return wanted
        return None

    def _judged(
        self, shard: _Shard, contexts: Sequence[Context], estimate: Estimate, rates: Sequence[float],
        shares: Sequence[float], limit: float,
    ) -> tuple[Changes, Sequence[float]]:  # fmt: skip
        """What leads to the point that this batch finds the best, and the shares of the sources then."""
        params, elsewhere = contexts[0].params, self._elsewhere(contexts)

        def loss(changes: Changes) -> float:
            with _moved(1.0, params, changes):
                return self._loss(shard, params)

        known = None if elsewhere is None or estimate.loss is None else (elsewhere, estimate.loss.item())
        return points.judged(self.subspace, contexts, rates, shares, loss, known, limit)

    def _remember(
        self, moving: Moving, closure: RepeatedClosure | None, gradient: list[Tensor], steps: list[Tensor | None],
        shares: Sequence[float],
    ) -> Following:  # fmt: skip
        """Have each source remember what it does of each parameter.

        Where sources are separable, the old state and the gradient of each parameter are let go of before the next.

        Returns:
            How parameters follow the points of sources, by these shares.
        """
        known: dict[int, tuple[Sequence[State], Sequence[Tensor]]] = {}
        if not all(source.separable for source in self.subspace):
            contexts, result = self._contexts(moving, closure), Result([*gradient], steps)
            for j, (source, context, share) in enumerate(zip(self.subspace, contexts, shares, strict=True)):
                if not source.separable:
                    known[j] = _remembered(source, context, result, share)
            del contexts, result
        following = Following([], shares)
        for i, (p, _, _) in enumerate(moving):
            found, advances, contexts = [], [], self._contexts(moving[i : i + 1], closure)
            for j, (source, context, share) in enumerate(zip(self.subspace, contexts, shares, strict=True)):
                if j in known:
                    states, advance = (part[i : i + 1] for part in known[j])
                else:
                    states, advance = _remembered(source, context, Result(gradient[i : i + 1], steps[i : i + 1]), share)
                found += states
                advances.append(advance[0] if advance else None)
            following.advances.append(advances)
            self.state[p] = _flat(self._labels, found)
            gradient[i : i + 1] = [p.new_empty(0)] if gradient else []
        return following

    def _spanned(self, contexts: Sequence[Context]) -> _Span:
        """The plane's directions: those of all sources, at most as many as there are parameters."""
        params, places, room = contexts[0].params, contexts[0].places, contexts[0].size
        found: list[CachedDirections] = []
        counts = [0] * len(contexts)
        for j, (source, context) in enumerate(zip(self.subspace, contexts, strict=True)):
            directions = self._directions_of(source, context)
            if directions is not None and room:
                fitting = directions if directions.k <= room else SelectedDirections(directions, [slice(room)])
                found.append(CachedDirections(fitting, params, places, CACHED_BYTES))
                room -= fitting.k
                counts[j] = fitting.k
        if not found:
            found.append(CachedDirections(Drawn(1).directions(contexts[0]), params, places, CACHED_BYTES))
        every = ConcatenatedDirections(found)
        isotropic = [one.isotropic for one in found for _ in range(one.k)]
        drawn = [i for i, yes in enumerate(isotropic) if yes]
        return _Span(CachedDirections(every, params), every.squared_norms(params), drawn, counts)

    def _directions_of(self, source: Source, context: Context) -> AbstractDirections | None:
        """A source's directions; with several processes compared bit by bit, where they are to be."""
        if self.ranks is None or not source.compared:
            return source.directions(context)
        found: list[AbstractDirections] = []

        def drawn() -> list[Tensor]:
            directions = source.directions(context)
            if directions is None:
                return []
            found.append(directions)
            directions.prepare(context.params, context.places)
            return [directions.draw(i, p) for i, p in zip(context.places, context.params, strict=True)]

        self.ranks.greet(self._facts)
        self.ranks.agreed(f"directions of {type(source).__name__}", drawn, context.params[0].device)
        return found[0] if found else None

    def _decided(
        self,
        shard: _Shard,
        moving: Moving,
        contexts: Sequence[Context],
        span: _Span,
        plane: PlaneModel,
        proposal: Proposal,
    ) -> tuple[Decision, Changes, Tensor]:
        """What the search makes of the proposal, told the losses that it asks for.

        Returns:
            The decision, what is added to parameters, and the coefficients of what is added.
        """
        params, factor = [p for p, _, _ in moving], max(float(group["lr"]) for _, group, _ in moving)
        trials = self.search.decide(proposal, _restored(self.search, self.state[STATE]))  # type: ignore[index]
        limit = min(points.reach(self.subspace, contexts), math.inf if self.clip is None else self.clip)
        kappa, changes, shortened, outcome = None, [], 1.0, None
        while True:
            asked = advance(trials, outcome)
            if kappa is None or not torch.equal(asked.kappa, kappa):
                kappa = asked.kappa
                changes, shortened = self._changes(moving, span.directions, plane, kappa, limit)
            if isinstance(asked, Decision):
                taken = asked.rate * shortened * kappa
                return asked, [(i, asked.rate * change) for i, change in changes], taken
            with _moved(asked.rate, params, changes):
                outcome = Outcome(self._loss(shard, params), factor * shortened)

    def _changes(
        self, moving: Moving, directions: CachedDirections, plane: PlaneModel, kappa: Tensor, limit: float
    ) -> tuple[Changes, float]:
        """``lr * sum_k kappa_k v_k`` of each parameter that the loss uses, and by how much the limit shortens it."""
        changes = list(self._unclipped(moving, directions, plane, kappa))
        if limit == math.inf:
            return changes, 1.0
        norm = joint_norm(change for _, change in changes)
        shortened = min(1.0, limit / norm) if norm > 0 else 1.0
        return [(i, shortened * change) for i, change in changes], shortened

    def _loss(self, shard: _Shard, params: Sequence[Tensor]) -> float:
        """The loss where parameters are now, with the random numbers of the step's first evaluation."""
        kind: list[torch.dtype] = []

        def of_shard() -> float:
            with shard.closure.elsewhere(), without_side_effects(shard.begin), plain_run(params, again=True):
                loss = shard.closure().detach()  # it may be in a graph of the closure's own
                kind.append(loss.dtype)
                return float(loss)

        if self.ranks is None:
            return of_shard()
        options: dict[str, Any] = {"dtype": torch.float64, "device": params[0].device}
        mean = self.ranks.mean(lambda: torch.tensor([of_shard()], **options), 1, shard.weight, **options)
        return mean.to(kind[0] if kind else torch.float64).item()  # rounded as that of one process

    def _estimated(
        self, shard: _Shard, contexts: Sequence[Context], span: _Span | None, plane: PlaneModel | None
    ) -> tuple[Estimate, str]:
        """An estimate of the gradient on this batch, for planes of later ones, and what its preparation depended on."""
        own, estimator, context = self.state[STATE], self.gradient, contexts[0]  # type: ignore[index]
        elsewhere = self._elsewhere(contexts)
        signature, is_its = estimator.signature(context.params, self.model), self._is_of_estimator(own)
        state = own.get("gradient", {}) if is_its else {}
        if not any(source.learns for source in self.subspace):
            return Estimate([], state), signature
        every, away = range(len(context.params)), estimator.measures and elsewhere is not None
        batch = Batch(
            shard.closure, context.params, self.model, span.directions if span and not away else None, plane,
            span.drawn if span else [], frozenset(span.directions.used if span else every),
            int(key(own["seed"], own["step"])), chunk=self.chunk if isinstance(self.chunk, int) else None,
        )  # fmt: skip
        if estimator.measures:
            prepared = is_its and signature == own.get("signature")
            with _at(elsewhere, context.params, shard.closure):
                found = self._measured(shard, batch, state, prepared)
        else:
            found = estimator.estimate(batch, [], state)
        if plane is None and not (found.loss is not None and bool(torch.isfinite(found.loss))):
            raise NonFiniteError(f"the loss is not finite where the gradient is estimated: {found.loss}")
        heads = _tensors_in(found.state) if isinstance(estimator, LocalHeads) else []
        if not (_finite(found.gradient, squared=True) and _finite(heads)):
            raise NonFiniteError(
                "the estimate of the gradient or its square is not finite on this batch, as where a root or a "
                "logarithm is taken of zero: no step was taken, and nothing of it is remembered"
            )
        return found, signature

    def _is_of_estimator(self, own: dict[str, Any]) -> bool:
        """Whether what an estimator remembers is of this kind of estimator; if not, it begins anew."""
        name = type(self.gradient).__name__
        return own.get("estimator", name) == name

    def _measured(self, shard: _Shard, batch: Batch, state: dict[str, Any], prepared: bool) -> Estimate:
        """The estimate on a batch, of all processes."""
        ranks, weight, estimator, device = self.ranks, shard.weight, self.gradient, batch.params[0].device
        if ranks is not None:
            ranks.greet(self._facts)
            before, whole = ranks.place(weight, device)
            batch = replace(batch, before=before / weight if weight else 0.0, part=weight / whole)
        if not prepared:
            first = lambda: estimator.prepare(batch, state) if weight else None  # noqa: E731
            state = estimator.prepare(batch, state) if ranks is None else ranks.first(first)
        if ranks is None:
            return estimator.estimate(batch, estimator.measure(batch, state), state)
        shapes, dtype = estimator.shapes(batch, state), _widest(batch.params)
        measured = lambda: torch.cat([t.flatten().to(dtype) for t in estimator.measure(batch, state)])  # noqa: E731
        sizes = [shape.numel() for shape in shapes]
        means = ranks.mean(measured, sum(sizes), weight, dtype, device).split(sizes)
        shaped = [mean.reshape(shape).clone() for mean, shape in zip(means, shapes, strict=True)]
        return estimator.estimate(batch, shaped, state)

    # --- what the optimizers have in common, as it is here --------------------------------------------------

    @property
    def _labels(self) -> list[str]:
        """Under which each source's part of a parameter's state lies: its class, with a number from the second on."""
        names = [type(source).__name__ for source in self.subspace]
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        return [name if n == 1 else f"{name} {n}" for name, n in zip(names, counts, strict=True)]

    def _moving(self) -> Moving:
        """Parameters that may move now: where some have a learning rate of zero, the others."""
        every = super()._moving()
        return [found for found in every if float(found[1]["lr"])] or every

    def _spec(self, directions: AbstractDirections) -> PlaneSpec:
        return PlaneSpec(directions.k, self.curvature, "all", self.search.examples, self.chunk)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `PlaneOptimizer.load_state_dict`. What is remembered keeps its dtype."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(params, saved, strict=True):
            for name, t in state_dict["state"].get(i, {}).items():
                self.state[p][name] = t.to(p.device)

    def _check_size(self, moving: Moving) -> None:
        """Sources see to it themselves."""

    def _without_sharding(self) -> str:
        return type(self).__name__

    def _progress(self) -> dict[str, Any]:
        moving = [p for p, _, _ in self._moving()]
        return super()._progress() | {"layers": self.gradient.signature(moving, self.model)}

    def _facts(self) -> dict[str, Any]:
        remembered = sorted({name for p, _, _ in self._moving() for name in self.state.get(p, {})})
        sources = dict(zip(self._labels, map(comparable, self.subspace), strict=True))
        return super()._facts() | {"subspace": ", ".join(self._labels)} | sources | {"remembered": remembered}


def _remembered(
    source: Source, context: Context, result: Result, share: float
) -> tuple[Sequence[State], Sequence[Tensor]]:  # fmt: skip
    """What a source remembers, and by how much its last point moves, if it has a share."""
    states, count = source.remember(context, result), len(context.params)
    if len(states) != count:
        raise ArgumentError(
            f"{type(source).__name__}.remember must return a dictionary for each of {count} parameters, "
            f"got {len(states)}"
        )
    return states, points.advance(source, context, states) if share else []


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _loss_is_curved(closure: Closure, params: Sequence[Tensor]) -> bool:
    """Whether the loss function of a closure is known, and curved in its input.

    One run with one direction tells: Gauss-Newton curvature of absolute values and margins is zero. That of penalties
    does not count, which would stand for all of it.
    """
    with without_side_effects():
        try:
            spec = PlaneSpec(1, "ggn", penalties=False)
            plane = evaluate_plane(closure, params, as_directions(params, Directions(1)), spec)
        except UnknownLossError:
            return False
    assert plane.curvature is not None
    return bool(plane.curvature.any()) or not bool(plane.slope.any())


def _proposed(plane: PlaneModel, descent: Spectral, squared_norms: Tensor) -> Proposal:
    """What a descent proposes on a plane."""
    assert plane.curvature is not None
    value, moments = plane.value.item(), plane.moments
    covariance, count = (None, None) if moments is None else (moments.covariance, moments.count)
    rounding = 2 * torch.finfo(plane.value.dtype).eps * abs(value)
    slope = plane.slope
    if bool(slope.any()) and not bool(plane.curvature.any()):
        warn_user(
            f"the curvature of a plane of {len(slope)} directions is zero, as where a softmax rounds to 0 and 1: no "
            "step was taken along it",
            RescueWarning,
        )
        slope = torch.zeros_like(slope)
    return Proposal.of(value, slope, plane.curvature, descent, squared_norms, covariance, rounding, count)


def _restored(search: Search, own: dict[str, Any]) -> Any:
    """A search's state; it begins anew where what is there belongs to another kind of search."""
    saved, names = own.get("search", {}), [field.name for field in fields(search.start)]
    return replace(search.start, **saved) if sorted(saved) == sorted(names) else search.start


def _of(state: dict[str, Any], label: str) -> State:
    """A source's part of a parameter's state."""
    return {name.removeprefix(f"{label}/"): t for name, t in state.items() if name.startswith(f"{label}/")}


def _flat(labels: Sequence[str], states: Sequence[State]) -> dict[str, Tensor]:
    """A parameter's state, of what each source remembers of it."""
    pairs = zip(labels, states, strict=True)
    return {f"{label}/{name}": t for label, state in pairs for name, t in state.items()}


def _finite(tensors: Sequence[Tensor], squared: bool = False) -> bool:
    """Whether tensors are finite; if so asked, their squares too, in single precision at least."""
    most = [torch.stack(torch.aminmax(t)).abs().max().double() for t in tensors if t.numel()]
    bounds = [torch.finfo(carried(t.dtype)).max ** (0.5 if squared else 1) for t in tensors if t.numel()]
    return not most or all(size <= bound for size, bound in zip(torch.stack(most).tolist(), bounds, strict=True))


def _tensors_in(state: Any) -> list[Tensor]:
    """The floating tensors in an estimator's state."""
    return [t for t in tree_leaves(state) if isinstance(t, Tensor) and t.is_floating_point()]


def _widest(params: Sequence[Tensor]) -> torch.dtype:
    """In which dtype estimates are sent: single precision, or double where a parameter has it."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


@contextlib.contextmanager
def _at(weights: Sequence[Tensor] | None, params: Sequence[Tensor], closure: RepeatedClosure) -> Iterator[None]:
    """The parameters at other values, None for where they are; they are set back."""
    if weights is None:
        yield
        return
    before = [p.clone() for p in params]
    try:
        for p, other in zip(params, weights, strict=True):
            p.copy_(other)
        with closure.elsewhere():
            yield
    finally:
        for p, held in zip(params, before, strict=True):
            p.copy_(held)


@contextlib.contextmanager
def _moved(rate: float, params: Sequence[Tensor], changes: Changes) -> Iterator[None]:
    """The parameters after a part of a step; they are set back."""
    before = [params[i].clone() for i, _ in changes]
    try:
        for i, change in changes:
            params[i].add_(change, alpha=rate)
        yield
    finally:
        for (i, _), held in zip(changes, before, strict=True):
            params[i].copy_(held)
