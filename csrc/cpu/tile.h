// A 16x16 tile of which lane r holds row r: what its lanes share.
#pragma once

#include "../scaling.h"

NVFP4_BEGIN

struct TileScope {
    static NVFP4_FN Float amax(Float a) { return splat<Float>(from_bits(lane_max_bits(a))); }

    // The fixed sum over 256 values in row-major order: rows i and i + 8 first, ..., then columns j and j + 8.
    template <class F, class Leaf>
    static NVFP4_FN Float sum(Leaf leaf) {
        Float t[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) t[i] = leaf(i);
        transpose(t);
        float lane[kLanes];
        store(lane, tree_sum<Float>([&](int i) { return t[i]; }));
        return splat<Float>(tree_sum<float>([&](int i) { return lane[i]; }));
    }
};

NVFP4_END
