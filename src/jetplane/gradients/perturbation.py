"""Activity perturbation: an estimate of the gradient from noise on what layers put out, forward only.

A layer's output ``a_n`` of example n moves along noise ``u_nk`` of its own, K samples of it. The loss's slope
along it, kept apart for each example, is ``s_nk = grad_{a_n}(L_n) . u_nk``, and

    delta_n = mean_k (s_nk u_nk),   E[delta_n] = grad_{a_n}(L_n)

turns into a direction for the weights by the layer's own formula, ``sum_n delta_n x_n^T`` for ``a = W x``. The
variance grows with the numbers that a layer puts out for one example, not with the number of weights.

Each layer has passes of its own that start at it: what comes before carries no coefficients, so noise on late
layers is cheap and they get more samples (`allot`). Nothing is held from one pass to the next but the slopes:
a last pass meets every layer's input again, redraws the noise, and adds up the directions.

Source: Ren, Kornblith, Liao, Hinton, "Scaling forward gradient with local losses", arXiv 2210.03310.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._mode_utils import no_dispatch

from ..directions import Directions
from ..directions.laws import LAWS, key, pieces, twists
from ..errors import UnusedParametersError
from ..evaluation.leaving import plain_run
from ..evaluation.plane import Interception, evaluate, expansion
from ..evaluation.side_effects import rehearsal
from ..jets.jet import Jet, Space, carried, parts, promoted
from ..rules.examples import known
from .active_outputs import MOST, PROBES, effective, probes
from .feedback import Course, Feedback
from .layers import LAYERS, has_weight_noise, moving, patches, weights_of

Closure = Callable[[], Any]

OTHERS = "*"  # the name under which an allotment has the parameters that no layer here accounts for
_NUMBERS = 1 << 24  # coefficients of a layer's output that one pass carries at most
_LANES = 1 << 12  # lanes of a law that are drawn together: all their numbers fit in a cache
_FELT = 0.9  # a layer of whose outputs more than this part has an effect counts as one of which all have
_FREE = 1 << 17  # coefficients that cost no time beside what starting a pass costs
_NOISE_COST = 300.0  # multiply-adds that cost as much as drawing, carrying and using a number of noise


class Share(NamedTuple):
    """What a layer gets.

    Attributes:
        mode: "signs" on its output, "units" (one direction for each of its outputs), "weights" (signs on
            its weights, of each example its own); of `OTHERS`, "parameters".
        samples: how many directions.
        passes: how many passes they are spread over, to bound memory.
        apart: whether each position of the output is an example to the loss, and its noise judged by that alone.
        next: the layer at whose input it shows which outputs have an effect (`.active_outputs`); None if all may have.
        course: what the layer's learned feedback is like, or None if it has none.
    """

    mode: str
    samples: int
    passes: int = 1
    apart: bool = False
    next: str | None = None
    course: Course | None = None

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Share:
        """A share from its fields as plain tuples, as checkpoints have them."""
        *first, course = fields
        return cls(*first, course=course and Course(*course))

    def plain(self) -> tuple[Any, ...]:
        """Its fields as plain tuples."""
        return (*self[:-1], self.course and tuple(self.course))


@dataclass(frozen=True)
class _Met:
    """A layer's calls in one pass: its outputs and multiply-adds for one example, and what the last call put out."""

    outputs: int
    products: int
    calls: int
    shape: torch.Size


# --- noise ----------------------------------------------------------------------------------------------


def _signs(stream: Any, samples: range, shape: Sequence[int], like: Tensor, ahead: float = 0.0) -> Tensor:
    """Signs of shape (samples, *shape): a function of the stream, of which samples, and of which rows they are."""
    rows, size = shape[0], math.prod(shape[1:])
    out = torch.empty(len(samples) * rows, size, dtype=carried(like.dtype), device=like.device)
    first = round(ahead * rows)
    apart = twists(stream, samples, like.device).unsqueeze(1)
    apart = twists(apart, range(first, first + rows), like.device).flatten()
    law = LAWS["rademacher"]
    block = max(1, _LANES // max(-(-size // law.rows), 1))
    for some, written in zip(apart.split(block), out.split(block), strict=True):
        for which, place, values in pieces(law, stream, some, size):
            written[which, place] = values
    return out.reshape(len(samples), *shape)


@dataclass(frozen=True)
class _Site:
    """A layer to perturb, and how."""

    module: nn.Module
    share: Share
    stream: Any
    ahead: float = 0.0  # how many times as many examples come before these in the whole batch

    def noise(self, call: int, x: Tensor, y: Tensor, samples: range) -> Tensor:
        """Tangents of the output, (samples, *y.shape)."""
        if self.share.mode == "signs":
            return _signs(key(self.stream, call), samples, y.shape, y, self.ahead)
        if self.share.mode == "units":
            unit = torch.eye(y.shape[-1], dtype=carried(y.dtype), device=y.device)[samples.start : samples.stop]
            return unit.reshape(len(samples), *([1] * (y.dim() - 1)), -1).expand(-1, *y.shape).contiguous()
        weight, bias = self._weight_noise(call, x, samples)
        seen = patches(self.module, x.to(weight.dtype))
        moved = weight.transpose(0, 1).reshape(len(x), -1, seen.shape[1]) @ seen
        moved = moved.reshape(len(x), len(samples), y.shape[1], -1)
        if bias is not None:
            moved = moved.add_(bias.transpose(0, 1).unsqueeze(-1))
        return moved.transpose(0, 1).reshape(len(samples), *y.shape)

    def _weight_noise(self, call: int, x: Tensor, samples: range) -> tuple[Tensor, Tensor | None]:
        """Signs (samples, N, outputs, fan-in) and (samples, N, outputs)."""
        module: Any = self.module
        outputs, fan = module.weight.shape[0], module.weight[0].numel()
        shape = (len(x), outputs, fan + (module.bias is not None))
        signs = _signs(key(self.stream, call), samples, shape, x, self.ahead)
        return signs[..., :fan], signs[..., fan] if module.bias is not None else None

    def rows(self, y: Tensor) -> int:
        """How many parts of an output are judged by slopes of their own."""
        return y.numel() // y.shape[-1] if self.share.apart or self.share.mode == "units" else len(y)

    def direction(
        self, call: int, x: Tensor, y: Tensor, slopes: Tensor, lesson: _Lesson | None, felt: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with this call's part of its direction; slopes (rows, samples).

        Of y none but the shape is used: it may have been written to since. ``felt`` tells which of it has an effect.
        """
        module: Any = self.module
        rows = self.rows(y)
        if self.share.mode == "units":
            yield from LAYERS[type(module)].weights(module, x, _per(slopes, rows).reshape(y.shape))
            return
        s = _per(slopes, rows) / self.share.samples
        if self.share.mode == "weights":
            for samples in _split(self.share):
                weight, bias = self._weight_noise(call, x, samples)
                chosen = s[:, samples.start : samples.stop].mT.reshape(-1)
                yield module.weight, (chosen @ weight.flatten(0, 1).flatten(1)).reshape(module.weight.shape)
                if bias is not None:
                    yield module.bias, chosen @ bias.flatten(0, 1)
            return
        delta = torch.zeros(y.shape, dtype=carried(y.dtype), device=y.device).reshape(rows, -1)
        felt = None if felt is None else felt.reshape(rows, -1)
        predicted = None if lesson is None else lesson.predicted(felt)
        for samples in _split(self.share):
            noise = self.noise(call, x, y, samples).reshape(len(samples), rows, -1)
            for k, u in zip(samples, noise, strict=True):
                mine = s[:, k]
                if predicted is not None:
                    mine = mine - torch.linalg.vecdot(predicted, u) / self.share.samples
                delta.addcmul_(u, mine.unsqueeze(1))
        if felt is not None:
            delta.mul_(felt)
        if lesson is not None and predicted is not None:
            lesson.learn(delta)
            delta = delta.add_(predicted)
        yield from LAYERS[type(module)].weights(module, x, delta.reshape(y.shape))


@dataclass(frozen=True)
class _Lesson:
    """A layer's part in the feedback of a step."""

    feedback: Feedback
    name: str
    errors: Tensor  # (rows, errors)
    high: Tensor  # which outputs are above zero, (rows, outputs)
    part: float  # of the batch that these examples are

    def predicted(self, felt: Tensor | None) -> Tensor:
        found = self.feedback.predicted(self.name, self.errors, self.high)
        return found if felt is None else found.mul_(felt)

    def learn(self, left: Tensor) -> None:
        self.feedback.note(self.name, self.errors, self.high, left, self.part)


def _split(share: Share) -> Iterator[range]:
    for i in range(share.passes):
        yield range(share.samples * i // share.passes, share.samples * (i + 1) // share.passes)


def _per(slopes: Tensor, n: int) -> Tensor:
    """Slopes (rows, K) for n groups of them: consecutive rows added up, or repeated, or all for all."""
    rows = len(slopes)
    if rows == n:
        return slopes
    if rows % n == 0:
        return slopes.reshape(n, rows // n, -1).sum(1)
    return slopes.repeat_interleave(n // rows, 0) if n % rows == 0 else slopes.sum(0).expand(n, -1)


# --- passes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hooked(
    modules: Iterable[nn.Module],
    hook: Callable[..., Any],
    space: Space | None = None,
    heads: Iterable[nn.Module] = (),
    first: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """``hook(module, call, x, y)`` after each of the modules' calls; what it returns replaces the output.

    Before each call of ``heads``, ``first(module, x)``, whose result replaces the input. Calls on jets of another
    space, inside a loss that differentiates the model itself, are passed over.
    """
    calls: dict[nn.Module, int] = {}

    def foreign(*tensors: Any) -> bool:
        return any(isinstance(t, Jet) and t.space is not space for t in tensors)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not args or not isinstance(output, Tensor) or foreign(args[0], output):
            return None
        calls[module] = calls.get(module, -1) + 1
        with torch._C.DisableTorchFunction(), no_dispatch():  # thousands of small operators, none of them a jet's
            return hook(module, calls[module], args[0], output)

    def before(module: nn.Module, args: Any) -> Any:
        if first is None or not args or foreign(args[0]):
            return None
        with torch._C.DisableTorchFunction(), no_dispatch():
            return first(module, args[0]), *args[1:]

    handles = [m.register_forward_hook(after) for m in modules] + [m.register_forward_pre_hook(before) for m in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Finish = Callable[[Tensor | None], None]


def _toured(
    closure: Closure,
    layers: Iterable[nn.Module],
    nexts: dict[nn.Module, nn.Module],
    begin: Callable[[nn.Module, int, Tensor, Tensor], Finish],
) -> bool:
    """One pass that meets the layers' calls, and what of their outputs has an effect on the next layers' inputs.

    Args:
        closure: returns the loss.
        layers: whose calls are of interest.
        nexts: for some of them, the layer at whose input effects show.
        begin: gets layer, call, input and output, and returns what is to be done once it is known which outputs have
            an effect, or that this cannot be known (None). Until then the output may have been written to.

    Returns:
        Whether all effects of layers with a next one were seen at that one, and were known.
    """
    waiting: dict[nn.Module, tuple[Finish, torch.Size, int]] = {}
    numbers, unknown = itertools.count(), []

    def arrived(module: nn.Module, met: Tensor | None) -> None:
        if module not in waiting:
            return
        finish, shape, number = waiting.pop(module)
        alike = met is not None and met.shape[1] == shape[0]
        felt = effective(met, shape[1:].numel(), number) if alike else None  # type: ignore[arg-type]
        if felt is None:
            unknown.append(module)
        finish(felt)

    with contextlib.ExitStack() as stack:
        stack.enter_context(rehearsal())
        space = stack.enter_context(expansion(PROBES, 1, 1))

        def after(module: nn.Module, call: int, x: Any, y: Any) -> Any:
            at = parts(y, space)[0]
            finish = begin(module, call, parts(x, space)[0], at)
            if module not in nexts:
                return finish(None)
            arrived(nexts[module], None)  # of an earlier call, which never came there
            number = next(numbers)
            waiting[nexts[module]] = finish, at.shape, number
            return Jet(at, probes(at, number), None, space)

        def first(module: nn.Module, x: Any) -> Any:
            at, met, _ = parts(x, space)
            if module in waiting:
                arrived(module, met)
                return at
            return x

        stack.enter_context(_hooked(layers, after, space, nexts.values(), first))
        if nexts:
            stack.enter_context(Interception(space, {}).running())
        loss = closure()
        jet = promoted(loss)
        alone = parts(loss if jet is None else jet, space)[1] is None
    for module in list(waiting):
        arrived(module, None)
    return alone and not unknown


def allot(
    closure: Closure,
    model: nn.Module,
    params: Sequence[Tensor],
    passes: float,
    whole: float = 1.0,
    apart: bool = True,
    chunk: int | None = None,
) -> dict[str, Share]:
    """How many samples each layer gets, so that all of them cost about ``passes`` forward passes.

    The variance of a layer's estimate is taken to be ``d / K`` for d numbers that it puts out (or weights, where
    those are fewer), K samples of which cost ``K c``, c the share of the model that comes after the layer. The
    sum of variances is then least for K in proportion to ``sqrt(d / c)``. A layer that gets d samples or more
    is perturbed along each of its outputs instead; the last one also if that costs as much again as ``passes``, since
    the layers before it then learn from its errors (`.feedback`), as far as their feedback takes no more
    memory than the parameters.

    A loss over the positions of sequences tells positions apart. If as many positions come out of a layer, ``apart``
    lets each position's noise be judged by its own loss alone. Where no later layer mixes positions, that is
    exact, and as many times less noisy as a sequence has positions. Else what a position does to
    others is left out: the estimate is biased. A direction that is somewhat off serves better than one that is
    mostly noise, and the slope along it is exact whatever it is.

    Args:
        closure: returns the loss; it is called once or twice, and leaves no trace.
        model: holds the layers.
        params: what to estimate the gradient for.
        passes: what all of it may cost, in forward passes.
        whole: how many times the closure's examples a batch has of which they are a shard.
        apart: whether positions may be taken for examples.
        chunk: a pass carries no more coefficients than the widest layer has in a plane of so many directions.

    Returns:
        Shares by the names of layers that the closure made use of. `OTHERS` stands for the parameters that none of
        them owns; it is there if such parameters are.
    """
    met: dict[str, _Met] = {}
    layers = moving(model, params)
    every = {name: module for name, module in model.named_modules() if type(module) in LAYERS}  # frozen ones cost too
    names = {module: name for name, module in every.items()}

    def meet(module: nn.Module, call: int, x: Tensor, y: Tensor) -> None:
        before = met.get(names[module], _Met(0, 0, 0, y.shape))
        products = LAYERS[type(module)].products(module, x, y)
        met[names[module]] = _Met(before.outputs + y.numel(), before.products + products, call + 1, y.shape)

    with rehearsal(), plain_run(params), _hooked(list(every.values()), meet):
        closure()
    last = next((name for name in reversed(met) if name in layers), None)
    positions = {n: m.outputs // m.shape[-1] for n, m in met.items() if n in layers and _by_position(layers[n], m)}
    rows = 0  # how many parts the loss has, where it matters
    if any(positions[name] != met[name].shape[0] for name in positions):
        probe = _slopes(_Site(layers[last], Share("signs", 1), 0), closure)  # type: ignore[index]
        rows = 0 if probe is None else len(probe)
    own_rows = {n for n in positions if apart and positions[n] == rows and rows != met[n].shape[0]}
    effects = _effects(closure, every, met, [n for n in met if n in layers and n != last])
    total = sum(m.products for m in met.values()) or 1
    after, sizes, costs, light = total, {}, {}, set()
    for name, m in met.items():
        after -= m.products
        if name not in layers:
            continue
        weights, own = weights_of(layers[name]), _NOISE_COST * m.outputs
        sizes[name] = m.outputs / (rows if name in own_rows else m.shape[0])
        if name in effects:
            sizes[name] *= effects[name].part
        if has_weight_noise(layers[name]) and weights < sizes[name]:
            sizes[name], own = weights, own + m.products
            light.add(name)
        costs[name] = (after + own) / total
    covered = {id(p) for name in sizes for p in layers[name].parameters(recurse=False)}
    others = sum(p.numel() for p in params if id(p) not in covered)
    if others:
        sizes[OTHERS], costs[OTHERS] = others, 2.0
    normalized = any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules())
    scale = passes / (sum(math.sqrt(sizes[n] * costs[n]) for n in sizes) or 1)
    shares = {}
    widest = dict(zip(reversed(met), accumulate((m.outputs for m in reversed(met.values())), max), strict=True))
    for name in sizes:
        samples = max(1, round(scale * math.sqrt(sizes[name] / costs[name])))
        if name not in met:
            shares[name] = Share("parameters", samples)
            continue
        samples = max(samples, min(_FREE // max(round(whole * widest[name]), 1), 64))
        # Moved along each of its outputs a layer is exact if the loss takes each of its positions for an example.
        alone = {met[name].shape[0]} | ({rows} if name == last or name in own_rows else set())
        # One direction for all examples says nothing where a batch is normalized: its mean takes it away.
        exact = positions.get(name) in alone and (name == last or not normalized)
        outputs = met[name].shape[-1]
        enough = outputs <= samples or (name == last and outputs * costs[name] <= passes)
        if exact and isinstance(layers[name], nn.Linear) and enough:
            samples, mode = outputs, "units"
        else:
            mode = "weights" if name in light else "signs"
        held = met[name].outputs / _NUMBERS if chunk is None else widest[name] / (chunk * max(widest.values()))
        parted = min(samples, math.ceil(samples * held))
        following = effects[name].next if mode == "signs" and name in effects else None
        shares[name] = Share(mode, samples, parted, name in own_rows, following)
    return _with_courses(shares, met, last, sum(p.numel() for p in params), whole)


def _by_position(module: nn.Module, met: _Met) -> bool:
    """Whether a layer has its outputs on the last axis, and is called once."""
    return isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)) and met.calls == 1


class _Effect(NamedTuple):
    """Where it shows which outputs of a layer have an effect, and how large a part of them has."""

    next: str
    part: float


def _effects(
    closure: Closure, every: dict[str, nn.Module], met: dict[str, _Met], names: Sequence[str]
) -> dict[str, _Effect]:
    """Layers some of whose outputs have no effect, all of which shows at the input of the layer that is met next."""
    follows = {
        every[name]: every[after]
        for name, after in itertools.pairwise(met)
        if name in names and met[name].calls == met[after].calls == 1 and met[name].outputs <= MOST * met[name].shape[0]
    }
    found: dict[nn.Module, float] = {}

    def begin(module: nn.Module, call: int, x: Tensor, y: Tensor) -> Finish:
        def finish(felt: Tensor | None) -> None:
            if felt is None:
                raise _Told
            found[module] = felt.double().mean().item()

        return finish

    effects = {}
    names_of = {module: name for name, module in every.items()}
    for module, after in follows.items():
        with contextlib.suppress(_Told):
            if _toured(closure, [module], {module: after}, begin) and found[module] < _FELT:
                effects[names_of[module]] = _Effect(names_of[after], found[module])
    return effects


class _Told(BaseException):
    """Nothing more is to be learned from a pass; no error, so that no closure takes it for one."""


def _with_courses(
    shares: dict[str, Share], met: dict[str, _Met], last: str | None, memory: int, whole: float
) -> dict[str, Share]:
    """Shares with feedback for layers whose rows are those of the last one's errors, late layers first."""
    if last is None or shares[last].mode != "units":
        return shares
    errors, found = shares[last].samples, dict(shares)
    rows = met[last].outputs // errors
    for name in reversed(met):
        if name not in shares or shares[name].mode != "signs" or met[name].calls != 1:
            continue
        share, m = shares[name], met[name]
        outputs = m.outputs // rows
        needed = 2 * outputs * errors
        if needed > memory:
            continue
        memory -= needed
        if rows == (m.outputs // m.shape[-1] if share.apart else m.shape[0]):
            course = Course(outputs, errors, outputs * errors / (share.samples * round(rows * whole)))
            found[name] = share._replace(course=course)
    return found


def estimate(
    closure: Closure,
    model: nn.Module,
    params: Sequence[Tensor],
    shares: dict[str, Share],
    seed: Any,
    ahead: float = 0.0,
    feedback: Feedback | None = None,
    part: float = 1.0,
) -> list[Tensor]:
    """An estimate of the gradient, from perturbed activities: unbiased but for positions that are taken `apart`.

    Args:
        closure: returns the loss. It is called several times, and must compute the same each time; torch's
            random numbers, and what it writes to buffers, are set back after each.
        model: holds the layers: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Embedding` and `nn.LayerNorm` are
            perturbed at their outputs; a convolution with more outputs than weights, at its weights. Axis 0 of what
            they put out counts examples, or parts of examples in their order.
        params: what to estimate the gradient for. Those that no such layer owns are moved themselves.
        shares: of each layer, as `allot` gives them.
        seed: an integer; equal seeds give equal noise.
        ahead: of a shard of a batch, how many times its examples come before it. Each example has its own noise, by its
            place in the whole batch, so that the mean of the shards' estimates is the estimate of the whole.
        feedback: predicts gradients, to less variance, and gets lessons from this batch.
        part: of the whole batch that a shard is.

    Returns:
        One tensor for each parameter, zero where the loss makes no use of it.

    The loss has to tell its examples apart (see `jetplane.evaluate`); if it does not, the slope of the
    whole batch is taken for each example's, which is unbiased too, and as many times noisier as there are examples.

    >>> import torch
    >>> from torch.nn import functional as F
    >>> net, x, y = torch.nn.Sequential(torch.nn.Linear(5, 3)), torch.randn(8, 5), torch.randint(3, (8,))
    >>> closure = lambda: F.cross_entropy(net(x), y)
    >>> params = list(net.parameters())
    >>> shares = allot(closure, net, params, passes=50)
    >>> shares
    {'0': Share(mode='units', samples=3, passes=1, apart=False, next=None, course=None)}
    >>> weight, bias = estimate(closure, net, params, shares, seed=0)  # exact: all outputs were moved
    >>> slopes = torch.autograd.grad(closure(), params)
    >>> bool(torch.allclose(weight, slopes[0], atol=1e-6))
    True
    """
    layers = moving(model, params)
    sites = {
        layers[name]: _Site(layers[name], share, key(seed, i), ahead)
        for i, (name, share) in enumerate(shares.items())
        if name in layers
    }
    total = {id(p): torch.zeros_like(p, dtype=carried(p.dtype)) for p in params}
    names = {layers[name]: name for name in shares if name in layers}
    last = next(reversed(sites.values()), None)
    with torch.no_grad():
        found = {module: _slopes(site, closure) for module, site in sites.items()}
        errors = None if last is None or last.share.mode != "units" else found[last.module]

        def begin(module: nn.Module, call: int, x: Tensor, y: Tensor) -> Finish:
            site, slopes = sites[module], found[module]
            taught = feedback is not None and errors is not None and site.share.course is not None
            # Examples may be fewer than in the batch that shares were allotted for, but must be the errors' own.
            taught = taught and slopes is not None and site.rows(y) == len(errors)  # type: ignore[arg-type]
            high = (y > 0).reshape(len(errors), -1) if taught else None  # type: ignore[arg-type]
            lesson = _Lesson(feedback, names[module], errors, high, part) if taught else None  # type: ignore[arg-type]
            if module in nexts:
                x = x.clone()

            def finish(felt: Tensor | None) -> None:
                if slopes is None:
                    return
                for param, direction in site.direction(call, x, y, slopes, lesson, felt):
                    if id(param) in total:
                        total[id(param)] += direction

            return finish

        every = dict(model.named_modules())
        nexts = {m: every[site.share.next] for m, site in sites.items() if site.share.next is not None}
        if not _toured(closure, sites, nexts, begin):  # the model has changed its ways
            nexts = {}
            for t in total.values():
                t.zero_()
            _toured(closure, sites, nexts, begin)
        covered = {id(p) for module in sites for p in module.parameters(recurse=False)}
        others = [p for p in params if id(p) not in covered]
        if others and OTHERS in shares:
            directions = Directions(shares[OTHERS].samples, seed=int(key(seed, -1)))
            with rehearsal(), contextlib.suppress(UnusedParametersError):
                slope = evaluate(closure, others, directions, "none").slope
                for i, p in enumerate(others):
                    total[id(p)] = directions.combine(i, p, slope / directions.k)
    return [total[id(p)].to(p.dtype) for p in params]


def _slopes(site: _Site, closure: Closure) -> Tensor | None:
    """Slopes (rows, samples) of the examples along a layer's noise; None if the loss does not depend on it."""
    slopes = []
    for samples in _split(site.share):
        with rehearsal(), expansion(len(samples), 1, 1, examples=True) as space:

            def perturb(module: nn.Module, call: int, x: Any, y: Any, space: Space = space, samples: range = samples):
                at, first, _ = parts(y, space)
                noise = site.noise(call, parts(x, space)[0], at, samples)
                return Jet(at, noise if first is None else first + noise, None, space)

            with _hooked([site.module], perturb, space), Interception(space, {}).running():
                loss = closure()
            jet = promoted(loss)
            loss = loss if jet is None else jet
            slope = parts(loss, space)[1]
            if slope is None:
                return None
            slope = slope.reshape(len(samples))
            rows = known(loss, slope)
            slopes.append(slope.unsqueeze(0) if rows is None else rows)
    return torch.cat(slopes, 1)
