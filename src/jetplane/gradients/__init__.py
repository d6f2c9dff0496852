"""Estimates of the gradient: how they are made."""

from .estimators import ActivityPerturbation, Batch, Estimate, Estimator, ForwardGradients

__all__ = ["ActivityPerturbation", "Batch", "Estimate", "Estimator", "ForwardGradients"]
