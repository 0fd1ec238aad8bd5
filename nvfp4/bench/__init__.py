"""Benchmarks that run from an installed package: ``nvfp4 bench all``, and what ``benchmarks/`` shares with it."""
