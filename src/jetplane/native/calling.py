"""Compiled functions as they are: tensors and numbers to C and back."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .._torch import in_transform
from ..errors import ArgumentError, DerivativeError, ShapeError
from ..jets import Jet
from .signature import KINDS, Parameter, Signature

_DTYPES = {"double": torch.float64, "int": torch.int32, "long": torch.int64, "size_t": torch.int64, "char": torch.int8,
           "short": torch.int16, "bool": torch.bool, "unsigned": torch.int32}  # fmt: skip
_C = {"double": ctypes.c_double, "int": ctypes.c_int, "unsigned": ctypes.c_uint, "long": ctypes.c_int64,
      "size_t": ctypes.c_uint64, "char": ctypes.c_int8, "bool": ctypes.c_bool, "short": ctypes.c_int16,
      "void": None}  # fmt: skip


@dataclass
class Inputs:
    """The arguments of one call: flat contiguous tensors for arrays and doubles, integers for the rest.

    Attributes:
        native: what the function itself gives, where it is compared.
    """

    values: list[Any]
    sizes: list[tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    native: list[Tensor] | None = None


class Function:
    """A compiled function: called with those parameters that it reads, gives what it returns and writes."""

    def __init__(self, address: int, described: Signature, name: str, kept: Any = None) -> None:
        self._signature, self.__name__, self._kept = described, name, kept
        kinds = [ctypes.c_void_p if p.shape is not None else _C[p.kind] for p in described.parameters]
        self._native = ctypes.CFUNCTYPE(_C[described.returns], *kinds)(address)

    def __repr__(self) -> str:
        return f"<jetplane.{type(self).__name__.lower()} {self.__name__}>"

    def __deepcopy__(self, memo: Any) -> Function:
        return self  # as functions of Python

    def _counted(self, args: Sequence[Any]) -> None:
        expected = self._signature.given
        if len(args) != len(expected):
            names = ", ".join(p.name or p.kind for p in expected)
            raise ArgumentError(f"{self.__name__} takes {len(expected)} arguments ({names}), got {len(args)}")
        for a in args:
            if not isinstance(a, Tensor) or isinstance(a, Jet):
                continue
            if in_transform(a) or unpack_dual(a).tangent is not None:
                raise DerivativeError(
                    f"{self.__name__} is no torch code, which torch.func, torch.vmap and torch.autograd.forward_ad "
                    "look into; take jetplane.jvp, jacobian, hessian or hvp, or backward()"
                )

    def __call__(self, *args: Any) -> Any:
        """Call it, with plain tensors and numbers."""
        self._counted(args)
        return self._given(self._plain(self._inputs(args)), args)

    def _inputs(self, args: Sequence[Any]) -> Inputs:
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        dtype = tensors[0].dtype if tensors else torch.float64
        device = tensors[0].device if tensors else torch.device("cpu")
        queue, values = list(args), []
        known: dict[str, int] = {}
        for p in self._signature.parameters:
            given = queue.pop(0) if p.reads and p.value is None else p.value
            values.append(self._value(p, given))
            if p.kind != "double" and p.reads and p.name:
                one = values[-1]
                if isinstance(one, int) or isinstance(one, Tensor) and one.numel() == 1:
                    known[p.name] = int(one)
        sizes = []
        for n, p in enumerate(self._signature.parameters):
            size = p.sizes(known) if p.shape is not None else ()
            if p.shape is not None and any(s < 0 for s in size):
                raise ShapeError(f"the parameter {self._label(n)} of {self.__name__} would have the shape {size}")
            value = values[n]
            if p.shape is not None and p.reads:
                if value.numel() != math.prod(size):
                    raise ShapeError(
                        f"the parameter {self._label(n)} of {self.__name__} has the shape {list(size)} by signature, "
                        f"got a tensor of shape {list(value.shape)}"
                    )
                size = tuple(value.shape)
            elif p.shape is not None:
                values[n] = torch.zeros(math.prod(size), dtype=_DTYPES[p.kind])
            sizes.append(size)
        return Inputs([v.reshape(-1) if isinstance(v, Tensor) else v for v in values], sizes, dtype, device)

    def _label(self, n: int) -> str:
        return repr(self._signature.parameters[n].name or f"number {n + 1}")

    def _fits(self, p: Parameter, low: int, high: int, what: str) -> None:
        """Whether integers are of a kind's range, which C would cut them to."""
        bits = 8 * KINDS[p.kind][1]
        signed = p.kind not in ("unsigned", "size_t", "bool")
        least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        if low < least or high > most:
            raise ArgumentError(
                f"the parameter {what} is of type {p.kind}, which has no {low if low < least else high}"
            )

    def _value(self, p: Parameter, given: Any) -> Any:
        what = f"{p.name or p.kind} of {self.__name__}"
        if p.shape is None and p.kind != "double":
            if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
                given = int(given)
            elif hasattr(given, "__index__") and not isinstance(given, Tensor):  # NumPy's as well
                given = int(given)
            if not isinstance(given, int):
                raise ArgumentError(f"the parameter {what} must be an integer, got {given!r}")
            self._fits(p, given, given, what)
            return given
        if given is None and not p.reads:
            return None
        try:
            made = torch.as_tensor(
                given, dtype=None if isinstance(given, Tensor) or p.kind != "double" else torch.float64
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"the parameter {what} must consist of numbers, got {given!r}") from error
        if made.is_complex():
            raise ArgumentError(f"{self.__name__} takes real numbers; hand in torch.view_as_real of them")
        if made.layout != torch.strided or made.device.type == "meta":
            kind = "without data" if made.device.type == "meta" else f"of layout {made.layout}"
            raise ArgumentError(f"the parameter {what} must be a dense tensor, got one {kind}")
        if p.kind != "double":
            if made.is_floating_point():
                raise ArgumentError(f"the parameter {what} must consist of integers, got a tensor of {made.dtype}")
            if made.numel():
                self._fits(p, int(made.min()), int(made.max()), what)
        # Detached, moved and converted: a fresh copy, which the function may write to.
        made = made.detach().to("cpu", _DTYPES[p.kind], copy=True).contiguous()
        if type(made) is not Tensor:
            raise DerivativeError(
                f"{self.__name__} is called where values have no numbers ({type(made).__name__}); in the dynamics of "
                "jetplane.control wrap it by jetplane.control.per_node"
            )
        if p.shape is None and made.numel() != 1:
            raise ShapeError(
                f"the parameter {p.name or p.kind} of {self.__name__} must be a number, got shape {list(made.shape)}"
            )
        return made

    def _outputs(self) -> list[int]:
        """Places of what comes back: -1 is what the function returns, others are parameters."""
        first = [-1] if self._signature.returns != "void" else []
        return first + [n for n, p in enumerate(self._signature.parameters) if p.writes]

    def _given(self, values: list[Tensor], args: Sequence[Any]) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if tensors:
            dtype, device = tensors[0].dtype, tensors[0].device
            values = [v.to(device, dtype if v.is_floating_point() else v.dtype) for v in values]
        return values[0] if len(values) == 1 else tuple(values)

    def _plain(self, x: Inputs) -> list[Tensor]:
        """The function itself."""
        values = [v.clone() if isinstance(v, Tensor) else v for v in x.values]
        handed = []
        for p, v in zip(self._signature.parameters, values, strict=True):
            handed.append(v.data_ptr() if p.shape is not None else float(v) if p.kind == "double" else v)
        result = self._native(*handed)
        out = []
        for n in self._outputs():
            if n < 0:
                kind = self._signature.returns
                out.append(torch.tensor(result, dtype=torch.float64 if kind == "double" else torch.int64))
            else:
                out.append(values[n].reshape(x.sizes[n]))
        return out
