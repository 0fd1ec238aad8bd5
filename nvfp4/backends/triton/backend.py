"""The Triton backend: one family of kernels for every NVIDIA GPU, with the reference's bits.

    quantize, requantize, both orientations   quantize/      two launches; for both three with
    ms_eden,
                                                             four with its search
    an activation straight into codes         activation/    RMSNorm or SwiGLU is never written
    products                                  gemm/          FP4 tensor cores, or 16-bit ones on
                                                             operands decoded in registers or before
    transposes of 16x16 codes                 transpose.py   one launch
    seeds of a layer's call                   quantize/      one launch
    the end of a call with held amaxes        held.py        one launch

This file says which case goes where: empty matrices, rotated codes and other ranks go to the
reference's definition, everything else is launched. Nothing here waits for the device, so all of it
can be captured in a CUDA graph; launches go to the current stream.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, to be tested and debugged, and only
when the backend is named. No kernel here has run on a GPU yet: the interpreter gives the
reference's bits, and compilers say that all of them build for eight cards without a spill.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nvfp4.backends.base import Backend
from nvfp4.backends.cublaslt import BLAS_LT
from nvfp4.backends.reference import reference_matmul
from nvfp4.backends.triton.quantize.policy import RULES
from nvfp4.numerics.activations import Activation
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer

try:
    from triton import next_power_of_2

    from nvfp4.backends.triton.activation import launch as activations
    from nvfp4.backends.triton.arithmetic import INTERPRETED
    from nvfp4.backends.triton.gemm.decoded import DECODING, contract, in_one_pass, pays, scaled
    from nvfp4.backends.triton.gemm.launch import gemm, tensor_cores
    from nvfp4.backends.triton.held import turn
    from nvfp4.backends.triton.launch import compile_together, launch, on
    from nvfp4.backends.triton.operands import Source, Target, coded_as, two_targets
    from nvfp4.backends.triton.quantize import kernels
    from nvfp4.backends.triton.quantize import launch as quantizing
    from nvfp4.backends.triton.transpose import transpose

    _MISSING = None
except ImportError as error:
    _MISSING = f"triton does not load: {error}; install triton>=3.6"
    INTERPRETED = False


OLDEST_MAJOR = 8
"""Compute capability 8.0: the first with BF16 in its tensor cores."""


class TritonBackend(Backend):
    """Quantises and decodes without FP8 or FP4 hardware; multiplies in FP4 where there is some."""

    name = "triton"
    quantizers = RULES.keys()
    decodes = (torch.float32, torch.bfloat16, torch.float16)

    def unavailable(self, device: torch.device) -> str | None:
        """Why not: Triton does not load, there is no NVIDIA GPU, or x is on another device."""
        if _MISSING is not None:
            return _MISSING
        if device.type == "cpu" and INTERPRETED:
            return None
        if device.type == "cpu":
            return "it runs on cuda, and on the cpu only under TRITON_INTERPRET=1"
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "there is no NVIDIA GPU that torch can use"

        # without BF16, and none that anything here was compiled for
        major, minor = torch.cuda.get_device_capability(device)
        if major < OLDEST_MAJOR:
            return f"it runs from sm_{OLDEST_MAJOR}0 on, this GPU is sm_{major}{minor}"
        return None

    def automatic(self, device: torch.device) -> bool:
        """Not under TRITON_INTERPRET=1, where kernels run on the CPU and only when named."""
        return not INTERPRETED

    def prepare(self, run: Callable[[], object]) -> None:
        """Compile the kernels that ``run`` launches, on several cores at a time."""
        compile_together(run)

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """Two launches: amax and quantise, for ms_eden quantise and finish; by a held amax one."""
        if x.numel() == 0:
            return quantizer.quantize(x, options)
        target = Target(tuple(x.shape), quantizer, options, x.device)
        return quantizing.quantize(Source.dense(x), None, target)

    def quantize_with_amax(
        self, x: torch.Tensor, quantizer: Quantizer, options: Options, amax: torch.Tensor
    ) -> QTensor:
        """As ``quantize`` without the launch that looks for the amax."""
        target = Target(tuple(x.shape), quantizer, options, x.device, amax=amax)
        return quantizing.quantize(Source.dense(x), None, target)

    def quantize_both(
        self, x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
    ) -> tuple[QTensor, QTensor]:
        """x read once per launch for both; a search takes one launch per orientation."""
        # a search is bound by arithmetic, not by reading x: launches with tiles of their own
        if x.numel() == 0 or rows[1].search or columns[1].search:
            return super().quantize_both(x, rows, columns)
        return quantizing.quantize_both(x, *two_targets(x, rows, columns))

    def quantize_activation(
        self,
        activation: Activation,
        rows: tuple[Quantizer, Options],
        columns: tuple[Quantizer, Options] | None = None,
    ) -> tuple[QTensor, QTensor | None]:
        """RMSNorm or SwiGLU straight into codes; the activation is never written."""
        x = activation[0]
        if x.numel() == 0:
            return super().quantize_activation(activation, rows, columns)

        # activation kernels write no swizzled scales, also where they make one orientation alone
        if columns is None:
            across, down = Target(tuple(x.shape), *rows, x.device, single=False), None
        else:
            across, down = two_targets(x, rows, columns)
        with on(x.device):
            activations.fill(activation, across, down)
            return across.finish(), None if down is None else down.finish()

    def activation_gradients(
        self, activation: Activation, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernels of their own, which sum in the order of the reference."""
        if dy.numel() == 0:
            return super().activation_gradients(activation, dy)
        with on(dy.device):
            return activations.gradients(activation, dy)

    def requantize(self, q: QTensor, quantizer: Quantizer, options: Options) -> QTensor:
        """From the codes of a matrix as they lie; rotated or empty ones are decoded first."""
        if q.rotation is not None or q.codes.numel() == 0 or len(q.shape) != 2:
            return super().requantize(q, quantizer, options)
        target = Target((q.contraction, q.rows), quantizer, options, q.device)
        return quantizing.quantize(Source.transposed_codes(q), coded_as(q), target)

    def transpose(self, q: QTensor) -> QTensor:
        """One launch for unrotated 16x16 tiles; the rest, and its errors, are the base's."""
        has_one = q.block == TILE_BLOCK and q.rotation is None and len(q.shape) == 2
        if not has_one or q.codes.numel() == 0:
            return super().transpose(q)
        with on(q.device):
            return transpose(q)

    def draw_seeds(self, words: torch.Tensor, rank: int, gemms: int) -> torch.Tensor:
        """One launch; the seeds stay on the device, so a CUDA graph finds new ones."""
        seeds = torch.empty(gemms, 3, dtype=torch.int64, device=words.device)
        constants = (gemms, next_power_of_2(gemms))
        with on(words.device):
            launch(kernels.seeds_kernel, 1, (words, seeds, rank), constants, warps=1)
        return seeds

    def turn_amax(self, table: torch.Tensor) -> None:
        """One launch."""
        with on(table.device):
            turn(table)

    def decode(
        self, q: QTensor, columns: int, dtype: torch.dtype, with_global: bool
    ) -> torch.Tensor:
        """[M, columns] in ``dtype``, one launch."""
        return quantizing.decode(q, columns, dtype, with_global)

    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """By ``gemm``, or decoded in memory first where ``gemm.decoded.pays`` says so."""
        left, right = a.codes, b.codes
        if left.numel() == 0 or right.numel() == 0:
            return reference_matmul(a.decode_blocks(), b.decode_blocks(), a, b, out_dtype, bias)

        # large operands on a card without FP4: decoded once, for the vendor's GEMM
        kind = tensor_cores(left.device)
        one_pass = (
            kind in DECODING and in_one_pass(a, b, out_dtype, bias) and BLAS_LT.usable(a.device)
        )
        if pays(left.shape[0], right.shape[0], left.shape[1] * 2, kind, one_pass):
            return self.matmul_decoded(a, b, out_dtype, bias)
        return gemm(a, b, out_dtype, bias)

    def matmul_decoded(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``matmul`` of operands decoded in memory.

        Takes 2 bytes per element of them and, in two passes, 4 per element of the product for its
        duration;
        ``gemm`` decodes in registers, as often as a tile of the product needs an element.
        """
        with on(a.device):
            left, right = self.decode_blocks(a), self.decode_blocks(b)
            if in_one_pass(a, b, out_dtype, bias):
                alpha = a.global_scale * b.global_scale
                y = BLAS_LT.product_or_none(left, right, alpha, bias, out_dtype)
                if y is not None:
                    return y
            return scaled(contract(left, right), a, b, out_dtype, bias)
