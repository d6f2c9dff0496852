"""What the derivative of a quantized value is: the user's choice, and the error where there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

import torch

from ..errors import ArgumentError, DerivativeError

Rounding = Literal["straight-through", "exact"]


class _State(threading.local):  # not a context variable, which compilers cannot follow
    """What this thread has chosen."""

    def __init__(self) -> None:  # not a default of the class: compiled code would be made anew once the thread has one
        self.chosen: Rounding | None = None


_state = _State()

# What floating-point numbers are quantized to. Wider integers are mostly indices, which these cannot be.
QUANTIZED = {
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.qint8, torch.quint8, torch.qint32, torch.quint4x2,
    torch.quint2x4,
}  # fmt: skip


@contextlib.contextmanager
def quantization(derivative: Rounding) -> Iterator[None]:
    """Choose the derivative of values that are quantized; a context manager and a decorator.

    Quantization rounds values. With scale s, zero point z and bounds a and b, a value x becomes

        q(x) = s (n - z),    n = clamp(round(x / s) + z, a, b)

    Args:
        derivative: "straight-through": rounding has the derivative one. ``dq/dx`` is one within the bounds and zero
            outside. For a scale that moves, ``dq/ds = n - z - x/s`` within the bounds and ``n - z`` outside (Bengio et
            al., arXiv 1308.3432; Esser et al., arXiv 1902.08153, equation 3). In dynamic quantization, where an
            operator computes scale and zero point from x itself, the derivative of q(x) is that of x. `torch.round`,
            `floor`, `ceil`, `trunc` and divisions that round have the derivative of what is rounded too. So keep the
            choice to the quantizer where a model rounds for another purpose, as in ``x - floor(x)``.
            "exact": rounding has the derivative zero, which is the true derivative almost everywhere; only
            ``dq/ds = n - z`` remains. In dynamic quantization the scale is proportional to the range of x, so q(x)
            changes in proportion to itself, as the range does.

    Without a choice, quantizing a value that depends on the parameters raises `DerivativeError`: fake quantization,
    layers with dynamically quantized activations, and casts to integers of 8 or 16 bits. What `torch.round` gave
    without a choice is a constant, and may be cast. Quantized weights need no choice: they are constants. Under a
    choice, comparisons of a closure with differences (`jetplane.audit`) give no verdict, and steps are judged by the
    actual loss.

    Raises:
        ArgumentError: another value of ``derivative``; in code that `torch.compile` traces, whose operators run later.

    >>> import torch, jetplane as jp
    >>> w, x = torch.tensor([2.0]), torch.tensor([3.3])
    >>> def closure():
    ...     return torch.fake_quantize_per_tensor_affine(w * x, 0.5, 0, -128, 127).square().sum()
    >>> with jp.quantization("straight-through"):
    ...     jp.evaluate(closure, [w], [torch.ones(1, 1)], curvature="none").slope  # 2 * 6.5 * 3.3
    tensor([42.9000])
    """
    if derivative not in ("straight-through", "exact"):
        raise ArgumentError(f"quantization must be 'straight-through' or 'exact', got {derivative!r}")
    if torch.compiler.is_compiling():
        raise ArgumentError(
            "jetplane.quantization inside of compiled code, whose operators meet their derivatives when the choice is "
            "gone. Put it around the call of the compiled function"
        )
    before = chosen()
    _state.chosen = derivative
    try:
        yield
    finally:
        _state.chosen = before


def chosen() -> Rounding | None:
    """The choice that the code runs under."""
    return _state.chosen


@contextlib.contextmanager
def adopted(choice: Rounding | None) -> Iterator[None]:
    """Run under the choice of another thread."""
    with contextlib.nullcontext() if choice is None else quantization(choice):
        yield


def straight_through(what: object) -> bool:
    """Whether something that quantizes values which depend on the parameters passes derivatives straight through.

    Raises:
        DerivativeError: nothing is chosen.
    """
    choice = chosen()
    if choice is None:
        raise DerivativeError(
            f"{what} quantizes values that depend on the parameters: the derivative of what it computes is zero almost "
            "everywhere. Choose one: with jetplane.quantization('straight-through') around the step or in the closure "
            "rounding has the derivative one, with jetplane.quantization('exact') zero; detach() the values if no "
            "derivative is wanted"
        )
    return choice == "straight-through"


def to_integers(what: object, dtype: torch.dtype) -> None:
    """Check that values which depend on the parameters may become integers of few bits, which carry no derivatives.

    Raises:
        DerivativeError: nothing is chosen, or derivatives were to go on.
    """
    if dtype in QUANTIZED and straight_through(f"{what} to {dtype}"):
        raise DerivativeError(
            f"{what} to {dtype}: straight through, derivatives go on as long as numbers stay in floating point. Use "
            "torch.fake_quantize_per_tensor_affine, torch.round, or a layer that is carried (torch's dynamically "
            "quantized Linear, torchao's); with jetplane.quantization('exact') integers are constants"
        )
