"""One evaluation of a closure on a plane: loss, slope and curvature along K directions.

    slope[i]        = grad(L) . v_i
    curvature[i, j] = v_i^T Hess(L) v_j

The closure runs once, unmodified. A function mode replaces each parameter by its jet wherever an
operator consumes it, and the jets carry the derivatives through: nothing is stored for a backward
pass.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .. import _sharding
from .. import rules as rules  # installs the dispatcher of jets
from ..directions import AbstractDirections, ChosenDirections, HeldDirections, StoredDirections
from ..errors import (
    ArgumentError,
    DerivativeError,
    DeviceError,
    DTypeError,
    JetplaneWarning,
    LossError,
    NonFiniteError,
    ShapeError,
    UnusedParametersError,
    located,
)
from ..jets.jet import (
    LOSS,
    MODEL,
    PARAMETER,
    Jet,
    Space,
    any_promoted,
    carried,
    forget_promoted,
    goes_outside,
    kind_of,
    parts,
    promoted,
)
from ..jets.structured import Deferred, LowRank, Stacked, Tangents
from ..rules import higher_order, sparse
from ..rules.dispatch import inside_loss
from ..rules.dispatch import loss as mark_loss
from ..rules.examples import known
from ..rules.functions import intercept_functions
from ..rules.losses import cross_entropy_whole
from . import chunks as chunking
from . import compilers, sharded
from .entrance import Entrance, LastEntrance
from .side_effects import rehearsal

Pairs = Literal["all", "diagonal"] | int
KEPT = 1 << 26  # bytes of drawn tangents that are kept for the next operator, or the update, that asks for them
Curvature = Literal["hessian", "ggn", "none"]
NO_LOSS = (
    "curvature='ggn' met no loss function: it needs one of torch.nn.functional's losses on the way to the result, or "
    "your own marked with jetplane.loss(), as a decorator or in a with statement"
)

_active = threading.local()  # depth: how many evaluations are under way in this thread


@dataclass(frozen=True)
class SlopeMoments:
    """What of a batch tells how far its slope is noise: sums over examples n of their parts ``e_n`` of it.

    The moments of shards of a batch add up to those of the whole.

    Attributes:
        count: how many examples.
        total: ``sum_n e_n``, the slope, shape (K,), in float64.
        products: ``sum_n e_n e_n^T``, shape (K, K), in float64.

    >>> import torch
    >>> SlopeMoments.of(torch.tensor([[1.0], [3.0]])).covariance  # two examples: N times their variance 2
    tensor([[4.]], dtype=torch.float64)
    """

    count: int
    total: Tensor
    products: Tensor

    @staticmethod
    def of(examples: Tensor) -> SlopeMoments:
        """Those of the examples' parts (N, K)."""
        apart = examples.double()
        return SlopeMoments(len(apart), apart.sum(0), apart.mT @ apart)

    @property
    def covariance(self) -> Tensor | None:
        """The covariance (K, K) of the slope, a sum over examples drawn at random; None for fewer than two of them."""
        if self.count < 2:
            return None
        apart = self.products - self.total.outer(self.total) / self.count
        return apart * (self.count / (self.count - 1))


@dataclass(frozen=True)
class PlaneModel:
    """The loss on a plane to second order: ``L(a) = value + slope . a + a^T curvature a / 2``.

    Attributes:
        value: the loss, shape ().
        slope: directional derivatives, shape (K,).
        curvature: (K, K), or (K,) for the diagonal alone, or (planes, b, b) for independent planes
            of b directions, or None where it was not asked for.
        examples: each example's part of the slope, (N, K); they add up to it. None where it was not asked
            for or is not known.
        formed: which operators formed low-rank tangents, since they could not use the factors, and how often.
        pooled: the moments of the slope over the examples of all ranks, where several evaluated shards of a batch.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor | None
    examples: Tensor | None = None
    formed: dict[str, int] = field(default_factory=dict)
    pooled: SlopeMoments | None = None

    @property
    def moments(self) -> SlopeMoments | None:
        """The moments of the slope over the examples, of this process or of all ranks; None if they are not known."""
        return self.pooled if self.examples is None else SlopeMoments.of(self.examples)


@contextlib.contextmanager
def expansion(k: int, block: int, order: int, gauss_newton: bool = False, examples: bool = False) -> Iterator[Space]:
    """The space of one evaluation; evaluations inside of it get a higher level."""
    depth = getattr(_active, "depth", 0) + 1
    space = Space(k, block, order, depth, gauss_newton, examples)
    # A dispatch mode around the evaluation is off while it handles a call, and so must its key be.
    include = torch._C._dispatch_tls_local_include_set().remove(torch._C.DispatchKey.Python)
    include = include.remove(torch._C.DispatchKey.PythonTLSSnapshot)
    space.keys = include, torch._C._dispatch_tls_local_exclude_set()
    _active.depth = depth
    try:
        with compilers.eager():
            yield space
    finally:
        _active.depth = depth - 1
        forget_promoted(space)
        space.finish()


def nested() -> bool:
    """Whether an evaluation is under way in this context."""
    return getattr(_active, "depth", 0) > 0


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
_ASKING = {
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
_REVERSE = {torch.autograd.grad: "torch.autograd.grad", torch.Tensor.backward: "backward()"}

_LOSSES = {
    getattr(F, name)
    for name in dir(F)
    if name.endswith("_loss") or name in ("cross_entropy", "kl_div", "nll_loss")
    or name.startswith("binary_cross_entropy")
}  # fmt: skip


def _warn_if_flat(func: Any, result: Any, space: Space) -> Any:
    _, first, second = parts(result, space)
    if first is not None and second is None:
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
    """Replaces parameters by jets in the arguments of every torch function, and guards the exits."""

    def __init__(self, space: Space, seeds: dict[int, Callable[[], Tensor]]) -> None:
        super().__init__()
        self.space = space
        self.seeds = seeds
        self.jets: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Intercept whatever a user's function calls; errors say where in it they arose."""
        with intercept_functions(self._seeded), self:
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
        if func in _ASKING:
            return func(*args, **(kwargs or {}))
        args = tuple(self._seeded(a) for a in args)
        kwargs = {name: self._seeded(a) for name, a in kwargs.items()} if kwargs else {}
        if func in _EXITS and args and isinstance(args[0], Jet):
            raise DerivativeError(
                f"{_EXITS[func]} on a tensor of shape {tuple(args[0].shape)} that depends on the "
                "parameters: its derivatives would be lost. Stay in torch, or detach() the tensor first "
                "if they are not wanted"
            )
        if func in _REVERSE:
            raise DerivativeError(
                f"{_REVERSE[func]} inside a forward-only evaluation. A closure returns its loss and calls no "
                "backward(); for derivatives inside of it use jetplane.jet, jetplane.hvp or jetplane.laplacian"
            )
        if higher_order.is_higher_order(func):
            with self:  # the functions that it takes may capture parameters
                return higher_order.run(func, args, kwargs)
        if sparse.constant(func, args):
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **kwargs)
        if self.space.gauss_newton and func in _LOSSES:
            with mark_loss():
                return _warn_if_flat(func, func(*args, **kwargs), self.space)
        return func(*args, **kwargs)

    def _seeded(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            x = sharded.unwrapped(x)
            seed = self.seeds.pop(id(x), None)  # what makes the jet looks at the parameter itself
            if seed is not None:
                self.jets[id(x)] = seed()
            if id(x) in self.jets:
                return self.jets[id(x)]
            if any_promoted():
                jet = promoted(x)
                return x if jet is None else jet
            return x
        if isinstance(x, (list, tuple)):
            items = [self._seeded(v) for v in x]
            if all(a is b for a, b in zip(items, x, strict=True)):
                return x
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, dict):
            return {name: self._seeded(v) for name, v in x.items()}
        return x


def evaluate(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    directions: AbstractDirections | Sequence[Tensor | Tangents],
    curvature: Curvature = "hessian",
    pairs: Pairs = "all",
    *,
    examples: bool = False,
    chunk: int | Literal["auto"] | None = None,
    memory: int | None = None,
) -> PlaneModel:
    """Run a closure once on the plane that directions span at the parameters.

    Args:
        closure: returns a scalar loss, computed by torch functions of the parameters.
        params: the tensors that move; others are constants. A complex one moves along complex tangents, as the two
            real ones that its parts are.
        directions: `jetplane.Directions`, or for each parameter one tensor of shape (K, *param.shape) or
            `jetplane.LowRank`.
        curvature: "hessian" for the exact one; "ggn" for the Gauss-Newton one, ``J^T Hess(l) J`` with J
            the model's Jacobian and l the loss function, which costs linearly many products in K; "none"
            for the slope alone.
        pairs: "all" K(K+1)/2 pairs, "diagonal", or an int b for independent planes of b consecutive
            directions each.
        examples: also give each example's part of the slope, ``examples[n, i] = grad(L_n) . v_i`` with
            ``L = sum_n L_n``, at next to no cost. Examples are counted along the first axis of what the loss
            function takes, and their parts are known for torch's own losses, times constants, in sums, and,
            with "ggn", beside regularizers and for losses marked with `jetplane.loss`. Else None.
        chunk: directions to carry at a time; all by default. The closure then runs once for each chunk, and
            where all pairs of exact curvature are wanted once for each two halves of chunks: the same numbers for
            less memory. With "ggn" parameters and losses have all directions at once, and the model a chunk of
            them. All runs but the last leave no trace: random numbers are drawn again, and buffers set back. "auto"
            takes the largest chunk that ``memory`` allows, by the activations that one plain run keeps alive.
        memory: bytes for "auto"; half of what is free by default.

    Returns:
        A `PlaneModel` of detached tensors, float32 at least.

    Raises:
        ArgumentError: no parameters, k < 1, pairs that do not divide k, a chunk below 1 (or 2 for all pairs, or
            that planes do not fill), an unknown word.
        ShapeError, DTypeError, DeviceError: directions that do not match their parameter.
        LossError: the closure did not return a scalar floating-point tensor.
        UnusedParametersError: the loss depends on none of the parameters.
        NonFiniteError: NaN or infinity in the loss, slope or curvature.
        DerivativeError: the closure leaves torch, calls autograd, or writes to a parameter.

    Parameters are never modified, whatever is raised.

    >>> import torch, jetplane as jp
    >>> w = torch.tensor([1.0, 2.0])
    >>> plane = jp.evaluate(lambda: (w**3).sum(), [w], [torch.eye(2)])
    >>> plane.slope, plane.curvature
    (tensor([ 3., 12.]), tensor([[ 6.,  0.],
            [ 0., 12.]]))

    Source: Cobb et al., arXiv 2408.10419, sections 2 and 3.
    """
    params = list(params)
    drawn = _checked_directions(params, directions)
    block = _block(pairs, drawn.k)
    if curvature not in ("hessian", "ggn", "none"):
        raise ArgumentError(f"curvature must be 'hessian', 'ggn' or 'none', got {curvature!r}")
    if curvature == "none":
        pairs, block = "diagonal", 1  # there are none
    if torch.compiler.is_compiling():
        if chunk is not None:
            raise ArgumentError("chunk= cannot be compiled; compile the evaluation of one chunk")
        return _traced(closure, params, drawn, curvature, pairs, examples)

    def at_once(chosen: AbstractDirections) -> PlaneModel:
        return _at_once(closure, params, chosen, curvature, pairs, examples)

    if chunk is None:
        return at_once(drawn)
    crossed = pairs == "all" and curvature != "none"
    completed = crossed and curvature == "ggn" and not any(_sharding.is_sharded(p) for p in params)
    if completed:
        crossed, block = False, 1
    if chunk == "auto":
        room = chunking.free_memory(params[0].device) // 2 if memory is None else memory
        alive = chunking.activations(closure)
        size = chunking.affordable(drawn.k, block, curvature == "hessian", crossed, alive, room)
    else:
        size = chunking.checked(chunk, drawn.k, block, crossed)
    if size >= drawn.k:
        return at_once(drawn)
    if completed:
        model = _completed(closure, params, drawn, size, examples)
        if model is not None:
            return model
        size, crossed = max(size, 2), True
    return _in_chunks(at_once, drawn, pairs, size, crossed)


def _completed(
    closure: Callable[[], Tensor], params: Sequence[Tensor], drawn: AbstractDirections, size: int, examples: bool
) -> PlaneModel | None:
    """A Gauss-Newton plane whose last run puts together what enters the losses; None where that cannot be."""
    runs = [run for (run,) in chunking.parts_of(drawn.k, size, crossed=False)]
    kept = []
    for run in runs[:-1]:
        entrance = Entrance()
        with rehearsal():
            _at_once(closure, params, ChosenDirections(drawn, [run]), "ggn", "all", False, entrance)
        if entrance.barred:
            return None
        kept.append(entrance.kept)
    return _at_once(closure, params, drawn, "ggn", "all", examples, LastEntrance(kept, runs[-1]))


def _in_chunks(
    at_once: Callable[[AbstractDirections], PlaneModel],
    drawn: AbstractDirections,
    pairs: Pairs,
    size: int,
    crossed: bool,
) -> PlaneModel:
    plan = chunking.parts_of(drawn.k, size, crossed)
    models: list[PlaneModel] = []
    for part in plan:
        last = len(models) + 1 == len(plan)
        with contextlib.nullcontext() if last else rehearsal():
            models.append(at_once(ChosenDirections(drawn, part)))

    def joined(pieces: list[Tensor | None], square: bool = False) -> Tensor | None:
        known = [piece for piece in pieces if piece is not None]
        return chunking.joined(drawn.k, plan, known, square) if len(known) == len(pieces) else None

    slope = joined([m.slope for m in models])
    assert slope is not None
    if pairs in ("all", "diagonal"):
        second = joined([m.curvature for m in models], crossed)
    else:
        second = torch.cat([m.curvature for m in models if m.curvature is not None])
    examples = joined([None if m.examples is None else m.examples.T for m in models])
    formed = sum((Counter(m.formed) for m in models), Counter())
    return PlaneModel(models[-1].value, slope, second, None if examples is None else examples.T, formed)


def _at_once(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    drawn: AbstractDirections,
    curvature: Curvature,
    pairs: Pairs,
    examples: bool,
    entrance: Entrance | None = None,
) -> PlaneModel:
    order = 2 if curvature == "hessian" else 1
    block = _block(pairs, drawn.k)
    with torch.inference_mode(), expansion(drawn.k, block, order, curvature == "ggn", examples) as space:
        space.entrance = entrance
        mode = Interception(space, {})
        for i, p in enumerate(params):
            _plant(mode, p, i, drawn, p)
        with mode.running(), _copies_planted(mode, params, drawn):
            loss = sharded.gathered(closure())
        value, first, second = _scalar_parts(loss, space, bool(mode.jets))
        if second is None and curvature != "none":
            second = value.new_zeros(space.pairs)
        if first is None:
            first = value.new_zeros(drawn.k)
        second = None if second is None else _matrix(second, space, pairs)
        model = PlaneModel(value, first, second, known(loss, first) if examples else None, space.formed)
    return model if space.level > 1 else finished(model)


class _Seeding(TorchFunctionMode):
    """What is left of `Interception` in compiled code: parameters become jets."""

    def __init__(self, jets: dict[int, Jet], kind: type, space: Space) -> None:
        super().__init__()
        self.jets = jets
        self.kind = kind  # of the parameters: whoever asks for the identity of data recompiles for each batch
        self.space = space

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._seeded, (args, kwargs or {}))
        if self.space.gauss_newton and (func in _LOSSES or inside_loss()):
            # Operators meet the jets after the user's code has run: what enters a loss must say so itself.
            args, kwargs = tree_map(self._entering, (args, kwargs))
        if func is F.cross_entropy:
            func = cross_entropy_whole
        return func(*args, **kwargs)

    def _entering(self, x: Any) -> Any:
        if not isinstance(x, Jet) or x.kind == LOSS:
            return x
        if x.has_factors:
            return Jet(x.primal, None, None, self.space.key, None, x.left, x.right, LOSS)
        return Jet(x.primal, x.first, x.second, self.space.key, None, None, None, LOSS)

    def _seeded(self, x: Any) -> Any:
        return self.jets.get(id(x), x) if isinstance(x, self.kind) else x


def _traced(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    drawn: AbstractDirections,
    curvature: Curvature,
    pairs: Pairs,
    examples: bool,
) -> PlaneModel:
    """`evaluate` as a compiler can follow it: jets are made in the graph, and nothing is checked."""
    order = 2 if curvature == "hessian" else 1
    space = Space(drawn.k, _block(pairs, drawn.k), order, 1, curvature == "ggn", examples)
    key = space.key
    with torch.no_grad():
        jets = {}
        for i, p in enumerate(params):
            tangents = drawn.structured(i, p)
            if isinstance(tangents, (Deferred, Stacked)):
                tangents = tangents.formed()
            if isinstance(tangents, LowRank):
                low = tangents.to(carried(p.dtype))
                jets[id(p)] = Jet(p.detach(), None, None, key, None, low.left, low.right)
            elif tangents is not None:
                jets[id(p)] = Jet(p.detach(), tangents.to(carried(p.dtype)), None, key)
        kind = torch.nn.Parameter if all(isinstance(p, torch.nn.Parameter) for p in params) else Tensor
        with _Seeding(jets, kind, space):
            loss = closure()
        if curvature == "ggn" and loss.kind == MODEL:  # type: ignore[attr-defined]
            raise LossError(NO_LOSS)
        value, first, second = loss.primal, loss.first, loss.second  # type: ignore[attr-defined]
        apart = loss.examples if examples else None  # type: ignore[attr-defined]
        if curvature == "none":
            return PlaneModel(value, first, None, apart)
        if second is None:
            second = value.new_zeros(space.pairs)
        return PlaneModel(value, first, _matrix(second, space, pairs), apart)


def _plant(mode: Interception, param: Tensor, index: int, drawn: AbstractDirections, like: Tensor) -> None:
    """Let a parameter be replaced by its jet; where it is sharded, its part by one, and itself by a `DTensor` of it."""
    here = _sharding.local(param)
    mode.seeds[id(here)] = _seed(here, index, drawn, mode.space, like)
    if here is not param:
        mode.seeds[id(param)] = lambda: _sharding.wrapped(mode._seeded(here), param)


@contextlib.contextmanager
def _copies_planted(mode: Interception, params: Sequence[Tensor], drawn: AbstractDirections) -> Iterator[None]:
    """Let whole copies of sharded parameters, made for a module, be replaced by jets too."""
    places = {id(p): i for i, p in enumerate(params)}

    def gathered(param: Tensor, copy: Tensor) -> None:
        like = copy if _sharding.is_sharded(copy) else _sharding.whole(param)
        _plant(mode, copy, places[id(param)], drawn, like)

    with sharded.running(params, gathered):
        yield


def _seed(param: Tensor, index: int, drawn: AbstractDirections, space: Space, like: Tensor) -> Callable[[], Tensor]:
    def seed() -> Tensor:
        tangents = drawn.structured(index, like)
        if tangents is None:  # a block that no direction moves
            return param.detach()
        jet = Jet(param.detach().as_subclass(Tensor), tangents.to(carried(param.dtype)), None, space)
        jet.is_seed, jet.kind = True, PARAMETER
        return jet.as_subclass(type(param))

    return seed


def _scalar_parts(loss: Any, space: Space, touched: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not isinstance(loss, Tensor):
        raise LossError(f"the closure must return a scalar tensor, got {type(loss).__name__}")
    if goes_outside(type(loss)):
        raise LossError(
            f"the closure must return a plain tensor, got a {type(loss).__name__}, which wraps others; return the one "
            "inside of it that is to be differentiated"
        )
    jet = promoted(loss)
    loss = loss if jet is None else jet
    if loss.numel() != 1:
        raise LossError(f"the closure must return a scalar loss, got shape {tuple(loss.shape)}")
    if not loss.dtype.is_floating_point:
        raise LossError(f"the closure must return a floating-point loss, got {loss.dtype}")
    if not (isinstance(loss, Jet) and loss.space is space):
        raise UnusedParametersError(
            "the loss does not depend on the parameters: "
            + (
                "they were used, but every path to the loss was cut (detach(), item(), a comparison)"
                if touched
                else "the closure uses none of them; expected a loss computed from these very tensors"
            )
        )
    value, first, second = parts(loss, space)
    if space.gauss_newton and kind_of(loss) == MODEL:
        raise LossError(NO_LOSS)
    return (
        value.reshape(()),
        None if first is None else first.reshape(space.k),
        None if second is None else second.reshape(space.pairs),
    )


def _matrix(second: Tensor, space: Space, pairs: Pairs) -> Tensor:
    """Second coefficients (pairs, *S) as (k, *S), (k, k, *S) or (planes, b, b, *S)."""
    if pairs == "diagonal":
        return second
    b = space.block
    i = torch.arange(b, device=second.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    index = low * (2 * b - 1 - low) // 2 + high  # where the pair is among those of a plane
    full = second.reshape(space.planes, space.plane_pairs, *second.shape[1:])[:, index]
    return full[0] if pairs == "all" else full


def finished(model: PlaneModel) -> PlaneModel:
    """Plain tensors of at least single precision, checked to be finite.

    Raises:
        NonFiniteError: NaN or infinity in one of them.
    """

    def plain(t: Tensor) -> Tensor:
        return t.clone() if t.dtype in (torch.float32, torch.float64) else t.float()

    value, slope = plain(model.value), plain(model.slope)
    curvature = None if model.curvature is None else plain(model.curvature)
    for name, t in (("loss", value), ("slope", slope), ("curvature", curvature)):
        if t is not None and not bool(torch.isfinite(t).all()):
            raise NonFiniteError(f"the {name} is not finite: {t.tolist() if t.numel() <= 9 else 'NaN or inf inside'}")
    examples = None if model.examples is None else plain(model.examples)
    return replace(model, value=value, slope=slope, curvature=curvature, examples=examples)
    examples = None if model.examples is None else plain(model.examples)
    return replace(model, value=value, slope=slope, curvature=curvature, examples=examples)


def _block(pairs: Pairs, k: int) -> int:
    block = {"all": k, "diagonal": 1}.get(pairs, pairs) if isinstance(pairs, str) else pairs
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or k % block:
        raise ArgumentError(f"pairs must be 'all', 'diagonal' or a divisor of k = {k}, got {pairs!r}")
    return block


def _checked_directions(
    params: Sequence[Tensor], directions: AbstractDirections | Sequence[Tensor | Tangents]
) -> AbstractDirections:
    if not params:
        raise ArgumentError("no parameters: expected at least one tensor that the closure uses")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise ArgumentError(f"parameter {i} must be a tensor, got {type(p).__name__}")
        if not (p.dtype.is_floating_point or p.dtype.is_complex):
            raise DTypeError(f"parameter {i} must be of a floating dtype, got {p.dtype}")
        if sparse.is_sparse(p):
            raise ArgumentError(
                f"parameter {i} is of layout {p.layout}; expected a dense tensor. Let its values be the parameter, and "
                "write products by its indices: torch.zeros(rows, n).index_add(0, row, values[:, None] * x[column])"
            )
    if len({id(p) for p in params}) != len(params):
        raise ArgumentError("a parameter is given twice; expected each tensor once")
    if isinstance(directions, (HeldDirections, StoredDirections)):
        return directions
    if isinstance(directions, AbstractDirections):
        return HeldDirections(directions, params, limit=KEPT)
    if len(directions) != len(params):
        raise ShapeError(f"expected one tensor of tangents for each of {len(params)} parameters, got {len(directions)}")
    k = directions[0].shape[0] if len(directions[0].shape) else 0
    if k < 1:
        raise ArgumentError("k must be at least 1: tangents are of shape (k, *param.shape)")
    for i, (p, t) in enumerate(zip(params, directions, strict=True)):
        if tuple(t.shape) != (k, *p.shape):
            raise ShapeError(f"tangents {i}: expected shape {(k, *p.shape)}, got {tuple(t.shape)}")
        if t.dtype != p.dtype:
            raise DTypeError(f"tangents {i}: expected {p.dtype} as its parameter, got {t.dtype}")
        if t.device != p.device:
            raise DeviceError(f"tangents {i}: expected device {p.device} as its parameter, got {t.device}")
    return StoredDirections([t.detach() if isinstance(t, Tensor) else t for t in directions])
