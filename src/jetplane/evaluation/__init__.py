"""Internal: one evaluation of a closure on a plane."""
