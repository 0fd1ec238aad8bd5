"""The judge of every backend: NVFP4 numerics written out block by block, in numpy float32, to be
read beside docs/numerics.md.

It imports nothing from nvfp4 and nothing from torch, and shares no line with them. One function is
one sentence of the definition. Rules:

- every intermediate is a numpy float32, so each ``+ - * /`` is rounded once, to nearest even;
  nothing is contracted to an FMA and nothing is flushed to zero;
- a block is a flat float32 vector of 16 (1x16) or 256 (16x16, row-major) values. The code loops
  over blocks, and works
  elementwise inside one: it is slow on purpose;
- grids are searched, never computed with: an E2M1 or E4M3 value is found by looking at its two
  neighbours in the list of all values, so no rounding trick can be shared with the code under test.

Order: grids and rounding, random bits, rotation, blocks and scales, quantisers, decode and GEMM,
layout, worked cases.

Shapes: x [M, K] float32; Kp is K padded to a multiple of 16 or of the rotation group; codes uint8
[M, Kp/2], block_scale uint8 [M, Kp/16] or [ceil(M/16), Kp/16], global_scale float32 [1] or [M].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

FLT_MAX = np.finfo(F32).max
ONE = F32(1)
ZERO = F32(0)


def _e4m3_value(byte: int) -> float:
    """The value of E4M3 byte 0..126: 4 exponent bits of bias 7, 3 mantissa bits, subnormals at
    exponent 0."""
    exponent, mantissa = byte >> 3, byte & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 7 - 3)


class Grid(NamedTuple):
    """All non-negative values of a format in ascending order: the index of a value is its code."""

    values: Floats
    midpoints: Floats  # midpoints[c] lies half way between codes c and c + 1; exact in float32
    steps: Floats  # the gap above code c; above the largest value, the gap below it


def _grid(numbers: list[float]) -> Grid:
    values = np.array(numbers, F32)
    gaps = values[1:] - values[:-1]
    return Grid(values, values[:-1] + gaps / F32(2), np.append(gaps, gaps[-1]))


E2M1 = _grid([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = _grid([_e4m3_value(byte) for byte in range(127)])
NEGATIVE = np.uint8(8)  # bit 3 of an E2M1 code
E2M1_SIGNED = np.append(E2M1.values, -E2M1.values)  # by code 0..15


def _nearest(grid: Grid, magnitude: Floats) -> npt.NDArray[np.intp]:
    """The nearest code. At a midpoint the two counts differ by one, and the even one of the two is
    taken."""
    below = grid.midpoints.searchsorted(magnitude, "left")  # midpoints < magnitude
    up_to = grid.midpoints.searchsorted(magnitude, "right")  # midpoints <= magnitude
    return np.where(below & 1, up_to, below)


def _stochastic(grid: Grid, magnitude: Floats, u: Floats) -> npt.NDArray[np.intp]:
    """The code of floor(fl(magnitude / step + u)) * step, at most the largest value; step: the gap
    above magnitude."""
    magnitude = np.minimum(magnitude, grid.values[-1])
    step = grid.steps[grid.values.searchsorted(magnitude, "right") - 1]
    value = np.floor(magnitude / step + u) * step
    return grid.values.searchsorted(np.minimum(value, grid.values[-1]))


def e2m1_nearest(x: Floats) -> Bytes:
    """Codes of x: nearest, ties to the even code, |x| > 6 -> 6, the sign kept (also of -0)."""
    return _nearest(E2M1, np.abs(x)).astype(np.uint8) | np.signbit(x) * NEGATIVE


def e2m1_stochastic(x: Floats, u: Floats) -> Bytes:
    """Codes of x rounded with the noise u in (0, 1), the sign kept (also of -0)."""
    return _stochastic(E2M1, np.abs(x), u).astype(np.uint8) | np.signbit(x) * NEGATIVE


def e2m1_value(codes: Bytes) -> Floats:
    """The value of each code 0..15; code 8 is -0."""
    return E2M1_SIGNED[codes]


def e4m3_nearest(v: np.float32) -> int:
    """The byte nearest to v >= 0, ties to even, at most 448."""
    return int(_nearest(E4M3, np.asarray(v)))


def e4m3_up(v: np.float32) -> int:
    """The byte of the smallest value >= v, at most 448."""
    return min(int(E4M3.values.searchsorted(v, "left")), 126)


def e4m3_stochastic(v: np.float32, u: np.float32) -> int:
    """The byte of v >= 0 rounded with the noise u in (0, 1), at most 448."""
    return int(_stochastic(E4M3, np.asarray(v), np.asarray(u)))


def e4m3_value(byte: int) -> np.float32:
    """The value of an E4M3 byte 0..126."""
    return E4M3.values[byte]


def pack(codes: Bytes) -> Bytes:
    """Two codes a byte, the even column in the low nibble: [M, Kp] -> [M, Kp/2]."""
    return codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)


def unpack(packed: Bytes) -> Bytes:
    """[M, Kp/2] -> [M, Kp]."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes


STREAM_SIGNS, STREAM_ELEMENTS, STREAM_SCALES, STREAM_FOLD = 0, 1, 2, 3
_LOW32 = 2**32 - 1


@functools.lru_cache(maxsize=2**16)
def philox4x32(
    key: tuple[int, int], counter: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011)."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = right >> 32 ^ c1 ^ k0, right & _LOW32, left >> 32 ^ c3 ^ k1, left & _LOW32
        k0, k1 = k0 + 0x9E3779B9 & _LOW32, k1 + 0xBB67AE85 & _LOW32
    return c0, c1, c2, c3


def philox(seed: int, i: int, stream: int) -> tuple[int, int, int, int]:
    """The four words at index i of a stream."""
    return philox4x32((seed & _LOW32, seed >> 32), (i & _LOW32, i >> 32, stream, 0))


def fold_in(seed: int, *data: int) -> int:
    """A new 64-bit seed; several d fold left to right."""
    for d in data:
        low, high, _, _ = philox(seed, d, STREAM_FOLD)
        seed = high << 32 | low
    return seed


def draw16(seed: int, stream: int, n: int) -> int:
    """16-bit draw number n of a stream: eight halves a counter, the low half of word 0 first."""
    word = philox(seed, n // 8, stream)[n % 8 // 2]
    return word & 0xFFFF if n % 2 == 0 else word >> 16


def uniform(seed: int, stream: int, n: int) -> np.float32:
    """u = (k + 1/2) / 2^16, exact in float32."""
    return F32((draw16(seed, stream, n) + 0.5) / 2**16)


def signs(sign_seed: int, round_index: int, group: int) -> Floats:
    """+1 or -1 for each of the first ``group`` of the 128 bits, word 0 bit 0 first; bit 1 is
    minus."""
    words = philox(sign_seed, round_index, STREAM_SIGNS)
    return np.array([1.0 - 2.0 * (words[j // 32] >> j % 32 & 1) for j in range(group)], F32)


NVIDIA_SIGNS = np.array([+1, +1, +1, -1, +1, -1, -1, -1, -1, -1, -1, +1, -1, +1, -1, -1], F32)


def _fwht(y: Floats) -> Floats:
    """Butterflies (a, b) -> (a + b, a - b) on a vector, stride 1, 2, ..., half its length."""
    y, stride = y.copy(), 1
    while stride < len(y):
        pairs = y.reshape(-1, 2, stride)
        a, b = pairs[:, 0].copy(), pairs[:, 1].copy()
        pairs[:, 0], pairs[:, 1] = a + b, a - b
        stride *= 2
    return y


def _factor(round_index: int, rounds: int, group: int) -> np.float32:
    """What a round multiplies by; an even and an odd round together give 2^-p, group = 2^p."""
    p = int(math.log2(group))
    if round_index % 2 == 1:
        return F32(2.0 ** -(p - p // 2))
    if round_index == rounds - 1:
        return F32(2.0 ** (-p / 2))
    return F32(2.0 ** -(p // 2))


def rotate(x: Floats, sign_seed: int, *, rounds: int = 1, group: int = 128) -> Floats:
    """y [M, Kp]: each group of each row through ``rounds`` rounds of signs, butterflies and one
    multiplication."""
    y = _pad(x, 1, group)
    with np.errstate(all="ignore"):
        for i in range(rounds):
            d, factor = signs(sign_seed, i, group), _factor(i, rounds, group)
            for row in y:
                for c in range(0, y.shape[1], group):
                    row[c : c + group] = _fwht(d * row[c : c + group]) * factor
    return y


def bf16(x: Floats) -> Floats:
    """Finite x rounded to BF16 (nearest even on the upper 16 bits), as float32."""
    bits = x.view(np.uint32).astype(np.uint64)
    even = bits >> np.uint64(16) & np.uint64(1)
    rounded = bits + np.uint64(0x7FFF) + even & np.uint64(0xFFFF0000)
    return rounded.astype(np.uint32).view(F32)


def nvidia_rotate(x: Floats) -> Floats:
    """y [M, Kp]: groups of 16, fixed signs, times 1/4, input and result rounded to BF16."""
    y = bf16(_pad(x, 1, 16))
    with np.errstate(all="ignore"):
        for row in y:
            for c in range(0, y.shape[1], 16):
                row[c : c + 16] = bf16(_fwht(NVIDIA_SIGNS * row[c : c + 16]) * F32(0.25))
    return y


def _pad(x: Floats, rows: int, columns: int) -> Floats:
    """A copy of x with zero rows and zero columns up to these multiples."""
    m, k = x.shape
    y = np.zeros((-(-m // rows) * rows, -(-k // columns) * columns), F32)
    y[:m, :k] = x
    return y


def tree(x: Floats) -> np.float32:
    """The fixed pairwise sum: x[i] + x[i + n/2] until one is left."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x[0]


def amax(x: Floats) -> np.float32:
    """max |x|, 0 of nothing."""
    return np.max(np.abs(x), initial=ZERO)


def encode_scale(g: np.float32, cap: int) -> np.float32:
    """S = min(fl(6 C / g), FLT_MAX), 1 where g = 0."""
    return ONE if g == 0 else np.minimum(F32(6 * cap) / g, FLT_MAX)


class Block(NamedTuple):
    """What the rule of one block sees."""

    x: Floats  # 16 or 256 values
    u: Callable[[], Floats]  # its element noise, drawn only if asked for
    scale: np.float32  # S
    global_scale: np.float32  # fl(1 / S)

    @property
    def base(self) -> np.float32:
        """fl(amax_block * fl(S * fl(1/6))), at most FLT_MAX."""
        return np.minimum(amax(self.x) * (self.scale * (ONE / F32(6))), FLT_MAX)


Rule = Callable[[Block], tuple[Bytes, int]]  # block -> its codes and its block scale byte


def _multiplier(byte: int, global_scale: np.float32) -> np.float32:
    """m = min(fl(1 / fl(s * global_scale)), FLT_MAX)."""
    return np.minimum(ONE / (e4m3_value(byte) * global_scale), FLT_MAX)


def _rtn(b: Block) -> tuple[Bytes, int]:
    byte = e4m3_nearest(b.base)
    return e2m1_nearest(b.x * _multiplier(byte, b.global_scale)), byte


def _sr(b: Block) -> tuple[Bytes, int]:
    byte = e4m3_up(b.base)
    return e2m1_stochastic(b.x * _multiplier(byte, b.global_scale), b.u()), byte


def _sr_te(b: Block) -> tuple[Bytes, int]:
    byte = e4m3_nearest(b.base)
    return e2m1_stochastic(b.x * _multiplier(byte, b.global_scale), b.u()), byte


METRICS: dict[str, Callable[[Floats], np.float32]] = {
    "mse": lambda e: tree(e * e),
    "mae": lambda e: tree(np.abs(e)),
    "abs_max": amax,
}


def _try_scale(xs: Floats, byte: int, metric: str) -> tuple[np.float32, Bytes]:
    """The error and the codes of one candidate scale."""
    s = e4m3_value(byte)
    inverse = ZERO if byte == 0 else ONE / s
    codes = e2m1_nearest(xs * inverse)
    return METRICS[metric](xs - e2m1_value(codes) * s), codes


def _best_scale(b: Block, candidates: list[int], metric: str) -> tuple[Bytes, int]:
    """The first candidate, unless a later one is strictly better."""
    xs = b.x * b.scale
    best = candidates[0]
    best_error, best_codes = _try_scale(xs, best, metric)
    for byte in candidates[1:]:
        error, codes = _try_scale(xs, byte, metric)
        if error < best_error:
            best, best_error, best_codes = byte, error, codes
    return best_codes, best


def _four_over_six(b: Block, metric: str) -> tuple[Bytes, int]:
    return _best_scale(b, [e4m3_nearest(b.base), e4m3_nearest(F32(1.5) * b.base)], metric)


CANDIDATES = (0, -2, -1, 1, 2, 3, 4, 5, 6)


def _scale_search(b: Block, candidates: tuple[int, ...]) -> tuple[Bytes, int]:
    """Bytes at these steps from s0, within 1 to 126; where s0 is 0 there is nothing to try."""
    s0 = e4m3_nearest(b.base)
    tried = [0] if s0 == 0 else [min(max(s0 + k, 1), 126) for k in candidates]
    return _best_scale(b, tried, "mse")


CAP = {"rtn": 448, "sr": 448, "sr_te": 448, "four_over_six": 256, "scale_search": 256}

EDEN_GRID_MAX = F32(float(Fraction(6) / Fraction("0.988125")))
EDEN_FACTORS = (1.0, 0.875, 1.125, 1.25, 1.375, 1.5)


class EdenBlock(NamedTuple):
    error: np.float32
    codes: Bytes
    r: np.float32  # the block's decode scale, before it is put on the E4M3 grid


def _eden_block(y: Floats, factors: tuple[float, ...]) -> EdenBlock:
    """The best of the factors for 16 rotated values: round, then correct the scale by num/den."""
    a = amax(y)
    if a < F32(2.0**-120):
        a, z = ZERO, np.copysign(ZERO, y)
    else:
        z = y * (ONE / a)
    best: EdenBlock | None = None
    for k in factors:
        c = EDEN_GRID_MAX / F32(k)
        i = ONE / c
        v = z * c
        codes = e2m1_nearest(v)
        q = e2m1_value(codes)
        num, den = tree(v * v), tree(v * q)
        correction = ONE if den == 0 else num / den
        t = correction * i
        e = z - q * t
        candidate = EdenBlock(tree(e * e), codes, a * t)
        if best is None or candidate.error < best.error:
            best = candidate
    assert best is not None
    return best


class Quantized(NamedTuple):
    codes: Bytes
    block_scale: Bytes
    global_scale: Floats


def _poisoned(rows: int, kp: int, scale_rows: int, scales: int) -> Quantized:
    """A tensor that holds a NaN or Inf: everything decodes to NaN."""
    return Quantized(
        np.zeros((rows, kp // 2), np.uint8),
        np.zeros((scale_rows, kp // 16), np.uint8),
        np.full(scales, np.nan, F32),
    )


def _ms_eden(
    x: Floats, rounds: int, factors: tuple[float, ...], group: int, seed: int, sign_seed: int
) -> Quantized:
    y = rotate(x, sign_seed, rounds=rounds, group=group)
    rows, kp = y.shape
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return _poisoned(rows, kp, rows, 1)
    blocks = [_eden_block(row[c : c + 16], factors) for row in y for c in range(0, kp, 16)]
    largest = max((b.r for b in blocks), default=ZERO)
    global_scale = ONE if largest == 0 else largest / F32(448)
    codes = np.array([b.codes for b in blocks], np.uint8).reshape(rows, kp)
    noise = [uniform(seed, STREAM_SCALES, n) for n in range(len(blocks))]
    scales = [e4m3_stochastic(b.r / global_scale, u) for b, u in zip(blocks, noise, strict=True)]
    block_scale = np.array(scales, np.uint8).reshape(rows, kp // 16)
    return Quantized(pack(codes), block_scale, np.array([global_scale], F32))


def _tiles(
    y: Floats, block: tuple[int, int], seed: int
) -> Iterator[tuple[slice, slice, Callable[[], Floats]]]:
    """The rows, the columns and the noise of each block, row of blocks by row of blocks."""
    height, width = block
    kp = y.shape[1]
    for r in range(0, y.shape[0], height):
        for c in range(0, kp, width):
            numbers = [
                row * kp + column for row in range(r, r + height) for column in range(c, c + width)
            ]
            draw = functools.partial(_element_noise, seed, numbers)
            yield slice(r, r + height), slice(c, c + width), draw


def _element_noise(seed: int, numbers: list[int]) -> Floats:
    return np.array([uniform(seed, STREAM_ELEMENTS, n) for n in numbers], F32)


def held_after(held: np.float32, seen: np.float32) -> np.float32:
    """What the next call is scaled by: fl(1.75 seen), at most FLT_MAX, if that is of any use."""
    useful = np.isfinite(seen) and seen > 0
    return np.minimum(seen * F32(1.75), FLT_MAX) if useful else held


def _blocked(
    x: Floats,
    rule: Rule,
    cap: int,
    block: tuple[int, int],
    seed: int,
    held: np.float32 | None = None,
) -> Quantized:
    """One tensor scale, then the rule on each block; rows added to fill a last tile are not
    stored. With a held amax only blocks that are not finite are zeros, and NaN is all the same."""
    rows = x.shape[0]
    y = _pad(x, block[0], 16)
    finite = np.isfinite(y).all()
    if held is None and not finite:
        return _poisoned(rows, y.shape[1], y.shape[0] // block[0], 1)
    scale = encode_scale(amax(y) if held is None else held, cap)
    global_scale = ONE / scale
    codes = np.zeros(y.shape, np.uint8)
    block_scale = np.zeros((y.shape[0] // block[0], y.shape[1] // 16), np.uint8)
    for r, c, u in _tiles(y, block, seed):
        if not np.isfinite(y[r, c]).all():
            continue
        values, byte = rule(Block(y[r, c].ravel(), u, scale, global_scale))
        codes[r, c] = values.reshape(block)
        block_scale[r.start // block[0], c.start // 16] = byte
    poisoned = global_scale if finite else F32(np.nan)
    return Quantized(pack(codes[:rows]), block_scale, np.array([poisoned], F32))


def _row_scaled(x: Floats, rule: Rule, cap: int, seed: int) -> Quantized:
    """Each row with a tensor scale of its own; the noise index still counts over the whole
    matrix."""
    y = _pad(x, 1, 16)
    rows, kp = y.shape
    out = Quantized(
        np.zeros((rows, kp // 2), np.uint8),
        np.zeros((rows, kp // 16), np.uint8),
        np.ones(rows, F32),
    )
    for r in range(rows):
        if not np.isfinite(y[r]).all():
            out.global_scale[r] = np.nan
            continue
        scale = encode_scale(amax(y[r]), cap)
        out.global_scale[r] = ONE / scale
        for c in range(0, kp, 16):
            u = functools.partial(
                _element_noise, seed, [r * kp + column for column in range(c, c + 16)]
            )
            codes, byte = rule(Block(y[r, c : c + 16], u, scale, out.global_scale[r]))
            out.codes[r, c // 2 : c // 2 + 8] = pack(codes[None])[0]
            out.block_scale[r, c // 16] = byte
    return out


def quantize(
    x: Floats,
    name: str,
    *,
    block: tuple[int, int] = (1, 16),
    row_scaled: bool = False,
    metric: str = "mse",
    rounds: int = 1,
    search: bool = False,
    candidates: tuple[int, ...] = CANDIDATES,
    factors: tuple[float, ...] = EDEN_FACTORS,
    group: int = 128,
    seed: int = 0,
    sign_seed: int = 0,
    held: float | None = None,
) -> Quantized:
    """codes, block_scale and global_scale of x [M, K] float32, contracted along its last axis.

    ``name`` is rtn, rtn_2d, sr, sr_te, four_over_six, scale_search or ms_eden. ``metric`` belongs
    to four_over_six; ``candidates`` to scale_search; ``rounds``, ``search`` and its ``factors``,
    ``group`` and ``sign_seed`` to ms_eden, which takes neither ``block`` nor ``row_scaled``.
    ``held``: an amax that x is scaled by instead of its own.
    """
    assert x.dtype == F32
    assert x.ndim == 2
    assert not (row_scaled and block != (1, 16))
    if name == "rtn_2d":
        name, block = "rtn", (16, 16)
    rules: dict[str, Rule] = {
        "rtn": _rtn,
        "sr": _sr,
        "sr_te": _sr_te,
        "four_over_six": functools.partial(_four_over_six, metric=metric),
        "scale_search": functools.partial(_scale_search, candidates=candidates),
    }
    with np.errstate(all="ignore"):
        if name == "ms_eden":
            assert block == (1, 16)
            assert not row_scaled
            assert held is None
            return _ms_eden(x, rounds, factors if search else (1.0,), group, seed, sign_seed)
        if row_scaled:
            return _row_scaled(x, rules[name], CAP[name], seed)
        given = None if held is None else F32(held)
        return _blocked(x, rules[name], CAP[name], block, seed, given)


def decode(
    codes: Bytes,
    block_scale: Bytes,
    global_scale: Floats,
    k: int,
    block: tuple[int, int] = (1, 16),
) -> Floats:
    """fl(fl(e2m1 * block_scale) * global_scale) of each element, the padding cut off: [M, K]."""
    with np.errstate(all="ignore"):
        return (_without_global(codes, block_scale, block) * global_scale[:, None])[:, :k]


def _without_global(codes: Bytes, block_scale: Bytes, block: tuple[int, int] = (1, 16)) -> Floats:
    """e2m1 * block_scale, exact: [M, Kp]."""
    values = e2m1_value(unpack(codes))
    for r in range(values.shape[0]):
        for c in range(0, values.shape[1], 16):
            values[r, c : c + 16] *= e4m3_value(block_scale[r // block[0], c // 16])
    return values


def transpose_tiles(codes: Bytes, block_scale: Bytes, k: int) -> tuple[Bytes, Bytes]:
    """The same weight codes for dgrad: 16x16 tiles [N, Kp] -> [K, ceil16(N)], columns beyond K cut,
    zeros added."""
    transposed = np.ascontiguousarray(unpack(codes)[:, :k].T)
    n = transposed.shape[1]
    padded = np.zeros((k, -(-n // 16) * 16), np.uint8)
    padded[:, :n] = transposed
    return pack(padded), np.ascontiguousarray(block_scale.T[: -(-k // 16)])


def matmul(
    a: Quantized,
    b: Quantized,
    a_block: tuple[int, int] = (1, 16),
    b_block: tuple[int, int] = (1, 16),
) -> Floats:
    """a @ b^T: fl(fl(acc * global_a) * global_b), [M, N].

    The order of the float32 sum is left open by the definition, so this one takes the exact sum and
    rounds it once; a backend may be asked for the same bits only where its own sum is exact too.
    """
    left = _without_global(a.codes, a.block_scale, a_block).tolist()
    right = _without_global(b.codes, b.block_scale, b_block).tolist()
    products = (
        (p * q for p, q in zip(row, column, strict=True)) for row in left for column in right
    )
    acc = np.array([math.fsum(terms) for terms in products], F32).reshape(len(left), len(right))
    with np.errstate(all="ignore"):
        return acc * a.global_scale[:, None] * b.global_scale[None, :]


def _add_towards_zero(a: np.float32, b: np.float32) -> np.float32:
    """The float32 next to the exact a + b on the side of zero, or a + b itself."""
    exact = Fraction(float(a)) + Fraction(float(b))
    nearest = a + b
    too_far = abs(Fraction(float(nearest))) > abs(exact)
    return np.nextafter(nearest, ZERO) if too_far else nearest


def matmul_of_tensor_cores(
    a: Quantized,
    b: Quantized,
    a_block: tuple[int, int] = (1, 16),
    b_block: tuple[int, int] = (1, 16),
) -> Floats:
    """``matmul`` summed in groups of 64: each group's exact sum rounded once, groups added in order
    with rounding towards zero."""
    left = _without_global(a.codes, a.block_scale, a_block).tolist()
    right = _without_global(b.codes, b.block_scale, b_block).tolist()
    acc = np.zeros((len(left), len(right)), F32)
    for i, row in enumerate(left):
        for j, column in enumerate(right):
            terms = [p * q for p, q in zip(row, column, strict=True)]
            for start in range(0, len(terms), 64):
                group = F32(math.fsum(terms[start : start + 64]))
                acc[i, j] = _add_towards_zero(acc[i, j], group)
    with np.errstate(all="ignore"):
        return acc * a.global_scale[:, None] * b.global_scale[None, :]


def swizzle_offset(r: int, c: int, columns: int) -> int:
    """Where the scale of row r, block column c lies among the bytes cuBLAS and tcgen05 read."""
    tile = r // 128 * -(-columns // 4) + c // 4
    return tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4


def swizzle(block_scale: Bytes) -> Bytes:
    """Row-major scales [R, C] -> 512 * ceil(R/128) * ceil(C/4) bytes, padding bytes 0."""
    rows, columns = block_scale.shape
    out = np.zeros(512 * -(-rows // 128) * -(-columns // 4), np.uint8)
    for r in range(rows):
        for c in range(columns):
            out[swizzle_offset(r, c, columns)] = block_scale[r, c]
    return out


_SIXTY_FOURTHS = (128, 32, 61, 64, 67, 70, 73, 76, 79, 82, 85, 88, 91, 94, 97, 100)
MANY_FACTORS = tuple(n / 64 for n in _SIXTY_FOURTHS)

WORKED_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "rtn_2d": ("rtn_2d", {}),
    "sr": ("sr", {}),
    "sr_te": ("sr_te", {}),
    "rtn_row": ("rtn", {"row_scaled": True}),
    "four_over_six_row": ("four_over_six", {"row_scaled": True}),
    "scale_search_row": ("scale_search", {"row_scaled": True}),
    "four_over_six": ("four_over_six", {}),
    "four_over_six_2d": ("four_over_six", {"block": (16, 16)}),
    "four_over_six_mae": ("four_over_six", {"metric": "mae"}),
    "four_over_six_abs_max": ("four_over_six", {"metric": "abs_max"}),
    "scale_search": ("scale_search", {}),
    "scale_search_2d": ("scale_search", {"block": (16, 16)}),
    "ms_eden": ("ms_eden", {}),
    "ms_eden_2": ("ms_eden", {"rounds": 2}),
    "ms_eden_3": ("ms_eden", {"rounds": 3}),
    "ms_eden_2_search": ("ms_eden", {"rounds": 2, "search": True}),
    "ms_eden_g32": ("ms_eden", {"group": 32}),
    "ms_eden_g16_2": ("ms_eden", {"group": 16, "rounds": 2}),
    "scale_search_3": ("scale_search", {"candidates": (0, -1, 5)}),
    "scale_search_late": ("scale_search", {"candidates": (5, 4, -1, 0)}),
    "scale_search_up": ("scale_search", {"candidates": (4,)}),
    "scale_search_wide": (
        "scale_search",
        {"candidates": (8, -8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1)},
    ),
    "scale_search_2_2d": ("scale_search", {"candidates": (0, 5), "block": (16, 16)}),
    "scale_search_3_row": ("scale_search", {"candidates": (0, -1, 5), "row_scaled": True}),
    "ms_eden_2_search_3": ("ms_eden", {"rounds": 2, "search": True, "factors": (1.0, 1.25, 1.5)}),
    "ms_eden_search_late": ("ms_eden", {"group": 32, "search": True, "factors": (1.5, 1.25, 1.0)}),
    "ms_eden_search_one": ("ms_eden", {"group": 16, "search": True, "factors": (1.0625,)}),
    "ms_eden_search_many": ("ms_eden", {"group": 64, "search": True, "factors": MANY_FACTORS}),
}
"""Rule name in the vector files -> quantiser and options. The files also hold rotate_1, _2, _3,
nvidia_rotate, sr_transposed and requantised_transposed (four_over_six, decoded, transposed, ms_eden
with two rounds)."""

VECTOR_FILES = tuple(sorted(Path(__file__).parent.glob("vectors/*.npz")))


class Vectors:
    """One file of worked cases: ``case/x``, ``case/rule/{codes,block_scale,global_scale}`` or
    ``case/rule/y``."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays: dict[str, npt.NDArray[Any]] = {key: file[key] for key in file.files}
        self.seed = int(self.arrays["seed"])
        self.sign_seed = int(self.arrays["sign_seed"])

    @property
    def cases(self) -> list[str]:
        return [key.removesuffix("/x") for key in self.arrays if key.endswith("/x")]

    def rules(self, case: str) -> list[str]:
        keys = (key.split("/") for key in self.arrays)
        return sorted({key[1] for key in keys if key[0] == case and len(key) == 3})

    def x(self, case: str) -> Floats:
        return self.arrays[f"{case}/x"]

    def want(self, case: str, rule: str) -> Quantized:
        fields = (self.arrays[f"{case}/{rule}/{field}"] for field in Quantized._fields)
        return Quantized(*fields)


@functools.cache
def vectors(path: Path) -> Vectors:
    """The worked cases of a file, read once."""
    return Vectors(path)
