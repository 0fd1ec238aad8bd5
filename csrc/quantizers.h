// The quantisers, as rules on one block per lane; twins of nvfp4/quantizers/*.py, where the
// formulas and their sources stand.
//
// A rule has two halves, so that a caller may choose the scales of many blocks before it makes any
// codes:
//
//     choose(x, given)        the block scale of x, as a code and as a value
//     pack(x, scale, given)   the sixteen codes of x on that scale, in two words
//
// x[0..15] are the elements of a block. ``Scope`` reduces what lanes share: nothing for 1x16 blocks
// (RowScope), everything for a 16x16 tile of which each lane holds a row (TileScope in cpu/tile.h,
// LaneScope in cuda/quantize.h). Where a vector has fewer lanes than a tile has rows, choose gets
// the whole tile: x[0..n-1], sixteen vectors for the first rows, then the others'.
//
//     rtn, sr, sr_te                 Plain: one scale, rounded; codes to nearest or by noise
//     four_over_six, scale_search    Searched: the best of two scales, or of those that are given
//     ms_eden                        MsEden: codes first, then the scale that makes them unbiased
#pragma once

#include "codec.h"
#include "operands.h"
#include "philox.h"
#include "rounding.h"
#include "scaling.h"
#if defined(NVFP4_GPU)
#include "cuda/e2m1.h"
#endif

NVFP4_BEGIN

// Sixteen signed codes, eight per word, low nibble first.
template <class F>
struct Packed {
    Int<F> low, high;
};

// What a rule knows beside its elements.
template <class F>
struct Given {
    F encode;              // S, per tensor or per row
    F global_scale;        // fl(1 / S)
    const F* noise;        // sixteen centred uniforms, or null for deterministic rules
    const Trials* trials;  // what scale_search tries
};

// A block of its own in every lane.
struct RowScope {
    template <class F>
    static NVFP4_FN F amax(F a) {
        return a;
    }
    template <class F, class Leaf>
    static NVFP4_FN F sum(Leaf leaf) {
        return tree_sum<F>(leaf);
    }
};

enum class Metric { mse, mae, abs_max };

// Eight signed codes in a word, low nibble first, put in one after the other. Of the j-th, the top
// bit of ``sign`` is its sign, and the low four bits of ``code`` are zero and its magnitude's code.
// Rotated left by one, both together are a nibble that ends in its sign; finish_codes moves the
// signs of all eight to the front of their nibbles.
// Where a vector has no select by bits, cpu/simd.h has words of its own.
template <class U>
NVFP4_FN U put_code(U word, U sign, U code, int j) {
    const U nibble = rotate_left(select_bits(0x80000000u, sign, code), 4 * j + 1);
    return select_bits(15u << (4 * j), nibble, word);
}
template <class U>
NVFP4_FN U finish_codes(U word) {
    return select_bits(0x88888888u, word << 3, (word >> 1) & 0x77777777u);
}

// Codes of x[i] * multiplier, which is not negative. ``round(a, i)`` returns bits that end in zero
// and the code of a <= 6.
template <class F, class Round>
NVFP4_FN Packed<F> pack_codes(const F (&x)[kBlock], F multiplier, Round round) {
    Int<F> half[2];
    NVFP4_UNROLL(2)
    for (int h = 0; h < 2; ++h) {
        Int<F> word = {};
        NVFP4_UNROLL(8)
        for (int j = 0; j < 8; ++j) {
            const F a = smaller_magnitude(x[8 * h + j] * multiplier, E2M1::max);
            word = put_code(word, bits(x[8 * h + j]), round(a, 8 * h + j), j);
        }
        half[h] = finish_codes(word);
    }
    return {half[0], half[1]};
}

template <class F>
NVFP4_FN Packed<F> pack_nearest(const F (&x)[kBlock], F multiplier) {
#if defined(NVFP4_GPU)
    return {cuda::nearest_eight(x, multiplier), cuda::nearest_eight(x + 8, multiplier)};
#else
    return pack_codes(x, multiplier, [](F a, int) { return e2m1_nearest(a); });
#endif
}

// min(fl(1 / fl(s * global_scale)), FLT_MAX): a non-zero block whose scale underflowed keeps
// FLT_MAX.
template <class F>
NVFP4_FN F element_multiplier(F block_scale, F global_scale) {
    return smaller(splat<F>(1.0f) / (block_scale * global_scale), splat<F>(kFloatMax));
}

template <class Scope, class F, int n>
NVFP4_FN F scope_amax(const F (&x)[n]) {
    return Scope::amax(block_amax(x));
}

enum class Rounding { to_nearest, stochastic_up, stochastic_te };

// rtn, sr, sr_te: the scale that the largest asks for, capped at 448.
template <class Scope, Rounding rounding>
struct Plain {
    static constexpr bool noisy = rounding != Rounding::to_nearest;
    static constexpr float cap = E4M3::max;

    template <class F, int n>
    static NVFP4_FN Rounded<F> choose(const F (&x)[n], const Given<F>& given) {
        return by_amax(scope_amax<Scope>(x), given);
    }

    template <class F>
    static NVFP4_FN Rounded<F> by_amax(F amax, const Given<F>& given) {
        const F base = smaller(base_scale(amax, given.encode), splat<F>(E4M3::max));
        return rounding == Rounding::stochastic_up ? up<E4M3>(base) : nearest<E4M3>(base);
    }

    template <class F>
    static NVFP4_FN Packed<F> pack(const F (&x)[kBlock], F scale, const Given<F>& given) {
        const F multiplier = element_multiplier(scale, given.global_scale);
        if constexpr (noisy)
            return pack_codes(x, multiplier,
                              [&](F a, int i) { return e2m1_stochastic(a, given.noise[i]); });
        else
            return pack_nearest(x, multiplier);
    }
};

// 1 / scale, and 0 for a scale of 0.
template <class F>
NVFP4_FN F guarded_inverse(F scale) {
    return select(scale == 0.0f, splat<F>(0.0f), splat<F>(1.0f) / scale);
}

// Error of the block |x| S against its codes on a candidate scale.
template <class Scope, Metric metric, class F, int n>
NVFP4_FN F candidate_error(const F (&scaled)[n], F scale) {
    const F inverse = guarded_inverse(scale);
    const auto error = [&](int i) {
        const F q = e2m1_nearest_value(smaller(scaled[i] * inverse, splat<F>(E2M1::max)));
        const F e = less_product(scaled[i], q, scale);  // six significant bits
        return metric == Metric::mse ? e * e : magnitude(e);
    };
    if constexpr (metric != Metric::abs_max) return Scope::template sum<F>(error);
    F largest = error(0);
    NVFP4_UNROLL(16)
    for (int i = 1; i < n; ++i) largest = larger(largest, error(i));
    return Scope::amax(largest);
}

// Rules that try several block scales on |x| S and keep the one of least error, the first of those
// that are equal. The cap is 256, since they may try up to 1.75 times what the largest asks for.
template <class Scope>
struct Searched {
    static constexpr bool noisy = false;
    static constexpr float cap = kSearchCap;

    // |x| S, and the block scale that their largest asks for.
    template <class F, int n>
    static NVFP4_FN F prepare(const F (&x)[n], F encode, F (&scaled)[n]) {
        NVFP4_UNROLL(16)
        for (int i = 0; i < n; ++i) scaled[i] = magnitude(x[i]) * encode;
        return base_scale(scope_amax<Scope>(x), encode);
    }

    // The codes of x S on the scale that won.
    template <class F>
    static NVFP4_FN Packed<F> pack(const F (&x)[kBlock], F scale, const Given<F>& given) {
        F scaled[kBlock];
        NVFP4_UNROLL(16)
        for (int i = 0; i < kBlock; ++i) scaled[i] = x[i] * given.encode;
        return pack_nearest(scaled, guarded_inverse(scale));
    }
};

// The largest of a block at 6 or at 4, whichever errs less by ``metric``.
template <class Scope, Metric metric>
struct FourOverSix : Searched<Scope> {
    template <class F, int n>
    static NVFP4_FN Rounded<F> choose(const F (&x)[n], const Given<F>& given) {
        F scaled[n];
        const F base = Searched<Scope>::prepare(x, given.encode, scaled);
        const Rounded<F> six = at_six(base), four = at_four(base);
        const auto better = candidate_error<Scope, metric>(scaled, four.value) <
                            candidate_error<Scope, metric>(scaled, six.value);
        return {select(better, four.code, six.code), select(better, four.value, six.value)};
    }

    template <class F>
    static NVFP4_FN Rounded<F> at_six(F base) {
        return nearest<E4M3>(smaller(base, splat<F>(E4M3::max)));
    }
    template <class F>
    static NVFP4_FN Rounded<F> at_four(F base) {
        return nearest<E4M3>(smaller(base * 1.5f, splat<F>(E4M3::max)));
    }
};

// Neighbours of the scale that the largest asks for, as many as there are trials: the least squared
// error. Steps are read where the caller has them: on GPUs, among the arguments of the kernel.
template <class Scope>
struct ScaleSearch : Searched<Scope> {
    template <class F, int n>
    static NVFP4_FN Rounded<F> choose(const F (&x)[n], const Given<F>& given) {
        F scaled[n];
        const F base = Searched<Scope>::prepare(x, given.encode, scaled);
        const Rounded<F> first = nearest<E4M3>(smaller(base, splat<F>(E4M3::max)));

        // no error is infinite, so that the first trial wins
        Rounded<F> best = first;
        F best_error = splat<F>(from_bits(kInfinityBits));
        const Trials& trials = *given.trials;
        NVFP4_ROLLED
        for (int i = 0; i < trials.count; ++i) {
            const Int<F> code = neighbour<F>(first.code, trials.value[i]);
            const F value = decode<E4M3, F>(code);
            const F error = candidate_error<Scope, Metric::mse>(scaled, value);
            const auto better = error < best_error;
            best = {select(better, code, best.code), select(better, value, best.value)};
            best_error = smaller(error, best_error);
        }
        return best;
    }

    // code + step within [1, 126]; a zero scale stays zero.
    template <class F>
    static NVFP4_FN Int<F> neighbour(Int<F> code, float step) {
        const F moved = to_float(code) + step;
        const F kept = larger(smaller(moved, splat<F>(E4M3::largest_code)), splat<F>(1.0f));
        return select(code == 0u, code, truncate(kept));
    }
};

// The rules by the names that kernels have.
template <class Scope>
using Nearest = Plain<Scope, Rounding::to_nearest>;  // rtn
template <class Scope>
using Up = Plain<Scope, Rounding::stochastic_up>;  // sr
template <class Scope>
using Clipped = Plain<Scope, Rounding::stochastic_te>;  // sr_te
template <class Scope>
using Squares = FourOverSix<Scope, Metric::mse>;
template <class Scope>
using Magnitudes = FourOverSix<Scope, Metric::mae>;
template <class Scope>
using Largest = FourOverSix<Scope, Metric::abs_max>;

// MS-EDEN on a rotated block: codes of v = c y / amax, and ``length``, the block scale r as a
// float. r is what makes <y, decoded> = <y, y>; it is rounded by noise once the tensor's largest is
// known. ``search`` tries several c's and keeps the one of least squared error, the first at
// equality.
template <bool search>
struct MsEden {
    static constexpr float full_scale = 0x1.849d64p+2f;  // fl(6 / 0.988125), arXiv 2601.22813

    template <class F>
    static NVFP4_FN Packed<F> pack(const F (&y)[kBlock], F amax, const Trials& trials, F& length) {
        // zeros below: 1 / amax and amax / 448 stay finite and not zero
        const F a = select(amax < 0x1p-120f, splat<F>(0.0f), amax);
        const F inverse = guarded_inverse(a);

        // |y| / amax on c, or on each of several
        F unit[kBlock];
        NVFP4_UNROLL(16)
        for (int i = 0; i < kBlock; ++i) unit[i] = magnitude(y[i]) * inverse;
        F best_c = splat<F>(full_scale), best_t = splat<F>(0.0f);
        if constexpr (!search) {
            best_t = candidate_length(unit, full_scale, 1.0f / full_scale);
        } else {
            // no error of finite elements is infinite, so that the first trial wins
            F best_error = splat<F>(from_bits(kInfinityBits));
            NVFP4_ROLLED
            for (int i = 0; i < trials.count; ++i) {
                const float c = trials.value[i];
                const F t = candidate_length(unit, c, trials.inverse[i]);
                const F candidate = error(unit, c, t);
                const auto better = candidate < best_error;
                best_c = select(better, splat<F>(c), best_c);
                best_t = select(better, t, best_t);
                best_error = smaller(candidate, best_error);
            }
        }
        length = a * best_t;

        F signed_unit[kBlock];
        NVFP4_UNROLL(16)
        for (int i = 0; i < kBlock; ++i) signed_unit[i] = y[i] * inverse;
        return pack_nearest(signed_unit, best_c);
    }

    template <class F>
    static NVFP4_FN F rounded(F unit, float c) {
        return e2m1_nearest_value(smaller(unit * c, splat<F>(E2M1::max)));
    }

    // t = fl(<v, v> / <v, q>) * fl(1 / c)
    template <class F>
    static NVFP4_FN F candidate_length(const F (&unit)[kBlock], float c, float inverse) {
        const F numerator = tree_sum<F>([&](int i) {
            const F v = unit[i] * c;
            return v * v;
        });
        const F denominator =
            tree_sum<F>([&](int i) { return (unit[i] * c) * rounded(unit[i], c); });
        const F correction = select(denominator == 0.0f, splat<F>(1.0f), numerator / denominator);
        return correction * inverse;
    }

    template <class F>
    static NVFP4_FN F error(const F (&unit)[kBlock], float c, F t) {
        return tree_sum<F>([&](int i) {
            const F e = unit[i] - rounded(unit[i], c) * t;
            return e * e;
        });
    }
};

NVFP4_END
