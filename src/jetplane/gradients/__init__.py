"""Internal: estimates of the gradient."""
