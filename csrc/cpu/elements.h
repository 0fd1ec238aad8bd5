// Elements as they lie in memory, as vectors of float32 and back: what knows about formats.
//
//     read_some<element>(p, count)    kLanes neighbours, zero from ``count`` on
//     read_square<element>(..)        kLanes rows of kLanes neighbours, turned: a vector per column
//     unpack(bytes)                   kLanes E2M1 codes out of half as many bytes
//     decode_codes(codes)             their signed values, by a look-up in a register
//     write_some(element, out, ..)    back, rounded once to the format of ``out``
//
// Everything here is exact but the rounding of write_some. Nothing beyond ``count`` is read: the
// last element of a matrix may be the last of a page.
#pragma once

#include "../codec.h"
#include "kernels.h"

NVFP4_BEGIN

template <Element element>
struct Reader;

template <>
struct Reader<Element::float32> {
    using Type = float;
    static NVFP4_FN Float read(const float* p) { return load(p); }
};

template <>
struct Reader<Element::bfloat16> {
    using Type = uint16_t;
    static NVFP4_FN Float read(const uint16_t* p) { return from_bits(widen(p) << 16); }
};

template <>
struct Reader<Element::float16> {
    using Type = uint16_t;
    static NVFP4_FN Float read(const uint16_t* p) {
#if defined(__AVX512F__)
        return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
        return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        return from_float16<Float>(widen(p));
#endif
    }
};

// kLanes elements at p of which ``count`` exist; the others are zero.
template <Element element>
NVFP4_FN Float read_some(const typename Reader<element>::Type* p, int64_t count) {
    if (count >= kLanes) return Reader<element>::read(p);

    typename Reader<element>::Type some[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = p[i];
    return Reader<element>::read(some);
}

// A square of ``width`` <= kLanes rows, ``stride`` elements apart, and kLanes columns, turned:
// column j becomes x[j], with row i in lane i. Of it ``rows`` and ``columns`` exist; the rest is
// zero.
template <Element element, int width = kLanes>
NVFP4_FN void read_square(const typename Reader<element>::Type* corner, int64_t stride,
                          int64_t rows, int64_t columns, Float (&x)[kLanes]) {
    if (rows >= width && columns >= kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
            x[r] = r < width ? Reader<element>::read(corner + r * stride) : Float{};
    } else {
        for (int r = 0; r < kLanes; ++r)
            x[r] = r < rows ? read_some<element>(corner + r * stride, columns) : Float{};
    }
    transpose(x);
}

// The signed values of kLanes E2M1 codes. Only the low four bits of a code are looked at.
NVFP4_FN Float decode_codes(Word codes) {
#if defined(__AVX512F__)
    const __m512 grid = _mm512_loadu_ps(kSignedGrid);
    return (Float)_mm512_permutexvar_ps((__m512i)codes, grid);
#elif defined(__AVX2__)
    const __m256 grid = _mm256_loadu_ps(kSignedGrid);  // by the three bits of the magnitude
    return from_bits((Word)_mm256_permutevar8x32_ps(grid, (__m256i)codes) | (codes & 8u) << 28);
#else
    return decode_signed<Float>(codes);
#endif
}

// kLanes codes from half as many bytes, the even column in the low nibble.
NVFP4_FN Word unpack(const uint8_t* bytes) {
#if defined(__AVX512F__)
    uint32_t half[2];
    memcpy(half, bytes, sizeof half);
    const Word shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    const Word words = {half[0], half[0], half[0], half[0], half[0], half[0], half[0], half[0],
                        half[1], half[1], half[1], half[1], half[1], half[1], half[1], half[1]};
    return (words >> shift) & 15u;
#elif defined(__AVX2__)
    uint32_t eight;
    memcpy(&eight, bytes, sizeof eight);
    return (same<Word>(eight) >> Word{0, 4, 8, 12, 16, 20, 24, 28}) & 15u;
#else
    // each is shifted to the top of 16 bits by a product: SSE2 has no shift of its own per lane
    uint16_t four;
    memcpy(&four, bytes, sizeof four);
    const Half top = (Half{} + four) * Half{4096, 256, 16, 1} >> 12;
    return __builtin_convertvector(top, Word);
#endif
}

// The first ``count`` lanes of x, or all of fewer, to ``out`` from its element number ``at`` on.
NVFP4_FN void write_some(Element element, void* out, int64_t at, Float x, int64_t count) {
    const size_t some = static_cast<size_t>(count);
    if (element == Element::float32) {
        float* to = static_cast<float*>(out) + at;
        if (count >= kLanes) return store(to, x);
        memcpy(to, &x, sizeof(float) * some);
        return;
    }

    const Word half = element == Element::bfloat16 ? bits(to_bfloat16(x)) >> 16 : float16_bits(x);
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    if (count >= kLanes) return store_halves(to, half);
    uint16_t all[kLanes];
    store_halves(all, half);
    memcpy(to, all, sizeof(uint16_t) * some);
}

NVFP4_END
