"""Functions that torch cannot see: derivatives by differences of whole calls, or by what the user gives.

With x(a) the inputs on the plane, second coefficients included, ``phi(a) = f(x(a))`` and steps h_i of direction i,

    y_i  = (phi(h_i) - phi(-h_i)) / 2 h_i
    y_ii = (phi(h_i) - 2 phi(0) + phi(-h_i)) / h_i²
    y_ij = (phi(h_i, h_j) + phi(-h_i, -h_j) + 2 phi(0) - the four of i and j alone) / 2 h_i h_j

Second coefficients that sum pairs tell none of the inputs' x_ij apart: x(a) is then without them, and their part of the
sum, linear in them, is a difference like that of y_i.

Steps balance truncation, of order h², with the noise of f, which is measured by a table of differences: Moré and Wild,
"Estimating computational noise", SIAM J. Sci. Comput. 33 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import DisableTorchFunction, EnableTorchFunction
from ..errors import ArgumentError, DerivativeError
from ..jets import Coefficients, Jet, Space, absent, is_jet, make, parts
from .dispatch import dispatch
from .fallback import all_plain
from .functions import Call, Draws, seeded
from .grad_mode import autograd
from .registry import enter

Inputs = tuple[Any, ...]
Rows = list[Tensor] | None  # coefficients; None where there are none


def blackbox(
    f: Callable[..., Any],
    *,
    derivative: Callable[[Inputs, Inputs], Any] | None = None,
    second: Callable[[Inputs, Inputs, Inputs], Any] | None = None,
    numpy: bool = False,
    noise: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Callable[..., Any]:
    """A function that torch cannot see, such as NumPy code or a simulator, with directional derivatives.

    Args:
        f: takes tensors and other values; returns a tensor, a number or a tuple of them. It should be smooth and give
            the same result in each call. Torch's random numbers are the same in all calls.
        derivative: ``derivative(inputs, tangents)`` gives ``d f(x + t v) / dt`` of f's shape, where inputs and tangents
            are tuples with one entry for each argument: zeros for a tensor that does not move, None for an argument
            that is not a tensor. By default central differences of f.
        second: ``second(inputs, tangents, others)`` gives ``d² f(x + s v + t w) / ds dt``; needs ``derivative``. By
            default differences of the derivative, or second differences of f.
        numpy: pass NumPy arrays instead of tensors to all three functions.
        noise: relative error of f: how far its results change if the inputs change by rounding. By default it is
            measured at the first use, in 7 to 28 calls.
        scale: the length on which f changes by as much as its size, in units of ``1 + rms(x)``.
        dtype: dtype of the inputs for differences.

    Returns:
        A function of f's arguments. Inputs that do not depend on parameters just call f.

    For K directions it takes 2 K calls of f after the first one; for curvature 2 K + 1 more, and 2 for each of the
    K(K-1)/2 mixed pairs. With relative noise e, slopes are good to about ``e**(2/3)`` and second derivatives to about
    ``e**(1/2)``, relative to f's size and scale: 4e-11 and 1e-8 for f in double precision, 2e-5 and 3e-4 for f in
    single precision. A ``derivative`` takes K calls and 2 for each pair, and gives slopes as good as it is.

    Raises:
        ArgumentError: ``second`` without ``derivative``, or a noise or scale that is not positive.
        DerivativeError: inside nested derivatives, for complex numbers, or if f uses a parameter that is not an
            argument.

    >>> import numpy, torch, jetplane as jp
    >>> f = jp.blackbox(lambda x: numpy.sin(x), numpy=True)
    >>> w = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> jp.evaluate(lambda: f(w).sum(), [w], [torch.ones(1, 2, dtype=torch.float64)], "none").slope
    tensor([1.5403], dtype=torch.float64)
    """
    if second is not None and derivative is None:
        raise ArgumentError("second= needs derivative= as well")
    for name, value in (("noise", noise), ("scale", scale)):
        if value is not None and not value > 0:
            raise ArgumentError(f"{name} must be positive, got {value}")
    box = _Box(f, derivative, second, numpy, noise, scale, dtype)

    def call(*args: Any) -> Any:
        args = seeded(args)
        if any(isinstance(a, Jet) for a in args):
            return dispatch(CALL, (box, *args), {})
        return box.plain(*args)

    return call


CALL = Call("blackbox", "a jetplane.blackbox")


def _called(space: Space, box: _Box, *args: Any) -> Any:
    if not all_plain(space, args, {}):
        raise DerivativeError(
            "a jetplane.blackbox is inside nested derivatives (jetplane.jet in a closure), which its differences "
            "cannot give; move it out of them"
        )
    with DisableTorchFunction(), autograd():
        values, first, second = box.coefficients(space, args)
        outputs = values if isinstance(values, tuple) else (values,)
        held = [t for a in args for t in graph_inputs(a, space)] if space.recorded else []
        made = tuple(
            make(
                y if y.requires_grad else graphless(y, held),
                _split(space, 1, first, outputs, n, held),
                _split(space, 2, second, outputs, n, held),
                space,
            )
            for n, y in enumerate(outputs)
        )
    return made if isinstance(values, tuple) else made[0]


enter(CALL, _called)


class _Box:
    """A function, and what is known of it."""

    def __init__(
        self,
        f: Callable[..., Any],
        derivative: Callable[..., Any] | None,
        second: Callable[..., Any] | None,
        numpy: bool,
        noise: float | None,
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        self.f, self.derivative, self.second = f, derivative, second
        self.numpy, self.noise, self.scale, self.dtype = numpy, noise, scale, dtype

    def plain(self, *args: Any) -> Any:
        """F of plain inputs; where it is in NumPy, tensors again, of the inputs' floating dtype and device."""
        if not self.numpy:
            return self.f(*args)
        held = [a for a in args if isinstance(a, Tensor) and a.requires_grad] if torch.is_grad_enabled() else []
        result = self.f(*map(self._handed, args))
        made = tuple(graphless(_as_tensor(y, args), held) for y in (result if isinstance(result, tuple) else (result,)))
        return made if isinstance(result, tuple) else made[0]

    def _handed(self, x: Any) -> Any:
        return x.detach().cpu().numpy() if self.numpy and isinstance(x, Tensor) else x

    def coefficients(self, space: Space, args: Sequence[Any]) -> tuple[Any, Rows, Rows]:
        """The result, and the first and second coefficients of all outputs, flat and one behind the other."""
        draws = Draws(args)
        with EnableTorchFunction():
            value = self.plain(*[_normal(parts(a, space)[0]) for a in args])
        outputs = value if isinstance(value, tuple) else (value,)
        if any(isinstance(y, Jet) for y in outputs):
            raise DerivativeError(
                "the function of a jetplane.blackbox uses a parameter that is not among its arguments, whose "
                "derivative its differences do not see; hand it in"
            )
        outputs = tuple(_as_tensor(y, args) for y in outputs)
        if any(isinstance(x, Tensor) and x.is_complex() for x in (*args, *outputs)):
            raise DerivativeError(
                "a jetplane.blackbox with a complex argument or result, where differences are of real numbers; hand "
                "in, and return, torch.view_as_real of it"
            )
        value = outputs if isinstance(value, tuple) else outputs[0]
        with torch.random.fork_rng(devices=draws.devices):
            return value, *_Differences(self, space, args, outputs, draws).both()


def _as_tensor(y: Any, args: Sequence[Any]) -> Tensor:
    """A tensor as it is; arrays and numbers in the floating dtype and on the device of the inputs."""
    if isinstance(y, Tensor):
        return y
    like = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), torch.empty(0))
    y = torch.as_tensor(y, dtype=torch.float64 if isinstance(y, float) else None)
    return y.to(like.device, like.dtype if y.is_floating_point() else y.dtype)


def _normal(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def graph_inputs(x: Any, space: Space) -> list[Tensor]:
    """The tensors of an argument that are in a graph."""
    if not isinstance(x, Tensor):
        return []
    p, *coefficients = parts(x, space)
    return [t for t in (p, *(c.tensor for c in coefficients if c)) if t.requires_grad]


class _Graphless(torch.autograd.Function):
    """The identity, in a graph in which nothing goes back."""

    @staticmethod
    def forward(ctx: Any, why: str, y: Tensor, *held: Tensor) -> Tensor:
        ctx.why = why
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise DerivativeError(ctx.why)


BACKWARD = (
    "backward() through {}: its derivatives are {}, which have no graph. Train forward only (jetplane.optim), or "
    "detach() its result if it is meant as a constant"
)


def graphless(
    y: Tensor, held: Sequence[Tensor], why: str = BACKWARD.format("a jetplane.blackbox", "differences")
) -> Tensor:
    """A tensor that depends on others by no graph: going back through it is an error, not a derivative of zero."""
    return _Graphless.apply(why, y.detach(), *held) if held else y  # type: ignore[return-value]


def _split(
    space: Space, order: int, rows: Rows, outputs: Sequence[Tensor], n: int, held: Sequence[Tensor]
) -> Coefficients:
    """What is one output's of the coefficients of all outputs."""
    if rows is None:
        return absent(space, order)
    start, y = sum(y.numel() for y in outputs[:n]), outputs[n]
    own = torch.stack([row[start : start + y.numel()] for row in rows])
    return Coefficients(space, order, graphless(own.to(y.device).reshape(-1, *y.shape), held))


class _Differences:
    """One call: f on the plane of its inputs."""

    def __init__(self, box: _Box, space: Space, args: Sequence[Any], outputs: Sequence[Tensor], draws: Draws) -> None:
        self.box, self.space, self.draws = box, space, draws
        of = [parts(a, space) for a in args]
        wide = [self._wide(p) for p, _, _ in of]
        self.x = [p for p in wide]
        self.first, self.second = (
            [self._wide(each[n].full(each[0].shape, box.dtype, each[0].device)) if each[n] else None for each in of]
            for n in (1, 2)
        )
        self.moves = [is_jet(a, space) for a in args]
        self.like = outputs
        self.terms = space.structure.terms()

    def _wide(self, x: Any) -> Any:
        return x.detach().to(self.box.dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x

    def both(self) -> tuple[Rows, Rows]:
        """First and second coefficients of all outputs, each flat."""
        moving = any(c is not None for c in self.first)
        bent = moving and self.space.order == 2
        carried = any(c is not None for c in self.second)
        if self.box.derivative is not None:
            first = [self._derivative(self.x, self._along(self.first, i)) for i in range(self.space.k)]
            second = self._none()
            if bent:
                for n, i, j, weight in self.terms:
                    second[n] = second[n] + weight * self._crossed(i, j)
            if carried:
                second = [c + self._derivative(self.x, self._along(self.second, n)) for n, c in enumerate(second)]
            return (first if moving else None), (second if bent or carried else None)
        noise = self._noise()
        step = self.box.scale * noise ** (1 / 3)
        first = [self._slope(self._along(self.first, i), step) for i in range(self.space.k)] if moving else None
        if bent:
            return first, self._curvature(self.box.scale * noise**0.25, step)
        if carried:
            return first, [self._slope(self._along(self.second, n), step) for n in range(self.space.count(2))]
        return first, None

    # --- what is called ---------------------------------------------------------------------------

    def _f(self, x: Sequence[Any]) -> Tensor:
        return self._flat(self.box.f(*map(self.box._handed, self._called(x))))

    def _derivative(self, x: Sequence[Any], v: Sequence[Any]) -> Tensor:
        assert self.box.derivative is not None
        return self._flat(self.box.derivative(*(tuple(map(self.box._handed, self._called(t))) for t in (x, v))))

    def _called(self, x: Sequence[Any]) -> Sequence[Any]:
        self.draws.again()
        return [t.clone() if isinstance(t, Tensor) else t for t in x]  # f may overwrite what it is given

    def _flat(self, result: Any) -> Tensor:
        """All outputs, one behind the other."""
        results = result if isinstance(result, tuple) else (result,)
        tensors = [torch.as_tensor(y, dtype=self.box.dtype if isinstance(y, float) else None) for y in results]
        shapes, expected = [tuple(y.shape) for y in tensors], [tuple(y.shape) for y in self.like]
        if shapes != expected:
            raise DerivativeError(
                f"the function of a jetplane.blackbox, or its derivative, gave results of shapes {shapes} where its "
                f"first call gave {expected}"
            )
        return torch.cat([y.detach().to(self.like[0].device, self.box.dtype).reshape(-1) for y in tensors])

    # --- where ------------------------------------------------------------------------------------

    def _along(self, c: Sequence[Tensor | None], i: int) -> list[Any]:
        """Tangents: the i-th of those coefficients, zeros where an input does not move, None where it is no tensor."""
        return [
            None if not isinstance(x, Tensor) else torch.zeros_like(x) if t is None else t[i]
            for x, t in zip(self.x, c, strict=True)
        ]

    def _moved(self, *terms: tuple[float, Sequence[Any]]) -> list[Any]:
        """``x + sum h v``."""
        x = list(self.x)
        for h, v in terms:
            x = [a + h * t if m else a for a, t, m in zip(x, v, self.moves, strict=True)]
        return x

    def _length(self, v: Sequence[Any]) -> float:
        """The length of a tangent in units of the inputs: ``rms(v) / (1 + rms(x))``."""
        moving = [(x, t) for x, t, m in zip(self.x, v, self.moves, strict=True) if m]
        size = sum(t.numel() for _, t in moving)
        squares = [sum(float(each[n].square().sum()) for each in moving) for n in (0, 1)]
        return math.sqrt(squares[1] / size) / (1 + math.sqrt(squares[0] / size)) if size else 0.0

    def _slope(self, v: Sequence[Any], step: float) -> Tensor:
        length = self._length(v)
        if not length:
            return self._zero()
        h = step / length
        return (self._f(self._moved((h, v))) - self._f(self._moved((-h, v)))) / (2 * h)

    def _crossed(self, i: int, j: int) -> Tensor:
        """The second derivative along x_i and x_j by the user's first."""
        v, w = self._along(self.first, i), self._along(self.first, j)
        if self.box.second is not None:
            handed = (tuple(map(self.box._handed, self._called(t))) for t in (self.x, v, w))
            return self._flat(self.box.second(*handed))
        length = self._length(w)
        if not length:
            return self._zero()
        h = self.box.scale * max(self.box.noise or 0.0, torch.finfo(self.box.dtype).eps) ** (1 / 3) / length
        return (self._derivative(self._moved((h, w)), v) - self._derivative(self._moved((-h, w)), v)) / (2 * h)

    def _curvature(self, step: float, line: float) -> list[Tensor]:
        """Second coefficients by second differences of ``phi``, with steps of ``line`` for what is linear."""
        center = self._f(self.x)
        single = self.space.structure.single
        places = {(min(t.i, t.j), max(t.i, t.j)): t.n for t in self.terms} if single else {}
        carried = any(c is not None for c in self.second)
        tangents = [self._along(self.first, i) for i in range(self.space.k)]
        steps = [step / length if (length := self._length(v)) else 0.0 for v in tangents]

        def bent(i: int, j: int, h: float, g: float) -> list[tuple[float, list[Any]]]:
            """The part of ``x(a)`` that the inputs' second coefficients make, at a_i = h and a_j = g."""
            if not carried:
                return []
            amounts = {(i, i): h * h / 2, (j, j): g * g / 2, (min(i, j), max(i, j)): h * g}
            if i == j:
                amounts = {(i, i): h * h / 2}
            return [(a, self._along(self.second, places[pair])) for pair, a in amounts.items() if pair in places]

        def sums(i: int, j: int) -> Tensor:
            """``phi(h) + phi(-h) - 2 phi(0)`` along i, or along i and j together."""
            h, g = steps[i], steps[j]
            total = -2 * center
            for sign in (1, -1):
                line = [(sign * h, tangents[i])] + ([] if i == j else [(sign * g, tangents[j])])
                total = total + self._f(self._moved(*line, *bent(i, j, h, g)))
            return total

        used = {i for t in self.terms if steps[t.i] and steps[t.j] for i in (t.i, t.j)}
        alone = {i: sums(i, i) for i in sorted(used)}
        found = self._none()
        for n, i, j, weight in self.terms:
            if steps[i] and steps[j]:
                crossed = alone[i] if i == j else (sums(i, j) - alone[i] - alone[j]) / 2
                found[n] = found[n] + weight * crossed / (steps[i] * steps[j])
            elif carried and single:  # nothing moves but by second coefficients
                found[n] = self._slope(self._along(self.second, n), line)
        if carried and not single:
            found = [c + self._slope(self._along(self.second, n), line) for n, c in enumerate(found)]
        return found

    # --- noise ------------------------------------------------------------------------------------

    def _none(self) -> list[Tensor]:
        """Second coefficients that are zero."""
        return [self._zero()] * self.space.count(2)

    def _zero(self) -> Tensor:
        return torch.cat([y.new_zeros(y.numel(), dtype=self.box.dtype).to(self.like[0].device) for y in self.like])

    def _noise(self) -> float:
        if self.box.noise is None:
            generator = torch.Generator().manual_seed(0)
            v = [
                torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) if m else None
                for x, m in zip(self.x, self.moves, strict=True)
            ]
            length = self._length(v)
            self.box.noise = _measured(lambda h: self._f(self._moved((h / length, v)))) if length else 0.0
        return max(self.box.noise, torch.finfo(self.box.dtype).eps)


def _measured(phi: Callable[[float], Tensor]) -> float:
    """The relative noise of a function on a line, from differences of orders that its smooth part does not reach."""
    for step in (1e-10, 1e-8, 1e-6, 1e-4):
        table = torch.stack([phi(n * step) for n in range(7)])
        size = float(table.square().mean().sqrt())
        if not size or (table[1:] == table[:-1]).float().mean() > 0.5:  # steps that rounding inside f swallows
            continue
        levels = []
        for k in range(1, 7):
            table = table[1:] - table[:-1]
            levels.append(math.sqrt(math.factorial(k) ** 2 / math.factorial(2 * k) * float(table.square().mean())))
        for low, high in ((min(each), max(each)) for each in (levels[n : n + 3] for n in (1, 2, 3))):
            if high <= 4 * low:
                return high / size
    return 0.0
