"""While a closure runs, parameters become jets wherever a torch function takes them, and exits are guarded."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import _sharding
from .. import rules as rules  # installs the dispatcher of jets
from ..directions import AbstractDirections
from ..errors import DerivativeError, JetplaneWarning, located
from ..jets import PARAMETER, Jet, Space, any_promoted, carried, innermost, parts, promoted
from ..rules import grad_mode, higher_order, sparse
from ..rules.dispatch import loss as mark_loss
from ..rules.functions import intercept_functions, refuse_captured
from . import gradient_hooks, leaving, sharded

# What torch and Python say where no class of several takes an operator.
NOBODY = ("handlers returned NotImplemented", "no implementation found for", "'Jet'")

# Ways out of torch on which a jet's coefficients would be lost.
_EXITS = {
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "a conversion to NumPy",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.data_ptr: "data_ptr()",
    torch.Tensor.__dlpack__: "DLPack",
    torch.Tensor.untyped_storage: "untyped_storage()",
}
# Questions about a parameter itself, which its jet would answer differently or no faster.
_QUERIES = {
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
}
# Numbers for people to read.
_SHOWING = {torch.Tensor.__repr__, torch.Tensor.__format__}
_ASIDE = _QUERIES | _SHOWING | gradient_hooks.REGISTERING
_REVERSE_MODE = {torch.autograd.grad: "torch.autograd.grad", torch.Tensor.backward: "backward()"}

LOSSES = {
    getattr(F, name)
    for name in dir(F)
    if name.endswith("_loss") or name in ("cross_entropy", "kl_div", "nll_loss")
    or name.startswith("binary_cross_entropy")
}  # fmt: skip


def _warn_if_flat(func: Any, result: Any, space: Space) -> Any:
    _, first, second = parts(result, space)
    if first and not second:
        hint = {
            "nll_loss": "; cross_entropy of the logits has one",
            "kl_div": "; mark log_softmax and kl_div",
        }
        warnings.warn(
            f"{func.__name__} has no curvature in its input: its part of the Gauss-Newton curvature is zero"
            + hint.get(func.__name__, ""),
            JetplaneWarning,
            stacklevel=2,
        )
    return result


class Interception(TorchFunctionMode):
    """Replaces registered parameters by their jets in the arguments of every torch function of this thread.

    Ways out of torch, on which derivatives would be lost, and reverse mode raise.

    Args:
        space: that of the evaluation.

    Attributes:
        used: the jets of the parameters that were used so far, by the parameters' identities.
        unmoved: the same of parameters that were used where derivatives stop.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.used: dict[int, Tensor] = {}
        self.unmoved: dict[int, Tensor] = {}
        self._unused: dict[int, Callable[[], Tensor]] = {}  # what makes the jet of a parameter at its first use

    def register(self, param: Tensor, index: int, directions: AbstractDirections, like: Tensor) -> None:
        """Let a parameter be replaced by its jet.

        Of a `DTensor` the local tensor is, and the parameter itself by a `DTensor` of that jet.

        Args:
            param: the parameter.
            index: its place among the directions' tangents.
            directions: what gives its tangents.
            like: the tensor for which they are drawn.
        """
        local = _sharding.local(param)
        self._unused[id(local)] = lambda: self._jet(local, index, directions, like)
        if local is not param:
            self._unused[id(param)] = lambda: _sharding.wrapped(self._replaced(local), param)

    def _jet(self, param: Tensor, index: int, directions: AbstractDirections, like: Tensor) -> Tensor:
        tangents = directions.structured(index, like)
        if tangents is None:  # no direction moves it
            return param.detach()
        jet = Jet(param.detach().as_subclass(Tensor), tangents.to(carried(param.dtype)), None, self.space)
        jet.is_seed, jet.kind = True, PARAMETER
        return jet.as_subclass(type(param))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Intercept whatever a user's function calls; errors say where in it they arose."""
        with intercept_functions(self._replaced), self:
            try:
                yield
            except DerivativeError as error:
                located(error)
                raise
            except TypeError as error:
                if not any(words in str(error) for words in NOBODY):
                    raise
                refused = DerivativeError(
                    "a tensor of a class of its own met one that depends on the parameters, and its class does not "
                    f"take it: {str(error).splitlines()[0]}. Take the plain tensor out of it, or detach() the other"
                )
                refused.__traceback__ = error.__traceback__
                located(refused)
                raise refused from error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASIDE:
            return self._aside(func, args, kwargs or {})
        if leaving.earlier.known:
            leaving.check_entering(func, args, kwargs or {})
        args = tuple(self._replaced(a) for a in args)
        kwargs = {name: self._replaced(a) for name, a in kwargs.items()} if kwargs else {}
        if func in _EXITS and args and isinstance(args[0], Jet):
            if grad_mode.stopped(args[0].space):
                return func(innermost(args[0]), *args[1:], **kwargs)
            raise DerivativeError(
                f"{_EXITS[func]} on a tensor of shape {tuple(args[0].shape)} that depends on the "
                "parameters: its derivatives would be lost. Stay in torch, or detach() the tensor first "
                "if they are not wanted"
            )
        if func in _REVERSE_MODE:
            raise DerivativeError(
                f"{_REVERSE_MODE[func]} inside a forward-only evaluation. A closure returns its loss and calls no "
                "backward(); for derivatives inside of it use jetplane.jet, jetplane.hvp or jetplane.laplacian"
            )
        if higher_order.is_higher_order(func):
            with self:  # the functions that it takes may capture parameters
                return higher_order.run(func, args, kwargs)
        if sparse.constant(func, args):
            with grad_mode.autograd(), torch.no_grad():
                return func(*args, **kwargs)
        if self.space.gauss_newton and func in LOSSES:
            with mark_loss():
                return _warn_if_flat(func, func(*args, **kwargs), self.space)
        return func(*args, **kwargs)

    def _aside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call that asks about a tensor, shows its numbers, or registers a hook."""
        if func in gradient_hooks.REGISTERING:
            return gradient_hooks.registered(func, args, kwargs)
        if func in _SHOWING:
            return func(innermost(args[0]), *args[1:], **kwargs)
        if func in gradient_hooks.ASKED_FOR_HOOKS:
            gradient_hooks.announce_module()
        return func(*args, **kwargs)

    def _replaced(self, x: Any) -> Any:
        """An argument with every parameter in it, and every plain tensor over memory of jets, replaced by its jet."""
        if isinstance(x, Tensor):
            x = sharded.unwrapped(x)
            if (id(x) in self._unused or id(x) in self.used) and grad_mode.stopped(self.space):
                refuse_captured()
            if id(x) in self._unused and grad_mode.stopped(self.space):  # no tangents are drawn for it
                if id(x) not in self.unmoved:
                    here = _sharding.local(x)
                    bare = grad_mode.unmoved(here, self.space)
                    self.unmoved[id(x)] = bare if here is x else _sharding.wrapped(bare, x)
                return self.unmoved[id(x)]
            jet = self._unused.pop(id(x), None)  # what makes the jet looks at the parameter itself
            if jet is not None:
                self.used[id(x)] = jet()
            if id(x) in self.used:
                return self.used[id(x)]
            if any_promoted():
                of_memory = promoted(x)
                return x if of_memory is None else of_memory
            return x
        if isinstance(x, (list, tuple)):
            items = [self._replaced(v) for v in x]
            if all(a is b for a, b in zip(items, x, strict=True)):
                return x
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, dict):
            return {name: self._replaced(v) for name, v in x.items()}
        return x
