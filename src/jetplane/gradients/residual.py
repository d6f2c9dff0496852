"""The error of the loss, carried down a residual stream: no derivative crosses a block.

The blocks of a transformer add to a stream that the read-out reads in the end; post-norm ones normalize the sum,

    x_i = N_i(x_{i-1} + f_i(x_{i-1})),    i = 1, ..., L,    loss = l(x_L)

with N_i the identity in pre-norm ones. The derivative of the loss at its end, e_L, is exact: it comes from the loss,
the read-out and the last norm. Below, f_i counts as a constant in the derivative of x_i with respect to x_{i-1}, which
is that of the norm then, and one without a norm, so that the same error reaches the output of every block,

    e_{i-1} = (d N_i)^T e_i,    estimate_i = (d f_i / d theta_i)^T (d N_i)^T e_i

with the exact derivative within the block, or within each of the sublayers that a block adds, attention or feed-forward
network. It is exact for what follows the last block and for the last block, and biased elsewhere; what a plane makes of
it is judged by the model's loss. What comes before the first block is taken together with it.

All blocks have their errors at once: none waits for the one above it. With ``recompute`` a first pass, without graphs
within blocks, finds the errors, and a second one, in the order of the forward pass, finishes each block where it ends,
so that what is kept does not grow with their number.

Sources: the derivative of the identity that dominates residual networks, He and others, arXiv 1603.05027, equation 5;
the residual stream, Elhage and others, "A mathematical framework for transformer circuits", 2021; direct feedback,
Nøkland, arXiv 1609.01596, whose fixed random matrices the stream replaces; local losses for each block of layers, arXiv
1901.06656.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import DisableTorchFunction, tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..errors import ArgumentError, JetplaneWarning, LossError, warn_user
from ..evaluation.compilers import eager
from ..evaluation.leaving import HARMLESS, WeakTensors
from ..evaluation.side_effects import without_side_effects
from ..rules.grad_mode import autograd
from .allocation import signature
from .estimators import Batch, Estimate, Estimator, State, model_of
from .residual_blocks import ADDING, Pair, find_blocks, is_norm, is_state, normed
from .tape import pack, unpack

Part = Literal["block", "sublayer"]
_OTHERWISE = "take jetplane.gradients.LocalHeads() or jetplane.gradients.ActivityPerturbation()"


@final
@dataclass(frozen=True)
class ResidualStream(Estimator):
    """The error at the end of a residual stream, for all blocks that add to it: see `jetplane.gradients.residual`.

    Blocks are modules that put out one of their inputs with something added that depends on it, and maybe the sum's
    norm (``layer_norm``, ``rms_norm``): a layer of `torch.nn.TransformerEncoder`, of BERT, GPT-2 or Llama, a residual
    module of your own. They are found in the first step, by what the closure computes. What is not within a block has
    the exact derivative, as by reverse mode; so has what a block reads beside the stream (the memory of a decoder).
    Parameters that the loss does not depend on stay, which a warning says.

    Attributes:
        exact: within what the derivative is exact: "block", or "sublayer" for each part that a block adds.
        recompute: find the errors in an extra pass, so that what one block needs is kept at a time (in the first step
            what all blocks add, too; of norms of the stream, their inputs); by default the extra pass is saved, and
            what all blocks need is kept until the loss is computed, as in reverse mode.
        blocks: names of the blocks in the model (`torch.nn.Module.named_modules`); None for those that are found.

    Raises:
        ArgumentError: ``exact`` is something else; (in the first step) no blocks are found, a module of ``blocks`` is
            none, or parameters are not reached; (with ``recompute``) a block reads what an earlier one has put out in
            another way than by the stream.

    >>> import torch, jetplane as jp
    >>> from torch.nn import functional as F
    >>> _ = torch.manual_seed(0)
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    >>> encoder = torch.nn.TransformerEncoder(layer, 3, torch.nn.LayerNorm(16), enable_nested_tensor=False)
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 16), encoder, torch.nn.Linear(16, 5))
    >>> x = torch.randint(5, (32, 6))
    >>> opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=jp.gradients.ResidualStream())
    >>> y = (2 * x + 1).flatten() % 5
    >>> losses = [opt.step(lambda: F.cross_entropy(model(x).flatten(0, 1), y)) for _ in range(48)]
    >>> bool(losses[-1] < 0.5 * losses[0])
    True
    """

    exact: Part = "block"
    recompute: bool = False
    blocks: Sequence[str] | None = None
    alone = True

    def __post_init__(self) -> None:
        if self.exact not in get_args(Part):
            raise ArgumentError(f"exact must be 'block' or 'sublayer', got {self.exact!r}")
        if isinstance(self.blocks, str) or not all(isinstance(name, str) for name in self.blocks or ()):
            raise ArgumentError(f"blocks must be a list of names of modules, or None, got {self.blocks!r}")

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """See `Estimator`: which parameters move, and of which layers they are.

        Raises:
            ArgumentError: there is no model.
        """
        if model is None:
            raise ArgumentError("ResidualStream needs the model whose blocks it looks for: PlaneSearch(params, model)")
        return signature(model, params)

    def prepare(self, batch: Batch, state: State) -> State:
        """See `Estimator`: a pass finds the blocks, another which parameters the error reaches.

        Raises:
            ArgumentError: there are no blocks, or not those that were given, or the error does not reach parameters
                that the loss depends on.
        """
        model = model_of(batch)
        with without_side_effects(), eager(), autograd(not self.recompute):
            found = find_blocks(batch.closure, model, self.blocks)
        if not found:
            raise ArgumentError(
                f"no block of {type(model).__name__} puts out its input with something added, as those of a "
                f"transformer do. Put what is added in a module together with the sum, or {_OTHERWISE}"
            )
        state = {"blocks": {name: [[i, j, list(norms)] for i, j, norms in pairs] for name, pairs in found.items()}}
        left = self._left(batch, state)
        apart = left if self.exact == "block" else replace(self, exact="block")._left(batch, state)
        if len(apart) < len(left):
            raise ArgumentError(
                f"the error does not reach {len(left) - len(apart)} of {len(batch.params)} parameters where sublayers "
                f"are apart, of shapes {left}: what they make of the stream is added to it and read in one sublayer. "
                'Take exact="block"'
            )
        if len(left) == len(batch.params):
            raise ArgumentError("no derivative of the loss reaches any parameter: something detaches all of them")
        if left:
            warn_user(
                f"the loss depends on {len(left)} of {len(batch.params)} parameters, shapes {left}, in no way that a "
                "derivative follows: they stay",
                JetplaneWarning,
            )
        return state

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """See `Estimator`: those of the parameters, and the loss."""
        return [*(p.shape for p in batch.params), torch.Size(())]

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`."""
        with contextlib.nullcontext() if batch.plane is None else without_side_effects():
            found, loss = self._run(batch, state)
        return [*(torch.zeros_like(p) if g is None else g for p, g in zip(batch.params, found, strict=True)), loss]

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        return Estimate(means[:-1], state, means[-1])

    def _left(self, batch: Batch, state: State) -> list[tuple[int, ...]]:
        """The shapes of parameters that the error does not reach."""
        with without_side_effects():
            reached, _ = self._run(batch, state)
        return [tuple(p.shape) for p, g in zip(batch.params, reached, strict=True) if g is None]

    def _run(self, batch: Batch, state: State) -> tuple[Sequence[Tensor | None], Tensor]:
        """The estimate, None for what is not reached, and the loss."""
        blocks = {name: [(i, j, tuple(norms)) for i, j, norms in pairs] for name, pairs in state["blocks"].items()}
        model, params, apart = model_of(batch), list(batch.params), self.exact == "sublayer"
        with eager(), autograd():
            if not self.recompute:
                with _hooked(model, _Joined(blocks, apart)):
                    loss = _scalar(batch.closure())
                    return _gradients(loss, params), loss.detach().reshape(())
            first = _Errors(blocks)
            with without_side_effects(), _hooked(model, first), first:
                loss = _scalar(batch.closure())
                *outside, _ = _gradients(loss, [*params, first.token])
            del loss
            second = _Finished(blocks, apart, params, outside, first.errors)
            with _hooked(model, second):
                loss = _scalar(batch.closure())
            return second.total, loss.detach().reshape(())


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise LossError(f"the closure must return a scalar loss, got {type(loss).__name__}")
    return loss


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * len(inputs)


# --- blocks in a pass ------------------------------------------------------------------------------------------


class _Join(torch.autograd.Function):
    """What a block puts out; its error also goes to what the block began with, past the block.

    With a token, which requires a gradient so that errors come here, the error is told and does not enter the block.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor | None, token: Tensor | None, tell: Any) -> Tensor:
        ctx.dtype, ctx.tell = None if x is None else x.dtype, tell
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Any:
        (e,) = errors
        past = None if ctx.dtype is None else e.to(ctx.dtype)
        if ctx.tell is None:
            return e, past, None, None
        ctx.tell(e)
        return None, past, e.new_zeros(()), None


def _above(x: Tensor) -> bool:
    """Whether a tensor comes from what a block has put out."""
    waiting, met = [x.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        if node.name() == "_JoinBackward":
            return True
        met.add(node)
        waiting += [source for source, _ in node.next_functions]
    return False


@contextlib.contextmanager
def _hooked(model: nn.Module, run: _Joined) -> Iterator[None]:
    """Tell a pass of the calls of its blocks."""
    modules = dict(model.named_modules())
    with run.calls, contextlib.ExitStack() as stack:
        for name in run.blocks:
            enter = functools.partial(run.enter, name)
            stack.callback(modules[name].register_forward_pre_hook(enter, with_kwargs=True).remove)
            leave = functools.partial(run.leave, name)
            stack.callback(modules[name].register_forward_hook(leave, always_call=True).remove)
        yield


@dataclass
class _Call:
    """A call of a block that has not ended.

    Attributes:
        begun: with what it began, by places of its arguments; None where no other block is below it.
        ends: to be closed with it.
        stream: what follows the stream in it, where norms or sublayers apart need that.
    """

    begun: dict[int, Tensor | None]
    ends: contextlib.ExitStack
    stream: _Stream | None


class _Joined:
    """A pass with the graphs of all blocks: each begins at a constant, and its error goes past it.

    Args:
        blocks: their pairs by their names.
        apart: whether sublayers are apart.

    Attributes:
        calls: what is to be closed where the pass ends, of calls that have not.
    """

    def __init__(self, blocks: Mapping[str, Sequence[Pair]], apart: bool) -> None:
        self.blocks = blocks
        self.calls = contextlib.ExitStack()
        self._apart = apart
        self._open: list[_Call] = []

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A block is called; returns its arguments."""
        with DisableTorchFunction():
            flat, spec = tree_flatten((args, kwargs))
            ends = self.calls.enter_context(contextlib.ExitStack())
            call = _Call({}, ends, None)
            self._open.append(call)
            for i, _, _ in self.blocks[name]:
                if not (i < len(flat) and is_state(flat[i])):
                    raise _changed(name)
                call.begun[i] = flat[i] if _above(flat[i]) else None
                flat[i] = self._start(flat[i], call.begun[i] is None)
            self._within(ends)
            norms = {n for _, _, found in self.blocks[name] for n in found}
            if norms or self._apart:
                begun = {flat[i]: x for i, x in call.begun.items()}
                call.stream = ends.enter_context(_Stream(begun, norms, self._apart, self._goes_past()))
            return tree_unflatten(flat, spec)

    def leave(self, name: str, module: nn.Module, args: Any, out: Any) -> Any:
        """Its call ends; returns what it puts out."""
        call = self._open.pop()
        call.ends.close()
        if out is None:  # an error ends it, or a checkpoint that has all that it needs
            return None
        with DisableTorchFunction():
            flat, spec = tree_flatten(out)
            joined: dict[int, Tensor | None] = {}
            for i, j, norms in self.blocks[name]:
                if not (j < len(flat) and is_state(flat[j])):
                    raise _changed(name)
                x = call.begun[i]
                if x is not None and norms and call.stream is not None:
                    x = call.stream.past(flat[j], name)
                if x is not None and x.shape != flat[j].shape:
                    raise _changed(name)
                joined[j] = x
            return tree_unflatten(self._end(flat, joined), spec)

    def _start(self, x: Tensor, first: bool) -> Tensor:
        """With what a block begins, given whether no other block is below it."""
        return x if first else x.detach()

    def _within(self, ends: contextlib.ExitStack) -> None:
        """Enter what holds until the call ends."""

    def _goes_past(self) -> bool:
        """Whether the error of the call that has begun goes past it."""
        return True

    def _end(self, flat: list[Any], joined: Mapping[int, Tensor | None]) -> list[Any]:
        """What leaves a block, with what each of its sums began with; None in the first block."""
        return [_Join.apply(y, joined[j], None, None) if j in joined else y for j, y in enumerate(flat)]


def _changed(name: str) -> ArgumentError:
    return ArgumentError(f"block {name} is called, or puts out, in another way than in the first step")


@final
class _Errors(_Joined, TorchFunctionMode):
    """A pass without graphs within blocks, which is told the errors at all that blocks put out.

    Attributes:
        token: the derivative with respect to it asks for all errors.
        errors: at what blocks put out, in the order of calls; None where the loss does not depend on it.
    """

    def __init__(self, blocks: Mapping[str, Sequence[Pair]]) -> None:
        TorchFunctionMode.__init__(self)
        _Joined.__init__(self, blocks, False)
        self.token = torch.zeros((), requires_grad=True)
        self.errors: list[Tensor | None] = []
        self._inside = WeakTensors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in HARMLESS:
            with DisableTorchFunction():
                given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                if any(_above(t) for t in given) if self._open else any(t in self._inside for t in given):
                    raise ArgumentError(
                        "with recompute a block may read of earlier blocks the stream alone, and others may read of a "
                        "block what it puts out alone; here they read more. Take ResidualStream(recompute=False)"
                    )
                for y in tree_leaves(result) if self._open else ():
                    if _is_real(y) and not any(y is t for t in given):
                        self._inside.add(y)
        return result

    def _start(self, x: Tensor, first: bool) -> Tensor:
        return x.detach()

    def _within(self, ends: contextlib.ExitStack) -> None:
        ends.enter_context(torch.no_grad())

    def _end(self, flat: list[Any], joined: Mapping[int, Tensor | None]) -> list[Any]:
        if self._open:
            return flat
        found = []
        for j, y in enumerate(flat):
            if _is_real(y):
                self.errors.append(None)
                tell = functools.partial(self.errors.__setitem__, len(self.errors) - 1)
                y = _Join.apply(y.detach(), joined.get(j), self.token, tell)
            found.append(y)
        return found


@final
class _Finished(_Joined):
    """A pass in which the error at each block's end is known, so that it is finished there.

    Args:
        blocks: their pairs by their names.
        apart: whether sublayers are apart.
        params: those that move.
        outside: gradients of what is outside of blocks.
        errors: at all that blocks put out, in the order of calls.

    Attributes:
        total: gradients.
    """

    def __init__(
        self, blocks: Mapping[str, Sequence[Pair]], apart: bool, params: Sequence[Tensor],
        outside: Sequence[Tensor | None], errors: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        super().__init__(blocks, apart)
        self.total = list(outside)
        self._params = params
        self._errors = iter(errors)

    def _within(self, ends: contextlib.ExitStack) -> None:
        ends.enter_context(saved_tensors_hooks(pack, unpack))  # a checkpoint around the block would run it again

    def _goes_past(self) -> bool:
        return len(self._open) > 1

    def _end(self, flat: list[Any], joined: Mapping[int, Tensor | None]) -> list[Any]:
        if self._open:
            return super()._end(flat, joined)
        ends = [(y, next(self._errors, None)) for y in flat if _is_real(y)]
        known = [(y, e) for y, e in ends if e is not None and y.requires_grad]
        if known:
            outputs, errors = zip(*known, strict=True)
            own = torch.autograd.grad(outputs, self._params, errors, retain_graph=True, allow_unused=True)
            self.total = [g if h is None else h if g is None else g + h for g, h in zip(self.total, own, strict=True)]
        return [_Join.apply(y.detach().requires_grad_(), None, None, None) if _is_real(y) else y for y in flat]


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@final
class _Stream(TorchFunctionMode):
    """Functions in a block, followed along its stream: what it begins with, and sums with that and norms of these.

    For each tensor of the stream there is one that its error goes to past the block: with what the block begins, or
    the last norm of the stream, in a graph of norms and sums with constants.

    Where sublayers are apart there is another, that they read: no derivative goes from a sublayer to the stream. A sum
    with what does not depend on the stream, as with an embedding of positions, is read with the derivative of the
    latter, a norm with that of its own parameters.

    Args:
        begun: with what the block begins, and what that was outside of it; None where it is read as it is.
        norms: the places of the norms of the stream among all calls of norms.
        apart: whether sublayers are apart.
        goes_past: whether errors go past the block.
    """

    def __init__(
        self, begun: Mapping[Tensor, Tensor | None], norms: Collection[int], apart: bool, goes_past: bool
    ) -> None:  # fmt: skip
        super().__init__()
        past = {x: outside if goes_past else None for x, outside in begun.items()}
        self._past: Any = WeakTensorKeyDictionary(past)
        self._read: Any = WeakTensorKeyDictionary(
            {x: x if outside is None else x.detach() for x, outside in begun.items()} if apart else {}
        )
        self._derived = WeakTensors()
        self._norms, self._apart, self._met = norms, apart, 0

    def past(self, y: Tensor, name: str) -> Tensor | None:
        """What the error of the block's output goes to past the block."""
        if y not in self._past:
            raise _changed(name)
        return self._past[y]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HARMLESS:
            return func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        stream = [t for t in given if t in self._past]
        reads = self._reads((args, kwargs))
        if stream and getattr(func, "__name__", "") in ADDING:
            whole = len(stream) > 1 or any(t in self._derived for t in given)
            read = torch.add(*reads[0], **reads[1]) if self._apart and not whole else None
            past = self._past[stream[0]]
            result = func(*args, **kwargs)  # may write to what is read
            self._past[result] = past
            if self._apart:
                self._read[result] = result.detach() if read is None else read
            return result
        if is_norm(func):
            self._met += 1
            if self._met - 1 in self._norms and normed(args, kwargs)[0] in self._past:
                return self._normed(func, args, kwargs, reads)
        result = func(*reads[0], **reads[1])
        if stream or any(t in self._derived for t in given):
            for y in tree_leaves(result):
                if isinstance(y, Tensor):
                    self._derived.add(y)
        return result

    def _reads(self, given: Any) -> Any:
        """Arguments as sublayers read them."""
        return tree_map(lambda t: self._read[t] if isinstance(t, Tensor) and t in self._read else t, given)

    def _normed(self, func: Any, args: Any, kwargs: Any, reads: Any) -> Tensor:
        """A norm of the stream."""
        result, (x, rest) = func(*args, **kwargs), normed(args, kwargs)
        with DisableTorchFunction():
            past = self._past[x]
            if past is not None:
                others = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, rest)
                with torch.enable_grad():
                    past = func(_Join.apply(x.detach(), past, None, None), *others[0], **others[1])
            self._past[result] = past
            if self._apart:
                self._read[result] = func(*reads[0], **reads[1])
        return result
