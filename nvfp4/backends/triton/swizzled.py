"""Block scales in the order of the tensor cores, in one launch, where no quantiser wrote them so.

    scales [ceil(R/tile), C], one byte each  ->  512 ceil(R/128) ceil(C/4) bytes, see ``layout.py``

A kernel that quantises one orientation writes this order on the way. What came out of a kernel for
both, was turned (``transpose.py``), or was kept for the backward has its scales row by row alone;
in PyTorch to spread a tile's scale over its rows, fill up and permute are three copies. Here a
program makes 128 rows and stores every byte, those that fill up as zeros, so nothing is cleared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvfp4.backends.triton.launch import launch, on
from nvfp4.backends.triton.operands import programs
from nvfp4.backends.triton.quantize.tiles import positions, swizzled_offset
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.layout import TILE_COLUMNS, TILE_ROWS, swizzled_bytes
from nvfp4.numerics.qtensor import QTensor

TILE = (TILE_ROWS, 8 * TILE_COLUMNS, 4)
"""Rows and columns of scales, and warps, of a program: eight tiles of the layout, 4 KB."""

QUARTERS = tl.constexpr(TILE_COLUMNS)


@triton.jit
def swizzle_kernel(
    block_scale, swizzled, rows, row_blocks, TALL: tl.constexpr, R: tl.constexpr, C: tl.constexpr
) -> None:  # fmt: skip
    """Scales [ceil(rows/TALL), row_blocks] into the layout of [rows, row_blocks].

    One program per tile [R, C]. TALL: rows that share a scale, 1 or 16. R: 128, so that what fills
    up is stored as well.
    """
    padded = (row_blocks + QUARTERS - 1) // QUARTERS * QUARTERS
    column_tiles = (padded + C - 1) // C
    row = positions(tl.program_id(0) // column_tiles, R)
    block = positions(tl.program_id(0) % column_tiles, C)

    # zeros beyond the matrix, and nothing beyond the layout
    inside = (row < rows)[:, None] & (block < row_blocks)[None, :]
    places = block_scale + (row // TALL)[:, None] * row_blocks + block[None, :]
    scales = tl.load(places, mask=inside, other=0)
    everywhere = (row >= 0)[:, None] & (block < padded)[None, :]
    tl.store(swizzled + swizzled_offset(row, block, row_blocks), scales, mask=everywhere)


def swizzled_scale(q: QTensor) -> torch.Tensor:
    """The block scales of a matrix that is not empty, one per row and block, swizzled; uint8."""
    block_scale = q.block_scale.contiguous()
    row_blocks = block_scale.shape[1]
    made = torch.empty(swizzled_bytes(q.rows, row_blocks), dtype=torch.uint8, device=q.device)
    height, width, warps = TILE
    arguments = (block_scale, made, q.rows, row_blocks)
    with on(q.device):
        count = programs((q.rows, row_blocks), TILE)
        launch(swizzle_kernel, count, arguments, (q.block[0], height, width), warps=warps)
    return made


def kernel_variants(capability: int, few: bool) -> list[KernelVariant]:
    """What to compile for a card: scales of rows and of 16x16 blocks."""
    height, width, warps = TILE
    types = {"block_scale": "*u8", "swizzled": "*u8", "rows": "i32", "row_blocks": "i32"}
    return [
        KernelVariant(
            f"swizzle_kernel: {tall}x16",
            swizzle_kernel,
            types,
            {"TALL": tall, "R": height, "C": width},
            warps,
        )
        for tall in ((1,) if few else (1, NVFP4.block_size))
    ]
