// Block scales as the tensor cores read them; the twin of nvfp4/numerics/layout.py.
//
// A tile of 128 rows by 4 scale columns is 512 contiguous bytes: 32 lines of 16 bytes, in each of
// which lie the four scales of rows r, r + 32, r + 64 and r + 96. Tiles follow each other along the
// columns.
#pragma once

#include "lanes.h"

NVFP4_BEGIN

// Byte offset of the scale at (row, column) of a matrix with ``columns`` scale columns (cuBLAS, 1D
// block scaling layout).
template <class Index = int64_t>
NVFP4_FN Index swizzled_offset(Index row, Index column, Index columns) {
    const Index tile = row / 128 * ((columns + 3) / 4) + column / 4;
    return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + column % 4;
}

NVFP4_END
