"""The NVFP4 GEMM as one Triton kernel: FP4 tensor cores where there are some, FP16 ones elsewhere.

    a [M, Kp], b [N, Kp] as codes and block scales  ->  out [M, N] = a b^T

A program makes one tile [BM, BN] of the output: in steps of BK along the contraction it loads codes
and scales of both operands and adds their product to float32 sums; at the end it applies the global
scales, adds the bias and casts once.

    native      tl.dot_scaled: the tensor cores decode, multiply and sum
    decoded     codes become FP16 in registers, tl.dot multiplies: the same products, each exact,
                summed in another order

FP16 holds e2m1 * e4m3 as exactly as BF16 does, its tensor cores are as fast, and unlike BF16's its
packed product exists on every card from sm_80 on.

A contraction may be summed in any order, so the eight codes of a 32-bit word need not be put into
order: nibbles 0 and 4 of every word of one operand meet nibbles 0 and 4 of the other's, then 1 and
5, and so on. A mask and a shift decode both at once, which takes a third of the instructions out of
the main loop, beside decoding byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import product
from nvfp4.numerics.formats import NVFP4

BLOCK = tl.constexpr(NVFP4.block_size)
"""Elements that share a block scale, as a kernel's constant."""

HALF = tl.constexpr(NVFP4.block_size // 2)
"""Bytes of codes in a block."""

UNSCALE = tl.constexpr(2.0**14)
"""Each decoded operand is 2^-7 of its value, see ``_decode``."""


@triton.jit
def _decode(words, scales, NIBBLE: tl.constexpr):
    """Decode one nibble of each half of code words [R, C]: FP16 [R, 2 C], 2^-7 of the values.

    scales: E4M3 bytes [R, C / 2], as a block is two words. The bits of E2M1 in the place of FP16's
    mean 2^-14 of the value, those of E4M3 2^-8 of it, subnormals included. e4m3 * 2^7 is the
    largest power that stays finite (57344); times e2m1 * 2^-14 this is a multiple of 2^-17 with 6
    significant bits: exact, with one multiplication per element and no subnormal result lost (FP16
    is never flushed).
    """
    # exponent and mantissa of E4M3 to those of FP16: 2^-8 of the value, times 2^15
    scale = ((scales & 0x7F).to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 32768.0

    # in both halves of a word at once: the sign from bit 3 to 15, the magnitude from 0..2 to 9..11
    rows: tl.constexpr = words.shape[0]
    columns: tl.constexpr = words.shape[1]
    nibbles = words >> (4 * NIBBLE)
    pair = ((nibbles & 0x00080008) << 12) | ((nibbles & 0x00070007) << 9)

    # two words give four elements of a block at a time, to meet its scale
    halves = tl.join(pair.to(tl.uint16), (pair >> 16).to(tl.uint16)).to(tl.float16, bitcast=True)
    return (halves.reshape(rows, columns // 2, 4) * scale[:, :, None]).reshape(rows, 2 * columns)


@triton.jit
def _load(codes, scales, lines, count, at, blocks, TALL: tl.constexpr, BK: tl.constexpr):
    """Codes and scale bytes [R, BK / 16] of rows ``lines`` from block ``at`` on, 0 outside.

    Codes come as bytes [R, BK / 2] or, to be decoded, as words [R, BK / 8]. TALL lines share a
    scale.
    """
    WIDTH: tl.constexpr = HALF // (codes.dtype.element_ty.primitive_bitwidth // 8)  # per block
    inside = (lines < count)[:, None]
    across = at * WIDTH + tl.arange(0, BK // BLOCK * WIDTH)[None, :]
    places = codes + lines.to(tl.int64)[:, None] * (blocks * WIDTH) + across
    code = tl.load(places, inside & (across < blocks * WIDTH), other=0)
    along = at + tl.arange(0, BK // BLOCK)[None, :]
    places = scales + (lines // TALL).to(tl.int64)[:, None] * blocks + along
    return code, tl.load(places, inside & (along < blocks), other=0)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The row and column of tile number ``tile``: GROUP rows of tiles are walked together.

    Within a group the walk goes down the columns, so that what L2 holds is used again.
    """
    wide = GROUP * tiles_n
    first = tile // wide * GROUP
    height = min(tiles_m - first, GROUP)
    return first + tile % wide % height, tile % wide // height


@triton.jit
def _write(acc, out, a_global, b_global, bias, rows, columns, M, N,
           A_ROWS: tl.constexpr, B_ROWS: tl.constexpr):  # fmt: skip
    """fl(fl(acc * a_global) * b_global), plus bias, each rounded to float32; then the one cast."""
    row_inside, column_inside = rows < M, columns < N

    # one global scale, or one per row of the operand: per row of the tile, per column of it
    a_scale = (
        tl.load(a_global + rows, row_inside, other=0.0)[:, None] if A_ROWS else tl.load(a_global)
    )
    b_scale = (
        tl.load(b_global + columns, column_inside, other=0.0)[None, :]
        if B_ROWS
        else tl.load(b_global)
    )
    y = product(acc * a_scale, b_scale)
    if bias is not None:
        y += tl.load(bias + columns, column_inside, other=0.0).to(tl.float32)[None, :]

    inside = row_inside[:, None] & column_inside[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), inside)


@triton.jit
def gemm_kernel(a_codes, a_scale, a_global, b_codes, b_scale, b_global, bias, out, M, N, blocks,
                A_TALL: tl.constexpr, B_TALL: tl.constexpr, A_ROWS: tl.constexpr,
                B_ROWS: tl.constexpr,
                NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                GROUP: tl.constexpr) -> None:  # fmt: skip
    """out [M, N] = decode(a) [M, Kp] @ decode(b) [N, Kp]^T: one tile [BM, BN] per program.

    a_codes [M, Kp / 2], b_codes [N, Kp / 2]; blocks: Kp / 16, rather than bytes, so that the
    compiler knows rows to be multiples of 8 bytes. A_TALL, B_TALL: rows that share a block scale, 1
    or 16. A_ROWS, B_ROWS: whether the global scale is one per row. bias [N] may be None. Compile
    without FMA contraction.

    Not persistent: a loop over tiles around the other one, flattened so that loads run ahead from
    tile to tile, moves the divisions of ``_place`` into the main loop (1400 instructions instead of
    856 on sm_120, 2048 instead of 1416 on sm_100).
    """
    tile_m, tile_n = _place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)

    # eight codes at a time where they are decoded here
    if not NATIVE:
        a_codes = a_codes.to(tl.pointer_type(tl.uint32))
        b_codes = b_codes.to(tl.pointer_type(tl.uint32))

    # the contraction, without the global scales; scales beyond its end are 0 and add nothing
    acc = tl.zeros((BM, BN), tl.float32)
    for at in tl.range(0, blocks, BK // BLOCK):
        a, a_bytes = _load(a_codes, a_scale, rows, M, at, blocks, A_TALL, BK)
        b, b_bytes = _load(b_codes, b_scale, columns, N, at, blocks, B_TALL, BK)
        if NATIVE:
            a_blocks = a_bytes.to(tl.float8e4nv, bitcast=True)
            b_blocks = b_bytes.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(a, a_blocks, "e2m1", b.T, b_blocks, "e2m1", acc)
        else:
            for nibble in tl.static_range(4):
                acc = tl.dot(_decode(a, a_bytes, nibble), _decode(b, b_bytes, nibble).T, acc)

    if not NATIVE:
        acc *= UNSCALE  # a power of two: exact
    _write(acc, out, a_global, b_global, bias, rows, columns, M, N, A_ROWS, B_ROWS)
