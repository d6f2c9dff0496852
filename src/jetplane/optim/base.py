"""What optimizers that draw directions share: directions, plane, coefficients, step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import _sharding as sharded
from ..directions import AbstractDirections, CachedDirections, Directions, Structure, as_real
from ..errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    JetplaneWarning,
    NonFiniteError,
    RescueWarning,
    ShapeError,
    warn_user,
)
from ..evaluation.api import evaluate, evaluate_plane
from ..evaluation.audit import Auditing, audit, identity, still_cut_off
from ..evaluation.checks import CACHED_BYTES, as_directions, checked_finite
from ..evaluation.inputs import INPUTS_OF_ONE, in_span
from ..evaluation.plane import PlaneModel
from ..evaluation.repeats import RepeatedClosure
from ..evaluation.side_effects import setting_back
from ..evaluation.specification import Chunk, Pairs, PlaneSpec
from ..jets import Deferred, Partial, Stacked, times_detached
from ..parallel.ranks import Ranks
from ..rules.examples import checked
from ..subspace.descent import Descent
from ..subspace.search import clipped
from .arguments import Checked, as_groups, check_clip, check_group, check_rate

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Moving = list[tuple[Tensor, dict[str, Any], int]]  # parameters that may move, their groups and places
Closure = Callable[[], Any]
ALL = 1 - 1e-9  # what the part of the processes that say so exceeds, if all do
FAR_BELOW = 1e6  # times the size of the first loss: a negative loss beyond it runs away
STATE = "jetplane"  # where an optimizer's own state lies among that of the parameters


class PlaneOptimizer(torch.optim.Optimizer, metaclass=Checked):
    """Shared part of the optimizers that draw directions; see its subclasses.

    Attributes:
        plane: the `PlaneModel` of the last step, or None before the first.
        ranks: the processes that step together (`jetplane.parallel.ranks.Ranks`), or None.
    """

    ranks: Ranks | None = None
    chunk: Chunk = None
    compile: bool = False
    generators: tuple[Any, ...] = ()
    _looked_at: Any = None  # the closure that was looked at last, as audits tell closures apart
    _cut_off: frozenset[int] = frozenset()  # identities of parameters that no derivative reaches
    _stops = False  # whether the closure that was looked at calls detach()
    _first: float | None = None  # the loss of the first step
    # What a copy needs beside what every torch optimizer has.
    _own: tuple[str, ...] = (
        "k", "law", "tangents", "planes", "clip", "chunk", "compile", "plane", "_descent", "audit"
    )  # fmt: skip

    def __init__(
        self, params: Params, lr: float, k: int, law: str = "gaussian", tangents: Structure = "dense",
        planes: int = 1, clip: float | None = None, weight_decay: float = 0.0, seed: int = 0,
        chunk: Chunk = None, compile: bool = False, process_group: Any = None,
        rank: int | None = None, density: float | None = None,
        audit: Auditing = "first", generators: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            check_rate(name, value)
        check_clip(clip)
        if isinstance(planes, bool) or not isinstance(planes, int) or planes < 1:
            raise ArgumentError(f"planes must be an integer of at least 1, got {planes!r}")
        Directions(k, law, "dense" if tangents == "inputs" else tangents, seed, rank=rank, density=density)  # checks
        if tangents == "inputs" and process_group is not None:
            raise ArgumentError(INPUTS_OF_ONE)
        if not -(2**63) <= seed < 2**63:  # generators and states of optimizers hold no more
            raise ArgumentError(f"seed must be an integer of 64 bits, got {seed}")
        if audit not in ("first", "always", "never"):
            raise ArgumentError(f"audit must be 'first', 'always' or 'never', got {audit!r}")
        with setting_back(generators):  # checks them
            pass
        if compile and chunk is not None:
            raise ArgumentError("chunk= and compile=True exclude each other: a chunked step is several runs")
        super().__init__(as_groups(params, type(self).__name__), {"lr": lr, "weight_decay": weight_decay})
        self.k = k
        self.law = law
        self.tangents: Structure = tangents
        self.chunk = chunk
        self.planes = planes
        self.clip = clip
        self.compile = compile
        self.audit: Auditing = audit
        self.generators = tuple(generators)
        self.plane: PlaneModel | None = None
        self.ranks = None if process_group is None else Ranks(process_group)
        if compile and self.ranks is not None and self.ranks.parts > 1:
            raise ArgumentError(
                "compile=True is not supported where ranks share directions; use it with ranks that share only the data"
            )
        self._record({"seed": seed, "step": 0})
        self._check_size(self._moving())
        self._check_sharding(p for p, _, _ in self._moving())

    _takes_complex = True  # as two real ones
    _options: tuple[str, ...] = ("lr", "weight_decay")  # of a group

    # Of compiled steps: the program, for how many directions of which parameters, and those that the loss uses.
    _program: Any = None
    _known: tuple[int, frozenset[int]] = 0, frozenset()
    _used: frozenset[int] = frozenset()

    @property
    @abstractmethod
    def descent(self) -> Descent:
        """The rule that turns the plane model into a step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer` does.

        Raises:
            DTypeError: a parameter that may move is of a complex dtype, which this optimizer does not take, or none of
                the group is of a dtype that can move.
            DeviceError: parameters that may move lie on different devices. Frozen ones may lie anywhere.
            ArgumentError: a rate of the group is negative, the group has an option that this optimizer would ignore,
                its parameters are no tensors, are not leaves or are given more than once, are sharded in an unsupported
                way, were made under `torch.inference_mode`, or have no shape yet.
        """
        param_group = dict(param_group) if isinstance(param_group, dict) else param_group
        earlier = [p for group in self.param_groups for p in group["params"]]
        check_group(param_group, earlier, type(self), self._options)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for name in ("lr", "weight_decay"):
                check_rate(name, group[name])
            self._check_sharding(group["params"])
            if group["params"] and all(not (p.dtype.is_floating_point or p.dtype.is_complex) for p in group["params"]):
                raise DTypeError(f"none of a group's parameters can move: their dtypes are {_dtypes(group['params'])}")
            self._check_moving([p for p, _, _ in self._moving()])
        except Exception:  # whatever is wrong with the group: it is not kept
            self.param_groups.pop()
            raise

    def _check_moving(self, params: Sequence[Tensor]) -> None:
        """Parameters that may move: frozen ones may be of any kind, but can be unfrozen between steps."""
        for p in params:
            if not (p.dtype.is_floating_point or (self._takes_complex and p.dtype.is_complex)):
                remedy = ""
                if p.dtype.is_complex:
                    remedy = "; let torch.view_as_real(p) be the parameter, and take torch.view_as_complex of it"
                raise DTypeError(f"{type(self).__name__}: expected a real floating dtype, got {p.dtype}{remedy}")
            if is_lazy(p):
                raise ArgumentError(
                    "a parameter of a lazy module has no shape yet: run one batch through the model before you make "
                    "the optimizer"
                )
            if p.is_inference():
                raise ArgumentError(
                    f"a parameter of shape {tuple(p.shape)} was made under torch.inference_mode() and cannot be "
                    "written to outside of it: make the model outside, or clone() its parameters there"
                )
        devices = {p.device for p in params}
        if len(devices) > 1:
            raise DeviceError(f"parameters must lie on one device, got {sorted(map(str, devices))}")
        if torch.device("meta") in devices:
            raise ArgumentError(
                "parameters are on the meta device and have no values: materialize the model (to_empty, then "
                "load_state_dict or an initialization) before it is trained"
            )

    def step(self, closure: Closure | None = None, *, weight: float = 1.0) -> Tensor:  # type: ignore[override]
        """Evaluate the closure once on a fresh plane and move the parameters.

        Args:
            closure: computes and returns the scalar loss. It must not call ``backward``.
            weight: with a process group: the weight of this rank's loss in the mean over ranks, that is the number
                of its examples if the loss is a mean over them. It may be left out if all ranks have the same number
                of examples. A rank without examples gives 0; its closure is not called.

        Returns:
            The loss before the step, a plain tensor of shape (). With a process group, that of the whole batch.

        Raises:
            ArgumentError: no closure, or no parameter that requires gradients.
            LossError, UnusedParametersError, NonFiniteError, DerivativeError: as `jetplane.evaluate`.
            AuditError: the slope is not that of the loss; see `jetplane.audit`.
            RandomClosureError: several runs of the closure give different losses at the same parameters.
            SingularPlaneError: the curvature of the plane determines no step.
            HandshakeError, RanksDifferError, LostRankError, RemoteError: with a process group; see
                `jetplane.parallel.ranks.Ranks.evaluate`. An error of one rank is raised on all of them.

        If an error is raised, the parameters and the optimizer's state do not change.
        """
        repeated, moving = self._started(closure, weight)
        with torch.no_grad(), setting_back(self.generators):
            directions = self._directions(moving, repeated)
            plane = self._evaluated(repeated, weight, moving, directions)
            changed = self._advance(repeated, weight, moving, directions, plane)
        self.plane = plane
        # A new record: one that state_dict() has handed out must not move on.
        own = self.state[STATE]  # type: ignore[index]
        self.state[STATE] = own | changed | {"step": own["step"] + 1}  # type: ignore[index]
        return plane.value

    def _started(self, closure: Closure | None, weight: float) -> tuple[RepeatedClosure, Moving]:
        """The closure and the parameters of a step, checked; the closure's losses will be held against each other.

        Parameters that no derivative reaches are left out: along them a plane has neither slope nor curvature.
        """
        if closure is None:
            raise ArgumentError("step() needs a closure that returns the loss: this optimizer does not read gradients")
        if not callable(closure):
            raise ArgumentError(
                f"step() needs a closure, a function that computes the loss, got {type(closure).__name__}: write "
                "opt.step(lambda: loss_function(model(x), y))"
            )
        check_rate("weight, this process's part of the mean", weight)
        moving = self._moving()
        if not moving:
            raise ArgumentError(
                "no parameter requires gradients, so the optimizer cannot move any; unfreeze some of them"
            )
        params = [p for p, _, _ in moving]
        self._check_moving(params)
        self._check_size(moving)
        with torch.no_grad(), setting_back(self.generators):
            self._look_at(closure, params, weight)
        reached = [found for found in moving if id(found[0]) not in self._cut_off]
        self._check_size(reached)
        return RepeatedClosure(closure, [p for p, _, _ in reached]), reached

    def _look_at(self, closure: Closure, params: list[Tensor], weight: float) -> None:
        """Learn what holds for many steps of a closure: with several processes once, since all must know the same."""
        kind = self._kind(closure)
        new = self._looked_at is None or (self.ranks is None and kind != self._looked_at)
        if self.ranks is not None:
            self.ranks.greet(self._facts)
        if new or self.audit == "always" or (self._cut_off and not self._still_cut_off(closure, params, weight)):
            self._inspect(closure, params, weight)
            self._looked_at = kind

    def _kind(self, closure: Closure) -> Any:
        """What is learnt about a closure holds for."""
        return identity(closure, [p for p, _, _ in self._moving()], getattr(self, "model", None))

    def _inspect(self, closure: Closure, params: list[Tensor], weight: float) -> None:
        """Learn about a new closure: audit it, and find the parameters that no derivative reaches."""

        def told() -> list[bool]:
            found = set(self._audit(closure, params))
            return [i in found for i in range(len(params))]

        before = times_detached()
        parts = self._over_ranks(told, len(params), weight)
        cut_off = [i for i, part in enumerate(parts) if part > ALL]
        identities = frozenset(id(params[i]) for i in cut_off)
        if cut_off and identities != self._cut_off:
            names = self._names(params)
            warn_user(
                f"no derivative of the loss reaches {', '.join(names[i] for i in cut_off)}: detach() or the like cuts "
                "off what is made of them. They are left as they are; requires_grad_(False) says that this is meant, "
                "and saves looking again in each step",
                JetplaneWarning,
            )
        self._cut_off, self._stops = identities, times_detached() != before

    def _still_cut_off(self, closure: Closure, params: list[Tensor], weight: float) -> bool:
        """Whether those that were cut off still are, all of them."""
        places = [i for i, p in enumerate(params) if id(p) in self._cut_off]
        (part,) = self._over_ranks(lambda: [not places or still_cut_off(closure, params, places)], 1, weight)
        return part > ALL

    def _over_ranks(self, work: Callable[[], Sequence[float]], count: int, weight: float) -> list[float]:
        """So many numbers that tell of a closure, as means over all processes."""
        if self.ranks is None:
            return list(work())
        options: dict[str, Any] = {"dtype": torch.float64, "device": self._moving()[0][0].device}
        return self.ranks.mean(lambda: torch.tensor(work(), **options), count, weight, **options).tolist()

    def _evaluated(self, closure: Closure, weight: float, moving: Moving, directions: AbstractDirections) -> PlaneModel:
        """The plane of the whole batch."""
        params, spec = [p for p, _, _ in moving], self._spec(directions)
        if self.ranks is None:
            before = times_detached()
            plane = self._evaluate(closure, params, directions, spec)
            if not self._stops and times_detached() != before:
                self._looked_at = None  # it has begun to stop derivatives: the next step looks at it anew
            self._watch(plane.value.item())
            return plane
        return self.ranks.evaluate(
            closure, lambda part: self._evaluate(closure, params, part, spec.restricted(part.k)), directions,
            spec, params, self._progress(), self._facts, weight, self._held(moving),
        )  # fmt: skip

    def _watch(self, loss: float) -> None:
        """Warn once of a loss that has fallen far below zero."""
        self._first = loss if self._first is None else self._first
        if loss < -FAR_BELOW * max(1.0, abs(self._first)):
            warn_user(
                f"the loss has fallen from {self._first:.3g} to {loss:.3g}: it may have no least value, as a "
                "likelihood whose variance goes to zero, or have the wrong sign. Bound what runs away",
                RescueWarning,
            )
            self._first = -math.inf

    def _advance(
        self, closure: Closure, weight: float, moving: Moving, directions: AbstractDirections, plane: PlaneModel
    ) -> dict[str, Any]:
        """Move the parameters.

        Returns:
            What has changed of the optimizer's own state.
        """
        self._move(moving, self._steps(moving, directions, plane, self._coefficients(plane)))
        return {}

    def _check_size(self, moving: Moving) -> None:
        size = sum(as_real(p).numel() for p, _, _ in moving)
        if self.k > size:
            frozen = "" if size else ": none of the tensors requires grad; call requires_grad_() on those that may move"
            raise ArgumentError(
                f"k = {self.k} directions exceed the number of parameters that may move, {size}{frozen}"
            )

    def _check_sharding(self, params: Iterable[Tensor]) -> None:
        for p in params:
            without = self._without_sharding()
            if without:
                sharded.refuse([p], without)
            sharded.part_of(p)  # there is one

    def _without_sharding(self) -> str:
        """What these settings ask for that models which are sharded cannot have."""
        if self.compile:
            return "compile=True"
        if self.chunk == "auto":
            return 'chunk="auto"'
        return "shares of the directions" if self.ranks is not None and self.ranks.parts > 1 else ""

    def _moving(self) -> Moving:
        """Parameters that may move, each with its group and its place among all."""
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        return [(p, group, i) for i, (p, group) in enumerate(every) if p.requires_grad]

    def _directions(self, moving: Moving, closure: Closure) -> AbstractDirections:
        """What spans the plane of this step."""
        own = self.state[STATE]  # type: ignore[index]
        params, places = [p for p, _, _ in moving], [i for _, _, i in moving]
        k, law, seed, step = self.k * self.planes, self.law, own["seed"], own["step"]
        if self.tangents == "inputs":
            return CachedDirections(in_span(k, law, seed, step, closure, params, places), params, places, CACHED_BYTES)
        directions = Directions(k, law, self.tangents, seed)
        directions.step = step
        return CachedDirections(directions, params, places, CACHED_BYTES)

    def _spec(self, directions: AbstractDirections) -> PlaneSpec:
        """The plane that the descent needs on these directions."""
        needs = self.descent.needs
        pairs: Pairs = self.k if needs == "all" and self.planes > 1 else "all" if needs == "all" else "diagonal"
        return PlaneSpec(directions.k, "none" if needs == "none" else "hessian", pairs, chunk=self.chunk)

    def _progress(self) -> dict[str, Any]:
        """What beside parameters must be the same on all ranks in every step."""
        own = self.state[STATE]  # type: ignore[index]
        names = [n for n in ("lr", "weight_decay", "momentum") if n in self.defaults]
        rates = {n: [float(g[n]) for g in self.param_groups] for n in names}
        return dict(sorted((own | rates).items()))

    def _held(self, moving: Moving) -> dict[str, Tensor]:
        """Tensors beside parameters that must be the same on all ranks in every step, and their names."""
        states = ((place, self.state.get(p, {})) for p, _, place in moving)
        every = ((f"{name} of parameter {place}", t) for place, state in states for name, t in state.items())
        return {name: t for name, t in every if isinstance(t, Tensor)}

    def _facts(self) -> dict[str, Any]:
        """What must be the same on all ranks at the start."""
        every = [p for group in self.param_groups for p in group["params"]]
        apart = (
            "chunk",
            "compile",
            "plane",
            "_descent",
            "_given",
            "_settled",
        )  # of no consequence to others, or said otherwise
        named = {n: comparable(getattr(self, n)) for n in self._own if n not in apart}
        return {
            "optimizer": type(self).__name__,
            "descent": comparable(self.descent),
            **named,
            **self._progress(),
            "number of parameters": sum(p.numel() for p in every),
            "device": every[0].device.type,
            **{f"parameter {i}": f"{p.dtype}{list(p.shape)}"[6:] for i, p in enumerate(every)},
        }

    def _evaluate(
        self, closure: Closure, params: list[Tensor], directions: AbstractDirections, spec: PlaneSpec
    ) -> PlaneModel:
        """The plane, by a compiled program where there is one."""
        plain = closure.closure if isinstance(closure, RepeatedClosure) else closure
        if self.ranks is not None and (kind := self._kind(plain)) != self._looked_at:
            self._audit(plain, [p for p, _, _ in self._moving()])
            self._looked_at = kind
        known = spec.k, frozenset(id(p) for p in params)
        if not self.compile or known != self._known:
            plane = evaluate_plane(closure, params, as_directions(params, directions), spec)
            if self.compile and isinstance(directions, CachedDirections):  # an eager step shows what the loss uses
                self._known, self._used = known, frozenset(id(params[i]) for i in directions.used)
            return plane
        if self._program is None:
            self._program = torch.compile(evaluate, fullgraph=True)
        used = [i for i, p in enumerate(params) if id(p) in self._used]
        along = [directions.structured(i, params[i]) for i in used]
        along = [t.materialized() if isinstance(t, (Deferred, Stacked, Partial)) else t for t in along]
        moved = [params[i] for i in used]
        plane = checked_finite(self._program(plain, moved, along, spec.curvature, spec.pairs, examples=spec.examples))
        return replace(plane, examples=checked(plane.examples, plane.slope))

    def _audit(self, closure: Closure, params: list[Tensor]) -> tuple[int, ...]:
        """Audit a closure; the places of the parameters that no derivative reaches."""
        if self.audit == "never" or any(map(sharded.is_sharded, params)):
            return ()
        report = audit(closure, params, names=self._names(params), seed=self.state[STATE]["seed"])  # type: ignore[index]
        report.check()
        return report.cut_off

    def _names(self, params: Sequence[Tensor]) -> list[str]:
        """What to call parameters: as they were named, or by place and shape."""
        named = {}
        for group in self.param_groups:
            known = group.get("param_names", [None] * len(group["params"]))
            named |= {id(p): name for p, name in zip(group["params"], known, strict=True)}
        return [
            repr(named.get(id(p))) if named.get(id(p)) else f"parameter {i} of shape {tuple(p.shape)}"
            for i, p in enumerate(params)
        ]

    def _coefficients(self, plane: PlaneModel) -> Tensor:
        slope = plane.slope
        if self.planes > 1 and self.descent.needs == "all":
            slope = slope.reshape(self.planes, self.k)
        return self.descent(slope, plane.curvature).flatten()

    def _steps(
        self, moving: Moving, directions: AbstractDirections, plane: PlaneModel, kappa: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """``lr * sum_k kappa_k v_k``, clipped, of each parameter that the loss uses, by its place in `moving`."""
        steps = self._unclipped(moving, directions, plane, kappa)
        if self.clip is None:
            return steps
        used, tensors = zip(*steps, strict=True)
        params = [moving[i][0] for i in used]
        norm = sharded.joint_norm(tensors, params) if any(map(sharded.is_sharded, params)) else None
        if any(p.is_complex() for p in params):
            norm = torch.stack([as_real(t).double().norm() for t in tensors]).norm()
        return zip(used, clipped(tensors, self.clip, norm), strict=True)

    def _unclipped(
        self, moving: Moving, directions: AbstractDirections, plane: PlaneModel, kappa: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """The same without clipping.

        Raises:
            NonFiniteError: NaN or infinity in the coefficients.
        """
        if not bool(torch.isfinite(kappa.float()).all()):
            raise NonFiniteError(
                f"the step is not finite, with slope {plane.slope} and curvature {plane.curvature}; try a smaller lr"
            )
        used = sorted(directions.used) if isinstance(directions, CachedDirections) else range(len(moving))
        return ((i, directions.combine(i, moving[i][0], moving[i][1]["lr"] * kappa)) for i in used)

    def _move(self, moving: Moving, steps: Iterable[tuple[int, Tensor]]) -> None:
        """``theta <- theta - lr * weight_decay * theta + step``.

        Parameters that the loss makes no use of are left alone, as those without ``.grad`` are in torch.
        """
        for i, step in steps:
            p, group = sharded.local(moving[i][0]), moving[i][1]
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step)

    def __getstate__(self) -> dict[str, Any]:
        if self.ranks is not None:
            raise ArgumentError("an optimizer with a process group cannot be copied; state_dict() can")
        # torch keeps the groups and the state alone, which a copy could not step with.
        own = {name: value for name, value in vars(self).items() if name in self._own}
        return super().__getstate__() | own  # type: ignore[misc]

    def _record(self, own: dict[str, Any]) -> None:
        """Begin with this state of the optimizer itself."""
        self.state[STATE] = own  # type: ignore[index]
        self.param_groups[0][STATE] = None  # where state_dict() has it, for whoever looks up what groups have

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any torch optimizer; the first group also holds the seed, the step counter and the like.

        `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` keeps what is in a group, but drops any
        other state that does not belong to a parameter.
        """
        found = super().state_dict()
        state, groups = dict(found["state"]), [dict(group) for group in found["param_groups"]]
        own = state.pop(STATE)
        kept = sorted({name for of_parameter in state.values() for name in of_parameter})
        groups[0][STATE] = own | {"kept": kept, "shapes": self._shapes()}
        return found | {"state": state, "param_groups": groups}

    def _shapes(self) -> list[list[int]]:
        return [list(p.shape) for group in self.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, including seed and step counter, so that training continues bit for bit.

        Raises:
            ShapeError: the state belongs to other parameters or groups, or to another optimizer, or is incomplete.
        """
        groups, state = state_dict.get("param_groups", []), dict(state_dict.get("state", {}))
        before = state.pop(STATE, None)  # where it lay at first
        own = next((group[STATE] for group in groups if group.get(STATE)), before)
        if own is None:
            raise ShapeError("expected the state_dict of a Jetplane optimizer, got another state")
        own = dict(own)
        lost = set(own.pop("kept", ())) - {name for of_parameter in state.values() for name in of_parameter}
        if lost:
            raise ShapeError(
                f"this state lacks per-parameter entries of the optimizer: {', '.join(sorted(lost))}. Flattened "
                "state dicts lose them; save with flatten_optimizer_state_dict=False"
            )
        shapes = own.pop("shapes", None)
        if shapes is not None and len(shapes) == len(self._shapes()):  # torch tells where their numbers differ
            for i, (saved, here) in enumerate(zip(shapes, self._shapes(), strict=True)):
                if list(saved) != here:
                    raise ShapeError(
                        f"the state belongs to another model: parameter {i} had shape {tuple(saved)} when it was "
                        f"saved, and has {tuple(here)} here; make the optimizer with the model that was saved with it"
                    )
        plain = [{name: value for name, value in group.items() if name != STATE} for group in groups]
        try:
            super().load_state_dict(state_dict | {"state": state, "param_groups": plain})
        except ValueError as error:
            raise ShapeError(f"the state belongs to other parameters: {error}") from error
        self._record(own)


def comparable(value: Any) -> Any:
    """What of a setting can be compared over ranks."""
    if value is None or isinstance(value, (bool, int, float, str, tuple)):
        return value
    return repr(value) if is_dataclass(value) else type(value).__name__


def _dtypes(params: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(p.dtype) for p in params}))
