"""Internal: from a plane to a step."""
