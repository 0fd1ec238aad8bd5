"""The compiled backends: C++ for processors, CUDA C++ for GPUs."""
