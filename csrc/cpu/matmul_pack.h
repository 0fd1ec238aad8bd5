// Operands into packed panels, the order in which a multiplier reads them:
//
//     cells[tile][step of the contraction][row of the tile]
//
// A tile has as many rows as a multiplier has sums in a column: 6, 14 or two vectors. Rows beyond
// the matrix are zero. Codes are decoded on the way and 16-bit elements widened, both exactly;
// nothing else is written, so a product needs no copy of its operands in another format.
//
// A tile is packed in parts of at most kLanes rows, as what turns rows into columns is a square of
// vectors. Three ways: codes block by block, elements contiguous along the contraction in squares,
// elements contiguous along the rows line by line.
#pragma once

#include <algorithm>
#include <type_traits>

#include "elements.h"

NVFP4_BEGIN

// Tiles packed at a time by one thread: where rows are contiguous, they share cache lines.
constexpr int kTogether = 8;

// The first ``width`` lanes of x.
template <int width>
NVFP4_FN void store_part(float* p, Float x) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << width) - 1u), (__m512)x);
#else
    static_assert(width == 8 || width == 6, "masked stores are slow where AVX2 is");
    if (width == 8) return store(p, x);
    _mm_storeu_ps(p, _mm256_castps256_ps128((__m256)x));
    _mm_storel_pi(reinterpret_cast<__m64*>(p + 4), _mm256_extractf128_ps((__m256)x, 1));
#endif
}

// Calls visit(part, width) for the parts of a tile, each at most kLanes rows wide, both as types
// whose value is known to the compiler.
template <int tile_rows, int part = 0, class Visit>
NVFP4_FN void for_parts(Visit visit) {
    constexpr int width = tile_rows - part < kLanes ? tile_rows - part : kLanes;
    visit(std::integral_constant<int, part>{}, std::integral_constant<int, width>{});
    if constexpr (part + width < tile_rows) for_parts<tile_rows, part + width>(visit);
}

struct ScaleTable {
    float value[128];
    ScaleTable() {
        for (uint32_t s = 0; s < 128; ++s) value[s] = decode_scale(s);
    }
};

// One block of the contraction, kLanes rows of which ``rows`` exist: column[k] holds e2m1 * e4m3 of
// every row. No global scales: the way out multiplies by them.
NVFP4_FN void decode_block(const CodeMatrix& m, const ScaleTable& scales, int64_t row, int64_t rows,
                           int64_t block, Float (&column)[kBlock]) {
    uint32_t half[2][kLanes] = {};
    float scale[kLanes] = {};
    // a division in the place of this shift took half the time of packing
    const int tall = m.scale_block_rows == 1 ? 0 : 4;
    for (int64_t r = 0; r < rows; ++r) {
        uint64_t codes;
        memcpy(&codes, m.codes + (row + r) * m.row_bytes + block * 8, sizeof codes);
        half[0][r] = static_cast<uint32_t>(codes);
        half[1][r] = static_cast<uint32_t>(codes >> 32);
        const uint8_t byte = m.block_scale[((row + r) >> tall) * m.scale_stride + block];
        scale[r] = scales.value[byte & 127u];
    }

    // a lane holds the eight codes of its row; shifted by four bits per column they come in turn
    const Float s = load(scale);
    const Word low = load(half[0]);
    const Word high = load(half[1]);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
        column[k] = decode_codes(low >> 4 * k) * s;
        column[8 + k] = decode_codes(high >> 4 * k) * s;
    }
}

// Tiles [first, last) of codes, block by block: store(tile, block, part, width, column) gets the
// sixteen columns of a part. depth: the padded contraction.
template <int tile_rows, class Store>
void for_decoded_blocks(const CodeMatrix& m, int64_t depth, int64_t first, int64_t last,
                        Store store_block) {
    static const ScaleTable scales;
    for (int64_t tile = first; tile < last; ++tile)
        for_parts<tile_rows>([&](auto part, auto width) {
            const int64_t row = tile * tile_rows + part;
            const int64_t rows = std::clamp<int64_t>(m.rows - row, 0, width);
            for (int64_t block = 0; block < depth / kBlock; ++block) {
                Float column[kBlock];
                decode_block(m, scales, row, rows, block, column);
                store_block(tile, block, part, width, column);
            }
        });
}

template <int tile_rows>
void pack_codes(const CodeMatrix& m, int64_t depth, float* out, int64_t first, int64_t last) {
    for_decoded_blocks<tile_rows>(
        m, depth, first, last,
        [&](int64_t tile, int64_t block, auto part, auto width, const Float(&column)[kBlock]) {
            float* to = out + (tile * depth + block * kBlock) * tile_rows + part;
#pragma GCC unroll 16
            for (int k = 0; k < kBlock; ++k) store_part<width>(to + k * tile_rows, column[k]);
        });
}

// Elements contiguous along the contraction: squares of kLanes rows are turned in registers.
template <Element element, int tile_rows>
void pack_along(const Source& s, float* out, int64_t first, int64_t last) {
    const auto* base = static_cast<const typename Reader<element>::Type*>(s.data);
    for (int64_t tile = first; tile < last; ++tile)
        for_parts<tile_rows>([&](auto part, auto width) {
            const int64_t row = tile * tile_rows + part;
            const int64_t rows = std::clamp<int64_t>(s.rows - row, 0, width);
            for (int64_t k = 0; k < s.columns; k += kLanes) {
                const int64_t left = std::min<int64_t>(kLanes, s.columns - k);
                Float square[kLanes];
                read_square<element, width>(base + row * s.row_stride + k, s.row_stride, rows, left,
                                            square);

                float* to = out + (tile * s.columns + k) * tile_rows + part;
                if (left == kLanes) {
#pragma GCC unroll 16
                    for (int j = 0; j < kLanes; ++j)
                        store_part<width>(to + j * tile_rows, square[j]);
                } else {
                    for (int j = 0; j < left; ++j) store_part<width>(to + j * tile_rows, square[j]);
                }
            }
        });
}

// Elements contiguous along the rows: a step of the contraction is a line of memory, read once for
// all these tiles.
template <Element element, int tile_rows>
void pack_across(const Source& s, float* out, int64_t first, int64_t last) {
    constexpr int kLinesAhead = 16;  // lines a stride apart defeat the hardware's prefetching
    const auto* base = static_cast<const typename Reader<element>::Type*>(s.data);
    const int64_t end = std::min(last * tile_rows, s.rows);
    for (int64_t k = 0; k < s.columns; ++k) {
        const auto* line = base + k * s.column_stride;
        if (k + kLinesAhead < s.columns)
            for (int64_t row = first * tile_rows; row < end; row += 64 / sizeof(*base))
                __builtin_prefetch(line + kLinesAhead * s.column_stride + row);

        for (int64_t tile = first; tile < last; ++tile)
            for_parts<tile_rows>([&](auto part, auto width) {
                const int64_t row = tile * tile_rows + part;
                const int64_t left = s.rows - row;
                float* to = out + (tile * s.columns + k) * tile_rows + part;
                store_part<width>(to, left > 0 ? read_some<element>(line + row, left) : Float{});
            });
    }
}

template <Element element, int tile_rows>
void pack_elements(const Source& s, float* out, int64_t first, int64_t last) {
    if (s.column_stride == 1)
        pack_along<element, tile_rows>(s, out, first, last);
    else
        pack_across<element, tile_rows>(s, out, first, last);
}

template <int tile_rows>
void pack_floats(const Factor& f, int64_t depth, float* out, int64_t first, int64_t last) {
    if (f.codes.codes) return pack_codes<tile_rows>(f.codes, depth, out, first, last);
    switch (f.elements.element) {
        case Element::float32:
            return pack_elements<Element::float32, tile_rows>(f.elements, out, first, last);
        case Element::bfloat16:
            return pack_elements<Element::bfloat16, tile_rows>(f.elements, out, first, last);
        default: return pack_elements<Element::float16, tile_rows>(f.elements, out, first, last);
    }
}

NVFP4_END
