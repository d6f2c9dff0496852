"""Adaptation at test time on corrupted images: models, corruptions, methods, and the experiment."""
