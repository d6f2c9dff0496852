"""Internal: tensors with derivatives, and their calculus."""
