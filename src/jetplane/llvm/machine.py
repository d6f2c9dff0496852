"""Machine code of a graph, by LLVM, over many lanes at once; kept on disk by its hash.

The code of a graph is straight: a loop over blocks of `WIDTH` lanes, in vector registers, computes every node once. It
is compiled by `jetplane.llvm.compiler`; no compiler of the machine is used.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from ..errors import ArgumentError, ShapeError
from . import compiler
from .graph import Graph

WIDTH = 8  # lanes in a block: one register of AVX-512, two of AVX2, four of NEON
FLAGS = "contract nsz arcp reassoc"
_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTRINSIC = {"sqrt": "llvm.sqrt", "abs": "llvm.fabs", "floor": "llvm.floor"}
_COMPARE = {"lt": "olt", "le": "ole", "eq": "oeq"}
_LIBRARY = "exp log sin cos tan asin acos atan sinh cosh tanh erf expm1 log1p pow atan2".split()


def _number(value: float) -> str:
    return "0x" + struct.pack(">d", value).hex().upper()


def _function(graph: Graph, name: str, outputs: Sequence[int]) -> str:
    """The text of one function ``void name(inputs, outputs, lanes)``; rows of both are `lanes` apart."""
    vector = f"<{WIDTH} x double>"
    text = [
        f"define void @{name}(ptr noalias %x, ptr noalias %y, i64 %n) {{",
        "start:\n  br label %loop\nloop:\n  %k = phi i64 [0, %start], [%next, %loop]",
    ]
    names: dict[int, str] = {}
    emit = text.append
    for node in graph.needed(outputs):
        operator, arguments = graph.rows[node]
        me = f"%v{node}"
        if operator == "constant":
            names[node] = "<" + ", ".join([f"double {_number(arguments[0])}"] * WIDTH) + ">"
            continue
        names[node] = me
        if operator == "input":
            emit(f"  %a{node} = mul i64 %n, {arguments[0]}\n  %b{node} = add i64 %a{node}, %k")
            emit(f"  %p{node} = getelementptr double, ptr %x, i64 %b{node}")
            emit(f"  {me} = load {vector}, ptr %p{node}, align 8")
            continue
        values = [names[a] for a in arguments]
        if operator in _ARITHMETIC:
            emit(f"  {me} = {_ARITHMETIC[operator]} {FLAGS} {vector} {values[0]}, {values[1]}")
        elif operator == "neg":
            emit(f"  {me} = fneg {vector} {values[0]}")
        elif operator in _INTRINSIC:
            emit(f"  {me} = call {vector} @{_INTRINSIC[operator]}.v{WIDTH}f64({vector} {values[0]})")
        elif operator in _COMPARE:
            emit(f"  %c{node} = fcmp {_COMPARE[operator]} {vector} {values[0]}, {values[1]}")
            emit(f"  {me} = uitofp <{WIDTH} x i1> %c{node} to {vector}")
        elif operator == "select":
            emit(f"  %c{node} = fcmp one {vector} {values[0]}, zeroinitializer")
            emit(f"  {me} = select <{WIDTH} x i1> %c{node}, {vector} {values[1]}, {vector} {values[2]}")
        else:
            last = "undef"
            for lane in range(WIDTH):
                taken = []
                for n, value in enumerate(values):
                    emit(f"  %e{node}.{lane}.{n} = extractelement {vector} {value}, i32 {lane}")
                    taken.append(f"double %e{node}.{lane}.{n}")
                emit(f"  %r{node}.{lane} = call double @{operator}({', '.join(taken)})")
                new = me if lane == WIDTH - 1 else f"%w{node}.{lane}"
                emit(f"  {new} = insertelement {vector} {last}, double %r{node}.{lane}, i32 {lane}")
                last = new
    for row, node in enumerate(outputs):
        emit(f"  %oa{row} = mul i64 %n, {row}\n  %ob{row} = add i64 %oa{row}, %k")
        emit(f"  %op{row} = getelementptr double, ptr %y, i64 %ob{row}")
        emit(f"  store {vector} {names[node]}, ptr %op{row}, align 8")
    emit(f"  %next = add i64 %k, {WIDTH}\n  %more = icmp slt i64 %next, %n")
    emit("  br i1 %more, label %loop, label %end\nend:\n  ret void\n}")
    return "\n".join(text)


def _module(graph: Graph, functions: Mapping[str, Sequence[int]]) -> str:
    vector = f"<{WIDTH} x double>"
    declarations = [f"declare {vector} @{name}.v{WIDTH}f64({vector})" for name in _INTRINSIC.values()]
    for name in _LIBRARY:
        arguments = "double, double" if name in ("pow", "atan2") else "double"
        # Pure, so that what is computed twice is shared; errno is not looked at.
        declarations.append(f"declare double @{name}({arguments}) memory(none) nounwind")
    return "\n".join([*declarations, *(_function(graph, name, outputs) for name, outputs in functions.items())])


def _object(text: str, keep: bool) -> bytes:
    """The object code of a module: from disk, else compiled."""
    key = compiler.hashed(text)
    code = compiler.recall(key) if keep else None
    if code is None:
        code = compiler.compiled(text)
        if keep:
            compiler.keep(key, code)
    return code


@cache
def _symbols() -> dict[str, int]:
    library = ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("ucrtbase")
    return {name: compiler.address(library, name) for name in _LIBRARY}


class Kernel:
    """Compiled functions of a graph over lanes.

    Args:
        graph: whose inputs are the rows of the matrix that a function takes.
        functions: nodes to compute, by the function's name (letters, digits and underscores).
        keep: whether the code is kept on disk, in `cache_folder()`, and taken from there.

    Raises:
        MissingPackageError: llvmlite is not installed.

    Example:
        >>> graph = Graph()
        >>> x = graph.input()
        >>> kernel = Kernel(graph, {"square": [graph.apply("mul", x, x)]}, keep=False)  # doctest: +SKIP
        >>> kernel("square", torch.arange(3.0, dtype=torch.float64)[None])  # doctest: +SKIP
        tensor([[0., 1., 4.]], dtype=torch.float64)
    """

    def __init__(self, graph: Graph, functions: Mapping[str, Sequence[int]], *, keep: bool = True) -> None:
        for name in functions:
            if not name.isidentifier() or not name.isascii():
                raise ArgumentError(f"a function's name must consist of letters, digits and underscores; got {name!r}")
        names = {name: f"jetplane_{name}" for name in functions}
        text = _module(graph, {names[name]: outputs for name, outputs in functions.items()})
        code = _object(text, keep)
        self._engine = compiler.linked(code, _symbols())
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        #: C functions of (address of inputs, address of outputs, lanes); lanes are a multiple of `WIDTH`.
        self.functions = {name: kind(self._engine.get_function_address(c)) for name, c in names.items()}
        self.rows = {name: len(outputs) for name, outputs in functions.items()}
        self.inputs = graph.inputs

    def __call__(self, name: str, inputs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute (inputs, lanes) → (outputs, lanes), both float64 on the CPU and contiguous.

        Lanes that are no multiple of `WIDTH` are copied to a padded matrix and back.
        """
        if inputs.dtype != torch.float64 or inputs.dim() != 2 or inputs.shape[0] < self.inputs:
            raise ShapeError(
                f"expected a float64 matrix of {self.inputs} or more rows, got {tuple(inputs.shape)} of {inputs.dtype}"
            )
        lanes = inputs.shape[1]
        shape = (self.rows[name], lanes)
        if out is None:
            out = torch.empty(shape, dtype=torch.float64)
        elif out.shape != shape or out.dtype != torch.float64 or not out.is_contiguous():
            raise ShapeError(f"out must be a contiguous float64 tensor of shape {shape}, got {tuple(out.shape)}")
        padding = -lanes % WIDTH
        if not self.rows[name] or not lanes:
            return out
        if padding:
            # Padded lanes repeat the last one: they raise no floating-point exceptions of their own.
            padded = torch.cat([inputs, inputs[:, -1:].expand(-1, padding)], dim=1)
            result = torch.empty(shape[0], lanes + padding, dtype=torch.float64)
            self.functions[name](padded.data_ptr(), result.data_ptr(), lanes + padding)
            return out.copy_(result[:, :lanes])
        inputs = inputs.contiguous()
        self.functions[name](inputs.data_ptr(), out.data_ptr(), lanes)
        return out
