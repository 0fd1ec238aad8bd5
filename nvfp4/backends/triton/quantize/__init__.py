"""Kernels that quantise, and decode what was quantised."""
