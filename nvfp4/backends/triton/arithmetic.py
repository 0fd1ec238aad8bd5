"""The arithmetic of the kernels: twin of ``rng``, ``rounding``, ``codec`` and ``scaling``.

    philox, uniforms            counter int64 [...]  -> u = (k + 1/2) / 2^16, float32
    nearest, up, stochastic     0 <= a <= max        -> code, int32, without its sign
    decode, decode_element      code, int32          -> float32, exact
    encode_scale, reciprocal    amax                 -> float32
    tree_sum                    [m, rows, k, 16]     -> [m, k], in the one order of additions

A format is three constants (mantissa bits m, exponent of the smallest normal, maximum), and all
three roundings come from one sentence: in a binade of exponent e the grid is a lattice of step
2^(e - m). ``_binade`` finds e in the bits of float32. The code of a value is the number of grid
values below it: value / step, plus 2^m per binade from the smallest normal's up to its own.

Why the bits equal the reference's:
- Integers wherever a float could surprise. FP8 types do not compile below sm_89, and whether a
  maximum of floats keeps a NaN depends on the compiler; as integers, magnitudes order alike.
- Divisions are ``div_rn``, since ``/`` is approximate on GPUs.
- Sums are explicit trees: ``tl.sum`` leaves its order open, except between two elements.
- A product that is added to something is ``product``, which no compiler fuses with the sum.
- Integers wrap around on purpose, as Philox is sums and products modulo 2^32. Under TRITON_DEBUG=1
  Triton would trap each of them; ``launch`` tells it not to look (``sanitize_overflow``).
"""

import triton
import triton.language as tl

from nvfp4.numerics.formats import E2M1 as _E2M1
from nvfp4.numerics.formats import E4M3 as _E4M3
from nvfp4.numerics.formats import FLOAT32_MAX as _FLOAT32_MAX
from nvfp4.numerics.formats import SIXTH as _SIXTH
from nvfp4.numerics.formats import ElementFormat
from nvfp4.numerics.rng import FOLD_STREAM as _FOLD_STREAM
from nvfp4.numerics.rng import MULTIPLIERS, WEYL
from nvfp4.numerics.rng import ROUNDS as _ROUNDS

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

_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in WEYL)
_PHILOX_ROUNDS = tl.constexpr(_ROUNDS)
FOLD_STREAM = tl.constexpr(_FOLD_STREAM)

_FUSES = tl.constexpr(
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
    if _FUSES:
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
def philox(seed_low, seed_high, index, STREAM: tl.constexpr):
    """Four uint32 words of Philox4x32-10 at counter ``index`` (int64) of a stream.

    The seed comes as its two halves, int32, and is the key; the counter is (index, stream, 0).
    """
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    c2, c3 = tl.full(index.shape, STREAM, tl.uint32), tl.full(index.shape, 0, tl.uint32)

    # a round: two 32 x 32 -> 64 bit products, whose halves change places
    for _ in tl.static_range(_PHILOX_ROUNDS):
        high0, low0 = tl.umulhi(c0, _M0), c0 * _M0
        high1, low1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def seed_halves(low, high):
    """The two int32 of a seed.

    They are the arguments themselves or, where ``high`` is None, the halves of the int64 that
    ``low`` points to: a captured CUDA graph reads its seeds from memory.
    """
    if high is None:
        seed = tl.load(low)
        return seed.to(tl.int32), (seed >> 32).to(tl.int32)
    else:
        return low, high


@triton.jit
def fold_in(low, high, datum):
    """Halves of a new seed, from a seed's halves and ``datum`` (int64): twin of ``rng.fold_in``."""
    w0, w1, _, _ = philox(low, high, datum, FOLD_STREAM)
    return w0.to(tl.int32, bitcast=True), w1.to(tl.int32, bitcast=True)


@triton.jit
def centred_uniform(draw):
    """u = (k + 1/2) / 2^16 of 16 random bits k; both operations are exact."""
    STEP: tl.constexpr = 2.0**-16
    return product(draw.to(tl.float32) + 0.5, STEP)


@triton.jit
def uniforms(seed_low, seed_high, counter, STREAM: tl.constexpr):
    """The eight centred uniforms of each counter [...], [..., 2, 2, 2]: word 0, low half first."""
    w0, w1, w2, w3 = philox(seed_low, seed_high, counter, STREAM)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2], row-major 0, 1, 2, 3
    draws = tl.join(words & 0xFFFF, words >> 16)
    return centred_uniform(draws)


@triton.jit
def uniform(seed_low, seed_high, index, STREAM: tl.constexpr):
    """The centred uniform of draw number ``index`` (int64): counter index / 8, half index % 8."""
    # neighbours share a counter, and each computes all of it: a block scale is one in 16 elements
    w0, w1, w2, w3 = philox(seed_low, seed_high, index >> 3, STREAM)
    which = (index >> 1) & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return centred_uniform(tl.where((index & 1) == 0, word & 0xFFFF, word >> 16))


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
def stochastic(a, u, F: tl.constexpr):
    """Code of floor(a / step + u), one of the two neighbours of 0 <= a <= max; u in (0, 1)."""
    binade = _binade(a, F)
    return _on_lattice((_in_steps(a, binade, F) + u).to(tl.int32), binade, F)


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

    By hand, since the cast of Triton's interpreter truncates.
    """
    b = bits(x)
    rounded = (b + 0x7FFF + ((b >> 16) & 1)) & -65536  # half of the last place, ties by its parity
    return from_bits(tl.where((b & MAGNITUDE) > INFINITY_BITS, NAN_BITS, rounded))


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
