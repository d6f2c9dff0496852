"""Operators whose values do not depend differentiably on their arguments, and facts about others' arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._torch import transform_level, tree_map
from ..jets import Jet, Space, is_jet, primal, who_detaches
from . import scripts
from .registry import ALIASING, BUFFERS, ONE_ELEMENT, RANDOM, Rule, declare

# Values that depend on the input's shape and dtype alone, or that stop derivatives by definition.
CONSTANT = """
ones_like rand_like randn_like randint_like randint_like.low_dtype new_ones
bernoulli bernoulli.p bernoulli.Tensor _local_scalar_dense item is_nonzero equal argmax argmin argsort argsort.stable
poisson binomial multinomial normal.Tensor_float normal.Tensor_Tensor normal.float_Tensor
"""

# Fresh memory that composites may write jets into: a jet from the start, though without coefficients.
FRESH = "zeros_like empty_like new_zeros new_empty new_empty_strided new_full full_like"


def _primals(space: Space, values: Any) -> Any:
    return tree_map(lambda v: primal(v, space), values)


def _constant(op: Any) -> Rule:
    return lambda space, *args, **kwargs: op(*_primals(space, args), **_primals(space, kwargs))


def _fresh(op: Any) -> Rule:
    def rule(space: Space, *args: Any, **kwargs: Any) -> Any:
        y: Tensor = op(*_primals(space, args), **_primals(space, kwargs))
        return Jet(y, None, None, space) if y.dtype.is_floating_point or y.dtype.is_complex else y

    return rule


def _detach(op: Any) -> Rule:
    def rule(space: Space, x: Any) -> Any:
        return x.alias(op(x.primal)) if is_jet(x, space) and _keeps(space) else op(primal(x, space))

    return rule


def _keeps(space: Space) -> bool:
    """Whether ``aten.detach`` is torch's own work, and derivatives do not stop at it.

    Raises:
        DerivativeError: TorchScript code calls it, which may be its author's doing or TorchScript's own.
    """
    who = who_detaches()
    if who != "nobody" or space.keys is None or transform_level() is not None:
        return who == "autograd"
    return scripts.detaches_by_itself()


declare(CONSTANT, _constant)
declare("detach", _detach)
declare(FRESH, _fresh, (BUFFERS,))

ALIASING.update("reshape contiguous to flatten type_as resolve_conj resolve_neg dropout ravel".split())
RANDOM.update("normal_ uniform_ bernoulli_ exponential_ random_ geometric_ cauchy_ log_normal_".split())
ONE_ELEMENT.update(
    "view reshape flatten squeeze unsqueeze ravel clone alias contiguous to _to_copy sum mean positive".split()
)
