"""One step, wired together: directions, plane, descent, search, update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..descent import Descent
from ..directions import Directions
from ..errors import ArgumentError, DeviceError, DTypeError, ShapeError
from ..plane import PlaneModel, evaluate
from ..search import clipped

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
STATE = "jetplane"  # where an optimizer's own state lies among that of the parameters


class PlaneOptimizer(torch.optim.Optimizer):
    """Shared part of the optimizers that draw directions; see its subclasses.

    Attributes:
        plane: the `PlaneModel` of the last step, or None before the first.
    """

    def __init__(
        self, params: Params, lr: float, k: int, law: str, planes: int, clip: float | None,
        weight_decay: float, seed: int,
    ) -> None:  # fmt: skip
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            _check_rate(name, value)
        if clip is not None and not clip > 0:
            raise ArgumentError(f"clip must be positive or None, got {clip}")
        if isinstance(planes, bool) or not isinstance(planes, int) or planes < 1:
            raise ArgumentError(f"planes must be an integer of at least 1, got {planes!r}")
        Directions(k, law)  # checks k and the law
        params = list(params)  # type: ignore[arg-type]
        if not params:
            raise ArgumentError("no parameters: expected at least one, such as model.parameters()")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})  # type: ignore[arg-type]
        self.k = k
        self.law = law
        self.planes = planes
        self.clip = clip
        self.plane: PlaneModel | None = None
        self.state[STATE] = {"seed": seed, "step": 0}  # type: ignore[index]
        size = sum(p.numel() for p, _, _ in self._moving())
        if k > size:
            raise ArgumentError(f"k = {k} directions exceed the number of parameters, {size}")

    @property
    @abstractmethod
    def descent(self) -> Descent:
        """What turns the plane model into a step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer` does.

        Raises:
            DTypeError: a parameter is not of a real floating dtype.
            DeviceError: parameters lie on different devices.
            ArgumentError: a rate of the group is negative.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for name in ("lr", "weight_decay"):
                _check_rate(name, group[name])
            devices = {p.device for g in self.param_groups for p in g["params"]}
            for p in group["params"]:
                if not p.dtype.is_floating_point:
                    raise DTypeError(f"parameters must be of a real floating dtype, got {p.dtype}")
            if len(devices) > 1:
                raise DeviceError(f"parameters must lie on one device, got {sorted(map(str, devices))}")
        except Exception:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate the closure once on a fresh plane and move the parameters.

        Args:
            closure: computes and returns the scalar loss. It need not call ``backward``, and must not.

        Returns:
            The loss before the step, a plain tensor of shape ().

        Raises:
            ArgumentError: no closure, or no parameter that requires gradients.
            LossError, UnusedParametersError, NonFiniteError, DerivativeError: as `jetplane.evaluate`.
            SingularPlaneError: the plane gives no step.

        Whatever is raised, parameters and the optimizer's state are as they were.
        """
        if closure is None:
            raise ArgumentError("step() needs a closure that returns the loss: there are no gradients to use")
        moving = self._moving()
        if not moving:
            raise ArgumentError("no parameter requires gradients, so none may move; unfreeze some of them")
        params = [p for p, _, _ in moving]
        with torch.no_grad():
            tangents = self._tangents(moving)
            plane = self._evaluate(closure, params, tangents)
            kappa = self._coefficients(plane)
            self._update(moving, tangents, kappa)
        self.plane = plane
        self.state[STATE]["step"] += 1  # type: ignore[index]
        return plane.value

    def _moving(self) -> list[tuple[Tensor, dict[str, Any], int]]:
        """Parameters that may move, each with its group and its place among all."""
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        return [(p, group, i) for i, (p, group) in enumerate(every) if p.requires_grad]

    def _tangents(self, moving: list[tuple[Tensor, dict[str, Any], int]]) -> list[Tensor]:
        own = self.state[STATE]  # type: ignore[index]
        directions = Directions(self.k * self.planes, self.law, seed=own["seed"])
        directions.step = own["step"]
        directions.prepare([p for p, _, _ in moving])
        return [directions.draw(i, p) for p, _, i in moving]

    def _evaluate(
        self, closure: Callable[[], Any], params: list[Tensor], tangents: list[Tensor]
    ) -> PlaneModel:
        needs = self.descent.needs
        if needs == "none":
            return evaluate(closure, params, tangents, curvature="none")
        pairs = "diagonal" if needs == "diagonal" else "all" if self.planes == 1 else self.k
        return evaluate(closure, params, tangents, pairs=pairs)

    def _coefficients(self, plane: PlaneModel) -> Tensor:
        slope = plane.slope
        if self.planes > 1 and self.descent.needs == "all":
            slope = slope.reshape(self.planes, self.k)
        return self.descent(slope, plane.curvature).flatten()

    def _update(
        self, moving: list[tuple[Tensor, dict[str, Any], int]], tangents: list[Tensor], kappa: Tensor
    ) -> None:
        """``theta <- theta - lr * weight_decay * theta + lr * sum_k kappa_k v_k``, the last term clipped."""
        steps = (_combined(t, kappa, g["lr"]) for t, (_, g, _) in zip(tangents, moving, strict=True))
        if self.clip is not None:
            steps = clipped(list(steps), self.clip)
        for (p, group, _), step in zip(moving, steps, strict=True):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, seed and step counter included, so that training goes on bit for bit.

        Raises:
            ShapeError: the state belongs to other parameter groups, or to another optimizer.
        """
        if STATE not in state_dict.get("state", {}):
            raise ShapeError("this state does not come from a Jetplane optimizer")
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise ShapeError(f"the state belongs to other parameters: {error}") from error
        self.state[STATE] = dict(self.state[STATE])  # type: ignore[index]


def _combined(tangents: Tensor, kappa: Tensor, lr: float) -> Tensor:
    weights = (lr * kappa).to(tangents.device, torch.promote_types(tangents.dtype, torch.float32))
    flat = tangents.reshape(tangents.shape[0], -1)
    return (weights.to(flat.dtype) @ flat).reshape(tangents.shape[1:])


def _check_rate(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) or isinstance(value, Tensor)) or not value >= 0:
        raise ArgumentError(f"{name} must be at least 0, got {value!r}")
