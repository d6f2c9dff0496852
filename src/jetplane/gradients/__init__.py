"""Estimates of the gradient, forward only: by noise on what layers put out, by local losses, or by drawn directions.

An `Estimator` makes estimates in the steps of `jetplane.optim.PlaneSearch`. For activity perturbation `allocate` plans
how each layer is perturbed, `estimate` finds the gradient by the plans, and a `Feedback` learns to predict it.
`register_layer` makes a new class of modules one that can be perturbed.
"""

from ..evaluation.side_effects import without_side_effects
from .allocation import allocate, signature
from .estimators import ActivityPerturbation, Batch, Estimate, Estimator, ForwardGradients
from .feedback import Feedback, FeedbackSpec, FeedbackState
from .heads import LocalHeads
from .layers import PerturbableLayer, WeightPerturbableLayer, perturbable, register_layer
from .perturbation import PerturbationEstimate, estimate
from .plan import OTHERS, LayerPlan
from .residual import ResidualStream

__all__ = [
    "OTHERS",
    "ActivityPerturbation",
    "Batch",
    "Estimate",
    "Estimator",
    "Feedback",
    "FeedbackSpec",
    "FeedbackState",
    "ForwardGradients",
    "LayerPlan",
    "LocalHeads",
    "PerturbableLayer",
    "PerturbationEstimate",
    "ResidualStream",
    "WeightPerturbableLayer",
    "allocate",
    "estimate",
    "perturbable",
    "register_layer",
    "signature",
    "without_side_effects",
]
