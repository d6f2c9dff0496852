"""Optimizers that run forward passes only. Each is a `torch.optim.Optimizer`."""

from .base import PlaneOptimizer
from .fgd import FGD
from .fomoh import FoMoH, FoMoHBP
from .fomoh_kd import FoMoHKD
from .plane_search import PlaneSearch

__all__ = ["FGD", "FoMoH", "FoMoHBP", "FoMoHKD", "PlaneOptimizer", "PlaneSearch"]
