// Two neighbours of a block in one register pair, which data-centre Blackwell adds and multiplies in
// one instruction each; elsewhere two. Products and sums stay apart: both are rounded, as they are
// one by one.
//
//     Two                 a + b, a - b, a * b, a * s
//     multiply_add_pair   of products that are exact, as in words.h
//     product_alone       a product that is not exact and is added to something
//     butterflies<held>   the strides of a rotation within a thread
//     sum_of              sixteen in the fixed order
#pragma once

#include "../scaling.h"

namespace nvfp4::cuda {

struct Two {
    float low, high;
};

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
#define NVFP4_PAIRED(name, instruction)                          \
    NVFP4_FN Two name(Two a, Two b) {                            \
        Two c;                                                   \
        asm("{\n"                                                \
            ".reg .b64 a, b, c;\n"                               \
            "mov.b64 a, {%2, %3};\n"                             \
            "mov.b64 b, {%4, %5};\n" instruction                 \
            ".rn.f32x2 c, a, b;\n"                               \
            "mov.b64 {%0, %1}, c;\n"                             \
            "\t}"                                                \
            : "=f"(c.low), "=f"(c.high)                          \
            : "f"(a.low), "f"(a.high), "f"(b.low), "f"(b.high)); \
        return c;                                                \
    }
NVFP4_PAIRED(operator+, "add")
NVFP4_PAIRED(operator-, "sub")
NVFP4_PAIRED(operator*, "mul")
#undef NVFP4_PAIRED

NVFP4_FN Two multiply_add_pair(Two a, Two b, Two c) {
    Two d;
    asm("{\n"
        ".reg .b64 a, b, c, d;\n"
        "mov.b64 a, {%2, %3};\n"
        "mov.b64 b, {%4, %5};\n"
        "mov.b64 c, {%6, %7};\n"
        "fma.rn.f32x2 d, a, b, c;\n"
        "mov.b64 {%0, %1}, d;\n"
        "\t}"
        : "=f"(d.low), "=f"(d.high)
        : "f"(a.low), "f"(a.high), "f"(b.low), "f"(b.high), "f"(c.low), "f"(c.high));
    return d;
}

#else
NVFP4_FN Two operator+(Two a, Two b) { return {a.low + b.low, a.high + b.high}; }
NVFP4_FN Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }
NVFP4_FN Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
NVFP4_FN Two multiply_add_pair(Two a, Two b, Two c) {
    return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}
#endif
// A product that a sum follows, one by one: of two at once ptxas makes one instruction with the sum,
// whatever it is told of contraction.
NVFP4_FN Two product_alone(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
NVFP4_FN Two operator*(Two a, float s) { return a * Two{s, s}; }

constexpr int kPairs = kBlock / 2;

// Strides 1 to 8 within each of ``held`` blocks, then 16 and more between them.
template <int held>
NVFP4_FN void butterflies(Two (&x)[held][kPairs]) {
    NVFP4_UNROLL(4)
    for (int h = 0; h < held; ++h) {
        NVFP4_UNROLL(8)
        for (int i = 0; i < kPairs; ++i)
            x[h][i] = {x[h][i].low + x[h][i].high, x[h][i].low - x[h][i].high};
        NVFP4_UNROLL(4)
        for (int stride = 1; stride < kPairs; stride *= 2) {
            NVFP4_UNROLL(8)
            for (int i = 0; i < kPairs; ++i) {
                if (i & stride) continue;
                const Two a = x[h][i], b = x[h][i + stride];
                x[h][i] = a + b;
                x[h][i + stride] = a - b;
            }
        }
    }
    NVFP4_UNROLL(4)
    for (int stride = 1; stride < held; stride *= 2) {
        NVFP4_UNROLL(4)
        for (int h = 0; h < held; ++h) {
            if (h & stride) continue;
            NVFP4_UNROLL(8)
            for (int i = 0; i < kPairs; ++i) {
                const Two a = x[h][i], b = x[h + stride][i];
                x[h][i] = a + b;
                x[h + stride][i] = a - b;
            }
        }
    }
}

// x[i] + x[i + 8], then + 4, + 2, + 1, as tree_sum.
NVFP4_FN float sum_of(const Two (&x)[kPairs]) {
    Two sum[kPairs / 2];
    NVFP4_UNROLL(4)
    for (int i = 0; i < 4; ++i) sum[i] = x[i] + x[i + 4];
    const Two all = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    return all.low + all.high;
}

}  // namespace nvfp4::cuda
