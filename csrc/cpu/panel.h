// A panel: sixteen operand rows, one a lane, by up to 128 columns of the contraction axis, as float32 in the L1 cache.
// Every source is brought into this one form, so that rotation and rules are written once.
#pragma once

#include <algorithm>

#include "../codec.h"
#include "../hadamard.h"
#include "kernels.h"

NVFP4_BEGIN

constexpr int kPanel = 128;  // columns, the largest rotation group
typedef Float Panel[kPanel];
typedef uint16_t Half __attribute__((vector_size(32)));

template <Element element>
struct Reader;

template <>
struct Reader<Element::float32> {
    using Type = float;
    static NVFP4_FN Float read(const float* p) { return load(p); }
};

NVFP4_FN Word widen(const uint16_t* p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Word);
}

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

// Sixteen elements at p of which ``count`` exist; the others are zero.
template <Element element>
NVFP4_FN Float read_some(const typename Reader<element>::Type* p, int64_t count) {
    if (count >= kLanes) return Reader<element>::read(p);
    typename Reader<element>::Type some[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = p[i];
    return Reader<element>::read(some);
}

constexpr int kAhead = 32;  // lines that are a row stride apart defeat the hardware's prefetching (measured: 8 to 64 alike)

// Lanes contiguous in memory: a column of the panel is a load. All panels of a band are filled line by line, so that a
// cache line is read once, however far apart the lines are.
template <Element element>
void load_direct(const Source& source, int64_t row, int64_t column, int columns, int panels, Panel* panel) {
    const auto* base = static_cast<const typename Reader<element>::Type*>(source.data) + row;
    const int64_t lanes = source.rows - row;
    const int64_t valid = std::clamp<int64_t>(source.columns - column, 0, columns);
    for (int64_t c = 0; c < valid; ++c) {
        const auto* line = base + (column + c) * source.column_stride;
        __builtin_prefetch(line + kAhead * source.column_stride);
        __builtin_prefetch(line + kAhead * source.column_stride + 32);
        if (lanes >= panels * kLanes) {
            for (int p = 0; p < panels; ++p) panel[p][c] = Reader<element>::read(line + p * kLanes);
        } else {
            for (int p = 0; p < panels; ++p) panel[p][c] = read_some<element>(line + p * kLanes, lanes - p * kLanes);
        }
    }
    for (int p = 0; p < panels; ++p)
        for (int64_t c = valid; c < columns; ++c) panel[p][c] = Float{};
}

// Columns contiguous in memory: sixteen rows are loaded and transposed.
template <Element element>
void load_transposed(const Source& source, int64_t row, int64_t column, int columns, Panel& panel) {
    const auto* base = static_cast<const typename Reader<element>::Type*>(source.data) + column;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, source.rows - row));
    const int64_t valid = source.columns - column;
    int c = 0;
    if constexpr (element == Element::bfloat16) {
        // two neighbours travel as one 32-bit word, which halves the shuffles
        for (; c + 2 * kLanes <= columns && c + 2 * kLanes <= valid && lanes == kLanes; c += 2 * kLanes) {
            Word pairs[kLanes];
            for (int r = 0; r < kLanes; ++r) memcpy(&pairs[r], base + (row + r) * source.row_stride + c, sizeof(Word));
            transpose(pairs);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) {
                panel[c + 2 * j] = from_bits(pairs[j] << 16);
                panel[c + 2 * j + 1] = from_bits(pairs[j] & 0xffff0000u);
            }
        }
    }
    for (; c < columns; c += kLanes) {
        Float tile[kLanes];
        for (int r = 0; r < kLanes; ++r)
            tile[r] = r < lanes ? read_some<element>(base + (row + r) * source.row_stride + c, valid - c) : Float{};
        transpose(tile);
        for (int j = 0; j < kLanes; ++j) panel[c + j] = tile[j];
    }
}

// The signed E2M1 values of sixteen codes.
NVFP4_FN Float decode_codes(Word codes) {
#if defined(__AVX512F__)
    const __m512 grid = _mm512_loadu_ps(kSignedGrid);
    return (Float)_mm512_permutexvar_ps((__m512i)codes, grid);
#else
    return from_bits(bits(decode<E2M1, Float>(codes & 7u)) | (codes & 8u) << 28);
#endif
}

// Sixteen codes from eight bytes, the even column in the low nibble.
NVFP4_FN Word unpack(const uint8_t* bytes) {
    uint32_t half[2];
    memcpy(half, bytes, sizeof half);
    const Word shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    const Word words = {half[0], half[0], half[0], half[0], half[0], half[0], half[0], half[0],
                        half[1], half[1], half[1], half[1], half[1], half[1], half[1], half[1]};
    return (words >> shift) & 15u;
}

// The transpose of a decoded matrix: sixteen of its columns share a block, so a panel column is one scale and 8 bytes.
inline void load_codes(const Source& source, int64_t row, int64_t column, int columns, int panels, Panel* panel) {
    const CodeMatrix& m = source.decoded;
    const int64_t valid = std::clamp<int64_t>(source.columns - column, 0, columns);
    const Word index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t c = 0; c < valid; ++c) {
        const int64_t line = column + c;
        const float global = m.global_scale[m.row_scaled ? line : 0];
        const uint8_t* codes = m.codes + line * m.row_bytes + row / 2;
        const uint8_t* scales = m.block_scale + line / m.scale_block_rows * m.scale_stride + row / kBlock;
        for (int p = 0; p < panels; ++p) {
            const float scale = decode<E4M3, float>(scales[p]);
            const Float x = (decode_codes(unpack(codes + 8 * p)) * scale) * global;
            const int64_t lanes = source.rows - row - p * kLanes;  // the padding of the saved operand is cut off
            panel[p][c] = lanes < kLanes ? select(index < static_cast<uint32_t>(lanes), x, Float{}) : x;
        }
    }
    for (int p = 0; p < panels; ++p)
        for (int64_t c = valid; c < columns; ++c) panel[p][c] = Float{};
}

// Panels that read neighbouring memory, taken together.
constexpr int kBand = 4;

NVFP4_FN bool reads_across(const Source& source) { return source.row_stride == 1 || source.element == Element::codes; }

template <Element element>
NVFP4_FN void load_elements(const Source& source, int64_t row, int64_t column, int columns, int panels, Panel* panel) {
    if (reads_across(source)) return load_direct<element>(source, row, column, columns, panels, panel);
    load_transposed<element>(source, row, column, columns, *panel);
}

// Panel p gets operand rows row + 16 p and following. More than one panel only where ``reads_across``.
inline void load_panels(const Source& source, int64_t row, int64_t column, int columns, int panels, Panel* panel) {
    switch (source.element) {
        case Element::float32: return load_elements<Element::float32>(source, row, column, columns, panels, panel);
        case Element::bfloat16: return load_elements<Element::bfloat16>(source, row, column, columns, panels, panel);
        case Element::float16: return load_elements<Element::float16>(source, row, column, columns, panels, panel);
        case Element::codes: return load_codes(source, row, column, columns, panels, panel);
    }
}

// The signs, scales and stages of a rotation, worked out once for a tensor.
struct Rotation {
    int group, rounds;
    bool fixed;
    float scale[kMaxRounds];
    uint32_t sign[kMaxRounds][kMaxGroup];  // the sign bit to flip, or 0

    explicit Rotation(const Turn& turn) : group(turn.group), rounds(turn.rounds), fixed(turn.fixed) {
        for (int r = 0; r < rounds && group > 0; ++r) {
            uint32_t word[4] = {kNvidiaSigns, 0, 0, 0};
            if (!fixed) sign_bits(turn.sign_seed, r, word);
            for (int j = 0; j < group; ++j) sign[r][j] = (word[j / 32] >> (j % 32) & 1u) << 31;
            scale[r] = fixed ? 0.25f : round_scale(r, rounds, __builtin_ctz(group));
        }
    }

    void apply(Panel& panel, int columns) const {
        for (int start = 0; group > 0 && start < columns; start += group) {
            if (fixed)
                for (int j = 0; j < group; ++j) panel[start + j] = to_bfloat16(panel[start + j]);
            for (int r = 0; r < rounds; ++r) turn(panel + start, r);
            if (fixed)
                for (int j = 0; j < group; ++j) panel[start + j] = to_bfloat16(panel[start + j]);
        }
    }

   private:
    // Strides 1 to 8 on sixteen neighbours in registers, then the larger strides on what lies sixteen apart.
    void turn(Float* x, int r) const {
        const float last = group == 16 ? scale[r] : 1.0f;
        for (int i = 0; i < group; i += 16) {
            Float v[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) v[j] = from_bits(bits(x[i + j]) ^ sign[r][i + j]);
            fwht(v);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) x[i + j] = v[j] * last;
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
            for (int j = 0; j < n; ++j) v[j] = x[i + 16 * j];
            fwht(v);
#pragma GCC unroll 8
            for (int j = 0; j < n; ++j) x[i + 16 * j] = v[j] * scale;
        }
    }
};

NVFP4_END
