// Kernels on tiles: the amax, and codes with their scales, of the rows of a matrix, of its columns,
// or of both in one read.
//
//     grid    one block of 256 threads per tile (tile.h)
//     slot    what a thread works on at a time: ``held`` blocks of sixteen elements that follow
//             each other in a line of the operand, a row or a column of the tile
//     policy  the rule of quantizers.h, how many blocks are held, and which slot is which block
//
// quantize_kernel<Stored, Rows, Columns> has a policy per orientation, None where one is not
// wanted. Lines go on from tile to tile, but blocks, rotation groups and 16x16 blocks do not cross
// them, so blocks of threads share nothing but the peak.
#pragma once

#include "../layout.h"
#include "amax.h"
#include "blocks.h"
#include "rotate.h"

namespace nvfp4::cuda {

// A 16x16 tile of which sixteen neighbouring lanes hold a line each; the twin of RowScope.
struct LaneScope {
    static NVFP4_DEVICE float amax(float a) { return from_bits(warp_max(bits(a), kBlock)); }

    // The fixed sum over 256 values in row-major order: rows i and i + 8 first, ..., then columns j
    // and j + 8.
    template <class F, class Leaf>
    static NVFP4_DEVICE F sum(Leaf leaf) {
        float t[kBlock];
        NVFP4_UNROLL(64)
        for (int i = 0; i < kBlock; ++i) t[i] = leaf(i);
        share<kBlock / 2>(t);
        NVFP4_UNROLL(64)
        for (int half = kBlock / 2; half > 0; half /= 2) t[0] = t[0] + other_lane(t[0], half);
        return t[0];
    }

    // Of two lanes each keeps half of what it has and gets the other's half, so that in the end a
    // lane has one column's sum. By templates, as everything is indexed by constants then and stays
    // in registers.
    template <int half>
    static NVFP4_DEVICE void share(float (&t)[kBlock]) {
        const bool upper = threadIdx.x & half;
        NVFP4_UNROLL(64)
        for (int i = 0; i < half; ++i) {
            const float low = t[i], high = t[i + half];
            t[i] = (upper ? high : low) + other_lane(upper ? low : high, half);
        }
        if constexpr (half > 1) share<half / 2>(t);
    }
};

// What a thread works on: blocks number block, block + 1, ... of a line of the tile.
struct Place {
    int line, block;
};

// Rules that scale from the amax. In tiles, sixteen lanes hold the same block of sixteen lines;
// otherwise neighbouring lanes hold neighbouring blocks of a line, as a rotation wants them.
template <template <class> class RuleOf, bool tiled>
struct Scaled {
    using Scope = std::conditional_t<tiled, LaneScope, RowScope>;
    using Rule = RuleOf<Scope>;
    static constexpr int held = 1;
    static NVFP4_DEVICE Place place(int slot) {
        if (!tiled) return {slot / kTileBlocks, slot % kTileBlocks};
        return {slot / (kBlock * kTileBlocks) * kBlock + slot % kBlock,
                slot / kBlock % kTileBlocks};
    }
};

// MS-EDEN. Two blocks per thread save a third of the shuffles of a rotation in groups of 128; four
// would spill, and so would two where factors are compared.
template <bool search_>
struct Eden {
    static constexpr bool search = search_;
    static constexpr int held = search ? 1 : 2;
    static NVFP4_DEVICE Place place(int slot) {
        return {slot / (kTileBlocks / held), slot % (kTileBlocks / held) * held};
    }
};

template <class Policy>
struct IsEden : std::false_type {};
template <bool search>
struct IsEden<Eden<search>> : std::true_type {};

NVFP4_DEVICE bool inside(const Operand& operand, int64_t line, int64_t block) {
    return line < operand.lines && block * kBlock < operand.padded;
}

NVFP4_DEVICE void store_codes(const Operand& operand, int64_t line, int64_t block,
                              Packed<float> codes) {
    if (inside(operand, line, block))
        *reinterpret_cast<Pair*>(operand.codes + line * (operand.padded / 2) + block * 8) = {
            codes.low, codes.high};
}

NVFP4_DEVICE void store_swizzled(const Operand& operand, int64_t line, int64_t block,
                                 uint32_t byte) {
    if (operand.swizzled != nullptr)
        operand.swizzled[swizzled_offset(line, block, operand.padded / kBlock)] =
            static_cast<uint8_t>(byte);
}

// What one thread finds for all of a block of threads: the signs of an operand's rotation, and the
// scales of the tensor where the rule wants them.
struct Ahead {
    Signs signs;
    Scales scales;
};

// Codes and scales of a block; ``line`` and ``block`` are those of the operand, ``tensor`` its
// scales where they are not its rows'.
template <class Policy>
NVFP4_DEVICE void store_block(const Operand& operand, int64_t line, int64_t block,
                              float (&x)[kBlock], const Scales& tensor, const Noise& noise) {
    using Rule = typename Policy::Rule;
    const bool stored = inside(operand, line, block);
    const Scales scales =
        operand.row_scaled ? scales_of(stored ? operand.peak[line] : 0u, Rule::cap) : tensor;

    // outside of the operand too, since the lanes of a tile take part in each other's sums
    const auto counter = static_cast<uint64_t>(line * (operand.padded / 8) + block * 2);
    const Made made = make_block<Rule>(x, block_amax(x), scales, operand.trials, noise, counter);
    store_codes(operand, line, block, made.codes);

    // one thread per block scale, one per global scale
    if (!stored) return;
    if (!operand.tiles)
        operand.block_scale[line * (operand.padded / kBlock) + block] =
            static_cast<uint8_t>(made.scale);
    else if (line % kBlock == 0)
        operand.block_scale[line / kBlock * (operand.padded / kBlock) + block] =
            static_cast<uint8_t>(made.scale);
    store_swizzled(operand, line, block, made.scale);
    if (block == 0 && (operand.row_scaled || line == 0))
        operand.global_scale[operand.row_scaled ? line : 0] = scales.stored();
}

// Codes and lengths r; what is not finite makes the peak NaN, and finish_kernel clears up.
template <class Policy>
NVFP4_DEVICE void store_eden(const Operand& operand, int64_t line, int64_t block,
                             float (&x)[Policy::held][kBlock], uint32_t& peak) {
    NVFP4_UNROLL(64)
    for (int h = 0; h < Policy::held; ++h) {
        const float amax = block_amax(x[h]);
        float length;
        store_codes(operand, line, block + h,
                    make_eden<Policy::search>(x[h], amax, operand.trials, length));
        if (inside(operand, line, block + h))
            operand.lengths[line * (operand.padded / kBlock) + block + h] = length;
        peak = larger_bits(peak, bits(amax) < kInfinityBits ? bits(length) : kNanBits);
    }
}

// All lines of one orientation of the tile; ``line`` and ``block`` are where it begins in the
// operand.
template <class Policy, bool down, int lines, class Stored>
NVFP4_DEVICE void quantize_lines(const Operand& operand, const Stored* tile, const float* factor,
                                 const Ahead& ahead, int64_t line, int64_t block) {
    constexpr int held = Policy::held, slots = lines * kTileBlocks / held;
    static_assert(slots % kThreads == 0, "every thread has the same number of blocks");
    const Noise noise{value_of(operand.seed)};
    uint32_t peak = 0;
    NVFP4_ROLLED
    for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kThreads) {
        const Place place = Policy::place(slot);
        float x[held][kBlock];
        read_blocks<down>(tile, factor, place.line, place.block, x);
        rotate(x, place.block, operand, ahead.signs);
        if constexpr (IsEden<Policy>::value)
            store_eden<Policy>(operand, line + place.line, block + place.block, x, peak);
        else
            store_block<Policy>(operand, line + place.line, block + place.block, x[0], ahead.scales,
                                noise);
    }
    if constexpr (IsEden<Policy>::value) {
        peak = warp_max(peak);
        if (threadIdx.x % 32 == 0) raise(operand.peak, peak);
    }
}

// Row and column of the matrix at which this block's tile begins. The last tile comes first: of it,
// what the amax read is still in L2.
struct Corner {
    int64_t row, column;
};

template <int rows>
NVFP4_DEVICE Corner corner_of(const Matrix& m) {
    const int64_t across = ceil_div(m.columns, kTile), tile = gridDim.x - 1 - blockIdx.x;
    return {tile / across * rows, tile % across * kTile};
}

struct None {};  // the policy of an orientation that is not wanted
struct Any {};   // of one whose amax alone is wanted

template <class Policy>
struct HasCap : std::false_type {};
template <template <class> class RuleOf, bool tiled>
struct HasCap<Scaled<RuleOf, tiled>> : std::true_type {};

// Whether a policy takes more than 80 registers per thread: MS-EDEN, and where lanes exchange sums.
template <class Policy>
struct Many : std::false_type {};
template <template <class> class RuleOf>
struct Many<Scaled<RuleOf, true>> : std::true_type {};
template <bool search>
struct Many<Eden<search>> : std::true_type {};

template <class Rows, class Columns>
constexpr int kTileRows =
    std::is_same<Columns, None>::value && !IsEden<Rows>::value ? kFlatRows : kTile;

// Blocks of threads that a multiprocessor has registers for: 80 per thread with three, 128 with
// two. Left to itself ptxas spilled to fit in a fourth in 58 of 410 kernels; told this, in none.
template <class Rows, class Columns>
constexpr int kResident = Many<Rows>::value || Many<Columns>::value ? 2 : 3;

// Shared memory: what kernels have beside their tile.
struct Beside {
    Ahead rows, columns;
    float factor[kTile];  // global scales of the rows of a coded matrix
};

template <class Stored>
constexpr int kSharedBytes(int rows) {
    return rows * kTile * static_cast<int>(sizeof(Stored)) + static_cast<int>(sizeof(Beside));
}

// By the first threads of a warp that begins at ``first``.
template <class Policy>
NVFP4_DEVICE void prepare_operand(const Operand& operand, int first, Ahead& ahead) {
    const int thread = static_cast<int>(threadIdx.x) - first;
    prepare_signs(operand, thread, ahead.signs);
    if constexpr (HasCap<Policy>::value)
        if (thread == kMaxRounds && !operand.row_scaled)
            ahead.scales = scales_of(operand.peak[0], Policy::Rule::cap);
}

// Loads the tile and what belongs to it; returns the factors of its rows, or null.
template <class Rows, class Columns, int height, class Stored>
NVFP4_DEVICE const float* prepare_tile(const Matrix& m, const Operand& rows, const Operand& columns,
                                       Corner corner, Stored* tile, Beside& beside) {
    const int thread = static_cast<int>(threadIdx.x);
    constexpr bool wants_columns = !std::is_same<Columns, None>::value;
    const bool coded = wants_columns && sizeof(Stored) == 2 && m.element == Element::codes;
    load_tile<Stored, height>(m, corner.row, corner.column, tile);

    // the operands' by a warp each, factors by the first four
    if constexpr (!std::is_same<Rows, None>::value) prepare_operand<Rows>(rows, 0, beside.rows);
    if constexpr (wants_columns) prepare_operand<Columns>(columns, 32, beside.columns);
    if (coded && thread < kTile && corner.row + thread < m.rows)
        beside.factor[thread] = m.coded.global_scale[m.coded.row_scaled ? corner.row + thread : 0];
    else if (coded && thread < kTile)
        beside.factor[thread] = 0.0f;

    __syncthreads();
    return coded ? beside.factor : nullptr;
}

// Codes and scales of the operands that are wanted; of MS-EDEN codes and lengths r.
template <class Stored, class Rows, class Columns>
__global__ void __launch_bounds__(kThreads, kResident<Rows, Columns>)
    quantize_kernel(const Matrix m, const Operand rows, const Operand columns) {
    constexpr bool wants_rows = !std::is_same<Rows, None>::value;
    constexpr bool wants_columns = !std::is_same<Columns, None>::value;
    constexpr int height = kTileRows<Rows, Columns>;
    NVFP4_SHARED(memory);
    auto* tile = reinterpret_cast<Stored*>(memory);
    auto& beside = *reinterpret_cast<Beside*>(tile + height * kTile);
    const Corner corner = corner_of<height>(m);
    const float* factor =
        prepare_tile<Rows, Columns, height>(m, rows, columns, corner, tile, beside);

    if constexpr (wants_rows)
        quantize_lines<Rows, false, height>(rows, tile, factor, beside.rows, corner.row,
                                            corner.column / kBlock);
    if constexpr (wants_columns)
        quantize_lines<Columns, true, kTile>(columns, tile, factor, beside.columns, corner.column,
                                             corner.row / kBlock);
}

// Raises the peak of the operand, or of each of its lines, to what this tile has.
template <bool down, int lines, class Stored>
NVFP4_DEVICE void find_peak(const Operand& operand, const Stored* tile, const float* factor,
                            const Signs& signs, int64_t line) {
    uint32_t peak = 0;
    NVFP4_ROLLED
    for (int slot = static_cast<int>(threadIdx.x); slot < lines * kTileBlocks; slot += kThreads) {
        const int at = slot / kTileBlocks;
        float x[1][kBlock];
        read_blocks<down>(tile, factor, at, slot % kTileBlocks, x);
        rotate(x, slot % kTileBlocks, operand, signs);
        const uint32_t amax = bits(block_amax(x[0]));
        peak = larger_bits(peak, amax);
        if (!operand.row_scaled) continue;
        const uint32_t of_line = warp_max(amax, kTileBlocks);
        if (slot % kTileBlocks == 0 && line + at < operand.lines)
            raise(operand.peak + line + at, of_line);
    }
    peak = warp_max(peak);
    if (!operand.row_scaled && threadIdx.x % 32 == 0) raise(operand.peak, peak);
}

// The amax of operands whose rules want one: of the tensor or of each line, after the rotation.
template <class Stored, bool wants_rows, bool wants_columns>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(const Matrix m, const Operand rows, const Operand columns) {
    constexpr int height = wants_columns ? kTile : kFlatRows;
    NVFP4_SHARED(memory);
    auto* tile = reinterpret_cast<Stored*>(memory);
    auto& beside = *reinterpret_cast<Beside*>(tile + height * kTile);
    const Corner corner = corner_of<height>(m);
    using Rows = std::conditional_t<wants_rows, Any, None>;
    using Columns = std::conditional_t<wants_columns, Any, None>;
    const float* factor =
        prepare_tile<Rows, Columns, height>(m, rows, columns, corner, tile, beside);

    if constexpr (wants_rows)
        find_peak<false, height>(rows, tile, factor, beside.rows.signs, corner.row);
    if constexpr (wants_columns)
        find_peak<true, kTile>(columns, tile, factor, beside.columns.signs, corner.column);
}

using TileKernel = void (*)(Matrix, Operand, Operand);

// A kernel with the rows of the matrix that one of its blocks takes.
struct Variant {
    TileKernel kernel = nullptr;
    int rows = 0;
};

template <class Rows, class Columns>
Variant variant_of(bool wide) {
    return {wide ? &quantize_kernel<uint32_t, Rows, Columns>
                 : &quantize_kernel<uint16_t, Rows, Columns>,
            kTileRows<Rows, Columns>};
}

template <class Policy>
Variant variant_of(bool down, bool wide) {
    return down ? variant_of<None, Policy>(wide) : variant_of<Policy, None>(wide);
}

// Each has a file of its own, so that kernels compile side by side; null where there is no kernel.
Variant plain_variant(const Operand& operand, bool down, bool wide);
Variant searched_variant(const Operand& operand, bool down, bool wide);
Variant eden_variant(const Operand& operand, bool down, bool wide);
Variant fused_variant(const Operand& rows, const Operand& columns, bool wide);
Variant eden_pair_variant(bool search, bool wide);

// MS-EDEN of BF16 in groups of 128 (eden128.cu).
Variant eden128_variant(const Matrix& m, const Operand& operand, bool down);
Variant eden128_pair_variant(const Matrix& m, const Operand& rows, const Operand& columns);

// MS-EDEN on tensor cores (mma_eden.cu), which takes shared memory of its own size.
Variant mma_eden_variant(const Matrix& m, const Operand& operand, bool down);
Variant mma_eden_pair_variant(const Matrix& m, const Operand& rows, const Operand& columns);
int mma_shared_bytes();

}  // namespace nvfp4::cuda
