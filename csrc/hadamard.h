// The random Hadamard rotation by butterflies in ascending stride; the twin of
// nvfp4/numerics/hadamard.py.
//
//     y = scale * H (signs . x)      for each round, on groups of 16, 32, 64 or 128 elements
//
// Here are a round's signs, its scale and the butterflies within one thread or lane; how a group is
// spread over vectors or lanes is a matter of cpu/rotation.h and cuda/rotate.h.
#pragma once

#include "lanes.h"
#include "philox.h"

NVFP4_BEGIN

constexpr int kMaxGroup = 128;
constexpr int kMaxRounds = 3;
// bit j set: minus at position j (arXiv 2509.25149, TransformerEngine)
constexpr uint32_t kNvidiaSigns = 0xD7E8u;

// The sign bits of one round; bit j of the words, low first, set means minus at position j. A fixed
// rotation has NVIDIA's sixteen, any other 128 random ones.
NVFP4_FN void sign_bits(uint64_t sign_seed, bool fixed, int round, uint32_t word[4]) {
    if (fixed)
        word[0] = kNvidiaSigns, word[1] = word[2] = word[3] = 0u;
    else
        philox<uint32_t>(sign_seed, static_cast<uint32_t>(round), 0u, kSignStream, word);
}

// The butterflies of a round make a vector sqrt(group) times as long. Rounds 0 and 1 undo that
// together, by powers of two whose product is 1/group, so that nothing is rounded; a last round
// without a partner, which has an even index, takes fl(group^-1/2).
NVFP4_FN float round_scale(int round, int rounds, int log2_group) {
    const int even = log2_group / 2, odd = log2_group - even;
    if (round == rounds - 1 && round % 2 == 0) {
        const float power = from_bits(static_cast<uint32_t>(127 - even) << 23);
        // fl(2^-1/2) times a power of two is exact
        return log2_group % 2 == 0 ? power : power * 0x1.6a09e6p-1f;
    }
    return from_bits(static_cast<uint32_t>(127 - (round % 2 == 0 ? even : odd)) << 23);
}

// Walsh-Hadamard transform of v[0], v[1], ..., strides 1, 2, ..., n/2.
template <int n, class F>
NVFP4_FN void fwht(F (&v)[n]) {
    NVFP4_UNROLL(8)
    for (int stride = 1; stride < n; stride *= 2) {
        NVFP4_UNROLL(16)
        for (int i = 0; i < n; ++i) {
            if (i & stride) continue;
            const F a = v[i], b = v[i + stride];
            v[i] = a + b;
            v[i + stride] = a - b;
        }
    }
}

NVFP4_END
