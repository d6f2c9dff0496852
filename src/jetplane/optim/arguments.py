"""The arguments of optimizers, checked: what was expected, what came instead, and how the call is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError

# Options of torch's optimizers for a group; keys that are none of these are the user's own, or a scheduler's.
FOREIGN = {
    "alpha", "amsgrad", "betas", "dampening", "eps", "learning_rate", "maximize", "momentum", "momentum_decay",
    "nesterov", "rho",
}  # fmt: skip


class Checked(type):
    """The class of optimizers: a call that does not fit their signature raises an `ArgumentError` that shows it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an optimizer."""
        signature = inspect.signature(cls.__init__)
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError as error:
            every = list(signature.parameters.values())[1:]
            placed = [p.name for p in every if p.kind is p.POSITIONAL_OR_KEYWORD]
            named = ", ".join(p.name for p in every if p.kind is p.KEYWORD_ONLY)
            raise ArgumentError(
                f"{cls.__name__}: {error}; expected {cls.__name__}({', '.join(placed)}) and, by name alone, {named}: "
                f"{cls.__name__}(model.parameters(), lr=…)"
            ) from error
        return super().__call__(*args, **kwargs)


def as_groups(params: Any, optimizer: str) -> list[Any]:
    """The first argument of an optimizer as a list: tensors, names with tensors, or groups.

    Raises:
        ArgumentError: it is something else, or nothing.
    """
    remedy = f"{optimizer}(model.parameters(), …)"
    if isinstance(params, Tensor):
        raise ArgumentError("params must be an iterable of tensors or groups, got one tensor: put it in a list")
    if isinstance(params, nn.Module):
        raise ArgumentError(
            f"params must be an iterable of tensors or groups, got the module {type(params).__name__}: {remedy}"
        )
    if isinstance(params, Mapping):
        inside = "put the group in a list" if "params" in params else f"give its values, or {remedy}"
        raise ArgumentError(f"params must be an iterable of tensors or groups, got a dict: {inside}")
    if isinstance(params, str) or not isinstance(params, Iterable):
        raise ArgumentError(f"params must be an iterable of tensors or groups, got {params!r}: {remedy}")
    params = list(params)
    if not params:
        raise ArgumentError(
            "no parameters: expected at least one, such as model.parameters(); an iterator that was used before is "
            "empty, so call model.parameters() again"
        )
    for each in params:
        named = isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str)
        if not isinstance(each, (Tensor, dict)) and not named:
            raise ArgumentError(
                f"params must be an iterable of tensors or groups, and one of them is {_shown(each)}: {remedy}; of "
                "several modules, [*a.parameters(), *b.parameters()]"
            )
    return params


def check_group(group: Any, earlier: Iterable[Tensor], optimizer: type, options: Iterable[str]) -> None:
    """A group of parameters as it was given; iterators in it become lists.

    Args:
        group: the dict.
        earlier: the parameters of other groups.
        optimizer: whose group it is.
        options: its options for groups.

    Raises:
        ArgumentError: it is no dict with "params"; these are no tensors, are not leaves, or are there more than once;
            or it has an option that the optimizer would ignore.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise ArgumentError(f'a group must be a dict with "params", got {_shown(group)}')
    params = group["params"]
    if isinstance(params, (nn.Module, Mapping, str, set)) or not isinstance(params, Iterable):
        raise ArgumentError(f'"params" of a group must be a list of tensors, got {_shown(params)}')
    params = [params] if isinstance(params, Tensor) else list(params)
    tensors: list[Any] = [each[1] if isinstance(each, tuple) and len(each) == 2 else each for each in params]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f'"params" of a group must be a list of tensors, and one of them is {_shown(tensor)}')
        if not tensor.is_leaf:
            raise ArgumentError(
                f"a parameter of shape {tuple(tensor.shape)} is the result of a computation, which moving it would not "
                "change: give the tensors that it is computed from, or detach().requires_grad_() of it"
            )
    seen = {id(p) for p in earlier}
    for tensor in tensors:
        if id(tensor) in seen:
            raise ArgumentError(
                f"a parameter of shape {tuple(tensor.shape)} is given more than once; give tied weights once: "
                "list(dict.fromkeys(params))"
            )
        seen.add(id(tensor))
    settings = set(inspect.signature(optimizer.__init__).parameters) - {"self", "params"}
    ignored = sorted((FOREIGN | settings) & set(group) - set(options))
    if ignored:
        raise ArgumentError(
            f"{optimizer.__name__} has no option {', '.join(ignored)} for a group of parameters; expected "
            f"{', '.join(options)}"
        )
    group["params"] = params


def check_rate(name: str, value: Any) -> None:
    """A number of at least 0, or a tensor of one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number or (isinstance(value, Tensor) and value.numel() == 1)) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name} must be a number, finite and at least 0, got {value!r}")


def check_clip(clip: Any) -> None:
    """The largest norm of a step."""
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0):
        raise ArgumentError(f"clip, the largest norm of a step, must be positive or None, got {clip!r}")


def _shown(x: Any) -> str:
    """A value in few words."""
    whole = isinstance(x, (str, int, float, dict)) and len(repr(x)) <= 60
    return repr(x) if whole else f"a {type(x).__name__}"
