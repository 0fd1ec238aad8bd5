"""Codes in 16x16 blocks with rows and columns exchanged, in one kernel.

    codes [M, Kp/2], scales [ceil(M/16), Kp/16]  ->  codes [K, Mp/2], scales [Kp/16, ceil(M/16)]

A 16x16 block has one scale, so a matrix and its transpose share codes and scales, and the weight of
dgrad need not be quantised again. Two codes lie in a byte, so the unit is a square of 2 x 2 codes:
one byte in each of two rows becomes one byte in each of two rows of the result.

    upper = b a    lower = d c    (nibbles: the high one first)
    even  = c a    odd   = d b
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.quantize.tiles import positions
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.qtensor import QTensor

TILE = (128, 128, 4)
"""Rows and columns of codes, and warps, of a program: 64 bytes at a time on both sides."""


@triton.jit
def transpose_kernel(
    codes, block_scale, codes_out, block_scale_out, rows, columns, row_bytes, R: tl.constexpr,
    C: tl.constexpr
) -> None:  # fmt: skip
    """Exchange rows and columns of codes [rows, row_bytes] and of their scales; a tile per program.

    codes_out [columns, 8 ceil(rows/16)]; the codes that fill up rows are 0.
    """
    column_tiles = (row_bytes * 2 + C - 1) // C
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    scale_rows, row_blocks = (rows + 15) // 16, row_bytes // 8

    # bytes [R/2, C/2] of the even rows, and of the odd ones
    pair, byte = positions(row_tile, R // 2), positions(column_tile, C // 2)
    source = codes + (pair * 2)[:, None] * row_bytes + byte[None, :]
    inside = (byte < row_bytes)[None, :]
    upper = tl.load(source, mask=inside & (pair * 2 < rows)[:, None], other=0)
    lower = tl.load(source + row_bytes, mask=inside & (pair * 2 + 1 < rows)[:, None], other=0)

    # a pair of rows is a byte of the result, a byte is a pair of its rows
    out_bytes = scale_rows * 8
    target = codes_out + (byte * 2)[:, None] * out_bytes + pair[None, :]
    inside = (pair < out_bytes)[None, :]
    even, odd = (upper & 15) | (lower << 4), (upper >> 4) | (lower & 240)
    tl.store(target, tl.trans(even), mask=inside & (byte * 2 < columns)[:, None])
    tl.store(target + out_bytes, tl.trans(odd), mask=inside & (byte * 2 + 1 < columns)[:, None])

    # one scale per block
    row, block = positions(row_tile, R // 16), positions(column_tile, C // 16)
    inside = (row < scale_rows)[:, None] & (block < row_blocks)[None, :]
    scales = tl.load(block_scale + row[:, None] * row_blocks + block[None, :], mask=inside, other=0)
    target = block_scale_out + block[:, None] * scale_rows + row[None, :]
    tl.store(target, tl.trans(scales), mask=tl.trans(inside))


def transpose(q: QTensor) -> QTensor:
    """``q.transpose()`` of a matrix that has one and is not empty."""
    # to [K, Mp/2]: codes of columns beyond K are cut, codes of rows beyond M are zero
    codes, block_scale = q.codes.contiguous(), q.block_scale.contiguous()
    scale_rows, row_blocks = block_scale.shape
    size = NVFP4.block_size
    turned = torch.empty(q.contraction, scale_rows * size // 2, dtype=torch.uint8, device=q.device)
    scales = torch.empty(row_blocks, scale_rows, dtype=torch.uint8, device=q.device)

    height, width, warps = TILE
    arguments = (codes, block_scale, turned, scales, q.rows, q.contraction, codes.shape[1])
    programs = -(-q.rows // height) * -(-q.padded_contraction // width)
    launch(transpose_kernel, programs, arguments, (height, width), warps=warps)
    return replace(q, codes=turned, block_scale=scales, axis=-1 - q.axis % 2, swizzled_scale=None)


def kernel_variants(capability: int, few: bool) -> list[KernelVariant]:
    """What to compile for a card: one kernel, the same for all."""
    height, width, warps = TILE
    types = dict.fromkeys(("codes", "block_scale", "codes_out", "block_scale_out"), "*u8")
    types |= dict.fromkeys(("rows", "columns", "row_bytes"), "i32")
    return [
        KernelVariant("transpose_kernel", transpose_kernel, types, {"R": height, "C": width}, warps)
    ]
