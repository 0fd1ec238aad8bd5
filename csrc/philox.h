// Philox4x32-10 (Salmon et al., SC 2011): random words as a function of (seed, index, stream) and
// of nothing else; the twin of nvfp4/numerics/rng.py.
//
// The counter is (index low, index high, stream, 0), the key is the seed. Four words come of it,
// eight draws of 16 bits: draw n of a stream is in counter n / 8, in word n % 8 / 2, its low half
// first.
#pragma once

#include "lanes.h"

NVFP4_BEGIN

enum Stream : uint32_t {
    kSignStream = 0,
    kElementStream = 1,
    kBlockScaleStream = 2,
    kFoldStream = 3
};

// Four words of the counter (index_low, index_high, stream, 0); U is uint32_t or many of them
// (Counters in cpu/simd.h).
template <class U>
NVFP4_FN void philox(uint64_t seed, U index_low, U index_high, uint32_t stream, U word[4]) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    U c0 = index_low, c1 = index_high, c2 = same<U>(stream), c3 = same<U>(0u);
    for (int round = 0; round < 10; ++round) {
        U high0, low0, high1, low1;
        multiply_wide(c0, 0xD2511F53u, high0, low0);
        multiply_wide(c2, 0xCD9E8D57u, high1, low1);
        c0 = exclusive_or(high1, c1, k0);
        c1 = low1;
        c2 = exclusive_or(high0, c3, k1);
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}

// u = (k + 1/2) / 2^16 of 16 random bits k: never 0 or 1, mean exactly 1/2. ``placed`` is k << 7,
// under the exponent of 1: 1 + k / 2^16 is exact there, and so is the difference.
template <class F>
NVFP4_FN F centred_uniform(Int<F> placed) {
    return from_bits((placed & 0x7fff80u) | 0x3f800000u) - (1.0f - 0x1p-17f);
}

// The two of a word: of its low half, then of its high half.
template <class F>
NVFP4_FN void centred_uniforms(Int<F> word, F& first, F& second) {
    first = centred_uniform<F>(word << 7);
    second = centred_uniform<F>(word >> 9);
}

NVFP4_END
