"""Block scales in the order in which the tensor cores read them.

    scales [R, C], one byte each  ->  tiles of 128 rows x 4 columns, 512 bytes per tile, row-major
    in a tile                     ->  32 lines of 16 bytes: line r mod 32 holds rows r, r + 32,
                                      r + 64 and r + 96, each with its 4 columns

Rows are filled up to 128 and columns to 4, with zeros. cuBLASLt (``scaled_mm``) and tcgen05 read
this order. Kernels that quantise write it on the way where a GEMM will read it; ``swizzle`` makes
it from scales that lie row by row.

Source: cuBLAS documentation, "1D block scaling factors layout", and the PTX ISA, tcgen05
scale-factor layout.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

TILE_ROWS = 128
TILE_COLUMNS = 4
_TILE_BYTES = TILE_ROWS * TILE_COLUMNS

SWIZZLED_MAJORS = (10, 12)
"""Major compute capabilities on which cuBLASLt has an NVFP4 GEMM, which reads swizzled scales."""


@lru_cache(maxsize=64)
def reads_swizzled(device: torch.device) -> bool:
    """Whether GEMMs on this device read swizzled scales, which a quantiser then writes as well."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in SWIZZLED_MAJORS


def swizzled_offset(row: int, column: int, columns: int) -> int:
    """Byte offset of the scale at (row, column) of a matrix with ``columns`` scale columns."""
    tile = row // TILE_ROWS * -(-columns // TILE_COLUMNS) + column // TILE_COLUMNS
    return tile * _TILE_BYTES + row % 32 * 16 + row % TILE_ROWS // 32 * 4 + column % TILE_COLUMNS


def swizzled_bytes(rows: int, columns: int) -> int:
    """Bytes that the swizzled scales of a matrix [rows, columns] of them take."""
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS) * _TILE_BYTES


def swizzle(block_scale: torch.Tensor) -> torch.Tensor:
    """Row-major scale bytes [R, C] to swizzled bytes [512 * ceil(R/128) * ceil(C/4)].

    Padding bytes are 0.
    """
    rows, columns = block_scale.shape
    padded = F.pad(block_scale, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))

    # row = (tile, 4 quarters, 32 lines), column = (tile, 4): lines first, then quarters
    tiles = padded.view(-(-rows // TILE_ROWS), 4, 32, -(-columns // TILE_COLUMNS), TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)
