// A panel: sixteen operand rows by up to 128 columns of the contraction axis, as float32 in the L1
// cache. Every source is brought into this one form, so that rotation and rules are written once.
//
// A row is a lane. Where a vector has fewer than sixteen lanes, the rows are kParts vectors: 2 of 8
// (AVX2), 4 of 4. Sixteen columns of one part lie side by side, a block as the rules want it; then
// those of the next part, which makes a tile.
#pragma once

#include <algorithm>

#include "../codec.h"
#include "../hadamard.h"
#include "kernels.h"

NVFP4_BEGIN

constexpr int kRows = 16;
constexpr int kParts = kRows / kLanes;
constexpr int kPanel = 128;  // columns, the largest rotation group
typedef Float Panel[kPanel * kParts];

// Where a panel keeps a column of a part, and how far apart blocks of sixteen columns are.
NVFP4_FN int64_t place(int64_t column, int part) {
    return (column / kBlock * kParts + part) * kBlock + column % kBlock;
}
constexpr int kBlockStride = kBlock * kParts;

template <Element element>
struct Reader;

template <>
struct Reader<Element::float32> {
    using Type = float;
    static NVFP4_FN Float read(const float* p) { return load(p); }
};

template <>
struct Reader<Element::bfloat16> {
    using Type = uint16_t;
    static NVFP4_FN Float read(const uint16_t* p) { return from_bits(widen(p) << 16); }
};

template <>
struct Reader<Element::float16> {
    using Type = uint16_t;
    static NVFP4_FN Float read(const uint16_t* p) { return from_float16<Float>(widen(p)); }
};

// kLanes elements at p of which ``count`` exist; the others are zero.
template <Element element>
NVFP4_FN Float read_some(const typename Reader<element>::Type* p, int64_t count) {
    if (count >= kLanes) return Reader<element>::read(p);
    typename Reader<element>::Type some[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = p[i];
    return Reader<element>::read(some);
}

// lines that are a row stride apart defeat the hardware's prefetching (measured: 8 to 64 alike)
constexpr int kAhead = 32;

// Zeros for the columns beyond the matrix.
NVFP4_FN void clear(int panels, int64_t valid, int columns, Panel* panel) {
    for (int p = 0; p < panels; ++p)
        for (int64_t c = valid; c < columns; ++c)
            for (int part = 0; part < kParts; ++part) panel[p][place(c, part)] = Float{};
}

// Lanes contiguous in memory: a column of the panel is a load. All panels of a band are filled line
// by line, so that a cache line is read once, however far apart the lines are.
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

// Columns contiguous in memory: kLanes rows are loaded and transposed.
template <Element element>
void load_transposed(const Source& source, int64_t row, int64_t column, int columns, int part,
                     Float* panel) {
    const auto* base = static_cast<const typename Reader<element>::Type*>(source.data) + column;
    const int lanes = static_cast<int>(std::clamp<int64_t>(source.rows - row, 0, kLanes));
    const int64_t valid = source.columns - column;
    int c = 0;
    if constexpr (element == Element::bfloat16) {
        // two neighbours travel as one 32-bit word, which halves the shuffles
        for (; c + 2 * kLanes <= columns && c + 2 * kLanes <= valid && lanes == kLanes;
             c += 2 * kLanes) {
            Word pairs[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r)
                memcpy(&pairs[r], base + (row + r) * source.row_stride + c, sizeof(Word));
            transpose(pairs);
            // with sixteen lanes two blocks, which then lie side by side
            Float* to = panel + place(c, part);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) {
                to[2 * j] = from_bits(pairs[j] << 16);
                to[2 * j + 1] = from_bits(pairs[j] & 0xffff0000u);
            }
        }
    }
    for (; c < columns; c += kLanes) {
        Float tile[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
            tile[r] = r < lanes
                          ? read_some<element>(base + (row + r) * source.row_stride + c, valid - c)
                          : Float{};
        transpose(tile);
        Float* to = panel + place(c, part);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) to[j] = tile[j];
    }
}

// The signed E2M1 values of kLanes codes, below 16.
NVFP4_FN Float decode_codes(Word codes) {
#if defined(__AVX512F__)
    const __m512 grid = _mm512_loadu_ps(kSignedGrid);
    return (Float)_mm512_permutexvar_ps((__m512i)codes, grid);
#elif defined(__AVX2__)
    const __m256 grid = _mm256_loadu_ps(kSignedGrid);  // by the three bits of the magnitude
    return from_bits((Word)_mm256_permutevar8x32_ps(grid, (__m256i)codes) | (codes & 8u) << 28);
#else
    return from_bits(bits(decode<E2M1, Float>(codes & 7u)) | (codes & 8u) << 28);
#endif
}

// kLanes codes from half as many bytes, the even column in the low nibble.
NVFP4_FN Word unpack(const uint8_t* bytes) {
#if defined(__AVX512F__)
    uint32_t half[2];
    memcpy(half, bytes, sizeof half);
    const Word shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    const Word words = {half[0], half[0], half[0], half[0], half[0], half[0], half[0], half[0],
                        half[1], half[1], half[1], half[1], half[1], half[1], half[1], half[1]};
    return (words >> shift) & 15u;
#elif defined(__AVX2__)
    uint32_t eight;
    memcpy(&eight, bytes, sizeof eight);
    return (same<Word>(eight) >> Word{0, 4, 8, 12, 16, 20, 24, 28}) & 15u;
#else
    // each shifted to the top of 16 bits by a product, as SSE2 has no shift of its own for every
    // lane
    uint16_t four;
    memcpy(&four, bytes, sizeof four);
    const Half top = (Half{} + four) * Half{4096, 256, 16, 1} >> 12;
    return __builtin_convertvector(top, Word);
#endif
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
                const Float x =
                    (decode_codes(unpack(codes + 8 * p + kLanes / 2 * part)) * scale) * global;
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

// The signs, scales and stages of a rotation, worked out once for a tensor.
struct Rotation {
    int group, rounds;
    bool fixed;
    float scale[kMaxRounds];
    uint32_t sign[kMaxRounds][kMaxGroup];  // the sign bit to flip, or 0

    explicit Rotation(const Turn& turn)
        : group(turn.group), rounds(turn.rounds), fixed(turn.fixed) {
        for (int r = 0; r < rounds && group > 0; ++r) {
            uint32_t word[4] = {kNvidiaSigns, 0, 0, 0};
            if (!fixed) sign_bits(turn.sign_seed, r, word);
            for (int j = 0; j < group; ++j) sign[r][j] = (word[j / 32] >> (j % 32) & 1u) << 31;
            scale[r] = fixed ? 0.25f : round_scale(r, rounds, __builtin_ctz(group));
        }
    }

    void apply(Panel& panel, int columns) const {
        for (int start = 0; group > 0 && start < columns; start += group)
            for (int part = 0; part < kParts; ++part) {
                Float* x = panel + place(start, part);
                if (fixed) round_group(x);
                for (int r = 0; r < rounds; ++r) turn(x, r);
                if (fixed) round_group(x);
            }
    }

private:
    void round_group(Float* x) const {
        for (int i = 0; i < group / 16; ++i)
            for (int j = 0; j < 16; ++j)
                x[i * kBlockStride + j] = to_bfloat16(x[i * kBlockStride + j]);
    }

    // Strides 1 to 8 on sixteen neighbours in registers, then the larger strides on what lies
    // sixteen apart.
    void turn(Float* x, int r) const {
        const float last = group == 16 ? scale[r] : 1.0f;
        for (int i = 0; i < group / 16; ++i) {
            Float* y = x + i * kBlockStride;
            Float v[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) v[j] = from_bits(bits(y[j]) ^ sign[r][16 * i + j]);
            fwht(v);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) y[j] = v[j] * last;
        }
        if (group == 32) outer<2>(x, scale[r]);
        if (group == 64) outer<4>(x, scale[r]);
        if (group == 128) outer<8>(x, scale[r]);
    }

    template <int n>
    static void outer(Float* x, float scale) {
        for (int i = 0; i < 16; ++i) {
            Float v[n];
#pragma GCC unroll 8
            for (int j = 0; j < n; ++j) v[j] = x[i + kBlockStride * j];
            fwht(v);
#pragma GCC unroll 8
            for (int j = 0; j < n; ++j) x[i + kBlockStride * j] = v[j] * scale;
        }
    }
};

NVFP4_END
