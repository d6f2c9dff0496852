"""How an operator meets jets: known, decomposable, or a leaf.

The ladder: the table of rules; the operator's own decomposition; torch's decomposition tables;
pointwise operators by exact f' and f''; reverse over reverse inside the operator; an error that
names it. In-place and ``out=`` variants are their functional counterpart and one write.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from .._torch import (
    EnableTorchFunction,
    decompositions,
    is_composite,
    no_dispatch,
    tree_leaves,
    tree_map,
    under,
)
from ..errors import ArgumentError, DerivativeError, MissingRuleError, UnknownLossError
from ..jets import (
    LOSS,
    MODEL,
    PARAMETER,
    TOTAL,
    Jet,
    Space,
    absent,
    any_promoted,
    forget_promotions,
    is_jet,
    kind_of,
    mark_view,
    owner_of,
    primal,
    promote,
    promoted,
    promotions,
    set_dispatcher,
    traced,
    whole,
    write,
)
from . import by_hand, examples, fallback, grad_mode, rounding, sparse
from .registry import ALIASING, RANDOM, RULES, operator

P = ParamSpec("P")
T = TypeVar("T")

_grad_enabled = torch.is_grad_enabled
_nothing = contextlib.nullcontext()


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Carry jets through one operator call."""
    original = args
    if any_promoted():
        args, kwargs = tree_map(_as_promoted, (tuple(args), kwargs))
    space = _highest(args, _highest(kwargs.values(), None))
    if space is None:  # jets that lost their coefficients to promotion cannot occur; plain calls can
        return func(*args, **kwargs)
    if space.recorded and space.traced:
        with traced():
            return _as_jets(func, space, _on_keys(func, space, args, kwargs, original))
    with under(space.keys), EnableTorchFunction() if space.recorded else _nothing:
        # Compiled code has no keys, and the operators of a compiler's graph are not the user's.
        if (space.stopped or not _grad_enabled()) and space.keys and torch.Tag.inplace_view not in func.tags:
            return grad_mode.on_primals(func, args, kwargs, original)
        result = _on_keys(func, space, args, kwargs, original)
    return _as_jets(func, space, result) if space.recorded else result


def _as_jets(func: Any, space: Space, result: Any) -> Any:
    """Results as jets, also those without derivatives, where autograd takes what an operator on jets returns.

    It adds results to a graph of jets, which nobody asks. A plain tensor would lead from the graph of primals into it.
    """
    if is_jet(result, space) or func._schema.is_mutable or func._schema.name == "aten::detach":
        return result
    return tree_map(lambda y: Jet(y, None, None, space) if _differentiable(y) and not is_jet(y, space) else y, result)


def _on_keys(func: Any, space: Space, args: Any, kwargs: dict[str, Any], original: Sequence[Any]) -> Any:
    before = space.order, space.kind
    try:
        if space.tells_kinds:
            space.kind = _kind_of_call(func, space, (*args, *kwargs.values()))
        if space.gauss_newton:
            space.order = 1 if space.kind == MODEL or (space.kind == PARAMETER and not space.penalties) else 2
            if space.kind == LOSS and inside_loss() and not func._schema.is_mutable:
                args, kwargs = tree_map(lambda x: _entering(x, space), (args, kwargs))
            if space.entrance is not None and (func in RULES or not is_composite(func)):  # else its constituents are
                args, kwargs = space.entrance.admit(func, space, args, kwargs)
        result = _dispatch(func, space, args, kwargs, original)
        if space.kind == MODEL and space.keys:  # compilers would lose what is remembered
            result = by_hand.follow(func, space, args, kwargs, result)
    finally:
        space.order, space.kind = before
    if space.examples:
        examples.follow(func, space, args, kwargs, result)
    return result


def _dispatch(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any], original: Sequence[Any]) -> Any:
    if func._schema.is_mutable and func not in RULES:
        return _mutate(func, space, args, kwargs, original)
    result = carry(func, space, args, kwargs)
    if _may_alias(func) and args and is_jet(args[0], space):
        return (
            tree_map(lambda r: mark_view(r, args[0]), result)
            if isinstance(result, (list, tuple))
            else mark_view(result, args[0])
        )
    return result


def carry(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A functional operator, down the ladder."""
    space.operator = func._schema.name
    if sparse.concerns(func, args):
        return sparse.carry(func, space, args, kwargs)
    rule = RULES.get(func)
    if rule is not None:
        result = rule(space, *args, **kwargs)
        if result is not NotImplemented:
            return result
    draws = fallback.Draws(args) if torch.Tag.nondeterministic_seeded in func.tags else None
    result = _decomposed(func, space, args, kwargs)
    if result is not NotImplemented:
        return result
    if rule is None:
        value = _again(draws, func, *_primals(space, args), **_primals(space, kwargs))
        values = [v for v in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(v, Tensor)]
        if not any(map(_differentiable, values)):
            for v in values:
                rounding.to_integers(func, v.dtype)
            return value
    result = _again(draws, fallback.pointwise, func, space, args, kwargs)
    return result if result is not NotImplemented else _again(draws, fallback.reverse, func, space, args, kwargs)


def _again(draws: fallback.Draws | None, run: Any, *args: Any, **kwargs: Any) -> Any:
    """A try of an operator, which draws the same random numbers as the others."""
    if draws is not None:
        draws.again()
    return run(*args, **kwargs)


def _decomposed(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if is_composite(func):
        before = promotions()
        result = _constituents(func, space, args, kwargs)
        if promotions() == before:
            return result
        # It moved jets through plain memory of its own, where no operator of ours sees them: not trusted.
        forget_promotions(before)
        return NotImplemented
    table = decompositions().get(func)
    if table is None:
        return NotImplemented
    try:
        return table(*args, **kwargs)
    except MissingRuleError:  # it leads to primitives that only a compiler knows
        return NotImplemented


def _constituents(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with whole(between=True) if space.recorded else _nothing:
        return func.decompose(*args, **kwargs)


@functools.cache
def _may_alias(func: Any) -> bool:
    packet = func._schema.name.partition("::")[2]
    return packet in ALIASING or any(r.alias_info is not None for r in func._schema.returns)


# --- Gauss-Newton: which operators make second coefficients -----------------------------------------

KNOWN_LOSSES = (
    "Known are the losses of torch.nn.functional, sums of squares and of log-probabilities over all elements, and "
    "functions marked with @jetplane.loss (or code in `with jetplane.loss():`). Mark yours, or take exact curvature, "
    "which needs no loss function: curvature='hessian', in PlaneSearch "
    "subspace=jetplane.sources.Subspace(curvature='hessian')"
)


class _Marked(threading.local):  # not a context variable, which compilers cannot follow
    """Whether the code that runs in this thread is marked as a loss function."""

    def __init__(self) -> None:  # not a default of the class: compiled code would be made anew once the thread has one
        self.loss = False


_marked = _Marked()


def inside_loss() -> bool:
    """Whether the code that runs is marked as a loss function."""
    return _marked.loss


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    before = inside_loss()
    _marked.loss = True
    try:
        yield
    finally:
        _marked.loss = before


@overload
def loss(function: None = None) -> contextlib._GeneratorContextManager[None]: ...
@overload
def loss(function: Callable[P, T]) -> Callable[P, T]: ...
def loss(function: Callable[..., Any] | None = None) -> Any:
    """Marks code as a loss function for ``curvature="ggn"``; a decorator, with or without parentheses, and a context.

    What runs inside is differentiated twice in what enters it, the model's outputs, exactly. The losses of
    ``torch.nn.functional`` are marked already, and sums of squares and of log-probabilities are recognised.

    Raises:
        ArgumentError: something else than a function is given.

    >>> import torch, jetplane as jp
    >>> w, x = torch.tensor([2.0]), torch.tensor([3.0])
    >>> @jp.loss
    ... def squared(output, target):
    ...     return ((output - target) ** 2).sum()
    >>> jp.evaluate(lambda: squared(w * x, 1.0), [w], [torch.ones(1, 1)], curvature="ggn").curvature
    tensor([[18.]])
    """
    if function is None:
        return _marking()
    if not callable(function):
        raise ArgumentError(
            f"expected the function that computes a loss, got {type(function).__name__}: write @jetplane.loss above "
            "it, or `with jetplane.loss():` around the code"
        )
    return _marking()(function)


def _kind_of_call(func: Any, space: Space, args: Sequence[Any]) -> int:
    kinds, data = _kinds(args, space)
    data = data and not _among_parameters(func, space, args, kinds)
    if inside_loss():
        return LOSS if data or kinds != {PARAMETER} else PARAMETER
    if LOSS in kinds:
        if MODEL in kinds and space.gauss_newton:
            raise UnknownLossError(
                f"{func} combines the result of a loss function with another output of the model, whose part "
                f"of the Gauss-Newton curvature is not defined. {KNOWN_LOSSES}"
            )
        return LOSS
    if data or MODEL in kinds:
        return MODEL
    return TOTAL if TOTAL in kinds else PARAMETER


def _among_parameters(func: Any, space: Space, args: Sequence[Any], kinds: set[int]) -> bool:
    """Whether tensors beside parameters, or beside sums, are constants of their own shape and not data.

    So they are in ``((p - p0)**2 * w).sum()``. Of what is not linear in parameters, as a product of matrices, others
    are subtracted to give a residual, the model's: a sum of its squares has Gauss-Newton curvature.
    """
    if kinds == {TOTAL} and func in _WEIGHING:
        return True
    if kinds not in ({PARAMETER}, {TOTAL}) or func not in _SCALING and func not in _MOVING:
        return False
    shapes = [x.shape for x in args if isinstance(x, Tensor)]
    jets = [x for x in args if is_jet(x, space)]
    if torch.broadcast_shapes(*shapes).numel() != torch.broadcast_shapes(*(x.shape for x in jets)).numel():
        return False
    return func in _SCALING or not any(x.second for x in jets)


_SCALING = set(map(operator, ("mul.Tensor", "div.Tensor")))
_MOVING = set(map(operator, ("add.Tensor", "sub.Tensor", "rsub.Tensor")))
_WEIGHING = set(map(operator, ("matmul", "dot", "mv")))


def _entering(x: Any, space: Space) -> Any:
    """What enters a loss function: a sum that may be a loss is an output of the model like any other."""
    return Jet(x.primal, x.first, None, space, kind=LOSS) if is_jet(x, space) and kind_of(x) == TOTAL else x


def _kinds(values: Any, space: Space) -> tuple[set[int], bool]:
    """Kinds of the jets among the values, and whether there are data: other tensors than scalars."""
    kinds: set[int] = set()
    data = False
    for v in values:
        if is_jet(v, space):
            kinds.add(kind_of(v))
        elif isinstance(v, Tensor):
            data = data or v.dim() > 0
        elif isinstance(v, (list, tuple)):
            inner, more = _kinds(v, space)
            kinds |= inner
            data = data or more
    return kinds, data


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def _highest(values: Any, found: Space | None) -> Space | None:
    for v in values:
        if isinstance(v, Jet):
            if found is None or v.space.level > found.level:
                found = v.space
        elif isinstance(v, (list, tuple)):
            found = _highest(v, found)
    return found


def _as_promoted(x: Any) -> Any:
    if isinstance(x, Tensor) and not isinstance(x, Jet):
        jet = promoted(x)
        return x if jet is None else jet
    return x


def _primals(space: Space, values: Any) -> Any:
    return tree_map(lambda v: primal(v, space), values)


# --- in place ---------------------------------------------------------------------------------------


@functools.cache
def _functional(func: Any) -> Any | None:
    """The functional counterpart of an in-place or ``out=`` overload."""
    namespace, _, packet = func._schema.name.partition("::")
    which = func._overloadname
    names = [packet[:-1] if packet.endswith("_") else packet]
    if packet.startswith("__i"):
        names = [packet.replace("__i", "__")]
    overloads = [which]
    if which == "out" or which.endswith("_out"):
        overloads = [which.removesuffix("out").removesuffix("_") or "default", "default"]
    for name in names:
        found = getattr(getattr(torch.ops, namespace), name, None)
        if found is None:
            continue
        ops = [getattr(found, overload, None) for overload in (*overloads, *found.overloads())]
        ops = [op for op in ops if op is not None and op is not func and not op._schema.is_mutable]
        # Not by the overload's name alone: the default of div or mul is that of Python's numbers, and sum.IntList_out
        # belongs to sum.dim_IntList. Factories take a dtype beside, and dropout_ calls its input otherwise.
        wanted = _signature(func)
        for fits in (_same, _same_names, _same_types, _more_names):
            for op in ops:
                if fits(_signature(op), wanted):
                    return op
    return None


Signature = list[tuple[str, str]]  # name and type of each argument


def _signature(func: Any) -> Signature:
    return [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]


def _same(a: Signature, b: Signature) -> bool:
    return a == b


def _same_names(a: Signature, b: Signature) -> bool:
    return [name for name, _ in a] == [name for name, _ in b]


def _same_types(a: Signature, b: Signature) -> bool:
    return [kind for _, kind in a] == [kind for _, kind in b]


def _more_names(a: Signature, b: Signature) -> bool:
    return set(b) <= set(a)


def _mutate(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any], original: Sequence[Any]) -> Any:
    packet = func._schema.name.partition("::")[2]
    target = kwargs.get("out", original[0] if original else None)
    if isinstance(target, Tensor) and not isinstance(target, Jet) and any(map(continues_graph, args)):
        space.graph_lost = "a write to a tensor that did not depend on the parameters before"
    if packet == "detach_":
        return _detach_in_place(args[0])
    if torch.Tag.inplace_view in func.tags:
        return _reshape_in_place(func, args, kwargs)
    if packet in ("requires_grad_", "rename_"):
        return args[0]
    schema = func._schema.arguments
    outs = {a.name for a in schema if a.is_out}
    if packet in RANDOM:
        value = func(primal(args[0], space).clone(), *args[1:], **kwargs)
        return _store([args[0]], [value], space, original[0])
    op = _functional(func)
    if op is None:
        if is_composite(func):
            return _constituents(func, space, args, kwargs)
        raise fallback.missing(func, "it writes in place and has no functional counterpart")
    if outs:
        targets = [kwargs[a.name] for a in schema if a.is_out]
        value = dispatch(op, args, {k: v for k, v in kwargs.items() if k not in outs})
        for t, v in zip(tree_leaves(targets), tree_leaves(value), strict=True):
            _store([t], [v], space, t)
        return None if not func._schema.returns else targets[0] if len(targets) == 1 else tuple(targets)
    written = [i for i, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write]
    if written != [0]:
        raise fallback.missing(func, "it writes to several of its arguments in place")
    return _store([args[0]], [dispatch(op, _reordered(func, op, args), kwargs)], space, original[0])


def _detach_in_place(x: Jet) -> Jet:
    """``x.detach_()``: derivatives stop, those of views that were made before excepted."""
    if x.is_seed or x.base is not None:
        raise DerivativeError(
            "detach_() of a parameter of the evaluation, or of a view; use detach(), which makes another tensor"
        )
    x.first, x.second = absent(x.space, 1), absent(x.space, 2)
    return x


def continues_graph(x: Any) -> bool:
    """Whether a jet is in a graph that the closure's own reverse mode goes through."""
    return isinstance(x, Jet) and x.requires_grad


def _reordered(func: Any, op: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Arguments in the counterpart's order: ``polygamma_(self, n)`` is ``polygamma(n, self)``."""
    named = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)}
    order = [a.name for a in op._schema.arguments[: len(args)]]
    return [named[name] for name in order] if set(order) == set(named) else args


def _reshape_in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``x.t_()`` and its like: x becomes a view of what it was."""
    op = _functional(func)
    x = args[0]
    if op is None or not isinstance(x, Jet) or x.is_seed:
        raise DerivativeError(f"{func} changes the shape of a jet in place in a way that cannot be followed")
    view = dispatch(op, args, kwargs)
    with no_dispatch():
        func(*args, **kwargs)  # the wrapper's own shape
    x.primal, x.first, x.second = view.primal, view.first, view.second
    return x


def _store(targets: Sequence[Any], values: Sequence[Any], space: Space, returned: Any) -> Any:
    target, value = targets[0], values[0]
    if target.shape != value.shape and value.numel() and target.numel() == 0:
        raise DerivativeError("out= must have the result's shape already: a jet cannot be resized in place")
    if isinstance(target, Jet):
        if target.space is not space:
            raise DerivativeError("a jet of an inner evaluation was written into a tensor of an outer one")
        write(target, value, space)
        return returned
    if is_jet(value, space) and (target.dtype.is_floating_point or target.dtype.is_complex):
        grad_mode.check_view(target)
        owner = owner_of(target)
        if space.recorded and owner.requires_grad and owner.is_leaf:
            raise DerivativeError(
                "in-place write to a leaf that requires grad, which reverse mode refuses too; write to a clone() of it"
            )
        space.written.append(weakref.ref(owner))
        write(promote(target, space), value, space)
        return returned
    target.copy_(primal(value, space))
    return returned


set_dispatcher(dispatch)
