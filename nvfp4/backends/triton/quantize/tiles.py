"""How a tile [R, C] of an operand comes in, is rotated, and goes out as codes and scales.

    load_rows       memory runs along the rows (the axis that is contracted)  -> float32 [R, C]
    load_columns    memory runs down the columns: x^T without a transpose     -> float32 [R, C]
    decode_columns  codes, read as the transpose of what they stand for       -> float32 [R, C]
    rotate          signs, butterflies, one factor per round                  -> float32 [R, C]
    store_codes     values or codes, eight per int32 word                     <- [R, C]
    store_swizzled  scale bytes where tensor cores look for them              <- [R/tile, C/16]

The question behind this file is which thread holds which elements. A quantiser looks at blocks of
16 along a row, so a thread should hold whole blocks: then maxima and sums stay in its registers.
Triton deals elements to threads by the order of axes in which they are loaded, hence the shapes
with four axes and the loads that are joined instead of made at once. Everything outside of the
matrix is loaded as zero, as the definition pads it.

Offsets are int64 throughout: a tensor may hold more than 2^31 elements.
"""

import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import (
    CODE_BASES,
    anew,
    bits,
    decode_element,
    decode_scale,
    from_bits,
    log2,
    magnitude_bits,
    nearest_code,
    round_to_bf16,
    widened,
)
from nvfp4.backends.triton.noise import draws, philox
from nvfp4.backends.triton.quantize.policy import NOISY
from nvfp4.numerics.hadamard import NVIDIA_SIGNS
from nvfp4.numerics.rng import ELEMENT_STREAM as _ELEMENT_STREAM
from nvfp4.numerics.rng import SIGN_STREAM as _SIGN_STREAM

ELEMENT_STREAM = tl.constexpr(_ELEMENT_STREAM)
SIGN_STREAM = tl.constexpr(_SIGN_STREAM)
FIXED_SIGNS = tl.constexpr(sum(1 << j for j, sign in enumerate(NVIDIA_SIGNS) if sign < 0))
"""NVIDIA's signs, one bit each: set means minus."""


@triton.jit
def positions(tile, COUNT: tl.constexpr):
    """int64 indices of the rows (or columns) of tile number ``tile``."""
    return tile.to(tl.int64) * COUNT + tl.arange(0, COUNT)


@triton.jit
def load_rows(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T: tl.constexpr):
    """Tile [R, C] of a matrix whose rows are contiguous in memory, zero outside of it.

    Read in the order [pieces, R, C / (pieces run), run]: threads are dealt from the last axis to
    the first, so that the pieces of what a thread reads at once stay in it, and sums over them need
    no shuffle.
    """
    OUTER: tl.constexpr = T.columns // (T.pieces * T.run)
    row = positions(row_tile, T.rows)[None, :, None, None]

    # [pieces, OUTER]: a thread's pieces lie one after the other in memory
    piece = positions(column_tile, OUTER)[None, :] * T.pieces + tl.arange(0, T.pieces)[:, None]
    column = (piece * T.run)[:, None, :, None] + tl.arange(0, T.run)[None, None, None, :]

    pointers = x + row * stride_row + column * stride_column
    values = tl.load(pointers, mask=(row < rows) & (column < columns), other=0.0)
    return tl.reshape(tl.permute(widened(values), (1, 2, 0, 3)), (T.rows, T.columns))


@triton.jit
def runs(tile, COUNT: tl.constexpr, RUN: tl.constexpr):
    """Indices of tile number ``tile`` of COUNT as [1, COUNT/run, run]."""
    return (positions(tile, COUNT // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :])[None, :, :]


@triton.jit
def block_starts(column_tile, COUNT: tl.constexpr):
    """First column of each block of tile ``column_tile`` of COUNT columns, [COUNT/16, 1, 1]."""
    return (positions(column_tile, COUNT // 16) * 16)[:, None, None]


@triton.jit
def load_column(lines, inside, column, columns, stride, TILE: tl.constexpr):
    """What ``lines`` point to, moved on to a column; zero outside of ``columns``.

    TILE columns share one place in memory: 1, or 16 for the scales of 16x16 blocks.
    """
    return tl.load(lines + column // TILE * stride, mask=inside & (column < columns), other=0)


@triton.jit
def load_two(lines, inside, column, columns, stride, TILE: tl.constexpr):
    """Columns 0 and 8 from ``column`` on, along a last axis."""
    one = load_column(lines, inside, column, columns, stride, TILE)
    return tl.join(one, load_column(lines, inside, column + 8, columns, stride, TILE))


@triton.jit
def load_four(lines, inside, column, columns, stride, TILE: tl.constexpr):
    """Columns 0, 4, 8 and 12 from ``column`` on, along two last axes."""
    two = load_two(lines, inside, column, columns, stride, TILE)
    return tl.join(two, load_two(lines, inside, column + 4, columns, stride, TILE))


@triton.jit
def load_eight(lines, inside, column, columns, stride, TILE: tl.constexpr):
    """Every second column of a block, along three last axes."""
    four = load_four(lines, inside, column, columns, stride, TILE)
    return tl.join(four, load_four(lines, inside, column + 2, columns, stride, TILE))


@triton.jit
def load_blocks(lines, inside, column, columns, stride, TILE: tl.constexpr):
    """Blocks of 16 columns, [C/16, n, 16], from their first columns [C/16, 1, 1].

    lines: pointers into the first column of memory, [1, n/run, run]. Memory runs down the columns,
    and a thread reads ``run`` neighbours at once. Sixteen loads, joined, leave the whole block in
    the thread, whatever order of axes the compiler would have dealt one load in.
    """
    # a join makes the last axis, so the lowest bit of the column comes last: 8, 4, 2, then 1
    even = load_eight(lines, inside, column, columns, stride, TILE)
    blocks = tl.join(even, load_eight(lines, inside, column + 1, columns, stride, TILE))
    return tl.reshape(blocks, (column.shape[0], lines.shape[1] * lines.shape[2], 16))


@triton.jit
def load_columns(
    x, row_tile, column_tile, rows, columns, stride_row, stride_column, T: tl.constexpr
):
    """Tile [R, C] of a matrix whose columns are contiguous in memory, zero outside of it."""
    row = runs(row_tile, T.rows, T.run)
    start = block_starts(column_tile, T.columns)
    blocks = load_blocks(x + row * stride_row, row < rows, start, columns, stride_column, 1)
    return tl.reshape(tl.permute(blocks.to(tl.float32), (1, 0, 2)), (T.rows, T.columns))


@triton.jit
def load_dense(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T: tl.constexpr):
    """Tile [R, C] of a strided matrix as float32, zero outside of it."""
    if T.down:
        return load_columns(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T)
    else:
        return load_rows(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T)


@triton.jit
def unpack(packed):
    """Values of the codes in bytes [..., n], as [..., n, 2]: the low nibble is the even column."""
    packed = packed.to(tl.int32)
    return tl.join(decode_element(packed & 15), decode_element(packed >> 4))


@triton.jit
def load_scales(block_scale, row, block, rows, row_blocks, TILE: tl.constexpr):
    """Values of the block scales at rows of codes and blocks of columns, 0 outside.

    row and block are indices that broadcast; TILE rows share a scale.
    """
    pointers = block_scale + (row // TILE) * row_blocks + block
    return decode_scale(tl.load(pointers, mask=(row < rows) & (block < row_blocks), other=0))


@triton.jit
def decode_tile(
    codes, block_scale, row, column_tile, rows, row_bytes, TILE: tl.constexpr, C: tl.constexpr
):
    """e2m1 * block_scale of a tile [R, C] of a coded matrix, zero outside; exact."""
    R: tl.constexpr = row.shape[0]
    byte, block = positions(column_tile, C // 2)[None, :], positions(column_tile, C // 16)[None, :]
    row = row[:, None]
    packed = tl.load(
        codes + row * row_bytes + byte, mask=(row < rows) & (byte < row_bytes), other=0
    )

    # a block of 16 codes is 8 bytes, so a row has row_bytes / 8 scales
    scales = load_scales(block_scale, row, block, rows, row_bytes // 8, TILE)
    return tl.reshape(tl.reshape(unpack(packed), (R, C // 16, 16)) * scales[:, :, None], (R, C))


@triton.jit
def decode_columns(
    codes, block_scale, global_scale, row_tile, column_tile, rows, columns, row_bytes,
    CODED: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Tile [R, C] of the transpose of what codes [columns, row_bytes] stand for.

    Zero outside of [rows, columns]. Each value is fl(fl(e2m1 * block_scale) * global_scale) in
    float32, as re-quantisation wants it: never rounded to BF16.
    """
    # rows of the result lie along the codes, two to a byte; its columns are rows of codes
    byte, start = runs(row_tile, T.rows // 2, T.run // 2), block_starts(column_tile, T.columns)
    inside = byte < row_bytes
    packed = load_blocks(codes + byte, inside, start, columns, row_bytes, 1)
    scales = load_blocks(
        block_scale + byte // 8, inside, start, columns, row_bytes // 8, CODED.tile
    )
    values = unpack(packed) * decode_scale(scales)[:, :, :, None]  # [C/16, R/2, 16, 2]

    # a global scale per row of codes is one per column here
    if CODED.row_scaled:
        column = start + tl.arange(0, 16)[None, None, :]
        factor = tl.load(global_scale + column, mask=column < columns, other=0.0)
    else:
        factor = tl.load(global_scale + tl.arange(0, 1))[:, None, None]

    # what the codes were padded with is no part of the matrix, whatever it decodes to
    values = tl.permute(values * factor[:, :, :, None], (1, 3, 0, 2))
    row = positions(row_tile, T.rows)[:, None]
    return tl.where(row < rows, tl.reshape(values, (T.rows, T.columns)), 0.0)


@triton.jit
def load_global(global_scale, row, rows, ROW_SCALED: tl.constexpr):
    """Global scales [R, 1] or [1, 1]."""
    if ROW_SCALED:
        return tl.load(global_scale + row, mask=row < rows, other=0.0)[:, None]
    else:
        return tl.load(global_scale + tl.arange(0, 1))[:, None]


@triton.jit
def partners(pairs):
    """The other element of each pair of float32 [n, m, 2, s] along axis 2.

    A sum of the bits of both, less one's own bits, modulo 2^32: one shuffle where the pair lies in
    two threads, and nothing at all where it lies in one. (Through int64 because the interpreter
    sums there; compiled, that is free.)
    """
    own = bits(pairs)
    return from_bits((tl.sum(own, axis=2, keep_dims=True) - own).to(tl.int64).to(tl.int32))


@triton.jit
def butterflies(y, GROUP: tl.constexpr, PAIRED: tl.constexpr):
    """Unnormalised Walsh-Hadamard transform of the last axis of y [n, GROUP].

    Strides 1, 2, ..., GROUP/2, each (a, b) -> (a + b, a - b). On tensor cores it was not worth it:
    instructions of ms_eden(1) on sm_90 are 2072 with butterflies, 3976 as a product with H128, 2272
    as one with H16 and three butterflies.
    """
    N: tl.constexpr = y.shape[0]

    # the second of a pair is negated: within a thread by the sum itself, across threads by xor
    # (`-x` is 0 - x in Triton 3.6), or by a product, which leaves Hopper's integer pipe alone.
    # Blackwell adds two at once (PAIRED), but not behind products
    second = tl.arange(0, 2)[None, None, :, None]
    for s in tl.static_range(log2(GROUP)):
        pairs = tl.reshape(y, (N, GROUP >> (s + 1), 2, 1 << s))
        if PAIRED:
            negated = from_bits(bits(pairs) ^ (second << 31))
        else:
            negated = pairs * (1 - 2 * second).to(tl.float32)
        y = tl.reshape(partners(pairs) + negated, (N, GROUP))
    return y


@triton.jit
def sign_bits(sign_low, sign_high, ROUND: tl.constexpr, P: tl.constexpr, AGAIN: tl.constexpr):
    """Signs of one round, int32 [GROUP], in the sign bit: set means minus."""
    if P.fixed:
        return (FIXED_SIGNS >> tl.arange(0, P.group)) << 31
    else:
        # bit j of the 128 that one counter gives; groups below 128 use the first
        WORDS: tl.constexpr = max(P.group // 32, 1)
        w0, w1, w2, w3 = philox(sign_low, sign_high, tl.full((1,), ROUND, tl.int64), SIGN_STREAM)
        which = tl.arange(0, WORDS)
        word = tl.where(which < 2, tl.where(which < 1, w0, w1), tl.where(which < 3, w2, w3))

        # all 32 of a word by one shift each, so that a thread that has a word's elements takes one
        if AGAIN:
            word = anew(word)
        shift = (31 - tl.arange(0, P.group // WORDS)).to(tl.uint32)
        signs = (word[:, None] << shift[None, :]) & 0x80000000
        return tl.reshape(signs, (P.group,)).to(tl.int32, bitcast=True)


@triton.jit
def rotate(
    x, sign_low, sign_high, NARROW: tl.constexpr, P: tl.constexpr, AGAIN: tl.constexpr = False
):
    """Tile [R, C] with each row rotated in groups, as the policy says; without rounds, x itself.

    C is a multiple of the group. NARROW: whether x came as BF16. AGAIN: whether this is in a loop.
    """
    y = turned(x, sign_low, sign_high, NARROW, P, AGAIN)
    return tl.reshape(scaled_turn(y, P), x.shape)


@triton.jit
def turned(
    x, sign_low, sign_high, NARROW: tl.constexpr, P: tl.constexpr, AGAIN: tl.constexpr = False
):
    """Groups [n, g] of x rotated but for ``scaled_turn``."""
    y = tl.reshape(x, (x.shape[0] * x.shape[1] // P.group, P.group))

    # NVIDIA's rotation rounds what goes in and what comes out to BF16
    if P.fixed and not NARROW:
        y = round_to_bf16(y)
    for i in tl.static_range(len(P.round_scales)):
        if i > 0:
            y = y * P.round_scales[i - 1]
        signs = sign_bits(sign_low, sign_high, i, P, AGAIN)
        y = butterflies(from_bits(bits(y) ^ signs[None, :]), P.group, P.converts)
    return y


@triton.jit
def scaled_turn(y, P: tl.constexpr):
    """The end of a rotation: the scale of its last round, and NVIDIA's rounding.

    Neither changes an order: the largest magnitude before it becomes the largest after it.
    """
    if len(P.round_scales) > 0:
        y = y * P.round_scales[len(P.round_scales) - 1]
    if P.fixed:
        y = round_to_bf16(y)
    return y


@triton.jit
def element_noise(row, block, padded, seed_low, seed_high, TR: tl.constexpr):
    """u / 2 of the element stream for blocks [R/TR, TR, C/16, 16].

    row [R], block [C/16]: indices in the whole matrix, so the noise of an element does not depend
    on the tile. Draw n = row * padded + column; a counter holds eight, so a block takes two.
    """
    R: tl.constexpr = row.shape[0]
    K: tl.constexpr = block.shape[0]
    counter = (
        (row * (padded // 8))[:, None, None]
        + (block * 2)[None, :, None]
        + tl.arange(0, 2)[None, None, :]
    )
    return tl.reshape(draws(seed_low, seed_high, counter, ELEMENT_STREAM), (R // TR, TR, K, 16))


@triton.jit
def eight(x):
    """The eight elements of each word of x [R, C], each a tensor [R, C/8] of its own."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 2, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0, x4 = tl.split(x0)
    x1, x5 = tl.split(x1)
    x2, x6 = tl.split(x2)
    x3, x7 = tl.split(x3)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def behind(word, x):
    """The sign and the next three bits of x behind ``word``, uint32: one funnel shift."""
    return (word << 4) | (x.to(tl.uint32, bitcast=True) >> 28)


@triton.jit
def sign_word(x0, x1, x2, x3, x4, x5, x6, x7):
    """Signs of eight tensors where words of codes have theirs, the first in the lowest nibble."""
    word = behind(behind(behind(x7.to(tl.uint32, bitcast=True) >> 28, x6), x5), x4)
    word = behind(behind(behind(behind(word, x3), x2), x1), x0)
    return (word & 0x88888888).to(tl.int32, bitcast=True)


@triton.jit
def rounded_words(x):
    """Words [R, C/8] of the codes nearest to float32 x [R, C], the first in the lowest nibble.

    Magnitudes are summed up as they are, bases included, which go at the end.
    """
    x0, x1, x2, x3, x4, x5, x6, x7 = eight(x)
    low, high = (
        nearest_code(x0) + (nearest_code(x1) << 4),
        nearest_code(x4) + (nearest_code(x5) << 4),
    )
    low += (nearest_code(x2) << 8) + (nearest_code(x3) << 12)
    high += (nearest_code(x6) << 8) + (nearest_code(x7) << 12)
    return (low + (high << 16) - CODE_BASES) | sign_word(x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def value_word(word, v):
    """The code of a value v of E2M1's grid before those of ``word``, without its sign.

    Times 2^-126 it is a subnormal whose mantissa begins with the code.
    """
    FIRST: tl.constexpr = 2.0**-126
    return (word << 4) + (bits(from_bits(magnitude_bits(v)) * FIRST) >> 22)


@triton.jit
def exact_words(v):
    """Words [R, C/8] of the codes of float32 v [R, C], which are values of E2M1's grid."""
    x0, x1, x2, x3, x4, x5, x6, x7 = eight(v)
    word = value_word(value_word(value_word(value_word(0, x7), x6), x5), x4)
    word = value_word(value_word(value_word(value_word(word, x3), x2), x1), x0)
    return word | sign_word(x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def converted_words(x):
    """``rounded_words``, and ``exact_words``, by the hardware of sm_100 and later.

    PTX ISA, cvt to .e2m1x2 (from 8.6 on): .rn rounds to nearest, ties to even; .satfinite takes all
    beyond 6 to 6; the sign stays, also that of zero, as E2M1 has a -0; NaN becomes +6, but no rule
    keeps codes of NaN. The first operand becomes the upper half of the byte.

    ``cvt.rs``, which rounds stochastically, is left out: no public text says which random bits
    serve which element.
    """
    x0, x1, x2, x3, x4, x5, x6, x7 = eight(x)
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 a, b, c, d;
        cvt.rn.satfinite.e2m1x2.f32 a, $2, $1;
        cvt.rn.satfinite.e2m1x2.f32 b, $4, $3;
        cvt.rn.satfinite.e2m1x2.f32 c, $6, $5;
        cvt.rn.satfinite.e2m1x2.f32 d, $8, $7;
        mov.b32 $0, {a, b, c, d};
        }""",
        "=r,f,f,f,f,f,f,f,f",
        [x0, x1, x2, x3, x4, x5, x6, x7],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.constexpr_function
def on_grid(rule: str) -> bool:
    """Whether the values that a rule hands on are E2M1's already."""
    return rule in NOISY


@triton.jit
def store_codes(codes, values, keep, row, column_tile, rows, padded, P: tl.constexpr):
    """Round values [R, C] to codes, eight per word, and store those inside of [rows, padded].

    codes: pointer to int32. keep: where it is false, [R, 1] or [1, 1], codes are 0. The words of a
    row end with ``padded``, a multiple of 16.
    """
    word = positions(column_tile, values.shape[1] // 8)
    inside = (row[:, None] < rows) & (word[None, :] < padded // 8)
    if P.converts:
        words = converted_words(values)
    elif on_grid(P.rule):
        words = exact_words(values)
    else:
        words = rounded_words(values)
    words = tl.where(keep, words, 0)
    tl.store(codes + row[:, None] * (padded // 8) + word[None, :], words, mask=inside)


@triton.jit
def store_scales(block_scale, scales, row_tile, block, scale_rows, row_blocks):
    """Store block scales [m, C/16] of row tile ``row_tile``, inside of [scale_rows, row_blocks]."""
    row = positions(row_tile, scales.shape[0])
    inside = (row[:, None] < scale_rows) & (block[None, :] < row_blocks)
    pointers = block_scale + row[:, None] * row_blocks + block[None, :]
    tl.store(pointers, scales.to(block_scale.dtype.element_ty), mask=inside)


@triton.jit
def swizzled_offset(row, block, row_blocks):
    """Byte [R, K] where tensor cores look for the scale of (row, block); see ``layout.py``."""
    tile = (row // 128)[:, None] * ((row_blocks + 3) // 4) + (block // 4)[None, :]  # 512 bytes each
    return tile * 512 + ((row % 32) * 16 + (row % 128) // 32 * 4)[:, None] + (block % 4)[None, :]


@triton.jit
def store_swizzled(swizzled, bytes_, row, block, rows, row_blocks, TR: tl.constexpr):
    """Scale bytes [R/TR, C/16], repeated over the TR rows of a tile, in the swizzled layout."""
    R: tl.constexpr = row.shape[0]
    K: tl.constexpr = block.shape[0]
    spread = tl.reshape(tl.broadcast_to(bytes_[:, None, :], (R // TR, TR, K)), (R, K))
    inside = (row[:, None] < rows) & (block[None, :] < row_blocks)
    tl.store(swizzled + swizzled_offset(row, block, row_blocks), spread, mask=inside)
