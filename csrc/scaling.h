// Scales from maxima, and sums in the fixed order; the twin of nvfp4/numerics/scaling.py.
//
//     S = 6 cap / amax           of a tensor or a row: its largest element becomes 6 times ``cap``
//     base = amax_block S / 6    the block scale by which the largest of a block becomes 6
//
// Every product, quotient and minimum is a float32 operation of its own, in the order written here.
#pragma once

#include "formats.h"
#include "lanes.h"
#if defined(NVFP4_GPU)
#include "cuda/words.h"
#endif

NVFP4_BEGIN

// Largest |x|; as integers, so that NaN is larger than anything.
template <class F, int n>
NVFP4_FN F block_amax(const F (&x)[n]) {
#if defined(NVFP4_GPU)
    F most = x[0];
    NVFP4_UNROLL(16)
    for (int i = 1; i < n; ++i) most = larger_magnitude(most, x[i]);
    return magnitude(most);
#else
    Int<F> largest = bits(x[0]) & 0x7fffffffu;
    NVFP4_UNROLL(16)
    for (int i = 1; i < n; ++i) largest = larger_bits(largest, bits(x[i]) & 0x7fffffffu);
    return from_bits(largest);
#endif
}

// S = min(fl(6 cap / amax), FLT_MAX), 1 where amax is 0.
template <class F>
NVFP4_FN F encode_scale(F amax, float cap) {
    const F scale = smaller(splat<F>(E2M1::max * cap) / amax, splat<F>(kFloatMax));
    return select(amax == 0.0f, splat<F>(1.0f), scale);
}

// fl(amax * fl(S * fl(1/6))), at most FLT_MAX.
template <class F>
NVFP4_FN F base_scale(F amax, F scale) {
    return smaller(amax * (scale * (1.0f / 6.0f)), splat<F>(kFloatMax));
}

// leaf(0) + ... + leaf(15) in the fixed order: x[i] + x[i + 8], then x[i] + x[i + 4], and so on
// with 2 and 1. Written from the last addition down, so that few sums are alive at a time.
// tree_sum<F, 1, end> adds leaves 0 ... end - 1: the last additions of the order alone.
// tree_sum<F, n> adds leaves 0, n, 2 n, ...: the first ones alone.
template <class F, int n = 1, int end = kBlock, class Leaf>
NVFP4_FN F tree_sum(Leaf leaf, int i = 0) {
    if constexpr (n == end) {
        return leaf(i);
    } else {
        const F low = tree_sum<F, 2 * n, end>(leaf, i);
        return low + tree_sum<F, 2 * n, end>(leaf, i + n);
    }
}

NVFP4_END
