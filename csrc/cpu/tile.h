// A 16x16 tile of which each lane holds a row, in as many vectors as sixteen rows take: what its
// lanes share. The twin of RowScope in quantizers.h, by which a rule becomes one for tiles.
//
// Sums have one order on every processor: the 256 values row by row, halved eight times, row i and
// row i + 8 first, column j and column j + 1 last. With 8 lanes, rows i and i + 8 lie in two
// vectors and the next three halvings are between lanes. There the columns are turned into vectors,
// so that each addition is of whole vectors again.
#pragma once

#include "../scaling.h"
#include "panel.h"

NVFP4_BEGIN

struct TileScope {
    static NVFP4_FN Float amax(Float a) { return splat<Float>(from_bits(lane_max_bits(a))); }

    // leaf(i): value i of every row of a part, its parts one after the other.
    template <class F, class Leaf>
    static NVFP4_FN F sum(Leaf leaf) {
        // rows in different vectors
        Float t[kBlock];
#pragma GCC unroll 16
        for (int c = 0; c < kBlock; ++c)
            t[c] =
                tree_sum<Float, kLanes>([&](int row) { return leaf(row / kLanes * kBlock + c); });

        // rows in the lanes of one, kLanes columns at a time
        Float column[kParts];
#pragma GCC unroll 4
        for (int q = 0; q < kParts; ++q) {
            transpose(square(t, q));
            column[q] = tree_sum<Float, 1, kLanes>([&](int row) { return t[q * kLanes + row]; });
        }

        // columns
        float lane[kLanes];
        store(lane, tree_sum<Float, kLanes>([&](int c) { return column[c / kLanes]; }));
        return splat<Float>(tree_sum<float, 1, kLanes>([&](int c) { return lane[c]; }));
    }
};

NVFP4_END
