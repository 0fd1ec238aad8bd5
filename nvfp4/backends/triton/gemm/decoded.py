"""The GEMM of large operands on GPUs without FP4: decoded once to BF16, for the vendor's GEMM.

    codes a, b  ->  BF16 [M, Kp], [N, Kp], exact  ->  cuBLAS, sums in float32
    one pass    16-bit y [M, N]: cuBLASLt scales the sums by fl(a_global b_global), adds the bias
                and rounds (``cublaslt.py``)
    two passes  y in float32, then fl(fl(y a_global) b_global) + bias, one cast: for float32
                results, scales per row, a bias of another dtype, and where cuBLASLt may not

``gemm`` decodes an element as often as a tile of the product needs it. Beyond some size decoding
once and moving 2 bytes per element is cheaper; ``pays`` says from when, by counts of instructions:
on an H100 cubes from 2,600 up in one pass, from 4,200 up in two. The price is memory for the
duration: 2 bytes per element of the operands, in two passes 4 per element of the product.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import INTERPRETED
from nvfp4.backends.triton.gemm.launch import TYPES
from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.quantize.tiles import load_global, positions
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.qtensor import QTensor


class Decoding(NamedTuple):
    """What decoding in registers costs on a kind of tensor cores, and what the vendor's GEMM does.

    issue: cycles of a scheduler that the instructions of one step of the contraction take, for the
    largest of ``TILES``, counted in its machine code. tensor: cycles of its products at the peak.
    rate: FLOP/s of the vendor's GEMM; share: of the peak; bandwidth: bytes/s, of an H100 (wgmma)
    and an A100 (mma). These three are estimates, as nothing here was timed on a GPU.
    """

    issue: float
    tensor: float
    rate: float
    share: float
    bandwidth: float

    @property
    def loss(self) -> float:
        """What decoding in registers takes more than the vendor's GEMM, as a share of that.

        A program waits for its products a few instructions after it asked for them; another one on
        the multiprocessor may decode meanwhile. Half of the products are taken to be hidden so:
        between 0.1 (all of them) and 0.8 (none) on an H100.
        """
        return (self.issue / ISSUE_SHARE + self.tensor / 2) / (self.tensor / self.share) - 1


ISSUE_SHARE = 0.9
"""Of a scheduler's cycles that instructions fill, as in ``bench/devices.py``."""

DECODING = {
    # 350 instructions per thread in a step of 128x128x64, two warps per scheduler; of mma's 1386
    # there is one
    "wgmma": Decoding(700, 512, 700e12, 0.71, 2.8e12),
    "mma": Decoding(1386, 1024, 250e12, 0.8, 1.7e12),
}
"""The kinds that decode; FP4's do not."""

LAUNCHES = 3
"""More than ``gemm`` has: two decode, and one multiplies the scales, or applies them."""

LAUNCH = 3e-6
"""Seconds of one, as in ``bench/devices.py``."""

TILE = (32, 128, 4)
"""Rows, columns and warps of a program of ``scale_kernel``."""


def pays(rows: int, columns: int, contraction: int, kind: str, one_pass: bool) -> bool:
    """Whether decoding first takes less time than decoding in registers loses.

    kind: of tensor cores; False for kinds that ``DECODING`` does not list, such as FP4's. Decoding
    reads 0.56 bytes and writes 2 per element of both operands; unless ``one_pass``, 8 more are
    moved per element of the product, whose scales are applied apart.
    """
    if kind not in DECODING:
        return False
    card = DECODING[kind]
    moved = 2.56 * contraction * (rows + columns) + (0 if one_pass else 8 * rows * columns)
    lost = card.loss * 2 * rows * columns * contraction / card.rate
    return moved / card.bandwidth + LAUNCHES * LAUNCH < lost


def in_one_pass(a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None) -> bool:
    """Whether cuBLASLt could apply scales and bias of this product: one each, a coarse result."""
    scaled_alike = not a.row_scaled and not b.row_scaled and out_dtype != torch.float32
    return scaled_alike and (bias is None or bias.dtype == out_dtype)


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
    """out = fl(fl(y a_global) b_global) + bias of y [rows, columns], with one cast.

    a_global [1] or, with A_ROWS, [rows]; b_global likewise of columns; bias [columns] or None. One
    program per tile [R, C].
    """
    column_tiles = (columns + C - 1) // C
    row = positions(tl.program_id(0) // column_tiles, R)
    column = positions(tl.program_id(0) % column_tiles, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]

    # in the order of the definition, each rounded to float32
    values = tl.load(y + at, mask=inside, other=0.0) * load_global(a_global, row, rows, A_ROWS)
    values = values * tl.trans(load_global(b_global, column, columns, B_ROWS))
    if bias is not None:
        values += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def scaled(
    y: torch.Tensor, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """What follows the contraction y, float32 [a.rows, b.rows]: global scales, bias, one cast.

    a, b: the operands, for their global scales.
    """
    height, width, warps = TILE

    # the interpreter's casts to BF16 truncate: under it the kernel writes float32, torch casts
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
    """What to compile for a card: every output with and without bias and row scales; few: one."""
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
