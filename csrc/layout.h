// Block scales as the tensor cores read them; the twin of nvfp4/numerics/layout.py.
#pragma once

#include "lanes.h"

NVFP4_BEGIN

// Byte offset of the scale at (row, column) of a matrix with ``columns`` scale columns (cuBLAS, 1D
// block scaling layout).
NVFP4_FN int64_t swizzled_offset(int64_t row, int64_t column, int64_t columns) {
    const int64_t tile = row / 128 * ((columns + 3) / 4) + column / 4;
    return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + column % 4;
}

NVFP4_END
