"""RMSNorm and SwiGLU, quantised without being written."""
