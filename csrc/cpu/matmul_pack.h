// Operands into packed panels, the order in which the multiplier reads them: [tile][step of the
// contraction][row of the tile], rows beyond the matrix zero. Codes are decoded on the way, 16-bit
// elements widened; nothing else is written.
#pragma once

#include "matmul_lanes.h"

NVFP4_BEGIN

NVFP4_FN int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

struct ScaleTable {
    float value[128];
    ScaleTable() {
        for (uint32_t s = 0; s < 128; ++s)
            value[s] = s > E4M3::largest_code ? NAN : decode<E4M3, float>(s);
    }
};

// One block of the contraction, kWide rows of which ``rows`` exist: column[k] holds e2m1 * e4m3 of
// every row.
NVFP4_FN void decode_block(const CodeMatrix& m, const ScaleTable& scales, int64_t row, int64_t rows,
                           int64_t block, Wide (&column)[kBlock]) {
    uint32_t half[2][kWide] = {};
    float scale[kWide] = {};
    // a division in its place took half the time of packing
    const int tall = m.scale_block_rows == 1 ? 0 : 4;
    for (int64_t r = 0; r < rows; ++r) {
        uint64_t codes;
        memcpy(&codes, m.codes + (row + r) * m.row_bytes + block * 8, sizeof codes);
        half[0][r] = static_cast<uint32_t>(codes);
        half[1][r] = static_cast<uint32_t>(codes >> 32);
        scale[r] = scales.value[m.block_scale[((row + r) >> tall) * m.scale_stride + block] & 127u];
    }
    const Wide s = load_wide(scale);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        const WideWord codes = load_words(half[h]);
        column[8 * h + 0] = product(e2m1_of<0>(codes), s);
        column[8 * h + 1] = product(e2m1_of<4>(codes), s);
        column[8 * h + 2] = product(e2m1_of<8>(codes), s);
        column[8 * h + 3] = product(e2m1_of<12>(codes), s);
        column[8 * h + 4] = product(e2m1_of<16>(codes), s);
        column[8 * h + 5] = product(e2m1_of<20>(codes), s);
        column[8 * h + 6] = product(e2m1_of<24>(codes), s);
        column[8 * h + 7] = product(e2m1_of<28>(codes), s);
    }
}

// tiles packed at a time: where rows are contiguous, they share cache lines
constexpr int kTogether = 8;

// Calls visit.template operator()<width>(part) for the parts of a tile, each at most kWide rows
// wide.
template <int tile_rows, int part = 0, class Visit>
NVFP4_FN void for_parts(Visit visit) {
    constexpr int width = tile_rows - part < kWide ? tile_rows - part : kWide;
    visit(std::integral_constant<int, part>{}, std::integral_constant<int, width>{});
    if constexpr (part + width < tile_rows) for_parts<tile_rows, part + width>(visit);
}

// Tiles [first, last) of codes; depth: the padded contraction.
template <int tile_rows>
void pack_codes(const CodeMatrix& m, int64_t depth, float* out, int64_t first, int64_t last) {
    static const ScaleTable scales;
    for (int64_t tile = first; tile < last; ++tile)
        for_parts<tile_rows>([&](auto part, auto width) {
            const int64_t row = tile * tile_rows + part,
                          rows = std::clamp<int64_t>(m.rows - row, 0, width);
            for (int64_t block = 0; block < depth / kBlock; ++block) {
                Wide column[kBlock];
                decode_block(m, scales, row, rows, block, column);
                float* to = out + (tile * depth + block * kBlock) * tile_rows + part;
#pragma GCC unroll 16
                for (int k = 0; k < kBlock; ++k) store_part<width>(to + k * tile_rows, column[k]);
            }
        });
}

// Elements contiguous along the contraction: squares of kWide rows are transposed in registers.
template <Element element, int tile_rows>
void pack_along(const Source& s, float* out, int64_t first, int64_t last) {
    const auto* base = static_cast<const typename Reading<element>::Type*>(s.data);
    for (int64_t tile = first; tile < last; ++tile)
        for_parts<tile_rows>([&](auto part, auto width) {
            const int64_t row = tile * tile_rows + part,
                          rows = std::clamp<int64_t>(s.rows - row, 0, width);
            for (int64_t k = 0; k < s.columns; k += kWide) {
                const int64_t left = std::min<int64_t>(kWide, s.columns - k);
                const auto* corner = base + row * s.row_stride + k;
                Wide square[kWide];
                if (rows == width && left == kWide) {
#pragma GCC unroll 16
                    for (int r = 0; r < kWide; ++r)
                        square[r] =
                            r < width ? Reading<element>::read(corner + r * s.row_stride) : zeros();
                } else {
                    for (int r = 0; r < kWide; ++r)
                        square[r] = r < rows ? read_first<element>(corner + r * s.row_stride, left)
                                             : zeros();
                }
                transpose_wide(square);
                float* to = out + (tile * s.columns + k) * tile_rows + part;
                if (left == kWide) {
#pragma GCC unroll 16
                    for (int j = 0; j < kWide; ++j)
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
    constexpr int kAhead = 16;  // lines a stride apart defeat the hardware's prefetching
    const auto* base = static_cast<const typename Reading<element>::Type*>(s.data);
    for (int64_t k = 0; k < s.columns; ++k) {
        const auto* line = base + k * s.column_stride;
        if (k + kAhead < s.columns)
            for (int64_t row = first * tile_rows; row < std::min(last * tile_rows, s.rows);
                 row += 64 / sizeof(*base))
                __builtin_prefetch(line + kAhead * s.column_stride + row);
        for (int64_t tile = first; tile < last; ++tile)
            for_parts<tile_rows>([&](auto part, auto width) {
                const int64_t row = tile * tile_rows + part;
                float* to = out + (tile * s.columns + k) * tile_rows + part;
                store_part<width>(
                    to, s.rows - row > 0 ? read_first<element>(line + row, s.rows - row) : zeros());
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
