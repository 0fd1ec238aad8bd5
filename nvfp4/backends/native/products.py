"""The extension of native CPU kernels, and its products of two quantised matrices.

    multiply            float32 sums in an order of the kernel's own
    product_in_groups   summed as FP4 tensor cores do

Products need AVX2, FMA and F16C, or AVX-512; which of them this process may use, ``products`` says.
"""

from __future__ import annotations

import torch

from nvfp4.backends.native.extension import ELEMENTS, code_matrix, contiguous, load
from nvfp4.numerics.qtensor import QTensor

native, MISSING = load("nvfp4._cpu", "native", "a C++17 compiler on PATH")


def products() -> tuple[str, ...]:
    """The instruction sets of native products that this process may use, the fastest first.

    avx512bf16 multiplies codes alone.
    """
    return () if native is None else tuple(native.product_sets())


PAIRS = "avx512bf16"
"""The product for codes alone: one instruction multiplies and adds pairs of BF16."""


def float_product(isa: str = "") -> str | None:
    """The fastest product on float32 panels, or that of an instruction set; None: there is none."""
    return next((name for name in products() if name != PAIRS and isa in ("", name)), None)


def multiply(
    a: QTensor,
    b: QTensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    kernel: str,
    in_groups: bool = False,
) -> torch.Tensor:
    """The product of codes by one of ``products``; neither operand may be empty."""
    assert native is not None
    a, b = contiguous(a), contiguous(b)
    out = torch.empty(a.codes.shape[0], b.codes.shape[0], dtype=out_dtype, device="cpu")
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    native.matmul(
        code_matrix(native, a),
        code_matrix(native, b),
        0 if bias is None else bias.data_ptr(),
        ELEMENTS[out_dtype],
        out.data_ptr(),
        torch.get_num_threads(),
        kernel,
        in_groups,
    )
    return out


def product_in_groups(
    a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None, isa: str = ""
) -> torch.Tensor | None:
    """a b^T + bias [M, N], summed as FP4 tensor cores do (``backends/tensor_core.py``).

    isa: as for ``CpuBackend``. None where there is no kernel for it, or nothing to multiply.
    """
    kernel = float_product(isa)
    if kernel is None or a.codes.numel() == 0 or b.codes.numel() == 0:
        return None
    return multiply(a, b, out_dtype, bias, kernel, in_groups=True)
