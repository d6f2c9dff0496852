"""Optimal control: any torch function as dynamics, exact sparse second derivatives, an interior-point solver."""

from .nlp import NLP
from .problem import Parts, Phase, Problem
from .radau import Mesh

__all__ = ["NLP", "Mesh", "Parts", "Phase", "Problem"]
