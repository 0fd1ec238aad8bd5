// Sixteen lanes: the words of lanes.h for vectors. GCC and clang vector extensions, so the same source becomes AVX-512,
// AVX2, SSE2 or NEON by compiler flags; a few words have an AVX-512 spelling where the generic one compiles badly.
#pragma once

#include <cmath>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

NVFP4_BEGIN

constexpr int kLanes = 16;

typedef float Float __attribute__((vector_size(64)));
typedef uint32_t Word __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));

template <>
struct Lanes<Float> {
    using Int = Word;
};

template <>
NVFP4_FN Float splat<Float>(float x) {
    return Float{} + x;
}

NVFP4_FN Word bits(Float x) { return (Word)x; }
NVFP4_FN Float from_bits(Word b) { return (Float)b; }
NVFP4_FN Float select(Mask m, Float a, Float b) { return m ? a : b; }
NVFP4_FN Word select(Mask m, Word a, Word b) { return m ? a : b; }
NVFP4_FN Float magnitude(Float x) { return (Float)((Word)x & 0x7fffffffu); }
NVFP4_FN Float to_float(Word n) { return __builtin_convertvector((Mask)n, Float); }
NVFP4_FN Word truncate(Float x) { return (Word) __builtin_convertvector(x, Mask); }

#if defined(__AVX512F__)
NVFP4_FN Float smaller(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
NVFP4_FN Float larger(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
NVFP4_FN Word larger_bits(Word a, Word b) { return (Word)_mm512_max_epu32((__m512i)a, (__m512i)b); }
NVFP4_FN Word select_bits(uint32_t mask, Word a, Word b) {
    return (Word)_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), (__m512i)a, (__m512i)b, 0xca);
}
NVFP4_FN Float with_sign(Float magnitude, Float x) { return from_bits(select_bits(0x80000000u, bits(x), bits(magnitude))); }
NVFP4_FN Float clamp_magnitude(Float x, float limit) { return (Float)_mm512_range_ps((__m512)x, _mm512_set1_ps(limit), 2); }
NVFP4_FN Float less_product(Float c, Float a, Float b) { return (Float)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// One look-up by the integer part, negative ones from the end.
NVFP4_FN Float by_magnitude(Float x, float low, float middle, float high) {
    const Float table = {low,  low,  middle, middle, high, high,   high,   high,
                         high, high, high,   high,   high, middle, middle, low};
    return (Float)_mm512_permutexvar_ps(_mm512_cvttps_epi32((__m512)x), (__m512)table);
}
#else
NVFP4_FN Float smaller(Float a, Float b) { return a < b ? a : b; }
NVFP4_FN Float larger(Float a, Float b) { return a > b ? a : b; }
NVFP4_FN Word larger_bits(Word a, Word b) { return a > b ? a : b; }
NVFP4_FN Word select_bits(uint32_t mask, Word a, Word b) { return (a & mask) | (b & ~mask); }
NVFP4_FN Float with_sign(Float magnitude, Float x) { return from_bits((bits(magnitude) & 0x7fffffffu) | (bits(x) & 0x80000000u)); }
NVFP4_FN Float clamp_magnitude(Float x, float limit) { return with_sign(smaller(magnitude(x), Float{} + limit), x); }
NVFP4_FN Float less_product(Float c, Float a, Float b) { return c - a * b; }
NVFP4_FN Float by_magnitude(Float x, float low, float middle, float high) {
    const Float a = magnitude(x);
    return select(a < 2.0f, Float{} + low, select(a < 4.0f, Float{} + middle, Float{} + high));
}
#endif
NVFP4_FN Word rotate_left(Word x, int n) { return x << n | x >> (32 - n); }

// Sixteen 32-bit numbers as Philox wants them. With AVX-512 each has a 64-bit lane, even and odd lanes apart, so that the
// wide product needs no shuffles; what lies above its low 32 bits is never looked at.
#if defined(__AVX512F__)
struct Counters {
    __m512i even, odd;
    Word words() const { return (Word)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)); }
};

template <>
NVFP4_FN Counters same<Counters>(uint32_t x) {
    const __m512i all = _mm512_set1_epi64(x);
    return {all, all};
}

NVFP4_FN Counters exclusive_or(Counters a, Counters b, uint32_t c) {
    const __m512i all = _mm512_set1_epi64(c);
    return {_mm512_ternarylogic_epi64(a.even, b.even, all, 0x96), _mm512_ternarylogic_epi64(a.odd, b.odd, all, 0x96)};
}

NVFP4_FN void multiply_wide(Counters a, uint32_t b, Counters& high, Counters& low) {
    const __m512i factor = _mm512_set1_epi64(b);
    low = {_mm512_mul_epu32(a.even, factor), _mm512_mul_epu32(a.odd, factor)};
    high = {_mm512_srli_epi64(low.even, 32), _mm512_srli_epi64(low.odd, 32)};
}

// first + lane * stride, as its low and high 32 bits.
NVFP4_FN void lane_counters(uint64_t first, uint64_t stride, Counters& low, Counters& high) {
    const __m512i start = _mm512_set1_epi64(static_cast<long long>(first)), step = _mm512_set1_epi64(static_cast<long long>(stride));
    low = {_mm512_add_epi64(start, _mm512_mullo_epi64(_mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), step)),
           _mm512_add_epi64(start, _mm512_mullo_epi64(_mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), step))};
    high = {_mm512_srli_epi64(low.even, 32), _mm512_srli_epi64(low.odd, 32)};
}
#else
struct Counters {
    uint32_t lane[kLanes];
    Word words() const {
        Word w;
        memcpy(&w, lane, sizeof w);
        return w;
    }
};

template <>
NVFP4_FN Counters same<Counters>(uint32_t x) {
    Counters c;
    for (int i = 0; i < kLanes; ++i) c.lane[i] = x;
    return c;
}

NVFP4_FN Counters exclusive_or(const Counters& a, const Counters& b, uint32_t c) {
    Counters x;
    for (int i = 0; i < kLanes; ++i) x.lane[i] = a.lane[i] ^ b.lane[i] ^ c;
    return x;
}

NVFP4_FN void multiply_wide(const Counters& a, uint32_t b, Counters& high, Counters& low) {
    for (int i = 0; i < kLanes; ++i) multiply_wide(a.lane[i], b, high.lane[i], low.lane[i]);
}

NVFP4_FN void lane_counters(uint64_t first, uint64_t stride, Counters& low, Counters& high) {
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t index = first + static_cast<uint64_t>(i) * stride;
        low.lane[i] = static_cast<uint32_t>(index);
        high.lane[i] = static_cast<uint32_t>(index >> 32);
    }
}
#endif

NVFP4_FN Float load(const float* p) {
    Float x;
    memcpy(&x, p, sizeof x);
    return x;
}
NVFP4_FN void store(void* p, Float x) { memcpy(p, &x, sizeof x); }
NVFP4_FN void store(void* p, Word x) { memcpy(p, &x, sizeof x); }

// Largest of the lanes, in every lane. As bits, so that NaN is larger than anything.
NVFP4_FN uint32_t lane_max_bits(Float x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epu32((__m512i)x);
#else
    uint32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = larger_bits(largest, bits(static_cast<float>(x[i])));
    return largest;
#endif
}

// rows[i] lane j <-> rows[j] lane i.
template <class V>
NVFP4_FN void transpose(V (&rows)[kLanes]) {
#if defined(__AVX512F__)
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
        const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        rows[c] = (V)_mm512_shuffle_i32x4(low, low2, 0x88);
        rows[4 + c] = (V)_mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[8 + c] = (V)_mm512_shuffle_i32x4(high, high2, 0x88);
        rows[12 + c] = (V)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
#else
    for (int i = 0; i < kLanes; ++i)
        for (int j = i + 1; j < kLanes; ++j) {
            const auto t = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = t;
        }
#endif
}

NVFP4_END
