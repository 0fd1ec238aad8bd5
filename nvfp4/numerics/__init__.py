"""What a number is: formats, rounding, scales, rotation, random bits. Knows no backend.

    x [..., K]   rotation (hadamard), if a recipe wants one
                 blocks and their maxima -> scales (scaling)
                 elements over their scale -> the grid of a format (rounding, with bits of rng)
                 grid values -> codes and bytes (codec)
                 all of it in one record (qtensor), scales in the tensor cores' order too (layout)

Each file is plain PyTorch on any device and says one thing once. ``csrc/`` and the Triton kernels
say it again in their languages, and tests hold every twin to equal bits; ``docs/numerics.md`` is
the definition in words. Start with ``formats.py``: the rest is derived from its two formats.
``activations.py`` (RMSNorm, SwiGLU) and ``torch_state.py`` serve the rooms above.
"""
