"""The reference backend: the mathematics of ``quantizers/`` in PyTorch, on any device.

    quantize    ``Quantizer.quantize``, the definition itself
    matmul      both operands decoded without their global scales, float32 [rows, Kp]; a float32
                GEMM; then fl(fl(acc * global_a) * global_b), bias, one cast

The GEMM is an exact emulation of FP4 tensor cores: e2m1 * e4m3 needs 6 significant bits, so the
product of two decoded elements is exact in float32 (by TF32 or BF16 tensor cores, too), and results
differ from the FP4 GEMM's in the order and the rounding of the sum alone (docs/numerics.md). The
price is memory and speed: 4 bytes per element of both operands while it runs.
"""

from __future__ import annotations

import torch

from nvfp4.backends.base import Backend
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer


class ReferenceBackend(Backend):
    """Defines the right answer; refuses nothing, and is chosen last."""

    name = "reference"

    def unavailable(self, device: torch.device) -> str | None:
        """None: it runs wherever PyTorch does."""
        return None

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """``Quantizer.quantize``, which defines codes and scales."""
        return quantizer.quantize(x, options)

    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A float32 product of the decoded operands, then the global scales."""
        return reference_matmul(a.decode_blocks(), b.decode_blocks(), a, b, out_dtype, bias)


def reference_matmul(
    a_blocks: torch.Tensor,
    b_blocks: torch.Tensor,
    a: QTensor,
    b: QTensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The GEMM of operands that are decoded without their global scales, float32 [rows, Kp] each.

    a, b: the operands themselves, for those scales.
    """
    return apply_globals(a_blocks @ b_blocks.t(), a, b, out_dtype, bias)


def apply_globals(
    y: torch.Tensor, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """What follows the contraction y (float32, overwritten): global scales, bias, one cast."""
    y = y.mul_(a.global_scale.view(-1, 1)).mul_(b.global_scale)
    if bias is not None:
        y = y.add_(bias)
    return y.to(out_dtype)
