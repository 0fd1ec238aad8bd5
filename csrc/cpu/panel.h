// A panel: sixteen operand rows by up to 128 columns of the contraction axis, as float32 in the L1
// cache. Every source is brought into this one form, so that rotation and rules are written once.
//
// A row is a lane. Where a vector has fewer than sixteen lanes, the rows are kParts vectors: one of
// 16 lanes (AVX-512), two of 8 (AVX2), four of 4. A panel is vectors in this order:
//
//     block 0: part 0, columns 0 .. 15 | part 1, columns 0 .. 15 | ...     kBlockStride vectors
//     block 1: part 0, columns 16 .. 31 | ...
//
// So the sixteen columns of a block lie side by side for one part, which is what a rule on 1x16
// blocks takes, and all parts of them side by side too, which is a 16x16 tile.
//
// Three ways lead into it:
//     load_direct      rows contiguous in memory (the transpose of a row-major matrix): a column of
//                      the panel is a load
//     load_transposed  columns contiguous: kLanes rows are loaded and turned in registers
//     load_codes       a quantised matrix, decoded, as its transpose
// Whoever reads across rows takes kBand panels at a time, since they share cache lines.
#pragma once

#include <algorithm>

#include "elements.h"

NVFP4_BEGIN

constexpr int kRows = 16;
constexpr int kParts = kRows / kLanes;
constexpr int kPanel = 128;  // columns, the largest rotation group
constexpr int kPanelBlocks = kPanel / kBlock;
constexpr int kBlockStride = kBlock * kParts;
typedef Float Panel[kPanel * kParts];

// Where a panel keeps a column of a part.
NVFP4_FN int64_t place(int64_t column, int part) {
    return (column / kBlock * kParts + part) * kBlock + column % kBlock;
}

// Block number b of each row of a part, a vector per column; and the tile of all rows.
NVFP4_FN auto block(const Panel& panel, int b, int part) -> const Float (&)[kBlock] {
    return *reinterpret_cast<const Float(*)[kBlock]>(panel + place(b * kBlock, part));
}
NVFP4_FN auto block(Panel& panel, int b, int part) -> Float (&)[kBlock] {
    return *reinterpret_cast<Float(*)[kBlock]>(panel + place(b * kBlock, part));
}
NVFP4_FN auto tile(Panel& panel, int b) -> Float (&)[kBlockStride] {
    return *reinterpret_cast<Float(*)[kBlockStride]>(panel + place(b * kBlock, 0));
}

// Lines that are a row stride apart defeat the hardware's prefetching: with this one, transposed
// rtn of 4096^2 took 7.3 ms instead of 12.8. 8 to 64 lines ahead measure alike.
constexpr int kAhead = 32;

// Zeros for the columns beyond the matrix.
NVFP4_FN void clear(int panels, int64_t valid, int columns, Panel* panel) {
    for (int p = 0; p < panels; ++p)
        for (int64_t c = valid; c < columns; ++c)
            for (int part = 0; part < kParts; ++part) panel[p][place(c, part)] = Float{};
}

// Lanes contiguous in memory. All panels of a band are filled line by line, so that a cache line is
// read once, however far apart the lines are.
template <Element element>
void load_direct(const Source& source, int64_t row, int64_t column, int columns, int panels,
                 Panel* panel) {
    const auto* base = static_cast<const typename Reader<element>::Type*>(source.data) + row;
    const int64_t lanes = source.rows - row;
    const int64_t valid = std::clamp<int64_t>(source.columns - column, 0, columns);
    const bool whole = lanes >= panels * kRows;

    for (int64_t c = 0; c < valid; ++c) {
        const auto* line = base + (column + c) * source.column_stride;
        __builtin_prefetch(line + kAhead * source.column_stride);
        __builtin_prefetch(line + kAhead * source.column_stride + 32);

        for (int p = 0; whole && p < panels; ++p)
            for (int part = 0; part < kParts; ++part)
                panel[p][place(c, part)] = Reader<element>::read(line + p * kRows + part * kLanes);
        for (int lane = 0; !whole && lane < panels * kRows; lane += kLanes)
            panel[lane / kRows][place(c, lane % kRows / kLanes)] =
                read_some<element>(line + lane, lanes - lane);
    }
    clear(panels, valid, columns, panel);
}

// Columns contiguous in memory.
template <Element element>
void load_transposed(const Source& source, int64_t row, int64_t column, int columns, int part,
                     Float* panel) {
    const auto* base = static_cast<const typename Reader<element>::Type*>(source.data) + column;
    const int64_t stride = source.row_stride;
    const int64_t lanes = std::clamp<int64_t>(source.rows - row, 0, kLanes);
    const int64_t valid = source.columns - column;
    int c = 0;

    // two neighbours in BF16 travel as one 32-bit word, which halves the shuffles
    if constexpr (element == Element::bfloat16) {
        const int whole = lanes == kLanes ? static_cast<int>(std::min<int64_t>(columns, valid)) : 0;
        for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
            Word pairs[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r)
                memcpy(&pairs[r], base + (row + r) * stride + c, sizeof(Word));
            transpose(pairs);

            // with sixteen lanes these are two blocks, which then lie side by side
            Float* to = panel + place(c, part);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) {
                to[2 * j] = from_bits(pairs[j] << 16);
                to[2 * j + 1] = from_bits(pairs[j] & 0xffff0000u);
            }
        }
    }

    for (; c < columns; c += kLanes) {
        Float square[kLanes];
        read_square<element>(base + row * stride + c, stride, lanes, valid - c, square);
        Float* to = panel + place(c, part);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) to[j] = square[j];
    }
}

// The transpose of a decoded matrix: sixteen of its columns share a block, so a panel column is one
// scale and 8 bytes.
inline void load_codes(const Source& source, int64_t row, int64_t column, int columns, int panels,
                       Panel* panel) {
    const CodeMatrix& m = source.decoded;
    const int64_t valid = std::clamp<int64_t>(source.columns - column, 0, columns);
    Word index;
    for (int i = 0; i < kLanes; ++i) index[i] = static_cast<uint32_t>(i);

    for (int64_t c = 0; c < valid; ++c) {
        const int64_t line = column + c;
        const float global = m.global_scale[m.row_scaled ? line : 0];
        const uint8_t* codes = m.codes + line * m.row_bytes + row / 2;
        const uint8_t* scales =
            m.block_scale + line / m.scale_block_rows * m.scale_stride + row / kBlock;

        for (int p = 0; p < panels; ++p) {
            const float scale = decode<E4M3, float>(scales[p]);
            for (int part = 0; part < kParts; ++part) {
                const uint8_t* bytes = codes + 8 * p + kLanes / 2 * part;
                const Float x = (decode_codes(unpack(bytes)) * scale) * global;
                // the padding of the saved operand is cut off
                const int64_t lanes =
                    std::max<int64_t>(0, source.rows - row - p * kRows - part * kLanes);
                panel[p][place(c, part)] =
                    lanes < kLanes ? select(index < static_cast<uint32_t>(lanes), x, Float{}) : x;
            }
        }
    }
    clear(panels, valid, columns, panel);
}

// Panels that read neighbouring memory, taken together.
constexpr int kBand = 4;

NVFP4_FN bool reads_across(const Source& source) {
    return source.row_stride == 1 || source.element == Element::codes;
}

template <Element element>
NVFP4_FN void load_elements(const Source& source, int64_t row, int64_t column, int columns,
                            int panels, Panel* panel) {
    if (reads_across(source))
        return load_direct<element>(source, row, column, columns, panels, panel);
    for (int part = 0; part < kParts; ++part)
        load_transposed<element>(source, row + part * kLanes, column, columns, part, *panel);
}

// Panel p gets operand rows row + 16 p and following. More than one panel only where
// ``reads_across``.
inline void load_panels(const Source& source, int64_t row, int64_t column, int columns, int panels,
                        Panel* panel) {
    switch (source.element) {
        case Element::float32:
            return load_elements<Element::float32>(source, row, column, columns, panels, panel);
        case Element::bfloat16:
            return load_elements<Element::bfloat16>(source, row, column, columns, panels, panel);
        case Element::float16:
            return load_elements<Element::float16>(source, row, column, columns, panels, panel);
        case Element::codes: return load_codes(source, row, column, columns, panels, panel);
    }
}

// Fewer elements than this are one thread's: waking others is taken to cost more than it saves.
constexpr int64_t kSerialElements = 1 << 15;

NVFP4_FN int threads_for(const QuantizeArgs& args) {
    return args.source.rows * args.padded_columns < kSerialElements ? 1 : args.threads;
}

NVFP4_FN int64_t band_of(const Source& source) { return reads_across(source) ? kBand : 1; }

// Calls visit(panel, row, column, columns) for ``count`` panels from (row, column) down.
template <class Visit>
NVFP4_FN void visit_band(const QuantizeArgs& args, int64_t row, int64_t column, int count,
                         Visit visit) {
    Panel panel[kBand];
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, args.padded_columns - column));
    load_panels(args.source, row, column, columns, count, panel);
    for (int p = 0; p < count; ++p) visit(panel[p], row + p * kRows, column, columns);
}

// Calls visit for every panel; columns of one row band in ascending order, on one thread.
template <class Visit>
void for_panels(const QuantizeArgs& args, Visit visit) {
    const int64_t panels = ceil_div(args.source.rows, kRows);
    const int64_t band = band_of(args.source);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(args))
    for (int64_t first = 0; first < panels; first += band) {
        const int count = static_cast<int>(std::min(band, panels - first));
        for (int64_t column = 0; column < args.padded_columns; column += kPanel)
            visit_band(args, first * kRows, column, count, visit);
    }
}

NVFP4_END
