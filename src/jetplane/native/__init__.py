"""Code that torch cannot see: compiled functions with exact first and second derivatives.

`compiled` decodes machine code and compiles it again with coefficients beside every double; `register_native` takes
derivatives that are compiled functions themselves.
"""

from pathlib import Path

from .function import Compiled, CompiledReport, compiled
from .registered import register_native
from .signature import In, Out


def include() -> Path:
    """The folder of ``jetplane/jet.hpp``, jets for C++ (``g++ -I``): for functions whose source is at hand.

    >>> (include() / "jetplane" / "jet.hpp").exists()
    True
    """
    return Path(__file__).parent / "include"


__all__ = ["Compiled", "CompiledReport", "In", "Out", "compiled", "include", "register_native"]
