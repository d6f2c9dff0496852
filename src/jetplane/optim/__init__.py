"""Optimizers that run forward passes only, each a `torch.optim.Optimizer`; and nonlinear least squares, a function."""

from .base import PlaneOptimizer
from .fgd import FGD
from .fomoh import FoMoH, FoMoHBP
from .fomoh_kd import FoMoHKD
from .levenberg_marquardt import LeastSquaresResult, least_squares
from .plane_search import PlaneSearch

__all__ = ["FGD", "FoMoH", "FoMoHBP", "FoMoHKD", "LeastSquaresResult", "PlaneOptimizer", "PlaneSearch", "least_squares"]
