// The CUDA kernels as a large BF16 operand runs them, for tools/cuda_counts.py to count.
//
// A kernel serves many operands, and a reader of its machine code cannot tell which branch a launch
// takes. So each is compiled here once more, inlined into an entry that says what is known of the
// launch: BF16, whole tiles, blocks of 1x16, one scale per tensor, the rotation's group of 128, seeds
// as numbers, and on cards that read swizzled scales (NVFP4_SWIZZLED) that they are wanted. Nothing
// else differs, and nothing here is ever launched.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#pragma push_macro("__global__")
#pragma push_macro("__launch_bounds__")
#undef __global__
#undef __launch_bounds__
#define __global__ static __device__ __forceinline__
#define __launch_bounds__(...)
#include "../csrc/cuda/eden128.cu"
#include "../csrc/cuda/scales.cu"
#pragma pop_macro("__global__")
#pragma pop_macro("__launch_bounds__")

using namespace nvfp4;
using namespace nvfp4::cuda;

namespace {

NVFP4_DEVICE void assume(Operand& operand, int rounds) {
    operand.group = rounds ? 128 : 0;
    operand.rounds = rounds;
    operand.fixed = operand.row_scaled = operand.tiles = false;
    operand.seed.at = operand.sign_seed.at = nullptr;
#if defined(NVFP4_SWIZZLED)
    __builtin_assume(operand.swizzled != nullptr);
#else
    operand.swizzled = nullptr;
#endif
}

template <int height>
NVFP4_DEVICE void assume(Matrix& m) {
    m.element = Element::bfloat16;
    m.aligned = true;
    const Corner corner = corner_of<height>(m);
    __builtin_assume(corner.row + height <= m.rows);
    __builtin_assume(corner.column + kTile <= m.columns);
}

}  // namespace

#define ENTRY(name, resident, ...) \
    extern "C" __global__ void __launch_bounds__(kThreads, resident) name(__VA_ARGS__)

#define ROWS(name, Rule)                                   \
    ENTRY(name, 3, Rows m, Operand operand) {              \
        assume(operand, 0);                                \
        rows_kernel<uint16_t, Rule<RowScope>>(m, operand); \
    }

#define TILES(name, Rows, Columns)                                                     \
    ENTRY(name, (kResident<Rows, Columns>), Matrix m, Operand rows, Operand columns) { \
        assume<kTileRows<Rows, Columns>>(m);                                           \
        assume(rows, 0);                                                               \
        assume(columns, 0);                                                            \
        quantize_kernel<uint16_t, Rows, Columns>(m, rows, columns);                    \
    }

#define EDEN(name, rounds, wants_rows, wants_columns)                        \
    ENTRY(name, 2, Matrix m, Operand rows, Operand columns) {                \
        assume<kTile>(m);                                                    \
        assume(rows, rounds);                                                \
        assume(columns, rounds);                                             \
        eden128_kernel<rounds, wants_rows, wants_columns>(m, rows, columns); \
    }

using NearestLines = Scaled<Nearest, false>;

ROWS(rtn, Nearest)
ROWS(sr, Up)
ROWS(sr_te, Clipped)
ROWS(four_over_six, Squares)
TILES(rtn_columns, None, NearestLines)
TILES(rtn_both, NearestLines, NearestLines)
EDEN(ms_eden_1, 1, true, false)
EDEN(ms_eden_2, 2, true, false)
EDEN(ms_eden_1_columns, 1, false, true)
EDEN(ms_eden_1_both, 1, true, true)

ENTRY(amax, 1, const Chunk* data, int64_t count, uint32_t* first) {
    flat_amax_kernel<uint16_t>(data, count, first, nullptr);
}

ENTRY(finish, 1, Operand operand, uint32_t eights, uint32_t across, Divider by_across) {
    assume(operand, 1);
    finish_eights_kernel(operand, eights, across, by_across);
}
