"""Products summed as the FP4 tensor cores of Blackwell sum them, on any device.

    group g    fl(sum of 64 products), the sum exact: elements 64 g to 64 g + 63 of the contraction
    acc        RZ(acc + group g), g ascending from acc = 0; RZ rounds towards zero
    y          global scales, bias and one cast, as in every product

The definition leaves the order and the rounding of a sum open, and each backend has its own. What
a card does was probed by others: this order and this rounding reproduce the output of native NVFP4
products (arXiv 2609.02846, docs/numerics.md). Rounding towards zero shrinks long sums a little and
always in one direction, which an average over steps does not remove, so whoever wants to know on a
laptop what a B200 will compute names this backend:

    nvfp4.matmul(a, b, backend="tensor_core")        nvfp4.convert(model, backend="tensor_core")

It only multiplies; quantising is left to the others. Native kernels take 3 to 4 times as long as
the product in float32 (AVX-512, 1024^3 and 2048^3), and PyTorch does the rest in float64. "auto"
never chooses it.
"""

from __future__ import annotations

import torch

from nvfp4.backends.base import Backend
from nvfp4.backends.native.products import product_in_groups
from nvfp4.backends.reference import apply_globals
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer

GROUP = 64
"""Elements of the contraction that are summed before anything is rounded: four blocks."""


class TensorCoreBackend(Backend):
    """The sums of FP4 tensor cores, emulated.

    isa: as for ``CpuBackend`` (tests force each).
    """

    name = "tensor_core"
    operations = ("matmul", "grouped_matmul")
    scope = "it only multiplies"

    def __init__(self, isa: str = "") -> None:
        self.isa = isa

    def unavailable(self, device: torch.device) -> str | None:
        """Why not: a device that has no float64."""
        return "mps has no float64" if device.type == "mps" else None

    def automatic(self, device: torch.device) -> bool:
        """Never: it is an instrument, slower than what it imitates."""
        return False

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """NotImplementedError: it only multiplies."""
        raise NotImplementedError("the tensor_core backend only multiplies")

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> torch.Tensor:
        """NotImplementedError, as ``quantize``."""
        raise NotImplementedError("the tensor_core backend only multiplies")

    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A native kernel on processors that have one, else ``sum_in_groups``: the same bits."""
        if a.device.type == "cpu":
            y = product_in_groups(a, b, out_dtype, bias, self.isa)
            if y is not None:
                return y
        return apply_globals(
            sum_in_groups(a.decode_blocks(), b.decode_blocks()), a, b, out_dtype, bias
        )


def sum_in_groups(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T [M, N] in float32, of decoded operands [M, Kp] and [N, Kp] without global scales.

    A product is a multiple of 2^-20 below 2^23, so the sum of a group fits into float64 exactly, in
    any order.
    """
    acc = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for left, right in zip(a.split(GROUP, dim=1), b.split(GROUP, dim=1), strict=True):
        group = left.to(torch.float64) @ right.to(torch.float64).t()
        acc = add_towards_zero(acc, group.to(torch.float32))
    return acc


def add_towards_zero(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b of float32 tensors, rounded towards zero; finite, and far from overflow."""
    total = a + b

    # what the nearest sum lacks, exactly; where that points back to zero, it is one step too far
    of_b = total - a
    lacks = (a - (total - of_b)) + (b - of_b)
    too_far = (lacks != 0) & ((lacks < 0) != (total < 0))
    return torch.where(too_far, (total.view(torch.int32) - 1).view(torch.float32), total)
