"""Examples that are tested and measured."""
