"""The error of the loss, carried down a residual stream: no derivative crosses a block.

The blocks of a residual network add to a stream that the read-out reads in the end,

    x_i = N_i(x_{i-1} + f_i(x_{i-1})),    i = 1, ..., L,    loss = l(x_L)

with N_i the identity in pre-norm transformers, a norm in post-norm ones, a ReLU in ResNets. The derivative of the loss
at its end, e_L, is exact: it comes from the loss, the read-out and the last norm. Below, f_i counts as a constant in
the derivative of x_i with respect to x_{i-1}, which is that of N_i then, so that without N_i the same error reaches the
output of every block,

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
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import DisableTorchFunction, graph_task, tree_flatten, tree_leaves, tree_map, tree_unflatten
from .._torch import saved_tensors_hooks as innermost_hooks
from ..errors import ArgumentError, JetplaneWarning, LossError, RandomClosureError, warn_user
from ..evaluation.compilers import eager
from ..evaluation.leaving import HARMLESS, WeakTensors
from ..evaluation.repeats import ADVICE, tolerance
from ..evaluation.side_effects import without_side_effects
from ..rules.grad_mode import autograd
from .allocation import signature
from .estimators import Batch, Estimate, Estimator, State, model_of
from .residual_blocks import ADDING, SUBTRACTING, Pair, find_blocks, is_map, is_state, is_transformed, mapped
from .tape import pack, unpack

Part = Literal["block", "sublayer"]
_OTHERWISE = "take jetplane.gradients.LocalHeads() or jetplane.gradients.ActivityPerturbation()"


@final
@dataclass(frozen=True)
class ResidualStream(Estimator):
    """The error at the end of a residual stream, for all blocks that add to it: see `jetplane.gradients.residual`.

    Blocks are modules that put out one of their inputs with something added that depends on it, and maybe
    ``layer_norm``, ``rms_norm`` or ``relu`` of the sum: a layer of `torch.nn.TransformerEncoder`, of BERT, GPT-2 or
    Llama, a block of a ResNet that does not change the shape, a residual module of your own. They are found in the
    first step, by what the closure computes. What is not within a block has the exact derivative, as by reverse mode;
    so has what a block reads beside the stream (the memory of a decoder). Parameters that the loss does not depend on
    stay, which a warning says.

    Attributes:
        exact: within what the derivative is exact: "block", or "sublayer" for each part that a block adds.
        recompute: find the errors in an extra pass, so that what one block needs is kept at a time (in the first step
            what all blocks add, too; norms and ReLUs of the stream keep a tensor each); by default the extra pass is
            saved, and what all blocks need is kept until the loss is computed, as in reverse mode.
        blocks: names of the blocks in the model (`torch.nn.Module.named_modules`); None for those that are found.

    Raises:
        ArgumentError: ``exact`` is something else; (in the first step) no blocks are found, a module of ``blocks`` is
            none, or parameters are not reached; (with ``recompute``) a block reads what an earlier one has put out in
            another way than by the stream; (with "sublayer") there is a checkpoint within a block; the closure takes a
            derivative through blocks.
        RandomClosureError: (with ``recompute``) the closure's two runs differ.

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
        if not isinstance(self.recompute, bool):
            raise ArgumentError(f"recompute must be True or False, got {self.recompute!r}")
        if self.blocks is not None and not _are_names(self.blocks):
            raise ArgumentError(f"blocks must be a list of names of modules, or None for all, got {self.blocks!r}")

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
        try:
            with without_side_effects(), eager(), autograd(not self.recompute):
                found = find_blocks(batch.closure, model, self.blocks)
        except RuntimeError as error:
            if not (self.recompute and "does not require grad" in str(error)):
                raise
            raise ArgumentError(
                "with recompute blocks run without graphs, and here the closure takes a derivative. Take "
                "ResidualStream(recompute=False) if it goes through no block, else "
                "jetplane.gradients.ActivityPerturbation()"
            ) from error
        if not found:
            raise ArgumentError(
                f"no block of {type(model).__name__} puts out its input with something added, as those of a "
                f"transformer do, in each of its calls and outside of torch.func. Put what is added in a module "
                f"together with the sum, or {_OTHERWISE}"
            )
        state = {"blocks": {name: [[i, j, list(maps)] for i, j, maps in pairs] for name, pairs in found.items()}}
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
                "derivative follows: they stay in steps where that is so",
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
        blocks = {name: [(i, j, tuple(maps)) for i, j, maps in pairs] for name, pairs in state["blocks"].items()}
        model, params, apart = model_of(batch), list(batch.params), self.exact == "sublayer"
        with eager(), autograd():
            if not self.recompute:
                run = _Joined(blocks, apart)
                with _hooked(model, run):
                    loss = _scalar(batch.closure())
                    return run.derivative([loss], params), loss.detach().reshape(())
            first = _Errors(blocks)
            with without_side_effects(), _hooked(model, first), first:
                loss = _scalar(batch.closure())
                calls, before = len(first.errors), loss.detach()
                *outside, _ = first.derivative([loss], [*params, first.token])
            del loss
            second = _Finished(blocks, apart, params, outside, first.errors[:calls])
            with _hooked(model, second):
                loss = _scalar(batch.closure())
            second.close(before, loss.detach())
            return second.total, loss.detach().reshape(())


def _are_names(blocks: Any) -> bool:
    many = isinstance(blocks, Collection) and not isinstance(blocks, str)
    return many and bool(blocks) and all(isinstance(name, str) for name in blocks)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise LossError(f"the closure must return a scalar loss, got {type(loss).__name__}")
    return loss


# --- blocks in a pass ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """A call of a block that has not ended.

    Attributes:
        begun: what it began with, by its place; None if no block is below.
        within: what is to be closed where it ends.
        given: its arguments, but for tensors, with the constants that stand in place of what it began with.
        starts: these constants, and whether no block is below, by the identity of the latter.
        back: the latter by the identity of the constants.
        stream: what follows the stream, where maps of it or sublayers apart need that.
    """

    begun: dict[int, Tensor | None] = field(default_factory=dict)
    within: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    given: Sequence[Any] = ()
    starts: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)
    back: dict[int, Tensor] = field(default_factory=dict)
    stream: _Stream | None = None


class _Join(torch.autograd.Function):
    """What a block puts out; its error also goes to what the block began with, past the block.

    With a token, which requires a gradient so that errors come here, the error is told and does not enter the block.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, run: _Joined, token: Tensor | None, tell: Any, *begun: Tensor) -> Tensor:
        ctx.run, ctx.tell, ctx.dtypes = run, tell, [x.dtype for x in begun]
        ctx.zero = None if token is None else token.detach()
        return y.detach()  # what is no view to autograd may be written to

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Any:
        if not ctx.run.differentiating:
            raise ArgumentError(
                "the derivative past a block is an estimate, for the steps of an optimizer alone; here the closure, or "
                "something that has kept what a block put out, takes a derivative through it. For such losses take "
                "jetplane.gradients.ActivityPerturbation()"
            )
        (e,) = errors
        past = [e.to(dtype) for dtype in ctx.dtypes]
        if ctx.tell is None:
            return e, None, None, None, *past
        ctx.tell(e)
        return None, None, ctx.zero, None, *past


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
    """Tell a pass of the calls of its blocks; hooks of the user's are given what is joined."""
    modules = dict(model.named_modules(remove_duplicate=False))
    with run.calls, contextlib.ExitStack() as stack:
        for name in run.blocks:
            enter = functools.partial(run.enter, name)
            stack.callback(modules[name].register_forward_pre_hook(enter, with_kwargs=True).remove)
            leave = functools.partial(run.leave, name)
            stack.callback(modules[name].register_forward_hook(leave, always_call=True, prepend=True).remove)
        yield


class _Joined:
    """A pass with the graphs of all blocks: each begins at a constant, and its error goes past it.

    Args:
        blocks: their pairs by their names.
        apart: whether sublayers are apart.

    Attributes:
        calls: what is to be closed where the pass ends, of calls that have not.
        differentiating: whether the estimate is being made; what else takes a derivative is refused.
    """

    def __init__(self, blocks: Mapping[str, Sequence[Pair]], apart: bool) -> None:
        self.blocks = blocks
        self.calls = contextlib.ExitStack()
        self.differentiating = False
        self._apart = apart
        self._threads: dict[int, list[_Call]] = {}
        self._thread = threading.get_ident()

    @property
    def _open(self) -> list[_Call]:
        """Calls in this thread that have not ended."""
        return self._threads.setdefault(threading.get_ident(), [])

    def derivative(
        self, of: Sequence[Tensor], inputs: Sequence[Tensor], errors: Sequence[Tensor] | None = None, keep: bool = False
    ) -> Sequence[Tensor | None]:
        """By reverse mode, past blocks; the graph stays if it is to be kept."""
        if not any(y.requires_grad for y in of):
            return [None] * len(inputs)
        outer, self.differentiating = self.differentiating, True
        try:
            found = torch.autograd.grad(of, inputs, errors, retain_graph=keep, allow_unused=True)
            return [g.to_dense() if g is not None and g.layout is not torch.strided else g for g in found]
        finally:
            self.differentiating = outer

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A block is called; returns its arguments, None for those that it has."""
        if threading.get_ident() != self._thread and not (self.differentiating and graph_task() >= 0):
            return None  # another thread, which is none of the backward pass, uses the model meanwhile
        with DisableTorchFunction():
            given = tree_leaves((args, kwargs))
            call = _Call()
            self.calls.enter_context(call.within)
            self._open.append(call)
            starts = call.starts
            begun: dict[Tensor, dict[int, Tensor | None]] = {}
            for i, _, _ in self.blocks[name]:
                if not (i < len(given) and is_state(given[i])) or is_transformed(given[i]):
                    raise _changed(name)
                x = given[i]
                first = not _above(x)
                call.begun[i] = None if first else x
                if id(x) not in starts:
                    starts[id(x)] = self._start(x, first), first
                    call.back[id(starts[id(x)][0])] = x
                begun.setdefault(starts[id(x)][0], {})[i] = call.begun[i] if self._goes_past() else None
            self._within(call.within)
            maps = {n for _, _, found in self.blocks[name] for n in found}
            if maps or self._apart:
                as_is = [start for start, first in starts.values() if first] if self._apart else None
                call.stream = call.within.enter_context(_Stream(self, begun, maps, as_is))
            args, kwargs = _put((args, kwargs), {key: start for key, (start, _) in starts.items()})
            call.given = [x for x in (*args, *kwargs.values()) if not isinstance(x, Tensor)]
            return args, kwargs

    def leave(self, name: str, module: nn.Module, args: Any, out: Any) -> Any:
        """Its call ends; returns what it puts out, None for what it has."""
        if not self._open:
            return None
        call = self._open.pop()
        call.within.close()
        with DisableTorchFunction():
            try:
                # None after an error, or in a checkpoint that has all that it needs
                return None if out is None else self._left(name, call, out)
            finally:
                for x in call.given:
                    _put(x, call.back)  # lists and dictionaries hold again what they held

    def _left(self, name: str, call: _Call, out: Any) -> Any:
        """What a block puts out, joined with what it began with."""
        flat = tree_leaves(out)
        joined: dict[int, dict[int, Tensor]] = {}  # by places, as one tensor may be put out twice
        for i, j, maps in self.blocks[name]:
            if not (j < len(flat) and is_state(flat[j])):
                raise _changed(name)
            x = call.begun[i]
            if maps and call.stream is not None:
                past = call.stream.past(flat[j])
                if i not in past:
                    raise _changed(name)
                x = past[i]
            if x is not None and x.shape != flat[j].shape:
                raise _changed(name)
            joined.setdefault(id(flat[j]), {}).update({} if x is None else {id(x): x})
        ends = {id(y): y for y in flat if _is_differentiable(y)}
        return _put(out, self._end(ends, {key: [*xs.values()] for key, xs in joined.items()}))

    def _start(self, x: Tensor, first: bool) -> Tensor:
        """With what a block begins, given whether no other block is below it."""
        return x if first else x.detach()

    def _within(self, call: contextlib.ExitStack) -> None:
        """Enter what holds until the call ends."""

    def _goes_past(self) -> bool:
        """Whether the error of the call that has begun goes past it."""
        return True

    def _end(self, ends: Mapping[int, Tensor], joined: Mapping[int, list[Tensor]]) -> dict[int, Tensor]:
        """What takes the place of tensors that a block puts out.

        Args:
            ends: the tensors by their identity.
            joined: what its sums began with, beside the first block.
        """
        return {key: _Join.apply(ends[key], self, None, None, *begun) for key, begun in joined.items()}


def _put(tree: Any, new: Mapping[int, Tensor]) -> Any:
    """A tree with other tensors by the identity of its own; lists, dictionaries and what has none stay the same."""
    if tree is None or isinstance(tree, (Tensor, int, float, str)):
        return new.get(id(tree), tree)
    key = id(tree)  # what torch's function keeps in a cycle must not hold tensors
    parts, spec = tree_flatten(tree, is_leaf=lambda part: id(part) != key)
    put = [part if part is tree else _put(part, new) for part in parts]
    if all(a is b for a, b in zip(parts, put, strict=True)):
        return tree
    other = tree_unflatten(put, spec)
    if not isinstance(tree, (list, dict)):
        return other
    for key, value in enumerate(other) if isinstance(tree, list) else other.items():
        tree[key] = value
    return tree


def _changed(name: str) -> ArgumentError:
    return ArgumentError(
        f"block {name} is called, or puts out, in another way than in the first step. Where that is meant, make a new "
        "optimizer for the model as it is now"
    )


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
                    if _is_differentiable(y) and not any(y is t for t in given):
                        self._inside.add(y)
        return result

    def _start(self, x: Tensor, first: bool) -> Tensor:
        return x.detach()

    def _within(self, call: contextlib.ExitStack) -> None:
        call.enter_context(torch.no_grad())

    def _end(self, ends: Mapping[int, Tensor], joined: Mapping[int, list[Tensor]]) -> dict[int, Tensor]:
        if self._open:
            return {}
        found = {}
        for key, y in ends.items():
            self.errors.append(None)
            tell = functools.partial(self.errors.__setitem__, len(self.errors) - 1)
            found[key] = _Join.apply(y.detach(), self, self.token, tell, *joined.get(key, ()))
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

    Raises:
        RandomClosureError: the closure calls blocks, or puts out a loss, in another way than in the first pass.
    """

    def __init__(
        self, blocks: Mapping[str, Sequence[Pair]], apart: bool, params: Sequence[Tensor],
        outside: Sequence[Tensor | None], errors: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        super().__init__(blocks, apart)
        self.total = list(outside)
        self._params = params
        self._errors = iter(errors)

    def _within(self, call: contextlib.ExitStack) -> None:
        call.enter_context(saved_tensors_hooks(pack, unpack))  # a checkpoint around the block would run it again

    def _goes_past(self) -> bool:
        return len(self._open) > 1 or self.differentiating

    def _end(self, ends: Mapping[int, Tensor], joined: Mapping[int, list[Tensor]]) -> dict[int, Tensor]:
        if self._open or self.differentiating:
            return super()._end(ends, joined)
        known = []
        for y in ends.values():
            e = next(self._errors, y)
            if e is y or (e is not None and e.shape != y.shape):
                raise _random("calls other blocks")
            if e is not None and y.requires_grad:
                known.append((y, e))
        if known:
            outputs, errors = zip(*known, strict=True)
            own = self.derivative(outputs, self._params, errors, keep=True)
            self.total = [g if h is None else h if g is None else g + h for g, h in zip(self.total, own, strict=True)]
        return {key: _Join.apply(y.detach().requires_grad_(), self, None, None) for key, y in ends.items()}

    def close(self, before: Tensor, after: Tensor) -> None:
        """Hold the second pass against the first one, given their losses."""
        if any(True for _ in self._errors):
            raise _random("calls other blocks")
        a, b = before.item(), after.item()
        if abs(a - b) > tolerance((a, b), [after.dtype, *(p.dtype for p in self._params)]):
            raise _random(f"gives a loss of {b:.9g} after {a:.9g}")


def _random(what: str) -> RandomClosureError:
    return RandomClosureError(f"with recompute the closure runs twice, and {what} the second time. {ADVICE}")


def _is_differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


@final
class _Stream(TorchFunctionMode):
    """Functions in a block, followed along its stream: what it begins with, sums with that, and maps of these.

    For each tensor of the stream there is, for each input that it began with, one that its error goes to past the
    block: what came from outside, or the last map of the stream, in a graph of maps and sums with constants.

    Where sublayers are apart there is another, that they read: no derivative goes from a sublayer to the stream. A sum
    with what does not depend on the stream, as with an embedding of positions, is read with the derivative of the
    latter, a map with that of its own parameters.

    Args:
        run: the pass.
        begun: with what the block begins, and by its places what that was outside; None if no error goes past it.
        maps: the places of the maps of the stream among all calls of `residual_blocks.MAPS`.
        as_is: where sublayers are apart, what of that is read as it is; None if they are not.

    Raises:
        ArgumentError: there is a checkpoint within the block, and sublayers are apart.
    """

    def __init__(
        self, run: _Joined, begun: Mapping[Tensor, Mapping[int, Tensor | None]], maps: Collection[int],
        as_is: Collection[Tensor] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._run, self._maps, self._apart, self._met = run, maps, as_is is not None, 0
        self._around = innermost_hooks(False)
        self._past: Any = WeakTensorKeyDictionary(dict(begun))
        read = {x: x if any(x is y for y in as_is) else x.detach() for x in begun} if as_is is not None else {}
        self._read: Any = WeakTensorKeyDictionary(read)
        self._derived = WeakTensors()

    def past(self, y: Tensor) -> Mapping[int, Tensor | None]:
        """What the error of a tensor goes to past the block, by places; empty of what is not of the stream."""
        return self._past.get(y) or {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HARMLESS:
            return func(*args, **kwargs)
        if self._apart:
            self._check_checkpoint()
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        stream = [t for t in given if t in self._past]
        reads = tree_map(lambda t: self._read[t] if isinstance(t, Tensor) and t in self._read else t, (args, kwargs))
        name = getattr(func, "__name__", "")
        if stream and (name in ADDING or (name in SUBTRACTING and given[0] is stream[0])):
            whole = len(stream) > 1 or any(t in self._derived for t in given)
            one = torch.add if name in ADDING else torch.sub
            read = one(*reads[0], **reads[1]) if self._apart and not whole else None
            past = {i: x for t in reversed(stream) for i, x in self._past[t].items()}  # the first operand's, if of both
            result = func(*args, **kwargs)  # may write to what is read
            self._past[result] = past
            if self._apart:
                self._read[result] = result.detach() if read is None else read
            return result
        if is_map(func):
            self._met += 1
            if self._met - 1 in self._maps and mapped(func, args, kwargs)[0] in self._past:
                return self._mapped(func, args, kwargs, reads)
        result = func(*reads[0], **reads[1])
        for x in stream if self._apart else ():
            if result is self._read[x]:  # as of contiguous(), or dropout that is off
                return x
        if stream or any(t in self._derived for t in given):
            for y in tree_leaves(result):
                if isinstance(y, Tensor):
                    self._derived.add(y)
        return result

    def _mapped(self, func: Any, args: Any, kwargs: Any, reads: Any) -> Tensor:
        """A map of the stream."""
        result, (x, function) = func(*args, **kwargs), mapped(func, args, kwargs, constant=True)
        with DisableTorchFunction():
            past = dict(self._past[x])
            outside = {id(t): t for t in past.values() if t is not None}
            if outside:
                # A checkpoint within the block does not see what this keeps: where it runs again, this does not.
                with torch.enable_grad(), saved_tensors_hooks(_same, _same):
                    y = function(_Join.apply(x.detach(), self._run, None, None, *outside.values()))
                past = {i: None if t is None else y for i, t in past.items()}
            self._past[result] = past
            if self._apart:
                read, function = mapped(func, *reads)
                self._read[result] = function(read)
        return result

    def _check_checkpoint(self) -> None:
        hooks = innermost_hooks(False)
        if hooks is not None and hooks != self._around and hooks[0].__module__ == "torch.utils.checkpoint":
            raise ArgumentError(
                "a checkpoint within a block would run its functions again, where exact='sublayer' cannot tell "
                "sublayers apart: put it around the block, or take it away (recompute=True keeps what one block "
                "needs), or take exact='block'"
            )


def _same(x: Any) -> Any:
    return x
