"""The kernels that quantise: amax, then codes and scales; the end of ms_eden; seeds; decoding.

    amax_kernel         x [M, K]      -> peak, int32 [1] or [M]: the largest magnitude, as bits
    quantize_kernel     x, peak       -> codes int32 [M, Kp/8], block_scale uint8 [M/tile, Kp/16],
                                         global_scale float32 [1] or [M], swizzled scales if wanted
    *_both_kernel       x             -> the same of x and of x^T, from one read of memory
    finish_kernel       r [M, Kp/16]  -> block and global scales of ms_eden, whose range is known
                                         only when every block is done
    seeds_kernel, decode_kernel       one launch each

A program takes one tile [R, C]: load, rotate, scale, round, pack, store. There is one family of
kernels: what differs between quantisers is the ``Policy`` a kernel is compiled for (``P``), what
differs between sources is how a tile is loaded (``CODED``), and ``Tile`` says its size (``T``).

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
    encode_scale,
    fold_in,
    from_bits,
    magnitude_bits,
    over_elements,
    reciprocal,
    round_to_bf16,
    seed_halves,
    stochastic,
    uniform,
)
from nvfp4.backends.triton.quantize.rules import cap, ms_eden, plain, scaled_by_amax, searched
from nvfp4.backends.triton.quantize.tiles import (
    decode_columns,
    decode_tile,
    element_noise,
    load_dense,
    load_global,
    positions,
    rotate,
    store_codes,
    store_swizzled,
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
def tile_of(columns, C: tl.constexpr):
    """(row tile, column tile) of this program."""
    column_tiles = (columns + C - 1) // C
    return tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles


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
def raise_peak(peak, largest):
    """Raise the number at ``peak`` to ``largest``, by an atomic only where that changes something.

    Of a large matrix 16 to 65 thousand programs would queue at one address; after the first few,
    hardly any of them has something to add. What is read may be old, but then it is smaller, so
    nothing is lost. The read goes to L2 (volatile), where the peak is raised: a line in L1 would
    stay as it was when it first came in.
    """
    tl.atomic_max(peak, largest, mask=largest > tl.load(peak, volatile=True), sem="relaxed")


@triton.jit
def find_peak(x, row, rows, peak, sign_low, sign_high, P: tl.constexpr):
    """Raise ``peak`` (bits, one number or one per row) to the largest magnitude of tile x [R, C].

    A rotated operand is scaled by the amax of what the rotation makes of it.
    """
    largest = tl.max(magnitude_bits(rotate(x, sign_low, sign_high, P)), axis=1)
    if P.row_scaled:
        tl.atomic_max(peak + row, largest, mask=row < rows, sem="relaxed")
    else:
        raise_peak(peak, tl.max(largest, axis=0))


@triton.jit
def global_scales(peak, row, rows, P: tl.constexpr):
    """(whether all is finite, encode scale, global scale) from the amax, [R, 1] or [1, 1]."""
    # a caller's own amax may have its sign set; a NaN that has would pass for a number below all
    if P.row_scaled:
        largest = tl.load(peak + row, mask=row < rows, other=0)[:, None] & MAGNITUDE
    else:
        largest = tl.load(peak + tl.arange(0, 1))[:, None] & MAGNITUDE

    # where not all is finite the amax counts as zero, so that no code depends on a NaN
    finite = largest < INFINITY_BITS
    encode = encode_scale(from_bits(tl.where(finite, largest, 0)), cap(P.rule))
    return finite, encode, reciprocal(encode)


@triton.jit
def store_global(global_scale, value, finite, row, row_tile, column_tile, rows, P: tl.constexpr):
    """Store the global scales [M] or [1], NaN where not all is finite.

    Every program has them; the first of each row of tiles, or of all, stores.
    """
    value = tl.where(finite, value, from_bits(tl.full(value.shape, NAN_BITS, tl.int32)))
    if P.row_scaled:
        inside = (row < rows) & (tl.arange(0, 1) == column_tile)
        tl.store(global_scale + row, tl.reshape(value, (row.shape[0],)), mask=inside)
    else:
        first = tl.arange(0, 1) == row_tile + column_tile
        tl.store(global_scale + tl.arange(0, 1), tl.reshape(value, (1,)), mask=first)


@triton.jit
def finite_blocks(x, seen):
    """Whether all is finite, [1, 1], and each block [m, k] of x; ``seen`` is raised, unless None.

    For a held amax: nobody has looked at x before, so this pass finds what is not finite.
    """
    largest = tl.max(tl.max(magnitude_bits(x), axis=3), axis=1)
    of_tile = tl.max(tl.max(largest, axis=1), axis=0)
    if seen is not None:
        raise_peak(seen, of_tile)
    return tl.full((1, 1), 0, tl.int32) + of_tile < INFINITY_BITS, largest < INFINITY_BITS


@triton.jit
def raise_global(global_scale, value, finite, row_tile, column_tile):
    """Store the global scale [1], which starts at 0, NaN if any tile is not finite.

    The first program has the value, those with a NaN or Inf raise it to NaN, in any order: as bits
    a NaN is above every scale.
    """
    number = tl.reshape(tl.where(finite, bits(value), NAN_BITS), (1,))
    place = global_scale.to(tl.pointer_type(tl.int32)) + tl.arange(0, 1)
    first = tl.arange(0, 1) == row_tile + column_tile
    says = first | (tl.reshape(finite, (1,)) == 0)
    tl.atomic_max(place, number, mask=says, sem="relaxed")


@triton.jit
def store_scales(block_scale, scales, row_tile, block, scale_rows, row_blocks):
    """Store block scales [m, C/16] of row tile ``row_tile``, inside of [scale_rows, row_blocks]."""
    row = positions(row_tile, scales.shape[0])
    inside = (row[:, None] < scale_rows) & (block[None, :] < row_blocks)
    pointers = block_scale + row[:, None] * row_blocks + block[None, :]
    tl.store(pointers, scales.to(block_scale.dtype.element_ty), mask=inside)


@triton.jit
def quantize_tile(
    x, row_tile, column_tile, rows, seen, peak, codes, block_scale, global_scale, swizzled, padded,
    seed_low, seed_high, sign_low, sign_high, P: tl.constexpr
):  # fmt: skip
    """Rotate, scale, round and store tile x [R, C].

    With a held amax, which ``peak`` then is, ``seen`` is raised to the tile's own.

    ms_eden: ``block_scale`` is float32 scratch for r, ``peak`` becomes its largest,
    ``finish_kernel`` does the rest.
    """
    R: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1] // 16
    row, block = positions(row_tile, R), positions(column_tile, K)
    row_blocks = padded // 16

    # blocks [m, tile, k, 16]: tile is 1, or 16 for 16x16 blocks, then m = R / 16
    x = tl.reshape(rotate(x, sign_low, sign_high, P), (R // P.tile, P.tile, K, 16))
    if not scaled_by_amax(P.rule):
        # ms_eden needs no amax first; a block that is not finite leaves a NaN in the peak instead
        amax = tl.max(tl.max(magnitude_bits(x), axis=3), axis=1)
        chosen, scale = ms_eden(x, from_bits(amax), P)
        largest = tl.where(amax < INFINITY_BITS, bits(scale), NAN_BITS)
        raise_peak(peak, tl.max(tl.max(largest, axis=1), axis=0))
    else:
        # one NaN or Inf anywhere makes every code 0 and the global scale NaN (of its row alone);
        # with a held amax the codes of its block
        finite, encode, global_value = global_scales(peak, row, rows, P)
        if P.held:
            all_finite, finite = finite_blocks(x, seen)
        x = tl.where(over_elements(finite), x, 0.0)
        amax = from_bits(tl.max(tl.max(magnitude_bits(x), axis=3), axis=1))

        if P.rule == "four_over_six" or P.rule == "scale_search":
            chosen, scale = searched(x, amax, encode, P)
        else:
            noise = x  # of the right shape, where the rule reads none
            if P.rule != "rtn":
                noise = element_noise(row, block, padded, seed_low, seed_high, P.tile)
            chosen, scale = plain(x, amax, encode, global_value, noise, P)

        if P.held:
            raise_global(global_scale, global_value, all_finite, row_tile, column_tile)
        else:
            store_global(global_scale, global_value, finite, row, row_tile, column_tile, rows, P)
        if swizzled is not None:
            store_swizzled(swizzled, scale, row, block, rows, row_blocks, P.tile)

    store_scales(block_scale, scale, row_tile, block, (rows + P.tile - 1) // P.tile, row_blocks)
    store_codes(codes, tl.reshape(chosen, (R, K * 16)), row, column_tile, rows, padded)


@triton.jit(do_not_specialize=SEEDS)
def amax_kernel(
    x, x_scale, x_global, rows, columns, stride_row, stride_column, peak, sign_low, sign_high,
    P: tl.constexpr, CODED: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Largest magnitude of the (rotated) operand [rows, columns], or of each row, as bits.

    ``peak`` starts at 0. One program per tile.
    """
    sign_low, sign_high = seed_halves(sign_low, sign_high)
    row_tile, column_tile = tile_of(columns, T.columns)
    tile = load_tile(
        x, x_scale, x_global, row_tile, column_tile, rows, columns, stride_row, stride_column,
        CODED, T
    )  # fmt: skip
    find_peak(tile, positions(row_tile, T.rows), rows, peak, sign_low, sign_high, P)


@triton.jit(do_not_specialize=SEEDS)
def quantize_kernel(
    x, x_scale, x_global, rows, columns, stride_row, stride_column, seen, peak, codes,
    block_scale, global_scale, swizzled,
    padded, seed_low, seed_high, sign_low, sign_high,
    P: tl.constexpr, CODED: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Codes and scales of the operand [rows, columns], by its amax; one program per tile.

    x .. stride_column: a ``Source``. seen: see ``quantize_tile``, or None. peak .. global_scale:
    ``Target.stored``. swizzled: bytes, or None. padded: Kp. seed_high, sign_high: None where the
    low half points to a seed.
    """
    seed_low, seed_high = seed_halves(seed_low, seed_high)
    sign_low, sign_high = seed_halves(sign_low, sign_high)
    row_tile, column_tile = tile_of(columns, T.columns)
    tile = load_tile(
        x, x_scale, x_global, row_tile, column_tile, rows, columns, stride_row, stride_column,
        CODED, T
    )  # fmt: skip
    quantize_tile(
        tile, row_tile, column_tile, rows, seen, peak, codes, block_scale, global_scale, swizzled,
        padded, seed_low, seed_high, sign_low, sign_high, P
    )  # fmt: skip


@triton.jit(do_not_specialize=BOTH_SEEDS)
def amax_both_kernel(
    x, rows, columns, stride_row, stride_column, peak_rows, sign_low_rows, sign_high_rows,
    peak_columns, sign_low_columns, sign_high_columns,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr,
    T_ROWS: tl.constexpr, T_COLUMNS: tl.constexpr
):  # fmt: skip
    """``amax_kernel`` of x and of x^T, where their rules want one."""
    row_tile, column_tile = tile_of(columns, T_ROWS.columns)
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)

    # which of these are compiled at all, the policies decide
    if scaled_by_amax(P_ROWS.rule) and not P_ROWS.held:
        tile = load_dense(
            x, row_tile, column_tile, rows, columns, stride_row, stride_column, T_ROWS
        )
        find_peak(
            tile,
            positions(row_tile, T_ROWS.rows),
            rows,
            peak_rows,
            sign_low_rows,
            sign_high_rows,
            P_ROWS,
        )

    # tile and strides change places: the transpose is the same memory, read the other way
    if scaled_by_amax(P_COLUMNS.rule) and not P_COLUMNS.held:
        tile = load_dense(
            x, column_tile, row_tile, columns, rows, stride_column, stride_row, T_COLUMNS
        )
        find_peak(
            tile, positions(column_tile, T_ROWS.columns), columns, peak_columns, sign_low_columns,
            sign_high_columns,
            P_COLUMNS
        )  # fmt: skip


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
    comes out of the cache. Instructions counted for sm_100 say that this may not pay: for
    ms_eden(1) 103 cycles per element, 94 of them in shared memory and shuffles through which the
    second load goes, and 45 + 33 for a kernel per orientation (benchmarks/NOTES.md).
    """
    seed_low_rows, seed_high_rows = seed_halves(seed_low_rows, seed_high_rows)
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    seed_low_columns, seed_high_columns = seed_halves(seed_low_columns, seed_high_columns)
    sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)
    row_tile, column_tile = tile_of(columns, T_ROWS.columns)

    # no swizzled scales: a GEMM that reads them (``scaled_mm``) makes them from the block scales
    tile = load_dense(x, row_tile, column_tile, rows, columns, stride_row, stride_column, T_ROWS)
    quantize_tile(
        tile, row_tile, column_tile, rows, seen_rows, peak_rows, codes_rows, block_scale_rows,
        global_scale_rows, None,
        padded_rows, seed_low_rows, seed_high_rows, sign_low_rows, sign_high_rows, P_ROWS
    )  # fmt: skip

    tile = load_dense(x, column_tile, row_tile, columns, rows, stride_column, stride_row, T_COLUMNS)
    quantize_tile(
        tile, column_tile, row_tile, columns, seen_columns, peak_columns, codes_columns,
        block_scale_columns, global_scale_columns, None, padded_columns, seed_low_columns,
        seed_high_columns, sign_low_columns, sign_high_columns, P_COLUMNS
    )  # fmt: skip


@triton.jit(do_not_specialize=SEEDS)
def finish_kernel(
    lengths, peak, codes, block_scale, global_scale, swizzled, rows, row_blocks, seed_low,
    seed_high,
    R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The scales of ms_eden once the largest r is known: lengths [rows, row_blocks] hold r.

    global_scale = R / 448, block_scale = e4m3_stochastic(r / global_scale), one program per [R, C]
    scales. Codes were written before anything was known to be non-finite; then they are cleared
    here.
    """
    seed_low, seed_high = seed_halves(seed_low, seed_high)
    row_tile, column_tile = tile_of(row_blocks, C)
    row, block = positions(row_tile, R), positions(column_tile, C)
    inside = (row[:, None] < rows) & (block[None, :] < row_blocks)
    index = row[:, None] * row_blocks + block[None, :]

    # every program makes the global scale from the peak; 1 for a tensor of zeros
    largest = tl.load(peak + tl.arange(0, 1))[:, None]
    finite = largest < INFINITY_BITS
    longest = from_bits(tl.where(finite, largest, 0))
    top = tl.full(longest.shape, E4M3[2], tl.float32)
    global_value = tl.where(longest == 0.0, 1.0, tl.math.div_rn(longest, top))

    # the index of a scale is the number of its draw; lengths beside a NaN count as 0
    length = tl.load(lengths + index, mask=inside & finite, other=0.0)
    ratio = tl.minimum(tl.math.div_rn(length, tl.broadcast_to(global_value, length.shape)), E4M3[2])
    byte = stochastic(ratio, uniform(seed_low, seed_high, index, BLOCK_SCALE_STREAM), E4M3)
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
    for half in tl.static_range(2):
        tl.store(
            codes + index * 2 + half, tl.full(index.shape, 0, tl.int32), mask=inside & (finite == 0)
        )


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
