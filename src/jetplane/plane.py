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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from . import rules as rules  # installs the dispatcher of jets
from .errors import (
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
from .jet import MODEL, PARAMETER, Jet, Space, any_promoted, forget_promoted, parts, precise, promoted
from .rules.custom import intercept_functions
from .rules.dispatch import loss as mark_loss
from .rules.examples import known

Pairs = Literal["all", "diagonal"] | int
Curvature = Literal["hessian", "ggn", "none"]

_active = threading.local()  # depth: how many evaluations are under way in this thread


class Drawn(Protocol):
    """Directions that are drawn when asked for: `jetplane.Directions` and anything like it."""

    @property
    def k(self) -> int:
        """Number of directions."""
        ...

    def prepare(self, params: Sequence[Tensor]) -> None:
        """Called with all parameters before any tangent is drawn."""
        ...

    def draw(self, index: int, param: Tensor) -> Tensor:
        """The tangents (K, *param.shape) of the parameter at this index."""
        ...


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
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor | None
    examples: Tensor | None = None


@contextlib.contextmanager
def expansion(k: int, block: int, order: int, gauss_newton: bool = False) -> Iterator[Space]:
    """The space of one evaluation; evaluations inside of it get a higher level."""
    depth = getattr(_active, "depth", 0) + 1
    space = Space(k, block, order, depth, gauss_newton)
    included = torch._C._dispatch_tls_local_include_set()
    for mode in (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot):
        included = included.remove(mode)  # modes around an evaluation see its operators, and none of the rules' own
    space.keys = included, torch._C._dispatch_tls_local_exclude_set()
    _active.depth = depth
    try:
        yield space
    finally:
        _active.depth = depth - 1
        forget_promoted(space)


def nested() -> bool:
    """Whether an evaluation is under way in this context."""
    return getattr(_active, "depth", 0) > 0


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

    def __init__(self, space: Space, seeds: dict[int, Callable[[], Jet]]) -> None:
        super().__init__()
        self.space = space
        self.seeds = seeds
        self.jets: dict[int, Jet] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Intercept whatever a user's function calls; errors say where in it they arose."""
        thread = threading.get_ident()
        with intercept_functions(self._seeded, lambda: threading.get_ident() == thread), self:
            try:
                yield
            except DerivativeError as error:
                located(error)
                raise

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
        if self.space.gauss_newton and func in _LOSSES:
            with mark_loss():
                return _warn_if_flat(func, func(*args, **kwargs), self.space)
        return func(*args, **kwargs)

    def _seeded(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            seed = self.seeds.get(id(x))
            if seed is not None:
                if id(x) not in self.jets:
                    self.jets[id(x)] = seed()
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
    directions: Drawn | Sequence[Tensor],
    curvature: Curvature = "hessian",
    pairs: Pairs = "all",
    examples: bool = False,
) -> PlaneModel:
    """Run a closure once on the plane that directions span at the parameters.

    Args:
        closure: returns a scalar loss, computed by torch functions of the parameters.
        params: the tensors that move; others are constants.
        directions: `jetplane.Directions`, or one tensor of shape (K, *param.shape) for each parameter.
        curvature: "hessian" for the exact one; "ggn" for the Gauss-Newton one, ``J^T Hess(l) J`` with J
            the model's Jacobian and l the loss function, which costs linearly many products in K; "none"
            for the slope alone.
        pairs: "all" K(K+1)/2 pairs, "diagonal", or an int b for independent planes of b consecutive
            directions each.
        examples: also give each example's part of the slope, ``examples[n, i] = grad(L_n) . v_i`` with
            ``L = sum_n L_n``, at next to no cost. Examples are counted along the first axis of what the loss
            function takes, and their parts are known for torch's own losses, times constants, in sums, and,
            with "ggn", beside regularizers and for losses marked with `jetplane.loss`. Else None.

    Returns:
        A `PlaneModel` of detached tensors, float32 at least.

    Raises:
        ArgumentError: no parameters, k < 1, pairs that do not divide k, an unknown word.
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
    k, draw = _check_directions(params, directions)
    block = _block(pairs, k)
    if curvature not in ("hessian", "ggn", "none"):
        raise ArgumentError(f"curvature must be 'hessian', 'ggn' or 'none', got {curvature!r}")
    order = 2 if curvature == "hessian" else 1
    if torch.compiler.is_compiling():
        if examples:
            raise ArgumentError("examples=True cannot be compiled; run it eagerly")
        return _traced(closure, params, draw, Space(k, block, order, 1), curvature, pairs)
    with torch.inference_mode(), expansion(k, block, order, curvature == "ggn") as space:
        space.examples = examples
        seeds = {id(p): _seed(p, i, draw, space) for i, p in enumerate(params)}
        mode = Interception(space, seeds)
        with mode.running():
            loss = closure()
        value, first, second = _scalar_parts(loss, space, bool(mode.jets))
        if second is None and curvature != "none":
            second = value.new_zeros(space.pairs)
        if first is None:
            first = value.new_zeros(k)
        second = None if second is None else _matrix(second, space, pairs)
        model = PlaneModel(value, first, second, known(loss, first) if examples else None)
    return model if space.level > 1 else finished(model)


class _Seeding(TorchFunctionMode):
    """What is left of `Interception` in compiled code: parameters become jets."""

    def __init__(self, jets: dict[int, Jet], kind: type) -> None:
        super().__init__()
        self.jets = jets
        self.kind = kind  # of the parameters: whoever asks for the identity of data recompiles for each batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._seeded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _seeded(self, x: Any) -> Any:
        return self.jets.get(id(x), x) if isinstance(x, self.kind) else x


def _traced(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    draw: Callable[[int, Tensor], Tensor],
    space: Space,
    curvature: Curvature,
    pairs: Pairs,
) -> PlaneModel:
    """`evaluate` as a compiler can follow it: jets are made in the graph, and nothing is checked."""
    if curvature == "ggn":
        raise ArgumentError("curvature='ggn' cannot be compiled; use 'hessian' or 'none', or run it eagerly")
    key = space.key
    with torch.no_grad():
        jets = {id(p): Jet(p.detach(), precise(draw(i, p)), None, key) for i, p in enumerate(params)}
        kind = torch.nn.Parameter if all(isinstance(p, torch.nn.Parameter) for p in params) else Tensor
        with _Seeding(jets, kind):
            loss = closure()
        value, first, second = loss.primal, loss.first, loss.second  # type: ignore[attr-defined]
        if curvature == "none":
            return PlaneModel(value, first, None)
        if second is None:
            second = value.new_zeros(space.pairs)
        return PlaneModel(value, first, _matrix(second, space, pairs))


def _seed(param: Tensor, index: int, draw: Callable[[int, Tensor], Tensor], space: Space) -> Callable[[], Jet]:
    def seed() -> Jet:
        jet = Jet(param.detach(), precise(draw(index, param)), None, space)
        jet.is_seed, jet.kind = True, PARAMETER
        return jet

    return seed


def _scalar_parts(loss: Any, space: Space, touched: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not isinstance(loss, Tensor):
        raise LossError(f"the closure must return a scalar tensor, got {type(loss).__name__}")
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
    if space.gauss_newton and loss.kind == MODEL:
        raise LossError(
            "curvature='ggn' met no loss function: it needs one of torch.nn.functional's losses on the way "
            "to the result, or your own marked with jetplane.loss(), as a decorator or in a with statement"
        )
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
    rows = torch.triu_indices(b, b, device=second.device)
    index = torch.empty((b, b), dtype=torch.long, device=second.device)
    index[rows[0], rows[1]] = index[rows[1], rows[0]] = torch.arange(space.plane_pairs, device=second.device)
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
    return PlaneModel(value, slope, curvature, None if model.examples is None else plain(model.examples))


def _block(pairs: Pairs, k: int) -> int:
    block = {"all": k, "diagonal": 1}.get(pairs, pairs) if isinstance(pairs, str) else pairs
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or k % block:
        raise ArgumentError(f"pairs must be 'all', 'diagonal' or a divisor of k = {k}, got {pairs!r}")
    return block


def _check_directions(
    params: Sequence[Tensor], directions: Drawn | Sequence[Tensor]
) -> tuple[int, Callable[[int, Tensor], Tensor]]:
    if not params:
        raise ArgumentError("no parameters: expected at least one tensor that the closure uses")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise ArgumentError(f"parameter {i} must be a tensor, got {type(p).__name__}")
        if not p.dtype.is_floating_point:
            raise DTypeError(f"parameter {i} must be of a floating dtype, got {p.dtype}")
    if len({id(p) for p in params}) != len(params):
        raise ArgumentError("a parameter is given twice; expected each tensor once")
    if not isinstance(directions, (list, tuple)):
        if directions.k < 1:  # type: ignore[union-attr]
            raise ArgumentError(f"k must be at least 1, got {directions.k}")  # type: ignore[union-attr]
        directions.prepare(params)  # type: ignore[union-attr]
        return directions.k, directions.draw  # type: ignore[union-attr]
    if len(directions) != len(params):
        raise ShapeError(f"expected one tensor of tangents for each of {len(params)} parameters, got {len(directions)}")
    k = directions[0].shape[0] if directions[0].dim() else 0
    if k < 1:
        raise ArgumentError("k must be at least 1: tangents are of shape (k, *param.shape)")
    for i, (p, t) in enumerate(zip(params, directions, strict=True)):
        if tuple(t.shape) != (k, *p.shape):
            raise ShapeError(f"tangents {i}: expected shape {(k, *p.shape)}, got {tuple(t.shape)}")
        if t.dtype != p.dtype:
            raise DTypeError(f"tangents {i}: expected {p.dtype} as its parameter, got {t.dtype}")
        if t.device != p.device:
            raise DeviceError(f"tangents {i}: expected device {p.device} as its parameter, got {t.device}")
    held = list(directions)
    return k, lambda index, param: held[index].detach()
