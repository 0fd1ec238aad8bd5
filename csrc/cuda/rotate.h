// The random Hadamard rotation of blocks that lie in registers.
//
// A thread holds ``held`` blocks of sixteen that follow each other in a line, the next lane the
// next ones; a group of 128 is in eight lanes of one block or four of two. Strides 1 to 8 run
// within a block, then come those within a thread, then those between lanes, one shuffle per
// element. Every lane of a group does its part of each addition, so nothing is computed twice.
#pragma once

#include "../codec.h"
#include "../hadamard.h"
#include "blocks.h"
#include "tile.h"

namespace nvfp4::cuda {

typedef uint32_t Signs[kMaxRounds][4];  // bits of each round, set: minus

// The sign bits of every round from ``first`` on into shared memory, by the first threads; a barrier
// has to follow.
NVFP4_DEVICE void prepare_signs(const Operand& operand, int thread, Signs& signs, int first = 0) {
    if (thread < first || thread >= operand.rounds || operand.group == 0) return;
    sign_bits(value_of(operand.sign_seed), operand.fixed, thread, signs[thread]);
}

NVFP4_DEVICE float other_lane(float x, int distance) {
    return from_bits(__shfl_xor_sync(~0u, bits(x), distance));
}

NVFP4_DEVICE int log2_of(int power) {
    int n = 0;
    while (1 << n < power) ++n;
    return n;
}

// x: blocks number block, block + 1, ... of a line.
template <int held>
NVFP4_DEVICE void rotate(float (&x)[held][kBlock], int block, const Operand& operand,
                         const Signs& signs) {
    if (operand.group == 0) return;
    const int blocks = operand.group / kBlock;
    const auto round_all = [&] {
        NVFP4_UNROLL(64)
        for (int i = 0; i < held * kBlock; ++i)
            x[i / kBlock][i % kBlock] = to_bfloat16(x[i / kBlock][i % kBlock]);
    };
    if (operand.fixed) round_all();
    for (int round = 0; round < operand.rounds; ++round) {
        const float scale = round_scale(round, operand.rounds, log2_of(operand.group));

        // signs, and strides 1 to 8
        NVFP4_UNROLL(64)
        for (int h = 0; h < held; ++h) {
            const int at = (block + h) % blocks;
            const uint32_t minus = signs[round][at / 2] >> (at % 2 * 16);
            NVFP4_UNROLL(64)
            for (int i = 0; i < kBlock; ++i)
                x[h][i] = from_bits(bits(x[h][i]) ^ (minus >> i & 1u) << 31);
            fwht(x[h]);
        }

        // between the blocks of a thread
        NVFP4_UNROLL(64)
        for (int stride = 1; stride < held; stride *= 2) {
            if (stride >= blocks) continue;
            NVFP4_UNROLL(64)
            for (int i = 0; i < held * kBlock; ++i) {
                const int h = i / kBlock, j = i % kBlock;
                if (h & stride) continue;
                const float a = x[h][j], b = x[h + stride][j];
                x[h][j] = a + b;
                x[h + stride][j] = a - b;
            }
        }

        // between lanes: the lower one adds, the upper one subtracts what it has from the other's
        for (int stride = held; stride < blocks; stride *= 2) {
            const uint32_t minus = block & stride ? 0x80000000u : 0u;
            NVFP4_UNROLL(64)
            for (int i = 0; i < held * kBlock; ++i) {
                float& mine = x[i / kBlock][i % kBlock];
                mine = other_lane(mine, stride / held) + from_bits(bits(mine) ^ minus);
            }
        }

        NVFP4_UNROLL(64)
        for (int i = 0; i < held * kBlock; ++i) x[i / kBlock][i % kBlock] *= scale;
    }
    if (operand.fixed) round_all();
}

}  // namespace nvfp4::cuda
