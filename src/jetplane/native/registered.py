"""`jetplane.register_native`: compiled functions whose derivatives are compiled functions of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ArgumentError
from ..rules.differences import blackbox
from .callables import located
from .calling import Function
from .signature import Parameter, Signature, signature


def register_native(
    f: Any,
    c_signature: str | None = None,
    *,
    jvp: Any,
    second: Any = None,
    args: Sequence[Any] | None = None,
    returns: Any = None,
) -> Callable[..., Any]:
    """A compiled function with derivatives that are compiled functions too; works on every system.

    Args:
        f: a compiled function, as `jetplane.compiled` takes it.
        c_signature: what it takes and returns, as there.
        args: the parameters as a list instead, as there.
        returns: with ``args``, as there.
        jvp: ``d f(x + t v) / dt``. It takes f's parameters, with a tangent of the same type behind every one that is
            of doubles and read, and returns and writes derivatives where f returns and writes values.
        second: ``d² f(x + s v + t w) / ds dt``, with two tangents behind every such parameter. By default differences
            of ``jvp``.

    Returns:
        A function of f's parameters that are read, as `jetplane.compiled` gives it.

    The functions may be made from f's source by the jets of ``jetplane/native/include/jetplane/jet.hpp``; see
    `jetplane.native.include`.

    >>> import ctypes, torch, jetplane as jp
    >>> m = ctypes.CDLL(None)
    >>> kind = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)
    >>> kind2 = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double, ctypes.c_double)
    >>> f = jp.register_native(kind(lambda x: x**3), "double(double x)", jvp=kind2(lambda x, v: 3 * x**2 * v))
    >>> jp.jvp(f, torch.tensor(2.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    (tensor(8., dtype=torch.float64), tensor(12., dtype=torch.float64))

    Raises:
        ArgumentError: a signature cannot be read, or an argument is not a compiled function.
    """
    address, own, kept = located(f)
    text = c_signature or (own if args is None else None)
    whole = signature(text, args, returns)
    name = getattr(f, "__name__", None) or "a registered function"
    plain = Function(address, whole, str(name), kept)
    made = [_with_tangents(g, whole, n, f"{what} of {name}") for g, n, what in ((jvp, 1, "jvp"), (second, 2, "second"))]
    if made[0] is None:
        raise ArgumentError("expected jvp=, a compiled function, got none")

    def derivative(inputs: tuple[Any, ...], *tangents: tuple[Any, ...]) -> Any:
        given: list[Any] = []
        for p, x, *vs in zip(whole.given, inputs, *tangents, strict=True):
            given.append(x)
            if p.differentiable:
                given += [torch.zeros_like(torch.as_tensor(x, dtype=torch.float64)) if v is None else v for v in vs]
        g = made[len(tangents) - 1]
        assert g is not None
        return g(*given)

    return blackbox(plain, derivative=derivative, second=derivative if second is not None else None)


def _with_tangents(g: Any, whole: Signature, n: int, name: str) -> Function | None:
    """A derivative: n tangents behind every parameter that derivatives enter by."""
    if g is None:
        return None
    address, _, kept = located(g)
    parameters: list[Parameter] = []
    for p in whole.parameters:
        parameters.append(p)
        if p.differentiable:
            parameters += [replace(p, writes=False, name="")] * n
    return Function(address, Signature(whole.returns, tuple(parameters)), name, kept)
