"""LLVM assembly to machine code of this process, kept on disk by its hash. llvmlite brings LLVM with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import MissingPackageError


def available() -> bool:
    """Whether llvmlite is installed."""
    from importlib.util import find_spec

    return find_spec("llvmlite") is not None


@cache
def binding() -> Any:
    """The binding of LLVM, ready to make code for this machine.

    Raises:
        MissingPackageError: llvmlite is not installed.
    """
    try:
        llvm = import_module("llvmlite.binding")
    except ImportError as error:
        raise MissingPackageError(
            "machine code needs llvmlite, which is not installed: pip install 'jetplane[control]' or "
            "'jetplane[native]' (or pip install llvmlite)"
        ) from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def address(library: ctypes.CDLL, name: str) -> int:
    """The address of a function of a library."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def cache_folder() -> Path:
    """Where machine code is kept: ``JETPLANE_CACHE``, else ``jetplane`` in the user's cache folder."""
    named = os.environ.get("JETPLANE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jetplane"


def recall(key: str) -> bytes | None:
    """What is kept on disk under a key; None where nothing is, or what another program cut short or changed."""
    try:
        data = (cache_folder() / f"{key}.o").read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def keep(key: str, data: bytes) -> None:
    """Keep data on disk under a key. A folder that cannot be written costs time, nothing else."""
    path = cache_folder() / f"{key}.o"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(file.name, path)  # whole or not at all, with other processes at work
    except OSError:
        pass


def machine() -> str:
    """The compiler and the processor: code is good for these alone."""
    llvm = binding()
    return "\n".join(
        [
            repr(llvm.llvm_version_info),
            llvm.get_default_triple(),
            llvm.get_host_cpu_name(),
            llvm.get_host_cpu_features().flatten(),
        ]
    )


def hashed(*parts: str) -> str:
    """A key for `recall` and `keep`."""
    return hashlib.sha256("\n".join([machine(), *parts]).encode()).hexdigest()[:32]


def compiled(text: str, *, slp: bool = False, level: int = 2) -> bytes:
    """The object code of a module of LLVM assembly.

    Args:
        text: the assembly.
        slp: join scalar operations to vectors.
        level: of optimization, 0 to 3.
    """
    llvm = binding()
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=level,
        jit=True,
        codemodel="jitdefault",
    )
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = options.loop_unrolling = False
    options.slp_vectorization = slp
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    return target.emit_object(module)


def linked(code: bytes, symbols: Mapping[str, int]) -> Any:
    """Object code made runnable: an engine, to hold on to, with ``get_function_address(name)``.

    Args:
        code: of `compiled`.
        symbols: addresses of what it declares, since systems differ in whether a linker finds libm by itself.
    """
    llvm = binding()
    for name, at in symbols.items():
        llvm.add_symbol(name, at)
    target = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
