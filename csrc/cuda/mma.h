// The words of a warp's tensor core: fragments of matrices, and the product of two.
//
//     load_fragment       16x16 of 16-bit numbers out of shared memory: ldmatrix
//     load_transposed     the same of the transpose
//     multiply            a [16, 16] times b [16, 8] -> float32 [16, 8]: mma.sync.m16n8k16
//     Two                 two float32 side by side, one instruction on sm_100
//     copy_chunk          16 bytes from global into shared memory, without registers: cp.async
//
// Lane 4 g + t of a warp (g from 0 to 7, t from 0 to 3) holds, as the PTX ISA has it for
// m16n8k16 of 16-bit numbers, two of them in each word:
//
//     a[0], a[1]    row g, row g + 8; columns 2 t, 2 t + 1
//     a[2], a[3]    row g, row g + 8; columns 2 t + 8, 2 t + 9
//     b[0], b[1]    column g; rows 2 t, 2 t + 1, and 2 t + 8, 2 t + 9
//     d             (row g, row g + 8) x (columns 2 t, 2 t + 1)
//
// Products are exact in float32. In which order sixteen of them are added, and what of them is cut
// off before, NVIDIA does not say; docs/numerics.md has what others measured. Without CUDA the same
// words are those of simt_mma.h, lane by lane, with a summation that a test chooses.
#pragma once

#include "device.h"

#if !defined(__CUDACC__)
#include "simt_mma.h"
#endif

namespace nvfp4::cuda {

#if defined(__CUDACC__)

NVFP4_DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ``row``: of this lane, 16 bytes. Lanes 0 to 7 name rows 0 to 7 of the quarter in a[0], the next
// eight those of a[1], and so on.
NVFP4_DEVICE void load_fragment(uint32_t (&a)[4], const uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(row))
                 : "memory");
}

NVFP4_DEVICE void load_transposed(uint32_t (&a)[4], const uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// half: of float16, else of BF16.
template <bool half>
NVFP4_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (half)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// To be had after wait_for_copies, by other threads after a barrier as well.
NVFP4_DEVICE void copy_chunk(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

NVFP4_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The larger magnitude, NaN before all.
NVFP4_DEVICE float larger_magnitude(float x, float y) {
    float larger;
    asm("{\n"
        ".reg .f32 a, b;\n"
        "abs.f32 a, %1;\n"
        "abs.f32 b, %2;\n"
        "max.NaN.f32 %0, a, b;\n"
        "\t}"
        : "=f"(larger)
        : "f"(x), "f"(y));
    return larger;
}

// The largest of a warp.
NVFP4_DEVICE uint32_t largest_of_warp(uint32_t x) { return __reduce_max_sync(~0u, x); }

#else

template <bool half>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::multiply(d, a, b0, b1, half);
}

inline void load_fragment(uint32_t (&a)[4], const uint16_t* row) {
    simt::load_matrices(a, row, false);
}

inline void load_transposed(uint32_t (&a)[4], const uint16_t* row) {
    simt::load_matrices(a, row, true);
}

inline void copy_chunk(void* to, const void* from) { memcpy(to, from, 16); }

inline void wait_for_copies() {}

inline float larger_magnitude(float x, float y) {
    return from_bits(larger_bits(bits(x) & 0x7fffffffu, bits(y) & 0x7fffffffu));
}

inline uint32_t largest_of_warp(uint32_t x) {
    for (int distance = 1; distance < 32; distance *= 2)
        x = larger_bits(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

#endif

struct Two {
    float x, y;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define NVFP4_OF_TWO(name, operation)                                \
    NVFP4_DEVICE Two name(Two a, Two b) {                            \
        Two c;                                                       \
        asm("{\n.reg .b64 a, b, c;\n"                                \
            "mov.b64 a, {%2, %3};\nmov.b64 b, {%4, %5};\n" operation \
            ".rn.f32x2 c, a, b;\nmov.b64 {%0, %1}, c;\n\t}"          \
            : "=f"(c.x), "=f"(c.y)                                   \
            : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));               \
        return c;                                                    \
    }
NVFP4_OF_TWO(sum, "add")
NVFP4_OF_TWO(difference, "sub")
NVFP4_OF_TWO(product, "mul")
#undef NVFP4_OF_TWO
#else
NVFP4_DEVICE Two sum(Two a, Two b) { return {a.x + b.x, a.y + b.y}; }
NVFP4_DEVICE Two difference(Two a, Two b) { return {a.x - b.x, a.y - b.y}; }
NVFP4_DEVICE Two product(Two a, Two b) { return {a.x * b.x, a.y * b.y}; }
#endif

NVFP4_DEVICE Two product(Two a, float b) { return product(a, Two{b, b}); }

// The largest magnitude of four, NaN before all.
NVFP4_DEVICE float largest_magnitude(Two a, Two b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    float largest;
    asm("{\n.reg .f32 largest;\n"
        "max.NaN.abs.f32 largest, %1, %2, %3;\n"
        "max.NaN.abs.f32 %0, largest, %4, %4;\n\t}"
        : "=f"(largest)
        : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));
    return largest;
#else
    return larger_magnitude(larger_magnitude(a.x, a.y), larger_magnitude(b.x, b.y));
#endif
}

}  // namespace nvfp4::cuda
