// The vocabulary that the arithmetic is written in, here for one number at a time.
//
// formats.h to quantizers.h are templates over F, "the float type". F is float in a CUDA thread or
// a test, and a vector of the processor's own width on the CPU (Float in cpu/simd.h, which has the
// same words for vectors); Int<F> is the unsigned integer of that shape. So each piece of
// arithmetic is written once:
//
//     numbers    bits, from_bits, splat, same, to_float, truncate, magnitude
//     choices    select, select_bits, smaller, larger, larger_bits, by_magnitude
//     arithmetic less_product, smaller_magnitude, rotate_left, exclusive_or, multiply_wide
//
// Everything lies in an inline namespace per instruction set, named by NVFP4_TARGET. A file that
// wants vectors defines NVFP4_VECTOR_LANES first. All of it is compiled without contraction of
// products and sums and without flushing of subnormals: then results are equal to the last bit.
#pragma once

#include <cstdint>
#include <cstring>

// One namespace per instruction set: the same header compiled with other flags must not meet itself
// at link time.
#if !defined(NVFP4_TARGET)
#define NVFP4_TARGET scalar
#endif
#define NVFP4_BEGIN   \
    namespace nvfp4 { \
    inline namespace NVFP4_TARGET {
#define NVFP4_END \
    }             \
    }

#if defined(__CUDACC__)
#define NVFP4_FN __host__ __device__ __forceinline__
// without n: where n was above the trip count, cicc (nvcc's compiler) ran for seven minutes
#define NVFP4_UNROLL(n) _Pragma("unroll")
#define NVFP4_GPU_UNROLL _Pragma("unroll")
#define NVFP4_ROLLED _Pragma("unroll 1")
#else
#define NVFP4_FN inline __attribute__((always_inline))
#define NVFP4_PRAGMA(text) _Pragma(#text)
#define NVFP4_UNROLL(n) NVFP4_PRAGMA(GCC unroll n)
#define NVFP4_GPU_UNROLL
#define NVFP4_ROLLED
#endif

// Kernels for GPUs, compiled by nvcc or for the host driver (cuda/simt.h), have their own ways to
// the same bits.
#if defined(__CUDACC__) || defined(NVFP4_SIMT)
#define NVFP4_GPU 1
#endif

NVFP4_BEGIN

template <class F>
struct Lanes;  // Int: unsigned 32-bit of the same width

template <>
struct Lanes<float> {
    using Int = uint32_t;
};

template <class F>
using Int = typename Lanes<F>::Int;

NVFP4_FN uint32_t bits(float x) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

NVFP4_FN float from_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

template <class F>
NVFP4_FN F splat(float x);
template <>
NVFP4_FN float splat<float>(float x) {
    return x;
}

template <class U>
NVFP4_FN U same(uint32_t x);
template <>
NVFP4_FN uint32_t same<uint32_t>(uint32_t x) {
    return x;
}

NVFP4_FN float select(bool mask, float a, float b) { return mask ? a : b; }
NVFP4_FN uint32_t select(bool mask, uint32_t a, uint32_t b) { return mask ? a : b; }
NVFP4_FN float smaller(float a, float b) { return a < b ? a : b; }
NVFP4_FN float larger(float a, float b) { return a > b ? a : b; }
NVFP4_FN uint32_t larger_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }
NVFP4_FN float magnitude(float x) {
#if defined(__CUDA_ARCH__)
    return fabsf(x);  // costs nothing: it becomes part of the instruction that takes it
#else
    return from_bits(bits(x) & 0x7fffffffu);
#endif
}
// 0 <= x < 2^31
NVFP4_FN uint32_t truncate(float x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }
// n < 2^31
NVFP4_FN float to_float(uint32_t n) { return static_cast<float>(static_cast<int32_t>(n)); }

NVFP4_FN uint32_t rotate_left(uint32_t x, int n) { return x << n | x >> (32 - n); }
NVFP4_FN float smaller_magnitude(float x, float limit) { return smaller(magnitude(x), limit); }

// c - a b of a product that is exact in float32, so that a fused operation gives the same.
NVFP4_FN float less_product(float c, float a, float b) {
#if defined(__CUDA_ARCH__)
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(-a), "f"(b), "f"(c));
    return d;
#else
    return c - a * b;
#endif
}

// By 0 <= x < 8: ``low`` below 2, ``middle`` from 2 on, ``high`` from 4 on.
NVFP4_FN float by_magnitude(float x, float low, float middle, float high) {
    return x < 2.0f ? low : x < 4.0f ? middle : high;
}

NVFP4_FN uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

NVFP4_FN uint32_t exclusive_or(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

NVFP4_FN void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
}

NVFP4_END

#if defined(NVFP4_VECTOR_LANES)
// before the templates that use its words: vector types have no argument-dependent lookup
#include "cpu/simd.h"
#endif
