"""What a compiled function takes and returns: C signatures with sizes and directions."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError

# C's names -> (struct format, bytes); what is not double has no derivative.
KINDS = {
    "double": ("d", 8), "int": ("i", 4), "unsigned": ("I", 4), "long": ("q", 8), "size_t": ("Q", 8),
    "char": ("b", 1), "bool": ("?", 1), "short": ("h", 2), "void": ("", 0),
}  # fmt: skip
ALIASES = {
    "double": "double", "float64": "double", "float64_t": "double", "int": "int", "signed": "int", "int32": "int",
    "int32_t": "int", "unsigned": "unsigned", "unsigned int": "unsigned", "uint32": "unsigned", "uint32_t": "unsigned",
    "long": "long", "long int": "long", "long long": "long", "int64": "long", "int64_t": "long", "ssize_t": "long",
    "ptrdiff_t": "long", "intp": "long", "Py_ssize_t": "long", "size_t": "size_t", "uint64": "size_t",
    "uint64_t": "size_t", "unsigned long": "size_t", "unsigned long long": "size_t", "char": "char", "int8": "char",
    "bool": "bool", "_Bool": "bool", "short": "short", "int16": "short", "int16_t": "short", "void": "void",
    "none": "void",
}  # fmt: skip

Size = int | str  # a number, or an expression of integer parameters' names


@dataclass(frozen=True)
class Parameter:
    """One parameter of a compiled function.

    Attributes:
        kind: one of `KINDS`.
        shape: sizes of an array that a pointer leads to; None for a number by value.
        reads, writes: whether the caller gives its contents, and gets them back.
        name: by which sizes may refer to it.
        value: of a parameter that the caller does not give.
    """

    kind: str
    shape: tuple[Size, ...] | None = None
    reads: bool = True
    writes: bool = False
    name: str = ""
    value: int | None = None

    @property
    def differentiable(self) -> bool:
        """Whether derivatives enter by it."""
        return self.kind == "double" and self.reads

    def sizes(self, known: Mapping[str, int]) -> tuple[int, ...]:
        """The shape, with the values of integer parameters put in."""
        return tuple(s if isinstance(s, int) else _evaluated(s, known) for s in self.shape or ())


def In(shape: Size | Sequence[Size], kind: str = "double", name: str = "") -> Parameter:
    """An array that a compiled function reads.

    Args:
        shape: sizes; integers, or strings with the names of integer parameters, such as ``"n"`` or ``"n*m"``.
        kind: of the elements, ``"double"``, ``"int"``, ``"long"``, ….
        name: by which other sizes may refer to it.

    >>> In("n").shape
    ('n',)
    """
    return _array(shape, kind, name, reads=True, writes=False)


def Out(shape: Size | Sequence[Size], kind: str = "double", name: str = "", *, inout: bool = False) -> Parameter:
    """An array that a compiled function writes: the caller gets it back, and gives it only where ``inout``.

    >>> Out(3).reads, Out(3, inout=True).reads
    (False, True)
    """
    return _array(shape, kind, name, reads=inout, writes=True)


def _array(shape: Size | Sequence[Size], kind: str, name: str, *, reads: bool, writes: bool) -> Parameter:
    sizes = (shape,) if isinstance(shape, int | str) else tuple(shape)
    return Parameter(_kind(kind), sizes, reads, writes, name)


@dataclass(frozen=True)
class Signature:
    """What a function takes and returns. `returns` is one of `KINDS`."""

    returns: str
    parameters: tuple[Parameter, ...]

    @property
    def given(self) -> tuple[Parameter, ...]:
        """Those parameters that the caller gives."""
        return tuple(p for p in self.parameters if p.reads and p.value is None)


def signature(text: str | None, args: Sequence[Any] | None, returns: Any) -> Signature:
    """The signature that a user wrote, as C or as a list of parameters."""
    if (text is None) == (args is None):
        raise ArgumentError(
            'give either a signature, such as "double(const double[n] in, int n)", or args=, such as [jp.In("n"), int]'
        )
    if args is not None:
        return Signature(_kind(_spelled(returns)), tuple(map(_parameter, args)))
    assert text is not None
    found = re.fullmatch(r"\s*([\w ]+?)\s*\w*\s*\((.*)\)\s*", text) if "(" in text else None
    whole = re.fullmatch(r"\s*([\w ]+?)\s*\((.*)\)\s*", text)
    if whole is None or found is None:
        raise ArgumentError(f'cannot read the signature {text!r}; expected "double(const double[n] in, int n)"')
    try:
        result = _kind(whole[1])
    except ArgumentError:  # a function's name behind the type: "double f(double x)"
        result = _kind(whole[1].rpartition(" ")[0] or whole[1])
    inner = whole[2].strip()
    parts = [] if inner in ("", "void") else inner.split(",")
    return Signature(result, tuple(_declared(p, text) for p in parts))


def _spelled(kind: Any) -> str:
    """The name of a kind that is given as a Python type, a ctypes type or a string."""
    if kind is None:
        return "void"
    if isinstance(kind, str):
        return kind
    names = {int: "int", float: "double", bool: "bool"}
    code = getattr(kind, "_type_", None)  # ctypes
    if kind in names:
        return names[kind]
    codes = {"d": "double", "i": "int", "I": "unsigned", "l": "long", "q": "long", "L": "size_t", "Q": "size_t",
             "b": "char", "h": "short", "?": "bool"}  # fmt: skip
    if isinstance(code, str) and code in codes:
        return codes[code]
    raise ArgumentError(f"expected a kind such as float, int or 'size_t', got {kind!r}; for arrays jp.In and jp.Out")


def _kind(name: str) -> str:
    words = " ".join(w for w in name.split() if w != "const")
    if words not in ALIASES:
        what = "single precision is not carried" if "float" in words else f"expected one of {', '.join(KINDS)}"
        raise ArgumentError(f"the type {name!r} of a compiled function is not known; {what}")
    return ALIASES[words]


def _parameter(given: Any) -> Parameter:
    return given if isinstance(given, Parameter) else Parameter(_kind(_spelled(given)))


def _declared(text: str, whole: str) -> Parameter:
    """One parameter of a C signature: ``const double[n] x in``, ``int n``."""
    words = text.strip()
    direction = None
    found = re.fullmatch(r"(.*[\s\]])(in|out|inout)", words)
    if found:
        words, direction = found[1].strip(), found[2]
    constant = bool(re.match(r"const\b", words))
    sizes = tuple(s.strip() for s in re.findall(r"\[([^\]]*)\]", words))
    words = re.sub(r"\[[^\]]*\]", " ", words)
    if "*" in words or "CPointer" in words:
        raise ArgumentError(
            f"the parameter {text.strip()!r} in {whole!r} is a pointer without a size; write the size in brackets, "
            "with the name of the parameter that holds it: double[n]. For a number by reference: double[1]"
        )
    name = ""
    try:
        kind = _kind(words)
    except ArgumentError:
        head, _, name = words.strip().rpartition(" ")
        kind = _kind(head)
    if not sizes:
        if direction in ("out", "inout"):
            raise ArgumentError(f"the parameter {text.strip()!r} in {whole!r} is written to; write it as an array: [1]")
        return Parameter(kind, name=name, value=0 if name == "__pyx_skip_dispatch" else None)
    direction = direction or ("in" if constant else "inout")
    shape = tuple(int(s) if s.isdigit() else s for s in sizes)
    if "" in shape:
        raise ArgumentError(f"the parameter {text.strip()!r} in {whole!r} has no size; write it in the brackets")
    return Parameter(kind, shape, direction != "out", direction != "in", name)


def _evaluated(text: str, known: Mapping[str, int]) -> int:
    """A size: sums, differences, products and quotients of integers and names."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in known:
            return known[node.id]
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return a + b
            if isinstance(node.op, ast.Sub):
                return a - b
            if isinstance(node.op, ast.Mult):
                return a * b
            if isinstance(node.op, ast.FloorDiv | ast.Div) and b:
                return a // b
        raise ArgumentError(
            f"the size {text!r} is not made of integers and the names of integer parameters; known are {sorted(known)}"
        )

    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise ArgumentError(f"the size {text!r} is no expression") from error
    return value(tree)
