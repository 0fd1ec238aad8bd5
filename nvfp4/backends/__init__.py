"""Who computes: the reference, and backends that equal it to the last bit.

``ops`` asks ``registry.select`` who does an operation on a device. The registry asks each backend,
in order of preference, whether it can; has ``selfcheck`` compare it with the reference at first
use; and lets ``autotune`` time those that quantise alike on a GPU. A backend that fails is passed
over loudly.

    reference    the definition, run: PyTorch on any device
    native/      C++ for processors, CUDA C++ for Hopper and Blackwell
    triton/      one family of kernels for NVIDIA GPUs from sm_80 on
    scaled_mm    products through cuBLASLt, on Blackwell
    tensor_core  products summed as FP4 tensor cores do, to study them elsewhere

A backend sees matrices, quantisers and options (``base.py``); it knows no layer and no recipe.
"""
