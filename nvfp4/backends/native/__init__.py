"""The compiled backends: C++ for processors, CUDA C++ for GPUs.

The arithmetic is in ``csrc/*.h``, the same headers for both; here are the two backends over it and
what they share. Python makes the empty result and hands over pointers, sizes and small numbers;
C++ checks them, and fills it. One build serves every version of torch.
"""
