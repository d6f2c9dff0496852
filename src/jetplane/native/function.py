"""`jetplane.compiled`: a compiled function as a torch function with a rule for jets."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ArgumentError, DerivativeError, DeviceError, NativeCodeError
from ..jets import Coefficients, Jet, PairStructure, Space, absent, make, parts
from ..rules.differences import BACKWARD, graph_inputs, graphless
from ..rules.dispatch import dispatch
from ..rules.fallback import all_plain
from ..rules.functions import Call, seeded
from ..rules.registry import enter
from .arena import Arena
from .callables import located, of_python
from .calling import Function, Inputs
from .checking import Rows, held
from .code import Code, Report, Unknown
from .coefficients import Layout
from .memory import MARK
from .module import WORDS
from .process import described
from .program import Program
from .registers import INTEGERS
from .signature import KINDS, Signature, signature

CHUNK, PAIRED = 16, 8  # directions that are carried at once, for first and for second derivatives
CHECKS = ("first", "always", "never")
MOST_CHECKS = 32  # so that an integer that counts calls does not have every one of them checked
_lock = threading.RLock()  # there is one arena


def compiled(
    f: Any,
    c_signature: str | None = None,
    *,
    args: Sequence[Any] | None = None,
    returns: Any = None,
    check: str = "first",
    constant: Sequence[str] = (),
    rules: Mapping[str, tuple[Any, Any]] | None = None,
) -> Compiled:
    """A function of compiled code, in C, C++, Fortran, Cython or numba, as a torch function with exact derivatives.

    Its machine code, and that of the functions it calls, is decoded and recompiled with first and second
    coefficients of all directions beside every double. Values have the same bits as those of the function itself;
    derivatives are exact to rounding, like those of the same formulas in torch.

    Args:
        f: a function of ctypes or cffi, a ``numba.cfunc``, a ``scipy.LowLevelCallable``, a Cython capsule or
            an address.
        c_signature: such as ``"double(const double[n] in, int n)"``: C's types, sizes of arrays in brackets, behind
            them a name, and ``in``, ``out`` or ``inout`` (by default what ``const`` says). May be left out
            where f knows it and it has numbers alone.
        args: the parameters as a list instead, of ``jp.In(shape)``, ``jp.Out(shape)``, ``int``, ``float``.
        returns: with ``args``, what it returns: ``float``, ``int`` or None.
        check: "first": the first call for each number of directions, values of integers and sizes of arrays (at most
            32 of them) compares values with the function itself, bit for bit, and the slope and the curvature of every
            output along a sum of all directions with differences; "always": every call does; "never".
        constant: names of functions that are called as they are and whose results have no derivatives, such as
            ``printf``.
        rules: f' and f'' of functions of one double, by name: functions of compiled code, or of Python.

    Returns:
        A function of the parameters that are read, in their order: arrays are tensors (float64, or converted) of so
        many elements, numbers are numbers or tensors. It gives what f returns and then all arrays that f writes, as a
        tuple if there are several, in the dtype of the first tensor given. Directions go through in chunks of 16, for
        second derivatives of 8. Reverse mode takes a forward pass for 16 elements of the inputs.

    Raises:
        ArgumentError: the signature cannot be read, or f is not a compiled function.
        MissingPackageError: pypcode or llvmlite is not installed.
        NativeCodeError: the code does something that is not supported; the message says what, where, and the remedy.
        DeviceError: the system is not Linux on x86-64.

    Method: Aehle, Blühdorn, Sagebaum and Gauger, "Forward-Mode Automatic Differentiation of Compiled Programs", arXiv
    2209.01895, with a compiler in place of an emulator and second derivatives.

    >>> import ctypes, torch, jetplane as jp
    >>> erf = jp.compiled(ctypes.CDLL("libm.so.6").erf, "double(double x)")  # doctest: +SKIP
    >>> jp.hessian(lambda x: erf(x), torch.tensor(0.5, dtype=torch.float64))  # doctest: +SKIP
    tensor(-0.8788, dtype=torch.float64)
    """
    _supported()
    if check not in CHECKS:
        raise ArgumentError(f"check must be one of {', '.join(CHECKS)}; got {check!r}")
    address, own, kept = located(f)
    if of_python(f):
        raise ArgumentError(
            "this is a function of Python behind ctypes.CFUNCTYPE, not a compiled one; hand in what it is made of, as "
            "a torch function or by jetplane.blackbox"
        )
    if c_signature is None and args is None:
        if own is None:
            raise ArgumentError(
                'this function does not say what it takes; give its signature, as "double(const double[n] in, int n)"'
            )
        c_signature = own
    described_as = signature(c_signature, args, returns)
    custom, callbacks = _custom(rules or {})
    program = Program(address, tuple(constant), custom)
    return Compiled(program, described_as, check, (kept, callbacks))


def _supported() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise DeviceError(
            f"jetplane.compiled reads machine code of Linux on x86-64; this is {sys.platform} on {platform.machine()}. "
            "jetplane.blackbox works everywhere"
        )


def _custom(rules: Mapping[str, tuple[Any, Any]]) -> tuple[dict[str, tuple[int, int]], list[Any]]:
    found, kept = {}, []
    kind = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)
    for name, pair in rules.items():
        if len(pair) != 2:
            raise ArgumentError(f"rules[{name!r}] must be two functions, f' and f''")
        both = []
        for g in pair:
            try:
                at, _, alive = located(g)
            except ArgumentError:
                if not callable(g):
                    raise
                alive = kind(g)
                at = ctypes.cast(alive, ctypes.c_void_p).value or 0
            both.append(at)
            kept.append(alive)
        found[name] = (both[0], both[1])
    return found, kept


class Compiled(Function):
    """A compiled function with derivatives; made by `compiled`."""

    def __init__(self, program: Program, described: Signature, check: str, kept: Any = None) -> None:
        super().__init__(program.entry, described, _name(program), kept)
        self._program, self._check = program, check
        self._codes: dict[Layout, Code] = {}
        self._verdicts: dict[str, str] = {}

    def __call__(self, *args: Any) -> Any:
        """Call it: plain tensors and numbers, or inside of an evaluation."""
        self._counted(args)
        args = seeded(args)
        if any(isinstance(a, Jet) for a in args):
            return dispatch(CALL, (self, *args), {})
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _Reverse.apply(self, *args)
        return self._given(self._plain(self._inputs(args)), args)

    # --- with derivatives ---------------------------------------------------------------------------------

    def coefficients(
        self, x: Inputs, first: list[Rows], second: list[Rows], structure: PairStructure | None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Values, and first and second coefficients of all outputs of doubles, flat and one behind the other.

        Args:
            x: the arguments.
            first: coefficients of each parameter, (K, n) or None.
            second: the same, (count, n) or None.
            structure: which second coefficients are made; None for none.
        """
        k = next((len(c) for c in first if c is not None), 0)
        with _lock:
            name = self._due(k, structure, x) if k else None
            if name is None:
                return self._carried(k, x, first, second, structure)
            x = replace(x, native=self._plain(x))
            values, made, bent = self._carried(k, x, first, second, structure)
            self._verdicts[name] = self._differences(x, first, second, structure, (made, bent))
            return values, made, bent

    def _carried(
        self, k: int, x: Inputs, first: list[Rows], second: list[Rows], structure: PairStructure | None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        if structure is None or not k:
            values, made = self._first(x, first, k) if k else (None, None)
            carried = next((len(c) for c in second if c is not None), 0)
            out2 = None
            if carried:
                values, out2 = self._first(x, second, carried)
            return (self._plain(x) if values is None else values), made, out2
        return self._second(x, first, second, structure)

    def _first(self, x: Inputs, rows: list[Rows], k: int) -> tuple[list[Tensor], Tensor]:
        out, values = [], []
        for start in range(0, k, CHUNK):
            some = [c if c is None else c[start : start + CHUNK] for c in rows]
            values, made, _ = self._run(Layout.of(min(CHUNK, k - start)), x, some, [None] * len(rows))
            out.append(made)
        return values, torch.cat(out)

    def _second(
        self, x: Inputs, first: list[Rows], second: list[Rows], structure: PairStructure
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        if structure.k <= PAIRED:
            return self._run(Layout.of(structure.k, _terms(structure)), x, first, second)
        size = PAIRED if structure.on_diagonal else PAIRED // 2
        blocks = [tuple(range(b, min(b + size, structure.k))) for b in range(0, structure.k, size)]
        met = {tuple(sorted((t.i // size, t.j // size))) for t in structure.terms()}
        apart = {p for p in met if p[0] != p[1]}
        met -= {(a, a) for p in apart for a in p}
        values: list[Tensor] = []
        out1 = out2 = None
        for a, b in sorted(met):
            rows = blocks[a] + (blocks[b] if b != a else ())
            found = structure.restricted(rows)
            assert found is not None
            sub, places = found
            picked = [None if c is None else c[list(rows)] for c in first]
            carried = [None if c is None or not structure.single else c[list(places)] for c in second]
            values, made1, made2 = self._run(Layout.of(sub.k, _terms(sub)), x, picked, carried)
            if out1 is None:
                out1 = made1.new_zeros(structure.k, made1.shape[1])
                out2 = made1.new_zeros(structure.count, made1.shape[1])
            assert out2 is not None
            out1[list(rows)] = made1
            if structure.single:
                out2[list(places)] = made2
            else:
                out2.index_add_(0, torch.tensor(places), made2)
        assert out1 is not None and out2 is not None
        missing = sorted(set(range(structure.k)) - {d for p in met for a in p for d in blocks[a]})
        if missing:
            values, made = self._first(x, [None if c is None else c[missing] for c in first], len(missing))
            out1[missing] = made
        if not structure.single and any(c is not None for c in second):
            out2 += self._first(x, second, structure.count)[1]
        return values, out1, out2

    def _run(
        self, layout: Layout, x: Inputs, first: list[Rows], second: list[Rows]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        with _lock:
            code = self._codes.get(layout) or Code.kept(self._program, layout, self.__name__)
            while True:
                code = self._codes[layout] = code or self._made(layout, x)
                try:
                    found = self._called(code, x, first, second)
                    break
                except Unknown:
                    code = None
            if x.native is not None:
                self._compared(found[0], x.native, x)
            return found

    def _made(self, layout: Layout, x: Inputs) -> Code:
        """Compile for a layout. Calls and jumps that only running finds are found with code that is made quickly."""
        self._plain(x)  # what it does at its first call, such as finding libraries, is done
        nothing: list[Rows] = [None] * len(x.values)
        self._called(Code(self._program, Layout.of(1), self.__name__, quick=True), x, nothing, nothing)
        return Code(self._program, layout, self.__name__)

    def _called(
        self, code: Code, x: Inputs, first: list[Rows], second: list[Rows]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the code: values, and coefficients of the doubles among them, flat."""
        layout, places = code.layout, code.layout.slots
        stride, each = layout.stride, 1 + layout.stride
        addresses: dict[int, int] = {}
        words = torch.frombuffer(code.words, dtype=torch.float64)

        def rows(n: int, count: int) -> Tensor:
            table = torch.zeros(count, stride, dtype=torch.float64)
            for which, slots in zip((first[n], second[n]), places, strict=True):
                if which is not None and slots:
                    table[:, slots] = which.mT
            return table

        def prepare(arena: Arena) -> tuple[int, int]:
            ctypes.memset(ctypes.addressof(code.words), 0, ctypes.sizeof(code.words))
            heap = arena.base + 64
            shadow = arena.shadow(layout)
            integers, doubles, stacked = 0, 0, []
            for n, p in enumerate(self._signature.parameters):
                value = x.values[n]
                if p.shape is not None:
                    addresses[n] = heap
                    size = value.numel() * value.element_size()
                    if heap + size > arena.base + arena.size // 2:
                        raise NativeCodeError(
                            f"{self.__name__} is given more than half of the {arena.size >> 20} MiB that are followed"
                        )
                    ctypes.memmove(heap, value.data_ptr(), size)
                    granules = (size + 7) // 8
                    if granules:
                        at = shadow + (heap - arena.base) * stride
                        table = _view(at, granules * stride).view(granules, stride)
                        if p.kind == "double":
                            table.copy_(rows(n, granules))
                        else:
                            table.zero_()
                    heap = (heap + size + 127) // 64 * 64
                    value = addresses[n]
                if p.shape is None and p.kind == "double":
                    if doubles < 8:
                        at = WORDS + doubles * each
                        words[at : at + each] = torch.cat([torch.as_tensor(value), rows(n, 1)[0]])
                        doubles += 1
                    else:
                        stacked.append((struct.pack("<d", float(value)), rows(n, 1)))
                elif integers < 6:
                    code.words[INTEGERS.index(("rdi", "rsi", "rdx", "rcx", "r8", "r9")[integers])] = (
                        value & (1 << 64) - 1
                    )
                    integers += 1
                else:
                    stacked.append(((value & (1 << 64) - 1).to_bytes(8, "little"), None))
            code.words[INTEGERS.index("rax")] = doubles
            top = arena.stack - (8 * len(stacked) + 15) // 16 * 16
            for n, (data, table) in enumerate(stacked):
                ctypes.memmove(top + 8 * n, data, 8)
                at = shadow + (top + 8 * n - arena.base) * stride
                _view(at, stride).copy_(torch.zeros(stride) if table is None else table[0])
            return heap, top - 8

        code.run(prepare)
        values, tables = [], []
        for n in self._outputs():
            if n < 0:
                if self._signature.returns == "double":
                    values.append(words[WORDS].clone())
                    tables.append(words[WORDS + 1 : WORDS + each].clone()[None])
                else:
                    format_, size = KINDS[self._signature.returns]
                    raw = int(code.words[0]).to_bytes(8, "little")[:size]
                    values.append(torch.tensor(int(struct.unpack("<" + format_, raw)[0])))
                continue
            p, like = self._signature.parameters[n], x.values[n]
            made = torch.empty_like(like)
            size = like.numel() * like.element_size()
            ctypes.memmove(made.data_ptr(), addresses[n], size)
            values.append(made.reshape(x.sizes[n]))
            if p.kind == "double":
                at = code.arena.shadow(layout) + (addresses[n] - code.arena.base) * stride
                tables.append(_view(at, like.numel() * stride).view(-1, stride).clone())
        table = torch.cat(tables) if tables else torch.zeros(0, stride, dtype=torch.float64)
        if bool(((table.view(torch.int64) & ((1 << 63) - 256)) == MARK).any()):
            raise NativeCodeError(
                f"{self.__name__} computes with a double of which it had written a part of the bytes; its derivative "
                "is not known. Hand its derivatives over with jetplane.register_native, or take jetplane.blackbox"
            )
        return values, table[:, places[0]].mT.contiguous(), table[:, places[1]].mT.contiguous()

    # --- checked ------------------------------------------------------------------------------------------

    def _due(self, k: int, structure: PairStructure | None, x: Inputs) -> str | None:
        """Under which name a call is to be checked, if it is."""
        if self._check == "never":
            return None
        pairs = f", {structure.count} second coefficients" if structure is not None and k else ""
        whole = [(p.name or p.kind, v) for p, v in zip(self._signature.parameters, x.values, strict=True)]
        given = "".join(f", {name} = {v}" for name, v in whole if isinstance(v, int))
        sizes = "".join(f", {name}[{v.numel()}]" for name, v in whole if isinstance(v, Tensor) and v.numel() > 1)
        name = f"{k} directions{pairs}{given}{sizes}"
        if self._check == "always" or name not in self._verdicts and len(self._verdicts) < MOST_CHECKS:
            return name
        return None

    def _compared(self, values: list[Tensor], native: list[Tensor], x: Inputs) -> None:
        for n, (ours, own) in enumerate(zip(values, native, strict=True)):
            if ours.is_floating_point():
                same = (ours.view(torch.int64) == own.view(torch.int64)) | (ours.isnan() & own.isnan())
            else:
                same = ours == own
            if bool(same.all()):
                continue
            again = self._plain(x)[n]
            label = self._output(n)
            if not bool(((again == own) | (again.isnan() & own.isnan())).all()):
                raise NativeCodeError(f"{self.__name__} gives another {label} in each call; expected a pure function")
            worst = (ours.double() - own.double()).abs().max()
            raise NativeCodeError(
                f"values of {self.__name__} are not those of the function: {label} is off by {float(worst):.0e}. "
                "Threads that share out a sum are one cause (OMP_NUM_THREADS=1); else this is an error of Jetplane's, "
                "please report it with the library. jetplane.register_native or jetplane.blackbox do without lifting"
            )

    def _output(self, n: int) -> str:
        at = self._outputs()[n]
        return "what it returns" if at < 0 else f"the parameter {self._label(at)}"

    def _differences(
        self,
        x: Inputs,
        first: list[Rows],
        second: list[Rows],
        structure: PairStructure | None,
        found: tuple[Tensor | None, Tensor | None],
    ) -> str:
        """Hold slopes and curvatures against differences of the function itself."""
        assert x.native is not None

        def value(moves: list[Rows]) -> Tensor:
            moved = [v if m is None else v + m for v, m in zip(x.values, moves, strict=True)]
            return _flat(self._plain(Inputs(moved, x.sizes, x.dtype, x.device)))

        verdicts = held(value, _flat(x.native), x.values, first, second, structure, found)
        for each in verdicts:
            if each.wrong is None:
                continue
            at, away, spread = each.wrong
            sizes = [0 if not v.is_floating_point() else v.numel() for v in x.native]
            n = next(n for n in range(len(sizes)) if at < sum(sizes[: n + 1]))
            label = self._output(n) + (f"[{at - sum(sizes[:n])}]" if sizes[n] > 1 else "")
            raise NativeCodeError(
                f"the {each.what} of {self.__name__} differs from differences by {away:.1e} of its size ({label}); "
                f"they agree to {spread:.1e}. The code may branch where an argument equals a special value, keep "
                "values between calls, or change bits of doubles in a way that is not seen. Hand its derivatives over "
                'with jetplane.register_native, or take jetplane.blackbox; check="never" accepts it'
            )
        return ", ".join(f"{v.what} {v.text}" for v in verdicts)

    def report(self) -> CompiledReport:
        """What was lifted, entered and checked, for each number of directions that was used."""
        return CompiledReport(
            self.__name__, {layout: code.report for layout, code in self._codes.items()}, dict(self._verdicts)
        )


def _flat(values: list[Tensor]) -> Tensor:
    doubles = [v.reshape(-1) for v in values if v.is_floating_point()]
    return torch.cat(doubles) if doubles else torch.zeros(0, dtype=torch.float64)


def _view(address: int, n: int) -> Tensor:
    return torch.frombuffer((ctypes.c_double * n).from_address(address), dtype=torch.float64)


def _terms(structure: PairStructure) -> list[tuple[int, int, int, float]]:
    return [(t.n, t.i, t.j, t.weight) for t in structure.terms()]


def _name(program: Program) -> str:
    maps = program.decoder.maps
    if not maps.executable(program.entry):
        raise ArgumentError(f"expected the address of a compiled function, found no code at {program.entry:#x}")
    module = maps.module(program.entry)
    symbol = module.symbol(program.entry) if module else None
    return symbol.name if symbol else described(maps, program.entry)[0]


@dataclass
class CompiledReport:
    """What `Compiled.report` says; prints as a table.

    Attributes:
        name: of the function.
        layouts: for each layout of coefficients what was lifted.
        checks: for each kind of call that was checked (directions, integers, sizes), what the differences said.
    """

    name: str
    layouts: dict[Layout, Report]
    checks: dict[str, str]

    def __str__(self) -> str:
        lines = [self.name]
        for layout, r in self.layouts.items():
            lines += [
                f"  {layout.k} directions, {len(layout.places)} second coefficients: {r.instructions} instructions in "
                f"{r.functions} functions of {', '.join(r.libraries) or 'code without a file'}",
                f"    {'from disk' if r.cached else 'lifted'} in {r.lift_s + r.compile_s:.2f} s, {r.rounds} rounds",
                f"    rules: {', '.join(r.rules) or 'none'}",
                f"    not carried, and not reached: {'; '.join(r.refused) or 'nothing'}",
            ]
        lines += [f"  check with {name}: {said}" for name, said in self.checks.items()]
        return "\n".join(lines)


# --- jets, and reverse mode --------------------------------------------------------------------------------------

CALL = Call("compiled", "a jetplane.compiled function")


def _on_jets(space: Space, f: Compiled, *args: Any) -> Any:
    if not all_plain(space, args, {}):
        raise DerivativeError(
            f"{f.__name__} is inside nested derivatives (jetplane.jet in a closure), which are not supported; "
            "move it out of them"
        )
    of = [parts(a, space) for a in args]
    x = f._inputs([p for p, _, _ in of])
    rows: list[list[Rows]] = [[], []]
    given = iter(of)
    for p in f._signature.parameters:
        primal, *carried = next(given) if p.reads and p.value is None else (None, None, None)
        for order, c in enumerate(carried):
            some = p.differentiable and bool(c)
            if c and not p.differentiable:
                raise DerivativeError(
                    f"the parameter {p.name or p.kind} of {f.__name__} is an integer and carries derivatives"
                )
            rows[order].append(_rows(c, primal) if some and c is not None and primal is not None else None)
    values, first, second = f.coefficients(x, rows[0], rows[1], space.structure if space.order == 2 else None)
    held = [t for a in args for t in graph_inputs(a, space)] if space.recorded else []
    why = BACKWARD.format(f.__name__, "forward passes through compiled code")
    made, at = [], 0
    for v in values:
        value = v.to(x.device, x.dtype if v.is_floating_point() else v.dtype)
        if v.is_floating_point():
            value = graphless(value, held, why)
        if not v.is_floating_point():
            made.append(value)
            continue
        n = v.numel()
        both = [
            absent(space, order) if c is None
            else Coefficients(
                space, order, graphless(c[:, at : at + n].to(x.device, x.dtype).reshape(-1, *v.shape), held, why)
            )
            for order, c in ((1, first), (2, second))
        ]  # fmt: skip
        made.append(make(value, both[0], both[1], space))
        at += n
    return made[0] if len(made) == 1 else tuple(made)


def _rows(c: Coefficients, primal: Tensor) -> Tensor:
    full = c.full(primal.shape, torch.float64, primal.device)
    return full.detach().to("cpu", torch.float64).reshape(full.shape[0], -1).contiguous()


enter(CALL, _on_jets)


class _Reverse(torch.autograd.Function):
    """Reverse mode by forward passes along every element of the inputs."""

    @staticmethod
    def forward(ctx: Any, f: Compiled, *args: Any) -> Any:
        ctx.f, ctx.args = f, [a.detach() if isinstance(a, Tensor) else a for a in args]
        out = f._given(f._plain(f._inputs(args)), args)
        ctx.mark_non_differentiable(
            *[y for y in (out if isinstance(out, tuple) else (out,)) if not y.is_floating_point()]
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> Any:
        f: Compiled = ctx.f
        x = f._inputs(ctx.args)
        wanted = iter(ctx.needs_input_grad[1:])
        places = [n for n, p in enumerate(f._signature.parameters) if p.reads and p.value is None and next(wanted)]
        total = sum(x.values[n].numel() for n in places)
        rows: list[Rows] = [None] * len(x.values)
        start = 0
        for n in places:
            count = x.values[n].numel()
            own = rows[n] = torch.zeros(total, count, dtype=torch.float64)
            own[start : start + count] = torch.eye(count, dtype=torch.float64)
            start += count
        _, jacobian, _ = f.coefficients(x, rows, [None] * len(rows), None)
        assert jacobian is not None
        weights = torch.cat(
            [c.detach().cpu().double().reshape(-1) for c in cotangents if c is not None and c.is_floating_point()]
        )
        gradient = iter((jacobian @ weights).split([x.values[n].numel() for n in places]))
        return None, *[
            next(gradient).reshape(a.shape).to(a.device, a.dtype) if needed else None
            for a, needed in zip(ctx.args, ctx.needs_input_grad[1:], strict=True)
        ]
