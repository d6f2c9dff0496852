"""The table of rules: operator overload -> how jets pass through it. Each rule is declared once, with its traits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._torch import CHECKED, VERSION
from ..errors import ArgumentError, TorchVersionError

Rule = Callable[..., Any]  # rule(space, *args, **kwargs), called with the operator's own arguments

RULES: dict[Any, Rule] = {}

# Traits of operators, by their names without overload and underscore at the end.
ALIASING: set[str] = set()  # the result may look into the first argument's memory, though the schema is silent
RANDOM: set[str] = set()  # fills its argument with random numbers
ONE_ELEMENT: set[str] = set()  # of a tensor of one element it gives the same number: see `jetplane.rules.examples`
BUFFERS: set[str] = set()  # gives fresh memory that composites may write jets into

aten = torch.ops.aten


def operator(name: str) -> Any:
    """An ATen overload by name, ``"sum.dim_IntList"`` or ``"sin"``.

    Raises:
        TorchVersionError: torch has none of this name.
    """
    packet, _, which = name.partition(".")
    found = getattr(getattr(aten, packet, None), which or "default", None)
    if found is None:
        raise TorchVersionError(f"torch {torch.__version__} has no operator aten::{name}; is the name misspelt?")
    return found


def enter(op: Any, rule: Rule) -> None:
    """Enter the rule of one operator.

    Raises:
        ArgumentError: it has one already.
    """
    if op in RULES:
        raise ArgumentError(f"{op} has a rule already; expected one declaration for each operator")
    RULES[op] = rule


def declare(names: str, rule: Callable[[Any], Rule], traits: tuple[set[str], ...] = ()) -> None:
    """Enter rules made for the operators of these names (separated by spaces), and note their traits.

    Raises:
        TorchVersionError: torch has no operator of a name. Versions older than the one that names were checked with
            may lack some.
        ArgumentError: one has a rule already.
    """
    for name in names.split():
        try:
            op = operator(name)
        except TorchVersionError:
            if VERSION >= CHECKED:
                raise
            continue
        enter(op, rule(op))
        for trait in traits:
            trait.add(name.partition(".")[0])


def register(*names: str) -> Callable[[Rule], Rule]:
    """Enter one rule for the operators of these names; see `declare`."""

    def entered(rule: Rule) -> Rule:
        declare(" ".join(names), lambda op: rule)
        return rule

    return entered
