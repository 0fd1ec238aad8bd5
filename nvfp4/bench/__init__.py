"""``nvfp4 bench``: measuring from an installed package, shared with ``benchmarks/``."""
