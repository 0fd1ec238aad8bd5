// What kernels of every kind are told: formats of elements, quantised matrices, methods.
//
// Plain structs over raw pointers, filled in by the bindings, read by the CPU's kernels and copied
// to the device by CUDA's. The numbers of the enums are those of
// nvfp4/backends/native/extension.py.
#pragma once

#include <cstdint>

namespace nvfp4 {

enum class Element : int { float32 = 0, bfloat16 = 1, float16 = 2, codes = 3 };

// NVFP4 codes and decode scales of a matrix [rows, 2 * row_bytes].
struct CodeMatrix {
    const uint8_t* codes;        // [rows, row_bytes], the even column in the low nibble
    const uint8_t* block_scale;  // [rows / scale_block_rows, row_bytes / 8]
    const float* global_scale;   // [1] or [rows]; null where it is to be left out
    int64_t rows, row_bytes;
    int64_t scale_stride;      // bytes from one row of scales to the next
    int64_t scale_block_rows;  // 1, or 16 for tiles
    bool row_scaled;
};

enum class Rule : int {
    rtn = 0,
    sr = 1,
    sr_te = 2,
    four_over_six = 3,
    scale_search = 4,
    ms_eden = 5
};

// What a search tries, in the order of trial: scale_search steps from a scale byte, as floats;
// ms_eden c and fl(1 / c).
struct Trials {
    static constexpr int most = 16;
    int count;
    float value[most], inverse[most];
};

// How a matrix is quantised, but for its rotation and its seeds.
struct Method {
    Rule rule;
    int metric;       // of four_over_six: mse, mae, abs_max
    bool tiles;       // one block scale per 16x16 elements instead of per 1x16
    bool row_scaled;  // one global scale per row instead of per tensor
    bool search;      // ms_eden: the best of several factors
    Trials trials;    // of scale_search, and of ms_eden with search
};

}  // namespace nvfp4
