"""Internal: passes of a closure in which the calls of some modules are met."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .._torch import DisableTorchFunction, no_dispatch
from ..evaluation.leaving import plain_run
from ..evaluation.side_effects import without_side_effects
from ..jets import Jet, Space

Closure = Callable[[], Any]
After = Callable[[nn.Module, int, Any, Any], Any]
Before = Callable[[nn.Module, Any], Any]


class _Hook:
    """A hook that copies of its module, which the closure may make, do not have."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    pass


@contextlib.contextmanager
def hooked(
    after: After,
    modules: Iterable[nn.Module],
    before: Before | None = None,
    entered: Iterable[nn.Module] = (),
    space: Space | None = None,
    passed_over: set[nn.Module] | None = None,
) -> Iterator[None]:
    """Meet calls of modules.

    Args:
        after: ``after(module, call, x, y)`` runs after each call of ``modules``, with the number of the call, its first
            argument and its output, which the result replaces unless it is None.
        modules: see ``after``.
        before: ``before(module, x)`` runs before each call of ``entered``; its result replaces the first argument.
        entered: see ``before``.
        space: of the evaluation. Calls inside a loss that differentiates the model itself, on jets of others or in a
            graph of the closure's own, are passed over.
        passed_over: gets the modules of such calls.
    """
    calls: dict[nn.Module, int] = {}

    def foreign(*tensors: Any) -> bool:
        found = (t for t in tensors if isinstance(t, Tensor))
        return any(t.requires_grad or (isinstance(t, Jet) and t.space is not space) for t in found)

    def left(module: nn.Module, args: Any, output: Any) -> Any:
        if not args or not isinstance(output, Tensor) or foreign(args[0], output):
            if passed_over is not None:
                passed_over.add(module)
            return None
        calls[module] = calls.get(module, -1) + 1
        with DisableTorchFunction(), no_dispatch():  # thousands of small operators, none of them a jet's
            return after(module, calls[module], args[0], output)

    def reached(module: nn.Module, args: Any) -> Any:
        if before is None or not args or foreign(args[0]):
            return None
        with DisableTorchFunction(), no_dispatch():
            return before(module, args[0]), *args[1:]

    handles = [m.register_forward_hook(_Hook(left)) for m in modules]
    handles += [m.register_forward_pre_hook(_Hook(reached)) for m in entered]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _FlopCounter(TorchDispatchMode):
    """Floating-point operations of what runs inside, by torch's own formulas: two for each multiply-add of products.

    Each operator is counted by itself, so that tensors of other types (jets of a loss that differentiates the model
    itself) meet operators as they were called; theirs are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not all(t in (Tensor, nn.Parameter) for t in types):
            return func(*args, **kwargs)
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **kwargs)
        self.total += counter.get_total_flops()
        return result


class LayerTrace(NamedTuple):
    """A layer's calls in one pass.

    Attributes:
        calls: how many.
        outputs: numbers put out, in all calls.
        shape: of the last output.
        flops: floating-point operations in all calls.
        remaining: floating-point operations of the pass from the end of the first call on.
        last: from the end of the last call on.
        total_rows: lengths of the outputs' first axes, added up.
    """

    calls: int
    outputs: int
    shape: torch.Size
    flops: int
    remaining: int
    last: int
    total_rows: int

    @property
    def rows(self) -> int:
        """Length of the output's first axis, which counts examples or parts of them."""
        return self.shape[0]

    def as_one(self) -> LayerTrace:
        """The same of one call with all examples, for calls that have nothing to do with each other."""
        shape = torch.Size((self.total_rows, *self.shape[1:]))
        return self._replace(shape=shape, remaining=min(self.remaining, self.calls * self.last))


def trace(
    closure: Closure, modules: dict[str, nn.Module], params: Sequence[Tensor]
) -> tuple[dict[str, LayerTrace], int]:
    """What modules do in one pass, without side effects.

    Args:
        closure: returns the loss; called once.
        modules: by name.
        params: of the evaluations around this pass.

    Returns:
        A trace of each module that was called, in the order of first calls, unless some of its calls are passed over
        (`hooked`), so that what is seen of it is not all of its effect on the loss; and the pass's floating-point
        operations as `torch.utils.flop_counter` counts them: products, convolutions and attention, nothing for other
        operators.
    """
    names = {module: name for name, module in modules.items()}
    started: dict[nn.Module, int] = {}
    found: dict[str, LayerTrace] = {}
    passed_over: set[nn.Module] = set()

    with _FlopCounter() as counter:

        def before(module: nn.Module, x: Any) -> Any:
            started[module] = counter.total
            return x

        def after(module: nn.Module, call: int, x: Tensor, y: Tensor) -> None:
            flops = counter.total - started[module]
            first = LayerTrace(0, 0, y.shape, 0, counter.total, 0, 0)  # what remains is known at the end
            met = found.get(names[module], first)
            found[names[module]] = LayerTrace(
                call + 1, met.outputs + y.numel(), y.shape, met.flops + flops, met.remaining, counter.total,
                met.total_rows + (y.shape[0] if y.dim() else 1),
            )  # fmt: skip

        with without_side_effects(), plain_run(params), hooked(after, names, before, names, passed_over=passed_over):
            closure()
    seen = {n: t for n, t in found.items() if modules[n] not in passed_over}
    total = counter.total
    return {n: t._replace(remaining=total - t.remaining, last=total - t.last) for n, t in seen.items()}, total
