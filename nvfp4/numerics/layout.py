"""Block scales in the order the tensor cores read them: tiles of 128 rows by 4 scale columns, 512
bytes each.

Source: cuBLAS documentation, "1D block scaling factors layout", and the PTX ISA, tcgen05
scale-factor layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE_ROWS = 128
TILE_COLUMNS = 4
_TILE_BYTES = TILE_ROWS * TILE_COLUMNS


def swizzled_offset(row: int, column: int, columns: int) -> int:
    """Byte offset of the scale at (row, column) of a matrix with ``columns`` scale columns."""
    tile = row // TILE_ROWS * -(-columns // TILE_COLUMNS) + column // TILE_COLUMNS
    return tile * _TILE_BYTES + row % 32 * 16 + row % TILE_ROWS // 32 * 4 + column % TILE_COLUMNS


def swizzled_bytes(rows: int, columns: int) -> int:
    """Bytes that the swizzled scales of a matrix [rows, columns] of them take."""
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS) * _TILE_BYTES


def swizzle(block_scale: torch.Tensor) -> torch.Tensor:
    """Row-major scale bytes [R, C] to swizzled bytes [512 * ceil(R/128) * ceil(C/4)]; padding bytes
    are 0."""
    rows, columns = block_scale.shape
    padded = F.pad(block_scale, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.view(-(-rows // TILE_ROWS), 4, 32, -(-columns // TILE_COLUMNS), TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)
