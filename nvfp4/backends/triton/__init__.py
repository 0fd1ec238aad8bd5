"""The Triton backend: three families of kernels over one arithmetic.

    quantize/      x, or codes         -> codes and scales, in one or both orientations
    activation/    inputs of a norm    -> codes and scales of its result, which is never written
    gemm/          two sets of codes   -> their product

In each family ``kernels.py`` is what runs on the GPU, and ``launch.py`` says which tile it takes
and launches it. ``arithmetic.py`` has the rounding of all and ``noise.py`` their random bits,
``operands.py`` what kernels are told of tensors, ``launch.py`` the way to a compiled kernel,
``transpose.py`` one kernel that belongs to none of the three; ``backend.py`` says which case goes
where. Start there, then read ``quantize/kernels.py``.
"""
