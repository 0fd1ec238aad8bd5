// A vector of the machine's own width: the words of lanes.h for 16 lanes (AVX-512), 8 (AVX2) or 4
// (SSE2, NEON, anything).
//
//     Float, Word, Mask, Half    kLanes floats, 32-bit words, results of compares, 16-bit words
//     Long, Counters             64-bit words, in which Philox multiplies
//
// GCC's and clang's vector extensions say most of it, so the same source becomes any instruction
// set by compiler flags. Wider vectors than the machine's would not do: GCC takes every compare,
// choice and transpose of them apart, element by element, which made AVX2 ten times slower than
// AVX-512. Words that the extensions compile badly are spelt out, once per width, in the middle of
// this file.
//
// Compares follow x86: of a NaN and a number, ``smaller`` and ``larger`` give the second argument.
#pragma once

#include <cmath>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define NVFP4_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NVFP4_VECTOR_BYTES 32
#else
#define NVFP4_VECTOR_BYTES 16
#endif

NVFP4_BEGIN

constexpr int kLanes = NVFP4_VECTOR_BYTES / 4;

typedef float Float __attribute__((vector_size(NVFP4_VECTOR_BYTES)));
typedef uint32_t Word __attribute__((vector_size(NVFP4_VECTOR_BYTES)));
// -1 or 0, what a compare gives
typedef int32_t Mask __attribute__((vector_size(NVFP4_VECTOR_BYTES)));
typedef uint64_t Long __attribute__((vector_size(NVFP4_VECTOR_BYTES)));      // kLanes / 2 of them
typedef uint16_t Half __attribute__((vector_size(NVFP4_VECTOR_BYTES / 2)));  // kLanes of them

template <>
struct Lanes<Float> {
    using Int = Word;
};

template <>
NVFP4_FN Float splat<Float>(float x) {
    return x - Float{};  // not Float{} + x, an addition that -0 does not survive
}
template <>
NVFP4_FN Word same<Word>(uint32_t x) {
    return Word{} + x;
}

NVFP4_FN Word bits(Float x) { return (Word)x; }
NVFP4_FN Float from_bits(Word b) { return (Float)b; }
NVFP4_FN Float select(Mask m, Float a, Float b) { return m ? a : b; }
NVFP4_FN Word select(Mask m, Word a, Word b) { return m ? a : b; }
NVFP4_FN Float magnitude(Float x) { return (Float)((Word)x & 0x7fffffffu); }
NVFP4_FN Float to_float(Word n) { return __builtin_convertvector((Mask)n, Float); }
NVFP4_FN Word truncate(Float x) { return (Word) __builtin_convertvector(x, Mask); }
NVFP4_FN Word rotate_left(Word x, int n) { return x << n | x >> (32 - n); }

NVFP4_FN Float load(const float* p) {
    Float x;
    memcpy(&x, p, sizeof x);
    return x;
}
NVFP4_FN Word load(const uint32_t* p) {
    Word x;
    memcpy(&x, p, sizeof x);
    return x;
}
NVFP4_FN void store(void* p, Float x) { memcpy(p, &x, sizeof x); }
NVFP4_FN void store(void* p, Word x) { memcpy(p, &x, sizeof x); }

// kLanes 16-bit numbers, zero-extended, and back.
NVFP4_FN Word widen(const uint16_t* p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Word);
}
NVFP4_FN void store_halves(uint16_t* p, Word x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
    const Half h = __builtin_convertvector(x, Half);
    memcpy(p, &h, sizeof h);
#endif
}

#if defined(__AVX512F__)

NVFP4_FN Float smaller(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
NVFP4_FN Float larger(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
NVFP4_FN Word larger_bits(Word a, Word b) { return (Word)_mm512_max_epu32((__m512i)a, (__m512i)b); }
NVFP4_FN Word select_bits(uint32_t mask, Word a, Word b) {
    return (Word)_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), (__m512i)a,
                                           (__m512i)b, 0xca);
}
NVFP4_FN Float smaller_magnitude(Float x, float limit) {
    return (Float)_mm512_range_ps((__m512)x, _mm512_set1_ps(limit), 10);
}
NVFP4_FN Float less_product(Float c, Float a, Float b) {
    return (Float)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// One look-up by the integer part.
NVFP4_FN Float by_magnitude(Float x, float low, float middle, float high) {
    const Float table = {low, low, middle, middle, high, high, high, high,
                         low, low, middle, middle, high, high, high, high};
    return (Float)_mm512_permutexvar_ps(_mm512_cvttps_epi32((__m512)x), (__m512)table);
}

// Largest of the lanes, compared as bits, so that NaN is larger than anything.
NVFP4_FN uint32_t lane_max_bits(Float x) { return _mm512_reduce_max_epu32((__m512i)x); }

NVFP4_FN Long multiply_low(Long a, uint32_t b) {
    return (Long)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
NVFP4_FN Long exclusive_or(Long a, Long b, Long c) {
    return (Long)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}

#else

#if defined(__AVX2__)

NVFP4_FN Float smaller(Float a, Float b) { return (Float)_mm256_min_ps((__m256)a, (__m256)b); }
NVFP4_FN Float larger(Float a, Float b) { return (Float)_mm256_max_ps((__m256)a, (__m256)b); }
NVFP4_FN Word larger_bits(Word a, Word b) { return (Word)_mm256_max_epu32((__m256i)a, (__m256i)b); }
NVFP4_FN Float less_product(Float c, Float a, Float b) {
    return (Float)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// One look-up by the integer part.
NVFP4_FN Float by_magnitude(Float x, float low, float middle, float high) {
    const Float table = {low, low, middle, middle, high, high, high, high};
    return (Float)_mm256_permutevar8x32_ps((__m256)table, _mm256_cvttps_epi32((__m256)x));
}

NVFP4_FN Long multiply_low(Long a, uint32_t b) {
    return (Long)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}

#else  // four lanes

#if defined(__SSE2__)
NVFP4_FN Float smaller(Float a, Float b) { return (Float)_mm_min_ps((__m128)a, (__m128)b); }
NVFP4_FN Float larger(Float a, Float b) { return (Float)_mm_max_ps((__m128)a, (__m128)b); }
NVFP4_FN Long multiply_low(Long a, uint32_t b) {
    return (Long)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
}
#else
NVFP4_FN Float smaller(Float a, Float b) { return a < b ? a : b; }
NVFP4_FN Float larger(Float a, Float b) { return a > b ? a : b; }
#if defined(__ARM_NEON)
NVFP4_FN Long multiply_low(Long a, uint32_t b) {
    return (Long)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
}
#else
NVFP4_FN Long multiply_low(Long a, uint32_t b) { return (a & 0xffffffffu) * b; }
#endif
#endif
NVFP4_FN Word larger_bits(Word a, Word b) { return a > b ? a : b; }
NVFP4_FN Float less_product(Float c, Float a, Float b) { return c - a * b; }

NVFP4_FN Float by_magnitude(Float x, float low, float middle, float high) {
    const Word from_two = (Word)(x >= 2.0f) & (bits(low) ^ bits(middle));
    const Word from_four = (Word)(x >= 4.0f) & (bits(middle) ^ bits(high));
    return from_bits(bits(low) ^ from_two ^ from_four);
}

#endif

NVFP4_FN Word select_bits(uint32_t mask, Word a, Word b) { return (a & mask) | (b & ~mask); }
NVFP4_FN Float smaller_magnitude(Float x, float limit) {
    return smaller(magnitude(x), splat<Float>(limit));
}

// put_code of quantizers.h without a select by bits: codes are shifted in from the top, so that
// none has to be masked; the bit above a code is zero, and takes the sign.
NVFP4_FN Word put_code(Word word, Word sign, Word code, int) {
    return word >> 4 | code << 28 | (sign & 0x80000000u);
}
NVFP4_FN Word finish_codes(Word word) { return word; }

NVFP4_FN uint32_t lane_max_bits(Float x) {
    uint32_t lane[kLanes], largest = 0;
    store(lane, x);
    for (int i = 0; i < kLanes; ++i) largest = larger_bits(largest, lane[i]);
    return largest;
}

NVFP4_FN Long exclusive_or(Long a, Long b, Long c) { return a ^ b ^ c; }

#endif

// kLanes 32-bit numbers as Philox wants them: each has a 64-bit lane, even and odd numbers apart,
// so that the wide product needs no shuffles. What lies above the low 32 bits is never looked at.
struct Counters {
    Long even, odd;
    Word words() const {
#if defined(__AVX512F__)
        return (Word)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, (__m512i)(odd << 32));
#elif defined(__AVX2__)
        return (Word)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
        return (Word)((even & 0xffffffffu) | odd << 32);
#endif
    }
};

template <>
NVFP4_FN Counters same<Counters>(uint32_t x) {
    const Long all = Long{} + x;
    return {all, all};
}

NVFP4_FN Counters exclusive_or(const Counters& a, const Counters& b, uint32_t c) {
    const Long all = Long{} + c;
    return {exclusive_or(a.even, b.even, all), exclusive_or(a.odd, b.odd, all)};
}

NVFP4_FN void multiply_wide(const Counters& a, uint32_t b, Counters& high, Counters& low) {
    low = {multiply_low(a.even, b), multiply_low(a.odd, b)};
    high = {low.even >> 32, low.odd >> 32};
}

// first + lane * stride, as its low and high 32 bits.
NVFP4_FN void lane_counters(uint64_t first, uint64_t stride, Counters& low, Counters& high) {
    Long lane;
    // a constant, once compiled
    for (int i = 0; i < kLanes / 2; ++i) lane[i] = 2 * static_cast<uint64_t>(i);
    const Long even = lane * stride + first;
    low = {even, even + stride};
    high = {low.even >> 32, low.odd >> 32};
}

NVFP4_END

#include "transpose.h"
