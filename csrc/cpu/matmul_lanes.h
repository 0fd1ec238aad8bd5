// The words that the products are written in: vectors as wide as the instruction set's own, 16
// floats with AVX-512 and 8 with AVX2 and F16C. Apart from simd.h, since here sums are fused
// (products of 4- and 16-bit floats are exact in float32).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../codec.h"
#include "kernels.h"

NVFP4_BEGIN

#if defined(__AVX512F__)
constexpr int kWide = 16;
typedef __m512 Wide;
typedef __m512i WideWord;

NVFP4_FN Wide zeros() { return _mm512_setzero_ps(); }
NVFP4_FN Wide everywhere(float x) { return _mm512_set1_ps(x); }
NVFP4_FN Wide load_wide(const float* p) { return _mm512_loadu_ps(p); }
NVFP4_FN void store_wide(float* p, Wide x) { _mm512_storeu_ps(p, x); }
NVFP4_FN Wide fused(Wide a, Wide b, Wide sum) { return _mm512_fmadd_ps(a, b, sum); }
NVFP4_FN Wide product(Wide a, Wide b) { return _mm512_mul_ps(a, b); }
NVFP4_FN Wide sum(Wide a, Wide b) { return _mm512_add_ps(a, b); }
NVFP4_FN WideWord load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
NVFP4_FN Wide widen_bfloat16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
NVFP4_FN Wide widen_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The first ``width`` lanes.
template <int width>
NVFP4_FN void store_part(float* p, Wide x) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << width) - 1u), x);
}

// Sixteen E2M1 values of the nibbles that lie ``shift`` bits up.
template <int shift>
NVFP4_FN Wide e2m1_of(WideWord codes) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, shift), _mm512_loadu_ps(kSignedGrid));
}

NVFP4_FN void narrow_bfloat16(uint16_t* p, Wide x) {
    const __m512i b = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(b, _mm512_set1_epi32(0x400000));
    const __m512i y = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16)));
}

NVFP4_FN void transpose_wide(Wide (&rows)[16]) {
    __m512 a[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512 low = _mm512_unpacklo_ps(rows[i], rows[i + 1]),
                     high = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        const __m512 low2 = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]);
        const __m512 high2 = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
        a[i] = _mm512_shuffle_ps(low, low2, 0x44);
        a[i + 1] = _mm512_shuffle_ps(low, low2, 0xee);
        a[i + 2] = _mm512_shuffle_ps(high, high2, 0x44);
        a[i + 3] = _mm512_shuffle_ps(high, high2, 0xee);
    }
    // a[4q + c], quarter p: rows 4q .. 4q + 3 of column 4p + c
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44),
                     high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
        const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
        const __m512 high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
        rows[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
        rows[4 + c] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        rows[8 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
        rows[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
}
#else
constexpr int kWide = 8;
typedef __m256 Wide;
typedef __m256i WideWord;

NVFP4_FN Wide zeros() { return _mm256_setzero_ps(); }
NVFP4_FN Wide everywhere(float x) { return _mm256_set1_ps(x); }
NVFP4_FN Wide load_wide(const float* p) { return _mm256_loadu_ps(p); }
NVFP4_FN void store_wide(float* p, Wide x) { _mm256_storeu_ps(p, x); }
NVFP4_FN Wide fused(Wide a, Wide b, Wide sum) { return _mm256_fmadd_ps(a, b, sum); }
NVFP4_FN Wide product(Wide a, Wide b) { return _mm256_mul_ps(a, b); }
NVFP4_FN Wide sum(Wide a, Wide b) { return _mm256_add_ps(a, b); }
NVFP4_FN WideWord load_words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
NVFP4_FN Wide widen_bfloat16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
NVFP4_FN Wide widen_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int width>
NVFP4_FN void store_part(float* p, Wide x) {
    static_assert(width == 8 || width == 6, "masked stores are slow where AVX2 is");
    if (width == 8) return store_wide(p, x);
    _mm_storeu_ps(p, _mm256_castps256_ps128(x));
    _mm_storel_pi(reinterpret_cast<__m64*>(p + 4), _mm256_extractf128_ps(x, 1));
}

template <int shift>
NVFP4_FN Wide e2m1_of(WideWord codes) {
    const __m256 magnitude =
        _mm256_permutevar8x32_ps(_mm256_loadu_ps(kSignedGrid), _mm256_srli_epi32(codes, shift));
    const __m256i sign =
        _mm256_and_si256(_mm256_slli_epi32(codes, 28 - shift), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}

NVFP4_FN void narrow_bfloat16(uint16_t* p, Wide x) {
    const __m256i b = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i y = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

NVFP4_FN void transpose_wide(Wide (&rows)[8]) {
    __m256 a[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        const __m256 low = _mm256_unpacklo_ps(rows[i], rows[i + 1]),
                     high = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        const __m256 low2 = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]);
        const __m256 high2 = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        a[i] = _mm256_shuffle_ps(low, low2, 0x44);
        a[i + 1] = _mm256_shuffle_ps(low, low2, 0xee);
        a[i + 2] = _mm256_shuffle_ps(high, high2, 0x44);
        a[i + 3] = _mm256_shuffle_ps(high, high2, 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        rows[c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x20);
        rows[4 + c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x31);
    }
}
#endif

template <Element element>
struct Reading;

template <>
struct Reading<Element::float32> {
    using Type = float;
    static NVFP4_FN Wide read(const float* p) { return load_wide(p); }
};

template <>
struct Reading<Element::bfloat16> {
    using Type = uint16_t;
    static NVFP4_FN Wide read(const uint16_t* p) { return widen_bfloat16(p); }
};

template <>
struct Reading<Element::float16> {
    using Type = uint16_t;
    static NVFP4_FN Wide read(const uint16_t* p) { return widen_float16(p); }
};

// The elements at p of which ``count`` exist; the others are zero.
template <Element element>
NVFP4_FN Wide read_first(const typename Reading<element>::Type* p, int64_t count) {
    if (count >= kWide) return Reading<element>::read(p);
    typename Reading<element>::Type some[kWide] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = p[i];
    return Reading<element>::read(some);
}

NVFP4_END
