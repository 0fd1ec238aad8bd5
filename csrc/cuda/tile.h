// Tiles of a matrix in shared memory, and blocks of sixteen elements out of them, along the rows or
// down the columns.
//
// A tile is 128 columns by 32 rows, or by 128 rows where it is read downwards as well. An element
// in it is ``Stored``: uint16_t, BF16, for sources in BF16 and for codes, whose e2m1 * e4m3 is
// exact in it; uint32_t, float32, for the others. Threads load 16 bytes at a time from the matrix,
// coalesced, and read a block each; tile_offset keeps both free of bank conflicts. What lies
// outside of the matrix is zero.
#pragma once

#include "../codec.h"
#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {

constexpr int kTile = 128;     // columns, and rows where it is read downwards: the largest group
constexpr int kFlatRows = 32;  // of a tile that is only read along its rows
constexpr int kTileBlocks = kTile / kBlock;

// Elements in 16 bytes.
template <class Stored>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Stored));

NVFP4_DEVICE float widen(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }
NVFP4_DEVICE float widen(uint32_t x) { return from_bits(x); }

// Where element (row, column) of a tile lies. Chunks of 16 bytes are permuted within 128 bytes, so
// that what eight threads read at once lies in different banks: neighbouring chunks of a row, every
// second one, one of rows 1 or 16 apart.
template <class Stored>
NVFP4_DEVICE int tile_offset(int row, int column) {
    constexpr int per = kPerChunk<Stored>;
    const int chunk = column / per;
    return row * kTile + (chunk ^ ((chunk / 8 * 5 ^ row ^ row / 16) & 7)) * per + column % per;
}

// Eight codes times their scale, as BF16.
NVFP4_DEVICE Chunk decode_chunk(uint32_t codes, uint32_t scale_byte) {
    const float scale = decode<E4M3, float>(scale_byte);
    Chunk chunk;
    NVFP4_UNROLL(64)
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = codes >> (8 * i);
        const float even = decode<E2M1, float>(pair & 7u) * scale;
        const float odd = decode<E2M1, float>(pair >> 4 & 7u) * scale;
        chunk.word[i] = ((bits(even) | (pair & 8u) << 28) >> 16) |
                        ((bits(odd) | (pair >> 4 & 8u) << 28) & 0xffff0000u);
    }
    return chunk;
}

// Codes have whole blocks of 16 columns; those beyond ``columns`` are padding and count as zero.
NVFP4_DEVICE Chunk load_codes(const Matrix& m, int64_t row, int64_t column) {
    const CodeMatrix& c = m.coded;
    Chunk chunk = {};
    if (row >= m.rows || column >= m.columns) return chunk;
    const uint8_t* at = c.codes + row * c.row_bytes + column / 2;
    uint32_t codes = 0;
    if (m.aligned)
        codes = *reinterpret_cast<const uint32_t*>(at);
    else
        for (int i = 0; i < 4; ++i) codes |= static_cast<uint32_t>(at[i]) << (8 * i);
    const int64_t inside = m.columns - column;
    if (inside < 8) codes &= (1u << (4 * inside)) - 1u;
    return decode_chunk(codes,
                        c.block_scale[row / c.scale_block_rows * c.scale_stride + column / kBlock]);
}

// Neighbours in a row that fill 16 bytes of a tile, zero outside of the matrix.
template <class Stored, class Element>
NVFP4_DEVICE void load_elements(const Matrix& m, int64_t row, int64_t column,
                                Element (&x)[kPerChunk<Stored>]) {
    constexpr int per = kPerChunk<Stored>;
    struct alignas(sizeof(Element) * per) Run {
        Element x[per];
    };
    const Element* at = static_cast<const Element*>(m.data) + row * m.row_stride + column;
    const int64_t inside = row < m.rows ? m.columns - column : 0;
    if (m.aligned && inside >= per) {
        const Run run = *reinterpret_cast<const Run*>(at);
        NVFP4_UNROLL(64)
        for (int i = 0; i < per; ++i) x[i] = run.x[i];
    } else {
        NVFP4_UNROLL(64)
        for (int i = 0; i < per; ++i) x[i] = i < inside ? at[i] : static_cast<Element>(0);
    }
}

template <class Stored>
NVFP4_DEVICE Chunk load_chunk(const Matrix& m, int64_t row, int64_t column);

template <>
NVFP4_DEVICE Chunk load_chunk<uint16_t>(const Matrix& m, int64_t row, int64_t column) {
    uint16_t x[8];
    load_elements<uint16_t>(m, row, column, x);
    Chunk chunk;
    NVFP4_UNROLL(64)
    for (int i = 0; i < 4; ++i)
        chunk.word[i] = x[2 * i] | static_cast<uint32_t>(x[2 * i + 1]) << 16;
    return chunk;
}

template <>
NVFP4_DEVICE Chunk load_chunk<uint32_t>(const Matrix& m, int64_t row, int64_t column) {
    Chunk chunk;
    if (m.element == Element::float16) {
        uint16_t half[4];
        load_elements<uint32_t>(m, row, column, half);
        NVFP4_UNROLL(64)
        for (int i = 0; i < 4; ++i) chunk.word[i] = bits(from_float16<float>(half[i]));
    } else {
        load_elements<uint32_t>(m, row, column, chunk.word);
    }
    return chunk;
}

// What a tile holds as it lies in memory.
template <class Stored>
constexpr Element kOf = sizeof(Stored) == 2 ? Element::bfloat16 : Element::float32;

// Rows [row, row + rows) and columns [column, column + 128) of the matrix.
template <class Stored, int rows>
NVFP4_DEVICE void load_tile(const Matrix& m, int64_t row, int64_t column, Stored* tile) {
    constexpr int chunks = kTile / kPerChunk<Stored>, count = rows * chunks, at_once = 4;
    static_assert(count % (at_once * kThreads) == 0 || count < at_once * kThreads, "whole rounds");
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (sizeof(Stored) == 2) {
        // decoding takes the registers of loads under way
        if (m.element == Element::codes) {
            NVFP4_ROLLED
            for (int n = thread; n < count; n += kThreads) {
                const int r = n / chunks, c = n % chunks * kPerChunk<Stored>;
                *reinterpret_cast<Chunk*>(tile + tile_offset<Stored>(r, c)) =
                    load_codes(m, row + r, column + c);
            }
            return;
        }
    }

    // four loads per thread are under way at once
    constexpr int together = count < at_once * kThreads ? count / kThreads : at_once;
    const bool whole = m.aligned && row + rows <= m.rows && column + kTile <= m.columns;
    if (whole && m.element == kOf<Stored>) {
        // a thread stays in its column of chunks, so that of tile_offset a constant alone changes
        constexpr int apart = kThreads / chunks;
        const int r = thread / chunks, c = thread % chunks * kPerChunk<Stored>;
        const int offset = tile_offset<Stored>(r, c);
        const Stored* at =
            static_cast<const Stored*>(m.data) + (row + r) * m.row_stride + (column + c);
        const int64_t step = apart * m.row_stride;
        NVFP4_UNROLL(4)
        for (int first = 0; first < count / kThreads; first += together) {
            Chunk chunk[together];
            NVFP4_UNROLL(4)
            for (int i = 0; i < together; ++i, at += step)
                chunk[i] = *reinterpret_cast<const Chunk*>(at);
            NVFP4_UNROLL(4)
            for (int i = 0; i < together; ++i) {
                const int below = (first + i) * apart;
                *reinterpret_cast<Chunk*>(tile + below * kTile +
                                          (offset ^ (below / 16 & 7) * kPerChunk<Stored>)) =
                    chunk[i];
            }
        }
        return;
    }

    NVFP4_ROLLED
    for (int first = thread; first < count; first += together * kThreads) {
        Chunk chunk[together];
        NVFP4_UNROLL(4)
        for (int i = 0; i < together; ++i) {
            const int n = first + i * kThreads;
            chunk[i] =
                load_chunk<Stored>(m, row + n / chunks, column + n % chunks * kPerChunk<Stored>);
        }
        NVFP4_UNROLL(4)
        for (int i = 0; i < together; ++i) {
            const int n = first + i * kThreads;
            *reinterpret_cast<Chunk*>(
                tile + tile_offset<Stored>(n / chunks, n % chunks * kPerChunk<Stored>)) = chunk[i];
        }
    }
}

// Block number ``block`` of line number ``line``: of a row of the tile, or of a column of it.
template <bool down, class Stored>
NVFP4_DEVICE void read_block(const Stored* tile, int line, int block, float (&x)[kBlock]) {
    if constexpr (down) {
        NVFP4_UNROLL(64)
        for (int i = 0; i < kBlock; ++i)
            x[i] = widen(tile[tile_offset<Stored>(block * kBlock + i, line)]);
    } else {
        constexpr int per = kPerChunk<Stored>;
        NVFP4_UNROLL(64)
        for (int c = 0; c < kBlock / per; ++c) {
            const Chunk chunk = *reinterpret_cast<const Chunk*>(
                tile + tile_offset<Stored>(line, block * kBlock + c * per));
            NVFP4_UNROLL(64)
            for (int i = 0; i < per; ++i)
                x[c * per + i] =
                    sizeof(Stored) == 4
                        ? from_bits(chunk.word[i & 3])
                        : widen(static_cast<uint16_t>(chunk.word[i / 2 & 3] >> (i % 2 * 16)));
        }
    }
}

// Blocks number block, block + 1, ... of a line. ``factor``: of each row of the tile, for elements
// of codes that are still to be multiplied by their global scale; or null.
template <bool down, class Stored, int held>
NVFP4_DEVICE void read_blocks(const Stored* tile, const float* factor, int line, int block,
                              float (&x)[held][kBlock]) {
    NVFP4_UNROLL(64)
    for (int h = 0; h < held; ++h) read_block<down>(tile, line, block + h, x[h]);
    if constexpr (down && sizeof(Stored) == 2) {
        if (factor == nullptr) return;
        NVFP4_UNROLL(64)
        for (int i = 0; i < held * kBlock; ++i)
            x[i / kBlock][i % kBlock] *= factor[block * kBlock + i];
    }
}

}  // namespace nvfp4::cuda
