"""What leaves an evaluation: ordinary tensors, of which those that carried derivatives may not enter a later one.

A closure may keep tensors that it computed: features for logging, hidden states, tables. Where its evaluation ends,
every jet that somebody still holds becomes, as the same Python object, an ordinary tensor of its value. Jets of an
evaluation inside of another one become jets of the outer one.

Such a tensor is a constant for a later evaluation. If it carried derivatives these would be lost there without a word,
where reverse mode goes through a graph of an earlier step and raises. So it is remembered, weakly, and raises where a
later evaluation computes with it; ``detach()`` gives a tensor that may enter.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._sharding import is_sharded
from .._torch import swap_tensors, transform_level, tree_leaves
from ..errors import DerivativeError
from ..jets import Jet, Space, absent, forget_promoted, promoted
from ..rules import higher_order
from ..rules.functions import intercept_functions
from ..rules.grad_mode import forward_only
from . import compilers, inner
from .side_effects import undone


class WeakTensors:
    """A set of tensors, by identity, that keeps none of them alive. Safe under threads."""

    def __init__(self) -> None:
        self.known: dict[int, weakref.ref[Tensor]] = {}

    def add(self, x: Tensor) -> None:
        """Put a tensor in."""
        key = id(x)
        self.known[key] = weakref.ref(x, lambda gone: self._forget(key, gone))

    def discard(self, x: Tensor) -> None:
        """Take a tensor out, if it is there."""
        self.known.pop(id(x), None)

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        if self.known.get(key) is gone:  # another tensor may have taken its place
            self.known.pop(key, None)

    def __contains__(self, x: Tensor) -> bool:
        known = self.known.get(id(x))
        return known is not None and known() is x


earlier = WeakTensors()  # what carried derivatives in an evaluation that has ended


def release(space: Space) -> None:
    """Make ordinary tensors of all jets of an evaluation that ends, and of buffers that jets were written into."""
    buffers = {id(owner): owner for buffer in space.written if (owner := buffer()) is not None}
    for owner in buffers.values():
        jet = promoted(owner)
        if jet is None:
            continue
        if space.remembered and _carries(jet):
            earlier.add(owner)
        if space.recorded and jet.primal.requires_grad and not undone():
            owner.copy_(jet.primal)  # the values are there; as reverse mode, this puts them into the graph
    forget_promoted(space)
    made, space.made = space.made or (), None
    alive = [jet for known in made if (jet := known()) is not None]
    carrying = [_carries(jet) for jet in alive]  # before any changes, since views look at their base
    for jet, carried in zip(alive, carrying, strict=True):
        if isinstance(jet.primal, Jet):
            _into_outer(jet, jet.primal)
            continue
        if is_sharded(jet.primal):  # stood for an argument: see `jetplane.transforms.models`
            continue
        _into_ordinary(jet)
        if carried and space.remembered:
            earlier.add(jet)


def _carries(jet: Jet) -> bool:
    root = jet.root()
    return any((jet.first, jet.second, root.first, root.second))


def _into_outer(jet: Jet, value: Jet) -> None:
    """The jet of an inner evaluation becomes that of its value in the outer one, over the same memory."""
    jet.primal, jet.first, jet.second, jet.kind, jet.examples, jet.known = (
        value.primal, value.first, value.second, value.kind, value.examples, value.known
    )  # fmt: skip
    jet.space, jet.base, jet.version, jet.is_seed = value.space, value.root(), value.version, False
    if value.space.made is not None:
        value.space.made.append(weakref.ref(jet))


def _into_ordinary(jet: Jet) -> None:
    """The same Python object becomes an ordinary tensor of the jet's value, over the same memory.

    Another thread may use the tensor meanwhile: after each step it is either a jet or an ordinary tensor, for Python
    and for C++.
    """
    p = jet.primal
    plain = p.view_as(p) if jet.space.recorded and p.requires_grad else p.detach()
    kind, own = type(plain), dict(vars(plain))
    # What C++ holds, as the base of a view or in another thread's call, stays a jet, without derivatives.
    plain.__class__ = Jet  # type: ignore[assignment]
    nothing = dict.fromkeys(("base", "examples", "known"))
    bare = {"first": absent(jet.space, 1), "second": absent(jet.space, 2)} | nothing
    vars(plain).update(jet.__dict__ | bare)
    try:
        swap_tensors(jet, plain)
    except RuntimeError as error:
        raise DerivativeError(
            "a tensor that leaves an evaluation cannot become an ordinary one, since a part of torch refers to it "
            "weakly: torch.profiler does with record_shapes=True; profile without it"
        ) from error
    jet.__class__ = kind  # type: ignore[assignment]
    jet.__dict__ = own  # type: ignore[assignment]


def plain_result(t: Tensor) -> Tensor:
    """A result of an outermost evaluation, checked to be an ordinary tensor.

    Raises:
        DerivativeError: it is a jet of an evaluation in another thread.
    """
    if isinstance(t, Jet):
        raise DerivativeError(
            "a tensor of an evaluation that still runs in another thread entered this one; detach() it in that thread"
        )
    return t


# --- entering a later evaluation ------------------------------------------------------------------------------------

# Functions of tensors whose results have no derivatives, or that only ask.
_HARMLESS_NAMES = """
    detach item tolist numpy __array__ __dlpack__ __dlpack_device__ data_ptr untyped_storage storage
    __repr__ __format__ __len__ __bool__ __float__ __int__ __index__ __complex__ __hash__ __contains__
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ greater greater_equal less less_equal not_equal
    equal allclose isclose isnan isinf isfinite isneginf isposinf isreal is_nonzero
    all any logical_and logical_or logical_not logical_xor argmax argmin argsort
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like
    new_zeros new_ones new_full new_empty new_empty_strided bernoulli multinomial
    size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex
    is_signed is_conj is_neg is_inference is_same_size is_set_to get_device requires_grad_
""".split()
_DIFFERENTIABLE_GETTERS = {"T", "mT", "H", "mH", "real", "imag"}


def _found(names: Iterable[str]) -> set[Callable[..., Any]]:
    return {f for name in names for f in (getattr(torch, name, None), getattr(Tensor, name, None)) if f is not None}


HARMLESS = _found(_HARMLESS_NAMES) | {
    attribute.__get__
    for name in dir(torch._C.TensorBase)
    if type(attribute := getattr(torch._C.TensorBase, name)).__name__ == "getset_descriptor"
    and name not in _DIFFERENTIABLE_GETTERS
}
# Functions after which nothing is left of what a tensor was.
_OVERWRITING = _found(["detach_", "zero_", "fill_", "copy_", "normal_", "uniform_", "bernoulli_", "random_"])


def check_entering(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A call inside of an evaluation: none of its arguments may have carried derivatives in an earlier one.

    Args:
        func: the function.
        args: of the call.
        kwargs: likewise.

    Raises:
        DerivativeError: one of them has.
    """
    if not torch.is_grad_enabled() or func in HARMLESS:
        return
    out = kwargs.get("out")
    for x in out if isinstance(out, (list, tuple)) else (out, args[0] if args and _overwrites(func, args) else None):
        if isinstance(x, Tensor):
            earlier.discard(x)
    for x in (*args, *kwargs.values()):
        _check(x)


def _overwrites(func: Any, args: Any) -> bool:
    """Whether nothing of the first argument is left."""
    if func is not Tensor.__setitem__:
        return func in _OVERWRITING
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(i is ... or (isinstance(i, slice) and i == slice(None)) for i in index)


def _check(x: Any) -> None:
    if isinstance(x, Tensor):
        if x in earlier:
            raise DerivativeError(
                f"a tensor of shape {tuple(x.shape)} was made from parameters by an earlier evaluation: here it "
                "would count as a constant, and in reverse mode its graph would be gone. If a constant is meant (a "
                "hidden state, a running average), detach() it and keep the result; otherwise compute it again"
            )
    elif isinstance(x, (list, tuple)):
        for item in x:
            _check(item)
    elif isinstance(x, dict):
        for item in x.values():
            _check(item)


# --- plain runs of a closure beside evaluations -----------------------------------------------------------------------


class _PlainRun(TorchFunctionMode):
    """Runs functions as an evaluation does, refuses what it refuses, and sees what depends on parameters.

    Args:
        params: of the evaluations around this run.
        watching: whether it sees to what depends on parameters.
    """

    def __init__(self, params: Sequence[Tensor], watching: bool) -> None:
        super().__init__()
        self.params = {id(p) for p in params}
        self.watching = watching
        self.moved: list[weakref.ref[Tensor]] = []
        self.known = WeakTensors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if higher_order.is_higher_order(func):
            with self:
                return higher_order.run(func, args, kwargs)
        watching = self.watching and func not in HARMLESS and torch.is_grad_enabled()
        if watching and earlier.known:
            check_entering(func, args, kwargs)
        moved = watching and any(map(self._depends, (*args, *kwargs.values())))
        if transform_level() is None:
            with inner.recording(func, args, kwargs, self.params):
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if moved:
            for x in (*tree_leaves(result), args[0] if func is Tensor.__setitem__ else None):
                if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and id(x) not in self.params:
                    self.known.add(x)
                    self.moved.append(weakref.ref(x))
        return result

    def _depends(self, x: Any) -> bool:
        if isinstance(x, Tensor):
            return id(x) in self.params or x in self.known
        if isinstance(x, (list, tuple)):
            return any(map(self._depends, x))
        return isinstance(x, dict) and any(map(self._depends, x.values()))


@contextlib.contextmanager
def plain_run(params: Sequence[Tensor], again: bool = False) -> Iterator[None]:
    """Run a closure without jets, in all else as evaluations do: below autograd, and with compiled code run eagerly.

    What depends on parameters may not enter a later evaluation, or a run like this one.

    Args:
        params: of the evaluations around this run.
        again: an evaluation has run the closure before. Where that has left nothing behind, nothing is watched.

    Raises:
        DerivativeError: something of an earlier evaluation is computed with, or what an evaluation refuses.
    """
    run = _PlainRun(params, watching=not again or bool(earlier.known))
    try:
        with compilers.eager(), forward_only(), intercept_functions(lambda x: x), run:
            yield
    finally:
        for x in (known() for known in run.moved):
            if x is not None:
                earlier.add(x)
