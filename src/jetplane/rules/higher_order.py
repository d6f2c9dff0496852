"""Operators that take functions: the functions run on jets as they are.

`torch.nn.attention.flex_attention` and ``torch.cond`` trace what they are given when they are compiled, and run it when
they are not. What the functions capture has to be seen too, so they run where parameters are replaced by jets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._torch import HigherOrderOperator, flex_attention
from ..errors import DerivativeError
from .functions import inside_transforms

SCORES = 1 << 21  # of all heads, for some queries, that `flex_attention` forms at a time


def is_higher_order(func: Any) -> bool:
    """Whether a function is one of torch's operators that take functions."""
    return isinstance(func, HigherOrderOperator)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a higher-order operator by torch functions alone.

    Raises:
        DerivativeError: it is none of those that can be run so.
    """
    rule = RULES.get(func.name())
    if rule is None:
        raise DerivativeError(
            f"the higher-order operator {func.name()} takes functions, which may use the parameters where jets do not "
            f"reach them; {', '.join(RULES)} are carried. Write it as Python code, a loop or an if"
        )
    return rule(*args, **kwargs)


def _attention(
    query: Any, key: Any, value: Any, score_mod: Any, block_mask: Any, *rest: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """``softmax(score_mod(q k^T))v`` by torch's own composition, for some queries at a time."""
    n = query.shape[-2]
    rows = max(1, SCORES // max(query.shape[:-2].numel() * key.shape[-2], 1))
    parts = []
    for start in range(0, max(n, 1), rows):
        part = slice(start, start + rows) if rows < n else slice(None)
        mods = _later(score_mod, 3, start), (*block_mask[:-1], _later(block_mask[-1], 2, start))
        parts.append(flex_attention()(query[..., part, :], key, value, *mods, *rest, **kwargs))
    if len(parts) == 1:
        return parts[0]
    # The output; logarithmic sums and largest scores have no axis of values.
    return tuple(torch.cat(of, -2 if n == 0 else -1) for n, of in enumerate(zip(*parts, strict=True)))


def _later(mod: Callable[..., Any], place: int, start: int) -> Callable[..., Any]:
    """A function of indices, of which the one of the query, at a place among its arguments, begins at zero again."""
    if not start:
        return mod
    return lambda *args: mod(*args[:place], args[place] + start, *args[place + 1 :])


def _cond(pred: Any, true: Callable[..., Any], false: Callable[..., Any], operands: Any = ()) -> Any:
    return true(*operands) if pred else false(*operands)


def _while(cond: Callable[..., Any], body: Callable[..., Any], carried: Any, additional: Any = ()) -> Any:
    while cond(*carried, *additional):
        carried = body(*carried, *additional)
    return tuple(carried)


RULES: dict[str, Callable[..., Any]] = {
    "flex_attention": _attention,
    "cond": _cond,
    "while_loop": _while,
    "custom_function_call": inside_transforms,
}
