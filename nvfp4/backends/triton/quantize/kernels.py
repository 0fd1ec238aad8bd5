"""The kernels that quantise: amax, then codes and scales; the end of ms_eden; seeds; decoding.

    amax_kernel         x [M, K]      -> peak, int32 [1] or [M]: the largest magnitude, as bits
    quantize_kernel     x, peak       -> codes int32 [M, Kp/8], block_scale uint8 [M/tile, Kp/16],
                                         global_scale float32 [1] or [M], swizzled scales if wanted
    *_both_kernel       x             -> the same of x and of x^T, from one read of memory
    finish_kernel       r [M, Kp/16]  -> block and global scales of ms_eden, whose range is known
                                         only when every block is done
    seeds_kernel, decode_kernel       one launch each

A program takes a tile [R, C], or a few: load, rotate, scale, round, pack, store. There is one
family of kernels: what differs between quantisers is the ``Policy`` a kernel is compiled for
(``P``), what differs between sources is how a tile is loaded (``CODED``), and ``Tile`` says its
size (``T``).

Nothing waits for the device: the amax stays there, and every program makes the same scales from it.
The amax travels as bits because integers order like magnitudes: programs agree by an atomic
maximum, and a NaN, being above everything, is never lost.

Seeds come as halves of 32 bits that no kernel is specialised on, or as pointers, for CUDA graphs.
All kernels must be launched with ``enable_fp_fusion=False``: a * b + c is rounded twice.
"""

import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import (
    E4M3,
    INFINITY_BITS,
    MAGNITUDE,
    NAN_BITS,
    bits,
    drawn_code,
    from_bits,
    largest_bits,
    largest_of_rows,
    over_elements,
    round_to_bf16,
)
from nvfp4.backends.triton.noise import draw, draws, fold_in, seed_halves
from nvfp4.backends.triton.quantize.rules import (
    block_bits,
    cap,
    ms_eden,
    plain,
    scaled_by_amax,
    searched,
)
from nvfp4.backends.triton.quantize.scales import (
    finite_blocks,
    global_scales,
    raise_global,
    raise_peak,
    store_global,
)
from nvfp4.backends.triton.quantize.tiles import (
    decode_columns,
    decode_tile,
    element_noise,
    load_dense,
    load_global,
    load_rows,
    positions,
    rotate,
    scaled_turn,
    store_codes,
    store_scales,
    store_swizzled,
    turned,
)
from nvfp4.numerics.rng import BLOCK_SCALE_STREAM as _BLOCK_SCALE_STREAM

BLOCK_SCALE_STREAM = tl.constexpr(_BLOCK_SCALE_STREAM)
SEEDS = ("seed_low", "seed_high", "sign_low", "sign_high")
BOTH_SEEDS = tuple(f"{seed}_{side}" for side in ("rows", "columns") for seed in SEEDS)
"""Parameters that no kernel is specialised on, by their names in kernels of both orientations.

Triton would compile anew for a seed that is 1 or divides by 16, and it ignores names that a kernel
does not have. Before these matched there were 16 compiles of 46 s in 50 steps of one layer, none in
300 steps after.
"""


@triton.jit
def tile_of(columns, C: tl.constexpr, BACKWARDS: tl.constexpr = False):
    """(row tile, column tile) of this program. BACKWARDS: the last program takes the first tile.

    What comes after a pass over the same matrix begins where that ended: there it is still in L2.
    """
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    column_tiles = (columns + C - 1) // C
    return program // column_tiles, program % column_tiles


@triton.jit
def load_tile(
    x, x_scale, x_global, row_tile, column_tile, rows, columns, stride_row, stride_column,
    CODED: tl.constexpr,
    T: tl.constexpr
):  # fmt: skip
    """Tile [R, C] of the operand as float32, zero outside of [rows, columns].

    CODED None: x is a strided matrix. A ``Coded``: the operand is the transpose of what codes x
    stand for, and stride_column is the length of a row of codes in bytes.
    """
    if CODED is not None:
        return decode_columns(
            x, x_scale, x_global, row_tile, column_tile, rows, columns, stride_column, CODED, T
        )
    else:
        return load_dense(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T)


@triton.jit
def find_peak(
    x, row, rows, peak, sign_low, sign_high, P: tl.constexpr, NARROW: tl.constexpr = False
):
    """Raise ``peak`` (bits, one number or one per row) to the largest magnitude of tile x [R, C].

    A rotated operand is scaled by the amax of what the rotation makes of it. NARROW: x was BF16.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    y = tl.reshape(turned(x, sign_low, sign_high, NARROW, P), (R, C))
    largest = largest_bits(y, 1)
    if P.row_scaled:
        largest = bits(scaled_turn(from_bits(largest), P)) & MAGNITUDE
        tl.atomic_max(peak + row, largest, mask=row < rows, sem="relaxed")
    else:
        largest = from_bits(tl.max(largest, axis=0))
        raise_peak(peak, bits(scaled_turn(largest, P)) & MAGNITUDE)


@triton.jit
def round_tile(
    x, row_tile, column_tile, rows, keep, encode, global_value, seen, codes, block_scale,
    global_scale, swizzled, padded, seed_low, seed_high, sign_low, sign_high,
    P: tl.constexpr, NARROW: tl.constexpr, AGAIN: tl.constexpr
):  # fmt: skip
    """Rotate, scale, round and store tile x [R, C]; of ms_eden the bits of r, largest of each row.

    keep, encode, global_value: ``global_scales``. ms_eden reads none; its ``block_scale`` is
    float32 scratch for r, and ``finish_kernel`` does the rest. With a held amax, by which those
    were made, ``seen`` is raised to the tile's own. NARROW: x came as BF16; AGAIN: this is in a
    loop.
    """
    R: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1] // 16
    row, block = positions(row_tile, R), positions(column_tile, K)
    row_blocks = padded // 16

    # blocks [m, tile, k, 16]: tile is 1, or 16 for 16x16 blocks, then m = R / 16
    x = rotate(x, sign_low, sign_high, NARROW, P, AGAIN)
    x = tl.reshape(x, (R // P.tile, P.tile, K, 16))
    if not scaled_by_amax(P.rule):
        # needs no amax first; a block that is not finite leaves a NaN in the peak instead
        amax = block_bits(x)
        chosen, scale = ms_eden(x, from_bits(amax), P)
        largest = tl.max(tl.where(amax < INFINITY_BITS, bits(scale), NAN_BITS), axis=1)
    else:
        # one NaN or Inf anywhere makes every code 0 (of its row alone); with a held amax the codes
        # of its block
        amax = block_bits(x)
        largest = tl.max(amax, axis=1)  # nobody reads it, but Triton 3.6 cannot return None
        if P.held:
            all_finite, finite = finite_blocks(amax, seen)
            raise_global(global_scale, global_value, all_finite, row_tile, column_tile)
            x = tl.where(over_elements(finite), x, 0.0)
            amax = from_bits(tl.where(finite, amax, 0))
        else:
            amax = from_bits(tl.where(keep, amax, 0))
        if P.rule == "four_over_six" or P.rule == "scale_search":
            chosen, scale = searched(x, amax, encode, P)
        else:
            noise = x  # of the right shape, where the rule reads none
            if P.rule != "rtn":
                noise = element_noise(row, block, padded, seed_low, seed_high, P.tile)
            chosen, scale = plain(x, amax, encode, global_value, noise, P)
        if swizzled is not None:
            store_swizzled(swizzled, scale, row, block, rows, row_blocks, P.tile)

    store_scales(block_scale, scale, row_tile, block, (rows + P.tile - 1) // P.tile, row_blocks)
    store_codes(codes, tl.reshape(chosen, (R, K * 16)), keep, row, column_tile, rows, padded, P)
    return largest


@triton.jit
def known_scales(peak, global_scale, row, row_tile, column_tile, rows, P: tl.constexpr):
    """``global_scales``, stored too; of ms_eden, which has none yet, nothing that is read."""
    if scaled_by_amax(P.rule):
        keep, encode, global_value = global_scales(peak, row, rows, cap(P.rule), P)
        if P.held:  # what is not finite, ``finite_blocks`` says
            keep = tl.full((1, 1), 1, tl.int1)
        else:
            store_global(global_scale, global_value, keep, row, row_tile, column_tile, rows, P)
        return keep, encode, global_value
    else:
        return tl.full((1, 1), 1, tl.int1), 1.0, 1.0


@triton.jit
def quantize_tile(
    x, row_tile, column_tile, rows, seen, peak, codes, block_scale, global_scale, swizzled, padded,
    seed_low, seed_high, sign_low, sign_high, P: tl.constexpr, NARROW: tl.constexpr = False
):  # fmt: skip
    """``round_tile`` by the amax in ``peak``; ms_eden: ``peak`` becomes the largest r."""
    row = positions(row_tile, x.shape[0])
    keep, encode, global_value = known_scales(
        peak, global_scale, row, row_tile, column_tile, rows, P
    )
    largest = round_tile(
        x, row_tile, column_tile, rows, keep, encode, global_value, seen, codes, block_scale,
        global_scale, swizzled, padded, seed_low, seed_high, sign_low, sign_high, P, NARROW, False
    )  # fmt: skip
    if not scaled_by_amax(P.rule):
        raise_peak(peak, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=SEEDS)
def amax_kernel(
    x, x_scale, x_global, rows, columns, stride_row, stride_column, peak, sign_low, sign_high,
    P: tl.constexpr, CODED: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Largest magnitude of the (rotated) operand [rows, columns], or of each row, as bits.

    ``peak`` starts at 0. One program per tile. Without rotations and scales of rows it does not
    matter how the matrix lies, and it is read along its memory.
    """
    NARROW: tl.constexpr = CODED is None and x.dtype.element_ty == tl.bfloat16
    row_tile, column_tile = tile_of(columns, T.columns)
    BARE: tl.constexpr = len(P.round_scales) == 0 and not P.row_scaled
    if CODED is None and BARE:
        row = positions(row_tile, T.rows)[:, None]
        column = positions(column_tile, T.columns)[None, :]
        pointers = x + row * stride_row + column * stride_column
        tile = tl.load(pointers, mask=(row < rows) & (column < columns), other=0.0)
        largest = largest_of_rows(tile, 4)  # a row per warp
        raise_peak(peak, tl.max(tl.max(largest, axis=1), axis=0))
    else:
        sign_low, sign_high = seed_halves(sign_low, sign_high)
        tile = load_tile(
            x, x_scale, x_global, row_tile, column_tile, rows, columns, stride_row, stride_column,
            CODED, T
        )  # fmt: skip
        row = positions(row_tile, T.rows)
        find_peak(tile, row, rows, peak, sign_low, sign_high, P, NARROW)


@triton.jit(do_not_specialize=SEEDS)
def quantize_kernel(
    x, x_scale, x_global, rows, columns, stride_row, stride_column, seen, peak, codes,
    block_scale, global_scale, swizzled,
    padded, seed_low, seed_high, sign_low, sign_high,
    P: tl.constexpr, CODED: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Codes and scales of the operand [rows, columns], by its amax.

    x .. stride_column: a ``Source``. seen: see ``round_tile``, or None. peak .. global_scale:
    ``Target.stored``. swizzled: bytes, or None. padded: Kp. seed_high, sign_high: None where the
    low half points to a seed. A program takes T.turns tiles, one below the other: what is the same
    for all of them, the scales of the tensor and the signs of the rotation, it works out once.
    """
    seed_low, seed_high = seed_halves(seed_low, seed_high)
    sign_low, sign_high = seed_halves(sign_low, sign_high)
    NARROW: tl.constexpr = CODED is None and x.dtype.element_ty == tl.bfloat16
    first_tile, column_tile = tile_of(columns, T.columns, scaled_by_amax(P.rule) and not P.held)
    first_tile = first_tile * T.turns
    row = positions(first_tile, T.rows)
    keep, encode, global_value = known_scales(
        peak, global_scale, row, first_tile, column_tile, rows, P
    )

    # turns is 1 where every row has a scale of its own
    largest = tl.full((T.rows // P.tile,), 0, tl.int32)
    for turn in tl.range(T.turns):
        row_tile = first_tile + turn
        tile = load_tile(
            x, x_scale, x_global, row_tile, column_tile, rows, columns, stride_row, stride_column,
            CODED, T
        )  # fmt: skip
        found = round_tile(
            tile, row_tile, column_tile, rows, keep, encode, global_value, seen, codes,
            block_scale, global_scale, swizzled, padded, seed_low, seed_high, sign_low, sign_high,
            P, NARROW, T.turns > 1
        )  # fmt: skip
        if not scaled_by_amax(P.rule):
            largest = tl.maximum(largest, found)
    if not scaled_by_amax(P.rule):
        raise_peak(peak, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=BOTH_SEEDS)
def amax_both_kernel(
    x, rows, columns, stride_row, stride_column, peak_rows, sign_low_rows, sign_high_rows,
    peak_columns, sign_low_columns, sign_high_columns,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr,
    T_ROWS: tl.constexpr, T_COLUMNS: tl.constexpr
):  # fmt: skip
    """``amax_kernel`` of x and of x^T, where their rules want one."""
    BARE: tl.constexpr = len(P_ROWS.round_scales) == 0 and not P_ROWS.row_scaled
    LOOKS: tl.constexpr = scaled_by_amax(P_ROWS.rule) and not P_ROWS.held
    LOOKS_DOWN: tl.constexpr = scaled_by_amax(P_COLUMNS.rule) and not P_COLUMNS.held
    NARROW: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    row_tile, column_tile = tile_of(columns, T_ROWS.columns)
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)

    # tile and strides change places: the transpose is the same memory, read the other way. Which
    # of these are compiled at all, the policies decide
    if LOOKS_DOWN:
        tile = load_dense(
            x, column_tile, row_tile, columns, rows, stride_column, stride_row, T_COLUMNS
        )
        row = positions(column_tile, T_ROWS.columns)
        find_peak(
            tile, row, columns, peak_columns, sign_low_columns, sign_high_columns, P_COLUMNS, NARROW
        )

        # the same elements have the same maximum, where nothing turns them
        if LOOKS and BARE:
            find_peak(tile, row, rows, peak_rows, sign_low_rows, sign_high_rows, P_ROWS, NARROW)
    if LOOKS and not (LOOKS_DOWN and BARE):
        tile = load_dense(
            x, row_tile, column_tile, rows, columns, stride_row, stride_column, T_ROWS
        )
        row = positions(row_tile, T_ROWS.rows)
        find_peak(tile, row, rows, peak_rows, sign_low_rows, sign_high_rows, P_ROWS, NARROW)


@triton.jit(do_not_specialize=BOTH_SEEDS)
def quantize_both_kernel(
    x, rows, columns, stride_row, stride_column,
    seen_rows, peak_rows, codes_rows, block_scale_rows, global_scale_rows, padded_rows,
    seed_low_rows, seed_high_rows, sign_low_rows, sign_high_rows,
    seen_columns, peak_columns, codes_columns, block_scale_columns, global_scale_columns,
    padded_columns, seed_low_columns, seed_high_columns, sign_low_columns, sign_high_columns,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr,
    T_ROWS: tl.constexpr, T_COLUMNS: tl.constexpr
):  # fmt: skip
    """``quantize_kernel`` of x and of x^T.

    Each orientation loads the tile in the order that suits it; memory is read once, the second load
    comes out of the cache. ``policy.reads_once`` says where that pays.
    """
    seed_low_rows, seed_high_rows = seed_halves(seed_low_rows, seed_high_rows)
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    seed_low_columns, seed_high_columns = seed_halves(seed_low_columns, seed_high_columns)
    sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)
    NARROW: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    backwards: tl.constexpr = (scaled_by_amax(P_ROWS.rule) and not P_ROWS.held) or (
        scaled_by_amax(P_COLUMNS.rule) and not P_COLUMNS.held
    )
    row_tile, column_tile = tile_of(columns, T_ROWS.columns, backwards)

    # no swizzled scales: a GEMM that reads them (``scaled_mm``) makes them from the block scales
    tile = load_dense(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T_ROWS)
    quantize_tile(
        tile, row_tile, column_tile, rows, seen_rows, peak_rows, codes_rows, block_scale_rows,
        global_scale_rows, None,
        padded_rows, seed_low_rows, seed_high_rows, sign_low_rows, sign_high_rows, P_ROWS, NARROW
    )  # fmt: skip

    tile = load_dense(x, column_tile, row_tile, columns, rows, stride_column, stride_row, T_COLUMNS)
    quantize_tile(
        tile, column_tile, row_tile, columns, seen_columns, peak_columns, codes_columns,
        block_scale_columns, global_scale_columns, None, padded_columns, seed_low_columns,
        seed_high_columns, sign_low_columns, sign_high_columns, P_COLUMNS, NARROW
    )  # fmt: skip


@triton.jit(do_not_specialize=SEEDS)
def finish_kernel(
    lengths, peak, codes, block_scale, global_scale, swizzled, rows, row_blocks, seed_low,
    seed_high,
    ALIGNED: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """The scales of ms_eden once the largest r is known: lengths [rows, row_blocks] hold r.

    global_scale = R / 448, block_scale = e4m3_stochastic(r / global_scale), one program per tile of
    scales. ALIGNED: row_blocks is a multiple of 8, so that eight neighbours take the eight draws of
    one counter. Codes were written before anything was known to be non-finite; then they are
    cleared here.
    """
    seed_low, seed_high = seed_halves(seed_low, seed_high)
    row_tile, column_tile = tile_of(row_blocks, T.columns)
    row, block = positions(row_tile, T.rows), positions(column_tile, T.columns)
    inside = (row[:, None] < rows) & (block[None, :] < row_blocks)
    index = row[:, None] * row_blocks + block[None, :]

    # every program makes the global scale from the peak; 1 for a tensor of zeros
    largest = tl.load(peak + tl.arange(0, 1))[:, None]
    finite = largest < INFINITY_BITS
    longest = from_bits(tl.where(finite, largest, 0))
    top = tl.full(longest.shape, E4M3[2], tl.float32)
    global_value = tl.where(longest == 0.0, 1.0, tl.math.div_rn(longest, top))

    # the index of a scale is the number of its draw; lengths beside a NaN count as 0
    if ALIGNED:
        length = load_rows(lengths, row_tile, column_tile, rows, row_blocks, row_blocks, 1, T)
        counter = row[:, None] * (row_blocks // 8) + positions(column_tile, T.columns // 8)[None, :]
        k = draws(seed_low, seed_high, counter, BLOCK_SCALE_STREAM)
        k = tl.reshape(k, (T.rows, T.columns))
    else:
        length = tl.load(lengths + index, mask=inside, other=0.0)
        k = draw(seed_low, seed_high, index, BLOCK_SCALE_STREAM)
    length = tl.where(finite, length, 0.0)
    ratio = tl.minimum(tl.math.div_rn(length, tl.broadcast_to(global_value, length.shape)), E4M3[2])
    byte = drawn_code(ratio, k, E4M3)
    tl.store(block_scale + index, byte.to(tl.uint8), mask=inside)
    if swizzled is not None:
        store_swizzled(swizzled, byte, row, block, rows, row_blocks, 1)

    # the first program stores the global scale
    first = tl.arange(0, 1) == row_tile + column_tile
    global_value = tl.where(
        finite, global_value, from_bits(tl.full(longest.shape, NAN_BITS, tl.int32))
    )
    tl.store(global_scale + tl.arange(0, 1), tl.reshape(global_value, (1,)), mask=first)

    # a block of codes is two words
    if tl.load(peak) >= INFINITY_BITS:
        for half in tl.static_range(2):
            tl.store(codes + index * 2 + half, tl.full(index.shape, 0, tl.int32), mask=inside)


@triton.jit(do_not_specialize=("rank",))
def seeds_kernel(words, seeds, rank, GEMMS: tl.constexpr, COUNT: tl.constexpr):
    """Seeds [GEMMS, 3] of one call of a layer, from ``Noise.state``; see ``Backend.draw_seeds``.

    words: int64 [4] (seed, layer, calls, rank), the last negative where the argument ``rank``
    counts. COUNT: GEMMS rounded up to a power of two. One program.
    """
    gemm, side = tl.arange(0, COUNT), tl.arange(0, 2)

    # signs: fold_in(seed, layer, call, gemm), equal on all ranks
    low, high = seed_halves(words, None)
    low, high = fold_in(low, high, tl.load(words + 1))
    low, high = fold_in(low, high, tl.load(words + 2))
    low, high = fold_in(low, high, gemm.to(tl.int64))
    store_seeds(seeds + gemm * 3, low, high, gemm < GEMMS)

    # rounding: fold_in(signs, 1 + operand, rank), of the left and the right operand
    low, high = fold_in(low[:, None], high[:, None], (1 + side[None, :]).to(tl.int64))
    given = tl.load(words + 3)
    low, high = fold_in(low, high, tl.where(given < 0, rank, given))
    store_seeds(seeds + gemm[:, None] * 3 + 1 + side[None, :], low, high, gemm[:, None] < GEMMS)


@triton.jit
def store_seeds(pointers, low, high, inside):
    """Store int64 seeds from their halves."""
    tl.store(
        pointers,
        (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64),
        mask=inside,
    )


@triton.jit
def decode_kernel(
    codes, block_scale, global_scale, out, rows, columns, row_bytes,
    CODED: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """What codes stand for, [rows, columns] of the type of ``out``; global_scale may be None.

    Without it, e2m1 * block_scale is exact in each of the types. One program per tile [R, C].
    """
    row_tile, column_tile = tile_of(columns, C)
    row, column = positions(row_tile, R), positions(column_tile, C)
    values = decode_tile(codes, block_scale, row, column_tile, rows, row_bytes, CODED.tile, C)
    if global_scale is not None:
        values = values * load_global(global_scale, row, rows, CODED.row_scaled)
        if out.dtype.element_ty == tl.bfloat16:
            values = round_to_bf16(values)  # the interpreter's own cast truncates
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(
        out + row[:, None] * columns + column[None, :], values.to(out.dtype.element_ty), mask=inside
    )
