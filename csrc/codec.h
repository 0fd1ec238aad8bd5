// Codes to values; the twin of nvfp4/numerics/codec.py. The way from values to codes is part of
// rounding.h.
//
//     decode<Format>(code)   a magnitude; decode_signed, decode_scale: an element, a block scale
//     to_bfloat16(x)         rounded, ties to even, as a float32
//     from_float16(h)        exact
//     float16_bits(x)        rounded, ties to even
//
// BF16 and float16 are what comes in and goes out. Both are spelt out, since processors lack them
// or round in their own way; subnormals, infinities and NaN come out as IEEE 754 wants them. Where
// a processor widens float16 by an instruction, cpu/elements.h takes that.
#pragma once

#include "formats.h"
#include "lanes.h"

NVFP4_BEGIN

constexpr float from_exponent(int e) {
    return e < 0 ? 0.5f * from_exponent(e + 1) : e > 0 ? 2 * from_exponent(e - 1) : 1;
}

// The lattice read backwards: a normal code holds exponent and mantissa as float32 does, a
// subnormal counts steps.
template <class Format, class F>
NVFP4_FN F decode(Int<F> code) {
    constexpr int m = Format::mantissa_bits;
    const F normal =
        from_bits((code << (23 - m)) + (static_cast<uint32_t>(126 + Format::min_exponent) << 23));
    constexpr float step = from_exponent(Format::min_exponent - m);
    return select(code < (1u << m), to_float(code) * step, normal);
}

// The value of a signed E2M1 code, the sign in bit 3.
template <class F>
NVFP4_FN F decode_signed(Int<F> code) {
    return from_bits(bits(decode<E2M1, F>(code & 7u)) | (code & 8u) << 28);
}

// The value of a block scale: 127 is NaN, and bit 7 is not looked at.
NVFP4_FN float decode_scale(uint32_t byte) {
    const uint32_t code = byte & 127u;
    return code > E4M3::largest_code ? from_bits(kNanBits) : decode<E4M3, float>(code);
}

// Round to BF16, ties to even; NaN stays NaN.
template <class F>
NVFP4_FN F to_bfloat16(F x) {
    const Int<F> b = bits(x);
    const Int<F> rounded = (b + 0x7fffu + (b >> 16 & 1u)) & 0xffff0000u;
    return from_bits(select((b & 0x7fffffffu) > kInfinityBits, b | 0x400000u, rounded));
}

// The float32 of 16 bits of float16. Shifted into place the exponent is 112 too small, for
// subnormals too; its top value means Inf or NaN.
template <class F>
NVFP4_FN F from_float16(Int<F> h) {
    const Int<F> finite = bits(from_bits((h & 0x7fffu) << 13) * 0x1p112f);
    const Int<F> magnitude_bits = select((h & 0x7c00u) == 0x7c00u, finite | kInfinityBits, finite);
    return from_bits(magnitude_bits | (h & 0x8000u) << 16);
}

// float32 to the 16 bits of float16, ties to even, for outputs with a global scale; Inf beyond its
// range.
template <class F>
NVFP4_FN Int<F> float16_bits(F x) {
    const F a = magnitude(x);
    const Int<F> e = bits(larger(a, splat<F>(0x1p-14f))) & kInfinityBits;
    const Int<F> magic = e + (13u << 23);  // its unit in the last place is float16's at a
    const Int<F> finite = bits(a + from_bits(magic)) - magic + (e >> 13) - (113u << 10);
    const Int<F> bounded = select(a >= 65520.0f, same<Int<F>>(0x7c00u), finite);
    return (bits(x) >> 16 & 0x8000u) |
           select(bits(a) > kInfinityBits, same<Int<F>>(0x7e00u), bounded);
}

NVFP4_FN uint16_t to_float16(float x) { return static_cast<uint16_t>(float16_bits(x)); }

NVFP4_END
