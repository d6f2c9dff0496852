"""The general optimizer: a plane of what is known and what is drawn, and no learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ..activity import Share, allot, estimate
from ..descent import Damped, Descent, SaddleFree, Spectral, named
from ..directions import AbstractDirections, Directions, HeldDirections, MixedDirections, StoredDirections, Structure
from ..errors import ArgumentError, DTypeError, ShapeError
from ..laws import key
from ..plane import KEPT, Curvature, PlaneModel
from ..replay import RandomState, random_state, rehearsal
from ..search import NoiseAware, Proposal, Search, Whole
from .base import STATE, Chunk, Closure, Moving, Params, PlaneOptimizer

Guess = Callable[[], Sequence[Tensor]]

PREVIOUS, AVERAGE, SQUARE = "previous", "average {}", "square"  # names in the state of a parameter
DRAWN = 64  # directions, by default, where there is no model to perturb
SQUARE_KEPT = 0.99  # how much of the average of squares is kept from step to step


@final
class PlaneSearch(PlaneOptimizer):
    """Search in a plane of remembered and drawn directions: no learning rate, nothing to be tuned.

        kappa = -M F,    theta <- theta + rate * sum_k kappa_k v_k

    with F the slope and M the damped inverse of the Gauss-Newton matrix of the plane, both of this batch. The plane
    is spanned by

    - running averages of gradient estimates from earlier batches: with ``model``, by noise on its layers'
      outputs (`jetplane.activity`), else the forward gradients ``mean_k (F_k v_k)`` of the drawn directions;
    - the same averages, each entry over the root of its running mean square (``scaled``), as Adam's steps are;
    - the previous step;
    - ``k`` directions drawn anew;
    - whatever ``guess`` returns.

    The rate is what of the step is not noise, by the spread of the examples' slopes, and a step after which this
    batch's loss is higher is halved (`jetplane.search.NoiseAware`).
    Estimates enter the plane one step after the batch that they come from: in a plane of directions that were
    fitted to the very batch that judges them, the slope would be biased, and its noise taken for signal.

    Where the loss does not tell its examples apart, the step is halved until the loss falls, by more passes. With
    as many directions as parameters (``k``) the plane is the whole space, and this is (Gauss-)Newton's method.

    Args:
        params: parameters or groups of them, as for any torch optimizer. Groups may set ``lr`` (a factor on the
            step, 1 unless ``rate`` is a number; with unlike factors the step is not the plane's solution, and may be
            refused) and ``weight_decay``. Frozen parameters are left alone.
        model: holds the layers to perturb. The closure is called several times a step and must compute the same
            each time; what it writes to buffers, and torch's random numbers, move once.
        k: directions to draw; by default 0 with a model (one, until there is something to remember), without one
            64, or as many as there are parameters.
        curvature: "ggn", which needs a loss function (see `jetplane.evaluate`), or "hessian".
        tangents: structure of the drawn directions, "rank-one" or "dense"; see `jetplane.Directions`.
        rate: "auto" as above, a number for steps of that part, or a `jetplane.search.Search`.
        descent: what solves the plane, a `jetplane.descent.Spectral` or its name. By default
            `jetplane.descent.Damped` on directions of unit curvature for "ggn", and for "hessian"
            `jetplane.descent.SaddleFree`.
        law: of the drawn directions.
        averages: how much of each running average is kept from step to step.
        scaled: whether the averages are in the plane in scaled form as well.
        previous: whether the previous step is in the plane.
        passes: about how many forward passes the estimates by the model's layers cost in a step.
        guess: called before each step; returns a direction, one tensor for each parameter that may move.
        clip: largest Euclidean norm of a step over all parameters, or None.
        weight_decay: decoupled: ``theta <- theta - lr * weight_decay * theta`` beside the step.
        seed: of the directions and the noise. With the averages and the previous step it is part of
            ``state_dict()``, so that training resumes bit for bit.
        chunk: directions to carry at a time, an integer or "auto"; see `jetplane.evaluate`.
        compile: evaluate the plane as one compiled graph (`torch.compile`, ``fullgraph=True``), from the third step
            on, when as many directions are remembered as ever will be. The other passes of a step run eagerly.

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
        *("model", "curvature", "search", "averages", "scaled", "previous", "passes", "guess"),
    )

    def __init__(
        self, params: Params, model: nn.Module | None = None, k: int | None = None, *,
        curvature: Curvature = "ggn", tangents: Structure = "rank-one", rate: str | float | Search = "auto",
        descent: str | Descent | None = None, law: str = "gaussian", averages: Sequence[float] = (0.9, 0.99),
        scaled: bool = True, previous: bool = True, passes: float = 8.0, guess: Guess | None = None,
        clip: float | None = None, weight_decay: float = 0.0, seed: int = 0,
        chunk: Chunk = None, compile: bool = False,
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
        default = Damped(scaled=True) if curvature == "ggn" else SaddleFree(1e-9)
        solver = default if descent is None else named(descent)
        if not isinstance(solver, Spectral):
            raise ArgumentError(f"descent must solve a plane as a whole, which {type(solver).__name__} does not")
        self._descent = solver
        self.model = model
        self.curvature: Curvature = curvature
        self.search: Search = rate if isinstance(rate, Search) else NoiseAware() if rate == "auto" else Whole()
        self.averages = tuple(averages)
        self.scaled = scaled
        self.previous = previous
        self.passes = passes
        self.guess = guess
        lr = rate if isinstance(rate, (int, float)) else 1.0
        super().__init__(
            params, lr, k or 1, law, tangents, clip=clip, weight_decay=weight_decay, seed=seed, chunk=chunk,
            compile=compile,
        )  # fmt: skip
        if k is None:
            k = 0 if model is not None else min(DRAWN, sum(p.numel() for p, _, _ in self._moving()))
        self.k = k

    @property
    def descent(self) -> Spectral:
        """What solves the plane."""
        return self._descent

    # --- the plane ---------------------------------------------------------------------------------------

    def _directions(self, moving: Moving, closure: Closure) -> HeldDirections:
        params, places = [p for p, _, _ in moving], [place for _, _, place in moving]
        size = sum(p.numel() for p in params)
        stored = self._stored(moving)[: size - self.k]  # more directions than parameters would be dependent
        sources: list[AbstractDirections] = []
        if stored:
            together = zip(places, zip(*stored, strict=True), strict=True)
            sources.append(StoredDirections({place: torch.stack(tensors) for place, tensors in together}))
        if self.k == size:
            sources.append(StoredDirections(dict(zip(places, _coordinates(params), strict=True))))
        elif self.k or not stored:
            own = self.state[STATE]  # type: ignore[index]
            drawn = Directions(self.k or 1, self.law, self.tangents, own["seed"])
            drawn.step = own["step"]
            sources.append(drawn)
        return HeldDirections(MixedDirections(sources), params, places, KEPT)

    def _stored(self, moving: Moving) -> list[list[Tensor]]:
        """What is known, as directions of norm one: for each a tensor for each parameter."""
        found = [] if self.guess is None else [_checked_guess(self.guess(), moving)]
        states = [(p, self.state[p]) for p, _, _ in moving]
        averages = [AVERAGE.format(b) for b in self.averages]
        for name in (*averages, *([PREVIOUS] if self.previous else [])):
            if any(name in state for _, state in states):
                found.append([state[name] if name in state else torch.zeros_like(p) for p, state in states])
        for name in averages if any(SQUARE in state for _, state in states) else ():
            found.append(
                [_scaled(state[name], state[SQUARE]) if name in state else torch.zeros_like(p) for p, state in states]
            )
        norms = [_norm(tensors) for tensors in found]
        return [[t / norm for t in tensors] for tensors, norm in zip(found, norms, strict=True) if norm > 0]

    _random: RandomState  # where random numbers stood before the evaluation of this step

    def _evaluate(self, closure: Closure, params: list[Tensor], directions: AbstractDirections) -> PlaneModel:
        self._random = random_state()
        return self._plane(closure, params, directions, self.curvature, examples=self.search.examples)

    # --- the step ----------------------------------------------------------------------------------------

    def _advance(
        self, closure: Closure, moving: Moving, directions: AbstractDirections, plane: PlaneModel
    ) -> dict[str, Any]:
        own = self.state[STATE]  # type: ignore[index]
        params = [p for p, _, _ in moving]
        assert plane.curvature is not None
        inverse = self.descent.inverse(plane.curvature)
        steps = list(self._steps(moving, directions, plane, -(inverse @ plane.slope.double())))

        def loss_at(rate: float) -> float:
            with _moved(rate, params, steps), rehearsal(self._random):
                return float(closure())

        proposal = Proposal(plane.value.item(), plane.slope, inverse, plane.examples, loss_at)
        rate, record = self.search(proposal, own.get("search", {}))
        changed: dict[str, Any] = {"search": record}
        found, shares = self._estimates(closure, params, directions, plane.slope)
        changed["shares"] = {name: tuple(share) for name, share in shares.items()}  # plain, for checkpoints
        steps = [(i, rate * step) for i, step in steps]
        self._move(moving, steps)
        self._remember(params, found, steps)
        return changed

    def _estimates(
        self, closure: Closure, params: list[Tensor], directions: AbstractDirections, slope: Tensor
    ) -> tuple[list[Tensor], dict[str, Share]]:
        """Estimates of the gradient from this batch, for the planes of later ones, and what the layers' shares are."""
        if not self.averages:
            return [], {}
        own = self.state[STATE]  # type: ignore[index]
        if self.model is not None:
            shares = {name: Share(*share) for name, share in own.get("shares", {}).items()}
            shares = shares or allot(closure, self.model, params, self.passes)
            return estimate(closure, self.model, params, shares, int(key(own["seed"], own["step"]))), shares
        # The drawn directions, of which there are k at the end, give mean_k (F_k v_k).
        weights = torch.cat([slope.new_zeros(len(slope) - self.k), slope[-self.k :] / self.k])
        assert isinstance(directions, HeldDirections)
        used = directions.used
        found = [directions.combine(i, p, weights) if i in used else torch.zeros_like(p) for i, p in enumerate(params)]
        return found, {}

    def _remember(self, params: list[Tensor], found: list[Tensor], steps: list[tuple[int, Tensor]]) -> None:
        if self.previous and any(bool(step.any()) for _, step in steps):
            for i, step in steps:
                self.state[params[i]][PREVIOUS] = step
        for p, estimated in zip(params, found, strict=False):  # there are none without averages
            state, new = self.state[p], {AVERAGE.format(b): (b, estimated) for b in self.averages}
            if self.scaled:
                new[SQUARE] = SQUARE_KEPT, estimated * estimated
            for name, (b, value) in new.items():
                state[name] = b * state[name] + (1 - b) * value if name in state else value


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


def _scaled(average: Tensor, square: Tensor) -> Tensor:
    """``average / sqrt(square)``; where nothing was ever estimated, zero."""
    return average * torch.where(square > 0, square, 1).rsqrt()


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
