"""Noise of the kernels: twin of ``numerics/rng.py``.

    philox      counter int64 [...]       -> four uint32 [...]
    draws       counter int64 [...]       -> u / 2 of its eight draws, float32 [..., 2, 2, 2]
    draw        draw number int64 [...]   -> u / 2, float32
    fold_in     a seed and a number       -> a new seed

A draw is k of 16 random bits and stands for u = (k + 1/2) / 2^16. Halves of it are exact and come
without a conversion of integers, which would run at an eighth of the rate of sums. Who needs
neighbouring draws takes ``draws``: Philox is forty instructions, for eight of them as for one.

Integers wrap around on purpose, as Philox is sums and products modulo 2^32. Under TRITON_DEBUG=1
Triton would trap each of them; ``launch`` tells it not to look (``sanitize_overflow``).
"""

import triton
import triton.language as tl

from nvfp4.numerics.rng import FOLD_STREAM as _FOLD_STREAM
from nvfp4.numerics.rng import MULTIPLIERS, WEYL
from nvfp4.numerics.rng import ROUNDS as _ROUNDS

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in WEYL)
_PHILOX_ROUNDS = tl.constexpr(_ROUNDS)
FOLD_STREAM = tl.constexpr(_FOLD_STREAM)


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
        # (in 64 bits: halves asked for apart would be two instructions)
        wide0, wide1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        high0, high1 = (wide0 >> 32).to(tl.uint32), (wide1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, wide1.to(tl.uint32), high0 ^ c3 ^ k1, wide0.to(tl.uint32)
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
def _half_uniform(low):
    """u / 2 = (k + 1/2) / 2^17, float32, exact, of the bits of 2^6 + k / 2^17."""
    CENTRE: tl.constexpr = 2.0**6 - 2.0**-18
    return low.to(tl.float32, bitcast=True) - CENTRE


@triton.jit
def _low_half(word):
    """Bits of 2^6 + k / 2^17, of the lower 16 bits k of uint32: one permutation of bytes."""
    if _INTERPRETED:
        return (word & 0xFFFF) | 0x42800000
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4280, 0x5410;", "=r,r", [word], tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def _high_half(word):
    """The same of the upper 16 bits; a sum, which comes with the shift."""
    return (word >> 16) + 0x42800000


@triton.jit
def draws(seed_low, seed_high, counter, STREAM: tl.constexpr):
    """u / 2 of the eight draws of each counter [...], [..., 2, 2, 2]: word 0, low half first."""
    w0, w1, w2, w3 = philox(seed_low, seed_high, counter, STREAM)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2], row-major 0, 1, 2, 3
    return _half_uniform(tl.join(_low_half(words), _high_half(words)))


@triton.jit
def draw(seed_low, seed_high, index, STREAM: tl.constexpr):
    """u / 2 of draw number ``index`` (int64): counter index / 8, half index % 8."""
    # neighbours share a counter, and each computes all of it
    w0, w1, w2, w3 = philox(seed_low, seed_high, index >> 3, STREAM)
    which = (index >> 1) & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return _half_uniform(tl.where((index & 1) == 0, _low_half(word), _high_half(word)))
