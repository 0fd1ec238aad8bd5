"""Products of two quantised matrices.

    launch     which tile, and the launch
    kernels    the product, by FP4 tensor cores or by FP16 ones on codes decoded in registers
    decoded    large products without FP4: decoded in memory once, for the vendor's GEMM

Start with ``kernels.py``.
"""
