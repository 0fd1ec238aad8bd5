// What the native CPU code offers to bind.cpp: plain structs and one table of functions per
// instruction set.
//
//     quantize, quantize_both    a matrix to NVFP4 operands, [rows, Kp] each
//     decode                     codes to elements
//     fingerprint                whether memory has changed
//     matmul_*                   out = a b^T of codes or elements, where there is a kernel for it
//
// Kp is the contraction padded to whole blocks and whole groups of the rotation. No function keeps
// a pointer; all run on ``threads`` threads and return when they are done.
#pragma once

#include "../operands.h"

namespace nvfp4 {

// A matrix operand [rows, columns], contracted along its columns.
//
// Elements: (r, c) lies at data[r * row_stride + c * column_stride], one of the strides being 1.
// Codes: the operand is the transpose of ``decoded``, so (r, c) is its element at row c, column r.
struct Source {
    const void* data;
    Element element;
    int64_t rows, columns;
    int64_t row_stride, column_stride;
    CodeMatrix decoded;
};

// A rotation as it is asked for; cpu/rotation.h works it out.
struct RotationSpec {
    int group = 0;  // 0: no rotation
    int rounds = 1;
    uint64_t sign_seed = 0;
    bool fixed = false;  // NVIDIA's
};

struct QuantizeArgs : Method {
    Source source;
    RotationSpec rotation;
    uint64_t seed;
    int64_t padded_columns;  // Kp
    uint8_t* codes;          // [rows, Kp / 2]
    uint8_t* block_scale;    // [rows or ceil(rows / 16), Kp / 16]
    float* global_scale;     // [1] or [rows]
    float* scratch;          // ms_eden: [rows, Kp / 16]
    const float* amax;       // [1] or [rows], to scale by instead of the source's own; or null
    int threads;
};

struct DecodeArgs {
    CodeMatrix matrix;
    int64_t columns;
    Element element;  // of out
    void* out;        // [rows, columns], contiguous
    int threads;
};

// An operand of a product [rows, depth], contracted along its columns: codes or, where these are
// null, elements.
struct Factor {
    CodeMatrix codes;
    Source elements;
};

struct MatmulArgs {
    Factor a, b;  // out = a b^T
    int64_t rows, columns;
    int64_t depth;      // the contraction, of codes a multiple of 16
    const float* bias;  // [columns] or null
    Element out_element;
    void* out;  // [rows, columns], contiguous
    int threads;
};

struct Kernels {
    const char* name;
    void (*quantize)(const QuantizeArgs&);
    void (*quantize_both)(const QuantizeArgs&, const QuantizeArgs&);
    void (*decode)(const DecodeArgs&);
    uint64_t (*fingerprint)(const void* data, int64_t bytes, int threads);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
// the products: of codes and elements with AVX2, FMA and F16C, and with AVX-512; of codes alone
void matmul_avx2(const MatmulArgs&);
void matmul_avx512(const MatmulArgs&);
void matmul_avx512bf16(const MatmulArgs&);
// of codes, summed as tensor cores do
void matmul_groups_avx2(const MatmulArgs&);
void matmul_groups_avx512(const MatmulArgs&);
#endif

}  // namespace nvfp4
