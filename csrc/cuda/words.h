// Instructions of a GPU that C++ has no words for, each with what it means to a processor.
//
// A kernel is bound by the instructions that it issues, so these are chosen by count: a saturated
// sum is a sum and two comparisons in one, a maximum of packed BF16 two maxima. The other half of
// each function is what the host driver (simt.h) runs and what the tests hold to the reference.
//
//     times_saturated, multiply_add_saturated
//                          a b and a b + c, brought into [0, 1]; NaN becomes 0
//     multiply_add         a b + c of a product that is exact, so that it is rounded once anyway
//     plus_truncated       a + b rounded toward zero
//     times_all            a s of sixteen, two at a time where data-centre Blackwell does; for
//                          products that no sum follows, since ptxas would make one of both
//     larger_magnitude     of float32, larger_pair of two BF16: NaN is the largest; the sign of the
//                          result means nothing
//     pick_bytes           four of the eight bytes of two words
#pragma once

#include "../lanes.h"

NVFP4_BEGIN

#if !defined(__CUDA_ARCH__)
NVFP4_FN float saturated(float x) { return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f; }
#endif

NVFP4_FN float times_saturated(float a, float b) {
#if defined(__CUDA_ARCH__)
    float c;
    asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return saturated(a * b);
#endif
}

NVFP4_FN float multiply_add_saturated(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
#else
    return saturated(a * b + c);
#endif
}

NVFP4_FN float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
#else
    return a * b + c;
#endif
}

// Of 0 <= a and 2^23 <= b, where the result is the integer part of a on top of b.
NVFP4_FN float plus_truncated(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rz(a, b);
#else
    return static_cast<float>(static_cast<uint32_t>(a)) + b;
#endif
}

NVFP4_FN void times_all(const float (&a)[16], float s, float (&c)[16]) {
    NVFP4_UNROLL(16)
    for (int i = 0; i < 16; i += 2) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
        asm("{\n"
            ".reg .b64 a, s, c;\n"
            "mov.b64 a, {%2, %3};\n"
            "mov.b64 s, {%4, %4};\n"
            "mul.rn.f32x2 c, a, s;\n"
            "mov.b64 {%0, %1}, c;\n"
            "\t}"
            : "=f"(c[i]), "=f"(c[i + 1])
            : "f"(a[i]), "f"(a[i + 1]), "f"(s));
#else
        c[i] = a[i] * s;
        c[i + 1] = a[i + 1] * s;
#endif
    }
}

NVFP4_FN float larger_magnitude(float a, float b) {
#if defined(__CUDA_ARCH__)
    float c;
    asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return from_bits(larger_bits(bits(a) & 0x7fffffffu, bits(b) & 0x7fffffffu));
#endif
}

NVFP4_FN uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t c;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
#else
    const uint32_t low = larger_bits(a & 0x7fffu, b & 0x7fffu);
    return low | larger_bits(a & 0x7fff0000u, b & 0x7fff0000u);
#endif
}

// Byte i is byte number ``selector >> 4 i & 7`` of a, from 4 on of b.
NVFP4_FN uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(a, b, selector);
#else
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i)
        word |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7u)) & 255u) << (8 * i);
    return word;
#endif
}

NVFP4_END
