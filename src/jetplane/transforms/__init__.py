"""Internal: derivatives of functions of tensors."""
