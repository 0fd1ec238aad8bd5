"""The arithmetic of the kernels: twin of ``rounding``, ``codec`` and ``scaling``.

    nearest, up, drawn_code     0 <= a <= max        -> code, int32, without its sign
    nearest_value, drawn_value  0 <= a <= 6          -> E2M1's value, float32
    decode, decode_element      code, int32          -> float32, exact
    encode_scale, reciprocal    amax                 -> float32
    tree_sum                    [m, rows, k, 16]     -> [m, k], in the one order of additions

A format is three constants (mantissa bits m, exponent of the smallest normal, maximum), and all
three roundings come from one sentence: in a binade of exponent e the grid is a lattice of step
2^(e - m). ``_binade`` finds e in the bits of float32. The code of a value is the number of grid
values below it: value / step, plus 2^m per binade from the smallest normal's up to its own.

Why the bits equal the reference's:
- Integers wherever a float could surprise: FP8 types do not compile below sm_89. Magnitudes order
  like their bits, NaN above all; the maximum of floats used here is the one that keeps a NaN.
- Divisions are ``div_rn``, since ``/`` is approximate on GPUs.
- Sums are explicit trees: ``tl.sum`` leaves its order open, except between two elements.
- A product that is added to something is ``product``, which no compiler fuses with the sum.
"""

import triton
import triton.language as tl

from nvfp4.numerics.formats import E2M1 as _E2M1
from nvfp4.numerics.formats import E4M3 as _E4M3
from nvfp4.numerics.formats import FLOAT32_MAX as _FLOAT32_MAX
from nvfp4.numerics.formats import SIXTH as _SIXTH
from nvfp4.numerics.formats import ElementFormat

INTERPRETED = triton.knobs.runtime.interpret
"""Whether this process interprets its kernels, on CPU tensors; decided when they are defined."""


def _constants(fmt: ElementFormat) -> tuple[int, int, float]:
    return fmt.mantissa_bits, fmt.min_exponent, fmt.max


E2M1 = tl.constexpr(_constants(_E2M1))
E4M3 = tl.constexpr(_constants(_E4M3))
"""(mantissa bits, exponent of the smallest normal, maximum) of a format."""
FLOAT32_MAX = tl.constexpr(_FLOAT32_MAX)
SIXTH = tl.constexpr(_SIXTH)
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits but the sign
CODE_BASE = tl.constexpr(0x4A800000)
"""What ``nearest_code`` adds: the bits of 2^22."""
CODE_BASES = tl.constexpr(0x4A800000 * 0x11111111 & 0xFFFFFFFF)
"""What eight of them come to, each four bits before the last."""

_INTERPRETED = tl.constexpr(INTERPRETED)

FUSES = tl.constexpr(
    not INTERPRETED and tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)
)
"""Whether this Triton needs ``product`` spelt out; 3.7.1, 3.8.0 and 3.9.0 fuse nothing."""


@triton.jit
def product(a, b):
    """fl(a * b), to be added to something.

    For Blackwell, Triton 3.6 makes two products one mul.rn.f32x2, and its ptxas (12.9) makes one
    FFMA2 of that and add.rn.f32x2, even under --fmad=false: one rounding where there should be two.
    A product spelt out in assembly stays alone.
    """
    if FUSES:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.constexpr_function
def log2(n: int) -> int:
    """Logarithm of a power of two."""
    return n.bit_length() - 1


@triton.jit
def bits(x):
    """The bits of float32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(x):
    """The float32 with these bits."""
    return x.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, which order like the magnitudes; Inf and then NaN lie above all numbers."""
    return bits(x) & MAGNITUDE


@triton.jit
def widened(x):
    """x as float32, exact. Two BF16 in a register become two float32 by one instruction each.

    The compiler's own way takes two for the upper one.
    """
    if x.dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def anew(x):
    """uint32 x, of which the compiler does not know that it is the same in every turn.

    What follows from it is then worked out anew in each, and does not stay in registers.
    """
    if _INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.uint32, is_pure=False, pack=1
        )


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_bits(x, axis: tl.constexpr):
    """Bits of the largest magnitude of float32 x along an axis; a NaN is above everything.

    One instruction per element, ``max.NaN`` of magnitudes: by integers it is two. The interpreter
    runs a reduction of its own element by element, so it takes the integers.
    """
    if _INTERPRETED:
        return tl.max(magnitude_bits(x), axis=axis)
    else:
        return bits(tl.reduce(from_bits(magnitude_bits(x)), axis, _larger))


_LARGER_NUMBERS = tl.constexpr("max.NaN.bf16x2 $0, $1, $2;")
_LARGER_MAGNITUDES = tl.constexpr(
    """{
    .reg .b32 a, b;
    abs.bf16x2 a, $1;
    abs.bf16x2 b, $2;
    max.NaN.bf16x2 $0, a, b;
    }"""
)


@triton.jit
def _larger_pairs(a, b, SIGNED: tl.constexpr):
    """The larger of BF16 a and b, NaN above all: two at once. SIGNED: of their magnitudes."""
    return tl.inline_asm_elementwise(
        _LARGER_MAGNITUDES if SIGNED else _LARGER_NUMBERS,
        "=r,r,r",
        [a, b],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def largest_of_rows(x, ROWS: tl.constexpr):
    """Bits of the largest magnitudes of x [R, C], as [ROWS, C]: over rows ROWS apart.

    BF16 two at a time, before it is float32; the interpreter knows no pairs.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if x.dtype == tl.bfloat16 and not _INTERPRETED:
        for s in tl.static_range(log2(R // ROWS)):
            pairs = tl.permute(tl.reshape(x, (2, R >> (s + 1), C)), (1, 2, 0))
            a, b = tl.split(pairs)
            x = _larger_pairs(a, b, s == 0)
        return magnitude_bits(widened(x))
    else:
        return largest_bits(tl.reshape(x.to(tl.float32), (R // ROWS, ROWS, C)), 0)


@triton.jit
def _binade(a, F: tl.constexpr):
    """Exponent field of max(a, smallest normal), in its place: the step there is 2^(e - m).

    Below the smallest normal the step no longer shrinks, which makes the subnormals.
    """
    SMALLEST: tl.constexpr = (127 + F[1]) << 23
    return tl.maximum(bits(a), SMALLEST) & INFINITY_BITS


@triton.jit
def nearest(a, F: tl.constexpr):
    """(code, value) of the grid value nearest to 0 <= a <= max, ties to the even code.

    The sum a + magic does all of it. magic is a power of two whose last place is the lattice step,
    so that the hardware's own rounding is the one wanted; and it holds 2^m steps per binade below,
    so that the last bits of the sum are the code. That is an even number of steps, so ties stay
    right.
    """
    START: tl.constexpr = ((23 - F[0]) << 23) - ((127 + F[1]) << F[0])
    binade = _binade(a, F)
    magic = from_bits(binade + (binade >> (23 - F[0])) + START)

    # E4M3 has 7 bits without its sign, E2M1 fewer; the difference is exact
    total = a + magic
    return bits(total) & 0x7F, total - magic


@triton.jit
def nearest_value(a):
    """E2M1's value nearest to 0 <= a < 7, ties to the even code.

    2^22 times the power of two below a, but of 1 at least, has the lattice step for its last place:
    so the sum rounds. The difference is exact.
    """
    SHIFT: tl.constexpr = 22 << 23
    ONE: tl.constexpr = 127 << 23
    magic = from_bits(tl.maximum((bits(a) & INFINITY_BITS) + SHIFT, ONE + SHIFT))
    return (a + magic) - magic


@triton.jit
def nearest_code(x):
    """(E2M1's code nearest to min(|x|, 6), 0..7) + ``CODE_BASE``, int32.

    The code of a is 2a below 2, a + 2 up to 4 and a / 2 + 4 beyond: everywhere the smallest of the
    three, and rounding changes no order. A sum with 2^22, 2^23 or 2^24 rounds to multiples of 1/2,
    1 or 2, and counts them in its last bits. Three integer minima on Hopper, where the power of two
    below a takes as many instructions before anything is rounded.
    """
    size = from_bits(magnitude_bits(x))
    halves, ones, twos = bits(size + 4194304.0), bits(size + 8388608.0), bits(size + 16777216.0)
    code = tl.minimum(tl.minimum(halves, ones + (2 - (1 << 23))), twos + (4 - (2 << 23)))
    return tl.minimum(code, CODE_BASE + 7)


@triton.jit
def _add_down(a, b):
    """a + b of positive float32, rounded towards zero."""
    if _INTERPRETED:
        total = a + b
        return tl.where(total - b > a, from_bits(bits(total) - 1), total)
    else:
        return tl.inline_asm_elementwise(
            "add.rz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def drawn_value(a, k):
    """step floor(fl(a / step + u)), 0 <= a <= 6: one of E2M1's neighbours of a. k: u / 2.

    A power of two changes no rounding, so that all is done in units of 1: fl(a + u step), and what
    lies below the step cut off by a sum rounded towards zero. No conversion.
    """
    # the power of two is two steps; the product has 17 bits, so it is exact
    power = from_bits(_binade(a, E2M1))
    total = a + product(k, power)
    magic = power * 4194304.0
    return _add_down(total, magic) - magic


@triton.jit
def converted_value(a):
    """Grid value nearest to a >= 0, at most 6, by the hardware of sm_100 and later.

    Two floats become one byte of codes and two float32 again; ``tiles.converted_words`` says what
    the instruction promises.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 codes;
        .reg .b32 halves;
        .reg .b16 low, high;
        cvt.rn.satfinite.e2m1x2.f32 codes, $3, $2;
        cvt.rn.f16x2.e2m1x2 halves, codes;
        mov.b32 {low, high}, halves;
        cvt.f32.f16 $0, low;
        cvt.f32.f16 $1, high;
        }""",
        "=f,=f,f,f",
        [a],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _on_lattice(n, binade, F: tl.constexpr):
    """The code of n steps in a binade; one step beyond it is the next binade's first value."""
    return n + (binade >> (23 - F[0])) - ((127 + F[1]) << F[0])


@triton.jit
def _in_steps(a, binade, F: tl.constexpr):
    """a / step, exact since the step is a power of two; two terms keep the integers below 2^31."""
    return product(a, from_bits(((127 << 23) - binade) + ((127 + F[0]) << 23)))


@triton.jit
def up(a, F: tl.constexpr):
    """Code of the smallest grid value not below 0 <= a <= max."""
    binade = _binade(a, F)
    steps = _in_steps(a, binade, F)
    n = steps.to(tl.int32)
    return _on_lattice(tl.where(n.to(tl.float32) < steps, n + 1, n), binade, F)


@triton.jit
def drawn_code(a, k, F: tl.constexpr):
    """Code of floor(fl(a / step + u)), one of the two neighbours of 0 <= a <= max; k: u / 2.

    As ``drawn_value``.
    """
    binade = _binade(a, F)
    total = a + product(k, from_bits(binade - ((F[0] - 1) << 23)))
    magic = binade + ((23 - F[0]) << 23)
    return _on_lattice(bits(_add_down(total, from_bits(magic))) - magic, binade, F)


@triton.jit
def decode(code, F: tl.constexpr):
    """Float32 value of a code without sign, subnormals included.

    Exponent and mantissa of the format are put where float32 has its own; the product then corrects
    the bias. Exact, also where the float32 before it is a subnormal.
    """
    SCALE: tl.constexpr = 2.0 ** (126 + F[1])
    return from_bits(code << (23 - F[0])) * SCALE


@triton.jit
def decode_scale(byte):
    """Float32 value of an E4M3 byte 0..127; 127 is the NaN."""
    code = byte.to(tl.int32)
    return tl.where(
        code == 127, from_bits(tl.full(code.shape, NAN_BITS, tl.int32)), decode(code, E4M3)
    )


@triton.jit
def decode_element(code):
    """Float32 value of a code 0..15 (int32); 8 is -0."""
    return from_bits(bits(decode(code & 7, E2M1)) | ((code & 8) << 28))


@triton.jit
def round_to_bf16(x):
    """x rounded to the nearest BF16 (ties to even), as float32; NaN stays NaN.

    Interpreted by hand, since the cast of Triton's interpreter truncates.
    """
    if _INTERPRETED:
        b = bits(x)
        half = 0x7FFF + ((b >> 16) & 1)  # of the last place, ties by its parity
        return from_bits(tl.where((b & MAGNITUDE) > INFINITY_BITS, NAN_BITS, (b + half) & -65536))
    else:
        return widened(x.to(tl.bfloat16))


@triton.jit
def encode_scale(amax, CAP: tl.constexpr):
    """S = min(fl(6 cap / amax), FLT_MAX), 1 where amax is 0."""
    FULL: tl.constexpr = E2M1[2] * CAP
    scale = tl.minimum(tl.math.div_rn(tl.full(amax.shape, FULL, tl.float32), amax), FLOAT32_MAX)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def reciprocal(x):
    """fl(1 / x)."""
    return tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def guarded_reciprocal(x):
    """fl(1 / x), 0 where x is 0."""
    return tl.where(x == 0.0, 0.0, reciprocal(x))


@triton.jit
def tree_sum(x):
    """Sum of each block of x [m, rows, k, 16], by halves: x[i] + x[i + n/2], row-major; [m, k].

    Each ``tl.sum`` adds two elements, so its order cannot matter.
    """
    M: tl.constexpr = x.shape[0]
    ROWS: tl.constexpr = x.shape[1]
    K: tl.constexpr = x.shape[2]

    # the first halvings of a row-major block go over its rows, the last four over its columns
    for s in tl.static_range(log2(ROWS)):
        x = tl.sum(tl.reshape(x, (M, 2, ROWS >> (s + 1), K, 16)), axis=1)
    x = tl.reshape(x, (M, K, 16))
    for s in tl.static_range(4):
        x = tl.sum(tl.reshape(x, (M, K, 2, 8 >> s)), axis=2)
    return tl.reshape(x, (M, K))


@triton.jit
def over_elements(scale):
    """One number per block [m, k], to meet its elements [m, rows, k, 16]: [m, 1, k, 1]."""
    return tl.expand_dims(tl.expand_dims(scale, 1), 3)
