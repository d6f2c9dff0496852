"""Estimates of the gradient: how they are made."""

from ..evaluation.side_effects import rehearsal
from .estimators import ActivityPerturbation, Batch, Estimate, Estimator, ForwardGradients

__all__ = ["ActivityPerturbation", "Batch", "Estimate", "Estimator", "ForwardGradients", "rehearsal"]
