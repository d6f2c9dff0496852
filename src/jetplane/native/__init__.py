"""Code that torch cannot see: compiled functions with exact first and second derivatives."""
