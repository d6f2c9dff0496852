"""Custom autograd functions: `torch.autograd.Function.apply` on jets.

Left alone, the forward of such a function would run on the jets as they are, and the derivative that its ``backward``
defines would be replaced in silence by that of its ``forward``. What a function says of itself is used instead:

- a rule that the user registered for it;
- its ``jvp``, with J(x) the Jacobian that it defines: ``y_i = J(x) x_i`` and ``y_ij = J(x) x_ij + d(J(x) x_i) x_j``,
  whose last term is the derivative of ``jvp`` itself, run on jets;
- its ``backward``, by reverse over reverse inside the function, as `jetplane.rules.fallback` does for operators.

Second derivatives are torch's business only where forward, jvp and backward are made of torch functions, which nothing
says: torch takes what a forward saves besides its inputs and outputs for constants, and the curvature would be wrong
without a word. They are therefore held against differences of first derivatives in double precision, once for each
function and kind of arguments (`_confirm`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._torch import DisableTorchFunction, EnableTorchFunction, FunctionBase, custom_function_call, tree_map
from ..errors import DerivativeError
from ..jets import (
    Coefficients,
    Diagonal,
    Jet,
    Space,
    Star,
    Term,
    absent,
    forget_promoted,
    innermost,
    is_jet,
    make,
    parts,
    promoted,
)
from .dispatch import _store, dispatch
from .fallback import Draws, all_plain, announce, forbidden, reverse_over_reverse
from .grad_mode import autograd, forward_only, in_graph, recording
from .registry import enter

REGISTERED: dict[type, Callable[..., Any]] = {}  # what the user said of a function


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch itself does with a function, whatever is intercepted."""
    return super(FunctionBase, function).apply(*args, **kwargs)


def register_function(function: type, composed: Callable[..., Any] | None) -> None:
    """Say how jets pass through an autograd function: as ``composed``, or, where that is None, as constants."""
    REGISTERED[function] = _constant(function) if composed is None else composed


def differentiate_forward(function: type) -> None:
    """Say of an autograd function that its forward pass, run on jets, has the derivatives that it defines."""

    def forward(*args: Any) -> Any:
        context = FunctionCtx()
        context.needs_input_grad = (False,) * len(args)  # type: ignore[attr-defined]
        return function.forward(context, *args)  # type: ignore[attr-defined]  # apply() would switch grad mode off

    REGISTERED[function] = forward


def _constant(function: type) -> Callable[..., Any]:
    def composed(*args: Any) -> Any:
        return _apply(function, *[innermost(a) for a in args])

    return composed


# Functions of torch's own that are there for a backward pass alone: reentrant checkpoints compute what they are given,
# and flex_attention reads tables whose gradients it wants. By name, since some are of modules that import a compiler.
OF_TORCH: dict[str, Callable[..., Any]] = {
    "torch.utils.checkpoint.CheckpointFunction": lambda run, preserve_rng_state, *args: run(*args),
    "torch._dynamo._trace_wrapped_higher_order_op.ModIndex": lambda x, indices: torch.ops.aten.index(x, indices),
}


# --- a function on jets ---------------------------------------------------------------------------------------


def _carries(x: Any) -> bool:
    """Whether x is a jet, or the wrapper of one that `jetplane.evaluation.sharded` makes."""
    return isinstance(x, Jet) or _wraps_a_jet(x)


def _wraps_a_jet(x: Any) -> bool:
    return isinstance(getattr(x, "_local_tensor", None), Jet)


def _on_jets(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = REGISTERED.get(function) or OF_TORCH.get(f"{function.__module__}.{function.__qualname__}")
    if rule is not None:
        return rule(*args, **kwargs)
    _lose_graph(f"the custom autograd function {function.__qualname__}", args)
    if kwargs or any(map(_wraps_a_jet, args)):
        raise _refused(function, "it is called in a way in which they are not seen")
    # Autograd does not look into lists and dictionaries either: what is in there is constant.
    return dispatch(APPLY, (function, *(a if isinstance(a, Jet) else tree_map(innermost, a) for a in args)), {})


def _lose_graph(what: str, args: Sequence[Any]) -> None:
    """Note that what the closure's own reverse mode may go through ends here."""
    if any(isinstance(a, Tensor) and in_graph(a) for a in args):
        for a in args:
            if isinstance(a, Jet):
                a.space.graph_lost = what


def _refused(function: type, why: str) -> DerivativeError:
    name = function.__qualname__
    return DerivativeError(
        f"the custom autograd function {name} defines its own derivatives, and {why}. Register the same function in "
        f"torch operators: jetplane.register_rule({name}, composed=...)"
    )


class Call:
    """What is called in place of an operator: it has a rule, whose first argument says what is called."""

    namespace = "jetplane"

    def __init__(self, name: str, label: str) -> None:
        self._schema = SimpleNamespace(name=f"jetplane::{name}", is_mutable=False, arguments=(), returns=())
        self._label = label

    def __repr__(self) -> str:
        return self._label


APPLY = Call("autograd_function", "a custom autograd function")


def _applied(space: Space, function: Any, *args: Any) -> Any:
    if not all_plain(space, args, {}):
        raise _refused(function, "they are not taken inside derivatives of derivatives (jetplane.jet in a closure)")
    way = _by_backward if function.jvp is torch.autograd.Function.jvp else _by_jvp
    with DisableTorchFunction():  # as inside of an operator: interception is for the user's code alone
        return way(space, function, args)


enter(APPLY, _applied)


def _copied(x: Any) -> Any:
    """A tensor that autograd takes, and that a function may overwrite."""
    return x.clone() if isinstance(x, Tensor) else x


def _sequence(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _returned(result: Any, outputs: Sequence[Any]) -> Any:
    return tuple(outputs) if isinstance(result, (tuple, list)) else outputs[0]


def _overwritten(args: Sequence[Any], inner: Sequence[Any], written: Sequence[Any]) -> dict[int, Any]:
    """The arguments that a function has written to, by the identity of the tensors that it was given for them."""
    marked = {id(x) for x in written}
    return {id(x): a for a, x in zip(args, inner, strict=True) if isinstance(x, Tensor) and id(x) in marked}


CAPTURED = "it uses a parameter that is not among its arguments, which autograd does not see"


def _seen(function: Any, outputs: Sequence[Any]) -> None:
    if any(isinstance(y, Jet) for y in outputs):
        raise _refused(function, CAPTURED)


# --- by jvp -----------------------------------------------------------------------------------------------------


class _Context(FunctionCtx):
    """What forward and jvp are given as ``ctx``."""

    to_save: Sequence[Any] = ()
    saved_for_forward: Sequence[Any] | None = None
    dirty_tensors: Sequence[Tensor] = ()
    non_differentiable: Sequence[Tensor] = ()
    materialize_grads = True

    def __init__(self, function: Any, moving: Sequence[bool]) -> None:
        self._forward_cls = function
        self.needs_input_grad = tuple(moving)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return tuple(self.to_save if self.saved_for_forward is None else self.saved_for_forward)


def _sets_context_apart(function: Any) -> bool:
    return function.setup_context is not torch.autograd.Function.setup_context


def _run(
    function: Any, inputs: Sequence[Any], moving: Sequence[bool], known: Sequence[Any] | None = None
) -> tuple[_Context, Any]:
    """Run forward. What is ``known`` of the outputs replaces them, also where they were saved."""
    ctx = _Context(function, moving)
    apart = _sets_context_apart(function)
    with EnableTorchFunction():
        result = function.forward(*inputs) if apart else function.forward(ctx, *inputs)
    if known is not None:
        outputs = _sequence(result)
        passed_on = {id(x) for x in inputs} - {id(x) for x in ctx.dirty_tensors}
        both = zip(outputs, known, strict=True)
        replaced = {id(y): better for y, better in both if isinstance(y, Tensor) and id(y) not in passed_on}
        result = _returned(result, [replaced.get(id(y), y) for y in outputs])
        for name, value in vars(ctx).items():
            setattr(ctx, name, tree_map(lambda x: replaced.get(id(x), x), value))
    if apart:
        function.setup_context(ctx, tuple(inputs), result)
    return ctx, result


def _pushed(
    function: Any, ctx: _Context, inputs: Sequence[Any], tangents: Sequence[Tensor | None], outputs: Sequence[Any]
) -> tuple[Any, ...]:
    """``J(x) v`` for each output, as jvp says; None is zero."""

    def given(x: Any, t: Tensor | None) -> Tensor | None:
        if t is not None:
            return t.to(x.dtype, copy=True)
        return torch.zeros_like(x) if isinstance(x, Tensor) and ctx.materialize_grads else None

    along = list(map(given, inputs, tangents))
    with EnableTorchFunction():
        pushed = _sequence(function.jvp(ctx, *along))
    shapes = [None if t is None else tuple(t.shape) for t in pushed]
    expected = [tuple(y.shape) if isinstance(y, Tensor) else None for y in outputs]
    if len(shapes) != len(expected) or any(s not in (None, e) for s, e in zip(shapes, expected, strict=True)):
        raise _refused(function, f"its jvp returns tangents of shapes {shapes} for outputs of shapes {expected}")
    return pushed


Rows = dict[int, Tensor]  # coefficients of one value by their places; those that are absent are not in it


def _rows(c: Coefficients) -> Rows:
    return dict(zip(range(len(c.tensor)) if c.rows is None else c.rows, c.tensor, strict=True)) if c else {}


def _coefficients(rows: Rows, space: Space, order: int) -> Coefficients:
    if not rows:
        return absent(space, order)
    places = tuple(sorted(rows))
    every = len(places) == space.count(order)
    return Coefficients(space, order, torch.stack([rows[n] for n in places]), None if every else places)


def _add(into: Rows, n: int, term: Tensor) -> None:
    into[n] = into[n] + term if n in into else term


def _by_jvp(space: Space, function: Any, args: Sequence[Any]) -> Any:
    of = [parts(a, space) for a in args]
    moving = [is_jet(a, space) for a in args]
    first, second = [_rows(c) for _, c, _ in of], [_rows(c) for _, _, c in of]
    crossed = space.order == 2 and any(first)
    draws = Draws(args)
    with autograd():
        inputs = [_copied(p) if m or _is_inference(p) else p for (p, _, _), m in zip(of, moving, strict=True)]
        before = [_copied(p) for p, _, _ in of] if crossed else []
        ctx, result = _run(function, inputs, moving)
        outputs = _sequence(result)
        _seen(function, outputs)
        y1, y2 = (_pushed_rows(function, ctx, inputs, rows, outputs) for rows in (first, second))
    if crossed:
        _confirm(_jvp_errs, space, function, before, moving, draws)
        with torch.random.fork_rng(devices=draws.devices):
            bent = _bent(space, function, before, first, outputs, y1, draws)
        for into, more in zip(y2, bent, strict=True):
            for n, term in more.items():
                _add(into, n, term)
    constant = {id(y) for y in ctx.non_differentiable}
    targets = _overwritten(args, inputs, ctx.dirty_tensors)
    made = []
    for y, rows1, rows2 in zip(outputs, y1, y2, strict=True):
        value = y
        if isinstance(y, Tensor) and id(y) not in constant:
            value = make(y, _coefficients(rows1, space, 1), _coefficients(rows2, space, 2), space)
        made.append(_store([targets[id(y)]], [value], space, targets[id(y)]) if id(y) in targets else value)
    return _returned(result, made)


def _is_inference(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_inference()


def _pushed_rows(
    function: Any, ctx: _Context, inputs: Sequence[Any], rows: Sequence[Rows], outputs: Sequence[Any]
) -> list[Rows]:
    """``J(x) c`` for each output and each of the coefficients c of the inputs that are there."""
    found: list[Rows] = [{} for _ in outputs]
    for n in sorted(set().union(*rows)):
        pushed = _pushed(function, ctx, inputs, [c.get(n) for c in rows], outputs)
        for into, y, t in zip(found, outputs, pushed, strict=True):
            if isinstance(y, Tensor) and t is not None:
                into[n] = t
    return found


def _bent(
    space: Space,
    function: Any,
    inputs: Sequence[Any],
    tangents: Sequence[Rows],
    outputs: Sequence[Any],
    pushed: Sequence[Rows],
    draws: Draws,
) -> list[Rows]:
    """``sum w d(J(x) x_i) x_j`` for each output and second coefficient: see `jetplane.jets.pairs`.

    It is jvp on jets, whose saved outputs move as jvp says that they do.

    Args:
        space: which second coefficients there are.
        function: the custom function.
        inputs: x.
        tangents: the x_i of each input.
        outputs: y.
        pushed: ``J(x) x_i`` of each output.
        draws: where random numbers stood when forward ran.
    """
    there = set().union(*tangents)
    partners: dict[int, list[Term]] = {}
    for term in space.structure.terms():
        if term.i in there and term.j in there:
            partners.setdefault(term.i, []).append(term)
    found: list[Rows] = [{} for _ in outputs]
    for i, terms in partners.items():
        js = sorted({term.j for term in terms})
        inner = Space(Diagonal(len(js)), 1, space.level + 1, keys=space.keys)
        lifted = functools.partial(_lifted, inner, js)
        draws.again()
        try:
            moving = [bool(c) for c in tangents]
            known = list(map(lifted, outputs, pushed))
            ctx, _ = _run(function, list(map(lifted, inputs, tangents)), moving, known)
            along = [c.get(i) for c in tangents]
            for into, result in zip(found, _pushed(function, ctx, inputs, along, outputs), strict=True):
                jet = promoted(result) if isinstance(result, Tensor) else None
                bent = _rows(parts(result if jet is None else jet, inner)[1])
                for n, _, j, weight in terms:
                    if js.index(j) in bent:
                        _add(into, n, weight * bent[js.index(j)])
        except (RuntimeError, TypeError) as error:
            why = f"its jvp cannot be differentiated once more for the curvature ({_first_line(error)})"
            raise _refused(function, why) from error
        finally:
            forget_promoted(inner)
    return found


def _lifted(inner: Space, js: Sequence[int], x: Any, c: Rows) -> Any:
    """A copy of x that moves along some of the directions in c."""
    if not c:
        return _copied(x)
    moves = _coefficients({m: c[j] for m, j in enumerate(js) if j in c}, inner, 1)
    return make(x.clone(), moves, absent(inner, 2), inner)


# --- by backward ------------------------------------------------------------------------------------------------


def _by_backward(space: Space, function: Any, args: Sequence[Any]) -> Any:
    if forbidden():
        raise _refused(function, "jetplane.strict() forbids to take them from its backward pass")
    moving = [is_jet(a, space) for a in args]
    targets: dict[int, Any] = {}

    def call(*inner: Any) -> Any:
        with EnableTorchFunction(), _refusing(_refused(function, CAPTURED)):
            result = _apply(function, *inner)
        outputs = _sequence(result)
        _seen(function, outputs)
        written = _overwritten(args, inner, outputs)  # torch returns others that are passed on as views
        targets.update({n: written[id(y)] for n, y in enumerate(outputs) if id(y) in written})
        return result

    try:
        if space.order == 2 and any(parts(a, space)[1] for a in args):
            _confirm(_backward_errs, space, function, [parts(a, space)[0] for a in args], moving, Draws(args))
        result = reverse_over_reverse(call, space, args, {})
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, DerivativeError):
            raise
        twice = "twice " if space.order == 2 else ""
        raise _refused(function, f"autograd cannot differentiate it {twice}({_first_line(error)})") from error
    announce(function, f"the custom autograd function {function.__qualname__} has no jvp, but a backward pass")
    outputs = enumerate(_sequence(result))
    return _returned(result, [_store([targets[n]], [y], space, targets[n]) if n in targets else y for n, y in outputs])


# --- second derivatives are measured once -----------------------------------------------------------------------

STEP = 1e-4  # of the differences, relative to inputs, in double precision
AGREED = 1e-4  # relative difference up to which a second derivative is taken to be that of the first
SETTLED = 1e-3  # the same between quotients of two steps; where they differ more there is a kink between the points

_confirmed: weakref.WeakKeyDictionary[type, set[Any]] = weakref.WeakKeyDictionary()
Errs = Callable[[Space, Any, Sequence[Any], Sequence[bool], Draws], bool]


def _confirm(
    errs: Errs, space: Space, function: Any, args: Sequence[Any], moving: Sequence[bool], draws: Draws
) -> None:
    """Hold the second derivative of a function against differences of its first, in double precision.

    Raises:
        DerivativeError: they disagree, or the function does not run in double precision.
    """
    kinds = tuple(map(_kind, args, moving))
    if kinds in _confirmed.setdefault(function, set()):
        return
    with autograd(), torch.random.fork_rng(devices=draws.devices):
        try:
            wrong = errs(space, function, tree_map(_double, list(args)), moving, draws)
        except (RuntimeError, TypeError) as error:
            why = f"its second derivative could not be checked in double precision ({_first_line(error)})"
            raise _refused(function, why + FIRST_ONLY) from error
    if wrong:
        why = (
            "its second derivative is not that of its first: it saves results of its own that torch takes for "
            "constants, leaves torch, or is not the derivative of anything"
        )
        raise _refused(function, why + FIRST_ONLY)
    _confirmed[function].add(kinds)


def _kind(x: Any, moves: bool) -> Any:
    if isinstance(x, Tensor):
        return moves, x.dim()
    return x if isinstance(x, (int, float, str)) else type(x)


FIRST_ONLY = "; curvature='ggn' or 'none' needs its first derivative alone"


def _double(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_complex():
        return x.detach().to(torch.complex128, copy=True)
    return x.detach().to(torch.float64 if x.is_floating_point() else x.dtype, copy=True)


def _random(xs: Sequence[Any], moving: Sequence[bool], seed: int) -> list[Tensor | None]:
    """A random direction of the inputs that move, of about their size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) * (1 + x.abs().mean()) if m else None
        for x, m in zip(xs, moving, strict=True)
    ]


def _moved(xs: Sequence[Any], v: Sequence[Tensor | None], h: float) -> list[Any]:
    return [_copied(x) if t is None else x + h * t for x, t in zip(xs, v, strict=True)]


def _differ(claimed: Sequence[Tensor | None], at: Callable[[float], Sequence[Tensor | None]]) -> bool:
    """Whether ``d at(h) / dh`` at 0 is another than claimed, where it exists; None is zero."""

    def quotients(h: float) -> list[Tensor | None]:
        return [None if a is None or b is None else (a - b) / (2 * h) for a, b in zip(at(h), at(-h), strict=True)]

    size = max((float(t.abs().max()) for t in at(0.0) if t is not None and t.numel()), default=0.0)
    for c, far, near in zip(claimed, quotients(STEP), quotients(STEP / 10), strict=True):
        if far is None or near is None:
            continue
        c = torch.zeros_like(near) if c is None else c
        largest = torch.maximum(near.abs(), c.abs())
        if not largest.numel():
            continue
        rounding = 1e-7 * size
        settled = (far - near).abs() <= SETTLED * near.abs() + rounding  # false where either is not finite
        wrong = (near - c).abs() > AGREED * largest.where(settled, 0).max() + rounding
        if bool((wrong & settled).any()):
            return True
    return False


def _jvp_errs(space: Space, function: Any, xs: Sequence[Any], moving: Sequence[bool], draws: Draws) -> bool:
    v, w = _random(xs, moving, 0), _random(xs, moving, 1)

    def pushed(at: Sequence[Any], *tangents: Sequence[Tensor | None]) -> tuple[Sequence[Any], list[Any]]:
        draws.again()
        with torch.no_grad():
            given = [_copied(x) for x in at]  # a function may overwrite what it is given
            ctx, result = _run(function, given, moving)
            return _sequence(result), [_pushed(function, ctx, given, t, _sequence(result)) for t in tangents]

    outputs, both = pushed(xs, v, w)
    star = Space(Star(2), 1, space.level, keys=space.keys)  # the second coefficient of v and w
    tangents: list[Rows] = [{} if a is None or b is None else {0: a, 1: b} for a, b in zip(v, w, strict=True)]
    first = [
        {n: t[o] for n, t in enumerate(both) if isinstance(y, Tensor) and t[o] is not None}
        for o, y in enumerate(outputs)
    ]
    with forward_only():
        crossed = [c.get(0) for c in _bent(star, function, xs, tangents, outputs, first, draws)]
    return _differ(crossed, lambda h: pushed(_moved(xs, w, h), v)[1][0]) or _differ(
        crossed, lambda h: pushed(_moved(xs, v, h), w)[1][0]
    )


def _backward_errs(space: Space, function: Any, xs: Sequence[Any], moving: Sequence[bool], draws: Draws) -> bool:
    r = _random(xs, moving, 0)

    def gradient(h: float) -> tuple[list[Tensor], list[Tensor | None]]:
        """The inputs that move, at ``x + h r``, and the gradient there of a fixed random sum of the outputs."""
        draws.again()
        leaves = [x.requires_grad_() if m else x for x, m in zip(_moved(xs, r, h), moving, strict=True)]
        given = [_copied(x) for x in leaves]  # leaves may not be written to
        outputs = _sequence(_apply(function, *given))
        total = _contracted([y for y in outputs if isinstance(y, Tensor) and y.requires_grad])
        wanted = [x for x, m in zip(leaves, moving, strict=True) if m]
        return wanted, list(torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True))

    wanted, first = gradient(0.0)
    along = [t for t in r if t is not None]
    slope = [_dot(g, t) for g, t in zip(first, along, strict=True) if g is not None and g.requires_grad]
    claimed: Sequence[Tensor | None] = [None] * len(wanted)
    if slope:
        claimed = torch.autograd.grad(torch.stack(slope).sum(), wanted, allow_unused=True)
    return _differ(claimed, lambda h: [None if g is None else g.detach() for g in gradient(h)[1]])


def _dot(g: Tensor, t: Tensor) -> Tensor:
    return (g.conj() * t).real.sum() if g.is_complex() else (g * t).sum()


def _contracted(outputs: Sequence[Tensor]) -> Tensor:
    """A sum of all outputs with random weights, the same at each call."""
    generator = torch.Generator().manual_seed(2)
    reals = [torch.view_as_real(y) if y.is_complex() else y for y in outputs]
    weights = [torch.randn(y.shape, dtype=y.dtype, generator=generator).to(y.device) for y in reals]
    return torch.stack([(y * w).sum() for y, w in zip(reals, weights, strict=True)]).sum()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# --- interception -------------------------------------------------------------------------------------------


class _Stack(threading.local):
    """What makes jets of parameters in this thread, one for each evaluation under way, the outermost first."""

    def __init__(self) -> None:
        self.seeded: tuple[Callable[[Any], Any], ...] = ()
        self.refusal: DerivativeError | None = None


_stack = _Stack()


def seeded(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with jets in place of the parameters of the evaluations under way in this thread."""
    for each in reversed(_stack.seeded):
        args = tuple(map(each, args))
    return args


@contextlib.contextmanager
def _refusing(refusal: DerivativeError) -> Iterator[None]:
    """A forward pass that torch runs with grad mode off: a parameter that it uses would count as a constant."""
    before, _stack.refusal = _stack.refusal, refusal
    try:
        yield
    finally:
        _stack.refusal = before


def refuse_captured() -> None:
    """Called where a parameter is used while derivatives stop: raise if a custom function captured it.

    Raises:
        DerivativeError: a custom function's forward pass is under way.
    """
    if _stack.refusal is not None:
        raise _stack.refusal


def _seeded_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return seeded(args), dict(zip(kwargs, seeded(tuple(kwargs.values())), strict=True))


def inside_transforms(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A custom function inside ``torch.func`` transforms, which torch calls by an operator instead of ``apply``."""
    args, kwargs = _seeded_call(args, kwargs)
    if any(map(_carries, (*args, *kwargs.values()))):
        return _on_jets(function, args, kwargs)
    with DisableTorchFunction():
        return custom_function_call(function, *args, **kwargs)


@classmethod
def _intercepted(function: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _seeded_call(args, kwargs)
    if not torch.is_grad_enabled():  # the user's own code has switched derivatives off
        args, kwargs = tree_map(innermost, (args, kwargs))
    if any(map(_carries, (*args, *kwargs.values()))):
        return _on_jets(function, args, kwargs)
    if any(isinstance(a, Tensor) and in_graph(a) for a in args):
        with recording(torch.is_grad_enabled()):  # no jets: torch's own graph goes through it
            return _apply(function, *args, **kwargs)
    return _apply(function, *args, **kwargs)


class _Replacement:
    """What ``torch.autograd.Function.apply`` calls, replaced while any thread evaluates, and put back when none does.

    It is replaced below ``apply`` itself, so that an ``apply`` that somebody took earlier (``relu = ReLU.apply``), or
    replaced, comes here too. All threads share it, counted under a lock, since their evaluations may end in another
    order than they began. Which thread's calls are intercepted is up to that thread's own `_Stack`. Torch is as it was
    between evaluations, which a replacement made once at import would not give.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                FunctionBase.apply = _intercepted

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                del FunctionBase.apply  # torch's own is inherited


_replacement = _Replacement()


@contextlib.contextmanager
def intercept_functions(seed: Callable[[Any], Any]) -> Iterator[None]:
    """In this thread, custom autograd functions that jets reach go to `_on_jets`, not to their forward.

    Args:
        seed: replaces parameters of the evaluation by their jets, in one argument of a call.
    """
    before = _stack.seeded
    _replacement.acquire()
    _stack.seeded = (*before, seed)
    try:
        yield
    finally:
        _stack.seeded = before
        _replacement.release()
