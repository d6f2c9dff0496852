"""Models of which each rank holds a part: tensor parallelism by `DTensor`, and FSDP2.

A `DTensor` outside, a jet inside: torch decides how tensors are laid out and when ranks exchange parts of them, and
does the rest on local tensors, which may be jets. The collectives it calls have rules (`jetplane.rules.collectives`).

FSDP2 computes with whole copies of the parameters, which its hooks gather before a module runs and free after it. Each
copy becomes the jet of the parameter that it was gathered from: its tangents are drawn whole on every rank, and none is
ever sent.

At the update each rank draws the tangents of its own part alone, and moves it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._sharding import is_sharded
from .._torch import DisableTorchFunction, TorchDispatchMode, disable_current_modes, is_composite
from ..errors import DerivativeError
from ..rules.functions import differentiate_forward


def unwrapped(x: Any) -> Any:
    """The jet inside what a collective returns while it may still be under way: rules have waited for theirs."""
    return getattr(x, "elem", x) if type(x).__name__ == "AsyncCollectiveTensor" else x


def gathered(loss: Any) -> Any:
    """A loss that is a `DTensor`, as one number on every rank."""
    return loss.full_tensor() if is_sharded(loss) else loss


@contextlib.contextmanager
def running(params: Sequence[Tensor], gathered: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Let a closure run on jets of sharded parameters.

    Args:
        params: of the evaluation. Where none of them is sharded, nothing is done.
        gathered: called with a parameter and the whole copy of it that FSDP2 has made for a module.
    """
    if not any(map(is_sharded, params)):
        yield
        return
    _follow_layout_functions()
    with _gathering(params, gathered), _Watch():
        yield


@functools.cache
def _follow_layout_functions() -> None:
    """Changes of layout are written as autograd functions; their forward passes are made of what has rules."""
    from torch.distributed.tensor import _api, _redistribute

    for module, name in (
        (_api, "_FromTorchTensor"),
        (_api, "_ToTorchTensor"),
        (_redistribute, "Redistribute"),
        (_redistribute, "NestedRedistribute"),
    ):
        if hasattr(module, name):
            differentiate_forward(getattr(module, name))


class _Watch(TorchDispatchMode):
    """Breaks composite operators on `DTensor`s up, and sees FSDP2 gather what no hook of ours has seen.

    Above autograd `DTensor` never sees composites. It takes them, but finds worse layouts for them: a linear
    layer whose weight is split along its inputs gathered weight and inputs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fsdp":
            raise DerivativeError(
                "FSDP2 gathered parameters without a call of the module, as methods of "
                "register_fsdp_forward_method do: their copies would count as constants. Call the module itself"
            )
        if any(t.__name__ == "DTensor" for t in types) and is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


@contextlib.contextmanager
def _gathering(params: Sequence[Tensor], gathered: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Gather the parameters of FSDP2's modules ahead of its hooks, to see which copy is whose.

    FSDP2 leaves the root's copies in place after the forward pass, for the backward pass to come. None comes, and they
    would be out of date after the update: they are given back at the end.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        yield
        return
    known = {id(p) for p in params}
    trees: dict[int, list[Any]] = {}  # the modules of each model
    thread = threading.get_ident()

    def before(module: Any, args: Any) -> None:
        if not isinstance(module, fsdp.FSDPModule) or threading.get_ident() != thread:
            return
        # As outside of an evaluation: copies may be used for training by reverse mode later.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            DisableTorchFunction(),
            disable_current_modes(),
        ):
            state = module._get_fsdp_state()
            state._lazy_init()  # else its own hook will, among jets
            tree = state._state_ctx
            if id(tree) not in trees:  # copies that a pass before has left would not be seen
                trees[id(tree)] = [m for every in tree.all_states for m in every._modules]
                _give_back(trees[id(tree)])
            parts = dict(module.named_parameters(remove_duplicate=False))
            module.unshard()
            copies = dict(module.named_parameters(remove_duplicate=False))
        for name, part in parts.items():
            if copies[name] is not part and id(part) in known:
                gathered(part, copies[name])

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    whole = False
    try:
        yield
        whole = True
    finally:
        handle.remove()
        for modules in trees.values():
            if not whole and hasattr(
                modules[0], "reset_iter_state"
            ):  # in the middle of a pass, and the first is the root
                modules[0].reset_iter_state()
            _give_back(modules)


def give_back_copies(model: nn.Module) -> None:
    """Free the whole copies that FSDP2 has left in a model after a forward pass, so that its parameters are its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        _give_back([module for module in model.modules() if isinstance(module, fsdp.FSDPModule)])


def _give_back(modules: Sequence[Any]) -> None:
    """Free whole copies."""
    for module in modules:
        module.reshard()
