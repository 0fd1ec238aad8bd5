"""What people run on a checkout: reports of ahead-of-time compilers, mutants, coverage.

    make aot        aot.py           every Triton kernel for every card, compiled here
    make cuda       cuda_build.py    every CUDA kernel likewise
    make mutants    mutants.py       does a test find each of these faults?
    make coverage   covered.py       which lines and branches do the tests reach?
    make roofline   instructions.py  what kernels issue per element, which the roofline reads

Not in the wheel: no user of the package needs them. The rest serves these: ``quantize_variants``
and ``activation_variants`` list kernels for ``aot`` and ``instructions``, ``machine_code`` looks
for faults in what compilers made, ``sass`` counts it.
"""
