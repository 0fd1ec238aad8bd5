"""The CUDA backend: C++ kernels for Hopper and Blackwell, equal to the reference to the last bit.

It quantises and decodes; products are left to ``scaled_mm`` and Triton. The kernels
(``csrc/cuda/``) work over raw memory and share their arithmetic with the CPU's. For the pairs of
rules in ``fused.cu`` one kernel reads a gradient for both of its orientations (and one before it
for the amax, if a rule wants one), others take two; a forward operand is quantised again from its
codes, and on Blackwell the block scales are written once more in the order in which its tensor
cores read them.

Nothing here waits for the device, so everything can be captured in a CUDA graph; launches go to the
current stream. A seed is a number, or the address of one on the device. No kernel here has run on a
GPU yet: a host driver has run them whole on the CPU, bit for bit. If the extension was not built,
this backend says why.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import ModuleType

import torch

from nvfp4.backends.base import Backend, Operation
from nvfp4.backends.native.extension import (
    ELEMENTS,
    RULES,
    code_matrix,
    contiguous,
    load,
    rule_numbers,
)
from nvfp4.numerics.formats import NVFP4, TILE_BLOCK
from nvfp4.numerics.layout import reads_swizzled, swizzled_bytes
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed, Seed
from nvfp4.quantizers.base import Options, Quantizer

_native, _MISSING = load("nvfp4._cuda", "CUDA", "nvcc on PATH and NVFP4_CUDA=1")


class CudaBackend(Backend):
    """The CUDA kernels as a backend.

    native: the extension module, or one that runs the same kernels on the processor (tests).
    """

    name = "cuda"
    operations = ("quantize", "dequantize")
    scope = "it quantises and decodes alone"
    quantizers = RULES.keys()
    decodes = tuple(ELEMENTS)

    def __init__(self, native: ModuleType | None = _native) -> None:
        self.native = native

    def unavailable(self, device: torch.device) -> str | None:
        """Why not: another device, no extension, no GPU, or one that it was not built for."""
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if self.native is None:
            return _MISSING
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "there is no NVIDIA GPU that torch can use"

        # a kernel of another architecture may do nothing, without any error
        major, minor = torch.cuda.get_device_capability(device)
        if 100 * major + 10 * minor not in self.native.architectures():
            return f"{self.built()}, this GPU is sm_{major}{minor}"
        return None

    def built(self) -> str:
        """What the extension was built for, or why there is none; needs no GPU."""
        if self.native is None:
            return str(_MISSING)
        return (
            "it was built for "
            f"{', '.join(f'sm_{number // 10}' for number in self.native.architectures())}"
        )

    def refuses(
        self,
        operation: Operation,
        quantizer: Quantizer | None = None,
        options: Options | None = None,
    ) -> str | None:
        """Also rotations in groups beyond 16 of 16x16 blocks, which would leave their tile."""
        reason = super().refuses(operation, quantizer, options)
        if reason is not None:
            return reason

        # a block of 16x16 is rotated within itself or not at all
        if options is not None and options.block == TILE_BLOCK and options.rotation is not None:
            group = options.rotation.group
            if group > NVFP4.block_size:
                return f"it has no kernel that rotates 16x16 blocks in groups of {group}"
        return None

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """On the current stream of x's device; nothing waits for it. Empty x: the reference's."""
        if x.numel() == 0:
            return quantizer.quantize(x, options)
        target = _Target(self._module, tuple(x.shape), quantizer, options, x.device)
        return self._quantize(x, target)

    def quantize_with_amax(
        self, x: torch.Tensor, quantizer: Quantizer, options: Options, amax: torch.Tensor
    ) -> QTensor:
        """``quantize`` scaled by ``amax``, without a copy of x; as in ``Backend``."""
        return self._quantize(
            x, _Target(self._module, tuple(x.shape), quantizer, options, x.device, amax=amax)
        )

    def quantize_both(
        self, x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
    ) -> tuple[QTensor, QTensor]:
        """One call for both orientations, x or x^T first, whichever has contiguous rows."""
        if x.numel() == 0:
            return super().quantize_both(x, rows, columns)
        across = _Target(self._module, tuple(x.shape), *rows, x.device)
        down = _Target(self._module, tuple(x.t().shape), *columns, x.device)

        # the kernels want contiguous rows; of a matrix without, x and x^T change places
        matrix, transposed, _kept = self._matrix(x)
        first, second = (down, across) if transposed else (across, down)
        with _on(x.device) as place:
            self._module.quantize_both(matrix, first.operand, second.operand, *place)
        return across.q, down.q

    def requantize(self, q: QTensor, quantizer: Quantizer, options: Options) -> QTensor:
        """From the codes of a matrix as they lie; rotated or empty ones are decoded first."""
        if q.rotation is not None or q.codes.numel() == 0 or len(q.shape) != 2:
            return super().requantize(q, quantizer, options)
        target = _Target(self._module, (q.contraction, q.rows), quantizer, options, q.device)
        q = contiguous(q)
        matrix = self._module.Matrix(code_matrix(self._module, q), q.contraction)
        with _on(q.device) as place:
            self._module.quantize(matrix, target.operand, True, *place)
        return target.q

    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """NotImplementedError: it has no GEMM, and is never chosen for one."""
        raise NotImplementedError(
            "the CUDA backend has no GEMM: registry.select never chooses it for one"
        )

    @property
    def _module(self) -> ModuleType:
        assert self.native is not None
        return self.native

    def _quantize(self, x: torch.Tensor, target: _Target) -> QTensor:
        matrix, transposed, _kept = self._matrix(x)
        with _on(x.device) as place:
            self._module.quantize(matrix, target.operand, transposed, *place)
        return target.q

    def _matrix(self, x: torch.Tensor) -> tuple[object, bool, torch.Tensor]:
        """(what the kernels are told, whether that is x^T, what has to live on) of matrix x.

        Of x and x^T the one whose rows are contiguous; a copy if neither's are.
        """
        transposed = x.stride(0) == 1 and x.shape[0] > 1 and x.stride(1) != 1
        y = x.t() if transposed else x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        return (
            self._module.Matrix(y.data_ptr(), ELEMENTS[y.dtype], *y.shape, y.stride(0)),
            transposed,
            y,
        )

    def decode(
        self, q: QTensor, columns: int, dtype: torch.dtype, with_global: bool
    ) -> torch.Tensor:
        """[M, columns] in ``dtype``, on the current stream of q's device."""
        q = contiguous(q)
        out = torch.empty(q.rows, columns, dtype=dtype, device=q.device)
        with _on(q.device) as place:
            self._module.decode(
                code_matrix(self._module, q, with_global),
                columns,
                ELEMENTS[dtype],
                out.data_ptr(),
                *place,
            )
        return out


class _Target:
    """The result that a kernel fills, what it is told of it, and its scratch memory.

    All of it has to outlive the launch.
    """

    def __init__(
        self,
        native: ModuleType,
        shape: tuple[int, ...],
        quantizer: Quantizer,
        options: Options,
        device: torch.device,
        *,
        amax: torch.Tensor | None = None,
    ) -> None:
        self.q = QTensor.empty(shape, options.block, options.row_scaled, options.rotation, device)
        scales = self.q.block_scale.shape

        # the amax, which a kernel finds unless it is known; lengths of blocks, for ms_eden
        if amax is None:
            self.peak = torch.empty(self.q.global_scale.shape, dtype=torch.float32, device=device)
        else:
            self.peak = amax.contiguous()
        self.lengths = (
            torch.empty(scales, dtype=torch.float32, device=device) if quantizer.rotates else None
        )

        # the block scales once more, for the GEMM that reads them so
        if reads_swizzled(device):
            size = swizzled_bytes(self.q.rows, self.q.padded_contraction // NVFP4.block_size)
            self.q = replace(
                self.q, swizzled_scale=torch.empty(size, dtype=torch.uint8, device=device)
            )

        self.operand = native.Operand(
            _options(native, quantizer, options),
            self.q.rows,
            self.q.padded_contraction,
            *(tensor.data_ptr() for tensor in self.q.tensors),
            self.peak.data_ptr(),
            amax is not None,
            0 if self.lengths is None else self.lengths.data_ptr(),
            0 if self.q.swizzled_scale is None else self.q.swizzled_scale.data_ptr(),
            options.summation == "tensor_core",
        )


def _options(native: ModuleType, quantizer: Quantizer, options: Options) -> object:
    """What the kernels are told of a method and its seeds."""
    rotation = options.rotation
    return native.Options(
        *rule_numbers(native, quantizer, options),
        0 if rotation is None else rotation.group,
        1 if rotation is None else rotation.rounds,
        rotation is not None and rotation.fixed,
        _native_seed(native, options.seed),
        _native_seed(native, None if rotation is None else rotation.sign_seed),
    )


def _native_seed(native: ModuleType, seed: Seed | None) -> object:
    """A seed as the kernels take it: a number, or where on the device it lies."""
    return (
        native.Seed(0, seed.bits.data_ptr())
        if isinstance(seed, DeviceSeed)
        else native.Seed(seed or 0, 0)
    )


Place = tuple[int, int]
"""Where kernels are launched: the number of the device, and the address of its current stream."""


def _on(device: torch.device) -> AbstractContextManager[Place]:
    """``device`` as the current one, where kernels are launched, and its current stream."""
    return _Current(device) if device.type == "cuda" else nullcontext((0, 0))


class _Current(AbstractContextManager[Place]):
    """The device as torch's current one; entering returns where to launch.

    The module makes that its own current device, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.cuda.device(device)
        self.place = self.device.idx, torch.cuda.current_stream(device).cuda_stream

    def __enter__(self) -> Place:
        self.device.__enter__()
        return self.place

    def __exit__(self, *error: object) -> None:
        self.device.__exit__(*error)
