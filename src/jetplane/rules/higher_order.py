"""Operators that take functions: the functions run on jets as they are.

`torch.nn.attention.flex_attention` and ``torch.cond`` trace what they are given when they are compiled, and run it when
they are not. What the functions capture has to be seen too, so they run where parameters are replaced by jets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._torch import HigherOrderOperator, flex_attention
from ..errors import DerivativeError
from .functions import inside_transforms


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


def _attention(query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> Any:
    """``softmax(score_mod(q k^T))v`` by torch's own composition, which forms all scores."""
    return flex_attention()(query, key, value, *rest, **kwargs)


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
