// The random Hadamard rotation of a panel, group by group of its columns.
//
//     x <- scale * H (signs . x)      per round
//
// A fixed rotation (NVIDIA's) rounds x to BF16 before and after its one round.
//
// A row is a lane, so a butterfly of columns i and i + stride is one addition and one subtraction
// of vectors. A group of 128 columns is eight blocks of sixteen, kBlockStride vectors apart:
// strides 1 to 8 run on sixteen neighbours in registers, then strides 16 to 64 on the eight vectors
// that lie a block apart. Nothing is shuffled.
#pragma once

#include "../hadamard.h"
#include "panel.h"

NVFP4_BEGIN

// The signs, scales and stages, worked out once for a tensor.
struct Rotation {
    int group, rounds;
    bool fixed;
    float scale[kMaxRounds];
    uint32_t sign[kMaxRounds][kMaxGroup];  // the sign bit to flip, or 0

    explicit Rotation(const RotationSpec& spec)
        : group(spec.group), rounds(spec.rounds), fixed(spec.fixed) {
        for (int r = 0; r < rounds && group > 0; ++r) {
            uint32_t word[4];
            sign_bits(spec.sign_seed, fixed, r, word);
            for (int j = 0; j < group; ++j) sign[r][j] = (word[j / 32] >> (j % 32) & 1u) << 31;
            scale[r] = round_scale(r, rounds, __builtin_ctz(static_cast<unsigned>(group)));
        }
    }

    void apply(Panel& panel, int columns) const {
        for (int start = 0; group > 0 && start < columns; start += group)
            for (int part = 0; part < kParts; ++part) {
                Float* x = panel + place(start, part);
                if (fixed) round_group(x);
                for (int r = 0; r < rounds; ++r) rotate(x, r);
                if (fixed) round_group(x);
            }
    }

private:
    void round_group(Float* x) const {
        for (int i = 0; i < group / kBlock; ++i)
            for (int j = 0; j < kBlock; ++j)
                x[i * kBlockStride + j] = to_bfloat16(x[i * kBlockStride + j]);
    }

    void rotate(Float* x, int r) const {
        // strides 1 to 8; the scale comes last, which for groups of 16 is here
        const float last = group == kBlock ? scale[r] : 1.0f;
        for (int i = 0; i < group / kBlock; ++i) {
            Float* y = x + i * kBlockStride;
            Float v[kBlock];
#pragma GCC unroll 16
            for (int j = 0; j < kBlock; ++j) v[j] = from_bits(bits(y[j]) ^ sign[r][kBlock * i + j]);
            fwht(v);
#pragma GCC unroll 16
            for (int j = 0; j < kBlock; ++j) y[j] = v[j] * last;
        }

        // the larger strides
        if (group == 32) across_blocks<2>(x, scale[r]);
        if (group == 64) across_blocks<4>(x, scale[r]);
        if (group == 128) across_blocks<8>(x, scale[r]);
    }

    template <int n>
    static void across_blocks(Float* x, float scale) {
        for (int i = 0; i < kBlock; ++i) {
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
