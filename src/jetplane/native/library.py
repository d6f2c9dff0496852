"""Functions of the system that are never lifted, by symbol: which rule a function at an address has.

A rule knows a function by its name and finds all its addresses, since a symbol has one for each version and a library
chooses among several for the processor.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .mathematics import BINARY, STEPS, TO_INTEGER, UNARY, step, unary, vector, whole
from .process import Maps
from .system import PLAIN
from .translator import Translator

LIBRARIES = ("libm.so.6", "libc.so.6", "libmvec.so.1", "libstdc++.so.6", "libgomp.so.1", "libgcc_s.so.1")
SYSTEM = re.compile(r"(libm|libc|libmvec|ld-linux.*|libpthread|librt|libdl|libffi|libpython.*)[-.]|python[\d.]*$")
ENDING = re.compile(
    r"_gfortran_(runtime_error|os_error|stop|error_stop|generate_error).*|(_*exit|abort|__assert_fail|__stack_chk_fail)$"
)
LIFTED = ("qsort", "qsort_r", "bsearch")  # of libc: they move what they are given, and call back
LEAVING = re.compile(r"(__cxa_(?:throw|rethrow|allocate_exception|begin_catch)|_Unwind_)|_*(?:sig)?(?:long|set)jmp")


@dataclass(frozen=True)
class Rule:
    """How a function is carried: its name, and what writes it."""

    name: str
    emit: Callable[[Translator], None]


def rules() -> dict[str, Callable[[Translator], None]]:
    """All rules by name."""
    return {
        **{n: unary(n, r) for n, r in UNARY.items()},
        **{n: step(n) for n in STEPS},
        **{n: whole(n, size) for n, size in TO_INTEGER.items()},
        **BINARY,
        **PLAIN,
    }


@functools.cache
def _linker() -> ctypes.CDLL:
    linker = ctypes.CDLL(None)
    for name in ("dlsym", "dlvsym"):
        getattr(linker, name).restype = ctypes.c_void_p
    linker.dlsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    linker.dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    return linker


_VERSIONS = [f"GLIBC_2.{n}" for n in ("2.5", "14", "15", "22", "23", "27", "29", "31", "35", "38", "39", "40", "41")]


def addresses(name: str, library: ctypes.CDLL) -> set[int]:
    """Where a function is, in every version that a library has."""
    linker, text = _linker(), name.encode()
    found = {linker.dlsym(library._handle, text)}
    found |= {linker.dlvsym(library._handle, text, v.encode()) for v in _VERSIONS}
    return {a for a in found if a}


@functools.cache
def _table(loaded: frozenset[str]) -> Mapping[int, Rule]:
    made: dict[int, Rule] = {}
    known = rules()
    for library in LIBRARIES:
        if not any(path.rpartition("/")[2].startswith(library.partition(".so")[0]) for path in loaded):
            continue
        try:
            handle = ctypes.CDLL(library)
        except OSError:
            continue
        for name, emit in known.items():
            for at in addresses(name, handle):
                made.setdefault(at, Rule(name, emit))
        if library.startswith("libc."):
            made.update({at: Rule(n, known[n]) for n in ("__tls_get_addr",) if (at := external(n))})
        if library.startswith("libmvec"):
            for name, at in _vectors(handle):
                made.setdefault(at, _vector_rule(name))
    return made


def table(maps: Maps) -> Mapping[int, Rule]:
    """The functions that have a rule, by address, of the libraries that are loaded."""
    return _table(frozenset(r.path for r in maps.regions if ".so" in r.path))


def _vectors(handle: ctypes.CDLL) -> list[tuple[str, int]]:
    found = []
    for isa, n in (("b", 2), ("c", 4), ("d", 4)):
        for name in (*UNARY, "pow", "atan2", "hypot"):
            symbol = f"_ZGV{isa}N{n}{'vv' if name in ('pow', 'atan2', 'hypot') else 'v'}_{name}"
            found += [(symbol, at) for at in addresses(symbol, handle)]
    return found


def _vector_rule(symbol: str) -> Rule:
    found = re.fullmatch(r"_ZGV[bcd]N(\d)(v+)_(\w+)", symbol)
    assert found is not None
    return Rule(symbol, vector(symbol, found[3], int(found[1]), len(found[2])))


def external(name: str) -> int:
    """The address of a function of the system."""
    if name == "__tls_get_addr":
        return _linker().dlsym(None, name.encode()) or 0
    for library in LIBRARIES:
        try:
            found = _linker().dlsym(ctypes.CDLL(library)._handle, name.encode())
        except OSError:
            continue
        if found:
            return found
    return 0
