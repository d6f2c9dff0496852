"""Each example's part of the slope: what a loss function adds up, kept apart.

A loss over a batch is ``L = sum_n L_n``. Its rule has the first coefficients of every example at hand when it
sums them, so the parts ``e[n, i] = grad(L_n) . v_i``, shape (N, K), cost one product more. A jet of one element
carries them as `Jet.examples` from there to the end of the closure, through what can follow on a loss: constant
factors, sums of losses, regularizers. Anything else makes them unknown, never wrong.

Losses that are not reduced (``reduction="none"``) may be weighed, reshaped and put side by side before they are added
up. `Jet.examples` is then an integer for each of those side by side, the length of its first axis. Adding them up is
adding their sums: where two are equally long, nobody knows whether they are of the same examples.

Sums of losses may be stacked and weighed before they are added up; `Jet.examples` is then a tuple, of each its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_leaves
from ..jets import LOSS, LOST, PARAMETER, Coefficients, Jet, Space, is_jet, parts, promoted
from .registry import ONE_ELEMENT


def keep(space: Space, total: Any, x1: Coefficients, weight: Tensor) -> Any:
    """Note the examples' parts of a loss ``sum(weight * x_i)``, both of shape (…, N, …), and return the loss.

    Those that are known already, by what the loss is made of, stay.
    """
    if is_jet(total, space) and total.examples is None and (found := of(space, x1, weight)) is not None:
        total.examples = found
    return total


def of(space: Space, x1: Coefficients, weight: Tensor) -> Tensor | None:
    """The examples' parts of ``sum(weight * x_i)``; None if they are not kept or there is no axis of examples."""
    if not (space.examples and x1 and weight.dim() > 0):
        return None
    n, rest = weight.shape[0], weight.shape[1:].numel()
    first = x1.full(weight.shape, x1.tensor.dtype, x1.tensor.device)
    apart = first.reshape(first.shape[0], n, rest)
    return torch.einsum("kni,ni->nk", apart, weight.reshape(n, rest).to(first.dtype))


def added(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The examples' parts of a sum of losses; None if those of a term are not known."""
    known = [t for t in terms if t is not None]
    return functools.reduce(lambda a, b: _sum(a, b, 1), known) if known and len(known) == len(terms) else None


def unreduced(result: Any, space: Space) -> None:
    """Note that a loss function has given the losses of examples, not their sum."""
    if is_jet(result, space) and result.dim() > 0 and result.examples is None:
        result.examples = torch.tensor([result.shape[0]])


def follow(func: Any, space: Space, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Tell a result whose examples it is made of, after the operator was carried."""
    of = [a for a in tree_leaves((args, kwargs)) if is_jet(a, space) and a.examples is not None]
    packet = func._schema.name.partition("::")[2]
    if not of:
        if space.gauss_newton and packet in ("sum", "mean") and _reduces_a_loss(result, args[0], space):
            share = torch.full_like(args[0].primal, 1 / args[0].numel() if packet == "mean" else 1)
            keep(space, result, parts(args[0], space)[1], share)
        return
    if packet in ("stack", "cat") and space.keys and isinstance(args[0], (list, tuple)) and is_jet(result, space):
        sums = [_of(x, space) for x in args[0] if x.numel() == 1]
        if len(sums) == len(args[0]) and not any(map(_is_apart, of)) and all(isinstance(t, Tensor) for t in sums):
            whole = sums[0] if len(sums) == 1 else tuple(sums)
            result.examples = LOST if any(t is LOST for t in sums) else whole
            return
    if any(isinstance(a.examples, tuple) for a in of):
        return _follow_stacked(packet.removesuffix("_"), space, args, kwargs, result)
    if any(_is_apart(a) for a in of):
        return _follow_apart(packet.removesuffix("_"), space, args, kwargs, result)
    for made in tree_leaves(result):
        if is_jet(made, space) and (made.examples is None or func._schema.is_mutable):
            # A target that was written to has new coefficients already: no longer those of its own term.
            gone = made.numel() != 1 or (func._schema.is_mutable and made.examples is None)
            made.examples = LOST if gone else _examples(packet.removesuffix("_"), space, args, kwargs)


def _is_apart(x: Jet) -> bool:
    """Whether it is a tensor of losses, which nobody has added up yet."""
    return isinstance(x.examples, Tensor) and not x.examples.is_floating_point()


def _follow_stacked(packet: str, space: Space, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """As `follow`, where an argument is a tensor of sums of losses."""
    x: Any = args[0]
    other: Any = args[1] if len(args) > 1 else None
    if packet == "mul" and not (is_jet(x, space) and isinstance(x.examples, tuple)):
        x, other = other, x
    known = x.examples if is_jet(x, space) else None
    for made in tree_leaves(result):
        if is_jet(made, space):
            made.examples = LOST
    if not isinstance(known, tuple) or not is_jet(result, space):
        return
    if packet in ("sum", "mean") and result.numel() == 1:
        total = functools.reduce(lambda a, b: _sum(a, b, 1), known)
        result.examples = total / len(known) if packet == "mean" else total
    elif packet in ("mul", "div") and not isinstance(other, Jet) and not kwargs and result.shape == x.shape:
        factors = torch.as_tensor(other, device=x.device).expand(x.shape).reshape(-1)
        result.examples = tuple(e * f if packet == "mul" else e / f for e, f in zip(known, factors, strict=True))


def _follow_apart(packet: str, space: Space, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """As `follow`, where an argument is a tensor of losses."""
    x = next(a for a in tree_leaves((args, kwargs)) if is_jet(a, space) and a.examples is not None and _is_apart(a))
    for made in tree_leaves(result):
        if is_jet(made, space):
            made.examples = LOST if made is not result else _lengths(packet, args, kwargs, x, made)
    if packet in ("sum", "mean") and is_jet(result, space) and result.numel() == 1:
        lengths: Any = x.examples
        result.examples = None
        share = 1 / max(x.numel(), 1) if packet == "mean" else 1
        keep(space, result, parts(x, space)[1], torch.full_like(x.primal, share))
        if result.examples is not None:
            pieces: Any = result.examples.split(lengths.tolist())
            result.examples = functools.reduce(lambda a, b: _sum(a, b, 1), pieces)


def _lengths(packet: str, args: Sequence[Any], kwargs: dict[str, Any], x: Jet, result: Jet) -> Tensor:
    """The lengths of what is made of losses x; `LOST` if its first axis may not count the same examples in order."""
    if packet == "cat":
        every, along = args[0], args[1] if len(args) > 1 else 0
        apart = all(isinstance(t, Jet) and _is_apart(t) for t in every)
        return torch.cat([t.examples for t in every]) if apart and along == 0 and not kwargs else LOST
    alike = result.shape == x.shape and not kwargs
    if alike and (
        packet in ("neg", "clone") or (packet in ("mul", "div") and not all(isinstance(a, Jet) for a in args))
    ):
        return x.examples  # type: ignore[return-value]
    if packet in ("view", "_unsafe_view", "reshape") and len(x.examples) == 1 and result.dim():  # type: ignore[arg-type]
        before, after = x.shape[0], result.shape[0]
        if after > 0 and (before % after == 0 or after % before == 0):
            return torch.tensor([after])
    return LOST


def _reduces_a_loss(result: Any, x: Any, space: Space) -> bool:
    if not (is_jet(result, space) and is_jet(x, space)):
        return False
    return result.kind == LOSS and result.numel() == 1 and x.dim() > 0 and result.examples is None


def _examples(packet: str, space: Space, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    x, other = args[0], args[1] if len(args) > 1 else None
    if packet in ("add", "sub"):
        sign = -1 if packet == "sub" else 1
        return _sum(_of(x, space), _of(other, space), sign * kwargs.get("alpha", 1))
    apart = x.examples if is_jet(x, space) else None
    if packet == "mul" and apart is None:
        apart, other = getattr(other, "examples", None), x
    if apart is None or apart is LOST:
        return LOST
    if packet in ONE_ELEMENT:
        return apart
    if packet == "neg":
        return -apart
    if packet in ("mul", "div") and not kwargs and not isinstance(other, Jet):
        factor = other.reshape(()) if isinstance(other, Tensor) else other
        return apart * factor if packet == "mul" else apart / factor
    return LOST


def _of(x: Any, space: Space) -> Tensor:
    """The examples of a term: (N, K), or one row for what is the same for all."""
    if not is_jet(x, space) or not x.first:
        return torch.zeros(1, space.k, device=x.device if isinstance(x, Tensor) else None)
    if x.examples is not None:
        return x.examples
    if space.tells_kinds and x.kind == PARAMETER:
        return x.first_tensor.reshape(1, -1)
    return LOST


def _sum(a: Tensor, b: Tensor, factor: Any) -> Tensor:
    if a is LOST or b is LOST or isinstance(factor, Jet):
        return LOST
    b = b * factor
    if len(a) == len(b):
        return a + b
    if 1 in (len(a), len(b)):  # a constant or a regularizer: an equal part of it to every example
        return a / max(1, len(b) // len(a)) + b / max(1, len(a) // len(b))
    return torch.cat([a, b])  # sums over different batches


def known(loss: Any, slope: Tensor) -> Tensor | None:
    """The examples' parts of an evaluated loss, if they are known and add up to its slope."""
    jet = promoted(loss)
    examples = (loss if jet is None else jet).examples
    return None if examples is LOST or isinstance(examples, tuple) else checked(examples, slope)


def checked(examples: Tensor | None, slope: Tensor) -> Tensor | None:
    """The examples' parts, if they add up to the slope, within rounding of the largest one's.

    A slope that is small beside others may be the difference of equal numbers within each example.
    """
    if examples is None:
        return None
    rounding = 64 * torch.finfo(examples.dtype).eps * examples.abs().sum(0).amax()
    return examples if bool(((examples.sum(0) - slope).abs() <= rounding + 1e-30).all()) else None
