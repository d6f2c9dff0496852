"""Losses that are written by hand, for Gauss-Newton curvature: linear in squares or log-probabilities of the model.

    L = sum_t <w_t, f_t(x_t)>,    L_ij = sum_t <w_t, f_t''(x_t)[x_i, x_j]>

with f a square, a ``log_softmax``, a ``softplus`` or a ``logsigmoid``. ``(a - b).square().mean()`` calls no loss
function, and ``nll_loss`` of a ``log_softmax`` one without curvature. So tensors remember of which functions they are
linear functions (`Term`), through constant factors, masks, views, selections and sums. Where one element is left, what
remains to be done is done backwards on its weight, 1, which gives the w_t.

Models take such sums too, as in a norm. So this is a kind of its own (`jetplane.jets.TOTAL`): where the sum meets data
or an output of the model, or enters a loss function, its second coefficients are dropped, and it is a part of the
model like any other. Where slopes alone are taken, as by estimators of the gradient, the sum knows its examples' parts.
Beside exact curvature nothing is remembered: penalties and functions without noise would be taken for losses of
examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..jets import TOTAL, Coefficients, Jet, Space, absent, carried, is_jet, make, outer, parts, precise
from . import examples
from .losses import weighed_softmax
from .registry import operator

Back = Callable[[Tensor], Tensor]
Curved = Callable[[Space, Any, Tensor], tuple[Coefficients, Coefficients, Tensor]]


@dataclass(frozen=True)
class Term:
    """A function of an output of the model, of which a tensor is a linear function.

    Attributes:
        curved: slope and curvature of ``<w, f(x)>``, and its derivative in x, from x and w.
        x: the output.
        version: how often x had been written to.
        back: from a weight of the tensor to that of f(x).
    """

    curved: Curved
    x: Jet
    version: int
    back: Back

    @staticmethod
    def of(curved: Curved, x: Jet, back: Back = lambda w: w) -> Term:
        """``f(x)``, or what is made of it at once."""
        return Term(curved, x, x.root().version, back)

    def then(self, back: Back) -> Term:
        """The same after one more linear function."""
        return replace(self, back=lambda w: self.back(back(w)))


@dataclass(frozen=True)
class Known:
    """What a tensor is made of.

    Attributes:
        terms: it is the sum of linear functions of these.
        version: how often the tensor had been written to.
        root: it is the root of that sum, as a norm is.
    """

    terms: tuple[Term, ...]
    version: int
    root: bool = False


def follow(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
    """The result of an operator of the model: with what it is made of, or, of one element, as a loss."""
    if func in _SEVERAL:
        for i, part in enumerate(result):
            _noted(part, space, _selected(func, space, args, kwargs, i))
        return result
    rule = _RULES.get(func)
    if rule is None or not is_jet(result, space) or not result.numel():
        return result
    terms = rule(func, space, args, kwargs)
    if terms and func not in _ROOTS and (result.dim() == 0 or (result.numel() == 1 and rule is _sum)):
        return _total(space, terms, result)
    return _noted(result, space, terms, func in _ROOTS)


def as_loss(x: Any, space: Space) -> Any:
    """What a closure returns: of one element and made of terms, a loss."""
    terms = _terms(x, space) if space.tells_kinds and is_jet(x, space) and x.numel() == 1 else ()
    return _total(space, terms, x) if terms else x


def made_of_terms(x: Any, space: Space) -> bool:
    """Whether a tensor is a linear function of curved ones, so that linear losses of it have curvature."""
    return bool(_terms(x, space))


def _noted(result: Any, space: Space, terms: Sequence[Term], root: bool = False) -> Any:
    if terms and is_jet(result, space):
        result.known = Known(tuple(terms), result.root().version, root)
    return result


def _terms(x: Any, space: Space, root: bool = False) -> tuple[Term, ...]:
    """The terms of a tensor, unless it or what they are of was written to since."""
    known = x.known if is_jet(x, space) else None
    if known is None or known.root != root or known.version != x.root().version:
        return ()
    return known.terms if all(term.version == term.x.root().version for term in known.terms) else ()


def _total(space: Space, terms: Sequence[Term], total: Jet) -> Jet:
    """The loss of one element that the terms add up to, with its examples; its value is known."""
    before = space.order, space.kind
    space.order, space.kind = 2 if space.gauss_newton else 1, TOTAL
    try:
        value, slope, curvature, apart = total.primal, absent(space, 1), absent(space, 2), []
        one = torch.ones(value.shape, dtype=carried(value.dtype), device=value.device)
        for term in terms:
            x = term.x if space.entrance is None else space.entrance.into_loss(term.x, space)
            if x.is_complex():
                x = torch.view_as_real(x)
            first, second, d1 = term.curved(space, x, term.back(one))
            slope, curvature = slope + first, curvature + second
            apart.append(examples.of(space, parts(x, space)[1], d1))
        if space.gauss_newton:
            slope, curvature = (c.moved(lambda t: t.reshape(len(t), *value.shape)) for c in (slope, curvature))
            total = make(value, slope, curvature, space)  # type: ignore[assignment]
        if space.examples:
            total.examples = examples.added(apart)
        return total
    finally:
        space.order, space.kind = before


# --- curved functions -----------------------------------------------------------------------------------------------


def _of_square(space: Space, x: Any, w: Tensor) -> tuple[Coefficients, Coefficients, Tensor]:
    p, x1, _ = parts(x, space)
    d2 = (2 * (w.unsqueeze(-1) if w.dim() < p.dim() else w)).expand(p.shape)  # complex: of both parts
    return _summed(space, x1, d2 * precise(p), d2)


def _of_log_softmax(dim: int) -> Curved:
    def curved(space: Space, x: Any, w: Tensor) -> tuple[Coefficients, Coefficients, Tensor]:
        p, x1, x2 = parts(x, space)
        if not space.gauss_newton:
            d1 = w - torch.softmax(precise(p), dim) * w.sum(dim, keepdim=True)
            return x1.total(d1), x2, d1
        return weighed_softmax(space, p, x1, -w, dim)

    return curved


def _of_softplus(space: Space, x: Any, w: Tensor) -> tuple[Coefficients, Coefficients, Tensor]:
    p, x1, _ = parts(x, space)
    s = torch.sigmoid(precise(p))
    return _summed(space, x1, w * s, w * s * (1 - s))


def _of_log_sigmoid(space: Space, x: Any, w: Tensor) -> tuple[Coefficients, Coefficients, Tensor]:
    p, x1, _ = parts(x, space)
    s = torch.sigmoid(-precise(p))
    return _summed(space, x1, w * s, -w * s * (1 - s))


def _summed(space: Space, x1: Coefficients, d1: Tensor, d2: Tensor) -> tuple[Coefficients, Coefficients, Tensor]:
    curvature = outer(x1 * d2, x1).total() if space.gauss_newton else absent(space, 2)
    return x1.total(d1), curvature, d1


# --- operators that make terms --------------------------------------------------------------------------------------

Rule = Callable[[Any, Space, Sequence[Any], dict[str, Any]], Sequence[Term]]


def _squared(x: Any, space: Space) -> Sequence[Term]:
    """The terms of ``x**2``."""
    if not is_jet(x, space):
        return ()
    terms = _terms(x, space, root=True)
    return terms or (() if x.is_complex() else (Term.of(_of_square, x),))


def _square(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    return _squared(args[0], space) if len(args) == 1 or args[1] == 2 else ()


def _modulus(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    """Terms of the square of ``abs(x)``."""
    return (Term.of(_of_square, args[0]),)


def _norm(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    """Terms of the square of a Euclidean norm."""
    x, order, dim, keepdim = _given(args, 2, None, False)
    if order != 2 or kwargs.get("dtype") is not None:
        return ()
    return (Term.of(_of_square, x, _spread(x.shape, dim, keepdim)),)


def _log_softmax(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    x = args[0]
    if x.dim() == 0 or (len(args) > 2 and isinstance(args[2], torch.dtype) and args[2] != x.dtype):
        return ()
    return (Term.of(_of_log_softmax(args[1] % x.dim()), x),)


def _softplus(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    return () if len(args) > 1 and args[1] != 1 else (Term.of(_of_softplus, args[0]),)


def _logsigmoid(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    return (Term.of(_of_log_sigmoid, args[0]),)


def _inner(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    """``x x^T`` of rows, as ``einsum`` takes the sum of squares."""
    x, y = args
    if is_jet(x, space) and is_jet(y, space) and x.shape[-2] == 1 and _is_same(x.mT, y):
        return (Term.of(_of_square, x, lambda w: w.expand(x.shape)),)
    return ()


def _is_same(x: Jet, y: Jet) -> bool:
    """Whether two tensors look at the same numbers in the same order."""
    if x.root() is not y.root() or x.shape != y.shape or x.storage_offset() != y.storage_offset():
        return False
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in strides)


# --- linear operators -----------------------------------------------------------------------------------------------


def _product(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    x, y = args
    if is_jet(x, space) and is_jet(y, space):
        return _squared(x, space) if x is y or _is_same(x, y) else ()
    x, factor = (x, y) if is_jet(x, space) else (y, x)
    return _scaled(_terms(x, space), x, lambda w: w * factor)


def _quotient(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    x, divisor = args
    return () if isinstance(divisor, Jet) else _scaled(_terms(x, space), x, lambda w: w / divisor)


def _negative(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    return [term.then(torch.neg) for term in _terms(args[0], space)]


def _scaled(terms: Iterable[Term], x: Any, back: Back) -> Sequence[Term]:
    """The terms of an operator that may have repeated x, to the result's shape."""
    return [term.then(lambda w: back(w).sum_to_size(x.shape)) for term in terms]


def _added(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    """Both have terms, or one is a constant."""
    found, scale = [], kwargs.get("alpha", 1) * (-1 if "sub" in func._schema.name else 1)
    turned = "rsub" in func._schema.name
    for x, factor in zip(args, (scale, 1) if turned else (1, scale), strict=False):
        terms = _terms(x, space)
        if isinstance(x, Jet) and not terms:
            return ()
        found += _scaled(terms, x, lambda w, factor=factor: w * factor)
    return found


def _where(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    condition, found = args[0], []
    for x, takes in ((args[1], condition), (args[2], ~condition)):
        terms = _terms(x, space)
        if isinstance(x, Jet) and not terms:
            return ()
        found += _scaled(terms, x, lambda w, takes=takes: torch.where(takes, w, 0))
    return found


def _masked_fill(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    x, mask, value = args
    return () if isinstance(value, Jet) else _scaled(_terms(x, space), x, lambda w: w.masked_fill(mask, 0))


def _sum(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    x, dim, keepdim = _given(args, None, False)
    terms = _terms(x, space)
    if not terms or kwargs.get("dtype") not in (None, x.dtype):
        return ()
    back = _spread(x.shape, dim, keepdim)
    if "mean" in func._schema.name:
        count = math.prod(x.shape[d] for d in _dims(x.shape, dim))
        return [term.then(lambda w: back(w) / count) for term in terms]
    return [term.then(back) for term in terms]


def _given(args: Sequence[Any], *defaults: Any) -> list[Any]:
    """The arguments of an operator, of which only the first has to be given."""
    return [*args, *defaults[len(args) - 1 :]]


def _dims(shape: torch.Size, dim: Any) -> list[int]:
    """The axes that a sum over dimensions takes; None and none of them are all."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(len(shape)))
    return [d % len(shape) for d in dims] if shape else []


def _spread(shape: torch.Size, dim: Any, keepdim: bool) -> Back:
    """From the weight of a sum to that of its summands."""
    kept = [1 if d in _dims(shape, dim) else size for d, size in enumerate(shape)]
    return lambda w: w.reshape(kept).expand(shape)


def _selection(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    return _selected(func, space, args, kwargs)


def _selected(
    func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any], part: int | None = None
) -> Sequence[Term]:
    """Where elements are only taken, moved or repeated, places tell which."""
    x = args[0]

    def back(w: Tensor) -> Tensor:
        places = func(torch.arange(x.numel(), device=w.device).reshape(x.shape), *args[1:], **kwargs)
        places = places if part is None else places[part]
        return w.new_zeros(x.numel()).index_add(0, places.reshape(-1), w.reshape(-1)).reshape(x.shape)

    return [term.then(back) for term in _terms(x, space)]


def _copied(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    return [term.then(lambda w: w) for term in _terms(args[0], space)]


def _joined(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Term]:
    """Side by side, ``cat`` or ``stack``; some may be constants."""
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    found, start, stacked = [], 0, "stack" in func._schema.name
    for x in tensors:
        if not stacked and x.shape == (0,):
            continue  # as torch does, whatever the dimension
        terms = _terms(x, space)
        if isinstance(x, Jet) and not terms:
            return ()
        size = 1 if stacked else x.shape[dim]

        def back(w: Tensor, start: int = start, size: int = size, shape: torch.Size = x.shape) -> Tensor:
            return w.narrow(dim, start, size).reshape(shape)

        found += [term.then(back) for term in terms]
        start += size
    return found


def _table(rule: Rule, names: str) -> dict[Any, Rule]:
    return {operator(name): rule for name in names.split()}


_ROOTS = _table(_modulus, "abs") | _table(_norm, "linalg_vector_norm")
_SEVERAL = _table(_selection, "split.Tensor split_with_sizes chunk unbind.int")
_RULES: dict[Any, Rule] = _ROOTS | {
    op: rule
    for rule, names in {
        _square: "square pow.Tensor_Scalar",
        _log_softmax: "log_softmax.int _log_softmax special_log_softmax",
        _softplus: "softplus",
        _logsigmoid: "log_sigmoid",
        _inner: "bmm mm",
        _product: "mul.Tensor",
        _quotient: "div.Tensor",
        _negative: "neg",
        _added: "add.Tensor sub.Tensor rsub.Scalar rsub.Tensor",
        _where: "where.self where.ScalarOther where.ScalarSelf",
        _masked_fill: "masked_fill.Scalar masked_fill.Tensor",
        _sum: "sum sum.dim_IntList mean mean.dim",
        _selection: "view _unsafe_view reshape flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim "
        "squeeze.dims transpose.int t numpy_T mT permute movedim.int select.int slice.Tensor narrow index.Tensor "
        "index_select masked_select gather take expand diagonal flip",
        _copied: "clone contiguous alias _to_copy to.dtype to.dtype_layout to.device to.other",
        _joined: "cat stack",
    }.items()
    for op, rule in _table(rule, names).items()
}
