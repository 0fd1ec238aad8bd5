// MS-EDEN of BF16 in groups of 128, one round or two, without a search: what recipes quantise
// gradients by, of rows, of columns or of both from one read. Every other operand takes eden.cu.
//
//     a thread    half a group of a line of the tile: four blocks as pairs of neighbours (pairs.h), so
//                 that of seven strides only the last one goes between lanes
//     signs       of the first round, flipped while two BF16 still share a word
//     all that    is known of the group is a constant here: with it as a variable the same code spills
#include "pairs.h"
#include "quantize.h"

namespace nvfp4::cuda {
namespace {

constexpr int kHalf = 4;  // blocks of a thread
constexpr int kGroupBlocks = kMaxGroup / kBlock;

// Of the first round, for two neighbours per word: bits 15 and 31.
struct PackedSigns {
    uint32_t word[kMaxGroup / 2];
};

// By the 64 threads from 0 on; a barrier has to follow.
NVFP4_DEVICE void prepare_packed(const Operand& operand, int thread, PackedSigns& signs) {
    if (thread < 0 || thread >= kMaxGroup / 2) return;
    uint32_t word[4];
    sign_bits(value_of(operand.sign_seed), false, 0, word);
    const uint32_t quarter = thread < 32   ? thread < 16 ? word[0] : word[1]
                             : thread < 48 ? word[2]
                                           : word[3];
    const uint32_t two = quarter >> (thread % 16 * 2);
    signs.word[thread] = (two & 1u) << 15 | (two & 2u) << 30;
}

// Two BF16 per word of block number ``block`` of a line.
template <bool down>
NVFP4_DEVICE void read_words(const uint16_t* tile, int line, int block, uint32_t (&word)[kPairs]) {
    if constexpr (down) {
        NVFP4_UNROLL(8)
        for (int i = 0; i < kPairs; ++i) {
            const int row = block * kBlock + 2 * i;
            word[i] = tile[tile_offset<uint16_t>(row, line)] |
                      static_cast<uint32_t>(tile[tile_offset<uint16_t>(row + 1, line)]) << 16;
        }
    } else {
        NVFP4_UNROLL(2)
        for (int c = 0; c < 2; ++c) {
            const Chunk chunk = *reinterpret_cast<const Chunk*>(
                tile + tile_offset<uint16_t>(line, block * kBlock + 8 * c));
            NVFP4_UNROLL(4)
            for (int i = 0; i < 4; ++i) word[4 * c + i] = chunk.word[i];
        }
    }
}

// Blocks number block, block + 1, ... with the signs of the first round.
template <bool down>
NVFP4_DEVICE void read_signed(const uint16_t* tile, int line, int block, const PackedSigns& signs,
                              Two (&x)[kHalf][kPairs]) {
    NVFP4_UNROLL(4)
    for (int h = 0; h < kHalf; ++h) {
        const uint32_t* minus = signs.word + (block + h) * kPairs;
        uint32_t word[kPairs];
        read_words<down>(tile, line, block + h, word);
        NVFP4_UNROLL(8)
        for (int i = 0; i < kPairs; ++i) {
            const uint32_t pair = word[i] ^ minus[i];
            x[h][i] = {from_bits(pair << 16), from_bits(pair & 0xffff0000u)};
        }
    }
}

// The rotation of rotate.h, the signs of whose first round x has already.
template <int rounds>
NVFP4_DEVICE void rotate_signed(Two (&x)[kHalf][kPairs], int block, const Signs& signs) {
    NVFP4_UNROLL(2)
    for (int round = 0; round < rounds; ++round) {
        if (round > 0) {
            NVFP4_UNROLL(4)
            for (int h = 0; h < kHalf; ++h) {
                const uint32_t minus = signs[round][(block + h) / 2] >> ((block + h) % 2 * 16);
                NVFP4_UNROLL(8)
                for (int i = 0; i < kPairs; ++i) {
                    Two& pair = x[h][i];
                    pair.low = from_bits(bits(pair.low) ^ (minus << (31 - 2 * i) & 0x80000000u));
                    pair.high = from_bits(bits(pair.high) ^ (minus << (30 - 2 * i) & 0x80000000u));
                }
            }
        }
        butterflies(x);

        // between lanes: the lower one adds, the upper one subtracts what it has from the other's
        const float sign = block & kHalf ? -1.0f : 1.0f;
        const float scale = round_scale(round, rounds, log2_of(kMaxGroup));
        NVFP4_UNROLL(64)
        for (int i = 0; i < kHalf * kPairs; ++i) {
            Two& pair = x[i / kPairs][i % kPairs];
            const Two other = {other_lane(pair.low, 1), other_lane(pair.high, 1)};
            pair = multiply_add_pair(pair, Two{sign, sign}, other) * scale;
        }
    }
}

// Codes of y and their length r, as MsEden<false>::pack; times kUnit the quotient is the same.
NVFP4_DEVICE Packed<float> make_eden(const Two (&y)[kPairs], float amax, float& length) {
    constexpr float c = MsEden<false>::full_scale;
    const float a = amax < 0x1p-120f ? 0.0f : amax;
    const float inverse = guarded_inverse(a);
    Two v[kPairs], q[kPairs];
    float each[kBlock], rounded[kBlock];
    NVFP4_UNROLL(8)
    for (int i = 0; i < kPairs; ++i) {
        v[i] = y[i] * inverse * (c * kUnit);
        each[2 * i] = v[i].low;
        each[2 * i + 1] = v[i].high;
    }
    const Packed<float> codes = round_block<true>(each, signs_of_block(each), rounded);

    NVFP4_UNROLL(8)
    for (int i = 0; i < kPairs; ++i) {
        q[i] = product_alone({unlike(v[i].low), unlike(v[i].high)},
                             {rounded[2 * i], rounded[2 * i + 1]});
        v[i] = product_alone(v[i], v[i]);
    }
    const float numerator = sum_of(v), denominator = sum_of(q);
    const float correction = denominator == 0.0f ? 1.0f : numerator / denominator;
    length = a * (correction * (1.0f / c));
    return codes;
}

// Codes and lengths of the blocks of a thread; what is not finite makes the peak NaN, and
// finish_kernel clears up. ``line`` and ``block`` are those of the operand.
NVFP4_DEVICE void store_half(const Operand& operand, int64_t line, int64_t block,
                             const Two (&x)[kHalf][kPairs], uint32_t& peak) {
    const int64_t row_blocks = operand.padded / kBlock, first = line * row_blocks + block;
    const int64_t inside = line < operand.lines ? row_blocks - block : 0;
    NVFP4_UNROLL(4)
    for (int h = 0; h < kHalf; ++h) {
        float y[kBlock];
        NVFP4_UNROLL(16)
        for (int i = 0; i < kBlock; ++i) y[i] = i % 2 ? x[h][i / 2].high : x[h][i / 2].low;
        const float amax = block_amax(y);
        float length;
        const Packed<float> codes = make_eden(x[h], amax, length);
        if (h < inside) {
            reinterpret_cast<Pair*>(operand.codes)[first + h] = {codes.low, codes.high};
            operand.lengths[first + h] = length;
        }
        peak = larger_bits(peak, bits(amax) < kInfinityBits ? bits(length) : kNanBits);
    }
}

struct Turned {
    PackedSigns first;
    Signs later;
};

template <int rounds>
NVFP4_DEVICE void prepare_turned(const Operand& operand, int thread, Turned& turned) {
    prepare_packed(operand, thread, turned.first);
    if (rounds > 1 && thread == 1)
        sign_bits(value_of(operand.sign_seed), false, 1, turned.later[1]);
}

// All lines of one orientation of the tile, half a group per thread.
template <int rounds, bool down>
NVFP4_DEVICE void eden_lines(const Operand& operand, const uint16_t* tile, const Turned& turned,
                             int64_t line, int64_t block) {
    const int thread = static_cast<int>(threadIdx.x), at = thread % 2 * kHalf;
    uint32_t peak = 0;
    Two x[kHalf][kPairs];
    read_signed<down>(tile, thread / 2, at, turned.first, x);
    rotate_signed<rounds>(x, at, turned.later);
    store_half(operand, line + thread / 2, block + at, x, peak);
    peak = warp_max(peak);
    if (threadIdx.x % 32 == 0) raise(operand.peak, peak);
}

template <int rounds, bool wants_rows, bool wants_columns>
__global__ void __launch_bounds__(kThreads, 2)
    eden128_kernel(const Matrix m, const Operand rows, const Operand columns) {
    NVFP4_SHARED(memory);
    auto* tile = reinterpret_cast<uint16_t*>(memory);
    auto* turned = reinterpret_cast<Turned*>(tile + kTile * kTile);
    static_assert(2 * sizeof(Turned) <= sizeof(Beside), "launch_tiles asks for enough");
    const Corner corner = corner_of<kTile>(m);
    Matrix halves = m;
    halves.element = Element::bfloat16;  // nothing else comes here
    load_tile<uint16_t, kTile>(halves, corner.row, corner.column, tile);

    // signs by 64 threads per orientation
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (wants_rows) prepare_turned<rounds>(rows, thread, turned[0]);
    if constexpr (wants_columns) prepare_turned<rounds>(columns, thread - 64, turned[1]);
    __syncthreads();

    if constexpr (wants_rows)
        eden_lines<rounds, false>(rows, tile, turned[0], corner.row, corner.column / kBlock);
    if constexpr (wants_columns)
        eden_lines<rounds, true>(columns, tile, turned[1], corner.column, corner.row / kBlock);
}

template <int rounds>
Variant variant_for(bool wants_rows, bool wants_columns) {
    return {wants_rows && wants_columns ? &eden128_kernel<rounds, true, true>
            : wants_rows                ? &eden128_kernel<rounds, true, false>
                                        : &eden128_kernel<rounds, false, true>,
            kTile};
}

bool is_usual(const Matrix& m, const Operand& operand) {
    return operand.rule == Rule::ms_eden && !operand.search && !operand.fixed &&
           operand.group == kMaxGroup && operand.rounds <= 2 && m.element == Element::bfloat16;
}

}  // namespace

Variant eden128_variant(const Matrix& m, const Operand& operand, bool down) {
    if (!is_usual(m, operand)) return {};
    return operand.rounds == 1 ? variant_for<1>(!down, down) : variant_for<2>(!down, down);
}

Variant eden128_pair_variant(const Matrix& m, const Operand& rows, const Operand& columns) {
    if (!is_usual(m, rows) || !is_usual(m, columns) || rows.rounds != columns.rounds) return {};
    return rows.rounds == 1 ? variant_for<1>(true, true) : variant_for<2>(true, true);
}

}  // namespace nvfp4::cuda
