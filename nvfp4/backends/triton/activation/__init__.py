"""RMSNorm and SwiGLU, quantised without being written.

    launch        which kernels run, on which tiles
    kernels       the amax, the codes, and the gradients
    arithmetic    the two formulas on tiles; the rest is ``quantize/``

Start with ``kernels.py``.
"""
