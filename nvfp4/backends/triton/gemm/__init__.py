"""Products of two quantised matrices."""
