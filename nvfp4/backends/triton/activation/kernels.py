"""The kernels that make an activation in registers and quantise it at once; and its gradients.

    rms_kernel                  x [M, K]          -> rstd [M], and the amax of the result
    activation_amax_kernel      gate, up [M, K]   -> the amax of the result
    activation_quantize_kernel  both kinds        -> codes and scales of it, or of it and of its
                                                     transpose
    rms_gradient_kernel         x, dy             -> dx, and dweight's part of each slab of rows
    slab_sum_kernel             the parts [n, K]  -> dweight [K]
    swiglu_gradient_kernel      gate, up, dy      -> dgate, dup

The activation is never written: RMSNorm reads x once for the root mean squares and the amax (the
second time within a row comes out of the cache) and once to quantise it; SwiGLU reads gate and up
once for each.

Sums run in the reference's order: along a row ``LANES`` columns side by side, then these by halves;
of a weight's gradient first the ``SLAB`` rows of a program, then the slabs. Like all kernels these
must be launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from nvfp4.backends.triton.activation.arithmetic import (
    LANES,
    exp_negative,
    inverse_rms,
    lane_sum,
    load_activation,
    load_activation_transposed,
    load_vector,
    normalized,
    over,
    rounded,
    row_tree,
    sigmoid,
    silu,
)
from nvfp4.backends.triton.arithmetic import magnitude_bits, product
from nvfp4.backends.triton.noise import seed_halves
from nvfp4.backends.triton.quantize.kernels import (
    BOTH_SEEDS,
    find_peak,
    quantize_tile,
    tile_of,
)
from nvfp4.backends.triton.quantize.scales import raise_peak
from nvfp4.backends.triton.quantize.tiles import load_dense, positions, rotate


@triton.jit
def row_inverse_rms(x, row_tile, rows, columns, x_row, eps, T: tl.constexpr):
    """1 / rms of the rows of tile number ``row_tile``, [R]."""
    # each of the LANES adds up its own columns, one stretch after the other
    lanes = tl.full((T.rows, LANES), 0.0, tl.float32)
    for c in tl.range(0, tl.cdiv(columns, LANES)):
        tile = load_dense(x, row_tile, tl.full((), c, tl.int32), rows, columns, x_row, 1, T)
        lanes = lanes + product(tile, tile)
    return inverse_rms(lane_sum(lanes), columns, eps)


@triton.jit(do_not_specialize=BOTH_SEEDS)
def rms_kernel(
    x, weight, rstd, rows, columns, x_row, eps, peak_rows, sign_low_rows, sign_high_rows,
    peak_columns, sign_low_columns, sign_high_columns,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr, T_ROWS: tl.constexpr, T_COLUMNS: tl.constexpr,
    F: tl.constexpr
):  # fmt: skip
    """1 / rms of each row, and ``amax_both_kernel`` of what RMSNorm makes of them.

    A program takes T_ROWS.rows whole rows, in stretches of LANES columns. Without a policy for an
    orientation there is no amax of it.
    """
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)

    # the first pass over the rows
    row_tile = tl.program_id(0)
    row = positions(row_tile, T_ROWS.rows)
    scale = row_inverse_rms(x, row_tile, rows, columns, x_row, eps, T_ROWS)
    tl.store(rstd + row, scale, mask=row < rows)

    # the same rows once more, now that their scale is known; they are still in the cache
    if (P_ROWS is not None) or (P_COLUMNS is not None):
        scale = tl.where(row < rows, scale, 0.0)  # a row of padding is zero, even where eps is
        largest = tl.full((T_ROWS.rows,), 0, tl.int32)
        for c in tl.range(0, tl.cdiv(columns, LANES)):
            column_tile = tl.full((), c, tl.int32)
            column = positions(column_tile, LANES)
            gain = load_vector(weight, column, columns)

            # along the rows: LANES columns are whole groups of any rotation
            if P_ROWS is not None:
                tile = load_dense(x, row_tile, column_tile, rows, columns, x_row, 1, T_ROWS)
                tile = rotate(
                    normalized(tile, scale[:, None], gain[None, :], F),
                    sign_low_rows,
                    sign_high_rows,
                    False,
                    P_ROWS,
                )
                largest = tl.maximum(largest, tl.max(magnitude_bits(tile), axis=1))

            # down the columns: the rows of a program are whole groups of this policy's rotation
            if P_COLUMNS is not None:
                tile = load_dense(x, column_tile, row_tile, columns, rows, 1, x_row, T_COLUMNS)
                tile = normalized(tile, scale[None, :], gain[:, None], F)
                find_peak(
                    tile,
                    column,
                    columns,
                    peak_columns,
                    sign_low_columns,
                    sign_high_columns,
                    P_COLUMNS,
                )

        # whole rows are in this program, so that a peak per row needs no atomic
        if P_ROWS is not None:
            if P_ROWS.row_scaled:
                tl.store(peak_rows + row, largest, mask=row < rows)
            else:
                raise_peak(peak_rows, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=BOTH_SEEDS)
def activation_amax_kernel(
    first, second, rows, columns, first_row, second_row, peak_rows, sign_low_rows, sign_high_rows,
    peak_columns, sign_low_columns, sign_high_columns,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr, T_ROWS: tl.constexpr, T_COLUMNS: tl.constexpr,
    F: tl.constexpr
):  # fmt: skip
    """``amax_both_kernel`` of SwiGLU, in the orientations that have a policy."""
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)
    row_tile, column_tile = tile_of(columns, T_ROWS.columns)

    # SwiGLU has no rstd
    if P_ROWS is not None:
        tile = load_activation(
            first, second, None, row_tile, column_tile, rows, columns, first_row, second_row,
            T_ROWS, F
        )  # fmt: skip
        find_peak(
            tile,
            positions(row_tile, T_ROWS.rows),
            rows,
            peak_rows,
            sign_low_rows,
            sign_high_rows,
            P_ROWS,
        )

    # loaded and computed again, in the order that the transpose wants; the inputs are in the cache
    if P_COLUMNS is not None:
        tile = load_activation_transposed(
            first, second, None, column_tile, row_tile, columns, rows, first_row, second_row,
            T_COLUMNS, F
        )  # fmt: skip
        find_peak(
            tile, positions(column_tile, T_ROWS.columns), columns, peak_columns, sign_low_columns,
            sign_high_columns,
            P_COLUMNS
        )  # fmt: skip


@triton.jit(do_not_specialize=BOTH_SEEDS)
def activation_quantize_kernel(
    first, second, rstd, rows, columns, first_row, second_row,
    peak_rows, codes_rows, block_scale_rows, global_scale_rows, padded_rows,
    seed_low_rows, seed_high_rows, sign_low_rows, sign_high_rows,
    peak_columns, codes_columns, block_scale_columns, global_scale_columns, padded_columns,
    seed_low_columns, seed_high_columns, sign_low_columns, sign_high_columns,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr, T_ROWS: tl.constexpr, T_COLUMNS: tl.constexpr,
    F: tl.constexpr
):  # fmt: skip
    """``quantize_both_kernel`` of an activation; P_COLUMNS None: along its rows alone.

    rstd: of RMSNorm, from ``rms_kernel``.
    """
    seed_low_rows, seed_high_rows = seed_halves(seed_low_rows, seed_high_rows)
    sign_low_rows, sign_high_rows = seed_halves(sign_low_rows, sign_high_rows)
    if P_COLUMNS is not None:
        seed_low_columns, seed_high_columns = seed_halves(seed_low_columns, seed_high_columns)
        sign_low_columns, sign_high_columns = seed_halves(sign_low_columns, sign_high_columns)
    row_tile, column_tile = tile_of(columns, T_ROWS.columns)

    # no swizzled scales, as in ``quantize_both_kernel``
    tile = load_activation(
        first, second, rstd, row_tile, column_tile, rows, columns, first_row, second_row, T_ROWS, F
    )  # fmt: skip
    quantize_tile(
        tile, row_tile, column_tile, rows, None, peak_rows, codes_rows, block_scale_rows,
        global_scale_rows, None,
        padded_rows, seed_low_rows, seed_high_rows, sign_low_rows, sign_high_rows, P_ROWS
    )  # fmt: skip

    if P_COLUMNS is not None:
        tile = load_activation_transposed(
            first, second, rstd, column_tile, row_tile, columns, rows, first_row, second_row,
            T_COLUMNS, F
        )  # fmt: skip
        quantize_tile(
            tile, column_tile, row_tile, columns, None, peak_columns, codes_columns,
            block_scale_columns, global_scale_columns, None, padded_columns, seed_low_columns,
            seed_high_columns, sign_low_columns, sign_high_columns, P_COLUMNS
        )  # fmt: skip


@triton.jit
def store_tile(out, values, row, column, rows, columns, DTYPE: tl.constexpr):
    """Store tile [R, C] of a contiguous matrix [rows, columns], rounded to its dtype."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    values = rounded(values, DTYPE).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * columns + column[None, :], values, mask=inside)


@triton.jit
def rms_gradient_kernel(
    x, weight, dy, dx, slabs, rows, columns, x_row, eps, T: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """dx of a slab of rows, and its part of dweight: slabs [programs, columns].

    dx = rstd (g - x (row_sum(g x) / K) rstd^2), g = dy w; dweight = sum(dy round_x(x rstd)). dy is
    contiguous.
    """
    INNER: tl.constexpr = F.inner
    row_tile = tl.program_id(0)
    row = positions(row_tile, T.rows)

    # row_sum(x^2) and row_sum(g x), in one pass over the rows
    squares = tl.full((T.rows, LANES), 0.0, tl.float32)
    products = tl.full((T.rows, LANES), 0.0, tl.float32)
    for c in tl.range(0, tl.cdiv(columns, LANES)):
        column_tile = tl.full((), c, tl.int32)
        gain = load_vector(weight, positions(column_tile, LANES), columns)[None, :]
        tile = load_dense(x, row_tile, column_tile, rows, columns, x_row, 1, T)
        gradient = load_dense(dy, row_tile, column_tile, rows, columns, columns, 1, T)
        squares = squares + product(tile, tile)
        products = products + product(gradient * gain, tile)

    # where eps is 0 the rstd of a row of padding would be Inf, and its part of dweight NaN
    rstd = tl.where(row < rows, inverse_rms(lane_sum(squares), columns, eps), 0.0)
    slope = over(lane_sum(products), columns) * (rstd * rstd)
    rstd, slope = rstd[:, None], slope[:, None]

    # the second pass, out of the cache
    for c in tl.range(0, tl.cdiv(columns, LANES)):
        column_tile = tl.full((), c, tl.int32)
        column = positions(column_tile, LANES)
        gain = load_vector(weight, column, columns)[None, :]
        tile = load_dense(x, row_tile, column_tile, rows, columns, x_row, 1, T)
        gradient = load_dense(dy, row_tile, column_tile, rows, columns, columns, 1, T)
        difference = product(gradient, gain) - product(tile, slope)
        store_tile(dx, rstd * difference, row, column, rows, columns, INNER)
        part = row_tree(product(gradient, rounded(tile * rstd, INNER)))
        tl.store(slabs + row_tile.to(tl.int64) * columns + column, part, mask=column < columns)


@triton.jit
def slab_sum_kernel(slabs, out, count, columns, C: tl.constexpr, DTYPE: tl.constexpr):
    """Sum of each column of slabs [count, columns], C columns per program."""
    column = positions(tl.program_id(0), C)

    # in the order of ``row_sum`` over [columns, count]
    lanes = tl.zeros((C, LANES), tl.float32)
    for start in tl.range(0, tl.cdiv(count, LANES)):
        slab = positions(tl.full((), start, tl.int32), LANES)
        inside = (column[:, None] < columns) & (slab[None, :] < count)
        lanes = lanes + tl.load(
            slabs + slab[None, :] * columns + column[:, None], mask=inside, other=0.0
        )
    total = rounded(lane_sum(lanes), DTYPE).to(out.dtype.element_ty)
    tl.store(out + column, total, mask=column < columns)


@triton.jit
def swiglu_gradient_kernel(
    gate, up, dy, dgate, dup, rows, columns, gate_row, up_row, T: tl.constexpr, F: tl.constexpr,
    UP: tl.constexpr
):  # fmt: skip
    """dgate and dup of dy, which is contiguous like them; UP: the dtype of up.

    dup = dy round_gate(silu(gate)), dgate = (dy up) (s (1 + gate (1 - s))), s = sigmoid(gate).
    """
    INNER: tl.constexpr = F.inner
    row_tile, column_tile = tile_of(columns, T.columns)
    row, column = positions(row_tile, T.rows), positions(column_tile, T.columns)

    gates = load_dense(gate, row_tile, column_tile, rows, columns, gate_row, 1, T)
    gradient = load_dense(dy, row_tile, column_tile, rows, columns, columns, 1, T)
    e = exp_negative(gates)
    store_tile(dup, gradient * silu(gates, e, F), row, column, rows, columns, UP)

    # one exponential serves both
    s = sigmoid(gates, e)
    slope = s * (1.0 + product(gates, 1.0 - s))
    ups = load_dense(up, row_tile, column_tile, rows, columns, up_row, 1, T)
    store_tile(dgate, (gradient * ups) * slope, row, column, rows, columns, INNER)
