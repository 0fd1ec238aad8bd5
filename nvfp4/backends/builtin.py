"""The backends of this package, fastest first: they enter ``registry.BACKENDS`` in this order.

    scaled_mm   GEMMs on Blackwell, through cuBLASLt
    cuda        quantises on Hopper and Blackwell
    triton      everything, on NVIDIA GPUs from sm_80
    cpu         everything, on processors
    tensor_core products summed as FP4 tensor cores do, anywhere, when named
    reference   everything, anywhere

``nvfp4/__init__.py`` imports this file before any other, so nobody meets an empty table.
"""

from __future__ import annotations

from nvfp4.backends.base import Backend
from nvfp4.backends.native.cpu import CpuBackend
from nvfp4.backends.native.cuda import CudaBackend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import BACKENDS
from nvfp4.backends.scaled_mm import ScaledMmBackend
from nvfp4.backends.tensor_core import TensorCoreBackend
from nvfp4.backends.triton.backend import TritonBackend

BUILTIN: tuple[Backend, ...] = (
    ScaledMmBackend(),
    CudaBackend(),
    TritonBackend(),
    CpuBackend(),
    TensorCoreBackend(),
    ReferenceBackend(),
)

BACKENDS.update({backend.name: backend for backend in BUILTIN})
