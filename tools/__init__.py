"""What people run on a checkout: reports of ahead-of-time compilers, mutants, coverage.

    make aot        aot.py           every Triton kernel for every card, compiled here
    make cuda       cuda_build.py    every CUDA kernel likewise
    make mutants    mutants.py       does a test find each of these faults?
    make coverage   covered.py       which lines and branches do the tests reach?

Not in the wheel: no user of the package needs them. ``quantize_variants`` and
``activation_variants`` list kernels for ``aot``; ``machine_code`` reads what compilers made.
"""
