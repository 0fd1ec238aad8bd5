// Magnitudes to grid values and codes: nearest (ties to even code), up, stochastic; the twin of nvfp4/rounding.py.
//
// In the binade of exponent E the lattice step is 2^(E - m). n = a / step is an integer below 2^(m + 1), and
// code = n + 2^m (E - min_exponent), whatever the format; subnormals are the binade of min_exponent.
#pragma once

#include "formats.h"
#include "lanes.h"

NVFP4_BEGIN

template <class F>
struct Rounded {
    Int<F> code;  // of the magnitude, without sign
    F value;
};

// Exponent field of max(a, smallest normal), in place.
template <class Format, class F>
NVFP4_FN Int<F> binade(F a) {
    constexpr uint32_t smallest = static_cast<uint32_t>(127 + Format::min_exponent) << 23;
    return bits(larger(a, splat<F>(from_bits(smallest)))) & 0x7f800000u;
}

// 2^m (E - min_exponent): the code at which a binade starts, less 2^m.
template <class Format, class U>
NVFP4_FN U binade_code(U binade) {
    return (binade >> (23 - Format::mantissa_bits)) -
           (static_cast<uint32_t>(127 + Format::min_exponent) << Format::mantissa_bits);
}

// What is added to a in the binade e to round it: 2^(E + 23 - m), whose unit in the last place is the step, and on top of it
// as many units as the binade's code, an even number, so that ties still go to the even code. The sum ends in the code.
template <class Format, class U>
NVFP4_FN U magic_bits(U e) {
    constexpr uint32_t start = static_cast<uint32_t>(127 + Format::min_exponent) << Format::mantissa_bits;
    return e + (e >> (23 - Format::mantissa_bits)) + ((static_cast<uint32_t>(23 - Format::mantissa_bits) << 23) - start);
}

// bits of a sum whose low bits are the code of a, 0 <= a <= Format::max; what stands above ``code_mask`` is not part of it.
template <class Format, class F>
NVFP4_FN Int<F> nearest_code_bits(F a) {
    return bits(a + from_bits(magic_bits<Format>(binade<Format>(a))));
}

template <class Format, class F>
NVFP4_FN Rounded<F> nearest(F a) {
    const Int<F> e = binade<Format>(a);
    const F magic = from_bits(magic_bits<Format>(e)), sum = a + magic;
    return {bits(sum) & Format::code_mask, sum - magic};
}

// The same value without its code.
template <class Format, class F>
NVFP4_FN F nearest_value(F a) {
    const F magic = from_bits(binade<Format>(a) + (static_cast<uint32_t>(23 - Format::mantissa_bits) << 23));
    return (a + magic) - magic;
}

template <class Format, class F>
NVFP4_FN Rounded<F> on_lattice(Int<F> n, Int<F> e) {
    const F step = from_bits(e - (static_cast<uint32_t>(Format::mantissa_bits) << 23));
    return {n + binade_code<Format>(e), to_float(n) * step};
}

template <class Format, class F>
NVFP4_FN F in_steps(F a, Int<F> e) {
    return a * from_bits((static_cast<uint32_t>(254 + Format::mantissa_bits) << 23) - e);  // exact: a power of two
}

template <class Format, class F>
NVFP4_FN Rounded<F> up(F a) {
    const Int<F> e = binade<Format>(a);
    const F t = in_steps<Format>(a, e);
    const Int<F> n = truncate(t);
    return on_lattice<Format, F>(select(to_float(n) < t, n + 1u, n), e);
}

// u in (0, 1); n stays within the binade or reaches its end, which is the next binade's start.
template <class Format, class F>
NVFP4_FN Rounded<F> stochastic(F a, F u) {
    const Int<F> e = binade<Format>(a);
    return on_lattice<Format, F>(truncate(in_steps<Format>(a, e) + u), e);
}

NVFP4_END
