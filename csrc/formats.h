// Number formats as data; the twin of nvfp4/numerics/formats.py, held equal to it by
// tests/backends/test_native.py.
//
// A format is three numbers. A value with exponent e lies on a lattice of step
// 2^(max(e, min_exponent) - mantissa_bits), so that rounding and decoding are written once for all
// formats (rounding.h, codec.h):
//
//     E2M1   0 .5 1 1.5 2 3 4 6 and signs, an element of four bits
//     E4M3   127 values from 0 to 448, a block scale; its sign is never set, and code 127 is NaN
#pragma once

#include "lanes.h"

NVFP4_BEGIN

struct E2M1 {
    static constexpr int mantissa_bits = 1;
    static constexpr int min_exponent = 0;
    static constexpr float max = 6.0f;
    static constexpr unsigned code_mask = 7;  // of the magnitude
};

struct E4M3 {
    static constexpr int mantissa_bits = 3;
    static constexpr int min_exponent = -6;
    static constexpr float max = 448.0f;
    static constexpr unsigned code_mask = 127;
    static constexpr unsigned largest_code = 126;  // 127 is NaN
};

// E2M1 values by code, sign in bit 3: what a table look-up in registers needs spelt out.
constexpr float kSignedGrid[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                   -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

// Elements under one block scale.
constexpr int kBlock = 16;

// Largest finite float32.
constexpr float kFloatMax = 3.4028234663852886e38f;

// The block scale of a tensor's largest element, where a rule may try larger ones: six codes above
// 256 is 448.
constexpr float kSearchCap = 256.0f;

// |x| of a float32 that is not finite has bits at or above the first; the second is the NaN that
// results have.
constexpr unsigned kInfinityBits = 0x7f800000u;
constexpr unsigned kNanBits = 0x7fc00000u;

// How many blocks, tiles, pieces of ``unit`` hold n; neither is negative.
NVFP4_FN constexpr int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

NVFP4_END
