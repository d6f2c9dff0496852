"""Memory that jets share: views, in-place writes, and plain buffers that jets were written into.

Coefficients are replaced, never written to: other jets may share them. A write rebinds those of the jet that owns the
memory, its *base*, and moves the base's version; views read theirs again when the version has moved.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .._torch import is_stand_in, memory_of
from ..errors import DerivativeError
from .coefficients import Coefficients, aligned, plain, writable
from .jet import WRITTEN, Jet, carried, innermost, is_jet, parts, set_refresh
from .space import Space

OUT_OF_PLACE = "use the out-of-place operation (torch.cat, torch.stack, torch.where, index_put)"


def _followed(x: Tensor) -> bool:
    """Whether views of a tensor can be found again by their place in memory; a compiler's stand-ins have places too."""
    return plain(x) or is_stand_in(type(x))


def _kind(x: Tensor) -> str:
    return "inside of derivatives of derivatives" if isinstance(x, Jet) else f"of a {type(x).__name__}"


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors look into one memory."""
    return memory_of(innermost(a)) == memory_of(innermost(b))


def mark_view(result: Any, source: Jet) -> Any:
    """Record that a result looks into the source's memory, so that later writes reach both."""
    if not isinstance(result, Tensor) or not same_storage(result, source):
        return result
    base = source.root()
    if not isinstance(result, Jet):  # a part of a buffer that has no coefficients yet
        return Jet(result, None, None, source.space, base) if not (source.first or source.second) else result
    if result.base is None:
        result.base, result.version = base, base.version
    return result


def write(target: Jet, value: Any, space: Space) -> Jet:
    """Overwrite a jet in place, so that everything which looks into its memory sees the change.

    Coefficients are replaced, never written to: other jets may share them. Views read theirs again
    from the base when its version has moved.

    Raises:
        DerivativeError: the target is a parameter of the evaluation, or its memory overlaps itself.
    """
    base = target.root()
    if base.is_seed:
        raise DerivativeError(WRITTEN)
    if any(s == 0 and n > 1 for n, s in zip(target.primal.shape, target.primal.stride(), strict=True)):
        raise DerivativeError("in-place write to an expanded tensor, whose elements share memory; clone() it first")
    p, first, second = parts(value, space)
    base.kind = target.kind = max(base.kind, value.kind if is_jet(value, space) else base.kind)
    parts(target, space)  # what is left of the old coefficients must be current
    parts(base, space)
    base.first = _replaced(base, target, base.first, first)
    base.second = _replaced(base, target, base.second, second)
    if p is not target.primal:
        if writable(base.primal, target.primal, p) and not base.is_argument:
            target.primal.copy_(p)
        else:
            _rebind(base, target, p)
    base.version += 1
    if target is base:
        return target
    _read_again(target)
    return target


def _rebind(base: Jet, target: Jet, p: Tensor) -> None:
    """Give the base a new primal in place of one that may not be written to: values of before are recorded in a graph.

    Views take theirs from it when they are read again. Plain memory that a jet stands for gets the values too.

    Raises:
        DerivativeError: a view inside of derivatives of derivatives, or of a tensor that wraps others.
    """
    if target is base:
        base.origin = base.primal if base.origin is None else base.origin
        base.primal = p.expand_as(base.primal)
    elif not (_followed(base.primal) and _followed(p)):
        kind = _kind(p if _followed(base.primal) else base.primal)
        raise DerivativeError(f"in-place write to a view, or into a buffer, {kind}; {OUT_OF_PLACE}")
    else:
        whole, view = base.primal, target.primal
        if base.origin is None:
            base.origin = whole
        if any(jet is base for jet in _here.jets.values()):
            with torch.no_grad():
                base.origin.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(p)
        extent = whole.storage_offset() + 1
        extent += sum((size - 1) * stride for size, stride in zip(whole.shape, whole.stride(), strict=True))
        memory = torch.empty(extent, dtype=whole.dtype, device=whole.device)
        fresh = memory.as_strided(whole.shape, whole.stride(), whole.storage_offset())
        if view.numel() < whole.numel():  # what is overwritten is left out of the graph
            fresh.copy_(whole)
        memory.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(p)
        base.primal = memory.as_strided(whole.shape, whole.stride(), whole.storage_offset())


def _replaced(base: Jet, view: Jet, held: Coefficients, new: Coefficients) -> Coefficients:
    """The base's coefficients with those of a view replaced."""
    if not held and not new:
        return held
    new = new.to(carried(base.dtype)).expanded(view.shape)
    if view is base:
        return new.disowned()
    if held and new:
        rows, kept, written = aligned(held, new)
    else:
        rows, kept, written = (held or new).rows, held.tensor if held else None, new.tensor if new else None
    count = (kept if written is None else written).shape[0]  # type: ignore[union-attr]
    out = _laid_out(kept, count, base.primal)
    region = _region(base, view.primal, out)
    region.zero_() if written is None else region.copy_(written)
    return Coefficients(held.space, held.order, out, rows)


def _read_again(view: Jet) -> None:
    """Read a view's coefficients again after somebody wrote into its base."""
    base = view.base
    assert base is not None
    if base.origin is not None and view.primal is not base.primal:
        view.primal = _seen_primal(base, view.primal)
    view.first, view.second = (_seen(base, view, name) for name in ("first", "second"))
    view.version = base.version


set_refresh(_read_again)


def _seen(base: Jet, view: Jet, name: str) -> Coefficients:
    """What a view sees of the base's coefficients, which are laid out as the primal for it."""
    held: Coefficients = getattr(base, name)
    if not held:
        return held
    if held.tensor.stride()[1:] != base.primal.stride():
        out = _laid_out(held.tensor, held.tensor.shape[0], base.primal)
        held = Coefficients(held.space, held.order, out, held.rows)
        setattr(base, name, held)
    return Coefficients(held.space, held.order, _region(base, view.primal, held.tensor), held.rows)


def _seen_primal(base: Jet, view: Tensor) -> Tensor:
    """What a view sees of a base whose primal is another one now."""
    if not _followed(base.primal) or base.primal.dtype != view.dtype or view.is_conj() or view.is_neg():
        raise DerivativeError("a view of a tensor that was written to in place since; take the view after the write")
    return base.primal.as_strided(view.shape, view.stride(), view.storage_offset())


def _region(base: Jet, view: Tensor, c: Tensor) -> Tensor:
    """The part of the base's coefficients, laid out as its primal, that a view of the primal covers."""
    origin = base.primal.storage_offset()
    if base.dtype.is_complex and not view.dtype.is_complex:  # real parts lie at every second number
        c, origin = torch.view_as_real(c), 2 * origin
    if carried(view.dtype) != c.dtype or view.is_conj() != base.primal.is_conj() or view.is_neg():
        raise DerivativeError("an in-place write through, or under, a conjugate view of complex numbers")
    start = view.storage_offset() - origin
    return c.as_strided((c.shape[0], *view.shape), (c.stride(0), *view.stride()), c.storage_offset() + start)


def _laid_out(c: Tensor | None, n: int, like: Tensor) -> Tensor:
    """Coefficients in memory of their own with the primal's strides; None is zero."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    out = torch.empty_strided((n, *like.shape), (extent, *like.stride()), dtype=carried(like.dtype), device=like.device)
    return out.zero_() if c is None else out.copy_(c)


class _Promotions(threading.local):
    """Plain buffers that a jet was written into, of one thread: storage -> a flat jet over the whole of it."""

    def __init__(self) -> None:
        self.jets: dict[int, Jet] = {}


_here = _Promotions()


def owner_of(x: Tensor) -> Tensor:
    """The tensor that a view looks into, or x itself."""
    return x._base if x._is_view() and x._base is not None else x


def promote(buffer: Tensor, space: Space) -> Jet:
    """The jet that stands for a plain tensor from now on, since a jet is about to be written into it."""
    if space.traced:
        raise DerivativeError(
            f"a tensor with derivatives is written into a buffer without, in compiled code; {OUT_OF_PLACE}"
        )
    key = memory_of(buffer)
    if key not in _here.jets:
        memory = buffer.untyped_storage()
        flat = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        flat = flat.set_(memory)  # type: ignore[call-overload]
        flat = flat.as_strided((memory.nbytes() // buffer.element_size(),), (1,), 0)
        _here.jets[key] = whole = Jet(flat, None, None, space)
        owner = owner_of(buffer)
        if space.recorded and owner.requires_grad:  # values of before are in the graph
            whole.origin, whole.primal = flat, owner.as_strided(flat.shape, (1,), 0).clone()
    jet = promoted(buffer)
    assert jet is not None
    return jet


def promoted(x: Tensor) -> Jet | None:
    """The jet over a plain tensor whose memory a jet was written into, or None."""
    if isinstance(x, Jet) or not _here.jets or x.layout is not torch.strided:
        return None
    root = _here.jets.get(memory_of(x))
    if root is None or root.dtype != x.dtype:
        return None
    view = Jet(x, None, None, root.space, root, kind=root.kind)
    _read_again(view)
    return view


def forget_promoted(space: Space) -> None:
    """End of an evaluation: its buffers are plain tensors again."""
    for key in [key for key, jet in _here.jets.items() if jet.space is space]:
        del _here.jets[key]


def promotions() -> set[int]:
    """The buffers that are jets now."""
    return set(_here.jets)


def forget_promotions(but: set[int]) -> None:
    """Take back promotions that were made since ``but`` was read."""
    for key in set(_here.jets) - but:
        del _here.jets[key]


def any_promoted() -> bool:
    """Whether plain arguments need a look at all."""
    return bool(_here.jets)


def promotion_state() -> dict[int, Jet]:
    """This thread's promoted buffers, for a thread that works for it to `adopt_promotions`."""
    return _here.jets


def adopt_promotions(state: dict[int, Jet]) -> None:
    """Let this thread see another one's promoted buffers."""
    _here.jets = state
