"""Graphs of scalars with exact sparse derivatives, and machine code of them over many lanes.

`Graph` is what is computed for one lane, `Derivatives` adds first and second derivatives to it, `Kernel` compiles it by
LLVM (llvmlite, an optional package) and `TorchKernel` runs it as torch operators.
"""

from .compiler import available, cache_folder
from .derivatives import Derivatives, partials
from .graph import EVALUATE, External, Graph
from .machine import WIDTH, Kernel
from .operators import TorchKernel

__all__ = [
    "EVALUATE",
    "WIDTH",
    "Derivatives",
    "External",
    "Graph",
    "Kernel",
    "TorchKernel",
    "available",
    "cache_folder",
    "partials",
]
