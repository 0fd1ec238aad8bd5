// Magnitudes to grid values and codes: to nearest (ties to the even code), up, stochastic; the twin
// of nvfp4/numerics/rounding.py.
//
// In the binade of exponent E the lattice has the step 2^(E - m), m being mantissa_bits. Then
// n = a / step is a number below 2^(m + 1), to be rounded to an integer, and
//
//     code = n + 2^m (E - min_exponent)      value = n * step
//
// whatever the format; subnormals are the binade of min_exponent. Nothing is compared with
// midpoints: to nearest, the float32 addition of a "magic" number of the right size rounds by
// itself.
//
// The caller has clamped a to the largest value of the format. What a NaN gives is of no account:
// the result of its row or tensor is cleared.
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

// What is added to a in the binade e to round it: 2^(E + 23 - m), whose unit in the last place is
// the step, and on top of it as many units as the binade's code, an even number, so that ties still
// go to the even code. The sum ends in the code.
template <class Format, class U>
NVFP4_FN U magic_bits(U e) {
    constexpr uint32_t start = static_cast<uint32_t>(127 + Format::min_exponent)
                               << Format::mantissa_bits;
    return e + (e >> (23 - Format::mantissa_bits)) +
           ((static_cast<uint32_t>(23 - Format::mantissa_bits) << 23) - start);
}

template <class Format, class F>
NVFP4_FN Rounded<F> nearest(F a) {
    const Int<F> e = binade<Format>(a);
    const F magic = from_bits(magic_bits<Format>(e)), sum = a + magic;
    return {bits(sum) & Format::code_mask, sum - magic};
}

template <class Format, class F>
NVFP4_FN Rounded<F> on_lattice(Int<F> n, Int<F> e) {
    const F step = from_bits(e - (static_cast<uint32_t>(Format::mantissa_bits) << 23));
    return {n + binade_code<Format>(e), to_float(n) * step};
}

template <class Format, class F>
NVFP4_FN F in_steps(F a, Int<F> e) {
    // exact: a power of two
    return a * from_bits((static_cast<uint32_t>(254 + Format::mantissa_bits) << 23) - e);
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

// E2M1 is three lattices, of steps 1/2, 1 and 2 from 0, 2 and 4 on, so what depends on the binade
// is a choice of three.

// The number to add, as above, to 0 <= a <= 6.
template <class F>
NVFP4_FN F e2m1_magic(F a) {
    return by_magnitude(a, 0x1p22f, 0x1p23f + 2.0f, 0x1p24f + 8.0f);
}

template <class F>
NVFP4_FN F e2m1_nearest_value(F a) {
    const F magic = e2m1_magic(a);
    return (a + magic) - magic;
}

// Bits that end in zero and the code of 0 <= a <= 6.
template <class F>
NVFP4_FN Int<F> e2m1_nearest(F a) {
    return bits(a + e2m1_magic(a));
}

// The same, rounded by u in (0, 1) as ``stochastic`` does.
template <class F>
NVFP4_FN Int<F> e2m1_stochastic(F a, F u) {
    const F steps = a * by_magnitude(a, 2.0f, 1.0f, 0.5f);  // exact
    return truncate(steps + u) + bits(by_magnitude(a, from_bits(0u), from_bits(2u), from_bits(4u)));
}

NVFP4_END
