// How a tile is summed where the order and the rounding of FP4 tensor cores are asked for:
//
//     group   64 products, summed exactly: float64 has room for them (below)
//     sum     fl(group), added to the sum so far with rounding towards zero
//
// The product of two decoded elements is a multiple of 2^-20 (halves, times scales of at least
// 2^-9) and at most (6 * 448)^2, so 64 of them are an integer of 2^-20 below 2^49: no sum within a
// group is rounded, whatever its order. Panels stay float32; they are widened on the way into the
// registers. docs/numerics.md, section 6, has the definition.
#pragma once

#include "matmul.h"

NVFP4_BEGIN

constexpr int kGroup = 64;

typedef double Double __attribute__((vector_size(NVFP4_VECTOR_BYTES)));   // kLanes / 2 of them
typedef float Part __attribute__((vector_size(NVFP4_VECTOR_BYTES / 2)));  // as many floats

NVFP4_FN Double widen(const float* p) {
    Part x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Double);
}

// sum + x y; the product has 49 bits and is exact, so that fusing changes nothing.
NVFP4_FN Double add_product(Double sum, Double x, Double y) {
#if defined(__AVX512F__)
    return (Double)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
#else
    return (Double)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
#endif
}

// a + b rounded towards zero.
NVFP4_FN Float add_towards_zero(Float a, Float b) {
#if defined(__AVX512F__)
    return (Float)_mm512_add_round_ps((__m512)a, (__m512)b, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
    // the nearest sum and what it lacks; where that points back to zero, the sum is one step too far
    const Float sum = a + b;
    const Float of_b = sum - a;
    const Float lacks = (a - (sum - of_b)) + (b - of_b);
    const Mask too_far = (lacks != 0.0f) & ((Mask)(bits(sum) ^ bits(lacks)) < 0);
    return from_bits(bits(sum) + (Word)too_far);
#endif
}

// As many rows at a time as leave registers for their sums, which are twice as wide.
template <int rows>
constexpr int kRowsAtOnce = kLanes == 16 ? 7 : 3;

// sums[rows][2 vectors], as ``multiply_tile``, in groups; only the last group of all may be short.
template <int rows>
NVFP4_FN void multiply_tile_in_groups(const float* a, const float* b, int64_t steps, float* sums,
                                      int64_t stride) {
    constexpr int columns = 2 * kLanes;
    constexpr int together = kRowsAtOnce<rows>;
    constexpr int parts = columns / (kLanes / 2);
    static_assert(rows % together == 0, "a tile is whole pieces");

    for (int64_t first = 0; first < steps; first += kGroup) {
        const int64_t last = std::min<int64_t>(steps, first + kGroup);

        // a is read number by number: widened once, before
        alignas(64) double wide[kGroup * rows];
        for (int64_t i = 0; i < (last - first) * rows; i += kLanes / 2) {
            const Double x = widen(a + first * rows + i);
            memcpy(wide + i, &x, sizeof x);
        }

        for (int row = 0; row < rows; row += together) {
            Double group[together][parts] = {};
            for (int64_t k = first; k < last; ++k) {
                Double y[parts];
#pragma GCC unroll 4
                for (int j = 0; j < parts; ++j) y[j] = widen(b + k * columns + j * (kLanes / 2));
#pragma GCC unroll 8
                for (int i = 0; i < together; ++i) {
                    const Double x = wide[(k - first) * rows + row + i] - Double{};
#pragma GCC unroll 4
                    for (int j = 0; j < parts; ++j) group[i][j] = add_product(group[i][j], x, y[j]);
                }
            }

            for (int i = 0; i < together; ++i) {
                float rounded[columns];
                for (int j = 0; j < parts; ++j) {
                    const Part part = __builtin_convertvector(group[i][j], Part);
                    memcpy(rounded + j * (kLanes / 2), &part, sizeof part);
                }
                float* sum = sums + (row + i) * stride;
                for (int j = 0; j < columns; j += kLanes)
                    store(sum + j, add_towards_zero(load(sum + j), load(rounded + j)));
            }
        }
    }
}

// Float32 panels, summed as tensor cores do.
struct GroupedStep : FusedStep {
    template <int rows>
    static NVFP4_FN void tile(const float* a, const float* b, int64_t steps, float* sums,
                              int64_t stride) {
        multiply_tile_in_groups<rows>(a, b, steps, sums, stride);
    }
};

NVFP4_END
