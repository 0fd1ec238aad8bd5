// The rows of a matrix to codes, straight from registers: no shared memory, no tile.
//
// For rules that scale from the amax, in blocks of 1x16, without a rotation, where every row is
// whole blocks that begin on 16 bytes: what layers quantise most. A thread takes blocks of sixteen
// a grid's width apart: loads all of them first (two 16-byte loads each of BF16, four of float32),
// so that 64 bytes per thread are under way while one thread divides for the scales of the tensor;
// then stores each block's codes as eight bytes and its scale as one, which lie beside those of its
// neighbours. Every other operand takes a tile (quantize.h).
//
// Blocks of threads begin at the end of the matrix: what the amax read last is still in L2.
#pragma once

#include <type_traits>

#include "../layout.h"
#include "blocks.h"
#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {

constexpr int kHeld = 2;  // blocks of sixteen that a thread has loaded before it makes the first

// n / d of n < 2^31, by a product: 2^(31 + shift) / d rounded up is the multiplier.
struct Divider {
    uint32_t multiplier, shift;
    NVFP4_FN uint32_t of(uint32_t n) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(2u * n) * multiplier >> 32) >> shift;
    }
};

inline Divider divider(uint32_t d) {
    uint32_t shift = 0;
    while (shift < 31 && (1u << shift) < d) ++shift;
    return {static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / d) + 1u, shift};
}

// A matrix whose rows are whole blocks of sixteen.
struct Rows {
    const void* data;
    int64_t row_stride;  // in elements
    uint32_t blocks;     // in all rows, fewer than 2^31
    uint32_t across;     // in a row
    Divider by_across;
};

// Sixteen elements as they lie in memory.
template <class Stored>
struct RawBlock {
    static constexpr int kChunks = sizeof(Stored);
    Chunk chunk[kChunks];
};

template <class Stored>
NVFP4_DEVICE RawBlock<Stored> load_block(const Stored* at) {
    RawBlock<Stored> raw;
    NVFP4_UNROLL(4)
    for (int c = 0; c < RawBlock<Stored>::kChunks; ++c)
        raw.chunk[c] = reinterpret_cast<const Chunk*>(at)[c];
    return raw;
}

// The elements as float32; returns their amax, of BF16 by two at a time.
NVFP4_DEVICE float unpack(const RawBlock<uint16_t>& raw, float (&x)[kBlock]) {
    uint32_t most = 0;
    NVFP4_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
        const uint32_t pair = raw.chunk[i / 4].word[i % 4];
        x[2 * i] = from_bits(pair << 16);
        x[2 * i + 1] = from_bits(pair & 0xffff0000u);
        most = i == 0 ? pair : larger_pair(most, pair);
    }
    return magnitude(larger_magnitude(from_bits(most << 16), from_bits(most & 0xffff0000u)));
}

NVFP4_DEVICE float unpack(const RawBlock<uint32_t>& raw, float (&x)[kBlock]) {
    NVFP4_UNROLL(16)
    for (int i = 0; i < kBlock; ++i) x[i] = from_bits(raw.chunk[i / 4].word[i % 4]);
    return block_amax(x);
}

template <class Stored, class Rule>
__global__ void __launch_bounds__(kThreads, 3) rows_kernel(const Rows m, const Operand operand) {
    NVFP4_SHARED(memory);
    auto& scales = *reinterpret_cast<Scales*>(memory);
    const uint32_t last = gridDim.x - 1 - blockIdx.x;
    const uint32_t first = last * (kHeld * kThreads) + threadIdx.x;

    RawBlock<Stored> raw[kHeld];
    uint32_t row[kHeld];
    NVFP4_UNROLL(4)
    for (int h = 0; h < kHeld; ++h) {
        const uint32_t n = first + static_cast<uint32_t>(h * kThreads);
        if (n >= m.blocks) continue;
        row[h] = m.by_across.of(n);
        const uint32_t column = (n - row[h] * m.across) * kBlock;
        raw[h] = load_block(static_cast<const Stored*>(m.data) + row[h] * m.row_stride + column);
    }

    // while they are under way
    if (threadIdx.x == 0 && !operand.row_scaled) scales = scales_of(operand.peak[0], Rule::cap);
    __syncthreads();

    const Noise noise{value_of(operand.seed)};
    NVFP4_UNROLL(4)
    for (int h = 0; h < kHeld; ++h) {
        const uint32_t n = first + static_cast<uint32_t>(h * kThreads);
        if (n >= m.blocks) return;
        const Scales s = operand.row_scaled ? scales_of(operand.peak[row[h]], Rule::cap) : scales;
        float x[kBlock];
        const float amax = unpack(raw[h], x);
        const Made made = make_block<Rule>(x, amax, s, operand.trials, noise, uint64_t{2} * n);
        reinterpret_cast<Pair*>(operand.codes)[n] = {made.codes.low, made.codes.high};
        operand.block_scale[n] = static_cast<uint8_t>(made.scale);
        const uint32_t column = n - row[h] * m.across;
        if (operand.swizzled != nullptr)
            operand.swizzled[swizzled_offset<uint32_t>(row[h], column, m.across)] =
                static_cast<uint8_t>(made.scale);
        if (operand.row_scaled ? column == 0 : n == 0)
            operand.global_scale[operand.row_scaled ? row[h] : 0] = s.stored();
    }
}

using RowsKernel = void (*)(Rows, Operand);

template <class Rule>
RowsKernel rows_kernel_of(bool wide) {
    return wide ? &rows_kernel<uint32_t, Rule> : &rows_kernel<uint16_t, Rule>;
}

// Null where a rule has no such kernel.
RowsKernel plain_rows(const Operand& operand, bool wide);
RowsKernel searched_rows(const Operand& operand, bool wide);

}  // namespace nvfp4::cuda
