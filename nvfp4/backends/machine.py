"""What this machine can do: versions, devices, and each backend with the reason why not.

``nvfp4 info`` prints it, and a report of a bug should begin with it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch

from nvfp4.backends.native.cpu import dense_product_name, instruction_sets, products
from nvfp4.backends.native.cuda import CudaBackend
from nvfp4.backends.registry import BACKENDS


def info() -> str:
    """One fact per line: versions, processor, devices, and each backend with "yes" or why not."""
    # versions
    devices = [torch.device("cpu")]
    facts = {name: _version(name) for name in ("nvfp4", "torch", "triton", "transformers")}
    facts["python"] = platform.python_version()

    # the processor, and what multiplies on it
    facts["cpu"] = (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )
    facts["kernels on cpu"] = next(iter(instruction_sets()), "none were built")
    facts["nvfp4 product on cpu"] = next(
        iter(products()), "torch's float32 one, of decoded operands"
    )
    facts["bf16 product on cpu"] = dense_product_name(torch.bfloat16)

    # GPUs, and what kernels there are for them
    facts["cuda"] = str(torch.version.cuda or "this torch was built without it")
    kernels = BACKENDS["cuda"]
    if isinstance(kernels, CudaBackend):
        facts["cuda kernels"] = kernels.built()
    facts["nvcc"] = shutil.which("nvcc") or "not on PATH"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts[f"cuda:{i}"] = (
                f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
            )
            devices.append(torch.device("cuda", i))

    # who can run where
    for device in devices:
        for name, backend in BACKENDS.items():
            facts[f"backend {name} on {device}"] = backend.unavailable(device) or "yes"

    width = max(map(len, facts))
    return "\n".join(f"{key:{width}}  {value}" for key, value in facts.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(info())
