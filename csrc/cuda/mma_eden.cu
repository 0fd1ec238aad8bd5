// MS-EDEN of one round in groups of 128 whose rotation sums on tensor cores: the policy that a
// recipe asks for by summation="tensor_core" (docs/numerics.md, Rotation). Of BF16 its rows, its
// columns or both from one read; of codes their transpose.
//
//     a block of 256 threads   a tile of 128x128
//     a warp                   sixteen lines of it per orientation (mma_tile.h)
//     four lanes               two lines of sixteen: each has four elements of every block
//
// After the rotation all is as the definition has it, sums in their fixed order included. A block's
// maximum and its two sums are finished between the four lanes, and each of them ends up with the
// blocks 2 t and 2 t + 1 of both lines: it makes their lengths and writes 16 bytes of codes per
// line. Codes of a matrix lack their global scale until then; it is a factor of the lengths alone,
// since the elements are divided by their maximum anyhow.
#include "mma_tile.h"
#include "quantize.h"

namespace nvfp4::cuda {
namespace {

typedef float OfBlocks[2][kTileBlocks];  // a number per line and register of a Strip
typedef float Own[2][2];                 // of this lane's blocks, 2 t and 2 t + 1, of both lines

// What the four lanes have of each block, put together by the lane whose block it is: over lanes 2
// apart first, then over neighbours. A lane sends half of what it has and gets the other's half.
template <class Combine>
NVFP4_DEVICE void collect(const OfBlocks& of, Combine combine, Own& own) {
    NVFP4_UNROLL(2)
    for (int i = 0; i < 2; ++i) {
        float half[4];
        NVFP4_UNROLL(4)
        for (int r = 0; r < 4; ++r) half[r] = combine(of[i][r], other_lane(of[i][r + 4], 2));
        NVFP4_UNROLL(2)
        for (int r = 0; r < 2; ++r) own[i][r] = combine(half[r], other_lane(half[r + 2], 1));
    }
}

NVFP4_DEVICE float add(float a, float b) { return a + b; }

// The first two additions of a block's fixed sum: outputs t and t + 8, t + 4 and t + 12, then both.
// One number at a time: ptxas 13.0 makes an FFMA2, which rounds once, of mul.rn.f32x2 and
// add.rn.f32x2, even under --fmad=false.
NVFP4_DEVICE float sum_of_products(Two a, Two b, Two c, Two d) {
    const Two first = product(a, b), second = product(c, d);
    return (first.x + first.y) + (second.x + second.y);
}

#if defined(NVFP4_CONVERTS)
NVFP4_DEVICE void widen_halves(uint32_t pair, float& low, float& high) {
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n\t}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}
#else
// Of one number, and what it stands for.
NVFP4_DEVICE uint32_t to_code(float x, float& value) {
    const float a = smaller_magnitude(x, E2M1::max), magic = e2m1_magic(a), sum = a + magic;
    const uint32_t minus = bits(x) & 0x80000000u;
    value = from_bits(bits(sum - magic) | minus);
    return (bits(sum) & E2M1::code_mask) | minus >> 28;
}
#endif

// The codes of outputs (t, t + 8) and (t + 4, t + 12) of two blocks, and what they stand for. The
// bytes are (t, t + 4) and (t + 8, t + 12) of each block.
NVFP4_DEVICE uint32_t to_codes(const Two (&v)[2][2], Two (&value)[2][2]) {
#if defined(NVFP4_CONVERTS)
    uint32_t word, pair[4];
    asm("{\n.reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %7, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %8, %6;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %11, %9;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %12, %10;\n"
        "mov.b32 %0, {a, b, c, d};\n"
        "cvt.rn.f16x2.e2m1x2 %1, a;\n"
        "cvt.rn.f16x2.e2m1x2 %2, b;\n"
        "cvt.rn.f16x2.e2m1x2 %3, c;\n"
        "cvt.rn.f16x2.e2m1x2 %4, d;\n\t}"
        : "=r"(word), "=r"(pair[0]), "=r"(pair[1]), "=r"(pair[2]), "=r"(pair[3])
        : "f"(v[0][0].x), "f"(v[0][0].y), "f"(v[0][1].x), "f"(v[0][1].y), "f"(v[1][0].x),
          "f"(v[1][0].y), "f"(v[1][1].x), "f"(v[1][1].y));
    NVFP4_UNROLL(2)
    for (int b = 0; b < 2; ++b) {
        widen_halves(pair[2 * b], value[b][0].x, value[b][1].x);
        widen_halves(pair[2 * b + 1], value[b][0].y, value[b][1].y);
    }
    return word;
#else
    uint32_t word = 0;
    NVFP4_UNROLL(2)
    for (int b = 0; b < 2; ++b) {
        const uint32_t byte = to_code(v[b][0].x, value[b][0].x) | to_code(v[b][1].x, value[b][1].x)
                                                                      << 4;
        const uint32_t next = to_code(v[b][0].y, value[b][0].y) | to_code(v[b][1].y, value[b][1].y)
                                                                      << 4;
        word |= (byte | next << 8) << (16 * b);
    }
    return word;
#endif
}

// Of a line: word p has this lane's codes of blocks 2 (p ^ t) and the next, in bytes (t, t + 4) and
// (t + 8, t + 12) of each. Returned are all codes of blocks 2 t and 2 t + 1, in their order.
NVFP4_DEVICE Chunk exchange_codes(const uint32_t (&word)[4]) {
    // of lane t ^ d, for blocks 2 t and 2 t + 1
    uint32_t of[4] = {word[0]};
    NVFP4_UNROLL(4)
    for (int d = 1; d < 4; ++d) of[d] = __shfl_xor_sync(~0u, word[d], d);

    // neighbours: bytes of outputs 0 to 3 and 8 to 11 in ``even``, of 4 to 7 and 12 to 15 in ``odd``
    const bool is_odd = threadIdx.x & 1;
    uint32_t even[2], odd[2];
    NVFP4_UNROLL(2)
    for (int d = 0; d < 2; ++d) {
        const uint32_t first = is_odd ? of[2 * d + 1] : of[2 * d];
        const uint32_t second = is_odd ? of[2 * d] : of[2 * d + 1];
        even[d] = select_bits(0x0f0f0f0fu, first, second << 4);
        odd[d] = select_bits(0x0f0f0f0fu, first >> 4, second);
    }

    // lanes 0 and 1 before 2 and 3
    const uint32_t order = threadIdx.x & 2 ? 0x4444u : 0u;
    Chunk chunk;
    NVFP4_UNROLL(2)
    for (int block = 0; block < 2; ++block) {
        const uint32_t selector = (block ? 0x7362u : 0x5140u) ^ order;
        const uint32_t x = pick_bytes(even[0], even[1], selector);
        const uint32_t y = pick_bytes(odd[0], odd[1], selector);
        chunk.word[2 * block] = pick_bytes(x, y, 0x5410u);
        chunk.word[2 * block + 1] = pick_bytes(x, y, 0x7632u);
    }
    return chunk;
}

// One orientation of the tile. global: of codes; ``line`` and ``block`` are where the tile begins
// in the operand.
template <bool down, bool half_precision>
NVFP4_DEVICE void quantize_strip(const Operand& operand, const unsigned char* tile,
                                 const SignWords& signs, const Factor<half_precision>& factor,
                                 int64_t line, int64_t block, float global) {
    constexpr float full_scale = 0x1.849d64p+2f;  // fl(6 / 0.988125), as in quantizers.h
    const int lane = static_cast<int>(threadIdx.x) % 32, first = threadIdx.x / 32 * kStrip;
    Strip y;
    rotate_strip<down>(tile, signs, factor, first, y);

    // the scale of the round, and maxima
    const float scale = round_scale(0, 1, 7);
    OfBlocks amax;
    NVFP4_UNROLL(16)
    for (int n = 0; n < 2 * kTileBlocks; ++n) {
        Two(&of)[2] = y[n % 2][n / 2];
        of[0] = product(of[0], scale);
        of[1] = product(of[1], scale);
        amax[n % 2][n / 2] = largest_magnitude(of[0], of[1]);
    }
    Own largest, inverse;
    collect(amax, [](float a, float b) { return larger_magnitude(a, b); }, largest);
    NVFP4_UNROLL(4)
    for (int n = 0; n < 4; ++n) {
        // zeros below 2^-120, as in quantizers.h
        const bool zero = largest[n / 2][n % 2] * global < 0x1p-120f;
        const float inverse_or_one = 1.0f / (zero ? 1.0f : largest[n / 2][n % 2]);
        inverse[n / 2][n % 2] = zero ? 0.0f : inverse_or_one;
        largest[n / 2][n % 2] = zero ? 0.0f : largest[n / 2][n % 2] * global;
    }

    // codes, and what the sums of a block get from this lane
    OfBlocks numerator, denominator;
    uint32_t word[2][4];
    NVFP4_UNROLL(8)
    for (int n = 0; n < kTileBlocks; ++n) {
        const int i = n % 2, pair = n / 2;
        Two v[2][2], q[2][2];
        NVFP4_UNROLL(2)
        for (int b = 0; b < 2; ++b) {
            const float mine = inverse[i][b];
            const float unit = pair == 0 ? mine : other_lane(mine, pair);
            v[b][0] = product(product(y[i][2 * pair + b][0], unit), full_scale);
            v[b][1] = product(product(y[i][2 * pair + b][1], unit), full_scale);
        }
        word[i][pair] = to_codes(v, q);
        NVFP4_UNROLL(2)
        for (int b = 0; b < 2; ++b) {
            numerator[i][2 * pair + b] = sum_of_products(v[b][0], v[b][0], v[b][1], v[b][1]);
            denominator[i][2 * pair + b] = sum_of_products(v[b][0], q[b][0], v[b][1], q[b][1]);
        }
    }
    Own square, inner;
    collect(numerator, add, square);
    collect(denominator, add, inner);

    // lengths and codes of this lane's blocks
    uint32_t peak = 0;
    const int64_t row_blocks = operand.padded / kBlock, at = block + lane % 4 * 2;
    NVFP4_UNROLL(2)
    for (int i = 0; i < 2; ++i) {
        float length[2];
        NVFP4_UNROLL(2)
        for (int b = 0; b < 2; ++b) {
            const float correction = inner[i][b] == 0.0f ? 1.0f : square[i][b] / inner[i][b];
            length[b] = largest[i][b] * (correction * (1.0f / full_scale));
            peak =
                larger_bits(peak, bits(largest[i][b]) < kInfinityBits ? bits(length[b]) : kNanBits);
        }
        const Chunk codes = exchange_codes(word[i]);
        const int64_t of = line + first + lane / 4 + 8 * i;
        if (of >= operand.lines) continue;
        *reinterpret_cast<Chunk*>(operand.codes + (of * row_blocks + at) * 8) = codes;
        *reinterpret_cast<Pair*>(operand.lengths + of * row_blocks + at) = {bits(length[0]),
                                                                            bits(length[1])};
    }
    peak = largest_of_warp(peak);
    if (lane == 0) raise(operand.peak, peak);
}

template <bool coded, bool wants_rows, bool wants_columns>
__global__ void __launch_bounds__(kThreads, 2)
    mma_eden_kernel(const Matrix m, const Operand rows, const Operand columns) {
    NVFP4_SHARED(memory);
    auto& beside = *reinterpret_cast<MmaBeside*>(memory + kMmaTileBytes);
    const int thread = static_cast<int>(threadIdx.x);
    // a grid has fewer than 2^31 blocks
    const uint32_t across = static_cast<uint32_t>((m.columns + kTile - 1) >> 7);
    const uint32_t tile_row = blockIdx.x / across;
    const Corner corner = {static_cast<int64_t>(tile_row) * kTile,
                           static_cast<int64_t>(blockIdx.x - tile_row * across) * kTile};

    // signs are drawn while the tile is on its way
    if constexpr (coded)
        load_codes_tile(m, corner.row, corner.column, memory);
    else
        load_elements_tile(m, corner.row, corner.column, memory);
    if (wants_rows) prepare_signs(rows, thread, beside.rows);
    if (wants_columns) prepare_signs(columns, thread - 32, beside.columns);
    __syncthreads();
    if (wants_rows) spread_signs(beside.rows, thread, beside.row_words);
    if (wants_columns) spread_signs(beside.columns, thread - 64, beside.column_words);
    wait_for_copies();
    __syncthreads();

    const Factor<coded> factor(thread % 32);
    if constexpr (wants_rows)
        quantize_strip<false>(rows, memory, beside.row_words, factor, corner.row,
                              corner.column / kBlock, 1.0f);
    if constexpr (wants_columns)
        quantize_strip<true>(columns, memory, beside.column_words, factor, corner.column,
                             corner.row / kBlock, coded ? m.coded.global_scale[0] : 1.0f);
}

bool on_sixteen(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool fits(const Matrix& m, const Operand& operand) {
    const bool source =
        m.element == Element::bfloat16 || (m.element == Element::codes && !m.coded.row_scaled &&
                                           reinterpret_cast<uintptr_t>(m.coded.codes) % 8 == 0);
    return operand.tensor_core && operand.rule == Rule::ms_eden && !operand.search &&
           operand.group == kTile && operand.rounds == 1 && source && on_sixteen(operand.codes) &&
           on_sixteen(operand.lengths);
}

}  // namespace

Variant mma_eden_variant(const Matrix& m, const Operand& operand, bool down) {
    if (!fits(m, operand)) return {};
    if (m.element == Element::codes)
        return down ? Variant{&mma_eden_kernel<true, false, true>, kTile} : Variant{};
    return {down ? &mma_eden_kernel<false, false, true> : &mma_eden_kernel<false, true, false>,
            kTile};
}

Variant mma_eden_pair_variant(const Matrix& m, const Operand& rows, const Operand& columns) {
    if (m.element == Element::codes || !fits(m, rows) || !fits(m, columns)) return {};
    return {&mma_eden_kernel<false, true, true>, kTile};
}

int mma_shared_bytes() { return kMmaSharedBytes; }

}  // namespace nvfp4::cuda
