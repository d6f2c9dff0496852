"""Where the machine code of a function is, and its signature where it says so."""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import ArgumentError


def located(f: Any) -> tuple[int, str | None, Any]:
    """The address of a function, its signature if it has one of numbers alone, and what must be kept alive.

    Takes an address, a ctypes function, a cffi function, a ``numba.cfunc``, a ``scipy.LowLevelCallable`` and a Cython
    capsule.

    Raises:
        ArgumentError: it is none of these.
    """
    if type(f) is int:
        if f <= 0:
            raise ArgumentError(f"expected the address of a function, got {f}")
        return f, None, None
    if hasattr(f, "argtypes") and hasattr(f, "restype"):  # of ctypes
        return ctypes.cast(f, ctypes.c_void_p).value or 0, _of_ctypes(f), f
    kind, module = type(f).__name__, type(f).__module__
    if kind == "PyCapsule":
        return *_capsule(f), f
    if kind == "LowLevelCallable":  # of SciPy, a tuple
        at, text, kept = located(f.function)
        return at, text, (f, kept)
    if module.startswith("_cffi") or "cffi" in module.lower():
        import cffi  # pyright: ignore[reportMissingImports]

        ffi = cffi.FFI()
        return int(ffi.cast("uintptr_t", f)), None, f
    if isinstance(at := getattr(f, "address", None), int):  # numba.cfunc
        return at, None, f
    raise ArgumentError(
        f"expected a compiled function: of ctypes, cffi, numba.cfunc, a scipy.LowLevelCallable, a Cython capsule or an "
        f"address; got {kind}. A numba.njit function has no C signature: make it a numba.cfunc"
    )


def of_python(f: Any) -> bool:
    """Whether a function of ctypes calls one of Python."""
    return any(type(kept).__name__ == "CThunkObject" for kept in (getattr(f, "_objects", None) or {}).values())


def _of_ctypes(f: Any) -> str | None:
    """The signature of a ctypes function whose ``argtypes`` are all numbers."""
    from .signature import _kind, _spelled

    if not f.argtypes:
        return None
    try:
        names = [_kind(_spelled(t)) for t in f.argtypes]
        return f"{_kind(_spelled(f.restype))}({', '.join(names)})"
    except ArgumentError:
        return None


def _capsule(capsule: Any) -> tuple[int, str | None]:
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = name_of(capsule)
    text = name.decode() if name else None
    return pointer_of(capsule, name) or 0, text if text and "*" not in text and "(" in text else None
