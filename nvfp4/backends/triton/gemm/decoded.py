"""The GEMM of large operands on GPUs without FP4: both are decoded once to BF16, exactly, for the
vendor's GEMM."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import INTERPRETED
from nvfp4.backends.triton.gemm.launch import TYPES
from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.quantize.tiles import load_global, positions
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.qtensor import QTensor

BALANCE = {"wgmma": 250, "mma": 150}
"""BF16 operations that cuBLAS makes in the time of a byte of memory: 700 TFLOP/s and 2.8 TB/s on an
H100, 250 TFLOP/s and 1.7 TB/s on an A100; estimates, as nothing here was timed on a GPU."""
LOSS = 0.5
"""What decoding in registers is taken to cost beside a BF16 GEMM of that shape: a quarter of the
warps fit."""
TILE = (32, 128, 4)
"""Rows, columns and warps of a program of ``scale_kernel``."""


def pays(rows: int, columns: int, contraction: int, kind: str) -> bool:
    """Whether decoding first takes less than decoding in registers loses, on this kind of tensor
    cores.

    It reads and writes 0.56 and 2 bytes an element of both operands, and moves 8 more an element of
    the product, whose scales are applied apart. On an H100 it pays for cubes from 3,300 up.
    """
    if kind not in BALANCE:
        return False
    moved = 2.56 * contraction * (rows + columns) + 8 * rows * columns
    return moved * BALANCE[kind] < LOSS * 2 * rows * columns * contraction


def contract(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right^T of BF16 in float32: products are exact, sums are float32's.

    A float32 result leaves cuBLAS nothing coarser to reduce partial sums in, whatever
    ``allow_bf16_reduced_precision_reduction`` says: that mode is about results coarser than the
    accumulator.
    """
    if left.device.type == "cuda":
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    return left.to(torch.float32) @ right.to(torch.float32).t()


@triton.jit
def scale_kernel(
    y, a_global, b_global, bias, out, rows, columns,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
) -> None:  # fmt: skip
    """out = fl(fl(y a_global) b_global) + bias of y [rows, columns], with one cast."""
    column_tiles = (columns + C - 1) // C
    row = positions(tl.program_id(0) // column_tiles, R)
    column = positions(tl.program_id(0) % column_tiles, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = tl.load(y + at, mask=inside, other=0.0) * load_global(a_global, row, rows, A_ROWS)
    values = values * tl.trans(load_global(b_global, column, columns, B_ROWS))
    if bias is not None:
        values += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def scaled(
    y: torch.Tensor, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """What follows the contraction y, float32 [a.rows, b.rows]: global scales in their order, bias,
    one cast."""
    height, width, warps = TILE
    # the interpreter's casts to BF16 truncate
    out = torch.empty(y.shape, dtype=torch.float32 if INTERPRETED else out_dtype, device=y.device)
    tensors = (
        y,
        a.global_scale.contiguous(),
        b.global_scale.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    constants = (a.row_scaled, b.row_scaled, height, width)
    programs = -(-a.rows // height) * -(-b.rows // width)
    launch(scale_kernel, programs, (*tensors, out, *y.shape), constants, warps=warps)
    return out.to(out_dtype)


def kernel_variants(capability: int, few: bool) -> list[KernelVariant]:
    """What to compile for a card: every output with and without bias and row scales; or one."""
    height, width, warps = TILE
    made = []
    for name, biased, by_row in product(TYPES.values(), (False, True), (False, True)):
        types = dict.fromkeys(("y", "a_global", "b_global"), "*fp32") | {
            "rows": "i32",
            "columns": "i32",
        }
        types["out"] = f"*{name}"
        constants: dict[str, object] = {"A_ROWS": by_row, "B_ROWS": by_row, "R": height, "C": width}
        if biased:
            types["bias"] = f"*{name}"
        else:
            constants["bias"] = None
        traits = " ".join(
            word for word, has in ((name, True), ("bias", biased), ("rows", by_row)) if has
        )
        made.append(KernelVariant(f"scale_kernel: {traits}", scale_kernel, types, constants, warps))
    return made[-1:] if few else made
