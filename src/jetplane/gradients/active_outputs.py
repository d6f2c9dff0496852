"""Internal: which outputs of a layer are active: of a ReLU's inputs those above zero, of a max-pool's the largest.

An output is active if it has an effect on the loss. Three tangents on a layer's outputs,

    one = 1,    place = j,    mark = m_nj    at output j of example n, with numbers m that nothing smooth goes through,

come to the next layer's input i as ``sum_j J_ij (1, j, m_nj)``. If input i depends on one output alone, ``place / one``
is that output's j, and ``mark = m_nj one`` confirms it. Every layer has marks of its own, and every example, since
normalization over a batch takes away whatever is the same in all of it. Where that holds of all inputs, outputs that
none of them names are not active: their gradient is zero, and noise on them is noise and nothing else. It holds behind
activation functions, pooling by maximum, dropout and whatever moves numbers around; not behind normalization or
averages.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.context import expansion
from ..evaluation.interception import Interception
from ..evaluation.side_effects import without_side_effects
from ..jets import Diagonal, Jet, carried, parts, promoted
from .passes import Closure, hooked

PROBES = 3
MOST = 1 << 17  # outputs of an example whose places single precision tells apart
_TOLERANCE = 1e-3  # how well a mark has to be met, relative to the derivative
_MODULUS = 65521


def probes(y: Tensor, layer: int = 0) -> Tensor:
    """The three tangents of outputs y, (3, *y.shape), with the marks of a layer of this number."""
    place = torch.arange(y[0].numel(), device=y.device).expand(len(y), -1)
    rows = torch.stack([torch.ones_like(place), place, _marks(place, layer)]).to(carried(y.dtype))
    rows[2] /= _MODULUS
    return rows.reshape(PROBES, *y.shape)


def active_outputs(arrived: Tensor, outputs: int, layer: int = 0) -> Tensor | None:
    """Which of a layer's outputs are active, (examples, outputs); None if that cannot be told.

    Args:
        arrived: the probes as they are at the next layer's input, (3, examples, …).
        outputs: how many numbers the layer puts out for an example.
        layer: the number that its probes were made with.
    """
    one, place, mark = arrived.flatten(2)
    there = one != 0
    which = torch.where(there, place / one, 0).round().clamp(0, outputs - 1).long()
    expected = _marks(which, layer).to(mark.dtype) / _MODULUS
    fits = (mark - expected * one).abs() <= _TOLERANCE * one.abs()
    if not bool(fits.all()):
        return None
    found = torch.zeros(len(one), outputs + 1, dtype=torch.bool, device=arrived.device)
    return found.scatter_(1, torch.where(there, which, outputs), True)[:, :outputs]


def _marks(place: Tensor, layer: int) -> Tensor:
    """An integer for each place of each example, of squares: marks of a mean are not the mean of the marks."""
    example = torch.arange(len(place), device=place.device).unsqueeze(1)
    return (place * place * 40503 + place * 12345 + example * example * 30011 + layer * 7919 + 1) % _MODULUS


Finish = Callable[[Tensor | None], None]


def visit(
    closure: Closure,
    modules: Iterable[nn.Module],
    successors: Mapping[nn.Module, nn.Module],
    begin: Callable[[nn.Module, int, Tensor, Tensor], Finish],
) -> bool:
    """One pass that meets the calls of modules, and finds which of their outputs are active.

    Args:
        closure: returns the loss; called once, without side effects.
        modules: whose calls to meet.
        successors: for some of them, the module whose input is to tell which outputs are active.
        begin: ``begin(module, call, x, y)`` returns a function that is called with the active outputs, (examples,
            outputs), once they are known; with None where there is no successor or they cannot be told. Until then y
            may have been written to.

    Returns:
        Whether the active outputs of all modules with a successor were told, and no output of theirs had an effect on
        the loss that does not go through the successor's input.
    """
    waiting: dict[nn.Module, tuple[Finish, torch.Size, int]] = {}
    numbers, unknown = itertools.count(), []

    def settle(module: nn.Module, arrived: Tensor | None) -> None:
        if module not in waiting:
            return
        finish, shape, number = waiting.pop(module)
        active = None
        if arrived is not None and arrived.shape[1] == shape[0]:
            active = active_outputs(arrived, shape[1:].numel(), number)
        if active is None:
            unknown.append(module)
        finish(active)

    with contextlib.ExitStack() as stack:
        stack.enter_context(without_side_effects())
        space = stack.enter_context(expansion(Diagonal(PROBES), 1))

        def after(module: nn.Module, call: int, x: Any, y: Any) -> Any:
            y = parts(y, space)[0]
            finish = begin(module, call, parts(x, space)[0], y)
            if module not in successors:
                return finish(None)
            successor = successors[module]
            settle(successor, None)  # an earlier call, which never came there
            number = next(numbers)
            waiting[successor] = finish, y.shape, number
            return Jet(y, probes(y, number), None, space)

        def before(module: nn.Module, x: Any) -> Any:
            if module not in waiting:
                return x
            at, arrived, _ = parts(x, space)
            settle(module, arrived.tensor if arrived else None)
            return at

        stack.enter_context(hooked(after, modules, before, successors.values(), space))
        stack.enter_context(Interception(space).running())
        loss = closure()
        jet = promoted(loss)
        only = not parts(loss if jet is None else jet, space)[1]
    for module in list(waiting):
        settle(module, None)
    return only and not unknown
