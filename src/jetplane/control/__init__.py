"""Optimal control: any torch function as dynamics, exact sparse second derivatives, an interior-point solver.

Needs NumPy and SciPy; IPOPT comes with CasADi's wheel, machine code with llvmlite: ``pip install 'jetplane[control]'``.
"""

from ..errors import MissingPackageError

try:
    import numpy as _numpy  # noqa: F401
    import scipy as _scipy  # noqa: F401
except ImportError as error:
    raise MissingPackageError(f"jetplane.control needs {error.name}: pip install 'jetplane[control]'") from error

from .check import CheckReport
from .foreign import per_node
from .nlp import NLP
from .problem import Parts, Phase, Problem
from .radau import Mesh
from .simulation import Simulation
from .solution import PhaseSolution, Solution, load
from .solving import Batch, solve, solve_batch
from .status import Status

__all__ = [
    "NLP",
    "Batch",
    "CheckReport",
    "Mesh",
    "Parts",
    "Phase",
    "PhaseSolution",
    "Problem",
    "Simulation",
    "Solution",
    "Status",
    "per_node",
    "load",
    "solve",
    "solve_batch",
]
