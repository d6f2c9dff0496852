"""The table of rules: operator overload -> how jets pass through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rule = Callable[..., Any]  # rule(space, *args, **kwargs), called with the operator's own arguments

RULES: dict[Any, Rule] = {}

aten = torch.ops.aten


def overload(name: str) -> Any | None:
    """An ATen overload by name, ``"sum.dim_IntList"`` or ``"sin"``; None if this torch lacks it."""
    packet, _, which = name.partition(".")
    return getattr(getattr(aten, packet, None), which or "default", None)


def register(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for the operators of these names; those that this torch lacks are passed over."""

    def enter(rule: Rule) -> Rule:
        for name in names:
            op = overload(name)
            if op is not None:
                RULES[op] = rule
        return rule

    return enter
