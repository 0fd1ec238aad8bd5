// ldmatrix and mma.sync on a processor, for tests: every lane brings its words to the warp, and
// takes from the others' what the PTX ISA says is its own.
//
// How sixteen products are added is for a test to choose, by set_tensor_core(fraction_bits,
// length):
//
//     0, 0    by butterflies in ascending stride, as the definition has it, which is possible
//             where b is +-1 in the pattern of a column of Hadamard's matrix or its negative:
//             then results are the definition's, bit for bit, whatever a is
//     25, 16  as Hopper and Blackwell were found to do it: of all terms those bits are kept that
//             are not more than 25 below the leading bit of the largest, they are added exactly,
//             and the sum is cut off to float32 (arXiv 2511.10909, 2512.07004)
//     24, 8   Ampere and Ada: eight at a time, the first sum being a term of the second
//     23, 4   Volta
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "../codec.h"
#include "simt.h"

namespace nvfp4::simt {

struct TensorCore {
    int fraction_bits = 0, length = 0;
};
inline TensorCore tensor_core;

inline float widen(uint32_t half_word, bool half) {
    return half ? from_float16<float>(half_word) : from_bits(half_word << 16);
}

// x rounded to float32 towards zero; beyond its range Inf.
inline float cut(double x) {
    if (std::fabs(x) >= 0x1p128) return std::copysign(std::numeric_limits<float>::infinity(), x);
    const float nearest = static_cast<float>(x);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f)
                                                                  : nearest;
}

// start + a[0] b[0] + ..., a[n - 1] b[n - 1]
inline float aligned_sum(float start, const float* a, const float* b, int n, int fraction_bits) {
    double term[17];
    term[n] = start;
    double special = 0;
    int top = std::numeric_limits<int>::min();
    for (int k = 0; k <= n; ++k) {
        if (k < n) term[k] = static_cast<double>(a[k]) * static_cast<double>(b[k]);
        if (!std::isfinite(term[k])) special += term[k];
        if (std::isfinite(term[k]) && term[k] != 0 && std::ilogb(term[k]) > top)
            top = std::ilogb(term[k]);
    }
    if (std::isnan(special)) return from_bits(0x7fffffffu);
    if (special != 0) return static_cast<float>(special);
    double sum = 0;
    for (int k = 0; k <= n; ++k)
        if (term[k] != 0) sum += std::trunc(std::ldexp(term[k], fraction_bits - top));
    return sum == 0 ? 0.0f : cut(std::ldexp(sum, top - fraction_bits));
}

// The same by butterflies, but for the sign of b[0].
inline float ordered_sum(const float* a, const float* b, int n) {
    if (n == 1) return a[0];
    const float low = ordered_sum(a, b, n / 2), high = ordered_sum(a + n / 2, b + n / 2, n / 2);
    return b[0] == b[n / 2] ? low + high : low - high;
}

inline float dot(const float (&a)[16], const float (&b)[16]) {
    if (tensor_core.length == 0) {
        for (int k = 0; k < 16; ++k) {
            // of Hadamard's matrix the signs of both halves are alike or opposite, at every level
            const int top = k == 0 ? 0 : 1 << std::ilogb(k);
            if (std::fabs(b[k]) != 1 || b[k] * b[0] != b[top] * b[k - top])
                throw std::logic_error("b is no column of Hadamard's matrix");
        }
        return b[0] * ordered_sum(a, b, 16);
    }
    float sum = 0;
    for (int k = 0; k < 16; k += tensor_core.length)
        sum = aligned_sum(sum, a + k, b + k, tensor_core.length, tensor_core.fraction_bits);
    return sum;
}

// Of the 8x8 matrices whose rows the lanes name, as ldmatrix.x4 deals them out.
inline void load_matrices(uint32_t (&a)[4], const uint16_t* row, bool transposed) {
    uint32_t words[4];
    memcpy(words, row, sizeof words);
    const Mail mail = gather(words, 4, transposed ? -2 : -1);
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const auto element = [&](int matrix, int r, int c) {
        return mail.word(8 * matrix + r, c / 2) >> (c % 2 * 16) & 0xffffu;
    };
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = transposed ? element(i, 2 * t, g) : element(i, g, 2 * t);
        const uint32_t high = transposed ? element(i, 2 * t + 1, g) : element(i, g, 2 * t + 1);
        a[i] = low | high << 16;
    }
}

inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool half) {
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const Mail mail = gather(words, 6, half ? -4 : -3);
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const auto element = [&](int from, int word, int k) {
        return widen(mail.word(from, word) >> (k % 2 * 16) & 0xffffu, half);
    };
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float left[16], right[16];
        for (int k = 0; k < 16; ++k) {
            left[k] = element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k);
            right[k] = element(column * 4 + k % 8 / 2, 4 + k / 8, k);
        }
        d[i] = dot(left, right);
    }
}

}  // namespace nvfp4::simt
