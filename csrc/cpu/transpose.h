// Squares of kLanes vectors, turned in registers: lane j of rows[i] <-> lane i of rows[j].
//
// AVX-512 and AVX2 take log2(kLanes) rounds of shuffles: of neighbouring numbers, of pairs, and of
// 128-bit parts. They decide how fast a row-major matrix becomes lanes, and codes become lines
// again.
#pragma once

#include "simd.h"

NVFP4_BEGIN

#if defined(__AVX512F__)

template <class V>
NVFP4_FN void transpose(V (&rows)[kLanes]) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = (__m512i)rows[i];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }

    // a[4q + c], 128-bit part p: rows 4q .. 4q+3 of column 4p + c
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        rows[c] = (V)_mm512_shuffle_i32x4(low, low2, 0x88);
        rows[4 + c] = (V)_mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[8 + c] = (V)_mm512_shuffle_i32x4(high, high2, 0x88);
        rows[12 + c] = (V)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

#elif defined(__AVX2__)

template <class V>
NVFP4_FN void transpose(V (&rows)[kLanes]) {
    __m256i a[8], b[8];
    // halves of rows i and i + 4 side by side: what crosses the middle does so once, and from
    // memory costs no shuffle
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm256_permute2x128_si256((__m256i)rows[i], (__m256i)rows[i + 4], 0x20);
        a[i + 4] = _mm256_permute2x128_si256((__m256i)rows[i], (__m256i)rows[i + 4], 0x31);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        b[i + 2] = _mm256_unpacklo_epi32(a[i + 2], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi32(a[i + 2], a[i + 3]);
        rows[i] = (V)_mm256_unpacklo_epi64(b[i], b[i + 2]);
        rows[i + 1] = (V)_mm256_unpackhi_epi64(b[i], b[i + 2]);
        rows[i + 2] = (V)_mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        rows[i + 3] = (V)_mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
}

#else

#if defined(__clang__)
#define NVFP4_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define NVFP4_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Mask{i, j, k, l})
#endif

template <class V>
NVFP4_FN void transpose(V (&rows)[kLanes]) {
    const V a = NVFP4_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
    const V b = NVFP4_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
    const V c = NVFP4_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
    const V d = NVFP4_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = NVFP4_SHUFFLE(a, b, 0, 1, 4, 5);
    rows[1] = NVFP4_SHUFFLE(a, b, 2, 3, 6, 7);
    rows[2] = NVFP4_SHUFFLE(c, d, 0, 1, 4, 5);
    rows[3] = NVFP4_SHUFFLE(c, d, 2, 3, 6, 7);
}

#endif

// The q-th square of a row of vectors.
template <class V>
NVFP4_FN auto square(V* rows, int q) -> V (&)[kLanes] {
    return *reinterpret_cast<V(*)[kLanes]>(rows + q * kLanes);
}

NVFP4_END
