// The quantise pipeline: panels in, rotation, one rule per block, codes and scales out.
#pragma once

#include <atomic>
#include <vector>

#include "../quantizers.h"
#include "panel.h"
#include "tile.h"

NVFP4_BEGIN

constexpr int kPanelBlocks = kPanel / kBlock;
constexpr int64_t kSerialElements = 1 << 15;  // below this, waking a thread costs more than it saves (measured)

NVFP4_FN int threads_for(const QuantizeArgs& args) {
    return args.source.rows * args.padded_columns < kSerialElements ? 1 : args.threads;
}

// Calls visit(panel, row, column, columns) for every panel, rotated; columns of one row band in ascending order.
template <class Visit>
void for_panels(const QuantizeArgs& args, Visit visit) {
    const Rotation rotation(args.turn);
    const int64_t panels = (args.source.rows + kLanes - 1) / kLanes, band = reads_across(args.source) ? kBand : 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(args))
    for (int64_t first = 0; first < panels; first += band) {
        Panel panel[kBand];
        const int count = static_cast<int>(std::min(band, panels - first));
        for (int64_t column = 0; column < args.padded_columns; column += kPanel) {
            const int columns = static_cast<int>(std::min<int64_t>(kPanel, args.padded_columns - column));
            load_panels(args.source, first * kLanes, column, columns, count, panel);
            for (int p = 0; p < count; ++p) {
                rotation.apply(panel[p], columns);
                visit(panel[p], (first + p) * kLanes, column, columns);
            }
        }
    }
}

// Largest |x| as bits over contiguous elements; NaN comes out largest.
template <Element element>
uint32_t line_amax(const typename Reader<element>::Type* p, int64_t count) {
    uint32_t largest = 0;
    int64_t i = 0;
    if constexpr (element == Element::bfloat16) {  // the order of the magnitudes is that of their 16 bits
        typedef uint16_t Halves __attribute__((vector_size(64)));
        Halves most[4] = {};
        for (; i + 128 <= count; i += 128) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                Halves h;
                memcpy(&h, p + i + 32 * j, sizeof h);
                h = h & static_cast<uint16_t>(0x7fff);
                most[j] = h > most[j] ? h : most[j];
            }
        }
        for (int j = 0; j < 4; ++j)
            for (int k = 0; k < 32; ++k) largest = larger_bits(largest, static_cast<uint32_t>(most[j][k]) << 16);
    } else {
        Word most[4] = {};
        for (; i + 64 <= count; i += 64) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                most[j] = larger_bits(most[j], bits(Reader<element>::read(p + i + 16 * j)) & 0x7fffffffu);
        }
        for (int j = 0; j < 4; ++j) largest = larger_bits(largest, lane_max_bits(from_bits(most[j])));
    }
    for (; i < count; i += kLanes)
        largest = larger_bits(largest, lane_max_bits(magnitude(read_some<element>(p + i, count - i))));
    return largest;
}

template <Element element>
uint32_t dense_amax(const QuantizeArgs& args) {
    const Source& source = args.source;
    const bool direct = source.row_stride == 1;
    const int64_t length = direct ? source.rows : source.columns, stride = direct ? source.column_stride : source.row_stride;
    const int64_t lines = direct ? source.columns : source.rows;
    const auto* data = static_cast<const typename Reader<element>::Type*>(source.data);
    uint32_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(threads_for(args)) reduction(max : largest)
    for (int64_t line = 0; line < lines; ++line)
        largest = larger_bits(largest, line_amax<element>(data + line * stride, length));
    return largest;
}

// Bits of the largest |x| of each operand row, through the panels: for row scales, rotations and decoded operands.
inline std::vector<uint32_t> row_amax(const QuantizeArgs& args) {
    std::vector<uint32_t> largest(static_cast<size_t>((args.source.rows + kLanes - 1) / kLanes * kLanes), 0u);
    for_panels(args, [&](const Panel& panel, int64_t row, int64_t, int columns) {
        Word most;
        memcpy(&most, &largest[static_cast<size_t>(row)], sizeof most);
        for (int c = 0; c < columns; ++c) most = larger_bits(most, bits(panel[c]) & 0x7fffffffu);
        store(&largest[static_cast<size_t>(row)], most);
    });
    return largest;
}

inline uint32_t tensor_amax(const QuantizeArgs& args) {
    if (args.turn.group == 0) {
        switch (args.source.element) {
            case Element::float32: return dense_amax<Element::float32>(args);
            case Element::bfloat16: return dense_amax<Element::bfloat16>(args);
            case Element::float16: return dense_amax<Element::float16>(args);
            case Element::codes: break;
        }
    }
    const std::vector<uint32_t> rows = row_amax(args);
    return *std::max_element(rows.begin(), rows.end());
}

// Sixteen uniforms for the block at (row, column), a vector a column; draw n = row * Kp + column.
NVFP4_FN void element_noise(const QuantizeArgs& args, int64_t row, int64_t column, Float (&u)[kBlock]) {
    const uint64_t line = static_cast<uint64_t>(args.padded_columns / 8);
    for (int half = 0; half < 2; ++half) {
        Counters low, high, word[4];
        lane_counters(static_cast<uint64_t>(row) * line + static_cast<uint64_t>(column / 8 + half), line, low, high);
        philox(args.seed, low, high, kElementStream, word);
        for (int j = 0; j < 4; ++j) {
            u[8 * half + 2 * j] = centred_uniform<Float>(word[j].words() << 7);
            u[8 * half + 2 * j + 1] = centred_uniform<Float>(word[j].words() >> 9);
        }
    }
}

// Where the blocks of one panel go: rows of codes of up to 64 bytes, rows of scales of up to 8.
struct PanelOutput {
    Word codes[kLanes] = {};  // words 2b and 2b + 1 of block b
    uint32_t scale[kPanelBlocks][kLanes];

    NVFP4_FN void set(int block, const Packed<Float>& packed) {
        codes[2 * block] = packed.low;
        codes[2 * block + 1] = packed.high;
        store(scale[block], packed.scale_code);
    }

    void write(const QuantizeArgs& args, int64_t row, int64_t column, int blocks) {
        transpose(codes);
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, args.source.rows - row));
        uint8_t* out = args.codes + row * (args.padded_columns / 2) + column / 2;
        for (int r = 0; r < lanes; ++r) memcpy(out + r * (args.padded_columns / 2), &codes[r], static_cast<size_t>(blocks) * 8);
        if (args.rule == Rule::ms_eden) return;  // its scales follow once the largest is known
        const int64_t width = args.padded_columns / kBlock;
        uint8_t* scales = args.block_scale + (args.tiles ? row / kLanes : row) * width + column / kBlock;
        for (int r = 0; r < (args.tiles ? 1 : lanes); ++r)
            for (int b = 0; b < blocks; ++b) scales[r * width + b] = static_cast<uint8_t>(scale[b][r]);
    }
};

template <class RuleType>
void quantize_panels(const QuantizeArgs& args, const std::vector<float>& encode, const std::vector<uint32_t>* row_bits) {
    for_panels(args, [&](Panel& panel, int64_t row, int64_t column, int columns) {
        Given<Float> given{splat<Float>(encode[0]), {}, nullptr};
        if (row_bits) {
            given.encode = load(&encode[static_cast<size_t>(row)]);
            Word amax;
            memcpy(&amax, &(*row_bits)[static_cast<size_t>(row)], sizeof amax);
            for (int c = 0; c < columns; ++c) panel[c] = select(amax < kInfinityBits, panel[c], Float{});
        }
        given.global_scale = 1.0f / given.encode;
        PanelOutput out;
        for (int b = 0; b < columns / kBlock; ++b) {
            Float x[kBlock], noise[kBlock];
#pragma GCC unroll 16
            for (int i = 0; i < kBlock; ++i) x[i] = panel[b * kBlock + i];
            if constexpr (RuleType::noisy) {
                element_noise(args, row, column + b * kBlock, noise);
                given.noise = noise;
            }
            out.set(b, RuleType::apply(x, given));
        }
        out.write(args, row, column, columns / kBlock);
    });
}

inline void fill_scales(const QuantizeArgs& args) {
    const int64_t scale_rows = args.tiles ? (args.source.rows + kLanes - 1) / kLanes : args.source.rows;
    memset(args.codes, 0, static_cast<size_t>(args.source.rows * (args.padded_columns / 2)));
    memset(args.block_scale, 0, static_cast<size_t>(scale_rows * (args.padded_columns / kBlock)));
}

// The rules that scale from the maximum: it comes first, then one pass over the panels.
template <class RuleType>
void quantize_scaled(const QuantizeArgs& args) {
    std::vector<float> encode;
    if (args.row_scaled) {
        const std::vector<uint32_t> amax = row_amax(args);
        for (const uint32_t b : amax)
            encode.push_back(encode_scale(b < kInfinityBits ? from_bits(b) : 0.0f, RuleType::cap));
        quantize_panels<RuleType>(args, encode, &amax);
        for (int64_t r = 0; r < args.source.rows; ++r)
            args.global_scale[r] = amax[static_cast<size_t>(r)] < kInfinityBits ? 1.0f / encode[static_cast<size_t>(r)] : NAN;
        return;
    }
    const uint32_t amax = tensor_amax(args);
    if (amax >= kInfinityBits) {
        fill_scales(args);
        args.global_scale[0] = NAN;
        return;
    }
    encode.push_back(encode_scale(from_bits(amax), RuleType::cap));
    args.global_scale[0] = 1.0f / encode[0];
    quantize_panels<RuleType>(args, encode, nullptr);
}

// Block scales of ms_eden from their float32 forerunners; draw n = row * (Kp / 16) + block column.
inline void round_scales(const QuantizeArgs& args, float global_scale) {
    constexpr int64_t run = 8 * kLanes;  // sixteen counters of eight draws
    const int64_t count = args.source.rows * (args.padded_columns / kBlock);
#pragma omp parallel for schedule(static) num_threads(threads_for(args))
    for (int64_t start = 0; start < count; start += run) {
        Counters low, high, word[4];
        lane_counters(static_cast<uint64_t>(start / 8), 1, low, high);
        philox(args.seed, low, high, kBlockScaleStream, word);
        uint32_t words[4][kLanes];
        for (int j = 0; j < 4; ++j) store(words[j], word[j].words());
        for (int64_t n = start; n < std::min(count, start + run); n += kLanes) {
            const int64_t left = std::min<int64_t>(kLanes, count - n);
            uint32_t draw[kLanes], code[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int64_t d = n - start + i;
                draw[i] = words[d % 8 / 2][d / 8] >> (d % 2 * 16) & 0xffffu;
            }
            Word k;
            memcpy(&k, draw, sizeof k);
            const Float r = read_some<Element::float32>(args.scratch + n, left);
            const Float scaled = smaller(r / splat<Float>(global_scale), splat<Float>(E4M3::max));
            store(code, stochastic<E4M3>(scaled, centred_uniform<Float>(k << 7)).code);
            for (int64_t i = 0; i < left; ++i) args.block_scale[n + i] = static_cast<uint8_t>(code[i]);
        }
    }
}

// MS-EDEN: codes and float32 scales in one pass, the range afterwards.
template <bool search>
void quantize_eden(const QuantizeArgs& args) {
    std::atomic<uint32_t> peak{0}, amax_bits{0};
    const int64_t width = args.padded_columns / kBlock;
    const auto raise = [](std::atomic<uint32_t>& to, uint32_t value) {
        uint32_t seen = to.load(std::memory_order_relaxed);
        while (seen < value && !to.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {}
    };
    for_panels(args, [&](const Panel& panel, int64_t row, int64_t column, int columns) {
        PanelOutput out;
        Float length[kLanes] = {};
        Word most = {}, longest = {};
        for (int b = 0; b < columns / kBlock; ++b) {
            Float y[kBlock];
#pragma GCC unroll 16
            for (int i = 0; i < kBlock; ++i) y[i] = panel[b * kBlock + i];
            const Float amax = block_amax(y);
            most = larger_bits(most, bits(amax));
            out.set(b, MsEden<search>::apply(y, amax, length[b]));
            longest = larger_bits(longest, bits(length[b]));
        }
        out.write(args, row, column, columns / kBlock);
        transpose(length);
        for (int64_t r = 0; r < std::min<int64_t>(kLanes, args.source.rows - row); ++r)
            memcpy(args.scratch + (row + r) * width + column / kBlock, &length[r], sizeof(float) * static_cast<size_t>(columns / kBlock));
        raise(amax_bits, lane_max_bits(from_bits(most)));
        raise(peak, lane_max_bits(from_bits(longest)));
    });
    if (amax_bits >= kInfinityBits) {
        fill_scales(args);
        args.global_scale[0] = NAN;
        return;
    }
    const float largest = from_bits(peak);
    args.global_scale[0] = largest == 0.0f ? 1.0f : largest / E4M3::max;
    round_scales(args, args.global_scale[0]);
}

template <class Scope>
void quantize_blocks(const QuantizeArgs& args) {
    switch (args.rule) {
        case Rule::rtn: return quantize_scaled<Plain<Scope, Rounding::to_nearest>>(args);
        case Rule::sr: return quantize_scaled<Plain<Scope, Rounding::stochastic_up>>(args);
        case Rule::sr_te: return quantize_scaled<Plain<Scope, Rounding::stochastic_te>>(args);
        case Rule::four_over_six:
            if (args.metric == 0) return quantize_scaled<FourOverSix<Scope, Metric::mse>>(args);
            if (args.metric == 1) return quantize_scaled<FourOverSix<Scope, Metric::mae>>(args);
            return quantize_scaled<FourOverSix<Scope, Metric::abs_max>>(args);
        case Rule::scale_search: return quantize_scaled<ScaleSearch<Scope>>(args);
        case Rule::ms_eden: return;
    }
}

inline void quantize(const QuantizeArgs& args) {
    if (args.rule == Rule::ms_eden) return args.search ? quantize_eden<true>(args) : quantize_eden<false>(args);
    return args.tiles ? quantize_blocks<TileScope>(args) : quantize_blocks<RowScope>(args);
}

NVFP4_END
