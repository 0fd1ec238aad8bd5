// Codes in 16x16 blocks with rows and columns exchanged: of a weight that fprop quantised in tiles,
// dgrad's operand without a second rounding.
//
//     codes [M, Kp/2], scales [ceil(M/16), Kp/16]  ->  codes [K, Mp/2], scales [Kp/16, ceil(M/16)]
//
// Two codes lie in a byte, so the unit is a square of 2x2 codes, one byte in each of two rows:
//
//     upper = b a    lower = d c    (nibbles, the high one first)
//     even  = c a    odd   = d b
//
// A block is 8 pairs of rows of 8 bytes. A row is one 64-bit word, so a pair takes six operations
// for sixteen squares, and 8x8 bytes change places in twelve exchanges of halves. Integers alone:
// the same code on every instruction set. Words are little-endian.
#pragma once

#include <algorithm>
#include <cstring>

#include "../formats.h"
#include "../operands.h"

namespace nvfp4 {

// The bits of a that the mask, shifted, covers change places with those of b under the mask.
inline void exchange(uint64_t& a, uint64_t& b, int shift, uint64_t mask) {
    const uint64_t changed = ((a >> shift) ^ b) & mask;
    a ^= changed << shift;
    b ^= changed;
}

// Byte j of words[i] <-> byte i of words[j].
inline void transpose_bytes(uint64_t (&words)[8]) {
    for (int i = 0; i < 4; ++i) exchange(words[i], words[i + 4], 32, 0x00000000ffffffffu);
    for (const int i : {0, 1, 4, 5}) exchange(words[i], words[i + 2], 16, 0x0000ffff0000ffffu);
    for (const int i : {0, 2, 4, 6}) exchange(words[i], words[i + 1], 8, 0x00ff00ff00ff00ffu);
}

// ``height`` rows of 8 bytes of a block to ``width`` rows of 8 bytes; rows beyond are zero codes.
inline void transpose_block(const uint8_t* from, int64_t from_stride, int64_t height, uint8_t* to,
                            int64_t to_stride, int64_t width) {
    constexpr uint64_t low = 0x0f0f0f0f0f0f0f0fu;
    uint64_t even[8], odd[8];
    for (int64_t i = 0; i < 8; ++i) {
        uint64_t upper = 0, lower = 0;
        if (2 * i < height) memcpy(&upper, from + 2 * i * from_stride, 8);
        if (2 * i + 1 < height) memcpy(&lower, from + (2 * i + 1) * from_stride, 8);
        even[i] = (upper & low) | (lower & low) << 4;
        odd[i] = (upper >> 4 & low) | (lower & ~low);
    }
    transpose_bytes(even);
    transpose_bytes(odd);
    for (int64_t i = 0; i < 8; ++i) {
        if (2 * i < width) memcpy(to + 2 * i * to_stride, &even[i], 8);
        if (2 * i + 1 < width) memcpy(to + (2 * i + 1) * to_stride, &odd[i], 8);
    }
}

// The first ``columns`` of q, which has tiles. Eight blocks side by side at a time: a cache line of
// each row that is read, and the lines of the rows that are written stay until they are full.
inline void transpose_codes(const CodeMatrix& q, int64_t columns, uint8_t* codes,
                            uint8_t* block_scale, int threads) {
    const int64_t down = ceil_div(q.rows, int64_t{kBlock}), across = q.row_bytes / 8;
    const int64_t stride = down * 8;
#pragma omp parallel for schedule(static) num_threads(q.rows* columns < (1 << 16) ? 1 : threads)
    for (int64_t first = 0; first < across; first += 8)
        for (int64_t i = 0; i < down; ++i)
            for (int64_t j = first; j < std::min(first + 8, across); ++j) {
                block_scale[j * down + i] = q.block_scale[i * q.scale_stride + j];
                transpose_block(q.codes + i * kBlock * q.row_bytes + j * 8, q.row_bytes,
                                std::min<int64_t>(kBlock, q.rows - i * kBlock),
                                codes + j * kBlock * stride + i * 8, stride,
                                std::min<int64_t>(kBlock, columns - j * kBlock));
            }
}

}  // namespace nvfp4
