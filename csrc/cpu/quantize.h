// The quantise pipeline: one operand of a matrix, or the row-wise and the transposed one together.
//
//     amax                 of the tensor or of each row, rotated (amax.h); MS-EDEN needs none
//     begin                encode scales S and the global scales 1 / S
//     every panel          rotated in place, then visited: a block scale and codes per block, a
//                          vector of rows at a time
//     end                  MS-EDEN: global scale from the largest r, then the block scales
//
// A pass is one operand on this way; what it does to a block is a rule of quantizers.h. Codes of a
// part of a panel are vectors with a row per lane and eight columns per 32 bits; turned in squares
// they are rows of 64 bytes, the codes of 128 columns.
//
// Two operands of one matrix go tile by tile, 128 rows by 128 columns: the second finds the tile in
// the cache, so the matrix is read from memory once.
//
// A tensor or row that is not finite has codes and block scales of zero and a global scale of NaN.
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "../quantizers.h"
#include "amax.h"
#include "tile.h"

NVFP4_BEGIN

// Zeros for what a panel of fewer blocks leaves; clearing all of it took 0.02 to 0.05 cycles per
// element, of rtn's 1.3.
template <class V, int n>
NVFP4_FN void clear_from(int first, V (&v)[n]) {
    for (int i = first; i < n; ++i) v[i] = V{};
}

// The rows of a part that there are, beginning with ``row``.
NVFP4_FN int lanes_at(const QuantizeArgs& args, int64_t row) {
    return static_cast<int>(std::clamp<int64_t>(args.source.rows - row, 0, kLanes));
}

// Sixteen uniforms for the blocks from (row, column) down, a vector per column. An element's draw
// is n = row * Kp + column, and a counter has eight draws.
NVFP4_FN void element_noise(const QuantizeArgs& args, int64_t row, int64_t column,
                            Float (&u)[kBlock]) {
    const uint64_t line = static_cast<uint64_t>(args.padded_columns / 8);
    for (int half = 0; half < 2; ++half) {
        Counters low, high, word[4];
        lane_counters(static_cast<uint64_t>(row) * line + static_cast<uint64_t>(column / 8 + half),
                      line, low, high);
        philox(args.seed, low, high, kElementStream, word);
        for (int j = 0; j < 4; ++j)
            centred_uniforms(word[j].words(), u[8 * half + 2 * j], u[8 * half + 2 * j + 1]);
    }
}

// Codes of a part of a panel, a vector for every eight columns, to rows of up to 64 bytes.
NVFP4_FN void write_codes(const QuantizeArgs& args, int64_t row, int64_t column, int blocks,
                          Word (&codes)[2 * kPanelBlocks]) {
    const int64_t stride = args.padded_columns / 2;
    const int lanes = lanes_at(args, row);
    constexpr int bytes_at_once = static_cast<int>(sizeof(Word));
    for (int q = 0; q < kParts; ++q) {
        auto& words = square(codes, q);
        transpose(words);

        uint8_t* out = args.codes + row * stride + column / 2 + q * bytes_at_once;
        if (blocks == kPanelBlocks && lanes == kLanes) {
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r) store(out + r * stride, words[r]);
        } else {
            const int bytes = std::clamp(blocks * 8 - q * bytes_at_once, 0, bytes_at_once);
            for (int r = 0; r < lanes; ++r)
                memcpy(out + r * stride, &words[r], static_cast<size_t>(bytes));
        }
    }
}

// Scale codes of a part of a panel, a vector for every block, to rows of up to 8 bytes.
NVFP4_FN void write_scales(const QuantizeArgs& args, int64_t row, int64_t column, int blocks,
                           const Word (&scale)[kPanelBlocks]) {
    const int64_t width = args.padded_columns / kBlock;
    const int lanes = args.tiles ? 1 : lanes_at(args, row);

    // the first four blocks of every row, and the last four
    uint32_t half[2][kLanes];
    for (int h = 0; h < 2; ++h)
        store(half[h], scale[4 * h] | scale[4 * h + 1] << 8 | scale[4 * h + 2] << 16 |
                           scale[4 * h + 3] << 24);

    uint8_t* out = args.block_scale + (args.tiles ? row / kRows : row) * width + column / kBlock;
    for (int r = 0; r < lanes; ++r) {
        const uint64_t line = half[0][r] | static_cast<uint64_t>(half[1][r]) << 32;
        if (blocks == kPanelBlocks)
            memcpy(out + r * width, &line, sizeof line);
        else
            memcpy(out + r * width, &line, static_cast<size_t>(blocks));
    }
}

// What stands for a tensor that is not finite, but for its global scale.
inline void clear_result(const QuantizeArgs& args) {
    const int64_t scale_rows = args.tiles ? ceil_div(args.source.rows, kRows) : args.source.rows;
    memset(args.codes, 0, static_cast<size_t>(args.source.rows * (args.padded_columns / 2)));
    memset(args.block_scale, 0, static_cast<size_t>(scale_rows * (args.padded_columns / kBlock)));
}

// One operand under way. ``begin`` is told the largest |x|, unless the rule scales without it, and
// says whether there is anything to do; ``visit`` sees every panel, from any thread and in any
// order; ``end`` comes last.
struct Pass {
    const QuantizeArgs& args;

    explicit Pass(const QuantizeArgs& a) : args(a) {}
    virtual ~Pass() = default;
    virtual bool begin(uint32_t amax) = 0;
    virtual void visit(Panel& panel, int64_t row, int64_t column, int columns) = 0;
    virtual void end() {}

protected:
    bool finite(uint32_t amax) const {
        if (amax < kInfinityBits) return true;
        clear_result(args);
        args.global_scale[0] = from_bits(kNanBits);
        return false;
    }
};

// The rules that scale from the maximum, which therefore comes first.
template <class Rule, class Scope>
struct ScaledPass final : Pass {
    using Pass::Pass;
    std::vector<float> encode;
    std::vector<uint32_t> row_bits;  // of each row's largest |x|, if rows have scales of their own

    bool begin(uint32_t amax) override {
        if (!args.row_scaled) {
            if (!finite(amax)) return false;
            encode.push_back(encode_scale(from_bits(amax), Rule::cap));
            args.global_scale[0] = 1.0f / encode[0];
            return true;
        }
        row_bits = row_amax(args);
        for (const uint32_t b : row_bits)
            encode.push_back(encode_scale(b < kInfinityBits ? from_bits(b) : 0.0f, Rule::cap));
        for (size_t r = 0; r < static_cast<size_t>(args.source.rows); ++r)
            args.global_scale[r] =
                row_bits[r] < kInfinityBits ? 1.0f / encode[r] : from_bits(kNanBits);
        return true;
    }

    void visit(Panel& panel, int64_t row, int64_t column, int columns) override {
        const int blocks = columns / kBlock;
        Float scale[kPanelBlocks];
        Word scale_code[kPanelBlocks];
        clear_from(blocks, scale_code);
        for (int part = 0; part < kParts && row + part * kLanes < args.source.rows; ++part) {
            const int64_t first = row + part * kLanes;
            Given<Float> given = given_at(first);
            if (args.row_scaled) clear_rows(panel, first, blocks, part);

            // all scales before all codes: the blocks' chains of divisions then overlap; of a tile
            // the first part finds the scales of all
            if (!tiled || part == 0) {
                for (int b = 0; b < blocks; ++b) {
                    const Rounded<Float> chosen = choose(panel, b, part, given);
                    scale[b] = chosen.value;
                    scale_code[b] = chosen.code;
                }
                write_scales(args, first, column, blocks, scale_code);
            }

            Word codes[2 * kPanelBlocks];
            clear_from(2 * blocks, codes);
            for (int b = 0; b < blocks; ++b) {
                Float noise[kBlock];
                if constexpr (Rule::noisy) {
                    element_noise(args, first, column + b * kBlock, noise);
                    given.noise = noise;
                }
                const Packed<Float> packed = Rule::pack(block(panel, b, part), scale[b], given);
                codes[2 * b] = packed.low;
                codes[2 * b + 1] = packed.high;
            }
            write_codes(args, first, column, blocks, codes);
        }
    }

private:
    static constexpr bool tiled = std::is_same_v<Scope, TileScope>;

    static NVFP4_FN Rounded<Float> choose(Panel& panel, int b, int part,
                                          const Given<Float>& given) {
        if constexpr (tiled)
            return Rule::choose(tile(panel, b), given);
        else
            return Rule::choose(block(panel, b, part), given);
    }

    NVFP4_FN Given<Float> given_at(int64_t row) const {
        const Float scale =
            args.row_scaled ? load(&encode[static_cast<size_t>(row)]) : splat<Float>(encode[0]);
        return {scale, 1.0f / scale, nullptr, &args.trials};
    }

    // Zeros for the rows that are not finite.
    NVFP4_FN void clear_rows(Panel& panel, int64_t row, int blocks, int part) const {
        const Mask finite = load(&row_bits[static_cast<size_t>(row)]) < kInfinityBits;
        for (int b = 0; b < blocks; ++b)
            for (Float& x : block(panel, b, part)) x = select(finite, x, Float{});
    }
};

// MS-EDEN: codes, and float32 scales r into scratch, in one pass; the range of r decides the global
// scale, and only then can r be rounded to a block scale.
template <bool search>
struct EdenPass final : Pass {
    using Pass::Pass;
    std::atomic<uint32_t> amax{0}, longest{0};

    bool begin(uint32_t) override { return true; }

    void visit(Panel& panel, int64_t row, int64_t column, int columns) override {
        const int blocks = columns / kBlock;
        const int64_t width = args.padded_columns / kBlock;
        Word most = {}, furthest = {};
        for (int part = 0; part < kParts && row + part * kLanes < args.source.rows; ++part) {
            const int64_t first = row + part * kLanes;
            Float length[std::max(kLanes, kPanelBlocks)];
            Word codes[2 * kPanelBlocks];
            clear_from(blocks, length);
            clear_from(2 * blocks, codes);

            for (int b = 0; b < blocks; ++b) {
                auto& x = block(panel, b, part);
                const Float largest = block_amax(x);
                most = larger_bits(most, bits(largest));
                const Packed<Float> packed =
                    MsEden<search>::pack(x, largest, args.trials, length[b]);
                codes[2 * b] = packed.low;
                codes[2 * b + 1] = packed.high;
                furthest = larger_bits(furthest, bits(length[b]));
            }
            write_codes(args, first, column, blocks, codes);

            // r has a row per lane, scratch a row per line
            for (int b = 0; b < blocks; b += kLanes) {
                transpose(square(length, b / kLanes));
                const size_t bytes =
                    sizeof(float) * static_cast<size_t>(std::min(kLanes, blocks - b));
                for (int r = 0; r < lanes_at(args, first); ++r)
                    memcpy(args.scratch + (first + r) * width + column / kBlock + b, &length[b + r],
                           bytes);
            }
        }
        raise(amax, lane_max_bits(from_bits(most)));
        raise(longest, lane_max_bits(from_bits(furthest)));
    }

    void end() override {
        if (!finite(amax)) return;
        const float peak = from_bits(longest);
        args.global_scale[0] = peak == 0.0f ? 1.0f : peak / E4M3::max;
        round_scales(args.global_scale[0]);
    }

private:
    // Block scales from their float32 forerunners; draw n = row * (Kp / 16) + block column.
    void round_scales(float global_scale) const {
        constexpr int64_t run = 8 * kLanes;  // counters of eight draws
        const int64_t count = args.source.rows * (args.padded_columns / kBlock);
#pragma omp parallel for schedule(static) num_threads(threads_for(args))
        for (int64_t start = 0; start < count; start += run) {
            Counters low, high, word[4];
            lane_counters(static_cast<uint64_t>(start / 8), 1, low, high);
            philox(args.seed, low, high, kBlockScaleStream, word);

            // eight draws per lane, in the order of the scales
            uint32_t words[4][kLanes];
            for (int j = 0; j < 4; ++j) store(words[j], word[j].words());
            uint16_t draw[run];
            for (int i = 0; i < kLanes; ++i)
                for (int d = 0; d < 8; ++d)
                    draw[8 * i + d] = static_cast<uint16_t>(words[d / 2][i] >> (d % 2 * 16));

            for (int64_t n = start; n < std::min(count, start + run); n += kLanes) {
                const int64_t left = std::min<int64_t>(kLanes, count - n);
                const Word k = widen(draw + (n - start));
                const Float r = read_some<Element::float32>(args.scratch + n, left);
                const Float scaled =
                    smaller(r / splat<Float>(global_scale), splat<Float>(E4M3::max));
                uint32_t code[kLanes];
                store(code, stochastic<E4M3>(scaled, centred_uniform<Float>(k << 7)).code);
                for (int64_t i = 0; i < left; ++i)
                    args.block_scale[n + i] = static_cast<uint8_t>(code[i]);
            }
        }
    }
};

template <template <class> class RuleOf, class Scope>
std::unique_ptr<Pass> pass_with(const QuantizeArgs& args) {
    return std::make_unique<ScaledPass<RuleOf<Scope>, Scope>>(args);
}

template <class Scope>
std::unique_ptr<Pass> scaled_pass(const QuantizeArgs& args) {
    switch (args.rule) {
        case Rule::rtn: return pass_with<Nearest, Scope>(args);
        case Rule::sr: return pass_with<Up, Scope>(args);
        case Rule::sr_te: return pass_with<Clipped, Scope>(args);
        case Rule::four_over_six:
            if (args.metric == 0) return pass_with<Squares, Scope>(args);
            if (args.metric == 1) return pass_with<Magnitudes, Scope>(args);
            return pass_with<Largest, Scope>(args);
        case Rule::scale_search: return pass_with<ScaleSearch, Scope>(args);
        case Rule::ms_eden: break;
    }
    return nullptr;
}

inline std::unique_ptr<Pass> pass_of(const QuantizeArgs& args) {
    if (args.rule != Rule::ms_eden)
        return args.tiles ? scaled_pass<TileScope>(args) : scaled_pass<RowScope>(args);
    if (args.search) return std::make_unique<EdenPass<true>>(args);
    return std::make_unique<EdenPass<false>>(args);
}

NVFP4_FN bool needs_amax(const QuantizeArgs& args) {
    return args.rule != Rule::ms_eden && !args.row_scaled;
}

inline void quantize(const QuantizeArgs& args) {
    const std::unique_ptr<Pass> pass = pass_of(args);
    if (!pass->begin(needs_amax(args) ? tensor_amax(args).rotated : 0)) return;
    const Rotation rotation(args.rotation);
    for_panels(args, [&](Panel& panel, int64_t row, int64_t column, int columns) {
        rotation.apply(panel, columns);
        pass->visit(panel, row, column, columns);
    });
    pass->end();
}

// The panels of one operand within a tile of the matrix, up to a band at a time.
inline void visit_tile(Pass& pass, const Rotation& rotation, int64_t row, int64_t column) {
    const QuantizeArgs& args = pass.args;
    if (column >= args.padded_columns) return;
    const int64_t end = std::min<int64_t>(args.source.rows, row + kPanel);
    const int64_t band = band_of(args.source);
    for (int64_t first = row; first < end; first += band * kRows) {
        const int64_t count = std::min(band, ceil_div(end - first, kRows));
        visit_band(args, first, column, static_cast<int>(count),
                   [&](Panel& panel, int64_t panel_row, int64_t, int columns) {
                       rotation.apply(panel, columns);
                       pass.visit(panel, panel_row, column, columns);
                   });
    }
}

// Two operands of the same matrix, ``down`` contracting its rows and ``across`` its columns.
inline void quantize_both(const QuantizeArgs& across, const QuantizeArgs& down) {
    const std::unique_ptr<Pass> pass_across = pass_of(across);
    const std::unique_ptr<Pass> pass_down = pass_of(down);

    // the amax of ``down`` is read together with that of the matrix as it comes, which does for
    // ``across`` unless that is rotated
    const Amax of_down = needs_amax(down) ? tensor_amax(down) : Amax{};
    const bool shared = needs_amax(down) && across.rotation.group == 0;
    const uint32_t of_across = !needs_amax(across) ? 0
                               : shared            ? of_down.dense
                                                   : tensor_amax(across).rotated;

    const bool go_across = pass_across->begin(of_across);
    const bool go_down = pass_down->begin(of_down.rotated);

    const Rotation rotate_across(across.rotation);
    const Rotation rotate_down(down.rotation);
    const int64_t rows = std::max(across.source.rows, down.padded_columns);
    const int64_t columns = std::max(across.padded_columns, down.source.rows);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads_for(across))
    for (int64_t row = 0; row < rows; row += kPanel)
        for (int64_t column = 0; column < columns; column += kPanel) {
            if (go_across) visit_tile(*pass_across, rotate_across, row, column);
            if (go_down) visit_tile(*pass_down, rotate_down, column, row);
        }

    if (go_across) pass_across->end();
    if (go_down) pass_down->end();
}

NVFP4_END
