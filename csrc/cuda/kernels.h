// What the CUDA code offers to bind_cuda.cpp: plain structs and a few functions, raw pointers to
// device memory throughout.
//
//     quantize(down = false)  a matrix [rows, columns] -> an operand [rows, Kp]
//     quantize(down = true)   a matrix or codes of one -> an operand [columns, Kp], the transpose
//     quantize_both           both, from one read where one kernel has both
//     decode_matrix           codes -> elements
//
// Nothing here waits for the device or allocates; every launch goes to the given stream of the
// given device, and the device that was current before is current again afterwards.
#pragma once

#include "../operands.h"

namespace nvfp4::cuda {

// A matrix in memory, [rows, columns], neighbours of a row being neighbours in memory.
struct Matrix {
    const void* data;  // unless ``element`` is codes
    Element element;
    int64_t rows, columns, row_stride;
    CodeMatrix coded;
    bool aligned;  // to 16 bytes, every row of it; of codes, to 4
};

// A seed, read from device memory where there is a pointer, so that a replayed graph sees a new
// one.
struct Seed {
    const uint64_t* at;
    uint64_t value;
};

// The NVFP4 operand [lines, padded] to be made of a matrix or of its transpose.
struct Operand : Method {
    bool knows_peak;    // what ``peak`` points to is the amax already
    bool fixed;         // NVIDIA's rotation
    int group, rounds;  // 0: no rotation
    bool tensor_core;   // its sums may be those of tensor cores, where a kernel has them
    Seed seed, sign_seed;
    int64_t padded;        // Kp
    uint8_t* codes;        // [lines, Kp / 2]
    uint8_t* block_scale;  // [lines or ceil(lines / 16), Kp / 16]
    float* global_scale;   // [1] or [lines]
    uint32_t* peak;        // [1] or [lines]: bits of the amax, of the largest r for ms_eden
    float* lengths;        // ms_eden: r, [lines, Kp / 16]
    uint8_t* swizzled;     // the block scales, one per line, as tensor cores read them; or null
    int64_t lines;
};

// Of the matrix along its rows, or of its transpose (``down``).
void quantize(const Matrix& matrix, const Operand& operand, bool down, int device, void* stream);
void quantize_both(const Matrix& matrix, const Operand& rows, const Operand& columns, int device,
                   void* stream);

// Elements that codes [rows, columns] stand for.
void decode_matrix(const CodeMatrix& matrix, int64_t columns, Element element, void* out,
                   int device, void* stream);

// Whether one kernel makes both operands.
bool fused(const Operand& rows, const Operand& columns);

// Architectures in the binary, as 900 for sm_90; count of them.
int architectures(const int** list);

}  // namespace nvfp4::cuda
