"""Kernels that quantise, and decode what was quantised.

    policy     what a kernel is compiled for, and the tile that suits it: no Triton
    launch     which kernels run, in which order
    kernels    what runs: a tile comes in, is quantised, goes out
    tiles      how it comes in, is rotated, goes out
    rules      the quantisers themselves, on blocks of a tile

Start with ``kernels.py``.
"""
