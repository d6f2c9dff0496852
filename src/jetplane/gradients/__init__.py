"""Estimates of the gradient by activity perturbation: noise on what layers put out, in forward passes alone.

`allocate` plans how each layer is perturbed, `estimate` finds the gradient by the plans, and a `Feedback` learns to
predict it. `register_layer` makes a new class of modules one that can be perturbed.
"""

from .allocation import allocate, signature
from .feedback import Feedback, FeedbackSpec, FeedbackState
from .layers import PerturbableLayer, WeightPerturbableLayer, perturbable, register_layer
from .perturbation import Estimate, estimate
from .plan import OTHERS, LayerPlan

__all__ = [
    "OTHERS",
    "Estimate",
    "Feedback",
    "FeedbackSpec",
    "FeedbackState",
    "LayerPlan",
    "PerturbableLayer",
    "WeightPerturbableLayer",
    "allocate",
    "estimate",
    "perturbable",
    "register_layer",
    "signature",
]
