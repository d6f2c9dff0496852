"""Internal: many processes that evaluate one plane."""
