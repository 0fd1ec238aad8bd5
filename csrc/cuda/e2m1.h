// Blocks of eight elements to E2M1 codes, on a GPU: equal to rounding.h bit for bit, in fewer
// instructions.
//
//     nearest_eight      codes of x[0..7] * multiplier
//     round_eight        codes of v[0..7], and the values that they stand for
//     stochastic_eight   codes of x[0..7] * multiplier by noise
//
// All saturate, keep the sign of zero, and return eight codes in a word, the first in the lowest
// nibble. Blackwell converts two elements per instruction (NVFP4_CONVERTS); elsewhere
//
//     codes    The code is a concave function of the magnitude, rounded to an integer: three ramps
//              of slopes 2, 1 and 1/2 that begin at 0, 2 and 4. A ramp is a saturated product, ends
//              by itself at 6, and of the three sums on top of 2^23 at most one rounds. That is
//              seven instructions of the FMA pipe per element and none of the ALU, which on Hopper
//              starts half as many.
//     values   max(a, 1) tells the binade, and 2^22 times its power of two is what has to be added
//              to round (rounding.h); less that again the sum is the value. Codes are made of values
//              by the conversion to E4M3 that Hopper has, two at a time.
#pragma once

#include "../rounding.h"
#include "words.h"

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define NVFP4_CONVERTS 1
#endif

namespace nvfp4::cuda {

// Two elements that Blackwell converts and reads back. The first is the low half of each pair.
#if defined(NVFP4_CONVERTS)
NVFP4_FN uint32_t convert_eight(const float* v) {
    uint32_t word;
    asm("{\n"
        ".reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d};\n"
        "\t}"
        : "=r"(word)
        : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
    return word;
}

NVFP4_FN void decode_eight(uint32_t codes, float* q) {
    uint32_t pair[4];
    asm("{\n"
        ".reg .b8 a, b, c, d;\n"
        "mov.b32 {a, b, c, d}, %4;\n"
        "cvt.rn.f16x2.e2m1x2 %0, a;\n"
        "cvt.rn.f16x2.e2m1x2 %1, b;\n"
        "cvt.rn.f16x2.e2m1x2 %2, c;\n"
        "cvt.rn.f16x2.e2m1x2 %3, d;\n"
        "\t}"
        : "=r"(pair[0]), "=r"(pair[1]), "=r"(pair[2]), "=r"(pair[3])
        : "r"(codes));
    NVFP4_UNROLL(4)
    for (int i = 0; i < 4; ++i)
        asm("{\n"
            ".reg .b16 low, high;\n"
            "mov.b32 {low, high}, %2;\n"
            "cvt.f32.f16 %0, low;\n"
            "cvt.f32.f16 %1, high;\n"
            "\t}"
            : "=f"(q[2 * i]), "=f"(q[2 * i + 1])
            : "r"(pair[i]));
}
#endif

// How round_eight takes and returns numbers: times 2^-6 an element of E2M1 is one of E4M3 whose code
// is four times the other's, so that Hopper's conversion to E4M3 makes codes of values.
#if defined(NVFP4_CONVERTS)
constexpr float kUnit = 1.0f;
constexpr bool kSigned = true;
#else
constexpr float kUnit = 0x1p-6f;
constexpr bool kSigned = false;
#endif

// Four E4M3 codes of values that have one, the first in the lowest byte.
NVFP4_FN uint32_t e4m3_codes(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "\t}"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
#else
    return nearest<E4M3>(a).code | nearest<E4M3>(b).code << 8 | nearest<E4M3>(c).code << 16 |
           nearest<E4M3>(d).code << 24;
#endif
}

// Bit 31 of eight words as bits 3, 7, ..., 31; the others are anything.
NVFP4_FN uint32_t gather_signs(const float* x) {
    uint32_t half[2];
    NVFP4_UNROLL(2)
    for (int odd = 0; odd < 2; ++odd) {
        const uint32_t first = pick_bytes(bits(x[odd]), bits(x[2 + odd]), 0x0073);
        const uint32_t last = pick_bytes(bits(x[4 + odd]), bits(x[6 + odd]), 0x7300);
        half[odd] = pick_bytes(first, last, 0x7610);
    }
    return select_bits(0x80808080u, half[1], half[0] >> 4);
}

// 2^23 and the code of a >= 0, which may be beyond 6.
NVFP4_FN float code_on_ramps(float a) {
    const float first = times_saturated(a, 0.5f);
    const float second = multiply_add_saturated(a, 0.5f, -1.0f);  // exact from 2 to 4
    const float third = multiply_add_saturated(a, 0.5f, -2.0f);   // exact from 4 to 6
    return multiply_add(2.0f, second, multiply_add(4.0f, first, 0x1p23f)) + third;
}

// Bits of 2^23 + code; of eight of them, shifted by four each, the first two leave something of
// 2^23 in a word.
constexpr uint32_t kRampBits = 0x4b000000u;

NVFP4_FN uint32_t nearest_eight(const float* x, float multiplier) {
#if defined(NVFP4_CONVERTS)
    float v[8];
    NVFP4_UNROLL(8)
    for (int j = 0; j < 8; ++j) v[j] = x[j] * multiplier;
    return convert_eight(v);
#else
    uint32_t word = 0u - (kRampBits + (kRampBits << 4));
    NVFP4_UNROLL(8)
    for (int j = 0; j < 8; ++j)
        word += bits(code_on_ramps(magnitude(x[j]) * multiplier)) << (4 * j);
    return select_bits(0x88888888u, gather_signs(x), word);
#endif
}

// The signs of eight elements for round_eight, where its codes come without; made once for all
// scales that are tried.
NVFP4_FN uint32_t signs_of_eight(const float* v) {
#if defined(NVFP4_CONVERTS)
    static_cast<void>(v);
    return 0u;
#else
    return gather_signs(v);
#endif
}

// v[0..7] are elements times kUnit, and so are the values q, with the signs of v where ``kSigned``,
// else without. bounded: no element is as large as 7, so that none has to be saturated.
template <bool bounded>
NVFP4_FN uint32_t round_eight(const float* v, uint32_t signs, float* q) {
#if defined(NVFP4_CONVERTS)
    static_cast<void>(signs);
    const uint32_t word = convert_eight(v);
    decode_eight(word, q);
    return word;
#else
    NVFP4_UNROLL(8)
    for (int j = 0; j < 8; ++j) {
        const float a = bounded ? magnitude(v[j]) : smaller_magnitude(v[j], E2M1::max * kUnit);
        const float power = from_bits(bits(larger(a, kUnit)) & 0x7f800000u);
        // half a step is the last place of the sum
        q[j] = multiply_add(power, -0x1p22f, multiply_add(power, 0x1p22f, a));
    }
    const uint32_t even = e4m3_codes(q[0], q[2], q[4], q[6]);
    const uint32_t odd = e4m3_codes(q[1], q[3], q[5], q[7]);
    return select_bits(0x88888888u, signs, select_bits(0x0f0f0f0fu, even >> 2, odd << 2));
#endif
}

// What belongs to a value of round_eight: v, or where that has no sign |v|.
NVFP4_FN float unlike(float v) { return kSigned ? v : magnitude(v); }

// Each rounded by its u = (k + 1/2) / 2^16 in (0, 1), k being 16 bits of ``word``: the integer part
// of a / step + u, on top of the binade's code. To cut off is a sum rounded toward zero, since
// conversions to integers are an eighth as fast; k comes as 2^23 + k, bytes of two words.
NVFP4_FN uint32_t stochastic_eight(const float* x, float multiplier, const uint32_t (&word)[4]) {
    uint32_t codes = 0u - (kRampBits + (kRampBits << 4));
    NVFP4_UNROLL(8)
    for (int j = 0; j < 8; ++j) {
        const float a = smaller_magnitude(x[j] * multiplier, E2M1::max);
        const uint32_t exponent = bits(larger(a, 1.0f)) >> 23;
        const float per_step = from_bits((255u << 23) - (exponent << 23));  // 2, 1, 1/2
        const float k = from_bits(pick_bytes(word[j / 2], kRampBits, j % 2 ? 0x7432 : 0x7410));
        const float steps = multiply_add(k - (0x1p23f - 0.5f), 0x1p-16f, a * per_step);
        codes += (bits(plus_truncated(steps, 0x1p23f)) + 2u * exponent - 254u) << (4 * j);
    }
    return select_bits(0x88888888u, gather_signs(x), codes);
}

}  // namespace nvfp4::cuda
