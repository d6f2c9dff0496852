"""Local heads: each layer's gradient of a loss of its own, by a linear read-out, and no gradient crosses a layer.

A layer is a function that takes parameters with two axes or more: a product, a convolution, an embedding, attention
with its projections, an LSTM. Other functions of what it puts out, activation functions, pooling, normalization, views
and sums of a residual stream, are followed (`jetplane.gradients.tape`), up to the tensor h that enters the next layer.
A head reads it,

    z_n = M h_n + c,    loss_n = l(z_n, target_n)

with the loss function l, the targets and the weight that they have in the closure. With ``e_n = grad_z(loss_n)`` the
head learns from ``sum_n e_n h_n^T`` by Adam's steps, and ``M^T e_n`` goes back through the functions between to the
parameters of the layer, and stops there. What comes after the last layer needs no head: gradients are exact there.

One pass of the closure gives all of it, at about the cost of two forward passes. It is an estimate of the gradient of
other losses than the model's, and biased. What a plane makes of it is judged by the model's loss.

Sources: Nøkland and Eidnes, "Training neural networks with local error signals", arXiv 1901.06656; Mono-Forward, arXiv
2501.09238, equations 1 to 4, which has the same heads for ReLU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import DisableTorchFunction, no_dispatch, transform_level, tree_leaves
from ..errors import ArgumentError, JetplaneWarning, LossError, warn_user
from ..evaluation.interception import LOSSES
from ..evaluation.leaving import HARMLESS, plain_run
from ..evaluation.side_effects import without_side_effects
from .allocation import signature
from .estimators import Batch, Estimate, Estimator, State, model_of
from .local_losses import NAMES, LocalLoss, met
from .order import Order, Orders, paired
from .tape import Node, Tape, unwritten, writes

MOST = 4096  # features that a head reads of a row; of a layer with more, the means over positions
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam's steps of the heads


@final
@dataclass(frozen=True)
class LocalHeads(Estimator):
    """The gradients of layers' local losses: see `jetplane.gradients.heads`.

    Heads are chosen by the loss functions of `torch.nn.functional` that the closure calls: `cross_entropy` (of classes,
    probabilities, or the next token at each position), `nll_loss`, `kl_div`, `mse_loss`, `l1_loss`, `smooth_l1_loss`,
    `huber_loss`, `binary_cross_entropy` with logits or without, `multilabel_soft_margin_loss`, `multi_margin_loss` and
    `soft_margin_loss`. A closure may call several, of parts of the batch or for several outputs, and weigh, mask and
    add up what they return. Each loss has a head at each tensor that enters a layer and has a part for each of its
    rows: an example, a position, or a pixel. Parameters that no head reaches have no estimate, which a warning says.

    Attributes:
        rate: learning rate of Adam's steps of the heads.
        recompute: find the targets in an extra pass, so that each layer is finished where its output enters the next
            one, and no layer's input is kept. A residual stream is then read once after each addition. By default the
            extra pass is saved, the inputs of all layers are kept until the loss is computed, as in reverse mode, and
            all that later layers read of a stream reaches the layers that have added to it.

    Raises:
        ArgumentError: a rate that is not positive; (in a step) a closure with no known loss function, or with one that
            compares examples with each other; a model that writes to a tensor which a derivative needs.

    >>> import torch, jetplane as jp
    >>> from torch.nn import functional as F
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(256, 8)
    >>> y = (x[:, 0] > x[:, 1] ** 2).long()
    >>> opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=jp.gradients.LocalHeads())
    >>> losses = [opt.step(lambda: F.cross_entropy(model(x), y)) for _ in range(96)]
    >>> bool(losses[-1] < 0.5 * losses[0])
    True
    """

    rate: float = 3e-3
    recompute: bool = False
    alone = True

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ArgumentError(f"rate must be positive, got {self.rate}")

    def signature(self, params: Sequence[Tensor], model: nn.Module | None) -> str:
        """See `Estimator`: which parameters move, and of which layers they are."""
        assert model is not None
        return signature(model, params)

    def prepare(self, batch: Batch, state: State) -> State:
        """See `Estimator`: a pass tells which heads there are and how large, another which parameters they reach.

        Raises:
            ArgumentError: the closure calls no known loss function, or one that compares examples with each other.
        """
        model, known, heads = model_of(batch), state.get("heads", {}), {}
        generator = torch.Generator().manual_seed(batch.seed % 2**63)
        with without_side_effects():
            found = _Pass(model, batch.params, {}, closing=self.recompute)
            found.run(batch.closure)
            found.refuse_mixed_examples()
        for key, (width, features) in found.shapes().items():
            shape = (width, features + 1)
            old = known.get(key)
            fits = old is not None and tuple(old["weight"].shape) == shape
            # As torch's linear layers begin. Heads of zeros would tell all outputs of a layer the same.
            drawn = (2 * torch.rand(shape, generator=generator, dtype=_dtype(batch)) - 1) / features**0.5
            weight = drawn.to(batch.params[0].device)
            zeros = torch.zeros_like(weight)
            heads[key] = old if fits else {"weight": weight, "average": zeros, "square": zeros}
        with without_side_effects():
            moved = found.orders.moved
            weights = {key: head["weight"] for key, head in heads.items()}
            found = _Pass(model, batch.params, weights, following=moved)
            found.run(batch.closure)
        _say_what_is_left(set(found.total), batch.params)
        return {"heads": heads, "steps": state.get("steps", 0), "moved": moved}

    def shapes(self, batch: Batch, state: State) -> Sequence[torch.Size]:
        """See `Estimator`: those of the parameters, of the heads, and the loss."""
        heads = [head["weight"].shape for head in state["heads"].values()]
        return [*(p.shape for p in batch.params), *heads, torch.Size(())]

    def measure(self, batch: Batch, state: State) -> Sequence[Tensor]:
        """See `Estimator`."""
        heads = {name: head["weight"] for name, head in state["heads"].items()}
        goals, following = None, state.get("moved", True)
        if self.recompute:
            first = _Pass(model_of(batch), batch.params, {}, closing=True, following=following)
            with without_side_effects():
                first.run(batch.closure)
            goals = [reading.goals for reading in first.readings]
        found = _Pass(model_of(batch), batch.params, heads, goals, following=following and goals is None)
        with contextlib.nullcontext() if batch.plane is None else without_side_effects():
            found.run(batch.closure)
        if found.unmet:
            warn_user(
                "layers are called in another way than in the first step, or in an order of examples that is not "
                f"known, without a head: {sorted(found.unmet)}",
                JetplaneWarning,
            )
        total = found.total
        gradient = [total[id(p)].to(p.dtype) if id(p) in total else torch.zeros_like(p) for p in batch.params]
        return [*gradient, *(found.of_heads.get(n, torch.zeros_like(w)) for n, w in heads.items()), found.value]

    def estimate(self, batch: Batch, means: Sequence[Tensor], state: State) -> Estimate:
        """See `Estimator`."""
        count, steps = len(batch.params), state["steps"] + 1
        heads = {}
        for (name, head), g in zip(state["heads"].items(), means[count:-1], strict=True):
            average, square = torch.lerp(g, head["average"], BETAS[0]), torch.lerp(g * g, head["square"], BETAS[1])
            step = (average / (1 - BETAS[0] ** steps)) / ((square / (1 - BETAS[1] ** steps)).sqrt() + EPSILON)
            heads[name] = {"weight": head["weight"] - self.rate * step, "average": average, "square": square}
        return Estimate(means[:count], state | {"heads": heads, "steps": steps}, means[-1])


def _dtype(batch: Batch) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in batch.params) else torch.float32


def _say_what_is_left(covered: set[int], params: Sequence[Tensor]) -> None:
    left = [tuple(p.shape) for p in params if id(p) not in covered]
    if len(left) == len(params):
        raise ArgumentError(
            "no layer has a local head: heads read the outputs of functions that take parameters, where they have a "
            "part for each row of the loss. Take jetplane.gradients.ActivityPerturbation()"
        )
    if left:
        warn_user(
            f"{len(left)} of {len(params)} parameters, shapes {left}, belong to no layer with a local head, and have "
            "no estimate of their gradient: they stay",
            JetplaneWarning,
        )


# --- one pass -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Reading:
    """What a head reads.

    Attributes:
        name: of the head.
        node: of the tensor that it reads.
        h: the tensor; None once it has been read.
        channels: how many the layer put out along its second axis, or None where its features lie along the last one.
        number: of the function that put it out.
        shape: of the tensor.
        version: of the tensor.
        swapped: whether its first two axes have been swapped on the way, as attention does.
        order: of its positions; None for that of the batch.
        goals: what its heads learn, once it is known; None for a loss whose rows cannot be told in it.
    """

    name: str
    node: Node | None
    h: Tensor | None
    channels: int | None
    number: int
    shape: torch.Size
    version: int
    swapped: bool
    order: Order | None
    goals: Sequence[_Goal | None] = ()


class _Goal(NamedTuple):
    """A loss that a head learns.

    Attributes:
        loss: it.
        swap: whether the first two axes of what is read are the other way round than in what the loss takes.
        positions: which position of what is read each of its rows is; None where they are in order.
        places: which row of what is read each of its rows is; None where they are in order.
    """

    loss: LocalLoss
    swap: bool
    positions: _Positions | None
    places: Tensor | None = None


class _Positions(NamedTuple):
    """Which position of a layer's output each row of a loss comes from.

    Attributes:
        shape: of the positions.
        of_rows: the index of one among them, (rows,).
    """

    shape: torch.Size
    of_rows: Tensor


class _Layer(NamedTuple):
    """A call of a function with parameters.

    Attributes:
        name: of the module that owns them.
        number: of the function.
        channels: how many there are along the second axis of its result, or None.
        shape: of its result.
        start: address of its result.
        swapped: see `_Reading`.
    """

    name: str
    number: int
    channels: int | None
    shape: torch.Size
    start: int
    swapped: bool


@final
class _Pass(TorchFunctionMode):
    """A pass of a closure in which layers are met, functions of their outputs, and loss functions.

    Args:
        model: holds the layers, and names them.
        params: those that move.
        heads: weights (width, features + 1) by their names.
        earlier: goals of each reading, in their order, where they are known before.
        closing: whether a tensor's reach ends where a head reads it. If not, what is made of it later is read too: the
            stream that the blocks of a residual model add to.
        following: whether positions are followed through functions that move them between layers.

    Attributes:
        total: gradients by the ids of parameters.
        of_heads: gradients of the heads' weights.
        value: the closure's loss.
        readings: in the order in which they were met.
        unmet: heads that would be needed and are not there, and those whose rows cannot be told.
        orders: of what comes from layers.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], heads: Mapping[str, Tensor],
        earlier: Sequence[Sequence[_Goal | None]] | None = None, closing: bool = False, following: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.orders = Orders(following)
        self.total: dict[int, Tensor] = {}
        self.of_heads: dict[str, Tensor] = {}
        self.value = torch.zeros(())
        self.readings: list[_Reading] = []
        self.unmet: set[str] = set()
        self._tape = Tape()
        self._params = params
        self._moving = {id(p) for p in params}
        self._names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self._names |= {id(p): f"parameter {i}" for i, p in enumerate(params) if id(p) not in self._names}
        self._heads = heads
        self._earlier = earlier
        self._closing = closing or earlier is not None
        self._layers: dict[int, _Layer] = {}  # by the numbers of functions
        self._weights: set[Node] = set()  # what is made of parameters alone
        self._read: set[int] = set()  # functions with parameters whose outputs have been read
        self._entered: dict[tuple[int, int], int] = {}  # results that have entered a layer; how many of each layer
        self._swapped: set[int] = set()  # functions whose result has its first two axes swapped
        self._frozen: set[int] = set()  # layers none of whose parameters moves
        self._ended: set[Node] = set()  # see `_end`
        self._latest: dict[int, Tensor] = {}  # what has become of layers' outputs that no head has read
        self._losses: list[tuple[Node, Node, LocalLoss]] = []  # with the nodes of its input and its result
        self._others: set[str] = set()
        self._met = False  # a loss function that is known
        self._found: dict[tuple[int, int], _Positions | None] = {}

    # --- the closure is run ---------------------------------------------------------------------------------

    def run(self, closure: Callable[[], Any]) -> None:
        """Run the closure.

        Raises:
            ArgumentError: it calls no loss function that is known.
            LossError: it returns no scalar.
        """
        with plain_run(self._params, again=True), self:
            value = closure()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise LossError(f"the closure must return a scalar loss, got {type(value).__name__}")
        self.value = value.detach().reshape(())
        node = self._tape.node(value)
        own = {} if node is None else {node: torch.ones_like(self.value).reshape(node.shape)}
        found = self._tape.back(own)
        exact = {one.number for one in found}
        for number, y in list(self._latest.items()):
            if number not in exact:
                self._reads(y)
        losses = [(of, own, replace(loss, weight=found[own])) for of, own, loss in self._losses if own in found]
        if not losses:
            others = self._others | {loss.function.__name__ for _, _, loss in self._losses}
            what = ", ".join(sorted(others)) or "none"
            if self._losses or self._met:
                what += " in vain: what it returns does not come from the parameters that move, or is not in the loss"
            raise ArgumentError(
                f"local heads need a closure whose loss is made of loss functions out of {NAMES}; this one calls {what}"
                ". Take jetplane.gradients.ActivityPerturbation()"
            )
        if self._earlier is None:
            self._set_goals(losses)
            for reading in self.readings:
                node, g = reading.node, self._learned(reading)
                if node is not None and g is not None:
                    own[node] = own[node] + g if node in own else g
            del found
            last = bool(self._heads)  # without, what the pass has met is looked at afterwards
            found = self._tape.back(own, leaves=True, last=last)  # once, however many heads there are above a layer
        self._add(found)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Width and number of features of each head."""
        found: dict[str, tuple[int, int]] = {}
        for reading in self.readings:
            for place, goal in enumerate(reading.goals):
                features = None if goal is None else _features(reading, goal)
                if goal is not None and features is not None:
                    shape = goal.loss.width, features
                    found[_key(reading.name, place, shape, found)] = shape
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HARMLESS or not torch.is_grad_enabled() or transform_level() is not None:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        leaves = [t for t in tensors if id(t) in self._moving]
        nodes = [(t, node) for t in tensors if (node := self._tape.node(t)) is not None]
        weights = [t for t in tensors if isinstance(t, nn.Parameter) or id(t) in self._moving]
        weights += [t for t, node in nodes if node in self._weights]
        if not weights and not nodes:
            return func(*args, **kwargs)
        if any(type(t) not in (Tensor, nn.Parameter, nn.Buffer) for t in tensors):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        layer = name not in _JOINING and any(w.dim() > 1 for w in weights) and len(weights) < len(tensors)
        if layer:
            for t, node in nodes:
                if node not in self._weights:
                    self._reads(t)
                    self._end(node)
        if func in LOSSES:
            return self._loss(func, args, kwargs)
        along = self._weights.__contains__ if layer else self._is_open
        result = self._tape.run(func, args, kwargs, leaves, along)
        outputs = [(y, node) for y in tree_leaves(result) if (node := self._tape.node(y)) is not None]
        if len(weights) == len(tensors):
            self._weights |= {node for _, node in outputs}
        elif layer and not outputs and self._tape.number:  # a frozen one, above one that moves
            outputs = [(y, self._tape.start(y)) for y in tree_leaves(result) if _is_real(y)]
            self._frozen |= {node.number for _, node in outputs}
        if self.orders.following and len(weights) < len(tensors):
            written = [args[0]] if writes(func, kwargs) else tree_leaves(result)
            found = [(y, self._tape.node(y)) for y in written]
            self.orders.follow(func, args, kwargs, [n for n in nodes if n[1] not in self._weights], found, self._start)
        if outputs and len(weights) < len(tensors):
            if any(node.number in self._swapped for _, node in nodes) != _swaps(name, args, kwargs):
                self._swapped |= {node.number for _, node in outputs}
            self._note(outputs, func, name, weights, leaves, layer)
        return result

    def _end(self, node: Node) -> None:
        """Let go of the way back from what enters a layer to frozen layers alone: no derivative goes there."""
        if node.count == 1 and node.calls <= self._frozen:
            node.back, node.inputs = None, ()
            self._ended.add(node)

    def _refuse_ended(self, of: Node, way: Collection[Node]) -> None:
        """Raise where the way back from a loss to its last layer has been let go of.

        Raises:
            ArgumentError: the loss takes what a frozen layer has put out and another layer has taken too.
        """
        if not self._ended.isdisjoint(way):
            raise ArgumentError(
                f"a loss takes numbers, shape {tuple(of.shape)}, that are made of a frozen layer's output, which "
                "another layer takes too, and local heads do not follow these to their rows. Let that layer's "
                "parameters move, or take jetplane.gradients.ActivityPerturbation()"
            )

    def _is_open(self, node: Node) -> bool:
        return not self._closing or node in self._weights or not node.calls <= self._read

    def _note(
        self, outputs: Sequence[tuple[Tensor, Node]], func: Any, name: str, weights: Sequence[Tensor],
        leaves: Sequence[Tensor], layer: bool,
    ) -> None:  # fmt: skip
        """Keep what heads have to know of a function with parameters."""
        y, node = outputs[0]
        before = max((self._layers[n] for n in node.calls if n in self._layers), key=lambda c: c.number, default=None)
        if layer or (weights and before is None):
            named = [self._names[id(w)] for w in (*leaves, *weights) if id(w) in self._names]
            channels = y.shape[1] if _CHANNELS.search(name) and y.dim() > 2 else None
            label = named[0] if named else "layer"
            self._layers[node.number] = _Layer(
                label, node.number, channels, y.shape, y.data_ptr(), node.number in self._swapped
            )
            for _, one in outputs if layer else ():  # also where its weights were made of parameters before
                one.calls = frozenset({node.number})
            if node.number not in self._frozen:
                self._latest[node.number] = y
        for number in node.calls & self._latest.keys():
            self._latest[number] = y

    def _reads(self, h: Tensor) -> None:
        """A tensor enters a layer: a head reads it, and its reach ends."""
        node = self._tape.node(h)
        if node is None or not self._is_open(node) or (node.number, node.place) in self._entered:
            return
        known = [self._layers[n] for n in node.calls - self._frozen if n in self._layers]
        if not known:
            return
        last = max(known, key=lambda layer: layer.number)
        self._read |= node.calls
        for one in node.calls:
            self._latest.pop(one, None)
        self._entered[node.number, node.place] = last.number
        count = list(self._entered.values()).count(last.number)
        now = self._earlier is not None
        keep = bool(self._heads) and not now
        name = last.name if count == 1 else f"{last.name}, place {count}"
        swapped = node.number in self._swapped
        order = self.orders.of(node)
        reading = _Reading(name, node, h, last.channels, node.number, h.shape, h._version, swapped, order)
        self.readings.append(reading)
        if now and len(self.readings) <= len(self._earlier or ()):
            reading.goals = (self._earlier or ())[len(self.readings) - 1]
            g = self._learned(reading)
            if g is not None:
                self._add(self._tape.back({node: g}, leaves=True))
        if not keep:
            reading.h = reading.node = None

    def _loss(self, func: Any, args: Any, kwargs: Any) -> Any:
        of = self._tape.node(args[0] if args else kwargs.get("input"))
        last = None if of is None else self._last(of)
        loss = met(
            func,
            args,
            kwargs,
            None if last is None or last.channels is None else last.shape,
            last is not None and len(last.shape) == 1,
        )
        result = self._tape.run(func, args, kwargs, along=self._is_open)
        own = self._tape.node(result)
        if loss is None:
            self._others.add(func.__name__)
        self._met |= loss is not None
        if loss is not None and of is not None and own is not None:
            self._losses.append((of, own, loss))
        return result

    def _last(self, node: Node) -> _Layer | None:
        """The last layer from which a tensor comes."""
        return max((self._layers[n] for n in node.calls if n in self._layers), key=lambda c: c.number, default=None)

    # --- heads learn ----------------------------------------------------------------------------------------

    def _set_goals(self, losses: Sequence[tuple[Node, Node, LocalLoss]]) -> None:
        """Each reading's losses: those met before its layer is called for another part of the batch."""
        for i, reading in enumerate(self.readings):
            later = [(of, own, loss) for of, own, loss in losses if own.number > reading.number]
            if not later:
                continue
            first = later[0][1].number
            again = [r.number for r in self.readings[i + 1 :] if r.name == reading.name and r.number > first]
            end = min(again, default=self._tape.number + 1)
            those = [(of, loss) for of, own, loss in later if own.number <= end]
            reading.goals = [self._goal(of, loss, reading) for of, loss in those]

    def _goal(self, of: Node, loss: LocalLoss, reading: _Reading) -> _Goal | None:
        """What a head learns; None if the loss's rows cannot be told in what it reads."""
        last = self._last(of)
        swap = last is not None and last.swapped != reading.swapped and len(reading.shape) > 2
        axes = reading.shape
        shape = torch.Size((axes[1], axes[0], *axes[2:])) if swap else axes
        goal = _Goal(loss, swap, None if last is None else self._positions(of, loss, last, shape))
        before, order = self.orders.of(of), reading.order
        if before is order or not any(one is not None and one.moved for one in (before, order)):
            return goal
        if before is None:
            ids = torch.arange(1, loss.rows + 1, dtype=torch.int32, device=loss.output.device)
            ids = ids.unsqueeze(1).expand(-1, loss.width)
            before = Order(0, loss.rows, loss.shaped(ids))
        order = order or Order.start(reading.shape, reading.channels, before.ids.device)
        if swap:
            order = order.replaced(order.ids.transpose(0, 1))
        goal = goal._replace(positions=None)
        by_rows = _features(reading, goal) is not None
        found = paired(before, loss.axis, order, reading.channels, loss.rows, by_rows)
        if found is None:
            return None
        at = None if found[1] is None else _Positions(order.ids.shape[:-1], found[1])
        return goal._replace(places=found[0], positions=at)

    def _start(self, t: Tensor, node: Node) -> Order:
        """The order of the batch in a tensor that comes from layers."""
        last = self._last(node)
        if t.dim() == 1 and last is not None and len(last.shape) > 1:  # a number of each example
            found = Order.start(torch.Size((len(t), 1)), None, t.device)
            return found.replaced(found.ids.squeeze(1))
        return Order.start(t.shape, None if last is None else last.channels, t.device)

    def _positions(self, of: Node, loss: LocalLoss, last: _Layer, shape: torch.Size) -> _Positions | None:
        """Which positions of the last layer's output the rows of a loss are, where a reading has the same positions."""
        same = len(shape) == 2 and shape[0] == last.shape[:-1].numel()
        if last.channels is not None or len(shape) < 2 or not (same or last.shape[:-1] == shape[:-1]):
            return None
        output, axis = loss.output, loss.axis
        rows = output if axis is None else output.movedim(axis, -1)
        in_order = rows.is_contiguous() and rows.data_ptr() == last.start and rows.numel() == last.shape.numel()
        if in_order:
            return None
        key = id(loss.output), last.number
        if key not in self._found:
            self._found[key] = self._followed(of, loss, last)
        return self._found[key]

    def _followed(self, of: Node, loss: LocalLoss, last: _Layer) -> _Positions | None:
        """The same by the way back, along which the first number of each row carries the row's index."""
        marks = torch.zeros(loss.rows, loss.width, dtype=of.dtype, device=loss.output.device)
        marks[:, 0] = 1
        whole = self._tape.back({of: loss.shaped(marks)})
        at = next((node for node in whole if node.number == last.number and node.place == 0), None)
        if at is None:
            self._refuse_ended(of, whole)
        if at is None or not bool(((whole[at] == 0) | (whole[at] == 1)).all()):
            return None
        base = 2**20 if of.dtype in (torch.float32, torch.float64) else 2**7  # whole numbers that are exact
        indices, place, found = torch.arange(loss.rows, device=marks.device), 1, 0
        while place <= loss.rows:
            digits = (indices // place % base).to(marks.dtype)
            found = found + self._tape.back({of: loss.shaped(marks * digits.unsqueeze(1))})[at].sum(-1).long() * place
            place *= base
        taken = whole[at].sum(-1).flatten().nonzero().squeeze(1)
        if len(taken) != loss.rows:
            return None
        order = torch.as_tensor(found).flatten()[taken]
        return _Positions(last.shape[:-1], torch.empty_like(taken).scatter_(0, order, taken))

    def refuse_mixed_examples(self) -> None:
        """Raise where a row of a loss is made of several examples: a head's row is of one.

        Raises:
            ArgumentError: it is.
        """
        for of, _, loss in self._losses:
            last = self._last(of)
            if last is None or loss.rows < 2 or len(last.shape) < 2:
                continue
            marks = torch.zeros(loss.rows, loss.width, dtype=of.dtype, device=loss.output.device)
            marks[0] = 1
            whole = self._tape.back({of: loss.shaped(marks)})
            at = next((c for node, c in whole.items() if node.number == last.number and node.place == 0), None)
            if at is None:
                self._refuse_ended(of, whole)
            axes = () if at is None else range(min(at.dim() - 1, 2))
            met = [int((at != 0).movedim(i, 0).flatten(1).any(1).sum()) for i in axes if at is not None]
            if met and min(met) > 1:
                raise ArgumentError(
                    f"a row of what {loss.function.__name__} takes is made of several examples, as where each is "
                    "compared with all others, and heads look at one alone. Take "
                    "jetplane.gradients.ActivityPerturbation()"
                )

    def _learned(self, reading: _Reading) -> Tensor | None:
        """The gradient of a reading's losses at what its heads read, which is let go; their own are added up."""
        h, total = reading.h, None
        reading.h = reading.node = None
        for place, goal in enumerate(reading.goals if h is not None else ()):
            if goal is None:
                self.unmet |= {reading.name} & self._heads.keys()
                continue
            features = _features(reading, goal)
            if features is None or h is None:
                continue
            key = _key(reading.name, place, (goal.loss.width, features), {n: _sizes(w) for n, w in self._heads.items()})
            if key in self._heads:
                g = self._through(key, unwritten(h, reading.version), reading, goal)
                total = g if total is None else total + g
            else:
                self.unmet.add(key)
        return total

    def _through(self, key: str, h: Tensor, reading: _Reading, goal: _Goal) -> Tensor:
        """The gradient of the head's loss at what it reads; the head's own is added up."""
        head = self._heads[key]
        with DisableTorchFunction(), no_dispatch():
            read = _read(h, reading.channels, goal)
            assert read is not None  # see `_features`
            features, unread = read[0].to(head.dtype), read[1]
            weight, bias = head[:, :-1], head[:, -1]
            e = goal.loss.gradient(torch.addmm(bias, features, weight.mT)).to(head.dtype)
            own = torch.cat([e.mT @ features, e.sum(0).unsqueeze(1)], 1)
            self.of_heads[key] = self.of_heads[key] + own if key in self.of_heads else own
            return unread(e @ weight)

    def _add(self, found: Mapping[Node, Tensor]) -> None:
        for node, g in found.items():
            if node.tensor is not None:
                key = id(node.tensor)
                self.total[key] = self.total[key] + g if key in self.total else g


def _sizes(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1] - 1


def _key(name: str, place: int, shape: tuple[int, int], known: Mapping[str, tuple[int, int]]) -> str:
    """What a head is called: after its layer, its loss where there are several, and its size where that differs."""
    key = name if place == 0 else f"{name}, loss {place + 1}"
    return key if known.get(key, shape) == shape else f"{key}, {shape[0]} of {shape[1]}"


# --- what heads read ------------------------------------------------------------------------------------------

Read = tuple[Tensor, Callable[[Tensor], Tensor]]  # (rows, features), and what brings a gradient back to the tensor


def _features(reading: _Reading, goal: _Goal) -> int | None:
    """How many numbers of a row a head reads; None if what it would read has not a part for each row of the loss."""
    with DisableTorchFunction(), no_dispatch():
        found = _read(torch.empty(reading.shape, device="meta"), reading.channels, goal)
    return None if found is None else found[0].shape[1]


def _read(h: Tensor, channels: int | None, goal: _Goal) -> Read | None:
    """The numbers of a tensor, by the rows of a loss."""
    if goal.swap:
        found = _read(h.transpose(0, 1), channels, goal._replace(swap=False))
        if found is None:
            return None
        features, unread = found
        return features, lambda g: unread(g).transpose(0, 1)
    if goal.places is not None:
        found = _read(h, channels, goal._replace(places=None))
        return None if found is None else _placed(*found, goal.places)
    rows, positions, shape = goal.loss.rows, goal.positions, h.shape
    if h.dim() < 2:
        single = rows == 1 and h.dim() == 1
        return (h.unsqueeze(0), lambda g: g.squeeze(0)) if single else None
    first = channels if channels is not None and h.dim() > 2 and shape[1] == channels else None
    if first is None and positions is not None and positions.shape.numel() == shape[:-1].numel():
        return _at(h, positions.of_rows)
    if first is not None and h.numel() // first == rows != shape[0]:
        last_first = h.movedim(1, -1)
        return last_first.reshape(rows, first), lambda g: g.reshape(last_first.shape).movedim(-1, 1)
    if first is None and shape[:-1].numel() == rows and (channels is None or h.dim() > 2):
        return h.reshape(rows, shape[-1]), lambda g: g.reshape(shape)
    if shape[0] != rows:
        return None
    if first is None and h.dim() > 2:
        count = shape[1:-1].numel()
        means = h.reshape(rows, count, -1).mean(1)
        return means, lambda g: (g / count).unsqueeze(1).expand(-1, count, -1).reshape(shape)
    if channels is not None and h[0].numel() > MOST and h[0].numel() % channels == 0:
        count = h[0].numel() // channels
        means = h.reshape(rows, channels, count).mean(2)
        return means, lambda g: (g / count).unsqueeze(2).expand(-1, -1, count).reshape(shape)
    return h.reshape(rows, -1), lambda g: g.reshape(shape)


def _placed(features: Tensor, unread: Callable[[Tensor], Tensor], places: Tensor) -> Read:
    """The rows of a tensor in the order of the loss."""
    if features.is_meta:
        return features, unread
    return features.index_select(0, places), lambda g: unread(torch.zeros_like(g).index_add_(0, places, g))


def _at(h: Tensor, places: Tensor) -> Read:
    """Some positions of a tensor."""
    flat = h.reshape(-1, h.shape[-1])
    if h.is_meta:
        return flat[: len(places)], lambda g: g

    def unread(g: Tensor) -> Tensor:
        return torch.zeros_like(flat, dtype=g.dtype).index_add_(0, places, g).reshape(h.shape)

    return flat.index_select(0, places), unread


def _is_real(y: Any) -> bool:
    return isinstance(y, Tensor) and y.is_floating_point()


def _swaps(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function swaps the first two of three axes or more."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() < 3:
        return False
    given = [*args[1:], *kwargs.values()]
    if name in ("transpose", "swapaxes", "swapdims"):
        return {int(a) % args[0].dim() for a in given} == {0, 1}
    if name == "permute":
        axes = given[0] if len(given) == 1 else given
        return [int(a) % args[0].dim() for a in axes][:2] == [1, 0]
    return False


# Functions that join what they take, of which none mixes features: parameters among these are no layer's.
_JOINING = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__rsub__", "cat", "concat", "stack"}
_CHANNELS = re.compile("conv|batch_norm|instance_norm|group_norm")  # put out features along the second axis
