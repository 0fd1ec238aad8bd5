// The rotation with its 16x16 factor on tensor cores: 128x128 tiles of 16-bit numbers in shared
// memory, and strips of sixteen lines of them, rotated, in the registers of a warp.
//
//     H128 = H8 x H16     sixteen lines times H16 per block (two mma.sync), then three butterflies
//                         between the eight blocks, which lie in the same registers of a thread
//
// A strip is sixteen rows of the tile, or sixteen of its columns, which ldmatrix transposes on the
// way; so both orientations come from one read of the matrix. Signs are exclusive-ored into the
// elements, since they differ between the orientations. Codes are decoded to float16, in which
// e2m1 * e4m3 is exact, and BF16 stays as it is: all products with +-1 are exact.
//
// Of each block of a line a thread has the outputs t, t + 4, t + 8, t + 12, t being its lane modulo
// 4: the columns of H16 are permuted so. Then the first two additions of the fixed sum over sixteen
// lie within a thread, and two between lanes.
#pragma once

#if defined(__CUDACC__)
#include "e2m1.h"
#endif
#include "mma.h"
#include "rotate.h"

namespace nvfp4::cuda {

constexpr int kStrip = 16;            // lines of a warp
constexpr int kRowBytes = kTile * 2;  // of a tile in shared memory
constexpr int kMmaTileBytes = kTile * kRowBytes;
constexpr int kQuads = 4;  // lanes that share a line

// Chunk of 16 bytes number ``chunk`` of a row of the tile, in bytes. Rows that follow each other
// have the same chunk in different banks, and so have every second chunk of a row.
NVFP4_DEVICE int chunk_offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ ((row ^ chunk >> 3) & 7)) * 16;
}

// The signs of one orientation: for block b and lane t the words that go over elements 2 t, 2 t + 1
// and 2 t + 8, 2 t + 9.
struct alignas(16) SignWords {
    uint32_t word[kTileBlocks][kQuads][2];
};

struct MmaBeside {
    Signs rows, columns;
    SignWords row_words, column_words;
};

constexpr int kMmaSharedBytes = kMmaTileBytes + static_cast<int>(sizeof(MmaBeside));

// By the first 64 threads, of signs that are there.
NVFP4_DEVICE void spread_signs(const Signs& signs, int thread, SignWords& words) {
    if (thread < 0 || thread >= kTileBlocks * kQuads * 2) return;
    const int block = thread / 8, t = thread / 2 % 4, half = thread % 2;
    const uint32_t minus = signs[0][block / 2] >> (block % 2 * 16 + half * 8 + 2 * t);
    words.word[block][t][half] = (minus << 15 & 0x8000u) | (minus << 30 & 0x80000000u);
}

// A tile of BF16; what lies outside of the matrix is zero. wait_for_copies and a barrier have to
// follow.
NVFP4_DEVICE void load_elements_tile(const Matrix& m, int64_t row, int64_t column,
                                     unsigned char* tile) {
    constexpr int chunks = kRowBytes / 16, at_once = kThreads / chunks;  // rows
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % chunks;
    const int first = thread / chunks;
    const int64_t at = column + chunk * 8;
    const auto* from = static_cast<const uint16_t*>(m.data) + (row + first) * m.row_stride + at;

    // most tiles lie within the matrix
    if (m.aligned && row + kTile <= m.rows && column + kTile <= m.columns) {
        NVFP4_UNROLL(8)
        for (int r = 0; r < kTile; r += at_once, from += at_once * m.row_stride)
            copy_chunk(tile + chunk_offset(first + r, chunk), from);
        return;
    }

    NVFP4_ROLLED
    for (int r = first; r < kTile; r += at_once)
        *reinterpret_cast<Chunk*>(tile + chunk_offset(r, chunk)) =
            load_chunk<uint16_t>(m, row + r, at);
}

// Eight codes times their scale, as float16, exact.
#if defined(__CUDACC__)
NVFP4_DEVICE Chunk decode_halves(uint32_t codes, uint32_t scale_byte) {
    uint32_t scale;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
        : "=r"(scale)
        : "h"(static_cast<uint16_t>((scale_byte & 127u) * 0x101u)));
    uint32_t value[4];
#if defined(NVFP4_CONVERTS)
    asm("{\n.reg .b8 a, b, c, d;\n"
        "mov.b32 {a, b, c, d}, %4;\n"
        "cvt.rn.f16x2.e2m1x2 %0, a;\n"
        "cvt.rn.f16x2.e2m1x2 %1, b;\n"
        "cvt.rn.f16x2.e2m1x2 %2, c;\n"
        "cvt.rn.f16x2.e2m1x2 %3, d;\n\t}"
        : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
        : "r"(codes));
#else
    // the upper bytes of the eight magnitudes, the lower ones being zero
    constexpr uint32_t small = 0x3e3c3800u, large = 0x46444240u;
    NVFP4_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = codes >> (8 * i);
        const uint32_t bytes = __byte_perm(small, large, pair & 0x77u);
        value[i] =
            __byte_perm(bytes, 0u, 0x1404u) | (pair << 12 & 0x8000u) | (pair << 24 & 0x80000000u);
    }
#endif
    Chunk chunk;
    NVFP4_UNROLL(4)
    for (int i = 0; i < 4; ++i)
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(chunk.word[i]) : "r"(value[i]), "r"(scale));
    return chunk;
}
#else
inline Chunk decode_halves(uint32_t codes, uint32_t scale_byte) {
    const float scale = decode_scale(scale_byte);
    Chunk chunk = {};
    for (int i = 0; i < 8; ++i) {
        const float value = decode_signed<float>(codes >> (4 * i) & 15u) * scale;
        chunk.word[i / 2] |= static_cast<uint32_t>(to_float16(value)) << (i % 2 * 16);
    }
    return chunk;
}
#endif

// A tile of codes, whose rows begin on eight bytes, as float16 without the global scale. Codes
// beyond the columns are padding and count as zero.
NVFP4_DEVICE void load_codes_tile(const Matrix& m, int64_t row, int64_t column,
                                  unsigned char* tile) {
    constexpr int at_once = kThreads / kTileBlocks, turns = kTile / at_once;  // rows
    const CodeMatrix& c = m.coded;
    const int thread = static_cast<int>(threadIdx.x), block = thread % kTileBlocks;
    const int first = thread / kTileBlocks, scale_rows = c.scale_block_rows == 1 ? 0 : 4;
    const int64_t at = column + block * kBlock, inside = m.columns - at;

    // all reads first, so that they are under way at once
    Pair codes[turns];
    uint32_t scale[turns];
    NVFP4_UNROLL(4)
    for (int i = 0; i < turns; ++i) {
        const int64_t r = row + first + i * at_once;
        const bool read = r < m.rows && inside > 0;
        codes[i] = {0u, 0u};
        scale[i] = 0u;
        if (!read) continue;
        codes[i] = *reinterpret_cast<const Pair*>(c.codes + r * c.row_bytes + at / 2);
        scale[i] = c.block_scale[(r >> scale_rows) * c.scale_stride + at / kBlock];
    }

    const uint64_t kept = inside >= kBlock ? ~0ull : inside > 0 ? (1ull << (4 * inside)) - 1 : 0;
    NVFP4_UNROLL(4)
    for (int i = 0; i < turns; ++i) {
        const int r = first + i * at_once;
        *reinterpret_cast<Chunk*>(tile + chunk_offset(r, 2 * block)) =
            decode_halves(codes[i].low & static_cast<uint32_t>(kept), scale[i]);
        *reinterpret_cast<Chunk*>(tile + chunk_offset(r, 2 * block + 1)) =
            decode_halves(codes[i].high & static_cast<uint32_t>(kept >> 32), scale[i]);
    }
}

// What a thread has of a strip, in lane 4 g + t: of lines g and g + 8 the eight blocks, of each the
// outputs (t, t + 8) and (t + 4, t + 12). Register r holds block r ^ 2 t, so that what a lane keeps
// of a sum over four lanes lies in the same registers in all of them, and nothing is selected.
typedef Two Strip[2][kTileBlocks][2];

// H16 as this lane holds it for mma.sync: two rows of the half whose column g is output
// g / 2 + g % 2 * 8 + 4 half, 2 t and 2 t + 1, and those eight further down. To exchange blocks
// r and r ^ 2 t of the lane that gets the column, the column of every block is negated that has an
// odd number of bits in common with 2 t.
template <bool half_precision>
struct Factor {
    uint32_t word[2], lower[2], of_bit[2];  // by half of the columns; of_bit: of blocks 2 and 4

    NVFP4_DEVICE explicit Factor(int lane) {
        constexpr uint32_t one = half_precision ? 0x3c003c00u : 0x3f803f80u, both = 0x80008000u;
        const uint32_t g = lane / 4, k = lane % 4 * 2, output = g / 2;
        // the parity of the bits that row and output have in common, by a table
        const uint32_t first = 0x6996u >> (k & output) & 1u;
        const uint32_t second = 0x6996u >> ((k | 1u) & output) & 1u;
        word[0] = one ^ first << 15 ^ second << 31;
        word[1] = word[0] ^ (k & 4u ? both : 0u);
        const uint32_t eight_down = g & 1u ? both : 0u;
        lower[0] = word[0] ^ eight_down;
        lower[1] = word[1] ^ eight_down;
        of_bit[0] = g & 2u ? both : 0u;
        of_bit[1] = g & 4u ? both : 0u;
    }
};

// The strip beginning at line ``line`` of the tile, rotated but for the scale.
template <bool down, bool half_precision>
NVFP4_DEVICE void rotate_strip(const unsigned char* tile, const SignWords& signs,
                               const Factor<half_precision>& factor, int line, Strip& y) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    NVFP4_UNROLL(8)
    for (int b = 0; b < kTileBlocks; ++b) {
        // sixteen lines by the sixteen elements of block b, with their signs
        uint32_t a[4];
        if constexpr (down)
            load_transposed(a, reinterpret_cast<const uint16_t*>(
                                   tile + chunk_offset(b * kBlock + lane % 8 + lane / 16 * 8,
                                                       line / 8 + lane / 8 % 2)));
        else
            load_fragment(a, reinterpret_cast<const uint16_t*>(
                                 tile + chunk_offset(line + lane % 16, 2 * b + lane / 16)));
        const uint32_t low = signs.word[b][lane % 4][0], high = signs.word[b][lane % 4][1];
        const uint32_t x[4] = {a[0] ^ low, a[1] ^ low, a[2] ^ high, a[3] ^ high};

        const uint32_t minus = (b & 2 ? factor.of_bit[0] : 0u) ^ (b & 4 ? factor.of_bit[1] : 0u);
        NVFP4_UNROLL(2)
        for (int h = 0; h < 2; ++h) {
            float d[4];
            multiply<half_precision>(d, x, factor.word[h] ^ minus, factor.lower[h] ^ minus);
            y[0][b][h] = {d[0], d[1]};
            y[1][b][h] = {d[2], d[3]};
        }
    }

    NVFP4_UNROLL(3)
    for (int stride = 1; stride < kTileBlocks; stride *= 2) {
        NVFP4_UNROLL(32)
        for (int n = 0; n < 2 * kTileBlocks * 2; ++n) {
            const int i = n % 2, j = n / 2 % 2, b = n / 4;
            if (b & stride) continue;
            const Two low = y[i][b][j], high = y[i][b + stride][j];
            y[i][b][j] = sum(low, high);
            y[i][b + stride][j] = difference(low, high);
        }
    }
}

}  // namespace nvfp4::cuda
