"""Backends for places without a GPU.

    stand_in        the CPU's kernels under a GPU backend's name, right or wrong on demand
    launch_nothing  Triton for a card that is not there: it compiles, and launches nothing

With the first a rehearsal runs every line of a unit and sees faults reported; its figures say
nothing of speed. With the second ``plan.py`` learns how long compiling takes; its results are what
memory held.
"""

from __future__ import annotations

from typing import Any

import torch

from nvfp4.backends.base import Backend, Operation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer

SHARED_MEMORY = 232448
REGISTERS = 65536
"""Of an H100's multiprocessor: CUDA C++ Programming Guide, table of compute capabilities, 9.0."""


def stand_in(real: Backend, name: str, operations: tuple[Operation, ...], wrong: bool) -> Backend:
    """``real`` under another name, with these operations.

    wrong: the first code of each result is another, and each product is one more.
    """

    class StandIn(type(real)):  # type: ignore[misc]
        def unavailable(self, device: torch.device) -> str | None:
            return None

        def automatic(self, device: torch.device) -> bool:
            return True

        def refuses(
            self,
            operation: Operation,
            quantizer: Quantizer | None = None,
            options: Options | None = None,
        ) -> str | None:
            if operation not in operations:
                return f"{name} does not {operation}"
            return real.refuses(operation, quantizer, options)

        def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
            if "quantize" not in operations:
                raise NotImplementedError(f"{name} only multiplies")
            q = super().quantize(x, quantizer, options)
            if wrong:
                q.codes.view(-1)[:1] ^= 1
            return q

        def matmul(self, *operands: Any, **more: Any) -> torch.Tensor:
            if "matmul" not in operations:
                raise NotImplementedError(f"{name} has no GEMM")
            y = super().matmul(*operands, **more)
            return y + 1 if wrong else y

    backend = StandIn()
    backend.name, backend.operations = name, operations
    return backend


class NoDriver:
    """Triton's driver for a card that is not there: it loads and launches nothing.

    launched: how often it was asked to.
    """

    def __init__(self, capability: int, multiprocessors: int) -> None:
        self.capability, self.multiprocessors = capability, multiprocessors
        self.utils, self.launcher_cls = self, self.launcher
        self.loaded = self.launched = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        sizes = {"max_shared_mem": SHARED_MEMORY, "max_num_regs": REGISTERS, "warpSize": 32}
        return sizes | {"multiprocessor_count": self.multiprocessors}

    def load_binary(self, *binary: Any) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return self.loaded, self.loaded, 32, 0, 1024

    def unload_module(self, *module: Any) -> None:
        pass

    def launcher(self, source: Any, metadata: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any) -> None:
        self.launched += 1

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def launch_nothing(capability: int, multiprocessors: int) -> NoDriver:
    """Let the Triton backend compile for that card on this machine.

    What it returns is whatever memory held.
    """
    import triton

    from nvfp4.backends import registry
    from nvfp4.backends.triton import backend, operands
    from nvfp4.backends.triton.gemm import launch as gemm

    driver = NoDriver(capability, multiprocessors)
    triton.runtime.driver.set_active(driver)
    kind = gemm.family(capability)
    gemm._device = lambda device, native=True: (kind, multiprocessors)
    backend.tensor_cores = gemm.tensor_cores = lambda device: kind
    operands.card_converts = lambda device: operands.converts(capability)

    def here(device: torch.device) -> str | None:
        return None

    registry.BACKENDS["triton"].unavailable = here  # type: ignore[method-assign]
    return driver


def compile_nothing(driver: NoDriver) -> None:
    """Neither does Triton compile, from now on: what the host does per launch is all that is left.

    Kernels are kept and launched as compiled ones are, and self-checks, which would find nothing
    right, are passed.
    """
    import triton
    from triton.compiler import CompiledKernel

    from nvfp4.backends import registry

    class Uncompiled(CompiledKernel):
        """What launching needs of a kernel, and a module that is never unloaded."""

        def __init__(self, source: Any, target: Any = None, options: Any = None) -> None:
            self.src, self.module, self.function = source, driver, 1
            self.name, self.packed_metadata, self._run = source.name, None, driver.launch

        def __del__(self) -> None:
            pass

    triton.compiler.compile = Uncompiled
    registry.find_fault = lambda *question: None  # type: ignore[assignment]
