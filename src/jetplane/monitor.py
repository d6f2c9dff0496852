"""Slope and curvature along the steps that any torch optimizer takes, while it trains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from .directions import StoredDirections
from .errors import ArgumentError, SingularPlaneError
from .evaluation.api import evaluate_plane
from .evaluation.audit import audit
from .evaluation.side_effects import setting_back, without_side_effects
from .evaluation.specification import Chunk, Curvature, PlaneSpec
from .subspace.descent import SaddleFree

Direction = Literal["step", "previous", "gradient"]
DIRECTIONS: tuple[Direction, ...] = ("step", "previous", "gradient")


@dataclass(frozen=True)
class CurvatureReading:
    """The loss to second order along a step of the optimizer, at the parameters before the step.

    Attributes:
        step: number of the step, from 1.
        value: loss of the closure before the step.
        rate: the ``lr`` of the optimizer's first parameter group that has parameters; None if it has none. If groups
            have different rates, critical rates are multiples of this one: all rates are scaled alike.
        directions: "step", and the other requested directions that are available: "previous", "gradient". K of them.
        norms: their Euclidean norms, (K,), in float64 like all tensors below.
        slope: ``F_k = grad(L) . v_k``, (K,).
        curvature: ``H_kl = v_k^T Hess(L) v_l``, (K, K); None if only "ggn" was requested.
        gauss_newton: ``v_k^T G v_l`` with the Gauss-Newton matrix G, (K, K); None if it was not requested.
        covariance: covariance of the slope of a random batch, (K, K); None if the examples' parts are not known.
    """

    step: int
    value: float
    rate: float | None
    directions: tuple[str, ...]
    norms: Tensor
    slope: Tensor
    curvature: Tensor | None
    gauss_newton: Tensor | None
    covariance: Tensor | None

    @property
    def _model(self) -> Tensor:
        """The curvature that the plane is solved with: the exact one where it is there."""
        found = self.curvature if self.curvature is not None else self.gauss_newton
        assert found is not None
        return found

    @property
    def sharpness(self) -> float:
        """Curvature along the normalized step, ``v^T Hess(L) v / |v|^2``; that of G if only G was requested."""
        return _ratio(self._model[0, 0].item(), self.norms[0].item() ** 2)

    @property
    def best_factor(self) -> float:
        """Minimum along the step in the quadratic model, in multiples of the step; infinite without curvature."""
        bend = self._model[0, 0].item()
        return -self.slope[0].item() / bend if bend > 0 else math.inf

    @property
    def critical_factor(self) -> float:
        """Multiple of the step beyond which the loss rises in the quadratic model: 2 `best_factor`."""
        return 2 * self.best_factor

    @property
    def critical_rate(self) -> float:
        """The rate beyond which the loss rises along this direction, in the quadratic model.

        For gradient descent it is ``2 / curvature`` along the normalized gradient: training at this rate is at the
        edge of stability. For other optimizers it is 2 over the curvature along the direction that the rate scales.
        """
        return math.nan if self.rate is None else self.rate * self.critical_factor

    @property
    def noise_share(self) -> float:
        """Expected share of the noise of the batch in the squared slope along the step; at most 1.

        NaN if the examples' parts are not known.
        """
        if self.covariance is None:
            return math.nan
        return min(1.0, _ratio(self.covariance[0, 0].item(), self.slope[0].item() ** 2))

    @property
    def plane_step(self) -> Tensor:
        """Coefficients (K,) of the Newton step in the plane of the unscaled directions: ``-|H|^-1 F``.

        With one direction it is `best_factor` for the absolute curvature.

        Raises:
            SingularPlaneError: there is no curvature at all.
        """
        lengths = torch.where(self.norms > 0, self.norms, 1)
        h = self._model / lengths / lengths.unsqueeze(1)
        return SaddleFree()(self.slope / lengths, h) / lengths

    def scalars(self) -> dict[str, float]:
        """The numbers of the reading by name, for TensorBoard and other trackers."""
        found = {
            "loss": self.value, "slope": self.slope[0].item(), "sharpness": self.sharpness,
            "step_length": self.norms[0].item(), "best_factor": self.best_factor,
            "critical_rate": self.critical_rate, "noise_share": self.noise_share,
        }  # fmt: skip
        if self.rate is not None:
            found["rate"] = self.rate
        if self.gauss_newton is not None:
            found["gauss_newton_sharpness"] = _ratio(self.gauss_newton[0, 0].item(), self.norms[0].item() ** 2)
        with contextlib.suppress(SingularPlaneError):
            found |= {
                f"plane_step/{name}": x for name, x in zip(self.directions, self.plane_step.tolist(), strict=True)
            }
        return found


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


@final
class CurvatureMonitor:
    """Measure slope and curvature along every n-th step of an optimizer, without disturbing the training.

    Any `torch.optim.Optimizer` may take the step. One evaluation at the parameters before the step v gives
    ``F = grad(L) . v``, ``H = v^T Hess(L) v``, and how much of F is noise. It costs about three forward passes for an
    MLP or CNN and five for a transformer, and needs the memory of inference plus two copies of the parameters.
    Afterwards parameters, gradients, buffers, random states and the optimizer's state are the same, bit for bit, as
    without the monitor.

    Do not use it to choose the rate of each step. The rate that is best on a step's own batch is greedy: with it, an
    MLP on MNIST along Adam's direction has 85.9 % after 15 s, where Adam has 97.9 %.

    Args:
        optimizer: the optimizer whose steps are measured. It gets two hooks, which `close` removes; nothing else of it
            changes.
        closure: returns the scalar loss, of the batch of the step or of a fixed batch, without calling ``backward``.
            It is called within ``optimizer.step()``, so it may refer to variables of a training loop.
        every: measure the first step and then one step in every ``every``.
        directions: "step", and optionally "previous" (the step before it) and "gradient" (the parameters' ``grad``
            after the step). K of them cost (K + 1)^2 forward passes with exact curvature, 1 + 2 K with "ggn", and as
            many copies.
        curvature: "hessian" for exact curvature; "ggn" for Gauss-Newton curvature, which needs one of torch's losses;
            or "both", at the sum of their costs.
        writer: an object with ``add_scalar(name, value, step)``, such as `torch.utils.tensorboard.SummaryWriter`.
        report: called with each `CurvatureReading`.
        prefix: prefix of the names that the writer gets.
        chunk: directions carried at a time; see `jetplane.evaluate`.
        audit: "first" compares the slope of the closure with differences of its loss before the first reading, at the
            cost of five to nine forward passes; "never" does not. See `jetplane.audit`.
        generators: random generators that the closure uses besides torch's own; see `jetplane.evaluate`.

    Attributes:
        readings: all `CurvatureReading`s so far.
        steps: how many steps the optimizer has taken.

    Raises:
        ArgumentError: not an optimizer, every < 1, an unknown word, or "step" is not the first direction.
        Others: as `jetplane.evaluate`, from within ``optimizer.step()``, which has then already moved the parameters.

    >>> import torch, jetplane as jp
    >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> loss = lambda: (torch.tensor([1.0, 10.0]) * x**2).sum() / 2
    >>> optimizer = torch.optim.SGD([x], lr=0.1)
    >>> with jp.CurvatureMonitor(optimizer, loss) as monitor:
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         loss().backward()
    ...         optimizer.step()
    >>> first, last = monitor.readings[0], monitor.readings[-1]
    >>> round(first.sharpness, 2), round(last.critical_rate, 2)  # the mean of 1 and 10 by squared gradients; 2 / 1
    (9.91, 2.0)

    Source: of the edge of stability, Cohen et al., arXiv 2103.00065; of the critical rate, found there by a search of
    five to six forward passes, Kalra et al., arXiv 2601.16979.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor], *, every: int = 1,
        directions: Sequence[Direction] = ("step",), curvature: Literal["hessian", "ggn", "both"] = "hessian",
        writer: Any = None, report: Callable[[CurvatureReading], Any] | None = None, prefix: str = "curvature/",
        chunk: Chunk = None, audit: Literal["first", "never"] = "first", generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not callable(closure):
            raise ArgumentError(f"closure must be a function that returns the loss, got {type(closure).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be an integer of at least 1, got {every!r}")
        names = tuple(directions)
        if isinstance(directions, str) or names[:1] != ("step",) or len(set(names)) < len(names) \
                or not set(names) <= set(DIRECTIONS):  # fmt: skip
            raise ArgumentError(
                f"directions must start with 'step'; the others must be among {DIRECTIONS}; got {directions!r}"
            )
        if curvature not in ("hessian", "ggn", "both"):
            raise ArgumentError(f"curvature must be 'hessian', 'ggn' or 'both', got {curvature!r}")
        if audit not in ("first", "never"):
            raise ArgumentError(f"audit must be 'first' or 'never', got {audit!r}")
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise ArgumentError(f"writer must have add_scalar(name, value, step), got {type(writer).__name__}")
        with setting_back(generators):  # checks them
            pass
        self.readings: list[CurvatureReading] = []
        self.steps = 0
        self._optimizer, self._closure, self._every = optimizer, closure, every
        self._names = names
        self._chunk: Chunk = chunk
        self._kinds: tuple[Curvature, ...] = ("hessian", "ggn") if curvature == "both" else (curvature,)
        self._writer, self._report, self._prefix = writer, report, prefix
        self._due_audit, self._generators = audit == "first", tuple(generators)
        self._before: dict[int, Tensor] = {}  # parameters before the step that is being taken, by identity
        self._previous: dict[int, Tensor] = {}  # the last step
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ]

    def close(self) -> None:
        """Stop measuring."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._before, self._previous = {}, {}

    def __enter__(self) -> CurvatureMonitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- around a step ----------------------------------------------------------------------------------------

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    @property
    def _due(self) -> bool:
        return self.steps % self._every == 0

    @property
    def _remembers(self) -> bool:
        """Whether this step is the one before one that is due."""
        return "previous" in self._names and (self.steps + 1) % self._every == 0

    @torch.no_grad()
    def _begin(self) -> None:
        if self._due or self._remembers:
            self._before = {id(p): p.detach().clone() for p in self._params()}

    @torch.no_grad()
    def _end(self) -> None:
        params = [p for p in self._params() if id(p) in self._before]
        step = {id(p): p.detach() - self._before[id(p)] for p in params}
        try:
            if self._due and step:
                self._read(params, step)
        finally:
            self._before = {}
            self._previous = step if self._remembers else {}
            self.steps += 1

    def _read(self, params: list[Tensor], step: dict[int, Tensor]) -> None:
        gradient = {id(p): p.grad.detach() for p in params if p.grad is not None}
        every = {"step": step, "previous": self._previous, "gradient": gradient}
        names = tuple(name for name in self._names if every[name])
        norms = torch.stack([_norm(every[name].values()) for name in names])
        if not norms.isfinite().all() or not norms[0]:
            return  # a step that was skipped, as by a gradient scaler, or that ruined the parameters
        # Of root mean square one, so that nothing underflows in half precision.
        scales = math.sqrt(sum(p.numel() for p in params)) / torch.where(norms > 0, norms, 1)
        tangents = []
        for p in params:
            of_p = [every[name].get(id(p)) for name in names]
            scaled = [p.new_zeros(p.shape) if v is None else v * s for v, s in zip(of_p, scales.tolist(), strict=True)]
            tangents.append(torch.stack(scaled).to(p.dtype))
        with self._at_the_start(params), setting_back(self._generators):
            if self._due_audit:
                audit(self._closure, params, generators=self._generators).check()
                self._due_audit = False
            planes = {}
            for kind in self._kinds:
                spec = PlaneSpec(len(names), kind, examples=True, chunk=self._chunk)
                with without_side_effects():
                    planes[kind] = evaluate_plane(self._closure, params, StoredDirections(tangents), spec)
        plane, curvatures = planes[self._kinds[0]], {kind: found.curvature for kind, found in planes.items()}
        covariance = None if plane.moments is None else plane.moments.covariance
        pairs = scales.outer(scales)

        def back(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else matrix.double().cpu() / pairs

        reading = CurvatureReading(
            step=self.steps + 1, value=plane.value.item(), rate=self._rate(), directions=names, norms=norms,
            slope=plane.slope.double().cpu() / scales, curvature=back(curvatures.get("hessian")),
            gauss_newton=back(curvatures.get("ggn")), covariance=back(covariance),
        )  # fmt: skip
        self.readings.append(reading)
        if self._writer is not None:
            for name, value in reading.scalars().items():
                self._writer.add_scalar(self._prefix + name, value, reading.step)
        if self._report is not None:
            self._report(reading)

    def _rate(self) -> float | None:
        rate = next(group for group in self._optimizer.param_groups if group["params"]).get("lr")
        return None if rate is None else float(rate)

    @contextlib.contextmanager
    def _at_the_start(self, params: list[Tensor]) -> Iterator[None]:
        """Parameters where the step began; they are set back."""
        held = self._before

        def exchange() -> None:
            for p in params:
                now = p.detach().clone()
                p.copy_(held[id(p)])
                held[id(p)] = now

        exchange()
        try:
            yield
        finally:
            exchange()

    # --- what is seen -----------------------------------------------------------------------------------------

    def plot(self, axes: Any) -> None:
        """Plot the edge of stability: the rate and the critical rate over steps.

        Readings without a critical rate are left out: uphill steps, and steps along which the curvature is not
        positive.

        Args:
            axes: matplotlib axes.

        Raises:
            ArgumentError: there is no reading yet, or the optimizer has no rate.
        """
        shown = [r for r in self.readings if r.rate is not None]
        if not shown:
            raise ArgumentError(
                "nothing to plot: expected at least one reading of an optimizer with a learning rate, got none"
            )
        steps = [r.step for r in shown]
        critical = [r.critical_rate if 0 < r.critical_rate < math.inf else math.nan for r in shown]
        axes.plot(steps, critical, ".-", label="2 / curvature along the step", color="C0")
        axes.plot(steps, [r.rate for r in shown], label="rate", color="C1")
        axes.set(yscale="log", xlabel="step", ylabel="rate")
        axes.legend(frameon=False)


def _norm(tensors: Any) -> Tensor:
    return torch.stack([t.double().norm().cpu() for t in tensors]).norm()
