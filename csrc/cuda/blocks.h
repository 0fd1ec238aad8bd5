// What a thread makes of the sixteen elements of a block: codes and their scale.
//
//     make_block<Rule>(x, amax, scales, ...)   codes, and the block scale as E4M3
//     make_eden<search>(y, amax, length)       codes, and the length r that their scale will be
//
// Equal to choose and pack of quantizers.h. Where those would round the same element twice, to
// compare scales and to make its code, the first rounding is kept here: a thread has registers for
// the codes on both scales.
#pragma once

#include "../quantizers.h"
#include "kernels.h"

namespace nvfp4::cuda {

NVFP4_FN uint64_t value_of(const Seed& seed) { return seed.at ? *seed.at : seed.value; }

struct Made {
    Packed<float> codes;
    uint32_t scale;  // an E4M3 code
};

// The words of Philox that round elements 8 counter, 8 counter + 1, ...
struct Noise {
    uint64_t seed;
    NVFP4_FN void words(uint64_t counter, uint32_t (&word)[4]) const {
        philox<uint32_t>(seed, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                         kElementStream, word);
    }
};

// The scales of a tensor or a row, which one thread finds for all.
struct Scales {
    float encode, global_scale;
    bool finite;
    NVFP4_FN float stored() const { return finite ? global_scale : from_bits(kNanBits); }
};

// amax: bits of it, whose sign a caller may have set. Of what is not finite the scales are those of
// zeros.
NVFP4_FN Scales scales_of(uint32_t amax, float cap) {
    const uint32_t peak = amax & 0x7fffffffu;
    const bool finite = peak < kInfinityBits;
    const float encode = encode_scale(finite ? from_bits(peak) : 0.0f, cap);
    return {encode, 1.0f / encode, finite};
}

// Signed codes of v and what they stand for, both times kUnit.
template <bool bounded>
NVFP4_FN Packed<float> round_block(const float (&v)[kBlock], const Packed<float>& signs,
                                   float (&q)[kBlock]) {
    const uint32_t low = round_eight<bounded>(v, signs.low, q);
    return {low, round_eight<bounded>(v + 8, signs.high, q + 8)};
}

NVFP4_FN Packed<float> signs_of_block(const float (&v)[kBlock]) {
    return {signs_of_eight(v), signs_of_eight(v + 8)};
}

// amax: of the elements of this thread; ``counter``: of its first eight draws.
template <class Rule>
struct Maker {
    static NVFP4_FN Made make(const float (&x)[kBlock], float, const Given<float>& given,
                              const Noise&, uint64_t) {
        const Rounded<float> scale = Rule::choose(x, given);
        return {Rule::pack(x, scale.value, given), scale.code};
    }
};

template <class Scope, Rounding rounding>
struct Maker<Plain<Scope, rounding>> {
    using Rule = Plain<Scope, rounding>;
    static NVFP4_FN Made make(const float (&x)[kBlock], float amax, const Given<float>& given,
                              const Noise& noise, uint64_t counter) {
        const Rounded<float> scale = Rule::by_amax(Scope::amax(amax), given);
        if constexpr (!Rule::noisy) {
            return {Rule::pack(x, scale.value, given), scale.code};
        } else {
            const float multiplier = element_multiplier(scale.value, given.global_scale);
            uint32_t half[2];
            NVFP4_UNROLL(2)
            for (int h = 0; h < 2; ++h) {
                uint32_t word[4];
                noise.words(counter + static_cast<uint64_t>(h), word);
                half[h] = stochastic_eight(x + 8 * h, multiplier, word);
            }
            return {{half[0], half[1]}, scale.code};
        }
    }
};

template <class Scope, Metric metric>
struct Maker<FourOverSix<Scope, metric>> {
    using Rule = FourOverSix<Scope, metric>;
    static NVFP4_FN Made make(const float (&x)[kBlock], float amax, const Given<float>& given,
                              const Noise&, uint64_t) {
        float scaled[kBlock];
        times_all(x, given.encode, scaled);
        const float base = base_scale(Scope::amax(amax), given.encode);
        const Rounded<float> six = Rule::at_six(base), four = Rule::at_four(base);

        const Packed<float> signs = signs_of_block(scaled);
        Packed<float> at_four, at_six;
        const float error_four = error(scaled, signs, four.value, at_four);
        const float error_six = error(scaled, signs, six.value, at_six);
        const bool better = error_four < error_six;
        return {{better ? at_four.low : at_six.low, better ? at_four.high : at_six.high},
                better ? four.code : six.code};
    }

    // candidate_error, which leaves its codes.
    static NVFP4_FN float error(const float (&scaled)[kBlock], const Packed<float>& signs,
                                float scale, Packed<float>& codes) {
        const float inverse = guarded_inverse(scale) * kUnit;
        float v[kBlock], q[kBlock];
        times_all(scaled, inverse, v);
        codes = round_block<false>(v, signs, q);

        const auto error = [&](int i) {
            const float e = less_product(unlike(scaled[i]), q[i], scale * (1.0f / kUnit));
            return metric == Metric::mse ? e * e : magnitude(e);
        };
        if constexpr (metric != Metric::abs_max) return Scope::template sum<float>(error);
        float largest = error(0);
        NVFP4_UNROLL(16)
        for (int i = 1; i < kBlock; ++i) largest = larger(largest, error(i));
        return Scope::amax(largest);
    }
};

// Of a tensor or row that is not finite, all is zero.
template <class Rule>
NVFP4_FN Made make_block(const float (&x)[kBlock], float amax, const Scales& scales,
                         const Trials& trials, const Noise& noise, uint64_t counter) {
    const Given<float> given{scales.encode, scales.global_scale, nullptr, &trials};
    const Made made = Maker<Rule>::make(x, amax, given, noise, counter);
    return {{scales.finite ? made.codes.low : 0u, scales.finite ? made.codes.high : 0u},
            scales.finite ? made.scale : 0u};
}

template <bool search>
NVFP4_FN Packed<float> make_eden(const float (&y)[kBlock], float amax, const Trials& trials,
                                 float& length) {
    if constexpr (search) {
        return MsEden<true>::pack(y, amax, trials, length);
    } else {
        // as MsEden::pack and candidate_length; times kUnit the quotient is the same
        constexpr float c = MsEden<false>::full_scale;
        const float a = amax < 0x1p-120f ? 0.0f : amax;
        const float inverse = guarded_inverse(a);
        float v[kBlock], q[kBlock];
        NVFP4_UNROLL(16)
        for (int i = 0; i < kBlock; ++i) v[i] = (y[i] * inverse) * (c * kUnit);
        const Packed<float> codes = round_block<true>(v, signs_of_block(v), q);
        const float numerator = tree_sum<float>([&](int i) { return v[i] * v[i]; });
        const float denominator = tree_sum<float>([&](int i) { return unlike(v[i]) * q[i]; });
        const float correction = denominator == 0.0f ? 1.0f : numerator / denominator;
        length = a * (correction * (1.0f / c));
        return codes;
    }
}

}  // namespace nvfp4::cuda
