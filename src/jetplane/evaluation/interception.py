"""While a closure runs, its parameters are replaced by their jets, and ways out on which derivatives are lost raise.

Two modes of torch see what a closure does, in its own thread and in those that it gives work to. A function mode sees
the functions that it calls, with their arguments as the user wrote them. A dispatch mode sees every operator, whoever
calls it: scripted and traced modules, the batching rules of `torch.vmap`, the transforms of `torch.func`, C++
extensions. What reads a parameter's memory by its address is seen by neither: that is what `jetplane.audit` is for.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import _sharding
from .. import rules as rules  # installs the dispatcher of jets
from .._torch import (
    DisableTorchFunctionSubclass,
    TorchDispatchMode,
    nested_values,
    saved_tensors_hooks,
    transform_level,
)
from ..directions import AbstractDirections
from ..errors import DerivativeError, JetplaneWarning, MissingRuleError, located
from ..jets import (
    PARAMETER,
    Jet,
    Space,
    adopt_promotions,
    any_promoted,
    carried,
    detaching,
    innermost,
    parts,
    promoted,
    promotion_state,
    saving,
)
from ..rules import examples, grad_mode, higher_order, quantized, rounding, sparse
from ..rules.by_hand import made_of_terms
from ..rules.dispatch import inside_loss
from ..rules.dispatch import loss as mark_loss
from ..rules.functions import intercept_functions, refuse_captured
from ..rules.losses import linear_cross_entropy
from . import compilers, constructors, gradient_hooks, inner, leaving, sharded, threads
from .context import at_depth

# What torch and Python say where no class of several takes an operator, and where code looks for a jet's own memory.
NOBODY = ("handlers returned NotImplemented", "no implementation found for", "'Jet'", "jetplane.jets.jet.Jet")
IN_SCRIPT = "failed in the TorchScript interpreter"
RECOMPUTED = "torch.utils.checkpoint: Recomputed values"
INTERNAL = ("NestedTensorImpl", "INTERNAL ASSERT FAILED")  # of torch, which takes a jet for one of its own
NO_MEMORY = ("its data is not allocated yet", "instance of type Jet", "invalid python storage")

# Ways out of torch on which a jet's coefficients would be lost.
_EXITS = {
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "a conversion to NumPy",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.data_ptr: "data_ptr()",
    torch.Tensor.__dlpack__: "DLPack",
    torch.Tensor.untyped_storage: "untyped_storage()",
    torch.Tensor.storage: "storage()",
}
_ASIDE = threads.QUERIES | threads.SHOWING | gradient_hooks.REGISTERING
DETACHING = {torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]

LOSSES = {
    getattr(F, name)
    for name in dir(F)
    if name.endswith("_loss") or name in ("cross_entropy", "kl_div", "nll_loss")
    or name.startswith("binary_cross_entropy")
}  # fmt: skip

LINEAR_CROSS_ENTROPY = getattr(F, "linear_cross_entropy", linear_cross_entropy)  # from torch 2.13 on


def _warn_if_flat(func: Any, result: Any, space: Space) -> Any:
    _, first, second = parts(result, space)
    if first and not second:
        hint = {
            "nll_loss": "; it has one of logits, whose log_softmax comes just before, along the axis of classes",
            "kl_div": "; it has one of logits, whose log_softmax comes just before",
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

    Args:
        space: that of the evaluation.

    Attributes:
        used: the jets of the parameters that were used so far, by the parameters' identities.
        unmoved: the same of parameters that were used where derivatives stop.
        refused: what threads that do not take part in the evaluation wanted to do with its parameters.
        ended: whether the evaluation is over, or suspended: whoever runs under this interception is then left alone.
        failed: what the last operator that was refused has raised.
        lock: held by the thread whose operator is being carried: rules keep notes in the space.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.used: dict[int, Tensor] = {}
        self.unmoved: dict[int, Tensor] = {}
        self.refused: list[str] = []
        self.ended = False
        self.failed: DerivativeError | None = None
        self.lock = threading.RLock()
        self._params: list[Tensor] = []
        self._unused: dict[int, Callable[[], Tensor]] = {}  # what makes the jet of a parameter at its first use
        self._thread = threading.get_ident()
        self._around: Any = None  # a checkpoint around the whole evaluation

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
        self._params.append(param)
        self._unused[id(local)] = lambda: self._jet(local, index, directions, like)
        if local is not param:
            self._unused[id(param)] = lambda: _sharding.wrapped(self.replaced(local), param)

    def _jet(self, param: Tensor, index: int, directions: AbstractDirections, like: Tensor) -> Tensor:
        tangents = directions.structured(index, like)
        if tangents is None:  # no direction moves it
            return param.detach()
        jet = Jet(param.detach().as_subclass(Tensor), tangents.to(carried(param.dtype)), None, self.space)
        jet.is_seed, jet.kind = True, PARAMETER
        return jet.as_subclass(threads.own_class(param))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Intercept what a user's function does; errors say where in it they arose.

        Raises:
            DerivativeError: another thread used a parameter and did not take part.
        """
        operators = _Operators(self) if self._params else contextlib.nullcontext()
        self._around = saved_tensors_hooks(False)
        try:
            with threads.refusing(self._params, self), threads.under_way(self), operators, self._intercepting():
                yield
        except DerivativeError as error:
            located(error)
            raise
        except (TypeError, RuntimeError) as error:
            interpreted = IN_SCRIPT in str(error)
            refused = self.failed if interpreted and self.failed is not None else _translated(error)
            if refused is None:
                raise
            located(refused)
            raise refused from error
        finally:
            self.ended = True
        if self.refused:
            raise DerivativeError(self.refused[0])

    @contextlib.contextmanager
    def _intercepting(self) -> Iterator[None]:
        with intercept_functions(self.replaced), self:
            yield

    def in_worker(self) -> contextlib.AbstractContextManager[None]:
        """What another thread enters to take part in the evaluation of this one."""
        loss, quantization, promotions = inside_loss(), rounding.chosen(), promotion_state()

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            before = promotion_state()
            adopt_promotions(promotions)
            try:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(at_depth(self.space.level))
                    stack.enter_context(grad_mode.forward_only())
                    stack.enter_context(compilers.scripts_as_written())
                    stack.enter_context(threads.under_way(self))
                    stack.enter_context(_Operators(self))
                    stack.enter_context(self._intercepting())
                    stack.enter_context(rounding.adopted(quantization))
                    if loss:
                        stack.enter_context(mark_loss())
                    yield
            finally:
                adopt_promotions(before)

        return entered()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.ended:
            return func(*args, **kwargs)
        if func in _ASIDE:
            return self._aside(func, args, kwargs)
        if leaving.earlier.known:
            leaving.check_entering(func, args, kwargs)
        if transform_level() is None:  # else operators are intercepted where they meet the parameters themselves
            args = tuple(self.replaced(a) for a in args)
            kwargs = {name: self.replaced(a) for name, a in kwargs.items()} if kwargs else kwargs
        else:
            self.space.graph_lost = self.space.graph_lost or "a transform of torch.func"
        if func in _EXITS and args and isinstance(args[0], Jet):
            if grad_mode.stopped(args[0].space):
                return func(innermost(args[0]), *args[1:], **kwargs)
            raise DerivativeError(
                f"{_EXITS[func]} on a tensor of shape {tuple(args[0].shape)} that depends on the "
                "parameters: its derivatives would be lost. Use torch functions, or detach() the tensor first "
                "if they are not needed"
            )
        if func in DETACHING:
            with detaching():
                return func(*args, **kwargs)
        if higher_order.is_higher_order(func):
            with self:  # the functions that it takes may capture parameters
                return higher_order.run(func, args, kwargs)
        if func is LINEAR_CROSS_ENTROPY:
            with self:
                return linear_cross_entropy(*args, **kwargs)
        if sparse.constant(func, args):
            with grad_mode.autograd(), torch.no_grad():
                return func(*args, **kwargs)
        if quantized.quantizes_input(func, args):
            return quantized.layer(func, args, kwargs)
        if func in constructors.ALL:
            args, kwargs = constructors.of_numbers(func, args, kwargs)
        if func == _SET_DATA:
            args = self._given_data(*args)
        try:
            if self.space.recorded:
                inner.refuse(func)
                self._refuse_checkpoint(args)
            if transform_level() is not None:
                with saving():  # transforms keep results in graphs of their own
                    return self._called(func, args, kwargs)
            if self.space.recorded:
                return self._called(func, args, kwargs)
            with inner.recording(func, args, kwargs, lost=self.space.graph_lost):
                return self._called(func, args, kwargs)
        except MissingRuleError as error:
            if transform_level() is not None:
                raise DerivativeError(
                    f"{error}. This is inside a transform of torch.func: torch.func.grad, vjp, jacrev and vmap are "
                    "supported; jvp, jacfwd and hessian mostly are not. For second derivatives use jetplane.jet, "
                    "jetplane.hessian or jetplane.laplacian"
                ) from error
            raise

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.space.gauss_newton and func in LOSSES and not self._is_linear(func, args, kwargs):
            with mark_loss():
                return _warn_if_flat(func, func(*args, **kwargs), self.space)
        result = func(*args, **kwargs)
        if self.space.examples and func in LOSSES:
            examples.unreduced(result, self.space)
        return result

    def _refuse_checkpoint(self, args: Any) -> None:
        """Refuse a checkpoint within f whose way back would run a part of f again, where nothing has coefficients."""
        hooks = saved_tensors_hooks(False)
        if hooks is None or hooks[0].__module__ != "torch.utils.checkpoint" or self._around == hooks:
            return
        if any(isinstance(x, Tensor) and innermost(x).requires_grad for x in args):
            raise DerivativeError(
                "torch.utils.checkpoint(..., use_reentrant=False) within a function whose derivatives have a graph for "
                "reverse mode: backward() would run that part again without them. Call the part without checkpoint, "
                "put the checkpoint around the whole call of jetplane's function, or, where no graph is wanted, "
                "evaluate under torch.no_grad()"
            )

    def _is_linear(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a loss function of log-probabilities is linear in curved functions, and has no curvature but theirs.

        It is then an operator of the model like others, to be followed.
        """
        return func in (F.nll_loss, F.kl_div) and made_of_terms(args[0] if args else kwargs.get("input"), self.space)

    def _aside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call that asks about a tensor, shows its numbers, or registers a hook."""
        if func in gradient_hooks.REGISTERING:
            return gradient_hooks.registered(func, args, kwargs)
        if func in threads.SHOWING:
            return func(innermost(args[0]), *args[1:], **kwargs)
        if func in gradient_hooks.ASKED_FOR_HOOKS:
            gradient_hooks.announce_module()
        return func(*args, **kwargs)

    def _given_data(self, target: Any, value: Any) -> tuple[Any, Any]:
        """The arguments of ``target.data = value``, which stops derivatives."""
        if isinstance(target, Jet):
            raise DerivativeError(
                "the data of a parameter, or of a tensor that depends on one, is replaced inside the closure; "
                "expected a closure that does not replace it. Replace it before, or compute another tensor"
            )
        return target, innermost(value)

    def replaced(self, x: Any) -> Any:
        """An argument with every parameter in it, and every plain tensor over memory of jets, replaced by its jet."""
        if self.ended:
            return x
        if isinstance(x, Tensor):
            x = sharded.unwrapped(x)
            known = id(x) in self._unused or id(x) in self.used
            if known and grad_mode.stopped(self.space):
                refuse_captured()
                if id(x) in self._unused:  # no tangents are drawn for it
                    return self._stopped(x)
            jet = self._used(x) if known else promoted(x) if any_promoted() else None
            return x if jet is None else jet
        if isinstance(x, (list, tuple)):
            items = [self.replaced(v) for v in x]
            if all(a is b for a, b in zip(items, x, strict=True)):
                return x
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, dict):
            return {name: self.replaced(v) for name, v in x.items()}
        return x

    def meets(self, values: Iterable[Any]) -> bool:
        """Whether arguments of an operator may hold something to be replaced."""
        if any_promoted():
            return True
        for x in values:
            if isinstance(x, (list, tuple)):
                if self.meets(x):
                    return True
            elif id(x) in self._unused or id(x) in self.used or getattr(x, "is_nested", False):
                return True
        return False

    def _stopped(self, param: Tensor) -> Tensor:
        """What stands for a parameter that is first used where derivatives stop."""
        if id(param) not in self.unmoved:
            here = _sharding.local(param)
            bare = grad_mode.unmoved(here, self.space)
            self.unmoved[id(param)] = bare if here is param else _sharding.wrapped(bare, param)
        return self.unmoved[id(param)]

    def _used(self, param: Tensor) -> Tensor:
        """The jet of a parameter, from its first use on."""
        if id(param) in self.used:
            return self.used[id(param)]
        with self.lock:
            make = self._unused.pop(id(param), None)  # what makes the jet looks at the parameter itself
            if make is not None:
                with DisableTorchFunctionSubclass():
                    self.used[id(param)] = make()
            return self.used.get(id(param), param)


def _translated(error: BaseException) -> DerivativeError | None:
    """What an error of torch's means where it comes of a jet that was taken for something else."""
    text = str(error)
    if isinstance(error, TypeError) and any(words in text for words in NOBODY):
        refused = DerivativeError(
            "a tensor subclass was combined with a tensor that depends on the parameters, and the subclass does not "
            f"accept it: {text.splitlines()[0]}. Use the plain tensor inside the subclass, or detach() the other"
        )
    elif any(words in text for words in NO_MEMORY):
        refused = DerivativeError(
            "code outside torch, or a constructor that copies the values of tensors into a new tensor or parameter, "
            "received a tensor that depends on the parameters: its derivatives would be lost. Use torch.stack instead "
            "of a constructor, use torch functions, or detach() the tensor first if they are not needed"
        )
    elif RECOMPUTED in text:
        refused = DerivativeError(
            "torch.autograd.grad inside a forward-only evaluation goes through torch.utils.checkpoint, which "
            "recomputes outside the evaluation: call the function without checkpoint. An evaluation stores nothing for "
            "a backward pass"
        )
    elif any(words in text for words in INTERNAL):
        refused = DerivativeError(
            f"torch failed inside an operator on a tensor with derivatives: {text.splitlines()[0]} Nested "
            "tensors are supported with layout=torch.jagged; make them from a tensor that depends on the parameters "
            "with torch.nested.nested_tensor_from_jagged(values, offsets)"
        )
    else:
        return None
    return refused.with_traceback(error.__traceback__)


class _Operators(TorchDispatchMode):
    """Replaces parameters where operators meet them without a function of torch's having been called on them."""

    def __init__(self, interception: Interception) -> None:
        super().__init__()
        self._interception = interception

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what would make it skip imports a compiler, at the first operator, and costs time at each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        interception = self._interception
        if interception.ended:
            return func(*args, **kwargs)
        try:
            with interception.lock:
                return self._called(func, args, kwargs)
        except DerivativeError as error:
            interception.failed = error  # TorchScript's interpreter forgets it
            raise

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        interception = self._interception
        if not interception.meets((*args, *kwargs.values())):
            return func(*args, **kwargs)
        args, kwargs = interception.replaced(args), interception.replaced(kwargs)
        if func is nested_values and isinstance(args[0]._values, Jet):
            return args[0]._values  # torch detaches them where autograd does not see it
        return func(*args, **kwargs)
