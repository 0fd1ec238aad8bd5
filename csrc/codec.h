// Codes to values; the twin of nvfp4/codec.py. The way from values to codes is part of rounding.h.
#pragma once

#include "formats.h"
#include "lanes.h"

NVFP4_BEGIN

constexpr float from_exponent(int e) { return e < 0 ? 0.5f * from_exponent(e + 1) : e > 0 ? 2 * from_exponent(e - 1) : 1; }

// The lattice read backwards: a normal code holds exponent and mantissa as float32 does, a subnormal counts steps.
template <class Format, class F>
NVFP4_FN F decode(Int<F> code) {
    constexpr int m = Format::mantissa_bits;
    const F normal = from_bits((code << (23 - m)) + (static_cast<uint32_t>(126 + Format::min_exponent) << 23));
    constexpr float step = from_exponent(Format::min_exponent - m);
    return select(code < (1u << m), to_float(code) * step, normal);
}

// Sign of x as bit 3 of a code.
template <class F>
NVFP4_FN Int<F> sign_bit(F x) {
    return (bits(x) >> 28) & 8u;
}

NVFP4_END
